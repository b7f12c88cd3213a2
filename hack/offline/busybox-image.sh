#!/usr/bin/env bash
# Makes the image of test pods, once, and prints its path: a docker-archive for
# `ctr images import`. It holds the installed busybox, and free, uptime and nproc if installed.
#   hack/offline/busybox-image.sh [ARCHITECTURE]      of another architecture: only busybox
set -euo pipefail
. "$(dirname "$0")/lib.sh"

native=$(dpkg --print-architecture)
architecture=${1:-$native}
archive="$CACHE/busybox-image-1.tar"
[ "$architecture" = "$native" ] || archive="$CACHE/busybox-image-$architecture-1.tar"

# copy PROGRAM ROOT: copies PROGRAM and its shared libraries.
copy() {
    local program lib
    program=$(command -v "$1")
    install -D "$program" "$2/usr/bin/$1"
    while read -r lib; do
        install -D "$lib" "$2$lib"
    done < <(ldd "$program" | grep -o '/[^ ]*')
}

make_root() {
    local applet program
    mkdir -p "$1"/{bin,proc,sys,dev,tmp,etc,run}
    install "$(busybox_path "$architecture")" "$1/bin/busybox"
    for applet in $(busybox --list); do
        [ -e "$1/bin/$applet" ] || ln -s busybox "$1/bin/$applet"
    done
    [ "$architecture" = "$native" ] || return 0
    for program in free uptime nproc; do
        if have "$program"; then copy "$program" "$1"; fi
    done
}

build() {
    [ ! -f "$archive" ] || return 0
    have busybox || fail "busybox not found; run hack/deps.sh demo to install it"
    make_work_dir image
    make_root "$work/root"
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$work/root" \
        -cf "$work/layer.tar" .
    local digest
    digest=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
    cat >"$work/config.json" <<JSON
{"architecture": "$architecture", "os": "linux",
 "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sleep", "1000000"]},
 "rootfs": {"type": "layers", "diff_ids": ["sha256:$digest"]}}
JSON
    cat >"$work/manifest.json" <<JSON
[{"Config": "config.json", "RepoTags": ["$BUSYBOX_IMAGE"], "Layers": ["layer.tar"]}]
JSON
    tar -C "$work" -cf "$work/image.tar" manifest.json config.json layer.tar
    mv "$work/image.tar" "$archive"
}

locked image build
echo "$archive"
