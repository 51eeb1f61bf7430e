"""How much of the last seconds was spent computing."""

from __future__ import annotations

_NUM_SLOTS = 30


class BusyWindow:
    """Share of the last `window_s` seconds, whoever asks and however often.

    Times are readings of one clock that only rises, in seconds. Time is cut into slots, so that
    neither adding nor asking depends on how much happened; `started_at` is when nothing had.
    """

    def __init__(self, window_s: float, *, started_at: float) -> None:
        self._window_s = window_s
        self._slot_s = window_s / _NUM_SLOTS
        self._started_at = started_at
        # The oldest slot is in the window in part, hence one more.
        self._numbers = [-1] * (_NUM_SLOTS + 1)
        self._seconds = [0.0] * (_NUM_SLOTS + 1)

    def add(self, seconds: float, *, ended_at: float) -> None:
        """A computation that took so long is over."""
        number = int(ended_at / self._slot_s)
        oldest = number - _NUM_SLOTS
        while seconds > 0 and number >= oldest:
            place = number % len(self._numbers)
            if self._numbers[place] != number:
                self._numbers[place], self._seconds[place] = number, 0.0
            part = min(seconds, ended_at - number * self._slot_s)
            self._seconds[place] += part
            seconds -= part
            ended_at = number * self._slot_s
            number -= 1

    def ratio(self, now: float) -> float:
        """0 to 1; over a shorter time than the window while there was no more."""
        begin = max(now - self._window_s, self._started_at)
        if now <= begin:
            return 0.0
        busy_s = 0.0
        for number, seconds in zip(self._numbers, self._seconds, strict=True):
            slot_begin = number * self._slot_s
            slot_end = slot_begin + self._slot_s
            if slot_end <= begin:
                continue
            # Of a slot that the window begins in, the share that lies in the window.
            inside = min(1.0, (slot_end - begin) / self._slot_s)
            busy_s += seconds * inside
        return min(1.0, busy_s / (now - begin))
