#!/usr/bin/env bash
# A whole Kubernetes node and its control plane on loopback, as processes of this machine, in one folder.
#   hack/cluster.sh up DIR       prints nothing; DIR/kubeconfig is the administrator's
#   hack/cluster.sh down DIR     ends it all, and leaves nothing
#   hack/cluster.sh reboot DIR   ends containers and containerd as a power cut does
#   hack/cluster.sh start|stop DIR NAME     one of etcd apiserver controllers scheduler containerd kubelet
# It wants a mount namespace whose root is shared: unshare --mount --propagation shared hack/cluster.sh up DIR
# Needs: hack/deps.sh test image, hack/kubernetes.sh all, hack/debian.sh trixie containerd.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

[ $# -ge 2 ] || fail "usage: hack/cluster.sh up|down|start|stop DIR [NAME]"
dir=$2
kube=$(PATH="$PATH" "$here/kubernetes.sh" all)
containerd=$("$here/debian.sh" trixie containerd)/usr/bin
cni=/usr/lib/cni
# Pods of this cluster are in this cgroup, so that they can be told from others'.
cgroup=kube-lxcfs-$(basename "$dir")
sandbox=localhost/kube-lxcfs/busybox:1

ports() { python3 -c 'import socket
all=[socket.socket() for _ in range(7)]
for s in all: s.bind(("127.0.0.1",0))
print(*[s.getsockname()[1] for s in all])'; }

# start NAME COMMAND...: in a session of its own, so that nothing of ours goes with its caller.
run() {
    local name=$1
    shift
    setsid "$@" >>"$dir/$name.log" 2>&1 </dev/null &
    echo $! >"$dir/$name.pid"
}

start() {
    local etcd api peer kubelet healthz controllers scheduler
    read -r etcd api peer kubelet healthz controllers scheduler <"$dir/ports"
    case $1 in
    etcd)
        run etcd etcd --data-dir "$dir/etcd" --listen-client-urls "http://127.0.0.1:$etcd" \
            --advertise-client-urls "http://127.0.0.1:$etcd" --listen-peer-urls "http://127.0.0.1:$peer" \
            --initial-advertise-peer-urls "http://127.0.0.1:$peer" --initial-cluster "default=http://127.0.0.1:$peer"
        ;;
    apiserver)
        run apiserver "$kube/kube-apiserver" --etcd-servers="http://127.0.0.1:$etcd" --bind-address=127.0.0.1 \
            --advertise-address=127.0.0.1 --secure-port="$api" --tls-cert-file="$dir/server.crt" \
            --tls-private-key-file="$dir/server.key" --authorization-mode=RBAC --token-auth-file="$dir/tokens" \
            --service-account-key-file="$dir/sa.key" --service-account-signing-key-file="$dir/sa.key" \
            --service-account-issuer=https://kube-lxcfs.test --service-cluster-ip-range=10.96.0.0/24 \
            --endpoint-reconciler-type=none --allow-privileged=true --kubelet-preferred-address-types=Hostname
        ;;
    controllers)
        run controllers "$kube/kube-controller-manager" --kubeconfig="$dir/kubeconfig" --leader-elect=false \
            --service-account-private-key-file="$dir/sa.key" --root-ca-file="$dir/ca.crt" \
            --use-service-account-credentials=false --secure-port="$controllers" --bind-address=127.0.0.1 --port=0
        ;;
    scheduler)
        run scheduler "$kube/kube-scheduler" --kubeconfig="$dir/kubeconfig" --leader-elect=false \
            --secure-port="$scheduler" --bind-address=127.0.0.1 --port=0
        ;;
    containerd) run containerd env PATH="$containerd:$PATH:/usr/sbin:/sbin" "$containerd/containerd" --config "$dir/containerd.toml" ;;
    kubelet)
        run kubelet env PATH="$PATH:/usr/sbin:/sbin" "$kube/kubelet" --config "$dir/kubelet.yaml" --kubeconfig="$dir/kubeconfig" \
            --root-dir="$dir/kubelet" --container-runtime=remote --container-runtime-endpoint="unix://$dir/run/containerd.sock" \
            --hostname-override=127.0.0.1 --cert-dir="$dir/kubelet-certs"
        ;;
    *) fail "hack/cluster.sh: unknown part '$1'" ;;
    esac
}

stop() {
    local pid
    [ -f "$dir/$1.pid" ] || return 0
    pid=$(cat "$dir/$1.pid")
    kill "${2:--TERM}" "$pid" 2>/dev/null || true
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    rm -f "$dir/$1.pid"
}

kubectl_() { kubectl --kubeconfig "$dir/kubeconfig" "$@"; }

configure() {
    mkdir -p "$dir"/{run,cni,kubelet,logs,nri-plugins,nri-config}
    ports >"$dir/ports"
    local api kubelet healthz
    read -r _ api _ kubelet healthz _ _ <"$dir/ports"
    (
        cd "$dir"
        openssl genrsa -out sa.key 2048
        openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -subj /CN=kube-lxcfs-test-ca -days 2
        openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=kube-apiserver
        printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\n' >ext
        openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out server.crt -days 2 -extfile ext
    ) 2>/dev/null
    local token
    token=$(openssl rand -hex 16)
    echo "$token,admin,1,system:masters" >"$dir/tokens"
    cat >"$dir/kubeconfig" <<EOF
apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: "https://127.0.0.1:$api", certificate-authority: $dir/ca.crt}}]
users: [{name: u, user: {token: $token}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
EOF
    cat >"$dir/containerd.toml" <<EOF
version = 2
root = "$dir/containerd"
state = "$dir/run/containerd"
[grpc]
address = "$dir/run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$sandbox"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "$cni"
conf_dir = "$dir/cni"
[plugins."io.containerd.internal.v1.opt"]
path = "$dir/opt"
[plugins."io.containerd.nri.v1.nri"]
disable = false
socket_path = "$dir/run/nri.sock"
plugin_path = "$dir/nri-plugins"
plugin_config_path = "$dir/nri-config"
EOF
    cat >"$dir/cni/10-bridge.conflist" <<EOF
{"cniVersion":"0.4.0","name":"kube-lxcfs","plugins":[
{"type":"bridge","bridge":"kl$((RANDOM % 1000))","isGateway":true,"ipMasq":false,
 "ipam":{"type":"host-local","dataDir":"$dir/cni-state","ranges":[[{"subnet":"10.$((RANDOM % 100 + 100)).0.0/24"}]]}}]}
EOF
    cat >"$dir/kubelet.yaml" <<EOF
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: $kubelet
healthzPort: $healthz
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup
cgroupsPerQOS: true
enforceNodeAllocatable: []
failSwapOn: false
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
featureGates: {LocalStorageCapacityIsolation: false}
maxPods: 250
registryPullQPS: 0
serializeImagePulls: false
EOF
}

# wait_for SECONDS COMMAND...
wait_for() {
    local n=$(($1 * 5))
    shift
    while ! "$@" >/dev/null 2>&1; do
        n=$((n - 1))
        [ $n -gt 0 ] || return 1
        sleep 0.2
    done
}

up() {
    need_root "a node"
    configure
    local controller
    for controller in cpu cpuacct cpuset memory pids blkio hugetlb systemd freezer devices; do
        if [ -d "/sys/fs/cgroup/$controller" ]; then mkdir -p "/sys/fs/cgroup/$controller/$cgroup"; fi
    done
    if [ -e /sys/fs/cgroup/cpuset/cpuset.cpus ]; then
        cat /sys/fs/cgroup/cpuset/cpuset.cpus >"/sys/fs/cgroup/cpuset/$cgroup/cpuset.cpus"
        cat /sys/fs/cgroup/cpuset/cpuset.mems >"/sys/fs/cgroup/cpuset/$cgroup/cpuset.mems"
    fi
    start etcd
    start apiserver
    start containerd
    wait_for 60 kubectl_ get --raw /readyz || fail "the API server does not get ready: $(tail -n 3 "$dir/apiserver.log")"
    start controllers
    start scheduler
    wait_for 30 "$containerd/ctr" -a "$dir/run/containerd.sock" version || fail "containerd does not answer: $(tail -n 3 "$dir/containerd.log")"
    "$containerd/ctr" -a "$dir/run/containerd.sock" -n k8s.io images import "$("$here/image.sh")" >/dev/null
    start kubelet
    ready() { [ "$(kubectl_ get node 127.0.0.1 -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
    wait_for 90 ready || fail "the node does not get ready: $(tail -n 5 "$dir/kubelet.log")"
    wait_for 30 kubectl_ get serviceaccount default || fail "no service account: $(tail -n 3 "$dir/controllers.log")"
}

# Ends containers and their runtime as a power cut does: nothing is told, and no mount is left. The kubelet must not run.
reboot() {
    local pid part tree
    # Containers first: their shims outlive containerd.
    for pid in $(pgrep -f -- "-address $dir/run/containerd.sock"); do kill -KILL "$pid" 2>/dev/null || true; done
    local tree
    for _ in 1 2 3 4 5; do
        for tree in /sys/fs/cgroup/*/"$cgroup" /sys/fs/cgroup/"$cgroup"; do
            [ -d "$tree" ] || continue
            find "$tree" -name cgroup.procs -print0 2>/dev/null | xargs -0 -r cat 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
            find "$tree" -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null || true
        done
        sleep 0.2
    done
    stop containerd -KILL
    awk -v d="$dir/" 'index($5, d) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r part; do umount -l "$part" 2>/dev/null || true; done
}

down() {
    local part
    for part in kubelet controllers scheduler; do stop $part; done
    reboot
    for part in apiserver etcd; do stop $part; done
    rmdir /sys/fs/cgroup/*/"$cgroup" /sys/fs/cgroup/"$cgroup" 2>/dev/null || true
    local bridge
    bridge=$(sed -n 's/.*"bridge":"\(kl[0-9]*\)".*/\1/p' "$dir/cni/10-bridge.conflist" 2>/dev/null || true)
    if [ -n "$bridge" ]; then ip link delete "$bridge" 2>/dev/null || true; fi
    rm -rf "$dir"
}

case $1 in
up) up ;;
down) down ;;
reboot) reboot ;;
start | stop) "$1" "$3" "${@:4}" ;;
*) fail "usage: hack/cluster.sh up|down|start|stop DIR [NAME]" ;;
esac
