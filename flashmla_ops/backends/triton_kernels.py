"""The Triton backend's kernels, one section an op; triton.py launches them. Importing this module imports triton.

Strides come in units of 16 bytes, since the contract makes them multiples of that: so the compiler knows that rows are
aligned and loads whole vectors, whatever the numbers are, and nothing is compiled again when they change. For the same
reason no size is specialised upon. What depends on a page, a row or a token times a stride is computed in 64 bits.
"""

import triton
import triton.language as tl

from .. import kv_cache as _kv_cache
from .. import plan as _plan
from ..kv_cache import Fp8Blocks

INTERPRETED = triton.knobs.runtime.interpret  # by TRITON_INTERPRET=1: kernels then run on CPU tensors, in numpy

TILE = tl.constexpr(_plan.TILE)
MAX_PARTS = tl.constexpr(_plan.MAX_PARTS)
COLUMNS = tl.constexpr(_plan.COLUMNS)
FIRST_ROW = tl.constexpr(_plan.FIRST_ROW)
FIRST_TILE = tl.constexpr(_plan.FIRST_TILE)
LAST_ROW = tl.constexpr(_plan.LAST_ROW)
LAST_TILE = tl.constexpr(_plan.LAST_TILE)
FIRST_SPLIT = tl.constexpr(_plan.FIRST_SPLIT)
FLAGS = tl.constexpr(_plan.FLAGS)
FIRST_ROW_TILE = tl.constexpr(_plan.FIRST_ROW_TILE)
LAST_ROW_TILE = tl.constexpr(_plan.LAST_ROW_TILE)
MIN_TILES = tl.constexpr(_plan.MIN_TILES)
FEWEST_TILES = tl.constexpr(_plan.FEWEST_TILES)
UNIT_TILES = tl.constexpr(_plan.UNIT_TILES)
FEW_HEADS = tl.constexpr(_plan.FEW_HEADS)
MAX_UNITS = tl.constexpr(_plan.MAX_UNITS)
OWN_PLACES = tl.constexpr(_plan.MAX_UNITS.bit_length() - 1)  # nodes of a row that wait at once for one that is to come
SHARES_PER_TILE = tl.constexpr(_plan.SHARES_PER_TILE)
PLAIN, FP8_BLOCKS, FP8_TENSOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # a cache's format: kv_cache.py's
SCALE_BLOCK = tl.constexpr(Fp8Blocks.block)
SMALLEST_SCALE = tl.constexpr(_kv_cache.SMALLEST_SCALE)
E4M3_MAX = tl.constexpr(_kv_cache.E4M3_MAX)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
INF_BITS = tl.constexpr(0x7F800000)  # of fp32; those of finite magnitudes are less and order like the values


# ------------------------------------------------------------------------------------------------- get_mla_metadata
#
# The planner of plan.py, by one program. Of rows on a line of cost, cut p stands at floor(p * total / parts), so x has
# ceil(x * parts / total) cuts below it: what plan.py counts by sorting is arithmetic here. Only which row a cut falls
# into is searched.


@triton.jit
def _tiles_of(cache_seqlens, row, b):
    length = tl.maximum(tl.load(cache_seqlens + row, mask=row < b, other=0), 0)
    return (length // TILE + (length % TILE != 0)).to(tl.int64)


@triton.jit
def _cut_position(cut, total, parts):
    return tl.minimum(cut, parts) * total // parts


@triton.jit
def _cuts_below(x, total, parts):
    return (x * parts + total - 1) // total


@triton.jit
def _cut(cut, row_end, b, half, total, parts, row_cost):
    """The row and the tile that each cut stands at, and the first of its row's cuts and whether that starts the row."""
    position = _cut_position(cut, total, parts)
    row = tl.zeros_like(cut)  # rows that end at or before the position: a binary search
    step = half
    while step > 0:
        behind = row + step <= b
        end = tl.load(row_end + row + step - 1, mask=behind, other=0)
        row += tl.where(behind & (end <= position), step, 0)
        step = step // 2
    known = row < b
    begin = tl.load(row_end + row - 1, mask=known & (row > 0), other=0)
    tile = tl.where(known, tl.maximum(position - begin - row_cost, 0), 0)
    first = _cuts_below(begin, total, parts)
    return row, tile, first, _cut_position(first, total, parts) <= begin + row_cost


@triton.jit
def _write_parts(plan, used, first_row, first_tile, last_row, last_tile, first_split):
    columns = plan + tl.arange(0, MAX_PARTS) * COLUMNS
    for column in tl.static_range(FIRST_SPLIT + 1, COLUMNS):
        tl.store(columns + column, tl.zeros([MAX_PARTS], tl.int32))
    tl.store(columns + FIRST_ROW, tl.where(used, first_row, 0).to(tl.int32))
    tl.store(columns + FIRST_TILE, tl.where(used, first_tile, 0).to(tl.int32))
    tl.store(columns + LAST_ROW, tl.where(used, last_row, -1).to(tl.int32))
    tl.store(columns + LAST_TILE, tl.where(used, last_tile, 0).to(tl.int32))
    tl.store(columns + FIRST_SPLIT, tl.where(used, first_split, 0).to(tl.int32))


@triton.jit
def _parts_if_alike(most, least, room):
    """Into how many parts rows of `least` to `most` tiles would be cut, `room` at most."""
    worth = tl.maximum(tl.sqrt(most.to(tl.float32) / SHARES_PER_TILE).to(tl.int64), 1)  # tiles; rounded up:
    while SHARES_PER_TILE * worth * worth < most:
        worth += 1
    return tl.maximum(tl.minimum(tl.minimum((most + worth - 1) // worth, least), room), 1)


@triton.jit(do_not_specialize=["b", "num_parts", "row_cost", "half"])
def get_mla_metadata_kernel(
    plan,  # [MAX_PARTS, COLUMNS]
    num_splits,  # [b + 1]
    row_end,  # [b] int64, scratch: where each row ends on the line of cost
    cache_seqlens,  # [b]
    b,
    num_parts,
    row_cost,
    half,  # the greatest power of two up to b, 0 for 0
    BLOCK: tl.constexpr,
):
    total = tl.zeros([], tl.int64)
    most = tl.zeros([], tl.int64)
    least = tl.full([], 1 << 40, tl.int64)
    for start in range(0, b, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tiles = _tiles_of(cache_seqlens, row, b)
        cost = tl.where(row < b, tiles + row_cost, 0)
        tl.store(row_end + row, total + tl.cumsum(cost, 0), mask=row < b)
        total += tl.sum(cost, 0)
        most = tl.maximum(most, tl.max(tiles, 0))
        least = tl.minimum(least, tl.min(tl.where(row < b, tiles, 1 << 40), 0))
    parts = tl.minimum(tl.maximum(total // (MIN_TILES + row_cost), 1), num_parts)
    total = tl.maximum(total, 1)
    tl.debug_barrier()  # row_end is read by other threads than wrote it

    per_row = _parts_if_alike(most, least, num_parts // tl.maximum(b, 1))
    alike = (most + per_row - 1) // per_row <= (total + parts - 1) // parts
    alike = alike & (b > 0) & (b <= num_parts)
    part = tl.arange(0, MAX_PARTS).to(tl.int64)
    if alike:
        row, split = part // per_row, part % per_row
        tiles = _tiles_of(cache_seqlens, row, b)
        end = (split + 1) * tiles // per_row
        _write_parts(plan, row < b, row, split * tiles // per_row, row, end, split)
        for start in range(0, b + 1, BLOCK):
            some = start + tl.arange(0, BLOCK)  # a name of its own: Triton's variables keep their types in loops
            tl.store(num_splits + some, (some * per_row).to(tl.int32), mask=some <= b)
    else:
        tl.store(num_splits, 0)
        splits = tl.zeros([], tl.int64)
        for start in range(0, b, BLOCK):
            row = start + tl.arange(0, BLOCK)
            end = tl.load(row_end + row, mask=row < b, other=0)
            begin = end - _tiles_of(cache_seqlens, row, b) - row_cost
            first, after = _cuts_below(begin, total, parts), _cuts_below(end, total, parts)
            starts = (first < after) & (_cut_position(first, total, parts) <= begin + row_cost)
            shares = tl.where(row < b, 1 + after - first - starts.to(tl.int64), 0)
            tl.store(num_splits + 1 + row, (splits + tl.cumsum(shares, 0)).to(tl.int32), mask=row < b)
            splits += tl.sum(shares, 0)

        row, tile, first, starts = _cut(part, row_end, b, half, total, parts, row_cost)
        next_row, next_tile, _, _ = _cut(part + 1, row_end, b, half, total, parts, row_cost)
        whole = next_tile == 0  # the next part starts with a row of its own
        last_row = tl.where(whole, next_row - 1, next_row)
        last_tile = tl.where(whole, _tiles_of(cache_seqlens, tl.maximum(last_row, 0), b), next_tile)
        split = part - first + tl.where(starts, 0, 1)
        _write_parts(plan, (row < b) & (part < parts), row, tile, last_row, last_tile, split)


# Of uneven queries: rows that have blocks (plan.py), of which each counts as a row.


@triton.jit
def _blocks_of(cu_seqlens_q, row, b, max_seqlen_q, group, block_rows):
    begin = tl.load(cu_seqlens_q + row, mask=row < b, other=0).to(tl.int64)
    end = tl.load(cu_seqlens_q + row + 1, mask=row < b, other=0).to(tl.int64)
    queries = tl.minimum(tl.maximum(end - begin, 0), max_seqlen_q)
    return (queries * group + block_rows - 1) // block_rows


@triton.jit
def _passed(ends, value, b, half, STRICT: tl.constexpr):
    """How many of b ends, in order, are at most (STRICT: below) each value: a binary search."""
    count = tl.zeros_like(value)
    step = half
    while step > 0:
        behind = count + step <= b
        end = tl.load(ends + count + step - 1, mask=behind, other=0)
        passed = end < value if STRICT else end <= value
        count += tl.where(behind & passed, step, 0)
        step = step // 2
    return count


@triton.jit
def _end_before(ends, row, b):
    return tl.load(ends + row - 1, mask=(row > 0) & (row <= b), other=0)


@triton.jit
def _cut_of_blocks(cut, row_end, cache_seqlens, b, half, total, parts, row_cost):
    """The row, block and tile that each cut stands at, where that row begins, and the first cut in the block."""
    position = _cut_position(cut, total, parts)
    row = _passed(row_end, position, b, half, False)
    begin = _end_before(row_end, row, b)
    each = _tiles_of(cache_seqlens, row, b) + row_cost
    known = row < b
    block = tl.where(known, (position - begin) // each, 0)
    tile = tl.where(known, tl.maximum(position - begin - block * each - row_cost, 0), 0)
    return row, block, tile, begin, _cuts_below(begin + block * each, total, parts)


@triton.jit
def _write_blocks(plan, used, first_block, last_block):
    columns = plan + tl.arange(0, MAX_PARTS) * COLUMNS
    tl.store(columns + FIRST_ROW_TILE, tl.where(used, first_block, 0).to(tl.int32))
    tl.store(columns + LAST_ROW_TILE, tl.where(used, last_block, 0).to(tl.int32))


@triton.jit(do_not_specialize=["b", "num_parts", "row_cost", "half", "max_seqlen_q", "group", "block_rows"])
def get_mla_metadata_uneven_kernel(
    plan,  # [MAX_PARTS, COLUMNS]
    num_splits,  # [b + 1]
    row_end,  # [b] int64, scratch: where each row ends on the line of cost,
    block_end,  # [b] int64, scratch: in blocks,
    starting_before,  # [MAX_PARTS + 1] int64, scratch: cuts before each that do not split a block
    cache_seqlens,  # [b]
    cu_seqlens_q,  # [b + 1]
    b,
    max_seqlen_q,
    group,  # h_q / h_k
    block_rows,  # query rows of a block
    num_parts,
    row_cost,
    half,  # the greatest power of two up to b, 0 for 0
    BLOCK: tl.constexpr,
):
    total = tl.zeros([], tl.int64)
    all_blocks = tl.zeros([], tl.int64)
    most = tl.zeros([], tl.int64)
    least = tl.full([], 1 << 40, tl.int64)
    for start in range(0, b, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tiles = _tiles_of(cache_seqlens, row, b)
        blocks = _blocks_of(cu_seqlens_q, row, b, max_seqlen_q, group, block_rows)
        cost = blocks * (tiles + row_cost)
        tl.store(row_end + row, total + tl.cumsum(cost, 0), mask=row < b)
        tl.store(block_end + row, all_blocks + tl.cumsum(blocks, 0), mask=row < b)
        total += tl.sum(cost, 0)
        all_blocks += tl.sum(blocks, 0)
        most = tl.maximum(most, tl.max(tl.where(blocks > 0, tiles, 0), 0))
        least = tl.minimum(least, tl.min(tl.where(blocks > 0, tiles, 1 << 40), 0))
    parts = tl.minimum(tl.maximum(total // (MIN_TILES + row_cost), 1), num_parts)
    total = tl.maximum(total, 1)
    tl.debug_barrier()  # what was stored is read by other threads than stored it

    per_block = _parts_if_alike(most, least, num_parts // tl.maximum(all_blocks, 1))
    alike = (most + per_block - 1) // per_block <= (total + parts - 1) // parts
    alike = alike & (all_blocks > 0) & (all_blocks <= num_parts)
    part = tl.arange(0, MAX_PARTS).to(tl.int64)
    tl.store(num_splits, 0)
    if alike:
        row = _passed(block_end, part // per_block, b, half, False)
        block, split = part // per_block - _end_before(block_end, row, b), part % per_block
        tiles = _tiles_of(cache_seqlens, row, b)
        end = (split + 1) * tiles // per_block
        _write_parts(plan, row < b, row, split * tiles // per_block, row, end, split)
        _write_blocks(plan, row < b, block, block)
        for start in range(0, b, BLOCK):
            some = start + tl.arange(0, BLOCK)  # a name of its own: Triton's variables keep their types in loops
            blocks = tl.load(block_end + some, mask=some < b, other=0)
            tl.store(num_splits + 1 + some, (blocks * per_block).to(tl.int32), mask=some < b)
    else:
        row, block, tile, _, first = _cut_of_blocks(part, row_end, cache_seqlens, b, half, total, parts, row_cost)
        used = (row < b) & (part < parts)
        starting = used & (tile == 0)
        tl.store(starting_before + 1 + part, tl.cumsum(starting.to(tl.int64), 0))
        tl.store(starting_before, 0)
        tl.debug_barrier()
        for start in range(0, b, BLOCK):
            some = start + tl.arange(0, BLOCK)
            cuts = _cuts_below(tl.load(row_end + some, mask=some < b, other=0), total, parts)
            splits = tl.load(block_end + some, mask=some < b, other=0) + cuts - tl.load(starting_before + cuts)
            tl.store(num_splits + 1 + some, splits.to(tl.int32), mask=some < b)

        next_row, next_block, next_tile, next_begin, _ = _cut_of_blocks(
            part + 1, row_end, cache_seqlens, b, half, total, parts, row_cost
        )
        # the next part starts with a block of its own; with a row's, if there are rows above that have none
        whole = next_tile == 0
        above = _passed(row_end, next_begin, b, half, True)
        last_row = tl.where(whole & (next_block == 0), above, next_row)
        blocks = _blocks_of(cu_seqlens_q, last_row, b, max_seqlen_q, group, block_rows)
        last_block = tl.where(whole, tl.where(next_block == 0, blocks, next_block) - 1, next_block)
        last_tile = tl.where(whole, _tiles_of(cache_seqlens, last_row, b), next_tile)
        # of a block's cuts only the first one may not split it
        split = tl.where(tile == 0, 0, part - first + 1 - (_first_starts(first, part, starting_before)))
        _write_parts(plan, used, row, tile, last_row, last_tile, split)
        _write_blocks(plan, used, block, last_block)


@triton.jit
def _first_starts(first, part, starting_before):
    return tl.load(starting_before + tl.minimum(first, part) + 1) - tl.load(starting_before + tl.minimum(first, part))


# -------------------------------------------------------------------------------------------------- fwd_kvcache_mla
#
#   out = softmax(softmax_scale * q k^T) v,   lse = log(sum(exp(softmax_scale * q k^T)))
#
# A key is D_V latent values, which are the value too, and D_R further ones. Both are padded with zeros to powers of
# two; of the latter, BLOCK_R are multiplied at a time.
#
# Work. A row block is BLOCK_M query rows of one key head, in the order (s_q, h_q / h_k). A program has a row block and
# every so manyth part of the plan, and walks the part's rows of the batch; of each it sees a segment of tiles of keys.
#
# Shares. A row that the plan splits has a share in each of its parts: a normalised partial output and its base-2 lse.
# Part p has two places for them: 2 p for its first row, if an earlier part began that, and 2 p + 1 for its last, if a
# later one ends it. fwd_kvcache_mla_combine_kernel merges them in the order of the parts, so results repeat bitwise. A
# plan that uses more parts than there are places for is executed unsplit: each row by the part with its first tile.
#
# A batch-invariant plan (plan.py) cuts rows into units, whose results are merged two by two in a tree. A program goes
# through a part's units in order, merges each with the nodes that it completes, and stores what that gives: nodes that
# the part leaves in places of the plan, others in OWN_PLACES of the program's own. What is left is merged by
# fwd_kvcache_mla_merge_nodes_kernel. A node is fp32, [BLOCK_M, D_V] and its lse. Both kernels round alike: products
# and sums that a compiler may fuse in two ways are fused by hand.
#
# Safety. Lengths clamp to what the block table reaches, pages outside the cache read as zeros, rows of the cache past a
# segment's keys are never read. What the plan says is clamped to the batch and to each row's tiles.


@triton.jit
def _parts_used(plan):
    part = tl.arange(0, MAX_PARTS)
    first_row, last_row = tl.load(plan + part * COLUMNS + FIRST_ROW), tl.load(plan + part * COLUMNS + LAST_ROW)
    return tl.max(tl.where(last_row >= first_row, part + 1, 0), 0)


@triton.jit
def _first_of(plan, part, mask):
    """Where a part begins: never before the batch, nor inside of a row before it."""
    row = tl.load(plan + part * COLUMNS + FIRST_ROW, mask=mask, other=-1)
    tile = tl.load(plan + part * COLUMNS + FIRST_TILE, mask=mask, other=0)
    return tl.maximum(row, 0), tl.where(row < 0, 0, tl.maximum(tile, 0))


@triton.jit
def _last_of(plan, part, b):
    row = tl.load(plan + part * COLUMNS + LAST_ROW)
    return tl.minimum(row, b - 1), tl.maximum(tl.load(plan + part * COLUMNS + LAST_TILE), 0)


@triton.jit
def _length_of(cache_seqlens, row, max_len):
    return tl.minimum(tl.maximum(tl.load(cache_seqlens + row), 0), max_len)


@triton.jit
def _units_of(tiles, group):
    """Of a row: the tiles of a unit, and the units."""
    each = tl.maximum(tl.minimum((tiles + 3) // 4, UNIT_TILES), FEWEST_TILES)
    eighth = ((tiles + 8 * FEWEST_TILES - 1) // (8 * FEWEST_TILES) - 1) * FEWEST_TILES
    each = tl.maximum(each, tl.minimum(eighth, 2 * UNIT_TILES))
    half = (tl.maximum(each, (tiles + MAX_UNITS // 2 - 1) // (MAX_UNITS // 2)) + 1) // 2
    each = tl.where(group <= FEW_HEADS, half, 2 * half)
    return each, (tiles + each - 1) // each


@triton.jit
def _highest_bit(x):
    """The greatest power of two up to x, for x of up to 9 bits."""
    x |= x >> 1
    x |= x >> 2
    x |= x >> 4
    x |= x >> 8
    return x - (x >> 1)


@triton.jit
def _count_bits(x):
    x -= x >> 1 & 0x55
    x = (x & 0x33) + (x >> 2 & 0x33)
    return (x + (x >> 4)) & 0xF


@triton.jit
def _count_nodes(begin, end):
    """Nodes that units begin .. end - 1 make: up to the last multiple of the greatest power of two that the range
    crosses, and from there on, one for each bit of the distance."""
    middle = end & -_highest_bit(tl.maximum(begin ^ end, 1))
    return tl.where(begin < end, _count_bits(middle - begin) + _count_bits(end - middle), 0)


@triton.jit
def _end_of_nodes(first, end, units):
    """Where the greatest nodes that lie in units first .. end - 1 end: the row's last one is whole, however few units
    it has."""
    size = _highest_bit(tl.maximum(((units - 1) ^ (first - 1)) & 0xFF, 1))  # of that one
    return tl.where(end < units, end, ((units - 1) & -size) + size)


@triton.jit
def _first_place(plan, part):
    """A part's, of a batch-invariant plan; of part MAX_PARTS the number of places that the plan uses."""
    return tl.load(plan + part * COLUMNS + FLAGS) >> 1 & 0x7FFFFFFF


@triton.jit
def _weights(left_lse, right_lse):
    """What two nodes count, by their lse, base 2, and the lse of both."""
    highest = tl.maximum(left_lse, right_lse)
    base_2 = tl.where(highest == -INF, 0.0, highest)
    left, right = tl.exp2(left_lse - base_2), tl.exp2(right_lse - base_2)
    total = left + right
    known = tl.where(total == 0, 1.0, total)  # NaN is something
    return left / known, right / known, tl.where(total == 0, -INF, highest + tl.log2(known))


@triton.jit
def _values(base, at, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of D values at base + at, zeros where `mask` is not set and beyond D."""
    column = tl.arange(0, BLOCK)
    return tl.load(base + at[:, None] + column[None, :], mask=mask[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _from_e4m3(byte):
    """Bytes of e4m3 as fp16, which has all its values: e4m3's bits in fp16's places are 2^-8 of the value. By integers,
    so that any GPU can, and so can the interpreter."""
    magnitude = byte.to(tl.uint16) & 0x7F
    bits = (byte.to(tl.uint16) & 0x80) << 8 | tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7)  # NaN stays NaN
    return bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256


@triton.jit
def _queries(q, at, real, D: tl.constexpr, BLOCK: tl.constexpr):
    queries = _values(q, at, real, D, BLOCK)
    if q.dtype.element_ty.primitive_bitwidth == 8:
        queries = _from_e4m3(queries)
    return queries


@triton.jit
def _latent(base, at, known, D_V: tl.constexpr, BLOCK_V: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The latent values of keys at base + at. With one scale for all they are left unscaled: exact in any dtype."""
    values = _values(base, at, known, D_V, BLOCK_V)
    if FORMAT != PLAIN:
        values = _from_e4m3(values)
    if FORMAT == FP8_BLOCKS:
        WIDTH: tl.constexpr = min(SCALE_BLOCK, BLOCK_V)
        SCALES: tl.constexpr = (D_V + WIDTH - 1) // WIDTH
        scales = (base + D_V).to(tl.pointer_type(tl.float32), bitcast=True)
        scale = _values(scales, at // 4, known, SCALES, BLOCK_V // WIDTH)
        blocks = values.to(tl.float32).reshape(at.shape[0], BLOCK_V // WIDTH, WIDTH) * scale[:, :, None]
        values = blocks.reshape(at.shape[0], BLOCK_V)
    return values.to(DTYPE)


@triton.jit
def _further(
    base,
    at,
    known,
    BEGIN: tl.constexpr,
    D_V: tl.constexpr,
    D_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The values D_V + BEGIN .. of keys at base + at: BLOCK_R of them, or those that are left."""
    if FORMAT == FP8_BLOCKS:
        SCALES: tl.constexpr = (D_V + SCALE_BLOCK - 1) // SCALE_BLOCK
        rope = (base + D_V + 4 * SCALES).to(tl.pointer_type(tl.int16), bitcast=True)
        bits = _values(rope, at // 2 + BEGIN, known, D_R - BEGIN, BLOCK_R)
        values = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)  # of bf16
    else:
        values = _values(base, at + D_V + BEGIN, known, D_R - BEGIN, BLOCK_R)
    if FORMAT == FP8_TENSOR:
        values = _from_e4m3(values)
    return values.to(DTYPE)


@triton.jit
def _segment(
    q,  # this batch row's
    q_at,  # [BLOCK_M] offsets of the query rows
    real,  # [BLOCK_M] whether there are such
    visible,  # [BLOCK_M] keys that each sees
    kv_cache,  # this key head's
    page_stride,
    token_stride,
    pages,  # this batch row's page numbers
    num_pages,
    page_size,
    begin,
    end,
    scale_log2,
    D_V: tl.constexpr,
    D_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    STAGES: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    NARROW: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Attends keys begin .. end - 1: (accumulated, greatest score, sum), all relative to that score, in base 2."""
    q_v = _queries(q, q_at, real, D_V, BLOCK_V)
    DTYPE: tl.constexpr = q_v.dtype
    if D_R > 0:
        q_r = _queries(q, q_at + D_V, real, D_R, BLOCK_R)
    m = tl.full([BLOCK_M], -INF, tl.float32)
    # of shared rows summed over keys after the loop: else warps would have to wait for each other in every step
    l = tl.zeros([BLOCK_M, BLOCK_N] if SHARED_ROWS else [BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    # 64 rows leave no registers for what could be computed before the loop
    CROWDED: tl.constexpr = SHARED_ROWS and BLOCK_M >= 64
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES, disable_licm=CROWDED):
        key = start + tl.arange(0, BLOCK_N)
        if ONE_PAGE:  # page sizes are multiples of BLOCK_N
            page = tl.load(pages + start // page_size)
            known = (key < end) & (page >= 0) & (page < num_pages)
            base = kv_cache + page.to(tl.int64) * page_stride
            if NARROW:
                base += start % page_size * token_stride
                at = tl.arange(0, BLOCK_N) * token_stride.to(tl.int32)
            else:
                at = (key - start // page_size * page_size) * token_stride
        else:
            page = tl.load(pages + key // page_size, mask=key < end, other=-1)
            known = (page >= 0) & (page < num_pages)
            base = kv_cache
            at = page.to(tl.int64) * page_stride + key % page_size * token_stride
        k_v = _latent(base, at, known, D_V, BLOCK_V, FORMAT, DTYPE)
        if D_R > 0:
            k_r = _further(base, at, known, 0, D_V, D_R, BLOCK_R, FORMAT, DTYPE)
        if CROWDED:
            # Of products that feed another one Triton gives all warps all columns: here half of them would compute
            # what the other half does. It does not see that through a branch, which has to be one that it cannot
            # resolve, with products on both sides, none of which feeds another.
            if start < end:  # always
                s = tl.dot(q_v, tl.trans(k_v), input_precision="ieee") * scale_log2
                if D_R > 0:
                    s += tl.dot(q_r, tl.trans(k_r), input_precision="ieee") * scale_log2
                for r in tl.static_range(BLOCK_R, D_R, BLOCK_R):  # of unusual dims: their queries are read every time
                    q_more = _queries(q, q_at + D_V + r, real, D_R - r, BLOCK_R)
                    k_more = _further(base, at, known, r, D_V, D_R, BLOCK_R, FORMAT, DTYPE)
                    s += tl.dot(q_more, tl.trans(k_more), input_precision="ieee") * scale_log2
            else:
                s = tl.dot(q_v, tl.trans(k_v), input_precision="ieee")
        else:
            s = tl.dot(q_v, tl.trans(k_v), input_precision="ieee")
            if D_R > 0:
                s = tl.dot(q_r, tl.trans(k_r), acc=s, input_precision="ieee")
            for r in tl.static_range(BLOCK_R, D_R, BLOCK_R):
                q_more = _queries(q, q_at + D_V + r, real, D_R - r, BLOCK_R)
                k_more = _further(base, at, known, r, D_V, D_R, BLOCK_R, FORMAT, DTYPE)
                s = tl.dot(q_more, tl.trans(k_more), acc=s, input_precision="ieee")
            s *= scale_log2
        hidden = key[None, :] >= tl.minimum(visible, end)[:, None]
        s = tl.where(hidden, -INF, s)
        m_new = tl.maximum(m, tl.max(s, 1))
        base_2 = tl.where(m_new == -INF, 0.0, m_new)  # no key seen so far: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2(s - base_2[:, None])
        rescale = tl.exp2(m - base_2)
        l = l * rescale[:, None] + p if SHARED_ROWS else l * rescale + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(DTYPE), k_v, acc=acc * rescale[:, None], input_precision="ieee")
        m = m_new
    if SHARED_ROWS:
        l = tl.sum(l, 1)  # noqa: E741
    return acc, m, l


@triton.jit
def _query_rows(
    first,
    queries,
    group,
    head_k,
    h_q,
    lse_stride,
    q_stride_s,
    q_stride_h,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
):
    """A program's query rows of a key head, from `first` on: their queries, whether they exist, and where they lie.

    Outputs lie at a 64-bit base, that of the first one's query, and 32-bit offsets (of 64 queries at most), which take
    half the registers.
    """
    query_row = first + tl.arange(0, BLOCK_M)
    real = query_row < queries * group
    i = query_row // group
    h = head_k * group + query_row % group
    q_at = i.to(tl.int64) * q_stride_s * UNIT + h.to(tl.int64) * q_stride_h * UNIT
    out_at = ((i - first // group) * h_q + h)[:, None] * D_V + tl.arange(0, BLOCK_V)[None, :]
    return i, real, q_at, out_at, h.to(tl.int64) * lse_stride + i


@triton.jit
def _queries_of(cu_seqlens_q, row, max_seqlen_q, total_q):
    """Where a row's queries begin, and how many there are."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + row), 0), total_q)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + row + 1), 0), total_q)
    return first.to(tl.int64), tl.minimum(tl.maximum(end - first, 0), max_seqlen_q)


@triton.jit
def _store_unclaimed(cu_seqlens_q, out, lse, b, total_q, h_q, D_V: tl.constexpr, BLOCK_V: tl.constexpr):
    """The results of queries that are no row's."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    claimed = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + b), 0), total_q)
    column = tl.arange(0, BLOCK_V)
    for query in range(claimed + program, total_q, tl.num_programs(0) * tl.num_programs(1)):
        query_64 = tl.cast(query, tl.int64)
        for h in range(0, h_q):
            zeros = tl.zeros([BLOCK_V], out.dtype.element_ty)
            tl.store(out + (query_64 * h_q + h) * D_V + column, zeros, mask=column < D_V)
            tl.store(lse + tl.cast(h, tl.int64) * total_q + query_64, INF)


@triton.jit(
    do_not_specialize=[
        *("q_stride_b", "q_stride_s", "q_stride_h", "page_stride", "token_stride", "head_stride", "table_stride"),
        *("b", "s_q", "total_q", "group", "blocks_per_head", "block_rows", "num_pages", "page_size", "max_len"),
        *("split_parts", "causal"),
        *("num_row_blocks", "first_row_block"),
    ],
    do_not_specialize_on_alignment=["block_table", "cache_seqlens", "cu_seqlens_q", "q_scale", "kv_scale"],
)
def fwd_kvcache_mla_kernel(
    q,  # [b, s_q, h_k * group, D_V + D_R]; of uneven queries, here and below, [total_q, ..]
    kv_cache,  # [num_pages, page_size, h_k, D_V + D_R], or as many bytes as its format takes
    q_scale,  # one value each, or None
    kv_scale,
    block_table,  # [b, max_len / page_size]
    cache_seqlens,  # [b]
    cu_seqlens_q,  # [b + 1], or None: rows have s_q queries each, else s_q is the most that one has
    plan,  # [MAX_PARTS, COLUMNS]
    out,  # [b, s_q, h_k * group, D_V]
    lse,  # [b, h_k * group, s_q]; [h_k * group, total_q]
    shares,  # [2 * split_parts, row blocks, BLOCK_M, D_V]
    shares_lse,  # [2 * split_parts, row blocks, BLOCK_M]
    scale_log2,  # softmax_scale / ln 2
    q_stride_b,
    q_stride_s,
    q_stride_h,
    page_stride,
    token_stride,
    head_stride,
    table_stride,  # this one in elements
    b,
    s_q,
    total_q,
    group,  # h_q / h_k
    blocks_per_head,
    block_rows,  # of uneven queries: query rows of a block (plan.py)
    num_pages,
    page_size,
    max_len,  # keys that a row of the block table reaches
    split_parts,  # of a batch-invariant plan: places of a row block that it may use
    causal,  # 0 or 1
    num_row_blocks,
    first_row_block,  # of this launch
    D_V: tl.constexpr,
    D_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    STAGES: tl.constexpr,
    SHARED_ROWS: tl.constexpr,  # whether scores of a query row lie in several warps
    NARROW: tl.constexpr,  # whether offsets within a block of keys have 32 bits
    FORMAT: tl.constexpr,  # of the cache
    INVARIANT: tl.constexpr,  # whether the plan is
):
    """Grid: (row blocks, parts at work at once)."""
    UNIT: tl.constexpr = 128 // q.dtype.element_ty.primitive_bitwidth  # values in 16 bytes
    CACHE_UNIT: tl.constexpr = 128 // kv_cache.dtype.element_ty.primitive_bitwidth
    UNEVEN: tl.constexpr = cu_seqlens_q is not None
    row_block = tl.program_id(0) + first_row_block
    head_k = row_block // blocks_per_head
    h_q = num_row_blocks // blocks_per_head * group
    query_row = row_block % blocks_per_head * BLOCK_M + tl.arange(0, BLOCK_M)
    real = query_row < s_q * group
    i = query_row // group
    h = head_k * group + query_row % group
    q_at = i.to(tl.int64) * q_stride_s * UNIT + h.to(tl.int64) * q_stride_h * UNIT
    kv_cache += head_k.to(tl.int64) * head_stride * CACHE_UNIT
    page_stride = tl.cast(page_stride, tl.int64) * CACHE_UNIT
    token_stride = tl.cast(token_stride, tl.int64) * CACHE_UNIT
    if q_scale is not None:
        scale_log2 *= tl.load(q_scale)
    value_scale = 1.0
    if kv_scale is not None:
        value_scale = tl.load(kv_scale)
        scale_log2 *= value_scale
    column = tl.arange(0, BLOCK_V)
    stored = real[:, None] & (column < D_V)[None, :]
    # outputs lie at a 64-bit base and 32-bit offsets (of 64 queries at most), which take half the registers
    first_i = row_block % blocks_per_head * BLOCK_M // group
    out_at = ((i - first_i) * h_q + h)[:, None] * D_V + column[None, :]
    lse_at = h.to(tl.int64) * s_q + i
    share_at = tl.arange(0, BLOCK_M)[:, None] * D_V + column[None, :]

    parts = _parts_used(plan)
    split = (_first_place(plan, MAX_PARTS) if INVARIANT else parts) <= split_parts
    for part in range(tl.program_id(1), parts, tl.num_programs(1)):
        first_row, first_tile = _first_of(plan, part, True)
        last_row, last_tile = _last_of(plan, part, b)
        if INVARIANT:
            leaf = tl.minimum(_first_place(plan, part), split_parts)
        for row in range(first_row, last_row + 1):
            row_64 = tl.cast(row, tl.int64)
            length = _length_of(cache_seqlens, row, max_len)
            tiles = (length + TILE - 1) // TILE
            first_block, end_block = 0, 1  # a loop that is none
            if UNEVEN:
                first_query, queries = _queries_of(cu_seqlens_q, row, s_q, total_q)
                part_first = tl.maximum(tl.load(plan + part * COLUMNS + FIRST_ROW_TILE), 0)
                part_last = tl.maximum(tl.load(plan + part * COLUMNS + LAST_ROW_TILE), 0)
                blocks = (queries * group + block_rows - 1) // block_rows
                first_block = tl.where(row == first_row, part_first, 0)
                end_block = tl.where(row == last_row, tl.minimum(part_last + 1, blocks), blocks)
            for block in range(first_block, end_block):
                starts, ends = row == first_row, split & (row == last_row)
                if UNEVEN:
                    starts, ends = starts & (block == part_first), ends & (block == part_last)
                begin = tl.where(starts, first_tile, 0)
                end = tl.where(ends, tl.minimum(last_tile, tiles), tiles)
                if split | (begin == 0):
                    if UNEVEN:
                        at = block * block_rows + row_block % blocks_per_head * BLOCK_M
                        its_i, its, its_q_at, its_out_at, its_lse_at = _query_rows(
                            at,
                            queries,
                            group,
                            head_k,
                            h_q,
                            total_q,
                            q_stride_s,
                            q_stride_h,
                            D_V,
                            BLOCK_V,
                            BLOCK_M,
                            UNIT,
                        )
                        visible = tl.where(its, length - causal * (queries - 1 - its_i), 0)
                        its_stored = its[:, None] & (column < D_V)[None, :]
                        from_q = q + first_query * q_stride_s * UNIT
                        to, to_lse = out + (first_query + at // group) * h_q * D_V, lse + first_query
                    else:
                        its, its_q_at, its_out_at, its_lse_at, its_stored = real, q_at, out_at, lse_at, stored
                        visible = tl.where(real, length - causal * (s_q - 1 - i), 0)
                        from_q = q + row_64 * q_stride_b * UNIT
                        to, to_lse = out + (row_64 * s_q + first_i) * h_q * D_V, lse + row_64 * h_q * s_q
                    if INVARIANT:
                        each, units = _units_of(tiles, group)
                        first, stop = tl.minimum(begin, tiles) // each, (end + each - 1) // each
                        whole = (first == 0) & (stop == units)
                        leaves = tl.where(whole, 0, _count_nodes(first, _end_of_nodes(first, stop, units)))
                        leaves = tl.minimum(leaves, tl.maximum(split_parts - leaf, 0))  # fewer: a plan of other lengths
                        stop = tl.maximum(stop, first + 1)  # for a row without keys
                        if UNEVEN:
                            stop = tl.where(at < queries * group, stop, first)
                    else:
                        whole = (begin == 0) & (end == tiles)
                        first, stop = 0, 1  # a loop that is none
                    for unit in range(first, stop):
                        if INVARIANT:
                            begin, end = tl.minimum(unit * each, tiles), tl.minimum((unit + 1) * each, tiles)
                        acc, m, l = _segment(  # noqa: E741
                            from_q,
                            its_q_at,
                            its,
                            visible,
                            kv_cache,
                            page_stride,
                            token_stride,
                            block_table + row_64 * table_stride,
                            num_pages,
                            page_size,
                            tl.minimum(begin, tiles) * TILE,
                            tl.minimum(tl.minimum(end * TILE, length), tl.max(visible, 0)),
                            scale_log2,
                            D_V,
                            D_R,
                            BLOCK_V,
                            BLOCK_R,
                            BLOCK_M,
                            BLOCK_N,
                            ONE_PAGE,
                            STAGES,
                            SHARED_ROWS,
                            NARROW,
                            FORMAT,
                        )
                        nothing = l == 0
                        acc *= (value_scale / tl.where(nothing, 1.0, l))[:, None]
                        lse_log2 = m + tl.log2(tl.where(nothing, 1.0, l))  # -inf of nothing
                        stays = whole
                        if INVARIANT:
                            nodes = _count_nodes(first, unit)
                            after = _count_nodes(first, _end_of_nodes(first, unit + 1, units))
                            while (nodes >= after) & (nodes > 0):
                                nodes -= 1
                                left = _node_at(nodes, leaf, leaves, split_parts, row_block, num_row_blocks) * BLOCK_M
                                left_out = tl.load(shares + left * D_V + share_at, mask=its_stored, other=0.0)
                                left_lse = tl.load(shares_lse + left + tl.arange(0, BLOCK_M), mask=its, other=-INF)
                                weight, own, lse_log2 = _weights(left_lse, lse_log2)
                                acc = tl.fma(tl.broadcast_to(weight[:, None], acc.shape), left_out, own[:, None] * acc)
                            stays = whole & (unit + 1 == stop)
                            tl.debug_barrier()  # what is stored next may lie where others still read
                        if stays:
                            tl.store(to + its_out_at, acc.to(out.dtype.element_ty), mask=its_stored)
                            empty = lse_log2 == -INF
                            tl.store(to_lse + its_lse_at, tl.where(empty, INF, lse_log2 * LN2), mask=its)
                        else:
                            if INVARIANT:
                                share = _node_at(nodes, leaf, leaves, split_parts, row_block, num_row_blocks) * BLOCK_M
                            else:
                                place = 2 * part + tl.where(begin > 0, 0, 1)
                                share = (tl.cast(place, tl.int64) * num_row_blocks + row_block) * BLOCK_M
                            tl.store(shares + share * D_V + share_at, acc, mask=its_stored)
                            tl.store(shares_lse + share + tl.arange(0, BLOCK_M), lse_log2, mask=its)
                            if INVARIANT:
                                tl.debug_barrier()  # other threads may load it than stored it
                    if INVARIANT:
                        leaf += leaves
    if UNEVEN:
        _store_unclaimed(cu_seqlens_q, out, lse, b, total_q, h_q, D_V, BLOCK_V)


@triton.jit
def _node_at(node, leaf, leaves, places, row_block, num_row_blocks):
    """Where in the workspace, in row blocks, a part's share of a row has its nodes: those that it leaves in the plan's
    places, others in the program's own."""
    left = tl.cast(leaf + node, tl.int64) * num_row_blocks + row_block
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    own = tl.cast(program, tl.int64) * OWN_PLACES + tl.minimum(node - leaves, OWN_PLACES - 1)
    return tl.where(node < leaves, left, tl.cast(places, tl.int64) * num_row_blocks + own)


@triton.jit
def _place_of_result(cu_seqlens_q, row, block, in_head, head_k, h_q, s_q, total_q, group, block_rows):
    """Of a query row of a batch row, or of its block, and a key head: whether there is such, its row of out, and where
    its lse is."""
    row_64 = tl.cast(row, tl.int64)
    if cu_seqlens_q is not None:
        first_query, queries = _queries_of(cu_seqlens_q, row, s_q, total_q)
        exists = (block >= 0) & (block * tl.cast(block_rows, tl.int64) < queries * group)
        in_row = tl.where(exists, block, 0) * block_rows + in_head
        real = exists & (in_row < queries * group)
        h = head_k * group + in_row % group
        out_row = (first_query + in_row // group) * h_q + h
        lse_at = tl.cast(h, tl.int64) * total_q + first_query + in_row // group
    else:
        real = in_head < s_q * group  # always
        h = head_k * group + in_head % group
        out_row = (row_64 * s_q + in_head // group) * h_q + h
        lse_at = (row_64 * h_q + h) * s_q + in_head // group
    return real, out_row, lse_at


@triton.jit
def _has_share(plan, other, part, row, block, parts):
    """Whether part `other` has a share of the row, or of its block, that `part` begins."""
    other_row, other_tile = _first_of(plan, other, other < parts)
    other_block = tl.load(plan + other * COLUMNS + FIRST_ROW_TILE, mask=other < parts, other=-1)
    goes_on = (other_row == row) & (other_block == block) & (other_tile > 0)
    return (other == part) | ((other > part) & (other < parts) & goes_on)


@triton.jit
def _share_at(other, part, num_row_blocks, row_block, BLOCK_M: tl.constexpr, in_head):
    place = tl.where(other == part, 2 * part + 1, 2 * other)
    return (place.to(tl.int64) * num_row_blocks + row_block) * BLOCK_M + in_head % BLOCK_M


@triton.jit(
    do_not_specialize=[
        *("b", "s_q", "total_q", "rows_per_head", "group", "blocks_per_head", "num_row_blocks", "block_rows"),
        *("max_len", "split_parts"),
    ],
    do_not_specialize_on_alignment=["cache_seqlens", "cu_seqlens_q"],
)
def fwd_kvcache_mla_combine_kernel(
    cache_seqlens,  # [b]
    cu_seqlens_q,  # [b + 1] or None
    plan,  # [MAX_PARTS, COLUMNS]
    out,  # [b, s_q, h_k * group, D_V]; [total_q, ..]
    lse,  # [b, h_k * group, s_q]; [h_k * group, total_q]
    shares,  # [2 * split_parts, row blocks, BLOCK_M, D_V]
    shares_lse,  # [2 * split_parts, row blocks, BLOCK_M]
    b,
    s_q,
    total_q,
    rows_per_head,  # s_q * group; of uneven queries those of a block
    group,
    blocks_per_head,
    num_row_blocks,
    block_rows,
    max_len,
    split_parts,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,  # shares merged at a time
):
    """Merges the shares of rows that the plan split. With lse_i and out_i those of a row's shares:

        lse = log2(sum_i 2^lse_i),   out = sum_i 2^(lse_i - lse) out_i

    Grid: (query rows of a batch row, parts at work at once). For every so manyth part a program has the row that the
    part begins and does not end.
    """
    UNEVEN: tl.constexpr = cu_seqlens_q is not None
    h_q = num_row_blocks // blocks_per_head * group
    query_row = tl.program_id(0)
    head_k, in_head = query_row // rows_per_head, query_row % rows_per_head
    row_block = head_k * blocks_per_head + in_head // BLOCK_M
    column = tl.arange(0, BLOCK_V)
    parts = _parts_used(plan)
    for part in range(tl.program_id(1), tl.where(parts <= split_parts, parts, 0), tl.num_programs(1)):
        first_row, first_tile = _first_of(plan, part, True)
        row, last_tile = _last_of(plan, part, b)
        begins = (row > first_row) | (first_tile == 0)
        if UNEVEN:
            first_block = tl.load(plan + part * COLUMNS + FIRST_ROW_TILE)
            begins = begins | (tl.load(plan + part * COLUMNS + LAST_ROW_TILE) > first_block)
        if (row >= first_row) & begins:  # noqa: SIM102  else there is no row to read
            if last_tile < (_length_of(cache_seqlens, row, max_len) + TILE - 1) // TILE:
                # the parts that go on with the row: one after the other, if the plan is a good one
                block = 0
                if UNEVEN:
                    block = tl.load(plan + part * COLUMNS + LAST_ROW_TILE)
                other = tl.arange(0, MAX_PARTS)
                shared = _has_share(plan, other, part, row, block, parts)
                share = _share_at(other, part, num_row_blocks, row_block, BLOCK_M, in_head)
                lse_log2 = tl.load(shares_lse + share, mask=shared, other=-INF)
                highest = tl.max(lse_log2, 0)
                base_2 = tl.where(highest == -INF, 0.0, highest)
                total = tl.sum(tl.exp2(lse_log2 - base_2), 0)
                nothing = total == 0  # NaN is something

                acc = tl.zeros([BLOCK_V], tl.float32)
                for start in range(part, tl.max(tl.where(shared, other, 0), 0) + 1, BLOCK_S):
                    some = start + tl.arange(0, BLOCK_S)
                    some_shared = _has_share(plan, some, part, row, block, parts)
                    at = _share_at(some, part, num_row_blocks, row_block, BLOCK_M, in_head)
                    weight = tl.exp2(tl.load(shares_lse + at, mask=some_shared, other=-INF) - base_2)
                    acc += tl.sum(weight[:, None] * _values(shares, at * D_V, some_shared, D_V, BLOCK_V), 0)
                acc = acc / tl.where(nothing, 1.0, total)
                real, out_row, lse_at = _place_of_result(
                    cu_seqlens_q, row, block, in_head, head_k, h_q, s_q, total_q, group, block_rows
                )
                tl.store(out + out_row * D_V + column, acc.to(out.dtype.element_ty), mask=real & (column < D_V))
                tl.store(lse + lse_at, tl.where(nothing, INF, (base_2 + tl.log2(total)) * LN2), mask=real)


@triton.jit(
    do_not_specialize=[
        *("b", "s_q", "total_q", "rows_per_head", "group", "blocks_per_head", "num_row_blocks", "block_rows"),
        *("max_len", "places"),
    ],
    do_not_specialize_on_alignment=["cache_seqlens", "cu_seqlens_q"],
)
def fwd_kvcache_mla_merge_nodes_kernel(
    cache_seqlens,  # [b]
    cu_seqlens_q,  # [b + 1] or None
    plan,  # [MAX_PARTS + 1, COLUMNS]
    out,  # [b, s_q, h_k * group, D_V]; [total_q, ..]
    lse,  # [b, h_k * group, s_q]; [h_k * group, total_q]
    nodes,  # [places, row blocks, BLOCK_M, D_V]; overwritten
    nodes_lse,  # [places, row blocks, BLOCK_M]
    b,
    s_q,
    total_q,
    rows_per_head,  # s_q * group; of uneven queries those of a block
    group,
    blocks_per_head,
    num_row_blocks,
    block_rows,
    max_len,
    places,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Merges the nodes that parts left of the rows that a batch-invariant plan split; of uneven queries, of the blocks.

    They lie in places that follow each other, in the order of the row's units; which units are whose follows from where
    the parts begin and end. Those that wait for their right siblings go to the row's first places, whose nodes have
    been read by then.

    Grid: (query rows of a batch row, parts at work at once). For every so manyth part a program has the row that the
    part begins and does not end.
    """
    UNEVEN: tl.constexpr = cu_seqlens_q is not None
    h_q = num_row_blocks // blocks_per_head * group
    query_row = tl.program_id(0)
    head_k, in_head = query_row // rows_per_head, query_row % rows_per_head
    row_block = head_k * blocks_per_head + in_head // BLOCK_M
    column = tl.arange(0, BLOCK_V)
    parts = tl.where(_first_place(plan, MAX_PARTS) <= places, _parts_used(plan), 0)
    for part in range(tl.program_id(1), parts, tl.num_programs(1)):
        first_row, first_tile = _first_of(plan, part, True)
        row, last_tile = _last_of(plan, part, b)
        block, another = 0, row > first_row  # than the part's first row, or block
        if UNEVEN:
            block = tl.load(plan + part * COLUMNS + LAST_ROW_TILE)
            another = another | (block > tl.load(plan + part * COLUMNS + FIRST_ROW_TILE))
        if (row >= first_row) & (another | (first_tile == 0)):
            each, units = _units_of((_length_of(cache_seqlens, row, max_len) + TILE - 1) // TILE, group)
            stop = (last_tile + each - 1) // each
            real, out_row, lse_at = _place_of_result(
                cu_seqlens_q, row, block, in_head, head_k, h_q, s_q, total_q, group, block_rows
            )
            if (stop < units) & real:
                place = tl.minimum(_first_place(plan, part), places)
                if another & (first_tile > 0):  # the part's share of its first row comes before
                    tiles = (_length_of(cache_seqlens, first_row, max_len) + TILE - 1) // TILE
                    first_each, first_units = _units_of(tiles, group)
                    first = first_tile // first_each
                    place += _count_nodes(first, _end_of_nodes(first, first_units, first_units))
                begin, depth, unit, other = place, 0, 0, part
                while (unit < units) & (other < parts):
                    if unit < stop:
                        # the greatest node that begins here and ends before or where the part does
                        size = _highest_bit(tl.maximum(stop - unit, 1))
                        size = tl.where(unit > 0, tl.minimum(size, unit & -unit), size)
                        at = (tl.cast(place, tl.int64) * num_row_blocks + row_block) * BLOCK_M + in_head % BLOCK_M
                        there = place < places
                        acc = tl.load(nodes + at * D_V + column, mask=there & (column < D_V), other=0.0)
                        lse_log2 = tl.load(nodes_lse + at, mask=there, other=-INF)
                        unit += size
                        place += 1
                        after = tl.where(unit >= units, 1, _count_nodes(0, unit))
                        while (depth >= after) & (depth > 0):
                            depth -= 1
                            at = (tl.cast(begin + depth, tl.int64) * num_row_blocks + row_block) * BLOCK_M
                            at += in_head % BLOCK_M
                            there = begin + depth < places
                            left_out = tl.load(nodes + at * D_V + column, mask=there & (column < D_V), other=0.0)
                            left_lse = tl.load(nodes_lse + at, mask=there, other=-INF)
                            weight, own, lse_log2 = _weights(left_lse, lse_log2)
                            acc = tl.fma(tl.full(acc.shape, weight, tl.float32), left_out, own * acc)
                        tl.debug_barrier()
                        if unit < units:
                            at = (tl.cast(begin + depth, tl.int64) * num_row_blocks + row_block) * BLOCK_M
                            at += in_head % BLOCK_M
                            there = begin + depth < places
                            tl.store(nodes + at * D_V + column, acc, mask=there & (column < D_V))
                            tl.store(nodes_lse + at, lse_log2, mask=there)
                            tl.debug_barrier()
                            depth += 1
                        else:
                            tl.store(out + out_row * D_V + column, acc.to(out.dtype.element_ty), mask=column < D_V)
                            tl.store(lse + lse_at, tl.where(lse_log2 == -INF, INF, lse_log2 * LN2))
                    else:
                        other += 1
                        if other < parts:
                            last_row, last_tile = _last_of(plan, other, b)
                            ends = last_row == row
                            if UNEVEN:
                                ends = ends & (tl.load(plan + other * COLUMNS + LAST_ROW_TILE) == block)
                            end = tl.where(ends, (last_tile + each - 1) // each, units)
                            stop = tl.where(end < units, end, 2 * MAX_UNITS)


# ---------------------------------------------------------------------------------------------- concat_and_cache_mla


@triton.jit
def _copy_columns(to, to_at, source, source_at, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    both = mask[:, None] & (column < D)[None, :]
    values = tl.load(source + source_at[:, None] + column[None, :], mask=both)
    tl.store(to + to_at[:, None] + column[None, :], values, mask=both)


@triton.jit
def _tokens(
    slot_mapping, n, num_slots, page_size, page_stride, token_stride, UNIT: tl.constexpr, BLOCK_T: tl.constexpr
):
    """A program's tokens: their numbers, whether their slots are in the cache, and where those lie."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slot_mapping + token, mask=token < n, other=-1)
    named = (slot >= 0) & (slot < num_slots)
    return token, named, slot // page_size * page_stride * UNIT + slot % page_size * token_stride * UNIT


@triton.jit(
    do_not_specialize=["n", "num_slots", "page_size", "page_stride", "token_stride", "kv_c_stride", "k_pe_stride"],
    do_not_specialize_on_alignment=["slot_mapping"],
)
def concat_and_cache_mla_kernel(
    kv_cache,  # [num_slots / page_size, page_size, 1, D_V + D_R]
    kv_c,  # [n, D_V]
    k_pe,  # [n, D_R]
    slot_mapping,  # [n]
    n,
    num_slots,
    page_size,
    page_stride,
    token_stride,
    kv_c_stride,
    k_pe_stride,
    D_V: tl.constexpr,
    D_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Copies tokens to their slots. Grid: blocks of BLOCK_T tokens."""
    UNIT: tl.constexpr = 128 // kv_c.dtype.element_ty.primitive_bitwidth
    token, named, to = _tokens(slot_mapping, n, num_slots, page_size, page_stride, token_stride, UNIT, BLOCK_T)
    _copy_columns(kv_cache, to, kv_c, token * kv_c_stride * UNIT, named, D_V, BLOCK_V)
    if D_R > 0:
        _copy_columns(kv_cache, to + D_V, k_pe, token * k_pe_stride * UNIT, named, D_R, BLOCK_R)


@triton.jit
def _bits(x):
    """The bits of fp32, or of a 16-bit type, as a signed integer of as many."""
    return x.to(tl.int32 if x.dtype.primitive_bitwidth == 32 else tl.int16, bitcast=True)


@triton.jit
def _to_e4m3(x, negative):
    """|x| of fp32 with this sign as bytes of e4m3: the nearest, ties to even; 448 beyond that, NaN stays NaN. By
    integers, like _from_e4m3."""
    magnitude = _bits(x) & 0x7FFFFFFF
    nan = magnitude > INF_BITS
    magnitude = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - (120 << 3)  # 3 bits kept, exponent bias 127 to 7
    # below 2^-6 steps are 2^-9, which is the last place of 2^14
    subnormal = _bits(magnitude.to(tl.float32, bitcast=True) + 16384.0) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (tl.where(nan, 0x7F, code) | tl.where(negative, 0x80, 0)).to(tl.uint8)


@triton.jit
def _bf16_bits(values):
    """To bf16, to the nearest, ties to even, as int16. By integers too: the interpreter's own conversion truncates."""
    if values.dtype == tl.bfloat16:
        rounded = _bits(values)
    else:
        bits = _bits(values.to(tl.float32))
        nan = (bits & 0x7FFFFFFF) > INF_BITS
        rounded = tl.where(nan, 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.int16)
    return rounded


@triton.jit
def _store_e4m3_of_one_scale(to, to_at, source, source_at, scale, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    """The sign of NaN is that of a division on x86: the first operand's that is NaN; if none is, set."""
    column = tl.arange(0, BLOCK)
    both = mask[:, None] & (column < D)[None, :]
    values = tl.load(source + source_at[:, None] + column[None, :], mask=both, other=0.0)
    x = values.to(tl.float32)
    quotient = tl.div_rn(x, tl.zeros_like(x) + scale)
    minus, minus_scale = _bits(values) < 0, _bits(scale) < 0
    minus_nan = tl.where(x != x, minus, (scale == scale) | minus_scale)
    negative = tl.where(quotient == quotient, minus != minus_scale, minus_nan)
    tl.store(to + to_at[:, None] + column[None, :], _to_e4m3(quotient, negative), mask=both)


@triton.jit(
    do_not_specialize=["n", "num_slots", "page_size", "page_stride", "token_stride", "kv_c_stride", "k_pe_stride"],
    do_not_specialize_on_alignment=["slot_mapping", "kv_scale"],
)
def concat_and_cache_mla_fp8_kernel(
    kv_cache,  # [num_slots / page_size, page_size, 1, ...] bytes
    kv_c,  # [n, D_V]
    k_pe,  # [n, D_R]
    slot_mapping,  # [n]
    kv_scale,  # one value, or None: a scale for every SCALE_BLOCK latent values
    n,
    num_slots,
    page_size,
    page_stride,
    token_stride,
    kv_c_stride,
    k_pe_stride,
    D_V: tl.constexpr,
    D_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROUND_SCALE: tl.constexpr,
):
    """Writes the bytes of kv_cache.py's `quantize`. Grid: blocks of BLOCK_T tokens."""
    UNIT: tl.constexpr = 128 // kv_c.dtype.element_ty.primitive_bitwidth
    token, named, to = _tokens(slot_mapping, n, num_slots, page_size, page_stride, token_stride, 16, BLOCK_T)
    kv_c_at, k_pe_at = token * kv_c_stride * UNIT, token * k_pe_stride * UNIT
    if kv_scale is not None:
        scale = tl.load(kv_scale)
        _store_e4m3_of_one_scale(kv_cache, to, kv_c, kv_c_at, scale, named, D_V, BLOCK_V)
        if D_R > 0:
            _store_e4m3_of_one_scale(kv_cache, to + D_V, k_pe, k_pe_at, scale, named, D_R, BLOCK_R)
    else:
        WIDTH: tl.constexpr = min(SCALE_BLOCK, BLOCK_V)
        BLOCKS: tl.constexpr = BLOCK_V // WIDTH
        SCALES: tl.constexpr = (D_V + WIDTH - 1) // WIDTH
        values = _values(kv_c, kv_c_at, named, D_V, BLOCK_V).reshape(BLOCK_T, BLOCKS, WIDTH)
        x = values.to(tl.float32)
        magnitude = _bits(x) & 0x7FFFFFFF
        largest = tl.max(tl.where(magnitude < INF_BITS, magnitude, 0), 2)
        scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full([BLOCK_T, BLOCKS], E4M3_MAX, tl.float32))
        scale = tl.maximum(scale, SMALLEST_SCALE)
        if ROUND_SCALE:  # up to a power of two
            scale = (_bits(scale) + 0x7FFFFF & INF_BITS).to(tl.float32, bitcast=True)
        scale = tl.where(largest == 0, 1.0, scale)
        quotient = tl.div_rn(x, tl.zeros_like(x) + scale[:, :, None])
        bytes_ = _to_e4m3(quotient, _bits(values) < 0).reshape(BLOCK_T, BLOCK_V)
        column, block, pad = tl.arange(0, BLOCK_V), tl.arange(0, BLOCKS), tl.arange(0, 16)
        tl.store(kv_cache + to[:, None] + column[None, :], bytes_, mask=named[:, None] & (column < D_V)[None, :])
        scales = (kv_cache + D_V).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scales + to[:, None] // 4 + block[None, :], scale, mask=named[:, None] & (block < SCALES)[None, :])
        if D_R > 0:
            rope = (kv_cache + D_V + 4 * SCALES).to(tl.pointer_type(tl.int16), bitcast=True)
            rope += to[:, None] // 2 + tl.arange(0, BLOCK_R)[None, :]
            present = named[:, None] & (tl.arange(0, BLOCK_R) < D_R)[None, :]
            tl.store(rope, _bf16_bits(_values(k_pe, k_pe_at, named, D_R, BLOCK_R)), mask=present)
        USED: tl.constexpr = D_V + 4 * SCALES + 2 * D_R
        padding = named[:, None] & (pad < -USED % 16)[None, :]
        tl.store(kv_cache + USED + to[:, None] + pad[None, :], tl.zeros([BLOCK_T, 16], tl.uint8), mask=padding)


# ------------------------------------------------------------------------------------------------ merge_attn_states


@triton.jit
def _state(out, out_at, out_mask, lse, lse_at, mask):
    """A state's out in fp32 and its lse: -inf where it saw nothing, whatever its out then holds."""
    lse = tl.load(lse + lse_at, mask=mask, other=-INF)
    lse = tl.where(lse == INF, -INF, lse)
    seen = out_mask & (lse != -INF)[:, None]
    return tl.load(out + out_at, mask=seen, other=0.0).to(tl.float32), lse


@triton.jit(
    do_not_specialize=[
        *("rows", "s_q", "h_q", "a_stride_b", "a_stride_s", "a_stride_h", "b_stride_b", "b_stride_s", "b_stride_h"),
        *("a_lse_stride_b", "a_lse_stride_h", "b_lse_stride_b", "b_lse_stride_h"),
    ],
    do_not_specialize_on_alignment=["lse_a", "lse_b"],
)
def merge_attn_states_kernel(
    out,  # [b, s_q, h_q, D_V]
    lse,  # [b, h_q, s_q]
    out_a,
    lse_a,
    out_b,
    lse_b,
    rows,  # b * s_q * h_q
    s_q,
    h_q,
    a_stride_b,
    a_stride_s,
    a_stride_h,
    b_stride_b,
    b_stride_s,
    b_stride_h,
    a_lse_stride_b,  # of lse in elements
    a_lse_stride_h,
    b_lse_stride_b,
    b_lse_stride_h,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid: blocks of rows (b, s_q, h_q)."""
    UNIT: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    h, i, b = row % h_q, row // h_q % s_q, row // h_q // s_q
    real = row < rows
    column = tl.arange(0, BLOCK_V)[None, :]
    stored = real[:, None] & (column < D_V)
    a_at = (b * a_stride_b + i * a_stride_s + h * a_stride_h)[:, None] * UNIT + column
    b_at = (b * b_stride_b + i * b_stride_s + h * b_stride_h)[:, None] * UNIT + column
    a, a_lse = _state(out_a, a_at, stored, lse_a, b * a_lse_stride_b + h * a_lse_stride_h + i, real)
    b_, b_lse = _state(out_b, b_at, stored, lse_b, b * b_lse_stride_b + h * b_lse_stride_h + i, real)
    highest = tl.maximum(a_lse, b_lse)
    base = tl.where(highest == -INF, 0.0, highest)
    merged_lse = base + tl.log(tl.exp(a_lse - base) + tl.exp(b_lse - base))
    merged_lse = tl.where(highest == -INF, INF, merged_lse)
    # not normalised by each other: weights are those of the lse that is returned, as everywhere
    merged = a * tl.exp(a_lse - merged_lse)[:, None] + b_ * tl.exp(b_lse - merged_lse)[:, None]
    tl.store(out + row[:, None] * D_V + column, merged.to(out.dtype.element_ty), mask=stored)
    tl.store(lse + (b * h_q + h) * s_q + i, merged_lse, mask=real)
