"""Generates text with one model over several processes, and compares them with one that holds all of it.

    torchrun --nproc-per-node 4 examples/generate_distributed.py --tp 2 --ep 2
    torchrun --nproc-per-node 2 examples/generate_distributed.py --cp 2     # each holds half of the cache
    torchrun --nproc-per-node 4 examples/generate_distributed.py --dp 4     # each has rows, and some experts

On machines with a GPU for each process they use these and NCCL, else CPUs and gloo. Each process reads its own part of
the checkpoint. The tokens are those that the whole model chose on the first process; with --no-check, for models that
no process can hold, they are those that the processes choose together, and modes are compared with eager. Exits with 1
if any process disagrees; one that fails or dies ends all, and torchrun names it.
"""

import argparse
import contextlib
import math
import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from generate import (
    CHECKPOINT,
    PROMPTS,
    Run,
    agreement,
    gpu_problem,
    load_tokenizer,
    make_step,
    print_table,
    run,
    speed,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record

from flashmla_ops.modules import DeepseekModel


def some_of(result: Run, rows: slice, device: torch.device) -> Run:
    """What a run did with some of its rows, on a device."""
    experts = None if result.experts is None else result.experts[:, :, rows].to(device)
    tokens, logits, margin = (t[:, rows].to(device) for t in (result.tokens, result.logits, result.margin))
    return replace(result, tokens=tokens, logits=logits, experts=experts, margin=margin)


def from_first(value):
    """The first process' value, on all."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@record  # so that torchrun shows the first failure and its rank
def main() -> int:
    if os.environ.get("RANK", "0") != "0":
        with contextlib.redirect_stdout(None):  # the first process speaks for all
            return generate()
    return generate()


def generate() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for dim in ("dp", "tp", "ep", "cp"):
        parser.add_argument(
            f"--{dim}", type=int, default=1, metavar="N", help="processes; see flashmla_ops/parallel.py"
        )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help="in Hugging Face's format")
    parser.add_argument("--prompt", action="append", help="may be given several times: a batch")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--mode", action="append", choices=["eager", "compiled", "cudagraph"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on CPU, bfloat16 on GPU")
    parser.add_argument("--no-check", action="store_true", help="do without a process that holds the whole model")
    parser.add_argument("--timeout", type=int, default=600, metavar="S", help="of a collective, in seconds")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        sys.exit("expected to be started by torchrun: torchrun --nproc-per-node 4 examples/generate_distributed.py ...")

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    rank, local_rank, world, local_world = (int(os.environ[name]) for name in names)
    sizes = {dim: getattr(args, dim) for dim in ("dp", "tp", "ep", "cp") if getattr(args, dim) > 1} or {"tp": 1}
    if math.prod(sizes.values()) != world:
        sys.exit(f"expected sizes whose product is the number of processes, {world}, got {sizes}")
    on_gpu = torch.cuda.device_count() >= local_world
    if on_gpu:
        torch.cuda.set_device(local_rank)
        on_gpu = gpu_problem("plain") is None
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if not on_gpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=args.timeout))
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    model = DeepseekModel.from_pretrained(args.checkpoint, dtype=dtype, device=device, mesh=mesh)
    tokenizer = load_tokenizer(args.checkpoint)
    texts = args.prompt or PROMPTS
    prompts = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, prompts))
    part, parts = model.parallel.layout.part(("dp",))
    prompts += prompts[-1:] * (-len(prompts) % parts)  # every process has as many rows
    rows = slice(part * len(prompts) // parts, (part + 1) * len(prompts) // parts)

    def greedy(logits):
        return logits.argmax(-1)

    def everyone(name: str, decode, expected: Run | None) -> Run:
        settings = prompts[rows], args.max_new_tokens, greedy, "plain"
        return run(name, model, decode, *settings, eager=expected, longest=longest)

    expected, table = None, [["mode", "first call s", "tokens/s", "agreement"]]
    if not args.no_check:
        if rank == 0:
            whole = DeepseekModel.from_pretrained(args.checkpoint, dtype=dtype, device=device)
            expected = run("one process", whole, whole.decode, prompts, args.max_new_tokens, greedy, "plain")
            table.append(["one process", *speed(expected), "-"])
            del whole
            expected = some_of(expected, slice(None), torch.device("cpu"))
        expected = some_of(from_first(expected), rows, device)
    all_good, compiles = True, ""
    for mode in dict.fromkeys(args.mode or ["eager", "compiled"] + ["cudagraph"] * on_gpu):
        decode = model.decode if mode == "eager" else make_step(mode, model, "inductor")
        result = everyone(mode, decode, expected)
        expected = expected or result  # without a whole model, eager's
        good, sentence = agreement(result, expected)
        verdicts = [None] * world
        dist.all_gather_object(verdicts, (good, sentence))
        all_good &= all(good for good, _ in verdicts)
        table.append([mode, *speed(result), next((text for good, text in verdicts if not good), sentence)])
        if mode == "compiled":
            compiles = decode.figures()
    decode = None  # a process group cannot end while a CUDA graph holds its calls

    written = [None] * world
    dist.all_gather_object(written, (rows.start, expected.tokens.T.tolist()))
    held = sum(weight.nbytes for weight in model.parameters())
    if rank == 0:
        completions = {start + i: ids for start, several in written for i, ids in enumerate(several)}
        for row, text in enumerate(texts):
            ids = completions[row]
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            print(f"{'-' * 100}\n{text}{tokenizer.decode(ids[:end])}")
        print("-" * 100)
        mesh_text = " x ".join(f"{dim} {n}" for dim, n in sizes.items())
        print(f"{mesh_text}: {world} processes, {held / 1e6:.1f} MB of weights on each")
        if compiles:
            print("compiled, on each process: {} graph, {} graph breaks, {} compile, {} cache copies".format(*compiles))
        print_table(table)
    dist.destroy_process_group()
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
