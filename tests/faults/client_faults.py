"""Clients that send nonsense, do not read, go away, or come in crowds."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from services.cli.load.client import LoadClient
from tests.faults.fault import Fault, Trial

ROW = "over-long prompts, bad JSON, ..., slow clients, disconnects, 10x overload"
MEMORY_BOUND_BYTES = 256 << 20
"""What gateway and shards together may grow by."""
NUM_CROWD = 320
_PATH = "/v1/completions"
_NUM_SLOW = 24
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRequest:
    """What is sent, and the statuses that are right answers to it."""

    name: str
    body: bytes
    statuses: tuple[int, ...] = (400,)
    path: str = _PATH
    content_type: str = "application/json"


def _body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "def f():\n", "max_tokens": 4} | fields).encode()


BAD_REQUESTS = (
    BadRequest(name="prompt longer than the context", body=_body(prompt=[7] * 9000)),
    BadRequest(name="more tokens than the context", body=_body(max_tokens=100_000)),
    BadRequest(name="no JSON", body=b"{not json"),
    BadRequest(name="cut JSON", body=_body()[:-1]),
    BadRequest(name="an empty body", body=b""),
    BadRequest(name="bytes that are no text", body=b'{"prompt": "\xff\xfe"}'),
    BadRequest(name="brackets without end", body=b"[" * 100_000),
    BadRequest(name="a prompt that is a number", body=_body(prompt=5)),
    BadRequest(name="a prompt of mixed types", body=_body(prompt=["a", 3])),
    BadRequest(name="a token that does not exist", body=_body(prompt=[10**9])),
    BadRequest(name="a temperature that is text", body=_body(temperature="hot")),
    BadRequest(name="a negative count", body=_body(max_tokens=-3)),
    BadRequest(name="a session id of wrong form", body=_body(session_id="../../etc/passwd")),
    BadRequest(name="an unknown model", body=_body(model="no-such-model"), statuses=(404,)),
    BadRequest(name="an unknown path", body=_body(), path="/v1/complete", statuses=(404,)),
    BadRequest(name="no JSON type", body=_body(), content_type="text/plain", statuses=(415,)),
    BadRequest(name="a huge body", body=_body(prompt="x" * (8 << 20)), statuses=(413,)),
)


@contextmanager
def _bad_requests(trial: Trial) -> Iterator[None]:
    def send_all(done: threading.Event) -> None:
        seen: Counter[int] = Counter()
        with httpx.Client(base_url=trial.scene.url, timeout=30) as client:
            while not done.wait(0.05):
                for bad in trial.random.sample(BAD_REQUESTS, len(BAD_REQUESTS)):
                    seen[_send(client, bad, trial)] += 1
                    if done.wait(0.02):
                        break
        trial.remarks.append(f"statuses {dict(sorted(seen.items()))}")

    with _memory_bounded(trial), _running(trial, send_all):
        yield


def _send(client: httpx.Client, bad: BadRequest, trial: Trial) -> int:
    try:
        answer = client.post(bad.path, content=bad.body, headers={"content-type": bad.content_type})
    except httpx.TransportError as error:
        # A server may stop reading a body that it has refused; the client then sees a reset.
        if 413 not in bad.statuses:
            trial.problems.append(f"{bad.name}: {type(error).__name__}")
        return 0
    if answer.status_code not in bad.statuses or not _says_why(answer.content):
        trial.problems.append(f"{bad.name}: HTTP {answer.status_code} {answer.text[:200]!r}")
    return answer.status_code


def _says_why(body: bytes) -> bool:
    try:
        error = json.loads(body)["error"]
        return len(error["message"]) > 8 and bool(error["type"]) and bool(error["code"])
    except (ValueError, KeyError, TypeError):
        return False


@contextmanager
def _slow_clients(trial: Trial) -> Iterator[None]:
    """Some never read what they asked for, some never finish asking."""
    with _memory_bounded(trial), ExitStack() as connections:
        for number in range(_NUM_SLOW):
            connection = connections.enter_context(_connect(trial, receive_bytes=4096))
            prompt = [10 + number, 11, 12]
            request = _http_request(prompt, max_tokens=1024, n=4)
            with suppress(OSError):
                connection.sendall(request if number % 2 else request[: len(request) // 2])
        yield


@contextmanager
def _disconnects(trial: Trial) -> Iterator[None]:
    """Clients leave after the first bytes of their answer, every second one with a reset."""

    def come_and_go(done: threading.Event) -> None:
        num_gone = 0
        while not done.wait(0.02):
            with _connect(trial, receive_bytes=65536) as connection:
                prompt = [trial.random.randrange(3, 2000) for _ in range(50)]
                with suppress(OSError):
                    connection.sendall(_http_request(prompt, max_tokens=512))
                    connection.recv(100)
                if num_gone % 2:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            num_gone += 1
        trial.remarks.append(f"{num_gone} clients left")

    with _memory_bounded(trial), _running(trial, come_and_go):
        yield
    _expect_idle_soon(trial)


def _expect_idle_soon(trial: Trial, timeout_s: float = 10.0) -> None:
    """Requests of clients that are gone must not be computed to their end."""
    bound, running = 40, 0
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        running = sum(each["num_running"] + each["num_waiting"] for each in trial.scene.shards())
        if running <= bound:
            return
        time.sleep(0.5)
    trial.problems.append(f"{running} sequences still run after their clients left")


@contextmanager
def _crowd(trial: Trial) -> Iterator[None]:
    """Ten times the load's streams ask at once."""

    def ask(_: threading.Event) -> None:
        outcomes = asyncio.run(_ask_at_once(trial))
        trial.remarks.append(", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())))
        if not outcomes["refused"]:
            trial.problems.append("nobody was refused")

    with _memory_bounded(trial), _running(trial, ask):
        yield


async def _ask_at_once(trial: Trial) -> Counter[str]:
    client = LoadClient(trial.scene.url, model=None, api_key=None, timeout_s=120)
    outcomes: Counter[str] = Counter()

    async def ask(seed: float) -> None:
        generator = random.Random(seed)
        prompt = [generator.randrange(3, 2000) for _ in range(generator.randrange(200, 800))]
        record = await client.complete(prompt, 32)
        if record.error is None:
            outcomes["answered"] += 1
        elif record.error.startswith(("HTTP 429: ", "HTTP 503: ")) and len(record.error) > 20:
            outcomes["refused"] += 1
        else:
            outcomes["failed"] += 1
            trial.problems.append(f"of the crowd: {record.error}")

    try:
        await asyncio.gather(*(ask(trial.random.random()) for _ in range(NUM_CROWD)))
    finally:
        await client.close()
    return outcomes


@contextmanager
def _running(trial: Trial, work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` on a thread; it returns soon after its event is set, or when it is done."""
    done = threading.Event()

    def run() -> None:
        try:
            work(done)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: told in the report
            trial.problems.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name="clients")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _memory_bounded(trial: Trial) -> Iterator[None]:
    before = _front_bytes(trial)
    if len(before) < 2:
        trial.problems.append(f"gateway and shards were not found: {before}")
    yield
    grown = {pid: now - before[pid] for pid, now in _front_bytes(trial).items() if pid in before}
    trial.remarks.append(f"gateway and shards grew by {sum(grown.values()) >> 20} MiB")
    if sum(grown.values()) > MEMORY_BOUND_BYTES:
        trial.problems.append(f"gateway and shards grew by {sum(grown.values()) >> 20} MiB")


def _front_bytes(trial: Trial) -> dict[int, int]:
    found = {}
    for pid, role in trial.scene.processes().items():
        if role in ("gateway", "shard", "serve"):
            with suppress(psutil.Error):
                found[pid] = psutil.Process(pid).memory_info().rss
    return found


@contextmanager
def _connect(trial: Trial, *, receive_bytes: int) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", trial.scene.product.port))
        yield connection


def _http_request(prompt: list[int], **fields: Any) -> bytes:
    wanted = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
    body = json.dumps(wanted).encode()
    head = f"POST {_PATH} HTTP/1.1\r\nhost: lab\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


FAULTS = (
    Fault(
        name="bad-requests",
        row=ROW,
        what=f"{len(BAD_REQUESTS)} kinds of wrong requests, about 20 a second",
        inject=_bad_requests,
    ),
    Fault(
        name="slow-clients",
        row=ROW,
        what=f"{_NUM_SLOW} clients that do not read their answers or do not finish asking",
        inject=_slow_clients,
    ),
    Fault(
        name="disconnects",
        row=ROW,
        what="clients that leave after the first bytes of long answers, again and again",
        inject=_disconnects,
    ),
    Fault(
        name="overload",
        row=ROW,
        what=f"{NUM_CROWD} more clients ask at once",
        inject=_crowd,
        hold_s=10.0,
        is_refusal_right=True,
    ),
)
