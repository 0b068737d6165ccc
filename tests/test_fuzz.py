"""The short profile of fuzz.py, and that it finds what it is there to find."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from strategies import INTERPRETED

from flashmla_ops import backends

FUZZ = Path(fuzz.__file__)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(FUZZ), *arguments], capture_output=True, text=True, timeout=300)


def test_short_profile(target):
    sequences = 4 if INTERPRETED else 40
    done = run("--target", target.name, "--sequences", str(sequences), "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sequences} sequences of" in done.stdout and "0 failures" in done.stdout


ANSWERS = "for line in __import__('sys').stdin: print('{\"steps\": 5, \"refused\": 1}', flush=True)"


def test_it_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Summed over its runs."""
    monkeypatch.setattr(fuzz.Worker, "command", (sys.executable, "-c", ANSWERS))
    state = tmp_path / "state.json"
    for sequences in (2, 5):
        monkeypatch.setattr(sys, "argv", ["fuzz", "--sequences", str(sequences), "--seed", "7", "--state", str(state)])
        assert fuzz.main() == 0
        summed = f"cpu, seed 7: {sequences} sequences of {5 * sequences} steps, {sequences} calls refused"
        assert capsys.readouterr().out.startswith(summed)
        assert sorted(json.loads(state.read_text())["done"]) == list(range(sequences))
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seed", "8", "--state", str(state)])
    with pytest.raises(SystemExit, match="expected target cpu and seed 8, got cpu, 7"):
        fuzz.main()


# ------------------------------------------------------------------------------------------------------ planted faults


def off_by_a_bit(*arguments, decode=backends.cpu.fwd_kvcache_mla, **uneven):
    out, lse = decode(*arguments, **uneven)
    return out, lse + 1e-3


def reads_a_key_less(q, kv_cache, table, lengths, *arguments, decode=backends.cpu.fwd_kvcache_mla, **uneven):
    return decode(q, kv_cache, table, lengths - (lengths == 65).int(), *arguments[:3], None, *arguments[4:], **uneven)


def writes_a_page_too_many(kv_cache, *arguments, append=backends.cpu.concat_and_cache_mla):
    append(kv_cache, *arguments)
    kv_cache[-1, -1].fill_(1)


def checks_nothing(*arguments, **uneven):
    pass


def runs_out_of_names(*arguments, **uneven):
    raise RuntimeError("something is wrong")


@pytest.mark.parametrize(
    "name, fault, kind",
    [
        ("fwd_kvcache_mla", off_by_a_bit, AssertionError),
        ("fwd_kvcache_mla", reads_a_key_less, AssertionError),
        ("concat_and_cache_mla", writes_a_page_too_many, AssertionError),
        ("check_lengths", checks_nothing, fuzz.Accepted),
        ("check_lengths", runs_out_of_names, RuntimeError),
    ],
)
def test_a_planted_fault_is_found_and_played_again(monkeypatch, name, fault, kind):
    """From the few lines that are printed; without the fault they pass."""
    monkeypatch.setattr(backends.cpu, name, fault)
    drawn = (fuzz.draw(0, number, "cpu") for number in range(300))
    settings, steps = next((settings, steps) for settings, steps in drawn if fuzz.failure(settings, steps))
    short = fuzz.shortened(settings, steps)
    assert len(short) <= 6
    lines = fuzz.reproducer(settings, short)
    with pytest.raises(kind):
        exec(lines, {})
    monkeypatch.undo()
    exec(lines, {})


@pytest.mark.parametrize(
    "code, error",
    [
        ("import time; time.sleep(60)", "hang: longer than 1 s"),
        ("import os; os.abort()", "crash: exit status -6"),
        ("import os; input(); os._exit(0)", "crash: exit status 0"),
    ],
)
def test_hangs_and_crashes_are_failures(monkeypatch, code, error):
    monkeypatch.setattr(fuzz.Worker, "command", (sys.executable, "-c", code))
    monkeypatch.setattr(fuzz.Worker, "start_seconds", 0)
    answer = fuzz.Worker("cpu", 0, 1, 1).play(3)
    assert answer["error"] == error
    settings, steps = fuzz.draw(0, 3, "cpu")
    assert answer["reproducer"] == fuzz.reproducer(settings, steps)
