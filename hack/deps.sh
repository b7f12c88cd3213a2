#!/usr/bin/env bash
# Installs from the distribution what building, testing or the demo needs and this machine lacks.
#   hack/deps.sh build|demo|test|kubernetes|cluster|image|lint ...
# What is there already is left as it is, whoever put it there. Services of new packages are not started.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

# One line a command: the command, its package.
packages_of() {
    case $1 in
    build) echo "cc build-essential" "protoc protobuf-compiler" ;;
    demo) echo "lxcfs lxcfs" "containerd containerd" "runc runc" "ctr containerd" "busybox busybox-static" "pgrep procps" ;;
    test) echo "etcd etcd-server" "unshare util-linux" "openssl openssl" "kubectl kubernetes-client" "podman podman" "crun crun" ;;
    kubernetes) echo "go golang-go" "dpkg-source dpkg-dev" "rsync rsync" "make make" ;;
    cluster) echo "ip iproute2" "iptables iptables" "conntrack conntrack" "socat socat" "nsenter util-linux" "python3 python3" "/usr/lib/cni/bridge containernetworking-plugins" ;;
    image) echo "buildah buildah" "mmdebstrap mmdebstrap" ;;
    lint) echo "shellcheck shellcheck" ;;
    *) fail "hack/deps.sh: unknown set '$1' (build, demo, test, kubernetes, cluster, image, lint)" ;;
    esac
}

missing=()
for set in "$@"; do
    # shellcheck disable=SC2046 # words are wanted: command and package in turn
    set -- $(packages_of "$set")
    while [ $# -gt 0 ]; do
        have "$1" || missing+=("$2")
        shift 2
    done
done
[ ${#missing[@]} -gt 0 ] || exit 0

have apt-get || fail "missing: ${missing[*]}; this is no Debian or Ubuntu, install them by hand and run it again"
need_root "installing ${missing[*]}"
say "installing from the distribution: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# A package's service must not start beside what runs here; Debian asks this file for leave.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
log=$(mktemp)
install() { apt-get install -y -q --no-install-recommends "${missing[@]}" >"$log" 2>&1; }
if ! install; then
    # Old package lists are the usual reason; a foreign list that cannot be read is none of ours.
    apt-get update -q >>"$log" 2>&1 || true
    install || {
        tail -20 "$log" >&2
        fail "apt-get could not install ${missing[*]} (whole output: $log)"
    }
fi
rm -f "$log"
