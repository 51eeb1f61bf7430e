#!/usr/bin/env bash
# Build the container images expertfleet/serve and expertfleet/expert.
#   scripts/images.sh [serve|expert ...]         default: both
# DEVICE=cpu|cuda; REGISTRY=registry.example.com/team; TAG (default: the version, -cuda for GPUs);
# BASE, BUILD_BASE: see deploy/docker/Dockerfile; ENGINE=docker|podman and ENGINE_OPTIONS.
# WHEELS=FOLDER installs from that folder alone, without a network, and `scripts/images.sh wheels`
# fills it, as pip is configured on this machine. Default: .wheels/$DEVICE where pip is configured
# to look elsewhere than in the public index, as a build cannot see what that names; else none.
set -euo pipefail
cd "$(dirname "$0")/.."

device="${DEVICE:-cpu}"
python="${PYTHON:-python3}"
version="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"
tag="${TAG:-$version}"
[ "$device" = cuda ] && tag="${TAG:-$version-cuda}"
read -ra engine_options <<<"${ENGINE_OPTIONS:-}"

find_engine() {
    if [ -n "${ENGINE:-}" ]; then echo "$ENGINE"; return; fi
    if docker info >/dev/null 2>&1; then echo docker; return; fi
    if command -v podman >/dev/null; then echo podman; return; fi
    echo "images: no container engine: neither does a docker daemon answer nor is there podman" >&2
    return 1
}

pip_looks_elsewhere() {
    local configured # in a variable: a pipe that grep leaves early fails
    configured="$("$python" -m pip config list 2>/dev/null)"
    grep -qE "index-url|find-links|no-index" <<<"$configured"
}

# What the images install, as wheels: a wheel that pip finds is taken as it is.
fill_wheels() {
    local folder="$1" names
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
        echo "images: wheels are gathered by the images' Python, 3.11; name one with PYTHON" >&2
        return 1
    }
    names="$(mktemp -d)"
    "$python" deploy/docker/requirements.py "$names"
    mkdir -p "$folder"
    local pip=("$python" -m pip --disable-pip-version-check wheel -q -w "$folder")
    if [ "$device" = cpu ]; then
        "${pip[@]}" --no-deps --no-index -r "$names/torch.txt" 2>/dev/null ||
            "${pip[@]}" --no-deps --index-url https://download.pytorch.org/whl/cpu -r "$names/torch.txt"
    else
        "${pip[@]}" -r "$names/torch.txt"
    fi
    "${pip[@]}" --no-deps "$(grep -o 'setuptools==[0-9.]*' deploy/docker/Dockerfile)"
    # Wanted by Python 3.11.2, as Debian 12 has it, and not by later ones.
    "${pip[@]}" --no-deps -c constraints.txt async-timeout
    "${pip[@]}" --find-links "$folder" -c constraints.txt -r "$names/serve.txt"
    rm -r "$names"
    echo "images: $(find "$folder" -name '*.whl' | wc -l) wheels in $folder"
}

wheels="${WHEELS:-}"
if [ -z "$wheels" ] && { [ "${1:-}" = wheels ] || pip_looks_elsewhere; }; then
    wheels=".wheels/$device"
    fill_wheels "$wheels"
fi
[ "${1:-}" = wheels ] && exit 0

engine="$(find_engine)"
options=(--file deploy/docker/Dockerfile --build-arg "DEVICE=$device" --build-arg "VERSION=$version")
options+=(--build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
[ -n "${BASE:-}" ] && options+=(--build-arg "BASE=$BASE")
[ -n "${BUILD_BASE:-}" ] && options+=(--build-arg "BUILD_BASE=$BUILD_BASE")
if [ -n "$wheels" ]; then
    options+=(--build-context "wheels=$wheels" --network none)
    options+=(--build-arg "PIP_OPTIONS=--no-index --find-links=/wheels")
fi
# Podman's own format has no health checks.
"$engine" --version | grep -qi podman && options+=(--format docker)

[ $# -eq 0 ] && set -- expert serve
for target in "$@"; do
    name="${REGISTRY:+${REGISTRY%/}/}expertfleet/$target:$tag"
    started=$SECONDS
    "$engine" "${engine_options[@]}" build "${options[@]}" --target "$target" --tag "$name" .
    bytes="$("$engine" "${engine_options[@]}" image inspect --format '{{.Size}}' "$name")"
    echo "images: $name, $((bytes / 1000000)) MB, in $((SECONDS - started)) s"
done
