"""Stop strings, found in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of `stops` (none empty) is complete.

    The result does not depend on how the text is cut into pieces: the stop string that is complete
    first wins, and of those complete at the same character the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    @property
    def holds_back(self) -> bool:
        return bool(self._held)

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string ended it (it is not included)."""
        if not self._stops or not text:
            return text, False
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            self._held = ""
            return text[:found], True
        certain = len(text) - max(_possible_start(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        matches = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(matches)[1] if matches else None


def _possible_start(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, shorter than `stop`."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
