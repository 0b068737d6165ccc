"""Which backend serves a call: by choice, by force, and the reason when none does."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flashmla_ops import backends, get_mla_metadata, use_backend
from flashmla_ops.plan import CPU_PARTS, make_plan

LENGTHS = torch.tensor([100, 3], dtype=torch.int32)


@pytest.fixture(autouse=True)
def forget_the_choice():
    yield
    use_backend(None)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python on its own; use: python("-c", code, FLASHMLA_BACKEND="cpu")."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_unknown_names_are_refused_with_those_known():
    names = ", ".join(backends.ALL)
    with pytest.raises(RuntimeError, match=rf"backend: expected one of {names} or None, got 'cuda'"):
        use_backend("cuda")
    get_mla_metadata(LENGTHS, 16, 1)  # the choice before still holds


def test_unknown_names_in_the_environment_are_refused_at_import():
    result = python("-c", "import flashmla_ops", FLASHMLA_BACKEND="cuda")
    assert result.returncode == 1 and f"backend: expected one of {', '.join(backends.ALL)}" in result.stderr


def test_the_environment_forces_a_backend():
    code = "import torch, flashmla_ops as f; print(f.get_mla_metadata(torch.tensor([5], dtype=torch.int32), 1, 1)[1])"
    assert python("-c", code, FLASHMLA_BACKEND="cpu").stdout == "tensor([0, 1], dtype=torch.int32)\n"
    assert python("-c", code, FLASHMLA_BACKEND="").stdout == "tensor([0, 1], dtype=torch.int32)\n"


@pytest.mark.parametrize("name", [name for name in backends.ALL if name != "cpu"])
def test_a_forced_backend_that_cannot_serve_says_why(name):
    """CPU tensors, for a backend of another device."""
    use_backend(name)
    with pytest.raises(NotImplementedError, match=f"the forced backend does not serve this call. {name}: .+"):
        get_mla_metadata(LENGTHS, 16, 1)
    use_backend(None)
    get_mla_metadata(LENGTHS, 16, 1)


def test_preference_and_reasons(monkeypatch):
    """Calls go to the first backend that does not refuse; if all do, each one's reason is in the error."""
    served = []
    picky = SimpleNamespace(
        refusal=lambda op, tensor, **facts: None if tensor.shape[0] == 1 else "it serves one row only",
        get_mla_metadata=lambda metadata, num_splits, *arguments: served.append("picky"),
    )
    monkeypatch.setattr(backends, "ALL", {"picky": picky, **backends.ALL})
    use_backend(None)
    get_mla_metadata(LENGTHS[:1], 16, 1)
    assert served == ["picky"]
    assert torch.equal(get_mla_metadata(LENGTHS, 16, 1)[1], make_plan(LENGTHS, CPU_PARTS)[1]) and served == ["picky"]

    use_backend("picky")
    with pytest.raises(NotImplementedError, match=r"get_mla_metadata: the forced .* picky: it serves one row only$"):
        get_mla_metadata(LENGTHS, 16, 1)
    monkeypatch.setattr(backends.cpu, "refusal", lambda op, tensor, **facts: "it is resting")
    use_backend(None)
    with pytest.raises(NotImplementedError, match=r"no backend .* picky: it serves one row only; .*cpu: it is resting"):
        get_mla_metadata(LENGTHS, 16, 1)


def test_compiled_code_follows_the_choice():
    """The choice is made at run time, so nothing is compiled again for it."""
    torch._dynamo.reset()
    compiled = torch.compile(get_mla_metadata, fullgraph=True, backend="aot_eager")
    before = compiled(LENGTHS, 16, 1)
    use_backend("cpu")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert all(torch.equal(a, b) for a, b in zip(compiled(LENGTHS, 16, 1), before, strict=True))


def test_the_report_lists_every_backend():
    result = python("-m", "flashmla_ops")
    assert result.returncode == 0, result.stderr
    for name, backend in backends.ALL.items():
        assert f"backend      {name}: {backend.status()}" in result.stdout.splitlines()
    assert backends.ALL["cpu"].status() == "ready"
