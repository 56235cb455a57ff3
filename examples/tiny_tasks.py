"""Make and check the problems that nld-tiny is trained on.

Four kinds of text whose answers a program can check, from predictable to hard to guess ahead:

* ``json``:  records -> JSON sorted by age, with a running sum and a total;
* ``trace``: a small program -> its execution trace, every value shown, and its output;
* ``add``:   column addition, one digit at a time, the carry written out;
* ``path``:  shuffled edges -> the path from one node to another (each hop needs the one before).

A problem is held out if a hash of its prompt says so, so that training can never have seen it.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

NAMES_TEXT = (
    "ada amy ben bob cal dan eli eva fay gil gus hal ida ivy jan joe ken kim leo liz max meg ned "
    "nia pam ray rex sal tim uma vic zoe"
)
NAMES = NAMES_TEXT.split()
WORDS = ["json", "trace", "add", "path", "print", "name", "age", "items", "sum", "rows", "total"]
SPECIAL_TOKENS = [
    "<pad>", "<bos>", "<eos>", "<mask>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
]  # fmt: skip
PAD, BOS, EOS, MASK = range(4)
KINDS = ("json", "trace", "add", "path")
HELDOUT_ONE_IN = 16


@dataclass(frozen=True)
class Problem:
    """One prompt with its only right answer (without the end token)."""

    kind: str
    prompt: str
    answer: str


def is_heldout(prompt: str) -> bool:
    """Tell whether a prompt belongs to the held-out part: one in 16, by hash."""
    return zlib.crc32(prompt.encode()) % HELDOUT_ONE_IN == 0


def check(problem: Problem, completion: str) -> bool:
    """Tell whether a completion (text up to the end token) is exactly right.

    The answer is worked out again from the prompt, so a wrong ``problem.answer`` is found too.
    """
    return completion == problem.answer == SOLVERS[problem.kind](problem.prompt)


# --- json: records sorted by age, with a running sum ------------------------------------------


def make_json(rng: random.Random, size: int) -> str:
    """Write ``size`` records ``age name items``; the ages are one from each decade, from 10 on."""
    names = rng.sample(NAMES, size)
    order = rng.sample(range(1, 10), size)
    decades = [sorted(order).index(x) + 1 for x in order]
    rows = [
        f"{10 * d + rng.randrange(10)} {n} {rng.randint(1, 9)}"
        for n, d in zip(names, decades, strict=True)
    ]
    return "json\n" + "\n".join(rows) + "\n=>\n"


def solve_json(prompt: str) -> str:
    """Sort the records by age and sum their items as they come."""
    rows = [line.split() for line in prompt.split("\n")[1:-2]]
    out, total = [], 0
    for age, name, items in sorted(rows, key=lambda row: int(row[0])):
        total += int(items)
        out.append({"age": int(age), "name": name, "items": int(items), "sum": total})
    return json.dumps({"rows": out, "total": total}, separators=(",", ":"))


# --- trace: a small program, executed line by line --------------------------------------------


def make_trace(rng: random.Random, size: int) -> str:
    """Write a program of ``size`` assignments over three variables, all values in 0..9."""
    state = {v: rng.randint(0, 9) for v in "abc"}
    lines = ["trace " + ",".join(str(x) for x in state.values())]
    while len(lines) <= size:
        target, left = rng.choice("abc"), rng.choice("abc")
        right = rng.choice(["a", "b", "c", str(rng.randint(1, 9))])
        sign = rng.choice("+-")
        value = state.get(right, int(right) if right.isdigit() else 0)
        value = state[left] + (value if sign == "+" else -value)
        if 0 <= value <= 9:
            state[target] = value
            lines.append(f"{len(lines)} {target}={left}{sign}{right}")
    lines.append(f"print {rng.choice('abc')}")
    return "\n".join(lines) + "\n=>\n"


def solve_trace(prompt: str) -> str:
    """Execute the program; after each line write the operands, the result and the state."""
    lines = prompt.split("\n")[:-2]
    state = dict(zip("abc", map(int, lines[0].split()[1].split(",")), strict=True))
    out = []
    for line in lines[1:-1]:
        target, _, left, sign, right = line.split()[1]
        x, y = state[left], state[right] if right in state else int(right)
        state[target] = x + y if sign == "+" else x - y
        values = ",".join(str(v) for v in state.values())
        out.append(f"{line}={x}{sign}{y}={state[target]}({values})")
    return "\n".join([*out, f"print {state[lines[-1].split()[1]]}"])


# --- add: column addition ---------------------------------------------------------------------


def make_add(rng: random.Random, size: int) -> str:
    """Write a sum of two numbers of ``size`` digits each."""
    x, y = (rng.randrange(10 ** (size - 1), 10**size) for _ in range(2))
    return f"add {x}+{y}\n=>\n"


def solve_add(prompt: str) -> str:
    """Add column by column from the right: digit + digit + carry = two digits."""
    x, y = prompt.split("\n")[0].split()[1].split("+")
    out, carry, digits = [], 0, ""
    for a, b in zip(reversed(x), reversed(y), strict=True):
        column = int(a) + int(b) + carry
        out.append(f"{a}+{b}+{carry}={column:02d}")
        carry, digits = column // 10, str(column % 10) + digits
    return "\n".join([*out, f"={carry}{digits}"])


# --- path: follow shuffled edges --------------------------------------------------------------


def make_path(rng: random.Random, size: int) -> str:
    """Write ``size`` shuffled edges that form one chain."""
    nodes = rng.sample(NAMES, size + 1)
    edges = [f"{a}>{b}" for a, b in pairwise(nodes)]
    rng.shuffle(edges)
    return "\n".join([f"path {nodes[0]} {nodes[-1]}", *edges]) + "\n=>\n"


def solve_path(prompt: str) -> str:
    """Follow the edges from the first to the last node asked for."""
    ends, *edges = prompt.split("\n")[:-2]
    follow = dict(edge.split(">") for edge in edges)
    _, node, last = ends.split()
    nodes = [node]
    while node != last:
        nodes.append(node := follow[node])
    return ">".join(nodes)


MAKERS: dict[str, Callable[[random.Random, int], str]] = {
    "json": make_json,
    "trace": make_trace,
    "add": make_add,
    "path": make_path,
}
SOLVERS: dict[str, Callable[[str], str]] = {
    "json": solve_json,
    "trace": solve_trace,
    "add": solve_add,
    "path": solve_path,
}
SIZES = {"json": (3, 4, 5), "trace": (3, 4, 5), "add": (4, 5), "path": (6, 7, 8)}
EASY_SIZES = {"json": (1, 2, 3), "trace": (1, 2, 3), "add": (2, 3, 4), "path": (2, 3, 4, 5)}


def make(kind: str, rng: random.Random, size: int, heldout: bool = False) -> Problem:
    """Make one problem of a kind and size from the training or the held-out part."""
    while True:
        prompt = MAKERS[kind](rng, size)
        if is_heldout(prompt) == heldout:
            return Problem(kind, prompt, SOLVERS[kind](prompt))


def make_heldout(per_kind: int, seed: int = 1) -> list[Problem]:
    """Make the fixed held-out set: the sizes of each kind take turns."""
    problems = []
    for kind in KINDS:
        rng = random.Random(f"heldout {seed} {kind}")
        sizes = SIZES[kind]
        problems += [make(kind, rng, sizes[i % len(sizes)], True) for i in range(per_kind)]
    return problems


def build_tokenizer() -> Tokenizer:
    """Build a byte-level BPE tokenizer: every name and keyword is one token, every digit is one.

    Any text can be encoded (the alphabet is the 256 bytes); ``<bos>`` is put first.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"[a-z]+|[0-9]|\n|[^a-z0-9\n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = NAMES + WORDS
    marks = ['{"', '":[{"', '":"', '","', '":', ',"', '},{"', '}],"', "=>"]
    corpus = [piece for piece in words + marks for _ in range(1000)]
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer
