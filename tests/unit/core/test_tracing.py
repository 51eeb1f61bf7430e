from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link

from services.core.errors import ConfigurationError
from services.core.settings import load_settings
from services.core.span_file import read_spans
from services.core.tracing import (
    Tracing,
    configure_tracing,
    extract_context,
    record_span,
    span_carrier,
    span_context,
    trace_folder,
)


@pytest.fixture(autouse=True)
def no_telemetry_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("EXPERTFLEET_", "OTEL_")):
            monkeypatch.delenv(name)


def file_tracing(folder: Path, **settings: object) -> Tracing:
    return configure_tracing(load_settings(state_dir=folder, **settings), "svc", instance_id="i1")


def test_spans_of_a_process_without_a_collector_lie_in_its_state_folder(tmp_path: Path) -> None:
    tracing = file_tracing(tmp_path)
    with tracing.tracer.start_as_current_span("outer", context=Context()) as outer:
        tracing.tracer.start_span("inner", context=span_context(outer)).end()
    tracing.shutdown()
    tracing.shutdown()
    assert (trace_folder(tmp_path) / "svc-i1.jsonl").exists()
    spans = {record.name: record for record in read_spans(trace_folder(tmp_path))}
    assert spans["inner"].parent_id == spans["outer"].span_id
    assert spans["inner"].trace_id == spans["outer"].trace_id
    assert (spans["outer"].service, spans["outer"].instance) == ("svc", "i1")


def test_without_endpoint_and_folder_nothing_is_recorded_and_no_thread_runs() -> None:
    before = threading.active_count()
    tracing = configure_tracing(load_settings(), "svc", instance_id="i1")
    with tracing.tracer.start_as_current_span("x", context=Context()) as span:
        assert not span.is_recording()
        assert span_carrier(span) == {}
    assert not tracing.is_recording
    tracing.flush()
    tracing.shutdown()
    assert threading.active_count() == before


def test_a_process_that_does_not_record_passes_its_callers_context_on(tmp_path: Path) -> None:
    recording = file_tracing(tmp_path)
    carrier = span_carrier(recording.tracer.start_span("x", context=Context()))
    silent = configure_tracing(load_settings(), "svc", instance_id="i1")
    assert span_carrier(silent.tracer.start_span("y", context=extract_context(carrier))) == carrier
    recording.shutdown()


def test_a_context_survives_the_way_through_a_carrier(tmp_path: Path) -> None:
    tracing = file_tracing(tmp_path)
    span = tracing.tracer.start_span("x", context=Context())
    carrier = span_carrier(span)
    version, trace_id, span_id, flags = carrier["traceparent"].split("-")
    assert (version, len(trace_id), len(span_id)) == ("00", 32, 16)
    assert int(flags, 16) & 1
    child = tracing.tracer.start_span("y", context=extract_context(carrier))
    assert child.get_span_context().trace_id == span.get_span_context().trace_id
    tracing.shutdown()


@pytest.mark.parametrize(
    "carrier", [{}, {"traceparent": ""}, {"traceparent": "00-zz-11-01"}, {"tracestate": "a=b"}]
)
def test_a_carrier_without_a_valid_parent_begins_a_trace(
    carrier: dict[str, str], tmp_path: Path
) -> None:
    tracing = file_tracing(tmp_path)
    with tracing.tracer.start_as_current_span("ambient", context=Context()) as ambient:
        span = tracing.tracer.start_span("x", context=extract_context(carrier))
        assert span.get_span_context().trace_id != ambient.get_span_context().trace_id
    span.end()
    tracing.shutdown()
    records = {record.name: record for record in read_spans(trace_folder(tmp_path))}
    assert records["x"].parent_id is None


def test_what_is_over_is_recorded_with_its_own_times_and_can_be_a_parent(tmp_path: Path) -> None:
    tracing = file_tracing(tmp_path)
    other = tracing.tracer.start_span("other", context=Context())
    step = record_span(
        tracing.tracer,
        "step",
        parent=Context(),
        start_ns=1_000_000_000,
        end_ns=3_500_000_000,
        attributes={"n": 3},
        links=[Link(other.get_span_context())],
    )
    record_span(tracing.tracer, "layer", parent=span_context(step), start_ns=1, end_ns=2)
    tracing.shutdown()
    records = {record.name: record for record in read_spans(trace_folder(tmp_path))}
    assert records["step"].duration_ms == 2500
    assert records["step"].start_ns == 1_000_000_000
    assert records["step"].attributes == {"n": 3}
    assert len(records["step"].links) == 1
    assert records["layer"].parent_id == records["step"].span_id


def test_the_ratio_decides_for_roots_and_the_parent_for_children(tmp_path: Path) -> None:
    never = file_tracing(tmp_path / "never", trace_sample_ratio=0.0)
    always = file_tracing(tmp_path / "always", trace_sample_ratio=1.0)
    dropped = never.tracer.start_span("root", context=Context())
    assert not dropped.is_recording()
    follows = always.tracer.start_span("x", context=extract_context(span_carrier(dropped)))
    assert not follows.is_recording()
    kept = always.tracer.start_span("root", context=Context())
    assert never.tracer.start_span("y", context=span_context(kept)).is_recording()
    never.shutdown()
    always.shutdown()


def test_half_of_the_roots_are_sampled_at_a_ratio_of_a_half(tmp_path: Path) -> None:
    tracing = file_tracing(tmp_path, trace_sample_ratio=0.5)
    recorded = sum(
        tracing.tracer.start_span("x", context=Context()).is_recording() for _ in range(2000)
    )
    tracing.shutdown()
    assert 850 < recorded < 1150


def test_the_global_tracer_provider_is_left_alone(tmp_path: Path) -> None:
    before = trace.get_tracer_provider()
    file_tracing(tmp_path).shutdown()
    assert trace.get_tracer_provider() is before


def test_an_unusable_endpoint_names_its_setting() -> None:
    settings = load_settings(otlp_endpoint="ftp://collector")
    with pytest.raises(ConfigurationError, match="EXPERTFLEET_OTLP_ENDPOINT='ftp://collector'"):
        configure_tracing(settings, "svc", instance_id="i1")


def test_a_collector_that_swallows_spans_delays_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        tracing = configure_tracing(load_settings(otlp_endpoint=endpoint), "svc", instance_id="i1")
        began = time.monotonic()
        for _ in range(3000):
            tracing.tracer.start_span("x", context=Context()).end()
        assert time.monotonic() - began < 20.0
        began = time.monotonic()
        tracing.shutdown()
        assert time.monotonic() - began < 20.0
        tracing.tracer.start_span("late", context=Context()).end()
    assert len([record for record in caplog.records if record.levelname != "INFO"]) <= 1


def test_tracing_and_metrics_need_neither_torch_nor_without_a_collector_grpc() -> None:
    code = (
        "import services.core.tracing, services.core.metrics, services.core.trace_report, sys;"
        "print([name for name in ('torch', 'grpc', 'ray') if name in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
