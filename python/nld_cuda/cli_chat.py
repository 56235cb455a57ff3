"""`nld chat`: reads turns, streams answers, changes settings between them; `generate --chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from nld_cuda.chat import THINK_END, Chat
from nld_cuda.cli import MODES, decode_options, default_mode
from nld_cuda.cli_view import stats_line
from nld_cuda.decode.generate import GenerateResult
from nld_cuda.decode.stream import StreamEvent
from nld_cuda.decode.text import IncrementalDecoder
from nld_cuda.model.json_files import read_text

HELP = """\
/mode NAME     ar, diffusion, linear-spec or quadratic-spec, from the next answer on
/think on|off  ask the model to think first, or not
/think N       think, for at most N tokens
/image FILE    show a picture with the next turn, in front of it or at its placeholder
/system TEXT   start over with another system turn
/reset         start over
/stats on|off  a line of figures after each answer
/help          this list
/quit          leave (so does the end of the input)
Ctrl-C stops an answer; what was said so far stays."""
DIM, PLAIN = "\033[2m", "\033[0m"


class Console:
    """One conversation on standard input and output; notes go to standard error."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        self._args, self._model = args, model
        self.chat = make_chat(model, args)
        self.mode = default_mode(args, model)
        self._pictures: list[str] = []  # for the next turn
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._show_stats = self._is_terminal

    def run(self) -> int:
        """Serve turns until the input ends."""
        if self._is_terminal:
            import readline  # noqa: F401  (line editing for input())

            self._note("type /help for commands, /quit to leave")
        while True:
            try:
                line = input("> " if self._is_terminal else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:  # perhaps meant for an answer that has just ended
                if not self._is_terminal:
                    raise
                self._note("\n/quit leaves")
                continue
            if line == "/quit":
                return 0
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            elif line:
                try:
                    self._answer(line)
                except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
                    if not self._is_terminal:
                        raise
                    self._note(str(error))  # the conversation is as before: go on

    def _answer(self, line: str) -> None:
        options = decode_options(self._args, self.mode, all_modes=True)
        pictures, self._pictures = self._pictures, []
        try:
            result = show_events(self.chat, self.chat.ask(line, images=pictures, **options))
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            self._note("stopped")
            return
        stats, places = result.stats, self._model.config.max_position_embeddings
        if self._show_stats:
            reused = f", {self.chat.session.num_reused} tokens of the prompt reused"
            self._note(stats_line(self.mode, stats) + reused)
        if stats.prompt_tokens + stats.new_tokens >= places:
            self._note(f"the model's {places} places are full: /reset starts over")

    def _command(self, name: str, value: str = "") -> None:
        chat = self.chat
        if name == "/mode" and value in MODES:
            self.mode = value
        elif name == "/think" and value in ("on", "off"):
            chat.thinking, chat.max_thinking_tokens = value == "on", None
        elif name == "/think" and value.isdecimal():
            if chat.end_think_token_id is None:
                self._note("/think N needs a tokenizer with </think>, this one has none")
                return
            chat.thinking, chat.max_thinking_tokens = True, int(value)
        elif name == "/image" and value:
            self._pictures.append(value)
        elif name == "/system":
            self._args.system = value or None
            chat.restart(self._args.system)
        elif name == "/reset" and not value:
            chat.reset()
        elif name == "/stats" and value in ("on", "off"):
            self._show_stats = value == "on"
        elif name == "/help":
            self._note(HELP)
        else:
            self._note(f"unknown command {name} {value}".rstrip() + "; /help lists them")

    def _note(self, text: str) -> None:
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)


def make_chat(model: Any, args: argparse.Namespace) -> Chat:
    """The conversation that the options of the command line describe."""
    budget = args.max_thinking_tokens
    if args.think is False and budget is not None:
        raise ValueError(f"--max-thinking-tokens must not come with --no-think, got {budget}")
    return Chat(
        model,
        system=args.system,
        thinking=args.think or budget is not None,
        max_thinking_tokens=budget,
        template=None if args.template is None else read_text(Path(args.template)),
    )


def show_events(chat: Chat, events: Generator[StreamEvent, None, GenerateResult]) -> GenerateResult:
    """Print an answer as it grows."""
    view = _View(chat)
    try:
        while True:
            view.show(next(events).final_tokens)
    except StopIteration as stop:
        result: GenerateResult = stop.value
        return result
    finally:
        events.close()
        view.finish()


def show_answer(chat: Chat, tokens: list[int]) -> None:
    """Print an answer."""
    view = _View(chat)
    view.show(tokens)
    view.finish()


class _View:
    """Prints thoughts, dim on a terminal, and the answer on lines of its own."""

    def __init__(self, chat: Chat) -> None:
        tokenizer = chat.model.tokenizer
        assert tokenizer is not None  # Chat made sure
        self._decoder = IncrementalDecoder(tokenizer)
        self._ends, self._end_think = chat.eos_token_ids, chat.end_think_token_id
        self._thinks = chat.thinking
        self._is_dim = self._thinks and sys.stdout.isatty()
        if self._is_dim:
            print(DIM, end="")

    def show(self, tokens: list[int]) -> None:
        """Print what these tokens complete."""
        if tokens and tokens[-1] in self._ends:  # some tokenizers would print it
            tokens = tokens[:-1]
        if self._thinks and self._end_think in tokens:
            cut = tokens.index(self._end_think) + 1
            thought = self._decoder.push(tokens[:cut]) + self._decoder.finish()
            # Most tokenizers count the mark as special and would leave it out.
            mark = "" if self._is_dim or thought.rstrip().endswith(THINK_END) else THINK_END
            print(thought + mark + (PLAIN if self._is_dim else ""), flush=True)
            self._thinks = self._is_dim = False
            tokens = tokens[cut:]
        print(self._decoder.push(tokens), end="", flush=True)

    def finish(self) -> None:
        """End the line."""
        print(self._decoder.finish() + (PLAIN if self._is_dim else ""), flush=True)
