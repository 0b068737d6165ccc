"""The Triton backend where there is no GPU: its kernels interpreted, and compiled for GPUs that are elsewhere."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from flashmla_ops.backends import triton as backend

TESTS = Path(__file__).parent
INTERPRETED = (
    *("fwd_kvcache_mla", "get_mla_metadata", "concat_and_cache_mla", "merge_attn_states"),
    *("fp8", "opcheck", "batch_invariance"),
)
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # of a program, by compute capability: CUDA's programming guide
DIMS = {192: (160, 128), 320: (320, 256), 576: (576, 512), 832: (576, 272)}  # d_qk, d_v of each width in the table

if (reason := backend._no_triton()) is not None:
    pytest.skip(reason, allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("these tests start Triton's interpreter themselves", allow_module_level=True)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("op", INTERPRETED)
def test_interpreted(op):
    """The op's own tests on Triton's interpreter: on CPU tensors, in fp16 and fp32, the same examples every time."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip(f"the interpreter of triton {triton.__version__} fails with numpy's of today: needs 3.7")
    file = str(TESTS / f"test_{op}.py")
    result = python("-m", "pytest", "-q", "-k", "[triton", file, TRITON_INTERPRET="1", CI="1", FLASHMLA_BACKEND="")
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


def test_the_interpreter_is_asked_for_by_name_only():
    """A process with TRITON_INTERPRET=1 goes on computing on the cpu backend."""
    code = "from flashmla_ops import backends; import torch; print(backends.choose('', torch.ones(1)).__name__)"
    assert python("-c", code, TRITON_INTERPRET="1").stdout == "flashmla_ops.backends.cpu\n"


def test_triton_is_imported_when_it_is_needed():
    code = "import sys, torch, flashmla_ops as f; before = set(sys.modules); "
    code += "f.merge_attn_states(*[torch.ones(1, 1, 1, 16), torch.ones(1, 1, 1)] * 2); "
    code += "print('flashmla_ops.backends.triton_kernels' in sys.modules, 'triton' in set(sys.modules) - before)"
    assert python("-c", code, FLASHMLA_BACKEND="").stdout == "False False\n"


def test_reasons():
    """Why a call is refused, of those that no backend but this could serve."""
    q, cache = torch.ones(1, 1, 1, 592, dtype=torch.float16), torch.ones(1, 16, 1, 592, dtype=torch.float16)
    assert "d_qk up to 576 and d_v up to 512, got 592 and 528" in backend._no_call(q, cache, 528)
    assert "interpreter multiplies" in backend._no_call(q.bfloat16(), cache.bfloat16(), 512)
    assert "TRITON_INTERPRET=1" in backend.refusal("get_mla_metadata", q)


def test_every_dim_has_a_configuration():
    configs = [config for row in backend.CONFIGS.values() for config in row]
    for d_qk, d_v in product(range(16, 577, 16), range(16, 513, 16)):
        if d_v > d_qk:
            continue
        block_v, block_r = backend.blocks_of(d_qk, d_v)
        assert d_v <= block_v and all(block & (block - 1) == 0 for block in (block_v, block_r))
        for kb in (99, 100, 163, 227):
            for rows in (1, 16, 17, 64, 128, 10**6):
                assert backend.config_of(kb, d_qk, d_v, rows) in configs
                assert backend.config_of(kb, d_qk, d_v, rows, fp8=True).stages <= 2


# --------------------------------------------------------------------------------------------------- ahead of time


def compiled(kernel, capability: int, constants: dict, warps: int = 4, dtype: str = "bf16", cache: str | None = None):
    """The kernel as a call compiles it: pointers aligned as the contract has them, sizes and strides of any value. The
    cache's dtype if it is another."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict.fromkeys(("q", "kv_cache", "out", "out_a", "out_b", "kv_c", "k_pe"), dtype)
    pointers |= dict.fromkeys(("lse", "lse_a", "lse_b", "shares", "shares_lse", "nodes", "nodes_lse"), "fp32")
    pointers |= dict.fromkeys(("plan", "num_splits", "block_table", "cache_seqlens", "cu_seqlens_q"), "i32")
    pointers |= dict.fromkeys(("slot_mapping", "row_end", "block_end", "starting_before"), "i64")
    pointers |= {"kv_scale": "fp32", "kv_cache": cache or dtype}
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            if not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert name == "scale_log2" or parameter.do_not_specialize, f"{name}: a new value would compile again"
            signature[name] = "fp32" if name == "scale_log2" else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def inspect(cubin: bytes, tmp_path: Path, *command: str) -> str:
    """What a tool that comes with triton prints of a cubin."""
    import triton

    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / command[0]
    return subprocess.run([tool, *command[1:], file], capture_output=True, text=True, check=True).stdout


def spills_in_key_loops(assembly: str) -> int:
    """Accesses of local memory in the innermost loops that have matrix products."""
    lines = [line for line in assembly.splitlines() if re.match(r"\.L|\s+/\*[0-9a-f]{4,}\*/", line)]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L")}
    jumps = [
        (labels.get(m.group(1), i), i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L\w+)\)", line))
    ]
    loops = [(a, b) for a, b in jumps if a < b and any("MMA" in line for line in lines[a:b])]
    inner = [loop for loop in loops if not any(loop != (a, b) and loop[0] <= a and b <= loop[1] for a, b in loops)]
    assert inner, "no loop with matrix products"
    return sum("LDL" in line or "STL" in line for a, b in inner for line in lines[a:b])


MOST_SPILLS = 8  # of the 700 instructions and more of such a loop


def compiled_decode(
    capability: int,
    columns: int,
    rows: int,
    one_page: bool,
    cache_format: str = "PLAIN",
    uneven: bool = False,
    invariant: bool = False,
):
    """The decode kernel over a cache of this format, and its configuration."""
    kernels, (d_qk, d_v), fp8 = backend._kernels(), DIMS[columns], cache_format != "PLAIN"
    config = backend.config_of(SHARED_KB[capability], d_qk, d_v, rows, fp8)
    block_v, block_r = backend.blocks_of(d_qk, d_v)
    constants = {"D_V": d_v, "D_R": d_qk - d_v, "BLOCK_V": block_v, "BLOCK_R": block_r, "ONE_PAGE": one_page}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "STAGES": config.stages}
    shared_rows = config.shared_rows(capability == 90)
    constants |= {"SHARED_ROWS": shared_rows, "NARROW": shared_rows and config.block_m > 16}
    constants |= {"FORMAT": getattr(kernels, cache_format), "q_scale": None, "INVARIANT": invariant}
    constants |= {} if cache_format == "FP8_TENSOR" else {"kv_scale": None}
    constants |= {} if uneven else {"cu_seqlens_q": None}
    kernel, cache = kernels.fwd_kvcache_mla_kernel, "u8" if fp8 else None
    return compiled(kernel, capability, constants, config.warps, cache=cache), config


@pytest.mark.parametrize("capability", SHARED_KB)
@pytest.mark.parametrize("columns, rows", backend.CONFIGS)
def test_configurations_fit(capability, columns, rows, tmp_path):
    """Compiled without a GPU, over pages that are and are not multiples of a block of keys."""
    kinds = [(True, False), (False, False), (True, True)] if columns == 576 else [(True, False)]
    for one_page, invariant in kinds:
        result, config = compiled_decode(capability, columns, rows, one_page, invariant=invariant)
        cubin = result.asm["cubin"]
        used = inspect(cubin, tmp_path, "cuobjdump", "--dump-resource-usage")
        registers, stack = (re.search(rf"{name}:(\d+)", used).group(1) for name in ("REG", "STACK"))
        spills = spills_in_key_loops(inspect(cubin, tmp_path, "nvdisasm", "-c"))
        print(f"sm_{capability} d_qk, d_v {DIMS[columns]} {config} one_page={one_page} invariant={invariant}:")
        print(f"    {result.metadata.shared} bytes shared, {registers} registers")
        print(f"    {stack} bytes of stack, {spills} accesses of it among products")
        assert result.metadata.shared <= SHARED_KB[capability] * 1024
        assert spills <= (4 if invariant else 1) * MOST_SPILLS
        assert capability != 90 or config.block_m < 64 or "wgmma" in result.asm["ptx"]


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("columns, rows", [(576, 16), (576, 64)])
def test_configurations_of_uneven_queries_fit(capability, columns, rows, invariant, tmp_path):
    result, _ = compiled_decode(capability, columns, rows, True, uneven=True, invariant=invariant)
    assert result.metadata.shared <= SHARED_KB[capability] * 1024
    spills = spills_in_key_loops(inspect(result.asm["cubin"], tmp_path, "nvdisasm", "-c"))
    assert spills <= (4 if invariant else 1) * MOST_SPILLS


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("columns, rows, cache_format", [(576, 64, "FP8_BLOCKS"), (320, 32, "FP8_TENSOR")])
def test_configurations_of_fp8_fit(capability, columns, rows, cache_format):
    result, _ = compiled_decode(capability, columns, rows, True, cache_format)
    assert result.metadata.shared <= SHARED_KB[capability] * 1024


@pytest.mark.parametrize("capability", SHARED_KB)
def test_the_other_kernels_compile(capability):
    kernels = backend._kernels()
    dims = {"D_V": 512, "BLOCK_V": 512}
    combine, even = {**dims, "BLOCK_M": 64, "BLOCK_S": backend.SHARES}, {"cu_seqlens_q": None}
    calls = (
        (kernels.get_mla_metadata_kernel, {"BLOCK": backend.METADATA_BLOCK}),
        (kernels.get_mla_metadata_uneven_kernel, {"BLOCK": backend.METADATA_BLOCK}),
        (kernels.fwd_kvcache_mla_combine_kernel, combine | even),
        (kernels.fwd_kvcache_mla_combine_kernel, combine),
        (kernels.fwd_kvcache_mla_merge_nodes_kernel, {**dims, "BLOCK_M": 64} | even),
        (kernels.fwd_kvcache_mla_merge_nodes_kernel, {**dims, "BLOCK_M": 64}),
        (kernels.concat_and_cache_mla_kernel, {**dims, "D_R": 64, "BLOCK_R": 64, "BLOCK_T": 8}),
        (kernels.merge_attn_states_kernel, {**dims, "BLOCK_ROWS": 8}),
    )
    for (kernel, constants), dtype in product(calls, ("bf16", "fp16")):
        assert compiled(kernel, capability, constants, dtype=dtype).metadata.shared <= 48 << 10
    dims |= {"D_R": 64, "BLOCK_R": 64, "BLOCK_T": 8, "ROUND_SCALE": True}
    for scale, dtype in (({"kv_scale": None}, "bf16"), ({"kv_scale": None}, "fp32"), ({}, "fp16")):
        kernel = kernels.concat_and_cache_mla_fp8_kernel
        result = compiled(kernel, capability, dims | scale, dtype=dtype, cache="u8")
        assert result.metadata.shared <= 48 << 10
        assert "div.rn.f32" in result.asm["ptx"]  # the reference's rounding
