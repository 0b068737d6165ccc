"""What README.md shows runs as it stands: its Python blocks here, the test command in .ci/run, the scripts in
test_examples.py."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashmla_ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(heading: str) -> list[str]:
    """The Python blocks below a heading, up to the next one."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_use_block_runs(capsys):
    (block,) = blocks("Use")
    exec(block, {})
    assert capsys.readouterr().out == "torch.Size([4, 1, 16, 512]) torch.Size([4, 16, 1])\n"


def test_models_block_loads_the_committed_model():
    pytest.importorskip("safetensors", reason='needs safetensors: pip install "flashmla_ops[hf]"')
    (block,) = blocks("Models")
    names = {}
    exec(block.replace("examples/data", str(ROOT / "examples/data")), names)
    assert names["model"](torch.zeros(1, 4, dtype=torch.long)).shape[:2] == (1, 4)


def test_uneven_queries_block_runs():
    (block,) = blocks("Rows with different numbers of queries")
    h_q, cache_seqlens = 4, torch.tensor([3, 70, 9, 64, 40], dtype=torch.int32)
    names = {
        **{"torch": torch, "flashmla_ops": flashmla_ops, "h_q": h_q, "cache_seqlens": cache_seqlens},
        "q": torch.randn(8, h_q, 576),
        "kv_cache": torch.randn(10, 64, 1, 576),
        "block_table": torch.arange(10, dtype=torch.int32).view(5, 2),
    }
    exec(block, names)
    assert names["out"].shape == (8, h_q, 512) and names["lse"].shape == (h_q, 8)


def test_flashmla_block_runs():
    (block,) = blocks("Coming from FlashMLA")
    cache_seqlens, s_q, h_q, h_kv, d_v = torch.tensor([3, 70], dtype=torch.int32), 1, 16, 1, 512
    names = {
        "flash_mla": flashmla_ops,
        "cache_seqlens": cache_seqlens,
        **{"s_q": s_q, "h_q": h_q, "h_kv": h_kv, "d_v": d_v},
        "q": torch.randn(2, s_q, h_q, 576),
        "kv_cache": torch.randn(4, 64, h_kv, 576),
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    }
    exec(block, names)
    assert names["out"].shape == (2, 1, 16, 512) and names["lse"].isfinite().all()


@pytest.mark.parametrize("command", ["-m flashmla_ops", "-m flashmla_ops.benchmark overhead"])
def test_command_runs(command):
    assert f"python {' '.join(command.split()[:2])}" in README
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("cpu: ready" in done.stdout) if command == "-m flashmla_ops" else ("call overhead" in done.stdout)


def test_table_names_every_example():
    shown = set(re.findall(r"`examples/(\w+\.py)`", README))
    assert shown == {path.name for path in (ROOT / "examples").glob("*.py")}


def table_under(header: str) -> dict[str, list[str]]:
    """The first column of the table with this header line -> its other columns."""
    table = README.split(f"{header}\n", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    return {name: cells for name, *cells in rows}


def test_the_cpu_table_is_the_committed_result():
    rows = json.loads((ROOT / "tests/results/cpu.json").read_text())["rows"]
    table = table_under("| case | us | beside |")
    assert {name: us for name, (us, _) in table.items()} == {row["case"]: f"{row['us']:.1f}" for row in rows}


def results(name: str) -> tuple[dict[str, dict], dict]:
    """A committed document's rows by their names without the op's, and the document."""
    document = json.loads((ROOT / "tests/results" / name).read_text())
    return {row["case"].removeprefix("fwd_kvcache_mla "): row for row in document["rows"]}, document


def says(text: str) -> None:
    assert text in " ".join(README.split()), text


def test_the_gpu_table_is_the_committed_result():
    rows, document = results("h100.json")
    for name, cells in table_under("| case | us | TFLOP/s | GB/s | floor us | FlashMLA us |").items():
        row = rows[name.removeprefix("fwd_kvcache_mla ")]
        rates = [f"{row['us']:.1f}", f"{row['tflops']:.0f}", f"{row['gbs']:.0f}"]
        assert cells == [*rates, f"{row['floor_us']:.1f}", f"{row['peer_us']:.1f}"], name
    ratios = [row["peer_over_ours"] for row in rows.values() if "peer_over_ours" in row and row["group"] != "triton"]
    assert f"geometric mean of {statistics.geometric_mean(ratios):.3f} over the {len(ratios)} rows" in README
    assert f"from {min(ratios):.2f}" in README and f"to {max(ratios):.2f}" in README
    assert all(document["machine"][key] in README for key in ("gpu", "torch", "commit"))


def test_what_is_said_below_the_gpu_table_is_the_committed_result():
    rows, _ = results("h100.json")

    def ratios(figure: str, *names: str) -> list[str]:
        return [f"{rows[name][figure]:.2f}" for name in names]

    blocks = ratios("of_bf16", *(f"b128 h{h_q} s1 k8192 fp8" for h_q in (16, 64, 128)))
    one_scale = ratios("of_bf16", *(f"b128 h{h_q} s1 k8192 fp8_tensor" for h_q in (16, 128)))
    says("takes {}, {} and {} times as long as over bf16".format(*blocks))
    says("with one scale {} and {} times (16, 128)".format(*one_scale))
    of_many = [f"b128 {shape} bfloat16 triton" for shape in ("h16 s1 k2048", "h16 s1 k8192", "h128 s1 k8192")]
    triton = ratios("peer_over_ours", *of_many, "b1 h16 s1 k8192 bfloat16 triton")
    says(
        "backend is {}, {} and {} (b128: 16 heads, 2048 and 8192 keys; 128 heads, 8192 keys) and {} (one".format(
            *triton
        )
    )
    shapes = ("b128 h16 s1 k8192", "b16 h16 s1 k4096", "b128 h128 s1 k8192", "b1 h128 s1 k8192")
    says("takes {}, {}, {} and {} times".format(*ratios("peer_fp8_over_ours", *(f"{s} fp8_tensor" for s in shapes))))

    before, _ = results("h100_e9ca571.json")
    both = [(rows[name], row) for name, row in before.items() if row["group"] != "fp8"]
    for group in {row["group"] for _, row in both}:
        ratio = [now["of_floor"] / then["of_floor"] for now, then in both if now["group"] == group]
        assert abs(statistics.geometric_mean(ratio) - 1) < 0.01 and all(abs(r - 1) < 0.02 for r in ratio)


def test_the_price_of_batch_invariance_is_the_committed_result():
    def ratios(rows: dict[str, dict]) -> list[float]:
        return [row["of_balanced"] for row in rows.values()]

    now, document = results("h200_invariant.json")
    before = {name: row for name, row in results("h200_6982408.json")[0].items() if name in now}
    older, _ = results("h100_invariant.json")
    most = max(now, key=lambda name: now[name]["of_balanced"])
    says(f"of the {len(now)} shapes in `tests/results/h200_invariant.json` (commit {document['machine']['commit']})")
    says(f"{statistics.geometric_mean(ratios(now)):.2f} times the balanced plan's time in the geometric mean, at most")
    says(f"at most {max(ratios(now)):.2f} (4 queries of 16 heads)")
    assert " h16 s4 " in most and "H200" in document["machine"]["gpu"]
    says(f"the same shapes took {statistics.geometric_mean(ratios(before)):.2f} and {max(ratios(before)):.2f}")
    says(f"and on an H100 {statistics.geometric_mean(ratios(older)):.2f} (`h100_invariant.json`)")


def test_what_is_said_of_an_h200_is_the_committed_result():
    rows, document = results("h200.json")
    served = [row for row in rows.values() if "peer_over_ours" in row and row["group"] != "triton"]
    groups = {}
    for row in served:
        groups.setdefault(row["group"], []).append(row["peer_over_ours"])
    mean = statistics.geometric_mean(row["peer_over_ours"] for row in served)
    says(f"geometric mean of {mean:.3f} over these {len(served)} rows (`h200.json`, commit")
    assert document["machine"]["commit"] in README
    first, *others, last = (f"{statistics.geometric_mean(ratios):.3f}" for ratios in groups.values())
    for text in (f"by group {first} (b128", *(f"{other} (" for other in others), f"and {last} (the rest)"):
        says(text)
