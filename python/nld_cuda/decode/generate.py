"""`generate`: prompts in, tokens and text out, in any decode mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nld_cuda import ops as default_ops
from nld_cuda.decode.images import Images
from nld_cuda.decode.options import Prompt, Settings, make_requests, make_settings
from nld_cuda.decode.run import MODES, Run
from nld_cuda.decode.state import Request
from nld_cuda.decode.stats import DecodeStats
from nld_cuda.decode.text import Tokenizer
from nld_cuda.parallel.group import gather_objects, require_equal, together
from nld_cuda.parallel.shard import Shard

if TYPE_CHECKING:
    from nld_cuda.decode.session import Session
    from nld_cuda.model.transformer import NLDModel

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class GenerateResult:
    """What `generate` made, one entry per prompt in each list.

    Attributes:
        tokens: new tokens, the EOS that ended a request included.
        text: their text without special tokens; None where the model has no tokenizer.
        finish_reason: "eos", or "length" (max_new_tokens reached).
        stats: counts and times of the whole batch.
    """

    tokens: list[list[int]]
    text: list[str] | None
    finish_reason: list[FinishReason]
    stats: DecodeStats


def generate(
    model: NLDModel,
    prompts: Prompt | Sequence[Prompt],
    mode: str = "linear_spec",
    *,
    images: Images | None = None,
    max_new_tokens: int | Sequence[int] = 256,
    block_length: int | None = None,
    threshold: float | Sequence[float] | None = None,
    temperature: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
    max_thinking_tokens: int | Sequence[int | None] | None = None,
    end_think_token_id: int | None = None,
    lora: bool | str | None = "auto",
    spec_sampling: str | None = None,
    rule: str | None = None,
    quota: int | None = None,
    revise_threshold: float | None = None,
    mask_token_id: int | None = None,
    page_size: int = 16,
    session: Session | None = None,
    ops: Any = default_ops,
) -> GenerateResult:
    """Continue a batch of prompts.

    The result of a request does not depend on the other requests of its batch (up to the rounding
    of torch's matrix products, which may depend on the number of rows).

    Args:
        model: from `load`.
        prompts: a text, a list of texts, token ids (a list or a 1-D integer tensor), or a list or
            2-D tensor of those. Lengths may differ. Mask tokens in a prompt are ordinary tokens.
        mode: "ar", "diffusion", "linear_spec" or "quadratic_spec".
        images: for a model with a vision tower: the pictures of each prompt, a list of lists (of
            a single prompt also a picture or a list): files, PIL pictures, or prepared pixels
            `[3, height, width]`, floating-point. A prompt has one placeholder per picture (`[IMG]`
            or `<|image_start|>`, as the tokenizer has them), which is laid out as image tokens, or
            those image tokens already. None: image tokens are ordinary tokens.
        max_new_tokens: most tokens to produce, never exceeded; one for all or one per prompt.
        block_length: tokens of a diffusion block, or rows of a draft (its first row is a token that
            is known already), >= 1; default: the model's own. Not in ar.
        threshold: diffusion: confidence from which tokens are committed (the best one always is),
            the entropy bound in nats under rule "entropy"; linear_spec: drafts below it wait for
            another draft pass, 0 (default): one pass. One for all or one per prompt.
        temperature: 0 is greedy. One for all or one per prompt.
        seed: of all random draws. One number: request b uses seed + b; a list: one per prompt;
            None: drawn from torch's generator. `result.stats.seeds` tells.
        eos_token_id: id or list of ids that end a request, or one list per prompt; () for none;
            default: the model's own.
        max_thinking_tokens, end_think_token_id: after so many new tokens the id is forced, unless
            the request has produced it before.
        lora: linear_spec: draft with the adapter: "auto" where the model has one, True, False.
        spec_sampling: speculative modes at temperature > 0. "sampled" (default): every token is the
            one ar would draw with the same seed. "rejection": accept drafts by the ratio of the
            distributions; follows the ar distribution, with other draws and more drafts accepted
            than independent draws would have.
        rule: diffusion: "threshold" (default where one is given), "quota" (default else; `quota`
            tokens per pass, 1), "all", "entropy", "revise" (as threshold, and committed tokens
            whose confidence falls below `revise_threshold` are masked again).
        quota, revise_threshold: of these rules.
        mask_token_id: default: the model's own.
        page_size: tokens per cache page.
        session: keeps the cache for the next call (one prompt): what a prompt shares with the text
            so far is not read again.
        ops: where the ops are taken from; `nld_cuda.reference` runs their plain meaning.

    Raises:
        ValueError: a value breaks a rule (the message names it), the prompt is empty, prompt and
            new tokens exceed the model's positions, text without a tokenizer, an unknown mode or
            rule, an argument that the mode has no use for.
        TypeError: an argument of the wrong type.
        FileNotFoundError: an image is missing.
        ImportError: images need a package that is missing; the message names the extra.
    """
    run, tokenizer = prepare_run(
        model, prompts, mode, ops,
        dict(
            max_new_tokens=max_new_tokens, temperature=temperature, threshold=threshold, seed=seed,
            eos_token_id=eos_token_id, max_thinking_tokens=max_thinking_tokens,
            end_think_token_id=end_think_token_id, images=images,
        ),
        dict(
            block_length=block_length, threshold=threshold, rule=rule, quota=quota,
            revise_threshold=revise_threshold, lora=lora, spec_sampling=spec_sampling,
            mask_token_id=mask_token_id, page_size=page_size,
        ),
        session,
    )  # fmt: skip
    try:
        run.start()
        while not run.finished:
            run.advance()
    finally:
        if session is not None:
            session.end(run)
    return result_of(run, tokenizer)


def prepare_run(
    model: NLDModel,
    prompts: Any,
    mode: str,
    ops: Any,
    request_options: dict[str, Any],
    settings_options: dict[str, Any],
    session: Session | None,
) -> tuple[Run, Tokenizer | None]:
    tokenizer: Tokenizer | None = getattr(model, "tokenizer", None)

    def checked() -> tuple[Settings, list[Request]]:
        if mode not in MODES:
            raise ValueError(f"generate: mode must be one of {', '.join(MODES)}, got {mode!r}")
        return (
            make_settings(model, mode, **settings_options),
            make_requests(model, prompts, tokenizer, **request_options),
        )

    if model.shard is None:
        settings, requests = checked()
    else:
        cached = None if session is None else session.tokens
        drawn_seeds = request_options["seed"] is None
        settings, requests = _agreed(model.shard, checked, cached, drawn_seeds)
    return Run(model, requests, settings, ops=ops, session=session), tokenizer


def _agreed(
    shard: Shard,
    checked: Callable[[], tuple[Settings, list[Request]]],
    cached: list[int] | None,
    drawn_seeds: bool,
) -> tuple[Settings, list[Request]]:
    """Settings and requests, which must be the same on all ranks; seeds that are drawn: rank 0's.

    A rank that went on alone would wait for the others forever.
    """
    settings, requests = together(shard.group, "generate", checked)
    seeds = [r.seed for r in requests]
    shown = [[(image.digest, *image.places) for image in r.images] for r in requests]
    plain = [replace(r, images=(), seed=0) for r in requests]
    call = (settings, plain, shown, cached, None if drawn_seeds else seeds)
    calls = gather_objects(shard.group, (call, seeds))
    require_equal([other for other, _ in calls], "generate: prompts and options")
    pairs = zip(requests, calls[0][1], strict=True)
    return settings, [replace(r, seed=seed) for r, seed in pairs]


def result_of(run: Run, tokenizer: Tokenizer | None) -> GenerateResult:
    tokens = run.tokens()
    return GenerateResult(
        tokens=tokens,
        text=None if tokenizer is None else [tokenizer.decode(t) for t in tokens],
        finish_reason=[
            _finish_reason(r, t) for r, t in zip(run.state.requests, tokens, strict=True)
        ],
        stats=run.stats(),
    )


def _finish_reason(request: Request, tokens: list[int]) -> FinishReason:
    return "eos" if tokens and tokens[-1] in request.eos_token_ids else "length"
