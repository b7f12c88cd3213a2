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

# buildah_ COMMAND...: runs buildah on image storage in the cache.
buildah_() {
    buildah --root "$CACHE/images/root" --runroot "$CACHE/images/run" "$@"
}
