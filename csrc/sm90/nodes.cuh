// The nodes of a row's tree under a batch-invariant plan (units.cuh): the normalised output of some of its units and
// its lse, base 2. Two of them are merged to the same bits wherever that happens: in a decode kernel's registers, where
// one comes from memory and the other may have been there, or in fwd_kvcache_mla_merge_nodes.cu.
//
// Of calls in bf16 a node is rounded to fp16, in registers too: stores and loads of nodes are what a unit costs beside
// its tiles (csrc/NOTES.md). Its values are relative to a power of two for each query row and warp
// (greatest_power): by the greatest value of a unit, and of two nodes the greater one. So a rounding is to 11 bits of
// values down to 2^-28 of the greatest, and those below come out averaged: less than the result's own rounding to 8. In
// fp16 that would show; there nodes are in fp32, and the power is 1.
#pragma once

#include <type_traits>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"
#include "row_tile.cuh"
#include "softmax.cuh"
#include "units.cuh"

namespace flashmla::sm90 {

template <typename T>
constexpr bool kHalfNodes = std::is_same_v<T, __nv_bfloat16>;

// 16-byte vectors that 8 values of a node take: accumulators 8 j .. 8 j + 7 of a thread, or those of one block of
// columns (few rows).
template <typename T>
constexpr int kNodeVectors = kHalfNodes<T> ? 1 : 2;

// A node's head, of a row: lse, base 2; what its values are relative to.
using Head = float2;

// What two nodes count in the one that they become, for values relative to theirs, and that one's head. Either comes
// first.
struct NodeWeights : Weights {
    float power;

    __device__ NodeWeights(Head x, Head y) : Weights(x.x, y.x), power(fmaxf(x.y, y.y)) {
        a *= x.y * inverse_power(power);
        b *= y.y * inverse_power(power);
    }
    __device__ Head head() const { return {lse_log2, power}; }
};

// Values as they are in memory.
template <typename T, int kCount>
__device__ __forceinline__ void round_node(float (&x)[kCount]) {
    if constexpr (kHalfNodes<T>) {
#pragma unroll
        for (int k = 0; k < kCount; k += 2) {
            const float2 pair = unpack_halves(pack_halves(x[k], x[k + 1]));
            x[k] = pair.x;
            x[k + 1] = pair.y;
        }
    }
}

// Eight of a thread's values as the vectors that they take in memory.
template <typename T>
struct NodeValues {
    uint4 vectors[kNodeVectors<T>];

    __device__ explicit NodeValues(const float* x) {
        if constexpr (kHalfNodes<T>) {
            vectors[0] = {pack_halves(x[0], x[1]), pack_halves(x[2], x[3]), pack_halves(x[4], x[5]),
                          pack_halves(x[6], x[7])};
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i, x += 4) {
                vectors[i] = {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                              __float_as_uint(x[3])};
            }
        }
    }
};

// To memory, the vectors 128 apart. L2 keeps nodes longer than keys: they are read again a unit later (csrc/NOTES.md).
template <typename T>
__device__ __forceinline__ void store_values(uint4* to, const float* x) {
    const NodeValues<T> values(x);
#pragma unroll
    for (int i = 0; i < kNodeVectors<T>; ++i) ptx::store_evict_last(to + 128 * i, values.vectors[i]);
}

// Where a node lies: tile `tile` of the workspace, of kTileRows x 512 values, and its heads.
template <typename T, int kTileRows>
__device__ __forceinline__ uint4* node_values(const FwdParams& params, int64_t tile) {
    return reinterpret_cast<uint4*>(params.partial_out) + tile * (kTileRows * kDimV / 8 * kNodeVectors<T>);
}

// A thread's heads, of kCount rows, lie [tile, 8 warps, kCount, lane]: as it has them, so that what a thread reads it
// wrote itself, and nobody waits for stores.
template <int kCount>
__device__ __forceinline__ Head* node_heads(const FwdParams& params, int64_t tile, int warp, int lane) {
    return reinterpret_cast<Head*>(params.partial_lse) + (tile * 8 + warp) * (32 * kCount) + lane;
}
template <int kCount>
__device__ __forceinline__ void load_heads(const Head* from, Head (&heads)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) heads[i] = __ldcg(from + 32 * i);
}
template <int kCount>
__device__ __forceinline__ void store_heads(Head* to, const Head (&heads)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) __stcg(to + 32 * i, heads[i]);
}

// What parts leave, as it is listed for fwd_kvcache_mla_merge_nodes.cu: a row, of uneven queries one of its blocks, and
// where in its tree the node ends, in units.
struct Listed {
    int2 words;

    __device__ explicit Listed(int2 words) : words(words) {}
    __device__ Listed(int row, int block, int end_unit) : words(make_int2(row, block << kEndBits | end_unit)) {}
    __device__ int row() const { return words.x; }
    __device__ int block() const { return words.y >> kEndBits; }
    __device__ int end_unit() const { return words.y & ((1 << kEndBits) - 1); }
    __device__ bool beside(const Listed& other) const { return row() == other.row() && block() == other.block(); }

  private:
    static constexpr int kEndBits = 8;
    static_assert(kMaxUnits < 1 << kEndBits);
};

// Lists a node if it is left. One thread of all row tiles'.
__device__ __forceinline__ void list_node(const FwdParams& params, const Unit& unit, int index, int end_unit) {
    if (index < unit.leaves) params.nodes[unit.leaf + index] = Listed(unit.row, unit.block, end_unit).words;
}

// Whether a unit's result, with what it is merged with, is the whole row's.
__device__ __forceinline__ bool makes_row(const Unit& unit) { return unit.ends && unit.leaves == 0; }

// --------------------------------------------------------------------------- of 64 query rows, in two warpgroups' rO

// Where a thread has its accumulators of a node: [warpgroup, 16, kNodeVectors, 128 threads].
template <typename T>
__device__ __forceinline__ uint4* node_of(const FwdParams& params, int64_t tile, int warpgroup, const Consumer& me) {
    return node_values<T, kRowTile>(params, tile) + warpgroup * (16 * 128 * kNodeVectors<T>)+me.warp * 32 + me.lane;
}

// A unit's result, which is to be multiplied by `scale` to be normalised, becomes a node.
template <typename T>
__device__ __forceinline__ void make_node(const float (&scale)[2], float (&rO)[128], float (&power)[2]) {
    float factor[2] = {scale[0], scale[1]};
    power[0] = power[1] = 1.f;
    if constexpr (kHalfNodes<T>) {
        greatest_finite(rO, power);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            power[i] = greatest_power(power[i] * scale[i]);
            factor[i] *= inverse_power(power[i]);
        }
    }
    normalise(factor, rO);
}

// And a node the row's result.
template <typename T>
__device__ __forceinline__ void unmake_node(const float (&power)[2], float (&rO)[128]) {
    if constexpr (kHalfNodes<T>) normalise(power, rO);
}

// Merges the node in a tile of the workspace into the one in registers. `staging`: 32 KB of the warpgroup's.
template <typename T>
__device__ __forceinline__ void add_node(const FwdParams& params, const RowTile& rows, const Consumer& me, int64_t tile,
                                         int warpgroup, float (&lse_log2)[2], float (&power)[2], float (&rO)[128],
                                         void* staging) {
    if (!has_rows(params, rows, me)) return;
    __threadfence_block();  // it may be this thread that stored it, a unit ago; cp.async goes by no thread's order
    Head other[2];
    load_heads(node_heads<2>(params, tile, 4 * warpgroup + me.warp, me.lane), other);
    merge_stored<kHalfNodes<T>>(me, node_of<T>(params, tile, warpgroup, me), rO, staging, [&] {
        round_node<T>(rO);
        const NodeWeights weights[2] = {{{lse_log2[0], power[0]}, other[0]}, {{lse_log2[1], power[1]}, other[1]}};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            lse_log2[i] = weights[i].lse_log2;
            power[i] = weights[i].power;
        }
        return RowWeights{{weights[0], weights[1]}};
    });
}

template <typename T>
__device__ __forceinline__ void store_node(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                           int64_t tile, int warpgroup, const float (&lse_log2)[2],
                                           const float (&power)[2], const float (&rO)[128]) {
    if (!has_rows(params, rows, me)) return;
    uint4* to = node_of<T>(params, tile, warpgroup, me);
#pragma unroll
    for (int j = 0; j < 16; ++j) store_values<T>(to + j * 128 * kNodeVectors<T>, rO + 8 * j);
    const Head heads[2] = {{lse_log2[0], power[0]}, {lse_log2[1], power[1]}};
    store_heads(node_heads<2>(params, tile, 4 * warpgroup + me.warp, me.lane), heads);
}

}  // namespace flashmla::sm90
