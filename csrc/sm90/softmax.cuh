// The softmax of a row tile's scores as they come, tile after tile: what happens to S, P and O in registers.
#pragma once

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"
#include "row_tile.cuh"
#include "wgmma.cuh"

namespace flashmla::sm90 {

// The running softmax of a thread's two rows.
struct Softmax {
    // what exponents are relative to: the greatest scaled score so far, base 2, of both warpgroups' tiles
    float base[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};  // of P in the columns that the thread or its like of the other warpgroup has had
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// ------------------------------------------------------------------------------------------------------------ scores

// Keys that each of a thread's two rows sees.
__device__ __forceinline__ void visible_keys(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                             const Segment& segment, int (&visible)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const QueryRow row(params, rows.first_row + me.row(i));
        visible[i] =
            min(segment.length, params.causal ? segment.length - rows.num_queries(params) + 1 + row.s : segment.length);
    }
}

// Sets the scores of tile `tile` of keys that a row does not see to -inf. `visible`: keys that each of the two rows
// sees.
__device__ __forceinline__ void mask(const Consumer& me, int tile, const int (&visible)[2], float (&rS)[32]) {
    // a vote is known to be uniform; wgmmas under way across a branch that may not be would be serialised (C7518)
    if (!__any_sync(~0u, (tile + 1) * kTile > min(visible[0], visible[1]))) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (tile * kTile + me.column(j) + k % 2 >= visible[k / 2]) rS[4 * j + k] = -INFINITY;
        }
    }
}

// The same after scaling them.
__device__ __forceinline__ void scale_and_mask(const Consumer& me, float scale, int tile, const int (&visible)[2],
                                               float (&rS)[32]) {
    // an instruction of its own: fused with the subtraction of the base, the greatest exponent would not be 0
#pragma unroll
    for (int k = 0; k < 32; ++k) rS[k] = __fmul_rn(rS[k], scale);
    mask(me, tile, visible, rS);
}

__device__ __forceinline__ void row_maxima(const float (&rS)[32], float (&high)[2]) {
    float halves[2][2];  // shorter chains
#pragma unroll
    for (int k = 0; k < 32; ++k) {
        float& half = halves[k / 2 % 2][k % 2];
        half = k < 4 ? rS[k] : fmaxf(half, rS[k]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) high[i] = quad_max(fmaxf(halves[i][0], halves[i][1]));
}

// rS becomes exp2(rS - base), rP the same in T, as the register operand of P V; their sum is `sum`. The
// greatest P of a row must be exactly 1 (csrc/NOTES.md): otherwise T rounds it, as V's weight but not in the sum.
template <typename T>
__device__ __forceinline__ void exponentiate(const float (&base)[2], float (&rS)[32], uint32_t (&rP)[16],
                                             float (&sum)[2]) {
    const float from[2] = {base_of(base[0]), base_of(base[1])};
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int k = 0; k < 32; ++k) {
        rS[k] = ptx::exp2_approx(rS[k] - from[k / 2 % 2]);
        sum[k / 2 % 2] += rS[k];
        if (k % 2 == 1) rP[k / 2] = pack<T>(rS[k - 1], rS[k]);
    }
}

// P [64, 64] to a slice.
__device__ __forceinline__ void store_probabilities(const Consumer& me, const uint32_t (&rP)[16], void* slice) {
    const int row = me.warp * 16 + me.lane % 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        ptx::stmatrix_x4(ptx::shared_address(slice) + wgmma::swizzled(row, j + me.lane / 16), rP[2 * j], rP[2 * j + 1],
                         rP[2 * j + 2], rP[2 * j + 3]);
    }
}

// --------------------------------------------------------------------------------------------------- running softmax
// Both warpgroups have the same bits of base and sum after each tile: nothing may be fused with the addition of a sum.

// P's sum in a tile, after change_base.
__device__ __forceinline__ void add_sum(Softmax& softmax, const float (&sum)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) softmax.sum[i] = __fadd_rn(softmax.sum[i], sum[i]);
}

// Takes a new base into account: factor[i] is what the thread's row i of O is to be multiplied by.
__device__ __forceinline__ void change_base(Softmax& softmax, const float (&base)[2], float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        factor[i] = ptx::exp2_approx(softmax.base[i] - base_of(base[i]));
        softmax.base[i] = base[i];
        softmax.sum[i] = __fmul_rn(softmax.sum[i], factor[i]);
    }
}

// O *= factor, row by row. Where the base stays, most often after a row's first tiles, there is nothing to do.
__device__ __forceinline__ void rescale(const float (&factor)[2], float (&rO)[128]) {
    if (!__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
    for (int k = 0; k < 128; ++k) rO[k] *= factor[k / 2 % 2];
}

// What O is to be multiplied by to be normalised; its log-sum-exp, base 2, is that of the thread's two rows, -inf where
// no key was seen.
__device__ __forceinline__ void normaliser(const Softmax& softmax, float (&scale)[2], float (&lse_log2)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(softmax.sum[i]);
        const bool nothing = sum == 0.f;
        scale[i] = nothing ? 0.f : 1.f / sum;
        lse_log2[i] = nothing ? -INFINITY : softmax.base[i] + log2f(sum);
    }
}

__device__ __forceinline__ void normalise(const float (&scale)[2], float (&rO)[128]) {
#pragma unroll
    for (int k = 0; k < 128; ++k) rO[k] *= scale[k / 2 % 2];
}

}  // namespace flashmla::sm90
