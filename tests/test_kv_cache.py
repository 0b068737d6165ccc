"""PagedKVCache: whatever is allocated, extended and freed, its tables and pages agree with a model in Python."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashmla_ops import PagedKVCache, concat_and_cache_mla, fwd_kvcache_mla
from flashmla_ops.kv_cache import FORMATS, format_of, slots_of
from flashmla_ops.testing import relative_error

PAGE, PAGES, ROWS, COLUMNS, NEW = (
    16,
    12,
    4,
    5,
    3,
)  # page size, pages, rows, pages a row at most, tokens an extend at most
counts = st.integers(0, NEW)


class CacheMachine(RuleBasedStateMachine):
    """The model: the tokens of each live row, where every token that was ever written is another number."""

    def __init__(self):
        super().__init__()
        sizes = {"head_dim": 32, "page_size": PAGE, "max_new_tokens": NEW, "dtype": torch.float32}
        self.cache = PagedKVCache(2, PAGES, ROWS, COLUMNS, **sizes)
        self.tensors = (*self.cache.layers, self.cache.block_table, self.cache.cache_seqlens, self.cache.slot_mapping)
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.tokens: dict[int, list[int]] = {}
        self.written = 0

    def pages_needed(self, added: dict[int, int]) -> int:
        return sum(-(-(len(self.tokens[r]) + n) // PAGE) - -(-len(self.tokens[r]) // PAGE) for r, n in added.items())

    def new_tokens(self, n: int) -> list[int]:
        self.written += n
        return list(range(self.written - n, self.written))

    def write(self, tokens: list[int], slots: torch.Tensor) -> None:
        kv_c = torch.tensor(tokens, dtype=torch.float32)[:, None].repeat(1, 16)
        concat_and_cache_mla(self.cache.layers[1], kv_c, kv_c, slots)

    def refused(self, act, message: str) -> None:
        """An act that can't be done says why, and changes nothing."""
        before = [t.clone() for t in self.tensors]
        with pytest.raises(RuntimeError, match=message):
            act()
        assert all(torch.equal(a, b) for a, b in zip(before, self.tensors, strict=True))

    @rule(num_tokens=st.one_of(st.integers(0, 40), st.integers(0, (COLUMNS + 1) * PAGE)))
    def allocate(self, num_tokens):
        if len(self.tokens) == ROWS:
            return self.refused(lambda: self.cache.allocate(num_tokens), f"free row, got all {ROWS} in use")
        needed, free = -(-num_tokens // PAGE), self.cache.num_free_pages
        if num_tokens > COLUMNS * PAGE:
            message = f"expected at most {COLUMNS * PAGE} tokens .*, got {num_tokens}"
            return self.refused(lambda: self.cache.allocate(num_tokens), message)
        if needed > free:
            return self.refused(lambda: self.cache.allocate(num_tokens), f"{needed} needed, {free} free")
        row = self.cache.allocate(num_tokens)
        assert row == min(set(range(ROWS)) - set(self.tokens))
        self.tokens[row] = self.new_tokens(num_tokens)
        positions = torch.arange(num_tokens)[None]
        self.write(self.tokens[row], slots_of(self.cache.block_table[row : row + 1], positions, PAGE)[0])

    @rule(data=st.data())
    def extend(self, data):
        """By one count for all, by a count for some rows, or by a list with a count for every row."""
        added = (
            {row: data.draw(counts) for row in data.draw(st.sets(st.sampled_from(sorted(self.tokens))))}
            if self.tokens
            else {}
        )
        argument = data.draw(st.sampled_from([added, [added.get(row, 0) for row in range(ROWS)], "all"]))
        if argument == "all":
            argument = data.draw(counts)
            added = dict.fromkeys(self.tokens, argument)
        if any(len(self.tokens[row]) + n > COLUMNS * PAGE for row, n in added.items()):
            return self.refused(lambda: self.cache.extend(argument), f"at most {COLUMNS * PAGE} tokens")
        needed, free = self.pages_needed(added), self.cache.num_free_pages
        if needed > free:
            return self.refused(lambda: self.cache.extend(argument), f"out of pages: {needed} needed, {free} free")

        self.cache.extend(argument)
        new = {row: self.new_tokens(added.get(row, 0)) for row in range(ROWS)}
        slots = self.cache.slot_mapping.view(ROWS, NEW)
        for row, tokens in new.items():  # right-aligned in their row, -1 before them
            self.tokens.get(row, []).extend(tokens)
            assert (slots[row, : NEW - len(tokens)] == -1).all() and (slots[row, NEW - len(tokens) :] >= 0).all()
        self.write([token for row in range(ROWS) for token in [0] * (NEW - len(new[row])) + new[row]], slots.flatten())

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        row = data.draw(st.sampled_from(sorted(self.tokens)))
        self.cache.free(row)
        del self.tokens[row]
        assert (self.cache.slot_mapping.view(ROWS, NEW)[row] == -1).all()

    @rule(row=st.integers(-1, ROWS))
    def unknown_rows_are_refused(self, row):
        if row not in self.tokens:
            for act in (self.cache.free, self.cache.pages_of, lambda row: self.cache.extend({row: 1})):
                self.refused(lambda act=act: act(row), rf"row: expected one that holds a sequence .*, got {row}")

    @precondition(lambda self: self.tokens)
    @rule(n=st.sampled_from([-1, NEW + 1]))
    def bad_counts_are_refused(self, n):
        self.refused(
            lambda: self.cache.extend({min(self.tokens): n}), f"num_tokens: expected at (most|least) .*, got {n}"
        )

    @invariant()
    def pages_are_neither_lost_nor_shared(self):
        owned = [page for row in self.tokens for page in self.cache.pages_of(row)]
        assert len(set(owned)) == len(owned) and set(owned) <= set(range(PAGES))
        assert len(owned) + self.cache.num_free_pages == PAGES

    @invariant()
    def tables_agree_with_the_model(self):
        assert self.cache.rows == sorted(self.tokens)
        lengths = [len(self.tokens.get(row, [])) for row in range(ROWS)]
        assert self.cache.cache_seqlens.tolist() == lengths
        for row, tokens in self.tokens.items():
            pages = self.cache.pages_of(row)
            assert len(pages) == -(-len(tokens) // PAGE)
            assert self.cache.block_table[row, : len(pages)].tolist() == pages
            kept = self.cache.layers[1][pages].flatten(0, 2)[: len(tokens)]
            assert kept[:, 0].tolist() == tokens and (kept == kept[:, :1]).all()

    @invariant()
    def addresses_never_change(self):
        now = (*self.cache.layers, self.cache.block_table, self.cache.cache_seqlens, self.cache.slot_mapping)
        assert all(a is b for a, b in zip(now, self.tensors, strict=True))
        assert [t.data_ptr() for t in now] == self.addresses


TestPagedKVCache = CacheMachine.TestCase
TestPagedKVCache.settings = settings(max_examples=60, stateful_step_count=40)


def test_tokens_appended_and_attended_step_by_step(target):
    """Rows that start with prompts, grow, end and start again: a step equals attention over the tokens themselves."""
    d_qk, d_v = target.dims[0]
    page_size, h_q, rows = min(target.page_sizes), 4, 3
    new = {"dtype": target.dtypes[0], "device": target.device}
    cache = PagedKVCache(1, 30, rows, 10, head_dim=d_qk, page_size=page_size, max_new_tokens=2, **new)
    generator = torch.Generator(target.device).manual_seed(0)
    tokens = {}  # row: its keys so far, [n, d_qk]

    def start(num_tokens: int) -> None:
        row = cache.allocate(num_tokens)
        tokens[row] = torch.randn(num_tokens, d_qk, generator=generator, **new)
        slots = slots_of(
            cache.block_table[row : row + 1], torch.arange(num_tokens, device=target.device)[None], page_size
        )
        concat_and_cache_mla(cache.layers[0], tokens[row][:, :d_v], tokens[row][:, d_v:], slots[0])

    start(page_size - 1), start(0), start(2 * page_size)
    for step in range(20):
        if step == 8:
            cache.free(0)
            del tokens[0]
        if step == 12:
            start(3)
        cache.extend({row: 1 + (row + step) % 2 for row in tokens})
        appended = torch.randn(rows, 2, d_qk, generator=generator, **new)
        flat = appended.flatten(0, 1)
        concat_and_cache_mla(cache.layers[0], flat[:, :d_v], flat[:, d_v:], cache.slot_mapping)
        q = torch.randn(rows, 2, h_q, d_qk, generator=generator, **new)
        out, lse = fwd_kvcache_mla(q, cache.layers[0], cache.block_table, cache.cache_seqlens, d_v, causal=True)
        for row in range(rows):
            if row not in tokens:
                assert not out[row].any() and (lse[row] == float("inf")).all()
                continue
            tokens[row] = torch.cat([tokens[row], appended[row, -(1 + (row + step) % 2) :]])
            last = q[row, -1].double() @ tokens[row].double().T * d_qk**-0.5  # scores of the last query, [h_q, n]
            expected = last.softmax(-1) @ tokens[row][:, :d_v].double()
            assert relative_error(out[row, -1], expected, -1) < 2 * torch.finfo(out.dtype).eps


def test_slots_of_positions():
    block_table = torch.tensor([[7, 3], [0, 9]], dtype=torch.int32)
    slots = slots_of(block_table, torch.tensor([[-1, 0, 17], [15, 16, -5]]), 16)
    assert slots.tolist() == [[-1, 7 * 16, 3 * 16 + 1], [15, 9 * 16, -1]] and slots.dtype is torch.int64


@pytest.mark.parametrize("layout", FORMATS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("d_v, d_rope", [(512, 64), (128, 32), (512, 0)])
def test_the_format_is_said_by_name(layout, d_v, d_rope):
    """And is told from the tensors then."""
    sizes = {"kv_lora_rank": d_v, "qk_rope_head_dim": d_rope, "page_size": 16}
    cache = PagedKVCache(2, 3, 1, 3, kv_cache_dtype=layout.name, **sizes)
    for layer in cache.layers:
        assert layer.shape == (3, 16, 1, layout.last_dim(d_v, d_rope)) and layer.dtype is layout.dtypes[0]
        assert format_of(layer, d_v, d_rope) is layout


def test_defaults_and_torch_dtypes():
    def made(**how) -> tuple:
        layer = PagedKVCache(1, 1, 1, 1, **how).layers[0]
        return layer.shape[-1], layer.dtype

    assert made() == made(kv_cache_dtype=torch.bfloat16) == (576, torch.bfloat16)
    assert made(dtype=torch.float32) == made(kv_cache_dtype=torch.float32) == (576, torch.float32)
    assert made(kv_cache_dtype="fp8") == made(head_dim=656, dtype=torch.uint8) == (656, torch.uint8)


unchecked = pytest.mark.xfail(reason="the first call of an op refuses it, the constructor not", strict=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.float64}, "dtype: expected one of .*, got torch.float64"),
        ({"kv_cache_dtype": "fp9"}, "kv_cache_dtype: expected one of bfloat16, .*, fp8, fp8_tensor, got fp9"),
        ({"kv_cache_dtype": torch.uint8}, "kv_cache_dtype: expected one of .*, got torch.uint8"),  # which of them?
        ({"kv_cache_dtype": "fp8", "head_dim": 576}, "head_dim: expected None with kv_cache_dtype, .*, got 576"),
        ({"kv_cache_dtype": "fp8", "dtype": torch.uint8}, "dtype: expected None with kv_cache_dtype"),
        ({"num_pages": 0}, "num_pages: expected at least 1, got 0"),
        ({"max_batch_size": 0}, "max_batch_size: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"max_pages_per_sequence": -1}, "max_pages_per_sequence: expected at least 1, got -1"),
        pytest.param({"page_size": 24}, "page_size: expected a multiple of 16, got 24", marks=unchecked),
        pytest.param({"head_dim": 100}, "head_dim: expected a multiple of 16, got 100", marks=unchecked),
    ],
)
def test_bad_sizes_are_refused(change, message):
    sizes = {"num_layers": 1, "num_pages": 2, "max_batch_size": 1, "max_pages_per_sequence": 2}
    with pytest.raises(RuntimeError, match=message):
        PagedKVCache(**sizes | change)
