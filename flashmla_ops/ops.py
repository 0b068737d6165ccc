"""The contract of torch.ops.flashmla.*: one block per op = schema, checks, allocation, backend call, fake.

Checks are plain `if`s in a function that returns the first thing wrong as a sentence. Kernel and fake share it: sizes
are compared through `_known` and `_differ`, which also take symbols, whose values nobody may know yet.

What each op computes is documented in functional.py.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from . import backends
from .kv_cache import BYTE_DTYPES, CACHE_DTYPES, PLAIN_DTYPES, CacheFormat, formats_of
from .plan import COLUMNS, MAX_PARTS, is_invariant

LIB = torch.library.Library("flashmla", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
ALIGNMENT = 16  # bytes: what a vector load or a TMA copy needs of a base address and of every stride
PAGE_MULTIPLE = 16  # tokens
DIM_MULTIPLE = 16  # elements


def _define(schema: str, kernel, fake) -> None:
    """Registers an op: one kernel for every device, a fake (which serves meta tensors too), and a raising autograd."""
    name = schema[: schema.index("(")]
    LIB.define(schema, tags=TAGS)
    LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashmla::{name}", fake, lib=LIB)
    op = getattr(torch.ops.flashmla, name).default

    def refuse_grad(keyset, *args, **kwargs):
        if torch.is_grad_enabled():
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"flashmla::{name} is inference only, and an input requires grad: "
                        "call it under torch.no_grad() or torch.inference_mode()"
                    )
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    LIB.impl(name, refuse_grad, "Autograd", with_keyset=True)


# ---------------------------------------------------------------------------------------------------- shared checks


def _known(condition) -> bool:
    """Whether a condition on sizes holds; one on symbols that nobody can decide yet counts as False."""
    return condition if type(condition) is bool else guard_or_false(condition)


def _differ(a, b) -> bool:
    """Whether two sizes differ; a pair of symbols that nobody can decide yet becomes an assertion made at run time."""
    if _known(a != b):
        return True
    if type(a) is not int or type(b) is not int:
        torch._check(a == b)
    return False


def _misplaced(name: str, t: Tensor, dims: str, dtype: torch.dtype, device: torch.device, like: str) -> str | None:
    """What every tensor of every op is asked first: rank, dtype, device. `dims` names the dimensions: "[b, s_q]"."""
    rank = dims.count(",") + 1
    if t.dim() != rank:
        return f"{name}: expected {rank} dimensions {dims}, got shape {list(t.shape)}"
    if t.dtype is not dtype:
        return f"{name}: expected {dtype}, got {t.dtype}"
    if t.device != device:
        return f"{name}: expected device {device} ({like}'s), got {t.device}"
    return None


def _size(name: str, t: Tensor, dim: int, expected, meaning: str) -> str | None:
    if _differ(t.shape[dim], expected):
        return f"{name}: expected dimension {dim} to be {expected} ({meaning}), got shape {list(t.shape)}"
    return None


def _strided(name: str, t: Tensor, inner_only: bool = False) -> str | None:
    """Innermost stride 1, other strides multiples of 16 bytes. Strides of dimensions of size 1 and of empty tensors are
    arbitrary in PyTorch, hence ignored. (Contiguous tensors pass: each op asks for sizes that make them so.)"""
    if type(t.numel()) is int and t.is_contiguous():
        return None
    shape, strides = t.shape, t.stride()
    last = len(shape) - 1
    for dim, stride in enumerate(strides):
        wrong = stride != 1 if dim == last else not inner_only and stride * t.itemsize % ALIGNMENT != 0
        if _known(wrong) and _known(shape[dim] != 1) and not _known(t.numel() == 0):
            expected = "1" if dim == last else f"a multiple of {ALIGNMENT // t.itemsize} ({ALIGNMENT} bytes)"
            return f"{name}: expected the stride of dimension {dim} to be {expected}, got {stride}"
    return None


def _refuse(error: str | None) -> None:
    if error:
        raise RuntimeError(error)


_served: dict[tuple, ModuleType] = {}  # calls that passed their checks, and the backend that serves them
MAX_SERVED = 4096


def _signature(op: str, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple:
    """All that the checks of an op of four tensors and the choice of a backend read. Looking it up in `_served` takes
    2 us, the checks and the choice 14."""
    return (
        *(backends.in_use, op, a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device),
        *(c.shape, c.stride(), c.dtype, c.device, d.shape, d.stride(), d.dtype, d.device),
    )


def _remember(signature: tuple, backend: ModuleType) -> ModuleType:
    if len(_served) >= MAX_SERVED:
        _served.clear()
    _served[signature] = backend
    return backend


def _refuse_misaligned(*named: tuple[str, Tensor]) -> None:
    for name, t in named:
        if t.data_ptr() % ALIGNMENT:
            past = t.data_ptr() % ALIGNMENT
            raise RuntimeError(f"{name}: expected a {ALIGNMENT}-byte aligned address, got one {past} bytes past")


def _listed(dtypes) -> str:
    return ", ".join(map(str, dtypes))


def _cache_error(kv_cache: Tensor, dtype: torch.dtype, device: torch.device, like: str) -> str | None:
    if error := _misplaced("kv_cache", kv_cache, "[num_pages, page_size, h_k, last_dim]", dtype, device, like):
        return error
    page_size = kv_cache.shape[1]
    if _known(page_size % PAGE_MULTIPLE != 0) or _known(page_size < PAGE_MULTIPLE):
        return f"kv_cache: expected a page size (dimension 1) that is a multiple of {PAGE_MULTIPLE}, got {page_size}"
    return _strided("kv_cache", kv_cache)


def _format_error(kv_cache: Tensor, d_v, d_rope, dims: str, kv_scale: Tensor | None) -> str | None:
    """Whether the cache's last dimension is that of one of its dtype's formats, and kv_scale there if that needs it."""
    formats, last_dim = formats_of(kv_cache.dtype), kv_cache.shape[3]

    def fits(layout: CacheFormat) -> bool:
        size = layout.last_dim(d_v, d_rope)
        # the only format may be settled at run time; of several, one must be known now
        return not _differ(size, last_dim) if len(formats) == 1 else _known(size == last_dim)

    fitting = next((layout for layout in formats if fits(layout)), None)
    if fitting is None:
        sizes = " or ".join(f"{layout.last_dim(d_v, d_rope)} ({layout.name})" for layout in formats)
        return f"kv_cache: expected last dimension {sizes} for {dims}, got shape {list(kv_cache.shape)}"
    return _scale_error("kv_scale", kv_scale, fitting.scaled, f"a cache of {fitting.name}", kv_cache)


def _scale_error(name: str, scale: Tensor | None, needed: bool, by: str, like: Tensor) -> str | None:
    if not needed:
        return None if scale is None else f"{name}: expected None for {by}, got a tensor"
    if scale is None:
        return f"{name}: expected one fp32 value for {by}, got None"
    if scale.dtype is not torch.float32 or scale.device != like.device or _known(scale.numel() != 1):
        return (
            f"{name}: expected one torch.float32 value on {like.device}, got shape {list(scale.shape)}, "
            f"{scale.dtype}, on {scale.device}"
        )
    return None


def _facts(scale: Tensor | None) -> tuple | None:
    """What the checks of a scale read."""
    return None if scale is None else (scale.shape, scale.dtype, scale.device)


# ------------------------------------------------------------------------------------------------- get_mla_metadata


def _metadata_error(
    cache_seqlens: Tensor,
    num_heads_per_head_k: int,
    num_heads_k: int,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
) -> str | None:
    error = _misplaced("cache_seqlens", cache_seqlens, "[b]", torch.int32, cache_seqlens.device, "its own")
    error = error or _strided("cache_seqlens", cache_seqlens)
    for name, value in (("num_heads_per_head_k", num_heads_per_head_k), ("num_heads_k", num_heads_k)):
        if not error and _known(value < 1):
            error = f"{name}: expected at least 1, got {value}"
    return error or _uneven_error(cu_seqlens_q, max_seqlen_q, cache_seqlens, "cache_seqlens")


def _uneven_error(cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, of: Tensor, like: str) -> str | None:
    """What is wrong with the numbers of queries of the rows of `of`, the argument called `like`."""
    if cu_seqlens_q is None and max_seqlen_q is None:
        return None
    if cu_seqlens_q is None or max_seqlen_q is None:
        missing, given = ("cu_seqlens_q", "max_seqlen_q") if cu_seqlens_q is None else ("max_seqlen_q", "cu_seqlens_q")
        return f"{missing}: expected a value with {given} (give both or neither), got None"
    error = (
        _misplaced("cu_seqlens_q", cu_seqlens_q, "[b + 1]", torch.int32, of.device, like)
        or _size("cu_seqlens_q", cu_seqlens_q, 0, of.shape[0] + 1, f"{like}'s batch + 1")
        or _strided("cu_seqlens_q", cu_seqlens_q)
    )
    if not error and _known(max_seqlen_q < 1):
        error = f"max_seqlen_q: expected at least 1, got {max_seqlen_q}"
    return error


def _uneven(cu_seqlens_q: Tensor | None, max_seqlen_q: int | None) -> dict:
    """What backends are told of rows of different numbers of queries."""
    return {} if cu_seqlens_q is None else {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}


def _new_plan(cache_seqlens: Tensor, batch_invariant: bool) -> tuple[Tensor, Tensor]:
    rows = MAX_PARTS + batch_invariant
    return cache_seqlens.new_empty(rows, COLUMNS), cache_seqlens.new_empty(cache_seqlens.shape[0] + 1)


def _make_plan(
    outputs, cache_seqlens, num_heads_per_head_k, num_heads_k, batch_invariant, cu_seqlens_q, max_seqlen_q
) -> None:
    options = ({"batch_invariant": True} if batch_invariant else {}) | _uneven(cu_seqlens_q, max_seqlen_q)
    backend = backends.choose("get_mla_metadata", cache_seqlens, **options)
    backend.get_mla_metadata(*outputs, cache_seqlens, num_heads_per_head_k, num_heads_k, **options)


def _get_mla_metadata(
    cache_seqlens, num_heads_per_head_k, num_heads_k, *, batch_invariant=False, cu_seqlens_q=None, max_seqlen_q=None
):
    _refuse(_metadata_error(cache_seqlens, num_heads_per_head_k, num_heads_k, cu_seqlens_q, max_seqlen_q))
    outputs = _new_plan(cache_seqlens, batch_invariant)
    heads = num_heads_per_head_k, num_heads_k
    _make_plan(outputs, cache_seqlens, *heads, batch_invariant, cu_seqlens_q, max_seqlen_q)
    return outputs


def _get_mla_metadata_fake(
    cache_seqlens, num_heads_per_head_k, num_heads_k, *, batch_invariant=False, cu_seqlens_q=None, max_seqlen_q=None
):
    _refuse(_metadata_error(cache_seqlens, num_heads_per_head_k, num_heads_k, cu_seqlens_q, max_seqlen_q))
    return _new_plan(cache_seqlens, batch_invariant)


_define(
    "get_mla_metadata(Tensor cache_seqlens, SymInt num_heads_per_head_k, SymInt num_heads_k, *, "
    "bool batch_invariant=False, Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None) "
    "-> (Tensor tile_scheduler_metadata, Tensor num_splits)",
    _get_mla_metadata,
    _get_mla_metadata_fake,
)


def _replan_error(call: tuple, batch_invariant: bool, tile_scheduler_metadata, num_splits) -> str | None:
    of = call[0], "cache_seqlens"
    return _metadata_error(*call) or _plan_shape_error(tile_scheduler_metadata, num_splits, *of, batch_invariant)


def _get_mla_metadata_(
    cache_seqlens,
    num_heads_per_head_k,
    num_heads_k,
    *,
    batch_invariant=False,
    cu_seqlens_q=None,
    max_seqlen_q=None,
    tile_scheduler_metadata,
    num_splits,
):
    plan = tile_scheduler_metadata, num_splits
    heads = num_heads_per_head_k, num_heads_k
    _refuse(_replan_error((cache_seqlens, *heads, cu_seqlens_q, max_seqlen_q), batch_invariant, *plan))
    _refuse_misaligned(("tile_scheduler_metadata", tile_scheduler_metadata))
    _make_plan(plan, cache_seqlens, *heads, batch_invariant, cu_seqlens_q, max_seqlen_q)


def _get_mla_metadata__fake(
    cache_seqlens,
    num_heads_per_head_k,
    num_heads_k,
    *,
    batch_invariant=False,
    cu_seqlens_q=None,
    max_seqlen_q=None,
    tile_scheduler_metadata,
    num_splits,
):
    call = cache_seqlens, num_heads_per_head_k, num_heads_k, cu_seqlens_q, max_seqlen_q
    _refuse(_replan_error(call, batch_invariant, tile_scheduler_metadata, num_splits))


def _contiguous_plan(tile_scheduler_metadata: Tensor) -> str | None:
    """The one tensor that no view with gaps or overlaps serves: kernels read a part's columns at part * COLUMNS."""
    strides = tile_scheduler_metadata.stride()
    if _known(strides[0] != COLUMNS) or _known(strides[1] != 1):
        return f"tile_scheduler_metadata: expected strides [{COLUMNS}, 1] (contiguous), got {list(strides)}"
    return None


def _plan_shape_error(tile_scheduler_metadata, num_splits, of: Tensor, like: str, batch_invariant: bool) -> str | None:
    """What is wrong with a plan for the rows of `of`, the argument called `like`."""
    name, device, kind = "tile_scheduler_metadata", of.device, ", batch_invariant=True" if batch_invariant else ""
    return (
        _misplaced(name, tile_scheduler_metadata, "[MAX_PARTS, COLUMNS]", torch.int32, device, like)
        or _size(name, tile_scheduler_metadata, 0, MAX_PARTS + batch_invariant, f"as get_mla_metadata makes it{kind}")
        or _size(name, tile_scheduler_metadata, 1, COLUMNS, "as get_mla_metadata makes it")
        or _contiguous_plan(tile_scheduler_metadata)
        or _misplaced("num_splits", num_splits, "[b + 1]", torch.int32, device, like)
        or _size("num_splits", num_splits, 0, of.shape[0] + 1, f"{like}'s batch + 1")
        or _strided("num_splits", num_splits)
    )


_define(
    "get_mla_metadata_(Tensor cache_seqlens, SymInt num_heads_per_head_k, SymInt num_heads_k, *, "
    "bool batch_invariant=False, Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None, "
    "Tensor(a!) tile_scheduler_metadata, Tensor(b!) num_splits) -> ()",
    _get_mla_metadata_,
    _get_mla_metadata__fake,
)


# -------------------------------------------------------------------------------------------------- fwd_kvcache_mla


def _fwd_error(
    q, kv_cache, block_table, cache_seqlens, head_dim_v, q_scale, kv_scale, cu_seqlens_q, max_seqlen_q
) -> str | None:
    dtype, device = q.dtype, q.device
    fp8 = dtype is torch.float8_e4m3fn
    if dtype not in PLAIN_DTYPES and not fp8:
        return f"q: expected one of {_listed((*PLAIN_DTYPES, torch.float8_e4m3fn))}, got {dtype}"
    bytes_ = kv_cache.dtype in BYTE_DTYPES
    even = cu_seqlens_q is None
    dims = "[b, s_q, h_q, d_qk]" if even else "[total_q, h_q, d_qk] (with cu_seqlens_q)"
    error = (
        _misplaced("q", q, dims, dtype, device, "its own")
        or _strided("q", q)
        or _cache_error(kv_cache, kv_cache.dtype if bytes_ else dtype, device, "q")
        or _misplaced("block_table", block_table, "[b, max_pages]", torch.int32, device, "q")
        or _strided("block_table", block_table, inner_only=True)
        or _misplaced("cache_seqlens", cache_seqlens, "[b]", torch.int32, device, "q")
        or _strided("cache_seqlens", cache_seqlens)
    )
    if error:
        return error
    *_, h_q, d_qk = q.shape
    h_k = kv_cache.shape[2]
    if even:
        error = _size("block_table", block_table, 0, q.shape[0], "q's batch") or _size(
            "cache_seqlens", cache_seqlens, 0, q.shape[0], "q's batch"
        )
    else:
        error = _size("block_table", block_table, 0, cache_seqlens.shape[0], "cache_seqlens' batch")
    error = error or _uneven_error(cu_seqlens_q, max_seqlen_q, cache_seqlens, "cache_seqlens")
    if error:
        return error
    if _known(d_qk % DIM_MULTIPLE != 0) or _known(d_qk < DIM_MULTIPLE):
        return f"q: expected d_qk (dimension {q.dim() - 1}) to be a multiple of {DIM_MULTIPLE}, got {d_qk}"
    if _known(h_k < 1) or _known(h_q < 1) or _known(h_q % h_k != 0):
        return f"kv_cache: expected h_k (dimension 2) to divide q's {h_q} heads, got {h_k}"
    if _known(head_dim_v < DIM_MULTIPLE) or _known(head_dim_v > d_qk) or _known(head_dim_v % DIM_MULTIPLE != 0):
        return f"head_dim_v: expected a multiple of {DIM_MULTIPLE} up to d_qk = {d_qk}, got {head_dim_v}"
    error = _format_error(kv_cache, head_dim_v, d_qk - head_dim_v, f"q's d_qk {d_qk}, d_v {head_dim_v}", kv_scale)
    error = error or _scale_error("q_scale", q_scale, fp8, f"q of {dtype}", q)
    if not error and fp8 and kv_scale is None:
        error = f"q: expected one of {_listed(PLAIN_DTYPES)} with this cache (e4m3 goes with fp8_tensor), got {dtype}"
    return error


def _plan_error(tile_scheduler_metadata, num_splits, q, cache_seqlens, cu_seqlens_q) -> str | None:
    if tile_scheduler_metadata is None and num_splits is None:
        return None
    if tile_scheduler_metadata is None or num_splits is None:
        missing = "tile_scheduler_metadata" if tile_scheduler_metadata is None else "num_splits"
        return f"{missing}: expected the other half of get_mla_metadata's plan (give both or neither), got None"
    of = (q, "q") if cu_seqlens_q is None else (cache_seqlens, "cache_seqlens")
    invariant = _known(is_invariant(tile_scheduler_metadata))
    return _plan_shape_error(tile_scheduler_metadata, num_splits, *of, invariant)


def _fwd_kvcache_mla(
    q,
    kv_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    softmax_scale,
    causal,
    tile_scheduler_metadata=None,
    num_splits=None,
    *,
    q_scale=None,
    kv_scale=None,
    cu_seqlens_q=None,
    max_seqlen_q=None,
):
    signature = _signature("fwd_kvcache_mla", q, kv_cache, block_table, cache_seqlens), head_dim_v
    if q_scale is not None or kv_scale is not None:
        signature = *signature, _facts(q_scale), _facts(kv_scale)
    if cu_seqlens_q is not None and max_seqlen_q is not None:
        signature = *signature, max_seqlen_q, cu_seqlens_q.shape, cu_seqlens_q.stride(), cu_seqlens_q.dtype
        signature = *signature, cu_seqlens_q.device
    if tile_scheduler_metadata is not None and num_splits is not None:
        for t in (tile_scheduler_metadata, num_splits):
            signature = *signature, t.shape, t.stride(), t.dtype, t.device
    backend = _served.get(signature)
    if backend is None or (cu_seqlens_q is None) != (max_seqlen_q is None):
        scales, uneven = (q_scale, kv_scale), (cu_seqlens_q, max_seqlen_q)
        _refuse(_fwd_error(q, kv_cache, block_table, cache_seqlens, head_dim_v, *scales, *uneven))
    if (q.data_ptr() | kv_cache.data_ptr()) % ALIGNMENT:
        _refuse_misaligned(("q", q), ("kv_cache", kv_cache))
    if tile_scheduler_metadata is not None and tile_scheduler_metadata.data_ptr() % ALIGNMENT:
        _refuse_misaligned(("tile_scheduler_metadata", tile_scheduler_metadata))
    if backend is None or (tile_scheduler_metadata is None) != (num_splits is None):
        _refuse(_plan_error(tile_scheduler_metadata, num_splits, q, cache_seqlens, cu_seqlens_q))
    uneven = _uneven(cu_seqlens_q, max_seqlen_q)
    if backend is None:
        invariant = tile_scheduler_metadata is not None and is_invariant(tile_scheduler_metadata)
        facts = {"kv_cache": kv_cache, "head_dim_v": head_dim_v} | ({"batch_invariant": True} if invariant else {})
        backend = backends.choose("fwd_kvcache_mla", q, **facts, **uneven)
        _remember(signature, backend)
    plan = None if num_splits is None else (tile_scheduler_metadata, num_splits)
    return backend.fwd_kvcache_mla(
        q, kv_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, plan, q_scale, kv_scale, **uneven
    )


def _fwd_kvcache_mla_fake(
    q,
    kv_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    softmax_scale,
    causal,
    tile_scheduler_metadata=None,
    num_splits=None,
    *,
    q_scale=None,
    kv_scale=None,
    cu_seqlens_q=None,
    max_seqlen_q=None,
):
    scales, uneven = (q_scale, kv_scale), (cu_seqlens_q, max_seqlen_q)
    _refuse(_fwd_error(q, kv_cache, block_table, cache_seqlens, head_dim_v, *scales, *uneven))
    _refuse(_plan_error(tile_scheduler_metadata, num_splits, q, cache_seqlens, cu_seqlens_q))
    *batch, queries, h_q, _ = q.shape
    out_dtype = torch.bfloat16 if q.dtype is torch.float8_e4m3fn else q.dtype
    out = q.new_empty(*batch, queries, h_q, head_dim_v, dtype=out_dtype)
    return out, q.new_empty(*batch, h_q, queries, dtype=torch.float32)


_define(
    "fwd_kvcache_mla(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, SymInt head_dim_v, "
    "float softmax_scale, bool causal, Tensor? tile_scheduler_metadata=None, Tensor? num_splits=None, *, "
    "Tensor? q_scale=None, Tensor? kv_scale=None, Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None) "
    "-> (Tensor out, Tensor lse)",
    _fwd_kvcache_mla,
    _fwd_kvcache_mla_fake,
)


# ---------------------------------------------------------------------------------------------- concat_and_cache_mla


def _append_error(kv_cache, kv_c, k_pe, slot_mapping, kv_scale) -> str | None:
    device = kv_cache.device
    if kv_cache.dtype not in CACHE_DTYPES:
        return f"kv_cache: expected one of {_listed(CACHE_DTYPES)}, got {kv_cache.dtype}"
    if kv_cache.dtype in BYTE_DTYPES and kv_c.dtype not in PLAIN_DTYPES:
        return f"kv_c: expected one of {_listed(PLAIN_DTYPES)}, got {kv_c.dtype}"
    dtype = kv_c.dtype if kv_cache.dtype in BYTE_DTYPES else kv_cache.dtype
    error = (
        _cache_error(kv_cache, kv_cache.dtype, device, "its own")
        or _size("kv_cache", kv_cache, 2, 1, "h_k: one latent serves all heads")
        or _misplaced("kv_c", kv_c, "[n, d_v]", dtype, device, "kv_cache")
        or _strided("kv_c", kv_c)
        or _misplaced("k_pe", k_pe, "[n, d_rope]", dtype, device, "kv_cache")
        or _strided("k_pe", k_pe)
        or _misplaced("slot_mapping", slot_mapping, "[n]", torch.int64, device, "kv_cache")
        or _strided("slot_mapping", slot_mapping)
        or _size("k_pe", k_pe, 0, kv_c.shape[0], "kv_c's tokens")
        or _size("slot_mapping", slot_mapping, 0, kv_c.shape[0], "kv_c's tokens")
    )
    if error:
        return error
    for name, t in (("kv_c", kv_c), ("k_pe", k_pe)):
        if _known(t.shape[1] % DIM_MULTIPLE != 0):
            return f"{name}: expected dimension 1 to be a multiple of {DIM_MULTIPLE}, got {t.shape[1]}"
    d_v, d_rope = kv_c.shape[1], k_pe.shape[1]
    return _format_error(kv_cache, d_v, d_rope, f"{d_v} + {d_rope} values (kv_c's and k_pe's)", kv_scale)


def _concat_and_cache_mla(kv_cache, kv_c, k_pe, slot_mapping, *, kv_scale=None, round_scale=True):
    signature = _signature("concat_and_cache_mla", kv_cache, kv_c, k_pe, slot_mapping)
    if kv_scale is not None:
        signature = *signature, _facts(kv_scale)
    backend = _served.get(signature)
    if backend is None:
        _refuse(_append_error(kv_cache, kv_c, k_pe, slot_mapping, kv_scale))
    _refuse_misaligned(("kv_cache", kv_cache), ("kv_c", kv_c), ("k_pe", k_pe))
    if backend is None:
        backend = _remember(signature, backends.choose("concat_and_cache_mla", kv_cache))
    backend.concat_and_cache_mla(kv_cache, kv_c, k_pe, slot_mapping, kv_scale, round_scale)


def _concat_and_cache_mla_fake(kv_cache, kv_c, k_pe, slot_mapping, *, kv_scale=None, round_scale=True):
    _refuse(_append_error(kv_cache, kv_c, k_pe, slot_mapping, kv_scale) or _view_error(kv_cache))


def _view_error(kv_cache: Tensor) -> str | None:
    """Refuses a cache that was sliced inside a graph: Inductor loses its storage offset and writes elsewhere, silently
    (pytorch#198068). It is recognised by an offset that is an expression of symbols."""
    offset = kv_cache.storage_offset()
    if isinstance(offset, torch.SymInt) and not (offset.node.expr.is_number or offset.node.expr.is_symbol):
        return (
            f"kv_cache: expected a tensor of its own, got a view inside a graph (storage offset {offset}), which "
            "torch.compile would write to the wrong place: pass each layer's cache as a separate tensor"
        )
    return None


_define(
    "concat_and_cache_mla(Tensor(a!) kv_cache, Tensor kv_c, Tensor k_pe, Tensor slot_mapping, *, "
    "Tensor? kv_scale=None, bool round_scale=True) -> ()",
    _concat_and_cache_mla,
    _concat_and_cache_mla_fake,
)


# ------------------------------------------------------------------------------------------------ merge_attn_states


def _merge_error(out_a, lse_a, out_b, lse_b) -> str | None:
    dtype, device = out_a.dtype, out_a.device
    if dtype not in PLAIN_DTYPES:
        return f"out_a: expected one of {_listed(PLAIN_DTYPES)}, got {dtype}"
    for name, t in (("out_a", out_a), ("out_b", out_b)):
        if error := _misplaced(name, t, "[b, s_q, h_q, d_v]", dtype, device, "out_a") or _strided(name, t):
            return error
    for name, t in (("lse_a", lse_a), ("lse_b", lse_b)):
        if error := _misplaced(name, t, "[b, h_q, s_q]", torch.float32, device, "out_a") or _strided(
            name, t, inner_only=True
        ):
            return error
    b, s_q, h_q, d_v = out_a.shape
    if _known(d_v % DIM_MULTIPLE != 0):
        return f"out_a: expected d_v (dimension 3) to be a multiple of {DIM_MULTIPLE}, got {d_v}"
    for dim in range(4):
        if error := _size("out_b", out_b, dim, out_a.shape[dim], "out_a's"):
            return error
    for name, t in (("lse_a", lse_a), ("lse_b", lse_b)):
        for dim, size in enumerate((b, h_q, s_q)):
            if error := _size(name, t, dim, size, "out_a's [b, s_q, h_q, d_v] as [b, h_q, s_q]"):
                return error
    return None


def _new_merged(out_a: Tensor) -> tuple[Tensor, Tensor]:
    b, s_q, h_q, d_v = out_a.shape
    return out_a.new_empty(b, s_q, h_q, d_v), out_a.new_empty(b, h_q, s_q, dtype=torch.float32)


def _merge_attn_states(out_a, lse_a, out_b, lse_b):
    _refuse(_merge_error(out_a, lse_a, out_b, lse_b))
    _refuse_misaligned(("out_a", out_a), ("out_b", out_b))
    backend = backends.choose("merge_attn_states", out_a)
    outputs = _new_merged(out_a)
    backend.merge_attn_states(*outputs, out_a, lse_a, out_b, lse_b)
    return outputs


def _merge_attn_states_fake(out_a, lse_a, out_b, lse_b):
    _refuse(_merge_error(out_a, lse_a, out_b, lse_b))
    return _new_merged(out_a)


_define(
    "merge_attn_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    _merge_attn_states,
    _merge_attn_states_fake,
)
