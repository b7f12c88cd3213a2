#!/usr/bin/env bash
# Runs the scenarios of hack/vm/guest in virtual machines, one for each cell, and prints a table.
#   hack/vm/run.sh [--write] [CELL...]      default: all
# With --write, the rows of these cells in docs/compatibility.md are replaced, and the note below.
# The status is 1 if a scenario has failed. A cell's whole output is in $CACHE/vm/CELL.log.
set -euo pipefail
cd "$(dirname "$0")/../.."
. hack/vm/lib.sh

# Name, Debian releases of the root, of the kernel and of lxcfs, the runtime, and the sets of
# scenarios: see the end of guest/scenarios.sh. The machine of the cell arm64 is one of arm64, and
# that of selinux has SELinux instead of AppArmor.
cells="
kernel-6.12     trixie    trixie      sid       runc    all
kernel-6.1      trixie    bookworm    sid       runc    all
sid             sid       sid         sid       runc    all
lxcfs-6         trixie    trixie      trixie    runc    begin values kinds end
crun            trixie    trixie      sid       crun    begin values kinds end
lxcfs.service   trixie    trixie      sid       runc    host
images          trixie    trixie      sid       runc    begin images end
selinux         trixie    trixie      sid       runc    selinux begin selinux-end
gvisor          trixie    trixie      sid       runc    begin gvisor end
kernel-5.10     trixie    bullseye    sid       runc    all
arm64           trixie    trixie      sid       runc    begin values kinds failures images end
"

names() { awk 'NF { print $1 }' <<<"$cells"; }

# make_programs DIR SETS: kube-lxcfs, pod and reader, and the images for sets that run them.
make_programs() {
    if [ "$arch" = arm64 ]; then
        hack/offline/cross.sh "$1"
        hack/offline/build-image.sh kube-lxcfs:vm "$1/images" arm64
        return
    fi
    say "building kube-lxcfs"
    cargo build --quiet --locked --release --bin kube-lxcfs --example pod
    cp target/release/kube-lxcfs target/release/examples/pod "$1/"
    case " $2 " in
    *" images "*) hack/offline/build-image.sh kube-lxcfs:vm "$1/images" ;;
    esac
    rustc --edition 2024 -O -C target-feature=+crt-static -o "$1/reader" tests/it/reader.rs
}

# make_payload DIR ROOT LXCFS RUNTIME SETS: writes the directory that the machine has at /payload.
make_payload() {
    local lxcfs
    make_programs "$1" "$5"
    cp hack/vm/guest/* "$1/"
    cp -r manifests/systemd charts/kube-lxcfs/profiles/{apparmor-agent,seccomp-agent.json} "$1/"
    mv "$1/scenarios.sh" "$1/run"
    chmod +x "$1/run"
    cp "$(hack/offline/busybox-image.sh "$arch")" "$1/busybox-image.tar"
    printf 'cell_runtime=%s\ncell_sets="%s"\n' "$4" "$5" >"$1/cell.sh"
    [ "$2" != "$3" ] || return 0
    # Of another release than the root: the program and its library.
    lxcfs=$(hack/offline/debian.sh "$3:$arch" lxcfs)
    mkdir "$1/lxcfs"
    (cd "$lxcfs" && cp --parents usr/bin/lxcfs usr/lib/*/lxcfs/liblxcfs.so "$1/lxcfs/")
}

run_cell() {
    local name root kernel lxcfs runtime sets started=$SECONDS status=0
    read -r name root kernel lxcfs runtime sets < <(awk -v name="$1" '$1 == name' <<<"$cells")
    if [ "$name" = arm64 ]; then export VM_ARCH=arm64 arch=arm64; fi
    if [ "$name" = selinux ]; then export VM_LSM=selinux; fi
    make_work_dir vm-payload
    make_payload "$work" "$root" "$lxcfs" "$runtime" "$sets"
    say "cell $name (log: $vm/$name.log)"
    hack/vm/boot.sh "$root" "$kernel" "$work" >"$vm/$name.log" 2>&1 || status=$?
    sed -n "s/^result\t/$name\t/p" "$vm/$name.log" >>"$table"
    # A machine that ends early is a failure without a result.
    if [ $status != 0 ] && ! grep -q $'^result\t.*\tfailed\t' "$vm/$name.log"; then
        printf '%s\t%s\t%s\t%s\n' "$name" boot failed "$(tail -n 1 "$vm/$name.log")" >>"$table"
    fi
    say "cell $name: $(((SECONDS - started + 59) / 60)) min"
}

need_root "making a root file system"
write=
if [ "${1-}" = --write ]; then
    write=1
    shift
fi
chosen=("$@")
[ $# -gt 0 ] || mapfile -t chosen < <(names)
for name in "${chosen[@]}"; do
    names | grep -qx "$name" || fail "unknown cell '$name'; valid: $(names | xargs)"
done
hack/deps.sh build vm
mkdir -p "$vm"
table=$vm/table
: >"$table"
for name in "${chosen[@]}"; do (run_cell "$name"); done
echo "cell | scenario | result"
echo "--- | --- | ---"
awk -F '\t' '{ print $1 " | " $2 " | " $3 ($4 == "" ? "" : ": " $4) }' "$table"
if [ -n "$write" ]; then hack/vm/page.py docs/compatibility.md "$table" <<<"$cells"; fi
! grep -q $'\tfailed\t' "$table"
