#!/usr/bin/env bash
# Runs tests or benchmarks, after installing everything that they need. Needs root.
#   hack/test.sh [ARGUMENT of cargo test]...     as in: hack/test.sh --test it -- isolation
#   hack/test.sh --bench [NAME [ARGUMENT]...]    benchmarks; all without NAME, a file in benches/
#   hack/test.sh --unit [ARGUMENT]...            unit tests only, without root
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

export RUST_BACKTRACE=${RUST_BACKTRACE:-0}
if [ "${1-}" = --unit ]; then
    hack/deps.sh build
    exec cargo test --locked --lib "${@:2}"
fi
command=(cargo test --locked "$@")
if [ "${1-}" = --bench ]; then
    [ -z "${2-}" ] || [ -f "benches/$2.rs" ] || fail "unknown benchmark '$2'; see benches/"
    command=(cargo bench --locked --bench "${2:-*}" -- "${@:3}")
fi
need_root "this command (it mounts file systems and runs containers)"
hack/deps.sh build demo test
hack/offline/busybox-image.sh >/dev/null
# A containerd 1.7 and a 2.x, for NRI.
hack/offline/debian.sh trixie containerd >/dev/null
hack/offline/debian.sh sid containerd >/dev/null
# The lxcfs of the image for cgroup version 1, with the libraries that it needs.
hack/offline/debian.sh trixie lxcfs libc6 libfuse3-4 >/dev/null
hack/offline/helm.sh >/dev/null
KUBEBUILDER_ASSETS=$(hack/offline/kubernetes.sh)
export KUBEBUILDER_ASSETS
"${command[@]}"
