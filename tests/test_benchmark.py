"""The benchmark's registry, arithmetic, tables and plots, on made-up measurements; its layer's parts, on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from flashmla_ops import benchmark, benchmark_cuda, benchmark_layer, benchmark_sweep, benchmark_tune, fwd_kvcache_mla
from flashmla_ops.modules import MLAConfig
from flashmla_ops.testing import check_decode, expected, make_decode_case, quantized

CEILINGS = {
    "matrix_tflops": 700.0,
    "read_gbs": 3000.0,
    "copy_gbs": 2500.0,
    "launch_us": 1.0,
    "stream_128_pages_us": 5.5,
    "stream_16384_pages_us": 393.0,
}


def decode_row(case: str = "fwd_kvcache_mla b1 h16 s1 k1024 bfloat16", **changes) -> dict:
    row = {"case": case, "group": "small batch", "us": 10.0, "stream_us": 5.0, "flops": 10**9, "bytes": 10**7}
    return row | {"peer_us": 20.0, "peer_wrong": None, "error": 2e-3, "host_us": 9.0, "matmul_tflops": 690.0} | changes


def fp8_row(case: str = "fwd_kvcache_mla b128 h128 s1 k8192 fp8_tensor", **changes) -> dict:
    row = decode_row(case, group="fp8", bf16_us=16.0, limit=None, peer_limit=1.05, peer_error=2e-2)
    return row | changes


def layer_row(**changes) -> dict:
    names = ("norm", "wo", "plan", "attention", "rope")
    parts = [{"part": name, "us": 4.0 + i, "flops": 0, "bytes": 10**6} for i, name in enumerate(names)]
    parts[1]["bytes"], parts[3]["stream_us"] = 15 * 10**6, 6.5  # 5 us of reading
    row = {"case": "layer step b1 h16 k4096 bfloat16", "group": "layer", "us": 20.0, "eager_us": 25.0, "limit": 2.0}
    row |= {"compiled_us": 20.0, "compile_failed": None, "parts": parts, "flops": 0, "bytes": 19 * 10**6}
    return row | {"error": 1e-2, "host_us": 300.0, "matmul_tflops": 690.0} | changes


# ------------------------------------------------------------------------------------------------------------ registry


def test_names_are_unique():
    shapes = [shape.name for shape in benchmark_cuda._shapes()]
    names = [*shapes, *benchmark_cuda.OPS, *benchmark_layer.LAYER]
    assert len(set(names)) == len(names) and names == benchmark_cuda.NAMES
    sweeps = [sweep.name for sweep in benchmark_sweep.SWEEPS]
    assert len(set(sweeps)) == len(sweeps)


def test_groups():
    sizes = Counter(shape.group for shape in benchmark_cuda.DECODE.values())
    assert sizes == {
        "b128 h128 s1": 4,
        "h128 s>1": 4,
        "h16/32/64": 7,
        "small batch": 12,
        "other": 5,
        "fp8": 12,
        "triton": 5,
        "batch invariant": 32,
    }
    for shape in benchmark_cuda.DECODE.values():
        if shape.group in ("triton", "batch invariant"):
            continue
        if shape.kv_format:
            assert shape.group == "fp8" and shape.dtype is torch.bfloat16 and shape.varied == (shape.b == 128)
            assert shape.kv_format == "fp8_tensor" or not shape.e4m3_queries
            continue
        in_group = {
            "b128 h128 s1": (shape.b, shape.h_q, shape.s_q) == (128, 128, 1) and shape.varied,
            "h128 s>1": shape.h_q == 128 and shape.s_q > 1,
            "h16/32/64": shape.h_q in (16, 32, 64) and shape.b >= 64 and shape.varied,
            "small batch": shape.b <= 64 and not shape.varied and shape.s_k <= 65536,
            "other": shape.s_k == 131072 or shape.h_q in (8, 12, 20),
        }
        assert [group for group, fits in in_group.items() if fits] == [shape.group], shape


def test_fp8_limits():
    """Issue D, Shows 3; the other fp8 rows are FlashMLA's in kernels.md, which takes queries in e4m3."""
    blocks, one_scale, e4m3_queries = {}, {}, {}
    for shape in benchmark_cuda.DECODE.values():
        h100, h200 = (shape.limits(f"NVIDIA {card}") for card in ("H100 80GB HBM3", "H200"))
        assert h100["peer_limit"] == h200["peer_limit"]
        if shape.kv_format == "fp8":
            blocks[shape.b, shape.h_q, shape.s_k] = h100["limit"], h200["limit"], h100["peer_limit"]
        elif shape.kv_format:
            rows = e4m3_queries if shape.e4m3_queries else one_scale
            rows[shape.b, shape.h_q, shape.s_k] = h100["limit"], h200["limit"], h100["peer_limit"]
        elif shape.group != "triton":
            assert set(h100.values()) == {None}
    assert blocks == {
        (128, 16, 8192): (0.66, 0.66, None),
        (128, 64, 8192): (0.72, 0.85, None),
        (128, 128, 8192): (1.3, 1.3, None),
        (16, 16, 4096): (0.8, 0.8, None),
    }
    assert one_scale == dict.fromkeys(e4m3_queries, (None, None, None))
    assert e4m3_queries == {
        (128, 16, 8192): (None, None, 1.05),
        (128, 128, 8192): (None, None, 1.0),
        (16, 16, 4096): (None, None, 1.05),
        (1, 128, 8192): (None, None, 1.0),
    }


def test_triton_limits():
    """Issue E, Shows 3."""
    shapes = [shape for shape in benchmark_cuda.DECODE.values() if shape.group == "triton"]
    limits = {(s.b, s.h_q, s.s_k, s.d_qk): (s.over_peer, s.of_stream) for s in shapes}
    assert limits == {
        (128, 16, 2048, 576): (0.75, None),
        (128, 16, 8192, 576): (0.75, None),
        (128, 128, 8192, 576): (0.4, None),
        (1, 16, 8192, 576): (1.0, None),
        (128, 32, 8192, 320): (None, 0.7),
    }


def test_layer_limits():
    limits = {(shape.b, shape.h_q): shape.limit for shape in benchmark_layer.LAYER.values()}
    assert limits.pop((1, 16)) == 2.0 and set(limits.values()) == {1.6} and len(limits) == 5


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_a_decode_row_is_held_against_its_floor():
    row, ceilings = decode_row(), dict(CEILINGS)
    benchmark_cuda.complete(row, ceilings)
    assert (row["floor_us"], row["of_floor"], row["peer_over_ours"]) == (5.0, 0.5, 2.0)
    assert (row["tflops"], row["gbs"], ceilings) == (100.0, 1000.0, CEILINGS)
    faster = decode_row(flops=10**10, stream_us=12.0)  # 1000 TFLOP/s: the ceiling was too low
    benchmark_cuda.complete(faster, ceilings)
    assert ceilings["matrix_tflops"] == 1000.0 and faster["floor_us"] == 12.0


def test_a_layer_row_is_held_against_the_sum_of_its_parts_floors():
    row = layer_row()
    benchmark_cuda.complete(row, dict(CEILINGS))
    floors = {part["part"]: part["floor_us"] for part in row["parts"]}
    assert floors == {"norm": 1.0, "wo": 5.0, "plan": 1.0, "attention": 6.5, "rope": 1.0}
    assert row["floor_us"] == 14.5 and row["of_floor"] == 14.5 / 20
    own, below = benchmark_cuda.line(row, False).splitlines()
    assert own.startswith(row["case"]) and "300.0" in own
    assert "1.38 x the sum of its parts' floors (limit 2: kept)" in below
    assert "captured 25.0 us, compiled 20.0 us" in below
    assert below.endswith("most over their floors: rope +7.0 us, plan +5.0 us, norm +3.0 us")


def test_a_layer_row_that_was_not_compiled_says_why():
    row = layer_row(us=30.0, compiled_us=None, compile_failed="RuntimeError: no compiler")
    benchmark_cuda.complete(row, dict(CEILINGS))
    text = benchmark_cuda.line(row, True)
    assert "limit 2: MISSED" in text and "not compiled: RuntimeError: no compiler" in text


def test_line_and_summary():
    rows = [decode_row(), decode_row(us=4.0, group="other"), layer_row(), {"case": "x", "failed": "it broke"}]
    for row in rows[:3]:
        benchmark_cuda.complete(row, dict(CEILINGS))
    lines = [benchmark_cuda.line(row, True).splitlines()[0] for row in rows]
    assert len({len(line) for line in lines[:3]} | {len(benchmark_cuda.header(True))}) == 1
    assert lines[3].endswith("FAILED: it broke")
    text = "\n".join(benchmark_cuda.summary(rows, CEILINGS, "NVIDIA H100 80GB HBM3"))
    assert "peer/ours, small batch     geometric mean 2.000 of 1 rows" in text
    assert "peer/ours, all             geometric mean 3.162 of 2 rows" in text
    assert "worst row: fwd_kvcache_mla b1 h16 s1 k1024 bfloat16, peer over ours 2.00" in text
    assert "layer steps within their limits: 1 of 1" in text and "the floors count" in text


def test_fp8_rows_are_held_against_bf16_and_count_apart():
    rows = [decode_row(), fp8_row(flops=7 * 10**9), fp8_row(limit=0.6, peer_limit=None, peer_us=None)]
    ceilings = dict(CEILINGS)
    for row in rows:
        benchmark_cuda.complete(row, ceilings)
    assert ceilings == CEILINGS | {"matrix_tflops": 700.0}  # not the peer's rate, whose products are in fp8
    assert [row.get("peer_over_ours") for row in rows] == [2.0, None, None]
    assert (rows[1]["peer_fp8_over_ours"], rows[1]["of_bf16"]) == (2.0, 0.625)
    own, below = benchmark_cuda.line(rows[1], True).splitlines()
    assert len(own) == len(benchmark_cuda.header(True)) and " 2.00 " in own
    assert below == "    0.62 x the 16.0 us of bf16; peer over ours 2.00 (limit 1.05: kept), its error 2.0e-02"
    assert benchmark_cuda.line(rows[2], True).endswith("    0.62 x the 16.0 us of bf16 (limit 0.6: MISSED)")
    text = "\n".join(benchmark_cuda.summary(rows, ceilings, "another GPU"))
    assert "peer/ours, all             geometric mean 2.000 of 1 rows" in text
    assert "peer/ours, fp8             geometric mean 2.000 of 1 rows" in text
    assert "limits of fp8 rows kept: 1 of 2" in text


def test_rows_of_queries_in_e4m3_have_twice_the_matrix_rate():
    """Above the rate of bf16 they raise no ceiling, and their floor is half of what it is there."""
    row, ceilings = fp8_row(flops=13 * 10**9, stream_us=5.0, e4m3_queries=True), dict(CEILINGS)
    benchmark_cuda.complete(row, ceilings)
    assert row["tflops"] == 1300 and ceilings == CEILINGS
    assert row["floor_us"] == pytest.approx(13e9 / 1400e6)
    faster = fp8_row(flops=16 * 10**9, e4m3_queries=True)
    benchmark_cuda.complete(faster, ceilings)
    assert ceilings["matrix_tflops"] == 800 and faster["floor_us"] == 10.0


def test_a_row_says_what_is_wrong_with_its_peer():
    row = fp8_row(peer_us=None, peer_wrong="cannot be called: AttributeError: gone", peer_error=None)
    benchmark_cuda.complete(row, dict(CEILINGS))
    own, below, reason = benchmark_cuda.line(row, True).splitlines()
    assert " wrong " in own and "peer" not in below and reason == "    peer: cannot be called: AttributeError: gone"


def test_summary_of_layer_rows_alone():
    row = layer_row()
    benchmark_cuda.complete(row, dict(CEILINGS))
    text = "\n".join(benchmark_cuda.summary([row], CEILINGS, "another GPU"))
    assert "worst row" not in text and "peer/ours" not in text and "layer steps" in text


# -------------------------------------------------------------------------------------------------------------- commit


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_heads_unless_the_environment_says_otherwise(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # in a hook they name another repository
        monkeypatch.delenv(name)
    monkeypatch.delenv("FLASHMLA_COMMIT", raising=False)

    def git(*args: str) -> str:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *settings, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert benchmark_cuda.commit(tmp_path) is None  # no .git: an installed package
    git("init")
    assert benchmark_cuda.commit(tmp_path) is None  # nor a HEAD
    kernel = tmp_path / "kernel.cu"
    kernel.write_text("1")
    git("add", "kernel.cu")
    git("commit", "--no-verify", "-m", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "results.json").write_text("{}")  # not tracked
    assert len(head) == 40 and benchmark_cuda.commit(tmp_path) == head
    kernel.write_text("22")
    assert benchmark_cuda.commit(tmp_path) == head + "+changes"

    monkeypatch.setenv("FLASHMLA_COMMIT", "")
    assert benchmark_cuda.commit(tmp_path) == head + "+changes"
    monkeypatch.setenv("FLASHMLA_COMMIT", "b3772bb")
    assert benchmark_cuda.commit(tmp_path) == "b3772bb"


def test_help_tells_of_the_commit():
    assert "FLASHMLA_COMMIT" in benchmark._parser().format_help()


# --------------------------------------------------------------------------------------------------------------- layer


def tiny(h_q: int = 4) -> MLAConfig:
    return MLAConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=h_q,
        q_lora_rank=32,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=48,
    )


def tiny_step(seed: int = 0, b: int = 3, dtype: torch.dtype = torch.float32) -> benchmark_layer.StepArgs:
    return benchmark_layer.make_step(tiny(), b, 130, dtype, "cpu", seed)


def test_the_parts_of_a_step_are_the_step():
    args = tiny_step()
    before = args.kv_cache.clone()
    wanted = benchmark_layer.step(*args)
    appended = args.kv_cache.clone()
    args.kv_cache.copy_(before)
    parts, out = benchmark_layer.parts_of(args)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(args.kv_cache, appended)
    assert not torch.equal(before, appended)
    names = "plan norm wqkv_a q_norm wq_b kv_norm rope append absorb attention up wo"
    assert [part.name for part in parts] == names.split()


def test_parts_run_again_on_copies():
    """As the nodes of their graphs do: each gives what it gave, whatever tensors it is given."""
    args = tiny_step()
    parts, out = benchmark_layer.parts_of(args)
    for part in parts:
        copies = benchmark_layer._copies(part)
        assert len(copies) == benchmark_layer.DECODE_NODES
        first, last = part.run(*copies[0]), part.run(*copies[-1])
        assert isinstance(first, tuple)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copies[0], copies[-1], strict=True))
        for a, b in zip(first, last, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(first[0], out)


def test_bytes_and_flops_of_parts():
    """In float32: h 4, b 3, q_lora_rank 32, r 64, d_nope 32, d_rope 16, d_v 48, s_k 130."""
    parts = {part.name: part for part in benchmark_layer.parts_of(tiny_step())[0]}
    figures = {name: (part.bytes_moved, part.flops) for name, part in parts.items()}
    assert figures["wqkv_a"] == (4 * (3 * 64 + 64 * 112 + 3 * 112), 2 * 3 * 64 * 112)
    assert figures["kv_norm"] == (4 * (3 * 64 + 64 + 3 * 64), 0)
    assert figures["rope"] == (4 * (2 * 3 * (4 + 1) * 16 + 2 * 3 * 8), 0)
    assert figures["append"] == (3 * (2 * 80 * 4 + 8), 0)
    assert figures["absorb"] == (4 * (3 * 4 * (32 + 16) + 4 * 32 * 64 + 3 * 4 * 80), 2 * 3 * 4 * 32 * 64)
    assert figures["up"] == (4 * (3 * 4 * 64 + 4 * 48 * 64 + 3 * 4 * 48), 2 * 3 * 4 * 48 * 64)
    attention = 4 * (3 * 4 * 80 + 3 * 130 * 80 + 3 * 4 * 64 + 3 * 4), 2 * 4 * (80 + 64) * 3 * 130
    assert figures["attention"] == attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_step_passes_its_check(dtype):
    args = tiny_step(dtype=dtype)
    out = benchmark_layer.step(*args)
    assert benchmark_layer.check_step(args, out) < benchmark_layer.TOLERANCE


def test_a_wrong_step_fails_its_check():
    args = tiny_step()
    out = benchmark_layer.step(*args)
    with pytest.raises(AssertionError, match="of the step"):
        benchmark_layer.check_step(args, out.nan_to_num() * 1.1)
    args.kv_cache.flatten(0, 2)[args.slots[0]] = float("nan")  # a token that was not appended
    with pytest.raises(AssertionError, match="inf of the tokens"):
        benchmark_layer.check_step(args, out)


def test_pages_of_the_stream():
    part = next(p for p in benchmark_layer.parts_of(tiny_step())[0] if p.name == "attention")
    _, pages = benchmark_layer.stream_of(part).args
    assert pages.dtype is torch.int32 and sorted(pages.tolist()) == sorted(set(pages.tolist()))
    assert len(pages) == 3 * 3  # 130 tokens are 3 pages of 64


def test_one_compile_serves_every_set_of_weights(needs_inductor):
    run, failed = benchmark_layer._compiled(tiny_step())
    assert failed is None
    from torch._dynamo.utils import counters

    counters.clear()
    for seed in (1, 2):
        args = tiny_step(seed)
        assert benchmark_layer.check_step(args, run(*args)) < 1e-4
    assert not counters["stats"]


def test_fusible_parts_compile(needs_inductor):
    for part in benchmark_layer.parts_of(tiny_step())[0]:
        if part.fusible:
            compiled = torch.compile(part.run, fullgraph=True, dynamic=False)
            for a, b in zip(compiled(*part.args), part.run(*part.args), strict=True):
                torch.testing.assert_close(a, b)


class Eager:
    """Stands for Replay and its graph where there is no GPU: runs the calls, into the same outputs."""

    def __init__(self, calls):
        self.calls, self.graph = calls, self
        self.outputs = [tuple(call() or ()) for call in calls]

    def replay(self):
        for call, outputs in zip(self.calls, self.outputs, strict=True):
            for kept, new in zip(outputs, call() or (), strict=True):
                kept.copy_(new)

    def time(self, flush) -> float:
        for outputs in self.outputs:
            for t in outputs:
                t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)
        self.replay()
        return 12.5


class TinyDecodeShape(benchmark_cuda.DecodeShape):
    def make(self, seed: int):
        case = make_decode_case([self.s_k] * self.b, h_q=self.h_q, seed=seed, poison=False)
        return quantized(case, self.kv_format, self.e4m3_queries) if self.kv_format else case


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(benchmark_cuda, "Replay", Eager)
    monkeypatch.setattr(benchmark_cuda, "ALLOCATIONS", 2)
    monkeypatch.setattr(benchmark_cuda, "DECODE_NODES", 2)
    monkeypatch.setattr(benchmark_cuda, "median_us", lambda replays, flush: [r.time(flush) for r in replays])
    monkeypatch.setattr(benchmark_cuda, "_stream", lambda case: lambda: None)
    monkeypatch.setattr(benchmark_cuda, "host_us", lambda run: run() is not None and 1.0)
    monkeypatch.setattr(benchmark_cuda, "matrix_tflops", lambda flush: 700.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def dense_fp8(case):
    """Stands for FlashMLA's."""
    assert case.q.dtype is torch.float8_e4m3fn
    return lambda: fwd_kvcache_mla(**case.kwargs())


@pytest.mark.parametrize("kv_format", [None, "fp8", "fp8_tensor", "fp8_tensor q e4m3"])
def test_a_decode_row_from_end_to_end(kv_format, monkeypatch, on_cpu):
    monkeypatch.setattr(benchmark_cuda, "_peer", lambda case: lambda: fwd_kvcache_mla(**case.kwargs()))
    monkeypatch.setattr(benchmark_cuda, "_peer_fp8", dense_fp8)
    e4m3 = kv_format == "fp8_tensor q e4m3"
    limits = {"of_bf16": (0.5, 1.5), "over_peer": 1.05}
    kv_format = "fp8_tensor" if e4m3 else kv_format
    shape = TinyDecodeShape("fp8", 2, 4, 1, 100, False, kv_format=kv_format, e4m3_queries=e4m3, **limits)
    assert shape.name == f"fwd_kvcache_mla b2 h4 s1 k100 {kv_format or 'bfloat16'}" + " q e4m3" * e4m3
    row = json.loads(json.dumps({"case": "x", **benchmark_cuda.decode_row(shape, None, True)}))
    assert row["us"] == 12.5 and row["nodes"] == 2 and row["peer_wrong"] is None and row["error"] < 4e-3
    assert (row["peer_us"] is None) == (bool(kv_format) and not e4m3)
    benchmark_cuda.complete(row, dict(CEILINGS))
    text = benchmark_cuda.line(row, True)
    assert ("1.00 x the 12.5 us of bf16 (limit 1.5: kept)" in text) == bool(kv_format)
    assert ("peer over ours 1.00 (limit 1.05: MISSED)" in text) == e4m3
    if e4m3:
        assert row["peer_error"] < benchmark_cuda.PEER_FP8_TOLERANCE


def test_ours_of_queries_in_e4m3_is_checked(monkeypatch, on_cpu):
    """Against what the bytes stand for: out and lse."""
    shape = TinyDecodeShape("fp8", 1, 4, 1, 100, False, kv_format="fp8_tensor", e4m3_queries=True)

    def changed(by_out: float, by_lse: float):
        def decode(**call):
            out, lse = fwd_kvcache_mla(**call)
            return (out * by_out, lse + by_lse) if call["q"].dtype is torch.float8_e4m3fn else (out, lse)

        monkeypatch.setattr(benchmark_cuda, "fwd_kvcache_mla", decode)
        return benchmark_cuda.decode_row(shape, None, False)

    assert changed(1.0, 1e-3)["error"] < benchmark_cuda.E4M3_TOLERANCE
    with pytest.raises(AssertionError, match=r"error 2\.0e-02 of out"):
        changed(1.02, 0.0)
    for by_lse, shown in ((5e-3, r"5\.0e-03"), (float("nan"), "nan")):
        with pytest.raises(AssertionError, match=f"{shown} of lse"):
            changed(1.0, by_lse)


def test_a_row_of_the_triton_backend(monkeypatch, on_cpu):
    """Forces it, and is held against its limits."""
    forced = []
    monkeypatch.setattr(benchmark_cuda.backends, "use_backend", forced.append)
    monkeypatch.setattr(benchmark_cuda, "_peer", lambda case: lambda: fwd_kvcache_mla(**case.kwargs()))
    shape = TinyDecodeShape("triton", 2, 4, 1, 100, False, over_peer=0.75, of_stream=1.5)
    assert shape.name == "fwd_kvcache_mla b2 h4 s1 k100 bfloat16 triton"
    row = {"case": shape.name, **benchmark_cuda.decode_row(shape, None, True)}
    benchmark_cuda.complete(row, dict(CEILINGS))
    assert forced == ["triton"]
    below = "peer over ours 1.00 (limit 0.75: kept); paged streaming over ours 1.00 (limit 1.5: MISSED)"
    assert benchmark_cuda.line(row, True).splitlines()[1].strip() == below
    text = "\n".join(benchmark_cuda.summary([row, decode_row(of_floor=0.5)], dict(CEILINGS), "NVIDIA H100"))
    assert "limits of triton rows kept: 1 of 2" in text and "geometric mean" not in text


def test_dims_are_named_where_they_are_not_deepseek_s():
    shape = benchmark_cuda.DecodeShape("triton", 128, 32, 1, 8192, True, d_qk=320, d_v=256)
    assert shape.name == "fwd_kvcache_mla b128 h32 s1 k8192 d256+64 bfloat16 triton"


def test_batch_invariant_rows_are_those_of_bf16_and_fp16():
    """Issue F, Shows 1: at most 1.3 times the balanced plan's time in the mean, and 2 times in each row."""
    shapes = benchmark_cuda.DECODE.values()
    invariant = [replace(shape, group="") for shape in shapes if shape.group == "batch invariant"]
    assert invariant == [
        replace(shape, group="")
        for shape in shapes
        if shape.kv_format is None and shape.group not in ("triton", "batch invariant")
    ]
    assert (benchmark_cuda.INVARIANT_LIMIT, benchmark_cuda.INVARIANT_MEAN) == (2.0, 1.3)


def test_a_batch_invariant_row(on_cpu):
    shape = TinyDecodeShape("batch invariant", 2, 4, 1, 600, False)
    assert shape.name == "fwd_kvcache_mla b2 h4 s1 k600 bfloat16 batch invariant"
    row = {"case": shape.name, **benchmark_cuda.decode_row(shape, None, True)}
    assert row["peer_us"] is None and row["error"] < 4e-3
    benchmark_cuda.complete(row, dict(CEILINGS))
    below = "1.00 x the 12.5 us of the balanced plan (limit 2: kept)"
    assert benchmark_cuda.line(row, True).splitlines()[1].strip() == below
    rows = [row, row | {"of_balanced": 2.25}]
    assert "MISSED" in benchmark_cuda.line(rows[1], False)
    text = "\n".join(benchmark_cuda.summary(rows, dict(CEILINGS), "NVIDIA H100"))
    assert "batch invariant over balanced: geometric mean 1.500 of 2 rows, most 2.25 (limits 1.3, 2: MISSED)" in text
    text = "\n".join(benchmark_cuda.summary([row], dict(CEILINGS), "NVIDIA H100"))
    assert "geometric mean 1.000 of 1 rows, most 1.00 (limits 1.3, 2: kept)" in text and "worst row" not in text


def test_an_fp8_peer_that_is_missing_or_wrong(monkeypatch, on_cpu):
    """The row says so, and has our time."""
    shape = TinyDecodeShape("fp8", 1, 4, 1, 100, False, kv_format="fp8_tensor", e4m3_queries=True, over_peer=1.05)
    row = benchmark_cuda.decode_row(shape, None, True)
    assert row["peer_wrong"].startswith("cannot be called: ") and row["peer_us"] is None and row["us"] == 12.5

    def wrong(case):
        return lambda: [t * 1.2 for t in dense_fp8(case)()]

    monkeypatch.setattr(benchmark_cuda, "_peer_fp8", wrong)
    row = benchmark_cuda.decode_row(shape, None, True)
    assert row["peer_wrong"] == "error 2.0e-01 of out" and row["us"] == 12.5


def test_how_the_fp8_peer_is_called(monkeypatch):
    """As the schemas of sgl-flash-mla 1.0.0 say."""
    case = quantized(make_decode_case([100, 70], h_q=4, poison=False), "fp8_tensor", e4m3_queries=True)

    class Peer:
        @staticmethod
        def get_mla_decoding_metadata_dense_fp8(seqlens_k, num_heads_per_head_k, num_heads_k):
            assert seqlens_k is case.cache_seqlens and (num_heads_per_head_k, num_heads_k) == (4, 1)
            return ["metadata", "splits"]

        @staticmethod
        def fwd_kvcache_mla_fp8(
            q,
            kcache,
            head_size_v,
            seqlens_k,
            block_table,
            softmax_scale,
            is_causal,
            metadata,
            splits,
            descale_q,
            descale_k,
        ):
            assert q.dtype is kcache.dtype is torch.float8_e4m3fn and kcache.shape == case.kv_cache.shape
            assert q is case.q and kcache.data_ptr() == case.kv_cache.data_ptr()
            assert descale_q.shape == descale_k.shape == (1,) and (metadata, splits) == ("metadata", "splits")
            call = q, kcache, block_table, seqlens_k, head_size_v, softmax_scale, is_causal
            return list(fwd_kvcache_mla(*call, q_scale=descale_q, kv_scale=descale_k))

    monkeypatch.setattr(torch.ops, "flash_mla_legacy", Peer, raising=False)
    exact = case.dequantized()
    assert benchmark_cuda._check_peer_fp8(exact, *benchmark_cuda._peer_fp8(case)(), expected(exact)) < 1e-2


@pytest.mark.parametrize("kv_format, token", [("bfloat16", 1152), ("fp8", 656), ("fp8_tensor", 576)])
def test_appends_are_checked_bit_for_bit(kv_format, token):
    case = benchmark_cuda._append(70, kv_format, seed=1, device="cpu")
    assert case.bytes_moved == 70 * (1152 + token + 8)
    (kv_cache,) = case.run()
    assert case.check(kv_cache) == 0.0 and kv_cache.shape[-1] * kv_cache.itemsize == token
    kv_cache.view(torch.uint8)[:, :, :, 5] ^= 1
    with pytest.raises(AssertionError, match="does not hold the tokens"):
        case.check(kv_cache)


@pytest.mark.parametrize("kv_format, token", [("fp8", 656), ("fp8_tensor", 576)])
def test_a_case_over_an_fp8_cache(kv_format, token):
    plain = make_decode_case([100, 70], poison=False)
    case = quantized(plain, kv_format)
    assert plain.dequantized() is plain and plain.bytes_moved() - case.bytes_moved() == 170 * (1152 - token)
    again = case.dequantized()
    assert type(again) is type(plain) and again.q is plain.q and again.flops() == case.flops() == plain.flops()
    torch.testing.assert_close(again.kv_cache, plain.kv_cache, rtol=2**-4, atol=2**-8)


def test_a_case_of_queries_in_e4m3():
    plain = make_decode_case([100, 70], poison=False)
    case = quantized(plain, "fp8_tensor", e4m3_queries=True)
    assert case.q.dtype is torch.float8_e4m3fn and case.q.shape == plain.q.shape
    assert quantized(plain, "fp8_tensor").bytes_moved() - case.bytes_moved() == case.q.numel()
    again = case.dequantized()
    assert again.q.dtype is again.kv_cache.dtype is torch.bfloat16
    assert torch.equal(again.q.float(), case.q.float() * case.q_scale)
    torch.testing.assert_close(again.q, plain.q, rtol=2**-4, atol=2**-8)
    check_decode(again, *fwd_kvcache_mla(**case.kwargs()))


class TinyShape(benchmark_layer.LayerShape):
    def make(self, seed: int) -> benchmark_layer.StepArgs:
        return tiny_step(seed, self.b)


def test_a_layer_row_from_end_to_end(monkeypatch, needs_inductor):
    """All but the GPU's part of it: the row has what the table and the JSON need."""
    monkeypatch.setattr(benchmark_layer, "Replay", Eager)
    monkeypatch.setattr(benchmark_layer, "median_us", lambda replays, flush: [r.time(flush) for r in replays])
    monkeypatch.setattr(benchmark_layer, "stream_of", lambda part: part)
    monkeypatch.setattr(benchmark_layer, "host_us", lambda run: run() is not None and 1.0)
    monkeypatch.setattr(benchmark_layer, "matrix_tflops", lambda flush: 700.0)
    row = json.loads(json.dumps({"case": "x", **benchmark_layer.layer_row(TinyShape(2, 4), None)}))
    assert (row["us"], row["eager_us"], row["compiled_us"]) == (12.5, 12.5, 12.5)
    assert row["nodes"] == benchmark_layer.STEP_NODES and row["compile_failed"] is None
    assert [part["part"] for part in row["parts"] if "stream_us" in part] == ["attention"]
    both_ways = {part["part"] for part in row["parts"] if "compiled_us" in part}
    assert both_ways == {"norm", "q_norm", "kv_norm", "rope", "absorb", "up"}
    benchmark_cuda.complete(row, dict(CEILINGS))
    assert "x the sum of its parts' floors" in benchmark_cuda.line(row, False)


# -------------------------------------------------------------------------------------------------------------- sweeps


def points(*pairs: tuple[float, float]) -> list[dict]:
    return [{"x": x, "us": us} for x, us in pairs]


def test_spikes_lie_above_the_line_between_their_neighbours():
    assert benchmark_sweep.spikes(points((1, 10), (2, 11), (3, 12))) == []
    (spike,) = benchmark_sweep.spikes(points((1, 10), (2, 12.7), (3, 12), (4, 13)))
    assert spike["x"] == 2 and spike["over"] == pytest.approx(12.7 / 11)
    assert benchmark_sweep.spikes(points((1, 10), (2, 12.6), (3, 12))) == []  # 14.5 %
    assert benchmark_sweep.spikes(points((1, 10), (2, 5), (3, 12))) == []  # below
    assert benchmark_sweep.spikes(points((1, 50), (2, 10))) == []  # the ends have one neighbour
    uneven = points((16, 16), (24, 24), (88, 88))  # on a line, at uneven distances
    assert benchmark_sweep.spikes(uneven) == []
    assert [p["x"] for p in benchmark_sweep.spikes(points((16, 16), (24, 28), (88, 88)))] == [24]


def test_sweeps_cover_what_they_say():
    values = {sweep.name: sweep.values for sweep in benchmark_sweep.SWEEPS}
    assert len(values) == 6
    assert values["s_k with b 32, h_q 16"] == tuple(range(64, 4097, 64))
    assert values["b with h_q 16, s_k 2048"][14:18] == (15, 16, 24, 32)
    assert values["b with h_q 16, s_k 2048"][-1] == 256
    assert values["h_q with b 32, s_k 2048"] == tuple(range(4, 129, 4))
    for sweep in benchmark_sweep.SWEEPS:
        for _, shape in sweep.points():
            assert set(shape) == {"b", "h_q", "s_k"}


def test_a_sweeps_calls_share_no_page():
    b, s_k = 2, 130
    kv_cache = torch.randn(benchmark_sweep.pages_needed(b, s_k), 64, 1, 576)
    calls = benchmark_sweep._calls(kv_cache, b, 4, s_k)
    assert len(calls) == benchmark_sweep.NODES
    tables = [call.__defaults__[1] for call in calls]
    assert len(set(torch.stack(tables).flatten().tolist())) == benchmark_sweep.pages_needed(b, s_k)
    for call in calls:
        out, lse = call()
        assert out.shape == (b, 1, 4, 512) and out.isfinite().all() and lse.isfinite().all()


def test_a_point_is_timed_and_must_be_finite(monkeypatch):
    monkeypatch.setattr(benchmark_sweep, "Replay", Eager)
    kv_cache = torch.randn(benchmark_sweep.pages_needed(1, 64), 64, 1, 576)
    assert benchmark_sweep.time_point(kv_cache, None, b=1, h_q=4, s_k=64) == 12.5
    kv_cache[3] = float("nan")
    with pytest.raises(AssertionError, match="b 1, h_q 4, s_k 64: the result is not finite"):
        benchmark_sweep.time_point(kv_cache, None, b=1, h_q=4, s_k=64)


def test_a_run_writes_after_every_sweep(monkeypatch, capsys):
    sweeps = sweeps_document()["sweeps"]
    monkeypatch.setattr(benchmark_sweep.sm90, "status", lambda: "ready")
    monkeypatch.setattr(benchmark_sweep, "measure", lambda _: iter(sweeps.items()))
    written = []
    document, status = benchmark_sweep.run(lambda: {"gpu": "made up"}, lambda d: written.append(len(d["sweeps"])))
    assert (document, status, written) == (sweeps_document(), 0, [1, 2, 3, 4, 5, 6])
    assert capsys.readouterr().out.count("us a call") == 6


def sweeps_document() -> dict:
    timed = points(*((x, 40.0 if x == 192 else 10 + x / 64) for x in range(64, 1025, 64)))
    sweep = {"x": "s_k", "b": 1, "h_q": 16, "points": timed, "spikes": benchmark_sweep.spikes(timed)}
    names = [s.name for s in benchmark_sweep.SWEEPS]
    return {"machine": {"gpu": "made up"}, "sweeps": dict.fromkeys(names, sweep)}


def test_sweeps_table():
    name, sweep = next(iter(sweeps_document()["sweeps"].items()))
    lines = list(benchmark_sweep.table(name, sweep))
    assert len(lines) == 1 + 2 + 1 and lines[1].split()[:2] == ["64", "11.0"]
    assert lines[-1] == "  s_k 192: 40.0 us, 208 % above the line between its neighbours"


# ---------------------------------------------------------------------------------------------------------------- plots


def rows_document() -> dict:
    unmatched = decode_row("fwd_kvcache_mla b4 h16 s1 k4096 bfloat16", peer_us=None)
    rows = [decode_row(), unmatched, fp8_row(), layer_row()]
    for row in rows:
        benchmark_cuda.complete(row, dict(CEILINGS))
    return {"machine": {"gpu": "made up"}, "ceilings": CEILINGS, "rows": rows}


@pytest.mark.parametrize("document", [rows_document(), sweeps_document()], ids=["rows", "sweeps"])
def test_plots_are_drawn_from_files(document, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "flashmla_ops[bench]"')
    measured, picture = tmp_path / "measured.json", tmp_path / "picture.png"
    measured.write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["benchmark", "--from", str(measured), "--plot", str(picture)])
    assert benchmark.main() == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_sweep_needs_a_gpu():
    command = [sys.executable, "-m", "flashmla_ops.benchmark", "--sweep"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--sweep needs a GPU" in done.stderr


# ------------------------------------------------------------------------------------------------------------- --tune


def benchmark_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(benchmark.sys, "argv", ["benchmark", *arguments])
    return benchmark.main()


def test_tune_names_its_keys(monkeypatch, capsys):
    assert benchmark_main(monkeypatch, "--tune", "--list") == 0
    assert capsys.readouterr().out.splitlines() == list(map(str, benchmark_tune.CONFIGS))
    assert benchmark_main(monkeypatch, "--tune", "--list", "576, 16") == 0
    assert capsys.readouterr().out == "(576, 16)\n"
    assert benchmark_main(monkeypatch, "--tune", "--list", "x") == 1


def test_cases_are_chosen_by_words_and_without_others(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["h16 s1 k8192 bfloat16", "--without", "triton", "--without", "invariant"]
    assert benchmark_main(monkeypatch, "--list", *words) == 0
    assert capsys.readouterr().out.splitlines() == [f"fwd_kvcache_mla b{b} h16 s1 k8192 bfloat16" for b in (128, 1)]


def test_tune_says_what_it_needs(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        benchmark_main(monkeypatch, "--tune", "--plot", "x.png")
    assert "--tune goes with words and --list only" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark_main(monkeypatch, "--tune")
    assert "--tune needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("key", benchmark_tune.CONFIGS)
def test_tune_tries_what_the_table_has(key):
    for kb, config in zip(benchmark_tune.SHARED_KB, benchmark_tune.CONFIGS[key], strict=True):
        assert config in benchmark_tune.candidates(key, kb)


def test_tune_prints_the_best_row(capsys):
    """Of a process that times every candidate, the second as the fastest; the third fails."""
    asked = []

    def process(key, configs, compiles):
        asked.append((key, compiles))
        if compiles:
            return []
        lines = [{"config": list(config), "us": 100.0 + i} for i, config in enumerate(configs)]
        lines[1]["us"], lines[2] = 50.0, {"config": list(configs[2]), "failed": "OutOfResources: shared memory"}
        return lines

    key = (576, 16)
    tried = benchmark_tune.candidates(key, 227)
    assert benchmark_tune.run([key], 227, process) == 0
    assert asked.count((key, True)) == len(tried) and asked[-1] == (key, False)
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["50.0", "us", *f"Config{tuple(tried[1])}".split()]
    assert any("failed" in line and "OutOfResources" in line for line in lines)
    small, middle, _ = benchmark_tune.CONFIGS[key]
    shown = [f"Config{tuple(config)}" for config in (small, middle, tried[1])]
    assert last.strip() == f"{key}: ({', '.join(shown)}),"
    assert benchmark_tune.run([key], 227, lambda *request: []) == 1  # nothing could be timed
