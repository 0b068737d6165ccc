"""What the values in tensors must be: lengths that the table reaches, pages inside the cache, slots inside it and once,
a plan that deals these lengths, finite scales.

To read a value is to wait for the device. So the cpu backend always checks, and those of other devices when DEBUG is
set: the environment variable FLASHMLA_DEBUG=1, read at import; scales, and whether a plan was made for these heads, are
checked under it only, on every device. Without it they stay memory safe on any value (lengths clamp to the table, bad
pages read as zeros, bad slots are skipped), but what they return is then not what was meant.

The checks are torch alone, run on any device and raise RuntimeError, which names the tensor, the row and the value;
backends call them before they launch anything. That is why they are not the kernels': a kernel finds a bad value after
others have written, would need an error buffer that the host reads anyway, and would pay for it when DEBUG is off.
While a CUDA graph is captured there are no values to read yet: calls are refused then.
"""

import os

import torch
from torch import Tensor

from ..kv_cache import Fp8Blocks, format_of
from ..plan import (
    FIRST_ROW,
    FIRST_ROW_TILE,
    FIRST_SPLIT,
    LAST_ROW,
    LAST_ROW_TILE,
    TILE,
    is_invariant,
    make_invariant_plan,
    make_plan,
    places,
    plan_blocks,
    row_blocks,
    row_tiles,
)

DEBUG = os.environ.get("FLASHMLA_DEBUG", "") not in ("", "0")


def check_lengths(cache_seqlens: Tensor) -> None:
    _refuse_capture(cache_seqlens)
    if cache_seqlens.numel() == 0:
        return
    row = int(cache_seqlens.argmin())
    if (shortest := int(cache_seqlens[row])) < 0:
        raise RuntimeError(f"cache_seqlens: expected lengths of at least 0, got {shortest} in row {row}")


def check_queries(cu_seqlens_q: Tensor, max_seqlen_q: int, total_q: int | None = None) -> None:
    """total_q: queries that there are; None where a plan is made, which knows of none."""
    _refuse_capture(cu_seqlens_q)
    if (first := int(cu_seqlens_q[0])) != 0:
        raise RuntimeError(f"cu_seqlens_q: expected it to begin with 0, got {first}")
    queries = cu_seqlens_q.long().diff()
    bad = (queries < 0) | (queries > max_seqlen_q)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise RuntimeError(
            f"cu_seqlens_q: expected differences from 0 to max_seqlen_q = {max_seqlen_q}, got {int(queries[row])} "
            f"queries in row {row}"
        )
    if total_q is not None and (last := int(cu_seqlens_q[-1])) > total_q:
        raise RuntimeError(f"cu_seqlens_q: expected it to end at most at q's {total_q} queries, got {last}")


def check_fwd_kvcache_mla(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    d_v: int,
    plan: tuple[Tensor, Tensor] | None,
    q_scale: Tensor | None,
    kv_scale: Tensor | None,
    parts: int | None = None,  # that the backend's own plan for this call may use; None: the same for all heads
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> None:
    _refuse_capture(q)
    _check_lengths_and_pages(kv_cache, block_table, cache_seqlens)
    group, blocks, s_q = q.shape[-2] // kv_cache.shape[2], None, max_seqlen_q
    if cu_seqlens_q is None:
        s_q = q.shape[1]
    else:
        check_queries(cu_seqlens_q, max_seqlen_q, q.shape[0])
        blocks = row_blocks(cu_seqlens_q, max_seqlen_q, group, plan is not None and is_invariant(plan[0]))
    if plan is not None:
        _check_plan(*plan, cache_seqlens) if blocks is None else _check_plan_of_blocks(*plan, cache_seqlens, blocks)
    if DEBUG:
        if plan is not None and parts is not None:
            heads = s_q * group, kv_cache.shape[2]
            _check_heads(plan[0], cache_seqlens, parts, *heads, None if blocks is None else (blocks, group))
        _check_scale("q_scale", q_scale)
        _check_scale("kv_scale", kv_scale)
        if isinstance(format_of(kv_cache, d_v, q.shape[-1] - d_v), Fp8Blocks):
            _check_block_scales(kv_cache, block_table, cache_seqlens, d_v)


def _check_lengths_and_pages(kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> None:
    num_pages, page_size = kv_cache.shape[:2]
    b, max_pages = block_table.shape
    if b == 0:
        return
    shortest, longest = (int(v) for v in cache_seqlens.aminmax())
    if shortest < 0 or longest > max_pages * page_size:
        row = int(cache_seqlens.argmin() if shortest < 0 else cache_seqlens.argmax())
        raise RuntimeError(
            f"cache_seqlens: expected lengths from 0 to {max_pages * page_size} ({max_pages} pages of {page_size} in "
            f"block_table), got {int(cache_seqlens[row])} in row {row}"
        )
    table, used = _used_pages(block_table, cache_seqlens, page_size, longest)
    bad = ((table < 0) | (table >= num_pages)) & used
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise RuntimeError(
            f"block_table: expected pages from 0 to {num_pages - 1}, got {int(table[row, column])} in row {row}, "
            f"column {column}, which its {int(cache_seqlens[row])} keys reach"
        )


def _used_pages(block_table: Tensor, cache_seqlens: Tensor, page_size: int, longest: int) -> tuple[Tensor, Tensor]:
    """The columns of the table that the longest row reaches, and which of them each row reaches."""
    table = block_table[:, : -(-longest // page_size)]
    # column < ceil(length / page_size), where a length rounded up might be no int32
    return table, torch.arange(table.shape[1], device=table.device) * page_size < cache_seqlens[:, None]


def _check_plan_of_blocks(metadata: Tensor, num_splits: Tensor, cache_seqlens: Tensor, blocks: Tensor) -> None:
    """The same of a plan for uneven queries, whose blocks are taken for rows: messages then count blocks."""
    b, end = blocks.shape[0], blocks.cumsum(0)
    row = torch.repeat_interleave(blocks)  # of each block
    metadata, used = metadata.clone(), metadata[:, LAST_ROW] != -1
    for row_column, tile_column in ((FIRST_ROW, FIRST_ROW_TILE), (LAST_ROW, LAST_ROW_TILE)):
        at, block = metadata[:, row_column].long(), metadata[:, tile_column].long()
        exists = (at >= 0) & (at < b) & (block >= 0)
        if b:
            known = at.clamp(0, b - 1)
            exists &= block < blocks[known]
            at = (end - blocks)[known] + block
        # -2 is no row, and no mark of an unused part either
        metadata[:, row_column] = torch.where(exists, at, torch.where(used, -2, metadata[:, row_column])).int()
    _check_plan(metadata, num_splits, cache_seqlens[row], torch.cat([end.new_zeros(1), end]).int())


def _check_plan(metadata: Tensor, num_splits: Tensor, cache_seqlens: Tensor, ends: Tensor | None = None) -> None:
    """The parts must follow each other from the first row's first tile to the last row's last (plan.py).

    num_splits holds the splits of the rows before each of `ends`, [..] int32: before each row.
    """
    b = cache_seqlens.shape[0]
    name, lengths = "tile_scheduler_metadata", {}
    used = metadata[: int((metadata[:, LAST_ROW] != -1).sum())]
    if b > 0:
        last_rows = used[:, LAST_ROW].clamp(0, b - 1)
        lengths = dict(zip(last_rows.tolist(), cache_seqlens[last_rows].tolist(), strict=True))
    row = tile = split = 0  # where the next part must begin
    cuts = []  # the row of each cut that splits one
    for part, columns in enumerate(used.tolist()):
        first_row, first_tile, last_row, last_tile, first_split = columns[: FIRST_SPLIT + 1]
        if row == b:
            raise RuntimeError(
                f"{name}: expected a plan for these {b} rows to end at part {part}, got one of {len(used)} parts: plan "
                "again when cache_seqlens changes"
            )
        begins = first_row, first_tile, first_split
        if begins != (row, tile, split):
            raise RuntimeError(
                f"{name}: expected part {part} of a plan for these {b} rows to begin at row {row}, tile {tile}, as "
                f"share {split} of it, got row {first_row}, tile {first_tile}, share {first_split}: plan again when "
                "cache_seqlens changes"
            )
        tiles = -(-lengths.get(last_row, 0) // TILE)
        in_order = last_row > row or (last_row == row and (last_tile > tile or tiles == 0))
        if not in_order or last_row >= b or last_tile > tiles or (last_tile <= 0 and tiles > 0):
            keys = f" ({lengths[last_row]} keys, {tiles} tiles)" if last_row in lengths else ""
            raise RuntimeError(
                f"{name}: expected part {part} of a plan for these {b} rows to end after row {row}, tile {tile}, in "
                f"one of their tiles, got row {last_row}{keys}, tile {last_tile}: plan again when cache_seqlens changes"
            )
        if last_tile < tiles:
            split = split + 1 if last_row == row else 1
            row, tile = last_row, last_tile
            cuts.append(row)
        else:
            row, tile, split = last_row + 1, 0, 0
    if row < b:
        raise RuntimeError(
            f"{name}: expected a plan for these {b} rows, got one that ends before row {row}, tile {tile}: plan again "
            "when cache_seqlens changes"
        )
    at = torch.arange(b + 1, dtype=torch.int32, device=num_splits.device) if ends is None else ends
    splits = at + torch.searchsorted(num_splits.new_tensor(cuts), at, out_int32=True)  # and the cuts of rows before
    if not torch.equal(splits, num_splits):
        wrong = int((splits != num_splits).int().argmax())
        raise RuntimeError(
            f"num_splits: expected {int(splits[wrong])} at {wrong}, the shares of the rows before in "
            f"tile_scheduler_metadata, got {int(num_splits[wrong])}"
        )


def _check_heads(
    metadata: Tensor,
    cache_seqlens: Tensor,
    parts: int,
    num_heads_per_head_k: int,
    num_heads_k: int,
    uneven: tuple[Tensor, int] | None,  # blocks of the rows, h_q / h_k
) -> None:
    blocks, rows = (None, num_heads_per_head_k) if uneven is None else uneven
    if is_invariant(metadata):
        own, _ = make_invariant_plan(cache_seqlens, parts, places(row_tiles(rows, num_heads_k)), rows, blocks)
    elif blocks is None:
        own, _ = make_plan(cache_seqlens, parts)
    else:
        own, _ = plan_blocks(make_plan, cache_seqlens, blocks, parts)
    expected, got = (int((t[:, LAST_ROW] >= 0).sum()) for t in (own, metadata))
    if expected != got:
        raise RuntimeError(
            f"tile_scheduler_metadata: expected the plan for this call's heads and queries on this device, {expected} "
            f"parts, got one of {got} parts: give get_mla_metadata s_q * h_q / h_k and h_k of this call"
        )


def _check_scale(name: str, scale: Tensor | None) -> None:
    if scale is not None and not 0 < (value := float(scale)) < float("inf"):
        raise RuntimeError(f"{name}: expected a finite value above 0, got {value}")


def _check_block_scales(kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, d_v: int) -> None:
    """The scales that lie in the cache, of every key that is read."""
    page_size = kv_cache.shape[1]
    if cache_seqlens.numel() == 0 or (longest := int(cache_seqlens.max())) == 0:
        return
    table, used = _used_pages(block_table, cache_seqlens, page_size, longest)
    row, column = used.nonzero(as_tuple=True)
    page = table[row, column].long()
    raw = kv_cache.view(torch.uint8)[..., d_v : d_v + 4 * -(-d_v // Fp8Blocks.block)]
    scale = raw[page].contiguous().view(torch.float32)  # [pages used, page_size, h_k, scales]
    token = torch.arange(page_size, device=page.device)
    read = column[:, None] * page_size + token < cache_seqlens[row, None]
    bad = ~((scale > 0) & scale.isfinite()) & read[:, :, None, None]
    if bad.any():
        at, token, head, block = bad.nonzero()[0].tolist()
        raise RuntimeError(
            f"kv_cache: expected finite scales above 0, got {float(scale[at, token, head, block])} in page "
            f"{int(page[at])}, token {token}, block {block}: key {int(column[at]) * page_size + token} of row "
            f"{int(row[at])}"
        )


def check_concat_and_cache_mla(slot_mapping: Tensor, num_slots: int, kv_scale: Tensor | None) -> None:
    _refuse_capture(slot_mapping)
    if DEBUG:
        _check_scale("kv_scale", kv_scale)
    bad = (slot_mapping < -1) | (slot_mapping >= num_slots)
    if bad.any():
        token = int(bad.nonzero()[0])
        raise RuntimeError(
            f"slot_mapping: expected slots from -1 (skip) to {num_slots - 1}, got {int(slot_mapping[token])} at {token}"
        )
    ordered = slot_mapping[slot_mapping >= 0].sort().values
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        slot = int(ordered[1:][repeated][0])
        first, second = (slot_mapping == slot).nonzero()[:2, 0].tolist()
        raise RuntimeError(f"slot_mapping: expected each slot once, got {slot} more than once, at {first} and {second}")


def _refuse_capture(t: Tensor) -> None:
    if _on_cuda(t) and _capturing(t.device):
        raise RuntimeError(
            "FLASHMLA_DEBUG: expected calls outside of CUDA graphs, got one while a graph is captured, when there are "
            "no values to check: run the step without a graph, or start Python without FLASHMLA_DEBUG"
        )


def _on_cuda(t: Tensor) -> bool:
    return t.is_cuda


def _capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):  # the question is asked of the current device's stream
        return torch.cuda.is_current_stream_capturing()
