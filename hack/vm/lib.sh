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
    foreign mmdebstrap --quiet --architectures="$arch" \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --keyring=/usr/share/keyrings/debian-archive-keyring.gpg "$@" "$mirror"
}

# foreign COMMAND...: runs COMMAND, which may run programs of $arch. If this machine does not run
# them, qemu does: in a user namespace, which has binfmt_misc of its own from Linux 6.7 on.
foreign() (
    if [ "$arch" = "$(dpkg --print-architecture)" ] || arch-test "$arch" >/dev/null; then
        exec "$@"
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
        "$@"' /usr/lib/binfmt.d/qemu-aarch64.conf "$@"
)
has_own_users() { [ "$(readlink "/proc/$1/ns/user")" != "$(readlink /proc/self/ns/user)" ]; }

# image DIR FILE MIB LABEL: writes an ext4 image of a directory.
image() {
    rm -f "$2.new"
    mke2fs -q -t ext4 -d "$1" -L "$4" -m 0 "$2.new" "$3M" >/dev/null
    mv "$2.new" "$2"
}
