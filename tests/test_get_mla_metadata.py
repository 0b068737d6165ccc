"""The properties of a plan that plan.py states, over drawn lengths. Every backend's planner is held to them."""

import math
from itertools import accumulate

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples, lengths_of_many_rows

from flashmla_ops import get_mla_metadata, get_mla_metadata_, plan
from flashmla_ops.plan import make_plan, max_parts, row_tiles

part_counts = st.one_of(st.integers(1, plan.MAX_PARTS), st.sampled_from([1, 2, 16, 132, 256]))


def check_plan(metadata: torch.Tensor, num_splits: torch.Tensor, lengths: list[int], most_parts: int, cost: int):
    assert metadata.shape == (plan.MAX_PARTS, plan.COLUMNS) and metadata.dtype is torch.int32
    assert num_splits.shape == (len(lengths) + 1,) and num_splits.dtype is torch.int32
    tiles = [-(-length // plan.TILE) for length in lengths]
    parts = reference.tiles_of_parts(metadata, lengths)

    # every tile of every row in exactly one part, in order; a row without tiles in exactly one part
    covered, touched = [0] * len(lengths), [0] * len(lengths)
    for part, columns in zip(parts, metadata.tolist(), strict=True):
        if not part:
            assert columns == [-1 if column == plan.LAST_ROW else 0 for column in range(plan.COLUMNS)]
            continue
        first_row = columns[plan.FIRST_ROW]
        assert columns[plan.FIRST_SPLIT] == touched[first_row]
        assert columns[plan.FLAGS :] == [0, 0, 0]
        for row, share in part.items():
            assert share.start == covered[row] and (len(share) > 0 or tiles[row] == 0)
            covered[row] = share.stop
            touched[row] += 1
    assert covered == tiles
    assert all(count >= 1 for count in touched) and all(n == 1 for n, t in zip(touched, tiles, strict=True) if t == 0)
    assert num_splits.tolist() == list(accumulate(touched, initial=0))

    # no part has more to do than with cuts at equal distances, and none too little to be worth a part
    total, most = sum(tiles) + cost * len(lengths), max(tiles, default=0)
    on_line = max(1, min(most_parts, total // (plan.MIN_TILES + cost)))
    loads = [sum(map(len, part.values())) + cost * len(part) for part in parts if part]
    assert all(load <= -(-total // on_line) + 1 + cost for load in loads)
    worth = max(1, math.ceil(math.sqrt(most / plan.SHARES_PER_TILE)))
    assert len(loads) <= max(on_line, min(most_parts, len(lengths) * max(1, -(-most // worth))))


@pytest.mark.parametrize(
    "lengths, num_parts, per_row",
    [
        ([1024], 132, 16),  # one row: a part for each tile
        ([8192], 132, 43),  # of more tiles, so that fewer shares have to be merged
        ([131072], 132, 132),
        ([1024] * 64, 66, 1),  # as many parts for each row, though some stay idle
        ([4096, 4095, 4033], 132, 32),
        ([4096] * 16, 66, 4),
        ([64] * 16, 66, 1),
        ([0], 66, 1),
    ],
)
def test_rows_of_like_lengths_are_cut_alike(lengths, num_parts, per_row):
    metadata, num_splits = make_plan(torch.tensor(lengths, dtype=torch.int32), num_parts, row_cost=2)
    check_plan(metadata, num_splits, lengths, num_parts, 2)
    assert num_splits.tolist() == [per_row * row for row in range(len(lengths) + 1)]


@given(lengths=lengths_of_many_rows, num_parts=part_counts, cost=st.sampled_from([2, plan.ROW_COST]))
@settings(max_examples=400)
def test_a_plan_covers_every_tile_once_in_equal_shares(lengths, num_parts, cost):
    check_plan(*make_plan(torch.tensor(lengths, dtype=torch.int32), num_parts, cost), lengths, num_parts, cost)


@given(lengths=lengths_of_many_rows, heads=st.sampled_from([(1, 1), (16, 1), (128, 1), (512, 1), (20, 4), (70000, 1)]))
@settings(max_examples=examples(50))
def test_the_op_makes_such_a_plan(target, lengths, heads):
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=target.device)
    metadata, num_splits = get_mla_metadata(cache_seqlens, *heads)
    check_plan(metadata.cpu(), num_splits.cpu(), lengths, most_parts_of(target, heads), plan.ROW_COST)
    again = get_mla_metadata(cache_seqlens, *heads)
    assert torch.equal(again[0], metadata) and torch.equal(again[1], num_splits)
    in_place = torch.full_like(metadata, -7), torch.full_like(num_splits, -7)
    get_mla_metadata_(cache_seqlens, *heads, tile_scheduler_metadata=in_place[0], num_splits=in_place[1])
    assert torch.equal(in_place[0], metadata) and torch.equal(in_place[1], num_splits)


def most_parts_of(target, heads) -> int:
    if target.device == "cpu":
        return plan.CPU_PARTS
    return max_parts(torch.cuda.get_device_properties(target.device).multi_processor_count, row_tiles(*heads))


def test_extreme_batches(target):
    for lengths in (torch.arange(70_000) % 700, torch.full((3000,), 1_000_000), torch.zeros(70_000)):
        cache_seqlens = lengths.int().to(target.device)
        metadata, num_splits = get_mla_metadata(cache_seqlens, 16, 1)
        check_plan(
            metadata.cpu(), num_splits.cpu(), lengths.int().tolist(), most_parts_of(target, (16, 1)), plan.ROW_COST
        )


def test_parts_of_a_machine():
    """Every part is worked on once for each tile of 64 query rows of each key head."""
    assert [row_tiles(16, 1), row_tiles(128, 1), row_tiles(65, 2)] == [1, 2, 4]
    assert [max_parts(132, tiles) for tiles in (1, 2, 4, 1000)] == [132, 66, 33, 1]
    assert max_parts(1000, 1) == plan.MAX_PARTS


@pytest.mark.parametrize("num_parts", [1, 16, 256])
def test_planning_syncs_nothing(num_parts):
    """No value of a tensor reaches the host: the planner runs where there are no values at all."""
    metadata, num_splits = make_plan(torch.zeros(7, dtype=torch.int32, device="meta"), num_parts)
    assert metadata.shape == (plan.MAX_PARTS, plan.COLUMNS) and num_splits.shape == (8,)
