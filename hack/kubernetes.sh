#!/usr/bin/env bash
# Sees to it that a kube-apiserver is there, or with `all` also the other parts of a node and a control plane, and prints their
# folder on stdout.
# In this order: $KUBEBUILDER_ASSETS (envtest's convention), PATH, the cache, and else it is built from the
# distribution's source package `kubernetes` (Debian 12: 1.20.2 with its vendored modules; 5 to 8 minutes).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

components=(kube-apiserver)
case ${1-} in
'') ;;
all) components+=(kube-controller-manager kube-scheduler kubelet) ;;
*) fail "usage: hack/kubernetes.sh [all]" ;;
esac
version=1.20.2
built="$CACHE/kubernetes-$version"

all_in() {
    local c
    for c in "${components[@]}"; do [ -x "$1/$c" ] || return 1; done
}

if [ -n "${KUBEBUILDER_ASSETS:-}" ] && [ $# = 0 ]; then
    all_in "$KUBEBUILDER_ASSETS" || fail "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS lacks ${components[*]}"
    echo "$KUBEBUILDER_ASSETS"
    exit
fi
if have "${components[@]}"; then
    dirname "$(command -v "${components[0]}")"
    exit
fi

# apt's own configuration names the mirrors; only the kind of what is asked for changes.
sources() {
    local f
    for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -f "$f" ] && sed -n 's/^deb\(-src\)\? /deb-src /p' "$f"
    done >"$1/own.list"
    f=/etc/apt/sources.list.d/debian.sources
    if [ -f "$f" ]; then sed 's/^Types:.*/Types: deb-src/' "$f" >"$1/own.sources"; fi
}

build() {
    all_in "$built" && return
    "$here/deps.sh" kubernetes >&2
    local work apt log=$CACHE/kubernetes-build.log
    work=$(mktemp -d "$CACHE/kubernetes-build.XXXXXX")
    # shellcheck disable=SC2064 # this folder, now
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work/parts" "$work/lists/partial" "$work/go/src/k8s.io"
    sources "$work/parts"
    apt=(-q -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$work/parts" -o "Dir::State::Lists=$work/lists"
        -o "APT::Sandbox::User=root")
    say "building ${components[*]} $version from the distribution's source package, once (log: $log)"
    (
        cd "$work"
        apt-get "${apt[@]}" update || true
        apt-get "${apt[@]}" source "kubernetes=$version*" || apt-get "${apt[@]}" source kubernetes
        mv kubernetes-*/ go/src/k8s.io/kubernetes
        cd go/src/k8s.io/kubernetes
        git init -q .
        export GOPATH="$work/go" GO111MODULE=off GOCACHE="$work/gocache" GOFLAGS=
        export KUBE_GIT_VERSION="v$version" KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 KUBE_GIT_TREE_STATE=archive KUBE_GIT_COMMIT=0000
        make WHAT="${components[*]/#/cmd/}" GOLDFLAGS="-s -w"
        mkdir -p "$built.new"
        cp -L "${components[@]/#/_output/bin/}" "$built.new/"
        rm -rf "$built"
        mv "$built.new" "$built"
    ) >"$log" 2>&1 || {
        tail -30 "$log" >&2
        fail "${components[*]} could not be built (whole output: $log); put them on PATH"
    }
}

mkdir -p "$CACHE"
locked kubernetes build
echo "$built"
