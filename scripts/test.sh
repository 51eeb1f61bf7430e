#!/usr/bin/env bash
# Run all tests, or with arguments those that pytest is told of.
# Exit status as of pytest: 0, 1 when tests failed, above when something else went wrong.
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=(.venv/bin/python -m tests)

if [ $# -gt 0 ]; then
    exec "${pytest[@]}" "$@"
fi

status=0
worst() { if [ "$1" -gt "$status" ]; then status=$1; fi; }

# Two processes, which take turns at whole files; each computes on one core.
OMP_NUM_THREADS=1 "${pytest[@]}" -n 2 --dist loadfile --no-loadscope-reorder \
    tests/integration tests/unit
worst $?
# Whole products: one after the other, with the machine to themselves.
"${pytest[@]}" tests --ignore tests/integration --ignore tests/unit
worst $?
if [ "$status" -ne 0 ]; then
    echo "tests: failed, in one of the two runs above or in both" >&2
fi
exit "$status"
