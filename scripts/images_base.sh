#!/usr/bin/env bash
# Make bases for the images out of Debian packages, where Docker Hub's cannot be pulled:
#   scripts/images_base.sh
#   BASE=localhost/expertfleet-base:slim BUILD_BASE=localhost/expertfleet-base:build scripts/images.sh
# Debian 12 has the images' Python 3.11. Needs mmdebstrap (and root, or user namespaces); packages
# come from where apt on this machine takes them if it is Debian 12, else from Debian's mirror.
# ENGINE, ENGINE_OPTIONS as for scripts/images.sh.
set -euo pipefail

engine="${ENGINE:-}"
if [ -z "$engine" ]; then
    if docker info >/dev/null 2>&1; then engine=docker; else engine=podman; fi
fi
read -ra options <<<"${ENGINE_OPTIONS:-}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

sources=()
if grep -q 'VERSION_CODENAME=bookworm' /etc/os-release; then
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
        [ -s "$file" ] && sources+=("$file")
    done
fi

make_base() { # name, packages
    mmdebstrap --quiet --variant=minbase --include="$2" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --customize-hook='ln -s python3 "$1/usr/bin/python"' \
        bookworm "$scratch/base.tar" "${sources[@]}"
    "$engine" "${options[@]}" import "$scratch/base.tar" "$1" >/dev/null
    rm "$scratch/base.tar"
    echo "images: $1"
}

python=python3,python3-venv,python3-pip,ca-certificates
make_base localhost/expertfleet-base:slim "$python"
make_base localhost/expertfleet-base:build "$python,g++"
