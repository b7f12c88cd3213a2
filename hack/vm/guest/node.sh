# shellcheck shell=bash
# A node in a virtual machine: containerd, and kube-lxcfs as the units of manifests/systemd. Sourced
# in the machine. Its files are in /payload, as hack/vm/run.sh puts them there.

# shellcheck disable=SC2034 # for the scenarios
socket=/run/containerd/containerd.sock
lxcfs_path=/var/lib/lxcfs
# The cgroup of test pods: the systemd cgroup driver takes the name of a slice.
slice=kubelxcfs-pods.slice
# shellcheck disable=SC2034 # for the scenarios
opt_in=kube-lxcfs.io/inject=true

note() { echo "  $*"; }

# wait_for SECONDS COMMAND...: repeats COMMAND until it succeeds; status 1 on timeout.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    while ! "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { note "timed out: $*" && return 1; }
        sleep 0.5
    done
}

pod() { timeout 180 /payload/pod "$socket" "$@"; }

# start_containerd [RUNTIME]: with the image of test pods.
start_containerd() {
    sed "s|@RUNTIME@|${1:-runc}|" /payload/containerd.toml >/etc/containerd/config.toml
    write_cni
    systemctl start containerd
    wait_for 120 pod ready
    ctr -n k8s.io images import /payload/busybox-image.tar >/dev/null
}

# write_cni: a network for pods with a network namespace, which user namespaces need.
write_cni() {
    mkdir -p /etc/cni/net.d
    cat >/etc/cni/net.d/bridge.conflist <<'CNI'
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true,
     "ipam": {"type": "host-local", "subnet": "10.88.0.0/16"}}]}
CNI
}

# install_kube_lxcfs: the program, the units, and lxcfs of the payload in place of the release's.
install_kube_lxcfs() {
    install /payload/kube-lxcfs /usr/bin/kube-lxcfs
    cp /payload/systemd/*.service /etc/systemd/system/
    [ ! -d /payload/lxcfs ] || cp -a /payload/lxcfs/. /
    systemctl daemon-reload
}

main_pid() { systemctl show -P MainPID "$1"; }
# Whether lxcfs is the distribution's unit, without a supervisor.
host_managed=
lxcfs_pid() {
    if [ -n "$host_managed" ]; then
        main_pid lxcfs
    else
        pgrep -P "$(main_pid kube-lxcfs-lxcfs)" lxcfs
    fi
}
is_serving() { [ "$(findmnt -n -o FSTYPE "$lxcfs_path")" = fuse.lxcfs ] && head -c1 \
    "$lxcfs_path/proc/uptime" >/dev/null; }
is_ready() { [ "$(http_status /readyz)" = 200 ]; }

# http_status PATH: of the agent.
http_status() {
    exec 7<>/dev/tcp/127.0.0.1/9808 || return 1
    printf 'GET %s HTTP/1.0\r\n\r\n' "$1" >&7
    head -n 1 <&7 | cut -d' ' -f2
    exec 7>&-
}

start_supervisor() { systemctl start kube-lxcfs-lxcfs && wait_for 60 is_serving; }
start_agent() { systemctl start kube-lxcfs-agent && wait_for 120 is_ready; }

# run_pod NAME ARGUMENT...: runs a pod with `pod run`, and sets container[NAME] and sandbox[NAME].
declare -A container sandbox
run_pod() {
    local ids
    ids=$(pod run "$1" --cgroup "$slice" "${@:2}") || return 1
    sandbox[$1]=${ids% *}
    container[$1]=${ids#* }
}

remove_pod() {
    pod rm "${sandbox[$1]}"
    unset "sandbox[$1]" "container[$1]"
}

# in_pod NAME COMMAND...
in_pod() { pod exec "${container[$1]}" "${@:2}"; }
memory_in() { in_pod "$1" cat /proc/meminfo | awk '/^MemTotal:/ { print $2 }'; }

# views: the JSON of `kube-lxcfs status`.
views() { kube-lxcfs status -o json; }
# view_count NAME [STATE]: the number of view files of a container, in this state.
view_count() {
    views | jq --arg id "${container[$1]}" --arg state "${2-}" '[.[] | select(.id == $id) |
        .files | .[] | select($state == "" or . == $state)] | length'
}
