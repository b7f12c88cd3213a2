#!/usr/bin/env bash
# Renders manifests/install.yaml from the chart; with --check it fails when that is out of date.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

PATH="$(hack/helm.sh):$PATH"
render() {
    echo "# Rendered from charts/kube-lxcfs by make manifests: kubectl create namespace kube-lxcfs, then apply it."
    helm template kube-lxcfs charts/kube-lxcfs --namespace kube-lxcfs --kube-version 1.30.0 --skip-tests
}
if [ "${1-}" = --check ]; then
    render | diff -u manifests/install.yaml - >&2 || fail "manifests/install.yaml is out of date: make manifests"
else
    render >manifests/install.yaml
fi
