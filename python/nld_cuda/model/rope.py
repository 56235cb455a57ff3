"""Frequencies of the rotary embedding: default, linear, YaRN and Llama 3."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nld_cuda.model.config import RopeConfig


def rope_frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """Compute the rotation per token of each pair of head elements, and the factor on cos and sin.

    YaRN keeps fast frequencies (those that turn more than `beta_fast` times over the original
    context), divides slow ones (under `beta_slow` turns) by `factor`, and mixes linearly between.
    Llama 3 does the same with other bounds, linearly in the number of turns.

    Returns:
        inv_freq: `[rotary_dim / 2]` float32 on the CPU, radians per token.
        attention_scaling: multiplies cos and sin, so queries and keys alike.

    Source: YaRN (Peng et al. 2023), section 3; reference-model 1.3 has golden values.
    """
    # float32 in the published order of operations, not float64: at position 100000 one last bit of
    # a frequency is a hundredth of a radian, and the weights were trained with these frequencies.
    wavelengths = rope.theta ** (torch.arange(0, rope.rotary_dim, 2).float() / rope.rotary_dim)
    frequencies = 1.0 / wavelengths
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        turns = rope.original_len / (2 * math.pi / frequencies)
        span = rope.high_freq_factor - rope.low_freq_factor
        kept = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
        return (1 - kept) * frequencies / rope.factor + kept * frequencies, 1.0
    if rope.kind != "yarn":
        return frequencies, 1.0

    def turning_index(turns: float) -> float:
        """Return the fractional index that makes `turns` turns over the original context."""
        turn_len = rope.original_len / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(turn_len) / (2 * math.log(rope.theta))

    low, high = turning_index(rope.beta_fast), turning_index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step instead of 0 / 0
    kept = 1 - ((torch.arange(rope.rotary_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    stretched = 1.0 / (rope.factor * wavelengths)
    return stretched * (1 - kept) + frequencies * kept, _attention_scaling(rope)


def _attention_scaling(rope: RopeConfig) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
