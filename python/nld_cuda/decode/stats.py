"""What a decode call did: forwards by kind, tokens per forward, acceptance, time and memory."""

from __future__ import annotations

import dataclasses
import platform
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch

from nld_cuda.decode.state import DecodeState, Pass
from nld_cuda.version import __version__


@dataclass(frozen=True)
class RequestStats:
    """One request. nfe is counted as the published loop of the mode counts (`DecodeStats`)."""

    prompt_tokens: int
    new_tokens: int
    prefill_forwards: int
    draft_forwards: int
    verify_forwards: int
    nfe: int


@dataclass(frozen=True)
class DecodeStats:
    """Counts, times and surroundings of one `generate` or `stream` call.

    A forward of a batch serves several requests. "Request forwards" count it once for each request
    that was not done; all ratios use them, so that a ratio does not depend on the batch size.

    Attributes:
        mode, block_length: as called; block_length is None for ar.
        num_requests: batch size.
        prompt_tokens, new_tokens: sums over requests. EOS counts as a new token.
        batch_forwards: forwards launched, `{"prefill", "draft", "verify", "mixed"}`; mixed: some
            requests denoise while others pass over a finished block (diffusion).
        prefill_forwards: request forwards over prompts. Each gives the request's first token.
        draft_forwards: request forwards that draft or denoise: their keys and values do not stay.
        verify_forwards: causal request forwards whose keys and values stay: ar steps, verify
            passes, the pass over a finished diffusion block, and the joint forwards of
            quadratic_spec.
        nfe: forwards as the published loops count them: draft + verify for diffusion (without the
            prefill), prefill + draft + verify for the other modes.
        tokens_per_forward: new_tokens / nfe.
        tokens_per_forward_without_commit: the same without the causal pass over finished blocks or
            drafts (verify_forwards), as if it came for free; None where no pass is separate (ar,
            quadratic_spec).
        decode_tokens_per_forward: (new_tokens - first tokens) / (draft + verify): the prefill's
            token and forward left out in every mode alike.
        tokens_per_cycle: tokens emitted by verify passes / verify passes (speculative modes, else
            None): accepted drafts plus the verifier's own token, 1 to block_length.
        accept_len_histogram: `[a]` = verify passes that accepted exactly a drafts, a = 0 ..
            block_length - 1 (speculative modes, else empty). Counted before a cut at EOS or length.
        mean_accept_len: mean of that histogram, None when empty.
        seconds: wall time from the prompts' ids to the last token.
        first_token_seconds: to the first token of every request (the prefill).
        tokens_per_second: new_tokens / seconds.
        decode_tokens_per_second: (new_tokens - first tokens) / (seconds - first_token_seconds).
        peak_memory_bytes: CUDA: most memory torch has held during the call; CPU: the largest
            resident size of the process so far.
        requests: one record per request.
        seeds: seed of each request, for repeating sampled output.
        num_ranks: processes that share the model, 1 unless it is divided (`load(process_group=)`).
        device, dtype, spec_sampling, lora: as run; lora tells whether the adapter drafted.
        versions: nld_cuda, torch, python.
    """

    mode: str
    block_length: int | None
    num_requests: int
    prompt_tokens: int
    new_tokens: int
    batch_forwards: dict[str, int]
    prefill_forwards: int
    draft_forwards: int
    verify_forwards: int
    nfe: int
    tokens_per_forward: float | None
    tokens_per_forward_without_commit: float | None
    decode_tokens_per_forward: float | None
    tokens_per_cycle: float | None
    accept_len_histogram: list[int]
    mean_accept_len: float | None
    seconds: float
    first_token_seconds: float
    tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_memory_bytes: int
    requests: list[RequestStats]
    seeds: list[int]
    num_ranks: int
    device: str
    dtype: str
    spec_sampling: str | None
    lora: bool
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for `json.dumps`."""
        return dataclasses.asdict(self)


def collect(
    state: DecodeState,
    *,
    mode: str,
    block_length: int | None,
    seconds: float,
    first_token_seconds: float,
    dtype: torch.dtype,
    spec_sampling: str | None,
    lora: bool,
    num_ranks: int = 1,
) -> DecodeStats:
    """Read the counters of a state. Waits for the device."""
    forwards = state.forwards.tolist()
    out_lens = state.out_lens.tolist()
    speculative = mode in ("linear_spec", "quadratic_spec")
    separate = mode in ("linear_spec", "diffusion")
    counted = [Pass.DRAFT, Pass.VERIFY] + ([] if mode == "diffusion" else [Pass.PREFILL])
    requests = [
        RequestStats(
            prompt_tokens=len(r.prompt),
            new_tokens=n,
            prefill_forwards=f[Pass.PREFILL],
            draft_forwards=f[Pass.DRAFT],
            verify_forwards=f[Pass.VERIFY],
            nfe=sum(f[kind] for kind in counted),
        )
        for r, n, f in zip(state.requests, out_lens, forwards, strict=True)
    ]
    prefill, draft, verify = (sum(f[kind] for f in forwards) for kind in Pass)
    nfe, new = sum(r.nfe for r in requests), sum(out_lens)
    histogram = state.accept_hist.sum(dim=0).tolist() if speculative else []
    accepted = sum(n * count for n, count in enumerate(histogram))
    return DecodeStats(
        mode=mode,
        block_length=block_length,
        num_requests=state.batch,
        prompt_tokens=sum(r.prompt_tokens for r in requests),
        new_tokens=new,
        batch_forwards=dataclasses.asdict(state.batch_forwards),
        prefill_forwards=prefill,
        draft_forwards=draft,
        verify_forwards=verify,
        nfe=nfe,
        tokens_per_forward=_ratio(new, nfe),
        tokens_per_forward_without_commit=_ratio(new, nfe - verify) if separate else None,
        decode_tokens_per_forward=_ratio(new - prefill, draft + verify),
        tokens_per_cycle=_ratio(new - prefill, verify) if speculative else None,
        accept_len_histogram=histogram,
        mean_accept_len=_ratio(accepted, sum(histogram)),
        seconds=seconds,
        first_token_seconds=first_token_seconds,
        tokens_per_second=_ratio(new, seconds),
        decode_tokens_per_second=_ratio(new - prefill, seconds - first_token_seconds),
        peak_memory_bytes=peak_memory_bytes(state.device),
        requests=requests,
        seeds=[r.seed for r in state.requests],
        num_ranks=num_ranks,
        device=str(state.device),
        dtype=str(dtype).removeprefix("torch."),
        spec_sampling=spec_sampling if speculative and state.any_sampled else None,
        lora=lora,
        versions={
            "nld_cuda": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Most device memory torch held since the last reset, or the process's peak resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
