"""Rows of different numbers of queries in one call (cu_seqlens_q): results, plans, sizes, values."""

import time
from itertools import accumulate

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import decode_calls, examples, head_counts, invariant_refusal, lengths_of_many_rows, seeds
from test_fwd_kvcache_mla import equal, plan_kwargs
from test_get_mla_metadata import check_plan, most_parts_of, part_counts

from flashmla_ops import backends, fwd_kvcache_mla, get_mla_metadata, get_mla_metadata_, plan
from flashmla_ops.testing import (
    UnevenDecodeCase,
    check_decode,
    make_decode_case,
    quantized,
    uneven,
)

EXAMPLES = 400 if torch.cuda.is_available() else 60


def plans_of(target) -> st.SearchStrategy:
    """Of a number: for a machine that uses that many parts."""
    invariant = [] if invariant_refusal(target, uneven=True) else ["invariant"]
    return st.sampled_from(["none", "own", 1, 2, 16, 132, 256, *invariant])


@st.composite
def uneven_cases(draw, target, **fixed) -> UnevenDecodeCase:
    case = make_decode_case(**draw(decode_calls(target, **fixed)))
    b, s_q = case.q.shape[:2]
    some = st.one_of(st.integers(0, s_q), st.sampled_from([0, 1, s_q]))
    queries = draw(st.lists(some, min_size=b, max_size=b), label="queries")
    return uneven(case, queries, draw(st.sampled_from([0, 0, 1, 5]), label="spare"))


def make(which: str | int, case: UnevenDecodeCase, **options) -> tuple:
    if which == "none":
        return None, None
    if which in ("own", "invariant"):
        options |= {"batch_invariant": True} if which == "invariant" else {}
        return get_mla_metadata(*case.plan_args, **case.plan_options, **options)
    group = case.plan_args[1]
    blocks = plan.row_blocks(case.cu_seqlens_q, case.max_seqlen_q, group)
    return plan.plan_blocks(plan.make_plan, case.cache_seqlens, blocks, which)


def run(case: UnevenDecodeCase, which: str | int = "none", **options) -> tuple[torch.Tensor, torch.Tensor]:
    return fwd_kvcache_mla(**case.kwargs(), **plan_kwargs(make(which, case, **options)))


# ------------------------------------------------------------------------------------------------------------- results


@given(data=st.data())
@settings(max_examples=examples(EXAMPLES))
def test_as_near_to_float64_as_pytorch(target, data):
    """Any dims, heads and lengths, rows of 0 to 70 queries, with queries of no row, under any plan."""
    case = data.draw(uneven_cases(target))
    which = data.draw(plans_of(target))
    results = run(case, which)
    assert results[0].shape == (*case.q.shape[:2], case.head_dim_v) and results[1].shape == case.q.shape[1::-1]
    check_decode(case, *results, target.factor)
    assert equal(run(case, which), results)


MIXED = {  # queries, lengths, heads: more rows than one part, blocks of one row tile and of two, of few rows and many
    "decode and a prefill chunk": ([1] * 5 + [40] + [1] * 2, [70, 300, 1, 64, 130, 500, 90, 40], 16),
    "speculation": ([3, 1, 0, 4, 2], [200, 65, 130, 4, 90], 4),
    "two row tiles a query": ([1, 0, 5, 2], [70, 33, 300, 129], 128),
    "a row tile and a half a query": ([3, 1, 2], [70, 200, 129], 96),
    "three row tiles a query": ([2, 0, 1], [300, 64, 70], 130),
    "no queries at all": ([0, 0], [70, 3], 16),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MIXED)
def test_mixed_batches(target, name, causal):
    queries, lengths, h_q = MIXED[name]
    d_qk, d_v = target.dims[0]
    like = {"dtype": target.dtypes[0], "device": target.device, "d_qk": d_qk, "d_v": d_v, "causal": causal}
    case = uneven(make_decode_case(lengths, max(*queries, 1), h_q, **like), queries, spare=2)
    invariant = ["invariant"] if invariant_refusal(target, uneven=True) is None else []
    for which in ("none", "own", 3, 256, *invariant):
        check_decode(case, *run(case, which), target.factor)


@pytest.mark.parametrize("kv_format", ["fp8", "fp8_tensor"])
@pytest.mark.fp8
def test_over_fp8_caches(target, kv_format):
    for queries, h_q in (([1, 4, 0, 1], 4), ([1, 9, 0, 30], 16), ([1, 2], 128)):
        lengths = [200, 513, 64, 70][: len(queries)]
        like = {"dtype": target.dtypes[0], "device": target.device, "poison": False, "causal": True}
        base = quantized(make_decode_case(lengths, max(queries), h_q, **like), kv_format)
        case = uneven(base.dequantized(), queries, spare=1)
        out, lse = fwd_kvcache_mla(**case.kwargs() | {"kv_cache": base.kv_cache, "kv_scale": base.kv_scale})
        check_decode(case, out, lse, 2 * target.factor)


@pytest.mark.fp8
def test_queries_in_fp8(target):
    """As the even call of each row alone."""
    q_scale = torch.tensor(0.125, device=target.device)
    for queries, h_q in (([1, 4, 0, 1], 4), ([1, 9, 0, 30], 16), ([1, 2], 128)):
        lengths = [200, 513, 64, 70][: len(queries)]
        base = quantized(make_decode_case(lengths, max(queries), h_q, device=target.device, causal=True), "fp8_tensor")
        case = uneven(base, queries, spare=1)
        q = (case.q / q_scale).to(torch.float8_e4m3fn)
        fp8 = {"kv_cache": base.kv_cache, "kv_scale": base.kv_scale, "q_scale": q_scale}
        out, lse = fwd_kvcache_mla(**case.kwargs() | fp8 | {"q": q})
        assert out.dtype is torch.bfloat16
        for row, (first, n) in enumerate(zip(case.cu_seqlens_q.tolist(), queries, strict=False)):
            if n == 0:
                continue
            one = {"block_table": base.block_table[row : row + 1], "cache_seqlens": base.cache_seqlens[row : row + 1]}
            alone = fwd_kvcache_mla(**base.kwargs() | fp8 | one | {"q": q[None, first : first + n]})
            torch.testing.assert_close(out[first : first + n], alone[0][0], rtol=2**-6, atol=2e-3)
            torch.testing.assert_close(lse[:, first : first + n], alone[1][0], rtol=1e-3, atol=1e-3)
        assert not out[-1].any() and lse[:, -1].isposinf().all()


@given(data=st.data())
@settings(max_examples=examples(25))
def test_the_same_bits_as_padded_in_front_under_an_invariant_plan(uneven_invariant, data):
    case = data.draw(uneven_cases(uneven_invariant))
    padded = case.padded()
    planned = get_mla_metadata(*padded.plan_args, batch_invariant=True)
    out, lse = fwd_kvcache_mla(**padded.kwargs(), **plan_kwargs(planned))
    assert equal(run(case, "invariant"), case.packed(out, lse))


# ------------------------------------------------------------------------------------------------------------- the plan


def by_blocks(metadata, num_splits, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The plan of the blocks as rows, and num_splits before each row."""
    metadata, first = metadata.clone(), [0, *accumulate(blocks)]
    for columns in metadata:
        for row, block in ((plan.FIRST_ROW, plan.FIRST_ROW_TILE), (plan.LAST_ROW, plan.LAST_ROW_TILE)):
            if columns[plan.LAST_ROW] >= 0 or row == plan.FIRST_ROW:
                assert 0 <= columns[block] < max(1, blocks[columns[row]] if blocks else 0)
                columns[row] = first[columns[row]] + columns[block]
            columns[block] = 0
    return metadata, num_splits


@given(data=st.data(), lengths=lengths_of_many_rows, heads=head_counts, most=st.sampled_from([1, 3, 70, 1000]))
@settings(max_examples=examples(100))
def test_the_op_plans_blocks_like_rows(target, data, lengths, heads, most):
    h_q, h_k = heads
    group = h_q // h_k
    if lengths_are_many := len(lengths) > 60:
        lengths = lengths[:60] if target.name == "triton" and target.device == "cpu" else lengths
    some = st.one_of(st.sampled_from([0, 1, most]), st.integers(0, most))
    queries = data.draw(st.lists(some, min_size=len(lengths), max_size=len(lengths)), label="queries")
    if not lengths_are_many and data.draw(st.booleans()):
        queries = [most] * len(lengths)
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=target.device)
    cu_seqlens_q = torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=target.device)
    options = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": most}
    metadata, num_splits = get_mla_metadata(cache_seqlens, group, h_k, **options)

    size = plan.rows_of_block(group)
    blocks = [-(-n * group // size) for n in queries]
    assert plan.row_blocks(cu_seqlens_q, most, group).tolist() == blocks
    rows = [length for length, n in zip(lengths, blocks, strict=True) for _ in range(n)]
    flat, splits = by_blocks(metadata.cpu(), num_splits.cpu(), blocks)
    parts = reference.tiles_of_parts(flat, rows)
    touched = [sum(row in part for part in parts) for row in range(len(rows))]
    sums = [0, *accumulate(touched)]
    assert splits.tolist() == [sums[end] for end in (0, *accumulate(blocks))]
    cost = plan.ROW_COST
    check_plan(flat, torch.tensor(sums, dtype=torch.int32), rows, most_parts_of(target, (group, h_k)), cost)

    in_place = torch.full_like(metadata, -7), torch.full_like(num_splits, -7)
    get_mla_metadata_(cache_seqlens, group, h_k, **options, **plan_kwargs(in_place))
    assert torch.equal(in_place[0], metadata) and torch.equal(in_place[1], num_splits)


@given(data=st.data(), lengths=lengths_of_many_rows, heads=head_counts, most=st.sampled_from([1, 3, 70, 1000]))
@settings(max_examples=examples(100))
def test_the_op_makes_invariant_plans_of_blocks(uneven_invariant, data, lengths, heads, most):
    """Bit by bit what make_invariant_plan makes, also in place."""
    group, h_k = heads[0] // heads[1], heads[1]
    some = st.one_of(st.sampled_from([0, 1, most]), st.integers(0, most))
    queries = data.draw(st.lists(some, min_size=len(lengths), max_size=len(lengths)), label="queries")
    lengths = torch.tensor(lengths, dtype=torch.int32)
    cu_seqlens_q = torch.tensor([0, *accumulate(queries)], dtype=torch.int32)
    places = plan.CPU_PLACES if uneven_invariant.name == "cpu" else plan.places(plan.row_tiles(group, h_k))
    how = most_parts_of(uneven_invariant, (group, h_k)), places, group
    blocks = plan.row_blocks(cu_seqlens_q, most, group, batch_invariant=True)
    size = plan.FEW_BLOCK if group <= plan.FEW_BLOCK else -(-group // plan.ROW_TILE) * plan.ROW_TILE
    assert blocks.tolist() == [-(-n * group // size) for n in queries]
    expected = plan.make_invariant_plan(lengths, *how, blocks)

    args = lengths.to(uneven_invariant.device), group, h_k
    options = {"cu_seqlens_q": cu_seqlens_q.to(uneven_invariant.device), "max_seqlen_q": most, "batch_invariant": True}
    in_place = [torch.full_like(t, -7, device=uneven_invariant.device) for t in expected]
    get_mla_metadata_(*args, **options, **plan_kwargs(in_place))
    for made in (get_mla_metadata(*args, **options), in_place):
        assert all(torch.equal(got.cpu(), want) for got, want in zip(made, expected, strict=True))


@given(
    lengths=lengths_of_many_rows,
    data=st.data(),
    parts=part_counts,
    places=st.sampled_from([0, 5, 64, 1024]),
    group=st.sampled_from([16, 32, 64]),
)
@settings(max_examples=100)
def test_invariant_plans_of_blocks(lengths, data, parts, places, group):
    """As those of rows; batch_invariance's tests hold for the plan of the blocks."""
    most = data.draw(st.sampled_from([1, 3, 300]), label="most")
    some = st.one_of(st.sampled_from([0, 1, most]), st.integers(0, most))
    blocks = data.draw(st.lists(some, min_size=len(lengths), max_size=len(lengths)), label="blocks")
    cache_seqlens, of_rows = torch.tensor(lengths, dtype=torch.int32), torch.tensor(blocks, dtype=torch.long)
    made = plan.make_invariant_plan(cache_seqlens, parts, places, group, of_rows)
    by_rows = plan.plan_blocks(plan.make_invariant_plan, cache_seqlens, of_rows, parts, places, group)
    assert all(map(torch.equal, made, by_rows))
    flat, splits = by_blocks(*made, blocks)
    rows = torch.tensor([n for n, count in zip(lengths, blocks, strict=True) for _ in range(count)], dtype=torch.int32)
    expected, sums = plan.make_invariant_plan(rows, parts, places, group)
    assert torch.equal(flat, expected)
    assert torch.equal(splits, sums[[0, *accumulate(blocks)]])


@pytest.mark.parametrize("blocks", [2**26, 2**40, -(2**40)])
@pytest.mark.parametrize("b", [1, 40, 3000])
def test_numbers_beyond_int64_are_harmless(b, blocks):
    """What could only be meant by mistake makes no index that is out of range, which would be a fault on a GPU."""
    rows = torch.full((b,), 2**31 - 1, dtype=torch.int32), torch.full((b,), blocks)
    metadata, num_splits = plan.make_invariant_plan(rows[0], 256, 1024, 16, rows[1])
    assert metadata.shape == (plan.MAX_PARTS + 1, plan.COLUMNS) and num_splits.shape == (b + 1,)


# ------------------------------------------------------------------------------------------------------- wrong values


def small_case(target, **changed) -> UnevenDecodeCase:
    d_qk, d_v = target.dims[0]
    like = {"dtype": target.dtypes[0], "device": target.device, "d_qk": d_qk, "d_v": d_v, "causal": True}
    case = uneven(make_decode_case([70, 130, 3], 3, 40, **like), [1, 3, 2])
    for name, value in changed.items():
        setattr(
            case,
            name,
            torch.tensor(value, dtype=torch.int32, device=target.device) if name != "max_seqlen_q" else value,
        )
    return case


WRONG = {
    "begins late": ({"cu_seqlens_q": [1, 2, 5, 6]}, "cu_seqlens_q: expected it to begin with 0, got 1"),
    "decreases": (
        {"cu_seqlens_q": [0, 3, 2, 4]},
        "cu_seqlens_q: expected differences from 0 .*, got -1 queries in row 1",
    ),
    "beyond q": ({"cu_seqlens_q": [0, 2, 4, 7]}, "cu_seqlens_q: expected it to end at most at q's 6 queries, got 7"),
    "far beyond": ({"cu_seqlens_q": [0, 2**31 - 1, -(2**31), 5]}, "cu_seqlens_q: expected differences .* in row 0"),
    "more than the most": ({"max_seqlen_q": 2}, "cu_seqlens_q: expected differences .* = 2, got 3 queries in row 1"),
}


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_of_queries(target, uneven_plans, name, debug, monkeypatch):
    """An error that names them where values are checked; harmless elsewhere."""
    monkeypatch.setattr(backends.values, "DEBUG", debug)
    changed, message = WRONG[name]
    case = small_case(target, **changed)
    if target.device == "cpu" or debug:
        with pytest.raises(RuntimeError, match=message):
            run(case)
        if name != "beyond q":  # a plan knows of no q
            with pytest.raises(RuntimeError, match=message):
                make("own", case, **uneven_plans)
        return
    for which in ("none", "own"):
        run(case, which, **uneven_plans)
    torch.cuda.synchronize()
    good = small_case(target)
    check_decode(good, *run(good, "own", **uneven_plans), target.factor)


def test_a_plan_for_other_numbers_of_queries(target, uneven_plans):
    case = small_case(target)
    other = small_case(target, cu_seqlens_q=[0, 3, 3, 3])
    even = get_mla_metadata(case.cache_seqlens, 120, 1, **uneven_plans)
    for planned in (make("own", other, **uneven_plans), even):
        call = case.kwargs() | plan_kwargs(planned)
        if target.device == "cpu" or backends.values.DEBUG:
            with pytest.raises(RuntimeError, match="tile_scheduler_metadata: expected"):
                fwd_kvcache_mla(**call)
        else:
            fwd_kvcache_mla(**call)
            torch.cuda.synchronize()


@given(seed=seeds, high=st.sampled_from([2, 9, 1000, 2**26, 2**31 - 1]), heads=st.sampled_from([16, 40, 128]))
@settings(max_examples=examples(60))
def test_noise_for_a_plan_is_harmless(target, uneven_plans, seed, high, heads):
    """It ends soon, in numbers or an error, and nothing but out and lse is written."""
    invariant = uneven_plans.get("batch_invariant", False)
    d_qk, d_v = target.dims[0]
    like = {"dtype": target.dtypes[0], "device": target.device, "d_qk": d_qk, "d_v": d_v, "poison": False}
    case = uneven(make_decode_case([70, 1300, 3, 400], 9, heads, **like), [1, 9, 2, 0], spare=1)
    generator = torch.Generator().manual_seed(seed)
    shapes = (plan.MAX_PARTS + invariant, plan.COLUMNS), (5,)
    noise = [torch.randint(-3, high, shape, generator=generator).int().to(target.device) for shape in shapes]
    for column, most in ((plan.FIRST_ROW, 4), (plan.LAST_ROW, 4), (plan.LAST_TILE, 9)):  # so that rows are split
        noise[0][:, column] %= most
    if invariant:
        noise[0][-1, plan.FLAGS] = seed % 2000  # places: few enough, or it would be executed unsplit
    inputs = [t for t in (*case.kwargs().values(), *noise) if isinstance(t, torch.Tensor)]
    before, begin = [t.clone() for t in inputs], time.perf_counter()
    try:
        fwd_kvcache_mla(**case.kwargs(), **plan_kwargs(noise))
    except RuntimeError as error:
        assert "tile_scheduler_metadata: expected" in str(error)
    assert time.perf_counter() - begin < 10
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("heads", [16, 40])
def test_places_that_no_part_fills_are_harmless(uneven_invariant, heads, monkeypatch):
    """What a plan says is left, and no part leaves, is read as memory was before: here as a block before a row's first
    one, whose results would go far before out."""
    if uneven_invariant.device != "cuda":
        pytest.skip("values are checked on the CPU")
    monkeypatch.setattr(backends.values, "DEBUG", False)
    d_qk, d_v = uneven_invariant.dims[0]
    like = {"dtype": uneven_invariant.dtypes[0], "device": uneven_invariant.device, "d_qk": d_qk, "d_v": d_v}
    case = uneven(make_decode_case([70, 1300, 3], 9, heads, **like), [1, 9, 2])
    metadata = torch.zeros(plan.MAX_PARTS + 1, plan.COLUMNS, dtype=torch.int32)
    metadata[:, plan.LAST_ROW] = -1
    metadata[-1, plan.FLAGS] = plan.INVARIANT + 2 * 3
    planned = metadata.to(case.q.device), torch.zeros(4, dtype=torch.int32, device=case.q.device)
    torch.cuda.empty_cache()
    stale = torch.zeros(2**26, 2, dtype=torch.int32, device=case.q.device)  # 512 MB, which the workspace is taken from
    stale[:, 1] = -(2**30)
    del stale
    fwd_kvcache_mla(**case.kwargs(), **plan_kwargs(planned))
    torch.cuda.synchronize()
    check_decode(case, *run(case, "invariant"), uneven_invariant.factor)


REFUSED = [
    ({"cu_seqlens_q": None}, "cu_seqlens_q: expected a value with max_seqlen_q .*, got None"),
    ({"max_seqlen_q": None}, "max_seqlen_q: expected a value with cu_seqlens_q .*, got None"),
    ({"max_seqlen_q": 0}, "max_seqlen_q: expected at least 1, got 0"),
    ({"cu_seqlens_q": torch.zeros(3, dtype=torch.int32)}, "cu_seqlens_q: expected dimension 0 to be 4 .*, got .*3"),
    ({"cu_seqlens_q": torch.zeros(4)}, "cu_seqlens_q: expected torch.int32, got torch.float32"),
    ({"cu_seqlens_q": torch.zeros(4, 1, dtype=torch.int32)}, "cu_seqlens_q: expected 1 dimensions .*, got shape"),
    ({"cu_seqlens_q": torch.zeros(8, dtype=torch.int32)[::2]}, "cu_seqlens_q: expected the stride .* 1, got 2"),
]


@pytest.mark.parametrize("changed, message", REFUSED)
def test_bad_arguments_are_refused(changed, message):
    case = make_decode_case([70, 130, 3], 3, 20, dtype=torch.float32)
    case = uneven(case, [1, 3, 2])
    given = {name: t for name, t in (case.kwargs() | changed).items() if isinstance(t, torch.Tensor)}
    tensors = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for name, t in given.items()
    }
    for call in (case.kwargs() | changed, case.kwargs() | changed | tensors):
        if call["cu_seqlens_q"] is None and call["q"].is_meta:
            continue
        with pytest.raises(
            RuntimeError, match=message if call["cu_seqlens_q"] is not None else "q: expected 4|" + message
        ):
            fwd_kvcache_mla(**call)
        options = {name: call[name] for name in ("cu_seqlens_q", "max_seqlen_q")}
        with pytest.raises(RuntimeError, match=message):
            get_mla_metadata(call["cache_seqlens"], 20, 1, **options)


def test_q_must_have_as_many_dimensions_as_the_form_has():
    even = make_decode_case([70, 3], 2, 4)
    packed = uneven(even, [1, 2])
    with pytest.raises(
        RuntimeError, match=r"q: expected 3 dimensions \[total_q, h_q, d_qk\] \(with cu_seqlens_q\), got"
    ):
        fwd_kvcache_mla(**packed.kwargs() | {"q": even.q})
    with pytest.raises(RuntimeError, match=r"q: expected 4 dimensions \[b, s_q, h_q, d_qk\], got"):
        fwd_kvcache_mla(**even.kwargs() | {"q": packed.q})


# --------------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.gpu
def test_a_captured_step_serves_other_numbers_of_queries(target, uneven_plans):
    """Plan and call in one graph of fixed b, total_q and max_seqlen_q; nobody's queries are the padding."""
    if target.device != "cuda":
        pytest.skip("graphs are CUDA's")
    base = make_decode_case([700, 64, 129, 1], 40, 16, device="cuda", causal=True)
    case = uneven(base, [1, 40, 0, 7])
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(case, "own", **uneven_plans)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, lse = run(case, "own", **uneven_plans)
    for queries in ([1, 40, 0, 7], [0, 0, 0, 0], [12, 12, 12, 12], [40, 1, 1, 0], [1, 1, 1, 1]):
        other = uneven(base, queries, spare=48 - sum(queries))
        case.q.copy_(other.q)
        case.cu_seqlens_q.copy_(other.cu_seqlens_q)
        out.fill_(7)
        lse.fill_(7)
        graph.replay()
        check_decode(other, out, lse, target.factor)
