"""The ops on DTensors: each layout of sharding.py equals the unsharded op, and others say what would do."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_checks
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import flashmla_ops.sharding  # noqa: F401  registers the rules
from flashmla_ops import concat_and_cache_mla, fwd_kvcache_mla, get_mla_metadata, get_mla_metadata_, merge_attn_states
from flashmla_ops.testing import make_decode_case, make_merge_case, quantized, uneven

WHOLE = Replicate()


def case_of(h_k: int = 1, s_q: int = 2, **options):
    return make_decode_case([40, 7, 0, 100], s_q, 8, h_k, 64, 48, page_size=16, dtype=torch.float32, **options)


def shard(tensors: dict, mesh, **placements) -> dict:
    """The tensors on every rank as DTensors of a one-dimensional mesh, replicated unless `placements` says else."""
    return {
        name: distribute_tensor(t, mesh, [placements.get(name, WHOLE)], src_data_rank=None)
        if isinstance(t, torch.Tensor)
        else t
        for name, t in tensors.items()
    }


def check(outputs, placements, expected) -> None:
    for output, placement, wanted in zip(outputs, placements, expected, strict=True):
        assert isinstance(output, DTensor) and output.placements == tuple(placement)
        torch.testing.assert_close(output.full_tensor(), wanted, rtol=1e-5, atol=1e-5)


def refused(message: str, call, *args, **kwargs) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(*args, **kwargs)


# -------------------------------------------------------------------------------------- on each of two ranks


def replicated():
    mesh, case = mesh_of(tp=2), case_of()
    given = shard(case.kwargs(), mesh)
    plan = get_mla_metadata(given["cache_seqlens"], 2 * 8, 1)
    assert all(t.placements == (WHOLE,) for t in plan)
    out = fwd_kvcache_mla(*given.values(), *plan)
    check(out, ([WHOLE], [WHOLE]), fwd_kvcache_mla(**case.kwargs()))


def heads():
    """With a plan for a rank's own heads, without one, over an fp8 cache, and with a cache of several heads."""
    mesh = mesh_of(tp=2)
    for h_k in (1, 2):
        case = case_of(h_k)
        cache = {"kv_cache": Shard(2)} if h_k > 1 else {}
        given = shard(case.kwargs(), mesh, q=Shard(2), **cache)
        own_heads = get_mla_metadata(given["cache_seqlens"], 2 * 4, 1)
        for plan in (own_heads, (None, None)):
            out = fwd_kvcache_mla(*given.values(), *plan)
            check(out, ([Shard(2)], [Shard(1)]), fwd_kvcache_mla(**case.kwargs()))
    case = uneven(case_of(), [1, 2, 0, 1])
    given = shard(case.kwargs(), mesh, q=Shard(1))
    plan = get_mla_metadata(given["cache_seqlens"], 4, 1, cu_seqlens_q=given["cu_seqlens_q"], max_seqlen_q=2)
    for options in ({}, dict(zip(("tile_scheduler_metadata", "num_splits"), plan, strict=True))):
        check(fwd_kvcache_mla(**given, **options), ([Shard(1)], [Shard(0)]), fwd_kvcache_mla(**case.kwargs()))
    case = quantized(make_decode_case([40, 70], 1, 8, 1, 64, 48, page_size=16), "fp8_tensor")
    given = shard(case.kwargs(), mesh, q=Shard(2))
    check(fwd_kvcache_mla(**given), ([Shard(2)], [Shard(1)]), fwd_kvcache_mla(**case.kwargs()))


def batch():
    """Pages are numbered from 0 on every rank, so that together they make no table of a whole cache."""
    mesh, rank = mesh_of(dp=2), dist.get_rank()
    locals_ = [case_of(seed=seed) for seed in (0, 1)]
    ours = locals_[rank].kwargs()
    given = {
        name: DTensor.from_local(t, mesh, [Shard(0)]) if isinstance(t, torch.Tensor) else t for name, t in ours.items()
    }
    expected = [fwd_kvcache_mla(**case.kwargs()) for case in locals_]
    expected = [torch.cat(parts) for parts in zip(*expected, strict=True)]
    check(fwd_kvcache_mla(**given), ([Shard(0)], [Shard(0)]), expected)


def merges():
    mesh, case = mesh_of(tp=2), make_merge_case(4, 2, 8, 48, dtype=torch.float32)
    for out, lse in ((WHOLE, WHOLE), (Shard(0), Shard(0)), (Shard(2), Shard(1)), (Shard(1), Shard(2))):
        given = shard(case.kwargs(), mesh, out_a=out, lse_a=lse, out_b=out, lse_b=lse)
        check(merge_attn_states(**given), ([out], [lse]), merge_attn_states(**case.kwargs()))
    refused(
        "expected, on mesh dimension tp, replicated",
        merge_attn_states,
        **{**given, "out_a": given["out_a"].redistribute(mesh, [Shard(0)])},
    )


def compiled():
    """fullgraph, in one compile."""
    mesh, case = mesh_of(tp=2), case_of()
    backend = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=backend, fullgraph=True)
    def step(q, kv_cache, block_table, cache_seqlens):
        plan = get_mla_metadata(cache_seqlens, 2 * 4, 1)
        return fwd_kvcache_mla(q, kv_cache, block_table, cache_seqlens, 48, case.softmax_scale, case.causal, *plan)

    given = shard(case.kwargs(), mesh, q=Shard(2))
    for _ in range(2):
        with torch.no_grad():
            out = step(*(t for t in given.values() if isinstance(t, DTensor)))
        check(out, ([Shard(2)], [Shard(1)]), fwd_kvcache_mla(**case.kwargs()))
    assert backend.frame_count == 1


def refusals():
    """Layouts that cannot work name what was expected and what came, on every rank, before anything is computed."""
    mesh, case = mesh_of(tp=2), case_of()
    whole = shard(case.kwargs(), mesh)
    for name, placement in (
        ("q", Shard(1)),
        ("q", Shard(3)),
        ("q", Shard(0)),
        ("kv_cache", Shard(1)),
        ("block_table", Shard(0)),
    ):
        given = whole | shard({name: case.kwargs()[name]}, mesh, **{name: placement})
        refused(
            rf"heads \(q S\(2\)\); or batch \(q S\(0\), .*got {name} S\({placement.dim}\)", fwd_kvcache_mla, **given
        )
    plan = get_mla_metadata(whole["cache_seqlens"], 16, 1)
    rows = shard(case.kwargs(), mesh, **dict.fromkeys(("q", "kv_cache", "block_table", "cache_seqlens"), Shard(0)))
    refused(
        r"replicated \(all replicated\); or heads \(q S\(2\)\); got q S\(0\)", fwd_kvcache_mla, *rows.values(), *plan
    )
    odd = make_decode_case([40, 7], 1, 5, 1, 64, 48, page_size=16, dtype=torch.float32).kwargs()
    refused("q: expected dimension 2 to be a multiple of 2", fwd_kvcache_mla, **shard(odd, mesh, q=Shard(2)))
    refused(r"Plan on local tensors", get_mla_metadata, rows["cache_seqlens"], 16, 1)
    tokens = torch.zeros(2, 64)
    written = shard({"cache": case.kv_cache, "c": tokens[:, :48], "pe": tokens[:, 48:], "slots": torch.arange(2)}, mesh)
    before = case.kv_cache.clone()
    refused("expected local tensors, got DTensors: kv_cache", concat_and_cache_mla, *written.values())
    assert torch.equal(before.nan_to_num(), case.kv_cache.nan_to_num())
    names = dict(zip(("tile_scheduler_metadata", "num_splits"), plan, strict=True))
    refused("expected local tensors, got DTensors: the plan", get_mla_metadata_, whole["cache_seqlens"], 16, 1, **names)
    concat_and_cache_mla(*(t.to_local() for t in written.values()))
    assert torch.equal(written["cache"].to_local().flatten(0, 2)[:2], tokens)


CHECKS = {f.__name__: f for f in (replicated, heads, batch, merges, compiled, refusals)}


@pytest.fixture(scope="module")
def found():
    return run_checks(2, CHECKS, str(Path(__file__).parent))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(found, name):
    assert found[name] is None, found[name]
