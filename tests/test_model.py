"""NLDModel.forward against a plain dense model: shapes, rope, mask modes, adapter, precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compare import assert_equal
from model_session import Session, causal, random_tokens, relative_error
from nld_cuda.model import ModelConfig, NLDModel, load_model
from nld_cuda.model.rope import rope_frequencies
from nld_cuda.model.transformer import rms_norm
from nld_cuda.ops import MaskMode
from tiny_model import (
    YARN,
    config_fields,
    plain_logits,
    random_lora,
    random_weights,
    write_checkpoint,
)

FULL, CAUSAL, BLOCK_CAUSAL, QUADRATIC = MaskMode


@dataclass(frozen=True)
class Case:
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    page_size: int = 5


CASES = [
    Case("yarn16"),
    Case("yarn0.25", {"rope_parameters": YARN | {"factor": 0.25}}),
    Case("default_rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    Case(
        "linear_rope",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    Case(
        "partial_rope",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    # far past the original context: yarn mixes everywhere, the query scale takes many values
    Case(
        "query_scale",
        {"rope_parameters": YARN | {"original_max_position_embeddings": 7, "rope_theta": 100.0}},
    ),
    Case("gqa1", {"num_key_value_heads": 4}, page_size=1),
    Case("gqa4", {"num_key_value_heads": 1}, page_size=64),
    Case(
        "gqa8",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 40},
    ),
    Case("tied", {"tie_word_embeddings": True}),
    Case(
        "one_layer_odd_sizes",
        {"num_hidden_layers": 1, "hidden_size": 33, "intermediate_size": 17, "vocab_size": 113},
    ),
]


def make(
    tmp_path: Path, case: Case, dtype: torch.dtype = torch.float32, **kw: Any
) -> tuple[NLDModel, dict, dict]:
    fields = config_fields(**case.changes)
    weights = random_weights(fields, dtype)
    folder = write_checkpoint(tmp_path / case.name, fields, weights, **kw)
    return load_model(folder, "cpu", dtype), fields, weights


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_causal_parity(case: Case, tmp_path: Path) -> None:
    """Ragged prefill, then ragged continuation: both equal one dense pass over each sequence."""
    model, fields, weights = make(tmp_path, case)
    prompts = random_tokens(fields, 1, 33, 7)
    more = random_tokens(fields, 16, 5, 1)
    session = Session(model, 3, 64, case.page_size)
    first = session.run(prompts, [CAUSAL] * 3)
    second = session.run(more, [CAUSAL] * 3)
    for b in range(3):
        tokens = torch.cat((prompts[b], more[b]))
        exact = plain_logits(fields, weights, tokens, causal(tokens.numel()))
        assert relative_error(torch.cat((first[b], second[b])), exact) <= 1e-5


def test_mixed_mask_modes(tmp_path: Path) -> None:
    """One batch in which every request has its own mask mode and its own number of rows."""
    model, fields, weights = make(tmp_path, CASES[0])
    prompts, blocks = random_tokens(fields, 9, 4, 0, 13), random_tokens(fields, 6, 3, 10, 6)
    session = Session(model, 4, 40, 3)
    session.run(prompts, [CAUSAL] * 4)
    block_len = torch.tensor([1, 1, 4, 2], dtype=torch.int32)
    phase = torch.tensor([0, 0, 1, 0], dtype=torch.int32)
    modes = [FULL, CAUSAL, BLOCK_CAUSAL, QUADRATIC]
    logits = session.run(blocks, modes, keep=False, block_len=block_len, block_phase=phase)
    for b, mode in enumerate(modes):
        tokens, p, n = torch.cat((prompts[b], blocks[b])), prompts[b].numel(), blocks[b].numel()
        visible = causal(p + n)
        if mode == FULL:
            visible[p:] = True
        elif mode == BLOCK_CAUSAL:
            group = (torch.arange(n) + 1) // 4
            visible = group[None, :] <= group[:, None]
        elif mode == QUADRATIC:  # groups of one head and two masks
            for i in range(n):
                for c in range(n):
                    head = c % 3 == 0
                    visible[p + i, p + c] = (head and c <= i) or (i % 3 != 0 and c // 3 == i // 3)
        exact = plain_logits(fields, weights, tokens, visible)[p:]
        assert relative_error(logits[b], exact) <= 1e-5, modes[b]
    # the draft entries lie past the kept length: overwriting them must give what was never drafted
    again = session.run(blocks, [CAUSAL] * 4)
    for b in range(4):
        tokens = torch.cat((prompts[b], blocks[b]))
        exact = plain_logits(fields, weights, tokens, causal(tokens.numel()))[prompts[b].numel() :]
        assert relative_error(again[b], exact) <= 1e-5


@pytest.mark.parametrize("case", CASES[:6], ids=lambda c: c.name)
def test_bfloat16_is_as_accurate_as_plain(case: Case, tmp_path: Path) -> None:
    model, fields, weights = make(tmp_path, case, torch.bfloat16)
    (tokens,) = random_tokens(fields, 40)
    exact = plain_logits(fields, weights, tokens, causal(40))
    plain = plain_logits(fields, weights, tokens, causal(40), dtype=torch.bfloat16)
    (actual,) = Session(model, 1, 40, case.page_size).run([tokens], [CAUSAL])
    assert actual.dtype == torch.bfloat16
    # the norm of the error: its maximum varies threefold from seed to seed, the norm by a tenth
    allowed, error = (float((t.double() - exact).norm()) for t in (plain, actual))
    assert error <= 1.5 * allowed


def test_rms_norm_rounds_before_the_weight() -> None:
    """As the published model: in bfloat16 the product sees the rounded quotient."""
    x, weight = torch.randn(64, 160).bfloat16() * 3, (1 + torch.randn(160) / 3).bfloat16()
    wide = x.float()
    quotient = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert_equal(rms_norm(x, weight, 1e-5), quotient * weight, "rms_norm")


def test_logits_rows_and_done_requests(tmp_path: Path) -> None:
    """Chosen rows equal the same rows of all; a request with slot -1, seq_len 0 disturbs none."""
    model, fields, _ = make(tmp_path, CASES[0])
    rows = random_tokens(fields, 4, 6)
    everything = torch.cat(Session(model, 2, 8, 4).run(rows, [CAUSAL] * 2))
    chosen = torch.tensor([9, 3, 3])
    session = Session(model, 2, 8, 4)
    session_rows = session.model.forward(
        torch.cat(rows),
        torch.tensor([*range(4), *range(6)], dtype=torch.int32),
        torch.cat(
            (
                torch.full((4,), -1, dtype=torch.int32),
                session.cache.slots(
                    session.table,
                    torch.ones(6, dtype=torch.int64),
                    torch.arange(6, dtype=torch.int32),
                ),
            )
        ),
        session.cache,
        session.table,
        torch.tensor([0, 6], dtype=torch.int32),
        torch.tensor([0, 4, 10], dtype=torch.int32),
        torch.tensor([CAUSAL, CAUSAL], dtype=torch.int32),
        logits_rows=chosen,
    )
    assert session_rows.shape == (3, fields["vocab_size"])
    torch.testing.assert_close(session_rows[0], everything[9], rtol=1e-5, atol=1e-5)
    assert not session_rows.isnan().any()
    written = ~session.cache.k.isnan().flatten(3).any(-1).flatten(1)
    assert_equal(written.sum(1), torch.full((3,), 6), "slots written per layer")


def test_empty_call(tmp_path: Path) -> None:
    model, fields, _ = make(tmp_path, CASES[0])
    (logits,) = Session(model, 1, 8, 4).run([torch.empty(0, dtype=torch.int64)], [CAUSAL])
    assert logits.shape == (0, fields["vocab_size"])


def test_lora_equals_merged_weights(tmp_path: Path) -> None:
    fields = config_fields()
    weights, lora = random_weights(fields), random_lora(fields, rank=5)
    scale = 3 / 5
    folder = write_checkpoint(
        tmp_path / "base", fields, weights, lora=lora, lora_config={"lora_alpha": 3}
    )
    model = load_model(folder, "cpu")
    bare = load_model(folder, "cpu", lora=None)
    assert model.has_lora and not bare.has_lora
    merged = dict(weights)
    for i in range(fields["num_hidden_layers"]):
        at = f"encoder.layers.{i}.self_attn.o_proj"
        a, b = (lora[f"base_model.model.{at}.lora_{part}.weight"] for part in "AB")
        merged[f"{at}.weight"] = weights[f"{at}.weight"] + scale * b @ a
    (tokens,) = random_tokens(fields, 19)
    visible = torch.ones(19, 19, dtype=torch.bool)
    (on,) = Session(model, 1, 20, 4).run([tokens], [FULL], use_lora=True)
    (off,) = Session(model, 1, 20, 4).run([tokens], [FULL])
    (without,) = Session(bare, 1, 20, 4).run([tokens], [FULL])
    assert relative_error(on, plain_logits(fields, merged, tokens, visible)) <= 1e-5
    assert relative_error(off, plain_logits(fields, weights, tokens, visible)) <= 1e-5
    assert_equal(off, without, "logits with the adapter off")
    assert relative_error(on, off.double()) > 0.05, "the adapter must matter in this test"
    with pytest.raises(ValueError, match="use_lora must be False, this model has no adapter"):
        Session(bare, 1, 20, 4).run([tokens], [FULL], use_lora=True)


def test_golden_frequencies() -> None:
    """Published constants (theta 1e6, head_dim 128, original context 16384)."""
    golden = {
        16.0: {
            0: 1.0,
            1: 0.805842,
            20: 0.01333521,
            21: 0.01015346,
            28: 0.00132518,
            36: 4.961135e-5,
            37: 2.123880e-5,
            63: 7.755861e-8,
        },
        0.25: {
            0: 1.0,
            20: 0.01333521,
            21: 0.01264245,
            28: 0.00571920,
            37: 0.00135928,
            63: 4.963751e-6,
        },
    }
    for factor, values in golden.items():
        fields = config_fields(head_dim=128, rope_parameters=YARN | {"factor": factor})
        inv_freq, attention_scaling = rope_frequencies(ModelConfig.from_dict(fields).rope)
        assert attention_scaling == 1.0
        assert inv_freq.shape == (64,) and inv_freq.dtype == torch.float32
        for i, value in values.items():
            assert inv_freq[i].item() == pytest.approx(value, rel=4e-6), (factor, i)
        unscaled = 1.0 / 1e6 ** (torch.arange(0, 42, 2).float() / 128)
        assert_equal(inv_freq[:21], unscaled, "first 21 frequencies")


def test_yarn_attention_factor() -> None:
    """The factor on cos and sin: given, from mscale, or the default; 1 for factors up to 1."""

    def scaling(**changes: Any) -> float:
        rope = {name: value for name, value in (YARN | changes).items() if value is not None}
        return rope_frequencies(ModelConfig.from_dict(config_fields(rope_parameters=rope)).rope)[1]

    assert scaling(mscale=None, mscale_all_dim=None) == pytest.approx(1.2772588722)
    assert scaling(mscale=None, mscale_all_dim=None, factor=0.25) == 1.0
    assert scaling(mscale=2.0, mscale_all_dim=1.0) == pytest.approx(1.5545177444 / 1.2772588722)
    assert scaling(attention_factor=0.7) == 0.7


def test_compiles_as_one_graph(tmp_path: Path) -> None:
    """No graph break and no recompilation for a new number of rows."""
    model, fields, _ = make(tmp_path, CASES[0])
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    eager, compiled = Session(model, 2, 40, 4), Session(model, 2, 40, 4)
    compiled.forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend=backend)
    for counts in ((5, 6), (2, 7), (6, 7)):
        rows = random_tokens(fields, *counts)
        expected = torch.cat(eager.run(rows, [CAUSAL, FULL]))
        actual = torch.cat(compiled.run(rows, [CAUSAL, FULL]))
        torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1
