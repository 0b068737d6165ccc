"""Generates text with a DeepSeek-V3-shaped model from a paged latent cache, in several modes, and compares them.

    python examples/generate.py                                     # the small model in examples/data: Python code
    python examples/generate.py --prompt "class Queue:" --max-new-tokens 300
    python examples/generate.py --checkpoint DIR --dtype bfloat16   # a DeepSeek V2, V3 or Kimi K2 checkpoint
    python examples/generate.py --random 8x1024                     # random weights, for a trial of speed
    python examples/generate.py --kv-cache fp8                      # 656 bytes a token instead of bf16's 1152
    python examples/generate.py --kv-cache fp8_tensor               # 576: one scale a layer, attn.kv_scale

Modes: eager; compiled (torch.compile); on a GPU also cudagraph (the eager step captured by hand) and reduce-overhead
(torch.compile's own CUDA graphs). Every mode decodes the same tokens, those that eager chose, and its logits are
compared with eager's: see `agreement`. Exits with 1 if a mode disagrees.
"""

import argparse
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters, counters
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from train_tiny import CONFIG, as_tokens, stdlib_text, windows

from flashmla_ops import PagedKVCache, fwd_kvcache_mla
from flashmla_ops.kv_cache import FORMATS, Plain, named_format
from flashmla_ops.modules import DeepseekModel, MLAConfig

CHECKPOINT = Path(__file__).parent / "data" / "stdlib-6m"
PROMPTS = [
    "import os\nimport sys\n\n\nclass ",
    'def read_lines(path):\n    """Return the lines of a file.',
    "    def __init__(self, name, value=None):\n        self.name = name\n        self.value = value\n\n    def ",
]
KV_CACHES = ["plain", *(layout.name for layout in FORMATS if not isinstance(layout, Plain))]
PAGE_SIZE = 64
WARM_UP = 3  # steps left out of tokens/s: reduce-overhead records its CUDA graph in the second
MAX_CLOSE = 0.01  # the share of close calls allowed in fp32
# how far a logit may be from eager's, as a share of the row's largest: modes round at different places. 5 to 20 times
# what the small model shows. With an fp8 cache a difference in the last place may be a step of e4m3
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
FP8_TOLERANCE = 1e-2


# --------------------------------------------------------------------------------------------- model and tokenizer


class Bytes:
    """The tokenizer of the small model: a token is a byte, 0 ends a text."""

    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def load_tokenizer(directory: Path):
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return Bytes()
    try:
        from transformers import AutoTokenizer
    except ImportError:
        sys.exit(f"{directory} has a tokenizer, which needs the package transformers: pip install transformers")
    return AutoTokenizer.from_pretrained(directory)


def random_model(shape: str, dtype: torch.dtype, device: str) -> DeepseekModel:
    """A model of LAYERSxHIDDEN with the committed model's other proportions."""
    layers, hidden = (int(n) for n in shape.split("x"))
    if hidden % 64:
        sys.exit(f"--random: expected a hidden size that is a multiple of 64, got {hidden}")
    config = replace(
        CONFIG,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=3 * hidden,
        moe_intermediate_size=hidden // 2,
        q_lora_rank=hidden // 2,
    )
    return DeepseekModel(config, dtype=dtype, device=device)


def cache_of(kv_cache: str, config: MLAConfig, dtype: torch.dtype) -> dict:
    """PagedKVCache's arguments for a cache of `--kv-cache`."""
    return {
        "kv_cache_dtype": dtype if kv_cache == "plain" else kv_cache,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_rope_head_dim": config.qk_rope_head_dim,
    }


def cache_for(model: DeepseekModel, pages: list[int], kv_cache: str) -> PagedKVCache:
    """A cache for rows that grow to so many pages; of a model that is a rank's part, that rank's."""
    weight = model.embed.weight
    options = {"page_size": PAGE_SIZE, "device": weight.device, **cache_of(kv_cache, model.config, weight.dtype)}
    if model.parallel is None:
        return PagedKVCache(model.config.num_hidden_layers, sum(pages), len(pages), max(pages), **options)
    from flashmla_ops.parallel import new_cache

    dp, cp = (model.parallel.layout.sizes.get(dim, 1) for dim in ("dp", "cp"))
    widest = -(-max(pages) // cp) * cp
    return new_cache(model, len(pages) * widest * dp, len(pages) * dp, widest, **options)


def gpu_problem(kv_cache: str) -> str | None:
    """Why the ops cannot run on this machine's GPU, or None if they can."""
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    q = torch.zeros(1, 1, 16, CONFIG.head_dim, dtype=torch.bfloat16, device="cuda")
    kind = cache_of(kv_cache, CONFIG, q.dtype)
    cache = PagedKVCache(1, 1, 1, 1, page_size=PAGE_SIZE, device="cuda", **kind)
    kv_scale = torch.ones((), device="cuda") if named_format(kind["kv_cache_dtype"]).scaled else None
    tables = cache.block_table, cache.cache_seqlens
    try:
        fwd_kvcache_mla(q, cache.layers[0], *tables, CONFIG.kv_lora_rank, kv_scale=kv_scale)
    except NotImplementedError as error:
        return str(error)
    return None


# -------------------------------------------------------------------------------------------------------- decoding


@dataclass
class Run:
    """What a mode did: n steps of b rows."""

    tokens: Tensor  # [n, b] int64, what each step was given
    logits: Tensor  # [n, b, vocab]
    experts: Tensor | None  # [n, MoE layers, b, 1, k] int64, None without MoE layers
    margin: Tensor  # [n, b] fp32, of the closest choice of experts (inf without MoE layers)
    first_call: float  # seconds
    tokens_per_second: float
    kv_cache: str = "plain"

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[self.logits.dtype], FP8_TOLERANCE if self.kv_cache != "plain" else 0.0)

    @property
    def chose_experts(self) -> bool:
        """Whether modes choose experts themselves: then rounding all but never changes a choice."""
        return own_experts(self.logits.dtype, self.kv_cache)


def own_experts(dtype: torch.dtype, kv_cache: str) -> bool:
    return dtype == torch.float32 and kv_cache == "plain"


class CudaGraph:
    """A decode step that is captured at its first call and replayed since.

    Every call must be given the very tensors of the first one, updated in place: a graph reads the addresses it was
    captured with. PagedKVCache never moves its tensors, and the plan is made on the device, inside the graph.
    """

    def __init__(self, decode: Callable):
        self.decode = decode
        self.graph = None

    def __call__(self, *args, **kwargs):
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.decode(*args, **kwargs)  # warm-up: libraries allocate their workspaces, which a capture must not
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.decode(*args, **kwargs)
        self.graph.replay()
        return self.outputs

    def figures(self) -> list[str]:
        return ["1", "-", "-", "-"]  # one CUDA graph; nothing was compiled


@torch.inference_mode()
def run(
    name: str,
    model: DeepseekModel,
    decode: Callable,
    prompts: list[list[int]],
    steps: int,
    pick,
    kv_cache: str,
    eager=None,
    longest: int = 0,
) -> Run:
    """Prefills the prompts and decodes `steps` tokens a row, by `decode`, which stands for model.decode.

    Prompts are padded to the longest, or to `longest` if others' are.

    Without `eager` the tokens are what `pick` takes from the logits. With it they are eager's, and so are the experts
    in bf16, in fp16 and with an fp8 cache, whose rounding often changes a router's choice, and of a part of a model.
    """
    config, device, dtype = model.config, model.embed.weight.device, model.embed.weight.dtype
    has_moe = any(config.is_moe(i) for i in range(config.num_hidden_layers))
    seqlens = [len(prompt) for prompt in prompts]
    pages = [-(-(n + steps) // PAGE_SIZE) for n in seqlens]  # a row's pages at its end; they are dealt as it grows
    cache = cache_for(model, pages, kv_cache)
    for n in seqlens:
        cache.allocate(n)
    padded = torch.zeros(len(prompts), max(longest, *seqlens), dtype=torch.long)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    seqlens_q = torch.tensor(seqlens, dtype=torch.int32, device=device)
    logits = model.prefill(padded.to(device), seqlens_q, cache.layers, cache.block_table, last_only=True)

    # every step is given the same tensors, which change in place, as captured graphs need it
    input_ids = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
    options = {"return_routing": True} if has_moe else {}
    # a model's parts must take every step together, so none repeats one because its own choice was another
    feed_experts = eager is not None and has_moe and (model.parallel or not own_experts(dtype, kv_cache))
    if feed_experts:
        options["experts"] = eager.experts[0].clone()
    tokens, all_logits, experts, margins, seconds = [], [], [], [], []
    for step in range(steps):
        start = now(device)
        input_ids.copy_((pick(logits) if eager is None else eager.tokens[step])[:, None])
        if feed_experts:
            options["experts"].copy_(eager.experts[step])
        cache.extend(1)  # a longer row, perhaps one more page
        args = (input_ids, cache.layers, cache.block_table, cache.cache_seqlens)
        out = decode(*args, **options)
        seconds.append(now(device) - start)
        logits, routing = out if has_moe else (out, None)
        logits = logits[:, -1].clone()  # a CUDA graph's outputs are overwritten by its next replay
        tokens.append(input_ids[:, 0].clone())
        all_logits.append(logits)
        if has_moe:
            experts.append(routing.experts.clone())
            margins.append(routing.margin.amin(0)[:, 0])
            if eager is not None and not torch.equal(routing.experts, eager.experts[step]):
                # a close call went the other way: write what eager cached, so that the next steps can be compared
                model.decode(*args, experts=eager.experts[step])
        if step + 1 in (1, steps) or (step + 1) % 32 == 0:
            print(f"{name}: {step + 1} of {steps} tokens a row", flush=True)
    timed = seconds[min(WARM_UP, steps - 1) :]
    return Run(
        torch.stack(tokens),
        torch.stack(all_logits),
        torch.stack(experts) if has_moe else None,
        torch.stack(margins) if has_moe else torch.full((steps, len(prompts)), torch.inf, device=device),
        seconds[0],
        len(prompts) * len(timed) / sum(timed),
        kv_cache,
    )


@torch.inference_mode()
def held_out_bits(model: DeepseekModel, kv_cache: str, rows: int = 8, chunk: int = 64, chunks: int = 4) -> float:
    """Bits for each byte of held-out text, prefilled in chunks, each over what the cache holds of those before."""
    device, pages = model.embed.weight.device, -(-chunk * chunks // PAGE_SIZE)
    every = windows(as_tokens(stdlib_text()[1]), chunk * chunks)
    text = every[:: len(every) // rows][:rows].long().to(device)
    kind = cache_of(kv_cache, model.config, model.embed.weight.dtype)
    cache = PagedKVCache(
        model.config.num_hidden_layers, rows * pages, rows, pages, max_new_tokens=chunk, device=device, **kind
    )
    for _ in range(rows):
        cache.allocate()
    seqlens_q, logits = torch.full((rows,), chunk, dtype=torch.int32, device=device), []
    for tokens in text[:, :-1].split(chunk, 1):
        cache.extend(chunk)
        logits.append(model.prefill(tokens, seqlens_q, cache.layers, cache.block_table, cache.cache_seqlens))
    return F.cross_entropy(torch.cat(logits, 1).float().flatten(0, 1), text[:, 1:].flatten()).item() / math.log(2)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------- report


class Counted:
    """A compiled step, with what its compiling did: graphs, graph breaks, compiles, cache copies."""

    def __init__(self, model: DeepseekModel, **how):
        torch._dynamo.reset()
        counters.clear()
        ReinplaceCounters.clear()
        self.decode = torch.compile(model.decode, **how)
        self.has_code = how.get("backend", "inductor") == "inductor"
        self.code = None

    def __call__(self, *args, **kwargs):
        torch.compiler.cudagraph_mark_step_begin()  # reduce-overhead: the last step's outputs may be overwritten
        if self.code is not None or not self.has_code:
            return self.decode(*args, **kwargs)
        out, self.code = run_and_get_code(self.decode, *args, **kwargs)
        self.cache_numel = args[1][0].numel()
        return out

    def figures(self) -> list[str]:
        graphs, compiles = counters["stats"]["unique_graphs"], counters["frames"]["ok"]
        breaks = sum(counters["graph_break"].values())
        copies = self.cache_copies() if self.has_code else "-"  # without generated code there is nothing to look into
        return [str(figure) for figure in (graphs, breaks, compiles, copies)]

    def cache_copies(self) -> int:
        """Buffers of a cache's size that the generated code allocates, and writes it could not make in place."""
        shapes = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", "\n".join(self.code))
        sizes = [math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes]
        return sizes.count(self.cache_numel) + (ReinplaceCounters.get_total_missed_bytes() > 0)


def agreement(mode: Run, eager: Run) -> tuple[bool, str]:
    """Whether a mode computed what eager did, and a sentence about it.

    A row is one token of one sequence. A close call is a row whose two largest logits, or a chosen and a left-out
    expert, are nearer to each other than rounding may move them; close calls are counted and not compared. In all other
    rows logits differ by at most the tolerance, and the next token and the experts are the same.
    """
    tolerance = eager.tolerance
    expected, actual = eager.logits.float(), mode.logits.float()
    largest = expected.abs().amax(-1)
    best = expected.topk(2).values
    close = best[..., 0] - best[..., 1] <= 2 * tolerance * largest  # either may move by the tolerance
    if eager.chose_experts:  # else the mode was given eager's experts
        close |= eager.margin <= tolerance
    error = (actual - expected).abs().amax(-1) / largest
    right = (error <= tolerance) & (actual.argmax(-1) == expected.argmax(-1))
    if eager.experts is not None:
        same = mode.experts.sort(-1).values == eager.experts.sort(-1).values
        right &= same.all(-1).all(-1).all(1)
    compared = ~close
    few_close = not eager.chose_experts or close.float().mean() <= MAX_CLOSE
    good = bool(right[compared].all()) and bool(compared.any()) and bool(few_close)
    return good, (
        f"{'yes' if good else 'NO'}: {int((right & compared).sum())} of {int(compared.sum())} rows, largest error "
        f"{error[compared].amax().item() if compared.any() else float('nan'):.0e} (limit {tolerance:.0e}), "
        f"{int(close.sum())} close calls"
    )


def make_step(mode: str, model: DeepseekModel, backend: str) -> CudaGraph | Counted:
    if mode == "cudagraph":
        return CudaGraph(model.decode)
    print(f"{mode}: compiling the decode step, about a minute the first time", flush=True)
    if mode == "compiled":
        return Counted(model, backend=backend)
    torch._inductor.config.triton.cudagraph_or_error = True  # rather than quietly running without CUDA graphs
    return Counted(model, mode="reduce-overhead")


def speed(run: Run) -> list[str]:
    return [f"{run.first_call:.2f}", f"{run.tokens_per_second:.0f}"]


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help="in Hugging Face's format")
    parser.add_argument("--random", metavar="LAYERSxHIDDEN", help="random weights instead, for a trial of speed")
    parser.add_argument("--prompt", action="append", help="may be given several times: a batch")
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0, the default, is greedy")
    parser.add_argument("--mode", action="append", choices=["eager", "compiled", "cudagraph", "reduce-overhead"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, bfloat16 on GPU")
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="plain", help="plain: in the model's dtype")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where the ops run on it, else cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device is None:
        problem = gpu_problem(args.kv_cache)
        args.device = "cpu" if problem else "cuda"
        if problem:
            print(f"running on the CPU: {problem}")
    on_gpu = args.device == "cuda"
    modes = args.mode or ["eager", "compiled"] + ["cudagraph", "reduce-overhead"] * on_gpu
    if not on_gpu and {"cudagraph", "reduce-overhead"} & set(modes):
        sys.exit("--mode: cudagraph and reduce-overhead need a GPU")
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))

    if args.random:
        model, tokenizer = random_model(args.random, dtype, args.device), Bytes()
    else:
        model = DeepseekModel.from_pretrained(args.checkpoint, dtype=dtype, device=args.device)
        tokenizer = load_tokenizer(args.checkpoint)
    texts = args.prompt or PROMPTS
    prompts = [tokenizer.encode(text) for text in texts]
    longest, most = max(map(len, prompts)) + args.max_new_tokens, model.config.max_position_embeddings
    if not all(prompts) or args.max_new_tokens < 1 or longest > most:
        sys.exit(f"expected prompts and at least one new token, {most} tokens together at most, got {longest}")
    print(f"{args.random or args.checkpoint.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {dtype}")
    print(f"{len(prompts)} prompts of {', '.join(str(len(p)) for p in prompts)} tokens, {args.max_new_tokens} new each")

    backend = "inductor"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        backend = "aot_eager"
        modes = [mode for mode in modes if mode != "reduce-overhead"]
        print("no C++ compiler (apt-get install g++): compiled mode runs with backend aot_eager, which is no faster")

    def pick(logits: Tensor) -> Tensor:
        if args.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits.float() / args.temperature).softmax(-1), 1)[:, 0]

    if args.kv_cache != "plain" and isinstance(tokenizer, Bytes) and not args.random:
        bits = {kv_cache: held_out_bits(model, kv_cache) for kv_cache in ("plain", args.kv_cache)}
        print(
            "held-out text: " + ", ".join(f"{value:.4f} bits per byte ({name} cache)" for name, value in bits.items())
        )
    eager = run("eager", model, model.decode, prompts, args.max_new_tokens, pick, args.kv_cache)
    columns = ["graphs", "graph breaks", "compiles", "cache copies", "agreement with eager"]
    table = [["mode", "first call s", "tokens/s", *columns]]
    table.append(["eager", *speed(eager), "-", "-", "-", "-", "is eager"])
    all_good = True
    for mode in dict.fromkeys(modes):
        if mode == "eager":
            continue
        decode = make_step(mode, model, backend)
        result = run(mode, model, decode, prompts, args.max_new_tokens, pick, args.kv_cache, eager)
        good, sentence = agreement(result, eager)
        all_good &= good
        table.append([mode, *speed(result), *decode.figures(), sentence])

    if not args.random:  # random weights write nothing that can be read
        for text, ids in zip(texts, eager.tokens.T.tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            print(f"{'-' * 100}\n{text}{tokenizer.decode(ids[:end])}")
        print("-" * 100)
    print_table(table)
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
