// The compiled library's private ops, flashmla_sm90::*. They trust their callers: flashmla_ops/ops.py has
// checked every shape, dtype, device and stride, and flashmla_ops/backends/sm90.py calls them. Outputs are arguments,
// but for fwd_kvcache_mla's: see flashmla_ops/backends/__init__.py.
//
// Only the stable ABI of torch is used, so that one build serves every later torch and every Python.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "check.h"
#include "params.h"

namespace flashmla {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ----------------------------------------------------------------------------------------------------------- helpers

constexpr int kVectorBytes = 16;
constexpr int64_t kDimV = 512;

DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::BFloat16: return DType::kBF16;
        case ScalarType::Half: return DType::kFP16;
        default: return DType::kFP32;
    }
}

// Makes the tensor's device current, and finds the stream that torch is on there.
struct OnDevice {
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream;

    explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
    }
};

// A contiguous tensor on the device of `like`. torch::stable::empty does the same through the dispatcher, in
// more time.
template <size_t kRank>
Tensor new_empty(const int64_t (&sizes)[kRank], ScalarType dtype, const Tensor& like) {
    int64_t strides[kRank];
    int64_t stride = 1;
    for (size_t i = kRank; i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        kRank, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
    return Tensor(handle);
}

// Sizes and strides in vectors of 16 bytes.
int64_t vectors(const Tensor& t, int64_t elements) {
    return elements * static_cast<int64_t>(t.element_size()) / kVectorBytes;
}

const float* pointer_to(const std::optional<Tensor>& scale) {
    return scale.has_value() ? static_cast<const float*>(scale->data_ptr()) : nullptr;
}

const int* ints_of(const std::optional<Tensor>& t) {
    return t.has_value() ? static_cast<const int*>(t->data_ptr()) : nullptr;
}

// Query rows fit in 32 bits, whatever bound of them a caller names.
int int_of(int64_t value) { return static_cast<int>(std::min<int64_t>(value, std::numeric_limits<int>::max())); }

// --------------------------------------------------------------------------------------------------------------- ops

// rows: query rows of a key head; with cu_seqlens_q of one query.
void get_mla_metadata_op(Tensor tile_scheduler_metadata, Tensor num_splits, const Tensor cache_seqlens,
                         int64_t num_parts, int64_t rows, const std::optional<Tensor> cu_seqlens_q,
                         int64_t max_seqlen_q) {
    const OnDevice on(cache_seqlens);
    get_mla_metadata({.metadata = static_cast<int*>(tile_scheduler_metadata.data_ptr()),
                      .num_splits = static_cast<int*>(num_splits.data_ptr()),
                      .cache_seqlens = static_cast<const int*>(cache_seqlens.data_ptr()),
                      .b = static_cast<int>(cache_seqlens.size(0)),
                      .num_parts = static_cast<int>(num_parts),
                      .row_cost = kRowCost,
                      .cu_seqlens_q = ints_of(cu_seqlens_q),
                      .max_seqlen_q = int_of(max_seqlen_q),
                      .group = static_cast<int>(rows)},
                     on.stream);
}

// The batch-invariant plan, [kMaxParts + 1, kColumns]. rows: query rows of a key head; with cu_seqlens_q of one query.
void get_mla_metadata_invariant_op(Tensor tile_scheduler_metadata, Tensor num_splits, const Tensor cache_seqlens,
                                   int64_t num_parts, int64_t places, int64_t rows,
                                   const std::optional<Tensor> cu_seqlens_q, int64_t max_seqlen_q) {
    const OnDevice on(cache_seqlens);
    get_mla_metadata_invariant({.metadata = static_cast<int*>(tile_scheduler_metadata.data_ptr()),
                                .num_splits = static_cast<int*>(num_splits.data_ptr()),
                                .cache_seqlens = static_cast<const int*>(cache_seqlens.data_ptr()),
                                .b = static_cast<int>(cache_seqlens.size(0)),
                                .num_parts = static_cast<int>(num_parts),
                                .row_cost = kRowCost,
                                .cu_seqlens_q = ints_of(cu_seqlens_q),
                                .max_seqlen_q = int_of(max_seqlen_q),
                                .group = int_of(rows),
                                .places = static_cast<int>(places),
                                .few_heads = rows <= kFewHeads},
                               on.stream);
}

// A call under a batch-invariant plan (sm90/units.cuh), of which all else is known. Which kernel serves it goes by
// h_q / h_k, never by s_q or the batch; row tiles of few rows, of 16 or 32, give the same bits.
void fwd_kvcache_mla_invariant(FwdParams params, const Tensor& like, cudaStream_t stream) {
    const bool uneven = params.cu_seqlens_q != nullptr;
    const int64_t max_units = std::min(kMaxUnits, params.max_len / (kTile * kFewestTiles / 2) + 1);
    const int64_t blocks = params.b + (uneven ? int64_t{params.total_q} * params.group / kFewBlock : 0);  // at most
    // of a row tile of the planner, as plan.py's `places`
    params.places = static_cast<int>(std::min(int64_t{kWorkspaceTiles / params.row_tiles}, blocks * max_units));
    params.batch_invariant = true;
    params.few_rows = params.group <= kFewBlock;
    if (params.few_rows && uneven) params.rows = std::min(params.rows, kFewBlock);  // of a block (plan.py)
    const int tile_rows = !params.few_rows ? kRowTile : params.rows > kFewRows || uneven ? kFewBlock : kFewRows;
    params.tile_rows = tile_rows;
    params.row_tiles = params.h_k * ((params.rows + tile_rows - 1) / tile_rows);
    if (params.row_tiles > kLaunchRowTiles) params.places = 0;  // of several launches: rows are whole then
    params.grid_parts = std::clamp(multiprocessors() / params.row_tiles, 1, kMaxParts);
    const int64_t own = int64_t{std::min(params.row_tiles, kLaunchRowTiles)} * params.grid_parts * kOwnPlaces;
    const int64_t tiles = int64_t{params.places} * params.row_tiles + own;
    // partial_out, in halves of bf16 calls; partial_lse, heads of two floats; nodes (sm90/nodes.cuh): in floats
    const int64_t values = tile_rows * kDimV / (params.dtype == DType::kBF16 ? 2 : 1),
                  heads = 2 * 8 * 32 * (params.few_rows ? 1 : 2);
    Tensor workspace = new_empty({tiles * (values + heads) + 2 * params.places}, ScalarType::Float, like);
    params.partial_out = static_cast<float*>(workspace.data_ptr());
    params.partial_lse = params.partial_out + tiles * values;
    params.nodes = reinterpret_cast<int2*>(params.partial_lse + tiles * heads);
    const auto kernel = params.few_rows ? sm90::fwd_kvcache_mla_few_rows : sm90::fwd_kvcache_mla;
    kernel(params, stream);
    if (params.places > 0) sm90::fwd_kvcache_mla_merge_nodes(params, stream);
}

// num_parts: parts at work at once; plan_parts: how many the plan may use. Without a plan it makes one of num_parts. A
// cache of bytes is in fp8: with kv_scale in fp8_tensor, without in fp8. With cu_seqlens_q there is no dimension b.
std::tuple<Tensor, Tensor> fwd_kvcache_mla_op(const Tensor q, const Tensor kv_cache, const Tensor block_table,
                                              const Tensor cache_seqlens, double softmax_scale, bool causal,
                                              const std::optional<Tensor> tile_scheduler_metadata, int64_t num_parts,
                                              int64_t plan_parts, const std::optional<Tensor> q_scale,
                                              const std::optional<Tensor> kv_scale,
                                              const std::optional<Tensor> cu_seqlens_q, int64_t max_seqlen_q) {
    const OnDevice on(q);
    const bool uneven = cu_seqlens_q.has_value();
    const int64_t b = cache_seqlens.size(0), h_q = q.size(uneven ? 1 : 2);
    const int64_t total_q = uneven ? q.size(0) : b * q.size(1);
    const int64_t s_q = uneven ? int_of(max_seqlen_q) : q.size(1);
    const ScalarType out_dtype = q_scale.has_value() ? ScalarType::BFloat16 : q.scalar_type();
    Tensor out =
        uneven ? new_empty({total_q, h_q, kDimV}, out_dtype, q) : new_empty({b, s_q, h_q, kDimV}, out_dtype, q);
    Tensor lse =
        uneven ? new_empty({h_q, total_q}, ScalarType::Float, q) : new_empty({b, h_q, s_q}, ScalarType::Float, q);
    if (out.numel() == 0) return {out, lse};
    const int64_t num_pages = kv_cache.size(0), page_size = kv_cache.size(1), h_k = kv_cache.size(2);
    const int64_t group = h_q / h_k;
    // of uneven queries: those of a block, of as many row tiles as one query fills (plan.py)
    const int64_t block_tiles = (group + kRowTile - 1) / kRowTile;
    const int64_t rows = uneven ? std::min(s_q * group, block_tiles * kRowTile) : s_q * group;
    // what tells a batch-invariant plan, without reading it, is that it has one more row
    const bool invariant = tile_scheduler_metadata.has_value() && tile_scheduler_metadata->size(0) > kMaxParts;
    Tensor metadata = tile_scheduler_metadata.has_value() ? *tile_scheduler_metadata
                                                          : new_empty({kMaxParts, kColumns}, ScalarType::Int, q);
    if (!tile_scheduler_metadata.has_value()) {
        Tensor num_splits = new_empty({b + 1}, ScalarType::Int, q);
        get_mla_metadata({.metadata = static_cast<int*>(metadata.data_ptr()),
                          .num_splits = static_cast<int*>(num_splits.data_ptr()),
                          .cache_seqlens = static_cast<const int*>(cache_seqlens.data_ptr()),
                          .b = static_cast<int>(b),
                          .num_parts = static_cast<int>(num_parts),
                          .row_cost = kRowCost,
                          .cu_seqlens_q = ints_of(cu_seqlens_q),
                          .max_seqlen_q = int_of(max_seqlen_q),
                          .group = static_cast<int>(group)},
                         on.stream);
    }
    const int64_t row_tiles = h_k * (uneven ? block_tiles : (rows + kRowTile - 1) / kRowTile);
    constexpr int64_t kLongest = std::numeric_limits<int>::max() - kTile;  // so that no tile ends beyond an int
    const int64_t max_len = num_pages == 0 ? 0 : std::min(block_table.size(1) * page_size, kLongest);
    // A part has at least one tile, or a row without keys: so many parts are enough for any valid plan.
    const int64_t possible_rows = uneven ? b + total_q * group / (block_tiles * kRowTile) : b;  // and blocks
    const int64_t possible_parts = possible_rows * ((max_len + kTile - 1) / kTile + 1);
    // A plan of one part splits nothing.
    const int64_t split_parts =
        plan_parts == 1 || invariant ? 0 : std::min({plan_parts, possible_parts, kWorkspaceTiles / (2 * row_tiles)});
    const int64_t places = 2 * split_parts * row_tiles * kRowTile;
    // A machine's own plan gives rows num_parts / b parts, more or less. Where most parts have a row's end and
    // another's begin, and rows have several row tiles, merging the two shares of a row in the decode kernel saves more
    // than clearing the counters costs (csrc/NOTES.md).
    const CacheFormat format = kv_cache.element_size() > 1 ? CacheFormat::kPlain
                               : kv_scale.has_value()      ? CacheFormat::kFp8Tensor
                                                           : CacheFormat::kFp8Blocks;
    const bool few_rows = rows <= (format == CacheFormat::kPlain && !uneven ? 2 * kFewRows : kFewRows);
    const bool mostly_pairs = !uneven && num_parts < b && rows > kRowTile && format == CacheFormat::kPlain;
    const int64_t arrivals = mostly_pairs ? 2 * split_parts * row_tiles : 0;
    // partial_out, partial_lse, arrivals, split_rows, scratch: in floats
    constexpr int64_t kScratch = 4;
    std::optional<Tensor> workspace;
    float* partial_out = nullptr;
    if (places > 0) {
        const int64_t size = places * (kDimV + 1) + arrivals + 2 * split_parts + kScratch;
        workspace = new_empty({size}, ScalarType::Float, q);
        partial_out = static_cast<float*>(workspace->data_ptr());
    }
    float* partial_lse = partial_out + places * kDimV;
    float* counters = partial_lse + places;

    const FwdParams params = {
        .out = out.data_ptr(),
        .lse = static_cast<float*>(lse.data_ptr()),
        .q = q.data_ptr(),
        .kv_cache = kv_cache.data_ptr(),
        .q_scale = pointer_to(q_scale),
        .kv_scale = pointer_to(kv_scale),
        .block_table = static_cast<const int*>(block_table.data_ptr()),
        .cache_seqlens = static_cast<const int*>(cache_seqlens.data_ptr()),
        .metadata = static_cast<const int*>(metadata.data_ptr()),
        .partial_out = partial_out,
        .partial_lse = partial_lse,
        .arrivals = arrivals > 0 ? reinterpret_cast<int*>(counters) : nullptr,
        .cu_seqlens_q = ints_of(cu_seqlens_q),
        .split_rows = reinterpret_cast<int2*>(counters + arrivals),
        .scratch = counters + arrivals + 2 * split_parts,
        .q_stride_b = uneven ? 0 : q.stride(0),
        .q_stride_s = q.stride(uneven ? 0 : 1),
        .q_stride_h = q.stride(uneven ? 1 : 2),
        .cache_stride_page = kv_cache.stride(0),
        .cache_stride_token = kv_cache.stride(1),
        .cache_stride_head = kv_cache.stride(2),
        .table_stride = block_table.stride(0),
        .num_pages = num_pages,
        .b = static_cast<int>(b),
        .s_q = static_cast<int>(s_q),
        .h_q = static_cast<int>(h_q),
        .h_k = static_cast<int>(h_k),
        .page_size = static_cast<int>(page_size),
        .total_q = static_cast<int>(total_q),
        .max_len = static_cast<int>(max_len),
        .group = static_cast<int>(group),
        .rows = static_cast<int>(rows),
        .row_tiles = static_cast<int>(row_tiles),
        .grid_parts = static_cast<int>(num_parts),
        .plan_parts = static_cast<int>(plan_parts),
        .split_parts = static_cast<int>(split_parts),
        .softmax_scale_log2 = static_cast<float>(softmax_scale * 1.4426950408889634),
        .causal = causal,
        .few_rows = few_rows,
        .tile_rows = !few_rows         ? kRowTile
                     : rows > kFewRows ? 2 * kFewRows
                                       : kFewRows,
        .dtype = dtype_of(out),
        .format = format,
    };
    if (invariant) {
        fwd_kvcache_mla_invariant(params, q, on.stream);
        return {out, lse};
    }
    const auto kernel = format != CacheFormat::kPlain ? sm90::fwd_kvcache_mla_fp8
                        : params.few_rows             ? sm90::fwd_kvcache_mla_few_rows
                                                      : sm90::fwd_kvcache_mla;
    kernel(params, on.stream);
    if (places > 0) sm90::fwd_kvcache_mla_combine(params, on.stream);
    return {out, lse};
}

// A cache of bytes is in fp8: with kv_scale in fp8_tensor, without in fp8 (flashmla_ops/kv_cache.py).
void concat_and_cache_mla_op(Tensor kv_cache, const Tensor kv_c, const Tensor k_pe, const Tensor slot_mapping,
                             const std::optional<Tensor> kv_scale, bool round_scale) {
    if (slot_mapping.numel() == 0) return;
    const OnDevice on(kv_cache);
    const AppendParams params = {
        .kv_cache = kv_cache.data_ptr(),
        .kv_c = kv_c.data_ptr(),
        .k_pe = k_pe.data_ptr(),
        .slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr()),
        .n = slot_mapping.size(0),
        .num_slots = kv_cache.size(0) * kv_cache.size(1),
        .page_size = kv_cache.size(1),
        .page_stride = vectors(kv_cache, kv_cache.stride(0)),
        .token_stride = vectors(kv_cache, kv_cache.stride(1)),
        .kv_c_stride = vectors(kv_c, kv_c.stride(0)),
        .k_pe_stride = vectors(k_pe, k_pe.stride(0)),
        .kv_c_vectors = static_cast<int>(vectors(kv_c, kv_c.size(1))),
        .k_pe_vectors = static_cast<int>(vectors(k_pe, k_pe.size(1))),
        .kv_scale = pointer_to(kv_scale),
        .round_scale = round_scale,
        .dtype = dtype_of(kv_c),
    };
    kv_cache.element_size() == 1 ? concat_and_cache_mla_fp8(params, on.stream)
                                 : concat_and_cache_mla(params, on.stream);
}

void merge_attn_states_op(Tensor out, Tensor lse, const Tensor out_a, const Tensor lse_a, const Tensor out_b,
                          const Tensor lse_b) {
    if (out.numel() == 0) return;
    const OnDevice on(out);
    const auto side = [](const Tensor& out, const Tensor& lse) {
        return MergeParams::Side{.out = out.data_ptr(),
                                 .lse = static_cast<const float*>(lse.data_ptr()),
                                 .out_stride_b = out.stride(0),
                                 .out_stride_s = out.stride(1),
                                 .out_stride_h = out.stride(2),
                                 .lse_stride_b = lse.stride(0),
                                 .lse_stride_h = lse.stride(1)};
    };
    merge_attn_states({.out = out.data_ptr(),
                       .lse = static_cast<float*>(lse.data_ptr()),
                       .a = side(out_a, lse_a),
                       .b = side(out_b, lse_b),
                       .batch = out.size(0),
                       .s_q = static_cast<int>(out.size(1)),
                       .h_q = static_cast<int>(out.size(2)),
                       .d_v = static_cast<int>(out.size(3)),
                       .dtype = dtype_of(out)},
                      on.stream);
}

// The benchmark's ceiling: `pages` [n] int32 of a contiguous cache.
void paged_stream_op(const Tensor kv_cache, const Tensor pages) {
    if (pages.numel() == 0) return;
    const OnDevice on(kv_cache);
    const int64_t num_pages = kv_cache.size(0);
    const int64_t page_bytes = kv_cache.numel() / std::max<int64_t>(num_pages, 1) * kv_cache.element_size();
    sm90::paged_stream({.kv_cache = kv_cache.data_ptr(),
                        .pages = static_cast<const int*>(pages.data_ptr()),
                        .num_pages = num_pages,
                        .n = static_cast<int>(pages.size(0)),
                        .page_bytes = static_cast<int>(page_bytes)},
                       on.stream);
}

// What the driver supports and what the library was built with, as CUDA numbers them (13000 is 13.0).
std::tuple<int64_t, int64_t> cuda_versions_op() {
    int driver = 0, runtime = 0;
    cuda_check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    cuda_check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    return {driver, runtime};
}

}  // namespace
}  // namespace flashmla

// ------------------------------------------------------------------------------------------------------ registration

STABLE_TORCH_LIBRARY_FRAGMENT(flashmla_sm90, m) {
    m.def(
        "get_mla_metadata(Tensor(a!) tile_scheduler_metadata, Tensor(b!) num_splits, Tensor cache_seqlens, int "
        "num_parts, int rows, Tensor? cu_seqlens_q, int max_seqlen_q) "
        "-> ()");
    m.def(
        "get_mla_metadata_invariant(Tensor(a!) tile_scheduler_metadata, Tensor(b!) num_splits, Tensor cache_seqlens, "
        "int num_parts, int places, int rows, Tensor? cu_seqlens_q, int max_seqlen_q) -> ()");
    m.def(
        "fwd_kvcache_mla(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, float softmax_scale, "
        "bool causal, Tensor? tile_scheduler_metadata, int num_parts, int plan_parts, Tensor? q_scale, Tensor? "
        "kv_scale, Tensor? cu_seqlens_q, int max_seqlen_q) "
        "-> (Tensor out, Tensor lse)");
    m.def(
        "concat_and_cache_mla(Tensor(a!) kv_cache, Tensor kv_c, Tensor k_pe, Tensor slot_mapping, Tensor? kv_scale, "
        "bool round_scale) -> ()");
    m.def(
        "merge_attn_states(Tensor(a!) out, Tensor(b!) lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
        "-> ()");
    m.def("paged_stream(Tensor kv_cache, Tensor pages) -> ()");
    m.def("cuda_versions() -> (int driver, int runtime)");
}

STABLE_TORCH_LIBRARY_IMPL(flashmla_sm90, CUDA, m) {
    m.impl("get_mla_metadata", TORCH_BOX(&flashmla::get_mla_metadata_op));
    m.impl("get_mla_metadata_invariant", TORCH_BOX(&flashmla::get_mla_metadata_invariant_op));
    m.impl("fwd_kvcache_mla", TORCH_BOX(&flashmla::fwd_kvcache_mla_op));
    m.impl("concat_and_cache_mla", TORCH_BOX(&flashmla::concat_and_cache_mla_op));
    m.impl("merge_attn_states", TORCH_BOX(&flashmla::merge_attn_states_op));
    m.impl("paged_stream", TORCH_BOX(&flashmla::paged_stream_op));
}

STABLE_TORCH_LIBRARY_IMPL(flashmla_sm90, CompositeExplicitAutograd, m) {
    m.impl("cuda_versions", TORCH_BOX(&flashmla::cuda_versions_op));
}
