# shellcheck shell=bash
# Functions that the scripts in hack/offline/ share. Sourced, never run.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# system: prints the name of this machine's distribution.
system() {
    local name
    name=$(. /etc/os-release 2>/dev/null && echo "${PRETTY_NAME-}") || true
    echo "${name:-an unknown distribution}"
}

# need_debian_12 WHAT HINT: fails on another distribution or release.
need_debian_12() {
    local release
    release=$(. /etc/os-release 2>/dev/null && echo "${ID-} ${VERSION_ID-}") || true
    [ "$release" = "debian 12" ] ||
        fail "failed to $1: this needs Debian 12, but the machine runs $(system); $2"
}

# debian_mirror WHAT: prints the URI of the Debian mirror in apt's configuration.
debian_mirror() {
    local uri
    have apt-get || fail "failed to $1: $(system) has no apt-get; use Debian 12"
    # shellcheck disable=SC2016 # a variable of apt, not of the shell
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' |
        sed -n '\|/debian/$|p' | head -n 1)
    [ -n "$uri" ] ||
        fail "failed to $1: apt of $(system) has no Debian mirror; add one, or use Debian 12"
    echo "$uri"
}

# busybox_path ARCHITECTURE: prints the path of a static busybox: the installed one if it fits.
busybox_path() {
    local root
    if [ "$1" = "$(dpkg --print-architecture)" ]; then
        command -v busybox || fail "busybox not found; run hack/deps.sh demo to install it"
    else
        root=$("${BASH_SOURCE[0]%/*}/debian.sh" "trixie:$1" busybox-static) || return
        echo "$root/usr/bin/busybox"
    fi
}

# use_images ARCHITECTURE: sets $images, the options of buildah for its image storage in the cache.
# In a user namespace, overlayfs cannot rename directories of a base image, as dpkg does. vfs can.
use_images() {
    if [ "$1" = "$(dpkg --print-architecture)" ]; then
        images=(--root "$CACHE/images/root" --runroot "$CACHE/images/run")
    else
        images=(--storage-driver vfs --root "$CACHE/images-$1/root"
            --runroot "$CACHE/images-$1/run")
    fi
}
buildah_() { buildah "${images[@]}" "$@"; }

# foreign ARCHITECTURE COMMAND...: runs COMMAND, which may run programs of this architecture. If
# this machine does not run them, qemu does: in a user namespace, which has binfmt_misc of its own
# from Linux 6.7 on.
foreign() (
    if [ "$1" = "$(dpkg --print-architecture)" ] || arch-test "$1" >/dev/null; then
        exec "${@:2}"
    fi
    unshare --user --mount sleep infinity &
    namespaces=$!
    trap 'kill $namespaces' EXIT
    wait_for 10 has_own_users $namespaces
    # All users, as they are.
    echo 0 0 4294967295 >/proc/$namespaces/uid_map
    echo 0 0 4294967295 >/proc/$namespaces/gid_map
    # shellcheck disable=SC2016 # for the shell in the namespaces
    nsenter --target $namespaces --user --mount bash -euc '
        mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
        tr -d "\n" <"$0" >/proc/sys/fs/binfmt_misc/register
        "$@"' /usr/lib/binfmt.d/qemu-aarch64.conf "${@:2}"
)
has_own_users() { [ "$(readlink "/proc/$1/ns/user")" != "$(readlink /proc/self/ns/user)" ]; }
