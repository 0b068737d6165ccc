"""A layer of models with other dimensions than DeepSeek-V3's: decoding, compiled, on every backend, against the CPU."""

import pytest
import torch
from test_compile_model import build

from flashmla_ops import PagedKVCache, backends
from flashmla_ops.modules import MLAConfig

SIZES = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
SHAPES = {  # attention as their config.json has it
    "Mistral-Small-4": {
        "num_attention_heads": 32,
        "q_lora_rank": 128,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "MiniCPM3": {
        "num_attention_heads": 40,
        "q_lora_rank": 96,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "DeepSeek-V2-Lite": {"num_attention_heads": 16, "rope_write_interleaved": True},
}
LENGTHS = [300, 64, 1, 0, 129]
BF16_TOLERANCE = 2e-2  # of a row's largest logit


def decode_steps(decode, cache: PagedKVCache, steps: int = 3) -> list[torch.Tensor]:
    """Logits of some steps of sequences that have a past."""
    device = cache.block_table.device
    generator = torch.Generator().manual_seed(1)
    for layer in cache.layers:
        layer.copy_(torch.randn(layer.shape, generator=generator))
    for length in LENGTHS:
        cache.allocate(length)
    logits = []
    for _ in range(steps):
        cache.extend(1)
        ids = torch.randint(96, (len(LENGTHS), 1), generator=generator).to(device)
        with torch.inference_mode():
            logits.append(decode(ids, cache.layers, cache.block_table, cache.cache_seqlens).float().cpu())
    return logits


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_decodes_compiled(target, name, page_size, needs_inductor):
    config = MLAConfig(**SIZES, **SHAPES[name])
    if (config.head_dim, config.kv_lora_rank) not in target.dims or page_size not in target.page_sizes:
        pytest.skip(f"{target.name} does not serve {config.head_dim}, {config.kv_lora_rank}, pages of {page_size}")
    model = build(config, torch.bfloat16)

    def cache(dtype: torch.dtype, device: str) -> PagedKVCache:
        return PagedKVCache(
            1, 64, len(LENGTHS), 24, head_dim=config.head_dim, dtype=dtype, device=device, page_size=page_size
        )

    exact = build(config)
    exact.load_state_dict({key: weight.float() for key, weight in model.state_dict().items()})
    model.to(target.device)
    # on the CPU as traced, which is sooner compiled
    compiled = torch.compile(
        model.decode, fullgraph=True, backend="inductor" if target.device == "cuda" else "aot_eager"
    )
    actual = decode_steps(compiled, cache(target.dtypes[0], target.device))
    backends.use_backend("cpu")
    for logits, expected in zip(actual, decode_steps(exact.decode, cache(torch.float32, "cpu")), strict=True):
        error = (logits - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert error.max() < BF16_TOLERANCE
