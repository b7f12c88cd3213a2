#!/usr/bin/env bash
# Renders manifests/install.yaml from the chart. With --check, fails if the file is out of date.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

PATH="$(hack/offline/helm.sh):$PATH"
render() {
    echo "# Rendered from charts/kube-lxcfs by make manifests, for Kubernetes 1.30 and later."
    echo "# Needs the namespace kube-lxcfs."
    helm template kube-lxcfs charts/kube-lxcfs --namespace kube-lxcfs --kube-version 1.30.0 \
        --skip-tests
}
if [ "${1-}" = --check ]; then
    render | diff -u manifests/install.yaml - >&2 ||
        fail "manifests/install.yaml is out of date; run make manifests"
else
    render >manifests/install.yaml
fi
