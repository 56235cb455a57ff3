"""Matrix products of the forward pass, on weights stored `[out, in]` as checkpoints store them.

Each function is one torch matmul that writes where its result belongs, so the forward pass holds no
code about how a weight is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write `x @ weight.T` to `out`. x `[rows, in]`, weight `[out, in]`, out `[rows, out]`."""
    torch.mm(x, weight.t(), out=out)


def linear_add_(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add `x @ weight.T` to `residual` in place, rounded once. Shapes as `linear_into`."""
    residual.addmm_(x, weight.t())


def lora_add_(residual: Tensor, x: Tensor, lora: Lora) -> None:
    """Add a low-rank side path to `residual` in place. residual `[rows, out]`, x `[rows, in]`."""
    residual.addmm_(torch.mm(x, lora.a.t()), lora.b.t(), alpha=lora.scale)
