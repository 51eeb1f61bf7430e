from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Link, Span

from services.core import telemetry, trace_files
from services.core.span_file import SpanFileExporter, trace_id_of_line
from services.core.telemetry import SERVICE_GATEWAY, SERVICE_SHARD, SERVICE_WORKER
from services.core.trace_files import find_trace_spans, newest_requests

BEGIN_NS = 1_700_000_000_000_000_000
SECOND = 1_000_000_000


class Writer:
    """Spans of one process, exported as it would."""

    def __init__(self, folder: Path, service: str, instance: str = "0") -> None:
        self.path = folder / f"{service}-{instance}.jsonl"
        resource = Resource({"service.name": service, "service.instance.id": instance})
        self._tracer = TracerProvider(resource=resource, shutdown_on_exit=False).get_tracer("t")
        self._exporter = SpanFileExporter(self.path, max_bytes=64 << 20)

    def span(
        self,
        name: str,
        *,
        parent: Span | None = None,
        at_s: float = 0.0,
        links: Sequence[Span] = (),
        **attributes: object,
    ) -> Span:
        """A written span of one second."""
        span = self._tracer.start_span(
            name,
            context=trace.set_span_in_context(parent, Context()) if parent else Context(),
            start_time=BEGIN_NS + round(at_s * SECOND),
            links=[Link(linked.get_span_context()) for linked in links],
            attributes={key.replace("__", "."): value for key, value in attributes.items()},  # type: ignore[misc]
        )
        span.end(end_time=BEGIN_NS + round((at_s + 1) * SECOND))
        assert isinstance(span, ReadableSpan)
        self._exporter.export([span])
        return span


@pytest.fixture
def writer(tmp_path: Path) -> Callable[..., Writer]:
    return lambda service, instance="0": Writer(tmp_path, service, instance)


def trace_id_of(span: Span) -> str:
    return f"{span.get_span_context().trace_id:032x}"


def test_a_trace_is_gathered_from_all_processes(
    writer: Callable[..., Writer], tmp_path: Path
) -> None:
    gateway, shard, worker = map(writer, (SERVICE_GATEWAY, SERVICE_SHARD, SERVICE_WORKER))
    request = gateway.span(telemetry.SPAN_REQUEST, expertfleet__request_id="req-1")
    generate = shard.span(telemetry.SPAN_GENERATE, parent=request, at_s=0.1)
    worker.span(telemetry.SPAN_EXPERT, parent=generate, at_s=0.2)
    gateway.span(telemetry.SPAN_REQUEST, expertfleet__request_id="req-2")
    for key in (trace_id_of(request), trace_id_of(request).upper(), "req-1"):
        found = find_trace_spans(tmp_path, key)
        assert found is not None
        assert found.trace_id == trace_id_of(request)
        assert [span.service for span in found.spans] == [
            SERVICE_GATEWAY,
            SERVICE_SHARD,
            SERVICE_WORKER,
        ]
        assert not found.is_truncated


@pytest.mark.parametrize("key", ["req-", "eq-1", 'req-1"', "f" * 32, "", "req-9"])
def test_another_id_finds_nothing(writer: Callable[..., Writer], tmp_path: Path, key: str) -> None:
    writer(SERVICE_GATEWAY).span(telemetry.SPAN_REQUEST, expertfleet__request_id="req-1")
    assert find_trace_spans(tmp_path, key) is None
    assert find_trace_spans(tmp_path / "absent", key) is None


def test_a_request_is_found_by_the_id_of_its_answer_and_by_one_that_looks_like_a_trace_id(
    writer: Callable[..., Writer], tmp_path: Path
) -> None:
    gateway = writer(SERVICE_GATEWAY)
    hexadecimal = "0123456789abcdef" * 2
    request = gateway.span(
        telemetry.SPAN_REQUEST, expertfleet__request_id=hexadecimal, gen_ai__response__id="cmpl-7"
    )
    for key in (hexadecimal, "cmpl-7"):
        found = find_trace_spans(tmp_path, key)
        assert found is not None
        assert found.trace_id == trace_id_of(request)


def test_steps_of_other_traces_that_link_to_it_are_opened(
    writer: Callable[..., Writer], tmp_path: Path
) -> None:
    gateway, shard, worker = map(writer, (SERVICE_GATEWAY, SERVICE_SHARD, SERVICE_WORKER))
    mine, other = (gateway.span(telemetry.SPAN_REQUEST) for _ in range(2))
    # A span that names the trace otherwise than by a link of a step is no step of it.
    shard.span("noise", parent=other, note=trace_id_of(mine))
    step = shard.span(telemetry.SPAN_STEP, parent=other, at_s=0.3, links=[mine])
    layers = [
        shard.span(telemetry.SPAN_LAYER, parent=step, at_s=0.4 + 0.1 * layer) for layer in range(2)
    ]
    dispatch = shard.span(telemetry.SPAN_DISPATCH, parent=layers[0], at_s=0.45)
    worker.span(telemetry.SPAN_EXPERT, parent=dispatch, at_s=0.46)
    shard.span(telemetry.SPAN_STEP, parent=other, at_s=0.9)
    found = find_trace_spans(tmp_path, trace_id_of(mine))
    assert found is not None
    assert [span.name for span in found.spans] == [telemetry.SPAN_REQUEST]
    (opened,) = found.linked_steps
    assert opened[0].name == telemetry.SPAN_STEP
    assert sorted(span.name for span in opened[1:]) == sorted(
        [telemetry.SPAN_LAYER, telemetry.SPAN_LAYER, telemetry.SPAN_DISPATCH, telemetry.SPAN_EXPERT]
    )


def test_files_are_not_read_further_back_than_the_trace_began(
    writer: Callable[..., Writer], tmp_path: Path
) -> None:
    shard, old_worker = writer(SERVICE_SHARD), writer(SERVICE_WORKER, "old")
    for old in (shard, old_worker):
        old.span(telemetry.SPAN_GENERATE, at_s=-3600)
        line = old.path.read_bytes()
        old.path.write_bytes(line * ((8 << 20) // len(line)))
    os.utime(old_worker.path, ns=(BEGIN_NS - 3600 * SECOND, BEGIN_NS - 3600 * SECOND))
    request = writer(SERVICE_GATEWAY).span(telemetry.SPAN_REQUEST)
    shard.span(telemetry.SPAN_GENERATE, parent=request)
    found = find_trace_spans(tmp_path, trace_id_of(request), max_read_bytes=3 << 20)
    assert found is not None
    assert len(found.spans) == 2
    assert not found.is_truncated


def test_a_lookup_reads_no_more_than_it_may(writer: Callable[..., Writer], tmp_path: Path) -> None:
    shard = writer(SERVICE_SHARD)
    request = shard.span(telemetry.SPAN_GENERATE)
    shard.span("filler", note="x" * 1000)
    first, filler = shard.path.read_bytes().splitlines(keepends=True)
    shard.path.write_bytes(first + filler * (3 << 10))
    assert find_trace_spans(tmp_path, trace_id_of(request), max_read_bytes=2 << 20) is None
    assert find_trace_spans(tmp_path, trace_id_of(request), max_read_bytes=8 << 20) is not None


def test_lines_over_chunks_torn_lines_and_rotated_files_are_read(
    writer: Callable[..., Writer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_files, "_CHUNK_BYTES", 64)
    shard = writer(SERVICE_SHARD)
    request = shard.span(telemetry.SPAN_GENERATE)
    names = ["a", "b", "c" * 500, "d"]
    for name in names[:2]:
        shard.span(name, parent=request)
    shard.path.rename(f"{shard.path}.1")
    for name in names[2:]:
        shard.span(name, parent=request)
    with shard.path.open("ab") as file:
        file.write(b'{"trace_id":"' + trace_id_of(request).encode() + b'","span')
    found = find_trace_spans(tmp_path, trace_id_of(request))
    assert found is not None
    assert sorted(span.name for span in found.spans) == sorted([telemetry.SPAN_GENERATE, *names])


def test_more_spans_than_are_told_are_said_to_be_left_out(
    writer: Callable[..., Writer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_files, "MAX_LINKED_STEPS", 2)
    gateway, shard = writer(SERVICE_GATEWAY), writer(SERVICE_SHARD)
    mine, other = (gateway.span(telemetry.SPAN_REQUEST) for _ in range(2))
    for number in range(3):
        shard.span(telemetry.SPAN_STEP, parent=other, at_s=number, links=[mine])
    found = find_trace_spans(tmp_path, trace_id_of(mine))
    assert found is not None
    assert found.is_truncated
    assert [(step[0].start_ns - BEGIN_NS) / SECOND for step in found.linked_steps] == [0, 1]


def test_the_newest_requests_come_first_from_all_gateways(
    writer: Callable[..., Writer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_files, "_SMALL_CHUNK_BYTES", 512)
    gateways = [writer(SERVICE_GATEWAY, str(number)) for number in range(2)]
    requests = [
        gateways[number % 2].span(telemetry.SPAN_REQUEST, at_s=number) for number in range(20)
    ]
    writer(SERVICE_SHARD).span(telemetry.SPAN_GENERATE, at_s=100)
    newest = newest_requests(tmp_path, 5)
    assert [span.trace_id for span in newest] == [trace_id_of(r) for r in requests[:-6:-1]]
    assert len(newest_requests(tmp_path, 100)) == 20
    assert newest_requests(tmp_path / "absent", 5) == []


def test_the_trace_id_of_a_line_is_where_it_is_written(
    writer: Callable[..., Writer], tmp_path: Path
) -> None:
    shard = writer(SERVICE_SHARD)
    span = shard.span("any")
    assert trace_id_of_line(shard.path.read_bytes()) == trace_id_of(span)
    assert trace_id_of_line(b"{}") == ""
