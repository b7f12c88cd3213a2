# shellcheck shell=bash
# Functions and settings that the scripts in hack/ share. Sourced, never run.

# Downloads and build results that are kept between runs, outside the checkout.
CACHE="${KUBE_LXCFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kube-lxcfs}"
# The image of test pods and sandboxes, which hack/offline/busybox-image.sh makes.
BUSYBOX_IMAGE=localhost/kube-lxcfs/busybox:1

# fail MESSAGE: prints one line on stderr and exits.
fail() {
    echo "error: $*" >&2
    exit 1
}

# say MESSAGE: prints progress on stderr, so that stdout carries only results.
say() {
    echo "==> $*" >&2
}

# have COMMAND...: whether all commands are on PATH, or in sbin, which a user's PATH may lack.
have() {
    local c
    for c in "$@"; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "$c" >/dev/null 2>&1 || return 1
    done
}

# need_root WHAT: fails without root, which apt-get, mounts and containers need.
need_root() {
    [ "$(id -u)" = 0 ] || fail "$1 needs root; run it with sudo"
}

# wait_for SECONDS COMMAND...: repeats COMMAND until it succeeds; status 1 on timeout.
wait_for() {
    local attempts=$(($1 * 5))
    shift
    while ! "$@" >/dev/null 2>&1; do
        attempts=$((attempts - 1))
        [ $attempts -gt 0 ] || return 1
        sleep 0.2
    done
}

# locked NAME COMMAND...: runs COMMAND in a subshell while no other script holds the lock NAME.
locked() {
    mkdir -p "$CACHE"
    (
        flock 9
        "${@:2}"
    ) 9>"$CACHE/$1.lock"
}

# make_work_dir NAME: sets $work to a new directory in the cache. It is removed when the shell
# exits; under `locked` that is the subshell.
make_work_dir() {
    mkdir -p "$CACHE"
    work=$(mktemp -d "$CACHE/$1.XXXXXX")
    trap 'rm -rf "$work"' EXIT
}

# logged LOG WHAT COMMAND...: runs COMMAND in a subshell with its output in the file LOG. If it
# fails, prints the end of LOG and "failed to WHAT". Not for conditions, which disable `set -e`.
logged() {
    local log=$1 what=$2 status
    shift 2
    set +e
    (set -e && "$@") >"$log" 2>&1
    status=$?
    set -e
    [ $status = 0 ] && return
    tail -n 20 "$log" >&2
    fail "failed to $what (log: $log)"
}

# cargo_tool NAME: builds cargo-NAME into the cache, once, unless it is installed. Put
# $CACHE/tools/bin on PATH to use it.
cargo_tool() {
    if have "cargo-$1" || [ -x "$CACHE/tools/bin/cargo-$1" ]; then return; fi
    say "building cargo-$1, once"
    cargo install --quiet --locked --root "$CACHE/tools" "cargo-$1"
}

# containerd_config DIR CNI_CONF NRI_DISABLED: prints hack/containerd.toml, filled in.
containerd_config() {
    sed -e "s|@DIR@|$1|g" -e "s|@CNI_CONF@|$2|" -e "s|@NRI_DISABLED@|$3|" \
        -e "s|@CNI_BIN@|/usr/lib/cni|" -e "s|@IMAGE@|$BUSYBOX_IMAGE|" -e "s|@NRI_TIMEOUT@|2s|" \
        "${BASH_SOURCE[0]%/*}/containerd.toml"
}
