"""From a picture to the pixels that a vision tower reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from nld_cuda.model.fields import Fields
from nld_cuda.model.json_files import read_json_object
from nld_cuda.model.vision_config import VisionConfig

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

ImageInput = Union[str, Path, "Picture", Tensor]

# How Nemotron-Labs-Diffusion's own code prepares a picture: no settings file comes with it.
PUBLISHED_EDGE = 1400
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Fields of processor_config.json, and the tokens of Mistral's vocabularies.
TOKEN_NAMES = {
    "image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]",
}  # fmt: skip
PROCESSORS = ("PixtralImageProcessor", "PixtralImageProcessorFast", "PixtralImageProcessorPil")


def missing_extra(error: ImportError) -> ImportError:
    """The error to raise where a package for pictures is missing."""
    return ImportError(
        f"pictures need transformers and Pillow: pip install nld-cuda[vision] ({error})"
    )


class ImageProcessor:
    """Prepares pictures: to RGB, to a size in whole tokens, normalised.

    By transformers' PixtralImageProcessor with the checkpoint's settings. A checkpoint in the
    published layout without settings is prepared as its own code does: bicubic without smoothing,
    edges of at most 1400 pixels, transparency on white.
    """

    def __init__(
        self,
        config: VisionConfig,
        settings: dict[str, Any] | None = None,
        token_names: Mapping[str, str] = TOKEN_NAMES,
    ) -> None:
        """Take the settings of `PixtralImageProcessor` and what image tokens are called."""
        self.config, self.settings, self.token_names = config, settings, token_names

    @classmethod
    def from_folder(cls, folder: Path, config: VisionConfig) -> ImageProcessor:
        """Read the settings of a checkpoint folder.

        Raises:
            ValueError: a settings file is damaged.
            NotImplementedError: it is for another processor.
        """
        settings, names = None, dict(TOKEN_NAMES)
        # The second one is of the whole processor: it names tokens, and may hold the first one.
        for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
            if not file.is_file():
                continue
            fields: Any = read_json_object(file)
            if file.name == "processor_config.json":
                names |= {k: v for k, v in fields.items() if k in names and isinstance(v, str)}
                fields = fields.get("image_processor")
            if isinstance(fields, dict):
                Fields(fields, str(file)).supported("image_processor_type", PROCESSORS)
                settings = fields
        return cls(config, settings, names)

    def pixels(self, image: ImageInput) -> Tensor:
        """Pixels `[channels, height, width]` of a picture, float32.

        Args:
            image: a file, a PIL picture, or such pixels themselves, which stay as they are.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no picture, or pixels are of a wrong shape.
            TypeError: image is something else.
            ImportError: Pillow or transformers is missing; the message names the extra.
        """
        if isinstance(image, Tensor):
            return self._checked(image, "image")
        picture, name = _open(image)
        if self.settings is None and self.config.is_published:
            return self._checked(_published_pixels(picture, self.config), name)
        return self._checked(self._transformers_pixels(picture, name), name)

    def _transformers_pixels(self, picture: Picture, name: str) -> Tensor:
        try:
            from transformers.models.pixtral.image_processing_pil_pixtral import (
                PixtralImageProcessorPil,
            )
        except ImportError as error:
            raise missing_extra(error) from error
        edge = self.config.token_size
        settings = self.settings or {"size": {"longest_edge": self.config.image_size}}
        try:
            made = PixtralImageProcessorPil.from_dict(settings)(
                images=[picture], patch_size={"height": edge, "width": edge}, return_tensors="pt"
            )
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"generate: {name} cannot be prepared with the checkpoint's settings: {error}"
            ) from error
        found: Tensor = made["pixel_values"][0]
        return found

    def _checked(self, pixels: Tensor, name: str) -> Tensor:
        edge, channels = self.config.token_size, self.config.num_channels
        if not pixels.is_floating_point():
            raise TypeError(f"generate: {name} must have floating-point pixels, got {pixels.dtype}")
        shape = list(pixels.shape)
        fits = len(shape) == 3 and shape[0] == channels
        if not fits or shape[1] % edge or shape[2] % edge or not pixels.numel():
            raise ValueError(
                f"generate: {name} must have pixels [{channels}, {edge} * n, {edge} * m], "
                f"got {shape}"
            )
        if not bool(pixels.isfinite().all()):
            raise ValueError(f"generate: {name} must have finite pixels, got NaN or infinity")
        return pixels


def _open(image: ImageInput) -> tuple[Picture, str]:
    """A picture, turned as its camera says, and what to call it in errors."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise missing_extra(error) from error
    if isinstance(image, Image.Image):
        picture, name = image, "image"
    elif isinstance(image, str | Path):
        name = f"image {image}"
        if not Path(image).is_file():
            raise FileNotFoundError(f"generate: image must be a file, found none at {image}")
        try:
            picture = Image.open(image)
            picture.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"generate: {name} must be a picture: {error}") from error
    else:
        raise TypeError(
            "generate: an image must be a file, a PIL picture or a tensor of pixels, "
            f"got {type(image).__name__}"
        )
    if not min(picture.size):
        raise ValueError(f"generate: {name} must have pixels, got a size of {picture.size}")
    return ImageOps.exif_transpose(picture), name


def _published_pixels(picture: Picture, config: VisionConfig) -> Tensor:
    """As the published image_processing.py: OpenCV's bicubic, which is torch's, on float32."""
    from PIL import Image

    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB")
    width, height = picture.size
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = data.view(height, width, 3).permute(2, 0, 1).float()
    ratio = max(1.0, max(width, height) / PUBLISHED_EDGE)
    edge = config.token_size
    size = [max(1, -(-round(n / ratio) // edge)) * edge for n in (height, width)]
    if size != [height, width]:
        pixels = F.interpolate(pixels[None], size=size, mode="bicubic", align_corners=False)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (pixels / 255 - mean) / std
