"""Models under torch.compile and torch.export: one graph, one compile for all batches, caches written in place."""

import contextlib
import re

import pytest
import torch
from torch import nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import ReinplaceCounters, counters

from flashmla_ops import mark_kv_cache
from flashmla_ops.modules import DeepseekModel, MLAConfig

NUM_PAGES, PAGE_SIZE = 61, 16  # no other tensor has 61 of anything
BATCHES = ((2, 3), (1, 4), (3, 4), (5, 6), (8, 7), (1, 1))  # (rows, columns of block_table)


def config(num_layers: int = 4, **settings) -> MLAConfig:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7}
    return MLAConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=48,
        rope_scaling=yarn,
        first_k_dense_replace=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        **settings,
    )


def build(config: MLAConfig, dtype: torch.dtype = torch.float32) -> DeepseekModel:
    torch.manual_seed(0)
    model = DeepseekModel(config, dtype=dtype)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model


def new_caches(config: MLAConfig, dtype: torch.dtype = torch.float32, mark: bool = True) -> list[torch.Tensor]:
    shape = (NUM_PAGES, PAGE_SIZE, 1, config.head_dim)
    caches = [torch.randn(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
    return [mark_kv_cache(cache) for cache in caches] if mark else caches


def step_of(b: int, width: int, s_q: int) -> dict[str, torch.Tensor]:
    """A decode step of b rows on pages of their own; the last of several rows is padding."""
    cache_seqlens = torch.randint(s_q, width * PAGE_SIZE + 1, (b,), dtype=torch.int32)
    if b > 1:
        cache_seqlens[-1] = 0
    return {
        "input_ids": torch.randint(96, (b, s_q)),
        "block_table": torch.randperm(NUM_PAGES)[: b * width].view(b, width).int(),
        "cache_seqlens": cache_seqlens,
    }


def unbacked(step: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch and the table's width as sizes that the compiler knows nothing about, not even whether they are 1."""
    for tensor in step.values():
        mark_unbacked(tensor, 0)
    mark_unbacked(step["block_table"], 1)
    return step


def check_against_eager(run, model: DeepseekModel, caches: list[torch.Tensor], s_q: int, make=step_of):
    """Steps of all BATCHES through `run` and through eager, on caches of their own that start alike.

    Equal within fp32 rounding: compiled code decomposes products into other BLAS calls, for which MKL chooses other
    kernels on some processors (with MKL_CBWR=COMPATIBLE they are equal bit for bit under aot_eager).
    """
    torch.manual_seed(1)
    eager_caches = [cache.clone() for cache in caches]
    for b, width in BATCHES:
        before = [cache.clone() for cache in caches]
        step = make(b, width, s_q)
        expected = model.decode(kv_caches=eager_caches, **step)
        logits = run(kv_caches=caches, **step)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for cache, eager, old in zip(caches, eager_caches, before, strict=True):
            written = (eager != old).flatten(1).any(1)
            assert written.any() and not written.all()
            assert cache[~written].equal(old[~written])
            error = (cache - eager)[written].abs().max() / eager[written].abs().max()
            assert error <= 1e-5
            cache.copy_(eager)  # the next step starts alike


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    ReinplaceCounters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("s_q", [1, 4])
def test_decode_is_one_graph_for_all_batches(s_q):
    model = build(config())
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.decode, backend=backend, fullgraph=True)
    check_against_eager(compiled, model, new_caches(model.config), s_q, make=lambda *a: unbacked(step_of(*a)))
    assert backend.frame_count == 1
    assert not counters["graph_break"]


@contextlib.contextmanager
def watched_inductor():
    """A backend, Inductor, and what it was seen to do: generated code, and which graph inputs are written and which are
    promised to stay in place."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering

    seen = {"code": [], "written": [], "static": [], "compiles": 0}

    def inner(graph, inputs, **options):
        output = compile_fx_inner(graph, inputs, **options)
        seen["written"].append(set(output.mutated_input_idxs))
        seen["static"].append(set(options["static_input_idxs"]))
        return output

    def backend(graph, inputs):
        seen["compiles"] += 1
        return compile_fx(graph, inputs, inner_compile=inner)

    keep, GraphLowering.save_output_code = GraphLowering.save_output_code, staticmethod(seen["code"].append)
    try:
        yield backend, seen
    finally:
        GraphLowering.save_output_code = keep


def copies_of(cache: torch.Tensor, code: str) -> list[str]:
    """Lines of generated code that allocate, or loop over, as much as the whole cache."""
    numel, shape = cache.numel(), r"\(+" + ", ".join(map(str, cache.shape[:2]))
    loops = re.compile(rf"\b({numel}|{numel // cache.shape[-1]})L?\b")
    allocates = re.compile(rf"(empty|full|zeros)\w*\({shape}")
    return [line for line in code.splitlines() if loops.search(line) or allocates.search(line)]


def test_decode_compiled_by_inductor(needs_inductor):
    """One compile, no cache copied, every written cache a static input: what CUDA graphs need."""
    model = build(config(num_layers=2))  # of each kind one
    caches = new_caches(model.config)
    with watched_inductor() as (backend, seen):
        compiled = torch.compile(model.decode, backend=backend, fullgraph=True)
        check_against_eager(compiled, model, caches, 1, make=lambda *a: unbacked(step_of(*a)))
    assert seen["compiles"] == 1 and len(seen["code"]) == 1
    assert not counters["graph_break"]
    assert ReinplaceCounters.get_total_missed_bytes() == 0
    assert copies_of(caches[0], seen["code"][0]) == []
    assert len(seen["written"][0]) == model.config.num_hidden_layers
    assert seen["written"][0] <= seen["static"][0]


def test_what_the_test_above_would_see(needs_inductor):
    """Its detectors find a cache sliced in the graph, which is copied, and a cache that nobody marked."""
    model = build(config(num_layers=1))
    [cache] = new_caches(model.config, mark=False)
    stacked = torch.randn(2, *cache.shape)
    step = step_of(2, 3, 1)
    with watched_inductor() as (backend, seen):
        torch.compile(model.decode, backend=backend, fullgraph=True)(kv_caches=[cache], **step)
        layers = torch.compile(
            lambda stacked, **step: model.decode(kv_caches=[stacked.unbind()[1]], **step), backend=backend
        )
        layers(stacked, **step)
    assert copies_of(cache, seen["code"][0]) == []
    assert len(seen["written"][0] - seen["static"][0]) == 1
    assert len(copies_of(cache, seen["code"][1])) > 0


def test_bf16_follows_eagers_experts(needs_inductor):
    """With eager's choice of experts, compiled bf16 stays as near to fp32 as eager bf16 is."""
    small = config(num_layers=2)
    exact, model = build(small), build(small, torch.bfloat16)
    exact.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    caches = new_caches(small, torch.bfloat16)
    step = step_of(3, 4, 2)
    copies = [[cache.clone().to(dtype) for cache in caches] for dtype in (torch.bfloat16, torch.float32)]
    expected, routing = model.decode(kv_caches=copies[0], return_routing=True, **step)
    truth = exact.decode(kv_caches=copies[1], experts=routing.experts, **step)
    compiled = torch.compile(model.decode, fullgraph=True)
    logits, again = compiled(kv_caches=caches, experts=routing.experts, return_routing=True, **step)
    assert again.experts.equal(routing.experts) and routing.experts.shape == (1, 3, 2, 2)
    error = (expected - truth).abs().max()
    assert (logits - truth).abs().max() <= 2 * error and error < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_compiles(dtype):
    """Prompts, and pieces of prompts on top of them; static shapes."""
    model = build(config(num_layers=2), dtype)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.prefill, backend=backend, fullgraph=True)
    caches = new_caches(model.config, dtype)
    eager_caches = [cache.clone() for cache in caches]
    block_table = torch.randperm(NUM_PAGES)[:6].view(2, 3).int()
    seqlens_q, cache_seqlens = torch.tensor([9, 3], dtype=torch.int32), torch.tensor([18, 12], dtype=torch.int32)
    for seqlens in (None, cache_seqlens):
        input_ids = torch.randint(96, (2, 9))
        expected = model.prefill(input_ids, seqlens_q, eager_caches, block_table, seqlens)
        logits = compiled(input_ids, seqlens_q, caches, block_table, seqlens)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)
        for cache, eager in zip(caches, eager_caches, strict=True):
            torch.testing.assert_close(cache, eager, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert backend.frame_count == 2


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_training_compiles(mode):
    """Gradients of a compiled step with static shapes, in one compile, equal eager's, and train the router as well."""
    model = build(config(num_layers=2), torch.bfloat16 if mode == "bf16" else torch.float32)
    backend = CompileCounterWithBackend("aot_eager")
    compiled, gradients = torch.compile(model, backend=backend, fullgraph=True), []
    for run in (model, compiled, compiled):
        torch.manual_seed(1)
        input_ids = torch.randint(96, (2, 17))
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            logits = run(input_ids[:, :-1])
        nn.functional.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten()).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
        model.zero_grad()
    assert backend.frame_count == 1
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item() * (1e-4 if mode == "fp32" else 3e-2)
        torch.testing.assert_close(gradients[2][name], gradient, rtol=0, atol=scale, msg=name)


class Decode(nn.Module):
    """What torch.export takes: a module whose forward is the decode step."""

    def __init__(self, model: DeepseekModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids, kv_caches, block_table, cache_seqlens):
        return self.model.decode(input_ids, kv_caches, block_table, cache_seqlens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_with_dynamic_batch_and_table_width(dtype):
    from torch.export import Dim

    model = build(config(num_layers=2), dtype)
    caches, step = new_caches(model.config, dtype, mark=False), step_of(3, 5, 1)
    b, width = Dim("b"), Dim("width")
    shapes = {"input_ids": {0: b}, "kv_caches": [None] * 2, "block_table": {0: b, 1: width}, "cache_seqlens": {0: b}}
    inputs = (step["input_ids"], caches, step["block_table"], step["cache_seqlens"])
    exported = torch.export.export(Decode(model), inputs, dynamic_shapes=shapes, strict=False)
    graphs = [part.graph for part in exported.graph_module.modules()]  # no_grad makes a part of its own
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert sum("get_mla_metadata" in name for name in names) == 1  # once a step, not once a layer
    assert sum("fwd_kvcache_mla" in name for name in names) == 2
    run = exported.module()

    def call(input_ids, kv_caches, block_table, cache_seqlens):
        return run(input_ids, kv_caches, block_table, cache_seqlens)

    if dtype == torch.float32:
        check_against_eager(call, model, caches, 1)
    else:
        torch.testing.assert_close(call(kv_caches=caches, **step), model.decode(kv_caches=caches, **step))
