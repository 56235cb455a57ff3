"""Comparisons that treat NaN as failure and judge float error against the same precision."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_equal(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Fail with the first differing coordinate and both values. NaN equals NaN here."""
    assert actual.shape == expected.shape, (
        f"{name}: shape {actual.shape}, expected {expected.shape}"
    )
    assert actual.dtype == expected.dtype, (
        f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    )
    actual, expected = actual.cpu(), expected.cpu()
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not same.all():
        where = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} differ, first at {where}: "
            f"got {actual[where].item()}, expected {expected[where].item()}"
        )


def assert_accurate(
    actual: Tensor,
    reference64: Tensor,
    same_precision: Tensor,
    name: str = "tensor",
    tiny: float = 1e-6,
) -> None:
    """Require error(actual) <= 2 * error(PyTorch in the same dtype) + tiny, and equal infinities.

    `reference64` is the float64 result, `same_precision` the reference run in the op's own dtype.
    """
    actual, exact, plain = (
        t.detach().cpu().double() for t in (actual, reference64, same_precision)
    )
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert not exact.isnan().any(), f"{name}: the reference itself holds NaN"
    assert torch.equal(actual.isinf(), exact.isinf()), f"{name}: infinities differ"
    finite = ~exact.isinf()
    error = (actual - exact)[finite].abs()
    assert not error.isnan().any(), f"{name}: NaN in the result"
    allowed = 2 * (plain - exact)[finite].abs().max().item() + tiny if error.numel() else 0.0
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= allowed, f"{name}: max error {worst:.3g} exceeds {allowed:.3g}"


# inductor does not quote the path of torch's headers: it cannot work below a folder with a space.
COMPILE_BACKEND = "aot_eager" if " " in torch.__file__ else "inductor"
