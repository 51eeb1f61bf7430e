"""A process with a shard's real server and no model: `python -m tests.support.shard_process`.

Its tokens are their own positions, one every `TOKEN_S`. With the argument `hold` a request whose
prompt begins with `HELD` gets `NUM_BEFORE_HOLD` of them and no more. It prints the port it listens
on, then a line for each request that ends: "finished" or "aborted".
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from router_service.shard_server import ShardServer
from services.core.generation import (
    FinishReason,
    GenerateRequest,
    GenerationDelta,
    SessionInfo,
)

TOKEN_S = 0.02
HELD = 1
NUM_BEFORE_HOLD = 4


class CountingShard:
    def __init__(self, *, holds: bool) -> None:
        self._holds = holds

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        first = len(request.resumed[0].token_ids) if request.resumed else 0
        last = request.sampling.max_tokens - 1
        is_held = self._holds and request.prompt_token_ids[0] == HELD
        ending = "aborted"
        try:
            for position in range(first, last + 1):
                await asyncio.sleep(TOKEN_S)
                if is_held and position == NUM_BEFORE_HOLD:
                    await asyncio.Event().wait()
                reason: FinishReason | None = "length" if position == last else None
                yield (GenerationDelta(index=0, token_ids=(position,), finish_reason=reason),)
            ending = "finished"
        finally:
            sys.stdout.write(f"{ending}\n")
            sys.stdout.flush()

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        return None

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        return False

    async def check_ready(self) -> None:
        return None


@dataclass(kw_only=True)
class ShardProcess:
    process: subprocess.Popen[str]
    endpoint: str
    endings: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running_shard(*, holds: bool = False) -> Iterator[ShardProcess]:
    """Killed at the end, also when it is stopped."""
    command = [sys.executable, "-m", "tests.support.shard_process", *["hold"] * holds]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        shard = ShardProcess(process=process, endpoint=f"127.0.0.1:{port}")
        reader = threading.Thread(target=_note_endings, args=(shard,), daemon=True)
        reader.start()
        yield shard
    finally:
        process.kill()
        process.wait()


def _note_endings(shard: ShardProcess) -> None:
    assert shard.process.stdout is not None
    for line in shard.process.stdout:
        shard.endings.append(line.strip())


def main() -> None:
    server = ShardServer(CountingShard(holds="hold" in sys.argv), host="127.0.0.1")
    sys.stdout.write(f"{server.start()}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
