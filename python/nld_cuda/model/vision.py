"""The vision tower and the projector of a checkpoint, run by transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nld_cuda.model.images import ImageProcessor, missing_extra

if TYPE_CHECKING:
    from nld_cuda.model.config import ModelConfig

TOWER, PROJECTOR = "encoder.vision_tower.", "encoder.multi_modal_projector."


def vision_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of the tensors of tower and projector; none without a tower."""
    vision = config.vision
    if vision is None:
        return {}
    size, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{TOWER}patch_conv.weight": (size, vision.num_channels, patch, patch),
        f"{TOWER}ln_pre.weight": (size,),
    }
    for i in range(vision.num_layers):
        layer = f"{TOWER}transformer.layers.{i}."
        shapes |= {f"{layer}attention_norm.weight": (size,), f"{layer}ffn_norm.weight": (size,)}
        shapes |= {f"{layer}attention.{x}_proj.weight": (size, size) for x in "qkvo"}
        shapes |= {f"{layer}feed_forward.{x}_proj.weight": (inner, size) for x in ("gate", "up")}
        shapes[f"{layer}feed_forward.down_proj.weight"] = (size, inner)
    text = config.hidden_size
    shapes |= {
        f"{PROJECTOR}norm.weight": (size,),
        f"{PROJECTOR}patch_merger.merging_layer.weight": (size, size * vision.merge_size**2),
        f"{PROJECTOR}linear_1.weight": (text, size),
        f"{PROJECTOR}linear_2.weight": (text, text),
    }
    if vision.projector_bias:
        shapes |= {f"{PROJECTOR}linear_{n}.bias": (text,) for n in (1, 2)}
    return shapes


class VisionEncoder:
    """Turns pictures into embeddings. transformers is needed from the first picture on.

    Attributes:
        config: its sizes.
        processor: prepares pictures for it.
        weights: those of `vision_shapes`, on one device.
    """

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], processor: ImageProcessor
    ) -> None:
        """Take weights of the right shapes as they are."""
        self.config, self.weights, self.processor = processor.config, weights, processor
        self._model_config = config
        self._modules: tuple[Any, Any] | None = None

    @torch.inference_mode()
    def features(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings `[tokens, hidden]` of pictures `[channels, height, width]`, one by one.

        Row by row of their tokens, in the model's dtype. (All at once would pad them to one size
        and need a mask of all patches by all patches.)

        Raises:
            ImportError: transformers is missing; the message names the extra.
        """
        if self._modules is None:
            self._modules = self._make_modules()
        tower, projector = self._modules
        some_weight = self.weights[f"{PROJECTOR}norm.weight"]
        layer = self.config.feature_layer
        found = []
        for image in pixels:
            sizes = [(image.shape[1], image.shape[2])]
            batch = image[None].to(some_weight)
            seen = tower(batch, image_sizes=sizes, output_hidden_states=layer != -1)
            patches = seen.last_hidden_state if layer == -1 else seen.hidden_states[layer]
            found.append(projector(patches[0], sizes))
        return found

    @torch.inference_mode(False)
    def _make_modules(self) -> tuple[Any, Any]:
        """Tower and projector around the weights, which are not copied."""
        try:
            from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig
            from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
            from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel
        except ImportError as error:
            raise missing_extra(error) from error
        vision, text = self.config, self._model_config
        tower_config: Any = PixtralVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            num_channels=vision.num_channels,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=vision.hidden_act,
        )
        # By itself, as versions of transformers give its kind of rope different names.
        tower_config.rope_parameters["rope_theta"] = vision.rope_theta
        # Of the text the projector needs these two.
        text_config = MistralConfig(hidden_size=text.hidden_size, rms_norm_eps=text.rms_norm_eps)
        config = Mistral3Config(
            vision_config=tower_config,
            text_config=text_config,
            projector_hidden_act=vision.projector_act,
            spatial_merge_size=vision.merge_size,
            vision_feature_layer=vision.feature_layer,
            multimodal_projector_bias=vision.projector_bias,
        )
        with torch.device("meta"):
            tower, projector = PixtralVisionModel(tower_config), Mistral3MultiModalProjector(config)
        # What no file holds, made anew off the meta device.
        tower.patch_positional_embedding = type(tower.patch_positional_embedding)(tower_config)
        for module, prefix in ((tower, TOWER), (projector, PROJECTOR)):
            own = {n: t for n, t in self.weights.items() if n.startswith(prefix)}
            module.load_state_dict({n.removeprefix(prefix): t for n, t in own.items()}, assign=True)
            module.eval().requires_grad_(False)
        tower.patch_positional_embedding.to(self.weights[f"{PROJECTOR}norm.weight"].device)
        return tower, projector
