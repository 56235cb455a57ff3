"""The `nld` command: generate text, compare the decode modes, show what was built."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

DEFAULT_THRESHOLD = 0.9
SMALL_MODEL = 20_000_000  # parameters; below, threads spend longer waiting than multiplying
CHAT_OPTIONS = ("system", "think", "max_thinking_tokens", "template")
MODES = ("ar", "diffusion", "linear-spec", "quadratic-spec")

GENERATE_EXAMPLES = """examples:
  nld generate "sum 17 25" --mode linear-spec
  echo "sum 17 25" | nld generate --mode diffusion --threshold 0.9 --show-denoising
  nld generate "sum 17 25" --model path/to/checkpoint --temperature 0.7 --seed 3 --json
  nld generate "Why is the sky blue?" --model path/to/instruct --chat --think
  nld generate "What is this?" --model path/to/vlm --image cat.jpg
"""
COMPARE_EXAMPLES = """examples:
  nld compare --demo                      problems the packaged model was not trained on
  nld compare "sum 17 25" --max-new-tokens 64
  nld compare --model path/to/checkpoint --json < prompt.txt
"""
CHAT_EXAMPLES = """examples:
  nld chat --model path/to/checkpoint
  nld chat --model path/to/checkpoint --system "Answer briefly." --think --max-thinking-tokens 500
  printf 'hello\\n/mode diffusion\\nagain\\n' | nld chat --model path/to/checkpoint

type /help for what can be changed during a conversation
"""
QUANTIZE_EXAMPLES = """examples:
  nld quantize path/to/checkpoint path/to/checkpoint-int4
  nld quantize path/to/checkpoint path/to/checkpoint-fp8 --format fp8
  nld generate "..." --model path/to/checkpoint-int4
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="nld",
        description="Run tri-mode language models: ar, block diffusion, self-speculation.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    generate = commands.add_parser(
        "generate", help="continue a prompt", epilog=GENERATE_EXAMPLES, formatter_class=raw
    )
    add_prompt_argument(generate)
    add_model_arguments(generate)
    add_decode_arguments(generate)
    add_json_argument(generate)
    add_mode_argument(generate)
    generate.add_argument(
        "--chat", action="store_true",
        help="answer the prompt as a user's turn, through the model's chat template",
    )  # fmt: skip
    add_chat_arguments(generate)
    generate.add_argument(
        "--no-stream", action="store_true", help="print the text when all of it is there"
    )
    generate.add_argument(
        "--show-denoising", action="store_true",
        help="show the block being denoised, and drafts being accepted or rejected",
    )  # fmt: skip
    generate.set_defaults(run=run_generate)

    compare = commands.add_parser(
        "compare",
        help="run every mode on one prompt, side by side",
        epilog=COMPARE_EXAMPLES,
        formatter_class=raw,
    )
    add_prompt_argument(compare)
    add_model_arguments(compare)
    add_decode_arguments(compare)
    add_json_argument(compare)
    compare.add_argument(
        "--demo", action="store_true",
        help="use held-out problems that come with the packaged model, and check the answers",
    )  # fmt: skip
    compare.set_defaults(run=run_compare)

    chat = commands.add_parser(
        "chat", help="talk with a model", epilog=CHAT_EXAMPLES, formatter_class=raw
    )
    add_model_arguments(chat)
    add_decode_arguments(chat)
    add_mode_argument(chat)
    add_chat_arguments(chat)
    chat.set_defaults(run=run_chat)

    add_bench_command(commands)

    quantize = commands.add_parser(
        "quantize", help="write a checkpoint with 4-bit or fp8 weights", epilog=QUANTIZE_EXAMPLES,
        formatter_class=raw,
    )  # fmt: skip
    quantize.add_argument("source", metavar="IN", help="checkpoint folder with dense weights")
    quantize.add_argument("target", metavar="OUT", help="folder to write; goes on where it stopped")
    quantize.add_argument(
        "--format", choices=("int4", "fp8"), default="int4", help="(default: %(default)s)"
    )
    quantize.add_argument(
        "--group-size", type=int, choices=(32, 64, 128, 256),
        help="inputs that share a scale, int4 only (default: 128)",
    )  # fmt: skip
    quantize.add_argument("--head", action="store_true", help="quantise the head as well")
    quantize.set_defaults(run=run_quantize)

    info = commands.add_parser(
        "info", help="show versions, instruction set, GPU architectures, devices"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run_info)
    return parser


def add_bench_command(commands: Any) -> None:
    """Add `bench kernels`, whose options live beside the suite (it imports torch)."""
    bench = commands.add_parser("bench", help="measure the ops against others and the hardware")
    what = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    kernels = what.add_parser("kernels", help="every op over a grid of shapes", add_help=False)
    kernels.set_defaults(run=run_bench_kernels)


def run_bench_kernels(args: argparse.Namespace) -> int:
    """Parse the suite's own options and run it."""
    from nld_cuda.bench import runner

    parser = argparse.ArgumentParser(
        prog=runner.PROGRAM,
        description=runner.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runner.add_arguments(parser)
    options = parser.parse_args(args.rest)
    return runner.run(options, runner.command_text(args.rest))


def add_prompt_argument(parser: argparse.ArgumentParser) -> None:
    """Add the prompt and its pictures."""
    parser.add_argument(
        "prompt", nargs="?", help="the prompt; read from standard input when absent"
    )
    parser.add_argument(
        "--image", metavar="FILE", action="append",
        help="a picture, for a model that sees; several: in the order of the prompt's placeholders "
        "([IMG], <|image_start|>), in front of a prompt without",
    )  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what chooses checkpoint and device."""
    parser.add_argument(
        "--model", default="nld-tiny", metavar="PATH",
        help="checkpoint folder, or the packaged model nld-tiny (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto is the checkpoint's own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-dtype", default="auto", choices=("auto", "fp8"),
        help="of the key/value cache: auto is the model's, fp8 halves it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--products", default="auto", choices=("auto", "dense", "fp8"),
        help="with quantised weights: auto keeps them as stored, dense expands them (more memory, "
        "faster on a CPU), fp8 rounds activations too (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--lora", default="auto", metavar="PATH",
        help="drafting adapter: auto (linear_spec_lora beside the weights), none, or a folder",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, metavar="N",
        help="CPU threads (default: torch's own; 1 for models too small to share work)",
    )  # fmt: skip


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the decode parameters that all modes share."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--block-length",
        type=int,
        metavar="N",
        help="tokens per diffusion block (default: the model's own)",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="P",
        help="diffusion: commit tokens of at least this confidence (default: "
        f"{DEFAULT_THRESHOLD}); linear-spec: drafts below it wait for another pass (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random draws (default: %(default)s)"
    )


def add_mode_argument(parser: argparse.ArgumentParser) -> None:
    """Add the decode mode."""
    parser.add_argument(
        "--mode", choices=MODES,
        help="decode mode (default: linear-spec; ar for models that know no mask token)",
    )  # fmt: skip


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a chat template is told."""
    parser.add_argument("--system", metavar="TEXT", help="the system turn")
    parser.add_argument(
        "--think", action=argparse.BooleanOptionalAction, default=None,
        help="whether to ask the model to think first (default: no)",
    )  # fmt: skip
    parser.add_argument(
        "--max-thinking-tokens", type=int, metavar="N", help="think, for at most N tokens"
    )
    parser.add_argument(
        "--template", metavar="FILE", help="chat template (Jinja) instead of the checkpoint's"
    )


def default_mode(args: argparse.Namespace, model: Any) -> str:
    """The mode asked for, or the one this model is made for."""
    if args.mode is not None:
        return str(args.mode)
    return "ar" if model.config.mask_token_id is None else "linear-spec"


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add the switch for programs that read the output."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: text, tokens and statistics"
    )


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt of the command line, or all of standard input without its last newline."""
    if args.prompt is not None:
        return str(args.prompt)
    if sys.stdin.isatty():
        raise ValueError("prompt must be given as an argument or on standard input, got none")
    return sys.stdin.read().removesuffix("\n")


def with_images(model: Any, args: argparse.Namespace, prompt: str) -> tuple[str, Any]:
    """Return the prompt with a placeholder for every picture, and the pictures."""
    from nld_cuda.decode.images import with_placeholders

    if not args.image:
        return prompt, None
    return with_placeholders(model, prompt, len(args.image)), [args.image]


@contextmanager
def progress_line(label: str, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback of (bytes done, bytes in all) that keeps one line up to date, or None."""
    if not show:
        yield None
        return

    def progress(done: int, total: int) -> None:
        text = f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB, {100 * done // max(total, 1)} %"
        print(f"\r{label}: {text}", end="", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def load_model(args: argparse.Namespace) -> Any:
    """Load the checkpoint, with a progress line on a terminal; set the number of CPU threads."""
    import torch

    import nld_cuda

    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be >= 1, got {args.threads}")

    show = sys.stderr.isatty() and not getattr(args, "json", False)
    with progress_line(f"loading {args.model}", show) as progress:
        model = nld_cuda.load(
            args.model,
            device=args.device,
            dtype=args.dtype,
            kv_dtype=args.kv_dtype,
            products=args.products,
            lora=args.lora,
            progress=progress,
            process_group=args.process_group,
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    elif model.num_parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    return model


def decode_options(args: argparse.Namespace, mode: str, *, all_modes: bool) -> dict[str, Any]:
    """Translate command-line names into those of `nld_cuda.generate`.

    With all_modes, options this mode has no use for are left out; else the library refuses.
    """
    options: dict[str, Any] = {
        "mode": mode.replace("-", "_"),
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    if args.block_length is not None and not (all_modes and mode == "ar"):
        options["block_length"] = args.block_length
    if mode == "diffusion":
        options["threshold"] = DEFAULT_THRESHOLD if args.threshold is None else args.threshold
    elif args.threshold is not None and not all_modes:
        options["threshold"] = args.threshold
    return options


def run_generate(args: argparse.Namespace) -> int:
    """Continue one prompt; stream it unless JSON or the whole text is asked for."""
    import nld_cuda
    from nld_cuda import cli_chat, cli_view

    needs_chat = [name for name in CHAT_OPTIONS if getattr(args, name) is not None]
    if needs_chat and not args.chat:
        option = needs_chat[0].replace("_", "-")
        raise ValueError(f"--{option} must come with --chat, which renders a conversation")
    prompt: Any = read_prompt(args)
    model = load_model(args)
    prompt, images = with_images(model, args, prompt)
    mode = default_mode(args, model)
    options = {**decode_options(args, mode, all_modes=False), "images": images}
    chat = cli_chat.make_chat(model, args) if args.chat else None
    if chat is not None:
        chat.messages.append({"role": "user", "content": prompt})
        prompt, options = chat.prompt(), {**chat.decode_options(), **options}
    if args.json or args.no_stream:
        result = nld_cuda.generate(model, [prompt], **options)
        if args.json:
            print(json.dumps(result_record(result, mode)))
        elif chat is not None:
            cli_chat.show_answer(chat, result.tokens[0])
        else:
            print(text_of(result))
        return 0
    events = nld_cuda.stream(model, prompt, **options)
    if args.show_denoising:
        stats = cli_view.show_denoising(events)
    elif chat is not None:
        stats = cli_chat.show_events(chat, events).stats
    else:
        stats = cli_view.show_text(events)
    if stats is not None:
        print(cli_view.stats_line(mode, stats), file=sys.stderr)
    return 0


def text_of(result: Any) -> str:
    """Return the text of a single result; a checkpoint without tokenizer has none."""
    if result.text is None:
        raise ValueError("model must have a tokenizer to print text, got none: use --json")
    return str(result.text[0])


def result_record(result: Any, mode: str) -> dict[str, Any]:
    """Return the JSON object of one result."""
    return {
        "mode": mode,
        "text": result.text[0] if result.text is not None else None,
        "tokens": result.tokens[0],
        "finish_reason": result.finish_reason[0],
        "stats": result.stats.to_dict(),
    }


def run_compare(args: argparse.Namespace) -> int:
    """Run every mode on the same prompt and print the results side by side."""
    import nld_cuda
    from nld_cuda import cli_view

    if args.demo:
        if args.prompt is not None or args.image or args.model != "nld-tiny":
            raise ValueError("--demo must stand alone: it brings its own prompts and model")
        problems = demo_problems()
    else:
        problems = [{"prompt": read_prompt(args), "answer": None, "kind": None}]
    model = load_model(args)
    images = None
    for problem in problems:
        problem["prompt"], images = with_images(model, args, problem["prompt"])
    modes = MODES if model.config.mask_token_id is not None else MODES[:1]
    runs = [(mode, decode_options(args, mode, all_modes=True)) for mode in modes]
    # A short first round is not counted: it pays for page faults and torch's own set-up.
    for mode_options in (options for _, options in runs):
        warm_up = {**mode_options, "max_new_tokens": 16, "images": images}
        nld_cuda.generate(model, [problems[0]["prompt"]], **warm_up)
    records = []
    for problem in problems:
        rows = []
        for mode, options in runs:
            start = time.perf_counter()
            result = nld_cuda.generate(model, [problem["prompt"]], images=images, **options)
            record = result_record(result, mode)
            record["seconds"] = time.perf_counter() - start
            if problem["answer"] is not None:
                record["correct"] = record["text"].strip() == problem["answer"].strip()
            rows.append(record)
        records.append({"prompt": problem["prompt"], "kind": problem["kind"], "modes": rows})
        if not args.json:
            cli_view.print_comparison(records[-1])
    if args.json:
        print(json.dumps(records))
    return 0


def demo_problems() -> list[dict[str, Any]]:
    """Return one held-out problem of each kind that the packaged model knows."""
    from pathlib import Path

    path = Path(__file__).parent / "assets" / "nld-tiny" / "heldout.jsonl"
    first: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        problem = json.loads(line)
        first.setdefault(problem["kind"], problem)
    return list(first.values())


def run_chat(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from nld_cuda.cli_chat import Console

    return Console(load_model(args), args).run()


def run_quantize(args: argparse.Namespace) -> int:
    """Write a quantised copy of a checkpoint."""
    from nld_cuda.quantize import quantize

    with progress_line(f"quantising {args.source}", sys.stderr.isatty()) as progress:
        summary = quantize(
            args.source, args.target, format=args.format, group_size=args.group_size,
            head=args.head, progress=progress,
        )  # fmt: skip
    print(
        f"{args.target}: {summary.num_quantized} matrices in "
        f"{'4 bits' if args.format == 'int4' else 'fp8'}, "
        f"{summary.source_bytes / 2**20:.0f} -> {summary.target_bytes / 2**20:.0f} MiB"
    )
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Print what was built and what this machine offers."""
    from nld_cuda.info import build_info

    info = build_info()
    if args.json:
        print(json.dumps(info))
        return 0
    archs = info["cuda_archs"] or "none: this build has the CPU kernels only"
    print(f"nld_cuda {info['nld_cuda']}, torch {info['torch']}, Python {info['python']}")
    print(
        f"CPU kernels: {info['cpu_isa']} (this machine can run {info['best_cpu_isa']}), "
        f"{info['cpu_threads']} threads"
    )
    print(f"GPU architectures: {archs}")
    print(f"devices: {', '.join(info['devices'])}")
    print(f"library: {info['library']}")
    return 0


def fail(message: str, code: int, team: Any = None) -> NoReturn:
    """Print one line and leave."""
    line = f"nld: error: {' '.join(message.split())}"
    if team is None:
        print(line, file=sys.stderr)
    else:
        team.report(line)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    from nld_cuda.parallel.group import was_launched

    if not was_launched():
        run_command(argv)
    from nld_cuda.parallel.command import Team

    team = Team()
    try:
        run_command(argv, team)
    except SystemExit as stop:
        if not stop.code:
            raise
        team.leave(int(stop.code))


def run_command(argv: Sequence[str] | None, team: Any = None) -> NoReturn:
    """Run the command and exit; `team`: the processes that torchrun started, this one among them.

    Each of them parses the same arguments and does the same.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    args.process_group = None if team is None else team.group
    try:
        if team is not None:
            team.check(args.command)
        sys.exit(args.run(args))
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone; there is nobody left to tell.
            sys.stderr.close()
            sys.exit(0)
        fail(str(error), 2, team)
    except RuntimeError as error:
        fail(str(error), 1, team)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
