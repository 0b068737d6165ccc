"""Models over several ranks: each mesh serves what one process serves, in one compile, and what cannot work says so."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import CHECKPOINT, mesh_of, run_checks, session
from test_compile_model import BATCHES, build, config, new_caches, step_of, unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F

from flashmla_ops import PagedKVCache, hf, parallel
from flashmla_ops.modules import DeepseekModel
from flashmla_ops.parallel import new_cache, parallelize

safetensors_torch = pytest.importorskip("safetensors.torch", reason="checkpoints: pip install safetensors")

ROOT = Path(__file__).parent.parent
V3 = ROOT / "examples" / "data" / "deepseek-v3" / "config.json"
ATOL = 1e-4  # of logits up to 20, in fp32


# ------------------------------------------------------------------------------------------------ on each of n ranks


def load(**sizes: int) -> DeepseekModel:
    return DeepseekModel.from_pretrained(CHECKPOINT, dtype=torch.float32, mesh=mesh_of(**sizes))


def serves(expected: Path, **sizes: int) -> None:
    """The session's logits are those of one process, and each rank has them for all its rows."""
    model = load(**sizes)
    logits, wanted = session(model), torch.load(expected)
    part, parts = model.parallel.layout.part(("dp",))
    assert logits.keys() == {(what, row) for what, row in wanted if row * parts // 4 == part}
    for key, value in logits.items():
        torch.testing.assert_close(value, wanted[key], atol=ATOL, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def keeps_an_fp8_cache(expected: Path) -> None:
    """Pages in bytes, gathered in bytes. A value that rounding moves across a step of e4m3 moves logits."""
    model = load(cp=2)
    logits, wanted = session(model, "fp8"), torch.load(expected)
    errors = [(logits[key] - wanted[key]).abs().max() / wanted[key].abs().max() for key in wanted]
    assert max(errors) < 2e-2 and sum(errors) / len(errors) < 2e-3


def bits_per_byte(model: DeepseekModel, text: torch.Tensor) -> float:
    """Of rows of text, prefilled in two pieces, the second over what the cache holds."""
    rows, n = text.shape[0], text.shape[1] - 1
    sizes, options = (rows * 8, rows, 8), {"page_size": n // 8, "max_new_tokens": n // 2}
    if model.parallel is None:
        cache = PagedKVCache(model.config.num_hidden_layers, *sizes, dtype=torch.float32, **options)
    else:
        cache = new_cache(model, *sizes, **options)
        part, parts = model.parallel.layout.part(("dp",))
        text = text.chunk(parts)[part]
        rows = len(text)
    for _ in range(rows):
        cache.allocate()
    seqlens_q, logits = torch.full((rows,), n // 2, dtype=torch.int32), []
    for tokens in text[:, :-1].split(n // 2, 1):
        cache.extend(n // 2)
        logits.append(model.prefill(tokens, seqlens_q, cache.layers, cache.block_table, cache.cache_seqlens))
    return F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), text[:, 1:].flatten()).item() / math.log(2)


def writes_as_well(expected: Path, **sizes: int) -> None:
    model = load(**sizes)
    text, wanted = torch.load(expected)
    part, parts = model.parallel.layout.part(("dp",))
    bits = torch.tensor(bits_per_byte(model, text))
    dist.all_reduce(bits)
    assert abs(bits.item() / dist.get_world_size() - wanted) < 1e-5 * wanted


def compiles(backend: str, s_q: int, **sizes: int) -> None:
    """One graph for all batches, and its logits and caches are eager's."""
    model = parallelize(build(replace(config(num_layers=1), first_k_dense_replace=0)), mesh_of(**sizes))
    torch._dynamo.reset()
    counters.clear()
    counting = CompileCounterWithBackend(backend)
    compiled = torch.compile(model.decode, backend=counting, fullgraph=True)
    [cache] = new_caches(model.config)
    torch.manual_seed(model.parallel.layout.part(("dp",))[0])
    for b, width in BATCHES:
        step, eager_cache = step_of(b, width, s_q), cache.clone()
        expected = model.decode(kv_caches=[eager_cache], **step)
        logits = compiled(kv_caches=[cache], **unbacked(step))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache, eager_cache, rtol=1e-4, atol=1e-4)
    assert counting.frame_count == 1 and not counters["graph_break"]


def reads_its_part_only(directory: Path, **sizes: int) -> None:
    """Of a checkpoint as we write it and one as transformers 5 does: other ranks' experts are not read, the weights
    are those of a whole model that is divided, and nothing larger than the part is kept."""
    for checkpoint in (directory / "ours", directory / "fused"):
        read, original = [], hf._Checkpoint.read
        hf._Checkpoint.read = lambda self, name, read=read, original=original: read.append(name) or original(self, name)
        try:
            model = DeepseekModel.from_pretrained(checkpoint, mesh=mesh_of(**sizes))
        finally:
            hf._Checkpoint.read = original
        part, parts = model.parallel.layout.part(("dp", "ep"))
        if checkpoint.name == "ours":
            experts = {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name}
            assert experts == set(range(part * 16 // parts, (part + 1) * 16 // parts))
        whole = DeepseekModel.from_pretrained(directory / "ours")
        total = sum(weight.nbytes for weight in whole.parameters())
        divided = parallelize(whole, mesh_of(**sizes)).state_dict()
        assert all(torch.equal(weight, divided[name]) for name, weight in model.state_dict().items())
        held = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
        assert held == sum(weight.nbytes for weight in divided.values() if weight.dim()) < 0.7 * total
    with pytest.raises(RuntimeError, match="expected a whole one, got a rank's part"):
        model.save_pretrained(directory / "part")


def refuses_meshes(directory: Path) -> None:
    """Before any weight is read: there are none beside this config.json."""
    for sizes, message in (
        ({"tp": 2}, "expected tp 2 = 2 to divide num_attention_heads = 3"),
        ({"ep": 2}, "expected ep 2 = 2 to divide num_attention_heads = 3"),
        ({"dp": 2}, "expected dp 2 = 2 to divide n_routed_experts = 9"),
        ({"pp": 2}, "expected dimensions named dp, tp, ep, cp, got pp"),
    ):
        with pytest.raises(RuntimeError, match=f"mesh: {message}"):
            DeepseekModel.from_pretrained(directory, mesh=mesh_of(**sizes))
    model = load(cp=2)
    with pytest.raises(RuntimeError, match=r"num_pages: expected a multiple of dp \* cp = 2, got 15"):
        new_cache(model, 15, 4, 8)
    with pytest.raises(RuntimeError, match="expected a whole one, got a part"):
        parallelize(model, mesh_of(cp=2))
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()


def compares_ranks_tensors() -> None:
    """Under FLASHMLA_DEBUG=1, on every rank, before a step that would hang or give nonsense."""
    parallel.DEBUG = True
    model, other = (parallelize(build(config(num_layers=1)), mesh_of(**{dim: 2})) for dim in ("tp", "dp"))
    parallel.DEBUG = False
    cache, step = new_caches(model.config), step_of(3, 2, 1)
    model.decode(kv_caches=cache, **step)
    rank = dist.get_rank()
    wrong = step | {"cache_seqlens": step["cache_seqlens"] + rank}
    with pytest.raises(RuntimeError, match="cache_seqlens: expected the same values .* got others on rank 1 than on"):
        model.decode(kv_caches=cache, **wrong)
    other.decode(kv_caches=cache, **wrong)  # other rows: any values
    wrong = step | {"input_ids": step["input_ids"][: 3 - rank]}
    with pytest.raises(
        RuntimeError, match=r"input_ids: expected one shape on all ranks, got \[3, 1\] on rank 0 and \[2, 1\]"
    ):
        other.decode(kv_caches=cache, **wrong)


# -------------------------------------------------------------------------------------------------------- the ranks


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    """What one process computes, in files, and checkpoints."""
    directory = tmp_path_factory.mktemp("references")
    model = DeepseekModel.from_pretrained(CHECKPOINT, dtype=torch.float32)
    torch.save(session(model), directory / "session")
    torch.save(session(model, "fp8"), directory / "fp8")
    text = torch.tensor(list(Path(parallel.__file__).read_bytes()[: 4 * 129])).view(4, 129)
    torch.save((text, bits_per_byte(model, text)), directory / "bits")
    small = build(replace(config(num_layers=2), n_shared_experts=2))
    small.save_pretrained(directory / "ours")
    tensors = safetensors_torch.load_file(directory / "ours" / "model.safetensors")
    prefix, moe = "model.layers.1.mlp.experts.", small.layers[1].ffn
    fused = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
    fused |= {f"{prefix}gate_up_proj": moe.gate_up.detach(), f"{prefix}down_proj": moe.down.detach()}
    (directory / "fused").mkdir()
    safetensors_torch.save_file(fused, directory / "fused" / "model.safetensors")
    settings = json.loads((directory / "ours" / "config.json").read_text())
    (directory / "fused" / "config.json").write_text(json.dumps(settings))
    (directory / "odd").mkdir()
    odd = settings | {"num_attention_heads": 3, "n_routed_experts": 9, "n_group": 1, "topk_group": 1}
    (directory / "odd" / "config.json").write_text(json.dumps(odd))
    return directory


def checks_of(n: int, references: Path) -> dict:
    at = references.joinpath
    if n == 2:
        return {
            "tp": partial(serves, at("session"), tp=2),
            "ep": partial(serves, at("session"), ep=2),
            "cp": partial(serves, at("session"), cp=2),
            "dp": partial(serves, at("session"), dp=2),
            "cp, fp8": partial(keeps_an_fp8_cache, at("fp8")),
            "cp, bits": partial(writes_as_well, at("bits"), cp=2),
            "tp, part read": partial(reads_its_part_only, references, tp=2),
            "ep, part read": partial(reads_its_part_only, references, ep=2),
            "meshes refused": partial(refuses_meshes, at("odd")),
            "tensors compared": compares_ranks_tensors,
            "cp, compiled": partial(compiles, "aot_eager", 2, cp=2),
            "tp, compiled": partial(compiles, "inductor", 1, tp=2),
        }
    return {
        "dp + ep": partial(serves, at("session"), dp=2, ep=2),
        "tp + cp": partial(serves, at("session"), tp=2, cp=2),
        "cp of 4": partial(serves, at("session"), cp=4),
        "dp + ep, bits": partial(writes_as_well, at("bits"), dp=2, ep=2),
        "tp + cp, bits": partial(writes_as_well, at("bits"), tp=2, cp=2),
        "tp + cp, part read": partial(reads_its_part_only, references, tp=2, cp=2),
        "dp + ep, compiled": partial(compiles, "aot_eager", 1, dp=2, ep=2),
    }


@pytest.fixture(scope="module")
def of_two(references):
    return run_checks(2, checks_of(2, references), str(Path(__file__).parent))


@pytest.fixture(scope="module")
def of_four(references):
    return run_checks(4, checks_of(4, references), str(Path(__file__).parent))


@pytest.mark.parametrize("name", checks_of(2, Path()))
def test_two_ranks(of_two, name):
    assert of_two[name] is None, of_two[name]


@pytest.mark.parametrize("name", checks_of(4, Path()))
def test_four_ranks(of_four, name):
    assert of_four[name] is None, of_four[name]
