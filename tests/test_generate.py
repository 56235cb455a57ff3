"""generate, stream, load and the published methods: batching, limits, sampling, text, errors."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode

import nld_cuda
import tiny_tasks
from decode_cases import END_THINK, EOS, MASK, TinyModel, poison_caches, prompt, tiny_model
from nld_cuda import NLDModel, StreamEvent
from nld_cuda.decode.options import make_requests, make_settings
from nld_cuda.decode.run import MODES, Run
from tiny_model import config_fields, random_weights, write_checkpoint

SPECULATIVE = ["linear_spec", "quadratic_spec"]
# Every mode with the options that its other tests leave at their defaults.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ar", {}),
    ("linear_spec", {"block_length": 4}),
    ("linear_spec", {"block_length": 6, "threshold": 0.3}),
    ("linear_spec", {"block_length": 5, "spec_sampling": "rejection"}),
    ("quadratic_spec", {"block_length": 3}),
    ("quadratic_spec", {"block_length": 3, "spec_sampling": "rejection"}),
    ("diffusion", {"block_length": 5}),
    ("diffusion", {"block_length": 5, "quota": 3}),
    ("diffusion", {"block_length": 6, "threshold": 0.4}),
    ("diffusion", {"block_length": 4, "rule": "all"}),
    ("diffusion", {"block_length": 6, "rule": "entropy", "threshold": 1.5}),
    ("diffusion", {"block_length": 6, "rule": "revise", "threshold": 0.3, "revise_threshold": 0.2}),
]
variants = pytest.mark.parametrize("mode,extra", VARIANTS, ids=lambda v: str(v))


@pytest.fixture(params=[61, 7], ids="vocab{}".format)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


def run(tiny: TinyModel, prompts: Any, mode: str, **options: Any) -> nld_cuda.GenerateResult:
    return nld_cuda.generate(tiny.model, prompts, mode, **options)


# ---- batches ---------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_batch_equals_batches_of_one(
    tiny: TinyModel, mode: str, extra: dict[str, Any], heat: float
) -> None:
    """Every per-request parameter differs, and so does the place in the batch."""
    vocab = tiny.fields["vocab_size"]
    prompts = [prompt(n, vocab, seed=1) for n in (3, 1, 11, 6, 4)]
    num = len(prompts)
    lists: dict[str, list[Any]] = {
        "max_new_tokens": [12, 25, 1, 7, 18],
        "temperature": [heat, heat, 0.0, 2 * heat, heat],
        "seed": [5, 5, 1, 2**63 + 7, 9],
        "eos_token_id": [[EOS], [], [EOS, 5], [1], [EOS]],
        "max_thinking_tokens": [None, 6, 3, None, 0],
    }
    if extra.get("threshold"):
        lists["threshold"] = [extra["threshold"] * f for f in (1, 2, 0.5, 1, 0.2)]
    extra = {k: v for k, v in extra.items() if k not in lists}
    options = dict(end_think_token_id=END_THINK, page_size=3, **extra)
    together = run(tiny, prompts, mode, **lists, **options)
    backwards = run(tiny, prompts[::-1], mode, **{k: v[::-1] for k, v in lists.items()}, **options)
    assert together.tokens == backwards.tokens[::-1]
    for b in range(num):
        alone = run(
            tiny, [prompts[b]], mode, **{k: v[b : b + 1] for k, v in lists.items()}, **options
        )
        assert alone.tokens[0] == together.tokens[b], f"prompt {b}"
        assert alone.finish_reason[0] == together.finish_reason[b]
        assert alone.stats.requests[0] == together.stats.requests[b], f"forwards of prompt {b}"


@variants
def test_cache_garbage_does_not_matter(
    mode: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries past a request's length may hold anything, rejected drafts among it."""
    tiny = tiny_model(7)
    options = dict(max_new_tokens=14, eos_token_id=(), temperature=0.7, seed=3, **extra)
    prompts = [prompt(n, 7) for n in (5, 2)]
    clean = run(tiny, prompts, mode, **options)
    poison_caches(monkeypatch)
    assert run(tiny, prompts, mode, **options).tokens == clean.tokens


def start(tiny: TinyModel, prompts: list[list[int]], mode: str, max_new: Any, **extra: Any) -> Run:
    """A run whose steps a test takes itself."""
    given = dict.fromkeys(
        ("block_length", "threshold", "rule", "quota", "revise_threshold", "spec_sampling",
         "mask_token_id")
    )  # fmt: skip
    settings = make_settings(
        tiny.model, mode, lora="auto", page_size=4,
        **{**given, **{k: v for k, v in extra.items() if k in given}},
    )  # fmt: skip
    requests = make_requests(
        tiny.model, prompts, None, max_new_tokens=max_new,
        temperature=extra.get("temperature", 0.0),
        threshold=extra.get("threshold"), seed=0, eos_token_id=extra.get("eos_token_id", ()),
        max_thinking_tokens=None, end_think_token_id=None,
    )  # fmt: skip
    result = Run(tiny.model, requests, settings)
    result.start()
    return result


@variants
def test_invariants_between_steps(mode: str, extra: dict[str, Any]) -> None:
    """seq_lens = prompt + emitted - 1; a request that is done stays as it is, its cache too."""
    tiny = tiny_model(7)
    prompts = [prompt(n, 7) for n in (4, 9, 2)]
    r = start(tiny, prompts, mode, [13, 1, 21], temperature=0.5, eos_token_id=(EOS,), **extra)
    state = r.state
    frozen: dict[int, tuple[int, list[int], torch.Tensor]] = {}
    for _ in range(500):
        lens, done = state.out_lens.tolist(), state.done.tolist()
        for b in range(3):
            if not done[b]:
                assert int(state.seq_lens[b]) == len(prompts[b]) + lens[b] - 1
                assert int(state.next_tokens[b]) == int(state.out_tokens[b, lens[b] - 1])
            pages = state.page_table[b][state.page_table[b] >= 0].long()
            now = (lens[b], state.out_tokens[b].tolist(), r.cache.k[:, pages].nan_to_num(0))
            if b in frozen:
                assert now[:2] == frozen[b][:2]
                assert torch.equal(now[2], frozen[b][2])
            elif done[b]:
                frozen[b] = now
        if r.finished:
            break
        r.advance()
    assert r.finished and len(frozen) == 3


HOST_READS = {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero"}


class HostReads(TorchDispatchMode):
    """Collects the ops by which values reach the host or decide on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name in HOST_READS or "masked_select" in name:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@variants
def test_a_step_reads_nothing_on_the_host(mode: str, extra: dict[str, Any]) -> None:
    """What a CUDA graph needs. Only drafting in several passes asks whether it needs another."""
    tiny = tiny_model(7)
    r = start(
        tiny, [prompt(4, 7), prompt(2, 7)], mode, 20, temperature=0.5, eos_token_id=(EOS,), **extra
    )
    buffers = {k: v.data_ptr() for k, v in vars(r.state).items() if isinstance(v, torch.Tensor)}
    with torch.inference_mode(), HostReads() as reads:
        for _ in range(4):
            r.mode.advance()
    drafts_in_passes = mode == "linear_spec" and extra.get("threshold")
    assert bool(reads.found) == bool(drafts_in_passes)
    after = {k: v.data_ptr() for k, v in vars(r.state).items() if isinstance(v, torch.Tensor)}
    assert after == buffers  # a captured graph would write to the tensors it was captured with


# ---- sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode,extra",
    [v for v in VARIANTS if v[0] in SPECULATIVE and v[1].get("spec_sampling") != "rejection"],
    ids=str,
)
@pytest.mark.parametrize("heat", [0.3, 1.0, 3.0])
def test_sampled_speculation_draws_what_ar_draws(
    tiny: TinyModel, mode: str, extra: dict[str, Any], heat: float
) -> None:
    prompts = [prompt(n, tiny.fields["vocab_size"]) for n in (2, 8, 5)]
    options: dict[str, Any] = dict(
        max_new_tokens=30, temperature=heat, seed=[1, 2, 3], eos_token_id=EOS,
        max_thinking_tokens=[None, 7, 11], end_think_token_id=END_THINK,
    )  # fmt: skip
    assert (
        run(tiny, prompts, mode, **extra, **options).tokens
        == run(tiny, prompts, "ar", **options).tokens
    )


@pytest.mark.parametrize("mode", MODES)
def test_seeds(mode: str) -> None:
    tiny = tiny_model(61)
    options: dict[str, Any] = dict(max_new_tokens=12, temperature=1.5, eos_token_id=())
    same = [prompt(5, 61)] * 2
    first = run(tiny, same, mode, seed=4, **options)
    assert first.stats.seeds == [4, 5]
    assert first.tokens[0] != first.tokens[1]
    assert run(tiny, same, mode, seed=[4, 5], **options).tokens == first.tokens
    assert run(tiny, same, mode, seed=[5, 4], **options).tokens == first.tokens[::-1]
    torch.manual_seed(1)
    drawn = run(tiny, same, mode, **options)
    assert run(tiny, same, mode, seed=drawn.stats.seeds, **options).tokens == drawn.tokens
    torch.manual_seed(1)
    assert run(tiny, same, mode, **options).tokens == drawn.tokens
    assert run(tiny, same, mode, **options).tokens != drawn.tokens


def test_temperature_in_diffusion_changes_draws_and_zero_is_greedy() -> None:
    tiny = tiny_model(61)
    options: dict[str, Any] = dict(
        max_new_tokens=16, block_length=8, eos_token_id=(), threshold=0.5
    )
    p = [prompt(5, 61)] * 3
    greedy = run(tiny, p[:1], "diffusion", **options)
    mixed = run(tiny, p, "diffusion", temperature=[0.0, 2.0, 2.0], seed=[1, 2, 3], **options)
    assert mixed.tokens[0] == greedy.tokens[0]
    assert len({tuple(t) for t in mixed.tokens}) == 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 24),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from(SPECULATIVE),
    st.sampled_from([None, 0, 5]),
    st.integers(1, 7),
)
def test_speculation_equals_ar(
    lens: list[int],
    block_length: int,
    limit: int,
    heat: float,
    mode: str,
    budget: int | None,
    page_size: int,
) -> None:
    tiny = tiny_model(7)
    prompts = [prompt(n, 7, seed=i) for i, n in enumerate(lens)]
    options: dict[str, Any] = dict(
        max_new_tokens=limit, temperature=heat, seed=sum(lens), max_thinking_tokens=budget,
        end_think_token_id=END_THINK, page_size=page_size,
        eos_token_id=EOS if block_length % 2 else (),
    )  # fmt: skip
    result = run(tiny, prompts, mode, block_length=block_length, **options)
    assert result.tokens == run(tiny, prompts, "ar", **options).tokens


# ---- commit rules ----------------------------------------------------------------------------


def test_commit_rules_take_the_forwards_they_should() -> None:
    tiny = tiny_model(61)
    options: dict[str, Any] = dict(max_new_tokens=17, block_length=8, eos_token_id=())
    p = prompt(6, 61)

    def forwards(**rule: Any) -> tuple[int, int]:
        stats = run(tiny, p, "diffusion", **rule, **options).stats
        return stats.draft_forwards, stats.verify_forwards

    # two whole blocks of 7 masks; the 17th token is the second block's prediction
    assert forwards() == forwards(rule="quota") == forwards(threshold=1.1) == (14, 2)
    assert forwards(quota=3) == (6, 2)
    assert forwards(rule="all") == forwards(threshold=0.0) == forwards(quota=7) == (2, 2)
    assert forwards(rule="entropy", threshold=1e-6) == (14, 2)
    assert forwards(rule="entropy", threshold=1e6) == (2, 2)
    assert 2 < forwards(threshold=0.3)[0] < 14
    # one token a pass, taken back by the next one: only the limit on passes ends that
    assert forwards(rule="revise", threshold=0.3, revise_threshold=0.0) == forwards(threshold=0.3)
    drafts, refreshes = forwards(rule="revise", threshold=1.1, revise_threshold=2.0)
    assert refreshes == 2 and 2 * 16 < drafts <= 2 * (16 + 7)


def test_revision_changes_tokens_but_never_the_seed_or_what_was_emitted() -> None:
    tiny = tiny_model(61)
    options: dict[str, Any] = dict(block_length=8, eos_token_id=EOS, rule="revise", threshold=0.2)
    p = [prompt(n, 61) for n in (3, 5, 7, 9)]
    short = run(tiny, p, "diffusion", max_new_tokens=9, revise_threshold=0.15, **options)
    for b, tokens in enumerate(short.tokens):
        first = run(tiny, p[b], "ar", max_new_tokens=1, eos_token_id=()).tokens[0]
        assert tokens[:1] == first
        assert MASK not in tokens


# ---- limits and corner cases -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@variants
def test_half_precision(mode: str, extra: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """Runs, gives tokens of the vocabulary, and repeats itself."""
    fields = config_fields(vocab_size=13, num_hidden_layers=1)
    folder = write_checkpoint(tmp_path, fields, random_weights(fields))
    model = nld_cuda.load(folder, device="cpu", dtype=dtype)
    options: dict[str, Any] = dict(
        max_new_tokens=10, eos_token_id=(), temperature=[0.0, 1.0], seed=[1, 2], **extra
    )
    results = [nld_cuda.generate(model, [[1, 5], [3]], mode, **options) for _ in range(2)]
    assert results[0].tokens == results[1].tokens
    assert [len(t) for t in results[0].tokens] == [10, 10]
    assert all(0 <= t < 13 for tokens in results[0].tokens for t in tokens)
    assert results[0].stats.dtype == dtype


@variants
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 11])
def test_never_more_than_max_new_tokens(mode: str, extra: dict[str, Any], limit: int) -> None:
    tiny = tiny_model(7)
    result = run(
        tiny, [prompt(4, 7), prompt(1, 7)], mode, max_new_tokens=limit, eos_token_id=(),
        temperature=0.4, seed=1, **extra,
    )  # fmt: skip
    assert [len(t) for t in result.tokens] == [limit, limit]
    assert result.finish_reason == ["length", "length"]
    assert all(0 <= t < 7 for tokens in result.tokens for t in tokens)


@variants
def test_eos_as_first_token(mode: str, extra: dict[str, Any]) -> None:
    tiny = tiny_model(61)
    p = prompt(4, 61)
    first = run(tiny, p, "ar", max_new_tokens=1, eos_token_id=()).tokens[0]
    result = run(
        tiny, [p, prompt(9, 61)], mode, max_new_tokens=10, eos_token_id=[first, []], **extra
    )
    assert result.tokens[0] == first
    assert result.finish_reason == ["eos", "length"]
    assert len(result.tokens[1]) == 10


@pytest.mark.parametrize("mode,extra", VARIANTS[1:], ids=str)  # ar has no block
def test_block_longer_than_what_is_left(mode: str, extra: dict[str, Any]) -> None:
    tiny = tiny_model(61)
    extra = {**extra, "block_length": 16}
    result = run(tiny, prompt(5, 61), mode, max_new_tokens=4, eos_token_id=(), **extra)
    assert len(result.tokens[0]) == 4
    if mode in SPECULATIVE:
        ar = run(tiny, prompt(5, 61), "ar", max_new_tokens=4, eos_token_id=())
        assert result.tokens == ar.tokens


@variants
def test_prompt_of_mask_tokens_only(mode: str, extra: dict[str, Any]) -> None:
    tiny = tiny_model(61)
    result = run(tiny, [MASK] * 6, mode, max_new_tokens=9, eos_token_id=(), **extra)
    assert len(result.tokens[0]) == 9
    if mode in SPECULATIVE:
        ar = run(tiny, [MASK] * 6, "ar", max_new_tokens=9, eos_token_id=())
        assert result.tokens == ar.tokens


def test_places_are_the_models_all_and_no_more() -> None:
    fields = config_fields(max_position_embeddings=24, vocab_size=11, num_hidden_layers=1)
    model = make_model(fields)
    for mode in MODES:
        result = nld_cuda.generate(model, [5] * 14, mode, max_new_tokens=10, eos_token_id=())
        assert len(result.tokens[0]) == 10
    with pytest.raises(ValueError, match=r"must fit in 24 places, got 14 \+ 11"):
        nld_cuda.generate(model, [5] * 14, max_new_tokens=11)


def make_model(fields: dict[str, Any], folder: Path | None = None) -> NLDModel:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        return nld_cuda.load(write_checkpoint(place, fields, random_weights(fields)), device="cpu")


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(mode: str) -> None:
    result = run(tiny_model(61), [], mode)
    assert (result.tokens, result.finish_reason) == ([], [])
    assert result.stats.nfe == 0 and result.stats.tokens_per_forward is None


def test_thinking_budget_ends_thinking_once() -> None:
    """Forced at its place unless produced before; the same in every exact mode."""
    tiny = tiny_model(7)
    early = 0
    for seed in range(12):
        options: dict[str, Any] = dict(
            max_new_tokens=20, max_thinking_tokens=6, end_think_token_id=END_THINK,
            eos_token_id=(), temperature=1.0, seed=seed,
        )  # fmt: skip
        p = prompt(3, 7, seed)
        tokens = run(tiny, p, "ar", **options).tokens[0]
        assert END_THINK in tokens[:7]
        early += END_THINK in tokens[:6]
        for mode in SPECULATIVE:
            assert run(tiny, p, mode, block_length=4, **options).tokens[0] == tokens
        free = run(tiny, p, "ar", **{**options, "max_thinking_tokens": None}).tokens[0]
        if END_THINK in free[:6]:
            assert free == tokens
        block = run(tiny, p, "diffusion", block_length=5, **options).tokens[0]
        assert END_THINK in block[:7]
    assert 0 < early < 12


# ---- the published methods -------------------------------------------------------------------


def test_published_signatures() -> None:
    def names(method: Any) -> list[str]:
        return list(inspect.signature(method).parameters)[1:]

    tail = ["eos_token_id", "max_thinking_tokens", "end_think_token_id"]
    assert names(NLDModel.ar_generate) == ["prompt_ids", "max_new_tokens", "temperature", *tail]
    assert names(NLDModel.generate) == [
        "prompt_ids", "max_new_tokens", "block_length", "threshold", "causal_context",
        "temperature", *tail,
    ]  # fmt: skip
    assert names(NLDModel.linear_spec_generate) == [
        "prompt_ids", "max_new_tokens", "block_length", "temperature", "mask_token_id", *tail,
        "threshold",
    ]  # fmt: skip


def test_published_methods_return_ids_with_the_prompt_and_forwards() -> None:
    model = tiny_model(61).model
    p = torch.tensor([prompt(6, 61), prompt(6, 61, seed=1)])
    calls = {
        "ar": model.ar_generate(p, 12, eos_token_id=EOS),
        "linear_spec": model.linear_spec_generate(p, 12, 4, eos_token_id=EOS),
        "quadratic_spec": model.quadratic_spec_generate(p, 12, 4, eos_token_id=EOS),
        "diffusion": model.generate(p, 12, 4, 0.5, eos_token_id=EOS),
    }
    for mode, (ids, nfe) in calls.items():
        extra: dict[str, Any] = {} if mode == "ar" else {"block_length": 4}
        if mode == "diffusion":
            extra["threshold"] = 0.5
        result = nld_cuda.generate(model, p, mode, max_new_tokens=12, eos_token_id=EOS, **extra)
        longest = max(len(t) for t in result.tokens)
        assert ids.dtype == torch.int64 and ids.shape == (2, 6 + longest)
        assert torch.equal(ids[:, :6], p)
        assert nfe == max(r.nfe for r in result.stats.requests)
        for row, tokens in zip(ids[:, 6:].tolist(), result.tokens, strict=True):
            assert row == tokens + [EOS] * (longest - len(tokens))


def test_default_eos_and_mask_are_the_checkpoints() -> None:
    tiny = tiny_model(7)
    p = [prompt(n, 7, s) for n in (3, 4) for s in range(4)]
    default = run(tiny, p, "ar", max_new_tokens=40, temperature=1.0, seed=0)
    given = run(tiny, p, "ar", max_new_tokens=40, temperature=1.0, seed=0, eos_token_id=EOS)
    assert default.tokens == given.tokens and "eos" in default.finish_reason
    other = run(tiny, p, "diffusion", max_new_tokens=20, eos_token_id=(), mask_token_id=6)
    usual = run(tiny, p, "diffusion", max_new_tokens=20, eos_token_id=())
    assert other.tokens != usual.tokens


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ({"prompts": [[]]}, ValueError, "prompt must hold at least one token, got none"),
        ({"prompts": [[1], []]}, ValueError, r"at least one token, got none \(prompt 1\)"),
        ({"prompts": [61]}, ValueError, r"prompt must hold ids in \[0, 61\), got 61"),
        ({"prompts": "text"}, ValueError, "has no tokenizer, got text"),
        ({"prompts": 3}, TypeError, "prompts must be text, token ids, or a list"),
        ({"prompts": [[1.5]]}, TypeError, "a prompt must be text, a list of ints or a tensor"),
        ({"prompts": torch.ones(3)}, TypeError, "prompt tensor must be integer"),
        ({"prompts": torch.ones(1, 1, 1).int()}, ValueError, "must have 1 or 2 dimensions"),
        ({"mode": "fast"}, ValueError, "mode must be one of ar, diffusion, linear_spec, quad"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be >= 0, got -1"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer, got 2.5"),
        ({"max_new_tokens": [1, 2]}, ValueError, r"one entry per prompt \(1\), got 2"),
        ({"max_new_tokens": 4096}, ValueError, "must fit in 4096 places"),
        ({"block_length": 0}, ValueError, "block_length must be >= 1, got 0"),
        ({"block_length": 4, "mode": "ar"}, ValueError, "block_length must be left out in mode ar"),
        ({"threshold": 0.5, "mode": "quadratic_spec"}, ValueError, "threshold must be left out"),
        ({"threshold": -0.5}, ValueError, "threshold must be finite and >= 0, got -0.5"),
        ({"threshold": float("nan")}, ValueError, "threshold must be finite"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0, got -1.0"),
        ({"temperature": "hot"}, TypeError, "temperature must"),
        ({"rule": "all"}, ValueError, "rule must be left out in mode linear_spec"),
        ({"rule": "best", "mode": "diffusion"}, ValueError, "rule must be one of threshold, quota"),
        ({"rule": "revise", "threshold": 0.5, "mode": "diffusion"}, ValueError, "revise_threshold"),
        ({"rule": "entropy", "mode": "diffusion"}, ValueError, "threshold must be given with rule"),
        ({"quota": 0, "mode": "diffusion"}, ValueError, "quota must be >= 1, got 0"),
        ({"quota": 2, "threshold": 0.5, "mode": "diffusion"}, ValueError, "quota must be left out"),
        ({"spec_sampling": "x"}, ValueError, "spec_sampling must be one of sampled, rejection"),
        ({"spec_sampling": "sampled", "mode": "ar"}, ValueError, "spec_sampling must be left out"),
        ({"spec_sampling": "rejection", "threshold": 0.5}, ValueError, "threshold must be 0 with"),
        ({"lora": "on"}, ValueError, "lora must be 'auto', True, False or None, got 'on'"),
        ({"lora": True, "mode": "ar"}, ValueError, "lora must not be True in mode ar"),
        ({"eos_token_id": [-2]}, ValueError, "eos_token_id must hold ids >= 0"),
        ({"seed": [1.5]}, TypeError, "seed must hold integers, got 1.5"),
        ({"max_thinking_tokens": 3}, ValueError, "end_think_token_id must be given with"),
        ({"max_thinking_tokens": -3, "end_think_token_id": 4}, ValueError, "must be >= 0, got -3"),
        ({"mask_token_id": 61}, ValueError, r"mask_token_id must be in \[0, 60\], got 61"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"prompts": [1, 2], "mode": "linear_spec", **arguments}
    with pytest.raises(error, match=message):
        nld_cuda.generate(tiny_model(61).model, **given)


def test_causal_context_false_is_refused() -> None:
    model = tiny_model(61).model
    with pytest.raises(NotImplementedError, match="causal_context must be True"):
        model.generate(torch.ones(1, 3, dtype=torch.int64), 8, 4, causal_context=False)
    with pytest.raises(TypeError, match="prompt_ids must be a tensor"):
        model.ar_generate([[1, 2]])  # type: ignore[arg-type]


def test_lora_without_adapter(tmp_path: Path) -> None:
    model = make_model(config_fields(vocab_size=9, num_hidden_layers=1), tmp_path)
    with pytest.raises(ValueError, match="this model has no adapter"):
        nld_cuda.generate(model, [1], lora=True)
    assert nld_cuda.generate(model, [1], max_new_tokens=3).stats.lora is False


@pytest.mark.parametrize(
    "path,error,message",
    [
        ("no-such-model", FileNotFoundError, "checkpoint folder or one of nld-tiny, got 'no-such"),
        (None, TypeError, "path_or_name must be a path, got NoneType"),
    ],
)
def test_load_errors(path: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nld_cuda.load(path)


# ---- statistics ------------------------------------------------------------------------------


@variants
def test_stats_add_up(mode: str, extra: dict[str, Any]) -> None:
    tiny = tiny_model(7)
    prompts = [prompt(n, 7) for n in (5, 2, 9)]
    result = run(
        tiny, prompts, mode, max_new_tokens=[20, 9, 0], eos_token_id=[(), (EOS,), ()],
        temperature=0.6, seed=1, **extra,
    )  # fmt: skip
    s = result.stats
    json.dumps(s.to_dict())
    assert s.mode == mode and s.num_requests == 3
    assert s.prompt_tokens == 16
    assert (
        s.new_tokens == sum(len(t) for t in result.tokens) == sum(r.new_tokens for r in s.requests)
    )
    assert s.prefill_forwards == 2 and s.batch_forwards["prefill"] == 1
    assert s.verify_forwards == sum(r.verify_forwards for r in s.requests)
    assert s.nfe == sum(r.nfe for r in s.requests)
    assert s.tokens_per_forward == s.new_tokens / s.nfe
    forwards = s.draft_forwards + s.verify_forwards
    assert s.decode_tokens_per_forward == (s.new_tokens - 2) / forwards
    batch = sum(s.batch_forwards.values()) - 1
    assert max(r.draft_forwards + r.verify_forwards for r in s.requests) == batch
    if mode == "ar":
        assert s.decode_tokens_per_forward == s.tokens_per_forward == 1.0
        assert s.tokens_per_forward_without_commit is None
    if mode in SPECULATIVE:
        assert sum(s.accept_len_histogram) == s.verify_forwards
        assert s.tokens_per_cycle == (s.new_tokens - 2) / s.verify_forwards
        assert len(s.accept_len_histogram) == extra["block_length"]
        assert s.mean_accept_len is not None and s.mean_accept_len > 0
    else:
        assert s.accept_len_histogram == [] and s.tokens_per_cycle is None
    if mode == "diffusion":
        assert s.tokens_per_forward_without_commit == s.new_tokens / s.draft_forwards
    assert 0 < s.first_token_seconds <= s.seconds
    assert s.peak_memory_bytes > 0
    assert set(s.versions) == {"nld_cuda", "torch", "python"}


# ---- text and streams ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> NLDModel:
    """Every byte is a token, so that characters come in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<mask>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>", "<mask>"])
    folder = tmp_path_factory.mktemp("text")
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(7)
    return make_model(config_fields(vocab_size=len(vocab), num_hidden_layers=1), folder)


def test_text_in_text_out(text_model: NLDModel) -> None:
    tokenizer = text_model.tokenizer
    assert tokenizer is not None
    texts = ["naïve 🙂 text", "x"]
    result = nld_cuda.generate(text_model, texts, max_new_tokens=8)
    from_ids = nld_cuda.generate(text_model, [tokenizer.encode(t) for t in texts], max_new_tokens=8)
    assert result.tokens == from_ids.tokens
    assert result.text == [tokenizer.decode(t) for t in result.tokens]
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    one = nld_cuda.generate(text_model, texts[0], max_new_tokens=8)
    assert one.tokens == result.tokens[:1]


def test_incremental_decoding_keeps_characters_whole(text_model: NLDModel) -> None:
    from nld_cuda.decode.text import IncrementalDecoder

    tokenizer = text_model.tokenizer
    assert tokenizer is not None
    text = "é🙂a  b\n日本"
    for step in (1, 2, 3, 5):
        decoder = IncrementalDecoder(tokenizer)
        ids = tokenizer.encode(text)
        pieces = [decoder.push(ids[i : i + step]) for i in range(0, len(ids), step)]
        assert "".join(pieces) + decoder.finish() == text
        assert not any("\ufffd" in piece for piece in pieces)
    cut = IncrementalDecoder(tokenizer)
    assert cut.push(tokenizer.encode("a🙂")[:-1]) == ""
    assert cut.finish() == tokenizer.decode(tokenizer.encode("a🙂")[:-1])
    assert cut.finish() == ""


@variants
def test_stream_says_what_generate_says(
    text_model: NLDModel, mode: str, extra: dict[str, Any]
) -> None:
    options: dict[str, Any] = dict(max_new_tokens=23, temperature=0.9, seed=2, **extra)
    result = nld_cuda.generate(text_model, "hello", mode, **options)
    events: list[StreamEvent] = list(nld_cuda.stream(text_model, "hello", mode, **options))
    assert [t for e in events for t in e.final_tokens] == result.tokens[0]
    assert result.text is not None
    assert "".join(e.final for e in events) == result.text[0]
    last = events[-1]
    assert last.kind == "end" and last.result is not None
    assert last.result.tokens == result.tokens
    assert last.result.stats.requests == result.stats.requests
    assert [e.kind for e in events].count("end") == 1 and events[0].kind == "prefill"
    forwards = [e.num_forwards for e in events]
    assert forwards == sorted(forwards) and forwards[0] == 1


def test_stream_shows_a_block_being_denoised(text_model: NLDModel) -> None:
    events = list(
        nld_cuda.stream(
            text_model, "abc", "diffusion", max_new_tokens=9, block_length=8, eos_token_id=()
        )
    )
    assert [e.kind for e in events] == ["prefill"] + ["denoise"] * 7 + ["refresh", "end"]
    for i, event in enumerate(events[:8]):
        block = event.provisional
        assert [t.status for t in block].count("masked") == 7 - i == sum(t.is_masked for t in block)
        assert block[0].status == "seed" and [t.position for t in block] == list(range(3, 11))
        assert event.final_tokens == ([block[0].token] if i == 0 else [])
        assert all((t.confidence is not None) == (i > 0) for t in block[1:])
        assert all(bool(t.text) == (not t.is_masked) or t.token < 4 for t in block)
    assert (
        events[8].final_tokens
        == [t.token for t in events[7].provisional][1:] + events[8].final_tokens[-1:]
    )


@pytest.mark.parametrize("mode", SPECULATIVE)
def test_stream_shows_drafts_and_their_verdict(mode: str) -> None:
    tiny = tiny_model(7)
    events = list(
        nld_cuda.stream(
            tiny.model, prompt(4, 7), mode, max_new_tokens=30, block_length=4, eos_token_id=()
        )
    )
    accepted = 0
    drafts: list[int] = []
    for event in events[1:-1]:
        block = event.provisional
        if event.kind == "draft":
            assert [t.status for t in block] == ["seed"] + ["draft"] * 3
            drafts = [t.token for t in block]
        else:
            assert event.kind == "verify"
            kept = [t.token for t in block if t.status == "accepted"]
            assert [t.token for t in block] == drafts or not drafts
            assert event.final_tokens[: len(kept)] == kept[: len(event.final_tokens)]
            assert [t.status for t in block[1:]] == ["accepted"] * len(kept) + ["rejected"] * (
                3 - len(kept)
            )
            accepted += len(kept)
    stats = events[-1].result.stats  # type: ignore[union-attr]
    histogram = stats.accept_len_histogram
    assert accepted == sum(n * count for n, count in enumerate(histogram)) > 0


def test_stream_takes_one_prompt_and_checks_at_once() -> None:
    model = tiny_model(61).model
    with pytest.raises(ValueError, match="prompt must be a single one, got 2"):
        nld_cuda.stream(model, [[1], [2]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_length must be >= 1"):
        nld_cuda.stream(model, [1], block_length=0)


# ---- the packaged model ----------------------------------------------------------------------


def test_packaged_model_speculates_without_changing_its_answers() -> None:
    model = nld_cuda.load("nld-tiny", device="cpu")
    lines = (nld_cuda.api.ASSETS / "nld-tiny" / "heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:: len(lines) // 6]]
    ar = nld_cuda.generate(model, prompts, "ar")
    assert ar.text is not None and all(ar.text)
    linear = nld_cuda.generate(model, prompts, "linear_spec", block_length=16)
    quadratic = nld_cuda.generate(model, prompts, "quadratic_spec", block_length=6)
    assert linear.tokens == quadratic.tokens == ar.tokens
    assert linear.stats.tokens_per_cycle is not None and linear.stats.tokens_per_cycle > 6
    warm = [
        nld_cuda.generate(model, prompts, mode, temperature=0.8, seed=1).tokens
        for mode in ("ar", "linear_spec")
    ]
    assert warm[0] == warm[1]


def test_packaged_model_keeps_the_promises_of_its_card() -> None:
    """ar right in 95 %, diffusion at 0.9 within 2 points in 1/3 of the forwards, 0.3 costs."""
    model = nld_cuda.load("nld-tiny", device="cpu")
    lines = (nld_cuda.api.ASSETS / "nld-tiny" / "heldout.jsonl").read_text().splitlines()
    problems = [tiny_tasks.Problem(**json.loads(line)) for line in lines[::4]]

    def decode(mode: str, **options: Any) -> tuple[float, float]:
        """Return the share of right answers and the tokens per forward."""
        result = nld_cuda.generate(model, [p.prompt for p in problems], mode, **options)
        assert result.text is not None
        right = sum(map(tiny_tasks.check, problems, result.text)) / len(problems)
        nfe = sum(r.nfe for r in result.stats.requests)
        return right, sum(r.new_tokens for r in result.stats.requests) / nfe

    ar, _ = decode("ar")
    careful, per_forward = decode("diffusion", threshold=0.9, block_length=16)
    hasty, _ = decode("diffusion", threshold=0.3, block_length=16)
    assert ar >= 0.95
    assert careful >= ar - 0.02 and per_forward >= 3
    assert hasty < careful - 0.1
