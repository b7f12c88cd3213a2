#!/usr/bin/env bash
# A Kubernetes node and its control plane on loopback, as processes of this machine, with all their
# files in one directory.
#   hack/cluster.sh up DIR                     writes the administrator's DIR/kubeconfig
#   hack/cluster.sh down DIR                   stops everything and removes DIR
#   hack/cluster.sh reboot DIR                 kills containers and containerd, as a power cut does
#   hack/cluster.sh start|stop DIR COMPONENT   COMPONENT: etcd, apiserver, controllers, scheduler,
#                                              containerd or kubelet
# Needs a mount namespace whose root is shared:
#   unshare --mount --propagation shared hack/cluster.sh up DIR
# Needs: hack/deps.sh test cluster, hack/offline/kubernetes.sh all, and
#   hack/offline/debian.sh trixie containerd. The flags are those of Kubernetes 1.20.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

usage="usage: hack/cluster.sh up|down|reboot DIR | start|stop DIR COMPONENT"
[ $# -ge 2 ] || fail "$usage"
dir=$2
# containerd's files: its socket is run/sock, that of NRI run/nri.sock.
run=$dir/run
kube=$("$here/offline/kubernetes.sh" all)
containerd=$("$here/offline/debian.sh" trixie containerd)/usr/bin
# The parent of the cgroups of this cluster's pods.
cgroup=kube-lxcfs-$(basename "$dir")

# run_in_background NAME COMMAND...: starts COMMAND in a session of its own, which outlives this
# script.
run_in_background() {
    local name=$1
    shift
    setsid "$@" >>"$dir/$name.log" 2>&1 </dev/null &
    echo $! >"$dir/$name.pid"
}

start() {
    local etcd api peer kubelet healthz controllers scheduler host=127.0.0.1
    read -r etcd api peer kubelet healthz controllers scheduler <"$dir/ports"
    local path=$PATH:/usr/sbin:/sbin
    case $1 in
    etcd)
        run_in_background etcd etcd --data-dir "$dir/etcd" \
            --listen-client-urls "http://$host:$etcd" \
            --advertise-client-urls "http://$host:$etcd" \
            --listen-peer-urls "http://$host:$peer" \
            --initial-advertise-peer-urls "http://$host:$peer" \
            --initial-cluster "default=http://$host:$peer"
        ;;
    apiserver)
        run_in_background apiserver "$kube/kube-apiserver" \
            --etcd-servers="http://$host:$etcd" --endpoint-reconciler-type=none \
            --bind-address=$host --advertise-address=$host --secure-port="$api" \
            --tls-cert-file="$dir/server.crt" --tls-private-key-file="$dir/server.key" \
            --authorization-mode=RBAC --token-auth-file="$dir/tokens" \
            --service-account-key-file="$dir/sa.key" \
            --service-account-signing-key-file="$dir/sa.key" \
            --service-account-issuer=https://kube-lxcfs.test \
            --service-cluster-ip-range=10.96.0.0/24 --allow-privileged=true \
            --kubelet-preferred-address-types=Hostname
        ;;
    controllers)
        run_in_background controllers "$kube/kube-controller-manager" \
            --kubeconfig="$dir/kubeconfig" --leader-elect=false \
            --service-account-private-key-file="$dir/sa.key" --root-ca-file="$dir/ca.crt" \
            --use-service-account-credentials=false \
            --bind-address=$host --secure-port="$controllers" --port=0
        ;;
    scheduler)
        run_in_background scheduler "$kube/kube-scheduler" \
            --kubeconfig="$dir/kubeconfig" --leader-elect=false \
            --bind-address=$host --secure-port="$scheduler" --port=0
        ;;
    containerd)
        # containerd takes the shim of its own version from PATH.
        run_in_background containerd env PATH="$containerd:$path" \
            "$containerd/containerd" --config "$dir/containerd.toml"
        ;;
    kubelet)
        run_in_background kubelet env PATH="$path" "$kube/kubelet" \
            --config "$dir/kubelet.yaml" --kubeconfig="$dir/kubeconfig" \
            --root-dir="$dir/kubelet" --cert-dir="$dir/kubelet-certs" \
            --container-runtime=remote --container-runtime-endpoint="unix://$run/sock" \
            --hostname-override=$host
        ;;
    *) fail "unknown component '$1'; $usage" ;;
    esac
}

# stop COMPONENT [SIGNAL]: with SIGKILL after 10 seconds.
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
ctr_() { "$containerd/ctr" -a "$run/sock" "$@"; }
# log_of COMPONENT: the end of its log.
log_of() { tail -n 5 "$dir/$1.log"; }

# write_ports: free ports, in the order in which `start` reads them.
write_ports() {
    python3 -c 'import socket
sockets = [socket.socket() for _ in range(7)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*[s.getsockname()[1] for s in sockets])' >"$dir/ports"
}

write_certificates() {
    cd "$dir"
    openssl genrsa -out sa.key 2048
    openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt \
        -subj /CN=kube-lxcfs-test-ca -days 2
    openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr \
        -subj /CN=kube-apiserver
    cat >ext <<EXT
subjectAltName=IP:127.0.0.1,DNS:localhost
extendedKeyUsage=serverAuth
EXT
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial \
        -out server.crt -days 2 -extfile ext
}

# write_kubeconfig PORT
write_kubeconfig() {
    local token
    token=$(openssl rand -hex 16)
    echo "$token,admin,1,system:masters" >"$dir/tokens"
    cat >"$dir/kubeconfig" <<YAML
apiVersion: v1
kind: Config
current-context: c
clusters:
  - name: c
    cluster: {server: "https://127.0.0.1:$1", certificate-authority: $dir/ca.crt}
users:
  - name: u
    user: {token: $token}
contexts:
  - name: c
    context: {cluster: c, user: u}
YAML
}

write_cni_config() {
    cat >"$dir/cni/10-bridge.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "kube-lxcfs", "plugins": [
 {"type": "bridge", "bridge": "kl$((RANDOM % 1000))", "isGateway": true, "ipMasq": false,
  "ipam": {"type": "host-local", "dataDir": "$dir/cni-state",
   "ranges": [[{"subnet": "10.$((RANDOM % 100 + 100)).0.0/24"}]]}}]}
JSON
}

# write_kubelet_config PORT HEALTHZ_PORT
write_kubelet_config() {
    cat >"$dir/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: $1
healthzPort: $2
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
YAML
}

configure() {
    local api kubelet healthz
    mkdir -p "$dir"/{cni,kubelet,logs} "$run"/{nri-plugins,nri-config}
    write_ports
    read -r _ api _ kubelet healthz _ _ <"$dir/ports"
    logged "$dir/certificates.log" "make certificates" write_certificates
    write_kubeconfig "$api"
    containerd_config "$run" "$dir/cni" false >"$dir/containerd.toml"
    write_cni_config
    write_kubelet_config "$kubelet" "$healthz"
}

# make_cgroups: makes the kubelet's cgroupRoot in each hierarchy of cgroup v1.
make_cgroups() {
    local controller cpuset=/sys/fs/cgroup/cpuset file
    for controller in cpu cpuacct cpuset memory pids blkio hugetlb systemd freezer devices; do
        if [ -d "/sys/fs/cgroup/$controller" ]; then
            mkdir -p "/sys/fs/cgroup/$controller/$cgroup"
        fi
    done
    if [ -e $cpuset/cpuset.cpus ]; then
        for file in cpuset.cpus cpuset.mems; do
            cat "$cpuset/$file" >"$cpuset/$cgroup/$file"
        done
    fi
}

node_is_ready() {
    local status='{.status.conditions[?(@.type=="Ready")].status}'
    [ "$(kubectl_ get node 127.0.0.1 -o "jsonpath=$status")" = True ]
}

up() {
    need_root "a node"
    configure
    make_cgroups
    start etcd
    start apiserver
    start containerd
    wait_for 60 kubectl_ get --raw /readyz ||
        fail "the API server is not ready: $(log_of apiserver)"
    start controllers
    start scheduler
    wait_for 30 ctr_ version || fail "containerd does not respond: $(log_of containerd)"
    ctr_ -n k8s.io images import "$("$here/offline/busybox-image.sh")" >/dev/null
    start kubelet
    wait_for 90 node_is_ready || fail "the node is not ready: $(log_of kubelet)"
    wait_for 30 kubectl_ get serviceaccount default ||
        fail "the default service account does not exist: $(log_of controllers)"
}

# kill_containers: kills the shims, which outlive containerd, and all processes of the pods.
kill_containers() {
    local pid tree
    for pid in $(pgrep -f -- "-address $run/sock"); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    for _ in 1 2 3 4 5; do
        for tree in /sys/fs/cgroup/*/"$cgroup" /sys/fs/cgroup/"$cgroup"; do
            [ -d "$tree" ] || continue
            find "$tree" -name cgroup.procs -print0 2>/dev/null | xargs -0 -r cat 2>/dev/null |
                xargs -r kill -KILL 2>/dev/null || true
            find "$tree" -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null || true
        done
        sleep 0.2
    done
}

unmount_all() {
    local point
    awk -v d="$dir/" 'index($5, d) == 1 { print $5 }' /proc/self/mountinfo | sort -r |
        while read -r point; do umount -l "$point" 2>/dev/null || true; done
}

# reboot: kills containers and containerd without notice, and unmounts everything. The kubelet must
# be stopped.
reboot() {
    kill_containers
    stop containerd -KILL
    unmount_all
}

down() {
    local component bridge
    for component in kubelet controllers scheduler; do stop $component; done
    reboot
    for component in apiserver etcd; do stop $component; done
    rmdir /sys/fs/cgroup/*/"$cgroup" /sys/fs/cgroup/"$cgroup" 2>/dev/null || true
    bridge=$(sed -n 's/.*"bridge": "\(kl[0-9]*\)".*/\1/p' "$dir/cni/10-bridge.conflist" \
        2>/dev/null || true)
    if [ -n "$bridge" ]; then ip link delete "$bridge" 2>/dev/null || true; fi
    rm -rf "$dir"
}

case $1 in
up | down | reboot) "$1" ;;
start | stop) "$1" "${@:3}" ;;
*) fail "$usage" ;;
esac
