"""Safetensors files of a checkpoint: what they hold, whether it is as expected, and copying it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
INTEGER_DTYPES = ("I32", "I64")
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_CHUNK_ELEMENTS = 1 << 24  # rows are copied in pieces of this size, so memory peaks at the weights
_MAX_LISTED = 20

Progress = Callable[[int, int], None]


def checkpoint_files(folder: Path) -> list[Path]:
    """Find the weight files of a checkpoint folder: all shards of the index, or the single file.

    Raises:
        FileNotFoundError: neither is there, or a shard is missing.
        NotImplementedError: there are weights, but not in safetensors.
        ValueError: the index is damaged.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _shards(index)
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.gguf") for p in folder.glob(pattern))
    if others:
        raise NotImplementedError(
            f"{folder}: only safetensors weights are supported ({SINGLE_NAME} or {INDEX_NAME}), "
            f"got {', '.join(others)}"
        )
    raise FileNotFoundError(f"{folder}: must hold {SINGLE_NAME} or {INDEX_NAME}, found neither")


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index}: must be JSON with a weight_map of file names: {error}"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: weight_map must hold plain file names, got {name!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise FileNotFoundError(f"{index}: shards must all be there, missing: {_listing(missing)}")
    return [index.parent / name for name in names]


class TensorFiles:
    """Open, memory-mapped safetensors files, seen as one mapping from canonical name to tensor."""

    def __init__(self, files: Sequence[Path], canonical: Callable[[str], str]) -> None:
        """Open the files.

        Args:
            files: safetensors files.
            canonical: turns a name found in a file into the name the plan uses.

        Raises:
            ValueError: a file is truncated or corrupt, or two tensors have one canonical name.
        """
        self.files = list(files)
        self._slices: dict[str, tuple[Path, str, Any]] = {}
        for file in self.files:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
                names = list(handle.keys())
            except SafetensorError as error:
                raise ValueError(
                    f"{file}: must be a complete safetensors file, got a damaged one: {error}"
                ) from None
            for name in names:
                known = self._slices.get(canonical(name))
                if known is not None:
                    raise ValueError(
                        f"{file}: tensors must be given once, got {name!r} and, in "
                        f"{known[0].name}, {known[1]!r}"
                    )
                self._slices[canonical(name)] = (file, name, handle.get_slice(name))

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def original(self, name: str) -> str:
        """Name of a tensor in its file."""
        original: str = self._slices[name][1]
        return original

    def names(self, file: Path) -> dict[str, str]:
        """Canonical and original names of the tensors of a file."""
        return {n: original for n, (where, original, _) in self._slices.items() if where == file}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header."""
        return tuple(self._slices[name][2].get_shape())

    def num_bytes(self, name: str) -> int:
        """Size of a tensor as stored."""
        return torch.Size(self.shape(name)).numel() * _ITEM_BYTES[self._slices[name][2].get_dtype()]

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor, None where it is no floating-point type this package reads."""
        return FLOAT_DTYPES.get(self._slices[name][2].get_dtype())

    def where(self, name: str) -> str:
        """File and original name of a tensor, for errors."""
        file, original, _ = self._slices[name]
        return f"{file}: {original}"

    def read(self, name: str) -> Tensor:
        """A whole tensor, as stored, on the CPU.

        Raises:
            ValueError: the file is damaged.
        """
        with self._readable(name) as source:
            found: Tensor = source[:]
        return found

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        ignored: Callable[[str], bool],
        integers: Collection[str] = (),
    ) -> None:
        """Compare with the expected names and shapes; tensors in `integers` must hold integers.

        Raises:
            ValueError: lists every unknown, missing and misshapen tensor, and every one of a dtype
                that cannot be read.
        """
        unknown = [
            original
            for name, (_, original, _) in self._slices.items()
            if name not in expected and not ignored(name)
        ]
        missing = [name for name in expected if name not in self]
        misshapen, unreadable = [], []
        for name, shape in expected.items():
            if name not in self:
                continue
            original = self._slices[name][1]
            if self.shape(name) != shape:
                misshapen.append(f"{original} {list(self.shape(name))}, expected {list(shape)}")
            stored = self._slices[name][2].get_dtype()
            wanted = INTEGER_DTYPES if name in integers else tuple(FLOAT_DTYPES)
            if stored not in wanted:
                unreadable.append(f"{original} {stored}, expected one of {', '.join(wanted)}")
        problems = [
            f"{title} ({len(found)}): {_listing(found)}"
            for title, found in (
                ("unknown", unknown),
                ("missing", missing),
                ("misshapen", misshapen),
                ("of another dtype", unreadable),
            )
            if found
        ]
        if problems:
            where = ", ".join(file.name for file in self.files)
            raise ValueError(
                f"{self.files[0].parent}: tensors of {where} must match config.json; "
                + "; ".join(problems)
            )

    def copy_to(self, name: str, target: Tensor) -> None:
        """Copy a tensor into `target` (same shape), converting dtype and device, piece by piece."""
        rows = target.shape[0]
        step = max(1, _CHUNK_ELEMENTS // max(1, target.numel() // max(1, rows)))
        with self._readable(name) as source:
            for start in range(0, rows, step):
                target[start : start + step].copy_(source[start : start + step])

    @contextmanager
    def _readable(self, name: str) -> Iterator[Any]:
        """The slice of a tensor; what goes wrong while it is read names the file."""
        file, original, source = self._slices[name]
        try:
            yield source
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: must be a complete safetensors file, {original} cannot be read: {error}"
            ) from None


def _listing(items: Sequence[str]) -> str:
    shown = ", ".join(items[:_MAX_LISTED])
    return shown + (f", and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else "")
