// Under a batch-invariant plan: merges the nodes that parts left of the rows that they share, in the tree that the
// row's length fixes (units.cuh), to the bits that the decode kernel gives a row which one part has alone.
//
// The nodes of a row lie in places that follow each other, in the order of its units; the decode kernel has listed each
// one's row, and where in the row it ends.
//
// Grid: as many CTAs as fit at once, which share the rows' items. An item is kThreads vectors of a row's tile, one a
// thread, as decode kernels' threads stored them: four floats, two query rows x two columns. A thread goes through the
// row's nodes and keeps those that wait for their sibling in a stack of its own, in shared memory.

#include <algorithm>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"
#include "row_tile.cuh"
#include "units.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 8;  // nodes that a thread loads
constexpr int kCtasPerSm = 4;

// A layout tells which query rows of a row tile and which columns a vector has.

// fwd_kvcache_mla.cu's (row_tile.cuh): [warpgroup, 32, warp, lane], two columns of a row, then of the other.
struct ByRows {
    static constexpr int kTileRows = kRowTile;

    __device__ static int row(int v, int i) { return v / 32 % 4 * 16 + v % 32 / 4 + i / 2 * 8; }  // i: of the four
    __device__ static int column(int v, int i) {
        return v / (kTileRows * kDimV / 8) * kHalfV + v / 128 % 32 * 8 + v % 4 * 2 + i % 2;
    }
    __device__ static constexpr int head(int i) { return i / 2; }  // which of the two rows
};

// fwd_kvcache_mla_few_rows.cu's: [warpgroup, block of 64 columns, 2, warp, lane], a column of both rows, then another.
struct ByColumns {
    static constexpr int kTileRows = kFewRows;

    __device__ static int row(int v, int i) { return v / 128 % 2 * 8 + v % 4 * 2 + i % 2; }
    __device__ static int column(int v, int i) {
        return v / (kTileRows * kDimV / 8) * kHalfV + v / 256 % 4 * 64 + v / 32 % 4 * 16 + v % 32 / 4 + i / 2 * 8;
    }
    __device__ static constexpr int head(int i) { return i % 2; }
};

// What a thread has of a node.
struct Node {
    float4 out;
    float2 lse_log2;  // of its two rows
};

struct SharedStorage {
    int first[kWorkspaceTiles + 1];  // places where rows begin, and the end
    int begun[kWarps];
    Node stack[kOwnPlaces][kThreads];
};

// ---------------------------------------------------------------------------------------------------- device helpers

// Fills shared.first and returns the number of rows.
__device__ int list_rows(const FwdParams& params, SharedStorage& shared, int places) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int rows = 0;
    for (int base = 0; base < places; base += kThreads) {
        const int place = base + threadIdx.x;
        const bool begins =
            place < places && (place == 0 || __ldcg(params.nodes + place).x != __ldcg(params.nodes + place - 1).x);
        const uint32_t votes = __ballot_sync(~0u, begins);
        if (lane == 0) shared.begun[warp] = __popc(votes);
        __syncthreads();
        int before = rows;
        for (int w = 0; w < kWarps; ++w) {
            if (w < warp) before += shared.begun[w];
            rows += shared.begun[w];
        }
        if (begins) shared.first[before + __popc(votes & ((1u << lane) - 1))] = place;
        __syncthreads();
    }
    if (threadIdx.x == 0) shared.first[rows] = places;
    __syncthreads();
    return rows;
}

template <typename Layout>
__device__ __forceinline__ Node load_node(const FwdParams& params, int place, int row_tile, int v) {
    const int64_t tile = tile_at(params, place, row_tile);
    const float4* out = reinterpret_cast<const float4*>(params.partial_out) + tile * (Layout::kTileRows * kDimV / 4);
    const float* lse = share_lse(params, tile);
    return {__ldcg(out + v), {__ldcg(lse + Layout::row(v, 0)), __ldcg(lse + Layout::row(v, 3))}};
}

template <typename Layout>
__device__ __forceinline__ void merge(Node& node, const Node& left) {
    const Weights weights[2] = {Weights(node.lse_log2.x, left.lse_log2.x), Weights(node.lse_log2.y, left.lse_log2.y)};
    node.lse_log2 = {weights[0].lse_log2, weights[1].lse_log2};
    node.out.x = weights[Layout::head(0)].of(node.out.x, left.out.x);
    node.out.y = weights[Layout::head(1)].of(node.out.y, left.out.y);
    node.out.z = weights[Layout::head(2)].of(node.out.z, left.out.z);
    node.out.w = weights[Layout::head(3)].of(node.out.w, left.out.w);
}

// The row whose nodes lie in places begin .. end - 1, for vector v of a row tile.
template <typename Layout>
__device__ __forceinline__ Node merge_row(const FwdParams& params, SharedStorage& shared, int begin, int end,
                                          int row_tile, int v) {
    Node node;
    int depth = 0, unit = 0;
#pragma unroll 1
    for (int place = begin; place < end; place += kAtOnce) {
        Node loaded[kAtOnce];
        int ends[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = min(place + i, end - 1);
            loaded[i] = load_node<Layout>(params, at, row_tile, v);
            ends[i] = __ldcg(params.nodes + at).y;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (place + i >= end) break;
            node = loaded[i];
            unit = max(ends[i], unit + 1);  // as it is, but for a plan of other lengths
            const int nodes = count_nodes(0, unit);
            while (depth >= nodes && depth > 0) merge<Layout>(node, shared.stack[--depth][threadIdx.x]);
            if (place + i + 1 < end && depth < kOwnPlaces) shared.stack[depth++][threadIdx.x] = node;
        }
    }
    return node;
}

template <typename T, typename Layout>
__device__ __forceinline__ void store_row(const FwdParams& params, int batch_row, int row_tile, int v,
                                          const Node& node) {
    const HeadTile in_head(params, row_tile);
    const float out[4] = {node.out.x, node.out.y, node.out.z, node.out.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = in_head.tile * Layout::kTileRows + Layout::row(v, i);
        if (at >= params.rows) continue;
        const QueryRow row(params, at);
        const int h = in_head.head * params.group + row.g;
        const int column = Layout::column(v, i);
        T* to = static_cast<T*>(params.out) + ((int64_t{batch_row} * params.s_q + row.s) * params.h_q + h) * kDimV;
        to[column] = static_cast<T>(out[i]);
        if (column == 0) {
            const float lse = Layout::head(i) == 0 ? node.lse_log2.x : node.lse_log2.y;
            params.lse[(int64_t{batch_row} * params.h_q + h) * params.s_q + row.s] =
                lse == -INFINITY ? INFINITY : lse * kLn2;
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, typename Layout>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) fwd_kvcache_mla_merge_nodes_kernel(const FwdParams params) {
    __shared__ SharedStorage shared;
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
    const int used = flagged_place(params, kMaxParts), places = used <= params.places ? used : 0;
    if (places == 0) return;
    constexpr int kPerTile = Layout::kTileRows * kDimV / 4 / kThreads;
    const int items = list_rows(params, shared, places) * params.row_tiles * kPerTile;
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int v = item % kPerTile * kThreads + threadIdx.x, row_tile = item / kPerTile % params.row_tiles;
        const int row = item / kPerTile / params.row_tiles, first = shared.first[row];
        const int batch_row = __ldcg(params.nodes + first).x;
        if (batch_row < 0 || batch_row >= params.b) continue;  // a plan of other lengths
        const Node node = merge_row<Layout>(params, shared, first, shared.first[row + 1], row_tile, v);
        store_row<T, Layout>(params, batch_row, row_tile, v, node);
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, typename Layout>
void launch(const FwdParams& params, cudaStream_t stream) {
    const auto kernel = fwd_kvcache_mla_merge_nodes_kernel<T, Layout>;
    const dim3 grid(kCtasPerSm * multiprocessors());
    cuda_check(launch_dependent(kernel, grid, kThreads, 0, stream, params), "fwd_kvcache_mla_merge_nodes");
}

template <typename T>
void launch(const FwdParams& params, cudaStream_t stream) {
    params.few_rows ? launch<T, ByColumns>(params, stream) : launch<T, ByRows>(params, stream);
}

}  // namespace

void fwd_kvcache_mla_merge_nodes(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
