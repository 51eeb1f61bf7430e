"""Measures one part for `expertfleet plan --calibrate` and prints what it saw as a line of JSON."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("kernels", "dispatch", "engine"))
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    arguments = parser.parse_args()
    # Whoever started this may be killed; then the workers it started must end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The result goes where standard output was; what a library prints goes to standard error.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if arguments.part == "kernels":
        from services.cli.calibration.kernels import measure_kernels

        measured = measure_kernels(arguments.cores)
    elif arguments.part == "dispatch":
        from services.cli.calibration.dispatch import measure_dispatch

        measured = measure_dispatch(arguments.cores, arguments.scratch)
    else:
        from services.cli.calibration.engine import measure_engine

        measured = measure_engine(arguments.cores, arguments.scratch)
    out.write(json.dumps(measured) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
