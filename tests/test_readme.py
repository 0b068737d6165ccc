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


def test_the_gpu_table_is_the_committed_result():
    document = json.loads((ROOT / "tests/results/h100.json").read_text())
    rows = {row["case"]: row for row in document["rows"]}
    for name, cells in table_under("| case | us | TFLOP/s | GB/s | floor us | FlashMLA us |").items():
        row = rows[name]
        rates = [f"{row['us']:.1f}", f"{row['tflops']:.0f}", f"{row['gbs']:.0f}"]
        assert cells == [*rates, f"{row['floor_us']:.1f}", f"{row['peer_us']:.1f}"], name
    ratios = [row["peer_over_ours"] for row in rows.values() if "peer_over_ours" in row and row["group"] != "triton"]
    assert f"geometric mean of {statistics.geometric_mean(ratios):.3f} over the {len(ratios)} rows" in README
    assert f"from {min(ratios):.2f}" in README and f"to {max(ratios):.2f}" in README
    assert all(document["machine"][key] in README for key in ("gpu", "torch", "commit"))
