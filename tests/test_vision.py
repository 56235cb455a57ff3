"""Pictures in prompts: against transformers' own Mistral 3, in every mode, with sessions, wrong."""

from __future__ import annotations

import io
import json
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

import nld_cuda
from model_session import Session, causal, relative_error
from nld_cuda import NLDModel
from nld_cuda.model.checkpoint import canonical_name
from nld_cuda.model.images import MEAN, STD, ImageProcessor
from nld_cuda.model.vision_config import VisionConfig
from nld_cuda.ops import MaskMode
from nld_cuda.quantize import quantize
from test_cli import run
from tiny_model import plain_logits
from tiny_vision import (
    BREAK,
    END,
    IMAGE,
    MISTRAL,
    SPECIAL,
    their_logits,
    theirs,
    vision_fields,
    vision_weights,
    write_json,
    write_vision_checkpoint,
)

EDGE = 8  # pixels of a token
MODES: dict[str, dict[str, Any]] = {
    "ar": {},
    "linear_spec": {"block_length": 5},
    "quadratic_spec": {"block_length": 3},
    "diffusion": {"block_length": 6, "threshold": 0.4},
}


def picture(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Prepared pixels of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, EDGE * rows, EDGE * columns, generator=generator)


def laid_out(rows: int, columns: int) -> list[int]:
    row = [*[IMAGE] * columns, BREAK]
    return [*(row * rows)[:-1], END]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[NLDModel, Any]:
    """A model in the published layout with Mistral's image tokens, and transformers' of it."""
    torch.manual_seed(0)
    fields = vision_fields(vocab_size=37)
    weights = vision_weights(fields)
    folder = tmp_path_factory.mktemp("vlm")
    write_vision_checkpoint(folder, fields, weights, MISTRAL)
    return nld_cuda.load(folder), theirs(fields, weights)


CASES = {
    "published": {},
    "other_sizes": {
        "num_key_value_heads": 1, "spatial_merge_size": 1, "vision_feature_layer": -2,
        "multimodal_projector_bias": True, "projector_hidden_act": "silu",
        "vision_config": {
            "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3, "patch_size": 8,
            "hidden_act": "silu", "rope_theta": 500.0,
        },
    },
    "heads_as_published": {  # hidden = heads * head_dim = 4 * tower, tower heads of half the size
        "hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 1,
    },
    "tied": {"tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_logits_equal_those_of_transformers(case: str, layout: str, tmp_path: Path) -> None:
    """All rows, read in pieces that cut through images; and the last rows of a ragged batch."""
    torch.manual_seed(1)
    changes = dict(CASES[case])
    fields = vision_fields(**changes)
    weights = vision_weights(fields | {"tie_word_embeddings": False})
    if fields["tie_word_embeddings"]:
        weights["encoder.embed_tokens.weight"] = weights.pop("diffusion_head.weight") / 3
    other = theirs(fields, weights)
    if layout == "transformers":
        other.save_pretrained(tmp_path, max_shard_size="60KB")
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mistral3"
    else:
        write_vision_checkpoint(tmp_path, fields, weights, {})
    model = nld_cuda.load(tmp_path)
    assert model.vision is not None
    shown = [[picture(3, 2), picture(1, 4), picture(2, 2)], [], [picture(2, 1)]]
    sizes = [(3, 2), (1, 4), (2, 2)]
    prompts = [
        [5, *laid_out(*sizes[0]), 7, *laid_out(*sizes[1]), *laid_out(*sizes[2]), 8, 9],
        [4, 6],
        [IMAGE, IMAGE],
    ]
    pixels = shown[0]
    features = model.vision.features(pixels)
    expected = other.get_image_features(pixels[0][None], torch.tensor([[24, 16]])).pooler_output[0]
    assert relative_error(features[0], expected.detach().double()) <= 1e-5

    tokens = torch.tensor(prompts[0])
    session, begin, found = Session(model, 1, len(tokens), 4), 0, torch.cat(features)
    places = torch.nonzero(tokens == IMAGE)[:, 0]
    ours = []
    for rows in tokens.split(5):
        here = (places >= begin) & (places < begin + len(rows))
        (logits,) = session.run(
            [rows], [MaskMode.CAUSAL], features=found[here], feature_rows=places[here] - begin
        )
        ours.append(logits)
        begin += len(rows)
    exact = their_logits(other, prompts[0], pixels).double()
    assert relative_error(torch.cat(ours), exact) <= 1e-5

    last, forward = [], model.forward

    def spy(*args: Any, **kw: Any) -> Tensor:
        last.append(forward(*args, **kw))
        return last[-1]

    model.forward = spy  # type: ignore[method-assign]
    nld_cuda.generate(model, prompts, "ar", images=shown, max_new_tokens=1)
    for row, prompt, images in zip(last[0], prompts, shown, strict=True):
        assert relative_error(row, their_logits(other, prompt, images)[-1].double()) <= 1e-5


def test_text_alone_is_what_the_text_model_says(tmp_path: Path) -> None:
    """The published vocabulary of 131073; image tokens without images are ordinary tokens."""
    torch.manual_seed(2)
    fields = vision_fields(vocab_size=131073, hidden_size=8, num_hidden_layers=1)
    weights = vision_weights(fields)
    write_vision_checkpoint(tmp_path, fields, weights, {})
    tokens = [131072, IMAGE, 131071, 3]
    ids = torch.tensor(tokens)
    text = {n: w for n, w in weights.items() if "vision" not in n and "projector" not in n}
    expected = plain_logits(fields, text, ids, causal(4), torch.float32)[-1]
    result = nld_cuda.generate(nld_cuda.load(tmp_path), tokens, "ar", max_new_tokens=1)
    assert result.tokens == [[int(expected.argmax())]]


@pytest.mark.parametrize("heat", [0.0, 0.8])
def test_all_modes_in_a_ragged_batch(tiny: tuple[NLDModel, Any], heat: float) -> None:
    """Speculation says what ar says, and every request what it says alone."""
    model, other = tiny
    shown = [[picture(2, 3), picture(1, 2)], None, [picture(3, 1, seed=7)], [picture(2, 3)]]
    prompts = ["t4 [IMG] t5 [IMG] t6 t7", "t4 t8", "[IMG]", "t9 t9 [IMG] t1"]
    options: dict[str, Any] = {
        "max_new_tokens": [17, 9, 14, 12], "eos_token_id": (), "temperature": heat,
    }  # fmt: skip
    expected = nld_cuda.generate(model, prompts, "ar", images=shown, seed=5, **options).tokens
    if not heat:
        ids = [4, *laid_out(2, 3), 5, *laid_out(1, 2), 6, 7]
        for token in expected[0]:  # one at a time: independent of any cache
            assert int(their_logits(other, ids, shown[0] or [])[-1].argmax()) == token
            ids.append(token)
    for mode, extra in MODES.items():
        result = nld_cuda.generate(
            model, prompts, mode, images=shown, seed=5, **options, **extra
        ).tokens
        assert result == expected or mode == "diffusion"
        for b, prompt in enumerate(prompts):
            alone = {"max_new_tokens": options["max_new_tokens"][b], "seed": 5 + b}
            alone = options | alone | extra
            events = nld_cuda.stream(model, prompt, mode, images=shown[b], **alone)
            assert [token for e in events for token in e.final_tokens] == result[b]
    for mode, extra in MODES.items():
        changed = [[picture(2, 3, seed=1), picture(1, 2)], *shown[1:]]
        result = nld_cuda.generate(model, prompts, mode, images=changed, seed=5, **options, **extra)
        same = nld_cuda.generate(model, prompts, mode, images=shown, seed=5, **options, **extra)
        assert result.tokens[0] != same.tokens[0] and result.tokens[1:] == same.tokens[1:]


def test_an_image_of_several_prompts_is_encoded_once(
    tiny: tuple[NLDModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny
    calls = counted_images(model, monkeypatch)
    same, other = picture(1, 2), picture(1, 2, seed=3)
    prompts, shown = ["[IMG] t4", "t5 [IMG]", "[IMG]"], [[same], [same.clone()], [other]]
    batch = nld_cuda.generate(model, prompts, "ar", images=shown, max_new_tokens=[5, 5, 0])
    assert calls == [1]
    alone = nld_cuda.generate(model, prompts[1], "ar", images=same, max_new_tokens=5)
    assert alone.tokens[0] == batch.tokens[1] and batch.tokens[2] == []


def counted_images(model: NLDModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each call of the tower from now on."""
    calls: list[int] = []
    features = type(model.vision).features

    def count(self: Any, pixels: list[Tensor]) -> list[Tensor]:
        calls.append(len(pixels))
        return features(self, pixels)

    monkeypatch.setattr(type(model.vision), "features", count)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_sessions(mode: str, tiny: tuple[NLDModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ids of another image are another text; a cached image is not encoded again."""
    model, _ = tiny
    calls = counted_images(model, monkeypatch)
    session = nld_cuda.Session(model, page_size=4)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": (), "page_size": 4}
    options |= MODES[mode]
    ids = [4, *laid_out(2, 2), 5, *laid_out(1, 3), 6]
    first, second, third = picture(2, 2), picture(1, 3), picture(1, 3, seed=4)

    def said(prompt: list[int], images: list[Tensor] | None) -> list[int]:
        fresh = nld_cuda.generate(model, prompt, mode, images=images, **options)
        calls.clear()
        result = nld_cuda.generate(model, prompt, mode, images=images, session=session, **options)
        assert result.tokens == fresh.tokens
        return result.tokens[0]

    said(ids, [first, second])
    assert calls == [2] and session.num_reused == 0
    said(ids, [first, third])
    assert calls == [1] and session.num_reused == 8, "up to where the second image begins"
    text = ids + [t for t in said(ids, [first, third]) if t != IMAGE] + [9, 7]
    assert calls == [] and session.num_reused == len(ids) - 1
    said(text, [first, third])
    assert calls == [] and session.num_reused >= len(ids)
    session.forget(3)  # in the middle of an image
    said(text, [first, third])
    assert calls == [2] and session.num_reused == 3
    said([t for t in text if t != END], None)
    assert calls == [] and session.num_reused == 1, "without images the tokens are ordinary ones"
    said(ids, [second.reshape(3, EDGE, -1), first][::-1])
    assert session.num_reused == 1


# ---- prompts -------------------------------------------------------------------------------------


def read_prompt(model: NLDModel, *args: Any, **kw: Any) -> list[list[int]]:
    """Ids that `generate` reads."""
    seen: list[list[int]] = []
    forward = model.forward

    def spy(tokens: Tensor, positions: Tensor, slots: Tensor, cache: Any, *a: Any, **k: Any) -> Any:
        cu = a[2].tolist()
        seen.extend(tokens[i:j].tolist() for i, j in pairwise(cu))
        return forward(tokens, positions, slots, cache, *a, **k)

    model.forward = spy  # type: ignore[method-assign]
    try:
        nld_cuda.generate(model, *args, mode="ar", max_new_tokens=1, **kw)
    finally:
        del model.forward
    return seen


def test_how_prompts_are_laid_out(tiny: tuple[NLDModel, Any], tmp_path: Path) -> None:
    model, _ = tiny
    a, b, one = picture(2, 3), picture(1, 2), picture(1, 1)
    full = [4, *laid_out(2, 3), *laid_out(1, 2), 5]
    for prompt in ("t4 [IMG] [IMG] t5", [4, IMAGE, IMAGE, 5], full, torch.tensor(full)):
        for images in ([a, b], [[a, b]], (a, b)):
            assert read_prompt(model, prompt, images=images) == [full]
    bare = [t for t in full if t not in (BREAK, END)]
    assert read_prompt(model, bare, images=[a, b]) == [bare], "as long as the count is right"
    assert read_prompt(model, [IMAGE, 4], images=one) == [[IMAGE, END, 4]]
    assert read_prompt(model, [IMAGE, END, 4], images=one) == [[IMAGE, END, 4]]
    two = read_prompt(model, ["[IMG]", "t4"], images=[one, None])
    assert two == [[IMAGE, END], [4]]

    published = vision_fields(image_token_index=10)
    write_vision_checkpoint(tmp_path, published, vision_weights(published), SPECIAL)
    model = nld_cuda.load(tmp_path)
    full = [4, 18, 19, 19, 19, 20, 19, 19, 19, 21, 18, 19, 19, 21, 5]
    for prompt in ("t4 <|image_start|> <|image_start|> t5", full):
        assert read_prompt(model, prompt, images=[a, b]) == [full], "whatever config.json says"
    assert read_prompt(model, "<|image_start|>", images=one) == [[18, 19, 21]]
    stray = read_prompt(model, "<|image_pad|> <|image_start|> t4 <|image_pad|>", images=b)
    assert stray == [[19, 18, 19, 19, 21, 4, 19]], "others are ordinary tokens"

    (tmp_path / "tokenizer.json").unlink()
    model = nld_cuda.load(tmp_path)
    assert read_prompt(model, [4, IMAGE], images=b) == [[4, IMAGE, IMAGE]], "no other token known"


@pytest.mark.parametrize(
    "prompts,images,error,message",
    [
        ("t4", [1], ValueError, r"one \[IMG\] \(id 10\) per image.* got 1 images of 1 pieces, 0"),
        ("[IMG] [IMG] [IMG]", [1, 1], ValueError, "got 2 images of 2 pieces, 3 of the one"),
        ([IMAGE] * 5, [6], ValueError, "got 1 images of 6 pieces, 5 of the one"),
        (["[IMG]", "[IMG]"], [[1], [1, 1]], ValueError, r"of 2 pieces, 1 .*\(prompt 1\)"),
        (["[IMG]", "[IMG]"], [1], ValueError, r"one entry per prompt \(2\), got 1"),
        ("[IMG]", [3.5], TypeError, "an image must be a file, a PIL picture or a tensor.*float"),
        ("[IMG]", [torch.zeros(3, 8, 8).int()], TypeError, "floating-point pixels, got torch.int"),
        ("[IMG]", [torch.zeros(3, 8, 12)], ValueError, r"\[3, 8 \* n, 8 \* m\], got \[3, 8, 12\]"),
        ("[IMG]", [torch.full((3, 8, 8), torch.nan)], ValueError, "must have finite pixels"),
        ("[IMG]", [torch.zeros(1, 3, 8, 8)], ValueError, r"got \[1, 3, 8, 8\]"),
        ("[IMG]", [torch.zeros(3, 0, 8)], ValueError, r"got \[3, 0, 8\]"),
        ("[IMG]", ["no/such.png"], FileNotFoundError, "must be a file, found none at no/such"),
        ("[IMG]", [__file__], ValueError, "test_vision.py must be a picture"),
    ],
)  # fmt: skip
def test_wrong_images(
    prompts: Any, images: list[Any], error: type, message: str, tiny: tuple[NLDModel, Any]
) -> None:
    def shape(entry: Any) -> Any:
        if isinstance(entry, list):
            return [shape(e) for e in entry]
        return picture(1, entry) if isinstance(entry, int) else entry

    with pytest.raises(error, match=message):
        nld_cuda.generate(tiny[0], prompts, "ar", images=shape(images), max_new_tokens=2)


def test_too_long_with_its_images_and_no_tower(tiny: tuple[NLDModel, Any]) -> None:
    with pytest.raises(ValueError, match=r"must fit in 4096 places, got 4161 \+ 1"):
        nld_cuda.generate(tiny[0], "t1 [IMG]", images=picture(64, 64), max_new_tokens=1)
    with pytest.raises(ValueError, match="images must be left out, this model reads text only"):
        nld_cuda.generate(nld_cuda.load("nld-tiny"), "x", images=picture(1, 1))


# ---- pictures ------------------------------------------------------------------------------------


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    data = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(data).convert(mode)


@cache
def config_of(is_published: bool) -> VisionConfig:
    fields = vision_fields() if is_published else vision_fields(model_type="mistral3", text_config={
        "model_type": "ministral3"})  # fmt: skip
    vision = nld_cuda.model.ModelConfig.from_dict(fields).vision
    assert vision is not None and vision.is_published == is_published
    return vision


@pytest.mark.parametrize(
    "name,settings",
    [
        (None, None),
        ("preprocessor_config.json", {
            "image_processor_type": "PixtralImageProcessor", "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.3, 0.4], "size": {"longest_edge": 30}, "resample": 2,
            "patch_size": {"height": 4, "width": 4},
        }),
        ("processor_config.json", {
            "processor_class": "PixtralProcessor", "patch_size": 4, "spatial_merge_size": 2,
            "image_break_token": "<row>", "image_token": None,
            "image_processor": {
                "image_processor_type": "PixtralImageProcessorFast", "size": {"longest_edge": 50},
            },
        }),
    ],
)  # fmt: skip
def test_pictures_are_prepared_as_transformers_does(
    name: str | None, settings: dict[str, Any] | None, tmp_path: Path
) -> None:
    if name is not None:
        write_json(tmp_path, name, settings)
    ours = ImageProcessor.from_folder(tmp_path, config_of(name is None and False))
    inner = {"size": {"longest_edge": 64}} if settings is None else settings
    other = PixtralImageProcessorPil.from_dict(inner.get("image_processor", inner))
    for size, mode in (((61, 37), "RGB"), ((100, 20), "L"), ((3, 90), "P"), ((8, 8), "RGB")):
        image = gradient(*size, mode)
        expected = other(
            images=image, patch_size={"height": EDGE, "width": EDGE}, return_tensors="pt"
        )
        assert torch.equal(ours.pixels(image), expected["pixel_values"][0])
    assert ours.token_names["image_break_token"] == inner.get("image_break_token", "[IMG_BREAK]")
    image.save(tmp_path / "x.png")
    assert torch.equal(ours.pixels(tmp_path / "x.png"), ours.pixels(image))


def bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Along the first axis: OpenCV's cubic kernel (a = -0.75), edges repeated."""
    out = np.zeros((size, *pixels.shape[1:]))
    for i in range(size):
        place = (i + 0.5) * len(pixels) / size - 0.5
        first = int(np.floor(place)) - 1
        for j in range(first, first + 4):
            x, a = abs(place - j), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            out[i] += (near if x <= 1 else far) * pixels[min(max(j, 0), len(pixels) - 1)]
    return out


def test_pictures_of_the_published_layout(tmp_path: Path) -> None:
    """Whole tokens after the longest edge is cut to 1400; no smoothing; transparency on white."""
    ours = ImageProcessor.from_folder(tmp_path, config_of(True))
    for width, height, columns, rows in ((61, 37, 8, 5), (1500, 20, 175, 3), (8, 16, 1, 2)):
        image = gradient(width, height)
        pixels = np.asarray(image, dtype=np.float64)
        wide = bicubic(bicubic(pixels, rows * EDGE).swapaxes(0, 1), columns * EDGE).swapaxes(0, 1)
        expected = ((wide / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)
        actual = ours.pixels(image)
        assert actual.dtype == torch.float32
        assert np.abs(actual.numpy() - expected).max() < 1e-3
    assert list(ours.pixels(gradient(1, 3000)).shape) == [3, 1400, 8], "never less than a token"
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    for mode, colour in (("RGBA", (9, 9, 9, 0)), ("LA", (9, 0)), ("RGB", (255,) * 3)):
        clear = ours.pixels(Image.new(mode, (8, 8), colour))
        assert torch.allclose(clear, white[:, None, None].expand(3, 8, 8))


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    image, exif = gradient(16, 8), Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    for is_published in (True, False):
        ours = ImageProcessor.from_folder(tmp_path, config_of(is_published))
        upright = image.transpose(Image.Transpose.ROTATE_270)
        assert torch.equal(ours.pixels(str(tmp_path / "turned.png")), ours.pixels(upright))


def test_damaged_pictures_and_settings(tmp_path: Path) -> None:
    ours = ImageProcessor.from_folder(tmp_path, config_of(True))
    gradient(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut.png must be a picture"):
        ours.pixels(tmp_path / "cut.png")
    write_json(tmp_path, "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
    with pytest.raises(NotImplementedError, match='image_processor_type "CLIPImageProcessor"'):
        ImageProcessor.from_folder(tmp_path, config_of(True))
    write_json(tmp_path, "preprocessor_config.json", {"size": "large"})
    with pytest.raises(ValueError, match="image cannot be prepared with the checkpoint's settings"):
        ImageProcessor.from_folder(tmp_path, config_of(True)).pixels(gradient(9, 9))
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json: must be a JSON file"):
        ImageProcessor.from_folder(tmp_path, config_of(True))


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        ("encoder.", "encoder.vision_tower.", "diffusion_head."),
        ("language_model.model.", "vision_tower.", "language_model.lm_head."),
        ("model.language_model.", "model.vision_tower.", "lm_head."),  # in memory
        ("model.language_model.model.", "model.vision_tower.", "lm_head."),  # transformers 5.4
    ],
    ids=lambda layout: layout[0],
)
def test_tensor_names(layout: tuple[str, str, str]) -> None:
    text, tower, head = layout
    projector = tower.replace("vision_tower", "multi_modal_projector")
    names = {
        f"{text}layers.3.mlp.up_proj.weight": "encoder.layers.3.mlp.up_proj.weight",
        f"{text}norm.weight": "encoder.norm.weight",
        f"{tower}ln_pre.weight": "encoder.vision_tower.ln_pre.weight",
        f"{projector}linear_1.weight": "encoder.multi_modal_projector.linear_1.weight",
        f"{head}weight": "diffusion_head.weight",
    }
    assert {name: canonical_name(name) for name in names} == names


def test_wrong_vision_tensors_are_listed(tmp_path: Path) -> None:
    fields = vision_fields()
    weights = vision_weights(fields)
    del weights["encoder.vision_tower.ln_pre.weight"]
    weights["encoder.multi_modal_projector.linear_1.weight"] = torch.zeros(3, 4)
    weights["encoder.vision_tower.transformer.layers.2.ffn_norm.weight"] = torch.ones(32)
    write_vision_checkpoint(tmp_path, fields, weights, {})
    with pytest.raises(ValueError) as error:
        nld_cuda.load(tmp_path)
    for part in (
        "model.safetensors", "missing (1): encoder.vision_tower.ln_pre.weight",
        "encoder.multi_modal_projector.linear_1.weight [3, 4], expected [24, 32]",
        "unknown (1): encoder.vision_tower.transformer.layers.2.ffn_norm.weight",
    ):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"vision_config": None}, "vision_config must be given"),
        ({"vision_config": {"model_type": "siglip"}}, 'vision_config.model_type "siglip"'),
        ({"vision_config": {"hidden_act": "relu"}}, 'vision_config.hidden_act "relu"'),
        ({"vision_config": {"num_attention_heads": 5}}, "num_attention_heads must divide"),
        ({"vision_config": {"head_dim": 7}}, "vision_config.head_dim must be 32 / 2"),
        ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size must be an integer >= 1"),
        ({"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, 'rope_type "yarn"'),
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer must be an integer in"),
        ({"vision_feature_layer": -4}, r"must be an integer in \[-3, 2\], got -4"),
        ({"image_token_index": 61}, r"image_token_index must be a token id in \[0, 61\)"),
        ({"image_token_id": 11}, "image_token_id must equal image_token_index 10, got 11"),
        ({"image_token_index": None, "vocab_size": 8}, r"must be a token id in \[0, 8\), got 10"),
        ({"spatial_merge_size": 0}, "spatial_merge_size must be an integer >= 1"),
        ({"text_config": {"model_type": "gemma2"}}, 'text_config.model_type "gemma2"'),
        ({"model_type": "nemotron_labs_diffusion"}, "vision_config .* is not supported"),
    ],
)
def test_wrong_configs(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    fields = vision_fields()
    if isinstance(changes.get("vision_config"), dict):
        changes["vision_config"] = fields["vision_config"] | changes["vision_config"]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        nld_cuda.model.ModelConfig.from_dict(fields | changes)


def test_text_fields_in_an_object_of_their_own() -> None:
    """As transformers nests them; what stands beside the object comes first."""
    flat = vision_fields(tie_word_embeddings=True)
    beside = ("model_type", "vision_config", "image_token_index", "spatial_merge_size")
    inner = {name: value for name, value in flat.items() if name not in beside}
    text = inner | {"model_type": "nemotron_labs_diffusion", "tie_word_embeddings": False}
    outer = {name: flat[name] for name in beside} | {"tie_word_embeddings": True}
    read = nld_cuda.model.ModelConfig.from_dict
    assert read(outer | {"text_config": text}) == read(flat)
    with pytest.raises(ValueError, match=r"text_config.hidden_size must be an integer >= 1"):
        read(outer | {"text_config": text | {"hidden_size": 0}})


def test_without_transformers_or_pillow(
    tiny: tuple[NLDModel, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Text needs neither; a picture says which extra to install."""
    folder = tiny[0].folder
    assert folder is not None
    gradient(8, 8).save(tmp_path / "x.png")
    expected = nld_cuda.generate(tiny[0], "t4 t5", max_new_tokens=4).tokens
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = nld_cuda.load(folder)
    assert nld_cuda.generate(model, "t4 t5", max_new_tokens=4).tokens == expected
    with pytest.raises(ImportError, match=r"pip install nld-cuda\[vision\]"):
        nld_cuda.generate(model, "[IMG]", images=picture(1, 1))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install nld-cuda\[vision\]"):
        nld_cuda.generate(model, "[IMG]", images=tmp_path / "x.png")


def test_a_quantised_copy_sees_as_well(tmp_path: Path) -> None:
    """Tower and projector stay as they are."""
    torch.manual_seed(3)
    fields = vision_fields(hidden_size=64, intermediate_size=64, head_dim=16)
    write_vision_checkpoint(tmp_path / "in", fields, vision_weights(fields), MISTRAL)
    quantize(tmp_path / "in", tmp_path / "out", group_size=32)
    dense, small = nld_cuda.load(tmp_path / "in"), nld_cuda.load(tmp_path / "out", dtype="float32")
    assert dense.vision is not None and small.vision is not None
    for name, weight in dense.vision.weights.items():
        assert torch.equal(small.vision.weights[name], weight)
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert any("vision_tower" in name for name in written["ignore"]), "other readers must know"
    nld_cuda.generate(small, "t4 [IMG]", images=picture(2, 2), max_new_tokens=4)


@pytest.mark.parametrize("how", [{"group_size": 32}, {"format": "fp8"}])
def test_transformers_reads_a_quantised_copy_of_its_own_layout(
    how: dict[str, Any], tmp_path: Path
) -> None:
    """All of it: the head is left out by its name in the file and by its name in the model."""
    torch.manual_seed(3)
    fields = vision_fields(hidden_size=64, intermediate_size=64, head_dim=16)
    theirs(fields, vision_weights(fields)).save_pretrained(tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out", **how)
    other, report = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    head = nld_cuda.load(tmp_path / "in").head
    assert torch.equal(other.lm_head.weight, head)


def test_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures of earlier turns are shown again, from the cache."""
    torch.manual_seed(4)
    fields = vision_fields(vocab_size=37)
    special = MISTRAL | {"<|im_start|>": 4, "<|im_end|>": 5}
    write_vision_checkpoint(tmp_path, fields, vision_weights(fields), special)
    model = nld_cuda.load(tmp_path)
    calls = counted_images(model, monkeypatch)
    chat = nld_cuda.Chat(model, mode="ar", max_new_tokens=7, eos_token_id=())
    first, second = picture(2, 2), picture(1, 3)
    for text, images in (("t7 t8", [first]), ("t9", []), ("[IMG] t7 [IMG]", [second, first])):
        before = list(chat.images)
        calls.clear()
        said = [t for event in chat.ask(text, images=images) for t in event.final_tokens]
        assert calls == ([len(images)] if images else [])
        assert chat.images == before + images
        rendered = chat._text(chat.messages[:-1])
        expected = nld_cuda.generate(
            model, rendered, "ar", images=[chat.images], max_new_tokens=7, eos_token_id=()
        )
        assert said == expected.tokens[0]
    assert chat.session.num_reused > 20 and "[IMG]t7 t8" in chat.messages[0]["content"]
    for images, error in (
        (["no/such.png"], FileNotFoundError),
        ([first, first, first], ValueError),
    ):
        with pytest.raises(error):
            chat.ask("[IMG] [IMG]", images=images)
    assert len(chat.messages) == 6 and len(chat.images) == 3, "as before"
    chat.reset()
    assert chat.images == []

    gradient(20, 12).save(tmp_path / "x y.png")
    lines = f"/image {tmp_path}/x y.png\nt7\nt8\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    common = ["--model", str(tmp_path), "--max-new-tokens", "5"]
    code, out, err = run(capsys, "chat", *common)
    assert code == 0 and err == "" and len(out.splitlines()) == 2
    once = run(capsys, "generate", "t7", "--chat", *common, "--image", str(tmp_path / "x y.png"))
    assert once[1] == out.splitlines()[0] + "\n"


# ---- command line --------------------------------------------------------------------------------


def test_command_line(tiny: tuple[NLDModel, Any], tmp_path: Path, capsys: Any) -> None:
    model, _ = tiny
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    for file, size in zip(files, ((30, 20), (9, 40)), strict=True):
        gradient(*size).save(file)
    common = ["--model", str(model.folder), "--max-new-tokens", "9"]
    shown = ["--image", files[0], "--image", files[1]]
    for prompt in ("t4 [IMG] t5 [IMG]", "t4 t5"):
        inner = prompt if "[IMG]" in prompt else "[IMG][IMG]" + prompt  # in front of the text
        code, out, err = run(
            capsys, "generate", prompt, *common, *shown, "--json", "--mode", "linear-spec"
        )
        expected = nld_cuda.generate(model, inner, images=files, max_new_tokens=9)
        assert code == 0, err
        assert json.loads(out)["tokens"] == expected.tokens[0]
    code, out, _ = run(capsys, "generate", "t4", *common, "--image", files[0])
    expected = nld_cuda.generate(model, "[IMG]t4", images=files[0], max_new_tokens=9)
    assert code == 0 and "".join(out.split()) == expected.text[0].replace(" ", "")
    code, out, _ = run(capsys, "compare", "t4", *common, "--image", files[0], "--json")
    (record,) = json.loads(out)
    tokens = {row["mode"]: row["tokens"] for row in record["modes"]}
    assert code == 0
    assert tokens["ar"] == tokens["linear-spec"] == tokens["quadratic-spec"] == expected.tokens[0]

    for argv, message in (
        (["generate", "[IMG]", *common, "--image", "no/such.png"], "no/such.png"),
        (["generate", "[IMG] [IMG]", *common, "--image", files[0]], "got 1 images"),
        (["generate", "x", "--image", files[0]], "reads text only"),
        (["compare", "--demo", "--image", files[0]], "--demo must stand alone"),
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
