"""Installing from a checkout, on a machine that lacks what the CUDA library needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_without_nvcc(tmp_path_factory) -> Path:
    """What `pip wheel .` builds, in pip's isolated environment, where no nvcc is found."""
    work = tmp_path_factory.mktemp("install")
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "__pycache__", "*.egg-info", "*.so", "data", ".hypothesis"
    )
    source = shutil.copytree(ROOT, work / "source", ignore=ignored)
    no_nvcc = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(work), str(source)],
        env={**os.environ, "PATH": no_nvcc, "CUDA_HOME": str(work / "nowhere")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = work.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_package_and_serves_any_python(wheel_without_nvcc):
    assert wheel_without_nvcc.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel_without_nvcc).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "flashmla_ops").rglob("*.py")}
    assert modules <= names


def test_the_reason_for_no_library_is_kept(wheel_without_nvcc):
    with zipfile.ZipFile(wheel_without_nvcc) as wheel:
        reason = wheel.read("flashmla_ops/build_report.txt").decode()
    assert "nvcc was not found" in reason and "install CUDA" in reason


def test_torch_is_the_only_dependency(wheel_without_nvcc):
    with zipfile.ZipFile(wheel_without_nvcc) as wheel:
        (metadata,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11"]
