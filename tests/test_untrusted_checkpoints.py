"""Checkpoints from anybody: what is damaged, lies or points elsewhere raises with its name, before memory is taken, and
nothing in a checkpoint is executed."""

import dataclasses
import json
import pickle
import resource
import struct
from pathlib import Path

import pytest
import torch

safetensors_torch = pytest.importorskip("safetensors.torch", reason="checkpoints: pip install safetensors")

from flashmla_ops.modules import DeepseekModel, MLAConfig  # noqa: E402

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = MLAConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_shared_experts=1,
)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    directory = tmp_path / "checkpoint"
    DeepseekModel(CONFIG).save_pretrained(directory)
    return directory


def refused(directory: Path, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        DeepseekModel.from_pretrained(directory)


def configure(directory: Path, **settings) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def indexed(directory: Path, **changes) -> None:
    """The same weights by an index, whose entries are then changed."""
    names = safetensors_torch.load_file(directory / WEIGHTS)
    weight_map = dict.fromkeys(names, WEIGHTS)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map | changes}))


def test_the_checkpoint_itself_loads(checkpoint):
    model = DeepseekModel.from_pretrained(checkpoint)
    indexed(checkpoint)
    again = DeepseekModel.from_pretrained(checkpoint)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kept", [0, 4, 100, -100, -1])
def test_truncated_weights(checkpoint, kept):
    file = checkpoint / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    refused(checkpoint, rf"{WEIGHTS}: expected a whole safetensors file, got one of \d+ bytes")


def header_of(content: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8 + 1])
def test_a_header_of_absurd_size(checkpoint, size):
    header, data = header_of((checkpoint / WEIGHTS).read_bytes())
    (checkpoint / WEIGHTS).write_bytes(with_header(json.dumps(header).encode(), data, size))
    refused(checkpoint, f"{WEIGHTS}: expected a whole safetensors file")


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [-8, 0]},
        {"shape": [2**40, 2**40]},
        {"dtype": "OBJECT"},
        {"shape": "32"},
    ],
)
def test_a_header_that_lies(checkpoint, change):
    header, data = header_of((checkpoint / WEIGHTS).read_bytes())
    header["model.norm.weight"] |= change
    (checkpoint / WEIGHTS).write_bytes(with_header(json.dumps(header).encode(), data))
    refused(checkpoint, f"{WEIGHTS}: expected a whole safetensors file")


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_pickle_is_never_read(checkpoint):
    """Neither under its own name nor under a safetensors file's, nor named by an index."""
    content = pickle.dumps(Payload())
    (checkpoint / "pytorch_model.bin").write_bytes(content)
    DeepseekModel.from_pretrained(checkpoint)
    indexed(checkpoint, **{"model.norm.weight": "pytorch_model.bin"})
    refused(checkpoint, r"model.norm.weight: expected a .safetensors file beside .*, got 'pytorch_model.bin'")
    (checkpoint / INDEX).unlink()
    (checkpoint / WEIGHTS).write_bytes(content)
    refused(checkpoint, f"{WEIGHTS}: expected a whole safetensors file")


def test_code_in_a_checkpoint_is_never_imported(checkpoint):
    (checkpoint / "modeling_deepseek.py").write_text("raise SystemExit('executed')")
    configure(checkpoint, auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"})
    DeepseekModel.from_pretrained(checkpoint)


# --------------------------------------------------------------------------------------------------------------- index


@pytest.mark.parametrize(
    "entry", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a.bin", 5, None, ["a.safetensors"]]
)
def test_entries_that_leave_the_directory(checkpoint, entry):
    (checkpoint.parent / "other.safetensors").write_bytes((checkpoint / WEIGHTS).read_bytes())
    indexed(checkpoint, **{"lm_head.weight": entry})
    refused(checkpoint, r"lm_head.weight: expected a .safetensors file beside .*, got ")


def test_entries_without_their_file_or_tensor(checkpoint):
    indexed(checkpoint, **{"lm_head.weight": "model-2.safetensors"})
    refused(checkpoint, "model-2.safetensors: expected a file of the checkpoint, got none")
    safetensors_torch.save_file({"x": torch.ones(1)}, checkpoint / "model-2.safetensors")
    refused(checkpoint, "lm_head.weight: expected in .*model-2.safetensors, as the index says, got a file without it")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected JSON, got JSONDecodeError"),
        ("[" * 100_000, "expected JSON, got RecursionError"),
        ("[]", "expected an object, got list"),
        ("{}", "expected a weight_map of names and files, got NoneType"),
        ('{"weight_map": []}', "expected a weight_map of names and files, got list"),
        (b"\xff\xfe", "expected JSON, got UnicodeDecodeError"),
    ],
)
def test_an_index_that_is_none(checkpoint, content, message):
    (checkpoint / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(checkpoint, f"{INDEX}: {message}")


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000])
def test_a_config_that_is_none(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    refused(checkpoint, r"config.json: expected (JSON|an object), got ")


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_size", "32"),
        ("hidden_size", -1),
        ("hidden_size", 2**40),
        ("hidden_size", 1.5),
        ("num_attention_heads", True),
        ("rms_norm_eps", [1]),
        ("norm_topk_prob", 1),
        ("q_lora_rank", {}),
        ("routed_scaling_factor", float("nan")),
    ],
)
def test_settings_of_a_wrong_type_or_size(checkpoint, name, value):
    configure(checkpoint, **{name: value})
    refused(checkpoint, rf"checkpoint/config.json: {name}: expected \w+.*, numbers from 0 to 2147483647, got ")


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling", "quantization_config"])
@pytest.mark.parametrize("value", [[], ["yarn"], "yarn", 1, False])
def test_containers_of_a_wrong_kind(checkpoint, name, value):
    configure(checkpoint, **{name: value})
    refused(checkpoint, f"checkpoint/config.json: {name}: expected an object, got {type(value).__name__}")


@pytest.mark.parametrize("value", [["deepseek_v3"], {}, None, 3])
def test_a_model_type_of_a_wrong_kind(checkpoint, value):
    configure(checkpoint, model_type=value)
    refused(checkpoint, "checkpoint/config.json: model_type: expected one of deepseek_v2, deepseek_v3, kimi_k2, got ")


def test_settings_that_have_no_default(checkpoint):
    configure(checkpoint, hidden_size=None)
    refused(checkpoint, "checkpoint/config.json: hidden_size: expected a value, got none")


@pytest.mark.parametrize("missing", ["config.json", ""])
def test_files_that_are_not_there(checkpoint, missing):
    if missing:
        (checkpoint / missing).unlink()
    directory = checkpoint if missing else checkpoint / "none"
    refused(directory, f"{directory}/config.json: expected JSON, got FileNotFoundError")


@pytest.mark.parametrize(
    "settings, message",
    [
        *(({name: 0}, f"{name}: expected at least 1, got 0") for name in ("num_hidden_layers", "kv_lora_rank")),
        *(({name: 0}, f"{name}: expected at least 1, got 0") for name in ("q_lora_rank", "moe_intermediate_size")),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim: expected an even number, got 15"),
        ({"n_group": 0}, "n_group: expected to divide n_routed_experts = 4 into groups of at least 2, got 0"),
        ({"n_group": 3}, "n_group: expected to divide .*, got 3"),
        ({"n_group": 4}, "n_group: expected to divide .*, got 4"),  # a group is judged by its two best
        ({"n_group": 2, "topk_group": 3}, "topk_group: expected 1 to 2, got 3"),
        ({"n_group": 2, "topk_group": 0}, "topk_group: expected 1 to 2, got 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: expected 1 to 4, got 5"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: expected 1 to 4, got 0"),
        ({"n_group": 2, "num_experts_per_tok": 3}, "num_experts_per_tok: expected 1 to 2, got 3"),
    ],
)
def test_settings_that_no_model_can_have(checkpoint, settings, message):
    configure(checkpoint, **settings)
    refused(checkpoint, f"checkpoint/config.json: {message}")


def test_groups_that_a_model_can_have(checkpoint):
    for settings in ({"n_group": 2, "topk_group": 2}, {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}):
        configure(checkpoint, **settings)
        logits = DeepseekModel.from_pretrained(checkpoint)(torch.zeros(1, 3, dtype=torch.long))
        assert logits.isfinite().all()
    dataclasses.replace(CONFIG, n_group=3, topk_method="greedy")  # which has no groups


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_NUMBERS = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
NO_FACTORS = (0, -4.0, 1e-320, 1e308, 10**400, float("nan"), float("inf"), "4", None, [4.0])


@pytest.mark.parametrize(
    "changes, message",
    [
        *(({"factor": value}, "factor: expected a number from 1e-06 to 2147483647, got ") for value in NO_FACTORS),
        *(({name: 0}, f"{name}: expected a number from 1e-06 to 2147483647, got 0") for name in YARN_NUMBERS),
        *(({name: 1e-320}, f"{name}: expected a number from 1e-06 to 2147483647, got 1e-320") for name in YARN_NUMBERS),
        *(({name: 1e308}, rf"{name}: expected .*, got 1e\+308") for name in YARN_NUMBERS),
        ({"beta_fast": -1}, "beta_fast: expected a number from 1e-06 to 2147483647, got -1"),
        ({"beta_slow": []}, r"beta_slow: expected a number from 1e-06 to 2147483647, got \[\]"),
        ({"mscale": -1}, "mscale: expected a number from 0 to 2147483647, got -1"),
        ({"mscale": float("nan")}, "mscale: expected a number from 0 to 2147483647, got nan"),
        ({"mscale_all_dim": True}, "mscale_all_dim: expected a number from 0 to 2147483647, got True"),
        ({"truncate": "no"}, "truncate: expected True or False, got 'no'"),
        ({"type": None}, "type: expected one of yarn, got None"),
        ({"type": ["yarn"]}, r"type: expected one of yarn, got \['yarn'\]"),
    ],
)
def test_numbers_of_yarn(checkpoint, changes, message):
    configure(checkpoint, rope_scaling=YARN)
    DeepseekModel.from_pretrained(checkpoint)
    configure(checkpoint, rope_scaling=YARN | changes)
    refused(checkpoint, f"checkpoint/config.json: rope_scaling {message}")


@pytest.mark.parametrize("value", [1e-6, 2**31 - 1])
@pytest.mark.parametrize("name", ["factor", *YARN_NUMBERS])
def test_numbers_of_yarn_at_their_ends(checkpoint, name, value):
    configure(checkpoint, rope_scaling=YARN | {name: value})
    logits = DeepseekModel.from_pretrained(checkpoint)(torch.zeros(1, 3, dtype=torch.long))
    assert logits.isfinite().all()


@pytest.mark.parametrize("theta", [1, 0.5, 0])
def test_a_rotation_without_frequencies(checkpoint, theta):
    configure(checkpoint, rope_theta=theta)
    refused(checkpoint, f"checkpoint/config.json: rope_theta: expected a number above 1, got {theta}")


@pytest.mark.parametrize("name", ["load", "nn", "int8", "__dict__", 5])
def test_a_dtype_is_one_of_a_few(checkpoint, name):
    """Not any attribute of torch."""
    configure(checkpoint, torch_dtype=name)
    refused(checkpoint, "checkpoint/config.json: dtype: expected one of bfloat16, .*, got ")


@pytest.mark.parametrize("block", [[0, 128], [128], "ab", [1.5, 2], 5, {}, [True, 1]])
def test_blocks_of_scales(checkpoint, block):
    configure(checkpoint, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    refused(checkpoint, "checkpoint/config.json: weight_block_size: expected two numbers of rows and columns, got ")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_hidden_layers": 2**31 - 1}, r"num_hidden_layers: expected at most .* tensors in .*, got 2147483647"),
        ({"n_routed_experts": 2**31 - 1}, r"n_routed_experts: expected at most .*, got 2147483647"),
        ({"num_hidden_layers": 3}, r"the checkpoint lacks model.layers.2.input_layernorm.weight"),
        ({"vocab_size": 2**31 - 1}, r"lm_head.weight: expected shape \[2147483647, 32\], got \[32, 32\]"),
        ({"hidden_size": 2**31 - 1}, r"lm_head.weight: expected shape \[32, 2147483647\], got \[32, 32\]"),
    ],
)
def test_sizes_that_the_weights_do_not_have_take_no_memory(checkpoint, settings, message):
    """In a process that may have 4 GB of addresses more than it has: nothing is allocated for what is claimed."""
    configure(checkpoint, **settings)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (4 << 30), hard))
    try:
        refused(checkpoint, message)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_scale_of_a_wrong_shape(checkpoint):
    tensors = safetensors_torch.load_file(checkpoint / WEIGHTS)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(3, 1)
    safetensors_torch.save_file(tensors, checkpoint / WEIGHTS)
    refused(checkpoint, rf"{name}_scale_inv: expected shape \[1, 1\], got \[3, 1\]")


def stored_as(directory: Path, dtype: torch.dtype, name: str) -> None:
    tensors = safetensors_torch.load_file(directory / WEIGHTS)
    tensors[name] = tensors[name].to(dtype)
    safetensors_torch.save_file(tensors, directory / WEIGHTS)


WO, NORM = "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    "name, dtype, message",
    [
        (WO, torch.int8, f"{WO}: expected one of BF16, F16, F32, F64, F8_E4M3, got I8 in "),
        (WO, torch.bool, f"{WO}: expected one of BF16, F16, F32, F64, F8_E4M3, got BOOL in "),
        (WO, torch.float8_e5m2, f"{WO}: expected one of BF16, F16, F32, F64, F8_E4M3, got F8_E5M2 in "),
        (WO, torch.float8_e4m3fn, f"{WO}: expected {WO}_scale_inv beside this fp8 weight in "),
        (NORM, torch.float8_e4m3fn, f"{NORM}: expected one of BF16, F16, F32, F64, got F8_E4M3 in "),
        (NORM, torch.int64, f"{NORM}: expected one of BF16, F16, F32, F64, got I64 in "),
    ],
)
def test_weights_of_a_dtype_that_is_not_read(checkpoint, name, dtype, message):
    """Whatever their values: they would be copied, but mean something else."""
    stored_as(checkpoint, dtype, name)
    refused(checkpoint, message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_float(checkpoint, dtype):
    expected = DeepseekModel.from_pretrained(checkpoint).layers[0].attn.wo.weight.to(dtype)
    stored_as(checkpoint, dtype, WO)
    assert DeepseekModel.from_pretrained(checkpoint).layers[0].attn.wo.weight.equal(expected.float())


def test_scales_of_a_wrong_dtype_or_of_nothing(checkpoint):
    tensors = safetensors_torch.load_file(checkpoint / WEIGHTS)
    scales = {f"{WO}_scale_inv": torch.ones(1, 1)}
    safetensors_torch.save_file(tensors | scales, checkpoint / WEIGHTS)
    refused(checkpoint, f"{WO}_scale_inv: expected no scale of a tensor in F32, got one in ")
    tensors[WO] = tensors[WO].to(torch.float8_e4m3fn)
    safetensors_torch.save_file(tensors | {f"{WO}_scale_inv": torch.ones(1, 1).int()}, checkpoint / WEIGHTS)
    refused(checkpoint, f"{WO}_scale_inv: expected one of BF16, F16, F32, F64, got I32 in ")


K_SCALE = "model.layers.1.self_attn.k_scale"


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_of_a_cache_are_above_0(checkpoint, scale):
    tensors = safetensors_torch.load_file(checkpoint / WEIGHTS)
    safetensors_torch.save_file(tensors | {K_SCALE: torch.tensor(0.5)}, checkpoint / WEIGHTS)
    assert DeepseekModel.from_pretrained(checkpoint).layers[1].attn.kv_scale == 0.5
    safetensors_torch.save_file(tensors | {K_SCALE: torch.tensor([scale])}, checkpoint / WEIGHTS)
    refused(checkpoint, f"{K_SCALE}: expected a finite value above 0, got {scale} in ")
