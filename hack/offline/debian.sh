#!/usr/bin/env bash
# Unpacks packages of another Debian release into the cache, without installing them, and prints
# the directory. Tests use them to run against other versions of containerd and lxcfs.
#   hack/offline/debian.sh RELEASE[:ARCHITECTURE] PACKAGE...
# as in: hack/offline/debian.sh trixie containerd; hack/offline/debian.sh sid:arm64 lxcfs
set -euo pipefail
. "$(dirname "$0")/lib.sh"

[ $# -ge 2 ] || fail "usage: hack/offline/debian.sh RELEASE[:ARCHITECTURE] PACKAGE..."
native=$(dpkg --print-architecture)
release=${1%:*}
architecture=$native
[ "$release" = "$1" ] || architecture=${1#*:}
name=$release
[ "$architecture" = "$native" ] || name+=-$architecture
shift
packages=("$@")
root="$CACHE/debian/$name"
log="$CACHE/debian-$name.log"

complete() {
    local p
    for p in "${packages[@]}"; do [ -e "$root/.have-$p" ] || return 1; done
}

download() {
    local apt p
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$root"
    printf 'deb [signed-by=%s] %s %s main\n' /usr/share/keyrings/debian-archive-keyring.gpg \
        "$mirror" "$release" >"$work/list"
    apt=(-q -o "Dir::Etc::sourcelist=$work/list" -o "Dir::Etc::sourceparts=-"
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache"
        -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture"
        -o "APT::Sandbox::User=root" -o "Acquire::Check-Valid-Until=false")
    cd "$work"
    apt-get "${apt[@]}" update
    apt-get "${apt[@]}" download "${packages[@]}"
    for p in *.deb; do dpkg -x "$p" "$root"; done
    for p in "${packages[@]}"; do touch "$root/.have-$p"; done
}

unpack() {
    if complete; then return; fi
    mirror=$(debian_mirror "download ${packages[*]} of Debian $release")
    make_work_dir debian
    say "downloading ${packages[*]} of Debian $name, once (log: $log)"
    logged "$log" "download ${packages[*]} of Debian $release" download
}

locked "debian-$name" unpack
echo "$root"
