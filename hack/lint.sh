#!/usr/bin/env bash
# rustfmt, clippy, cargo deny, shellcheck: all clean, or a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

# Built once into the cache where it is not installed.
deny() {
    if have cargo-deny; then return; fi
    if [ ! -x "$CACHE/tools/bin/cargo-deny" ]; then
        say "building cargo-deny, once"
        cargo install --quiet --locked --root "$CACHE/tools" cargo-deny
    fi
}

hack/deps.sh build lint
locked tools deny
PATH="$PATH:$CACHE/tools/bin"
cargo fmt --check
cargo clippy --locked --all-targets -- -D warnings
cargo deny --log-level error check bans licenses sources
shellcheck -x hack/*.sh .ci/run
hack/manifests.sh --check
PATH="$(hack/helm.sh):$PATH" helm lint --strict --quiet charts/kube-lxcfs
