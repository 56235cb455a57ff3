"""Reads `quantization_config` of config.json: how the matrices of a checkpoint are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nld_cuda.model.fields import Fields

DYNAMIC, STATIC = "dynamic", "static"


@dataclass(frozen=True)
class Int4Config:
    """4-bit weights of a checkpoint: symmetric, one scale for a group of inputs.

    Attributes:
        format: "compressed-tensors" (pack-quantized), "gptq" or "gptq_v2".
        group_size: inputs that share a scale; None: all inputs of an output.
    """

    format: str
    group_size: int | None


@dataclass(frozen=True)
class Fp8Config:
    """Weights of a checkpoint in float8_e4m3fn, and how it wants activations rounded.

    Attributes:
        format: "compressed-tensors" (float-quantized) or "fp8" (Mistral's and DeepSeek's layout).
        weights: what shares a scale: "tensor", "channel" (an output) or "block".
        block: outputs and inputs of a block, None unless `weights` is "block".
        activations: "dynamic" (a scale per token, from its largest magnitude), "static" (a stored
            scale per matrix), None: not rounded.
    """

    format: str
    weights: str
    block: tuple[int, int] | None = None
    activations: str | None = None


def read_quantization(read: Fields) -> Int4Config | Fp8Config | None:
    """Accept the formats we read; refuse what would be computed otherwise, by the field's name."""
    read.supported("compression_config", (None,))  # what it was called once
    fields = read.object("quantization_config")
    if fields is None:
        return None
    fields.supported("quant_method", ("compressed-tensors", "gptq", "fp8"), required=True)
    fields.supported("kv_cache_scheme", (None,))
    if fields.values["quant_method"] == "gptq":
        return _gptq(fields)
    if fields.values["quant_method"] == "fp8":
        return _fp8(fields)
    return _compressed_tensors(fields)


def _gptq(fields: Fields) -> Int4Config:
    fields.supported("bits", (4,), required=True)
    fields.supported("sym", (True,))
    fields.flag("desc_act", default=False)
    fields.supported("checkpoint_format", ("gptq", "gptq_v2"))
    return Int4Config(fields.get("checkpoint_format", "gptq"), _group_size(fields))


def _fp8(fields: Fields) -> Fp8Config:
    fields.supported("fmt", ("e4m3", "float8_e4m3fn"))
    fields.supported("scale_fmt", ("float",))
    fields.supported("activation_scheme", (DYNAMIC, STATIC))
    activations = fields.get("activation_scheme", DYNAMIC)
    if fields.get("weight_block_size") is None:
        return Fp8Config("fp8", "tensor", None, activations)
    return Fp8Config("fp8", "block", _block(fields, "weight_block_size"), activations)


def _compressed_tensors(fields: Fields) -> Int4Config | Fp8Config:
    known = ("pack-quantized", "float-quantized", "naive-quantized")
    fields.supported("format", known, required=True)
    fields.supported("sparsity_config", (None, {}))
    fields.supported("transform_config", (None, {}))
    if fields.object("config_groups") is None:
        fields.required("config_groups", None)
    groups = fields.object("config_groups")
    assert groups is not None
    read = _int4_group if fields.values["format"] == "pack-quantized" else _fp8_group
    found = []
    for name in groups.values:
        group = groups.object(name)
        weights = group and group.object("weights")
        if group is None or weights is None:
            groups.fail(name, "be an object with weights", groups.values[name])
        group.supported("format", (fields.values["format"],))
        group.supported("output_activations", (None,))
        found.append(read(group, weights))
    if len(set(found)) != 1:
        fields.fail("config_groups", "store all matrices alike", found)
    return found[0]


def _int4_group(group: Fields, weights: Fields) -> Int4Config:
    group.supported("input_activations", (None,))
    weights.supported("num_bits", (4,), required=True)
    weights.supported("type", ("int",))
    weights.supported("symmetric", (True,))
    weights.supported("strategy", ("group", "channel"), required=True)
    weights.supported("actorder", (None, "static", "weight"))  # stored in the given order
    is_channel = weights.values["strategy"] == "channel"
    return Int4Config("compressed-tensors", None if is_channel else _group_size(weights))


def _fp8_group(group: Fields, weights: Fields) -> Fp8Config:
    _check_fp8(weights)
    weights.supported("dynamic", (False,))
    weights.supported("strategy", ("tensor", "channel", "block"), required=True)
    strategy = weights.values["strategy"]
    block = _block(weights, "block_structure") if strategy == "block" else None
    inputs = group.object("input_activations")
    if inputs is None:
        return Fp8Config("compressed-tensors", strategy, block)
    _check_fp8(inputs)
    inputs.supported("dynamic", (True, False))
    if inputs.get("dynamic", False):
        inputs.supported("strategy", ("token", "tensor", "group"))
        return Fp8Config("compressed-tensors", strategy, block, DYNAMIC)
    inputs.supported("strategy", ("tensor",))
    return Fp8Config("compressed-tensors", strategy, block, STATIC)


def _check_fp8(fields: Fields) -> None:
    fields.supported("num_bits", (8,), required=True)
    fields.supported("type", ("float",), required=True)
    fields.supported("symmetric", (True,))


def _block(fields: Fields, name: str) -> tuple[int, int]:
    value: Any = fields.required(name, None)
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in value):
        fields.fail(name, "be two integers >= 1", value)
    return value[0], value[1]


def _group_size(fields: Fields) -> int | None:
    return None if fields.get("group_size") == -1 else fields.count("group_size")
