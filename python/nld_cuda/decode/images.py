"""Images in prompts: which tokens stand for them, and what is read in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nld_cuda.model.images import ImageInput

if TYPE_CHECKING:
    from nld_cuda.decode.state import Request
    from nld_cuda.model.transformer import NLDModel
    from nld_cuda.model.vision import VisionEncoder

Images = ImageInput | Sequence[ImageInput | None] | Sequence[Sequence[ImageInput] | None]


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """One image of a prompt.

    Attributes:
        pixels: `[channels, height, width]`, prepared.
        places: of its image tokens in the prompt, row by row of the image.
    """

    pixels: Tensor
    places: Sequence[int]

    @cached_property
    def digest(self) -> bytes:
        """The same for the same pixels."""
        data = self.pixels.detach().cpu().float().contiguous()
        shape = str(list(data.shape)).encode()
        return hashlib.sha256(shape + data.numpy().tobytes()).digest()


@dataclass(frozen=True)
class ImageTokens:
    """Ids that lay out an image: [start], rows of image tokens, a break between rows, an end.

    Attributes:
        image: stands for one piece of an image.
        start, row_break, end: None where the tokenizer has no such token.
        placeholder: text that stands for a whole image in a prompt.
    """

    image: int
    start: int | None
    row_break: int | None
    end: int | None
    placeholder: str

    @classmethod
    def of(cls, model: NLDModel) -> ImageTokens:
        """Find the ids of a model with a vision tower."""
        config = _vision(model).config
        tokenizer = getattr(model, "tokenizer", None)

        def find(name: str) -> int | None:
            found: int | None = None if tokenizer is None else tokenizer.token_id(name)
            return found

        pad = find("<|image_pad|>")
        if config.is_published and pad is not None:
            # The published code uses these tokens whatever config.json says.
            start, row_break, end = (find(f"<|image_{x}|>") for x in ("start", "break", "end"))
            placeholder = "<|image_pad|>" if start is None else "<|image_start|>"
            return cls(pad, start, row_break, end, placeholder)
        names = _vision(model).processor.token_names
        row_break, end = find(names["image_break_token"]), find(names["image_end_token"])
        return cls(config.image_token_id, None, row_break, end, names["image_token"])

    @property
    def whole(self) -> int:
        """The id of the placeholder."""
        return self.image if self.start is None else self.start

    def layout(self, num_rows: int, num_columns: int) -> list[int]:
        """The tokens of one image."""
        ids = [] if self.start is None else [self.start]
        for row in range(num_rows):
            ids += [self.image] * num_columns
            after = self.end if row == num_rows - 1 else self.row_break
            ids += [] if after is None else [after]
        return ids


def _vision(model: NLDModel) -> VisionEncoder:
    if model.vision is None:
        raise ValueError("generate: images must be left out, this model reads text only")
    return model.vision


def prepare_images(model: NLDModel, images: Sequence[ImageInput]) -> list[Tensor]:
    """Pixels of images; a model that reads text only has none. Raises as `place_images`."""
    return [_vision(model).processor.pixels(image) for image in images]


def with_placeholders(model: NLDModel, text: str, num_images: int) -> str:
    """Put images in front of a text that does not say where they stand."""
    if not num_images:
        return text
    placeholder = ImageTokens.of(model).placeholder
    return text if placeholder in text else placeholder * num_images + text


def images_per_prompt(images: Images | None, num_prompts: int) -> list[list[ImageInput]]:
    """One list of images per prompt, from any of the forms that `generate` takes."""
    if images is None:
        return [[] for _ in range(num_prompts)]
    entries: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    if num_prompts == 1 and not any(e is None or isinstance(e, list | tuple) for e in entries):
        entries = [entries]
    if len(entries) != num_prompts:
        raise ValueError(
            f"generate: images must have one entry per prompt ({num_prompts}), got {len(entries)}"
        )
    return [[] if e is None else list(e) if isinstance(e, list | tuple) else [e] for e in entries]


def place_images(
    model: NLDModel, prompt: list[int], images: Sequence[ImageInput], which: str = ""
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """A prompt with its placeholders laid out as image tokens, and where each image stands.

    Args:
        prompt: one placeholder per image, or the image tokens of all images already.
        images: in the order of the prompt. None: image tokens in the prompt are ordinary tokens.
        which: names the prompt in errors.

    Raises:
        ValueError: the model reads text only, or the tokens do not fit the images; as
            `ImageProcessor.pixels`.
    """
    if not images:
        return prompt, ()
    vision = _vision(model)
    tokens, edge = ImageTokens.of(model), vision.config.token_size
    pixels = prepare_images(model, images)
    grids = [(p.shape[1] // edge, p.shape[2] // edge) for p in pixels]
    num_pieces = sum(rows * columns for rows, columns in grids)
    num_tokens = prompt.count(tokens.image)
    if tokens.start is not None:
        is_laid_out = (tokens.start, tokens.image) in pairwise(prompt)
    else:  # equal numbers: one placeholder each, or images of one token
        is_laid_out = num_tokens == num_pieces and (
            num_pieces != len(images)
            or (tokens.end is not None and prompt.count(tokens.end) == len(images))
        )
    if prompt.count(tokens.whole) == len(images) and not is_laid_out:
        return _lay_out(prompt, tokens, pixels, grids)
    if num_tokens != num_pieces:
        raise ValueError(
            f"generate: prompt must hold one {tokens.placeholder} (id {tokens.whole}) per image, "
            f"or image tokens (id {tokens.image}) for all pieces; got {len(images)} images of "
            f"{num_pieces} pieces, {prompt.count(tokens.whole)} of the one and {num_tokens} of the "
            f"other{which}"
        )
    places = iter([i for i, token in enumerate(prompt) if token == tokens.image])
    placed = [
        PlacedImage(p, [next(places) for _ in range(rows * columns)])
        for p, (rows, columns) in zip(pixels, grids, strict=True)
    ]
    return prompt, tuple(placed)


def _lay_out(
    prompt: list[int], tokens: ImageTokens, pixels: list[Tensor], grids: list[tuple[int, int]]
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """Image tokens for every placeholder; others in the prompt are ordinary tokens."""
    laid_out: list[int] = []
    placed: list[PlacedImage] = []
    for token in prompt:
        if token != tokens.whole:
            laid_out.append(token)
            continue
        layout = tokens.layout(*grids[len(placed)])
        places = [len(laid_out) + i for i, t in enumerate(layout) if t == tokens.image]
        placed.append(PlacedImage(pixels[len(placed)], places))
        laid_out += layout
    return laid_out, tuple(placed)


def image_marks(request: Request) -> dict[int, bytes]:
    """What a place of the prompt shows: equal tokens of different images are different."""
    return {place: image.digest for image in request.images for place in image.places}


def unread_images(
    model: NLDModel, requests: Sequence[Request], first_rows: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings of the image tokens that no cache holds, and their rows in a prefill.

    Args:
        first_rows: row of the first token that is read, per request.

    Returns:
        `[n, hidden]` and `[n]` int64; None where there are none.
    """
    rows: list[int] = []
    parts: list[tuple[bytes, int]] = []  # image and its first unread token
    pixels: dict[bytes, Tensor] = {}  # an image that several prompts share goes through once
    for request, first_row in zip(requests, first_rows, strict=True):
        for image in request.images if request.max_new_tokens else ():
            unread = [place for place in image.places if place >= request.num_cached]
            if unread:
                rows += [first_row + place - request.num_cached for place in unread]
                parts.append((image.digest, len(image.places) - len(unread)))
                pixels[image.digest] = image.pixels
    if not rows:
        return None, None
    found = dict(zip(pixels, _vision(model).features(list(pixels.values())), strict=True))
    features = torch.cat([found[digest][first:] for digest, first in parts])
    return features, torch.tensor(rows).to(features.device)
