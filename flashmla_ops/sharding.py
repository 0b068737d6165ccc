"""How torch.ops.flashmla.* work on DTensors: importing this module registers their sharding rules.

On each dimension of a mesh the tensors of a call are laid out in one of the ways below; a mesh of two dimensions may
mix them (rows over one, heads over the other). Any other layout raises and says which would do: nothing is ever moved
between ranks to make a call fit, since what would have to move may be a cache.

    fwd_kvcache_mla     replicated
                        heads:   q and out on dimension 2, lse on 1; cache, table, lengths and plan replicated (with
                                 h_k > 1 the cache on dimension 2). A plan is made for a rank's own number of heads.
                                 With cu_seqlens_q, replicated: q and out on dimension 1, lse on 0.
                        batch:   q, out, lse, table and lengths on dimension 0, and the cache on dimension 0, its pages.
                                 Page numbers are a rank's own, from 0. Each call plans for itself.
    merge_attn_states   replicated, batch, heads (out 2, lse 1) or queries (out 1, lse 2)
    get_mla_metadata    replicated. Plans of parts of a batch do not add up to a plan: plan on local tensors.

The ops that write (concat_and_cache_mla, get_mla_metadata_) take local tensors only.
"""

import math

from torch import ops
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

WHOLE = Replicate()


def _layouts(name: str, layouts: dict[str, dict[str, object]], outputs: tuple[str, ...], given: dict[str, object]):
    """What `register_sharding` takes: (placements of outputs, placements of inputs) of each layout.

    Args:
        layouts: name -> placements by tensor; tensors that are not named are replicated.
        given: the call's arguments by name, in order; tensors have `placements`, `mesh` and `shape`.
    Raises:
        RuntimeError: the call's tensors are laid out in none of these ways, or a shard is larger than others.
    """
    tensors = {key: value for key, value in given.items() if hasattr(value, "placements")}
    mesh = next(iter(tensors.values())).mesh
    names = mesh.mesh_dim_names or range(mesh.ndim)
    for dim, dim_name in enumerate(names):
        placed = {key: value.placements[dim] for key, value in tensors.items()}
        if not any(all(placed[key] == how.get(key, WHOLE) for key in placed) for how in layouts.values()):
            ways = "; or ".join(f"{kind} ({_listed(how, tensors)})" for kind, how in layouts.items())
            raise RuntimeError(
                f"flashmla::{name}: expected, on mesh dimension {dim_name}, {ways}; got {_listed(placed, tensors)}"
            )
        for key, placement in placed.items():
            if not isinstance(placement, Shard):
                continue
            dims = [d for d, other in enumerate(tensors[key].placements) if other == placement]
            ranks = math.prod(mesh.size(d) for d in dims)
            if tensors[key].shape[placement.dim] % ranks:
                raise RuntimeError(
                    f"{key}: expected dimension {placement.dim} to be a multiple of {ranks}, the ranks of mesh "
                    f"dimension {dim_name} over which it is sharded, got shape {list(tensors[key].shape)}"
                )
    return [
        (
            [how.get(output, WHOLE) for output in outputs],
            [how.get(key, WHOLE) if key in tensors else None for key in given],
        )
        for how in layouts.values()
    ]


def _listed(placements: dict[str, object], tensors) -> str:
    """Those of the call's tensors that are not replicated."""
    sharded = [f"{key} {placements[key]}" for key in tensors if placements.get(key, WHOLE) != WHOLE]
    return ", ".join(sharded) or "all replicated"


FWD = ("q", "kv_cache", "block_table", "cache_seqlens", "head_dim_v", "softmax_scale", "causal")
PLAN = ("tile_scheduler_metadata", "num_splits")


@register_sharding(ops.flashmla.fwd_kvcache_mla.default)
def _fwd_kvcache_mla(*args, **kwargs):
    given = {**dict(zip((*FWD, *PLAN), args, strict=False)), **kwargs}
    uneven = given.get("cu_seqlens_q") is not None
    dim = 1 if uneven else 2  # of q's heads
    heads = {"q": Shard(dim), "out": Shard(dim), "lse": Shard(dim - 1)}
    if given["kv_cache"].shape[2] > 1:
        heads["kv_cache"] = Shard(2)
    layouts = {"replicated": {}, "heads": heads}
    if given.get("num_splits") is None and not uneven:
        rows = ("q", "kv_cache", "block_table", "cache_seqlens", "out", "lse")
        layouts["batch"] = dict.fromkeys(rows, Shard(0))
    return _layouts("fwd_kvcache_mla", layouts, ("out", "lse"), given)


@register_sharding(ops.flashmla.merge_attn_states.default)
def _merge_attn_states(out_a, lse_a, out_b, lse_b):
    def both(out_dim: int, lse_dim: int) -> dict:
        out, lse = Shard(out_dim), Shard(lse_dim)
        return {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse, "out": out, "lse": lse}

    layouts = {"replicated": {}, "batch": both(0, 0), "heads": both(2, 1), "queries": both(1, 2)}
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    return _layouts("merge_attn_states", layouts, ("out", "lse"), given)


@register_sharding(ops.flashmla.get_mla_metadata.default)
def _get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k, **others):
    cu_seqlens_q = others.get("cu_seqlens_q")
    if cu_seqlens_q is not None and any(placement != WHOLE for placement in cu_seqlens_q.placements):
        raise RuntimeError(f"cu_seqlens_q: expected every rank to hold all of it, got {cu_seqlens_q.placements}")
    if any(placement != WHOLE for placement in cache_seqlens.placements):
        raise RuntimeError(
            f"cache_seqlens: expected every rank to hold all lengths, got {cache_seqlens.placements}: the plans of "
            "parts of a batch do not add up to one. Plan on local tensors: cache_seqlens.to_local()"
        )
    of_others = [WHOLE if hasattr(value, "placements") else None for value in others.values()]
    return [([WHOLE, WHOLE], [WHOLE, None, None, *of_others])]


def _refuse_dtensors(name: str, written: str):
    def refuse(*args, **kwargs):
        raise RuntimeError(
            f"flashmla::{name}: expected local tensors, got DTensors: {written} is written in place. Call it with "
            "tensors' to_local(), which share their memory"
        )

    return refuse


register_sharding(ops.flashmla.concat_and_cache_mla.default)(_refuse_dtensors("concat_and_cache_mla", "kv_cache"))
register_sharding(ops.flashmla.get_mla_metadata_.default)(_refuse_dtensors("get_mla_metadata_", "the plan"))
