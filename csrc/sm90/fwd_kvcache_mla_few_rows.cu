// fwd_kvcache_mla for up to 32 query rows a key head: what fwd_kvcache_mla.cu computes, from the same plan, to the same
// results. Here memory is what bounds a call, so all is arranged for as many keys as possible to be on their way.
//
// Products are transposed: S^T = K Q^T and O^T = V^T P^T. A wgmma's 64 rows then are keys, or columns of V, and its
// columns are the 16 or 32 query rows of a row tile: nothing is padded to 64, Q takes 18 KB, O 32 registers a thread,
// or twice that. Of uneven queries it serves up to 16 rows. Under a batch-invariant plan (units.cuh) it serves up to 32
// heads a key head whatever s_q is, in row tiles of 16 rows or, of more rows, of 32: a row's bits are the same in
// either.
//
// Grid: (row tiles, parts at work at once), as there. 1 CTA a multiprocessor.
//
// Warp roles. Warps 0-3 and 4-7 are two warpgroups that share all work on a tile of 64 keys, and none of it is done
// twice: scores by slices of keys and queries (one the slices 0-4, the other 5-8), the softmax by query rows, O^T by
// columns of V. So a tile is done with soon, and its place can be loaded again. Warp 8 loads keys, warps 9-11 load
// queries.
//
// Shared memory: a ring of 8 or 7 portions, each three slices of 64 keys x 64 values (24 KB). A tile is three portions.
//
// Query rows are a thread's columns here: a warpgroup's accumulators give it the rows 8 j + 2 (lane % 4) + {0, 1}, and
// of what runs along the 64 rows of the product (keys; columns of V) the two at warp * 16 + lane / 4 + {0, 8}.

#include <cuda/ptx>

#include "fwd_kvcache_mla.cuh"
#include "nodes.cuh"
#include "row_tile.cuh"
#include "tma.h"
#include "units.cuh"
#include "wgmma.cuh"

namespace flashmla::sm90 {
namespace {

// ------------------------------------------------------------------------------------------------------------ config

constexpr int kPortionSlices = 3;
constexpr int kPortions = kSlices / kPortionSlices;  // of a tile
constexpr int kPortionBytes = kPortionSlices * wgmma::kSliceBytes;
constexpr int kBlocks = 4;  // of 64 output columns: a warpgroup's
constexpr int kWarpgroup = 128;
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kQueryWarps = 3;
constexpr int kThreads = kConsumers + 32 * (1 + kQueryWarps);
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;  // of more than kFewRows; else what there is

// kRows: of a row tile, kFewRows or 2 * kFewRows.
template <typename T, int kRows>
struct SharedStorage {
    static constexpr int kRing = kRows == kFewRows ? 8 : 7;  // portions

    alignas(1024) T ring[kRing][kPortionSlices][64 * 64];
    alignas(1024) T sQ[kSlices][kRows * 64];
    alignas(1024) T sP[2][kRows * 64];  // P [rows, keys], and a place; at a row's end each warpgroup's results
    alignas(16) float4 partial[2][kRows / 16][kWarpgroup];  // the other warpgroup's share of each one's rows' scores
    alignas(16) float factor[kRows];                        // what O is to be multiplied by before a tile is added
    alignas(16) float scale[kRows], lse_log2[kRows];        // and at a row's end, to be normalised
    Part parts[kMaxParts];                                  // the plan
    Parked parked[kConsumerWarps];
    alignas(16) float high[2][4][kRows];  // of each warpgroup's warps: the rows' maxima in the tile
    alignas(16) float sum[2][4][kRows];   // and their sums in the segment
    uint64_t landed[kRing], freed[kRing];
    uint64_t queries_landed, queries_freed;
};

// Named barriers of the consumers, by event; 0 is __syncthreads's.
enum Barrier { kWarpgroupOf = 1 /* + warpgroup */, kScored = 3, kStored, kSummed };

// A place in the ring, and the phase of its barriers there.
template <int kRing>
struct Place {
    int slot = 0;
    uint32_t phase = 0;

    __device__ void next(int count = 1) {
        slot += count;
        if (slot >= kRing) {
            slot -= kRing;
            phase ^= 1;
        }
    }
};

// ----------------------------------------------------------------------------------------------- producers (4 warps)

// One warp: the segment's tiles, each as soon as there is room for it.
template <typename T, int kRows, int kRing>
__device__ __forceinline__ void load_keys(const FwdParams& params, const CUtensorMap& cache,
                                          SharedStorage<T, kRows>& shared, const RowTile& rows, const Segment& segment,
                                          Place<kRing>& place) {
    const Pages pages(params, segment);
    const int readers = readers_of_keys(params);
    int page = pages.page_of(segment.begin), next_page = pages.page_of(segment.begin + 1);
    for (int tile = segment.begin; tile < segment.end; ++tile) {
        const int page_after = pages.page_of(tile + 2);  // looked up two tiles ahead
        const int token = pages.token_of(tile);
        auto last = place;
        for (int portion = 0; portion < kPortions; ++portion, last.next())
            wait(&shared.freed[last.slot], last.phase ^ 1);
        // all at once: memory serves the three thirds of a page 3 % faster together than one now and then
        for (int portion = 0; portion < kPortions; ++portion, place.next()) {
            if (threadIdx.x % 32 == 0) {
                uint64_t* landed = &shared.landed[place.slot];
                cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                                                     cuda::ptx::space_shared, landed, kPortionBytes);
                const int32_t where[5] = {0, token, portion * kPortionSlices, rows.head, page};
                copy_keys(readers, shared.ring[place.slot], cache, where, landed);
            }
            __syncwarp();
        }
        page = next_page;
        next_page = page_after;
    }
}

// kQueryWarps warps: the segment's queries, and the next row's to L2: while all of the machine streams, what comes from
// memory takes 6 us.
template <typename T, int kRows>
__device__ __forceinline__ void load_queries(const FwdParams& params, SharedStorage<T, kRows>& shared,
                                             const RowTile& rows, const Segment& segment, int warp, uint32_t& phase) {
    if (segment.begin == segment.end) return;
    const int lane = threadIdx.x % 32, chunk = lane % 8;
    wait(&shared.queries_freed, phase ^ 1);
    phase ^= 1;
#pragma unroll 1
    for (int r = 4 * warp + lane / 8; r < rows.count(params); r += 4 * kQueryWarps) {
        const T* from = query_row<T>(params, rows, segment.row, r) + chunk * 8;
        const uint32_t to = ptx::shared_address(shared.sQ) + wgmma::swizzled(r, chunk);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            ptx::cp_async_16(to + slice * kRows * 128, from + slice * 64);
        }
    }
    ptx::cp_async_wait_all();
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    __syncwarp();
    if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_landed);
    if (segment.more && warp == 0 && lane < rows.count(params)) {
        ptx::prefetch_bulk_l2(query_row<T>(params, rows, segment.row + 1, lane), kDimQK * sizeof(T));
    }
}

// ------------------------------------------------------------------------------------------- consumers (2 warpgroups)

// Which query row a thread's column h is, h = 0 .. kRows / 4 - 1, and where it stands in accumulators, for key i =
// 0, 1.
__device__ __forceinline__ int row_of(int lane, int h) { return h / 2 * 8 + lane % 4 * 2 + h % 2; }
__device__ __forceinline__ constexpr int element(int h, int i) { return h / 2 * 4 + i * 2 + h % 2; }

// A warpgroup's softmax is of half of the rows: kRows / 8 of a thread's, from `first` on.
template <int kRows>
struct ColumnSoftmax {
    static constexpr int kCount = kRows / 8;
    int first;
    float base[kCount], sum[kCount];  // the greatest scaled score so far, base 2; sum over this thread's keys

    __device__ explicit ColumnSoftmax(int warpgroup) : first(warpgroup * kCount) {
#pragma unroll
        for (int h = 0; h < kCount; ++h) {
            base[h] = -INFINITY;
            sum[h] = 0.f;
        }
    }
    __device__ int row(int lane, int h) const { return row_of(lane, first + h); }
};

// Starts S^T += K Q^T of slices kFrom .. kTo - 1 of a portion, once that has landed.
template <int kFrom, int kTo, typename T, int kRows, int kRing>
__device__ __forceinline__ void score_slices(SharedStorage<T, kRows>& shared, Place<kRing> place, int portion,
                                             bool begins, float (&rS)[kRows / 2]) {
    place.next(portion);
    wait(&shared.landed[place.slot], place.phase);
    wgmma::fence();
#pragma unroll
    for (int i = kFrom; i < kTo; ++i) {
        const uint64_t k = wgmma::k_major(shared.ring[place.slot][i]);
        const uint64_t q = wgmma::k_major(shared.sQ[portion * kPortionSlices + i]);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            wgmma::m64k16<T, false>(rS, wgmma::advance(k, step * wgmma::kStepBytesKMajor),
                                    wgmma::advance(q, step * wgmma::kStepBytesKMajor), !begins || i + step > kFrom);
        }
    }
    wgmma::commit();
}

// The scores of the warpgroup's rows: each warpgroup adds up half of the slices for all rows, and gives the other one
// what it has of that one's rows. Contains a barrier of all consumers.
template <typename T, int kRows, int kRing>
__device__ __forceinline__ void score(SharedStorage<T, kRows>& shared, const Consumer& me, int warpgroup,
                                      Place<kRing> place, float (&mine)[kRows / 4]) {
    float rS[kRows / 2];
    if (warpgroup == 0) {
        score_slices<0, 3>(shared, place, 0, true, rS);
        score_slices<0, 2>(shared, place, 1, false, rS);
    } else {
        score_slices<2, 3>(shared, place, 1, true, rS);
        score_slices<0, 3>(shared, place, 2, false, rS);
    }
    wgmma::wait<0>();
    wgmma::keep(rS);
    const int thread = me.warp * 32 + me.lane;
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j) {
        const auto half = [&](int of) {
            const float* x = rS + of * (kRows / 4) + 4 * j;
            return make_float4(x[0], x[1], x[2], x[3]);
        };
        shared.partial[1 - warpgroup][j][thread] = warpgroup == 0 ? half(1) : half(0);
    }
    ptx::named_barrier(kScored, kConsumers);
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j) {
        const float4 other = shared.partial[warpgroup][j][thread];
        const float others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            mine[4 * j + k] = (warpgroup == 0 ? rS[4 * j + k] : rS[kRows / 4 + 4 * j + k]) + others[k];
        }
    }
}

// Scales the scores of tile `tile`, and sets those of keys that a query row does not see to -inf.
template <int kRows>
__device__ __forceinline__ void scale_and_mask(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                               const Segment& segment, const ColumnSoftmax<kRows>& softmax, int tile,
                                               float (&rS)[kRows / 4]) {
    // an instruction of its own: fused with the subtraction of the base, the greatest exponent would not be 0
#pragma unroll
    for (int k = 0; k < kRows / 4; ++k) rS[k] = __fmul_rn(rS[k], params.softmax_scale_log2);
    const int seen_by_all = params.causal ? segment.length - rows.num_queries(params) + 1 : segment.length;
    if (!__any_sync(~0u, (tile + 1) * kTile > seen_by_all)) return;
#pragma unroll
    for (int h = 0; h < kRows / 8; ++h) {
        const QueryRow row(params, rows.first_row + softmax.row(me.lane, h));
        const int visible = min(segment.length, params.causal ? seen_by_all + row.s : segment.length);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (tile * kTile + me.row(i) >= visible) rS[element(h, i)] = -INFINITY;
        }
    }
}

// Each of a thread's query rows: combined over the lanes that have it.
template <int kCount, typename Combine>
__device__ __forceinline__ void over_lanes(float (&x)[kCount], Combine&& combine) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
#pragma unroll
        for (int h = 0; h < kCount; ++h) x[h] = combine(x[h], __shfl_xor_sync(~0u, x[h], lanes));
    }
}

// And over the warpgroup's four warps, in their order, by way of `exchange`: x[h] is of a thread's query row first + h.
// Contains a barrier of the warpgroup.
template <int kRows, int kCount, typename Combine>
__device__ __forceinline__ void over_warps(const Consumer& me, int warpgroup, float (&exchange)[4][kRows], int first,
                                           float (&x)[kCount], Combine&& combine) {
    if (me.lane < 4) {
#pragma unroll
        for (int h = 0; h < kCount; h += 2) {
            *reinterpret_cast<float2*>(&exchange[me.warp][row_of(me.lane, first + h)]) = make_float2(x[h], x[h + 1]);
        }
    }
    ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);
#pragma unroll
    for (int h = 0; h < kCount; h += 2) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float2 other = *reinterpret_cast<const float2*>(&exchange[w][row_of(me.lane, first + h)]);
            x[h] = w == 0 ? other.x : combine(x[h], other.x);
            x[h + 1] = w == 0 ? other.y : combine(x[h + 1], other.y);
        }
    }
}

// A product [64, 2 * kValues rows] in T to a slice [rows, 64], from row `first` on.
template <typename T, int kValues>
__device__ __forceinline__ void store_transposed(const Consumer& me, const float (&x)[kValues], T* slice,
                                                 int first = 0) {
    const int chunk = 2 * me.warp + me.lane / 8 % 2;
    if constexpr (kValues == 4) {
        ptx::stmatrix_x2_trans(ptx::shared_address(slice) + wgmma::swizzled(first + me.lane % 8, chunk),
                               pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
    } else {
#pragma unroll
        for (int j = 0; j < kValues / 4; j += 2) {
            const int row = first + 8 * (j + me.lane / 16) + me.lane % 8;
            ptx::stmatrix_x4_trans(ptx::shared_address(slice) + wgmma::swizzled(row, chunk),
                                   pack<T>(x[4 * j], x[4 * j + 1]), pack<T>(x[4 * j + 2], x[4 * j + 3]),
                                   pack<T>(x[4 * j + 4], x[4 * j + 5]), pack<T>(x[4 * j + 6], x[4 * j + 7]));
        }
    }
}

// Zeroes the warpgroup's half of a tile's V from key `first` on: cache rows past the length may hold NaN, and 0 * NaN
// is NaN. `slices`: where they are. Both warpgroups have scored these keys.
template <typename T>
__device__ __forceinline__ void zero_values(const Consumer& me, T* const (&slices)[kBlocks], int first) {
    const int chunks = (64 - first) * 8;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        for (int i = me.warp * 32 + me.lane; i < chunks; i += kWarpgroup) {
            reinterpret_cast<int4*>(slices[b])[first * 8 + i] = make_int4(0, 0, 0, 0);
        }
    }
}

// From the scores of the warpgroup's rows to P and to what O is to be multiplied by, both in shared memory. Contains a
// barrier of the warpgroup.
template <typename T, int kRows>
__device__ __forceinline__ void softmax_of(SharedStorage<T, kRows>& shared, const Consumer& me, int warpgroup,
                                           float (&rS)[kRows / 4], ColumnSoftmax<kRows>& softmax) {
    constexpr int kCount = kRows / 8;
    float high[kCount];
#pragma unroll
    for (int h = 0; h < kCount; ++h) high[h] = fmaxf(rS[element(h, 0)], rS[element(h, 1)]);
    const auto greatest = [](float a, float b) { return fmaxf(a, b); };
    over_lanes(high, greatest);
    over_warps(me, warpgroup, shared.high[warpgroup], softmax.first, high, greatest);
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
        const float base = fmaxf(high[h], softmax.base[h]), from = base_of(base);
        const float factor = ptx::exp2_approx(softmax.base[h] - from);
        if (me.warp == 0 && me.lane < 4) shared.factor[softmax.row(me.lane, h)] = factor;
        softmax.base[h] = base;
        softmax.sum[h] *= factor;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float& s = rS[element(h, i)];
            s = ptx::exp2_approx(s - from);
            softmax.sum[h] += s;
        }
    }
    store_transposed<T>(me, rS, shared.sP[0], warpgroup * (kRows / 2));
}

// The thread's query rows' values.
template <int kRows>
__device__ __forceinline__ void load_rows(const Consumer& me, const float (&from)[kRows], float (&x)[kRows / 4]) {
#pragma unroll
    for (int h = 0; h < kRows / 4; h += 2) {
        const float2 two = *reinterpret_cast<const float2*>(&from[row_of(me.lane, h)]);
        x[h] = two.x;
        x[h + 1] = two.y;
    }
}

// What O is to be multiplied by to be normalised, and its log-sum-exp, base 2, of all of a thread's query rows.
// Contains a barrier of all consumers, after which nobody has use for P.
template <typename T, int kRows>
__device__ __forceinline__ void normaliser(SharedStorage<T, kRows>& shared, const Consumer& me, int warpgroup,
                                           ColumnSoftmax<kRows>& softmax, float (&factor)[kRows / 4],
                                           float (&lse_log2)[kRows / 4]) {
    const auto add = [](float a, float b) { return a + b; };
    over_lanes(softmax.sum, add);
    over_warps(me, warpgroup, shared.sum[warpgroup], softmax.first, softmax.sum, add);
#pragma unroll
    for (int h = 0; h < kRows / 8; ++h) {
        const float sum = softmax.sum[h];
        const bool nothing = sum == 0.f;
        if (me.warp != 0 || me.lane >= 4) continue;
        shared.scale[softmax.row(me.lane, h)] = nothing ? 0.f : 1.f / sum;
        shared.lse_log2[softmax.row(me.lane, h)] = nothing ? -INFINITY : softmax.base[h] + log2f(sum);
    }
    ptx::named_barrier(kSummed, kConsumers);
    load_rows(me, shared.scale, factor);
    load_rows(me, shared.lse_log2, lse_log2);
}

// Multiplies a warpgroup's O by a factor for each query row.
template <int kValues, int kCount>
__device__ __forceinline__ void scale(float (&rO)[kBlocks][kValues], const float (&factor)[kCount]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int h = 0; h < kCount; ++h) {
            rO[b][element(h, 0)] *= factor[h];
            rO[b][element(h, 1)] *= factor[h];
        }
    }
}

// The result of rows, from registers: by way of the warpgroup's sP to out.
template <typename T, int kValues>
__device__ __forceinline__ void store_rows(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                           int batch_row, int warpgroup, const float (&rO)[kBlocks][kValues],
                                           T* staging) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        store_transposed<T>(me, rO[b], staging);
        ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);
        for (int i = me.warp * 32 + me.lane; i < rows.count(params) * 8; i += kWarpgroup) {
            const QueryRow row(params, rows.first_row + i / 8);
            const int64_t h = rows.head * params.group + row.g, chunk = i % 8;
            T* to = static_cast<T*>(params.out) + (rows.query_at(params, batch_row, row.s) * params.h_q + h) * kDimV;
            reinterpret_cast<int4*>(to + (warpgroup * kBlocks + b) * 64)[chunk] =
                *reinterpret_cast<const int4*>(reinterpret_cast<const char*>(staging) + wgmma::swizzled(i / 8, chunk));
        }
        ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);
    }
}

// A share of rows, from registers to its place in the workspace, row by row. 8 lanes have 8 columns of a row at once.
template <int kValues>
__device__ __forceinline__ void store_share(const FwdParams& params, const RowTile& rows, const Consumer& me, int place,
                                            int warpgroup, const float (&rO)[kBlocks][kValues]) {
    float* share = params.partial_out + (int64_t{place} * params.row_tiles + rows.index()) * (kRowTile * kDimV) +
                   warpgroup * kBlocks * 64;
#pragma unroll
    for (int h = 0; h < kValues / 2; ++h) {
        const int row = row_of(me.lane, h);
        if (row >= rows.count(params)) continue;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
            for (int i = 0; i < 2; ++i) __stcg(share + row * kDimV + b * 64 + me.row(i), rO[b][element(h, i)]);
        }
    }
}

// Where a thread has its accumulators of a node: [warpgroup, block of 64 columns, 16 query rows, kNodeVectors, 128
// threads].
template <typename T, int kRows>
__device__ __forceinline__ uint4* node_at(const FwdParams& params, const Consumer& me, int64_t tile, int warpgroup) {
    constexpr int kVectors = kBlocks * (kRows / 16) * kNodeVectors<T>;
    return node_values<T, kRows>(params, tile) + warpgroup * (kVectors * kWarpgroup) + me.warp * 32 + me.lane;
}

// A thread's part of a node, as it is in memory: its values, and the head of one of its query rows, own_column's. The
// last node of a CTA's share, which is merged with the next unit's as often as not, waits in registers for that, if it
// is in halves.
template <typename T, int kRows>
struct Node {
    static constexpr int kVectors = kRows / 16 * kNodeVectors<T>;

    uint4 values[kBlocks][kVectors];
    Head head;
    int end_unit;  // where in the row's tree it ends
};

// Eight lanes have the same rows as columns. Each works out for one of them what a merge needs, column h's the lane
// lane_of(h), which the others then ask.
template <int kCount>
__device__ __forceinline__ int own_column(int lane) {
    return lane / 4 % kCount;
}
__device__ __forceinline__ int lane_of(int lane, int h) { return 4 * h + lane % 4; }
template <int kCount>
__device__ __forceinline__ float own(int lane, const float (&x)[kCount]) {
    if constexpr (kCount == 1) {
        return x[0];
    } else {  // half by half: as an index it would be one into local memory
        float half[kCount / 2];
#pragma unroll
        for (int h = 0; h < kCount / 2; ++h) {
            half[h] = (own_column<kCount>(lane) & kCount / 2) == 0 ? x[h] : x[h + kCount / 2];
        }
        return own(lane, half);
    }
}
template <int kCount>
__device__ __forceinline__ void all_columns(int lane, float value, float (&x)[kCount]) {
#pragma unroll
    for (int h = 0; h < kCount; ++h) x[h] = __shfl_sync(~0u, value, lane_of(lane, h));
}

// The greatest finite magnitude of each of the thread's query rows among its values.
template <int kValues>
__device__ __forceinline__ void greatest_finite(const float (&rO)[kBlocks][kValues], float (&high)[kValues / 2]) {
    const auto over_values = [&](auto&& magnitude) {
#pragma unroll
        for (int h = 0; h < kValues / 2; ++h) {
            high[h] = 0.f;
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int i = 0; i < 2; ++i) high[h] = fmaxf(high[h], magnitude(fabsf(rO[b][element(h, i)])));
            }
        }
    };
    over_values([](float x) { return x; });
    bool finite = true;
#pragma unroll
    for (int h = 0; h < kValues / 2; ++h) finite &= high[h] < INFINITY;
    if (!finite) over_values([](float x) { return x < INFINITY ? x : 0.f; });  // from an infinite V: rare
}

// A unit's result, which is to be multiplied by `factor` to be normalised, becomes a node, whose head this returns.
template <typename T, int kRows>
__device__ __forceinline__ Head make_node(int lane, float (&factor)[kRows / 4], const float (&lse_log2)[kRows / 4],
                                          float (&rO)[kBlocks][kRows / 2]) {
    constexpr int kCount = kRows / 4;
    Head head = {own(lane, lse_log2), 1.f};
    if constexpr (kHalfNodes<T>) {
        float high[kCount], power[kCount];
        greatest_finite(rO, high);
        over_lanes(high, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
        for (int h = 0; h < kCount; ++h) {
            power[h] = greatest_power(fmaxf(high[h] * factor[h], 0.f));  // 0 for NaN
            factor[h] *= inverse_power(power[h]);
        }
        head.y = own(lane, power);
    }
    scale(rO, factor);
    return head;
}

// Merges a node into the one in registers.
template <typename T, int kRows>
__device__ __forceinline__ void add_node(const Node<T, kRows>& node, int lane, Head& head,
                                         float (&rO)[kBlocks][kRows / 2]) {
    constexpr int kCount = kRows / 4, kValues = 8 / kNodeVectors<T>;
    const NodeWeights weights(head, node.head);
    head = weights.head();
    float a[kCount], b[kCount];
    all_columns(lane, weights.a, a);
    all_columns(lane, weights.b, b);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        round_node<T>(rO[block]);
#pragma unroll
        for (int h = 0; h < kCount; ++h) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float x[kValues];
                const int k = element(h, i);
                unpack(node.values[block][k / kValues], x);
                rO[block][k] = weighted(a[h], rO[block][k], b[h], x[k % kValues]);
            }
        }
    }
}

template <typename T, int kRows>
__device__ __forceinline__ void load_node(const FwdParams& params, const Consumer& me, int64_t tile, int warpgroup,
                                          Node<T, kRows>& node) {
    const uint4* from = node_at<T, kRows>(params, me, tile, warpgroup);
    node.head = __ldcg(node_heads<1>(params, tile, 4 * warpgroup + me.warp, me.lane));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < node.kVectors; ++i) node.values[b][i] = __ldcg(from + (b * node.kVectors + i) * kWarpgroup);
    }
}

// To the place of the node at `index` of the share's, and lists it if it is left there.
template <typename T, int kRows>
__device__ __forceinline__ void store_node(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                           const Unit& unit, int index, int warpgroup, const Node<T, kRows>& node) {
    const int64_t tile = tile_of_node(params, rows, unit, index);
    uint4* to = node_at<T, kRows>(params, me, tile, warpgroup);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < node.kVectors; ++i) {
            ptx::store_evict_last(to + (b * node.kVectors + i) * kWarpgroup, node.values[b][i]);
        }
    }
    __stcg(node_heads<1>(params, tile, 4 * warpgroup + me.warp, me.lane), node.head);
    if (rows.index() == 0 && threadIdx.x == 0) list_node(params, unit, index, node.end_unit);
}

// Of a unit: normalises its result, and merges it with the nodes that it completes. What that gives is the share's last
// node then, unless it is the whole row. Whether it is.
template <typename T, int kRows>
__device__ __forceinline__ bool end_unit(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                         const Unit& unit, int warpgroup, float (&factor)[kRows / 4],
                                         float (&lse_log2)[kRows / 4], float (&rO)[kBlocks][kRows / 2],
                                         Node<T, kRows>& last) {
    if (makes_row(unit) && unit.merges == 0) {
        scale(rO, factor);
        return true;
    }
    Head head = make_node<T, kRows>(me.lane, factor, lse_log2, rO);
    int node = unit.nodes;
#pragma unroll 1
    for (int left = unit.merges; left > 0; --left) {
        --node;
        if (!kHalfNodes<T> || left < unit.merges) {
            load_node(params, me, tile_of_node(params, rows, unit, node), warpgroup, last);
        }
        add_node(last, me.lane, head, rO);
    }
    if (makes_row(unit)) {
        all_columns(me.lane, head.y, factor);
        all_columns(me.lane, head.x, lse_log2);
        scale(rO, factor);
        return true;
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int j = 0; j < kRows / 16; ++j) {
            const NodeValues<T> values(rO[b] + 8 * j);
#pragma unroll
            for (int i = 0; i < kNodeVectors<T>; ++i) last.values[b][j * kNodeVectors<T> + i] = values.vectors[i];
        }
    }
    last.head = head;
    last.end_unit = unit.end_unit;
    if (!kHalfNodes<T> || unit.ends) store_node(params, rows, me, unit, node, warpgroup, last);
    return false;
}

// One segment, or one unit, from its queries to its result. last: of units, the node that waits in registers.
template <typename T, int kRows, int kRing, typename Share>
__device__ __forceinline__ void attend(const FwdParams& params, SharedStorage<T, kRows>& shared, const RowTile& rows,
                                       const Share& segment, int warpgroup, Place<kRing>& place, uint32_t& phase,
                                       Node<T, kRows>& last) {
    if (segment.begin == segment.end) return sm90::store_nothing<T, kConsumers>(params, rows, segment);
    const Consumer me = {__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), ptx::lane()};
    const auto release = [&](uint64_t* barrier) {
        if (me.lane == 0) cuda::ptx::mbarrier_arrive(barrier);
    };
    float rO[kBlocks][kRows / 2] = {};  // [256 columns of V, rows]
    float factor[kRows / 4];
    ColumnSoftmax<kRows> softmax(warpgroup);
    if constexpr (std::is_same_v<Share, Unit> && kHalfNodes<T>) {
        if (segment.merges == 0 && segment.nodes > 0) {
            store_node(params, rows, me, segment, segment.nodes - 1, warpgroup, last);
        }
    }
    wait(&shared.queries_landed, phase);
    if (segment.ends) phase ^= 1;
#pragma unroll 1
    for (int tile = segment.begin; tile < segment.end; ++tile) {
        int slots[kPortions];
        const Place<kRing> first = place;
#pragma unroll
        for (int portion = 0; portion < kPortions; ++portion, place.next()) slots[portion] = place.slot;
        release(&shared.freed[warpgroup == 0 ? slots[2] : slots[0]]);  // which it has no use for
        float rS[kRows / 4];
        score(shared, me, warpgroup, first, rS);
        if (tile + 1 == segment.end && segment.ends) release(&shared.queries_freed);

        T* values[kBlocks];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const int left = b / kPortionSlices, right = (kBlocks + b) / kPortionSlices;
            values[b] = warpgroup == 0 ? shared.ring[slots[left]][b % kPortionSlices]
                                       : shared.ring[slots[right]][(kBlocks + b) % kPortionSlices];
        }
        scale_and_mask(params, rows, me, segment, softmax, tile, rS);
        softmax_of(shared, me, warpgroup, rS, softmax);
        const int valid = segment.length - tile * kTile;
        if (__any_sync(~0u, valid < kTile)) zero_values(me, values, valid);
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        ptx::named_barrier(kStored, kConsumers);

        load_rows(me, shared.factor, factor);
        bool changed = false;
#pragma unroll
        for (int h = 0; h < kRows / 4; ++h) changed |= factor[h] != 1.f;
        if (__any_sync(~0u, changed)) scale(rO, factor);
        const uint64_t p = wgmma::k_major(shared.sP[0]);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) wgmma::keep(rO[b]);
        wgmma::fence();
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const uint64_t v = wgmma::mn_major(values[b]);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                wgmma::m64k16<T, true>(rO[b], wgmma::advance(v, step * wgmma::kStepBytesMNMajor),
                                       wgmma::advance(p, step * wgmma::kStepBytesKMajor), true);
            }
        }
        wgmma::commit();
        wgmma::wait<0>();
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) wgmma::keep(rO[b]);
        release(&shared.freed[slots[1]]);
        release(&shared.freed[warpgroup == 0 ? slots[0] : slots[2]]);
    }

    constexpr int kCount = kRows / 4;
    float lse_log2[kCount];
    normaliser(shared, me, warpgroup, softmax, factor, lse_log2);
    if constexpr (!std::is_same_v<Share, Unit>) scale(rO, factor);
    const bool has_lse = warpgroup == 0 && me.warp == 0 && me.lane < 4;
    if constexpr (std::is_same_v<Share, Unit>) {
        if (!end_unit(params, rows, me, segment, warpgroup, factor, lse_log2, rO, last)) return;
    } else if (segment.place >= 0) {
        store_share(params, rows, me, segment.place, warpgroup, rO);
#pragma unroll
        for (int h = 0; h < kCount; ++h) {
            if (has_lse) __stcg(share_lse(params, rows, segment.place) + row_of(me.lane, h), lse_log2[h]);
        }
        return;
    }
    store_rows<T>(params, rows, me, segment.row, warpgroup, rO, shared.sP[warpgroup]);
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
        const int r = row_of(me.lane, h);
        if (!has_lse || r >= rows.count(params)) continue;
        const QueryRow row(params, rows.first_row + r);
        const int64_t head = rows.head * params.group + row.g;
        params.lse[rows.lse_at(params, segment.row, head, row.s)] =
            lse_log2[h] == -INFINITY ? INFINITY : lse_log2[h] * kLn2;
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, int kRows, bool kUneven, bool kInvariant>
__global__ void __launch_bounds__(kThreads, 1)
    fwd_kvcache_mla_few_rows_kernel(const __grid_constant__ FwdParams params,
                                    const __grid_constant__ CUtensorMap cache) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    using Shared = SharedStorage<T, kRows>;
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    constexpr int kRing = Shared::kRing;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
    RowTile rows(params, kRows, kInvariant ? params.first_row_tile : 0);
    if (!kInvariant) rows.first_row = 0;  // a head has one row tile

    if (threadIdx.x == 0) {
        if (params.max_len > 0) ptx::prefetch_tensor_map(&cache);
        for (int i = 0; i < kRing; ++i) {
            cuda::ptx::mbarrier_init(&shared.landed[i], 1);
            cuda::ptx::mbarrier_init(&shared.freed[i], kConsumerWarps);
        }
        cuda::ptx::mbarrier_init(&shared.queries_landed, kQueryWarps);
        cuda::ptx::mbarrier_init(&shared.queries_freed, kConsumerWarps);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
    cudaGridDependencySynchronize();  // nothing above reads what an earlier kernel wrote
    cudaTriggerProgrammaticLaunchCompletion();
    if (warp >= kConsumerWarps) prefetch_tables<kUneven>(params, threadIdx.x - kConsumers, kThreads - kConsumers);
    read_plan<kUneven, kInvariant>(params, shared.parts);

    if constexpr (kRows > kFewRows) {  // 64 for O, 32 for a node that it is merged with, in fp16 calls 64
        if (warp < kConsumerWarps) {
            ptx::increase_registers<kConsumerRegisters>();
        } else {
            ptx::decrease_registers<kProducerRegisters>();
        }
    }
    if (warp < kConsumerWarps) {
        Place<kRing> place;
        uint32_t phase = 0;
        Node<T, kRows> last;
        for_each_share<kUneven, kInvariant>(
            params, shared.parts, rows, &shared.parked[warp], [&](const auto& segment, const RowTile& rows) {
                attend(params, shared, rows, segment, warp / (kConsumerWarps / 2), place, phase, last);
            });
    } else if (warp == kConsumerWarps) {
        Place<kRing> place;
        for_each_share<kUneven, kInvariant, true>(params, shared.parts, rows, nullptr,
                                                  [&](const Segment& segment, const RowTile& rows) {
                                                      load_keys(params, cache, shared, rows, segment, place);
                                                  });
    } else {
        uint32_t phase = 0;
        for_each_share<kUneven, kInvariant, true>(
            params, shared.parts, rows, nullptr, [&](const Segment& segment, const RowTile& rows) {
                load_queries(params, shared, rows, segment, warp - kConsumerWarps - 1, phase);
            });
        if (!kInvariant && warp == kConsumerWarps + 1 && blockIdx.x == 0) {
            list_split_rows<kUneven>(params, shared.parts);
        }
        if constexpr (kUneven) {
            if (warp == kConsumerWarps + 2) store_unclaimed<T>(params);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, int kRows, bool kUneven, bool kInvariant>
void launch(const FwdParams& params, cudaStream_t stream) {
    constexpr auto kKernel = fwd_kvcache_mla_few_rows_kernel<T, kRows, kUneven, kInvariant>;
    constexpr int kSharedBytes = sizeof(SharedStorage<T, kRows>);
    static_assert(kSharedBytes <= 227 * 1024);
    // no page, no key: every length is then 0, and nothing reads through the map
    const CUtensorMap cache = params.max_len > 0 ? paged_cache_map(params, kSlices, kPortionSlices) : CUtensorMap{};
    allow_shared_bytes<kKernel>(kSharedBytes, "fwd_kvcache_mla: shared memory");
    for_each_launch<kInvariant>(params, [&](const FwdParams& params, dim3 grid) {
        cuda_check(launch_dependent(kKernel, grid, kThreads, kSharedBytes, stream, params, cache), "fwd_kvcache_mla");
    });
}

template <typename T>
void launch(const FwdParams& params, cudaStream_t stream) {
    const bool more = params.tile_rows > kFewRows, uneven = params.cu_seqlens_q != nullptr;
    if (params.batch_invariant) {
        if (uneven) return launch<T, 2 * kFewRows, true, true>(params, stream);
        return more ? launch<T, 2 * kFewRows, false, true>(params, stream)
                    : launch<T, kFewRows, false, true>(params, stream);
    }
    if (uneven) return launch<T, kFewRows, true, false>(params, stream);
    more ? launch<T, 2 * kFewRows, false, false>(params, stream) : launch<T, kFewRows, false, false>(params, stream);
}

}  // namespace

void fwd_kvcache_mla_few_rows(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
