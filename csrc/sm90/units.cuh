// Batch-invariant plans (flashmla_ops/plan.py): a row is cut into units of tiles, whose results are merged two by two
// in a tree, both by the row's length alone. So a row's bits depend on nothing else: not on which part has which unit,
// nor on how many nodes of the tree a part merges itself.
//
// A part goes through its units in order and keeps the nodes of the tree that it has so far, the greatest ones that lie
// in its units, as a stack. A new unit is merged with those that it completes. What is left at the end of its share of
// a row are nodes for fwd_kvcache_mla_merge_nodes.cu, which does the same over all parts.
//
// Nodes (nodes.cuh) are in the workspace: those that are left in the places that the plan gives the part, others in
// places of the CTA's own. All as it lay in registers: a thread reads what it wrote.
#pragma once

#include <algorithm>

#include "fwd_kvcache_mla.cuh"
#include "ptx.cuh"
#include "row_tile.cuh"

namespace flashmla::sm90 {

// Nodes that units begin .. end - 1 make. Up to the last multiple of the greatest power of two that the range crosses,
// and from there on, there is one for each bit of the distance.
__device__ __forceinline__ int count_nodes(int begin, int end) {
    if (begin >= end) return 0;
    const int bit = 31 - __clz(begin ^ end), middle = end >> bit << bit;
    return __popc(middle - begin) + __popc(end - middle);
}

// A row's units. Its last nodes are whole, however few units they have: the tree ends at `padded`.
struct Units {
    int each, count, padded;

    __device__ Units(int tiles, bool few_heads) {
        each = unit_tiles(tiles, few_heads);
        count = (tiles + each - 1) / each;
        padded = count <= 1 ? 1 : 1 << (32 - __clz(count - 1));
    }
    // Where the greatest nodes that lie in units first .. end - 1 end.
    __device__ int end_of_nodes(int first, int end) const {
        if (end < count || first >= count) return end;  // the latter of a plan for other lengths
        if (first == 0) return padded;
        const int level = 31 - __clz((count - 1) ^ (first - 1));  // of the last one
        return ((count - 1 >> level) + 1) << level;
    }
};

// One unit of a part's share of a row. Of a row without tiles the only one.
struct Unit : Segment {
    int block;     // of uneven queries, of the row (plan.py)
    int end_unit;  // where in the row's tree the nodes end that end with this unit
    int nodes;     // of the share, before this unit
    int merges;    // of them are merged with it, the last one first
    int leaves;    // nodes that the share leaves, from `leaf` on; 0 if the row is whole
    int leaf;      // in the places of the plan
};

// What a warp knows between units, while it works on one: of uneven queries too much for its registers.
struct Parked {
    Unit unit;
    int index, stop, first, tiles;
};

// Calls body(unit) for the units of a part's share of a row, `unit` before they are told apart: tiles first_tile ..
// end_tile - 1 of `tiles`. unit.leaf moves on by what the share leaves. kTogether: for all units at once, which is all
// that who loads needs to know: where a kernel's tiles alternate between two places, a unit has an even number of them,
// but for the row's last one.
template <bool kUneven, bool kTogether, typename Body>
__device__ __forceinline__ void for_units_of(const FwdParams& params, bool few_heads, Unit& unit, int tiles,
                                             int first_tile, int end_tile, Parked* parked, Body&& body) {
    Units units(tiles, few_heads);
    int first = first_tile / units.each, end = (end_tile + units.each - 1) / units.each;
    if constexpr (kTogether) {
        unit.begin = min(first * units.each, tiles);
        unit.end = min(max(first, end) * units.each, tiles);
        return body(unit);
    }
    const bool whole = first == 0 && end == units.count;
    unit.leaves = whole ? 0 : count_nodes(first, units.end_of_nodes(first, end));
    unit.leaves = min(unit.leaves, max(params.places - unit.leaf, 0));  // fewer: a plan of other lengths
    int stop = max(end, tiles == 0);
    for (int i = first; i < stop; ++i) {
        units = Units(ptx::anew(tiles), few_heads);  // registers are short while a unit is worked on
        unit.begin = min(i * units.each, tiles);
        unit.end = min(unit.begin + units.each, tiles);
        unit.ends = i + 1 == stop;
        unit.end_unit = units.end_of_nodes(0, i + 1);
        unit.nodes = count_nodes(first, i);
        unit.merges = unit.nodes + 1 - count_nodes(first, units.end_of_nodes(first, i + 1));
        if constexpr (!kUneven) {
            body(unit);
            continue;
        }
        if (ptx::lane() == 0) {
            parked->unit = unit;
            parked->index = i;
            parked->stop = stop;
            parked->first = first;
            parked->tiles = tiles;
        }
        __syncwarp();
        body(parked->unit);
        unit = parked->unit;
        i = parked->index;
        stop = parked->stop;
        first = parked->first;
        tiles = parked->tiles;
        __syncwarp();  // before the next unit is written there
    }
    unit.leaf += unit.leaves;
}

// Calls body(unit, row tile) for the units of the CTA's parts, in order. `rows`: the CTA's. parked: the warp's place in
// shared memory, of uneven queries.
template <bool kUneven, bool kTogether, typename Body>
__device__ __forceinline__ void for_each_unit(const FwdParams& params, const Part (&parts)[kMaxParts],
                                              const RowTile& rows, Parked* parked, Body&& body) {
    const bool few_heads = rows.size < kRowTile && params.group <= kFewHeads;  // of 64 rows a constant
    for (int index = blockIdx.y; index < params.plan_parts; index += gridDim.y) {
        const Part& p = parts[index];
        if (p.empty()) continue;
        Unit unit;
        unit.place = -1;
        unit.block = 0;
        unit.leaf = min(flagged_place(params, index), params.places);
        for (unit.row = p.first_row; unit.row <= p.last_row; ++unit.row) {
            unit.length = clamped_length(params, unit.row);
            if constexpr (kUneven) {
                // all of it anew for each block and unit: registers are short while that is worked on
                const auto last_of_share = [&] {
                    const int row = ptx::anew(unit.row), last = last_block(params, RowQueries(params, row), rows.size);
                    return row == p.last_row ? min(Blocks(params, index).last, last) : last;
                };
                unit.block = unit.row == p.first_row ? Blocks(params, index).first : 0;
                for (; unit.block <= last_of_share(); ++unit.block) {
                    const Blocks blocks(params, ptx::anew(index));
                    const int tiles = num_tiles(ptx::anew(unit.length));
                    const bool continued = p.continues(unit.row) && unit.block == blocks.first;
                    const bool cut = unit.row == p.last_row && unit.block == blocks.last;
                    const bool left_out = continued && p.last_tile == INT_MAX;  // see read_plan
                    if (left_out) continue;
                    if (kTogether) unit.more = unit.row < p.last_row || unit.block < last_of_share();
                    for_units_of<kUneven, kTogether>(
                        params, few_heads, unit, tiles, continued ? p.first_tile : 0,
                        cut ? min(p.last_tile, tiles) : tiles, parked, [&](const Unit& unit) {
                            const int row = ptx::anew(unit.row);
                            const RowTile here(params, rows, row, RowQueries(params, row), unit.block);
                            if (here.count(params) > 0) body(unit, here);
                        });
                }
            } else {
                const int tiles = num_tiles(unit.length);
                unit.more = unit.row < p.last_row;
                for_units_of<kUneven, kTogether>(
                    params, few_heads, unit, tiles, p.continues(unit.row) ? p.first_tile : 0,
                    unit.more ? tiles : min(p.last_tile, tiles), nullptr, [&](const Unit& unit) {
                        body(unit, RowTile(params, rows.size, ptx::anew(params.first_row_tile)));
                    });
            }
        }
    }
}

// Where the node at `index` of a share's nodes lies in the workspace, in tiles. `own`: those of the CTA's own places
// that are in use at once are kOwnPlaces at most.
__device__ __forceinline__ int64_t tile_of_node(const FwdParams& params, const RowTile& rows, const Unit& unit,
                                                int index) {
    if (index < unit.leaves) return tile_at(params, unit.leaf + index, rows.index());
    const int own = min(index - unit.leaves, kOwnPlaces - 1);
    const int block = ptx::block_y(own);  // blockIdx.y would be kept
    return int64_t{params.places} * params.row_tiles + (block * kOwnPlaces + own) * gridDim.x + blockIdx.x;
}

// Calls body(share, row tile) for the segments or units of the CTA's parts, in order. `rows`: the CTA's. kTogether: see
// for_units_of. parked: see for_each_unit; else none.
template <bool kUneven, bool kInvariant, bool kTogether = false, typename Body>
__device__ __forceinline__ void for_each_share(const FwdParams& params, const Part (&parts)[kMaxParts],
                                               const RowTile& rows, Parked* parked, Body&& body) {
    if constexpr (kInvariant) {
        for_each_unit<kUneven, kTogether>(params, parts, rows, parked, body);
    } else {
        for_each_segment<kUneven>(params, parts, rows, body);
    }
}

// Calls launch(params, grid). CTAs have places of their own, so there are kLaunchRowTiles at once; more row tiles take
// several launches, in which every CTA has whole rows.
template <bool kInvariant, typename Launch>
void for_each_launch(const FwdParams& params, Launch&& launch) {
    if constexpr (kInvariant) {
        FwdParams these = params;
        for (int& first = these.first_row_tile; first < params.row_tiles; first += kLaunchRowTiles) {
            launch(these, dim3(std::min(params.row_tiles - first, kLaunchRowTiles), params.grid_parts));
        }
    } else {
        launch(params, dim3(params.row_tiles, params.grid_parts));
    }
}

}  // namespace flashmla::sm90
