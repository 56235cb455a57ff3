"""Small models for the tests of quantised weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from model_session import Session
from nld_cuda.model import NLDModel
from nld_cuda.ops import MaskMode

# Sides that quantised products take: multiples of 32 inputs, of 16 outputs.
SIDES = {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": 2,
}  # fmt: skip


def logits_of(model: NLDModel, tokens: Tensor, **options: Any) -> Tensor:
    session = Session(model, 1, tokens.numel(), 4)
    return session.run([tokens], [MaskMode.CAUSAL], **options)[0]


def small_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=None,
    )  # fmt: skip
    llama = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return llama


def llama_weights(ours: NLDModel, llama: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a dense matrix of ours and transformers' own, of every layer."""
    pairs = []
    for layer, other in zip(ours.layers, getattr(llama, "model", llama).layers, strict=True):
        attention, mlp = other.self_attn, other.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        for mine, theirs in (
            (layer.qkv, qkv),
            (layer.o, (attention.o_proj,)),
            (layer.gate_up, (mlp.gate_proj, mlp.up_proj)),
            (layer.down, (mlp.down_proj,)),
        ):
            assert isinstance(mine, Tensor)
            pairs.append((mine, torch.cat([linear.weight for linear in theirs]).detach()))
    return pairs
