// What the kernels that make plans share: scans over their one CTA, and how a part is written (flashmla_ops/plan.py).
#pragma once

#include "params.h"

namespace flashmla {

__device__ inline int num_tiles(const MetadataParams& params, int row) {
    const int length = max(params.cache_seqlens[row], 0);
    return length / kTile + (length % kTile != 0);
}

// Of uneven queries: the blocks of a row, of `size` query rows, each of which is planned like a row.
__device__ inline int64_t num_blocks(const MetadataParams& params, int row, int size) {
    const int64_t difference = int64_t{params.cu_seqlens_q[row + 1]} - params.cu_seqlens_q[row];
    const int64_t queries = max(int64_t{0}, min(difference, int64_t{params.max_seqlen_q}));
    return (queries * params.group + size - 1) / size;
}

template <typename Int>
__device__ Int warp_scan(Int value) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const Int below = __shfl_up_sync(~0u, value, offset);
        if (threadIdx.x % 32 >= offset) value += below;
    }
    return value;
}

__device__ inline int warp_sum(int value) { return __reduce_add_sync(~0u, value); }
__device__ inline int64_t warp_sum(int64_t value) {
    for (int offset = 1; offset < 32; offset *= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

// The sum over the CTA's threads before this one; `total` is that of all. `sums` is used for nothing else.
template <typename Int>
__device__ Int sum_before(Int value, Int (&sums)[32], Int& total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Int sum = warp_scan(value);
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    const Int of_warp = lane < blockDim.x / 32 ? sums[lane] : 0;
    total = warp_sum(of_warp);
    return sum - value + warp_sum(lane < warp ? of_warp : 0);
}

static_assert(kFirstRow == 0 && kFirstTile == 1 && kLastRow == 2 && kLastTile == 3 && kFirstSplit == 4);
static_assert(kFlags == 5 && kFirstRowTile == 6 && kLastRowTile == 7);
__device__ inline void write_part(const MetadataParams& params, int part, int4 work, int first_split,
                                  int first_row_tile = 0, int last_row_tile = 0, int flags = 0) {
    int4* columns = reinterpret_cast<int4*>(params.metadata + part * kColumns);
    columns[0] = work;  // first_row, first_tile, last_row, last_tile
    columns[1] = {first_split, flags, first_row_tile, last_row_tile};
}
constexpr int4 kNoWork = {0, 0, -1, 0};

}  // namespace flashmla
