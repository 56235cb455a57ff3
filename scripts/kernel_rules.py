"""What the machine code of each CUDA kernel must show; checked by scripts/check_kernels.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arch:
    """Limits of one multiprocessor (CUDA programming guide, table of compute capabilities)."""

    max_threads: int
    max_ctas: int
    smem_bytes: int  # of a multiprocessor
    cta_smem_bytes: int  # most that one CTA may ask for


KIB = 1024
ARCHS = {
    "sm_80": Arch(2048, 32, 164 * KIB, 163 * KIB),
    "sm_90a": Arch(2048, 32, 228 * KIB, 227 * KIB),
    "sm_100a": Arch(2048, 32, 228 * KIB, 227 * KIB),
    "sm_120": Arch(1536, 24, 100 * KIB, 99 * KIB),
}
REGISTERS = 65536  # of a multiprocessor, in four equal parts, handed to warps in units of 256
CTA_RESERVED_SMEM = KIB  # the driver's own, per CTA


@dataclass(frozen=True)
class Kernel:
    """What a binary says about itself."""

    name: str
    registers: int
    threads: int
    static_smem_bytes: int


@dataclass(frozen=True)
class Rule:
    """Intent of a kernel.

    Attributes:
        kernel: regular expression of its short name, template arguments included.
        min_ctas: CTAs that must fit one multiprocessor, by architecture; "all": the others.
        instructions: least number of instructions, by regular expression of the opcode.
        forbidden: opcodes that must not appear.
        schedule: regular expression of what must follow what (check_kernels.SCHEDULED).
        only: the architectures whose instructions the kernel is made of (default: all); elsewhere
            it is an empty shell that is never launched.
        dynamic_smem: bytes of dynamic shared memory of a launch, or a function of the short name.
    """

    kernel: str
    min_ctas: Mapping[str, int]
    instructions: Mapping[str, int] = field(default_factory=dict)
    forbidden: Sequence[str] = ()
    schedule: str | None = None
    only: Sequence[str] = ()
    dynamic_smem: int | Callable[[str], int] = 0

    def smem_bytes(self, name: str) -> int:
        """Bytes of dynamic shared memory of the kernel with this short name."""
        return self.dynamic_smem if isinstance(self.dynamic_smem, int) else self.dynamic_smem(name)


def ctas_per_sm(kernel: Kernel, rule: Rule, arch: str) -> int:
    """CTAs that fit one multiprocessor at once; 0 where a CTA asks for too much shared memory."""
    limits = ARCHS[arch]
    warps = -(-kernel.threads // 32)
    unit = -(-max(kernel.registers, 1) * 32 // 256) * 256
    by_registers = REGISTERS // 4 // unit * 4 // warps
    smem = rule.smem_bytes(kernel.name) + kernel.static_smem_bytes
    if smem > limits.cta_smem_bytes:
        return 0
    by_smem = limits.smem_bytes // (smem + CTA_RESERVED_SMEM)
    by_threads = limits.max_threads // (warps * 32)
    return min(by_registers, by_smem, by_threads, limits.max_ctas)


def arguments(name: str) -> list[str]:
    """Template arguments of a short name without nested ones: `k<bf16, 8>` gives bf16 and 8."""
    found = re.search(r"<(.*)>", name)
    return [part.strip() for part in found[1].split(",")] if found else []


LOAD_16 = r"LDG\.E\.(?:\w+\.)*128"
STORE_16 = r"STG\.E\.(?:\w+\.)*128"
WIDEN = r"H(FMA|MUL)2\.(?:\w+\.)*BF16"
CLUSTERS = ("sm_90a", "sm_100a", "sm_120")
STORE_TO_CLUSTER = r"STAS\b"
CP_ASYNC_16 = r"LDGSTS\.E\.(?:\w+\.)*128"


def attention_simt_smem(head_dim: int) -> int:
    """Bytes of 16 queries, 32 keys or values, and probabilities (attention/kernel_simt.cuh)."""
    return 4 * ((16 + 32) * (head_dim | 1) + 16 * 32)


def attention_mma_smem(name: str) -> int:
    """Bytes of the ring of K and V tiles (attention/tile_loader.cuh)."""
    head_dim, tile_rows = map(int, arguments(name)[1:3])
    return 6 * 64 * head_dim * 2 if tile_rows == 128 else 48 * KIB


def attention_wgmma_smem(name: str) -> int:
    """Bytes of the ring, of q, and of two barriers a slot (attention/ring_sm90.cuh)."""
    head_dim, tile_rows = map(int, arguments(name)[1:3])
    columns = 1 if head_dim <= 64 else 2
    is_fp8 = arguments(name)[3] == "e4m3"
    of_a_column = (4 if is_fp8 else 6) if tile_rows == 128 else (2 if is_fp8 else 3)
    slots = of_a_column * (2 if columns == 1 else 1)
    smem = columns * (slots * 128 * 128 + tile_rows * 128) + slots * 16
    if is_fp8:  # and codes: two tiles under way, or one, and one that is converted
        smem += (3 if slots > 3 else 2) * 128 * head_dim
    return -(-smem // KIB) * KIB


# Scores of a tile and the product with V of the tile before are started, the scores are waited for,
# and then come the exponentials of the softcap and of the softmax, before anything else is waited
# for: ptxas likes to move the other wait in front of them.
WGMMA_OVERLAP = r"M{12,}wE{128}"


COMMIT_SMEM = 5 * KIB  # figures of 256 rows and of 8 warps


RULES: list[Rule] = [
    # ---- kv_cache: latency-bound. The first kind has all loads of 4 items a thread in flight (for
    # long prompts); its registers buy that. Shared memory: cosines and sines of at most 256
    # frequencies and the places of the tokens.
    Rule(
        r"rope_append_kernel<\w+, [48], 4>",
        min_ctas={"all": 4},
        instructions={LOAD_16: 8, STORE_16: 3},
        dynamic_smem=4096,
    ),
    Rule(
        r"rope_append_kernel<\w+, [48], 1>",
        min_ctas={"all": 8},
        instructions={LOAD_16: 2, STORE_16: 2},
        dynamic_smem=4096,
    ),
    Rule(
        r"rope_append_kernel<\w+, 1, [14]>",
        min_ctas={"all": 8},
        dynamic_smem=4096,
    ),
    Rule(
        r"compact_kernel<uint4>",
        min_ctas={"all": 8},
        instructions={LOAD_16: 1, STORE_16: 1},
        dynamic_smem=4096,
    ),
    Rule(
        r"compact_kernel<(uint2|unsigned (int|short|char))>",
        min_ctas={"all": 8},
        dynamic_smem=4096,
    ),
    # ---- verify: a thread loads its 32 ids up front, so registers hold what is in flight; the
    # argmax of half types wants the slices of 32 long rows on the machine at once.
    Rule(
        r"verify_kernel<b?f16, false>",
        min_ctas={"all": 4, "sm_120": 3},
        instructions={LOAD_16: 4},
    ),
    Rule(
        r"verify_kernel<float, false>",
        min_ctas={"all": 3},
        instructions={LOAD_16: 8},
    ),
    Rule(
        r"verify_kernel<b?f16, true>",
        min_ctas={"all": 3, "sm_120": 2},
        instructions={LOAD_16: 4},
    ),
    Rule(
        r"verify_kernel<float, true>",
        min_ctas={"all": 2},
        instructions={LOAD_16: 8},
    ),
    Rule(
        r"verify_residual_kernel<b?f16>",  # draft probabilities wait in shared memory
        min_ctas={"all": 3, "sm_120": 2},
        instructions={LOAD_16: 4, CP_ASYNC_16: 8},
        dynamic_smem=34 * KIB,
    ),
    Rule(
        r"verify_residual_kernel<float>",
        min_ctas={"all": 2},
        instructions={LOAD_16: 8, CP_ASYNC_16: 8},
        dynamic_smem=34 * KIB,
    ),
    # The same with clusters: 16 bytes at a time go to other CTAs, without a fence of the whole GPU
    # but for the ticket's.
    Rule(
        r"verify_cluster_kernel<b?f16, false>",
        min_ctas={"all": 4, "sm_120": 2},
        instructions={LOAD_16: 4, STORE_TO_CLUSTER: 1},
        only=CLUSTERS,
        dynamic_smem=2 * KIB,
    ),
    Rule(
        r"verify_cluster_kernel<float, false>",
        min_ctas={"all": 3, "sm_120": 2},
        instructions={LOAD_16: 8, STORE_TO_CLUSTER: 1},
        only=CLUSTERS,
        dynamic_smem=2 * KIB,
    ),
    Rule(
        r"verify_cluster_kernel<b?f16, true>",
        min_ctas={"all": 3, "sm_120": 2},
        instructions={LOAD_16: 4 + 4, CP_ASYNC_16: 8, STORE_TO_CLUSTER: 3},
        only=CLUSTERS,
        dynamic_smem=34 * KIB,
    ),
    Rule(
        r"verify_cluster_kernel<float, true>",
        min_ctas={"all": 2},
        instructions={LOAD_16: 8 + 8, CP_ASYNC_16: 8, STORE_TO_CLUSTER: 3},
        only=CLUSTERS,
        dynamic_smem=34 * KIB,
    ),
    # ---- attention on tensor cores: two CTAs a multiprocessor where a warp's 16 rows allow it; 128
    # rows are 8 warps of one CTA. LDSM and HMMA of one tile of 64 keys (16-row tiles: of 16 keys).
    *(
        Rule(
            rf"attention_mma_kernel<(\w+), \d+, {rows}, \1>",
            min_ctas={"all": ctas},
            instructions={"LDSM": 2 * steps, "HMMA": 4 * steps, CP_ASYNC_16: 8},
            dynamic_smem=attention_mma_smem,
        )
        for rows, ctas, steps in ((128, 1, 16), (64, 2, 16), (16, 2, 4))
    ),
    # Of fp8 caches: the same room; 16 codes a thread are 8 products (HMUL2, or HFMA2 + -0), and
    # leave in 16-byte stores.
    *(
        Rule(
            rf"attention_mma_kernel<bf16, \d+, {rows}, e4m3>",
            min_ctas={"all": ctas},
            instructions={
                "LDSM": 2 * steps,
                "HMMA": 4 * steps,
                CP_ASYNC_16: 4,
                WIDEN: 8,
                "STS.128": 2,
            },
            dynamic_smem=attention_mma_smem,
        )
        for rows, ctas, steps in ((128, 1, 16), (64, 2, 16), (16, 2, 4))
    ),
    # ---- attention on Hopper's: registers are those of the launch; setmaxnreg shares them out.
    # HGMMA of one tile of 128 keys before the loop, one inside and the last product with V; TMA of
    # K and V; 16-byte copies of single rows.
    *(
        Rule(
            rf"attention_wgmma_kernel<(\w+), \d+, {rows}, \1>",
            min_ctas={"all": ctas},
            instructions={
                r"HGMMA\.64x128x16": 2 * 4,
                r"HGMMA\.64x\d+x16": 2 * 4 + 2 * 8,
                r"UTMALDG\.4D": 1,
                CP_ASYNC_16: 8,
                "USETMAXREG": 2,
            },
            dynamic_smem=attention_wgmma_smem,
            schedule=WGMMA_OVERLAP,
            only=("sm_90a",),
        )
        for rows, ctas in ((128, 1), (64, 2))
    ),
    # Of fp8 caches: no copy engine; 16-byte copies of codes, products that widen them.
    *(
        Rule(
            rf"attention_wgmma_kernel<bf16, \d+, {rows}, e4m3>",
            min_ctas={"all": ctas},
            instructions={
                r"HGMMA\.64x\d+x16": 2 * 4 + 2 * 8,
                CP_ASYNC_16: 4,
                WIDEN: 8,
                "STS.128": 2,
                "USETMAXREG": 2,
            },
            dynamic_smem=attention_wgmma_smem,
            only=("sm_90a",),
        )
        for rows, ctas in ((128, 1), (64, 2))
    ),
    # ---- attention around them. Combine is latency-bound: 8 partial rows a warp on their way. The
    # general kernel holds 16 + 32 rows of float32 in shared memory, of at most 64, 128, 512 dims.
    Rule(r"attention_plan_kernel", min_ctas={"all": 1}, dynamic_smem=2304),
    Rule(r"attention_combine_kernel<\w+, 4>", min_ctas={"all": 4}, instructions={LOAD_16: 8}),
    Rule(r"attention_combine_kernel<\w+, 1>", min_ctas={"all": 4}),
    Rule(
        r"attention_simt_kernel<\w+, 2>",
        min_ctas={"all": 4},
        dynamic_smem=attention_simt_smem(64),
    ),
    Rule(
        r"attention_simt_kernel<\w+, 4>",
        min_ctas={"all": 4, "sm_120": 3},
        dynamic_smem=attention_simt_smem(128),
    ),
    Rule(
        r"attention_simt_kernel<\w+, 16>",
        min_ctas={"all": 1},
        dynamic_smem=attention_simt_smem(512),
    ),
    # ---- commit: all loads of a thread's 32 ids in flight (the aligned and the general path each);
    # 4 CTAs of a greedy scan, so that one block of 32 rows x 131072 is resident at once.
    Rule(
        r"commit_kernel<b?f16, false>",
        min_ctas={"all": 4},
        instructions={LOAD_16: 2 * 4, "MUFU.EX2": 32},
        dynamic_smem=COMMIT_SMEM,
    ),
    Rule(
        r"commit_kernel<float, false>",
        min_ctas={"all": 4},
        instructions={LOAD_16: 2 * 8, "MUFU.EX2": 32},
        dynamic_smem=COMMIT_SMEM,
    ),
    Rule(
        r"commit_kernel<b?f16, true>",
        min_ctas={"all": 3},
        instructions={LOAD_16: 2 * 4, "MUFU.EX2": 32},
        dynamic_smem=COMMIT_SMEM,
    ),
    Rule(
        r"commit_kernel<float, true>",
        min_ctas={"all": 2},
        instructions={LOAD_16: 2 * 8, "MUFU.EX2": 32},
        dynamic_smem=COMMIT_SMEM,
    ),
    # ---- shards of the vocabulary: the scans of a shard with the code of draws; what finishes a
    # request from gathered parts is one CTA each, and small.
    Rule(
        r"(commit|verify)_scan_kernel<b?f16>",
        min_ctas={"all": 3, "sm_120": 2},
        instructions={LOAD_16: 2 * 4},
    ),
    Rule(
        r"(commit|verify)_scan_kernel<float>",
        min_ctas={"all": 2},
        instructions={LOAD_16: 2 * 8},
    ),
    Rule(r"commit_parts_kernel", min_ctas={"all": 4}, dynamic_smem=COMMIT_SMEM),
    Rule(r"verify_parts_kernel", min_ctas={"all": 4}, dynamic_smem=2 * KIB),
    # A fused multiply-add would draw other tokens than the CPU does.
    Rule(r"gumbel_noise_kernel", min_ctas={"all": 8, "sm_120": 6}, forbidden=("FFMA",)),
]
