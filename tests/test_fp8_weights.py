"""fp8 weights: formats against other packages, loading, writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import NaiveQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

import nld_cuda
import tiny_vision
from compare import assert_equal
from model_session import random_tokens, relative_error
from nld_cuda import cli
from nld_cuda.model import ModelConfig, NLDModel, fp8, load_model
from nld_cuda.model.fp8 import Fp8Matrix
from nld_cuda.quantize import quantize
from quantized_cases import (
    SIDES,
    assert_parts_make_up,
    assert_transformers_reads_alike,
    llama_weights,
    logits_of,
)
from tiny_model import config_fields, random_lora, random_weights, write_checkpoint

TINY = nld_cuda.api.ASSETS / "nld-tiny"


# ---- checkpoints ---------------------------------------------------------------------------------

KIND = {"num_bits": 8, "type": "float", "symmetric": True}
DYNAMIC = KIND | {"strategy": "token", "dynamic": True}
STATIC = KIND | {"strategy": "tensor", "dynamic": False}


def compressed_config(weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"weights": KIND | weights, "input_activations": inputs, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": group}, "ignore": ["re:.*diffusion_head", "lm_head"],
    }  # fmt: skip


def mistral_config(scheme: str = "static", block: list[int] | None = None) -> dict[str, Any]:
    return {
        "quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": block,
        "dequantize": False, "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip


def fp8_tensors(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The matrices of the layers in fp8, as `config` says; random scales, also of inputs."""
    is_mistral = config["quant_method"] == "fp8"
    block = config.get("weight_block_size")
    strategy, has_input = "block" if block else "tensor", config.get("activation_scheme")
    if not is_mistral:
        group = config["config_groups"]["group_0"]
        strategy, block = group["weights"]["strategy"], group["weights"].get("block_structure")
        has_input = "static" if group["input_activations"] == STATIC else None
    tensors = {}
    for name, weight in weights.items():
        if weight.dim() != 2 or ".layers." not in name:
            tensors[name] = weight.bfloat16()
            continue
        out, inputs = weight.shape
        grid = {"tensor": (1, 1), "channel": (out, 1)}.get(strategy)
        grid = grid or (-(-out // block[0]), -(-inputs // block[1]))
        scales = torch.rand(grid) / 500 + 0.002
        tensors[name] = torch.randint(-100, 100, (out, inputs)).float().to(fp8.DTYPE)
        shape = grid if strategy != "tensor" else () if is_mistral else (1,)
        tensors[f"{name}_scale_inv" if is_mistral else f"{name}_scale"] = scales.view(shape)
        if has_input == "static":
            suffix = "activation_scale" if is_mistral else "input_scale"
            tensors[name.removesuffix("weight") + suffix] = (torch.rand(()) / 50 + 0.03).view(
                () if is_mistral else (1,)
            )
    return tensors


def write_fp8(folder: Path, config: dict[str, Any], shards: int = 1, **sides: int) -> Path:
    fields = config_fields(**{**SIDES, **sides}, torch_dtype="bfloat16")
    tensors = fp8_tensors(random_weights(fields), config)
    return write_checkpoint(
        folder, fields | {"quantization_config": config}, tensors, shards=shards
    )


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


BLOCKS = {"strategy": "block", "block_structure": [40, 48]}


@pytest.mark.parametrize(
    "config",
    [
        compressed_config({"strategy": "channel"}, DYNAMIC),
        compressed_config({"strategy": "tensor"}, STATIC),
        compressed_config({"strategy": "channel"}, None),
        compressed_config(BLOCKS, DYNAMIC | {"strategy": "group", "group_size": 48}),
        mistral_config(),
        mistral_config("dynamic", [32, 32]),
    ],
    ids=["channel", "static", "weights only", "blocks", "mistral", "deepseek"],
)
def test_checkpoints(config: dict[str, Any], tmp_path: Path) -> None:
    """Weights are those that the other packages expand; in bfloat16 they stay in fp8."""
    torch.manual_seed(0)
    folder = write_fp8(tmp_path, config, shards=3)
    assert_parts_make_up(folder)
    stored = stored_tensors(folder)
    dense = load_model(folder, "cpu", "float32")

    def expand(part: str) -> Tensor:
        name = f"encoder.layers.1.{part}.weight"
        if config["quant_method"] == "fp8":
            scales = stored[name + "_scale_inv"]
            for dim, block in enumerate(config["weight_block_size"] or ()):
                scales = scales.repeat_interleave(block, dim)
            wide = scales[:, : stored[name].shape[1]] if scales.dim() else scales
            return stored[name].float() * wide
        weights = config["config_groups"]["group_0"]["weights"]
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        tensors = {"weight": stored[name], "weight_scale": stored[name + "_scale"]}
        return NaiveQuantizationCompressor.decompress(tensors, scheme)["weight"]

    layer = dense.layers[1]
    qkv = torch.cat([expand(f"self_attn.{p}_proj") for p in "qkv"])
    for ours, theirs in ((layer.qkv, qkv), (layer.down, expand("mlp.down_proj"))):
        assert isinstance(ours, Tensor)
        assert_equal(ours, theirs.float(), "expanded")
    model = load_model(folder, "cpu")
    assert model.dtype == torch.bfloat16 and isinstance(model.head, Tensor)
    has_blocks = "block_structure" in str(config) or bool(config.get("weight_block_size"))
    assert isinstance(model.layers[0].down, Tensor if has_blocks else Fp8Matrix)
    (tokens,) = random_tokens(SIDES, 20)
    exact = logits_of(dense, tokens).double()
    expanded = load_model(folder, "cpu", products="dense")
    assert isinstance(expanded.layers[0].down, Tensor)
    error = relative_error(logits_of(expanded, tokens), exact)
    assert error <= 0.05 and relative_error(logits_of(model, tokens), exact) <= 1.5 * error
    if has_blocks:
        with pytest.raises(ValueError, match="products must be auto or dense, fp8 needs"):
            load_model(folder, "cpu", products="fp8")
        return
    rounded = load_model(folder, "cpu", products="fp8")
    down = rounded.layers[0].down
    assert isinstance(down, Fp8Matrix) and down.scaled_product is not None
    is_static = any(name.endswith(("input_scale", "activation_scale")) for name in stored)
    assert (down.input_scale is not None) == is_static
    if is_static:
        suffix = "activation_scale" if config["quant_method"] == "fp8" else "input_scale"
        parts = [stored[f"encoder.layers.0.self_attn.{p}_proj.{suffix}"].view(()) for p in "qkv"]
        assert rounded.layers[0].qkv.input_scale == max(parts), "the largest cuts nothing off"
    assert error < relative_error(logits_of(rounded, tokens), exact) <= 0.2


def test_ministral_3_as_published(tmp_path: Path) -> None:
    """With a tower, tied, in bfloat16 but for the layers; transformers expands the same weights."""
    torch.manual_seed(0)
    fields = tiny_vision.vision_fields(
        hidden_size=64, intermediate_size=96, tie_word_embeddings=True
    )
    weights = tiny_vision.vision_weights(fields | {"tie_word_embeddings": False})
    del weights["diffusion_head.weight"]
    tiny_vision.theirs(fields, weights).save_pretrained(tmp_path)
    tensors = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        tensors[name] = weight.bfloat16()
        if weight.dim() == 2 and name.startswith("language_model.model.layers."):
            scale = (weight.abs().max() / 448).bfloat16()
            tensors[name] = (weight / scale.float()).clamp(-448, 448).to(fp8.DTYPE)
            tensors[name + "_scale_inv"] = scale
            tensors[name.replace("weight", "activation_scale")] = torch.tensor(0.02).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    config["quantization_config"] = mistral_config() | {"modules_to_not_convert": skipped}
    (tmp_path / "config.json").write_text(json.dumps(config))
    dense, model = load_model(tmp_path, "cpu", "float32"), load_model(tmp_path, "cpu")
    assert isinstance(model.layers[0].qkv, Fp8Matrix) and model.vision is not None
    assert model.head is model.embed
    other = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    for ours, expanded in llama_weights(dense, other.model.language_model):
        assert_equal(ours, expanded.float(), "expanded")


def test_shapes_that_torch_does_not_scale_are_widened(tmp_path: Path) -> None:
    """70 outputs, 36 inputs: activations cannot be rounded there, and are not."""
    torch.manual_seed(0)
    sides = {"hidden_size": 36, "intermediate_size": 35, "vocab_size": 61}
    folder = write_fp8(tmp_path, mistral_config(), **sides)
    model = load_model(folder, "cpu", products="fp8")
    matrices = [getattr(model.layers[0], name) for name in ("qkv", "o", "gate_up", "down")]
    assert all(isinstance(m, Fp8Matrix) and m.scaled_product is None for m in matrices)
    (tokens,) = random_tokens(sides, 9)
    exact = logits_of(load_model(folder, "cpu", "float32"), tokens).double()
    assert relative_error(logits_of(model, tokens), exact) <= 0.03
    half = load_model(folder, "cpu", "float16")
    assert not any(isinstance(w, Fp8Matrix) for w in half.weights())


def test_some_matrices_are_dense(tmp_path: Path) -> None:
    """Parts of a fused matrix that are stored dense make all of it dense; others stay in fp8."""
    torch.manual_seed(0)
    folder = write_fp8(tmp_path, compressed_config({"strategy": "channel"}, DYNAMIC))
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layers.0.self_attn.q_proj.weight"
    del tensors[name + "_scale"]
    tensors[name] = torch.randn(64, 64).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    layer = load_model(folder, "cpu").layers[0]
    assert isinstance(layer.qkv, Tensor) and isinstance(layer.o, Fp8Matrix)
    assert_equal(layer.qkv[:64], tensors[name], "q")
    k = name.replace("q_proj", "k_proj")
    expected = (tensors[k].float() * tensors[k + "_scale"]).bfloat16()
    assert_equal(layer.qkv[64:96], expected, "k")


def test_wrong_checkpoints(tmp_path: Path) -> None:
    folder = write_fp8(tmp_path, compressed_config({"strategy": "channel"}, STATIC))
    tensors = load_file(folder / "model.safetensors")
    base = "encoder.layers.0.self_attn.o_proj."

    def nan(codes: Tensor) -> Tensor:
        codes.view(torch.uint8)[3, 5] = 0xFF
        return codes

    for name, change, message in (
        ("weight_scale", None, r"missing \(1\): .*o_proj.weight_scale"),
        ("input_scale", None, r"missing \(1\): .*o_proj.input_scale"),
        ("weight_scale", lambda t: t[1:], r"weight_scale \[63, 1\], expected \[64, 1\]"),
        ("weight_scale", lambda t: t.int(), "o_proj.weight_scale I32, expected one of F64"),
        ("weight_scale", lambda t: -t, "weight_scale must hold positive finite scales, got -0"),
        ("weight", lambda t: t.bfloat16(), "o_proj.weight BF16, expected one of F8_E4M3"),
        ("weight", lambda t: t.to(torch.float8_e5m2), "weight F8_E5M2, expected one of F8_E4M3"),
        ("weight", nan, "o_proj.weight must hold finite numbers, got NaN"),
        ("k_scale", lambda _: torch.ones(1), r"unknown \(1\): .*o_proj.k_scale"),
    ):
        changed = dict(tensors)
        if change is None:
            del changed[base + name]
        else:
            changed[base + name] = change(tensors.get(base + name, torch.ones(1)).clone())
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_model(folder, "cpu")
    changed = tensors | {"encoder.embed_tokens.weight": torch.zeros(64, 64).to(fp8.DTYPE)}
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens.weight F8_E4M3, expected one of F64"):
        load_model(folder, "cpu")


def test_wrong_configs() -> None:
    channel = {"strategy": "channel"}
    group = compressed_config(channel, None)["config_groups"]["group_0"]
    int4 = {"num_bits": 4, "type": "int", "strategy": "channel"}
    for config, error, message in (
        (mistral_config("other"), NotImplementedError, 'activation_scheme "other" is'),
        (mistral_config(block=[128, 0]), ValueError, "weight_block_size must be two integers >= 1"),
        (mistral_config() | {"fmt": "e5m2"}, NotImplementedError, 'fmt "e5m2" is not supported'),
        (mistral_config() | {"quant_method": "awq"}, NotImplementedError, '"awq" is not supported'),
        (compressed_config(channel, DYNAMIC | {"dynamic": "local"}), NotImplementedError,
         "config_groups.group_0.input_activations.dynamic \"local\" is not supported"),
        (compressed_config(channel | {"num_bits": 4}, None), NotImplementedError, "num_bits 4 is"),
        (compressed_config({"strategy": "block"}, None), ValueError, "block_structure must"),
        (compressed_config(channel, None) | {"format": "int-quantized"}, NotImplementedError,
         'format "int-quantized" is not supported'),
        (compressed_config(channel, None) | {"kv_cache_scheme": KIND}, NotImplementedError,
         "quantization_config.kv_cache_scheme .* is not supported"),
        (compressed_config(channel, None) | {"config_groups": {}}, ValueError, "matrices alike"),
        (compressed_config(channel, None) | {"config_groups": {"a": ["Linear"]}}, ValueError,
         "config_groups.a must be an object"),
        (compressed_config(channel, None) | {"config_groups": {"a": group, "b": group | {
            "weights": KIND | {"strategy": "tensor"}}}}, ValueError, "store all matrices alike"),
        (compressed_config(channel, None) | {"config_groups": {"a": group | {"weights": int4}}},
         NotImplementedError, "a.weights.num_bits 4 is not supported, only 8"),
    ):  # fmt: skip
        fields = config_fields(**SIDES) | {"quantization_config": config}
        with pytest.raises(error, match=message):
            ModelConfig.from_dict(fields)


# ---- writing -------------------------------------------------------------------------------------


def test_quantized_llama_is_read_alike_by_transformers(tmp_path: Path) -> None:
    assert_transformers_reads_alike(tmp_path, 0.02, format="fp8")


@pytest.mark.parametrize("is_tied", [False, True])
def test_quantize_and_load(is_tied: bool, tmp_path: Path) -> None:
    """Memory halves, the adapter comes along, the logits stay near, all modes run."""
    torch.manual_seed(0)
    fields = config_fields(**SIDES, tie_word_embeddings=is_tied, torch_dtype="bfloat16")
    weights = random_weights(fields, torch.bfloat16)
    source = write_checkpoint(
        tmp_path / "a", fields, weights, shards=3, lora=random_lora(fields, 2)
    )
    target = tmp_path / "b"
    summary = quantize(source, target, format="fp8", head=not is_tied)
    assert summary.num_quantized == 14 + (not is_tied)
    written = json.loads((target / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == (["diffusion_head"] if is_tied else [])
    model, dense = load_model(target, "cpu"), load_model(source, "cpu")
    assert model.has_lora and isinstance(model.layers[0].qkv, Fp8Matrix)
    assert isinstance(model.head, Tensor) == is_tied
    assert model.num_parameters == dense.num_parameters

    def matrices(m: NLDModel) -> int:
        return m.num_bytes - 2 * (fields["vocab_size"] * 64 + 64 * 5 + 2 * 2 * 128)

    assert matrices(model) < 0.6 * matrices(dense)
    assert load_model(target, "cpu", products="dense").num_bytes == dense.num_bytes
    (tokens,) = random_tokens(fields, 20)
    exact = logits_of(load_model(source, "cpu", "float32"), tokens).double()
    assert relative_error(logits_of(model, tokens), exact) <= 0.25
    for mode in ("ar", "linear_spec", "quadratic_spec", "diffusion"):
        emitted = nld_cuda.generate(model, tokens.tolist(), mode, max_new_tokens=9)
        assert len(emitted.tokens[0]) > 0
    with pytest.raises(ValueError, match="is quantised already"):
        quantize(target, tmp_path / "c")


def test_errors(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="format must be int4 or fp8, got 'int8'"):
        quantize(TINY, tmp_path, format="int8")
    with pytest.raises(ValueError, match="group_size must be None for fp8, got 32"):
        quantize(TINY, tmp_path, format="fp8", group_size=32)
    with pytest.raises(ValueError, match="products must be auto, dense, fp8, got 'int4'"):
        nld_cuda.load("nld-tiny", products="int4")
    with pytest.raises(ValueError, match="products must be auto or dense, fp8 needs weights in"):
        nld_cuda.load("nld-tiny", products="fp8")
    with pytest.raises(SystemExit) as stop:
        cli.main(["quantize", str(TINY), str(tmp_path / "q"), "--format", "fp8"])
    assert stop.value.code == 0 and "28 matrices in fp8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="dtype must be bfloat16 for fp8 products"):
        nld_cuda.load(tmp_path / "q", dtype="float32", products="fp8")
    folder = write_fp8(tmp_path / "x", mistral_config())
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"of another dtype .14.: .*F8_E4M3, expected one of"):
        quantize(folder, tmp_path / "y", format="fp8")


@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_broken_sources(format: str, tmp_path: Path) -> None:
    fields = config_fields(**SIDES)
    weights = random_weights(fields)
    options: dict[str, Any] = {"format": format, "group_size": 32 if format == "int4" else None}
    name = "encoder.layers.1.self_attn.v_proj.weight"
    for value in (torch.inf, -torch.inf, torch.nan):
        weights[name][3, 7] = value
        source = write_checkpoint(tmp_path / "a", fields, weights)
        with pytest.raises(ValueError, match=r"a/model.safetensors: .*v_proj.weight must hold fin"):
            quantize(source, tmp_path / "b", **options)
    del weights[name], weights["encoder.norm.weight"]
    weights["encoder.more"] = torch.zeros(3)
    source = write_checkpoint(tmp_path / "a", fields, weights)
    with pytest.raises(ValueError, match=r"unknown \(1\): .*more; missing \(2\): .*v_proj.*norm"):
        quantize(source, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()
    with pytest.raises(TypeError, match="target must be a path, got NoneType"):
        quantize(source, None, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="head must be a bool, got 2"):
        quantize(source, tmp_path / "c", head=2, **options)  # type: ignore[arg-type]


def test_nld_tiny_keeps_its_accuracy(tmp_path: Path) -> None:
    """64 problems it was not trained on: at most one more wrong than in float32."""
    quantize(TINY, tmp_path / "int4", group_size=32)
    quantize(TINY, tmp_path / "fp8", format="fp8")
    problems = [json.loads(line) for line in (TINY / "heldout.jsonl").read_text().splitlines()]
    problems = problems[:: len(problems) // 64][:64]
    wrong = []
    for folder, products in (
        (TINY, "auto"), (tmp_path / "int4", "auto"), (tmp_path / "fp8", "auto"),
        (tmp_path / "fp8", "fp8"),
    ):  # fmt: skip
        result = nld_cuda.generate(
            nld_cuda.load(folder, device="cpu", products=products),
            [p["prompt"] for p in problems],
            "linear_spec",
            max_new_tokens=240,
        )
        assert result.text is not None
        pairs = zip(result.text, problems, strict=True)
        wrong.append(sum(text.strip() != p["answer"].strip() for text, p in pairs))
    assert max(wrong) <= wrong[0] + 1
