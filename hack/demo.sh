#!/usr/bin/env bash
# The demo: an lxcfs and a containerd of its own, and two pods, one of which opts in. It leaves
# nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

need_root "the demo (it mounts file systems and runs containers)"
hack/deps.sh build demo
image=$(hack/offline/busybox-image.sh)
say "building kube-lxcfs"
cargo build --quiet --locked --bin kube-lxcfs --example pod
PATH="$PATH:/usr/sbin:/sbin:$PWD/target/debug:$PWD/target/debug/examples"

dir=$(mktemp -d /tmp/kube-lxcfs-demo.XXXXXX)
socket=$dir/sock
endpoint=unix://$socket
started=()

# demo_cgroups: prints the cgroups of the demo's pods, children first.
demo_cgroups() {
    find /sys/fs/cgroup -depth -type d -path '*/kube-lxcfs-demo*' 2>/dev/null || true
}

# clean_up: removes pods, processes, mounts, cgroups and files, in this order.
clean_up() {
    trap '' INT TERM
    local pid point cgroup try
    if [ -S "$socket" ]; then timeout 30 pod "$socket" clear >/dev/null 2>&1 || true; fi
    # Processes of pods that could not be removed.
    for pid in $(demo_cgroups | sed 's|$|/cgroup.procs|' | xargs -r cat 2>/dev/null || true); do
        kill -9 "$pid" 2>/dev/null || true
    done
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
    # Shims of such pods outlive containerd.
    for pid in $(pgrep -f -- "$socket" || true); do kill -9 "$pid" 2>/dev/null || true; done
    cut -d' ' -f5 /proc/self/mountinfo | { grep "^$dir/" || true; } | sort -r |
        while read -r point; do umount -l "$point" 2>/dev/null || true; done
    # A cgroup can be removed a moment after its last process has exited.
    for try in 1 2 3 4 5; do
        for cgroup in $(demo_cgroups); do rmdir "$cgroup" 2>/dev/null || true; done
        [ -n "$(demo_cgroups)" ] || break
        sleep "0.$try"
    done
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# in_background NAME COMMAND...: in a session of its own, so that Ctrl-C reaches only this script.
in_background() {
    local log=$dir/$1.log
    shift
    setsid "$@" >"$log" 2>&1 &
    started+=($!)
}

# expect WHAT COMMAND...: waits until COMMAND succeeds.
expect() {
    wait_for 30 "${@:2}" && return
    tail -n 5 "$dir"/*.log >&2
    fail "timed out after 30 s: $1"
}

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }
indent() { sed 's/^/      /'; }
memory_in() { pod "$socket" exec "$1" grep MemTotal /proc/meminfo; }
sees_node() { [ "$(memory_in "$1")" = "$(grep MemTotal /proc/meminfo)" ]; }
sees_limit() { ! sees_node "$1"; }
show_memory() { printf '  $ grep MemTotal /proc/meminfo\n      %s\n' "$(memory_in "$1")"; }

# show CONTAINER: the output of common tools in it.
show() {
    local command
    for command in "free -m" "grep -c ^processor /proc/cpuinfo" \
        "cat /sys/devices/system/cpu/online" "uptime -p"; do
        printf '  $ %s\n' "$command"
        # shellcheck disable=SC2086 # splits into words
        pod "$socket" exec "$1" $command | indent
    done
}

in_background lxcfs kube-lxcfs lxcfs --lxcfs-path "$dir/lxcfs"
supervisor=${started[-1]}
expect "lxcfs serves" test -r "$dir/lxcfs/proc/uptime"
containerd_config "$dir" "$dir/cni" true >"$dir/config.toml"
in_background containerd containerd --config "$dir/config.toml"
expect "containerd responds" pod "$socket" ready
ctr -a "$socket" -n k8s.io images import "$image" >/dev/null
sleep 1

heading "This machine has $(nproc) CPUs and $(free -m | awk '/^Mem/ { print $2 }') MiB of memory." \
    "Two pods run on it, each limited to half a CPU and 128 MiB."
echo "  The first has the annotation kube-lxcfs.io/inject: \"true\", the second has none."
read -r _ opted_in < <(pod "$socket" run opted-in kube-lxcfs.io/inject=true)
read -r _ other < <(pod "$socket" run other)
sleep 3

heading "1. Without kube-lxcfs, the first pod sees the memory, CPUs and uptime of the machine."
echo "  (nproc uses sched_getaffinity(2), not /proc: no file can change its result.)"
show "$opted_in"

heading "2. The agent starts. No pod restarts, and no pod has a volume of lxcfs."
echo "  \$ kube-lxcfs agent --pods-from cri"
in_background agent kube-lxcfs agent --pods-from cri --listen 127.0.0.1:0 \
    --lxcfs-path "$dir/lxcfs" --cri-endpoint "$endpoint"
agent=${started[-1]}
expect "the first pod has a view" sees_limit "$opted_in"
indent <"$dir/agent.log"

heading "3. The same container, with the same processes, sees its own limits and uptime."
show "$opted_in"

heading "4. The second pod did not opt in and has no view."
show_memory "$other"

heading "5. The views of this node: read-only mounts over files of the container's /proc and /sys."
echo "  \$ kube-lxcfs status"
kube-lxcfs status --lxcfs-path "$dir/lxcfs" --cri-endpoint "$endpoint" | indent

heading "6. lxcfs is killed while a program in the container keeps reading /proc/meminfo."
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
    echo "reads of the limit: $own, of the memory of the node: $node, errors: $errors"'
pod "$socket" exec "$opted_in" sh -c "$reader" >"$dir/counts" &
reading=$!
sleep 1
echo "  \$ pkill -9 lxcfs"
pkill -9 -P "$supervisor" lxcfs
wait "$reading"
indent <"$dir/counts"
expect "the first pod has a view again" sees_limit "$opted_in"
echo "  Readers waited while the supervisor restarted lxcfs and remounted the view."
show_memory "$opted_in"
{ grep -E ' (exit_reason|summary|requests|lxcfs)=' "$dir/lxcfs.log" || true; } | tail -n +2 | indent

heading "7. The agent stops. The view stays, because the mount table is the only state."
kill "$agent"
wait "$agent" || true
show_memory "$opted_in"

heading "8. The view is removed from the running container."
echo "  \$ kube-lxcfs umount --container ${opted_in:0:12}"
kube-lxcfs umount --container "$opted_in" --cri-endpoint "$endpoint" | indent
sees_node "$opted_in" || fail "the container still has a view"
show_memory "$opted_in"

heading "Removing the pods, containerd and lxcfs of this demo."
