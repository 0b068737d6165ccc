"""What the tests of several processes share: starting ranks once for many checks, and a session of serving that any
model can be run through, one process' or a part of one."""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashmla_ops import PagedKVCache
from flashmla_ops.modules import DeepseekModel
from flashmla_ops.parallel import new_cache

LIMIT = timedelta(seconds=60)  # of a collective
CHECKPOINT = Path(__file__).parent.parent / "examples" / "data" / "stdlib-6m"


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


# --------------------------------------------------------------------------------------------------------- processes


def run_checks(
    n: int, checks: dict[str, Callable[[], None]], sys_path: str, backend: str = "gloo", seconds: float = 400
) -> dict[str, str | None]:
    """Runs all checks on each of n ranks, in order; what is wrong with each, by name, or None.

    A check is a function of a module in `sys_path`, as a new process imports it. After the first that fails the ranks
    no longer agree on where they are, so the rest is not run, and says so.
    """
    context = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")  # CUDA does not survive forks
    context.set_forkserver_preload(["torch", "torch.distributed.tensor", "flashmla_ops.parallel"])  # seconds each
    found = dict.fromkeys(checks, "not run, because one before it failed, or hung")
    with tempfile.TemporaryDirectory() as directory:
        ranks = [context.Process(target=_rank, args=(r, n, checks, directory, sys_path, backend)) for r in range(n)]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + seconds
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()
        for name in checks:
            results = [Path(directory, f"{name}.{r}") for r in range(n)]
            texts = [f"rank {r}: {file.read_text()}" for r, file in enumerate(results) if file.exists()]
            if len(texts) == n:
                found[name] = "\n".join(text for text in texts if not text.endswith(": ")) or None
            elif texts:
                found[name] = "\n".join([*texts, *(_last_words(r, rank, directory) for r, rank in enumerate(ranks))])
    return found


def _last_words(r: int, rank: multiprocessing.Process, directory: str) -> str:
    text = Path(directory, f"stderr.{r}").read_text(errors="replace")
    return f"rank {r}: exit code {rank.exitcode}; the end of its stderr:\n{text[-3000:]}"


def _rank(rank: int, n: int, checks: dict, directory: str, sys_path: str, backend: str) -> None:
    with open(Path(directory, f"stderr.{rank}"), "w") as stderr:
        os.dup2(stderr.fileno(), 2)  # also what C++ says before it ends the process
    faulthandler.enable()
    sys.path.insert(0, sys_path)
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=n, timeout=LIMIT)
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check()
            error = ""
        except BaseException:
            error = traceback.format_exc()
        Path(directory, f"{name}.{rank}").write_text(error)
        if error:
            return
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- a session

ROWS, PAGES, PAGE = 4, 8, 16  # of a session's cache: rows, pages a row, tokens a page
STEPS = [1] * 16 + [1] * 10 + [2] * 6  # tokens a row of each decode step
JOIN = 16  # before this step row 1 leaves and row 2 joins
PROMPTS = {0: 37, 1: 1, 3: 20}
JOINING = (33, 9)  # two pieces of a prompt


def session(model: DeepseekModel, kv_cache_dtype=None) -> dict[tuple[str, int], Tensor]:
    """Prompts, decode steps of one and of two tokens, a sequence that leaves and one that joins in two pieces, whose
    second reads the cache: logits by (what, row), of this rank's rows."""
    options = {"page_size": PAGE, "max_new_tokens": 40, "kv_cache_dtype": kv_cache_dtype or torch.float32}
    dims = {"kv_lora_rank": model.config.kv_lora_rank, "qk_rope_head_dim": model.config.qk_rope_head_dim}
    if model.parallel is None:
        first, rows = 0, ROWS
        cache = PagedKVCache(model.config.num_hidden_layers, ROWS * PAGES, ROWS, PAGES, **options, **dims)
    else:
        part, parts = model.parallel.layout.part(("dp",))
        rows = ROWS // parts
        first = part * rows
        cache = new_cache(model, ROWS * PAGES, ROWS, PAGES, **options)
    for layer in cache.layers:
        layer.fill_(torch.nan if layer.is_floating_point() else 255)  # what was never written must not be read
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (ROWS, 40 + sum(STEPS)), generator=generator)
    mine, logits = tokens[first : first + rows], {}

    def keep(what: str, out: Tensor, counts: Tensor, last: bool) -> None:
        for row, n in enumerate(counts.tolist()):
            if n:
                logits[what, first + row] = (out[row, -n:] if last else out[row, :n]).clone()

    def prefill(what: str, lengths: dict[int, int], start: int | None) -> None:
        """The next tokens of some rows; of new sequences if start is None, else from there on."""
        counts = torch.tensor([lengths.get(first + row, 0) for row in range(rows)], dtype=torch.int32)
        longest = max(lengths.values())
        if start is not None:
            cache.extend({row: n for row, n in enumerate(counts.tolist()) if n})
        begin = start or 0
        seqlens = None if start is None else cache.cache_seqlens
        out = model.prefill(mine[:, begin : begin + longest], counts, cache.layers, cache.block_table, seqlens)
        keep(what, out, counts, False)

    live = {row: n for row, n in PROMPTS.items() if first <= row < first + rows}
    for row in range(rows):
        cache.allocate(live.get(first + row, 0))
    prefill("prompts", PROMPTS, None)
    present = set(PROMPTS)
    for step, s_q in enumerate(STEPS):
        if step == JOIN:
            if first <= 1 < first + rows:
                cache.free(1 - first)
            present = present - {1} | {2}
            prefill("first piece", {2: JOINING[0]}, 0)
            prefill("second piece", {2: JOINING[1]}, JOINING[0])
        counts = torch.tensor([s_q * (first + row in present) for row in range(rows)], dtype=torch.int32)
        cache.extend({row: n for row, n in enumerate(counts.tolist()) if n})
        with torch.inference_mode():
            ids = mine[:, step : step + s_q]
            out = model.decode(ids, cache.layers, cache.block_table, cache.cache_seqlens)
        keep(f"step {step}", out, counts, True)
    return logits
