"""Exports a decode step with dynamic batch and table width, packages it with AOTInductor, and runs the package, weights
and all, in a fresh process.

    python examples/export_aoti.py

That process must import flashmla_ops, which registers the ops that the package calls. (Torch 2.11 crashes on loading
any package that calls a custom op; 2.13 runs them.)
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import flashmla_ops
from flashmla_ops.modules import DeepseekModel

CHECKPOINT = Path(__file__).parent / "data" / "stdlib-6m"
TOLERANCE = 2e-5  # of the largest logit, in fp32
PAGE_SIZE, NUM_PAGES = 64, 32


class DecodeStep(nn.Module):
    """model.decode as the forward that torch.export wants. The caches are inputs of their own, which it mutates."""

    def __init__(self, model: DeepseekModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, kv_caches: list[Tensor], block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        return self.model.decode(input_ids, kv_caches, block_table, cache_seqlens)


def example_inputs(model: DeepseekModel, texts: list[bytes], max_pages: int) -> tuple:
    """What a decode step is given when all of each text but its last byte is cached."""
    cache = flashmla_ops.PagedKVCache(
        model.config.num_hidden_layers, NUM_PAGES, len(texts), max_pages, page_size=PAGE_SIZE, dtype=torch.float32
    )
    input_ids = torch.zeros(len(texts), 1, dtype=torch.long)
    for text in texts:
        row = cache.allocate(len(text) - 1)
        prompt, length = torch.tensor([list(text[:-1])]), torch.tensor([len(text) - 1], dtype=torch.int32)
        model.prefill(prompt, length, cache.layers, cache.block_table[row : row + 1])
        input_ids[row] = text[-1]
    cache.extend(1)
    return input_ids, cache.layers, cache.block_table, cache.cache_seqlens


def export(model: DeepseekModel) -> torch.export.ExportedProgram:
    inputs = example_inputs(model, [b"import ", b"def main(", b"class "], max_pages=4)
    dynamic_shapes = {
        "input_ids": {0: Dim.DYNAMIC},
        "kv_caches": [{} for _ in model.layers],
        "block_table": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
        "cache_seqlens": {0: Dim.DYNAMIC},
    }
    with torch.no_grad():
        return torch.export.export(DecodeStep(model), inputs, dynamic_shapes=dynamic_shapes)


def run_package(package: Path, inputs_file: Path, outputs_file: Path) -> None:
    """What the fresh process does."""
    step = torch._inductor.aoti_load_package(str(package))
    with torch.no_grad():
        logits = [step(*inputs) for inputs in torch.load(inputs_file)]
    torch.save(logits, outputs_file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR")
    parser.add_argument("--run", type=Path, nargs=3, metavar=("PACKAGE", "INPUTS", "OUTPUTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_package(*args.run)
        return 0

    model = DeepseekModel.from_pretrained(args.checkpoint, dtype=torch.float32)
    texts = [b"import os, sy", b"for i in rang", b"x" * 200, b"    def __init__(self, nam", b"a = [1, 2, 3"]
    calls = [example_inputs(model, texts[:b], width) for b, width in ((1, 1), (2, 8), (5, 4))]
    with tempfile.TemporaryDirectory() as directory:
        package, inputs_file, outputs_file = (Path(directory) / name for name in ("step.pt2", "inputs.pt", "logits.pt"))
        print("exporting", flush=True)
        program = export(model)
        print("packaging: compiling takes about a minute", flush=True)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        print(f"the package has {package.stat().st_size / 1e6:.1f} MB; running it in a fresh process", flush=True)
        torch.save(calls, inputs_file)
        command = [sys.executable, __file__, "--run", package, inputs_file, outputs_file]
        done = subprocess.run(command, check=False)
        if done.returncode:
            print(f"the process ended with {done.returncode} (negative: a signal), torch is {torch.__version__}")
            return 1
        found = torch.load(outputs_file)

    good = True
    for logits, inputs in zip(found, calls, strict=True):
        expected = model.decode(*inputs)
        error = ((logits - expected).abs().amax() / expected.abs().amax()).item()
        good &= error <= TOLERANCE
        print(
            f"batch {inputs[0].shape[0]}, table width {inputs[2].shape[1]}: largest difference from eager {error:.0e}"
        )
    print(f"logits equal to eager's within {TOLERANCE:.0e}: {'yes' if good else 'NO'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
