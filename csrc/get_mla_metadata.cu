// get_mla_metadata: deals rows of given lengths to parts of equal load (the plan, flashmla_ops/plan.py).
//
// Row r costs kRowCost + tiles(r), tiles(r) = ceil(cache_seqlens[r] / 64). The rows lie end to end on a line of cost of
// length `total`; cut p stands at p * total / parts_used and falls into the row r with
// row_begin(r) <= position < row_end(r), at tile max(position - row_begin(r) - kRowCost, 0). Part p lies between the
// cuts p and p + 1. num_splits is the prefix sum of the parts that touch each row: 1 + the cuts inside it.
//
// Grid: one CTA. It sums the costs, then walks the batch in blocks of kThreads rows: a scan puts the row ends of a
// block into shared memory, and every cut that stands inside the block (one thread each) finds its row by bisection.
// Any architecture.

#include "check.h"
#include "params.h"

namespace flashmla {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

struct SharedStorage {
    int64_t row_end[kThreads];   // of the block's rows
    int cuts_inside[kThreads];   // how many cuts split each of the block's rows
    int cut_row[kMaxParts + 1];  // b where no row holds the cut
    int cut_tile[kMaxParts + 1];
    int64_t warp_sum[kWarps];
};

// ---------------------------------------------------------------------------------------------------- device helpers

__device__ int num_tiles(const MetadataParams& params, int row) {
    const int length = max(params.cache_seqlens[row], 0);
    return length / kTile + (length % kTile != 0);
}

template <typename V>
__device__ V warp_scan(V value) {
    for (int offset = 1; offset < 32; offset *= 2) {
        const V below = __shfl_up_sync(~0u, value, offset);
        if (threadIdx.x % 32 >= offset) value += below;
    }
    return value;
}

// Inclusive sum over the CTA's threads in order; `total` is the sum of all.
__device__ int64_t block_scan(int64_t value, int64_t* warp_sum, int64_t& total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t sum = warp_scan(value);
    __syncthreads();  // the last scan's readers of warp_sum are done
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    const int64_t warps = warp_scan(warp_sum[lane]);
    total = __shfl_sync(~0u, warps, kWarps - 1);
    return sum + (warp > 0 ? __shfl_sync(~0u, warps, max(warp - 1, 0)) : 0);
}

// The first of n ascending values that is above `limit` (upper) or not below it; n if there is none.
template <bool kUpper, typename V>
__device__ int bisect(const V* values, int n, V limit) {
    int low = 0, high = n;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (kUpper ? values[middle] > limit : values[middle] >= limit) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// ------------------------------------------------------------------------------------------------------------ kernel

// Part p's columns, from its cut and the next one.
__device__ void write_part(const MetadataParams& params, const SharedStorage& shared, int p, int parts_used) {
    const int row = shared.cut_row[p], tile = shared.cut_tile[p];
    const int next_row = shared.cut_row[p + 1], next_tile = shared.cut_tile[p + 1];
    int columns[kColumns] = {0, 0, -1, 0, 0, 0, 0, 0};
    if (p < parts_used && row < params.b) {
        const bool whole = next_tile == 0;  // the next part starts with a row of its own
        columns[kFirstRow] = row;
        columns[kFirstTile] = tile;
        columns[kLastRow] = whole ? next_row - 1 : next_row;
        columns[kLastTile] = whole ? num_tiles(params, next_row - 1) : next_tile;
        // its index among the cuts of its row; the first of them may stand at the row's start and then splits nothing
        const int first = bisect<false>(shared.cut_row, kMaxParts + 1, row);
        columns[kFirstSplit] = p - first + (shared.cut_tile[first] > 0);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) params.metadata[p * kColumns + c] = columns[c];
}

__global__ void __launch_bounds__(kThreads) get_mla_metadata_kernel(const MetadataParams params) {
    __shared__ SharedStorage shared;
    const int tid = threadIdx.x;

    int64_t total = 0;
    for (int row = tid; row < params.b; row += kThreads) total += kRowCost + num_tiles(params, row);
    block_scan(total, shared.warp_sum, total);
    const int parts_used =
        static_cast<int>(max(int64_t{1}, min(int64_t{params.num_parts}, total / (kMinTiles + kRowCost))));

    const int64_t position = tid < parts_used ? tid * total / parts_used : total;  // of cut number tid
    if (tid <= kMaxParts) {
        shared.cut_row[tid] = params.b;
        shared.cut_tile[tid] = 0;
    }
    if (tid == 0) params.num_splits[0] = 0;

    int64_t cost_before = 0, splits_before = 0, block_total;
    for (int first = 0; first < params.b; first += kThreads) {
        const int row = first + tid;
        const int64_t cost = row < params.b ? kRowCost + num_tiles(params, row) : 0;
        shared.row_end[tid] = cost_before + block_scan(cost, shared.warp_sum, block_total);
        shared.cuts_inside[tid] = 0;
        __syncthreads();
        if (tid < parts_used && position >= cost_before && position < cost_before + block_total) {
            const int i = bisect<true>(shared.row_end, kThreads, position);
            const int64_t tile = position - (i > 0 ? shared.row_end[i - 1] : cost_before) - kRowCost;
            shared.cut_row[tid] = first + i;
            shared.cut_tile[tid] = static_cast<int>(max(tile, int64_t{0}));
            if (tile > 0) atomicAdd(&shared.cuts_inside[i], 1);
        }
        cost_before += block_total;
        __syncthreads();
        const int64_t splits = row < params.b ? 1 + shared.cuts_inside[tid] : 0;
        const int64_t splits_here = splits_before + block_scan(splits, shared.warp_sum, block_total);
        if (row < params.b) params.num_splits[row + 1] = static_cast<int>(splits_here);
        splits_before += block_total;
    }
    __syncthreads();
    if (tid < kMaxParts) write_part(params, shared, tid, parts_used);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

void get_mla_metadata(const MetadataParams& params, cudaStream_t stream) {
    get_mla_metadata_kernel<<<1, kThreads, 0, stream>>>(params);
    cuda_check(cudaGetLastError(), "get_mla_metadata");
}

}  // namespace flashmla
