"""Matrix products of the forward pass, on weights stored `[out, in]` as checkpoints store them.

Each function writes where its result belongs, so the forward pass holds no code about how a weight
is stored: dense, or quantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class QuantizedMatrix(Protocol):
    """What the model needs of a matrix `[out, in]` that is no tensor."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def num_bytes(self) -> int: ...
    def numel(self) -> int: ...
    def product(self, x: Tensor) -> Tensor: ...


Weight = Tensor | QuantizedMatrix


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank side path of one linear layer: adds `scale * (x @ a.T) @ b.T`.

    Attributes:
        a: `[rank, in]`.
        b: `[out, rank]`, same dtype.
        scale: alpha / rank.
    """

    a: Tensor
    b: Tensor
    scale: float


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`. x `[rows, in]`, weight `[out, in]`, result `[rows, out]`."""
    return torch.mm(x, weight.t()) if isinstance(weight, Tensor) else weight.product(x)


def linear_into(x: Tensor, weight: Weight, out: Tensor) -> None:
    """Write `x @ weight.T` to `out` `[rows, out]`. Shapes as `linear`."""
    if isinstance(weight, Tensor):
        torch.mm(x, weight.t(), out=out)
    else:
        out.copy_(weight.product(x))


def linear_add_(residual: Tensor, x: Tensor, weight: Weight, lora: Lora | None = None) -> None:
    """Add `x @ weight.T` to `residual` in place; dense weights round once. Shapes as `linear`.

    With `lora` its side path is added too.
    """
    if isinstance(weight, Tensor):
        residual.addmm_(x, weight.t())
    else:
        residual.add_(weight.product(x))
    if lora is not None:
        lora_add_(residual, x, lora)


def lora_add_(residual: Tensor, x: Tensor, lora: Lora) -> None:
    """Add a low-rank side path to `residual` in place. residual `[rows, out]`, x `[rows, in]`."""
    residual.addmm_(torch.mm(x, lora.a.t()), lora.b.t(), alpha=lora.scale)


def slice_len(device: torch.device) -> int:
    """Weights to expand at a time: what fits a CPU's cache; on a GPU what keeps launches few."""
    return 1 << 20 if device.type == "cpu" else 1 << 25
