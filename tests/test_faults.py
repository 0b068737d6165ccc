"""What goes wrong around the ops: no memory, no launch, no library, forks, threads, several devices."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_backends import python
from test_devices import OPS, WRITTEN, calls, check_equal, run
from test_errors import calls as small_calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashmla_ops import ops, use_backend
from flashmla_ops.backends import sm90, triton

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def forget_the_choice():
    yield
    use_backend(None)


# ------------------------------------------------------------------------------------------------------- out of memory


class NoMemory(TorchDispatchMode):
    """The allocation of this number fails; `allocations` counts them."""

    def __init__(self, failing: int | None = None):
        super().__init__()
        self.failing, self.allocations = failing, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(value.alias_info is None for value in func._schema.returns):  # neither a view nor in place
            if self.allocations == self.failing:
                raise torch.OutOfMemoryError("injected")
            self.allocations += 1
        return func(*args, **kwargs or {})


def copies(call: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}


def check_untouched(call: dict, before: dict) -> None:
    for name, value in call.items():
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), f"{name} was written"


@pytest.mark.parametrize("op", OPS)
def test_no_memory_at_any_allocation_on_the_cpu(op):
    """The op's own function, whose every allocation fails in turn: nothing is written, and the next call is right."""
    call, function = small_calls("cpu")[op], getattr(ops, f"_{op}")
    expected, scratch = run(op, copies(call)), copies(call)
    with NoMemory() as counted:
        function(**scratch)
    assert counted.allocations > 2
    for failing in range(counted.allocations):
        before = copies(call)
        with pytest.raises(torch.OutOfMemoryError, match="injected"), NoMemory(failing):
            function(**call)
        check_untouched(call, before)
        if failing % 10 == 0:
            check_equal(run(op, copies(call)), expected)
    check_equal(run(op, call), expected)


def fill_what_torch_holds() -> list[Tensor]:
    """Takes all memory that torch has from the driver, so that the next allocation has to ask for more."""
    taken = []
    for size in (32 << 20, 4 << 20, 512 << 10, 32 << 10, 512):
        try:
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass
    return taken


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_no_memory_at_any_allocation_on_a_gpu(target, op):
    """No memory but what torch holds, which is taken; then 2 MB more each time, until the call has enough: that is what
    torch takes from the driver for small tensors, and for large ones at least. Ops that only write need none."""
    if target.device == "cpu":
        pytest.skip(f"{target.name} runs on the CPU here")
    call = calls("cuda")[op]
    expected, before = run(op, copies(call)), copies(call)
    total, failures = torch.cuda.get_device_properties(0).total_memory, 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    try:
        torch.cuda.set_per_process_memory_fraction(held / total)
        taken = fill_what_torch_holds()
        for more in range(0, 400 << 20, 2 << 20):
            torch.cuda.set_per_process_memory_fraction((held + more) / total)
            try:
                results = run(op, call)
                break
            except RuntimeError as error:  # torch.OutOfMemoryError, or from the library torch's C interface's error
                assert re.search("out of memory|aoti_torch_empty_strided", str(error)), error
            torch.cuda.set_per_process_memory_fraction(1.0)
            check_untouched(call, before)
            torch.cuda.empty_cache()
            failures += 1
        torch.cuda.set_per_process_memory_fraction(1.0)
        check_equal(results, expected)
        del taken
        check_equal(run(op, before), expected)
        assert failures > 0 or op in WRITTEN, "every allocation was granted: this shows nothing"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---------------------------------------------------------------------------------------------------- failed launches


@pytest.mark.parametrize("op", OPS)
def test_a_launch_that_fails_in_triton_names_the_op(monkeypatch, op):
    """What the compiler or the driver say does not."""

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                raise ValueError("invalid argument")

            return launch

    name = op.removesuffix("_")
    failing = {f"{kernel}_kernel": Kernel() for kernel in ("get_mla_metadata", name)}
    monkeypatch.setattr(triton, "_kernels", lambda: SimpleNamespace(**failing, INTERPRETED=True, PLAIN=0))
    monkeypatch.setattr(triton, "_no_triton", lambda: None)
    call = calls("cpu")[op]
    call = {k: v.half() if isinstance(v, Tensor) and v.dtype is torch.bfloat16 else v for k, v in call.items()}
    use_backend("triton")
    with pytest.raises(RuntimeError, match=f"^{name}: invalid argument"):
        run(op, call)


@pytest.mark.gpu
def test_a_launch_that_fails_in_the_library_names_the_op():
    """A grid without CTAs, which no public call asks for. The next call is right."""
    if (status := sm90.status()) != "ready":
        pytest.skip(f"sm90: {status}")
    call = calls("cuda")["fwd_kvcache_mla"]
    expected = run("fwd_kvcache_mla", call)
    tensors = [call[name] for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    plan = call["tile_scheduler_metadata"]
    with pytest.raises(RuntimeError, match=r"fwd_kvcache_mla: invalid (configuration )?argument"):
        torch.ops.flashmla_sm90.fwd_kvcache_mla.default(*tensors, 0.1, True, plan, 0, 256, None, None, None, 0)
    check_equal(run("fwd_kvcache_mla", call), expected)


@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("*.cu")), ids=lambda path: path.name)
def test_every_launch_of_the_library_is_checked(source):
    """With the name of its op, or of the kernel beside it, first in the message."""
    text = source.read_text()
    named = re.findall(r'cuda_check\((?:cudaGetLastError\(\)|launch_dependent\([^"]*),\s*"([^"]*)"\)', text)
    assert named and len(re.findall(r"launch_dependent\(", text)) <= len(named)
    assert ("<<<" in text) == ("cudaGetLastError()" in text)
    assert all(name.split(":")[0] in source.stem or source.stem.startswith(name.split(":")[0]) for name in named)


# --------------------------------------------------------------------------------------------------------- the library

STATUS = """
import sys, torch
from pathlib import Path
torch.version.cuda = torch.version.cuda or "13.0"  # as in a build for GPUs
import flashmla_ops
from flashmla_ops.backends import sm90
for path in sys.argv[1:]:
    sm90._no_library.cache_clear()
    sm90.LIBRARY = Path(path)
    print(sm90.status(), flush=True)
flashmla_ops.get_mla_metadata(torch.tensor([5], dtype=torch.int32), 16, 1)  # CPU tensors are served all the same
"""


def test_a_library_that_cannot_be_used_is_a_reason_not_a_crash(tmp_path):
    """Missing, truncated anywhere, another one, or for another torch: one that asks torch for what it does not have."""
    whole = (Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so").read_bytes()  # any ELF file
    does_not_load = r"the compiled library does not load \(%s\): reinstall with `pip install --no-build-isolation .`"
    expected = {"missing": r"the compiled library is missing \(.*\): reinstall with `pip .*`"}
    for kept in (0, 10, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"{kept} bytes").write_bytes(whole[:kept])
        reason = "bytes, is no ELF file" if kept < 64 else f"is truncated: {kept} of {len(whole)} bytes"
        expected[f"{kept} bytes"] = does_not_load % f".*{reason}"
    (tmp_path / "another").write_bytes(whole)
    expected["another"] = does_not_load % ".*cuda_versions.*"
    if compiler := shutil.which("g++"):
        source = tmp_path / "library.cpp"
        source.write_text('extern "C" void torch_of_tomorrow(); extern "C" void f() { torch_of_tomorrow(); }')
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(tmp_path / "of tomorrow")]
        subprocess.run(command, check=True)
        expected["of tomorrow"] = does_not_load % ".*undefined symbol: torch_of_tomorrow"
    done = python("-c", STATUS, *(str(tmp_path / name) for name in expected), FLASHMLA_BACKEND="")
    assert done.returncode == 0, done.stderr
    for line, pattern in zip(done.stdout.splitlines(), expected.values(), strict=True):
        assert re.fullmatch(pattern, line), line


# --------------------------------------------------------------------------------------------------- forks and threads

FORK = """
import os, torch, flashmla_ops
from test_devices import OPS, calls, check_equal, run
torch.set_num_threads(1)  # a pool of threads does not survive a fork, torch's as any other's
assert not torch.cuda.is_initialized()  # importing must not: a child could not use the GPU then
child = os.fork()
device = "cuda" if {gpu} else "cpu"
results = [run(op, calls(device)[op]) for op in OPS]
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_fork_after_import(gpu):
    """Parent and child call every op, each for itself."""
    if gpu and (status := sm90.status()) != "ready":
        pytest.skip(f"sm90: {status}")
    done = python("-c", FORK.format(gpu=gpu), PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("streams", ["one stream", pytest.param("a stream each", marks=pytest.mark.gpu)])
def test_threads_call_ops_at_once(target, streams):
    """Each gets what it gets alone."""
    threads, rounds = 6, 2 if target.device == "cpu" else 20

    def prepared(seed: int) -> dict[str, dict]:
        every = calls(target.device, seed)
        if target.name == "triton" and target.device == "cpu":  # its interpreter has no bf16
            every = {op: {k: fp16(v) for k, v in call.items()} for op, call in every.items()}
        return every

    def fp16(value):
        return value.half() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value

    everything = [prepared(seed) for seed in range(threads)]
    names = [op for op in OPS if op not in WRITTEN] if target.device == "cpu" and target.name == "triton" else OPS
    alone = [{op: run(op, copies(every[op])) for op in names} for every in everything]

    def work(thread: int) -> None:
        stream = torch.cuda.Stream() if streams == "a stream each" else None
        with torch.cuda.stream(stream):
            for _ in range(rounds):
                for op in names:
                    check_equal(run(op, copies(everything[thread][op])), alone[thread][op])

    if streams == "a stream each":
        if target.device == "cpu":
            pytest.skip(f"{target.name} runs on the CPU here")
        torch.cuda.synchronize()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


# ------------------------------------------------------------------------------------------------------- two devices

DEVICES = {  # what a second GPU of another kind would say
    0: SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 << 10, major=9, minor=0),
    1: SimpleNamespace(multi_processor_count=84, shared_memory_per_block_optin=99 << 10, major=8, minor=6),
}


def test_what_is_remembered_of_a_device_is_of_that_device(monkeypatch):
    """Capability, multiprocessors and shared memory, in either order of asking."""

    def index(device) -> int:
        return device if isinstance(device, int) else device.index

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: DEVICES[index(d)])
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda d: (DEVICES[index(d)].major, DEVICES[index(d)].minor)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: f"GPU {index(d)}")
    remembered = (sm90._no_device, sm90._parts, triton._no_device, triton._parts, triton._shared_kb)
    devices = [torch.device("cuda", i) for i in DEVICES]
    try:
        for order in (devices, devices[::-1]):
            for function in remembered:
                function.cache_clear()
            for device in (*order, *order):
                first = device.index == 0
                assert sm90._parts(device, 16, 1) == triton._parts(device, 16, 1) == (132 if first else 84)
                assert triton._shared_kb(device) == (227 if first else 99)
                refusal = sm90._no_fwd(device.index)
                assert refusal is None if first else "exactly 9.0, GPU 1 has 8.6" in refusal
                assert sm90._no_device(device.index, sm90.OLDEST_CAPABILITY, "x") is None
    finally:
        for function in remembered:
            function.cache_clear()


def test_a_call_on_one_device_is_not_taken_for_one_on_another():
    """What passed its checks is remembered with the devices of all its tensors."""
    call = calls("cpu")["fwd_kvcache_mla"]
    run("fwd_kvcache_mla", call)
    for name in ("kv_cache", "block_table", "cache_seqlens"):
        with pytest.raises(RuntimeError, match=f"{name}: expected device cpu"):
            run("fwd_kvcache_mla", call | {name: call[name].to("meta")})
