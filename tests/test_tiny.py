"""nld-tiny: its problems, its files, and that an interrupted training goes on exactly."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

import tiny_tasks as tasks
import train_tiny

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "python" / "nld_cuda" / "assets" / "nld-tiny"


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_answers_are_right_and_wrong_ones_are_found(kind: str) -> None:
    rng = random.Random(7)
    for size in tasks.SIZES[kind]:
        problem = tasks.make(kind, rng, size)
        assert tasks.check(problem, problem.answer)
        digit = max(i for i, c in enumerate(problem.answer) if c.isalnum())
        wrong = problem.answer[:digit] + "#" + problem.answer[digit + 1 :]
        assert not tasks.check(problem, wrong)
        assert not tasks.check(problem, problem.answer + "\n")


def test_answers_by_hand() -> None:
    assert tasks.solve_add("add 19+93\n=>\n") == "9+3+0=12\n1+9+1=11\n=112"
    assert tasks.solve_path("path a c\nb>c\na>b\n=>\n") == "a>b>c"
    trace = "trace 1,2,3\n1 a=b+c\n2 c=a-1\nprint c\n=>\n"
    assert tasks.solve_trace(trace) == "1 a=b+c=2+3=5(5,2,3)\n2 c=a-1=5-1=4(5,2,4)\nprint 4"
    assert json.loads(tasks.solve_json("json\n42 zoe 5\n13 ada 2\n=>\n")) == {
        "rows": [
            {"age": 13, "name": "ada", "items": 2, "sum": 2},
            {"age": 42, "name": "zoe", "items": 5, "sum": 7},
        ],
        "total": 7,
    }


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_training_never_sees_a_held_out_prompt(kind: str) -> None:
    rng = random.Random(3)
    size = tasks.SIZES[kind][0]
    assert not any(tasks.is_heldout(tasks.make(kind, rng, size).prompt) for _ in range(200))
    assert tasks.is_heldout(tasks.make(kind, rng, size, heldout=True).prompt)


def test_files_of_the_package() -> None:
    sizes = [path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 12 * 2**20
    config = json.loads((ASSETS / "config.json").read_text())
    assert config["model_type"] == "nemotron_labs_diffusion"
    assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<mask>") == config["mask_token_id"]
    with safe_open(ASSETS / "model.safetensors", "pt") as weights:
        shape = weights.get_slice("diffusion_head.weight").get_shape()
        assert len(weights.keys()) == 9 * config["num_hidden_layers"] + 3
    assert shape == [config["vocab_size"], config["hidden_size"]]


def test_held_out_file_is_what_the_code_makes() -> None:
    lines = (ASSETS / "heldout.jsonl").read_text().splitlines()
    problems = [tasks.Problem(**json.loads(line)) for line in lines]
    assert problems == tasks.make_heldout(len(problems) // len(tasks.KINDS))
    assert all(tasks.is_heldout(p.prompt) and tasks.check(p, p.answer) for p in problems)
    assert len({p.prompt for p in problems}) == len(problems)


def test_tokenizer_round_trip_and_digits() -> None:
    tokenizer = tasks.build_tokenizer()
    for kind in tasks.KINDS:
        problem = tasks.make(kind, random.Random(1), tasks.SIZES[kind][-1])
        prompt = tokenizer.encode(problem.prompt).ids
        whole = tokenizer.encode(problem.prompt + problem.answer).ids
        assert prompt[0] == tasks.BOS and whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole) == problem.prompt + problem.answer
    assert len(tokenizer.encode("2718", add_special_tokens=False).ids) == 4
    text = "Any text: \u00e9\u4e2d\U0001f600\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_interrupted_training_goes_on_exactly(tmp_path: Path) -> None:
    recipe = replace(train_tiny.QUICK, ar_steps=2, joint_steps=2, lora_steps=2)
    options = {"save_every_s": math.inf, "log_every": 1, "quiet": True}
    whole = train_tiny.Run(recipe, tmp_path / "whole")
    assert whole.train(math.inf, **options)
    steps = 0
    while True:
        part = train_tiny.Run(recipe, tmp_path / "part")
        if steps:
            part.resume()
        if part.train(0, **options):  # no minutes: stops after one step
            break
        steps += 1
    assert steps == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, part.model.state_dict()[name]), name
    for name, tensor in whole.lora.peft_state().items():
        assert torch.equal(tensor, part.lora.peft_state()[name]), name


def test_resume_refuses_another_recipe(tmp_path: Path) -> None:
    run = train_tiny.Run(train_tiny.QUICK, tmp_path)
    run.save()
    other = train_tiny.Run(replace(train_tiny.QUICK, lr=1.0), tmp_path)
    with pytest.raises(ValueError, match="--resume: recipe must be"):
        other.resume()
