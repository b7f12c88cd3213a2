# The front door. Each target does its own set-up through hack/, on Debian and Ubuntu.
.PHONY: demo test e2e chaos fuzz lint build image manifests bench help

help:
	@echo "make demo   see a running container's /proc change, and back"
	@echo "make test   all tests, against a real lxcfs, containerd, kube-apiserver and this kernel (root)"
	@echo "make e2e    the image and the chart on a whole cluster of its own (root)"
	@echo "make chaos  of the tests only the 200 rounds of random deaths (KUBE_LXCFS_SEED repeats one)"
	@echo "make fuzz   a bounded run of each fuzz target (needs a nightly toolchain; FUZZ_SECONDS each)"
	@echo "make lint   rustfmt, clippy, cargo deny, shellcheck"
	@echo "make build  target/release/kube-lxcfs"
	@echo "make image  the container image, with docker, podman or buildah"
	@echo "make manifests   manifests/install.yaml from the chart"
	@echo "make bench  what the mount driver costs beside the bare system calls (root)"

build:
	hack/deps.sh build
	cargo build --locked --release

demo:
	hack/demo.sh

test:
	hack/test.sh

e2e:
	hack/e2e.sh

image:
	hack/build-image.sh

manifests:
	hack/manifests.sh

chaos:
	hack/test.sh --test it -- --nocapture restart::whatever_dies

fuzz:
	hack/fuzz.sh

lint:
	hack/lint.sh

bench:
	hack/deps.sh build demo
	cargo bench --locked
