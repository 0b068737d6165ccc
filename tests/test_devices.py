"""Where and when ops run: on the device of their tensors, whichever is current, and on torch's current stream there."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from flashmla_ops import backends, get_mla_metadata
from flashmla_ops.testing import make_append_case, make_decode_case, make_merge_case

pytestmark = pytest.mark.gpu
WRITTEN = {"get_mla_metadata_": ("tile_scheduler_metadata", "num_splits"), "concat_and_cache_mla": ("kv_cache",)}
OPS = ("get_mla_metadata", "get_mla_metadata_", "fwd_kvcache_mla", "concat_and_cache_mla", "merge_attn_states")
SLEEP_CYCLES = 400_000_000  # 0.2 s: queueing the calls below takes less


@pytest.fixture(autouse=True, params=["sm90", "triton"])
def backend(request):
    """Each backend of this machine's GPUs in turn, forced."""
    if (status := backends.ALL[request.param].status()) != "ready":
        pytest.skip(f"{request.param}: {status}")
    backends.use_backend(request.param)
    yield
    backends.use_backend(None)


@pytest.fixture
def needs_two_gpus():
    names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())][:2]
    if len(names) < 2:
        pytest.skip(f"needs two GPUs; torch.cuda.device_count() is {len(names)} here")
    if names[0] != names[1]:
        pytest.skip(f"needs two GPUs of one kind, whose results are the same bit for bit; here are {names}")


def calls(device: str, seed: int = 0) -> dict[str, dict]:
    """A good call of each op, of the same values on every device. Rows are long enough to be split."""
    decode = make_decode_case([5000, 0, 1, 700], s_q=2, h_q=20, causal=True, seed=seed).to(device)
    plan = dict(zip(WRITTEN["get_mla_metadata_"], get_mla_metadata(*decode.plan_args), strict=True))
    plan_args = dict(zip(("cache_seqlens", "num_heads_per_head_k", "num_heads_k"), decode.plan_args, strict=True))
    return {
        "get_mla_metadata": plan_args,
        "get_mla_metadata_": plan_args | {name: torch.zeros_like(t) for name, t in plan.items()},
        "fwd_kvcache_mla": decode.kwargs() | plan,
        "concat_and_cache_mla": make_append_case(300, skip=0.2, seed=seed).to(device).kwargs(),
        "merge_attn_states": make_merge_case(5, 2, 20, seed=seed).to(device).kwargs(),
    }


def run(op: str, call: dict) -> list[Tensor]:
    """What the op returns, or else writes."""
    returned = getattr(torch.ops.flashmla, op)(**call)
    return [call[name] for name in WRITTEN[op]] if returned is None else list(returned)


def check_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


# ------------------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("op", OPS)
def test_ops_run_on_the_device_of_their_tensors(needs_two_gpus, op):
    """The second GPU's, while the first is current; bit for bit what the first gives, and the first stays current."""
    with torch.cuda.device(0):
        second = run(op, calls("cuda:1")[op])
        assert torch.cuda.current_device() == 0
        assert all(t.device == torch.device("cuda:1") for t in second)
        check_equal(second, run(op, calls("cuda:0")[op]))


@pytest.mark.parametrize("current", [0, 1])
def test_both_devices_at_once(needs_two_gpus, current):
    """Calls to one after the other, none waited for: each gives what it gives alone."""
    with torch.cuda.device(current):
        seeds = {"cuda:0": 0, "cuda:1": 1}
        alone = {device: [run(op, calls(device, seed)[op]) for op in OPS] for device, seed in seeds.items()}
        ready = {device: [calls(device, seed) for _ in range(20)] for device, seed in seeds.items()}
        torch.cuda.synchronize("cuda:0")
        torch.cuda.synchronize("cuda:1")
        mixed = [
            (device, n, run(OPS[n], ready[device][i][OPS[n]])) for i in range(20) for n in range(5) for device in seeds
        ]
        assert torch.cuda.current_device() == current
        for device, n, results in mixed:
            check_equal(results, alone[device][n])


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.fixture(params=["cuda:0", "cuda:1"])
def device(request) -> str:
    if request.param == "cuda:1":
        request.getfixturevalue("needs_two_gpus")
    return request.param


@contextmanager
def behind_a_long_kernel(device: str, op: str):
    """Makes a new stream torch's current one on `device`, busy for a while, and device 0 current. On leaving, it makes
    sure that the stream was busy until then: all that was queued there had to wait."""
    stream, woken = torch.cuda.Stream(device), torch.cuda.Event()
    with torch.cuda.stream(stream):
        run(op, calls(device)[op])  # torch now has memory for this stream: taking more from the driver may wait
        torch.cuda.synchronize(device)
        torch.cuda._sleep(SLEEP_CYCLES)
        woken.record(stream)
        with torch.cuda.device(0):
            yield
        assert not woken.query(), "the calls took longer than the kernel before them: this shows nothing"
    torch.cuda.synchronize(device)


@pytest.mark.parametrize("op", OPS)
def test_ops_wait_for_what_their_stream_does_before(device, op):
    """Their inputs are written on a side stream, after a kernel that takes long. On another stream the op would read
    what was there before."""
    call = calls(device)[op]
    expected = run(op, calls(device)[op])
    late = {name: torch.zeros_like(value) if isinstance(value, Tensor) else value for name, value in call.items()}
    with behind_a_long_kernel(device, op):
        for name, value in call.items():
            if isinstance(value, Tensor):
                late[name].copy_(value, non_blocking=True)
        results = run(op, late)
    check_equal(results, expected)


def test_what_follows_on_the_stream_waits_for_the_op(device):
    """The op's outputs are copied on its side stream: the copy sees them."""
    call = calls(device)["fwd_kvcache_mla"]
    expected = run("fwd_kvcache_mla", call)
    copies = [torch.zeros_like(t) for t in expected]
    with behind_a_long_kernel(device, "fwd_kvcache_mla"):
        for copy, result in zip(copies, run("fwd_kvcache_mla", call), strict=True):
            copy.copy_(result, non_blocking=True)
    check_equal(copies, expected)


@pytest.mark.parametrize("op", OPS)
def test_a_graph_on_the_second_device(needs_two_gpus, op):
    """Captured there, and replayed on other values."""
    call = calls("cuda:1")[op]
    run(op, call)
    torch.cuda.synchronize("cuda:1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(graph, stream=torch.cuda.Stream("cuda:1")):
        results = run(op, call)
    other = calls("cuda:1", seed=1)[op]
    for name, value in other.items():
        if isinstance(value, Tensor):
            call[name].copy_(value)
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.device(1):
        graph.replay()
    torch.cuda.synchronize("cuda:1")
    assert torch.cuda.current_device() == 0
    check_equal(results, run(op, other))
