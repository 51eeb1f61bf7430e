"""The state folder of one running product: logs, local traces, the instance lock.

    STATE_DIR/instance.lock   held while the product runs
    STATE_DIR/instance.json   pid, url, run folder
    STATE_DIR/logs/*.log      one file per process
    STATE_DIR/traces/*.jsonl  spans, where no OTLP endpoint is set

Sockets and Ray's files lie in a run folder that is removed at the end: inside the state folder
where its path is short enough for Unix sockets, else under the system's temporary folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from services.core.errors import ConfigurationError

LONGEST_RUN_FOLDER = 40
"""Ray appends up to 66 characters for its sockets; Linux allows 107 in all."""
LOG_BYTES_KEPT = 16 << 20


def default_state_dir() -> Path:
    return Path.home() / ".local" / "state" / "expertfleet"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningInstance:
    """What a running product tells about itself."""

    pid: int
    url: str
    run_folder: Path

    @property
    def control_socket(self) -> Path:
        return control_socket(self.run_folder)

    @staticmethod
    def find(state_dir: Path) -> RunningInstance:
        """Raises `ConfigurationError` when no product runs with this state folder."""
        path = state_dir.expanduser().resolve()
        try:
            told = json.loads((path / "instance.json").read_text())
            instance = RunningInstance(
                pid=int(told["pid"]), url=str(told["url"]), run_folder=Path(told["run_folder"])
            )
            os.kill(instance.pid, 0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"no `expertfleet up` runs with the state folder {path}; name its folder with "
                "--state-dir",
                setting="state_dir",
            ) from error
        return instance


def control_socket(run_folder: Path) -> Path:
    """Where a running product listens to commands such as `expertfleet restart`."""
    return run_folder / "control.sock"


class StateFolder:
    """Locked from construction until `close`. Raises `ConfigurationError` if in use."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (self.path / "instance.lock").open("w")
        except OSError as error:
            raise ConfigurationError(
                f"the state folder {self.path} cannot be written ({error.strerror}); "
                "name another with --state-dir",
                setting="state_dir",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            running = self._read()
            raise ConfigurationError(
                f"another instance (pid {running.get('pid', '?')}, {running.get('url', '?')}) "
                f"runs with the state folder {self.path}; stop it or name another with --state-dir",
                setting="state_dir",
            ) from error
        self._remove_leftover()
        self.run_folder = self._make_run_folder()

    def record(self, *, url: str) -> None:
        """Tell later commands, and the next start, about this instance."""
        (self.path / "instance.json").write_text(
            json.dumps({"pid": os.getpid(), "url": url, "run_folder": str(self.run_folder)})
        )

    def log_file(self, name: str) -> Path:
        """Path of a process's log; one that has grown large is set aside once."""
        path = self.path / "logs" / f"{name}.log"
        if path.exists() and path.stat().st_size > LOG_BYTES_KEPT:
            path.replace(path.with_suffix(".log.1"))
        return path

    def close(self) -> None:
        shutil.rmtree(self.run_folder, ignore_errors=True)
        for name in ("instance.json", "instance.lock"):
            (self.path / name).unlink(missing_ok=True)
        self._lock.close()

    def _read(self) -> dict[str, object]:
        try:
            return dict(json.loads((self.path / "instance.json").read_text()))
        except (OSError, ValueError):
            return {}

    def _remove_leftover(self) -> None:
        # A run that was killed outright could not remove its folder.
        leftover = self._read().get("run_folder")
        if isinstance(leftover, str) and Path(leftover).name.startswith("expertfleet-run-"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _make_run_folder(self) -> Path:
        inside = self.path / "expertfleet-run-0"
        if len(str(inside)) <= LONGEST_RUN_FOLDER:
            shutil.rmtree(inside, ignore_errors=True)
            inside.mkdir(mode=0o700)
            folder = inside
        else:
            folder = Path(tempfile.mkdtemp(prefix="expertfleet-run-"))
        self.run_folder = folder
        self.record(url="starting")
        return folder
