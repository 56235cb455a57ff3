"""What every cell of the grid should take on a GPU: a model of time, written before measuring.

    python -m nld_cuda.bench.time_model                       # the headline cells, all GPUs
    python -m nld_cuda.bench.time_model --write DIR           # every cell, one JSON a GPU

Attention: the real plan of the cell (`attention_plan` on the CPU, for the GPU's number of SMs) is
run through a small machine. CTAs take the pairs (item, kv head) as the kernel does; each first
waits for its plan entry, page numbers and first keys, then its keys flow, at the rate of its tensor
cores, its exponentials or its loads, and not faster than its share of the memory bandwidth allows;
then it writes its result. The other ops are their bytes, their arithmetic and their latencies.

`csrc/attention/heuristic.h` chooses by the same model in closed form and integers.
`tests/test_heuristic.py` compares the two, `nld_cuda.bench.tune` fits the constants on a GPU.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nld_cuda.bench import grid, traffic
from nld_cuda.bench.plans import KEY_STEP, Plan, plan_of
from nld_cuda.ops import VerifyMode

# ---- constants, each with its source ---------------------------------------------------------
# datasheet; others: published measurements; recalled: known, not looked up again; guess: ours.


@dataclass(frozen=True)
class Latency:
    """Microseconds that no rate explains, and limits of one SM. `tune` fits the first five."""

    kernel: float = 2.5  # a kernel in a graph, launched and drained: recalled, 2 to 3
    next_kernel: float = 2.5  # each further kernel that waits for the one before: recalled
    dependent_kernel: float = 1.0  # the same by programmatic dependent launch: recalled
    first_keys: float = 1.5  # plan, pages, keys: three dependent loads of 0.3 to 0.7 us: recalled
    epilogue: float = 0.5  # sums exchanged, the last stores: guess
    finish: float = 2.0  # last ids of commit_, verify_: barriers, ticket, parts, rule: guess
    load: float = 1.0  # a load from memory under load: recalled, 0.6 to 0.8 idle
    merge: float = 1.0  # partial results seen by another CTA, beside their bytes: guess
    sm_gbps: float = 70.0  # what one SM can load: 64 bytes a clock would be 109; guess


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU.

    Attributes:
        copy_gbps: read + written, of a large copy. H100, H200: others; else 87 % of the datasheet.
        clock_ghz: of the SMs under load. Recalled.
        l2_gbps: read from L2 by all SMs. Recalled (H100 5.5 to 6 TB/s); RTX, B200: guess.
        mma_tflops: of mma.sync in attention. Recalled: FlashAttention-2, 350 to 400 on H100, 220 on
            A100; RTX: 90 % of the datasheet; B200: guess.
        wgmma_tflops: of warpgroup products in attention, 0 where there are none. Others:
            FlashAttention-3 620 at 16k causal; ours is given a tenth less.
        fma_tflops: of float32 in the general kernel: a quarter of the datasheet, a guess.
        gpcs: groups of 16 SMs or more in which clusters lie; 0: there are none. Recalled.
        latency: the same for all, until somebody measures.
    """

    name: str
    sms: int
    clock_ghz: float
    copy_gbps: float
    l2_gbps: float
    mma_tflops: float
    wgmma_tflops: float = 0.0
    fma_tflops: float = 15.0
    gpcs: int = 0
    latency: Latency = Latency()


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 132, 1.70, 3000, 5500, 350, 560, gpcs=8),
        Gpu("H200", 132, 1.70, 4300, 5500, 350, 560, gpcs=8),
        Gpu("A100", 108, 1.41, 1750, 4000, 220, fma_tflops=5),
        Gpu("RTX 4090", 128, 2.50, 900, 5000, 150),
        Gpu("B200", 148, 1.80, 7000, 10000, 450, gpcs=8),
    )
}


EXP_PER_CLOCK = 16  # of an SM: the instruction tables of the programming guide
LANES_PER_CLOCK = 128  # plain instructions of an SM, times lanes: same
DRAW_INSTRUCTIONS = 20  # an id of a row that is drawn from: Philox where it might win; guess


@dataclass(frozen=True)
class Kernel:
    """Of an attention kernel what the model needs, by rows of a tile.

    Attributes:
        products: mma, wgmma or fma: what computes them.
        in_flight: bytes of K and V on their way to a CTA.
        combine: how partial results are merged: "kernel": by a second one; "dependent": started
            early where the GPU can; "inside": at no further launch.
        clusters: a cluster may share a tile and merge its splits itself.
        step: keys of a tile in shared memory: the last products of an item are of a whole one.
    """

    name: str
    products: str
    in_flight: dict[int, int]
    ctas_per_sm: dict[int, int]
    combine: str = "kernel"
    step: int = 64
    clusters: bool = False


# Rings of csrc/attention, less the slot that is being multiplied.
SM80 = Kernel(
    "sm80", "mma", {16: 32 << 10, 64: 32 << 10, 128: 64 << 10}, {16: 2, 64: 2, 128: 1},
    "dependent", clusters=True,
)  # fmt: skip
SM90 = Kernel(
    "sm90", "wgmma", {64: 64 << 10, 128: 160 << 10}, {64: 2, 128: 1}, "dependent", 128, True
)
SIMT = Kernel("simt", "fma", {16: 16 << 10}, {16: 2})
SIMT_ROWS = 16  # of a CTA of the general kernel, whatever the plan's tiles


def kernel_of(gpu: Gpu, cell: grid.Attention, tile_rows: int) -> Kernel:
    """The kernel that block_attention picks (csrc/attention/op.cpp)."""
    if cell.dtype == "float32":
        return SIMT
    return SM90 if gpu.wgmma_tflops > 0 and tile_rows >= 64 else SM80


# ---- attention -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Of one call.

    Attributes:
        us: all of it.
        bound: what takes longest: memory, l2, tensor, exp, latency.
        floor_us: bytes at the copy bandwidth alone.
        choice: of attention: kernel, rows of a tile, CTAs, splits, keys of the longest item.
    """

    us: float
    bound: str
    floor_us: float
    floor_bytes: float
    flops: float = 0.0
    choice: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """How fast keys flow: of one CTA, and of all together; how long a CTA waits for its first."""

    num_ctas: int
    key_ns: float  # of a CTA that memory does not hold back
    shared_key_ns: float  # of all keys one after the other through the memory
    bounds: tuple[str, str]  # what key_ns and shared_key_ns come from
    wait_ns: float


def machine(gpu: Gpu, kernel: Kernel, cell: grid.Attention, rows: int, pairs: int) -> Machine:
    """Rates for tiles of so many rows and so many pairs (item, kv head)."""
    element = grid.ELEMENT_BYTES[cell.kv_dtype]
    key_bytes = 2 * cell.head_dim * element
    num_ctas = max(min(pairs, gpu.sms * kernel.ctas_per_sm[rows]), 1)
    beside = max(num_ctas / gpu.sms, 1.0)  # CTAs that share an SM
    tflops = {"mma": gpu.mma_tflops, "wgmma": gpu.wgmma_tflops, "fma": gpu.fma_tflops}
    rate = tflops[kernel.products] * 1e3 / gpu.sms
    own = {
        "tensor": 4 * rows * cell.head_dim * beside / rate,
        "exp": rows * beside / (EXP_PER_CLOCK * gpu.clock_ghz),
        "latency": key_bytes
        / min(gpu.latency.sm_gbps / beside, kernel.in_flight[rows] / (gpu.latency.load * 1e3)),
    }
    bound = max(own, key=lambda name: own[name])
    return Machine(num_ctas, own[bound], 0.0, (bound, ""), gpu.latency.first_keys * 1e3)


def run_items(m: Machine, keys: Sequence[float], tails_ns: Sequence[float]) -> float:
    """Nanoseconds until all pairs are done.

    CTAs go through the pairs forth and back (heuristic.h). Before its keys a CTA waits `wait_ns`,
    half as long from its second item on, after them `tails_ns`. All CTAs whose keys flow have the
    same rate, which changes when one begins or ends.
    """
    now = progress = last = 0.0  # progress: keys that each flowing CTA has had since the beginning
    waiting = [(m.wait_ns, i) for i in range(min(m.num_ctas, len(keys)))]
    flowing: list[tuple[float, int]] = []
    while waiting or flowing:
        ns_a_key = max(m.key_ns, m.shared_key_ns * len(flowing))
        done_at = now + (flowing[0][0] - progress) * ns_a_key if flowing else math.inf
        starts = bool(waiting) and waiting[0][0] <= done_at
        next_time = waiting[0][0] if starts else done_at
        if flowing:
            progress += (next_time - now) / ns_a_key
        now = next_time
        if starts:
            _, pair = heapq.heappop(waiting)
            heapq.heappush(flowing, (progress + keys[pair], pair))
            continue
        progress, pair = heapq.heappop(flowing)
        free_at = now + tails_ns[pair]
        last = max(last, free_at)
        following = pair + 2 * (m.num_ctas - pair % m.num_ctas) - 1
        if following < len(keys):  # its numbers are in L2 by now
            heapq.heappush(waiting, (free_at + m.wait_ns / 2, following))
    return last


def cluster_size(cell: grid.Attention, gpu: Gpu, kernel: Kernel, plan: Plan) -> int:
    """CTAs that share a tile: csrc/attention/cluster.h, for as many clusters as the GPU holds."""
    requests = min(len(cell.requests), cell.total_q)
    if not kernel.clusters or gpu.gpcs == 0 or requests == 0:
        return 1
    ctas, heads = kernel.ctas_per_sm[plan.tile_rows], cell.kv_heads
    rows = -(-cell.total_q // requests) * (cell.heads // heads)
    wanted = requests * -(-rows // plan.tile_rows) * heads
    wave = max(gpu.sms * (1 if plan.tile_rows == 128 else 2) // heads, 1)
    key_ns = 20 if plan.tile_rows == 128 else 16
    for size in (16, 8, 4, 2):
        if (cell.max_seq_len // size - cell.max_seq_len // wave) * key_ns > CLUSTER_REGRET_NS:
            break
        if (
            cell.max_seq_len > (size - 1) * KEY_STEP
            and resident_clusters(gpu, ctas, size) >= wanted
        ):
            return size
    return 1


CLUSTER_REGRET_NS = 16000  # cluster.h


def resident_clusters(gpu: Gpu, ctas_per_sm: int, size: int) -> int:
    """Clusters of that many CTAs that the GPU holds at once."""
    return gpu.gpcs * (16 * ctas_per_sm // size)


@dataclass(frozen=True)
class Piece:
    """What one CTA does before it takes the next: keys for the rows of a tile."""

    keys: int
    rows: int
    is_split: bool


def pieces_of(plan: Plan, rows: int, heads: int) -> list[Piece]:
    """All of a plan, for so many kv heads (or groups of rows of one)."""
    pieces = []
    for item in plan.items:
        tile = plan.tiles[item[0]]
        piece = Piece(plan.item_keys(item), min(tile[2], rows), tile[4] > 1)
        pieces += [piece] * heads
    return pieces


def cluster_pieces_of(plan: Plan, heads: int, size: int) -> list[Piece]:
    """The shares of the CTAs of a cluster, for every tile and kv head."""
    pieces = []
    for t, tile in enumerate(plan.tiles):
        keys = plan.tile_keys(t)
        share = -(-keys // (size * KEY_STEP)) * KEY_STEP
        ranks = [Piece(min(max(keys - r * share, 0), share), tile[2], True) for r in range(size)]
        pieces += ranks * heads
    return pieces


def attention(cell: grid.Attention, gpu: Gpu, plan: Plan | None = None) -> Prediction:
    """Predict block_attention for a plan, as it is cut; none: what it would do by itself."""
    is_own = plan is None
    plan = plan_of(cell, gpu.sms) if plan is None else plan
    rows, heads = plan.tile_rows, cell.kv_heads
    work = traffic.of(cell)
    kernel = kernel_of(gpu, cell, rows)
    if kernel is SIMT:  # each 16 rows of an item are a CTA
        rows = SIMT_ROWS
        heads *= plan.tile_rows // rows
    size = cluster_size(cell, gpu, kernel, plan) if is_own else 1
    pieces = cluster_pieces_of(plan, heads, size) if size > 1 else pieces_of(plan, rows, heads)
    m = machine(gpu, kernel, cell, rows, len(pieces))
    if size > 1:
        resident = resident_clusters(gpu, kernel.ctas_per_sm[rows], size)
        m = replace(m, num_ctas=min(len(pieces), resident * size))
    key_bytes = 2 * cell.head_dim * grid.ELEMENT_BYTES[cell.kv_dtype]
    row_bytes = cell.head_dim * grid.ELEMENT_BYTES[cell.dtype]
    row_ns = (cell.head_dim + 2) * 4 / (gpu.l2_gbps / gpu.sms)  # of a partial result, moved once
    keys, tails = [], []
    asked = 0.0
    for piece in pieces:
        steps = -(-piece.keys // kernel.step) * kernel.step
        extra = piece.rows * row_bytes * (1 if piece.is_split else 2) / key_bytes  # q, and out
        keys.append(steps + extra)
        tails.append(gpu.latency.epilogue * 1e3 + piece.rows * row_ns * piece.is_split)
        asked += (piece.keys + extra) * key_bytes
    # What is asked for twice comes from L2.
    memory_ns = key_bytes / gpu.copy_gbps * min(work.floor_bytes / asked, 1.0) if asked else 0.0
    l2_ns = key_bytes / gpu.l2_gbps
    shared = "memory" if memory_ns >= l2_ns else "l2"
    m = replace(m, shared_key_ns=max(memory_ns, l2_ns), bounds=(m.bounds[0], shared))
    us = gpu.latency.kernel + run_items(m, keys, tails) / 1e3
    if size > 1:
        us += gpu.latency.merge  # and the rows themselves as if they went through L2: a guess
    elif kernel.combine != "inside":
        early = kernel.combine == "dependent" and gpu.gpcs > 0
        us += gpu.latency.dependent_kernel if early else gpu.latency.next_kernel
    if plan.num_slots and size == 1:
        rows_read = sum(t[2] * t[4] for t in plan.tiles if t[4] > 1) * cell.kv_heads
        us += gpu.latency.merge + rows_read * (cell.head_dim + 2) * 4 / gpu.l2_gbps / 1e3
    busy = {m.bounds[0]: m.key_ns * sum(keys) / m.num_ctas, shared: m.shared_key_ns * sum(keys)}
    longest = max(busy, key=lambda name: busy[name])
    choice = {
        "kernel": kernel.name, "tile_rows": plan.tile_rows, "ctas": m.num_ctas,
        "cluster": size, "items": len(pieces) // heads, "splits": size if size > 1 else plan.splits,
        "longest": max((piece.keys for piece in pieces), default=0),
    }  # fmt: skip
    return Prediction(
        us, longest if busy[longest] > us * 500 else "latency",
        work.floor_bytes / gpu.copy_gbps / 1e3, work.floor_bytes, work.flops, choice,
    )  # fmt: skip


# ---- the other ops ---------------------------------------------------------------------------


def _streamed(
    gpu: Gpu, work: traffic.Work, latency_us: float, exps: float = 0.0, instructions: float = 0.0
) -> Prediction:
    """Bytes and arithmetic side by side on all SMs, then what is latency."""
    parts = {
        "memory": work.num_bytes / gpu.copy_gbps / 1e3,
        "exp": exps / (EXP_PER_CLOCK * gpu.clock_ghz * gpu.sms) / 1e3,
        "alu": instructions / (LANES_PER_CLOCK * gpu.clock_ghz * gpu.sms) / 1e3,
    }
    bound = max(parts, key=lambda name: parts[name])
    us = parts[bound] + latency_us
    bound = bound if parts[bound] > us / 2 else "latency"
    return Prediction(us, bound, work.floor_bytes / gpu.copy_gbps / 1e3, work.floor_bytes)


def commit(cell: grid.Commit, gpu: Gpu) -> Prediction:
    ids = cell.judged_rows * cell.vocab
    latency = gpu.latency.kernel + gpu.latency.first_keys + gpu.latency.finish
    draws = DRAW_INSTRUCTIONS * ids if cell.temperature > 0 else 0
    return _streamed(gpu, traffic.of(cell), latency, ids, draws)


def verify_has_clusters(cell: grid.Verify, gpu: Gpu) -> bool:
    """csrc/verify/launch_cluster.cu: where that saves a ticket or a launch."""
    rows, slices = cell.batch * cell.rows, -(-cell.vocab // 8192)
    if gpu.gpcs == 0 or slices > 32 or rows * min(slices, 16) > 528:
        return False
    return cell.rows == 1 or cell.draft_probs


def verify(cell: grid.Verify, gpu: Gpu) -> Prediction:
    latency = gpu.latency.kernel + gpu.latency.first_keys + gpu.latency.finish
    if verify_has_clusters(cell, gpu):
        latency += gpu.latency.finish - 0.5 if cell.residual_rows else -0.7 * (cell.rows == 1)
    elif cell.draft_probs:
        latency += gpu.latency.dependent_kernel if gpu.gpcs else gpu.latency.next_kernel
        latency += gpu.latency.finish if cell.residual_rows else 0.0
    ids = cell.rows_read * cell.vocab
    draws = ids * (cell.mode != VerifyMode.GREEDY)
    exps = ids * (cell.mode == VerifyMode.REJECTION)
    return _streamed(gpu, traffic.of(cell), latency, exps, DRAW_INSTRUCTIONS * draws)


def predict(cell: grid.Cell, gpu: Gpu) -> Prediction:
    """Predict one call of the cell's op."""
    if isinstance(cell, grid.Attention):
        return attention(cell, gpu)
    if isinstance(cell, grid.Commit):
        return commit(cell, gpu)
    if isinstance(cell, grid.Verify):
        return verify(cell, gpu)
    return _streamed(gpu, traffic.of(cell), gpu.latency.kernel + gpu.latency.first_keys)


def gpu_named(name: str, copy_gbps: float = 0.0, sms: int = 0) -> Gpu:
    """Return the rates of a device by its name; of one not listed, its own copy bandwidth."""
    for key, gpu in GPUS.items():
        if key in name:
            return gpu
    return Gpu(name, sms or 100, 1.7, copy_gbps or 1000, 3 * (copy_gbps or 1000), 100)


# ---- command ---------------------------------------------------------------------------------


def document(gpu: Gpu, cells: Sequence[grid.Cell]) -> dict[str, Any]:
    """All predictions for a GPU, with the constants they were made from."""
    rows = []
    for cell in cells:
        made = asdict(predict(cell, gpu))
        rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in made.items()}
        rows.append({"name": cell.name, "op": grid.op_of(cell), **rounded})
    return {
        "predictions": "made by a model, not measured",
        "command": "python -m nld_cuda.bench.time_model --write benchmarks/results",
        "gpu": asdict(gpu), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", default="H100,H200", help=f"of {','.join(GPUS)}")
    parser.add_argument("--write", type=Path, help="folder for predictions_<gpu>.json")
    options = parser.parse_args()
    names = options.gpus.split(",")
    if unknown := [name for name in names if name not in GPUS]:
        sys.exit(f"time_model: --gpus must be of {', '.join(GPUS)}, got {', '.join(unknown)}")
    for name in names:
        if options.write:
            path = options.write / f"predictions_{name.lower().replace(' ', '_')}.json"
            made = document(GPUS[name], grid.CELLS)
            rows = ",\n".join(json.dumps(row) for row in made.pop("rows"))
            head = json.dumps(made, indent=1)[:-2]
            path.write_text(f'{head},\n "rows": [\n{rows}\n]}}\n')
            print(f"{path}: {len(grid.CELLS)} cells")
            continue
        print(f"{name}: predicted, not measured")
        for cell in (c for c in grid.CELLS if c.headline):
            p = predict(cell, GPUS[name])
            print(f"  {cell.name:55} {p.us:8.1f} us  floor {p.floor_us:7.1f}  {p.bound} {p.choice}")


if __name__ == "__main__":
    main()
