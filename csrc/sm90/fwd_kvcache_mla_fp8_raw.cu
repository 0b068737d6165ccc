// fwd_kvcache_mla over caches in fp8: what fwd_kvcache_mla.cu computes, from the same plan, on the values that the
// cache's rows stand for (flashmla_ops/kv_cache.py), in T: bf16 or fp16.
//
// Bytes come to shared memory as they lie in the cache, and become T on the way from there to registers, as the left
// operands of transposed products: S^T = K Q^T and O^T = V^T P^T (e4m3_tile.cuh). Nothing converted is written back, so
// shared memory has to give half of what it has to with plain caches.
//
// Grid: (row tiles of 64, parts at work at once), as there. 1 CTA a multiprocessor.
//
// Warp roles. Warps 0-3 and 4-7 are two warpgroups, which score the CTA's tiles in turn: S^T [64 keys, 64 query rows].
// Both accumulate over all tiles, each its half of the output columns: 4 products of 64 columns. Warp 8 loads keys,
// warps 9-11 load queries.
//
// Shared memory: Q in slices (wgmma.cuh), three tiles of bytes, P of two tiles, and by query rows what the warpgroups
// tell each other.
//
// Which warpgroup scores a tile, and where it leaves P and what belongs to it, goes by the tile's number among all that
// the CTA has had, from 0; so do phases of barriers.
//
// Query rows are a thread's columns here: rows 8 j + 2 (lane % 4) + {0, 1} of a product; of its keys or output columns
// a warp has 16, a thread lane / 4 + {0, 8} among them.
//
// Safety. As in fwd_kvcache_mla_fp8_few_rows.cu.

#include <cuda/ptx>

#include "e4m3.cuh"
#include "e4m3_tile.cuh"
#include "fwd_kvcache_mla.cuh"
#include "row_tile.cuh"
#include "wgmma.cuh"

namespace flashmla::sm90 {
namespace {

// ------------------------------------------------------------------------------------------------------------ config

constexpr int kWarpgroup = 128;
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kQueryWarps = 3;
constexpr int kThreads = kConsumers + 32 * (1 + kQueryWarps);
constexpr int kConsumerRegisters = 232;  // O takes 128, S 32, operands 32
constexpr int kProducerRegisters = 40;
constexpr int kStages = 3;
constexpr int kWarpTokens = 16;                       // of a tile, that a warp scores
constexpr int kWarpColumns = kDimV / kConsumerWarps;  // of the output: 64
constexpr int kLaneRows = kRowTile / 4;               // query rows that a thread has columns of

template <typename T, CacheFormat kFormat>
struct SharedStorage {
    alignas(1024) T sQ[kSlices][64 * 64];
    alignas(1024) T sP[2][64 * 64];  // [row, place of a key]
    alignas(128) uint8_t ring[kStages][kTile * Layout<kFormat>::kRowBytes];
    alignas(16) float high[2][4][kRowTile];  // of each warpgroup's warps: maxima in the tile
    alignas(16) float base[2][kRowTile];     // what P of a tile is relative to: the greatest scaled score so far
    alignas(16) float factor[2][kRowTile];   // by which O is multiplied before P V of it is added
    alignas(16) float since[2][kRowTile];    // and sums, from each warpgroup's last tile on
    alignas(16) float sum[2][kConsumerWarps][kRowTile];  // at a row's end, of rows in turn
    alignas(16) float final_factor[2][kRowTile];         // then, of each warpgroup
    alignas(16) float lse[2][kRowTile];
    T great[2][kBlocks][kTile], small[2][kBlocks][kTile];  // see Factors
    uint32_t units[2][4];
    float scale_log2;       // of scores
    Part parts[kMaxParts];  // the plan
    uint64_t landed[kStages], freed[kStages];
    uint64_t based[2], stored[2];  // base and factor are there; P too
    uint64_t queries_landed, queries_freed;
};

enum Barrier { kWarpgroupOf = 1 /* + warpgroup */, kAll = 3 };  // named; of the consumers

// A tile among all that the CTA has had.
struct Turn {
    int index = 0;

    __device__ int half() const { return index % 2; }  // warpgroup that scores; place of P
    __device__ uint32_t half_phase() const { return index / 2 % 2; }
    __device__ int slot() const { return index % kStages; }
    __device__ uint32_t slot_phase() const { return index / kStages % 2; }
    __device__ Turn operator+(int n) const { return {index + n}; }
};

// ----------------------------------------------------------------------------------------------- producers (4 warps)

// 8 values of a query row to where products have them, in pairs. Their order is that of the keys' bytes, or of the
// rope's values, if it is stored in bf16.
template <typename T, CacheFormat kFormat>
__device__ __forceinline__ void store_query_chunk(SharedStorage<T, kFormat>& shared, int row, int chunk,
                                                  const uint4& values) {
    const int slice = chunk / 8, i = chunk % 8;
    const bool in_bf16 = Layout<kFormat>::kScaled && slice == kSlices - 1;
    const int column = in_bf16 ? i % 4 : i / 2, half = in_bf16 ? i / 4 : i % 2;
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t word = Layout<kFormat>::kScaled ? words[k] : times<T>(words[k], kLift<T>);
        const int step = 2 * half + k / 2;
        memcpy(reinterpret_cast<char*>(shared.sQ[slice]) + wgmma::swizzled(row, 2 * step + k % 2) + column * 4, &word,
               4);
    }
}

// kQueryWarps warps: the segment's queries.
template <typename T, CacheFormat kFormat, bool kFp8Queries>
__device__ __forceinline__ void load_queries(const FwdParams& params, SharedStorage<T, kFormat>& shared,
                                             const RowTile& rows, const Segment& segment, int warp, uint32_t& phase) {
    if (segment.begin == segment.end) return;
    const int lane = threadIdx.x % 32;
    wait(&shared.queries_freed, phase ^ 1);
    phase ^= 1;
    using Stored = std::conditional_t<kFp8Queries, uint8_t, T>;
    constexpr int kChunks = kDimQK * sizeof(Stored) / 16;  // of 16 bytes in memory
    constexpr int kAtOnce = kFp8Queries ? 1 : 4;
    const int count = rows.count(params) * kChunks;
#pragma unroll 1
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
                convert<T, false>(chunks[i], factors_of<T>(1.f), converted);
                store_query_chunk(shared, row, 2 * chunk, converted[0]);
                store_query_chunk(shared, row, 2 * chunk + 1, converted[1]);
            } else {
                store_query_chunk(shared, row, chunk, chunks[i]);
            }
        }
    }
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    __syncwarp();
    if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_landed);
    if (segment.more && lane + 32 * warp < rows.count(params)) {  // the next row's to L2
        ptx::prefetch_bulk_l2(query_row<Stored>(params, rows, segment.row + 1, lane + 32 * warp),
                              kDimQK * sizeof(Stored));
    }
}

// ------------------------------------------------------------------------------------------- consumers (2 warpgroups)

// Where a thread stands: in its warpgroup of 4 warps, and in a warp's operands of 8 rows and 4 columns.
struct Lane {
    int warpgroup, warp, row, column;

    __device__ int lane() const { return row * 4 + column; }
    __device__ int first_query(int j) const { return 8 * j + 2 * column; }  // two of its query rows
};

__device__ __forceinline__ void arrive(const Lane& me, uint64_t* barrier) {
    __syncwarp();
    if (me.lane() == 0) cuda::ptx::mbarrier_arrive(barrier);
}

// S^T of 64 keys, of which each thread has two: `keys`.
template <typename T, CacheFormat kFormat, bool kPlain>
__device__ __forceinline__ void score(SharedStorage<T, kFormat>& shared, const uint8_t* const (&keys)[2],
                                      const Lane& me, const Factors (&factors)[2], float (&rS)[32]) {
    using L = Layout<kFormat>;
    uint32_t nan[2] = {}, great[2] = {}, small[2] = {};
    uint32_t operands[2][4][4];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        auto& a = operands[slice % 2];
        if (L::kScaled && slice == kLatents) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 rope = convert_bf16<T>(
                        *reinterpret_cast<const uint4*>(keys[i] + kDimV + 4 * kBlocks + half * 64 + me.column * 16));
                    a[2 * half][i] = rope.x;
                    a[2 * half][2 + i] = rope.y;
                    a[2 * half + 1][i] = rope.z;
                    a[2 * half + 1][2 + i] = rope.w;
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (L::kScaled && slice % 2 == 0) {
                    const uint32_t split = __shfl_sync(~0u, factors[i].split, me.row * 4 + slice / 2);
                    great[i] = ptx::permute(split, 0, 0x1010);
                    small[i] = ptx::permute(split, 0, 0x3232);
                }
                const uint4 chunk = *reinterpret_cast<const uint4*>(keys[i] + slice * 64 + me.column * 16);
                const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
                for (int step = 0; step < 4; ++step) {
                    nan[i] |= nans(words[step]);
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        a[step][2 * k + i] = scaled<T, L::kScaled, kPlain>(spread<T>(words[step], 0, 2 * k, 2 * k + 1),
                                                                           factors[i].unit, great[i], small[i]);
                    }
                }
            }
        }
        const uint64_t q = wgmma::k_major(shared.sQ[slice]);
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            wgmma::m64n64k16<T>(rS, a[step], wgmma::advance(q, step * wgmma::kStepBytesKMajor), slice + step > 0);
        }
        wgmma::commit();
        if (slice > 0) {
            wgmma::wait<1>();
#pragma unroll
            for (int step = 0; step < 4; ++step) wgmma::keep(operands[(slice + 1) % 2][step]);
        }
    }
    wgmma::wait<0>();
    wgmma::keep(rS);
    if (__any_sync(~0u, ((nan[0] | nan[1]) & kByteSigns) != 0)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            for (int lanes = 1; lanes < 4; lanes *= 2) nan[i] |= __shfl_xor_sync(~0u, nan[i], lanes);
#pragma unroll
            for (int j = 0; j < kRowTile / 8; ++j) {
                if (nan[i] & kByteSigns) rS[4 * j + 2 * i] = rS[4 * j + 2 * i + 1] = __int_as_float(0x7fffffff);
            }
        }
    }
}

// Scales scores of the tile, and sets those that a query row does not see to -inf.
template <CacheFormat kFormat>
__device__ __forceinline__ void scale_and_mask(const FwdParams& params, const RowTile& rows, const Lane& me,
                                               const Segment& segment, int tile, float scale_log2, float (&rS)[32]) {
#pragma unroll
    for (int k = 0; k < 32; ++k) rS[k] = __fmul_rn(rS[k], scale_log2);  // for itself: see the kernel for plain caches
    const int seen_by_all = params.causal ? segment.length - params.s_q + 1 : segment.length;
    if (!__any_sync(~0u, (tile + 1) * kTile > seen_by_all)) return;
    const int first = tile * kTile + me.warp * kWarpTokens, row = ptx::lane() / 4;
    const int keys[2] = {first + Layout<kFormat>::key_of(row), first + Layout<kFormat>::key_of(8 + row)};
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const QueryRow query(params, rows.first_row + me.first_query(j) + v);
            const int visible = min(segment.length, params.causal ? seen_by_all + query.s : segment.length);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (keys[i] >= visible) rS[4 * j + 2 * i + v] = -INFINITY;
            }
        }
    }
}

// Of 2 * kHalf values, the lanes that differ in one bit of `row` each keep half, combined with the other's.
template <int kHalf, typename Combine>
__device__ __forceinline__ void halve(const Lane& me, float (&x)[kLaneRows], Combine&& combine) {
    const bool upper = me.row & kHalf / 2;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
        const float mine = upper ? x[kHalf + k] : x[k], other = upper ? x[k] : x[kHalf + k];
        x[k] = combine(mine, __shfl_xor_sync(~0u, other, kHalf * 2));
    }
}

// Of one value for each of a thread's query rows, all lanes' combined: each lane gets those of first_query(its `row`).
template <typename Combine>
__device__ __forceinline__ float2 over_lanes(const Lane& me, float (&x)[kLaneRows], Combine&& combine) {
    halve<8>(me, x, combine);
    halve<4>(me, x, combine);
    halve<2>(me, x, combine);
    return make_float2(x[0], x[1]);
}

// Bases and factors of a tile, from its warps' maxima. `first`: of the segment. Ends in a barrier of the warpgroup.
template <typename T, CacheFormat kFormat>
__device__ __forceinline__ void change_base(SharedStorage<T, kFormat>& shared, const Lane& me, Turn turn, bool first,
                                            const float (&rS)[32]) {
    float high[kLaneRows];
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) high[2 * j + v] = fmaxf(rS[4 * j + v], rS[4 * j + 2 + v]);
    }
    auto& highs = shared.high[me.warpgroup];
    *reinterpret_cast<float2*>(&highs[me.warp][me.first_query(me.row)]) =
        over_lanes(me, high, [](float a, float b) { return fmaxf(a, b); });
    ptx::named_barrier(kWarpgroupOf + me.warpgroup, kWarpgroup);
    if (me.warp < 2) {
        const int row = me.warp * 32 + me.lane();
        const float most = fmaxf(fmaxf(highs[0][row], highs[1][row]), fmaxf(highs[2][row], highs[3][row]));
        float before = -INFINITY;
        if (!first) {
            const Turn last = turn + -1;
            wait(&shared.based[last.half()], last.half_phase());
            before = shared.base[last.half()][row];
        }
        const float base = fmaxf(most, before);
        shared.since[me.warpgroup][row] = ptx::exp2_approx(shared.base[turn.half()][row] - base_of(base));
        shared.base[turn.half()][row] = base;
        shared.factor[turn.half()][row] = ptx::exp2_approx(before - base_of(base));
        arrive(me, &shared.based[turn.half()]);
    }
    ptx::named_barrier(kWarpgroupOf + me.warpgroup, kWarpgroup);
}

// From scores to P, in sP. `sum`: over the tiles that this warpgroup scores and the warp's keys, of first_query of the
// lane's `row`; `begins`: there was none yet.
template <typename T, CacheFormat kFormat>
__device__ __forceinline__ void leave_probabilities(SharedStorage<T, kFormat>& shared, const Lane& me, Turn turn,
                                                    bool begins, float (&rS)[32], float2& sum) {
    const auto& base = shared.base[turn.half()];
    float sums[kLaneRows];
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
        const float2 bases = *reinterpret_cast<const float2*>(&base[me.first_query(j)]);
        const float from[2] = {base_of(bases.x), base_of(bases.y)};
#pragma unroll
        for (int k = 0; k < 4; ++k) rS[4 * j + k] = ptx::exp2_approx(rS[4 * j + k] - from[k % 2]);
#pragma unroll
        for (int v = 0; v < 2; ++v) sums[2 * j + v] = rS[4 * j + v] + rS[4 * j + 2 + v];
    }
    const float lift = Layout<kFormat>::kScaled ? 1.f : kLift<T>;
    uint32_t packed[16];
#pragma unroll
    for (int k = 0; k < 16; ++k) packed[k] = pack<T>(rS[2 * k] * lift, rS[2 * k + 1] * lift);
    const int lane = me.lane();
#pragma unroll
    for (int j = 0; j < kRowTile / 8; j += 2) {
        const int row = 8 * (j + lane / 16) + lane % 8, chunk = 2 * me.warp + lane / 8 % 2;
        ptx::stmatrix_x4_trans(ptx::shared_address(shared.sP[turn.half()]) + wgmma::swizzled(row, chunk), packed[2 * j],
                               packed[2 * j + 1], packed[2 * j + 2], packed[2 * j + 3]);
    }
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    arrive(me, &shared.stored[turn.half()]);
    const float2 more = over_lanes(me, sums, [](float a, float b) { return a + b; });
    if (begins) {
        sum = more;
        return;
    }
    const float2 factor = *reinterpret_cast<const float2*>(&shared.since[me.warpgroup][me.first_query(me.row)]);
    sum = make_float2(sum.x * factor.x + more.x, sum.y * factor.y + more.y);
}

__device__ __forceinline__ void scale(const Lane& me, const float (&factor)[kRowTile], float (&rO)[4][32]) {
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
        const float2 f = *reinterpret_cast<const float2*>(&factor[me.first_query(j)]);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                rO[b][4 * j + 2 * i] *= f.x;
                rO[b][4 * j + 2 * i + 1] *= f.y;
            }
        }
    }
}

// O^T += V^T P^T of a tile. `keys`: at first the address of columns 8 (lane / 4) of the warp's of this thread's four
// keys of the first 16; of these 8 columns product b has two.
template <typename T, CacheFormat kFormat, bool kPlain>
__device__ __forceinline__ void accumulate(SharedStorage<T, kFormat>& shared, const uint8_t* const (&keys)[4],
                                           const Lane& me, int half, float (&rO)[4][32]) {
    using L = Layout<kFormat>;
    const int block = (me.warpgroup * 4 + me.warp) / 2;
    const uint64_t p = wgmma::k_major(shared.sP[half]);
    uint32_t operands[2][4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        auto& a = operands[step % 2];
        uint2 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = *reinterpret_cast<const uint2*>(keys[i] + step * 16 * L::kRowBytes);
        }
        uint32_t great[2] = {}, small[2] = {}, unit = 0;
        if constexpr (L::kScaled) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = 16 * step + 8 * i + 2 * me.column;
                memcpy(&great[i], shared.great[half][block] + at, 4);
                if constexpr (!kPlain) memcpy(&small[i], shared.small[half][block] + at, 4);
            }
            if constexpr (!kPlain) {
                unit = shared.units[half][step];
                if (unit == 0) unit = pack<T>(1.f, 1.f);
            }
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const auto of = [&](int i) { return n < 4 ? words[i].x : words[i].y; };
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                a[n / 2][2 * i + n % 2] = scaled<T, L::kScaled, kPlain>(
                    spread<T>(of(2 * i), of(2 * i + 1), n % 4, 4 + n % 4), unit, great[i], small[i]);
            }
        }
        wgmma::fence();
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            wgmma::m64n64k16<T>(rO[b], a[b], wgmma::advance(p, step * wgmma::kStepBytesKMajor), true);
        }
        wgmma::commit();
        if (step > 0) {
            wgmma::wait<1>();
#pragma unroll
            for (int b = 0; b < 4; ++b) wgmma::keep(operands[(step + 1) % 2][b]);
        }
    }
    wgmma::wait<0>();
#pragma unroll
    for (int b = 0; b < 4; ++b) wgmma::keep(rO[b]);
}

// The results of rows, and shares of rows: each thread has 8 columns of 16 query rows.
template <typename T>
__device__ __forceinline__ void store_rows(const FwdParams& params, const RowTile& rows, const Lane& me, int batch_row,
                                           const float (&rO)[4][32]) {
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const int r = me.first_query(j) + v, k = 4 * j + v;
            if (r >= rows.count(params)) continue;
            const OutRows to(params, rows, batch_row, r);
            T* out = static_cast<T*>(params.out) + to.at * kDimV + (me.warpgroup * 4 + me.warp) * kWarpColumns;
            reinterpret_cast<uint4*>(out)[me.row] = {pack<T>(rO[0][k], rO[0][k + 2]), pack<T>(rO[1][k], rO[1][k + 2]),
                                                     pack<T>(rO[2][k], rO[2][k + 2]), pack<T>(rO[3][k], rO[3][k + 2])};
        }
    }
}

__device__ __forceinline__ void store_share(const FwdParams& params, const RowTile& rows, const Lane& me, int place,
                                            const float (&rO)[4][32]) {
    float* share = params.partial_out + (int64_t{place} * params.row_tiles + rows.index()) * (kRowTile * kDimV) +
                   (me.warpgroup * 4 + me.warp) * kWarpColumns + me.row * 8;
#pragma unroll
    for (int j = 0; j < kRowTile / 8; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const int r = me.first_query(j) + v, k = 4 * j + v;
            if (r >= rows.count(params)) continue;
            float4* to = reinterpret_cast<float4*>(share + r * kDimV);
            __stcg(to, make_float4(rO[0][k], rO[0][k + 2], rO[1][k], rO[1][k + 2]));
            __stcg(to + 1, make_float4(rO[2][k], rO[2][k + 2], rO[3][k], rO[3][k + 2]));
        }
    }
}

// One segment, from its queries to its result. `turn`: of its first tile.
template <typename T, CacheFormat kFormat>
__device__ __forceinline__ void attend(const FwdParams& params, SharedStorage<T, kFormat>& shared, const RowTile& rows,
                                       const Segment& segment, int warpgroup, Turn& turn, int& segments) {
    using L = Layout<kFormat>;
    if (segment.begin == segment.end) return sm90::store_nothing<T, kConsumers>(params, rows, segment);
    const int lane = ptx::lane();
    const Lane me = {warpgroup, __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane / 4, lane % 4};
    const int parity = segments++ % 2;  // of rows: of queries' barriers too

    float rO[4][32] = {};
    float2 sum = {0.f, 0.f};
    int mine = segment.begin + ((turn.half() ^ warpgroup) & 1);  // the next tile to score
    if (mine >= segment.end) {
        arrive(me, &shared.queries_freed);
    } else {
        wait(&shared.queries_landed, parity);
    }
#pragma unroll 1
    for (int tile = segment.begin; tile < segment.end; ++tile, turn = turn + 1) {
        if ((tile - segment.begin) % 2 == 0 && mine < segment.end) {
            const Turn at = turn + (mine - tile);
            float rS[32];
            Factors factors[2];
            wait(&shared.landed[at.slot()], at.slot_phase());
            const int row = ptx::lane() / 4;  // anew: registers are short
            const int key[2] = {me.warp * kWarpTokens + L::key_of(row), me.warp * kWarpTokens + L::key_of(8 + row)};
            const uint8_t* const keys[2] = {shared.ring[at.slot()] + key[0] * L::kRowBytes,
                                            shared.ring[at.slot()] + key[1] * L::kRowBytes};
            if constexpr (L::kScaled) {
                float scales[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float of_block = *reinterpret_cast<const float*>(keys[i] + L::kScales + me.column * 4);
                    scales[i] = mine * kTile + key[i] < segment.length ? of_block : 0.f;
                }
                make_factors<T>(scales, factors);
            }
            if (factors[0].plain) {
                score<T, kFormat, true>(shared, keys, me, factors, rS);
            } else if constexpr (L::kScaled) {
                score<T, kFormat, false>(shared, keys, me, factors, rS);
            }
            if (mine + 2 >= segment.end) arrive(me, &shared.queries_freed);
            scale_and_mask<kFormat>(params, rows, me, segment, mine, shared.scale_log2, rS);
            // the place of P, and of what belongs to it, was that of the tile two before
            if (at.index >= 2) wait(&shared.freed[(at + -2).slot()], (at + -2).slot_phase());
            change_base(shared, me, at, mine == segment.begin, rS);
            if constexpr (L::kScaled) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int place = me.warp * kWarpTokens + 8 * i + me.row;
                    const uint32_t split = factors[i].split, rest = split >> 16;
                    memcpy(&shared.great[at.half()][me.column][place], &split, 2);
                    memcpy(&shared.small[at.half()][me.column][place], &rest, 2);
                }
                if (lane == 0) shared.units[at.half()][me.warp] = factors[0].plain ? 0 : factors[0].unit;
            }
            leave_probabilities(shared, me, at, mine < segment.begin + 2, rS, sum);
            mine += 2;
        }
        const int half = turn.half();
        wait(&shared.stored[half], turn.half_phase());
        wait(&shared.landed[turn.slot()], turn.slot_phase());  // the other warpgroup has, if not this one
        bool changed = false;
#pragma unroll
        for (int j = 0; j < 2; ++j) changed |= shared.factor[half][lane + 32 * j] != 1.f;
        if (__any_sync(~0u, changed)) scale(me, shared.factor[half], rO);
        const uint8_t* column = shared.ring[turn.slot()] + (warpgroup * 4 + me.warp) * kWarpColumns + me.row * 8;
        const uint8_t* const keys[4] = {
            column + L::key_of(2 * me.column) * L::kRowBytes, column + L::key_of(2 * me.column + 1) * L::kRowBytes,
            column + L::key_of(8 + 2 * me.column) * L::kRowBytes, column + L::key_of(9 + 2 * me.column) * L::kRowBytes};
#pragma unroll
        for (int b = 0; b < 4; ++b) wgmma::keep(rO[b]);
        bool plain = true;
        if constexpr (L::kScaled) {
            const auto& units = shared.units[half];
            plain = !__any_sync(~0u, (units[0] | units[1] | units[2] | units[3]) != 0);
        }
        if (plain) {
            accumulate<T, kFormat, true>(shared, keys, me, half, rO);
        } else if constexpr (L::kScaled) {
            accumulate<T, kFormat, false>(shared, keys, me, half, rO);
        }
        if (tile + 1 < segment.end) arrive(me, &shared.freed[turn.slot()]);
    }

    // all warps' sums, relative to the last tile's bases, which stay until that tile is freed
    const Turn last = turn + -1;
    if (last.half() != warpgroup && segment.end - segment.begin > 1) {
        sum.x *= shared.factor[last.half()][me.first_query(me.row)];
        sum.y *= shared.factor[last.half()][me.first_query(me.row) + 1];
    }
    *reinterpret_cast<float2*>(&shared.sum[parity][warpgroup * 4 + me.warp][me.first_query(me.row)]) = sum;
    ptx::named_barrier(kAll, kConsumers);
    if (me.warp < 2) {
        const int row = me.warp * 32 + lane;
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < kConsumerWarps; ++w) total += shared.sum[parity][w][row];
        const bool nothing = total == 0.f;
        const float out_scale = L::kScaled ? 1.f : __ldg(params.kv_scale) * kLowered<T>;
        shared.final_factor[warpgroup][row] = nothing ? 0.f : out_scale / total;
        const float lse_log2 = nothing ? -INFINITY : shared.base[last.half()][row] + log2f(total);
        if (warpgroup == 0) {
            if (segment.place >= 0) {
                __stcg(share_lse(params, rows, segment.place) + row, lse_log2);
            } else if (row < rows.count(params)) {
                const QueryRow at(params, rows.first_row + row);
                const int64_t head = rows.head * params.group + at.g;
                params.lse[(int64_t{segment.row} * params.h_q + head) * params.s_q + at.s] =
                    nothing ? INFINITY : lse_log2 * kLn2;
            }
        }
    }
    arrive(me, &shared.freed[last.slot()]);
    ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);
    scale(me, shared.final_factor[warpgroup], rO);
    if (segment.place >= 0) {
        store_share(params, rows, me, segment.place, rO);
    } else {
        store_rows<T>(params, rows, me, segment.row, rO);
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, CacheFormat kFormat, bool kFp8Queries>
__global__ void __launch_bounds__(kThreads, 1) fwd_kvcache_mla_fp8_kernel(const __grid_constant__ FwdParams params) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    auto& shared = *reinterpret_cast<SharedStorage<T, kFormat>*>(shared_bytes);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
    const RowTile rows(params);

    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            cuda::ptx::mbarrier_init(&shared.landed[i], 1);
            cuda::ptx::mbarrier_init(&shared.freed[i], kConsumerWarps);
        }
        for (int i = 0; i < 2; ++i) {
            cuda::ptx::mbarrier_init(&shared.based[i], 2);
            cuda::ptx::mbarrier_init(&shared.stored[i], 4);
        }
        cuda::ptx::mbarrier_init(&shared.queries_landed, kQueryWarps);
        cuda::ptx::mbarrier_init(&shared.queries_freed, kConsumerWarps);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
    if (rows.count(params) < kRowTile) {  // query rows that do not exist: their results are not stored
        uint4* queries = reinterpret_cast<uint4*>(shared.sQ);
        for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.sQ) / 16); i += kThreads) queries[i] = {};
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    }
    cudaGridDependencySynchronize();  // nothing above reads what an earlier kernel wrote
    cudaTriggerProgrammaticLaunchCompletion();
    if (warp >= kConsumerWarps) prefetch_tables(params, threadIdx.x - kConsumers, kThreads - kConsumers);
    if (threadIdx.x == 0) {
        const float kv_scale = kFormat == CacheFormat::kFp8Tensor ? __ldg(params.kv_scale) * kLowered<T> : 1.f;
        shared.scale_log2 = params.softmax_scale_log2 * kv_scale * (kFp8Queries ? __ldg(params.q_scale) : 1.f);
    }
    read_plan(params, shared.parts);

    if (warp < kConsumerWarps) {
        ptx::increase_registers<kConsumerRegisters>();
        Turn turn;
        int segments = 0;
        for_each_segment(params, shared.parts, [&](const Segment& segment) {
            attend<T, kFormat>(params, shared, rows, segment, warp / 4, turn, segments);
        });
        return;
    }
    ptx::decrease_registers<kProducerRegisters>();
    if (warp == kConsumerWarps) {
        Place<kStages> place;
        for_each_segment(params, shared.parts,
                         [&](const Segment& segment) { load_keys<kFormat>(params, shared, rows, segment, place); });
    } else {
        uint32_t phase = 0;
        for_each_segment(params, shared.parts, [&](const Segment& segment) {
            load_queries<T, kFormat, kFp8Queries>(params, shared, rows, segment, warp - kConsumerWarps - 1, phase);
        });
        if (warp == kConsumerWarps + 1 && blockIdx.x == 0) list_split_rows(params, shared.parts);
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, CacheFormat kFormat, bool kFp8Queries>
void launch(const FwdParams& params, cudaStream_t stream) {
    constexpr auto kKernel = fwd_kvcache_mla_fp8_kernel<T, kFormat, kFp8Queries>;
    constexpr int kSharedBytes = sizeof(SharedStorage<T, kFormat>);
    static_assert(kSharedBytes <= 227 * 1024);
    allow_shared_bytes<kKernel>(kSharedBytes, "fwd_kvcache_mla: shared memory");
    const dim3 grid(params.row_tiles, params.grid_parts);
    cuda_check(launch_dependent(kKernel, grid, kThreads, kSharedBytes, stream, params), "fwd_kvcache_mla");
}

template <typename T>
void launch(const FwdParams& params, cudaStream_t stream) {
    params.format == CacheFormat::kFp8Blocks ? launch<T, CacheFormat::kFp8Blocks, false>(params, stream)
                                             : launch<T, CacheFormat::kFp8Tensor, false>(params, stream);
}

}  // namespace

void fwd_kvcache_mla_fp8_raw(const FwdParams& params, cudaStream_t stream) {
    if (params.q_scale != nullptr) return launch<__nv_bfloat16, CacheFormat::kFp8Tensor, true>(params, stream);
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
