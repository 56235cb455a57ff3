"""NLDModel against transformers' Ministral 3 and peft: other people's code, the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nld_cuda
from model_session import Session, causal, random_tokens, relative_error
from nld_cuda.model import NLDModel, load_model
from nld_cuda.ops import MaskMode
from tiny_model import (
    YARN,
    config_fields,
    plain_logits,
    random_lora,
    random_weights,
    write_checkpoint,
)

SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings",
)  # fmt: skip


def theirs(fields: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The same model as a transformers one: what differs is only how tensors are called."""
    config = transformers.Ministral3Config(
        **{name: fields[name] for name in SHARED_FIELDS},
        rope_parameters=dict(fields["rope_parameters"]),
        sliding_window=None,
        pad_token_id=None,
    )
    model = transformers.Ministral3ForCausalLM(config).to(dtype).eval()
    renamed = {
        name.replace("encoder.", "model.", 1).replace("diffusion_head", "lm_head"): t
        for name, t in weights.items()
    }
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if fields["tie_word_embeddings"] else [])
    return model


@torch.no_grad()
def their_logits(model: Any, tokens: Tensor, first_position: int = 0) -> Tensor:
    positions = torch.arange(first_position, first_position + tokens.numel())
    return model(tokens[None], position_ids=positions[None], use_cache=False).logits[0]


def our_logits(
    model: NLDModel, tokens: Tensor, first_position: int = 0, chunk: int = 13, **options: Any
) -> Tensor:
    """In chunks, through the paged cache."""
    session = Session(model, 1, tokens.numel(), 4, first_position)
    return torch.cat(
        [session.run([rows], [MaskMode.CAUSAL], **options)[0] for rows in tokens.split(chunk)]
    )


@dataclass(frozen=True)
class Case:
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    first_position: int = 0


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": YARN | changes}


CASES = [
    Case("yarn_16"),
    Case("yarn_0.25", rope(factor=0.25)),
    Case("yarn_mixes_everywhere", rope(original_max_position_embeddings=16)),
    # The query scale changes at multiples of the original context.
    Case("past_16384", first_position=16384 - 20),
    Case("past_32768", first_position=32768 - 20),
    Case("far_out", first_position=250_000),
    Case("gqa_1", {"num_key_value_heads": 4}),
    Case("gqa_4", {"num_key_value_heads": 1}),
    Case("gqa_8", {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 40}),
    Case("wide_heads", {"hidden_size": 16, "head_dim": 32}),
    Case("narrow_heads", {"hidden_size": 64, "head_dim": 8}),
    Case("tied", {"tie_word_embeddings": True}),
]


def load(folder: Path, fields: dict[str, Any], weights: dict[str, Tensor], **kw: Any) -> NLDModel:
    return load_model(write_checkpoint(folder, fields, weights, **kw), "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32_logits(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = config_fields(**case.changes)
    weights = random_weights(fields)
    (tokens,) = random_tokens(fields, 50)
    expected = their_logits(theirs(fields, weights, torch.float32), tokens, case.first_position)
    actual = our_logits(load(tmp_path, fields, weights), tokens, case.first_position)
    assert relative_error(actual, expected.double()) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_float32_logits_of_random_configs(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 8]))
    fields = config_fields(
        vocab_size=draw(st.integers(8, 130)),
        hidden_size=draw(st.integers(1, 12)) * 4,
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.integers(1, 20)) * 2,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters=YARN
        | {
            "factor": draw(st.sampled_from([16.0, 0.25, 4.0, 1.0])),
            "rope_theta": draw(st.sampled_from([1e4, 1e6])),
            "original_max_position_embeddings": draw(st.sampled_from([32, 1000, 16384])),
            "llama_4_scaling_beta": draw(st.sampled_from([0.0, 0.1])),
        },
    )
    torch.manual_seed(draw(st.integers(0, 2**31)))
    weights = random_weights(fields)
    (tokens,) = random_tokens(fields, draw(st.integers(1, 40)))
    first = draw(st.sampled_from([0, 25, 16370, 40_000]))
    chunk = draw(st.integers(1, 40))
    expected = their_logits(theirs(fields, weights, torch.float32), tokens, first)
    model = load(tmp_path_factory.mktemp("config"), fields, weights)
    assert relative_error(our_logits(model, tokens, first, chunk), expected.double()) <= 1e-5


@pytest.mark.parametrize("case", CASES[:8], ids=lambda c: c.name)
def test_bfloat16_error(case: Case, tmp_path: Path) -> None:
    """Judged by the exact logits of the same bfloat16 weights; both average over many logits."""
    torch.manual_seed(0)
    fields = config_fields(
        **{"hidden_size": 64, "head_dim": 32, "torch_dtype": "bfloat16"} | case.changes
    )
    weights = random_weights(fields, torch.bfloat16)
    (tokens,) = random_tokens(fields, 64)
    positions = torch.arange(case.first_position, case.first_position + 64)
    exact = plain_logits(fields, weights, tokens, causal(64), positions=positions)
    model = load(tmp_path, fields, weights)
    assert model.dtype == torch.bfloat16
    ours = our_logits(model, tokens, case.first_position).double() - exact
    reference = theirs(fields, weights, torch.bfloat16)
    other = their_logits(reference, tokens, case.first_position).double() - exact
    assert 0 < ours.square().mean().sqrt() <= 2 * other.square().mean().sqrt()
    assert ours.abs().max() <= 2 * other.abs().max()


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
NATIVE = {
    "ministral3": transformers.Ministral3Config(
        **SIZES, head_dim=16, rope_parameters=dict(YARN), sliding_window=None
    ),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_3.2": transformers.LlamaConfig(
        **SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
}


@pytest.mark.parametrize("family", NATIVE)
def test_native_layouts(family: str, tmp_path: Path) -> None:
    """Checkpoints that transformers itself wrote, in mode ar; other modes say what is missing."""
    torch.manual_seed(0)
    other = transformers.AutoModelForCausalLM.from_config(NATIVE[family]).float().eval()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file(), "sharded, as large ones are"
    model = load_model(tmp_path, "cpu")
    (tokens,) = random_tokens({"vocab_size": 61}, 50)
    expected = their_logits(other, tokens, 100)
    assert relative_error(our_logits(model, tokens, 100), expected.double()) <= 1e-5
    emitted = nld_cuda.generate(
        model, [tokens.tolist()], "ar", max_new_tokens=12, eos_token_id=()
    ).tokens[0]
    said = other.generate(tokens[None], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert emitted == said[0, 50:].tolist()
    for mode in ("linear_spec", "quadratic_spec", "diffusion"):
        with pytest.raises(ValueError, match=f"mask_token_id must be given in mode {mode}, .*ar"):
            nld_cuda.generate(model, [[1, 2]], mode, max_new_tokens=2)


def test_native_layouts_that_are_refused(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**SIZES, sliding_window=4096)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"sliding_window 4096 is not supported"):
        load_model(tmp_path, "cpu")


@pytest.mark.parametrize("rank,alpha", [(4, 16), (8, 3)])
def test_lora_equals_peft(rank: int, alpha: int, tmp_path: Path) -> None:
    """The adapter is written by peft itself: its names, its file, its config."""
    torch.manual_seed(0)
    fields = config_fields()
    weights = random_weights(fields)
    base = theirs(fields, weights, torch.float32)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["o_proj"], bias="none", task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(base, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.5)
    folder = write_checkpoint(tmp_path, fields, weights)
    adapted.save_pretrained(folder / "linear_spec_lora")
    model = load_model(folder, "cpu")
    assert model.has_lora
    (tokens,) = random_tokens(fields, 40)
    on, off = our_logits(model, tokens, use_lora=True), our_logits(model, tokens)
    assert relative_error(on, their_logits(adapted, tokens).double()) <= 1e-5
    with adapted.disable_adapter():
        assert relative_error(off, their_logits(adapted, tokens).double()) <= 1e-5
    assert relative_error(on, off.double()) > 0.01, "the adapter must matter in this test"


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), block=st.integers(2, 9), loudness=st.sampled_from([0.1, 1.0]))
def test_lora_never_changes_what_is_said(
    seed: int, block: int, loudness: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Only how much of each draft is accepted."""
    torch.manual_seed(seed)
    fields = config_fields(vocab_size=23, num_hidden_layers=2)
    weights = random_weights(fields)
    weights["diffusion_head.weight"] *= 3  # no argmax hangs on rounding
    lora = {name: t * loudness for name, t in random_lora(fields, rank=3).items()}
    model = load(tmp_path_factory.mktemp("lora"), fields, weights, lora=lora)
    prompts = [t.tolist() for t in random_tokens(fields, 4, 9)]
    options = {"max_new_tokens": 20, "eos_token_id": ()}
    expected = nld_cuda.generate(model, prompts, "ar", **options).tokens
    for lora_on in (True, False):
        options |= {"block_length": block, "lora": lora_on}
        assert nld_cuda.generate(model, prompts, "linear_spec", **options).tokens == expected
