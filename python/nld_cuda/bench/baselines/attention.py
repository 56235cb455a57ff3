"""The baselines of block_attention."""

from nld_cuda.bench.baselines import flash_attn, flashinfer, flex, sdpa, sglang, vllm

BASELINES = (
    sdpa.FLASH, sdpa.FLASH_EXPANDED, sdpa.CUDNN, sdpa.EFFICIENT, sdpa.MATH, sdpa.GATHER,
    flex.FLEX, flashinfer.FLASHINFER, flashinfer.DECODE, flash_attn.FA2, flash_attn.FA3,
    vllm.TRITON, vllm.CPU, sglang.TRITON,
)  # fmt: skip
