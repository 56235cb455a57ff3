"""What each rank of tests/test_parallel.py runs; the test runs the same in one process.

    torchrun --standalone --nproc-per-node 2 tests/parallel_worker.py FOLDER cpu|cuda

FOLDER holds the checkpoints that `write_checkpoints` has made; `rank<R>.json` is written into it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import nld_cuda
from bench_load import config_of, load_here, write_random
from decode_cases import END_THINK, EOS, prompt, write_tiny
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.decode.stats import DecodeStats
from nld_cuda.quantize import quantize

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"vocab": 67, "tie_word_embeddings": True, "num_key_value_heads": 4, "seed": 1},
    "wide": {"vocab": 3 * 8192 + 1, "layers": 1, "seed": 2},  # shards begin between slices
}
RAGGED = [prompt(9, 61), prompt(1, 61), prompt(14, 61)]
HOT: dict[str, Any] = {"temperature": [0.8, 0.0, 1.3], "seed": [5, 6, 7]}
ENDING: dict[str, Any] = {"eos_token_id": [(EOS, 17, 30), (), (40,)]}
THINKING: dict[str, Any] = {"max_thinking_tokens": [5, None, 2], "end_think_token_id": END_THINK}
SPEC: dict[str, Any] = {"block_length": 6}
BLOCKS: dict[str, Any] = {"block_length": 6, "threshold": 0.3}

# name -> checkpoint, mode, options of generate, options of load
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "ar": ("plain", "ar", {}, {}),
    "ar-hot-eos": ("plain", "ar", HOT | ENDING, {}),
    "linear": ("plain", "linear_spec", SPEC | THINKING, {}),
    "linear-hot": ("plain", "linear_spec", SPEC | HOT | ENDING, {}),
    "linear-threshold": ("plain", "linear_spec", SPEC | {"threshold": 0.5} | HOT, {}),
    "linear-rejection": ("plain", "linear_spec", SPEC | HOT | {"spec_sampling": "rejection"}, {}),
    "linear-fp8": ("plain", "linear_spec", SPEC | HOT, {"kv_dtype": "fp8"}),
    "linear-tied": ("tied", "linear_spec", SPEC | HOT, {"lora": None}),
    "linear-wide": ("wide", "linear_spec", SPEC | HOT, {}),
    "quadratic": ("plain", "quadratic_spec", {"block_length": 3} | ENDING, {}),
    "quadratic-hot": ("plain", "quadratic_spec", {"block_length": 3} | HOT | THINKING, {}),
    "quadratic-rejection": (
        "wide", "quadratic_spec", {"block_length": 2} | HOT | {"spec_sampling": "rejection"}, {},
    ),
    "diffusion": ("plain", "diffusion", BLOCKS | ENDING | THINKING, {}),
    "diffusion-hot": ("wide", "diffusion", BLOCKS | HOT, {}),
    "diffusion-entropy": ("plain", "diffusion", BLOCKS | {"rule": "entropy"}, {}),
    "diffusion-revise": (
        "tied", "diffusion", BLOCKS | {"rule": "revise", "revise_threshold": 0.2} | HOT, {},
    ),
}  # fmt: skip

Load = Callable[..., nld_cuda.NLDModel]


def write_checkpoints(folder: Path) -> None:
    for name, changes in CHECKPOINTS.items():
        write_tiny(folder / name, **changes)
    write_tiny(folder / "dense", vocab=64, hidden_size=64, intermediate_size=128)
    quantize(folder / "dense", folder / "int4", group_size=32)
    quantize(folder / "dense", folder / "fp8", format="fp8", head=True)
    fields = config_of("3B", layers=1, vocab=1000)
    fields |= {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    write_random(folder / "large", fields)


def counts(stats: DecodeStats) -> dict[str, Any]:
    """The statistics that time and place do not change."""
    names = ("new_tokens", "nfe", "accept_len_histogram", "batch_forwards", "seeds")
    return {name: getattr(stats, name) for name in names}


def decode_everything(folder: Path, load: Load) -> dict[str, Any]:
    """Every case, a session that changes modes, and a stream, as JSON."""
    found: dict[str, Any] = {}
    for name, (checkpoint, mode, options, load_options) in CASES.items():
        model = load(folder / checkpoint, **load_options)
        result = nld_cuda.generate(model, RAGGED, mode, max_new_tokens=[20, 17, 13], **options)
        found[name] = [result.tokens, result.finish_reason, counts(result.stats)]

    model = load(folder / "plain")
    session, text = nld_cuda.Session(model), prompt(8, 61)
    for mode in ("linear_spec", "diffusion", "ar", "quadratic_spec"):
        options = {} if mode == "ar" else {"block_length": 4}
        events = list(
            nld_cuda.stream(model, text, mode, max_new_tokens=9, session=session, **options)
        )
        result = events[-1].result
        shown = [[e.kind, e.final_tokens, [t.token for t in e.provisional]] for e in events]
        found[f"session-{mode}"] = [result.tokens, shown, session.num_reused]
        text = [*text, *result.tokens[0], 11]
    return found


LOGITS = [
    ("wide", {"dtype": "float32"}),
    ("wide", {"dtype": "bfloat16"}),
    ("wide", {"dtype": "float16", "lora": None}),
    ("int4", {}),
    ("int4", {"dtype": "float32"}),
    ("fp8", {}),
    ("fp8", {"dtype": "float32"}),
]


def all_logits(folder: Path, load: Load) -> dict[str, Any]:
    """Logits of a prompt, with the adapter where there is one; and what `o_proj` is stored as."""
    found: dict[str, Any] = {}
    for checkpoint, options in LOGITS:
        model = load(folder / checkpoint, **options)
        cache = KVCache.of(model, 1, 16)
        tokens, *ints = (
            torch.tensor(values, device=model.device)
            for values in (prompt(9, 61), list(range(9)), [9], [0, 9], [1])
        )
        places, seq_lens, cu_seqlens, causal = (t.int() for t in ints)
        logits = model.forward(
            tokens, places, places, cache, cache.allocate(1, 9), seq_lens, cu_seqlens, causal,
            use_lora=model.has_lora,
        )  # fmt: skip
        logits = logits if model.shard is None else model.shard.whole_logits(logits)
        name = "-".join([checkpoint, str(model.dtype)])
        found[name] = [logits[:, ::7].tolist(), type(model.layers[0].o).__name__]
    return found


def only_in_parallel(folder: Path, group: Any, load: Load) -> dict[str, Any]:
    """What has no counterpart in one process: drawn seeds, errors."""
    found: dict[str, Any] = {}
    rank = torch.distributed.get_rank(group)
    model = load(folder / "wide")
    found["vocab_shard"] = [model.shard.first_id, model.head.shape[0]]
    torch.manual_seed(rank)
    drawn = nld_cuda.generate(model, RAGGED, "ar", max_new_tokens=5, temperature=1.0)
    found["drawn"] = [drawn.tokens, drawn.stats.seeds]

    def error_of(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]

    def generate(tokens: list[int], mode: str = "ar", **options: Any) -> None:
        nld_cuda.generate(model, [tokens], mode, max_new_tokens=3, **options)

    error_of("heads", lambda: load("nld-tiny"))
    error_of("no_group", lambda: load("nld-tiny", process_group="nccl"))
    error_of("one_folder_missing", lambda: load(folder / ("plain", "nowhere")[rank]))
    error_of("other_model", lambda: load(folder / ("plain", "tied")[rank]))
    error_of("other_dtype", lambda: load(folder / "plain", dtype=("float32", "bfloat16")[rank]))
    error_of("other_prompts", lambda: generate([5 + rank]))
    session = nld_cuda.Session(model)
    error_of("other_session", lambda: generate([5], session=(session, None)[rank]))
    error_of("other_options", lambda: generate([5], seed=[rank]))
    error_of("one_seed", lambda: generate([5], seed=(3, None)[rank]))
    error_of("one_bad_prompt", lambda: generate([5, -rank]))
    error_of("one_bad_mode", lambda: generate([5], ("ar", "arr")[rank]))
    return found


def main() -> None:
    folder, device = Path(sys.argv[1]), sys.argv[2]
    group = nld_cuda.parallel.init()
    # Before freed memory could serve a second time.
    memory = load_here(folder / "large", "cpu", "float32", process_group=group)
    found = {"memory": memory}
    load = partial(nld_cuda.load, device=device, process_group=group)
    found |= {"decoded": decode_everything(folder, load), "logits": all_logits(folder, load)}
    found |= only_in_parallel(folder, group, load)
    name = f"rank{torch.distributed.get_rank(group)}.json"
    (folder / name).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
