#!/usr/bin/env bash
# Builds static programs of arm64 on x86-64, with Rust and the C compiler of Debian sid: the
# installed toolchain has no standard library of arm64.
#   hack/offline/cross.sh DIR      writes kube-lxcfs, pod (hack/pod.rs) and reader
#                                  (tests/it/reader.rs) to DIR
#   hack/offline/cross.sh --print-root      only makes the root file system, and prints its path
set -euo pipefail
cd "$(dirname "$0")/../.."
. hack/offline/lib.sh

[ $# = 1 ] || fail "usage: hack/offline/cross.sh DIR"
# Raise it when the content changes.
root="$CACHE/cross-root-1"
target=aarch64-unknown-linux-gnu
cargo_home=${CARGO_HOME:-$HOME/.cargo}
root_log="$CACHE/cross-root.log"
# With the linker's warnings about functions of a static libc.
log="$CACHE/cross.log"

make_root() {
    local packages=rustc,cargo,gcc,libc6-dev,protobuf-compiler
    # libstd-rust-dev of arm64 has the version of rustc: its packages are installed side by side.
    packages+=,libstd-rust-dev:arm64,gcc-aarch64-linux-gnu,libc6-dev-arm64-cross
    mmdebstrap --quiet --variant=minbase --architectures=amd64,arm64 --include="$packages" \
        --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
        --aptopt='Acquire::Check-Valid-Until "false"' sid "$work/root" "$mirror"
    mkdir "$work/root"/{src,target,cargo,out}
    mv "$work/root" "$root"
}

build_root() {
    [ ! -d "$root" ] || return 0
    mirror=$(debian_mirror "make a root file system")
    make_work_dir cross
    say "making a root file system with Rust for arm64, once (log: $root_log)"
    logged "$root_log" "make a root file system with Rust for arm64" make_root
}

# compile: in a mount namespace, which ends with it.
compile() {
    cat <<'PROGRAM'
set -eu
for mount in "$PWD src" "$2 target" "$3 cargo" "$4 out"; do
    mount --bind "${mount% *}" "$1/${mount##* }"
done
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
exec chroot "$1" sh -c '
    set -eu
    cd /src
    cargo build --quiet --offline --locked --release --target "$1" --bin kube-lxcfs --example pod
    cd "/target/$1/release"
    cp kube-lxcfs examples/pod /out/
    rustc --edition 2024 -O --target "$1" -C "linker=$2" -C target-feature=+crt-static \
        -o /out/reader /src/tests/it/reader.rs
' sh "$5" "$6"
PROGRAM
}

build() {
    local linker=aarch64-linux-gnu-gcc
    mkdir -p "$CACHE/cross-target"
    # With the registry's configuration of this machine. The flags are those of the Dockerfile.
    cargo fetch --quiet --locked --target "$target"
    env CARGO_HOME=/cargo CARGO_TARGET_DIR=/target \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$linker \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
        unshare --mount --propagation private bash -c "$(compile)" compile \
        "$root" "$CACHE/cross-target" "$cargo_home" "$1" "$target" "$linker"
}

need_root "making a root file system"
hack/deps.sh vm
locked cross-root build_root
if [ "$1" = --print-root ]; then
    echo "$root"
    exit
fi
say "building kube-lxcfs for arm64 (log: $log)"
locked cross logged "$log" "build kube-lxcfs for arm64" build "$(cd "$1" && pwd)"
