"""Continuous batching: requests join and leave at every step, on a fixed set of compiled batch sizes.

    python examples/continuous_batching.py

A step decodes the rows of the smallest compiled batch size that holds every live row; rows without a request are
padding, which the ops know by their length 0. Each batch size is compiled once, before the first request, and any later
compile would be an error. At the end each request is generated again, alone, and must have got the same text.
"""

import argparse
import itertools
import os
import shutil
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from flashmla_ops import PagedKVCache
from flashmla_ops.modules import DeepseekModel

CHECKPOINT = Path(__file__).parent / "data" / "stdlib-6m"
PAGE_SIZE, MAX_PAGES = 64, 3
TOLERANCE = 2e-5  # of a row's largest logit, in fp32
PROMPTS = [
    "import os\n",
    "def main(",
    "    def __repr__(self):\n        return '<%s %r>' % (type(self)",  # near the end of its first page of 64 tokens
    "for key, value in ",
    "    return ",
    "class Handler(BaseHandler):\n    def handle(self, request, data",
]
NUM_NEW = [5, 3, 7, 2, 4, 9, 3]  # new tokens of a request, in turn


@dataclass
class Request:
    prompt: bytes
    num_new: int
    tokens: list[int] = field(default_factory=list)  # what was generated
    logits: list[Tensor] = field(default_factory=list)  # [vocab] each, what the tokens were chosen from
    margins: list[float] = field(default_factory=list)  # of the closest choice of experts on the way to them

    def take(self, logits: Tensor, margin: Tensor) -> None:
        self.tokens.append(int(logits.argmax()))
        self.logits.append(logits.clone())
        self.margins.append(float(margin))


class Engine:
    """Serves requests as they come, at most batch_sizes[-1] at once."""

    def __init__(self, model: DeepseekModel, batch_sizes: list[int]):
        backend = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"
        self.model, self.batch_sizes = model, batch_sizes
        self.decode = torch.compile(model.decode, backend=backend, dynamic=False, fullgraph=True)
        config, most = model.config, batch_sizes[-1]
        self.cache = PagedKVCache(
            config.num_hidden_layers, most * MAX_PAGES, most, MAX_PAGES, page_size=PAGE_SIZE, dtype=torch.float32
        )
        self.input_ids = torch.zeros(most, 1, dtype=torch.long)
        self.live: dict[int, Request] = {}  # row -> request

    def warm_up(self) -> None:
        """Compiles each batch size, on padding only."""
        for size in self.batch_sizes:
            print(f"compiling the decode step for batch {size}", flush=True)
            self.run_rows(size)
        torch.compiler.set_stance("fail_on_recompile")

    def run_rows(self, size: int) -> tuple[Tensor, Tensor]:
        """Of the first `size` rows: logits [size, vocab], and the margin of the closest choice of experts [size]."""
        tables = self.cache.block_table[:size], self.cache.cache_seqlens[:size]
        logits, routing = self.decode(self.input_ids[:size], self.cache.layers, *tables, return_routing=True)
        return logits[:, 0], routing.margin.amin(0)[:, 0]

    def join(self, request: Request) -> None:
        row = self.cache.allocate(len(request.prompt))
        self.live[row] = request
        prompt, length = torch.tensor([list(request.prompt)]), torch.tensor([len(request.prompt)], dtype=torch.int32)
        table = self.cache.block_table[row : row + 1]
        logits, routing = self.model.prefill(
            prompt, length, self.cache.layers, table, last_only=True, return_routing=True
        )
        request.take(logits[0], routing.margin.amin())

    def step(self) -> int:
        """Generates a token for every live request; frees those that are done. Returns the batch size used."""
        for row, request in self.live.items():
            self.input_ids[row] = request.tokens[-1]
        self.cache.extend(1)
        size = next(size for size in self.batch_sizes if size > max(self.live))
        logits, margins = self.run_rows(size)
        for row, request in list(self.live.items()):
            request.take(logits[row], margins[row])
            if len(request.tokens) == request.num_new:
                self.cache.free(row)
                del self.live[row]
        return size


def serve(engine: Engine, requests: list[Request]) -> None:
    """Serves all requests, of which one joins at each step as long as a row is free."""
    waiting, step = deque(requests), 0
    while waiting or engine.live:
        joined = bool(waiting) and len(engine.live) < engine.batch_sizes[-1]
        if joined:
            engine.join(waiting.popleft())
        before = len(engine.live)
        size = engine.step()
        step += 1
        print(f"step {step:3}: {joined:d} joined, {before} in a batch of {size}, {before - len(engine.live)} left")


def same(request: Request, alone: Request) -> bool:
    """Whether both chose the same tokens from the same logits, up to the first choice that is too close to call: of a
    token or of experts, between two that rounding may put in either order."""
    for step, expected in enumerate(alone.logits):
        allowed = TOLERANCE * expected.abs().amax()
        equal = (request.logits[step] - expected).abs().amax() <= allowed
        if not equal or request.tokens[step] != alone.tokens[step]:
            best = expected.topk(2).values
            print(f"{request.prompt!r}: differs from token {step} on, expert margin {alone.margins[step]:.0e}")
            return bool(alone.margins[step] <= TOLERANCE or (equal and best[0] - best[1] <= 2 * allowed))
    return len(request.tokens) == len(alone.tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--requests", type=int, default=24)
    args = parser.parse_args()
    model = DeepseekModel.from_pretrained(args.checkpoint, dtype=torch.float32)
    engine = Engine(model, sorted(args.batch_sizes))
    engine.warm_up()

    work = zip(itertools.cycle(PROMPTS), itertools.islice(itertools.cycle(NUM_NEW), args.requests))
    requests = [Request(prompt.encode(), num_new) for prompt, num_new in work]
    serve(engine, requests)
    alone = [Request(request.prompt, request.num_new) for request in requests]
    for request in alone:
        engine.join(request)
        while engine.live:
            engine.step()

    compiles = counters["stats"]["unique_graphs"]
    equal = sum(map(same, requests, alone))
    print(f"{len(requests)} requests, batch sizes {engine.batch_sizes}: {compiles} compiles")
    print(f"free pages at the end: {engine.cache.num_free_pages} of {engine.batch_sizes[-1] * MAX_PAGES}")
    print(f"output equal to each request alone: {equal} of {len(requests)}")
    return 0 if equal == len(requests) and compiles == len(engine.batch_sizes) else 1


if __name__ == "__main__":
    sys.exit(main())
