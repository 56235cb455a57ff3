"""Products with quantised weights against dense bfloat16, by number of rows.

    python benchmarks/bench_products.py [--device cuda] [--out FILE]

The matrices of the 3B and 8B models that cost most, random. On the CPU one thread, counted in its
CPU seconds, so that a busy machine disturbs less; all ways of a row in turns. Each result is
compared with the dense product of the expanded weights before.

- `dense`: bfloat16 weights.
- `int4`, `int4 expanded`: torch's int4 kernel, and slices of the matrix expanded before a dense
  product; `Int4Matrix.product` takes the one or the other by the number of rows (`MOST_ROWS_CPU`).
- `int4 dynamic`: torch's product that also rounds activations, to 8 bits (CPU, few rows).
- `fp8`, `fp8 scaled`: slices widened before a dense product; torch's fp8 product, activations
  rounded by their largest magnitude.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nld_cuda.bench.environment import environment, script_command
from nld_cuda.bench.text import table
from nld_cuda.bench.timing import Contender, CpuClock, CudaClock
from nld_cuda.model import fp8, int4

RESULTS = Path(__file__).resolve().parent / "results/products_cpu.json"
SHAPES = {"3B down": (3072, 9216), "8B o": (4096, 4096)}
ROWS = (1, 8, 16, 32, 64, 128, 512)
GROUP_SIZE = 128
FEW_ROWS = 8  # for a way that takes seconds at many

Product = Callable[[Tensor], Tensor]


def products(shape: tuple[int, int], device: torch.device) -> dict[str, Product]:
    """Every way to multiply with one random matrix, the dense one first, and its own weights."""
    weight = torch.randn(shape) / shape[1] ** 0.5
    codes, scales = int4.quantize(weight, GROUP_SIZE)
    small = int4.make_matrix(int4.pack_words(codes), scales, device)
    fp8_codes, fp8_scales = fp8.quantize(weight)
    narrow = fp8.Fp8Matrix(fp8_codes.to(device), fp8_scales.float().to(device))
    dense = weight.bfloat16().to(device)
    ways: dict[str, Product] = {"dense": lambda x: x @ dense.t(), "int4": small.packed_product}
    if small.block:
        ways["int4 expanded"] = small.expanded_product
    ways["fp8"] = narrow.product
    way = fp8.scaled_product(device)
    if way is not None:
        ways["fp8 scaled"] = dataclasses.replace(narrow, scaled_product=way).product
    if device.type == "cpu":
        pairs = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
        out, inputs = shape
        packed = torch.ops.aten._dyn_quant_pack_4bit_weight(
            pairs, scales.float(), None, GROUP_SIZE, inputs, out
        )
        ways["int4 dynamic"] = lambda x: torch.ops.aten._dyn_quant_matmul_4bit(
            x.float(), packed, GROUP_SIZE, inputs, out
        )
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    clock = CpuClock("cpu", min_runs=5) if device.type == "cpu" else CudaClock()
    made = []
    for name, shape in SHAPES.items():
        ways = products(shape, device)
        for rows in ROWS:
            x = torch.randn(rows, shape[1], device=device).bfloat16()
            expected = ways["dense"](x).float()
            contenders = {}
            for way, product in ways.items():
                if way == "int4 dynamic" and rows > FEW_ROWS:
                    continue
                error = (product(x).float() - expected).norm() / expected.norm()
                assert error < 0.2, f"{way} must compute the same, got an error of {error:.2f}"
                contenders[way] = Contender([lambda product=product, x=x: product(x)])
            measured = clock.measure(contenders, options.budget)
            made.append(
                {"case": f"{name} {shape[0]}x{shape[1]}", "rows": rows}
                | {f"{way} us": round(m.best.median_us) for way, m in measured.items()}
            )
            print(made[-1], flush=True)
    print(table(made))
    document = {
        "benchmark": "products", "command": script_command(), "environment": environment(),
        "rows": made,
    }  # fmt: skip
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
