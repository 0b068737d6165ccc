"""Hugging Face DeepSeek checkpoints: their config.json, their tensors' names and layouts, and where each goes in
modules.py's models. `load` and `save` are what DeepseekModel.from_pretrained and save_pretrained call."""

import dataclasses
import json
import math
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .modules import DeepseekModel, MLAConfig, MLAttention, MoE

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
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}
KV_SCALE = "self_attn.k_scale"  # of a layer, in checkpoints that were calibrated for a cache of one scale
DTYPES = ("bfloat16", "float16", "float32", "float64")
STORED, FP8 = ("BF16", "F16", "F32", "F64"), "F8_E4M3"  # dtypes of tensors in safetensors' words; FP8 needs scales
LARGEST = 2**31 - 1
FP8_BLOCK = (128, 128)  # rows and columns that share a scale, where quantization_config does not say


def load(directory, dtype: torch.dtype | None = None, device=None, mesh=None) -> DeepseekModel:
    """Reads config.json and the safetensors beside it, one file or sharded with an index.

    Each tensor is copied straight into its place in a model allocated without being initialised, and files are mapped
    one at a time: peak memory is the model and one shard. fp8 weights are dequantised with their block scales. Names
    and shapes are checked before the model has any memory. Nothing but JSON and safetensors in the directory itself is
    read, and nothing in it is executed.
    Multi-token-prediction layers are skipped, and a line on stderr says so; progress is on stderr too. A layer's
    self_attn.k_scale, where the checkpoint has one, becomes its attn.kv_scale, which "fp8_tensor" caches use; there is
    one for keys and values, which are the same latents, so a v_scale is left out.

    Args:
        directory: of a DeepSeek V2, V3, R1 or Kimi K2 checkpoint.
        dtype: of the model; config.json's if None. The router stays fp32.
        device: of the model; if None the mesh's kind, or torch's default device without one.
        mesh: loads this rank's part of the model, parallelized over the DeviceMesh (parallel.py); what belongs to other
            ranks is not read, but for the tensors of which this one has a part.
    Raises:
        RuntimeError: tensors are missing, unknown, or of a wrong shape or dtype, by name; a file that is damaged,
        missing or elsewhere; a setting of a wrong type or size. NotImplementedError: a setting in config.json that
        modules.py does not serve. ImportError: safetensors is not installed. A mesh that does not divide the model
        raises before any file of weights is opened.
    """
    directory = Path(directory)
    config, block, stored = read_config(directory / "config.json")
    dtype = dtype or stored
    if mesh is not None:
        from .parallel import Layout, parallelize  # which imports modules.py as well

        Layout.of(mesh).check(config)
    checkpoint = _Checkpoint(directory)
    _check_counts(directory, config, len(checkpoint.files))
    model = DeepseekModel(config, device="meta", dtype=dtype)
    shapes = {name: place.shape for name, place in _places(model, checkpoint.files).items()}
    _check_names(directory, checkpoint.files, shapes, config)
    _check_tensors(directory, checkpoint, shapes, block)
    if mesh is not None:
        model = parallelize(model, mesh)
    model.to_empty(device=device or (torch.get_default_device() if mesh is None else mesh.device_type))
    for layer in model.layers:
        layer.attn.kv_scale.fill_(1.0)
    places = _places(model, checkpoint.files)
    for name in _with_progress(f"loading {directory.name}", sorted(places, key=checkpoint.order), places):
        tensor, place = checkpoint.read(name).view(shapes[name]), places[name]
        if tensor.dtype == torch.float8_e4m3fn:
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


def read_config(file: Path) -> tuple[MLAConfig, tuple[int, int], torch.dtype]:
    """A config.json's model, the rows and columns that share a scale of fp8 weights, and its dtype. What is wrong with
    a setting raises as from `config_from_hf`, with the file's name before it."""
    settings = read_json(file)
    try:
        return config_from_hf(settings), _block_of(settings), _dtype_of(settings)
    except RuntimeError as error:  # or its kind, NotImplementedError
        raise type(error)(f"{file}: {error}") from error


def config_from_hf(settings: dict) -> MLAConfig:
    """config.json's content as an MLAConfig; settings that no model of ours needs are ignored."""
    family = settings.get("model_type")
    if family not in [*FAMILIES]:  # by equality: it may be anything
        raise NotImplementedError(f"model_type: expected one of {', '.join(FAMILIES)}, got {family}")
    for name, served in FIXED.items():
        if settings.get(name, served) != served:
            raise NotImplementedError(f"{name}: expected {served}, got {settings[name]}")
    method = _object(settings, "quantization_config").get("quant_method", "fp8")
    if method != "fp8":
        raise NotImplementedError(f"quantization_config: expected quant_method fp8, got {method}")
    # transformers 5 has rope_parameters with rope_theta inside; before, rope_theta stood beside rope_scaling
    rope = dict(_object(settings, "rope_parameters") or _object(settings, "rope_scaling"))
    kind = rope.pop("rope_type", None) or rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or settings.get("rope_theta")
    plain = kind == "default" or not (kind or rope)
    own = {"rope_scaling": None if plain else {**rope, "type": kind}, "rope_theta": theta}
    hints, found = typing.get_type_hints(MLAConfig), dict(FAMILIES[family])
    for field in dataclasses.fields(MLAConfig):
        value = {**settings, **own}.get(field.name)
        if value is None:
            if field.name not in found and field.default is dataclasses.MISSING:
                raise RuntimeError(f"{field.name}: expected a value, got none")
            continue
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        fits = type(value) in kinds or (float in kinds and type(value) is int)
        if not fits or (type(value) in (int, float) and not 0 <= value <= LARGEST):
            kind = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise RuntimeError(f"{field.name}: expected {kind}, numbers from 0 to {LARGEST}, got {value!r}")
        found[field.name] = value
    return MLAConfig(**found)


def _object(settings: dict, name: str) -> dict:
    """A setting that is an object itself; empty if it is left out."""
    value = settings.get(name)
    if value is not None and not isinstance(value, dict):
        raise RuntimeError(f"{name}: expected an object, got {type(value).__name__}")
    return value or {}


def _dtype_of(settings: dict) -> torch.dtype:
    name = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise RuntimeError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)


def _block_of(settings: dict) -> tuple[int, int]:
    block = _object(settings, "quantization_config").get("weight_block_size")
    if block is None:
        return FP8_BLOCK
    if type(block) is not list or len(block) != 2 or not all(type(n) is int and 0 < n <= LARGEST for n in block):
        raise RuntimeError(f"weight_block_size: expected two numbers of rows and columns, got {block!r}")
    return tuple(block)


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
        places |= _attention_places(f"{prefix}self_attn.", layer.attn)
        if f"{prefix}{KV_SCALE}" in names:
            places[f"{prefix}{KV_SCALE}"] = layer.attn.kv_scale
        if isinstance(layer.ffn, MoE):
            places |= _moe_places(f"{prefix}mlp.", layer.ffn, fused=f"{prefix}mlp.experts.gate_up_proj" in names)
        else:
            places |= _mlp_places(f"{prefix}mlp.", layer.ffn.gate_up.weight, layer.ffn.down.weight)
    return {name: place.detach() for name, place in places.items()}


def _attention_places(prefix: str, attn: MLAttention) -> dict[str, Tensor]:
    places = {
        f"{prefix}{theirs}.weight": getattr(attn, ours).weight
        for theirs, ours in ATTENTION.items()
        if hasattr(attn, ours)
    }
    q_rank = attn.config.q_lora_rank
    if q_rank is not None:
        places[f"{prefix}q_a_proj.weight"] = attn.wqkv_a.weight[:q_rank]
    return places | {f"{prefix}kv_a_proj_with_mqa.weight": attn.wqkv_a.weight[q_rank or 0 :]}


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
    after = re.compile(r"(model\.layers\.(\d+)\.).*eh_proj\.")
    found = [match for name in others if (match := after.match(name))]
    extra = {match[1] for match in found if int(match[2]) >= config.num_hidden_layers}
    skipped = [name for name in others if name.startswith(tuple(extra))]
    problems = {"lacks": sorted(set(places).difference(names)), "has unknown": sorted({*others} - {*skipped})}
    sentences = [f"{verb} {_listed(listed)}" for verb, listed in problems.items() if listed]
    if sentences:
        raise RuntimeError(f"{directory}: the checkpoint {' and '.join(sentences)}")
    if skipped:
        print(f"skipped {len(skipped)} tensors of multi-token-prediction layers ({_listed(extra)})", file=sys.stderr)


def _check_counts(directory: Path, config: MLAConfig, num_tensors: int) -> None:
    """Every layer has tensors of its own, and experts share few: building more than these only to find that they lack
    tensors would take time without end."""
    layers, experts = config.num_hidden_layers, config.n_routed_experts
    sparse = max(layers - config.first_k_dense_replace, 1)
    counts = {"num_hidden_layers": (layers, num_tensors), "n_routed_experts": (experts, 64 * num_tensors // sparse)}
    for name, (count, most) in counts.items():
        if count > most:
            raise RuntimeError(f"{name}: expected at most what {num_tensors} tensors in {directory} hold, got {count}")


def _check_tensors(directory: Path, checkpoint: "_Checkpoint", shapes: dict[str, torch.Size], block) -> None:
    """Raises on a shape that is not the model's and on a dtype that is not read, before the model has any memory. A
    kv_scale may be [] or [1], and is a finite number above 0."""

    def check(name: str, expected: list[int], dtypes: tuple[str, ...]) -> str:
        dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
        if dtype not in dtypes:
            raise RuntimeError(f"{name}: expected one of {', '.join(dtypes)}, got {dtype} in {directory}")
        if shape != expected and not (name.endswith(KV_SCALE) and shape == [1]):
            raise RuntimeError(f"{name}: expected shape {expected}, got {shape} in {directory}")
        return dtype

    for name in sorted(shapes, key=checkpoint.order):
        shape, scale = list(shapes[name]), _scale_of(name)
        dtype, scaled = check(name, shape, (*STORED, FP8) if len(shape) > 1 else STORED), scale in checkpoint.files
        if dtype == FP8 and not scaled:
            raise RuntimeError(f"{name}: expected {scale} beside this fp8 weight in {directory}")
        if dtype != FP8 and scaled:
            raise RuntimeError(f"{scale}: expected no scale of a tensor in {dtype}, got one in {directory}")
        if scaled:
            check(scale, [*shape[:-2], *_blocks(shape, block)], STORED)
        if name.endswith(KV_SCALE) and not 0 < (value := checkpoint.read(name).item()) < math.inf:
            raise RuntimeError(f"{name}: expected a finite value above 0, got {value} in {directory}")


def _blocks(shape: Sequence[int], block: tuple[int, int]) -> list[int]:
    return [-(-size // edge) for size, edge in zip(shape[-2:], block, strict=True)]


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --------------------------------------------------------------------------------------------------------- tensors


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """fp8 weight [..., rows, cols] times scale [..., ceil(rows / block[0]), ceil(cols / block[1])]; fp32.

    DeepSeek calls the scale weight_scale_inv: a weight is its fp8 value times the scale of its block (arXiv 2412.19437,
    3.3.2).
    """
    blocks = _blocks(weight.shape, block)
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
    it counts as memory in use. An index may name files beside it only."""

    def __init__(self, directory: Path):
        self._file, self._tensors = None, None
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise RuntimeError(
                    f"{index}: expected a weight_map of names and files, got {type(weight_map).__name__}"
                )
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    raise RuntimeError(f"{name}: expected a .safetensors file beside {index}, got {file!r}")
            self.files = {name: directory / file for name, file in weight_map.items()}
        elif single.exists():
            self.files = dict.fromkeys(_open(single).keys(), single)
        else:
            raise RuntimeError(f"{directory}: expected {single.name} or {index.name} in it, found neither")

    def order(self, name: str) -> tuple[Path, str]:
        """Sorts names so that each file is opened once."""
        return self.files[name], name

    def shape(self, name: str) -> list[int]:
        return self._opened(name).get_slice(name).get_shape()

    def dtype(self, name: str) -> str:
        """In the format's words: F32, I8, ..."""
        return self._opened(name).get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        return self._opened(name).get_tensor(name)

    def _opened(self, name: str):
        if self._file != self.files[name]:
            tensors = _open(self.files[name])
            self._file, self._tensors, self._names = self.files[name], tensors, set(tensors.keys())
        if name not in self._names:
            raise RuntimeError(f"{name}: expected in {self._file}, as the index says, got a file without it")
        return self._tensors


def _open(file: Path):
    safe_open = _safetensors().safe_open
    if not file.is_file():
        raise RuntimeError(f"{file}: expected a file of the checkpoint, got none")
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # of the safetensors library, which has its own kind
        raise RuntimeError(
            f"{file}: expected a whole safetensors file, got one of {file.stat().st_size} bytes: {error}"
        ) from error


def read_json(file: Path) -> dict:
    """An object in a JSON file; RuntimeError if it holds none, or cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RuntimeError(f"{file}: expected JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise RuntimeError(f"{file}: expected an object, got {type(content).__name__}")
    return content


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
