"""Finds one trace, or the newest requests, in a folder of span files, reading no more than it must.

Spans are appended as they end, so files are read from their ends, and once it is known when the
trace began, no further back than that. All of this blocks: call it from a thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.core import telemetry
from services.core.span_file import SpanRecord, list_files, parse_line, trace_id_of_line
from services.core.trace_report import subtree_of

MAX_READ_BYTES: Final = 256 << 20
"""Of one lookup, over all files."""
MAX_SPANS: Final = 4096
"""Of one lookup; what was written before these is left out."""
MAX_LINKED_STEPS: Final = 16
"""Sampled steps of other traces that are opened; later ones are left out."""
_CHUNK_BYTES: Final = 1 << 20
_SMALL_CHUNK_BYTES: Final = 1 << 16
_SLACK_NS: Final = 10 * 10**9
"""A span may be written so long after others that ended later."""
_TRACE_ID: Final = re.compile(r"[0-9a-f]{32}")
_ID_ATTRIBUTES: Final = (telemetry.ATTR_REQUEST_ID, telemetry.GEN_AI_RESPONSE_ID)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTrace:
    """The spans of a trace, and, with all below each, the sampled steps of other traces that link
    to it; all by start. `is_truncated`: there was more than is told."""

    trace_id: str
    spans: Sequence[SpanRecord]
    linked_steps: Sequence[Sequence[SpanRecord]]
    is_truncated: bool


def find_trace_spans(
    folder: Path, key: str, *, max_read_bytes: int = MAX_READ_BYTES
) -> FoundTrace | None:
    """The trace with the id `key`, or of the request with this id; None where there is none."""
    search = _Search(folder, max_read_bytes)
    if _TRACE_ID.fullmatch(key.lower()):
        found = search.open(key.lower())
        if found is not None:
            return found
    trace_id = search.trace_of_request(key)
    return None if trace_id is None else search.open(trace_id)


def newest_requests(folder: Path, limit: int) -> list[SpanRecord]:
    """Gateways' spans of the `limit` requests that began last, the newest first. Of those that
    ended last, twice as many a gateway are looked at."""
    search = _Search(folder, MAX_READ_BYTES)
    found: list[SpanRecord] = []
    for path in search.files_of(telemetry.SERVICE_GATEWAY):
        num_found = 0
        for chunk in search.chunks(path, _SMALL_CHUNK_BYTES):
            for line in reversed(chunk.splitlines()):
                span = parse_line(line)
                if span is not None and span.name == telemetry.SPAN_REQUEST:
                    found.append(span)
                    num_found += 1
            if num_found >= 2 * limit:
                break
    found.sort(key=lambda span: -span.start_ns)
    return found[:limit]


class _Search:
    """One lookup over the files that are there when it begins."""

    def __init__(self, folder: Path, max_read_bytes: int) -> None:
        self._files = list_files(folder)
        self._bytes_left = max_read_bytes
        self._is_truncated = False

    def files_of(self, *services: str) -> list[Path]:
        """Service by service, the newest first."""
        return [
            path
            for service in services
            for path in self._files
            if path.name.startswith(f"{service}-")
        ]

    def open(self, trace_id: str) -> FoundTrace | None:
        told = self._spans(lambda chunk: _with_needle(chunk, trace_id.encode()), {trace_id})
        spans = [span for span in told if span.trace_id == trace_id]
        if not spans:
            return None
        linking = [span for span in told if _is_step_linked_to(span, trace_id)]
        steps = linking[:MAX_LINKED_STEPS]
        below: dict[str, list[SpanRecord]] = {}
        if steps:
            wanted = {step.trace_id for step in steps}
            since_ns = min(step.start_ns for step in steps)
            for span in self._spans(lambda chunk: _of_traces(chunk, wanted), wanted, since_ns):
                below.setdefault(span.trace_id, []).append(span)
        return FoundTrace(
            trace_id=trace_id,
            spans=spans,
            linked_steps=[subtree_of(step, below.get(step.trace_id, ())) for step in steps],
            is_truncated=self._is_truncated or len(linking) > len(steps),
        )

    def trace_of_request(self, request_id: str) -> str | None:
        needle = json.dumps(request_id).encode()
        for path in self.files_of(telemetry.SERVICE_GATEWAY, telemetry.SERVICE_SHARD):
            for chunk in self.chunks(path, _CHUNK_BYTES):
                for line in _with_needle(chunk, needle):
                    span = parse_line(line)
                    if span and request_id in map(span.attributes.get, _ID_ATTRIBUTES):
                        return span.trace_id
        return None

    def _spans(
        self,
        lines_of: Callable[[bytes], Iterator[bytes]],
        trace_ids: Collection[str],
        since_ns: int | None = None,
    ) -> list[SpanRecord]:
        """What `lines_of` picks from the files' chunks, as far back as the first of `trace_ids`
        began, if that is not known already to be `since_ns`; by start."""
        found: dict[str, SpanRecord] = {}
        # The gateway's file has few lines, and tells when a trace began.
        services = (telemetry.SERVICE_GATEWAY, telemetry.SERVICE_SHARD, telemetry.SERVICE_WORKER)
        began_ns = since_ns
        for path in self.files_of(*services):
            if began_ns is not None and _modified_ns(path) < began_ns - _SLACK_NS:
                continue
            for chunk in self.chunks(path, _CHUNK_BYTES):
                for span in filter(None, map(parse_line, lines_of(chunk))):
                    found[span.span_id] = span
                    if since_ns is None and span.trace_id in trace_ids:
                        began_ns = min(span.start_ns, began_ns or span.start_ns)
                if len(found) >= MAX_SPANS:
                    self._is_truncated = True
                    break
                oldest = parse_line(chunk[: chunk.find(b"\n") + 1])
                if began_ns and oldest and oldest.end_ns < began_ns - _SLACK_NS:
                    break
        return sorted(found.values(), key=lambda span: (span.start_ns, -span.end_ns))

    def chunks(self, path: Path, chunk_bytes: int) -> Iterator[bytes]:
        """Whole lines, from the end of the file to its start, within what may still be read."""
        with suppress(OSError), path.open("rb") as file:
            position, tail = file.seek(0, 2), b""
            while position:
                size = min(chunk_bytes, position)
                if size > self._bytes_left:
                    self._is_truncated = True
                    return
                self._bytes_left -= size
                position -= size
                file.seek(position)
                lines = file.read(size) + tail
                # The first line is whole only at the start of the file.
                cut = lines.find(b"\n") + 1 if position else 0
                tail = lines[:cut] if cut or not position else lines
                if cut or not position:
                    yield lines[cut:]


def _is_step_linked_to(span: SpanRecord, trace_id: str) -> bool:
    is_foreign_step = span.name == telemetry.SPAN_STEP and span.trace_id != trace_id
    return is_foreign_step and any(linked == trace_id for linked, _ in span.links)


def _with_needle(chunk: bytes, needle: bytes) -> Iterator[bytes]:
    """The lines in which `needle` stands."""
    at = chunk.find(needle)
    while at >= 0:
        end = chunk.find(b"\n", at)
        end = len(chunk) if end < 0 else end + 1
        yield chunk[chunk.rfind(b"\n", 0, at) + 1 : end]
        at = chunk.find(needle, end)


def _of_traces(chunk: bytes, trace_ids: Collection[str]) -> Iterator[bytes]:
    return (line for line in chunk.splitlines() if trace_id_of_line(line) in trace_ids)


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
