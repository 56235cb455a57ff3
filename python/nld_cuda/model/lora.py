"""Loads the draft adapter (`linear_spec_lora/`, PEFT layout): a low-rank side path of o_proj."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from nld_cuda.model.config import ModelConfig
from nld_cuda.model.fields import Fields
from nld_cuda.model.json_files import has_file, read_json_object
from nld_cuda.model.linear import Lora
from nld_cuda.model.tensor_files import Piece, TensorFiles
from nld_cuda.parallel.shard import Shard

ADAPTER_FOLDER = "linear_spec_lora"
_CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"
_KEY = "base_model.model.encoder.layers.{i}.self_attn.o_proj.lora_{part}.weight"

# Fields of adapter_config.json that change the computation, with the values computed here.
_FIXED_FIELDS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("peft_type", ("LORA",)),
    ("target_modules", (["o_proj"], "o_proj")),
    ("bias", (None, "none")),
    ("use_dora", (None, False)),
    ("lora_bias", (None, False)),
    ("fan_in_fan_out", (None, False)),
    ("rank_pattern", (None, {})),
    ("alpha_pattern", (None, {})),
    ("modules_to_save", (None, [])),
    ("layers_to_transform", (None, [])),
)


def load_lora(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard | None = None,
) -> list[Lora]:
    """Load one side path per layer.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        config: of the base model, all of it.
        device, dtype: of the base model's weights.
        shard: read the columns of `a` that belong to its heads only.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a field is missing or wrong; tensors are unknown, missing or misshapen.
        NotImplementedError: another kind of adapter, or other modules than o_proj.
    """
    rank, scale = _read_config(folder / _CONFIG_NAME)
    weights = folder / _WEIGHTS_NAME
    if not has_file(weights):
        raise FileNotFoundError(f"{folder}: must hold {_WEIGHTS_NAME}, found none")
    files = TensorFiles([weights], _canonical_key)
    shapes = {"A": (rank, config.q_size), "B": (config.hidden_size, rank)}
    keys = {
        (i, part): _KEY.format(i=i, part=part) for i in range(config.num_layers) for part in shapes
    }
    files.check({key: shapes[part] for (_, part), key in keys.items()}, lambda _: False)
    own = Piece.whole(shapes["A"])
    if shard is not None:
        own = Piece(shapes["A"], (0, shard.begins["q"]), (rank, shard.sizes["q"]))
    loras = []
    for i in range(config.num_layers):
        a, b = (torch.empty(s, dtype=dtype, device=device) for s in (own.size, shapes["B"]))
        files.copy_to(keys[i, "A"], a, own)
        files.copy_to(keys[i, "B"], b)
        loras.append(Lora(a, b, scale))
    return loras


def _canonical_key(name: str) -> str:
    # An adapter trained on a renamed model has the renamed prefix.
    return name.replace("base_model.model.model.layers.", "base_model.model.encoder.layers.", 1)


def _read_config(file: Path) -> tuple[int, float]:
    """Return rank and scale."""
    if not has_file(file):
        raise FileNotFoundError(f"{file.parent}: must hold {file.name}, found none")
    fields = read_json_object(file)
    for name, values in _FIXED_FIELDS:
        if fields.get(name) not in values:
            raise NotImplementedError(
                f"{file}: {name} {json.dumps(fields.get(name))} is not supported, only "
                + " or ".join("absent" if value is None else json.dumps(value) for value in values)
            )
    read = Fields(fields, str(file))
    rank, alpha = read.count("r"), read.number("lora_alpha")
    by_root = read.flag("use_rslora", default=False)
    return rank, alpha / math.sqrt(rank) if by_root else alpha / rank
