#!/usr/bin/env bash
# Builds the image from the Dockerfile with docker, podman or buildah, whichever is there.
#   hack/build-image.sh [NAME:TAG]                  into that program's own storage
#   hack/build-image.sh NAME:TAG ARCHIVE            as a docker-archive, with base images made on this machine
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
name=${1:-kube-lxcfs:$version}
revision=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
args=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision" -t "$name")

if [ $# -ge 2 ]; then
    hack/bases.sh
    export STORAGE_DRIVER=vfs
    storage=(--root "$CACHE/images/root" --runroot "$CACHE/images/run")
    say "building $name"
    mkdir -p "$CACHE/image-target"
    buildah "${storage[@]}" bud --quiet --volume "$CACHE/image-target:/src/target" --isolation chroot --pull=never --layers=false --format docker "${args[@]}" . >&2
    rm -f "$2"
    buildah "${storage[@]}" push --quiet "$name" "docker-archive:$2:$name" >&2
    buildah "${storage[@]}" rmi "$name" >/dev/null
    exit
fi
if have docker && docker info >/dev/null 2>&1; then
    docker build "${args[@]}" .
elif have podman; then
    podman build "${args[@]}" .
elif have buildah; then
    buildah bud "${args[@]}" .
else
    fail "an image is built with docker, podman or buildah, and none of them is here"
fi
