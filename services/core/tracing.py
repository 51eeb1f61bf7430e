"""Traces: where spans go, and how their context crosses a process boundary.

With `otlp_endpoint` spans are sent over OTLP gRPC, else with `state_dir` they are written to a
local file, else nothing is recorded. Either way batches leave on a thread of their own, a full
queue drops spans, and nothing here raises into the code that is traced. The handle is passed to
whom it concerns; OpenTelemetry's global provider is left alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.core.span_file import SpanFileExporter

SHUTDOWN_TIMEOUT_S = 2.0

_EXPORT_TIMEOUT_S = 3.0
_EXPORT_INTERVAL_MS = 1000
_QUEUE_SPANS = 16384
_BATCH_SPANS = 512
_PROPAGATOR = TraceContextTextMapPropagator()
_logger = logging.getLogger(__name__)


class Tracing:
    """A process's tracer, and the only way to end it.

    `shutdown` sends what waits and returns within `timeout_s`, whatever the collector does. Spans
    ended afterwards are dropped.
    """

    def __init__(
        self,
        tracer: trace.Tracer,
        *,
        provider: TracerProvider | None = None,
        exporter: SpanExporter | None = None,
    ) -> None:
        self.tracer = tracer
        self._provider = provider
        self._exporter = exporter

    @property
    def is_recording(self) -> bool:
        return self._provider is not None

    def flush(self) -> None:
        """Hand over what waits now. Blocks as long as the exporter does; for tests."""
        if self._provider is not None:
            self._provider.force_flush()

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Safe to call again."""
        provider, self._provider = self._provider, None
        if provider is None or self._exporter is None:
            return
        flusher = threading.Thread(target=provider.shutdown, daemon=True)
        flusher.start()
        flusher.join(timeout_s * 0.75)
        if flusher.is_alive():
            self._exporter.shutdown()  # aborts the export in flight, which ends the flusher
            flusher.join(timeout_s * 0.25)


class ChosenIds(RandomIdGenerator):
    """Random ids, but for spans that were named in frames before they were recorded."""

    def generate_span_id(self) -> int:
        chosen, _choice.span_id = getattr(_choice, "span_id", None), None
        return chosen or super().generate_span_id()


_choice = threading.local()


@contextlib.contextmanager
def chosen_span_id(span_id: int | None) -> Iterator[None]:
    """The span that is started within, on this thread, has this id (`new_span_id`); None: any."""
    _choice.span_id = span_id
    try:
        yield
    finally:
        _choice.span_id = None


def new_span_id() -> int:
    """For a span to be recorded later, under `chosen_span_id`."""
    return _ids.generate_span_id()


_ids = RandomIdGenerator()


def traceparent_of(trace_id: int, span_id: int) -> str:
    """W3C trace context of a sampled span, 55 characters."""
    return f"00-{trace_id:032x}-{span_id:016x}-01"


def unix_ns(perf_counter_ns: int) -> int:
    """A reading of `time.perf_counter_ns`, of this machine and not long ago, as Unix time."""
    return time.time_ns() - time.perf_counter_ns() + perf_counter_ns


def configure_tracing(settings: Settings, service_name: str, *, instance_id: str) -> Tracing:
    """The tracing of this process. Raises `ConfigurationError` on an unusable endpoint.

    A root is sampled with `trace_sample_ratio`; a span with a parent follows its parent.
    """
    exporter: SpanExporter
    if settings.otlp_endpoint:
        exporter = CollectorExporter(settings.otlp_endpoint)
    elif settings.state_dir is not None:
        path = trace_folder(settings.state_dir) / f"{service_name}-{instance_id}.jsonl"
        exporter = SpanFileExporter(path, max_bytes=settings.trace_file_max_bytes)
    else:
        return Tracing(trace.NoOpTracer())
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.trace_sample_ratio)),
        resource=Resource(
            {
                "service.name": service_name,
                "service.instance.id": instance_id,
                "service.version": _version(),
            }
        ),
        shutdown_on_exit=False,
        id_generator=ChosenIds(),
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=_QUEUE_SPANS,
            schedule_delay_millis=_EXPORT_INTERVAL_MS,
            max_export_batch_size=_BATCH_SPANS,
        )
    )
    return Tracing(provider.get_tracer("expertfleet"), provider=provider, exporter=exporter)


def trace_folder(state_dir: Path) -> Path:
    """Where the processes of one fleet write their spans when there is no collector."""
    return state_dir / "traces"


def span_carrier(span: trace.Span) -> dict[str, str]:
    """The W3C carrier (`traceparent`, `tracestate`) of `span`; empty for an invalid span.

    A span that was not sampled has a carrier too: it tells the next process not to sample. Use
    `span.is_recording()` where only a recorded span may travel.
    """
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context=span_context(span))
    return carrier


def trace_exemplar(span: trace.Span | None) -> dict[str, str] | None:
    """What leads from a metric's sample to the trace of `span`, which may have ended; None where
    that was not sampled."""
    context = trace.INVALID_SPAN_CONTEXT if span is None else span.get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return None
    return {"trace_id": trace.format_trace_id(context.trace_id)}


def traceparent_exemplar(traceparent: str) -> dict[str, str] | None:
    """The same for a span of another process, by its `traceparent`; None without one."""
    parts = traceparent.split("-")
    return {"trace_id": parts[1]} if len(parts) == 4 else None


def span_context(span: trace.Span) -> Context:
    """A context for `tracer.start_span(context=...)` that makes `span` the parent."""
    return trace.set_span_in_context(span, Context())


def extract_context(carrier: Mapping[str, str]) -> Context:
    """The context a carrier describes; without a valid `traceparent` a span becomes a root."""
    return _PROPAGATOR.extract(carrier, context=Context())


def record_span(
    tracer: trace.Tracer,
    name: str,
    *,
    parent: Context,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue] | None = None,
    links: Sequence[trace.Link] = (),
    span_id: int | None = None,
) -> trace.Span:
    """Record what is over already. Times are Unix nanoseconds. The result can be a parent."""
    with chosen_span_id(span_id):
        span = tracer.start_span(
            name, context=parent, start_time=start_ns, attributes=attributes, links=links
        )
    span.end(end_time=end_ns)
    return span


class CollectorExporter(SpanExporter):
    """OTLP over gRPC that says once that the collector is away, and once that it is back.

    Plain text for `http://host:port` and `host:port`, TLS with the system's roots for `https://`.
    """

    def __init__(self, endpoint: str) -> None:
        # Imported here: it brings grpc and protobuf, which a process without a collector can spare.
        from opentelemetry.exporter.otlp.proto.grpc import exporter as otlp
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        self._endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
        if not self._endpoint.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"EXPERTFLEET_OTLP_ENDPOINT={endpoint!r} cannot be used: give the collector's gRPC "
                "address as http://host:4317 or https://host:4317",
                setting="otlp_endpoint",
            )
        # Its own log has a line per batch and retry for as long as the collector is away.
        otlp.logger.setLevel(logging.CRITICAL)
        self._inner = OTLPSpanExporter(
            endpoint=self._endpoint,
            insecure=self._endpoint.startswith("http://"),
            timeout=_EXPORT_TIMEOUT_S,
        )
        self._is_away = False
        self._dropped = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._is_away:
                _logger.info(
                    "trace collector %s is back; %d spans were dropped",
                    self._endpoint,
                    self._dropped,
                )
            self._is_away, self._dropped = False, 0
            return result
        if not self._is_away:
            _logger.warning(
                "trace collector %s takes no spans; they are dropped until it does", self._endpoint
            )
        self._is_away = True
        self._dropped += len(spans)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)


def _version() -> str:
    try:
        return metadata.version("expertfleet")
    except metadata.PackageNotFoundError:
        return "unknown"
