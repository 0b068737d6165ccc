"""Runs every kernel of the library under compute-sanitizer: `python tests/sanitize.py`, on a machine with a GPU.

    python tests/sanitize.py --tool memcheck --tool racecheck --json report.json
    python tests/sanitize.py --cases quick --device cpu      the cases alone, without a tool; here on the CPU backend
    python tests/sanitize.py --tool memcheck --backend triton

First come planted faults (faults.cu): each tool must find its own, and nothing in the same program without them. Then
each tool watches this script's cases: small calls of every op in every dtype, shape and way of splitting that its
kernels know, on poisoned and wrong values too. Results are compared on the CPU, because a tool slows every kernel that
torch would compare with. The exit status is 0 if every fault was found and the cases are right and clean.

racecheck takes some correct hand-overs between groups of threads for races. Its reports of the decode kernel's are
accepted, and counted in the verdict, only where it also reports one of a minimal correct kernel (`faults handover`).
"""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from strategies import TARGETS, invariant_refusal
from torch import Tensor
from torch.nn.functional import pad

from flashmla_ops import (
    backends,
    concat_and_cache_mla,
    fwd_kvcache_mla,
    get_mla_metadata,
    get_mla_metadata_,
    merge_attn_states,
)
from flashmla_ops.kv_cache import BYTE_DTYPES, FORMATS, CacheFormat
from flashmla_ops.plan import (
    CPU_PARTS,
    WORKSPACE_TILES,
    make_invariant_plan,
    make_plan,
    max_parts,
    plan_blocks,
    row_blocks,
    row_tiles,
)
from flashmla_ops.testing import (
    BAD_PAGE,
    FP32_EPS,
    DecodeCase,
    attention,
    make_append_case,
    make_decode_case,
    make_merge_case,
    quantized,
    relative_error,
    uneven,
)

FAULTS = {"memcheck": "overrun", "racecheck": "race", "synccheck": "divergent", "initcheck": "unwritten"}
QUICK = ("racecheck", "initcheck")  # the slow tools: they watch the quick cases only
LIMIT_S = 300  # of one run under a tool: initcheck watches every kernel of torch too
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)(?:.*?\((\d+) errors?, (\d+) warn)?")
RIGHT = re.compile(r"^(\d+) cases right$", re.MULTILINE)
PLANTED = Path(__file__).resolve().with_name("faults.cu")
DECODE = PLANTED.parents[1] / "csrc/sm90/fwd_kvcache_mla.cu"
DECODE_FP8 = DECODE.with_name("fwd_kvcache_mla_fp8.cu")
DECODE_FP8_FEW_ROWS = DECODE.with_name("fwd_kvcache_mla_fp8_few_rows.cu")
DECODE_FP8_QUERIES = DECODE.with_name("fwd_kvcache_mla_fp8_queries.cu")


class Handover(NamedTuple):
    """Two functions of a source, each NAME, or FILE:NAME of a file beside it."""

    source: Path
    leave: str  # leaves values for another group of threads
    take: str  # takes them
    # the minimal kernels' function that leaves values in the same way: reports are accepted only if its are made too
    alike: str = ""


PLANTED_HANDOVERS = [
    Handover(PLANTED, "leave_value", "take_value"),
    Handover(PLANTED, "leave_chunk", "take_chunk"),
    Handover(PLANTED, "copy_chunk", "take_chunk"),
]
HANDOVERS = [
    Handover(DECODE, "leave_base", "take_base", alike="leave_value"),
    Handover(DECODE, "leave_probabilities", "take_sum", alike="leave_value"),
    Handover(DECODE_FP8, "leave_probabilities", "take_base_and_sum", alike="leave_value"),
    Handover(DECODE_FP8_QUERIES, "leave_probabilities", "take_base_and_sum", alike="leave_value"),
    Handover(DECODE_FP8, "e4m3.cuh:leave_unit", "e4m3.cuh:take_unit", alike="leave_chunk"),
    Handover(DECODE_FP8_FEW_ROWS, "e4m3.cuh:leave_unit", "e4m3.cuh:take_unit", alike="leave_chunk"),
    Handover(DECODE_FP8_FEW_ROWS, "store_query_chunk", "take_query_chunk", alike="leave_chunk"),
    Handover(DECODE_FP8_FEW_ROWS, "e4m3_tile.cuh:zero_tokens", "take_bytes", alike="leave_chunk"),
    Handover(DECODE_FP8_FEW_ROWS, "ptx.cuh:copy_bulk", "take_bytes", alike="copy_chunk"),
]
PATH = f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ.get('PATH', '')}"


# -------------------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    name: str
    quick: bool  # whether the slow tools watch it too
    run: Callable[[str], None]  # runs it on the device of this name and raises if its result is wrong


def moved(t: Tensor, device: str) -> Tensor:
    """t on the device with its strides and all that lies between its elements; torch's own `to` closes gaps."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def moved_kwargs(case, device: str) -> dict:
    return {name: moved(v, device) if isinstance(v, Tensor) else v for name, v in case.kwargs().items()}


def cases_of(backend: str, which: str, device: str) -> list[Case]:
    """Of triton the quick ones, since it compiles for every kind of call, and dimensions that it alone serves."""
    cases = all_cases(device, backend)
    if backend == "triton":
        return [case for case in cases if case.quick and case.run is not run_paged_stream] + triton_cases()
    return [case for case in cases if which == "all" or case.quick]


def triton_cases() -> list[Case]:
    calls = ((320, 256, 16), (288, 256, 64), (160, 128, 48), (64, 48, 32), (576, 288, 16))
    shape = {"lengths": LENGTHS, "h_q": 20, "s_q": 2, "causal": True, "strided": True}
    cases = [shape | {"d_qk": d_qk, "d_v": d_v, "page_size": page_size} for d_qk, d_v, page_size in calls]
    return [decode_case(case, plan, True) for case in cases for plan in ("none", 7)]


def all_cases(device: str, backend: str) -> Iterator[Case]:
    yield from metadata_cases()
    yield from append_cases(device)
    yield from merge_cases()
    yield from decode_cases()
    if device == "cpu" or invariant_refusal(TARGETS[backend], uneven=True) is None:
        yield from uneven_invariant_cases()
    if device == "cuda":
        yield from wrong_value_cases()
        yield Case("paged_stream", True, run_paged_stream)


# get_mla_metadata: its kernels, for even and uneven queries, have two sizes, for few and for many rows


def metadata_cases() -> Iterator[Case]:
    calls = [(b, "even", b in (5, 700)) for b in (1, 5, 700, 3000)]
    calls += [(5, "uneven", True), (700, "uneven", False), (5, "invariant", False)]
    for b, kind, quick in calls:
        yield Case(
            f"get_mla_metadata {kind} b={b}", quick, lambda device, b=b, kind=kind: run_metadata(b, kind, device)
        )


def run_metadata(b: int, kind: str, device: str) -> None:
    heads, most = (16, 1), 9  # one row tile; queries of a row, at most
    lengths = (torch.arange(b, dtype=torch.int32) * 977) % 1500
    parts = CPU_PARTS
    if device == "cuda":
        parts = max_parts(torch.cuda.get_device_properties(0).multi_processor_count, row_tiles(*heads))
    options, invariant, blocks = {}, "invariant" in kind, None
    if "uneven" in kind:
        cu_seqlens_q = pad((torch.arange(b) * 7 % (most + 1)).cumsum(0), (1, 0)).int()
        options = {"cu_seqlens_q": moved(cu_seqlens_q, device), "max_seqlen_q": most}
        blocks = row_blocks(cu_seqlens_q, most, heads[0], invariant)
    if invariant:
        options |= {"batch_invariant": True}
        expected = make_invariant_plan(lengths, parts, WORKSPACE_TILES, heads[0], blocks)
    elif blocks is not None:
        expected = plan_blocks(make_plan, lengths, blocks, parts)
    else:
        expected = make_plan(lengths, parts)
    cache_seqlens = moved(lengths, device)
    planned = get_mla_metadata(cache_seqlens, *heads, **options)
    in_place = [moved(torch.full_like(t, -7), device) for t in expected]
    get_mla_metadata_(cache_seqlens, *heads, **options, tile_scheduler_metadata=in_place[0], num_splits=in_place[1])
    for actual in (planned, in_place):
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True)), "another plan"


# concat_and_cache_mla


def append_cases(device: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        formats = [f for f in FORMATS if f.dtypes in ((dtype,), BYTE_DTYPES)]
        for layout, (n, strided) in itertools.product(formats, ((1, False), (70, False), (70, True))):
            yield append_case(layout, {"dtype": dtype, "num_tokens": n, "strided": strided}, device)
    # fp8's kernels where a token has more than a warp's units, and fewer than a block of 128
    for layout, (d_v, d_rope) in itertools.product(FORMATS[-2:], ((640, 80), (48, 16))):
        yield append_case(layout, {"num_tokens": 20, "d_v": d_v, "d_rope": d_rope, "page_size": 48}, device)


def append_case(layout: CacheFormat, call: dict, device: str) -> Case:
    """A call of make_append_case's arguments, for a cache of this format."""
    n, strided = call["num_tokens"], call.get("strided", False)
    bad = [2**62, 10_000, -(2**62)] if device == "cuda" and n > 20 else []  # the CPU refuses these

    def run(device: str) -> None:
        case = make_append_case(**call, skip=0.2)
        wrong = case.slot_mapping.clone()
        for i, slot in enumerate(bad):
            wrong[10 * i], case.slot_mapping[10 * i] = slot, -1
        options = {"kv_scale": torch.tensor(0.05)} if layout.scaled else {}
        if layout.dtypes == BYTE_DTYPES:
            num_pages, page_size, _, _ = case.kv_cache.shape
            last_dim = layout.last_dim(case.kv_c.shape[1], case.k_pe.shape[1])
            cache = torch.full((num_pages, page_size + strided, 1, last_dim + 16 * strided), 7, dtype=torch.uint8)
            case = replace(case, kv_cache=cache[:, int(strided) :, :, :last_dim])
        for round_scale in (True, False) if layout.name == "fp8" else (True,):
            there = moved_kwargs(replace(case, slot_mapping=wrong), device)
            scale = {name: moved(t, device) for name, t in options.items()}
            concat_and_cache_mla(**there, **scale, round_scale=round_scale)
            concat_and_cache_mla(**case.kwargs(), **options, round_scale=round_scale)
            assert torch.equal(there["kv_cache"].cpu(), case.kv_cache), "another cache"

    shown = " ".join(f"{name}={value}" for name, value in call.items())
    return Case(f"concat_and_cache_mla {layout.name} {shown}", n > 1, run)


# merge_attn_states


def merge_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for strided in (False, True):

            def run(device: str, dtype=dtype, strided=strided) -> None:
                case = make_merge_case(3, 2, 5, dtype=dtype, strided=strided)
                merged = merge_attn_states(**moved_kwargs(case, device))
                for actual, expected in zip(merged, merge_attn_states(**case.kwargs()), strict=True):
                    torch.testing.assert_close(actual.cpu(), expected)

            yield Case(f"merge_attn_states {dtype}" + " strided" * strided, not strided, run)


# fwd_kvcache_mla

LENGTHS = (0, 1, 63, 64, 65, 300, 1000)
FEW_LENGTHS = (0, 1, 65, 300)
E4M3_QUERIES = "fp8_tensor q e4m3"  # a cache format, and queries in e4m3
E4M3_ERROR = 4e-3  # of a score that is a sum of e4m3 products, as the tensor cores add them up


def decode_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16):
        for h_q in (1, 8, 16, 20, 32, 64, 128):
            for s_q, causal in ((1, False), (1, True), (2, False), (2, True)):
                quick = (s_q, causal) in ((1, False), (2, True)) and h_q in (1, 16, 64, 128)
                for plan in ("none", "own"):
                    lengths = FEW_LENGTHS if quick and plan == "none" else LENGTHS
                    call = {"lengths": lengths, "h_q": h_q, "s_q": s_q, "causal": causal, "dtype": dtype}
                    yield decode_case(call, plan, quick and plan == "none")
        for parts in (1, 5, 132, 256):
            for h_q, s_q in ((16, 1), (128, 2)):
                call = {"lengths": LENGTHS, "h_q": h_q, "s_q": s_q, "causal": s_q == 2, "dtype": dtype}
                yield decode_case(call, parts, h_q == 16 and parts in (5, 132))
        others = (
            {"strided": True},
            {"page_size": 128},
            {"h_k": 2, "h_q": 32},
            {"h_k": 2, "h_q": 256, "s_q": 2},
            {"peaked": "first"},
            {"peaked": "middle"},
            {"peaked": "last"},
            {"lengths": (0, 0)},
        )
        # rows of two shares, which the decode kernel merges itself: more rows than the 16 parts of a Hopper
        pairs = {"lengths": (130, 70, 0, 200, 64, 257) * 3, "h_k": 2, "h_q": 256, "s_q": 2, "causal": True}
        for plan in ("own", 7):
            yield decode_case(pairs | {"dtype": dtype}, plan, plan == "own")
        # the combine kernel's instances on a Hopper, which go by batch and query rows
        for b, h_q in ((5, 16), (9, 16), (20, 16), (40, 16), (2, 40), (7, 64), (16, 40), (20, 64)):
            yield decode_case({"lengths": (300,) * b, "h_q": h_q, "dtype": dtype}, "own", True)
        # batch-invariant: rows of several units, in several parts; row tiles of 16, 32 and 64 rows, whose nodes are
        # merged by 16 warps or, of more of them, by one
        for h_q, s_q, b in ((16, 1, 4), (16, 1, 12), (8, 3, 4), (16, 3, 4), (20, 1, 2), (40, 1, 2), (128, 2, 4)):
            lengths = ((3000, 300, 0, 65) * 3)[:b]
            call = {"lengths": lengths, "h_q": h_q, "s_q": s_q, "causal": True, "dtype": dtype}
            yield decode_case(call, "invariant", (h_q, s_q) != (16, 3))
        for other in others:
            call = {"lengths": LENGTHS, "h_q": 20, "causal": True, "dtype": dtype} | other
            yield decode_case(call, "own", other == {"page_size": 128} or "strided" in other)
        for kv_format in (f.name for f in FORMATS if f.dtypes == BYTE_DTYPES):
            for h_q, s_q, h_k in ((16, 1, 1), (128, 2, 1), (40, 3, 2)):
                call = {"lengths": LENGTHS, "h_q": h_q, "s_q": s_q, "h_k": h_k, "causal": s_q > 1, "dtype": dtype}
                yield decode_case(call, "own", h_q == 128, kv_format)
                yield decode_case(call, 7, h_q == 16, kv_format)
        yield from uneven_cases(dtype)
    for h_q, s_q in ((16, 1), (128, 2)):
        call = {"lengths": LENGTHS, "h_q": h_q, "s_q": s_q, "causal": True}
        yield decode_case(call, "own", h_q == 128, E4M3_QUERIES)
    for h_q, s_q in ((4, 4), (128, 2)):
        yield uneven_case(4, {"h_q": h_q, "s_q": s_q}, "own", False, E4M3_QUERIES)


def uneven_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Of up to 16 query rows, and of two blocks of 64, each cache format; and the combine kernel's instances on a
    Hopper, which go by batch and query rows."""
    for h_q, s_q, batches in ((4, 4, (5, 9, 40)), (20, 5, (2, 7, 16))):
        for b, kv_format in zip(batches, (None, "fp8", "fp8_tensor"), strict=True):
            quick = kv_format is None and dtype is torch.bfloat16
            yield uneven_case(b, {"h_q": h_q, "s_q": s_q, "dtype": dtype}, "none" if quick else "own", quick, kv_format)


def uneven_invariant_cases() -> Iterator[Case]:
    """Blocks of 32 and of 128 query rows, of row tiles of 16, 32 and 64; in several parts, and some of one row tile."""
    for b in (5, 700):
        name = f"get_mla_metadata uneven invariant b={b}"
        yield Case(name, b == 5, lambda device, b=b: run_metadata(b, "uneven invariant", device))
    for dtype in (torch.bfloat16, torch.float16):
        for h_q, s_q, b in ((4, 4, 5), (16, 5, 3), (20, 5, 2), (128, 2, 3)):
            call = {"h_q": h_q, "s_q": s_q, "dtype": dtype}
            yield uneven_case(b, call, "invariant", dtype is torch.bfloat16, None)


def uneven_case(b: int, call: dict, plan: str, quick: bool, kv_format: str | None) -> Case:
    """Rows of 0 to s_q queries, and of 0 to 1000 keys."""
    queries = [(call["s_q"], 1, 0, 2)[row % 4] for row in range(b)]
    lengths = tuple((1000, 65, 300, 0, 500)[row % 5] for row in range(b))
    return decode_case(call | {"lengths": lengths, "causal": True}, plan, quick, kv_format, queries)


def decode_case(
    call: dict, plan: str | int, quick: bool, kv_format: str | None = None, queries: Sequence[int] | None = None
) -> Case:
    """A call of make_decode_case's arguments; the plan: none, the op's own, invariant, or one of so many parts.
    queries: of each row, where these differ."""

    def run(device: str) -> None:
        run_decode(*make_call(make_decode_case(**call), kv_format, queries, device), device, plan)

    return Case(f"fwd_kvcache_mla {shown(call, kv_format, queries)} plan={plan}", quick, run)


def shown(call: dict, kv_format: str | None, queries: Sequence[int] | None) -> str:
    words = [f"{name}={value}" for name, value in call.items()]
    return " ".join([*words, *([kv_format] if kv_format else []), *(["uneven"] if queries else [])])


def make_call(
    case: DecodeCase, kv_format: str | None, queries: Sequence[int] | None, device: str
) -> tuple[DecodeCase, dict]:
    """The case as it is to be computed, and the op's arguments on the device: in this format, for rows of so many
    queries."""
    if kv_format is not None:
        case = quantized(case, kv_format.split()[0], e4m3_queries=kv_format == E4M3_QUERIES)
    exact, call = case.dequantized(), moved_kwargs(case, device)
    if queries is not None:
        exact = uneven(exact, queries, spare=3)
        call |= moved_kwargs(uneven(case, queries, spare=3), device)
    return exact, call


def run_decode(exact: DecodeCase, call: dict, device: str, plan: str | int) -> None:
    """Runs the call, whose result must be that of `exact`, a case on the CPU."""
    planned = ()
    if plan in ("own", "invariant"):
        _, *heads = exact.plan_args
        options = {name: call[name] for name in ("cu_seqlens_q", "max_seqlen_q") if name in call}
        planned = get_mla_metadata(call["cache_seqlens"], *heads, **options, batch_invariant=plan == "invariant")
    elif plan != "none":
        planned = [moved(t, device) for t in make_plan(exact.cache_seqlens, plan)]
    out, lse = fwd_kvcache_mla(**call, **dict(zip(("tile_scheduler_metadata", "num_splits"), planned, strict=False)))
    check_result(exact, out.cpu(), lse.cpu(), E4M3_ERROR if call.get("q_scale") is not None else 0.0)


def check_result(exact: DecodeCase, out: Tensor, lse: Tensor, score_error: float = 0.0) -> None:
    """Looser than check_decode, which compares with PyTorch's error: here a wrong result is one of another tile."""
    exact_out, exact_lse = attention(exact)
    seen = exact_lse.isfinite()
    largest = exact_lse[seen].abs().amax().item() if seen.any() else 0.0
    floor = 64 * FP32_EPS * (1 + largest) + score_error  # a score's absolute error is a relative one of its exp
    error, allowed = relative_error(out, exact_out, -1), 2 * torch.finfo(out.dtype).eps + floor
    assert error <= allowed, f"out: error {error:.2e}, allowed {allowed:.2e}"
    assert torch.equal(lse[~seen].double(), exact_lse[~seen]), "lse: expected +inf where a query sees no key"
    if seen.any():
        error = (lse.double() - exact_lse)[seen].abs().amax().item()
        assert error <= floor, f"lse: error {error:.2e}, allowed {floor:.2e}"


# fwd_kvcache_mla on values that only CUDA bears: pages outside the cache read as zeros, lengths clamp to the table


def wrong_value_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16):
        for h_q in (16, 128):
            for plan in ("none", "own"):
                yield wrong_value_case({"h_q": h_q, "dtype": dtype}, plan, plan == "none")
    for h_q, kv_format in ((4, None), (40, None), (4, "fp8"), (40, E4M3_QUERIES)):
        yield wrong_value_case({"h_q": h_q, "s_q": 3}, "own", False, kv_format, queries=[2, 1, 3, 3, 0])


def wrong_value_case(
    call: dict, plan: str, quick: bool, kv_format: str | None = None, queries: list[int] | None = None
) -> Case:
    return Case(
        f"fwd_kvcache_mla wrong values {shown(call, kv_format, queries)} plan={plan}",
        quick,
        lambda device: run_wrong_values(call, kv_format, queries, plan, device),
    )


def run_wrong_values(call: dict, kv_format: str | None, queries: list[int] | None, plan: str, device: str) -> None:
    case = make_decode_case([300, 1, 70, 200, 130], causal=True, poison=False, **call)
    num_pages, page_size, *_ = case.kv_cache.shape
    wrong = replace(case, block_table=case.block_table.clone(), cache_seqlens=case.cache_seqlens.clone())
    wrong.block_table[0, 1], wrong.block_table[0, 2] = -1, -(2**31)
    wrong.block_table[2, 0], wrong.block_table[3, 3] = num_pages, BAD_PAGE
    wrong.cache_seqlens[1], wrong.cache_seqlens[3], wrong.cache_seqlens[4] = 2**31 - 1, 100_000, -7

    exact, given = make_call(wrong, kv_format, queries, device)
    if queries is not None:  # which are those that there are, once clamped to q
        exact.q, given["q"] = (q[: sum(queries)] for q in (exact.q, given["q"]))
        first, *inner, last, end = exact.cu_seqlens_q.tolist()
        cu_seqlens_q = torch.tensor([first - 2**31, *inner, last + 2**30, end + 1], dtype=torch.int32)
        given["cu_seqlens_q"] = moved(cu_seqlens_q, device)
    outside = (wrong.block_table < 0) | (wrong.block_table >= num_pages)
    exact.kv_cache = torch.cat([exact.kv_cache, torch.zeros_like(exact.kv_cache[:1])])
    exact.block_table = wrong.block_table.masked_fill(outside, num_pages)
    exact.cache_seqlens = wrong.cache_seqlens.clamp(0, wrong.block_table.shape[1] * page_size)
    run_decode(exact, given, device, plan)


# paged_stream, the benchmark's: it returns nothing


def run_paged_stream(device: str) -> None:
    pages = torch.tensor([3, -1, 0, 4, BAD_PAGE, 2], dtype=torch.int32)
    torch.ops.flashmla_sm90.paged_stream(torch.zeros(4, 64, 1, 576, dtype=torch.bfloat16).to(device), pages.to(device))
    torch.cuda.synchronize()


def run_cases(which: str, device: str, backend: str) -> int:
    cases = cases_of(backend, which, device)
    if device == "cuda":
        backends.in_use = (backends.ALL[backend], backends.cpu)  # results are compared with the CPU's
    for case in cases:
        try:
            case.run(device)
        except Exception as error:
            print(f"{case.name}: {error}", flush=True)
            return 1  # an error that a tool has found ends the CUDA context, and every case after it
    print(f"{len(cases)} cases right")
    return 0


# -------------------------------------------------------------------------------------------------------------- races


class Access(NamedTuple):
    kind: str  # Read, Write
    file: str
    line: int


def parse_races(output: str) -> list[list[Access]]:
    """racecheck's reports, each an access and those that it says it races with. One of unknown place is at line 0."""
    races = []
    for text in re.split(r"Race reported between", output)[1:]:
        text = re.split(r"^=+\s*$|SUMMARY", text, maxsplit=1, flags=re.MULTILINE)[0]
        _, *pieces = re.split(r"\b(\w+) access\b", text)  # kinds, and after each what is said of it
        places = [re.search(r"([^\s/:]+\.\w+):(\d+)", piece) for piece in pieces[1::2]]
        races.append(
            [
                Access(kind, place[1], int(place[2])) if place else Access(kind, "", 0)
                for kind, place in zip(pieces[::2], places, strict=True)
            ]
        )
    return races


def function_lines(source: str, name: str) -> range:
    """The lines of a __device__ function's definition."""
    body = r"\{(?:[^\n]*\}$|.*?^\})"
    found = re.search(rf"^__device__[^;{{}}]*\b{name}\([^;{{}}]*{body}", source, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"function {name} was not found: does HANDOVERS in {Path(__file__).name} need a change?")
    first = source.count("\n", 0, found.start()) + 1
    return range(first, first + found[0].count("\n") + 1)


def places(source: Path, name: str) -> set[tuple[str, int]]:
    """The lines of a function of this source, or FILE:NAME of one beside it, each with its file's name."""
    source, name = located(source, name)
    return {(source.name, line) for line in function_lines(source.read_text(), name)}


def located(source: Path, name: str) -> tuple[Path, str]:
    file, _, name = name.rpartition(":")
    return source.with_name(file or source.name), name


def is_handover(race: list[Access], handovers: Iterable[Handover]) -> bool:
    """Whether each pair that a report names is a write and a read of one of these hand-overs."""
    ways = [(places(h.source, h.leave), places(h.source, h.take)) for h in handovers]
    first, *others = race

    def named(other: Access) -> bool:
        read, write = sorted((first, other))
        return (read.kind, write.kind) == ("Read", "Write") and any(
            (write.file, write.line) in left and (read.file, read.line) in taken for left, taken in ways
        )

    return bool(others) and all(map(named, others))


# -------------------------------------------------------------------------------------------------------------- tools


@dataclass
class Row:
    """What a tool said about a program."""

    tool: str
    program: str
    ok: bool
    verdict: str
    errors: int | None  # without what was accepted; None: the tool said nothing of errors
    seconds: float
    cases: int
    output: str
    accepted: list[list[Access]] = field(default_factory=list)  # racecheck's reports of hand-overs

    def line(self) -> str:
        errors = "no summary" if self.errors is None else f"{self.errors} errors"
        return (
            f"{self.tool:9} {self.program:10} {errors:>10} {self.seconds:6.1f} s {self.cases:4} cases  {self.verdict}"
        )


def why_not() -> str | None:
    """Why the tools cannot run here, or None."""
    for program in ("compute-sanitizer", "nvcc"):
        if shutil.which(program, path=PATH) is None:
            return f"{program} was not found in CUDA_HOME or on PATH: install the CUDA toolkit"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU"
    return None


def watch(
    tool: str,
    program: str,
    command: list[str],
    expected: Callable[[int | None, int, int], str],
    handovers: Sequence[Handover] = (),
) -> Row:
    """Runs a command under a tool; `expected` says what is wrong, if anything, about (errors, exit status, cases).
    racecheck's reports of these hand-overs are accepted."""
    sanitizer = shutil.which("compute-sanitizer", path=PATH)
    limit = "10000" if tool == "racecheck" else "20"  # a report that is not printed cannot be accepted
    options = ["--tool", tool, "--error-exitcode", "1", "--print-limit", limit, "--target-processes", "all"]
    if program == "cases sm90" and tool != "initcheck":  # initcheck has to see what torch's kernels write
        options += [kernel_filter(sanitizer), "kns=flashmla"]
    if program.startswith("cases") and tool == "memcheck":
        # torch asks the driver for what it may not have; our own calls' errors are exceptions. The padding keeps a
        # write past a tensor from landing in the next one, where it would be allowed
        options += ["--report-api-errors", "no", "--padding", "1024"]
    # every tensor an allocation of its own, so that memcheck and initcheck know its bounds and its beginning
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("FLASHMLA_DEBUG", None)  # it would refuse the wrong values
    begin = time.perf_counter()
    with subprocess.Popen(
        [sanitizer, *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # so that a program that hangs can be ended with its tool
    ) as process:
        try:
            output, late = process.communicate(timeout=LIMIT_S)[0], False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, late = process.communicate()[0], True
    counts = [[int(n or 0) for n in summary] for summary in SUMMARY.findall(output)]
    errors = sum(max(total, hard + soft) for total, hard, soft in counts) if counts else None
    status, races = process.returncode, parse_races(output)
    accepted = [race for race in races if is_handover(race, handovers)]
    if accepted and counts:
        errors = max(errors, len(races)) - len(accepted)  # those that were only counted stay errors
        status = 0 if status == 1 else status  # the tool's, for what is accepted now
    cases = int(right[1]) if (right := RIGHT.search(output)) else 0
    wrong = f"took more than {LIMIT_S} s" if late else expected(errors, status, cases)
    verdict = wrong or "as expected"
    if accepted:
        verdict += f"; accepted: {len(accepted)} of hand-overs, since a correct kernel's is reported too"
    seconds = round(time.perf_counter() - begin, 1)
    return Row(tool, program, not wrong, verdict, errors, seconds, cases, output, accepted)


def kernel_filter(sanitizer: str) -> str:
    """The option's name, which was another one in older versions."""
    text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    return "--kernel-name" if "--kernel-name " in text else "--kernel-regex"


def plant_faults(tools: list[str]) -> Iterator[Row]:
    """Each tool on its planted fault, and on the program without; racecheck also on correct hand-overs."""
    with tempfile.TemporaryDirectory() as work:
        faults = f"{work}/faults"
        subprocess.run(
            [shutil.which("nvcc", path=PATH), "-arch=native", "-lineinfo", "-std=c++17", str(PLANTED), "-o", faults],
            check=True,
        )
        for tool in tools:
            yield watch(
                tool, FAULTS[tool], [faults, FAULTS[tool]], lambda errors, status, cases: "" if errors else "NOT FOUND"
            )
            yield watch(
                tool,
                "clean",
                [faults, "clean"],
                lambda errors, status, cases: "" if (errors, status) == (0, 0) else f"NOT CLEAN, exit status {status}",
            )
            if tool == "racecheck":
                yield watch(tool, "handover", [faults, "handover"], is_right, PLANTED_HANDOVERS)


def is_right(errors: int | None, status: int, cases: int) -> str:
    return "" if (errors, status) == (0, 0) and cases else f"FAILED, exit status {status}"


def watch_cases(tool: str, before: Iterable[Row] = (), backend: str = "sm90") -> Row:
    """The tool on a backend's cases; `before` are its rows of planted faults, without which no report is accepted."""
    rows = [row for row in before if row.ok and (row.tool, row.program) == (tool, "handover")]
    reported = {(access.file, access.line) for row in rows for race in row.accepted for access in race}
    alike = {h.leave for h in PLANTED_HANDOVERS if reported & places(PLANTED, h.leave)}
    which = "quick" if tool in QUICK else "all"
    command = [sys.executable, str(Path(__file__).resolve()), "--cases", which, "--backend", backend]
    return watch(tool, f"cases {backend}", command, is_right, [h for h in HANDOVERS if h.alike in alike])


def first_reports(output: str, most: int = 60) -> list[str]:
    """The first lines of what a tool printed, without the way of the host to each kernel, and the last ones."""
    lines = [line for line in output.splitlines() if not re.search(r"Host Frame|^frame #|^=+\s*$", line)]
    return lines if len(lines) <= most else [*lines[: most - 10], "...", *lines[-10:]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", action="append", choices=FAULTS, help="default: each in turn")
    parser.add_argument("--json", metavar="FILE", help="write the report, with what the tools printed, to a file")
    parser.add_argument("--cases", nargs="?", const="all", choices=["all", "quick"], help="only run the cases, here")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of --cases")
    parser.add_argument("--backend", default="sm90", choices=["sm90", "triton"], help="whose kernels the tools watch")
    options = parser.parse_args(arguments)
    if options.cases:
        return run_cases(options.cases, options.device, options.backend)
    if reason := why_not():
        print(f"sanitize: {reason}", file=sys.stderr)
        return 2

    tools = options.tool or list(FAULTS)
    rows = []
    watched = (watch_cases(tool, rows, options.backend) for tool in tools)
    for row in itertools.chain(plant_faults(tools), watched):
        rows.append(row)
        print(row.line(), flush=True)
        if not row.ok:
            print("\n".join(first_reports(row.output)), flush=True)
    passed = all(row.ok for row in rows)
    seconds = sum(row.seconds for row in rows)
    print(f"{'passed' if passed else 'FAILED'}: {torch.cuda.get_device_name()}, {seconds:.0f} s")
    if options.json:
        report = {"device": torch.cuda.get_device_name(), "passed": passed, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
