#!/usr/bin/env bash
# End-to-end test: the image, the chart, pods, restarts and failures of every component, uninstall.
#
# By default on a cluster that it starts and removes, as root. With E2E_IMAGE on the cluster that
# KUBECONFIG names; steps that need access to the node are skipped there. On that cluster it:
#   - refuses to run if kube-lxcfs is installed, in any namespace and under any name
#   - installs, upgrades and uninstalls the release kube-lxcfs in the namespace kube-lxcfs, which
#     makes cluster-wide RBAC objects, and a privileged pod on every node
#   - runs its pods in the namespace kube-lxcfs-e2e, which must not exist
#   - injects and removes views in other pods that have opted in to kube-lxcfs
# Steps that need a newer Kubernetes than the cluster's are left out, with the reason.
#   - removes the release and both namespaces at the end, kube-lxcfs only if it has created it
# Variables:
#   KUBECONFIG=FILE              the cluster, by its current context; needs E2E_IMAGE
#   E2E_IMAGE=REPOSITORY:TAG     the agent's image, which the nodes can pull, as the image of lxcfs:
#                                REPOSITORY-lxcfs:TAG
#   E2E_IMAGE_2=REPOSITORY:TAG   another tag of both, for the upgrade steps
#   E2E_BUSYBOX=IMAGE            the image of test pods (busybox:1)
#   E2E_VALUES=FILE              more chart values
#   E2E_NRI=1                    the runtime has NRI
#   E2E_PLUGIN=FILE              the program as a kubectl plugin, of the agent's image by default
#   E2E_PORT=PORT                the agent's HTTP port, if E2E_VALUES changes it
#   E2E_SECURE_PORT=PORT         a free port of the agent for HTTPS (9810)
#   E2E_ONLY=migrations          only the steps of hack/migrate.sh
#   E2E_SIZES=SECONDS            also measure memory, and CPU time in SECONDS without changes
# shellcheck disable=SC2317,SC2329 # steps and conditions are called by name
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

# ---- the cluster ------------------------------------------------------------------------------

[[ ${E2E_ONLY-} =~ ^(migrations)?$ ]] || fail "unknown E2E_ONLY '$E2E_ONLY'; valid: migrations"
given=
if [ -n "${E2E_IMAGE-}" ]; then
    [ -n "${KUBECONFIG-}" ] || fail "E2E_IMAGE needs a cluster; set KUBECONFIG"
    given=yes
elif [ -n "${KUBECONFIG-}" ]; then
    fail "KUBECONFIG needs the image to test; set E2E_IMAGE, or unset KUBECONFIG for a new cluster"
elif [ "${KUBE_LXCFS_IN_NAMESPACE-}" != 1 ]; then
    need_root "a cluster"
    hack/deps.sh build demo test cluster image
    hack/offline/kubernetes.sh all >/dev/null
    hack/offline/debian.sh trixie containerd >/dev/null
    hack/offline/busybox-image.sh >/dev/null
    hack/offline/helm.sh >/dev/null
    # A Bidirectional volume needs a shared root mount. lxcfs 6 reads namespaces of process 1, which
    # may be forbidden outside. All processes exit together with the pid namespace.
    # None of the mounts reaches the machine's own mount namespace.
    # shellcheck disable=SC2016 # for the inner shell
    exec env KUBE_LXCFS_IN_NAMESPACE=1 unshare --mount --propagation private \
        --pid --fork --kill-child --mount-proc \
        sh -c 'mount --make-rshared / && mount --make-private /proc && exec "$@"' sh "$0" "$@"
fi

PATH="$(hack/offline/helm.sh):$PATH"
# The release's namespace, and that of the pods.
namespace=kube-lxcfs
pods_namespace=kube-lxcfs-e2e
status_role=$pods_namespace-status
plugin=${E2E_PLUGIN-}

exists() { [ -n "$(kubectl get "$1" "$2" --ignore-not-found -o name)" ]; }

# check_given_cluster: sets $created to the release's namespace if it does not exist.
created=
check_given_cluster() {
    local found
    found=$(kubectl get daemonsets,clusterroles --all-namespaces -o name \
        -l app.kubernetes.io/name=kube-lxcfs) ||
        fail "failed to list DaemonSets and ClusterRoles of the cluster of KUBECONFIG"
    found+=$(helm list --all-namespaces --short --filter '^kube-lxcfs$') ||
        fail "failed to list releases of the cluster of KUBECONFIG"
    [ -z "$found" ] || fail "kube-lxcfs is installed on the cluster of KUBECONFIG; uninstall it"
    ! exists namespace "$pods_namespace" ||
        fail "the namespace $pods_namespace exists on the cluster of KUBECONFIG; delete it"
    ! exists clusterrole "$status_role" ||
        fail "the ClusterRole $status_role exists on the cluster of KUBECONFIG; delete it"
    exists namespace "$namespace" || created=$namespace
}
if [ -n "$given" ]; then check_given_cluster; fi

dir=$(mktemp -d /tmp/kle2e.XXXXXX)
host=$dir/host
if [ -n "$given" ]; then
    # A copy, whose current namespace is changed.
    kubectl config view --raw --minify --flatten >"$dir/kubeconfig"
    image=${E2E_IMAGE%:*} tag=${E2E_IMAGE##*:}
    second=${E2E_IMAGE_2:-$E2E_IMAGE} second=${second##*:}
    busybox=${E2E_BUSYBOX:-busybox:1} pull=IfNotPresent
    nri=${E2E_NRI-} port=${E2E_PORT:-9808} secure_port=${E2E_SECURE_PORT:-9810}
else
    image=localhost/kube-lxcfs tag=e2e second=e2e-2
    busybox=$BUSYBOX_IMAGE pull=Never
    nri=1 port='' secure_port='' # set when the cluster starts
fi
export KUBECONFIG=$dir/kubeconfig
values=(--namespace "$namespace" --create-namespace --wait --timeout 3m
    --set "image.repository=$image,image.tag=$tag,image.pullPolicy=$pull"
    --set "test.image=$busybox,test.pullPolicy=$pull,log.format=json")
if [ -n "${E2E_VALUES-}" ]; then values+=(-f "$E2E_VALUES"); fi

# the_images_build: sets $archives. Those of an earlier run are used if no input has changed.
the_images_build() {
    local inputs
    inputs=$(find Dockerfile .dockerignore Cargo.toml Cargo.lock src -type f -print0 |
        sort -z | xargs -0 sha256sum | sha256sum)
    archives=$CACHE/kube-lxcfs-${inputs:0:12}
    if [ ! -f "$archives/lxcfs.tar" ]; then
        rm -rf "$CACHE"/kube-lxcfs-*
        hack/offline/build-image.sh "$image:$tag" "$archives"
    fi
}

load_images() {
    local ctr name
    ctr=$(hack/offline/debian.sh trixie containerd)/usr/bin/ctr
    for name in agent lxcfs; do
        "$ctr" -a "$dir/run/sock" -n k8s.io images import "$archives/$name.tar" >/dev/null
    done
    for name in "$image" "$image-lxcfs"; do
        "$ctr" -a "$dir/run/sock" -n k8s.io images tag "$name:$tag" "$name:$second" >/dev/null
    done
}

a_node_and_its_control_plane_start() {
    local api
    hack/cluster.sh up "$dir"
    load_images
    read -r _ api _ <"$dir/ports"
    read -r port secure_port < <(python3 -c 'import socket
sockets = [socket.socket(), socket.socket()]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')
    # This cluster has no kube-proxy and no DNS: the agent gets the API server's address.
    values+=(--set "hostPath=$host"
        --set "runtime.criSocketPath=$dir/run/sock,nri.socketPath=$dir/run/nri.sock"
        --set "agent.hostNetwork=true,agent.listenAddress=127.0.0.1,agent.port=$port"
        --set "agent.extraEnv[0].name=KUBERNETES_SERVICE_HOST,agent.extraEnv[0].value=127.0.0.1"
        --set "agent.extraEnv[1].name=KUBERNETES_SERVICE_PORT"
        --set-string "agent.extraEnv[1].value=$api")
}

print_state() {
    local component
    kubectl get pods -A -o wide 2>/dev/null | head -n 40 || true
    for component in agent lxcfs; do
        kubectl -n "$namespace" logs -l "app.kubernetes.io/component=$component" --tail=40 \
            2>/dev/null || true
    done
}

clean_up() {
    if [ "$result" = failed ]; then print_state >&2; fi
    if [ -n "$given" ]; then
        helm uninstall kube-lxcfs --namespace "$namespace" --wait >/dev/null 2>&1 || true
        # shellcheck disable=SC2086 # nothing if it was not created
        kubectl delete namespace "$pods_namespace" $created --timeout=3m >/dev/null 2>&1 || true
        kubectl delete clusterrolebinding,clusterrole "$status_role" >/dev/null 2>&1 || true
        rm -rf "$dir"
    else
        hack/cluster.sh down "$dir"
    fi
    say "e2e: $result after $((SECONDS - started)) s"
}
started=$SECONDS
result=failed
trap clean_up EXIT
trap 'exit 130' INT TERM

# ---- steps and conditions ---------------------------------------------------------------------

# step FUNCTION: runs it, and prints its name as a sentence.
step() {
    say "[$((SECONDS - started)) s] ${1//_/ }"
    "$@"
}

# node_step FUNCTION: a step that needs access to the node.
node_step() {
    if [ -n "$given" ]; then
        say "skipped, needs access to the node: ${1//_/ }"
    else
        step "$1"
    fi
}

note() { say "    $*"; }

# eventually SECONDS WHAT COMMAND...
eventually() { wait_for "$1" "${@:3}" || fail "not within $1 s: $2"; }

# block FILE HEADING LANGUAGE NUMBER: prints a code block of a document's section.
block() {
    awk -v heading="$2" -v start="\`\`\`$3" -v wanted="$4" '
        BEGIN { level = heading; sub(/ .*/, " ", level) }
        index($0, level) == 1 { inside = $0 == heading }
        /^```$/ { printing = 0 }
        printing
        inside && $0 == start { printing = ++blocks == wanted }' "$1"
}

# has PATTERN...: grep that reads all its input, so that the writer gets no SIGPIPE.
has() { grep "$@" >/dev/null; }

# ---- pods and their memory --------------------------------------------------------------------

# deployment NAME REPLICAS ANNOTATION [SCRIPT]: pods with a memory limit of 64 MiB. By default each
# pod keeps reading, and counts its failed reads.
deployment() {
    local script indent='              ' reads='
head -1 /proc/meminfo >/tmp/first
: >/tmp/errors
while :; do
    cat /proc/meminfo /proc/uptime >/dev/null 2>>/tmp/errors
    sleep 0.05
done'
    script=${4:-$reads}
    script=$indent${script//$'\n'/$'\n'$indent}
    kubectl apply -f - <<YAML >/dev/null
apiVersion: apps/v1
kind: Deployment
metadata: {name: $1}
spec:
  replicas: $2
  selector: {matchLabels: {app: $1}}
  template:
    metadata: {labels: {app: $1}, annotations: {$3}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: app
          image: $busybox
          imagePullPolicy: $pull
          command:
            - sh
            - -c
            - |
$script
          resources: {requests: {cpu: 10m, memory: 64Mi}, limits: {cpu: 500m, memory: 64Mi}}
YAML
    kubectl rollout status "deployment/$1" --timeout=240s >/dev/null
}
opt_in='kube-lxcfs.io/inject: "true"'

pods_of() { kubectl get pods -l "app=$1" --field-selector=status.phase=Running -o name; }

# all_pods CHECK APP: whether the app has pods, and CHECK holds for each.
all_pods() {
    local pod pods
    pods=$(pods_of "$2")
    [ -n "$pods" ] || return 1
    for pod in $pods; do "$1" "$pod" || return 1; done
}

# memory_in POD [CONTAINER]
# shellcheck disable=SC2016 # for the shell in the pod
memory_in() {
    kubectl exec "$1" ${2:+-c "$2"} -- sh -c 'read -r _ kib _ </proc/meminfo; echo $kib'
}
sees_limit() { [ "$(memory_in "$1")" = 65536 ]; }
sees_node() {
    local kib
    kib=$(memory_in "$1") && [ -n "$kib" ] && [ "$kib" != 65536 ]
}
# first_read_saw_limit POD: with NRI the view precedes the container's first instruction.
first_read_saw_limit() { [ -z "$nri" ] || kubectl exec "$1" -- cat /tmp/first | has " 65536 kB"; }

# container_sees POD CONTAINER KIB [CPUS]
container_sees() {
    [ "$(memory_in "$1" "$2")" = "$3" ] || return 1
    [ -z "${4-}" ] || [ "$(kubectl exec "$1" -c "$2" -- grep -c ^processor /proc/cpuinfo)" = "$4" ]
}
# sees_from_the_start POD CONTAINER KIB [CPUS]: its first read too, with NRI.
sees_from_the_start() {
    local first
    eventually 20 "$2 in $1 sees $3 KiB${4:+ and $4 CPUs}" container_sees "$@"
    first=$(kubectl exec "$1" -c "$2" -- cat /tmp/first)
    [ -z "$nri" ] || has " $3 kB" <<<"$first" || fail "the first read of $2 in $1 saw: $first"
}

# read_errors: the number of failed reads in the pods of `in`.
read_errors() {
    local pod sum=0
    for pod in $(pods_of in); do
        sum=$((sum + $(kubectl exec "$pod" -- sh -c 'wc -l </tmp/errors')))
    done
    echo "$sum"
}
reset_read_errors() {
    local pod
    for pod in $(pods_of in); do kubectl exec "$pod" -- sh -c ': >/tmp/errors'; done
}
no_read_errors() {
    local errors
    errors=$(read_errors)
    [ "$errors" = 0 ] || fail "$errors reads failed"
}

# has_event POD REASON WORD...: whether POD has an Event with REASON whose type, action or message
# contains each WORD.
has_event() {
    local events word
    local selector="involvedObject.name=${1#pod/},reason=$2"
    local fields='{range .items[*]}{.type} {.action} {.message}{"\n"}{end}'
    events=$(kubectl get events --field-selector "$selector" -o "jsonpath=$fields")
    [ -n "$events" ] || return 1
    for word in "${@:3}"; do has -F -- "$word" <<<"$events" || return 1; done
}
has_injected_event() { has_event "$1" LxcfsInjected Normal Inject app meminfo; }

# ---- kube-lxcfs -------------------------------------------------------------------------------

install() {
    helm upgrade --install kube-lxcfs charts/kube-lxcfs "${values[@]}" "$@" \
        >"$dir/helm.log" 2>&1 || fail "failed to install: $(tail -n 3 "$dir/helm.log")"
}
install_second() { install --set "image.tag=$second,lxcfs.image.tag=$second" "$@"; }

component_pods() {
    kubectl -n "$namespace" get pods -l "app.kubernetes.io/component=$1" -o name
}
# no_pods [COMPONENT]: no pod of it is left, or of all.
no_pods() {
    local pods selector=${1:+app.kubernetes.io/component=$1}
    pods=$(kubectl -n "$namespace" get pods -l "$selector" -o name) && [ -z "$pods" ]
}
delete_pods() {
    kubectl -n "$namespace" delete pod -l "app.kubernetes.io/component=$1" --wait >/dev/null
}
# rolled_out COMPONENT [TIMEOUT]: the agents are ready without lxcfs too.
rolled_out() {
    kubectl -n "$namespace" rollout status "daemonset/kube-lxcfs-$1" --timeout="${2:-90s}" \
        >/dev/null
}
image_of() {
    local field='{.spec.template.spec.containers[0].image}'
    kubectl -n "$namespace" get "daemonset/kube-lxcfs-$1" -o "jsonpath=$field"
}

# responses PORT COMMAND...: what the command prints for each agent, with the number of a port of
# loopback before its arguments. A forwarded request reaches the agent by loopback.
responses() {
    local forward local_port pod
    for pod in $(component_pods agent); do
        # The background process truncates the file later: it may still hold the last port.
        : >"$dir/forward"
        kubectl -n "$namespace" port-forward "$pod" ":$1" >"$dir/forward" 2>&1 &
        forward=$!
        if wait_for 10 has "^Forwarding from 127" "$dir/forward"; then
            local_port=$(sed -n 's/^Forwarding from 127.0.0.1:\([0-9]*\) .*/\1/p' "$dir/forward")
            "$2" "$local_port" "${@:3}" || true
        else
            sed "s|^|port-forward to $pod: |" "$dir/forward" >&2
        fi
        kill "$forward" 2>/dev/null || true
        wait "$forward" 2>/dev/null || true
    done
}
# http PATH: prints the responses of all agents.
http() { responses "$port" get "$1"; }
# get PORT PATH: prints the response of a server on loopback.
get() (
    exec 3<>"/dev/tcp/127.0.0.1/$1"
    printf 'GET %s HTTP/1.0\r\n\r\n' "$2" >&3
    cat <&3
)
# tls_get PORT PATH TOKEN: prints the code and the first line of a response over HTTPS.
tls_get() {
    python3 - "$@" <<'EOF'
import http.client, ssl, sys
port, path, token = sys.argv[1:]
tls = ssl._create_unverified_context()
server = http.client.HTTPSConnection("127.0.0.1", int(port), timeout=10, context=tls)
server.request("GET", path, headers={"Authorization": "Bearer " + token} if token else {})
answer = server.getresponse()
print(answer.status, answer.read().decode().splitlines()[0])
EOF
}
# metric SERIES: the sum over all agents.
metric() {
    http /metrics |
        awk -v series="$1" '$1 == series { n += $2; found = 1 } END { print found ? n : "none" }'
}
injected() { [ "$(metric 'kube_lxcfs_containers{state="injected"}')" = "$1" ]; }
all_ready() { http /readyz | awk '/^HTTP/ { n++; bad += $2 != 200 } END { exit !n || bad }'; }
status_shows_desired_views() {
    http /status | has -F '"desired":{"files":"all","state":"injected","why":null,'
}
# watches_fail: whether the agent has logged an outage of a watch.
watches_fail() {
    kubectl -n "$namespace" logs "$(component_pods agent)" | grep '"outage":"started"' |
        has -E '"subject":"(pods|namespaces)"'
}

node_is_ready() { kubectl get nodes | has ' Ready'; }
restart_node() {
    hack/cluster.sh start "$dir" containerd
    hack/cluster.sh start "$dir" kubelet
    eventually 90 "the node is ready" node_is_ready
}

# ---- pods that need a newer Kubernetes --------------------------------------------------------

# The fields of a pod's spec, in YAML's flow style.
limits() { echo "limits: {cpu: 500m, memory: $1}, requests: {cpu: 10m, memory: $1}"; }
# container NAME FIELDS [COMMANDS]: a mapping. The container runs COMMANDS after its first read.
container() {
    echo "{name: $1, image: \"$busybox\", imagePullPolicy: $pull, command: [sh, -c,"
    echo "  'head -1 /proc/meminfo >/tmp/first; ${3:+$3; }exec sleep 1000000'], $2}"
}

sidecar_fields() {
    echo "initContainers: [$(container side "restartPolicy: Always, resources: {$(limits 32Mi)}")],"
    echo "containers: [$(container app "resources: {$(limits 64Mi)}")]"
}
user_namespace_fields() {
    echo "hostUsers: false, containers: [$(container app "resources: {$(limits 64Mi)}")]"
}
pod_level_fields() {
    echo "resources: {$(limits 64Mi)}, containers: [$(container app "resources: {}")]"
}
# The container reads as soon as the limit in its cgroup is 96 MiB.
resized_fields() {
    local commands policy='resizePolicy: [{resourceName: memory, restartPolicy: NotRequired}]'
    commands='cd /sys/fs/cgroup; until grep -qx 100663296 memory.max memory/memory.limit_in_bytes'
    commands+=' 2>/dev/null; do usleep 10000; done; head -1 /proc/meminfo >/tmp/read'
    commands+='; mv /tmp/read /tmp/resized'
    echo "containers: [$(container app "resources: {$(limits 64Mi)}, $policy" "$commands")]"
}

# apply_pod NAME OPTION...: a pod that has opted in, with the fields that NAME_fields prints. A
# server drops fields that it does not know, or whose feature is off.
apply_pod() {
    kubectl apply --validate=false "${@:2}" -f - <<YAML
apiVersion: v1
kind: Pod
metadata: {name: "${1//_/-}", annotations: {$opt_in}}
spec: {
  terminationGracePeriodSeconds: 0,
  $("${1}_fields")
}
YAML
}
start_pod() {
    local pod=${1//_/-}
    apply_pod "$1" >/dev/null
    kubectl wait --for=condition=Ready "pod/$pod" --timeout=120s >/dev/null ||
        fail "the pod $pod is not ready: $(kubectl get pod "$pod" -o 'jsonpath={.status}')"
}
delete_pod() { kubectl delete pod "${1//_/-}" --wait >/dev/null; }

# keeps NAME FIELD: whether the server keeps FIELD of the pod.
keeps() {
    local value
    value=$(apply_pod "$1" --dry-run=server -o "jsonpath={.spec.$2}") ||
        fail "the server refuses the pod ${1//_/-}"
    [ -n "$value" ]
}
of_nodes() { kubectl get nodes -o "jsonpath={range .items[*]}{.status.$1}{\"\\n\"}{end}"; }

lacks_sidecar() {
    keeps sidecar 'initContainers[0].restartPolicy' || echo "sidecar containers (Kubernetes 1.29)"
}
lacks_user_namespace() {
    local supported
    supported=$(of_nodes 'runtimeHandlers[*].features.userNamespaces') ||
        fail "failed to list the nodes"
    if ! keeps user_namespace hostUsers; then
        echo "user namespaces (Kubernetes 1.33)"
    elif has -v true <<<"$supported"; then
        echo "a runtime on each node that has user namespaces (containerd 2)"
    fi
}
lacks_pod_level() {
    keeps pod_level resources.limits.memory || echo "Pod-level resources (Kubernetes 1.34)"
}
lacks_resized() {
    local resources
    resources=$(kubectl get --raw /api/v1) || fail "failed to list the API server's resources"
    if ! has '"pods/resize"' <<<"$resources"; then
        echo "in-place resize (Kubernetes 1.33)"
    elif ! kubectl patch --help | has resize; then
        echo "a kubectl that can resize pods (1.32)"
    fi
}

# print_runtimes: of the nodes, on which all steps run.
print_runtimes() {
    local versions
    versions=$(of_nodes nodeInfo.containerRuntimeVersion) || fail "failed to list the nodes"
    say "the steps run on ${versions//$'\n'/, }"
    has '^containerd://2' <<<"$versions" || say "left out, no node has it: containerd 2"
}

# feature_step FEATURE FUNCTION: a step that needs a feature of the cluster.
feature_step() {
    local lacks
    lacks=$("lacks_$1") || exit
    if [ -n "$lacks" ]; then
        say "left out, the cluster lacks $lacks: ${2//_/ }"
    else
        step "$2"
    fi
}

# ---- the steps --------------------------------------------------------------------------------

# From here on, kubectl without --namespace means the pods' namespace.
the_namespace_of_the_pods_is_created() {
    kubectl create namespace "$pods_namespace" >/dev/null
    kubectl config set-context --current --namespace="$pods_namespace" >/dev/null
}

helm_installs_the_chart() {
    deployment before 1 "$opt_in"
    install
    rolled_out agent
    rolled_out lxcfs
    note "Warnings of probes: $(kubectl -n "$namespace" get events \
        --field-selector reason=Unhealthy -o name | wc -l)"
}

pods_that_opt_in_see_their_limit_and_others_the_node() {
    local pod
    deployment in 3 "$opt_in"
    deployment out 2 ''
    eventually 20 "3 pods see their limit" all_pods sees_limit in
    eventually 20 "a pod older than the installation sees its limit" all_pods sees_limit before
    all_pods sees_node out || fail "a pod that did not opt in has a view"
    for pod in $(pods_of in); do
        first_read_saw_limit "$pod" || fail "$pod: the first read saw the node, despite NRI"
    done
    eventually 10 "each pod has an Event" all_pods has_injected_event in
}

metrics_and_status_agree() {
    eventually 10 "4 containers are injected" injected 4
    [ "$(metric kube_lxcfs_lxcfs_up)" -ge 1 ] || fail "lxcfs_up: $(metric kube_lxcfs_lxcfs_up)"
    all_ready || fail "an agent is not ready: $(http /readyz)"
    status_shows_desired_views || fail "/status shows no desired view: $(http /status)"
}

the_image_of_the_agent_has_no_shell() {
    local pod shell
    for pod in $(component_pods agent); do
        for shell in sh bash /bin/sh /bin/busybox; do
            ! kubectl -n "$namespace" exec "$pod" -- "$shell" -c true >/dev/null 2>&1 ||
                fail "$pod has $shell"
        done
        kubectl -n "$namespace" exec "$pod" -- kube-lxcfs status | has meminfo ||
            fail "$pod: kube-lxcfs status shows no view"
    done
}

annotations_and_labels_of_running_pods_take_effect() {
    local pod
    pod=$(pods_of out | sed -n 1p)
    kubectl annotate "$pod" kube-lxcfs.io/inject=true >/dev/null
    eventually 5 "the annotated pod sees its limit" sees_limit "$pod"
    kubectl annotate "$pod" kube-lxcfs.io/inject- >/dev/null
    eventually 5 "the pod without annotation sees the node" sees_node "$pod"
    kubectl label namespace "$pods_namespace" kube-lxcfs.io/inject=true >/dev/null
    eventually 5 "pods of the labelled namespace see their limit" all_pods sees_limit out
    kubectl label namespace "$pods_namespace" kube-lxcfs.io/inject- >/dev/null
    eventually 5 "pods of the namespace without label see the node" all_pods sees_node out
}

# unpack_plugin: takes the program from the agent's image.
unpack_plugin() {
    local layer
    mkdir "$dir/agent"
    tar -xf "$archives/agent.tar" -C "$dir/agent"
    for layer in "$dir"/agent/*.tar; do tar -xf "$layer" -C "$dir/agent"; done
    plugin=$dir/agent/usr/bin/kube-lxcfs
}
# lxcfs ARGUMENT...: runs the plugin, and checks the width of its output.
lxcfs() {
    kubectl lxcfs --agent-namespace "$namespace" "$@" >"$dir/lxcfs" 2>&1 ||
        fail "kubectl lxcfs $*: $(cat "$dir/lxcfs")"
    ! LC_ALL=C.UTF-8 has -E '^.{101}' "$dir/lxcfs" || fail "kubectl lxcfs $*: $(cat "$dir/lxcfs")"
    cat "$dir/lxcfs"
}
kubectl_lxcfs_explains_and_changes_views() {
    local pod node text line PATH=$dir/bin:$PATH
    [ -n "$plugin" ] || unpack_plugin
    mkdir "$dir/bin"
    cp "$plugin" "$dir/bin/kubectl-lxcfs"
    pod=$(pods_of in | sed -n 1p)
    node=$(kubectl get "$pod" -o 'jsonpath={.spec.nodeName}')
    text=$(lxcfs explain "$pod")
    for line in 'rule +annotation kube-lxcfs.io/inject' 'agent .* ready$' 'lxcfs +serves' \
        'observed +[0-9]+ current: .*meminfo' 'state +injected' 'event +Normal LxcfsInjected'; do
        has -E "$line" <<<"$text" || fail "explain shows no '$line': $text"
    done
    text=$(lxcfs status)
    has -E "^$node .*/${pod#pod/} .* injected" <<<"$text" || fail "status shows no $pod: $text"
    text=$(lxcfs status -A)
    has -E "^$node .* injected" <<<"$text" || fail "status -A shows no view: $text"
    text=$(lxcfs check --node "$node")
    has -E '^(ok|warn) +kernel' <<<"$text" || fail "check shows no kernel: $text"
    lxcfs eject "$pod" >/dev/null
    eventually 5 "the ejected pod sees the node" sees_node "$pod"
    lxcfs inject "$pod" >/dev/null
    eventually 5 "the injected pod sees its limit" sees_limit "$pod"
}

an_invalid_annotation_is_reported_on_the_pod() {
    local pod
    pod=$(pods_of out | sed -n 1p)
    kubectl annotate "$pod" kube-lxcfs.io/inject=yes >/dev/null
    eventually 5 "a Warning names the annotation, its value and valid values" \
        has_event "$pod" LxcfsInvalidAnnotation Warning kube-lxcfs.io/inject "'yes'" "'true'"
    kubectl annotate "$pod" kube-lxcfs.io/inject- >/dev/null
}

# The policy hook-succeeded deletes it.
pod_of_helm_test_is_gone() {
    [ -z "$(kubectl -n "$namespace" get pod kube-lxcfs-test --ignore-not-found -o name)" ]
}
helm_test_passes() {
    helm test kube-lxcfs --namespace "$namespace" >"$dir/helm.log" 2>&1 ||
        fail "helm test: $(cat "$dir/helm.log")"
    eventually 30 "the pod of helm test is gone" pod_of_helm_test_is_gone
}

views_outlive_the_agents_pod() {
    reset_read_errors
    delete_pods agent
    rolled_out agent
    all_pods sees_limit in || fail "a pod lost its view"
    no_read_errors
}

deleting_the_lxcfs_pod_fails_no_read() {
    delete_pods lxcfs
    rolled_out lxcfs
    eventually 20 "all views are back" all_pods sees_limit in
    no_read_errors
}

views_return_after_lxcfs_is_killed() {
    pkill -KILL -f "lxcfs -f .*$host"
    eventually 10 "all views are back" all_pods sees_limit in
    note "$(read_errors) reads in 3 pods failed"
    reset_read_errors
}

# The ClusterRole of the document, for a ServiceAccount of the pods' namespace.
the_api_server_decides_who_gets_status_over_https() {
    local account answer objects token address='[::]'
    if [ -z "$given" ]; then address=127.0.0.1; fi
    install --set "agent.secureListen=$address:$secure_port"
    rolled_out agent
    objects=$(block docs/operations.md "### /status and /metrics for other clients" yaml 2 |
        sed "s/namespace: tools/namespace: $pods_namespace/; s/kube-lxcfs-status/$status_role/")
    kubectl apply -f - <<<"$objects" >/dev/null || fail "docs/operations.md: $objects"
    for account in inventory other; do kubectl create serviceaccount "$account" >/dev/null; done
    # answers EXPECTED PATH TOKEN
    answers() {
        answer=$(responses "$secure_port" tls_get "$2" "$3")
        [[ $answer == "$1"* ]] || fail "$2 with '${3:0:8}…': expected $1, got $answer"
    }
    token=$(kubectl create token inventory)
    answers "200 [" /status "$token"
    answers "200 # HELP" /metrics "$token"
    answers 403 /status "$(kubectl create token other)"
    answers 401 /status ""
    answers 401 /status invalid
    # A permission that is taken back.
    kubectl delete clusterrolebinding "$status_role" >/dev/null
    sleep 11
    answers 403 /status "$token"
    kubectl delete clusterrole "$status_role" >/dev/null
    kubectl delete serviceaccount inventory other >/dev/null
}

an_upgrade_of_the_agent_leaves_lxcfs_as_it_is() {
    local before
    before=$(component_pods lxcfs)
    install --set "image.tag=$second,lxcfs.image.tag=$tag"
    rolled_out agent
    [ "$(image_of agent)" = "$image:$second" ] || fail "the agent runs $(image_of agent)"
    [ "$(component_pods lxcfs)" = "$before" ] || fail "the lxcfs pod was replaced"
    all_pods sees_limit in || fail "a pod lost its view"
    no_read_errors
}

an_upgrade_of_lxcfs_fails_no_read() {
    install_second
    rolled_out lxcfs
    eventually 20 "all views are back" all_pods sees_limit in
    no_read_errors
}

one_at_a_time=agent.updateStrategy.rollingUpdate.maxUnavailable=1
one_at_a_time+=,lxcfs.updateStrategy.rollingUpdate.maxUnavailable=1

upgrades_of_both_do_not_wait_for_each_other() {
    install --set "$one_at_a_time"
    rolled_out agent
    rolled_out lxcfs
    eventually 20 "all views are back" all_pods sees_limit in
    no_read_errors
    # An lxcfs that cannot start: the agent is upgraded nevertheless.
    install_second --set "$one_at_a_time,lxcfs.image.tag=none" --wait=false
    rolled_out agent
    [ "$(image_of agent)" = "$image:$second" ] || fail "the agent runs $(image_of agent)"
    ! rolled_out lxcfs 1s 2>/dev/null || fail "an lxcfs without image is ready"
    # And the next lxcfs, whatever the agent does.
    install_second --set "$one_at_a_time"
    rolled_out lxcfs
    rolled_out agent
    eventually 20 "all views are back" all_pods sees_limit in
    reset_read_errors
    install_second
}

views_outlive_restarts_of_containerd_and_kubelet() {
    hack/cluster.sh stop "$dir" containerd
    hack/cluster.sh stop "$dir" kubelet
    restart_node
    eventually 30 "all pods see their limit" all_pods sees_limit in
    no_read_errors
}

new_pods_get_views_in_time() {
    deployment later 1 "$opt_in"
    eventually 10 "the new pod sees its limit" all_pods sees_limit later
    all_pods first_read_saw_limit later || fail "the first read saw the node, despite NRI"
}

a_sidecar_container_sees_its_own_limit() {
    start_pod sidecar
    sees_from_the_start sidecar side 32768 1
    sees_from_the_start sidecar app 65536 1
    delete_pod sidecar
}

a_pod_with_a_user_namespace_sees_its_limit() {
    start_pod user_namespace
    ! kubectl exec user-namespace -- cat /proc/self/uid_map | has ' 0  *4294967295' ||
        fail "the pod has the user namespace of the node"
    sees_from_the_start user-namespace app 65536 1
    delete_pod user_namespace
}

# lxcfs 7, which serves cgroup v2, takes a CPU limit of the pod into account.
a_container_without_limit_sees_that_of_its_pod() {
    local cpus=
    start_pod pod_level
    if kubectl exec pod-level -- test -e /sys/fs/cgroup/cgroup.controllers; then cpus=1; fi
    sees_from_the_start pod-level app 65536 "$cpus"
    delete_pod pod_level
}

a_resized_container_sees_its_new_limit_at_the_next_read() {
    local cpus node restarts seen
    start_pod resized
    sees_from_the_start resized app 65536 1
    node=$(kubectl get pod resized -o 'jsonpath={.spec.nodeName}')
    cpus=$(kubectl get node "$node" -o 'jsonpath={.status.capacity.cpu}')
    kubectl patch pod resized --subresource resize --type=json -p "[{\"op\":\"replace\",
        \"path\":\"/spec/containers/0/resources/limits\",
        \"value\":{\"cpu\":\"1500m\",\"memory\":\"96Mi\"}}]" >/dev/null
    eventually 90 "the cgroup has the new limit" kubectl exec resized -- test -e /tmp/resized
    seen=$(kubectl exec resized -- cat /tmp/resized)
    has ' 98304 kB' <<<"$seen" || fail "the next read saw: $seen"
    eventually 20 "the container sees the new limits" \
        container_sees resized app 98304 $((cpus < 2 ? cpus : 2))
    restarts=$(kubectl get pod resized -o 'jsonpath={.status.containerStatuses[0].restartCount}')
    [ "$restarts" = 0 ] || fail "the container was restarted"
    delete_pod resized
}

pods_start_without_lxcfs_and_get_views_later() {
    local lxcfs=daemonset/kube-lxcfs-lxcfs
    kubectl -n "$namespace" patch "$lxcfs" --type=merge \
        -p '{"spec":{"template":{"spec":{"nodeSelector":{"none":"such"}}}}}' >/dev/null
    eventually 60 "the lxcfs pods are gone" no_pods lxcfs
    deployment without-lxcfs 1 "$opt_in"
    all_pods sees_node without-lxcfs || fail "a pod has a view without lxcfs"
    kubectl -n "$namespace" patch "$lxcfs" --type=json \
        -p '[{"op":"remove","path":"/spec/template/spec/nodeSelector/none"}]' >/dev/null
    rolled_out lxcfs
    eventually 40 "the new pod sees its limit" all_pods sees_limit without-lxcfs
    eventually 10 "all other pods too" all_pods sees_limit in
}

three_pods_run() { [ "$(kubectl get pods -l app=in --no-headers | grep -c Running)" = 3 ]; }

views_return_after_a_reboot_of_the_node() {
    hack/cluster.sh stop "$dir" kubelet
    hack/cluster.sh reboot "$dir"
    restart_node
    eventually 90 "3 pods run" three_pods_run
    eventually 60 "all views are back" all_pods sees_limit in
    all_pods sees_node out || fail "a pod that did not opt in has a view"
}

without_nri_and_runtime_events_the_watch_suffices() {
    local pod
    # shellcheck disable=SC2016 # for the shell in the pod
    local script='
n=0
until grep "^MemTotal: *65536 kB" /proc/meminfo; do usleep 10000; n=$((n + 1)); done
echo $n >/tmp/late
sleep 1000000'
    install_second --set nri.mode=off,runtime.events=off
    rolled_out agent
    deployment late 3 "$opt_in" "$script"
    eventually 30 "3 pods see their limit" all_pods sees_limit late
    for pod in $(pods_of late); do
        note "view after the start: about $(kubectl exec "$pod" -- cat /tmp/late)0 ms"
    done
    kubectl delete deployment late --wait >/dev/null
    install_second
    rolled_out agent
}

without_cri_nri_gives_the_pids() {
    install_second --set runtime.criSocketPath=/run/none.sock,runtime.pidFrom=proc
    rolled_out agent
    deployment no-cri 2 "$opt_in"
    eventually 10 "2 pods see their limit" all_pods sees_limit no-cri
    all_pods first_read_saw_limit no-cri || fail "the first read saw the node, despite NRI"
    eventually 10 "each pod has an Event" all_pods has_injected_event no-cri
    kubectl delete deployment no-cri --wait >/dev/null
    install_second
    rolled_out agent
}

# api_objects: the objects of the release by which the agent has access to the API server.
api_objects() {
    kubectl -n "$namespace" get clusterroles,clusterrolebindings,serviceaccounts -o name \
        -l app.kubernetes.io/name=kube-lxcfs
}
# mounts_of COMPONENT: the mount points in its pods.
mounts_of() {
    kubectl -n "$namespace" get pods -l "app.kubernetes.io/component=$1" \
        -o 'jsonpath={.items[*].spec.containers[*].volumeMounts[*].mountPath}'
}
an_agent_without_access_to_the_api_server_injects() {
    install_second --set agent.podsFrom=cri
    rolled_out agent
    [ -z "$(api_objects)" ] || fail "left with agent.podsFrom=cri: $(api_objects)"
    ! mounts_of agent | has secrets || fail "the agent's pods have a token: $(mounts_of agent)"
    all_pods sees_limit in || fail "a pod lost its view"
    deployment no-api 2 "$opt_in"
    eventually 10 "2 pods see their limit" all_pods sees_limit no-api
    all_pods first_read_saw_limit no-api || fail "the first read saw the node, despite NRI"
    kubectl delete deployment no-api --wait >/dev/null
    install_second
    rolled_out agent
}

# agent_works: whether the agent is ready, injects a new pod's view before the first instruction,
# publishes an Event, and can watch. Without a watch it would list again and again.
agent_works() {
    local pod
    rolled_out agent 15s 2>/dev/null || return 1
    kubectl delete pod -l app=later --grace-period=0 --force >/dev/null 2>&1
    kubectl rollout status deployment/later --timeout=30s >/dev/null 2>&1 || return 1
    pod=$(pods_of later | sed -n 1p)
    wait_for 5 sees_limit "$pod" || return 1
    first_read_saw_limit "$pod" || return 1
    wait_for 5 has_event "$pod" LxcfsInjected || return 1
    ! watches_fail
}

needed() { fail "the agent works without $1; remove it from the chart"; }

# works_again WHAT: with WHAT the agent works, so that it failed for want of that.
works_again() {
    rolled_out agent
    agent_works || fail "the agent does not work again with $1"
}

# needs WHAT PATH: removes PATH from the agent's DaemonSet, and expects that the agent fails.
needs() {
    local agent=daemonset/kube-lxcfs-agent
    kubectl -n "$namespace" patch "$agent" --type=json \
        -p "[{\"op\":\"remove\",\"path\":\"/spec/template/spec/$2\"}]" >/dev/null
    if agent_works; then needed "$1"; fi
    kubectl -n "$namespace" rollout undo "$agent" >/dev/null
    works_again "$1"
}

# needs_rule WHAT PATCH: the same for the agent's ClusterRole.
needs_rule() {
    local rules
    rules=$(kubectl get clusterrole kube-lxcfs -o 'jsonpath={.rules}')
    kubectl patch clusterrole kube-lxcfs --type=json -p "[$2]" >/dev/null
    delete_pods agent
    if agent_works; then needed "$1"; fi
    kubectl patch clusterrole kube-lxcfs --type=merge -p "{\"rules\":$rules}" >/dev/null
    delete_pods agent
    works_again "$1"
}

replace_in_first_rule() {
    printf '{"op":"replace","path":"/rules/0/%s","value":["%s"]}' "$1" "$2"
}

the_lxcfs_pod_does_not_write_to_cgroups() {
    local pod
    for pod in $(component_pods lxcfs); do
        if ! kubectl -n "$namespace" exec "$pod" -- test -e /sys/fs/cgroup/cgroup.controllers; then
            note "left out for cgroup v1, whose hierarchies Kubernetes 1.31 mounts read-only"
            continue
        fi
        ! kubectl -n "$namespace" exec "$pod" -- mkdir /sys/fs/cgroup/kube-lxcfs-e2e 2>/dev/null ||
            fail "$pod made a cgroup"
    done
}

each_privilege_of_the_agent_is_needed() {
    local container=containers/0
    local capabilities="$container"/securityContext/capabilities/add
    agent_works || fail "the agent does not work with all its privileges"
    needs SYS_ADMIN "$capabilities"/0
    needs SYS_CHROOT "$capabilities"/1
    needs SYS_PTRACE "$capabilities"/2
    needs hostPID hostPID
    needs "the volume of lxcfs" "$container"/volumeMounts/0
    needs "the host's root" "$container"/env/3
    needs_rule "access to pods" "$(replace_in_first_rule resources namespaces)"
    needs_rule "access to namespaces" "$(replace_in_first_rule resources pods)"
    needs_rule "the verb list" "$(replace_in_first_rule verbs watch)"
    needs_rule "the verb watch" "$(replace_in_first_rule verbs list)"
    needs_rule "access to events" '{"op":"remove","path":"/rules/1"}'
    rolled_out agent
}

# Of a process and its children: resident memory in KiB, and CPU time in ticks of 10 ms.
rss_of() {
    local pid
    for pid in $1 $(pgrep -P "$1"); do awk '/^VmRSS:/ { print $2 }' "/proc/$pid/status"; done |
        awk '{ n += $1 } END { print n }'
}
cpu_of() {
    local pid
    for pid in $1 $(pgrep -P "$1"); do awk '{ print $14 + $15 }' "/proc/$pid/stat"; done |
        awk '{ n += $1 } END { print n }'
}

sizes_with_100_idle_pods_that_have_views() {
    local agent supervisor before after
    kubectl delete deployment --all --wait >/dev/null
    deployment many 100 "$opt_in" "sleep 1000000"
    eventually 120 "100 containers are injected" injected 100
    agent=$(pgrep -f '^/usr/bin/kube-lxcfs agent')
    supervisor=$(pgrep -f '^/usr/bin/kube-lxcfs lxcfs')
    sleep 20
    before=("$(cpu_of "$agent")" "$(cpu_of "$supervisor")")
    sleep "$E2E_SIZES"
    after=("$(cpu_of "$agent")" "$(cpu_of "$supervisor")")
    note "images: agent $(($(stat -c %s "$archives/agent.tar") >> 20)) MiB," \
        "lxcfs $(($(stat -c %s "$archives/lxcfs.tar") >> 20)) MiB as archives"
    note "resident memory: agent $(rss_of "$agent") KiB," \
        "lxcfs and its supervisor $(rss_of "$supervisor") KiB"
    note "CPU time in $E2E_SIZES s: agent $((after[0] - before[0]))0 ms," \
        "lxcfs and its supervisor $((after[1] - before[1]))0 ms"
    kubectl delete deployment many --wait >/dev/null
    deployment in 3 "$opt_in"
}

# nothing_left: no mount, file, process or view on the node.
nothing_left() {
    local pid
    ! has "$host" /proc/self/mountinfo ||
        fail "a mount is left: $(grep "$host" /proc/self/mountinfo)"
    [ ! -e "$host" ] || fail "a directory is left: $(find "$host")"
    ! pgrep -f "[l]xcfs -f .*$host" >/dev/null ||
        fail "a process is left: $(pgrep -af "[l]xcfs -f .*$host")"
    for pid in /proc/[0-9]*; do
        ! has -s "noexec,noatime.* - fuse.lxcfs " "$pid/mountinfo" ||
            fail "a view is left in $pid: $(tr '\0' ' ' <"$pid/cmdline")"
    done
}

uninstall() {
    helm uninstall kube-lxcfs --namespace "$namespace" --wait >/dev/null
    eventually 60 "all pods are gone" no_pods
}

uninstall_leaves_nothing_ten_times() {
    local n
    for n in {1..10}; do
        uninstall
        all_pods sees_node in || fail "a pod has a view after the uninstallation"
        nothing_left
        if [ "$n" -lt 10 ]; then
            install
            eventually 20 "all views are back" all_pods sees_limit in
        fi
    done
}

uninstall_removes_every_view() {
    uninstall
    eventually 60 "all pods see the node" all_pods sees_node in
}

. hack/migrate.sh

all_other_steps() {
    step helm_installs_the_chart
    step pods_that_opt_in_see_their_limit_and_others_the_node
    step metrics_and_status_agree
    step the_image_of_the_agent_has_no_shell
    step the_lxcfs_pod_does_not_write_to_cgroups
    step annotations_and_labels_of_running_pods_take_effect
    step an_invalid_annotation_is_reported_on_the_pod
    if [ -z "$given" ] || [ -n "$plugin" ]; then step kubectl_lxcfs_explains_and_changes_views; fi
    step helm_test_passes
    step views_outlive_the_agents_pod
    step deleting_the_lxcfs_pod_fails_no_read
    node_step views_return_after_lxcfs_is_killed
    step the_api_server_decides_who_gets_status_over_https
    step an_upgrade_of_the_agent_leaves_lxcfs_as_it_is
    step an_upgrade_of_lxcfs_fails_no_read
    step upgrades_of_both_do_not_wait_for_each_other
    node_step views_outlive_restarts_of_containerd_and_kubelet
    step new_pods_get_views_in_time
    print_runtimes
    feature_step sidecar a_sidecar_container_sees_its_own_limit
    feature_step user_namespace a_pod_with_a_user_namespace_sees_its_limit
    feature_step pod_level a_container_without_limit_sees_that_of_its_pod
    feature_step resized a_resized_container_sees_its_new_limit_at_the_next_read
    step pods_start_without_lxcfs_and_get_views_later
    node_step views_return_after_a_reboot_of_the_node
    node_step without_nri_and_runtime_events_the_watch_suffices
    node_step without_cri_nri_gives_the_pids
    step an_agent_without_access_to_the_api_server_injects
    node_step each_privilege_of_the_agent_is_needed
    if [ -n "${E2E_SIZES-}" ]; then node_step sizes_with_100_idle_pods_that_have_views; fi
    if [ -n "$given" ]; then
        step uninstall_removes_every_view
    else
        step uninstall_leaves_nothing_ten_times
    fi
}

main() {
    if [ -z "$given" ]; then
        step the_images_build
        step a_node_and_its_control_plane_start
    fi
    step the_namespace_of_the_pods_is_created
    if [ "${E2E_ONLY-}" != migrations ]; then all_other_steps; fi
    node_step the_commands_of_docs_migrating_md_keep_views
    result=passed
}

# One line: bash has then read the whole file, which may change while the test runs.
main; exit
