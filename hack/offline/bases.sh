#!/usr/bin/env bash
# Makes the base images of the Dockerfile, under their real names, from a Debian mirror and the
# installed Rust toolchain. The images are kept in buildah's storage in the cache.
#   hack/offline/bases.sh [ARCHITECTURE]      prints the build arguments that name them, one word a
#                                             line; those of another architecture are localhost/...
set -euo pipefail
here=$(dirname "$0")
. "$here/lib.sh"

architecture=${1:-$(dpkg --print-architecture)}
if [ "$architecture" = "$(dpkg --print-architecture)" ]; then
    debian_image=docker.io/library/debian:trixie-slim
    rust_image=docker.io/library/rust:1-trixie
else
    debian_image=localhost/debian-$architecture:trixie-slim
    rust_image=localhost/rust-$architecture:sid
fi

use_images "$architecture"

exists() { buildah_ images --quiet "$1" >/dev/null 2>&1; }

# debootstrap TAR PACKAGE...: a minimal Debian with PACKAGE....
debootstrap() {
    local packages
    packages=$(IFS=, && echo "${*:2}")
    # A user namespace cannot make device nodes.
    foreign "$architecture" mmdebstrap --quiet --variant=minbase --include="$packages" \
        --skip=output/dev --architectures="$architecture" trixie "$1" "$mirror"
}

make_debian() {
    local container
    say "making $debian_image from the package mirror"
    debootstrap "$work/slim.tar" ca-certificates
    container=$(buildah_ from scratch)
    buildah_ add --quiet "$container" "$work/slim.tar" / >/dev/null
    buildah_ config --arch "$architecture" "$container"
    buildah_ commit --quiet --rm "$container" "$debian_image" >/dev/null
}

make_rust() {
    local container toolchain registry=${CARGO_HOME:-$HOME/.cargo}/registry
    say "making $rust_image from the package mirror"
    container=$(buildah_ from scratch)
    if [ "$rust_image" = docker.io/library/rust:1-trixie ]; then
        debootstrap "$work/build.tar" ca-certificates build-essential protobuf-compiler
        buildah_ add --quiet "$container" "$work/build.tar" / >/dev/null
        toolchain=$(rustc --print sysroot)
        mkdir -p "$work/toolchain"
        cp -a "$toolchain/bin" "$toolchain/lib" "$toolchain/libexec" "$work/toolchain/"
        buildah_ add --quiet "$container" "$work/toolchain" /usr/local >/dev/null
    else
        # The installed toolchain has no standard library of another architecture.
        tar -C "$("$here/cross.sh" --print-root)" --exclude './dev/*' -cf "$work/build.tar" .
        buildah_ add --quiet "$container" "$work/build.tar" / >/dev/null
    fi
    # The container trusts the same certificates as this machine.
    mkdir -p "$work/certs"
    cp -L /etc/ssl/certs/ca-certificates.crt "$work/certs/"
    buildah_ add --quiet "$container" "$work/certs" /etc/ssl/certs >/dev/null
    if [ -d "$registry" ]; then
        buildah_ add --quiet "$container" "$registry" /usr/local/cargo/registry >/dev/null
    fi
    # buildah before 1.29 takes no base image of another architecture than that of the build: see
    # --platform in the Dockerfile.
    buildah_ config --arch "$architecture" --env CARGO_HOME=/usr/local/cargo \
        --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$container"
    buildah_ commit --quiet --rm "$container" "$rust_image" >/dev/null
}

make_bases() {
    if exists "$debian_image" && exists "$rust_image"; then return; fi
    mirror=$(debian_mirror "make base images")
    make_work_dir bases
    exists "$debian_image" || make_debian
    exists "$rust_image" || make_rust
}

"$here/../deps.sh" image
locked bases make_bases
printf '%s\n' --build-arg "DEBIAN_IMAGE=$debian_image" --build-arg "RUST_IMAGE=$rust_image"
