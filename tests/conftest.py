"""What every test shares: hypothesis profiles, the compiler that Inductor needs, the backends of this machine."""

import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings
from strategies import INTERPRETED, TARGETS, invariant_refusal

from flashmla_ops import backends

# CI draws the same examples every time; a developer's machine draws new ones
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("dev", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(params=["cpu", pytest.param("sm90", marks=pytest.mark.gpu), "triton"])
def target(request):
    """Each backend of this machine in turn, forced; one that is not ready here skips the test with its reason."""
    name = request.param
    if name == "triton" and INTERPRETED and request.node.get_closest_marker("large"):
        pytest.skip("triton: too large for Triton's interpreter")
    if request.node.get_closest_marker("fp8") and not TARGETS[name].fp8:
        pytest.skip(f"{name}: it does not serve fp8 caches")
    status = backends.ALL[name].status() if name in backends.ALL else "this version has no such backend"
    if status != "ready":
        pytest.skip(f"{name}: {status}")
    backends.use_backend(name)
    yield TARGETS[name]
    backends.use_backend(None)


@pytest.fixture
def invariant(target):
    """The targets that make batch-invariant plans."""
    if reason := invariant_refusal(target):
        pytest.skip(reason)
    return target


@pytest.fixture
def uneven_invariant(target):
    """Those that make them for uneven queries."""
    if reason := invariant_refusal(target, uneven=True):
        pytest.skip(reason)
    return target


@pytest.fixture(params=[False, True], ids=["balanced", "invariant"])
def uneven_plans(request, target) -> dict:
    """Keywords of get_mla_metadata, for plans of either kind that the target makes of uneven queries."""
    if not request.param:
        return {}
    request.getfixturevalue("uneven_invariant")
    return {"batch_invariant": True}


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
