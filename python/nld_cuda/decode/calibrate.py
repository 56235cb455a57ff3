"""Scales of a float8_e4m3fn cache from prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nld_cuda.decode.kv_cache import KVCache, KVScales
from nld_cuda.decode.options import prompt_ids
from nld_cuda.ops import MaskMode

if TYPE_CHECKING:
    from nld_cuda.model.transformer import NLDModel

E4M3_MAX = 448.0


@torch.inference_mode()
def calibrate_kv(model: NLDModel, prompts: Any, *, margin: float = 2.0) -> KVScales:
    """Set the scales of the model's fp8 caches from what prompts leave in a cache.

    The largest magnitude of a head over all prompts, times `margin`, becomes the largest that e4m3
    holds. Its precision is the same from 448 down to 2^-6, so room above costs little, and what
    exceeds it is cut off. Caches made afterwards have the scales (`model.kv_scales`); the default
    without them is 1.

    Args:
        model: from `load`, of any kv_dtype: calibration itself uses a cache of the model's dtype.
        prompts: as `generate` takes them; one causal forward each.
        margin: > 0.

    Returns:
        The scales, float32 `[num_layers, num_kv_heads]` on the model's device. A head that is zero
        everywhere has 1.

    Raises:
        ValueError: no prompt, an empty one, a margin that is not positive; as `generate`.
    """
    if not margin > 0:
        raise ValueError(f"calibrate_kv: margin must be > 0, got {margin}")
    largest: KVScales | None = None
    for ids in prompt_ids(model, prompts):
        found = _largest(model, ids)
        if largest is None:
            largest = found
        largest = KVScales(*(torch.maximum(a, b) for a, b in zip(largest, found, strict=True)))
    if largest is None:
        raise ValueError("calibrate_kv: prompts must hold at least one, got none")
    scales = (torch.where(x > 0, x * (margin / E4M3_MAX), 1.0) for x in largest)
    model.kv_scales = KVScales(*scales)
    return model.kv_scales


def _largest(model: NLDModel, ids: list[int]) -> KVScales:
    """Largest magnitudes of a prompt's keys and values, `[num_layers, num_kv_heads]`."""
    if not ids:
        raise ValueError("calibrate_kv: a prompt must hold at least one token, got none")

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=model.device)

    num = len(ids)
    cache = KVCache(model.config, 1, num, model.device, model.dtype)
    places = torch.arange(num, dtype=torch.int32, device=model.device)
    model.hidden(
        torch.tensor(ids, device=model.device), places, places, cache, cache.allocate(1, num),
        ints(num), ints(0, num), ints(MaskMode.CAUSAL),
    )  # fmt: skip
    return KVScales(*(x[:, 0].float().abs().amax(dim=(1, 3)) for x in (cache.k, cache.v)))
