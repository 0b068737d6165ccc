// Merges the partial results of rows that the plan split. With lse_i and out_i (normalised) those of a row's n shares:
//
//   lse = log2(sum_i 2^lse_i),   out = sum_i 2^(lse_i - lse) out_i
//
// A split row is begun by one part, as its last row, and continued by the parts that follow it, as their first row.
// Shares are added in that order, so results repeat bitwise.
//
// Grid: as many CTAs as fit at once. Each first lists the split rows, one thread a part; then its warps share the
// list's items with all others', an item being 128 columns of one query row: a lane holds 4 and has 8 shares' loads in
// flight.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = kMaxParts;
constexpr int kWarps = kThreads / 32;
constexpr int kCtasPerSm = 8;
constexpr int kColumnsPerItem = 128;
constexpr int kChunks = kDimV / kColumnsPerItem;
constexpr float kNothing = -INFINITY;

struct SplitRow {
    int row;     // of the batch
    int part;    // that begins it
    int shares;  // parts part .. part + shares - 1 have one each
};

struct SharedStorage {
    SplitRow rows[kMaxParts];
    uint32_t passing[kWarps];  // bit p: part p takes a row over and passes it on
    int begun[kWarps];         // split rows that each warp's parts begin
};

// ---------------------------------------------------------------------------------------------------- device helpers

// How many parts from `part` on pass one row on, each to the next.
__device__ int run_of_passing(const SharedStorage& shared, int part) {
    int end = part;
    while (end < kMaxParts) {
        const uint32_t rest = ~shared.passing[end / 32] >> end % 32;
        if (rest != 0) return end + __ffs(rest) - 1 - part;
        end = (end / 32 + 1) * 32;
    }
    return end - part;
}

// Fills shared.rows, in the order of the parts, and returns their number.
__device__ int list_split_rows(const FwdParams& params, SharedStorage& shared) {
    const int part = threadIdx.x, warp = part / 32, lane = part % 32;
    const Part p = part < params.split_parts ? load_part(params, part) : Part{0, 0, -1, 0};
    const bool cut = !p.empty() && p.last_tile < num_tiles(clamped_length(params, p.last_row));
    const bool passes = cut && p.continues(p.last_row), begins = cut && !passes;
    const uint32_t passing = __ballot_sync(~0u, passes), begun = __ballot_sync(~0u, begins);
    if (lane == 0) {
        shared.passing[warp] = passing;
        shared.begun[warp] = __popc(begun);
    }
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += shared.begun[w];
        total += shared.begun[w];
    }
    if (begins) {
        const int i = before + __popc(begun & ((1u << lane) - 1));
        // the part that begins it, those that pass it on, the one that ends it
        const int shares = 2 + run_of_passing(shared, part + 1);
        shared.rows[i] = {p.last_row, part, min(shares, params.split_parts - part)};
    }
    __syncthreads();
    return total;
}

__device__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

__device__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

__device__ void store4(__nv_bfloat16* to, float4 v) {
    reinterpret_cast<__nv_bfloat162*>(to)[0] = __floats2bfloat162_rn(v.x, v.y);
    reinterpret_cast<__nv_bfloat162*>(to)[1] = __floats2bfloat162_rn(v.z, v.w);
}

__device__ void store4(__half* to, float4 v) {
    reinterpret_cast<__half2*>(to)[0] = __floats2half2_rn(v.x, v.y);
    reinterpret_cast<__half2*>(to)[1] = __floats2half2_rn(v.z, v.w);
}

// One warp: columns [128 chunk, 128 chunk + 128) of row `row` of a row tile.
template <typename T>
__device__ void merge(const FwdParams& params, const SplitRow& split, int row_tile, int row, int chunk) {
    const int lane = threadIdx.x % 32;
    const int tiles_per_head = params.row_tiles / params.h_k;
    const int row_in_head = row_tile % tiles_per_head * kRowTile + row;
    if (row_in_head >= params.rows) return;
    const auto place = [&](int share) {
        const int64_t at = share == 0 ? last_place(split.part) : first_place(split.part + share);
        return (at * params.row_tiles + row_tile) * kRowTile + row;
    };

    float high = kNothing;
    for (int i = lane; i < split.shares; i += 32) high = fmaxf(high, params.partial_lse[place(i)]);
    high = warp_max(high);
    const float base = high == kNothing ? 0.f : high;
    float sum = 0.f;
    for (int i = lane; i < split.shares; i += 32) sum += ptx::exp2_approx(params.partial_lse[place(i)] - base);
    sum = warp_sum(sum);
    const float scale = sum == 0.f ? 0.f : 1.f / sum;

    const int column = chunk * kColumnsPerItem + lane * 4;
    float4 out = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
    for (int i = 0; i < split.shares; ++i) {
        const float weight = ptx::exp2_approx(params.partial_lse[place(i)] - base) * scale;
        const float4 part = *reinterpret_cast<const float4*>(params.partial_out + place(i) * kDimV + column);
        out.x += weight * part.x;
        out.y += weight * part.y;
        out.z += weight * part.z;
        out.w += weight * part.w;
    }

    const int head = row_tile / tiles_per_head;
    const int s = row_in_head / params.group, h = head * params.group + row_in_head % params.group;
    store4(static_cast<T*>(params.out) + ((int64_t{split.row} * params.s_q + s) * params.h_q + h) * kDimV + column,
           out);
    if (chunk == 0 && lane == 0) {
        params.lse[(int64_t{split.row} * params.h_q + h) * params.s_q + s] =
            sum == 0.f ? INFINITY : (high + log2f(sum)) * kLn2;
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T>
__global__ void __launch_bounds__(kThreads) fwd_kvcache_mla_combine_kernel(const FwdParams params) {
    __shared__ SharedStorage shared;
    if (__syncthreads_or(uses_parts_without_workspace(params))) return;  // it was executed unsplit
    const int64_t items = int64_t{list_split_rows(params, shared)} * params.row_tiles * kRowTile * kChunks;
    const int warp = blockIdx.x * kWarps + threadIdx.x / 32;
    for (int64_t item = warp; item < items; item += gridDim.x * kWarps) {
        const int chunk = item % kChunks, row = item / kChunks % kRowTile;
        const int tile = static_cast<int>(item / (kChunks * kRowTile));
        merge<T>(params, shared.rows[tile / params.row_tiles], tile % params.row_tiles, row, chunk);
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

void fwd_kvcache_mla_combine(const FwdParams& params, cudaStream_t stream) {
    const auto kernel = params.dtype == DType::kBF16 ? fwd_kvcache_mla_combine_kernel<__nv_bfloat16>
                                                     : fwd_kvcache_mla_combine_kernel<__half>;
    kernel<<<kCtasPerSm * multiprocessors(), kThreads, 0, stream>>>(params);
    cuda_check(cudaGetLastError(), "fwd_kvcache_mla_combine");
}

}  // namespace flashmla::sm90
