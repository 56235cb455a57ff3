"""Train nld-tiny: a small tri-mode language model in the layout of the published checkpoints.

    python examples/train_tiny.py --out build/nld-tiny            # the full recipe, resumable
    python examples/train_tiny.py --out build/nld-tiny --resume   # go on after an interruption
    python examples/train_tiny.py --out /tmp/quick --quick        # seconds: does it run at all?

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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tiny_tasks as tasks
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

BLOCK = 16
DIFFUSION_WEIGHT = 0.3
NOISE_EPS = 1e-3
MORE = {"json": 2, "trace": 1, "add": 1, "path": 1}  # short problems: more of them
LORA_RANK, LORA_ALPHA = 32, 128
STAGES = ("ar", "joint", "lora")

CONFIG = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "vocab_size": 0,  # filled from the tokenizer
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.09,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": False,
    "rope_theta": 10000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "bos_token_id": tasks.BOS,
    "eos_token_id": tasks.EOS,
    "pad_token_id": tasks.PAD,
    "mask_token_id": tasks.MASK,
    "dlm_paradigm": "bidirectional",
    "block_size": BLOCK,
    "dlm_loss_weight": DIFFUSION_WEIGHT,
    "ar_loss_weight": 1.0,
    "dp_varying_mask_ratio": False,
    "attn_implementation": "sdpa",
    "torch_dtype": "float32",
}

# --- the model, with the published parameter names ---------------------------------------------

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> output


def rope_table(config: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cos, sin ``[max_positions, head_dim]`` (YaRN) and the llama-4 query scale."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    theta, factor = rope["rope_theta"], rope["factor"]
    original = rope["original_max_position_embeddings"]

    def corner(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(corner(rope["beta_fast"])), 0)
    high = min(math.ceil(corner(rope["beta_slow"])), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64)
    plain = theta ** (-2 * index / dim)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    inv_freq = plain / factor * ramp + plain * (1 - ramp)
    positions = torch.arange(config["max_position_embeddings"], dtype=torch.float64)
    angle = torch.outer(positions, inv_freq).repeat(1, 2)
    scale = 1 + rope["llama_4_scaling_beta"] * torch.log1p(torch.floor(positions / original))
    return angle.cos().float(), angle.sin().float(), scale.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotate-half RoPE to ``[batch, heads, rows, dim]``."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(nn.Module):
    """Project, rotate, attend by the given rule; the LoRA applies to the first ``lora_rows``."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.dim, hidden = config["head_dim"], config["hidden_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, heads * self.dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(heads * self.dim, hidden, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, ...], layer: int, attend: Attend, lora: Lora | None,
        lora_rows: int,
    ) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            proj(x).view(b, n, -1, self.dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin, scale = rope
        with torch.autocast("cpu", enabled=False):  # attention is faster in f32 than in bf16 here
            q, k, v = q.float(), k.float(), v.float()
            out = attend(layer, rotate(q, cos, sin) * scale, rotate(k, cos, sin), v)
        out = out.transpose(1, 2).reshape(b, n, -1)
        y = self.o_proj(out)
        if lora is None:
            return y
        delta = out[:, :lora_rows] @ lora.a[layer].T @ lora.b[layer].T * (LORA_ALPHA / LORA_RANK)
        return torch.cat((y[:, :lora_rows] + delta, y[:, lora_rows:]), 1)


class Mlp(nn.Module):
    """Compute down(silu(gate(x)) * up(x))."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Run one pre-norm transformer layer."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, *args: object) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *args)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyModel(nn.Module):
    """An NLD transformer whose attention rule is given per call."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Module()
        self.encoder.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.encoder.layers = nn.ModuleList(
            Layer(config) for _ in range(config["num_hidden_layers"])
        )
        self.encoder.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.diffusion_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = (2 * config["num_hidden_layers"]) ** 0.5 if deep else 1.0
                nn.init.normal_(p, std=config["initializer_range"] / depth)
        self.rope = rope_table(config)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, lora: Lora | None = None,
        lora_rows: int = 0,
    ) -> Tensor:
        """Return the normed hidden states of ``tokens`` at ``positions`` (1-d or per row)."""
        rope = tuple(t[positions].unsqueeze(-3) for t in self.rope[:2])
        rope += (self.rope[2][positions][..., None].unsqueeze(-3),)
        x = self.encoder.embed_tokens(tokens)
        for i, layer in enumerate(self.encoder.layers):
            x = layer(x, rope, i, attend, lora, lora_rows)
        return self.encoder.norm(x)


@torch.no_grad()
def look_back(model: TinyModel) -> None:
    """Start the heads of layer 0 as previous-token heads: head h looks h + 1 tokens back.

    All embeddings share a direction, which q and k read, so that scores depend on the distance
    alone. Looking things up is built on such heads; found by chance they cost most of the training.
    """
    config, layer = model.config, model.encoder.layers[0].self_attn
    hidden, dim = config["hidden_size"], config["head_dim"]
    shared = torch.ones(hidden)
    model.encoder.embed_tokens.weight.normal_().add_(shared)
    read = shared / shared.norm() ** 2 * 2**0.5  # of a normed embedding: 1
    amplitude = torch.zeros(dim // 2)
    amplitude[:4] = torch.tensor([8.0, 8.0, 4.0, 4.0]) * dim**0.5
    key = torch.cat((amplitude.sqrt(), torch.zeros(dim // 2)))
    layer.k_proj.weight.copy_(torch.outer(key.repeat(config["num_key_value_heads"]), read))
    cos, sin = model.rope[0], model.rope[1]
    for head in range(config["num_attention_heads"]):
        back = head + 1
        query = rotate(key[None], cos[back], -sin[back])[0]
        layer.q_proj.weight[head * dim : (head + 1) * dim] = torch.outer(query, read)


class Lora(nn.Module):
    """Hold the drafting adapter: a low-rank change of every o_proj."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        inner = config["num_attention_heads"] * config["head_dim"]
        self.a = nn.ParameterList(
            nn.Parameter(torch.randn(LORA_RANK, inner) * inner**-0.5) for _ in range(layers)
        )
        self.b = nn.ParameterList(
            nn.Parameter(torch.zeros(hidden, LORA_RANK)) for _ in range(layers)
        )

    def peft_state(self) -> dict[str, Tensor]:
        """Return the tensors under PEFT's names."""
        prefix = "base_model.model.encoder.layers.{}.self_attn.o_proj.lora_{}.weight"
        return {
            prefix.format(i, name): w.detach().clone()
            for name, ws in (("A", self.a), ("B", self.b)) for i, w in enumerate(ws)
        }  # fmt: skip


# --- data --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Hold problems of one kind and size: equal prompt length, answers padded with end tokens."""

    tokens: Tensor  # [batch, rows], prompt + answer + <eos>...
    prompt_len: int
    is_answer: Tensor  # [batch, rows]: the answer and its first <eos>
    first_block_len: int  # answer tokens before the first whole block


def make_batch(
    tokenizer: tasks.Tokenizer, kind: str, size: int, count: int, rng: random.Random
) -> Batch:
    """Make a batch; the phase of the blocks is drawn, since a draft may start anywhere."""
    problems = [tasks.make(kind, rng, size) for _ in range(count)]
    prompts = [e.ids for e in tokenizer.encode_batch([p.prompt for p in problems])]
    answers = [
        e.ids for e in tokenizer.encode_batch([p.answer for p in problems], add_special_tokens=False)
    ]
    (prompt_len,) = {len(p) for p in prompts}
    first = rng.randint(1, BLOCK)
    longest = max(map(len, answers)) + 1
    answer_len = first + math.ceil((longest - first) / BLOCK) * BLOCK
    rows = [p + a + [tasks.EOS] * (answer_len - len(a)) for p, a in zip(prompts, answers, strict=True)]
    lens = torch.tensor([prompt_len + len(a) + 1 for a in answers])
    index = torch.arange(prompt_len + answer_len)
    is_answer = (index >= prompt_len) & (index < lens[:, None])
    return Batch(torch.tensor(rows), prompt_len, is_answer, first)


# --- the two training objectives ---------------------------------------------------------------


def causal_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend token-causally."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dual_attend(num_noisy: int, is_visible: Tensor) -> Attend:
    """Attend with rows [noisy | clean]: clean is causal, noisy sees what ``is_visible`` says."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        noisy = F.scaled_dot_product_attention(
            q[:, :, :num_noisy], k, v, attn_mask=is_visible, enable_gqa=True
        )
        q, k, v = (x[:, :, num_noisy:] for x in (q, k, v))
        return torch.cat((noisy, causal_attend(layer, q, k, v)), 2)

    return attend


def dual_forward(
    model: TinyModel, batch: Batch, noisy: Tensor, lora: Lora | None = None
) -> tuple[Tensor, Tensor]:
    """Run the noisy answer and the clean text in one forward; return both hidden states.

    This is the 2N-row forward without the noisy rows of the prompt: they are never masked, carry
    no loss and no other row sees them.
    """
    n, a, first = batch.tokens.shape[1], noisy.shape[1], batch.first_block_len
    answer = torch.arange(a)
    block = (answer - first).div(BLOCK, rounding_mode="floor") + 1
    clean_block = torch.cat((torch.full((batch.prompt_len,), -1), block))
    is_visible = torch.cat(
        (block[:, None] == block[None, :], block[:, None] > clean_block[None, :]), 1
    )
    positions = torch.cat((batch.prompt_len + answer, torch.arange(n)))
    tokens = torch.cat((noisy, batch.tokens), 1)
    hidden = model(tokens, positions, dual_attend(a, is_visible), lora, a)
    return hidden[:, :a], hidden[:, a:]


def is_block_start(batch: Batch, num_answer: int) -> Tensor:
    """Mark the first token of every block: decoding always knows it (the seed)."""
    index = torch.arange(num_answer)
    return (index == 0) | ((index - batch.first_block_len) % BLOCK == 0)


def ar_sum(model: TinyModel, batch: Batch, clean: Tensor) -> tuple[Tensor, int]:
    """Return the summed next-token loss on answers, and the number of tokens."""
    p = batch.prompt_len
    logits = model.diffusion_head(clean[:, p - 1 : -1]).float()
    is_answer = batch.is_answer[:, p:]
    return F.cross_entropy(logits[is_answer], batch.tokens[:, p:][is_answer], reduction="sum"), int(
        is_answer.sum()
    )


def joint_loss(model: TinyModel, batches: list[Batch], generator: torch.Generator) -> Tensor:
    """Return L_AR + 0.3 L_diff, each a sum over all batches divided once by its token count."""
    ar = diffusion = torch.zeros(())
    num_ar = num_noisy = 0
    for batch in batches:
        target = batch.tokens[:, batch.prompt_len :]
        t = torch.rand(target.shape[0], 1, generator=generator)
        p = (1 - NOISE_EPS) * t + NOISE_EPS
        is_masked = torch.rand(target.shape, generator=generator) < p
        is_masked &= ~is_block_start(batch, target.shape[1])
        noisy, clean = dual_forward(model, batch, target.masked_fill(is_masked, tasks.MASK))
        loss, count = ar_sum(model, batch, clean)
        ar, num_ar = ar + loss, num_ar + count
        logits = model.diffusion_head(noisy[is_masked]).float()
        losses = F.cross_entropy(logits, target[is_masked], reduction="none")
        diffusion = diffusion + (losses / p.expand_as(target)[is_masked]).sum()
        # 1/p makes every masked token stand for 1/p tokens: the count is that of all maskable ones.
        num_noisy += target.shape[0] * int((~is_block_start(batch, target.shape[1])).sum())
    return ar / num_ar + DIFFUSION_WEIGHT * diffusion / num_noisy


def ar_loss(model: TinyModel, batches: list[Batch], generator: torch.Generator) -> Tensor:
    """Return the next-token loss on answers."""
    total, num = torch.zeros(()), 0
    for batch in batches:
        clean = model(batch.tokens, torch.arange(batch.tokens.shape[1]), causal_attend)
        loss, count = ar_sum(model, batch, clean)
        total, num = total + loss, num + count
    return total / num


def draft_loss(model: TinyModel, lora: Lora, batches: list[Batch]) -> Tensor:
    """Return the drafting loss: against the verifier, up to the first rejection of each block.

    All tokens of a block but the first are masked, as in a draft; the clean rows (LoRA off) give
    the verifier's distribution. Per position: cross entropy to the verifier's choice, plus KL.
    """
    total, num = torch.zeros(()), 0
    for batch in batches:
        p, target = batch.prompt_len, batch.tokens[:, batch.prompt_len :]
        start = is_block_start(batch, target.shape[1]).expand_as(target)
        noisy, clean = dual_forward(model, batch, target.masked_fill(~start, tasks.MASK), lora)
        draft = model.diffusion_head(noisy).float()
        with torch.no_grad():
            verifier = model.diffusion_head(clean[:, p - 1 : -1]).float()
            choice = verifier.argmax(-1)
            wrong = ((draft.argmax(-1) != choice) & ~start).int()
            before = wrong.cumsum(1) - wrong  # wrong drafts so far, from the block's start on
            at_start = torch.where(start, before, 0).cummax(1).values
            keep = (before == at_start) & ~start & batch.is_answer[:, p:]
        draft, verifier, choice = draft[keep], verifier[keep], choice[keep]
        kl = F.kl_div(draft.log_softmax(-1), verifier.log_softmax(-1), log_target=True,
                      reduction="sum")  # fmt: skip
        total = total + kl + F.cross_entropy(draft, choice, reduction="sum")
        num += int(keep.sum())
    return total / num


# --- training loop -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Say everything that decides the result besides the code."""

    seed: int = 0
    ar_steps: int = 600
    joint_steps: int = 1100
    lora_steps: int = 120
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
                            row = {"stage": stage, "step": self.step, "loss": round(mean, 5),
                                   "wall_s": round(self.wall_s), "cpu_s": round(self.cpu_s)}
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


# --- a small dense evaluator (eval_tiny.py uses the package's own decoder) ---------------------


class Decoder:
    """Decode a batch of equally long prompts greedily; each row has its own cache length."""

    def __init__(self, model: TinyModel, lora: Lora | None, prompts: Tensor, room: int) -> None:
        config = model.config
        self.model, self.lora, (batch, self.prompt_len) = model, lora, prompts.shape
        shape = (batch, config["num_key_value_heads"], self.prompt_len + room, config["head_dim"])
        self.cache = [
            (torch.zeros(shape), torch.zeros(shape)) for _ in range(config["num_hidden_layers"])
        ]
        self.seq_lens = torch.zeros(batch, dtype=torch.long)
        self.num_forwards = 0
        self.seed = self.forward(prompts, True)[:, -1].argmax(-1)
        self.seq_lens += self.prompt_len

    def forward(self, tokens: Tensor, is_causal: bool, with_lora: bool = False) -> Tensor:
        """Return logits of ``tokens`` placed at each row's cache length; the length stays."""
        positions = self.seq_lens[:, None] + torch.arange(tokens.shape[1])
        index = torch.arange(self.cache[0][0].shape[2])
        last = positions if is_causal else positions[:, -1:].expand_as(positions)
        is_visible = (index <= last[..., None])[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cached, new in zip(self.cache[layer], (k, v), strict=True):
                cached.scatter_(2, positions[:, None, :, None].expand_as(new), new)
            return F.scaled_dot_product_attention(
                q, *self.cache[layer], attn_mask=is_visible, enable_gqa=True
            )

        lora = self.lora if with_lora else None
        hidden = self.model(tokens, positions, attend, lora, tokens.shape[1])
        return self.model.diffusion_head(hidden)


@dataclass
class Decoded:
    """Hold what one row gave: its tokens up to and with the end token, and what they cost."""

    tokens: list[int]
    num_forwards: int = 0
    num_cycles: int = 0


def decode_ar(decoder: Decoder, max_new: int) -> list[Decoded]:
    """Decode one token a forward."""
    out = [Decoded([int(t)], 1) for t in decoder.seed]
    seed = decoder.seed
    while any(r.tokens[-1] != tasks.EOS for r in out) and len(out[0].tokens) < max_new:
        seed = decoder.forward(seed[:, None], True)[:, 0].argmax(-1)
        decoder.seq_lens += 1
        for r, t in zip(out, seed.tolist(), strict=True):
            r.tokens.append(t)
    return [cut(r, forwards=None) for r in out]


def cut(row: Decoded, forwards: int | None) -> Decoded:
    """Cut after the first end token; in ar a forward is a token."""
    if tasks.EOS in row.tokens:
        row.tokens = row.tokens[: row.tokens.index(tasks.EOS) + 1]
    row.num_forwards = len(row.tokens) if forwards is None else forwards
    return row


def decode_linear_spec(decoder: Decoder, max_new: int, with_lora: bool) -> list[Decoded]:
    """Draft a whole block in one bidirectional forward, verify it in one causal forward."""
    out = [Decoded([int(t)], 1) for t in decoder.seed]
    seed = decoder.seed.clone()
    live = [r.tokens[-1] != tasks.EOS for r in out]
    while any(live):
        block = torch.full((len(out), BLOCK), tasks.MASK)
        block[:, 0] = seed
        draft = decoder.forward(block, False, with_lora).argmax(-1)
        block[:, 1:] = draft[:, 1:]
        choice = decoder.forward(block, True).argmax(-1)
        is_same = (choice[:, :-1] == block[:, 1:]).long()
        accepted = is_same.cumprod(1).sum(1) + 1
        for i, r in enumerate(out):
            if not live[i]:
                continue
            n = int(accepted[i])
            new = choice[i, :n].tolist()
            r.num_forwards, r.num_cycles = r.num_forwards + 2, r.num_cycles + 1
            r.tokens = (r.tokens + new)[:max_new]
            seed[i], decoder.seq_lens[i] = new[-1], decoder.seq_lens[i] + n
            live[i] = tasks.EOS not in new and len(r.tokens) < max_new
            if not live[i]:
                cut(r, r.num_forwards)
    return out


def decode_diffusion(decoder: Decoder, max_new: int, threshold: float) -> list[Decoded]:
    """Denoise block after block: commit what is sure enough and always the surest one."""
    out = [Decoded([]) for _ in decoder.seed]
    seed = decoder.seed
    live = torch.ones(len(out), dtype=torch.bool)
    for _ in range(math.ceil(max_new / BLOCK)):
        block = torch.full((len(out), BLOCK), tasks.MASK)
        block[:, 0] = seed
        is_masked = block == tasks.MASK
        while True:
            is_eos = ((block == tasks.EOS) & ~is_masked).int()
            open_before = is_masked.cumsum(1) - is_masked.long()
            ended = (is_eos.bool() & (open_before == 0)).any(1)
            busy = live & is_masked.any(1) & ~ended
            if not busy.any():
                break
            probs = decoder.forward(block, False).softmax(-1)
            probs[..., tasks.MASK] = 0
            confidence, token = probs.max(-1)
            confidence = confidence.masked_fill(~is_masked, -1)
            commit = confidence >= threshold
            commit.scatter_(1, confidence.argmax(1, keepdim=True), True)
            commit &= is_masked & busy[:, None]
            block[commit] = token[commit]
            is_masked &= ~commit
            for i in busy.nonzero()[:, 0].tolist():
                out[i].num_forwards += 1
        seed = decoder.forward(block, True)[:, -1].argmax(-1)
        decoder.seq_lens += BLOCK
        for i in live.nonzero()[:, 0].tolist():
            out[i].num_forwards += 1
            out[i].num_cycles += 1
            out[i].tokens += block[i].tolist()
            if tasks.EOS in out[i].tokens:
                cut(out[i], out[i].num_forwards)
                live[i] = False
        if not live.any():
            break
    return out


THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@torch.no_grad()
def evaluate(
    model: TinyModel, lora: Lora, tokenizer: tasks.Tokenizer, problems: list[tasks.Problem],
    modes: tuple[str, ...], max_new: int = 192,
) -> list[dict]:
    """Measure every mode on the problems; return one row per mode and kind."""
    groups: dict[tuple[str, int], list[tuple[tasks.Problem, list[int]]]] = {}
    for problem in problems:
        ids = tokenizer.encode(problem.prompt).ids
        groups.setdefault((problem.kind, len(ids)), []).append((problem, ids))
    rows = []
    reference: dict[str, list[int]] = {}
    for mode in modes:
        name, _, value = mode.partition(":")
        sums: dict[str, list[float]] = {}
        for (kind, _), members in groups.items():
            decoder = Decoder(model, lora, torch.tensor([ids for _, ids in members]), max_new + 2 * BLOCK)
            if name == "ar":
                decoded = decode_ar(decoder, max_new)
            elif name == "diffusion":
                decoded = decode_diffusion(decoder, max_new, float(value))
            else:
                decoded = decode_linear_spec(decoder, max_new, name == "linear_spec_lora")
            for (problem, _), row in zip(members, decoded, strict=True):
                body = row.tokens[:-1] if row.tokens[-1] == tasks.EOS else row.tokens
                text = tokenizer.decode(body, skip_special_tokens=False)
                right = row.tokens[-1] == tasks.EOS and tasks.check(problem, text)
                same = row.tokens == reference.setdefault(problem.prompt, row.tokens)
                for key in (kind, "all"):
                    s = sums.setdefault(key, [0.0] * 6)
                    for i, x in enumerate(
                        (1, right, same, len(row.tokens), row.num_forwards, row.num_cycles)
                    ):
                        s[i] += x
        for key, (count, right, same, tokens, forwards, cycles) in sums.items():
            first = count if "spec" in name else 0  # the first token comes from the prefill
            rows.append({
                "mode": mode, "kind": key, "problems": int(count),
                "exact": round(right / count, 4), "same_as_ar": round(same / count, 4),
                "tokens_per_forward": round(tokens / forwards, 2),
                "tokens_per_cycle": round((tokens - first) / cycles, 2) if cycles else None,
            })  # fmt: skip
    return rows


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
