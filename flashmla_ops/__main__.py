"""python -m flashmla_ops: which versions and devices are here, and which backend is ready, or why not."""

import importlib.metadata
import platform
import shutil
import sys

import torch

import flashmla_ops
from flashmla_ops import backends


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return [f"no CUDA device (torch is {built})"]
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs")
    return found


def report() -> str:
    lines = [
        f"flashmla_ops {flashmla_ops.__version__}",
        f"python       {platform.python_version()}",
        f"torch        {torch.__version__}",
        f"triton       {_version_of('triton')}",
        f"C++ compiler {shutil.which('g++') or 'not found: torch.compile needs one (apt-get install g++)'}",
    ]
    lines += [f"device       {device}" for device in _devices()]
    lines += [f"backend      {name}: {backend.status()}" for name, backend in backends.ALL.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
    sys.exit(0 if any(b.status() == "ready" for b in backends.ALL.values()) else 1)
