// fwd_kvcache_mla for queries and caches that are both in e4m3, with one scale each: what fwd_kvcache_mla_fp8.cu
// computes, from the same plan. Up to 16 query rows a key head are fwd_kvcache_mla_fp8_few_rows.cu's.
//
// Scores are products of e4m3 as it lies in the cache, which the tensor cores multiply twice as fast as fp16; they add
// them up with 14 bits or so, as in FlashMLA's kernel for this. Of V, e4m3 would have to be transposed and P rounded to
// 4 bits: it becomes fp16 instead, which has all its values, and P with it.
//
// Grid: (row tiles of 64, parts at work at once), as there. 1 CTA a multiprocessor.
//
// Warp roles. Warps 0-3, `scorer`: S = Q K^T, softmax, and P V of the left half of the columns with P from registers.
// Warps 4-7, `follower`: P V of the right half, with P from shared memory. Warp 8 loads queries and keys, warps 9-11
// convert what is V of these.
//
// Safety. As in fwd_kvcache_mla.cu. Tokens past a row's length become zeros in V; their scores are masked.

#include <cuda/ptx>

#include "e4m3.cuh"
#include "e4m3_tile.cuh"
#include "fwd_kvcache_mla.cuh"
#include "row_tile.cuh"
#include "softmax.cuh"
#include "tma.h"
#include "wgmma.cuh"

namespace flashmla::sm90 {
namespace {

// ------------------------------------------------------------------------------------------------------------ config

constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kConverterWarps = 3;
constexpr int kThreads = kConsumers + 32 * (1 + kConverterWarps);
constexpr int kScorerRegisters = 216;    // O takes 128, S 32, P 16
constexpr int kFollowerRegisters = 184;  // O 128
constexpr int kProducerRegisters = 104;

constexpr int kKeyStages = 2;
constexpr int kHalf = kTile / 2;  // tokens that are converted, and freed, together
constexpr int kHalves = 3;        // of such, on their way to P V
constexpr int kHalfLatents = kLatents / 2;

// Slices of 64 bytes a row, in the 64-byte swizzle, and of 64 fp16 values a row of half a tile.
constexpr int kByteSlice = kTile * 64;
constexpr int kValueSlice = kHalf * 128;

struct SharedStorage {
    alignas(1024) uint8_t sQ[kSlices][kByteSlice];
    alignas(1024) uint8_t sK[kKeyStages][kSlices][kByteSlice];
    alignas(1024) uint8_t sV[kHalves][kLatents][kValueSlice];
    alignas(1024) __half sP[2][kRowTile * kTile];  // of tiles in turn
    Part parts[kMaxParts];                         // the plan
    float base[2][kRowTile];                       // what P is relative to (Softmax)
    float sum[2][kRowTile][4];                     // and P's sum, by the threads that have a row's columns
    uint64_t keys_landed[kKeyStages], keys_freed[kKeyStages];
    uint64_t values_landed[kHalves], values_freed[kHalves];
    uint64_t queries_landed, queries_freed;
};

// Named barriers of the consumers, by event; 0 is __syncthreads's.
enum Barrier { kStored = 1 /* + turn */, kDone = 3 /* + warpgroup */ };

using KeyPlace = Place<kKeyStages>;
using ValuePlace = Place<kHalves>;

// Byte offset of a 16-byte chunk in a slice of 64 bytes a row.
__device__ __forceinline__ int byte_chunk(int row, int chunk) { return row * 64 + ((chunk ^ (row / 2 % 4)) << 4); }

// --------------------------------------------------------------------------------------------------- loader (1 warp)

// The segment's queries, asynchronously, as soon as the last one's are no longer needed.
__device__ __forceinline__ void start_queries(const FwdParams& params, SharedStorage& shared, const RowTile& rows,
                                              const Segment& segment, uint32_t phase) {
    constexpr int kChunks = kDimQK / 16;
    wait(&shared.queries_freed, phase ^ 1);
    const int count = rows.count(params) * kChunks;
#pragma unroll 4
    for (int i = ptx::lane(); i < count; i += 32) {
        const int row = i / kChunks, chunk = i % kChunks;
        const uint8_t* from = query_row<uint8_t>(params, rows, segment.row, row) + chunk * 16;
        ptx::cp_async_16(ptx::shared_address(shared.sQ[chunk / 4]) + byte_chunk(row, chunk % 4), from);
    }
}

__device__ __forceinline__ void load(const FwdParams& params, const CUtensorMap& cache, SharedStorage& shared,
                                     const RowTile& rows, const Segment& segment, KeyPlace& place, uint32_t& phase) {
    if (segment.begin == segment.end) return;
    const Pages pages(params, segment);
    const int readers = readers_of_keys(params);
    const int lane = ptx::lane();
    int page = pages.page_of(segment.begin), next_page = pages.page_of(segment.begin + 1);
    // tiles that several CTAs read are brought to L2 two tiles ahead, by each in turn
    const bool shared_by_row_tiles = params.row_tiles > 1 && params.h_k == 1;
    for (int tile = segment.begin; tile < segment.end; ++tile, place.next()) {
        const int page_after = pages.page_of(tile + 2);  // looked up two tiles ahead
        uint64_t* landed = &shared.keys_landed[place.slot];
        wait(&shared.keys_freed[place.slot], place.phase ^ 1);
        if (lane == 0) {
            cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared,
                                                 landed, kSlices * kByteSlice);
            const int32_t where[5] = {0, pages.token_of(tile), 0, rows.head, page};
            copy_keys(readers, shared.sK[place.slot][0], cache, where, landed);
            if (shared_by_row_tiles && page_after >= 0 && tile % params.row_tiles == rows.index()) {
                ptx::prefetch_box_l2(&cache, {0, pages.token_of(tile + 2), 0, rows.head, page_after});
            }
        }
        __syncwarp();
        page = next_page;
        next_page = page_after;
        if (tile == segment.begin) {
            start_queries(params, shared, rows, segment, phase);
            phase ^= 1;
            ptx::cp_async_wait_all();
            __syncwarp();
            if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_landed);
        }
    }
}

// ---------------------------------------------------------------------------------------------- converters (3 warps)

// Half a tile's V. A warp has 8 tokens of a slice at a time, a lane 16 values of one: so neither its reads nor its
// writes meet in a bank. Tokens from `count` on become zeros.
__device__ __forceinline__ void convert_half(const uint8_t (&keys)[kSlices][kByteSlice], int half, int count,
                                             uint8_t (&values)[kLatents][kValueSlice], int warp) {
    constexpr int kAtOnce = kHalf / 8;
    const int token = ptx::lane() / 4, chunk = ptx::lane() % 4;
    const uint8_t* from = keys[0] + half * kHalf * 64 + byte_chunk(token, chunk);
    uint8_t* to = values[0] + wgmma::swizzled(token, 2 * chunk);
    uint8_t* next_to = values[0] + wgmma::swizzled(token, 2 * chunk + 1);
#pragma unroll 1
    for (int slice = warp; slice < kLatents; slice += kConverterWarps) {
        uint4 bytes[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            bytes[i] = *reinterpret_cast<const uint4*>(from + slice * kByteSlice + i * 8 * 64);
        }
        if (count < kTile) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (half * kHalf + i * 8 + token >= count) bytes[i] = {};
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            uint4 chunks[2];
            convert<__half>(bytes[i], chunks);
            const int at = slice * kValueSlice + i * 8 * 128;
            *reinterpret_cast<uint4*>(to + at) = chunks[0];
            *reinterpret_cast<uint4*>(next_to + at) = chunks[1];
        }
    }
}

__device__ __forceinline__ void convert_values(const FwdParams& params, SharedStorage& shared, const Segment& segment,
                                               int warp, KeyPlace& keys, ValuePlace& values) {
    const int lane = ptx::lane();
    for (int tile = segment.begin; tile < segment.end; ++tile, keys.next()) {
        wait(&shared.keys_landed[keys.slot], keys.phase);
#pragma unroll 1
        for (int half = 0; half < 2; ++half, values.next()) {
            wait(&shared.values_freed[values.slot], values.phase ^ 1);
            convert_half(shared.sK[keys.slot], half, segment.length - tile * kTile, shared.sV[values.slot], warp);
            __syncwarp();
            if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.values_landed[values.slot]);
        }
        if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.keys_freed[keys.slot]);
    }
}

// ------------------------------------------------------------------------------------------- consumers (2 warpgroups)

// After a warpgroup's last use.
__device__ __forceinline__ void release(const Consumer& me, uint64_t* freed) {
    if (me.lane == 0) cuda::ptx::mbarrier_arrive(freed);
}

// A tile's V: its two halves' places.
struct Values {
    ValuePlace half[2];

    __device__ explicit Values(ValuePlace& place) {
#pragma unroll
        for (int i = 0; i < 2; ++i, place.next()) half[i] = place;
    }
    // Waits for them, and for what was written to shared memory before to be what a wgmma reads.
    __device__ void wait_for(SharedStorage& shared) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) wait(&shared.values_landed[half[i].slot], half[i].phase);
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    }
    // Of a step of 16 tokens, the columns of a warpgroup.
    __device__ uint64_t operand(SharedStorage& shared, int step, int warpgroup) const {
        const uint8_t* slices = shared.sV[half[step / 2].slot][warpgroup * kHalfLatents];
        return wgmma::advance(wgmma::descriptor(slices, kValueSlice, 1024), step % 2 * wgmma::kStepBytesMNMajor);
    }
    __device__ void free(SharedStorage& shared, const Consumer& me) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) release(me, &shared.values_freed[half[i].slot]);
    }
};

// Starts S = Q K^T of a tile, once it has landed.
__device__ __forceinline__ void score(SharedStorage& shared, const KeyPlace& place, float (&rS)[32]) {
    wait(&shared.keys_landed[place.slot], place.phase);
    wgmma::fence();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        const uint64_t q = wgmma::k_major_64(shared.sQ[slice]), k = wgmma::k_major_64(shared.sK[place.slot][slice]);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            wgmma::m64n64k32_e4m3(rS, wgmma::advance(q, step * wgmma::kStepBytesKMajor),
                                  wgmma::advance(k, step * wgmma::kStepBytesKMajor), slice + step > 0);
        }
    }
    wgmma::commit();
}

// Leaves P for the follower, with what it is relative to and its sums.
__device__ __forceinline__ void leave_probabilities(SharedStorage& shared, const Consumer& me, int turn,
                                                    const float (&base)[2], const float (&sum)[2],
                                                    const uint32_t (&rP)[16]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (me.lane % 4 == 0) shared.base[turn][me.row(i)] = base[i];
        shared.sum[turn][me.row(i)][me.lane % 4] = sum[i];
    }
    store_probabilities(me, rP, shared.sP[turn]);
    ptx::named_barrier_arrive(kStored + turn, kConsumers);
}

// Warpgroup 0. Leaves its last tile's V unreleased: that is returned.
__device__ __forceinline__ Values attend_scorer(const FwdParams& params, SharedStorage& shared, const RowTile& rows,
                                                const Consumer& me, const Segment& segment, float scale_log2,
                                                KeyPlace& keys, ValuePlace& place, int& turn, uint32_t& queries_phase,
                                                Softmax& softmax, float (&rO)[128]) {
    int visible[2];
    visible_keys(params, rows, me, segment, visible);
    wait(&shared.queries_landed, queries_phase);
    queries_phase ^= 1;
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    for (int tile = segment.begin;; ++tile) {
        const bool last = tile + 1 == segment.end;
        float rS[32], high[2], factor[2], sum[2];
        uint32_t rP[16];
        score(shared, keys, rS);
        wgmma::wait<0>();
        wgmma::keep(rS);
        release(me, &shared.keys_freed[keys.slot]);
        keys.next();
        if (last && me.lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_freed);
        scale_and_mask(me, scale_log2, tile, visible, rS);
        row_maxima(rS, high);
        const float base[2] = {fmaxf(high[0], softmax.base[0]), fmaxf(high[1], softmax.base[1])};
        change_base(softmax, base, factor);
        exponentiate<__half>(base, rS, rP, sum);
        add_sum(softmax, sum);
        const Values values(place);
        values.wait_for(shared);  // that there was room for it says that the follower has done with P two tiles before
        leave_probabilities(shared, me, turn, base, sum, rP);
        turn ^= 1;
        rescale(factor, rO);
        wgmma::keep(rO);
        wgmma::keep(rP);
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            wgmma::m64n256k16<__half>(rO, rP + 4 * step, values.operand(shared, step, 0), true);
        }
        wgmma::commit();
        wgmma::wait<0>();
        wgmma::keep(rO);
        wgmma::keep(rP);
        if (last) return values;
        values.free(shared, me);
    }
}

// Takes what the scorer left beside P.
__device__ __forceinline__ void take_base_and_sum(SharedStorage& shared, const Consumer& me, int turn, Softmax& softmax,
                                                  float (&factor)[2]) {
    const float* base = shared.base[turn];
    const float (*sum)[4] = shared.sum[turn];
    change_base(softmax, {base[me.row(0)], base[me.row(1)]}, factor);
    add_sum(softmax, {sum[me.row(0)][me.lane % 4], sum[me.row(1)][me.lane % 4]});
}

// Warpgroup 1. The same.
__device__ __forceinline__ Values attend_follower(SharedStorage& shared, const Consumer& me, const Segment& segment,
                                                  ValuePlace& place, int& turn, Softmax& softmax, float (&rO)[128]) {
    for (int tile = segment.begin;; ++tile) {
        const Values values(place);
        ptx::named_barrier(kStored + turn, kConsumers);
        float factor[2];
        take_base_and_sum(shared, me, turn, softmax, factor);
        values.wait_for(shared);
        rescale(factor, rO);
        wgmma::keep(rO);
        const uint64_t p = wgmma::k_major(shared.sP[turn]);
        turn ^= 1;
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            wgmma::m64n256k16<__half>(rO, wgmma::advance(p, step * wgmma::kStepBytesKMajor),
                                      values.operand(shared, step, 1), true);
        }
        wgmma::commit();
        wgmma::wait<0>();
        wgmma::keep(rO);
        if (tile + 1 == segment.end) return values;
        values.free(shared, me);
    }
}

// What became of a segment, from a warpgroup's accumulators to memory, by way of half of the last tile's V.
__device__ __forceinline__ void store(const FwdParams& params, SharedStorage& shared, const RowTile& rows,
                                      const Consumer& me, const Segment& segment, int warpgroup, float out_scale,
                                      const Values& values, Softmax& softmax, float (&rO)[128]) {
    float scale[2], lse_log2[2];
    normaliser(softmax, scale, lse_log2);
    normalise(scale, rO);
    if (out_scale != 1.f) {
#pragma unroll
        for (int k = 0; k < 128; ++k) rO[k] *= out_scale;
    }
    if (segment.place >= 0) {
        store_share(params, rows, me, segment.place, warpgroup, lse_log2, rO);
    } else {
        // Both are done with V. Not one barrier for both: synccheck knows none that is waited for in two places. One
        // after the other: who comes to either again knows that the other warpgroup has left it.
        if (warpgroup == 0) {
            ptx::named_barrier(kDone + 1, kConsumers);
            ptx::named_barrier_arrive(kDone, kConsumers);
        } else {
            ptx::named_barrier_arrive(kDone + 1, kConsumers);
            ptx::named_barrier(kDone, kConsumers);
        }
        store_rows<__nv_bfloat16>(params, rows, me, segment.row, warpgroup, lse_log2, rO,
                                  shared.sV[values.half[warpgroup].slot]);
    }
    values.free(shared, me);
}

// ------------------------------------------------------------------------------------------------------------ kernel

// The lane is read anew for each segment: what derives from it would else be kept in registers across segments.
__device__ __forceinline__ Consumer consumer() {
    return {__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), ptx::lane()};
}

template <bool kUneven>
__global__ void __launch_bounds__(kThreads, 1)
    fwd_kvcache_mla_fp8_queries_kernel(const __grid_constant__ FwdParams params,
                                       const __grid_constant__ CUtensorMap cache) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
    const RowTile rows(params);

    if (threadIdx.x == 0) {
        for (int i = 0; i < kKeyStages; ++i) {
            cuda::ptx::mbarrier_init(&shared.keys_landed[i], 1);
            cuda::ptx::mbarrier_init(&shared.keys_freed[i], kConsumerWarps / 2 + kConverterWarps);
        }
        for (int i = 0; i < kHalves; ++i) {
            cuda::ptx::mbarrier_init(&shared.values_landed[i], kConverterWarps);
            cuda::ptx::mbarrier_init(&shared.values_freed[i], kConsumerWarps);
        }
        cuda::ptx::mbarrier_init(&shared.queries_landed, 1);
        cuda::ptx::mbarrier_init(&shared.queries_freed, kConsumerWarps / 2);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
        ptx::prefetch_tensor_map(&cache);
    }
    cudaGridDependencySynchronize();  // nothing above reads what an earlier kernel wrote
    cudaTriggerProgrammaticLaunchCompletion();
    if (warp >= kConsumerWarps) prefetch_tables<kUneven>(params, threadIdx.x - kConsumers, kThreads - kConsumers);
    read_plan<kUneven>(params, shared.parts);

    KeyPlace keys;
    ValuePlace values;
    int turn = 0;
    uint32_t queries_phase = 0;
    if (warp < kConsumerWarps / 2) {
        ptx::increase_registers<kScorerRegisters>();
        const float kv_scale = __ldg(params.kv_scale);
        const float scale_log2 = params.softmax_scale_log2 * kv_scale * __ldg(params.q_scale);
        for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
            if (segment.begin == segment.end) {
                return store_nothing<__nv_bfloat16, kConsumers>(params, rows, segment);
            }
            float rO[128] = {};  // [64, 256] of the warpgroup
            Softmax softmax;
            const Consumer me = consumer();
            const Values last = attend_scorer(params, shared, rows, me, segment, scale_log2, keys, values, turn,
                                              queries_phase, softmax, rO);
            store(params, shared, rows, me, segment, 0, kv_scale, last, softmax, rO);
        });
    } else if (warp < kConsumerWarps) {
        ptx::increase_registers<kFollowerRegisters>();
        const float kv_scale = __ldg(params.kv_scale);
        for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
            if (segment.begin == segment.end) {
                return store_nothing<__nv_bfloat16, kConsumers>(params, rows, segment);
            }
            float rO[128] = {};
            Softmax softmax;
            const Consumer me = consumer();
            const Values last = attend_follower(shared, me, segment, values, turn, softmax, rO);
            store(params, shared, rows, me, segment, 1, kv_scale, last, softmax, rO);
        });
    } else {
        ptx::decrease_registers<kProducerRegisters>();
        if (warp == kConsumerWarps) {
            for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
                load(params, cache, shared, rows, segment, keys, queries_phase);
            });
            if (blockIdx.x == 0) list_split_rows<kUneven>(params, shared.parts);
        } else {
            for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
                convert_values(params, shared, segment, warp - kConsumerWarps - 1, keys, values);
            });
            if constexpr (kUneven) {
                if (warp == kConsumerWarps + 1) store_unclaimed<__nv_bfloat16>(params);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

template <bool kUneven>
void launch(const FwdParams& params, cudaStream_t stream) {
    constexpr auto kKernel = fwd_kvcache_mla_fp8_queries_kernel<kUneven>;
    constexpr int kSharedBytes = sizeof(SharedStorage);
    static_assert(kSharedBytes <= 227 * 1024);
    CUtensorMap cache = {};  // no page, no key: every length is then 0, and nothing reads through the map
    if (params.max_len > 0) cache = paged_bytes_map(params, kSlices);
    allow_shared_bytes<kKernel>(kSharedBytes, "fwd_kvcache_mla: shared memory");
    const dim3 grid(params.row_tiles, params.grid_parts);
    cuda_check(launch_dependent(kKernel, grid, kThreads, kSharedBytes, stream, params, cache), "fwd_kvcache_mla");
}

}  // namespace

void fwd_kvcache_mla_fp8_queries(const FwdParams& params, cudaStream_t stream) {
    params.cu_seqlens_q != nullptr ? launch<true>(params, stream) : launch<false>(params, stream);
}

}  // namespace flashmla::sm90
