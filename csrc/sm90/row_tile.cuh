// What a row tile's results are and how they leave the accumulators of two warpgroups, of 256 output columns each: rows
// through shared memory to `out` and `lse`, so that whole lines go to memory; shares of split rows to a place in the
// workspace.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace flashmla::sm90 {

constexpr int kHalfV = kDimV / 2;  // output columns of a warpgroup

// Which query rows a CTA has: of key head `head`, from first_row on. Of uneven queries those of a batch row's block
// (flashmla_ops/plan.py), which change from segment to segment.
struct RowTile {
    int head, first_row;
    int size;  // rows that a row tile may have
    int tile;  // of the key head's, or of the block's: all of them read the same keys at about the same time
    // A constant wherever it is asked for, since all that asks is inlined: even queries pay nothing for the others.
    bool uneven = false;
    int batch_row = 0;
    int first_query = 0, queries = 0;  // of the batch row, among all

    __device__ explicit RowTile(const FwdParams& params, int size = kRowTile, int first_row_tile = 0)
        : RowTile(HeadTile(params, first_row_tile + index()), size) {}
    __device__ RowTile(const HeadTile& in_head, int size)
        : head(in_head.head), first_row(in_head.tile * size), size(size), tile(in_head.tile) {}
    __device__ RowTile(const FwdParams& params, const RowTile& like, int batch_row, const RowQueries& queries,
                       int block)
        : head(like.head),
          first_row(block * block_rows(params, like.size) + like.tile * like.size),
          size(like.size),
          tile(like.tile),
          uneven(true),
          batch_row(batch_row),
          first_query(queries.first),
          queries(queries.count) {}

    __device__ int index() const { return blockIdx.x; }
    __device__ int all_rows(const FwdParams& params) const { return uneven ? queries * params.group : params.rows; }
    __device__ int count(const FwdParams& params) const { return min(size, all_rows(params) - first_row); }
    __device__ int num_queries(const FwdParams& params) const { return uneven ? queries : params.s_q; }

    // Query s of a batch row: its place among all queries, and its lse's of query head h.
    __device__ int64_t query_at(const FwdParams& params, int batch_row, int s) const {
        return uneven ? first_query + s : int64_t{batch_row} * params.s_q + s;
    }
    __device__ int64_t lse_at(const FwdParams& params, int batch_row, int h, int s) const {
        if (uneven) return int64_t{h} * params.total_q + first_query + s;
        return (int64_t{batch_row} * params.h_q + h) * params.s_q + s;
    }
};

// Where row r of the row tile has its 576 values, of a row of the batch. Of uneven queries another row than the row
// tile's stands for what follows the row tile's block in memory: most often the next segment's queries.
template <typename T>
__device__ __forceinline__ const T* query_row(const FwdParams& params, const RowTile& rows, int batch_row, int r) {
    const T* q = static_cast<const T*>(params.q);
    if (rows.uneven) {
        int row = rows.first_row + r;
        if (batch_row != rows.batch_row) row = min(row + block_rows(params, rows.size), rows.all_rows(params) + r);
        const int s = row / params.group, g = row - s * params.group;
        return q + int64_t{min(rows.first_query + s, params.total_q - 1)} * params.q_stride_s +
               (rows.head * params.group + g) * params.q_stride_h;
    }
    const QueryRow row(params, rows.first_row + r);
    return q + batch_row * params.q_stride_b + row.s * params.q_stride_s +
           (rows.head * params.group + row.g) * params.q_stride_h;
}

// Calls body(segment, row tile) for the CTA's parts, every gridDim.y-th, in order, of uneven queries. `rows`: the
// CTA's.
template <typename Body>
__device__ __forceinline__ void for_each_block(const FwdParams& params, const Part (&parts)[kMaxParts],
                                               const RowTile& rows, Body&& body) {
    for (int index = blockIdx.y; index < params.plan_parts; index += gridDim.y) {
        const Part& p = parts[index];
        const Blocks blocks(params, index);
        for (int row = p.first_row; row <= p.last_row; ++row) {
            const RowQueries queries(params, row);
            const int length = clamped_length(params, row), tiles = num_tiles(length);
            const int last_of_row = last_block(params, queries);
            const int last = row == p.last_row ? min(blocks.last, last_of_row) : last_of_row;
            for (int block = row == p.first_row ? blocks.first : 0; block <= last; ++block) {
                const RowTile here(params, rows, row, queries, block);
                const bool continued = p.continues(row) && block == blocks.first;
                const bool cut = row == p.last_row && block == blocks.last && p.last_tile < tiles;
                const bool left_out = continued && p.last_tile == INT_MAX;  // see read_plan
                if (left_out || here.count(params) <= 0) continue;
                Segment segment;
                segment.row = row;
                segment.length = length;
                segment.end = cut ? p.last_tile : tiles;
                segment.begin = continued ? min(p.first_tile, segment.end) : 0;
                segment.place = continued ? first_place(index) : cut ? last_place(index) : -1;
                segment.more = row < p.last_row || block < last;
                body(segment, here);
            }
        }
    }
}

// The same of even queries too.
template <bool kUneven, typename Body>
__device__ __forceinline__ void for_each_segment(const FwdParams& params, const Part (&parts)[kMaxParts],
                                                 const RowTile& rows, Body&& body) {
    if constexpr (kUneven) {
        for_each_block(params, parts, rows, body);
    } else {
        for_each_segment(params, parts, [&](const Segment& segment) { body(segment, rows); });
    }
}

// Where a consumer thread stands. A warpgroup's accumulators give a thread two rows of the row tile, 8 apart, and in
// them the columns 8 j + 2 (lane % 4) + {0, 1}.
struct Consumer {
    int warp, lane;  // warp: of its warpgroup's 4

    __device__ int row(int i) const { return warp * 16 + lane / 4 + 8 * i; }  // i = 0, 1
    __device__ int column(int j) const { return 8 * j + lane % 4 * 2; }
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
        : group(params.group), h_q(params.h_q) {
        const QueryRow row(params, rows.first_row + r);
        g = row.g;
        at = rows.query_at(params, batch_row, row.s) * params.h_q + rows.head * params.group + g;
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

// ------------------------------------------------------------------------------------------- shares of split rows
// A share lies in the workspace as it lay in registers: a warp's loads and stores are whole lines, and nobody has to
// move anything. Of a pair: [place, row tile, warpgroup, 32, 128 threads] of four floats, the thread's accumulators
// 4 j .. 4 j + 3. What the combine kernel merges is half as large, since a row's end waits for its stores and the
// combine kernel for its loads: fp16, relative to a power of two for each row and warpgroup (PackedShare).

constexpr int kShareVectors = kRowTile * kDimV / 4;  // of 16 bytes, of each place and row tile

// Where in the workspace, in tiles, a row tile has a place.
__device__ __forceinline__ int64_t tile_at(const FwdParams& params, int place, int row_tile) {
    return int64_t{place} * params.row_tiles + row_tile;
}

__device__ __forceinline__ float4* share_at(const FwdParams& params, int place, int row_tile) {
    return reinterpret_cast<float4*>(params.partial_out) + tile_at(params, place, row_tile) * kShareVectors;
}

__device__ __forceinline__ float4* share_of(const FwdParams& params, int64_t tile, int warpgroup, const Consumer& me) {
    return reinterpret_cast<float4*>(params.partial_out) + tile * kShareVectors + warpgroup * (kShareVectors / 2) +
           me.warp * 32 + me.lane;
}

__device__ __forceinline__ float* share_lse(const FwdParams& params, int64_t tile) {
    return params.partial_lse + tile * kRowTile;
}
__device__ __forceinline__ float* share_lse(const FwdParams& params, const RowTile& rows, int place) {
    return share_lse(params, tile_at(params, place, rows.index()));
}

// a x + b y, rounded alike wherever it is computed: product, product and sum one by one.
__device__ __forceinline__ float weighted(float a, float x, float b, float y) {
    return __fadd_rn(__fmul_rn(a, x), __fmul_rn(b, y));
}

// What two shares of a row count, by their lse, base 2, and the lse of both. The bits are the same wherever that is
// computed, and whichever comes first.
struct Weights {
    float a, b, lse_log2;

    __device__ Weights(float lse_a, float lse_b) {
        const float high = fmaxf(lse_a, lse_b), base = base_of(high);
        a = ptx::exp2_approx(lse_a - base);
        b = ptx::exp2_approx(lse_b - base);
        // 0, or from 1 to 2: where approximations have an absolute error of 2^-22 at most
        const float sum = a + b, scale = sum == 0.f ? 0.f : __fdividef(1.f, sum);
        a *= scale;
        b *= scale;
        lse_log2 = sum == 0.f ? -INFINITY : __fadd_rn(high, __log2f(sum));
    }
    __device__ float of(float x, float y) const { return weighted(a, x, b, y); }
};

// A share's values in fp16, 8 to a vector: the thread's accumulators 8 j .. 8 j + 7. What they are multiplied by is
// such that a row's greatest one of a warpgroup has the exponent 14 (greatest_power): an element is rounded to 11 bits
// if it is not less than that one by a factor of 2^28, and the combine kernel's result to no more than out's 8 or 11.
struct PackedShare {
    static constexpr int kVectors = kRowTile * kDimV / 8;

    uint4 values[kVectors];      // [warpgroup, 16, 128 threads]
    float2 heads[2 * kRowTile];  // [warpgroup, row]: its lse, base 2, and what its values are to be multiplied by
};
static_assert(sizeof(PackedShare) <= kShareVectors * sizeof(float4));

__device__ __forceinline__ PackedShare& packed_share(const FwdParams& params, int place, int row_tile) {
    return *reinterpret_cast<PackedShare*>(share_at(params, place, row_tile));
}

// Whether the warp has a query row.
__device__ __forceinline__ bool has_rows(const FwdParams& params, const RowTile& rows, const Consumer& me) {
    return me.warp * 16 < rows.count(params);
}

__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float2 unpack_halves(uint32_t packed) {
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}

// 16 bytes of values, in fp32 or in halves.
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8]) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_halves(pairs[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

// What a row's values in fp16 are relative to, by its greatest one: a power of two. And what they are multiplied by.
__device__ __forceinline__ float greatest_power(float greatest) {
    constexpr int kGreatest = 14;  // the exponent that it then has
    const int exponent = max(static_cast<int>(__float_as_uint(greatest) >> 23), kGreatest + 1);
    return __uint_as_float((exponent - kGreatest) << 23);
}
__device__ __forceinline__ float inverse_power(float power) {
    return __uint_as_float((254u << 23) - __float_as_uint(power));
}

// The greatest finite magnitude of each of the thread's two rows, among the four threads that have them.
__device__ __forceinline__ void greatest_finite(const float (&rO)[128], float (&high)[2]) {
    high[0] = high[1] = 0.f;
#pragma unroll
    for (int k = 0; k < 128; ++k) high[k / 2 % 2] = fmaxf(high[k / 2 % 2], fabsf(rO[k]));
    if (__any_sync(~0u, fmaxf(high[0], high[1]) == INFINITY)) {  // from an infinite V: rare
        high[0] = high[1] = 0.f;
#pragma unroll
        for (int k = 0; k < 128; ++k) {
            if (fabsf(rO[k]) < INFINITY) high[k / 2 % 2] = fmaxf(high[k / 2 % 2], fabsf(rO[k]));
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], 1));
        high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], 2));
    }
}

// A share, for the combine kernel.
__device__ __forceinline__ void store_share(const FwdParams& params, const RowTile& rows, const Consumer& me, int place,
                                            int warpgroup, const float (&lse_log2)[2], const float (&rO)[128]) {
    if (!has_rows(params, rows, me)) return;
    PackedShare& share = packed_share(params, place, rows.index());
    float factor[2];
    greatest_finite(rO, factor);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float power = greatest_power(factor[i]);
        factor[i] = inverse_power(power);
        if (me.lane % 4 == 0) __stcg(&share.heads[warpgroup * kRowTile + me.row(i)], make_float2(lse_log2[i], power));
    }
    uint4* values = share.values + warpgroup * (PackedShare::kVectors / 2) + me.warp * 32 + me.lane;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const float* o = rO + 8 * j;
        uint4 packed;
        packed.x = pack_halves(o[0] * factor[0], o[1] * factor[0]);
        packed.y = pack_halves(o[2] * factor[1], o[3] * factor[1]);
        packed.z = pack_halves(o[4] * factor[0], o[5] * factor[0]);
        packed.w = pack_halves(o[6] * factor[1], o[7] * factor[1]);
        __stcg(values + j * 128, packed);
    }
}

// A share of a pair, as it is, to a tile of the workspace, and its lse [64 rows]: either share may be in registers when
// they are merged, to the same bits.
__device__ __forceinline__ void store_pair_share(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                                 int64_t tile, float* lse, int warpgroup, const float (&lse_log2)[2],
                                                 const float (&rO)[128]) {
    if (!has_rows(params, rows, me)) return;
    float4* share = share_of(params, tile, warpgroup, me);
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        __stcg(share + j * 128, make_float4(rO[4 * j], rO[4 * j + 1], rO[4 * j + 2], rO[4 * j + 3]));
    }
    // by both warpgroups, the same bits: who merges one's half has synchronised with that one only
    if (me.lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) __stcg(lse + me.row(i), lse_log2[i]);
    }
}

struct RowWeights {
    Weights of_row[2];  // of a thread's two rows
};

// Merges 64 rows x 256 columns that lie in memory as a warpgroup's threads stored them into the accumulators: in fp32,
// or in halves as in PackedShare. weigh() is called once they are on their way, and says by which RowWeights.
// `staging`: 32 KB of the warpgroup's.
template <bool kHalves, typename Weigh>
__device__ __forceinline__ void merge_stored(const Consumer& me, const uint4* from, float (&rO)[128], void* staging,
                                             Weigh&& weigh) {
    // Through shared memory, each thread its own values, a group while others are on their way: registers are short,
    // and L2 takes its time to answer.
    constexpr int kGroups = 4, kGroup = (kHalves ? 16 : 32) / kGroups, kUnderWay = kHalves ? 4 : 2;
    const uint4* landed = static_cast<const uint4*>(staging) + me.warp * 32 * kGroup * kUnderWay + me.lane;
    static_assert(sizeof(uint4) * 32 * kGroup * kUnderWay == 16 * 512);  // the warp's own, as copy_rows has it
    const auto request = [&](int group) {
        const uint4* to = landed + group % kUnderWay * kGroup * 32;
#pragma unroll 1
        for (int j = 0; j < kGroup; ++j, from += 128) ptx::cp_async_16(ptx::shared_address(to + j * 32), from);
        ptx::cp_async_commit();
    };
#pragma unroll
    for (int group = 0; group < kUnderWay; ++group) request(group);
    const auto weights = weigh();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const int later = min(kGroups - 1 - group, kUnderWay - 1);  // groups that were asked for after this one
        if (later == 3) ptx::cp_async_wait<3>();
        if (later == 2) ptx::cp_async_wait<2>();
        if (later == 1) ptx::cp_async_wait<1>();
        if (later == 0) ptx::cp_async_wait<0>();
        wgmma::keep(rO);  // or it multiplies them earlier, and spills
        __syncwarp();     // or ptxas loads them all at once, and spills
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            const uint4 loaded = landed[(group % kUnderWay * kGroup + j) * 32];
            constexpr int kValues = kHalves ? 8 : 4;
            float* o = rO + kValues * (group * kGroup + j);
            float x[kValues];
            unpack(loaded, x);
#pragma unroll
            for (int k = 0; k < kValues; ++k) o[k] = weights.of_row[k / 2 % 2].of(o[k], x[k]);
        }
        if (group + kUnderWay < kGroups) request(group + kUnderWay);
    }
    __syncwarp();
}

// Adds the share of a pair in a tile of the workspace to the one in registers. Either may be there: product, product
// and sum are rounded one by one, so that the bits are the same.
__device__ __forceinline__ void add_share(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                          int64_t tile, const float* other_lse, int warpgroup, float (&lse_log2)[2],
                                          float (&rO)[128], void* staging) {
    if (!has_rows(params, rows, me)) return;
    const float other[2] = {__ldcg(other_lse + me.row(0)), __ldcg(other_lse + me.row(1))};
    const uint4* share = reinterpret_cast<const uint4*>(share_of(params, tile, warpgroup, me));
    merge_stored<false>(me, share, rO, staging, [&] {
        const RowWeights weights = {{Weights(lse_log2[0], other[0]), Weights(lse_log2[1], other[1])}};
#pragma unroll
        for (int i = 0; i < 2; ++i) lse_log2[i] = weights.of_row[i].lse_log2;
        return weights;
    });
}

// -------------------------------------------------------------------------------------------------------- whole rows

// The result of rows: from registers to out and lse. `staging`: 32 KB of the warpgroup's.
template <typename T>
__device__ __forceinline__ void store_rows(const FwdParams& params, const RowTile& rows, const Consumer& me,
                                           int batch_row, int warpgroup, const float (&lse_log2)[2],
                                           const float (&rO)[128], void* staging) {
    if (!has_rows(params, rows, me)) return;
    const int first = me.warp * 16;
    if (warpgroup == 0 && me.lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const QueryRow row(params, rows.first_row + me.row(i));
            const int h = rows.head * params.group + row.g;
            if (me.row(i) < rows.count(params)) {
                params.lse[rows.lse_at(params, batch_row, h, row.s)] =
                    lse_log2[i] == -INFINITY ? INFINITY : lse_log2[i] * kLn2;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 32; j += 2) {
        const int k = 4 * j;
        ptx::stmatrix_x4(ptx::shared_address(staged(staging, first + me.lane % 16, j + me.lane / 16)),
                         pack<T>(rO[k], rO[k + 1]), pack<T>(rO[k + 2], rO[k + 3]), pack<T>(rO[k + 4], rO[k + 5]),
                         pack<T>(rO[k + 6], rO[k + 7]));
    }
    OutRows out(params, rows, batch_row, first);
    copy_rows(me, staging, min(16, rows.count(params) - first), [&] {
        T* row = static_cast<T*>(params.out) + out.at * kDimV + warpgroup * kHalfV;
        out.next();
        return row;
    });
}

// The result of a segment without keys, by the CTA's first kThreads threads.
template <typename T, int kThreads>
__device__ __forceinline__ void store_nothing(const FwdParams& params, const RowTile& rows, const Segment& segment) {
    if (segment.place >= 0) {
        // in either layout: few rows of floats, and their lse apart, are within what this writes
        static_assert(sizeof(PackedShare::values) >= 2 * kFewRows * kDimV * sizeof(float));
        PackedShare& share = packed_share(params, segment.place, rows.index());
        for (int i = threadIdx.x; i < PackedShare::kVectors; i += kThreads) share.values[i] = make_uint4(0, 0, 0, 0);
        for (int i = threadIdx.x; i < 2 * kRowTile; i += kThreads) share.heads[i] = make_float2(-INFINITY, 1.f);
        if (threadIdx.x < kRowTile) share_lse(params, rows, segment.place)[threadIdx.x] = -INFINITY;
        return;
    }
    for (int r = threadIdx.x / 32; r < rows.count(params); r += kThreads / 32) {
        const QueryRow row(params, rows.first_row + r);
        const int h = rows.head * params.group + row.g, lane = threadIdx.x % 32;
        const int64_t at = rows.query_at(params, segment.row, row.s) * params.h_q + h;
        int4* out = reinterpret_cast<int4*>(static_cast<T*>(params.out) + at * kDimV);
        for (int i = lane; i < kDimV * static_cast<int>(sizeof(T)) / 16; i += 32) out[i] = make_int4(0, 0, 0, 0);
        if (lane == 0) params.lse[rows.lse_at(params, segment.row, h, row.s)] = INFINITY;
    }
}

// The results of queries that are no row's: a warp of every CTA stores them.
template <typename T>
__device__ __forceinline__ void store_unclaimed(const FwdParams& params) {
    const int ctas = gridDim.x * gridDim.y, cta = blockIdx.y * gridDim.x + blockIdx.x;
    const int vectors = params.h_q * (kDimV * static_cast<int>(sizeof(T)) / 16);
    const int claimed = min(max(params.cu_seqlens_q[params.b], 0), params.total_q);
    for (int query = claimed + cta; query < params.total_q; query += ctas) {
        int4* out = reinterpret_cast<int4*>(params.out) + int64_t{query} * vectors;
        for (int i = ptx::lane(); i < vectors; i += 32) out[i] = make_int4(0, 0, 0, 0);
        for (int h = ptx::lane(); h < params.h_q; h += 32) params.lse[int64_t{h} * params.total_q + query] = INFINITY;
    }
}

}  // namespace flashmla::sm90
