"""Reading config.json: published values, spellings, and what the errors say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nld_cuda.model import ModelConfig
from nld_cuda.model.config import RopeConfig
from tiny_model import YARN, config_fields


def test_config_of_the_published_form() -> None:
    """Sizes, ids and rope of the 3B file; unused fields are no error."""
    fields = config_fields(
        hidden_size=3072,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=131072,
        mask_token_id=100,
        eos_token_id=11,
        block_size=32,
        dlm_loss_weight=None,
        ar_loss_weight=1.0,
        use_cache=False,
        attn_implementation="sdpa",
        torch_dtype="bfloat16",
    )
    config = ModelConfig.from_dict(fields)
    assert (config.q_size, config.kv_size, config.hidden_size) == (4096, 1024, 3072)
    assert (config.mask_token_id, config.eos_token_ids, config.block_size) == (100, (11,), 32)
    assert config.dtype == torch.bfloat16 and not config.tie_word_embeddings
    assert (config.rope.kind, config.rope.factor, config.rope.query_scale_beta) == (
        "yarn",
        16.0,
        0.1,
    )


def test_config_spellings() -> None:
    """Both names of the rope group and its type, a hoisted rope_theta, dtype, lists of EOS ids."""
    old = {
        name: value for name, value in YARN.items() if name not in ("rope_theta", "rope_type")
    } | {"type": "yarn"}
    fields = config_fields(
        rope_parameters=None,
        rope_scaling=old,
        rope_theta=1e6,
        torch_dtype=None,
        dtype="float16",
        eos_token_id=[2, 5, 2],
    )
    config = ModelConfig.from_dict(fields)
    assert config.rope == ModelConfig.from_dict(config_fields()).rope
    assert config.dtype == torch.float16 and config.eos_token_ids == (2, 5)
    both = config_fields(rope_scaling=YARN | {"type": "yarn"}, rope_theta=1e6)
    assert ModelConfig.from_dict(both).rope == config.rope
    assert ModelConfig.from_dict(config_fields(eos_token_id=None)).eos_token_ids == ()
    llama = config_fields(rope_parameters=None, model_type="llama")
    assert ModelConfig.from_dict(llama).rope == RopeConfig("default", 10000.0, 16)
    assert ModelConfig.from_dict(llama | {"rms_norm_eps": None}).rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"head_dim": None}, "head_dim must be given, it is missing"),
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, got 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be an integer >= 1, got 2.0"),
        ({"vocab_size": True}, "vocab_size must be an integer >= 1, got True"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads must divide num_attention_heads 4, got 3",
        ),
        ({"mask_token_id": -1}, r"mask_token_id must be a token id in \[0, 61\), got -1"),
        ({"mask_token_id": 61}, r"mask_token_id must be a token id in \[0, 61\), got 61"),
        ({"mask_token_id": None}, "mask_token_id must be given"),
        (
            {"eos_token_id": [2, 61]},
            r"eos_token_id must hold token ids in \[0, 61\), got \[2, 61\]",
        ),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be > 0, got 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        (
            {"torch_dtype": "int8"},
            "torch_dtype must be one of float32, bfloat16, float16, got 'int8'",
        ),
        ({"rope_parameters": YARN | {"factor": 0}}, "rope_parameters.factor must be > 0, got 0"),
        ({"rope_parameters": YARN | {"factor": None}}, "rope_parameters.factor must be given"),
        ({"rope_theta": 5.0}, "rope_theta must agree with rope_parameters"),
        (
            {"rope_scaling": {"factor": 2.0}},
            r"rope_scaling.factor must agree with rope_parameters \(16.0\), got 2.0",
        ),
        ({"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        ({"rope_parameters": None}, "rope_parameters.rope_theta must be given"),
        (
            {"rope_parameters": {k: v for k, v in YARN.items() if k != "rope_type"}},
            "rope_parameters.rope_type must be given",
        ),
        (
            {"rope_parameters": YARN | {"rope_theta": math.inf}},
            r"rope_theta must be 0 or of a magnitude in \[1e-30, 1e\+30\], got inf",
        ),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be 0 or of a magnitude .*, got nan"),
        ({"rope_parameters": YARN | {"mscale": -1}}, "rope_parameters.mscale must be >= 0, got -1"),
        (
            {"num_hidden_layers": 2**40},
            "num_hidden_layers must be at most 10000, got 1099511627776",
        ),
        ({"hidden_size": 2**31}, "hidden_size must be at most 2147483647, got 2147483648"),
        ({"block_size": 4097}, "block_size must be at most 4096, got 4097"),
        (
            {"dtype": "float16"},
            r"dtype must agree with torch_dtype \(torch.float32\), got 'float16'",
        ),
        (
            {"head_dim": 15},
            r"partial_rotary_factor must give an even number .* of head_dim 15, got 1.0",
        ),
    ],
)
def test_config_errors(changes: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_fields(**changes)))
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_file(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json") + ": ")


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"model_type": "qwen2"},
            'model_type "qwen2" is not supported, only "nemotron_labs_diffusion" or .*"ministral3"',
        ),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported, only "silu"'),
        ({"attention_bias": True}, "attention_bias true is not supported, only false"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported, only absent"),
        ({"dlm_paradigm": "block_diff"}, 'only "bidirectional"'),
        (
            {"quantization_config": {"quant_method": "awq"}},
            'quant_method "awq" is not supported, only "compressed-tensors" or "gptq"',
        ),
        (
            {"rope_parameters": YARN | {"rope_type": "longrope"}},
            '"longrope" is not supported, only "default" or "linear" or "yarn"',
        ),
    ],
)
def test_config_of_unsupported_models(changes: dict, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        ModelConfig.from_dict(config_fields(**changes))


def test_config_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ModelConfig.from_file(tmp_path)
    for text, message in (
        ("{", "must be a JSON file"),
        ("[1]", "must hold a JSON object, got list"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_file(tmp_path / "config.json")


def test_config_of_causal_families() -> None:
    """No mask token is asked for; a head_dim that is left out follows from the hidden size."""
    fields = config_fields(
        model_type="llama", mask_token_id=None, head_dim=None, hidden_size=48, block_size=None
    )
    config = ModelConfig.from_dict(fields)
    assert config.mask_token_id is None and config.head_dim == 12
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}
    with pytest.raises(ValueError, match=r"high_freq_factor must be > low_freq_factor 4.0, got 4"):
        ModelConfig.from_dict(fields | {"rope_parameters": llama3})
    with pytest.raises(ValueError, match="head_dim must be given"):
        ModelConfig.from_dict(fields | {"hidden_size": 50})
