#!/usr/bin/env bash
# Builds the image from the Dockerfile, on base images made on this machine.
#   hack/offline/build-image.sh NAME:TAG ARCHIVE      writes a docker-archive
set -euo pipefail
cd "$(dirname "$0")/../.."
. hack/offline/lib.sh

[ $# = 2 ] || fail "usage: hack/offline/build-image.sh NAME:TAG ARCHIVE"
name=$1 archive=$2

hack/offline/bases.sh
say "building $name"
mapfile -t args < <(hack/build-image.sh --print-args)
# The target directory is kept: only the first build compiles all dependencies.
mkdir -p "$CACHE/image-target"
buildah_ bud --quiet --isolation chroot --pull=never --layers=false --format docker \
    --volume "$CACHE/image-target:/src/target" "${args[@]}" -t "$name" . >&2
rm -f "$archive"
buildah_ push --quiet "$name" "docker-archive:$archive:$name" >&2
buildah_ rmi "$name" >/dev/null
