"""The Triton backend: CUDA tensors on GPUs from Ampere on, any page size, d_qk up to 576 and d_v up to 512.

The kernels are triton_kernels.py's, which is imported, and triton with it, when a call first asks for this backend.
Under Triton's interpreter (TRITON_INTERPRET=1) they run on CPU tensors, in fp16 and fp32: for tests.

Nothing is tuned at run time: how fwd_kvcache_mla is cut up is read from the table below.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kv_cache import BYTE_DTYPES
from ..plan import (
    COLUMNS,
    CPU_PARTS,
    MAX_PARTS,
    MAX_UNITS,
    ROW_COST,
    TILE,
    is_invariant,
    make_invariant_plan,
    max_parts,
    places,
    row_blocks,
    row_tiles,
    rows_of_block,
)
from . import values

OLDEST_CAPABILITY = (8, 0)
MAX_D_QK, MAX_D_V = 576, 512
WORKSPACE_TILES = 1024  # partial results of 64 query rows: 128 MiB of 512 fp32 columns, whatever the call
ROW_BLOCKS_AT_ONCE = 160  # of a launch whose programs have places of their own: the workspace stays bounded
INT32_KEYS = 2**31 - TILE - 1  # so that no tile ends beyond an int32
INT32_QUERIES = 2**22  # of a row at most, so that its query rows are numbered in int32 for up to 512 heads


# ------------------------------------------------------------------------------------------------- what it serves here


def status() -> str:
    if reason := _no_triton():
        return reason
    if _interpreted():
        return "ready"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU and driver on this machine, and TRITON_INTERPRET=1 is not set"
    reasons = [_no_device(device) for device in range(torch.cuda.device_count())]
    return "ready" if None in reasons else reasons[0]


def refusal(op: str, tensor: Tensor, **facts) -> str | None:
    if reason := _no_triton():
        return reason
    if tensor.is_cpu and not _interpreted():
        return "it serves CPU tensors only under Triton's interpreter (start Python with TRITON_INTERPRET=1)"
    if not tensor.is_cpu:
        if tensor.device.type != "cuda" or _interpreted():
            kind = "CPU tensors only, under TRITON_INTERPRET=1" if _interpreted() else "CUDA tensors only"
            return f"it serves {kind}, this one is on {tensor.device}"
        if reason := _no_device(tensor.device.index):
            return reason
    if op == "fwd_kvcache_mla":
        return _no_call(tensor, **facts)
    return None


@functools.cache
def _no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import ({error}): pip install 'flashmla_ops[triton]'"
    return None


def _kernels():
    from . import triton_kernels

    return triton_kernels


def _interpreted() -> bool:
    return _kernels().INTERPRETED


@functools.cache
def _no_device(device: int) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return f"it needs compute capability at least {OLDEST_CAPABILITY[0]}.0, {name} has {found[0]}.{found[1]}"


def _no_call(q: Tensor, kv_cache: Tensor, head_dim_v: int, batch_invariant: bool = False, **uneven) -> str | None:
    """Why fwd_kvcache_mla does not take tensors of this kind."""
    if q.is_cpu and q.dtype is torch.bfloat16:
        return f"Triton's interpreter multiplies torch.float16 and torch.float32, got {q.dtype}"
    if q.is_cuda and q.dtype is torch.float32:
        return f"it computes in torch.bfloat16 and torch.float16, got {q.dtype}"
    if q.shape[-1] > MAX_D_QK or head_dim_v > MAX_D_V:
        return f"it serves d_qk up to {MAX_D_QK} and d_v up to {MAX_D_V}, got {q.shape[-1]} and {head_dim_v}"
    return None


# ------------------------------------------------------------------------------------------------------------- shared


def _power_of_two(n: int) -> int:
    """The next one from n on, at least 16: what Triton's tensors and products are made of."""
    return max(16, 1 << (n - 1).bit_length())


@functools.cache
def _parts(device: torch.device, num_heads_per_head_k: int, num_heads_k: int) -> int:
    if device.type == "cpu":
        return CPU_PARTS
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max_parts(multiprocessors, row_tiles(num_heads_per_head_k, num_heads_k))


@contextlib.contextmanager
def _launching(op: str, device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, whatever its arguments are on. What its compiler and the driver complain
    about does not say which op it was."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(f"{op}: {error}") from error


def _units(t: Tensor, *dims: int) -> list[int]:
    """Strides of these dimensions in units of 16 bytes."""
    return [t.stride(dim) * t.itemsize // 16 for dim in dims]


def _bytes(t: Tensor) -> Tensor:
    """e4m3 as plain bytes: the kernels convert it by integer arithmetic, which every GPU has."""
    return t.view(torch.uint8) if t.dtype in BYTE_DTYPES else t


# ------------------------------------------------------------------------------------------------- get_mla_metadata

METADATA_BLOCK = 1024  # rows at a time


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
    if values.DEBUG or cache_seqlens.is_cpu:
        values.check_lengths(cache_seqlens)
        if cu_seqlens_q is not None:
            values.check_queries(cu_seqlens_q, max_seqlen_q)
    parts = _parts(cache_seqlens.device, num_heads_per_head_k, num_heads_k)
    if batch_invariant:
        blocks, room = None, places(row_tiles(num_heads_per_head_k, num_heads_k))
        if cu_seqlens_q is not None:
            most = min(max_seqlen_q, INT32_QUERIES)
            blocks = row_blocks(cu_seqlens_q, most, num_heads_per_head_k, batch_invariant=True)
        plan = make_invariant_plan(cache_seqlens, parts, room, num_heads_per_head_k, blocks)
        tile_scheduler_metadata.copy_(plan[0])
        num_splits.copy_(plan[1])
        return
    plan = tile_scheduler_metadata, num_splits
    with _launching("get_mla_metadata", cache_seqlens.device):
        if cu_seqlens_q is None:
            _plan(*plan, cache_seqlens, parts, ROW_COST)
        else:
            _plan_uneven(*plan, cache_seqlens, parts, cu_seqlens_q, max_seqlen_q, num_heads_per_head_k)


def _plan_uneven(
    metadata: Tensor,
    num_splits: Tensor,
    cache_seqlens: Tensor,
    parts: int,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    group: int,
) -> None:
    b = cache_seqlens.shape[0]
    scratch = cache_seqlens.new_empty(2 * b + MAX_PARTS + 1, dtype=torch.int64).split([b, b, MAX_PARTS + 1])
    sizes = b, min(max_seqlen_q, INT32_QUERIES), group, rows_of_block(group), parts, ROW_COST
    _kernels().get_mla_metadata_uneven_kernel[(1,)](
        *(metadata, num_splits, *scratch, cache_seqlens, cu_seqlens_q),
        *sizes,
        _half(b),
        BLOCK=METADATA_BLOCK,
        num_warps=8,
    )


def _half(b: int) -> int:
    return 1 << (b.bit_length() - 1) if b else 0


def _plan(metadata: Tensor, num_splits: Tensor, cache_seqlens: Tensor, parts: int, cost: int) -> None:
    b = cache_seqlens.shape[0]
    row_end = cache_seqlens.new_empty(b, dtype=torch.int64)
    _kernels().get_mla_metadata_kernel[(1,)](
        metadata, num_splits, row_end, cache_seqlens, b, parts, cost, _half(b), BLOCK=METADATA_BLOCK, num_warps=8
    )


# -------------------------------------------------------------------------------------------------- fwd_kvcache_mla


class Config(NamedTuple):
    """How fwd_kvcache_mla is cut up for a kind of call."""

    block_m: int  # query rows of a program
    block_n: int  # keys at a time; divides the plan's tiles of 64
    warps: int
    # Of Triton's pipeline. A tile's page number arrives two loads before the tile is used, so blocks of keys in shared
    # memory are 1 of 2 stages, 2 of 5, 3 of 7, 4 of 9.
    stages: int

    def shared_rows(self, hopper: bool) -> bool:
        """Whether the kernel is to let several warps have scores of a query row. A product's tile has 16 rows, so there
        can be more warps than such tiles; but with 64 rows Ampere's products then take more registers than there are.
        """
        return 16 * self.warps > self.block_m and (hopper or self.block_m < 64)


# By columns of a key (padded), query rows of a key head, and KB of shared memory that a program may have: 99 (sm_86,
# 89, 120), 163 (sm_80, 87), 227 (sm_90). The first row that is large enough serves. What chose the numbers:
#   - 16 rows are the fewest that Triton multiplies. With so few memory is what counts, and since the plan gives a
#     multiprocessor about one program, its shared memory holds as many blocks of keys as fit.
#   - With 64 rows the products count: 64 keys at a time, and wgmma on Hopper, which takes 64 rows or none. In 99 KB,
#     queries of 576 columns and keys leave room for 32 rows and 32 keys.
#   - 8 warps: 512 columns of accumulators, and on Ampere the queries, are otherwise more than the registers hold.
# tests/test_triton.py compiles each for the devices above, and holds it to their shared memory and to no spills among
# the products. The last column has been timed, on an H100 with Triton 3.6 (us, 128 rows of about 8192 keys unless said
# otherwise; `python -m flashmla_ops.benchmark --tune` repeats that on any device). Those of 16 rows, of (576, 32),
# of 8 warps for 64 rows of fewer columns and all but the first two of (320, 32) were timed while sums over warps were
# made at every step: they say the order, not today's us.
#   (192, 16)  (16, 64, 4, 7) 168, (16, 64, 4, 9) 173, (16, 64, 8, 9) 184, (64, 64, 4, 7) 201
#   (192, 64)  128 heads: (64, 64, 4, 9) 393, (64, 64, 4, 5) 395, (64, 64, 8, 9) 486, (64, 128, 4, 5) 514
#   (320, 16)  (16, 64, 4, 7) 262, (16, 64, 8, 9) 269, (16, 64, 4, 9) 271, (64, 64, 4, 7) 346
#   (320, 32)  (32, 64, 8, 5) 301, (32, 64, 8, 7) 307, (32, 64, 4, 5) 333, (64, 64, 4, 5) 342, (64, 32, 4, 9) 370
#   (320, 64)  128 heads: (64, 64, 4, 5) 608, (64, 64, 4, 7) 618, (64, 64, 8, 7) 707
#   (576, 16)  2048 keys: (16, 64, 8, 5) 138, (16, 64, 4, 5) 152, (16, 32, 8, 7) 171, (16, 32, 4, 9) 157
#   (576, 32)  (32, 64, 8, 5) 535, (64, 64, 8, 3) 722, (32, 32, 8, 9) 843
#   (576, 64)  128 heads: (64, 64, 8, 3) 1023, (64, 32, 8, 7) 1152. (64, 64, 8, 3) took 1276 with scores that were
#              computed twice (see _segment), a sum over warps at every step and 64-bit addresses in a block of keys
SHARED_KB = (99, 163, 227)
CONFIGS: dict[tuple[int, int], tuple[Config, Config, Config]] = {
    (192, 16): (Config(16, 64, 4, 7), Config(16, 64, 4, 7), Config(16, 64, 4, 7)),
    (192, 32): (Config(32, 64, 4, 5), Config(32, 64, 4, 5), Config(32, 64, 4, 5)),
    (192, 64): (Config(64, 64, 4, 5), Config(64, 64, 4, 5), Config(64, 64, 4, 5)),
    (320, 16): (Config(16, 64, 8, 5), Config(16, 64, 8, 7), Config(16, 64, 4, 7)),
    (320, 32): (Config(32, 64, 8, 2), Config(32, 64, 8, 5), Config(32, 64, 8, 5)),
    (320, 64): (Config(64, 64, 8, 2), Config(64, 64, 8, 5), Config(64, 64, 4, 5)),
    (576, 16): (Config(16, 32, 8, 5), Config(16, 32, 8, 7), Config(16, 64, 8, 5)),
    (576, 32): (Config(32, 32, 8, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 5)),
    (576, 64): (Config(32, 32, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 3)),
    (832, 64): (Config(16, 32, 8, 2), Config(16, 32, 8, 5), Config(16, 32, 8, 5)),  # 256 < d_v, 64 < d_qk - d_v
}

BLOCK_R = 64  # most columns beyond d_v that are multiplied at a time; every known model has 64 or fewer
SHARES = 8  # that the combine kernel loads at once: 16 KB of 512 columns, 32 values a thread


def blocks_of(d_qk: int, d_v: int) -> tuple[int, int]:
    """BLOCK_V and BLOCK_R: the columns of values, padded, and those of the rest that are multiplied at a time."""
    return _power_of_two(d_v), min(_power_of_two(d_qk - d_v), BLOCK_R)


def config_of(shared_kb: int, d_qk: int, d_v: int, rows: int, fp8: bool = False) -> Config:
    """The table's row for `rows` query rows of a key head on a device whose programs may have so much shared memory.

    fp8 keys have a second place in shared memory, as values of the queries' dtype, and registers on the way between. So
    fewer are loaded ahead; where memory is small none are, and blocks are smaller.
    """
    block_v, block_r = blocks_of(d_qk, d_v)
    columns = block_v + -(-(d_qk - d_v) // block_r) * block_r
    key = next(key for key in CONFIGS if columns <= key[0] and min(rows, 64) <= key[1])
    config = CONFIGS[key][max(i for i, kb in enumerate(SHARED_KB) if kb <= shared_kb)]
    if not fp8:
        return config
    if shared_kb >= SHARED_KB[-1]:
        return config._replace(stages=2)
    return config._replace(block_n=min(config.block_n, 32), stages=1)


@functools.cache
def _shared_kb(device: torch.device) -> int:
    if device.type == "cpu":
        return SHARED_KB[-1]  # the interpreter has no limit; the largest blocks are its fastest
    properties = torch.cuda.get_device_properties(device)
    # the products of sm_100 take up to 344 KB for 64 rows: until one has been measured, the smallest blocks will do
    return SHARED_KB[0] if properties.major == 10 else properties.shared_memory_per_block_optin // 1024


def _format(kv_cache: Tensor, kv_scale: Tensor | None):
    """The cache's format, as the kernel names it."""
    kernels = _kernels()
    if kv_cache.dtype not in BYTE_DTYPES:
        return kernels.PLAIN
    return kernels.FP8_BLOCKS if kv_scale is None else kernels.FP8_TENSOR


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9


def fwd_kvcache_mla(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    plan: tuple[Tensor, Tensor] | None,
    q_scale: Tensor | None,
    kv_scale: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, d_v], lse [b, h_q, s_q]; [total_q, h_q, d_v], [h_q, total_q]
    *batch, queries, h_q, d_qk = q.shape
    num_pages, page_size, h_k, _ = kv_cache.shape
    b, group = cache_seqlens.shape[0], h_q // h_k
    invariant = plan is not None and is_invariant(plan[0])
    planned = b  # rows or blocks, at most
    if cu_seqlens_q is None:
        s_q, block_rows = queries, 0
        rows = planned_rows = s_q * group
    else:
        s_q, block_rows = min(max_seqlen_q, INT32_QUERIES), rows_of_block(group, invariant)
        rows, planned_rows = min(s_q * group, block_rows), group
        planned += queries * group // block_rows
    parts = _parts(q.device, max(planned_rows, 1), h_k)
    if values.DEBUG or q.is_cpu:
        values.check_fwd_kvcache_mla(
            *(q, kv_cache, block_table, cache_seqlens, head_dim_v, plan, q_scale, kv_scale, parts),
            *(cu_seqlens_q, max_seqlen_q),
        )
    out_dtype = torch.bfloat16 if q.dtype in BYTE_DTYPES else q.dtype
    out = q.new_empty(*batch, queries, h_q, head_dim_v, dtype=out_dtype)
    lse = q.new_empty(*batch, h_q, queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, kv_cache, cache_format = _bytes(q), _bytes(kv_cache), _format(kv_cache, kv_scale)
    # under a batch-invariant plan what a row block is goes by h_q / h_k, never by s_q
    config_rows = group if invariant else rows
    config = config_of(_shared_kb(q.device), d_qk, head_dim_v, config_rows, cache_format != _kernels().PLAIN)
    block_v, block_r = blocks_of(d_qk, head_dim_v)
    blocks_per_head = -(-rows // config.block_m)
    num_row_blocks = h_k * blocks_per_head
    max_len = min(block_table.shape[1] * page_size, INT32_KEYS) if num_pages else 0

    shared_rows = config.shared_rows(_is_hopper(q.device))
    kernels = _kernels()
    with _launching("fwd_kvcache_mla", q.device):
        if plan is None:
            metadata = cache_seqlens.new_empty(MAX_PARTS, COLUMNS)
            num_splits = cache_seqlens.new_empty(b + 1)
            if cu_seqlens_q is None:
                _plan(metadata, num_splits, cache_seqlens, parts, ROW_COST)
            else:
                _plan_uneven(metadata, num_splits, cache_seqlens, parts, cu_seqlens_q, max_seqlen_q, group)
        else:
            metadata = plan[0]
        at_once, tiles = num_row_blocks, row_tiles(planned_rows, h_k)
        if invariant:
            # nodes that the plan leaves, and each program's own
            split_parts = min(places(tiles), planned * MAX_UNITS)
            at_once = min(num_row_blocks, ROW_BLOCKS_AT_ONCE)
            # as many programs as there are SMs; of uneven queries most rows may have one, and other row blocks no work
            parts = max(1, parts * tiles // (h_k * -(-planned_rows // config.block_m)))
            shares = split_parts * num_row_blocks + at_once * parts * kernels.OWN_PLACES.value
        else:
            split_parts = _split_parts(parts if plan is None else MAX_PARTS, planned, max_len, tiles)
            shares = 2 * split_parts * num_row_blocks
        shares, shares_lse = (lse.new_empty(shares * config.block_m, *d) for d in ((head_dim_v,), ()))
        dims = {"D_V": head_dim_v, "BLOCK_V": block_v, "BLOCK_M": config.block_m}
        for first in range(0, num_row_blocks, at_once):
            kernels.fwd_kvcache_mla_kernel[(min(num_row_blocks - first, at_once), parts)](
                *(q, kv_cache, q_scale, kv_scale, block_table, cache_seqlens, cu_seqlens_q, metadata),
                *(out, lse, shares, shares_lse),
                softmax_scale / math.log(2),
                *(_units(q, 0, 1, 2) if cu_seqlens_q is None else (0, *_units(q, 0, 1))),
                *_units(kv_cache, 0, 1, 2),
                block_table.stride(0),
                *(b, s_q, queries, group, blocks_per_head, block_rows, num_pages, page_size, max_len, split_parts),
                *(int(causal), num_row_blocks, first),
                D_R=d_qk - head_dim_v,
                BLOCK_R=block_r,
                BLOCK_N=config.block_n,
                ONE_PAGE=page_size % config.block_n == 0,
                STAGES=config.stages,
                SHARED_ROWS=shared_rows,
                NARROW=shared_rows and config.block_m > 16 and config.block_n * kv_cache.stride(1) < 2**31,
                FORMAT=cache_format,
                INVARIANT=invariant,
                num_warps=config.warps,
                **dims,
            )
        if split_parts > 0:
            grid = rows * h_k, min(parts, split_parts)
            tensors = cache_seqlens, cu_seqlens_q, metadata, out, lse, shares, shares_lse
            sizes = b, s_q, queries, rows, group, blocks_per_head, num_row_blocks, block_rows, max_len, split_parts
            if invariant:
                kernels.fwd_kvcache_mla_merge_nodes_kernel[grid](*tensors, *sizes, num_warps=4, **dims)
            else:
                kernels.fwd_kvcache_mla_combine_kernel[grid](*tensors, *sizes, BLOCK_S=SHARES, num_warps=4, **dims)
    return out, lse


def _split_parts(plan_parts: int, b: int, max_len: int, num_row_tiles: int) -> int:
    """Parts that the workspace has places for; a plan that uses more is executed unsplit.

    A part has at least one tile, or a row without keys, so b * (tiles + 1) are enough for any valid plan. A plan of one
    part splits nothing.
    """
    possible = b * (-(-max_len // TILE) + 1)
    return 0 if plan_parts == 1 else min(plan_parts, possible, WORKSPACE_TILES // (2 * num_row_tiles))


# ---------------------------------------------------------------------------------------------- concat_and_cache_mla

ELEMENTS = 4096  # of a program that copies or merges: 8 KB in bf16, 32 values a thread


def _rows_of(block: int) -> int:
    """Rows of `block` elements that a program takes."""
    return max(1, ELEMENTS // block)


def concat_and_cache_mla(
    kv_cache: Tensor, kv_c: Tensor, k_pe: Tensor, slot_mapping: Tensor, kv_scale: Tensor | None, round_scale: bool
) -> None:
    num_pages, page_size = kv_cache.shape[:2]
    num_slots = num_pages * page_size
    if values.DEBUG or kv_cache.is_cpu:
        values.check_concat_and_cache_mla(slot_mapping, num_slots, kv_scale)
    n, d_v = kv_c.shape
    d_rope = k_pe.shape[1]
    if n == 0:
        return
    block_v = _power_of_two(d_v)
    tokens = _rows_of(block_v)
    grid = (-(-n // tokens),)
    sizes = (n, num_slots, page_size, *_units(kv_cache, 0, 1), *_units(kv_c, 0), *_units(k_pe, 0))
    dims = {"D_V": d_v, "D_R": d_rope, "BLOCK_V": block_v, "BLOCK_R": _power_of_two(d_rope), "BLOCK_T": tokens}
    with _launching("concat_and_cache_mla", kv_cache.device):
        if kv_cache.dtype in BYTE_DTYPES:
            tensors = (_bytes(kv_cache), kv_c, k_pe, slot_mapping, kv_scale)
            _kernels().concat_and_cache_mla_fp8_kernel[grid](*tensors, *sizes, **dims, ROUND_SCALE=round_scale)
        else:
            _kernels().concat_and_cache_mla_kernel[grid](kv_cache, kv_c, k_pe, slot_mapping, *sizes, **dims)


# ------------------------------------------------------------------------------------------------ merge_attn_states


def merge_attn_states(out: Tensor, lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    b, s_q, h_q, d_v = out.shape
    rows = b * s_q * h_q
    if out.numel() == 0:
        return
    block_v = _power_of_two(d_v)
    block_rows = _rows_of(block_v)
    with _launching("merge_attn_states", out.device):
        _kernels().merge_attn_states_kernel[(-(-rows // block_rows),)](
            *(out, lse, out_a, lse_a, out_b, lse_b, rows, s_q, h_q),
            *_units(out_a, 0, 1, 2),
            *_units(out_b, 0, 1, 2),
            *(lse_a.stride(0), lse_a.stride(1), lse_b.stride(0), lse_b.stride(1)),
            D_V=d_v,
            BLOCK_V=block_v,
            BLOCK_ROWS=block_rows,
        )
