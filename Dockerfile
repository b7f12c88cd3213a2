# Two images, one for each command: `agent` has the program only, `lxcfs` has lxcfs too. `make image`
# builds both.
# With their registry: podman resolves no short names.
ARG RUST_IMAGE=docker.io/library/rust:1-trixie
ARG DEBIAN_IMAGE=docker.io/library/debian:trixie-slim

# The build runs on this machine's architecture, and compiles for that of the image.
FROM --platform=$BUILDPLATFORM ${RUST_IMAGE} AS build
ARG TARGETARCH
RUN case $TARGETARCH in \
        amd64) cpu=x86_64 ;; \
        arm64) cpu=aarch64 ;; \
        # Of a builder without this argument.
        "") cpu=$(uname -m) ;; \
        *) echo "unknown architecture '$TARGETARCH'; valid: amd64 arm64" >&2; exit 1 ;; \
    esac \
    && echo "$cpu-unknown-linux-gnu" >/etc/rust-target \
    && packages=$(command -v protoc >/dev/null || echo protobuf-compiler) \
    && if [ "$cpu" != "$(uname -m)" ] && ! command -v "$cpu-linux-gnu-gcc" >/dev/null; then \
        packages="$packages gcc-$(echo $cpu | tr _ -)-linux-gnu libc6-dev-$TARGETARCH-cross"; \
        rustup target add "$(cat /etc/rust-target)"; \
    fi \
    && if [ -n "$packages" ]; then \
        apt-get update && apt-get install -y --no-install-recommends $packages; \
    fi
WORKDIR /src
COPY . .
ARG REVISION=unknown
ENV KUBE_LXCFS_REVISION=${REVISION}
# A static program. With --target, the flag does not reach procedural macros, which are libraries.
RUN target=$(cat /etc/rust-target) && cpu=${target%%-*} \
    && if [ "$cpu" != "$(uname -m)" ]; then \
        linker=CARGO_TARGET_$(echo "$target" | tr a-z- A-Z_)_LINKER; \
        export "$linker=$cpu-linux-gnu-gcc"; \
    fi \
    && RUSTFLAGS="-C target-feature=+crt-static" \
        cargo build --locked --release --bin kube-lxcfs --target "$target" \
    && cp "target/$target/release/kube-lxcfs" /usr/local/bin/

FROM ${DEBIAN_IMAGE} AS lxcfs
# Exact versions of the packages. lxcfs 7 serves cgroup v2 only, and earlier ones have wrong values
# there. The supervisor runs the one that fits the node.
ARG LXCFS_CGROUP1=6.0.4-1+deb13u1
ARG LXCFS_CGROUP2=7.0.0-1
# The service of the package does not start in a container. The second one is of another release of
# the same mirror, whose index may be old: the version is what counts.
RUN apt-get update \
    && apt-get install -y --no-install-recommends "lxcfs=$LXCFS_CGROUP1" \
    && mirror=$(grep -rhoE 'https?://[^ ]+' /etc/apt/sources.list* | head -n 1) \
    && echo "deb $mirror sid main" >/etc/apt/sources.list.d/sid.list \
    && cd /tmp && apt-get update -o Acquire::Check-Valid-Until=false \
    && apt-get download "lxcfs=$LXCFS_CGROUP2" \
    && dpkg -x lxcfs_*.deb lxcfs && mkdir -p /usr/lib/kube-lxcfs/cgroup2 \
    && mv lxcfs/usr/bin/lxcfs lxcfs/usr/lib/*/lxcfs/liblxcfs.so /usr/lib/kube-lxcfs/cgroup2/ \
    && mkdir /usr/lib/kube-lxcfs/cgroup1 && ln -s /usr/bin/lxcfs /usr/lib/kube-lxcfs/cgroup1/ \
    && LD_LIBRARY_PATH=/usr/lib/kube-lxcfs/cgroup2 /usr/lib/kube-lxcfs/cgroup2/lxcfs --version \
    && rm -rf /tmp/lxcfs* /etc/apt/sources.list.d/sid.list \
        /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
COPY --from=build /usr/local/bin/kube-lxcfs /usr/bin/kube-lxcfs
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kube-lxcfs-lxcfs" \
    org.opencontainers.image.description="lxcfs and its supervisor, for kube-lxcfs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["/usr/bin/kube-lxcfs"]
CMD ["--help"]

# No shell and no library.
FROM scratch AS agent
COPY --from=build /usr/local/bin/kube-lxcfs /usr/bin/kube-lxcfs
ENV PATH=/usr/bin
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kube-lxcfs" \
    org.opencontainers.image.description="lxcfs views in running Kubernetes containers" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["/usr/bin/kube-lxcfs"]
CMD ["--help"]
