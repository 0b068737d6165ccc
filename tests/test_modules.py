"""modules.py by itself: its parts against the same maths written slowly, the ways to run a model against each other.

Against an independent implementation: test_hf.py. Compiled: test_compile_model.py.
"""

import cmath
import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashmla_ops import PagedKVCache, get_mla_metadata, kv_cache, modules, plan
from flashmla_ops.kv_cache import named_format, slots_of
from flashmla_ops.modules import (
    DecodeStep,
    DeepseekModel,
    MLAConfig,
    MoE,
    PrefillStep,
    RMSNorm,
    Router,
    rotary_angles,
    rotate,
)

YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
BASE = MLAConfig(
    vocab_size=80,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=48,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=48,
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=3,
    moe_intermediate_size=40,
    n_shared_experts=1,
)
V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 3.0}
ROUTERS = {
    "v2 greedy": {**V2, "topk_method": "greedy"},
    "v2 groups": {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "v3": {"routed_scaling_factor": 2.5},
    "v3 groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
}


def changed(**settings) -> MLAConfig:
    return dataclasses.replace(BASE, **settings)


def build(config: MLAConfig, dtype: torch.dtype = torch.float32) -> DeepseekModel:
    """Weights of std 1 / sqrt(fan in), so that every part matters to the logits."""
    torch.manual_seed(0)
    model = DeepseekModel(config, dtype=dtype)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        elif not weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)  # correction bias
    return model


def paged(config: MLAConfig, rows: int, dtype: torch.dtype = torch.float32) -> PagedKVCache:
    """Empty rows, in a cache and a table that must not be read where nothing was written."""
    sizes = (config.num_hidden_layers, 8 * rows, rows, 8)
    cache = PagedKVCache(*sizes, head_dim=config.head_dim, page_size=16, max_new_tokens=64, dtype=dtype)
    for layer in cache.layers:
        layer.fill_(torch.nan)
    for _ in range(rows):
        cache.allocate()
    return cache


def poisoned_table(cache: PagedKVCache) -> torch.Tensor:
    pages = (cache.cache_seqlens[:, None] + 15) // 16
    return torch.where(torch.arange(8) < pages, cache.block_table, 2**31 - 1)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Recorder(TorchDispatchMode):
    """The ops that run, and the largest tensor that any of them makes."""

    def __init__(self):
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.largest = max(self.largest, out.numel())
        return out


# ---------------------------------------------------------------------------------------------------------- config


def test_softmax_scale():
    assert BASE.softmax_scale == pytest.approx(48**-0.5)
    assert changed(rope_scaling=YARN).softmax_scale == pytest.approx(48**-0.5)
    corrected = changed(rope_scaling={**YARN, "mscale_all_dim": 0.7}).softmax_scale
    assert corrected == pytest.approx(48**-0.5 * (1 + 0.07 * math.log(8)) ** 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scoring_func": "relu"}, "scoring_func: expected one of sigmoid, softmax, got relu"),
        ({"topk_method": "best"}, "topk_method: expected one of noaux_tc, greedy, group_limited_greedy, got best"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling type: expected one of yarn, got linear"),
    ],
)
def test_config_refuses_what_is_not_served(settings, message):
    with pytest.raises(NotImplementedError, match=message):
        changed(**settings)


# ---------------------------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("write_interleaved", [True, False])
def test_rotation_turns_pairs(interleave, write_interleaved):
    config = changed(rope_interleave=interleave, rope_write_interleaved=write_interleaved)
    positions = torch.tensor([[0, 1, 77, 1000]])
    x = torch.randn(1, 4, 2, 16)
    turned = rotate(x, rotary_angles(config, positions), config)
    for token, position in enumerate(positions[0].tolist()):
        for i in range(8):
            u, v = x[0, token, :, [2 * i, 2 * i + 1] if interleave else [i, i + 8]].double().unbind(-1)
            expected = torch.complex(u, v) * cmath.exp(1j * position * 10000 ** (-i / 8))
            got = turned[0, token, :, [2 * i, 2 * i + 1] if write_interleaved else [i, i + 8]].double().unbind(-1)
            torch.testing.assert_close(torch.complex(*got), expected, rtol=1e-4, atol=1e-4)


def test_yarn_frequencies():
    """Fast pairs keep their frequency, slow ones are divided by the factor, those between are blended."""
    config = changed(rope_scaling=YARN, qk_rope_head_dim=64)
    position = torch.tensor([[1]])
    plain = rotary_angles(changed(qk_rope_head_dim=64), position)[1].flatten().double().asin()
    cos, sin = (t.flatten().double() / (1 + 0.1 * math.log(8)) for t in rotary_angles(config, position))
    ratio = torch.atan2(sin, cos) / plain
    turns = 64 / (2 * math.pi) * 10000 ** (-torch.arange(32) / 32)  # of each pair, within the original context
    assert (turns > 8).any() and (turns < 0.5).any()
    torch.testing.assert_close(ratio[turns > 32], torch.ones_like(ratio[turns > 32]), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[turns < 0.5], torch.full_like(ratio[turns < 0.5], 1 / 8), rtol=1e-4, atol=0)
    blended = (ratio > 0.13) & (ratio < 0.99)
    assert blended.sum() >= 5 and (ratio.diff() < 1e-5).all()
    given = rotary_angles(changed(rope_scaling={**YARN, "attention_factor": 0.5}), position)
    torch.testing.assert_close(given[0].square() + given[1].square(), torch.full((1, 1, 1, 8), 0.25))


def test_rotation_is_fp32_in_a_bf16_model():
    """Far positions need fp32 frequencies and angles."""
    near, far = torch.tensor([[5]]), torch.tensor([[100_005]])
    x = torch.randn(1, 1, 1, 16)
    model = build(BASE).bfloat16()
    (cos, sin), y = rotary_angles(model.config, far), torch.randn(1, 1, 1, 16)
    assert cos.dtype == torch.float32 and rotate(x.bfloat16(), (cos, sin), BASE).dtype == torch.bfloat16
    score = (rotate(x, (cos, sin), BASE) * rotate(y, rotary_angles(BASE, far + 3), BASE)).sum()
    same = (rotate(x, rotary_angles(BASE, near), BASE) * rotate(y, rotary_angles(BASE, near + 3), BASE)).sum()
    torch.testing.assert_close(score, same, rtol=0, atol=0.05)  # depends on the distance only


def test_rms_norm_under_autocast():
    norm = RMSNorm(32)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 32).bfloat16()
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x).double(), expected, rtol=2e-2, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- MoE


def slow_routing(gate: Router, config: MLAConfig, x: torch.Tensor) -> tuple[list[int], dict[int, float], float]:
    """One token's experts, best first, their weights and the margin, by sorting in Python."""
    logits = (gate.weight.double() @ x.double()).tolist()
    if config.scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        choice = [score + bias for score, bias in zip(scores, gate.e_score_correction_bias.tolist(), strict=True)]
    else:
        total = sum(map(math.exp, logits))
        scores = choice = [math.exp(logit) / total for logit in logits]
    margin, allowed = math.inf, set(range(len(scores)))
    if config.topk_method != "greedy" and config.n_group > 1:
        size = len(scores) // config.n_group
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(config.n_group)]
        rank = [sum(group[:2]) if config.topk_method == "noaux_tc" else group[0] for group in groups]
        order = sorted(range(config.n_group), key=lambda g: -rank[g])
        margin = rank[order[config.topk_group - 1]] - rank[order[config.topk_group]]
        allowed = {e for e in allowed if e // size in order[: config.topk_group]}
    best = sorted(allowed, key=lambda e: -choice[e])
    k = config.num_experts_per_tok
    margin = min(margin, choice[best[k - 1]] - choice[best[k]])
    total = sum(scores[e] for e in best[:k]) if config.norm_topk_prob else 1
    return best[:k], {e: scores[e] / total * config.routed_scaling_factor for e in best[:k]}, margin


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_router(router):
    config = changed(**router)
    gate = build(config).layers[1].ffn.gate
    x = torch.randn(2, 20, 64)
    experts, weights, margin = gate(x)
    assert weights.dtype == margin.dtype == torch.float32
    for at in ((row, token) for row in range(2) for token in range(20)):
        chosen, expected, slow_margin = slow_routing(gate, config, x[at])
        assert sorted(experts[at].tolist()) == sorted(chosen)
        got = dict(zip(experts[at].tolist(), weights[at].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-4)
        assert margin[at].item() == pytest.approx(slow_margin, abs=1e-5)


def test_router_is_fp32_under_autocast_and_in_bf16():
    gate = build(BASE).layers[1].ffn.gate
    x = torch.randn(50, 64).bfloat16()
    expected = gate(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = gate(x)
    for got in (under_autocast, gate(x)):
        torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-5, atol=1e-6)
    bf16 = build(BASE, torch.bfloat16).layers[1].ffn.gate
    assert bf16.weight.dtype == bf16.e_score_correction_bias.dtype == torch.float32


def test_every_expert_chosen_has_no_margin():
    config = changed(num_experts_per_tok=16)
    routing = build(config).layers[1].ffn.gate(torch.randn(3, 64))
    assert routing.experts.sort().values.equal(torch.arange(16).expand(3, -1))
    assert routing.margin.equal(torch.full((3,), torch.inf))


def slow_moe(moe: MoE, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """fp64, token by token."""

    def expert(gate_up: torch.Tensor, down: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        gate, up = (gate_up.double() @ token).chunk(2)
        return down.double() @ (gate * torch.sigmoid(gate) * up)

    out = []
    for token, ids, shares in zip(x.double(), experts.tolist(), weights.double(), strict=True):
        routed = sum(share * expert(moe.gate_up[e], moe.down[e], token) for e, share in zip(ids, shares, strict=True))
        shared = moe.shared_experts
        out.append(routed + (expert(shared.gate_up.weight, shared.down.weight, token) if shared is not None else 0))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 6, 40], ids=lambda n: f"{n} tokens")  # 5 * 3 experts of 16, and more
@pytest.mark.parametrize("n_shared_experts", [0, 2])
def test_moe(dtype, tokens, n_shared_experts):
    """Both ways of the small dtypes and the grouped one; few tokens leave the other experts' weights unread."""
    moe = build(changed(n_shared_experts=n_shared_experts), dtype).layers[1].ffn
    x = torch.randn(tokens, 64, dtype=dtype)
    routing = moe.gate(x)
    expected = slow_moe(moe, x, routing.experts, routing.weights)
    unused = sorted(set(range(16)) - set(routing.experts.flatten().tolist()))
    if tokens <= 5 or dtype == torch.bfloat16:
        assert unused or tokens == 40
        moe.gate_up.data[unused] = moe.down.data[unused] = torch.nan
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for shaped in (x, x[None], x[:, None]):
        out = moe(shaped)
        assert out.dtype == dtype and out.shape == shaped.shape
        torch.testing.assert_close(out.flatten(0, -2).double(), expected, rtol=tolerance, atol=tolerance)


def test_moe_memory_does_not_grow_to_weights_a_token():
    moe = build(BASE).layers[1].ffn
    x = torch.randn(200, 64)
    with torch.no_grad(), Recorder() as seen:
        moe(x)
    assert seen.largest <= 200 * 2 * 40  # gathered weights: 200 * 3 * 80 * 64


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("tokens", [2, 30])
def test_moe_gradients(mode, tokens):
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    moe = build(BASE, dtype).layers[1].ffn
    x = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        out = moe(x)
    target = torch.randn_like(out)
    wanted = (moe.gate_up, moe.down, moe.gate.weight, moe.shared_experts.down.weight, x)
    got = torch.autograd.grad((out.float() * target.float()).sum(), wanted)
    experts, weights, _ = moe.gate(x.float())
    expected = torch.autograd.grad((slow_moe(moe, x, experts, weights) * target.double()).sum(), wanted)
    for name, one, other in zip(("gate_up", "down", "router", "shared", "x"), got, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < (1e-5 if mode == "fp32" else 3e-2), name


# ---------------------------------------------------------------------------------------------- the ways to run it


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qk_rope_head_dim": 0, "rope_scaling": YARN},  # no positions
        {"q_lora_rank": None, "kv_lora_rank": 48, "qk_rope_head_dim": 32, "v_head_dim": 16, "rope_scaling": YARN},
        {
            **{"n_routed_experts": 0, "tie_word_embeddings": True, "rope_write_interleaved": True},
            **{"num_attention_heads": 6, "batch_invariant": True},
        },
        {**ROUTERS["v2 groups"], "n_shared_experts": 0, "rope_interleave": False, "first_k_dense_replace": 0},
    ],
    ids=["v3", "nope", "no q_lora", "dense", "v2"],
)
def test_cached_runs_equal_forward(settings):
    """Prompt, chunk, and decode steps of 1, 3 and 5 tokens give what forward gives, for rows of different lengths."""
    model = build(changed(**settings))
    input_ids = torch.randint(80, (3, 64))
    expected = model(input_ids)
    cache = paged(model.config, 4)  # row 3 stays empty
    done = [0, 0, 0, 0]

    def check(counts: tuple[int, ...], run) -> None:
        tokens = torch.zeros(4, max(counts), dtype=torch.long)
        for row, count in enumerate(counts):
            tokens[row, :count] = input_ids[row, done[row] : done[row] + count]
        cache.extend(dict(enumerate(counts)))
        logits = run(tokens, lengths(*counts, 0), poisoned_table(cache))
        assert logits.isfinite().all()
        for row, count in enumerate(counts):
            wanted = expected[row, done[row] : done[row] + count]
            torch.testing.assert_close(logits[row, :count], wanted, rtol=1e-4, atol=1e-4)
            done[row] += count

    def prompt(tokens, seqlens_q, block_table):
        return model.prefill(tokens, seqlens_q, cache.layers, block_table)

    def chunk(tokens, seqlens_q, block_table):
        return model.prefill(tokens, seqlens_q, cache.layers, block_table, cache.cache_seqlens)

    def decode(tokens, _, block_table):
        return model.decode(tokens, cache.layers, block_table, cache.cache_seqlens)

    check((7, 16, 0), prompt)
    check((10, 1, 33), chunk)
    for s_q in (1, 3, 5, 1):
        check((s_q,) * 3, decode)


def test_decode_pads_tokens_before_the_start():
    """With s_q beyond a row's length, the row's tokens are the last ones; nothing is written for the others."""
    model = build(BASE)
    cache = paged(BASE, 3)
    cache.extend({0: 2, 1: 5})
    input_ids = torch.randint(80, (3, 5))
    before = [layer.clone() for layer in cache.layers]
    logits = model.decode(input_ids, cache.layers, poisoned_table(cache), cache.cache_seqlens)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, 3:], model(input_ids[:1, 3:])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], model(input_ids[1:2])[0], rtol=1e-4, atol=1e-4)
    for layer, old in zip(cache.layers, before, strict=True):
        written = ~layer.isnan().flatten(0, 1).any(-1).any(-1)
        assert written.sum() == 7 and old.isnan().all()


def test_prefill_last_only():
    model, cache = build(BASE), paged(BASE, 3)
    input_ids = torch.randint(80, (3, 9))
    cache.extend({0: 9, 1: 4})
    arguments = (input_ids, lengths(9, 4, 0), cache.layers, poisoned_table(cache))
    everything = model.prefill(*arguments)
    torch.testing.assert_close(model.prefill(*arguments, last_only=True)[:2], everything[[0, 1], [8, 3]])


def test_one_cache_a_layer():
    with pytest.raises(RuntimeError, match="kv_caches: expected one a layer, 3, got 2"):
        build(BASE).decode(torch.zeros(1, 1, dtype=torch.long), paged(BASE, 1).layers[:2], lengths(0)[None], lengths(0))


def test_choice_of_experts_is_recorded_and_forced():
    model, cache = build(BASE), paged(BASE, 2)
    cache.extend(6)
    input_ids, table = torch.randint(80, (2, 6)), cache.block_table
    runs = {
        "forward": lambda **options: model(input_ids, **options),
        "prefill": lambda **options: model.prefill(input_ids, lengths(6, 6), cache.layers, table, **options),
        "decode": lambda **options: model.decode(input_ids, cache.layers, table, cache.cache_seqlens, **options),
    }
    plain, own = runs["forward"](return_routing=True)
    assert own.experts.shape == (2, 2, 6, 3) and own.margin.shape == (2, 2, 6) and (own.margin > 0).all()
    other = (own.experts + 1) % 16
    forced = runs["forward"](experts=other)
    assert (forced - plain).abs().max() > 0.1
    for name, run in runs.items():
        logits, routing = run(return_routing=True)
        assert routing.experts.equal(own.experts), name
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
        logits, routing = run(experts=other, return_routing=True)
        assert routing.experts.equal(other)
        torch.testing.assert_close(logits, forced, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run(experts=own.experts), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_decode_plans_as_the_config_says(batch_invariant, monkeypatch):
    model, made = build(changed(batch_invariant=batch_invariant)), []

    def recorded(*args, **options):
        made.append(get_mla_metadata(*args, **options))
        return made[-1]

    monkeypatch.setattr(modules, "get_mla_metadata", recorded)
    cache = paged(model.config, 2)
    cache.extend(1)
    model.decode(torch.zeros(2, 1, dtype=torch.long), cache.layers, cache.block_table, cache.cache_seqlens)
    assert [plan.is_invariant(metadata) for metadata, _ in made] == [batch_invariant]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_plans_once_and_copies_no_weight(dtype):
    config = changed(kv_lora_rank=512, num_attention_heads=8, n_routed_experts=0, vocab_size=40)
    model = build(config, dtype)
    cache = paged(config, 1, dtype)
    cache.extend(1)
    with Recorder() as seen:
        model.decode(torch.zeros(1, 1, dtype=torch.long), cache.layers, cache.block_table, cache.cache_seqlens)
    assert sum("get_mla_metadata" in op for op in seen.ops) == 1
    assert sum("fwd_kvcache_mla" in op for op in seen.ops) == 3
    assert not any("_local_scalar_dense" in op or "nonzero" in op for op in seen.ops)  # a host sync on a GPU
    per_token = config.num_attention_heads * config.head_dim
    assert per_token <= seen.largest <= 2 * per_token < model.layers[0].attn.wkv_b.weight.numel() / 30


def test_gradients_need_forward():
    """prefill and decode leave no graph behind, even for a model in training."""
    model, cache = build(BASE), paged(BASE, 1)
    cache.extend(1)
    token = torch.zeros(1, 1, dtype=torch.long)
    assert not model.decode(token, cache.layers, cache.block_table, cache.cache_seqlens).requires_grad
    assert not model.prefill(token, lengths(1), cache.layers, cache.block_table).requires_grad
    assert model(token).requires_grad


# ------------------------------------------------------------------------------------------------------- fp8 caches

FP8 = ("fp8", "fp8_tensor")
SCALE = 0.03


def fp8_cache(name: str, config: MLAConfig, rows: int = 2) -> PagedKVCache:
    dims = {"kv_lora_rank": config.kv_lora_rank, "qk_rope_head_dim": config.qk_rope_head_dim}
    sizes = (config.num_hidden_layers, 8 * rows, rows, 8)
    cache = PagedKVCache(*sizes, kv_cache_dtype=name, page_size=16, max_new_tokens=64, **dims)
    for _ in range(rows):
        cache.allocate()
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FP8)
@torch.no_grad()
def test_attention_over_an_fp8_cache(name, dtype):
    """Appended is the reference's quantisation of the tokens; attended to is what the cache then stands for: the same
    as over a plain cache of those values, to which nothing is appended. In pieces of a prompt, then in decode steps."""
    model = build(BASE)
    attn, layout = model.layers[0].attn, named_format(name)
    attn.kv_scale.fill_(SCALE)
    model.to(dtype)
    kv_scale = attn.kv_scale.float() if layout.scaled else None  # in a bf16 model rounded, for writing and for reading
    cache, r, d_rope = fp8_cache(name, BASE), BASE.kv_lora_rank, BASE.qk_rope_head_dim
    fp8 = cache.layers[0]
    for n in (20, 33, 1, 3):
        cache.extend(n)
        table, seqlens = cache.block_table, cache.cache_seqlens
        x = torch.randn(2, n, BASE.hidden_size, dtype=dtype)
        positions = seqlens[:, None] - n + torch.arange(n)
        angles, slots = rotary_angles(BASE, positions), slots_of(table, positions, 16).flatten()
        if n > 3:
            keys = torch.arange(8 * 16)
            seen = (keys <= positions[..., None])[:, None]
            step, run = PrefillStep(slots, table.long(), (keys < seqlens[:, None])[..., None], seen), attn.prefill
        else:
            step, run = DecodeStep(slots, table, seqlens, (None, None)), attn.decode
        out = run(x, fp8, angles, step)
        _, kv_c, k_pe = attn._project(x, angles)
        written = fp8.flatten(0, 2)[slots]
        assert written.equal(layout.quantize(kv_c.flatten(0, 1), k_pe.flatten(0, 1), kv_scale, True))
        plain = layout.dequantize(fp8, r, d_rope, kv_scale, dtype)
        expected = run(x, plain, angles, step._replace(slots=torch.full_like(slots, -1)))
        torch.testing.assert_close(out, expected)


def compare_with_eager(model: DeepseekModel, run, step: dict, caches: list[torch.Tensor]) -> None:
    eager_caches = [cache.clone() for cache in caches]
    expected = model.decode(kv_caches=eager_caches, **step)
    torch.testing.assert_close(run(kv_caches=caches, **step), expected, rtol=1e-4, atol=1e-4)
    for cache, eager in zip(caches, eager_caches, strict=True):
        assert cache.any() and cache.equal(eager)


def fp8_step() -> tuple[DeepseekModel, list[torch.Tensor], dict]:
    """A model of two layers, one cache of each format, and a step of the first two tokens of two rows."""
    config = changed(num_hidden_layers=2, n_routed_experts=0)
    model, caches = build(config), [fp8_cache(name, config) for name in FP8]
    for layer in model.layers:
        layer.attn.kv_scale.fill_(SCALE)
    caches[0].extend(2)
    step = {"block_table": caches[0].block_table, "cache_seqlens": caches[0].cache_seqlens}
    layers = [cache.layers[0] for cache in caches]
    return model, layers, {"input_ids": torch.randint(80, (2, 2)), **step}


def test_decode_over_fp8_caches_compiles():
    """Into one graph; a scale that is changed in place is seen without another."""
    model, caches, step = fp8_step()
    compiled = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    compare_with_eager(model, compiled, step, caches)
    model.layers[1].attn.kv_scale.fill_(2 * SCALE)
    with torch.compiler.set_stance("fail_on_recompile"):
        compare_with_eager(model, compiled, step, caches)


def test_attention_over_fp8_caches_compiled_by_inductor(needs_inductor):
    """The caches are written in place, and neither copied nor viewed as another dtype."""
    from torch._dynamo.utils import ReinplaceCounters
    from torch._inductor.utils import run_and_get_code

    ReinplaceCounters.clear()
    model, caches, step = fp8_step()
    table, seqlens = step["block_table"], step["cache_seqlens"]

    def decode(x: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        positions = seqlens[:, None] - 2 + torch.arange(2)
        shared = DecodeStep(slots_of(table, positions, 16).flatten(), table, seqlens, (None, None))
        for layer, cache in zip(model.layers, caches, strict=True):
            x = layer.attn.decode(x, cache, rotary_angles(BASE, positions), shared)
        return x

    x, eager_caches = torch.randn(2, 2, BASE.hidden_size), [cache.clone() for cache in caches]
    with torch.no_grad():
        expected = decode(x, eager_caches)
        logits, (code,) = run_and_get_code(torch.compile(decode, fullgraph=True), x, caches)
    torch.testing.assert_close(logits, expected)
    assert ReinplaceCounters.get_total_missed_bytes() == 0 and "view.dtype" not in code
    for cache, eager in zip(caches, eager_caches, strict=True):
        assert cache.any() and cache.equal(eager)
        assert f"empty_strided_cpu({tuple(cache.shape)}" not in code


def test_prefill_over_fp8_caches_compiles():
    model, caches, step = fp8_step()
    call = {"seqlens_q": lengths(2, 1), **step, "cache_seqlens": lengths(2, 1)}
    eager_caches = [cache.clone() for cache in caches]
    expected = model.prefill(kv_caches=eager_caches, **call)
    compiled = torch.compile(model.prefill, fullgraph=True, backend="aot_eager")
    logits = compiled(kv_caches=caches, **call)
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 0], expected[1, 0], rtol=1e-4, atol=1e-4)
    assert all(cache.any() and cache.equal(eager) for cache, eager in zip(caches, eager_caches, strict=True))


def test_decode_over_fp8_caches_exports():
    model, caches, step = fp8_step()

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, kv_caches, input_ids, block_table, cache_seqlens):
            return self.model.decode(input_ids, kv_caches, block_table, cache_seqlens)

    exported = torch.export.export(Decode(), ([cache.clone() for cache in caches],), step, strict=False)
    run = exported.module()
    compare_with_eager(model, lambda kv_caches, **step: run(kv_caches, **step), step, caches)


def test_a_format_of_one_s_own(monkeypatch):
    """A format that is added to the table is served by its name, in caches, modules and ops."""

    class Fp8SmallBlocks(kv_cache.Fp8Blocks):
        name = "fp8_small_blocks"
        block = 8

    own = Fp8SmallBlocks()
    monkeypatch.setattr(kv_cache, "FORMATS", (*kv_cache.FORMATS, own))
    model, cache = build(BASE), fp8_cache("fp8_small_blocks", BASE)
    assert cache.layers[0].shape[-1] == own.last_dim(64, 16) == 64 + 4 * 8 + 2 * 16
    ids = torch.randint(80, (2, 12))
    own_experts = model(ids, return_routing=True)[1].experts
    cache.extend(12)
    logits = model.decode(ids, cache.layers, cache.block_table, cache.cache_seqlens, experts=own_experts)
    exact = model(ids)
    assert 0 < (logits - exact).norm() < 0.05 * exact.norm()


def test_a_cache_of_no_format_is_refused():
    model, cache = build(BASE), paged(BASE, 1)
    cache.extend(1)
    call = torch.zeros(1, 1, dtype=torch.long), cache.block_table, cache.cache_seqlens
    for dtype, last_dim, message in (
        (torch.uint8, 96, r"last dimension 112 \(fp8\) or 80 \(fp8_tensor\) for 64 \+ 16 values, got shape"),
        (torch.float32, 96, r"last dimension 80 \(float32\) for 64 \+ 16 values"),
        (torch.int8, 80, r"one of torch.bfloat16, .*, got torch.int8"),
    ):
        caches = [torch.zeros(8, 16, 1, last_dim, dtype=dtype)] * 3
        for run in (
            lambda ids, *tables, caches=caches: model.decode(ids, caches, *tables),
            lambda ids, *tables, caches=caches: model.prefill(ids, lengths(1), caches, *tables),
        ):
            with pytest.raises(RuntimeError, match=f"kv_cache: expected {message}"):
                run(*call)


def test_kv_scales_in_checkpoints(tmp_path):
    """As engines write them, a k_scale a layer; 1 where there is none."""
    safetensors = pytest.importorskip("safetensors.torch", reason='needs safetensors: pip install "flashmla_ops[hf]"')
    file, key = tmp_path / "model.safetensors", "model.layers.1.self_attn.k_scale"

    def read() -> list[float]:
        model = DeepseekModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert all(layer.attn.kv_scale.dtype is torch.float32 for layer in model.layers)
        return [layer.attn.kv_scale.item() for layer in model.layers]

    model = build(BASE)
    model.save_pretrained(tmp_path)
    assert read() == [1, 1, 1] and not [name for name in safetensors.load_file(file) if "scale" in name]
    model.layers[1].attn.kv_scale.fill_(SCALE)
    model.save_pretrained(tmp_path)
    scale = torch.tensor(SCALE).item()
    assert read() == [1, scale, 1]
    tensors = safetensors.load_file(file)
    assert [name for name in tensors if "scale" in name] == [key] and tensors[key].item() == scale
    tensors |= {key: tensors[key].bfloat16()[None], "model.layers.1.self_attn.v_scale": torch.ones(())}
    safetensors.save_file(tensors, file)
    assert read() == [1, tensors[key].item(), 1]
    safetensors.save_file(tensors | {key: torch.ones(2)}, file)
    with pytest.raises(RuntimeError, match=rf"{key}: expected shape \[\], got \[2\]"):
        read()


# ------------------------------------------------------------------------------------------------------- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_prefill_attends_through_cudnn(compiled):
    """At DeepSeek's 192 / 128 dims, where Hopper's other kernels are four times slower or refuse."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU: elsewhere other kernels may be the fast ones")
    dims = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
    sizes = {"vocab_size": 32, "hidden_size": 256, "intermediate_size": 256}
    config = MLAConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, **dims)
    model = DeepseekModel(config, dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(32, (2, 256), device="cuda")
    cache = [torch.zeros(16, 64, 1, 576, dtype=torch.bfloat16, device="cuda")]
    table = torch.arange(16, dtype=torch.int32, device="cuda").view(2, 8)
    lengths = torch.tensor([256, 100], dtype=torch.int32, device="cuda")
    prefill = torch.compile(model.prefill, fullgraph=True) if compiled else model.prefill
    prefill(ids, lengths, cache, table)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        prefill(ids, lengths, cache, table)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any("cudnn" in name for name in names), names
