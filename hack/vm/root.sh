#!/usr/bin/env bash
# Makes the root file system of virtual machines, once, and prints its path: an ext4 image of a
# Debian release with systemd, AppArmor, SELinux, containerd, podman, runc, crun, gVisor and lxcfs.
# A unit runs the payload, see boot.sh.
#   hack/vm/root.sh RELEASE
set -euo pipefail
. "$(dirname "$0")/lib.sh"

[ $# = 1 ] || fail "usage: hack/vm/root.sh RELEASE"
release=$1
# Raise it when the content changes.
version=5
packages=systemd-sysv,dbus,udev,apparmor,containerd,runc,crun,lxcfs,fuse3,busybox-static,procps
packages+=,kmod,iproute2,jq,podman,runsc,containernetworking-plugins,selinux-policy-default
packages+=,policycoreutils
root="$vm/root-$release$arch_suffix-$version.ext4"
log="$vm/root-$release$arch_suffix.log"

# unit: the service that runs the payload, and switches the machine off when it has ended.
unit() {
    cat <<'UNIT'
[Unit]
Description=Run the payload
After=systemd-user-sessions.service apparmor.service dbus.service

[Service]
ExecStart=/usr/local/sbin/run-payload
StandardOutput=journal+console
TimeoutStopSec=10

[Install]
WantedBy=multi-user.target
UNIT
}

# run_payload: its program. The port that the kernel's command line names has the output, and last
# the exit status.
run_payload() {
    cat <<'PROGRAM'
#!/bin/bash
port=$(grep -o ' output=[^ ]*' /proc/cmdline | cut -d= -f2)
until [ -c "/dev/${port:=ttyS1}" ]; do sleep 0.5; done
exec >"/dev/$port" 2>&1 </dev/null
mkdir -p /payload
mount -o ro /dev/disk/by-label/payload /payload
cd /root
HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /payload/run
echo "exit status: $?"
# Not in order: containers ignore SIGTERM, and nothing is kept.
sync
systemctl poweroff --force --force
PROGRAM
}

make_root() {
    local dir=$work/root service
    debian --variant=minbase --include="$packages" "$release" "$dir"
    echo '127.0.0.1 localhost vm' >"$dir/etc/hosts"
    echo vm >"$dir/etc/hostname"
    mkdir -p "$dir/usr/lib/modules"
    unit >"$dir/etc/systemd/system/payload.service"
    install -m 755 <(run_payload) "$dir/usr/local/sbin/run-payload"
    # The payload starts what it tests. Timers would only take time.
    for service in lxcfs.service containerd.service apt-daily.timer apt-daily-upgrade.timer \
        dpkg-db-backup.timer fstrim.timer; do
        foreign "$arch" chroot "$dir" systemctl --quiet disable "$service" || true
    done
    foreign "$arch" chroot "$dir" systemctl --quiet enable payload.service
    # As the SELinux policy has them; with AppArmor they have no effect.
    foreign "$arch" chroot "$dir" setfiles -F /etc/selinux/default/contexts/files/file_contexts /
    rm -rf "$dir"/var/cache/apt "$dir"/var/lib/apt/lists "$dir"/usr/share/{doc,man,locale}
    image "$dir" "$root" 2048 root
}

build() {
    [ ! -f "$root" ] || return 0
    mkdir -p "$vm"
    make_work_dir vm-root
    say "making a root file system of Debian $release for $arch, once (log: $log)"
    logged "$log" "make a root file system of Debian $release" make_root
}

"$(dirname "$0")/../deps.sh" "$dependencies"
locked "vm-root-$release$arch_suffix" build
echo "$root"
