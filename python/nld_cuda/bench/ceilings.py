"""What the machine can do, measured in the same run: the roofs that every row is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nld_cuda.bench.timing import Clock, Contender, CpuClock


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device.

    Attributes:
        copy_gbps: a large copy, bytes read + written: the roof the issue's targets are set against.
        read_gbps: a large sum, bytes read: the roof of what only reads.
        l2_gbps: a copy that stays in the cache (L2; on a CPU 1 MiB), read + written.
        matmul_tflops: torch.matmul of large bfloat16 matrices.
        launch_us: what one more smallest kernel costs in a graph; on a CPU a call of a torch op.
        l2_bytes: size of the L2 cache, 0 where unknown.
    """

    copy_gbps: float
    read_gbps: float
    l2_gbps: float
    matmul_tflops: float
    launch_us: float
    l2_bytes: int = 0


def measure(device: torch.device, clock: Clock, *, small: bool = False) -> Ceilings:
    """Measure them (some seconds). `small`: sizes for a rehearsal; the rates mean nothing."""
    on_cpu = isinstance(clock, CpuClock)
    large = (1 << 20) if small else (256 << 20) if on_cpu else (1 << 30)
    l2_bytes = 0
    if device.type == "cuda" and not small:
        l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    in_cache = (1 << 20) if on_cpu or small else max(l2_bytes // 8, 1 << 20)
    side = 64 if small else 1024 if on_cpu else 8192
    budget_s = 0.0 if small else 0.7

    def seconds(call: object, num_calls: int = 1) -> float:
        made = Contender([call] * num_calls)  # type: ignore[list-item]
        timing = clock.measure({"x": made}, budget_s)["x"].best
        return timing.median_us * 1e-6

    source = torch.ones(large // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source))
    read_s = seconds(lambda: source.sum())
    near, to = (torch.ones(in_cache // 8, dtype=torch.float32, device=device) for _ in range(2))
    l2_s = seconds(lambda: to.copy_(near), 1 if on_cpu else 20)
    a, b = (torch.ones(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    c = torch.empty_like(a)
    matmul_s = seconds(lambda: torch.mm(a, b, out=c))
    one = torch.zeros(1, device=device)
    launch_s = seconds(lambda: one.add_(1), 1 if on_cpu else 100)
    return Ceilings(
        copy_gbps=2 * large / copy_s / 1e9,
        read_gbps=large / read_s / 1e9,
        l2_gbps=2 * (in_cache // 8) * 4 / l2_s / 1e9,
        matmul_tflops=2 * side**3 / matmul_s / 1e12,
        launch_us=launch_s * 1e6,
        l2_bytes=l2_bytes,
    )
