"""The paged latent cache: token formats as data, slot arithmetic, and PagedKVCache, which deals pages to sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class CacheFormat:
    """How a token lies in a cache, as a row of `last_dim` elements: the latent (d_v values) first, then the rotated
    part (d_rope values).

    `quantize` and `dequantize` are the reference: what backends write is equal bit for bit to the first, and what they
    multiply is what the second returns; but the last place may differ, and a kv_scale may multiply products instead.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]  # of the cache
    scaled = False  # whether reading and writing take a kv_scale

    def last_dim(self, d_v: int, d_rope: int) -> int:
        """The cache's last dimension for tokens of d_v latent and d_rope rotated values."""
        raise NotImplementedError

    def quantize(self, kv_c: Tensor, k_pe: Tensor, kv_scale: Tensor | None, round_scale: bool) -> Tensor:
        """Tokens [n, d_v] and [n, d_rope] as rows [n, last_dim] of the cache (of bytes, if its elements are)."""
        raise NotImplementedError

    def dequantize(self, rows: Tensor, d_v: int, d_rope: int, kv_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rows [..., last_dim] as values [..., d_v + d_rope], rounded to `dtype`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(CacheFormat):
    """The values themselves."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.dtype,)

    def last_dim(self, d_v: int, d_rope: int) -> int:
        return d_v + d_rope

    def quantize(self, kv_c: Tensor, k_pe: Tensor, kv_scale: Tensor | None, round_scale: bool) -> Tensor:
        return torch.cat([kv_c, k_pe], dim=1)

    def dequantize(self, rows: Tensor, d_v: int, d_rope: int, kv_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return rows.to(dtype)


PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BYTE_DTYPES = (torch.uint8, torch.float8_e4m3fn)  # of fp8 caches: the same bytes
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32


def _e4m3(x: Tensor) -> Tensor:
    """To e4m3, as bytes: to the nearest, ties to even; beyond 448, inf too, it saturates; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _from_e4m3(rows: Tensor) -> Tensor:
    return rows.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class Fp8Blocks(CacheFormat):
    """FlashMLA's: e4m3 latents with an fp32 scale for every 128 of them, and rotated values in bf16.

    A row is d_v bytes of e4m3 values, ceil(d_v / 128) scales, d_rope bf16 values and zeros up to a multiple of 16 bytes
    (656 for 512 + 64). A scale is max |x| / 448 over the block's finite values, at least 2^-126, rounded up to a power
    of two if `round_scale`; 1 for a block of zeros. A value is e4m3(x / scale), read as value * scale. What is infinite
    saturates at 448 * scale, NaN stays NaN. https://github.com/deepseek-ai/FlashMLA, "FP8 KV cache".
    """

    name = "fp8"
    dtypes = BYTE_DTYPES
    block = 128

    def _scales(self, d_v: int) -> int:
        return -(-d_v // self.block)

    def last_dim(self, d_v: int, d_rope: int) -> int:
        return -(-(d_v + 4 * self._scales(d_v) + 2 * d_rope) // 16) * 16

    def quantize(self, kv_c: Tensor, k_pe: Tensor, kv_scale: Tensor | None, round_scale: bool) -> Tensor:
        n, d_v = kv_c.shape
        blocks = self._scales(d_v)
        x = torch.nn.functional.pad(kv_c.float(), (0, blocks * self.block - d_v)).view(n, blocks, self.block)
        largest = x.abs().masked_fill(~x.isfinite(), 0).amax(-1, keepdim=True)
        scale = (largest / E4M3_MAX).clamp_min(SMALLEST_SCALE)
        if round_scale:
            mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, 0.5 <= mantissa < 1
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = scale.masked_fill(largest == 0, 1)
        parts = (
            _e4m3(x / scale).flatten(1)[:, :d_v],
            scale[..., 0].contiguous().view(torch.uint8),
            k_pe.to(torch.bfloat16).contiguous().view(torch.uint8),
        )
        rows = torch.cat(parts, dim=1)
        return torch.nn.functional.pad(rows, (0, self.last_dim(d_v, k_pe.shape[1]) - rows.shape[1]))

    def dequantize(self, rows: Tensor, d_v: int, d_rope: int, kv_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows = rows.view(torch.uint8)
        values, scales, rope = rows[..., : d_v + 4 * self._scales(d_v) + 2 * d_rope].split(
            [d_v, 4 * self._scales(d_v), 2 * d_rope], dim=-1
        )
        scale = scales.contiguous().view(torch.float32).repeat_interleave(self.block, dim=-1)[..., :d_v]
        latent = (_from_e4m3(values) * scale).to(dtype)
        return torch.cat([latent, rope.contiguous().view(torch.bfloat16).to(dtype)], dim=-1)


@dataclass(frozen=True)
class Fp8Tensor(CacheFormat):
    """e4m3 with one scale for all: a value is e4m3(x / kv_scale), read as value * kv_scale.

    kv_scale is taken as it is: with 0 or NaN values become what the division makes of them, within e4m3.
    """

    name = "fp8_tensor"
    dtypes = BYTE_DTYPES
    scaled = True

    def last_dim(self, d_v: int, d_rope: int) -> int:
        return d_v + d_rope

    def quantize(self, kv_c: Tensor, k_pe: Tensor, kv_scale: Tensor | None, round_scale: bool) -> Tensor:
        return _e4m3(torch.cat([kv_c.float(), k_pe.float()], dim=1) / kv_scale)

    def dequantize(self, rows: Tensor, d_v: int, d_rope: int, kv_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return (_from_e4m3(rows) * kv_scale).to(dtype)


FORMATS = (*(Plain(dtype) for dtype in PLAIN_DTYPES), Fp8Blocks(), Fp8Tensor())
CACHE_DTYPES = tuple(dict.fromkeys(dtype for f in FORMATS for dtype in f.dtypes))


def formats_of(dtype: torch.dtype) -> tuple[CacheFormat, ...]:
    """The formats that a cache of this dtype may have; which one it is, its last dimension says."""
    return tuple(f for f in FORMATS if dtype in f.dtypes)


def format_of(kv_cache: Tensor, d_v: int, d_rope: int) -> CacheFormat:
    """The format of a cache of tokens of d_v + d_rope values, told from its dtype and last dimension.

    Raises:
        RuntimeError: no format is like that; lists those of this dtype.
    """
    formats = formats_of(kv_cache.dtype)
    for layout in formats:
        if layout.last_dim(d_v, d_rope) == kv_cache.shape[-1]:
            return layout
    if not formats:
        raise RuntimeError(f"kv_cache: expected one of {', '.join(map(str, CACHE_DTYPES))}, got {kv_cache.dtype}")
    sizes = " or ".join(f"{layout.last_dim(d_v, d_rope)} ({layout.name})" for layout in formats)
    raise RuntimeError(
        f"kv_cache: expected last dimension {sizes} for {d_v} + {d_rope} values, got shape {list(kv_cache.shape)}"
    )


def named_format(kv_cache_dtype: str | torch.dtype) -> CacheFormat:
    """The format of a name: of its `name` in FORMATS, or of the torch dtype of plain values.

    Raises:
        RuntimeError: an unknown name; lists those that are known.
    """
    by_name = {layout.name: layout for layout in FORMATS}
    name = str(kv_cache_dtype).removeprefix("torch.")
    if name not in by_name:
        raise RuntimeError(f"kv_cache_dtype: expected one of {', '.join(by_name)}, got {kv_cache_dtype}")
    return by_name[name]


def mark_kv_cache(kv_cache: Tensor) -> Tensor:
    """Promises torch.compile that this very tensor stays at its address, and returns it.

    Without the promise, Inductor's CUDA graphs skip every graph that writes the cache and copy a cache that is only
    read. Module buffers have it by nature; a cache passed as an argument needs it, once, before the first compiled
    call.

    Raises:
        RuntimeError: the cache is a view with a storage offset, which compiled code would lose (pytorch#198068).
    """
    if kv_cache.storage_offset() != 0:
        raise RuntimeError(
            f"kv_cache: expected its own storage, got a view with storage offset {kv_cache.storage_offset()}, which "
            "torch.compile may write to the wrong place: allocate each layer's cache separately"
        )
    torch._dynamo.mark_static_address(kv_cache, guard=False)
    return kv_cache


class Share(NamedTuple):
    """The pages of every sequence that a rank holds where a sequence's pages are dealt to several: its page i (its
    tokens from i * page_size on) is page i // count of rank i % count."""

    index: int = 0
    count: int = 1

    def lengths(self, seqlens: Tensor, page_size: int) -> Tensor:
        """How many of the first `seqlens` (integers of any shape) tokens lie in this rank's pages."""
        whole, rest = seqlens // page_size, seqlens % page_size
        mine = (whole + (self.count - 1 - self.index)) // self.count
        return mine * page_size + torch.where(whole % self.count == self.index, rest, 0)


EVERYTHING = Share()


def slots_of(block_table: Tensor, positions: Tensor, page_size: int, share: Share = EVERYTHING) -> Tensor:
    """The slots in which tokens of given positions lie: page * page_size + offset, and -1 where a position is negative
    or lies in another rank's share.

    Args:
        block_table: [b, max_pages] int32, the pages of this share.
        positions: [b, s] integers, in tokens from the row's start; below max_pages * page_size * share.count.
    Returns:
        [b, s] int64, what `concat_and_cache_mla` takes (flattened) as slot_mapping.
    """
    known = positions.clamp_min(0).long()
    number, here = known // page_size, positions >= 0
    if share.count > 1:
        here = here & (number % share.count == share.index)
        number = number // share.count
    return torch.where(here, block_table.gather(1, number).long() * page_size + known % page_size, -1)


class PagedKVCache:
    """Caches for every layer of a model, and the pages of the sequences that share them.

    Layers are separate tensors of the same pages, so that one block table serves all. `block_table`, `cache_seqlens`
    and `slot_mapping` are updated in place and never move: captured CUDA graphs and compiled code see every change.
    Rows without a sequence have length 0 and slots -1, which the ops treat as padding.

    Args:
        num_layers, num_pages, page_size: sizes of `layers`, a list of [num_pages, page_size, 1, last_dim] tensors.
        max_batch_size: rows of the tables, that is sequences at once.
        max_pages_per_sequence: columns of block_table.
        kv_cache_dtype: the caches' format, by its name in FORMATS: "bfloat16" (if None), "float16" and "float32" (or
            these torch dtypes), "fp8" (e4m3 with a scale for every 128 values, rope in bf16), "fp8_tensor" (e4m3 with
            one kv_scale, which the ops are given with each call). fp8 caches are of uint8.
        kv_lora_rank, qk_rope_head_dim: values of a token, from which last_dim follows: 576 for 512 + 64, "fp8" 656.
        max_new_tokens: the most tokens that one `extend` adds to a row; width of slot_mapping.
        head_dim, dtype: last_dim and the caches' dtype (one of CACHE_DTYPES) as they are, instead of kv_cache_dtype.
        share: which pages of each sequence this cache holds, if ranks share them (parallel.py); the sizes are this
            rank's. Every rank deals as many pages as the first, which has the most: all have the same tables and run
            out of pages at the same call.
    Attributes:
        layers: the caches, each marked with `mark_kv_cache`.
        block_table: [max_batch_size, max_pages_per_sequence] int32.
        cache_seqlens: [max_batch_size] int32.
        slot_mapping: [max_batch_size * max_new_tokens] int64: the tokens of the last `extend`, right-aligned in their
            row's max_new_tokens places, -1 elsewhere.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        max_batch_size: int,
        max_pages_per_sequence: int,
        *,
        kv_cache_dtype: str | torch.dtype | None = None,
        kv_lora_rank: int = 512,
        qk_rope_head_dim: int = 64,
        page_size: int = 64,
        max_new_tokens: int = 1,
        head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        share: Share = EVERYTHING,
    ):
        if kv_cache_dtype is not None:
            for name, value in (("head_dim", head_dim), ("dtype", dtype)):
                if value is not None:
                    raise RuntimeError(f"{name}: expected None with kv_cache_dtype, from which it follows, got {value}")
            layout = named_format(kv_cache_dtype)
            head_dim, dtype = layout.last_dim(kv_lora_rank, qk_rope_head_dim), layout.dtypes[0]
        head_dim = kv_lora_rank + qk_rope_head_dim if head_dim is None else head_dim
        dtype = torch.bfloat16 if dtype is None else dtype
        if dtype not in CACHE_DTYPES:
            raise RuntimeError(f"dtype: expected one of {', '.join(map(str, CACHE_DTYPES))}, got {dtype}")
        sizes = {"num_pages": num_pages, "max_batch_size": max_batch_size, "max_new_tokens": max_new_tokens}
        for name, value in (*sizes.items(), ("max_pages_per_sequence", max_pages_per_sequence)):
            if value < 1:
                raise RuntimeError(f"{name}: expected at least 1, got {value}")
        shape = (num_pages, page_size, 1, head_dim)
        self.layers = [mark_kv_cache(torch.zeros(shape, dtype=dtype, device=device)) for _ in range(num_layers)]
        self.page_size = page_size
        self.share = share
        self.max_new_tokens = max_new_tokens
        # the host's copies, from which the device's are updated
        self._table = torch.zeros(max_batch_size, max_pages_per_sequence, dtype=torch.int32)
        self._seqlens = torch.zeros(max_batch_size, dtype=torch.int32)
        self._live = [False] * max_batch_size
        self._pages: list[list[int]] = [[] for _ in range(max_batch_size)]
        self._free_pages = list(range(num_pages - 1, -1, -1))  # a stack: page 0 is dealt first
        self.block_table = self._table.to(device, copy=True)
        self.cache_seqlens = self._seqlens.to(device, copy=True)
        self.slot_mapping = torch.full((max_batch_size * max_new_tokens,), -1, dtype=torch.int64, device=device)

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def rows(self) -> list[int]:
        """The rows that hold a sequence, in order."""
        return [row for row, live in enumerate(self._live) if live]

    def pages_of(self, row: int) -> list[int]:
        """The pages of a row's sequence, in the order of its tokens."""
        return list(self._pages[self._check_row(row)])

    def allocate(self, num_tokens: int = 0) -> int:
        """Starts a sequence of num_tokens tokens in the lowest free row and returns the row.

        slot_mapping is left alone: a prompt's slots are slots_of(block_table[row : row + 1], positions, page_size).

        Raises:
            RuntimeError: no free row or too few free pages; nothing has changed then.
        """
        if all(self._live):
            raise RuntimeError(f"allocate: expected a free row, got all {len(self._live)} in use: free() one")
        row = self._live.index(False)
        self._deal({row: num_tokens})
        self._live[row] = True
        self._publish()
        return row

    def extend(self, num_tokens: int | Mapping[int, int] | Sequence[int]) -> None:
        """Adds tokens at the end of sequences, and points slot_mapping at them.

        Args:
            num_tokens: for every sequence (an int), for some rows ({row: n}), or for all rows in order (0 for free
            rows).
        Raises:
            RuntimeError: unknown row, more than max_new_tokens, a sequence too long for block_table, or too few free
                pages, naming how many are needed and free; nothing has changed then.
        """
        if isinstance(num_tokens, int):
            added = dict.fromkeys(self.rows, num_tokens)
        elif isinstance(num_tokens, Mapping):
            added = dict(num_tokens)
        else:
            if len(num_tokens) != len(self._live):
                raise RuntimeError(
                    f"num_tokens: expected one for each of {len(self._live)} rows, got {len(num_tokens)}"
                )
            added = {row: n for row, n in enumerate(num_tokens) if n}
        for row, n in added.items():
            self._check_row(row)
            if n > self.max_new_tokens:
                raise RuntimeError(f"num_tokens: expected at most max_new_tokens = {self.max_new_tokens}, got {n}")
        self._deal(added)
        self._publish(added)

    def free(self, row: int) -> None:
        """Ends a row's sequence: its pages go back, its length becomes 0."""
        self._free_pages.extend(reversed(self._pages[self._check_row(row)]))
        self._pages[row] = []
        self._live[row] = False
        self._seqlens[row] = 0
        self._table[row] = 0
        self.slot_mapping.view(-1, self.max_new_tokens)[row] = -1
        self._publish()

    def _check_row(self, row: int) -> int:
        if not (0 <= row < len(self._live) and self._live[row]):
            raise RuntimeError(f"row: expected one that holds a sequence ({self.rows}), got {row}")
        return row

    def _deal(self, added: dict[int, int]) -> None:
        """Lengthens rows on the host: all of them, or none."""
        span = self.page_size * self.share.count  # tokens of a sequence for each of this rank's pages
        max_pages = self._table.shape[1]
        length = {}
        for row, n in added.items():
            if n < 0:
                raise RuntimeError(f"num_tokens: expected at least 0, got {n} for row {row}")
            length[row] = int(self._seqlens[row]) + n
            if length[row] > max_pages * span:
                raise RuntimeError(
                    f"row {row}: expected at most {max_pages * span} tokens ({max_pages} pages of "
                    f"{span}), got {length[row]}: raise max_pages_per_sequence"
                )
        needed = {row: -(-total // span) - len(self._pages[row]) for row, total in length.items()}
        if sum(needed.values()) > len(self._free_pages):
            raise RuntimeError(f"out of pages: {sum(needed.values())} needed, {len(self._free_pages)} free")
        for row, count in needed.items():
            for _ in range(count):
                self._table[row, len(self._pages[row])] = self._free_pages[-1]
                self._pages[row].append(self._free_pages.pop())
            self._seqlens[row] = length[row]

    def _publish(self, added: dict[int, int] | None = None) -> None:
        """Writes the host's tables to the device's, in place."""
        self.block_table.copy_(self._table)
        self.cache_seqlens.copy_(self._seqlens)
        if added is not None:
            from_end = torch.arange(self.max_new_tokens, 0, -1)  # [max_new_tokens]: tokens from the row's end
            count = torch.zeros(len(self._live), dtype=torch.int64)
            for row, n in added.items():
                count[row] = n
            position = torch.where(from_end <= count[:, None], self._seqlens[:, None] - from_end, -1)
            self.slot_mapping.copy_(slots_of(self._table, position, self.page_size, self.share).flatten())
