// Merges the shares of rows that the plan split, but for those that the decode kernel merged itself. With lse_i and
// out_i (normalised) those of a row's n shares:
//
//   lse = log2(sum_i 2^lse_i),   out = sum_i 2^(lse_i - lse) out_i
//
// A split row is begun by one part, as its last row, and continued by the parts that follow it, as their first row.
//
// Grid: as many CTAs as fit at once. Each first lists the split rows, one thread a part; then all share the list's
// items. What a warp of the decode kernel stores at once (row_tile.cuh) is a vector of four floats a lane: 16 query
// rows x 8 columns, of which a lane has two rows x two columns. Where rows have few shares a warp merges an item of
// four such vectors; where they have more the CTA does, each warp every eighth share, and the first warp merges the
// eight; where they have many an item is one vector. So a lane has up to 8 loads in flight, of few shares or of many.
// The order is fixed, so results repeat bitwise.
//
// It is launched before the decode kernel ends, and waits for that.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"
#include "row_tile.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = kMaxParts;
constexpr int kWarps = kThreads / 32;
constexpr int kLoads = 8;      // of a lane, in flight
constexpr int kCtasPerSm = 2;  // with 3 it spills
constexpr float kNothing = -INFINITY;

struct SplitRow {
    int row;     // of the batch
    int part;    // that begins it
    int shares;  // parts part .. part + shares - 1 have one each
};

// What a lane has of some shares of its two rows: relative to the greatest lse among them.
template <int kVectors>
struct Merged {
    float high[2] = {kNothing, kNothing}, sum[2] = {0.f, 0.f};
    float4 out[kVectors] = {};  // each two columns of the first row, two of the second

    __device__ void add(int v, const float (&weight)[2], const float4& x) {
        out[v].x += weight[0] * x.x;
        out[v].y += weight[0] * x.y;
        out[v].z += weight[1] * x.z;
        out[v].w += weight[1] * x.w;
    }
};

template <int kVectors>
struct SharedStorage {
    Part parts[kMaxParts];
    SplitRow rows[kMaxParts];
    uint32_t passing[kWarps];  // bit p: part p takes a row over and passes it on
    int begun[kWarps];         // split rows that each warp's parts begin
    Merged<kVectors> merged[kWarps][32];
};

// ---------------------------------------------------------------------------------------------------- device helpers

// How many parts from `part` on pass one row on, each to the next.
template <int kVectors>
__device__ int run_of_passing(const SharedStorage<kVectors>& shared, int part) {
    int end = part;
    while (end < kMaxParts) {
        const uint32_t rest = ~shared.passing[end / 32] >> end % 32;
        if (rest != 0) return end + __ffs(rest) - 1 - part;
        end = (end / 32 + 1) * 32;
    }
    return end - part;
}

// Fills shared.rows, in the order of the parts, and returns their number.
template <int kVectors>
__device__ int list_split_rows(const FwdParams& params, SharedStorage<kVectors>& shared) {
    const int part = threadIdx.x, warp = part / 32, lane = part % 32;
    const Part p = part < params.split_parts ? shared.parts[part] : Part{0, 0, -1, 0};
    const int tiles = p.empty() ? 0 : num_tiles(clamped_length(params, p.last_row));
    const bool cut = !p.empty() && p.last_tile < tiles;
    const bool merged = params.arrivals != nullptr && part + 1 < params.plan_parts &&
                        is_pair(p, shared.parts[part + 1], p.last_row, tiles);
    const bool passes = cut && p.continues(p.last_row), begins = cut && !passes && !merged;
    const uint32_t passing = __ballot_sync(~0u, passes), begun = __ballot_sync(~0u, begins);
    if (lane == 0) {
        shared.passing[warp] = passing;
        shared.begun[warp] = __popc(begun);
    }
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
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

// Merges a row's shares `first`, first + step, ...; `vectors` and `lse`: what the lane reads of the share at place 0.
template <int kVectors>
__device__ __forceinline__ Merged<kVectors> merge_shares(const FwdParams& params, const SplitRow& split,
                                                         const float4* vectors, const float* lse, int first, int step) {
    constexpr int kAtOnce = kLoads / kVectors;
    // in row tiles, of which the workspace has at most 1024
    const auto tile = [&](int share) {
        return (share == 0 ? last_place(split.part) : first_place(split.part + share)) * params.row_tiles;
    };
    const auto vector = [&](int share, int v) {
        return share < split.shares ? __ldcg(vectors + tile(share) * kShareVectors + v * 128) : float4{};
    };
    const auto lse_of = [&](int share, int i) {
        return share < split.shares ? lse[tile(share) * kRowTile + 8 * i] : kNothing;
    };
    float4 loaded[kAtOnce][kVectors];  // under way while the weights are worked out
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) loaded[i][v] = vector(first + i * step, v);
    }
    Merged<kVectors> merged;
    constexpr int kLsesAtOnce = 4;
    for (int share = first; share < split.shares; share += kLsesAtOnce * step) {
        float lses[kLsesAtOnce][2];
#pragma unroll
        for (int i = 0; i < kLsesAtOnce; ++i) {
#pragma unroll
            for (int r = 0; r < 2; ++r) lses[i][r] = lse_of(share + i * step, r);
        }
#pragma unroll
        for (int i = 0; i < kLsesAtOnce; ++i) {
#pragma unroll
            for (int r = 0; r < 2; ++r) merged.high[r] = fmaxf(merged.high[r], lses[i][r]);
        }
    }
    const float base[2] = {base_of(merged.high[0]), base_of(merged.high[1])};
    for (int share = first; share < split.shares; share += kAtOnce * step) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            float weight[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                weight[r] = ptx::exp2_approx(lse_of(share + i * step, r) - base[r]);
                merged.sum[r] += weight[r];
            }
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                merged.add(v, weight, loaded[i][v]);
                loaded[i][v] = vector(share + (i + kAtOnce) * step, v);
            }
        }
    }
    return merged;
}

// Merges what each warp has of a row, in the first warp.
template <int kVectors>
__device__ __forceinline__ Merged<kVectors> merge_warps(SharedStorage<kVectors>& shared, const Merged<kVectors>& mine) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // the item before has been read
    shared.merged[warp][lane] = mine;
    __syncthreads();
    Merged<kVectors> merged;
    if (warp > 0) return merged;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int r = 0; r < 2; ++r) merged.high[r] = fmaxf(merged.high[r], shared.merged[w][lane].high[r]);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const Merged<kVectors>& other = shared.merged[w][lane];
        float weight[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            weight[r] = ptx::exp2_approx(other.high[r] - base_of(merged.high[r]));
            merged.sum[r] += weight[r] * other.sum[r];
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) merged.add(v, weight, other.out[v]);
    }
    return merged;
}

// A lane's two rows to out, and to lse if `with_lse`. `row`: of the key head, the second is 8 further. `column`: the
// first vector's, the next vector's are 8 further.
template <typename T, int kVectors>
__device__ __forceinline__ void store_merged(const FwdParams& params, int batch_row, int head, int row, int column,
                                             bool with_lse, const Merged<kVectors>& merged) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int at = row + 8 * r;
        if (at >= params.rows) return;
        const QueryRow in_head(params, at);
        const int h = head * params.group + in_head.g;
        const float sum = merged.sum[r], scale = sum == 0.f ? 0.f : 1.f / sum;
        const int64_t out_row = (int64_t{batch_row} * params.s_q + in_head.s) * params.h_q + h;
        T* to = static_cast<T*>(params.out) + out_row * kDimV + column;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const float4& x = merged.out[v];
            const float2 out = r == 0 ? make_float2(x.x, x.y) : make_float2(x.z, x.w);
            *reinterpret_cast<uint32_t*>(to + 8 * v) = pack<T>(out.x * scale, out.y * scale);
        }
        if (with_lse) {
            params.lse[(int64_t{batch_row} * params.h_q + h) * params.s_q + in_head.s] =
                sum == 0.f ? INFINITY : (merged.high[r] + log2f(sum)) * kLn2;
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

// kTogether warps merge an item of kVectors vectors.
template <typename T, int kTogether, int kVectors>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) fwd_kvcache_mla_combine_kernel(const FwdParams params) {
    static_assert(kTogether == 1 || kTogether == kWarps);
    __shared__ SharedStorage<kVectors> shared;
    cudaTriggerProgrammaticLaunchCompletion();  // what is launched early waits for the end of this grid
    cudaGridDependencySynchronize();
    if (read_plan(params, shared.parts)) return;  // executed unsplit
    const int split_rows = list_split_rows(params, shared);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int member = warp % kTogether;
    // An item: [split row, row tile, warp, warpgroup, 32 / kVectors]. Powers of two, so that one division is left, and
    // that for many row tiles only; warps without query rows have stored nothing.
    constexpr int kPerWarp = 32 / kVectors, kPerTile = 4 * 2 * kPerWarp;
    const int items = split_rows * params.row_tiles * kPerTile;  // at most 512 row tiles' (the workspace's size) 256
    constexpr int kItemsAtOnce = kWarps / kTogether;
    for (int item = blockIdx.x * kItemsAtOnce + warp / kTogether; item < items; item += gridDim.x * kItemsAtOnce) {
        const int j = item % kPerWarp * kVectors, warpgroup = item / kPerWarp % 2;
        const int decode_warp = item / (2 * kPerWarp) % 4, tile = item / kPerTile;
        const int split_row = params.row_tiles == 1 ? tile : tile / params.row_tiles;
        const int row_tile = tile - split_row * params.row_tiles;
        const SplitRow split = shared.rows[split_row];
        const HeadTile in_head(params, row_tile);
        const int row = decode_warp * 16 + lane / 4, first_row = in_head.tile * kRowTile;
        if (first_row + decode_warp * 16 >= params.rows) continue;
        const float4* vectors = reinterpret_cast<const float4*>(params.partial_out) + row_tile * kShareVectors +
                                warpgroup * (kShareVectors / 2) + j * 128 + decode_warp * 32 + lane;
        const float* lse = params.partial_lse + row_tile * kRowTile + row;
        Merged<kVectors> merged = merge_shares<kVectors>(params, split, vectors, lse, member, kTogether);
        if constexpr (kTogether > 1) merged = merge_warps(shared, merged);
        if (member == 0) {
            store_merged<T>(params, split.row, in_head.head, first_row + row, warpgroup * kHalfV + 8 * j + lane % 4 * 2,
                            warpgroup + j + lane % 4 == 0, merged);
        }
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, int kTogether, int kVectors>
static void launch(const FwdParams& params, cudaStream_t stream) {
    const dim3 grid(kCtasPerSm * multiprocessors());
    const auto kernel = fwd_kvcache_mla_combine_kernel<T, kTogether, kVectors>;
    cuda_check(launch_dependent(kernel, grid, kThreads, 0, stream, params), "fwd_kvcache_mla_combine");
}

template <typename T>
static void launch(const FwdParams& params, cudaStream_t stream) {
    // a plan of this machine gives rows grid_parts / b shares, more or less
    const int shares = params.grid_parts / std::max(params.b, 1);
    if (shares > 32) return launch<T, kWarps, 1>(params, stream);
    if (shares > 8) return launch<T, kWarps, 4>(params, stream);
    launch<T, 1, 4>(params, stream);
}

void fwd_kvcache_mla_combine(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
