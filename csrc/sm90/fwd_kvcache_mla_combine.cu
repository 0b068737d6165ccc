// Merges the shares of rows that the plan split, but for those that the decode kernel merged itself. With lse_i and
// out_i (normalised) those of a row's n shares:
//
//   lse = log2(sum_i 2^lse_i),   out = sum_i 2^(lse_i - lse) out_i
//
// A split row is begun by one part, as its last row, and continued by the parts that follow it, as their first row. The
// decode kernel says which part begins one and how many shares it has (split_rows).
//
// Grid: as many CTAs as fit at once, which share the rows' items. What a warp of the decode kernel stores at once
// (row_tile.cuh) is a vector of four floats a lane: 16 query rows x 8 columns, of which a lane has two rows x two
// columns. An item is one such vector, or four where there are more than warps; a warp merges it, or where rows have
// many shares a CTA: each warp every eighth share, and the first warp the eight. So a lane has up to 8 loads in flight.
// The order is fixed, so results repeat bitwise.
//
// It is launched before the decode kernel ends, waits for that, and rehearses meanwhile: it merges no shares into
// `scratch`, so that its instructions are at hand. Fetching them would take longer than executing them.

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
constexpr int kGroup = 16;     // query rows of a warp of the decode kernel
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

    __device__ void scale(int v, const float (&factor)[2]) {
        out[v].x *= factor[0];
        out[v].y *= factor[0];
        out[v].z *= factor[1];
        out[v].w *= factor[1];
    }
    __device__ void add(int v, const float (&weight)[2], const float4& x) {
        out[v].x += weight[0] * x.x;
        out[v].y += weight[0] * x.y;
        out[v].z += weight[1] * x.z;
        out[v].w += weight[1] * x.w;
    }
};

template <int kVectors>
struct SharedStorage {
    SplitRow rows[kMaxParts];
    int begun[kWarps];  // split rows that each warp's parts begin
    Merged<kVectors> merged[kWarps][32];
};

// ---------------------------------------------------------------------------------------------------- device helpers

// Fills shared.rows, in the order of the parts, and returns their number: of none, in the rehearsal, the first is empty.
template <int kVectors>
__device__ int list_split_rows(const FwdParams& params, SharedStorage<kVectors>& shared, bool rehearsal) {
    const int part = threadIdx.x, warp = part / 32, lane = part % 32;
    int2 listed = {0, 0};
    if (part < params.split_parts && !rehearsal) listed = __ldcg(params.split_rows + part);
    const uint32_t begun = __ballot_sync(~0u, listed.y > 0);
    if (lane == 0) shared.begun[warp] = __popc(begun);
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += shared.begun[w];
        total += shared.begun[w];
    }
    const int i = before + __popc(begun & ((1u << lane) - 1));
    if (listed.y > 0 || (rehearsal && part == 0)) shared.rows[i] = {listed.x, part, listed.y};
    __syncthreads();
    return total;
}

// Merges a row's shares `first`, first + step, ...; `vectors` and `lse`: what the lane reads of the share at place 0.
// Few instructions count here: a warp has its scheduler nearly to itself, and waits for each.
template <int kVectors>
__device__ __forceinline__ Merged<kVectors> merge_shares(const FwdParams& params, const SplitRow& split,
                                                         const float4* vectors, const float* lse, int first, int step) {
    constexpr int kAtOnce = kLoads / kVectors;
    // the shares' places: one past the one of the part's first row, then every second
    const int place = first_place(split.part) + max(2 * first, 1);
    vectors += place * params.row_tiles * kShareVectors;
    lse += place * params.row_tiles * kRowTile;
    int stride = (first == 0 ? 2 * step - 1 : 2 * step) * params.row_tiles;
    int left = split.shares > first ? (split.shares - first - 1) / step + 1 : 0;

    Merged<kVectors> merged;
#pragma unroll 1
    do {
        float4 loaded[kAtOnce][kVectors];
        float lses[kAtOnce][2];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const bool there = i < left;
#pragma unroll
            for (int r = 0; r < 2; ++r) lses[i][r] = there ? __ldcg(lse + 8 * r) : kNothing;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) loaded[i][v] = there ? __ldcg(vectors + v * 128) : float4{};
            lse += stride * kRowTile;
            vectors += stride * kShareVectors;
            stride = 2 * step * params.row_tiles;
        }
        left -= kAtOnce;
        float base[2], factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float high = merged.high[r];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) high = fmaxf(high, lses[i][r]);
            base[r] = base_of(high);
            factor[r] = ptx::exp2_approx(merged.high[r] - base[r]);
            merged.high[r] = high;
            merged.sum[r] *= factor[r];
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) merged.scale(v, factor);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            float weight[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                weight[r] = ptx::exp2_approx(lses[i][r] - base[r]);
                merged.sum[r] += weight[r];
            }
#pragma unroll
            for (int v = 0; v < kVectors; ++v) merged.add(v, weight, loaded[i][v]);
        }
    } while (left > 0);
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

// Where a lane's results go: its first row's `out` of its first column, and lse. The second row is 8 further.
template <typename T>
struct Results {
    T* out[2];
    float* lse[2];
    bool stored[2];

    __device__ Results(const FwdParams& params, int batch_row, int head, int row, int column, bool rehearsal) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = row + 8 * r;
            const QueryRow in_head(params, at);
            const int h = head * params.group + in_head.g;
            const int64_t out_row = (int64_t{batch_row} * params.s_q + in_head.s) * params.h_q + h;
            out[r] = static_cast<T*>(rehearsal ? params.scratch : params.out) + (rehearsal ? 0 : out_row * kDimV + column);
            const int64_t lse_row = (int64_t{batch_row} * params.h_q + h) * params.s_q + in_head.s;
            lse[r] = rehearsal ? static_cast<float*>(params.scratch) : params.lse + lse_row;
            stored[r] = at < params.rows;
        }
    }
};

// A lane's two rows to memory; the next vector's columns are 8 further.
template <typename T, int kVectors>
__device__ __forceinline__ void store_merged(const Results<T>& to, bool with_lse, const Merged<kVectors>& merged) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (!to.stored[r]) return;
        const float sum = merged.sum[r], scale = sum == 0.f ? 0.f : __fdividef(1.f, sum);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const float4& x = merged.out[v];
            const float2 out = r == 0 ? make_float2(x.x, x.y) : make_float2(x.z, x.w);
            *reinterpret_cast<uint32_t*>(to.out[r] + 8 * v) = pack<T>(out.x * scale, out.y * scale);
        }
        if (with_lse) *to.lse[r] = sum == 0.f ? INFINITY : (merged.high[r] + log2f(sum)) * kLn2;
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

// kTogether warps merge an item of kVectors vectors.
template <typename T, int kTogether, int kVectors>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) fwd_kvcache_mla_combine_kernel(const FwdParams params) {
    static_assert(kTogether == 1 || kTogether == kWarps);
    __shared__ SharedStorage<kVectors> shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int member = warp % kTogether;
    // An item: [split row, key head, group of query rows, warpgroup, 32 / kVectors].
    constexpr int kPerWarp = 32 / kVectors, kItemsAtOnce = kWarps / kTogether;
    const int groups_per_head = (params.rows + kGroup - 1) / kGroup, groups = params.h_k * groups_per_head;
    cudaTriggerProgrammaticLaunchCompletion();  // what is launched early waits for the end of this grid

#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
        const bool rehearsal = round == 0;
        if (!rehearsal) cudaGridDependencySynchronize();
        const int split_rows = list_split_rows(params, shared, rehearsal);
        const int items = rehearsal ? 1 : split_rows * groups * 2 * kPerWarp;  // few: a workspace holds 512 row tiles
        int item = rehearsal ? 0 : blockIdx.x * kItemsAtOnce + warp / kTogether;
#pragma unroll 1
        for (; item < items; item += gridDim.x * kItemsAtOnce) {
            const int j = item % kPerWarp * kVectors, warpgroup = item / kPerWarp % 2, group = item / (2 * kPerWarp);
            const int split_row = groups == 1 ? group : group / groups, in_row = group - split_row * groups;
            const int head = params.h_k == 1 ? 0 : in_row / groups_per_head;
            const int in_head = in_row - head * groups_per_head, decode_warp = in_head % 4;
            const int row_tile = head * (params.row_tiles / params.h_k) + in_head / 4;
            const SplitRow split = shared.rows[split_row];
            const float4* vectors = reinterpret_cast<const float4*>(params.partial_out) + row_tile * kShareVectors +
                                    warpgroup * (kShareVectors / 2) + j * 128 + decode_warp * 32 + lane;
            const float* lse = params.partial_lse + row_tile * kRowTile + decode_warp * kGroup + lane / 4;
            const Results<T> results(params, split.row, head, in_head * kGroup + lane / 4,
                                     warpgroup * kHalfV + 8 * j + lane % 4 * 2, rehearsal);
            Merged<kVectors> merged = merge_shares<kVectors>(params, split, vectors, lse, member, kTogether);
            if constexpr (kTogether > 1) merged = merge_warps(shared, merged);
            if (member == 0) store_merged(results, warpgroup + j + lane % 4 == 0, merged);
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
    // A plan of this machine gives rows grid_parts / b shares, more or less.
    const int shares = params.grid_parts / std::max(params.b, 1);
    if (shares > 8) return launch<T, kWarps, 1>(params, stream);
    const int64_t rows = std::min(params.b, params.grid_parts);
    const int64_t vectors = rows * params.row_tiles * (std::min(params.rows, kRowTile) + kGroup - 1) / kGroup * 64;
    if (vectors > kWarps * kCtasPerSm * multiprocessors()) return launch<T, 1, 4>(params, stream);
    launch<T, 1, 1>(params, stream);
}

void fwd_kvcache_mla_combine(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
