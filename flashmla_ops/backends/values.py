"""What the values in tensors must be: lengths that the table reaches, pages inside the cache, slots inside it and once.

To read a value is to wait for the device. So the cpu backend always checks, and those of other devices when DEBUG is
set: the environment variable FLASHMLA_DEBUG=1, read at import. Without it they stay memory safe on any value (lengths
clamp to the table, bad pages read as zeros, bad slots are skipped), but what they return is then not what was meant.

The checks are torch alone, run on any device and raise RuntimeError; backends call them before they write anything.
"""

import os

import torch
from torch import Tensor

DEBUG = os.environ.get("FLASHMLA_DEBUG", "") not in ("", "0")


def check_lengths(cache_seqlens: Tensor) -> None:
    if not _readable(cache_seqlens) or cache_seqlens.numel() == 0:
        return
    if (shortest := int(cache_seqlens.min())) < 0:
        raise RuntimeError(f"cache_seqlens: expected lengths of at least 0, got {shortest}")


def check_lengths_and_pages(kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> None:
    num_pages, page_size = kv_cache.shape[:2]
    b, max_pages = block_table.shape
    if not _readable(cache_seqlens) or b == 0:
        return
    shortest, longest = (int(v) for v in cache_seqlens.aminmax())
    if shortest < 0 or longest > max_pages * page_size:
        row = int(cache_seqlens.argmin() if shortest < 0 else cache_seqlens.argmax())
        raise RuntimeError(
            f"cache_seqlens: expected lengths from 0 to {max_pages * page_size} ({max_pages} pages of {page_size} in "
            f"block_table), got {int(cache_seqlens[row])} in row {row}"
        )
    pages_used = (cache_seqlens + (page_size - 1)) // page_size
    table = block_table[:, : -(-longest // page_size)]
    column = torch.arange(table.shape[1], device=table.device)
    bad = ((table < 0) | (table >= num_pages)) & (column < pages_used[:, None])
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise RuntimeError(
            f"block_table: expected pages from 0 to {num_pages - 1}, got {int(table[row, column])} in row {row}, "
            f"column {column}, which its {int(cache_seqlens[row])} keys reach"
        )


def check_slots(slot_mapping: Tensor, num_slots: int) -> None:
    if not _readable(slot_mapping):
        return
    bad = (slot_mapping < -1) | (slot_mapping >= num_slots)
    if bad.any():
        token = int(bad.nonzero()[0])
        raise RuntimeError(
            f"slot_mapping: expected slots from -1 (skip) to {num_slots - 1}, got {int(slot_mapping[token])} at {token}"
        )
    ordered = slot_mapping[slot_mapping >= 0].sort().values
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        raise RuntimeError(f"slot_mapping: expected each slot once, got {int(ordered[1:][repeated][0])} more than once")


def _readable(t: Tensor) -> bool:
    """Not while a CUDA graph is captured: nothing has been computed then, and waiting for it would end the capture. So
    what a graph replays is never checked; run its step outside of a graph once to check it."""
    if not t.is_cuda:
        return True
    with torch.cuda.device(t.device):  # the question is asked of the current device's stream
        return not torch.cuda.is_current_stream_capturing()
