"""fp8 weights: rounding, widening, and the matrix that torch multiplies with.

A weight is `code * scale`: codes float8_e4m3fn, in memory a scale for each output row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nld_cuda.model.linear import slice_len

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix `[out, in]` in fp8.

    Attributes:
        codes: `[out, in]` float8_e4m3fn.
        scales: `[out, 1]` float32.
        scaled_product: which of torch's scaled products multiplies, activations being rounded to
            fp8 as well: "rows" takes scales of rows, "tensor" takes none (they are multiplied in
            afterwards); None: codes are widened slice by slice, activations stay as they are.
        input_scale: float32 scalar that activations are divided by before they are rounded; None: a
            scale per row, so that its largest magnitude becomes 448.
    """

    codes: Tensor
    scales: Tensor
    scaled_product: str | None = None
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.codes.shape[0], self.codes.shape[1]

    def numel(self) -> int:
        """Weights, as of the dense matrix."""
        return self.codes.numel()

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return self.codes.numel() + 4 * self.scales.numel()

    def product(self, x: Tensor) -> Tensor:
        """`x @ matrix.T`: x `[rows, in]`, result `[rows, out]`, both bfloat16."""
        if self.scaled_product is None or not x.shape[0]:
            return self._widened_product(x)
        codes, scales = round_rows(x, self.input_scale)
        return scaled_mm(codes, scales, self.codes, self.scales, self.scaled_product)

    def _widened_product(self, x: Tensor) -> Tensor:
        """The weights are exact in the sums; the scales multiply these."""
        out, inputs = self.shape
        result = x.new_empty(x.shape[0], out)
        step = max(1, slice_len(x.device) // inputs)
        for begin in range(0, out, step):
            rows = slice(begin, begin + step)
            torch.mm(x, widen(self.codes[rows]).t(), out=result[:, rows])
        return result.mul_(self.scales.t())


def can_scale(shape: tuple[int, int]) -> bool:
    """Whether torch's scaled products take a matrix `[out, in]`."""
    return shape[0] % 16 == 0 and shape[1] % 16 == 0


@functools.cache
def scaled_product(device: torch.device) -> str | None:
    """Which scaled product a device has, found out with a small one: see `Fp8Matrix`.

    With scales of rows where torch has that, else without scales; None: fp8 is not multiplied
    (GPUs before compute capability 8.9).
    """
    x = (torch.arange(48 * 64, device=device) % 15 - 7).view(48, 64).float()
    left, right = x[:16] / 7, x[16:] / 16  # 16 and 32 rows, exact in fp8 but for their scales
    for way in ("rows", "tensor"):
        try:
            found = scaled_mm(
                (7 * left).to(DTYPE), torch.full_like(left[:, :1], 1 / 7), (16 * right).to(DTYPE),
                torch.full_like(right[:, :1], 1 / 16), way,
            )  # fmt: skip
        except (RuntimeError, NotImplementedError, ValueError):
            continue
        if torch.allclose(found.float(), left @ right.t(), rtol=0.02, atol=0.02):
            return way
    return None


def scaled_mm(x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, way: str) -> Tensor:
    """`(x * x_scales) @ (codes * scales).T` in bfloat16.

    Args:
        x: `[rows, in]` float8_e4m3fn.
        x_scales: `[rows, 1]` float32.
        codes, scales: `[out, in]`, `[out, 1]` likewise; both sides multiples of 16.
        way: "rows" or "tensor", see `Fp8Matrix`.
    """
    if way == "rows":
        return torch._scaled_mm(
            x, codes.t(), scale_a=x_scales, scale_b=scales.t(), out_dtype=torch.bfloat16
        )
    one = torch.ones((), device=x.device)
    sums = torch._scaled_mm(x, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return sums.mul_(x_scales).mul_(scales.t()).bfloat16()


def round_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round rows `[rows, n]` to fp8: codes, and float32 scales `[rows, 1]`.

    Args:
        x: any floating-point dtype.
        scale: float32 scalar for all rows, larger magnitudes than 448 times it are cut off; None:
            the least that cuts nothing off, for each row.
    """
    if scale is None:
        scales = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    else:
        scales = scale.reshape(1, 1).repeat(x.shape[0], 1)
    return (x.float() / scales).clamp(-LARGEST, LARGEST).to(DTYPE), scales


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to nearest: codes `[out, in]` and scales `[out, 1]` bfloat16.

    The largest weight of an output becomes 448; codes are chosen for the scale as it is stored.
    """
    wide = weight.float()
    scales = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=1e-12).bfloat16()
    return (wide / scales.float()).clamp(-LARGEST, LARGEST).to(DTYPE), scales


def widen(codes: Tensor) -> Tensor:
    """Codes (finite ones) in bfloat16, which holds each exactly."""
    if codes.device.type != "cpu":
        return codes.bfloat16()
    # torch's own cast takes four times as long. Exponent and mantissa go to the low end of
    # bfloat16's, which is 2^-120 of the value, subnormals included.
    bits = codes.view(torch.int8).short()  # with copies of the sign above it
    bits.bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000)
    return bits.view(torch.bfloat16).mul_(2.0**120)


def dequantize_into(
    target: Tensor, codes: Tensor, scales: Tensor, block_in: int | None = None
) -> None:
    """Write `codes * scales`, rounded once, to `target` `[out, in]` of any floating-point dtype.

    Args:
        target: written.
        codes: `[out, in]` float8_e4m3fn, on the device of target.
        scales: float32 `[out, 1]`, or `[out, ceil(in / block_in)]`.
        block_in: inputs that share a scale; None: all.
    """
    out, inputs = codes.shape
    step = max(1, slice_len(target.device) // inputs)
    for begin in range(0, out, step):
        rows = slice(begin, begin + step)
        wide = scales[rows].repeat_interleave(block_in or inputs, dim=1)[:, :inputs]
        target[rows] = widen(codes[rows]).float() * wide
