"""DeepSeek V2/V3 decoder models on the ops of this package: V2, V2-Lite, V3, R1, Kimi K2 and their like.

A model runs in three ways, on the same weights:

    model(input_ids)       no cache: plain differentiable torch, for training
    model.prefill(...)     prompts, or pieces of prompts on top of what the cache holds; attention un-absorbed, by SDPA
    model.decode(...)      the next tokens of every row; attention absorbed, by torch.ops.flashmla.fwd_kvcache_mla

Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, 2.1) caches one latent c and one rotated key part k_pe
a token, whatever the number of heads. Head h has keys [W_UK_h c | k_pe] and values W_UV_h c. Un-absorbed attention
computes those; absorbed attention moves the matrices to the other side of the products,

    q_h . (W_UK_h c) = (W_UK_h^T q_h) . c,        sum_j p_j (W_UV_h c_j) = W_UV_h (sum_j p_j c_j),

so that all heads attend to the same cached rows [c | k_pe], of which c are the values too.

Shapes: b rows, s tokens a row, h heads, d_nope + d_rope the width of a head's query, d_v of its value, r the latent's
(kv_lora_rank), E experts of which a token takes k. Weights are [out, in], experts' [E, out, in].
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .functional import concat_and_cache_mla, fwd_kvcache_mla, get_mla_metadata
from .kv_cache import EVERYTHING, CacheFormat, format_of, slots_of

INIT_STD = 0.02  # of all matrices at the start of training
YARN_NUMBERS = 1e-6, 2**31 - 1  # the least and the most: what checkpoints have lies within, what overflows does not
# For un-absorbed attention, best first. At 192 / 128 dims on Hopper cuDNN reaches 600 TFLOP/s, the memory-efficient one
# 145, and flash refuses them.
CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class MLAConfig:
    """What a model is, in the names of Hugging Face's config.json.

    q_lora_rank None projects queries directly (V2-Lite). qk_rope_head_dim 0 leaves positions out (NoPE).
    rope_scaling: None, or {"type": "yarn", "factor", "original_max_position_embeddings", and optionally "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}.
    rope_interleave: pairs that turn together are neighbours in the projections' output (else: a half apart).
    rope_write_interleaved: they are neighbours in queries and cache, too (V2); scores do not depend on it.
    n_routed_experts 0: every layer is dense; else the first first_k_dense_replace layers are.
    batch_invariant, not of config.json: decode plans with `get_mla_metadata(..., batch_invariant=True)`, so that
    a row's attention is the same bits whatever the batch. The rest of a layer is torch's, and is not: see the README.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_interleave: bool = True
    rope_write_interleaved: bool = False
    first_k_dense_replace: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"  # or "softmax" (V2)
    topk_method: str = "noaux_tc"  # or "greedy", "group_limited_greedy" (V2)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    batch_invariant: bool = False

    def __post_init__(self):
        choices = {
            "scoring_func": (self.scoring_func, ("sigmoid", "softmax")),
            "topk_method": (self.topk_method, ("noaux_tc", "greedy", "group_limited_greedy")),
            "rope_scaling type": (self.rope_scaling.get("type") if self.rope_scaling else "yarn", ("yarn",)),
        }
        for name, (value, served) in choices.items():
            if value not in served:
                raise NotImplementedError(f"{name}: expected one of {', '.join(map(str, served))}, got {value}")
        if not self.rope_theta > 1:
            raise RuntimeError(f"rope_theta: expected a number above 1, got {self.rope_theta}")
        if self.rope_scaling:
            _check_yarn(self.rope_scaling)
        _check_sizes(self)

    @property
    def head_dim(self) -> int:
        """Width of a cached token, d_qk of the ops: the latent and the rotated key part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(d_nope + d_rope) ** -0.5, times YaRN's correction mscale(factor, mscale_all_dim) ** 2."""
        yarn = self.rope_scaling or {}
        return self.qk_head_dim**-0.5 * _mscale(yarn.get("factor", 1.0), yarn.get("mscale_all_dim") or 0.0) ** 2

    def is_moe(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace


def _check_sizes(config: MLAConfig) -> None:
    """Raises RuntimeError on sizes of nothing, and on choices among experts that there are not."""
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "v_head_dim"]
    names += [] if config.q_lora_rank is None else ["q_lora_rank"]
    names += ["moe_intermediate_size"] if config.n_routed_experts else []
    for name in names:
        _check_range(name, getattr(config, name))
    if config.qk_rope_head_dim % 2:
        raise RuntimeError(f"qk_rope_head_dim: expected an even number, got {config.qk_rope_head_dim}")
    experts = config.n_routed_experts
    if experts and config.topk_method != "greedy" and config.n_group != 1:
        each = experts // config.n_group if config.n_group > 0 else 0
        least = 2 if config.topk_method == "noaux_tc" else 1  # by so many a group is judged
        if each * config.n_group != experts or each < least:
            wanted = f"to divide n_routed_experts = {experts} into groups of at least {least}"
            raise RuntimeError(f"n_group: expected {wanted}, got {config.n_group}")
        _check_range("topk_group", config.topk_group, config.n_group)
        experts = each * config.topk_group
    if experts:
        _check_range("num_experts_per_tok", config.num_experts_per_tok, experts)


def _check_range(name: str, value: int, most: int | None = None) -> None:
    if value < 1 or (most is not None and value > most):
        raise RuntimeError(f"{name}: expected {'at least 1' if most is None else f'1 to {most}'}, got {value}")


# ------------------------------------------------------------------------------------------------ rotary embedding


def _mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature: 1 + 0.1 weight ln(factor) (arXiv 2309.00071, 3.4, with DeepSeek's weight)."""
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0


def _check_yarn(yarn: dict) -> None:
    """Raises RuntimeError on numbers that `rotary_angles` has no use for."""
    least, most = YARN_NUMBERS
    optional = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
    for name in ("factor", *optional, "mscale", "mscale_all_dim"):
        value = yarn.get(name)
        if value is None and name != "factor":
            continue
        lowest = 0 if name.startswith("mscale") else least
        if type(value) not in (int, float) or not lowest <= value <= most:
            raise RuntimeError(f"rope_scaling {name}: expected a number from {lowest} to {most}, got {value!r}")
    if type(yarn.get("truncate", True)) is not bool:
        raise RuntimeError(f"rope_scaling truncate: expected True or False, got {yarn['truncate']!r}")


def rotary_angles(config: MLAConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which `rotate` turns the pairs of tokens at `positions`; once a step, for all layers.

    Pair i turns by position * rope_theta ** (-2i / d_rope). YaRN (arXiv 2309.00071, 3.2) divides the frequencies by
    `factor` for pairs that turn less than beta_slow times within the original context, leaves those that turn more than
    beta_fast times alone, and blends linearly between.

    Computed in fp32 from the config, not from a buffer, which model.to(torch.bfloat16) would round.

    Args:
        positions: [b, s] integers.
    Returns:
        cos, sin: [b, s, 1, d_rope / 2] fp32.
    """
    d, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    exponent = torch.arange(0, d, 2, dtype=torch.float32, device=positions.device)
    frequency, scale = 1.0 / theta ** (exponent / d), 1.0
    if yarn and d:
        original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings
        fast, slow = (
            d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))  # the pair that turns so often
            for turns in (yarn.get("beta_fast") or 32, yarn.get("beta_slow") or 1)
        )
        if yarn.get("truncate", True):
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, d - 1)
        blend = ((exponent / 2 - fast) / (slow - fast or 0.001)).clamp(0, 1)
        frequency = frequency * (1 - blend) + frequency / yarn["factor"] * blend
        mscale, mscale_all_dim = yarn.get("mscale"), yarn.get("mscale_all_dim")
        scale = _mscale(yarn["factor"], 1.0)
        if mscale and mscale_all_dim:
            scale = _mscale(yarn["factor"], mscale) / _mscale(yarn["factor"], mscale_all_dim)
        scale = yarn.get("attention_factor") or scale
    angle = positions[..., None, None].float() * frequency
    return angle.cos() * scale, angle.sin() * scale


def rotate(x: Tensor, angles: tuple[Tensor, Tensor], config: MLAConfig) -> Tensor:
    """Turns each pair (u, v) of x [b, s, heads, d_rope] into (u cos - v sin, u sin + v cos), in fp32; x's dtype."""
    cos, sin = angles
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1) if config.rope_interleave else x.float().chunk(2, -1)
    turned = u * cos - v * sin, u * sin + v * cos
    if config.rope_write_interleaved:
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)
    return torch.cat(turned, -1).to(x.dtype)


# ------------------------------------------------------------------------------------------------------- attention


class Linear(nn.Linear):
    """x W^T, without bias."""

    def __init__(self, in_features: int, out_features: int, **factory):
        super().__init__(in_features, out_features, bias=False, **factory)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, rounded once to x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6, **factory):
        super().__init__(dim, eps, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # autocast leaves weights fp32


class PrefillStep(NamedTuple):
    """What all layers share when prompts are appended; the last three are None where nothing is cached before them."""

    slots: Tensor  # [b * s] int64
    pages: Tensor | None = None  # [b, max_pages] int64, 0 where the row has no page
    written: Tensor | None = None  # [b, max_pages * page_size, 1] bool, the row's own tokens
    seen: Tensor | None = None  # [b, 1, s, max_pages * page_size] bool, the keys each query sees


class DecodeStep(NamedTuple):
    """What all layers share when tokens are decoded.

    Where ranks share a sequence's pages (parallel.py), cache_seqlens counts this rank's keys before this call's own,
    and `own` is a step over these alone; with one token a row there is none, and cache_seqlens counts it too.
    """

    slots: Tensor  # [b * s_q] int64
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32
    plan: tuple[Tensor, Tensor]  # of get_mla_metadata
    own: "DecodeStep | None" = None


class MLAttention(nn.Module):
    """Multi-head latent attention; x [b, s, hidden] to [b, s, hidden], `angles` of `rotary_angles`.

    A cache may have any format of kv_cache.py; which it has is told from the tensor.

    Attributes:
        wqkv_a: all that is projected from x to latents, in one product: q_lora_rank outputs of queries (none where that
            is None, and wq projects them directly), kv_lora_rank of keys and values, qk_rope_head_dim of keys. In two
            products a layer's compiled decode step takes 5 us more on an H100 (71.4 for 66.6 with 16 heads and one row,
            262.1 for 256.9 with 128 heads and 32 rows).
        num_heads: those of this rank; all, unless parallel.py splits them.
        context: None, or parallel.py's ContextParallel: other ranks hold pages of the sequences as well.
        kv_scale: [] fp32 buffer, 1 unless a checkpoint has another: in a cache of "fp8_tensor" a value x of this layer
            is e4m3(x / kv_scale), read as e4m3 * kv_scale. max |x| / 448 uses e4m3's whole range. Change it in place
            (`fill_`), while the layer's cache is empty. Caches of other formats leave it alone.
    """

    def __init__(self, config: MLAConfig, **factory):
        super().__init__()
        self.config = config
        self.register_buffer("kv_scale", torch.ones((), device=factory.get("device"), dtype=torch.float32))
        self.num_heads, self.context = config.num_attention_heads, None
        h, hidden = config.num_attention_heads, config.hidden_size
        r, q_rank = config.kv_lora_rank, config.q_lora_rank
        if q_rank is None:
            self.wq = Linear(hidden, h * config.qk_head_dim, **factory)
        else:
            self.q_norm = RMSNorm(q_rank, **factory)
            self.wq_b = Linear(q_rank, h * config.qk_head_dim, **factory)
        self.wqkv_a = Linear(hidden, (q_rank or 0) + config.head_dim, **factory)
        self.kv_norm = RMSNorm(r, **factory)
        self.wkv_b = Linear(r, h * (config.qk_nope_head_dim + config.v_head_dim), **factory)
        self.wo = Linear(h * config.v_head_dim, hidden, **factory)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Causal attention of each row to itself, without a cache."""
        return self._attend(*self._project(x, angles))

    def prefill(self, x: Tensor, kv_cache: Tensor, angles: tuple[Tensor, Tensor], step: PrefillStep) -> Tensor:
        """Appends the tokens' latents to the cache; attends to them, or to all that the cache holds of their rows."""
        q, kv_c, k_pe = self._project(x, angles)
        layout, kv_scale = self._format_of(kv_cache)
        concat_and_cache_mla(kv_cache, kv_c.flatten(0, 1), k_pe.flatten(0, 1), step.slots, kv_scale=kv_scale)
        if step.seen is not None:
            dims = kv_c.shape[-1], k_pe.shape[-1]  # r, d_rope
            cached = kv_cache[step.pages]
            if self.context is not None:
                cached = self.context.gather_pages(cached)
            cached = cached.flatten(1, 3)  # [b, max_pages * page_size, last_dim]
            cached = layout.dequantize(cached, *dims, kv_scale, x.dtype)
            cached = torch.where(step.written, cached, 0)  # what lies beyond may be NaN, and 0 * NaN is NaN
            kv_c, k_pe = cached.split(dims, -1)
        return self._attend(q, kv_c, k_pe, step.seen)

    def decode(self, x: Tensor, kv_cache: Tensor, angles: tuple[Tensor, Tensor], step: DecodeStep) -> Tensor:
        """Appends the tokens' latents to the cache, and attends to the cache absorbed."""
        config = self.config
        (q_nope, q_pe), kv_c, k_pe = self._project(x, angles)
        _, kv_scale = self._format_of(kv_cache)
        concat_and_cache_mla(kv_cache, kv_c.flatten(0, 1), k_pe.flatten(0, 1), step.slots, kv_scale=kv_scale)
        w_ukv = self.wkv_b.weight.unflatten(0, (self.num_heads, -1))  # [h, d_nope + d_v, r], a view
        w_uk, w_uv = w_ukv.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        q = torch.cat([torch.einsum("bshd,hdr->bshr", q_nope, w_uk), q_pe], -1)
        cached = kv_cache, step.block_table, step.cache_seqlens
        how = config.kv_lora_rank, config.softmax_scale, True
        if self.context is None:
            out, _ = fwd_kvcache_mla(q, *cached, *how, *step.plan, kv_scale=kv_scale)
        else:
            out = self.context.attend(q, (kv_c, k_pe), kv_cache, step, *how[:2], kv_scale)
        return self.wo(torch.einsum("bshr,hdr->bshd", out, w_uv).flatten(2))

    def _format_of(self, kv_cache: Tensor) -> tuple[CacheFormat, Tensor | None]:
        """The cache's format, and the kv_scale that the ops take with it."""
        layout = format_of(kv_cache, self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        return layout, self.kv_scale.float() if layout.scaled else None  # model.to(dtype) converts buffers too

    def _project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Queries (q_nope, q_pe), both [b, s, h, ...], latents kv_c [b, s, r] and rotated keys k_pe [b, s, d_rope]."""
        config = self.config
        sizes = config.q_lora_rank or 0, config.kv_lora_rank, config.qk_rope_head_dim
        q_c, kv_c, k_pe = self.wqkv_a(x).split(sizes, -1)
        q = self.wq(x) if config.q_lora_rank is None else self.wq_b(self.q_norm(q_c))
        q = q.unflatten(-1, (self.num_heads, config.qk_head_dim))
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        k_pe = rotate(k_pe[:, :, None], angles, config)[:, :, 0]
        return (q_nope, rotate(q_pe, angles, config)), self.kv_norm(kv_c), k_pe

    def _attend(self, q: tuple[Tensor, Tensor], kv_c: Tensor, k_pe: Tensor, seen: Tensor | None = None) -> Tensor:
        """Un-absorbed attention of q to latents [b, s_k, ...]: to the keys that are `seen`, or else causal."""
        config, h = self.config, self.num_heads
        kv = self.wkv_b(kv_c).unflatten(-1, (h, config.qk_nope_head_dim + config.v_head_dim))
        k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        k = torch.cat([k_nope, k_pe[:, :, None].expand(-1, -1, h, -1)], -1)
        q, k, v = (t.transpose(1, 2) for t in (torch.cat(q, -1), k, v))  # [b, h, s, ...]
        scale, causal = config.softmax_scale, seen is None
        with sdpa_kernel(CUDA_BACKENDS, set_priority=True) if q.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=scale)
        return self.wo(out.transpose(1, 2).flatten(2))


# --------------------------------------------------------------------------------------------------- feed-forward


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """down (silu(gate x) * (up x)); gate and up are one matrix, gate first."""

    def __init__(self, hidden_size: int, intermediate_size: int, **factory):
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, **factory)
        self.down = Linear(intermediate_size, hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_swiglu(self.gate_up(x)))


class Routing(NamedTuple):
    """A router's choice for each token; `DeepseekModel` stacks its MoE layers' in front: [layers, b, s, ...].

    `margin` is how much closer the choice was than any other: the last chosen score minus the first not chosen, or
    the same of the groups of experts if smaller (inf if nothing was left out). Two runs that differ by rounding may
    choose differently where it is small.
    """

    experts: Tensor  # [..., k] int64
    weights: Tensor  # [..., k] fp32
    margin: Tensor  # [...] fp32, in the scores' unit (sigmoid or softmax probability, correction bias included)


class Router(nn.Module):
    """Chooses each token's experts, in fp32 whatever the model's dtype or autocast.

    V2 ("softmax"): the k largest probabilities, "greedy" among all experts, or "group_limited_greedy" among those of
    the topk_group groups with the largest maximum. V3 ("sigmoid", "noaux_tc"): the k largest of score + correction bias
    among the groups whose two best sum highest; weights are the scores without the bias (arXiv 2412.19437, 2.1.2).
    """

    def __init__(self, config: MLAConfig, device=None):
        super().__init__()
        self.config = config
        e, fp32 = config.n_routed_experts, {"device": device, "dtype": torch.float32}
        self.weight = nn.Parameter(torch.empty(e, config.hidden_size, **fp32))
        nn.init.normal_(self.weight, std=INIT_STD)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter(torch.zeros(e, **fp32), requires_grad=False)

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Routing:
        """Routes x [..., hidden], to `experts` [..., k] instead of its own choice if they are given."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        choice = scores + self.e_score_correction_bias if config.topk_method == "noaux_tc" else scores
        choice, group_margin = self._in_best_groups(choice)
        chosen, margin = _topk(choice, config.num_experts_per_tok)
        experts = chosen if experts is None else experts
        weights = scores.gather(-1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * config.routed_scaling_factor, margin.clamp(max=group_margin))

    def _in_best_groups(self, choice: Tensor) -> tuple[Tensor, Tensor | float]:
        """choice [..., E] with -inf for experts of groups not kept, and the margin of that decision."""
        config = self.config
        if config.topk_method == "greedy" or config.n_group == 1:
            return choice, math.inf
        groups = choice.unflatten(-1, (config.n_group, -1))
        best = groups.topk(2).values.sum(-1) if config.topk_method == "noaux_tc" else groups.amax(-1)
        kept, margin = _topk(best, config.topk_group)
        dropped = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
        return groups.masked_fill(dropped[..., None], -math.inf).flatten(-2), margin


def _topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k largest, and by how much the smallest of them exceeds the next."""
    if k == scores.shape[-1]:
        return scores.topk(k).indices, torch.full_like(scores[..., 0], math.inf)
    values, indices = scores.topk(k + 1)
    return indices[..., :k], values[..., k - 1] - values[..., k]


class MoE(nn.Module):
    """The sum of k routed experts, weighted, and the shared experts (one MLP of their joint width).

    Three ways to the same sum; none syncs with the host or has data-dependent shapes, and the first two read the
    routed experts' weights only:
      - bf16: tokens sorted by expert, one grouped matrix product for all.
      - other dtypes, which torch's grouped product refuses under torch.compile: weights gathered token by token. Takes
        memory for k experts a token, so it serves while tokens * k <= E, and whenever the batch is symbolic.
      - those dtypes with more tokens: every expert sees every token, with weight 0 where not chosen; E / k times the
        arithmetic and no extra memory for weights.

    Attributes:
        first_expert: gate_up and down hold this one and those after it; 0 and all E, unless parallel.py splits them.
        exchange: None, or parallel.py's Group of the ranks that have other tokens: this rank's experts see them all.
    """

    def __init__(self, config: MLAConfig, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden, inner, e = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.gate = Router(config, device)
        self.gate_up = nn.Parameter(torch.empty(e, 2 * inner, hidden, **factory))
        self.down = nn.Parameter(torch.empty(e, hidden, inner, **factory))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=INIT_STD)
        self.first_expert, self.exchange = 0, None
        n = config.n_shared_experts
        self.shared_experts = MLP(hidden, inner * n, **factory) if n else None

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """x [..., hidden] to [..., hidden], by the gate's routing or by one given."""
        routing = self.gate(x) if routing is None else routing
        experts, weights = routing.experts.flatten(0, -2), routing.weights.flatten(0, -2)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        tokens, gate_up, down = (t.to(dtype) for t in (x.flatten(0, -2), self.gate_up, self.down))
        if self.exchange is not None:
            tokens, experts, weights = self._gather(tokens, experts, weights)
        way = _sorted_experts if dtype == torch.bfloat16 else _gathered_experts
        if way is _gathered_experts and statically_known_true(experts.numel() > gate_up.shape[0]):
            way = _all_experts
        here = None
        if len(gate_up) < self.gate.config.n_routed_experts:
            experts = experts - self.first_expert
            here = (experts >= 0) & (experts < len(gate_up))
        routed = way(tokens, experts, weights, gate_up, down, here).to(dtype)
        if self.exchange is not None:
            routed = self.exchange.sum_scatter(routed)
        routed = routed.view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def _gather(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All ranks' tokens and their routing, which travels as one tensor: fp32 holds an expert's number exactly."""
        routing = self.exchange.gather(torch.cat([experts.float(), weights], 1)).flatten(0, 1)
        experts, weights = routing.chunk(2, 1)
        return self.exchange.gather(tokens).flatten(0, 1), experts.long(), weights


# tokens [n, hidden], experts and weights [n, k], gate_up [E, 2 inner, hidden], down [E, hidden, inner] -> [n, hidden];
# `here` [n, k] bool, where it is given, says which of `experts` are among the E: the others' part is 0


def _sorted_experts(tokens, experts, weights, gate_up, down, here: Tensor | None = None) -> Tensor:
    k = experts.shape[1]
    if here is not None:
        experts = experts.where(here, len(gate_up))  # after all of the E, in rows that no product writes
    ranked, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(ranked, torch.arange(len(gate_up), device=ranked.device), right=True, out_int32=True)
    inner = _swiglu(F.grouped_mm(tokens[order // k], gate_up.mT, offs=ends))
    out = F.grouped_mm(inner, down.mT, offs=ends)[order.argsort()].unflatten(0, (-1, k))
    if here is not None:
        out = out.where(here[..., None], 0)
    return (out * weights[..., None]).sum(1)


def _gathered_experts(tokens, experts, weights, gate_up, down, here: Tensor | None = None) -> Tensor:
    if here is not None:
        experts, weights = experts.where(here, 0), weights.where(here, 0)
    inner = _swiglu((gate_up[experts] @ tokens[:, None, :, None])[..., 0])
    out = (down[experts] @ inner[..., None])[..., 0]
    return (out * weights[..., None]).sum(1)


def _all_experts(tokens, experts, weights, gate_up, down, here: Tensor | None = None) -> Tensor:
    if here is not None:
        experts, weights = experts.where(here, 0), weights.where(here, 0)
    share = weights.new_zeros(len(tokens), len(gate_up)).scatter_add(1, experts, weights)
    routed = torch.zeros_like(tokens, dtype=weights.dtype)
    for e in range(len(gate_up)):
        routed = routed + share[:, e, None] * F.linear(_swiglu(F.linear(tokens, gate_up[e])), down[e])
    return routed


# ---------------------------------------------------------------------------------------------------------- model


class DeepseekDecoderLayer(nn.Module):
    def __init__(self, config: MLAConfig, layer: int, **factory):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.attn = MLAttention(config, **factory)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        if config.is_moe(layer):
            self.ffn = MoE(config, **factory)
        else:
            self.ffn = MLP(config.hidden_size, config.intermediate_size, **factory)

    def forward(self, x: Tensor, attend, kv_cache: Tensor | None, experts: Tensor | None):
        """x [b, s, hidden] after the layer, with attend(self.attn, normed x, kv_cache) for attention, and its Routing,
        to `experts` if given (None in a dense layer)."""
        x = x + attend(self.attn, self.attn_norm(x), kv_cache)
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MLP):
            return x + self.ffn(normed), None
        routing = self.ffn.gate(normed, experts)
        return x + self.ffn(normed, routing), routing


class DeepseekModel(nn.Module):
    """Embedding, decoder layers, norm, and head. Starts random; `from_pretrained` reads a checkpoint.

    All three ways to run it take two more keyword arguments, with which runs can be compared although their roundings
    differ, since a router turns a difference in the last bit into another expert:

        logits, routing = model.decode(..., return_routing=True)         what each MoE layer chose, and how clearly
        logits = compiled_decode(..., experts=routing.experts)           the same choice, whatever the own router says

    Both are tensors in and out ([MoE layers, b, s, k], see `Routing`), so they work compiled and exported.
    `return_routing=True` is an error in a model without MoE layers.
    """

    def __init__(self, config: MLAConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.parallel = None  # parallel.py's Parallel, if this is one rank's part of a model
        factory = {"device": device, "dtype": dtype}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        nn.init.normal_(self.embed.weight, std=INIT_STD)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, i, **factory) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        if not config.tie_word_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, **factory)

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device=None, mesh=None) -> "DeepseekModel":
        """Reads a Hugging Face checkpoint, or with a mesh this rank's part of it: see hf.load."""
        from . import hf  # hf imports this module

        return hf.load(directory, dtype=dtype, device=device, mesh=mesh)

    def save_pretrained(self, directory) -> None:
        """Writes a Hugging Face checkpoint: see hf.save."""
        from . import hf

        hf.save(self, directory)

    def forward(self, input_ids: Tensor, *, experts: Tensor | None = None, return_routing: bool = False):
        """Logits [b, s, vocab] of input_ids [b, s], each row from its own start; differentiable, for training."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        angles = rotary_angles(self.config, positions)

        def attend(attn: MLAttention, x: Tensor, _: None) -> Tensor:
            return attn(x, angles)

        return self._run(input_ids, attend, [None] * len(self.layers), experts, return_routing)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        seqlens_q: Tensor,
        kv_caches: list[Tensor],
        block_table: Tensor,
        cache_seqlens: Tensor | None = None,
        *,
        last_only: bool = False,
        experts: Tensor | None = None,
        return_routing: bool = False,
    ):
        """Appends prompts, or pieces of prompts, to the caches.

        Args:
            input_ids: [b, s], row r's tokens first, then padding of any valid id.
            seqlens_q: [b] int32, tokens of each row in input_ids, 0 to s.
            kv_caches: one a layer, as `PagedKVCache.layers`: [num_pages, page_size, 1, config.head_dim] in the model's
                dtype, or of an fp8 format of kv_cache.py, where a backend serves it. With one of "fp8_tensor" each
                layer's attn.kv_scale applies.
            block_table: [b, max_pages] int32. With cache_seqlens, all max_pages of every row are gathered and
                up-projected, so pass no more columns than the longest row needs.
            cache_seqlens: [b] int32, tokens of each row in the caches, those of this call included. None means that
                every row starts here, which spares reading the caches.
            last_only: logits of each row's last token only.
        Returns:
            logits [b, s, vocab], those of padding meaningless; or [b, vocab] with last_only.
        """
        if self.parallel is not None:
            given = {"input_ids": input_ids, "seqlens_q": seqlens_q, "block_table": block_table}
            self.parallel.agree(kv_caches, **given, cache_seqlens=cache_seqlens)
        page_size, start = kv_caches[0].shape[1], torch.zeros_like(seqlens_q)
        share = EVERYTHING if self.parallel is None else self.parallel.share
        if cache_seqlens is not None:
            start = cache_seqlens - seqlens_q
        offsets = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = start[:, None] + offsets
        appended = torch.where(offsets < seqlens_q[:, None], positions, -1)  # not the padding
        step = PrefillStep(slots_of(block_table, appended, page_size, share).flatten())
        if cache_seqlens is not None:
            keys = torch.arange(block_table.shape[1] * share.count * page_size, device=input_ids.device)
            written, seen = keys < cache_seqlens[:, None], keys <= positions[:, :, None]
            first_of_page = written[:, share.index * page_size :: share.count * page_size]
            pages = torch.where(first_of_page, block_table, 0).long()
            step = PrefillStep(step.slots, pages, written[..., None], seen[:, None])
        angles = rotary_angles(self.config, positions)
        last = seqlens_q - 1 if last_only else None

        def attend(attn: MLAttention, x: Tensor, kv_cache: Tensor) -> Tensor:
            return attn.prefill(x, kv_cache, angles, step)

        return self._run(input_ids, attend, kv_caches, experts, return_routing, last)

    @torch.no_grad()
    def decode(
        self,
        input_ids: Tensor,
        kv_caches: list[Tensor],
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        experts: Tensor | None = None,
        return_routing: bool = False,
    ):
        """Appends the next s_q tokens of every row to the caches, and attends absorbed. Never syncs with the host.

        Args:
            input_ids: [b, s_q], the last s_q tokens of each row.
            kv_caches, block_table: as `prefill`'s; only pages in use are read.
            cache_seqlens: [b] int32, tokens of each row in the caches, those of this call included. A row with 0, and
                tokens before a row's start (s_q > cache_seqlens), are padding: nothing is written for them.
        Returns:
            logits [b, s_q, vocab]; finite but meaningless for padding.
        """
        if self.parallel is not None:
            self.parallel.agree(kv_caches, input_ids=input_ids, block_table=block_table, cache_seqlens=cache_seqlens)
        s_q, page_size = input_ids.shape[1], kv_caches[0].shape[1]
        positions = cache_seqlens[:, None] - s_q + torch.arange(s_q, device=input_ids.device)
        context = self.layers[0].attn.context
        if context is None:
            slots = slots_of(block_table, positions, page_size).flatten()
            heads = s_q * self.layers[0].attn.num_heads
            plan = get_mla_metadata(cache_seqlens, heads, 1, batch_invariant=self.config.batch_invariant)
            step = DecodeStep(slots, block_table, cache_seqlens, plan)
        else:
            heads, invariant = self.layers[0].attn.num_heads, self.config.batch_invariant
            step = context.step(positions, block_table, cache_seqlens, page_size, heads, invariant)
        angles = rotary_angles(self.config, positions)

        def attend(attn: MLAttention, x: Tensor, kv_cache: Tensor) -> Tensor:
            return attn.decode(x, kv_cache, angles, step)

        return self._run(input_ids, attend, kv_caches, experts, return_routing)

    def _run(self, input_ids, attend, kv_caches, experts, return_routing, last=None):
        """All layers, with `attend` for attention, and the head: on every token, or on token last[r] of each row r."""
        if len(kv_caches) != len(self.layers):
            raise RuntimeError(f"kv_caches: expected one a layer, {len(self.layers)}, got {len(kv_caches)}")
        x, routings = self.embed(input_ids), []
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, routing = layer(x, attend, kv_cache, None if experts is None else experts[len(routings)])
            if routing is not None:
                routings.append(routing)
        if last is not None:
            x = x[torch.arange(x.shape[0], device=x.device), last]
        x = self.norm(x)
        logits = F.linear(x, self.embed.weight) if self.config.tie_word_embeddings else self.head(x)
        return (logits, Routing(*map(torch.stack, zip(*routings, strict=True)))) if return_routing else logits
