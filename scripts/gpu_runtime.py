"""Check on a GPU that our static CUDA runtime and torch's shared one live together.

Usage: python scripts/gpu_runtime.py

libnld_ops.so carries its own CUDA runtime, so that one file serves every torch. Both must see the
same primary context, streams, captures and current device. One op is enough to tell: its numbers
are known in closed form, and every op launches the same way. Prints one line per check; the exit
code is 1 if one failed.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable

import torch

from nld_cuda import ops

ROWS, VOCAB = 64, 32768
CHECKS: list[Callable[[], str | None]] = []


def check(function: Callable[[], str | None]) -> Callable[[], str | None]:
    CHECKS.append(function)
    return function


class Noise:
    """Gumbel noise of a seed: on a device, and as the CPU makes it (equal bits)."""

    def __init__(self, device: str = "cuda") -> None:
        self.out = torch.zeros(ROWS, VOCAB, device=device)
        self.seed = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.positions = torch.arange(ROWS, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        ops.gumbel_noise_(self.out, self.seed, self.positions)

    def expect(self, seed: int) -> None:
        want = torch.zeros(ROWS, VOCAB)
        ops.gumbel_noise_(want, torch.full((ROWS,), seed), torch.arange(ROWS).int())
        got = self.out.cpu()
        assert torch.equal(got, want), f"{int((got != want).sum())} of {got.numel()} differ"


@check
def same_memory() -> None:
    """Memory that torch has allocated is what our kernels write."""
    noise = Noise()
    noise()
    noise.expect(0)


@check
def stream_order() -> None:
    """On a side stream: after torch's work there, before torch's later work, and nowhere else."""
    noise, side = Noise(), torch.cuda.Stream()
    doubled = torch.empty_like(noise.out)
    noise()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(int(2e8))
        noise.seed.fill_(5)
        noise()
        torch.mul(noise.out, 2, out=doubled)
        assert not side.query(), "the launch waited for the device"
    assert torch.cuda.current_stream().query(), "the kernel ran on the default stream"
    side.synchronize()
    noise.expect(5)
    assert torch.equal(doubled, noise.out * 2), "torch's next kernel did not wait for ours"


@check
def high_priority_stream() -> None:
    noise, side = Noise(), torch.cuda.Stream(priority=-1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        noise()
    side.synchronize()
    noise.expect(0)


@check
def graph_capture() -> str:
    """Captured by torch's graph, replayed with other inputs, among torch's own nodes."""
    noise = Noise()
    noise()
    torch.cuda.synchronize()
    total = torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise.seed.add_(1)
        noise()
        total.add_(noise.out[0, 0])
    noise.expect(0)  # a capture runs nothing
    for seed in (1, 2, 3):
        graph.replay()
        noise.expect(seed)
    pool = torch.cuda.CUDAGraph()
    with torch.cuda.graph(pool, pool=graph.pool()):
        noise()
    pool.replay()
    noise.expect(3)
    return "three replays, and a second graph in the same pool"


@check
def events_between_streams() -> None:
    noise, first, second = Noise(), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    event = torch.cuda.Event()
    with torch.cuda.stream(first):
        torch.cuda._sleep(int(1e8))
        noise.seed.fill_(9)
        event.record()
    with torch.cuda.stream(second):
        second.wait_event(event)
        noise()
    second.synchronize()
    noise.expect(9)


@check
def new_threads() -> str:
    """Threads without a context of their own, several at once."""
    failures: list[str] = []

    def work(seed: int) -> None:
        try:
            noise = Noise()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                noise = Noise()
                noise.seed.fill_(seed)
                for _ in range(20):
                    noise()
            stream.synchronize()
            noise.expect(seed)
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    return "4 threads"


@check
def device_guard() -> str:
    """Tensors on another device than the current one; the current one stays."""
    count = torch.cuda.device_count()
    if count < 2:
        before = torch.cuda.current_device()
        Noise()()
        assert torch.cuda.current_device() == before
        return "one device only: just that the current device stays"
    for device in range(count):
        torch.cuda.set_device((device + 1) % count)
        before = torch.cuda.current_device()
        noise = Noise(f"cuda:{device}")
        noise()
        assert torch.cuda.current_device() == before
        noise.expect(0)
    torch.cuda.set_device(0)
    return f"{count} devices"


@check
def much_shared_memory() -> None:
    """A kernel that asks for more than 48 KiB of shared memory (cudaFuncSetAttribute is ours)."""
    from replay_cases import Call, ReplayCase, attention

    case = ReplayCase("block_attention", attention, ("out", "lse"), 0.02)
    call = Call(case, "cuda")
    call()
    call.check(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for variant in (1, 2, 3):
        call.fill(variant)
        graph.replay()
        call.check(variant)


@check
def memory_is_torchs() -> None:
    """Our calls take no driver memory of their own: workspaces come from torch's allocator."""
    noise = Noise()
    noise()
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(50):
        noise()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free


def main() -> None:
    failed = 0
    for function in CHECKS:
        name = function.__name__.replace("_", " ")
        try:
            note = function()
            torch.cuda.synchronize()
            print(f"ok      {name}" + (f": {note}" if note else ""), flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc(file=sys.stdout)
    print(f"runtime: {len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
