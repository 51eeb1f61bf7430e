"""Which workers have given no sign of life for too long. Pure bookkeeping; time is an argument.

A sign is a lease in the registry or an answer to a call. A process that was never seen is starting
and is not judged; one that loads is given longer, since reading weights may keep it from answering.
"""

from __future__ import annotations

from dataclasses import dataclass

LOADING_FACTOR = 8.0
_PAUSE_S = 5.0
"""A gap between two looks that is longer than this is the watcher's own: it was stopped itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sign:
    pid: int
    at: float
    is_loading: bool


class HangWatch:
    """`timeout_s` without a sign is a hang."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._signs: dict[str, _Sign] = {}
        self._looked_at: float | None = None

    def seen(self, name: str, pid: int, now: float, *, is_loading: bool = False) -> None:
        self._signs[name] = _Sign(pid=pid, at=now, is_loading=is_loading)

    def silent(self, pids: dict[str, int], now: float) -> list[str]:
        """Names among the processes that run (`pids`: name to process id) which hang.

        Signs of processes that run no more are forgotten.
        """
        if self._looked_at is not None and now - self._looked_at > _PAUSE_S:
            pause_s = now - self._looked_at
            self._signs = {
                name: _Sign(pid=sign.pid, at=sign.at + pause_s, is_loading=sign.is_loading)
                for name, sign in self._signs.items()
            }
        self._looked_at = now
        self._signs = {
            name: sign for name, sign in self._signs.items() if pids.get(name) == sign.pid
        }
        return [name for name, sign in self._signs.items() if now - sign.at > self._bound_s(sign)]

    def _bound_s(self, sign: _Sign) -> float:
        return self._timeout_s * (LOADING_FACTOR if sign.is_loading else 1.0)
