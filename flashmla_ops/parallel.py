"""Models over several ranks: `parallelize` makes a DeepseekModel one rank's part of itself, on torch.distributed.

A mesh has some of four dimensions, of any sizes and in any order. They divide the work in different ways, and a weight
is on as many ranks as its row has dimensions that do not divide it:

    dimension   rows of a batch   heads, MLPs, vocabulary   cache                     experts
    dp          divided           whole                     of its rows               dealt whole
    tp          the same          divided                   whole                     each one's width divided
    ep          the same          divided                   whole                     dealt whole
    cp          the same          divided                   pages of each row dealt   each one's width divided

Embedding, router, norms and the projections to latents are whole on every rank. A layer sums over the ranks of tp, ep
and cp twice: after attention and after its experts or MLP.

dp with experts is how DeepSeek deploys V3 (arXiv 2412.19437, 3.4.2): attention by batch, experts over all ranks. Every
rank's experts see the tokens of all ranks (an all-gather) and add nothing for tokens that did not choose them; a
reduce-scatter brings each rank its tokens' sums. An all-to-all that drops nothing and waits for no host must have room
for all of a rank's tokens at every other rank: it would carry exactly as many bytes, and need more steps.

cp is for contexts that no rank's memory holds. Queries of all ranks' heads are gathered, each rank attends with them to
the old keys in its own pages, and each rank merges, for its own heads, what all have found (`merge_shares`). A call's
own tokens need a causal mask, which a share of the old keys does not: each rank attends to them in a call of its own,
for its own heads. With one token a row there is nothing to mask, and the token is attended to where it is cached.

All this is eager and compiled code alike, nothing waits for the host, and shapes do not depend on values, so a step
with NCCL can be captured in a CUDA graph. Inference only.

    python -m flashmla_ops.parallel --plan CONFIG --mesh dp=2,tp=4 --memory-gb 80

prints what each rank would hold and send, without GPUs or processes; `plan` computes it.
"""

import argparse
import json
import logging
import sys
import weakref
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from .backends.values import DEBUG
from .functional import concat_and_cache_mla, fwd_kvcache_mla, get_mla_metadata
from .kv_cache import EVERYTHING, PagedKVCache, Share, named_format, slots_of
from .modules import DecodeStep, DeepseekModel, MLAConfig, MoE

DIMENSIONS = ("dp", "tp", "ep", "cp")
HEADS = ("tp", "ep", "cp")  # what divides attention heads, MLPs and the vocabulary
EXPERTS = ("dp", "ep")  # what deals experts
WIDTH = ("tp", "cp")  # what divides each expert
OWN_PAGE = 64  # tokens; every backend serves this page size
MOST_LAYERS = 1000  # of a plan, which makes each of them
LARGEST = 2**31 - 1  # number that the command takes


# ------------------------------------------------------------------------------------------------------ where a rank is


@dataclass(frozen=True)
class Layout:
    """A mesh's sizes by dimension, in its order, and a rank's coordinates."""

    sizes: dict[str, int]
    at: dict[str, int]

    def part(self, dims: tuple[str, ...]) -> tuple[int, int]:
        """Which of how many parts is this rank's, of what is divided over `dims`."""
        index, count = 0, 1
        for dim, size in self.sizes.items():
            if dim in dims:
                index, count = index * size + self.at[dim], count * size
        return index, count

    def check(self, config: MLAConfig) -> None:
        """Raises RuntimeError unless the mesh's dimensions are known and divide the model evenly."""
        unknown = [dim for dim in self.sizes if dim not in DIMENSIONS]
        if unknown or not self.sizes:
            raise RuntimeError(f"mesh: expected dimensions named {', '.join(DIMENSIONS)}, got {', '.join(unknown)}")
        for dim, size in self.sizes.items():
            if size < 1:
                raise RuntimeError(f"mesh: expected {dim} to have at least 1 rank, got {size}")
        dense = config.intermediate_size if not config.is_moe(0) else 0
        inner = config.moe_intermediate_size if config.n_routed_experts else 0
        divided = [
            ("num_attention_heads", config.num_attention_heads, HEADS),
            ("intermediate_size", dense, HEADS),
            ("moe_intermediate_size * n_shared_experts", inner * config.n_shared_experts, HEADS),
            ("vocab_size", config.vocab_size, HEADS),
            ("n_routed_experts", config.n_routed_experts, EXPERTS),
            ("moe_intermediate_size", inner, WIDTH),
        ]
        for name, size, dims in divided:
            _, count = self.part(dims)
            if size % count:
                over = " * ".join(f"{dim} {n}" for dim, n in self.sizes.items() if dim in dims)
                raise RuntimeError(f"mesh: expected {over} = {count} to divide {name} = {size}")

    @staticmethod
    def of(mesh: DeviceMesh) -> "Layout":
        names = mesh.mesh_dim_names
        if names is None or mesh.get_coordinate() is None:
            raise RuntimeError(
                f"mesh: expected named dimensions ({', '.join(DIMENSIONS)}) and this rank in it, got {mesh}"
            )
        return Layout(dict(zip(names, mesh.shape, strict=True)), dict(zip(names, mesh.get_coordinate(), strict=True)))


@dataclass(frozen=True)
class Group:
    """Ranks that exchange tensors, by their process group's name: functional collectives, which compile and capture."""

    name: str
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x."""
        return _done(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", self.name))

    def gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], every rank's x."""
        flat = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous().flatten(), self.size, self.name)
        return _done(flat).view(self.size, *x.shape)

    def sum_scatter(self, x: Tensor) -> Tensor:
        """x [size * n, ...] to [n, ...], this rank's rows of the sum of all ranks' x."""
        return _done(torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", self.size, self.name))

    def exchange(self, x: Tensor) -> Tensor:
        """x [size, ...] to [size, ...]: what each rank has for this one."""
        ones = [1] * self.size
        return _done(torch.ops._c10d_functional.all_to_all_single(x.contiguous(), ones, ones, self.name))

    def gather_objects(self, value, device: torch.device) -> list:
        """Every rank's value, of kinds that JSON has, by tensors on a device. (all_gather_object would need numpy.)"""
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
        sizes = self.gather(torch.tensor(len(text), device=device)).tolist()
        texts = self.gather(nn.functional.pad(text, (0, max(sizes) - len(text))))
        return [json.loads(bytes(text[:size].tolist())) for text, size in zip(texts, sizes, strict=True)]


def _done(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def _group(mesh: DeviceMesh, layout: Layout, dims: tuple[str, ...]) -> Group | None:
    """The ranks that differ in `dims` only; None if the mesh has none of these dimensions."""
    present = tuple(dim for dim in layout.sizes if dim in dims)
    if not present:
        return None
    group = (mesh[present]._flatten() if len(present) > 1 else mesh[present[0]]).get_group()
    index, count = layout.part(dims)
    if dist.get_rank(group) != index:
        raise RuntimeError(f"mesh: expected ranks in ascending order, as init_device_mesh makes them, got {mesh}")
    return Group(group.group_name, count)


@dataclass(frozen=True)
class Parallel:
    """What a model that was divided keeps: `model.parallel`."""

    layout: Layout
    heads: Group | None
    rows: Group | None
    context: Group | None
    everyone: Group | None = None  # under FLASHMLA_DEBUG=1: those whose tensors are compared

    @property
    def share(self) -> Share:
        """This rank's pages of every sequence."""
        return Share(*self.layout.part(("cp",))) if self.context else EVERYTHING

    @staticmethod
    def of(mesh: DeviceMesh) -> "Parallel":
        layout = Layout.of(mesh)
        groups = (HEADS, ("dp",), ("cp",), *([DIMENSIONS] if DEBUG else []))
        return Parallel(layout, *(_group(mesh, layout, dims) for dims in groups))

    @staticmethod
    def imagined(layout: Layout) -> "Parallel":
        """Without processes, for tensors without memory."""

        def group(*dims):
            return Group(dims[0], layout.part(dims)[1]) if set(dims) & set(layout.sizes) else None

        return Parallel(layout, group(*HEADS), group("dp"), group("cp"))

    def agree(self, kv_caches: list[Tensor], **tensors: Tensor | None) -> None:
        """Under FLASHMLA_DEBUG=1 compares what all ranks give an eager call: dtypes and shapes, and where they have the
        same rows also values, and the pages of caches (not what is in them). Waits for the device."""
        if self.everyone is None or torch.compiler.is_compiling():
            return
        mine = {name: _facts(t) for name, t in tensors.items() if t is not None}
        mine |= {f"kv_caches[{i}]": _facts_of_cache(cache) for i, cache in enumerate(kv_caches)}
        known = dist.get_rank(), self.layout.part(("dp",))[0], mine
        _compare(self.everyone.gather_objects(known, kv_caches[0].device))

    def part_of(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        """The piece, of the given shape, of a checkpoint's tensor that is this rank's."""
        for dim, size in enumerate(shape):
            if tensor.shape[dim] != size:
                fused = tensor.dim() == 3  # [E, ...]: transformers 5's experts
                over = HEADS if ".experts." not in name else EXPERTS if fused and dim == 0 else WIDTH
                tensor = _cut(tensor, dim, self.layout.part(over), 2 if name.endswith("gate_up_proj") and dim else 1)
        return tensor


# --------------------------------------------------------------------------------------------------------- weights


def _cut(weight: Tensor, dim: int, part: tuple[int, int], pieces: int = 1) -> Tensor:
    """Part (index, count) of a dimension, or that of each of the `pieces` it consists of, such as gate and up."""
    index, count = part
    if pieces == 1:
        return weight.chunk(count, dim)[index]
    return torch.cat([piece.chunk(count, dim)[index] for piece in weight.chunk(pieces, dim)], dim)


def _keep(module: nn.Module, name: str, dim: int, part: tuple[int, int], pieces: int = 1) -> None:
    cut = _cut(getattr(module, name).detach(), dim, part, pieces)
    setattr(module, name, nn.Parameter(cut.clone(memory_format=torch.contiguous_format), requires_grad=False))


def parallelize(model: DeepseekModel, mesh: DeviceMesh) -> DeepseekModel:
    """Makes `model` this rank's part of itself, in place, and returns it. Every rank calls it with the same weights.

    Then `prefill` and `decode` are called on every rank of the mesh at the same time. Ranks that differ in tp, ep or cp
    only are given the same tensors, ranks that differ in dp their own rows: tensors of the same shapes, padded if need
    be (a row of no tokens has seqlens_q, or cache_seqlens, 0). All return their rows' logits, of the whole vocabulary.
    Caches are those of `new_cache`. Under FLASHMLA_DEBUG=1 each eager call checks that ranks' tensors agree.

    To load a checkpoint so that no rank ever holds more than its part: DeepseekModel.from_pretrained(..., mesh=mesh).
    A part can be pickled; it works again in a process at the same place of the same mesh.

    Args:
        model: on any device, also meta. Its parameters no longer require gradients.
        mesh: of `init_device_mesh`, with dimensions named dp, tp, ep or cp, see above.
    Raises:
        RuntimeError: the mesh has other dimensions or does not divide the model evenly; nothing has changed then.
    """
    if model.parallel is not None:
        raise RuntimeError(f"model: expected a whole one, got a part: {model.parallel.layout}")
    Layout.of(mesh).check(model.config)
    _divide(model, Parallel.of(mesh))
    return model


def _divide(model: DeepseekModel, parallel: Parallel) -> None:
    layout, group = parallel.layout, parallel.heads
    part = layout.part(HEADS)
    model.requires_grad_(False)
    model.parallel = parallel
    if not model.config.tie_word_embeddings:
        _keep(model.head, "weight", 0, part)
        if group:
            model.head.register_forward_hook(partial(_gather_logits, group))
    for layer in model.layers:
        attn, ffn = layer.attn, layer.ffn
        for name in ("wq", "wq_b", "wkv_b"):
            if hasattr(attn, name):
                _keep(getattr(attn, name), "weight", 0, part)
        _keep(attn.wo, "weight", 1, part)
        attn.num_heads //= part[1]
        if parallel.context:
            attn.context = ContextParallel(parallel.context, parallel.share)
        if isinstance(ffn, MoE):
            for name, width, pieces in (("gate_up", 1, 2), ("down", 2, 1)):
                _keep(ffn, name, 0, layout.part(EXPERTS))
                _keep(ffn, name, width, layout.part(WIDTH), pieces)
            ffn.first_expert = layout.part(EXPERTS)[0] * len(ffn.gate_up)
            ffn.exchange = parallel.rows
        mlp = ffn.shared_experts if isinstance(ffn, MoE) else ffn
        if mlp is not None:
            _keep(mlp.gate_up, "weight", 0, part, 2)
            _keep(mlp.down, "weight", 1, part)
        if group:
            for module in (attn.wo, ffn):
                module.register_forward_hook(partial(_sum_output, group))


# hooks, which can be pickled with their module


def _sum_output(group: Group, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    return group.sum(out)


def _gather_logits(group: Group, module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
    return group.gather(logits).movedim(0, -2).flatten(-2)


# ------------------------------------------------------------------------------------------------- context parallel


def merge_shares(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention to all keys from attention to n disjoint shares of them, in fp32, rounded once.

        out = sum_i exp(lse_i - lse) out_i,    lse = log sum_i exp(lse_i)

    An infinite lse_i says that share i has no key of that row: its out is ignored; where no share has, out is 0.

    Args:
        outs: [n, b, s_q, h, d_v]. lses: [n, b, h, s_q] fp32.
    Returns:
        [b, s_q, h, d_v] of `dtype`.
    """
    lses = lses.masked_fill(lses.isinf(), -torch.inf)  # NaN stays: it says that something is wrong
    largest = lses.amax(0).clamp_min(torch.finfo(lses.dtype).min)  # finite where no share has a key
    weights = (lses - largest).exp().transpose(2, 3)[..., None]  # [n, b, s_q, h, 1]
    total = weights.sum(0)
    summed = (outs.float() * weights).where(weights != 0, 0).sum(0)
    return (summed / total.where(total != 0, 1)).to(dtype)


class ContextParallel:
    """Attention of a rank that holds `share` of the pages of every sequence; `group` are the ranks with the others."""

    def __init__(self, group: Group, share: Share):
        self.group, self.share = group, share

    def step(
        self,
        positions: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        page_size: int,
        num_heads: int,
        batch_invariant: bool = False,
    ) -> DecodeStep:
        """The step of tokens at `positions` [b, s_q], with num_heads heads a rank; as DeepseekModel.decode makes it."""
        b, s_q = positions.shape
        options = {"batch_invariant": batch_invariant}
        slots = slots_of(block_table, positions, page_size, self.share).flatten()
        if s_q == 1:
            lengths, own = self.share.lengths(cache_seqlens, page_size), None
        else:
            lengths = self.share.lengths((cache_seqlens - s_q).clamp_min(0), page_size)
            # row r's own tokens lie in page r of a cache of their own, those before its start left out
            row = torch.arange(b, device=positions.device)
            pages = -(-s_q // OWN_PAGE)
            count = cache_seqlens.clamp_max(s_q)
            index = torch.arange(s_q, device=positions.device) - (s_q - count[:, None])
            own_slots = torch.where(index < 0, -1, row[:, None] * (pages * OWN_PAGE) + index).flatten()
            table = (row[:, None] * pages + torch.arange(pages, device=positions.device)).int()
            own = DecodeStep(own_slots, table, count, get_mla_metadata(count, s_q * num_heads, 1, **options))
        plan = get_mla_metadata(lengths, s_q * num_heads * self.share.count, 1, **options)
        return DecodeStep(slots, block_table, lengths, plan, own)

    def attend(
        self,
        q: Tensor,
        tokens: tuple[Tensor, Tensor],
        kv_cache: Tensor,
        step: DecodeStep,
        head_dim_v: int,
        softmax_scale: float,
        kv_scale: Tensor | None,
    ) -> Tensor:
        """q [b, s_q, h, d_qk] of this rank's heads to out [b, s_q, h, d_v], over the keys of all ranks.

        tokens: the call's own kv_c [b, s_q, r] and k_pe [b, s_q, d_rope], which the cache holds already.
        """
        n = self.group.size
        every_q = self.group.gather(q).movedim(0, 2).flatten(2, 3)  # [b, s_q, n * h, d_qk]
        cached = kv_cache, step.block_table, step.cache_seqlens
        out, lse = fwd_kvcache_mla(every_q, *cached, head_dim_v, softmax_scale, False, *step.plan, kv_scale=kv_scale)
        outs = self.group.exchange(out.unflatten(2, (n, -1)).movedim(2, 0))  # [n, b, s_q, h, d_v]
        lses = self.group.exchange(lse.unflatten(1, (n, -1)).movedim(1, 0))  # [n, b, h, s_q]
        if step.own is not None:
            own = step.own
            shape = (q.shape[0] * own.block_table.shape[1], OWN_PAGE, 1, kv_cache.shape[-1])
            cache = kv_cache.new_empty(shape)
            concat_and_cache_mla(cache, *(t.flatten(0, 1) for t in tokens), own.slots, kv_scale=kv_scale)
            cached = cache, own.block_table, own.cache_seqlens
            out, lse = fwd_kvcache_mla(q, *cached, head_dim_v, softmax_scale, True, *own.plan, kv_scale=kv_scale)
            outs, lses = torch.cat([outs, out[None]]), torch.cat([lses, lse[None]])
        return merge_shares(outs, lses, q.dtype)

    def gather_pages(self, pages: Tensor) -> Tensor:
        """This rank's pages of every row [b, max_pages, ...] to all ranks' [b, max_pages * n, ...], in order."""
        raw = pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages
        return self.group.gather(raw).movedim(0, 2).flatten(1, 2).view(pages.dtype)


def new_cache(
    model: DeepseekModel, num_pages: int, max_batch_size: int, max_pages_per_sequence: int, **options
) -> PagedKVCache:
    """This rank's part of a cache for a model that was parallelized.

    Args:
        num_pages, max_batch_size, max_pages_per_sequence: as of `PagedKVCache`, for the whole mesh: dp divides rows and
            pages, cp pages and those of each sequence.
        options: PagedKVCache's others; the model's device, dtype and dimensions where they are left out, or None.
    Raises:
        RuntimeError: the mesh does not divide them evenly, or the model is not parallelized.
    """
    if model.parallel is None:
        raise RuntimeError("model: expected a parallelized one, got a whole one: PagedKVCache makes its caches")
    layout, weight, config = model.parallel.layout, model.embed.weight, model.config
    sizes = {"num_pages": (num_pages, ("dp", "cp")), "max_batch_size": (max_batch_size, ("dp",))}
    sizes["max_pages_per_sequence"] = (max_pages_per_sequence, ("cp",))
    local = {}
    for name, (size, dims) in sizes.items():
        _, count = layout.part(dims)
        if size % count:
            raise RuntimeError(f"{name}: expected a multiple of {' * '.join(dims)} = {count}, got {size}")
        local[name] = size // count
    given = {name: value for name, value in options.items() if value is not None}
    defaults = {"kv_lora_rank": config.kv_lora_rank, "qk_rope_head_dim": config.qk_rope_head_dim}
    defaults |= {"device": weight.device, "share": model.parallel.share}
    if "kv_cache_dtype" not in given:
        defaults["dtype"] = weight.dtype
    return PagedKVCache(config.num_hidden_layers, **local, **{**defaults, **given})


# -------------------------------------------------------------------------------------------------------- checking


def _facts(t: Tensor) -> tuple[str, int, str]:
    """What ranks compare of a tensor: what is the same on all, what is the same where rows are, and what that is."""
    raw = bytes(t.detach().cpu().contiguous().view(torch.uint8).flatten().tolist())
    return f"{t.dtype} {list(t.shape)}", zlib.crc32(raw), "values"


def _facts_of_cache(cache: Tensor) -> tuple[str, int, str]:
    num_pages, *page = cache.shape
    return f"{cache.dtype} pages of {page}", num_pages, "number of pages"


def _compare(everyone: list[tuple[int, int, dict[str, tuple[str, int, str]]]]) -> None:
    """Raises, on every rank alike, if ranks' facts differ: of each rank its number, coordinate in dp, and facts."""
    zero, _, wanted = everyone[0]
    first_of = {}  # each coordinate in dp: the first rank there and its facts
    for rank, row, theirs in everyone:
        first, same = first_of.setdefault(row, (rank, theirs))
        for name in {**wanted, **theirs}:
            expected, got = (facts[name][0] if name in facts else "none" for facts in (wanted, theirs))
            if expected != got:
                raise RuntimeError(
                    f"{name}: expected one dtype and shape on all ranks, got {expected} on rank {zero} and {got} on "
                    f"rank {rank}"
                )
            _, value, what = theirs[name]
            if value != same[name][1]:
                raise RuntimeError(
                    f"{name}: expected the same {what} on ranks that differ in tp, ep or cp only, got others on rank "
                    f"{rank} than on rank {first}"
                )


# -------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class Plan:
    """What each rank of a mesh holds and sends in a decode step, in bytes; all ranks are alike."""

    layout: Layout
    weights: dict[str, int]  # by kind
    activations: int  # the most that is alive at once in a decode step, beside weights and cache
    sent: dict[str, int]  # by collective, in a decode step, by algorithms that send no byte twice (rings)
    token: int  # of cache, of all layers

    def capacity(self, memory: int) -> int:
        """Tokens for which a rank has room, negative if not even the rest fits."""
        return (memory - sum(self.weights.values()) - self.activations) // self.token


KINDS = {  # of weights, by a part of their names
    "embed.": "embedding",
    "head.": "head",
    "attn.": "attention",
    ".shared_experts.": "shared experts",
    ".gate.": "routers",
    "norm.": "norms",
    ".ffn.gate_up.": "dense MLPs",
    ".ffn.down.": "dense MLPs",
    ".ffn.": "experts",
}


def plan(
    config: MLAConfig,
    sizes: dict[str, int],
    *,
    batch: int = 128,
    s_q: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    kv_cache_dtype: str | torch.dtype | None = None,
) -> Plan:
    """Makes one rank's part of a model of tensors without memory, by the code that makes the real one, and measures it.

    Args:
        sizes: the mesh's, by dimension. batch: rows of all ranks together; dp must divide it. s_q: tokens a row.
        dtype: of the model. kv_cache_dtype: as of `PagedKVCache`; the model's if None.
    Raises:
        RuntimeError: the mesh does not divide the model, or the batch.
    """
    layout = Layout(sizes, dict.fromkeys(sizes, 0))
    layout.check(config)
    if config.num_hidden_layers > MOST_LAYERS:
        raise RuntimeError(f"num_hidden_layers: expected at most {MOST_LAYERS}, got {config.num_hidden_layers}")
    for name, value in (("batch", batch), ("s_q", s_q)):
        if value < 1:
            raise RuntimeError(f"{name}: expected at least 1, got {value}")
    rows, rest = divmod(batch, layout.part(("dp",))[1])
    if rest:
        raise RuntimeError(f"batch: expected a multiple of dp = {sizes['dp']}, got {batch}")
    kind = named_format(dtype if kv_cache_dtype is None else kv_cache_dtype)
    last_dim = kind.last_dim(config.kv_lora_rank, config.qk_rope_head_dim)
    parallel = Parallel.imagined(layout)
    with FakeTensorMode():  # rather than the meta device, for which torch.autocast has no dtype
        model = DeepseekModel(config, device="cpu", dtype=dtype)
        _divide(model, parallel)
        caches = [torch.empty(1, 64, 1, last_dim, dtype=kind.dtypes[0], device="cpu") for _ in model.layers]
        lengths, table = (torch.empty(shape, dtype=torch.int32, device="cpu") for shape in ((rows,), (rows, 1)))
        input_ids = torch.empty(rows, s_q, dtype=torch.long, device="cpu")
        with _Meter((*model.parameters(), *model.buffers(), *caches), parallel) as meter:
            model.decode(input_ids, caches, table, lengths)
    weights = Counter()
    for name, weight in model.named_parameters():
        weights[next(kind for part, kind in KINDS.items() if part in name)] += weight.nbytes
    token = sum(cache.nbytes for cache in caches) // 64
    return Plan(layout, dict(weights), meter.peak, dict(meter.sent), token)


class _Meter(TorchDispatchMode):
    """Counts the bytes of tensors that live at once, but for those of `known`, and the bytes that collectives send."""

    def __init__(self, known, parallel: Parallel):
        super().__init__()
        self.sizes = {group.name: group.size for group in (parallel.heads, parallel.rows, parallel.context) if group}
        self.known = {t.untyped_storage()._cdata for t in known}
        self.tensors = Counter()  # by storage
        self.live = self.peak = 0
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self._hold(t)
        if func.namespace == "_c10d_functional" and func is not torch.ops._c10d_functional.wait_tensor.default:
            n, name = self.sizes[args[-1]], func.overloadpacket.__name__
            times = {"all_gather_into_tensor": n - 1, "all_reduce": 2 * (n - 1) / n}.get(name, (n - 1) / n)
            self.sent[name.removesuffix("_into_tensor").removesuffix("_tensor")] += int(args[0].nbytes * times)
        return out

    def _hold(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        if not self.tensors[key]:
            self.live += size
            self.peak = max(self.peak, self.live)
        self.tensors[key] += 1
        weakref.finalize(t, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.tensors[key] -= 1
        if not self.tensors[key]:
            self.live -= size


def report(plan: Plan, memory: int, batch: int, context: int | None) -> tuple[list[str], bool]:
    """The plan in lines, and whether it fits into `memory` bytes a rank, with `context` tokens of each row if given."""
    ranks = plan.layout.part(DIMENSIONS)[1]
    gb = 1e9

    def line(what: str, size: float, note: str = "") -> str:
        return f"  {what:<28}{size:>10.2f}  {note}".rstrip()

    held = plan.layout.part(("dp", "cp"))[1]  # of so many ranks each holds other tokens
    weights = sum(plan.weights.values())
    tokens = plan.capacity(memory)
    lines = [f"{' x '.join(f'{dim} {n}' for dim, n in plan.layout.sizes.items())}: {ranks} ranks, and on each, in GB"]
    lines += [line(kind, size / gb) for kind, size in plan.weights.items()]
    lines += [line("all weights", weights / gb), line("activations of a step", plan.activations / gb)]
    need = weights + plan.activations
    if context is not None:
        cache = -(-batch * context // held) * plan.token
        need += cache
        lines.append(line("cache", cache / gb, f"{batch} rows of {context} tokens, {plan.token} bytes each"))
    else:
        note = (
            f"{tokens * held} tokens on all ranks, {plan.token} bytes each, {tokens * held // batch} a row of {batch}"
        )
        lines.append(line("left for the cache", (memory - need) / gb, note if tokens > 0 else ""))
    lines.append("and sent in a decode step, in MB")
    lines += [line(name, size / 1e6) for name, size in plan.sent.items()]
    lines.append(line("all collectives", sum(plan.sent.values()) / 1e6))
    over = need - memory
    lines.append(
        f"does not fit: {need / gb:.2f} GB are needed on each rank, {over / gb:.2f} GB more than {memory / gb:.2f}"
        if over > 0
        else f"fits: {need / gb:.2f} of {memory / gb:.2f} GB"
    )
    return lines, over <= 0


def _sizes(text: str) -> dict[str, int]:
    """dp=2,tp=4 as {"dp": 2, "tp": 4}."""
    try:
        parts = [(dim, int(n)) for dim, n in (part.split("=") for part in text.split(","))]
    except ValueError:
        parts = []
    sizes = dict(parts)
    if not sizes or not set(sizes) <= set(DIMENSIONS) or min(sizes.values()) < 1 or len(sizes) < len(parts):
        wanted = f"sizes of some of {', '.join(DIMENSIONS)}, each at most once, such as dp=2,tp=4"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")
    return sizes


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > len(str(LARGEST)) or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {LARGEST}, got {text}")
    return int(text)


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number above 0, {LARGEST} at most, got {text}")
    return size


def main(arguments: list[str] | None = None) -> int:
    from .hf import read_config  # which imports this module

    parser = argparse.ArgumentParser(
        prog="python -m flashmla_ops.parallel", description="What each rank of a mesh would hold and send."
    )
    parser.add_argument("--plan", type=Path, required=True, metavar="CONFIG", help="a checkpoint's config.json")
    parser.add_argument("--mesh", type=_sizes, required=True, help="sizes of dp, tp, ep and cp, such as dp=2,tp=4")
    parser.add_argument("--memory-gb", type=_gigabytes, required=True, metavar="N", help="of each rank, in 10^9 bytes")
    parser.add_argument("--batch", type=_count, default=128, metavar="N", help="rows, on all ranks together")
    parser.add_argument("--tokens", type=_count, default=1, metavar="N", help="of a row in a decode step")
    parser.add_argument("--context", type=_count, metavar="N", help="tokens of each row in the cache")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--kv-cache", metavar="FORMAT", help="bfloat16, fp8, fp8_tensor, ...; the model's dtype")
    args = parser.parse_args(arguments)
    logger = logging.getLogger(FakeTensorMode.__module__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would log, with a traceback, what is said here in a line
    try:
        config, *_ = read_config(args.plan)
        planned = plan(
            config,
            args.mesh,
            batch=args.batch,
            s_q=args.tokens,
            dtype=getattr(torch, args.dtype),
            kv_cache_dtype=args.kv_cache,
        )
    except RuntimeError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return 1
    finally:
        logger.setLevel(level)
    lines, fits = report(planned, int(args.memory_gb * 1e9), args.batch, args.context)
    print("\n".join(lines))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
