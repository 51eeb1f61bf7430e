"""The product as its users start it: `expertfleet up` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

REPOSITORY = Path(__file__).parents[2]
DEMO_MODEL = REPOSITORY / "models" / "demo"
READY_TIMEOUT_S = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Product:
    """Started by `start`, ended by `stop`; `environment` is added to this process's."""

    def __init__(
        self,
        state_dir: Path,
        *arguments: str,
        model: Path = DEMO_MODEL,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "services.cli", "up", "--model", str(model)]
        self._command += ["--port", str(self.port), "--state-dir", str(state_dir), *arguments]
        self._environment = environment or {}
        self.process: subprocess.Popen[str] | None = None
        self.start_s = 0.0

    def start(self) -> Product:
        """Return once `/readyz` says so; raise with the output and logs if it does not."""
        try:
            return self._start()
        except BaseException:  # also where the test's own time is over
            if self.process is not None:
                self.stop()
            raise

    def _start(self) -> Product:
        started_at = time.monotonic()
        self.launch()
        assert self.process is not None
        deadline = started_at + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.logs()}")
            if self.is_ready():
                self.start_s = time.monotonic() - started_at
                return self
            time.sleep(0.2)
        raise AssertionError(f"not ready after {READY_TIMEOUT_S} s:\n{self.logs()}")

    def launch(self) -> None:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        with self._output_file.open("w") as output:
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | self._environment,
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=30).is_success
        except httpx.HTTPError:
            return False

    def stop(self, number: signal.Signals = signal.SIGINT) -> float:
        """Ask it to end; returns the seconds that took. Kills what is left after 30 s."""
        assert self.process is not None
        started = time.monotonic()
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        elapsed_s = time.monotonic() - started
        for process in family:
            if process.is_running():
                process.kill()
        return elapsed_s

    def check_ctrl_c(self) -> None:
        """Press Ctrl-C: after ten seconds nothing runs, listens or lies about any more.

        On a machine so busy that starting took more than half a minute it may take a third of that.
        """
        family = self.family()
        ports = {
            connection.laddr.port
            for process in family
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert self.port in ports
        assert self.stop(signal.SIGINT) <= max(10.0, self.start_s / 3)
        assert [process for process in family if is_alive(process)] == []
        for port in ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0
        left = {path.name for path in self.state_dir.iterdir()}
        assert left <= {"logs", "traces", "up.out"}

    def family(self) -> list[psutil.Process]:
        """Every process it has started, at any depth."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def experts(self) -> dict[str, Any]:
        """`GET /v1/experts`."""
        return dict(httpx.get(f"{self.url}/v1/experts", timeout=30).raise_for_status().json())

    def metric(self, endpoint: str, name: str) -> float:
        """Sum of a metric's samples at a process's own metrics endpoint (host:port)."""
        text = httpx.get(f"http://{endpoint}/metrics", timeout=30).raise_for_status().text
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(name) and line[len(name)] in " {"
        ]
        return sum(values)

    def logs(self) -> str:
        texts = [self._output_file.read_text()]
        for path in sorted((self.state_dir / "logs").glob("*.log")):
            texts.append(f"--- {path.name}\n" + path.read_text(errors="replace")[-3000:])
        return "\n".join(texts)

    @property
    def _output_file(self) -> Path:
        return self.state_dir / "up.out"


def is_alive(process: psutil.Process) -> bool:
    """A zombie has ended; the system's init may take its time to reap an orphan."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
