"""Train nld-tiny: a small tri-mode language model in the layout of the published checkpoints.

    python examples/train_tiny.py --out build/nld-tiny            # the full recipe, resumable
    python examples/train_tiny.py --out build/nld-tiny --resume   # go on after an interruption
    python examples/train_tiny.py --out build/quick --quick      # seconds: does it run at all?

Three stages: (1) autoregressive only; (2) joint, L_AR + 0.3 L_diff on a noisy and a clean stream in
one forward; (3) a LoRA on o_proj for drafting, everything else frozen. Batches depend only on
(seed, stage, step), so an interrupted run goes on exactly where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file

import tiny_tasks as tasks
from tiny_decode import THRESHOLDS, evaluate
from tiny_losses import ar_loss, draft_loss, joint_loss, make_batch
from tiny_net import CONFIG, LORA_ALPHA, LORA_RANK, Lora, TinyModel, look_back

MORE = {"json": 2, "trace": 1, "add": 1, "path": 1}  # batches of a kind hold so many times more
STAGES = ("ar", "joint", "lora")

# --- training loop -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Say everything that decides the result besides the code."""

    seed: int = 0
    ar_steps: int = 700
    joint_steps: int = 2400
    lora_steps: int = 200
    easy_steps: int = 300  # of stage ar, with smaller problems
    batch: int = 8  # problems of each kind
    lr: float = 2e-3  # AdamW: embedding, head, norms
    matrix_lr: float = 6e-3  # Muon: all matrices of the layers
    lora_lr: float = 2e-3
    warmup: int = 100
    decay_from: float = 0.6  # share of ar + joint steps after which the rate falls to zero

    def steps(self, stage: str) -> int:
        return getattr(self, f"{stage}_steps")


def lr_scale(recipe: Recipe, stage: str, step: int) -> float:
    """Warm up, hold, decay linearly to 2 %; the LoRA stage only decays."""
    if stage == "lora":
        return max(1 - step / recipe.lora_steps, 0.02)
    total = recipe.ar_steps + recipe.joint_steps
    done = step + (recipe.ar_steps if stage == "joint" else 0)
    decay = (total - done) / (total * (1 - recipe.decay_from))
    return max(min(1.0, (done + 1) / recipe.warmup, decay), 0.02)


def make_optimizers(
    recipe: Recipe, model: TinyModel, lora: Lora, stage: str
) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the layers, AdamW for the rest; AdamW alone for the LoRA."""
    adam = {"betas": (0.9, 0.98), "weight_decay": 0.0}
    if stage == "lora":
        return [torch.optim.AdamW(lora.parameters(), lr=recipe.lora_lr, **adam)]
    layers = list(model.encoder.layers.parameters())
    matrices = [p for p in layers if p.dim() == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.1,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.lr, **adam),
    ]  # fmt: skip


class Run:
    """Own the state of a training run: it can be saved after any step and taken up again."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.tokenizer = tasks.build_tokenizer()
        torch.manual_seed(recipe.seed)
        self.config = {**CONFIG, "vocab_size": self.tokenizer.get_vocab_size()}
        self.model = TinyModel(self.config)
        look_back(self.model)
        self.lora = Lora(self.config)
        self.stage, self.step = STAGES[0], 0
        self.optimizers = make_optimizers(recipe, self.model, self.lora, self.stage)
        self.wall_s, self.cpu_s = 0.0, 0.0
        self.log: list[dict] = []

    @property
    def checkpoint(self) -> Path:
        return self.out / "training.pt"

    def save(self) -> None:
        """Write model, optimisers and step; the file is replaced in one move."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe), "stage": self.stage, "step": self.step,
            "model": self.model.state_dict(), "lora": self.lora.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "wall_s": self.wall_s, "cpu_s": self.cpu_s, "log": self.log,
        }  # fmt: skip
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def resume(self) -> None:
        """Take up the run saved in the output folder; its recipe must be the same."""
        state = torch.load(self.checkpoint)
        saved, stage, step = Recipe(**state["recipe"]), state["stage"], state["step"]
        steps = {f"{s}_steps": self.recipe.steps(s) for s in STAGES[STAGES.index(stage) :]}
        is_same_so_far = lr_scale(saved, stage, step) == lr_scale(self.recipe, stage, step)
        if replace(saved, **steps) != self.recipe or not is_same_so_far:
            raise ValueError(
                f"--resume: recipe must be {saved}, or differ in steps not begun and before the "
                f"learning rate falls, got {self.recipe}"
            )
        self.stage, self.step = state["stage"], state["step"]
        self.model.load_state_dict(state["model"])
        self.lora.load_state_dict(state["lora"])
        self.optimizers = make_optimizers(self.recipe, self.model, self.lora, self.stage)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.wall_s, self.cpu_s, self.log = state["wall_s"], state["cpu_s"], state["log"]

    def train_step(self) -> float:
        """Do one optimiser step; data and noise depend on (seed, stage, step) alone."""
        key = f"{self.recipe.seed} {self.stage} {self.step}"
        rng = random.Random(key)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        is_easy = self.stage == "ar" and self.step < self.recipe.easy_steps
        sizes = tasks.EASY_SIZES if is_easy else tasks.SIZES
        count = self.recipe.batch
        batches = [
            make_batch(self.tokenizer, kind, rng.choice(sizes[kind]), count * MORE[kind], rng)
            for kind in tasks.KINDS
        ]
        with torch.autocast("cpu", torch.bfloat16):
            if self.stage == "ar":
                loss = ar_loss(self.model, batches, generator)
            elif self.stage == "joint":
                loss = joint_loss(self.model, batches, generator)
            else:
                loss = draft_loss(self.model, self.lora, batches)
        loss.backward()
        scale = lr_scale(self.recipe, self.stage, self.step)
        params = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("base_lr", group["lr"])
                group["lr"] = group["base_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def train(self, minutes: float, save_every_s: float, log_every: int, quiet: bool) -> bool:
        """Train until done (True) or out of minutes (False); Ctrl-C saves first."""
        start = saved = clock = time.monotonic()
        cpu = time.process_time()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/"
                   "{task.total}  loss {task.fields[loss]:.3f}"), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        try:
            with Progress(*columns, disable=quiet, refresh_per_second=2) as progress:
                for stage in STAGES[STAGES.index(self.stage) :]:
                    if stage != self.stage:
                        self.stage, self.step = stage, 0
                        self.optimizers = self.next_optimizers(stage)
                    self.model.requires_grad_(stage != "lora")
                    total, mean = self.recipe.steps(stage), math.nan
                    bar = progress.add_task(stage, total=total, completed=self.step, loss=mean)
                    while self.step < total:
                        loss = self.train_step()
                        mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
                        progress.update(bar, completed=self.step, loss=mean)
                        now, now_cpu = time.monotonic(), time.process_time()
                        self.wall_s += now - clock
                        self.cpu_s += now_cpu - cpu
                        clock, cpu = now, now_cpu
                        if self.step % log_every == 0 or self.step == total:
                            row = {
                                "stage": stage,
                                "step": self.step,
                                "loss": round(mean, 5),
                                "wall_s": round(self.wall_s),
                                "cpu_s": round(self.cpu_s),
                            }
                            self.log.append(row)
                            if quiet:
                                print(json.dumps(row), flush=True)
                        if now - saved > save_every_s:
                            self.save()
                            saved = now
                        if now - start > minutes * 60:
                            return False
        finally:
            self.save()
        return True

    def next_optimizers(self, stage: str) -> list[torch.optim.Optimizer]:
        """Keep the optimisers from ar to joint (same parameters); make new ones for the LoRA."""
        if stage == "joint":
            return self.optimizers
        return make_optimizers(self.recipe, self.model, self.lora, stage)


# --- output ------------------------------------------------------------------------------------


def export(run: Run, out: Path) -> None:
    """Write the checkpoint in the published layout, the adapter, the tokenizer, the problems."""
    adapter = out / "linear_spec_lora"
    adapter.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().contiguous() for k, v in run.model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    save_file(run.lora.peft_state(), adapter / "adapter_model.safetensors", {"format": "pt"})
    run.tokenizer.save(str(out / "tokenizer.json"))
    names = {t.strip("<|>").replace("/", "end_"): t for t in tasks.SPECIAL_TOKENS}
    write_json(out / "config.json", run.config)
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": names[name] for name in ("bos", "eos", "pad", "mask")},
        "additional_special_tokens": tasks.SPECIAL_TOKENS[4:],
        "model_max_length": run.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    write_json(adapter / "adapter_config.json", {
        "peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0,
        "target_modules": ["o_proj"], "bias": "none", "inference_mode": True,
        "fan_in_fan_out": False, "modules_to_save": None, "task_type": None,
        "base_model_name_or_path": "nld-tiny",
    })  # fmt: skip
    lines = [json.dumps(asdict(p)) for p in tasks.make_heldout(64)]
    (out / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    write_json(out / "training_log.json", {
        "recipe": asdict(run.recipe), "wall_s": round(run.wall_s), "cpu_s": round(run.cpu_s),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "log": run.log,
    })  # fmt: skip


def write_json(path: Path, value: object) -> None:
    """Write a JSON file people can read."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def table(rows: list[dict]) -> str:
    """Format evaluation rows as a Markdown table, one line per mode."""
    kinds = ["all", *tasks.KINDS]
    out = ["| mode | measure | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        by_kind = {row["kind"]: row for row in rows if row["mode"] == mode}
        measures = ["exact", "same_as_ar", "tokens_per_forward"]
        measures += ["tokens_per_cycle"] * ("spec" in mode)
        for measure in measures:
            cells = " | ".join(str(by_kind[k][measure]) for k in kinds if k in by_kind)
            out.append(f"| {mode} | {measure} | {cells} |")
    return "\n".join(out)


QUICK = Recipe(ar_steps=3, joint_steps=3, lora_steps=2, batch=2)


def main() -> None:
    """Train, export, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, nargs=3, metavar=("AR", "JOINT", "LORA"), help="steps of each stage"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; "
                        "go on with --resume")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/training.pt")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--quiet", action="store_true", help="JSON lines instead of a bar")
    parser.add_argument("--eval-problems", type=int, default=64, help="held-out problems a kind")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = QUICK if args.quick else Recipe()
    if args.steps:
        keys = (f"{stage}_steps" for stage in STAGES)
        recipe = replace(recipe, **dict(zip(keys, args.steps, strict=True)))
    run = Run(replace(recipe, seed=args.seed), args.out)
    if args.resume:
        run.resume()
    elif run.checkpoint.exists():
        parser.error(f"--out: {run.checkpoint} exists; give --resume or another folder")
    if not run.train(args.minutes, save_every_s=60, log_every=50, quiet=args.quiet):
        print(f"stopped in stage {run.stage} at step {run.step}; go on with --resume")
        return
    export(run, args.out)
    modes = ("ar", "linear_spec", "linear_spec_lora", *(f"diffusion:{t}" for t in THRESHOLDS))
    problems = tasks.make_heldout(2 if args.quick else args.eval_problems)
    run.model.requires_grad_(False)
    rows = evaluate(run.model, run.lora, run.tokenizer, problems, modes, 32 if args.quick else 192)
    write_json(args.out / "training_eval.json", rows)
    print(table(rows))
    print(f"{run.wall_s / 60:.1f} minutes, {run.cpu_s / 60:.1f} CPU minutes -> {args.out}")


if __name__ == "__main__":
    main()
