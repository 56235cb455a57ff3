"""A checkpoint with any fault loads, or fails with one error that names the file."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nld_cuda
from tiny_model import config_fields, random_lora, random_weights, write_checkpoint

TINY = nld_cuda.api.ASSETS / "nld-tiny"
SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
ADAPTER = "linear_spec_lora/adapter_model.safetensors"
ADAPTER_CONFIG = "linear_spec_lora/adapter_config.json"
JSON_FILES = ("config.json", INDEX, ADAPTER_CONFIG, "tokenizer_config.json", "tokenizer.json")
FILES = (*JSON_FILES, SHARD, ADAPTER)
EMBED = "encoder.embed_tokens.weight"
VALUES = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.0, 1.5, -1.5, math.nan, math.inf,
    -math.inf, 1e308, 1e-320, "", "x", "5", "default", [], [1], [None], {}, {"a": 1},
]  # fmt: skip
DELETED = object()
# Fields that a file may have, beside those of the base.
MORE_FIELDS = {
    "config.json": [
        ("rope_scaling",), ("rope_theta",), ("partial_rotary_factor",), ("pad_token_id",),
        ("mlp_bias",), ("quantization_config",), ("dtype",), ("vision_config",), ("text_config",),
        ("rope_parameters", "attention_factor"), ("rope_parameters", "low_freq_factor"),
    ],
    ADAPTER_CONFIG: [("use_rslora",), ("rank_pattern",), ("use_dora",)],
    "tokenizer_config.json": [
        ("extra_special_tokens",), ("added_tokens_decoder",), ("split_special_tokens",),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, an adapter, a tokenizer, a template."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("base")
    fields = config_fields(vocab_size=361, num_hidden_layers=1)
    write_checkpoint(folder, fields, random_weights(fields), shards=2, lora=random_lora(fields, 4))
    shutil.copy(TINY / "tokenizer.json", folder)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


def use(folder: Path) -> None:
    model = nld_cuda.load(folder, device="cpu")
    assert model.tokenizer is not None
    prompt = [5, *model.tokenizer.encode("hello")]
    if model.chat_template is not None:
        model.chat_template.render([{"role": "user", "content": "hello"}], enable_thinking=False)
    if max(prompt) < model.config.vocab_size:
        room = model.config.max_position_embeddings - len(prompt)
        if room >= 2:
            tokens = nld_cuda.generate(model, prompt, "ar", max_new_tokens=2).tokens[0]
            assert model.tokenizer.decode(tokens) is not None


def assert_one_clear_error(folder: Path, *names: str, must_fail: bool = True) -> None:
    """What a user sees names the folder's file, says what is wrong, and is of a known kind."""
    try:
        use(folder)
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        message = str(error)
        assert type(error) in (ValueError, FileNotFoundError, NotImplementedError), repr(error)
        assert str(folder) in message or "load: " in message, message
        assert any(name in message for name in names), message
        assert len(message) < 4000
    else:
        assert not must_fail, "loaded as if nothing were wrong"


def paths(value: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, inner in list(value.items())[:12]:
            yield (*before, key)
            if key not in ("vocab", "merges"):
                yield from paths(inner, (*before, key))


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_value_in_any_field(base: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    """Another type, no value, an absurd number: in every field of every JSON file."""
    name = data.draw(st.sampled_from(JSON_FILES))
    fields = copy.deepcopy(json.loads((base / name).read_text()))
    path = data.draw(st.sampled_from([*paths(fields), *MORE_FIELDS.get(name, [])]))
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    value = data.draw(st.sampled_from([*VALUES, DELETED]))
    inner[path[-1]] = value
    if value is DELETED:
        del inner[path[-1]]
    folder = tmp_path_factory.mktemp("changed")
    for item in base.iterdir():
        (folder / item.name).symlink_to(item)
    if "/" in name:
        (folder / "linear_spec_lora").unlink()
        shutil.copytree(base / "linear_spec_lora", folder / "linear_spec_lora")
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(fields))
    # A wrong size is found where the tensors are compared with it.
    assert_one_clear_error(folder, Path(name).name, "must match config.json", must_fail=False)


def replaced(by: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(by)


def linked(to: str) -> Callable[[Path], Any]:
    return lambda file: (file.unlink(), file.symlink_to(to))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": replaced(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "more behind it": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "not UTF-8": replaced(b'{"a": "\xff"}'),
    "binary": replaced(bytes(range(256))),
    "null": replaced(b"null"),
    "deep": replaced(b'{"a":' * 100_000),
    "long number": replaced(b'{"a":' + b"9" * 10_000 + b"}"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a broken link": linked("nowhere"),
    "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
    "endless": linked("/dev/zero"),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage: str, base: Path, tmp_path: Path) -> None:
    for name in FILES:
        folder = shutil.copytree(base, tmp_path / Path(name).stem)
        DAMAGE[damage](folder / name)
        assert_one_clear_error(folder, Path(name).name)


def test_an_adapter_that_is_no_folder(folder: Path) -> None:
    shutil.rmtree(folder / "linear_spec_lora")
    (folder / "linear_spec_lora").symlink_to("nowhere")
    assert_one_clear_error(folder, "linear_spec_lora: must be an adapter folder")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "", ".", "..", "a/b", "x\0y", "~/x", "c" * 3000, 5, None, []]
)
def test_the_index_names_files_of_its_folder_only(name: Any, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EMBED] = name
    (folder / INDEX).write_text(json.dumps(index))
    # What looks like a name is looked for beside the index.
    kind = "shards must all be there" if name == "x\0y" else "weight_map must hold plain file"
    assert_one_clear_error(folder, f"{INDEX}: {kind}")


HEADERS: list[tuple[str, Any]] = [
    *(("dtype", v) for v in (None, 1, "", "U8", "BOOL", "F8_E4M3", "f32", "F64", [])),
    *(("shape", v) for v in (None, 7, [0, 24], [361], [24, 361], [361, 24, 1], [-1, 24])),
    *(("shape", v) for v in ([2**40, 2**40], [2**63, 2], ["361", 24], [math.nan])),
    *(("data_offsets", v) for v in (None, [0, 0], [4, 0], [-4, 4], [0, 2**63], [8, 34664], [0])),
]


def edit_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize("field,value", HEADERS, ids=repr)
def test_damaged_headers(field: str, value: Any, folder: Path) -> None:
    edit_header(folder / SHARD, lambda header: header[EMBED].update({field: value}))
    assert_one_clear_error(folder, SHARD)


@pytest.mark.parametrize("size", [0, 7, 10**9, 2**63 - 1, 2**64 - 1])
def test_wrong_header_sizes(size: int, folder: Path) -> None:
    file = folder / SHARD
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    assert_one_clear_error(folder, SHARD)


@pytest.mark.parametrize("name", ["", "x", "../x", EMBED + "\n", "é" * 1000, "a" * 100_000])
def test_renamed_tensors(name: str, folder: Path) -> None:
    edit_header(folder / SHARD, lambda header: header.update({name: header.pop(EMBED)}))
    assert_one_clear_error(folder, SHARD)


def test_tensors_given_twice(folder: Path) -> None:
    other = folder / SHARD.replace("00001", "00002")
    save_file({**load_file(other), EMBED: load_file(folder / SHARD)[EMBED]}, other)
    assert_one_clear_error(folder, "tensors must be given once, got 'encoder.embed_tokens.weight'")


@pytest.mark.parametrize("change", [lambda t: t.int(), lambda t: t[:0], lambda t: t[None]])
def test_adapters_of_other_tensors(change: Callable[[Any], Any], folder: Path) -> None:
    wrong = {name: change(tensor) for name, tensor in load_file(folder / ADAPTER).items()}
    save_file(wrong, folder / ADAPTER)
    assert_one_clear_error(folder, "tensors of adapter_model.safetensors must match config.json")
    save_file({}, folder / ADAPTER)
    assert_one_clear_error(folder, "missing (2): base_model.model.encoder.layers.0")
