// Under a batch-invariant plan: merges the nodes that parts left of the rows that they share, in the tree that the
// row's length fixes (units.cuh, nodes.cuh), to the bits that the decode kernel gives a row which one part has alone.
//
// The nodes of a row lie in places that follow each other, in the order of its units; the decode kernel has listed each
// one's row, and where in the row it ends.
//
// Grid: as many CTAs as fit at once, which share the rows' items. An item is 32 of the 8-value vectors of a row's tile,
// one a lane, as decode kernels' threads stored them. A warp merges it; or, where items are few and rows have many
// nodes, all of a CTA's 16 warps: each the nodes of a sixteenth of the tree, then two by two what they have. A warp
// brings a few nodes at a time to shared memory, goes through them, and keeps those that wait for their sibling in a
// stack. Loops stay loops: what takes long otherwise is to fetch instructions.

#include <algorithm>

#include "fwd_kvcache_mla.cuh"
#include "nodes.cuh"
#include "ptx.cuh"
#include "row_tile.cuh"
#include "units.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kMany = 16;                 // warps that merge an item together
constexpr int kMostRows = 2 * kMaxParts;  // a part leaves nodes of its first and of its last row

// A layout tells what of an item, 16 query rows and 16 columns of a row tile, a lane has, and where heads lie.

// fwd_kvcache_mla.cu's: [warpgroup, 16, warp, lane], four columns of two rows.
struct ByRows {
    static constexpr int kTileRows = kRowTile, kRows = 2, kHeads = 2;

    __device__ static int first_row(int v) { return v % 4 * 16; }
    __device__ static int first_column(int v) { return v / 64 * kHalfV + v / 4 % 16 * 16; }
    __device__ static int row(int lane, int r) { return lane / 4 + 8 * r; }
    __device__ static int column(int lane, int k) { return k / 4 * 8 + lane % 4 * 2 + k % 2; }
    __device__ static constexpr int row_of(int k) { return k / 2 % 2; }  // of the lane's rows
    __device__ static int head_of(int, int row) { return row / 8 * 32 + row % 8 * 4; }
};

// fwd_kvcache_mla_few_rows.cu's: [warpgroup, block of 64 columns, 16 query rows, warp, lane], two columns of four rows.
template <int kTileRows_>
struct ByColumns {
    static constexpr int kTileRows = kTileRows_, kRows = 4, kHeads = 1, kGroups = kTileRows / 16;

    __device__ static int first_row(int v) { return v / 4 % kGroups * 16; }
    __device__ static int first_column(int v) {
        return v / kTileRows * kHalfV + v / (4 * kGroups) % 4 * 64 + v % 4 * 16;
    }
    __device__ static int row(int lane, int r) { return r / 2 * 8 + lane % 4 * 2 + r % 2; }
    __device__ static int column(int lane, int k) { return lane / 4 + k / 2 % 2 * 8; }
    __device__ static constexpr int row_of(int k) { return k / 4 * 2 + k % 2; }
    __device__ static int head_of(int v, int row) { return first_row(v) + (row / 8 * 2 + row % 2) * 4 + row % 8 / 2; }
};

// What a lane has of a node: values of the layout's rows, and the head of row lane % 16. Weights of a merge are worked
// out once for each row, and handed to whoever has its values.
struct Node {
    float x[8];
    Head head;
};

// The same of a warp, in memory.
template <typename T>
struct Stored {
    uint4 vectors[kNodeVectors<T>][32];
    Head heads[16];
};

template <typename T, typename Layout, int kTogether>
struct SharedStorage {
    static constexpr int kWarps = kTogether == 1 ? 4 : kTogether;
    static constexpr int kDepth = kTogether == 1 ? kOwnPlaces : 3;  // of a stack: log2 of a warp's units
    // Nodes that a warp loads. Of many warps for 64 rows, which have 128 items each, so few that several CTAs fit.
    static constexpr int kAtOnce = kTogether == 1 || Layout::kTileRows < kRowTile ? 8 : kHalfNodes<T> ? 4 : 2;

    Stored<T> landed[kWarps][kAtOnce], stack[kWarps][kDepth];
    int2 row[kMostRows];            // of each row: what is listed in its first place
    uint16_t first[kMostRows + 1];  // places where rows begin, and the end
    uint8_t ends[kWorkspaceTiles];  // units of the row up to the end of the node in each place
    int begun[kWarps];
};

// ---------------------------------------------------------------------------------------------------- device helpers

// Fills shared.row, shared.first and shared.ends, and returns the number of rows.
template <typename SharedStorage>
__device__ int list_rows(const FwdParams& params, SharedStorage& shared, int places) {
    constexpr int kThreads = 32 * SharedStorage::kWarps, kEach = (kWorkspaceTiles + kThreads - 1) / kThreads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int2 here[kEach], before_it[kEach];  // all asked for at once
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int place = i * kThreads + threadIdx.x;
        if (place >= places) break;
        here[i] = __ldcg(params.nodes + place);
        before_it[i] = __ldcg(params.nodes + max(place - 1, 0));
    }
    int rows = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (i * kThreads >= places) break;
        const int place = i * kThreads + threadIdx.x;
        const Listed node(here[i]);
        const bool begins = place < places && (place == 0 || !node.beside(Listed(before_it[i])));
        if (place < places) shared.ends[place] = static_cast<uint8_t>(node.end_unit());
        const uint32_t votes = __ballot_sync(~0u, begins);
        if (lane == 0) shared.begun[warp] = __popc(votes);
        __syncthreads();
        int row = rows + __popc(votes & ((1u << lane) - 1));
#pragma unroll 1
        for (int w = 0; w < SharedStorage::kWarps; ++w) {
            if (w < warp) row += shared.begun[w];
            rows += shared.begun[w];
        }
        if (begins && row < kMostRows) {
            shared.first[row] = static_cast<uint16_t>(place);
            shared.row[row] = node.words;
        }
        __syncthreads();
    }
    rows = min(rows, kMostRows);
    if (threadIdx.x == 0) shared.first[rows] = static_cast<uint16_t>(places);
    __syncthreads();
    return rows;
}

template <typename T>
__device__ __forceinline__ void read_values(const Stored<T>& stored, float (&x)[8]) {
    constexpr int kVectors = kNodeVectors<T>, kValues = 8 / kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        float some[kValues];
        unpack(stored.vectors[i][threadIdx.x % 32], some);
#pragma unroll
        for (int k = 0; k < kValues; ++k) x[i * kValues + k] = some[k];
    }
}

template <typename T>
__device__ __forceinline__ void read(const Stored<T>& stored, Node& node) {
    read_values(stored, node.x);
    node.head = stored.heads[threadIdx.x % 16];
}

template <typename T>
__device__ __forceinline__ void write(const Node& node, Stored<T>& stored) {
    const int lane = threadIdx.x % 32;
    const NodeValues<T> values(node.x);
    __syncwarp();  // what was there has been read
#pragma unroll
    for (int i = 0; i < kNodeVectors<T>; ++i) stored.vectors[i][lane] = values.vectors[i];
    if (lane < 16) stored.heads[lane] = node.head;
    __syncwarp();
}

template <typename T, typename Layout>
__device__ __forceinline__ void merge(Node& node, const Stored<T>& stored) {
    const NodeWeights weights(node.head, stored.heads[threadIdx.x % 16]);
    node.head = weights.head();
    float other[8];
    read_values(stored, other);
    round_node<T>(node.x);
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
        const int row = Layout::row(threadIdx.x % 32, r);
        const float a = __shfl_sync(~0u, weights.a, row), b = __shfl_sync(~0u, weights.b, row);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (Layout::row_of(k) == r) node.x[k] = weighted(a, node.x[k], b, other[k]);
        }
    }
}

// Brings an item of `count` nodes from `place` on to shared memory.
template <typename T, typename Layout>
__device__ __forceinline__ void load_nodes(const FwdParams& params, Stored<T>* landed, int place, int count,
                                           int row_tile, int v) {
    const int lane = threadIdx.x % 32;
    const int warp = v / Layout::kTileRows * 4 + v % 4;  // that stored them
    __syncwarp();                                        // those before have been read
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const int64_t tile = tile_at(params, place + i, row_tile);
        // a thread's vectors are 128 apart in memory, and a warp of four has the same one of each block of them
        const uint4* from =
            node_values<T, Layout::kTileRows>(params, tile) + (v / 4 * kNodeVectors<T> * 4 + v % 4) * 32 + lane;
#pragma unroll
        for (int j = 0; j < kNodeVectors<T>; ++j) {
            ptx::cp_async_16(ptx::shared_address(&landed[i].vectors[j][lane]), from + 128 * j);
        }
        if (lane < 16) {
            ptx::cp_async_8(ptx::shared_address(&landed[i].heads[lane]),
                            node_heads<Layout::kHeads>(params, tile, warp, Layout::head_of(v, lane)));
        }
    }
    ptx::cp_async_wait_all();
    __syncwarp();
}

// Merges the nodes in places begin .. end - 1, which begin in the row's units first .. first + units - 1.
template <typename T, typename Layout, typename SharedStorage>
__device__ __forceinline__ Node merge_nodes(const FwdParams& params, SharedStorage& shared, int begin, int end,
                                            int first, int units, int row_tile, int v) {
    constexpr int kAtOnce = SharedStorage::kAtOnce;
    const int warp = threadIdx.x / 32;
    Node node;
    int depth = 0;
#pragma unroll 1
    for (int place = begin; place < end; ++place) {
        const int i = (place - begin) % kAtOnce;
        if (i == 0) {
            load_nodes<T, Layout>(params, shared.landed[warp], place, min(kAtOnce, end - place), row_tile, v);
        }
        if (place > begin) {
            write(node, shared.stack[warp][min(depth, SharedStorage::kDepth - 1)]);  // less: a plan of other lengths
            ++depth;
        }
        read(shared.landed[warp][i], node);
        const int nodes = count_nodes(first, min(shared.ends[place], first + units));
#pragma unroll 1
        while (depth >= nodes && depth > 0) {
            --depth;
            merge<T, Layout>(node, shared.stack[warp][min(depth, SharedStorage::kDepth - 1)]);
        }
    }
    return node;
}

// Of the nodes in places begin .. end - 1 of a row those that begin in units first .. first + units - 1: where they
// begin, and their number.
template <typename SharedStorage>
__device__ __forceinline__ int2 nodes_of(const SharedStorage& shared, int begin, int end, int first, int units) {
    int before = 0, count = 0;
#pragma unroll 1
    for (int base = begin; base < end; base += 32) {
        const int place = base + threadIdx.x % 32;
        const int at = place == begin ? 0 : place < end ? shared.ends[place - 1] : INT_MAX;
        before += __popc(__ballot_sync(~0u, at < first));
        count += __popc(__ballot_sync(~0u, at >= first && at < first + units));
    }
    return {begin + before, count};
}

// The row whose nodes lie in places begin .. end - 1, by all warps; the first one has the result.
template <typename T, typename Layout, typename SharedStorage>
__device__ __forceinline__ Node merge_together(const FwdParams& params, SharedStorage& shared, int begin, int end,
                                               int row_tile, int v) {
    constexpr int kWarps = SharedStorage::kWarps;
    const int warp = threadIdx.x / 32;
    const int padded = shared.ends[end - 1];  // the row's last node ends where its tree does
    const int units = max(padded / kWarps, 1);
    const int2 mine = nodes_of(shared, begin, end, warp * units, units);
    Node node = merge_nodes<T, Layout>(params, shared, mine.x, mine.x + mine.y, warp * units, units, row_tile, v);
#pragma unroll 1
    for (int step = 1; step < kWarps && step * units < padded; step *= 2) {
        const bool left = warp % (2 * step) == 0;
        if (warp % (2 * step) == step) write(node, shared.stack[warp][0]);
        // a node that is there has another one to its left
        const bool there = nodes_of(shared, begin, end, (warp + step) * units, step * units).y > 0;
        __syncthreads();
        if (left && there) merge<T, Layout>(node, shared.stack[warp + step][0]);
    }
    __syncthreads();  // what others have of this item has been read
    return node;
}

// A row tile of what a node is of.
template <typename Layout>
__device__ __forceinline__ RowTile row_tile_of(const FwdParams& params, int row_tile, const Listed& node) {
    const RowTile rows(HeadTile(params, row_tile), Layout::kTileRows);
    if (params.cu_seqlens_q == nullptr) return rows;
    return RowTile(params, rows, node.row(), RowQueries(params, node.row()), node.block());
}

// Whether the row tile has any of an item's query rows: where it has none, no node has been stored. Of a plan of other
// lengths, which lists fewer nodes than it says, neither row nor block may be one.
template <typename Layout>
__device__ __forceinline__ bool has_rows(const FwdParams& params, int row_tile, const Listed& node, int v) {
    if (node.row() < 0 || node.row() >= params.b) return false;
    const RowTile rows = row_tile_of<Layout>(params, row_tile, node);
    return rows.first_row >= 0 && Layout::first_row(v) < rows.count(params);
}

// A row's result, by way of `staging`: 512 bytes of the warp's, so that a lane has half of a query row's columns.
template <typename T, typename Layout>
__device__ __forceinline__ void store_row(const FwdParams& params, int row_tile, const Listed& listed, int v,
                                          const Node& node, void* staging) {
    const int lane = threadIdx.x % 32;
    T(*tile)[16] = static_cast<T(*)[16]>(staging);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
        const int row = Layout::row(lane, r);
        const float power = __shfl_sync(~0u, node.head.y, row);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (Layout::row_of(k) == r) tile[row][Layout::column(lane, k)] = static_cast<T>(node.x[k] * power);
        }
    }
    __syncwarp();
    const RowTile rows = row_tile_of<Layout>(params, row_tile, listed);
    const float lse = __shfl_sync(~0u, node.head.x, lane / 2);
    const int at = Layout::first_row(v) + lane / 2, column = Layout::first_column(v) + lane % 2 * 8;
    if (at >= rows.count(params)) return;
    const QueryRow row(params, rows.first_row + at);
    const int h = rows.head * params.group + row.g;
    T* to = static_cast<T*>(params.out) + (rows.query_at(params, listed.row(), row.s) * params.h_q + h) * kDimV;
    *reinterpret_cast<uint4*>(to + column) = *reinterpret_cast<const uint4*>(&tile[lane / 2][lane % 2 * 8]);
    if (column == 0) {
        params.lse[rows.lse_at(params, listed.row(), h, row.s)] = lse == -INFINITY ? INFINITY : lse * kLn2;
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, typename Layout, int kTogether>
__global__ void __launch_bounds__(32 * SharedStorage<T, Layout, kTogether>::kWarps)
    fwd_kvcache_mla_merge_nodes_kernel(const FwdParams params) {
    extern __shared__ __align__(16) uint8_t shared_bytes[];
    using Shared = SharedStorage<T, Layout, kTogether>;
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    cudaTriggerProgrammaticLaunchCompletion();  // what is launched early waits for the end of this grid
    cudaGridDependencySynchronize();
    const int used = flagged_place(params, kMaxParts), places = used <= params.places ? used : 0;
    if (places == 0) return;
    constexpr int kPerTile = Layout::kTileRows * kDimV / 8 / 32, kItemsAtOnce = Shared::kWarps / kTogether;
    const int items = list_rows(params, shared, places) * params.row_tiles * kPerTile;
    const int first_item = blockIdx.x * kItemsAtOnce + threadIdx.x / 32 / kTogether;
#pragma unroll 1
    for (int item = first_item; item < items; item += gridDim.x * kItemsAtOnce) {
        const int v = item % kPerTile, row_tile = item / kPerTile % params.row_tiles;
        const int row = item / kPerTile / params.row_tiles, begin = shared.first[row], end = shared.first[row + 1];
        if (!has_rows<Layout>(params, row_tile, Listed(shared.row[row]), v)) continue;
        if constexpr (kTogether == 1) {
            const Node node = merge_nodes<T, Layout>(params, shared, begin, end, 0, kMaxUnits, row_tile, v);
            store_row<T, Layout>(params, row_tile, Listed(shared.row[row]), v, node, shared.landed[threadIdx.x / 32]);
        } else {
            const Node node = merge_together<T, Layout>(params, shared, begin, end, row_tile, v);
            if (threadIdx.x < 32) {
                store_row<T, Layout>(params, row_tile, Listed(shared.row[row]), v, node, shared.landed[0]);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, typename Layout, int kTogether>
void launch(const FwdParams& params, cudaStream_t stream) {
    using Shared = SharedStorage<T, Layout, kTogether>;
    constexpr auto kKernel = fwd_kvcache_mla_merge_nodes_kernel<T, Layout, kTogether>;
    constexpr int kThreads = 32 * Shared::kWarps, kSharedBytes = sizeof(Shared);
    static_assert(kSharedBytes <= 227 * 1024);
    constexpr int kCtasPerSm = std::max(1, std::min(220 * 1024 / kSharedBytes, 1024 / kThreads));
    allow_shared_bytes<kKernel>(kSharedBytes, "fwd_kvcache_mla_merge_nodes: shared memory");
    const dim3 grid(kCtasPerSm * multiprocessors());
    cuda_check(launch_dependent(kKernel, grid, kThreads, kSharedBytes, stream, params), "fwd_kvcache_mla_merge_nodes");
}

template <typename T, typename Layout>
void launch(const FwdParams& params, cudaStream_t stream) {
    // all of a CTA's warps for an item where CTAs then have no more than two; of uneven queries rows have many blocks
    const int rows = params.cu_seqlens_q != nullptr ? params.grid_parts : std::min(params.b, params.grid_parts);
    const int64_t items = int64_t{rows} * params.row_tiles * Layout::kTileRows * 2;
    items <= 2 * multiprocessors() ? launch<T, Layout, kMany>(params, stream) : launch<T, Layout, 1>(params, stream);
}

template <typename T>
void launch(const FwdParams& params, cudaStream_t stream) {
    if (!params.few_rows) return launch<T, ByRows>(params, stream);
    params.tile_rows > kFewRows ? launch<T, ByColumns<2 * kFewRows>>(params, stream)
                                : launch<T, ByColumns<kFewRows>>(params, stream);
}

}  // namespace

void fwd_kvcache_mla_merge_nodes(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
