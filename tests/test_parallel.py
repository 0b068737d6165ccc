"""Models over several ranks: each mesh serves what one process serves, in one compile, and what cannot work says so."""

import copy
import functools
import json
import math
import os
import pickle
import re
import socket
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import CHECKPOINT, mesh_of, run_checks, session
from test_compile_model import BATCHES, NUM_PAGES, build, config, new_caches, step_of, unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from flashmla_ops import PagedKVCache, backends, fwd_kvcache_mla, get_mla_metadata, hf, merge_attn_states, parallel
from flashmla_ops.benchmark_timing import ColdL2, Replay, median_us
from flashmla_ops.kv_cache import Share, slots_of
from flashmla_ops.modules import DeepseekModel, MLAConfig, MoE
from flashmla_ops.parallel import (
    DIMENSIONS,
    Layout,
    Parallel,
    merge_shares,
    new_cache,
    parallelize,
    plan,
)
from flashmla_ops.testing import attention, make_decode_case, make_merge_case, relative_error

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


def nearly_serves(references: Path, dtype: torch.dtype, kv_cache_dtype: str, **sizes: int) -> None:
    """Where values are rounded so coarsely that a difference in the last place can move them, or choose another expert:
    most of the session's logits are as near to fp32's as those of one process are."""
    model = DeepseekModel.from_pretrained(CHECKPOINT, dtype=dtype, mesh=mesh_of(**sizes))
    exact, one = torch.load(references / "session"), torch.load(references / kv_cache_dtype)
    logits = session(model, kv_cache_dtype)

    def error(found: dict) -> float:
        errors = ((found[key].float() - exact[key]).abs().max() / exact[key].abs().max() for key in logits)
        return statistics.median(error.item() for error in errors)

    assert len(logits) > 30 and error(logits) <= 1.3 * error(one) < 0.1, (error(logits), error(one))


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
    """Of a checkpoint as we write it, one as transformers 5 does, and one in fp8, also in another dtype: other ranks'
    experts are not read, the weights are those of a whole model that is divided, and nothing larger is kept."""
    for name, dtype in (("ours", None), ("fused", None), ("quantised", None), ("ours", torch.float16)):
        checkpoint = directory / name
        read, original = [], hf._Checkpoint.read
        hf._Checkpoint.read = lambda self, name, read=read, original=original: read.append(name) or original(self, name)
        try:
            model = DeepseekModel.from_pretrained(checkpoint, dtype=dtype, mesh=mesh_of(**sizes))
        finally:
            hf._Checkpoint.read = original
        part, parts = model.parallel.layout.part(("dp", "ep"))
        if checkpoint.name == "ours":
            experts = {int(key.split(".experts.")[1].split(".")[0]) for key in read if ".experts." in key}
            assert experts == set(range(part * 16 // parts, (part + 1) * 16 // parts))
        whole = DeepseekModel.from_pretrained(directory / ("ours" if name == "fused" else name), dtype=dtype)
        total = sum(weight.nbytes for weight in whole.parameters())
        divided = parallelize(whole, mesh_of(**sizes)).state_dict()
        assert all(torch.equal(weight, divided[key]) for key, weight in model.state_dict().items())
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
    with pytest.raises(RuntimeError, match=r"cache_seqlens: expected the same values .* got others on rank 1 than on"):
        model.decode(kv_caches=cache, **wrong)
    other.decode(kv_caches=cache, **wrong)  # other rows: any values
    ids, table, [layer] = step["input_ids"], step["block_table"], cache
    for changed, message in (
        ({"input_ids": ids[: 3 - rank]}, r"torch.int64 \[3, 1\] on rank 0 and torch.int64 \[2, 1\] on rank 1"),
        (
            {"block_table": table.to((torch.int32, torch.int64)[rank])},
            r"torch.int32 \[3, 2\] on rank 0 and torch.int64",
        ),
        ({"kv_caches": [layer.to((torch.float32, torch.bfloat16)[rank])]}, r"torch.float32 pages of \[16, 1, 80\] on"),
        (
            {"kv_caches": [layer[:, : 16 - 8 * rank]]},
            r".* pages of \[16, 1, 80\] on rank 0 and .*\[8, 1, 80\]",
        ),
        ({"kv_caches": [layer] * (1 + rank)}, "none on rank 0"),
    ):
        expected = rf"{next(iter(changed))}.*: expected one dtype and shape on all ranks, got {message}"
        with pytest.raises(RuntimeError, match=expected):
            other.decode(**{"kv_caches": cache, **step, **changed})
    fewer = {"kv_caches": [layer[: NUM_PAGES - rank]]}
    with pytest.raises(RuntimeError, match=r"kv_caches\[0\]: expected the same number of pages on ranks"):
        model.decode(**step, **fewer)
    other.decode(**step, **fewer)  # its own pages


def compares_ranks_of_the_same_rows() -> None:
    """Also where there is no numpy."""
    parallel.DEBUG = True
    torch.Tensor.numpy = None
    for sizes in ({"dp": 2, "tp": 2}, {"tp": 2, "cp": 2}):
        model = parallelize(build(config(num_layers=1)), mesh_of(**sizes))
        caches, step = new_caches(model.config), step_of(2, 2, 1)
        model.decode(kv_caches=caches, **step)
        wrong = step | {"block_table": step["block_table"] + (dist.get_rank() == 3)}
        first = 2 if "dp" in sizes else 0
        with pytest.raises(RuntimeError, match=f"block_table: .* got others on rank 3 than on rank {first}"):
            model.decode(kv_caches=caches, **wrong)
    parallel.DEBUG = False
    del torch.Tensor.numpy  # what it inherits is there again


def makes_caches() -> None:
    """A cache is of the model's dtype and dimensions where nothing else is asked for."""
    model = parallelize(build(config(num_layers=1), torch.float16), mesh_of(cp=2))
    wide = 4 * 64  # head_dim's 80 is 64 + 16
    for options, dtype, last_dim in (
        ({}, torch.float16, 80),
        ({"kv_cache_dtype": None, "device": None}, torch.float16, 80),
        ({"dtype": torch.float32}, torch.float32, 80),
        ({"head_dim": wide}, torch.float16, wide),
        ({"kv_cache_dtype": "fp8"}, torch.uint8, 112),
        ({"kv_cache_dtype": "fp8_tensor"}, torch.uint8, 80),
    ):
        [layer] = new_cache(model, 16, 4, 8, **options).layers
        assert (layer.dtype, list(layer.shape)) == (dtype, [8, 64, 1, last_dim]), options


def pickles(**sizes: int) -> None:
    """A part that went through a file is the same part."""
    model = parallelize(build(config(num_layers=2)), mesh_of(**sizes))
    again = pickle.loads(pickle.dumps(model))
    step, caches = step_of(3, 2, 1), new_caches(model.config)
    copies = [cache.clone() for cache in caches]
    assert torch.equal(again.decode(kv_caches=copies, **step), model.decode(kv_caches=caches, **step))


# -------------------------------------------------------------------------------------------------------- the ranks


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    """What one process computes, in files, and checkpoints."""
    safetensors_torch = pytest.importorskip("safetensors.torch", reason="checkpoints: pip install safetensors")
    directory = tmp_path_factory.mktemp("references")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sizes are small, and machines of tests busy
    model = DeepseekModel.from_pretrained(CHECKPOINT, dtype=torch.float32)
    torch.save(session(model), directory / "session")
    for kind in ("fp8", "fp8_tensor"):
        torch.save(session(model, kind), directory / kind)
    torch.save(session(copy.deepcopy(model).half(), "float16"), directory / "float16")
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
    weights = [name for name in tensors if name.endswith("_proj.weight")]
    quantised = {name: tensors[name].to(torch.float8_e4m3fn) for name in weights}
    quantised |= {f"{name}_scale_inv": torch.rand(*(-(-n // 16) for n in tensors[name].shape)) for name in weights}
    (directory / "quantised").mkdir()
    safetensors_torch.save_file(tensors | quantised, directory / "quantised" / "model.safetensors")
    method = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (directory / "quantised" / "config.json").write_text(json.dumps(settings | method))
    (directory / "odd").mkdir()
    odd = settings | {"num_attention_heads": 3, "n_routed_experts": 9, "n_group": 1, "topk_group": 1}
    (directory / "odd" / "config.json").write_text(json.dumps(odd))
    torch.set_num_threads(threads)
    return directory


def checks_of(n: int, references: Path) -> dict:
    at = references.joinpath
    if n == 2:
        return {
            "tp": partial(serves, at("session"), tp=2),
            "ep": partial(serves, at("session"), ep=2),
            "cp": partial(serves, at("session"), cp=2),
            "dp": partial(serves, at("session"), dp=2),
            "cp, fp8": partial(nearly_serves, references, torch.float32, "fp8", cp=2),
            "tp, fp8": partial(nearly_serves, references, torch.float32, "fp8", tp=2),
            "cp, fp8_tensor": partial(nearly_serves, references, torch.float32, "fp8_tensor", cp=2),
            "tp, fp16": partial(nearly_serves, references, torch.float16, "float16", tp=2),
            "tp, bits": partial(writes_as_well, at("bits"), tp=2),
            "ep, bits": partial(writes_as_well, at("bits"), ep=2),
            "cp, bits": partial(writes_as_well, at("bits"), cp=2),
            "tp, part read": partial(reads_its_part_only, references, tp=2),
            "ep, part read": partial(reads_its_part_only, references, ep=2),
            "meshes refused": partial(refuses_meshes, at("odd")),
            "tensors compared": compares_ranks_tensors,
            "caches": makes_caches,
            "pickled": partial(pickles, tp=2),
            "ep, compiled": partial(compiles, "aot_eager", 1, ep=2),
            "cp, compiled": partial(compiles, "aot_eager", 2, cp=2),
            "tp, compiled": partial(compiles, "inductor", 1, tp=2),
        }
    return {
        "dp + ep": partial(serves, at("session"), dp=2, ep=2),
        "tp + cp": partial(serves, at("session"), tp=2, cp=2),
        "cp of 4": partial(serves, at("session"), cp=4),
        "dp + ep, bits": partial(writes_as_well, at("bits"), dp=2, ep=2),
        "tensors compared": compares_ranks_of_the_same_rows,
        "tp + cp, pickled": partial(pickles, tp=2, cp=2),
        "tp + cp, bits": partial(writes_as_well, at("bits"), tp=2, cp=2),
        "tp + cp, part read": partial(reads_its_part_only, references, tp=2, cp=2),
        "dp + ep, compiled": partial(compiles, "aot_eager", 1, dp=2, ep=2),
        "tp + cp, compiled": partial(compiles, "aot_eager", 2, tp=2, cp=2),
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


# ----------------------------------------------------------------------------------------------------------- faults


SERVE = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, sys.argv[1])
from ranks import mesh_of
from test_compile_model import build, config, new_caches, step_of
from flashmla_ops.parallel import parallelize

@record
def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    model = parallelize(build(config(num_layers=2)), mesh_of(dp=2))
    cache, step = new_caches(model.config), step_of(2, 2, 1)
    for i in range(10**6):
        if i == 2 and dist.get_rank() == 1:
            if sys.argv[2] == "raises":
                raise ValueError("a bad day")
            os.kill(os.getpid(), signal.SIGKILL)
        model.decode(kv_caches=cache, **step)

main()
"""


def torchrun(n: int, *command) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.run([*start, *map(str, command)], env=env, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_one_rank_fails(how, tmp_path):
    """torchrun ends the other, which waits for it, before the time-out of its collective, and names the one that failed
    (and the other, if that saw the connection break first)."""
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    done = torchrun(2, script, Path(__file__).parent, how)
    assert done.returncode != 0
    report = done.stderr.split("ChildFailedError:")[1]
    cause = "ValueError: a bad day" if how == "raises" else r"Signal 9 \(SIGKILL\)"
    assert re.search(rf"rank\s*: 1 .*{cause}", report, re.DOTALL), done.stderr


def test_generate_distributed():
    pytest.importorskip("safetensors", reason="the committed model: pip install safetensors")
    script = ROOT / "examples" / "generate_distributed.py"
    done = torchrun(4, script, "--tp", 2, "--ep", 2, "--mode", "eager", "--max-new-tokens", 24)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert '    """Return the lines of a file.' in done.stdout
    assert re.search(r"^eager .* yes: \d+ of \d+ rows", done.stdout, re.MULTILINE)


# --------------------------------------------------------------------------------------------- what needs no processes

meshes = st.dictionaries(st.sampled_from(DIMENSIONS), st.integers(1, 3), min_size=1)


def all_ranks(sizes: dict[str, int]):
    """The layouts of all ranks."""
    for index in range(math.prod(sizes.values())):
        at = {}
        for dim, size in reversed(sizes.items()):
            index, at[dim] = divmod(index, size)
        yield Layout(sizes, at)


@given(sizes=meshes, dims=st.sets(st.sampled_from(DIMENSIONS)))
def test_parts_are_dealt_evenly(sizes, dims):
    parts = [layout.part(tuple(dims)) for layout in all_ranks(sizes)]
    count = math.prod(size for dim, size in sizes.items() if dim in dims)
    assert {n for _, n in parts} == {count}
    indices = [index for index, _ in parts]
    assert all(indices.count(index) == len(parts) // count for index in range(count))


@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    count=st.integers(1, 5),
    page=st.sampled_from([1, 16]),
)
def test_shares_deal_each_token_once(lengths, count, page):
    """Each token has a slot on one rank, and there the slots of a row's first n tokens are its first `lengths(n)`."""
    columns = -(-max(lengths) // (page * count)) + 1
    table = torch.arange(len(lengths) * columns, dtype=torch.int32).view(len(lengths), columns)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    positions = torch.arange(200).expand(len(lengths), -1)
    positions = torch.where(positions < seqlens[:, None], positions, -1)
    held = torch.zeros_like(positions)
    for index in range(count):
        share = Share(index, count)
        slots, local = slots_of(table, positions, page, share), share.lengths(seqlens, page)
        assert local.dtype == torch.int32
        held += slots >= 0
        for row, n in enumerate(local.tolist()):
            mine = slots[row][slots[row] >= 0].tolist()
            assert mine == list(range(row * columns * page, row * columns * page + n))
    assert torch.equal(held, (positions >= 0).long())


def test_ranks_run_out_of_pages_together():
    """Whatever the lengths, tables and free pages are equal, and only slots tell ranks apart."""
    caches = [
        PagedKVCache(1, 6, 3, 4, head_dim=32, page_size=16, share=Share(index, 3), max_new_tokens=2)
        for index in range(3)
    ]
    for cache in caches:
        cache.allocate(1)
        cache.allocate(100)
        cache.extend(2)
        with pytest.raises(RuntimeError, match="out of pages: 3 needed, 2 free"):
            cache.allocate(97)
        with pytest.raises(RuntimeError, match="expected at most 192 tokens"):
            cache.allocate(193)
    assert all(torch.equal(cache.block_table, caches[0].block_table) for cache in caches)
    assert all(torch.equal(cache.cache_seqlens, caches[0].cache_seqlens) for cache in caches)
    slots = torch.stack([cache.slot_mapping for cache in caches])
    assert torch.equal((slots >= 0).sum(0), torch.tensor([1, 1, 1, 1, 0, 0]))


@given(n=st.integers(1, 5), seed=st.integers(0, 1000))
def test_merging_shares(n, seed):
    """One rounding from float64, and for two what merge_attn_states does; shares without keys hold NaN."""
    cases = [make_merge_case(2, 3, 4, 32, dtype=torch.float32, seed=seed + i) for i in range(n)]
    outs, lses = torch.stack([c.out_a for c in cases]), torch.stack([c.lse_a for c in cases])
    weights = lses.double().where(lses.isfinite(), -torch.inf)
    weights = (weights - weights.logsumexp(0)).exp().nan_to_num().transpose(2, 3)[..., None]
    exact = (outs.double() * weights).where(weights > 0, 0).sum(0)
    for dtype in (torch.float32, torch.bfloat16):
        merged = merge_shares(outs, lses, dtype)
        assert merged.dtype == dtype
        assert relative_error(merged, exact, -1) <= torch.finfo(dtype).eps / 2 + 1e-5
    lses[0, 1, 2, 0] = torch.nan  # of one query and head
    merged = merge_shares(outs, lses, torch.float32)
    assert merged[1, 0, 2].isnan().all() and merged.isnan().sum() == 32
    lses[0, 1, 2, 0] = 0.0
    outs.nan_to_num_()
    if n == 2:
        pair = merge_attn_states(outs[0], lses[0], outs[1], lses[1])[0]
        torch.testing.assert_close(merge_shares(outs, lses, torch.float32), pair, rtol=1e-5, atol=1e-6)


def shares_of(case, count: int) -> list[tuple]:
    """The case's cache and tables as `count` ranks hold them, whose pages lie where the whole's do."""
    width = -(-case.block_table.shape[1] // count)
    padded = F.pad(case.block_table, (0, width * count - case.block_table.shape[1]), value=0)
    page_size = case.kv_cache.shape[1]
    shares = [Share(index, count) for index in range(count)]
    return [
        (case.kv_cache, padded[:, s.index :: count].contiguous(), s.lengths(case.cache_seqlens, page_size))
        for s in shares
    ]


def attend(q, cached: tuple, case):
    plan = get_mla_metadata(cached[2], q.shape[1] * q.shape[2], 1)
    return fwd_kvcache_mla(q, *cached, case.head_dim_v, case.softmax_scale, False, *plan)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_shares_in_turn(target, count):
    """What ranks of cp would find, one after the other on one device, is attention to the whole: within what
    PyTorch's error in the same dtype allows. Some rows are shorter than count pages, one is empty."""
    dtype = target.dtypes[0]
    case = make_decode_case([1000, 1, 0, 70, 512], h_q=16, dtype=dtype, device=target.device)
    outs, lses = zip(*(attend(case.q, cached, case) for cached in shares_of(case, count)), strict=True)
    merged = merge_shares(torch.stack(outs), torch.stack(lses), dtype)
    exact = attention(case)[0]
    # parts are rounded once, and their mean once more
    assert relative_error(merged, exact) <= 2 * relative_error(exact.to(dtype), exact) + relative_error(
        outs[0] if count == 1 else attend(case.q, (case.kv_cache, case.block_table, case.cache_seqlens), case)[0], exact
    )
    assert not merged[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("sizes", [{"ep": 4}, {"dp": 2, "tp": 2}, {"cp": 2, "ep": 2}], ids=str)
def test_experts_of_all_ranks_add_up(dtype, tokens, sizes):
    """By each of MoE's ways: experts that are elsewhere add nothing, not even NaN where no product writes."""
    whole = build(config(num_layers=2), dtype)
    x = torch.randn(tokens, 64, dtype=dtype)
    moe = whole.layers[1].ffn
    routing = moe.gate(x)
    expected = moe(x, routing).float() - moe.shared_experts(x).float()
    summed = 0
    for layout in all_ranks(sizes):
        part = build(config(num_layers=2), dtype)
        parallel._divide(part, Parallel(layout, None, None, None))
        ffn: MoE = part.layers[1].ffn
        ffn.shared_experts = None
        summed = summed + ffn(x, routing).float()
    torch.testing.assert_close(
        summed, expected, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-5 if dtype == torch.float32 else 0.05
    )


# ----------------------------------------------------------------------------------------------------------- planning


def v3() -> MLAConfig:
    return hf.config_from_hf(json.loads(V3.read_text()))


planned = functools.cache(lambda sizes: plan(v3(), dict(sizes)))


MESHES = [{"tp": 8}, {"dp": 16}, {"tp": 8, "cp": 2}]


def test_the_readme_has_the_plans():
    readme = (ROOT / "README.md").read_text()
    for sizes in MESHES:
        of_rank = planned(tuple(sizes.items()))
        tokens = of_rank.capacity(int(141e9)) * sizes.get("dp", 1) * sizes.get("cp", 1) / 1e6
        room = f"{tokens:.2f} million" if tokens > 0 else "does not fit"
        mesh = ",".join(f"{dim}={n}" for dim, n in sizes.items())
        weights, sent = sum(of_rank.weights.values()) / 1e9, sum(of_rank.sent.values()) / 1e6
        assert f"| {mesh} | {weights:.1f} | {room} | {sent:.1f} |" in readme


def test_the_readmes_code_runs(monkeypatch):
    """In one process, as torchrun starts it."""
    pytest.importorskip("safetensors", reason="the committed model: pip install safetensors")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        started = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free.getsockname()[1]),
            "RANK": "0",
            "WORLD_SIZE": "1",
        }
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    section = (ROOT / "README.md").read_text().split("## More than one GPU\n")[1]
    names = {}
    try:
        exec(
            section.split("```python\n")[1].split("```")[0].replace("examples/data", str(ROOT / "examples/data")), names
        )
        assert names["cache"].share == (0, 1) and len(names["cache"].layers[0]) == 64
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_plan_adds_up_to_the_model(sizes):
    """DeepSeek-V3's weights on all ranks are the tensors of the whole model, each as often as the mesh copies it."""
    model = DeepseekModel(v3(), device="meta", dtype=torch.bfloat16)
    whole = sum(weight.nbytes for weight in model.parameters())
    assert sum(weight.numel() for weight in model.parameters()) == 671_026_419_200  # arXiv 2412.19437: 671B
    of_rank, ranks = planned(tuple(sizes.items())), math.prod(sizes.values())

    def of(*parts: str) -> int:
        return sum(w.nbytes for name, w in model.named_parameters() if any(part in name for part in parts))

    heads = math.prod(sizes.get(dim, 1) for dim in ("tp", "ep", "cp"))
    divided = of("attn.wq_b", "attn.wkv_b", "attn.wo", "shared_experts", "head.") + of("ffn.gate_up.", "ffn.down.")
    experts = sum(weight.nbytes for weight in model.parameters() if weight.dim() == 3)
    copied = whole - divided - experts
    assert sum(of_rank.weights.values()) == divided // heads + experts // ranks + copied
    assert of_rank.token == 61 * 576 * 2
    assert 0 < of_rank.activations < 1e9


def test_a_plan_counts_what_is_sent():
    """Two sums a layer over tp, each of a ring's 2 (n - 1) / n times its tokens; with dp, tokens and their sums."""
    config = replace(v3(), num_hidden_layers=5)  # of which two have experts
    tp, dp, cp = (plan(config, sizes, batch=128).sent for sizes in ({"tp": 8}, {"dp": 8}, {"cp": 8}))
    assert tp["all_reduce"] == 5 * 2 * 128 * 7168 * 2 * 2 * 7 // 8
    assert tp["all_gather"] == 7 * 128 * 129280 // 8 * 2  # logits
    tokens = 128 // 8 * 7  # that go to other ranks
    assert dp == {"all_gather": 2 * tokens * (7168 * 2 + 16 * 4), "reduce_scatter": 2 * tokens * 7168 * 2}
    assert cp["all_to_all_single"] == 5 * 128 * 128 * (512 * 2 + 4) * 7 // 8
    assert cp["all_gather"] == 7 * (5 * 128 * 128 // 8 * 576 * 2) + tp["all_gather"]  # queries


def command(*arguments: str, config: Path = V3) -> tuple[int, list[str]]:
    """The command's exit status and what it printed."""
    start = [sys.executable, "-m", "flashmla_ops.parallel", "--plan", str(config), *arguments]
    done = subprocess.run(start, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_the_command_says_by_how_much_a_model_does_not_fit():
    status, lines = command("--mesh", "tp=8", "--memory-gb", "80")
    assert status == 1
    assert lines[-1] == "does not fit: 171.47 GB are needed on each rank, 91.47 GB more than 80.00"


def test_the_command_says_what_fits(capsys):
    assert parallel.main(["--plan", str(V3), *["--mesh", "dp=16", "--memory-gb", "141", "--context", "8192"]]) == 0
    printed = capsys.readouterr().out
    assert "128 rows of 8192 tokens, 70272 bytes each" in printed and "fits: 120.85 of 141.00 GB" in printed


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--mesh", "tp=2,tp=4", "expected sizes of .*, each at most once, such as dp=2,tp=4, got tp=2,tp=4"),
        ("--mesh", "pp=2", "expected sizes of .* got pp=2"),
        ("--mesh", "tp=0", "expected sizes of .* got tp=0"),
        ("--mesh", "tp", "expected sizes of .* got tp"),
        ("--batch", "0", "expected a whole number from 1 to 2147483647, got 0"),
        ("--batch", "9" * 5000, "expected a whole number from 1 to 2147483647, got 9+"),
        ("--batch", "2147483648", "expected a whole number from 1 to 2147483647, got 2147483648"),
        ("--tokens", "-1", "expected a whole number from 1 to 2147483647, got -1"),
        ("--context", "many", "expected a whole number from 1 to 2147483647, got many"),
        ("--memory-gb", "0", "expected a number above 0, 2147483647 at most, got 0"),
        ("--memory-gb", "-80", "expected a number above 0, .* got -80"),
        ("--memory-gb", "nan", "expected a number above 0, .* got nan"),
        ("--memory-gb", "1e300", "expected a number above 0, .* got 1e300"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(option, value, message, capsys):
    options = {"--plan": str(V3), "--mesh": "tp=8", "--memory-gb": "80", option: value}
    with pytest.raises(SystemExit) as end:
        parallel.main([f"{name}={given}" for name, given in options.items()])
    assert end.value.code == 2
    assert re.search(f"argument {option}: {message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "config.json: expected JSON, got JSONDecodeError"),
        ("[]", "config.json: expected an object, got list"),
        ("{}", "config.json: model_type: expected one of"),
        ('{"model_type": "deepseek_v3"}', "config.json: vocab_size: expected a value, got none"),
        (None, "config.json: expected JSON, got FileNotFoundError: .*No such file"),
    ],
)
def test_the_command_refuses_a_config_that_is_none(content, message, tmp_path, capsys):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    assert parallel.main(["--plan", str(file), "--mesh", "tp=8", "--memory-gb", "80"]) == 1
    assert re.fullmatch(f"{tmp_path}/{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, got 0"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers: expected at most 1000, got 2147483647"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: expected 1 to 128, got 0"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok: expected 1 to 128, got 129"),
        ({"hidden_size": 2**31 - 1}, ".*"),  # what torch says of it
        ({"rope_scaling": {"type": "yarn", "factor": 10**400}}, "rope_scaling factor: expected a number from 1e-06 to"),
    ],
)
def test_the_command_says_in_a_line_what_is_wrong_with_a_config(setting, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(V3.read_text()) | {"num_hidden_layers": 4} | setting))
    status, lines = command("--mesh", "tp=8", "--memory-gb", "80", config=file)
    assert status == 1 and len(lines) == 1 and re.search(message, lines[0])


def test_a_plan_needs_rows_and_ranks():
    for options, message in (({"batch": 0}, "batch: expected at least 1"), ({"s_q": 0}, "s_q: expected at least 1")):
        with pytest.raises(RuntimeError, match=message):
            plan(v3(), {"tp": 8}, **options)
    with pytest.raises(RuntimeError, match="mesh: expected tp to have at least 1 rank, got 0"):
        plan(v3(), {"tp": 0})


def test_the_command_refuses_a_mesh_that_does_not_divide(capsys):
    assert parallel.main(["--plan", str(V3), "--mesh", "dp=3", "--memory-gb", "80"]) == 1
    assert capsys.readouterr().err.strip() == "mesh: expected dp 3 = 3 to divide n_routed_experts = 256"


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def needs_sm90():
    if (status := backends.ALL["sm90"].status()) != "ready":
        pytest.skip(f"sm90: {status}")


def captures(s_q: int) -> None:
    """On a mesh of one process every collective is called. A captured step replays what eager steps compute, bit for
    bit, while lengths and tables change in place, and what the model computes that was never divided."""
    dims = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 16}
    whole = build(replace(config(num_layers=3), **dims), torch.bfloat16).cuda()
    model = parallelize(copy.deepcopy(whole), init_device_mesh("cuda", (1, 1, 1, 1), mesh_dim_names=DIMENSIONS))
    caches = [new_cache(model, 40, 5, 8, max_new_tokens=s_q) for _ in range(3)]
    ids = torch.zeros(5, s_q, dtype=torch.long, device="cuda")

    def step(model, cache, **options):
        return model.decode(ids, cache.layers, cache.block_table, cache.cache_seqlens, **options)

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step(model, caches[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(model, caches[0])
        for i in range(24):
            ids.random_(96)
            for cache in caches:
                if i in (0, 5, 9):
                    cache.allocate(0)
                if i == 16:
                    cache.free(1)
                cache.extend(s_q)
            graph.replay()
            eager, routing = step(model, caches[1], return_routing=True)
            expected = step(whole, caches[2], experts=routing.experts)
            assert torch.equal(captured, eager)
            live = caches[0].rows
            error = (eager[live] - expected[live]).abs().amax(-1) / expected[live].abs().amax(-1)
            assert error.max() < 5e-2  # as modes of examples/generate.py in bf16
    graph.reset()  # NCCL waits for the end of graphs that hold its calls
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_nccl_in_a_cuda_graph(needs_sm90):
    checks = {f"{s_q} tokens a row": partial(captures, s_q) for s_q in (1, 3)}
    found = run_checks(1, checks, str(Path(__file__).parent), "nccl", 120)
    assert not any(found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("b", [1, 4])
def test_shares_of_a_long_context(needs_sm90, b, capsys):
    """Eight ranks' shares of b rows of 131072 tokens, in turn on one GPU: merged they are the whole."""
    flush = ColdL2()
    case = make_decode_case([131072] * b, h_q=128, device="cuda", poison=False)
    shares = shares_of(case, 8)
    whole = (case.kv_cache, case.block_table, case.cache_seqlens)

    def call(cached):
        plan = get_mla_metadata(cached[2], 128, 1)
        how = case.head_dim_v, case.softmax_scale, False
        return lambda: fwd_kvcache_mla(case.q, *cached, *how, *plan)

    calls = Replay([call(cached) for cached in shares]), Replay([call(whole)])
    share_us, whole_us = median_us(calls, flush)
    outs, lses = (torch.stack(parts) for parts in zip(*calls[0].outputs, strict=True))
    [(expected, _)] = calls[1].outputs
    assert relative_error(merge_shares(outs, lses, torch.bfloat16), expected) < 4e-3
    merge_us = median_us([Replay([lambda: (merge_shares(outs, lses, torch.bfloat16),)])], flush)[0]
    with capsys.disabled():
        print(
            f"\n{b} x 131072, 128 heads: whole {whole_us:.1f} us, a share of 1/8 {share_us:.1f} us "
            f"({share_us / whole_us:.2f} x), merging 8 of them eagerly {merge_us:.1f} us"
        )
    # 0.29 x for one row on an H100 (24 of 82.8 us): an eighth of its keys, and what a call takes however few there are
    assert share_us < 0.35 * whole_us
