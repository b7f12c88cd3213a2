# shellcheck shell=bash
# What every script in hack/ shares: where things are kept, and how a failure is told.
# Sourced, never run.

# Downloads and builds that are dear to make live here, outside the checkout, and survive it.
CACHE="${KUBE_LXCFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kube-lxcfs}"

# fail MESSAGE: one line on stderr, and the end.
fail() {
    echo "error: $*" >&2
    exit 1
}

# say MESSAGE: progress, on stderr so that stdout stays free for results.
say() {
    echo "==> $*" >&2
}

# have COMMAND...: are all of them on PATH (or in sbin, which a user's PATH may lack)?
have() {
    local c
    for c in "$@"; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "$c" >/dev/null 2>&1 || return 1
    done
}

# need_root WHAT: apt-get, mounts and containers want root.
need_root() {
    [ "$(id -u)" = 0 ] || fail "$1 needs root: run it again with sudo"
}

# locked NAME COMMAND...: runs COMMAND while no other script holds NAME; two `make`s side by side build once.
locked() {
    # No local names: what is called sees them instead of its own script's.
    mkdir -p "$CACHE"
    (
        flock 9
        "${@:2}"
    ) 9>"$CACHE/$1.lock"
}
