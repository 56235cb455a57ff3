"""Ctrl-C at a chosen place of a decode call."""

from __future__ import annotations

from typing import Any

from nld_cuda import ops


class Interrupted:
    """The ops, with Ctrl-C just before or after call number `at` of one of them."""

    def __init__(self, name: str, at: int, late: bool) -> None:
        self._name, self._left, self._late = name, at, late

    def __getattr__(self, name: str) -> Any:
        op = getattr(ops, name)
        if name != self._name:
            return op

        def call(*args: Any, **kw: Any) -> Any:
            self._left -= 1
            if self._left >= 0:
                return op(*args, **kw)
            if self._late:
                op(*args, **kw)
            raise KeyboardInterrupt

        return call
