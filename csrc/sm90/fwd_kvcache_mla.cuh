// What the decode kernels and the combine kernel share: dimensions, and how the plan is read.
#pragma once

#include "../check.h"
#include "../params.h"
#include "ptx.cuh"

namespace flashmla::sm90 {

constexpr int kDimQK = 576;
constexpr int kDimV = 512;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;

// The columns of a part that kernels read, clamped to the batch.
struct alignas(16) Part {
    int first_row, first_tile, last_row, last_tile;

    __device__ bool empty() const { return last_row < first_row; }
    // whether row r was begun by an earlier part
    __device__ bool continues(int r) const { return r == first_row && first_tile > 0; }
};

__device__ __forceinline__ Part load_part(const FwdParams& params, int part) {
    static_assert(kFirstRow == 0 && kFirstTile == 1 && kLastRow == 2 && kLastTile == 3);
    const int4 columns = *reinterpret_cast<const int4*>(params.metadata + part * kColumns);
    Part result = {columns.x, max(columns.y, 0), columns.z, max(columns.w, 0)};
    if (result.first_row < 0) {
        result.first_row = 0;
        result.first_tile = 0;
    }
    result.last_row = min(result.last_row, params.b - 1);
    return result;
}

__device__ __forceinline__ int clamped_length(const FwdParams& params, int row) {
    return min(max(params.cache_seqlens[row], 0), params.max_len);
}

__device__ __forceinline__ int num_tiles(int length) { return length / kTile + (length % kTile != 0); }

// Places in the workspace: part p's shares of its first row, when an earlier part began it, and of its last, when a
// later one ends it.
__device__ __forceinline__ int first_place(int part) { return 2 * part; }
__device__ __forceinline__ int last_place(int part) { return 2 * part + 1; }

// A part's share of one batch row.
struct Segment {
    int row;
    int length;      // keys of the row
    int begin, end;  // tiles
    int place;       // in the workspace; -1 if the row is whole
};

// Fills parts[i] with the CTA's i-th part of the plan, of which it takes every gridDim.y-th, from one read of the whole
// plan by all the CTA's threads. Whether some part that the plan uses has no places in the workspace. Ends in a
// barrier.
__device__ __forceinline__ bool read_plan(const FwdParams& params, Part (&parts)[kMaxParts]) {
    bool without_places = false;
    for (int part = threadIdx.x; part < params.plan_parts; part += blockDim.x) {
        const Part p = load_part(params, part);
        if (part % gridDim.y == blockIdx.y) {
            parts[part / gridDim.y] = p;
            // what comes next, from memory while others still wait for the plan
            if (!p.empty()) {
                const int page = p.first_tile / (params.page_size / kTile);
                ptx::prefetch_l2(params.cache_seqlens + p.first_row);
                if (page < params.max_len / params.page_size) {
                    ptx::prefetch_l2(params.block_table + p.first_row * params.table_stride + page);
                }
            }
        }
        without_places |= part >= params.split_parts && !p.empty();
    }
    return __syncthreads_or(without_places);
}

// Calls body(segment) for the CTA's parts, in order.
template <typename Body>
__device__ __forceinline__ void for_each_segment(const FwdParams& params, const Part (&parts)[kMaxParts], bool unsplit,
                                                 Body&& body) {
    for (int i = 0, index = blockIdx.y; index < params.plan_parts; ++i, index += gridDim.y) {
        const Part& p = parts[i];  // read anew for each row: registers are short while it is worked on
        for (int row = p.first_row; row <= p.last_row; ++row) {
            const int length = clamped_length(params, row);
            const int tiles = num_tiles(length);
            const bool continued = p.continues(row);
            Segment segment = {row, length, 0, tiles, -1};
            if (unsplit) {
                if (continued) continue;
            } else {
                const bool cut = row == p.last_row && p.last_tile < tiles;
                segment.end = cut ? p.last_tile : tiles;
                segment.begin = continued ? min(p.first_tile, segment.end) : 0;
                segment.place = continued ? first_place(index) : cut ? last_place(index) : -1;
            }
            body(segment);
        }
    }
}

}  // namespace flashmla::sm90
