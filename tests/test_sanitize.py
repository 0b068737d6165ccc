"""What `python tests/sanitize.py` does, in short: the planted faults, and all cases under memcheck.

That the cases reach every kernel, and what it makes of racecheck's reports."""

import re
import shutil
import subprocess

import pytest
import sanitize
import torch
from sanitize import DECODE, HANDOVERS, PLANTED_HANDOVERS, Access, Handover

from flashmla_ops import backends
from flashmla_ops.backends import sm90


@pytest.mark.gpu
def test_planted_faults_are_found_and_memcheck_finds_nothing():
    if reason := sanitize.why_not():
        pytest.skip(reason)
    rows = [*sanitize.plant_faults(list(sanitize.FAULTS)), sanitize.watch_cases("memcheck")]
    if any("Device not supported" in row.output for row in rows):
        pytest.skip("compute-sanitizer does not support this machine's GPU or its driver")
    assert all(row.ok for row in rows), "\n".join(f"{row.line()}\n{row.output}" for row in rows if not row.ok)


@pytest.mark.gpu
def test_memcheck_finds_nothing_in_triton_s_kernels():
    if reason := sanitize.why_not():
        pytest.skip(reason)
    if (status := backends.ALL["triton"].status()) != "ready":
        pytest.skip(f"triton: {status}")
    row = sanitize.watch_cases("memcheck", backend="triton")
    if "Device not supported" in row.output:
        pytest.skip("compute-sanitizer does not support this machine's GPU or its driver")
    assert row.ok, f"{row.line()}\n{row.output}"


def test_the_cases_are_right_on_the_cpu(capsys):
    """So that what a tool finds in them is the kernels'."""
    for backend in ("sm90", "triton"):
        assert sanitize.main(["--cases", "all", "--device", "cpu", "--backend", backend]) == 0
        assert sanitize.RIGHT.search(capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------- which kernels


def kernels(text: str) -> set[str]:
    """The library's kernels, with their template arguments, of what nm or the profiler calls them."""
    names = re.findall(r"(\w+_kernel(?:<.+>)?)\((?:(?:flashmla::)?\w*Params|int\*)", text)
    return {re.sub(r"(?:flashmla|sm90|\(anonymous namespace\))::", "", name) for name in names}


def test_kernels_are_told_by_their_instances():
    inner = "flashmla::sm90::(anonymous namespace)::"
    text = f"""\
0004 t void {inner}merge_kernel<__half, {inner}ByRows, 1, (flashmla::CacheFormat)2, true>(flashmla::FwdParams)
0005 t void {inner}merge_kernel<__half, {inner}ByRows, 8, (flashmla::CacheFormat)2, true>(flashmla::FwdParams) [cold]
0006 t {inner}clear_kernel(int*, int)
0007 t __device_stub__ZN8flashmla4sm9051_GLOBAL__12clear_kernelEPii(int*, int)
0008 b allow<&({inner}other_kernel<true>(flashmla::FwdParams))>(int, char const*)::allowed
void at::native::some_kernel<int>(int)"""
    instances = {f"merge_kernel<__half, ByRows, {n}, (CacheFormat)2, true>" for n in (1, 8)}
    assert kernels(text) == {*instances, "clear_kernel", "other_kernel<true>"}


@pytest.mark.gpu
def test_the_cases_reach_every_kernel(monkeypatch):
    if (status := sm90.status()) != "ready":
        pytest.skip(f"sm90: {status}")
    if (count := torch.cuda.get_device_properties(0).multi_processor_count) != 132:
        pytest.skip(f"the batches are those at which 132 multiprocessors change kernels, this GPU has {count}")
    if shutil.which("nm") is None:
        pytest.skip("needs nm: apt-get install binutils")
    library = subprocess.run(["nm", "-C", str(sm90.LIBRARY)], capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(backends, "in_use", backends.in_use)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert sanitize.run_cases("all", "cuda", "sm90") == 0
        torch.cuda.synchronize()
    launched = kernels("\n".join(event.key for event in profile.key_averages()))
    missing = kernels(library) - launched
    assert launched and not missing, sorted(missing)


# -------------------------------------------------------------------------------------------------- racecheck's reports

REPORTS = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void handover<(bool)0>(int *)+0x120 in /a/faults.cu:19
=========     and Read access at void handover<(bool)0>(int *, const int *)+0x240 in /a/faults.cu:20 [512 hazards]
=========         Device Frame: handover [0x240] in /a/faults.cu:40
=========     and Write access at 0x250 in /a/other.cuh:7:handover(int *) [4 hazards]
=========
========= Warning: Race reported between Read access at a::(anonymous namespace)::f(T1)+0x1 and Write access at b.cu:3
========= ERROR: Race reported between Write access at f(T1)+0x1 in b.cu:5 and Read access at g(T1)+0x2 in b.cu:6
=========
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)
"""


def test_reports_are_parsed_in_every_form():
    assert sanitize.parse_races(REPORTS) == [
        [Access("Write", "faults.cu", 19), Access("Read", "faults.cu", 20), Access("Write", "other.cuh", 7)],
        [Access("Read", "", 0), Access("Write", "b.cu", 3)],
        [Access("Write", "b.cu", 5), Access("Read", "b.cu", 6)],
    ]
    assert sanitize.parse_races("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == []


@pytest.mark.parametrize("handover", PLANTED_HANDOVERS + HANDOVERS, ids=lambda h: f"{h.leave}-{h.take}")
def test_hand_overs_are_found_in_the_sources(handover):
    for file, name in [sanitize.located(handover.source, name) for name in (handover.leave, handover.take)]:
        found = sanitize.function_lines(file.read_text(), name)
        body = file.read_text().splitlines()[found.start - 1 : found.stop - 1]
        assert name in body[0] and body[-1].endswith("}") and len(body) < 40
        assert "shared" in "".join(body) and sum(line.startswith("__device__") for line in body) == 1


def handed_over(handover: Handover = HANDOVERS[0]) -> list[Access]:
    """A report of a write and a read in these functions."""
    places = (sanitize.places(handover.source, name) for name in (handover.leave, handover.take))
    return [Access(kind, *max(lines)) for kind, lines in zip(("Write", "Read"), places, strict=True)]


@pytest.mark.parametrize("handover", PLANTED_HANDOVERS + HANDOVERS, ids=lambda h: f"{h.leave}-{h.take}")
def test_only_hand_overs_are_accepted(handover):
    write, read = handed_over(handover)
    assert sanitize.is_handover([write, read], [handover]) and sanitize.is_handover([read, write, write], [handover])
    outside = write._replace(line=1)
    kinds = write._replace(kind="Read"), read._replace(kind="Write")
    for race in ([write], [write, write], [write, read, write], [outside, read], [write, outside], [*kinds]):
        assert not sanitize.is_handover(race, [handover])
    assert not sanitize.is_handover([write, read._replace(file="other.cu")], [handover])
    assert not sanitize.is_handover([write, read._replace(kind="Atomic")], [handover])
    others = [h for h in HANDOVERS if h.leave != handover.leave]
    assert not sanitize.is_handover([write, read], others)


@pytest.fixture
def racecheck(tmp_path, monkeypatch):
    """Makes compute-sanitizer a program that prints these reports, and a summary that counts so many."""

    def prints(races, counted=None, cases=2, status=1):
        text = f"{cases} cases right\n" if cases else ""
        for (kind, file, line), *others in races:
            text += f"========= Error: Race reported between {kind} access at f(T1)+0x10 in /a/{file}:{line}\n"
            for kind, file, line in others:
                text += f"=========     and {kind} access at f(T1)+0x20 in /a/{file}:{line} [8 hazards]\n"
            text += "=========\n"
        n = len(races) if counted is None else counted
        text += f"========= RACECHECK SUMMARY: {n} hazards displayed ({n} errors, 0 warnings)\n"
        (tmp_path / "text").write_text(text)
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\ncat {tmp_path}/text\nexit {status}\n")
        program.chmod(0o755)

    monkeypatch.setattr(sanitize, "PATH", f"{tmp_path}:/usr/bin:/bin")
    return prints


@pytest.fixture
def planted(racecheck):
    """What racecheck says of the correct hand-over: it reports it."""
    racecheck([handed_over(PLANTED_HANDOVERS[0])])
    row = sanitize.watch("racecheck", "handover", ["faults"], sanitize.is_right, PLANTED_HANDOVERS)
    assert row.ok and len(row.accepted) == 1
    return [row]


def test_reports_of_hand_overs_are_accepted_beside_a_correct_one(racecheck, planted):
    races = [handed_over(), handed_over(HANDOVERS[1])]
    racecheck(races)
    row = sanitize.watch_cases("racecheck", planted)
    assert (row.ok, row.errors, row.accepted) == (True, 0, races)
    assert row.verdict.startswith("as expected; accepted: 2 of hand-overs")

    racecheck([], status=0)  # no report of the correct one
    silent = sanitize.watch("racecheck", "handover", ["faults"], sanitize.is_right, PLANTED_HANDOVERS)
    assert (silent.ok, silent.accepted, silent.verdict) == (True, [], "as expected")
    racecheck(races)
    for before in ([silent], []):
        row = sanitize.watch_cases("racecheck", before)
        assert (row.ok, row.errors, row.accepted) == (False, 2, [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"races": [handed_over(), handed_over()[::-1] + handed_over()[1:]]},  # a read with a read
        {"races": [handed_over(), [Access("Write", DECODE.name, 1), Access("Read", DECODE.name, 2)]]},
        {"counted": 2},
        {"counted": 0, "races": [handed_over()[:1], handed_over()]},
        {"cases": 0},
        {"status": 139},
    ],
    ids=str,
)
def test_anything_else_fails(racecheck, planted, wrong):
    racecheck(**{"races": [handed_over()], **wrong})
    row = sanitize.watch_cases("racecheck", planted)
    assert not row.ok and row.verdict.startswith("FAILED") and len(row.accepted) == 1


def test_a_wrong_hand_over_excuses_nothing(racecheck):
    racecheck([handed_over(PLANTED_HANDOVERS[0])], cases=0)
    row = sanitize.watch("racecheck", "handover", ["faults"], sanitize.is_right, PLANTED_HANDOVERS)
    assert not row.ok
    racecheck([handed_over()])
    assert not sanitize.watch_cases("racecheck", [row]).ok
