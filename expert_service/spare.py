"""`python -m expert_service.spare`: a worker-to-be that has imported everything and waits.

It writes a line when it is ready, and reads one line of JSON: a name, the arguments of `python -m
expert_service`, its whole environment, and the file that its output goes to. From then on it is
that worker. Where the input ends without a line it ends too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import threading
from pathlib import Path

READY = b"ready\n"
_LOWEST_PRIORITY = 19
_PR_SET_NAME = 15


def main() -> int:
    has_imported = threading.Event()
    importing = threading.Thread(target=_import_worker, args=(has_imported,), name="import")
    importing.start()
    importing.join()
    if not has_imported.is_set():
        return 1
    os.write(sys.stdout.fileno(), READY)
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    role = json.loads(line)
    _redirect(role["log_file"])
    _show_as(role["name"])
    os.environ.clear()
    os.environ.update(role["environment"])
    sys.argv[1:] = role["arguments"]
    from expert_service.__main__ import main as become_worker

    return become_worker()


def _import_worker(has_imported: threading.Event) -> None:
    """It takes a core for two seconds, and nobody waits for it. On Linux a thread has a priority of
    its own, which only root could raise again, and a session may have one too, which can be."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_PRIORITY)
    _set_session_priority(_LOWEST_PRIORITY)
    import expert_service.__main__  # noqa: F401

    _set_session_priority(0)
    has_imported.set()


def _set_session_priority(value: int) -> None:
    """sched(7), autogroups; nothing where there are none."""
    with contextlib.suppress(OSError), Path("/proc/self/autogroup").open("w") as group:
        group.write(str(value))


def _redirect(log_file: str) -> None:
    with Path(os.devnull).open("rb") as nothing, Path(log_file).open("ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _show_as(name: str) -> None:
    """In the lists of ps and top, whose other columns still say what it began as."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


if __name__ == "__main__":
    sys.exit(main())
