//! The values inside an injected container, compared with what the files of its cgroup say, on
//! cgroup version 1, for each lxcfs that serves it. The tests have the names of the scenarios in
//! `hack/vm/guest/scenarios.sh`, which compare the same on version 2.

use std::{fs, path::PathBuf};

use crate::harness::*;

/// Of this machine, and the one that the image has for cgroup version 1.
const RELEASES: [Release; 2] = [Release::Own, Release::Trixie];

/// A container with views of an lxcfs.
struct Injected {
    id: String,
    pid: i32,
    containerd: Containerd,
    release: Release,
    _lxcfs: Lxcfs,
}

impl Injected {
    fn start(release: Release) -> Injected {
        let (lxcfs, containerd) = (Lxcfs::of(release), Containerd::start());
        let pod = containerd.run(&PodSpec { name: "p", annotations: &[], containers: &["a"] });
        let id = pod.containers["a"].clone();
        let pid = containerd.pid(&id);
        succeeds(&["mount", "--pid", &pid.to_string(), "--lxcfs-path", lxcfs.path()]);
        has_views("the container", pid, ALWAYS.len());
        Injected { id, pid, containerd, release, _lxcfs: lxcfs }
    }

    /// Not by `cat` of busybox: just after a change, its output ends at the length of the previous
    /// value.
    fn read(&self, path: &str) -> String {
        self.containerd.exec(&self.id, &["sed", "", path])
    }

    /// A file of its cgroup in the hierarchy of a controller.
    fn own(&self, controller: &str, file: &str) -> PathBuf {
        let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap();
        let path = cgroups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|name| name == controller).then_some(path)
        });
        let path = path.unwrap_or_else(|| panic!("no {controller} in {cgroups}"));
        PathBuf::from(format!("/sys/fs/cgroup/{controller}{path}")).join(file)
    }

    /// The same file of the parent.
    fn parent(&self, controller: &str, file: &str) -> PathBuf {
        self.own(controller, "").parent().unwrap().join(file)
    }

    /// The CPUs that `cpuinfo`, `online` and `stat` show.
    fn cpus(&self) -> [String; 3] {
        let lines = |path: &str, is_cpu: fn(&str) -> bool| {
            self.read(path).lines().filter(|line| is_cpu(line)).count().to_string()
        };
        let numbered = |line: &str| line.strip_prefix("cpu").is_some_and(|n| !n.starts_with(' '));
        [
            lines("/proc/cpuinfo", |line| line.starts_with("processor")),
            self.read("/sys/devices/system/cpu/online").trim().to_owned(),
            lines("/proc/stat", numbered),
        ]
    }
}

fn number(path: PathBuf) -> i64 {
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.trim().parse().unwrap()
}

fn set(path: PathBuf, value: &str) {
    fs::write(&path, value).unwrap_or_else(|e| panic!("{value} to {}: {e}", path.display()));
}

/// What `cpuinfo`, `online` and `stat` show of this number of CPUs.
fn shown(cpus: i64) -> [String; 3] {
    let online = if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) };
    [cpus.to_string(), online, cpus.to_string()]
}

/// The CPUs in a list such as `0-2,5`.
fn count(list: &str) -> i64 {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        last.parse::<i64>().unwrap() - first.parse::<i64>().unwrap() + 1
    };
    list.trim().split(',').map(range).sum()
}

/// The value in KiB of a line of `meminfo`.
fn kib(meminfo: &str, name: &str) -> i64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).expect(meminfo)
}

fn each_release(test: fn(&Injected)) {
    RELEASES.into_iter().for_each(|release| test(&Injected::start(release)));
}

#[test]
fn memory_is_lowest_limit() {
    isolated(|| {
        each_release(|container| {
            let limit = "memory.limit_in_bytes";
            for parent_mib in [None, Some(64), Some(80), Some(128)] {
                if let Some(mib) = parent_mib {
                    set(container.parent("memory", limit), &(mib << 20_i64).to_string());
                }
                let limits = [container.own("memory", limit), container.parent("memory", limit)];
                let lowest = limits.map(number).into_iter().min().unwrap() >> 10;
                let total = kib(&container.read("/proc/meminfo"), "MemTotal");
                assert_eq!(total, lowest, "{:?}, parent {parent_mib:?}", container.release);
                assert!(lowest <= 96 << 10, "a limit is set");
            }
        });
    });
}

#[test]
fn cpus_are_quota() {
    isolated(|| {
        each_release(|container| {
            let all = count(&fs::read_to_string("/sys/devices/system/cpu/online").unwrap());
            let (quota, period) = ("cpu.cfs_quota_us", "cpu.cfs_period_us");
            for (quota_us, set_of_cpus, cpus) in [
                (50_000, None, 1),
                (100_000, None, 1),
                (150_000, None, 2),
                (-1, None, all),
                (-1, Some("0"), 1),
                (150_000, Some("0"), 1),
            ] {
                set(container.own("cpu", quota), &quota_us.to_string());
                if let Some(cpus) = set_of_cpus {
                    set(container.own("cpuset", "cpuset.cpus"), cpus);
                }
                let allowed =
                    count(&fs::read_to_string(container.own("cpuset", "cpuset.cpus")).unwrap());
                let period = number(container.own("cpu", period));
                let expected = match number(container.own("cpu", quota)) {
                    -1 => allowed,
                    quota => allowed.min((quota + period - 1) / period),
                };
                let case = format!("{:?}, {quota_us}, {set_of_cpus:?}", container.release);
                assert_eq!(expected, cpus.min(all), "{case}");
                assert_eq!(container.cpus(), shown(expected), "{case}");
            }
        });
    });
}

/// Known: lxcfs before 7.0.0 ignores the quota of a parent.
#[test]
fn cpus_are_parents_quota() {
    isolated(|| {
        each_release(|container| {
            let all = count(&fs::read_to_string("/sys/devices/system/cpu/online").unwrap());
            set(container.own("cpu", "cpu.cfs_quota_us"), "-1");
            set(container.parent("cpu", "cpu.cfs_quota_us"), "50000");
            assert_eq!(container.cpus(), shown(all), "{:?}", container.release);
        });
    });
}

#[test]
fn uptime_is_age_of_init() {
    isolated(|| {
        each_release(|container| {
            let stat = procfs::process::Process::new(container.pid).unwrap().stat().unwrap();
            #[expect(clippy::cast_precision_loss, reason = "seconds since the machine's start")]
            let start = stat.starttime as f64 / procfs::ticks_per_second() as f64;
            let first = |text: &str| -> f64 { text.split(' ').next().unwrap().parse().unwrap() };
            let node = || first(&fs::read_to_string("/proc/uptime").unwrap());
            let before = node();
            let value = first(&container.read("/proc/uptime"));
            let ages = before - start - 1.1..=node() - start + 1.1;
            // Both are truncated to seconds or less.
            assert!(ages.contains(&value), "{:?}: {value} s of {ages:?}", container.release);
        });
    });
}

#[test]
fn swap_is_cgroups() {
    isolated(|| {
        each_release(|container| {
            let limit = |file| number(container.own("memory", file));
            let swap = limit("memory.memsw.limit_in_bytes") - limit("memory.limit_in_bytes");
            let node = kib(&fs::read_to_string("/proc/meminfo").unwrap(), "SwapTotal");
            let expected = node.min(swap >> 10);
            let total = kib(&container.read("/proc/meminfo"), "SwapTotal");
            assert_eq!(total, expected, "{:?}", container.release);
            let swaps = container.read("/proc/swaps");
            let sizes = swaps.lines().skip(1).filter_map(|l| l.split_whitespace().nth(2));
            let sum: i64 = sizes.map(|size| size.parse::<i64>().unwrap()).sum();
            assert!(swaps.starts_with("Filename") && sum == expected, "{swaps}");
        });
    });
}

#[test]
fn loadavg_is_of_the_containers_tasks() {
    isolated(|| {
        each_release(|container| {
            let text = container.read("/proc/loadavg");
            let fields: Vec<&str> = text.split_whitespace().collect();
            assert!(fields.len() == 5 && fields[..3].iter().all(|f| f.parse::<f64>().is_ok()));
            let tasks: i64 = fields[3].split_once('/').unwrap().1.parse().unwrap();
            // Its first process, and what runs in it to read the file.
            assert!((1..=4).contains(&tasks), "{:?}: {text}", container.release);
        });
    });
}

/// Known: lxcfs reads files of the CFQ scheduler, which kernel 5.0 removed, and then serves the
/// node's values.
#[test]
fn diskstats_are_cgroups() {
    isolated(|| {
        each_release(|container| {
            // The device that was read most, and its sectors.
            let most = |text: &str, name: Option<&str>| -> (String, u64) {
                let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
                let disks = lines.filter(|f| name.is_none_or(|name| f[2] == name));
                let read = disks.map(|f| (f[2].to_owned(), f[5].parse().unwrap()));
                read.max_by_key(|(_, sectors)| *sectors).expect(text)
            };
            let node = || fs::read_to_string("/proc/diskstats").unwrap();
            let (disk, before) = most(&node(), None);
            let (_, value) = most(&container.read("/proc/diskstats"), Some(&disk));
            let (_, after) = most(&node(), Some(&disk));
            let io = container.own("blkio", "blkio.throttle.io_service_bytes_recursive");
            let io = fs::read_to_string(io).unwrap();
            let total = io.lines().find_map(|line| line.strip_prefix("Total "));
            let own: u64 = total.expect(&io).parse::<u64>().unwrap() / 512;
            let release = container.release;
            assert!(own < before, "{release:?}: the cgroup {own}, the node {before}");
            assert!((before..=after).contains(&value), "{release:?}: {value}, own {own}");
        });
    });
}
