// What a row tile's results are and how they leave: from the accumulators of two warpgroups, of 256 output columns
// each, through shared memory, so that whole lines go to memory, to `out` and `lse` or to a place in the workspace.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"

namespace flashmla::sm90 {

constexpr int kHalfV = kDimV / 2;  // output columns of a warpgroup

// Which query rows a CTA has: rows first_row .. of key head `head`, out of params.rows.
struct RowTile {
    int index, head, first_row;
};

// Where a consumer thread stands. A warpgroup's accumulators give a thread two rows of the row tile, 8 apart, and in
// them the columns 8 j + 2 (lane % 4) + {0, 1}.
struct Consumer {
    int warp, lane;  // warp: of its warpgroup's 4

    __device__ int row(int i) const { return warp * 16 + lane / 4 + 8 * i; }  // i = 0, 1
    __device__ int column(int j) const { return 8 * j + lane % 4 * 2; }
};

// The running softmax of a thread's two rows.
struct Softmax {
    float max[2] = {-INFINITY, -INFINITY};  // of the scaled scores of both warpgroups' tiles, base 2
    float sum[2] = {0.f, 0.f};              // of this thread's columns of the tiles its warpgroup scored
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&packed, &pair, 4);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        memcpy(&packed, &pair, 4);
    }
    return packed;
}

// Where a 16-byte chunk of a row of 512 bytes lies in `staging`, so that neither rows nor columns collide in banks.
__device__ __forceinline__ uint8_t* staged(void* staging, int row, int chunk) {
    return static_cast<uint8_t*>(staging) + row * 512 + ((chunk ^ (row & 7)) << 4);
}

// Where query rows go: row r of the row tile is query s of the key head's query head g, in the order (s, g).
struct OutRows {
    int64_t at;  // in [b, s_q, h_q]
    int g, group, h_q;

    __device__ OutRows(const FwdParams& params, const RowTile& rows, int batch_row, int r)
        : g((rows.first_row + r) % params.group), group(params.group), h_q(params.h_q) {
        const int s = (rows.first_row + r) / params.group;
        at = (int64_t{batch_row} * params.s_q + s) * params.h_q + rows.head * params.group + g;
    }
    __device__ void next() {
        const bool wraps = ++g == group;
        at += wraps ? 1 + h_q - group : 1;
        if (wraps) g = 0;
    }
};

// Copies `count` of a warp's 16 staged rows to memory; next() gives one after the other's address.
template <typename Next>
__device__ __forceinline__ void copy_rows(const Consumer& me, void* staging, int count, Next&& next) {
    constexpr int kAtOnce = 4;
    __syncwarp();
    for (int first = 0; first < count; first += kAtOnce) {
        int4 chunks[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            chunks[i] = *reinterpret_cast<const int4*>(staged(staging, me.warp * 16 + first + i, me.lane));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            int4* to = reinterpret_cast<int4*>(next());
            if (first + i < count) to[me.lane] = chunks[i];
        }
    }
    __syncwarp();
}

// A segment's result: to its place in the workspace if it is a share of a split row, else to out and lse. `staging`:
// 32 KB of the warpgroup's.
template <typename T>
__device__ __forceinline__ void store_result(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                             const Segment& segment, int warpgroup, const Softmax& softmax,
                                             const float (&rO)[128], void* staging) {
    const bool partial = segment.place >= 0;
    const int64_t place = (int64_t{segment.place} * params.row_tiles + rows.index) * kRowTile;
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool nothing = softmax.sum[i] == 0.f;
        scale[i] = nothing ? 0.f : 1.f / softmax.sum[i];
        const int row = rows.first_row + me.row(i);
        if (warpgroup == 0 && me.lane % 4 == 0 && row < params.rows) {
            const float lse_log2 = nothing ? -INFINITY : softmax.max[i] + log2f(softmax.sum[i]);
            const int s = row / params.group, h = rows.head * params.group + row % params.group;
            if (partial) {
                params.partial_lse[place + me.row(i)] = lse_log2;
            } else {
                params.lse[(int64_t{segment.row} * params.h_q + h) * params.s_q + s] =
                    nothing ? INFINITY : lse_log2 * kLn2;
            }
        }
    }

    const int first = me.warp * 16;
    const int count = min(16, params.rows - rows.first_row - first);  // rows of the warp that exist; may be negative
    if (partial) {
#pragma unroll
        for (int round = 0; round < 2; ++round) {  // 128 columns
#pragma unroll
            for (int j = 0; j < 16; ++j) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int k = 4 * (16 * round + j) + 2 * i;
                    uint8_t* at = staged(staging, me.row(i), 2 * j + me.lane % 4 / 2) + me.lane % 2 * 8;
                    *reinterpret_cast<float2*>(at) = make_float2(rO[k] * scale[i], rO[k + 1] * scale[i]);
                }
            }
            float* out = params.partial_out + (place + first) * kDimV + warpgroup * kHalfV + round * 128;
            copy_rows(me, staging, count, [&] {
                float* row = out;
                out += kDimV;
                return row;
            });
        }
    } else {
#pragma unroll
        for (int j = 0; j < 32; j += 2) {
            const int k = 4 * j;
            ptx::stmatrix_x4(ptx::shared_address(staged(staging, first + me.lane % 16, j + me.lane / 16)),
                             pack<T>(rO[k] * scale[0], rO[k + 1] * scale[0]),
                             pack<T>(rO[k + 2] * scale[1], rO[k + 3] * scale[1]),
                             pack<T>(rO[k + 4] * scale[0], rO[k + 5] * scale[0]),
                             pack<T>(rO[k + 6] * scale[1], rO[k + 7] * scale[1]));
        }
        OutRows out(params, rows, segment.row, first);
        copy_rows(me, staging, count, [&] {
            T* row = static_cast<T*>(params.out) + out.at * kDimV + warpgroup * kHalfV;
            out.next();
            return row;
        });
    }
}

// The result of a segment without keys, by the CTA's first `warps` warps.
template <typename T>
__device__ __forceinline__ void store_nothing(const FwdParams& params, const RowTile& rows, const Segment& segment,
                                              int warps) {
    for (int r = threadIdx.x / 32; r < kRowTile && rows.first_row + r < params.rows; r += warps) {
        const int row = rows.first_row + r, lane = threadIdx.x % 32;
        const int s = row / params.group, h = rows.head * params.group + row % params.group;
        if (segment.place >= 0) {
            const int64_t place = (int64_t{segment.place} * params.row_tiles + rows.index) * kRowTile + r;
            float4* out = reinterpret_cast<float4*>(params.partial_out + place * kDimV);
            for (int i = lane; i < kDimV / 4; i += 32) out[i] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (lane == 0) params.partial_lse[place] = -INFINITY;
        } else {
            const int64_t at = (int64_t{segment.row} * params.s_q + s) * params.h_q + h;
            int4* out = reinterpret_cast<int4*>(static_cast<T*>(params.out) + at * kDimV);
            for (int i = lane; i < kDimV * static_cast<int>(sizeof(T)) / 16; i += 32) out[i] = make_int4(0, 0, 0, 0);
            if (lane == 0) params.lse[(int64_t{segment.row} * params.h_q + h) * params.s_q + s] = INFINITY;
        }
    }
}

}  // namespace flashmla::sm90
