"""`stream`: what every forward changes, final text told apart from guesses."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from nld_cuda import ops as default_ops
from nld_cuda.decode.autoregressive import Autoregressive
from nld_cuda.decode.diffusion import Diffusion
from nld_cuda.decode.generate import GenerateResult, prepare_run, result_of
from nld_cuda.decode.linear_spec import LinearSpec
from nld_cuda.decode.options import Prompt
from nld_cuda.decode.quadratic_spec import QuadraticSpec
from nld_cuda.decode.run import Run
from nld_cuda.decode.state import Pass
from nld_cuda.decode.text import IncrementalDecoder, Tokenizer

if TYPE_CHECKING:
    from nld_cuda.decode.session import Session
    from nld_cuda.model.images import ImageInput
    from nld_cuda.model.transformer import NLDModel


@dataclass(frozen=True)
class BlockToken:
    """One place of a block in flight.

    Attributes:
        position: absolute place in the sequence.
        token, text: what is there now; text is "" while masked and without a tokenizer.
        is_masked: whether the token is still hidden.
        confidence: probability that the model gave it when it was last judged, None if never.
        status: "seed" (emitted already), "masked", "committed" (diffusion), "draft", and after a
            verify pass "accepted" or "rejected" (accepted ones past an EOS or the length limit
            too).
    """

    position: int
    token: int
    text: str
    is_masked: bool
    confidence: float | None
    status: Literal["seed", "masked", "committed", "draft", "accepted", "rejected"]


@dataclass(frozen=True)
class StreamEvent:
    """What one forward changed.

    Attributes:
        kind: "prefill", "draft", "denoise", "verify", "refresh" (the causal pass over a finished
            diffusion block), and "end", the last one.
        final: text that has become final with this event; it never changes again. Characters
            whose bytes are not all there yet come with a later event.
        final_tokens: the tokens of it, EOS included.
        provisional: the block in flight, left to right: guesses that later events may replace.
        num_forwards: forwards so far, the prefill included.
        result: at "end": everything, as `generate` returns it.
    """

    kind: Literal["prefill", "draft", "denoise", "verify", "refresh", "end"]
    final: str
    final_tokens: list[int]
    provisional: list[BlockToken]
    num_forwards: int
    result: GenerateResult | None = field(default=None, repr=False)


def stream(
    model: NLDModel,
    prompt: Prompt,
    mode: str = "linear_spec",
    *,
    images: ImageInput | Sequence[ImageInput] | None = None,
    max_new_tokens: int = 256,
    block_length: int | None = None,
    threshold: float | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    max_thinking_tokens: int | None = None,
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
) -> Generator[StreamEvent, None, GenerateResult]:
    """Continue one prompt and yield an event per forward, with the tokens of `generate`.

    The last event has kind "end" and the result, which is also the generator's return value.
    Arguments and errors: as `generate`; errors come with this call, not with the first event.
    """
    run, tokenizer = prepare_run(
        model, prompt, mode, ops,
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
    if run.state.batch != 1:
        raise ValueError(f"stream: prompt must be a single one, got {run.state.batch}")
    return _events(run, tokenizer) if session is None else _in_session(session, run, tokenizer)


def _in_session(
    session: Session, run: Run, tokenizer: Tokenizer | None
) -> Generator[StreamEvent, None, GenerateResult]:
    """The events; what was said stays in the session however the reader stops."""
    try:
        return (yield from _events(run, tokenizer))
    finally:
        session.end(run)


def _events(run: Run, tokenizer: Tokenizer | None) -> Generator[StreamEvent, None, GenerateResult]:
    state, mode = run.state, run.mode
    decoder = None if tokenizer is None else IncrementalDecoder(tokenizer)
    num_final = 0

    def event(kind: Any, block: list[BlockToken]) -> StreamEvent:
        nonlocal num_final
        new = state.out_tokens[0, num_final : int(state.out_lens[0])].tolist()
        num_final += len(new)
        return StreamEvent(
            kind=kind,
            final="" if decoder is None else decoder.push(new),
            final_tokens=new,
            provisional=block,
            num_forwards=state.batch_forwards.total,
        )

    run.start()
    # linear_spec lays out its block with the first draft pass
    no_block = isinstance(mode, LinearSpec) or run.finished
    yield event("prefill", [] if no_block else _block(run, tokenizer))
    while not run.finished:
        refreshing = isinstance(mode, Diffusion) and bool(mode.refreshing[0])
        judged = _block(run, tokenizer) if isinstance(mode, QuadraticSpec) else []
        kind = run.advance()
        if isinstance(mode, Diffusion):
            block = [] if run.finished else _block(run, tokenizer)
            yield event("refresh" if refreshing else "denoise", block)
        elif isinstance(mode, Autoregressive):
            yield event("verify", [])
        elif kind == Pass.DRAFT:
            yield event("draft", _block(run, tokenizer))
        else:
            judged = judged or _block(run, tokenizer)
            yield event("verify", _with_verdict(judged, int(state.num_accepted[0])))
            if isinstance(mode, QuadraticSpec) and not run.finished:
                yield event("draft", _block(run, tokenizer))
    result = result_of(run, tokenizer)
    yield StreamEvent(
        kind="end",
        final="" if decoder is None else decoder.finish(),
        final_tokens=[],
        provisional=[],
        num_forwards=state.batch_forwards.total,
        result=result,
    )
    return result


def _block(run: Run, tokenizer: Tokenizer | None) -> list[BlockToken]:
    """The block of the one request as it is now; empty in ar mode."""
    mode = run.mode
    if isinstance(mode, Autoregressive):
        return []
    block = mode.block
    revealed = "committed" if isinstance(mode, Diffusion) else "draft"
    columns = (block.rows.positions, block.rows.tokens, block.is_masked, block.confidence)
    places = []
    for i, (position, token, masked, confidence) in enumerate(
        zip(*(c[0].tolist() for c in columns), strict=True)
    ):
        status: Any = "seed" if i == 0 else "masked" if masked else revealed
        places.append(
            BlockToken(
                position=position,
                token=token,
                text="" if masked or tokenizer is None else tokenizer.decode([token]),
                is_masked=masked,
                confidence=confidence if i > 0 and confidence > 0 else None,
                status=status,
            )
        )
    return places


def _with_verdict(block: list[BlockToken], num_accepted: int) -> list[BlockToken]:
    return [
        replace(t, status="accepted" if i <= num_accepted else "rejected") if i else t
        for i, t in enumerate(block)
    ]
