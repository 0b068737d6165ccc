// Merges the shares of rows that the plan split, but for those that the decode kernel merged itself. With lse_i and
// out_i (normalised) those of a row's n shares:
//
//   lse = log2(sum_i 2^lse_i),   out = sum_i 2^(lse_i - lse) out_i
//
// A split row is begun by one part, as its last row, and continued by the parts that follow it, as their first row. The
// decode kernel says which part begins one and how many shares it has (split_rows).
//
// Grid: as many CTAs as fit at once, which share the rows' items. A lane's vector is four floats of a share, in either
// of two layouts: of few rows four columns of a query row; of more what the decode kernel's thread stored at once
// (row_tile.cuh), two rows x two columns. An item is a warp's vectors, or four times as many where there are more than
// warps; a warp merges it, or where rows have many shares a CTA: each warp every eighth share, and the first warp the
// eight. So a lane has up to 8 loads in flight. The order is fixed, so results repeat bitwise.
//
// It is launched before the decode kernel ends, waits for that, and rehearses meanwhile: it merges no shares into
// `scratch`, so that its instructions are at hand (1 us, csrc/NOTES.md).

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

// Shares row by row: a warp has 128 columns of a query row at once.
struct ByRows {
    static constexpr int kRows = 1;                            // that a lane has
    static constexpr int kGroup = 1;                           // query rows that a warp has
    static constexpr int kPerGroup = 4;                        // vectors of a lane that are a group's result
    static constexpr int kVectorStep = 32, kColumnStep = 128;  // from one to the next

    // The vector `v` of a group of a row tile, and the first of its query rows and columns that are the lane's.
    __device__ static int vector(int group, int v, int lane) { return group * (kDimV / 4) + v * kVectorStep + lane; }
    __device__ static int row(int group, int) { return group; }
    __device__ static int column(int v, int lane) { return v * kColumnStep + lane * 4; }
};

// Shares as accumulators: [warpgroup, 32, warp, lane], a warp's 16 query rows x 8 columns at once.
struct ByAccumulators {
    static constexpr int kRows = 2, kGroup = 16, kPerGroup = 64;
    static constexpr int kVectorStep = 128, kColumnStep = 8;

    __device__ static int vector(int group, int v, int lane) { return v * kVectorStep + group * 32 + lane; }
    __device__ static int row(int group, int lane) { return group * kGroup + lane / 4; }  // and 8 further
    __device__ static int column(int v, int lane) { return v * kColumnStep + lane % 4 * 2; }
};

// What a lane has of some shares of its rows: relative to the greatest lse among them.
template <typename Layout, int kVectors>
struct Merged {
    float high[Layout::kRows], sum[Layout::kRows];
    float4 out[kVectors];

    __device__ Merged() {
        for (int r = 0; r < Layout::kRows; ++r) high[r] = kNothing, sum[r] = 0.f;
        for (int v = 0; v < kVectors; ++v) out[v] = {};
    }
    __device__ void scale(int v, const float (&factor)[Layout::kRows]) {
        constexpr int kLast = Layout::kRows - 1;
        out[v].x *= factor[0];
        out[v].y *= factor[0];
        out[v].z *= factor[kLast];
        out[v].w *= factor[kLast];
    }
    __device__ void add(int v, const float (&weight)[Layout::kRows], const float4& x) {
        constexpr int kLast = Layout::kRows - 1;
        out[v].x += weight[0] * x.x;
        out[v].y += weight[0] * x.y;
        out[v].z += weight[kLast] * x.z;
        out[v].w += weight[kLast] * x.w;
    }
};

template <typename Layout, int kVectors>
struct SharedStorage {
    SplitRow rows[kMaxParts];
    int begun[kWarps];  // split rows that each warp's parts begin
    float high[kWarps][Layout::kRows][32], sum[kWarps][Layout::kRows][32];
    float4 out[kWarps][kVectors][32];  // of each warp's lanes
};

// ---------------------------------------------------------------------------------------------------- device helpers

// Fills shared.rows, in the order of the parts, and returns their number: of none, in the rehearsal, the first is
// empty.
template <typename SharedStorage>
__device__ int list_split_rows(const FwdParams& params, SharedStorage& shared, bool rehearsal) {
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
template <typename Layout, int kVectors>
__device__ __forceinline__ Merged<Layout, kVectors> merge_shares(const FwdParams& params, const SplitRow& split,
                                                                 const float4* vectors, const float* lse, int first,
                                                                 int step) {
    constexpr int kAtOnce = kLoads / kVectors, kRows = Layout::kRows;
    // the shares' places: one past the one of the part's first row, then every second
    const int place = first_place(split.part) + max(2 * first, 1);
    vectors += place * params.row_tiles * kShareVectors;
    lse += place * params.row_tiles * kRowTile;
    int stride = (first == 0 ? 2 * step - 1 : 2 * step) * params.row_tiles;
    int left = split.shares > first ? (split.shares - first - 1) / step + 1 : 0;

    Merged<Layout, kVectors> merged;
#pragma unroll 1
    do {
        float4 loaded[kAtOnce][kVectors];
        float lses[kAtOnce][kRows];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const bool there = i < left;
#pragma unroll
            for (int r = 0; r < kRows; ++r) lses[i][r] = there ? __ldcg(lse + 8 * r) : kNothing;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                loaded[i][v] = there ? __ldcg(vectors + v * Layout::kVectorStep) : float4{};
            }
            lse += stride * kRowTile;
            vectors += stride * kShareVectors;
            stride = 2 * step * params.row_tiles;
        }
        left -= kAtOnce;
        float base[kRows], factor[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
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
            float weight[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
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
template <typename Layout, int kVectors>
__device__ __forceinline__ Merged<Layout, kVectors> merge_warps(SharedStorage<Layout, kVectors>& shared,
                                                                const Merged<Layout, kVectors>& mine) {
    constexpr int kRows = Layout::kRows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // the item before has been read
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        shared.high[warp][r][lane] = mine.high[r];
        shared.sum[warp][r][lane] = mine.sum[r];
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) shared.out[warp][v][lane] = mine.out[v];
    __syncthreads();
    Merged<Layout, kVectors> merged;
    if (warp > 0) return merged;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) merged.high[r] = fmaxf(merged.high[r], shared.high[w][r][lane]);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        float weight[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            weight[r] = ptx::exp2_approx(shared.high[w][r][lane] - base_of(merged.high[r]));
            merged.sum[r] += weight[r] * shared.sum[w][r][lane];
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) merged.add(v, weight, shared.out[w][v][lane]);
    }
    return merged;
}

// A lane's rows to memory: row `row` of key head `head`, from column `column` on, and what follows in the layout.
template <typename T, typename Layout, int kVectors>
__device__ __forceinline__ void store_merged(const FwdParams& params, int batch_row, int head, int row, int column,
                                             bool with_lse, bool rehearsal, const Merged<Layout, kVectors>& merged) {
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
        const int at = row + 8 * r;
        if (at >= params.rows) return;
        const QueryRow in_head(params, at);
        const int h = head * params.group + in_head.g;
        const int64_t out_row = (int64_t{batch_row} * params.s_q + in_head.s) * params.h_q + h;
        const int64_t lse_row = (int64_t{batch_row} * params.h_q + h) * params.s_q + in_head.s;
        T* out = rehearsal ? static_cast<T*>(params.scratch) : static_cast<T*>(params.out) + out_row * kDimV + column;
        float* lse = rehearsal ? static_cast<float*>(params.scratch) : params.lse + lse_row;
        const float sum = merged.sum[r], scale = sum == 0.f ? 0.f : __fdividef(1.f, sum);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const float4& x = merged.out[v];
            T* to = out + (rehearsal ? 0 : v * Layout::kColumnStep);
            if constexpr (Layout::kRows == 1) {
                const uint2 packed = {pack<T>(x.x * scale, x.y * scale), pack<T>(x.z * scale, x.w * scale)};
                *reinterpret_cast<uint2*>(to) = packed;
            } else {
                const float2 two = r == 0 ? make_float2(x.x, x.y) : make_float2(x.z, x.w);
                *reinterpret_cast<uint32_t*>(to) = pack<T>(two.x * scale, two.y * scale);
            }
        }
        if (with_lse) *lse = sum == 0.f ? INFINITY : (merged.high[r] + log2f(sum)) * kLn2;
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

// kTogether warps merge an item of kVectors vectors.
template <typename T, typename Layout, int kTogether, int kVectors>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) fwd_kvcache_mla_combine_kernel(const FwdParams params) {
    static_assert(kTogether == 1 || kTogether == kWarps);
    __shared__ SharedStorage<Layout, kVectors> shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int member = warp % kTogether;
    // An item: [split row, key head, group of query rows, vectors / kVectors].
    constexpr int kPerGroup = Layout::kPerGroup / kVectors, kItemsAtOnce = kWarps / kTogether;
    const int groups_per_head = (params.rows + Layout::kGroup - 1) / Layout::kGroup;
    const int groups = params.h_k * groups_per_head, groups_per_tile = kRowTile / Layout::kGroup;
    cudaTriggerProgrammaticLaunchCompletion();  // what is launched early waits for the end of this grid

#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
        const bool rehearsal = round == 0;
        if (!rehearsal) cudaGridDependencySynchronize();
        const int split_rows = list_split_rows(params, shared, rehearsal);
        const int items = rehearsal ? 1 : split_rows * groups * kPerGroup;  // few: a workspace holds 512 row tiles
        int item = rehearsal ? 0 : blockIdx.x * kItemsAtOnce + warp / kTogether;
#pragma unroll 1
        for (; item < items; item += gridDim.x * kItemsAtOnce) {
            const int v = item % kPerGroup * kVectors, group = item / kPerGroup;
            const int split_row = groups == 1 ? group : group / groups, in_row = group - split_row * groups;
            const int head = params.h_k == 1 ? 0 : in_row / groups_per_head;
            const int in_head = in_row - head * groups_per_head, in_tile = in_head % groups_per_tile;
            const int row_tile = head * (params.row_tiles / params.h_k) + in_head / groups_per_tile;
            const SplitRow split = shared.rows[split_row];
            const float4* vectors = reinterpret_cast<const float4*>(params.partial_out) + row_tile * kShareVectors +
                                    Layout::vector(in_tile, v, lane);
            const float* lse = params.partial_lse + row_tile * kRowTile + Layout::row(in_tile, lane);
            auto merged = merge_shares<Layout, kVectors>(params, split, vectors, lse, member, kTogether);
            if constexpr (kTogether > 1) merged = merge_warps(shared, merged);
            if (member == 0) {
                const int column = Layout::column(v, lane);
                store_merged<T>(params, split.row, head, Layout::row(in_head, lane), column, column == 0, rehearsal,
                                merged);
            }
        }
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, typename Layout, int kTogether, int kVectors>
static void launch(const FwdParams& params, cudaStream_t stream) {
    const dim3 grid(kCtasPerSm * multiprocessors());
    const auto kernel = fwd_kvcache_mla_combine_kernel<T, Layout, kTogether, kVectors>;
    cuda_check(launch_dependent(kernel, grid, kThreads, 0, stream, params), "fwd_kvcache_mla_combine");
}

template <typename T, typename Layout>
static void launch(const FwdParams& params, cudaStream_t stream) {
    // A plan of this machine gives rows grid_parts / b shares, more or less.
    const int shares = params.grid_parts / std::max(params.b, 1);
    const int rows = std::min(params.b, params.grid_parts);
    const int vectors = rows * params.h_k * (params.rows + Layout::kGroup - 1) / Layout::kGroup * Layout::kPerGroup;
    const int warps = kWarps * kCtasPerSm * multiprocessors();
    if (shares > 8 && 8 * vectors <= 2 * warps) return launch<T, Layout, kWarps, 1>(params, stream);
    if (shares > 8) return launch<T, Layout, kWarps, 4>(params, stream);
    if (vectors > warps) return launch<T, Layout, 1, 4>(params, stream);
    launch<T, Layout, 1, 1>(params, stream);
}

template <typename T>
static void launch(const FwdParams& params, cudaStream_t stream) {
    params.few_rows ? launch<T, ByRows>(params, stream) : launch<T, ByAccumulators>(params, stream);
}

void fwd_kvcache_mla_combine(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
