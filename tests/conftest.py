"""What every test shares: hypothesis profiles, the compiler that Inductor needs, the backends of this machine."""

import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings

# CI draws the same examples every time; a developer's machine draws new ones
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("dev", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def needs_inductor():
    """Skips where Inductor has no C++ compiler; in CI that is a failure. Gives the test an empty compile cache,
    because the disk cache does not see edits to fake kernels."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        reason = "torch.compile's default backend needs a C++ compiler: apt-get install g++"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False here"))
