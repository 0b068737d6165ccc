"""Checkpoints: what transformers' own DeepSeek models save, ours load, and give the same logits; and the reverse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", "5.0", reason="transformers 5 is the oracle: pip install transformers"
)
safetensors_torch = pytest.importorskip("safetensors.torch", reason="checkpoints: pip install safetensors")

from flashmla_ops import PagedKVCache, hf  # noqa: E402
from flashmla_ops.modules import DeepseekModel  # noqa: E402

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {"rope_theta": 50.0, "original_max_position_embeddings": 512, "beta_fast": 8}  # even the slowest pair turns
MODELS = {
    "v3": ("V3", {"n_group": 4, "topk_group": 2, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.6}}),
    "v3-tied-halves": (
        "V3",
        {
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "rope_interleave": False,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
        },
    ),
    "v2-lite": ("V2", {"topk_method": "greedy", "q_lora_rank": None, "rope_parameters": {**YARN, **LONG}}),
    "v2-tied": (
        "V2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "routed_scaling_factor": 16.0,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7, "truncate": False},
        },
    ),
}


def build(name: str):
    """A transformers model whose every part matters to its logits: weights of std 1 / sqrt(fan in), norms near 1."""
    family, settings = MODELS[name]
    config = getattr(transformers, f"Deepseek{family}Config")(**{**SIZES, **settings})
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, f"Deepseek{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.state_dict().items():
            if key.endswith("e_score_correction_bias"):
                weight.normal_(std=0.1)
            elif weight.dim() == 1:
                weight.normal_(1.0, 0.2)
            else:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """fp32 rounding only: logits are of order 1."""
    assert 0.5 < theirs.std() < 3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from what it saved); V3's checkpoint is sharded."""
    theirs, directory = build(request.param), tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory, max_shard_size="100KB" if request.param == "v3" else "1GB")
    assert (directory / "model.safetensors.index.json").exists() == (request.param == "v3")
    return theirs, DeepseekModel.from_pretrained(directory)


@torch.no_grad()
def logits_of(theirs, input_ids: torch.Tensor) -> torch.Tensor:
    return theirs(input_ids, use_cache=False).logits


def test_forward(pair):
    theirs, ours = pair
    input_ids = torch.randint(SIZES["vocab_size"], (2, 70))
    close(ours(input_ids), logits_of(theirs, input_ids))


def test_prefill_chunks_and_32_decode_steps(pair):
    """Three rows of different lengths, prefilled in two chunks, and an empty one; then 16 steps of 1, 8 of 2 tokens."""
    theirs, ours = pair
    first, second, steps, width = [17, 5, 30], [9, 20, 1], [1] * 16 + [2] * 16, 48
    input_ids = torch.randint(SIZES["vocab_size"], (3, max(map(sum, zip(first, second, strict=True))) + width))
    expected = logits_of(theirs, input_ids)
    cache = PagedKVCache(3, 40, 4, 8, head_dim=80, page_size=16, max_new_tokens=32, dtype=torch.float32)
    for layer in cache.layers:
        layer.fill_(torch.nan)  # what was never written must not be read
    for _ in range(3):
        cache.allocate()
    done = [0, 0, 0]

    def chunk(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `counts` tokens of each row, padded on the right to the longest, and their expected logits."""
        tokens = torch.zeros(4, max(counts), dtype=torch.long)
        for row, count in enumerate(counts):
            tokens[row, :count] = input_ids[row, done[row] : done[row] + count]
        cache.extend({row: count for row, count in enumerate(counts)})
        wanted = [expected[row, done[row] : done[row] + count] for row, count in enumerate(counts)]
        for row, count in enumerate(counts):
            done[row] += count
        return tokens, wanted

    for counts, chunked in ((first, False), (second, True)):
        tokens, wanted = chunk(counts)
        lengths = torch.tensor([*counts, 0], dtype=torch.int32)
        seqlens = cache.cache_seqlens if chunked else None
        logits = ours.prefill(tokens, lengths, cache.layers, cache.block_table, seqlens)
        assert logits.isfinite().all()
        for row, count in enumerate(counts):
            close(logits[row, :count], wanted[row])
    for s_q in steps:
        tokens, wanted = chunk([s_q] * 3)
        logits = ours.decode(tokens, cache.layers, cache.block_table, cache.cache_seqlens)
        assert logits.isfinite().all()
        close(logits[:3], torch.stack(wanted))


def test_prefill_last_only(pair):
    theirs, ours = pair
    input_ids = torch.randint(SIZES["vocab_size"], (2, 12))
    cache = PagedKVCache(3, 8, 2, 2, head_dim=80, page_size=16, dtype=torch.float32)
    cache.allocate(12), cache.allocate(7)
    lengths = torch.tensor([12, 7], dtype=torch.int32)
    logits = ours.prefill(input_ids, lengths, cache.layers, cache.block_table, last_only=True)
    close(logits, logits_of(theirs, input_ids)[torch.arange(2), lengths - 1])


def test_transformers_reads_what_we_save(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path)
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    input_ids = torch.randint(SIZES["vocab_size"], (2, 40))
    close(logits_of(again, input_ids), logits_of(theirs, input_ids))
    assert DeepseekModel.from_pretrained(tmp_path).config == ours.config


def test_bf16_round_trip(tmp_path):
    """The model's dtype is kept, the router stays fp32, and nothing is rounded."""
    build("v3").save_pretrained(tmp_path / "fp32")
    model = DeepseekModel.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    again = DeepseekModel.from_pretrained(tmp_path / "bf16")
    assert {weight.dtype for name, weight in again.named_parameters() if ".gate." not in name} == {torch.bfloat16}
    assert {weight.dtype for name, weight in again.named_parameters() if ".gate." in name} == {torch.float32}
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert weight.equal(other), name
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16")
    assert theirs.dtype == torch.bfloat16


def test_saving_again_to_the_same_place(tmp_path):
    first, second = build("v3"), build("v3")
    torch.nn.init.normal_(second.lm_head.weight)
    for model in (first, second):
        model.save_pretrained(tmp_path)
        assert DeepseekModel.from_pretrained(tmp_path).head.weight.equal(model.lm_head.weight)


PUBLISHED = {  # the settings of config.json that say what kind of model it is
    "DeepSeek-V2-Lite": ("deepseek_v2", {"q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6}),
    "DeepSeek-V3": ("deepseek_v3", {"q_lora_rank": 1536, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}),
    "Kimi-K2": ("kimi_k2", {"n_routed_experts": 384, "n_group": 1, "topk_group": 1, "rope_theta": 50000.0}),
}


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_what_a_family_leaves_out(published):
    family, settings = published
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    sizes = {name: SIZES[name] for name in (*names, "moe_intermediate_size", "num_experts_per_tok")}
    config = hf.config_from_hf({"model_type": family, "num_hidden_layers": 2, "n_group": None, **sizes, **settings})
    assert {name: getattr(config, name) for name in settings} == settings
    kind = (config.scoring_func, config.topk_method, config.norm_topk_prob, config.rope_write_interleaved)
    assert kind == (("softmax", "greedy", False, True) if "v2" in family else ("sigmoid", "noaux_tc", True, False))
    assert config.rope_interleave and config.rope_scaling is None and config.n_group >= 1


# ------------------------------------------------------------------------------------------------ written by the test


@pytest.fixture(scope="module")
def v3():
    return build("v3")


def write(directory: Path, theirs, tensors: dict[str, torch.Tensor], **settings) -> Path:
    """A checkpoint with these tensors and theirs's config, with some settings changed."""
    directory.mkdir(exist_ok=True)
    config = {**json.loads(theirs.config.to_json_string(use_diff=False)), "dtype": "float32", **settings}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    safetensors_torch.save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    return directory


def per_expert(theirs) -> dict[str, torch.Tensor]:
    """The model's tensors with one of each kind an expert, as DeepSeek publishes them."""
    tensors = {}
    for name, weight in theirs.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        for e in range(SIZES["n_routed_experts"] if prefix.endswith("experts") else 0):
            if kind == "gate_up_proj":
                tensors[f"{prefix}.{e}.gate_proj.weight"], tensors[f"{prefix}.{e}.up_proj.weight"] = weight[e].chunk(2)
            else:
                tensors[f"{prefix}.{e}.down_proj.weight"] = weight[e]
        if not prefix.endswith("experts"):
            tensors[name] = weight
    return tensors


@pytest.mark.parametrize("layout", [per_expert, lambda theirs: theirs.state_dict()], ids=["per-expert", "fused"])
def test_layouts_and_old_config(v3, layout, tmp_path):
    """Both layouts of experts; rope_scaling and rope_theta as before transformers 5."""
    rope = dict(v3.config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    assert "model.layers.1.mlp.experts.gate_up_proj" in v3.state_dict()
    old = {"rope_parameters": ..., "rope_scaling": {**rope, "type": kind}, "rope_theta": theta}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # which old checkpoints have
    directory = write(tmp_path, v3, layout(v3) | buffer, **old)
    input_ids = torch.randint(SIZES["vocab_size"], (2, 40))
    close(DeepseekModel.from_pretrained(directory)(input_ids), logits_of(v3, input_ids))


@pytest.mark.parametrize("block", [(128, 128), (32, 16)])
@pytest.mark.parametrize("fused", [False, True])
def test_fp8_block_scales(v3, block, fused, tmp_path):
    """Weights quantised here block by block; scales in another shard than their weights."""
    exact, quantised, scales = {}, {}, {}
    for name, weight in (v3.state_dict() if fused else per_expert(v3)).items():
        linear = "_proj" in name and "mlp.gate.weight" not in name
        if not linear:
            exact[name] = quantised[name] = weight
            continue
        rows, cols = weight.shape[-2:]
        scale = torch.ones(*weight.shape[:-2], -(-rows // block[0]), -(-cols // block[1]))
        exact[name], quantised[name] = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        for i in range(scale.shape[-2]):
            for j in range(scale.shape[-1]):
                at = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scale[..., i, j] = weight[at].abs().amax((-2, -1)) / 448
                each = scale[..., i, j][..., None, None]
                quantised[name][at] = (weight[at] / each).to(torch.float8_e4m3fn)
                exact[name][at] = quantised[name][at].float() * each
        scales[f"{name}_scale_inv"] = scale
    assert len(scales) > 30 or fused
    method = {"quant_method": "fp8", "weight_block_size": list(block)}
    directory = write(tmp_path / "fp8", v3, quantised, quantization_config=method if block != (128, 128) else ...)
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    safetensors_torch.save_file(scales, directory / "scales.safetensors")
    where = {**dict.fromkeys(quantised, "weights.safetensors"), **dict.fromkeys(scales, "scales.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    ours = DeepseekModel.from_pretrained(directory)
    plain = DeepseekModel.from_pretrained(write(tmp_path / "plain", v3, exact))
    for (name, weight), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=0, msg=name)
    changed = (plain.layers[0].attn.wo.weight - v3.model.layers[0].self_attn.o_proj.weight).abs().max()
    assert changed > 1e-3  # quantisation was not a no-op

    del where[next(iter(scales))]
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(RuntimeError, match=f"expected {next(iter(scales))} beside this fp8 weight"):
        DeepseekModel.from_pretrained(directory)


def test_multi_token_prediction_layers_are_skipped(v3, tmp_path, capsys):
    extra = {f"model.layers.3.{name}": torch.ones(2) for name in ("eh_proj.weight", "enorm.weight", "mlp.gate.weight")}
    ours = DeepseekModel.from_pretrained(write(tmp_path, v3, per_expert(v3) | extra))
    assert capsys.readouterr().err.splitlines() == [
        "skipped 3 tensors of multi-token-prediction layers (model.layers.3.)"
    ]
    input_ids = torch.randint(SIZES["vocab_size"], (1, 20))
    close(ours(input_ids), logits_of(v3, input_ids))


def test_tied_head_may_be_there(tmp_path):
    theirs = build("v2-tied")
    tensors = per_expert(theirs) | {"lm_head.weight": theirs.lm_head.weight.clone()}
    input_ids = torch.randint(SIZES["vocab_size"], (1, 20))
    close(DeepseekModel.from_pretrained(write(tmp_path, theirs, tensors))(input_ids), logits_of(theirs, input_ids))


def test_missing_and_unknown_names(v3, tmp_path):
    tensors = per_expert(v3)
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"], tensors["lm_head.weight"]
    tensors |= {f"model.layers.{name}.weight": torch.ones(2) for name in ("0.self_attn.indexer", "3.norm")}
    with pytest.raises(RuntimeError) as error:
        DeepseekModel.from_pretrained(write(tmp_path, v3, tensors))
    assert str(error.value) == (
        f"{tmp_path}: the checkpoint lacks lm_head.weight, model.layers.1.mlp.experts.7.up_proj.weight "
        "and has unknown model.layers.0.self_attn.indexer.weight, model.layers.3.norm.weight"
    )


def test_wrong_shape(v3, tmp_path):
    tensors = per_expert(v3) | {"model.norm.weight": torch.ones(63)}
    with pytest.raises(RuntimeError, match=r"model.norm.weight: expected shape \[64\], got \[63\]"):
        DeepseekModel.from_pretrained(write(tmp_path, v3, tensors))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected one of deepseek_v2, deepseek_v3, kimi_k2, got llama"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        (
            {"rope_parameters": {**YARN, "rope_type": "linear"}},
            "rope_scaling type: expected one of yarn, got linear",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "expected quant_method fp8, got awq"),
        ({"scoring_func": "relu"}, "scoring_func: expected one of sigmoid, softmax, got relu"),
    ],
)
def test_settings_not_served(v3, settings, message, tmp_path):
    with pytest.raises(NotImplementedError, match=message):
        DeepseekModel.from_pretrained(write(tmp_path, v3, {}, **settings))


def test_no_weights_in_directory(v3, tmp_path):
    (write(tmp_path, v3, {}) / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"expected model.safetensors or model.safetensors.index.json in it"):
        DeepseekModel.from_pretrained(tmp_path)


def test_without_safetensors(v3, tmp_path, monkeypatch):
    write(tmp_path, v3, {})
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        DeepseekModel.from_pretrained(tmp_path)


def test_progress_on_a_terminal_only(v3, tmp_path, capsys, monkeypatch):
    write(tmp_path, v3, per_expert(v3))
    DeepseekModel.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    DeepseekModel.from_pretrained(tmp_path)
    shown = capsys.readouterr().err.strip().split("\r")
    assert len(shown) > 20 and shown[0].endswith(" 1 %") and shown[-1].endswith("100 %")


PEAK = """
import resource, sys, torch
from flashmla_ops.modules import DeepseekModel
import safetensors.torch
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = DeepseekModel.from_pretrained(sys.argv[1])
print(peak() - before, sum(weight.nbytes for weight in model.parameters()))
"""


def test_peak_memory_is_the_model_and_one_shard(v3, tmp_path):
    settings = {"hidden_size": 1024, "intermediate_size": 4096, "n_routed_experts": 16, "moe_intermediate_size": 512}
    config = transformers.DeepseekV3Config(**{**SIZES, **settings, "num_hidden_layers": 3}, n_group=1, topk_group=1)
    big = transformers.DeepseekV3ForCausalLM(config)
    big.save_pretrained(tmp_path, max_shard_size="30MB")
    shard = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    growth, model = map(int, run.stdout.split())
    assert model > 200e6 and shard < 35e6
    assert growth < model + shard + 20e6, f"{growth / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB"
