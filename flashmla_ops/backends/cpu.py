"""The CPU backend: vectorised torch, one function per op. It serves CPU tensors of every shape in the contract.

It always checks values, which other backends cannot do without waiting for the device (values.py): lengths beyond the
table, pages outside the cache, bad slots and plans for other rows raise here, before anything is written.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kv_cache import format_of
from ..plan import (
    CPU_PARTS,
    CPU_PLACES,
    FEW_HEADS,
    FIRST_ROW,
    FIRST_TILE,
    LAST_ROW,
    LAST_TILE,
    MAX_PARTS,
    TILE,
    is_invariant,
    make_invariant_plan,
    make_plan,
    plan_blocks,
    row_blocks,
    unit_tiles,
)
from .values import check_concat_and_cache_mla, check_fwd_kvcache_mla, check_lengths, check_queries

BLOCK_BYTES = 128 << 20  # working set of one block of rows and queries
STEP_KEYS = 4096  # keys gathered in one step, over all rows: 9 MB of 576 fp32, which stays in a last-level cache
MIN_CHUNK = 512  # keys of one row in one step; fewer would rescale the accumulators too often


def status() -> str:
    return "ready"


def refusal(op: str, tensor: Tensor, **facts) -> str | None:
    if tensor.is_cpu:
        return None
    return f"it serves CPU tensors only, this one is on {tensor.device}"


# ------------------------------------------------------------------------------------------------- get_mla_metadata


def get_mla_metadata(
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    cache_seqlens: Tensor,
    num_heads_per_head_k: int,
    num_heads_k: int,
    batch_invariant: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> None:
    check_lengths(cache_seqlens)
    rows, blocks = num_heads_per_head_k, None
    if cu_seqlens_q is not None:
        check_queries(cu_seqlens_q, max_seqlen_q)
        rows *= max_seqlen_q
        blocks = row_blocks(cu_seqlens_q, max_seqlen_q, num_heads_per_head_k, batch_invariant)
    if batch_invariant:
        plan, splits = make_invariant_plan(cache_seqlens, CPU_PARTS, CPU_PLACES, num_heads_per_head_k, blocks)
    elif blocks is None:
        plan, splits = make_plan(cache_seqlens, CPU_PARTS)
    else:
        plan, splits = plan_blocks(make_plan, cache_seqlens, blocks, CPU_PARTS)
    tile_scheduler_metadata.copy_(plan)
    num_splits.copy_(splits)


# -------------------------------------------------------------------------------------------------- fwd_kvcache_mla


class Keys(NamedTuple):
    """The cache, and how its rows become keys."""

    kv_cache: Tensor
    d_v: int
    d_rope: int
    kv_scale: Tensor | None
    dtype: torch.dtype  # to which they are rounded

    def values(self, rows: Tensor) -> Tensor:
        """Rows of the cache as fp32."""
        layout = format_of(self.kv_cache, self.d_v, self.d_rope)
        return layout.dequantize(rows, self.d_v, self.d_rope, self.kv_scale, self.dtype).float()


class Chunks(NamedTuple):
    """Each row's keys cut into consecutive ranges: row r has the ranges first[r] .. first[r] + count[r] - 1."""

    first: Tensor  # [b]
    count: Tensor  # [b]
    begin: Tensor  # [number of ranges], in keys
    end: Tensor


def fwd_kvcache_mla(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    d_v: int,
    softmax_scale: float,
    causal: bool,
    plan: tuple[Tensor, Tensor] | None,
    q_scale: Tensor | None,
    kv_scale: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, d_v], lse [b, h_q, s_q]; [total_q, h_q, d_v], [h_q, total_q]
    uneven = cu_seqlens_q, max_seqlen_q
    check_fwd_kvcache_mla(q, kv_cache, block_table, cache_seqlens, d_v, plan, q_scale, kv_scale, None, *uneven)
    *batch, queries, h_q, d_qk = q.shape
    out_dtype = q.dtype
    if q_scale is not None:  # q in e4m3: neither it nor the keys are rounded any further
        q, out_dtype = q.float() * q_scale, torch.bfloat16
    keys = Keys(kv_cache, d_v, d_qk - d_v, kv_scale, q.dtype)
    out = q.new_empty(*batch, queries, h_q, d_v, dtype=out_dtype)
    lse = q.new_empty(*batch, h_q, queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if cu_seqlens_q is None:
        _attend_rows(q, keys, block_table, cache_seqlens, softmax_scale, causal, plan, out, lse)
        return out, lse
    if plan is not None and not is_invariant(plan[0]):
        plan = None  # it is for this call, and says who does what: here there is nobody else
    # rows of one number of queries at a time; queries of no row see nothing
    out.zero_()
    lse.fill_(float("inf"))
    count = cu_seqlens_q.diff()
    for n in count[count > 0].unique().tolist():
        rows = (count == n).nonzero()[:, 0]
        at = cu_seqlens_q[rows, None] + torch.arange(n)  # [rows, n]
        some_out, some_lse = out.new_empty(*at.shape, h_q, d_v), lse.new_empty(len(rows), h_q, n)
        some = q[at], keys, block_table[rows], cache_seqlens[rows]
        _attend_rows(*some, softmax_scale, causal, plan, some_out, some_lse)
        out[at], lse[:, at] = some_out, some_lse.transpose(0, 1)
    return out, lse


def _attend_rows(
    q: Tensor,  # [b, s_q, h_q, d_qk], out and lse not empty
    keys: Keys,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    plan: tuple[Tensor, Tensor] | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Blocks of rows x queries, as many as fit in BLOCK_BYTES, each an online softmax over its rows' chunks."""
    if plan is not None and is_invariant(plan[0]):
        return _attend_invariantly(q, keys, block_table, cache_seqlens, softmax_scale, causal, out, lse)
    (b, s_q), kv_cache, d_v = q.shape[:2], keys.kv_cache, keys.d_v
    lengths = cache_seqlens.long()
    shortest, longest = (int(v) for v in lengths.aminmax())
    chunk = max(1, min(max(STEP_KEYS // b, MIN_CHUNK), longest))
    num_rows, num_queries = _block_shape(q, kv_cache, d_v, chunk)
    row, start = torch.arange(b), torch.zeros_like(lengths)
    if plan is None and longest <= chunk and shortest > 0 and num_rows == b:  # a small call: one step does it
        blocks, chunks = [slice(None)], Chunks(row, start + 1, start, lengths)
    else:
        segments = _segments(plan[0], lengths) if plan else (row, start, lengths)
        chunks = _cut(*segments, b, chunk)
        # rows with many chunks first: those still at work in a step are then the first ones of their block
        blocks = (chunks.count * (1 << 32) + lengths).argsort(descending=True).split(num_rows)
    for rows in blocks:
        row_chunks = Chunks(chunks.first[rows], chunks.count[rows], chunks.begin, chunks.end)
        for first in range(0, s_q, num_queries):
            queries = slice(first, first + num_queries)
            # how many of its row's keys each query sees
            hidden = s_q - 1 - torch.arange(s_q)[queries] if causal else torch.zeros(s_q, dtype=torch.long)[queries]
            visible = lengths[rows][:, None] - hidden
            block = _attend(q[rows, queries], keys, block_table[rows], row_chunks, visible, softmax_scale, d_v)
            out[rows, queries], lse[rows, :, queries] = block[0].to(out.dtype), block[1]


def _segments(metadata: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plan as (row, first key, last key exclusive) of each part's share of each row."""
    b = lengths.shape[0]
    part = metadata.long()
    first_row, last_row = part[:, FIRST_ROW].clamp(0, b), part[:, LAST_ROW].clamp(-1, b - 1)
    num_rows = (last_row - first_row + 1).clamp_min(0)
    if int(num_rows.sum()) > b + MAX_PARTS:
        raise RuntimeError("tile_scheduler_metadata: expected a plan of get_mla_metadata, got overlapping parts")
    owner = torch.repeat_interleave(num_rows)
    row = first_row[owner] + torch.arange(owner.shape[0]) - (num_rows.cumsum(0) - num_rows)[owner]
    begin = torch.where(row == part[owner, FIRST_ROW], part[owner, FIRST_TILE] * TILE, 0)
    end = torch.where(row == part[owner, LAST_ROW], part[owner, LAST_TILE] * TILE, lengths[row])
    return row, begin.clamp_min(0), torch.minimum(end, lengths[row])


def _cut(row: Tensor, begin: Tensor, end: Tensor, b: int, chunk: int) -> Chunks:
    """Cuts segments into chunks of at most `chunk` keys."""
    in_order = row.argsort(stable=True)
    row, begin, end = row[in_order], begin[in_order], end[in_order]
    pieces = (end - begin + chunk - 1).clamp_min(0) // chunk
    owner = torch.repeat_interleave(pieces)
    begin = begin[owner] + chunk * (torch.arange(owner.shape[0]) - (pieces.cumsum(0) - pieces)[owner])
    count = torch.bincount(row[owner], minlength=b)
    return Chunks(count.cumsum(0) - count, count, begin, torch.minimum(begin + chunk, end[owner]))


def _block_shape(q: Tensor, kv_cache: Tensor, d_v: int, chunk: int) -> tuple[int, int]:
    """Rows and queries of a block whose queries, accumulators, scores and keys take about BLOCK_BYTES."""
    b, s_q, h_q, d_qk = q.shape
    query_bytes = h_q * (2 * d_qk + 2 * d_v + 2 * chunk) * 4
    keys_bytes = chunk * kv_cache.shape[2] * d_qk * (4 + kv_cache.itemsize)
    num_queries = min(s_q, max(1, (BLOCK_BYTES - keys_bytes) // query_bytes))
    num_rows = min(b, max(1, BLOCK_BYTES // (num_queries * query_bytes + keys_bytes)))
    return num_rows, num_queries


def _attend(
    q: Tensor,  # [n, i, h_q, d_qk]
    keys: Keys,
    table: Tensor,  # [n, max_pages]
    chunks: Chunks,  # of the n rows
    visible: Tensor,  # [n, i]
    softmax_scale: float,
    d_v: int,
) -> tuple[Tensor, Tensor]:
    """One block: out [n, i, h_q, d_v] and lse [n, h_q, i], fp32.

    In fp32: m the running maximum of the scores, l the sum of exp(score - m), acc that of exp(score - m) * v.
    """
    n, i, h_q, d_qk = q.shape
    h_k = keys.kv_cache.shape[2]
    m_rows = i * h_q // h_k  # query rows of one key head, in the order (i, h_q / h_k)
    q = q.unflatten(2, (h_k, -1)).transpose(1, 2).reshape(n * h_k, m_rows, d_qk).float() * softmax_scale
    acc = q.new_zeros(n * h_k, m_rows, d_v)
    m = q.new_full((n * h_k, m_rows), float("-inf"))
    l = q.new_zeros(n * h_k, m_rows)  # noqa: E741
    furthest = visible.amax(1)
    for step in range(int(chunks.count.max())):
        a = int((chunks.count > step).sum())  # rows still at work
        chunk = chunks.first[:a] + step
        begin, end = chunks.begin[chunk], chunks.end[chunk]
        if (begin >= furthest[:a]).all():
            continue
        position = begin[:, None] + torch.arange(int((end - begin).max()))  # [a, w]
        kv = _gather(keys, table[:a], torch.minimum(position, end[:, None] - 1))
        scores = torch.bmm(q[: a * h_k], kv.transpose(1, 2))  # [a * h_k, m_rows, w]
        limit = torch.minimum(visible[:a], end[:, None])  # [a, i]
        if (limit <= position[:, -1:]).any():
            hidden = position[:, None] >= limit[:, :, None]  # [a, i, w]
            scores.view(a, h_k, i, -1, scores.shape[-1]).masked_fill_(hidden[:, None, :, None], float("-inf"))
        _accumulate(scores, kv[..., :d_v], m[: a * h_k], l[: a * h_k], acc[: a * h_k])

    out, lse = acc.div_(l[..., None]), l.log_().add_(m)
    sees_none = visible <= 0
    if sees_none.any():
        sees_none = sees_none[:, None, :, None].expand(n, h_k, i, h_q // h_k).reshape(n * h_k, m_rows)
        out.masked_fill_(sees_none[..., None], 0)
        lse.masked_fill_(sees_none, float("inf"))
    out = out.view(n, h_k, i, -1, d_v).transpose(1, 2).reshape(n, i, h_q, d_v)
    return out, lse.view(n, h_k, i, -1).transpose(2, 3).reshape(n, h_q, i)


def _gather(keys: Keys, table: Tensor, position: Tensor) -> Tensor:
    """Keys at `position` [a, w] of the rows whose pages `table` names, as fp32 [a * h_k, w, d_qk]."""
    kv_cache = keys.kv_cache
    _, page_size, h_k, last_dim = kv_cache.shape
    page = table.gather(1, position // page_size).long()
    slot = position % page_size
    if kv_cache.stride(0) == page_size * kv_cache.stride(1):  # one index runs faster than two
        flat = kv_cache.flatten(0, 1)
        kv = flat.index_select(0, (page * page_size + slot).flatten()).view(*page.shape, h_k, last_dim)
    else:
        kv = kv_cache[page, slot]
    return keys.values(kv).transpose(1, 2).reshape(-1, position.shape[1], keys.d_v + keys.d_rope)


def _accumulate(scores: Tensor, v: Tensor, m: Tensor, l: Tensor, acc: Tensor) -> None:  # noqa: E741
    """Folds the scores [.., rows, w] of one chunk into the running m, l and acc, in place."""
    m_new = torch.maximum(m, scores.amax(-1))
    m_finite = m_new.masked_fill(m_new == float("-inf"), 0)  # no key seen so far: exp(-inf - 0) = 0, not NaN
    p = scores.sub_(m_finite[..., None]).exp_()
    rescale = (m - m_finite).exp_()
    l.mul_(rescale).add_(p.sum(-1))
    acc.mul_(rescale[..., None]).baddbmm_(p, v)
    m.copy_(m_new)


# --------------------------------------------------------------------------- fwd_kvcache_mla under an invariant plan

INVARIANT_QUERIES = 16  # of a row at a time, so that results which wait to be merged stay small

State = tuple[Tensor, Tensor]  # of one query over some keys: out [h_k, h_q / h_k, d_v], normalised, and lse [h_k, ..]


def _attend_invariantly(
    q: Tensor,
    keys: Keys,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Units and their tree as plan.py defines them; which part has which unit makes no difference, so nobody asks.

    One query and one unit at a time: a matrix product's bits depend on its sizes, and these are h_q / h_k, dims and the
    unit's keys, whatever the batch and s_q. Its operands are tensors of their own, aligned alike.
    """
    s_q, h_q = q.shape[1:3]
    h_k = keys.kv_cache.shape[2]
    for row, length in enumerate(cache_seqlens.tolist()):
        unit_keys = TILE * unit_tiles(-(-length // TILE), h_q // h_k <= FEW_HEADS)
        for first in range(0, s_q, INVARIANT_QUERIES):
            block = range(first, min(first + INVARIANT_QUERIES, s_q))
            pending: list[list[tuple[int, State | None]]] = [
                [] for _ in block
            ]  # of each query: (level, nodes) in order
            for unit, begin in enumerate(range(0, length, unit_keys)):
                position = torch.arange(begin, min(begin + unit_keys, length))
                kv = _gather(keys, block_table[row : row + 1], position[None])  # [h_k, w, d_qk]
                for nodes, i in zip(pending, block, strict=True):
                    visible = (length - s_q + 1 + i if causal else length) - begin
                    one = q[row, i].unflatten(0, (h_k, -1)).float() * softmax_scale
                    _push(nodes, unit, _attend_unit(one, kv, keys.d_v, visible) if visible > 0 else None)
            for nodes, i in zip(pending, block, strict=True):
                state = None
                for _, left in reversed(nodes):
                    state = _merge(left, state)
                if state is None:
                    out[row, i], lse[row, :, i] = 0, float("inf")
                else:
                    out[row, i], lse[row, :, i] = state[0].reshape(h_q, -1).to(out.dtype), state[1].reshape(h_q)


def _attend_unit(q: Tensor, kv: Tensor, d_v: int, visible: int) -> State:
    """One query [h_k, h_q / h_k, d_qk] over the first `visible` keys of a unit [h_k, w, d_qk], at least one."""
    scores = torch.bmm(q, kv.transpose(1, 2))  # as it lies: a copy the other way round sums in one chain
    scores[..., visible:] = float("-inf")
    m = scores.amax(-1, keepdim=True)
    p = (scores - m).exp_()
    total = p.sum(-1, keepdim=True)
    return torch.bmm(p, kv[..., :d_v].contiguous()) / total, (m + total.log())[..., 0]


def _merge(left: State | None, right: State | None) -> State | None:
    """None is what saw no key."""
    if left is None or right is None:
        return right if left is None else left
    m = torch.maximum(left[1], right[1])
    left_weight, right_weight = (left[1] - m).exp_(), (right[1] - m).exp_()
    total = left_weight + right_weight
    out = left[0] * (left_weight / total)[..., None] + right[0] * (right_weight / total)[..., None]
    return out, m + total.log()


def _push(nodes: list[tuple[int, State | None]], unit: int, state: State | None, merge=_merge) -> None:
    """Adds the next unit, and merges every node of the tree that it completes."""
    level = 0
    while unit >> level & 1:
        state = merge(nodes.pop()[1], state)
        level += 1
    nodes.append((level, state))


# ---------------------------------------------------------------------------------------------- concat_and_cache_mla


def concat_and_cache_mla(
    kv_cache: Tensor, kv_c: Tensor, k_pe: Tensor, slot_mapping: Tensor, kv_scale: Tensor | None, round_scale: bool
) -> None:
    num_pages, page_size = kv_cache.shape[:2]
    check_concat_and_cache_mla(slot_mapping, num_pages * page_size, kv_scale)
    token = (slot_mapping >= 0).nonzero()[:, 0]
    slot = slot_mapping[token]
    page, offset = slot // page_size, slot % page_size
    layout = format_of(kv_cache, kv_c.shape[1], k_pe.shape[1])
    rows = layout.quantize(kv_c[token], k_pe[token], kv_scale, round_scale)
    kv_cache.view(rows.dtype)[page, offset, 0] = rows


# ------------------------------------------------------------------------------------------------ merge_attn_states


def merge_attn_states(out: Tensor, lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    inf = float("inf")
    lse_a, lse_b = (t.masked_fill(t == inf, -inf) for t in (lse_a, lse_b))  # +inf and -inf: nothing here
    lse_ab = torch.logaddexp(lse_a, lse_b)
    nothing = lse_ab == -inf
    merged = torch.zeros(out.shape, dtype=torch.float32)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = (part_lse - lse_ab).exp_().masked_fill_(part_lse == -inf, 0).transpose(1, 2)[..., None]
        merged += torch.where(weight == 0, 0, part.float() * weight)  # what nobody saw may hold anything, NaN too
    out.copy_(merged)
    lse.copy_(lse_ab.masked_fill_(nothing, inf))
