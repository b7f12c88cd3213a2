#!/usr/bin/env bash
# Boots a virtual machine, and runs the program `run` of a directory in it, as root. The directory
# is at /payload there. Prints what the program prints, and exits with its status.
#   hack/vm/boot.sh ROOT KERNEL DIR      ROOT, KERNEL: Debian releases, as in: trixie bookworm
# With VM_ARCH=arm64, the machine is one of arm64; with VM_LSM=selinux, it has SELinux, permissive.
# The console is in console.log of the cache. Nothing that the machine writes is kept.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

[ $# = 3 ] || fail "usage: hack/vm/boot.sh ROOT KERNEL DIR"
payload=$3
# Without KVM a program runs about ten times slower.
limit=${VM_TIMEOUT:-45m}
root=$("$(dirname "$0")/root.sh" "$1")
kernel=$("$(dirname "$0")/kernel.sh" "$2")

# One machine at a time: the console's log is shared, and so are this machine's CPUs.
exec 8>"$vm/boot.lock"
flock 8
make_work_dir vm-run
image "$payload" "$work/payload.ext4" $(($(du -sm "$payload" | cut -f1) * 5 / 4 + 16)) payload

output="file:$work/output"
case $arch in
amd64)
    qemu=(qemu-system-x86_64 -cpu max -serial "file:$vm/console.log" -serial "$output")
    append='console=ttyS0'
    ;;
arm64)
    # The machine has one serial port only.
    qemu=(qemu-system-aarch64 -M virt -cpu cortex-a72 -serial "file:$vm/console.log"
        -device virtio-serial-pci -chardev "file,id=output,path=$work/output"
        -device "virtserialport,chardev=output")
    append='console=ttyAMA0 output=vport0p1'
    ;;
esac

# boot: prints the payload's output as it comes, without the carriage returns of the serial port.
boot() {
    local printer status=0
    : >"$work/output"
    # A kernel panic ends the machine.
    TMPDIR=$work timeout "$limit" nice -n 10 "${qemu[@]}" -accel tcg,thread=multi \
        -smp 2 -m 2048 -no-reboot -nic none -display none -monitor none \
        -kernel "$kernel/vmlinuz" -initrd "$kernel/initrd" \
        -append "$append ${VM_LSM:+security=$VM_LSM }rw psi=1 panic=-1 systemd.show_status=0" \
        -drive "file=$root,if=virtio,format=raw,snapshot=on" \
        -drive "file=$kernel/modules.ext4,if=virtio,format=raw,snapshot=on" \
        -drive "file=$work/payload.ext4,if=virtio,format=raw,snapshot=on" 8>&- &
    machine=$!
    trap 'kill $machine 2>/dev/null || true; rm -rf "$work"' EXIT
    tail -s 0.5 --pid=$machine -n +1 -f "$work/output" | sed -u 's/\r$//' | tee "$work/plain" &
    printer=$!
    wait $machine || status=$?
    wait $printer || true
    [ $status = 0 ] || fail "the virtual machine failed or took over $limit (log: $vm/console.log)"
}

# Under emulation a kernel panics now and then at its start, before anything is tested.
for _ in 1 2 3; do
    boot
    [ ! -s "$work/plain" ] || break
    say "the virtual machine has not started the payload (log: $vm/console.log)"
done
status=$(sed -n 's/^exit status: //p' "$work/plain" | tail -n 1)
[ -n "$status" ] || fail "the payload has not ended (log: $vm/console.log)"
exit "$status"
