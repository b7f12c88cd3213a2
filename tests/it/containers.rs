//! Views in containers of a real containerd, requested by the annotations of pod sandboxes.

use std::{fs, path::Path, time::Instant};

use crate::harness::*;

/// The agent of a node without an API server.
fn cri_agent(containerd: &Containerd, lxcfs: &Lxcfs) -> Running {
    let endpoint = containerd.endpoint();
    let args = ["--pods-from", "cri", "--lxcfs-path", lxcfs.path(), "--cri-endpoint", &endpoint];
    agent(containerd.dir.path(), &args, &[])
}

#[test]
fn opted_in_pods_read_own_values_others_unchanged() {
    isolated(|| {
        let (lxcfs, containerd) = (Lxcfs::start(), Containerd::start());
        let started = Instant::now();
        let run = |name: &str, annotations: &[(&str, &str)], containers: &[&str]| {
            containerd.run(&PodSpec { name, annotations, containers })
        };
        let all = run("all", &[INJECT], &["a", "b"]);
        let files = run("files", &[INJECT, ("kube-lxcfs.io/files", "meminfo,uptime")], &["a"]);
        let one = run("one", &[INJECT, ("kube-lxcfs.io/containers", "b")], &["a", "b"]);
        let none = run("none", &[], &["a"]);
        let wrong = run("wrong", &[INJECT, ("kube-lxcfs.io/files", "memory")], &["a"]);
        let table = |id: &str| mountinfo(containerd.pid(id));
        let unchanged = [&none.containers["a"], &one.containers["a"], &wrong.containers["a"]];
        let before = unchanged.map(|id| table(id));

        let agent = cri_agent(&containerd, &lxcfs);
        for id in all.containers.values().chain([&one.containers["b"]]) {
            has_views("the container", containerd.pid(id), ALWAYS.len());
            assert_eq!(views(&table(id)), ALWAYS);
            assert!(containerd.sees_its_own_memory(id));
            let count = containerd.exec(id, &["grep", "-c", "^processor", "/proc/cpuinfo"]);
            assert_eq!(count.trim(), "1", "half a CPU is one");
            let online = containerd.exec(id, &["cat", "/sys/devices/system/cpu/online"]);
            assert_eq!(online.trim(), "0");
            let uptime = containerd.exec(id, &["cut", "-d ", "-f1", "/proc/uptime"]);
            let uptime: f64 = uptime.trim().parse().unwrap();
            let host = fs::read_to_string("/proc/uptime").unwrap();
            let host: f64 = host.split(' ').next().unwrap().parse().unwrap();
            let age = started.elapsed().as_secs_f64() + 1.0;
            assert!(uptime < age && host > uptime, "container {uptime} of {age}, host {host}");
        }
        let id = &files.containers["a"];
        has_views("the container", containerd.pid(id), 2);
        assert_eq!(views(&table(id)), ["/proc/meminfo", "/proc/uptime"]);
        assert!(containerd.sees_its_own_memory(id));
        let count = containerd.exec(id, &["grep", "-c", "^processor", "/proc/cpuinfo"]);
        assert_ne!(count.trim(), "1");

        assert_eq!(before, unchanged.map(|id| table(id)), "no other container was changed");
        eventually_true("the invalid annotation is reported", || {
            agent.logged(&[("reason", "LxcfsInvalidAnnotation"), ("pod", "default/wrong")]) == 1
        });
        assert!(agent.log().contains("kube-lxcfs.io/files: 'memory'"), "{}", agent.log());
        // Nothing of lxcfs but the view files can be seen in the container.
        let table = table(&all.containers["a"]);
        assert_eq!(table.matches("fuse.lxcfs").count(), views(&table).len());
    });
}

#[test]
fn agent_restart_changes_no_view() {
    isolated(|| {
        let (lxcfs, containerd) = (Lxcfs::start(), Containerd::start());
        let spec = PodSpec { name: "p", annotations: &[INJECT], containers: &["a"] };
        let pod = containerd.run(&spec);
        let id = &pod.containers["a"];
        let table = || mountinfo(containerd.pid(id));
        let mut first = cri_agent(&containerd, &lxcfs);
        has_views("the container", containerd.pid(id), ALWAYS.len());
        let before = table();
        first.signal(nix::sys::signal::Signal::SIGTERM);
        eventually_true("SIGTERM ends it", || !first.is_running());
        assert_eq!(table(), before);
        let mut second = cri_agent(&containerd, &lxcfs);
        reconciled(&second, "default/p/a");
        assert_eq!(table(), before);
        second.kill();
        assert_eq!(table(), before);
        assert!(containerd.sees_its_own_memory(id));
    });
}

#[test]
fn mount_and_umount_work_with_and_without_cri() {
    isolated(|| {
        let (lxcfs, mut containerd) = (Lxcfs::start(), Containerd::start());
        let pod = containerd.run(&PodSpec { name: "p", annotations: &[], containers: &["a", "b"] });
        let (a, b) = (pod.containers["a"].clone(), pod.containers["b"].clone());
        let endpoint = containerd.endpoint();
        let common = ["--lxcfs-path", lxcfs.path(), "--cri-endpoint", &endpoint];
        let succeeds = |args: &[&str]| succeeds(&[args, &common].concat());
        let fails = |args: &[&str]| fails(&[args, &common].concat());
        let pid_a = containerd.pid(&a);

        succeeds(&["mount", "--container", &a[..12]]);
        assert!(containerd.sees_its_own_memory(&a));
        assert!(!containerd.sees_its_own_memory(&b));
        let status = succeeds(&["status", "-o", "json"]);
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let row = status.as_array().unwrap().iter().find(|s| s["id"] == a.as_str()).unwrap();
        assert_eq!((row["pod"].as_str(), row["container"].as_str()), (Some("p"), Some("a")));
        assert_eq!(row["files"]["meminfo"], "current");
        assert_eq!(row["pid"].as_i64(), Some(i64::from(pid_a)));
        assert!(succeeds(&["mount", "--container", &a]).contains("nothing to do"));

        let unknown = fails(&["mount", "--container", "ffffffffffffff"]);
        assert!(unknown.contains("'ffffffffffffff': no running container"), "{unknown}");
        let ambiguous = (1..a.len()).map(|n| &a[..n]).find(|p| !b.starts_with(p));
        if let Some(prefix) = ambiguous.filter(|p| p.len() > 1).map(|p| &p[..p.len() - 1]) {
            let error = fails(&["umount", "--container", prefix]);
            assert!(error.contains("2 running containers"), "{error}");
        }

        // The runtime is down: pids come from /proc.
        containerd.down();
        succeeds(&["mount", "--container", &b]);
        assert_eq!(views(&mountinfo(pid_a)).len(), ALWAYS.len());
        let refused = fails(&["umount", "--pid-from", "cri", "--container", &a]);
        assert!(refused.contains("CRI endpoint") && refused.contains("runtime"), "{refused}");
        succeeds(&["umount", "--pid-from", "proc", "--container", &a]);
        assert!(views(&mountinfo(pid_a)).is_empty());
        containerd.up();
        assert!(!containerd.sees_its_own_memory(&a));
        assert!(containerd.sees_its_own_memory(&b));
        succeeds(&["umount", "--container", &b]);
        assert!(!containerd.sees_its_own_memory(&b));
    });
}

#[test]
fn runtime_outage_is_logged_once_and_recovers() {
    isolated(|| {
        let (lxcfs, mut containerd) = (Lxcfs::start(), Containerd::start());
        let spec = PodSpec { name: "p", annotations: &[INJECT], containers: &["a"] };
        let pod = containerd.run(&spec);
        containerd.down();
        let agent = cri_agent(&containerd, &lxcfs);
        let outage = |state: &str| agent.logged(&[("subject", "pods"), ("outage", state)]);
        eventually_true("the outage is logged", || outage("started") == 1);
        std::thread::sleep(std::time::Duration::from_secs(4));
        assert_eq!(agent.logged(&[("level", "WARN")]), 1, "{}", agent.log());
        containerd.up();
        has_views("the container", containerd.pid(&pod.containers["a"]), ALWAYS.len());
        assert!(containerd.sees_its_own_memory(&pod.containers["a"]));
        assert_eq!((outage("started"), outage("recovered")), (1, 1), "{}", agent.log());
    });
}

/// The chart gives lxcfs the node's cgroups read-only.
#[test]
fn lxcfs_serves_own_values_from_read_only_cgroups() {
    isolated(|| {
        let reader = Reader::start(std::time::Duration::from_millis(50));
        let table = own_mountinfo();
        let cgroups: Vec<&str> = table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| Path::new(point).starts_with("/sys/fs/cgroup"))
            .collect();
        // The mounts of this test only, not the file systems.
        let remount = |access: &str| {
            for point in &cgroups {
                let options = format!("remount,bind,{access}");
                let output = program("mount").args(["-o", &options, point]).output().unwrap();
                assert!(output.status.success(), "{point}: {}", stderr(&output));
            }
        };
        assert!(!cgroups.is_empty(), "{table}");
        remount("ro");
        let lxcfs = Supervised::start(&[]);
        let pid = reader.pid().to_string();
        succeeds(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        reader.go();
        std::thread::sleep(std::time::Duration::from_millis(500));
        let seen = reader.stop();
        remount("rw");
        assert_eq!((seen.host, seen.errors), (0, 0), "{seen:?}");
        assert!(seen.own > 0, "{seen:?}");
    });
}
