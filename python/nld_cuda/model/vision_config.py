"""What config.json says about images: the vision tower, the projector, the image token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nld_cuda.model.fields import Fields

ACTIVATIONS = ("gelu", "silu")
IMAGE_TOKEN = 10  # of Mistral's vocabularies


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a Pixtral vision tower and of Mistral 3's projector, checked.

    Attributes:
        hidden_size, intermediate_size, num_layers, num_heads, num_channels: of the tower.
        patch_size: pixels of a patch along an edge.
        image_size: most pixels along an edge.
        hidden_act, projector_act: "gelu" or "silu".
        rope_theta: base of the tower's rotary frequencies.
        merge_size: patches along an edge that become one token.
        feature_layer: whose output the projector reads, as an index into the embeddings and the
            outputs of all layers; -1: the last.
        projector_bias: whether the projector's two linear layers have one.
        image_token_id: token that stands for a piece of an image in a prompt.
        is_published: the layout is Nemotron-Labs-Diffusion's own, which has its own picture
            preparation and its own tokens around an image.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    patch_size: int
    image_size: int
    hidden_act: str
    projector_act: str
    rope_theta: float
    merge_size: int
    feature_layer: int
    projector_bias: bool
    image_token_id: int
    is_published: bool

    @property
    def token_size(self) -> int:
        """Pixels of one token along an edge."""
        return self.patch_size * self.merge_size


def read_vision_config(outer: Fields, vocab_size: int, is_published: bool) -> VisionConfig:
    """Check the fields of a model with a vision tower. Raises as `ModelConfig.from_file`."""
    values = outer.required("vision_config", None)
    if not isinstance(values, dict):
        outer.fail("vision_config", "be an object", values)
    read = Fields(values, outer.source, "vision_config.")
    read.supported("model_type", ("pixtral",))
    read.supported("hidden_act", ACTIVATIONS)
    outer.supported("projector_hidden_act", ACTIVATIONS)
    hidden_size, num_heads = read.count("hidden_size"), read.count("num_attention_heads")
    if hidden_size % num_heads or hidden_size // num_heads % 4:
        rule = f"divide hidden_size {hidden_size} into heads of 4 * n elements"
        read.fail("num_attention_heads", rule, num_heads)
    head_dim = read.count("head_dim", default=hidden_size // num_heads)
    if head_dim * num_heads != hidden_size:
        read.fail("head_dim", f"be {hidden_size} / {num_heads} (hidden_size / heads)", head_dim)
    num_layers = read.count("num_hidden_layers")
    layer = outer.get("vision_feature_layer", -1)
    layers = range(-num_layers - 1, num_layers + 1)
    if not isinstance(layer, int) or isinstance(layer, bool) or layer not in layers:
        outer.fail("vision_feature_layer", f"be an integer in [{layers[0]}, {layers[-1]}]", layer)
    ids = [name for name in ("image_token_index", "image_token_id") if outer.get(name) is not None]
    tokens = [outer.token(name, vocab_size) for name in ids] or [IMAGE_TOKEN]
    if len(set(tokens)) > 1:
        outer.fail("image_token_id", f"equal image_token_index {tokens[0]}", tokens[1])
    if tokens[0] >= vocab_size:
        outer.fail("image_token_index", f"be a token id in [0, {vocab_size})", tokens[0])
    return VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=read.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_channels=read.count("num_channels", default=3),
        patch_size=read.count("patch_size"),
        image_size=read.count("image_size", default=1540),
        hidden_act=read.get("hidden_act", "gelu"),
        projector_act=outer.get("projector_hidden_act", "gelu"),
        rope_theta=_rope_theta(read),
        merge_size=outer.count("spatial_merge_size", default=2),
        feature_layer=layer,
        projector_bias=outer.flag("multimodal_projector_bias", default=False),
        image_token_id=tokens[0],
        is_published=is_published,
    )


def _rope_theta(read: Fields) -> float:
    group: Any = read.get("rope_parameters", {})
    if not isinstance(group, dict):
        read.fail("rope_parameters", "be an object", group)
    rope = Fields(group, read.source, f"{read.prefix}rope_parameters.")
    rope.supported("rope_type", ("axial", "default"))
    return rope.number(
        "rope_theta", default=read.number("rope_theta", default=10000.0, minimum=0.0), minimum=0.0
    )
