"""Appending tokens: right in every slot that is named, and nowhere else."""

from dataclasses import replace

import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ALL_DIMS, append_calls, examples

from flashmla_ops import concat_and_cache_mla
from flashmla_ops.kv_cache import PLAIN_DTYPES
from flashmla_ops.testing import make_append_case


@given(data=st.data())
@settings(max_examples=examples(150))
def test_writes_the_named_slots_and_nothing_else(target, data):
    """Bit for bit, the gaps of a strided cache included; slots of -1, as many as come, are skipped. Every backend
    appends in every shape and dtype."""
    serves = replace(target, dtypes=PLAIN_DTYPES, dims=(*ALL_DIMS, (720, 640)), page_sizes=(16, 48, 64, 112, 128))
    case = make_append_case(**data.draw(append_calls(serves)))
    expected = reference.append(case)
    buffer = case.kv_cache.as_strided((case.kv_cache.untyped_storage().nbytes() // case.kv_cache.itemsize,), (1,), 0)
    before = buffer.clone()
    gaps = torch.ones_like(buffer, dtype=torch.bool)
    gaps.as_strided(case.kv_cache.shape, case.kv_cache.stride(), case.kv_cache.storage_offset()).fill_(False)

    assert concat_and_cache_mla(**case.kwargs()) is None
    assert torch.equal(case.kv_cache, expected)
    assert torch.equal(buffer[gaps].view(torch.uint8), before[gaps].view(torch.uint8))


def test_any_bits_are_copied(target):
    """Infinities and NaN are values like others."""
    case = make_append_case(4, device=target.device)
    case.kv_c[0], case.kv_c[1], case.k_pe[2] = float("inf"), float("nan"), float("-inf")
    expected = reference.append(case)
    concat_and_cache_mla(**case.kwargs())
    assert torch.equal(case.kv_cache.nan_to_num(), expected.nan_to_num()) and torch.equal(
        case.kv_cache.isnan(), expected.isnan()
    )


def test_every_slot_of_a_large_cache(target):
    """As many tokens as slots, more than a grid of 65,535 blocks has."""
    d_v, page_size = min(target.dims)[1], min(target.page_sizes)
    d_rope = min(target.dims)[0] - d_v
    num_tokens = 70_000 // page_size * page_size
    kv_cache = torch.empty(
        num_tokens // page_size, page_size, 1, d_v + d_rope, dtype=torch.float16, device=target.device
    )
    kv_c, k_pe = kv_cache.new_empty(num_tokens, d_v).normal_(), kv_cache.new_empty(num_tokens, d_rope).normal_()
    slots = torch.randperm(num_tokens, device=target.device)
    concat_and_cache_mla(kv_cache, kv_c, k_pe, slots)
    assert torch.equal(kv_cache.flatten(0, 2)[slots], torch.cat([kv_c, k_pe], 1))
