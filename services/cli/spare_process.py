"""A process that has imported what an expert worker needs, for the next worker that starts.

Importing takes seconds of a core, which after a death or at the onset of a load nobody has to
spare. A spare takes memory (most of which it shares with the workers) and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from services.cli.child import ChildSpec, end_group, spawn_process
from services.cli.startup import memory_available

RENEW_AFTER_S = 5.0
"""From when a spare was wanted until there is another: whatever called for the first is over."""
WORKER_COMMAND = (sys.executable, "-m", "expert_service")
_SPARE_COMMAND = (*WORKER_COMMAND[:-1], "expert_service.spare")
_LEAST_MEMORY_LEFT = 2 << 30
_logger = logging.getLogger(__name__)


class SpareProcess:
    """`spawn` starts children; one whose command is a worker's becomes the spare, if that is there.

    Without `start` there is none, nor where memory is short, until the next worker is started.
    A spare runs the code that it was started with: call `renew` where that may have changed.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        log_file: Path,
        *,
        renew_after_s: float = RENEW_AFTER_S,
    ) -> None:
        """`environment` is what must be set when a worker's process begins."""
        self._spec = ChildSpec(
            name="spare", command=_SPARE_COMMAND, log_file=log_file, environment=environment
        )
        self._renew_after_s = renew_after_s
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of a spare that is ready."""
        is_made = self._keeping is not None and self._keeping.done()
        return self._process.pid if self._process is not None and is_made else None

    def status(self) -> list[dict[str, object]]:
        """Of the spare, if there is one."""
        if self.pid is None:
            return []
        return [{"name": "spare", "pid": self.pid, "state": "ready", "restarts": 0, "holds": ""}]

    def start(self) -> None:
        """Have a spare from now on."""
        self._keeping = asyncio.create_task(self._make_one(), name="spare-process")

    async def renew(self) -> None:
        """End the spare; there will be another."""
        if self._keeping is not None:
            await self.stop()
            self.start()

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
            self._keeping = None
        await self._end()

    async def spawn(self, spec: ChildSpec) -> asyncio.subprocess.Process:
        process = await self._take(spec)
        return process if process is not None else await spawn_process(spec)

    async def _take(self, spec: ChildSpec) -> asyncio.subprocess.Process | None:
        command = tuple(spec.command)
        if command[: len(WORKER_COMMAND)] != WORKER_COMMAND:
            return None
        if self._keeping is None or not self._keeping.done():
            return None
        process, self._process = self._process, None
        self.start()
        if process is None or process.returncode is not None:
            return None
        role = {
            "name": spec.name,
            "arguments": command[len(WORKER_COMMAND) :],
            "environment": os.environ | spec.environment,
            "log_file": str(spec.log_file),
        }
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(role).encode() + b"\n")
            await process.stdin.drain()
            process.stdin.close()
        except (BrokenPipeError, ConnectionResetError):
            await end_group(process)
            return None
        _logger.info("spare process %d is %s now", process.pid, spec.name)
        return process

    async def _make_one(self) -> None:
        await asyncio.sleep(self._renew_after_s)
        if memory_available() < _LEAST_MEMORY_LEFT:
            return
        self._process = await spawn_process(self._spec, talks=True)
        assert self._process.stdout is not None
        if not await self._process.stdout.readline():
            await self._end()
            _logger.warning("no spare process: it ended at once; see %s", self._spec.log_file)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await end_group(process)
