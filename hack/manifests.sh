#!/usr/bin/env bash
# Renders manifests/install.yaml from the chart. With --check, fails if the file is out of date.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/lib.sh

PATH="$(hack/offline/helm.sh):$PATH"
# Rendered for 1.29: earlier servers refuse the field appArmorProfile, and later ones still take the
# annotation instead.
render() {
    cat <<'YAML'
# Rendered from charts/kube-lxcfs by make manifests. kustomization.yaml sets the images.
---
apiVersion: v1
kind: Namespace
metadata:
  name: kube-lxcfs
  labels:
    app.kubernetes.io/name: kube-lxcfs
    app.kubernetes.io/instance: kube-lxcfs
    # The pods enter other pods' namespaces: Pod Security must allow that here.
    pod-security.kubernetes.io/enforce: privileged
    pod-security.kubernetes.io/audit: privileged
    pod-security.kubernetes.io/warn: privileged
YAML
    helm template kube-lxcfs charts/kube-lxcfs --namespace kube-lxcfs --kube-version 1.29.0 \
        --skip-tests
}
if [ "${1-}" = --check ]; then
    render | diff -u manifests/install.yaml - >&2 ||
        fail "manifests/install.yaml is out of date; run make manifests"
else
    render >manifests/install.yaml
fi
