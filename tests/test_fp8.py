"""fp8 caches: what is written is the reference's bytes, and what is read is attention over what they stand for."""

import math
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ALL_DIMS, TARGETS, Target, append_calls, decode_calls, examples, seeds
from torch import Tensor

from flashmla_ops import backends, concat_and_cache_mla, fwd_kvcache_mla, get_mla_metadata
from flashmla_ops.kv_cache import BYTE_DTYPES, FORMATS, PLAIN_DTYPES, CacheFormat, format_of
from flashmla_ops.testing import AppendCase, DecodeCase, check_decode, make_append_case, make_decode_case

pytestmark = pytest.mark.fp8
FP8 = {f.name: f for f in FORMATS if f.dtypes == BYTE_DTYPES}
BLOCKS, ONE_SCALE = FP8["fp8"], FP8["fp8_tensor"]
INF, NAN = float("inf"), float("nan")


def scale_of(layout: CacheFormat, value: float = 0.05) -> Tensor | None:
    return torch.tensor(value) if layout.scaled else None


# ------------------------------------------------------------------------------------------------------------ formats


def e4m3(byte: int) -> float:
    """The value of an e4m3 byte, by its definition (OCP 8-bit floating point, fn variant)."""
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return NAN
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = sorted({e4m3(byte) for byte in range(256) if not math.isnan(e4m3(byte))})


@pytest.mark.parametrize("d_v, d_rope, size", [(512, 64, 656), (256, 64, 400), (256, 32, 336), (128, 32, 208)])
def test_rows_are_of_the_documented_size(d_v, d_rope, size):
    assert BLOCKS.last_dim(d_v, d_rope) == size and ONE_SCALE.last_dim(d_v, d_rope) == d_v + d_rope


@given(dims=st.sampled_from(ALL_DIMS), dtype=st.sampled_from(PLAIN_DTYPES), round_scale=st.booleans(), seed=seeds)
@settings(max_examples=60)
def test_a_row_is_values_scales_and_rope(dims, dtype, round_scale, seed):
    """Byte for byte, read without the code under test; every value the nearest that e4m3 has."""
    d_qk, d_v = dims
    generator = torch.Generator().manual_seed(seed)
    kv_c = torch.randn(3, d_v, generator=generator).mul(10.0 ** (seed % 7 - 3)).to(dtype)
    k_pe = torch.randn(3, d_qk - d_v, generator=generator).to(dtype)
    rows = BLOCKS.quantize(kv_c, k_pe, None, round_scale)
    scales = -(-d_v // 128)
    for token, row in enumerate(rows):
        raw = bytes(row.tolist())
        used = d_v + 4 * scales + 2 * (d_qk - d_v)
        assert len(raw) % 16 == 0 and len(raw) - used < 16 and not any(raw[used:])
        rope = row[d_v + 4 * scales : used].clone().view(torch.bfloat16)
        assert torch.equal(rope, k_pe[token].to(torch.bfloat16))
        for i, scale in enumerate(struct.unpack_from(f"<{scales}f", raw, d_v)):
            x = kv_c[token, 128 * i : 128 * (i + 1)].float()
            exact = float(x.abs().amax() / 448)
            assert scale == (2.0 ** math.ceil(math.log2(exact)) if round_scale else exact)
            for value, byte in zip((x / scale).tolist(), raw[128 * i : min(128 * (i + 1), d_v)], strict=True):
                assert abs(e4m3(byte) - value) == min(abs(candidate - value) for candidate in E4M3)


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
@pytest.mark.parametrize("round_scale", [True, False])
def test_extreme_values(dtype, round_scale):
    """Zeros, the smallest and great numbers, infinities and NaN: nothing but NaN reads back as NaN. (The very greatest
    may be rounded up, to what no fp32 is.)"""
    greatest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    kv_c = torch.zeros(6, 256, dtype=dtype)
    kv_c[1, :3] = torch.tensor([smallest, -smallest, 0], dtype=dtype)
    kv_c[2, :2] = torch.tensor([greatest / 4, -greatest / 4], dtype=dtype)
    kv_c[3, :3] = torch.tensor([INF, 1, -INF], dtype=dtype)
    kv_c[4, :2] = torch.tensor([NAN, 1], dtype=dtype)
    kv_c[5, :2] = INF
    k_pe = torch.ones(6, 16, dtype=dtype)
    read = BLOCKS.dequantize(BLOCKS.quantize(kv_c, k_pe, None, round_scale), 256, 16, None, torch.float32)
    assert torch.equal(read.isnan(), torch.cat([kv_c, k_pe], 1).isnan()) and read.isfinite().sum() == read.numel() - 1
    assert torch.equal(read[0, :256], torch.zeros(256))
    for token in (1, 2):
        torch.testing.assert_close(read[token, :256], kv_c[token].float(), rtol=2**-4, atol=1e-38)
    torch.testing.assert_close(read[3, 1:3], torch.tensor([1.0, -read[3, 0].item()]), rtol=2**-4, atol=0)
    assert 1 <= read[3, 0] <= 2 and read[4, 1] == 1 and read[5, 0] == 448


@given(seed=seeds, dtype=st.sampled_from(PLAIN_DTYPES), round_scale=st.booleans())
def test_what_is_read_is_near_what_was_written(seed, dtype, round_scale):
    """Within half a step of e4m3, which is 2^-4 of a value, or of the block's smallest steps; the rope within bf16."""
    generator = torch.Generator().manual_seed(seed)
    kv_c, k_pe = (torch.randn(4, n, generator=generator).to(dtype) for n in (512, 64))
    read = BLOCKS.dequantize(BLOCKS.quantize(kv_c, k_pe, None, round_scale), 512, 64, None, torch.float32)
    largest = kv_c.float().view(4, -1, 128).abs().amax(-1, keepdim=True).expand(4, 4, 128).reshape(4, 512)
    allowed = 2**-4 * kv_c.float().abs() + 2 * largest / 448 * 2**-10
    assert ((read[:, :512] - kv_c.float()).abs() <= allowed).all()
    torch.testing.assert_close(read[:, 512:], k_pe.float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "kv_scale, expected",
    [
        (0.0, [NAN, 0.0, 0.0]),  # 0 / 0; and 448 * 0
        (NAN, [NAN, NAN, NAN]),
        (INF, [NAN, NAN, NAN]),  # 0 * inf
        (-1.0, [0.0, 1.0, -448.0]),
        (0.5, [0.0, 1.0, -224.0]),
    ],
)
def test_odd_scales_are_taken_as_they_are(kv_scale, expected):
    """No error and no hang: what arithmetic makes of 0, 1 and -500, in e4m3."""
    x, scale = torch.tensor([[0.0, 1.0, -500.0] + [0.0] * 13]), torch.tensor(kv_scale)
    read = ONE_SCALE.dequantize(ONE_SCALE.quantize(x, x, scale, True), 16, 16, scale, x.dtype)
    torch.testing.assert_close(read[0, :3], torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- concat_and_cache_mla


def check_append(layout: CacheFormat, case: AppendCase, cache: Tensor, kv_scale: Tensor | None, round_scale: bool):
    """Appends to a cache, whose whole storage must then be the reference's, computed on the CPU, and unchanged where no
    token went."""
    kv_c, k_pe, slots = case.kv_c.cpu(), case.k_pe.cpu(), case.slot_mapping.cpu()
    d_v, page_size = kv_c.shape[1], cache.shape[1]
    bytes_ = cache.view(torch.uint8)
    stored = bytes_.as_strided((bytes_.untyped_storage().nbytes(),), (1,), 0)
    expected = stored.cpu()
    view, used = expected.as_strided(cache.shape, cache.stride(), cache.storage_offset()), slots >= 0
    rows = layout.quantize(kv_c[used], k_pe[used], kv_scale, round_scale)
    view[slots[used] // page_size, slots[used] % page_size, 0] = rows

    scale = None if kv_scale is None else kv_scale.to(cache.device)
    tokens = case.kv_c, case.k_pe, case.slot_mapping
    assert concat_and_cache_mla(cache, *tokens, kv_scale=scale, round_scale=round_scale) is None
    actual = stored.cpu()
    if layout is BLOCKS and kv_c.dtype is not torch.bfloat16:  # any NaN in bf16 will do: torch's depends on the CPU
        for buffer in (actual, expected):
            rope = buffer.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            begin = d_v + 4 * -(-d_v // 128)
            rope = rope[..., begin : begin + 2 * k_pe.shape[1]]
            values = rope.contiguous().view(torch.bfloat16)
            rope.copy_(values.masked_fill(values.isnan(), NAN).view(torch.uint8))
    assert torch.equal(actual, expected)


def random_bytes(layout: CacheFormat, case: AppendCase, strided: bool = False) -> Tensor:
    """A cache of uint8 for the case's tokens, with gaps if strided."""
    num_pages, page_size, _, _ = case.kv_cache.shape
    last_dim = layout.last_dim(case.kv_c.shape[1], case.k_pe.shape[1])
    shape = num_pages, page_size + strided, 1, last_dim + 16 * strided
    cache = torch.randint(0, 256, shape, dtype=torch.uint8, device=case.kv_cache.device)
    return cache[:, int(strided) :, :, :last_dim]


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("cache_dtype", BYTE_DTYPES)
@given(data=st.data())
@settings(max_examples=examples(40))
def test_append_writes_the_reference_s_bytes(target, name, cache_dtype, data):
    """In the named slots, and nothing anywhere else; for every shape and dtype, on every backend."""
    layout = FP8[name]
    serves = replace(target, dtypes=PLAIN_DTYPES, dims=(*ALL_DIMS, (720, 640)), page_sizes=(16, 48, 64))
    call = data.draw(append_calls(serves))
    case = make_append_case(**call)
    for tokens in (case.kv_c, case.k_pe):
        tokens.mul_(10.0 ** data.draw(st.integers(-5, 3)))
    cache = random_bytes(layout, case, call["strided"]).view(cache_dtype)
    check_append(layout, case, cache, scale_of(layout), data.draw(st.booleans(), label="round_scale"))


def all_values(dtype: torch.dtype) -> Tensor:
    """[n, 512] of all 16-bit values by magnitude and shuffled, infinities and NaN among them, or of as many fp32 bits;
    then e4m3's values, what lies between two of them and the values beside that, in blocks of scales near powers of
    two."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.arange(2**16, dtype=torch.int32)
    if dtype is torch.float32:
        values = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).int().view(dtype)
    else:
        values = bits.to(torch.int16).view(dtype)
    if dtype is torch.float16:  # torch keeps the sign of its NaN in some cases only
        values = values.masked_fill(values.isnan(), NAN)
    near = torch.tensor(E4M3)
    near = torch.cat([near, (near[1:] + near[:-1]) / 2])
    near = torch.cat([near, near.nextafter(torch.tensor(INF)), near.nextafter(torch.tensor(-INF))]).clamp(-448, 448)
    near = torch.cat([near, near.new_zeros(-len(near) % 127)]).view(-1, 127)
    near = torch.cat([near.new_full((len(near), 1), 448.0), near], 1)  # a block's largest
    near = torch.cat([near * scale for scale in (1.0, 2.0**-14, 2.0**-100, 0.3, 2.0**-126, 2.0**119)]).to(dtype)
    by_magnitude = values[values.float().abs().argsort(stable=True)]
    shuffled = values[torch.randperm(len(values), generator=generator)]
    return torch.cat([by_magnitude, shuffled, near.flatten(), near.new_zeros(-near.numel() % 512)]).view(-1, 512)


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
@pytest.mark.parametrize("round_scale", [True, False])
def test_append_of_all_values(target, dtype, round_scale):
    """Zeros, subnormal and great numbers, ties, infinities and NaN of either sign."""
    kv_c = all_values(dtype)
    extreme = torch.zeros(6, 512, dtype=dtype)
    greatest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    extreme[1], extreme[2, 130], extreme[3] = -0.0, smallest / 4, greatest
    extreme[4, :200], extreme[5] = INF, NAN
    kv_c = torch.cat([kv_c, extreme])
    tokens = AppendCase(torch.zeros(0, 16, 1, 576), kv_c, kv_c[:, 64:128], torch.randperm(len(kv_c)))
    tokens = replace(tokens, kv_cache=torch.zeros(-(-len(kv_c) // 16), 16, 1, 576)).to(target.device)
    check_append(BLOCKS, tokens, random_bytes(BLOCKS, tokens), None, round_scale)
    for scale in (1.0, 0.05, -0.3, 1e-45, 1e-38, 3e38):
        check_append(ONE_SCALE, tokens, random_bytes(ONE_SCALE, tokens), torch.tensor(scale), round_scale)


@pytest.mark.parametrize("kv_scale", [0.0, -0.0, NAN, -NAN, INF, -INF])
def test_append_with_odd_scales(target, kv_scale):
    """What torch's division gives on x86: NaN has a sign, that of 0 / 0 and inf / inf too."""
    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, 500.0, INF, -INF, NAN, -NAN, 448.0, -1e30, 2.0, 3.0, 4.0, 5.0])
    case = AppendCase(torch.zeros(1, 16, 1, 48), odd.repeat(3, 2), odd.repeat(3, 1), torch.tensor([3, -1, 0]))
    case = case.to(target.device)
    check_append(ONE_SCALE, case, random_bytes(ONE_SCALE, case), torch.tensor(kv_scale), True)


# -------------------------------------------------------------------------------------------------- fwd_kvcache_mla


def quantized(
    case: DecodeCase, layout: CacheFormat, cache_dtype: torch.dtype, target: Target, round_scale: bool = True
) -> tuple[dict, DecodeCase]:
    """A call over the case's cache in fp8, and the case over what that stands for: in q's dtype, but with one scale for
    all on other backends than the CPU's, where it is the softmax and the results that are scaled."""
    d_v, d_rope, device = case.head_dim_v, case.q.shape[-1] - case.head_dim_v, case.q.device
    kv_scale = scale_of(layout)
    tokens = case.kv_cache.cpu().reshape(-1, d_v + d_rope).split([d_v, d_rope], 1)
    cache = layout.quantize(*tokens, kv_scale, round_scale).view(*case.kv_cache.shape[:-1], -1)
    dtype = torch.float32 if layout.scaled and target.name != "cpu" else case.q.dtype
    plain = layout.dequantize(cache, d_v, d_rope, kv_scale, dtype).to(device)
    kv_scale = None if kv_scale is None else kv_scale.to(device)
    fp8 = case.kwargs() | {"kv_cache": cache.view(cache_dtype).to(device), "kv_scale": kv_scale}
    return fp8, replace(case, kv_cache=plain)


@pytest.mark.parametrize("name", FP8)
@given(data=st.data())
@settings(max_examples=examples(250 if torch.cuda.is_available() else 100))
def test_decoding_is_that_of_the_dequantised_cache(target, name, data):
    """Half of the calls peaked, what must not be read NaN; with a plan and without. Within the error that is allowed
    to decoding of that cache; on the CPU, which does just that, equal."""
    case = make_decode_case(**data.draw(decode_calls(target)))
    round_scale = data.draw(st.booleans(), label="round_scale")
    fp8, plain = quantized(case, FP8[name], data.draw(st.sampled_from(BYTE_DTYPES)), target, round_scale)
    plan = {}
    if data.draw(st.booleans(), label="with plan"):
        made = get_mla_metadata(*case.plan_args)
        plan = dict(zip(("tile_scheduler_metadata", "num_splits"), made, strict=True))
    result = fwd_kvcache_mla(**fp8, **plan)
    if target.name != "cpu":
        check_decode(plain, *result, factor=target.factor)
        return
    for actual, expected in zip(result, fwd_kvcache_mla(**plain.kwargs(), **plan), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("h_q", [4, 32])  # of two queries: few rows have a kernel of their own
@pytest.mark.parametrize("causal", [False, True])
def test_queries_in_fp8(target, causal, h_q):
    """Attention of q * q_scale over the cache * kv_scale, nothing rounded in between but P; out in bf16. Of more than
    16 rows sm_90a's scores are sums of e4m3 products, which have 14 bits or so."""
    case = make_decode_case([70, 0, 300, 1000], s_q=2, h_q=h_q, causal=causal, dtype=torch.float32, poison=False)
    fp8, plain = quantized(case, ONE_SCALE, torch.float8_e4m3fn, target)
    q_scale = torch.tensor(0.02)
    q = (case.q / q_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    call = fp8 | {"q": q, "q_scale": q_scale}
    call = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in call.items()}
    out, lse = (t.cpu() for t in fwd_kvcache_mla(**call))
    backends.use_backend("cpu")
    expected = fwd_kvcache_mla(**plain.kwargs() | {"q": q.float() * q_scale})
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), expected[0], rtol=2**-8, atol=1e-6 if target.name == "cpu" else 2e-3)
    coarse = target.name == "sm90" and h_q > 4
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=4e-3 if coarse else 1e-5)


def test_error_against_the_unquantised_cache(target):
    """What fp8 costs: the latents' e4m3 rounding, averaged over the keys that a query attends to."""
    dtype = target.dtypes[0]
    case = make_decode_case([1000] * 4, h_q=4, dtype=dtype, poison=False, device=target.device)
    exact = fwd_kvcache_mla(**case.kwargs())[0].float()
    for name, limit in (("fp8", 0.04), ("fp8_tensor", 0.05)):
        out = fwd_kvcache_mla(**quantized(case, FP8[name], torch.uint8, target)[0])[0].float()
        assert ((out - exact).norm() / exact.norm()).item() < limit, name


HEADS = (16, 64)  # few rows have a kernel of their own


@pytest.mark.parametrize("h_q", HEADS)
@pytest.mark.parametrize("scale", [-0.3, 0.7, 127.9, 200.0, 1e9, 1e38, 0.0, -0.0, 1e-40, 2.0**-149])
def test_a_token_s_scales_may_be_any_numbers(target, h_q, scale):
    """Negative, of many digits, great, zero or subnormal: `dequantize` says what they mean. Values are small, and few
    where scales are great, so that results are finite and do not hang on a score's last digits."""
    dtype = torch.bfloat16 if torch.bfloat16 in target.dtypes else torch.float32  # fp16 ends at 65504
    case = make_decode_case([200, 130], h_q=h_q, dtype=dtype, poison=False)
    fp8, _ = quantized(case, BLOCKS, torch.uint8, target, round_scale=False)
    tokens = [(0, 0, 7), (0, 3, 7), (1, 1, 0), (1, 2, 1)]  # row, page of it, token
    for row, page, token in tokens:
        bytes_ = fp8["kv_cache"][int(case.block_table[row, page]), token, 0]
        bytes_[:512] = bytes_[:512] & 0x87 | 0x18  # 2^-4 to 2^-3
        if abs(scale) > 1:
            bytes_[:512] = 0
            bytes_[3:512:50] = 0x01 if scale > 1e20 else 0x21
        bytes_[512:528] = torch.tensor([scale, 0.01, scale, 0.02]).view(torch.uint8)
    backends.use_backend("cpu")
    expected = fwd_kvcache_mla(**fp8)
    assert all(t.isfinite().all() for t in expected)
    backends.use_backend(target.name)
    actual = fwd_kvcache_mla(**{k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in fp8.items()})
    for a, e in zip(actual, expected, strict=True):
        a, e = a.cpu().float(), e.float()
        torch.testing.assert_close(a, e, rtol=0.02, atol=0.01 * e.abs().amax(-1).min().item())


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("h_q", HEADS)
def test_queries_of_any_magnitude(target, name, h_q):
    """Queries in bf16 may be multiplied in another type, but not with its range: neither a power of two in them nor a
    value far greater than its row's others, where keys are 0, changes anything."""
    if torch.bfloat16 not in target.dtypes:
        pytest.skip(f"{target.name}: no bf16")
    case = make_decode_case([200, 0, 130], h_q=h_q, dtype=torch.bfloat16, poison=False, device=target.device)
    case.kv_cache[..., 3] = 0
    fp8, _ = quantized(case, FP8[name], torch.uint8, target)
    expected = fwd_kvcache_mla(**fp8)
    for power, outlier in ((60, 0), (-60, 0), (-100, 0), (0, 20), (40, 16)):
        q = case.q * 2.0**power
        if outlier:
            q[..., 3] = 2.0 ** (power + outlier)
        actual = fwd_kvcache_mla(**fp8 | {"q": q, "softmax_scale": case.softmax_scale * 2.0**-power})
        for a, e, rtol in zip(actual, expected, (2**-7, 1e-5), strict=True):  # a bf16's last place
            torch.testing.assert_close(a, e, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("h_q", HEADS)
@pytest.mark.parametrize("scale", [NAN, INF, -INF])
def test_a_token_s_scale_that_is_no_number_makes_its_row_nan(target, h_q, scale):
    case = make_decode_case([200, 130], h_q=h_q, dtype=target.dtypes[0], poison=False, device=target.device)
    fp8, _ = quantized(case, BLOCKS, torch.uint8, target)
    row = fp8["kv_cache"][int(case.block_table[1, 1]), 5, 0]
    row[516:520] = torch.tensor([scale], device=row.device).view(torch.uint8)
    out, lse = fwd_kvcache_mla(**fp8)
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert out[0].isfinite().all() and lse[0].isfinite().all()


@pytest.mark.parametrize("h_q", HEADS)
@pytest.mark.parametrize("kv_scale", [NAN, INF, -INF])
def test_one_scale_that_is_no_number_makes_all_nan(target, h_q, kv_scale):
    """Scores are infinite or NaN, the greatest of them not -inf: and so are lse and results."""
    case = make_decode_case([200, 130], h_q=h_q, dtype=target.dtypes[0], poison=False, device=target.device)
    fp8, _ = quantized(case, ONE_SCALE, torch.uint8, target)
    out, lse = fwd_kvcache_mla(**fp8 | {"kv_scale": torch.tensor(kv_scale, device=target.device)})
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("h_q", HEADS)
def test_nan_in_a_key_shows_in_its_row_only(target, name, h_q):
    """Of causal calls in all queries of the row: those that do not see the key may be NaN too."""
    case = make_decode_case([200, 130], h_q=h_q, dtype=target.dtypes[0], poison=False, device=target.device)
    fp8, _ = quantized(case, FP8[name], torch.uint8, target)
    page, token = int(case.block_table[1, 1]), 5
    fp8["kv_cache"][page, token, 0, 77] = 0x7F
    out, _ = fwd_kvcache_mla(**fp8)
    assert out[1].isnan().all() and not out[0].isnan().any()


# ------------------------------------------------------------------------------------------------ errors, compilation


def good_call(name: str) -> dict:
    case = make_decode_case([5, 20], h_q=4, poison=False)
    return quantized(case, FP8[name], torch.uint8, TARGETS["cpu"])[0]


ERRORS = [
    (
        "fp8",
        {"kv_cache": lambda t: t[..., :640]},
        r"kv_cache: expected last dimension 656 \(fp8\) or 576 \(fp8_tensor\)",
    ),
    ("fp8", {"kv_scale": lambda t: torch.tensor(1.0)}, "kv_scale: expected None for a cache of fp8, got a tensor"),
    (
        "fp8_tensor",
        {"kv_scale": lambda t: None},
        "kv_scale: expected one fp32 value for a cache of fp8_tensor, got None",
    ),
    ("fp8_tensor", {"kv_scale": lambda t: t.double()}, r"kv_scale: expected one torch.float32 value .*float64"),
    ("fp8_tensor", {"kv_scale": lambda t: t.repeat(4)}, r"kv_scale: expected one .* got shape \[4\]"),
    (
        "fp8_tensor",
        {"q": lambda t: t.to(torch.float8_e4m3fn)},
        "q_scale: expected one fp32 value for q of .*, got None",
    ),
    ("fp8_tensor", {"q_scale": lambda t: torch.tensor(1.0)}, "q_scale: expected None for q of torch.bfloat16"),
    ("fp8", {"q": lambda t: t.to(torch.int8)}, "q: expected one of .*, got torch.int8"),
]


@pytest.mark.parametrize("name, changes, message", ERRORS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_calls_say_what_is_wrong(name, changes, message, device):
    call = {"q_scale": None, **good_call(name)}
    for argument, change in changes.items():
        call[argument] = change(call[argument])
    call = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
    with pytest.raises(RuntimeError, match=message):
        fwd_kvcache_mla(**call)


def test_an_fp8_query_needs_an_fp8_cache_of_one_scale():
    call = good_call("fp8")
    with pytest.raises(RuntimeError, match=r"q: expected one of .* with this cache"):
        fwd_kvcache_mla(**call | {"q": call["q"].to(torch.float8_e4m3fn), "q_scale": torch.tensor(1.0)})


def test_wrong_appends_say_what_is_wrong():
    tokens = torch.randn(4, 512), torch.randn(4, 64), torch.arange(4)
    cache = torch.zeros(2, 16, 1, 656, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="kv_scale: expected None for a cache of fp8"):
        concat_and_cache_mla(cache, *tokens, kv_scale=torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"last dimension 656 \(fp8\) or 576 \(fp8_tensor\) for 512 \+ 64 values"):
        concat_and_cache_mla(cache[..., :640], *tokens)
    with pytest.raises(RuntimeError, match=r"kv_c: expected one of .*, got torch.int8"):
        concat_and_cache_mla(cache, tokens[0].char(), *tokens[1:])
    assert not cache.any()


@pytest.mark.parametrize("name", FP8)
def test_append_and_decode_compile_to_one_graph(name):
    """The calls as they are, with no view of another dtype around them; once more with other values."""
    layout, graphs = FP8[name], []

    def backend(module, _):
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def step(cache, kv_c, k_pe, slots, q, table, seqlens, kv_scale):
        concat_and_cache_mla(cache, kv_c, k_pe, slots, kv_scale=kv_scale)
        return fwd_kvcache_mla(q, cache, table, seqlens, 512, kv_scale=kv_scale)

    for seed in range(2):
        torch.manual_seed(seed)
        cache = torch.zeros(4, 16, 1, layout.last_dim(512, 64), dtype=torch.uint8)
        kv_c, k_pe, q = torch.randn(20, 512), torch.randn(20, 64), torch.randn(1, 1, 4, 576)
        table, seqlens, slots = torch.arange(4)[None].int(), torch.tensor([20], dtype=torch.int32), torch.arange(20)
        with torch.no_grad():
            out, lse = step(cache, kv_c, k_pe, slots, q, table, seqlens, scale_of(layout))
        plain = layout.dequantize(cache, 512, 64, scale_of(layout), torch.float32)
        expected = fwd_kvcache_mla(q, plain, table, seqlens, 512)
        assert format_of(cache, 512, 64) is layout
        torch.testing.assert_close((out, lse), expected)
    assert len(graphs) == 1
    named = [str(target) for target in graphs[0]]
    assert [n for n in named if "flashmla" in n] and not [n for n in named if "view" in n]
