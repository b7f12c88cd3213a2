#!/usr/bin/env bash
# Runs each fuzz target for FUZZ_SECONDS (30). Needs a nightly toolchain, as cargo-fuzz does.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

cargo +nightly --version >/dev/null 2>&1 ||
    fail "no nightly toolchain; run: rustup toolchain install nightly"
hack/deps.sh build
locked tools cargo_tool fuzz
PATH="$PATH:$CACHE/tools/bin"
export CARGO_TARGET_DIR="$CACHE/fuzz-target"
seconds=${FUZZ_SECONDS:-30}
for target in $(cargo +nightly fuzz list); do
    say "fuzzing $target for $seconds s"
    corpus="$CACHE/fuzz-corpus/$target"
    mkdir -p "$corpus"
    # An input that needs more than 512 MiB or 5 s is a failure.
    cargo +nightly fuzz run "$target" "$corpus" -- -max_total_time="$seconds" \
        -rss_limit_mb=512 -timeout=5 -print_final_stats=1
done
