#!/usr/bin/env bash
# Builds both images from the Dockerfile, on base images made on this machine.
#   hack/offline/build-image.sh NAME:TAG DIR [ARCHITECTURE]
# writes the docker-archives DIR/agent.tar, of NAME:TAG, and DIR/lxcfs.tar, of NAME-lxcfs:TAG.
set -euo pipefail
cd "$(dirname "$0")/../.."
. hack/offline/lib.sh

[ $# = 2 ] || [ $# = 3 ] || fail "usage: hack/offline/build-image.sh NAME:TAG DIR [ARCHITECTURE]"

# build TARGET NAME:TAG
build() {
    say "building $2"
    # The target directory is kept: only the first build compiles all dependencies.
    foreign "$architecture" buildah "${images[@]}" bud --quiet --platform "linux/$architecture" \
        --isolation chroot --pull=never --layers=false --format docker \
        --volume "$target_dir:/src/target" "${args[@]}" --target "$1" -t "$2" "$PWD" >&2
    rm -f "$dir/$1.tar"
    buildah_ push --quiet "$2" "docker-archive:$dir/$1.tar:$2" >&2
    buildah_ rmi "$2" >/dev/null
}

dir=$2
native=$(dpkg --print-architecture)
architecture=${3:-$native}
target_dir=$CACHE/image-target
if [ "$architecture" != "$native" ]; then
    hack/deps.sh vm-arm64
    # Of another compiler.
    target_dir+=-$architecture
fi
use_images "$architecture"
bases=$(hack/offline/bases.sh "$architecture")
mapfile -t args < <(hack/build-image.sh --print-args && echo "$bases")
mkdir -p "$target_dir" "$dir"
build agent "$1"
build lxcfs "${1%:*}-lxcfs:${1##*:}"
