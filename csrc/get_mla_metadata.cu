// get_mla_metadata: deals rows of given lengths to parts of equal load (the plan, flashmla_ops/plan.py).
//
// Row r costs kRowCost + tiles(r), tiles(r) = ceil(cache_seqlens[r] / 64). The rows lie end to end on a line of cost of
// length `total`; cut p stands at floor(p * total / parts_used) and falls into the row r with
// row_begin(r) <= position < row_end(r), at tile max(position - row_begin(r) - kRowCost, 0). Part p lies between the
// cuts p and p + 1. Cuts of a row that begins and ends at cuts are spread evenly. num_splits is the prefix sum of the
// parts that touch each row: 1 + the cuts inside it.
//
// Grid: one CTA, each thread with as many consecutive rows as it takes. A scan gives every row its place on the line,
// and that its cuts: those below a position x are ceil(x * parts_used / total), so nothing is searched. A row leaves a
// mark at the first of its cuts; every part reads the marks at its own and at the next cut. Any architecture.
//
// It runs once a decode step, before everything else, on one multiprocessor: what counts is the length of the chain of
// dependent instructions, and that they be few, since none of them is in the instruction cache.

#include "check.h"
#include "params.h"

namespace flashmla {
namespace {

constexpr int kFewThreads = kMaxParts;  // one a part, at least
constexpr int kManyThreads = 1024;
constexpr int kWords = kMaxParts / 32;

struct SharedStorage {
    int64_t cost_sum[32], split_sum[32];  // of the warps
    uint32_t marked[kWords];              // bit p: cut p is the first of its row
    int marked_row[kMaxParts];            // at the marks: the row,
    int64_t marked_begin[kMaxParts];      // and where on the line it begins
};

// The line of cost and its division.
struct Line {
    int64_t total;
    int parts;     // parts_used
    int64_t step;  // total = step * parts + rest
    int rest;
    float cuts_per_cost;

    __device__ Line(int64_t total, int num_parts)
        : total(total),
          parts(static_cast<int>(max(int64_t{1}, min(int64_t{num_parts}, total / (kMinTiles + kRowCost))))),
          step(total / parts),
          rest(static_cast<int>(total - step * parts)),
          cuts_per_cost(parts / static_cast<float>(total)) {}

    __device__ int64_t position(int cut) const { return cut * step + cut * rest / parts; }

    // How many cuts stand below x, 0 <= x <= total: ceil(x * parts / total), from an estimate that is off by few.
    __device__ int cuts_below(int64_t x) const {
        const int64_t wanted = x * parts;
        int cuts = static_cast<int>(static_cast<float>(x) * cuts_per_cost);
        while (cuts * total < wanted) ++cuts;
        while (cuts > 0 && (cuts - 1) * total >= wanted) --cuts;
        return cuts;
    }
};

// ---------------------------------------------------------------------------------------------------- device helpers

__device__ int num_tiles(const MetadataParams& params, int row) {
    const int length = max(params.cache_seqlens[row], 0);
    return length / kTile + (length % kTile != 0);
}

__device__ int64_t warp_scan(int64_t value) {
    for (int offset = 1; offset < 32; offset *= 2) {
        const int64_t below = __shfl_up_sync(~0u, value, offset);
        if (threadIdx.x % 32 >= offset) value += below;
    }
    return value;
}

// The sum over the CTA's threads before this one; `total` is that of all. `warp_sum` is used for nothing else.
__device__ int64_t sum_before(int64_t value, int64_t (&warp_sum)[32], int64_t& total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t sum = warp_scan(value);
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    const int64_t warps = warp_scan(lane < blockDim.x / 32 ? warp_sum[lane] : 0);
    total = __shfl_sync(~0u, warps, 31);
    const int64_t below = __shfl_sync(~0u, warps, max(warp - 1, 0));
    return sum - value + (warp > 0 ? below : 0);
}

// A row on the line: its cuts are first .. end - 1, and those from `inside` on split it.
struct RowCuts {
    int first, inside, end;

    __device__ RowCuts(const Line& line, int64_t begin, int64_t next) {
        first = line.cuts_below(begin);
        end = line.cuts_below(next);
        inside = first < end ? min(line.cuts_below(min(begin + kRowCost + 1, next)), end) : end;
    }
};

struct Cut {
    int row, tile, first;  // first: of the cuts of that row
    bool splits_at_first;  // whether that one splits it
};

// The mark after that at cut `mark`, or all cuts' number.
__device__ int next_mark(const SharedStorage& shared, const Line& line, int mark) {
    int word = mark / 32;
    uint32_t marks = shared.marked[word] & (~0u - 1 << mark % 32);
    while (marks == 0 && ++word < kWords) marks = shared.marked[word];
    return marks == 0 ? line.parts : word * 32 + __ffs(marks) - 1;
}

__device__ Cut cut_at(const MetadataParams& params, const SharedStorage& shared, const Line& line, int cut) {
    if (cut >= line.parts || params.b == 0) return {params.b, 0, cut, false};
    int word = cut / 32;
    uint32_t marks = shared.marked[word] & (~0u >> (31 - cut % 32));
    while (marks == 0) marks = shared.marked[--word];  // the first row's is at cut 0
    const int first = word * 32 + 31 - __clz(marks), row = shared.marked_row[first];
    const int64_t first_tile = shared.marked_begin[first] + kRowCost;
    const bool splits_at_first = line.position(first) > first_tile;

    const int end = next_mark(shared, line, first);
    const bool last = end == line.parts;
    const int64_t end_begin = last ? line.total : shared.marked_begin[end];
    const int end_row = last ? params.b : shared.marked_row[end];
    if (!splits_at_first && end_row == row + 1 && line.position(end) <= end_begin + kRowCost) {
        const int tiles = static_cast<int>(end_begin - first_tile), n = end - first, i = cut - first;
        return {row, tiles / n * i + tiles % n * i / n, first, false};
    }
    const int64_t tile = line.position(cut) - first_tile;
    return {row, static_cast<int>(max(tile, int64_t{0})), first, splits_at_first};
}

// ------------------------------------------------------------------------------------------------------------ kernel

// Part p's columns, from its cut and the next one.
__device__ void write_part(const MetadataParams& params, const SharedStorage& shared, const Line& line, int p) {
    const Cut cut = cut_at(params, shared, line, p);
    int4 work = {0, 0, -1, 0};  // first_row, first_tile, last_row, last_tile
    int first_split = 0;
    if (cut.row < params.b) {
        const Cut next = cut_at(params, shared, line, p + 1);
        const bool whole = next.tile == 0;  // the next part starts with a row of its own
        const int last_row = whole ? next.row - 1 : next.row;
        work = {cut.row, cut.tile, last_row, whole ? num_tiles(params, last_row) : next.tile};
        first_split = p - cut.first + cut.splits_at_first;
    }
    static_assert(kFirstRow == 0 && kFirstTile == 1 && kLastRow == 2 && kLastTile == 3 && kFirstSplit == 4);
    int4* columns = reinterpret_cast<int4*>(params.metadata + p * kColumns);
    columns[0] = work;
    columns[1] = {first_split, 0, 0, 0};
}

__global__ void __launch_bounds__(kManyThreads) get_mla_metadata_kernel(const MetadataParams params, int per_thread) {
    __shared__ SharedStorage shared;
    const int tid = threadIdx.x;
    const int first_row = min(tid * per_thread, params.b), end_row = min(first_row + per_thread, params.b);

    int64_t cost = 0;
    for (int row = first_row; row < end_row; ++row) cost += kRowCost + num_tiles(params, row);
    if (tid < kWords) shared.marked[tid] = 0;
    int64_t total;
    const int64_t cost_before = sum_before(cost, shared.cost_sum, total);
    const Line line(total, params.num_parts);

    int64_t splits = 0;
    for (int64_t row = first_row, begin = cost_before; row < end_row; ++row) {
        const int64_t next = begin + kRowCost + num_tiles(params, row);
        const RowCuts cuts(line, begin, next);
        splits += 1 + cuts.end - cuts.inside;
        if (cuts.first < cuts.end) {
            atomicOr(&shared.marked[cuts.first / 32], 1u << cuts.first % 32);
            shared.marked_row[cuts.first] = row;
            shared.marked_begin[cuts.first] = begin;
        }
        begin = next;
    }
    int64_t all_splits;
    int64_t splits_before = sum_before(splits, shared.split_sum, all_splits);

    if (tid < kMaxParts) write_part(params, shared, line, tid);
    if (tid == 0) params.num_splits[0] = 0;
    for (int64_t row = first_row, begin = cost_before; row < end_row; ++row) {
        const int64_t next = begin + kRowCost + num_tiles(params, row);
        const RowCuts cuts(line, begin, next);
        splits_before += 1 + cuts.end - cuts.inside;
        params.num_splits[row + 1] = static_cast<int>(splits_before);
        begin = next;
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

// As many parts for each row, if that leaves few unused: rows of one length are then cut alike.
static int even_parts(int num_parts, int b) {
    const int rest = b > 0 ? num_parts % b : 0;
    return rest < num_parts && rest * kEvenShare <= num_parts ? num_parts - rest : num_parts;
}

void get_mla_metadata(const MetadataParams& params, cudaStream_t stream) {
    const int threads = params.b <= 2 * kFewThreads ? kFewThreads : kManyThreads;
    MetadataParams even = params;
    even.num_parts = even_parts(params.num_parts, params.b);
    get_mla_metadata_kernel<<<1, threads, 0, stream>>>(even, (params.b + threads - 1) / threads);
    cuda_check(cudaGetLastError(), "get_mla_metadata");
}

}  // namespace flashmla
