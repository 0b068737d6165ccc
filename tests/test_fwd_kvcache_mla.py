"""Decoding against float64, and the properties that hold whatever the numbers are."""

import ctypes
import functools
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ALL_DIMS, TARGETS, decode_calls, examples, lengths_of_rows, seeds

from flashmla_ops import backends, fwd_kvcache_mla, get_mla_metadata, merge_attn_states
from flashmla_ops.plan import COLUMNS, FLAGS, MAX_PARTS, make_invariant_plan, make_plan
from flashmla_ops.testing import BAD_PAGE, DecodeCase, attention, check_decode, make_decode_case, varied_lengths

EXAMPLES = 1100 if torch.cuda.is_available() else 550  # of the test against float64, on each backend
plans = st.sampled_from(["none", "own", 1, 2, 16, 132, 256])  # a number: for a machine that uses that many parts


def make(plan: str | int, case: DecodeCase) -> tuple:
    if plan == "none":
        return None, None
    return get_mla_metadata(*case.plan_args) if plan == "own" else make_plan(case.cache_seqlens, plan)


def compile_one(dims: tuple[int, int], h_q: int, page_size: int, dtype: torch.dtype) -> None:
    backends.use_backend("triton")
    shape = {"d_qk": dims[0], "d_v": dims[1], "h_q": h_q, "page_size": page_size, "dtype": dtype}
    run(make_decode_case([70], device="cuda", **shape), "own")


@functools.cache
def compile_ahead() -> None:
    """All kernels of the test below, in many processes: one after the other they would take minutes. Each dimension and
    dtype with few, some and many query rows, on pages that are and are not multiples of a block of keys."""
    target = TARGETS["triton"]
    kinds = zip(*product(target.dims, (16, 32, 64), (48, 64), target.dtypes), strict=True)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), get_context("spawn")) as processes:
        list(processes.map(compile_one, *kinds))


@given(data=st.data())
@settings(max_examples=examples(EXAMPLES))
def test_as_near_to_float64_as_pytorch(target, data):
    """Any dims, dtype, page size, heads, queries, strides, lengths from 0, causal or not, flat or peaked, any plan."""
    if (target.name, target.device) == ("triton", "cuda"):
        compile_ahead()
    case = make_decode_case(**data.draw(decode_calls(target)))
    plan = make(data.draw(plans), case)
    check_decode(case, *fwd_kvcache_mla(**case.kwargs(), **plan_kwargs(plan)), target.factor)


def plan_kwargs(plan: tuple) -> dict:
    return dict(zip(("tile_scheduler_metadata", "num_splits"), plan, strict=True))


@given(data=st.data())
@settings(max_examples=20)
def test_the_oracle_is_right(data):
    """The float64 results that everything is held against are those of a loop over rows, queries and heads."""
    call = {"lengths": [0, 1, 70, 40], "s_q": 3, "h_q": 4, "h_k": 2, "d_qk": 64, "d_v": 48}
    case = make_decode_case(**data.draw(decode_calls(TARGETS["cpu"], **call)))
    for fast, plain in zip(attention(case), reference.decode_by_loops(case), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.large
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dims", ALL_DIMS[:6])
def test_dims_and_page_sizes(target, dims, page_size):
    if dims not in target.dims or page_size not in target.page_sizes:
        pytest.skip(f"{target.name} does not serve d_qk, d_v = {dims} with pages of {page_size}")
    d_qk, d_v = dims
    shape = {"d_qk": d_qk, "d_v": d_v, "page_size": page_size, "device": target.device}
    for dtype in target.dtypes:
        case = make_decode_case([129, 0, 16, 70], h_q=12, s_q=2, causal=True, peaked="middle", dtype=dtype, **shape)
        check_decode(case, *run(case, "own"), target.factor)


# -------------------------------------------------------------------------------------------------------- properties


def run(case: DecodeCase, plan: str | int = "none") -> tuple[torch.Tensor, torch.Tensor]:
    return fwd_kvcache_mla(**case.kwargs(), **plan_kwargs(make(plan, case)))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(data=st.data())
@settings(max_examples=examples(50))
def test_two_halves_merge_to_the_whole(target, data):
    """Keys before and after a page boundary, attended apart and merged, are as good as all at once."""
    case = make_decode_case(**data.draw(decode_calls(target, causal=False)))
    page_size, pages = case.kv_cache.shape[1], case.block_table.shape[1]
    cut = data.draw(st.integers(0, pages - 2))
    first, second = (DecodeCase(**case.kwargs()) for _ in range(2))
    first.cache_seqlens = case.cache_seqlens.clamp_max(cut * page_size)
    second.cache_seqlens = (case.cache_seqlens - cut * page_size).clamp_min(0)
    second.block_table = case.block_table[:, cut:]
    # each half is rounded to the dtype before it is merged
    check_decode(case, *merge_attn_states(*run(first), *run(second)), 2 * target.factor)


@given(data=st.data())
@settings(max_examples=examples(50))
def test_repeats_and_page_numbers_do_not_change_a_bit(target, data):
    case = make_decode_case(**data.draw(decode_calls(target)))
    plan = data.draw(plans)
    before = run(case, plan)
    assert equal(run(case, plan), before)

    num_pages = case.kv_cache.shape[0]
    moved_to = torch.randperm(num_pages, device=target.device)
    moved = DecodeCase(**case.kwargs())
    moved.kv_cache = case.kv_cache[moved_to.argsort()]
    real = case.block_table < BAD_PAGE
    moved.block_table = case.block_table.where(~real, moved_to[case.block_table.where(real, 0)].int())
    assert equal(run(moved, plan), before)


REPEATS = 20
SLEEP_CYCLES = 200_000_000  # 0.1 s: queueing the calls below takes less
PRODUCTS = 5  # for each call beside them: a kernel may have to wait for one, and a call is up to three kernels
REPEATED = {  # least and most shares of the row that has most, and the call
    "rows of two shares": (2, 2, {"lengths": [320, 100, 257] * 30, "h_q": 128}),
    "a row of many shares": (8, MAX_PARTS, {"lengths": [16_000]}),
    "a row of many shares, two row tiles": (8, MAX_PARTS, {"lengths": [3000], "h_q": 128}),
    "four row tiles": (2, MAX_PARTS, {"lengths": [700, 0, 65, 1500], "s_q": 2, "h_q": 128, "causal": True}),
    "few heads": (2, MAX_PARTS, {"lengths": varied_lengths(24, 256), "h_q": 16}),
}


@pytest.mark.large
@pytest.mark.parametrize("plan", ["none", "own"])
@pytest.mark.parametrize("name", REPEATED)
def test_repeats_do_not_change_a_bit(target, name, plan):
    """Alone and, on a GPU, beside another stream's work; nor do that stream's calls, of other numbers, change a bit."""
    least, most, shape = REPEATED[name]
    cases = [make_decode_case(**shape, device=target.device, seed=seed) for seed in (0, 1)]
    shares = get_mla_metadata(*cases[0].plan_args)[1].diff()
    assert least <= shares.max() <= most, "the shape does not show what it is for"
    call, other = (case.kwargs() | plan_kwargs(make(plan, case)) for case in cases)
    expected, expected_other = fwd_kvcache_mla(**call), fwd_kvcache_mla(**other)
    repeats = [fwd_kvcache_mla(**call) for _ in range(REPEATS)]
    assert all(equal(repeat, expected) for repeat in repeats)
    if target.device != "cuda":
        return
    side = torch.cuda.Stream()
    side_by_side(other, call, side)  # torch now has memory for both streams, and the wrong numbers are in it
    repeats, others, outlasted_ms = side_by_side(call, other, side)
    assert outlasted_ms > 0, "the side stream was done before the repeats: this shows too little"
    assert all(equal(repeat, expected) for repeat in repeats)
    assert all(equal(repeat, expected_other) for repeat in others)


def side_by_side(call: dict, other: dict, side: torch.cuda.Stream) -> tuple[list, list, float]:
    """What repeats of `call` return, what those of `other` return on a side stream, and by how many ms that outlasts
    them. There matrix products come in between, whose blocks fill the GPU: parts of a call start late, in any order.
    Both streams wait for one kernel until all is queued."""
    ready, done, side_done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    matrix = torch.ones(4096, 4096, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(matrix)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    ready.record()
    others = []
    with torch.cuda.stream(side):
        side.wait_event(ready)
        for _ in range(REPEATS):
            for _ in range(PRODUCTS):
                torch.mm(matrix, matrix, out=product)
            others.append(fwd_kvcache_mla(**other))
        side_done.record()
    repeats = [fwd_kvcache_mla(**call) for _ in range(REPEATS)]
    done.record()
    torch.cuda.synchronize()
    return repeats, others, done.elapsed_time(side_done)


@given(data=st.data())
@settings(max_examples=examples(50))
def test_batch_mates_do_not_matter(target, data):
    """A row has the same result alone and in company, within rounding."""
    case = make_decode_case(**data.draw(decode_calls(target)))
    out, lse = run(case)
    row = data.draw(st.integers(0, out.shape[0] - 1))
    alone = DecodeCase(**case.kwargs())
    for name in ("q", "block_table", "cache_seqlens"):
        setattr(alone, name, getattr(case, name)[row : row + 1])
    check_decode(alone, out[row : row + 1], lse[row : row + 1], target.factor)
    check_decode(alone, *run(alone), target.factor)


@st.composite
def calls_of_pairs(draw, target) -> dict:
    """Often more rows than a Hopper has parts for so many queries: it merges rows of two shares its own way then."""
    lengths = draw(st.lists(st.integers(0, 700), min_size=4, max_size=9)) * 10
    heads = draw(st.sampled_from([{"h_q": 128}, {"h_q": 100, "s_q": 2}, {"h_q": 256, "h_k": 2, "s_q": 2}]))
    dtype = draw(st.sampled_from(target.dtypes))
    return {"lengths": lengths, **heads, "dtype": dtype, "device": target.device, "causal": draw(st.booleans())}


@pytest.mark.large
@given(data=st.data())
@settings(max_examples=examples(10))
def test_rows_of_two_shares(target, data):
    case = make_decode_case(**data.draw(calls_of_pairs(target)))
    check_decode(case, *run(case, data.draw(plans)), target.factor)


@pytest.mark.parametrize(
    "h_q, lengths", [(128, [4096] * 33 + [0]), (64, [2048] * 66), (16, [3000] * 30), (128, [9000])]
)
def test_what_memory_held_before_does_not_matter(target, h_q, lengths):
    """Parts that end rows at the same time, in a workspace that is NaN before every call."""
    if target.device != "cuda":
        pytest.skip(f"{target.name} has no workspace")
    case = make_decode_case(lengths, h_q=h_q, device=target.device)
    torch.cuda.empty_cache()
    results = []
    for _ in range(20):
        poison = torch.full(
            (48 << 20,), torch.nan, device=target.device
        )  # more than the workspace, which takes its place
        del poison
        results.append(run(case, "own"))
    check_decode(case, *results[0], target.factor)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@given(data=st.data())
@settings(max_examples=examples(50))
def test_stale_plans_are_harmless(target, data):
    """With a plan for other lengths, or noise, a call ends soon, in numbers or a clear error. Inputs are unchanged."""
    calls = st.one_of(decode_calls(target), calls_of_pairs(target)) if target.device == "cuda" else decode_calls(target)
    case = make_decode_case(**data.draw(calls))
    b, invariant = case.q.shape[0], data.draw(st.booleans(), label="batch invariant")
    if data.draw(st.booleans(), label="noise"):
        generator = torch.Generator().manual_seed(data.draw(seeds))
        high = data.draw(st.sampled_from([2, b + 1, 1000, 2**31 - 1]))
        shapes = (MAX_PARTS + invariant, COLUMNS), (b + 1,)
        noise = [torch.randint(-high, high, shape, generator=generator) for shape in shapes]
        noise[0][7] = 2**31 - 1
        if invariant:
            noise[0][-1, FLAGS] = data.draw(st.integers(0, 2000))  # places: few enough, or it would be executed unsplit
        plan = [t.int().to(target.device) for t in noise]
    else:
        other = data.draw(lengths_of_rows(max_rows=9, most_keys=10**6)) * b
        lengths = torch.tensor(other[:b], dtype=torch.int32, device=target.device)
        how = data.draw(st.integers(1, 256)), *([data.draw(st.sampled_from([0, 64, 1024]))] if invariant else [])
        plan = (make_invariant_plan if invariant else make_plan)(lengths, *how)
    inputs = [t for t in (*case.kwargs().values(), *plan) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in inputs]
    begin = time.perf_counter()
    try:
        fwd_kvcache_mla(**case.kwargs(), **plan_kwargs(plan))
    except RuntimeError as error:
        assert "tile_scheduler_metadata: expected" in str(error)
    assert time.perf_counter() - begin < 10
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, before, strict=True))


# ------------------------------------------------------------------------------------------------------------ extremes

EXTREMES = {
    "no rows": ("own", {"lengths": []}),
    "only empty rows": ("own", {"lengths": [0, 0, 0], "s_q": 3}),
    "no queries": ("none", {"lengths": [5], "s_q": 0}),
    "more queries than keys": ("none", {"lengths": [5, 0, 70], "s_q": 70, "causal": True}),
    "batch beyond 65,535": ("own", {"lengths": torch.arange(70_000) % 3}),
    "thousands of queries": ("own", {"lengths": [4100, 3000], "s_q": 4096, "causal": True}),
    "a million keys": ("own", {"lengths": [1_000_000, 3, 500_000], "h_q": 2}),
    "a million keys, unplanned": ("none", {"lengths": [1_000_000]}),
}


LARGE = ("batch beyond 65,535", "thousands of queries", "a million keys", "a million keys, unplanned")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.large] * (name in LARGE)) for name in EXTREMES])
def test_extreme_sizes(target, name):
    plan, call = EXTREMES[name]
    d_qk, d_v = min(target.dims)
    dims = {"h_q": 1, "d_qk": d_qk, "d_v": d_v, "page_size": min(target.page_sizes)}
    case = make_decode_case(**{**dims, "dtype": torch.float16, "device": target.device, **call})
    check_decode(case, *run(case, plan), target.factor)


@pytest.mark.parametrize("changes", [{"kv_cache": lambda t: t[:0]}, {"block_table": lambda t: t[:, :0]}])
def test_a_cache_or_table_without_pages(target, changes):
    """As at a server's start: no row can have a key, and every output is defined all the same."""
    d_qk, d_v = target.dims[0]
    case = make_decode_case([0, 0, 0], 2, d_qk=d_qk, d_v=d_v, dtype=target.dtypes[0], device=target.device)
    for name, change in changes.items():
        setattr(case, name, change(getattr(case, name)))
    for plan in ("none", "own"):
        out, lse = run(case, plan)
        assert not out.any() and lse.isposinf().all()


def peak_memory(device: str) -> int:
    """Bytes: of the CUDA allocator, or the process's peak resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def reset_peak_memory(device: str) -> None:
    if device == "cuda":
        return torch.cuda.reset_peak_memory_stats()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that glibc keeps would hide what the call takes
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        pytest.skip(f"this system cannot reset a process's peak memory: {error}")


@pytest.mark.large
@pytest.mark.parametrize("plan", ["none", "own"])
@pytest.mark.parametrize(
    "b, s_q, h_q, length, dims",
    [
        pytest.param(1, 1, 128, 128 * 1024, (576, 512), id="long"),
        pytest.param(1, 1, 1, 1024 * 1024, (64, 48), id="a million keys"),
        pytest.param(256, 1, 128, 256, (576, 512), id="wide"),
        pytest.param(70_000, 1, 4, 64, (64, 48), id="batch"),
        pytest.param(1, 1024, 16, 1024, (576, 512), id="queries"),
    ],
)
def test_extra_memory_is_bounded(target, b, s_q, h_q, length, dims, plan):
    """At most 512 MiB besides inputs and outputs, whatever batch and length. Rows share the pages of a small cache."""
    if dims not in target.dims:
        pytest.skip(f"{target.name} does not serve d_qk, d_v = {dims}")
    d_qk, d_v = dims
    dtype, page_size, num_pages = torch.bfloat16, 64, 16
    new = {"dtype": dtype, "device": target.device}
    case = DecodeCase(
        q=torch.ones(b, s_q, h_q, d_qk, **new),
        kv_cache=torch.ones(num_pages, page_size, 1, d_qk, **new),
        block_table=torch.arange(b * length // page_size, device=target.device).view(b, -1).int() % num_pages,
        cache_seqlens=torch.full((b,), length, dtype=torch.int32, device=target.device),
        head_dim_v=d_v,
        softmax_scale=0.1,
        causal=False,
    )
    output_bytes = b * s_q * h_q * (d_v * dtype.itemsize + 4)
    reset_peak_memory(target.device)
    before = peak_memory(target.device)
    out, _ = run(case, plan)
    extra = peak_memory(target.device) - before - output_bytes
    assert extra < 512 << 20, f"{extra >> 20} MiB"
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0.01, atol=0)
