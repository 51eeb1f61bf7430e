"""An OpenTelemetry collector in the test process: takes traces over OTLP gRPC and keeps them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from services.core.span_file import AttributeValue, SpanRecord


class OtlpCollector(TraceServiceServicer):
    """Collected spans in the order they came. `resources` are the attributes seen per service."""

    def __init__(self, port: int = 0) -> None:
        self._spans: list[SpanRecord] = []
        self._arrived = threading.Condition()
        self.resources: dict[str, dict[str, AttributeValue]] = {}
        self.num_calls = 0
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def endpoint(self) -> str:
        """What `otlp_endpoint` is set to."""
        return f"http://127.0.0.1:{self.port}"

    def spans(self) -> list[SpanRecord]:
        with self._arrived:
            return list(self._spans)

    def wait_for(
        self, condition: Callable[[list[SpanRecord]], bool], *, timeout_s: float = 60.0
    ) -> list[SpanRecord]:
        """All spans once `condition` holds of them. Raises `TimeoutError` naming what is there."""
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while not condition(self._spans):
                if not self._arrived.wait(deadline - time.monotonic()):
                    names = sorted(f"{span.service}:{span.name}" for span in self._spans)
                    raise TimeoutError(f"the spans waited for did not arrive; there are: {names}")
            return list(self._spans)

    def wait_for_names(self, *names: str, timeout_s: float = 60.0) -> list[SpanRecord]:
        """All spans once there is at least one of each name."""
        return self.wait_for(
            lambda spans: set(names) <= {span.name for span in spans}, timeout_s=timeout_s
        )

    def stop(self) -> None:
        self._server.stop(None).wait()

    def Export(  # noqa: N802
        self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        with self._arrived:
            self.num_calls += 1
            for resource_spans in request.resource_spans:
                resource = _attributes(resource_spans.resource.attributes)
                self.resources[str(resource.get("service.name", ""))] = resource
                for scope_spans in resource_spans.scope_spans:
                    self._spans += [_record(span, resource) for span in scope_spans.spans]
            self._arrived.notify_all()
        return ExportTraceServiceResponse()


@contextmanager
def running_collector() -> Iterator[OtlpCollector]:
    collector = OtlpCollector()
    try:
        yield collector
    finally:
        collector.stop()


def _record(span: Span, resource: dict[str, AttributeValue]) -> SpanRecord:
    is_error = span.status.code == Status.STATUS_CODE_ERROR
    return SpanRecord(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        name=span.name,
        service=str(resource.get("service.name", "")),
        instance=str(resource.get("service.instance.id", "")),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        error=(span.status.message or "error") if is_error else "",
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, AttributeValue]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> AttributeValue:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(item) for item in value.array_value.values)  # type: ignore[misc]
    scalar: str | bool | int | float = getattr(value, kind) if kind else ""
    return scalar
