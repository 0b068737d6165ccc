"""Under an invariant plan a row's output and lse are the same bits whatever surrounds it; and they are right."""

import os
import random

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import decode_calls, examples, lengths_of_many_rows, seeds
from torch import Tensor
from torch.nn.functional import pad

from flashmla_ops import backends, fwd_kvcache_mla, get_mla_metadata, get_mla_metadata_, plan
from flashmla_ops.testing import (
    DecodeCase,
    UnevenDecodeCase,
    check_decode,
    make_decode_case,
    quantized,
    uneven,
    varied_lengths,
)

EXAMPLES = int(os.environ.get("FLASHMLA_EXAMPLES", 12))  # of the test that bits are the same
LARGE_EXAMPLES = int(os.environ.get("FLASHMLA_LARGE_EXAMPLES", 2))  # of that of large batches and long rows


def attend(case: DecodeCase, made: tuple[Tensor, Tensor] | None = None, **more) -> tuple[Tensor, Tensor]:
    if made is None:
        made = get_mla_metadata(*case.plan_args, **getattr(case, "plan_options", {}), batch_invariant=True)
    more |= dict(zip(("tile_scheduler_metadata", "num_splits"), made, strict=True))
    return fwd_kvcache_mla(**case.kwargs(), **more)


def part_of(case: DecodeCase, rows: list[int], before: int = 0) -> DecodeCase:
    """Some rows of a case, -1 being one of length 0, with `before` more queries in front of their own."""
    known = [max(row, 0) for row in rows]
    lengths = case.cache_seqlens[known] * torch.tensor([row >= 0 for row in rows]).to(case.q.device)
    q = case.q[known]
    q = torch.cat([torch.randn(len(rows), before, *q.shape[2:]).to(q), q], 1)
    changed = {"q": q, "block_table": case.block_table[known], "cache_seqlens": lengths.int()}
    return type(case)(**case.kwargs() | changed)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


def check_surroundings(case: DecodeCase, rng: random.Random, most_rows: int) -> None:
    """Results of the case's rows against those of one row alone, and of any of them in any order, some of them more
    than once, between padding, and with queries before their own."""
    out, lse = attend(case)
    b = out.shape[0]
    for most in (1, most_rows, most_rows):
        rows = rng.choices([*[-1] * (most > 1), *range(b)], k=rng.randint(1, most))
        before = rng.choice([0, 0, 1, 5]) if case.causal else 0
        got_out, got_lse = attend(part_of(case, rows, before))
        padding = torch.tensor(rows, device=out.device) < 0
        wanted = (
            out[rows].masked_fill(padding[:, None, None, None], 0),
            lse[rows].masked_fill(padding[:, None, None], torch.inf),
        )
        for got, want in zip((got_out[:, before:], got_lse[:, :, before:]), wanted, strict=True):
            differ = (bits(got) != bits(want)).flatten(1).any(1)
            assert not differ.any(), f"row {rows[int(differ.int().argmax())]} among {rows}, {before} queries before"


def check_uneven_surroundings(case: DecodeCase, rng: random.Random, most_rows: int) -> None:
    """Results of the case's rows against those of rows of other numbers of queries, as check_surroundings has them,
    under the call's own plan and one of so many parts."""
    out, lse = attend(case)
    b, s_q = out.shape[:2]
    scale = {name: t for name, t in case.kwargs().items() if name == "kv_scale"}
    for parts in (None, rng.choice([1, 3, 40, 256])):
        rows = rng.choices([-1, *range(b)], k=rng.randint(1, most_rows))
        before = rng.choice([0, 0, 1, 20]) if case.causal else 0
        queries = [rng.choice([0, 1, s_q, before + s_q, rng.randint(0, before + s_q)]) for _ in rows]
        packed = uneven(part_of(case, rows, before), queries, spare=rng.choice([0, 3]))
        got_out, got_lse = attend(packed, None if parts is None else plan_of_parts(packed, parts), **scale)
        padding = torch.tensor(rows, device=out.device) < 0
        wanted = (
            pad(out[rows], (0, 0, 0, 0, before, 0)).masked_fill(padding[:, None, None, None], 0),
            pad(lse[rows], (before, 0)).masked_fill(padding[:, None, None], torch.inf),
        )
        own = torch.ones(packed.q.shape[0], dtype=torch.bool, device=out.device)  # and nobody's, which see nothing
        row, i = packed.places()
        own[: len(row)] = i >= before
        want_out, want_lse = packed.packed(*wanted)
        same = (bits(got_out) == bits(want_out)).flatten(1).all(1) & (bits(got_lse) == bits(want_lse)).all(0)
        assert same[own].all(), f"{rows} with {queries} queries, {before} before, {parts} parts"


def plan_of_parts(case: UnevenDecodeCase, parts: int) -> tuple[Tensor, Tensor]:
    """For a machine that uses so many."""
    lengths, group, h_k = case.plan_args
    blocks = plan.row_blocks(case.cu_seqlens_q, case.max_seqlen_q, group, batch_invariant=True)
    return plan.make_invariant_plan(lengths, parts, plan.places(plan.row_tiles(group, h_k)), group, blocks)


def most_keys(target) -> int:
    """Of all rows of a case together."""
    if target.device == "cpu":
        return 2**11 if target.name == "triton" else 2**15
    return 2**19


rows_of_any_kind = {
    "lengths": st.lists(st.one_of(st.integers(0, 700), st.integers(0, 2**19)), min_size=1, max_size=5),
    "heads": st.sampled_from([(1, 1), (5, 1), (16, 1), (4, 2), (20, 1), (32, 1), (48, 2), (40, 1), (128, 1)]),
    "s_q": st.integers(1, 3),
    "kv_format": st.sampled_from(["plain", "plain", "fp8", "fp8_tensor"]),
    "peaked": st.sampled_from([None, "first", "last"]),
    "causal": st.booleans(),
    "seed": seeds,
}


def case_of_rows(target, rng, lengths, heads, s_q, kv_format, peaked, causal, seed) -> DecodeCase:
    """In the smallest dims, or in DeepSeek's."""
    while sum(lengths) > most_keys(target):
        lengths[lengths.index(max(lengths))] //= 2
    kv_format = "plain" if target.name == "sm90" else kv_format  # it refuses the others
    heads = heads if target.device == "cuda" else (min(heads[0], 4 * heads[1]), heads[1])  # it takes a CPU too long
    d_qk, d_v = rng.choice([target.dims[0], target.dims[-1]]) if kv_format == "plain" else target.dims[0]
    sizes = {"s_q": s_q, "h_q": heads[0], "h_k": heads[1], "d_qk": d_qk, "d_v": d_v, "causal": causal, "seed": seed}
    like = {"dtype": rng.choice(target.dtypes), "device": target.device, "poison": kv_format == "plain"}
    case = make_decode_case(lengths, **sizes, peaked=peaked, **like)
    return quantized(case, kv_format) if kv_format != "plain" and heads[1] == 1 else case


@given(**rows_of_any_kind)
@settings(max_examples=examples(EXAMPLES))
def test_bits_do_not_depend_on_what_surrounds_a_row(invariant, seed, **drawn):
    rng = random.Random(seed)
    check_surroundings(case_of_rows(invariant, rng, seed=seed, **drawn), rng, most_rows=8)


@given(**rows_of_any_kind)
@settings(max_examples=examples(EXAMPLES))
def test_bits_do_not_depend_on_the_queries_of_other_rows(uneven_invariant, seed, **drawn):
    """A row of an uneven call has the bits of an even one."""
    rng = random.Random(seed)
    most_rows = 3 if uneven_invariant.name == "triton" and uneven_invariant.device == "cpu" else 8
    check_uneven_surroundings(case_of_rows(uneven_invariant, rng, seed=seed, **drawn), rng, most_rows)


@pytest.mark.parametrize(
    "h_q, lengths, queries", [(16, [700, 1000, 64, 0, 900], [1, 5, 0, 2, 4]), (40, [520, 700], [1, 2])]
)
def test_bits_of_blocks_that_parts_share(uneven_invariant, h_q, lengths, queries):
    """Of rows of one block and of several, in part full, in plans of so many parts that most blocks are split."""
    d_qk, d_v = min(uneven_invariant.dims)
    like = {"dtype": uneven_invariant.dtypes[0], "device": uneven_invariant.device, "d_qk": d_qk, "d_v": d_v}
    case = make_decode_case(lengths, s_q=max(queries), h_q=h_q, causal=True, **like)
    packed = uneven(case, queries, spare=1)
    wanted = packed.packed(*attend(case))
    check_decode(packed, *wanted, uneven_invariant.factor)
    for parts in (7, 16, 40):
        made = plan_of_parts(packed, parts)
        assert made[0][-1, plan.FLAGS] >> 1 > 0
        for got, want in zip(attend(packed, made), wanted, strict=True):
            assert torch.equal(bits(got), bits(want)), f"{parts} parts"


def test_bits_of_uneven_queries_of_many_key_heads(uneven_invariant):
    """More row tiles than are worked on in one launch."""
    if uneven_invariant.name == "triton" and uneven_invariant.device == "cpu":
        pytest.skip("triton: too large for Triton's interpreter")
    d_qk, d_v = min(uneven_invariant.dims)
    like = {"dtype": uneven_invariant.dtypes[0], "device": uneven_invariant.device, "d_qk": d_qk, "d_v": d_v}
    case = make_decode_case([70, 300], s_q=2, h_q=180, h_k=180, causal=True, **like)
    check_uneven_surroundings(case, random.Random(0), most_rows=4)


@pytest.mark.parametrize("h_q, before", [(16, 330), (64, 170)])
def test_bits_do_not_depend_on_many_queries_before_a_row_s_own(invariant, h_q, before):
    """So many row tiles, of 32 or of 64 query rows, that a GPU takes several launches."""
    if invariant.name == "triton" and invariant.device == "cpu":
        pytest.skip("triton: too large for Triton's interpreter")
    d_qk, d_v = min(invariant.dims)
    like = {"dtype": invariant.dtypes[0], "device": invariant.device, "d_qk": d_qk, "d_v": d_v}
    case = make_decode_case([1300, 700, 0, 3000], h_q=h_q, causal=True, **like)
    out, lse = attend(case)
    got_out, got_lse = attend(part_of(case, [0, 1, 2, 3], before))
    assert torch.equal(bits(got_out[:, before:]), bits(out)) and torch.equal(bits(got_lse[:, :, before:]), bits(lse))


@pytest.mark.parametrize("b", [512, 3])
@given(seed=seeds)
@settings(max_examples=LARGE_EXAMPLES)
def test_bits_of_large_batches_and_of_rows_of_70_000_keys(invariant, b, seed):
    if invariant.device == "cpu":
        pytest.skip(f"{invariant.name}: on a GPU only")
    rng = random.Random(seed)
    lengths = [rng.randint(0, 1500) for _ in range(b)] if b > 3 else [70_000, rng.randint(0, 70_000), 0]
    h_q, (d_qk, d_v) = rng.choice([1, 16, 20, 128]), invariant.dims[-1]
    sizes = {"s_q": rng.randint(1, 2), "h_q": h_q, "d_qk": d_qk, "d_v": d_v, "causal": True, "seed": seed}
    case = make_decode_case(lengths, **sizes, dtype=rng.choice(invariant.dtypes), device=invariant.device)
    check_surroundings(case, rng, most_rows=b)


@given(data=st.data())
@settings(max_examples=examples(25))
def test_as_near_to_float64_as_pytorch(invariant, data):
    case = make_decode_case(**data.draw(decode_calls(invariant)))
    check_decode(case, *attend(case), invariant.factor)


@pytest.mark.parametrize(
    "lengths", [[20_000, 0, 513, 512, 1], [40_000], pytest.param([2**16 + 1, 2**16], marks=pytest.mark.large)]
)
def test_long_rows_are_right(invariant, lengths):
    """Of many units, the last one in part; at the length from which units grow."""
    d_qk, d_v = min(invariant.dims)
    like = {"dtype": invariant.dtypes[0], "device": invariant.device, "d_qk": d_qk, "d_v": d_v}
    case = make_decode_case(lengths, h_q=4, peaked="middle", **like)
    check_decode(case, *attend(case), invariant.factor)


# ------------------------------------------------------------------------------------------------------------ the plan

part_counts = st.one_of(st.integers(1, plan.MAX_PARTS), st.sampled_from([1, 16, 66, 132, 256]))
place_counts = st.sampled_from([0, 5, 64, 512, 1024])
head_counts = st.sampled_from([16, 32, 64])  # s_q * h_q / h_k: units of either length
lengths_of_few_units = st.integers(1, 4 * plan.UNIT_TILES * plan.TILE).flatmap(
    lambda most: st.lists(st.one_of(st.just(most), st.integers(0, most)), min_size=1, max_size=70)
)
lengths_as_in_serving = st.builds(
    lambda *drawn: varied_lengths(*drawn).tolist(),
    st.integers(8, 150),
    st.sampled_from([500, 2000, 8000]),
    st.just(1),
    seeds,
)
lengths_of_units = st.one_of(lengths_of_many_rows, lengths_of_few_units, lengths_as_in_serving)


def planned(lengths: list[int], num_parts: int, places: int, heads: int) -> tuple[Tensor, Tensor]:
    return plan.make_invariant_plan(torch.tensor(lengths, dtype=torch.int32), num_parts, places, heads)


def unit_of(length: int, heads: int) -> int:
    """In tiles, of a row of so many keys."""
    return plan.unit_tiles(-(-length // plan.TILE), heads <= plan.FEW_HEADS)


@given(lengths=lengths_of_units, num_parts=part_counts, places=place_counts, heads=head_counts)
@settings(max_examples=300)
def test_a_plan_cuts_between_units_and_leaves_what_there_are_places_for(lengths, num_parts, places, heads):
    metadata, num_splits = planned(lengths, num_parts, places, heads)
    metadata, total = metadata[:-1], metadata[-1].tolist()
    tiles = [-(-length // plan.TILE) for length in lengths]
    covered, touched, left = [0] * len(lengths), [0] * len(lengths), 0
    parts = reference.tiles_of_parts(metadata, lengths)
    for part, columns in zip(parts, metadata.tolist(), strict=True):
        if not part:
            assert columns == [-1 if column == plan.LAST_ROW else 0 for column in range(plan.COLUMNS)]
            continue
        assert columns[plan.FIRST_SPLIT] == touched[columns[plan.FIRST_ROW]]
        assert columns[plan.FLAGS] == plan.INVARIANT + 2 * left  # places are dealt in order
        for row, share in part.items():
            each = unit_of(lengths[row], heads)
            assert share.start == covered[row] and (len(share) > 0 or tiles[row] == 0)
            assert share.start % each == 0 and (share.stop % each == 0 or share.stop == tiles[row])
            left += nodes_of(share.start // each, -(-share.stop // each), -(-tiles[row] // each))
            covered[row] = share.stop
            touched[row] += 1
    assert covered == tiles and left <= places
    assert total == [
        plan.INVARIANT + 2 * left if i == plan.FLAGS else -(i == plan.LAST_ROW) for i in range(plan.COLUMNS)
    ]
    assert num_splits.tolist() == [sum(touched[:row]) for row in range(len(lengths) + 1)]
    assert sum(map(bool, parts)) <= num_parts


def nodes_of(begin: int, end: int, units: int) -> int:
    """The greatest nodes of a row's tree in units begin .. end - 1, counted one by one; none of a row that is whole."""
    if (begin, end) == (0, units):
        return 0
    padded = 1 << max(units - 1, 0).bit_length()
    last, count = padded if end == units else end, 0
    while begin < end:
        size = 1
        while begin % (2 * size) == 0 and begin + 2 * size <= last:
            size *= 2
        begin, count = begin + size, count + 1
    return count


@pytest.mark.parametrize("heads, few_heads", [(16, True), (64, False), (64, True)])
@given(lengths=lengths_of_units, num_parts=st.integers(1, plan.MAX_PARTS), places=place_counts)
@settings(max_examples=60)
def test_every_plan_merges_the_same_tree(heads, few_heads, lengths, num_parts, places):
    """Executed part by part, with what parts leave in their places: each row becomes the same expression of its units,
    which is that of one worker who has the row to itself. Where parts begin and end between long units, as when several
    queries of few heads are planned, they leave as many nodes of short ones."""
    lengths = lengths[:50]
    metadata, _ = planned(lengths, num_parts, places, heads)
    units = (lambda row, begin, end: (begin, end)), (lambda a, b: (a, b))
    results, used = reference.by_parts(metadata, lengths, few_heads, *units)
    assert used == metadata[-1, plan.FLAGS] >> 1 <= places
    for length, result in zip(lengths, results, strict=True):
        assert result == tree_of(-(-length // plan.TILE), few_heads)


def tree_of(tiles: int, few_heads: bool):
    """A row's tree by its definition: (left, right) of nodes, (first tile, end tile) of units, None without tiles."""
    each = plan.unit_tiles(tiles, few_heads)

    def node(level: int, i: int):
        if i * each << level >= tiles:
            return None
        if level == 0:
            return i * each, min((i + 1) * each, tiles)
        left, right = node(level - 1, 2 * i), node(level - 1, 2 * i + 1)
        return left if right is None else (left, right)

    return node(plan.MAX_UNITS.bit_length() - 1, 0)


def test_units_are_few_and_halves_with_few_heads():
    """At most MAX_UNITS, by the same rule of a number and of a tensor; with many heads an even number of tiles."""
    tiles = torch.cat([torch.arange(3000), torch.tensor([2**16, 2**16 + 1, 2**25 - 1])])
    short, long = (plan.unit_tiles(tiles, few_heads) for few_heads in (True, False))
    for each, few_heads in ((short, True), (long, False)):
        assert each.tolist() == [plan.unit_tiles(int(t), few_heads) for t in tiles]
    assert torch.equal(long, 2 * short)
    assert (long >= plan.FEWEST_TILES).all() and (short * plan.MAX_UNITS >= tiles).all()


def test_units_by_the_tiles_of_a_row():
    """A quarter of a row, from 4 tiles to 8; 12 and 16 of long ones; what 64 units ask for. With few heads half."""
    expected = {1: 4, 16: 4, 17: 6, 24: 6, 25: 8, 96: 8, 97: 12, 128: 12, 129: 16, 1024: 16, 1025: 18, 6400: 100}
    assert {tiles: plan.unit_tiles(tiles, few_heads=False) for tiles in expected} == expected
    assert plan.unit_tiles(1, few_heads=True) == 2 and plan.unit_tiles(129, few_heads=True) == 8
    assert (plan.FEW_HEADS, plan.FEW_BLOCK) == (16, 32)  # the README says so


@pytest.mark.parametrize("few_heads", [True, False])
def test_the_cpu_merges_that_tree(few_heads):
    for tiles in range(1, plan.MAX_UNITS * plan.UNIT_TILES, 3):
        each, nodes = plan.unit_tiles(tiles, few_heads), []
        for unit, begin in enumerate(range(0, tiles, each)):
            backends.cpu._push(nodes, unit, (begin, min(begin + each, tiles)), lambda a, b: (a, b))
        result = None
        for _, left in reversed(nodes):
            result = left if result is None else (left, result)
        assert result == tree_of(tiles, few_heads)


def shares_of_plan(lengths: list[int], num_parts: int, places: int, heads: int) -> list[dict[int, range]]:
    """The parts that have work, each with the tiles of its rows."""
    metadata, _ = planned(lengths, num_parts, places, heads)
    return [part for part in reference.tiles_of_parts(metadata, lengths) if part]


def load(part: dict[int, range]) -> int:
    return sum(map(len, part.values())) + plan.ROW_COST * len(part)


@pytest.mark.parametrize("heads", [16, 64])
def test_loads_are_even_where_places_allow(heads):
    """128 rows for 132 parts, one for 66, 16 for 132: within a unit and a row's cost of equal. Rows of a few units: as
    many of them in each part, 4 long ones in rows for 132 parts one by one, 8 for 66 two by two, 2 for 66 together."""
    cost = plan.ROW_COST
    for lengths, parts, places in (([8192] * 128, 132, 1024), ([131_072], 66, 512), ([4096] * 16, 132, 1024)):
        most = greatest_load(shares_of_plan(lengths, parts, places, heads))
        mean = (sum(lengths) // plan.TILE + cost * len(lengths)) / parts
        assert most <= mean + unit_of(lengths[0], heads) + 2 * cost, (lengths[0], most, mean)
    for b, units, parts, of_part in ((32, 4, 132, 1), (16, 8, 66, 2), (64, 2, 66, 2)):
        tiles, step = units * plan.UNIT_TILES, of_part * plan.UNIT_TILES
        expected = [{row: range(tile, tile + step)} for row in range(b) for tile in range(0, tiles, step)]
        assert shares_of_plan([tiles * plan.TILE] * b, parts, 1024, heads) == expected


@given(lengths=lengths_of_units.filter(bool), num_parts=part_counts, places=place_counts, heads=head_counts)
@settings(max_examples=400)
def test_it_is_the_best_of_three_ways(lengths, num_parts, places, heads):
    """The loads of each way by plain loops: the least greatest one; of equals by units, then by cost."""
    lengths = lengths[:200]
    ways = cuts_by_units, cuts_by_cost, cuts_filled
    assert shares_of_plan(lengths, num_parts, places, heads) == best_shares(ways, lengths, num_parts, places, heads)


def best_shares(ways, lengths: list[int], num_parts: int, places: int, heads: int) -> list[dict[int, range]]:
    """Of several functions that cut; of equals the first one's."""
    made = [
        shares_between(cuts_within(cuts(lengths, num_parts, heads), lengths, places, heads), lengths, heads)
        for cuts in ways
    ]
    return min(made, key=greatest_load)


def greatest_load(shares: list[dict[int, range]]) -> int:
    return max(map(load, shares))


@pytest.mark.parametrize("b, keys, num_parts, heads", [(32, 4096, 132, 16), (32, 3584, 132, 64), (128, 2048, 132, 64)])
def test_filled_parts_are_as_even_as_units_allow(b, keys, num_parts, heads):
    """No lesser load has parts enough, whether it is a bound that is tried or not; the other ways' is greater."""
    lengths, cost = varied_lengths(b, keys).tolist(), plan.ROW_COST
    sizes = [unit_sizes(length, heads) for length in lengths]
    most = greatest_load(shares_of_plan(lengths, num_parts, 1024, heads))
    enough = [len(filled_up_to(bound, sizes, cost)) <= num_parts for bound in range(cost + max(map(max, sizes)), most)]
    assert enough and not any(enough)
    others = best_shares((cuts_by_units, cuts_by_cost), lengths, num_parts, 1024, heads)
    assert most < greatest_load(others)


def test_only_small_batches_are_filled():
    """Of up to FILLED_BLOCKS rows and FILLED_UNITS units. One more, and it is the better of the two other ways."""
    ways = cuts_by_units, cuts_by_cost, cuts_filled
    many_rows = varied_lengths(plan.FILLED_BLOCKS, 600).tolist()
    many_units, left = [], plan.FILLED_UNITS
    for length in varied_lengths(300, 8192).tolist():
        if (units := units_of(length, 16)) < left:
            many_units, left = [*many_units, length], left - units
    assert left < 128
    for lengths in (many_rows, many_units + [1] * left):
        for more in ([], [1]):
            made = [best_shares(some, lengths + more, 132, 1024, 16) for some in (ways, ways[:2])]
            assert greatest_load(made[0]) < greatest_load(made[1])
            assert shares_of_plan(lengths + more, 132, 1024, 16) == made[len(more)]


def units_of(length: int, heads: int) -> int:
    return -(-length // (plan.TILE * unit_of(length, heads)))


def cuts_by_cost(lengths: list[int], num_parts: int, heads: int) -> list[tuple[int, int]]:
    """(row, unit) where parts begin: of the unit in which each p-th of the line of cost lies."""
    line, cost = [], plan.ROW_COST  # (row, unit) of every tile of cost
    for row, length in enumerate(lengths):
        each = unit_of(length, heads)
        line += [(row, 0)] * cost + [(row, tile // each) for tile in range(-(-length // plan.TILE))]
    parts = max(1, min(num_parts, len(line) // (plan.MIN_TILES + cost)))
    return [line[p * len(line) // parts] for p in range(parts)]


def cuts_by_units(lengths: list[int], num_parts: int, heads: int) -> list[tuple[int, int]]:
    line = [(row, unit) for row, length in enumerate(lengths) for unit in range(max(1, units_of(length, heads)))]
    return line[:: -(-len(line) // num_parts)]


def unit_sizes(length: int, heads: int) -> list[int]:
    """Tiles of a row's units; a row without tiles counts as one without."""
    each, tiles = unit_of(length, heads), -(-length // plan.TILE)
    return [min(each, tiles - tile) for tile in range(0, tiles, each)] or [0]


def cuts_filled(lengths: list[int], num_parts: int, heads: int) -> list[tuple[int, int]]:
    """Of the bounds that are tried the least with which there are parts enough; a single part if there is none."""
    cost, sizes = plan.ROW_COST, [unit_sizes(length, heads) for length in lengths]
    longest = cost + max(map(max, sizes))
    least = max(-(-(sum(map(sum, sizes)) + cost * len(lengths)) // num_parts), longest)
    step = -(-longest // (2 * (plan.BOUNDS - 1)))
    for bound in range(least, least + plan.BOUNDS * step, step):
        if len(cuts := filled_up_to(bound, sizes, cost)) <= num_parts:
            return cuts
    return [(0, 0)]


def filled_up_to(bound: int, sizes: list[list[int]], cost: int) -> list[tuple[int, int]]:
    """Where parts begin that take one unit after the other as long as their load stays within the bound."""
    cuts, load = [], bound
    for row, of_row in enumerate(sizes):
        for unit, size in enumerate(of_row):
            load += size + cost * (unit == 0)
            if load > bound:
                cuts.append((row, unit))
                load = size + cost
    return cuts


def cuts_within(cuts: list[tuple[int, int]], lengths: list[int], places: int, heads: int) -> list[tuple[int, int]]:
    """The same in order without repetitions, moved down as far as the nodes that parts leave make it necessary."""
    for g in (1 << bit for bit in range(plan.MAX_UNITS.bit_length())):
        moved = sorted({(row, unit // g * g) for row, unit in cuts})
        left = 0
        for part in shares_between(moved, lengths, heads):
            for row, share in part.items():
                each = unit_of(lengths[row], heads)
                left += nodes_of(share.start // each, -(-share.stop // each), units_of(lengths[row], heads))
        if left <= places:
            return moved
    raise AssertionError("rows of which none is split leave nodes")


def shares_between(cuts: list[tuple[int, int]], lengths: list[int], heads: int) -> list[dict[int, range]]:
    """The tiles of its rows in each part, from where parts begin."""
    shares = []
    for (row, unit), (last, end) in zip(cuts, [*cuts[1:], (len(lengths), 0)], strict=True):
        part = {}
        for r in range(row, last + (end > 0)):
            each, tiles = unit_of(lengths[r], heads), -(-lengths[r] // plan.TILE)
            part[r] = range(unit * each if r == row else 0, end * each if r == last else tiles)
        shares.append(part)
    return shares


@pytest.mark.parametrize("uneven", [False, True])
def test_planning_syncs_nothing(uneven):
    lengths = torch.zeros(7, dtype=torch.int32, device="meta")
    metadata, num_splits = plan.make_invariant_plan(lengths, 16, 1024, 64, lengths.long() if uneven else None)
    assert metadata.shape == (plan.MAX_PARTS + 1, plan.COLUMNS) and num_splits.shape == (8,)


def check_the_op_s_plan(invariant, lengths: Tensor, heads: tuple[int, int]) -> None:
    """What get_mla_metadata and get_mla_metadata_ make against make_invariant_plan, bit for bit."""
    tiles = plan.row_tiles(*heads)
    parts, places = plan.CPU_PARTS, plan.CPU_PLACES if invariant.name == "cpu" else plan.places(tiles)
    if invariant.device == "cuda":
        parts = plan.max_parts(torch.cuda.get_device_properties(invariant.device).multi_processor_count, tiles)
    expected = plan.make_invariant_plan(lengths, parts, places, heads[0])
    in_place = [torch.full_like(t, -7, device=invariant.device) for t in expected]
    on_device = dict(zip(("tile_scheduler_metadata", "num_splits"), in_place, strict=True))
    cache_seqlens = lengths.to(invariant.device)
    get_mla_metadata_(cache_seqlens, *heads, batch_invariant=True, **on_device)
    for made in (get_mla_metadata(cache_seqlens, *heads, batch_invariant=True), in_place):
        assert all(torch.equal(got.cpu(), want) for got, want in zip(made, expected, strict=True))


@given(lengths=lengths_of_many_rows, heads=st.sampled_from([(1, 1), (16, 1), (128, 1), (512, 1), (20, 4), (70000, 1)]))
@settings(max_examples=examples(100))
def test_the_op_makes_that_plan(invariant, lengths, heads):
    check_the_op_s_plan(invariant, torch.tensor(lengths, dtype=torch.int32), heads)


@pytest.mark.parametrize("b", [511, 512, 513, 1023, 1024, 1025, 2048, 70_000])
def test_the_op_makes_that_plan_of_many_rows(invariant, b):
    """Short ones, all of one length of many tiles, none with keys, and a long one among such."""
    row = torch.arange(b)
    for lengths in (row * 977 % 700, torch.full((b,), 1_000_000), torch.zeros(b), (row == b - 2) * 4_000_000):
        check_the_op_s_plan(invariant, lengths.int(), (16, 1))


@pytest.mark.gpu
@given(lengths=lengths_of_units, num_parts=part_counts, places=place_counts, heads=head_counts)
@settings(max_examples=400)
def test_the_kernel_makes_that_plan_for_any_machine(lengths, num_parts, places, heads):
    """Of more parts, and with fewer places, than this one has: there cuts move by several units."""
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    if reason := backends.sm90.refusal("get_mla_metadata", cache_seqlens, batch_invariant=True):
        pytest.skip(f"sm90: {reason}")
    expected = plan.make_invariant_plan(cache_seqlens.cpu(), num_parts, places, heads)
    made = [torch.full_like(t, -7, device="cuda") for t in expected]
    torch.ops.flashmla_sm90.get_mla_metadata_invariant(*made, cache_seqlens, num_parts, places, heads, None, 0)
    assert all(torch.equal(got.cpu(), want) for got, want in zip(made, expected, strict=True))


def test_planning_in_place_and_compiled(invariant):
    """The option goes through the fake, and a replanned plan is the same."""
    lengths = torch.tensor([5000, 0, 70], dtype=torch.int32, device=invariant.device)
    expected = get_mla_metadata(lengths, 16, 1, batch_invariant=True)
    compiled = torch.compile(get_mla_metadata, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(lengths, 16, 1, batch_invariant=True), expected))
    other = get_mla_metadata(torch.zeros_like(lengths), 16, 1, batch_invariant=True)
    in_place = dict(zip(("tile_scheduler_metadata", "num_splits"), other, strict=True))
    assert not torch.equal(in_place["tile_scheduler_metadata"], expected[0])
    get_mla_metadata_(lengths, 16, 1, batch_invariant=True, **in_place)
    assert all(map(torch.equal, in_place.values(), expected))


@pytest.mark.parametrize("invariant_first", [True, False])
def test_one_kind_of_plan_is_not_replaced_by_the_other(target, invariant_first):
    """A captured graph that reads it has the other kind's kernels."""
    lengths = torch.tensor([5000], dtype=torch.int32, device=target.device)
    made = plan.make_invariant_plan if invariant_first else plan.make_plan
    metadata, num_splits = made(lengths, 16, *([1024] if invariant_first else []))
    with pytest.raises(RuntimeError, match=rf"expected dimension 0 to be {256 + (not invariant_first)} "):
        get_mla_metadata_(
            lengths,
            16,
            1,
            batch_invariant=not invariant_first,
            tile_scheduler_metadata=metadata,
            num_splits=num_splits,
        )


def test_sm90_says_which_caches_it_does_not_serve_so():
    q = torch.zeros(1, 1, 16, 576, dtype=torch.bfloat16)
    cache = torch.zeros(1, 64, 1, 656, dtype=torch.uint8)
    reason = backends.sm90._no_call(q, cache, 512, batch_invariant=True)
    assert reason.startswith("its fp8 kernels do not merge a row's units in a fixed order (batch_invariant)")


# ------------------------------------------------------------------------------------- the kernel's plans of blocks


def check_the_kernel_s_plan_of_blocks(
    lengths: Tensor, queries: Tensor, most: int, group: int, num_parts: int, places: int
) -> None:
    """Rows of so many queries, `most` being max_seqlen_q, against plan_blocks, which plans every block as a row."""
    cache_seqlens = lengths.int().to("cuda")
    if reason := backends.sm90.refusal("get_mla_metadata", cache_seqlens, batch_invariant=True):
        pytest.skip(f"sm90: {reason}")
    cu_seqlens_q = torch.cat([torch.zeros(1), queries]).cumsum(0).int()
    blocks = plan.row_blocks(cu_seqlens_q, most, group, True)
    expected = plan.plan_blocks(plan.make_invariant_plan, lengths.int(), blocks, num_parts, places, group)
    made = [torch.full_like(t, -7, device="cuda") for t in expected]
    how = num_parts, places, group, cu_seqlens_q.to("cuda"), most
    torch.ops.flashmla_sm90.get_mla_metadata_invariant(*made, cache_seqlens, *how)
    assert all(torch.equal(got.cpu(), want) for got, want in zip(made, expected, strict=True))


@pytest.mark.gpu
@given(
    lengths=lengths_of_units,
    most=st.sampled_from([1, 4, 70, 3000]),
    group=st.sampled_from([1, 16, 17, 32, 33, 64, 96, 128, 130]),
    num_parts=part_counts,
    places=st.sampled_from([0, 5, 64, 512, 1024]),
    data=st.data(),
)
@settings(max_examples=300)
def test_the_kernel_makes_that_plan_of_uneven_queries(lengths, most, group, num_parts, places, data):
    """Also of differences that are wrong: below 0, and above the most that there are said to be."""
    some = st.one_of(st.sampled_from([0, 0, 1, most, most + 1, -1]), st.integers(0, most))
    queries = data.draw(st.lists(some, min_size=1, max_size=12), label="queries, one after the other")
    queries = torch.tensor(queries).repeat(len(lengths))[: len(lengths)]
    check_the_kernel_s_plan_of_blocks(torch.tensor(lengths), queries, most, group, num_parts, places)


@pytest.mark.gpu
@pytest.mark.parametrize("b", [1, 511, 512, 513, 2048, 70_000])
def test_the_kernel_makes_that_plan_of_many_uneven_rows(b):
    """Without queries at the beginning, in the middle, at the end and everywhere; one row with nearly all blocks."""
    row = torch.arange(b)
    lengths = row * 977 % 7000
    few = row % 5
    for queries in (
        few,
        few * (row >= b // 2),
        few * (row < b // 2),
        few * (row % (b // 3 + 1) < b // 6),
        torch.zeros(b),
        (row == b // 2) * 65536,
        (row == b - 1) * 65536 + 1,
    ):
        for group in (16, 128):
            check_the_kernel_s_plan_of_blocks(lengths, queries, 65536, group, 132, 1024)


@pytest.mark.gpu
def test_sm90_plans_uneven_queries_for_this_machine():
    """What the backend hands to the kernel: the parts and places of a call with these heads."""
    lengths = torch.tensor([5000, 0, 70, 1, 130_000], dtype=torch.int32)
    cu_seqlens_q = torch.tensor([0, 1, 1, 300, 304, 305], dtype=torch.int32)
    if reason := backends.sm90.refusal("get_mla_metadata", lengths.to("cuda"), batch_invariant=True):
        pytest.skip(f"sm90: {reason}")
    for group, h_k in ((16, 1), (128, 1), (130, 2)):
        tiles = plan.row_tiles(group, h_k)
        parts = plan.max_parts(torch.cuda.get_device_properties("cuda").multi_processor_count, tiles)
        blocks = plan.row_blocks(cu_seqlens_q, 299, group, True)
        how = parts, plan.places(tiles), group
        expected = plan.plan_blocks(plan.make_invariant_plan, lengths, blocks, *how)
        made = [torch.full_like(t, -7, device="cuda") for t in expected]
        backends.sm90.get_mla_metadata(*made, lengths.to("cuda"), group, h_k, True, cu_seqlens_q.to("cuda"), 299)
        assert all(torch.equal(got.cpu(), want) for got, want in zip(made, expected, strict=True))
