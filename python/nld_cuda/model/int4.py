"""4-bit weights: the two published storage formats, and the matrix that torch multiplies with.

A weight is `(code - 8) * scale`, codes 0 to 15, one scale for `group_size` inputs of an output row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nld_cuda.model.linear import slice_len

GROUP_SIZES = (32, 64, 128, 256)  # of torch's kernels
ZERO = 8
# Up to so many rows torch's int4 product is the faster way, above them expanding a slice of the
# matrix at a time. CPU: measured (docs/model.md). GPU: a guess, each tile of 16 rows unpacks the
# codes anew there.
MOST_ROWS_CPU, MOST_ROWS_GPU = 64, 256


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """A matrix `[out, in]` as torch's int4 product of its device wants it.

    Attributes:
        packed: codes, two to a byte, in the device's own order.
        scales: `[in / group_size, out, 2]` bfloat16: scales, and zeros.
        group_size: inputs that share a scale.
        shape: `(out, in)`.
        block: outputs whose codes are packed together; 0: the order of codes is not known.
    """

    packed: Tensor
    scales: Tensor
    group_size: int
    shape: tuple[int, int]
    block: int = 0

    def numel(self) -> int:
        """Weights, as of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scales))

    def product(self, x: Tensor) -> Tensor:
        """`x @ matrix.T`: x `[rows, in]` bfloat16, result `[rows, out]` bfloat16."""
        if not x.shape[0]:
            return x.new_empty(0, self.shape[0])
        most_rows = MOST_ROWS_CPU if x.device.type == "cpu" else MOST_ROWS_GPU
        if x.shape[0] <= most_rows or not self.block:
            return self.packed_product(x)
        return self.expanded_product(x)

    def expanded_product(self, x: Tensor) -> Tensor:
        """`product` by dense slices of the matrix, made one after the other."""
        out = self.shape[0]
        result = x.new_empty(x.shape[0], out)
        whole = out - out % self.block  # torch packs the outputs of a last, partial block otherwise
        step = max(1, slice_len(x.device) // (self.shape[1] * self.block)) * self.block
        for begin in range(0, whole, step):
            part = slice(begin, min(begin + step, whole))
            torch.mm(x, self._expand(part.start, part.stop), out=result[:, part])
        if whole < out:
            result[:, whole:] = self.packed_product(x, whole)
        return result

    def packed_product(self, x: Tensor, begin: int = 0) -> Tensor:
        """`product` by torch's int4 kernels; of outputs from `begin` on, a multiple of `block`."""
        scales = self.scales[:, begin:].contiguous()
        if x.device.type == "cpu":
            packed = self.packed[begin:]
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, self.group_size, scales)
        packed = self.packed[begin // 8 :]
        return torch.ops.aten._weight_int4pack_mm(x, packed, self.group_size, scales)

    def _expand(self, begin: int, end: int) -> Tensor:
        """Outputs `begin` to `end`, multiples of `block`, as a bfloat16 matrix `[in, outputs]`."""
        groups, inputs = self.scales.shape[0], self.shape[1]
        if self.packed.device.type == "cpu":
            codes = unpack_cpu(self.packed[begin:end], self.block)
        else:
            codes = unpack_cuda(self.packed[begin // self.block : end // self.block])
        # blocks of outputs, inputs, outputs of a block
        scales = self.scales[:, begin:end, 0].reshape(groups, -1, self.block).permute(1, 0, 2)
        dense = codes.sub_(ZERO).bfloat16().view(-1, groups, self.group_size, self.block)
        dense.mul_(scales.contiguous()[:, :, None])
        return dense.view(-1, inputs, self.block).permute(1, 0, 2).reshape(inputs, end - begin)


def can_multiply(shape: tuple[int, int], group_size: int, device: torch.device) -> bool:
    """Whether torch has an int4 product for a matrix `[out, in]`."""
    out, inputs = shape
    if group_size not in GROUP_SIZES or inputs % group_size:
        return False
    return out % 16 == 0 if device.type == "cpu" else out % 8 == 0 and inputs % 128 == 0


def make_matrix(words: Tensor, scales: Tensor, device: torch.device) -> Int4Matrix:
    """Lay out a matrix for `product`.

    Args:
        words: codes `[out, in / 8]`, as of `pack_words`.
        scales: `[out, in / group_size]`.
        device: where the products will run.
    """
    out, inputs = words.shape[0], 8 * words.shape[1]
    # Some outputs at a time: torch packs whole blocks of them alike, from four bytes a code. Into
    # one tensor: small ones that stay between large ones that go leave holes in the heap.
    step = max(64, slice_len(device) // inputs // 64 * 64)
    if device.type == "cpu":
        packed = torch.empty(out, inputs // 2, dtype=torch.uint8)
        targets = packed.split(step)
    else:
        packed = torch.empty(out // 8, inputs // 128, 32, 4, dtype=torch.int32, device=device)
        targets = packed.split(step // 8)
    for target, part in zip(targets, words.split(step), strict=True):
        target.copy_(_pack(unpack_words(part, inputs), device))
    columns = scales.t().to(device=device, dtype=torch.bfloat16)
    pairs = torch.stack([columns, torch.zeros_like(columns)], dim=2).contiguous()
    return Int4Matrix(packed, pairs, inputs // scales.shape[1], (out, inputs), packed_block(device))


def _pack(codes: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    # Two codes to a byte, the even one above; 8 tiles of 16 inputs are laid side by side.
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(device)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, 8)


@functools.cache
def packed_block(device: torch.device) -> int:
    """Outputs whose codes torch packs together on a device, 0 where it does not as we know it.

    The order is torch's own affair, and on the CPU depends on the instruction set: it is found out
    by unpacking what was packed.
    """
    codes = (torch.arange(64 * 256).view(64, 256) * 2654435761 >> 9 & 15).to(torch.uint8)
    for block in (64, 32) if device.type == "cpu" else (8,):
        packed = _pack(codes, device)
        found = unpack_cpu(packed, block) if device.type == "cpu" else unpack_cuda(packed)
        expected = codes.view(-1, block, 256).transpose(1, 2)
        if torch.equal(found.cpu(), expected.to(torch.int8)):
            return block
    return 0


def unpack_cpu(packed: Tensor, block: int) -> Tensor:
    """Codes `[out / block, in, block]` int8 of `packed` `[out, in / 2]` uint8.

    A byte holds an output of the lower half of the block and, above, one of the upper half.
    """
    packed = packed.view(torch.int8).view(packed.shape[0] // block, -1, block // 2)
    return torch.cat([packed & 15, packed >> 4 & 15], dim=2)


def unpack_cuda(packed: Tensor) -> Tensor:
    """Codes `[out / 8, in, 8]` int8 of `packed` `[out / 8, in / 128, 32, 4]` int32.

    A word belongs to lane `4 * output + i` and holds inputs 2i, 2i + 8, 2i + 16, 2i + 24 of 32,
    then those after them: what the lane needs of two 16 x 8 tiles.
    """
    outer, tiles = packed.shape[:2]
    parts = packed.view(torch.int8).view(outer, tiles, 8, 4, 4, 2, 2)  # output, i, 32, odd, 16
    codes = torch.stack([parts & 15, parts >> 4 & 15], dim=7)  # 8
    return codes.permute(0, 1, 4, 6, 7, 3, 5, 2).reshape(outer, 128 * tiles, 8)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The dense float32 matrix `[out, in]` of codes `[out, in]` and scales `[out, groups]`."""
    out, inputs = codes.shape
    grouped = codes.view(out, scales.shape[1], -1).float().sub_(ZERO)
    return grouped.mul_(scales.float()[:, :, None]).view(out, inputs)


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round to nearest: codes `[out, in]` uint8 and scales `[out, in / group_size]` bfloat16.

    The largest weight of a group becomes code 0 or 15, 7.5 steps from zero, clipped by half a step
    on the positive side; codes are chosen for the scale as it is stored.
    """
    out, inputs = weight.shape
    grouped = weight.float().view(out, inputs // group_size, group_size)
    scales = (grouped.abs().amax(dim=2) / 7.5).clamp(min=1e-8).bfloat16()
    codes = (grouped / scales.float()[:, :, None]).round_().clamp_(-8, 7).add_(ZERO)
    return codes.to(torch.uint8).view(out, inputs), scales


def pack_words(codes: Tensor) -> Tensor:
    """Pack codes `[rows, n]` into int32 words `[rows, ceil(n / 8)]`, the first in the low bits."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % 8)).view(rows, -1, 2)
    # The bytes of a word follow each other from its low bits on (everything torch runs on).
    return (padded[:, :, 0] | padded[:, :, 1] << 4).view(torch.int32)


def unpack_words(words: Tensor, count: int) -> Tensor:
    """Codes `[rows, count]` uint8 of words of 32 bits `[rows, ceil(count / 8)]`."""
    pairs = words.int().contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=2).view(words.shape[0], -1)[:, :count]


def gptq_zeros(qzeros: Tensor, out: int, is_version_2: bool) -> Tensor:
    """Zero codes `[groups, out]` of GPTQ's `qzeros` `[groups, out / 8]`.

    The first version of the format stores them less one.
    """
    return (unpack_words(qzeros, out).int() + (0 if is_version_2 else 1)) & 15
