#!/usr/bin/env bash
# Makes, once, the container image of the tests and the demo from this machine's own busybox (and free, uptime and nproc,
# where they are), without a registry, and prints its path on stdout: a docker-archive for `ctr images import`.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

name=localhost/kube-lxcfs/busybox:1
archive="$CACHE/busybox-image-1.tar"

# copy PROGRAM ROOT: with the libraries it is linked to.
copy() {
    local lib
    install -D "$(command -v "$1")" "$2/usr/bin/$1"
    while read -r lib; do
        install -D "$lib" "$2$lib"
    done < <(ldd "$(command -v "$1")" | grep -o '/[^ ]*')
}

digest() { sha256sum "$1" | cut -d' ' -f1; }

build() {
    [ -f "$archive" ] && return
    have busybox || fail "busybox is missing: hack/deps.sh demo installs it"
    local work root applet
    work=$(mktemp -d "$CACHE/image.XXXXXX")
    # shellcheck disable=SC2064 # this folder, now
    trap "rm -rf '$work'" EXIT
    root=$work/root
    mkdir -p "$root"/{bin,proc,sys,dev,tmp,etc,run}
    install "$(command -v busybox)" "$root/bin/busybox"
    for applet in $(busybox --list); do
        [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"
    done
    for applet in free uptime nproc; do
        if have "$applet"; then copy "$applet" "$root"; fi
    done
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$root" -cf "$work/layer.tar" .
    printf '{"architecture":"%s","os":"linux","config":{"Env":["PATH=/usr/bin:/bin"],"Cmd":["/bin/sleep","1000000"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
        "$(dpkg --print-architecture)" "$(digest "$work/layer.tar")" >"$work/config.json"
    printf '[{"Config":"config.json","RepoTags":["%s"],"Layers":["layer.tar"]}]' "$name" >"$work/manifest.json"
    tar -C "$work" -cf "$work/image.tar" manifest.json config.json layer.tar
    mv "$work/image.tar" "$archive"
}

mkdir -p "$CACHE"
locked image build
echo "$archive"
