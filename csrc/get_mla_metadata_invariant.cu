// get_mla_metadata with batch_invariant: deals rows to parts that begin and end between units (flashmla_ops/plan.py).
//
// The rows lie end to end on two lines. On that of cost, get_mla_metadata.cu's, cut p stands at floor(p * total /
// parts); what a row costs beside its tiles lies before its first unit. On that of units a row has as many as it is
// cut into, one if it has no tiles, and cut p stands at p * ceil(total / num_parts). A cut in a row that has `unit`
// whole units before it is rounded down to a multiple of g of them. Cuts that have become equal are one, and part i
// begins at the i-th of those that are left. Between two cuts lie the end of one row, whole rows, and the beginning of
// another one, or a piece of one row; these ends and pieces leave nodes. g is for each line the least power of two with
// which all parts leave at most `places` of them. The plan is that of the line whose greatest load of a part is then
// less.
//
// Parts of a small batch are then filled: from where the last one ended, each takes as many units as a bound on its
// load allows. Bounds are tried by a warp each, and the cuts of the least one with which num_parts parts suffice take
// the place of the line that was worse, to be rounded and compared like that. Nothing is tried where a load is at the
// least bound already, as with few rows.
//
// Of uneven queries a row lies on both lines as many times as it has blocks, not at all if it has no queries, and what
// is said of rows here is then said of blocks. A row may have tens of thousands, so nothing goes through them one by
// one: a cut is found in its row by a division.
//
// Grid: one CTA, each thread with as many consecutive rows as it takes. A scan gives each thread's rows their place on
// the lines. Then each line has half of the threads, one for every part and the cut before it. The cut's row is found
// by bisection, for the thread that has it, and row by row from there. All cuts lie in shared memory before any is
// rounded, with all that rounding needs: nodes are counted with one g after the other (the first will mostly do), loads
// compared, and a last scan numbers the parts, splits and places of the line that is chosen. Any architecture.
//
// No more threads than that, and sums in 32 bits where they fit: sum_before takes 30 shuffles of each warp with 64
// bits, and a multiprocessor shuffles one warp's words in a cycle.

#include <algorithm>
#include <bit>
#include <type_traits>

#include "check.h"
#include "get_mla_metadata.cuh"
#include "params.h"

namespace flashmla {
namespace {

constexpr int kLines = 2, kCost = 0, kUnits = 1;
constexpr int kThreads = kLines * kMaxParts;                  // a power of two, for the bisection
constexpr int kLevels = std::bit_width(unsigned{kMaxUnits});  // powers of two for g; with the last all rows are whole
constexpr int kBounds = 8;                                    // that are tried to fill parts, by a warp each
constexpr int kHalves = 2 * (kBounds - 1);                    // so that they reach half a unit further than the least
constexpr int kFilledBlocks = 512, kFilledUnits = 4096;       // at most; so 32 bits suffice
constexpr int kInvariant = 1;                                 // bit of the flags
// A row counts as having kMostQueries / b queries at most (131072 where b is a million), so that no sum overflows
// whatever cu_seqlens_q holds: cuts would then be looked for where there is no row.
constexpr int64_t kMostQueries = int64_t{1} << 37;

template <bool kUneven>
struct Row {
    using Length = std::conditional_t<kUneven, int64_t, int>;

    int blocks;              // all alike
    int tiles, each, units;  // of a block; `each` tiles make a unit

    __device__ Row(const MetadataParams& params, int row)
        : blocks(kUneven ? static_cast<int>(num_blocks(params, row, params.block_rows)) : 1),
          tiles(num_tiles(params, row)),
          each(unit_tiles(tiles, params.few_heads)),
          units((tiles + each - 1) / each) {}
    __device__ int block_length(const MetadataParams& params, int line) const {
        return line == kCost ? params.row_cost + tiles : max(units, 1);
    }
    __device__ Length length(const MetadataParams& params, int line) const {
        return Length{blocks} * block_length(params, line);
    }
};

// Where a cut stands: before `unit` of `block` of `row`, which has so many `units` of so many tiles `each` and begins
// at `begin` on the line of cost. At the end row b.
template <bool kUneven>
struct alignas(16) Cut {
    int row, unit, units, each;
    int64_t begin;
    int block;  // 0 of even queries

    __device__ Cut at(int level) const { return {row, unit >> level << level, units, each, begin, block}; }
    __device__ bool in_block_of(const Cut& other) const {
        return row == other.row && (!kUneven || block == other.block);
    }
    __device__ bool is_before(int other_row, int other_block) const {
        return row < other_row || (kUneven && row == other_row && block < other_block);
    }
    __device__ bool operator==(const Cut& other) const { return in_block_of(other) && unit == other.unit; }
};

template <bool kUneven>
using Cuts = Cut<kUneven>[kMaxParts + 1];

// A block on the line of cost, where parts are filled.
struct Stretch {
    unsigned begin;
    int each;
};

template <bool kUneven>
struct SharedStorage {
    int64_t line_sums[kLines][32];             // of the warps
    int count_sums[32], block_sums[32];        // of the warps
    int64_t begin[kLines][kThreads];           // where on the lines each thread's rows begin
    Cuts<kUneven> cuts[kLines];                // as they are before they are rounded
    int left[kLines][kLevels];                 // nodes, by all parts
    int64_t greatest[kLines][kMaxParts / 32];  // load of a part, of the warps
    int longest[kThreads / 32];                // load of a unit, of the warps
    Stretch stretches[kFilledBlocks + 1];      // of all blocks, and the line's end
    unsigned stops[kBounds][kMaxParts];        // where on that line the parts before these end
    bool suffices[kBounds];
    int splits_before[kMaxParts + 1];  // cuts before this one that stand inside a block
};

// What the last scan sums, in one word.
struct Counts {
    static constexpr int kBits = 9, kMask = (1 << kBits) - 1;  // of parts, and of splits

    int parts, splits, nodes;

    __device__ Counts(bool part, bool splits, int nodes) : parts(part), splits(splits), nodes(nodes) {}
    __device__ explicit Counts(int packed)
        : parts(packed & kMask), splits(packed >> kBits & kMask), nodes(packed >> 2 * kBits) {}
    __device__ int packed() const { return parts | splits << kBits | nodes << 2 * kBits; }
};
static_assert(kMaxParts < 1 << Counts::kBits && kMaxParts * 2 * kLevels < 1 << (31 - 2 * Counts::kBits));

// ---------------------------------------------------------------------------------------------------- device helpers

// Cut p of a line of this length.
template <bool kUneven>
__device__ int64_t cut_position(const MetadataParams& params, int line, int64_t total, int p) {
    if (line == kUnits) return min(p * ((total + params.num_parts - 1) / params.num_parts), total);
    const int64_t worth = total / (kMinTiles + params.row_cost);  // parts
    const int parts = static_cast<int>(max(min(worth, int64_t{params.num_parts}), int64_t{1}));
    p = min(p, parts);
    // many blocks of many tiles: p * total may need more than 64 bits
    if constexpr (kUneven) return p * (total / parts) + p * static_cast<int>(total % parts) / parts;
    return p * total / parts;
}

// The cut at `position`, which is below the line's end.
template <bool kUneven>
__device__ Cut<kUneven> find_cut(const MetadataParams& params, const SharedStorage<kUneven>& shared, int per_thread,
                                 int line, int64_t position) {
    int thread = 0;  // the last one whose rows begin there or before
    for (int step = kThreads / 2; step > 0; step /= 2) {
        if (shared.begin[line][thread + step] <= position) thread += step;
    }
    int row = thread * per_thread;
    Row<kUneven> here(params, row);
    int64_t inside = position - shared.begin[line][thread], begin = shared.begin[kCost][thread];
    while (inside >= here.length(params, line)) {
        inside -= here.length(params, line);
        begin += here.length(params, kCost);
        here = Row<kUneven>(params, ++row);
    }
    int block = 0;
    if constexpr (kUneven) {
        const int length = here.block_length(params, line);
        block = static_cast<int>(inside / length);
        inside -= int64_t{block} * length;
        begin += int64_t{block} * here.block_length(params, kCost);
    }
    const int rest = static_cast<int>(inside);
    const int unit = line == kUnits ? rest : max(rest - params.row_cost, 0) / here.each;
    return {row, unit, here.units, here.each, begin, block};
}

// Of values that are not negative.
__device__ int64_t warp_max(int64_t value) {
    const unsigned high = value >> 32, low = static_cast<unsigned>(value);
    const unsigned greatest_high = __reduce_max_sync(~0u, high);
    return int64_t{greatest_high} << 32 | __reduce_max_sync(~0u, high == greatest_high ? low : 0);
}

// What a divisor is known by beforehand, so that a division takes no more than a few products.
struct Divisor {
    unsigned by, inverse;

    __device__ explicit Divisor(unsigned by) : by(by), inverse(~0u / by) {}
    __device__ unsigned multiple_up_to(unsigned value) const {
        const unsigned multiple = __umulhi(value, inverse) * by;  // that or the one below
        return value - multiple < by ? multiple : multiple + by;
    }
};

// Fills parts, by a warp: whether num_parts of them suffice with a load of at most `bound`. Each lane has a block and
// finds the last cut in it before it is known in which one the part ends, so that a part is a chain of few
// instructions.
__device__ bool fill(const MetadataParams& params, const Stretch* stretches, int blocks, unsigned bound,
                     unsigned (&stops)[kMaxParts]) {
    const unsigned total = stretches[blocks].begin;
    unsigned begin = 0, stop = 0;  // of a part that begins at a cut, and of one that ends there: a load is the distance
    int part = 0, block = threadIdx.x % 32;  // this lane's
    while (part < params.num_parts && stop < total) {
        const Stretch here = stretches[min(block, blocks)];
        const unsigned end = block < blocks ? stretches[block + 1].begin : ~0u;
        const unsigned first_unit = here.begin + params.row_cost;
        const Divisor each(here.each);
        for (; part < params.num_parts && stop < total; ++part) {
            const unsigned reach = min(begin + bound, total);
            const int before = __popc(__ballot_sync(~0u, end <= reach));  // blocks
            const unsigned units = each.multiple_up_to(max(reach, first_unit) - first_unit);
            const unsigned next_begin = __shfl_sync(~0u, here.begin + units, before);
            const unsigned next_stop = __shfl_sync(~0u, units > 0 ? first_unit + units : here.begin, before);
            if (before == 32) break;
            stops[part] = stop;
            begin = next_begin;
            stop = next_stop;
        }
        block += 32;
    }
    for (part += threadIdx.x % 32; part < kMaxParts; part += 32) stops[part] = total;
    return stop == total;
}

// The blocks of a thread's rows, of which the first one begins there on the line of cost.
template <bool kUneven>
__device__ void lay_out(const MetadataParams& params, Stretch* stretches, int first_row, int end_row, int64_t begin) {
#pragma unroll 1
    for (int row = first_row; row < end_row; ++row) {
        const Row<kUneven> here(params, row);
        for (int block = 0; block < here.blocks; ++block) {
            *stretches++ = {static_cast<unsigned>(begin), here.each};
            begin += here.block_length(params, kCost);
        }
    }
}

// The first of a line's cuts in or after a block, which may be that of row b.
template <bool kUneven>
__device__ int first_cut(const Cuts<kUneven>& cuts, int row, int block) {
    int before = 0;
    for (int step = kMaxParts; step > 0; step /= 2) {
        if (before + step <= kMaxParts && cuts[before + step - 1].is_before(row, block)) before += step;
    }
    return before;
}

// Nodes that units begin .. end - 1 leave, the greatest that lie in them: up to the last multiple of the greatest power
// of two that the range crosses, and from there on, one for each bit of the distance.
__device__ int count_nodes(int begin, int end) {
    const int bit = 31 - __clz(begin ^ end), middle = end >> bit << bit;
    return __popc(middle - begin) + __popc(end - middle);
}

// The same up to the end of a row of `units`, begin > 0: there the last node is whole, however few units it has.
__device__ int count_last_nodes(int begin, int units) {
    const int bit = 31 - __clz((begin - 1) ^ (units - 1)), middle = (units - 1) >> bit << bit;
    return __popc(middle - begin) + 1;
}

// Nodes that lie between two cuts.
template <bool kUneven>
__device__ int count_nodes(const Cut<kUneven>& from, const Cut<kUneven>& to) {
    if (from == to) return 0;
    if (from.in_block_of(to)) return count_nodes(from.unit, to.unit);
    return (from.unit > 0 ? count_last_nodes(from.unit, from.units) : 0) + __popc(to.unit);
}

// Tiles between two cuts, and a row's cost for each block that they touch. Of cuts that are one a row's cost at most.
template <bool kUneven>
__device__ int64_t load(const MetadataParams& params, const Cut<kUneven>& from, const Cut<kUneven>& to) {
    const int64_t end = to.begin + (to.unit > 0 ? params.row_cost + to.unit * to.each : 0);
    return end - (from.begin + from.unit * from.each);
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <bool kUneven>
__global__ void __launch_bounds__(kThreads)
    get_mla_metadata_invariant_kernel(const MetadataParams params, int per_thread) {
    __shared__ SharedStorage<kUneven> shared;
    const int index = threadIdx.x, lane = index % 32;
    const int line = index / kMaxParts, part = index % kMaxParts;  // before cuts become one
    const int first_row = min(index * per_thread, params.b), end_row = min(first_row + per_thread, params.b);
    int64_t cost = 0, units = 0, total_cost, total_units;
    int blocks = 0, blocks_before = 0, total_blocks = params.b, longest = 0;
#pragma unroll 4
    for (int row = first_row; row < end_row; ++row) {
        const Row<kUneven> here(params, row);
        blocks += here.blocks;
        cost += here.length(params, kCost);
        units += here.length(params, kUnits);
        if (here.blocks > 0) longest = max(longest, params.row_cost + min(here.each, here.tiles));
    }
    longest = static_cast<int>(__reduce_max_sync(~0u, longest));
    if (lane == 0) shared.longest[index / 32] = longest;
    shared.begin[kCost][index] = sum_before(cost, shared.line_sums[kCost], total_cost);
    shared.begin[kUnits][index] = sum_before(units, shared.line_sums[kUnits], total_units);
    if constexpr (kUneven) blocks_before = sum_before(blocks, shared.block_sums, total_blocks);
    __syncthreads();

    const Cut<kUneven> end_cut = {params.b, 0, 0, 1, total_cost, 0};
    Cut<kUneven>* const cut = &shared.cuts[line][part];
    if (part == 0) cut[kMaxParts] = end_cut;
    int chosen = kUnits, on = line;  // the first of equals; the line that `position` is on
    int64_t position = cut_position<kUneven>(params, line, line == kUnits ? total_units : total_cost, part);
    Cut<kUneven> from, to;
    for (bool filled = total_blocks > kFilledBlocks || total_units > kFilledUnits;; filled = true) {
        const int64_t total = on == kUnits ? total_units : total_cost;
        *cut = position < total ? find_cut(params, shared, per_thread, on, position) : end_cut;
        if (part < kLevels) shared.left[line][part] = 0;
        __syncthreads();

#pragma unroll
        for (int level = 0; level < kLevels; ++level) {
            const int left = warp_sum(count_nodes(cut[0].at(level), cut[1].at(level)));
            if (lane == 0) atomicAdd(&shared.left[line][level], left);
            __syncthreads();
            if (max(shared.left[kCost][level], shared.left[kUnits][level]) <= params.places) break;
        }
        int level = 0;  // nodes become fewer from one to the next
        while (level < kLevels - 1 && shared.left[line][level] > params.places) ++level;
        from = cut[0].at(level);
        to = cut[1].at(level);
        const int64_t load_here = warp_max(load(params, from, to));
        if (lane == 0) shared.greatest[line][part / 32] = load_here;
        __syncthreads();

        int64_t least = warp_max(shared.greatest[chosen][lane % (kMaxParts / 32)]);
        const int64_t other = warp_max(shared.greatest[1 - chosen][lane % (kMaxParts / 32)]);
        if (other < least) {
            least = other;
            chosen = 1 - chosen;
        }
        if (filled) break;

        // what is filled takes the place of the worse line
        const unsigned length = static_cast<unsigned>(total_cost);
        const unsigned share = (length + params.num_parts - 1) / params.num_parts;
        const unsigned longest_of_all = __reduce_max_sync(~0u, shared.longest[lane % (kThreads / 32)]);
        const unsigned bound = max(share, longest_of_all);  // no load can be less
        if (least <= bound) break;
        lay_out<kUneven>(params, shared.stretches + (kUneven ? blocks_before : first_row), first_row, end_row,
                         shared.begin[kCost][index]);
        if (index == 0) shared.stretches[total_blocks] = {length, 1};
        __syncthreads();
        const int warp = index / 32;
        if (warp < kBounds) {
            const unsigned tried = bound + warp * ((longest_of_all + kHalves - 1) / kHalves);
            const bool suffices = fill(params, shared.stretches, total_blocks, tried, shared.stops[warp]);
            if (lane == 0) shared.suffices[warp] = suffices;
        }
        __syncthreads();
        const int first = __ffs(__ballot_sync(~0u, lane < kBounds && shared.suffices[lane])) - 1;
        if (first < 0) break;
        if (line != chosen) {
            on = kCost;
            position = shared.stops[first][part];
        }
    }

    const Cuts<kUneven>& cuts = shared.cuts[chosen];
    const bool is_part = line == chosen && from != to, splits = is_part && from.unit > 0;
    const int nodes = is_part ? count_nodes(from, to) : 0;
    int packed_all;
    const Counts before(sum_before(Counts(is_part, splits, nodes).packed(), shared.count_sums, packed_all));
    const Counts all(packed_all);
    if (line == chosen) shared.splits_before[part] = before.splits;
    if (index == 0) shared.splits_before[kMaxParts] = all.splits;
    __syncthreads();

    if (is_part) {
        const bool whole = to.unit == 0;  // the next part starts with a block of its own
        int last_row = whole ? to.row - 1 : to.row, last_block = 0;
        if constexpr (kUneven) {  // the row above may have no blocks
            const Cut<kUneven> last = whole ? find_cut(params, shared, per_thread, kCost, to.begin - 1) : to;
            last_row = last.row;
            last_block = last.block;
        }
        const int last_tile = whole ? num_tiles(params, last_row) : to.unit * to.each;
        const int first = splits ? first_cut<kUneven>(cuts, from.row, from.block) : 0;
        const int first_split = splits ? before.splits + 1 - shared.splits_before[first] : 0;
        write_part(params, before.parts, {from.row, from.unit * from.each, last_row, last_tile}, first_split,
                   kUneven ? from.block : 0, last_block, kInvariant + 2 * before.nodes);
    }
    if (index >= all.parts && index < kMaxParts) write_part(params, index, kNoWork, 0);
    if (index == 0) {
        write_part(params, kMaxParts, kNoWork, 0, 0, 0, kInvariant + 2 * all.nodes);
        params.num_splits[params.b] = total_blocks + all.splits;
    }
    int next = first_cut<kUneven>(cuts, first_row, 0);  // cut
    for (int row = first_row; row < end_row; ++row) {
        while (cuts[next].row < row) ++next;
        params.num_splits[row] = (kUneven ? blocks_before : row) + shared.splits_before[next];
        if constexpr (kUneven) blocks_before += static_cast<int>(num_blocks(params, row, params.block_rows));
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

void get_mla_metadata_invariant(const MetadataParams& params, cudaStream_t stream) {
    const int per_thread = (params.b + kThreads - 1) / kThreads;
    if (params.cu_seqlens_q == nullptr) {
        get_mla_metadata_invariant_kernel<false><<<1, kThreads, 0, stream>>>(params, per_thread);
    } else {
        MetadataParams uneven = params;
        const int64_t most = kMostQueries / std::max(params.b, 1);
        uneven.max_seqlen_q = static_cast<int>(std::min(int64_t{params.max_seqlen_q}, most));
        uneven.block_rows = rows_of_block(params.group, true);
        get_mla_metadata_invariant_kernel<true><<<1, kThreads, 0, stream>>>(uneven, per_thread);
    }
    cuda_check(cudaGetLastError(), "get_mla_metadata");
}

}  // namespace flashmla
