from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import Link, Status, StatusCode

from services.core.span_file import SpanFileExporter, read_spans


@pytest.fixture
def tracer() -> Iterator[trace.Tracer]:
    origin = Resource({"service.name": "svc", "service.instance.id": "i1"})
    provider = TracerProvider(resource=origin, shutdown_on_exit=False)
    yield provider.get_tracer("test")


def ended(tracer: trace.Tracer, name: str, **attributes: object) -> ReadableSpan:
    span = tracer.start_span(name, context=Context(), attributes=attributes)  # type: ignore[arg-type]
    span.end()
    assert isinstance(span, ReadableSpan)
    return span


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_span_is_read_back_as_it_was(tracer: trace.Tracer, tmp_path: Path) -> None:
    parent = tracer.start_span("parent", context=Context())
    link = Link(tracer.start_span("linked", context=Context()).get_span_context())
    child = tracer.start_span(
        "child\n\u2028ü",
        context=trace.set_span_in_context(parent),
        start_time=1_700_000_000_123_456_789,
        attributes={"text": 'a"b\n', "number": 3, "share": 0.25, "flag": True, "many": [1, 2]},
        links=[link],
    )
    child.set_status(Status(StatusCode.ERROR, "it broke"))
    child.end(end_time=1_700_000_001_123_456_789)
    exporter = SpanFileExporter(tmp_path / "traces" / "svc-i1.jsonl", max_bytes=1 << 20)
    assert isinstance(child, ReadableSpan)
    assert exporter.export([child]) is SpanExportResult.SUCCESS

    (record,) = read_spans(tmp_path / "traces")
    context, parent_context = child.get_span_context(), parent.get_span_context()
    assert context is not None
    assert record.trace_id == f"{context.trace_id:032x}"
    assert record.span_id == f"{context.span_id:016x}"
    assert record.parent_id == f"{parent_context.span_id:016x}"
    assert (record.name, record.service, record.instance) == ("child\n\u2028ü", "svc", "i1")
    assert record.start_ns == 1_700_000_000_123_456_789
    assert record.duration_ms == 1000.0
    assert record.attributes == {
        "text": 'a"b\n',
        "number": 3,
        "share": 0.25,
        "flag": True,
        "many": (1, 2),
    }
    assert record.links == ((f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}"),)
    assert record.error == "it broke"


def test_the_files_stay_within_their_bound_and_keep_the_newest(
    tracer: trace.Tracer, tmp_path: Path
) -> None:
    exporter = SpanFileExporter(tmp_path / "svc-i1.jsonl", max_bytes=20_000)
    for batch in range(60):
        spans = [ended(tracer, f"{batch}.{number}", filler="x" * 50) for number in range(7)]
        assert exporter.export(spans) is SpanExportResult.SUCCESS
        assert total_bytes(tmp_path) <= 20_000
    names = [record.name for record in read_spans(tmp_path)]
    assert total_bytes(tmp_path) > 10_000
    written = [f"{batch}.{number}" for batch in range(60) for number in range(7)]
    assert len(names) > 20
    assert names == written[-len(names) :]


def test_a_batch_larger_than_the_file_is_spread_and_a_monstrous_span_left_out(
    tracer: trace.Tracer, tmp_path: Path
) -> None:
    exporter = SpanFileExporter(tmp_path / "svc-i1.jsonl", max_bytes=8_000)
    spans = [ended(tracer, str(number)) for number in range(100)]
    spans.insert(50, ended(tracer, "monster", filler="x" * 10_000))
    assert exporter.export(spans) is SpanExportResult.SUCCESS
    names = [record.name for record in read_spans(tmp_path)]
    assert total_bytes(tmp_path) <= 8_000
    assert names == [str(number) for number in range(100)][-len(names) :]


def test_torn_and_foreign_lines_are_passed_over(tracer: trace.Tracer, tmp_path: Path) -> None:
    path = tmp_path / "svc-i1.jsonl"
    exporter = SpanFileExporter(path, max_bytes=1 << 20)
    exporter.export([ended(tracer, "first")])
    line = path.read_bytes()
    path.write_bytes(
        line + b'[1]\nnull\n"x"\n{}\n\xff\xfe\n\n' + line[: len(line) // 2] + b"\n" + line
    )
    assert [record.name for record in read_spans(tmp_path)] == ["first", "first"]
    assert list(read_spans(tmp_path / "missing")) == []


def test_files_that_cannot_be_written_are_reported_once_per_outage(
    tracer: trace.Tracer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "traces"
    blocker.write_text("a file where the folder should be")
    exporter = SpanFileExporter(blocker / "svc-i1.jsonl", max_bytes=1 << 20)
    for _ in range(5):
        assert exporter.export([ended(tracer, "lost")]) is SpanExportResult.FAILURE
    assert len(caplog.records) == 1
    assert "spans are dropped" in caplog.records[0].getMessage()
    blocker.unlink()
    assert exporter.export([ended(tracer, "kept")]) is SpanExportResult.SUCCESS
    assert [record.name for record in read_spans(blocker)] == ["kept"]
    for path in blocker.iterdir():
        path.unlink()
    blocker.rmdir()
    blocker.write_text("again")
    assert exporter.export([ended(tracer, "lost")]) is SpanExportResult.FAILURE
    assert len(caplog.records) == 2


def test_a_disk_that_fills_up_leaves_whole_lines(
    tracer: trace.Tracer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "svc-i1.jsonl"
    exporter = SpanFileExporter(path, max_bytes=1 << 20)
    exporter.export([ended(tracer, "before")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        assert exporter.export([ended(tracer, "lost")]) is SpanExportResult.FAILURE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "only 10 of" in caplog.text
    assert exporter.export([ended(tracer, "after")]) is SpanExportResult.SUCCESS
    assert [record.name for record in read_spans(tmp_path)] == ["before", "after"]
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_no_space_left_is_said_and_never_raised(
    tracer: trace.Tracer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "svc-i1.jsonl").symlink_to("/dev/full")
    exporter = SpanFileExporter(tmp_path / "svc-i1.jsonl", max_bytes=1 << 20)
    assert exporter.export([ended(tracer, "lost")]) is SpanExportResult.FAILURE
    assert os.strerror(errno.ENOSPC) in caplog.text


def test_deleting_the_folder_under_a_running_process_is_safe(
    tracer: trace.Tracer, tmp_path: Path
) -> None:
    folder = tmp_path / "traces"
    exporter = SpanFileExporter(folder / "svc-i1.jsonl", max_bytes=1 << 20)
    exporter.export([ended(tracer, "first")])
    (folder / "svc-i1.jsonl").unlink()
    folder.rmdir()
    assert exporter.export([ended(tracer, "second")]) is SpanExportResult.SUCCESS
    assert [record.name for record in read_spans(folder)] == ["second"]


def test_restarts_do_not_fill_the_folder(tracer: trace.Tracer, tmp_path: Path) -> None:
    for number in range(100):
        path = tmp_path / f"svc-{number}.jsonl"
        path.write_bytes(b"{}\n")
        os.utime(path, (number, number))
    (tmp_path / "notes.txt").write_text("not ours")
    exporter = SpanFileExporter(tmp_path / "svc-new.jsonl", max_bytes=1 << 20)
    exporter.export([ended(tracer, "new")])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"svc-new.jsonl", "svc-99.jsonl", "notes.txt"} <= names
    assert "svc-0.jsonl" not in names
    assert len(names) == 66


def test_events_of_a_span_are_read_back(tracer: trace.Tracer, tmp_path: Path) -> None:
    span = tracer.start_span("eventful", context=Context())
    span.add_event("lost", {"reason": "died", "ids": [1, 2]}, timestamp=1_700_000_000_000_000_007)
    span.end()
    assert isinstance(span, ReadableSpan)
    SpanFileExporter(tmp_path / "svc-i1.jsonl", max_bytes=1 << 20).export([span])
    (record,) = read_spans(tmp_path)
    (event,) = record.events
    assert (event.name, event.at_ns) == ("lost", 1_700_000_000_000_000_007)
    assert event.attributes == {"reason": "died", "ids": (1, 2)}
