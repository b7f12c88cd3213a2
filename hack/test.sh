#!/usr/bin/env bash
# All tests, with everything they need. Arguments go to `cargo test`, as in: hack/test.sh --test it -- isolation
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

need_root "testing (it mounts, and runs containers)"
hack/deps.sh build demo test
hack/image.sh >/dev/null
# Runtimes with NRI, of both generations.
hack/debian.sh trixie containerd >/dev/null
hack/debian.sh sid containerd >/dev/null
hack/helm.sh >/dev/null
KUBEBUILDER_ASSETS=$(hack/kubernetes.sh)
export KUBEBUILDER_ASSETS
export RUST_BACKTRACE=${RUST_BACKTRACE:-0}
cargo test --locked "$@"
