"""The meaning of every op, in plain PyTorch: same names, same argument order, no speed.

Loops over requests and reads values on the host on purpose: this page is to be read. CPU, emulated
CUDA and CUDA kernels are tested against it.
"""

from nld_cuda.reference.attention import (
    attention_plan,
    block_attention,
    reading_order,
    visible_keys,
)
from nld_cuda.reference.draws import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    SAMPLE,
    allowed_tokens,
    clean_logits,
    draw_tokens,
    draw_values,
    exact_log,
    gumbel,
    gumbel_noise_,
    inverse_temperature,
    lowest_argmax,
    philox_tokens,
    philox_words,
    uniform,
)
from nld_cuda.reference.kv_cache import as_stored, compact_, rope_append_, rotate_half
from nld_cuda.reference.sampler import commit_
from nld_cuda.reference.shards import commit_parts_, commit_scan, verify_parts_, verify_scan
from nld_cuda.reference.verify import COMMIT, GREEDY, REJECTION, SAMPLED, verify_

__all__ = (
    "ACCEPT",
    "COMMIT",
    "DRAFT",
    "GREEDY",
    "REJECTION",
    "RESIDUAL",
    "SAMPLE",
    "SAMPLED",
    "allowed_tokens",
    "as_stored",
    "attention_plan",
    "block_attention",
    "clean_logits",
    "commit_",
    "commit_parts_",
    "commit_scan",
    "compact_",
    "draw_tokens",
    "draw_values",
    "exact_log",
    "gumbel",
    "gumbel_noise_",
    "inverse_temperature",
    "lowest_argmax",
    "philox_tokens",
    "philox_words",
    "reading_order",
    "rope_append_",
    "rotate_half",
    "uniform",
    "verify_",
    "verify_parts_",
    "verify_scan",
    "visible_keys",
)
