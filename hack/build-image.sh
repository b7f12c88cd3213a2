#!/usr/bin/env bash
# Builds the image from the Dockerfile with docker, podman or buildah, the first that is installed.
#   hack/build-image.sh [NAME:TAG]        default: kube-lxcfs:VERSION
#   hack/build-image.sh --print-args      prints the build arguments, one word a line
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
args=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
if [ "${1-}" = --print-args ]; then
    printf '%s\n' "${args[@]}"
    exit
fi

name=${1:-kube-lxcfs:$version}
if have docker && docker info >/dev/null 2>&1; then
    docker build "${args[@]}" -t "$name" .
elif have podman; then
    podman build "${args[@]}" -t "$name" .
elif have buildah; then
    buildah bud "${args[@]}" -t "$name" .
else
    fail "failed to build $name: no docker, podman or buildah; install one of them"
fi
