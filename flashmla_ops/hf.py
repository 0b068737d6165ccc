"""Hugging Face DeepSeek checkpoints: their config.json, their tensors' names and layouts, and where each goes in
modules.py's models. `load` and `save` are what DeepseekModel.from_pretrained and save_pretrained call."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .modules import DeepseekModel, MLAConfig, MoE

# What a family's config.json may leave out, because its own code has it built in.
V2 = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "rope_interleave": True,
    "rope_write_interleaved": True,
}
V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "rope_write_interleaved": False}
FAMILIES = {"deepseek_v2": V2, "deepseek_v3": V3, "kimi_k2": V3}

UNUSED = ("rotary_emb.inv_freq", "self_attn.v_scale")  # ends of the names of tensors that no model of ours needs

# Settings that modules.py has no counterpart for, with the only value it serves.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1}

ATTENTION = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}
KV_SCALE = "self_attn.k_scale"  # of a layer, in checkpoints that were calibrated for a cache of one scale
FP8_BLOCK = (128, 128)  # rows and columns that share a scale, where quantization_config does not say


def load(directory, dtype: torch.dtype | None = None, device=None, mesh=None) -> DeepseekModel:
    """Reads config.json and the safetensors beside it, one file or sharded with an index.

    Each tensor is copied straight into its place in a model allocated without being initialised, and files are mapped
    one at a time: peak memory is the model and one shard. fp8 weights are dequantised with their block scales.
    Multi-token-prediction layers are skipped, and a line on stderr says so; progress is on stderr too. A layer's
    self_attn.k_scale, where the checkpoint has one, becomes its attn.kv_scale, which "fp8_tensor" caches use; there is
    one for keys and values, which are the same latents, so a v_scale is left out.

    Args:
        directory: of a DeepSeek V2, V3, R1 or Kimi K2 checkpoint.
        dtype: of the model; config.json's if None. The router stays fp32.
        device: of the model; torch's default device if None.
        mesh: loads this rank's part of the model, parallelized over the DeviceMesh (parallel.py); what belongs to other
            ranks is not read, but for the tensors of which this one has a part.
    Raises:
        RuntimeError: tensors are missing, unknown, or of a wrong shape, by name. NotImplementedError: a setting in
        config.json that modules.py does not serve. ImportError: safetensors is not installed. A mesh that does not
        divide the model raises before any file of weights is opened.
    """
    directory = Path(directory)
    settings = json.loads((directory / "config.json").read_text())
    config = config_from_hf(settings)
    block = (settings.get("quantization_config") or {}).get("weight_block_size") or FP8_BLOCK
    dtype = dtype or getattr(torch, settings.get("dtype") or settings.get("torch_dtype") or "float32")
    model = whole = DeepseekModel(config, device="meta", dtype=dtype)
    if mesh is not None:
        from .parallel import parallelize  # which imports modules.py as well

        model = parallelize(DeepseekModel(config, device="meta", dtype=dtype), mesh)
    checkpoint = _Checkpoint(directory)
    shapes = {name: place.shape for name, place in _places(whole, checkpoint.files).items()}
    _check_names(directory, checkpoint.files, shapes, config)
    model.to_empty(device=device or torch.get_default_device())
    for layer in model.layers:
        layer.attn.kv_scale.fill_(1.0)
    places = _places(model, checkpoint.files)
    for name in _with_progress(f"loading {directory.name}", sorted(places, key=checkpoint.order), places):
        tensor, place = checkpoint.read(name), places[name]
        if name.endswith(KV_SCALE) and tensor.numel() == 1:
            tensor = tensor.view(())  # [] or [1]
        if tensor.shape != shapes[name]:
            raise RuntimeError(f"{name}: expected shape {list(shapes[name])}, got {list(tensor.shape)} in {directory}")
        if tensor.dtype == torch.float8_e4m3fn:
            if _scale_of(name) not in checkpoint.files:
                raise RuntimeError(f"{name}: expected {_scale_of(name)} beside this fp8 weight in {directory}")
            scale = checkpoint.read(_scale_of(name)).to(place.device)
            tensor = dequantize(tensor.to(place.device), scale, block)
        if mesh is not None:
            tensor = model.parallel.part_of(name, tensor, place.shape)
        place.copy_(tensor)
    return model


def save(model: DeepseekModel, directory) -> None:
    """Writes config.json and model.safetensors, as transformers' DeepseekV3ForCausalLM (or V2's, for a softmax router)
    reads them: one file, one tensor an expert, each in the model's dtype. A kv_scale other than 1 is written too.

    Raises:
        RuntimeError: the model is one rank's part of another.
    """
    if model.parallel is not None:
        raise RuntimeError(f"model: expected a whole one, got a rank's part of one: {model.parallel.layout}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = config_to_hf(model.config, model.embed.weight.dtype)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    scales = {f"model.layers.{i}.{KV_SCALE}": layer.attn.kv_scale for i, layer in enumerate(model.layers)}
    places = _places(model, [name for name, scale in scales.items() if scale != 1])
    tensors = {name: place.cpu().clone(memory_format=torch.contiguous_format) for name, place in places.items()}
    _safetensors().torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------------- config


def config_from_hf(settings: dict) -> MLAConfig:
    """config.json's content as an MLAConfig; settings that no model of ours needs are ignored."""
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise NotImplementedError(f"model_type: expected one of {', '.join(FAMILIES)}, got {family}")
    for name, served in FIXED.items():
        if settings.get(name, served) != served:
            raise NotImplementedError(f"{name}: expected {served}, got {settings[name]}")
    method = (settings.get("quantization_config") or {}).get("quant_method", "fp8")
    if method != "fp8":
        raise NotImplementedError(f"quantization_config: expected quant_method fp8, got {method}")
    # transformers 5 has rope_parameters with rope_theta inside; before, rope_theta stood beside rope_scaling
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.get("type")
    theta = rope.pop("rope_theta", None) or settings.get("rope_theta")
    own = {
        "rope_scaling": None if kind in (None, "default") else {**rope, "type": kind},
        "rope_theta": theta,
    }
    known = {field.name for field in dataclasses.fields(MLAConfig)}
    found = {name: value for name, value in {**settings, **own}.items() if name in known and value is not None}
    return MLAConfig(**{**FAMILIES[family], **found})


def config_to_hf(config: MLAConfig, dtype: torch.dtype) -> dict:
    """The reverse of `config_from_hf`."""
    family = "deepseek_v2" if config.scoring_func == "softmax" else "deepseek_v3"
    settings = dataclasses.asdict(config)
    del settings["rope_write_interleaved"]  # the family says it
    if not config.n_routed_experts:
        settings["first_k_dense_replace"] = config.num_hidden_layers
    return {
        "architectures": [f"Deepseek{family[-2:].upper()}ForCausalLM"],
        "model_type": family,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 0,
        **FIXED,
        **settings,
    }


# ----------------------------------------------------------------------------------------------------------- names


def _places(model: DeepseekModel, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """The model's weights by their names in a checkpoint: views, so that what is copied to them lands in the model.

    Experts are one tensor each, unless transformers 5's fused tensors are among the checkpoint's `names`. Layers have a
    kv_scale where it is among them.
    """
    places = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if not model.config.tie_word_embeddings:
        places["lm_head.weight"] = model.head.weight
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        places[f"{prefix}input_layernorm.weight"] = layer.attn_norm.weight
        places[f"{prefix}post_attention_layernorm.weight"] = layer.ffn_norm.weight
        for theirs, ours in ATTENTION.items():
            if hasattr(layer.attn, ours):
                places[f"{prefix}self_attn.{theirs}.weight"] = getattr(layer.attn, ours).weight
        if f"{prefix}{KV_SCALE}" in names:
            places[f"{prefix}{KV_SCALE}"] = layer.attn.kv_scale
        if isinstance(layer.ffn, MoE):
            places |= _moe_places(f"{prefix}mlp.", layer.ffn, fused=f"{prefix}mlp.experts.gate_up_proj" in names)
        else:
            places |= _mlp_places(f"{prefix}mlp.", layer.ffn.gate_up.weight, layer.ffn.down.weight)
    return {name: place.detach() for name, place in places.items()}


def _moe_places(prefix: str, moe: MoE, fused: bool) -> dict[str, Tensor]:
    places = {f"{prefix}gate.{name}": weight for name, weight in moe.gate.named_parameters()}
    if moe.shared_experts is not None:
        shared = moe.shared_experts
        places |= _mlp_places(f"{prefix}shared_experts.", shared.gate_up.weight, shared.down.weight)
    if fused:
        return places | {f"{prefix}experts.gate_up_proj": moe.gate_up, f"{prefix}experts.down_proj": moe.down}
    for e, (gate_up, down) in enumerate(zip(moe.gate_up, moe.down, strict=True), moe.first_expert):
        places |= _mlp_places(f"{prefix}experts.{e}.", gate_up, down)
    return places


def _mlp_places(prefix: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2)
    return {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up, f"{prefix}down_proj.weight": down}


def _scale_of(name: str) -> str:
    return f"{name}_scale_inv"


def _check_names(directory: Path, names: Iterable[str], places: Iterable[str], config: MLAConfig) -> None:
    """Raises on names that the checkpoint lacks or that nothing here knows; prints what is skipped."""
    known = {*places, *map(_scale_of, places)}
    others = [name for name in names if name not in known and not name.endswith(UNUSED)]
    if config.tie_word_embeddings:
        others = [name for name in others if name != "lm_head.weight"]
    # only multi-token-prediction layers, which follow the model's own, have an eh_proj
    extra = {name.partition("eh_proj.")[0] for name in others if "eh_proj." in name}
    skipped = [name for name in others if name.startswith(tuple(extra))]
    problems = {"lacks": sorted(set(places).difference(names)), "has unknown": sorted({*others} - {*skipped})}
    sentences = [f"{verb} {_listed(listed)}" for verb, listed in problems.items() if listed]
    if sentences:
        raise RuntimeError(f"{directory}: the checkpoint {' and '.join(sentences)}")
    if skipped:
        print(f"skipped {len(skipped)} tensors of multi-token-prediction layers ({_listed(extra)})", file=sys.stderr)


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --------------------------------------------------------------------------------------------------------- tensors


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """fp8 weight [..., rows, cols] times scale [..., ceil(rows / block[0]), ceil(cols / block[1])]; fp32.

    DeepSeek calls the scale weight_scale_inv: a weight is its fp8 value times the scale of its block (arXiv 2412.19437,
    3.3.2).
    """
    blocks = [-(-size // edge) for size, edge in zip(weight.shape[-2:], block, strict=True)]
    if list(scale.shape[-2:]) != blocks:
        raise RuntimeError(
            f"scale: expected {blocks} blocks for a weight {list(weight.shape)}, got {list(scale.shape)}"
        )
    rows, cols = (
        torch.arange(n, device=scale.device) // edge for n, edge in zip(weight.shape[-2:], block, strict=True)
    )
    return weight.float().mul_(scale[..., rows, :][..., cols])


class _Checkpoint:
    """The tensors in a directory: `files` maps each name to its file. One file is open at a time, as what is mapped of
    it counts as memory in use."""

    def __init__(self, directory: Path):
        self._file, self._tensors = None, None
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            self.files = {name: directory / file for name, file in weight_map.items()}
        elif single.exists():
            self.files = dict.fromkeys(_open(single).keys(), single)
        else:
            raise RuntimeError(f"{directory}: expected {single.name} or {index.name} in it, found neither")

    def order(self, name: str) -> tuple[Path, str]:
        """Sorts names so that each file is opened once."""
        return self.files[name], name

    def read(self, name: str) -> Tensor:
        if self._file != self.files[name]:
            self._file, self._tensors = self.files[name], _open(self.files[name])
        return self._tensors.get_tensor(name)


def _open(file: Path):
    return _safetensors().safe_open(file, framework="pt")


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "checkpoints need the package safetensors: pip install safetensors, or flashmla_ops[hf]"
        ) from error
    return safetensors


def _with_progress(title: str, names: list[str], places: dict[str, Tensor]) -> Iterator[str]:
    """Yields the names, and shows on a terminal how much of their places' bytes is done."""
    total, done, shown = sum(place.nbytes for place in places.values()), 0, -1
    for name in names:
        yield name
        done += places[name].nbytes
        percent = 100 * done // total
        if percent > shown and sys.stderr.isatty():
            shown = percent
            print(f"\r{title}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {percent} %", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
