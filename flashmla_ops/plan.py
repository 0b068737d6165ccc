"""The split-KV plan: who works on which keys. One format, read by every backend.

A decode step is b rows of different lengths and a machine of many workers. The plan deals the rows' keys, in tiles of
`TILE`, to at most `MAX_PARTS` parts. A part is one worker's contiguous share: it may begin and end inside a row (that
row is then split, and its partial results are merged by their log-sum-exp), and the rows in between are whole.

`tile_scheduler_metadata` [MAX_PARTS, 8] int32 has one part a row, with the columns named below. Part p covers the rows
FIRST_ROW..LAST_ROW (inclusive); of row r the tiles

    [FIRST_TILE if r == FIRST_ROW else 0,  LAST_TILE if r == LAST_ROW else ceil(cache_seqlens[r] / TILE)).

FIRST_SPLIT is the index of the part's share of FIRST_ROW among that row's splits. FLAGS is 0 but for batch-invariant
plans (below), and the row-tile columns are 0 in a plan for even queries (for others see the end of this file). Unused
parts have LAST_ROW = -1, so that a loop over their rows runs zero times. A batch-invariant plan has one more row: its
shape tells it from others, so that a kernel can be chosen without waiting for the device.

`num_splits` [b + 1] int32 is the exclusive prefix sum of the number of parts that touch each row. A row of length 0
lies in exactly one part, with no tiles: somebody must write its (empty) output.

Properties, which tests/test_get_mla_metadata.py states over drawn lengths:
  - every tile of every row lies in exactly one part;
  - a part's load, its tiles + a row's cost for each row it touches, is at most that of cuts at equal distances:
    ceil(total load / their parts) + a row's cost + 1;
  - a part is worth its start and its merge, so a short batch uses few parts;
  - everything is computed from the lengths by tensor operations: no value ever reaches the host.
"""

import torch
from torch import Tensor

TILE = 64  # keys; whatever the page size
MAX_PARTS = 256  # rows of the plan, whatever machine traces or runs: an exported model must run elsewhere
COLUMNS = 8
FIRST_ROW, FIRST_TILE, LAST_ROW, LAST_TILE, FIRST_SPLIT, FLAGS, FIRST_ROW_TILE, LAST_ROW_TILE = range(COLUMNS)

MIN_TILES = 1  # of a part
ROW_COST = 4  # what starting a row (its queries) and writing its result cost, in tiles, by measurement (csrc/NOTES.md)
# One more tile in a part costs as much time as so many more shares in the merge of a row.
SHARES_PER_TILE = 16
ROW_TILE = 64  # query rows that one worker holds: s_q * h_q / h_k of them are dealt to row tiles of this size

CPU_PARTS = 16  # a fixed number: the CPU's plan must not depend on the machine's cores
CPU_PLACES = 1024  # as many as a GPU's workspace has; on the CPU nothing is left in any


def row_tiles(num_heads_per_head_k: int, num_heads_k: int) -> int:
    """Tiles of 64 query rows: num_heads_k * ceil(num_heads_per_head_k / 64), num_heads_per_head_k = s_q * h_q / h_k."""
    return num_heads_k * -(-num_heads_per_head_k // ROW_TILE)


def max_parts(num_workers: int, num_row_tiles: int) -> int:
    """How many parts a machine of `num_workers` SMs uses: every part is worked on once for each row tile."""
    return min(MAX_PARTS, max(1, num_workers // num_row_tiles))


def make_plan(cache_seqlens: Tensor, num_parts: int, row_cost: int = ROW_COST) -> tuple[Tensor, Tensor]:
    """Deals rows of the given lengths to at most `num_parts` parts, in the better of two ways.

    On a line: the rows are laid end to end on a line of cost, row r taking row_cost + ceil(cache_seqlens[r] / TILE) of
    it, and the line is cut at equal distances. A cut inside a row's cost moves to the row's start.

    Alike: every row is cut into the same number of parts, of as many tiles each as its length allows. Of rows of one
    length that cuts none near its ends. A part has ceil(sqrt(tiles / SHARES_PER_TILE)) tiles or more, where the sum of
    the time for a part and for the merge of a row's shares is least.

    It is the way whose greatest load of a part is less; both know that before they cut.

    Args:
        cache_seqlens: [b] int32, keys in each row; negative counts as 0.
        num_parts: 1 to MAX_PARTS.
        row_cost: what a row costs beside its tiles, in tiles.
    Returns:
        tile_scheduler_metadata [MAX_PARTS, 8] int32, num_splits [b + 1] int32.
    """
    b = cache_seqlens.shape[0]
    tiles = (cache_seqlens.clamp_min(0).long() + (TILE - 1)) // TILE
    total = tiles.sum() + row_cost * b
    on_line = (total // (MIN_TILES + row_cost)).clamp(1, num_parts)  # parts
    plan, num_splits = _on_line(tiles, total, on_line, row_cost)
    if 0 < b <= num_parts:
        most, least = tiles.max(), tiles.min()
        worth = (most.double() / SHARES_PER_TILE).sqrt().ceil().long().clamp_min(1)
        per_row = torch.minimum(_ceil_div(most, worth), least).clamp(1, num_parts // b)
        alike = _ceil_div(most, per_row) <= _ceil_div(total, on_line)
        plan_alike, num_splits_alike = _alike(tiles, per_row)
        plan = torch.where(alike, plan_alike, plan)
        num_splits = torch.where(alike, num_splits_alike, num_splits)
    plan[:, LAST_ROW] -= 1
    return plan.int(), num_splits.int()


def _ceil_div(x: Tensor, y: Tensor) -> Tensor:
    return (x + y - 1) // y


def _columns(used: Tensor, first_row: Tensor, first_tile: Tensor, last_row: Tensor, last_tile: Tensor, split: Tensor):
    """The plan, with LAST_ROW + 1 for LAST_ROW."""
    zero = torch.zeros_like(split)
    columns = [first_row, first_tile, last_row + 1, last_tile, split, zero, zero, zero]
    return torch.stack(columns, 1) * used[:, None]


def _alike(tiles: Tensor, per_row: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts every row into per_row parts."""
    b = tiles.shape[0]
    part = torch.arange(MAX_PARTS, device=tiles.device)
    row, split = part // per_row, part % per_row
    of_row = tiles[row.clamp_max(b - 1)]
    plan = _columns(row < b, row, split * of_row // per_row, row, (split + 1) * of_row // per_row, split)
    return plan, torch.arange(b + 1, device=tiles.device) * per_row


def _on_line(tiles: Tensor, total: Tensor, parts: Tensor, row_cost: int) -> tuple[Tensor, Tensor]:
    """Cuts the line of cost into parts of equal length."""
    b, device = tiles.shape[0], tiles.device
    row_end = (tiles + row_cost).cumsum(0)

    # cut p is where part p begins and part p - 1 ends, as (row, tile); the last one is (b, 0)
    part = torch.arange(MAX_PARTS + 1, device=device)
    position = torch.minimum(part, parts) * total // parts
    row = torch.searchsorted(row_end, position, right=True)
    if b:
        known = row.clamp_max(b - 1)
        tile = (position - (row_end - tiles)[known]).clamp_min(0) * (row < b)
    else:
        tile = torch.zeros_like(row)

    # a part ends before its next cut: at the end of the row above when that cut stands at a row's start
    whole = tile[1:] == 0
    last_row = row[1:] - whole.long()
    last_tile = torch.where(whole, tiles[last_row.clamp_min(0)], tile[1:]) if b else tile[1:]
    inside = tile > 0  # cuts that split a row
    cuts_up_to = inside.long().cumsum(0)
    cuts_before_row = torch.zeros(b + 2, dtype=torch.long, device=device)
    cuts_before_row.scatter_add_(0, row + 1, inside.long())
    cuts_before_row = cuts_before_row.cumsum(0)
    first_split = cuts_up_to[:-1] - cuts_before_row[row[:-1]]
    used = (row[:-1] < b) & (part[:-1] < parts)
    plan = _columns(used, row[:-1], tile[:-1], last_row, last_tile, first_split)
    return plan, torch.arange(b + 1, device=device) + cuts_before_row[: b + 1]


# ------------------------------------------------------------------------------------------------ batch-invariant plans
#
# A row's result then depends on nothing but the row. It is cut into units of C tiles, C by its length alone; every unit
# starts from empty accumulators and ends normalised; and results are merged two by two in a tree that the number of
# units fixes: node i of level l is that of units i * 2^l .. (i + 1) * 2^l - 1, merged from nodes 2 i and 2 i + 1 of the
# level below, or the first of these where the row ends before the second. Parts begin and end between units, wherever
# that balances them: a part merges the nodes that lie in it as a whole, and leaves those of a row that it does not have
# alone, log2(MAX_UNITS) at most at either end, to whoever merges the parts. Left to right, one after the other, would
# be no such tree: then a part that goes on with a row could merge nothing, and would leave every unit.

# The tiles of a unit, from those of its row: a quarter of them, from FEWEST_TILES to UNIT_TILES, so that short rows too
# keep a few workers busy; since each unit costs its merge, FEWEST_TILES less than an eighth of longer rows (beyond 96
# and 128 tiles: 12 and 16), up to twice UNIT_TILES; or what MAX_UNITS asks for. Few sizes rather than one for each row:
# then parts of as many units are about as long. With up to FEW_HEADS = h_q / h_k a result is small, and units are half
# as long.
FEWEST_TILES, UNIT_TILES = 4, 8
FEW_HEADS = 16
MAX_UNITS = 128  # of a row with few heads, half of that with more: as many workers as one row keeps busy
# Bit of FLAGS; the bits above are the part's first place for the nodes that it leaves. In the plan's row MAX_PARTS,
# which is empty otherwise, they are the number of places that all parts use.
INVARIANT = 1
WORKSPACE_TILES = 1024  # places in a GPU's workspace, for all row tiles together
# Parts of up to so many rows or blocks, with so many units together, may be filled (_cuts_filled). Beyond that a unit
# is too little of a part's load for it to be worth anything.
FILLED_BLOCKS, FILLED_UNITS = 512, 4096
BOUNDS = 8  # that are tried


def is_invariant(metadata: Tensor) -> bool:
    return metadata.shape[0] == MAX_PARTS + 1


def places(num_row_tiles: int) -> int:
    """What a row tile has in the workspace: with very many row tiles none, so that every row is whole."""
    return WORKSPACE_TILES // num_row_tiles


def unit_tiles(tiles, few_heads: bool):
    """C, the tiles of a unit of a row of so many (an int or a tensor of them). Even with many heads, since the sm90
    backend's tiles alternate between two places in shared memory there."""
    quarter, fours, least = (-(-tiles // n) for n in (4, 8 * FEWEST_TILES, MAX_UNITS // 2))
    eighth = (fours - 1) * FEWEST_TILES
    if isinstance(tiles, Tensor):
        each = quarter.clamp(FEWEST_TILES, UNIT_TILES).maximum(eighth.clamp_max(2 * UNIT_TILES)).maximum(least)
    else:
        each = max(FEWEST_TILES, min(UNIT_TILES, quarter), min(2 * UNIT_TILES, eighth), least)
    half = (each + 1) // 2
    return half if few_heads else 2 * half


def nodes_left(begin: Tensor, end: Tensor, units: Tensor) -> Tensor:
    """Nodes that units begin .. end - 1 of a row of `units` leave: the greatest that lie in them. 0 for the whole row.

    Up to the last multiple of the greatest power of two that the range crosses, and from there on, there is one node
    for each bit of the distance.
    """
    powers = 2 ** torch.arange(MAX_UNITS.bit_length(), device=begin.device)
    bits = (torch.arange(2 * MAX_UNITS + 1, device=begin.device)[:, None] // powers % 2).sum(1)
    # the row's last node is whole, however few units it has: the greatest with the last unit that begins in the range
    last = _greatest_crossed(begin - 1, units - 1, powers)
    whole = (units - 1).clamp_min(0) // last.clamp_min(1) * last + last
    end, all_units = torch.where(end == units, whole, end), (begin == 0) & (end == units)
    crossed = _greatest_crossed(begin, end, powers)
    middle = end // crossed.clamp_min(1) * crossed
    left = bits[(middle - begin).clamp_min(0)] + bits[(end - middle).clamp_min(0)]
    return torch.where((begin >= end) | all_units, 0, left)


def _greatest_crossed(low: Tensor, high: Tensor, powers: Tensor) -> Tensor:
    """The greatest of `powers` that divides a number in low + 1 .. high; 0 of no number."""
    crossed = low[..., None].div(powers, rounding_mode="floor") < high[..., None].div(powers, rounding_mode="floor")
    return torch.where(crossed, powers, 0).amax(-1)


def make_invariant_plan(
    cache_seqlens: Tensor,
    num_parts: int,
    places: int,
    num_heads_per_head_k: int = ROW_TILE,
    blocks_of_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Deals rows of the given lengths to at most `num_parts` parts, cut between units only, in the best of three ways.

    By cost: the cuts are those of make_plan on its line, at equal distances.

    By units: every part has as many, ceil(units of all rows / num_parts); a row without tiles counts as one. Where
    parts have only a few that is more even, and often puts cuts where the nodes between them are large.

    Filled: each part takes as many units, from where the last one ended, as a bound on its load allows. The others'
    cuts move back to where a unit begins, so that a part may have a unit more than it need have.

    Cuts of each way move to a multiple of g units in their row, at or before where they stand; g is for each way the
    least power of two with which parts leave at most `places` nodes. It is the way whose greatest load of a part, its
    tiles + a row's cost for each row it touches, is then least; of equals by units, then by cost.

    Whether there are few heads cannot be told from s_q * h_q / h_k if that is more than FEW_HEADS. Units are then taken
    to be long: a short unit begins wherever a long one does, and where parts begin and end between long ones they leave
    as many nodes of either.

    Args:
        cache_seqlens: [b] int32, keys in each row; negative counts as 0.
        num_parts: 1 to MAX_PARTS.
        places: what a row tile has in the workspace.
        num_heads_per_head_k: s_q * h_q / h_k; of uneven queries h_q / h_k.
        blocks_of_rows: of uneven queries row_blocks(..., batch_invariant=True), [b] int64. Each counts as a row above.
    Returns:
        tile_scheduler_metadata [MAX_PARTS + 1, 8] int32, num_splits [b + 1] int32.
    """
    b, device = cache_seqlens.shape[0], cache_seqlens.device
    if b == 0:
        metadata = torch.zeros(MAX_PARTS + 1, COLUMNS, dtype=torch.int32, device=device)
        metadata[:, LAST_ROW] = -1
        metadata[-1, FLAGS] = INVARIANT
        return metadata, torch.zeros(1, dtype=torch.int32, device=device)
    tiles = (cache_seqlens.clamp_min(0).long() + (TILE - 1)) // TILE
    each = unit_tiles(tiles, num_heads_per_head_k <= FEW_HEADS)
    units = (tiles + each - 1) // each
    cost, blocks = ROW_COST, _Blocks(b, blocks_of_rows, device)
    line = _Line(tiles + cost, blocks)
    line_of_units = _Line(units.clamp_min(1), blocks)
    ways = [_cuts_by_units(line_of_units, num_parts), _cuts_by_cost(line, each, num_parts, cost)]
    if b <= FILLED_BLOCKS or blocks_of_rows is not None:
        ways.append(_cuts_filled(line, line_of_units, each, num_parts, cost))
    block, unit = (torch.stack(t)[:, None] for t in zip(*ways, strict=True))  # [way, 1, MAX_PARTS + 1]

    # as (block, unit), for every g: [way, of g, MAX_PARTS + 1]
    coarse = (2 ** torch.arange(MAX_UNITS.bit_length(), device=device))[:, None]
    unit = unit // coarse * coarse
    block, unit = _without_empty(block.expand_as(unit), unit)
    row = blocks.row(block)
    first, first_units = (block[..., :-1], unit[..., :-1]), units[row[..., :-1].clamp_max(b - 1)]
    last, last_units = _ends(block[..., 1:], unit[..., 1:], blocks, units)
    alone = first[0] == last[0]
    leaves = nodes_left(first[1], torch.where(alone, last[1], first_units), first_units)
    leaves = leaves + torch.where(alone, 0, nodes_left(torch.zeros_like(last[1]), last[1], last_units))
    leaves = leaves * (first[0] < blocks.number)
    finest = (leaves.sum(-1) > places).sum(1)  # of each way; nodes become fewer as g grows, to 0
    begin = line.begin(block, row) + unit * each[row.clamp_max(b - 1)]  # but for the cost of its row
    load = (begin[..., 1:] + cost * (unit[..., 1:] > 0) - begin[..., :-1]).amax(-1)
    way = torch.arange(len(ways), device=device)
    way = (load.gather(1, finest[:, None])[:, 0] * len(ways) + way).argmin()  # the first of equals
    chosen = way * len(coarse) + finest.index_select(0, way[None])[0]
    made = (*first, *last, leaves)
    block, unit, last_block, last_unit, leaves = (t.flatten(0, 1).index_select(0, chosen[None])[0] for t in made)

    used = block < blocks.number
    row, last_row = blocks.row(block).clamp_max(b - 1), blocks.row(last_block).clamp(0, b - 1)
    last_tiles = torch.minimum(last_unit * each[last_row], tiles[last_row])
    cuts_inside = _sums((unit > 0).long())
    first_split = cuts_inside[1:] - cuts_inside[torch.searchsorted(block, block)]
    flags = INVARIANT + 2 * (leaves.cumsum(0) - leaves)
    columns = [row, unit * each[row], last_row + 1, last_tiles, first_split, flags]
    columns += [blocks.in_row(block, row), blocks.in_row(last_block, last_row)]
    plan = torch.zeros(MAX_PARTS + 1, COLUMNS, dtype=torch.long, device=device)
    plan[:-1] = torch.stack(columns, 1) * used[:, None]
    plan[:, LAST_ROW] -= 1
    plan[-1, FLAGS] = INVARIANT + 2 * leaves.sum()
    return plan.int(), (blocks.before + cuts_inside[torch.searchsorted(block, blocks.before)]).int()


def _sums(of: Tensor) -> Tensor:
    """The sum of those before each, and of all."""
    return torch.cat([of.new_zeros(1), of.cumsum(0)])


class _Blocks:
    """The blocks of all rows, numbered through. A row has of_rows[r] of them; None: it is one."""

    def __init__(self, b: int, of_rows: Tensor | None, device: torch.device):
        self.of_rows = of_rows
        self.before = torch.arange(b + 1, device=device) if of_rows is None else _sums(of_rows)
        self.number = b if of_rows is None else self.before[-1]

    def row(self, block: Tensor) -> Tensor:
        """Each one's. The number after the last block has row b, that before the first one -1 or 0."""
        return block if self.of_rows is None else torch.searchsorted(self.before[1:], block, right=True)

    def in_row(self, block: Tensor, row: Tensor) -> Tensor:
        """Its number among those of its row."""
        return torch.zeros_like(block) if self.of_rows is None else block - self.before[row]


class _Line:
    """Blocks end to end, each as long as its row says."""

    def __init__(self, length: Tensor, blocks: _Blocks):
        self.length, self.blocks = length, blocks
        self.before = _sums(length if blocks.of_rows is None else length * blocks.of_rows)  # of rows
        self.end = self.before[-1]

    def begin(self, block: Tensor, row: Tensor) -> Tensor:
        if self.blocks.of_rows is None:
            return self.before[row]
        return self.before[row] + self.blocks.in_row(block, row) * self._length(row)

    def find(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block that each position lies in, its row, and the distance from its beginning. At the line's end the
        number after the last block, row b, 0."""
        row = torch.searchsorted(self.before[1:], position, right=True)
        inside = position - self.before[row]
        if self.blocks.of_rows is None:
            return row, row, inside
        length = self._length(row)
        return self.blocks.before[row] + inside // length, row, inside % length

    def _length(self, row: Tensor) -> Tensor:
        return self.length[row.clamp_max(len(self.length) - 1)]


def _cuts_by_cost(line: _Line, each: Tensor, num_parts: int, row_cost: int) -> tuple[Tensor, Tensor]:
    """Block and unit of MAX_PARTS + 1 cuts at equal distances on the line of cost, the last ones at its end."""
    parts = (line.end // (MIN_TILES + row_cost)).clamp(1, num_parts)
    position = torch.arange(MAX_PARTS + 1, device=each.device).minimum(parts) * line.end // parts
    block, row, inside = line.find(position)
    return block, (inside - row_cost).clamp_min(0) // each[row.clamp_max(len(each) - 1)]


def _cuts_by_units(line: _Line, num_parts: int) -> tuple[Tensor, Tensor]:
    """The same with as many units between each two; blocks have one or more."""
    apart = _ceil_div(line.end, num_parts)
    position = (torch.arange(MAX_PARTS + 1, device=line.end.device) * apart).minimum(line.end)
    block, _, unit = line.find(position)
    return block, unit


def _cuts_filled(
    line: _Line, line_of_units: _Line, each: Tensor, num_parts: int, row_cost: int
) -> tuple[Tensor, Tensor]:
    """The same with parts that take as many units as a bound on their load allows: the least of a few bounds with which
    num_parts of them suffice. A single part, which is no better than another way, where none does or there are more
    blocks or units than may be.

    No load can be less than its share of the line, or than that of the longest unit. From the greater of these on,
    BOUNDS bounds reach half a unit further, which mostly suffices.
    """
    end, device = line_of_units.end, each.device
    # cut i stands before unit i of all, the last ones at the end
    block, row, unit = line_of_units.find(torch.arange(FILLED_UNITS + 1, device=device).minimum(end))
    begin = line.begin(block, row) + unit * each[row.clamp_max(len(each) - 1)]  # of a part that begins there
    stop = begin + row_cost * (unit > 0)  # of one that ends there; a load is the distance
    longest = (stop[1:] - begin[:-1]).amax()
    least = _ceil_div(line.end, num_parts).maximum(longest)
    bounds = least + torch.arange(BOUNDS, device=device)[:, None] * _ceil_div(longest, 2 * (BOUNDS - 1))

    # where 1, 2, 4, ... parts end, from each cut on; so the first 1, 2, 4, ... cuts give twice as many
    further = torch.searchsorted(stop, begin + bounds, right=True) - 1
    cuts = torch.zeros(BOUNDS, 1, dtype=torch.long, device=device)
    for _ in range(num_parts.bit_length()):
        cuts = torch.cat([cuts, further.gather(1, cuts)], 1)
        further = further.gather(1, further)
    bound = (cuts[:, num_parts] < end).sum()  # with a greater one a part ends no earlier
    part = torch.arange(MAX_PARTS + 1, device=device)
    cuts = cuts.index_select(0, bound.clamp_max(BOUNDS - 1)[None])[0, part.clamp_max(num_parts)]
    filled = (bound < BOUNDS) & (end <= FILLED_UNITS) & (line.blocks.number <= FILLED_BLOCKS)
    block, _, unit = line_of_units.find(torch.where(filled, cuts, part * end).minimum(end))
    return block, unit


def _without_empty(block: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts [..., MAX_PARTS + 1] in order, of which some are the same: each once, and then the last one."""
    cut = block * (2 * MAX_UNITS) + unit
    place = torch.zeros_like(cut)
    place[..., 1:] = (cut[..., 1:] != cut[..., :-1]).cumsum(-1)
    cut = cut[..., -1:].expand_as(cut).scatter(-1, place, cut)
    return cut // (2 * MAX_UNITS), cut % (2 * MAX_UNITS)


def _ends(block: Tensor, unit: Tensor, blocks: _Blocks, units: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The last block of a part that ends at a cut, its last unit, exclusive, and its units: at a block's start the one
    before ends."""
    last = block - (unit == 0).long()
    its_units = units[blocks.row(last).clamp(0, len(units) - 1)]
    return (last, torch.where(unit == 0, its_units, unit)), its_units


# ------------------------------------------------------------------------------------------------------ uneven queries
#
# With cu_seqlens_q row r has its own number of queries, cu_seqlens_q[r + 1] - cu_seqlens_q[r], and its query rows of a
# key head (queries * h_q / h_k of them, in the order (query, h_q / h_k)) are dealt to blocks of as many row tiles as
# one query fills: ROW_TILE * ceil(h_q / h_k / ROW_TILE) query rows. So there are h_k * ceil(h_q / h_k / ROW_TILE) row
# tiles to a part, and those of one query read its keys at one time. A block is planned like a row of its own, of the
# same keys: one that has more blocks is no longer work for one part, and one without queries is none at all. Under a
# batch-invariant plan a block of up to FEW_BLOCK heads has as many query rows, whatever max_seqlen_q is.
#
# FIRST_ROW_TILE and LAST_ROW_TILE count blocks: a part covers the blocks from FIRST_ROW_TILE of FIRST_ROW to
# LAST_ROW_TILE of LAST_ROW; FIRST_TILE, FIRST_SPLIT and LAST_TILE are of the first and the last of them. num_splits
# counts the splits of all of a row's blocks. make_invariant_plan takes rows' blocks itself.


FEW_BLOCK = 32


def rows_of_block(group: int, batch_invariant: bool = False) -> int:
    """Query rows of a key head in a block, group = h_q / h_k."""
    return FEW_BLOCK if batch_invariant and group <= FEW_BLOCK else ROW_TILE * row_tiles(group, 1)


def row_blocks(cu_seqlens_q: Tensor, max_seqlen_q: int, group: int, batch_invariant: bool = False) -> Tensor:
    """[b] int64, the blocks of each row. Differences below 0 count as 0, those above max_seqlen_q as that."""
    queries = cu_seqlens_q.long().diff().clamp(0, max_seqlen_q)
    size = rows_of_block(group, batch_invariant)
    return (queries * group + (size - 1)) // size


def plan_blocks(make, cache_seqlens: Tensor, blocks: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The plan that make(lengths, *args) makes for rows that have so many blocks each. Waits for their number."""
    row = torch.repeat_interleave(blocks)  # of each block
    plan, num_splits = make(cache_seqlens[row], *args)
    end = blocks.cumsum(0)
    if row.numel():
        used = plan[:, LAST_ROW] >= 0
        for row_column, tile_column in ((FIRST_ROW, FIRST_ROW_TILE), (LAST_ROW, LAST_ROW_TILE)):
            block = plan[:, row_column].clamp_min(0).long()
            of = row[block]
            plan[:, tile_column] = (block - (end - blocks)[of]).int() * used
            plan[:, row_column] = torch.where(used, of.int(), plan[:, row_column])
    return plan, num_splits[torch.cat([end.new_zeros(1), end])]
