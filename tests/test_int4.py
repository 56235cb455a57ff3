"""4-bit weights: formats against other packages, products, loading, writing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
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
from quantized_cases import DEVICES, SIDES, llama_weights, logits_of, small_llama
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
    assert_equal(int4.from_compressed_tensors(words, count), theirs, "codes")
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


def check_product(outs: int, rows: int, group_size: int, device: torch.device) -> None:
    weight = torch.randn(outs, 512)
    codes, scales = int4.quantize(weight, group_size)
    matrix = int4.make_matrix(codes, scales, device)
    dense = int4.dequantize(codes, scales)
    assert (dense - weight).abs().max() <= scales.float().max() * 1.02, "half a step, clipped: one"
    x = torch.randn(rows, 512).bfloat16()
    exact = x.double() @ dense.double().T
    plain = (x @ dense.bfloat16().T).double() - exact
    ours = matrix.product(x.to(device)).cpu().double() - exact
    assert ours.abs().max() <= 2 * plain.abs().max()
    assert matrix.numel() == weight.numel()
    assert matrix.num_bytes == weight.numel() // 2 + 4 * scales.numel()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 5, 33, 300])
def test_product(group_size: int, rows: int, device: str) -> None:
    torch.manual_seed(0)
    check_product(48, rows, group_size, torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outs", [16, 64, 176])
def test_product_of_many_rows(outs: int, device: str) -> None:
    """Expanded slice by slice, but for the outputs past the last whole block."""
    torch.manual_seed(0)
    place = torch.device(device)
    assert int4.packed_block(place) in ((8,) if device == "cuda" else (64, 32))
    check_product(outs, max(int4.MOST_ROWS_CPU, int4.MOST_ROWS_GPU) + 1, 64, place)
    matrix = int4.make_matrix(*int4.quantize(torch.randn(outs, 512), 64), place)
    assert matrix.product(torch.empty(0, 512, device=place).bfloat16()).shape == (0, outs)
    for begin in range(0, outs - outs % matrix.block, matrix.block):
        x = torch.eye(512, device=place).bfloat16()
        packed = matrix.packed_product(x)[:, begin : begin + matrix.block]
        unpacked = matrix.expanded_product(x)[:, begin : begin + matrix.block]
        assert_equal(unpacked, packed, "the matrix itself")


def test_codes_packed_for_cuda() -> None:
    """Against the order in torch's CUDA source: lane t, word j of a tile of 8 outputs."""
    codes = torch.randint(16, (16, 256), generator=torch.Generator().manual_seed(0))
    words = torch.zeros(2, 2, 32, 4, dtype=torch.int64)
    for i, tile, lane, j in itertools.product(range(2), range(2), range(32), range(4)):
        row, first = codes[8 * i + lane // 4], 128 * tile + 32 * j + 2 * (lane % 4)
        for n, offset in enumerate((0, 8, 16, 24)):
            even, odd = row[first + offset : first + offset + 2].tolist()
            words[i, tile, lane, j] |= even << 4 * n | odd << 16 + 4 * n
    packed = torch.where(words >= 2**31, words - 2**32, words).int()
    expected = codes.view(2, 8, 256).transpose(1, 2).to(torch.int8)
    assert_equal(int4.unpack_cuda(packed), expected, "codes")


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


def test_wrong_gptq_checkpoints(tmp_path: Path) -> None:
    folder = write_gptq(tmp_path, "gptq")
    tensors = load_file(folder / "model.safetensors")
    base = "encoder.layers.0.self_attn.o_proj."
    for name, change, error, message in (
        ("g_idx", lambda t: t.flip(0), NotImplementedError, "must number the groups in order"),
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
        ({"desc_act": True}, "desc_act true is not supported"),
        ({"sym": False}, "sym false is not supported"),
        ({"group_size": 0}, "group_size must be an integer >= 1, got 0"),
        ({"group_size": 48}, "group_size 48 must divide a matrix"),
    ):
        with pytest.raises((NotImplementedError, ValueError), match=message):
            load_model(write_gptq(tmp_path / "config", "gptq", changes=config), "cpu")


def test_quantized_llama_is_read_alike_by_transformers(tmp_path: Path) -> None:
    """What `quantize` writes, decompressed by the compressed-tensors package itself."""
    torch.manual_seed(0)
    small_llama().save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    summary = quantize(tmp_path / "dense", tmp_path / "int4", group_size=32)
    assert summary.num_quantized == 14
    options = transformers.CompressedTensorsConfig(dequantize=True)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "int4", quantization_config=options, dtype=torch.float32
    ).eval()
    dense = load_model(tmp_path / "int4", "cpu", "float32")
    for mine, theirs in llama_weights(dense, other):
        assert_equal(mine.bfloat16().float(), theirs, "they expand to bfloat16")
    (tokens,) = random_tokens({"vocab_size": 64}, 30)
    with torch.no_grad():
        expected = other(tokens[None]).logits[0].double()
    assert relative_error(logits_of(dense, tokens), expected) <= 0.02
    unquantized = load_model(tmp_path / "dense", "cpu")
    assert relative_error(logits_of(unquantized, tokens), expected) > 0.05


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
