"""What `--tune` runs: the configurations that the Triton backend's table could have, on this machine's GPU.

For every key of CONFIGS in backends/triton.py, a batch like that of a decoding server is attended with each candidate.
Candidates are compiled first, in as many processes as there are processors, since Triton takes seconds for one. Then a
process a key times its own, each as a node of a CUDA graph from a cold L2, and checks the results against float64. What
is printed is the row of each key with the best candidate, in the place of this device's shared memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from . import backends
from .backends import triton
from .backends.triton import CONFIGS, SHARED_KB, Config
from .benchmark_timing import ColdL2, Replay, median_us
from .functional import fwd_kvcache_mla, get_mla_metadata
from .testing import DecodeCase, check_decode, expected, make_decode_case, varied_lengths

Key = tuple[int, int]  # of CONFIGS: columns, query rows
DIMS = {192: (160, 128), 320: (320, 256), 576: (576, 512), 832: (576, 272)}  # d_qk, d_v of each width in the table
BATCH, KEYS = 128, 4096
SECONDS = 300  # of a process
# Stages that Triton's pipeline can tell apart: 0, 1, 2, 3 and 4 blocks of keys ahead, with their page numbers
STAGES = (2, 3, 5, 7, 9)


def candidates(key: Key, shared_kb: int) -> list[Config]:
    """Those whose queries and blocks of keys fit: of the rest most would fail, after seconds of compilation."""
    columns, rows = key
    most = rows if columns < 832 else 16  # its table row takes any number
    return [
        Config(block_m, block_n, warps, stages)
        for block_m in (16, 32, 64)
        for block_n in (32, 64)
        for warps in (4, 8)
        for stages in STAGES
        if block_m <= most
        and 2 * block_m >= min(most, 64)
        and 2 * columns * (block_m + block_n * max(1, stages // 2)) <= shared_kb << 10
        and block_m * columns // warps <= 64 * 320 // 4  # accumulators that registers hold
    ]


def make_case(key: Key, lengths: list[int] | torch.Tensor) -> DecodeCase:
    columns, rows = key
    d_qk, d_v = DIMS[columns]
    return make_decode_case(lengths, h_q=rows, d_qk=d_qk, d_v=d_v, device="cuda", poison=False)


def use(key: Key, config: Config) -> None:
    """From now on the backend takes this configuration for the key, in this process."""
    CONFIGS[key] = (config,) * len(SHARED_KB)
    backends.use_backend("triton")


# ------------------------------------------------------------------------------------------------ a process's own work


def compile_one(key: Key, config: Config) -> None:
    """Leaves the compiled kernels in Triton's cache on disk."""
    use(key, config)
    fwd_kvcache_mla(**make_case(key, [100]).kwargs())
    torch.cuda.synchronize()


def time_all(key: Key, configs: list[Config]) -> Iterator[dict]:
    """Microseconds of each, or why it has none."""
    flush, case = ColdL2(), make_case(key, varied_lengths(BATCH, KEYS))
    against = expected(case)
    plan = get_mla_metadata(*case.plan_args)
    call = case.kwargs() | dict(zip(("tile_scheduler_metadata", "num_splits"), plan, strict=True))
    for config in configs:
        use(key, config)
        try:
            replay = Replay([lambda: fwd_kvcache_mla(**call)])
            [us] = median_us([replay], flush)
            check_decode(case, *replay.outputs[0], against=against)
            yield {"config": config, "us": us}
        except Exception as error:  # too much shared memory, say
            yield {"config": config, "failed": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]}


def work(request: str) -> None:
    """What a process is asked for: a key and some configurations, to compile or to time. A JSON line for each."""
    asked = json.loads(request)
    key, configs = tuple(asked["key"]), [Config(*config) for config in asked["configs"]]
    if asked["compile"]:
        for config in configs:
            compile_one(key, config)
        return
    for line in time_all(key, configs):
        print(json.dumps(line), flush=True)


# ----------------------------------------------------------------------------------------------------------- the whole


def in_a_process(key: Key, configs: list[Config], compiles: bool) -> list[dict]:
    """The lines of a process that does this work; what it had printed, if it crashes or hangs."""
    request = json.dumps({"key": key, "configs": configs, "compile": compiles})
    command = [sys.executable, "-m", f"{__package__}.benchmark", "--tune-work", request]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        lines = (late.stdout or b"").decode()
    else:
        lines = done.stdout
    return [json.loads(line) for line in lines.splitlines() if line.startswith("{") and line.endswith("}")]


def named(words: list[str]) -> list[Key]:
    """The keys whose "columns, rows" contain one of the words; all without any."""
    return [key for key in CONFIGS if not words or any(word in "{}, {}".format(*key) for word in words)]


def row_with(key: Key, config: Config, shared_kb: int) -> str:
    """The table's row, to paste: with this configuration where a device of so much shared memory looks."""
    column = max(i for i, kb in enumerate(SHARED_KB) if kb <= shared_kb)
    row = [config if i == column else old for i, old in enumerate(CONFIGS[key])]
    return f"    {key}: ({', '.join('Config({}, {}, {}, {})'.format(*entry) for entry in row)}),"


def run(keys: list[Key], shared_kb: int, run_process: Callable[..., list[dict]] = in_a_process) -> int:
    """Prints every key's candidates, from the fastest on, and the rows to paste."""
    wanted = {key: candidates(key, shared_kb) for key in keys}
    singles = [(key, [config], True) for key, configs in wanted.items() for config in configs]
    workers = os.cpu_count() or 1
    print(f"compiling {len(singles)} candidates in {workers} processes", flush=True)
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(lambda job: run_process(*job), singles))
    rows = []
    for key, configs in wanted.items():
        lines = run_process(key, configs, False)
        timed = sorted((line for line in lines if "us" in line), key=lambda line: line["us"])
        print(f"columns {key[0]}, query rows {key[1]}: {len(timed)} of {len(configs)} candidates ran", flush=True)
        for line in timed:
            now = "  in the table" if Config(*line["config"]) in CONFIGS[key] else ""
            print(f"    {line['us']:8.1f} us  Config({', '.join(map(str, line['config']))}){now}")
        for line in lines:
            if "failed" in line:
                print(f"    failed    Config({', '.join(map(str, line['config']))}): {line['failed']}")
        if timed:
            rows.append(row_with(key, Config(*timed[0]["config"]), shared_kb))
    print("the best rows of CONFIGS in flashmla_ops/backends/triton.py for this device:", *rows, sep="\n")
    return 0 if len(rows) == len(keys) else 1


def shared_kb_here() -> int:
    return triton._shared_kb(torch.device("cuda", torch.cuda.current_device()))
