#!/usr/bin/env bash
# Builds both images from the Dockerfile, on base images made on this machine.
#   hack/offline/build-image.sh NAME:TAG DIR      writes the docker-archives DIR/agent.tar, of
#                                                 NAME:TAG, and DIR/lxcfs.tar, of NAME-lxcfs:TAG
set -euo pipefail
cd "$(dirname "$0")/../.."
. hack/offline/lib.sh

[ $# = 2 ] || fail "usage: hack/offline/build-image.sh NAME:TAG DIR"

# build TARGET NAME:TAG
build() {
    say "building $2"
    # The target directory is kept: only the first build compiles all dependencies.
    buildah_ bud --quiet --isolation chroot --pull=never --layers=false --format docker \
        --volume "$CACHE/image-target:/src/target" "${args[@]}" --target "$1" -t "$2" . >&2
    rm -f "$dir/$1.tar"
    buildah_ push --quiet "$2" "docker-archive:$dir/$1.tar:$2" >&2
    buildah_ rmi "$2" >/dev/null
}

dir=$2
hack/offline/bases.sh
mapfile -t args < <(hack/build-image.sh --print-args)
mkdir -p "$CACHE/image-target" "$dir"
build agent "$1"
build lxcfs "${1%:*}-lxcfs:${1##*:}"
