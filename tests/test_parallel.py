"""Tensor parallelism: two gloo processes on the CPU must do what one does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nld_cuda
from nld_cuda import cli, ops
from nld_cuda.model import ModelConfig
from nld_cuda.model.checkpoint import _pieces
from nld_cuda.parallel.command import Team
from nld_cuda.parallel.group import local_device
from nld_cuda.parallel.shard import Shard, vocab_borders
from parallel_worker import CASES, LOGITS, all_logits, decode_everything, write_checkpoints
from tiny_model import config_fields

TESTS = Path(__file__).resolve().parent
TIMEOUT_S = 120  # of two processes; they need about 10


def torchrun(*argv: Any, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program in two processes, `text` on their standard input; end them if they hang."""
    paths = [str(Path(nld_cuda.__file__).parents[1]), str(TESTS), str(TESTS.parent / "benchmarks")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *map(str, argv)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            out, err = process.communicate(text, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes; a killed one would leave them
            out, err = process.communicate()
            pytest.fail(f"two processes took more than {TIMEOUT_S} s:\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(path)
    return path


def found_by_ranks(folder: Path, device: str) -> list[dict[str, Any]]:
    done = torchrun(TESTS / "parallel_worker.py", folder, device)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def found_alone(folder: Path, device: str) -> dict[str, Any]:
    load = partial(nld_cuda.load, device=device)
    found = {"decoded": decode_everything(folder, load), "logits": all_logits(folder, load)}
    return dict(json.loads(json.dumps(found)))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return found_by_ranks(folder, "cpu")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return found_alone(folder, "cpu")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_decode_as_one(name: str, alone: dict, ranks: list[dict]) -> None:
    one, *two = (found["decoded"][name] for found in (alone, *ranks))
    assert [one, one] == two
    assert any(len(tokens) > 3 for tokens in one[0])


def test_sessions_and_streams(alone: dict, ranks: list[dict]) -> None:
    one, *two = (found["decoded"] for found in (alone, *ranks))
    names = [name for name in one if name.startswith("session-")]
    assert len(names) == 4
    for name in names:
        assert [one[name], one[name]] == [found[name] for found in two]
    assert one[names[-1]][-1] > 20, "tokens that were cached"


def test_logits_of_every_dtype(alone: dict, ranks: list[dict]) -> None:
    """Sums of two halves are rounded otherwise; quantised weights stay as they are stored."""
    assert len(alone["logits"]) == len(LOGITS)
    for name, (expected, kind) in alone["logits"].items():
        for found in ranks:
            logits, stored_as = found["logits"][name]
            assert stored_as == kind
            error = torch.tensor(logits) - torch.tensor(expected)
            bound = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.003}[name.split(".")[1]]
            assert float(error.norm() / torch.tensor(expected).norm()) < bound, name
        assert ranks[0]["logits"][name] == ranks[1]["logits"][name]


def test_seeds_that_are_drawn_are_those_of_rank_0(ranks: list[dict]) -> None:
    assert ranks[0]["drawn"] == ranks[1]["drawn"]
    assert len(set(ranks[0]["drawn"][1])) == 3


def test_a_rank_takes_the_memory_of_its_part(folder: Path, ranks: list[dict]) -> None:
    whole = nld_cuda.load(folder / "large", device="cpu", dtype="float32").num_bytes
    for found in ranks:
        share, peak = found["memory"]["weight_bytes"], found["memory"]["peak_bytes"]
        assert whole / 2 <= share < 0.501 * whole  # norms are whole
        assert 0.9 * share < peak < share + 40 * 2**20 < whole
    assert [r["vocab_shard"] for r in ranks] == [[0, 16384], [16384, 8193]]


@pytest.mark.parametrize(
    "name,kinds,message",
    [
        (
            "heads", ["ValueError"] * 2,
            "load: num_heads, num_kv_heads and intermediate_size must be multiples of the number "
            "of processes, got 6, 3 and 320 for 2 processes",
        ),
        ("no_group", ["TypeError"] * 2, "process_group must be a torch.distributed.ProcessGroup"),
        (
            "one_folder_missing", ["RuntimeError", "FileNotFoundError"],
            "load: path_or_name must be a checkpoint folder",
        ),
        ("other_model", ["ValueError"] * 2, "load: checkpoint and options must be the same on all"),
        ("other_dtype", ["ValueError"] * 2, "load: checkpoint and options must be the same on all"),
        ("other_prompts", ["ValueError"] * 2, "prompts and options must be the same on all ranks"),
        ("other_session", ["ValueError"] * 2, "prompts and options must be the same on all ranks"),
        ("other_options", ["ValueError"] * 2, "prompts and options must be the same on all ranks"),
        ("one_seed", ["ValueError"] * 2, "prompts and options must be the same on all ranks"),
        ("one_bad_prompt", ["RuntimeError", "ValueError"], r"hold ids in [0, 24577), got -1"),
        ("one_bad_mode", ["RuntimeError", "ValueError"], "mode must be one of ar, diffusion"),
    ],
)  # fmt: skip
def test_errors_on_one_rank_end_all(
    name: str, kinds: list[str], message: str, ranks: list[dict]
) -> None:
    assert [r[name][0] for r in ranks] == kinds
    assert all(message in r[name][1] for r in ranks)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_decode_as_one(tmp_path: Path) -> None:
    write_checkpoints(tmp_path)
    one = found_alone(tmp_path, "cuda")["decoded"]
    for found in found_by_ranks(tmp_path, "cuda"):
        assert found["decoded"] == one


# ---- the command ---------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}=>\n"
FAILING = """
import os, sys
from nld_cuda import cli, ops
from nld_cuda.decode.run import Run
if os.environ["RANK"] == "1":
    def advance(self): raise RuntimeError("rank 1 is out of memory")
    Run.advance = advance
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nld-tiny with 6 key heads, as the page about it makes it."""
    page = (TESTS.parent / "docs/how-to/tensor-parallel.md").read_text()
    script = page.split("<<'EOF'\n")[1].split("EOF\n")[0]
    folder: Path = tmp_path_factory.mktemp("divisible")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["-", str(folder / "nld-tiny-6")])
        exec(script, {})
    (folder / "chat.jinja").write_text(CHAT)
    return folder


def test_chat_under_torchrun(divisible: Path, monkeypatch: Any, capsys: Any) -> None:
    """Rank 0 reads and prints for all; a setting that it reads changes every rank."""
    argv = ["chat", "--model", str(divisible / "nld-tiny-6"), "--max-new-tokens", "24"]
    argv += ["--template", str(divisible / "chat.jinja"), "--mode", "ar"]
    turns = "add 17+25\n/mode diffusion\n/stats on\nadd 1+2\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
    with pytest.raises(SystemExit):
        cli.main(argv)
    out, err = capsys.readouterr()
    done = torchrun("-m", "nld_cuda", *argv, text=turns)
    assert done.returncode == 0, done.stderr
    assert done.stdout == out and len(out) > 20
    one, two = (text.count("diffusion: ") for text in (err, done.stderr))
    assert one == two == 1


def test_one_failing_rank_ends_the_command_with_one_message(
    divisible: Path, tmp_path: Path
) -> None:
    program = tmp_path / "failing.py"
    program.write_text(FAILING)
    done = torchrun(program, "generate", "add 17+25\n=>\n", "--model", divisible / "nld-tiny-6")
    assert done.returncode != 0
    assert done.stderr.count("nld: error: ") == 1
    assert "nld: error: rank 1 is out of memory\n" in done.stderr


def test_commands_of_one_process(monkeypatch: Any) -> None:
    team = object.__new__(Team)
    team.num_ranks = 2
    team.check("generate")
    with pytest.raises(ValueError, match="quantize must run in one process, got 2"):
        team.check("quantize")


# ---- division ------------------------------------------------------------------------------------


def test_a_gpu_for_each_process(monkeypatch: Any) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert local_device(None) == torch.device("cuda:3") and chosen == [3]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match=r"device must be one GPU per process, cuda:3 .* finds 3"):
        local_device(None)


def test_vocabulary_borders() -> None:
    assert vocab_borders(131072, 8) == tuple(range(0, 131073, 16384))
    assert vocab_borders(131073, 2) == (0, 65536, 131073)
    assert vocab_borders(61, 4) == (0, 15, 30, 46, 61)
    for vocab in (7, 8191, 8192, 50257, 128256, 131072, 262147):
        for num in (1, 2, 3, 4, 6, 7):
            borders = vocab_borders(vocab, num)
            sizes = [end - begin for begin, end in pairwise(borders)]
            assert borders[0] == 0 and borders[-1] == vocab and min(sizes) > 0
            if vocab >= num * ops.PART_LEN:
                assert all(border % ops.PART_LEN == 0 for border in borders[:-1])
                assert max(sizes) - vocab / num <= ops.PART_LEN
            else:
                assert max(sizes) - min(sizes) <= 1


def test_pieces_make_up_the_checkpoint(folder: Path) -> None:
    """Every number of a file is read by exactly one rank, norms by all."""
    fields = config_fields(num_attention_heads=6, num_key_value_heads=3, intermediate_size=57)
    for name, changes in (("three", fields), ("tied", None)):
        config = (
            ModelConfig.from_file(folder / name)
            if changes is None
            else ModelConfig.from_dict(fields)
        )
        num = 2 if changes is None else 3
        whole = _pieces(config, None)
        counted = {key: torch.zeros(piece.shape) for key, piece in whole.items()}
        for rank in range(num):
            for key, piece in _pieces(config, Shard(None, rank, num, config)).items():
                spans = zip(piece.begin, piece.size, strict=True)
                counted[key][tuple(slice(b, b + n) for b, n in spans)] += 1
        for key, count in counted.items():
            assert bool((count == (num if count.dim() == 1 else 1)).all()), key
    assert counted.keys() == load_file(folder / "tied/model.safetensors").keys()
