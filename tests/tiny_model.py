"""Random tiny checkpoints in the published layout, and a plain forward pass with no shared code.

`plain_logits` runs one request densely: a matrix says which token sees which, so that "causal
prefix, then a bidirectional block" is one pass without any cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def config_fields(**changes: Any) -> dict[str, Any]:
    """config.json of a small model; `changes` replace published fields, None removes one."""
    fields: dict[str, Any] = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "sliding_window": None,
        "torch_dtype": "float32",
        "mask_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "block_size": 8,
        "dlm_paradigm": "bidirectional",
        "rope_parameters": dict(YARN),
    }
    fields |= changes
    return {name: value for name, value in fields.items() if value is not None}


def random_weights(fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """State dict with the published names; activations stay of order one."""
    hidden, inner, vocab = (fields[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    q_size = fields["num_attention_heads"] * fields["head_dim"]
    kv_size = fields["num_key_value_heads"] * fields["head_dim"]
    matrices = {
        "encoder.embed_tokens.weight": (vocab, hidden),
        "diffusion_head.weight": (vocab, hidden),
    }
    norms = ["encoder.norm.weight"]
    for i in range(fields["num_hidden_layers"]):
        at = f"encoder.layers.{i}"
        matrices |= {
            f"{at}.self_attn.q_proj.weight": (q_size, hidden),
            f"{at}.self_attn.k_proj.weight": (kv_size, hidden),
            f"{at}.self_attn.v_proj.weight": (kv_size, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, q_size),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
        }
        norms += [f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight"]
    weights = {
        name: torch.randn(shape) * 1.5 / math.sqrt(shape[1]) for name, shape in matrices.items()
    }
    weights |= {name: 1 + 0.3 * torch.randn(hidden) for name in norms}
    if fields["tie_word_embeddings"]:
        del weights["diffusion_head.weight"]
    return {name: t.to(dtype) for name, t in weights.items()}


def random_lora(fields: dict[str, Any], rank: int) -> dict[str, Tensor]:
    """Adapter tensors with PEFT's names, large enough to change the logits visibly."""
    q_size = fields["num_attention_heads"] * fields["head_dim"]
    tensors = {}
    for i in range(fields["num_hidden_layers"]):
        at = f"base_model.model.encoder.layers.{i}.self_attn.o_proj"
        tensors[f"{at}.lora_A.weight"] = torch.randn(rank, q_size) / math.sqrt(q_size)
        tensors[f"{at}.lora_B.weight"] = torch.randn(fields["hidden_size"], rank) / math.sqrt(rank)
    return tensors


def write_checkpoint(
    folder: Path,
    fields: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    shards: int = 1,
    lora: dict[str, Tensor] | None = None,
    lora_config: dict[str, Any] | None = None,
) -> Path:
    """Write config.json, one or more safetensors files and, with `lora`, the adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    weights = {name: t.contiguous() for name, t in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = list(weights)
        files = {
            n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)
        }
        for file in set(files.values()):
            save_file({n: weights[n] for n in names if files[n] == file}, folder / file)
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if lora is not None:
        rank = next(iter(lora.values())).shape[0]
        adapter = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 4 * rank,
            "target_modules": ["o_proj"],
            "bias": "none",
        }
        (folder / "linear_spec_lora").mkdir(exist_ok=True)
        (folder / "linear_spec_lora/adapter_config.json").write_text(
            json.dumps(adapter | (lora_config or {}))
        )
        save_file(lora, folder / "linear_spec_lora/adapter_model.safetensors")
    return folder


def plain_inv_freq(rope: dict[str, Any], rotary_dim: int) -> Tensor:
    """One frequency at a time, in float32 as the published model computes them."""
    one = torch.tensor(1.0)
    result = []
    for i in range(rotary_dim // 2):
        period = torch.tensor(rope["rope_theta"]) ** torch.tensor(2 * i / rotary_dim)
        if rope["rope_type"] == "default":
            result.append(one / period)
            continue
        if rope["rope_type"] == "linear":
            result.append(one / period / rope["factor"])
            continue
        bounds = [
            rotary_dim
            * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi))
            / (2 * math.log(rope["rope_theta"]))
            for turns in (rope["beta_fast"], rope["beta_slow"])
        ]
        low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), rotary_dim - 1)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(one / (rope["factor"] * period) * ramp + one / period * (1 - ramp))
    return torch.stack(result)


def plain_logits(
    fields: dict[str, Any],
    weights: dict[str, Tensor],
    tokens: Tensor,
    visible: Tensor,
    dtype: torch.dtype = torch.float64,
    positions: Tensor | None = None,
    side_weights: Sequence[Tensor] | None = None,
    side_from: int = 0,
) -> Tensor:
    """Logits `[tokens, vocab]` of one request; `visible[i, j]`: i sees j. All math in `dtype`.

    Positions `[tokens]` default to 0, 1, 2, ... `side_weights`, one `[hidden, q_size]` per layer,
    is what an adapter adds to o_proj, for the tokens from `side_from` on.
    """
    w = {name: t.to(dtype) for name, t in weights.items()}
    n, dim = tokens.numel(), fields["head_dim"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    rope = fields["rope_parameters"]
    rotary = int(dim * rope.get("partial_rotary_factor", 1.0))
    positions = torch.arange(n) if positions is None else positions
    angle = (positions.float()[:, None] * plain_inv_freq(rope, rotary)).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    beta, period = (
        rope.get("llama_4_scaling_beta", 0.0),
        rope.get("original_max_position_embeddings", 1),
    )
    query_scale = 1 + beta * torch.log1p((positions // period).double())

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.double() if dtype == torch.float64 else x.float()
        return weight * (
            wide / (wide.square().mean(-1, keepdim=True) + fields["rms_norm_eps"]).sqrt()
        ).to(dtype)

    def rotate(x: Tensor) -> Tensor:
        wide = x.to(angle.dtype)
        turned = torch.complex(wide[..., : rotary // 2], wide[..., rotary // 2 : rotary]) * turn
        return torch.cat((turned.real, turned.imag, wide[..., rotary:]), dim=-1).to(dtype)

    x = w["encoder.embed_tokens.weight"][tokens]
    for i in range(fields["num_hidden_layers"]):
        layer = {
            k.removeprefix(f"encoder.layers.{i}."): t for k, t in w.items() if f".layers.{i}." in k
        }
        h = norm(x, layer["input_layernorm.weight"])
        q, k, v = (h @ layer[f"self_attn.{p}_proj.weight"].T for p in "qkv")
        q = rotate(q.view(n, heads, dim)) * query_scale.to(dtype)[:, None, None]
        k = rotate(k.view(n, kv_heads, dim)).repeat_interleave(heads // kv_heads, dim=1)
        v = v.view(n, kv_heads, dim).repeat_interleave(heads // kv_heads, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        attended = torch.einsum("hij,jhd->ihd", probs, v).reshape(n, heads * dim)
        x = x + attended @ layer["self_attn.o_proj.weight"].T
        if side_weights is not None:
            x[side_from:] += attended[side_from:] @ side_weights[i].to(dtype).T
        h = norm(x, layer["post_attention_layernorm.weight"])
        gate, up = (h @ layer[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T
    head = w.get("diffusion_head.weight", w["encoder.embed_tokens.weight"])
    return norm(x, w["encoder.norm.weight"]) @ head.T
