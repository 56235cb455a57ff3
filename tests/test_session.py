"""A session: the cache kept between calls must say what reading everything anew says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nld_cuda
from decode_cases import poison_caches, prompt, tiny_model
from interrupted import Interrupted
from nld_cuda import Session

MODES: dict[str, dict[str, Any]] = {
    "ar": {},
    "linear_spec": {"block_length": 5},
    "quadratic_spec": {"block_length": 3},
    "diffusion": {"block_length": 6, "threshold": 0.4},
}
VOCAB = 23


def counted_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward from now on."""
    rows: list[int] = []
    hidden: Callable[..., Any] = model.hidden

    def count(tokens: torch.Tensor, *args: Any, **kw: Any) -> Any:
        rows.append(tokens.numel())
        return hidden(tokens, *args, **kw)

    monkeypatch.setattr(model, "hidden", count)
    return rows


@pytest.mark.parametrize("heat", [0.0, 0.8])
@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=2)), ids="-".join)
def test_turns_equal_fresh_calls(
    modes: tuple[str, str], heat: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any mode may follow any other on the same cache, which starts full of NaN."""
    model = tiny_model(VOCAB).model
    poison_caches(monkeypatch)
    session = Session(model, page_size=4)
    text = prompt(9, VOCAB)
    options = {"page_size": 4, "temperature": heat, "seed": 3, "eos_token_id": (2, 5)}
    for turn, mode in enumerate((*modes, modes[0])):
        options["max_new_tokens"] = 7 + 5 * turn
        fresh = nld_cuda.generate(model, text, mode, **options, **MODES[mode])
        cached = list(session.tokens)
        with monkeypatch.context() as patch:
            rows = counted_rows(model, patch)
            result = nld_cuda.generate(model, text, mode, session=session, **options, **MODES[mode])
        assert result.tokens == fresh.tokens
        assert result.finish_reason == fresh.finish_reason
        assert text[: len(cached)] == cached and session.num_reused == len(cached)
        masks = 3 if mode == "quadratic_spec" else 0
        assert rows[0] == len(text) - len(cached) + masks, "only what is new is read"
        text = text + result.tokens[0]
        assert len(text) - 1 >= len(session.tokens) >= len(text) - len(result.tokens[0])
        assert session.tokens == text[: len(session.tokens)]
        text += prompt(3 + turn, VOCAB, seed=turn)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_edit_of_the_text(data: st.DataObject) -> None:
    """Texts that grow, shrink, change in the middle, or stay; calls that stop early."""
    draw = data.draw
    model = tiny_model(VOCAB).model
    session = Session(model, page_size=draw(st.integers(1, 8)))
    text = prompt(draw(st.integers(1, 12)), VOCAB)
    for turn in range(4):
        mode = draw(st.sampled_from(list(MODES)))
        options = {
            "max_new_tokens": draw(st.integers(0, 14)), "page_size": session.page_size,
            "eos_token_id": (), **MODES[mode],
        }  # fmt: skip
        expected = nld_cuda.generate(model, text, mode, **options).tokens[0]
        events = nld_cuda.stream(model, text, mode, session=session, **options)
        stop_after = draw(st.one_of(st.none(), st.integers(0, 4)))
        said: list[int] = []
        for i, event in enumerate(events):
            said += event.final_tokens
            if i == stop_after:
                break
        events.close()
        assert said == (expected if stop_after is None else expected[: len(said)])
        assert session.tokens == (text + said)[: len(session.tokens)]
        cut = draw(st.integers(1, len(text + said)))
        text = (text + said)[:cut] + prompt(draw(st.integers(0, 6)), VOCAB, seed=turn)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "mode,op,at",
    [
        ("ar", "verify_", 3),
        ("linear_spec", "verify_", 2),
        ("linear_spec", "commit_", 1),
        ("quadratic_spec", "compact_", 1),
        ("quadratic_spec", "commit_", 2),
        ("diffusion", "commit_", 3),
        ("diffusion", "verify_", 2),
    ],
)
def test_calls_that_end_in_the_middle_of_a_step(mode: str, op: str, at: int, late: bool) -> None:
    """What half a step has left in the cache counts for nothing; what was emitted stays."""
    model = tiny_model(VOCAB).model
    session, text = Session(model, page_size=4), prompt(9, VOCAB)
    options = {"max_new_tokens": 20, "page_size": 4, "eos_token_id": (), **MODES[mode]}
    with pytest.raises(KeyboardInterrupt):
        for event in nld_cuda.stream(
            model, text, mode, session=session, ops=Interrupted(op, at, late), **options
        ):
            text += event.final_tokens
    full = nld_cuda.generate(model, text[:9], mode, **options).tokens[0]
    assert len(text) > 9 and text == (text[:9] + full)[: len(text)]
    assert len(session.tokens) >= len(text) - 1, "no finished step is read again"
    text = text[:9] + full
    expected = nld_cuda.generate(model, text, "ar", max_new_tokens=9, eos_token_id=())
    result = nld_cuda.generate(
        model, text, "ar", max_new_tokens=9, eos_token_id=(), session=session, page_size=4
    )
    assert result.tokens == expected.tokens and session.num_reused >= 9


def test_memory_grows_by_doubling() -> None:
    model = tiny_model(VOCAB).model
    session = Session(model, page_size=2)
    text, sizes = prompt(3, VOCAB), []
    for _ in range(12):
        options = {"max_new_tokens": 6, "page_size": 2, "eos_token_id": ()}
        expected = nld_cuda.generate(model, text, "ar", **options).tokens[0]
        assert (
            nld_cuda.generate(model, text, "ar", session=session, **options).tokens[0] == expected
        )
        text += expected
        assert session._cache is not None
        sizes.append(session._cache.num_pages)
    steps = sorted(set(sizes))
    assert all(b >= 2 * a for a, b in itertools.pairwise(steps)) and 2 < len(steps) < 6
    assert sizes[-1] * 2 < 3 * len(text)


def test_errors() -> None:
    model, other = tiny_model(VOCAB).model, tiny_model(VOCAB, seed=1).model
    session = Session(model)
    with pytest.raises(ValueError, match="session must have one prompt a call, got 2"):
        nld_cuda.generate(model, [[1], [2]], session=session)
    with pytest.raises(ValueError, match="session must be one of this model, got another"):
        nld_cuda.generate(other, [1], session=session)
    with pytest.raises(ValueError, match="page_size must be the session's, 16, got 8"):
        nld_cuda.stream(model, [1], session=session, page_size=8)
    nld_cuda.generate(model, [1, 4, 7], max_new_tokens=3, session=session)
    assert len(session.tokens) >= 3
    session.forget(2)
    assert session.tokens == [1, 4]
