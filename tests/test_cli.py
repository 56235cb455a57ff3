"""The `nld` command: output, exit codes, one-line errors. Runs on the packaged model."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import nld_cuda
from nld_cuda import cli
from nld_cuda.api import ASSETS
from nld_cuda.cli import demo_problems
from nld_cuda.decode.run import MODES

PROMPT = next(p["prompt"] for p in demo_problems())


def run(capsys: Any, *argv: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of `nld argv`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(scope="module")
def model() -> nld_cuda.NLDModel:
    return nld_cuda.load("nld-tiny")


@pytest.mark.parametrize("mode", cli.MODES)
def test_generate_json_is_what_the_library_makes(mode: str, model: Any, capsys: Any) -> None:
    code, out, _ = run(
        capsys, "generate", PROMPT, "--mode", mode, "--json", "--max-new-tokens", "40"
    )
    record = json.loads(out)
    options = {"threshold": 0.9} if mode == "diffusion" else {}
    expected = nld_cuda.generate(
        model, [PROMPT], mode.replace("-", "_"), max_new_tokens=40, **options
    )
    assert code == 0
    assert record["tokens"] == expected.tokens[0]
    assert record["text"] == expected.text[0]
    assert record["stats"]["new_tokens"] == len(expected.tokens[0])


def test_streamed_text_is_the_whole_text(model: Any, capsys: Any) -> None:
    expected = nld_cuda.generate(model, PROMPT, max_new_tokens=60).text[0]
    code, out, err = run(capsys, "generate", PROMPT, "--max-new-tokens", "60")
    assert (code, out) == (0, expected + "\n")
    assert "tokens/forward" in err
    code, out, _ = run(capsys, "generate", PROMPT, "--max-new-tokens", "60", "--no-stream")
    assert (code, out) == (0, expected + "\n")


def test_prompt_from_standard_input(monkeypatch: Any, capsys: Any) -> None:
    _, expected, _ = run(capsys, "generate", PROMPT, "--max-new-tokens", "20")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert run(capsys, "generate", "--max-new-tokens", "20")[:2] == (0, expected)


def test_show_denoising_without_a_terminal(capsys: Any) -> None:
    code, out, _ = run(
        capsys, "generate", PROMPT, "--mode", "diffusion", "--show-denoising",
        "--max-new-tokens", "32", "--block-length", "16",
    )  # fmt: skip
    lines = out.splitlines()
    assert code == 0
    assert " prefill " in lines[0] and lines[0].count("·") == 15, "a seed and 15 masks"
    assert any(" denoise " in line and "·" not in line for line in lines)
    assert any(" refresh " in line for line in lines)
    _, out, _ = run(
        capsys, "generate", PROMPT, "--mode", "linear-spec", "--show-denoising",
        "--max-new-tokens", "32",
    )  # fmt: skip
    assert any(" draft " in line and "?" in line for line in out.splitlines())
    assert any(" verify " in line and "+" in line for line in out.splitlines())


def test_sampling_is_repeatable_and_equal_across_modes(capsys: Any) -> None:
    options = ("--temperature", "1.5", "--seed", "7", "--max-new-tokens", "30", "--json")
    texts = [
        json.loads(run(capsys, "generate", PROMPT, "--mode", mode, *options)[1])["tokens"]
        for mode in ("ar", "ar", "linear-spec")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_compare(capsys: Any) -> None:
    code, out, _ = run(capsys, "compare", PROMPT, "--max-new-tokens", "48", "--json")
    (record,) = json.loads(out)
    modes = {row["mode"]: row for row in record["modes"]}
    assert code == 0
    assert list(modes) == list(cli.MODES)
    assert modes["linear-spec"]["tokens"] == modes["ar"]["tokens"]
    assert modes["quadratic-spec"]["tokens"] == modes["ar"]["tokens"]
    code, out, _ = run(capsys, "compare", PROMPT, "--max-new-tokens", "48")
    assert code == 0
    assert "tokens/forward" in out and "equal to ar" in out


def test_compare_of_a_model_without_a_mask_token(tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(ASSETS / "nld-tiny", tmp_path / "causal")
    fields = json.loads((folder / "config.json").read_text()) | {"model_type": "ministral3"}
    del fields["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(fields))
    code, out, _ = run(capsys, "compare", PROMPT, "--model", str(folder), "--json")
    assert code == 0
    assert [row["mode"] for row in json.loads(out)[0]["modes"]] == ["ar"]


def test_every_decode_mode_has_a_name_here() -> None:
    assert {mode.replace("-", "_") for mode in cli.MODES} == set(MODES)


def test_info(capsys: Any) -> None:
    code, out, _ = run(capsys, "info", "--json")
    info = json.loads(out)
    assert code == 0
    assert info["nld_cuda"] == nld_cuda.__version__
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512")
    assert run(capsys, "info")[1].startswith(f"nld_cuda {nld_cuda.__version__}, torch ")


@pytest.mark.parametrize(
    "argv,message",
    [
        (["generate", "x", "--model", "no/such/folder"], "no/such/folder"),
        (["generate", "x", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["generate", "x", "--mode", "diffusion", "--block-length", "0"], "block_length"),
        (["generate", "x", "--mode", "diffusion", "--threshold", "-0.5"], "threshold"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--threads", "0"], "--threads"),
        (["generate", "x", "--mode", "ar", "--block-length", "8"], "block_length"),
        (["generate", "x", "--mode", "quadratic-spec", "--threshold", "0.5"], "threshold"),
        (["generate", "x", "--device", "cuda"], "cuda"),
        (["compare", "x", "--demo"], "--demo"),
    ],
)
def test_wrong_input_is_one_clear_line(argv: list[str], message: str, capsys: Any) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("nld: error: ") and err.count("\n") == 1
    assert message in err


def test_help_has_examples(capsys: Any) -> None:
    code, out, _ = run(capsys, "generate", "--help")
    assert code == 0
    assert "examples:" in out and "--block-length" in out
