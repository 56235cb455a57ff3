"""The NLD transformer: one forward pass over ragged rows and a paged cache, for every mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nld_cuda import ops
from nld_cuda.model.config import ModelConfig
from nld_cuda.model.linear import Lora, Weight, linear, linear_add_, linear_into
from nld_cuda.model.rope import rope_frequencies
from nld_cuda.parallel.shard import Shard

if TYPE_CHECKING:
    from nld_cuda.model.vision import VisionEncoder


class LayerCaches(Protocol):
    """What the forward pass needs of a KVCache."""

    @property
    def k_layers(self) -> Sequence[Tensor]: ...
    @property
    def v_layers(self) -> Sequence[Tensor]: ...
    @property
    def k_scales(self) -> Sequence[Tensor | None]: ...
    @property
    def v_scales(self) -> Sequence[Tensor | None]: ...


class KVScales(NamedTuple):
    """What the entries of a float8_e4m3fn cache are multiplied with.

    Float32 `[num_layers, num_kv_heads]`, > 0.
    """

    k: Tensor
    v: Tensor


@dataclass(slots=True)
class Layer:
    """Weights of one block: `[out, in]` matrices, dense or in 4 bits, and `[hidden]` norms.

    Attributes:
        qkv: rows of the query, key and value projections, in this order.
        gate_up: rows of the gate, then of the up projection.
        lora: side path of `o`, used where a forward asks for it.
    """

    input_norm: Tensor
    qkv: Weight
    o: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight
    lora: Lora | None = None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide rows `[rows, hidden]` by their root mean square, then multiply by `weight` `[hidden]`.

    The division happens in float32 and is rounded to x's dtype before the product, as the published
    model does; one rounding at the end would differ in bfloat16.
    """
    return torch.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)


class NLDModel:
    """Weights of one checkpoint on one device, and the forward pass.

    Attributes:
        config: shapes and constants; of this rank's part where there is a `shard`.
        shard: which part of the model this process holds; None: all of it.
        device, dtype: of all weights and of the logits. A cache is on this device.
        kv_dtype: of the caches that decoding makes: `dtype`, or torch.float8_e4m3fn.
        kv_scales: theirs in the latter case; None: 1. `calibrate_kv` finds some.
        has_lora: whether a draft adapter is loaded.
        plans_attention: whether a forward makes `ops.attention_plan` for all its layers. CUDA needs
            one (each layer would make its own); the CPU takes its schedule from the lengths.
        vision: turns pictures into embeddings, None for a model that reads text only.
        embed: `[vocab, hidden]`; head: `[vocab, hidden]`, the same tensor where tied. Of a shard
            both hold its own ids only, and so do logits.
    """

    def __init__(
        self,
        config: ModelConfig,
        embed: Tensor,
        layers: Sequence[Layer],
        norm: Tensor,
        head: Weight,
        shard: Shard | None = None,
    ) -> None:
        """Take the weights as they are (`checkpoint.load_model` makes them from files)."""
        self.config, self.shard = config, shard
        self.embed, self.norm, self.head = embed, norm, head
        self.layers = tuple(layers)
        self.device, self.dtype = embed.device, embed.dtype
        self.vision: VisionEncoder | None = None
        self.kv_dtype, self.kv_scales = embed.dtype, cast(KVScales | None, None)
        self.has_lora = bool(self.layers) and all(layer.lora is not None for layer in self.layers)
        self.plans_attention = self.device.type == "cuda"
        inv_freq, self._attention_scaling = rope_frequencies(config.rope)
        self._inv_freq = inv_freq.to(self.device)

    def weights(self) -> list[Weight]:
        """Every weight of this process once, those of adapter and vision tower included."""
        found: list[Weight] = [self.embed, self.norm, self.head]
        for layer in self.layers:
            found += [layer.input_norm, layer.qkv, layer.o]
            found += [layer.mlp_norm, layer.gate_up, layer.down]
            found += [layer.lora.a, layer.lora.b] if layer.lora else []
        found += self.vision.weights.values() if self.vision else ()
        return list({id(t): t for t in found}.values())

    @property
    def num_parameters(self) -> int:
        """Weights in all, those of a tied head once; of this process only, where there are more."""
        return sum(w.numel() for w in self.weights())

    @property
    def num_bytes(self) -> int:
        """Memory of the weights of this process."""
        return sum(
            w.numel() * w.element_size() if isinstance(w, Tensor) else w.num_bytes
            for w in self.weights()
        )

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        cache: LayerCaches,
        page_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor,
        mask_mode: Tensor,
        *,
        block_len: Tensor | None = None,
        block_phase: Tensor | None = None,
        use_lora: bool = False,
        logits_rows: Tensor | None = None,
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
    ) -> Tensor:
        """Run the model over the rows of a batch, append their keys and values, return logits.

        Rows of request b are `cu_seqlens_q[b] .. cu_seqlens_q[b + 1]`. No shape depends on values
        and nothing is read on the host, so a call can be captured in a CUDA graph.

        Args:
            tokens: `[total]` int64, in the vocabulary.
            positions: `[total]` int32, absolute.
            slot_mapping: `[total]` int32, cache slot of each row, -1: not written.
            cache: a KVCache of this model's device and dtype, or float8_e4m3fn; written at the
                slots.
            page_table: `[batch, max_pages]` int32.
            seq_lens: `[batch]` int32, including the current rows.
            cu_seqlens_q: `[batch + 1]` int32.
            mask_mode: `[batch]` int32, see `ops.block_attention`.
            block_len, block_phase: `[batch]` int32, for the mask modes that need them.
            use_lora: whether the draft adapter is on.
            logits_rows: `[rows]` int64, rows to compute logits for; None: all.
            features, feature_rows: `[n, hidden]`, `[n]` int64: embeddings that take the place of
                those of the tokens in these rows (pieces of images).

        Returns:
            `[total or rows, vocab]` in the model's dtype (of a shard: its own ids). Row i holds the
            prediction *for* row i under a FULL mask (tokens are denoised in place), for the token
            after it under CAUSAL.

        Raises:
            ValueError: use_lora without an adapter.
            RuntimeError: from the ops, where an argument does not fit.
        """
        hidden = self.hidden(
            tokens, positions, slot_mapping, cache, page_table, seq_lens, cu_seqlens_q, mask_mode,
            block_len=block_len, block_phase=block_phase, use_lora=use_lora,
            features=features, feature_rows=feature_rows,
        )  # fmt: skip
        return self.logits(hidden, logits_rows)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute logits `[rows, vocab]` of `hidden` `[total, hidden]`, or of its `rows` (int64).

        `forward` is `logits(hidden(...))`; apart where the rows depend on other rows' logits.
        """
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        return linear(rms_norm(hidden, self.norm, self.config.rms_norm_eps), self.head)

    @torch.inference_mode()
    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        cache: LayerCaches,
        page_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor,
        mask_mode: Tensor,
        *,
        block_len: Tensor | None = None,
        block_phase: Tensor | None = None,
        use_lora: bool = False,
        features: Tensor | None = None,
        feature_rows: Tensor | None = None,
    ) -> Tensor:
        """Run all layers and return `[total, hidden]`, not normed. Arguments as `forward`."""
        if use_lora and not self.has_lora:
            raise ValueError("forward: use_lora must be False, this model has no adapter, got True")
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        eps, beta = config.rms_norm_eps, config.rope.query_scale_beta
        scale_len = config.rope.original_len if beta else 0
        inv_freq, attention_scaling = self._inv_freq, self._attention_scaling
        silu, rope_append_, block_attention = F.silu, ops.rope_append_, ops.block_attention
        embed: Callable[[Tensor, Tensor], Tensor] = F.embedding
        add_: Callable[..., None] = linear_add_
        if self.shard is not None:
            embed, add_ = self.shard.embedding, self.shard.linear_add_

        # One buffer and one set of views for all layers: a layer then makes few torch calls.
        total, inner = tokens.shape[0], config.intermediate_size
        x = embed(tokens, self.embed)
        if features is not None and feature_rows is not None:
            x.index_copy_(0, feature_rows, features.to(x.dtype))
        qkv = x.new_empty(total, config.q_size + 2 * config.kv_size)
        q, k, v = qkv.view(total, heads + 2 * kv_heads, config.head_dim).split(
            (heads, kv_heads, kv_heads), dim=1
        )
        attended = x.new_empty(total, config.q_size)
        attended_heads = attended.view(total, heads, config.head_dim)
        lse = x.new_empty(heads, total, dtype=torch.float32)
        gate_up = x.new_empty(total, 2 * inner)
        gate, up = gate_up.split(inner, dim=1)
        plan = None
        if self.plans_attention and self.layers:
            page_size = cache.k_layers[0].shape[1]
            plan = ops.attention_plan(
                seq_lens, cu_seqlens_q, mask_mode, total_q=total, num_heads=heads,
                num_kv_heads=kv_heads, max_seq_len=page_table.shape[1] * page_size,
                block_len=block_len, block_phase=block_phase,
            )  # fmt: skip
        caches = (cache.k_layers, cache.v_layers, cache.k_scales, cache.v_scales)
        for layer, k_cache, v_cache, k_scale, v_scale in zip(self.layers, *caches, strict=True):
            linear_into(rms_norm(x, layer.input_norm, eps), layer.qkv, qkv)
            rope_append_(
                q, k, v, k_cache, v_cache, positions, slot_mapping, inv_freq,
                attention_scaling=attention_scaling, query_scale_beta=beta,
                query_scale_len=scale_len, k_scale=k_scale, v_scale=v_scale,
            )  # fmt: skip
            block_attention(
                q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, mask_mode,
                block_len=block_len, block_phase=block_phase, plan=plan, k_scale=k_scale,
                v_scale=v_scale, out=attended_heads, lse=lse,
            )  # fmt: skip
            add_(x, attended, layer.o, layer.lora if use_lora else None)
            linear_into(rms_norm(x, layer.mlp_norm, eps), layer.gate_up, gate_up)
            add_(x, silu(gate).mul_(up), layer.down)
        return x
