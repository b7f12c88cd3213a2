#!/usr/bin/env bash
# A bounded run of each fuzz target: FUZZ_SECONDS (30) each. Needs a nightly toolchain, as cargo-fuzz does.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

cargo +nightly --version >/dev/null 2>&1 || fail "fuzzing needs a nightly toolchain: rustup toolchain install nightly"

fuzzer() {
    if have cargo-fuzz; then return; fi
    if [ ! -x "$CACHE/tools/bin/cargo-fuzz" ]; then
        say "building cargo-fuzz, once"
        cargo install --quiet --locked --root "$CACHE/tools" cargo-fuzz
    fi
}

hack/deps.sh build
locked tools fuzzer
PATH="$PATH:$CACHE/tools/bin"
export CARGO_TARGET_DIR="$CACHE/fuzz-target"
for target in $(cargo +nightly fuzz list); do
    say "fuzzing $target for ${FUZZ_SECONDS:-30} s"
    corpus="$CACHE/fuzz-corpus/$target"
    mkdir -p "$corpus"
    # An input may not cost more than 512 MiB or 5 s.
    cargo +nightly fuzz run "$target" "$corpus" -- -max_total_time="${FUZZ_SECONDS:-30}" -rss_limit_mb=512 -timeout=5 -print_final_stats=1
done
