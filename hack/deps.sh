#!/usr/bin/env bash
# Installs packages of Debian or Ubuntu whose commands are missing. Root is needed only if a command
# is missing. Services of new packages are not started.
#   hack/deps.sh SET...       SET: build, demo, test, helm, kubernetes, cluster, image, programs,
#                             lint, vm, vm-arm64
set -euo pipefail
. "$(dirname "$0")/lib.sh"

# packages_of SET: prints pairs of a command and its package.
packages_of() {
    case $1 in
    build)
        echo cc build-essential protoc protobuf-compiler
        ;;
    demo)
        echo lxcfs lxcfs containerd containerd ctr containerd runc runc \
            busybox busybox-static pgrep procps
        ;;
    test)
        echo etcd etcd-server unshare util-linux openssl openssl kubectl kubernetes-client \
            podman podman crun crun promtool prometheus prometheus prometheus
        ;;
    helm)
        echo npm npm python3 python3
        ;;
    kubernetes)
        echo go golang-go dpkg-source dpkg-dev rsync rsync make make git git cc build-essential
        ;;
    cluster)
        echo ip iproute2 iptables iptables conntrack conntrack socat socat nsenter util-linux \
            python3 python3 jq jq /usr/lib/cni/bridge containernetworking-plugins
        ;;
    image)
        echo buildah buildah mmdebstrap mmdebstrap update-ca-certificates ca-certificates
        ;;
    programs)
        echo mmdebstrap mmdebstrap python3 python3 dpkg-source dpkg-dev make make
        ;;
    lint)
        echo shellcheck shellcheck c++ build-essential python3 python3 \
            apparmor_parser apparmor scmp_sys_resolver seccomp codespell codespell
        ;;
    vm)
        echo qemu-system-x86_64 qemu-system-x86 mmdebstrap mmdebstrap mke2fs e2fsprogs \
            busybox busybox-static cpio cpio xz xz-utils modprobe kmod python3 python3
        ;;
    vm-arm64)
        packages_of vm
        echo qemu-system-aarch64 qemu-system-arm arch-test arch-test \
            qemu-aarch64-static qemu-user-static
        ;;
    *)
        fail "unknown set '$1'; valid: build demo test helm kubernetes cluster image programs" \
            "lint vm vm-arm64"
        ;;
    esac
}

missing=()
for set in "$@"; do
    pairs=$(packages_of "$set")
    # shellcheck disable=SC2086 # splits into words
    set -- $pairs
    while [ $# -gt 0 ]; do
        have "$1" || missing+=("$2")
        shift 2
    done
done
[ ${#missing[@]} -gt 0 ] || exit 0

have apt-get || fail "missing: ${missing[*]}; install them by hand, there is no apt-get"
need_root "installing ${missing[*]}"
say "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# With this file Debian starts no service of a new package.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
log=$(mktemp)
# Another apt-get may be at work.
wait=(-o DPkg::Lock::Timeout=600)
install() {
    apt-get "${wait[@]}" install -y -q --no-install-recommends "${missing[@]}" >"$log" 2>&1
}
if ! install; then
    # Usually the package lists are old. An update that fails for one repository is enough.
    apt-get update -q >>"$log" 2>&1 || true
    if ! install; then
        tail -n 20 "$log" >&2
        fail "failed to install ${missing[*]} (log: $log)"
    fi
fi
rm -f "$log"
