"""`quantize`: a checkpoint with 4-bit or fp8 weights from a dense one, shard by shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nld_cuda.api import checkpoint_folder
from nld_cuda.model.checkpoint import EMBEDDING, canonical_name, check_tensors, matrix_shapes
from nld_cuda.model.config import ModelConfig
from nld_cuda.model.fp8 import quantize as to_fp8
from nld_cuda.model.int4 import GROUP_SIZES, pack_words
from nld_cuda.model.int4 import quantize as to_int4
from nld_cuda.model.json_files import read_json_object
from nld_cuda.model.tensor_files import INDEX_NAME, TensorFiles, checkpoint_files

FORMATS = ("int4", "fp8")
_ROWS = 4096  # rounded at a time, in float32

HEAD = "diffusion_head.weight"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True)
class QuantizeSummary:
    """What `quantize` wrote.

    Attributes:
        num_quantized: matrices in 4 bits or fp8.
        num_resumed: shards that an earlier call had written.
        source_bytes, target_bytes: of the tensors.
    """

    num_quantized: int
    num_resumed: int
    source_bytes: int
    target_bytes: int


def quantize(
    source: str | Path,
    target: str | Path,
    *,
    format: str = "int4",
    group_size: int | None = None,
    head: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeSummary:
    """Round the matrices of a checkpoint to 4 bits or fp8, in compressed-tensors' layouts.

    Round to nearest, symmetric, bfloat16 scales. int4: one for each group of inputs, layout
    pack-quantized. fp8: one for each output, layout float-quantized; config.json asks for
    activations rounded to fp8 as well, by a scale per token, which readers do where they can.

    The embedding, norms and (unless asked) the head stay as they are, and so does the draft
    adapter. Each shard is written whole or not at all and found again by the next call; config.json
    comes last, so a folder that has one is complete.

    Args:
        source: checkpoint folder with dense weights, or the packaged model's name.
        target: folder to write; made where it is missing.
        format: "int4" or "fp8".
        group_size: inputs that share a scale, int4 only: 32, 64, 128 (the default) or 256, and a
            divisor of every matrix.
        head: quantise the head as well; not where it is tied to the embedding.
        progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
        FileNotFoundError: source has no checkpoint.
        TypeError: source or target is no path, head no bool.
        ValueError: a rule above is broken, tensors of source do not fit its config.json, or target
            is source, inside of it, or holds another checkpoint (also one of files that have
            changed since).
    """
    if not isinstance(target, str | Path):
        raise TypeError(f"quantize: target must be a path, got {type(target).__name__}")
    if not isinstance(head, bool):
        raise TypeError(f"quantize: head must be a bool, got {head!r}")
    folder, out = checkpoint_folder(source), Path(target)
    config = ModelConfig.from_file(folder)
    if config.quantization is not None:
        raise ValueError(f"quantize: source must have dense weights, {folder} is quantised already")
    if format not in FORMATS:
        raise ValueError(f"quantize: format must be {' or '.join(FORMATS)}, got {format!r}")
    if format == "fp8" and group_size is not None:
        raise ValueError(f"quantize: group_size must be None for fp8, got {group_size}")
    if format == "int4":
        group_size = 128 if group_size is None else group_size
        if group_size not in GROUP_SIZES:
            raise ValueError(f"quantize: group_size must be one of {GROUP_SIZES}, got {group_size}")
    if head and config.tie_word_embeddings:
        raise ValueError("quantize: head must be False where it is tied to the embedding, got True")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"quantize: target must be another folder than source and not inside of it, got {out}"
        )
    kept = {EMBEDDING} | (set() if head else {HEAD})
    matrices = {n: s for n, s in matrix_shapes(config).items() if n not in kept}
    for name, shape in matrices.items():
        if group_size is not None and shape[1] % group_size:
            fitting = [g for g in GROUP_SIZES if all(s[1] % g == 0 for s in matrices.values())]
            raise ValueError(
                f"quantize: group_size must divide the {shape[1]} inputs of {name} "
                f"({', '.join(map(str, fitting)) or 'none does'}), got {group_size}"
            )
    files = TensorFiles(checkpoint_files(folder), canonical_name)
    check_tensors(files, config)
    settings = f"int4 group_size={group_size}" if format == "int4" else format
    of_what = f"{settings} head={head} of {folder.resolve()}"
    marks = {file.name: f"{of_what}, {_version(file)}" for file in files.files}
    resumed = _resumed_shards(out, marks)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    total = sum(file.stat().st_size for file in files.files)
    weight_map: dict[str, str] = {}
    done = num_resumed = num_quantized = target_bytes = 0
    for file in files.files:
        written = resumed.get(file.name)
        if written is None:
            tensors: dict[str, Tensor] = {}
            for name, original in files.names(file).items():
                tensors |= _stored(files, name, original, matrices, group_size)
                done += files.num_bytes(name)
                if progress is not None:
                    progress(min(done, total), total)
            _save_whole(out / file.name, tensors, marks[file.name])
            written = list(tensors)
            del tensors
        else:
            num_resumed += 1
            done += sum(map(files.num_bytes, files.names(file)))
        num_quantized += sum(name.endswith(".weight_scale") for name in written)
        target_bytes += (out / file.name).stat().st_size
        weight_map |= dict.fromkeys(written, file.name)
    if (folder / INDEX_NAME).is_file():
        index = {"metadata": {"total_size": target_bytes}, "weight_map": weight_map}
        (out / INDEX_NAME).write_text(json.dumps(index, indent=1))
    _copy_the_rest(folder, out)
    fields = read_json_object(folder / "config.json")
    head_name = _head_name(files, config).removesuffix(".weight")
    # By the name in the file, and without the prefixes that readers take off.
    names = [head_name, head_name.rpartition(".")[2]]
    ignored = [] if head else list(dict.fromkeys(names))
    if config.vision is not None:
        ignored += ["re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    fields["quantization_config"] = _quantization_config(group_size, ignored)
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return QuantizeSummary(num_quantized, num_resumed, total, target_bytes)


def _head_name(files: TensorFiles, config: ModelConfig) -> str:
    """What the head is called in these files, or would be where it is tied and left out."""
    if HEAD in files:
        return files.original(HEAD)
    return HEAD if config.mask_token_id is not None else "lm_head.weight"


def _stored(
    files: TensorFiles,
    name: str,
    original: str,
    matrices: dict[str, tuple[int, ...]],
    group_size: int | None,
) -> dict[str, Tensor]:
    """What the new checkpoint holds of a tensor; group_size None: fp8."""
    weight = files.read(name)
    if name not in matrices:
        return {original: weight}
    rounded = [
        to_fp8(rows) if group_size is None else to_int4(rows, group_size)
        for rows in weight.split(_ROWS)
    ]
    codes, scales = (torch.cat(parts) for parts in zip(*rounded, strict=True))
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{files.where(name)} must hold finite weights")
    if group_size is None:
        return {original: codes, f"{original}_scale": scales}
    return {
        f"{original}_packed": pack_words(codes),
        f"{original}_scale": scales,
        f"{original}_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _version(file: Path) -> str:
    """What changes when another file takes the place of this one."""
    stat = file.stat()
    return f"{stat.st_size} bytes written at {stat.st_mtime_ns}"


def _resumed_shards(out: Path, marks: dict[str, str]) -> dict[str, list[str]]:
    """Names in each shard that an earlier, equal call has written. `marks`: of each shard.

    Raises:
        ValueError: the folder holds something else; it is left as it is.
    """
    found = {name: _written_names(out / name, mark) for name, mark in sorted(marks.items())}
    resumed = {name: written for name, written in found.items() if written is not None}
    others = [file for file in out.glob("*.safetensors") if file.name not in marks]
    if (out / "config.json").exists() and not resumed:
        others.append(out / "config.json")
    if others:
        raise ValueError(f"quantize: target must be empty or of the same call, it has {others[0]}")
    return resumed


def _written_names(file: Path, mark: str) -> list[str] | None:
    """Names in a shard that an earlier call has written with the same settings, else None."""
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="pt") as handle:
            found = (handle.metadata() or {}).get("nld_quantize")
            names = list(handle.keys())
    except SafetensorError:
        return None
    if found != mark:
        raise ValueError(
            f"quantize: target must be empty or of the same call, {file} is from {found or 'other'}"
        )
    return names


def _save_whole(file: Path, tensors: dict[str, Tensor], mark: str) -> None:
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt", "nld_quantize": mark})
    os.replace(partial, file)


def _copy_the_rest(folder: Path, out: Path) -> None:
    """Tokenizer, templates, adapter: everything but weights and what is written anew."""

    def other_weights(_: str, names: list[str]) -> list[str]:
        """What lies beside the checkpoint in other forms, as `original/` in Llama's."""
        weights = [name for name in names if Path(name).suffix in _WEIGHT_SUFFIXES]
        return [name for name in weights if not name.startswith("adapter_model.")]

    for item in folder.iterdir():
        if item.name.startswith("."):  # of version control and downloads: the weights once more
            continue
        if item.is_dir():
            shutil.copytree(item, out / item.name, dirs_exist_ok=True, ignore=other_weights)
        elif item.suffix not in _WEIGHT_SUFFIXES and item.name not in (INDEX_NAME, "config.json"):
            shutil.copy2(item, out / item.name)


def _quantization_config(group_size: int | None, ignored: list[str]) -> dict[str, Any]:
    common = {"symmetric": True, "actorder": None}
    if group_size is not None:
        name, activations = "pack-quantized", None
        weights = {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size,
            "dynamic": False, "observer": "minmax", **common,
        }  # fmt: skip
    else:
        name = "float-quantized"
        kind = {"num_bits": 8, "type": "float", "group_size": None, **common}
        weights = {"strategy": "channel", "dynamic": False, "observer": "minmax", **kind}
        activations = {"strategy": "token", "dynamic": True, "observer": None, **kind}
    group = {
        "targets": ["Linear"], "weights": weights,
        "input_activations": activations, "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }
