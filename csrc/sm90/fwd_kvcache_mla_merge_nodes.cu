// Under a batch-invariant plan: merges the nodes that parts left of the rows that they share, in the tree that the
// row's length fixes (units.cuh), to the bits that the decode kernel gives a row which one part has alone.
//
// The nodes of a row lie in places that follow each other, in the order of its units; the decode kernel has listed each
// one's row, and where in the row it ends.
//
// Grid: as many CTAs as fit at once, which share the rows' items. An item is kThreads vectors of a row's tile, one a
// thread, as decode kernels' threads stored them: four floats, two query rows x two columns. A thread brings a few
// nodes at a time to shared memory, goes through them, and keeps those that wait for their sibling in a stack of its
// own. Loops stay loops: what takes long otherwise is to fetch instructions.

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
    // where the lse of those that stored it begins
    __device__ static int lse(int v) { return v / (kTileRows * kDimV / 8) * kTileRows; }
};

// fwd_kvcache_mla_few_rows.cu's: [warpgroup, block of 64 columns, 2, warp, lane], a column of both rows, then another.
struct ByColumns {
    static constexpr int kTileRows = kFewRows;

    __device__ static int row(int v, int i) { return v / 128 % 2 * 8 + v % 4 * 2 + i % 2; }
    __device__ static int column(int v, int i) {
        return v / (kTileRows * kDimV / 8) * kHalfV + v / 256 % 4 * 64 + v / 32 % 4 * 16 + v % 32 / 4 + i / 2 * 8;
    }
    __device__ static constexpr int head(int i) { return i % 2; }
    __device__ static int lse(int v) { return (v / (kTileRows * kDimV / 8) * 4 + v / 32 % 4) * kTileRows; }
};

// What a thread has of a node.
struct Node {
    float4 out;
    float2 lse_log2;  // of its two rows
};

struct SharedStorage {
    float4 out[kAtOnce][kThreads];
    float lse_log2[kAtOnce][2][kThreads];
    float4 stack[kOwnPlaces][kThreads];
    float2 stack_lse[kOwnPlaces][kThreads];
    uint16_t first[kWorkspaceTiles + 1];  // places where rows begin, and the end
    uint8_t ends[kWorkspaceTiles];        // units of the row up to the end of the node in each place
    int begun[kWarps];
};

// ---------------------------------------------------------------------------------------------------- device helpers

// Fills shared.first and shared.ends, and returns the number of rows.
__device__ int list_rows(const FwdParams& params, SharedStorage& shared, int places) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int rows = 0;
#pragma unroll 1
    for (int base = 0; base < places; base += kThreads) {
        const int place = base + threadIdx.x;
        bool begins = false;
        if (place < places) {
            const int2 node = __ldcg(params.nodes + place);
            begins = place == 0 || node.x != __ldcg(params.nodes + place - 1).x;
            shared.ends[place] = static_cast<uint8_t>(node.y);
        }
        const uint32_t votes = __ballot_sync(~0u, begins);
        if (lane == 0) shared.begun[warp] = __popc(votes);
        __syncthreads();
        int before = rows;
        for (int w = 0; w < kWarps; ++w) {
            if (w < warp) before += shared.begun[w];
            rows += shared.begun[w];
        }
        if (begins) shared.first[before + __popc(votes & ((1u << lane) - 1))] = static_cast<uint16_t>(place);
        __syncthreads();
    }
    if (threadIdx.x == 0) shared.first[rows] = static_cast<uint16_t>(places);
    __syncthreads();
    return rows;
}

// Brings the thread's vectors of `count` nodes from `place` on to shared memory.
template <typename Layout>
__device__ __forceinline__ void load_nodes(const FwdParams& params, SharedStorage& shared, int place, int count,
                                           int row_tile, int v) {
    const int64_t tile = tile_at(params, place, row_tile);
    const float4* out =
        reinterpret_cast<const float4*>(params.partial_out) + tile * (Layout::kTileRows * kDimV / 4) + v;
    const float* lse = node_lse(params, tile) + Layout::lse(v);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        ptx::cp_async_16(ptx::shared_address(&shared.out[i][threadIdx.x]), out);
        ptx::cp_async_4(ptx::shared_address(&shared.lse_log2[i][0][threadIdx.x]), lse + Layout::row(v, 0));
        ptx::cp_async_4(ptx::shared_address(&shared.lse_log2[i][1][threadIdx.x]), lse + Layout::row(v, 3));
        out += int64_t{params.row_tiles} * (Layout::kTileRows * kDimV / 4);
        lse += int64_t{params.row_tiles} * kNodeLse;
    }
    ptx::cp_async_wait_all();
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
    int depth = 0;
#pragma unroll 1
    for (int place = begin; place < end; ++place) {
        const int i = (place - begin) % kAtOnce;
        if (i == 0) load_nodes<Layout>(params, shared, place, min(kAtOnce, end - place), row_tile, v);
        node.out = shared.out[i][threadIdx.x];
        node.lse_log2 = {shared.lse_log2[i][0][threadIdx.x], shared.lse_log2[i][1][threadIdx.x]};
        const int nodes = count_nodes(0, shared.ends[place]);
#pragma unroll 1
        while (depth >= nodes && depth > 0) {
            --depth;
            merge<Layout>(node, {shared.stack[depth][threadIdx.x], shared.stack_lse[depth][threadIdx.x]});
        }
        depth = min(depth, kOwnPlaces - 1);  // as it is, but for a plan of other lengths
        shared.stack[depth][threadIdx.x] = node.out;
        shared.stack_lse[depth++][threadIdx.x] = node.lse_log2;
    }
    return node;
}

template <typename T, typename Layout>
__device__ __forceinline__ void store_row(const FwdParams& params, int batch_row, int row_tile, int v,
                                          const Node& node) {
    const HeadTile in_head(params, row_tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int at = in_head.tile * Layout::kTileRows + Layout::row(v, 3 * r);
        if (at >= params.rows) continue;
        const QueryRow row(params, at);
        const int h = in_head.head * params.group + row.g, column = Layout::column(v, r);
        T* to = static_cast<T*>(params.out) + ((int64_t{batch_row} * params.s_q + row.s) * params.h_q + h) * kDimV;
        if constexpr (Layout::head(1) == 0) {
            *reinterpret_cast<uint32_t*>(to + Layout::column(v, 2 * r)) =
                r == 0 ? pack<T>(node.out.x, node.out.y) : pack<T>(node.out.z, node.out.w);
        } else {
            to[column] = static_cast<T>(r == 0 ? node.out.x : node.out.y);
            to[Layout::column(v, r + 2)] = static_cast<T>(r == 0 ? node.out.z : node.out.w);
        }
        if (Layout::column(v, 0) != 0) continue;
        const float lse = r == 0 ? node.lse_log2.x : node.lse_log2.y;
        params.lse[(int64_t{batch_row} * params.h_q + h) * params.s_q + row.s] =
            lse == -INFINITY ? INFINITY : lse * kLn2;
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, typename Layout>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) fwd_kvcache_mla_merge_nodes_kernel(const FwdParams params) {
    __shared__ SharedStorage shared;
    cudaTriggerProgrammaticLaunchCompletion();  // what is launched early waits for the end of this grid
    cudaGridDependencySynchronize();
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
