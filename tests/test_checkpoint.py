"""Reading config.json, weights in every layout, the adapter, and what the errors say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compare import assert_equal
from nld_cuda.model import ModelConfig, NLDModel, load_model
from nld_cuda.model.checkpoint import _count, _plan, resolve_device
from nld_cuda.quantize import quantize
from tiny_model import config_fields, random_lora, random_weights, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def assert_holds(model: NLDModel, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every weight sits where it belongs, fused ones one below the other."""
    w = {name: t.to(dtype) for name, t in weights.items()}
    assert_equal(model.embed, w["encoder.embed_tokens.weight"], "embed")
    assert_equal(model.norm, w["encoder.norm.weight"], "norm")
    assert_equal(
        model.head, w.get("diffusion_head.weight", w["encoder.embed_tokens.weight"]), "head"
    )
    for i, layer in enumerate(model.layers):
        at = f"encoder.layers.{i}"
        fused = {
            "input_norm": ["input_layernorm"],
            "qkv": [f"self_attn.{p}_proj" for p in "qkv"],
            "o": ["self_attn.o_proj"],
            "mlp_norm": ["post_attention_layernorm"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "down": ["mlp.down_proj"],
        }
        for field, names in fused.items():
            expected = torch.cat([w[f"{at}.{name}.weight"] for name in names])
            assert_equal(getattr(layer, field), expected, f"{at}.{field}")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "prefix", ["encoder", "model", "language_model.model", "language_model.encoder"]
)
def test_layouts(prefix: str, shards: int, tmp_path: Path) -> None:
    fields = config_fields()
    weights = random_weights(fields)
    head = "lm_head" if "model" in prefix else "diffusion_head"
    wrapper = "language_model." if prefix.startswith("language_model") else ""
    renamed = {
        name.replace("encoder.", f"{prefix}.", 1).replace("diffusion_head", wrapper + head, 1): t
        for name, t in weights.items()
    }
    renamed[f"{prefix}.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    calls: list[tuple[int, int]] = []
    folder = write_checkpoint(tmp_path, fields, renamed, shards=shards)
    model = load_model(folder, "cpu", progress=lambda done, total: calls.append((done, total)))
    assert_holds(model, weights, torch.float32)
    assert (
        model.device == torch.device("cpu") and model.dtype == torch.float32 and not model.has_lora
    )
    assert model.num_parameters == sum(t.numel() for t in weights.values())
    assert model.num_bytes == 4 * model.num_parameters
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) > len(model.layers) and calls[-1] == (model.num_bytes, model.num_bytes)


@pytest.mark.parametrize(
    "stored,named,asked,expected",
    [
        (torch.bfloat16, "bfloat16", "auto", torch.bfloat16),
        (torch.bfloat16, "float32", "auto", torch.float32),
        (torch.float16, None, "auto", torch.float16),  # config.json does not say: as the file
        (torch.float32, "bfloat16", "float16", torch.float16),
        (torch.bfloat16, "bfloat16", torch.float32, torch.float32),
    ],
)
def test_dtypes(
    stored: torch.dtype, named: str | None, asked: Any, expected: torch.dtype, tmp_path: Path
) -> None:
    fields = config_fields(torch_dtype=named)
    weights = random_weights(fields, stored)
    model = load_model(write_checkpoint(tmp_path, fields, weights), dtype=asked)
    assert model.dtype == expected
    assert_holds(model, weights, expected)


@pytest.mark.parametrize(
    "hidden,inner,layers,tensors,millions",
    [(3072, 9216, 26, 237, 3832), (4096, 14336, 34, 309, 8490), (5120, 16384, 40, 363, 13506)],
)
def test_published_sizes(hidden: int, inner: int, layers: int, tensors: int, millions: int) -> None:
    """The table expects as many tensors and parameters as the 3B, 8B and 14B files have."""
    fields = config_fields(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=131072,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    plan = _plan(ModelConfig.from_dict(fields))
    assert len(plan) == tensors
    assert round(sum(_count(shape) for _, _, shape in plan.values()) / 1e6) == millions


def test_large_tensors_are_copied_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nld_cuda.model.tensor_files._CHUNK_BYTES", 400)
    monkeypatch.setattr("nld_cuda.model.tensor_files._MAX_MAPPED_BYTES", 1000)
    fields = config_fields()
    weights = random_weights(fields)
    assert_holds(load_model(write_checkpoint(tmp_path, fields, weights)), weights, torch.float32)


def test_tied_head(tmp_path: Path) -> None:
    fields = config_fields(tie_word_embeddings=True)
    weights = random_weights(fields)
    model = load_model(write_checkpoint(tmp_path, fields, weights))
    assert model.head is model.embed
    assert model.num_parameters == sum(t.numel() for t in weights.values())
    same = weights | {"diffusion_head.weight": weights["encoder.embed_tokens.weight"].clone()}
    assert load_model(write_checkpoint(tmp_path, fields, same)).head.shape == model.head.shape
    same["diffusion_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"diffusion_head.weight must equal the embedding"):
        load_model(write_checkpoint(tmp_path, fields, same))


def test_all_wrong_tensors_are_listed(tmp_path: Path) -> None:
    fields = config_fields()
    weights = random_weights(fields)
    del weights["encoder.norm.weight"], weights["diffusion_head.weight"]
    weights["encoder.layers.3.mlp.up_proj.weight"] = torch.zeros(2)  # one layer too many
    weights["encoder.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 24)
    weights["encoder.layers.2.mlp.down_proj.weight"] = torch.zeros(24, 56, dtype=torch.int8)
    with pytest.raises(ValueError) as error:
        load_model(write_checkpoint(tmp_path, fields, weights, shards=2))
    message = str(error.value)
    for part in (
        "tensors of model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
        " must match config.json; ",
        "unknown (1): encoder.layers.3.mlp.up_proj.weight",
        "missing (2): encoder.norm.weight, diffusion_head.weight",
        "misshapen (1): encoder.layers.1.self_attn.k_proj.weight [8, 24], expected [32, 24]",
        "of another dtype (1): encoder.layers.2.mlp.down_proj.weight I8, expected one of F64, F32",
    ):
        assert part in message


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(keep: int, tmp_path: Path) -> None:
    fields = config_fields()
    folder = write_checkpoint(tmp_path, fields, random_weights(fields), shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"model-00002-of-00002.safetensors: must be a complete safetensors file"
    ):
        load_model(folder)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    fields = config_fields()
    weights = random_weights(fields)
    with pytest.raises(FileNotFoundError, match="path must be a checkpoint folder"):
        load_model(tmp_path / "nowhere")
    folder = write_checkpoint(tmp_path / "a", fields, weights, shards=2)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: model-00001-of-00002.safetensors"):
        load_model(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "../x.safetensors"}}')
    with pytest.raises(ValueError, match="must hold plain file names"):
        load_model(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json: must be a JSON file"):
        load_model(folder)
    index.unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must hold model.safetensors or .*, found neither"
    ):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        NotImplementedError,
        match=r"only safetensors weights are supported .* got pytorch_model.bin",
    ):
        load_model(folder)
    twice = write_checkpoint(
        tmp_path / "b", fields, weights | {"model.norm.weight": torch.ones(24)}
    )
    with pytest.raises(ValueError, match="tensors must be given once"):
        load_model(twice)
    with pytest.raises(
        ValueError, match="dtype must be auto, float32, bfloat16, float16, got int8"
    ):
        load_model(write_checkpoint(tmp_path / "c", fields, weights), dtype="int8")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = torch._C._dispatch_has_kernel_for_dispatch_key("nld::rope_append_", "CUDA")
    usable = kernels and torch.cuda.is_available()
    assert resolve_device("auto").type == ("cuda" if usable else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(NotImplementedError, match="device must be auto, cpu or cuda, got meta"):
        resolve_device("meta")
    if not usable:
        with pytest.raises(
            (ValueError, NotImplementedError), match=r"load: device must be cpu, .* got cuda"
        ):
            resolve_device("cuda")


# ---- adapter -------------------------------------------------------------------------------------


def test_adapter(tmp_path: Path) -> None:
    fields = config_fields()
    lora = random_lora(fields, rank=6)
    folder = write_checkpoint(tmp_path / "m", fields, random_weights(fields), lora=lora)
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.has_lora
    for i, layer in enumerate(model.layers):
        assert layer.lora is not None and layer.lora.scale == 4.0
        at = f"base_model.model.encoder.layers.{i}.self_attn.o_proj"
        assert_equal(layer.lora.a, lora[f"{at}.lora_A.weight"].bfloat16(), "a")
        assert_equal(layer.lora.b, lora[f"{at}.lora_B.weight"].bfloat16(), "b")
    assert not load_model(folder, lora=None).has_lora
    moved = (folder / "linear_spec_lora").rename(tmp_path / "elsewhere")
    assert not load_model(folder).has_lora
    assert load_model(folder, lora=moved).has_lora
    with pytest.raises(FileNotFoundError, match="lora must be auto, None or an adapter folder"):
        load_model(folder, lora=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "changes,kind,message",
    [
        (
            {"peft_type": "LOHA"},
            NotImplementedError,
            'peft_type "LOHA" is not supported, only "LORA"',
        ),
        (
            {"target_modules": ["q_proj", "o_proj"]},
            NotImplementedError,
            "target_modules .* is not supported",
        ),
        (
            {"use_dora": True},
            NotImplementedError,
            "use_dora true is not supported, only absent or false",
        ),
        ({"r": 0}, ValueError, "r must be an integer >= 1, got 0"),
        ({"lora_alpha": None}, ValueError, "lora_alpha must be given, it is missing"),
        ({"r": 7}, ValueError, r"misshapen \(6\): .*lora_A.weight \[6, 64\], expected \[7, 64\]"),
    ],
)
def test_adapter_errors(changes: dict, kind: type, message: str, tmp_path: Path) -> None:
    fields = config_fields()
    folder = write_checkpoint(
        tmp_path,
        fields,
        random_weights(fields),
        lora=random_lora(fields, rank=6),
        lora_config=changes,
    )
    with pytest.raises(kind, match=message):
        load_model(folder)


def test_adapter_tensors_and_rslora(tmp_path: Path) -> None:
    fields = config_fields()
    lora = random_lora(fields, rank=4)
    folder = write_checkpoint(
        tmp_path,
        fields,
        random_weights(fields),
        lora=lora,
        lora_config={"use_rslora": True, "lora_alpha": 3},
    )
    model = load_model(folder)
    assert model.layers[0].lora is not None and model.layers[0].lora.scale == 1.5
    file = folder / "linear_spec_lora/adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.encoder.layers.2.self_attn.o_proj.lora_B.weight")
    tensors["base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 24)
    save_file(tensors, file)
    with pytest.raises(
        ValueError,
        match=r"unknown \(1\): .*q_proj.lora_A.weight; missing \(1\): .*2.*lora_B.weight",
    ):
        load_model(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold adapter_model.safetensors"):
        load_model(folder)


def test_loading_takes_the_memory_of_the_weights(tmp_path: Path) -> None:
    """The benchmark itself, on a layer of the 3B model: no second copy, no file kept mapped."""
    out = tmp_path / "load.json"

    def measured(*options: str) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "benchmarks/bench_load.py"), *options]
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
        record: dict[str, Any] = json.loads(out.read_text())
        return record

    model = ["--model", "3B", "--layers", "1", "--vocab", "2000", "--dir", str(tmp_path / "model")]
    record = measured(*model, "--dtype", "float32")  # converted on the way: the harder case
    assert record["weight_bytes"] > 400 * 2**20 and record["dtype"] == "float32"
    assert 0.99 <= record["peak_over_weights"] <= 1.1
    # 4 bits: the words of one matrix (at most 27 MiB) beside the weights, and a slice unpacked.
    quantize(tmp_path / "model", tmp_path / "int4")
    record = measured("--checkpoint", str(tmp_path / "int4"))
    assert record["weight_bytes"] < record["peak_bytes"] < record["weight_bytes"] + 110 * 2**20
