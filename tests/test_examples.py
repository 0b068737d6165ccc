"""The example scripts run and agree with themselves, and the committed model is as good as its record says, by every
path through the package."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from flashmla_ops import PagedKVCache, concat_and_cache_mla
from flashmla_ops.modules import DeepseekModel

pytest.importorskip("safetensors", reason='needs safetensors: pip install "flashmla_ops[examples]"')

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CHECKPOINT = EXAMPLES / "data" / "stdlib-6m"
sys.path.insert(0, str(EXAMPLES))

import generate  # noqa: E402
from train_tiny import CONFIG, as_tokens, stdlib_text, windows  # noqa: E402


def run_example(name: str, *arguments, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def output_of(name: str, *arguments, **environment) -> str:
    done = run_example(name, *arguments, **environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """One dense and one MoE layer, random: half the compile time of the committed model."""
    directory = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    DeepseekModel(replace(CONFIG, num_hidden_layers=2)).save_pretrained(directory)
    return directory


# ----------------------------------------------------------------------------------------------------------- scripts


def test_direct_ops():
    assert output_of("direct_ops.py").rstrip().endswith("right")


def table_of(stdout: str) -> dict[str, dict[str, str]]:
    """generate.py's last lines: mode -> column -> cell."""
    lines = stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("mode  "))
    names = [name for name in lines[start].split("  ") if name]
    columns = [lines[start].index(name) for name in names] + [None]
    return {
        line.split()[0]: {name.strip(): line[columns[i] : columns[i + 1]].strip() for i, name in enumerate(names)}
        for line in lines[start + 1 :]
    }


def test_generate(needs_inductor):
    stdout = output_of("generate.py", "--device", "cpu", "--max-new-tokens", 80)
    assert '    """Return the lines of a file.' in stdout
    compiled = table_of(stdout)["compiled"]
    figures = {name: compiled[name] for name in ("graphs", "graph breaks", "compiles", "cache copies")}
    assert figures == {"graphs": "1", "graph breaks": "0", "compiles": "1", "cache copies": "0"}
    assert compiled["agreement with eager"].startswith("yes: ")


FP8_COST = {"fp8": 0.005, "fp8_tensor": 0.01}  # of bits per byte, as a share


@pytest.mark.parametrize("kv_cache", FP8_COST)
def test_generate_with_an_fp8_cache(kv_cache):
    arguments = ("--device", "cpu", "--kv-cache", kv_cache, "--mode", "eager", "--max-new-tokens", 8)
    stdout = output_of("generate.py", *arguments)
    plain, fp8 = (float(bits) for bits in re.findall(r"([\d.]+) bits per byte", stdout))
    assert abs(fp8 - plain) <= FP8_COST[kv_cache] * plain and list(table_of(stdout)) == ["eager"]


def test_generate_without_a_compiler_says_so():
    stdout = output_of(
        "generate.py", "--device", "cpu", "--max-new-tokens", 8, "--prompt", "import ", CXX="no-such-c++"
    )
    assert "no C++ compiler" in stdout and "aot_eager" in stdout
    assert table_of(stdout)["compiled"]["agreement with eager"].startswith("yes: 8 of 8")


def test_generate_random():
    stdout = output_of("generate.py", "--device", "cpu", "--random", "2x128", "--mode", "eager", "--max-new-tokens", 4)
    assert list(table_of(stdout)) == ["eager"]


def test_generate_refuses_more_tokens_than_the_model_has_positions():
    done = run_example("generate.py", "--device", "cpu", "--max-new-tokens", 1024)
    assert done.returncode != 0 and "1024 tokens together at most" in done.stderr


def test_export_aoti(needs_inductor, small_checkpoint):
    if torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 crashes on loading any AOTInductor package that calls a custom op")
    assert output_of("export_aoti.py", "--checkpoint", small_checkpoint).rstrip().endswith("yes")


def test_continuous_batching(needs_inductor, small_checkpoint):
    arguments = ("--checkpoint", small_checkpoint, "--batch-sizes", 2, 4, "--requests", 12)
    stdout = output_of("continuous_batching.py", *arguments)
    assert "batch sizes [2, 4]: 2 compiles" in stdout
    assert stdout.rstrip().endswith("output equal to each request alone: 12 of 12")


def test_train_tiny(tmp_path):
    arguments = ("--out", tmp_path, "--minutes", 0.01, "--device", "cpu", "--no-compile", "--batch", 1)
    stdout = output_of("train_tiny.py", *arguments, "--length", 64, "--held-out", 1024)
    assert "bits per byte, gzip -9 needs" in stdout
    assert json.loads((tmp_path / "training.json").read_text())["steps"] >= 1
    DeepseekModel.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------- generate.py's judgement


def make_run() -> generate.Run:
    """200 steps of a row: logits 0 but for a largest one of 10 and a second of 5."""
    logits = torch.zeros(200, 1, 16)
    logits[..., 3], logits[..., 4] = 10.0, 5.0
    experts = torch.tensor([1, 2]).expand(200, 1, 1, 1, 2).clone()
    return generate.Run(torch.zeros(200, 1, dtype=torch.long), logits, experts, torch.full((200, 1), 0.5), 1.0, 1.0)


def test_agreement_compares_logits_tokens_and_experts():
    eager, mode = make_run(), make_run()
    assert generate.agreement(mode, eager)[0]
    mode.experts = mode.experts.flip(-1)  # the order of a token's experts does not matter
    assert generate.agreement(mode, eager)[0]
    mode.experts[7, 0, 0, 0, 0] = 5
    assert not generate.agreement(mode, eager)[0]
    mode = make_run()
    mode.logits[3, 0, 9] = 1e-2
    assert not generate.agreement(mode, eager)[0]
    assert not generate.agreement(replace(mode, logits=mode.logits * torch.nan), eager)[0]


def test_agreement_leaves_out_a_few_close_calls_and_shows_them():
    eager, mode = make_run(), make_run()
    eager.logits[5, 0, 4] = 10 - 1e-5  # a token that rounding may turn into another
    eager.margin[6] = 1e-6  # experts likewise
    mode.logits[5:7, 0, 4] = 11.0
    good, sentence = generate.agreement(mode, eager)
    assert good and "198 of 198 rows" in sentence and "2 close calls" in sentence
    eager.margin[8:10] = 1e-6  # 4 of 200 is more than 1 %
    assert not generate.agreement(mode, eager)[0]


def test_cache_copies_are_counted(needs_inductor):
    class Copying:
        @staticmethod
        def decode(input_ids, caches):
            copy = caches[0] + 1.0
            concat_and_cache_mla(copy, input_ids[:, :512], input_ids[:, 512:], torch.zeros(1, dtype=torch.int64))
            return copy

    step = generate.Counted(Copying)
    with torch.inference_mode():
        step(torch.randn(1, 576), [torch.zeros(3, 64, 1, 576)])
    assert step.cache_copies() == 1


# ------------------------------------------------------------------------------------------------ the committed model


def test_record_and_size():
    record = json.loads((CHECKPOINT / "training.json").read_text())
    assert record["held_out_bits_per_byte"] < 1.8 < record["gzip_9_bits_per_byte"]
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 12e6


def held_out_rows(rows: int, length: int) -> torch.Tensor:
    """[rows, length + 1] int64, from all over the held-out text."""
    every = windows(as_tokens(stdlib_text()[1]), length)
    return every[:: len(every) // rows][:rows].long()


def bits_per_byte(logits: torch.Tensor, text: torch.Tensor) -> float:
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item() / math.log(2)


def test_bits_per_byte():
    """On this machine's Python, whose files are not all those of the record's."""
    text = held_out_rows(16, 1024)
    model = DeepseekModel.from_pretrained(CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        assert bits_per_byte(model(text[:, :-1]), text) < 1.8


def test_an_fp8_cache_costs_little():
    """Half prefilled, the rest prefilled over that and then decoded: bits a byte near the plain cache's."""
    rows, half = 6, 96
    text = held_out_rows(rows, 3 * half)
    given = text[:, :-1].contiguous()
    model = DeepseekModel.from_pretrained(CHECKPOINT, dtype=torch.float32)

    def bits(kv_cache_dtype: str) -> float:
        pages = -(-3 * half // 64)
        cache = PagedKVCache(4, rows * pages, rows, pages, kv_cache_dtype=kv_cache_dtype, max_new_tokens=half)
        for _ in range(rows):
            cache.allocate()
        logits, seqlens_q = [], torch.full((rows,), half, dtype=torch.int32)
        for i, tokens in enumerate(given.split(half, 1)):
            if i < 2:
                cache.extend(half)
                context = cache.cache_seqlens if i else None
                logits.append(model.prefill(tokens, seqlens_q, cache.layers, cache.block_table, context))
                continue
            for token in tokens.split(4, 1):
                cache.extend(4)
                logits.append(model.decode(token.contiguous(), cache.layers, cache.block_table, cache.cache_seqlens))
        return bits_per_byte(torch.cat(logits, 1), text)

    with torch.no_grad():
        by_cache = {name: bits(name) for name in ("float32", *FP8_COST)}
    print("bits per byte:", by_cache)
    plain = by_cache["float32"]
    assert all(abs(by_cache[name] - plain) <= cost * plain for name, cost in FP8_COST.items())


def test_bits_per_byte_are_equal_by_every_path(needs_inductor):
    rows, length = 8, 256
    text = held_out_rows(rows, length)
    given = text[:, :-1].contiguous()
    model = DeepseekModel.from_pretrained(CHECKPOINT, dtype=torch.float32)

    def empty_cache(max_new_tokens: int) -> PagedKVCache:
        pages = length // 64
        cache = PagedKVCache(4, rows * pages, rows, pages, max_new_tokens=max_new_tokens, dtype=torch.float32)
        for _ in range(rows):
            cache.allocate()
        return cache

    def decoded(s_q: int) -> torch.Tensor:
        cache = empty_cache(s_q)
        step = torch.compile(model.decode, fullgraph=True, dynamic=False)
        logits = []
        for tokens in given.split(s_q, 1):
            cache.extend(s_q)
            logits.append(step(tokens.contiguous(), cache.layers, cache.block_table, cache.cache_seqlens))
        return torch.cat(logits, 1)

    def prefilled(chunk: int) -> torch.Tensor:
        cache = empty_cache(chunk)
        logits = []
        for tokens in given.split(chunk, 1):
            n = tokens.shape[1]
            cache.extend(n)
            context = None if chunk == length else cache.cache_seqlens
            seqlens_q = torch.full((rows,), n, dtype=torch.int32)
            logits.append(model.prefill(tokens, seqlens_q, cache.layers, cache.block_table, context))
        return torch.cat(logits, 1)

    with torch.no_grad():
        logits = {
            "no cache": model(given),
            "prefill": prefilled(length),
            "chunked prefill": prefilled(100),  # chunks that end within pages
            "decode": decoded(1),
            "decode, 4 tokens a step": decoded(4),
        }
    by_path = {path: bits_per_byte(of_path, text) for path, of_path in logits.items()}
    print({path: round(value, 5) for path, value in by_path.items()})
    assert max(by_path.values()) - min(by_path.values()) < 5e-4, by_path
