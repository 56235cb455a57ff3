"""Small models for the tests of quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from compare import assert_equal
from model_session import Session, random_tokens, relative_error
from nld_cuda.model import NLDModel, load_model
from nld_cuda.model.linear import linear
from nld_cuda.ops import MaskMode
from nld_cuda.parallel.shard import Shard
from nld_cuda.quantize import quantize

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


def assert_transformers_reads_alike(tmp_path: Path, least_change: float, **options: Any) -> None:
    """What `quantize` writes, decompressed by the compressed-tensors package itself."""
    torch.manual_seed(0)
    small_llama().save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert quantize(tmp_path / "dense", tmp_path / "small", **options).num_quantized == 14
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small",
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    dense = load_model(tmp_path / "small", "cpu", "float32")
    for mine, theirs in llama_weights(dense, other):
        assert_equal(mine.bfloat16().float(), theirs, "they expand to bfloat16")
    (tokens,) = random_tokens({"vocab_size": 64}, 30)
    with torch.no_grad():
        expected = other(tokens[None]).logits[0].double()
    assert relative_error(logits_of(dense, tokens), expected) <= 0.02
    unquantized = load_model(tmp_path / "dense", "cpu")
    assert relative_error(logits_of(unquantized, tokens), expected) > least_change


def assert_parts_make_up(folder: Path, num_ranks: int = 2) -> None:
    """What the ranks of tensor parallelism read of a quantised checkpoint is the checkpoint."""

    def parts(dtype: str) -> list[NLDModel]:
        found, shards = [], iter(range(num_ranks))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Shard, "of", lambda config, _: Shard(None, next(shards), num_ranks, config)
            )
            for _ in range(num_ranks):
                found.append(load_model(folder, "cpu", dtype, process_group="not asked"))
        return found

    whole, ranks = load_model(folder, "cpu", "float32"), parts("float32")
    config, own = whole.config, ranks[0].config
    for i, layer in enumerate(whole.layers):
        for field in ("o", "down"):
            joined = torch.cat([getattr(rank.layers[i], field) for rank in ranks], dim=1)
            assert_equal(joined, getattr(layer, field), f"{i}.{field}")
        for field, own_sizes in (
            ("qkv", (own.q_size, own.kv_size, own.kv_size)),
            ("gate_up", (own.intermediate_size, own.intermediate_size)),
        ):
            pieces = (getattr(rank.layers[i], field).split(own_sizes) for rank in ranks)
            joined = torch.cat([torch.cat(found) for found in zip(*pieces, strict=True)])
            assert_equal(joined, getattr(layer, field), f"{i}.{field}")

    whole, ranks = load_model(folder, "cpu", "bfloat16"), parts("bfloat16")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, config.q_size, generator=generator).bfloat16()
    halves = zip(ranks, x.split(own.q_size, dim=1), strict=True)
    joined = sum(linear(half.contiguous(), rank.layers[0].o).float() for rank, half in halves)
    assert relative_error(joined, linear(x, whole.layers[0].o)) < 0.02
