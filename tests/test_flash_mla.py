"""Checks and times the main op: `python tests/test_flash_mla.py`, half a minute, on the GPU if there is one.

Each line of its table is a batch of sequences of varied lengths. It is right if its error against float64, with flat
and with peaked scores, is within what `check_decode` allows. Times are of calls one after another, planned before; the
cache may be warm.
"""

import argparse
import itertools
import statistics
import sys
import time

import pytest
import torch

import flashmla_ops
from flashmla_ops.testing import DecodeCase, check_decode, make_decode_case, varied_lengths

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU_DEFAULTS = {"batch": [8], "queries": [1, 2], "heads": [16, 128], "keys": [512, 2048], "dtype": ["bf16", "fp32"]}
GPU_DEFAULTS = {"batch": [128], "queries": [1, 2], "heads": [16, 64, 128], "keys": [4096, 8192], "dtype": ["bf16"]}
COLUMNS = "{:>6} {:>7} {:>5} {:>6} {:>5} | {:>10} {:>9} {:>7} {:>10} {:>12}  {}"


def main(arguments: list[str]) -> int:
    """Runs the table; returns how many of its rows are wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description="Checks and times fwd_kvcache_mla over all combinations of its arguments."
    )
    for name, default in (GPU_DEFAULTS if device == "cuda" else CPU_DEFAULTS).items():
        choices = {"choices": DTYPES} if name == "dtype" else {"type": int}
        parser.add_argument(f"--{name}", nargs="+", default=default, help=f"default: {default}", **choices)
    options = vars(parser.parse_args(arguments))
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"fwd_kvcache_mla, 512 + 64, causal, {where}; lengths are normal(keys, keys / 2); errors against float64")
    print(COLUMNS.format(*options, "us", "GFLOP/s", "GB/s", "error", "error peaked", ""))

    begin, wrong, rows = time.perf_counter(), 0, list(itertools.product(*options.values()))
    for b, s_q, h_q, s_k, dtype in rows:
        call = {"s_q": s_q, "h_q": h_q, "dtype": DTYPES[dtype], "device": device, "causal": True}
        case = make_decode_case(varied_lengths(b, s_k, s_q), **call)
        us = time_us(case)
        errors, verdict = [], "right"
        for peaked in (None, "middle"):
            error, message = error_of(make_decode_case(case.cache_seqlens, peaked=peaked, **call))
            errors.append(f"{error:.2e}")
            verdict = message or verdict
        wrong += verdict != "right"
        figures = f"{us:.0f}", f"{case.flops() / us / 1e3:.0f}", f"{case.bytes_moved() / us / 1e3:.1f}"
        print(COLUMNS.format(b, s_q, h_q, s_k, dtype, *figures, *errors, verdict), flush=True)
    seconds = time.perf_counter() - begin
    print(f"{'FAILED' if wrong else 'passed'}: {len(rows) - wrong} of {len(rows)} rows right, in {seconds:.0f} s")
    return wrong


def plan_of(case: DecodeCase) -> dict:
    return dict(
        zip(("tile_scheduler_metadata", "num_splits"), flashmla_ops.get_mla_metadata(*case.plan_args), strict=True)
    )


def error_of(case: DecodeCase) -> tuple[float, str]:
    """The error of a call, and what is wrong with it, if anything."""
    try:
        return check_decode(case, *flashmla_ops.fwd_kvcache_mla(**case.kwargs(), **plan_of(case))), ""
    except (AssertionError, RuntimeError) as error:
        return float("nan"), f"WRONG: {error}"


def time_us(case: DecodeCase, seconds: float = 0.3) -> float:
    """Median microseconds of a call."""
    arguments = case.kwargs() | plan_of(case)
    sync = torch.cuda.synchronize if case.q.is_cuda else lambda: None
    calls = 20 if case.q.is_cuda else 1  # launched together, so that the host does not count

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            flashmla_ops.fwd_kvcache_mla(**arguments)
        sync()
        return (time.perf_counter() - begin) * 1e6 / calls

    with torch.inference_mode():
        run(), sync()
        times, end = [], time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            times.append(run())
    return statistics.median(times)


SMALL = ["--batch", "3", "--queries", "2", "--heads", "16", "--keys", "300", "--dtype", "bf16"]


def test_the_table_ends_with_its_result(capsys):
    assert main(SMALL) == 0
    *_, row, result = capsys.readouterr().out.splitlines()
    assert row.endswith("right") and result.startswith("passed: 1 of 1 rows right")


@pytest.mark.parametrize("fault", [lambda out: out + 0.01, lambda out: out * float("nan"), lambda out: out.roll(1, 2)])
def test_a_fault_is_reported(capsys, monkeypatch, fault):
    right = flashmla_ops.fwd_kvcache_mla

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return fault(out), lse

    monkeypatch.setattr(flashmla_ops, "fwd_kvcache_mla", wrong)
    assert main(SMALL) == 1
    *_, row, result = capsys.readouterr().out.splitlines()
    assert "WRONG: out: error" in row and result.startswith("FAILED: 0 of 1 rows right")


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
