// What the launchers take: pointers with their shapes, strides in elements. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashmla {

// The plan's format and constants, which flashmla_ops/plan.py explains.
constexpr int kTile = 64;       // keys in a tile, whatever the page size
constexpr int kRowTile = 64;    // query rows in a row tile
constexpr int kMaxParts = 256;  // rows of the plan
constexpr int kColumns = 8;
constexpr int kWorkspaceTiles = 1024;  // of 64 x 512 fp32, for the shares of all row tiles: 128 MiB
constexpr int kFewestTiles = 4;        // and these for batch-invariant plans
constexpr int kUnitTiles = 8;
constexpr int kFewHeads = 16;
constexpr int kFewBlock = 32;  // query rows of a block of uneven queries, with as many heads or fewer
constexpr int kMaxUnits = 128;
constexpr int kLaunchRowTiles = 160;  // so that the workspace stays bounded (units.cuh)
constexpr int kOwnPlaces = 7;         // log2(kMaxUnits): nodes of a row that wait at once for one that is to come
constexpr int kMinTiles = 1;
constexpr int kRowCost = 4;
constexpr int kFewRows = 16;
constexpr int kSharesPerTile = 16;
// Of uneven queries: query rows of a key head in a block, group = h_q / h_k.
__host__ __device__ constexpr int rows_of_block(int group, bool batch_invariant = false) {
    return batch_invariant && group <= kFewBlock ? kFewBlock : (group + kRowTile - 1) / kRowTile * kRowTile;
}
// Of a unit of a row of so many tiles, also of none.
__host__ __device__ constexpr int unit_tiles(int tiles, bool few_heads) {
    const auto max = [](int a, int b) { return a > b ? a : b; };
    const auto min = [](int a, int b) { return a < b ? a : b; };
    constexpr int kMost = kMaxUnits / 2;
    const int of_short = max(kFewestTiles, min(kUnitTiles, (tiles + 3) / 4));
    const int eighth = ((tiles + 8 * kFewestTiles - 1) / (8 * kFewestTiles) - 1) * kFewestTiles;
    const int each = max(max(of_short, min(2 * kUnitTiles, eighth)), (tiles + kMost - 1) / kMost);
    const int half = (each + 1) / 2;
    return few_heads ? half : 2 * half;
}
enum PlanColumn { kFirstRow, kFirstTile, kLastRow, kLastTile, kFirstSplit, kFlags, kFirstRowTile, kLastRowTile };

enum class DType { kBF16, kFP16, kFP32 };

// How a token lies in a cache (flashmla_ops/kv_cache.py): as it is; e4m3 with a scale for every 128 values and rope in
// bf16; e4m3 with one scale for all.
enum class CacheFormat { kPlain, kFp8Blocks, kFp8Tensor };

struct MetadataParams {
    int* metadata;             // [kMaxParts, kColumns], of a batch-invariant plan [kMaxParts + 1, kColumns]
    int* num_splits;           // [b + 1]
    const int* cache_seqlens;  // [b]
    int b;
    int num_parts;  // 1 to kMaxParts
    int row_cost;
    const int* cu_seqlens_q;  // [b + 1]; null: rows have as many queries
    int max_seqlen_q;         // of a row
    int group;                // h_q / h_k, of uneven queries
    // of batch-invariant plans
    int places;      // what a row tile has in the workspace
    bool few_heads;  // units are half as long
    int block_rows;  // of uneven queries, rows_of_block: the launcher fills it in
};

struct AppendParams {
    void* kv_cache;               // [num_pages, page_size, 1, last_dim]
    const void* kv_c;             // [n, d_c]
    const void* k_pe;             // [n, d_pe]
    const int64_t* slot_mapping;  // [n]
    int64_t n, num_slots, page_size;
    // in vectors of 16 bytes
    int64_t page_stride, token_stride, kv_c_stride, k_pe_stride;
    int kv_c_vectors, k_pe_vectors;
    // for fp8 caches only
    const float* kv_scale;  // fp8_tensor's one scale; null: fp8, with a scale for every 128 values
    bool round_scale;       // fp8's scales are powers of two
    DType dtype;            // of kv_c and k_pe
};

struct MergeParams {
    void* out;   // [b, s_q, h_q, d_v], contiguous
    float* lse;  // [b, h_q, s_q], contiguous
    struct Side {
        const void* out;   // [b, s_q, h_q, d_v]
        const float* lse;  // [b, h_q, s_q], innermost stride 1
        int64_t out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_h;
    } a, b;
    int64_t batch;
    int s_q, h_q, d_v;
    DType dtype;
};

struct FwdParams {
    void* out;                 // [b, s_q, h_q, 512], contiguous
    float* lse;                // [b, h_q, s_q], contiguous
    const void* q;             // [b, s_q, h_q, 576]
    const void* kv_cache;      // [num_pages, page_size, h_k, 576 values, or 656 bytes of kFp8Blocks]
    const float* q_scale;      // of q in e4m3; null: q is in dtype
    const float* kv_scale;     // of kFp8Tensor
    const int* block_table;    // [b, max_pages]
    const int* cache_seqlens;  // [b]
    const int* metadata;       // [kMaxParts, kColumns], of a batch-invariant plan [kMaxParts + 1, kColumns]
    float* partial_out;        // [2 * split_parts, row_tiles, 64 * 512]: normalised outputs of split rows' shares
    float* partial_lse;        // [2 * split_parts, row_tiles, 64]: their log-sum-exp, base 2
    int* arrivals;             // [split_parts, row_tiles, 2]: for rows of two shares; null: they are merged like others
    const int* cu_seqlens_q;   // [b + 1]; null: rows have s_q queries each, else s_q is the most that one has, and
                               // q is [total_q, h_q, 576], out [total_q, h_q, 512], lse [h_q, total_q]
    int2* split_rows;          // [split_parts]: (row, shares) of the row that the part begins, if it is to be combined
    void* scratch;             // 16 bytes whose contents mean nothing
    int64_t q_stride_b, q_stride_s, q_stride_h;
    int64_t cache_stride_page, cache_stride_token, cache_stride_head;
    int64_t table_stride;
    int64_t num_pages;
    int b, s_q, h_q, h_k, page_size, total_q;
    int max_len;      // keys that a row of the table reaches: longer lengths clamp to it
    int group;        // h_q / h_k
    int rows;         // s_q * group: query rows of one key head, in the order (s_q, group); of uneven queries the
                      // most that a block of them has (plan.py)
    int row_tiles;    // h_k * ceil(rows / kRowTile), of uneven queries h_k * ceil(group / kRowTile)
    int grid_parts;   // parts at work at once
    int plan_parts;   // parts that the plan may use
    int split_parts;  // parts that the workspace has room for; a plan that uses others is executed unsplit
    float softmax_scale_log2;
    bool causal;
    // up to kFewRows, of plain caches and even queries twice as many: kernels of their own, whose shares lie in rows
    bool few_rows;
    // Under a batch-invariant plan (units.cuh) few_rows goes by `group`, up to kFewBlock, and row_tiles by tile_rows.
    bool batch_invariant;
    int tile_rows;       // kRowTile, of few rows kFewRows or twice as many
    int places;          // that the plan may give a row tile; a plan that uses more is executed unsplit
    int first_row_tile;  // of this launch
    int2* nodes;         // [places]: what parts leave to be merged, of which row (Listed, sm90/nodes.cuh)
    DType dtype;         // of out
    CacheFormat format;
};

struct StreamParams {
    const void* kv_cache;  // [num_pages, page_bytes], contiguous
    const int* pages;      // [n]
    int64_t num_pages;
    int n;
    int page_bytes;
};

void get_mla_metadata(const MetadataParams& params, cudaStream_t stream);
void get_mla_metadata_invariant(const MetadataParams& params, cudaStream_t stream);
void concat_and_cache_mla(const AppendParams& params, cudaStream_t stream);
void concat_and_cache_mla_fp8(const AppendParams& params, cudaStream_t stream);
void merge_attn_states(const MergeParams& params, cudaStream_t stream);

namespace sm90 {
void fwd_kvcache_mla(const FwdParams& params, cudaStream_t stream);
void fwd_kvcache_mla_few_rows(const FwdParams& params, cudaStream_t stream);
void fwd_kvcache_mla_fp8(const FwdParams& params, cudaStream_t stream);
void fwd_kvcache_mla_fp8_queries(const FwdParams& params, cudaStream_t stream);
void fwd_kvcache_mla_fp8_few_rows(const FwdParams& params, cudaStream_t stream);
void fwd_kvcache_mla_combine(const FwdParams& params, cudaStream_t stream);
void fwd_kvcache_mla_merge_nodes(const FwdParams& params, cudaStream_t stream);
void paged_stream(const StreamParams& params, cudaStream_t stream);
}  // namespace sm90

}  // namespace flashmla
