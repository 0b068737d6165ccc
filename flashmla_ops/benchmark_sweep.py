"""python -m flashmla_ops.benchmark --sweep: fwd_kvcache_mla over many lengths, batches and numbers of heads.

The benchmark's rows are a few points; sweeps show the steps and spikes in between. Every point is a CUDA graph of NODES
calls on pages of their own, planned beforehand, from a cold L2. All points share one process and one cache, and their
results are checked for being written and finite only: the rows and the tests check values.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import sm90
from .benchmark_timing import ColdL2, Replay
from .functional import fwd_kvcache_mla, get_mla_metadata

D_QK, D_V, PAGE_SIZE = 576, 512, 64
NODES = 8  # the same for every point: the start of the graph, which they share, must not make a step of its own
REPLAYS = 5  # the median counts
SPIKE = 1.15  # of the line between a point's neighbours
COLUMNS = 8  # points on a line of the table


@dataclass(frozen=True)
class Sweep:
    x: str  # what changes: "s_k", "b" or "h_q"
    values: tuple[int, ...]
    fixed: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return f"{self.x} with " + ", ".join(f"{name} {value}" for name, value in self.fixed)

    def points(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Each value, and with it b, h_q and s_k."""
        for value in self.values:
            yield value, {**dict(self.fixed), self.x: value}


def _sweeps() -> Iterator[Sweep]:
    for h_q in (128, 16):
        for b in (1, 32):
            yield Sweep("s_k", tuple(range(64, 4097, 64)), (("b", b), ("h_q", h_q)))
    yield Sweep("b", (*range(1, 17), *range(24, 257, 8)), (("h_q", 16), ("s_k", 2048)))
    yield Sweep("h_q", tuple(range(4, 129, 4)), (("b", 32), ("s_k", 2048)))


SWEEPS = list(_sweeps())


def pages_needed(b: int, s_k: int) -> int:
    return NODES * b * -(-s_k // PAGE_SIZE)


def spikes(points: Sequence[dict]) -> list[dict]:
    """The points that lie more than SPIKE above the straight line between their neighbours; `over` says how much."""
    found = []
    for before, point, after in zip(points, points[1:], points[2:], strict=False):
        share = (point["x"] - before["x"]) / (after["x"] - before["x"])
        line = before["us"] + share * (after["us"] - before["us"])
        if point["us"] > SPIKE * line:
            found.append({**point, "over": point["us"] / line})
    return found


# -------------------------------------------------------------------------------------------------------------- timing


def _calls(kv_cache: Tensor, b: int, h_q: int, s_k: int) -> list[Callable]:
    """A graph's calls; no two read the same page."""
    device, columns = kv_cache.device, -(-s_k // PAGE_SIZE)
    pages = torch.randperm(kv_cache.shape[0], device=device)[: pages_needed(b, s_k)].int().view(NODES, b, columns)
    cache_seqlens = torch.full((b,), s_k, dtype=torch.int32, device=device)
    plan = get_mla_metadata(cache_seqlens, h_q, 1)
    q = torch.randn(NODES, b, 1, h_q, D_QK, dtype=kv_cache.dtype, device=device)
    scale = D_QK**-0.5
    return [
        lambda q=q[i], table=pages[i]: fwd_kvcache_mla(q, kv_cache, table, cache_seqlens, D_V, scale, False, *plan)
        for i in range(NODES)
    ]


def time_point(kv_cache: Tensor, flush: ColdL2, b: int, h_q: int, s_k: int) -> float:
    replay = Replay(_calls(kv_cache, b, h_q, s_k))
    us = statistics.median(replay.time(flush) for _ in range(REPLAYS))
    for out, lse in replay.outputs:
        assert out.isfinite().all() and lse.isfinite().all(), f"b {b}, h_q {h_q}, s_k {s_k}: the result is not finite"
    return us


def measure(sweeps: Sequence[Sweep]) -> Iterator[tuple[str, dict]]:
    """Each sweep's name, and its points and spikes."""
    torch.manual_seed(0)
    flush = ColdL2()
    points = [shape for sweep in sweeps for _, shape in sweep.points()]
    num_pages = max(pages_needed(shape["b"], shape["s_k"]) for shape in points)
    kv_cache = torch.randn(num_pages, PAGE_SIZE, 1, D_QK, dtype=torch.bfloat16, device="cuda")
    time_point(kv_cache, flush, **points[0])  # the first graph of a process starts slowly
    for sweep in sweeps:
        timed = []
        for x, shape in sweep.points():
            timed.append({"x": x, "us": time_point(kv_cache, flush, **shape)})
        yield sweep.name, {"x": sweep.x, **dict(sweep.fixed), "points": timed, "spikes": spikes(timed)}


# --------------------------------------------------------------------------------------------------------------- table


def table(name: str, sweep: dict) -> Iterator[str]:
    yield f"{name}: us a call"
    points = sweep["points"]
    for i in range(0, len(points), COLUMNS):
        yield "  " + " ".join(f"{point['x']:6d} {point['us']:7.1f}" for point in points[i : i + COLUMNS])
    if not sweep["spikes"]:
        yield f"  no point lies more than {100 * (SPIKE - 1):.0f} % above the line between its neighbours"
    for point in sweep["spikes"]:
        over = 100 * (point["over"] - 1)
        yield f"  {sweep['x']} {point['x']}: {point['us']:.1f} us, {over:.0f} % above the line between its neighbours"


def run(machine: Callable[[], dict], write: Callable[[dict], None]) -> tuple[dict, int]:
    """Measures and prints; calls `write` with all there is after every sweep. Returns that and the exit status."""
    if (status := sm90.status()) != "ready":
        print(f"--sweep: {status}")
        return {}, 1
    document = {"machine": machine(), "sweeps": (sweeps := {})}
    print(", ".join(f"{k} {v}" for k, v in document["machine"].items()), flush=True)
    for name, sweep in measure(SWEEPS):
        sweeps[name] = sweep
        print(*table(name, sweep), sep="\n", flush=True)
        write(document)
    return document, 0


def plot(document: dict, path: str) -> None:
    """A panel for each sweep; spikes are marked."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit('--plot needs matplotlib: pip install "flashmla_ops[bench]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = document["sweeps"]
    rows = -(-len(sweeps) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(14, 4 * rows), layout="constrained", squeeze=False)
    figure.suptitle(f"fwd_kvcache_mla on {document['machine']['gpu']}")
    for panel, (name, sweep) in zip(axes.flat, sweeps.items(), strict=False):
        panel.plot([p["x"] for p in sweep["points"]], [p["us"] for p in sweep["points"]], ".-")
        panel.plot([p["x"] for p in sweep["spikes"]], [p["us"] for p in sweep["spikes"]], "o", color="red", mfc="none")
        panel.set(xlabel=sweep["x"], ylabel="us", title=name, xlim=(0, None), ylim=(0, None))
    for panel in axes.flat[len(sweeps) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
