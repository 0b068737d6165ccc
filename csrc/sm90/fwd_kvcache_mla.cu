// fwd_kvcache_mla: absorbed MLA attention over a paged cache, whose rows of 576 values are keys and, without the last
// 64 of them, values.
//
//   out = softmax(softmax_scale * q k^T) v,   lse = log(sum(exp(softmax_scale * q k^T)))
//
// Work. A row tile is 64 query rows of one key head, in the order (s_q, h_q / h_k). The plan's part p of row tile t is
// one CTA's work: it walks the part's batch rows; of each it sees a segment of tiles of 64 keys.
//
// Grid: (row tiles, parts at work at once); a CTA takes every gridDim.y-th part of the plan. 1 CTA a multiprocessor.
//
// Warp roles. Warp 8 loads key tiles with TMA into a ring of two stages; warps 9-11 load a segment's queries as soon as
// the last tile of the one before has been scored. Warps 0-3 and 4-7 are two warpgroups that go through the tiles in
// pairs: each scores one tile of the pair (S = Q K^T, 64 x 64 in registers), they exchange their row maxima, each
// exponentiates its scores and writes P to shared memory, and each accumulates both tiles' P V for its half of the 512
// output columns (64 x 256 in registers):
//
//     S = Q K[mine]^T, row max -> shared
//     barrier
//     P = exp2(S - max) -> shared, O *= exp2(old max - max)
//     barrier
//     O += P[0] V[0][:, half] + P[1] V[1][:, half]
//
// Shared memory, in slices of 64 x 64 values (8 KB, wgmma.cuh): Q 9, two key tiles 2 x 9; 216 of 227 KB. A tile's ninth
// slice holds the 64 rope values, which are no part of V: once the tile is scored its P takes that place.
//
// Rows that the plan splits go to the workspace as normalised partial outputs and lse; fwd_kvcache_mla_combine.cu
// merges them. Part p has two places there, for its first and for its last row. A plan that uses more parts than the
// workspace has room for is executed unsplit: each row by the part that holds its first tile.
//
// Safety. Lengths clamp to what the block table reaches, pages outside the cache arrive as zeros, columns past a row's
// length are masked and their V rows zeroed. What the plan says is clamped to the batch and to each row's tiles.

#include <cuda/ptx>

#include "fwd_kvcache_mla.cuh"
#include "tma.h"
#include "wgmma.cuh"

namespace flashmla::sm90 {
namespace {

// ------------------------------------------------------------------------------------------------------------ config

constexpr int kSlices = kDimQK / 64;  // 9
constexpr int kStages = 2;            // key tiles in shared memory; Q and three of them do not fit
constexpr int kBoxes = 3;             // TMA loads of a key tile: its first scores start when a third of it has landed
constexpr int kBoxSlices = kSlices / kBoxes;
constexpr int kBoxBytes = kBoxSlices * wgmma::kSliceBytes;
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kQueryWarps = 3;
constexpr int kThreads = kConsumers + 32 * (1 + kQueryWarps);
constexpr int kConsumerRegisters = 224;  // O takes 128, S 32
constexpr int kProducerRegisters = 56;   // 128 * 56 + 256 * 224 = 64512 of 65536
constexpr int kHalfV = kDimV / 2;        // output columns of a warpgroup

template <typename T>
struct SharedStorage {
    alignas(1024) T sQ[kSlices][64 * 64];
    alignas(1024) T sK[kStages][kSlices][64 * 64];
    float row_max[2][kRowTile];  // of the tile that each warpgroup scored
    float row_sum[2][kRowTile];  // of the tiles that each warpgroup scored
    uint64_t landed[kStages][kBoxes];
    uint64_t freed[kStages];
    uint64_t queries_landed, queries_freed;
};

// Named barriers of the consumers, by event; 0 is __syncthreads's.
enum Barrier { kMaximaKnown = 1, kProbabilitiesStored, kSumsKnown };

// What a role has gone through so far: tiles give a ring's stage and phase, segments (that have tiles) the queries'
// phase.
struct Progress {
    uint32_t tiles = 0, segments = 0;
};

// ---------------------------------------------------------------------------------------------------- device helpers

// The ring's stage and phase of the CTA's n-th tile.
__device__ __forceinline__ int stage_of(uint32_t n) { return n % kStages; }
__device__ __forceinline__ uint32_t phase_of(uint32_t n) { return (n / kStages) & 1; }

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t phase) {
    while (!cuda::ptx::mbarrier_try_wait_parity(barrier, phase)) {
    }
}

template <typename T>
__device__ __forceinline__ void wait_for_tile(SharedStorage<T>& shared, uint32_t n) {
    for (int box = 0; box < kBoxes; ++box) wait(&shared.landed[stage_of(n)][box], phase_of(n));
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&packed, &pair, 4);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        memcpy(&packed, &pair, 4);
    }
    return packed;
}

// ----------------------------------------------------------------------------------------------------- producer roles

// Which query rows a CTA has: rows first_row .. of key head `head`, out of params.rows.
struct RowTile {
    int index, head, first_row;
};

// Warp 8: loads the segment's tiles, one after the other, each as soon as its stage is free. Lanes look up 32 tiles'
// pages at once, and the next 32 before they are needed.
template <typename T>
__device__ __forceinline__ void load_tiles(const FwdParams& params, const CUtensorMap& cache, SharedStorage<T>& shared,
                                           const RowTile& rows, const Segment& segment, Progress& done) {
    const int lane = threadIdx.x % 32;
    const int tiles_per_page = params.page_size / kTile;
    const int* table = params.block_table + segment.row * params.table_stride;
    const auto page_of = [&](int tile) {
        const int page = tile < segment.end ? table[tile / tiles_per_page] : -1;
        return page >= 0 && page < params.num_pages ? page : -1;  // -1 is outside the tensor map: it reads as zeros
    };
    int next_page = page_of(segment.begin + lane);
    for (int first = segment.begin; first < segment.end; first += 32) {
        const int page = next_page;
        const int offset = (first + lane) % tiles_per_page * kTile;
        next_page = page_of(first + 32 + lane);
        for (int i = 0; i < min(32, segment.end - first); ++i, ++done.tiles) {
            const int page_i = __shfl_sync(~0u, page, i), offset_i = __shfl_sync(~0u, offset, i);
            if (lane != 0) continue;
            const int stage = stage_of(done.tiles);
            wait(&shared.freed[stage], phase_of(done.tiles) ^ 1);
#pragma unroll
            for (int box = 0; box < kBoxes; ++box) {
                uint64_t* landed = &shared.landed[stage][box];
                const int32_t where[5] = {0, offset_i, box * kBoxSlices, rows.head, page_i};
                cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                                                     cuda::ptx::space_shared, landed, kBoxBytes);
                cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global,
                                                shared.sK[stage][box * kBoxSlices], &cache, where, landed);
            }
        }
        __syncwarp();
    }
}

// Warps 9-11: load the segment's queries; rows past the last are zeros.
template <typename T>
__device__ __forceinline__ void load_queries(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                             const Segment& segment, int warp, Progress& done) {
    if (segment.begin == segment.end) return;
    constexpr int kChunks = kDimQK * sizeof(T) / 16;
    const int lane = threadIdx.x % 32;
    const T* q = static_cast<const T*>(params.q) + segment.row * params.q_stride_b;
    wait(&shared.queries_freed, (done.segments & 1) ^ 1);
    // lane i works out where the warp's i-th row lies: two divisions a row by every lane took 5 us a segment
    constexpr int kRowsPerWarp = (kRowTile + kQueryWarps - 1) / kQueryWarps;
    static_assert(kRowsPerWarp <= 32);
    const int row = rows.first_row + warp + lane * kQueryWarps;
    const int s = row / params.group, h = rows.head * params.group + row % params.group;
    const int64_t my_offset = row < params.rows ? s * params.q_stride_s + h * params.q_stride_h : -1;
#pragma unroll 2
    for (int i = 0; i < kRowsPerWarp; ++i) {
        const int r = warp + i * kQueryWarps;
        const int64_t offset = __shfl_sync(~0u, my_offset, i);
        if (r >= kRowTile) break;
        const bool valid = offset >= 0;
        const T* from = valid ? q + offset : q;
#pragma unroll
        for (int first = 0; first < kChunks; first += 32) {
            const int chunk = first + lane;
            if (chunk >= kChunks) break;
            const uint32_t to = ptx::shared_address(shared.sQ[chunk / 8]) + wgmma::swizzled(r, chunk % 8);
            ptx::cp_async_16(to, from + chunk * 8, valid);
        }
    }
    ptx::cp_async_wait_all();
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    __syncwarp();
    if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_landed);
    ++done.segments;
}

// ------------------------------------------------------------------------------------------- consumers (2 warpgroups)

// Where a consumer thread stands. A warpgroup's accumulators give a thread two rows of the row tile, 8 apart, and in
// them the columns 8 j + 2 (lane % 4) + {0, 1}.
struct Consumer {
    int warpgroup, warp, lane;  // warp: of its warpgroup's 4

    __device__ int row(int i) const { return warp * 16 + lane / 4 + 8 * i; }  // i = 0, 1
    __device__ int column(int j) const { return 8 * j + lane % 4 * 2; }
};

// S = Q K^T of the tile in `stage`, as its thirds land.
template <typename T>
__device__ __forceinline__ void score(SharedStorage<T>& shared, int stage, uint32_t phase, float (&rS)[32]) {
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
        wait(&shared.landed[stage][box], phase);
        wgmma::fence();
#pragma unroll
        for (int slice = box * kBoxSlices; slice < (box + 1) * kBoxSlices; ++slice) {
            const uint64_t q = wgmma::k_major(shared.sQ[slice]), k = wgmma::k_major(shared.sK[stage][slice]);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                wgmma::m64n64k16<T>(rS, wgmma::advance(q, step * wgmma::kStepBytesKMajor),
                                    wgmma::advance(k, step * wgmma::kStepBytesKMajor), slice + step > 0);
            }
        }
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::keep(rS);
}

// Scales the scores and sets those of keys that a row does not see to -inf. `visible`: keys that each of the two rows
// sees.
__device__ __forceinline__ void scale_and_mask(const Consumer& me, float scale, int tile, const int (&visible)[2],
                                               float (&rS)[32]) {
#pragma unroll
    for (int k = 0; k < 32; ++k) rS[k] *= scale;
    if ((tile + 1) * kTile <= min(visible[0], visible[1])) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (tile * kTile + me.column(j) + k % 2 >= visible[k / 2]) rS[4 * j + k] = -INFINITY;
        }
    }
}

// P [64, 64] in T, from accumulators to a slice.
template <typename T>
__device__ __forceinline__ void store_probabilities(const Consumer& me, const float (&rP)[32], T* slice) {
    const int row = me.warp * 16 + me.lane % 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        ptx::stmatrix_x4(ptx::shared_address(slice) + wgmma::swizzled(row, j + me.lane / 16),
                         pack<T>(rP[4 * j], rP[4 * j + 1]), pack<T>(rP[4 * j + 2], rP[4 * j + 3]),
                         pack<T>(rP[4 * j + 4], rP[4 * j + 5]), pack<T>(rP[4 * j + 6], rP[4 * j + 7]));
    }
}

// Zeroes a tile's V from row `first` on: cache rows past the length may hold NaN, and 0 * NaN is NaN.
template <typename T>
__device__ __forceinline__ void zero_values(const Consumer& me, T (&tile)[kSlices][64 * 64], int first) {
    const int rows = 64 - first;
    for (int i = me.warp * 32 + me.lane; i < rows * 64; i += 128) {
        const int row = first + i / 64, slice = i / 8 % 8, chunk = i % 8;
        reinterpret_cast<int4*>(tile[slice])[row * 8 + chunk] = make_int4(0, 0, 0, 0);
    }
}

// O += P V of the tile in `stage`, for this warpgroup's columns.
template <typename T>
__device__ __forceinline__ void accumulate(SharedStorage<T>& shared, const Consumer& me, int stage, float (&rO)[128]) {
    const uint64_t p = wgmma::k_major(shared.sK[stage][kSlices - 1]);
    const uint64_t v = wgmma::mn_major(shared.sK[stage][me.warpgroup * (kHalfV / 64)]);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        wgmma::m64n256k16<T>(rO, wgmma::advance(p, step * wgmma::kStepBytesKMajor),
                             wgmma::advance(v, step * wgmma::kStepBytesMNMajor), true);
    }
    wgmma::commit();
}

// A segment's result: to its place in the workspace if it is a share of a split row, else to out and lse.
template <typename T>
__device__ __forceinline__ void store_result(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                             const Segment& segment, const float (&rO)[128], const float (&row_max)[2],
                                             const float (&row_sum)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = rows.first_row + me.row(i);
        if (row >= params.rows) continue;
        const bool nothing = row_sum[i] == 0.f;
        const float scale = nothing ? 0.f : 1.f / row_sum[i];
        const float lse_log2 = nothing ? -INFINITY : row_max[i] + log2f(row_sum[i]);
        const bool writes_lse = me.warpgroup == 0 && me.lane % 4 == 0;
        if (segment.place >= 0) {
            const int64_t place = (int64_t{segment.place} * params.row_tiles + rows.index) * kRowTile + me.row(i);
            float* out = params.partial_out + place * kDimV + me.warpgroup * kHalfV;
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                *reinterpret_cast<float2*>(out + me.column(j)) =
                    make_float2(rO[4 * j + 2 * i] * scale, rO[4 * j + 2 * i + 1] * scale);
            }
            if (writes_lse) params.partial_lse[place] = lse_log2;
        } else {
            const int s = row / params.group, h = rows.head * params.group + row % params.group;
            T* out = static_cast<T*>(params.out) + ((int64_t{segment.row} * params.s_q + s) * params.h_q + h) * kDimV +
                     me.warpgroup * kHalfV;
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                *reinterpret_cast<uint32_t*>(out + me.column(j)) =
                    pack<T>(rO[4 * j + 2 * i] * scale, rO[4 * j + 2 * i + 1] * scale);
            }
            if (writes_lse) {
                params.lse[(int64_t{segment.row} * params.h_q + h) * params.s_q + s] =
                    nothing ? INFINITY : lse_log2 * kLn2;
            }
        }
    }
}

// One segment, from its queries to its result.
template <typename T>
__device__ __forceinline__ void attend(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                       const Consumer& me, const Segment& segment, Progress& done) {
    float rO[128] = {};                         // [64, 256] of the warpgroup
    float row_max[2] = {-INFINITY, -INFINITY};  // of the scaled scores, base 2
    float row_sum[2] = {0.f, 0.f};              // of this thread's columns of the tiles its warpgroup scored
    const int tiles = segment.end - segment.begin;
    int visible[2];  // keys that each of the thread's rows sees
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int s = (rows.first_row + me.row(i)) / params.group;
        visible[i] = min(segment.length, params.causal ? segment.length - params.s_q + 1 + s : segment.length);
    }

    if (tiles > 0) wait(&shared.queries_landed, done.segments & 1);
    for (int pair = 0; pair < tiles; pair += 2) {
        const int mine = pair + me.warpgroup;  // the tile of this pair that this warpgroup scores, if there is one
        const int tile = segment.begin + mine;
        const int stage = stage_of(done.tiles + mine);
        const bool scores = mine < tiles;
        float rS[32];
        float high[2] = {-INFINITY, -INFINITY};
        if (scores) {
            score(shared, stage, phase_of(done.tiles + mine), rS);
            scale_and_mask(me, params.softmax_scale_log2, tile, visible, rS);
#pragma unroll
            for (int k = 0; k < 32; ++k) high[k / 2 % 2] = fmaxf(high[k / 2 % 2], rS[k]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            high[i] = quad_max(high[i]);
            if (me.lane % 4 == 0) shared.row_max[me.warpgroup][me.row(i)] = high[i];
        }
        if (pair + 2 >= tiles && me.lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_freed);
        ptx::named_barrier(kMaximaKnown, kConsumers);

        float base[2], rescale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float other = shared.row_max[1 - me.warpgroup][me.row(i)];
            const float new_max = fmaxf(row_max[i], fmaxf(high[i], other));
            base[i] = new_max == -INFINITY ? 0.f : new_max;  // no key seen so far: exp2(-inf - 0) = 0, not NaN
            rescale[i] = ptx::exp2_approx(row_max[i] - base[i]);
            row_max[i] = new_max;
            row_sum[i] *= rescale[i];
        }
        if (scores) {
#pragma unroll
            for (int k = 0; k < 32; ++k) {
                rS[k] = ptx::exp2_approx(rS[k] - base[k / 2 % 2]);
                row_sum[k / 2 % 2] += rS[k];
            }
            store_probabilities(me, rS, shared.sK[stage][kSlices - 1]);
            const int valid = segment.length - tile * kTile;
            if (valid < kTile) zero_values(me, shared.sK[stage], valid);
            cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        }
#pragma unroll
        for (int k = 0; k < 128; ++k) rO[k] *= rescale[k / 2 % 2];
        ptx::named_barrier(kProbabilitiesStored, kConsumers);

        const int first = stage_of(done.tiles + pair), second = stage_of(done.tiles + pair + 1);
        const bool both = pair + 1 < tiles;
        // the other warpgroup saw its tile land; what a wgmma of this one reads, this one must have seen land too
        if (both || me.warpgroup == 1) wait_for_tile(shared, done.tiles + pair + 1 - me.warpgroup);
        wgmma::keep(rO);
        wgmma::fence();
        accumulate(shared, me, first, rO);
        if (both) {
            wgmma::fence();
            accumulate(shared, me, second, rO);
        }
        wgmma::wait<0>();
        wgmma::keep(rO);
        if (me.lane == 0) {
            cuda::ptx::mbarrier_arrive(&shared.freed[first]);
            if (both) cuda::ptx::mbarrier_arrive(&shared.freed[second]);
        }
    }
    if (tiles > 0) {
        done.tiles += tiles;
        ++done.segments;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row_sum[i] = quad_sum(row_sum[i]);
            if (me.lane % 4 == 0) shared.row_sum[me.warpgroup][me.row(i)] = row_sum[i];
        }
        ptx::named_barrier(kSumsKnown, kConsumers);
#pragma unroll
        for (int i = 0; i < 2; ++i) row_sum[i] = shared.row_sum[0][me.row(i)] + shared.row_sum[1][me.row(i)];
    }
    store_result<T>(params, rows, me, segment, rO, row_max, row_sum);
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    fwd_kvcache_mla_kernel(const __grid_constant__ FwdParams params, const __grid_constant__ CUtensorMap cache) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage<T>& shared = *reinterpret_cast<SharedStorage<T>*>(shared_bytes);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
    const int tiles_per_head = params.row_tiles / params.h_k;
    const int row_tile = blockIdx.x;
    const RowTile rows = {row_tile, row_tile / tiles_per_head, row_tile % tiles_per_head * kRowTile};

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            for (int box = 0; box < kBoxes; ++box) cuda::ptx::mbarrier_init(&shared.landed[stage][box], 1);
            cuda::ptx::mbarrier_init(&shared.freed[stage], kConsumerWarps);
        }
        cuda::ptx::mbarrier_init(&shared.queries_landed, kQueryWarps);
        cuda::ptx::mbarrier_init(&shared.queries_freed, kConsumerWarps);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
    const bool unsplit = __syncthreads_or(uses_parts_without_workspace(params));

    Progress done;
    if (warp >= kConsumerWarps) {
        ptx::decrease_registers<kProducerRegisters>();
        if (warp == kConsumerWarps) {
            for_each_segment(params, unsplit,
                             [&](const Segment& segment) { load_tiles(params, cache, shared, rows, segment, done); });
        } else {
            for_each_segment(params, unsplit, [&](const Segment& segment) {
                load_queries(params, shared, rows, segment, warp - kConsumerWarps - 1, done);
            });
        }
    } else {
        ptx::increase_registers<kConsumerRegisters>();
        for_each_segment(params, unsplit, [&](const Segment& segment) {
            // the lane is read anew: what derives from it would else be kept in registers across segments
            const Consumer me = {warp / 4, warp % 4, ptx::lane()};
            attend<T>(params, shared, rows, me, segment, done);
        });
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T>
void launch(const FwdParams& params, cudaStream_t stream) {
    const auto kernel = fwd_kvcache_mla_kernel<T>;
    constexpr int kSharedBytes = sizeof(SharedStorage<T>);
    // no page, no key: every length is then 0, and nothing reads through the map
    const CUtensorMap cache = params.max_len > 0 ? paged_cache_map(params, kSlices, kBoxSlices) : CUtensorMap{};
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
               "fwd_kvcache_mla: shared memory");
    const dim3 grid(params.row_tiles, params.grid_parts);
    kernel<<<grid, kThreads, kSharedBytes, stream>>>(params, cache);
    cuda_check(cudaGetLastError(), "fwd_kvcache_mla");
}

}  // namespace

void fwd_kvcache_mla(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
