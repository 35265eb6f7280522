#!/usr/bin/env bash
# Writes the lists of packages in this folder anew from pyproject.toml: pins that still fit stay as they are.
#
#   deploy/pin.sh [--upgrade]   with --upgrade, every pin becomes the newest version that fits
#
# The lists hold for Linux on x86_64 and aarch64 and for every Python that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pin() { # FILE, then options and sources; the comment at the file's head stays
    local file=$1 comment pins
    comment=$(sed '/^[^#]/,$d' "$file")
    .venv/bin/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --output-file "$@"
    pins=$(cat "$file")
    printf '%s\n' "$comment" "$pins" >"$file"
}

pin deploy/constraints.txt --extra dev --extra cluster "$@" pyproject.toml
pin deploy/requirements-cluster.txt --constraint deploy/constraints.txt --generate-hashes --extra cluster pyproject.toml
pin deploy/requirements-build.txt --constraint deploy/constraints.txt --generate-hashes - <<<setuptools
