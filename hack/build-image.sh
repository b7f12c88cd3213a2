#!/usr/bin/env bash
# Builds the images of the Dockerfile with docker, podman or buildah, the first that is installed.
#   hack/build-image.sh [NAME:TAG]        the agent's NAME:TAG (default: kube-lxcfs:VERSION), and
#                                         NAME-lxcfs:TAG
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
[[ $name =~ :[^:/]+$ ]] || fail "invalid name '$name': expected NAME:TAG"
if have docker && docker info >/dev/null 2>&1; then
    build=(docker build)
elif have podman; then
    build=(podman build)
elif have buildah; then
    # With layers, the second target uses the build stage of the first.
    build=(buildah bud --layers)
else
    fail "failed to build $name: no docker, podman or buildah; install one of them"
fi
"${build[@]}" "${args[@]}" --target agent -t "$name" .
"${build[@]}" "${args[@]}" --target lxcfs -t "${name%:*}-lxcfs:${name##*:}" .
