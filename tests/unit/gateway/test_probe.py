"""What a container's health check says of a gateway."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.gateway import probe

ROOT = Path(__file__).parents[3]


class Gateway(BaseHTTPRequestHandler):
    is_ready = True

    def do_GET(self) -> None:
        ready = self.is_ready and self.path == probe.READY_PATH
        self.send_response(200 if ready else 503)
        self.end_headers()
        self.wfile.write(b"" if ready else b"no shard yet")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Gateway]]:
    handler = type("Handler", (Gateway,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("EXPERTFLEET_HOST", "0.0.0.0")
    monkeypatch.setenv("EXPERTFLEET_PORT", str(server.server_port))
    # A proxy for the outside must not be asked for the container itself.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    yield handler
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_ready_gateway_is_found_by_its_settings(
    gateway: type[Gateway], capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe.main([]) == 0
    assert capsys.readouterr().out.endswith("/readyz answers\n")


def test_a_gateway_that_is_not_ready_fails_with_its_own_words(
    gateway: type[Gateway], capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.is_ready = False
    assert probe.main([]) == 1
    assert "no shard yet" in capsys.readouterr().err


def test_another_address_may_be_asked(gateway: type[Gateway]) -> None:
    assert probe.main(["--url", probe.ready_url()]) == 0
    assert probe.main(["--url", probe.ready_url().replace("/readyz", "/other")]) == 1


def test_an_address_where_nobody_listens_fails_with_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert probe.main(["--url", "http://127.0.0.1:1/readyz"]) == 1
    assert "refused" in capsys.readouterr().err


def test_settings_that_cannot_be_used_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXPERTFLEET_PORT", "none")
    assert probe.main([]) == 1
    assert "EXPERTFLEET_PORT" in capsys.readouterr().err


def test_it_starts_without_what_makes_a_process_slow_to_start() -> None:
    script = (
        "import services.gateway.probe, sys;"
        "print([m for m in ('torch', 'fastapi', 'grpc', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
