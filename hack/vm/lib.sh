# shellcheck shell=bash
# Functions and settings that the scripts in hack/vm/ share. Sourced, never run.
. "$(dirname "${BASH_SOURCE[0]}")/../offline/lib.sh"

# Root file systems, kernels and logs.
# shellcheck disable=SC2034 # for the scripts
vm=$CACHE/vm
# The architecture of virtual machines, as Debian calls it.
arch=${VM_ARCH:-amd64}
# shellcheck disable=SC2034 # for the scripts
case $arch in
amd64) arch_suffix='' dependencies=vm ;;
arm64) arch_suffix=-arm64 dependencies=vm-arm64 ;;
*) fail "unknown architecture '$arch'; valid: amd64 arm64" ;;
esac

# debian OPTION... RELEASE DIR: mmdebstrap with this machine's mirror and keys. The package lists of
# an old release have expired.
debian() {
    local mirror
    mirror=$(debian_mirror "make a root file system")
    foreign "$arch" mmdebstrap --quiet --architectures="$arch" \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --keyring=/usr/share/keyrings/debian-archive-keyring.gpg "$@" "$mirror"
}

# image DIR FILE MIB LABEL: writes an ext4 image of a directory.
image() {
    rm -f "$2.new"
    mke2fs -q -t ext4 -d "$1" -L "$4" -m 0 "$2.new" "$3M" >/dev/null
    mv "$2.new" "$2"
}
