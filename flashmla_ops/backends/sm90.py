"""The Hopper backend: loads the compiled library (csrc/, built by setup.py) and calls its private ops.

`fwd_kvcache_mla` runs on compute capability 9.0 only; the other ops run on 8.0 and later. The library is loaded when it
is first asked for, and what went wrong then is kept as the reason that users are told.
"""

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from ..kv_cache import BYTE_DTYPES
from ..plan import MAX_PARTS, max_parts, places, row_tiles
from . import values

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = PACKAGE / "libflashmla_sm90.so"
BUILD_REPORT = PACKAGE / "build_report.txt"  # written by setup.py: why there is no library

FWD_DTYPES = (torch.bfloat16, torch.float16)
FWD_DIMS = (576, 512)  # d_qk, d_v
TILE = 64
FWD_CAPABILITY = (9, 0)
OLDEST_CAPABILITY = (8, 0)


# ------------------------------------------------------------------------------------------------- what it serves here


def status() -> str:
    if reason := _no_library():
        return reason
    reasons = [_no_fwd(device) for device in range(torch.cuda.device_count())]
    return "ready" if None in reasons else reasons[0]


def refusal(op: str, tensor: Tensor, **facts) -> str | None:
    if tensor.device.type != "cuda":
        return f"it serves CUDA tensors only, this one is on {tensor.device}"
    if reason := _no_library():
        return reason
    if op != "fwd_kvcache_mla":
        return _no_device(tensor.device.index, OLDEST_CAPABILITY, op)
    return _no_fwd(tensor.device.index) or _no_call(tensor, **facts)


@functools.cache
def _no_library() -> str | None:
    """Why the library cannot be used in this process, or None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch"
    if not LIBRARY.exists():
        reason = BUILD_REPORT.read_text().strip() if BUILD_REPORT.exists() else "the package was never built with nvcc"
        return f"the compiled library is missing ({reason}): reinstall with `pip install --no-build-isolation .`"
    try:
        if truncated := _truncated(LIBRARY):
            raise OSError(truncated)
        torch.ops.load_library(LIBRARY)
        torch.ops.flashmla_sm90.cuda_versions  # noqa: B018  what a library of something else lacks
    except (OSError, AttributeError) as error:
        why = error.__cause__ or error  # the loader's own message, where torch puts another one before it
        return f"the compiled library does not load ({why}): reinstall with `pip install --no-build-isolation .`"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU and driver on this machine: see torch.cuda.is_available()"
    driver, runtime = torch.ops.flashmla_sm90.cuda_versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)}, the library was built with CUDA "
            f"{_version(runtime)}: update the driver, or reinstall where nvcc is {driver // 1000}.x"
        )
    return None


def _truncated(library: Path) -> str | None:
    """The loader maps what an ELF file's headers promise: of one that ends before, a read would end the process."""
    size = library.stat().st_size
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return f"{library.name}, {size} bytes, is no ELF file"
    (sections,), (entry, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    needed = sections + entry * count  # the table of sections stands last
    return f"{library.name} is truncated: {size} of {needed} bytes" if size < needed else None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _no_device(device: int, needed: tuple[int, int], op: str) -> str | None:
    found = torch.cuda.get_device_capability(device)
    fits = found == needed if needed == FWD_CAPABILITY else found >= needed
    if fits:
        return None
    which = "exactly" if needed == FWD_CAPABILITY else "at least"
    name = torch.cuda.get_device_name(device)
    return f"{op} needs compute capability {which} {needed[0]}.{needed[1]}, {name} has {found[0]}.{found[1]}"


def _no_fwd(device: int) -> str | None:
    return _no_device(device, FWD_CAPABILITY, "fwd_kvcache_mla")


def _no_call(q: Tensor, kv_cache: Tensor, head_dim_v: int, batch_invariant: bool = False, **uneven) -> str | None:
    """Why fwd_kvcache_mla does not take tensors of this kind; the cpu backend takes them all."""
    elsewhere = "the cpu backend serves it, on CPU tensors"
    if q.dtype not in FWD_DTYPES and q.dtype is not torch.float8_e4m3fn:
        return f"it computes in torch.bfloat16 and torch.float16, got {q.dtype}: {elsewhere}"
    if (q.shape[-1], head_dim_v) != FWD_DIMS:
        return f"it serves d_qk {FWD_DIMS[0]}, d_v {FWD_DIMS[1]}, got d_qk {q.shape[-1]}, d_v {head_dim_v}: {elsewhere}"
    if kv_cache.shape[1] % TILE:
        return f"it serves page sizes that are multiples of {TILE}, got {kv_cache.shape[1]}: {elsewhere}"
    if batch_invariant and kv_cache.dtype in BYTE_DTYPES:
        return "its fp8 kernels do not merge a row's units in a fixed order (batch_invariant): keep the cache in bf16"
    return None


# ------------------------------------------------------------------------------------------------------------ the ops


@functools.cache
def _parts(device: torch.device, num_heads_per_head_k: int, num_heads_k: int) -> int:
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max_parts(multiprocessors, row_tiles(num_heads_per_head_k, num_heads_k))


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
    if values.DEBUG:
        values.check_lengths(cache_seqlens)
        if cu_seqlens_q is not None:
            values.check_queries(cu_seqlens_q, max_seqlen_q)
    parts = _parts(cache_seqlens.device, num_heads_per_head_k, num_heads_k)
    plan, uneven = (tile_scheduler_metadata, num_splits), (cu_seqlens_q, max_seqlen_q or 0)
    if batch_invariant:
        room = places(row_tiles(num_heads_per_head_k, num_heads_k))
        torch.ops.flashmla_sm90.get_mla_metadata_invariant.default(
            *plan, cache_seqlens, parts, room, num_heads_per_head_k, *uneven
        )
        return
    torch.ops.flashmla_sm90.get_mla_metadata.default(*plan, cache_seqlens, parts, num_heads_per_head_k, *uneven)


def fwd_kvcache_mla(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,  # 512, as refusal says
    softmax_scale: float,
    causal: bool,
    plan: tuple[Tensor, Tensor] | None,
    q_scale: Tensor | None,
    kv_scale: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:  # out [b, s_q, h_q, d_v], lse [b, h_q, s_q]; [total_q, h_q, d_v], [h_q, total_q]
    h_k = kv_cache.shape[2]
    rows = q.shape[-2] // h_k if cu_seqlens_q is not None else q.shape[1] * q.shape[2] // h_k
    parts = _parts(q.device, max(rows, 1), h_k)
    uneven = cu_seqlens_q, max_seqlen_q or 0
    if values.DEBUG:
        values.check_fwd_kvcache_mla(
            q, kv_cache, block_table, cache_seqlens, head_dim_v, plan, q_scale, kv_scale, parts, *uneven
        )
    metadata = None if plan is None else plan[0]
    # a plan that is given may come from elsewhere, and use more parts than this machine would
    plan_parts = parts if plan is None else MAX_PARTS
    call = q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, metadata, parts, plan_parts
    return torch.ops.flashmla_sm90.fwd_kvcache_mla.default(*call, q_scale, kv_scale, *uneven)


def concat_and_cache_mla(
    kv_cache: Tensor, kv_c: Tensor, k_pe: Tensor, slot_mapping: Tensor, kv_scale: Tensor | None, round_scale: bool
) -> None:
    if values.DEBUG:
        values.check_concat_and_cache_mla(slot_mapping, kv_cache.shape[0] * kv_cache.shape[1], kv_scale)
    torch.ops.flashmla_sm90.concat_and_cache_mla.default(kv_cache, kv_c, k_pe, slot_mapping, kv_scale, round_scale)


def merge_attn_states(out: Tensor, lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    torch.ops.flashmla_sm90.merge_attn_states.default(out, lse, out_a, lse_a, out_b, lse_b)
