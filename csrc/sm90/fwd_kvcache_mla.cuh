// What the decode kernels and the combine kernel share: dimensions, and how the plan is read.
#pragma once

#include "../check.h"
#include "../params.h"

namespace flashmla::sm90 {

constexpr int kDimQK = 576;
constexpr int kDimV = 512;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;

// The columns of a part that kernels read, clamped to the batch.
struct Part {
    int first_row, first_tile, last_row, last_tile;

    __device__ bool empty() const { return last_row < first_row; }
    // whether row r was begun by an earlier part
    __device__ bool continues(int r) const { return r == first_row && first_tile > 0; }
};

__device__ __forceinline__ Part load_part(const FwdParams& params, int part) {
    const int* columns = params.metadata + part * kColumns;
    Part result = {columns[kFirstRow], max(columns[kFirstTile], 0), columns[kLastRow], max(columns[kLastTile], 0)};
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

// Whether some part of the plan, of those this thread looks at, has no places in the workspace.
__device__ __forceinline__ bool uses_parts_without_workspace(const FwdParams& params) {
    bool found = false;
    for (int part = params.split_parts + threadIdx.x; part < params.plan_parts; part += blockDim.x) {
        found |= !load_part(params, part).empty();
    }
    return found;
}

// A part's share of one batch row.
struct Segment {
    int row;
    int length;      // keys of the row
    int begin, end;  // tiles
    int place;       // in the workspace; -1 if the row is whole
};

// Calls body(segment) for the CTA's parts, in order. To be called by whole warps, which all see the same segments.
template <typename Body>
__device__ __forceinline__ void for_each_segment(const FwdParams& params, bool unsplit, Body&& body) {
    const int stride = gridDim.y, lane = threadIdx.x % 32;
    for (int first = blockIdx.y; first < params.plan_parts; first += 32 * stride) {
        // every lane reads one part, so that empty ones cost nothing
        const int mine = first + lane * stride;
        const Part part = mine < params.plan_parts ? load_part(params, mine) : Part{0, 0, -1, 0};
        for (uint32_t busy = __ballot_sync(~0u, !part.empty()); busy != 0; busy &= busy - 1) {
            const int source = __ffs(busy) - 1;
            const Part p = {__shfl_sync(~0u, part.first_row, source), __shfl_sync(~0u, part.first_tile, source),
                            __shfl_sync(~0u, part.last_row, source), __shfl_sync(~0u, part.last_tile, source)};
            const int index = first + source * stride;
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
}

}  // namespace flashmla::sm90
