// Merges the partial results of rows that the plan split. With lse_i and out_i (normalised) those of a row's n shares:
//
//   lse = log2(sum_i 2^lse_i),   out = sum_i 2^(lse_i - lse) out_i
//
// A split row is begun by one part, as its last row, and continued by the parts that follow it, as their first row.
// Shares are added in that order, so results repeat bitwise.
//
// Grid: as many CTAs as fit at once. Each first lists the split rows, one thread a part; then its warps share the
// list's items with all others'. Where rows have few shares an item is a query row, and a lane holds 16 of its columns;
// where they have many it is 32 columns of one, and a quarter of the warp's lanes takes every fourth share. Either way
// a lane has 8 loads in flight.
//
// It is launched before the decode kernel ends, and waits for that.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = kMaxParts;
constexpr int kWarps = kThreads / 32;
constexpr int kCtasPerSm = 4;
constexpr int kLoads = 8;  // of a lane, in flight
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

// One warp: chunk `chunk` of row `row` of a row tile. Group g of its kGroups groups of lanes takes shares g,
// g + kGroups, ...; a lane takes kVectors x 4 columns, neighbouring lanes neighbouring ones.
template <typename T, int kGroups, int kVectors>
__device__ void merge(const FwdParams& params, const SplitRow& split, int row_tile, int row, int chunk) {
    constexpr int kLanes = 32 / kGroups, kInFlight = kLoads / kVectors;
    const int lane = threadIdx.x % 32, group = lane / kLanes;
    const int tiles_per_head = params.row_tiles / params.h_k;
    const int row_in_head = row_tile % tiles_per_head * kRowTile + row;
    if (row_in_head >= params.rows) return;
    const auto place = [&](int share) {
        const int at = share == 0 ? last_place(split.part) : first_place(split.part + share);
        return (at * params.row_tiles + row_tile) * kRowTile + row;
    };
    const auto column = [&](int v) { return ((chunk * kVectors + v) * kLanes + lane % kLanes) * 4; };
    float4 loaded[kInFlight][kVectors];
    const auto load = [&](int i, int share) {
        const float* from = params.partial_out + int64_t{place(share)} * kDimV;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            loaded[i][v] = share < split.shares ? *reinterpret_cast<const float4*>(from + column(v)) : float4{};
        }
    };
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) load(i, group + i * kGroups);  // under way while the weights are worked out

    float high = kNothing;
    for (int i = lane; i < split.shares; i += 32) high = fmaxf(high, params.partial_lse[place(i)]);
    high = warp_max(high);
    const float base = high == kNothing ? 0.f : high;
    float sum = 0.f;
    for (int i = lane; i < split.shares; i += 32) sum += ptx::exp2_approx(params.partial_lse[place(i)] - base);
    sum = warp_sum(sum);
    const float scale = sum == 0.f ? 0.f : 1.f / sum;

    float4 out[kVectors] = {};
    for (int first = group; first < split.shares; first += kInFlight * kGroups) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int share = first + i * kGroups;
            const float weight =
                share < split.shares ? ptx::exp2_approx(params.partial_lse[place(share)] - base) * scale : 0.f;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                out[v].x += weight * loaded[i][v].x;
                out[v].y += weight * loaded[i][v].y;
                out[v].z += weight * loaded[i][v].z;
                out[v].w += weight * loaded[i][v].w;
            }
            load(i, share + kInFlight * kGroups);
        }
    }
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
        for (int v = 0; v < kVectors; ++v) {
            out[v].x += __shfl_xor_sync(~0u, out[v].x, offset);
            out[v].y += __shfl_xor_sync(~0u, out[v].y, offset);
            out[v].z += __shfl_xor_sync(~0u, out[v].z, offset);
            out[v].w += __shfl_xor_sync(~0u, out[v].w, offset);
        }
    }

    const int head = row_tile / tiles_per_head;
    const int s = row_in_head / params.group, h = head * params.group + row_in_head % params.group;
    T* to = static_cast<T*>(params.out) + ((int64_t{split.row} * params.s_q + s) * params.h_q + h) * kDimV;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (group == 0) store4(to + column(v), out[v]);
    }
    if (chunk == 0 && lane == 0) {
        params.lse[(int64_t{split.row} * params.h_q + h) * params.s_q + s] =
            sum == 0.f ? INFINITY : (high + log2f(sum)) * kLn2;
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, int kGroups, int kVectors>
__global__ void __launch_bounds__(kThreads) fwd_kvcache_mla_combine_kernel(const FwdParams params) {
    __shared__ SharedStorage shared;
    cudaGridDependencySynchronize();
    bool unsplit = false;
    for (int part = params.split_parts + threadIdx.x; part < params.plan_parts; part += kThreads) {
        unsplit |= !load_part(params, part).empty();
    }
    const int split_rows = list_split_rows(params, shared);
    if (__syncthreads_or(unsplit)) return;
    constexpr int kChunks = kDimV * kGroups / (128 * kVectors);
    const int rows_per_tile = min(kRowTile, params.rows);  // of a key head with one row tile
    const int per_row = params.row_tiles * rows_per_tile * kChunks;
    const int items = split_rows * per_row;  // at most 512 row tiles' (the workspace's size) 64 x 16
    for (int item = blockIdx.x * kWarps + threadIdx.x / 32; item < items; item += gridDim.x * kWarps) {
        const int split = item / per_row, in_row = item % per_row;
        const int tile = in_row / (kChunks * rows_per_tile), in_tile = in_row % (kChunks * rows_per_tile);
        merge<T, kGroups, kVectors>(params, shared.rows[split], tile, in_tile / kChunks, in_tile % kChunks);
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T>
static void launch(const FwdParams& params, cudaStream_t stream) {
    // a plan of this machine gives rows grid_parts / b shares, more or less
    const bool many_shares = params.grid_parts > 8 * params.b;
    const auto kernel = many_shares ? fwd_kvcache_mla_combine_kernel<T, 4, 1> : fwd_kvcache_mla_combine_kernel<T, 1, 4>;
    const dim3 grid(kCtasPerSm * multiprocessors());
    cuda_check(launch_dependent(kernel, grid, kThreads, 0, stream, params), "fwd_kvcache_mla_combine");
}

void fwd_kvcache_mla_combine(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
