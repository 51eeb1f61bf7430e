"""How processes log: one line per record, ready for a file or a collector."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

_QUIET_LOGGERS = (
    "asyncio",
    "filelock",
    "fsspec",
    "grpc",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "opentelemetry",
    "urllib3",
    "uvicorn.access",
)


def configure_logging(level: str, *, service: str, instance: str, file: Path | None = None) -> None:
    """Log from `level` ("debug" to "error") on, replacing what handlers the root logger had.

    To stderr, or appending to `file`, whose folder is made. Libraries that talk on every request
    are heard from "warning" on.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file)
    handler.setFormatter(LineFormatter(service=service, instance=instance))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    logging.captureWarnings(True)


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z WARNING service[instance] logger: message`, time in UTC.

    Line breaks in a message are escaped, so that no input can forge a record. A traceback follows
    on lines of its own, indented.
    """

    def __init__(self, *, service: str, instance: str) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime
        self._origin = f"{service}[{instance}]"

    def format(self, record: logging.LogRecord) -> str:
        moment = f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z"
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{moment} {record.levelname} {self._origin} {record.name}: {message}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join(f"\n    {text}" for text in trace.splitlines())
        return line
