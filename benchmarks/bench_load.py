"""Measure how a checkpoint loads: time, and the most memory it takes beside the weights.

    python benchmarks/bench_load.py --model 8B --dir /data/random-8b     # 17 GB of disk and memory
    python benchmarks/bench_load.py --checkpoint path/to/checkpoint

`--model` writes a random checkpoint of that shape first (kept, and used again), shard by shard, so
that writing needs the memory of one layer. Loading happens in a process of its own; its peak is the
kernel's own figure of resident memory, pages of mapped files included. With --cold the files are
dropped from the page cache before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import nld_cuda
from nld_cuda.bench.environment import environment, script_command
from nld_cuda.bench.grid import MODELS

INNER = {"3B": 9216, "8B": 14336, "14B": 16384}
MIB = 2**20


def config_of(name: str, layers: int | None, vocab: int | None) -> dict[str, Any]:
    """config.json of a published shape, with fewer layers or tokens where asked."""
    model = MODELS[name]
    return {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": vocab or model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": INNER[name],
        "num_hidden_layers": layers or model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "mask_token_id": 100,
        "eos_token_id": 11,
        "block_size": 32,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1,
        },
    }  # fmt: skip


def write_random(folder: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint of random bfloat16 weights, a shard per layer."""
    hidden, inner, vocab = (config[f"{n}_size"] for n in ("hidden", "intermediate", "vocab"))
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    count = config["num_hidden_layers"]
    shards: list[dict[str, tuple[int, ...]]] = [
        {f"encoder.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        for i in range(count)
    ]
    shards.append({"encoder.embed_tokens.weight": (vocab, hidden)})
    shards.append({"diffusion_head.weight": (vocab, hidden), "encoder.norm.weight": (hidden,)})
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    # The bits of a normal draw matter to nobody: one block of numbers serves every matrix.
    noise = torch.randn(1 << 22).bfloat16() * 0.02
    for i, shapes in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            repeats = -(-size // noise.numel())
            tensors[name] = noise.roll(i).repeat(repeats)[:size].view(shape)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        show = sys.stderr.isatty()
        print(f"\rwriting {file}", end="" if show else "\n", file=sys.stderr, flush=True)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def resident_bytes(field: str) -> int:
    """Resident memory of this process: VmRSS, now, or VmHWM, the most there was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have a line {field}, found none")


def load_here(folder: Path, device: str, dtype: str, **options: Any) -> dict[str, Any]:
    """Load in this process (`options` as of `nld_cuda.load`) and say what it took."""
    torch.empty(1)  # the allocator's own start-up
    start_bytes = resident_bytes("VmRSS")
    begin = time.perf_counter()
    model = nld_cuda.load(folder, device=device, dtype=dtype, **options)
    seconds = time.perf_counter() - begin
    peak = resident_bytes("VmHWM") - start_bytes
    return {
        "seconds": seconds,
        "weight_bytes": model.num_bytes,
        "peak_bytes": peak,
        "peak_over_weights": peak / model.num_bytes if model.device.type == "cpu" else None,
        "gb_per_second": model.num_bytes / seconds / 1e9,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters,
    }


def drop_from_page_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", choices=sorted(MODELS), help="write this shape, random weights")
    source.add_argument("--checkpoint", type=Path, help="a folder that exists")
    parser.add_argument("--dir", type=Path, help="where --model writes")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--vocab", type=int, help="fewer tokens than the model has")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load_here(options.checkpoint, options.device, options.dtype)))
        return
    folder = options.checkpoint
    if folder is None:
        if options.dir is None:
            parser.error("--dir must be given with --model")
        folder = options.dir
        config = config_of(options.model, options.layers, options.vocab)
        written = folder / "config.json"
        if not written.is_file() or json.loads(written.read_text()) != config:
            write_random(folder, config)
    if options.cold:
        drop_from_page_cache(folder)
    child = [sys.executable, __file__, "--checkpoint", str(folder), "--child"]
    child += ["--device", options.device, "--dtype", options.dtype]
    result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    result |= {"cold": options.cold, "shape": options.model}
    result["benchmark"], result["command"] = "load", script_command()
    result["environment"] = environment(torch.device(options.device).type)
    over = result["peak_over_weights"]
    print(
        f"{result['weight_bytes'] / MIB:.0f} MiB of weights in {result['seconds']:.1f} s "
        f"({result['gb_per_second']:.2f} GB/s), peak {result['peak_bytes'] / MIB:.0f} MiB"
        + ("" if over is None else f" = {over:.3f} x the weights")
    )
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
