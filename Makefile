# Every target installs what it needs from the distribution, by the scripts in hack/.
.DEFAULT_GOAL := help
.PHONY: help demo test test-unit e2e chaos fuzz bench programs pictures vm vm-all lint build \
	image manifests

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: ## watch the /proc of a running container change, and change back (root)
	hack/demo.sh

test: ## unit and integration tests, with a real lxcfs, containerd and kube-apiserver (root)
	hack/test.sh

test-unit: ## unit tests only (no root; needs cargo, a C compiler and protoc)
	hack/test.sh --unit

e2e: ## images and chart on a cluster on this machine (root), or on KUBECONFIG's with E2E_IMAGE
	hack/e2e.sh

chaos: ## CHAOS_ROUNDS (200) of random failures; KUBE_LXCFS_SEED repeats a run (root)
	hack/test.sh --test it -- --nocapture chaos

fuzz: ## each fuzz target for FUZZ_SECONDS (default 30; needs a nightly toolchain)
	hack/fuzz.sh

bench: ## all benchmarks, or only BENCH, the name of a file in benches/ (root)
	hack/test.sh --bench $(BENCH)

programs: ## run programs without and with a view; updates docs/programs.md (root)
	hack/programs.sh --write

pictures: ## docs/images: from their texts, and a recording of the demo (root)
	hack/picture.py
	hack/record.py docs/images/demo.svg \
		unshare --mount --pid --fork --kill-child --mount-proc hack/demo.sh

vm: ## scenarios in a virtual machine: CELL (kernel-6.12) of hack/vm/run.sh (root)
	hack/vm/run.sh $(or $(CELL),kernel-6.12)

vm-all: ## every cell, one after the other; updates docs/compatibility.md (root)
	hack/vm/run.sh --write

lint: ## rustfmt, clippy, fuzz crate, layers, dependencies, scripts, documents, chart, manifests
	hack/lint.sh

build: ## target/release/kube-lxcfs
	hack/deps.sh build
	cargo build --locked --release

image: ## the container images of agent and lxcfs, with docker, podman or buildah
	hack/build-image.sh

manifests: ## manifests/install.yaml, rendered from the chart
	hack/manifests.sh
