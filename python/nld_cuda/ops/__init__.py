"""One typed wrapper per torch op of `torch.ops.nld`, with its fake (shape) implementation.

The wrappers add nothing but defaults and documentation; `nld_cuda.reference` holds the meaning of
every op in plain PyTorch under the same names and argument order. All ops run on the current
stream, read nothing on the host, and can be captured in a CUDA graph. A trailing underscore marks
an op that writes arguments in place; in-place writes do not bump a tensor's autograd version.
"""

from nld_cuda.ops.attention import MaskMode, attention_plan, attention_plan_len, block_attention
from nld_cuda.ops.kv_cache import compact_, rope_append_
from nld_cuda.ops.sampler import CommitResult, CommitRule, Purpose, commit_, gumbel_noise_
from nld_cuda.ops.shards import (
    PART_LEN,
    PART_WORDS,
    commit_parts_,
    commit_scan,
    num_parts,
    verify_parts_,
    verify_scan,
)
from nld_cuda.ops.verify import VerifyMode, VerifyResult, verify_

__all__ = (
    "PART_LEN",
    "PART_WORDS",
    "CommitResult",
    "CommitRule",
    "MaskMode",
    "Purpose",
    "VerifyMode",
    "VerifyResult",
    "attention_plan",
    "attention_plan_len",
    "block_attention",
    "commit_",
    "commit_parts_",
    "commit_scan",
    "compact_",
    "gumbel_noise_",
    "num_parts",
    "rope_append_",
    "verify_",
    "verify_parts_",
    "verify_scan",
)
