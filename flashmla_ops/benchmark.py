"""python -m flashmla_ops.benchmark: times the ops, each beside what bounds it or what one would write without it.

A case makes its inputs and returns the contenders, which take turns. Each row has the median time, TFLOP/s and GB/s
of ours and the ratio of ours to the case's yardstick. `--json FILE` writes every figure and the machine.

These are the cases of a machine without a GPU; benchmark_cuda.py has those of one with a GPU, and benchmark_sweep.py
what `--sweep` runs there.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import __version__, backends, benchmark_cuda, benchmark_sweep, benchmark_tune
from .functional import concat_and_cache_mla, fwd_kvcache_mla, get_mla_metadata, merge_attn_states
from .modules import MLAConfig, MoE
from .testing import make_append_case, make_decode_case, make_merge_case

SECONDS = 1.0  # of repeats per contender


@dataclass
class Contenders:
    """What a case times: `ours` against `yardstick`, which `ours` should take at most `limit` times as long as."""

    ours: Callable[[], object]
    yardstick: Callable[[], object] | None = None
    yardstick_name: str = ""
    limit: float | None = None
    flops: int = 0
    bytes_moved: int = 0
    calls: int = 1  # per timed repeat: short calls are timed many at once
    difference: bool = False  # the limit is on ours - yardstick in microseconds, not on their ratio


@dataclass
class Row:
    case: str
    us: float
    tflops: float
    gbs: float
    yardstick: str
    yardstick_us: float | None
    figure: float | None  # ours / yardstick, or ours - yardstick in us
    limit: float | None


CASES: dict[str, Callable[[], Contenders]] = {}


def case(name: str):
    def add(make):
        CASES[name] = make
        return make

    return add


# ------------------------------------------------------------------------------------------------------- CPU cases


def _decode_beside_matmul(h_q: int, dtype: torch.dtype) -> Contenders:
    """The op against the same attention by hand: gather the pages, then matmul, softmax, matmul in the dtype."""
    b, s_k = 8, 4096
    c = make_decode_case([s_k] * b, h_q=h_q, dtype=dtype, poison=False)
    args = c.kwargs()
    pages = c.block_table[:, : s_k // 64].long()

    def by_hand():
        keys = c.kv_cache[pages].view(b, s_k, -1)
        p = torch.softmax((c.q[:, 0] @ keys.mT).float() * c.softmax_scale, -1)
        return p.to(dtype) @ keys[..., : c.head_dim_v]

    return Contenders(
        lambda: fwd_kvcache_mla(**args), by_hand, "gather + matmuls", 1.3, flops=c.flops(), bytes_moved=c.bytes_moved()
    )


for _h_q in (16, 128):
    for _dtype in (torch.bfloat16, torch.float32):
        _name = f"fwd_kvcache_mla b8 h{_h_q} s4096 {str(_dtype).removeprefix('torch.')}"
        case(_name)(lambda h_q=_h_q, dtype=_dtype: _decode_beside_matmul(h_q, dtype))


class _EmptyBackend:
    """Serves everything by doing nothing: what is left of a call is the op's own work."""

    @staticmethod
    def refusal(op, tensor, **facts) -> None:
        return None

    @staticmethod
    def fwd_kvcache_mla(q, kv_cache, block_table, cache_seqlens, d_v, *args) -> tuple[torch.Tensor, torch.Tensor]:
        b, s_q, h_q, _ = q.shape
        return q.new_empty(b, s_q, h_q, d_v), q.new_empty(b, h_q, s_q, dtype=torch.float32)


def _call_overhead(backend) -> Contenders:
    """The op on one row of 64 tokens against the backend's function called directly."""
    c = make_decode_case([64], dtype=torch.float32, poison=False)
    inputs = (c.q, c.kv_cache, c.block_table, c.cache_seqlens)
    op = torch.ops.flashmla.fwd_kvcache_mla.default

    def backend_alone():
        return backend.fwd_kvcache_mla(*inputs, c.head_dim_v, c.softmax_scale, c.causal, None, None, None)

    def through_op():
        return op(*inputs, c.head_dim_v, c.softmax_scale, c.causal)

    limit = 10.0 if torch.is_inference_mode_enabled() else None
    return Contenders(through_op, backend_alone, "backend's function", limit, calls=20, difference=True)


def _op_layer() -> Contenders:
    c = _call_overhead(_EmptyBackend)
    through_op = c.ours

    def through_op_alone():
        in_use, backends.in_use = backends.in_use, (_EmptyBackend,)
        through_op()
        backends.in_use = in_use

    c.ours = through_op_alone
    return c


for _mode in ("inference_mode", "grad mode"):
    case(f"call overhead, cpu backend, {_mode}")(lambda: _call_overhead(backends.cpu))
    case(f"call overhead, empty backend, {_mode}")(_op_layer)


@case("get_mla_metadata b128")
def _plan() -> Contenders:
    lengths = torch.randint(1, 8192, (128,), dtype=torch.int32)
    return Contenders(lambda: get_mla_metadata(lengths, 128, 1))


@case("concat_and_cache_mla n8192 bfloat16")
def _append() -> Contenders:
    c = make_append_case(8192)
    source, target = torch.cat([c.kv_c, c.k_pe], 1), torch.empty(8192, 576, dtype=torch.bfloat16)
    return Contenders(
        lambda: concat_and_cache_mla(**c.kwargs()), lambda: target.copy_(source), "copy", bytes_moved=c.bytes_moved()
    )


@case("merge_attn_states b128 h16 bfloat16")
def _merge() -> Contenders:
    c = make_merge_case(128)
    return Contenders(lambda: merge_attn_states(**c.kwargs()), bytes_moved=c.bytes_moved())


@case("MoE b1, 8 of 64 experts, bfloat16")
def _moe_read() -> Contenders:
    """A decode step of one MoE layer must read the chosen experts' weights, no others. Calls rotate over 16 tokens,
    which choose different experts of 604 MB: the weights are cold."""
    config = MLAConfig(
        *(256, 2048, 1, 1, 1),
        n_routed_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    )
    layer = MoE(config, dtype=torch.bfloat16)
    tokens = torch.randn(16, 1, 2048, dtype=torch.bfloat16)
    with torch.inference_mode():
        chosen = layer.gate(tokens).experts[:, 0].tolist()
    weights = [[w[e].view(-1).view(torch.float32) for w in (layer.gate_up, layer.down)] for e in range(64)]
    turn = {"ours": 0, "read": 0}

    def following(who: str) -> int:
        turn[who] = (turn[who] + 1) % len(tokens)
        return turn[who]

    def ours():
        with torch.no_grad():
            return layer(tokens[following("ours")])

    def read():
        with torch.no_grad():
            return [w.sum() for expert in chosen[following("read")] for w in weights[expert]]

    bytes_read = 8 * sum(w.nbytes for w in weights[0])
    return Contenders(ours, read, "reading the experts", 2.5, bytes_moved=bytes_read)


# ---------------------------------------------------------------------------------------------------------- runner


def measure(contenders: Contenders) -> tuple[float, float | None]:
    """Seconds a call of ours and of the yardstick, taking turns for SECONDS each.

    The median; for a difference of microseconds the least, since other work on the machine only ever adds.
    """
    runs = [run for run in (contenders.ours, contenders.yardstick) if run]
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    while min(map(sum, times)) < SECONDS or len(times[0]) < 5:
        for run, mine in zip(runs, times, strict=True):
            start = time.perf_counter()
            for _ in range(contenders.calls):
                run()
            mine.append(time.perf_counter() - start)
    pick = min if contenders.difference else statistics.median
    seconds = [pick(t) / contenders.calls for t in times]
    return seconds[0], seconds[1] if len(runs) > 1 else None


def run_case(name: str) -> Row:
    torch.manual_seed(0)
    with torch.inference_mode("inference_mode" in name):
        c = CASES[name]()
        ours, yardstick = measure(c)
    figure = None
    if yardstick is not None:
        figure = (ours - yardstick) * 1e6 if c.difference else ours / yardstick
    return Row(
        case=name,
        us=ours * 1e6,
        tflops=c.flops / ours / 1e12,
        gbs=c.bytes_moved / ours / 1e9,
        yardstick=c.yardstick_name,
        yardstick_us=None if yardstick is None else yardstick * 1e6,
        figure=figure,
        limit=c.limit,
    )


def _lines(rows: Iterator[Row]) -> Iterator[str]:
    yield f"{'case':42} {'us':>10} {'TFLOP/s':>8} {'GB/s':>7}  beside"
    for row in rows:
        beside = ""
        if row.figure is not None:
            sign, unit = ("+", " us over") if CASES[row.case]().difference else ("", " x")
            beside = f"{row.figure:{sign}.2f}{unit} {row.yardstick}"
            beside += f" (limit {row.limit:g})" if row.limit is not None else ""
        yield f"{row.case:42} {row.us:10.1f} {row.tflops:8.3f} {row.gbs:7.1f}  {beside}"


def machine() -> dict:
    return {
        "flashmla_ops": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    }


def run(names: list[str], write: Callable[[dict], None]) -> int:
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    rows: list[Row] = []

    def running() -> Iterator[Row]:
        for name in names:
            rows.append(run_case(name))
            yield rows[-1]

    for line in _lines(running()):
        print(line, flush=True)
    write({"machine": machine(), "rows": [asdict(row) for row in rows]})
    return 0


def _peer_library(value: str) -> str:
    peer, _, path = value.partition("=")
    if peer != "sgl" or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"expected sgl=PATH of an existing library, got {value}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flashmla_ops.benchmark",
        description=__doc__.splitlines()[0],
        epilog="Environment: FLASHMLA_COMMIT is the commit that --json names on a GPU, for a copy whose .git is older "
        "or missing. Without it that is git's HEAD, with +changes if tracked files differ from it.",
    )
    parser.add_argument("filter", nargs="*", help="run the cases whose name contains one of these words")
    parser.add_argument("--without", metavar="WORD", action="append", default=[], help="but not those with this one")
    parser.add_argument("--json", metavar="FILE", help="write every figure and the machine")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--peer", metavar="sgl=PATH", type=_peer_library, help="time FlashMLA too: its _C_legacy.abi3.so")
    gpu.add_argument("--sweep", action="store_true", help="instead: the decode op over lengths, batches and heads")
    gpu.add_argument(
        "--tune",
        action="store_true",
        help="instead: time the configurations that the Triton backend could have here, and print the best rows of its "
        "table; words name keys, such as '576, 16'",
    )
    gpu.add_argument("--plot", metavar="FILE", help="draw a roofline and each row's time over its floor, or the sweeps")
    gpu.add_argument("--from", metavar="FILE", dest="measured", help="with --plot: draw what --json wrote, run nothing")
    gpu.add_argument("--row", action="append", help=argparse.SUPPRESS)  # what a row's own process is asked for
    gpu.add_argument("--tune-work", help=argparse.SUPPRESS)  # and one of --tune
    return parser


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if args.row:
        benchmark_cuda.run_rows(args.row, args.peer)
        return 0
    if args.tune_work:
        benchmark_tune.work(args.tune_work)
        return 0
    if args.tune:
        return _tune(parser, args)
    if args.measured:
        if not args.plot:
            parser.error("--from needs --plot")
        _plot(json.loads(Path(args.measured).read_text()), args.plot)
        return 0

    def matching(names: Iterable[str]) -> list[str]:
        wanted = [name for name in names if not args.filter or any(word in name for word in args.filter)]
        return [name for name in wanted if not any(word in name for word in args.without)]

    def write(document: dict) -> None:
        if args.json:
            path = Path(args.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1) + "\n")

    if args.sweep:
        if args.filter or args.peer or args.list:
            parser.error("--sweep goes with --json and --plot only")
        if not torch.cuda.is_available():
            parser.error("--sweep needs a GPU")
        return _finish(*benchmark_sweep.run(benchmark_cuda.machine, write), args.plot)
    # Words that name CPU cases only, such as "overhead", run those on any machine.
    on_gpu = matching(benchmark_cuda.NAMES) if torch.cuda.is_available() else []
    names = on_gpu or matching(CASES)
    if args.list or not names:
        print("\n".join(names) or f"no case matches {' '.join(args.filter)}")
        return 0 if names else 1
    if not on_gpu:
        if args.peer or args.plot:
            parser.error("--peer and --plot need cases that run on a GPU (--plot also takes --from FILE)")
        return run(names, write)
    return _finish(*benchmark_cuda.run(names, args.peer, write), args.plot)


def _tune(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.peer or args.sweep or args.plot or args.json:
        parser.error("--tune goes with words and --list only")
    keys = benchmark_tune.named(args.filter)
    if args.list or not keys:
        print(*keys or [f"no key matches {' '.join(args.filter)}"], sep="\n")
        return 0 if keys else 1
    if (status := backends.ALL["triton"].status()) != "ready" or not torch.cuda.is_available():
        parser.error(f"--tune needs a GPU that the Triton backend serves: {status}")
    return benchmark_tune.run(keys, benchmark_tune.shared_kb_here())


def _finish(document: dict, status: int, plot_path: str | None) -> int:
    if plot_path and document:
        _plot(document, plot_path)
    return status


def _plot(document: dict, path: str) -> None:
    (benchmark_sweep if "sweeps" in document else benchmark_cuda).plot(document, path)


if __name__ == "__main__":
    sys.exit(main())
