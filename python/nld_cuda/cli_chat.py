"""`nld chat`: reads turns, streams answers, changes settings between them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nld_cuda.chat import Chat
from nld_cuda.cli import MODES, decode_options
from nld_cuda.cli_view import stats_line
from nld_cuda.decode.text import IncrementalDecoder

HELP = """\
/mode NAME     ar, diffusion, linear-spec or quadratic-spec, from the next answer on
/think on|off  ask the model to think first, or not
/think N       think, for at most N tokens
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
        template = None if args.template is None else Path(args.template).read_text("utf-8")
        self.chat = Chat(
            model,
            system=args.system,
            thinking=args.think or args.max_thinking_tokens is not None,
            max_thinking_tokens=args.max_thinking_tokens,
            template=template,
        )
        self.mode = args.mode
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
            if line == "/quit":
                return 0
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            elif line:
                try:
                    self._answer(line)
                except (ValueError, TypeError) as error:
                    if not self._is_terminal:
                        raise
                    self._note(str(error))  # the conversation is as before: go on

    def _answer(self, line: str) -> None:
        options = decode_options(self._args, self.mode, all_modes=True)
        events = self.chat.ask(line, **options)
        view = _View(self.chat, self._is_terminal)
        try:
            for event in events:
                view.show(event.final_tokens)
                if event.result is not None and self._show_stats:
                    view.finish()
                    reused = f", {self.chat.session.num_reused} tokens of the prompt reused"
                    self._note(stats_line(self.mode, event.result.stats) + reused)
        except KeyboardInterrupt:
            events.close()
            if not self._is_terminal:
                raise
            view.finish()
            self._note("stopped")
        view.finish()

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


class _View:
    """Prints an answer as it grows: thoughts dim on a terminal, then the answer itself."""

    def __init__(self, chat: Chat, is_terminal: bool) -> None:
        tokenizer = chat.model.tokenizer
        assert tokenizer is not None  # Chat made sure
        self._decoder = IncrementalDecoder(tokenizer)
        self._end_think = chat.end_think_token_id
        self._dim = chat.thinking and is_terminal
        self._open = True
        if self._dim:
            print(DIM, end="")

    def show(self, tokens: list[int]) -> None:
        """Print what these tokens complete."""
        if self._end_think in tokens and self._dim:
            cut = tokens.index(self._end_think) + 1
            print(self._decoder.push(tokens[:cut]), end=PLAIN + "\n", flush=True)
            self._dim = False
            tokens = tokens[cut:]
        print(self._decoder.push(tokens), end="", flush=True)

    def finish(self) -> None:
        """End the line, once."""
        if self._open:
            print(self._decoder.finish() + (PLAIN if self._dim else ""), flush=True)
        self._open = False
