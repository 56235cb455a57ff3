"""Safetensors files of a checkpoint: what they hold, whether it is as expected, and copying it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nld_cuda.model.json_files import has_file, read_json_object

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
# Tensors are copied in pieces, and a file is mapped anew after so many bytes: pages that were read
# count as memory of the process until their mapping is gone. So memory peaks at the weights.
_CHUNK_BYTES = 1 << 23
_MAX_MAPPED_BYTES = 1 << 24
_MAX_LISTED = 20
_MAX_FILE_NAME = 255  # of the file systems in use

Progress = Callable[[int, int], None]


def checkpoint_files(folder: Path) -> list[Path]:
    """Find the weight files of a checkpoint folder: all shards of the index, or the single file.

    Raises:
        FileNotFoundError: neither is there, or a shard is missing.
        NotImplementedError: there are weights, but not in safetensors.
        ValueError: the index is damaged.
    """
    index = folder / INDEX_NAME
    if has_file(index):
        return _shards(index)
    if has_file(folder / SINGLE_NAME):
        return [folder / SINGLE_NAME]
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.gguf") for p in folder.glob(pattern))
    if others:
        raise NotImplementedError(
            f"{folder}: only safetensors weights are supported ({SINGLE_NAME} or {INDEX_NAME}), "
            f"got {', '.join(others)}"
        )
    raise FileNotFoundError(f"{folder}: must hold {SINGLE_NAME} or {INDEX_NAME}, found neither")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"{index}: weight_map must be an object of file names, got {weight_map!r:.300}"
        )
    for name in weight_map.values():
        is_plain = isinstance(name, str) and Path(name).name == name and name not in ("", "..")
        if not is_plain or len(name) > _MAX_FILE_NAME:
            raise ValueError(f"{index}: weight_map must hold plain file names, got {name!r:.300}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise FileNotFoundError(f"{index}: shards must all be there, missing: {_listing(missing)}")
    return [index.parent / name for name in names]


@dataclass(frozen=True, slots=True)
class Stored:
    """Header entry of a tensor: where it lies, its name there, shape and safetensors dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first dimension."""
        return torch.Size(self.shape[1:]).numel() * _ITEM_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return torch.Size(self.shape).numel() * _ITEM_BYTES[self.dtype]


class Piece(NamedTuple):
    """Part of a tensor `[*shape]`: `[*size]` from `begin` on."""

    shape: tuple[int, ...]
    begin: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Piece:
        """All of a tensor."""
        return cls(shape, (0,) * len(shape), shape)

    @property
    def window(self) -> tuple[slice, ...]:
        """What to index the tensor with."""
        return tuple(slice(b, b + n) for b, n in zip(self.begin, self.size, strict=True))


class TensorFiles:
    """Memory-mapped safetensors files, seen as one mapping from canonical name to tensor."""

    def __init__(self, files: Sequence[Path], canonical: Callable[[str], str]) -> None:
        """Open the files.

        Args:
            files: safetensors files.
            canonical: turns a name found in a file into the name the plan uses.

        Raises:
            ValueError: a file is truncated or corrupt, or two tensors have one canonical name.
        """
        self.files = list(files)
        self._stored: dict[str, Stored] = {}
        self._mapped: tuple[Path, Any] | None = None  # the file being read, and its handle
        self._bytes_mapped = 0  # of it, read so far
        for file in self.files:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
                names = list(handle.keys())
            except SafetensorError as error:
                raise ValueError(
                    f"{file}: must be a complete safetensors file, got a damaged one: {error}"
                ) from None
            for name in names:
                known = self._stored.get(canonical(name))
                if known is not None:
                    raise ValueError(
                        f"{file}: tensors must be given once, got {name!r:.300} and, in "
                        f"{known.file.name}, {known.name!r}"
                    )
                entry = handle.get_slice(name)
                stored = Stored(file, name, tuple(entry.get_shape()), entry.get_dtype())
                self._stored[canonical(name)] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def original(self, name: str) -> str:
        """Name of a tensor in its file."""
        return self._stored[name].name

    def names(self, file: Path) -> dict[str, str]:
        """Canonical and original names of the tensors of a file."""
        return {n: stored.name for n, stored in self._stored.items() if stored.file == file}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header."""
        return self._stored[name].shape

    def num_bytes(self, name: str) -> int:
        """Size of a tensor as stored."""
        return self._stored[name].num_bytes

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor, None where it is no floating-point type this package reads."""
        return FLOAT_DTYPES.get(self._stored[name].dtype)

    def stored_dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors names it."""
        return self._stored[name].dtype

    def where(self, name: str) -> str:
        """File and original name of a tensor, for errors."""
        return f"{self._stored[name].file}: {self._stored[name].name}"

    def read(self, name: str) -> Tensor:
        """A whole tensor, as stored, on the CPU.

        Raises:
            ValueError: the file is damaged.
        """
        with self._readable(name, self.num_bytes(name)) as source:
            found: Tensor = source[...]
        return found

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        ignored: Callable[[str], bool],
        dtypes: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Compare with the expected names, shapes and `dtypes`, by default any of FLOAT_DTYPES.

        Raises:
            ValueError: lists every unknown, missing and misshapen tensor, and every one of a dtype
                that cannot be read.
        """
        unknown = [
            stored.name
            for name, stored in self._stored.items()
            if name not in expected and not ignored(name)
        ]
        missing = [name for name in expected if name not in self]
        misshapen, unreadable = [], []
        for name, shape in expected.items():
            if name not in self:
                continue
            found = self._stored[name]
            if found.shape != shape:
                misshapen.append(f"{found.name} {list(found.shape)}, expected {list(shape)}")
            wanted = (dtypes or {}).get(name, tuple(FLOAT_DTYPES))
            if found.dtype not in wanted:
                unreadable.append(
                    f"{found.name} {found.dtype}, expected one of {', '.join(wanted)}"
                )
        problems = [
            f"{title} ({len(listed)}): {_listing(listed)}"
            for title, listed in (
                ("unknown", unknown),
                ("missing", missing),
                ("misshapen", misshapen),
                ("of another dtype", unreadable),
            )
            if listed
        ]
        if problems:
            where = ", ".join(file.name for file in self.files)
            raise ValueError(
                f"{self.files[0].parent}: tensors of {where} must match config.json; "
                + "; ".join(problems)
            )

    def copy_to(self, name: str, target: Tensor, piece: Piece | None = None) -> None:
        """Copy a tensor into `target`, converting dtype and device, some rows at a time.

        With `piece` that part of the tensor, and no other is read.
        """
        rows, row_bytes = target.shape[0], self._stored[name].row_bytes
        first, columns = (0, ()) if piece is None else (piece.begin[0], piece.window[1:])
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            window = (slice(first + start, first + stop), *columns)
            with self._readable(name, (stop - start) * row_bytes) as source:
                target[start:stop].copy_(source[window])

    @contextmanager
    def _readable(self, name: str, num_bytes: int) -> Iterator[Any]:
        """A stored tensor, to read `num_bytes` of; what goes wrong meanwhile names the file."""
        stored = self._stored[name]
        try:
            self._bytes_mapped += num_bytes
            if (
                self._mapped is None
                or self._mapped[0] != stored.file
                or self._bytes_mapped > _MAX_MAPPED_BYTES
            ):
                self._mapped = None  # before the next one is there
                self._mapped = stored.file, safe_open(str(stored.file), framework="pt")
                self._bytes_mapped = num_bytes
            yield self._mapped[1].get_slice(stored.name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{stored.file}: must be a complete safetensors file, {stored.name} cannot be "
                f"read: {error}"
            ) from None


def _listing(items: Sequence[str]) -> str:
    shown = ", ".join(f"{item:.300}" for item in items[:_MAX_LISTED])
    return shown + (f", and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else "")
