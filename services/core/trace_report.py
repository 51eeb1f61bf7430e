"""What recorded spans say: slow requests, time by phase, load by expert, one request as a tree.

Pure functions over spans, whether they come from files or from a collector.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.core import telemetry
from services.core.registry import Slot
from services.core.span_file import SpanRecord

PHASES: Mapping[str, str] = {
    "queue": telemetry.SPAN_QUEUE,
    "restore": telemetry.SPAN_RESTORE,
    "prefill": telemetry.SPAN_PREFILL,
    "decode": telemetry.SPAN_DECODE,
}
_REQUEST_SPANS = (telemetry.SPAN_REQUEST, telemetry.SPAN_GENERATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """One request. `phase_ms` sums the spans of each phase over its completions; a phase without
    spans is 0. Token counts are 0 where no span carries them."""

    trace_id: str
    request_id: str
    service: str
    start_ns: int
    duration_ms: float
    phase_ms: Mapping[str, float]
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """How long one phase took, over all its spans. Percentiles by nearest rank."""

    phase: str
    count: int
    total_ms: float
    mean_ms: float
    p50_ms: float
    p95_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """Tokens computed per (layer, expert) in the sampled steps."""

    tokens: Mapping[Slot, int]
    num_steps: int

    def by_expert(self) -> dict[int, int]:
        """Tokens per expert index, over all layers."""
        totals: Counter[int] = Counter()
        for (_, expert), tokens in self.tokens.items():
            totals[expert] += tokens
        return dict(sorted(totals.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRow:
    """A span in its tree: how deep, and when it began after the first span of the trace."""

    depth: int
    offset_ms: float
    span: SpanRecord


def summarise_requests(spans: Iterable[SpanRecord]) -> list[RequestSummary]:
    """One summary per request, in the order they began.

    A request is a gateway's span with all below it, or, where the gateway did not trace, a
    shard's. A trace that a client began can hold several.
    """
    summaries = []
    for trace in _by_trace(spans).values():
        roots, children = _tree(trace)
        pending = list(roots)
        while pending:
            span = pending.pop()
            if span.name in _REQUEST_SPANS:
                summaries.append(_summary(span, _subtree(span, children)))
            else:
                pending += children[span.span_id]
    return sorted(summaries, key=lambda summary: summary.start_ns)


def slowest_requests(spans: Iterable[SpanRecord], limit: int) -> list[RequestSummary]:
    """The `limit` requests that took longest, the longest first."""
    summaries = summarise_requests(spans)
    return sorted(summaries, key=lambda summary: -summary.duration_ms)[:limit]


def time_by_phase(spans: Iterable[SpanRecord]) -> list[PhaseTimes]:
    """The phases of a request in their order, those without spans left out."""
    names = {name: phase for phase, name in PHASES.items()}
    durations: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for span in spans:
        if span.name in names:
            durations[names[span.name]].append(span.duration_ms)
    return [_phase_times(phase, sorted(times)) for phase, times in durations.items() if times]


def load_by_expert(spans: Iterable[SpanRecord]) -> ExpertLoad:
    """Sum the tokens per expert that spans carry with their layer.

    The same tokens may be told by the layer's span, by the dispatch to a worker under it, and by
    the worker's own span under that: the outermost one that tells counts.
    """
    spans = list(spans)
    tokens: Counter[Slot] = Counter()
    for trace in _by_trace(spans).values():
        roots, children = _tree(trace)
        pending = list(roots)
        while pending:
            span = pending.pop()
            told = _tokens_per_slot(span)
            if told:
                tokens.update(told)
            else:
                pending += children[span.span_id]
    num_steps = sum(span.name == telemetry.SPAN_STEP for span in spans)
    return ExpertLoad(tokens=dict(sorted(tokens.items())), num_steps=num_steps)


def find_trace(spans: Iterable[SpanRecord], key: str) -> str | None:
    """The trace id that begins with `key`, or that of the request with this id."""
    for span in spans:
        if span.trace_id.startswith(key.lower()) or key in (
            span.attributes.get(telemetry.ATTR_REQUEST_ID),
            span.attributes.get(telemetry.GEN_AI_RESPONSE_ID),
        ):
            return span.trace_id
    return None


def trace_tree(spans: Iterable[SpanRecord], trace_id: str) -> list[TreeRow]:
    """The spans of one trace, each below its parent, siblings in the order they began.

    A span whose parent was not recorded stands at the outermost level.
    """
    trace = [span for span in spans if span.trace_id == trace_id]
    if not trace:
        return []
    roots, children = _tree(trace)
    first_ns = min(span.start_ns for span in trace)
    rows: list[TreeRow] = []
    pending = [(0, span) for span in reversed(roots)]
    while pending:
        depth, span = pending.pop()
        rows.append(TreeRow(depth=depth, offset_ms=(span.start_ns - first_ns) / 1e6, span=span))
        pending += [(depth + 1, child) for child in reversed(children[span.span_id])]
    return rows


def subtree_of(root: SpanRecord, spans: Iterable[SpanRecord]) -> list[SpanRecord]:
    """`root` and all of its trace that are below it, parents before their children, which are by
    start."""
    children = _tree([span for span in spans if span.trace_id == root.trace_id])[1]
    return _subtree(root, children)


def _by_trace(spans: Iterable[SpanRecord]) -> dict[str, list[SpanRecord]]:
    traces: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in spans:
        traces[span.trace_id].append(span)
    return traces


def _tree(trace: Sequence[SpanRecord]) -> tuple[list[SpanRecord], dict[str, list[SpanRecord]]]:
    """Roots and children by span id, both by start. A span that is its own ancestor, which only a
    damaged record can be, is reached from nowhere."""
    ids = {span.span_id for span in trace}
    roots: list[SpanRecord] = []
    children: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in sorted(trace, key=lambda span: (span.start_ns, -span.end_ns)):
        if span.parent_id is None or span.parent_id not in ids:
            roots.append(span)
        else:
            children[span.parent_id].append(span)
    return roots, children


def _subtree(root: SpanRecord, children: Mapping[str, list[SpanRecord]]) -> list[SpanRecord]:
    found = [root]
    for span in found:  # grows while it is walked
        found += children.get(span.span_id, [])
    return found


def _summary(request: SpanRecord, subtree: Sequence[SpanRecord]) -> RequestSummary:
    phase_ms = {
        phase: sum(span.duration_ms for span in subtree if span.name == name)
        for phase, name in PHASES.items()
    }
    return RequestSummary(
        trace_id=request.trace_id,
        request_id=str(
            request.attributes.get(telemetry.ATTR_REQUEST_ID)
            or request.attributes.get(telemetry.GEN_AI_RESPONSE_ID)
            or ""
        ),
        service=request.service,
        start_ns=request.start_ns,
        duration_ms=request.duration_ms,
        phase_ms=phase_ms,
        num_input_tokens=_largest(subtree, telemetry.GEN_AI_USAGE_INPUT_TOKENS),
        num_output_tokens=_largest(subtree, telemetry.GEN_AI_USAGE_OUTPUT_TOKENS),
        num_cached_tokens=_largest(subtree, telemetry.ATTR_NUM_CACHED_TOKENS),
        # Not of the spans below: a dispatch that failed was sent again.
        error=next(
            (span.error for span in subtree if span.name in _REQUEST_SPANS and span.error), ""
        ),
    )


def _largest(subtree: Sequence[SpanRecord], attribute: str) -> int:
    """Gateway and shard may both tell a figure; the gateway's covers all completions."""
    values = [span.attributes.get(attribute) for span in subtree]
    return max((value for value in values if isinstance(value, int)), default=0)


def _phase_times(phase: str, times_ms: Sequence[float]) -> PhaseTimes:
    return PhaseTimes(
        phase=phase,
        count=len(times_ms),
        total_ms=sum(times_ms),
        mean_ms=sum(times_ms) / len(times_ms),
        p50_ms=_percentile(times_ms, 50),
        p95_ms=_percentile(times_ms, 95),
        max_ms=times_ms[-1],
    )


def _percentile(ordered: Sequence[float], percent: int) -> float:
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def _tokens_per_slot(span: SpanRecord) -> dict[Slot, int]:
    layer = span.attributes.get(telemetry.ATTR_LAYER)
    experts = span.attributes.get(telemetry.ATTR_EXPERT_IDS)
    counts = span.attributes.get(telemetry.ATTR_TOKENS_PER_EXPERT)
    if not isinstance(layer, int) or not isinstance(experts, tuple):
        return {}
    if not isinstance(counts, tuple) or len(counts) != len(experts):
        return {}
    return {(layer, int(expert)): int(count) for expert, count in zip(experts, counts, strict=True)}
