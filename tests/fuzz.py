"""Whole sequences of calls, drawn at random and held against float64: sequences join, append, plan, decode, are merged,
captured, replayed and leave, and between good calls come hostile ones, which must be refused and must change nothing.

    python tests/fuzz.py --target cpu --sequences 3000 --state fuzz.json

draws 3,000 sequences; started again, it goes on where `fuzz.json` says. A sequence depends on --seed and its number
alone. Each is played by a worker process that is killed if it takes longer than --timeout: that is a hang, and a worker
that dies is a crash. What fails is shortened and printed as a few lines of Python that play it again. Exits 1 then.
"""

import argparse
import concurrent.futures
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from pprint import pformat

import torch
from strategies import TARGETS
from test_merge_attn_states import check as check_merge
from torch import Tensor
from torch.nn.functional import pad

from flashmla_ops import PagedKVCache, backends, get_mla_metadata
from flashmla_ops.backends import values
from flashmla_ops.kv_cache import named_format, slots_of
from flashmla_ops.plan import TILE
from flashmla_ops.testing import BAD_PAGE, KV_SCALE, DecodeCase, check_decode, make_merge_case, uneven, with_gaps

ops = torch.ops.flashmla
PLAN = ("tile_scheduler_metadata", "num_splits")
SPARE = 1  # queries that are no row's, of calls with cu_seqlens_q
DIMS = {"triton": ((576, 512), (160, 128))}  # of d_qk, d_v: each is compiled anew


class Accepted(AssertionError):
    """A call that had to be refused was not."""


# ----------------------------------------------------------------------------------------------------------- drawing


def draw(seed: int, number: int, target: str) -> tuple[dict, list[tuple]]:
    """The settings and the steps of a sequence. No step depends on those before it: what cannot be done is refused."""
    rng = random.Random(f"{target} {seed} {number}")
    serves = TARGETS[target]
    page_size = rng.choice(serves.page_sizes)
    formats = ("fp8", "fp8_tensor") if serves.fp8 and rng.random() < 0.4 else ("plain",)
    settings = {
        "target": target,
        "dims": rng.choice(DIMS.get(target, serves.dims)),
        "dtype": str(rng.choice(serves.dtypes)).removeprefix("torch."),
        "kv_format": rng.choice(formats),
        "h_q": rng.choice([1, 2, 5, 16, 16, 20, 64, 128]),
        "page_size": page_size,
        "rows": rng.randint(1, 6),
        "max_pages": rng.randint(1, 6),
        "num_pages": rng.randint(1, 24),
        "max_new_tokens": rng.randint(1, 5),
        "debug": rng.random() < 0.3,
    }
    kinds = {"allocate": 3, "extend": 5, "free": 1, "plan": 2, "decode": 6, "merge": 1, "hostile": 5}
    if serves.device == "cuda":
        kinds |= {"capture": 1, "replay": 3}
    steps = [("allocate", draw_step(rng, "allocate", settings))]
    for kind in rng.choices(list(kinds), list(kinds.values()), k=rng.randint(6, 24)):
        steps.append((kind, draw_step(rng, kind, settings)))
    return settings, steps


def draw_step(rng: random.Random, kind: str, settings: dict) -> dict:
    seed, reach = rng.randrange(2**31), settings["max_pages"] * settings["page_size"]
    rows, most = settings["rows"], settings["max_new_tokens"]
    if kind == "allocate":
        edges = [0, 1, TILE, TILE + 1, settings["page_size"], reach, reach + 1, -1]
        return {"tokens": rng.choice(edges) if rng.random() < 0.4 else rng.randint(0, reach), "seed": seed}
    if kind == "extend":
        added = {row: rng.randint(1, most) for row in range(rows) if rng.random() < 0.7}
        if rng.random() < 0.1:
            added[rng.choice([-1, rows, 0])] = rng.choice([most + 1, -1, 1])
        return {"added": added, "seed": seed}
    if kind == "free":
        return {"row": rng.randint(0, rows if rng.random() < 0.1 else rows - 1)}
    if kind == "plan":
        return {"s_q": rng.randint(1, 3), "in_place": rng.random() < 0.5}
    if kind == "merge":
        return {"b": rng.randint(0, 3), "s_q": rng.randint(1, 3), "strided": rng.random() < 0.5, "seed": seed}
    if kind == "hostile":
        op = rng.choice(list(HOSTILE))
        return {"op": op, "wrong": rng.choice(HOSTILE[op]), "seed": seed}
    if kind == "replay":
        return {"seed": seed}
    return {
        "s_q": rng.choice([1, 1, 1, 2, 3]),
        "causal": rng.random() < 0.5,
        "softmax_scale": rng.choice([None, 0.03]),
        "peaked": rng.choice([1.0, 1.0, 15.0]),
        "strided": rng.random() < 0.3,
        "plan": rng.choice(["none", "own", "held", "invariant"]),
        "queries": [rng.randint(0, 3) for _ in range(rows)] if rng.random() < 0.3 else None,  # of each row, else s_q
        "seed": seed,
    }


# ------------------------------------------------------------------------------------------------------ hostile calls
# A change makes of a good argument a bad one, or None where it would not be bad.


def other_rank(t: Tensor) -> Tensor:
    return t[None]


def other_dtype(t: Tensor) -> Tensor:
    return t.double()


def other_device(t: Tensor) -> Tensor:
    return t.to("meta")


def gapped(t: Tensor) -> Tensor | None:
    return t.repeat_interleave(2, -1)[..., ::2] if t.numel() and t.shape[-1] > 1 else None


def odd_rows(t: Tensor) -> Tensor | None:
    return pad(t.view(torch.uint8) if t.itemsize == 1 else t, (0, 1))[..., :-1].view(t.dtype) if many(t) else None


def misaligned(t: Tensor) -> Tensor | None:
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t) if t.numel() else None


def raw(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def many(t: Tensor) -> bool:
    return t.numel() > 0 and any(size > 1 for size in t.shape[:-1])


def fewer(t: Tensor) -> Tensor | None:
    return t[:-1] if t.shape[0] else None


def narrower(t: Tensor) -> Tensor | None:
    return t[..., :-16] if t.shape[-1] > 16 else None


def missing(value) -> None:
    raise NotImplementedError  # not called: None is the bad value itself


CHANGES = {
    f.__name__: f for f in (other_rank, other_dtype, other_device, gapped, odd_rows, misaligned, fewer, narrower)
}
SIZES = ("other_rank", "other_dtype", "fewer")
WIDE = (*SIZES, "gapped", "odd_rows", "misaligned", "narrower")
HOSTILE: dict[str, list[tuple[str, str]]] = {  # op -> (argument, change)
    "get_mla_metadata": [
        *(("cache_seqlens", change) for change in ("other_rank", "other_dtype", "gapped", "negative")),
        *((name, "zero") for name in ("num_heads_per_head_k", "num_heads_k", "max_seqlen_q")),
        *(("cu_seqlens_q", change) for change in (*SIZES, "gapped", "missing", "decreasing", "too_many")),
    ],
    "get_mla_metadata_": [
        *((name, change) for name in PLAN for change in (*SIZES, "gapped", "other_device")),
        ("cache_seqlens", "negative"),
    ],
    "fwd_kvcache_mla": [
        *(("q", change) for change in WIDE),
        *(("kv_cache", change) for change in WIDE if change != "fewer"),
        *((name, change) for name in ("block_table", "cache_seqlens", *PLAN) for change in (*SIZES, "gapped")),
        *((name, "other_device") for name in ("kv_cache", "block_table", "cache_seqlens", *PLAN)),
        *((name, "missing") for name in (*PLAN, "kv_scale")),
        *(("kv_scale", change) for change in ("nan", "other_dtype")),
        *(("head_dim_v", change) for change in ("zero", "odd", "too_much")),
        *(("cache_seqlens", change) for change in ("negative", "too_long")),
        *(("block_table", change) for change in ("page_before", "page_beyond")),
        ("cache_seqlens", "stale_plan"),
        *(
            ("cu_seqlens_q", change)
            for change in (*SIZES, "gapped", "other_device", "missing", "decreasing", "too_many")
        ),
        *(("max_seqlen_q", change) for change in ("missing", "zero")),
    ],
    "concat_and_cache_mla": [
        *(("kv_cache", change) for change in WIDE if change != "fewer"),
        *((name, change) for name in ("kv_c", "k_pe") for change in (*WIDE, "other_device")),
        *(("slot_mapping", change) for change in (*SIZES, "gapped", "other_device")),
        *(("slot_mapping", change) for change in ("slot_before", "slot_beyond", "slot_twice")),
        *(("kv_scale", change) for change in ("missing", "nan", "other_dtype")),
    ],
    "merge_attn_states": [
        *((name, change) for name in ("out_a", "out_b") for change in WIDE if (name, change) != ("out_a", "fewer")),
        *((name, change) for name in ("lse_a", "lse_b") for change in (*SIZES, "gapped", "other_device")),
    ],
}
VALUES = (
    "negative",
    "too_long",
    "page_before",
    "page_beyond",
    "stale_plan",
    "decreasing",
    "too_many",
    "slot_before",
    "slot_beyond",
    "slot_twice",
)
REFUSAL = re.compile(r"\w+: expected .+, got .+", re.DOTALL)


# ----------------------------------------------------------------------------------------------------------- playing


class World:
    """The cache under test, and on the CPU what it must hold: its bytes, and each row's tokens as values."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.target = TARGETS[settings["target"]]
        self.device = self.target.device
        self.d_qk, self.d_v = settings["dims"]
        self.dtype = getattr(torch, settings["dtype"])
        plain = settings["kv_format"] == "plain"
        self.layout = named_format(self.dtype if plain else settings["kv_format"])
        self.kv_scale = torch.tensor(KV_SCALE) if self.layout.scaled else None
        self.given_scale = None if self.kv_scale is None else self.kv_scale.to(self.device)  # graphs read it there
        self.rows, self.page_size = settings["rows"], settings["page_size"]
        self.cache = PagedKVCache(
            1,
            settings["num_pages"],
            self.rows,
            settings["max_pages"],
            kv_cache_dtype=self.layout.name,
            kv_lora_rank=self.d_v,
            qk_rope_head_dim=self.d_qk - self.d_v,
            page_size=self.page_size,
            max_new_tokens=settings["max_new_tokens"],
            device=self.device,
        )
        self.kv_cache = self.cache.layers[0]
        self.kv_cache.view(torch.uint8).fill_(0xFF)  # NaN in every format
        self.bytes = torch.full(self.kv_cache.view(torch.uint8).shape, 0xFF, dtype=torch.uint8)
        self.tokens: dict[int, Tensor] = {}  # of each live row [length, d_qk]
        self.held: tuple[tuple[Tensor, Tensor], list[int]] | None = None  # the last plan, and the tiles it deals
        self.captured = None
        self.refused = 0

    # ------------------------------------------------------------------------------------------------------- helpers

    def lengths(self) -> list[int]:
        return [len(self.tokens.get(row, ())) for row in range(self.rows)]

    def tiles(self) -> list[int]:
        return [-(-length // TILE) for length in self.lengths()]

    def must_refuse(self, call, what: str) -> None:
        """Calls, and holds the error to our form and the whole world to what it was."""
        try:
            call()
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.AcceleratorError) or not str(error):
                raise
            self.refused += 1
            if not re.search(r"expected|needed|out of pages", str(error)):
                raise
        else:
            raise Accepted(what)
        self.check_state()

    def check_state(self) -> None:
        """Tables, pages and bytes are what was told to the cache, and nothing else."""
        lengths, cache = self.lengths(), self.cache
        assert cache.rows == sorted(self.tokens), (cache.rows, sorted(self.tokens))
        assert cache.cache_seqlens.tolist() == lengths
        dealt = [page for row in self.tokens for page in cache.pages_of(row)]
        assert len(set(dealt)) == len(dealt) == self.settings["num_pages"] - cache.num_free_pages
        for row in self.tokens:
            pages = cache.pages_of(row)
            assert len(pages) == -(-lengths[row] // self.page_size)
            assert cache.block_table[row, : len(pages)].tolist() == pages
        assert torch.equal(self.kv_cache.cpu().view(torch.uint8), self.bytes), "kv_cache: other bytes than appended"

    def append(self, slots: Tensor, owners: dict[int, list[int]], seed: int) -> None:
        """Appends drawn tokens to `slots`; owners: of each row, which of these tokens go to its end."""
        generator = torch.Generator().manual_seed(seed)
        n = slots.shape[0]
        kv_c = torch.randn(n, self.d_v, generator=generator).to(self.dtype)
        k_pe = torch.randn(n, self.d_qk - self.d_v, generator=generator).to(self.dtype)
        tokens = kv_c.to(self.device), k_pe.to(self.device)
        ops.concat_and_cache_mla(self.kv_cache, *tokens, slots, kv_scale=self.given_scale)
        stored = self.layout.quantize(kv_c, k_pe, self.kv_scale, True)
        read = self.layout.dequantize(stored, self.d_v, self.d_qk - self.d_v, self.kv_scale, self.dtype)
        for row, mine in owners.items():
            first = len(self.tokens[row])
            self.tokens[row] = torch.cat([self.tokens[row], read[mine]])
            pages = self.cache.pages_of(row)
            for position, token in enumerate(mine, first):
                page, offset = pages[position // self.page_size], position % self.page_size
                self.bytes[page, offset, 0] = stored[token].view(torch.uint8)
                assert int(slots[token]) == page * self.page_size + offset
        self.check_state()

    def queries(self, step: dict) -> Tensor:
        generator = torch.Generator().manual_seed(step["seed"])
        shape = self.rows, step["s_q"], self.settings["h_q"], self.d_qk
        q = (torch.randn(shape, generator=generator) * step["peaked"]).to(self.dtype)
        return with_gaps(q) if step["strided"] else q

    def scale_of(self, step: dict) -> float:
        return step["softmax_scale"] or self.d_qk**-0.5

    def table(self) -> Tensor:
        """The block table, with garbage where it must not be read."""
        column = torch.arange(self.settings["max_pages"]) * self.page_size
        beyond = column >= torch.tensor(self.lengths())[:, None]
        return self.cache.block_table.masked_fill(beyond.to(self.device), BAD_PAGE)

    def check(self, q: Tensor, step: dict, out: Tensor, lse: Tensor) -> None:
        """Against float64 over this world's own copies of the tokens, one page a row."""
        case = self.case(q, step)
        if step.get("queries"):
            case = uneven(case, step["queries"], SPARE)
        score_std = step["peaked"] * self.d_qk**0.5 * self.scale_of(step)
        check_decode(case.to(self.device), out, lse, self.target.factor, score_std=score_std)

    def case(self, q: Tensor, step: dict) -> DecodeCase:
        lengths = self.lengths()
        keys = torch.zeros(self.rows, max(*lengths, 1), 1, self.d_qk, dtype=self.dtype)
        for row, tokens in self.tokens.items():
            keys[row, : len(tokens), 0] = tokens
        table = torch.arange(self.rows, dtype=torch.int32)[:, None]
        seqlens = torch.tensor(lengths, dtype=torch.int32)
        return DecodeCase(q.cpu(), keys, table, seqlens, self.d_v, self.scale_of(step), step["causal"])

    def packed(self, q: Tensor, step: dict) -> tuple[Tensor, dict]:
        """Of queries [rows, s_q, ..] the last ones of each row, as cu_seqlens_q has them, and the options for that."""
        if not step.get("queries"):
            return q, {}
        case = uneven(self.case(q, step), step["queries"], SPARE).to(self.device)
        return case.q, case.plan_options

    def plan(self, s_q: int, **options) -> tuple[Tensor, Tensor]:
        heads = self.settings["h_q"] * (1 if "cu_seqlens_q" in options else s_q)
        return get_mla_metadata(self.cache.cache_seqlens, heads, 1, **options)

    # --------------------------------------------------------------------------------------------------------- steps

    def allocate(self, step: dict) -> None:
        tokens = step["tokens"]
        free_rows = [row for row in range(self.rows) if row not in self.tokens]
        fits = 0 <= tokens <= self.settings["max_pages"] * self.page_size
        if not free_rows or not fits or -(-tokens // self.page_size) > self.cache.num_free_pages:
            return self.must_refuse(lambda: self.cache.allocate(tokens), f"allocate({tokens})")
        row = self.cache.allocate(tokens)
        assert row == free_rows[0]
        self.tokens[row] = torch.zeros(0, self.d_qk, dtype=self.dtype)
        positions = torch.arange(tokens, device=self.device)[None]
        slots = slots_of(self.cache.block_table[row : row + 1], positions, self.page_size).flatten()
        self.append(slots, {row: list(range(tokens))}, step["seed"])

    def extend(self, step: dict) -> None:
        added, lengths = step["added"], self.lengths()
        most, reach = self.settings["max_new_tokens"], self.settings["max_pages"] * self.page_size
        good = all(row in self.tokens and 0 <= n <= most and lengths[row] + n <= reach for row, n in added.items())
        pages = [-(-(lengths[row] + n) // self.page_size) for row, n in added.items()] if good else []
        needed = sum(pages) - sum(-(-lengths[row] // self.page_size) for row in added) if good else 0
        if not good or needed > self.cache.num_free_pages:
            return self.must_refuse(lambda: self.cache.extend(added), f"extend({added})")
        self.cache.extend(added)
        owners = {row: [row * most + most - n + i for i in range(n)] for row, n in added.items()}
        assert (self.cache.slot_mapping >= 0).sum() == sum(added.values())
        self.append(self.cache.slot_mapping, owners, step["seed"])

    def free(self, step: dict) -> None:
        row = step["row"]
        if row not in self.tokens:
            return self.must_refuse(lambda: self.cache.free(row), f"free({row})")
        pages = self.cache.pages_of(row)
        self.cache.free(row)
        del self.tokens[row]
        if pages:  # what is of no row must not be read
            self.kv_cache.view(torch.uint8)[pages] = 0xFF
            self.bytes[pages] = 0xFF
        self.check_state()

    def plan_step(self, step: dict) -> None:
        plan = self.plan(step["s_q"])
        if self.held is not None and step["in_place"]:
            in_place = dict(zip(PLAN, self.held[0], strict=True))
            ops.get_mla_metadata_(self.cache.cache_seqlens, step["s_q"] * self.settings["h_q"], 1, **in_place)
            assert all(map(torch.equal, in_place.values(), plan)), "get_mla_metadata_: another plan"
            plan = self.held[0]
        self.held = plan, self.tiles(), step["s_q"] * self.settings["h_q"]

    def decode(self, step: dict) -> None:
        if step["queries"]:
            step = step | {"s_q": 3}
        whole = self.queries(step)
        q, options = self.packed(whole, step)
        q = with_gaps(q.to(self.device)) if step["strided"] else q.to(self.device)
        plan, stale = None, False
        if step["plan"] == "invariant":
            try:
                plan = self.plan(step["s_q"], batch_invariant=True, **options)
            except NotImplementedError:
                self.refused += 1
        elif step["plan"] == "own" or (options and step["plan"] == "held"):
            plan = self.plan(step["s_q"], **options)
        elif step["plan"] == "held" and self.held is not None:
            plan, tiles, heads = self.held
            stale = tiles != self.tiles()
            other_heads = heads != step["s_q"] * self.settings["h_q"]
            if values.DEBUG and self.device == "cuda" and other_heads and not stale:
                return None  # refused or not, as the machine would use more parts for one than for the other
        call = self.decode_call(q, step, plan) | options
        checked = values.DEBUG or self.device == "cpu"
        try:
            out, lse = ops.fwd_kvcache_mla(**call)
        except RuntimeError as error:
            not_served = step["plan"] == "invariant" and "batch_invariant" in str(error)  # an fp8 cache, by sm90
            if not not_served and not (stale and checked and str(error).startswith(PLAN)):
                raise
            self.refused += 1
        else:
            if not stale or checked:  # it may deal the new lengths right: those of rows that it does not cut are free
                self.check(whole, step, out, lse)
        return self.check_state()

    def decode_call(self, q: Tensor, step: dict, plan: tuple[Tensor, Tensor] | None) -> dict:
        return {
            "q": q,
            "kv_cache": self.kv_cache,
            "block_table": self.table(),
            "cache_seqlens": self.cache.cache_seqlens,
            "head_dim_v": self.d_v,
            "softmax_scale": self.scale_of(step),
            "causal": step["causal"],
            "kv_scale": self.given_scale,
        } | dict(zip(PLAN, plan or (None, None), strict=True))

    def merge(self, step: dict) -> None:
        sizes = {"b": step["b"], "s_q": step["s_q"], "h_q": self.settings["h_q"], "d_v": self.d_v}
        other = {"dtype": self.dtype, "device": self.device, "strided": step["strided"], "seed": step["seed"]}
        check_merge(make_merge_case(**sizes, **other))

    def capture(self, step: dict) -> None:
        """A graph of a plan, of either kind, and the call that uses it."""
        step = step | {"strided": False} | ({"s_q": 3} if step["queries"] else {})
        q, options = self.packed(self.queries(step), step)
        q = q.to(self.device)
        call = self.decode_call(q, step, None) | {"block_table": self.cache.block_table} | options
        invariant = step["plan"] == "invariant"

        def planned() -> tuple[Tensor, Tensor]:
            plan = self.plan(step["s_q"], batch_invariant=invariant, **options)
            return ops.fwd_kvcache_mla(**call | dict(zip(PLAN, plan, strict=True)))

        try:
            planned()  # loads the kernels
        except NotImplementedError:
            if not invariant:
                raise
            self.refused += 1
            return
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = planned()
        except RuntimeError as error:
            if not (values.DEBUG and "while a graph is captured" in str(error)):
                raise
            self.refused += 1
            return
        if values.DEBUG:
            raise Accepted("a capture under FLASHMLA_DEBUG=1")
        self.captured = graph, q, step, results, options  # all that the graph reads stays alive

    def replay(self, step: dict) -> None:
        if self.captured is None:
            return
        graph, q, captured, (out, lse), _ = self.captured
        whole = self.queries(captured | {"seed": step["seed"]})
        q.copy_(self.packed(whole, captured)[0])
        out.fill_(float("nan"))
        graph.replay()
        self.check(whole, captured, out, lse)
        self.check_state()

    # --------------------------------------------------------------------------------------------------- hostile calls

    def good_calls(self, op: str, seed: int) -> dict:
        """A call that would be good, and of concat_and_cache_mla one that would write nothing."""
        step = {
            "s_q": 1 + seed % 2,
            "peaked": 1.0,
            "strided": False,
            "softmax_scale": None,
            "causal": True,
            "queries": [(seed + row) % (2 + seed % 2) for row in range(self.rows)] if seed % 3 == 0 else None,
            "seed": seed,
        }
        heads = self.settings["h_q"] * (1 if step["queries"] else step["s_q"])
        if op == "merge_attn_states":
            sizes = {"b": 2, "s_q": step["s_q"], "h_q": self.settings["h_q"], "d_v": self.d_v, "poison": False}
            return make_merge_case(**sizes, dtype=self.dtype, device=self.device, seed=seed).kwargs()
        if op == "concat_and_cache_mla":
            n = 1 + seed % 5
            k = torch.randn(n, self.d_qk, generator=torch.Generator().manual_seed(seed)).to(self.dtype).to(self.device)
            slots = torch.full((n,), -1, device=self.device)
            kv_c, k_pe = k[:, : self.d_v].contiguous(), k[:, self.d_v :].contiguous()
            call = {"kv_cache": self.kv_cache, "kv_c": kv_c, "k_pe": k_pe, "slot_mapping": slots}
            return call | {"kv_scale": self.given_scale}
        lengths = self.cache.cache_seqlens.clone()
        if op == "fwd_kvcache_mla":
            q, options = self.packed(self.queries(step), step)
            call = self.decode_call(q.to(self.device), step, self.plan(step["s_q"], **options))
            return call | {"cache_seqlens": lengths} | options
        _, options = self.packed(self.queries(step), step)
        call = {"cache_seqlens": lengths, "num_heads_per_head_k": heads, "num_heads_k": 1} | options
        in_place = dict(zip(PLAN, self.plan(step["s_q"], **options), strict=True)) if op == "get_mla_metadata_" else {}
        return call | in_place

    def changed(self, call: dict, name: str, change: str, seed: int) -> dict | None:
        """The call with one bad argument; None where the change makes nothing bad."""
        value, row = call.get(name), seed % self.rows
        if (name == "q" and change == "fewer" and "cu_seqlens_q" in call) or (
            name in ("cu_seqlens_q", "max_seqlen_q") and value is None
        ):
            return None  # not bad where nobody's queries are; not there
        if change in CHANGES:
            bad = None if value is None else CHANGES[change](value)
            return None if bad is None else call | {name: bad}
        if change == "missing":
            return None if value is None else call | {name: None}
        if change == "nan":
            return call | {name: torch.full_like(value, float("nan"))} if value is not None and values.DEBUG else None
        if change in ("zero", "odd", "too_much"):
            return call | {name: {"zero": 0, "odd": self.d_v - 8, "too_much": self.d_qk + 16}[change]}
        if change in ("negative", "too_long", "stale_plan"):
            lengths, reach = value.clone(), self.settings["max_pages"] * self.page_size
            used = (-(-int(value[row]) // TILE)) * TILE
            wrong = {"negative": -1 - seed % 1000, "too_long": reach + 1 + seed % 1000, "stale_plan": used - TILE}[
                change
            ]
            if change == "stale_plan" and wrong < 0:
                return None
            lengths[row] = wrong
            return call | {name: lengths}
        if change in ("decreasing", "too_many"):
            cu_seqlens_q = value.clone()
            cu_seqlens_q[row + 1] = (
                -1 if change == "decreasing" else int(value[row]) + call["max_seqlen_q"] + 1 + seed % 9
            )
            return call | {name: cu_seqlens_q}
        if change in ("page_before", "page_beyond"):
            if int(call["cache_seqlens"][row]) == 0:
                return None
            table = value.clone()
            table[row, 0] = {"page_before": -1 - seed % 9, "page_beyond": self.settings["num_pages"] + seed % 9}[change]
            return call | {name: table}
        slots, num_slots = value.clone(), self.settings["num_pages"] * self.page_size
        if change == "slot_twice":
            if len(slots) < 2 or (self.device == "cuda" and not values.DEBUG):
                return None  # either token may lie there then
            slots[:2] = seed % num_slots
        else:
            slots[0] = {"slot_before": -2 - seed, "slot_beyond": num_slots + seed}[change]
        return call | {name: slots}

    def hostile(self, step: dict) -> None:
        op, (name, change), seed = step["op"], step["wrong"], step["seed"]
        call = self.changed(self.good_calls(op, seed), name, change, seed)
        if call is None:
            return
        tensors = {name: t for name, t in call.items() if isinstance(t, Tensor) and t.device.type != "meta"}
        before = {name: t.clone() for name, t in tensors.items()}
        must = change != "stale_plan" and (change not in VALUES or self.device == "cpu" or values.DEBUG)
        try:
            getattr(ops, op)(**call)
        except (RuntimeError, NotImplementedError) as error:
            may = must or change == "stale_plan"
            if isinstance(error, torch.AcceleratorError) or not (may and REFUSAL.match(str(error))):
                raise
            self.refused += 1
        else:
            if must:
                raise Accepted(f"{op} with {name} {change}")
        if must or op != "get_mla_metadata_":
            for name, t in tensors.items():
                assert torch.equal(raw(t), raw(before[name])), f"{op} wrote {name}"
        self.check_state()


def play(settings: dict, steps: list[tuple[str, dict]]) -> int:
    """Plays a sequence; returns how many of its calls were refused, as they had to be."""
    debug, values.DEBUG = values.DEBUG, settings["debug"]
    backends.use_backend(settings["target"])
    try:
        world = World(settings)
        for number, (kind, step) in enumerate(steps):
            try:
                getattr(world, "plan_step" if kind == "plan" else kind)(step)
            except Exception as error:
                error.step = number
                raise
        return world.refused
    finally:
        values.DEBUG = debug
        backends.use_backend(None)


# ---------------------------------------------------------------------------------------------------------- failures


def failure(settings: dict, steps: list[tuple]) -> tuple[Exception, int] | None:
    """What goes wrong, and the number of steps up to there."""
    try:
        play(settings, steps)
    except Exception as error:
        return error, getattr(error, "step", len(steps) - 1) + 1
    return None


def shortened(settings: dict, steps: list[tuple], seconds: float = 30) -> list[tuple]:
    """Fewer steps that fail with the same kind of error."""
    kind, length = failure(settings, steps) or (None, len(steps))
    steps, deadline, size = steps[:length], time.monotonic() + seconds, length // 2
    while size > 0 and time.monotonic() < deadline:
        at = 0
        while at < len(steps) - 1 and time.monotonic() < deadline:
            fewer_steps = steps[:at] + steps[min(at + size, len(steps) - 1) :]
            found = failure(settings, fewer_steps)
            if found and type(found[0]) is type(kind):
                steps = fewer_steps[: found[1]]
            else:
                at += size
        size //= 2
    return steps


def reproducer(settings: dict, steps: list[tuple]) -> str:
    return (
        "from fuzz import play  # PYTHONPATH=.:tests\n\n"
        f"settings = {pformat(settings, width=110, sort_dicts=False)}\n"
        f"play(settings, {pformat(steps, width=110, sort_dicts=False)})"
    )


def worker() -> None:
    """Reads `target seed number` by lines; answers each with a line of JSON."""
    for line in sys.stdin:
        target, seed, number = line.split()
        settings, steps = draw(int(seed), int(number), target)
        answer = {"steps": len(steps)}
        try:
            answer["refused"] = play(settings, steps)
        except Exception as error:
            fatal = isinstance(error, torch.AcceleratorError)  # the device is of no use any more
            short = steps if fatal else shortened(settings, steps)
            answer["error"] = f"{type(error).__name__}: {error}"
            answer["reproducer"] = reproducer(settings, short)
            again = None if fatal else failure(settings, short)
            if again is None and not fatal:
                answer["error"] += " (not when played again)"
            elif again is not None and str(again[0]) != str(error):
                answer["reproducer"] += f"\n# which fails with {type(again[0]).__name__}: {again[0]}"
            answer["fatal"] = fatal
        print(json.dumps(answer), flush=True)
        if answer.get("fatal"):
            return


# -------------------------------------------------------------------------------------------------------- supervision


class Worker:
    """A process that plays sequences, and is replaced when it dies or hangs."""

    command = (sys.executable, __file__, "--worker")
    start_seconds = 60  # it imports torch first

    def __init__(self, target: str, seed: int, timeout: float, jobs: int):
        self.target, self.seed, self.timeout, self.process = target, seed, timeout, None
        self.threads = max(1, (os.cpu_count() or 1) // jobs)

    def play(self, number: int) -> dict:
        if self.process is None:
            threads = {"OMP_NUM_THREADS": str(self.threads)}  # more than cores would wait for each other
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen(self.command, **pipes, env=os.environ | threads)
            self.timeout_now = self.timeout + self.start_seconds
        hung = threading.Event()
        timer = threading.Timer(self.timeout_now, lambda: (hung.set(), self.process.kill()))
        timer.start()
        self.timeout_now = self.timeout
        try:
            self.process.stdin.write(f"{self.target} {self.seed} {number}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        timer.cancel()
        if line:
            answer = json.loads(line)
            if answer.get("fatal"):
                self.stop()
            return answer
        code = self.process.wait()
        self.process = None
        settings, steps = draw(self.seed, number, self.target)
        error = f"hang: longer than {self.timeout:g} s" if hung.is_set() else f"crash: exit status {code}"
        return {"steps": len(steps), "error": error, "reproducer": reproducer(settings, steps)}

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def run(arguments: argparse.Namespace) -> dict:
    """Plays the sequences that the state lacks; returns the state."""
    target, seed = arguments.target, arguments.seed
    state = {"target": target, "seed": seed, "seconds": 0.0, "steps": 0, "refused": 0, "done": [], "failures": []}
    file = Path(arguments.state) if arguments.state else None
    if file and file.exists():
        state = json.loads(file.read_text())
        if (state["target"], state["seed"]) != (target, seed):
            raise SystemExit(
                f"{file}: expected target {target} and seed {seed}, got {state['target']}, {state['seed']}"
            )
    wanted = [arguments.only] if arguments.only is not None else range(arguments.sequences)
    done = set() if arguments.only is not None else set(state["done"])
    left, lock, start = iter([number for number in wanted if number not in done]), threading.Lock(), time.monotonic()
    deadline, saved, before = start + 60 * arguments.minutes, start, state["seconds"]

    def supervise() -> None:
        nonlocal saved
        player = Worker(target, seed, arguments.timeout, arguments.jobs)
        while time.monotonic() < deadline:
            with lock:
                number = next(left, None)
            if number is None:
                break
            answer = player.play(number)
            with lock:
                state["done"].append(number)
                state["steps"] += answer["steps"]
                state["refused"] += answer.get("refused", 0)
                state["seconds"] = before + time.monotonic() - start
                if "error" in answer:
                    found = {"number": number, "error": answer["error"], "reproducer": answer["reproducer"]}
                    state["failures"].append(found)
                    print(
                        f"# sequence {number} of seed {seed}: {answer['error']}\n{answer['reproducer']}\n", flush=True
                    )
                if file and time.monotonic() > saved + 5:
                    file.write_text(json.dumps(state))
                    saved = time.monotonic()
        player.stop()

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for future in [pool.submit(supervise) for _ in range(arguments.jobs)]:
            future.result()
    if file:
        file.write_text(json.dumps(state))
    print(
        f"{target}, seed {seed}: {len(state['done'])} sequences of {state['steps']} steps, "
        f"{state['refused']} calls refused as they must be, {len(state['failures'])} failures, {state['seconds']:.0f} s"
    )
    return state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", choices=list(TARGETS), default="cpu")
    parser.add_argument("--sequences", type=int, default=100, help="how many in all, those of the state included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one sequence, by its number")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes at once")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no sequence after so long")
    parser.add_argument("--timeout", type=float, default=60, help="seconds after which a sequence counts as a hang")
    parser.add_argument("--state", help="a JSON file that says what is done, to go on later")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return 0
    return 1 if run(arguments)["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
