"""JSON files of a checkpoint, and other text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def has_file(file: Path) -> bool:
    """Whether a folder has this file.

    Raises:
        FileNotFoundError: there is something of that name, but no file: a folder, a link to
            nothing (what an interrupted download leaves), a device.
    """
    if file.is_file():
        return True
    if os.path.lexists(file):
        raise FileNotFoundError(f"{file}: must be a file, found something else")
    return False


def read_text(file: Path) -> str:
    """Read a text file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    if not has_file(file):
        raise FileNotFoundError(f"{file}: must be there, found no such file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: must be text in UTF-8: {error}") from None


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        value = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: must be a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(value).__name__}")
    return value
