"""Random tiny checkpoints with a vision tower, and transformers' own model with their weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from nld_cuda.model.config import ModelConfig
from nld_cuda.model.vision import vision_shapes
from test_parity import SHARED_FIELDS
from tiny_model import config_fields, random_weights, write_checkpoint

IMAGE, BREAK, END = 10, 12, 13
# As the published tokenizer has them.
SPECIAL = {"<|image_start|>": 18, "<|image_pad|>": 19, "<|image_break|>": 20, "<|image_end|>": 21}
MISTRAL = {"[IMG]": IMAGE, "[IMG_BREAK]": BREAK, "[IMG_END]": END}


def vision_fields(**changes: Any) -> dict[str, Any]:
    """config.json in the published layout of the VLM; `changes` as in `config_fields`."""
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_channels": 3,
        "patch_size": 4,
        "image_size": 64,
        "hidden_act": "gelu",
    }
    own = {
        "model_type": "nemotron_labs_diffusion_vlm",
        "architectures": ["NemotronLabsDiffusionVLMModel"],
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
        "num_hidden_layers": 2,
    }
    return config_fields(
        **own | changes | {"vision_config": vision | changes.get("vision_config", {})}
    )


def vision_weights(fields: dict[str, Any], loud: float = 1.5) -> dict[str, Tensor]:
    """State dict with the published names, text and vision."""
    weights = random_weights(fields)
    for name, shape in vision_shapes(ModelConfig.from_dict(fields)).items():
        if len(shape) == 1:
            weights[name] = float("bias" not in name) + 0.3 * torch.randn(shape)
        else:
            weights[name] = torch.randn(shape) * loud / math.sqrt(math.prod(shape[1:]))
    weights["diffusion_head.weight"] *= 3  # no argmax hangs on rounding
    return weights


def write_tokenizer(folder: Path, special: dict[str, int], vocab_size: int) -> None:
    """tokenizer.json: a word `tN` for each id, but for the special tokens."""
    ids = {token: name for name, token in special.items()}
    vocab = {ids.get(i, f"t{i}"): i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_vision_checkpoint(
    folder: Path, fields: dict[str, Any], weights: dict[str, Tensor], special: dict[str, int]
) -> Path:
    write_checkpoint(folder, fields, weights)
    write_tokenizer(folder, special, fields["vocab_size"])
    return folder


def theirs(fields: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """transformers' Mistral 3 with the same weights."""
    text = transformers.Ministral3Config(
        **{name: fields[name] for name in SHARED_FIELDS},
        rope_parameters=dict(fields["rope_parameters"]),
        sliding_window=None,
        pad_token_id=None,
    )
    names = ("image_token_index", "spatial_merge_size", "vision_feature_layer")
    names += ("projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings")
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**fields["vision_config"]),
        text_config=text,
        **{name: fields[name] for name in names if name in fields},
    )
    model = transformers.Mistral3ForConditionalGeneration(config).float().eval()
    renamed = {}
    for name, tensor in weights.items():
        inner = name.removeprefix("encoder.")
        if not inner.startswith(("vision_tower.", "multi_modal_projector.")):
            inner = f"language_model.{inner}"
        renamed["lm_head.weight" if name == "diffusion_head.weight" else f"model.{inner}"] = tensor
    if fields["tie_word_embeddings"]:
        renamed["lm_head.weight"] = weights["encoder.embed_tokens.weight"]
    model.load_state_dict(renamed)
    return model


@torch.no_grad()
def their_logits(model: Any, ids: list[int], pixels: Sequence[Tensor]) -> Tensor:
    """Logits `[tokens, vocab]` of one laid-out prompt, its images as one padded batch."""
    images: dict[str, Tensor] = {}
    if pixels:
        sizes = torch.tensor([p.shape[1:] for p in pixels])
        batch = torch.zeros(len(pixels), 3, *sizes.amax(0).tolist())
        for row, p in zip(batch, pixels, strict=True):
            row[:, : p.shape[1], : p.shape[2]] = p
        images = {"pixel_values": batch, "image_sizes": sizes}
    logits: Tensor = model(torch.tensor([ids]), use_cache=False, **images).logits[0]
    return logits


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))
