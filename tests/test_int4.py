"""4-bit weights: formats against other packages, loading, writing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import nld_cuda
from compare import assert_equal
from model_session import random_tokens, relative_error
from nld_cuda import cli
from nld_cuda.model import int4, load_model
from nld_cuda.model.int4 import Int4Matrix
from nld_cuda.quantize import quantize
from quantized_cases import (
    SIDES,
    assert_parts_make_up,
    assert_transformers_reads_alike,
    logits_of,
)
from tiny_model import config_fields, random_lora, random_weights, write_checkpoint

TINY = nld_cuda.api.ASSETS / "nld-tiny"
CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_words_are_those_of_compressed_tensors(rows: int, count: int, seed: int) -> None:
    codes = torch.randint(16, (rows, count), generator=torch.Generator().manual_seed(seed))
    words = int4.pack_words(codes)
    assert_equal(words, pack_to_int32((codes - 8).to(torch.int8), 4), "words")
    theirs = (unpack_from_int32(words, 4, torch.Size((rows, count))) + 8).to(torch.uint8)
    assert_equal(int4.unpack_words(words, count), theirs, "codes")
    assert_equal(theirs, codes.to(torch.uint8), "codes again")


def gptq_words(codes: list[list[int]]) -> Tensor:
    """The published layout, bit by bit: 8 codes of a column in a word, the first one lowest."""
    rows = []
    for i in range(0, len(codes), 8):
        row = []
        for j in range(len(codes[0])):
            word = sum(codes[i + n][j] << 4 * n for n in range(8))
            row.append(word - 2**32 if word >= 2**31 else word)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32)


def gptq_tensors(name: str, codes: Tensor, scales: Tensor, stored_zero: int) -> dict[str, Tensor]:
    """A GPTQ linear layer of codes `[out, in]` and scales `[out, groups]`."""
    out, inputs = codes.shape
    zeros = [[stored_zero] * scales.shape[1] for _ in range(out)]
    base = name.removesuffix("weight")
    return {
        f"{base}qweight": gptq_words(codes.t().tolist()),
        f"{base}qzeros": gptq_words(zeros).t().contiguous(),
        f"{base}scales": scales.t().contiguous().half(),
        f"{base}g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // scales.shape[1]),
    }


def test_which_matrices_are_multiplied_in_4_bits() -> None:
    assert int4.can_multiply((32, 256), 128, CPU)
    for shape, group_size in (((24, 256), 128), ((32, 96), 64), ((32, 320), 16)):
        assert not int4.can_multiply(shape, group_size, CPU)
    cuda = torch.device("cuda")
    assert int4.can_multiply((8, 256), 64, cuda) and not int4.can_multiply((12, 256), 64, cuda)


def write_gptq(
    folder: Path, version: str, group_size: int = 32, changes: dict[str, Any] | None = None
) -> Path:
    """A checkpoint whose layers are quantised and whose head is not."""
    fields = config_fields(**SIDES, torch_dtype="float16")
    method = {
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True,
        "desc_act": False, "checkpoint_format": version,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, weight in random_weights(fields).items():
        if weight.dim() == 2 and ".layers." in name:
            codes, scales = int4.quantize(weight, group_size if group_size > 0 else weight.shape[1])
            tensors |= gptq_tensors(name, codes, scales, 7 if version == "gptq" else 8)
        else:
            tensors[name] = weight.half()
    return write_checkpoint(
        folder, fields | {"quantization_config": method | (changes or {})}, tensors
    )


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_checkpoints(version: str, group_size: int, tmp_path: Path) -> None:
    """In bfloat16 the matrices stay in 4 bits; in float32 they are expanded exactly."""
    torch.manual_seed(0)
    folder = write_gptq(tmp_path / "q", version, group_size)
    assert_parts_make_up(folder)
    model, dense = load_model(folder, "cpu"), load_model(folder, "cpu", "float32")
    assert model.dtype == torch.bfloat16 and dense.dtype == torch.float32
    small = [isinstance(w, Int4Matrix) for layer in model.layers for w in (layer.qkv, layer.down)]
    # 96 inputs in one group are no group size of torch's products
    assert small == ([True] * 4 if group_size == 32 else [True, False] * 2)
    stored = load_file(folder / "model.safetensors")
    base = "encoder.layers.1.mlp.down_proj."
    codes = torch.stack([stored[base + "qweight"] >> 4 * n & 15 for n in range(8)], dim=1).flatten(
        0, 1
    )  # [in, out]
    scales = stored[base + "scales"].float()[stored[base + "g_idx"].long()]
    assert_equal(dense.layers[1].down, ((codes - 8).float() * scales).t(), "down")
    (tokens,) = random_tokens(SIDES, 20)
    exact = logits_of(dense, tokens).double()
    in_16 = load_model(folder, "cpu", "float16")
    assert not any(isinstance(w, Int4Matrix) for w in in_16.weights())
    assert relative_error(logits_of(in_16, tokens), exact) <= 0.02
    assert relative_error(logits_of(model, tokens), exact) <= 0.1


def test_gptq_inputs_out_of_order(tmp_path: Path) -> None:
    """With act-order the groups of the inputs are stored: those matrices are expanded, exactly."""
    torch.manual_seed(0)
    folder = write_gptq(tmp_path, "gptq", changes={"desc_act": True})
    tensors = load_file(folder / "model.safetensors")
    base = "encoder.layers.1.mlp.down_proj."
    groups = tensors[base + "g_idx"] = tensors[base + "g_idx"][torch.randperm(96)]
    save_file(tensors, folder / "model.safetensors")
    assert_parts_make_up(folder)
    codes = int4.unpack_words(tensors[base + "qweight"].t(), 96).float() - 8
    expected = codes * tensors[base + "scales"].float().t()[:, groups.long()]
    down = load_model(folder, "cpu", "float32").layers[1].down
    assert isinstance(down, Tensor)
    assert_equal(down, expected, "down")
    model = load_model(folder, "cpu")
    assert isinstance(model.layers[1].down, Tensor) and isinstance(model.layers[0].down, Int4Matrix)
    assert_equal(model.layers[1].down, expected.bfloat16(), "rounded once")


def test_wrong_gptq_checkpoints(tmp_path: Path) -> None:
    folder = write_gptq(tmp_path, "gptq")
    tensors = load_file(folder / "model.safetensors")
    base = "encoder.layers.0.self_attn.o_proj."
    for name, change, error, message in (
        ("g_idx", lambda t: t + 1, ValueError, r"g_idx must hold groups in \[0, 2\), got 1 to 2"),
        ("scales", lambda t: t / 0, ValueError, "o_proj.scales must hold finite scales"),
        ("qzeros", lambda t: t + 1, NotImplementedError, r"must hold zeros of 8 .sym true., got 9"),
        ("qweight", lambda t: t[1:], ValueError, r"o_proj.qweight \[7, 64\], expected \[8, 64\]"),
        ("scales", lambda t: t.int(), ValueError, "o_proj.scales I32, expected one of F64"),
    ):
        changed = tensors | {base + name: change(tensors[base + name]).contiguous()}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(error, match=message):
            load_model(folder, "cpu")
    del tensors[base + "scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \(1\): .*o_proj.scales"):
        load_model(folder, "cpu")
    for config, message in (
        ({"bits": 8}, "quantization_config.bits 8 is not supported, only 4"),
        ({"desc_act": 1}, "desc_act must be true or false, got 1"),
        ({"sym": False}, "sym false is not supported"),
        ({"group_size": 0}, "group_size must be an integer >= 1, got 0"),
        ({"group_size": 48}, "group_size 48 must divide a matrix"),
    ):
        with pytest.raises((NotImplementedError, ValueError), match=message):
            load_model(write_gptq(tmp_path / "config", "gptq", changes=config), "cpu")


def test_quantized_llama_is_read_alike_by_transformers(tmp_path: Path) -> None:
    assert_transformers_reads_alike(tmp_path, 0.05, group_size=32)


@pytest.mark.parametrize("head", [False, True])
def test_quantize_and_load(head: bool, tmp_path: Path) -> None:
    """Memory falls, the adapter and the tokenizer come along, the logits stay near."""
    torch.manual_seed(0)
    fields = config_fields(**SIDES)
    source = write_checkpoint(
        tmp_path / "a", fields, random_weights(fields), shards=3, lora=random_lora(fields, 2)
    )
    (source / "chat_template.jinja").write_text("x")
    (source / "pytorch_model.bin").write_text("not copied")
    target = tmp_path / "b"
    summary = quantize(source, target, group_size=32, head=head)
    assert summary.num_quantized == 14 + head and summary.num_resumed == 0
    assert summary.target_bytes < summary.source_bytes / 3
    assert (target / "chat_template.jinja").read_text() == "x"
    assert not (target / "pytorch_model.bin").exists()
    model, dense = load_model(target, "cpu"), load_model(source, "cpu")
    assert model.has_lora and isinstance(model.layers[0].qkv, Int4Matrix)
    assert isinstance(model.head, Int4Matrix) == head
    assert model.num_parameters == dense.num_parameters
    assert model.num_bytes < dense.num_bytes / (3.5 if head else 2.5)
    (tokens,) = random_tokens(fields, 20)
    expanded = logits_of(load_model(target, "cpu", "float32"), tokens).double()
    assert relative_error(logits_of(model, tokens), expanded) <= 0.1
    emitted = nld_cuda.generate(model, tokens.tolist(), "linear_spec", max_new_tokens=9)
    assert len(emitted.tokens[0]) > 0


def test_quantize_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = config_fields(**SIDES)
    source = write_checkpoint(tmp_path / "a", fields, random_weights(fields), shards=4)
    whole, target = tmp_path / "whole", tmp_path / "b"
    quantize(source, whole, group_size=32)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        quantize(source, target, group_size=32, progress=stop)
    assert not (target / "config.json").exists(), "an unfinished folder is no checkpoint"
    first = sorted(target.glob("*.safetensors"))
    assert 1 <= len(first) < 4
    times = {file: file.stat().st_mtime_ns for file in first}
    (target / "model-00004-of-00004.safetensors.partial").write_text("left over")
    summary = quantize(source, target, group_size=32)
    assert summary.num_resumed == len(first)
    assert {file: file.stat().st_mtime_ns for file in first} == times
    for file in whole.glob("*.safetensors"):
        ours, again = load_file(file), load_file(target / file.name)
        assert list(ours) == list(again)
        for name in ours:
            assert_equal(ours[name], again[name], name)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert json.loads((whole / "model.safetensors.index.json").read_text()) == index
    with pytest.raises(ValueError, match=r"target must be empty or of the same call, .*head=False"):
        quantize(source, target, group_size=32, head=True)
    other = write_checkpoint(tmp_path / "c", fields, random_weights(fields))
    with pytest.raises(ValueError, match=r"same call, it has .*b/model-0000\d-of-00004"):
        quantize(other, target, group_size=32)
    assert load_model(target, "cpu").num_bytes > 0, "what was refused has changed nothing"
    (tmp_path / "d").mkdir()
    (tmp_path / "d/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"same call, it has .*d/config.json"):
        quantize(source, tmp_path / "d", group_size=32)
    assert (tmp_path / "d/config.json").read_text() == "{}"
    write_checkpoint(source, fields, random_weights(fields), shards=4)  # other weights, same names
    with pytest.raises(ValueError, match=r"same call, .*bytes written at"):
        quantize(source, target, group_size=32)


def test_quantize_copies_no_other_weights(tmp_path: Path) -> None:
    """What downloads and other tools leave beside a checkpoint; the adapter belongs to it."""
    source = tmp_path / "a"
    shutil.copytree(TINY, source)
    for name in (".git/objects/ab", "original/consolidated.00.pth", "original/params.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    quantize(source, tmp_path / "b", group_size=32)
    copied = {str(f.relative_to(tmp_path / "b")) for f in (tmp_path / "b").rglob("*")}
    assert {"linear_spec_lora/adapter_model.safetensors", "original/params.json"} <= copied
    assert not copied & {".git", "original/consolidated.00.pth"}
    with pytest.raises(ValueError, match=r"and not inside of it, got .*a/b"):
        quantize(source, source / "b", group_size=32)
    assert not (source / "b").exists()


def test_quantize_errors(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match=r"must divide the 192 inputs of .*o_proj.weight \(32, 64"):
        quantize(TINY, tmp_path)
    with pytest.raises(ValueError, match=r"group_size must be one of .*, got 48"):
        quantize(TINY, tmp_path, group_size=48)
    with pytest.raises(ValueError, match="target must be another folder"):
        quantize(TINY, TINY, group_size=32)
    with pytest.raises(SystemExit) as stop:
        cli.main(["quantize", str(TINY), str(tmp_path / "q"), "--group-size", "32"])
    assert stop.value.code == 0 and "28 matrices in 4 bits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is quantised already"):
        quantize(tmp_path / "q", tmp_path / "r", group_size=32)
