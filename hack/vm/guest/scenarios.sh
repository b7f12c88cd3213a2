#!/bin/bash
# The scenarios of a cell, in the machine. Prints one line for each: `result`, the name, `passed`,
# `failed` or `known`, and what was seen, separated by tabs. `known` is a gap that the documentation
# names. The status is 1 if one has failed.
set -uo pipefail
# shellcheck source=node.sh
. /payload/node.sh
cell_runtime='' cell_sets=''
# shellcheck source=/dev/null
. /payload/cell.sh

# Whether the node's security module is SELinux; otherwise it is AppArmor.
has_selinux=$(grep -ow security=selinux /proc/cmdline)
failed=0
seen=
known=

# scenario NAME: runs the function NAME. It sets `seen`, and `known` for a known gap.
scenario() {
    local verdict=passed status=0 since
    since=@$(date +%s)
    seen='' known=''
    echo "scenario $1, at $(cut -d' ' -f1 /proc/uptime) s"
    "$1" || status=$?
    if [ $status != 0 ]; then
        verdict=failed
        failed=$((failed + 1))
        journalctl --no-pager -o cat -n 20 --since "$since" -u kube-lxcfs-agent \
            -u kube-lxcfs-lxcfs | cut -c1-200 | sed 's/^/  | /'
    elif [ -n "$known" ]; then
        verdict=known
    fi
    seen=${known:-$seen}
    printf 'result\t%s\t%s\t%s\n' "$1" "$verdict" "${seen//[$'\n\t']/ }"
}

# is WHAT EXPECTED OBSERVED
is() {
    [ "$2" = "$3" ] && return
    seen+="${seen:+; }$1: expected $2, got $3"
    return 1
}

# make_shared DIR: a directory that containers may write to.
make_shared() {
    mkdir -p "$1" || return
    [ -z "$has_selinux" ] || chcon -t container_file_t "$1"
}

kernel_at_least() { printf '%s\n%s\n' "$1" "$(uname -r)" | sort -CV; }
lxcfs_major() { lxcfs --version 2>&1 | grep -o '[0-9]' | head -n 1; }
cgroup_options() { findmnt -n -o OPTIONS -t cgroup2 /sys/fs/cgroup; }
# mount_table NAME: as the container sees it. Without the options of superblocks: runtimes change
# those of cgroup2 for the whole node.
mount_table() { in_pod "$1" cat /proc/self/mountinfo | sed 's/ - \([^ ]*\) .*/ - \1/'; }

# --- readers: containers that read view files all the time --------------------------------------

readers=(reader-0 reader-1 reader-2)
reader_mib=77
read_files=(/proc/cpuinfo /proc/diskstats /proc/loadavg /proc/meminfo /proc/stat /proc/swaps
    /proc/uptime /sys/devices/system/cpu/online)

run_readers() {
    local name
    make_shared /run/readers
    install /payload/reader /run/readers/reader
    for name in "${readers[@]}"; do
        run_pod "$name" --memory $reader_mib --volume /run/readers:/out "$opt_in" -- \
            /out/reader "/out/$name" $((reader_mib << 10)) 20 "${read_files[@]}" || return
    done
}

readers_have() {
    local name
    for name in "${readers[@]}"; do [ -e "/run/readers/$name$1" ] || return 1; done
}

go() {
    local name
    rm -f /run/readers/reader-?.started /run/readers/reader-?.stop /run/readers/reader-?
    for name in "${readers[@]}"; do touch "/run/readers/$name.go"; done
    wait_for 120 readers_have .started
}

# stop: sets own, node and errors to the sums of the readers, and reads to these in words, with the
# time of the last one since `began`.
stop() {
    local name
    for name in "${readers[@]}"; do touch "/run/readers/$name.stop"; done
    wait_for 120 readers_have '' || return
    read -r own node errors reads < <(cat /run/readers/reader-? | awk -v began="$began" '
        function until(count, last) {
            return count " " (count ? sprintf("(until %.1f s)", (last - began) / 1e9) : "")
        }
        {
            own += $1; node += $2; errors += $3
            if ($4 > last_error) last_error = $4
            if ($5 > last_node) last_node = $5
        }
        END {
            print own, node, errors, own " own, of the node " until(node, last_node) \
                ", errors " until(errors, last_error)
        }')
    reads=${reads// ,/,}
}

# all_current: every view file of the readers comes from the serving lxcfs.
all_current() {
    local name all
    all=$(views) || return
    for name in "${readers[@]}"; do
        jq -e --arg id "${container[$name]}" 'any(.[]; .id == $id and (.files | length >= 8) and
            all(.files[]; . == "current"))' <<<"$all" >/dev/null || return
    done
}

# another_lxcfs PID: whether another lxcfs than PID serves, and every view is current.
another_lxcfs() {
    local pid
    pid=$(lxcfs_pid) && [ "$pid" != "$1" ] && is_serving && all_current
}

# while_reading COMMAND...: runs COMMAND while the readers read, and then reads once more.
while_reading() {
    go || return
    began=$(date +%s%N)
    "$@" || { stop; return 1; }
    # Reads after the change count too.
    sleep 2
    stop || return
    seen="reads: $reads"
    local result=("$own" "$node" "$errors")
    go && sleep 1 && stop || return
    is "reads of the node afterwards" 0 "$node" && is "errors afterwards" 0 "$errors" || return
    [ "$own" -gt 0 ] || return
    own=${result[0]} node=${result[1]} errors=${result[2]}
}

# --- scenarios ----------------------------------------------------------------------------------

# What this cell is.
versions() {
    local kernel lxcfs runtime
    kernel=$(uname -r)
    lxcfs=$(lxcfs --version 2>&1 | grep -o '[0-9.]*' | head -n 1)
    # With SELinux in enforcing mode, runc outside of containerd prints nothing.
    runtime=$("$cell_runtime" --version 2>/dev/null) ||
        runtime=$(dpkg-query -W -f '${Version}' "$cell_runtime")
    runtime=$(head -n 1 <<<"$runtime" | grep -o '[0-9][^ ]*' | head -n 1)
    seen="kernel $kernel, systemd $(systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p')"
    seen+=", containerd $(containerd --version | cut -d' ' -f3), $cell_runtime $runtime"
    seen+=", lxcfs $lxcfs"
    is "file system of /sys/fs/cgroup" cgroup2 "$(findmnt -n -o FSTYPE /sys/fs/cgroup)" || return
    [ -n "$has_selinux" ] || is AppArmor Y "$(cat /sys/module/apparmor/parameters/enabled)"
}

# lxcfs starts, and the node's cgroup2 mount keeps its options: lxcfs 6.0.4 changes them, and the
# supervisor restores them.
supervisor_keeps_cgroup_options() {
    local before changed
    before=$(cgroup_options)
    start_supervisor || return
    wait_for 10 cgroup_options_are "$before" || return
    changed=$(journalctl --no-pager -o cat -u kube-lxcfs-lxcfs | grep -o 'cgroup2_options="[^"]*"')
    seen="$before${changed:+, restored: $changed}"
    [ -n "$changed" ] || [ "$(lxcfs_major)" -ge 7 ] || is "a warning about changes" 1 0
}
cgroup_options_are() { [ "$(cgroup_options)" = "$1" ]; }

# A container without a view, before the agent runs. AppArmor or SELinux confines it.
opted_out_pod_starts() {
    local confined='cri-containerd.apparmor.d (enforce)'
    [ -z "$has_selinux" ] || confined='system_u:system_r:container_t:s0:c*'
    run_pod opted-out --memory 64 || return
    opted_out_table=$(mount_table opted-out)
    seen=$(in_pod opted-out cat /proc/1/attr/current | tr -d '\0')
    # shellcheck disable=SC2053 # a pattern
    [ -n "$opted_out_table" ] && [[ $seen == $confined ]]
}

agent_is_ready() { start_agent; }

check_command() {
    local out status=0
    out=$(kube-lxcfs check 2>&1) || status=$?
    note "$out"
    is "exit status" 0 $status
}

# The view is there before the first instruction.
first_read_is_own() {
    local n first own=0 count=5
    make_shared /run/first
    for ((n = 0; n < count; n++)); do
        # shellcheck disable=SC2016 # for the shell in the container
        run_pod "first-$n" --memory 50 --volume /run/first:/out "$opt_in" -- \
            sh -c 'read -r l </proc/meminfo; echo "$l" >/out/'"$n; exec sleep 86400" || return
        wait_for 60 test -s "/run/first/$n" || return
        first=$(awk '{ print $2 }' "/run/first/$n")
        [ "$first" = $((50 << 10)) ] && own=$((own + 1))
        remove_pod "first-$n"
        rm "/run/first/$n"
    done
    seen="$own of $count"
    [ $own = $count ]
}

opted_out_table_is_identical() {
    is "mount table" "$opted_out_table" "$(mount_table opted-out)"
}

readers_have_views() { run_readers && wait_for 60 all_current; }

# With an agent that is stopped, by the commands. A running agent restores what is desired.
opt_out_and_in() {
    local name=reader-0 id=${container[reader-0]} before
    before=$(view_count $name)
    systemctl stop kube-lxcfs-agent || return
    kube-lxcfs umount --container "$id" >/dev/null || return
    is "view files after umount" 0 "$(view_count $name)" || return
    kube-lxcfs mount --container "$id" >/dev/null || return
    is "view files after mount" "$before" "$(view_count $name)" || return
    kube-lxcfs umount --container "$id" >/dev/null || return
    start_agent && wait_for 60 all_current || return
    seen="$before view files"
}

running_agent_removes_undesired_view() {
    kube-lxcfs mount --container "${container[opted-out]}" >/dev/null || return
    [ "$(view_count opted-out)" -gt 0 ] || return
    systemctl restart kube-lxcfs-agent && wait_for 120 is_ready || return
    wait_for 120 has_no_view opted-out && opted_out_table_is_identical
}
has_no_view() { [ "$(view_count "$1")" = 0 ]; }

kill_lxcfs() {
    local pid
    pid=$(lxcfs_pid)
    kill "-$1" "$pid"
    wait_for 180 another_lxcfs "$pid"
}
lxcfs_is_killed() { while_reading kill_lxcfs KILL; }
lxcfs_is_terminated() { while_reading kill_lxcfs TERM; }
# The watchdog kills it.
lxcfs_is_stopped() { while_reading kill_lxcfs STOP; }

# without_a_gap: no error, and the node's values only for the moment that old kernels need.
without_a_gap() {
    is errors 0 "$errors" || return
    [ "$node" = 0 ] || ! kernel_at_least 6.5 || is "reads of the node" 0 "$node"
}

# systemd starts another supervisor, which replaces the lxcfs of the killed one.
kill_supervisor() {
    local pid
    pid=$(lxcfs_pid)
    kill -KILL "$(main_pid kube-lxcfs-lxcfs)"
    wait_for 180 another_lxcfs "$pid" && wait_for 60 is_gone "$pid"
}
is_gone() { [ ! -e "/proc/$1" ]; }
supervisor_is_killed() { while_reading kill_supervisor && without_a_gap; }

restart_supervisor() {
    local pid
    pid=$(lxcfs_pid)
    systemctl restart kube-lxcfs-lxcfs && wait_for 180 another_lxcfs "$pid"
}
supervisor_is_restarted() { while_reading restart_supervisor && is errors 0 "$errors"; }

kill_agent() {
    local pid
    pid=$(main_pid kube-lxcfs-agent)
    kill -KILL "$pid"
    wait_for 120 is_gone "$pid" && wait_for 120 is_ready
}
agent_is_killed() {
    while_reading kill_agent && is errors 0 "$errors" && is "reads of the node" 0 "$node" &&
        first_reads_after
}
# first_reads_after: NRI is connected again.
first_reads_after() {
    local before=$seen
    sleep 5
    first_read_is_own || return
    seen="$before; first reads: $seen"
}

restart_containerd() { systemctl restart containerd && wait_for 120 pod ready; }
containerd_is_restarted() {
    while_reading restart_containerd && is errors 0 "$errors" &&
        is "reads of the node" 0 "$node" && wait_for 120 is_ready && first_reads_after
}

# --- values -------------------------------------------------------------------------------------

# MemTotal is the lowest memory.max up the tree.
memory_is_lowest_limit() {
    local slice=kubelxcfs-limited.slice
    run_pod limited --cgroup $slice --memory 96 "$opt_in" || return
    wait_for 60 has_view limited || return
    is "MemTotal with the container's limit" $((96 << 10)) "$(memory_in limited)" || return
    systemctl set-property --runtime $slice MemoryMax=64M || return
    is "MemTotal with the parent's limit" $((64 << 10)) "$(memory_in limited)" || return
    seen="96 MiB, and 64 MiB with that limit on the parent"
    remove_pod limited
}
has_view() { [ "$(view_count "$1")" -ge 8 ]; }

# SwapTotal and swaps are memory.swap.max, on a node with swap.
swap_is_limit() {
    local cgroup file=/root/swap
    dd if=/dev/zero of=$file bs=1M count=64 status=none
    chmod 600 $file && mkswap -q $file && swapon $file || return
    [ -n "${sandbox[half]-}" ] || run_pod half --cpu 50 "$opt_in" || return
    wait_for 60 has_view half || return
    cgroup=/sys/fs/cgroup$(cut -d: -f3 "/proc/$(pid_of half)/cgroup")
    echo $((32 << 20)) >"$cgroup/memory.swap.max"
    is SwapTotal $((32 << 10)) "$(in_pod half cat /proc/meminfo |
        awk '/^SwapTotal:/ { print $2 }')" || return
    is swaps $((32 << 10)) "$(in_pod half cat /proc/swaps | awk 'NR == 2 { print $3 }')" || return
    seen="32 MiB of 64"
    swapoff $file && rm $file
}

# cpus NAME: the number of CPUs that cpuinfo, online and stat show.
cpus() {
    # shellcheck disable=SC2016 # for the shell in the container
    in_pod "$1" sh -c 'echo $(grep -c ^processor /proc/cpuinfo) \
        $(cat /sys/devices/system/cpu/online) $(grep -c "^cpu[0-9]" /proc/stat)'
}

# The number of CPUs is the quota, rounded up.
cpus_are_quota() {
    local name all
    [ -n "${sandbox[half]-}" ] || run_pod half --cpu 50 "$opt_in" || return
    run_pod unlimited --cpu 0 "$opt_in" || return
    wait_for 60 has_view half && wait_for 60 has_view unlimited || return
    all=$(nproc)
    is "cpuinfo, online, stat without a quota" "$all 0-$((all - 1)) $all" "$(cpus unlimited)" ||
        return
    one_cpu half || return
    remove_pod unlimited
}

# one_cpu NAME: a container with half a CPU sees one.
one_cpu() {
    seen=$(cpus "$1")
    if [ "$seen" != "1 0 1" ] && [ "$(lxcfs_major)" -lt 7 ]; then
        known="lxcfs 6.0.4: cpuinfo, online, stat show $seen"
    else
        is "cpuinfo, online, stat with half a CPU" "1 0 1" "$seen"
    fi
}

# The quota of a parent counts too.
cpus_are_parents_quota() {
    local slice=kubelxcfs-quota.slice
    run_pod quota --cgroup $slice --cpu 0 "$opt_in" || return
    wait_for 60 has_view quota || return
    systemctl set-property --runtime $slice CPUQuota=50% || return
    one_cpu quota || return
    remove_pod quota
}

# uptime is the age of the container's first process.
uptime_is_age_of_init() {
    local start hertz before value after
    hertz=$(getconf CLK_TCK)
    start=$(in_pod half cat /proc/1/stat | sed 's/.*) //' | cut -d' ' -f20)
    before=$(cut -d' ' -f1 /proc/uptime)
    value=$(in_pod half cat /proc/uptime | cut -d' ' -f1)
    after=$(cut -d' ' -f1 /proc/uptime)
    seen="$value s"
    # Both are truncated to seconds or less.
    awk -v start="$start" -v hertz="$hertz" -v before="$before" -v value="$value" \
        -v after="$after" 'BEGIN { start /= hertz
            exit !(value >= before - start - 1.1 && value <= after - start + 1.1) }' && return
    seen="$value s, age from $before to $after s minus $start / $hertz s"
    return 1
}

# pressure is that of the cgroup. Its total only grows.
pressure_is_cgroups() {
    local cgroup file before value after node
    cgroup=/sys/fs/cgroup$(cut -d: -f3 "/proc/$(pid_of half)/cgroup")
    # Some pressure on the CPUs.
    in_pod half timeout 10 sh -c 'while :; do :; done' || true
    for file in cpu memory io; do
        before=$(total "$cgroup/$file.pressure")
        value=$(in_pod half cat /proc/pressure/$file | total)
        after=$(total "$cgroup/$file.pressure")
        node=$(total /proc/pressure/$file)
        seen+="${seen:+, }$file $value ($before to $after, node $node)"
        if [ "$value" -ge "$before" ] && [ "$value" -le "$after" ]; then continue; fi
        # lxcfs 7.0.0 searches the controller blkio, which is called io in version 2.
        if [ "$(lxcfs_major)" -lt 7 ]; then
            known="lxcfs 6.0.4 does not serve it: the node's values"
        elif [ $file = io ]; then
            known="lxcfs 7.0.0 serves the node's values in pressure/io"
        else
            return 1
        fi
    done
}
# diskstats are those of the cgroup's io.stat.
diskstats_are_cgroups() {
    local cgroup value own node
    cgroup=/sys/fs/cgroup$(cut -d: -f3 "/proc/$(pid_of half)/cgroup")
    value=$(in_pod half cat /proc/diskstats | sectors)
    own=$(sed -n "s/^$(cat /sys/block/vda/dev) rbytes=\\([0-9]*\\).*/\\1/p" "$cgroup/io.stat")
    own=$((${own:-0} / 512))
    node=$(sectors </proc/diskstats)
    seen="sectors read: $value, of the cgroup $own, of the node $node"
    [ "$value" != "$own" ] || return 0
    [ "$value" -gt "$own" ] && [ "$value" -le "$node" ] &&
        known="lxcfs serves the node's values on version 2 ($seen)"
}
# sectors: those read of the disk, in diskstats.
sectors() { awk '$3 == "vda" { print $6 }'; }
# total [FILE]: of the line `some` of a pressure file.
total() { sed -n 's/^some .*total=//p' "$@"; }
pid_of() {
    views | jq --arg id "${container[$1]}" '.[] | select(.id == $id) | .pid'
}

# --- kinds of pods ------------------------------------------------------------------------------

# first_read_of EXPECTED OPTION...: runs a pod whose first instruction reads MemTotal.
first_read_of() {
    local status=0
    compare_first_read "$@" || status=$?
    [ -z "${sandbox[kind]-}" ] || remove_pod kind
    return $status
}
compare_first_read() {
    local first user expected=$1
    shift
    make_shared /run/first
    # A user namespace has other users.
    chmod 1777 /run/first
    rm -f /run/first/kind
    # shellcheck disable=SC2016 # for the shell in the container
    run_pod kind --memory 50 --volume /run/first:/out "$@" "$opt_in" -- \
        sh -c 'read -r l </proc/meminfo; echo "$l" >/out/kind; exec sleep 86400' || return
    wait_for 60 test -s /run/first/kind || return
    first=$(awk '{ print $2 }' /run/first/kind)
    is "MemTotal at the first read" "$expected" "$first" || return
    user=$(in_pod kind cat /proc/self/uid_map | awk '{ print $2 }')
    is "the node's id of user 0" "$root_id" "$user" || return
    seen="$(view_count kind current) view files, MemTotal $first KiB"
}
own_kib=$((50 << 10))
root_id=0
read_only_root() { first_read_of $own_kib --read-only-root true; }
proc_mount_unmasked() { first_read_of $own_kib --proc-mount Unmasked; }
privileged() { first_read_of $own_kib --privileged true; }
user_namespace() { local root_id=1048576 && first_read_of $own_kib --network pod --users pod; }
# lxcfs shows the cgroup of the first process of the reader's pid namespace. In its own pid
# namespace, it shows that of the reader.
host_pid() { first_read_of $own_kib --pid node; }
# Here the first process is the pod's sandbox, which has no limit.
shared_process_namespace() {
    first_read_of "$(awk '/^MemTotal:/ { print $2 }' /proc/meminfo)" --pid pod
}

# systemd is the first process: it makes cgroups below the container's, and is in one of them. The
# pod has the programs of the machine, and a target without dependencies, since a privileged systemd
# would configure devices.
systemd_in_container() {
    local cgroup
    mkdir -p /run/units
    printf '[Unit]\nDescription=Nothing\nDefaultDependencies=no\n' >/run/units/test.target
    run_pod systemd --memory 50 --cpu 50 --privileged true --volume /usr:/usr \
        --volume /usr/lib:/lib --volume /usr/lib64:/lib64 \
        --volume /run/units:/etc/systemd/system "$opt_in" -- \
        /usr/lib/systemd/systemd --unit=test.target || return
    wait_for 60 has_view systemd && wait_for 180 is_running_systemd || return
    cgroup=$(in_pod systemd cat /proc/1/cgroup)
    is "the cgroup of systemd" init.scope "${cgroup##*/}" || return
    is MemTotal $own_kib "$(memory_in systemd)" && one_cpu systemd || return
    seen="in ${cgroup##*/}: MemTotal $own_kib KiB, CPUs $seen"
    remove_pod systemd
}
is_running_systemd() { [ "$(in_pod systemd systemctl is-system-running)" = running ]; }

# A container with a kernel of its own is left alone, and the agent says so.
gvisor() {
    local mounts views
    mounts=$(cut -d' ' -f5- /proc/self/mountinfo | grep fuse)
    run_pod gvisor --handler runsc --network pod "$opt_in" || return
    seen=$(in_pod gvisor dmesg | head -n 1)
    wait_for 60 agent_logged LxcfsUnsupportedRuntime || return
    has_no_view gvisor || return
    is "mounts of the node" "$mounts" "$(cut -d' ' -f5- /proc/self/mountinfo | grep fuse)" ||
        return
    views=$(pgrep runsc | sed 's|.*|/proc/&/mountinfo|' | xargs cat 2>/dev/null |
        grep -c 'noatime.*fuse.lxcfs')
    is "view files of gVisor's processes" 0 "$views" || return
    remove_pod gvisor
}
agent_logged() { journalctl --no-pager -o cat -u kube-lxcfs-agent | grep -q "$1"; }

# The OCI hook injects before the first instruction, without an agent.
podman_hook() {
    local out
    mkdir -p /usr/share/containers/oci/hooks.d
    cat >/usr/share/containers/oci/hooks.d/kube-lxcfs.json <<'HOOK'
{"version": "1.0.0", "stages": ["createRuntime"],
 "hook": {"path": "/usr/bin/kube-lxcfs",
          "args": ["kube-lxcfs", "hook", "--log-file", "/run/kube-lxcfs-hook.log"]},
 "when": {"annotations": {"^kube-lxcfs\\.io/inject$": "^true$"}}}
HOOK
    podman load -q -i /payload/busybox-image.tar >/dev/null || return
    out=$(podman run --rm --network host --memory 50m --annotation "$opt_in" \
        localhost/kube-lxcfs/busybox:1 head -n 1 /proc/meminfo) || return
    is "MemTotal at the first read" $own_kib "$(awk '{ print $2 }' <<<"$out")" && return
    sed 's/^/  | /' /run/kube-lxcfs-hook.log
    return 1
}

# --- the distribution's lxcfs.service -----------------------------------------------------------

# As the package has it.
host_managed_lxcfs_serves() {
    host_managed=1
    systemctl start lxcfs && wait_for 60 is_serving || return
    seen=$(systemctl show -P ExecStart lxcfs | sed -n 's/.*argv\[\]=\([^;]*\) ;.*/\1/p')
}

# The package's unit lacks a flag.
cpus_are_quota_without_cfs() {
    run_pod half --cpu 50 "$opt_in" && wait_for 60 has_view half || return
    seen=$(cpus half)
    [ "$seen" = "1 0 1" ] ||
        known="without --enable-cfs, cpuinfo, online and stat show the node's CPUs: $seen"
}

# Without the drop-in, readers have errors until the agent has removed the views.
host_managed_lxcfs_is_restarted() {
    while_reading restart_host_lxcfs
}
restart_host_lxcfs() {
    local pid
    pid=$(lxcfs_pid)
    systemctl restart lxcfs && wait_for 180 another_lxcfs "$pid"
}

host_managed_lxcfs_is_killed() { while_reading kill_lxcfs KILL; }

# With the drop-in, a restart is free of errors. The first restart applies it.
drop_in_restarts_without_errors() {
    cp -r /payload/systemd/lxcfs.service.d /etc/systemd/system/
    systemctl daemon-reload
    restart_host_lxcfs || return
    while_reading restart_host_lxcfs && is errors 0 "$errors"
}

host_managed_uninstall_leaves_nothing() {
    [ -n "${sandbox[reader-0]-}" ] || readers_have_views || return
    systemctl stop kube-lxcfs-agent || return
    kube-lxcfs umount --all >/dev/null || return
    systemctl stop lxcfs || return
    nothing_is_left
}

# --- the images ---------------------------------------------------------------------------------

# version_of COMMAND...: the first number of three parts that it prints.
version_of() { "$@" 2>&1 | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1; }

# version_in IMAGE PROGRAM
version_in() {
    version_of podman run --rm --network none --env "LD_LIBRARY_PATH=${2%/*}" --entrypoint "$2" \
        "docker-archive:/payload/images/$1.tar" --version
}

images_have_programs() {
    local own lib=/usr/lib/kube-lxcfs
    own=$(version_of kube-lxcfs --version)
    is "agent" "$own" "$(version_in agent /usr/bin/kube-lxcfs)" &&
        is "supervisor" "$own" "$(version_in lxcfs /usr/bin/kube-lxcfs)" &&
        is "lxcfs of cgroup version 1" 6.0.4 "$(version_in lxcfs $lib/cgroup1/lxcfs)" &&
        is "lxcfs of cgroup version 2" 7.0.0 "$(version_in lxcfs $lib/cgroup2/lxcfs)"
}

# The agent's image, with the privileges and the profiles of the chart, for all that follows.
agent_image_runs() {
    local drop_in=/run/systemd/system/kube-lxcfs-agent.service.d pid
    apparmor_parser -r /payload/apparmor-agent || return
    [ -n "${sandbox[reader-0]-}" ] || run_readers || return
    mkdir -p $drop_in
    cat >$drop_in/image.conf <<UNIT
[Service]
ExecStart=
ExecStart=/usr/bin/podman run --rm --replace --name agent --read-only \
    --read-only-tmpfs=false --network host --pid host \
    --cap-drop all --cap-add SYS_ADMIN,SYS_CHROOT,SYS_PTRACE \
    --security-opt seccomp=/payload/seccomp-agent.json \
    --security-opt apparmor=kube-lxcfs-agent \
    --volume /var/lib:/var/lib:rslave --env KUBE_LXCFS_HOST_ROOT=/proc/1/root \
    docker-archive:/payload/images/agent.tar agent --pods-from cri --listen 127.0.0.1:9808
UNIT
    systemctl daemon-reload
    systemctl restart kube-lxcfs-agent && wait_for 120 is_ready || return
    pid=$(pgrep -f '^/usr/bin/kube-lxcfs agent')
    is "seccomp mode" 2 "$(awk '/^Seccomp:/ { print $2 }' "/proc/$pid/status")" || return
    is AppArmor 'kube-lxcfs-agent (enforce)' "$(cat "/proc/$pid/attr/current")" || return
    wait_for 60 all_current && first_read_is_own && running_agent_removes_undesired_view
}

# --- SELinux ------------------------------------------------------------------------------------

# Debian's policy keeps containerd and runc from starting containers, unlike container-selinux: its
# type for these is permissive. Those of containers, of lxcfs and of kube-lxcfs are not.
selinux_is_enforced() {
    echo '(typepermissive dockerd_t)' >/root/runtime.cil
    semodule -i /root/runtime.cil && setenforce 1 || return
    seen=$(getenforce)
    is "type of containerd" dockerd_t "$(ps -o label= -C containerd | cut -d: -f3)" &&
        is mode Enforcing "$seen"
}

# `check` with the type of the chart's preset, which privileged containers have, and with that of
# units.
check_names_type() {
    local preset units
    run_pod checker --privileged true --volume /:/host || return
    preset=$(in_pod checker chroot /host /usr/bin/kube-lxcfs check 2>&1 | grep ' selinux ')
    remove_pod checker
    units=$(kube-lxcfs check 2>&1 | grep ' selinux ')
    seen="$preset; $units"
    [[ $preset == 'ok    selinux '*'enforcing; the type spc_t is not restricted' ]] &&
        [[ $units == 'warn  selinux '*'enforcing; the type initrc_t may be denied '* ]]
}

selinux_denies_nothing() {
    local denied
    is mode Enforcing "$(getenforce)" || return
    denied=$(journalctl --no-pager -o cat | grep 'avc: .*denied.* permissive=0')
    seen=$(head -n 3 <<<"$denied")
    [ -z "$denied" ]
}

# --- the end ------------------------------------------------------------------------------------

uninstall_leaves_nothing() {
    [ -n "${sandbox[reader-0]-}" ] || readers_have_views || return
    systemctl stop kube-lxcfs-agent || return
    go || return
    began=$(date +%s%N)
    systemctl stop kube-lxcfs-lxcfs || return
    stop || return
    seen="reads: $reads"
    is errors 0 "$errors" || return
    nothing_is_left
}
nothing_is_left() {
    is "lxcfs mounts" "" "$(findmnt -n -t fuse.lxcfs)" || return
    is "lxcfs processes" "" "$(pgrep -x lxcfs)" || return
    is "kube-lxcfs processes" "" "$(pgrep -x kube-lxcfs)" || return
    local tables
    tables=$(cat /proc/[0-9]*/mountinfo 2>/dev/null | grep -c fuse.lxcfs)
    is "lxcfs mounts in all mount tables" 0 "$tables" || return
    opted_out_table_is_identical
}

apparmor_denies_nothing() {
    local denied
    # podman mounts the file into its containers. The profile lets the agent remove only the chart's
    # volume.
    denied=$(journalctl -k --no-pager -o cat | grep 'apparmor="DENIED"' |
        grep -v 'comm="reader"\|name="/run/.containerenv"\|"rmdir".*name="/var/lib/lxcfs/"')
    seen=$(head -n 3 <<<"$denied")
    [ -z "$denied" ]
}

install_kube_lxcfs
start_containerd "$cell_runtime" || exit 1
declare -A sets=(
    [begin]='versions supervisor_keeps_cgroup_options opted_out_pod_starts agent_is_ready
        check_command first_read_is_own'
    [values]='memory_is_lowest_limit swap_is_limit cpus_are_quota cpus_are_parents_quota
        uptime_is_age_of_init pressure_is_cgroups diskstats_are_cgroups'
    [kinds]='read_only_root proc_mount_unmasked privileged user_namespace host_pid
        shared_process_namespace systemd_in_container podman_hook'
    [gvisor]='gvisor'
    [failures]='readers_have_views opted_out_table_is_identical opt_out_and_in
        running_agent_removes_undesired_view lxcfs_is_killed lxcfs_is_terminated lxcfs_is_stopped
        supervisor_is_killed supervisor_is_restarted agent_is_killed containerd_is_restarted'
    [images]='images_have_programs agent_image_runs lxcfs_is_killed'
    [end]='uninstall_leaves_nothing apparmor_denies_nothing'
    [selinux]='selinux_is_enforced'
    [selinux-end]='readers_have_views lxcfs_is_killed supervisor_is_restarted
        check_names_type uninstall_leaves_nothing selinux_denies_nothing'
    [host]='versions host_managed_lxcfs_serves opted_out_pod_starts agent_is_ready check_command
        first_read_is_own cpus_are_quota_without_cfs readers_have_views
        host_managed_lxcfs_is_restarted host_managed_lxcfs_is_killed
        drop_in_restarts_without_errors cpus_are_quota
        host_managed_uninstall_leaves_nothing apparmor_denies_nothing'
)
[ "$cell_sets" != all ] || cell_sets='begin values kinds failures end'
for set in $cell_sets; do
    for name in ${sets[$set]}; do scenario "$name"; done
done
[ $failed = 0 ]
