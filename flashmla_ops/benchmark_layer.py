"""The benchmark's layer rows: a decode step of the attention half of one DeepSeek-V3 layer, against its parts' floors.

A step is the input norm, the plan, and MLAttention.decode: projections, rotation, append, absorbed attention, output
projection. Slots and rotary angles, which all 61 layers share, are made beforehand; so could the plan be, but serving
code that captures one layer's step makes it there.

The step is captured as it is, and compiled by torch.compile; the better of the two counts. Each part is timed alone
too, so that a row says which parts hold what it takes beyond the sum of their floors. A part's floor is the largest of
a launch inside a graph, its bytes at the rate at which memory is read (attention: `paged_stream` of the same pages),
and its FLOP at the highest matrix rate of the run. Parts of several kernels are timed compiled as well, like the step.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .benchmark_timing import (
    ALLOCATIONS,
    DECODE_BYTES,
    DECODE_NODES,
    ColdL2,
    Replay,
    host_us,
    matrix_tflops,
    median_us,
    nodes_for,
    pages_in_use,
)
from .functional import concat_and_cache_mla, fwd_kvcache_mla, get_mla_metadata
from .kv_cache import slots_of
from .modules import DecodeStep, MLAConfig, MLAttention, RMSNorm, rotary_angles, rotate
from .testing import DecodeCase, attention, make_decode_case, relative_error

STEP_NODES, STEP_BYTES = 4, 1 << 30  # a graph's layers, like those of a model: one after the other
TOLERANCE = 3e-2  # relative, against float32: a dozen roundings to bf16 one after the other
LAYER_SECONDS = 180  # of a row's process, which also compiles
SHOWN = 3  # parts

# -------------------------------------------------------------------------------------------------------------- a step


def v3_config(h_q: int) -> MLAConfig:
    """DeepSeek-V3, or the share that one of 128 / h_q tensor-parallel devices has of it."""
    return MLAConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=h_q,
        q_lora_rank=1536,
    )


class Layer(nn.Module):
    """The attention half of DeepseekDecoderLayer, without the residual."""

    def __init__(self, config: MLAConfig, **factory):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.attn = MLAttention(config, **factory)


class StepArgs(NamedTuple):
    layer: Layer
    x: Tensor  # [b, 1, hidden]
    kv_cache: Tensor  # [num_pages, page_size, 1, d_qk]
    block_table: Tensor  # [b, max_pages] int32
    cache_seqlens: Tensor  # [b] int32, the token of this step included
    slots: Tensor  # [b] int64
    cos: Tensor  # [b, 1, 1, d_rope / 2]
    sin: Tensor


def make_step(config: MLAConfig, b: int, s_k: int, dtype: torch.dtype, device: str, seed: int) -> StepArgs:
    torch.manual_seed(seed)
    layer = Layer(config, dtype=dtype, device=device).requires_grad_(False)
    shape = {"h_q": config.num_attention_heads, "d_qk": config.head_dim, "d_v": config.kv_lora_rank, "dtype": dtype}
    c = make_decode_case([s_k] * b, **shape, device=device, seed=seed, poison=False)
    positions = c.cache_seqlens[:, None] - 1
    slots = slots_of(c.block_table, positions, c.kv_cache.shape[1]).flatten()
    x = torch.randn(b, 1, config.hidden_size, dtype=dtype, device=device)
    return StepArgs(layer, x, c.kv_cache, c.block_table, c.cache_seqlens, slots, *rotary_angles(config, positions))


def step(
    layer: Layer,
    x: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    plan = get_mla_metadata(cache_seqlens, layer.attn.config.num_attention_heads, 1)
    return layer.attn.decode(layer.norm(x), kv_cache, (cos, sin), DecodeStep(slots, block_table, cache_seqlens, plan))


def expected(args: StepArgs) -> tuple[Tensor, Tensor]:
    """What the step returns and the tokens [b, d_qk] it appends, in float32."""
    layer = copy.deepcopy(args.layer).float()
    attn, config = layer.attn, layer.attn.config
    (q_nope, q_pe), kv_c, k_pe = attn._project(layer.norm(args.x.float()), (args.cos, args.sin))
    tokens = torch.cat([kv_c, k_pe], -1).flatten(0, 1)
    kv_cache = args.kv_cache.to(torch.float32, copy=True)
    kv_cache.flatten(0, 2)[args.slots] = tokens
    w_uk, w_uv = _absorbed_weights(attn.wkv_b.weight, config)
    q = torch.cat([torch.einsum("bshd,hdr->bshr", q_nope, w_uk), q_pe], -1)
    tables = args.block_table, args.cache_seqlens
    out, _ = attention(DecodeCase(q, kv_cache, *tables, config.kv_lora_rank, config.softmax_scale, True), torch.float32)
    return attn.wo(torch.einsum("bshr,hdr->bshd", out, w_uv).flatten(2)), tokens


def check_step(args: StepArgs, out: Tensor) -> float:
    """Asserts that out and the appended tokens are near float32's; returns the larger error."""
    wanted, wanted_tokens = expected(args)
    tokens = args.kv_cache.flatten(0, 2)[args.slots]
    errors = relative_error(out, wanted), relative_error(tokens, wanted_tokens)
    assert max(errors) < TOLERANCE, f"error {errors[0]:.1e} of the step, {errors[1]:.1e} of the tokens it appends"
    return max(errors)


def _absorbed_weights(wkv_b: Tensor, config: MLAConfig) -> tuple[Tensor, Tensor]:
    """W_UK [h, d_nope, r] and W_UV [h, d_v, r], views."""
    per_head = wkv_b.unflatten(0, (config.num_attention_heads, -1))
    return per_head.split([config.qk_nope_head_dim, config.v_head_dim], 1)


# --------------------------------------------------------------------------------------------------------------- parts


@dataclass
class Part:
    name: str
    run: Callable[..., tuple[Tensor, ...]]
    args: tuple[Tensor, ...]
    bytes_moved: int
    flops: int = 0
    fusible: bool = False  # torch.compile makes fewer kernels of it


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _linear(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (F.linear(x, weight),)


class _Chain:
    """Runs parts one after the other and keeps them with the very tensors they ran on."""

    def __init__(self):
        self.parts: list[Part] = []

    def add(self, name: str, run: Callable, *args: Tensor, moved: Sequence[Tensor] | None = None, **figures):
        """`moved`: what the part reads, and writes in place, where that is not the whole of its arguments."""
        outputs = run(*args)
        bytes_moved = _nbytes(args if moved is None else moved) + _nbytes(outputs)
        self.parts.append(Part(name, run, args, bytes_moved, **figures))
        return outputs

    def norm(self, name: str, x: Tensor, module: RMSNorm, first: int = 0) -> Tensor:
        """Of as many columns of x as the norm has weights, from `first` on."""
        columns = module.weight.numel()

        def run(x: Tensor, weight: Tensor) -> tuple[Tensor]:
            return (F.rms_norm(x[..., first : first + columns], (columns,), weight, module.eps),)

        moved = x[..., first : first + columns], module.weight
        return self.add(name, run, x, module.weight, moved=moved, fusible=True)[0]

    def linear(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        return self.add(name, _linear, x, weight, flops=2 * tokens * weight.numel())[0]


def parts_of(args: StepArgs) -> tuple[list[Part], Tensor]:
    """The parts of `step` in turn, each a function of tensors alone, and what the last one returns: the step's output.

    They do what MLAttention.decode does, slices of whole projections included; tests hold the two together.
    """
    layer, x, kv_cache, block_table, cache_seqlens, slots, cos, sin = args
    attn, config, chain = layer.attn, layer.attn.config, _Chain()
    h, r, d_nope = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    q_rank = config.q_lora_rank
    b, scale = x.shape[0], config.softmax_scale
    w_uk, w_uv = _absorbed_weights(attn.wkv_b.weight, config)

    def plan(cache_seqlens):
        return get_mla_metadata(cache_seqlens, h, 1)

    def rope(q, latents, cos, sin):
        q_pe, k_pe = q[..., d_nope:], latents[..., None, q_rank + r :]
        return rotate(q_pe, (cos, sin), config), rotate(k_pe, (cos, sin), config)[:, :, 0]

    def append(kv_cache, kv_c, k_pe, slots):
        concat_and_cache_mla(kv_cache, kv_c.flatten(0, 1), k_pe.flatten(0, 1), slots)
        return ()

    def absorb(q, q_pe, wkv_b):
        w_uk, _ = _absorbed_weights(wkv_b, config)
        return (torch.cat([torch.einsum("bshd,hdr->bshr", q[..., :d_nope], w_uk), q_pe], -1),)

    def attend(q, kv_cache, block_table, cache_seqlens, metadata, num_splits):
        return fwd_kvcache_mla(q, kv_cache, block_table, cache_seqlens, r, scale, True, metadata, num_splits)

    def up(out, wkv_b):
        return (torch.einsum("bshr,hdr->bshd", out, _absorbed_weights(wkv_b, config)[1]).flatten(2),)

    metadata, num_splits = chain.add("plan", plan, cache_seqlens)
    normed = chain.norm("norm", x, layer.norm)
    latents = chain.linear("wqkv_a", normed, attn.wqkv_a.weight)
    q_c = chain.norm("q_norm", latents, attn.q_norm)
    q = chain.linear("wq_b", q_c, attn.wq_b.weight).unflatten(-1, (h, config.qk_head_dim))
    kv_c = chain.norm("kv_norm", latents, attn.kv_norm, q_rank)
    rotated = q[..., d_nope:], latents[..., q_rank + r :], cos, sin
    q_pe, k_pe = chain.add("rope", rope, q, latents, cos, sin, moved=rotated, fusible=True)
    written = 2 * (kv_c, k_pe)  # read, and written to the cache
    chain.add("append", append, kv_cache, kv_c, k_pe, slots, moved=(*written, slots))
    moved, flops = (q[..., :d_nope], q_pe, w_uk), 2 * b * w_uk.numel()
    (q,) = chain.add("absorb", absorb, q, q_pe, attn.wkv_b.weight, moved=moved, flops=flops, fusible=True)
    keys = int(cache_seqlens.sum())
    moved = q, kv_cache.flatten(0, 2)[:keys]  # as many rows as are read
    tensors = q, kv_cache, block_table, cache_seqlens, metadata, num_splits
    out, _ = chain.add("attention", attend, *tensors, moved=moved, flops=2 * h * (config.head_dim + r) * keys)
    moved, flops = (out, w_uv), 2 * b * w_uv.numel()
    (out,) = chain.add("up", up, out, attn.wkv_b.weight, moved=moved, flops=flops, fusible=True)
    return chain.parts, chain.linear("wo", out, attn.wo.weight)


def stream_of(part: Part) -> Part:
    """`paged_stream` of the pages that an attention part reads."""
    _, kv_cache, block_table, cache_seqlens, *_ = part.args
    pages = pages_in_use(block_table, cache_seqlens, kv_cache.shape[1])

    def run(kv_cache, pages):
        torch.ops.flashmla_sm90.paged_stream(kv_cache, pages)
        return ()

    return Part("stream", run, (kv_cache, pages), part.bytes_moved)


def _copies(part: Part) -> list[tuple[Tensor, ...]]:
    """Arguments of the nodes of a part's graph: copies, so that L2 is cold for each. What is several times as large as
    L2 stays itself."""

    def copied() -> tuple[Tensor, ...]:
        return tuple(t if t.nbytes > DECODE_BYTES else t.clone() for t in part.args)

    nodes = nodes_for(DECODE_NODES, DECODE_BYTES, part.bytes_moved)
    return [part.args, *(copied() for _ in range(nodes - 1))]


def time_part(part: Part, compiling: bool, flush: ColdL2) -> dict:
    runs = {"eager_us": part.run}
    if compiling and part.fusible:
        runs["compiled_us"] = torch.compile(part.run, fullgraph=True, dynamic=False)
    copies = _copies(part)
    us = {}
    for way, run in runs.items():
        replay = Replay([lambda run=run, args=args: run(*args) for args in copies])
        (us[way],) = median_us([replay], flush)
    figures = {"us": min(us.values()), **us, "nodes": len(copies), "flops": part.flops, "bytes": part.bytes_moved}
    return {"part": part.name, **figures}


def time_parts(args: StepArgs, compiling: bool, flush: ColdL2) -> list[dict]:
    parts, _ = parts_of(args)
    timed = []
    for part in parts:
        timed.append(time_part(part, compiling, flush))
        if part.name == "attention":
            timed[-1]["stream_us"] = time_part(stream_of(part), False, flush)["us"]
    return timed


# ----------------------------------------------------------------------------------------------------------------- row


@dataclass(frozen=True)
class LayerShape:
    b: int
    h_q: int
    s_k: int = 4096

    @property
    def name(self) -> str:
        return f"layer step b{self.b} h{self.h_q} k{self.s_k} bfloat16"

    @property
    def limit(self) -> float:
        """Of the step's time over the sum of its parts' floors. The smallest step is launches more than work."""
        return 2.0 if (self.b, self.h_q) == (1, 16) else 1.6

    def make(self, seed: int) -> StepArgs:
        return make_step(v3_config(self.h_q), self.b, self.s_k, torch.bfloat16, "cuda", seed)


LAYER = {shape.name: shape for shape in (LayerShape(b, h_q) for h_q in (128, 16) for b in (1, 32, 128))}


def _compiled(args: StepArgs) -> tuple[Callable | None, str | None]:
    """The step compiled, or why it could not be."""
    # Compile in this process: a pool's workers would hold the pipes on which a row's process is awaited.
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    run = torch.compile(step, fullgraph=True, dynamic=False)
    try:
        run(*args)
    except Exception as error:  # such as no C compiler for Triton: the captured step still has a time
        return None, f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return run, None


def _check_replay(replay: Replay, sets: list[StepArgs]) -> float:
    """The largest error of a replay that finds NaN wherever it must write."""
    for args, (out,) in zip(sets, replay.outputs, strict=True):
        args.kv_cache.flatten(0, 2)[args.slots] = math.nan
        out.fill_(math.nan)
    replay.graph.replay()
    return max(check_step(args, out) for args, (out,) in zip(sets, replay.outputs, strict=True))


def layer_row(shape: LayerShape, flush: ColdL2) -> dict:
    args = shape.make(0)
    bytes_moved = sum(part.bytes_moved for part in parts_of(args)[0])
    nodes = nodes_for(STEP_NODES, STEP_BYTES, bytes_moved)
    compiled, failed = _compiled(args)
    ways = {"eager": step, **({"compiled": compiled} if compiled else {})}
    medians: dict[str, list[float]] = {way: [] for way in ways}
    errors: list[float] = []
    kept = []  # so that the next round's memory is other memory
    for seed in range(ALLOCATIONS):
        sets = [shape.make(seed * nodes + i) for i in range(nodes)]
        replays = {way: Replay([lambda run=run, a=a: (run(*a),) for a in sets]) for way, run in ways.items()}
        kept.append((sets, replays))
        for way, us in zip(replays, median_us(list(replays.values()), flush), strict=True):
            medians[way].append(us)
        errors += [_check_replay(replay, sets) for replay in replays.values()]
    us = {way: statistics.median(times) for way, times in medians.items()}
    parts = time_parts(args, compiled is not None, flush)
    return {
        "group": "layer",
        "nodes": nodes,
        "us": min(us.values()),
        "eager_us": us["eager"],
        "compiled_us": us.get("compiled"),
        "compile_failed": failed,
        "limit": shape.limit,
        "medians_us": medians,
        "parts": parts,
        "flops": sum(part["flops"] for part in parts),
        "bytes": sum(part["bytes"] for part in parts),
        "error": max(errors),
        "host_us": host_us(lambda: step(*args)),
        "matmul_tflops": matrix_tflops(flush),
    }


def complete_parts(parts: list[dict], ceilings: dict) -> float:
    """Adds each part's floor and what it takes beyond; returns the sum of the floors."""
    for part in parts:
        memory_us = part.get("stream_us") or part["bytes"] / ceilings["read_gbs"] / 1e3
        arithmetic_us = part["flops"] / ceilings["matrix_tflops"] / 1e6
        part["floor_us"] = max(ceilings["launch_us"], memory_us, arithmetic_us)
        part["excess_us"] = part["us"] - part["floor_us"]
    return sum(part["floor_us"] for part in parts)


def within_limit(row: dict) -> bool:
    return row["us"] <= row["limit"] * row["floor_us"]


def layer_line(row: dict) -> str:
    """Below the row's own line: its limit, both ways to run it, and the parts that take most beyond their floors."""
    ratio, verdict = row["us"] / row["floor_us"], "kept" if within_limit(row) else "MISSED"
    compiled = f"not compiled: {row['compile_failed']}"
    if row["compiled_us"]:
        compiled = f"compiled {row['compiled_us']:.1f} us"
    worst = sorted(row["parts"], key=lambda part: part["excess_us"], reverse=True)[:SHOWN]
    over = ", ".join(f"{part['part']} {part['excess_us']:+.1f} us" for part in worst)
    text = f"    {ratio:.2f} x the sum of its parts' floors (limit {row['limit']:g}: {verdict})"
    return f"{text}; captured {row['eager_us']:.1f} us, {compiled}; most over their floors: {over}"
