"""Span records for tests of what reads them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from services.core.span_file import AttributeValue, SpanRecord

_ids = itertools.count(1)


def span_record(
    name: str,
    *,
    parent: SpanRecord | None = None,
    start_ms: float = 0.0,
    ms: float = 1.0,
    service: str = "expertfleet-shard",
    trace_id: str | None = None,
    attributes: Mapping[str, AttributeValue] | None = None,
    error: str = "",
) -> SpanRecord:
    """A span that began `start_ms` after an arbitrary moment; a root has a trace of its own."""
    number = next(_ids)
    start_ns = 1_700_000_000_000_000_000 + round(start_ms * 1e6)
    return SpanRecord(
        trace_id=trace_id or (parent.trace_id if parent else f"{number:032x}"),
        span_id=f"{number:016x}",
        parent_id=parent.span_id if parent else None,
        name=name,
        service=service,
        instance="i",
        start_ns=start_ns,
        end_ns=start_ns + round(ms * 1e6),
        attributes=attributes or {},
        error=error,
    )
