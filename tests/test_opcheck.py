"""The registration of the ops: schema, autograd, fake and real kernels agree, with values and without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import append_calls, decode_calls, examples, invariant_refusal, lengths_of_many_rows, merge_calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from flashmla_ops import get_mla_metadata
from flashmla_ops.testing import make_append_case, make_decode_case, make_merge_case, uneven

OPS = ("get_mla_metadata", "get_mla_metadata_", "fwd_kvcache_mla", "concat_and_cache_mla", "merge_attn_states")
MODES = {"grad": torch.enable_grad, "inference": torch.inference_mode}


def run(op: str, call: dict):
    return getattr(torch.ops.flashmla, op)(**call)


def draw_invariant(data, target, uneven: bool) -> bool:
    """Whether a plan is batch-invariant: sometimes, where the target makes such."""
    return invariant_refusal(target, uneven) is None and data.draw(st.booleans(), label="batch-invariant")


def draw_call(data, op: str, target) -> dict:
    """Good arguments of an op, drawn; without NaN, since opcheck compares values."""
    if op.startswith("get_mla_metadata"):
        lengths = data.draw(lengths_of_many_rows)
        cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=target.device)
        call = {"cache_seqlens": cache_seqlens, "num_heads_per_head_k": len(lengths) + 1, "num_heads_k": 1}
        if data.draw(st.booleans(), label="uneven"):
            cu_seqlens_q = torch.arange(len(lengths) + 1, dtype=torch.int32, device=target.device)
            call |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": 2}
        invariant = draw_invariant(data, target, "cu_seqlens_q" in call)
        call |= {"batch_invariant": True} if invariant else {}
        if op == "get_mla_metadata":
            return call
        plan = cache_seqlens.new_zeros(256 + invariant, 8), cache_seqlens.new_zeros(len(lengths) + 1)
        return call | dict(zip(("tile_scheduler_metadata", "num_splits"), plan, strict=True))
    if op == "concat_and_cache_mla":
        return make_append_case(**data.draw(append_calls(target))).kwargs()
    if op == "merge_attn_states":
        return make_merge_case(**data.draw(merge_calls(target, poison=False))).kwargs()
    case = make_decode_case(**data.draw(decode_calls(target, poison=False)))
    options, b, s_q = {}, *case.q.shape[:2]
    if data.draw(st.booleans(), label="uneven"):
        queries = data.draw(st.lists(st.integers(0, s_q), min_size=b, max_size=b))
        case = uneven(case, queries)
        options = case.plan_options
    planned = data.draw(st.booleans(), label="with plan")
    if planned and draw_invariant(data, target, bool(options)):
        options["batch_invariant"] = True
    plan = get_mla_metadata(*case.plan_args, **options) if planned else (None, None)
    return case.kwargs() | dict(zip(("tile_scheduler_metadata", "num_splits"), plan, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
@settings(max_examples=examples(10))
def test_opcheck(target, op, mode, data):
    """Schema told truly, autograd registered, fake equal to real, and the same again under torch.compile's tracing."""
    with MODES[mode]():
        call = draw_call(data, op, target)
        # opcheck fails to copy an empty tensor with gaps (torch 2.13)
        call = tree_map_only(Tensor, lambda t: t if t.numel() else t.new_empty(t.shape), call)
        torch.library.opcheck(getattr(torch.ops.flashmla, op).default, (), call)


@pytest.mark.parametrize("op", OPS)
def test_tags(op):
    """needs_exact_strides keeps Inductor from handing over other strides than those the fake saw."""
    tags = getattr(torch.ops.flashmla, op).default.tags
    assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(tags)
    assert not {"maybe_aliasing_or_mutating", "out", "cudagraph_unsafe"} & {tag.name for tag in tags}


def layout(outputs) -> list[tuple]:
    return [(t.shape, t.stride(), t.dtype) for t in outputs or ()]


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@settings(max_examples=examples(25))
def test_meta_and_fake_outputs_are_laid_out_as_real_ones(target, op, data):
    """On the meta device, and on CUDA's that this machine need not have, traced too."""
    call = draw_call(data, op, target)
    real = layout(run(op, call))

    def without_values(t: Tensor, device: str) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    outputs = run(op, tree_map_only(Tensor, lambda t: without_values(t, "meta"), call))
    assert layout(outputs) == real and all(t.device.type == "meta" for t in outputs or ())
    with FakeTensorMode():
        fake = tree_map_only(Tensor, lambda t: without_values(t, "cuda"), call)
        outputs = run(op, fake)
        assert layout(outputs) == real and all(t.device.type == "cuda" for t in outputs or ())
        graph = make_fx(lambda call: run(op, call))(fake).graph
    traced = [node.target for node in graph.nodes if node.op == "call_function"]
    assert traced[0] is getattr(torch.ops.flashmla, op).default
