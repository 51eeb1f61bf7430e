"""A recorded trace as the API tells it: a request's phases, and the steps that it took part in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.core import telemetry
from services.core.span_file import SpanRecord
from services.core.trace_files import FoundTrace
from services.core.trace_report import subtree_of

_HIDDEN = frozenset((telemetry.GEN_AI_CONVERSATION_ID,))
"""Names that clients gave their sessions: another tenant may read the trace."""


def trace_json(found: FoundTrace) -> dict[str, Any]:
    """`spans` are those of the request, `steps` the sampled engine steps with all below each, own
    ones and those of other traces that link to this one. `start_ms` counts from the trace's start.
    With `is_partial` more is to come: processes hand over their spans about once a second.
    """
    start_ns = min(span.start_ns for span in found.spans)
    end_ns = max(span.end_ns for span in found.spans)
    own_steps = [
        subtree_of(span, found.spans) for span in found.spans if span.name == telemetry.SPAN_STEP
    ]
    in_steps = {span.span_id for step in own_steps for span in step}
    steps = sorted([*own_steps, *found.linked_steps], key=lambda step: step[0].start_ns)
    return {
        "trace_id": found.trace_id,
        "request_id": _request_id(found.spans),
        "started_at": start_ns / 1e9,
        "duration_ms": _ms(end_ns - start_ns),
        "spans": [_span(span, start_ns) for span in found.spans if span.span_id not in in_steps],
        "steps": [_step(step, found.trace_id, start_ns) for step in steps],
        "is_truncated": found.is_truncated,
        "is_partial": _is_partial(found.spans),
    }


def request_json(span: SpanRecord) -> dict[str, Any]:
    """A gateway's span of a request as a line of the list of traces."""
    return {
        "trace_id": span.trace_id,
        "request_id": span.attributes.get(telemetry.ATTR_REQUEST_ID),
        "response_id": span.attributes.get(telemetry.GEN_AI_RESPONSE_ID),
        "started_at": span.start_ns / 1e9,
        "duration_ms": _ms(span.end_ns - span.start_ns),
        "status": span.attributes.get("http.response.status_code"),
    }


def _request_id(spans: Sequence[SpanRecord]) -> str | None:
    """As the gateway knows it; as the shard does where the gateway recorded nothing."""
    for name in (telemetry.SPAN_REQUEST, telemetry.SPAN_GENERATE):
        for span in spans:
            if span.name == name and telemetry.ATTR_REQUEST_ID in span.attributes:
                return str(span.attributes[telemetry.ATTR_REQUEST_ID])
    return None


def _is_partial(spans: Sequence[SpanRecord]) -> bool:
    """Whether a span's parent is missing, or what the shard did for a request that succeeded. The
    gateway's own span may hang under one of its caller."""
    known = {span.span_id for span in spans}
    requests = [span for span in spans if span.name == telemetry.SPAN_REQUEST]
    if any(
        span.parent_id is not None and span.parent_id not in known
        for span in spans
        if span.name != telemetry.SPAN_REQUEST
    ):
        return True
    is_served = any(span.attributes.get("http.response.status_code") == 200 for span in requests)
    return is_served and all(span.name != telemetry.SPAN_GENERATE for span in spans)


def _step(step: Sequence[SpanRecord], trace_id: str, start_ns: int) -> dict[str, Any]:
    """The step, the first of `step`, with what is below it as nested `children`."""
    nodes: dict[str, dict[str, Any]] = {}
    for span in step:
        node = nodes[span.span_id] = _span(span, start_ns) | {"children": []}
        if span is not step[0] and span.parent_id is not None:
            nodes[span.parent_id]["children"].append(node)
    root = step[0]
    return nodes[root.span_id] | {
        "trace_id": root.trace_id,
        "is_linked": root.trace_id != trace_id,
    }


def _span(span: SpanRecord, start_ns: int) -> dict[str, Any]:
    return {
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "name": span.name,
        "service": span.service,
        "instance": span.instance,
        "start_ms": _ms(span.start_ns - start_ns),
        "duration_ms": _ms(span.end_ns - span.start_ns),
        "attributes": {
            name: value for name, value in span.attributes.items() if name not in _HIDDEN
        },
        "events": [
            {
                "name": event.name,
                "at_ms": _ms(event.at_ns - start_ns),
                "attributes": dict(event.attributes),
            }
            for event in span.events
        ],
        "links": [{"trace_id": trace, "span_id": linked} for trace, linked in span.links],
        "error": span.error or None,
    }


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1e6, 3)
