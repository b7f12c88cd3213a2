#!/usr/bin/env bash
# Unpacks the kernel for virtual machines of a Debian release, once, and prints its directory. It
# has vmlinuz, an initrd that mounts the disks of boot.sh, and modules.ext4.
#   hack/vm/kernel.sh RELEASE
set -euo pipefail
. "$(dirname "$0")/lib.sh"

[ $# = 1 ] || fail "usage: hack/vm/kernel.sh RELEASE"
release=$1
kernel="$vm/kernel-$release$arch_suffix-1"
log="$vm/kernel-$release$arch_suffix.log"

# init: the first program. Root is the first disk, and modules are on the second one.
init() {
    cat <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "/modules/$module"; done </modules/order
while [ ! -b /dev/vdb ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount -t ext4 -o ro /dev/vdb /root/usr/lib/modules
/bin/busybox umount /dev
exec /bin/busybox switch_root /root /sbin/init
INIT
}

# make_initrd MODULES VERSION: with the drivers of the disks, and what these need, in order.
make_initrd() {
    local initrd=$work/initrd driver path name
    mkdir -p "$initrd"/{bin,dev,root,modules}
    install "$(busybox_path "$arch")" "$initrd/bin/busybox"
    install -m 755 <(init) "$initrd/init"
    for driver in virtio_pci virtio_blk ext4; do
        modprobe --dirname "$1" --set-version "$2" --show-depends "$driver"
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' >"$work/modules"
    while read -r path; do
        name=$(basename "$path")
        case $path in
        *.xz) xz -dc "$path" >"$initrd/modules/${name%.xz}" ;;
        *) cp "$path" "$initrd/modules/$name" ;;
        esac
        echo "${name%.xz}"
    done <"$work/modules" >"$initrd/modules/order"
    (cd "$initrd" && find . | cpio --quiet -o -H newc | gzip -1) >"$work/out/initrd"
}

make_kernel() {
    local tree=$work/tree version
    # With what it depends on; nothing is configured.
    debian --variant=extract --include="linux-image-cloud-$arch" "$release" "$tree"
    mkdir -p "$work/out" "$work/base/lib"
    # Releases differ in where the modules are, and newer ones have vmlinuz beside them.
    mv "$(find "$tree" -maxdepth 4 -type d -path '*lib/modules' | head -n 1)" "$work/base/lib/"
    version=$(basename "$(echo "$work"/base/lib/modules/*)")
    cp "$(find "$tree/boot" "$work/base" -name 'vmlinuz*' -type f | head -n 1)" "$work/out/vmlinuz"
    depmod --basedir "$work/base" "$version"
    make_initrd "$work/base" "$version"
    image "$work/base/lib/modules" "$work/out/modules.ext4" 512 modules
    echo "$version" >"$work/out/version"
    rm -rf "$kernel"
    mv "$work/out" "$kernel"
}

build() {
    [ ! -d "$kernel" ] || return 0
    mkdir -p "$vm"
    make_work_dir vm-kernel
    say "unpacking the kernel of Debian $release for $arch, once (log: $log)"
    logged "$log" "unpack the kernel of Debian $release" make_kernel
}

"$(dirname "$0")/../deps.sh" "$dependencies"
locked "vm-kernel-$release$arch_suffix" build
echo "$kernel"
