"""Forward pass of a small model: where its time goes, and against the same model in eager PyTorch.

    python benchmarks/bench_model.py [--threads 1] [--dtype float32] [--model FOLDER]

- `us`: NLDModel.forward, all rows' logits, after 200 cached tokens.
- `torch`: eager PyTorch with SDPA on contiguous caches (a plain implementation's cost).
- `matmuls`: only the matrix products of a forward, with the same buffers: the part no code of ours
  can shorten.
- `overhead`: the same forward with all sizes shrunk to 8: Python, dispatch and allocation, an upper
  bound of Python's share.

Times are CPU seconds of the calling thread where one thread is used, so that a busy machine
disturbs them less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nld_cuda.bench.environment import environment, script_command
from nld_cuda.bench.text import table
from nld_cuda.bench.timing import Contender, CpuClock
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.model import ModelConfig, NLDModel, load_model
from nld_cuda.model.transformer import Layer, rms_norm

RESULTS = Path(__file__).resolve().parent / "results/model.json"
CONTEXT = 200
SHAPE = {  # of the model in the package
    "model_type": "nemotron_labs_diffusion", "vocab_size": 1024, "hidden_size": 160,
    "intermediate_size": 448, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 32, "max_position_embeddings": 1024, "mask_token_id": 3,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0,
                        "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1},
}  # fmt: skip


def random_model(config: ModelConfig, dtype: torch.dtype) -> NLDModel:
    """Make a model with random weights of the config's shapes."""

    def weight(out: int, size: int) -> Tensor:
        return (torch.randn(out, size) / size**0.5).to(dtype)

    hidden, inner = config.hidden_size, config.intermediate_size
    layers = [
        Layer(
            input_norm=torch.ones(hidden, dtype=dtype),
            qkv=weight(config.q_size + 2 * config.kv_size, hidden),
            o=weight(hidden, config.q_size),
            mlp_norm=torch.ones(hidden, dtype=dtype),
            gate_up=weight(2 * inner, hidden),
            down=weight(hidden, inner),
        )
        for _ in range(config.num_layers)
    ]
    embed, head = weight(config.vocab_size, hidden), weight(config.vocab_size, hidden)
    return NLDModel(config, embed, layers, torch.ones(hidden, dtype=dtype), head)


@dataclasses.dataclass
class Inputs:
    """`rows` causal rows after CONTEXT cached tokens, and the cache they go to."""

    tokens: Tensor
    positions: Tensor
    cache: KVCache
    page_table: Tensor

    @staticmethod
    def random(model: NLDModel, rows: int) -> Inputs:
        total = CONTEXT + rows
        cache = KVCache(model.config, total // 16 + 1, 16, "cpu", model.dtype)
        cache.k.normal_()
        cache.v.normal_()
        tokens = torch.randint(0, model.config.vocab_size, (rows,))
        positions = torch.arange(CONTEXT, total, dtype=torch.int32)
        return Inputs(tokens, positions, cache, cache.allocate(1, total))


def forward_call(model: NLDModel, inputs: Inputs) -> Callable[[], Tensor]:
    """Return the forward pass."""
    tokens, positions, cache, table = (getattr(inputs, f.name) for f in dataclasses.fields(inputs))
    rows = tokens.numel()
    slots = cache.slots(table, torch.zeros(rows, dtype=torch.int64), positions)
    lens, cu, mode = (
        torch.tensor(v, dtype=torch.int32) for v in ([CONTEXT + rows], [0, rows], [1])
    )
    return lambda: model.forward(tokens, positions, slots, cache, table, lens, cu, mode)


def torch_call(model: NLDModel, inputs: Inputs) -> Callable[[], Tensor]:
    """Return the same forward in eager PyTorch: separate projections, torch rope, SDPA."""
    config, rows = model.config, inputs.tokens.numel()
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    total = CONTEXT + rows
    keys, values = (
        t.flatten(1, 2)[:, None, :total].transpose(2, 3).contiguous()
        for t in (inputs.cache.k, inputs.cache.v)
    )
    angle = inputs.positions[:, None] * model._inv_freq
    factor = model._attention_scaling
    cos, sin = ((f(angle) * factor).repeat(1, 2).to(model.dtype) for f in (torch.cos, torch.sin))
    steps = inputs.positions // max(config.rope.original_len, 1)
    scale = (1 + config.rope.query_scale_beta * torch.log1p(steps)).to(model.dtype)[:, None]
    mask = torch.ones(rows, total, dtype=torch.bool).tril(CONTEXT)
    sizes = [config.q_size, config.kv_size, config.kv_size]
    split = [(*layer.qkv.split(sizes), *layer.gate_up.chunk(2)) for layer in model.layers]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    @torch.inference_mode()
    def call() -> Tensor:
        x = F.embedding(inputs.tokens, model.embed)
        for i, layer in enumerate(model.layers):
            w_q, w_k, w_v, w_gate, w_up = split[i]
            h = rms_norm(x, layer.input_norm, config.rms_norm_eps)
            q, k, v = (
                F.linear(h, w).view(1, rows, -1, dim).transpose(1, 2) for w in (w_q, w_k, w_v)
            )
            keys[i, :, :, CONTEXT:] = rotate(k)
            values[i, :, :, CONTEXT:] = v
            attended = F.scaled_dot_product_attention(
                rotate(q) * scale, keys[i], values[i], attn_mask=mask, enable_gqa=heads != kv_heads
            )
            x = x + F.linear(attended.transpose(1, 2).reshape(rows, -1), layer.o)
            h = rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
            x = x + F.linear(F.silu(F.linear(h, w_gate)) * F.linear(h, w_up), layer.down)
        return F.linear(rms_norm(x, model.norm, config.rms_norm_eps), model.head)

    return call


def matmul_call(model: NLDModel, rows: int) -> Callable[[], None]:
    """Return only the matrix products of a forward."""
    pairs = []
    for weight in [
        w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)
    ] + [model.head]:
        x = torch.randn(rows, weight.shape[1]).to(model.dtype)
        pairs.append((x, weight.t(), x.new_empty(rows, weight.shape[0])))

    @torch.inference_mode()
    def call() -> None:
        for x, weight, out in pairs:
            torch.mm(x, weight, out=out)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of random weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = CpuClock("cpu" if options.threads == 1 else "wall")
    dtype = getattr(torch, options.dtype)
    config = ModelConfig.from_dict(SHAPE)
    model = (
        load_model(options.model, "cpu", dtype) if options.model else random_model(config, dtype)
    )
    config = model.config
    small = dataclasses.replace(
        config, vocab_size=8, hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1,
        head_dim=8, rope=dataclasses.replace(config.rope, rotary_dim=8),
    )  # fmt: skip
    shrunk = random_model(small, dtype)
    rows_made = []
    for rows in (1, 8, 16, 32):
        inputs = Inputs.random(model, rows)
        ours, plain = forward_call(model, inputs), torch_call(model, inputs)
        allowed = (1e-4 if dtype == torch.float32 else 0.1) * plain().norm()
        assert (ours() - plain()).norm() <= allowed, "both must compute the same"
        functions = {
            "nld": ours,
            "torch": plain,
            "matmuls": matmul_call(model, rows),
            "overhead": forward_call(shrunk, Inputs.random(shrunk, 1)),
        }
        contenders = {name: Contender([function]) for name, function in functions.items()}
        measured = clock.measure(contenders, budget_s=4.0)
        us = {name: m.eager.median_us for name, m in measured.items()}
        rows_made.append(
            {
                "case": f"{rows} rows",
                "us": us["nld"],
                "us/layer": us["nld"] / config.num_layers,
                "torch us": us["torch"],
                "x torch": us["torch"] / us["nld"],
                "% matmuls": 100 * us["matmuls"] / us["nld"],
                "% overhead": 100 * us["overhead"] / us["nld"],
                "timings": {name: dataclasses.asdict(m.eager) for name, m in measured.items()},
            }
        )
    print(table([{k: v for k, v in row.items() if k != "timings"} for row in rows_made]))
    document = {
        "benchmark": "model", "command": script_command(), "environment": environment(),
        "rows": rows_made,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: benchmarks/results/{RESULTS.name}")


if __name__ == "__main__":
    main()
