#!/usr/bin/env bash
# The demo: an own lxcfs and an own containerd beside whatever runs here, two pods, one of which opts in. Leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

need_root "the demo (it mounts, and runs containers)"
hack/deps.sh build demo
image=$(hack/image.sh)
say "building kube-lxcfs"
cargo build --quiet --locked --bin kube-lxcfs --example pod
PATH="$PATH:/usr/sbin:/sbin:$PWD/target/debug:$PWD/target/debug/examples"

dir=$(mktemp -d /tmp/kube-lxcfs-demo.XXXXXX)
socket=$dir/containerd.sock
started=()

# At the end and on Ctrl-C: pods, then the processes that were started here, then mounts, cgroups and files.
clean_up() {
    trap '' INT TERM
    local pid
    if [ -S "$socket" ]; then timeout 30 pod "$socket" clear >/dev/null 2>&1 || true; fi
    # What could not be removed in order is in this demo's cgroup.
    for pid in $(find /sys/fs/cgroup -path '*/kube-lxcfs-demo/*' -name cgroup.procs -exec cat {} + 2>/dev/null || true); do
        kill -9 "$pid" 2>/dev/null || true
    done
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
    # Shims outlive containerd where the pods could not be removed in order.
    for pid in $(pgrep -f -- "$socket" || true); do kill -9 "$pid" 2>/dev/null || true; done
    cut -d' ' -f5 /proc/self/mountinfo | grep "^$dir/" | sort -r | while read -r point; do
        umount -l "$point" 2>/dev/null || true
    done || true
    local try
    for try in 1 2 3 4 5; do
        find /sys/fs/cgroup -depth -type d -path '*/kube-lxcfs-demo*' -exec rmdir {} \; 2>/dev/null || true
        if ! ls -d /sys/fs/cgroup/*kube-lxcfs-demo* /sys/fs/cgroup/*/kube-lxcfs-demo* >/dev/null 2>&1; then break; fi
        sleep "0.$try"
    done
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# in_background NAME COMMAND...
in_background() {
    local log=$dir/$1.log
    shift
    # In a session of its own: Ctrl-C is for this script, which ends things in their order.
    setsid "$@" >"$log" 2>&1 &
    started+=($!)
}

# wait_for WHAT COMMAND...
wait_for() {
    local what=$1 i
    shift
    for ((i = 0; i < 300; i++)); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    tail -5 "$dir"/*.log >&2
    fail "$what: not within 30 seconds"
}

tell() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# show CONTAINER: what programs in it see.
show() {
    local command
    for command in "free -m" "grep -c ^processor /proc/cpuinfo" "cat /sys/devices/system/cpu/online" "uptime -p"; do
        printf '  $ %s\n' "$command"
        # shellcheck disable=SC2086 # words are wanted
        pod "$socket" exec "$1" $command | sed 's/^/      /'
    done
}

total() { pod "$socket" exec "$1" grep MemTotal /proc/meminfo; }
has_view() { [ "$(total "$1")" != "$(grep MemTotal /proc/meminfo)" ]; }
has_no_view() { ! has_view "$1"; }

in_background lxcfs kube-lxcfs lxcfs --lxcfs-path "$dir/lxcfs"
supervisor=${started[-1]}
wait_for "lxcfs serves" test -r "$dir/lxcfs/proc/uptime"
cat >"$dir/config.toml" <<CONFIG
version = 2
root = "$dir/root"
state = "$dir/state"
[grpc]
address = "$socket"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/kube-lxcfs/busybox:1"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "$dir/cni"
[plugins."io.containerd.internal.v1.opt"]
path = "$dir/opt"
CONFIG
in_background containerd containerd --config "$dir/config.toml"
wait_for "containerd answers" pod "$socket" ready
ctr -a "$socket" -n k8s.io images import "$image" >/dev/null
sleep 1

tell "This machine has $(nproc) CPUs and $(free -m | awk '/^Mem/ {print $2}') MiB. Two pods run on it, each limited to half a CPU and 128 MiB."
echo "  The first says in its annotations  kube-lxcfs.io/inject: \"true\"; the second says nothing."
read -r _ opted_in < <(pod "$socket" run opted-in kube-lxcfs.io/inject=true)
read -r _ left_alone < <(pod "$socket" run left-alone)
sleep 3

tell "1. Without kube-lxcfs: the first pod sees the machine's memory, CPUs and age."
echo "  (nproc alone asks the kernel for its affinity and not /proc; no file can change its answer.)"
show "$opted_in"

tell "2. The agent starts. No pod is restarted, and nothing of lxcfs is mounted into the pods beforehand."
echo "  \$ kube-lxcfs agent --pods-from cri"
in_background agent kube-lxcfs agent --pods-from cri --listen 127.0.0.1:0 --lxcfs-path "$dir/lxcfs" --cri-endpoint "unix://$socket"
agent=${started[-1]}
wait_for "the view is there" has_view "$opted_in"
sed 's/^/      /' "$dir/agent.log"

tell "3. The same container, the same processes: its own limits and its own age."
show "$opted_in"

tell "4. The second pod did not opt in and was left alone."
printf '  $ grep MemTotal /proc/meminfo\n      %s\n' "$(total "$left_alone")"

tell "5. The node's views, and what one is: read-only mounts over the container's own files."
echo "  \$ kube-lxcfs status"
kube-lxcfs status --lxcfs-path "$dir/lxcfs" --cri-endpoint "unix://$socket" | sed 's/^/      /'

tell "6. lxcfs is killed while a program in the container reads /proc/meminfo all the while."
# shellcheck disable=SC2016 # for the shell in the container
reader='own=0 node=0 errors=0
    end=$(($(date +%s) + 4))
    while [ "$(date +%s)" -lt $end ]; do
        if read -r _ total _ 2>/dev/null </proc/meminfo; then
            if [ "$total" = 131072 ]; then own=$((own + 1)); else node=$((node + 1)); fi
        else
            errors=$((errors + 1))
        fi
    done
    echo "$own times its own value, $node times the node'"'"'s, $errors errors"'
pod "$socket" exec "$opted_in" sh -c "$reader" >"$dir/counts" &
reading=$!
sleep 1
echo "  \$ pkill -9 lxcfs"
pkill -9 -P "$supervisor" lxcfs
wait "$reading"
echo "      it read $(cat "$dir/counts")"
echo "  Its own /proc came back at once, and lxcfs's answers with the new lxcfs. Nothing was restarted:"
printf '  $ grep MemTotal /proc/meminfo\n      %s\n' "$(total "$opted_in")"
grep -v 'lxcfs: ' "$dir/lxcfs.log" | tail -n +2 | sed 's/^/      /'

tell "7. The agent ends, and the view stays: the kernel's mount table is the only state."
kill "$agent"
wait "$agent" || true
printf '  $ grep MemTotal /proc/meminfo\n      %s\n' "$(total "$opted_in")"

tell "8. And back, while the container runs."
echo "  \$ kube-lxcfs umount --container ${opted_in:0:12}"
kube-lxcfs umount --container "$opted_in" --cri-endpoint "unix://$socket" | sed 's/^/      /'
has_no_view "$opted_in" || fail "the view is still there"
printf '  $ grep MemTotal /proc/meminfo\n      %s\n' "$(total "$opted_in")"

tell "Cleaning up: pods, containerd and lxcfs of this demo are removed."
