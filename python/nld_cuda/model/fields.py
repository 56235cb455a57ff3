"""Typed access to the fields of a JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

LEAST, MOST = 1e-30, 1e30  # magnitudes beyond are damage; float32 ends at 1e-38 and 3e38


class Fields:
    """Typed access to a JSON object, with errors that name file, field, rule and value."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def fail(self, name: str, rule: str, value: Any) -> NoReturn:
        raise ValueError(f"{self.source}: {self.prefix}{name} must {rule}, got {value!r:.300}")

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a field; null counts as absent."""
        value = self.values.get(name)
        return default if value is None else value

    def required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise ValueError(f"{self.source}: {self.prefix}{name} must be given, it is missing")
        return value

    def count(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.required(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(name, "be an integer >= 1", value)
        if value > most:
            self.fail(name, f"be at most {most}", value)
        return int(value)

    def number(
        self, name: str, default: float | None = None, minimum: float | None = None
    ) -> float:
        value = self.required(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.fail(name, "be a number", value)
        if value != 0 and not LEAST <= abs(value) <= MOST:  # NaN too
            self.fail(name, f"be 0 or of a magnitude in [{LEAST:g}, {MOST:g}]", value)
        if minimum is not None and value <= minimum:
            self.fail(name, f"be > {minimum:g}", value)
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number >= 0, None where it is absent."""
        value = None if self.get(name) is None else self.number(name)
        if value is not None and value < 0:
            self.fail(name, "be >= 0", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "be true or false", value)
        return bool(value)

    def token(self, name: str, vocab_size: int, required: bool = False) -> Any:
        value = self.required(name, None) if required else self.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            self.fail(name, f"be a token id in [0, {vocab_size})", value)
        return int(value)

    def object(self, name: str) -> Fields | None:
        """Fields of an object inside this one, None where it is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, "be an object", value)
        return Fields(value, self.source, f"{self.prefix}{name}.")

    def supported(self, name: str, values: tuple[Any, ...], required: bool = False) -> None:
        value = self.required(name, None) if required else self.get(name)
        if value is not None and value not in values:
            known = " or ".join("absent" if v is None else json.dumps(v) for v in values)
            raise NotImplementedError(
                f"{self.source}: {self.prefix}{name} {json.dumps(value):.300} is not supported, "
                f"only {known}"
            )
