# shellcheck shell=bash
# Functions that the scripts in hack/offline/ share. Sourced, never run.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# debian_mirror: prints the URI of the Debian mirror in apt's configuration; nothing without one.
debian_mirror() {
    # shellcheck disable=SC2016 # a variable of apt, not of the shell
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' |
        sed -n '\|/debian/$|p' | head -n 1
}

# buildah_ COMMAND...: runs buildah on image storage in the cache.
buildah_() {
    buildah --root "$CACHE/images/root" --runroot "$CACHE/images/run" "$@"
}
