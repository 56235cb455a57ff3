"""Reads and checks config.json: what the forward pass and the decode loops need, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nld_cuda.model.fields import Fields
from nld_cuda.model.json_files import has_file, read_json_object
from nld_cuda.model.quantization import Fp8Config, Int4Config, read_quantization
from nld_cuda.model.vision_config import VisionConfig, read_vision_config

TRI_MODE_VISION_TYPE = "nemotron_labs_diffusion_vlm"
TRI_MODE_TYPES = ("nemotron_labs_diffusion", TRI_MODE_VISION_TYPE)
# The same layers without a mask token, in transformers' own layout: mode ar only.
CAUSAL_TYPES = ("ministral3", "mistral", "llama")
# Of these alone the defaults of older files, which leave fields out, are the same everywhere.
OLD_TYPES = ("mistral", "llama")
# With a vision tower; the fields of the text are in an object of their own or among the rest.
CAUSAL_VISION_TYPE = "mistral3"
MOST_LAYERS = 10_000  # no file holds the tensors of more
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Fields that change the computation, with the only values computed here (absent is fine too).
FIXED_FIELDS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu",)),
    ("attention_bias", (False,)),
    ("mlp_bias", (False,)),
    ("sliding_window", (None,)),
    ("use_qk_norm", (False,)),
    ("dlm_paradigm", ("bidirectional",)),
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding and query scale; see rope.py for the formulas.

    Attributes:
        kind: "default", "linear", "yarn" or "llama3".
        theta: base of the frequencies.
        rotary_dim: leading elements of a head that are rotated; even, at most head_dim.
        factor: stretch of the context; below 1 is legal (the published 3B base model has 0.25).
        original_len: context length in tokens before stretching; also the query scale's period.
        low_freq_factor, high_freq_factor: rotations over `original_len` at which llama3 ends and
            starts to stretch.
        beta_fast, beta_slow: rotations over `original_len` at which yarn starts and ends mixing.
        mscale, mscale_all_dim, attention_factor: yarn's factor on cos and sin.
        truncate: whether yarn rounds its mixing range to whole frequencies.
        query_scale_beta: llama-4 query scale; 0 switches it off.
    """

    kind: str
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_len: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    query_scale_beta: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one checkpoint, checked.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers: as in config.json.
        num_heads, num_kv_heads, head_dim: heads; head_dim is never derived from hidden_size.
        rms_norm_eps: epsilon of every RMSNorm.
        max_position_embeddings: tokens the model is made for, prompt and output together.
        tie_word_embeddings: the head is the embedding matrix.
        dtype: the checkpoint's own dtype, None when config.json does not say.
        mask_token_id: token that stands for a hidden one, inside the vocabulary; None where the
            model knows no such token and decodes in mode ar only.
        bos_token_id, pad_token_id: None when config.json does not say.
        eos_token_ids: every id that ends a text, possibly none.
        block_size: diffusion block length of the training, the default of the decode modes.
        rope: rotary embedding.
        quantization: how matrices are stored, None: dense.
        vision: the vision tower, None for a model of text alone.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: torch.dtype | None
    mask_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    block_size: int
    rope: RopeConfig
    quantization: Int4Config | Fp8Config | None = None
    vision: VisionConfig | None = None

    @property
    def q_size(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all key heads of one token."""
        return self.num_kv_heads * self.head_dim

    @staticmethod
    def from_file(path: str | Path) -> ModelConfig:
        """Read a config.json, or the one inside a checkpoint folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no JSON object, or a field is missing or breaks its rule; the
                message names file, field, rule and value.
            NotImplementedError: the field asks for a computation this package does not have.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        return ModelConfig.from_dict(read_json_object(file), str(file))

    @staticmethod
    def from_dict(fields: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Check the fields of a config.json; `source` names it in errors. Raises as `from_file`."""
        outer = Fields(fields, source)
        kinds = (*TRI_MODE_TYPES, *CAUSAL_TYPES, CAUSAL_VISION_TYPE)
        outer.supported("model_type", kinds, required=True)
        is_tri_mode = fields["model_type"] in TRI_MODE_TYPES
        has_vision = fields["model_type"] in (TRI_MODE_VISION_TYPE, CAUSAL_VISION_TYPE)
        if not has_vision:
            outer.supported("vision_config", (None,))
        read = _text_fields(outer) if has_vision else outer
        for name, values in FIXED_FIELDS:
            read.supported(name, values)
        num_heads = read.count("num_attention_heads")
        num_kv_heads = read.count("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            read.fail(
                "num_key_value_heads", f"divide num_attention_heads {num_heads}", num_kv_heads
            )
        hidden_size = read.count("hidden_size")
        # Files of the causal families may leave it out; that of a tri-mode model never follows
        # from the other two.
        derived = None if is_tri_mode or hidden_size % num_heads else hidden_size // num_heads
        head_dim = read.count("head_dim", default=derived)
        vocab_size = read.count("vocab_size")
        max_positions = read.count("max_position_embeddings")
        default_eps = 1e-6 if read.get("model_type") in OLD_TYPES else 1e-5
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=read.count("intermediate_size"),
            num_layers=read.count("num_hidden_layers", most=MOST_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", default=default_eps, minimum=0.0),
            max_position_embeddings=max_positions,
            tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
            dtype=_dtype(read),
            mask_token_id=read.token("mask_token_id", vocab_size, required=is_tri_mode),
            bos_token_id=read.token("bos_token_id", vocab_size),
            pad_token_id=read.token("pad_token_id", vocab_size),
            eos_token_ids=_eos_token_ids(read, vocab_size),
            block_size=read.count("block_size", default=min(32, max_positions), most=max_positions),
            rope=_rope(read, head_dim, max_positions),
            quantization=read_quantization(read),
            vision=read_vision_config(outer, vocab_size, is_tri_mode) if has_vision else None,
        )


def _text_fields(outer: Fields) -> Fields:
    """The fields of the text where they may be in `text_config`; those beside it come first."""
    values = outer.get("text_config")
    if values is None:
        return outer
    if not isinstance(values, dict):
        outer.fail("text_config", "be an object", values)
    inner = Fields(values, outer.source, "text_config.")
    inner.supported("model_type", (*TRI_MODE_TYPES, *CAUSAL_TYPES), required=True)
    beside = {k: v for k, v in outer.values.items() if v is not None and k != "model_type"}
    return Fields({**values, **beside}, outer.source, "text_config.")


def _dtype(read: Fields) -> torch.dtype | None:
    found = None
    for name in ("torch_dtype", "dtype"):  # the second is the newer spelling
        value = read.get(name)
        if value is None:
            continue
        if not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES:
            read.fail(name, f"be one of {', '.join(DTYPES)}", value)
        named = DTYPES[value.removeprefix("torch.")]
        if found not in (None, named):
            read.fail(name, f"agree with torch_dtype ({found})", value)
        found = named
    return found


def _eos_token_ids(read: Fields, vocab_size: int) -> tuple[int, ...]:
    value = read.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            read.fail("eos_token_id", f"hold token ids in [0, {vocab_size})", value)
    return tuple(dict.fromkeys(ids))


def generation_eos_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids that end a text by generation_config.json, none where a folder has no such file.

    Raises:
        ValueError: the file is damaged, or names an id outside the vocabulary.
    """
    file = folder / "generation_config.json"
    if not has_file(file):
        return ()
    return _eos_token_ids(Fields(read_json_object(file), str(file)), vocab_size)


def _rope(read: Fields, head_dim: int, max_positions: int) -> RopeConfig:
    """Merge rope_parameters, its older name rope_scaling, and a top-level rope_theta."""
    merged: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        group = read.get(name, {})
        if not isinstance(group, dict):
            read.fail(name, "be an object", group)
        for key, value in group.items():
            key = "rope_type" if key == "type" else key
            if value is None:
                continue
            if merged.setdefault(key, value) != value:
                read.fail(f"{name}.{key}", f"agree with rope_parameters ({merged[key]!r})", value)
    for key in ("rope_theta", "partial_rotary_factor"):
        value = read.get(key)
        if value is not None and merged.setdefault(key, value) != value:
            read.fail(key, f"agree with rope_parameters ({merged[key]!r})", value)
    rope = Fields(merged, read.source, "rope_parameters.")
    rope.supported("rope_type", ROPE_TYPES)
    kind = rope.required("rope_type", None if "factor" in merged else "default")
    rotary_part = rope.number("partial_rotary_factor", default=1.0, minimum=0.0)
    rotary_dim = int(head_dim * rotary_part) if rotary_part <= 1 else head_dim + 1
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        rule = f"give an even number of rotated elements in [2, {head_dim}] of head_dim {head_dim}"
        rope.fail("partial_rotary_factor", rule, merged.get("partial_rotary_factor", 1.0))
    low_freq_factor = rope.number("low_freq_factor", default=1.0, minimum=0.0)
    high_freq_factor = rope.number("high_freq_factor", default=4.0, minimum=0.0)
    if high_freq_factor <= low_freq_factor:
        rope.fail("high_freq_factor", f"be > low_freq_factor {low_freq_factor}", high_freq_factor)
    beta = rope.optional_number("llama_4_scaling_beta") or 0.0
    default_theta = 10000.0 if read.get("model_type") in OLD_TYPES else None
    original_len = rope.get("original_max_position_embeddings")
    if original_len is None and (kind in ("yarn", "llama3") or beta):
        original_len = max_positions
    return RopeConfig(
        kind=kind,
        theta=rope.number("rope_theta", default=default_theta, minimum=1.0),
        rotary_dim=rotary_dim,
        factor=1.0 if kind == "default" else rope.number("factor", minimum=0.0),
        original_len=0 if original_len is None else rope.count(
            "original_max_position_embeddings", default=max_positions
        ),
        beta_fast=rope.number("beta_fast", default=32.0, minimum=0.0),
        beta_slow=rope.number("beta_slow", default=1.0, minimum=0.0),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        attention_factor=rope.optional_number("attention_factor"),
        truncate=rope.flag("truncate", default=True),
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        query_scale_beta=beta,
    )  # fmt: skip
