#!/usr/bin/env bash
# Prints the directory of kube-apiserver, or with `all` also of the other components of a node and
# a control plane.
#   hack/offline/kubernetes.sh        any version: $KUBEBUILDER_ASSETS, or PATH, or the cache
#   hack/offline/kubernetes.sh all    version 1.20, whose flags hack/cluster.sh uses: PATH, or the
#                                     cache
# Otherwise it builds them, in 5 to 8 minutes, from Debian 12's source package `kubernetes`, which
# holds version 1.20.2 with its vendored modules.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

components=(kube-apiserver)
case ${1-} in
'') required='*' ;;
all)
    required='1.20.*'
    components+=(kube-controller-manager kube-scheduler kubelet)
    ;;
*) fail "usage: hack/offline/kubernetes.sh [all]" ;;
esac
version=1.20.2
built="$CACHE/kubernetes-$version"

# in_directory DIR: whether DIR holds all components.
in_directory() {
    local c
    for c in "${components[@]}"; do [ -x "$1/$c" ] || return 1; done
}

# version_in DIR COMPONENT: prints its version, as in 1.20.2.
version_in() {
    local output
    output=$("$1/$2" --version) || true
    [[ $output = "Kubernetes v"* ]] ||
        fail "failed to run $1/$2 --version: ${output:-no output}"
    echo "${output#Kubernetes v}"
}

# have_version DIR VERSION: whether each component in DIR has VERSION, a pattern. Sets $found to
# the component and version that it has seen last.
have_version() {
    local c v
    for c in "${components[@]}"; do
        v=$(version_in "$1" "$c") || exit
        found="$c $v"
        # shellcheck disable=SC2053 # a pattern
        [[ $v = $2 ]] || return 1
    done
}

if [ -n "${KUBEBUILDER_ASSETS:-}" ] && [ $# = 0 ]; then
    in_directory "$KUBEBUILDER_ASSETS" ||
        fail "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS lacks ${components[*]}"
    have_version "$KUBEBUILDER_ASSETS" "$required"
    say "using $found in $KUBEBUILDER_ASSETS"
    echo "$KUBEBUILDER_ASSETS"
    exit
fi
unsuitable=
if on_path=$(command -v "${components[0]}") && in_directory "${on_path%/*}"; then
    if have_version "${on_path%/*}" "$required"; then
        say "using $found in ${on_path%/*}"
        echo "${on_path%/*}"
        exit
    fi
    unsuitable="$found on PATH is not used: hack/cluster.sh needs $required"
fi

# source_lists DIR: writes apt's own sources to DIR, with source packages instead of binary ones.
source_lists() {
    local f
    for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -f "$f" ] && sed -n 's/^deb\(-src\)\? /deb-src /p' "$f"
    done >"$1/own.list"
    f=/etc/apt/sources.list.d/debian.sources
    if [ -f "$f" ]; then sed 's/^Types:.*/Types: deb-src/' "$f" >"$1/own.sources"; fi
}

download_source() {
    local apt found
    mkdir -p "$work/parts" "$work/lists/partial"
    source_lists "$work/parts"
    apt=(-q -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$work/parts"
        -o "Dir::State::Lists=$work/lists" -o "APT::Sandbox::User=root")
    # Another repository in the list may be unreachable.
    apt-get "${apt[@]}" update || true
    apt-get "${apt[@]}" source kubernetes
    # Debian's version is 1.20.5+really1.20.2-1.1.
    found=$(dpkg-parsechangelog --file kubernetes-*/debian/changelog --show-field Version)
    [[ $found = $version-* || $found = *+really$version-* ]] ||
        fail "Debian's source package has version $found, not $version"
}

compile() {
    cd "$work"
    download_source
    mkdir -p go/src/k8s.io
    mv kubernetes-*/ go/src/k8s.io/kubernetes
    cd go/src/k8s.io/kubernetes
    # The build gets the version from git, unless these variables are set.
    git init -q .
    export KUBE_GIT_VERSION="v$version" KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20
    export KUBE_GIT_TREE_STATE=archive KUBE_GIT_COMMIT=0000
    export GOPATH="$work/go" GO111MODULE=off GOCACHE="$work/gocache" GOFLAGS=
    make WHAT="${components[*]/#/cmd/}" GOLDFLAGS="-s -w"
    rm -rf "$built.new"
    mkdir "$built.new"
    cp -L "${components[@]/#/_output/bin/}" "$built.new/"
    rm -rf "$built"
    mv "$built.new" "$built"
}

# build [all]
build() {
    if in_directory "$built"; then return; fi
    if [ -n "$unsuitable" ]; then say "$unsuitable"; fi
    need_debian_12 "build ${components[*]} $version" \
        "put ${components[*]}${1:+ $required} on PATH"
    "$here/../deps.sh" kubernetes >&2
    make_work_dir kubernetes-build
    local log=$CACHE/kubernetes-build.log
    say "building ${components[*]} $version, once (log: $log)"
    logged "$log" "build ${components[*]}; put them on PATH" compile
}

locked kubernetes build "$@"
have_version "$built" "$version" ||
    fail "$built has $found, not $version; remove this directory, and run the command again"
echo "$built"
