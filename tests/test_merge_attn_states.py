"""Merging two states against float64, and the conventions for states that saw nothing."""

import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples, merge_calls

from flashmla_ops import merge_attn_states
from flashmla_ops.testing import MergeCase, make_merge_case, relative_error


def check(case: MergeCase) -> None:
    """out within one rounding to its dtype and a few of fp32, as whole vectors; +inf exactly where both saw nothing."""
    out, lse = merge_attn_states(**case.kwargs())
    exact_out, exact_lse = reference.merge(case)
    assert out.dtype is case.out_a.dtype and lse.dtype is torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    assert relative_error(out, exact_out, -1) <= torch.finfo(out.dtype).eps / 2 + 1e-5
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@given(data=st.data())
@settings(max_examples=examples(150))
def test_within_one_rounding_of_float64(target, data):
    """A quarter of each state has seen nothing (lse +inf or -inf), and its out is NaN."""
    check(make_merge_case(**data.draw(merge_calls(target))))


def test_any_difference_of_lse(target):
    """Equal states, differences that matter little, and such that exp of either lse overflows or vanishes."""
    case = make_merge_case(1, 1, 12, dtype=target.dtypes[0], device=target.device, poison=False)
    lse_a = [0, 3, -3, 15, 88, 89, -89, 1e4, -1e4, 3e38, -3e38, 1]
    lse_b = [0, 0, 0, 0, 0, -89, 89, 1e4, -1e4, 3e38, 3e38, float("inf")]
    case.lse_a[0, :, 0], case.lse_b[0, :, 0] = torch.tensor(lse_a), torch.tensor(lse_b)
    check(case)


def test_order_does_not_matter(target):
    case = make_merge_case(3, 2, 5, dtype=target.dtypes[0], device=target.device)
    swapped = merge_attn_states(case.out_b, case.lse_b, case.out_a, case.lse_a)
    for a, b in zip(swapped, merge_attn_states(**case.kwargs()), strict=True):
        torch.testing.assert_close(a, b, rtol=0.01 if a.dtype is not torch.float32 else 1e-6, atol=0)
