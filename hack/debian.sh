#!/usr/bin/env bash
# Unpacks packages of another Debian suite into the cache and prints the folder, for tests with other versions than this
# machine's. Nothing is installed.
#   hack/debian.sh SUITE PACKAGE...     as in: hack/debian.sh trixie containerd
set -euo pipefail
. "$(dirname "$0")/lib.sh"

[ $# -ge 2 ] || fail "usage: hack/debian.sh SUITE PACKAGE..."
suite=$1
shift
packages=("$@")
root="$CACHE/debian/$suite"

# The mirror that this machine's own apt uses.
mirror() {
    # shellcheck disable=SC2016 # apt's own variables
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | grep '/debian/$' | head -1
}

complete() {
    local p
    for p in "${packages[@]}"; do [ -e "$root/.have-$p" ] || return 1; done
}

unpack() {
    complete && return
    have apt-get || fail "packages of Debian $suite are needed, and this machine has no apt-get"
    local uri work apt p log=$CACHE/debian-$suite.log
    uri=$(mirror)
    [ -n "$uri" ] || fail "packages of Debian $suite are needed, and this machine's apt knows no Debian mirror"
    work=$(mktemp -d "$CACHE/debian.XXXXXX")
    # shellcheck disable=SC2064 # this folder, now
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$root"
    printf 'deb [signed-by=%s] %s %s main\n' /usr/share/keyrings/debian-archive-keyring.gpg "$uri" "$suite" >"$work/list"
    apt=(-q -o "Dir::Etc::sourcelist=$work/list" -o "Dir::Etc::sourceparts=-" -o "Dir::State::Lists=$work/lists"
        -o "Dir::Cache=$work/cache" -o "APT::Sandbox::User=root" -o "Acquire::Check-Valid-Until=false")
    say "fetching ${packages[*]} of Debian $suite, once (log: $log)"
    (
        cd "$work"
        apt-get "${apt[@]}" update
        apt-get "${apt[@]}" download "${packages[@]}"
        for p in *.deb; do dpkg -x "$p" "$root"; done
        for p in "${packages[@]}"; do touch "$root/.have-$p"; done
    ) >"$log" 2>&1 || {
        tail -20 "$log" >&2
        fail "packages of Debian $suite could not be fetched (whole output: $log)"
    }
}

mkdir -p "$CACHE"
locked "debian-$suite" unpack
echo "$root"
