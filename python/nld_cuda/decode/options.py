"""From the arguments of `generate` to checked requests and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nld_cuda.decode.images import Images, images_per_prompt, place_images
from nld_cuda.decode.state import Request
from nld_cuda.decode.text import Tokenizer
from nld_cuda.ops import CommitRule

if TYPE_CHECKING:
    from nld_cuda.model.transformer import NLDModel

Prompt = str | Sequence[int] | Tensor

RULES = {rule.name.lower(): rule for rule in CommitRule}
SPEC_SAMPLING = ("sampled", "rejection")
DIFFUSION, AR = "diffusion", "ar"
SPECULATIVE = ("linear_spec", "quadratic_spec")


@dataclass(frozen=True)
class Settings:
    """What holds for all requests of a call. block_len is 1 in ar mode."""

    mode: str
    block_len: int
    mask_token_id: int
    use_lora: bool
    rejection: bool
    rule: CommitRule
    quota: int
    revise_threshold: float
    page_size: int


def make_settings(
    model: NLDModel,
    mode: str,
    *,
    block_length: int | None,
    threshold: Any,
    rule: str | None,
    quota: int | None,
    revise_threshold: float | None,
    lora: bool | str | None,
    spec_sampling: str | None,
    mask_token_id: int | None,
    page_size: int,
) -> Settings:
    """Check the arguments that one call shares; an argument the mode has no use for is an error."""

    def refuse(name: str, value: Any, modes: str) -> None:
        if value is not None:
            raise ValueError(
                f"generate: {name} must be left out in mode {mode}, got {value!r}: {modes}"
            )

    if block_length is not None:
        _check_int("block_length", block_length, 1)
    if mode == AR:
        refuse("block_length", block_length, "ar makes one token per forward")
    if mode != DIFFUSION:
        for name, value in (
            ("rule", rule),
            ("quota", quota),
            ("revise_threshold", revise_threshold),
        ):
            refuse(name, value, "only diffusion commits by a rule")
    if mode not in (DIFFUSION, "linear_spec"):
        refuse("threshold", threshold, "only diffusion and linear_spec fill a block by confidence")
    if mode not in SPECULATIVE:
        refuse("spec_sampling", spec_sampling, "only the speculative modes verify drafts")
    if spec_sampling not in (None, *SPEC_SAMPLING):
        raise ValueError(
            f"generate: spec_sampling must be one of {', '.join(SPEC_SAMPLING)}, "
            f"got {spec_sampling!r}"
        )
    rejection = spec_sampling == "rejection"
    if rejection and any(t > 0 for t in _listed(threshold)):
        raise ValueError(
            "generate: threshold must be 0 with spec_sampling='rejection', whose drafts must "
            f"be plain draws of one pass, got {threshold!r}"
        )
    chosen = (
        _rule(rule, threshold, quota, revise_threshold) if mode == DIFFUSION else CommitRule.ALL
    )
    mask = model.config.mask_token_id if mask_token_id is None else mask_token_id
    if mask is None and mode != AR:
        raise ValueError(
            f"generate: mask_token_id must be given in mode {mode}, this model's config.json names "
            "none: it is made for mode ar"
        )
    if mask is not None:
        _check_int("mask_token_id", mask, 0, model.config.vocab_size - 1)
    _check_int("page_size", page_size, 1)
    return Settings(
        mode=mode,
        block_len=1 if mode == AR else block_length or model.config.block_size,
        mask_token_id=0 if mask is None else mask,  # ar has no masks
        use_lora=_use_lora(model, mode, lora),
        rejection=rejection,
        rule=chosen,
        quota=1 if quota is None else quota,
        revise_threshold=0.0 if revise_threshold is None else revise_threshold,
        page_size=page_size,
    )


def _rule(
    name: str | None, threshold: Any, quota: int | None, revise_threshold: float | None
) -> CommitRule:
    if name is None:
        name = "quota" if threshold is None else "threshold"
    if name not in RULES:
        raise ValueError(f"generate: rule must be one of {', '.join(RULES)}, got {name!r}")
    rule = RULES[name]
    given = {"threshold": threshold, "quota": quota, "revise_threshold": revise_threshold}
    needed = {
        CommitRule.THRESHOLD: {"threshold"},
        CommitRule.ENTROPY: {"threshold"},
        CommitRule.REVISE: {"threshold", "revise_threshold"},
    }.get(rule, set())
    used = needed | ({"quota"} if rule == CommitRule.QUOTA else set())
    for key, value in given.items():
        if key in needed and value is None:
            raise ValueError(f"generate: {key} must be given with rule {name}, got None")
        if key not in used and value is not None:
            raise ValueError(f"generate: {key} must be left out with rule {name}, got {value!r}")
    if quota is not None:
        _check_int("quota", quota, 1)
    if revise_threshold is not None:
        _check_number("revise_threshold", revise_threshold)
    return rule


def _use_lora(model: NLDModel, mode: str, lora: bool | str | None) -> bool:
    if lora not in ("auto", True, False, None):
        raise ValueError(f"generate: lora must be 'auto', True, False or None, got {lora!r}")
    if lora is True:
        if mode != "linear_spec":
            raise ValueError(
                f"generate: lora must not be True in mode {mode}: it drafts for linear_spec"
            )
        if not model.has_lora:
            raise ValueError("generate: lora must not be True, this model has no adapter, got True")
    return mode == "linear_spec" and bool(lora) and model.has_lora


def make_requests(
    model: NLDModel,
    prompts: Prompt | Sequence[Prompt],
    tokenizer: Tokenizer | None,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float],
    threshold: float | Sequence[float] | None,
    seed: int | Sequence[int] | None,
    eos_token_id: Any,
    max_thinking_tokens: int | Sequence[int | None] | None,
    end_think_token_id: int | None,
    images: Images | None = None,
) -> list[Request]:
    """One checked request per prompt; single values go to every request."""
    config = model.config
    ids = [_prompt_ids(p, tokenizer) for p in _prompt_list(prompts)]
    num = len(ids)
    shown = images_per_prompt(images, num)
    limits = _per_request("max_new_tokens", max_new_tokens, num)
    temperatures = _per_request("temperature", temperature, num)
    thresholds = _per_request("threshold", 0.0 if threshold is None else threshold, num)
    budgets = _per_request("max_thinking_tokens", max_thinking_tokens, num)
    requests = []
    for b, prompt in enumerate(ids):
        which = f" (prompt {b})" if num > 1 else ""
        prompt, placed = place_images(model, prompt, shown[b], which)
        if not prompt:
            raise ValueError(f"generate: prompt must hold at least one token, got none{which}")
        bad = [t for t in prompt if not 0 <= t < config.vocab_size]
        if bad:
            raise ValueError(
                f"generate: prompt must hold ids in [0, {config.vocab_size}), got {bad[0]}{which}"
            )
        _check_int("max_new_tokens", limits[b], 0)
        _check_number("temperature", temperatures[b])
        _check_number("threshold", thresholds[b])
        if len(prompt) + limits[b] > config.max_position_embeddings:
            raise ValueError(
                f"generate: prompt and new tokens must fit in {config.max_position_embeddings} "
                f"places, got {len(prompt)} + {limits[b]}{which}"
            )
        if budgets[b] is not None:
            _check_int("max_thinking_tokens", budgets[b], 0)
            if end_think_token_id is None:
                raise ValueError(
                    "generate: end_think_token_id must be given with max_thinking_tokens, got None"
                )
            _check_int("end_think_token_id", end_think_token_id, 0, config.vocab_size - 1)
        requests.append(
            Request(
                prompt=prompt,
                max_new_tokens=limits[b],
                temperature=float(temperatures[b]),
                seed=0,
                threshold=float(thresholds[b]),
                max_thinking_tokens=budgets[b],
                end_think_token_id=end_think_token_id,
                images=placed,
            )
        )
    seeds = _seeds(seed, requests)
    eos = _eos_lists(eos_token_id, config.eos_token_ids, num)
    return [
        Request(**{**vars(r), "seed": s, "eos_token_ids": e})
        for r, s, e in zip(requests, seeds, eos, strict=True)
    ]


def prompt_ids(model: NLDModel, prompts: Any) -> list[list[int]]:
    """Token ids of prompts as `generate` takes them."""
    tokenizer = getattr(model, "tokenizer", None)
    return [_prompt_ids(prompt, tokenizer) for prompt in _prompt_list(prompts)]


def _prompt_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2):
            raise ValueError(
                f"generate: prompts must have 1 or 2 dimensions, got shape {list(prompts.shape)}"
            )
        return list(prompts) if prompts.dim() == 2 else [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            "generate: prompts must be text, token ids, or a list of either, "
            f"got {type(prompts).__name__}"
        )
    if prompts and all(isinstance(p, int) for p in prompts):
        return [prompts]
    return list(prompts)


def _prompt_ids(prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                "generate: prompts must be token ids, this model has no tokenizer, got text"
            )
        return tokenizer.encode(prompt)
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.is_floating_point() or prompt.dtype == torch.bool:
            raise TypeError(
                "generate: a prompt tensor must be integer with one dimension, "
                f"got {prompt.dtype} {list(prompt.shape)}"
            )
        return [int(t) for t in prompt.tolist()]
    if not isinstance(prompt, Sequence) or not all(
        isinstance(t, int) and not isinstance(t, bool) for t in prompt
    ):
        raise TypeError(
            f"generate: a prompt must be text, a list of ints or a tensor, "
            f"got {type(prompt).__name__}"
        )
    return list(prompt)


def _per_request(name: str, value: Any, num: int) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * num
    if len(value) != num:
        raise ValueError(
            f"generate: {name} must have one entry per prompt ({num}), got {len(value)}"
        )
    return list(value)


def _seeds(seed: int | Sequence[int] | None, requests: list[Request]) -> list[int]:
    if seed is None:
        if not any(r.temperature > 0 for r in requests):
            return [0] * len(requests)
        # From torch's generator, so that torch.manual_seed makes a program repeatable.
        return [int(s) for s in torch.randint(2**62, (len(requests),))]
    if isinstance(seed, int):
        return [seed + b for b in range(len(requests))]  # equal prompts shall not give equal draws
    seeds = _per_request("seed", seed, len(requests))
    for value in seeds:
        if not isinstance(value, int):
            raise TypeError(f"generate: seed must hold integers, got {value!r}")
    return seeds


def _eos_lists(value: Any, default: tuple[int, ...], num: int) -> list[tuple[int, ...]]:
    """None: the model's own; an id; a list of ids; a list of such lists, one per request."""
    if value is None:
        return [default] * num
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, int):
        value = [value]
    if isinstance(value, Sequence) and all(isinstance(e, int) for e in value):
        lists = [value] * num
    else:
        lists = _per_request("eos_token_id", value, num)
    for ids in lists:
        if not isinstance(ids, Sequence) or not all(isinstance(t, int) and t >= 0 for t in ids):
            raise ValueError(f"generate: eos_token_id must hold ids >= 0, got {ids!r}")
    return [tuple(dict.fromkeys(ids)) for ids in lists]


def _listed(value: Any) -> list[float]:
    if value is None:
        return []
    return [float(v) for v in (value if isinstance(value, (Sequence, Tensor)) else [value])]


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"generate: {name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        rule = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"generate: {name} must be {rule}, got {value}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"generate: {name} must be a number, got {value!r}")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"generate: {name} must be finite and >= 0, got {value}")
