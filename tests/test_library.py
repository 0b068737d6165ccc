"""The compiled library, built here without a GPU: what it needs of the machine that loads it, and its machine code."""

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LIBRARY = "libflashmla_sm90.so"
NVCC = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc 12.8 or newer: install CUDA, or set CUDA_HOME")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """What `pip wheel .` builds where nvcc and torch are found, in five minutes at most. What nvcc has compiled in this
    checkout since its sources changed, as `pip install .` does, is not compiled again."""
    work = tmp_path_factory.mktemp("library")
    ignored = shutil.ignore_patterns(".*", "lib", "bdist.*", "__pycache__", "*.egg-info", "*.so", "data", "results")
    source = shutil.copytree(ROOT, work / "source", ignore=ignored)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(work), str(source)],
        env={**os.environ, "FLASHMLA_TORCH": str(Path(torch.__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.perf_counter() - start < 300
    (built,) = work.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def library(wheel) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        assert f"flashmla_ops/{LIBRARY}" in archive.namelist(), archive.read("flashmla_ops/build_report.txt").decode()
        return Path(archive.extract(f"flashmla_ops/{LIBRARY}", wheel.parent))


@pytest.mark.parametrize("python", ["3.10", "3.12", "3.14"])
def test_one_wheel_installs_under_every_python(wheel, python, tmp_path):
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--only-binary=:all:"]
    command += ["--python-version", python, "--platform", "linux_x86_64", "--target", str(tmp_path), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flashmla_ops" / LIBRARY).exists()


def test_it_needs_only_the_stable_abi(library):
    """Neither Python nor torch's C++ interface, both of which change between versions; libcudart is linked in."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm: apt-get install binutils")
    nm = subprocess.run(["nm", "-DC", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1].split("@")[0] for line in nm.stdout.splitlines()]
    foreign = [name for name in names if re.match(r"_?Py|(at|c10|torch)::|cuda[A-Z]", name)]
    assert not foreign
    stable = [name for name in names if re.match(r"(aoti_)?torch_", name)]
    assert "aoti_torch_empty_strided" in stable


# ----------------------------------------------------------------------------------------------------- machine code


@pytest.fixture(scope="module")
def sass(library) -> dict[tuple[str, str], str]:
    """(architecture, kernel) -> its instructions."""
    places = [Path(p) / "nvidia" for p in sys.path if Path(p).is_dir()]
    found = [str(p) for place in places for p in place.glob("*/bin/cuobjdump")]
    tool = shutil.which("cuobjdump") or next(iter(found), None)
    if tool is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    if found and tool == found[0]:
        Path(tool).chmod(0o755)
        (Path(tool).parent / "nvdisasm").chmod(0o755)
    text = subprocess.run([tool, "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for piece in text.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", piece)[1]
        for function in piece.split("Function : ")[1:]:
            kernels[arch, function.split(maxsplit=1)[0]] = function
    return kernels


def test_every_kernel_is_there_for_its_architectures(sass):
    def built_for(kernel: str) -> set[str]:
        return {arch for arch, name in sass if f"{kernel}_kernel" in name}

    appends = [f"concat_and_cache_mla{layout}" for layout in ("", "_fp8_blocks", "_fp8_tensor")]
    for kernel in ("get_mla_metadata", "get_mla_metadata_invariant", *appends, "merge_attn_states"):
        assert built_for(kernel) == {"sm_80", "sm_90", "sm_100", "sm_120"}, kernel
    decodes = [f"fwd_kvcache_mla{variant}" for variant in ("", "_few_rows", "_fp8", "_fp8_few_rows", "_fp8_queries")]
    for kernel in (*decodes, "fwd_kvcache_mla_combine", "fwd_kvcache_mla_merge_nodes", "paged_stream"):
        assert built_for(kernel) == {"sm_90a"}, kernel


def test_decoding_runs_on_the_tensor_cores(sass):
    """wgmma, in each kernel and dtype: 36 instructions for a tile's scores, 8 for its values in a pair of tiles or two
    warpgroups; of few rows 36 of two warpgroups' shares, and 16. Those of bf16 and fp16 caches are for segments and for
    units, of even and of uneven queries; of few rows, of 16 or 32 a row tile, for uneven queries 16 of segments and 32
    of units. The fp8 ones, for even and uneven queries, have two formats; of few rows mma, 36 for a warp's scores and
    32 for its values; fp8 queries of more rows are scored by 18 that multiply bytes."""
    many, few, few_fp8 = ("HGMMA", 36 + 8), ("HGMMA", 36 + 16), (r"\bHMMA", 36 + 32)
    kernels = {"": (8, *many), "_few_rows": (12, *few), "_fp8": (8, *many), "_fp8_few_rows": (10, *few_fp8)}
    kernels["_fp8_queries"] = (2, "QGMMA", 18)
    for variant, (instances, name, least) in kernels.items():
        kernel = f"fwd_kvcache_mla{variant}_kernel"
        counts = {key: len(re.findall(name, text)) for (_, key), text in sass.items() if kernel in key}
        assert len(counts) == instances and all(count >= least for count in counts.values()), counts


def test_nothing_spills(sass):
    """No kernel keeps what it works on in local memory."""
    spilled = [key for key, text in sass.items() if re.search(r"\b(LDL|STL)\b", text)]
    assert not spilled
