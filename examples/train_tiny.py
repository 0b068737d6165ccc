"""Trains a small DeepSeek-V3-shaped model on the source of Python's standard library, and saves it for Hugging Face.

    python examples/train_tiny.py --out /tmp/tiny               # 5 minutes on a GPU reach about 1.5 bits per byte
    python examples/generate.py --checkpoint /tmp/tiny

The checkpoint in examples/data/stdlib-6m was made by it. A token is a byte; byte 0 ends a file. Some files, chosen by a
hash of their path, are held out. The model is compared on them with `gzip -9`, in bits per byte.
"""

import argparse
import gzip
import hashlib
import json
import math
import shutil
import sys
import sysconfig
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flashmla_ops.modules import DeepseekModel, MLAConfig

CONFIG = MLAConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=512,  # DeepSeek's own latent and rotated widths: the cache is 576 wide, as in V3
    qk_rope_head_dim=64,
    qk_nope_head_dim=32,
    v_head_dim=96,  # as wide as a query head, which the fast attention kernels of training want
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=128,
    max_position_embeddings=1024,
    rope_scaling={
        "type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
)
BALANCE_RATE = 1e-3  # by how much a step moves an expert's bias (DeepSeek-V3, arXiv 2412.19437, 2.1.2 and 4.2)
# tests are not installed everywhere, the others are tables rather than code
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


def stdlib_text() -> tuple[bytes, bytes]:
    """The standard library's modules as (training text, held-out text), each file ended by a 0 byte."""
    root = Path(sysconfig.get_path("stdlib"))
    text = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            # by name, so that other Python versions hold out the same files; 1 of 25, which is about 5 % of the bytes
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % 25 == 0
            text[held_out].append(path.read_bytes().replace(b"\0", b"") + b"\0")
    return b"".join(text[False]), b"".join(text[True])


def as_tokens(text: bytes, device=None) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def windows(tokens: Tensor, length: int) -> Tensor:
    """Non-overlapping [n, length + 1]: each window predicts every byte but its first, which ends the one before."""
    return tokens.unfold(0, length + 1, length)


@torch.no_grad()
def bits_per_byte(model: DeepseekModel, rows: Tensor) -> float:
    """Mean bits that the model needs for each byte of the windows, from what precedes it in the window."""
    bits = 0.0
    for batch in rows.long().split(32):
        logits = model(batch[:, :-1]).float()
        bits += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item() / math.log(2)
    return bits / rows[:, 1:].numel()


def add_dropout(model: DeepseekModel, p: float) -> None:
    """Drops a share p of what each attention and feed-forward adds: the text is small and is seen many times."""
    for layer in model.layers:
        for part in (layer.attn, layer.ffn):
            part.register_forward_hook(lambda part, args, out: F.dropout(out, p, part.training))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall time, compiling included (default 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="windows a step (default 64)")
    parser.add_argument("--length", type=int, default=CONFIG.max_position_embeddings, help="bytes in a window")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--held-out", type=int, help="measure on this many held-out bytes instead of all")
    parser.add_argument("--no-compile", action="store_true", help="run eager: slower, but starts at once")
    args = parser.parse_args()
    start, device = time.perf_counter(), torch.device(args.device)
    torch.manual_seed(0)

    training_text, held_out_text = stdlib_text()
    held_out_text = held_out_text[: args.held_out]
    gzip_bits = 8 * len(gzip.compress(held_out_text, 9)) / len(held_out_text)
    print(f"{len(training_text):,} bytes of training text, {len(held_out_text):,} held out (gzip -9: {gzip_bits:.3f})")
    training, held_out = as_tokens(training_text, device), windows(as_tokens(held_out_text, device), args.length)

    model = DeepseekModel(CONFIG, device=device)  # fp32; products run in bf16 under autocast
    add_dropout(model, args.dropout)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    biases = [layer.ffn.gate.e_score_correction_bias for layer in model.layers[CONFIG.first_k_dense_replace :]]

    def loss_and_load(batch: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy in nats, and the share of tokens that each MoE layer sends to each expert [layers, E]."""
        with torch.autocast(device.type, torch.bfloat16):
            logits, routing = model(batch[:, :-1], return_routing=True)
        chosen = routing.experts.flatten(1)[..., None] == torch.arange(CONFIG.n_routed_experts, device=device)
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()), chosen.float().mean(1)

    if not args.no_compile and (device.type == "cuda" or shutil.which("g++")):
        warnings.filterwarnings("ignore", "Mismatch dtype")  # norms of bf16 with fp32 weights are compiled, not fused
        print("compiling the training step, about a minute", flush=True)
        loss_and_load = torch.compile(loss_and_load, dynamic=False, fullgraph=True)

    step, done, next_report, began = 0, 0.0, 0.0, start
    while done < 1:
        first = torch.randint(len(training) - args.length, (args.batch, 1), device=device)
        batch = training[first + torch.arange(args.length + 1, device=device)].long()
        decay = 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * decay
        loss, load = loss_and_load(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for bias, share in zip(biases, load, strict=True):  # busy experts are chosen less, idle ones more
                bias += BALANCE_RATE * decay * (share.mean() - share).sign()
        train_bits = loss.item() / math.log(2)  # waits for the device, so that the clock below is right
        step += 1
        now = time.perf_counter()
        if step == 1:
            began = now
            print(f"first step after {now - start:.0f} s", flush=True)
        done = (now - began) / max(args.minutes * 60 - (began - start), 1)
        if done >= next_report:
            next_report += 0.05
            rate = (step - 1) * args.batch * args.length / max(now - began, 1e-9)
            model.eval()
            with torch.autocast(device.type, torch.bfloat16):
                held_out_bits = bits_per_byte(model, held_out[:: max(len(held_out) // 64, 1)][:64])
            model.train()
            print(
                f"{done:4.0%}  step {step:6,}  {rate:9,.0f} tokens/s  bits per byte: training {train_bits:.3f}, "
                f"held out {held_out_bits:.3f} (a sample)  busiest expert {load.max():.0%}, idlest {load.min():.0%}",
                flush=True,
            )

    model.to(torch.bfloat16).save_pretrained(args.out)
    saved = DeepseekModel.from_pretrained(args.out, dtype=torch.bfloat16, device=device).eval()
    bits = bits_per_byte(saved, held_out)
    record = {
        "held_out_bits_per_byte": round(bits, 4),
        "gzip_9_bits_per_byte": round(gzip_bits, 4),
        "held_out_bytes": len(held_out_text),
        "training_bytes": len(training_text),
        "trained_on_bytes": step * args.batch * args.length,
        "steps": step,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds": round(time.perf_counter() - start),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "device")},
        "model": asdict(CONFIG),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{args.out}: {size / 1e6:.1f} MB of bf16, {step:,} steps, {record['seconds']} s")
    print(f"held-out text: {bits:.3f} bits per byte, gzip -9 needs {gzip_bits:.3f}")


if __name__ == "__main__":
    main()
