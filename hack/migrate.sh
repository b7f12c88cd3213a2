# shellcheck shell=bash
# shellcheck disable=SC2016,SC2034,SC2154,SC2317,SC2329 # variables by name, and of hack/e2e.sh
# The steps of hack/e2e.sh that try docs/migrating.md, on its cluster, without kube-lxcfs. Sourced
# by it, never run. Each step makes what one project leaves behind: its objects, an lxcfs at its
# path on the node, and a running pod with the volumes and mounts that it adds. Then it runs the
# commands of the document as they stand there. The lxcfs is that of our image: the projects' images
# and programs are not used. Names, paths and mounts are those of the sources that the document
# links to.

# ---- the document -----------------------------------------------------------------------------

# output_of_block HEADING NUMBER: runs it, with the image and the values that this cluster needs.
output_of_block() (
    commands=$(block docs/migrating.md "## $1" sh "$2")
    [ -n "$commands" ] || fail "docs/migrating.md has no block $2 below '$1'"
    helm() {
        case $1 in
        upgrade) command helm "$@" "${values[@]}" ;;
        *) command helm "$@" ;;
        esac
    }
    eval "${commands//REGISTRY/${image%/*}}"
)

run_block() { output_of_block "$@" >"$dir/block.log"; }

# ---- what the projects leave behind -----------------------------------------------------------

# object ARGUMENT...: prints what kubectl create would create.
object() {
    kubectl create "$@" --dry-run=client -o yaml
    echo ---
}

# webhook KIND NAME NAMESPACE SERVICE LABEL: a configuration for pods of namespaces with the label.
webhook() {
    cat <<YAML
apiVersion: admissionregistration.k8s.io/v1
kind: $1WebhookConfiguration
metadata: {name: $2}
webhooks:
  - name: $2.example.com
    admissionReviewVersions: [v1]
    sideEffects: None
    failurePolicy: Ignore
    clientConfig: {service: {namespace: $3, name: $4, path: /mutate}}
    rules: [{operations: [CREATE], apiGroups: [""], apiVersions: [v1], resources: [pods]}]
    namespaceSelector: {matchLabels: {${5/=/: }}}
---
YAML
}

# lxcfs_daemonset NAME VOLUME PATH [SHELL]: an lxcfs at PATH on the node. With a space as SHELL, it
# is the child of a shell, and is killed when its pod is deleted.
lxcfs_daemonset() {
    cat <<YAML
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: $1}
spec:
  selector: {matchLabels: {app: $1}}
  template:
    metadata: {labels: {app: $1}}
    spec:
      hostPID: true
      containers:
        - name: lxcfs
          image: $image-lxcfs:$tag
          imagePullPolicy: $pull
          command:
            - sh
            - -c
            - |
              version=1
              if [ -e /sys/fs/cgroup/cgroup.controllers ]; then version=2; fi
              export LD_LIBRARY_PATH=/usr/lib/kube-lxcfs/cgroup\$version
              mkdir -p $3
              ${4:-exec} \$LD_LIBRARY_PATH/lxcfs -f -p /run/lxcfs.pid $3
              ${4:+exit}
          securityContext: {privileged: true}
          volumeMounts:
            - {name: cgroup, mountPath: /sys/fs/cgroup}
            - {name: lxcfs, mountPath: $2, mountPropagation: Bidirectional}
      volumes:
        - {name: cgroup, hostPath: {path: /sys/fs/cgroup}}
        - {name: lxcfs, hostPath: {path: $2, type: DirectoryOrCreate}}
---
YAML
}

certificate_request() {
    local request
    request=$(openssl req -new -newkey rsa:2048 -nodes -keyout /dev/null -subj /CN=webhook \
        2>/dev/null | base64 -w 0)
    cat <<YAML
apiVersion: certificates.k8s.io/v1
kind: CertificateSigningRequest
metadata: {name: $1}
spec: {request: $request, signerName: example.com/webhook, usages: [server auth]}
---
YAML
}

denverdino_install() {
    local name=lxcfs-admission-webhook
    mkdir -p /usr/local/lib/lxcfs
    touch /usr/local/bin/lxcfs /usr/local/lib/lxcfs/liblxcfs.so
    {
        object deployment $name-deployment --image="$busybox" --replicas=0
        object service clusterip $name-svc --tcp=443
        object secret generic $name-certs --from-literal=cert.pem=none
        certificate_request $name-svc.default
        webhook Mutating mutating-$name-cfg default $name-svc $name=enabled
        webhook Validating validation-$name-cfg default $name-svc $name=enabled
        lxcfs_daemonset lxcfs /var/lib/lxcfs /var/lib/lxcfs
    } | kubectl -n default apply -f - >/dev/null
}
denverdino_annotation='lxcfs-admission-webhook.aliyun.com/status: mutated'
denverdino_files="proc/cpuinfo proc/meminfo proc/diskstats proc/stat proc/uptime
    sys/devices/system/cpu/online"
denverdino_volumes() {
    local file
    for file in $denverdino_files; do
        echo "{name: lxcfs-${file//\//-}, hostPath: {path: /var/lib/lxcfs/$file}},"
    done
}
denverdino_mounts() {
    local file
    for file in $denverdino_files; do
        echo "{name: lxcfs-${file//\//-}, mountPath: /$file, readOnly: true},"
    done
}

ymping_install() {
    local name=lxcfs-admission-webhook
    mkdir -p /var/lib/lxc/script
    touch /var/lib/lxc/script/lxcfs-mount.sh
    kubectl create namespace lxcfs >/dev/null
    {
        object deployment $name --image="$busybox" --replicas=0
        object service clusterip $name --tcp=443
        object secret generic $name --from-literal=tls.key=none
        webhook Mutating $name lxcfs $name $name=enabled
        lxcfs_daemonset lxcfs-ds /var/lib/lxc /var/lib/lxc/lxcfs ' '
    } | kubectl -n lxcfs apply -f - >/dev/null
}
ymping_annotation='mutating.lxcfs-admission-webhook.io/status: mutated'
ymping_files="proc/cpuinfo proc/diskstats proc/loadavg proc/meminfo proc/stat proc/swaps
    proc/uptime sys/devices/system/cpu/online"
ymping_volumes() { echo "{name: lxcfs, hostPath: {path: /var/lib/lxc/, type: DirectoryOrCreate}}"; }
ymping_mounts() {
    local file
    for file in $ymping_files; do
        echo "{name: lxcfs, mountPath: /$file, subPath: lxcfs/$file, readOnly: true},"
    done
    echo "{name: lxcfs, mountPath: /var/lib/lxc/, readOnly: true,"
    echo " mountPropagation: HostToContainer}"
}
# Its preStop hook unmounts a mount from each file of its pods.
ymping_stopped() {
    in_old 'cd /proc && umount -l cpuinfo diskstats loadavg meminfo stat swaps uptime'
    eventually 10 "the old pod sees the node" sees_node old
    run_block "$1" 5
    rolled_out agent
    eventually 20 "the old pod has a view again" sees_limit old
    kubectl exec old -- sh -c ': >/tmp/wrong'
}

cndoit18_install() {
    local name=lxcfs-lxcfs-on-kubernetes chart=$dir/lxcfs-on-kubernetes
    mkdir -p "$chart/templates"
    echo '{apiVersion: v2, name: lxcfs-on-kubernetes, version: 0.2.1}' >"$chart/Chart.yaml"
    {
        object deployment $name-controller-manager --image="$busybox" --replicas=0
        object service clusterip $name-webhook-service --tcp=443
        object secret generic $name-certificate --from-literal=tls.key=none
        object configmap lxcfs-crictl-config --from-literal=crictl.yaml=none
        object clusterrole $name-manager-role --verb='*' --resource=pods
        webhook Mutating $name-mutating-webhook-configuration lxcfs $name-webhook-service \
            mount-lxcfs=enabled
        lxcfs_daemonset $name-controller-manager-daemonset /var/lib/lxcfs-on-k8s/lxcfs \
            /var/lib/lxcfs-on-k8s/lxcfs
    } >"$chart/templates/all.yaml"
    helm install lxcfs "$chart" --namespace lxcfs --create-namespace >/dev/null
}
cndoit18_annotation=
cndoit18_files="proc/cpuinfo proc/diskstats proc/loadavg proc/meminfo proc/stat proc/swaps
    proc/uptime sys/devices/system/cpu sys/devices/system/cpu/online"
cndoit18_volumes() {
    local file
    for file in $cndoit18_files; do
        echo "{name: lxcfs-${file//\//-}, hostPath: {path: /var/lib/lxcfs-on-k8s/lxcfs/$file}},"
    done
    echo "{name: lxcfs-root, hostPath: {path: /var/lib/lxcfs-on-k8s/lxcfs/}}"
}
cndoit18_mounts() {
    local file options="readOnly: true, mountPropagation: HostToContainer"
    for file in $cndoit18_files; do
        echo "{name: lxcfs-${file//\//-}, mountPath: /$file, $options},"
    done
    echo "{name: lxcfs-root, mountPath: /var/lib/lxcfs-on-k8s/lxcfs/, $options}"
}

# The DaemonSet is in place of the node's lxcfs.service.
lxcfs_tools_install() {
    mkdir -p /var/lib/isulad/hooks
    echo '{"prestart": [{"path": "/var/lib/isulad/hooks/lxcfs-hook", "args": ["lxcfs-hook"]},
        {"path": "/usr/bin/another"}], "poststart": [], "poststop": []}' \
        >/var/lib/isulad/hooks/hookspec.json
    lxcfs_daemonset lxcfs-service /var/lib/lxc /var/lib/lxc/lxcfs | kubectl apply -f - >/dev/null
}
lxcfs_tools_annotation=
lxcfs_tools_files="proc/cpuinfo proc/diskstats proc/loadavg proc/meminfo proc/stat proc/swaps
    proc/uptime"
lxcfs_tools_volumes() { echo "{name: lxc, hostPath: {path: /var/lib/lxc}}"; }
lxcfs_tools_mounts() {
    echo "{name: lxc, mountPath: /var/lib/lxc, mountPropagation: HostToContainer}"
}
lxcfs_tools_hook() {
    in_old 'cd /var/lib/lxc/lxcfs
        if [ -e cgroup ]; then mount -o bind cgroup cgroup; fi
        cd proc
        for file in *; do
            if [ -f "/proc/$file" ]; then mount -o bind "$file" "/proc/$file"; fi
        done'
    eventually 10 "the old pod sees its limit" sees_limit old
    kubectl exec old -- sh -c ': >/tmp/wrong'
}

# ---- the pod that a webhook mutated -----------------------------------------------------------

# old_pod PROJECT: it counts reads of its memory that are not its limit, and failed ones.
old_pod() {
    local annotation=${1}_annotation
    kubectl apply -f - <<YAML >/dev/null
apiVersion: v1
kind: Pod
metadata: {name: old, annotations: {${!annotation}}}
spec:
  terminationGracePeriodSeconds: 0
  volumes: [$("$1_volumes")]
  containers:
    - name: app
      image: $busybox
      imagePullPolicy: $pull
      command:
        - sh
        - -c
        - |
          : >/tmp/wrong
          until [ -e /tmp/end ]; do
              kib=
              read -r _ kib _ </proc/meminfo
              echo >>/tmp/reads
              [ "\$kib" = 65536 ] || echo "\$kib" >>/tmp/wrong
              usleep 10000
          done
      resources: {$(limits 64Mi)}
      volumeMounts: [$("$1_mounts")]
YAML
    kubectl wait --for=condition=Ready pod/old --timeout=60s >/dev/null
}
of_old() { kubectl get pod old -o "jsonpath={.status.containerStatuses[0].$1}"; }
# in_old COMMANDS: runs them in the old pod's namespaces, with the node's privileges.
in_old() { nsenter -m -p -t "$(pgrep -of '^sh -c : >/tmp/wrong')" sh -c "$1"; }
reads() { kubectl exec old -- sh -c 'wc -l </tmp/reads'; }
has_read_more_than() { [ "$(reads)" -gt "$1" ]; }
# old_is_unharmed PROJECT: never restarted, all reads saw the limit, it reads on, and each file can
# be read.
old_is_unharmed() {
    local file files=${1}_files
    [ "$(of_old restartCount)" = 0 ] || fail "the old pod was restarted"
    eventually 10 "the old pod reads again" has_read_more_than "$(reads)"
    [ "$(kubectl exec old -- sh -c 'wc -l </tmp/wrong')" = 0 ] ||
        fail "the old pod read: $(kubectl exec old -- sort /tmp/wrong | uniq -c)"
    for file in ${!files}; do
        if [ "$file" = sys/devices/system/cpu ]; then file+=/online; fi
        kubectl exec old -- cat "/$file" >/dev/null || fail "the old pod cannot read /$file"
    done
}
# adopted: whether all lxcfs files on the old pod's /proc come from the serving lxcfs.
adopted() {
    local serving devices
    serving=$(awk -v path="$host/lxcfs" '$5 == path { print $3 }' /proc/self/mountinfo)
    devices=$(kubectl exec old -- cat /proc/self/mountinfo |
        awk '$5 ~ "^/proc/" && / - fuse.lxcfs / { print $3 }' | sort -u)
    [ -n "$serving" ] && [ "$devices" = "$serving" ]
}
cannot_start() { has -E '^(RunContainer|CreateContainer)' <<<"$(of_old state.waiting.reason)"; }

# ---- the steps --------------------------------------------------------------------------------

# private_copy DIRECTORY: from now on, changes below it are seen only in this mount namespace.
private_copy() {
    local layers=$dir/copy${1//\//-}
    mkdir "$layers"
    mount -t tmpfs tmpfs "$layers"
    mkdir "$layers/upper" "$layers/work"
    mount -t overlay -o "lowerdir=$1,upperdir=$layers/upper,workdir=$layers/work" overlay "$1"
}
the_node_gets_its_own_var_lib_and_usr_local() {
    private_copy /var/lib
    private_copy /usr/local
    # This machine may have an lxcfs at the same paths.
    rm -rf /var/lib/{lxc,isulad}* /usr/local/bin/lxcfs /usr/local/lib/lxcfs
}

serves() { head -c 1 "$1/proc/uptime" >/dev/null 2>&1; }
stopped() { ! serves "$1"; }

# objects_of_others: the objects whose names contain lxcfs, except those of kube-lxcfs and the pods
# that an earlier step has started without lxcfs.
objects_of_others() {
    local objects namespaced=deployments,daemonsets,pods,services,secrets,configmaps
    local others=clusterroles,certificatesigningrequests,namespaces
    others+=,mutatingwebhookconfigurations,validatingwebhookconfigurations
    objects=$(kubectl get $namespaced --all-namespaces -o name && kubectl get $others -o name) ||
        objects="unknown: an lxcfs of others"
    grep lxcfs <<<"$objects" | grep -v -e kube-lxcfs -e without-lxcfs
}
# nothing_of_others_left PROJECT: on the cluster, and on the node.
nothing_of_others_left() {
    local left
    wait_for 60 eval '! objects_of_others' || fail "$1 has left: $(objects_of_others)"
    left=$(awk '$5 ~ "^/var/lib/(lxc|isulad)"' /proc/self/mountinfo
        find /var/lib/lxc* /usr/local/bin/lxcfs /usr/local/lib/lxcfs 2>/dev/null || true)
    [ -z "$left" ] || fail "$1 has left: $left"
}

# begin PROJECT PATH LABEL: its state on cluster and node.
begin() {
    kubectl create namespace migration >/dev/null
    kubectl label namespace migration "$3" >/dev/null
    kubectl config set-context --current --namespace=migration >/dev/null
    "$1_install"
    eventually 60 "the lxcfs of $1 serves" serves "$2"
    old_pod "$1"
}
end() {
    kubectl config set-context --current --namespace="$pods_namespace" >/dev/null
    kubectl delete namespace migration --wait >/dev/null
    uninstall
    nothing_left
    nothing_of_others_left "$1"
}
new_pods_have_views() {
    deployment new 1 ''
    eventually 20 "a new pod sees its limit" all_pods sees_limit new
    all_pods first_read_saw_limit new || fail "the first read saw the node, despite NRI"
    deployment opted-out 1 'kube-lxcfs.io/inject: "false"'
    all_pods sees_node opted-out || fail "a pod that opted out has a view"
}
# listed PODS: the document's list of pods to wait for is PODS.
listed() {
    local pods
    pods=$(output_of_block Steps 1)
    [ "$pods" = "$1" ] || fail "listed as pods with volumes of lxcfs: $pods"
}

# migrate PROJECT PATH LABEL SECTION: from a webhook, by the section of the document.
migrate() {
    local project=$1 path=$2 label=$3 section=$4
    begin "$project" "$path" "$label"
    old_is_unharmed "$project"
    run_block "$section" 1
    eventually 30 "the files of the old pod are adopted" adopted
    old_is_unharmed "$project"
    run_block "$section" 2
    new_pods_have_views
    listed migration/old

    # Earlier than the document says: the old pod still runs.
    run_block "$section" 3
    eventually 60 "the lxcfs of $project has stopped" stopped "$path"
    if [ "$(type -t "${project}_stopped")" = function ]; then "${project}_stopped" "$section"; fi
    old_is_unharmed "$project"
    kubectl exec old -- touch /tmp/end
    eventually 90 "a container with files of a stopped lxcfs cannot start" cannot_start
    note "the container with files of a stopped lxcfs: $(of_old state.waiting.reason)"
    kubectl delete pod old --wait --timeout=60s >/dev/null
    listed ''

    run_block Steps 2
    rolled_out agent
    all_pods sees_limit new || fail "the new pod lost its view"
    run_block "$section" 4
    kubectl label namespace migration "${label%=*}-" >/dev/null
    eventually 10 "a pod without label sees the node" all_pods sees_node new
    deployment annotated 1 "$opt_in"
    all_pods sees_limit annotated || fail "a pod with the annotation has no view"
    end "$project"
}
pods_of_denverdinos_webhook_keep_their_view() {
    migrate denverdino /var/lib/lxcfs lxcfs-admission-webhook=enabled \
        denverdino/lxcfs-admission-webhook
}
pods_of_ympings_webhook_keep_their_view() {
    migrate ymping /var/lib/lxc/lxcfs lxcfs-admission-webhook=enabled \
        ymping/lxcfs-admission-webhook
}
pods_of_cndoit18s_webhook_keep_their_view() {
    migrate cndoit18 /var/lib/lxcfs-on-k8s/lxcfs mount-lxcfs=enabled cndoit18/lxcfs-on-kubernetes
}

containers_of_lxcfs_tools_keep_their_view() {
    begin lxcfs_tools /var/lib/lxc/lxcfs none=none
    lxcfs_tools_hook
    run_block lxcfs-tools 1
    eventually 30 "the files of the old pod are adopted" adopted
    run_block lxcfs-tools 2
    ! has lxcfs-hook /var/lib/isulad/hooks/hookspec.json || fail "the hook is still configured"
    has /usr/bin/another /var/lib/isulad/hooks/hookspec.json || fail "another hook was removed"
    new_pods_have_views
    kubectl delete daemonset lxcfs-service >/dev/null
    eventually 60 "the lxcfs of the node has stopped" stopped /var/lib/lxc/lxcfs
    old_is_unharmed lxcfs_tools
    kubectl delete pod old --wait --timeout=60s >/dev/null
    run_block Steps 2
    rolled_out agent
    all_pods sees_limit new || fail "the new pod lost its view"
    rmdir /var/lib/lxc/lxcfs /var/lib/lxc
    end lxcfs_tools
}

the_commands_of_docs_migrating_md_keep_views() {
    step the_node_gets_its_own_var_lib_and_usr_local
    step pods_of_denverdinos_webhook_keep_their_view
    step pods_of_ympings_webhook_keep_their_view
    step pods_of_cndoit18s_webhook_keep_their_view
    step containers_of_lxcfs_tools_keep_their_view
}
