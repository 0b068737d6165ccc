// get_mla_metadata: deals rows of given lengths to parts of equal load (the plan, flashmla_ops/plan.py).
//
// Row r costs row_cost + tiles(r), tiles(r) = ceil(cache_seqlens[r] / 64). On a line: the rows lie end to end on a line
// of cost of length `total`; cut p stands at floor(p * total / parts) and falls into the row r with
// row_begin(r) <= position < row_begin(r + 1), at tile max(position - row_begin(r) - row_cost, 0). Part p lies between
// the cuts p and p + 1. num_splits is the prefix sum of the parts that touch each row: 1 + the cuts inside it. Alike:
// every row has as many parts.
//
// Grid: one CTA, each thread with as many consecutive rows as it takes. A scan gives every row its place on the line,
// and that its cuts: those below a position x are ceil(x * parts / total), so nothing is searched. A row leaves a
// mark at the first of its cuts, and another one if that one does not split it. Between two cuts lie kMinTiles +
// row_cost or more, so a row has at most one cut that does not: the marks say all that parts and num_splits need, and a
// warp finds them by shuffles. Any architecture.
//
// It runs once a decode step, before everything else, on one multiprocessor: what counts is the length of the chain of
// dependent instructions, and that they be few, since none of them is in the instruction cache. So all is computed in
// 32 bits where the total allows it, which the CTA knows after the scan.
//
// Uneven queries have a kernel of their own: a row may there have thousands of blocks (flashmla_ops/plan.py) that each
// count as a row, and its cuts are dealt to threads.

#include <climits>
#include <type_traits>

#include "check.h"
#include "get_mla_metadata.cuh"
#include "params.h"

namespace flashmla {
namespace {

constexpr int kWarpParts = 31;  // of a warp, which has 32 cuts: the last part's next one too
constexpr int kFewThreads = (kMaxParts + kWarpParts - 1) / kWarpParts * 32;  // warps for all parts, at least
constexpr int kManyThreads = 1024;
constexpr int kWords = kMaxParts / 32;
// Totals below this are planned in 32 bits: products with kMaxParts fit, fp32 is exact, and the sum of kManyThreads
// sums, none of them taken for more than this, cannot overflow.
constexpr int kSmallTotal = 1 << 20;

struct SharedStorage {
    int small_sum[32];                          // of the warps
    int64_t sum[32];                            // of the warps
    int most[32], least[32];                    // tiles of a row, among the warps'
    uint32_t marked[kWords], starting[kWords];  // bit p: cut p is the first of its row; and does not split it
    int marked_row[kMaxParts];                  // at the marks: the row,
    int64_t marked_begin[kMaxParts];            // and where on the line it begins
};

// a / b, with an error of 2^-22 at most, in few instructions.
__device__ float ratio(float a, float b) { return __fdividef(a, b); }

// The line of cost and its division.
template <typename Int>
struct Line {
    Int total;
    int parts;
    float cuts_per_cost;

    __device__ Line(Int total, const MetadataParams& params)
        : total(total),
          parts(static_cast<int>(
              max(Int{1}, min(static_cast<Int>(params.num_parts), total / (kMinTiles + params.row_cost))))),
          cuts_per_cost(ratio(static_cast<float>(parts), static_cast<float>(total))) {}

    // How many cuts stand below x, 0 <= x <= total: ceil(x * parts / total), from an estimate. That of 32 bits is above
    // the quotient by less than 2^-9, so that its integer part is the ceiling or one less.
    __device__ int cuts_below(Int x) const {
        const Int wanted = x * parts;
        int cuts = static_cast<int>(static_cast<float>(x) * cuts_per_cost + 0x1p-10f);
        if constexpr (std::is_same_v<Int, int>) {
            cuts += cuts * total < wanted;
        } else {
            while (cuts * total < wanted) ++cuts;
            while (cuts > 0 && (cuts - 1) * total >= wanted) --cuts;
        }
        return cuts;
    }
};

// ---------------------------------------------------------------------------------------------------- device helpers

// The marks, of which each lane has a word; lanes beyond kWords have the same ones again.
struct Marks {
    uint32_t marked, starting;
    int starting_before;  // in the words before

    __device__ explicit Marks(const SharedStorage& shared)
        : marked(shared.marked[threadIdx.x % kWords]), starting(shared.starting[threadIdx.x % kWords]) {
        const int lane = threadIdx.x % kWords, here = __popc(starting);
        int up_to = here;
#pragma unroll
        for (int offset = 1; offset < kWords; offset *= 2) {
            const int below = __shfl_up_sync(~0u, up_to, offset, kWords);
            if (lane >= offset) up_to += below;
        }
        starting_before = up_to - here;
    }

    // What follows is called by a whole warp.

    // How many of the first `cuts` (1 or more) do not split their row.
    __device__ int starting_below(int cuts) const {
        const int word = (cuts - 1) / 32;
        const uint32_t bits = __shfl_sync(~0u, starting, word) & (~0u >> (31 - (cuts - 1) % 32));
        return __shfl_sync(~0u, starting_before, word) + __popc(bits);
    }

    __device__ bool is_starting(int cut) const { return __shfl_sync(~0u, starting, cut / 32) >> cut % 32 & 1; }

    // The last mark up to `cut`.
    __device__ int last_up_to(int cut) const {
        const uint32_t words = __ballot_sync(~0u, marked != 0);
        const int word = cut / 32;
        const uint32_t low = __shfl_sync(~0u, marked, word) & (~0u >> (31 - cut % 32));
        const int low_word = low != 0 ? word : 31 - __clz(words & ((1u << word) - 1));
        const uint32_t other_low = __shfl_sync(~0u, marked, low_word);
        return low_word * 32 + 31 - __clz(low != 0 ? low : other_low);
    }
};

__device__ int ceil_div(int x, int y) { return x / y + (x % y != 0); }
__device__ int64_t ceil_div(int64_t x, int y) { return x / y + (x % y != 0); }

// --------------------------------------------------------------------------------------------------- rows cut alike

// Into how many parts each of `rows` rows is cut, the longest of `most` tiles, the shortest of `least`, if that is
// better than the line; else 0.
template <typename Int>
__device__ int parts_if_alike(const MetadataParams& params, int rows, int most, int least, const Line<Int>& line) {
    int worth = max(1, static_cast<int>(sqrtf(static_cast<float>(most) / kSharesPerTile)));  // tiles; rounded up:
    while (kSharesPerTile * worth * worth < most) ++worth;
    const int parts = max(1, min(min(ceil_div(most, worth), least), params.num_parts / rows));
    return ceil_div(most, parts) <= ceil_div(line.total, line.parts) ? parts : 0;
}

template <typename Int>
__device__ int parts_of_a_row(const MetadataParams& params, const SharedStorage& shared, const Line<Int>& line) {
    if (params.b == 0 || params.b > params.num_parts) return 0;
    const int lane = threadIdx.x % 32;
    const bool is_warp = lane < blockDim.x / 32;
    const int most = __reduce_max_sync(~0u, is_warp ? shared.most[lane] : 0);
    const int least = __reduce_min_sync(~0u, is_warp ? shared.least[lane] : INT_MAX);
    return parts_if_alike(params, params.b, most, least, line);
}

__device__ void write_alike(const MetadataParams& params, int parts_of_row) {
    for (int part = threadIdx.x; part < kMaxParts; part += blockDim.x) {
        const int row = part / parts_of_row, split = part - row * parts_of_row;
        int4 work = kNoWork;
        if (row < params.b) {
            const int tiles = num_tiles(params, row), each = tiles / parts_of_row, rest = tiles - each * parts_of_row;
            const auto cut = [&](int i) { return i * each + i * rest / parts_of_row; };
            work = {row, cut(split), row, cut(split + 1)};
        }
        write_part(params, part, work, row < params.b ? split : 0);
    }
    for (int row = threadIdx.x; row <= params.b; row += blockDim.x) params.num_splits[row] = row * parts_of_row;
}

// ------------------------------------------------------------------------------------------------------------ kernel

// The columns of a warp's parts, each from its cut and the next one, which is the next lane's.
template <typename Int>
__device__ void write_parts(const MetadataParams& params, const SharedStorage& shared, const Line<Int>& line,
                            const Marks& marks) {
    const int lane = threadIdx.x % 32, cut = threadIdx.x / 32 * kWarpParts + lane;
    const int first = marks.last_up_to(cut);
    const bool first_starts = marks.is_starting(first);
    int row = params.b, tile = 0;
    if (cut < line.parts && params.b > 0) {
        row = shared.marked_row[first];
        const Int first_tile = static_cast<Int>(shared.marked_begin[first]) + params.row_cost;
        using Unsigned = std::make_unsigned_t<Int>;
        const Int position =
            static_cast<Int>(static_cast<Unsigned>(cut * line.total) / static_cast<Unsigned>(line.parts));
        tile = static_cast<int>(max(position - first_tile, Int{0}));
    }
    const int next_row = __shfl_down_sync(~0u, row, 1), next_tile = __shfl_down_sync(~0u, tile, 1);
    if (lane == kWarpParts || cut >= kMaxParts) return;
    int4 work = kNoWork;
    int first_split = 0;
    if (row < params.b) {
        const bool whole = next_tile == 0;  // the next part starts with a row of its own
        const int last_row = whole ? next_row - 1 : next_row;
        work = {row, tile, last_row, whole ? num_tiles(params, last_row) : next_tile};
        first_split = cut - first + !first_starts;
    }
    write_part(params, cut, work, first_split);
}

// What follows the scan: this thread's rows from first_row on begin at `begin` on a line of length `total`.
template <typename Int>
__device__ void write_plan(const MetadataParams& params, SharedStorage& shared, int first_row, int per_thread,
                           const Int begin, const Int total) {
    const Line<Int> line(total, params);
    if (const int parts = parts_of_a_row(params, shared, line); parts > 0) return write_alike(params, parts);
    Int at = begin;
    int first = line.cuts_below(at);
#pragma unroll 1  // fewer instructions to fetch
    for (int row = first_row; row < min(first_row + per_thread, params.b); ++row) {
        const Int next = at + params.row_cost + num_tiles(params, row);
        const int end = line.cuts_below(next);
        if (first < end) {
            const uint32_t bit = 1u << first % 32;
            atomicOr(&shared.marked[first / 32], bit);
            if (line.cuts_below(min(at + params.row_cost + 1, next)) > first)
                atomicOr(&shared.starting[first / 32], bit);
            shared.marked_row[first] = row;
            shared.marked_begin[first] = at;
        }
        at = next;
        first = end;
    }
    __syncthreads();

    const Marks marks(shared);
    if (threadIdx.x < kFewThreads) write_parts(params, shared, line, marks);
    if (threadIdx.x == 0) params.num_splits[0] = 0;
    at = begin;
#pragma unroll 1
    for (int row = first_row; row < first_row + per_thread; ++row) {  // as often in every lane
        const bool exists = row < params.b;
        at += exists ? params.row_cost + num_tiles(params, row) : 0;
        const int cuts = line.cuts_below(at);
        const int splits = row + 1 + cuts - marks.starting_below(cuts);
        if (exists) params.num_splits[row + 1] = splits;
    }
}

__global__ void __launch_bounds__(kManyThreads) get_mla_metadata_kernel(const MetadataParams params, int per_thread) {
    __shared__ SharedStorage shared;
    const int first_row = min(static_cast<int>(threadIdx.x) * per_thread, params.b);
    int64_t cost = 0;
    int most = 0, least = INT_MAX;
#pragma unroll 4
    for (int row = first_row; row < min(first_row + per_thread, params.b); ++row) {
        const int tiles = num_tiles(params, row);
        cost += params.row_cost + tiles;
        most = max(most, tiles);
        least = min(least, tiles);
    }
    most = __reduce_max_sync(~0u, most);
    least = __reduce_min_sync(~0u, least);
    if (threadIdx.x % 32 == 0) {
        shared.most[threadIdx.x / 32] = most;
        shared.least[threadIdx.x / 32] = least;
    }
    if (threadIdx.x < kWords) shared.marked[threadIdx.x] = shared.starting[threadIdx.x] = 0;

    int small_total;
    const int small_before =
        sum_before(static_cast<int>(min(cost, int64_t{kSmallTotal})), shared.small_sum, small_total);
    if (small_total < kSmallTotal) {
        write_plan(params, shared, first_row, per_thread, small_before, small_total);
    } else {
        int64_t total;
        const int64_t before = sum_before(cost, shared.sum, total);
        write_plan(params, shared, first_row, per_thread, before, total);
    }
}

// ----------------------------------------------------------------------------------------------------- uneven queries

// Where a cut of the line stands, the first cut in that block, and the last row above that has blocks.
struct Cut {
    int row, block, tile, first, above;
};

struct UnevenStorage {
    int64_t sum[2][32];  // of the warps: cost, blocks
    int most[32], least[32], last_row[32];
    int parts_of_block;               // if every block is cut alike, else 0
    uint32_t marked[kWords];          // bit p: cut p is the first of its row
    uint32_t starting[kWords];        // and: does not split its block
    int marked_row[kMaxParts];        // at the marks: the row,
    int marked_above[kMaxParts];      // the last row above that has blocks,
    int64_t marked_begin[kMaxParts];  // and where on the line the row begins
    Cut cuts[kMaxParts + 1];
};

struct BlocksOf {
    int tiles;       // of keys, of each
    int64_t blocks;  // of the row
    int64_t cost;    // of each

    __device__ BlocksOf(const MetadataParams& params, int row)
        : tiles(num_tiles(params, row)),
          blocks(num_blocks(params, row, rows_of_block(params.group))),
          cost(params.row_cost + tiles) {}
};

// The last bit that is set up to bit `end`; there is one.
__device__ int last_bit(const uint32_t (&words)[kWords], int end) {
    int word = end / 32;
    uint32_t bits = words[word] & (~0u >> (31 - end % 32));
    while (bits == 0 && word > 0) bits = words[--word];
    return word * 32 + 31 - __clz(bits);
}

// The number of bits set in words 0 .. up to bit `end`, exclusive.
__device__ int bits_below(const uint32_t (&words)[kWords], int end) {
    int count = 0;
    for (int word = 0; word < end / 32; ++word) count += __popc(words[word]);
    return end % 32 == 0 ? count : count + __popc(words[end / 32] & ((1u << end % 32) - 1));
}

// The greatest value of the CTA's threads before this one, -1 of none; `greatest` is that of all.
__device__ int greatest_before(int value, int (&of_warps)[32], int& greatest) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int offset = 1; offset < 32; offset *= 2) value = max(value, __shfl_up_sync(~0u, value, offset));
    if (lane == 31) of_warps[warp] = value;
    __syncthreads();
    const int of_warp = lane < blockDim.x / 32 ? of_warps[lane] : -1;
    greatest = __reduce_max_sync(~0u, of_warp);
    const int before = __reduce_max_sync(~0u, lane < warp ? of_warp : -1), below = __shfl_up_sync(~0u, value, 1);
    return lane > 0 ? max(before, below) : before;
}

__global__ void __launch_bounds__(kManyThreads)
    get_mla_metadata_uneven_kernel(const MetadataParams params, int per_thread) {
    __shared__ UnevenStorage shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = min(static_cast<int>(threadIdx.x) * per_thread, params.b);
    const int end_row = min(first_row + per_thread, params.b);
    int64_t cost = 0, blocks = 0;
    int most = 0, least = INT_MAX, last_row = -1;  // of those that have blocks
    for (int row = first_row; row < end_row; ++row) {
        const BlocksOf of(params, row);
        if (of.blocks == 0) continue;
        cost += of.blocks * of.cost;
        blocks += of.blocks;
        most = max(most, of.tiles);
        least = min(least, of.tiles);
        last_row = row;
    }
    most = __reduce_max_sync(~0u, most);
    least = __reduce_min_sync(~0u, least);
    if (lane == 0) {
        shared.most[warp] = most;
        shared.least[warp] = least;
    }
    if (threadIdx.x < kWords) shared.marked[threadIdx.x] = shared.starting[threadIdx.x] = 0;
    int64_t total, all_blocks;
    const int64_t begin = sum_before(cost, shared.sum[0], total);
    const int64_t blocks_before = sum_before(blocks, shared.sum[1], all_blocks);
    int last_of_all;
    int above = greatest_before(last_row, shared.last_row, last_of_all);
    const Line<int64_t> line(total, params);

    if (warp == 0) {
        const bool is_warp = lane < blockDim.x / 32;
        const int greatest = __reduce_max_sync(~0u, is_warp ? shared.most[lane] : 0);
        const int smallest = __reduce_min_sync(~0u, is_warp ? shared.least[lane] : INT_MAX);
        const bool few = all_blocks > 0 && all_blocks <= params.num_parts;
        const int alike = few ? parts_if_alike(params, static_cast<int>(all_blocks), greatest, smallest, line) : 0;
        if (lane == 0) shared.parts_of_block = alike;
    }
    if (threadIdx.x == 0) params.num_splits[0] = 0;
    __syncthreads();

    if (const int each = shared.parts_of_block; each > 0) {
        int64_t block = blocks_before;
        for (int row = first_row; row < end_row; ++row) {  // which mark their first block
            const BlocksOf of(params, row);
            if (of.blocks > 0) {
                atomicOr(&shared.marked[block / 32], 1u << block % 32);
                shared.marked_row[block] = row;
            }
            block += of.blocks;
            params.num_splits[row + 1] = static_cast<int>(block) * each;
        }
        __syncthreads();
        for (int part = threadIdx.x; part < kMaxParts; part += blockDim.x) {
            const int of_part = part / each, split = part - of_part * each;
            if (of_part >= all_blocks) {
                write_part(params, part, kNoWork, 0);
                continue;
            }
            const int first = last_bit(shared.marked, of_part), row = shared.marked_row[first];
            const int64_t tiles = num_tiles(params, row);
            const int from = split * tiles / each, to = (split + 1) * tiles / each;
            write_part(params, part, {row, from, row, to}, split, of_part - first, of_part - first);
        }
        return;
    }

    // Rows mark the first of their cuts.
    int64_t at = begin;
    for (int row = first_row; row < end_row; ++row) {
        const BlocksOf of(params, row);
        const int64_t next = at + of.blocks * of.cost;
        const int first = line.cuts_below(at);
        if (first < line.cuts_below(next)) {
            atomicOr(&shared.marked[first / 32], 1u << first % 32);
            shared.marked_row[first] = row;
            shared.marked_begin[first] = at;
            shared.marked_above[first] = above;
        }
        if (of.blocks > 0) above = row;
        at = next;
    }
    __syncthreads();

    // A thread each: where the cuts stand.
    for (int i = threadIdx.x; i <= kMaxParts; i += blockDim.x) {
        Cut cut = {params.b, 0, 0, 0, last_of_all};
        if (i < line.parts && total > 0) {
            const int mark = last_bit(shared.marked, i);
            cut.row = shared.marked_row[mark];
            cut.above = shared.marked_above[mark];
            const BlocksOf of(params, cut.row);
            const int64_t in_row = i * total / line.parts - shared.marked_begin[mark];
            const int64_t block = in_row / of.cost, in_block = in_row - block * of.cost;
            cut.block = static_cast<int>(block);
            cut.tile = static_cast<int>(max(in_block - params.row_cost, int64_t{0}));
            cut.first = line.cuts_below(shared.marked_begin[mark] + block * of.cost);
            if (cut.tile == 0) atomicOr(&shared.starting[i / 32], 1u << i % 32);
        }
        shared.cuts[i] = cut;
    }
    __syncthreads();

    for (int part = threadIdx.x; part < kMaxParts; part += blockDim.x) {
        const Cut cut = shared.cuts[part], next = shared.cuts[part + 1];
        if (cut.row >= params.b) {
            write_part(params, part, kNoWork, 0);
            continue;
        }
        int last_row = next.row, last_block = next.block, last_tile = next.tile;
        if (next.tile == 0) {  // the next part starts with a block of its own
            if (next.block == 0) {
                last_row = next.above;
                last_block = BlocksOf(params, last_row).blocks;
            }
            --last_block;
            last_tile = num_tiles(params, last_row);
        }
        // of the block's cuts only the first one may not split it
        const int splits = cut.tile > 0 ? part - cut.first + (shared.cuts[cut.first].tile > 0) : 0;
        write_part(params, part, {cut.row, cut.tile, last_row, last_tile}, splits, cut.block, last_block);
    }
    at = begin;
    int64_t block = blocks_before;
    for (int row = first_row; row < end_row; ++row) {
        const BlocksOf of(params, row);
        at += of.blocks * of.cost;
        block += of.blocks;
        const int cuts = line.cuts_below(at);
        params.num_splits[row + 1] = static_cast<int>(block + cuts - bits_below(shared.starting, cuts));
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

void get_mla_metadata(const MetadataParams& params, cudaStream_t stream) {
    const int threads = params.b <= 2 * kFewThreads ? kFewThreads : kManyThreads;
    const auto kernel = params.cu_seqlens_q != nullptr ? get_mla_metadata_uneven_kernel : get_mla_metadata_kernel;
    kernel<<<1, threads, 0, stream>>>(params, (params.b + threads - 1) / threads);
    cuda_check(cudaGetLastError(), "get_mla_metadata");
}

}  // namespace flashmla
