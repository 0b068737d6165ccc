"""Builds the CUDA library where nvcc and torch's headers are found; elsewhere it installs without, and says why.

The library is compiled against torch's stable ABI and has no Python symbols: one build serves every torch >= 2.11 and
every Python. `python setup.py kernels` builds it into the checkout; `pip install .` builds it into the wheel.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "kernels"
LIBRARY = "libflashmla_sm90.so"
REPORT = "build_report.txt"  # why there is no library: pip hides what a build prints

MIN_NVCC = (12, 8)  # the first with sm_120
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch that may load the library
ANY_ARCH = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90, 100, 120)]
ANY_ARCH.append("-gencode=arch=compute_80,code=compute_80")
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]


class Unbuildable(Exception):
    """Why the library can't be built here, as a sentence with what would make it so."""


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if nvcc is None:
        raise Unbuildable(
            f"nvcc was not found in {home}/bin or on PATH: install CUDA {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer (or set "
            "CUDA_HOME) and install flashmla_ops again"
        )
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", answer)
    if version is None or tuple(map(int, version.groups())) < MIN_NVCC:
        found = ".".join(version.groups()) if version else "an unknown version"
        raise Unbuildable(f"{nvcc} is {found}: the kernels need CUDA {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer")
    return nvcc


def find_torch() -> Path:
    """The torch that the library will be loaded by: not the build environment's, but this interpreter's own."""
    if given := os.environ.get("FLASHMLA_TORCH"):
        torch = Path(given)
    else:
        hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")  # what pip's build isolation sets
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
        answer = subprocess.run(
            [sys.executable, "-c", ask], capture_output=True, text=True, env=environment
        ).stdout.strip()
        if not answer:
            raise Unbuildable(
                f"{sys.executable} has no torch, whose headers the build needs: install torch first, then flashmla_ops "
                "with --no-build-isolation, or set FLASHMLA_TORCH to the installed package's folder"
            )
        torch = Path(answer).parent
    if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise Unbuildable(
            f"{torch}/include has no torch/csrc/stable/library.h: expected the folder of torch 2.11 or newer"
        )
    return torch


def build_library(package: Path) -> None:
    """Compiles what changed, two files at a time or as many as there are cores, and links it into `package`."""
    nvcc, torch = find_nvcc(), find_torch()
    headers = [p.stat().st_mtime for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh")]
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}", "-DUSE_CUDA"]
    flags += ["--threads=0", "-lineinfo", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = OBJECTS / (source.relative_to(CSRC).as_posix().replace("/", "_") + ".o")
        newest = max([source.stat().st_mtime, Path(__file__).stat().st_mtime, *headers])
        if not target.exists() or target.stat().st_mtime < newest:
            arch = HOPPER if source.parent.name == "sm90" else ANY_ARCH
            include = [f"-I{torch}/include"] if source.suffix == ".cpp" else []
            print(f"nvcc {source.relative_to(ROOT)}", flush=True)
            run(
                [
                    nvcc,
                    "-c",
                    str(source),
                    "-o",
                    str(target),
                    *flags,
                    *include,
                    *(arch if source.suffix == ".cu" else []),
                ]
            )
        return target

    sources = sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cpp")], key=lambda p: -p.stat().st_size)  # long ones first
    if not sources:
        raise Unbuildable(f"{CSRC} has no sources: install from a checkout or a source distribution")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(compile_one, sources)]
    # torch loads its own libraries locally, so the symbols must come from a link against libtorch
    link = ["-shared", "-cudart", "static", "-Xlinker", "--no-as-needed", f"-L{torch}/lib", "-ltorch"]
    run([nvcc, *objects, "-o", str(package / LIBRARY), *HOPPER, *link])


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Unbuildable(f"nvcc failed ({' '.join(command[:4])} ...):\n{done.stdout[-4000:]}")


def build_or_report(package: Path) -> bool:
    """Builds the library into `package`, or leaves the reason there for the backend report."""
    package.mkdir(parents=True, exist_ok=True)
    try:
        build_library(package)
    except Unbuildable as reason:
        (package / LIBRARY).unlink(missing_ok=True)
        (package / REPORT).write_text(f"{reason}\n")
        print(f"flashmla_ops: installing without CUDA kernels: {reason}", file=sys.stderr)
        return False
    (package / REPORT).unlink(missing_ok=True)
    return True


class BuildPyAndKernels(build_py):
    def run(self):
        super().run()
        package = ROOT / "flashmla_ops" if self.editable_mode else Path(self.build_lib) / "flashmla_ops"
        self.distribution.has_kernels = build_or_report(package)


class Kernels(Command):
    description = "build the CUDA library into the checkout"
    user_options: ClassVar[list] = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        if not build_or_report(ROOT / "flashmla_ops"):
            sys.exit(1)


class Wheel(bdist_wheel):
    """py3-none-linux_x86_64 with the library, which knows no Python; py3-none-any without."""

    def get_tag(self):
        if not getattr(self.distribution, "has_kernels", False):
            return super().get_tag()
        return "py3", "none", self.plat_name.replace("-", "_") if self.plat_name else "linux_x86_64"


class Sources(sdist):
    def add_defaults(self):
        super().add_defaults()
        self.filelist.extend(str(p.relative_to(ROOT)) for p in CSRC.rglob("*") if p.is_file())


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPyAndKernels, "kernels": Kernels, "bdist_wheel": Wheel, "sdist": Sources})
