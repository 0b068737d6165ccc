"""Inputs, exact results and error measures for tests and benchmarks of the ops. Everything is seeded.

    case = make_decode_case([300, 0, 4096], h_q=16, causal=True, peaked="last")
    out, lse = fwd_kvcache_mla(**case.kwargs())
    check_decode(case, out, lse)

What an op must not read is poisoned: keys past a row's length, pages of no row and the gaps of strided views hold NaN,
and entries of block_table past a row's pages point far outside the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .kv_cache import E4M3_MAX, format_of, named_format
from .plan import TILE

BAD_PAGE = 2**31 - 1
# Of cases whose format has one scale, and of queries in e4m3: a power of two, so that products with it are exact.
KV_SCALE = 0.0625
FP32_EPS = 2.0**-23
BLOCK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # working set of one block of rows in `attention`


class _Case:
    def kwargs(self) -> dict:
        """The arguments of the public function of the same name as the case."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str):
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.kwargs().items()}
        return type(self)(**moved)


# ------------------------------------------------------------------------------------------------------------ inputs


@dataclass
class DecodeCase(_Case):
    """A call of fwd_kvcache_mla."""

    q: Tensor  # [b, s_q, h_q, d_qk]
    kv_cache: Tensor  # [num_pages, page_size, h_k, d_qk]
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    head_dim_v: int
    softmax_scale: float
    causal: bool

    @property
    def plan_args(self) -> tuple[Tensor, int, int]:
        """The arguments of get_mla_metadata."""
        s_q, h_q = self.q.shape[1:3]
        h_k = self.kv_cache.shape[2]
        return self.cache_seqlens, s_q * h_q // h_k, h_k

    def flops(self) -> int:
        """Two per multiply and add of both products; keys that `causal` hides are counted, as is usual for decoding."""
        _, s_q, h_q, d_qk = self.q.shape
        return 2 * s_q * h_q * (d_qk + self.head_dim_v) * int(self.cache_seqlens.long().sum())

    def bytes_moved(self) -> int:
        """Each key, query and output once."""
        b, s_q, h_q, d_qk = self.q.shape
        _, _, h_k, last_dim = self.kv_cache.shape
        key_bytes = h_k * last_dim * self.kv_cache.itemsize * int(self.cache_seqlens.long().sum())
        out_bytes = max(self.q.itemsize, 2) * self.head_dim_v  # of queries in e4m3: bf16
        return key_bytes + b * s_q * h_q * (d_qk * self.q.itemsize + out_bytes + 4)

    def dequantized(self) -> "DecodeCase":
        """The call over the values that its cache stands for."""
        return self


@dataclass
class Fp8DecodeCase(DecodeCase):
    """A call of fwd_kvcache_mla over an fp8 cache, as `quantized` makes it."""

    kv_scale: Tensor | None  # of a format of one scale
    q_scale: Tensor | None = None  # of queries in e4m3

    def dequantized(self) -> DecodeCase:
        q = self.q if self.q_scale is None else (self.q.float() * self.q_scale).bfloat16()  # exactly
        d_v, d_rope = self.head_dim_v, q.shape[3] - self.head_dim_v
        layout = format_of(self.kv_cache, d_v, d_rope)
        values = layout.dequantize(self.kv_cache, d_v, d_rope, self.kv_scale, q.dtype)
        changed = {"q": q, "kv_cache": values}
        return DecodeCase(**{f.name: getattr(self, f.name) for f in fields(DecodeCase)} | changed)


@dataclass
class UnevenDecodeCase(DecodeCase):
    """A call of fwd_kvcache_mla for rows of different numbers of queries, as `uneven` makes it: q [total_q, h_q, d]."""

    cu_seqlens_q: Tensor  # [b + 1] int32
    max_seqlen_q: int

    @property
    def plan_args(self) -> tuple[Tensor, int, int]:
        h_q, h_k = self.q.shape[1], self.kv_cache.shape[2]
        return self.cache_seqlens, h_q // h_k, h_k

    @property
    def plan_options(self) -> dict:
        """And its keywords."""
        return {"cu_seqlens_q": self.cu_seqlens_q, "max_seqlen_q": self.max_seqlen_q}

    def places(self) -> tuple[Tensor, Tensor]:
        """[cu_seqlens_q[b]] each: the row of each query, and its place there in a call padded in front."""
        count = self.cu_seqlens_q.long().diff()
        row = torch.repeat_interleave(count)
        return row, torch.arange(len(row), device=row.device) - self.cu_seqlens_q[row + 1] + self.max_seqlen_q

    def padded(self) -> DecodeCase:
        """The call of max_seqlen_q queries a row, of which the last ones are the row's own."""
        b = self.cache_seqlens.shape[0]
        row, i = self.places()
        q = self.q.new_zeros(b, self.max_seqlen_q, *self.q.shape[1:])
        q[row, i] = self.q[: len(row)]
        return DecodeCase(**{f.name: getattr(self, f.name) for f in fields(DecodeCase)} | {"q": q})

    def packed(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Results of the padded call as those of this one; queries of no row have seen nothing."""
        row, i = self.places()
        total_q, h_q, _ = self.q.shape
        packed_out = out.new_zeros(total_q, h_q, self.head_dim_v)
        packed_lse = lse.new_full((h_q, total_q), float("inf"))
        packed_out[: len(row)], packed_lse[:, : len(row)] = out[row, i], lse[row, :, i].T
        return packed_out, packed_lse

    def flops(self) -> int:
        h_q, d_qk = self.q.shape[1:]
        return 2 * h_q * (d_qk + self.head_dim_v) * int((self.cu_seqlens_q.long().diff() * self.cache_seqlens).sum())

    def bytes_moved(self) -> int:
        total_q, h_q, d_qk = self.q.shape
        _, _, h_k, last_dim = self.kv_cache.shape
        key_bytes = h_k * last_dim * self.kv_cache.itemsize * int(self.cache_seqlens.long().sum())
        return key_bytes + total_q * h_q * ((d_qk + self.head_dim_v) * self.q.itemsize + 4)


@dataclass
class AppendCase(_Case):
    """A call of concat_and_cache_mla."""

    kv_cache: Tensor  # [num_pages, page_size, 1, d_v + d_rope]
    kv_c: Tensor  # [n, d_v]
    k_pe: Tensor  # [n, d_rope]
    slot_mapping: Tensor  # [n] int64

    def bytes_moved(self) -> int:
        """Each token read and written once, and its slot read."""
        n, d_v = self.kv_c.shape
        read = (d_v + self.k_pe.shape[1]) * self.kv_c.itemsize
        return n * (read + self.kv_cache.shape[3] * self.kv_cache.itemsize + 8)


@dataclass
class MergeCase(_Case):
    """A call of merge_attn_states."""

    out_a: Tensor  # [b, s_q, h_q, d_v]
    lse_a: Tensor  # [b, h_q, s_q] fp32
    out_b: Tensor
    lse_b: Tensor

    def bytes_moved(self) -> int:
        """Two states read, one written."""
        return 3 * (self.out_a.numel() * self.out_a.itemsize + self.lse_a.numel() * 4)


def make_decode_case(
    lengths: Sequence[int] | Tensor,
    s_q: int = 1,
    h_q: int = 16,
    h_k: int = 1,
    d_qk: int = 576,
    d_v: int = 512,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    causal: bool = False,
    softmax_scale: float | None = None,
    peaked: str | None = None,
    seed: int = 0,
    poison: bool = True,
    strided: bool = False,
) -> DecodeCase:
    """Rows of the given lengths, their pages dealt at random over a cache with a few pages to spare.

    Args:
        softmax_scale: d_qk ** -0.5 if None.
        peaked: None for scores of std 1 (at that scale); 'first', 'middle' or 'last' for scores of std 10 to 30 whose
            largest lie in that 64-key tile of each row. Flat scores alone would pass a kernel that never rescales its
            accumulator.
        poison: fill what must not be read with NaN and huge page numbers.
        strided: make q and kv_cache views with gaps and swapped dimensions, within the contract.
    """
    if peaked not in (None, "first", "middle", "last"):
        raise ValueError(f"peaked: expected None, 'first', 'middle' or 'last', got {peaked!r}")
    lengths = torch.as_tensor(lengths, dtype=torch.int64, device=device)
    b = lengths.shape[0]
    generator = torch.Generator(device).manual_seed(seed)
    normal = {"generator": generator, "device": device, "dtype": dtype}
    pages = -(-lengths // page_size)  # [b]
    max_pages, num_pages = int(pages.max()) + 2 if b else 2, int(pages.sum()) + 3

    q = torch.randn(b, s_q, h_q, d_qk, **normal)
    kv_cache = torch.randn(num_pages, page_size, h_k, d_qk, **normal)
    column = torch.arange(max_pages, device=device)
    owned = column < pages[:, None]  # [b, max_pages]
    dealt = torch.randperm(num_pages, generator=generator, device=device)
    block_table = torch.full((b, max_pages), BAD_PAGE if poison else 0, dtype=torch.int64, device=device)
    block_table[owned] = dealt[: int(pages.sum())]

    if peaked:
        std = 10 + 20 * torch.rand(1, generator=generator, device=device).item()
        direction = torch.nn.functional.normalize(torch.randn(d_qk, generator=generator, device=device), dim=0)
        q = (q.float() * std + std * d_qk**0.5 * direction).to(dtype)
        last_tile = (lengths.clamp_min(1) - 1) // TILE
        tile = {"first": 0 * last_tile, "middle": last_tile // 2, "last": last_tile}[peaked]
        key = (tile[:, None] * TILE + torch.arange(TILE, device=device)).minimum(lengths[:, None] - 1)[lengths > 0]
        page = block_table[lengths > 0].gather(1, key // page_size)
        kv_cache[page, key % page_size] += (8 * direction).to(dtype)  # 8 std above the other scores

    if poison:
        unused = torch.ones(num_pages, page_size, dtype=torch.bool, device=device)
        row, used_column = owned.nonzero(as_tuple=True)
        token = used_column[:, None] * page_size + torch.arange(page_size, device=device)
        unused[block_table[owned]] = token >= lengths[row, None]
        kv_cache[unused] = float("nan")
    if strided:
        q = with_gaps(q.transpose(1, 2)).transpose(1, 2)
        kv_cache = with_gaps(kv_cache)
    scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
    return DecodeCase(q, kv_cache, block_table.int(), lengths.int(), d_v, scale, causal)


def quantized(case: DecodeCase, kv_format: str, e4m3_queries: bool = False) -> Fp8DecodeCase:
    """The case with its cache in the fp8 format of this name, and its queries in e4m3 if so asked."""
    layout, d_v = named_format(kv_format), case.head_dim_v
    one_scale = torch.tensor(KV_SCALE, device=case.q.device)
    kv_scale = one_scale if layout.scaled else None
    kv_c, k_pe = case.kv_cache.flatten(0, 2).tensor_split([d_v], 1)
    kv_cache = layout.quantize(kv_c, k_pe, kv_scale, True).view(*case.kv_cache.shape[:-1], -1)
    changed = {"kv_cache": kv_cache, "kv_scale": kv_scale}
    if e4m3_queries:
        q = (case.q.float() / one_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        changed |= {"q": q, "q_scale": one_scale}
    return Fp8DecodeCase(**case.kwargs() | changed)


def uneven(case: DecodeCase, queries: Sequence[int], spare: int = 0) -> UnevenDecodeCase:
    """The case with only the last queries[r] <= s_q queries of each row r, and `spare` that are no row's."""
    _, s_q, h_q, d_qk = case.q.shape
    cu_seqlens_q = torch.tensor([0, *queries], device=case.q.device).cumsum(0)
    q = case.q.new_full((int(cu_seqlens_q[-1]) + spare, h_q, d_qk), float("nan"))
    changed = {"q": q, "cu_seqlens_q": cu_seqlens_q.int(), "max_seqlen_q": s_q}
    small = UnevenDecodeCase(**{f.name: getattr(case, f.name) for f in fields(DecodeCase)} | changed)
    row, i = small.places()
    q[: len(row)] = case.q[row, i]
    if not case.q.is_contiguous():
        small.q = with_gaps(q)
    return small


def make_append_case(
    num_tokens: int,
    d_v: int = 512,
    d_rope: int = 64,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    skip: float = 0.0,
    seed: int = 0,
    strided: bool = False,
) -> AppendCase:
    """Tokens for slots dealt at random over a cache about twice as large; a share `skip` of them has slot -1."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = {"generator": generator, "device": device, "dtype": dtype}
    num_pages = 2 * -(-num_tokens // page_size) + 1
    kv_cache = torch.randn(num_pages, page_size, 1, d_v + d_rope, **normal)
    kv_c, k_pe = torch.randn(num_tokens, d_v, **normal), torch.randn(num_tokens, d_rope, **normal)
    slots = torch.randperm(num_pages * page_size, generator=generator, device=device)[:num_tokens]
    slots[torch.rand(num_tokens, generator=generator, device=device) < skip] = -1
    if strided:
        kv_cache = with_gaps(kv_cache)
        kv_c, k_pe = with_gaps(torch.cat([kv_c, k_pe], 1)).split([d_v, d_rope], 1)  # as one projection gives them
    return AppendCase(kv_cache, kv_c, k_pe, slots)


def make_merge_case(
    b: int,
    s_q: int = 1,
    h_q: int = 16,
    d_v: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = True,
    strided: bool = False,
) -> MergeCase:
    """Two random states; a quarter of each has seen nothing (lse +inf or -inf), and with poison its out is NaN."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = {"generator": generator, "device": device}
    states = []
    for _ in range(2):
        out = torch.randn(b, s_q, h_q, d_v, dtype=dtype, **normal)
        lse = 10 * torch.randn(b, h_q, s_q, **normal)
        draw = torch.rand(b, h_q, s_q, **normal)
        lse[draw < 0.25] = float("inf")
        lse[draw < 0.125] = float("-inf")
        if poison:
            out[(draw < 0.25).transpose(1, 2)] = float("nan")
        states += [with_gaps(out), with_gaps(lse)] if strided else [out, lse]
    return MergeCase(*states)


def varied_lengths(b: int, s_k: int, s_q: int = 1, seed: int = 0) -> Tensor:
    """[b] int64 lengths as in serving: normal(s_k, s_k / 2), clamped to s_q .. 4 s_k."""
    generator = torch.Generator().manual_seed(seed)
    return (s_k + s_k / 2 * torch.randn(b, generator=generator)).long().clamp(s_q, 4 * s_k)


def with_gaps(t: Tensor) -> Tensor:
    """A copy of t as a view with an offset and with NaN between its elements, strided as the ops' contract allows."""
    shape = [n if dim == 0 else n + 1 for dim, n in enumerate(t.shape[:-1])]
    buffer = t.new_full((*shape, t.shape[-1] + 16), float("nan"))
    view = buffer[(slice(None), *(slice(1, None) for _ in shape[1:]), slice(0, t.shape[-1]))]
    return view.copy_(t)


# --------------------------------------------------------------------------------------------------- exact results


def attention(
    case: DecodeCase, dtype: torch.dtype = torch.float64, p_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """What fwd_kvcache_mla must compute, in `dtype`: out [b, s_q, h_q, d_v] and lse [b, h_q, s_q], both of it.

    With p_dtype, exp(score - max) is rounded to it before its product with the values, as kernels of that dtype do.
    """
    if isinstance(case, UnevenDecodeCase):
        return case.packed(*attention(case.padded(), dtype, p_dtype))
    b, s_q, h_q, d_qk = case.q.shape
    h_k = case.kv_cache.shape[2]
    out = case.q.new_zeros(b, s_q, h_q, case.head_dim_v, dtype=dtype)
    lse = case.q.new_full((b, h_q, s_q), float("inf"), dtype=dtype)
    order = case.cache_seqlens.argsort().flip(0)  # rows of a block have similar lengths
    longest = max(case.cache_seqlens.tolist(), default=0)
    row_bytes = dtype.itemsize * (longest + 1) * (2 * h_k * d_qk + 3 * s_q * h_q)
    for rows in order.split(max(1, BLOCK_BYTES[case.q.device.type] // row_bytes)):
        lengths = case.cache_seqlens[rows].long()
        key = torch.arange(max(lengths.tolist(), default=0), device=lengths.device)
        if not key.numel():
            continue
        kv = _gather(case, rows, key, lengths).to(dtype)  # [n, w, h_k, d_qk]
        grouped = case.q[rows].to(dtype).unflatten(2, (h_k, h_q // h_k))  # [n, s_q, h_k, g, d_qk]
        scores = torch.einsum("nihgd,nwhd->nhgiw", grouped, kv).flatten(1, 2) * case.softmax_scale  # [n, h_q, s_q, w]
        query = torch.arange(s_q, device=lengths.device)
        visible = lengths[:, None] - (s_q - 1 - query if case.causal else 0 * query)  # [n, s_q] keys a query sees
        scores.masked_fill_((key >= visible[..., None])[:, None], float("-inf"))
        largest = scores.amax(-1, keepdim=True)
        p = (scores - largest.clamp_min(torch.finfo(dtype).min)).exp_()
        total = p.sum(-1)  # [n, h_q, s_q]
        p = p if p_dtype is None else p.to(p_dtype).to(dtype)
        block = torch.einsum("nhgiw,nwhd->nihgd", p.unflatten(1, (h_k, h_q // h_k)), kv[..., : case.head_dim_v])
        sees_some = total > 0
        norm = total.masked_fill(~sees_some, 1).transpose(1, 2)[..., None]
        out[rows] = block.flatten(2, 3) / norm
        lse[rows] = (largest[..., 0] + total.log()).masked_fill(~sees_some, float("inf"))
    return out, lse


def _gather(case: DecodeCase, rows: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
    """Keys [n, w, h_k, d_qk] of the rows, zero past each row's length."""
    page_size = case.kv_cache.shape[1]
    beyond = key >= lengths[:, None]
    page = case.block_table[rows][:, key // page_size].long().masked_fill(beyond, 0)
    return case.kv_cache[page, key % page_size].masked_fill_(beyond[..., None, None], 0)


# --------------------------------------------------------------------------------------------------- error measures


def relative_error(actual: Tensor, expected: Tensor, dim: int | None = None) -> float:
    """||actual - expected|| / ||expected|| in float64; with `dim`, the largest over vectors along it.

    Infinite when NaN or infinities do not sit in the same places.
    """
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite) or not torch.equal(
        actual[~finite].nan_to_num(), expected[~finite].nan_to_num()
    ):
        return float("inf")
    if not actual.numel():
        return 0.0
    difference = (actual - expected).masked_fill_(~finite, 0)
    error, size = (torch.linalg.vector_norm(t, dim=dim) for t in (difference, expected.masked_fill(~finite, 0)))
    return (error / size).nan_to_num(nan=0.0, posinf=float("inf")).max().item()  # 0 / 0: exactly right


class Expected(NamedTuple):
    """What results of a call are held against: float64's, and how PyTorch errs in the call's dtype."""

    out: Tensor
    lse: Tensor
    torch_out: Tensor
    torch_lse: Tensor


def expected(case: DecodeCase) -> Expected:
    """For `check_decode`, where several results of one call are checked."""
    return Expected(*attention(case), *attention(case, torch.float32, case.q.dtype))


def check_decode(
    case: DecodeCase,
    out: Tensor,
    lse: Tensor,
    factor: float = 2.0,
    against: Expected | None = None,
    score_std: float = 0.0,
) -> float:
    """Asserts that out and lse are as near to float64 as PyTorch in the same dtype; returns the whole out's error.

    That is: the worst of out's vectors has at most `factor` times the relative error of the worst of PyTorch's (fp32
    scores, P rounded to the dtype), and lse as much by absolute error. Both plus a floor, since an absolute error of a
    score is a relative one of its exp: 8 fp32 roundings of the largest |score|; for lse on CUDA one for each 16
    products, the step after which tensor cores truncate a sum. `against`: `expected(case)`, if it is there already.
    `score_std`: a score's partial sums are about so large, even where the few scores of a small case are not.
    """
    assert out.dtype is case.q.dtype and lse.dtype is torch.float32, (out.dtype, lse.dtype)
    exact_out, exact_lse, torch_out, torch_lse = against or expected(case)
    seen = exact_lse.isfinite()
    assert torch.equal(lse.double()[~seen], exact_lse[~seen]), "lse: expected +inf where a query sees no key"
    largest = max(score_std, exact_lse[seen].abs().amax().item() if seen.any() else 0.0)
    roundings = {"out": 8, "lse": max(8, case.q.shape[-1] // 16) if out.is_cuda else 8}

    def lse_error(lse: Tensor) -> float:
        return (lse.double() - exact_lse)[seen].abs().amax().item() if seen.any() else 0.0

    errors = {
        "out": (relative_error(out, exact_out, -1), relative_error(torch_out.to(out.dtype), exact_out, -1)),
        "lse": (lse_error(lse), lse_error(torch_lse)),
    }
    for name, (error, torch_error) in errors.items():
        floor = roundings[name] * FP32_EPS * (1 + largest)
        allowed = f"{factor} x {torch_error:.2e} (PyTorch's) + {floor:.1e}"
        assert error <= factor * torch_error + floor, f"{name}: error {error:.2e}, allowed {allowed}"
    return relative_error(out, exact_out)
