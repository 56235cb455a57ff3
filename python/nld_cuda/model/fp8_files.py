"""fp8 weights as checkpoints store them: compressed-tensors' float-quantized, and `fp8`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nld_cuda.model import fp8
from nld_cuda.model.fp8 import Fp8Matrix
from nld_cuda.model.quantization import STATIC, Fp8Config
from nld_cuda.model.tensor_files import FLOAT_DTYPES, Piece, TensorFiles

CODES = "F8_E4M3"

Shape = tuple[int, ...]


class Fp8Files:
    """Which matrices of a checkpoint are in fp8, and their codes and scales.

    Told, as for int4, by the tensors that are there. See `checkpoint.StoredFormat`.
    """

    def __init__(self, files: TensorFiles, config: Fp8Config) -> None:
        self._files, self._config = files, config
        if config.format == "fp8":
            self._scale, self._input_scale = "weight_scale_inv", "activation_scale"
        else:
            self._scale, self._input_scale = "weight_scale", "input_scale"

    def holds(self, name: str) -> bool:
        """Whether the matrix `name` (ending in `weight`) is stored quantised."""
        if not name.endswith(".weight"):
            return False
        has_codes = name in self._files and self._files.stored_dtype(name) == CODES
        return has_codes or self._part(name, self._scale) in self._files

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[Shape, tuple[str, ...]]]:
        """Name, shape and possible dtypes of each stored tensor of a matrix `[out, in]`."""
        parts: dict[str, tuple[Shape, tuple[str, ...]]] = {name: (shape, (CODES,))}
        floats = tuple(FLOAT_DTYPES)
        scale = self._part(name, self._scale)
        parts[scale] = (self._fitting(scale, self._scale_shapes(shape)), floats)
        if self._config.activations == STATIC:
            input_scale = self._part(name, self._input_scale)
            parts[input_scale] = (self._fitting(input_scale, [(), (1,), (1, 1)]), floats)
        return parts

    def matrix(
        self, pieces: dict[str, Piece], device: torch.device, products: str
    ) -> Fp8Matrix | None:
        """One matrix of all that `pieces` names, one below the other; None: blocks of scales."""
        if self._config.weights == "block":
            return None
        rows = sum(piece.size[0] for piece in pieces.values())
        inputs = next(iter(pieces.values())).size[1]
        codes = torch.empty((rows, inputs), dtype=fp8.DTYPE, device=device)
        scales = torch.empty((rows, 1), dtype=torch.float32, device=device)
        begin = 0
        for name, piece in pieces.items():
            part = slice(begin, begin + piece.size[0])
            self._copy_codes(name, codes[part], piece)
            scales[part] = self._scales(name, piece.shape)[piece.window[0]]
            begin += piece.size[0]
        way = None
        is_rounded = products == "fp8" or (self._config.activations and device.type == "cuda")
        if is_rounded and fp8.can_scale((rows, inputs)):
            way = fp8.scaled_product(device)
        input_scale = None
        if way is not None and self._config.activations == STATIC:
            # Parts share their inputs: the largest scale cuts nothing off that one of them keeps.
            found = [self._positive(self._part(name, self._input_scale)) for name in pieces]
            input_scale = torch.stack([scale.view(()) for scale in found]).max().to(device)
        return Fp8Matrix(codes, scales, way, input_scale)

    def copy_to(self, name: str, target: Tensor, piece: Piece) -> None:
        """Write the dense piece, each weight rounded once to the dtype of `target`."""
        codes = torch.empty(target.shape, dtype=fp8.DTYPE, device=target.device)
        self._copy_codes(name, codes, piece)
        rows, columns = piece.window
        scales, block_in = self._scales(name, piece.shape)[rows], None
        if self._config.block is not None:
            # A piece may begin inside of a block: then in smaller blocks, of equal scales.
            block_in = math.gcd(columns.start, self._config.block[1])
            scales = scales.repeat_interleave(self._config.block[1] // block_in, dim=1)
            scales = scales[:, columns.start // block_in :]
        fp8.dequantize_into(target, codes, scales.to(target.device), block_in)

    def _copy_codes(self, name: str, codes: Tensor, piece: Piece) -> None:
        self._files.copy_to(name, codes, piece)
        if bool((codes.view(torch.uint8) & 0x7F).max() == 0x7F):
            raise ValueError(f"{self._files.where(name)} must hold finite numbers, got NaN")

    def _scales(self, name: str, shape: Shape) -> Tensor:
        """Float32 `[out, 1]`, or `[out, blocks of inputs]`."""
        scales = self._positive(self._part(name, self._scale))
        if self._config.block is not None:
            return scales.repeat_interleave(self._config.block[0], dim=0)[: shape[0]]
        return scales.reshape(-1, 1).expand(shape[0], 1)

    def _positive(self, name: str) -> Tensor:
        scales = self._files.read(name).float()
        if not bool(((scales > 0) & scales.isfinite()).all()):
            wrong = scales[~((scales > 0) & scales.isfinite())].flatten()[0]
            raise ValueError(
                f"{self._files.where(name)} must hold positive finite scales, got {float(wrong):g}"
            )
        return scales

    def _scale_shapes(self, shape: Shape) -> list[Shape]:
        """Shapes that the scales of a matrix are stored in; the first one is the usual one."""
        if self._config.block is not None:
            block_out, block_in = self._config.block
            return [(-(-shape[0] // block_out), -(-shape[1] // block_in))]
        if self._config.weights == "tensor":
            return [(), (1,), (1, 1)]
        return [(shape[0], 1), (shape[0],)]

    def _fitting(self, name: str, shapes: list[Shape]) -> Shape:
        found = self._files.shape(name) if name in self._files else None
        return found if found in shapes else shapes[0]

    @staticmethod
    def _part(name: str, suffix: str) -> str:
        return name.removesuffix("weight") + suffix
