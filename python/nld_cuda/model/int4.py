"""4-bit weights: the two published storage formats, and the matrix that torch multiplies with.

A weight is `(code - 8) * scale`, codes 0 to 15, one scale for `group_size` inputs of an output row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128, 256)  # of torch's kernels
ZERO = 8


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """A matrix `[out, in]` as torch's int4 product of its device wants it.

    Attributes:
        packed: codes, two to a byte, in the device's own order.
        scales: `[in / group_size, out, 2]` bfloat16: scales, and zeros.
        group_size: inputs that share a scale.
        shape: `(out, in)`.
    """

    packed: Tensor
    scales: Tensor
    group_size: int
    shape: tuple[int, int]

    def numel(self) -> int:
        """Weights, as of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scales))

    def product(self, x: Tensor) -> Tensor:
        """`x @ matrix.T`: x `[rows, in]` bfloat16, result `[rows, out]` bfloat16."""
        if x.device.type == "cpu":
            return torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, self.packed, self.group_size, self.scales
            )
        return torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group_size, self.scales)


def can_multiply(shape: tuple[int, int], group_size: int, device: torch.device) -> bool:
    """Whether torch has an int4 product for a matrix `[out, in]`."""
    out, inputs = shape
    if group_size not in GROUP_SIZES or inputs % group_size:
        return False
    return out % 16 == 0 if device.type == "cpu" else out % 8 == 0 and inputs % 128 == 0


def make_matrix(codes: Tensor, scales: Tensor, device: torch.device) -> Int4Matrix:
    """Lay out a matrix for `product`.

    Args:
        codes: `[out, in]`, integers 0 to 15.
        scales: `[out, in / group_size]`.
        device: where the products will run.
    """
    out, inputs = codes.shape
    group_size = inputs // scales.shape[1]
    if device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    else:
        # Two codes to a byte, the even one above; 8 tiles of 16 inputs are laid side by side.
        bytes_ = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).to(device)
        packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
    columns = scales.t().to(device=device, dtype=torch.bfloat16)
    pairs = torch.stack([columns, torch.zeros_like(columns)], dim=2).contiguous()
    return Int4Matrix(packed, pairs, group_size, (out, inputs))


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The dense float32 matrix `[out, in]` of codes `[out, in]` and scales `[out, groups]`."""
    out, inputs = codes.shape
    grouped = (codes.view(out, scales.shape[1], -1) - ZERO).float() * scales.float()[:, :, None]
    return grouped.view(out, inputs)


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round to nearest: codes `[out, in]` int32 and scales `[out, in / group_size]` bfloat16.

    The largest weight of a group becomes code 0 or 15, 7.5 steps from zero, clipped by half a step
    on the positive side; codes are chosen for the scale as it is stored.
    """
    out, inputs = weight.shape
    grouped = weight.float().view(out, inputs // group_size, group_size)
    scales = (grouped.abs().amax(dim=2) / 7.5).clamp(min=1e-8).bfloat16()
    codes = (grouped / scales.float()[:, :, None]).round().clamp(-8, 7) + ZERO
    return codes.int().view(out, inputs), scales


def pack_words(codes: Tensor) -> Tensor:
    """Pack codes `[rows, n]` into int32 words `[rows, ceil(n / 8)]`, the first in the low bits."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes.long(), (0, -count % 8)).view(rows, -1, 8)
    words = (padded << torch.arange(0, 32, 4, device=codes.device)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_words(words: Tensor, count: int) -> Tensor:
    """Codes `[rows, count]` int32 of int32 words `[rows, ceil(count / 8)]`."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    codes = (words[:, :, None] >> shifts) & 15
    return codes.view(words.shape[0], -1)[:, :count]


def from_compressed_tensors(packed: Tensor, count: int) -> Tensor:
    """Codes `[out, in]` of `weight_packed` `[out, ceil(in / 8)]` (pack-quantized, symmetric)."""
    return unpack_words(packed, count)


def from_gptq(qweight: Tensor) -> Tensor:
    """Codes `[out, in]` of GPTQ's `qweight` `[in / 8, out]`."""
    return unpack_words(qweight.t().contiguous(), 8 * qweight.shape[0])


def gptq_zeros(qzeros: Tensor, out: int, is_version_2: bool) -> Tensor:
    """Zero codes `[groups, out]` of GPTQ's `qzeros` `[groups, out / 8]`.

    The first version of the format stores them less one.
    """
    return (unpack_words(qzeros, out) + (0 if is_version_2 else 1)) & 15
