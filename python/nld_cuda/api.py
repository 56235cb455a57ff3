"""`load`, and the model it returns: weights, tokenizer and the published decode methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nld_cuda.chat_template import ChatTemplate
from nld_cuda.decode.generate import GenerateResult, generate
from nld_cuda.decode.text import Tokenizer
from nld_cuda.model.checkpoint import load_model
from nld_cuda.model.transformer import NLDModel as _Transformer
from nld_cuda.parallel.group import check_group, gather_objects, require_equal, together

ASSETS = Path(__file__).parent / "assets"
PACKAGED = ("nld-tiny",)

Ids = tuple[Tensor, int]


class NLDModel(_Transformer):
    """A loaded checkpoint.

    The four decode methods have the signatures and results of the published ones: `prompt_ids`
    `[batch, prompt_len]` int64, returned `(ids, nfe)`: ids `[batch, prompt_len + new]` int64 with
    the prompt in front, rows that ended earlier filled up with their EOS; nfe the forwards of the
    slowest request, counted as published (`DecodeStats`). Where they differ from the published
    methods is listed in docs/decoding.md. `nld_cuda.generate` takes ragged batches, text and more
    options.

    Attributes:
        tokenizer: the checkpoint's, None where it has none.
        folder: where the checkpoint lies, None for a model that was made from tensors.
    """

    def __init__(
        self,
        *weights: Any,
        tokenizer: Tokenizer | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(*weights)
        self.tokenizer, self.folder = tokenizer, folder

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's template, None where it has none; raises as `ChatTemplate` does."""
        if self.folder is None:
            return None
        return ChatTemplate.from_folder(self.folder, self.tokenizer)

    def ar_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
    ) -> Ids:
        """Decode one token per forward. nfe = tokens emitted.

        Raises: as `nld_cuda.generate`.
        """
        return self._decode(
            "ar", prompt_ids, max_new_tokens, temperature, eos_token_id, max_thinking_tokens,
            end_think_token_id,
        )  # fmt: skip

    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        block_length: int,
        threshold: float | None = None,
        causal_context: bool = True,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
    ) -> Ids:
        """Denoise block by block. nfe = denoise passes + blocks.

        threshold None commits one token per pass, the most confident one. max_new_tokens need not
        be a multiple of block_length.

        Raises:
            NotImplementedError: causal_context is not True (no NLD checkpoint is trained for that).
            ValueError, TypeError: as `nld_cuda.generate`.
        """
        if causal_context is not True:
            raise NotImplementedError(
                "generate: causal_context must be True, a bidirectional context is not supported, "
                f"got {causal_context!r}"
            )
        return self._decode(
            "diffusion", prompt_ids, max_new_tokens, temperature, eos_token_id, max_thinking_tokens,
            end_think_token_id, block_length=block_length, threshold=threshold,
        )  # fmt: skip

    def linear_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int = 32,
        temperature: float = 0.0,
        mask_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        threshold: float = 0.0,
    ) -> Ids:
        """Draft a block, verify it. nfe = 1 + passes. Drafts with the adapter where there is one.

        Raises: as `nld_cuda.generate`.
        """
        return self._decode(
            "linear_spec", prompt_ids, max_new_tokens, temperature, eos_token_id,
            max_thinking_tokens, end_think_token_id, block_length=block_length,
            mask_token_id=mask_token_id, threshold=threshold,
        )  # fmt: skip

    def quadratic_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int = 16,
        temperature: float = 0.0,
        mask_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
    ) -> Ids:
        """Verify and draft in one forward of block_length * (block_length + 1) rows.

        nfe = 1 + steps.

        Raises: as `nld_cuda.generate`.
        """
        return self._decode(
            "quadratic_spec", prompt_ids, max_new_tokens, temperature, eos_token_id,
            max_thinking_tokens, end_think_token_id, block_length=block_length,
            mask_token_id=mask_token_id,
        )  # fmt: skip

    def _decode(
        self,
        mode: str,
        prompt_ids: Tensor,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: int | Sequence[int] | None,
        max_thinking_tokens: int | None,
        end_think_token_id: int | None,
        **options: Any,
    ) -> Ids:
        if not isinstance(prompt_ids, Tensor) or prompt_ids.dim() != 2:
            got = (
                list(prompt_ids.shape)
                if isinstance(prompt_ids, Tensor)
                else type(prompt_ids).__name__
            )
            raise TypeError(f"{mode}: prompt_ids must be a tensor [batch, prompt_len], got {got}")
        result: GenerateResult = generate(
            self,
            prompt_ids,
            mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=eos_token_id,
            max_thinking_tokens=max_thinking_tokens,
            end_think_token_id=end_think_token_id,
            **options,
        )
        longest = max((len(t) for t in result.tokens), default=0)
        rows = [t + t[-1:] * (longest - len(t)) for t in result.tokens]
        new = torch.tensor(rows, dtype=torch.int64).view(len(rows), longest)
        ids = torch.cat([prompt_ids.cpu().long(), new], dim=1).to(prompt_ids.device)
        return ids, max((r.nfe for r in result.stats.requests), default=0)


def checkpoint_folder(path_or_name: str | Path) -> Path:
    """Folder of a checkpoint, or of a model that comes with the package. Raises as `load`."""
    if not isinstance(path_or_name, str | Path):
        raise TypeError(f"load: path_or_name must be a path, got {type(path_or_name).__name__}")
    folder = Path(path_or_name)
    if not folder.is_dir() and str(path_or_name) in PACKAGED:
        folder = ASSETS / str(path_or_name)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"load: path_or_name must be a checkpoint folder or one of {', '.join(PACKAGED)}, "
            f"got {str(path_or_name)!r}"
        )
    return folder


def load(
    path_or_name: str | Path,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    lora: str | Path | None = "auto",
    progress: Callable[[int, int], None] | None = None,
    kv_dtype: torch.dtype | str = "auto",
    products: str = "auto",
    process_group: Any = None,
) -> NLDModel:
    """Load a checkpoint folder, or a model that comes with the package.

    Args:
        path_or_name: folder in the published layout (config.json, safetensors, tokenizer.json), or
            "nld-tiny". Tokenizers in other forms (SentencePiece, Tekken) are converted by
            transformers (`pip install 'nld-cuda[hf]'`).
        device: "auto" (CUDA where this build has kernels for it, else cpu), "cpu", "cuda",
            "cuda:1".
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16", "float16", or a torch dtype.
        lora: draft adapter: "auto" (`linear_spec_lora` in the folder where there is one), None or
            "none", or a folder.
        progress: called with (bytes done, bytes in all) while loading.
        kv_dtype: of the caches: "auto" (the model's), or "fp8" (torch.float8_e4m3fn): half the
            memory and traffic of bfloat16, four bits of precision less. Its scales are 1 unless
            `calibrate_kv` is called.
        products: with quantised weights: "auto" (weights stay as stored; activations are rounded to
            fp8 where the checkpoint asks for it and the GPU multiplies fp8), "dense" (weights are
            expanded on loading: more memory, faster on a CPU), "fp8" (fp8 weights only: activations
            are always rounded).
        process_group: a torch.distributed.ProcessGroup whose processes share the model: each calls
            `load` and holds a part (device "cuda" is then cuda:LOCAL_RANK), then all make the same
            calls and get the same results. `nld_cuda.parallel.init()` gives torchrun's; None: this
            process holds all. docs/how-to/tensor-parallel.md has an example.

    Raises:
        FileNotFoundError: no such folder or name, or a file is missing in it.
        TypeError: path_or_name is no path, process_group no group.
        ValueError: config, tensors, tokenizer, device, dtype, kv_dtype or products break a rule
            (all are named); heads or inner units cannot be divided by the number of processes;
            other processes of the group load another model.
        NotImplementedError: the checkpoint or device needs what this package does not have.
        RuntimeError: another process of the group has failed.
    """

    def read() -> NLDModel:
        if kv_dtype not in ("auto", "fp8", torch.float8_e4m3fn):
            raise ValueError(f"load: kv_dtype must be auto or fp8, got {kv_dtype}")
        folder = checkpoint_folder(path_or_name)
        weights = load_model(
            folder, device, dtype, None if lora == "none" else lora, products=products,
            progress=progress, process_group=process_group,
        )  # fmt: skip
        model = NLDModel(
            weights.config, weights.embed, weights.layers, weights.norm, weights.head,
            weights.shard, tokenizer=Tokenizer.from_folder(folder), folder=folder,
        )  # fmt: skip
        model.vision = weights.vision
        if kv_dtype != "auto":
            model.kv_dtype = torch.float8_e4m3fn
        return model

    if process_group is None:
        return read()
    check_group(process_group)
    model = together(process_group, "load", read)
    assert model.shard is not None
    held = (model.shard.full, model.dtype, model.kv_dtype, model.has_lora, products)
    require_equal(gather_objects(process_group, held), "load: checkpoint and options")
    return model
