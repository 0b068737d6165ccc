// fwd_kvcache_mla over caches in fp8: what fwd_kvcache_mla.cu computes, from the same plan, on the values that the
// cache's rows stand for (flashmla_ops/kv_cache.py), in T: bf16 or fp16. Queries in e4m3 are
// fwd_kvcache_mla_fp8_queries.cu's, up to 16 query rows a key head fwd_kvcache_mla_fp8_few_rows.cu's.
//
// Keys pass through registers on their way to shared memory, where they become T. So a third of the warps convert, and
// the tensor cores' part is simpler than there: one warpgroup scores all tiles, and there is time for that, since a
// tile takes as long to convert as to multiply.
//
// Grid: (row tiles of 64, parts at work at once), as there. 1 CTA a multiprocessor.
//
// Warp roles. Warps 0-3, `scorer`: S = Q K^T, softmax, and P V of the left half of the columns with P from registers.
// Warps 4-7, `follower`: P V of the right half, with P from shared memory. Warps 8-11, `converters`: each has 16 of a
// tile's 64 tokens. It holds the next tile's rows in registers, so that 41 KB are always on their way from memory, and
// asks for a row's successor as soon as the row is converted.
//
// Shared memory, in slices of 64 x 64 values (8 KB, wgmma.cuh): Q 9, two key tiles 2 x 9. A tile's ninth slice holds
// the 64 rope values; once the tile is scored, its P takes that place.
//
// Values become T as e4m3.cuh has it. One scale for all is left to the softmax's scale and to the results; T then is
// fp16, to which the machine converts in one instruction a pair, and queries in bf16 become that too (to_units).
//
// Safety. As in fwd_kvcache_mla.cu. Tokens past a row's length, and of pages outside the cache, become zeros and are
// not read.

#include <cuda/ptx>

#include "e4m3.cuh"
#include "fwd_kvcache_mla.cuh"
#include "row_tile.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

namespace flashmla::sm90 {
namespace {

// ------------------------------------------------------------------------------------------------------------ config

constexpr int kRope = kSlices - 1;  // the slice that is no part of V
constexpr int kHalfSlices = 4;      // slices of half of V
constexpr int kWarpgroup = 128;
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kConverterWarps = 4;
constexpr int kThreads = kConsumers + 32 * kConverterWarps;
constexpr int kTokens = kTile / kConverterWarps;  // a converter's of a tile
constexpr int kTogether = 2;              // of them: one alone is a chain of instructions that wait for each other
constexpr int kScorerRegisters = 200;     // O takes 128, S 32, P 16
constexpr int kFollowerRegisters = 160;   // O 128
constexpr int kConverterRegisters = 144;  // rows 64 to 80

template <typename T>
struct SharedStorage {
    alignas(1024) T sQ[kSlices][64 * 64];
    alignas(1024) T sK[2][kSlices][64 * 64];
    Part parts[kMaxParts];        // the plan
    float base[2][kRowTile];      // what P of the tile in each stage is relative to (Softmax)
    float sum[2][kRowTile][4];    // and P's sum, by the threads that have a row's columns
    float query_units[kRowTile];  // see to_units
    uint64_t landed[2], freed[2];
    uint64_t queries_landed, queries_freed;
};

// Named barriers of the consumers, by event; 0 is __syncthreads's.
enum Barrier { kWarpgroupOf = 1 /* + warpgroup */, kStored = 3 /* + stage */ };

// The stage of the next tile, and the phase of its barriers.
struct Place {
    int stage = 0;
    uint32_t phase = 0;

    __device__ void next() {
        phase ^= stage;
        stage ^= 1;
    }
};

// ------------------------------------------------------------------------------------------------------ shared memory

template <typename T>
__device__ __forceinline__ void store_chunk(T* slice, int row, int chunk, const uint4& values) {
    ptx::store_in_order(ptx::shared_address(slice) + wgmma::swizzled(row, chunk), values);
}

// ------------------------------------------------------------------------------------------- converters (4 warps)

// Where a converter's 16 tokens of a tile lie: rows of bytes; those past the length, and all of a page that does not
// exist, are not there.
struct TokenRows {
    const uint8_t* first;
    int64_t stride;
    int count;

    __device__ TokenRows(const FwdParams& params, const RowTile& rows, const Pages& pages, int tile, int page, int warp)
        : first(static_cast<const uint8_t*>(params.kv_cache) + page * params.cache_stride_page +
                (pages.token_of(tile) + warp * kTokens) * params.cache_stride_token +
                rows.head * params.cache_stride_head),
          stride(params.cache_stride_token),
          count(page < 0 ? 0 : pages.segment.length - tile * kTile - warp * kTokens) {}

    __device__ const uint8_t* row(int token) const { return first + token * stride; }
    __device__ bool has(int token) const { return token < count; }
};

// A lane's share of a converter's 16 tokens: 16 latents of each, and what it has of their other values.
template <typename T, CacheFormat kFormat>
struct Rows;

// A row: 512 latents, 4 scales, 64 rope values in bf16.
template <typename T>
struct Rows<T, CacheFormat::kFp8Blocks> {
    static constexpr bool kScaled = true;
    static constexpr int kBytes = 656;
    uint4 latents[kTokens];
    uint4 rope[kTokens / 4];   // of token 4 i + lane / 8: 8 values
    float scale[kTokens / 8];  // of token 8 i + lane / 4: block lane % 4

    __device__ void load_scales(const TokenRows& from, int lane) {
        const uint8_t* at = from.row(lane / 4) + kDimV + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i, at += 8 * from.stride) {
            scale[i] = from.has(8 * i + lane / 4) ? ptx::load_in_order(at) : 0.f;
        }
    }
    __device__ void load_rope(const TokenRows& from, int lane) {
        const uint8_t* at = from.row(lane / 8) + kDimV + 16 + lane % 8 * 16;
#pragma unroll
        for (int i = 0; i < kTokens / 4; ++i, at += 4 * from.stride) {
            rope[i] = ptx::load_in_order(at, from.has(4 * i + lane / 8));
        }
    }
    // Whether all scales are such that convert is right.
    __device__ bool usual() const {
        bool usual = true;
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) usual &= scale[i] >= 0.f && scale[i] < kGreatestScale;
        return __all_sync(~0u, usual);
    }
    __device__ void factors(uint32_t (&mine)[kTokens / 8]) const {
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) mine[i] = factors_of<T>(scale[i]);
    }
    __device__ void store_rope(T* slice, int lane, int first) const {
#pragma unroll
        for (int i = 0; i < kTokens / 4; ++i) {
            store_chunk(slice, first + 4 * i + lane / 8, lane % 8, convert_bf16<T>(rope[i]));
        }
    }
};

// A row: 576 values.
template <typename T>
struct Rows<T, CacheFormat::kFp8Tensor> {
    static constexpr bool kScaled = false;
    static constexpr int kBytes = 576;
    uint4 latents[kTokens];
    uint4 rope[kTokens / 8];  // of token 8 i + lane / 4: 16 values

    __device__ void load_scales(const TokenRows&, int) {}
    __device__ void load_rope(const TokenRows& from, int lane) {
        const uint8_t* at = from.row(lane / 4) + kDimV + lane % 4 * 16;
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i, at += 8 * from.stride) {
            rope[i] = ptx::load_in_order(at, from.has(8 * i + lane / 4));
        }
    }
    __device__ bool usual() const { return true; }
    __device__ void factors(uint32_t (&)[kTokens / 8]) const {}
    __device__ void store_rope(T* slice, int lane, int first) const {
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) {
            uint4 chunks[2];
            convert<T>(rope[i], chunks);
            const int row = first + 8 * i + lane / 4;
            store_chunk(slice, row, lane % 4 * 2, chunks[0]);
            store_chunk(slice, row, lane % 4 * 2 + 1, chunks[1]);
        }
    }
};

// Of 8 lanes that store at once half has its chunks in the same banks as the other half: so each half stores the other
// one of its two chunks first, and its values are swapped for that.
__device__ __forceinline__ bool swapped(int lane) { return lane / 4 % 2; }
__device__ __forceinline__ uint4 swap_halves(const uint4& bytes, bool swap) {
    return swap ? uint4{bytes.z, bytes.w, bytes.x, bytes.y} : bytes;
}
// Where a lane's latents of row 0 go: the first chunk; the second is one chunk's bit away, and rows shift both
// (wgmma::swizzled).
template <typename T>
__device__ __forceinline__ uint32_t latents_address(T (&tile)[kSlices][64 * 64], int lane) {
    return ptx::shared_address(tile[lane / 4]) + (lane % 4 * 2 + swapped(lane)) * 16;
}
__device__ __forceinline__ void store_latents(uint32_t to, int row, const uint4 (&chunks)[2]) {
    ptx::store_in_order((to ^ row % 8 * 16) + row * 128, chunks[0]);
    ptx::store_in_order((to ^ row % 8 * 16 ^ 16) + row * 128, chunks[1]);
}

// Queries are copied asynchronously while the first tile is converted; finish_queries waits for that.
template <typename T, typename Stored>
__device__ __forceinline__ void start_queries(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                              const Segment& segment, int warp, uint32_t phase) {
    const int lane = threadIdx.x % 32, chunk = lane % 8;
    wait(&shared.queries_freed, phase ^ 1);
#pragma unroll 1
    for (int r = 4 * warp + lane / 8; r < rows.count(params); r += 4 * kConverterWarps) {
        const Stored* from = query_row<Stored>(params, rows, segment.row, r) + chunk * 8;
        const uint32_t to = ptx::shared_address(shared.sQ) + wgmma::swizzled(r, chunk);
#pragma unroll 1  // registers are short: they hold a tile
        for (int slice = 0; slice < kSlices; ++slice) {
            ptx::cp_async_16(to + slice * wgmma::kSliceBytes, from + slice * 64);
        }
    }
    if (segment.more && warp * 32 + lane < rows.count(params)) {  // the next row's to L2
        ptx::prefetch_bulk_l2(query_row<Stored>(params, rows, segment.row + 1, warp * 32 + lane),
                              kDimQK * sizeof(Stored));
    }
}

template <typename T, typename Stored>
__device__ __forceinline__ void finish_queries(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                               int warp) {
    ptx::cp_async_wait_all();
    if constexpr (!std::is_same_v<T, Stored>) {  // bf16 to fp16, each lane what it has copied: 8 lanes have a row
        const int lane = ptx::lane();
#pragma unroll 1
        for (int first = 4 * warp; first < rows.count(params); first += 4 * kConverterWarps) {
            const int r = first + lane / 8;
            char* mine = reinterpret_cast<char*>(shared.sQ) + wgmma::swizzled(r, lane % 8);
            uint32_t greatest = 0;
#pragma unroll 3
            for (int slice = 0; slice < kSlices; ++slice) {
                greatest =
                    __vmaxu2(greatest, greatest_finite(*reinterpret_cast<uint4*>(mine + slice * wgmma::kSliceBytes)));
            }
            for (int lanes = 1; lanes < 8; lanes *= 2) {
                greatest = __vmaxu2(greatest, __shfl_xor_sync(~0u, greatest, lanes));
            }
            const float factor = to_units(greatest);
            if (lane % 8 == 0) leave_unit(shared.query_units[r], factor);
#pragma unroll 3
            for (int slice = 0; slice < kSlices; ++slice) {
                auto& chunk = *reinterpret_cast<uint4*>(mine + slice * wgmma::kSliceBytes);
                chunk = fp16_of_bf16(chunk, factor);
            }
        }
    }
    __syncwarp();
    if (ptx::lane() == 0) cuda::ptx::mbarrier_arrive(&shared.queries_landed);
}

// A tile whose scales are not usual, read again: nothing that has to be fast.
template <typename T>
__device__ __forceinline__ void convert_unusual(const TokenRows& from, int lane, uint32_t to) {
#pragma unroll 1
    for (int token = 0; token < kTokens && from.has(token); ++token) {
        const uint8_t* row = from.row(token);
        const float scale = __ldcg(reinterpret_cast<const float*>(row + kDimV) + lane / 8);
        uint4 chunks[2];
        convert_slowly<T>(swap_halves(ptx::load_in_order(row + lane * 16, true), swapped(lane)), scale, chunks);
        store_latents(to, token, chunks);
    }
}

// One warp: its share of the segment's queries, and its 16 tokens of every tile, as soon as there is room for them.
template <typename T, typename Stored, CacheFormat kFormat>
__device__ __forceinline__ void convert_keys(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                             const Segment& segment, int warp, Place& place, uint32_t& queries_phase) {
    if (segment.begin == segment.end) return;
    const int lane = threadIdx.x % 32, first = warp * kTokens;
    const Pages pages(params, segment);
    Rows<T, kFormat> held;
    int next_entry = pages.entry_of(segment.begin + 1);
    {
        const TokenRows from(params, rows, pages, segment.begin, pages.page_of(segment.begin), warp);
        held.load_scales(from, lane);
        const uint8_t* at = from.first + lane * 16;
#pragma unroll
        for (int token = 0; token < kTokens; ++token, at += from.stride) {
            held.latents[token] = ptx::load_in_order(at, from.has(token));
        }
        held.load_rope(from, lane);
    }
    start_queries<T, Stored>(params, shared, rows, segment, warp, queries_phase);
    queries_phase ^= 1;
#pragma unroll 1
    for (int tile = segment.begin; tile < segment.end; ++tile, place.next()) {
        auto& to = shared.sK[place.stage];
        const uint32_t latents = latents_address(to, lane) + first * 128;
        // of page -1, so none, after the last
        const TokenRows from(params, rows, pages, tile + 1, pages.checked(next_entry), warp);
        next_entry = pages.entry_of(tile + 2);  // looked up a tile ahead
        uint32_t factors[kTokens / 8];
        held.factors(factors);
        const bool usual = held.usual();
        held.load_scales(from, lane);
        const uint8_t* at = from.first + lane * 16;  // counted up: 16 addresses would not fit in registers
        wait(&shared.freed[place.stage], place.phase ^ 1);
        // the latents, each token's successor asked for as soon as it is converted
        const auto convert_latents = [&]<int kProducts>() {
#pragma unroll
            for (int token = 0; token < kTokens; token += kTogether) {
                uint4 chunks[kTogether][2];
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    const int t = token + i;
                    const uint32_t both = kProducts == 0 ? 0 : __shfl_sync(~0u, factors[t / 8], t % 8 * 4 + lane / 8);
                    convert<T, kProducts>(swap_halves(held.latents[t], swapped(lane)), both, chunks[i]);
                }
#pragma unroll
                for (int i = 0; i < kTogether; ++i) store_latents(latents, token + i, chunks[i]);
#pragma unroll
                for (int i = 0; i < kTogether; ++i, at += from.stride) {
                    held.latents[token + i] = ptx::load_in_order(at, from.has(token + i));
                }
            }
        };
        if constexpr (!Rows<T, kFormat>::kScaled) {
            convert_latents.template operator()<0>();
        } else if (__all_sync(~0u, (factors[0] | factors[1]) >> 16 << 1 == 0)) {  // powers of two, mostly
            convert_latents.template operator()<1>();
        } else {
            convert_latents.template operator()<2>();
        }
        if constexpr (Rows<T, kFormat>::kScaled) {
            if (!usual) {
                convert_unusual<T>(TokenRows(params, rows, pages, tile, pages.page_of(tile), warp), lane, latents);
            }
        }
        held.store_rope(to[kRope], lane, first);
        held.load_rope(from, lane);
        __syncwarp();
        if (lane == 0) cuda::ptx::mbarrier_arrive(&shared.landed[place.stage]);
        if (tile == segment.begin) finish_queries<T, Stored>(params, shared, rows, warp);
        // the rows after the next to L2, so that what a tile waits for does not come from memory
        if (params.cache_stride_token == Rows<T, kFormat>::kBytes) {
            const TokenRows after(params, rows, pages, tile + 2, pages.checked(next_entry), warp);
            if (lane == 0 && after.count > 0) {
                ptx::prefetch_bulk_l2(after.first, min(after.count, kTokens) * Rows<T, kFormat>::kBytes);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------- consumers (2 warpgroups)

// Waits for a tile, and for what was written to shared memory before it to be what a wgmma reads. Converters could do
// the latter, but their fence would also wait for all that they have on its way from memory.
template <typename T>
__device__ __forceinline__ void wait_for_tile(SharedStorage<T>& shared, const Place& place) {
    wait(&shared.landed[place.stage], place.phase);
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
}

// After a warpgroup's last use of a tile.
__device__ __forceinline__ void release(const Consumer& me, uint64_t* freed) {
    if (me.lane == 0) cuda::ptx::mbarrier_arrive(freed);
}

// Starts S = Q K^T of a tile, once it has landed.
template <typename T>
__device__ __forceinline__ void score(SharedStorage<T>& shared, const Place& place, float (&rS)[32]) {
    wait_for_tile(shared, place);
    wgmma::fence();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        const uint64_t q = wgmma::k_major(shared.sQ[slice]), k = wgmma::k_major(shared.sK[place.stage][slice]);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            wgmma::m64n64k16<T>(rS, wgmma::advance(q, step * wgmma::kStepBytesKMajor),
                                wgmma::advance(k, step * wgmma::kStepBytesKMajor), slice + step > 0);
        }
    }
    wgmma::commit();
}

// Leaves P of the tile in `stage` for the follower, in the rope slice, with what it is relative to and its sums. The
// follower's fence, after the barrier, is what its wgmma needs to read P.
template <typename T>
__device__ __forceinline__ void leave_probabilities(SharedStorage<T>& shared, const Consumer& me, int stage,
                                                    const float (&base)[2], const float (&sum)[2],
                                                    const uint32_t (&rP)[16]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (me.lane % 4 == 0) shared.base[stage][me.row(i)] = base[i];
        shared.sum[stage][me.row(i)][me.lane % 4] = sum[i];
    }
    ptx::named_barrier(kWarpgroupOf, kWarpgroup);  // all of the warpgroup has read the rope slice
    store_probabilities(me, rP, shared.sK[stage][kRope]);
    ptx::named_barrier_arrive(kStored + stage, kConsumers);
}

// Warpgroup 0. Leaves its last tile unreleased, and `place` there.
template <typename T, typename Stored>
__device__ __forceinline__ void attend_scorer(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                              const Consumer& me, const Segment& segment, float scale_log2,
                                              Place& place, uint32_t& queries_phase, Softmax& softmax,
                                              float (&rO)[128]) {
    int visible[2];
    visible_keys(params, rows, me, segment, visible);
    wait(&shared.queries_landed, queries_phase);
    queries_phase ^= 1;
    float scale[2] = {scale_log2, scale_log2};
    if constexpr (!std::is_same_v<T, Stored>) {
#pragma unroll
        for (int i = 0; i < 2; ++i) scale[i] *= take_unit(shared.query_units[me.row(i)]);
    }
    for (int tile = segment.begin;; ++tile) {
        const bool last = tile + 1 == segment.end;
        float rS[32], high[2], factor[2], sum[2];
        uint32_t rP[16];
        score(shared, place, rS);
        wgmma::wait<0>();
        wgmma::keep(rS);
        if (last && me.lane == 0) cuda::ptx::mbarrier_arrive(&shared.queries_freed);
        if constexpr (std::is_same_v<T, Stored>) {
            scale_and_mask(me, scale_log2, tile, visible, rS);
        } else {
#pragma unroll
            for (int k = 0; k < 32; ++k) rS[k] = __fmul_rn(rS[k], scale[k / 2 % 2]);
            mask(me, tile, visible, rS);
        }
        row_maxima(rS, high);
        const float base[2] = {fmaxf(high[0], softmax.base[0]), fmaxf(high[1], softmax.base[1])};
        change_base(softmax, base, factor);
        exponentiate<T>(base, rS, rP, sum);
        add_sum(softmax, sum);
        leave_probabilities(shared, me, place.stage, base, sum, rP);
        rescale(factor, rO);
        wgmma::keep(rO);
        wgmma::keep(rP);
        const uint64_t v = wgmma::mn_major(shared.sK[place.stage][0]);
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            wgmma::m64n256k16<T>(rO, rP + 4 * step, wgmma::advance(v, step * wgmma::kStepBytesMNMajor), true);
        }
        wgmma::commit();
        wgmma::wait<0>();
        wgmma::keep(rO);
        wgmma::keep(rP);
        if (last) break;
        release(me, &shared.freed[place.stage]);
        place.next();
    }
}

// Takes what the scorer left beside P.
template <typename T>
__device__ __forceinline__ void take_base_and_sum(SharedStorage<T>& shared, const Consumer& me, int stage,
                                                  Softmax& softmax, float (&factor)[2]) {
    const float* base = shared.base[stage];
    const float (*sum)[4] = shared.sum[stage];
    change_base(softmax, {base[me.row(0)], base[me.row(1)]}, factor);
    add_sum(softmax, {sum[me.row(0)][me.lane % 4], sum[me.row(1)][me.lane % 4]});
}

// Warpgroup 1. The same.
template <typename T>
__device__ __forceinline__ void attend_follower(SharedStorage<T>& shared, const Consumer& me, const Segment& segment,
                                                Place& place, Softmax& softmax, float (&rO)[128]) {
    for (int tile = segment.begin;; ++tile, place.next()) {
        ptx::named_barrier(kStored + place.stage, kConsumers);
        float factor[2];
        take_base_and_sum(shared, me, place.stage, softmax, factor);
        wait_for_tile(shared, place);  // the scorer has, but this warpgroup's wgmmas read it too
        rescale(factor, rO);
        wgmma::keep(rO);
        const uint64_t p = wgmma::k_major(shared.sK[place.stage][kRope]);
        const uint64_t v = wgmma::mn_major(shared.sK[place.stage][kHalfSlices]);
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            wgmma::m64n256k16<T>(rO, wgmma::advance(p, step * wgmma::kStepBytesKMajor),
                                 wgmma::advance(v, step * wgmma::kStepBytesMNMajor), true);
        }
        wgmma::commit();
        wgmma::wait<0>();
        wgmma::keep(rO);
        if (tile + 1 == segment.end) break;
        release(me, &shared.freed[place.stage]);
    }
}

// What became of a segment, from a warpgroup's accumulators to memory, by way of its half of the last tile's V.
template <typename Out, typename T>
__device__ __forceinline__ void store(const FwdParams& params, SharedStorage<T>& shared, const RowTile& rows,
                                      const Consumer& me, const Segment& segment, int warpgroup, float out_scale,
                                      Place& place, Softmax& softmax, float (&rO)[128]) {
    float scale[2], lse_log2[2];
    normaliser(softmax, scale, lse_log2);
    normalise(scale, rO);
    if (out_scale != 1.f) {
#pragma unroll
        for (int k = 0; k < 128; ++k) rO[k] *= out_scale;
    }
    void* staging = shared.sK[place.stage][warpgroup * kHalfSlices];
    ptx::named_barrier(kWarpgroupOf + warpgroup, kWarpgroup);  // all four warps' wgmmas are done
    if (segment.place >= 0) {
        store_share(params, rows, me, segment.place, warpgroup, lse_log2, rO);
    } else {
        store_rows<Out>(params, rows, me, segment.row, warpgroup, lse_log2, rO, staging);
    }
    release(me, &shared.freed[place.stage]);
    place.next();
}

// ------------------------------------------------------------------------------------------------------------ kernel

// The lane is read anew for each segment: what derives from it would else be kept in registers across segments.
__device__ __forceinline__ Consumer consumer() {
    return {__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), ptx::lane()};
}

template <typename T, typename Stored, CacheFormat kFormat, bool kUneven>
__global__ void __launch_bounds__(kThreads, 1) fwd_kvcache_mla_fp8_kernel(const __grid_constant__ FwdParams params) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage<T>& shared = *reinterpret_cast<SharedStorage<T>*>(shared_bytes);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
    const RowTile rows(params);

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < 2; ++stage) {
            cuda::ptx::mbarrier_init(&shared.landed[stage], kConverterWarps);
            cuda::ptx::mbarrier_init(&shared.freed[stage], kConsumerWarps);
        }
        cuda::ptx::mbarrier_init(&shared.queries_landed, kConverterWarps);
        cuda::ptx::mbarrier_init(&shared.queries_freed, kConsumerWarps / 2);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
    cudaGridDependencySynchronize();  // nothing above reads what an earlier kernel wrote
    cudaTriggerProgrammaticLaunchCompletion();
    if (warp >= kConsumerWarps) prefetch_tables<kUneven>(params, threadIdx.x - kConsumers, kThreads - kConsumers);
    read_plan<kUneven>(params, shared.parts);
    const float kv_scale = kFormat == CacheFormat::kFp8Tensor ? __ldg(params.kv_scale) : 1.f;

    Place place;
    uint32_t queries_phase = 0;
    if (warp < kConsumerWarps / 2) {
        ptx::increase_registers<kScorerRegisters>();
        const float scale_log2 = params.softmax_scale_log2 * kv_scale;
        for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
            if (segment.begin == segment.end) return store_nothing<Stored, kConsumers>(params, rows, segment);
            float rO[128] = {};  // [64, 256] of the warpgroup
            Softmax softmax;
            const Consumer me = consumer();
            attend_scorer<T, Stored>(params, shared, rows, me, segment, scale_log2, place, queries_phase, softmax, rO);
            store<Stored>(params, shared, rows, me, segment, 0, kv_scale, place, softmax, rO);
        });
    } else if (warp < kConsumerWarps) {
        ptx::decrease_registers<kFollowerRegisters>();
        for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
            if (segment.begin == segment.end) return store_nothing<Stored, kConsumers>(params, rows, segment);
            float rO[128] = {};
            Softmax softmax;
            const Consumer me = consumer();
            attend_follower(shared, me, segment, place, softmax, rO);
            store<Stored>(params, shared, rows, me, segment, 1, kv_scale, place, softmax, rO);
        });
    } else {
        ptx::decrease_registers<kConverterRegisters>();
        const int converter = warp - kConsumerWarps;
        for_each_segment<kUneven>(params, shared.parts, rows, [&](const Segment& segment, const RowTile& rows) {
            convert_keys<T, Stored, kFormat>(params, shared, rows, segment, converter, place, queries_phase);
        });
        if (converter == 0 && blockIdx.x == 0) list_split_rows<kUneven>(params, shared.parts);
        if constexpr (kUneven) {
            if (converter == 1) store_unclaimed<Stored>(params);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, typename Stored, CacheFormat kFormat, bool kUneven>
void launch(const FwdParams& params, cudaStream_t stream) {
    constexpr auto kKernel = fwd_kvcache_mla_fp8_kernel<T, Stored, kFormat, kUneven>;
    constexpr int kSharedBytes = sizeof(SharedStorage<T>);
    static_assert(kSharedBytes <= 227 * 1024);
    allow_shared_bytes<kKernel>(kSharedBytes, "fwd_kvcache_mla: shared memory");
    const dim3 grid(params.row_tiles, params.grid_parts);
    cuda_check(launch_dependent(kKernel, grid, kThreads, kSharedBytes, stream, params), "fwd_kvcache_mla");
}

template <typename T, typename Stored, CacheFormat kFormat>
void launch(const FwdParams& params, cudaStream_t stream) {
    params.cu_seqlens_q != nullptr ? launch<T, Stored, kFormat, true>(params, stream)
                                   : launch<T, Stored, kFormat, false>(params, stream);
}

template <typename Stored>
void launch(const FwdParams& params, cudaStream_t stream) {
    params.format == CacheFormat::kFp8Blocks ? launch<Stored, Stored, CacheFormat::kFp8Blocks>(params, stream)
                                             : launch<__half, Stored, CacheFormat::kFp8Tensor>(params, stream);
}

}  // namespace

void fwd_kvcache_mla_fp8(const FwdParams& params, cudaStream_t stream) {
    if (params.rows <= kFewRows) return fwd_kvcache_mla_fp8_few_rows(params, stream);
    if (params.q_scale != nullptr) return fwd_kvcache_mla_fp8_queries(params, stream);
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
