// Merges the shares of rows that the plan split, but for those that the decode kernel merged itself. With lse_i and
// out_i (normalised) those of a row's n shares:
//
//   lse = log2(sum_i 2^lse_i),   out = sum_i 2^(lse_i - lse) out_i
//
// A split row is begun by one part, as its last row, and continued by the parts that follow it, as their first row. The
// decode kernel says which part begins one and how many shares it has (split_rows).
//
// Grid: as many CTAs as fit at once, which share the rows' items. A lane's vector is 16 bytes of a share, in either of
// two layouts: of few rows four floats, columns of a query row; of more what the decode kernel's thread stored at once
// (row_tile.cuh), two rows x four columns in fp16. An item is a warp's vectors, or more of them where there are more
// than warps; a warp merges it, or where rows have many shares a CTA: each warp every eighth share, and the first warp
// the eight. So a lane has up to 8 loads in flight. The order is fixed, so results repeat bitwise.
//
// It is launched before the decode kernel ends, waits for that, and rehearses meanwhile: it merges no shares into
// `scratch`, so that its instructions are at hand (1 us, csrc/NOTES.md).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"
#include "row_tile.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = kMaxParts;
constexpr int kWarps = kThreads / 32;
constexpr int kLoads = 8;      // of a lane, in flight
constexpr int kCtasPerSm = 2;  // with 3 it spills
constexpr float kNothing = -INFINITY;

struct SplitRow {
    int row;     // of the batch
    int part;    // that begins it
    int shares;  // parts part .. part + shares - 1 have one each
};

// A layout tells what a lane has of a share: kVectors of kValues values of kRows rows, `heads` of the share's place.
// A head is a row's lse, base 2, and what its values are to be multiplied by.

// Shares row by row: a warp has 128 columns of a query row at once.
struct ByRows {
    static constexpr int kRows = 1;            // that a lane has
    static constexpr int kGroup = 1;           // query rows that a warp has
    static constexpr int kPerGroup = 4;        // vectors of a lane that are a group's result
    static constexpr int kFew = 1, kMany = 4;  // of an item: where all warps merge it; where items are many
    static constexpr int kValues = 4;          // of a vector
    static constexpr int kVectorStep = 32, kColumnStep = 128;  // from one to the next

    // The vector `v` of a group of a row tile, and the first of its query rows and columns that are the lane's.
    __device__ static int vector(int group, int v, int lane) { return group * (kDimV / 4) + v * kVectorStep + lane; }
    __device__ static int row(int group, int) { return group; }
    __device__ static int column(int v, int lane) { return v * kColumnStep + lane * 4; }
    __device__ static constexpr int row_of(int) { return 0; }  // a value's
    struct Heads {
        const float* lse;
        int64_t stride;  // from a place to the next

        __device__ Heads(const FwdParams& params, int row_tile, int row, int)
            : lse(params.partial_lse + row_tile * kRowTile + row), stride(params.row_tiles * kRowTile) {}
        __device__ float2 load(int) const { return {__ldcg(lse), 1.f}; }
        __device__ void advance(int places) { lse += places * stride; }
    };
};

// Shares as accumulators (PackedShare): [warpgroup, 16, warp, lane], a warp's 16 query rows x 16 columns at once.
struct ByAccumulators {
    static constexpr int kRows = 2, kGroup = 16, kPerGroup = 32, kFew = 2, kMany = 2, kValues = 8;
    static constexpr int kVectorStep = 128, kColumnStep = 16;

    __device__ static int vector(int group, int v, int lane) { return v * kVectorStep + group * 32 + lane; }
    __device__ static int row(int group, int lane) { return group * kGroup + lane / 4; }      // and 8 further
    __device__ static int column(int v, int lane) { return v * kColumnStep + lane % 4 * 2; }  // and the next; 8 further
    __device__ static constexpr int row_of(int i) { return i / 2 % 2; }
    struct Heads {
        const float2* head;
        int64_t stride;

        __device__ Heads(const FwdParams& params, int row_tile, int row, int v)
            : head(packed_share(params, 0, row_tile).heads + v / (kPerGroup / 2) * kRowTile + row),
              stride(int64_t{params.row_tiles} * kShareVectors * sizeof(uint4) / sizeof(float2)) {}
        __device__ float2 load(int r) const { return __ldcg(head + 8 * r); }
        __device__ void advance(int places) { head += places * stride; }
    };
};

// What a lane has of some shares of its rows: relative to the greatest lse among them.
template <typename Layout, int kVectors>
struct Merged {
    float high[Layout::kRows], sum[Layout::kRows];
    float out[kVectors][Layout::kValues];

    __device__ Merged() {
        for (int r = 0; r < Layout::kRows; ++r) high[r] = kNothing, sum[r] = 0.f;
        for (int v = 0; v < kVectors; ++v) {
            for (int i = 0; i < Layout::kValues; ++i) out[v][i] = 0.f;
        }
    }
    __device__ void scale(const float (&factor)[Layout::kRows]) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int i = 0; i < Layout::kValues; ++i) out[v][i] *= factor[Layout::row_of(i)];
        }
    }
    __device__ void add(int v, const float (&weight)[Layout::kRows], const float (&x)[Layout::kValues]) {
#pragma unroll
        for (int i = 0; i < Layout::kValues; ++i) out[v][i] += weight[Layout::row_of(i)] * x[i];
    }
};

template <typename Layout, int kVectors>
struct SharedStorage {
    SplitRow rows[kMaxParts];
    int begun[kWarps];  // split rows that each warp's parts begin
    float high[kWarps][Layout::kRows][32], sum[kWarps][Layout::kRows][32];
    float out[kWarps][kVectors][Layout::kValues][32];  // of each warp's lanes
};

// ---------------------------------------------------------------------------------------------------- device helpers

// Fills shared.rows, in the order of the parts, and returns their number: of none, in the rehearsal, the first is
// empty.
template <typename SharedStorage>
__device__ int list_split_rows(const FwdParams& params, SharedStorage& shared, bool rehearsal) {
    const int part = threadIdx.x, warp = part / 32, lane = part % 32;
    int2 listed = {0, 0};
    if (part < params.split_parts && !rehearsal) listed = __ldcg(params.split_rows + part);
    const uint32_t begun = __ballot_sync(~0u, listed.y > 0);
    if (lane == 0) shared.begun[warp] = __popc(begun);
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += shared.begun[w];
        total += shared.begun[w];
    }
    const int i = before + __popc(begun & ((1u << lane) - 1));
    if (listed.y > 0 || (rehearsal && part == 0)) shared.rows[i] = {listed.x, part, listed.y};
    __syncthreads();
    return total;
}

// Merges a row's shares `first`, first + step, ...; `vectors` and `heads`: the lane's of the share at place 0.
// Few instructions count here: a warp has its scheduler nearly to itself, and waits for each.
template <typename Layout, int kVectors>
__device__ __forceinline__ Merged<Layout, kVectors> merge_shares(const FwdParams& params, const SplitRow& split,
                                                                 const uint4* vectors, typename Layout::Heads heads,
                                                                 int first, int step) {
    constexpr int kAtOnce = kLoads / kVectors, kRows = Layout::kRows;
    // the shares' places: one past the one of the part's first row, then every second
    const int place = first_place(split.part) + max(2 * first, 1);
    vectors += place * params.row_tiles * kShareVectors;
    heads.advance(place);
    int places = first == 0 ? 2 * step - 1 : 2 * step;  // to the next
    int left = split.shares > first ? (split.shares - first - 1) / step + 1 : 0;

    Merged<Layout, kVectors> merged;
#pragma unroll 1
    do {
        uint4 loaded[kAtOnce][kVectors];
        float2 head[kAtOnce][kRows];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const bool there = i < left;
#pragma unroll
            for (int r = 0; r < kRows; ++r) head[i][r] = there ? heads.load(r) : make_float2(kNothing, 0.f);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                loaded[i][v] = there ? __ldcg(vectors + v * Layout::kVectorStep) : uint4{};
            }
            heads.advance(places);
            vectors += places * params.row_tiles * kShareVectors;
            places = 2 * step;
        }
        left -= kAtOnce;
        float base[kRows], factor[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float high = merged.high[r];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) high = fmaxf(high, head[i][r].x);
            base[r] = base_of(high);
            factor[r] = ptx::exp2_approx(merged.high[r] - base[r]);
            merged.high[r] = high;
            merged.sum[r] *= factor[r];
        }
        merged.scale(factor);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            float weight[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                weight[r] = ptx::exp2_approx(head[i][r].x - base[r]);
                merged.sum[r] += weight[r];
                weight[r] *= head[i][r].y;
            }
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                float x[Layout::kValues];
                unpack(loaded[i][v], x);
                merged.add(v, weight, x);
            }
        }
    } while (left > 0);
    return merged;
}

// Merges what each warp has of a row, in the first warp.
template <typename Layout, int kVectors>
__device__ __forceinline__ Merged<Layout, kVectors> merge_warps(SharedStorage<Layout, kVectors>& shared,
                                                                const Merged<Layout, kVectors>& mine) {
    constexpr int kRows = Layout::kRows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // the item before has been read
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        shared.high[warp][r][lane] = mine.high[r];
        shared.sum[warp][r][lane] = mine.sum[r];
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < Layout::kValues; ++i) shared.out[warp][v][i][lane] = mine.out[v][i];
    }
    __syncthreads();
    Merged<Layout, kVectors> merged;
    if (warp > 0) return merged;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) merged.high[r] = fmaxf(merged.high[r], shared.high[w][r][lane]);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        float weight[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            weight[r] = ptx::exp2_approx(shared.high[w][r][lane] - base_of(merged.high[r]));
            merged.sum[r] += weight[r] * shared.sum[w][r][lane];
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            float x[Layout::kValues];
#pragma unroll
            for (int i = 0; i < Layout::kValues; ++i) x[i] = shared.out[w][v][i][lane];
            merged.add(v, weight, x);
        }
    }
    return merged;
}

// A lane's rows to memory: row `row` of key head `head`, from column `column` on, and what follows in the layout. Of
// uneven queries: of the block that the split row is of.
template <typename T, bool kUneven, typename Layout, int kVectors>
__device__ __forceinline__ void store_merged(const FwdParams& params, const SplitRow& split, int head, int row,
                                             int column, bool with_lse, bool rehearsal,
                                             const Merged<Layout, kVectors>& merged) {
    int rows = params.rows, first_query = 0;
    if constexpr (kUneven) {
        if (!rehearsal) {
            const RowQueries queries(params, split.row);
            first_query = queries.first;
            rows = queries.count * params.group;
            row += Blocks(params, split.part).last * block_rows(params);
        }
    }
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
        const int at = row + 8 * r;
        if (at >= rows) return;
        const QueryRow in_head(params, at);
        const int h = head * params.group + in_head.g;
        int64_t out_row = (int64_t{split.row} * params.s_q + in_head.s) * params.h_q + h;
        int64_t lse_row = (int64_t{split.row} * params.h_q + h) * params.s_q + in_head.s;
        if constexpr (kUneven) {
            const int64_t query = first_query + in_head.s;
            out_row = query * params.h_q + h;
            lse_row = int64_t{h} * params.total_q + query;
        }
        T* out = rehearsal ? static_cast<T*>(params.scratch) : static_cast<T*>(params.out) + out_row * kDimV + column;
        float* lse = rehearsal ? static_cast<float*>(params.scratch) : params.lse + lse_row;
        const float sum = merged.sum[r], scale = sum == 0.f ? 0.f : __fdividef(1.f, sum);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const auto& x = merged.out[v];
            T* to = out + (rehearsal ? 0 : v * Layout::kColumnStep);
            if constexpr (Layout::kRows == 1) {
                const uint2 packed = {pack<T>(x[0] * scale, x[1] * scale), pack<T>(x[2] * scale, x[3] * scale)};
                *reinterpret_cast<uint2*>(to) = packed;
            } else {
                *reinterpret_cast<uint32_t*>(to) = pack<T>(x[2 * r] * scale, x[2 * r + 1] * scale);
                *reinterpret_cast<uint32_t*>(to + (rehearsal ? 0 : 8)) =
                    pack<T>(x[2 * r + 4] * scale, x[2 * r + 5] * scale);
            }
        }
        if (with_lse) *lse = sum == 0.f ? INFINITY : (merged.high[r] + log2f(sum)) * kLn2;
    }
}

// ------------------------------------------------------------------------------------------------------------ kernel

// kTogether warps merge an item of kVectors vectors.
template <typename T, typename Layout, int kTogether, int kVectors, bool kUneven>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) fwd_kvcache_mla_combine_kernel(const FwdParams params) {
    static_assert(kTogether == 1 || kTogether == kWarps);
    __shared__ SharedStorage<Layout, kVectors> shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int member = warp % kTogether;
    // An item: [split row, key head, group of query rows, vectors / kVectors].
    constexpr int kPerGroup = Layout::kPerGroup / kVectors, kItemsAtOnce = kWarps / kTogether;
    const int groups_per_head = (params.rows + Layout::kGroup - 1) / Layout::kGroup;
    const int groups = params.h_k * groups_per_head, groups_per_tile = kRowTile / Layout::kGroup;
    cudaTriggerProgrammaticLaunchCompletion();  // what is launched early waits for the end of this grid

#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
        const bool rehearsal = round == 0;
        if (!rehearsal) cudaGridDependencySynchronize();
        const int split_rows = list_split_rows(params, shared, rehearsal);
        const int items = rehearsal ? 1 : split_rows * groups * kPerGroup;  // few: a workspace holds 512 row tiles
        int item = rehearsal ? 0 : blockIdx.x * kItemsAtOnce + warp / kTogether;
#pragma unroll 1
        for (; item < items; item += gridDim.x * kItemsAtOnce) {
            const int v = item % kPerGroup * kVectors, group = item / kPerGroup;
            const int split_row = groups == 1 ? group : group / groups, in_row = group - split_row * groups;
            const int head = params.h_k == 1 ? 0 : in_row / groups_per_head;
            const int in_head = in_row - head * groups_per_head, in_tile = in_head % groups_per_tile;
            const int row_tile = head * (params.row_tiles / params.h_k) + in_head / groups_per_tile;
            const SplitRow split = shared.rows[split_row];
            if (kUneven && !rehearsal) {  // the row may have fewer query rows than others
                const int first = Blocks(params, split.part).last * block_rows(params);
                const int rows = RowQueries(params, split.row).count * params.group - first;
                if (in_head * Layout::kGroup >= rows) continue;
            }
            const uint4* vectors =
                reinterpret_cast<const uint4*>(share_at(params, 0, row_tile)) + Layout::vector(in_tile, v, lane);
            const typename Layout::Heads heads(params, row_tile, Layout::row(in_tile, lane), v);
            auto merged = merge_shares<Layout, kVectors>(params, split, vectors, heads, member, kTogether);
            if constexpr (kTogether > 1) merged = merge_warps(shared, merged);
            if (member == 0) {
                const int column = Layout::column(v, lane);
                store_merged<T, kUneven>(params, split, head, Layout::row(in_head, lane), column, column == 0,
                                         rehearsal, merged);
            }
        }
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

template <typename T, typename Layout, int kTogether, int kVectors>
static void launch(const FwdParams& params, cudaStream_t stream) {
    const dim3 grid(kCtasPerSm * multiprocessors());
    const auto kernel = params.cu_seqlens_q != nullptr
                            ? fwd_kvcache_mla_combine_kernel<T, Layout, kTogether, kVectors, true>
                            : fwd_kvcache_mla_combine_kernel<T, Layout, kTogether, kVectors, false>;
    cuda_check(launch_dependent(kernel, grid, kThreads, 0, stream, params), "fwd_kvcache_mla_combine");
}

template <typename T, typename Layout>
static void launch(const FwdParams& params, cudaStream_t stream) {
    // A plan of this machine gives rows grid_parts / b shares, more or less.
    const int shares = params.grid_parts / std::max(params.b, 1);
    const int rows = std::min(params.b, params.grid_parts);
    const int vectors = rows * params.h_k * (params.rows + Layout::kGroup - 1) / Layout::kGroup * Layout::kPerGroup;
    const int warps = kWarps * kCtasPerSm * multiprocessors();
    const bool few = kWarps * vectors <= 2 * warps;
    if (few && shares >= kWarps) return launch<T, Layout, kWarps, Layout::kFew>(params, stream);
    if (vectors > warps) return launch<T, Layout, 1, Layout::kMany>(params, stream);
    launch<T, Layout, 1, 1>(params, stream);
}

template <typename T>
static void launch(const FwdParams& params, cudaStream_t stream) {
    params.few_rows ? launch<T, ByRows>(params, stream) : launch<T, ByAccumulators>(params, stream);
}

void fwd_kvcache_mla_combine(const FwdParams& params, cudaStream_t stream) {
    params.dtype == DType::kBF16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

}  // namespace flashmla::sm90
