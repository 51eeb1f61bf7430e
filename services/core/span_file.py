"""Spans as JSON lines in a local file of bounded size: written here, read by `expertfleet traces`.

A process writes `<service>-<instance>.jsonl`. At half of the bound it becomes `.jsonl.1`, replacing
the previous one, so that both together stay within the bound.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id

AttributeValue = str | bool | int | float | tuple[str | bool | int | float, ...]

_FOLDER_FILES = 64
_TRACE_ID_AT = slice(len('{"trace_id":"'), len('{"trace_id":"') + 32)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanEvent:
    """Something that happened during a span; `at_ns` is a Unix time."""

    name: str
    at_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRecord:
    """One finished span. Ids are lower-case hex; times Unix nanoseconds.

    `links` are (trace_id, span_id); `error` is empty unless the span's status is an error.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    instance: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()
    events: tuple[SpanEvent, ...] = ()
    error: str = ""

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


def read_spans(folder: Path) -> Iterator[SpanRecord]:
    """All spans in a folder, file by file, each in the order written.

    Lines that cannot be read (torn by a crash) and files that vanish meanwhile are passed over.
    """
    paths = sorted(folder.glob("*.jsonl.1")) + sorted(folder.glob("*.jsonl"))
    for path in paths:
        try:
            with path.open("rb") as lines:
                yield from filter(None, map(parse_line, lines))
        except FileNotFoundError:
            continue


class SpanFileExporter(SpanExporter):
    """Appends each batch in one write. Called from one thread at a time.

    The file is opened per batch, so that deleting it at any time is safe. When it cannot be
    written (disk full, no permission) that is logged once until it works again, and spans are
    dropped. Of the folder's trace files only the newest are kept, whoever wrote them.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._path = path
        self._half_bytes = max_bytes // 2
        self._is_failing = False
        self._is_prepared = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = [_encode(span) for span in spans]
        try:
            self._prepare()
            for chunk in _chunks(lines, self._half_bytes):
                self._append(chunk)
        except OSError as error:
            if not self._is_failing:
                _logger.warning("spans are dropped: %s cannot be written: %s", self._path, error)
            self._is_failing = True
            return SpanExportResult.FAILURE
        self._is_failing = False
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held open."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True

    def _prepare(self) -> None:
        if self._is_prepared:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _prune(self._path.parent, keep=_FOLDER_FILES)
        self._is_prepared = True

    def _append(self, chunk: bytes) -> None:
        try:
            file = self._path.open("ab", buffering=0)
        except FileNotFoundError:
            self._is_prepared = False  # the folder was deleted
            self._prepare()
            file = self._path.open("ab", buffering=0)
        with file:
            size = file.tell()
            if size + len(chunk) <= self._half_bytes:
                _write_whole(file, size, chunk)
                return
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        with self._path.open("ab", buffering=0) as file:
            _write_whole(file, 0, chunk)


def _write_whole(file: Any, size: int, chunk: bytes) -> None:
    """Write all of `chunk` at the end, or leave the file as it was."""
    try:
        written = file.write(chunk)
        if written != len(chunk):
            raise OSError(f"only {written} of {len(chunk)} bytes could be written")
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise


def _chunks(lines: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Join lines into pieces of at most `max_bytes`; a longer line is left out."""
    piece: list[bytes] = []
    size = 0
    for line in lines:
        if len(line) > max_bytes:
            continue
        if size + len(line) > max_bytes:
            yield b"".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield b"".join(piece)


def list_files(folder: Path) -> list[Path]:
    """The span files of a folder, that written last first."""
    ages: list[tuple[float, Path]] = []
    for path in folder.glob("*.jsonl*"):
        with suppress(FileNotFoundError):  # another process prunes the folder
            ages.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(ages, reverse=True)]


def _prune(folder: Path, *, keep: int) -> None:
    """Delete the trace files written longest ago, so that restarts do not fill the disk."""
    for path in list_files(folder)[keep:]:
        path.unlink(missing_ok=True)


def _encode(span: ReadableSpan) -> bytes:
    context, resource = span.get_span_context(), span.resource.attributes
    record = {
        "trace_id": format_trace_id(context.trace_id if context else 0),
        "span_id": format_span_id(context.span_id if context else 0),
        "parent_id": format_span_id(span.parent.span_id) if span.parent else None,
        "name": span.name,
        "service": resource.get("service.name", ""),
        "instance": resource.get("service.instance.id", ""),
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "attributes": dict(span.attributes or {}),
        "links": [
            (format_trace_id(link.context.trace_id), format_span_id(link.context.span_id))
            for link in span.links
        ],
    }
    if span.events:
        record["events"] = [
            (event.name, event.timestamp, dict(event.attributes or {})) for event in span.events
        ]
    if span.status.status_code is StatusCode.ERROR:
        record["error"] = span.status.description or "error"
    return json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"


def parse_line(line: bytes) -> SpanRecord | None:
    """None for a line that cannot be read."""
    try:
        return _parse(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def trace_id_of_line(line: bytes) -> str:
    """The trace id of a line as it is written here, without parsing it; of another line, noise."""
    return line[_TRACE_ID_AT].decode("ascii", "replace")


def _parse(record: dict[str, Any]) -> SpanRecord:
    return SpanRecord(
        trace_id=str(record["trace_id"]),
        span_id=str(record["span_id"]),
        parent_id=record["parent_id"],
        name=str(record["name"]),
        service=str(record["service"]),
        instance=str(record["instance"]),
        start_ns=int(record["start_ns"]),
        end_ns=int(record["end_ns"]),
        attributes=_attributes(record["attributes"]),
        links=tuple((str(trace_id), str(span_id)) for trace_id, span_id in record["links"]),
        events=tuple(
            SpanEvent(name=str(name), at_ns=int(at_ns), attributes=_attributes(attributes))
            for name, at_ns, attributes in record.get("events", ())
        ),
        error=str(record.get("error", "")),
    )


def _attributes(values: dict[str, Any]) -> dict[str, AttributeValue]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
