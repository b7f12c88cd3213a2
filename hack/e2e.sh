#!/usr/bin/env bash
# The whole thing on a whole cluster: image from the Dockerfile, helm, pods, everything that dies, uninstall.
# On a cluster of its own, made and ended here (root). Or on the one that KUBECONFIG names, with E2E_IMAGE=REPOSITORY:TAG (and
# E2E_IMAGE_2, another tag of it) that its nodes can pull, E2E_BUSYBOX (busybox:1), E2E_VALUES, a file of chart values, and
# E2E_NRI=1 where its runtime has NRI; what needs a hand on the node is left out there, and told. E2E_SIZES=300 also measures memory, and CPU over so many idle seconds.
set -euo pipefail
# shellcheck disable=SC2317 # functions that are called by their names
{ # Read whole before it runs, so that it can be edited meanwhile.
cd "$(dirname "$0")/.."
. hack/lib.sh

given=
if [ -n "${E2E_IMAGE-}" ]; then
    [ -n "${KUBECONFIG-}" ] || fail "E2E_IMAGE is for the cluster that KUBECONFIG names, which is not set"
    given=yes
else
    need_root "a cluster"
fi
if [ -z "$given" ] && [ "${KUBE_LXCFS_IN_NAMESPACE-}" != 1 ]; then
    hack/deps.sh build demo test cluster image
    hack/kubernetes.sh all >/dev/null
    hack/debian.sh trixie containerd >/dev/null
    hack/image.sh >/dev/null
    hack/helm.sh >/dev/null
    # A folder of the host is shared with pods only where the root is shared; lxcfs 6 wants to look at process 1, which some
    # machines lock away; and whatever happens, no process survives its pid namespace.
    exec env KUBE_LXCFS_IN_NAMESPACE=1 unshare --mount --propagation shared --pid --fork --kill-child --mount-proc "$0" "$@"
fi

PATH="$(hack/helm.sh):$PATH"
dir=$(mktemp -d /tmp/kle2e.XXXXXX)
if [ -n "$given" ]; then
    image=${E2E_IMAGE%:*} tag=${E2E_IMAGE##*:} busybox=${E2E_BUSYBOX:-busybox:1} pull=IfNotPresent
    second=${E2E_IMAGE_2:-$E2E_IMAGE} second=${second##*:}
    nri=${E2E_NRI-}
else
    image=localhost/kube-lxcfs tag=e2e second=e2e-2 busybox=localhost/kube-lxcfs/busybox:1 pull=Never nri=1
    # The image of an earlier run serves again while nothing that is in it changed.
    inputs=$(find Dockerfile .dockerignore Cargo.toml Cargo.lock src -type f -print0 | sort -z | xargs -0 sha256sum)
    archive="$CACHE/kube-lxcfs-$(echo "$inputs" | sha256sum | cut -c1-12).tar"
    if [ ! -f "$archive" ]; then
        rm -f "$CACHE"/kube-lxcfs-*.tar
        hack/build-image.sh "$image:e2e" "$archive"
    fi
    host=$dir/host
    export KUBECONFIG=$dir/kubeconfig
fi
began=$SECONDS
result=failed
end() {
    if [ "$result" = failed ]; then
        kubectl get pods -A -o wide 2>/dev/null | head -40 >&2 || true
        kubectl -n kube-lxcfs logs -l app.kubernetes.io/component=agent --tail=25 2>/dev/null >&2 || true
        kubectl -n kube-lxcfs logs -l app.kubernetes.io/component=lxcfs --tail=15 2>/dev/null | grep -v "^lxcfs: " >&2 || true
    fi
    if [ -n "$given" ]; then
        helm uninstall kube-lxcfs --namespace kube-lxcfs >/dev/null 2>&1 || true
        kubectl delete deployment before in out later away >/dev/null 2>&1 || true
        kubectl label namespace default kube-lxcfs.io/inject- >/dev/null 2>&1 || true
        rm -rf "$dir"
    else
        hack/cluster.sh down "$dir"
    fi
    say "e2e: $result after $((SECONDS - began)) s"
}
trap end EXIT
trap 'exit 130' INT TERM

# step WHAT
step() { say "[$((SECONDS - began)) s] $*"; }

# eventually SECONDS WHAT COMMAND...
eventually() {
    local n=$(($1 * 5)) what=$2
    shift 2
    while ! "$@" >/dev/null 2>&1; do
        n=$((n - 1))
        [ $n -gt 0 ] || fail "$what: not so"
        sleep 0.2
    done
}

# Reads all: a pipe that closes early fails its writer.
has() { grep "$@" >/dev/null; }

# shellcheck disable=SC2016 # the pod's shell
mem_of() { kubectl exec "$1" -- sh -c 'read -r _ kib _ </proc/meminfo; echo $kib'; }
own() { [ "$(mem_of "$1")" = 65536 ]; }
foreign() {
    local kib
    kib=$(mem_of "$1") && [ -n "$kib" ] && [ "$kib" != 65536 ]
}
of_app() { kubectl get pods -l "app=$1" --field-selector=status.phase=Running -o name; }
all() { local pod; for pod in $(of_app "$2"); do "$1" "$pod" || return 1; done; }
errors_of() { kubectl exec "$1" -- sh -c 'wc -l </tmp/errors'; }
errors() { local pod sum=0; for pod in $(of_app in); do sum=$((sum + $(errors_of "$pod"))); done; echo $sum; }
forget_errors() { local pod; for pod in $(of_app in); do kubectl exec "$pod" -- sh -c ': >/tmp/errors'; done; }
pod_of() { kubectl -n kube-lxcfs get pods -l "app.kubernetes.io/component=$1" -o name; }
# Of all nodes' agents, summed; asked from within their pods, which needs no way from here to there.
metric() {
    local pod
    for pod in $(pod_of agent); do
        kubectl -n kube-lxcfs exec "$pod" -- bash -c "exec 3<>/dev/tcp/127.0.0.1/$port; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3"
    done | awk -v name="$1" '$1 == name { n += $2; found = 1 } END { print found ? n : "none" }'
}
injected() { [ "$(metric 'kube_lxcfs_containers{state="injected"}')" = "$1" ]; }
first_read() { [ -z "$nri" ] || kubectl exec "$1" -- cat /tmp/first | has " 65536 kB"; }
installed_images() { kubectl -n kube-lxcfs get "daemonset/kube-lxcfs-$1" -o 'jsonpath={.spec.template.spec.containers[0].image}'; }
ready() { kubectl -n kube-lxcfs rollout status "daemonset/kube-lxcfs-$1" --timeout="${2:-90s}" >/dev/null; }

# deployment NAME REPLICAS ANNOTATION [SCRIPT]
deployment() {
    # Each pod reads all the while and counts what fails.
    local reads='head -1 /proc/meminfo >/tmp/first; : >/tmp/errors; while :; do cat /proc/meminfo /proc/uptime >/dev/null 2>>/tmp/errors; sleep 0.05; done'
    kubectl apply -f - <<EOF >/dev/null
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
          command: [sh, -c, '${4:-$reads}']
          resources: {requests: {cpu: 10m, memory: 64Mi}, limits: {cpu: 500m, memory: 64Mi}}
EOF
    kubectl rollout status "deployment/$1" --timeout=240s >/dev/null
}

values=(--namespace kube-lxcfs --create-namespace --wait --timeout 3m
    --set "image.repository=$image,image.tag=$tag,image.pullPolicy=$pull,test.image=$busybox,test.pullPolicy=$pull")
if [ -n "${E2E_VALUES-}" ]; then values+=(-f "$E2E_VALUES"); fi

install() {
    helm upgrade --install kube-lxcfs charts/kube-lxcfs "${values[@]}" "$@" >"$dir/helm.log" 2>&1 ||
        fail "helm: $(tail -n 3 "$dir/helm.log")"
}

nothing_left() {
    ! grep -q "$host" /proc/self/mountinfo || fail "a mount is left: $(grep "$host" /proc/self/mountinfo)"
    [ ! -e "$host" ] || fail "a folder is left: $(find "$host")"
    ! pgrep -f "[l]xcfs -f .*$host" >/dev/null || fail "a process is left: $(pgrep -af "[l]xcfs -f .*$host")"
    local pid
    for pid in /proc/[0-9]*; do
        ! grep -qs "noexec,noatime.* - fuse.lxcfs " "$pid/mountinfo" || fail "a view is left in $pid: $(tr '\0' ' ' <"$pid/cmdline")"
    done
}

if [ -n "$given" ]; then
    port=${E2E_PORT:-9808}
else
    step "a node and its control plane"
    hack/cluster.sh up "$dir"
    read -r _ api _ _ _ _ _ <"$dir/ports"
    port=$(python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])')
    # There is neither kube-proxy nor DNS here.
    values+=(--set "hostPath=$host,runtime.criSocketDir=$dir/run,nri.socketDir=$dir/run"
        --set "agent.hostNetwork=true,agent.listenAddress=127.0.0.1,agent.port=$port"
        --set "agent.extraEnv[0].name=KUBERNETES_SERVICE_HOST,agent.extraEnv[0].value=127.0.0.1"
        --set-string "agent.extraEnv[1].name=KUBERNETES_SERVICE_PORT,agent.extraEnv[1].value=$api")
    ctr=$(hack/debian.sh trixie containerd)/usr/bin/ctr
    "$ctr" -a "$dir/run/containerd.sock" -n k8s.io images import "$archive" >/dev/null
    "$ctr" -a "$dir/run/containerd.sock" -n k8s.io images tag "$image:e2e" "$image:e2e-2" >/dev/null
fi

step "helm install"
deployment before 1 'kube-lxcfs.io/inject: "true"'
install
ready agent
ready lxcfs

step "pods that opt in see their own memory, others the node's"
deployment in 3 'kube-lxcfs.io/inject: "true"'
deployment out 2 ''
eventually 20 "3 pods see their own" all own in
eventually 20 "a pod from before the installation sees its own" all own before
all foreign out || fail "a pod that did not opt in sees something else than the node's"
for pod in $(of_app in); do
    first_read "$pod" || fail "$pod: the first read was not its own: NRI is on"
done
eventually 10 "the Event" sh -c "kubectl describe pods -l app=in | grep -q 'LxcfsInjected.*view put into app'"
eventually 10 "metrics agree" injected 4
[ "$(metric kube_lxcfs_lxcfs_up)" -ge 1 ] || fail "lxcfs_up is $(metric kube_lxcfs_lxcfs_up)"

step "annotations and labels of running pods"
out=$(of_app out | sed -n 1p)
kubectl annotate "$out" kube-lxcfs.io/inject=true >/dev/null
eventually 5 "annotated: its own" own "$out"
kubectl annotate "$out" kube-lxcfs.io/inject- >/dev/null
eventually 5 "annotation away: the node's" foreign "$out"
kubectl label namespace default kube-lxcfs.io/inject=true >/dev/null
eventually 5 "namespace labelled: its own" all own out
kubectl label namespace default kube-lxcfs.io/inject- >/dev/null
eventually 5 "label away: the node's" all foreign out
kubectl annotate "$out" kube-lxcfs.io/inject=yes >/dev/null
eventually 5 "a warning names the annotation" sh -c "kubectl describe $out | grep -q \"LxcfsInvalidAnnotation.*'yes' is not understood\""
kubectl annotate "$out" kube-lxcfs.io/inject- >/dev/null

step "helm test"
helm test kube-lxcfs --namespace kube-lxcfs >"$dir/helm.log" 2>&1 || fail "helm test: $(cat "$dir/helm.log")"
kubectl -n kube-lxcfs delete pod kube-lxcfs-test >/dev/null

step "the agent's pod is deleted: no view changes"
forget_errors
kubectl -n kube-lxcfs delete pod -l app.kubernetes.io/component=agent >/dev/null
ready agent
all own in || fail "a view changed"
[ "$(errors)" = 0 ] || fail "$(errors) errors"

step "the lxcfs pod is deleted: no error, and views return"
kubectl -n kube-lxcfs delete pod -l app.kubernetes.io/component=lxcfs >/dev/null
ready lxcfs
eventually 20 "views are back" all own in
[ "$(errors)" = 0 ] || fail "$(errors) errors"

if [ -z "$given" ]; then
    step "lxcfs is killed: views return by themselves"
    pkill -KILL -f "lxcfs -f .*$host"
    eventually 10 "views are back" all own in
    step "    $(errors) reads in 3 pods failed"
    forget_errors
fi

step "the agent is upgraded: lxcfs stays as it is"
lxcfs_pod=$(pod_of lxcfs)
install --set "image.tag=$second,lxcfs.image.tag=$tag"
ready agent
[ "$(installed_images agent)" = "$image:$second" ] || fail "the agent runs $(installed_images agent)"
[ "$(pod_of lxcfs)" = "$lxcfs_pod" ] || fail "lxcfs was replaced too"
all own in || fail "a view changed"
[ "$(errors)" = 0 ] || fail "$(errors) errors"

step "lxcfs is upgraded"
install --set "image.tag=$second,lxcfs.image.tag=$second"
ready lxcfs
eventually 20 "views are back" all own in
[ "$(errors)" = 0 ] || fail "$(errors) errors"

if [ -z "$given" ]; then
    step "containerd and kubelet restart"
    hack/cluster.sh stop "$dir" containerd
    hack/cluster.sh stop "$dir" kubelet
    hack/cluster.sh start "$dir" containerd
    hack/cluster.sh start "$dir" kubelet
    eventually 60 "the node is ready" sh -c "kubectl get nodes | grep -q ' Ready'"
    eventually 30 "pods can be entered" all own in
    [ "$(errors)" = 0 ] || fail "$(errors) errors"
fi
deployment later 1 'kube-lxcfs.io/inject: "true"'
eventually 10 "a pod from after the restart" all own later
first_read "$(of_app later)" || fail "NRI did not come back"

step "pods made while lxcfs is away start, and get their view later"
kubectl -n kube-lxcfs patch daemonset kube-lxcfs-lxcfs -p '{"spec":{"template":{"spec":{"nodeSelector":{"none":"such"}}}}}' >/dev/null
eventually 60 "lxcfs is away" sh -c "! kubectl -n kube-lxcfs get pods -l app.kubernetes.io/component=lxcfs --no-headers 2>/dev/null | grep -q ."
deployment away 1 'kube-lxcfs.io/inject: "true"'
all foreign away || fail "a view without lxcfs"
kubectl -n kube-lxcfs patch daemonset kube-lxcfs-lxcfs --type=json -p '[{"op":"remove","path":"/spec/template/spec/nodeSelector"}]' >/dev/null
ready lxcfs
eventually 40 "it got its view" all own away
eventually 10 "all others too" all own in

if [ -n "$given" ]; then
    helm uninstall kube-lxcfs --namespace kube-lxcfs --wait >/dev/null
    eventually 60 "no view is left" all foreign in
    step "left out on a cluster that is not ours: killing lxcfs, restarts, reboot, least privileges, sizes, what the host keeps"
    result=passed
    exit
fi

step "the node reboots: everything is killed, mounts are gone, the same pods start again"
hack/cluster.sh stop "$dir" kubelet
hack/cluster.sh reboot "$dir"
hack/cluster.sh start "$dir" containerd
hack/cluster.sh start "$dir" kubelet
eventually 90 "the node is ready" sh -c "kubectl get nodes | grep -q ' Ready'"
eventually 90 "pods are up and see their own" sh -c "[ \$(kubectl get pods -l app=in --no-headers | grep -c Running) = 3 ]"
eventually 60 "views are back" all own in
all foreign out || fail "a pod that did not opt in sees something else than the node's"

# Whether all of it works: ready, in time for the first instruction, by label, with an Event.
works() {
    ready agent 15s 2>/dev/null || return 1
    kubectl delete pod -l app=later --grace-period=0 --force >/dev/null 2>&1
    kubectl rollout status deployment/later --timeout=30s >/dev/null 2>&1 || return 1
    local pod
    pod=$(of_app later | sed -n 1p)
    (eventually 5 "a view" own "$pod") 2>/dev/null || return 1
    first_read "$pod" || return 1
    (eventually 5 "an Event" sh -c "kubectl describe $pod | grep -q LxcfsInjected") 2>/dev/null || return 1
    # Without a watch it lists again and again, which is no way to live.
    ! kubectl -n kube-lxcfs logs "$(pod_of agent)" | has "cannot be watched"
}

# without WHAT PATCH: the agent as it is, but for that.
without() {
    kubectl -n kube-lxcfs patch daemonset kube-lxcfs-agent --type=json -p "$2" >/dev/null
    if works; then fail "the agent works without $1: it is not needed, and goes"; fi
    kubectl -n kube-lxcfs rollout undo daemonset/kube-lxcfs-agent >/dev/null 2>&1
}

without_rule() {
    local rules
    rules=$(kubectl get clusterrole kube-lxcfs -o 'jsonpath={.rules}')
    kubectl patch clusterrole kube-lxcfs --type=json -p "$2" >/dev/null
    kubectl -n kube-lxcfs delete pod -l app.kubernetes.io/component=agent --wait >/dev/null
    if works; then fail "the agent works without $1: it is not needed, and goes"; fi
    kubectl patch clusterrole kube-lxcfs --type=merge -p "{\"rules\":$rules}" >/dev/null
    kubectl -n kube-lxcfs delete pod -l app.kubernetes.io/component=agent --wait >/dev/null
}

step "without NRI and events, as with containerd 1.6: the watch of the pods brings the view"
install --set "image.tag=$second,lxcfs.image.tag=$second,nri.mode=off,runtime.events=off"
ready agent
# shellcheck disable=SC2016 # the pod's shell
deployment late 3 'kube-lxcfs.io/inject: "true"' 'n=0; until grep "^MemTotal: *65536 kB" /proc/meminfo; do usleep 10000; n=$((n + 1)); done; echo $n >/tmp/late; sleep 1000000'
eventually 30 "they get their view" all own late
for pod in $(of_app late); do
    step "    view after the start: about $(kubectl exec "$pod" -- cat /tmp/late)0 ms"
done
kubectl delete deployment late --wait >/dev/null
install --set "image.tag=$second,lxcfs.image.tag=$second"
ready agent

step "the agent has the least: each thing that it may is taken away in turn"
works || fail "it does not work to begin with"
container=/spec/template/spec/containers/0
caps=$container/securityContext/capabilities/add
without SYS_ADMIN "[{\"op\":\"remove\",\"path\":\"$caps/0\"}]"
without SYS_CHROOT "[{\"op\":\"remove\",\"path\":\"$caps/1\"}]"
without SYS_PTRACE "[{\"op\":\"remove\",\"path\":\"$caps/2\"}]"
without hostPID '[{"op":"remove","path":"/spec/template/spec/hostPID"}]'
without "lxcfs's volume" "[{\"op\":\"remove\",\"path\":\"$container/volumeMounts/0\"}]"
without "the CRI socket" "[{\"op\":\"remove\",\"path\":\"$container/volumeMounts/1\"}]"
without "the NRI socket" "[{\"op\":\"remove\",\"path\":\"$container/volumeMounts/2\"}]"
without_rule "pods" '[{"op":"replace","path":"/rules/0/resources","value":["namespaces"]}]'
without_rule "namespaces" '[{"op":"replace","path":"/rules/0/resources","value":["pods"]}]'
without_rule "list" '[{"op":"replace","path":"/rules/0/verbs","value":["watch"]}]'
without_rule "watch" '[{"op":"replace","path":"/rules/0/verbs","value":["list"]}]'
without_rule "events" '[{"op":"remove","path":"/rules/1"}]'
ready agent

if [ -n "${E2E_SIZES-}" ]; then
    # Of a process and its children: resident memory in KiB, and CPU time in ticks.
    rss_of() { for p in $1 $(pgrep -P "$1"); do awk '/^VmRSS:/ { print $2 }' "/proc/$p/status"; done | awk '{ n += $1 } END { print n }'; }
    cpu_of() { for p in $1 $(pgrep -P "$1"); do awk '{ print $14 + $15 }' "/proc/$p/stat"; done | awk '{ n += $1 } END { print n }'; }
    step "sizes, with 100 pods that have a view and do nothing"
    kubectl delete deployment --all --wait >/dev/null
    deployment many 100 'kube-lxcfs.io/inject: "true"' "sleep 1000000"
    eventually 120 "all have their view" injected 100
    agent=$(pgrep -f '^/usr/bin/kube-lxcfs agent') supervisor=$(pgrep -f '^/usr/bin/kube-lxcfs lxcfs')
    sleep 20
    before=("$(cpu_of "$agent")" "$(cpu_of "$supervisor")")
    sleep "$E2E_SIZES"
    after=("$(cpu_of "$agent")" "$(cpu_of "$supervisor")")
    step "    image $(($(stat -c %s "$archive") >> 20)) MiB as an archive; agent $(rss_of "$agent") KiB, lxcfs and its supervisor $(rss_of "$supervisor") KiB resident"
    step "    CPU in $E2E_SIZES s: agent $((after[0] - before[0]))0 ms, lxcfs and its supervisor $((after[1] - before[1]))0 ms"
    kubectl delete deployment many --wait >/dev/null
    deployment in 3 'kube-lxcfs.io/inject: "true"'
fi

step "helm uninstall leaves nothing; ten times"
for n in 1 2 3 4 5 6 7 8 9 10; do
    helm uninstall kube-lxcfs --namespace kube-lxcfs --wait >/dev/null
    eventually 60 "pods are gone" sh -c "! kubectl -n kube-lxcfs get pods --no-headers 2>/dev/null | grep -q ."
    all foreign in || fail "a pod sees something else than the node's after the uninstallation"
    nothing_left
    [ "$n" = 10 ] || { install && eventually 20 "views are back" all own in; }
done
result=passed
exit
}
