"""The meaning of every op, in plain PyTorch: same names, same argument order, no speed.

Loops over requests and reads values on the host on purpose: this page is to be read. CPU, emulated
CUDA and CUDA kernels are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# ---- kv_cache ---------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    """Return (-second half, first half) along the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def as_stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Return what a cache of `dtype` keeps of x `[tokens, num_kv_heads, head_dim]`."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    scaled = x.float() if scale is None else x.float() / scale[:, None]
    return scaled.clamp(-448, 448).to(dtype)  # NaN stays; casts of torch differ past 448


def rope_append_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float = 1.0,
    query_scale_beta: float = 0.0,
    query_scale_len: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotate q in place, rotate k, write k and v to their slots."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    # The angle is one float32 product whatever the dtype, as the published model computes it.
    angles = positions.float()[:, None] * inv_freq.float()
    cos = torch.cos(angles).repeat(1, 2)[:, None].to(compute) * attention_scaling
    sin = torch.sin(angles).repeat(1, 2)[:, None].to(compute) * attention_scaling
    rotary_dim = 2 * inv_freq.numel()

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., :rotary_dim].to(compute), x[..., rotary_dim:].to(compute)
        return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)

    scale = torch.ones(q.shape[0], dtype=compute, device=q.device)
    if query_scale_len > 0:
        steps = torch.div(positions, query_scale_len, rounding_mode="floor").to(compute)
        scale = 1 + query_scale_beta * torch.log1p(steps)
    q.copy_((rotate(q) * scale[:, None, None]).to(q.dtype))
    stored_k = as_stored(rotate(k), k_cache.dtype, k_scale)
    stored_v = as_stored(v, v_cache.dtype, v_scale)
    num_pages, page_size = k_cache.shape[:2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < num_pages * page_size:
            k_cache[slot // page_size, slot % page_size] = stored_k[token]
            v_cache[slot // page_size, slot % page_size] = stored_v[token]


def compact_(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    base_lens: Tensor,
    src_offsets: Tensor,
    num_kept: Tensor,
) -> None:
    """Move entries base + src_offsets[i] to base + i, for all layers."""
    page_size = k_cache.shape[2]
    for b, base in enumerate(base_lens.tolist()):
        for i in range(min(int(num_kept[b]), src_offsets.shape[1])):
            src, dst = base + int(src_offsets[b, i]), base + i
            src_page, dst_page = page_table[b, src // page_size], page_table[b, dst // page_size]
            for cache in (k_cache, v_cache):
                cache[:, dst_page, dst % page_size] = cache[:, src_page, src % page_size].clone()


# ---- attention --------------------------------------------------------------------------------


def visible_keys(
    mode: int, seq_len: int, num_rows: int, block_len: int = 1, block_phase: int = 0
) -> Tensor:
    """Return bool `[num_rows, seq_len]`: may row i of a request see key j?"""
    row = torch.arange(num_rows)[:, None]
    key = torch.arange(seq_len)[None]
    first = seq_len - num_rows  # key index of row 0
    p = first + row
    if mode == 0:  # FULL
        return (key >= 0) & (row >= 0)
    if mode == 1:  # CAUSAL
        return key <= p
    if mode == 2:  # BLOCK_CAUSAL

        def block(index: Tensor) -> Tensor:
            return torch.div(index + block_phase, block_len, rounding_mode="floor")

        return block(key) <= block(p)
    if mode == 3:  # QUADRATIC
        group_len = block_len + 1
        current = key - first  # flat index among the current rows
        in_cache = current < 0
        head = (current >= 0) & (current % group_len == 0) & (current <= row)
        same_group = (current >= 0) & (
            torch.div(current, group_len, rounding_mode="floor")
            == torch.div(row, group_len, rounding_mode="floor")
        )
        return in_cache | head | ((row % group_len != 0) & same_group)
    raise ValueError(f"block_attention: mask_mode must lie in [0, 4), got {mode}")


def reading_order(mode: int, seq_len: int, num_rows: int, block_len: int = 1) -> Tensor:
    """Return int64 `[seq_len]`: the token that kernels read as key 0, 1, ...

    Under QUADRATIC the cache, the heads of all groups, then their other rows; else as they stand.
    """
    token = torch.arange(seq_len)
    if mode != 3:
        return token
    current = token - (seq_len - num_rows)
    head = (current >= 0) & (current % (block_len + 1) == 0)
    return torch.cat([token[current < 0], token[head], token[(current >= 0) & ~head]])


def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    mask_mode: Tensor,
    *,
    block_len: Tensor | None = None,
    block_phase: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    split_len: int = 0,
    plan: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather each request's keys and values, score, mask, softmax.

    `split_len` and `plan` say how to compute, not what.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    total_q, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((num_heads, total_q), -torch.inf, dtype=compute, device=q.device)
    for b, seq_len in enumerate(seq_lens.tolist()):
        begin, end = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1])
        if begin == end or seq_len == 0:
            continue
        index = torch.arange(seq_len, device=q.device)
        pages, offsets = page_table[b, index // page_size].long(), index % page_size
        heads_per_kv = num_heads // num_kv_heads
        k, v = k_cache[pages, offsets].to(compute), v_cache[pages, offsets].to(compute)
        if k_scale is not None:
            k = k * k_scale[:, None]
        if v_scale is not None:
            v = v * v_scale[:, None]
        k, v = (x.repeat_interleave(heads_per_kv, dim=1) for x in (k, v))
        scores = scale * torch.einsum("qhd,khd->hqk", q[begin:end].to(compute), k)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(
            int(mask_mode[b]),
            seq_len,
            end - begin,
            1 if block_len is None else int(block_len[b]),
            0 if block_phase is None else int(block_phase[b]),
        ).to(q.device)
        scores = scores.masked_fill(~visible, -torch.inf)
        lse[:, begin:end] = torch.logsumexp(scores, dim=-1)
        weights = torch.softmax(scores, dim=-1).masked_fill(~visible, 0)  # a row seeing nothing: 0
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out, lse


def attention_plan(
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    mask_mode: Tensor,
    *,
    total_q: int,
    num_heads: int,
    num_kv_heads: int,
    max_seq_len: int,
    block_len: Tensor | None = None,
    block_phase: Tensor | None = None,
    split_len: int = 0,
    num_sms: int = 0,
) -> Tensor:
    """List the tiles of every request, cut their keys into splits, sort the items by length."""
    batch, heads_per_kv = seq_lens.shape[0], num_heads // num_kv_heads
    num_sms = num_sms or 4
    average = -(-total_q * heads_per_kv // batch) if batch else 0
    tile_rows = 128 if average > 64 else 64 if average > 16 or split_len > 0 else 16
    max_tiles = total_q * heads_per_kv // tile_rows + min(batch, total_q) if batch else 0
    wave = max(num_sms * (1 if tile_rows == 128 else 2) // num_kv_heads, 1)  # items side by side
    max_splits = max(-(-max_seq_len // split_len), 1) if split_len > 0 else 0
    max_items = max_tiles * max_splits if split_len > 0 else max_tiles + 2 * wave * (max_tiles > 0)

    # Per tile: request, first packed row, packed rows, one past the last key that a row sees; the
    # keys before it that none sees; the request's first key that is not the token of its number.
    tiles = []
    for b, seq_len in enumerate(seq_lens.tolist()):
        num_rows, mode = int(cu_seqlens_q[b + 1]) - int(cu_seqlens_q[b]), int(mask_mode[b])
        length = 1 if block_len is None else int(block_len[b])
        phase = 0 if block_phase is None else int(block_phase[b])
        visible = visible_keys(mode, seq_len, num_rows, length, phase)
        visible = visible[:, reading_order(mode, seq_len, num_rows, length)]
        heads_begin = max(seq_len - num_rows, 0) if mode == 3 else 2**31 - 1
        for begin in range(0, num_rows * heads_per_kv, tile_rows):
            rows = min(tile_rows, num_rows * heads_per_kv - begin)
            seen = visible[begin // heads_per_kv : (begin + rows - 1) // heads_per_kv + 1].any(0)
            end = int(seen.nonzero().max()) + 1 if seen.any() else 0
            unseen = (~seen[:end]).nonzero()
            hole = [int(unseen.min()), int(unseen.max()) + 1] if len(unseen) else [end, end]
            tiles.append((b, begin, rows, end, *hole, heads_begin))

    # No item stretches over the whole steps of a hole: splits are of the other keys.
    step = split_len or 64
    cuts = []
    for *_, hole_begin, hole_end, _ in tiles:
        cut = [-(-hole_begin // step) * step, hole_end // step * step]
        cuts.append(cut if cut[1] > cut[0] else [0, 0])
    lengths = [t[3] - (c[1] - c[0]) for t, c in zip(tiles, cuts, strict=True)]

    # Where the plan chooses: the longest tile in 1, 2, ... splits, the others likewise; the way
    # that takes least by the model of time of csrc/attention/heuristic.h, in nanoseconds.
    longest_tile, total_keys = max(lengths, default=0), sum(lengths)
    ctas, key_ns = (1, 20) if tile_rows == 128 else (2, 16)

    def cost(keys: int) -> float:
        num_items = sum(max(-(-length // keys), 1) for length in lengths)
        cuts = num_items - len(tiles)
        if cuts > 2 * wave:
            return float("inf")
        longest_item, waves = min(keys, longest_tile), -(-num_items // wave)
        packed = total_keys // wave + total_keys // max(num_items, 1)
        arithmetic = key_ns * max(min(waves * longest_item, packed), longest_item)
        memory = total_keys * ctas * 20 // wave
        busy = max(arithmetic, memory) + min(arithmetic, memory) // 4
        partials = 1000 + cuts * tile_rows * ctas * 25 // wave if cuts > 0 else 0
        return busy + waves * 2000 + partials

    ways = [max(-(-longest_tile // k), 64) for k in range(1, 257)]
    share = min((-(-keys // 64) * 64 for keys in ways), key=cost)  # the first of equal cost
    tile_words: list[list[int]] = []
    split_tiles: list[int] = []
    items: list[list[int]] = []  # with their lengths
    num_slots = 0
    for t, (b, begin, rows, end, *hole, heads_begin) in enumerate(tiles):
        length, (cut_begin, cut_end) = lengths[t], cuts[t]
        split_keys, splits = split_len, -(-length // split_len) if split_len > 0 else 0
        splits = min(splits, max_splits)
        if split_len == 0:
            wanted = -(-length // share)  # then equal lengths, at multiples of 64 keys
            split_keys = -(-length // (wanted * 64)) * 64 if wanted > 1 else share
            splits = -(-length // split_keys)
        splits = max(splits, 1)
        slot = num_slots if splits > 1 else -1
        words = [b, begin, rows, end, splits, split_keys, slot, len(items), *hole, heads_begin, 0]
        tile_words.append(words)
        if splits > 1:
            split_tiles.append(t)
            num_slots += splits
        for s in range(splits):
            first, last = s * split_keys, length if s == splits - 1 else (s + 1) * split_keys
            left_out = cut_end - cut_begin
            key_begin = first + left_out if first >= cut_begin else first
            key_end = last + left_out if last > cut_begin else last
            items.append([t, s, key_begin, key_end, last - first])
    longest = max((item[4] for item in items), default=0)
    items.sort(key=lambda item: -(item[4] // (longest // 256 + 1)))  # stable

    header = [0x4E4C4402, batch, total_q, heads_per_kv, tile_rows, split_len]
    header += [len(tiles), len(items), len(split_tiles), num_slots, longest, 0]
    offset = -(-(12 + 13 * max_tiles) // 4) * 4
    plan = torch.zeros(offset + 4 * max_items, dtype=torch.int32)
    for at, words in (
        (0, header),
        (12, [w for tile in tile_words for w in tile]),
        (12 + 12 * max_tiles, split_tiles),
        (offset, [w for item in items for w in item[:4]]),
    ):
        plan[at : at + len(words)] = torch.tensor(words, dtype=torch.int32)
    return plan


# ---- sampler ----------------------------------------------------------------------------------


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


def _entropy_prefix(entropy: Tensor, threshold: float) -> Tensor:
    """Return which rows form the longest prefix, by increasing entropy, that stays in the bound."""
    order = entropy.argsort(stable=True)
    before = entropy[order].cumsum(0) - entropy[order]
    chosen = torch.zeros_like(entropy, dtype=torch.bool)
    chosen[order] = torch.where(before.isnan(), torch.inf, before) <= threshold  # inf - inf
    chosen[order[0]] = True
    return chosen


def commit_(
    logits: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    threshold: Tensor,
    *,
    mask_token_id: int,
    quota: Tensor | None = None,
    revise_threshold: Tensor | None = None,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    purpose: int = 0,
    candidates: Tensor | None = None,
    confidence: Tensor | None = None,
    num_committed: Tensor | None = None,
    num_remaining: Tensor | None = None,
    done: Tensor | None = None,
    tickets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Judge the masked rows, reveal those the rule allows, re-mask disbelieved ones, freeze EOS."""
    rows, vocab = logits.shape
    batch, device = rule.numel(), logits.device
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if confidence is None:
        confidence = torch.ones(rows, dtype=compute, device=device)
    if banned_token_ids is None:
        banned_token_ids = torch.tensor([mask_token_id], device=device)
    if temperature is None or seed is None or positions is None:
        temperature = torch.zeros(batch, device=device)
        seed = torch.zeros(batch, dtype=torch.int64, device=device)
        positions = torch.zeros(rows, dtype=torch.int32, device=device)
    allowed = allowed_tokens(vocab, banned_token_ids)

    def judge(b: int, own: slice) -> tuple[Tensor, Tensor, Tensor]:
        n, mine, masked = own.stop - own.start, logits[own], is_masked[own]
        draws = draw_tokens(
            mine, temperature[b].expand(n), seed[b].expand(n), positions[own], purpose, allowed
        )
        chosen = torch.where(masked, draws, block_tokens[own])
        cleaned = mine.to(compute).nan_to_num(
            -torch.inf, torch.finfo(torch.float32).max, -torch.inf
        )
        log_probs = cleaned.log_softmax(-1)
        probs = log_probs.exp()
        entropy = -(probs * log_probs).nan_to_num(0.0).sum(-1)
        in_vocab = (chosen >= 0) & (chosen < vocab)
        belief = probs.gather(1, chosen.clamp(0, vocab - 1)[:, None])[:, 0]
        hopeless = (cleaned.masked_fill(~allowed, -torch.inf) == -torch.inf).all(-1) & masked
        belief = torch.where(hopeless | ~in_vocab, 0.0, belief.nan_to_num(0.0))
        return chosen, belief, torch.where(hopeless, torch.inf, entropy)

    return _commit_judged_(
        judge, block_tokens, is_masked, cu_seqlens, rule, threshold, mask_token_id, quota,
        revise_threshold, is_fixed, eos_token_ids, candidates, confidence, num_committed,
        num_remaining, done,
    )  # fmt: skip


def _commit_judged_(
    judge: Callable[[int, slice], tuple[Tensor, Tensor, Tensor]],
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    threshold: Tensor,
    mask_token_id: int,
    quota: Tensor | None,
    revise_threshold: Tensor | None,
    is_fixed: Tensor | None,
    eos_token_ids: Tensor | None,
    candidates: Tensor | None,
    confidence: Tensor | None,
    num_committed: Tensor | None,
    num_remaining: Tensor | None,
    done: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Commit by what judge(request, its rows) says: tokens chosen or held, belief, entropy."""
    batch, device = rule.numel(), rule.device
    if candidates is None:
        candidates = block_tokens.clone()
    if confidence is None:
        confidence = torch.ones(block_tokens.numel(), device=device)
    if num_committed is None:
        num_committed = torch.zeros(batch, dtype=torch.int32, device=device)
    if num_remaining is None:
        num_remaining = torch.zeros(batch, dtype=torch.int32, device=device)
    if done is None:
        done = torch.zeros(batch, dtype=torch.bool, device=device)
    for b in range(batch):
        own = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        n = own.stop - own.start
        tokens, masked = block_tokens[own], is_masked[own]
        fixed = torch.zeros_like(masked) if is_fixed is None else is_fixed[own]
        held = ~masked & ~fixed & (int(rule[b]) == 4)
        chosen, belief, entropy = judge(b, own)
        candidates[own] = torch.where(masked, chosen, tokens)
        confidence[own] = torch.where(masked | held, belief, 1.0).to(confidence.dtype)

        where = masked.nonzero()[:, 0]
        order = where[belief[where].argsort(descending=True, stable=True)]  # lowest row on ties
        commits = torch.zeros_like(masked)
        if where.numel():
            if int(rule[b]) in (0, 4):
                commits = masked & (belief >= threshold[b])
                commits[order[0]] = True
            elif int(rule[b]) == 1:
                commits[order[: max(1 if quota is None else int(quota[b]), 1)]] = True
            elif int(rule[b]) == 2:
                commits = masked.clone()
            else:
                commits[where] = _entropy_prefix(entropy[where], float(threshold[b]))
        again = held & (belief < (0.0 if revise_threshold is None else float(revise_threshold[b])))
        tokens[commits] = chosen[commits]
        tokens[again] = mask_token_id
        masked &= ~commits
        masked |= again

        eos = [] if eos_token_ids is None else [i for i in eos_token_ids[b].tolist() if i >= 0]
        for i in range(n):
            if masked[i]:
                break
            if int(tokens[i]) in eos and not fixed[i]:
                tokens[i + 1 :] = tokens[i].clone()
                masked[i + 1 :] = False
                break
        num_committed[b] = commits.sum()
        num_remaining[b] = masked.sum()
        done[b] = num_remaining[b] == 0
    return candidates, confidence, num_committed, num_remaining, done


# ---- shards of the vocabulary -----------------------------------------------------------------


def _no_parts(rows: int, shard_len: int, num_parts: int) -> Tensor:
    """Return parts that say nothing: max, sum, dot, value, id, logit and two unused words."""
    parts = torch.zeros(rows, num_parts or max(-(-shard_len // 8192), 1), 8, dtype=torch.int32)
    parts[..., [0, 3]] = torch.tensor(-torch.inf).view(torch.int32)
    parts[..., 4] = -1
    return parts


def _allowed_shard(first: int, shard_len: int, banned_token_ids: Tensor | None) -> Tensor:
    banned = torch.empty(0) if banned_token_ids is None else banned_token_ids.cpu()
    return allowed_tokens(first + shard_len, banned.long())[first:]


def _best_part(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return id and logit `[rows]` of what is chosen, from parts `[shards, rows, n, 8]`."""
    parts = parts.transpose(0, 1).flatten(1, 2)  # in order of the ids
    best = parts[..., 3].contiguous().view(torch.float32).argmax(-1)  # the first on ties
    chosen = parts[torch.arange(len(parts), device=parts.device), best]
    return chosen[:, 4].long(), chosen[:, 5].contiguous().view(torch.float32)


def commit_scan(
    logits: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    *,
    first_token_id: int,
    mask_token_id: int,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    purpose: int = 0,
    num_parts: int = 0,
) -> Tensor:
    """Return `[rows, num_parts, 8]` int32: softmax sums and best token of a shard of the logits."""
    shard_len = logits.shape[1]
    if banned_token_ids is None:
        banned_token_ids = torch.tensor([mask_token_id])
    allowed = _allowed_shard(first_token_id, shard_len, banned_token_ids)
    parts = _no_parts(logits.shape[0], shard_len, num_parts)
    for b in range(rule.numel() if shard_len else 0):
        for row in range(int(cu_seqlens[b]), int(cu_seqlens[b + 1])):
            is_held = not is_masked[row]
            if is_held and (int(rule[b]) != 4 or (is_fixed is not None and bool(is_fixed[row]))):
                continue
            x = clean_logits(logits[row].cpu())
            top = x.amax()
            if top > -torch.inf:
                weights, shifts = (x - top).exp(), (x - top).clamp_min(-200)
                sums = torch.stack((top, weights.sum(), (weights * shifts).sum()))
                parts[row, 0, :3] = sums.view(torch.int32)
            if is_held:
                values = torch.full((shard_len,), -torch.inf)
                held = int(block_tokens[row]) - first_token_id
                if 0 <= held < shard_len:
                    values[held] = 0.0
            elif temperature is None or seed is None or positions is None:
                values = x.masked_fill(~allowed, -torch.inf)
            else:
                values = draw_values(
                    x[None], temperature[b : b + 1].cpu(), seed[b : b + 1].cpu(),
                    positions[row : row + 1].cpu(), purpose, first_token_id,
                )[0].masked_fill(~allowed, -torch.inf)  # fmt: skip
            _put_best(parts[row, 0], values, x, first_token_id)
    return parts.to(logits.device)


def _put_best(part: Tensor, values: Tensor, logits: Tensor, first_token_id: int) -> None:
    """Write the lowest id of the largest value, that value and its logit into a part `[8]`."""
    best = int(lowest_argmax(values, torch.ones_like(values, dtype=torch.bool)))
    if values[best] > -torch.inf:
        part[3] = values[best].view(torch.int32)
        part[4] = first_token_id + best
        part[5] = logits[best].view(torch.int32)


def commit_parts_(
    parts: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    threshold: Tensor,
    *,
    vocab: int,
    mask_token_id: int,
    quota: Tensor | None = None,
    revise_threshold: Tensor | None = None,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    candidates: Tensor | None = None,
    confidence: Tensor | None = None,
    num_committed: Tensor | None = None,
    num_remaining: Tensor | None = None,
    done: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do what `commit_` does, from parts `[num_shards, rows, num_parts, 8]` instead of logits."""
    if banned_token_ids is None:
        banned_token_ids = torch.tensor([mask_token_id], device=parts.device)
    allowed = allowed_tokens(vocab, banned_token_ids)
    lowest = int(lowest_argmax(torch.zeros(vocab, device=parts.device), allowed))

    def judge(b: int, own: slice) -> tuple[Tensor, Tensor, Tensor]:
        top, total, dot = parts[:, own, :, :3].transpose(0, 1).flatten(1, 2).contiguous().view(
            torch.float32
        ).unbind(-1)  # fmt: skip
        best, logit = _best_part(parts[:, own])
        shift = (top - top.amax(-1, keepdim=True)).nan_to_num(-200, neginf=-200).clamp_min(-200)
        dot = ((dot + total * shift) * shift.exp()).sum(-1)
        total = (total * shift.exp()).sum(-1)
        known = (best >= 0) & (total > 0)
        belief = torch.where(known, (logit - top.amax(-1)).exp() / total, 0.0)
        entropy = torch.where(known, (total.log() - dot / total).clamp_min(0), torch.inf)
        chosen = torch.where(best >= 0, best, lowest)
        return torch.where(is_masked[own], chosen, block_tokens[own]), belief, entropy

    return _commit_judged_(
        judge, block_tokens, is_masked, cu_seqlens, rule, threshold, mask_token_id, quota,
        revise_threshold, is_fixed, eos_token_ids, candidates, confidence, num_committed,
        num_remaining, done,
    )  # fmt: skip


# ---- verify -----------------------------------------------------------------------------------

GREEDY, SAMPLED, REJECTION, COMMIT = range(4)  # ops.VerifyMode
SAMPLE, DRAFT, ACCEPT, RESIDUAL = range(4)  # purposes of random numbers


def verify_(
    logits: Tensor,
    block_tokens: Tensor,
    cu_seqlens: Tensor,
    verify_mode: Tensor,
    out_tokens: Tensor,
    out_lens: Tensor,
    max_out_lens: Tensor,
    next_tokens: Tensor,
    seq_lens: Tensor,
    done: Tensor,
    *,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    draft_probs: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    force_positions: Tensor | None = None,
    force_tokens: Tensor | None = None,
    num_emitted: Tensor,
    num_accepted: Tensor,
    tickets: Tensor | None = None,
) -> None:
    """Accept drafts, emit them and a bonus token, cut at EOS and budget, roll seq_lens back."""
    vocab = logits.shape[1]
    batch, capacity = out_tokens.shape
    no_ids = torch.empty(0, dtype=torch.int64)
    allowed = allowed_tokens(vocab, no_ids if banned_token_ids is None else banned_token_ids.cpu())
    num_emitted.zero_()
    num_accepted.zero_()
    for b in range(batch):
        begin, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
        n, kind = end - begin, int(verify_mode[b])
        if n == 0 or done[b]:
            continue
        seed_token, *drafts = block_tokens[begin:end].tolist()
        places = [0] * n if positions is None else (positions[begin:end] + 1).tolist()
        eos = set() if eos_token_ids is None else set(eos_token_ids[b].tolist()) - {-1}
        force_place = -1 if force_positions is None else int(force_positions[b])
        force_token = -1 if force_tokens is None else int(force_tokens[b])
        heat = torch.zeros(1) if temperature is None else temperature[b : b + 1].cpu()
        key = torch.zeros(1, dtype=torch.int64) if seed is None else seed[b : b + 1].cpu()
        if (inverse_temperature(heat) == 0 and kind != COMMIT) or kind not in range(4):
            kind = GREEDY

        # 1. The leading drafts that are accepted, and the token that follows them.
        pending = force_place  # as if all accepted tokens were emitted
        for i in range(n):
            last, row, place = i == n - 1, begin + i, torch.tensor([places[i]])
            draw = (heat if kind != GREEDY else torch.zeros(1), key, place)
            if kind == COMMIT and not last:
                target, accept = drafts[i], True
            elif pending >= 0 and places[i] == pending:
                target = force_token
                accept = not last and drafts[i] == target
            elif kind == REJECTION and not last:
                q = None if draft_probs is None else draft_probs[row + 1].cpu()
                accept, target = _accept_or_redraw(logits[row].cpu(), drafts[i], q, *draw, allowed)
            else:
                target = int(draw_tokens(logits[row : row + 1].cpu(), *draw, SAMPLE, allowed))
                accept = not last and drafts[i] == target
            if not accept:
                break
            if drafts[i] == force_token and places[i] <= pending:
                pending = -1
        num_accepted[b] = i

        # 2. Emit them, up to the first EOS or the end of the budget.
        limit, length = min(int(max_out_lens[b]), capacity), int(out_lens[b])
        ended = kind == COMMIT and seed_token in eos
        emitted = 0
        for j, token in enumerate([*drafts[:i], target]):
            if ended or length + emitted >= limit:
                break
            out_tokens[b, length + emitted] = token
            next_tokens[b] = token
            emitted += 1
            ended = token in eos and not (kind == COMMIT and j == i)
            if token == force_token and places[j] <= force_place:
                force_place = -1
        if force_positions is not None:
            force_positions[b] = force_place
        if ended or length + emitted >= limit:
            done[b] = True
        out_lens[b] += emitted
        num_emitted[b] = emitted

        # 3. The cache keeps the seed and all emitted tokens but the last.
        seq_lens[b] -= n - emitted


def _accept_or_redraw(
    logits: Tensor,
    draft: int,
    draft_probs: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    place: Tensor,
    allowed: Tensor,
) -> tuple[bool, int]:
    """Return whether rejection sampling keeps the draft, and else the token from the residual."""
    vocab = logits.numel()
    scaled = clean_logits(logits) * inverse_temperature(temperature)
    scaled = scaled.clamp_max(torch.finfo(torch.float32).max).masked_fill(~allowed, -torch.inf)
    if scaled.amax() == -torch.inf:  # no distribution: the lowest allowed id, with certainty
        target = int(lowest_argmax(scaled, allowed))
        return draft == target, target
    p = torch.softmax(scaled.double(), dim=-1)
    q = torch.zeros(vocab, dtype=torch.float64)
    if draft_probs is not None:
        q = draft_probs.double().nan_to_num(0, posinf=torch.inf).clamp_min(0)
    elif 0 <= draft < vocab:
        q[draft] = 1
    u = uniform(philox_tokens(seed, place, ACCEPT, 1))
    if 0 <= draft < vocab and u * q[draft] < p[draft]:
        return True, draft
    noise = gumbel(philox_tokens(seed, place, RESIDUAL, vocab))[0]
    if draft_probs is None:  # max(p - q, 0) is p without the draft; in logits nothing underflows
        log_mass = torch.where(q > 0, -torch.inf, scaled)
    else:
        log_mass = (p - q).clamp_min(0).log()
    if log_mass.amax() == -torch.inf:
        log_mass = scaled
    return False, int(lowest_argmax(log_mass + noise, allowed))


def verify_scan(
    logits: Tensor,
    cu_seqlens: Tensor,
    verify_mode: Tensor,
    done: Tensor,
    *,
    first_token_id: int,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    num_parts: int = 0,
) -> Tensor:
    """Return `[rows, num_parts, 8]` int32: the best token of each row in a shard of the logits."""
    shard_len = logits.shape[1]
    allowed = _allowed_shard(first_token_id, shard_len, banned_token_ids)
    parts = _no_parts(logits.shape[0], shard_len, num_parts)
    for b in range(verify_mode.numel() if shard_len else 0):
        begin, end, kind = int(cu_seqlens[b]), int(cu_seqlens[b + 1]), int(verify_mode[b])
        assert kind != REJECTION, "not for shards"
        for row in range(max(end - 1, begin) if kind == COMMIT else begin, end):
            if done[b]:
                continue
            values = x = clean_logits(logits[row].cpu())
            if kind in (SAMPLED, COMMIT) and not (temperature is None or seed is None):
                place = torch.zeros(1) if positions is None else positions[row : row + 1].cpu() + 1
                values = draw_values(
                    x[None], temperature[b : b + 1].cpu(), seed[b : b + 1].cpu(), place, SAMPLE,
                    first_token_id,
                )[0]  # fmt: skip
            _put_best(parts[row, 0], values.masked_fill(~allowed, -torch.inf), x, first_token_id)
    return parts.to(logits.device)


def verify_parts_(
    parts: Tensor,
    block_tokens: Tensor,
    cu_seqlens: Tensor,
    verify_mode: Tensor,
    out_tokens: Tensor,
    out_lens: Tensor,
    max_out_lens: Tensor,
    next_tokens: Tensor,
    seq_lens: Tensor,
    done: Tensor,
    *,
    vocab: int,
    positions: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    force_positions: Tensor | None = None,
    force_tokens: Tensor | None = None,
    num_emitted: Tensor,
    num_accepted: Tensor,
) -> None:
    """Do what `verify_` does, from parts `[num_shards, rows, num_parts, 8]` instead of logits."""
    targets, _ = _best_part(parts)
    certain = torch.full((parts.shape[1], vocab), -torch.inf, device=parts.device)
    row = (targets >= 0).nonzero()[:, 0]
    certain[row, targets[row]] = 0.0  # every draw is then this token
    verify_(
        certain, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens,
        next_tokens, seq_lens, done, positions=positions, eos_token_ids=eos_token_ids,
        banned_token_ids=banned_token_ids, force_positions=force_positions,
        force_tokens=force_tokens, num_emitted=num_emitted, num_accepted=num_accepted,
    )  # fmt: skip
