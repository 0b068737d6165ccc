"""FlashMLA's three interfaces, through `import flashmla_ops as flash_mla`."""

import inspect

import pytest
import torch

import flashmla_ops as flash_mla
from flashmla_ops import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from flashmla_ops.testing import check_decode, make_decode_case


@pytest.fixture
def case(target):
    """Two queries a row, causal, with FlashMLA's dims."""
    call = {"s_q": 2, "h_q": 16, "causal": True, "dtype": target.dtypes[0], "device": target.device}
    return make_decode_case([900, 0, 64, 1], **call)


def test_first_release(target, case):
    """The usage of FlashMLA's first README, as it stands there: the plan is made once and shared by the layers."""
    s_q, h_q, h_kv, dv, num_layers = 2, 16, 1, 512, 2
    q_i, kvcache_i, block_table, cache_seqlens = case.q, case.kv_cache, case.block_table, case.cache_seqlens

    tile_scheduler_metadata, num_splits = flash_mla.get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)
    for _ in range(num_layers):
        o_i, lse_i = flash_mla.flash_mla_with_kvcache(
            q_i, kvcache_i, block_table, cache_seqlens, dv,
            tile_scheduler_metadata, num_splits, causal=True,
        )  # fmt: skip
        check_decode(case, o_i, lse_i, target.factor)


def test_keywords_of_september_2025(target, case):
    """Names and order of that release; it returned tensors too."""
    by_position = get_mla_metadata(case.cache_seqlens, 32, 1, 16, False, None)
    by_keyword = get_mla_metadata(
        case.cache_seqlens, num_q_tokens_per_head_k=32, num_heads_k=1, num_heads_q=16, is_fp8_kvcache=False, topk=None
    )
    first = get_mla_metadata(case.cache_seqlens, 32, 1)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, by_position, by_keyword, strict=True))
    arguments = {"k_cache": case.kv_cache, "head_dim_v": 512, "softmax_scale": 0.05, "is_fp8_kvcache": False}
    case.softmax_scale = 0.05
    tables = {"block_table": case.block_table, "cache_seqlens": case.cache_seqlens, "indices": None}
    plan = dict(zip(("tile_scheduler_metadata", "num_splits"), by_keyword, strict=True))
    check_decode(case, *flash_mla_with_kvcache(case.q, causal=True, **arguments, **tables, **plan), target.factor)


@pytest.mark.parametrize("compiled", [False, True])
def test_scheduler_object_of_2026(target, case, compiled):
    """It holds nothing: every call plans for itself, compiled or not, whatever the lengths of the call before."""
    metadata, num_splits = get_mla_metadata()
    assert isinstance(metadata, FlashMLASchedMeta) and num_splits is None and not vars(metadata)

    def step(q, kv_cache, block_table, cache_seqlens):
        sched_meta, _ = get_mla_metadata()
        return flash_mla_with_kvcache(q, kv_cache, block_table, cache_seqlens, 512, sched_meta, None, causal=True)

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    for cache_seqlens in (case.cache_seqlens, case.cache_seqlens.clamp_max(70)):
        case.cache_seqlens = cache_seqlens
        check_decode(case, *step(case.q, case.kv_cache, case.block_table, cache_seqlens), target.factor)


def test_signature_of_flash_mla_with_kvcache():
    """Positions are those of the first release, options those of the last."""
    parameters = list(inspect.signature(flash_mla_with_kvcache).parameters)
    first = "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits softmax_scale causal"
    later = "is_fp8_kvcache indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length"
    assert parameters == (first + " " + later).split()


@pytest.mark.parametrize(
    "argument",
    ["indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length"],
)
def test_sparse_arguments_are_refused_by_name(target, case, argument):
    arguments = (case.q, case.kv_cache, case.block_table, case.cache_seqlens, 512, get_mla_metadata()[0])
    with pytest.raises(NotImplementedError, match=rf"^{argument}: sparse attention is not served"):
        flash_mla_with_kvcache(*arguments, **{argument: torch.zeros(1)})


def test_fp8_and_topk_are_refused_by_name(case):
    arguments = (case.q, case.kv_cache, case.block_table, case.cache_seqlens, 512)
    with pytest.raises(NotImplementedError, match=r"^is_fp8_kvcache: this form does not take it"):
        flash_mla_with_kvcache(*arguments, is_fp8_kvcache=True)
    with pytest.raises(NotImplementedError, match=r"^is_fp8_kvcache: this form does not take it"):
        get_mla_metadata(case.cache_seqlens, 32, 1, is_fp8_kvcache=True)
    with pytest.raises(NotImplementedError, match=r"^topk: sparse attention is not served"):
        get_mla_metadata(case.cache_seqlens, 32, 1, topk=2048)


def test_incomplete_plans_are_refused_by_name(case):
    with pytest.raises(RuntimeError, match=r"num_heads_k: expected a value .*, got None"):
        get_mla_metadata(case.cache_seqlens, 32)
    with pytest.raises(RuntimeError, match=r"num_q_tokens_per_head_k: expected .*16.*, got 32"):
        get_mla_metadata(case.cache_seqlens, 16, 1, num_q_tokens_per_head_k=32)
