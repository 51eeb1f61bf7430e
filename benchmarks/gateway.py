"""What gateway and Ray add to a token: `python -m benchmarks.gateway`.

Three sides serve the demo model with its experts in process and take turns: the engine called
directly, gateway and engine in one process under uvicorn (`expertfleet up --no-ray`), and the
whole product on Ray Serve. Each answers one stream at a time, then 32 streams at once:

    TTFT added             = median TTFT of one stream - that of the engine
    time per token added   = (time of all streams' tokens - that of the engine) / tokens

The client is aiohttp on the same cores, so its own work counts as added, too. How much that is,
with uvicorn's, is what a fourth side takes: a server that answers with made-up tokens at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from benchmarks.machine import ForeignLoad, describe_machine
from benchmarks.termination import unwind_on_sigterm
from services.cli.load.client import LoadClient
from tests.support.product import free_port

DEMO = Path(__file__).parents[1] / "models" / "demo"
PROMPT_TOKENS = 32
NUM_STREAMS = 32
READY_TIMEOUT_S = 180.0
TARGET_TTFT_MS, TARGET_TOKEN_MS = 3.0, 0.1
BARE = "client and uvicorn alone"


class Served(Protocol):
    """A side: seconds to the last stream's first token, and from there to the last token."""

    name: str

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[float, float]: ...
    def close(self) -> None: ...


class DirectEngine:
    """The engine in a process of its own, told what to do by lines of JSON."""

    name = "engine"

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.side", "inprocess", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read()

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[float, float]:
        assert self._process.stdin is not None
        job = {"prompts": prompts, "max_tokens": max_tokens}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        result = self._read()
        return float(result["ttft_s"]), float(result["decode_s"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine ended with status {self._process.wait()}")
        return dict(json.loads(line))


class HttpServer:
    """A command that serves on a port, asked over HTTP."""

    def __init__(self, name: str, port: int, *command: str) -> None:
        self.name = name
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait_ready()

    @classmethod
    def product(cls, name: str, model: Path, state_dir: Path, *arguments: str) -> HttpServer:
        """`expertfleet up`."""
        port = free_port()
        command = ["-m", "services.cli", "up", "--model", str(model), "--port", str(port)]
        return cls(name, port, *command, "--state-dir", str(state_dir), "--no-workers", *arguments)

    @classmethod
    def bare(cls) -> HttpServer:
        port = free_port()
        return cls(BARE, port, "-m", "benchmarks.bare_http", str(port))

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[float, float]:
        return asyncio.run(self._stream_all(prompts, max_tokens))

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=60)

    async def _stream_all(
        self, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> tuple[float, float]:
        client = LoadClient(self._url, model=None, api_key=None, timeout_s=120)
        try:
            await client.complete(prompts[0][:1], 1)  # opens the connection
            started_at = time.perf_counter()
            records = await asyncio.gather(
                *(client.complete(prompt, max_tokens) for prompt in prompts)
            )
        finally:
            await client.close()
        for record in records:
            if record.error is not None:
                raise SystemExit(f"{self.name}: {record.error}")
        first = max(record.arrivals[0][0] for record in records)
        return first - started_at, max(record.finished_at for record in records) - first

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SystemExit(f"{self.name} ended with status {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"{self._url}/readyz", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.close()
        raise SystemExit(f"{self.name} was not ready within {READY_TIMEOUT_S:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/performance/gateway.md"))
    arguments = parser.parse_args()
    # Sides are closed also when the benchmark is told to end.
    unwind_on_sigterm()
    generator = random.Random(5)
    ttft: dict[str, list[float]] = {}
    per_token: dict[str, list[float]] = {}
    foreign = []
    with tempfile.TemporaryDirectory(prefix="expertfleet-bench-") as scratch:
        sides: list[Served] = [DirectEngine(arguments.model)]
        try:
            for name, flags in (("uvicorn", ["--no-ray"]), ("Ray Serve", [])):
                folder = Path(scratch) / name.replace(" ", "-").lower()
                sides.append(HttpServer.product(name, arguments.model, folder, *flags))
            sides.append(HttpServer.bare())
            for round_number in range(-1, arguments.rounds):
                load = ForeignLoad([os.getpid()])
                for side in sides:
                    singles = [side.run(_prompts(generator, 1), 1)[0] for _ in range(8)]
                    _, decode_s = side.run(_prompts(generator, NUM_STREAMS), arguments.new_tokens)
                    if round_number >= 0:
                        num_tokens = NUM_STREAMS * (arguments.new_tokens - 1)
                        ttft.setdefault(side.name, []).append(statistics.median(singles) * 1e3)
                        per_token.setdefault(side.name, []).append(decode_s / num_tokens * 1e3)
                foreign.append(load.stop())
        finally:
            for side in sides:
                side.close()
    text = _report(ttft, per_token, foreign, arguments)
    arguments.out.write_text(text)
    sys.stdout.write(text)


def _prompts(generator: random.Random, count: int) -> list[list[int]]:
    return [[generator.randrange(10, 1000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def _report(
    ttft: dict[str, list[float]],
    per_token: dict[str, list[float]],
    foreign: Sequence[float],
    arguments: argparse.Namespace,
) -> str:
    lines = [
        f"Measured {date.today()} on {describe_machine()}.",
        "",
        f"{arguments.model.name}, prompts of {PROMPT_TOKENS} tokens, {arguments.new_tokens} new "
        f"tokens, {arguments.rounds} rounds, foreign CPU {statistics.median(foreign):.0%}; "
        "milliseconds as median (lowest to highest); added: median of the rounds' differences",
        "",
        f"| | TTFT, 1 stream | added (target {TARGET_TTFT_MS:g}) | time per token, {NUM_STREAMS} "
        f"streams | added (target {TARGET_TOKEN_MS:g}) |",
        "|---|---|---|---|---|",
    ]
    for name in ttft:
        cells = [_cell(ttft[name], 1), "", _cell(per_token[name], 3), ""]
        if name not in ("engine", BARE):
            cells[1] = f"{_added(ttft, name):.2f}"
            cells[3] = f"{_added(per_token, name):.3f}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _added(values: dict[str, list[float]], name: str) -> float:
    pairs = zip(values[name], values["engine"], strict=True)
    return statistics.median(mine - engine for mine, engine in pairs)


if __name__ == "__main__":
    main()
