"""Lease records as compact JSON.

A record of 448 slots (8x22B) must stay small, so slots are written per expert as layer ranges
("0-15,20"), and counts per slot as those ranges with a list of numbers. Readers skip fields they
do not know, so that processes of different versions share a fleet.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from services.core.errors import ExpertfleetError
from services.core.registry import ShardRecord, Slot, WorkerRecord

_KINDS: dict[str, type[WorkerRecord] | type[ShardRecord]] = {
    "worker": WorkerRecord,
    "shard": ShardRecord,
}
_COUNTS = ("tokens", "expert_load")
_STATES = ("loading", "ready", "draining")
_MAX_LAYERS = 1 << 16
# What JSON of any other shape, depth or range can raise.
_DECODE_ERRORS = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError),
)


class RecordError(ExpertfleetError):
    """The bytes are not a lease record."""

    code = "bad_record"


def encode_record(record: WorkerRecord | ShardRecord) -> bytes:
    fields: dict[str, Any] = {"kind": "worker" if isinstance(record, WorkerRecord) else "shard"}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if item.name == "slots":
            value = _pack_slots(value)
        elif item.name in _COUNTS:
            value = _pack_counts(value)
        fields[item.name] = value
    return json.dumps(fields, separators=(",", ":")).encode()


def decode_record(payload: bytes) -> WorkerRecord | ShardRecord:
    """Raises `RecordError` saying what is wrong with it."""
    try:
        fields = json.loads(payload)
        kind = _KINDS[fields["kind"]]
        values: dict[str, Any] = {}
        for item in dataclasses.fields(kind):
            if item.name in fields:
                values[item.name] = _decode_field(item.name, str(item.type), fields[item.name])
        return kind(**values)
    except _DECODE_ERRORS as error:
        raise RecordError(
            f"not a lease record ({type(error).__name__}: {error}): {payload[:80]!r}"
        ) from error


def _decode_field(name: str, annotation: str, value: Any) -> Any:
    if name == "slots":
        return frozenset(_unpack_slots(value))
    if name in _COUNTS:
        return _unpack_counts(value)
    if name == "state" and value not in _STATES:
        raise ValueError(f"state {value!r}")
    if annotation in ("int", "float"):
        return int(value) if annotation == "int" else float(value)
    if not isinstance(value, str) and not (value is None and "None" in annotation):
        raise TypeError(f"{name} is {value!r}")
    return value


def _pack_slots(slots: Iterable[Slot]) -> dict[str, str]:
    layers_of: defaultdict[int, list[int]] = defaultdict(list)
    for layer, expert in slots:
        layers_of[expert].append(layer)
    return {str(expert): format_ranges(layers_of[expert]) for expert in sorted(layers_of)}


def _unpack_slots(packed: Mapping[str, str]) -> Iterable[Slot]:
    for expert, ranges in packed.items():
        for layer in parse_ranges(ranges):
            yield (layer, int(expert))


def _pack_counts(counts: Mapping[Slot, int]) -> dict[str, tuple[str, list[int]]]:
    packed = {}
    for expert, ranges in _pack_slots(counts).items():
        values = [counts[layer, int(expert)] for layer in parse_ranges(ranges)]
        packed[expert] = (ranges, values)
    return packed


def _unpack_counts(packed: Mapping[str, tuple[str, list[int]]]) -> dict[Slot, int]:
    return {
        (layer, int(expert)): int(count)
        for expert, (ranges, values) in packed.items()
        for layer, count in zip(parse_ranges(ranges), values, strict=True)
    }


def format_ranges(numbers: Iterable[int]) -> str:
    """ "0-3,7" for 0, 1, 2, 3, 7 in any order."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def parse_ranges(text: str) -> list[int]:
    """The inverse of `format_ranges`. Raises ValueError for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        run = range(int(first), int(last or first) + 1)
        if not run or run.start < 0 or run.stop > _MAX_LAYERS:
            raise ValueError(f"range {part!r}")
        numbers.extend(run)
    return numbers
