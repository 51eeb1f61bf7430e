"""Typed reading of the small JSON files that describe a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.core.errors import CheckpointError

_ABSENT: Any = object()


class JsonFields:
    """The top-level object of a JSON file. Every getter names the file and the field at fault.

    A field that is null counts as absent. Getters without a default raise when it is absent.
    """

    def __init__(self, path: Path, fields: dict[str, Any] | None = None) -> None:
        self.path = path
        self._fields = read_json_object(path) if fields is None else fields

    def __contains__(self, key: str) -> bool:
        return self._fields.get(key) is not None

    def get(self, key: str) -> Any:
        """The raw value, None when absent."""
        return self._fields.get(key)

    def has_key(self, key: str) -> bool:
        """Whether the field is written at all, be it null."""
        return key in self._fields

    def child(self, key: str) -> JsonFields:
        """The fields of the object under `key`."""
        value = self._value(key, _ABSENT)
        if not isinstance(value, dict):
            raise self._bad(key, "an object")
        return JsonFields(self.path, value)

    def integer(self, key: str, default: int = _ABSENT, *, minimum: int = 1) -> int:
        value = self._value(key, default)
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._bad(key, f"an integer of at least {minimum}")
        return value

    def optional_integer(self, key: str, *, minimum: int = 1) -> int | None:
        return self.integer(key, minimum=minimum) if key in self else None

    def positive(self, key: str, default: float = _ABSENT) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._bad(key, "a number above 0")
        return float(value)

    def boolean(self, key: str, default: bool = _ABSENT) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def text(self, key: str, default: str = _ABSENT) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._bad(key, "a string")
        return value

    def integers(self, key: str, default: tuple[int, ...] = _ABSENT) -> tuple[int, ...]:
        """One integer or a list of them, none below 0."""
        value = self._value(key, default)
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
            raise self._bad(key, "an integer or a list of integers")
        return tuple(values)

    def _value(self, key: str, default: Any) -> Any:
        value = self._fields.get(key)
        if value is not None:
            return value
        if default is _ABSENT:
            raise CheckpointError(
                f"{self.path} lacks {key!r}; the checkpoint is incomplete",
                file=str(self.path),
                field=key,
            )
        return default

    def _bad(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {key} is {self._fields.get(key)!r}, but must be {wanted}",
            file=str(self.path),
            field=key,
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist", file=str(path)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}", file=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", file=str(path))
    return value
