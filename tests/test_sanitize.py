"""What `python tests/sanitize.py` does, in short: the planted faults, and all cases under memcheck."""

import pytest
import sanitize


@pytest.mark.gpu
def test_planted_faults_are_found_and_memcheck_finds_nothing():
    if reason := sanitize.why_not():
        pytest.skip(reason)
    rows = [*sanitize.plant_faults(list(sanitize.FAULTS)), sanitize.watch_cases("memcheck")]
    if any("Device not supported" in row.output for row in rows):
        pytest.skip("compute-sanitizer does not support this machine's GPU or its driver")
    assert all(row.ok for row in rows), "\n".join(f"{row.line()}\n{row.output}" for row in rows if not row.ok)


def test_the_cases_are_right_on_the_cpu(capsys):
    """So that what a tool finds in them is the kernels'."""
    assert sanitize.main(["--cases", "all", "--device", "cpu"]) == 0
    assert sanitize.RIGHT.search(capsys.readouterr().out)
