"""`python -m tests`: pytest, whose exit status tells a pytest that broke from a test that failed.

Python's own for an exception that nobody caught is 1, as pytest's for failed tests.
"""

from __future__ import annotations

import sys
import traceback

import pytest


def main() -> int:
    try:
        return int(pytest.main(sys.argv[1:]))
    except Exception:  # noqa: BLE001 - whatever it was, nobody knows what was not run
        traceback.print_exc()
        return int(pytest.ExitCode.INTERNAL_ERROR)


if __name__ == "__main__":
    sys.exit(main())
