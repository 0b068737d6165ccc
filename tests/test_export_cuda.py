"""A model exported on the GPU: saved, and run in a fresh process; packaged by AOTInductor."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_compile_model import build, config
from torch import nn
from torch.export import Dim

from flashmla_ops import PagedKVCache, backends

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent
DEVICE = "cuda"


class DecodeStep(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, kv_caches, block_table, cache_seqlens):
        return self.model.decode(input_ids, kv_caches, block_table, cache_seqlens)


def inputs(layers: int, lengths: list[int], max_pages: int) -> tuple:
    cache = PagedKVCache(layers, 32, len(lengths), max_pages, head_dim=576, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for layer in cache.layers:
        layer.normal_(generator=generator)
    for length in lengths:
        cache.allocate(length)
    cache.extend(1)
    input_ids = torch.arange(len(lengths), device=DEVICE)[:, None]
    return input_ids, cache.layers, cache.block_table, cache.cache_seqlens


def export_step(**settings):
    """The step of a small model in bf16, for any batch and table width, and calls of it with eager's results."""
    if (status := backends.ALL["sm90"].status()) != "ready":
        pytest.skip(f"sm90: {status}")
    torch.manual_seed(0)
    real_latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 16}
    model = build(replace(config(), **real_latent, **settings), torch.bfloat16).to(DEVICE)
    layers = model.config.num_hidden_layers
    batch, width = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    dynamic = {"input_ids": batch, "kv_caches": [{} for _ in range(layers)]}
    dynamic |= {"block_table": width, "cache_seqlens": batch}
    with torch.no_grad():
        program = torch.export.export(DecodeStep(model), inputs(layers, [5, 64, 100], 4), dynamic_shapes=dynamic)
        calls = [inputs(layers, lengths, width) for lengths, width in (([70, 3], 3), ([1, 200, 64, 0, 90], 5))]
        copies = [[t.clone() if isinstance(t, torch.Tensor) else [x.clone() for x in t] for t in c] for c in calls]
        expected = [model.decode(*call) for call in copies]
    return program, calls, expected


def run_in_a_fresh_process(code: str, *arguments) -> subprocess.CompletedProcess:
    head = f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); import flashmla_ops; torch.set_grad_enabled(False)\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    # Inductor compiles a C++ program for each of the CPU's vector extensions to see whether it may use it: minutes, for
    # code that runs on the GPU
    environment = {**os.environ, "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


LOAD = {
    "export": "step = torch.export.load(sys.argv[1]).module()",
    "package": "step = torch._inductor.aoti_load_package(sys.argv[1])",
}
RUN = "\ntorch.save([step(*call) for call in torch.load(sys.argv[2])], sys.argv[3])"


def check(kind: str, saved: Path, calls, expected, tolerance: float, tmp_path: Path) -> None:
    torch.save(calls, tmp_path / "calls.pt")
    done = run_in_a_fresh_process(LOAD[kind] + RUN, saved, tmp_path / "calls.pt", tmp_path / "logits.pt")
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    for logits, wanted in zip(torch.load(tmp_path / "logits.pt"), expected, strict=True):
        assert (logits - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_a_saved_export_runs_in_a_fresh_process(tmp_path):
    program, calls, expected = export_step()
    torch.export.save(program, tmp_path / "step.pt2")
    check("export", tmp_path / "step.pt2", calls, expected, 0.0, tmp_path)


PACKAGE = """
torch._inductor.aoti_compile_and_package(
    torch.export.load(sys.argv[1]),
    package_path=sys.argv[2],
    inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
)
"""
PACKAGE_WITHOUT_OPS = """
program = torch.export.export(torch.nn.Linear(4, 4, device="cuda"), (torch.zeros(2, 4, device="cuda"),))
path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
torch._inductor.aoti_load_package(path)(torch.zeros(2, 4, device="cuda"))
"""
PACKAGE_WITH_AN_OP = """
library = torch.library.Library("probe", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
torch.library.register_fake("probe::twice", lambda x: torch.empty_like(x), lib=library)
class Twice(torch.nn.Module):
    def forward(self, x):
        return torch.ops.probe.twice(x) + 1
program = torch.export.export(Twice(), (torch.zeros(2, 4, device="cuda"),))
path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
torch._inductor.aoti_load_package(path)(torch.zeros(2, 4, device="cuda"))
"""


def test_an_aotinductor_package_runs_in_a_fresh_process(tmp_path):
    """It compiles everywhere; it is loaded where this torch loads any package with a Python-implemented op.

    One layer compiles in less time than four. It is dense: torch 2.11's AOTInductor writes C++ that does not compile
    for MoE's grouped_mm on CUDA.
    """
    program, calls, expected = export_step(num_hidden_layers=1, first_k_dense_replace=1)
    torch.export.save(program, tmp_path / "exported.pt2")
    package = tmp_path / "step.pt2"
    done = run_in_a_fresh_process(PACKAGE, tmp_path / "exported.pt2", package)
    assert done.returncode == 0, done.stderr[-2000:]
    try:
        check("package", package, calls, expected, 5e-2, tmp_path)  # Inductor rounds at other places than eager
    except AssertionError as failure:
        probes = {"no custom op": PACKAGE_WITHOUT_OPS, "a custom op": PACKAGE_WITH_AN_OP}
        for what, code in probes.items():
            done = run_in_a_fresh_process(code, tmp_path / "probe.pt2")
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                reason = f"torch {torch.__version__} fails on a package of {what} too ({done.returncode}): {last}"
                pytest.skip(f"{reason}. Ours: {failure}")
        raise
