"""Every decode mode against the dense oracle: token for token, forward for forward."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import nld_cuda
import oracle
from decode_cases import END_THINK, EOS, TinyModel, options, prompt, tiny_model
from nld_cuda import ops, reference
from nld_cuda.model import transformer

LENGTHS = [1, 5, 3, 12]  # ragged prompts


def plain_attention(*args: Any, out: Tensor, lse: Tensor, **kw: Any) -> None:
    """`reference.block_attention` with the signature of the op's out variant."""
    out_plain, lse_plain = reference.block_attention(*args, **kw)
    out.copy_(out_plain)
    lse.copy_(lse_plain)


PLAIN = SimpleNamespace(**{**vars(reference), "block_attention": plain_attention})
OPS = {"cpu": ops, "reference": PLAIN}


@pytest.fixture
def op_source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """Where decode and model take their ops from: the library, or the plain meaning of each."""
    monkeypatch.setattr(transformer, "ops", OPS[request.param])
    return OPS[request.param]


@cache
def expected(
    tiny: TinyModel,
    mode: str,
    tokens: tuple[int, ...],
    opt: oracle.Options,
    arguments: tuple[Any, ...],
) -> tuple[list[int], int]:
    """The oracle's answer, computed once for all op sources."""
    arguments, lora = arguments[:-1], arguments[-1]
    return getattr(oracle, mode)(tiny.logits(lora), list(tokens), opt, *arguments)


def check(
    tiny: TinyModel,
    mode: str,
    op_source: object,
    max_new: list[int],
    *,
    eos: tuple[int, ...] = (),
    budget: int | None = None,
    lora: bool = False,
    **arguments: Any,
) -> None:
    """Decode a ragged batch and compare every request with the oracle's batch of one."""
    vocab = tiny.fields["vocab_size"]
    prompts = [prompt(n, vocab) for n in LENGTHS]
    result = nld_cuda.generate(
        tiny.model, prompts, mode, max_new_tokens=max_new, eos_token_id=eos, lora=lora,
        max_thinking_tokens=budget, end_think_token_id=END_THINK, page_size=4, ops=op_source,
        **arguments,
    )  # fmt: skip
    for b, (tokens, limit) in enumerate(zip(prompts, max_new, strict=True)):
        opt = options(limit, eos, budget)
        want, nfe = expected(tiny, mode, tuple(tokens), opt, (*arguments.values(), lora))
        assert result.tokens[b] == want, f"prompt {b}"
        assert result.stats.requests[b].nfe == nfe, f"forwards of prompt {b}"
        ended = bool(want) and want[-1] in eos
        assert result.finish_reason[b] == ("eos" if ended else "length")


MAX_NEW = [17, 1, 0, 14]
cases = pytest.mark.parametrize(
    "op_source,budget",
    [("cpu", None), ("cpu", 0), ("cpu", 4), ("cpu", 9), ("reference", None), ("reference", 4)],
    indirect=["op_source"],
)
vocabs = pytest.mark.parametrize("vocab", [61, 7])


@cases
@vocabs
def test_ar(vocab: int, budget: int | None, op_source: object) -> None:
    for eos in ((), (EOS,), (EOS, 5)):
        check(tiny_model(vocab), "ar", op_source, MAX_NEW, eos=eos, budget=budget)


@cases
@pytest.mark.parametrize("block_length", [1, 2, 5, 8])
@vocabs
def test_linear_spec(vocab: int, block_length: int, budget: int | None, op_source: object) -> None:
    for lora, threshold in ((False, 0.0), (True, 0.0), (True, 0.4)):
        check(
            tiny_model(vocab), "linear_spec", op_source, MAX_NEW, eos=(EOS,), budget=budget,
            lora=lora, block_length=block_length, threshold=threshold,
        )  # fmt: skip


@cases
@pytest.mark.parametrize("block_length", [1, 2, 5, 8])
@vocabs
def test_diffusion(vocab: int, block_length: int, budget: int | None, op_source: object) -> None:
    for threshold, eos in ((None, ()), (0.3, (EOS,)), (0.6, (EOS,))):
        check(
            tiny_model(vocab), "diffusion", op_source, MAX_NEW, eos=eos, budget=budget,
            block_length=block_length, threshold=threshold,
        )  # fmt: skip


@cases
@pytest.mark.parametrize("block_length", [1, 2, 3, 5])
@vocabs
def test_quadratic_spec(
    vocab: int, block_length: int, budget: int | None, op_source: object
) -> None:
    check(
        tiny_model(vocab), "quadratic_spec", op_source, MAX_NEW, eos=(EOS,), budget=budget,
        block_length=block_length,
    )  # fmt: skip


@pytest.mark.parametrize("op_source", ["cpu"], indirect=True)
@pytest.mark.parametrize("mode", ["ar", "linear_spec", "diffusion", "quadratic_spec"])
@vocabs
def test_eos_first_and_early(vocab: int, mode: str, op_source: object) -> None:
    """Each token that a free run begins with as the EOS: the forwards still agree."""
    tiny = tiny_model(vocab)
    free = nld_cuda.generate(tiny.model, prompt(1, vocab), "ar", max_new_tokens=6, eos_token_id=())
    arguments: dict[str, Any] = {} if mode == "ar" else {"block_length": 3}
    for eos in set(free.tokens[0]):
        check(tiny, mode, op_source, MAX_NEW, eos=(eos,), **arguments)


@pytest.mark.parametrize("op_source", ["cpu"], indirect=True)
def test_diffusion_budget_is_released(op_source: object) -> None:
    """Prompts whose block ends thinking by itself, left of the token written ahead."""
    tiny = tiny_model(7)
    released = 0
    for seed in range(40):
        tokens, opt = prompt(2, 7, seed), options(8, (), 6)
        want, nfe = expected(tiny, "diffusion", tuple(tokens), opt, (8, 0.5, False))
        result = nld_cuda.generate(
            tiny.model, tokens, "diffusion", max_new_tokens=8, block_length=8, threshold=0.5,
            eos_token_id=(), max_thinking_tokens=6, end_think_token_id=END_THINK, ops=op_source,
        )  # fmt: skip
        assert result.tokens[0] == want
        assert result.stats.nfe == nfe
        released += want[0] != END_THINK and END_THINK in want[:6] and want[6] != END_THINK
    assert released > 2
