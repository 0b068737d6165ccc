"""The README's table of limits: each of its lines at its ends, and what lies beyond, which is refused with its name.

Great batches and lengths are over one page of keys, which every column of the table names: a key that comes n times
weighs n times as much, so what is right takes no more memory than that page.
"""

import pytest
import torch
from strategies import Target
from test_readme import table_under
from torch import Tensor

from flashmla_ops import concat_and_cache_mla, fwd_kvcache_mla, get_mla_metadata
from flashmla_ops.testing import BAD_PAGE, check_decode, make_decode_case, relative_error

TESTED: dict[str, list[str]] = {  # line of the table -> its tests
    "strides": ["test_errors.py"],
    "fp8 caches": ["test_fp8.py"],
    "uneven queries": ["test_uneven_queries.py"],
    "extra memory": ["test_fwd_kvcache_mla.py"],
    "not served": ["test_drop_in.py"],
}


def limit(line: str):
    """Says which line of the table a test is of."""

    def named(test):
        TESTED.setdefault(line, []).append(test.__name__)
        return test

    return named


def test_every_line_is_tested():
    assert set(table_under("| limit | served | refused |")) - {"---"} == set(TESTED)


def smallest(target: Target) -> tuple[int, int, int]:
    """d_qk, d_v and page_size of the smallest keys that are served."""
    return *min(target.dims), min(target.page_sizes)


def over_one_page(q: Tensor, page: Tensor, visible: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    """float64 out and lse of q [b, s_q, h_q, d_qk] over as many keys as are visible [b, s_q] of a page [n, d_qk] that
    is repeated without end."""
    n = page.shape[0]
    times = visible[..., None] // n + (torch.arange(n, device=q.device) < visible[..., None] % n)  # [b, s_q, n]
    scores = torch.einsum("bihd,nd->bihn", q.double(), page.double()) * q.shape[3] ** -0.5
    weights = times[:, :, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1)
    lse = (scores.amax(-1) + total.log()).masked_fill(total == 0, float("inf")).transpose(1, 2)
    return (weights @ page[:, :d_v].double() / total[..., None]).nan_to_num(), lse


def check_over_one_page(
    target: Target, lengths: Tensor, s_q: int = 1, causal: bool = False, queries: Tensor | None = None
) -> None:
    """queries: of each row, in one call with cu_seqlens_q, instead of s_q."""
    d_qk, d_v, page_size = smallest(target)
    like = {"dtype": target.dtypes[0], "device": target.device}
    torch.manual_seed(0)
    lengths = lengths.to(target.device, torch.int32)
    q, cache = torch.randn(len(lengths), s_q, 1, d_qk, **like), torch.randn(1, page_size, 1, d_qk, **like)
    options = {}
    if queries is not None:
        cu_seqlens_q = torch.cat([torch.zeros(1, dtype=torch.long), queries]).cumsum(0)
        q = torch.randn(int(cu_seqlens_q[-1]), 1, d_qk, **like)
        options = {"cu_seqlens_q": cu_seqlens_q.int().to(target.device), "max_seqlen_q": int(queries.max())}
    columns = -(-int(lengths.max()) // page_size)
    table = torch.zeros(1, columns, dtype=torch.int32, device=target.device).expand(len(lengths), -1)
    call = {"q": q, "kv_cache": cache, "block_table": table, "cache_seqlens": lengths, "head_dim_v": d_v}
    plan = get_mla_metadata(lengths, s_q, 1, **options)
    planned = dict(zip(("tile_scheduler_metadata", "num_splits"), plan, strict=True))
    hidden = torch.arange(s_q - 1, -1, -1, device=target.device) if causal else 0
    visible = (lengths.long()[:, None] - hidden).clamp_min(0).expand(-1, s_q)
    call |= {"causal": causal, **options}
    for out, lse in (fwd_kvcache_mla(**call), fwd_kvcache_mla(**call, **planned)):
        if queries is not None:  # each query like a row of one
            row = torch.repeat_interleave(queries).to(target.device)
            hidden = options["cu_seqlens_q"][row + 1] - 1 - torch.arange(len(row), device=target.device)
            visible = (lengths[row] - (hidden if causal else 0)).long().clamp_min(0)[:, None]
            q, out, lse = (t.view(len(row), 1, 1, -1) for t in (q, out, lse.T.contiguous()))
            lse = lse[..., 0]
        for rows in torch.arange(len(q), device=target.device).split(1 << 17):
            exact_out, exact_lse = over_one_page(q[rows], cache[0, :, 0], visible[rows], d_v)
            seen = exact_lse.isfinite()
            assert relative_error(out[rows], exact_out) < torch.finfo(out.dtype).eps
            assert torch.equal(lse[rows][~seen].double(), exact_lse[~seen])
            assert not seen.any() or (lse[rows].double() - exact_lse)[seen].abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------ sizes of a call


@limit("batch")
@pytest.mark.large
@pytest.mark.parametrize("b", [0, 1, 1_048_576])
def test_batches(target, b):
    if b == 0:
        case = make_decode_case([], dtype=target.dtypes[0], device=target.device)
        check_decode(case, *fwd_kvcache_mla(**case.kwargs()))
    else:
        check_over_one_page(target, torch.arange(b) % 4)


@limit("lengths")
@pytest.mark.large
@pytest.mark.parametrize("length", [0, 1, 4_194_303, 4_194_304])
def test_lengths(target, length):
    check_over_one_page(target, torch.tensor([length, 100]))


@limit("lengths")
def test_lengths_that_are_none(target, monkeypatch):
    monkeypatch.setattr("flashmla_ops.backends.values.DEBUG", True)
    case = make_decode_case([100], device=target.device, dtype=target.dtypes[0])
    reach = case.block_table.shape[1] * case.kv_cache.shape[1]
    for length in (-1, reach + 1, -(2**31), 2**31 - 1):
        case.cache_seqlens[0] = length
        with pytest.raises(
            RuntimeError, match=f"cache_seqlens: expected lengths from 0 to {reach} .*, got {length} in"
        ):
            fwd_kvcache_mla(**case.kwargs())


@limit("queries a row")
@pytest.mark.large
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q", [1, 65_536])
def test_queries_of_a_row(target, s_q, causal):
    """More than keys, too: those before the start see none."""
    check_over_one_page(target, torch.tensor([300, 0, 1]), s_q, causal)


@limit("uneven queries")
@pytest.mark.large
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", ["many of one row", "many rows"])
def test_uneven_queries(target, queries, causal):
    if queries == "many rows":
        queries = torch.arange(1_048_576) % 3
        check_over_one_page(target, torch.arange(len(queries)) % 5, causal=causal, queries=queries)
    else:
        lengths, queries = torch.tensor([300, 7, 0, 1, 90]), torch.tensor([65_536, 0, 3, 1, 1])
        check_over_one_page(target, lengths, causal=causal, queries=queries)


@limit("tokens appended")
@pytest.mark.parametrize("n", [0, 1, pytest.param(1_048_576, marks=pytest.mark.large)])
def test_tokens_appended(target, n):
    d_qk, d_v, page_size = smallest(target)
    like = {"dtype": target.dtypes[0], "device": target.device}
    cache = torch.zeros(n // page_size + 1, page_size, 1, d_qk, **like)
    kv_c, k_pe = torch.randn(n, d_v, **like), torch.randn(n, d_qk - d_v, **like)
    slots = torch.arange(n, device=target.device).flip(0)
    concat_and_cache_mla(cache, kv_c, k_pe, slots)
    assert torch.equal(cache.flatten(0, 2)[slots], torch.cat([kv_c, k_pe], 1)) and not cache.flatten(0, 2)[n:].any()


# ----------------------------------------------------------------------------------------------------- cache and table


@limit("cache")
@pytest.mark.large
def test_a_cache_of_more_than_2_31_elements(target):
    """Its last page is written and read. On the CPU the rest is never touched, and so takes no memory."""
    d_qk, d_v, page_size = smallest(target)
    like = {"dtype": target.dtypes[0], "device": target.device}
    num_pages = 2**31 // (page_size * d_qk) + 2
    cache = torch.empty(num_pages, page_size, 1, d_qk, **like)
    assert cache.numel() > 2**31
    tokens = torch.randn(page_size, d_qk, **like)
    last = num_pages - 1
    slots = last * page_size + torch.arange(page_size, device=target.device)
    concat_and_cache_mla(cache, tokens[:, :d_v].contiguous(), tokens[:, d_v:].contiguous(), slots)
    assert torch.equal(cache[last, :, 0], tokens)
    q = torch.randn(1, 1, 4, d_qk, **like)
    table = torch.tensor([[last, BAD_PAGE]], dtype=torch.int32, device=target.device)
    length = torch.tensor([page_size], dtype=torch.int32, device=target.device)
    out, _ = fwd_kvcache_mla(q, cache, table, length, d_v)
    exact, _ = over_one_page(q, tokens, length.long()[:, None], d_v)
    assert relative_error(out, exact) < torch.finfo(out.dtype).eps


@limit("block_table")
@pytest.mark.parametrize("columns", [1, pytest.param(1_048_576, marks=pytest.mark.large)])
def test_tables_of_any_width(target, columns):
    """And with rows at any distance; what lies past a row's pages may be anything."""
    case = make_decode_case([60, 10], device=target.device, dtype=target.dtypes[0])
    table = torch.full((2, columns + 7), BAD_PAGE, dtype=torch.int32, device=target.device)
    table[:, :1] = case.block_table[:, :1]
    case.block_table = table[:, :columns]
    check_decode(case, *fwd_kvcache_mla(**case.kwargs()), target.factor)


@limit("page_size")
@pytest.mark.parametrize("page_size", [16, 48, 64, 128, 192, 1024])
def test_page_sizes(target, page_size):
    if page_size % min(target.page_sizes):
        pytest.skip(f"{target.name} serves multiples of {min(target.page_sizes)}")
    case = make_decode_case([300, 7], page_size=page_size, device=target.device, dtype=target.dtypes[0])
    check_decode(case, *fwd_kvcache_mla(**case.kwargs()), target.factor)


@limit("page_size")
@pytest.mark.parametrize("page_size", [0, 1, 8, 24, 65])
def test_page_sizes_that_are_refused(target, page_size):
    case = make_decode_case([5], device=target.device, dtype=target.dtypes[0])
    case.kv_cache = case.kv_cache.new_zeros(4, page_size, 1, 576)
    with pytest.raises(RuntimeError, match=f"kv_cache: expected a page size .* multiple of 16, got {page_size}"):
        fwd_kvcache_mla(**case.kwargs())


# ------------------------------------------------------------------------------------------------------- heads and dims


@limit("h_q")
@pytest.mark.parametrize("h_q", [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256])
def test_query_heads(target, h_q):
    if h_q > 2 * target.most_queries:
        pytest.skip("too many for Triton's interpreter")
    case = make_decode_case([130, 3], h_q=h_q, device=target.device, dtype=target.dtypes[0])
    check_decode(case, *fwd_kvcache_mla(**case.kwargs()), target.factor)


@limit("h_k")
@pytest.mark.parametrize("h_q, h_k", [(1, 1), (6, 3), (16, 16), (256, 2), (256, 256)])
def test_key_heads(target, h_q, h_k):
    if h_q > 2 * target.most_queries:
        pytest.skip("too many for Triton's interpreter")
    case = make_decode_case([130, 3], h_q=h_q, h_k=h_k, device=target.device, dtype=target.dtypes[0])
    check_decode(case, *fwd_kvcache_mla(**case.kwargs()), target.factor)


@limit("h_k")
def test_key_heads_that_are_refused(target):
    case = make_decode_case([5], h_q=16, h_k=3, device=target.device, dtype=target.dtypes[0])
    with pytest.raises(RuntimeError, match=r"kv_cache: expected h_k .* to divide q's 16 heads, got 3"):
        fwd_kvcache_mla(**case.kwargs())
    tokens = case.kv_cache.new_zeros(1, 512), case.kv_cache.new_zeros(1, 64)
    slots = torch.zeros(1, dtype=torch.int64, device=target.device)
    with pytest.raises(RuntimeError, match=r"kv_cache: expected dimension 2 to be 1 .*, got shape"):
        concat_and_cache_mla(case.kv_cache, *tokens, slots)


@limit("d_qk, d_v")
def test_dims(target):
    for d_qk, d_v in target.dims:
        case = make_decode_case([130, 3], h_q=4, d_qk=d_qk, d_v=d_v, device=target.device, dtype=target.dtypes[0])
        check_decode(case, *fwd_kvcache_mla(**case.kwargs()), target.factor)


@limit("d_qk, d_v")
@pytest.mark.parametrize("d_qk, d_v, name", [(568, 512, "q"), (576, 520, "head_dim_v"), (576, 592, "head_dim_v")])
def test_dims_that_are_refused(target, d_qk, d_v, name):
    case = make_decode_case([5], h_q=4, d_qk=d_qk, d_v=512, device=target.device, dtype=target.dtypes[0])
    with pytest.raises(
        RuntimeError, match=f"{name}: expected .*a multiple of 16.*, got {d_v if name != 'q' else d_qk}"
    ):
        fwd_kvcache_mla(**case.kwargs() | {"head_dim_v": d_v})
