"""`expertfleet plan --calibrate`: measure this machine with the product's own code, then fit.

Each part is measured in a process of its own (`python -m services.cli.calibration PART`), because
threads that have once computed slow those that do later; this process needs no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.cli.calibration.fit import fit_calibration
from services.core.errors import ExpertfleetError
from services.core.planning.calibration import Calibration

PARTS = {
    "kernels": "matrix products of experts, attention and head",
    "dispatch": "frames to 1, 2 and 4 worker processes",
    "engine": "the engine around a step, and sampling",
}
TIMEOUT_S = 600.0


def calibrate(*, num_cores: int, say: Callable[[str], None]) -> Calibration:
    """Takes one to three minutes. Raises `ExpertfleetError` with the log of what failed."""
    measured: dict[str, Any] = {"num_cores": num_cores}
    with tempfile.TemporaryDirectory(prefix="expertfleet-calibrate-") as scratch:
        for number, (part, what) in enumerate(PARTS.items(), start=1):
            say(f"measuring {number} of {len(PARTS)}: {what}")
            measured |= _measure(part, num_cores, Path(scratch))
    return fit_calibration(measured)


def _measure(part: str, num_cores: int, scratch: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "services.cli.calibration", part]
    command += ["--cores", str(num_cores), "--scratch", str(scratch)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ExpertfleetError(
            f"measuring {part} did not end within {TIMEOUT_S:.0f} s; is the machine busy?"
        ) from error
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-12:])
        raise ExpertfleetError(f"measuring {part} failed:\n{tail}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
