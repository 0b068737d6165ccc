"""Bad input: an error that names the tensor, what was expected and what came, in kernels and fakes alike.

Nothing is written then.
"""

import re

import pytest
import torch
from test_backends import python
from torch import Tensor
from torch.nn.functional import pad

from flashmla_ops import get_mla_metadata
from flashmla_ops.backends import values
from flashmla_ops.testing import make_append_case, make_decode_case, make_merge_case, quantized


def calls(device: str = "cpu") -> dict[str, dict]:
    """A good call of each op: bf16, 2 rows, 4 query heads on 2 key heads where there are such."""
    decode = make_decode_case([70, 3], h_q=4, h_k=2, device=device)
    plan = planned(decode.cache_seqlens)
    plan_args = list(zip(("cache_seqlens", "num_heads_per_head_k", "num_heads_k"), decode.plan_args, strict=True))
    return {
        "get_mla_metadata": dict(plan_args),
        "get_mla_metadata_": dict(plan_args) | {name: t.clone() for name, t in plan.items()},
        "fwd_kvcache_mla": decode.kwargs() | plan,
        "concat_and_cache_mla": make_append_case(3, device=device).kwargs(),
        "merge_attn_states": make_merge_case(2, 3, 4, device=device).kwargs(),
    }


def planned(cache_seqlens: Tensor, num_heads_per_head_k: int = 2, num_heads_k: int = 2) -> dict[str, Tensor]:
    plan = get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k)
    return dict(zip(("tile_scheduler_metadata", "num_splits"), plan, strict=True))


def run(op: str, call: dict):
    return getattr(torch.ops.flashmla, op)(**call)


def meta(value):
    """A tensor of the same shape, strides and dtype on the meta device; of one that is there already, on the CPU."""
    if not isinstance(value, Tensor):
        return value
    device = "cpu" if value.device.type == "meta" else "meta"
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def check_refused(op: str, call: dict, message: str) -> None:
    before = {name: t.clone() for name, t in call.items() if isinstance(t, Tensor)}
    with pytest.raises(RuntimeError, match=message) as error:
        run(op, call)
    assert re.match(r"\w+: expected .+, got .+", str(error.value), re.DOTALL)
    for name, t in before.items():
        assert t.device.type == "meta" or torch.equal(t.nan_to_num(), call[name].nan_to_num()), f"{name} was written"


# ------------------------------------------------------------------------------------- shapes, dtypes, devices, strides


def gapped(t: Tensor) -> Tensor:
    """The same values, with a stride of 2 between elements of the last dimension."""
    return t.repeat_interleave(2, -1)[..., ::2]


def odd_rows(t: Tensor) -> Tensor:
    """The same values, with rows that do not begin at multiples of 16 bytes."""
    return pad(t, (0, 4))[..., : t.shape[-1]]


def first(t: Tensor) -> Tensor:
    return t[:1]


def in_wider_rows(t: Tensor) -> Tensor:
    """The same values, as a slice of a tensor of twice the width."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def one_row_for_all(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


TENSORS = {op: {name: t for name, t in call.items() if isinstance(t, Tensor)} for op, call in calls().items()}

# op, {argument: change}, message
SHAPES = [
    ("get_mla_metadata", {"cache_seqlens": gapped}, "cache_seqlens: expected the stride of dimension 0 to be 1, got 2"),
    ("get_mla_metadata", {"num_heads_per_head_k": lambda n: 0}, "num_heads_per_head_k: expected at least 1, got 0"),
    ("get_mla_metadata", {"num_heads_k": lambda n: -1}, "num_heads_k: expected at least 1, got -1"),
    ("get_mla_metadata_", {"cache_seqlens": first}, "num_splits: expected dimension 0 to be 2 .*, got .*3"),
    (
        "get_mla_metadata_",
        {"tile_scheduler_metadata": first},
        "tile_scheduler_metadata: expected .* 256 .*, got .*1, 8",
    ),
    ("get_mla_metadata_", {"num_heads_k": lambda n: 0}, "num_heads_k: expected at least 1, got 0"),
    ("fwd_kvcache_mla", {"q": lambda t: t[:, :, :3]}, r"kv_cache: expected h_k .* to divide q's 3 heads, got 2"),
    ("fwd_kvcache_mla", {"q": lambda t: t[:, :, :0]}, r"kv_cache: expected h_k .* to divide q's 0 heads, got 2"),
    ("fwd_kvcache_mla", {"kv_cache": lambda t: t[:, :, :0]}, r"kv_cache: expected h_k .* to divide q's 4 heads, got 0"),
    (
        "fwd_kvcache_mla",
        {"kv_cache": lambda t: t[..., :512]},
        r"kv_cache: expected .* 576 .* q's d_qk 576.*, got .*512",
    ),
    ("fwd_kvcache_mla", {"kv_cache": lambda t: t[:, :24]}, "kv_cache: expected a page size .* multiple of 16, got 24"),
    ("fwd_kvcache_mla", {"kv_cache": lambda t: t[:, :0]}, "kv_cache: expected a page size .* multiple of 16, got 0"),
    ("fwd_kvcache_mla", {"kv_cache": gapped}, "kv_cache: expected the stride of dimension 3 to be 1, got 2"),
    ("fwd_kvcache_mla", {"kv_cache": odd_rows}, r"kv_cache: expected the stride .* multiple of 8 \(16 bytes\), got"),
    ("fwd_kvcache_mla", {"q": gapped}, "q: expected the stride of dimension 3 to be 1, got 2"),
    ("fwd_kvcache_mla", {"q": odd_rows}, r"q: expected the stride of dimension . .* multiple of 8 \(16 bytes\), got"),
    (
        "fwd_kvcache_mla",
        {"q": lambda t: t[..., :568], "kv_cache": lambda t: t[..., :568]},
        r"q: expected d_qk \(dimension 3\) to be a multiple of 16, got 568",
    ),
    ("fwd_kvcache_mla", {"head_dim_v": lambda d: 520}, "head_dim_v: expected a multiple of 16 up to .* 576, got 520"),
    ("fwd_kvcache_mla", {"head_dim_v": lambda d: 592}, "head_dim_v: expected a multiple of 16 up to .* 576, got 592"),
    ("fwd_kvcache_mla", {"head_dim_v": lambda d: 0}, "head_dim_v: expected a multiple of 16 up to .* 576, got 0"),
    ("fwd_kvcache_mla", {"q": first}, r"block_table: expected .* 1 \(q's batch\), got .*2"),
    ("fwd_kvcache_mla", {"block_table": first}, r"block_table: expected .* 2 \(q's batch\), got .*1"),
    ("fwd_kvcache_mla", {"block_table": gapped}, "block_table: expected the stride of dimension 1 to be 1, got 2"),
    ("fwd_kvcache_mla", {"cache_seqlens": first}, r"cache_seqlens: expected .* 2 \(q's batch\), got .*1"),
    ("fwd_kvcache_mla", {"cache_seqlens": gapped}, "cache_seqlens: expected the stride of dimension 0 to be 1, got 2"),
    ("fwd_kvcache_mla", {"num_splits": lambda t: None}, "num_splits: expected the other half .*, got None"),
    (
        "fwd_kvcache_mla",
        {"tile_scheduler_metadata": lambda t: None},
        "tile_scheduler_metadata: expected the other half .*, got None",
    ),
    ("fwd_kvcache_mla", {"tile_scheduler_metadata": first}, "tile_scheduler_metadata: expected .* 256 .*, got .*1, 8"),
    (
        "fwd_kvcache_mla",
        {"tile_scheduler_metadata": lambda t: t[:, :6]},
        "tile_scheduler_metadata: expected .* 8 .*, got .*256, 6",
    ),
    (
        "fwd_kvcache_mla",
        {"tile_scheduler_metadata": gapped},
        "tile_scheduler_metadata: expected strides .*, got .*16, 2",
    ),
    *(
        (
            op,
            {"tile_scheduler_metadata": view},
            rf"tile_scheduler_metadata: expected strides \[8, 1\] .*, got \[{row}, 1\]",
        )
        for op in ("fwd_kvcache_mla", "get_mla_metadata_")
        for view, row in ((in_wider_rows, 16), (one_row_for_all, 0))
    ),
    ("fwd_kvcache_mla", {"num_splits": first}, r"num_splits: expected .* 3 \(q's batch \+ 1\), got .*1"),
    ("fwd_kvcache_mla", {"num_splits": gapped}, "num_splits: expected the stride of dimension 0 to be 1, got 2"),
    ("concat_and_cache_mla", {"kv_cache": lambda t: t.repeat(1, 1, 2, 1)}, "kv_cache: expected .* 1 .*, got .*2, 576"),
    ("concat_and_cache_mla", {"kv_cache": lambda t: t[:, :24]}, "kv_cache: expected a page size .* 16, got 24"),
    ("concat_and_cache_mla", {"kv_cache": gapped}, "kv_cache: expected the stride of dimension 3 to be 1, got 2"),
    ("concat_and_cache_mla", {"kv_cache": odd_rows}, r"kv_cache: expected the stride .* multiple of 8 .*, got"),
    ("concat_and_cache_mla", {"kv_c": lambda t: t[:, :256]}, r"kv_cache: expected .* 320 .* 256 \+ 64 .*, got .*576"),
    ("concat_and_cache_mla", {"k_pe": lambda t: t[:, :56]}, "k_pe: expected .* multiple of 16, got 56"),
    ("concat_and_cache_mla", {"kv_c": lambda t: t[:, :504]}, "kv_c: expected .* multiple of 16, got 504"),
    ("concat_and_cache_mla", {"kv_c": gapped}, "kv_c: expected the stride of dimension 1 to be 1, got 2"),
    ("concat_and_cache_mla", {"k_pe": gapped}, "k_pe: expected the stride of dimension 1 to be 1, got 2"),
    (
        "concat_and_cache_mla",
        {"kv_c": odd_rows},
        "kv_c: expected the stride of dimension 0 .* multiple of 8 .*, got 516",
    ),
    (
        "concat_and_cache_mla",
        {"k_pe": odd_rows},
        "k_pe: expected the stride of dimension 0 .* multiple of 8 .*, got 68",
    ),
    ("concat_and_cache_mla", {"k_pe": first}, r"k_pe: expected .* 3 \(kv_c's tokens\), got .*1"),
    ("concat_and_cache_mla", {"slot_mapping": first}, r"slot_mapping: expected .* 3 \(kv_c's tokens\), got .*1"),
    (
        "concat_and_cache_mla",
        {"slot_mapping": gapped},
        "slot_mapping: expected the stride of dimension 0 to be 1, got 2",
    ),
    ("merge_attn_states", {"out_b": first}, r"out_b: expected dimension 0 to be 2 \(out_a's\), got .*1"),
    ("merge_attn_states", {"out_b": lambda t: t[..., :256]}, r"out_b: expected dimension 3 to be 512 .*, got .*256"),
    ("merge_attn_states", {"out_a": gapped}, "out_a: expected the stride of dimension 3 to be 1, got 2"),
    ("merge_attn_states", {"out_b": odd_rows}, "out_b: expected the stride .* multiple of 8 .*, got"),
    ("merge_attn_states", {"lse_a": first}, "lse_a: expected dimension 0 to be 2 .*, got .*1"),
    ("merge_attn_states", {"lse_b": lambda t: t.mT.contiguous()}, "lse_b: expected dimension 1 to be 4 .*, got .*3, 4"),
    ("merge_attn_states", {"lse_b": gapped}, "lse_b: expected the stride of dimension 2 to be 1, got 2"),
    (
        "merge_attn_states",
        {"out_a": lambda t: t[..., :504], "out_b": lambda t: t[..., :504]},
        r"out_a: expected d_v \(dimension 3\) to be a multiple of 16, got 504",
    ),
]
# every tensor of every op with a dimension too many, in float64, and on a device that isn't the first tensor's
for op, tensors in TENSORS.items():
    for name in tensors:
        SHAPES.append((op, {name: lambda t: t[None]}, rf"{name}: expected \d dimensions \[.*\], got shape \[1, "))
        SHAPES.append((op, {name: lambda t: t.double()}, rf"{name}: expected .*torch\.\w+, got torch.float64"))
        if name != next(iter(tensors)):
            SHAPES.append((op, {name: lambda t: t.to("meta")}, rf"{name}: expected device .*'s\), got "))


def changed(device: str, op: str, changes: dict) -> dict:
    call = calls(device)[op]
    return call | {name: change(call[name]) for name, change in changes.items()}


def name_of(value) -> str:
    return "+".join(value) if isinstance(value, dict) else value[:60] if isinstance(value, str) else ""


@pytest.mark.parametrize("op, changes, message", SHAPES, ids=name_of)
def test_kernels_refuse(target, op, changes, message):
    check_refused(op, changed(target.device, op, changes), message)


@pytest.mark.parametrize("op, changes, message", SHAPES, ids=name_of)
def test_fakes_refuse(op, changes, message):
    check_refused(op, {name: meta(value) for name, value in changed("cpu", op, changes).items()}, message)


@pytest.mark.parametrize("op", TENSORS)
def test_the_unchanged_calls_are_good(target, op):
    run(op, calls(target.device)[op])
    run(op, {name: meta(value) for name, value in calls(target.device)[op].items()})


@pytest.mark.parametrize(
    "op, name",
    [
        *(("fwd_kvcache_mla", name) for name in ("q", "kv_cache")),
        *(("concat_and_cache_mla", name) for name in ("kv_cache", "kv_c", "k_pe")),
        *(("merge_attn_states", name) for name in ("out_a", "out_b")),
    ],
)
def test_misaligned_addresses_are_refused(target, op, name):
    def shifted(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)

    call = changed(target.device, op, {name: shifted})
    check_refused(op, call, f"{name}: expected a 16-byte aligned address, got one 2 bytes past")


def test_strides_that_mean_nothing_are_not_refused(target):
    """Those of dimensions of size 1 and of empty tensors; and any stride between rows of block_table."""
    call = calls(target.device)["fwd_kvcache_mla"]
    alone = {name: t[:1] for name, t in call.items() if name in ("q", "block_table", "cache_seqlens")}
    alone["q"] = alone["q"].as_strided(alone["q"].shape, (7, 3, *alone["q"].stride()[2:]))  # [1, 1, h_q, d_qk]
    run("fwd_kvcache_mla", call | alone | planned(alone["cache_seqlens"]))
    run("fwd_kvcache_mla", call | {"block_table": pad(call["block_table"], (0, 1))[:, :-1]})
    empty = {name: call[name][:0] for name in ("block_table", "cache_seqlens")}
    empty["q"] = call["q"].as_strided((0, 1, 4, 576), (3, 5, 7, 9))
    run("fwd_kvcache_mla", call | empty | planned(empty["cache_seqlens"]))


# ------------------------------------------------------------------------------------------------------------- gradient

FLOATS = [(op, name) for op, tensors in TENSORS.items() for name, t in tensors.items() if t.is_floating_point()]


@pytest.mark.parametrize("op, name", FLOATS)
def test_inputs_that_require_grad_are_refused_in_grad_mode(target, op, name):
    call = changed(target.device, op, {name: lambda t: t.requires_grad_()})
    with pytest.raises(RuntimeError, match=f"{op} is inference only.* requires grad: call it under torch.no_grad()"):
        run(op, call)
    with torch.no_grad():
        run(op, call)
    with torch.inference_mode():
        run(op, call)


# --------------------------------------------------------------------------------------------------------------- values


def with_value(index, value):
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] = value
        return t

    return change


VALUES = [
    ("get_mla_metadata", {"cache_seqlens": with_value(1, -5)}, "cache_seqlens: expected lengths of at least 0, got -5"),
    ("get_mla_metadata_", {"cache_seqlens": with_value(0, -5)}, "cache_seqlens: expected lengths .* 0, got -5"),
    (
        "fwd_kvcache_mla",
        {"cache_seqlens": with_value(1, -5)},
        "cache_seqlens: expected .* 0 to 256 .*, got -5 in row 1",
    ),
    ("fwd_kvcache_mla", {"cache_seqlens": with_value(0, 257)}, "cache_seqlens: expected .* 256 .*, got 257 in row 0"),
    (
        "fwd_kvcache_mla",
        {"cache_seqlens": with_value(0, 2**31 - 1)},
        "cache_seqlens: expected .*, got 2147483647 in row 0",
    ),
    (
        "fwd_kvcache_mla",
        {"block_table": with_value((0, 1), 6)},
        "block_table: expected .* 0 to 5, got 6 in row 0, column 1",
    ),
    ("fwd_kvcache_mla", {"block_table": with_value((1, 0), -1)}, "block_table: expected .*, got -1 in row 1, column 0"),
    ("concat_and_cache_mla", {"slot_mapping": with_value(1, -2)}, "slot_mapping: expected slots .* -1 .*, got -2 at 1"),
    ("concat_and_cache_mla", {"slot_mapping": with_value(2, 192)}, "slot_mapping: expected slots .* 191, got 192 at 2"),
    ("concat_and_cache_mla", {"slot_mapping": with_value(2, 2**62)}, "slot_mapping: expected slots .*, got 4611686"),
    (
        "concat_and_cache_mla",
        {"slot_mapping": lambda t: 0 * t + 7},
        "slot_mapping: expected each slot once, got 7 more than once, at 0 and 1",
    ),
    # the plan of a batch of as many rows, of other lengths: of fewer tiles, without keys, rows exchanged
    (
        "fwd_kvcache_mla",
        {"cache_seqlens": with_value(0, 60)},
        "tile_scheduler_metadata: expected part . .* these 2 rows .*, got row .*: plan again",
    ),
    (
        "fwd_kvcache_mla",
        {"cache_seqlens": with_value(1, 0)},
        "tile_scheduler_metadata: expected part . .*got row 1 .0 keys, 0 tiles.*, tile 1: plan again",
    ),
    (
        "fwd_kvcache_mla",
        {"cache_seqlens": lambda t: t.flip(0), "block_table": lambda t: t.flip(0)},
        "tile_scheduler_metadata: expected part . .* these 2 rows .*, got row .*: plan again",
    ),
    ("fwd_kvcache_mla", {"num_splits": with_value(1, 9)}, "num_splits: expected . at 1, .*, got 9"),
    (
        "fwd_kvcache_mla",
        {"tile_scheduler_metadata": lambda t: 0 * t},
        "tile_scheduler_metadata: expected part 0 .* to end after row 0, tile 0, .*, got row 0 .*, tile 0",
    ),
    (
        "fwd_kvcache_mla",
        {"tile_scheduler_metadata": lambda t: 0 * t - 1},
        "tile_scheduler_metadata: expected .* ends before row 0",
    ),
]


@pytest.mark.parametrize("op, changes, message", VALUES, ids=name_of)
def test_values_are_refused(target, monkeypatch, op, changes, message):
    """On the CPU always, elsewhere under FLASHMLA_DEBUG=1."""
    monkeypatch.setattr(values, "DEBUG", target.device != "cpu")
    check_refused(op, changed(target.device, op, changes), message)


@pytest.mark.parametrize("op", TENSORS)
def test_good_values_pass_the_checks(target, monkeypatch, op):
    monkeypatch.setattr(values, "DEBUG", True)
    run(op, calls(target.device)[op])


def fp8_call(op: str, kv_format: str, device: str) -> dict:
    """A good call over an fp8 cache."""
    decode = quantized(make_decode_case([70, 3], h_q=4, device=device, poison=False), kv_format)
    if op == "fwd_kvcache_mla":
        return decode.kwargs()
    append = make_append_case(3, device=device)
    scale = {"kv_scale": decode.kv_scale} if decode.kv_scale is not None else {}
    return append.kwargs() | scale | {"kv_cache": torch.zeros_like(decode.kv_cache)}


@pytest.mark.fp8
@pytest.mark.parametrize("op", ["fwd_kvcache_mla", "concat_and_cache_mla"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_debug_refuses_a_scale_that_is_none(target, monkeypatch, op, value):
    """Without it such scales are taken as they are."""
    call = fp8_call(op, "fp8_tensor", target.device)
    call["kv_scale"] = torch.full_like(call["kv_scale"], value)
    run(op, {name: t.clone() if isinstance(t, Tensor) else t for name, t in call.items()})
    monkeypatch.setattr(values, "DEBUG", True)
    check_refused(op, call, f"kv_scale: expected a finite value above 0, got {value}")


@pytest.mark.fp8
def test_debug_names_the_key_whose_scale_is_nan(target, monkeypatch):
    """Of the scales in the cache those of keys that are read are checked, and no others."""
    monkeypatch.setattr(values, "DEBUG", True)
    call = fp8_call("fwd_kvcache_mla", "fp8", target.device)
    page, past = int(call["block_table"][0, 1]), int(call["block_table"][1, 0])
    scales = call["kv_cache"][..., 512:528].view(torch.float32)  # [num_pages, page_size, 1, 4]
    scales[past, 3:] = float("nan")  # beyond the 3 keys of row 1
    run("fwd_kvcache_mla", call)
    scales[page, 5, 0, 2] = float("nan")
    message = f"kv_cache: expected finite .*, got nan in page {page}, token 5, block 2: key 69 of row 0"
    check_refused("fwd_kvcache_mla", call, message)


def test_debug_refuses_a_capture(target, monkeypatch):
    """There are no values then: every op that would check them says so."""
    prepared = calls(target.device)
    monkeypatch.setattr(values, "DEBUG", True)
    monkeypatch.setattr(values, "_capturing", lambda device: True)
    monkeypatch.setattr(values, "_on_cuda", lambda t: True)
    for op, call in prepared.items():
        if op != "merge_attn_states":
            check_refused(op, call, "FLASHMLA_DEBUG: expected calls outside of CUDA graphs, got one while .* captured")


@pytest.mark.gpu
def test_debug_refuses_a_plan_for_other_heads(target, monkeypatch):
    """It would be executed, and right, on fewer or more parts than this call should use."""
    if target.device == "cpu":
        pytest.skip("a CPU uses as many parts for any heads")
    case = make_decode_case([50_000, 7_000], h_q=128, device=target.device)
    plan = planned(case.cache_seqlens, 16, 1)
    run("fwd_kvcache_mla", case.kwargs() | plan)
    monkeypatch.setattr(values, "DEBUG", True)
    run("fwd_kvcache_mla", case.kwargs() | planned(*case.plan_args))
    message = r"tile_scheduler_metadata: expected the plan for this call's heads .* \d+ parts, got one of \d+ parts"
    check_refused("fwd_kvcache_mla", case.kwargs() | plan, message)


@pytest.mark.parametrize("setting, expected", [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_switches_the_checks_on(setting, expected):
    environment = {} if setting is None else {"FLASHMLA_DEBUG": setting}
    code = "from flashmla_ops.backends import values; print(values.DEBUG)"
    code = code if environment else f"import os; os.environ.pop('FLASHMLA_DEBUG', None); {code}"
    assert python("-c", code, **environment).stdout == f"{expected}\n"


@pytest.mark.gpu
def test_a_capture_is_refused_with_its_reason(target, monkeypatch):
    """And what was captured with the checks off is replayed unchecked."""
    if target.device == "cpu":
        pytest.skip(f"{target.name} runs on the CPU here: nothing is captured")
    for op, call in calls(target.device).items():  # loads the kernels, which a capture may not
        run(op, call)
    call = calls(target.device)["fwd_kvcache_mla"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run("fwd_kvcache_mla", call)
    monkeypatch.setattr(values, "DEBUG", True)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        reason = "FLASHMLA_DEBUG: expected calls outside of CUDA graphs, got one while a graph is captured"
        with pytest.raises(RuntimeError, match=reason):
            run("fwd_kvcache_mla", call)
        out.mul_(1)  # an empty graph would warn
    graph.replay()
    for actual, expected in zip((out, lse), run("fwd_kvcache_mla", call), strict=True):
        assert torch.equal(actual, expected)
