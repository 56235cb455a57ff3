"""Define the tiny model with the published parameter names, and its drafting adapter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny_tasks as tasks

BLOCK = 16
DIFFUSION_WEIGHT = 0.3
LORA_RANK, LORA_ALPHA = 32, 128

CONFIG = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "vocab_size": 0,  # filled from the tokenizer
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.09,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": False,
    "rope_theta": 10000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "bos_token_id": tasks.BOS,
    "eos_token_id": tasks.EOS,
    "pad_token_id": tasks.PAD,
    "mask_token_id": tasks.MASK,
    "dlm_paradigm": "bidirectional",
    "block_size": BLOCK,
    "dlm_loss_weight": DIFFUSION_WEIGHT,
    "ar_loss_weight": 1.0,
    "dp_varying_mask_ratio": False,
    "attn_implementation": "sdpa",
    "torch_dtype": "float32",
}

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> output


def rope_table(config: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cos, sin ``[max_positions, head_dim]`` (YaRN) and the llama-4 query scale."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    theta, factor = rope["rope_theta"], rope["factor"]
    original = rope["original_max_position_embeddings"]

    def corner(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(corner(rope["beta_fast"])), 0)
    high = min(math.ceil(corner(rope["beta_slow"])), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64)
    plain = theta ** (-2 * index / dim)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    inv_freq = plain / factor * ramp + plain * (1 - ramp)
    positions = torch.arange(config["max_position_embeddings"], dtype=torch.float64)
    angle = torch.outer(positions, inv_freq).repeat(1, 2)
    scale = 1 + rope["llama_4_scaling_beta"] * torch.log1p(torch.floor(positions / original))
    return angle.cos().float(), angle.sin().float(), scale.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotate-half RoPE to ``[batch, heads, rows, dim]``."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(nn.Module):
    """Project, rotate, attend by the given rule; the LoRA applies to the first ``lora_rows``."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.dim, hidden = config["head_dim"], config["hidden_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, heads * self.dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(heads * self.dim, hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, ...],
        layer: int,
        attend: Attend,
        lora: Lora | None,
        lora_rows: int,
    ) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            proj(x).view(b, n, -1, self.dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin, scale = rope
        with torch.autocast("cpu", enabled=False):  # attention is faster in f32 than in bf16 here
            q, k, v = q.float(), k.float(), v.float()
            out = attend(layer, rotate(q, cos, sin) * scale, rotate(k, cos, sin), v)
        out = out.transpose(1, 2).reshape(b, n, -1)
        y = self.o_proj(out)
        if lora is None:
            return y
        delta = out[:, :lora_rows] @ lora.a[layer].T @ lora.b[layer].T * (LORA_ALPHA / LORA_RANK)
        return torch.cat((y[:, :lora_rows] + delta, y[:, lora_rows:]), 1)


class Mlp(nn.Module):
    """Compute down(silu(gate(x)) * up(x))."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Run one pre-norm transformer layer."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, *args: object) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *args)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyModel(nn.Module):
    """An NLD transformer whose attention rule is given per call."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Module()
        self.encoder.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.encoder.layers = nn.ModuleList(
            Layer(config) for _ in range(config["num_hidden_layers"])
        )
        self.encoder.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.diffusion_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = (2 * config["num_hidden_layers"]) ** 0.5 if deep else 1.0
                nn.init.normal_(p, std=config["initializer_range"] / depth)
        self.rope = rope_table(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        lora: Lora | None = None,
        lora_rows: int = 0,
    ) -> Tensor:
        """Return the normed hidden states of ``tokens`` at ``positions`` (1-d or per row)."""
        rope = tuple(t[positions].unsqueeze(-3) for t in self.rope[:2])
        rope += (self.rope[2][positions][..., None].unsqueeze(-3),)
        x = self.encoder.embed_tokens(tokens)
        for i, layer in enumerate(self.encoder.layers):
            x = layer(x, rope, i, attend, lora, lora_rows)
        return self.encoder.norm(x)


@torch.no_grad()
def look_back(model: TinyModel) -> None:
    """Start the heads of layer 0 as previous-token heads: head h looks h + 1 tokens back.

    All embeddings share a direction, which q and k read, so that scores depend on the distance
    alone. Looking things up is built on such heads; found by chance they cost most of the training.
    """
    config, layer = model.config, model.encoder.layers[0].self_attn
    hidden, dim = config["hidden_size"], config["head_dim"]
    shared = torch.ones(hidden)
    model.encoder.embed_tokens.weight.normal_().add_(shared)
    read = shared / shared.norm() ** 2 * 2**0.5  # of a normed embedding: 1
    amplitude = torch.zeros(dim // 2)
    amplitude[:4] = torch.tensor([8.0, 8.0, 4.0, 4.0]) * dim**0.5
    key = torch.cat((amplitude.sqrt(), torch.zeros(dim // 2)))
    layer.k_proj.weight.copy_(torch.outer(key.repeat(config["num_key_value_heads"]), read))
    cos, sin = model.rope[0], model.rope[1]
    for head in range(config["num_attention_heads"]):
        back = head + 1
        query = rotate(key[None], cos[back], -sin[back])[0]
        layer.q_proj.weight[head * dim : (head + 1) * dim] = torch.outer(query, read)


class Lora(nn.Module):
    """Hold the drafting adapter: a low-rank change of every o_proj."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        inner = config["num_attention_heads"] * config["head_dim"]
        self.a = nn.ParameterList(
            nn.Parameter(torch.randn(LORA_RANK, inner) * inner**-0.5) for _ in range(layers)
        )
        self.b = nn.ParameterList(
            nn.Parameter(torch.zeros(hidden, LORA_RANK)) for _ in range(layers)
        )

    def peft_state(self) -> dict[str, Tensor]:
        """Return the tensors under PEFT's names."""
        prefix = "base_model.model.encoder.layers.{}.self_attn.o_proj.lora_{}.weight"
        return {
            prefix.format(i, name): w.detach().clone()
            for name, ws in (("A", self.a), ("B", self.b)) for i, w in enumerate(ws)
        }  # fmt: skip
