"""The public functions: what each op computes, with shapes, dtypes and defaults. They only call torch.ops.flashmla.*.

Shapes: b rows (sequences), s_q queries a row, h_q query heads, h_k key heads (1 in MLA), d_qk key width (kv_lora_rank +
qk_rope_head_dim, 576 for DeepSeek V2/V3), d_v value width (kv_lora_rank, 512). Bad input raises RuntimeError, which
names the tensor, what was expected and what came, before anything is written.

Values are bad input too: a length below 0 or beyond the table, a page outside the cache, a slot out of range or given
twice, cu_seqlens_q that decreases or goes beyond q, a plan for other rows. They raise on the CPU, and on CUDA if
FLASHMLA_DEBUG=1 is set when flashmla_ops is imported: each call then waits for the device. Otherwise on CUDA lengths
clamp to the table and cu_seqlens_q to q (queries that no row has then keep what memory held), bad pages read as zeros,
bad slots are skipped, and a plan for other rows gives wrong numbers. Under FLASHMLA_DEBUG=1 scales that are not finite
and above 0 and plans for other heads raise too, and calls that are being captured into a CUDA graph are refused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FlashMLASchedMeta",
    "concat_and_cache_mla",
    "flash_mla_with_kvcache",
    "fwd_kvcache_mla",
    "get_mla_metadata",
    "get_mla_metadata_",
    "merge_attn_states",
]


@dataclass(frozen=True)
class FlashMLASchedMeta:
    """Stands where a plan is expected, and makes each call plan for itself.

    FlashMLA's 2026 interface caches a plan in this object at the first call. This one holds nothing, so that a call
    means the same in eager, compiled and captured code. To plan once a step, pass tensors: see `get_mla_metadata`.
    """


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_heads_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_q_tokens_per_head_k: int | None = None,
    batch_invariant: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor] | tuple[FlashMLASchedMeta, None]:
    """Plans a decode step: which worker attends to which keys. Make it once a step and share it between layers.

    It depends on values on the device only, so it can be made inside a captured CUDA graph. Its format is in plan.py.

    Args:
        cache_seqlens: [b] int32, keys in each row, those of this step included.
        num_heads_per_head_k: s_q * h_q / h_k, with cu_seqlens_q h_q / h_k (num_q_tokens_per_head_k is another name).
        num_heads_k: h_k.
        num_heads_q, topk, is_fp8_kvcache: accepted for FlashMLA's 2025-09 form; sparse attention is not served.
        batch_invariant: a plan under which a row's output and lse are the same bits whatever the other rows are, how
            many, in which order, and however many queries stand before its own, eager or in a CUDA graph. Within one
            backend, architecture and version of what compiles its kernels; on the CPU, one number of threads. It holds
            for calls that are given this plan, which its shape tells from others, also with cu_seqlens_q. `sm90` serves
            it for bf16 and fp16 caches, `triton` and `cpu` for all. The price is in the README; planning takes longer,
            too.
        cu_seqlens_q, max_seqlen_q: as of `fwd_kvcache_mla`, for a call of it that is given them.
    Returns:
        tile_scheduler_metadata [256, 8] int32 ([257, 8] if batch_invariant), num_splits [b + 1] int32.
        Called with nothing (FlashMLA's 2026 form): (FlashMLASchedMeta(), None), and each call plans for itself.
    Raises:
        RuntimeError: bad shape, dtype or head count; on the CPU, and on CUDA under FLASHMLA_DEBUG=1, also a negative
            length or numbers of queries below 0 or above max_seqlen_q.
        NotImplementedError: topk or an fp8 cache is asked for, or batch_invariant where no backend serves it.
    """
    _not_served(topk=topk, is_fp8_kvcache=is_fp8_kvcache or None)
    if num_q_tokens_per_head_k is not None:
        if num_heads_per_head_k not in (None, num_q_tokens_per_head_k):
            raise RuntimeError(
                "num_q_tokens_per_head_k: expected num_heads_per_head_k's value, of which it is another name "
                f"({num_heads_per_head_k}), got {num_q_tokens_per_head_k}"
            )
        num_heads_per_head_k = num_q_tokens_per_head_k
    if cache_seqlens is None and num_heads_per_head_k is None and num_heads_k is None:
        return FlashMLASchedMeta(), None
    given = {"cache_seqlens": cache_seqlens, "num_heads_per_head_k": num_heads_per_head_k, "num_heads_k": num_heads_k}
    for name, value in given.items():
        if value is None:
            raise RuntimeError(f"{name}: expected a value (give {', '.join(given)}, or nothing), got None")
    options = {"batch_invariant": True} if batch_invariant else {}
    if cu_seqlens_q is not None or max_seqlen_q is not None:
        options |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    return torch.ops.flashmla.get_mla_metadata.default(cache_seqlens, num_heads_per_head_k, num_heads_k, **options)


def get_mla_metadata_(
    cache_seqlens: Tensor,
    num_heads_per_head_k: int,
    num_heads_k: int,
    *,
    batch_invariant: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
) -> None:
    """Plans as `get_mla_metadata` does, into the tensors of an earlier plan for as many rows.

    For a plan that is made outside a captured CUDA graph which reads it: replan in place, then replay.

    Args:
        cache_seqlens, num_heads_per_head_k, num_heads_k, batch_invariant, cu_seqlens_q, max_seqlen_q: as of
            `get_mla_metadata`.
        tile_scheduler_metadata: [256, 8] int32 ([257, 8] if batch_invariant), overwritten.
        num_splits: [b + 1] int32, overwritten.
    Raises:
        RuntimeError: what is wrong with which argument; nothing is written then.
    """
    torch.ops.flashmla.get_mla_metadata_.default(
        cache_seqlens,
        num_heads_per_head_k,
        num_heads_k,
        batch_invariant=batch_invariant,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        tile_scheduler_metadata=tile_scheduler_metadata,
        num_splits=num_splits,
    )


def fwd_kvcache_mla(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    tile_scheduler_metadata: Tensor | None = None,
    num_splits: Tensor | None = None,
    *,
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of s_q queries a row over that row's keys in a paged cache, whose first head_dim_v elements are values.

    For row r, query i and head h, with k_j the r-th row's j-th key of head h / (h_q / h_k), and v_j = k_j[:head_dim_v]:

        s_j = softmax_scale * q[r, i, h] . k_j                       for the keys j that the query sees
        out[r, i, h] = sum_j exp(s_j) v_j / sum_j exp(s_j),          lse[r, h, i] = log sum_j exp(s_j)

    Without `causal` a query sees keys 0 .. cache_seqlens[r] - 1; with it, query i sees those with
    j <= cache_seqlens[r] - s_q + i. A query that sees no key (length 0, or before the start) gets out = 0, lse = +inf.
    Key j of row r lies in page block_table[r, j // page_size], at j % page_size. Absorbed MLA: arXiv 2405.04434, 2.1.2.

    With `cu_seqlens_q` rows have different numbers of queries, also none: row r's are cu_seqlens_q[r] ..
    cu_seqlens_q[r + 1] - 1 of q's total_q, and their number takes the place of s_q above. Queries from
    cu_seqlens_q[b] on are nobody's and see no key: a captured call of fixed total_q may have such.

    Args:
        q: [b, s_q, h_q, d_qk] bf16, fp16 (CPU: also fp32), or float8_e4m3fn with q_scale, over a cache of fp8 with
            kv_scale; strides: innermost 1, others multiples of 16 bytes. With cu_seqlens_q [total_q, h_q, d_qk]. For
            e4m3 of more than 16 query rows a key head (s_q * h_q / h_k) sm90's scores are sums of e4m3 products, which
            Hopper adds up with 14 bits or so.
        kv_cache: [num_pages, page_size, h_k, d_qk], q's dtype, strides as q's; page_size a multiple of 16. Or fp8,
            in uint8 or float8_e4m3fn, whose format the last dimension tells (kv_cache.py): d_qk for one
            kv_scale, d_v + 4 * ceil(d_v / 128) + 2 * (d_qk - d_v) up to a multiple of 16 (656 for 576, 512) for scales
            in the cache. Keys are dequantised to q's dtype.
        block_table: [b, max_pages] int32; entries past a row's last page are never read.
        cache_seqlens: [b] int32, keys of each row, this call's own included: append first, then attend.
        head_dim_v: d_v, a multiple of 16, at most d_qk.
        softmax_scale: d_qk ** -0.5 if None (absorbed DeepSeek layers need (d_nope + d_rope) ** -0.5 instead).
        tile_scheduler_metadata, num_splits: the plan of `get_mla_metadata`; without it the call plans for itself.
        q_scale, kv_scale: one fp32 value each, by which what is stored is multiplied; for fp8 q, and caches of one
            scale, only.
        cu_seqlens_q: [b + 1] int32, the queries of the rows before: from 0, not decreasing, at most total_q.
        max_seqlen_q: of any row, at least 1; the kernel is chosen by it, and of a row with more queries only so many
            are computed. A bound above the truth costs little, unless it crosses 16 query rows a key head.
    Returns:
        out [b, s_q, h_q, d_v] in q's dtype (bf16 for fp8 q) and lse [b, h_q, s_q] fp32 (natural logarithm), both
        contiguous. With cu_seqlens_q [total_q, h_q, d_v] and [h_q, total_q].
    Raises:
        RuntimeError: what is wrong with which tensor; on the CPU, and on CUDA under FLASHMLA_DEBUG=1, also a length, a
            page number or a value of cu_seqlens_q out of range.
        NotImplementedError: no backend serves this call; the message says why not.
    """
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    call = (
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        softmax_scale,
        causal,
        tile_scheduler_metadata,
        num_splits,
    )
    op = torch.ops.flashmla.fwd_kvcache_mla.default
    if cu_seqlens_q is not None or max_seqlen_q is not None:
        uneven = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
        return op(*call, q_scale=q_scale, kv_scale=kv_scale, **uneven)
    if q_scale is None and kv_scale is None:  # most calls: the dispatcher takes a microsecond for keywords
        return op(*call)
    return op(*call, q_scale=q_scale, kv_scale=kv_scale)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor | FlashMLASchedMeta | None = None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """FlashMLA's name and signature for `fwd_kvcache_mla`, which documents everything else.

    Args:
        tile_scheduler_metadata: a plan's tensor, with num_splits; or FlashMLASchedMeta or None: the call plans itself.
        is_fp8_kvcache, indices, attn_sink, extra_*, topk_length: FlashMLA's fp8 and sparse arguments.
    Raises:
        NotImplementedError: an fp8 or sparse argument is given; names it.
    """
    _not_served(
        is_fp8_kvcache=is_fp8_kvcache or None,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        tile_scheduler_metadata = None
    return fwd_kvcache_mla(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        softmax_scale,
        causal,
        tile_scheduler_metadata,
        num_splits,
    )


def _not_served(**given) -> None:
    for name, value in given.items():
        if value is not None:
            if name == "is_fp8_kvcache":
                raise NotImplementedError(f"{name}: this form does not take it; give fwd_kvcache_mla the fp8 cache")
            raise NotImplementedError(
                f"{name}: sparse attention is not served by flashmla_ops; leave it out for dense decoding"
            )


def concat_and_cache_mla(
    kv_cache: Tensor,
    kv_c: Tensor,
    k_pe: Tensor,
    slot_mapping: Tensor,
    *,
    kv_scale: Tensor | None = None,
    round_scale: bool = True,
) -> None:
    """Appends tokens to a paged cache, in place: kv_cache[slot // page_size, slot % page_size, 0] = [kv_c | k_pe].

    Args:
        kv_cache: [num_pages, page_size, 1, d_v + d_rope], written; or fp8, as `fwd_kvcache_mla` reads it, on the CPU
            and on CUDA. Under torch.compile pass each layer's cache as a tensor of its own: a slice taken inside the
            graph, or a static slice of a view that already has a storage offset, would be written to the wrong place
            (pytorch#198068). The first is refused; `mark_kv_cache` refuses the second.
        kv_c: [n, d_v], the compressed latents (after their norm), kv_cache's dtype; bf16, fp16 or fp32 for fp8 caches.
        k_pe: [n, d_rope], the rotated shared key part; d_rope may be 0.
        slot_mapping: [n] int64, page * page_size + position in the page; -1 skips the token.
        kv_scale: one fp32 value, by which tokens are divided; for caches of one scale only.
        round_scale: whether an fp8 cache's own scales are powers of two.
    Raises:
        RuntimeError: what is wrong with which tensor; on the CPU, and on CUDA under FLASHMLA_DEBUG=1, also a slot out
            of range or given twice.
    """
    options = {} if kv_scale is None and round_scale else {"kv_scale": kv_scale, "round_scale": round_scale}
    torch.ops.flashmla.concat_and_cache_mla.default(kv_cache, kv_c, k_pe, slot_mapping, **options)


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention over two disjoint sets of keys into attention over both.

        lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    in fp32, rounded once. An lse of +inf or -inf means that nothing was seen: that part's out is ignored, whatever it
    holds; where both saw nothing, out = 0 and lse = +inf. Log-sum-exp merging: arXiv 2501.01005, 2.2.

    Args:
        out_a, out_b: [b, s_q, h_q, d_v], one dtype; strides as `fwd_kvcache_mla`'s q.
        lse_a, lse_b: [b, h_q, s_q] fp32, natural logarithm.
    Returns:
        out [b, s_q, h_q, d_v] in out_a's dtype, lse [b, h_q, s_q] fp32, contiguous.
    """
    return torch.ops.flashmla.merge_attn_states.default(out_a, lse_a, out_b, lse_b)
