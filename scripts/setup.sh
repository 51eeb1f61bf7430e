#!/usr/bin/env bash
# Make .venv in the checkout and install expertfleet into it. Does nothing when all is in place.
#   scripts/setup.sh [run|dev]      run: what serving needs; dev (default): with the test tools
# TORCH=auto|cpu|cuda|none chooses the torch build; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${1:-dev}"
torch_choice="${TORCH:-auto}"
python="${PYTHON:-python3}"
torch_version="$(sed -n 's/^torch==//p' constraints.txt)"
stamp=".venv/.expertfleet-$extras-$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -c1-16)-$torch_choice"

# Compiles only what has changed; where it fails, torch's kernels are used.
build_kernels() { .venv/bin/python -m services.core.kernels.build >/dev/null || true; }

# A complete development set-up serves as well as one to run.
if [ -e "$stamp" ] || { [ "$extras" = run ] && [ -e "${stamp/-run-/-dev-}" ]; }; then
    build_kernels
    exit 0
fi

"$python" - <<'PY' || { echo "setup: Python 3.11 or newer is needed; name one with PYTHON=python3.12" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
if [ ! -x .venv/bin/python ]; then
    echo "setup: creating .venv"
    "$python" -m venv .venv || {
        echo "setup: 'python3 -m venv' failed; on Debian or Ubuntu: apt-get install python3-venv" >&2
        exit 1
    }
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check)

install_torch() {
    case "$torch_choice" in
        none) echo "setup: leaving torch to you (TORCH=none)"; return ;;
        auto)
            if .venv/bin/python -c "import torch" 2>/dev/null; then return; fi
            # A build that pip's own configuration offers from local files wins: nothing to download.
            if "${pip[@]}" install -q --no-index "torch==$torch_version" -c constraints.txt --no-deps 2>/dev/null; then
                echo "setup: torch $torch_version from local files"; return
            fi
            if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
                torch_choice=cuda
            else
                torch_choice=cpu
            fi
            install_torch ;;
        cuda)
            echo "setup: torch $torch_version with CUDA"
            "${pip[@]}" install -q "torch==$torch_version" -c constraints.txt ;;
        cpu)
            echo "setup: torch $torch_version for the CPU"
            "${pip[@]}" install -q "torch==$torch_version" -c constraints.txt \
                --index-url https://download.pytorch.org/whl/cpu ;;
        *) echo "setup: TORCH=$torch_choice is none of auto, cpu, cuda, none" >&2; exit 1 ;;
    esac
}

install_torch
echo "setup: installing expertfleet and its dependencies"
target="."
[ "$extras" = dev ] && target=".[dev]"
"${pip[@]}" install -q -c constraints.txt -e "$target"
if ! command -v c++ g++ clang++ >/dev/null; then
    "${pip[@]}" install -q -c constraints.txt ziglang || true  # a C++ compiler as a Python package
fi
build_kernels
rm -f .venv/.expertfleet-"$extras"-*
touch "$stamp"
echo "setup: done ($(du -sh .venv | cut -f1) in .venv)"
