// fwd_kvcache_mla: absorbed MLA attention over a paged cache, whose rows of 576 values are keys and, without the last
// 64 of them, values.
//
//   out = softmax(softmax_scale * q k^T) v,   lse = log(sum(exp(softmax_scale * q k^T)))
//
// Up to 32 query rows a key head are fwd_kvcache_mla_few_rows.cu's, of uneven queries up to 16, and under a
// batch-invariant plan up to 32 heads a key head with any number of queries.
//
// Work. A row tile is 64 query rows of one key head, in the order (s_q, h_q / h_k). The plan's part p of row tile t is
// one CTA's work: it walks the part's batch rows; of each it sees a segment of tiles of 64 keys.
//
// Grid: (row tiles, parts at work at once); a CTA takes every gridDim.y-th part of the plan. 1 CTA a multiprocessor.
//
// Warp roles. Warps 0-3 and 4-7 are two warpgroups, `first` and `second`. They score tiles in turn (S = Q K^T, 64 x 64
// in registers); each accumulates P V of all tiles for its half of the 512 output columns (64 x 256 in registers): its
// own P from registers, the other's through shared memory. So one computes its softmax while the other keeps the tensor
// cores busy:
//
//     first                                          second
//     S0 = Q K0^T                                    S1 = Q K1^T
//     m = max(m, rows of S0) -> shared
//     P0 = exp2(S0 - m) and its sums -> shared       m = max(m, rows of S1), P1 = exp2(S1 - m)
//     O = O * exp2(old m - m) + P0 V0[:, left]       O = O * exp2(old m - m) + P0 V0[:, right]
//                                                    m, P1 and its sums -> shared
//     O = O * exp2(old m - m) + P1 V1[:, left]       O = O * exp2(old m - m) + P1 V1[:, right]
//     the next S0, as far as it has landed
//
// Warps 8-11 load: the segment's queries together, and each of them one of the four portions (below) of the pairs.
//
// Shared memory, in slices of 64 x 64 values (8 KB, wgmma.cuh): Q 9, two key tiles 2 x 9; 216 of 227 KB. A tile's ninth
// slice holds the 64 rope values, which are no part of V: once the tile is scored, its P takes that place. A tile
// arrives and is freed in two portions: the half of V that its scorer accumulates, which is done with first; and the
// other half with the rope slice.
//
// Results leave through the portion whose V was used last: from registers to there, then as whole lines to memory. Of a
// row that the plan splits each part has a share: a normalised partial output and its lse. Part p has two places for
// shares in the workspace, for its first and for its last row. Where the plan gives most rows at most two parts, the
// one of two that comes last adds the other's share to its own, which never leaves registers; nobody waits, so nothing
// depends on which CTAs run at once. All other shares are merged by fwd_kvcache_mla_combine.cu. A plan that uses more
// parts than the workspace has room for is executed unsplit: each row by the part that holds its first tile.
//
// Under a batch-invariant plan segments are units of fixed tiles, and results are merged in a fixed tree (units.cuh):
// an instance of its own.
//
// Safety. Lengths clamp to what the block table reaches, pages outside the cache arrive as zeros, columns past a row's
// length are masked and their V rows zeroed. What the plan says is clamped to the batch and to each row's tiles.

#include <cuda/atomic>
#include <cuda/ptx>

#include "fwd_kvcache_mla.cuh"
#include "nodes.cuh"
#include "row_tile.cuh"
#include "softmax.cuh"
#include "tma.h"
#include "units.cuh"
#include "wgmma.cuh"

namespace flashmla::sm90 {
namespace {

// ------------------------------------------------------------------------------------------------------------ config

constexpr int kRope = kSlices - 1;  // the slice that is no part of V
constexpr int kHalfSlices = 4;      // slices of half of V
constexpr int kWarpgroup = 128;
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kProducerWarps = 4;  // one a portion
constexpr int kThreads = kConsumers + 32 * kProducerWarps;
constexpr int kConsumerRegisters = 232;  // O takes 128, S 32, P 16
constexpr int kProducerRegisters = 40;   // 128 * 40 + 256 * 232 = 64512 of 65536

// What arrives and is freed at once, in stage s: half s of V; the other half and rope.
enum Portion { kOwnHalf, kOtherHalf };

template <typename T>
struct SharedStorage {
    alignas(1024) T sQ[kSlices][64 * 64];
    alignas(1024) T sK[2][kSlices][64 * 64];  // stage 0: tiles that `first` scores, 1: `second`
    Part parts[kMaxParts];                    // the plan
    Parked parked[kConsumerWarps];
    float base[2][kRowTile];    // what P of the tile in each stage is relative to (Softmax)
    float sum[2][kRowTile][4];  // and P's sum, by the threads that have a row's columns
    int arrived[2];             // shares of the segment's pair that each warpgroup finds in the workspace
    uint64_t landed[2][2];      // [stage][portion]
    uint64_t freed[2][2];
    uint64_t queries_landed, queries_freed;
};

// Named barriers of the consumers, by event; 0 is __syncthreads's.
enum Barrier { kWarpgroupOf = 1 /* + warpgroup */, kStored = 3 /* + stage */, kBased = 5 };

// The paged cache, of which a copy takes half of V or the rope slice of one tile.
struct CacheMaps {
    CUtensorMap half, rope;
};

// The phases of the barriers of stages 0 and 1 and of the queries, as a role goes through them: a bit each, since
// registers are short.
struct Phases {
    uint32_t bits = 0;

    __device__ uint32_t of(int i) const { return bits >> i & 1; }
    __device__ void flip(int i) { bits ^= 1u << i; }
};
constexpr int kQueries = 2;

// ----------------------------------------------------------------------------------------------- producers (4 warps)

// Starts this warp's share of loading the segment's queries. What lies where a row tile lacks rows is scored too, each
// row for itself, and never stored.
template <typename T>
__device__ __forceinline__ void start_queries(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                              const Segment& segment, int warp, const Phases& phases) {
    const int lane = threadIdx.x % 32, chunk = lane % 8;
    wait(&shared.queries_freed, phases.of(kQueries) ^ 1);
#pragma unroll 1
    for (int r = 4 * warp + lane / 8; r < rows.count(params); r += 4 * kProducerWarps) {
        const T* from = query_row<T>(params, rows, segment.row, r) + chunk * 8;
        const uint32_t to = ptx::shared_address(shared.sQ) + wgmma::swizzled(r, chunk);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            ptx::cp_async_16(to + slice * wgmma::kSliceBytes, from + slice * 64);
        }
    }
}

// Brings the next row's queries to L2: while all of the machine streams, what comes from memory takes 6 us.
template <typename T>
__device__ __forceinline__ void prefetch_queries(const FwdParams& params, const RowTile& rows, int batch_row,
                                                 int warp) {
    const int r = 32 * warp + threadIdx.x % 32;
    if (r >= rows.count(params)) return;
    ptx::prefetch_bulk_l2(query_row<T>(params, rows, batch_row, r), kDimQK * sizeof(T));
}

template <typename T>
__device__ __forceinline__ void finish_queries(SharedStorage<T>& shared) {
    ptx::cp_async_wait_all();
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    __syncwarp();
    if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&shared.queries_landed);
}

// One warp: its share of the segment's queries, and its portion of every other tile, each as soon as its place is free.
// One copy a half: the instruction takes uniform registers, so that copies by several lanes are issued one by one.
template <typename T>
__device__ __forceinline__ void load(const FwdParams& params, const CacheMaps& cache, SharedStorage<T>& shared,
                                     const RowTile& rows, const Segment& segment, int warp, Phases& phases) {
    if (segment.begin == segment.end) return;
    const int lane = threadIdx.x % 32;
    const int stage = warp / 2, portion = warp % 2;
    const int half = portion == kOwnHalf ? stage : 1 - stage;
    const int slices = kHalfSlices + (portion == kOtherHalf);
    uint64_t* landed = &shared.landed[stage][portion];
    const Pages pages(params, segment);
    // Two row tiles that read the same keys, at about the same time, take turns in bringing tiles to L2 a pair ahead,
    // so that neither waits for memory. Keys that are read once come slower for that, and those with more readers,
    // whose reads meet on their way to L2 (csrc/NOTES.md, section 12).
    const int readers = readers_of_keys(params), turn = rows.tile;
    int tile = segment.begin + stage, page = pages.page_of(tile);
    start_queries(params, shared, rows, segment, warp, phases);
    bool queries_pending = true;
    for (; tile < segment.end; tile += 2, phases.flip(0)) {
        const int next_page = pages.page_of(tile + 2);  // looked up a tile ahead
        wait(&shared.freed[stage][portion], phases.of(0) ^ 1);
        if (lane == 0) {
            cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared,
                                                 landed, slices * wgmma::kSliceBytes);
            const auto copy = [&](const CUtensorMap& map, int slice) {
                const int32_t where[5] = {0, pages.token_of(tile), slice, rows.head, page};
                copy_keys(readers, shared.sK[stage][slice], map, where, landed);
            };
            const auto prefetch = [&](const CUtensorMap& map, int slice) {
                const int32_t where[5] = {0, pages.token_of(tile + 2), slice, rows.head, next_page};
                ptx::prefetch_box_l2(&map, where);
            };
            copy(cache.half, half * kHalfSlices);
            if (portion == kOtherHalf) copy(cache.rope, kRope);
            if (readers == 2 && tile / 2 % 2 == turn && next_page >= 0) {
                prefetch(cache.half, half * kHalfSlices);
                if (portion == kOtherHalf) prefetch(cache.rope, kRope);
            }
        }
        __syncwarp();
        if (queries_pending) {
            finish_queries(shared);
            if (segment.more) prefetch_queries<T>(params, rows, segment.row + 1, warp);
        }
        queries_pending = false;
        page = next_page;
    }
    if (queries_pending) finish_queries(shared);
    phases.flip(kQueries);
}

// ------------------------------------------------------------------------------------------- consumers (2 warpgroups)

// After a warpgroup's last use of a portion.
__device__ __forceinline__ void release(const Consumer& me, uint64_t* freed) {
    if (me.lane == 0) cuda::ptx::mbarrier_arrive(freed);
}

// Starts the share of S = Q K^T that slices `from` to `to` of a portion have, in the order of the portion, once it has
// landed. The own half comes first.
template <typename T>
__device__ __forceinline__ void score(SharedStorage<T>& shared, int stage, Portion portion, uint32_t phase,
                                      float (&rS)[32], int from = 0, int to = kHalfSlices + 1) {
    wait(&shared.landed[stage][portion], phase);
    wgmma::fence();
#pragma unroll
    for (int i = from; i < min(to, kHalfSlices + (portion == kOtherHalf)); ++i) {
        const int half = portion == kOwnHalf ? stage : 1 - stage;
        const int slice = i == kHalfSlices ? kRope : half * kHalfSlices + i;
        const uint64_t q = wgmma::k_major(shared.sQ[slice]), k = wgmma::k_major(shared.sK[stage][slice]);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            wgmma::m64n64k16<T>(rS, wgmma::advance(q, step * wgmma::kStepBytesKMajor),
                                wgmma::advance(k, step * wgmma::kStepBytesKMajor),
                                portion == kOtherHalf || i + step > 0);
        }
    }
    wgmma::commit();
}

// Zeroes a tile's V from row `first` on: cache rows past the length may hold NaN, and 0 * NaN is NaN.
template <typename T>
__device__ __forceinline__ void zero_values(const Consumer& me, T (&tile)[kSlices][64 * 64], int first) {
    const int rows = 64 - first;
    for (int i = me.warp * 32 + me.lane; i < rows * 64; i += kWarpgroup) {
        const int row = first + i / 64, slice = i / 8 % 8, chunk = i % 8;
        reinterpret_cast<int4*>(tile[slice])[row * 8 + chunk] = make_int4(0, 0, 0, 0);
    }
}

// O += P V of the tile in `stage`, for this warpgroup's half of the columns, with P in registers.
template <typename T>
__device__ __forceinline__ void accumulate(SharedStorage<T>& shared, int stage, int half, const uint32_t (&rP)[16],
                                           float (&rO)[128]) {
    const uint64_t v = wgmma::mn_major(shared.sK[stage][half * kHalfSlices]);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        wgmma::m64n256k16<T>(rO, rP + 4 * step, wgmma::advance(v, step * wgmma::kStepBytesMNMajor), true);
    }
    wgmma::commit();
}

// The same with P in the tile's rope slice.
template <typename T>
__device__ __forceinline__ void accumulate(SharedStorage<T>& shared, int stage, int half, float (&rO)[128]) {
    const uint64_t p = wgmma::k_major(shared.sK[stage][kRope]);
    const uint64_t v = wgmma::mn_major(shared.sK[stage][half * kHalfSlices]);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        wgmma::m64n256k16<T>(rO, wgmma::advance(p, step * wgmma::kStepBytesKMajor),
                             wgmma::advance(v, step * wgmma::kStepBytesMNMajor), true);
    }
    wgmma::commit();
}

// Leaves what P of the tile in `stage` is relative to for the other warpgroup.
template <typename T>
__device__ __forceinline__ void leave_base(SharedStorage<T>& shared, const Consumer& me, int stage,
                                           const float (&base)[2]) {
    if (me.lane % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) shared.base[stage][me.row(i)] = base[i];
}

// And P itself, in the tile's rope slice, with its sums. Zeroes V past the row's length.
template <typename T>
__device__ __forceinline__ void leave_probabilities(SharedStorage<T>& shared, const Consumer& me,
                                                    const Segment& segment, int stage, int tile, const float (&sum)[2],
                                                    const uint32_t (&rP)[16]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) shared.sum[stage][me.row(i)][me.lane % 4] = sum[i];
    ptx::named_barrier(kWarpgroupOf + stage, kWarpgroup);  // all of the warpgroup has read the rope slice
    store_probabilities(me, rP, shared.sK[stage][kRope]);
    const int valid = segment.length - tile * kTile;
    if (__any_sync(~0u, valid < kTile)) {
        zero_values(me, shared.sK[stage], valid);
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        ptx::named_barrier(kWarpgroupOf + stage, kWarpgroup);
    }
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::named_barrier_arrive(kStored + stage, kConsumers);
}

// Takes the other warpgroup's base of the tile in `stage`; it has been waited for.
template <typename T>
__device__ __forceinline__ void take_base(SharedStorage<T>& shared, const Consumer& me, int stage, Softmax& softmax,
                                          float (&factor)[2]) {
    const float base[2] = {shared.base[stage][me.row(0)], shared.base[stage][me.row(1)]};
    change_base(softmax, base, factor);
}

// Waits for the other warpgroup's P of the tile in `stage`, and for its V.
template <typename T>
__device__ __forceinline__ void wait_for_probabilities(SharedStorage<T>& shared, int stage, uint32_t phase) {
    ptx::named_barrier(kStored + stage, kConsumers);
    // the other warpgroup saw its tile land; what a wgmma of this one reads, this one must have seen land too
    wait(&shared.landed[stage][kOtherHalf], phase);
}

// Takes the sums of P of the tile in `stage`, after its base.
template <typename T>
__device__ __forceinline__ void take_sum(SharedStorage<T>& shared, const Consumer& me, int stage, Softmax& softmax) {
    const float sum[2] = {shared.sum[stage][me.row(0)][me.lane % 4], shared.sum[stage][me.row(1)][me.lane % 4]};
    add_sum(softmax, sum);
}

// Warpgroup 0: scores the segment's tiles 0, 2, ..., in stage 0. Leaves unreleased what it used last.
template <typename T>
__device__ __forceinline__ void attend_first(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                             const Consumer& me, const Segment& segment, Phases& phases,
                                             Softmax& softmax, float (&rO)[128]) {
    const int tiles = segment.end - segment.begin;
    int visible[2];
    visible_keys(params, rows, me, segment, visible);
    wait(&shared.queries_landed, phases.of(kQueries));
    float rS[32];
    score(shared, 0, kOwnHalf, phases.of(0), rS);
    for (int i = 0;; i += 2) {
        const bool last = i + 2 >= tiles;
        float high[2], factor[2], sum[2];
        uint32_t rP[16];
        score(shared, 0, kOtherHalf, phases.of(0), rS);
        wgmma::wait<0>();
        wgmma::keep(rS);
        wgmma::keep(rO);
        if (last && segment.ends && me.lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_freed);
        const int tile = segment.begin + i;
        scale_and_mask(me, params.softmax_scale_log2, tile, visible, rS);
        row_maxima(rS, high);
        const float base[2] = {fmaxf(high[0], softmax.base[0]), fmaxf(high[1], softmax.base[1])};
        change_base(softmax, base, factor);
        leave_base(shared, me, 0, base);
        ptx::named_barrier_arrive(kBased, kConsumers);
        exponentiate<T>(base, rS, rP, sum);
        add_sum(softmax, sum);
        leave_probabilities(shared, me, segment, 0, tile, sum, rP);
        rescale(factor, rO);
        wgmma::keep(rO);
        wgmma::keep(rP);
        accumulate(shared, 0, 0, rP, rO);
        wgmma::wait<0>();
        wgmma::keep(rO);
        wgmma::keep(rP);
        phases.flip(0);
        if (i + 1 == tiles) break;
        release(me, &shared.freed[0][kOwnHalf]);
        wait_for_probabilities(shared, 1, phases.of(1));
        phases.flip(1);
        take_base(shared, me, 1, softmax, factor);
        take_sum(shared, me, 1, softmax);
        rescale(factor, rO);
        wgmma::keep(rO);
        accumulate(shared, 1, 0, rO);
        if (last) {
            wgmma::wait<0>();
            wgmma::keep(rO);
            break;
        }
        // the tensor cores go on with the next pair; one slice before the release, the rest of the portion after it
        score(shared, 0, kOwnHalf, phases.of(0), rS, 0, 1);
        wgmma::wait<1>();
        release(me, &shared.freed[1][kOtherHalf]);
        score(shared, 0, kOwnHalf, phases.of(0), rS, 1);
    }
    if (segment.ends) phases.flip(kQueries);
}

// Warpgroup 1: scores the segment's tiles 1, 3, ..., in stage 1. Leaves unreleased what it used last.
template <typename T>
__device__ __forceinline__ void attend_second(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                              const Consumer& me, const Segment& segment, Phases& phases,
                                              Softmax& softmax, float (&rO)[128]) {
    const int tiles = segment.end - segment.begin;
    int visible[2];
    visible_keys(params, rows, me, segment, visible);
    wait(&shared.queries_landed, phases.of(kQueries));
    float factor[2];
    for (int i = 1; i < tiles; i += 2) {
        float rS[32], high[2], sum[2];
        uint32_t rP[16];
        score(shared, 1, kOwnHalf, phases.of(1), rS);
        score(shared, 1, kOtherHalf, phases.of(1), rS);
        wgmma::wait<0>();  // ptxas lets nobody write to O, which is waited for, while another wgmma is under way
        wgmma::keep(rS);
        const int tile = segment.begin + i;
        scale_and_mask(me, params.softmax_scale_log2, tile, visible, rS);
        row_maxima(rS, high);
        ptx::named_barrier(kBased, kConsumers);
        take_base(shared, me, 0, softmax, factor);
        const float base[2] = {fmaxf(high[0], softmax.base[0]), fmaxf(high[1], softmax.base[1])};
        leave_base(shared, me, 1, base);
        exponentiate<T>(base, rS, rP, sum);  // by the time P0 is there
        rescale(factor, rO);
        wgmma::keep(rO);
        wait_for_probabilities(shared, 0, phases.of(0));
        accumulate(shared, 0, 1, rO);
        if (i + 2 >= tiles && segment.ends && me.lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_freed);
        take_sum(shared, me, 0, softmax);
        change_base(softmax, base, factor);
        add_sum(softmax, sum);
        leave_probabilities(shared, me, segment, 1, tile, sum, rP);
        wgmma::wait<0>();
        wgmma::keep(rO);
        release(me, &shared.freed[0][kOtherHalf]);
        phases.flip(0);
        rescale(factor, rO);
        wgmma::keep(rO);
        wgmma::keep(rP);
        accumulate(shared, 1, 1, rP, rO);
        wgmma::wait<0>();
        wgmma::keep(rO);
        wgmma::keep(rP);
        if (i + 1 < tiles) release(me, &shared.freed[1][kOwnHalf]);
        phases.flip(1);
    }
    if (tiles % 2 == 1) {  // the last tile has no partner
        if (tiles == 1 && segment.ends && me.lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_freed);
        ptx::named_barrier(kBased, kConsumers);
        take_base(shared, me, 0, softmax, factor);
        rescale(factor, rO);
        wgmma::keep(rO);
        wait_for_probabilities(shared, 0, phases.of(0));
        take_sum(shared, me, 0, softmax);
        accumulate(shared, 0, 1, rO);
        wgmma::wait<0>();
        wgmma::keep(rO);
        phases.flip(0);
    }
    if (segment.ends) phases.flip(kQueries);
}

using Arrivals = cuda::atomic_ref<int, cuda::thread_scope_device>;

// Of a pair: puts the warpgroup's half of this share into the workspace, unless the other share's is there already.
// Whether it was. The part that ends a row has it first, and the one that begins it has it last, so that this one most
// often finds the other's share, and need not store its own.
template <typename T>
__device__ __forceinline__ bool finds_other_share(const FwdParams& params, SharedStorage<T>& shared,
                                                  const RowTile& rows, const Consumer& me, const Segment& segment,
                                                  int pair, int warpgroup, const float (&lse_log2)[2],
                                                  const float (&rO)[128]) {
    Arrivals arrivals(params.arrivals[(pair * params.row_tiles + rows.index()) * 2 + warpgroup]);
    const bool leader = me.warp == 0 && me.lane == 0;
    int& arrived = shared.arrived[warpgroup];
    if (segment.place == last_place(pair)) {
        if (leader) arrived = arrivals.load(cuda::memory_order_acquire);
        ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);
        if (arrived != 0) return true;
    }
    const int64_t tile = tile_at(params, segment.place, rows.index());
    store_pair_share(params, rows, me, tile, share_lse(params, tile), warpgroup, lse_log2, rO);
    ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);
    if (leader) arrived = arrivals.fetch_add(1, cuda::memory_order_acq_rel);
    ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);
    return arrived != 0;
}

// Of a segment: normalises its result, and stores or merges it if it is a share of a row. Whether the row is whole.
template <typename T>
__device__ __forceinline__ bool end_segment(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                            const Consumer& me, const Segment& segment, int warpgroup,
                                            const float (&scale)[2], float (&lse_log2)[2], float (&rO)[128],
                                            void* staging) {
    normalise(scale, rO);
    if (segment.place < 0) return true;
    const int pair = rows.uneven ? -1 : pair_of(params, shared.parts, segment);
    if (pair < 0) {
        store_share(params, rows, me, segment.place, warpgroup, lse_log2, rO);
        return false;
    }
    if (!finds_other_share(params, shared, rows, me, segment, pair, warpgroup, lse_log2, rO)) return false;
    const int other = segment.place == last_place(pair) ? first_place(pair + 1) : last_place(pair);
    const int64_t tile = tile_at(params, other, rows.index());
    add_share(params, rows, me, tile, share_lse(params, tile), warpgroup, lse_log2, rO, staging);
    return true;
}

// Of a unit: merges it with the nodes that it completes, and stores what that gives unless it is the whole row. Whether
// it is; if not it has called free_staging(), as soon as nothing is left to be merged and before the stores: its fence
// would wait for them.
template <typename T, typename FreeStaging>
__device__ __forceinline__ bool end_unit(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                         const Unit& unit, int warpgroup, const float (&scale)[2], float (&lse_log2)[2],
                                         float (&rO)[128], void* staging, FreeStaging&& free_staging) {
    const bool whole = makes_row(unit);
    if (whole && unit.merges == 0) {
        normalise(scale, rO);
        return true;
    }
    if (unit.merges == 0) free_staging();
    float power[2];
    make_node<T>(scale, rO, power);
    int node = unit.nodes;
#pragma unroll 1
    for (int left = unit.merges; left > 0; --left) {
        const int64_t tile = tile_of_node(params, rows, unit, --node);
        add_node<T>(params, rows, me, tile, warpgroup, lse_log2, power, rO, staging);
    }
    if (whole) {
        unmake_node<T>(power, rO);
        return true;
    }
    if (unit.merges > 0) free_staging();
    store_node<T>(params, rows, me, tile_of_node(params, rows, unit, node), warpgroup, lse_log2, power, rO);
    if (rows.index() == 0 && threadIdx.x == 0) list_node(params, unit, node, unit.end_unit);
    return false;
}

// One segment, or one unit, from its queries to its result.
template <typename T, typename Share>
__device__ __forceinline__ void attend(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                       const Share& segment, int warpgroup, Phases& phases) {
    if (segment.begin == segment.end) return store_nothing<T, kConsumers>(params, rows, segment);
    // the lane is read anew: what derives from it would else be kept in registers across segments
    const Consumer me = {__shfl_sync(~0u, ptx::thread() / 32 % 4, 0), ptx::lane()};
    float rO[128] = {};  // [64, 256] of the warpgroup
    Softmax softmax;
    if (warpgroup == 0) {
        attend_first(params, shared, rows, me, segment, phases, softmax, rO);
    } else {
        attend_second(params, shared, rows, me, segment, phases, softmax, rO);
    }
    float scale[2], lse_log2[2];
    normaliser(softmax, scale, lse_log2);
    // This warpgroup's half of the V that it used last is its own until it is released.
    const int stage = (segment.end - segment.begin - 1) % 2;
    void* staging = shared.sK[stage][warpgroup * kHalfSlices];
    ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);  // all four warps' wgmmas are done
    const auto free_staging = [&] {
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);
        release(me, &shared.freed[stage][stage == warpgroup ? kOwnHalf : kOtherHalf]);
    };
    bool whole;
    if constexpr (std::is_same_v<Share, Unit>) {
        whole = end_unit<T>(params, rows, me, segment, warpgroup, scale, lse_log2, rO, staging, free_staging);
        if (!whole) return;
    } else {
        whole = end_segment(params, shared, rows, me, segment, warpgroup, scale, lse_log2, rO, staging);
    }
    if (whole) store_rows<T>(params, rows, me, segment.row, warpgroup, lse_log2, rO, staging);
    free_staging();
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, bool kUneven, bool kInvariant>
__global__ void __launch_bounds__(kThreads, 1)
    fwd_kvcache_mla_kernel(const __grid_constant__ FwdParams params, const __grid_constant__ CacheMaps cache) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage<T>& shared = *reinterpret_cast<SharedStorage<T>*>(shared_bytes);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
    const RowTile rows(params, kRowTile, kInvariant ? params.first_row_tile : 0);

    if (threadIdx.x == 0) {
        if (params.max_len > 0) {
            ptx::prefetch_tensor_map(&cache.half);
            ptx::prefetch_tensor_map(&cache.rope);
        }
        for (int i = 0; i < 4; ++i) {
            cuda::ptx::mbarrier_init(&shared.landed[i / 2][i % 2], 1);
            cuda::ptx::mbarrier_init(&shared.freed[i / 2][i % 2], kConsumerWarps / 2);
        }
        cuda::ptx::mbarrier_init(&shared.queries_landed, kProducerWarps);
        cuda::ptx::mbarrier_init(&shared.queries_freed, kConsumerWarps);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
    cudaGridDependencySynchronize();  // nothing above reads what an earlier kernel wrote
    cudaTriggerProgrammaticLaunchCompletion();
    if (warp >= kConsumerWarps) prefetch_tables<kUneven>(params, threadIdx.x - kConsumers, kThreads - kConsumers);
    read_plan<kUneven, kInvariant>(params, shared.parts);

    Phases phases;
    if (warp < kConsumerWarps) {
        ptx::increase_registers<kConsumerRegisters>();
        const int warpgroup = warp / (kConsumerWarps / 2);
        for_each_share<kUneven, kInvariant>(params, shared.parts, rows, &shared.parked[warp],
                                            [&](const auto& segment, const RowTile& rows) {
                                                attend(params, shared, rows, segment, warpgroup, phases);
                                            });
    } else {
        ptx::decrease_registers<kProducerRegisters>();
        const int producer = warp - kConsumerWarps;
        const auto is_producer = [](int i) { return ptx::thread() / 32 == kConsumerWarps + i; };
        for_each_share<kUneven, kInvariant, true>(params, shared.parts, rows, nullptr,
                                                  [&](const Segment& segment, const RowTile& rows) {
                                                      load(params, cache, shared, rows, segment, producer, phases);
                                                  });
        if (!kInvariant && is_producer(0) && blockIdx.x == 0) list_split_rows<kUneven>(params, shared.parts);
        if constexpr (kUneven) {
            if (is_producer(1)) store_unclaimed<T>(params);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

// The counters of arrived shares belong to the call: memory that a device kept for all would be wrong as soon as two
// graphs ran at once, or after one that was aborted.
__global__ void clear_arrivals_kernel(int* arrivals, int count) {
    cudaTriggerProgrammaticLaunchCompletion();  // the decode kernel waits for the end of this one
    cudaGridDependencySynchronize();
    for (int i = threadIdx.x; i < count; i += blockDim.x) arrivals[i] = 0;
}

template <typename T, bool kUneven, bool kInvariant>
void launch(const FwdParams& params, cudaStream_t stream) {
    constexpr auto kKernel = fwd_kvcache_mla_kernel<T, kUneven, kInvariant>;
    constexpr int kSharedBytes = sizeof(SharedStorage<T>);
    static_assert(kSharedBytes <= 227 * 1024);
    // no page, no key: every length is then 0, and nothing reads through the map
    CacheMaps cache = {};
    if (params.max_len > 0) {
        cache.half = paged_cache_map(params, kSlices, kHalfSlices);
        cache.rope = paged_cache_map(params, kSlices, 1);
    }
    allow_shared_bytes<kKernel>(kSharedBytes, "fwd_kvcache_mla: shared memory");
    if (params.arrivals != nullptr) {
        const int count = 2 * params.split_parts * params.row_tiles;
        cuda_check(launch_dependent(clear_arrivals_kernel, 1, 256, 0, stream, params.arrivals, count),
                   "fwd_kvcache_mla: counters");
    }
    for_each_launch<kInvariant>(params, [&](const FwdParams& params, dim3 grid) {
        cuda_check(launch_dependent(kKernel, grid, kThreads, kSharedBytes, stream, params, cache), "fwd_kvcache_mla");
    });
}

template <typename T>
void launch(const FwdParams& params, cudaStream_t stream) {
    const bool uneven = params.cu_seqlens_q != nullptr;
    if (params.batch_invariant)
        return uneven ? launch<T, true, true>(params, stream) : launch<T, false, true>(params, stream);
    uneven ? launch<T, true, false>(params, stream) : launch<T, false, false>(params, stream);
}

}  // namespace

void fwd_kvcache_mla(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
