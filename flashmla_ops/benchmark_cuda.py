"""The benchmark's cases on a GPU: each call as a node of a CUDA graph, from a cold L2, against its floor and a peer.

Each decode case has a process of its own, so that a crash or a hang costs one row, and prints one JSON line. A case is
built several times at fresh addresses, since times move by up to 15 % with where an allocation lands; the floor, the
peer and ours take turns on the same tensors.

The floor of a decode call is the larger of two times: `paged_stream` of exactly its pages (what it would take if
arithmetic cost nothing), and its FLOP at the highest matrix rate seen so far in the run. The floor of any other op is
a launch inside a graph, or its bytes at the rate of a copy. benchmark_layer.py has whole steps of a layer.

Decoding of an fp8 cache takes turns with ours of the same values in bf16, and is held against a limit on their ratio.
FlashMLA's dense fp8 takes queries in e4m3 only: its rows are those with such queries, of which both multiply the same
bytes. Decoding takes turns too under a batch-invariant plan, with the plan that one gets otherwise.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, backends
from .backends import cpu, sm90
from .benchmark_layer import LAYER, LAYER_SECONDS, complete_parts, layer_line, layer_row, within_limit
from .benchmark_timing import (
    ALLOCATIONS,
    DECODE_BYTES,
    DECODE_NODES,
    ColdL2,
    Replay,
    host_us,
    matrix_tflops,
    median_us,
    nodes_for,
    pages_in_use,
)
from .functional import concat_and_cache_mla, fwd_kvcache_mla, get_mla_metadata, merge_attn_states
from .kv_cache import named_format
from .plan import make_plan, max_parts, row_tiles
from .testing import (
    KV_SCALE,
    DecodeCase,
    Expected,
    Fp8DecodeCase,
    check_decode,
    expected,
    make_append_case,
    make_decode_case,
    make_merge_case,
    quantized,
    relative_error,
    varied_lengths,
)

OP_NODES, OP_BYTES = 32, 2 << 30
PROCESS_SECONDS, OP_SECONDS = 90, 15  # a row takes a few seconds; for each further one of a process
CEILINGS = "ceilings"
FP8 = "fp8"  # the group of decode rows over fp8 caches
TRITON = "triton"  # the group of decode rows that the Triton backend runs, forced
INVARIANT = "batch invariant"  # the group of decode rows under such plans
# the most of its time over the balanced plan's: of a row, and of the geometric mean
INVARIANT_LIMIT, INVARIANT_MEAN = 2.0, 1.3
PEER_FP8_TOLERANCE = 0.1  # FlashMLA's, which rounds P to e4m3: steps of 2^-4 to 2^-3
# Ours of queries in e4m3, of out and lse: tensor cores add up such products with 14 bits or so (csrc/NOTES.md).
E4M3_TOLERANCE = 4e-3
CHECKOUT = Path(__file__).resolve().parent.parent
# Paged streaming of 128 and 16384 pages and the matrix rate of sound cards: floors of a slower run do not count.
STREAM_US = {"H100": (5.5, 393.0), "H200": (5.0, 279.0)}
MATRIX_TFLOPS = 680

# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class DecodeShape:
    group: str
    b: int
    h_q: int
    s_q: int
    s_k: int
    varied: bool
    dtype: torch.dtype = torch.bfloat16
    kv_format: str | None = None  # of an fp8 cache
    e4m3_queries: bool = False  # over one of one scale
    of_bf16: tuple[float, float] | None = None  # the most of our time over bf16's, on an H100 and on an H200
    over_peer: float | None = None  # the least of FlashMLA's time over ours
    d_qk: int = 576
    d_v: int = 512
    of_stream: float | None = None  # the least of paged streaming's time over ours

    @property
    def name(self) -> str:
        kind = self.kv_format or str(self.dtype).removeprefix("torch.")
        kind += " q e4m3" if self.e4m3_queries else ""
        dims = f" d{self.d_v}+{self.d_qk - self.d_v}" if (self.d_qk, self.d_v) != (576, 512) else ""
        suffix = f" {self.group}" if self.group in (TRITON, INVARIANT) else ""
        return f"fwd_kvcache_mla b{self.b} h{self.h_q} s{self.s_q} k{self.s_k}{dims} {kind}{suffix}"

    def limits(self, gpu: str) -> dict[str, float | None]:
        return {
            "limit": self.of_bf16 and self.of_bf16["H200" in gpu],
            "peer_limit": self.over_peer,
            "stream_limit": self.of_stream,
        }

    def make(self, seed: int) -> DecodeCase:
        lengths = varied_lengths(self.b, self.s_k, self.s_q) if self.varied else [self.s_k] * self.b
        shape = {"s_q": self.s_q, "h_q": self.h_q, "d_qk": self.d_qk, "d_v": self.d_v, "dtype": self.dtype}
        shape["causal"] = self.s_q > 1
        case = make_decode_case(lengths, **shape, device="cuda", seed=seed, poison=False)
        return quantized(case, self.kv_format, self.e4m3_queries) if self.kv_format else case


def _plain_shapes() -> Iterator[DecodeShape]:
    for s_k in (4096, 8192, 16384):
        yield DecodeShape("b128 h128 s1", 128, 128, 1, s_k, varied=True)
    yield DecodeShape("b128 h128 s1", 128, 128, 1, 8192, True, torch.float16)
    for b, s_q, s_k in ((128, 2, 4096), (128, 2, 8192), (128, 2, 16384), (32, 4, 8192)):
        yield DecodeShape("h128 s>1", b, 128, s_q, s_k, varied=True)
    for h_q in (16, 32, 64):
        for s_k in (2048, 8192):
            yield DecodeShape("h16/32/64", 128, h_q, 1, s_k, varied=True)
    yield DecodeShape("h16/32/64", 64, 16, 4, 8192, varied=True)
    for h_q in (128, 16):
        for b, s_k in ((1, 1024), (1, 8192), (1, 65536), (4, 4096), (16, 4096)):
            yield DecodeShape("small batch", b, h_q, 1, s_k, varied=False)
    yield DecodeShape("small batch", 32, 64, 1, 2048, varied=False)
    yield DecodeShape("small batch", 64, 128, 1, 1024, varied=False)
    for h_q in (16, 128):
        yield DecodeShape("other", 1, h_q, 1, 131072, varied=False)
    for h_q in (8, 12, 20):
        yield DecodeShape("other", 32, h_q, 1, 4096, varied=True)


def _shapes() -> Iterator[DecodeShape]:
    yield from _plain_shapes()
    for b, h_q, s_k, *of_bf16 in (
        (128, 16, 8192, 0.66, 0.66),
        (128, 64, 8192, 0.72, 0.85),
        (128, 128, 8192, 1.3, 1.3),
        (16, 16, 4096, 0.8, 0.8),
    ):
        yield DecodeShape(FP8, b, h_q, 1, s_k, varied=b == 128, kv_format="fp8", of_bf16=tuple(of_bf16))
    for b, h_q, s_k in ((128, 16, 8192), (128, 128, 8192), (16, 16, 4096), (1, 128, 8192)):
        shape = DecodeShape(FP8, b, h_q, 1, s_k, varied=b == 128, kv_format="fp8_tensor")
        yield shape
        yield replace(shape, e4m3_queries=True, over_peer=1.05 if h_q == 16 else 1.0)
    for b, h_q, s_k, over_peer in (
        (128, 16, 2048, 0.75),
        (128, 16, 8192, 0.75),
        (128, 128, 8192, 0.4),
        (1, 16, 8192, 1.0),
    ):
        yield DecodeShape(TRITON, b, h_q, 1, s_k, varied=b == 128, over_peer=over_peer)
    yield DecodeShape(TRITON, 128, 32, 1, 8192, varied=True, d_qk=320, d_v=256, of_stream=0.7)
    for shape in _plain_shapes():
        yield replace(shape, group=INVARIANT)


@dataclass
class OpCase:
    """A call that returns what it wrote, and what is wrong with that: `check` raises, or returns the error."""

    run: Callable[[], tuple[Tensor, ...]]
    check: Callable[..., float]
    bytes_moved: int = 0


def _plan(b: int, seed: int) -> OpCase:
    lengths = torch.randint(1, 8192, (b,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    on_device = lengths.cuda()

    def check(*plan: Tensor) -> float:
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        wanted = make_plan(lengths, max_parts(multiprocessors, row_tiles(128, 1)))
        assert all(torch.equal(x.cpu(), y) for x, y in zip(plan, wanted, strict=True)), "not the plan of make_plan"
        return 0.0

    return OpCase(lambda: get_mla_metadata(on_device, 128, 1), check)


def _append(num_tokens: int, kv_format: str, seed: int, device: str = "cuda") -> OpCase:
    c = make_append_case(num_tokens, device=device, seed=seed)
    layout, d_v, d_rope = named_format(kv_format), c.kv_c.shape[1], c.k_pe.shape[1]
    shape = *c.kv_cache.shape[:-1], layout.last_dim(d_v, d_rope)
    c = replace(c, kv_cache=torch.zeros(shape, dtype=layout.dtypes[0], device=device))
    kv_scale = torch.tensor(KV_SCALE, device=device) if layout.scaled else None

    def run() -> tuple[Tensor]:
        concat_and_cache_mla(**c.kwargs(), kv_scale=kv_scale)
        return (c.kv_cache,)

    def check(kv_cache: Tensor) -> float:
        written = kv_cache.flatten(0, 2)[c.slot_mapping].cpu()
        # on the CPU: powers of two, as torch makes them on CUDA, need not be exact
        wanted = layout.quantize(c.kv_c.cpu(), c.k_pe.cpu(), None if kv_scale is None else kv_scale.cpu(), True)
        assert torch.equal(written, wanted), "the cache does not hold the tokens"
        return 0.0

    return OpCase(run, check, c.bytes_moved())


def _merge(b: int, seed: int) -> OpCase:
    c = make_merge_case(b, h_q=128, device="cuda", seed=seed, poison=False)

    def check(out: Tensor, lse: Tensor) -> float:
        assert not out.isnan().any() and not lse.isnan().any(), "out or lse was not written everywhere"
        few = [t[:: max(1, b // 64)].double().cpu() for t in (c.out_a, c.lse_a, c.out_b, c.lse_b, out, lse)]
        wanted, wanted_lse = torch.empty_like(few[4]), torch.empty_like(few[5])
        cpu.merge_attn_states(wanted, wanted_lse, *few[:4])
        error, lse_error = relative_error(few[4], wanted), relative_error(few[5], wanted_lse)
        assert error < 4e-3 and lse_error < 1e-6, f"error {error:.1e} of out, {lse_error:.1e} of lse"
        return error

    return OpCase(lambda: merge_attn_states(**c.kwargs()), check, c.bytes_moved())


DECODE = {shape.name: shape for shape in _shapes()}
OPS: dict[str, Callable[[int], OpCase]] = {  # by seed
    **{f"get_mla_metadata b{b}": lambda seed, b=b: _plan(b, seed) for b in (1, 32, 128, 512, 2048)},
    **{
        f"concat_and_cache_mla n{n} {kv_format}": lambda seed, n=n, kv_format=kv_format: _append(n, kv_format, seed)
        for n, kv_format in (
            *((128, "bfloat16"), (8192, "bfloat16"), (500_000, "bfloat16")),
            *((8192, "fp8"), (8192, "fp8_tensor")),
        )
    },
    **{f"merge_attn_states b{b} h128 bfloat16": lambda seed, b=b: _merge(b, seed) for b in (128, 16384)},
}
NAMES = [*DECODE, *OPS, *LAYER]

# ----------------------------------------------------------------------------------------------------------- ceilings


def measure_ceilings(flush: ColdL2) -> dict:
    source = torch.randn(1 << 29, device="cuda")  # 2 GiB
    target, total = torch.empty_like(source), torch.empty((), device="cuda")
    kv_cache = torch.randn(16384, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    pages = torch.randperm(16384, device="cuda").int()
    stream = torch.ops.flashmla_sm90.paged_stream
    graphs = {
        "read": [lambda: (torch.sum(source, (0,), out=total),)],
        "copy": [lambda: (target.copy_(source),)],
        "launch_us": [lambda: (total.fill_(0.0),)] * OP_NODES,
        "stream_128_pages_us": [lambda i=i: stream(kv_cache, pages[128 * i : 128 * (i + 1)]) for i in range(16)],
        "stream_16384_pages_us": [lambda: stream(kv_cache, pages)],
    }
    us = {name: median_us([Replay(calls)], flush)[0] for name, calls in graphs.items()}
    read, copy = us.pop("read"), us.pop("copy")
    rates = {"read_gbs": source.nbytes / read / 1e3, "copy_gbs": 2 * source.nbytes / copy / 1e3}
    return {**us, **rates, "matrix_tflops": matrix_tflops(flush)}


# -------------------------------------------------------------------------------------------------- one row, a process


def _peer(case: DecodeCase) -> Callable:
    op = torch.ops.flash_mla_legacy.dense_decode_fwd
    args = (case.q, case.kv_cache, case.head_dim_v, case.cache_seqlens, case.block_table)
    args = (*args, case.softmax_scale, case.causal)
    plan = op(*args, None, None)[2:]
    return lambda: op(*args, *plan)[:2]


def _peer_fp8(case: Fp8DecodeCase) -> Callable:
    """FlashMLA's dense fp8 decoding, of the same bytes."""
    ops = torch.ops.flash_mla_legacy
    plan = ops.get_mla_decoding_metadata_dense_fp8(*case.plan_args)
    args = (case.q, case.kv_cache.view(torch.float8_e4m3fn), case.head_dim_v, case.cache_seqlens, case.block_table)
    args = (*args, case.softmax_scale, case.causal, *plan[:2], case.q_scale.view(1), case.kv_scale.view(1))
    return lambda: ops.fwd_kvcache_mla_fp8(*args)[:2]


def _check_peer_fp8(case: DecodeCase, out: Tensor, lse: Tensor, against: Expected) -> float:
    error = relative_error(out, against.out)
    assert error < PEER_FP8_TOLERANCE, f"error {error:.1e} of out"
    return error


def _check_e4m3(case: DecodeCase, out: Tensor, lse: Tensor, against: Expected) -> float:
    """Ours of queries in e4m3."""
    error, lse_error = relative_error(out, against.out), (lse.double() - against.lse).abs().max().item()
    right = error < E4M3_TOLERANCE and lse_error < E4M3_TOLERANCE  # NaN is not
    assert right, f"error {error:.1e} of out, {lse_error:.1e} of lse"
    return error


def _peer_of(shape: DecodeShape) -> tuple[Callable, Callable] | tuple[None, None]:
    """FlashMLA's call of such a shape, and its check, if it has one."""
    if shape.e4m3_queries:
        return _peer_fp8, _check_peer_fp8
    plain = not shape.kv_format and (shape.d_qk, shape.d_v) == (576, 512) and shape.group != INVARIANT
    return (_peer, check_decode) if plain else (None, None)


def _refusal(call: Callable[[DecodeCase], Callable], case: DecodeCase) -> str | None:
    try:
        call(case)()
        torch.cuda.synchronize()
    except Exception as error:  # another version of the peer, say
        return f"cannot be called: {type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return None


def _stream(case: DecodeCase) -> Callable:
    pages = pages_in_use(case.block_table, case.cache_seqlens, case.kv_cache.shape[1])
    return lambda: torch.ops.flashmla_sm90.paged_stream(case.kv_cache, pages)


def _ours(case: DecodeCase, batch_invariant: bool = False) -> Callable:
    metadata, num_splits = get_mla_metadata(*case.plan_args, batch_invariant=batch_invariant)
    args = {**case.kwargs(), "tile_scheduler_metadata": metadata, "num_splits": num_splits}
    return lambda: fwd_kvcache_mla(**args)


def decode_row(shape: DecodeShape, flush: ColdL2, peer: bool) -> dict:
    """The figures of a shape, with a process of its own: a backend that is forced stays so."""
    if shape.group == TRITON:
        backends.use_backend(TRITON)
    first = shape.make(0)
    nodes = nodes_for(DECODE_NODES, DECODE_BYTES, first.bytes_moved())
    invariant = shape.group == INVARIANT
    call_peer, check_peer = _peer_of(shape) if peer else (None, None)
    if peer_wrong := call_peer and _refusal(call_peer, first):
        call_peer = None
    makers: dict[str, Callable[[DecodeCase], Callable]] = {"stream": _stream}
    makers |= {"bf16": _ours} if shape.kv_format else {}
    makers |= {"peer": call_peer} if call_peer else {}
    makers |= {"balanced": _ours, "ours": partial(_ours, batch_invariant=True)} if invariant else {"ours": _ours}
    checks = {"ours": _check_e4m3 if shape.e4m3_queries else check_decode}
    checks |= {"bf16": check_decode} if shape.kv_format else {}
    medians: dict[str, list[float]] = {name: [] for name in makers}
    errors: dict[str, list[float]] = {name: [] for name in makers}
    kept = []  # so that the next round's memory is other memory
    for seed in range(ALLOCATIONS):
        cases = [shape.make(seed * nodes + i) for i in range(nodes)]
        exact = [case.dequantized() for case in cases]  # what results are held against, and what bf16 is given
        replays = {
            name: Replay([make(case) for case in (exact if name == "bf16" else cases)]) for name, make in makers.items()
        }
        kept.append(replays)
        for name, us in zip(replays, median_us(list(replays.values()), flush), strict=True):
            medians[name].append(us)
        for i in range(nodes):
            against = expected(exact[i])
            for name, check in checks.items():
                errors[name].append(check(exact[i], *replays[name].outputs[i], against=against))
            try:
                if call_peer:
                    errors["peer"].append(check_peer(exact[i], *replays["peer"].outputs[i], against=against))
            except AssertionError as wrong:
                peer_wrong = str(wrong)
    row = {
        "group": shape.group,
        "lengths": "varied" if shape.varied else "equal",
        "nodes": nodes,
        "us": statistics.median(medians["ours"]),
        "stream_us": statistics.median(medians["stream"]),
        "peer_us": min(medians["peer"]) if call_peer else None,
        "peer_wrong": peer_wrong,
        "medians_us": medians,
        "flops": first.flops(),
        "bytes": first.bytes_moved(),
        "error": max(errors["ours"]),
        "host_us": host_us(kept[-1]["ours"].calls[0]),
        "matmul_tflops": matrix_tflops(flush),
    }
    row |= shape.limits(torch.cuda.get_device_name())
    row |= {"balanced_us": statistics.median(medians["balanced"])} if invariant else {}
    if not shape.kv_format:
        return row
    row |= {"bf16_us": statistics.median(medians["bf16"]), "e4m3_queries": shape.e4m3_queries}
    return row | {"peer_error": max(errors.get("peer", ()), default=None)}


def op_row(make: Callable[[int], OpCase], flush: ColdL2) -> dict:
    medians, errors = [], []
    nodes = nodes_for(OP_NODES, OP_BYTES, make(0).bytes_moved)
    for seed in range(ALLOCATIONS):
        cases = [make(seed * nodes + i) for i in range(nodes)]
        replay = Replay([c.run for c in cases])
        medians += median_us([replay], flush)
        errors += [c.check(*outputs) for c, outputs in zip(cases, replay.outputs, strict=True)]
    c = cases[0]
    us = {"us": statistics.median(medians), "medians_us": {"ours": medians}, "nodes": nodes, "host_us": host_us(c.run)}
    return {"group": "ops", **us, "flops": 0, "bytes": c.bytes_moved, "error": max(errors)}


def _row(name: str, flush: ColdL2, peer: bool) -> dict:
    if name in DECODE:
        return decode_row(DECODE[name], flush, peer)
    return layer_row(LAYER[name], flush) if name in LAYER else op_row(OPS[name], flush)


def run_rows(names: Sequence[str], peer: str | None) -> None:
    """The work of a row's process: a JSON line for each name."""
    sys.stdin.readline()  # Python and torch are loaded while the row before is measured; this line ends that wait
    torch.manual_seed(0)
    if (status := sm90.status()) != "ready":
        raise RuntimeError(status)
    if peer:
        torch.ops.load_library(peer)
    flush = ColdL2()
    for name in names:
        try:
            if name == CEILINGS:
                row = {"machine": machine(), "ceilings": measure_ceilings(flush)}
            else:
                row = _row(name, flush, bool(peer))
        except Exception as error:  # one op's failure must not hide the others'
            row = {"failed": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]}
        torch.cuda.empty_cache()
        print(json.dumps({"case": name, **row}), flush=True)


class RowProcess:
    """Starts at once, and measures when asked to."""

    def __init__(self, names: list[str], peer: str | None):
        flags = [flag for name in names for flag in ("--row", name)] + (["--peer", f"sgl={peer}"] if peer else [])
        command = [sys.executable, "-m", f"{__package__}.benchmark", *flags]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.names = names
        self.seconds = LAYER_SECONDS if names[0] in LAYER else PROCESS_SECONDS + OP_SECONDS * (len(names) - 1)
        self.process = subprocess.Popen(command, text=True, **pipes)

    def rows(self) -> list[dict]:
        try:
            out, err = self.process.communicate("\n", self.seconds)
            reason = f"exit status {self.process.returncode}: {(err.strip().splitlines() or ['no message'])[-1]}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, _ = self.process.communicate()
            reason = f"no result within {self.seconds} s"
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
        done = {line["case"]: line for line in lines}
        return [done.get(name, {"case": name, "failed": reason}) for name in self.names]


def measured(names: list[str], peer: str | None) -> Iterator[dict]:
    """The ceilings, then the rows: each in a process of its own; the ops other than decoding share one."""
    ops = [name for name in names if name in OPS]
    batches = [[CEILINGS], *([name] for name in names if name in DECODE), *([ops] if ops else [])]
    batches += [[name] for name in names if name in LAYER]
    following = RowProcess(batches[0], peer)
    try:
        for i in range(len(batches)):
            current, following = following, RowProcess(batches[i + 1], peer) if i + 1 < len(batches) else None
            yield from current.rows()
    finally:
        if following:
            following.process.kill()


# -------------------------------------------------------------------------------------------------------------- table


def machine() -> dict:
    driver, runtime = (f"{v // 1000}.{v % 1000 // 10}" for v in torch.ops.flashmla_sm90.cuda_versions())
    return {
        "flashmla_ops": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "driver": _said("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "driver_cuda": driver,
        "cuda": runtime,
        "cpus": os.cpu_count(),
    }


def commit(checkout: Path = CHECKOUT) -> str | None:
    """Which sources are measured: what FLASHMLA_COMMIT says, since a copy of a checkout can have an older .git beside
    it, or none. Otherwise HEAD, with "+changes" if tracked files differ from it."""
    if given := os.environ.get("FLASHMLA_COMMIT"):
        return given
    if not (checkout / ".git").exists():
        return None
    git = ("git", "-C", str(checkout))
    head = _said(*git, "rev-parse", "HEAD")
    clean = _said(*git, "status", "--porcelain", "--untracked-files=no") == ""
    return head if clean or head is None else head + "+changes"


def _said(*command: str) -> str | None:
    """What a command prints; None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def complete(row: dict, ceilings: dict) -> None:
    """Adds the rates, the floor and the ratios, and raises the highest matrix rate if this row reached more."""
    us, peer_us = row["us"], row.get("peer_us")
    row["tflops"], row["gbs"] = row["flops"] / us / 1e6, row["bytes"] / us / 1e3
    e4m3 = row.get("e4m3_queries", False)  # such products have twice the matrix rate
    reached = [row["tflops"] / (1 + e4m3), row.get("matmul_tflops", 0.0)]
    if peer_us and not row["peer_wrong"]:
        if row["group"] == FP8:  # a figure of its own: the peer multiplies in fp8, where matrix rates are twice as high
            row["peer_fp8_over_ours"] = peer_us / us
        else:
            row["peer_over_ours"] = peer_us / us
            reached.append(row["flops"] / peer_us / 1e6)
    if "bf16_us" in row:
        row["of_bf16"] = us / row["bf16_us"]
    if "balanced_us" in row:
        row["of_balanced"] = us / row["balanced_us"]
    ceilings["matrix_tflops"] = max(ceilings["matrix_tflops"], *reached)
    if "parts" in row:
        row["floor_us"] = complete_parts(row["parts"], ceilings)
    else:
        memory_us = row.get("stream_us") or max(ceilings["launch_us"], row["bytes"] / ceilings["copy_gbs"] / 1e3)
        row["floor_us"] = max(memory_us, row["flops"] / (ceilings["matrix_tflops"] * (1 + e4m3)) / 1e6)
    row["of_floor"] = row["floor_us"] / us


def fp8_verdicts(row: dict) -> dict[str, bool]:
    """Whether each limit of an fp8 row that has a figure is kept."""
    limit, peer_limit, over_ours = row["limit"], row["peer_limit"], row.get("peer_fp8_over_ours")
    verdicts = {"of_bf16": row["of_bf16"] <= limit} if limit else {}
    return verdicts | ({"peer": over_ours >= peer_limit} if peer_limit and over_ours else {})


def fp8_line(row: dict) -> str:
    """Below the row's own line: bf16 on the same lengths, and the limits."""
    shown = {name: "kept" if kept else "MISSED" for name, kept in fp8_verdicts(row).items()}
    text = f"    {row['of_bf16']:.2f} x the {row['bf16_us']:.1f} us of bf16"
    text += f" (limit {row['limit']:g}: {shown['of_bf16']})" if "of_bf16" in shown else ""
    if "peer" in shown:
        ratio, limit = row["peer_fp8_over_ours"], row["peer_limit"]
        text += f"; peer over ours {ratio:.2f} (limit {limit:g}: {shown['peer']}), its error {row['peer_error']:.1e}"
    return text


def triton_verdicts(row: dict) -> dict[str, tuple[float, float, bool]]:
    """By what a row of the Triton backend is held against: the ratio, the least it should be, whether it is."""
    held = {
        "peer": (row.get("peer_over_ours"), row["peer_limit"]),
        "paged streaming": (row["stream_us"] / row["us"], row["stream_limit"]),
    }
    return {name: (ratio, limit, ratio >= limit) for name, (ratio, limit) in held.items() if ratio and limit}


def triton_line(row: dict) -> str:
    """Below the row's own line: its limits."""
    verdicts = triton_verdicts(row).items()
    shown = [
        f"{name} over ours {ratio:.2f} (limit {limit:g}: {'kept' if kept else 'MISSED'})"
        for name, (ratio, limit, kept) in verdicts
    ]
    return "    " + ("; ".join(shown) or "no peer")


def invariant_line(row: dict) -> str:
    """Below the row's own line: the balanced plan on the same tensors, and the limit."""
    kept = "kept" if row["of_balanced"] <= INVARIANT_LIMIT else "MISSED"
    return (
        f"    {row['of_balanced']:.2f} x the {row['balanced_us']:.1f} us of the balanced plan "
        f"(limit {INVARIANT_LIMIT:g}: {kept})"
    )


def header(peer: bool) -> str:
    line = f"{'case':46} {'us':>8} {'TFLOP/s':>8} {'GB/s':>6} {'floor us':>9} {'% of floor':>10}"
    return line + (f" {'peer us':>8} {'peer/ours':>9}" if peer else "") + f" {'error':>8} {'host us':>8}"


def line(row: dict, peer: bool) -> str:
    if "failed" in row:
        return f"{row['case']:46} FAILED: {row['failed']}"
    text = f"{row['case']:46} {row['us']:8.1f} {row['tflops']:8.1f} {row['gbs']:6.0f}"
    text += f" {row['floor_us']:9.1f} {100 * row['of_floor']:10.0f}"
    if peer:
        peer_us = f"{row['peer_us']:.1f}" if row.get("peer_us") else ""
        ratio = f"{_over_ours(row):.2f}" if _over_ours(row) else "wrong" if row.get("peer_wrong") else ""
        text += f" {peer_us:>8} {ratio:>9}"
    text += f" {row['error']:8.1e} {row['host_us']:8.1f}"
    below = layer_line if "parts" in row else fp8_line if "bf16_us" in row else None
    below = {TRITON: triton_line, INVARIANT: invariant_line}.get(row["group"], below)
    text += f"\n{below(row)}" if below else ""
    return f"{text}\n    peer: {row['peer_wrong']}" if row.get("peer_wrong") else text


def _over_ours(row: dict) -> float | None:
    return row.get("peer_over_ours", row.get("peer_fp8_over_ours"))


def summary(rows: list[dict], ceilings: dict, gpu: str) -> Iterator[str]:
    compared = [row for row in rows if "peer_over_ours" in row and row["group"] != TRITON]
    for group in dict.fromkeys([*(row["group"] for row in compared), "all"] if compared else []):
        ratios = [row["peer_over_ours"] for row in compared if group in (row["group"], "all")]
        yield f"peer/ours, {group:15} geometric mean {statistics.geometric_mean(ratios):.3f} of {len(ratios)} rows"
    fp8 = [row for row in rows if "bf16_us" in row]
    if ratios := [row["peer_fp8_over_ours"] for row in fp8 if "peer_fp8_over_ours" in row]:
        yield f"peer/ours, {FP8:15} geometric mean {statistics.geometric_mean(ratios):.3f} of {len(ratios)} rows"
    if verdicts := [kept for row in fp8 for kept in fp8_verdicts(row).values()]:
        yield f"limits of fp8 rows kept: {sum(verdicts)} of {len(verdicts)}"
    if verdicts := [kept for row in rows if row.get("group") == TRITON for *_, kept in triton_verdicts(row).values()]:
        yield f"limits of triton rows kept: {sum(verdicts)} of {len(verdicts)}"
    if ratios := [row["of_balanced"] for row in rows if "of_balanced" in row]:
        mean = statistics.geometric_mean(ratios)
        kept = "kept" if mean <= INVARIANT_MEAN and max(ratios) <= INVARIANT_LIMIT else "MISSED"
        yield (
            f"{INVARIANT} over balanced: geometric mean {mean:.3f} of {len(ratios)} rows, most {max(ratios):.2f} "
            f"(limits {INVARIANT_MEAN:g}, {INVARIANT_LIMIT:g}: {kept})"
        )
    figure = "peer_over_ours" if compared else "of_floor"
    layers = [row for row in rows if "parts" in row]
    if worst := min(
        (r for r in rows if figure in r and r not in layers and r["group"] not in (TRITON, INVARIANT)),
        key=lambda row: row[figure],
        default=None,
    ):
        yield f"worst row: {worst['case']}, {figure.replace('_', ' ')} {worst[figure]:.2f}"
    if layers:
        yield f"layer steps within their limits: {sum(map(within_limit, layers))} of {len(layers)}"
    yield (
        f"ceilings: read {ceilings['read_gbs']:.0f} GB/s, matrix product {ceilings['matrix_tflops']:.0f} TFLOP/s, "
        f"copy {ceilings['copy_gbs']:.0f} GB/s, launch {ceilings['launch_us']:.1f} us"
    )
    few, many = ceilings["stream_128_pages_us"], ceilings["stream_16384_pages_us"]
    text = f"paged streaming: 128 pages {few:.1f} us, 16384 pages {many:.0f} us"
    if card := next((card for card in STREAM_US if card in gpu), None):
        sound_few, sound_many = STREAM_US[card]
        counts = few <= sound_few / 0.9 and many <= sound_many / 0.95 and ceilings["matrix_tflops"] >= MATRIX_TFLOPS
        text += f"; the floors {'count' if counts else 'do not count: the machine is slow'}"
        text += f" (a sound {card}: {sound_few:g} us, {sound_many:g} us, {MATRIX_TFLOPS} TFLOP/s)"
    yield text


def run(names: list[str], peer: str | None, write: Callable[[dict], None]) -> tuple[dict, int]:
    """Measures and prints; calls `write` with all there is after every row. Returns that and the exit status."""
    results = measured(names, peer)
    first = next(results)
    if "failed" in first:
        print(f"the ceilings: FAILED: {first['failed']}")
        return {}, 1
    document = {"machine": first["machine"], "ceilings": first["ceilings"], "rows": (rows := [])}
    print(", ".join(f"{k} {v}" for k, v in document["machine"].items()), header(bool(peer)), sep="\n", flush=True)
    for row in _with_progress(results, len(names)):
        if "failed" not in row:
            complete(row, document["ceilings"])
        rows.append(row)
        print(line(row, bool(peer)), flush=True)
        write(document)
    print(*summary(rows, document["ceilings"], document["machine"]["gpu"]), sep="\n", flush=True)
    return document, int(any("failed" in row for row in rows))


def _with_progress(rows: Iterator[dict], total: int) -> Iterator[dict]:
    """A bar on stderr while the next row is awaited, if somebody watches."""
    for done in range(total + 1):
        if sys.stderr.isatty() and done < total:
            print(f"\r[{'#' * (40 * done // total):40}] {done}/{total}", end="", file=sys.stderr, flush=True)
        row = next(rows, None)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if row is None:
            return
        yield row


# --------------------------------------------------------------------------------------------------------------- plot


def plot(document: dict, path: str) -> None:
    """A roofline of the decode rows, and each row's time over its floor."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit('--plot needs matplotlib: pip install "flashmla_ops[bench]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in document["rows"] if row.get("stream_us")]
    if not rows:
        raise SystemExit("--plot: there are no rows of fwd_kvcache_mla measured on a GPU")
    ceilings = document["ceilings"]
    figure, (roofline, bars) = plt.subplots(1, 2, figsize=(16, 8), layout="constrained")
    figure.suptitle(f"fwd_kvcache_mla on {document['machine']['gpu']}")

    intensity = [2.0**i for i in range(2, 10)]
    roof = [min(ceilings["matrix_tflops"], x * ceilings["read_gbs"] / 1e3) for x in intensity]
    roofline.loglog(intensity, roof, "k-", label="read bandwidth, matrix product")
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        x, y = [row["flops"] / row["bytes"] for row in mine], [row["tflops"] for row in mine]
        roofline.loglog(x, y, "o", label=group)
    roofline.set(xlabel="FLOP / byte", ylabel="TFLOP/s", title="Roofline")
    roofline.legend()

    places = range(len(rows))
    bars.barh([p - 0.2 for p in places], [1 / row["of_floor"] for row in rows], 0.4, label="flashmla_ops")
    peers = [(p, row) for p, row in zip(places, rows, strict=True) if _over_ours(row)]
    if peers:
        ratios = [row["peer_us"] / row["floor_us"] for _, row in peers]
        bars.barh([p + 0.2 for p, _ in peers], ratios, 0.4, label="FlashMLA")
    bars.axvline(1, color="black")
    bars.set_yticks(places, [row["case"].removeprefix("fwd_kvcache_mla ") for row in rows])
    bars.invert_yaxis()
    bars.set(xlabel="time / floor", title="Time over the floor (1: nothing faster is possible)")
    bars.legend()
    figure.savefig(path, dpi=120)
