"""Baselines that cannot run here: modules that have the documented signatures and compute plainly.

What a fake module gets is what the real one would get; it reads pages, slots, masks and lengths the
way its documentation says, and its result must be ours.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nld_cuda import reference
from nld_cuda.bench import attention, grid
from nld_cuda.bench.attention import AttentionProblem
from nld_cuda.bench.base import Baseline, NotRun, needs_cuda_module
from nld_cuda.bench.baselines import (
    flash_attn,
    flashinfer,
    flex,
    paging,
    sdpa,
    sglang,
    signature,
    vllm,
)  # fmt: skip
from nld_cuda.bench.baselines.attention import BASELINES
from nld_cuda.ops import MaskMode

FULL, CAUSAL, BLOCK_CAUSAL, QUADRATIC = MaskMode
CPU = torch.device("cpu")


def cell(*requests: grid.Request, page_size: int = 16) -> grid.Attention:
    return grid.Attention(
        "x", requests, "mixed", True, heads=4, kv_heads=2, head_dim=64, page_size=page_size
    )


ONE_ROW = cell(grid.Request(1, 33, CAUSAL), grid.Request(1, 16, CAUSAL))
BLOCKS = cell(grid.Request(4, 40), grid.Request(4, 40))
CHAIN = cell(grid.Request(5, 37, CAUSAL), grid.Request(3, 70, CAUSAL), page_size=32)
RAGGED = cell(grid.Request(4, 40), grid.Request(9, 19), grid.Request(1, 50, CAUSAL))
FLAGS = cell(grid.Request(4, 40), grid.Request(6, 19, CAUSAL))
EVERY = cell(
    grid.Request(4, 20), grid.Request(6, 19, CAUSAL), grid.Request(1, 50, CAUSAL),
    grid.Request(6, 23, QUADRATIC, 2), grid.Request(8, 8, BLOCK_CAUSAL, 4),
)  # fmt: skip
CELLS = {
    "one row": ONE_ROW, "blocks": BLOCKS, "chain": CHAIN, "ragged": RAGGED, "flags": FLAGS,
    "every": EVERY,
}  # fmt: skip
FP8 = replace(BLOCKS, kv_dtype=attention.FP8)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of `[rows, heads, dim]` over `[keys, kv_heads, dim]` under a bool mask."""
    times = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(times, dim=1) for x in (k, v))
    scores = torch.einsum("rhd,khd->hrk", q.float(), k) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hrk,khd->rhd", scores.softmax(-1), v).to(q.dtype)


def lower_right(rows: int, keys: int, causal: bool) -> Tensor:
    mask = torch.ones(rows, keys, dtype=torch.bool)
    return mask.tril(keys - rows) if causal else mask


def from_pages(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    return cache[pages.long()].flatten(0, 1)[:length]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a module of functions where an import finds it, with its parent packages."""

    def install(name: str, **members: Any) -> None:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            full = ".".join(parts[:i])
            if full not in sys.modules:
                made = ModuleType(full)
                made.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=True)
                made.__path__ = []
                monkeypatch.setitem(sys.modules, full, made)
        for key, value in members.items():
            setattr(sys.modules[name], key, value)

    return install


def check(baseline: Baseline, problem: AttentionProblem) -> None:
    """The library must be found, take the cell, and have our result."""
    assert baseline.missing("cuda") is None
    assert baseline.missing("cpu") == "runs on CUDA only"
    assert baseline.refuses(problem.cell, "cuda") is None
    problem.run()
    made = baseline.make(problem)
    for _ in range(2):  # a call changes none of its inputs
        result = made.result(made.call())
        assert result.shape == problem.out.shape
        assert baseline.differs(problem, result) is None
    wrong = result.clone()
    wrong[-1, -1, -1] += 0.1
    assert baseline.differs(problem, wrong) is not None


def problem(name: str) -> AttentionProblem:
    """Return a problem whose unused page-table entries are out of range."""
    made = AttentionProblem(FP8 if name == "fp8" else CELLS[name], CPU)
    for b, count in enumerate(paging.page_counts(made.cell)):
        made.table[b, count:] = 1 << 30
    return made


# ---- FlashInfer ------------------------------------------------------------------------------


class BatchPrefillWithPagedKVCacheWrapper:
    """FlashInfer's, by its documentation: NHD pages, indptr / indices / last page lengths."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        page_size: int, *, custom_mask: Tensor | None = None, causal: bool = False,
        sm_scale: float | None = None, q_data_type: Any = "float16", kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        for x in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert x.dtype == torch.int32
        self.heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.requests = []
        first = 0
        for b, last in enumerate(paged_kv_last_page_len.tolist()):
            assert 1 <= last <= page_size
            pages = paged_kv_indices[paged_kv_indptr[b] : paged_kv_indptr[b + 1]]
            keys = (len(pages) - 1) * page_size + last
            rows = int(qo_indptr[b + 1] - qo_indptr[b])
            if custom_mask is None:
                mask = lower_right(rows, keys, causal)
            else:
                mask = custom_mask[first : first + rows * keys].view(rows, keys)
            first += rows * keys
            self.requests.append((int(qo_indptr[b]), pages, keys, mask))
        assert custom_mask is None or first == len(custom_mask)
        self.scale, self.dtypes = sm_scale, (q_data_type, kv_data_type)

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, k_scale: float | None = None,
        v_scale: float | None = None, out: Tensor,
    ) -> Tensor:  # fmt: skip
        k_cache, v_cache = paged_kv_cache
        assert (k_scale is None) == (k_cache.dtype == q.dtype)
        assert (q.shape[1], k_cache.shape[2], q.shape[2]) == self.heads
        assert (q.dtype, k_cache.dtype) == self.dtypes
        for start, pages, keys, mask in self.requests:
            k, v = (
                from_pages(cache, pages, keys).float() * (scale or 1.0)
                for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
            )
            rows = slice(start, start + len(mask))
            assert self.scale is not None
            out[rows] = attend(q[rows], k, v, mask, self.scale)
        return out


@pytest.mark.parametrize("name", [*CELLS, "fp8"])
def test_flashinfer(name: str, module: Any) -> None:
    wrapper = BatchPrefillWithPagedKVCacheWrapper
    module("flashinfer", BatchPrefillWithPagedKVCacheWrapper=wrapper)
    check(flashinfer.FLASHINFER, problem(name))
    _, options = flashinfer.arguments(problem(name))
    assert (options["custom_mask"] is not None) == (name in ("flags", "every"))
    assert options["causal"] == (name == "chain")


class BatchDecodeWithPagedKVCacheWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """FlashInfer's for one row a request, by its documentation."""

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_tensor_cores and not use_cuda_graph

    def plan(  # type: ignore[override]
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, *, q_data_type: Any = "float16",
        kv_data_type: Any = None, sm_scale: float | None = None,
    ) -> None:  # fmt: skip
        rows = torch.arange(len(indptr), dtype=torch.int32)
        super().plan(
            rows, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            sm_scale=sm_scale, q_data_type=q_data_type, kv_data_type=kv_data_type,
        )  # fmt: skip


def test_flashinfer_decode(module: Any) -> None:
    wrapper = BatchDecodeWithPagedKVCacheWrapper
    module("flashinfer", BatchDecodeWithPagedKVCacheWrapper=wrapper)
    check(flashinfer.DECODE, problem("one row"))
    assert flashinfer.DECODE.refuses(BLOCKS, "cuda") == "is for one row a request"


# ---- FlashAttention --------------------------------------------------------------------------


def paged_attention(
    q: Tensor, starts: list[int], k_cache: Tensor, v_cache: Tensor, table: Tensor,
    lens: list[int], scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    parts = []
    for b, length in enumerate(lens):
        pages = table[b, : -(-length // k_cache.shape[1])]
        k, v = (from_pages(cache, pages, length) for cache in (k_cache, v_cache))
        rows = q[starts[b] : starts[b + 1]]
        parts.append(attend(rows, k, v, lower_right(len(rows), length, causal), scale))
    return torch.cat(parts)


def fa2_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: None = None, v: None = None,
    rotary_cos: None = None, rotary_sin: None = None, cache_seqlens: Any = None,
    cache_batch_idx: None = None, cache_leftpad: None = None, block_table: Any = None,
    softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
) -> Tensor:  # fmt: skip
    assert k_cache.shape[1] % 256 == 0 and q.dim() == 4
    batch, rows = q.shape[:2]
    assert cache_seqlens.dtype == block_table.dtype == torch.int32 and len(block_table) == batch
    starts = [rows * b for b in range(batch + 1)]
    lens = cache_seqlens.tolist()
    flat = q.flatten(0, 1)
    out = paged_attention(flat, starts, k_cache, v_cache, block_table, lens, softmax_scale, causal)
    return out.view(q.shape)


def fa2_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None,
    causal: bool = False, window_size: Any = (-1, -1), softcap: float = 0.0,
    alibi_slopes: None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:  # fmt: skip
    assert k.shape[1] % 256 == 0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lens = cu_seqlens_k.diff().tolist()
    assert max(lens) == max_seqlen_k and int(cu_seqlens_q.diff().max()) == max_seqlen_q
    starts = cu_seqlens_q.tolist()
    return paged_attention(q, starts, k, v, block_table, lens, softmax_scale, causal)


def fa3_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: None = None, v: None = None, qv: None = None,
    rotary_cos: None = None, rotary_sin: None = None, cache_seqlens: Any = None,
    cache_batch_idx: None = None, cache_leftpad: None = None, page_table: Any = None,
    cu_seqlens_q: Any = None, cu_seqlens_k_new: None = None, max_seqlen_q: Any = None,
    rotary_seqlens: None = None, q_descale: None = None, k_descale: None = None,
    v_descale: None = None, softmax_scale: Any = None, causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert q.dim() == 3 and page_table.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
    starts, lens = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    out = paged_attention(q, starts, k_cache, v_cache, page_table, lens, softmax_scale, causal)
    return out, torch.zeros(1)


@pytest.mark.parametrize("name", ["one row", "blocks", "chain", "ragged"])
def test_flash_attn(name: str, module: Any) -> None:
    functions = {"flash_attn_with_kvcache": fa2_with_kvcache, "flash_attn_varlen_func": fa2_varlen}
    module("flash_attn", **functions)
    check(flash_attn.FA2, problem(name))
    module("flash_attn_interface", flash_attn_with_kvcache=fa3_with_kvcache)
    check(flash_attn.FA3, problem(name))


@pytest.mark.parametrize("baseline", [flash_attn.FA2, flash_attn.FA3], ids=lambda b: b.name)
def test_flash_attn_has_one_flag(baseline: Baseline) -> None:
    assert baseline.refuses(FLAGS, "cuda") == "has one causal flag for the whole batch"
    assert baseline.refuses(EVERY, "cuda") == "has causal and full masks only"
    assert baseline.refuses(replace(BLOCKS, dtype="float32"), "cuda") == "has no float32"
    assert "fp8" in str(baseline.refuses(FP8, "cuda"))


# ---- vLLM, SGLang ----------------------------------------------------------------------------


def vllm_old(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int,
    seqused_k: Tensor, max_seqlen_k: int, softmax_scale: float, causal: Any, window_size: Any,
    block_table: Tensor, softcap: float, q_descale: None, k_descale: None, v_descale: None,
) -> None:  # fmt: skip
    assert window_size == (-1, -1) and softcap == 0 and q_descale is None
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(seqused_k.max()) == max_seqlen_k
    starts, lens = cu_seqlens_q.tolist(), seqused_k.tolist()
    for b in range(len(lens)):
        flag = bool(causal[b]) if isinstance(causal, Tensor) else causal
        rows = q[starts[b] : starts[b + 1]]
        table = block_table[b : b + 1]
        out[starts[b] : starts[b + 1]] = paged_attention(
            rows, [0, len(rows)], k, v, table, lens[b : b + 1], softmax_scale, flag
        )


def vllm_new(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int,
    seqused_k: Tensor, max_seqlen_k: int, softmax_scale: float, causal: Any, window_size: Any,
    block_table: Tensor, softcap: float, q_descale: None, k_descale: None, v_descale: None,
    seq_threshold_3D: Any = None, num_par_softmax_segments: Any = None,
    softmax_segm_output: Any = None, softmax_segm_max: Any = None, softmax_segm_expsum: Any = None,
) -> None:  # fmt: skip
    parts = (seq_threshold_3D, q.shape[1], num_par_softmax_segments)
    assert softmax_segm_output.shape == (*parts, q.shape[2])
    assert softmax_segm_max.shape == softmax_segm_expsum.shape == parts
    vllm_old(
        q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
        window_size, block_table, softcap, q_descale, k_descale, v_descale,
    )  # fmt: skip


@pytest.mark.parametrize("function", [vllm_old, vllm_new])
@pytest.mark.parametrize("place", vllm.MODULES)
@pytest.mark.parametrize("name", ["one row", "blocks", "chain", "ragged", "flags"])
def test_vllm_triton(name: str, place: str, function: Any, module: Any) -> None:
    module(place, unified_attention=function)
    check(vllm.TRITON, problem(name))
    assert vllm.TRITON.refuses(EVERY, "cuda") == "has causal and full masks only"


def sglang_extend(
    q_extend: Tensor, k_extend: Tensor, v_extend: Tensor, o_extend: Tensor, k_buffer: Tensor,
    v_buffer: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
    custom_mask: Any, is_causal: bool, mask_indptr: Any, max_len_extend: int,
    sm_scale: Any = None, logit_cap: float = 0.0, skip_prefix_custom_mask: bool = True,
) -> None:  # fmt: skip
    assert all(x.is_contiguous() for x in (q_extend, k_extend, v_extend, o_extend))
    assert k_buffer.dim() == 3 and int(qo_indptr.diff().max()) == max_len_extend
    for b, rows in enumerate(qo_indptr.diff().tolist()):
        mine = slice(int(qo_indptr[b]), int(qo_indptr[b + 1]))
        slots = kv_indices[kv_indptr[b] : kv_indptr[b + 1]]
        k = torch.cat([k_buffer[slots], k_extend[mine]])
        v = torch.cat([v_buffer[slots], v_extend[mine]])
        mask = lower_right(rows, len(k), is_causal)
        if custom_mask is not None:
            flat = custom_mask[mask_indptr[b] : mask_indptr[b + 1]]
            mask = flat.view(rows, len(k)).clone()
            if skip_prefix_custom_mask:
                mask[:, : len(slots)] = True
        o_extend[mine] = attend(q_extend[mine], k, v, mask, sm_scale)


def sglang_extend_new(
    q_extend: Tensor, k_extend: Tensor, v_extend: Tensor, o_extend: Tensor, k_buffer: Tensor,
    v_buffer: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
    custom_mask: Any, is_causal: bool, mask_indptr: Any, max_len_extend: int, k_scale: float,
    v_scale: float, sm_scale: Any = None, logit_cap: float = 0.0,
) -> None:  # fmt: skip
    assert k_scale == v_scale == 1.0
    sglang_extend(
        q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr,
        kv_indices, custom_mask, is_causal, mask_indptr, max_len_extend, sm_scale, logit_cap,
    )  # fmt: skip


def sglang_decode(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, o: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, attn_logits: Tensor, attn_lse: Tensor, num_kv_splits: Tensor,
    max_kv_splits: int, sm_scale: float, logit_cap: float = 0.0,
) -> None:  # fmt: skip
    assert attn_logits.shape == (*q.shape[:2], max_kv_splits, v_buffer.shape[-1])
    assert attn_lse.shape == (*q.shape[:2], max_kv_splits)
    assert num_kv_splits.shape == (len(q),) and int(num_kv_splits.max()) <= max_kv_splits
    for b in range(len(q)):
        slots = kv_indices[kv_indptr[b] : kv_indptr[b + 1]]
        mask = torch.ones(1, len(slots), dtype=torch.bool)
        o[b : b + 1] = attend(q[b : b + 1], k_buffer[slots], v_buffer[slots], mask, sm_scale)


@pytest.mark.parametrize("extend", [sglang_extend, sglang_extend_new])
@pytest.mark.parametrize("place", sglang.PLACES)
@pytest.mark.parametrize("name", CELLS)
def test_sglang_triton(name: str, place: str, extend: Any, module: Any) -> None:
    module(f"{place}.extend_attention", extend_attention_fwd=extend)
    module(f"{place}.decode_attention", decode_attention_fwd=sglang_decode)
    check(sglang.TRITON, problem(name))


# ---- torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [r for c in CELLS.values() for r in c.requests], ids=str)
def test_flex_mask(r: grid.Request) -> None:
    made = flex.Masks.of(cell(r), CPU)
    zero = torch.tensor(0)
    row, key = torch.arange(r.rows)[:, None], torch.arange(r.seq_len)[None]
    assert torch.equal(made.visible(zero, zero, row, key), paging.visible(r))
    behind = made.visible(zero, zero, row, torch.tensor([r.seq_len]))
    assert not behind.any(), "padding is not seen"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CELLS)
def test_flex(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # slow, nothing of ours
    made = problem(name)
    made.run()
    prepared = flex.make(made)
    assert flex.FLEX.differs(made, prepared.result(prepared.call())) is None
    far = cell(grid.Request(4, 4000), *[grid.Request(4, 8)] * 30)
    assert "padding" in str(flex.FLEX.refuses(far, "cuda"))
    assert "compiles" in str(flex.FLEX.costly(replace(RAGGED, headline=False)))
    assert flex.FLEX.costly(RAGGED) is None


@pytest.mark.parametrize("name", CELLS)
def test_sdpa(name: str) -> None:
    made = problem(name)
    made.run()
    for baseline in (sdpa.FLASH, sdpa.FLASH_EXPANDED, sdpa.MATH, sdpa.GATHER):
        assert baseline.refuses(made.cell, "cpu") is None
        with baseline.around():
            prepared = baseline.make(made)
            assert baseline.differs(made, prepared.result(prepared.call())) is None, baseline.name


def test_sdpa_on_cuda_refuses_what_its_backend_has_not() -> None:
    assert sdpa.FLASH.refuses(EVERY, "cuda") == "takes no mask tensor"
    assert sdpa.FLASH.refuses(CHAIN, "cuda") is None, "its kernel lines up at the end"
    assert sdpa.FLASH.refuses(replace(BLOCKS, dtype="float32"), "cuda") == "has no float32"
    huge = cell(grid.Request(32768, 32768, BLOCK_CAUSAL, 32))
    assert "its mask would hold" in str(sdpa.CUDNN.refuses(huge, "cuda"))
    assert sdpa.CUDNN.missing("cpu") == "runs on CUDA only"
    bias = sdpa.mask_arguments(CHAIN.requests[0], CPU, lower_right=True)["attn_mask"]
    assert type(bias).__name__ == "CausalBias"
    prompt = grid.Request(9, 9, CAUSAL)
    assert sdpa.mask_arguments(prompt, CPU, lower_right=False) == {"is_causal": True}


def test_vllm_cpu_without_its_library() -> None:
    assert vllm.CPU.missing("cuda") == "runs on the CPU only"
    assert "--vllm-cpu" in str(vllm.CPU.missing("cpu"))
    with pytest.raises(NotRun, match="--vllm-cpu"):
        vllm.make_cpu(AttentionProblem(BLOCKS, CPU))


# ---- arguments -------------------------------------------------------------------------------


def test_paging_by_hand() -> None:
    """Three requests on pages of 4: 9 tokens, 4 (a full page), 1."""
    hand = cell(
        grid.Request(2, 9), grid.Request(1, 4, CAUSAL), grid.Request(1, 1, CAUSAL), page_size=4
    )
    table = torch.tensor([[7, 2, 5], [0, 99, 99], [3, 99, 99]], dtype=torch.int32)
    assert paging.page_counts(hand) == [3, 1, 1]
    assert paging.kv_indptr([3, 1, 1]).tolist() == [0, 3, 4, 5]
    assert paging.kv_indptr([3, 1, 1]).dtype == torch.int32
    assert paging.page_indices(hand, table).tolist() == [7, 2, 5, 0, 3]
    assert paging.last_page_lens(hand).tolist() == [1, 4, 1]
    slots = paging.slots(hand, table, [9, 4, 1])
    assert slots.tolist() == [28, 29, 30, 31, 8, 9, 10, 11, 20, 0, 1, 2, 3, 12]
    assert paging.slots(hand, table, [0, 1, 0]).tolist() == [0]
    cache = torch.arange(8 * 4).view(8, 4, 1, 1)
    made, made_table = paging.repage(hand, cache, table, 8)
    assert made.shape[:2] == (4, 8) and made_table.shape == (3, 2)
    for b, length in enumerate([9, 4, 1]):
        old = paging.slots(hand, table[b : b + 1], [length])
        new = from_pages(made, made_table[b, : -(-length // 8)], length)
        assert torch.equal(new.flatten(), old)


def test_flags() -> None:
    assert paging.one_flag(RAGGED) is None and not paging.is_causal(RAGGED)
    assert paging.one_flag(CHAIN) is None and paging.is_causal(CHAIN)
    assert paging.modes(ONE_ROW) == {FULL}
    assert paging.modes(EVERY) == {FULL, CAUSAL, BLOCK_CAUSAL, QUADRATIC}
    for r in EVERY.requests:
        mask = reference.visible_keys(int(r.mode), r.seq_len, r.rows, r.block_len)
        assert torch.equal(paging.visible(r), mask)


def test_arguments_that_a_version_does_not_know_are_left_out() -> None:
    def old(a: int, *, b: int) -> tuple[int, int]:
        return a, b

    assert signature.call_with(old, {"c": 3}, a=1, b=2) == (1, 2)
    with pytest.raises(TypeError):
        signature.call_with(old, {}, a=1, b=2, c=3)
    with pytest.raises(NotRun, match=r"not installed: no\.such\.module"):
        signature.first_module(["no.such.module"])
    missing = needs_cuda_module("no.such.module", "no_such_module")
    assert missing("cuda") == "not installed: no.such.module or no_such_module"
    assert missing("cpu") == "runs on CUDA only"


def test_baselines_are_named_once() -> None:
    names = [b.name for b in BASELINES]
    assert len(set(names)) == len(names)
    for baseline in BASELINES:
        if baseline.layout:
            assert baseline.layout_bytes(BLOCKS) > 0, baseline.name
