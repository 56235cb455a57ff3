"""4-bit weights as checkpoints store them: GPTQ and compressed-tensors' pack-quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from nld_cuda.model import int4
from nld_cuda.model.int4 import Int4Matrix
from nld_cuda.model.quantization import Int4Config
from nld_cuda.model.tensor_files import FLOAT_DTYPES, INTEGER_DTYPES, Piece, TensorFiles

Shape = tuple[int, ...]

_ROWS = 1024  # expanded to float32 at a time


class Int4Files:
    """Which matrices of a checkpoint are quantised, and their codes and scales.

    Whether a matrix is quantised is told by the tensors that are there, not by the lists of modules
    in config.json, which differ from writer to writer. See `checkpoint.StoredFormat`.
    """

    def __init__(self, files: TensorFiles, config: Int4Config) -> None:
        self._files, self._config = files, config
        self._is_gptq = config.format != "compressed-tensors"
        self._marker = "qweight" if self._is_gptq else "weight_packed"

    def holds(self, name: str) -> bool:
        """Whether the matrix `name` (ending in `weight`) is stored quantised."""
        return name.endswith(".weight") and self._stored(name, self._marker) in self._files

    def group_size(self, shape: Shape) -> int:
        """Inputs that share a scale, of a matrix `[out, in]`."""
        return self._config.group_size or shape[1]

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[Shape, tuple[str, ...]]]:
        """Name, shape and possible dtypes of each stored tensor of a matrix `[out, in]`.

        Raises:
            ValueError: its groups, or the words of 8 codes, do not divide it.
        """
        out, inputs = shape
        group_size = self.group_size(shape)
        if inputs % group_size or (self._is_gptq and (inputs % 8 or out % 8)):
            raise ValueError(
                f"{self._files.files[0].parent / 'config.json'}: quantization_config: group_size "
                f"{group_size} must divide a matrix {list(shape)}"
                + (", whose sides must be multiples of 8" if self._is_gptq else "")
            )
        groups = inputs // group_size
        floats = tuple(FLOAT_DTYPES)
        parts: dict[str, tuple[Shape, tuple[str, ...]]]
        if self._is_gptq:
            parts = {
                "qweight": ((inputs // 8, out), INTEGER_DTYPES),
                "qzeros": ((groups, out // 8), INTEGER_DTYPES),
                "scales": ((groups, out), floats),
                "g_idx": ((inputs,), INTEGER_DTYPES),
            }
        else:
            parts = {
                "weight_packed": ((out, -(-inputs // 8)), INTEGER_DTYPES),
                "weight_scale": ((out, groups), floats),
                "weight_shape": ((2,), INTEGER_DTYPES),
            }
        return {self._stored(name, suffix): part for suffix, part in parts.items()}

    def matrix(
        self, pieces: dict[str, Piece], device: torch.device, products: str
    ) -> Int4Matrix | None:
        """One matrix of all that `pieces` names, one below the other; None: torch has no product.

        It has none for inputs that are not grouped in order (GPTQ's act-order).

        Raises: as `scales`.
        """
        if not all(self._is_in_order(name, piece.shape) for name, piece in pieces.items()):
            return None
        first = next(iter(pieces.values()))
        rows = sum(piece.size[0] for piece in pieces.values())
        # Holds for no piece that begins inside of a group: it has no whole number of them.
        if not int4.can_multiply((rows, first.size[1]), self.group_size(first.shape), device):
            return None
        words = torch.empty(rows, first.size[1] // 8, dtype=torch.int32)
        scales, begin = [], 0
        for name, piece in pieces.items():
            part = slice(begin, begin + piece.size[0])
            outs, inputs = piece.window
            group_size = self.group_size(piece.shape)
            groups = slice(inputs.start // group_size, inputs.stop // group_size)
            scales.append(self.scales(name, piece.shape)[outs, groups])
            self._copy_words(name, words[part], piece)
            begin = part.stop
        return int4.make_matrix(words, torch.cat(scales), device)

    def copy_to(self, name: str, target: Tensor, piece: Piece) -> None:
        """Write the dense piece, each weight rounded once to the dtype of `target`.

        Raises: as `scales`.
        """
        outs, inputs = piece.window  # it may begin inside of a word or group: whole rows are read
        rows = Piece(piece.shape, (outs.start, 0), (piece.size[0], piece.shape[1]))
        scales = self.scales(name, piece.shape)[outs]
        all_words = torch.empty(piece.size[0], -(-piece.shape[1] // 8), dtype=torch.int32)
        self._copy_words(name, all_words, rows)
        stored = all_words.split(_ROWS), scales.split(_ROWS)
        for part, words, part_scales in zip(target.split(_ROWS), *stored, strict=True):
            codes = int4.unpack_words(words, piece.shape[1])
            part.copy_(int4.dequantize(codes, part_scales)[:, inputs])

    def scales(self, name: str, shape: Shape) -> Tensor:
        """Scales of a matrix `[out, groups]`, or `[out, in]` for inputs out of order.

        Raises:
            ValueError: another shape is recorded, or a scale or group that cannot be.
            NotImplementedError: it has zeros other than 8.
        """

        def tensor(suffix: str) -> Tensor:
            return self._files.read(self._stored(name, suffix))

        if not self._is_gptq:
            recorded = tuple(tensor("weight_shape").tolist())
            if recorded != tuple(shape):
                raise ValueError(
                    f"{self._files.where(self._stored(name, 'weight_shape'))} must be "
                    f"{list(shape)}, got {list(recorded)}"
                )
            return self._finite(self._stored(name, "weight_scale"))
        zeros = int4.gptq_zeros(tensor("qzeros"), shape[0], self._config.format == "gptq_v2")
        if not bool((zeros == int4.ZERO).all()):
            raise NotImplementedError(
                f"{self._files.where(self._stored(name, 'qzeros'))} must hold zeros of {int4.ZERO} "
                f"(sym true), got {int(zeros[zeros != int4.ZERO][0])}"
            )
        scales = self._finite(self._stored(name, "scales")).t().contiguous()
        if self._is_in_order(name, shape):
            return scales
        groups = tensor("g_idx").long()
        if bool(((groups < 0) | (groups >= scales.shape[1])).any()):
            raise ValueError(
                f"{self._files.where(self._stored(name, 'g_idx'))} must hold groups in [0, "
                f"{scales.shape[1]}), got {int(groups.min())} to {int(groups.max())}"
            )
        return scales[:, groups]

    def _copy_words(self, name: str, target: Tensor, piece: Piece) -> None:
        """Write the words of 8 codes of a piece, whose inputs begin between words, to `target`."""
        outs, inputs = piece.window
        shape = piece.shape[0], -(-piece.shape[1] // 8)
        begin = outs.start, inputs.start // 8
        if self._is_gptq:
            shape, begin, target = shape[::-1], begin[::-1], target.t()
        part = Piece(shape, begin, tuple(target.shape))
        self._files.copy_to(self._stored(name, self._marker), target, part)

    def _is_in_order(self, name: str, shape: Shape) -> bool:
        """Whether inputs that share a scale follow each other."""
        if not self._is_gptq:
            return True
        order = torch.arange(shape[1]) // self.group_size(shape)
        return torch.equal(self._files.read(self._stored(name, "g_idx")).long(), order)

    def _finite(self, name: str) -> Tensor:
        scales = self._files.read(name)
        if not bool(scales.isfinite().all()):
            raise ValueError(f"{self._files.where(name)} must hold finite scales")
        return scales

    @staticmethod
    def _stored(name: str, suffix: str) -> str:
        return name.removesuffix("weight") + suffix
