#!/usr/bin/env bash
# Makes the Dockerfile's base images from this machine's package mirror and toolchain, under their real names, for a machine
# that reaches no container registry. They land in buildah's storage in the cache.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

export STORAGE_DRIVER=vfs
storage=(--root "$CACHE/images/root" --runroot "$CACHE/images/run")

there() { buildah "${storage[@]}" images --quiet "$1" >/dev/null 2>&1; }

make_bases() {
    local uri work container toolchain
    work=$(mktemp -d "$CACHE/bases.XXXXXX")
    # shellcheck disable=SC2064 # this folder, now
    trap "rm -rf '$work'" EXIT
    # shellcheck disable=SC2016 # apt's own variables
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | grep '/debian/$' | head -1)
    [ -n "$uri" ] || fail "base images are made from a Debian mirror, and this machine's apt knows none"
    if ! there debian:trixie-slim; then
        say "making debian:trixie-slim from the package mirror"
        mmdebstrap --quiet --variant=minbase --include=ca-certificates trixie "$work/slim.tar" "$uri"
        container=$(buildah "${storage[@]}" from scratch)
        buildah "${storage[@]}" add --quiet "$container" "$work/slim.tar" / >/dev/null
        buildah "${storage[@]}" commit --quiet --rm "$container" docker.io/library/debian:trixie-slim >/dev/null
    fi
    if ! there rust:1-trixie; then
        say "making rust:1-trixie from the package mirror and this machine's toolchain"
        mmdebstrap --quiet --variant=minbase --include=ca-certificates,build-essential,protobuf-compiler trixie "$work/build.tar" "$uri"
        toolchain=$(rustc --print sysroot)
        mkdir -p "$work/toolchain" "$work/certs"
        cp -a "$toolchain/bin" "$toolchain/lib" "$toolchain/libexec" "$work/toolchain/"
        # This machine's registry is reached as this machine reaches it.
        cp -L /etc/ssl/certs/ca-certificates.crt "$work/certs/"
        container=$(buildah "${storage[@]}" from scratch)
        buildah "${storage[@]}" add --quiet "$container" "$work/build.tar" / >/dev/null
        buildah "${storage[@]}" add --quiet "$container" "$work/toolchain" /usr/local >/dev/null
        buildah "${storage[@]}" add --quiet "$container" "$work/certs" /etc/ssl/certs >/dev/null
        if [ -d "${CARGO_HOME:-$HOME/.cargo}/registry" ]; then
            buildah "${storage[@]}" add --quiet "$container" "${CARGO_HOME:-$HOME/.cargo}/registry" /usr/local/cargo/registry >/dev/null
        fi
        buildah "${storage[@]}" config --env CARGO_HOME=/usr/local/cargo --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$container"
        buildah "${storage[@]}" commit --quiet --rm "$container" docker.io/library/rust:1-trixie >/dev/null
    fi
}

"$(dirname "$0")/deps.sh" image
locked bases make_bases
