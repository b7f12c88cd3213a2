#!/usr/bin/env bash
# Static checks. Stops at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

check_line_width() {
    local wide
    wide=$(find Makefile .ci src tests benches fuzz/fuzz_targets hack -type f \
        \( -name '*.rs' -o -name '*.sh' -o -name Makefile -o -name run \) -print0 |
        LC_ALL=C.UTF-8 xargs -0 grep -HnE '^.{101}' | cut -d: -f1,2 || true)
    [ -z "$wide" ] || fail "lines over 100 columns:"$'\n'"$wide"
}

# Every test that docs/security.md names, in the last column of its tables, exists.
check_named_tests() {
    local name
    while read -r name; do
        grep -rqw "fn $name" src tests || fail "docs/security.md names no test: $name"
    done < <(awk -F'|' 'NF == 5 { print $4 }' docs/security.md | grep -oE '[a-z_]{9,}')
}

# The advisory database is a git repository, which not every machine reaches.
check_advisories() {
    local output
    if output=$(timeout 120 cargo deny fetch db 2>&1); then
        cargo deny --offline --log-level error check advisories
    else
        output=$(awk 'NF { last = $0 } END { print last }' <<<"$output")
        say "advisories not checked: failed to fetch the database: ${output:-timed out}"
    fi
}

# Container runtimes ignore names that they do not know. libseccomp 2.5 knows neither statmount nor
# listmount: with it the agent reads mount tables instead.
check_profiles() {
    local profiles=charts/kube-lxcfs/profiles names name
    names=$(python3 -c 'import json, sys
for rule in json.load(sys.stdin)["syscalls"]: print(*rule["names"])' <$profiles/seccomp-agent.json)
    for name in $names; do
        case $name in statmount | listmount) continue ;; esac
        [ "$(scmp_sys_resolver "$name")" != -1 ] || fail "seccomp-agent.json: unknown call $name"
    done
    apparmor_parser --skip-kernel-load --skip-cache $profiles/apparmor-agent
}

# Comments and documents, without generated files. Ignored words: a keyword and a module of Rust,
# names of types, a permission of AppArmor, a product and a variable.
check_spelling() {
    local ignored=crate,ser,inflight,atleast,keypair,readby,aks,nd
    codespell --skip '*.svg,*.json' --ignore-words-list "$ignored" \
        ./*.md Makefile Dockerfile Cargo.toml .ci .github benches charts docs hack manifests \
        src tests
}

hack/deps.sh build lint
locked tools cargo_tool deny
PATH="$(hack/offline/helm.sh):$PATH:$CACHE/tools/bin:/usr/sbin:/sbin"
say "scripts"
shellcheck -x hack/*.sh hack/offline/*.sh hack/vm/*.sh hack/vm/guest/*.sh .ci/run
check_line_width
say "Rust"
cargo fmt --check
cargo fmt --check --manifest-path fuzz/Cargo.toml
hack/check-layers.sh
cargo clippy --locked --all-targets -- -D warnings
cargo check --locked --quiet --manifest-path fuzz/Cargo.toml --target-dir target/fuzz
check_named_tests
say "dependencies"
cargo deny --log-level error check bans licenses sources
check_advisories
say "documents"
hack/check-links.py
hack/picture.py --check
check_spelling
say "chart and manifests"
check_profiles
helm lint --strict --quiet charts/kube-lxcfs
hack/manifests.sh --check
