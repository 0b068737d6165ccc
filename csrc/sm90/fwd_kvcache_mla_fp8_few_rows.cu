// fwd_kvcache_mla over caches in fp8 for up to 16 query rows a key head: what fwd_kvcache_mla_fp8.cu computes, from the
// same plan. Here memory is what bounds a call, so bytes come to shared memory as they lie in the cache, and are
// converted on the way from there to the operands of a warp's products (e4m3_tile.cuh), of whose 16 rows none is
// wasted.
//
// What is multiplied. Scores: e4m3 as it is, in fp16, to which the machine converts a pair in one instruction; queries
// in bf16 become fp16 row by row, in units of a power of two (load_bf16_queries); a block's scale multiplies the sum of
// its products; rotated values in bf16 or fp16, as the queries. P V: with one scale for all in fp16, which has V's
// values and P down to 2^-16 more exactly than bf16 (below 2^-25 of the part's greatest it is 0: at most 4 thousandths
// of a result in a part of 2^17 keys); else in T, bf16 or fp16 as the queries, where in bf16 it is P that a scale of
// few digits multiplies.
//
// Limits, beyond what quantize() makes of activations. Queries in fp16: a token's scale above 65504 gives NaN, and one
// of 128 or more leaves its warp's seven other keys fewer digits of scales below 2^-14. The kernel for more rows has no
// such limit.
//
// Grid: (row tiles, parts at work at once), as there. 1 CTA a multiprocessor.
//
// Warp roles. Warps 0-7 each score 8 of a tile's 64 keys, and accumulate P V for 64 of the 512 output columns. Between
// the two is P, in shared memory. Warp 8 loads keys, warps 9-11 queries.
//
// A turn of the consumers' loop has one barrier: P of tile i, for which all warps' maxima were there before the last
// one; scores of tile i + 1; the barrier; P V of tile i.
//
// Safety. As in fwd_kvcache_mla.cu. Tokens past a row's length are not read. Their P is 0, and what stands in their
// place is finite: zeros with one scale for all; else whatever was there, of which e4m3's NaN is told from numbers only
// for the scores, and a scale of 0.

#include <cuda/ptx>

#include "e4m3.cuh"
#include "e4m3_tile.cuh"
#include "fwd_kvcache_mla.cuh"
#include "row_tile.cuh"

namespace flashmla::sm90 {
namespace {

// ------------------------------------------------------------------------------------------------------------ config

constexpr int kRows = kFewRows;  // 16
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kQueryWarps = 3;
constexpr int kThreads = kConsumers + 32 * (1 + kQueryWarps);
constexpr int kConsumerRegisters = 224;  // Q takes 16 a slice, O 32
constexpr int kProducerRegisters = 56;
constexpr int kWarpTokens = kTile / kConsumerWarps;   // that a warp scores
constexpr int kWarpColumns = kDimV / kConsumerWarps;  // of the output

template <CacheFormat kFormat>
constexpr int kStages = kFormat == CacheFormat::kFp8Blocks ? 4 : 5;

template <typename T, CacheFormat kFormat>
struct SharedStorage {
    alignas(128) uint8_t ring[kStages<kFormat>][kTile * Layout<kFormat>::kRowBytes];
    uint4 queries[kSlices][4][32];  // see Queries
    float query_units[kRows];       // of rows: see to_units
    // by tiles in turn
    alignas(128) T sP[2][kRows * kTile];
    alignas(16) float high[2][kRows][kConsumerWarps];  // rows' maxima over each warp's keys
    alignas(16) uint32_t units[2][kConsumerWarps];     // see Factors
    T great[2][kBlocks][kTile], small[2][kBlocks][kTile];
    alignas(16) float sum[kRows][kConsumerWarps];  // at a row's end
    Part parts[kMaxParts];                         // the plan
    uint64_t landed[kStages<kFormat>], freed[kStages<kFormat>];
    uint64_t queries_landed, queries_freed;
};

enum Barrier { kAll = 1 };  // named; of the consumers

// ----------------------------------------------------------------------------------------------- producers (4 warps)

// 8 values of a query row to where products have them. Their order is that of the keys' bytes, or of the rope's values,
// if it is stored in bf16.
template <typename T, CacheFormat kFormat>
__device__ __forceinline__ void store_query_chunk(SharedStorage<T, kFormat>& shared, int row, int chunk,
                                                  const uint4& values) {
    const int slice = chunk / 8, i = chunk % 8;
    const bool in_bf16 = Layout<kFormat>::kScaled && slice == kSlices - 1;
    const int column = in_bf16 ? i % 4 : i / 2, half = in_bf16 ? i / 4 : i % 2;
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        auto* to = reinterpret_cast<uint32_t*>(&shared.queries[slice][2 * half + k / 2][row % 8 * 4 + column]);
        to[k % 2 * 2 + row / 8] = words[k];
    }
}

// Rows in bf16, of which what multiplies e4m3 becomes fp16 (to_units).
template <CacheFormat kFormat>
__device__ __forceinline__ void load_bf16_queries(const FwdParams& params,
                                                  SharedStorage<__nv_bfloat16, kFormat>& shared, const RowTile& rows,
                                                  const Segment& segment, int warp) {
    constexpr int kTogether = 2, kChunks = kDimQK / 8, kOfLane = 3;
    constexpr int kInFP16 = Layout<kFormat>::kScaled ? kDimV / 8 : kChunks;  // chunks
    const int lane = threadIdx.x % 32, count = rows.count(params);
#pragma unroll 1
    for (int first = warp * kTogether; first < count; first += kTogether * kQueryWarps) {
        uint4 chunks[kTogether][kOfLane];
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
            const auto* from = query_row<__nv_bfloat16>(params, rows, segment.row, min(first + r, count - 1));
#pragma unroll
            for (int i = 0; i < kOfLane; ++i) {
                const int chunk = i * 32 + lane;
                chunks[r][i] = {};
                if (chunk < kChunks) chunks[r][i] = __ldcg(reinterpret_cast<const uint4*>(from) + chunk);
            }
        }
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
            uint32_t greatest = 0;  // of magnitudes, as bits
#pragma unroll
            for (int i = 0; i < kOfLane; ++i) {
                if (i * 32 < kInFP16) greatest = __vmaxu2(greatest, greatest_finite(chunks[r][i]));
            }
            const float factor = to_units(__reduce_max_sync(~0u, max(greatest & 0xffff, greatest >> 16)));
            if (lane == 0 && first + r < count) leave_unit(shared.query_units[first + r], factor);
#pragma unroll
            for (int i = 0; i < kOfLane; ++i) {
                const int chunk = i * 32 + lane;
                if (chunk >= kChunks || first + r >= count) continue;
                if (chunk < kInFP16) chunks[r][i] = fp16_of_bf16(chunks[r][i], factor);
                store_query_chunk(shared, first + r, chunk, chunks[r][i]);
            }
        }
    }
}

// kQueryWarps warps: the segment's queries, while the last one's are in registers.
template <typename T, CacheFormat kFormat, bool kFp8Queries>
__device__ __forceinline__ void load_queries(const FwdParams& params, SharedStorage<T, kFormat>& shared,
                                             const RowTile& rows, const Segment& segment, int warp, uint32_t& phase) {
    if (segment.begin == segment.end) return;
    const int lane = threadIdx.x % 32;
    using Stored = std::conditional_t<kFp8Queries, uint8_t, T>;
    const auto to_l2 = [&](int row) {  // all at once, since memory is slow to answer while keys are on their way
        if (warp == 0 && lane < rows.count(params)) {
            ptx::prefetch_bulk_l2(query_row<Stored>(params, rows, row, lane), kDimQK * sizeof(Stored));
        }
    };
    to_l2(segment.row);
    if (segment.more) to_l2(segment.row + 1);
    wait(&shared.queries_freed, phase ^ 1);
    phase ^= 1;
    if constexpr (kIsBF16<T>) {
        load_bf16_queries(params, shared, rows, segment, warp);
        __syncwarp();
        if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_landed);
        return;
    }
    constexpr int kChunks = kDimQK * sizeof(Stored) / 16;  // of 16 bytes in memory
    constexpr int kAtOnce = kFp8Queries ? 3 : 4;
    const int count = rows.count(params) * kChunks;
    for (int first = warp * 32 + lane; first < count; first += kAtOnce * 32 * kQueryWarps) {
        uint4 chunks[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = first + i * 32 * kQueryWarps, row = at / kChunks;
            if (at >= count) continue;
            const Stored* from = query_row<Stored>(params, rows, segment.row, row);
            chunks[i] = __ldcg(reinterpret_cast<const uint4*>(from) + at % kChunks);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = first + i * 32 * kQueryWarps, row = at / kChunks, chunk = at % kChunks;
            if (at >= count) continue;
            if constexpr (kFp8Queries) {
                uint4 converted[2];
                convert<T>(chunks[i], converted);
                store_query_chunk(shared, row, 2 * chunk, converted[0]);
                store_query_chunk(shared, row, 2 * chunk + 1, converted[1]);
            } else {
                store_query_chunk(shared, row, chunk, chunks[i]);
            }
        }
    }
    __syncwarp();
    if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_landed);
}

// ------------------------------------------------------------------------------------------------ consumers (8 warps)

// A lane's rows of products are lane / 4 + {0, 8}; of their 8 columns it has lane % 4 * 2 + {0, 1}.
struct Lane {
    int row, column;  // lane / 4, lane % 4: of operands of 8 rows and 16 bytes a lane
};

// Slices of queries that stay in registers; with all of them too few are left to convert values side by side.
template <CacheFormat kFormat>
constexpr int kHeld = Layout<kFormat>::kScaled ? 5 : 7;
// From the ring, which the keys' warp fills (load_tokens).
template <typename Vector>
__device__ __forceinline__ Vector take_bytes(const uint8_t* shared_place, int at) {
    return *reinterpret_cast<const Vector*>(shared_place + at);
}

// One of a lane's operands in shared memory, which the queries' warps leave there (store_query_chunk).
__device__ __forceinline__ uint4 take_query_chunk(const uint4* shared_operands, int slice, int step) {
    return shared_operands[(slice * 4 + step) * 32];
}

// Queries, as the operands of products: of the rows lane / 4 + {0, 8} the dimensions 16 (lane % 4) + 4 step + {0,
// 1} of a slice, then those two further.
template <int kHeld>
struct alignas(16) Queries {
    uint32_t held[kHeld][4][4];
    float units[2];       // what the rows are to be multiplied by
    const uint4* others;  // this lane's in shared memory

    __device__ __forceinline__ void take(int slice, int step, uint32_t (&fragment)[4]) const {
        const uint4 values = slice < kHeld ? *reinterpret_cast<const uint4*>(held[slice < kHeld ? slice : 0][step])
                                           : take_query_chunk(others, slice, step);
        fragment[0] = values.x;
        fragment[1] = values.y;
        fragment[2] = values.z;
        fragment[3] = values.w;
    }
};

// A turn's softmax of a lane's two rows.
struct RowSoftmax {
    float base[2] = {-INFINITY, -INFINITY};  // the greatest scaled score so far, base 2
    float sum[2] = {0.f, 0.f};               // over this lane's keys
};

// S of the warp's 8 keys, of which `key` is this lane's, and `scored` are those of its scores. Latents are multiplied
// in fp16, and their scales, or those' powers of two if they are other numbers, the sums of a block's products.
template <typename T, CacheFormat kFormat, bool kPlain>
__device__ __forceinline__ void score(const uint8_t* key, const uint8_t* const (&scored)[2], const Lane& me,
                                      const Queries<kHeld<kFormat>>& queries, const Factors& factors, float (&rS)[4]) {
    using L = Layout<kFormat>;
    constexpr int kGroups = L::kScaled ? kLatents / kBlocks : kSlices;  // slices that are asked for together
    constexpr int kOfGroup = L::kScaled ? kBlocks : 1;
    float sums[4][4] = {};  // of blocks, or four so that no product waits for the one before
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        uint4 chunks[kOfGroup];
#pragma unroll
        for (int j = 0; j < kOfGroup; ++j) {
            chunks[j] = take_bytes<uint4>(key, (group + kGroups * j) * 64 + me.column * 16);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < kOfGroup; ++j) {
                const uint32_t words[4] = {chunks[j].x, chunks[j].y, chunks[j].z, chunks[j].w};
                uint32_t b0 = ptx::fp16_of_e4m3<0>(words[i]), b1 = ptx::fp16_of_e4m3<1>(words[i]);
                if constexpr (!kPlain) {
                    const float mantissa = __shfl_sync(~0u, factors.mantissa, me.row * 4 + j);
                    b0 = times_rounded<T>(b0, mantissa);
                    b1 = times_rounded<T>(b1, mantissa);
                }
                uint32_t q[4];
                queries.take(group + kGroups * j, i, q);
                ptx::mma_m16n8k16<false>(sums[L::kScaled ? j : i], q, b0, b1);
            }
        }
    }
    if constexpr (L::kScaled) {
        float ropes[2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 rope = convert_bf16<T>(take_bytes<uint4>(key, L::kRope + half * 64 + me.column * 16));
            uint32_t q[2][4];
            queries.take(kLatents, 2 * half, q[0]);
            queries.take(kLatents, 2 * half + 1, q[1]);
            ptx::mma_m16n8k16<kIsBF16<T>>(ropes[0], q[0], rope.x, rope.y);
            ptx::mma_m16n8k16<kIsBF16<T>>(ropes[1], q[1], rope.z, rope.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) rS[i] = ropes[0][i] + ropes[1][i];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float4 four = take_bytes<float4>(scored[k], L::kScales);
            float scales[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {
                if constexpr (!kPlain) scales[j] = power_of(scales[j]);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float scale = kIsBF16<T> ? scales[j] * queries.units[h] : scales[j];
                    rS[2 * h + k] = fmaf(sums[j][2 * h + k], scale, rS[2 * h + k]);
                }
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            rS[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
            if constexpr (kIsBF16<T>) rS[i] *= queries.units[i / 2];
        }
    }
}

// Scales the scores of the warp's keys, and sets those that a query row does not see to -inf. `keys`: this lane's.
__device__ __forceinline__ void scale_and_mask(const FwdParams& params, const RowTile& rows, const Lane& me,
                                               const Segment& segment, int tile, const int (&keys)[2], float scale_log2,
                                               float (&rS)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) rS[k] = __fmul_rn(rS[k], scale_log2);  // for itself: see the kernel for plain caches
    const int seen_by_all = params.causal ? segment.length - rows.num_queries(params) + 1 : segment.length;
    if (!__any_sync(~0u, (tile + 1) * kTile > seen_by_all)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const QueryRow row(params, me.row + 8 * h);
        const int visible = min(segment.length, params.causal ? seen_by_all + row.s : segment.length);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (tile * kTile + keys[i] >= visible) rS[2 * h + i] = -INFINITY;
        }
    }
}

// Leaves the rows' maxima over this warp's keys for all.
__device__ __forceinline__ void leave_maxima(const Lane& me, int warp, const float (&rS)[4],
                                             float (&high)[kRows][kConsumerWarps]) {
    float mine[2] = {fmaxf(rS[0], rS[1]), fmaxf(rS[2], rS[3])};
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) mine[h] = fmaxf(mine[h], __shfl_xor_sync(~0u, mine[h], lanes));
    }
    if (me.column < 2) high[me.row + 8 * me.column][warp] = me.column == 0 ? mine[0] : mine[1];
}

template <typename Combine>
__device__ __forceinline__ float over_warps(const float (&of_warps)[kConsumerWarps], Combine&& combine) {
    const float4 a = *reinterpret_cast<const float4*>(of_warps), b = *reinterpret_cast<const float4*>(of_warps + 4);
    return combine(combine(combine(a.x, a.y), combine(a.z, a.w)), combine(combine(b.x, b.y), combine(b.z, b.w)));
}

// From scores to P, in sP [row, place], which is swizzled as wgmma's slices are.
template <typename T>
__device__ __forceinline__ void leave_probabilities(const Lane& me, int warp, const float (&rS)[4],
                                                    const float (&high)[kRows][kConsumerWarps], RowSoftmax& softmax,
                                                    float (&factor)[2], void* sP) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = me.row + 8 * h;
        const float most = over_warps(high[row], [](float a, float b) { return fmaxf(a, b); });
        const float base = fmaxf(most, softmax.base[h]), from = base_of(base);
        factor[h] = ptx::exp2_approx(softmax.base[h] - from);
        softmax.base[h] = base;
        const float p[2] = {ptx::exp2_approx(rS[2 * h] - from), ptx::exp2_approx(rS[2 * h + 1] - from)};
        softmax.sum[h] = softmax.sum[h] * factor[h] + (p[0] + p[1]);
        const uint32_t packed = pack<T>(p[0], p[1]);
        memcpy(static_cast<char*>(sP) + wgmma::swizzled(row, warp) + me.column * 4, &packed, 4);
    }
}

// O [16, 64] += P V: product n has the columns 8 (lane / 4) + n. `keys`: at first the address of column 8 (lane / 4)
// of this lane's four keys of the first 16.
template <typename T, CacheFormat kFormat, bool kPlain>
__device__ __forceinline__ void accumulate(const uint8_t* const (&keys)[4], const Lane& me, const T* sP,
                                           const T (&greats)[kTile], const T (&smalls)[kTile],
                                           const uint32_t (&units)[kConsumerWarps], float (&rO)[8][4]) {
    using L = Layout<kFormat>;
    const int lane = me.row * 4 + me.column;
    constexpr int kAtOnce = kPlain ? 4 : 1;
    constexpr bool kScaleP = L::kScaled && kPlain && kIsBF16<T>;  // P times scales instead of V
#pragma unroll kAtOnce
    for (int step = 0; step < 4; ++step) {
        uint32_t p[4], great[2] = {}, small[2] = {}, unit[2] = {};
        ptx::ldmatrix_x4(ptx::shared_address(sP) + wgmma::swizzled(lane % 16, 2 * step + lane / 16), p);
        uint2 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = take_bytes<uint2>(keys[i], step * 16 * L::kRowBytes);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = 16 * step + 8 * i + 2 * me.column;
            if constexpr (L::kScaled) memcpy(&great[i], greats + at, 4);
            if constexpr (!kPlain) {
                memcpy(&small[i], smalls + at, 4);
                unit[i] = units[2 * step + i];
                if (unit[i] == 0) unit[i] = pack<T>(1.f, 1.f);
            }
        }
        if constexpr (!L::kScaled) {
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const auto of = [&](int i) { return n < 4 ? words[i].x : words[i].y; };
                const int both = (5 + n % 4) << 12 | (1 + n % 4) << 8 | (4 + n % 4) << 4 | n % 4;
                const uint32_t b0 = ptx::permute(of(0), of(1), both), b1 = ptx::permute(of(2), of(3), both);
                ptx::mma_m16n8k16<false>(rO[n], p, ptx::fp16_of_e4m3<0>(b0), ptx::fp16_of_e4m3<0>(b1));
                ptx::mma_m16n8k16<false>(rO[n + 1], p, ptx::fp16_of_e4m3<1>(b0), ptx::fp16_of_e4m3<1>(b1));
            }
        } else {
#pragma unroll
            for (int i = 0; kScaleP && i < 4; ++i) {
                p[i] = as_bits(__hmul2(as_pair<T>(p[i]), as_pair<T>(great[i / 2])));
            }
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const auto of = [&](int i) { return n < 4 ? words[i].x : words[i].y; };
                if constexpr (kScaleP) {
                    ptx::mma_m16n8k16<true>(rO[n], p, as_bits(spread<T>(of(0), of(1), n % 4, 4 + n % 4)),
                                            as_bits(spread<T>(of(2), of(3), n % 4, 4 + n % 4)));
                    continue;
                }
                const uint32_t b0 = scaled<T, L::kScaled, kPlain>(spread<T>(of(0), of(1), n % 4, 4 + n % 4), unit[0],
                                                                  great[0], small[0]);
                const uint32_t b1 = scaled<T, L::kScaled, kPlain>(spread<T>(of(2), of(3), n % 4, 4 + n % 4), unit[1],
                                                                  great[1], small[1]);
                ptx::mma_m16n8k16<kIsBF16<T>>(rO[n], p, b0, b1);
            }
        }
    }
}

__device__ __forceinline__ void scale(float (&rO)[8][4], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) rO[n][k] *= factor[k / 2];
    }
}

// The result of rows: each lane has 16 columns of two rows.
template <typename T>
__device__ __forceinline__ void store_rows(const FwdParams& params, const RowTile& rows, const Lane& me, int warp,
                                           int batch_row, const float (&lse_log2)[2], const float (&rO)[8][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int r = me.row + 8 * h;
        if (r >= rows.count(params)) continue;
        const QueryRow row(params, r);
        const int64_t head = rows.head * params.group + row.g;
        T* to = static_cast<T*>(params.out) + (rows.query_at(params, batch_row, row.s) * params.h_q + head) * kDimV +
                warp * kWarpColumns + me.column * 16;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int k = 2 * h + i;
            reinterpret_cast<uint4*>(to)[i] = {pack<T>(rO[0][k], rO[1][k]), pack<T>(rO[2][k], rO[3][k]),
                                               pack<T>(rO[4][k], rO[5][k]), pack<T>(rO[6][k], rO[7][k])};
        }
        if (warp == 0 && me.column == 0) {
            params.lse[rows.lse_at(params, batch_row, head, row.s)] =
                lse_log2[h] == -INFINITY ? INFINITY : lse_log2[h] * kLn2;
        }
    }
}

// A share of rows, to its place in the workspace, row by row.
__device__ __forceinline__ void store_share(const FwdParams& params, const RowTile& rows, const Lane& me, int warp,
                                            int place, const float (&lse_log2)[2], const float (&rO)[8][4]) {
    float* share = params.partial_out + (int64_t{place} * params.row_tiles + rows.index()) * (kRowTile * kDimV);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int r = me.row + 8 * h;
        if (warp == 0 && me.column == 0) __stcg(share_lse(params, rows, place) + r, lse_log2[h]);
        if (r >= rows.count(params)) continue;
        float4* to = reinterpret_cast<float4*>(share + r * kDimV + warp * kWarpColumns + me.column * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = i % 2 * 4, k = 2 * h + i / 2;
            __stcg(to + i, make_float4(rO[n][k], rO[n + 1][k], rO[n + 2][k], rO[n + 3][k]));
        }
    }
}

// One segment, from its queries to its result.
template <typename Out, typename T, CacheFormat kFormat>
__device__ __forceinline__ void attend(const FwdParams& params, SharedStorage<T, kFormat>& shared, const RowTile& rows,
                                       const Segment& segment, int warp, float scale_log2, float out_scale,
                                       Place<kStages<kFormat>>& place, uint32_t& phase) {
    using L = Layout<kFormat>;
    if (segment.begin == segment.end) return sm90::store_nothing<Out, kConsumers>(params, rows, segment);
    const int lane = ptx::lane();
    const Lane me = {lane / 4, lane % 4};
    const auto key_of = [&](int at) { return warp / 2 * 16 + L::key_of(warp % 2 * kWarpTokens + at); };  // of the warp
    const int my_key = key_of(me.row), scored[2] = {key_of(2 * me.column), key_of(2 * me.column + 1)};

    Queries<kHeld<kFormat>> queries;
    wait(&shared.queries_landed, phase);
    phase ^= 1;
    queries.others = &shared.queries[0][0][lane];
    if constexpr (kIsBF16<T>) {
#pragma unroll
        for (int h = 0; h < 2; ++h) queries.units[h] = take_unit(shared.query_units[me.row + 8 * h]);
    }
#pragma unroll
    for (int slice = 0; slice < kHeld<kFormat>; ++slice) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            *reinterpret_cast<uint4*>(queries.held[slice][i]) = take_query_chunk(queries.others, slice, i);
        }
    }

    float rS[4];
    Factors factors;
    // the scores of a tile, their maxima left for all
    const auto score_tile = [&](int tile, const Place<kStages<kFormat>>& at) {
        wait(&shared.landed[at.slot], at.phase);
        const uint8_t* keys = shared.ring[at.slot];
        const uint8_t* key = keys + my_key * L::kRowBytes;
        const uint8_t* const of_scores[2] = {keys + scored[0] * L::kRowBytes, keys + scored[1] * L::kRowBytes};
        uint32_t odd = 0;  // scales that are no numbers
        if constexpr (L::kScaled) {
            const float of_block = take_bytes<float>(key, L::kScales + me.column * 4);
            const bool there = tile * kTile + my_key < segment.length;
            factors = make_factors<T>(there ? of_block : 0.f);
            odd = __ballot_sync(~0u, there && !(fabsf(of_block) < INFINITY));
        }
        if (factors.plain) {
            score<T, kFormat, true>(key, of_scores, me, queries, factors, rS);
        } else if constexpr (L::kScaled) {
            score<T, kFormat, false>(key, of_scores, me, queries, factors, rS);
        }
        if constexpr (L::kScaled) {
            if (odd != 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (odd >> 4 * (2 * me.column + i) & 15) rS[i] = rS[2 + i] = __int_as_float(0x7fffffff);
                }
            }
        }
        scale_and_mask(params, rows, me, segment, tile, scored, scale_log2, rS);
        leave_maxima(me, warp, rS, shared.high[tile % 2]);
        if (tile + 1 == segment.end) {
            __syncwarp();
            if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_freed);
        }
    };

    float rO[8][4] = {};
    RowSoftmax softmax;
    score_tile(segment.begin, place);
    ptx::named_barrier(kAll, kConsumers);
#pragma unroll 1
    for (int tile = segment.begin; tile < segment.end; ++tile) {
        const int turn = tile % 2;
        float factor[2];
        leave_probabilities<std::conditional_t<L::kScaled, T, __half>>(me, warp, rS, shared.high[turn], softmax, factor,
                                                                       shared.sP[turn]);
        if constexpr (L::kScaled) {
            const uint32_t split = factors.split;
            memcpy(&shared.great[turn][me.column][warp * kWarpTokens + me.row], &split, 2);
            const uint32_t rest = split >> 16;
            memcpy(&shared.small[turn][me.column][warp * kWarpTokens + me.row], &rest, 2);
            if (lane == 0) shared.units[turn][warp] = factors.plain ? 0 : factors.unit;
        }
        const Place<kStages<kFormat>> at = place;
        place.next();
        if (tile + 1 < segment.end) score_tile(tile + 1, place);
        ptx::named_barrier(kAll, kConsumers);

        if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) scale(rO, factor);
        const uint8_t* column = shared.ring[at.slot] + warp * kWarpColumns + me.row * 8;
        const uint8_t* const keys[4] = {
            column + L::key_of(2 * me.column) * L::kRowBytes, column + L::key_of(2 * me.column + 1) * L::kRowBytes,
            column + L::key_of(8 + 2 * me.column) * L::kRowBytes, column + L::key_of(9 + 2 * me.column) * L::kRowBytes};
        const int block = warp / 2;
        bool plain = true;
        if constexpr (L::kScaled) {
            const uint4 a = *reinterpret_cast<const uint4*>(shared.units[turn]);
            const uint4 b = *reinterpret_cast<const uint4*>(shared.units[turn] + 4);
            plain = !__any_sync(~0u, (a.x | a.y | a.z | a.w | b.x | b.y | b.z | b.w) != 0);
        }
        if (plain) {
            accumulate<T, kFormat, true>(keys, me, shared.sP[turn], shared.great[turn][block],
                                         shared.small[turn][block], shared.units[turn], rO);
        } else if constexpr (L::kScaled) {
            accumulate<T, kFormat, false>(keys, me, shared.sP[turn], shared.great[turn][block],
                                          shared.small[turn][block], shared.units[turn], rO);
        }
        __syncwarp();
        if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.freed[at.slot]);
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        for (int lanes = 1; lanes < 4; lanes *= 2) softmax.sum[h] += __shfl_xor_sync(~0u, softmax.sum[h], lanes);
        if (me.column == 0) shared.sum[me.row + 8 * h][warp] = softmax.sum[h];
    }
    ptx::named_barrier(kAll, kConsumers);
    float factor[2], lse_log2[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float sum = over_warps(shared.sum[me.row + 8 * h], [](float a, float b) { return a + b; });
        const bool nothing = sum == 0.f;
        factor[h] = nothing ? 0.f : out_scale / sum;
        lse_log2[h] = nothing ? -INFINITY : softmax.base[h] + log2f(sum);
    }
    scale(rO, factor);
    if (segment.place >= 0) {
        store_share(params, rows, me, warp, segment.place, lse_log2, rO);
    } else {
        store_rows<Out>(params, rows, me, warp, segment.row, lse_log2, rO);
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, typename Out, CacheFormat kFormat, bool kFp8Queries, bool kUneven>
__global__ void __launch_bounds__(kThreads, 1)
    fwd_kvcache_mla_fp8_few_rows_kernel(const __grid_constant__ FwdParams params) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    auto& shared = *reinterpret_cast<SharedStorage<T, kFormat>*>(shared_bytes);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
    const RowTile rows(params);

    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages<kFormat>; ++i) {
            cuda::ptx::mbarrier_init(&shared.landed[i], 1);
            cuda::ptx::mbarrier_init(&shared.freed[i], kConsumerWarps);
        }
        cuda::ptx::mbarrier_init(&shared.queries_landed, kQueryWarps);
        cuda::ptx::mbarrier_init(&shared.queries_freed, kConsumerWarps);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
    // query rows that do not exist: their results are not stored
    uint4* queries = &shared.queries[0][0][0];
    for (int i = threadIdx.x; i < kRows * kDimQK / 8; i += kThreads) queries[i] = {};
    cudaGridDependencySynchronize();  // nothing above reads what an earlier kernel wrote
    cudaTriggerProgrammaticLaunchCompletion();
    if (warp >= kConsumerWarps) prefetch_tables<kUneven>(params, threadIdx.x - kConsumers, kThreads - kConsumers);
    read_plan<kUneven>(params, shared.parts);

    if (warp < kConsumerWarps) {
        ptx::increase_registers<kConsumerRegisters>();
        const float kv_scale = kFormat == CacheFormat::kFp8Tensor ? __ldg(params.kv_scale) : 1.f;
        const float scale_log2 = params.softmax_scale_log2 * kv_scale * (kFp8Queries ? __ldg(params.q_scale) : 1.f);
        Place<kStages<kFormat>> place;
        uint32_t phase = 0;
        for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
            attend<Out>(params, shared, rows, segment, warp, scale_log2, kv_scale, place, phase);
        });
        return;
    }
    ptx::decrease_registers<kProducerRegisters>();
    if (warp == kConsumerWarps) {
        Place<kStages<kFormat>> place;
        for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
            load_keys<kFormat>(params, shared, rows, segment, place);
        });
    } else {
        uint32_t phase = 0;
        for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
            load_queries<T, kFormat, kFp8Queries>(params, shared, rows, segment, warp - kConsumerWarps - 1, phase);
        });
        if (warp == kConsumerWarps + 1 && blockIdx.x == 0) list_split_rows<kUneven>(params, shared.parts);
        if constexpr (kUneven) {
            if (warp == kConsumerWarps + 2) store_unclaimed<Out>(params);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, typename Out, CacheFormat kFormat, bool kFp8Queries, bool kUneven>
void launch(const FwdParams& params, cudaStream_t stream) {
    constexpr auto kKernel = fwd_kvcache_mla_fp8_few_rows_kernel<T, Out, kFormat, kFp8Queries, kUneven>;
    constexpr int kSharedBytes = sizeof(SharedStorage<T, kFormat>);
    static_assert(kSharedBytes <= 227 * 1024);
    allow_shared_bytes<kKernel>(kSharedBytes, "fwd_kvcache_mla: shared memory");
    const dim3 grid(params.row_tiles, params.grid_parts);
    cuda_check(launch_dependent(kKernel, grid, kThreads, kSharedBytes, stream, params), "fwd_kvcache_mla");
}

template <typename T, typename Out, CacheFormat kFormat, bool kFp8Queries>
void launch(const FwdParams& params, cudaStream_t stream) {
    params.cu_seqlens_q != nullptr ? launch<T, Out, kFormat, kFp8Queries, true>(params, stream)
                                   : launch<T, Out, kFormat, kFp8Queries, false>(params, stream);
}

template <typename T>
void launch(const FwdParams& params, cudaStream_t stream) {
    params.format == CacheFormat::kFp8Blocks ? launch<T, T, CacheFormat::kFp8Blocks, false>(params, stream)
                                             : launch<T, T, CacheFormat::kFp8Tensor, false>(params, stream);
}

}  // namespace

void fwd_kvcache_mla_fp8_few_rows(const FwdParams& params, cudaStream_t stream) {
    // e4m3 on both sides: fp16 has all its values
    if (params.q_scale != nullptr) return launch<__half, __nv_bfloat16, CacheFormat::kFp8Tensor, true>(params, stream);
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
