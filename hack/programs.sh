#!/usr/bin/env bash
# Runs programs in a container with 128 MiB and half a CPU, without and with a view, and writes the
# tables of docs/programs.md. The programs are those of Debian sid, so a run needs the network once.
# It leaves nothing behind except downloads in the cache.
#   hack/programs.sh            prints the tables
#   hack/programs.sh --write    writes them into docs/programs.md
# KUBE_LXCFS_BIN names a built kube-lxcfs, instead of one that this script builds.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/offline/lib.sh

page=docs/programs.md
id=kube-lxcfs-programs-$$
# Raise it when the content changes.
root="$CACHE/programs-root-1"
root_log="$CACHE/programs-root.log"
nginx_musl="$CACHE/nginx-musl-1"

# make_root: in $work.
make_root() {
    local packages=base-files,bash,dash,coreutils,grep,sed,gawk,libc-bin,strace
    packages+=,procps,util-linux,bsdutils,ncurses-base,htop,busybox-static
    packages+=,ninja-build,libgomp1,libstdc++6
    packages+=,nodejs,ruby,python3,python3-psutil,erlang-base,nginx
    packages+=,mysql-server-core,postgresql-18,redis-server,openjdk-21-jdk-headless
    packages+=,openjdk-8-jre-headless,openjdk-11-jre-headless
    packages+=,openjdk-17-jre-headless,openjdk-25-jre-headless
    # Unpacked only: no script of a package runs.
    # shellcheck disable=SC2154 # set by make_work_dir
    mmdebstrap --quiet --variant=extract --include="$packages" \
        --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
        --aptopt='Acquire::Check-Valid-Until "false"' sid "$work/root" "$mirror"
    mkdir -p "$work/root/opt/programs"
    ln -s gawk "$work/root/usr/bin/awk"
    printf 'root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n' >"$work/root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$work/root/etc/group"
    mv "$work/root" "$root"
}

build_root() {
    [ ! -d "$root" ] || return 0
    mirror=$(debian_mirror "make a root file system")
    make_work_dir programs
    say "making a root file system with the programs, once (log: $root_log)"
    logged "$root_log" "make a root file system with the programs" make_root
}

# build_programs: what a program of each language sees, in $dir/programs.
build_programs() {
    local trixie sid musl go
    trixie=$(hack/offline/debian.sh trixie golang-1.24-go golang-1.24-src)
    sid=$(hack/offline/debian.sh sid golang-1.26-go golang-1.26-src mariadb-server-core \
        musl musl-dev musl-tools)
    cp "$sid/usr/sbin/mariadbd" "$dir/programs/mariadbd"
    cd "$dir/source"
    cat >cpus.go <<'GO'
package main

import "runtime"

func main() { println(runtime.NumCPU(), "NumCPU,", runtime.GOMAXPROCS(0), "GOMAXPROCS") }
GO
    for go in "$trixie/usr/lib/go-1.24" "$sid/usr/lib/go-1.26"; do
        GOROOT=$go GOTOOLCHAIN=local CGO_ENABLED=0 GO111MODULE=off GOFLAGS='' \
            GOCACHE=$CACHE/programs-go "$go/bin/go" build -o "$dir/programs/${go##*/}" cpus.go
    done
    cat >cpus.rs <<'RUST'
fn main() { println!("{}", std::thread::available_parallelism().unwrap()); }
RUST
    rustc -O -o "$dir/programs/rust" cpus.rs
    cat >cpus.cc <<'CPP'
#include <cstdio>
#include <thread>
int main() { std::printf("%u\n", std::thread::hardware_concurrency()); }
CPP
    c++ -o "$dir/programs/c++" cpus.cc
    cat >omp.c <<'C'
#include <omp.h>
#include <stdio.h>
int main(void) { printf("%d\n", omp_get_max_threads()); }
C
    cc -fopenmp -o "$dir/programs/openmp" omp.c
    cat >sysconf.c <<'C'
#include <stdio.h>
#include <unistd.h>
int main(void) {
    long long pages = sysconf(_SC_PHYS_PAGES);
    printf("%ld CPUs, %lld MiB\n", sysconf(_SC_NPROCESSORS_ONLN),
        pages * sysconf(_SC_PAGESIZE) >> 20);
}
C
    cc -o "$dir/programs/sysconf-glibc" sysconf.c
    musl=$(echo "$sid"/usr/lib/*-linux-musl)
    sed "s|/usr/|$sid/usr/|g" "$musl/musl-gcc.specs" >musl.specs
    cc -static -specs="$PWD/musl.specs" -o "$dir/programs/sysconf-musl" sysconf.c
    locked nginx-musl nginx_with_musl "$PWD/musl.specs"
    cp "$nginx_musl" "$dir/programs/nginx-musl"
    cat >Cpus.java <<'JAVA'
public class Cpus {
    public static void main(String[] args) {
        Runtime runtime = Runtime.getRuntime();
        System.out.println(runtime.availableProcessors() + " CPUs, heap "
            + (runtime.maxMemory() >> 20) + " MiB");
    }
}
JAVA
    cp Cpus.java "$dir/programs/"
}

# build_nginx SPECS: nginx with musl, without the modules that need libraries, into the cache.
build_nginx() {
    mkdir -p "$work"/{lists/partial,cache/archives/partial}
    printf 'deb-src [signed-by=%s] %s trixie main\n' \
        /usr/share/keyrings/debian-archive-keyring.gpg "$mirror" >"$work/list"
    local apt=(-q -o "Dir::Etc::sourcelist=$work/list" -o "Dir::Etc::sourceparts=-"
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache"
        -o "APT::Sandbox::User=root" -o "Acquire::Check-Valid-Until=false")
    cd "$work"
    apt-get "${apt[@]}" update
    apt-get "${apt[@]}" source --tar-only nginx
    tar -xf nginx_*.orig.tar.*
    # What musl has not: the kernel's headers, and a declaration of crypt(3).
    mkdir include
    ln -s /usr/include/linux /usr/include/asm-generic \
        "/usr/include/$(cc -print-multiarch)/asm" include/
    cat >include/crypt.h <<'C'
struct crypt_data { int initialized; char buffer[256]; };
char *crypt(const char *, const char *);
char *crypt_r(const char *, const char *, struct crypt_data *);
C
    printf '#!/bin/sh\nexec cc -static -specs=%s -idirafter %s "$@"\n' "$1" "$PWD/include" >musl-cc
    chmod +x musl-cc
    cd nginx-*/
    ./configure --with-cc="$work/musl-cc" --without-http
    make
    cp objs/nginx "$nginx_musl"
}

nginx_with_musl() {
    [ ! -e "$nginx_musl" ] || return 0
    mirror=$(debian_mirror "download the source of nginx")
    make_work_dir nginx
    say "building nginx with musl, once (log: $CACHE/nginx-musl.log)"
    logged "$CACHE/nginx-musl.log" "build nginx with musl" build_nginx "$1"
}

clean_up() {
    trap '' INT TERM
    local try cgroup
    runc --root "$dir/runc" delete --force "$id" >/dev/null 2>&1 || true
    if [ -n "${supervisor-}" ]; then
        kill "$supervisor" 2>/dev/null || true
        wait "$supervisor" 2>/dev/null || true
    fi
    umount -l "$dir/lxcfs" 2>/dev/null || true
    # A cgroup can be removed a moment after its last process has exited.
    for try in 1 2 3 4 5; do
        cgroup=$(find /sys/fs/cgroup -depth -type d -name "$id" 2>/dev/null) || true
        [ -n "$cgroup" ] || break
        # shellcheck disable=SC2086 # splits into paths
        rmdir $cgroup 2>/dev/null || sleep "0.$try"
    done
    rm -rf "$dir"
}

# run_in USER COMMAND: in the container.
run_in() {
    timeout 120 runc --root "$dir/runc" exec --user "$1" --env TERM=linux \
        --env "COMMAND=${COMMAND-}" "$id" sh -c "$2"
}

start_container() {
    mkdir "$dir/bundle"
    runc spec --bundle "$dir/bundle"
    python3 - "$dir" "$root" "$id" <<'PYTHON'
import json, sys
directory, root, name = sys.argv[1:]
path = directory + "/bundle/config.json"
spec = json.load(open(path))
spec["process"].update(terminal=False, args=["sleep", "infinity"])
del spec["process"]["rlimits"]
spec["root"] = {"path": root, "readonly": True}
for target in "/tmp", "/run":
    spec["mounts"].append({"destination": target, "type": "tmpfs", "source": "tmpfs",
                           "options": ["nosuid", "nodev", "mode=1777"]})
spec["mounts"].append({"destination": "/opt/programs", "type": "bind",
                       "source": directory + "/programs", "options": ["rbind", "ro"]})
spec["linux"]["cgroupsPath"] = "/" + name
spec["linux"]["resources"].update(memory={"limit": 128 << 20},
                                  cpu={"quota": 50000, "period": 100000})
json.dump(spec, open(path, "w"))
PYTHON
    runc --root "$dir/runc" run --detach --bundle "$dir/bundle" "$id" </dev/null \
        >"$dir/container.log" 2>&1 ||
        fail "failed to start a container: $(cat "$dir/container.log")"
    pid=$(runc --root "$dir/runc" state "$id" | python3 -c 'import json, sys
print(json.load(sys.stdin)["pid"])')
}

# reads USER COMMAND: prints the view files and calls that COMMAND reads successfully.
reads() {
    # shellcheck disable=SC2016 # for the shell in the container
    local trace='strace -f -qq -o /tmp/trace -e trace=open,openat,sysinfo,sched_getaffinity \
        sh -c "$COMMAND" >/dev/null 2>&1; cat /tmp/trace; rm /tmp/trace'
    local files='meminfo\|cpuinfo\|stat\|uptime\|loadavg\|swaps'
    COMMAND=$2 run_in "$1" "$trace" | sed -nE -e '/= -1 E/d' \
        -e "s|.*\"(/proc/)?($files)\".*|\`/proc/\2\`|p" \
        -e "s|.*\"/sys/devices/system/cpu[/\"].*|\`/sys/devices/system/cpu\`|p" \
        -e "s|.*\"/sys/fs/cgroup[^\"]*\".*|cgroup files|p" \
        -e "s|^[0-9]* *(sysinfo\|sched_getaffinity)\(.*|\`\1(2)\`|p" |
        sort -u | paste -sd, - | sed 's/,/, /g'
}

titles=() versions=() commands=() users=() advice=() settings=() remedies=()
read=() before=() after=() remedied=()

# program NAME VERSION COMMAND [ADVICE [SETTING COMMAND]]: a row of the table. VERSION and COMMAND
# print one line in the container. The second COMMAND is the first one with the SETTING.
program() {
    titles+=("$1") versions+=("$2") commands+=("$3") advice+=("${4-}") users+=("${user-0}")
    settings+=("${5-}") remedies+=("${6-}")
}

one_line() { tr '\n' ' ' | sed -E 's/ +/ /g; s/^ //; s/ $//; s/\b1 (CPU|scheduler)s/1 \1/g'; }

# measure ARRAY: the output of each command.
measure() {
    local -n results=$1
    local i
    for i in "${!commands[@]}"; do
        [ -n "${commands[i]}" ] || continue
        results[i]=$(run_in "${users[i]}" "${commands[i]}" 2>"$dir/errors" | one_line) || true
        [ -n "${results[i]}" ] ||
            fail "${titles[i]} printed nothing: $(tail -n 3 "$dir/errors")"
    done
}

list_programs() {
    local v java
    local busybox="busybox | sed -E 's/.* v([0-9.]+).*/\1/;q'"
    local affinity="only a cpuset changes it, for example of the static CPU manager"

    program "procps \`free\`" "free -V | sed 's/.* //'" \
        "free -m | awk '/^Mem/ { print \$2, \"MiB\" }'"
    program "procps \`top\`" "top -V | sed 's/.* //;q'" \
        "top -bn1 | awk '/^MiB Mem/ { print \$4, \"MiB\" }'"
    program "procps \`vmstat -s\`" "vmstat -V | sed 's/.* //'" \
        "vmstat -s -S M | awk '/total memory/ { print \$1, \"MiB\" }'"
    program "\`lscpu\`" "lscpu -V | sed 's/.* //'" \
        "lscpu | awk '/^CPU\(s\)/ { print \$2, \"CPUs,\" }
        /^On-line/ { print \"online:\", \$NF }'" "counts \`possible\`; \`online\` follows the view"
    program "\`htop\`" "htop -V | awk '{ print \$2; exit }'" \
        "script -qc 'stty cols 100 rows 30; htop -C -n 1' /dev/null |
            grep -oE '[0-9.]+[KMG]/[0-9.]+[KMG]' | sed 's|.*/|memory |;q'"
    program "\`nproc\`" "nproc --version | sed 's/.* //;q'" nproc \
        "from 9.8 on, it reads the quota of cgroup version 2 itself ([NEWS][coreutils])" \
        "OMP_NUM_THREADS=1" "OMP_NUM_THREADS=1 nproc"
    program "busybox \`nproc\`" "$busybox" "busybox nproc" "$affinity" \
        "taskset -c 0" "taskset -c 0 busybox nproc"
    program "busybox \`free\`" "$busybox" \
        "busybox free -m | awk '/^Mem/ { print \$2, \"MiB\" }'" \
        "use \`free\` of procps, or busybox:" \
        "grep MemTotal /proc/meminfo" "busybox grep MemTotal /proc/meminfo"
    program "busybox \`top\`" "$busybox" \
        "busybox top -bn1 | awk '/^Mem/ { print int((\$2 + \$4) / 1024), \"MiB\"; exit }'"
    program "glibc \`sysconf(3)\`" "ldd --version | sed 's/.* //;q'" /opt/programs/sysconf-glibc \
        "memory: read \`/proc/meminfo\` instead"
    program "musl \`sysconf(3)\` (Alpine)" "echo $musl_version" /opt/programs/sysconf-musl \
        "use an image with glibc, or configure the program; $affinity" \
        "taskset -c 0" "taskset -c 0 /opt/programs/sysconf-musl"
    user=65534
    program "nginx with glibc, \`worker_processes auto\`" "nginx -v 2>&1 | sed 's|.*/||'" \
        "$(nginx_workers nginx auto)"
    program "nginx with musl (Alpine), \`worker_processes auto\`" \
        "/opt/programs/nginx-musl -v 2>&1 | sed 's|.*/||'" \
        "$(nginx_workers /opt/programs/nginx-musl auto)" \
        "the official image has \`NGINX_ENTRYPOINT_WORKER_PROCESSES_AUTOTUNE\` ([source][nginx]);" \
        "worker_processes 1" "$(nginx_workers /opt/programs/nginx-musl 1)"
    user=0
    program "C++ \`hardware_concurrency\`" "echo GCC" /opt/programs/c++
    program "OpenMP" "echo GCC" /opt/programs/openmp "" \
        "OMP_NUM_THREADS=1" "OMP_NUM_THREADS=1 /opt/programs/openmp"
    program "Rust \`available_parallelism\`" "echo $rust_version" /opt/programs/rust \
        "reads the quota itself"
    program "Go 1.24" "echo 1.24" "/opt/programs/go-1.24 2>&1" "" \
        "GOMAXPROCS=1" "GOMAXPROCS=1 /opt/programs/go-1.24 2>&1"
    program "Go 1.26" "echo 1.26" "/opt/programs/go-1.26 2>&1" \
        "from 1.25 on, \`GOMAXPROCS\` follows the quota, but is at least 2 ([blog][go])" \
        "GOMAXPROCS=1" "GOMAXPROCS=1 /opt/programs/go-1.26 2>&1"
    program "Node.js \`os\`" "node -v" \
        "node -p 'os = require(\"os\"); os.cpus().length + \" CPUs, \" +
            os.availableParallelism() + \" parallel, \" +
            Math.floor(os.totalmem() / 1048576) + \" MiB\"'" \
        "\`availableParallelism\` does not change"
    program "Node.js, limit of the heap" "node -v" \
        "node -p '(v8.getHeapStatistics().heap_size_limit >> 20) + \" MiB\"'" "" \
        "--max-old-space-size=64" "node --max-old-space-size=64 \
            -p '(v8.getHeapStatistics().heap_size_limit >> 20) + \" MiB\"'"
    local python="import os
print(os.cpu_count(), \"CPUs,\", os.process_cpu_count(), \"of the process,\",
      os.sysconf(\"SC_PHYS_PAGES\") * os.sysconf(\"SC_PAGESIZE\") >> 20, \"MiB\")"
    program "Python \`os\`" "python3 -V | sed 's/.* //'" "python3 -c '$python'" \
        "memory: read \`/proc/meminfo\`, or use psutil;" \
        "PYTHON_CPU_COUNT=1" "PYTHON_CPU_COUNT=1 python3 -c '$python'"
    program "Python psutil" "python3 -c 'import psutil; print(psutil.__version__)'" \
        "python3 -c 'import psutil
print(psutil.cpu_count(), \"CPUs,\", psutil.virtual_memory().total >> 20, \"MiB\")'"
    program "Ruby \`Etc.nprocessors\`" "ruby -v | cut -d' ' -f2" \
        "ruby --disable-gems -retc -e 'puts Etc.nprocessors'" "$affinity" \
        "taskset -c 0" "taskset -c 0 ruby --disable-gems -retc -e 'puts Etc.nprocessors'"
    local erlang="io:format(\"~p schedulers\", [erlang:system_info(schedulers_online)]), halt()."
    program "Erlang" "erl -noshell -eval 'io:put_chars(erlang:system_info(otp_release)), halt().'" \
        "erl -noshell -eval '$erlang'" "reads the quota itself" \
        "+S 2:2" "erl +S 2:2 -noshell -eval '$erlang'"
    for v in 8 11 17 21 25; do
        java="/usr/lib/jvm/java-$v-openjdk-*/bin/java"
        program "Java $v" "$java -version 2>&1 | sed 's/.*\"\(.*\)\".*/\1/;q'" \
            "$java -cp /tmp/java Cpus" "reads the limits itself" \
            "-Xmx96m -XX:ActiveProcessorCount=2" \
            "$java -Xmx96m -XX:ActiveProcessorCount=2 -cp /tmp/java Cpus"
    done
    java="/usr/lib/jvm/java-8-openjdk-*/bin/java"
    program "Java 8 without container support" \
        "$java -version 2>&1 | sed 's/.*\"\(.*\)\".*/\1/;q'" \
        "$java -XX:-UseContainerSupport -cp /tmp/java Cpus" \
        "run with \`-XX:-UseContainerSupport\`, to act as Java before 8u191;" \
        "-XX:ActiveProcessorCount=1 -Xmx64m" \
        "$java -XX:-UseContainerSupport -XX:ActiveProcessorCount=1 -Xmx64m -cp /tmp/java Cpus"
    user=65534
    local initdb="rm -rf /tmp/pg; /usr/lib/postgresql/*/bin/initdb -D /tmp/pg --no-sync"
    local shared="sed -n 's/.*shared_buffers. ... *//p'; rm -rf /tmp/pg"
    program "PostgreSQL, \`shared_buffers\` of initdb" "/usr/lib/postgresql/*/bin/postgres -V |
        cut -d' ' -f3" "$initdb | $shared" "a fixed default" "shared_buffers = 32MB" \
        "$initdb -c shared_buffers=32MB >/dev/null
        /usr/lib/postgresql/*/bin/postgres -D /tmp/pg -C shared_buffers | sed 's/$/ pages/'
        rm -rf /tmp/pg"
    user=0
    local pool="awk '/^innodb-buffer-pool-size / { print \$2 / 1048576, \"MiB\" }'"
    program "MySQL, \`innodb_buffer_pool_size\`" "mysqld --version | awk '{ print \$3 }'" \
        "mysqld --no-defaults --verbose --help 2>/dev/null | $pool" "a fixed default" \
        "--innodb-buffer-pool-size=64M" \
        "mysqld --no-defaults --innodb-buffer-pool-size=64M --verbose --help 2>/dev/null | $pool"
    pool="awk '/^thread-pool-size / { print \$2 }'"
    program "MariaDB, \`thread_pool_size\`" \
        "/opt/programs/mariadbd --version | awk '{ print \$3 }'" \
        "/opt/programs/mariadbd --no-defaults --verbose --help 2>/dev/null | $pool" "" \
        "--thread-pool-size=1" "/opt/programs/mariadbd --no-defaults --thread-pool-size=1 \
            --verbose --help 2>/dev/null | $pool"
    program "Redis, \`total_system_memory\`" "redis-server -v | sed 's/.*v=\([^ ]*\).*/\1/'" \
        "$(redis_info total_system_memory_human)" "only reported;" \
        "--maxmemory 100mb" "$(redis_info maxmemory_human --maxmemory 100mb)"
    program "Ninja, default of \`-j\`" "ninja --version" \
        "ninja --help 2>&1 | sed -n 's/.*default=\([0-9]*\) on.*/\1 jobs/p'" \
        "reads the quota itself; one more job than CPUs"
}

# redis_info FIELD OPTION...: a command that prints a field of INFO.
redis_info() {
    cat <<COMMAND
redis-server --port 0 --unixsocket /tmp/redis --save '' ${*:2} >/dev/null &
while ! redis-cli -s /tmp/redis ping >/dev/null 2>&1; do :; done
redis-cli -s /tmp/redis info memory | sed -n 's/^$1://p' | tr -d '\r'
redis-cli -s /tmp/redis shutdown nosave
wait
COMMAND
}

# nginx_workers PROGRAM WORKERS: a command that prints how many workers it starts.
nginx_workers() {
    cat <<COMMAND
cd /tmp
printf 'worker_processes $2; events {} pid /tmp/nginx.pid; error_log /tmp/nginx.log notice;' \\
    >nginx.conf
$1 -e /tmp/nginx.log -c /tmp/nginx.conf -g 'daemon off;' &
while ! grep -q 'start worker process ' nginx.log; do :; done
kill \$!
wait \$!
echo "\$(grep -c 'start worker process ' nginx.log) workers" | sed 's/^1 workers/1 worker/'
rm nginx.log
COMMAND
}

print_table() {
    local i with cell
    echo "A container with 128 MiB and half a CPU, on a node with $(nproc) CPUs and" \
        "$(free -m | awk '/^Mem/ { print $2 }') MiB."
    echo "Kernel $(uname -r | cut -d- -f1), cgroup version $(cgroup_version)," \
        "lxcfs $lxcfs_version, $(date -u +%F)."
    echo
    echo "| program | version | reads | without a view | with a view | what to do instead |"
    echo "| --- | --- | --- | --- | --- | --- |"
    for i in "${!titles[@]}"; do
        with=${after[i]}
        [ "${before[i]}" = "$with" ] || with="**$with**"
        cell=${advice[i]}
        [[ -z "$cell" || "$cell" = *[\;:] ]] || [ -z "${settings[i]}" ] || cell+=";"
        [ -z "${settings[i]}" ] || cell+="${cell:+ }\`${settings[i]}\`: ${remedied[i]}"
        echo "| ${titles[i]} | ${version[i]} | ${read[i]} | ${before[i]} | $with | $cell |"
    done
}

cgroup_version() { [ -e /sys/fs/cgroup/cgroup.controllers ] && echo 2 || echo 1; }

need_root "running containers"
hack/deps.sh build demo programs
dir=$(mktemp -d /tmp/kube-lxcfs-programs.XXXXXX)
mkdir "$dir"/{programs,source,runc,lxcfs}
trap clean_up EXIT
trap 'exit 130' INT TERM
locked programs-root build_root
if [ -z "${KUBE_LXCFS_BIN-}" ]; then
    say "building kube-lxcfs"
    cargo build --quiet --locked --bin kube-lxcfs
    KUBE_LXCFS_BIN=$PWD/target/debug/kube-lxcfs
fi
say "building the small programs"
logged "$dir/build.log" "build the small programs" build_programs

setsid "$KUBE_LXCFS_BIN" lxcfs --lxcfs-path "$dir/lxcfs" >"$dir/lxcfs.log" 2>&1 &
supervisor=$!
wait_for 30 test -r "$dir/lxcfs/proc/uptime" || fail "lxcfs does not serve: $(cat "$dir/lxcfs.log")"
lxcfs_version=$(lxcfs --version 2>&1 | tr -d '"' | tail -n 1)
rust_version=$(rustc --version | cut -d' ' -f2)
# The library of musl prints its version if it is run.
musl_version=$("$(echo "$(hack/offline/debian.sh sid musl)"/usr/lib/*-linux-musl/libc.so)" 2>&1 |
    sed -n 's/^Version //p') || true
start_container
run_in 0 "mkdir /tmp/java && /usr/lib/jvm/java-21-openjdk-*/bin/javac -J-Xmx64m --release 8 \
    -Xlint:-options -d /tmp/java /opt/programs/Cpus.java" ||
    fail "failed to compile the program in Java"

list_programs
version=()
say "${#titles[@]} programs without a view"
measure before
for i in "${!titles[@]}"; do
    version[i]=$(run_in 0 "${versions[i]}" 2>/dev/null | one_line)
    read[i]=$(reads "${users[i]}" "${commands[i]}")
done
say "the same with a view"
"$KUBE_LXCFS_BIN" mount --pid "$pid" --lxcfs-path "$dir/lxcfs" >&2
measure after
commands=("${remedies[@]}")
measure remedied
print_table >"$dir/table"
if [ "${1-}" = --write ]; then
    sed -i -e "/^<!-- begin of the table/r $dir/table" \
        -e '/^<!-- begin of the table/,/^<!-- end of the table/ { /^<!-- /!d }' "$page"
else
    cat "$dir/table"
fi
