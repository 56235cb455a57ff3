"""Calling functions whose arguments grew over the versions of a library."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from nld_cuda.bench.base import NotRun


def first_module(names: Sequence[str]) -> ModuleType:
    """Import the first of these modules that is there."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise NotRun(f"not installed: {' or '.join(names)}")


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def call_with(function: Callable[..., Any], optional: Mapping[str, Any], **arguments: Any) -> Any:
    """Call with all `arguments`, and with those `optional` ones that the function knows."""
    known = _parameters(function)
    more = {name: value for name, value in optional.items() if name in known}
    return function(**arguments, **more)
