"""What hypothesis draws: calls of the ops, within what a backend serves.

A drawn call is a dict of plain values, the arguments of flashmla_ops.testing's makers: a failing example prints as
something that can be pasted into a shell.
"""

import os
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from flashmla_ops import backends

ALL_DIMS = ((576, 512), (320, 256), (288, 256), (512, 512), (512, 448), (160, 128), (64, 48), (16, 16))  # d_qk, d_v


# Triton's interpreter runs a program in milliseconds, so under it tests draw less: see test_triton.py
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def examples(n: int) -> int:
    """How many examples a test draws that draws n on hardware."""
    return max(3, n // 16) if INTERPRETED else n


@dataclass(frozen=True)
class Target:
    """A backend of this machine and what it serves."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    dims: tuple[tuple[int, int], ...] = ((576, 512),)
    page_sizes: tuple[int, ...] = (64, 128)
    factor: float = 1.5  # of PyTorch's error in the same dtype, what `check_decode` allows
    fp8: bool = True  # whether it serves fp8 caches
    most_keys: int = 1500  # of a drawn call's rows together
    most_queries: int = 512  # of a row, over its heads


TARGETS = {
    "cpu": Target(
        "cpu",
        "cpu",
        (torch.bfloat16, torch.float16, torch.float32),
        ALL_DIMS,
        page_sizes=(16, 32, 48, 64, 128),
        factor=2,
    ),
    "sm90": Target("sm90", "cuda"),
    "triton": Target(
        "triton",
        "cpu" if INTERPRETED else "cuda",
        (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16),
        ALL_DIMS,
        page_sizes=(16, 32, 48, 64, 128),
        factor=2,
        most_keys=300 if INTERPRETED else 1500,
        most_queries=40 if INTERPRETED else 512,
    ),
}


def invariant_refusal(target: Target, uneven: bool = False) -> str | None:
    """Why a backend makes no batch-invariant plans, of uneven queries; None if it does."""
    lengths = torch.zeros(1, dtype=torch.int32, device=target.device)
    facts = {"cu_seqlens_q": lengths, "max_seqlen_q": 1} if uneven else {}
    reason = backends.ALL[target.name].refusal("get_mla_metadata", lengths, batch_invariant=True, **facts)
    return reason and f"{target.name}: {reason}"


seeds = st.integers(0, 2**31)
head_counts = st.sampled_from([(1, 1), (2, 1), (5, 1), (12, 1), (16, 1), (20, 1), (128, 1), (4, 2), (6, 3), (12, 4)])
edges = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192, 256, 512)
lengths_of_many_rows = st.one_of(
    st.lists(st.integers(0, 3000), max_size=12),
    st.lists(st.sampled_from([0, 0, 1, 64, 65, 128]), max_size=400),  # many rows to a part, runs of empty ones
    st.lists(st.integers(0, 1_000_000), max_size=4),  # many parts to a row
)
row_lengths = st.one_of(st.sampled_from(edges), st.integers(0, 200), st.integers(200, 900))


@st.composite
def lengths_of_rows(draw, max_rows: int = 5, most_keys: int = 1500) -> list[int]:
    """Lengths of a small batch, of at most most_keys keys together."""
    lengths, left = [], most_keys
    for length in draw(st.lists(row_lengths, min_size=1, max_size=max_rows)):
        lengths.append(min(length, left))
        left -= lengths[-1]
    return lengths


@st.composite
def decode_calls(draw, target: Target, **fixed) -> dict:
    """Arguments of make_decode_case; those in `fixed` are not drawn. Half of all calls are peaked."""
    h_q, h_k = draw(head_counts.filter(lambda heads: heads[0] <= target.most_queries))
    d_qk, d_v = draw(st.sampled_from(target.dims))
    s_q = draw(st.sampled_from([1, 1, 2, 3, 4, 7, 70]).filter(lambda s: s * h_q <= target.most_queries))
    drawn = {
        "lengths": draw(lengths_of_rows(most_keys=target.most_keys)),
        "s_q": s_q,
        "h_q": h_q,
        "h_k": h_k,
        "d_qk": d_qk,
        "d_v": d_v,
        "page_size": draw(st.sampled_from(target.page_sizes)),
        "dtype": draw(st.sampled_from(target.dtypes)),
        "device": target.device,
        "causal": draw(st.booleans()),
        "softmax_scale": draw(
            st.sampled_from([None, None, 192**-0.5, 0.03])
        ),  # 128 + 64: DeepSeek's, before absorption
        "peaked": draw(st.sampled_from([None, None, None, "first", "middle", "last"])),
        "strided": draw(st.booleans()),
        "seed": draw(seeds),
    }
    return drawn | fixed


@st.composite
def append_calls(draw, target: Target, **fixed) -> dict:
    """Arguments of make_append_case."""
    d_qk, d_v = draw(st.sampled_from(target.dims))
    drawn = {
        "num_tokens": draw(st.sampled_from([0, 1, 2, 17, 64, 100])),
        "d_v": d_v,
        "d_rope": d_qk - d_v,
        "page_size": draw(st.sampled_from(target.page_sizes)),
        "dtype": draw(st.sampled_from(target.dtypes)),
        "device": target.device,
        "skip": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "strided": draw(st.booleans()),
        "seed": draw(seeds),
    }
    return drawn | fixed


@st.composite
def merge_calls(draw, target: Target, **fixed) -> dict:
    """Arguments of make_merge_case."""
    drawn = {
        "b": draw(st.integers(0, 4)),
        "s_q": draw(st.sampled_from([1, 2, 5])),
        "h_q": draw(st.sampled_from([1, 5, 16, 128])),
        "d_v": draw(st.sampled_from(target.dims))[1],
        "dtype": draw(st.sampled_from(target.dtypes)),
        "device": target.device,
        "strided": draw(st.booleans()),
        "seed": draw(seeds),
    }
    return drawn | fixed
