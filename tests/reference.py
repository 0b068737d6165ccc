"""What the ops must compute, written out as plainly as possible.

For decoding the oracle in use is the faster `flashmla_ops.testing.attention`, which is held against the loops here.
"""

import torch
from torch import Tensor

from flashmla_ops import plan
from flashmla_ops.testing import AppendCase, DecodeCase, MergeCase


def decode_by_loops(case: DecodeCase) -> tuple[Tensor, Tensor]:
    """float64 out and lse of fwd_kvcache_mla, one query of one head at a time."""
    b, s_q, h_q, _ = case.q.shape
    page_size, h_k = case.kv_cache.shape[1:3]
    out = torch.zeros(b, s_q, h_q, case.head_dim_v, dtype=torch.float64)
    lse = torch.full((b, h_q, s_q), float("inf"), dtype=torch.float64)
    for r, length in enumerate(case.cache_seqlens.tolist()):
        for i in range(s_q):
            visible = length - s_q + i + 1 if case.causal else length
            if visible <= 0:
                continue
            for h in range(h_q):
                keys = [
                    case.kv_cache[case.block_table[r, j // page_size], j % page_size, h * h_k // h_q]
                    for j in range(visible)
                ]
                keys = torch.stack(keys).double()
                scores = keys @ case.q[r, i, h].double() * case.softmax_scale
                out[r, i, h] = scores.softmax(0) @ keys[:, : case.head_dim_v]
                lse[r, h, i] = scores.logsumexp(0)
    return out, lse


def append(case: AppendCase) -> Tensor:
    """What concat_and_cache_mla must leave in kv_cache."""
    kv_cache = case.kv_cache.clone()
    page_size = kv_cache.shape[1]
    for token, slot in enumerate(case.slot_mapping.tolist()):
        if slot >= 0:
            kv_cache[slot // page_size, slot % page_size, 0] = torch.cat([case.kv_c[token], case.k_pe[token]])
    return kv_cache


def merge(case: MergeCase) -> tuple[Tensor, Tensor]:
    """float64 out and lse of merge_attn_states; an infinite lse of either sign means that nothing was seen."""
    lse_a, lse_b = (t.double().where(t.isfinite(), -torch.inf) for t in (case.lse_a, case.lse_b))
    lse = torch.stack([lse_a, lse_b]).logsumexp(0)
    out = 0
    for part, part_lse in ((case.out_a, lse_a), (case.out_b, lse_b)):
        weight = (part_lse - lse).exp().where(part_lse.isfinite(), 0).transpose(1, 2)[..., None]
        out = out + (weight * part.double()).where(weight > 0, 0)
    return out, lse.where(lse.isfinite(), torch.inf)


def tiles_of_parts(metadata: Tensor, lengths: list[int]) -> list[dict[int, range]]:
    """For each part of a plan, the rows it touches and the tiles of each, as plan.py defines them."""
    parts = []
    for part in metadata.tolist():
        rows = range(part[plan.FIRST_ROW], part[plan.LAST_ROW] + 1)
        parts.append(
            {
                row: range(
                    part[plan.FIRST_TILE] if row == part[plan.FIRST_ROW] else 0,
                    part[plan.LAST_TILE] if row == part[plan.LAST_ROW] else -(-lengths[row] // plan.TILE),
                )
                for row in rows
            }
        )
    return parts


class Nodes:
    """What a part, or who merges parts, holds of one row under an invariant plan: nodes of the row's tree in order, as
    (first unit, level, value). `merge(left, right)` makes one of two."""

    def __init__(self, merge):
        self.nodes, self.merge = [], merge

    def push(self, unit: int, level: int, value) -> None:
        """Adds the next node, and merges it with its sibling, and so on, as long as that lies here."""
        while self.nodes and self.nodes[-1][1] == level and unit >> level & 1:
            unit, _, left = self.nodes.pop()
            value, level = self.merge(left, value), level + 1
        self.nodes.append((unit, level, value))

    def end_of_row(self) -> None:
        """The last node has no right siblings: it stands for its parents, as long as their left siblings lie here."""
        while len(self.nodes) > 1 and self.nodes[-1][0] >> self.nodes[-2][1] & 1:
            _, _, right = self.nodes.pop()
            unit, level, left = self.nodes.pop()
            self.nodes.append((unit, level + 1, self.merge(left, right)))


def by_parts(metadata: Tensor, lengths: list[int], few_heads: bool, attend_unit, merge) -> tuple[list, int]:
    """Executes an invariant plan as a machine's workers do: each part for itself, which leaves the nodes of rows that
    it shares in its places, and then the rows of which nodes were left. Returns each row's value and the places used.

    attend_unit(row, first tile, end tile) gives a unit's value; a row without tiles has None.
    """
    results, places, left = [None] * len(lengths), {}, {}  # left: of each shared row (place, unit, level)
    for part, columns in zip(tiles_of_parts(metadata, lengths), metadata.tolist(), strict=True):
        place = columns[plan.FLAGS] >> 1
        for row, share in part.items():
            tiles = -(-lengths[row] // plan.TILE)
            each, nodes = plan.unit_tiles(tiles, few_heads), Nodes(merge)
            for tile in range(share.start, share.stop, each):
                nodes.push(tile // each, 0, attend_unit(row, tile, min(tile + each, tiles)))
            if share.stop == tiles:
                nodes.end_of_row()
            if len(share) == tiles:
                results[row] = nodes.nodes[0][2] if nodes.nodes else None
                continue
            for unit, level, value in nodes.nodes:
                assert place not in places, "two nodes in one place"
                places[place] = value
                left.setdefault(row, []).append((place, unit, level))
                place += 1
    for row, shares in left.items():
        nodes = Nodes(merge)
        for place, unit, level in shares:
            nodes.push(unit, level, places[place])
        nodes.end_of_row()
        (result,) = nodes.nodes
        results[row] = result[2]
    return results, len(places)
