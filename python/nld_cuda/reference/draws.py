"""Random numbers, and choosing a token."""

from __future__ import annotations

import torch
from torch import Tensor


def philox_words(key: Tensor, counter: Tensor) -> Tensor:
    """Return Philox4x32-10 of counters `[..., 4]` under keys `[..., 2]`, as int64 words."""
    low = 0xFFFFFFFF
    key0, key1 = key.long().unbind(-1)
    c0, c1, c2, c3 = counter.long().unbind(-1)
    for _ in range(10):
        # int64 products wrap to the right bits; the mask undoes the sign extension of the shift
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32) & low ^ c1 ^ key0, p1 & low, (p0 >> 32) & low ^ c3 ^ key1, p0 & low,
        )  # fmt: skip
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox_tokens(seed: Tensor, positions: Tensor, purpose: int, num_tokens: int) -> Tensor:
    """Return the words `[rows, num_tokens]` of token ids 0, 1, ... for each (seed, position)."""
    rows, groups = seed.numel(), (num_tokens + 3) // 4
    seed, positions = seed.long(), positions.long()
    key = torch.stack((seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF), dim=-1)
    counter = torch.zeros(rows, groups, 4, dtype=torch.int64, device=seed.device)
    counter[..., 0] = torch.arange(groups, device=seed.device)
    counter[..., 1] = (positions & 0xFFFFFFFF)[:, None]
    counter[..., 2] = purpose
    return philox_words(key[:, None], counter).reshape(rows, 4 * groups)[:, :num_tokens]


_LOG_TERMS = [float.fromhex(h) for h in (
    "0x1.555554p-2", "-0x1.000228p-2", "0x1.99a012p-3", "-0x1.5471f6p-3",
    "0x1.22d90ap-3", "-0x1.0d875cp-3", "0x1.056496p-3", "-0x1.38c19cp-4",
)]  # fmt: skip
_LN2 = float.fromhex("0x1.62e430p-1")
_SQRT_HALF_BITS = 0x3F3504F3


def _log1p_poly(f: Tensor) -> Tensor:
    q = torch.full_like(f, _LOG_TERMS[-1])
    for term in reversed(_LOG_TERMS[:-1]):
        q = q * f + term
    f2 = f * f
    return (f2 * f * q + f2 * -0.5) + f


def _split_exponent(x: Tensor) -> tuple[Tensor, Tensor]:
    bits = x.contiguous().view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    return (bits - (exponent << 23)).view(torch.float32) + -1.0, exponent.float()


def exact_log(x: Tensor) -> Tensor:
    """Return the natural logarithm of positive, normal float32, with the bits of every backend."""
    fraction, exponent = _split_exponent(x)
    return _log1p_poly(fraction) + exponent * _LN2


def gumbel(words: Tensor) -> Tensor:
    """Return float32 Gumbel noise -log(-log1p(-u)), u = (word + 0.5) * 2^-32, bit for bit."""
    upper = words >= 2**31
    distance = torch.where(upper, 0xFFFFFFFF - words, words)
    w = (distance.float() + 0.5) * 2.0**-32
    near = w < 0.29289323
    fraction, exponent = _split_exponent(w)
    fraction = torch.where(upper, fraction, torch.where(near, -w, w * -2.0 + 1.0))
    exponent = torch.where(upper, exponent, torch.where(near, 0.0, -1.0))
    return -exact_log(-(_log1p_poly(fraction) + exponent * _LN2))


def uniform(words: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), 24 bits, float32, the bits of every backend."""
    return (words >> 8).float() * 2.0**-24


def inverse_temperature(temperature: Tensor) -> Tensor:
    """Return the factor on the logits of a draw; 0 (greedy) for temperatures <= 1e-6 and NaN."""
    temperature = temperature.float()
    return torch.where(temperature > 1e-6, 1.0 / temperature, 0.0)


def allowed_tokens(vocab: int, banned_token_ids: Tensor) -> Tensor:
    """Return bool `[vocab]`, False at the banned ids; others (-1, ...) are ignored."""
    banned = banned_token_ids[(banned_token_ids >= 0) & (banned_token_ids < vocab)]
    allowed = torch.ones(vocab, dtype=torch.bool, device=banned_token_ids.device)
    allowed[banned] = False
    return allowed


def lowest_argmax(values: Tensor, allowed: Tensor) -> Tensor:
    """Return the lowest id of the largest allowed value; all -inf: the lowest allowed id, or 0."""
    ids = torch.arange(values.shape[-1], device=values.device)
    values = values.masked_fill(~allowed, -torch.inf)
    is_best = (values == values.amax(-1, keepdim=True)) & allowed
    best = torch.where(is_best, ids, ids.numel()).amin(-1)
    return torch.where(best == ids.numel(), 0, best)


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    positions: Tensor,
    purpose: int,
    allowed: Tensor,
) -> Tensor:
    """Return int64 `[rows]`: argmax of logit * (1 / T) + Gumbel noise, or of the logits if T is 0.

    logits `[rows, vocab]`; temperature, seed and positions `[rows]`; allowed bool `[vocab]`.
    """
    return lowest_argmax(draw_values(logits, temperature, seed, positions, purpose), allowed)


def draw_values(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    positions: Tensor,
    purpose: int,
    first_token_id: int = 0,
) -> Tensor:
    """Return what token first_token_id + j is drawn by: logit * (1 / T) + noise, or the logit."""
    cleaned, factor = clean_logits(logits), inverse_temperature(temperature)[:, None]
    words = philox_tokens(seed, positions, purpose, first_token_id + logits.shape[-1])
    tempered = (cleaned * factor).clamp_max(torch.finfo(torch.float32).max)
    noisy = tempered + gumbel(words[:, first_token_id:])
    return torch.where(factor > 0, noisy, cleaned)


def clean_logits(logits: Tensor) -> Tensor:
    """Return float32 logits with NaN as -inf and +inf as the largest finite float."""
    return logits.float().nan_to_num(-torch.inf, torch.finfo(torch.float32).max, -torch.inf)


def gumbel_noise_(noise: Tensor, seed: Tensor, positions: Tensor, purpose: int = 0) -> None:
    """Fill noise `[rows, vocab]` with the noise of each row's (seed, position)."""
    noise.copy_(gumbel(philox_tokens(seed, positions, purpose, noise.shape[1])))


SAMPLE, DRAFT, ACCEPT, RESIDUAL = range(4)  # purposes of random numbers
