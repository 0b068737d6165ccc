"""How the benchmark times calls on a GPU: as nodes of a CUDA graph, from a cold L2, the median of some replays."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALLOCATIONS = 5  # of each row's tensors, at fresh addresses
REPLAYS = 21  # per allocation; the median counts
# A short call is timed as one of many nodes of a graph, each with tensors of its own: starting the graph would else
# count for 2 us, as much as the call.
DECODE_NODES, DECODE_BYTES = 16, 200 << 20
HOST_CALLS, HOST_ROUNDS = 50, 10
FLUSH_BYTES = 512 << 20  # ten times the L2 of a Hopper
MATMUL = 8192


class Replay:
    """Calls captured in a CUDA graph, one after the other, and kept: the graph reads their tensors."""

    def __init__(self, calls: Sequence[Callable]):
        self.calls = calls
        for call in calls:
            call()
        torch.cuda.synchronize()  # what they read may have been made on another stream than the capture's
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs: list[tuple[Tensor, ...]] = [tuple(call() or ()) for call in calls]

    def time(self, flush: Callable[[], object]) -> float:
        """Microseconds a call in one replay; no output of an earlier one is left, in L2 or elsewhere."""
        for t in itertools.chain.from_iterable(self.outputs):
            t.fill_(math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(self.calls)


class ColdL2:
    """Evicts L2 by a read: a write would leave dirty lines, whose way to memory the next kernel would pay."""

    def __init__(self):
        assert 2 * torch.cuda.get_device_properties(0).L2_cache_size <= FLUSH_BYTES
        self.buffer = torch.randn(FLUSH_BYTES // 4, device="cuda")
        self.sum = torch.empty((), device="cuda")

    def __call__(self) -> None:
        torch.sum(self.buffer, (0,), out=self.sum)


def median_us(replays: Sequence[Replay], flush: ColdL2) -> list[float]:
    """The median of each, taking turns."""
    times = [[replay.time(flush) for replay in replays] for _ in range(REPLAYS)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def host_us(run: Callable) -> float:
    """What an eager call costs the host, which never waits for the GPU: the least of some means, since other work on
    the machine only ever adds."""
    means = []
    with torch.inference_mode():
        run()
        for _ in range(HOST_ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                run()
            means.append((time.perf_counter() - start) / HOST_CALLS)
    torch.cuda.synchronize()
    return min(means) * 1e6


def matrix_tflops(flush: ColdL2) -> float:
    a, b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * MATMUL**3 / median_us([Replay([lambda: (a @ b,)])], flush)[0] / 1e6


def nodes_for(most: int, most_bytes: int, bytes_moved: int) -> int:
    """How many copies of a call its graph holds: as many as fit in `most_bytes`."""
    return max(1, min(most, most_bytes // max(bytes_moved, 1)))


def pages_in_use(block_table: Tensor, cache_seqlens: Tensor, page_size: int) -> Tensor:
    """The pages of the rows and no others, in the order of the table: [n] int32."""
    column = torch.arange(block_table.shape[1], device=block_table.device)
    return block_table[column * page_size < cache_seqlens[:, None]]
