"""Products with quantised matrices, on every device there is. Needs torch alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from compare import assert_equal
from nld_cuda.model import fp8, int4
from nld_cuda.model.fp8 import Fp8Matrix

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
        ],
    ),
]
ALL_CODES = torch.tensor([i for i in range(256) if i & 0x7F != 0x7F], dtype=torch.uint8)


@pytest.fixture(params=["whole", "sliced"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of 512 inputs are expanded at once, or in slices of a few outputs."""
    if request.param == "sliced":
        for module in (fp8, int4):
            monkeypatch.setattr(module, "slice_len", lambda _: 70 * 512)


def check_product(outs: int, rows: int, group_size: int, device: torch.device) -> None:
    weight = torch.randn(outs, 512)
    codes, scales = int4.quantize(weight, group_size)
    matrix = int4.make_matrix(int4.pack_words(codes), scales, device)
    dense = int4.dequantize(codes, scales)
    assert (dense - weight).abs().max() <= scales.float().max() * 1.02, "half a step, clipped: one"
    x = torch.randn(rows, 512).bfloat16()
    exact = x.double() @ dense.double().T
    plain = (x @ dense.bfloat16().T).double() - exact
    ours = matrix.product(x.to(device)).cpu().double() - exact
    assert ours.abs().max() <= 2 * plain.abs().max()
    assert matrix.numel() == weight.numel()
    assert matrix.num_bytes == weight.numel() // 2 + 4 * scales.numel()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 5, 33, 300])
def test_product(group_size: int, rows: int, device: str) -> None:
    torch.manual_seed(0)
    check_product(48, rows, group_size, torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outs", [16, 64, 304])
def test_product_of_many_rows(outs: int, device: str, slices: None) -> None:
    """Expanded slice by slice, but for the outputs past the last whole block."""
    torch.manual_seed(0)
    place = torch.device(device)
    has_simd = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    block = int4.packed_block(place)
    assert block in ((8,) if device == "cuda" else (64, 32) if has_simd else (0,))
    check_product(outs, max(int4.MOST_ROWS_CPU, int4.MOST_ROWS_GPU) + 1, 64, place)
    codes, scales = int4.quantize(torch.randn(outs, 512), 64)
    matrix = int4.make_matrix(int4.pack_words(codes), scales, place)
    assert matrix.product(torch.empty(0, 512, device=place).bfloat16()).shape == (0, outs)
    for begin in range(0, outs - outs % block, block) if block else ():
        x = torch.eye(512, device=place).bfloat16()
        packed = matrix.packed_product(x)[:, begin : begin + block]
        unpacked = matrix.expanded_product(x)[:, begin : begin + block]
        assert_equal(unpacked, packed, "the matrix itself")


def test_codes_packed_for_cuda() -> None:
    """Against the order in torch's CUDA source: lane t, word j of a tile of 8 outputs."""
    codes = torch.randint(16, (16, 256), generator=torch.Generator().manual_seed(0))
    words = torch.zeros(2, 2, 32, 4, dtype=torch.int64)
    for i, tile, lane, j in itertools.product(range(2), range(2), range(32), range(4)):
        row, first = codes[8 * i + lane // 4], 128 * tile + 32 * j + 2 * (lane % 4)
        for n, offset in enumerate((0, 8, 16, 24)):
            even, odd = row[first + offset : first + offset + 2].tolist()
            words[i, tile, lane, j] |= even << 4 * n | odd << 16 + 4 * n
    packed = torch.where(words >= 2**31, words - 2**32, words).int()
    expected = codes.view(2, 8, 256).transpose(1, 2).to(torch.int8)
    assert_equal(int4.unpack_cuda(packed), expected, "codes")


def test_widened_codes_are_exact() -> None:
    codes = ALL_CODES.view(fp8.DTYPE)
    assert codes.numel() == 254 and codes.float().abs().max() == fp8.LARGEST
    assert_equal(fp8.widen(codes).float(), codes.float(), "widened")
    assert fp8.widen(codes[128:129]).signbit().item() == codes[128:129].float().signbit().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_weights_are_rounded_once(dtype: torch.dtype, slices: None) -> None:
    codes = ALL_CODES.view(fp8.DTYPE).repeat(750).view(1500, 127)
    scales = torch.rand(1500, 3) / 100
    target = torch.empty(1500, 127, dtype=dtype)
    fp8.dequantize_into(target, codes, scales, 50)
    wide = scales.repeat_interleave(50, dim=1)[:, :127]
    assert_equal(target, (codes.double() * wide.double()).float().to(dtype), "weights")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
def test_products(rows: int, device: str, slices: None) -> None:
    """Widened, the only errors are those of a sum in bfloat16; scaled, those of rounded rows."""
    torch.manual_seed(0)
    weight = torch.randn(144, 512) * torch.logspace(-3, 3, 144)[:, None]
    codes, scales = fp8.quantize(weight)
    scales = scales.float()
    step = weight.abs() / 16 + scales / 512  # half a step of 3 bits, or of a subnormal
    assert ((codes.float() * scales - weight).abs() <= step * 1.01).all()
    x = torch.randn(rows, 512).bfloat16()
    matrix = Fp8Matrix(codes.to(device), scales.to(device))
    assert matrix.shape == (144, 512) and matrix.numel() == 144 * 512
    assert matrix.num_bytes == 144 * 512 + 144 * 4
    exact = x.double() @ (codes.double() * scales.double()).T
    found = matrix.product(x.to(device)).cpu()
    # GPUs sum parts in bfloat16, or in fewer bits than float32: errors of the size of the terms.
    slack = (1e-3 if device == "cpu" else 1.0) * weight.double().norm(dim=1)
    sizes = exact.abs() + slack
    assert found.shape == (rows, 144) and ((found.double() - exact).abs() <= sizes * 2**-7).all()
    way = fp8.scaled_product(torch.device(device))
    assert way is not None or device == "cuda"
    for scale in (None, torch.tensor(0.004)):
        x_codes, x_scales = fp8.round_rows(x, scale)
        rounded = x_codes.double() * x_scales.double()
        expected = rounded @ (codes.double() * scales.double()).T
        if scale is None:
            assert x_codes.float().abs().amax(dim=1).eq(fp8.LARGEST).all()
        else:
            assert (rounded.abs() <= 0.004 * 448 * 1.001).all(), "cut off"
        sizes = expected.abs() + slack
        for other in {"tensor", way} if way else ():
            input_scale = None if scale is None else scale.to(device)
            scaled = dataclasses.replace(matrix, scaled_product=other, input_scale=input_scale)
            found = scaled.product(x.to(device)).cpu()
            assert found.dtype == torch.bfloat16
            assert ((found.double() - expected).abs() <= sizes * 2**-6).all()


def test_rows_of_zeros_are_rounded_to_zeros() -> None:
    codes, scales = fp8.round_rows(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert (codes.float() == 0).all() and scales.isfinite().all() and (scales > 0).all()
