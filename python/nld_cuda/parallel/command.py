"""The `nld` command under torchrun: rank 0 talks with the user, the other ranks do as it does."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from nld_cuda.parallel import group as groups

COMMANDS = ("generate", "compare", "chat", "info")  # the others work on files or measure
# How long a failing rank waits for the others to fail too, before torchrun ends them.
LAST_WORDS = timedelta(seconds=2)


class Team:
    """The processes that run one command.

    From here on rank 0's standard input is that of all ranks, and only rank 0 prints.
    """

    def __init__(self) -> None:
        """Join the processes that torchrun started."""
        self.group = groups.init()
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store()
        self._stderr = sys.stderr
        streams = (sys.stdin, sys.stdout, sys.stderr)
        terminals = groups.gather_objects(self.group, [s.isatty() for s in streams])[0]
        sys.stdin = _SharedInput(self.group, sys.stdin, terminals[0])
        if self.rank:
            # Whether there is a terminal decides what is done; every rank must do the same.
            sys.stdout, sys.stderr = _Silence(terminals[1]), _Silence(terminals[2])

    def check(self, command: str) -> None:
        """Raise ValueError for a command that one process does."""
        if command not in COMMANDS:
            raise ValueError(f"{command} must run in one process, got {self.num_ranks}")

    def report(self, message: str) -> None:
        """Print an error, unless another rank has been first: the others follow from that one."""
        if self._store.add("nld/failures", 1) == 1:
            print(message, file=self._stderr, flush=True)

    def leave(self, code: int) -> NoReturn:
        """End this process for an error, but not before the others had time to report theirs.

        torchrun ends them when it sees the first one go.
        """
        self._store.set(f"nld/ended/{self.rank}", "")
        with contextlib.suppress(RuntimeError):
            self._store.wait([f"nld/ended/{r}" for r in range(self.num_ranks)], LAST_WORDS)
        sys.stdout.flush()
        self._stderr.flush()
        os._exit(code)  # a collective that others never join must not keep us


class _SharedInput(io.TextIOBase):
    """Rank 0's standard input, on every rank; all have to read alike."""

    def __init__(self, group: Any, stdin: Any, is_terminal: bool) -> None:
        self._group, self._stdin, self._is_terminal = group, stdin, is_terminal

    def _shared(self, read: Callable[[], str]) -> str:
        text = [read() if dist.get_rank(self._group) == 0 else ""]
        dist.broadcast_object_list(text, src=0, group=self._group)
        return text[0]

    def read(self, size: int | None = -1) -> str:
        return self._shared(lambda: self._stdin.read(size))

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        return self._shared(lambda: self._stdin.readline(size))

    def isatty(self) -> bool:
        return self._is_terminal


class _Silence(io.TextIOBase):
    """Where the output of the other ranks goes."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return self._is_terminal
