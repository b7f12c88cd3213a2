#!/usr/bin/env bash
# Makes the base images of the Dockerfile, under their real names, from a Debian mirror and the
# installed Rust toolchain. The images are kept in buildah's storage in the cache.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

exists() { buildah_ images --quiet "$1" >/dev/null 2>&1; }

# debootstrap TAR PACKAGE...: a minimal Debian with PACKAGE....
debootstrap() {
    local packages
    packages=$(IFS=, && echo "${*:2}")
    mmdebstrap --quiet --variant=minbase --include="$packages" trixie "$1" "$mirror"
}

make_debian() {
    local container
    say "making debian:trixie-slim from the package mirror"
    debootstrap "$work/slim.tar" ca-certificates
    container=$(buildah_ from scratch)
    buildah_ add --quiet "$container" "$work/slim.tar" / >/dev/null
    buildah_ commit --quiet --rm "$container" docker.io/library/debian:trixie-slim >/dev/null
}

make_rust() {
    local container toolchain registry=${CARGO_HOME:-$HOME/.cargo}/registry
    say "making rust:1-trixie from the package mirror and the installed toolchain"
    debootstrap "$work/build.tar" ca-certificates build-essential protobuf-compiler
    toolchain=$(rustc --print sysroot)
    mkdir -p "$work/toolchain" "$work/certs"
    cp -a "$toolchain/bin" "$toolchain/lib" "$toolchain/libexec" "$work/toolchain/"
    # The container trusts the same certificates as this machine.
    cp -L /etc/ssl/certs/ca-certificates.crt "$work/certs/"
    container=$(buildah_ from scratch)
    buildah_ add --quiet "$container" "$work/build.tar" / >/dev/null
    buildah_ add --quiet "$container" "$work/toolchain" /usr/local >/dev/null
    buildah_ add --quiet "$container" "$work/certs" /etc/ssl/certs >/dev/null
    if [ -d "$registry" ]; then
        buildah_ add --quiet "$container" "$registry" /usr/local/cargo/registry >/dev/null
    fi
    buildah_ config --env CARGO_HOME=/usr/local/cargo \
        --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$container"
    buildah_ commit --quiet --rm "$container" docker.io/library/rust:1-trixie >/dev/null
}

make_bases() {
    if exists debian:trixie-slim && exists rust:1-trixie; then return; fi
    mirror=$(debian_mirror "make base images")
    make_work_dir bases
    exists debian:trixie-slim || make_debian
    exists rust:1-trixie || make_rust
}

"$(dirname "$0")/../deps.sh" image
locked bases make_bases
