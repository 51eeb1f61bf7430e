"""Runs a module in a process whose wall clock jumps an hour back at SIGUSR1 and forth at SIGUSR2.

    python -m tests.faults.shifted_clock MODULE [ARGUMENT ...]

Only `time.time` is changed, before the module is imported; the monotonic clock goes on, as it does
when someone sets a machine's time.
"""

from __future__ import annotations

import runpy
import signal
import sys
import time

JUMP_S = 3600.0


def main() -> None:
    true_time = time.time
    shift_s = 0.0

    def shifted_time() -> float:
        return true_time() + shift_s

    def jump(number: int, _: object) -> None:
        nonlocal shift_s
        shift_s = -JUMP_S if number == signal.SIGUSR1 else 0.0

    time.time = shifted_time
    signal.signal(signal.SIGUSR1, jump)
    signal.signal(signal.SIGUSR2, jump)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
