//! Views in real containers of a real containerd, asked for by the annotations of pod sandboxes.

use std::fs;

use crate::harness::*;

/// The view files that lxcfs 5 and later always serve, as mount points.
pub(crate) const ALWAYS: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/sys/devices/system/cpu",
];

#[test]
fn pods_that_opt_in_see_their_own_values_and_others_are_left_alone() {
    let (lxcfs, containerd) = (Lxcfs::start(), Containerd::start());
    let inject = ("kube-lxcfs.io/inject", "true");
    let run = |name: &str, annotations: &[(&str, &str)], containers: &[&str]| {
        containerd.run(&PodSpec { name, annotations, containers })
    };
    let all = run("all", &[inject], &["a", "b"]);
    let files = run("files", &[inject, ("kube-lxcfs.io/files", "meminfo,uptime")], &["a"]);
    let one = run("one", &[inject, ("kube-lxcfs.io/containers", "b")], &["a", "b"]);
    let none = run("none", &[], &["a"]);
    let wrong = run("wrong", &[inject, ("kube-lxcfs.io/files", "memory")], &["a"]);
    let table = |id: &str| mountinfo(containerd.pid(id));
    let untouched = [&none.containers["a"], &one.containers["a"], &wrong.containers["a"]];
    let before = untouched.map(|id| table(id));

    let args = [
        "--pods-from",
        "cri",
        "--lxcfs-path",
        lxcfs.path(),
        "--cri-endpoint",
        &containerd.endpoint(),
    ];
    let agent = agent(containerd.dir.path(), &args, &[]);
    for id in all.containers.values().chain([&one.containers["b"]]) {
        eventually_true("the view is there", || views(&table(id)).len() >= ALWAYS.len());
        assert!(
            ALWAYS.iter().all(|file| views(&table(id)).contains(&(*file).to_owned())),
            "{:?}",
            views(&table(id))
        );
        assert!(containerd.sees_its_own_memory(id));
        assert_eq!(
            containerd.exec(id, &["grep", "-c", "^processor", "/proc/cpuinfo"]).trim(),
            "1",
            "half a CPU is one"
        );
        assert_eq!(containerd.exec(id, &["cat", "/sys/devices/system/cpu/online"]).trim(), "0");
        let uptime: f64 =
            containerd.exec(id, &["cut", "-d ", "-f1", "/proc/uptime"]).trim().parse().unwrap();
        let host: f64 =
            fs::read_to_string("/proc/uptime").unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(uptime < 120.0 && host > uptime, "container {uptime}, host {host}");
    }
    let id = &files.containers["a"];
    eventually_true("the files are there", || {
        views(&table(id)) == ["/proc/meminfo", "/proc/uptime"]
    });
    assert!(containerd.sees_its_own_memory(id));
    assert_ne!(containerd.exec(id, &["grep", "-c", "^processor", "/proc/cpuinfo"]).trim(), "1");

    assert_eq!(before, untouched.map(|id| table(id)), "nobody else was touched");
    assert!(agent.log().contains("annotation kube-lxcfs.io/files: 'memory' is not understood"));
    // Nothing of lxcfs but the view files can be seen in the container.
    assert_eq!(
        table(&all.containers["a"]).matches("fuse.lxcfs").count(),
        views(&table(&all.containers["a"])).len()
    );
}

#[test]
fn the_agents_going_and_coming_changes_no_view() {
    let (lxcfs, containerd) = (Lxcfs::start(), Containerd::start());
    let pod = containerd.run(&PodSpec {
        name: "p",
        annotations: &[("kube-lxcfs.io/inject", "true")],
        containers: &["a"],
    });
    let id = &pod.containers["a"];
    let table = || mountinfo(containerd.pid(id));
    let args = [
        "--pods-from",
        "cri",
        "--lxcfs-path",
        lxcfs.path(),
        "--cri-endpoint",
        &containerd.endpoint(),
    ];
    let mut first = agent(containerd.dir.path(), &args, &[]);
    eventually_true("the view is there", || views(&table()).len() >= ALWAYS.len());
    let before = table();
    let begun = std::time::Instant::now();
    first.terminate();
    assert!(begun.elapsed().as_secs() < 5, "SIGTERM ends it promptly");
    assert_eq!(table(), before);
    let mut second = agent(containerd.dir.path(), &args, &[]);
    eventually_true("it has looked", || second.log().contains("end container"));
    assert_eq!(table(), before);
    second.kill();
    assert_eq!(table(), before);
    assert!(containerd.sees_its_own_memory(id));
}

#[test]
fn views_are_put_in_and_taken_out_by_container_id_with_and_without_cri() {
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
    let status: serde_json::Value =
        serde_json::from_str(&succeeds(&["status", "-o", "json"])).unwrap();
    let mine = status.as_array().unwrap().iter().find(|s| s["id"] == a.as_str()).unwrap();
    assert_eq!((mine["pod"].as_str(), mine["container"].as_str()), (Some("p"), Some("a")));
    assert_eq!(
        (&mine["files"]["meminfo"], mine["pid"].as_i64()),
        (&"current".into(), Some(i64::from(pid_a)))
    );
    assert!(succeeds(&["mount", "--container", &a]).contains("nothing to do"));

    let unknown = fails(&["mount", "--container", "ffffffffffffff"]);
    assert!(unknown.contains("'ffffffffffffff': no running container"), "{unknown}");
    let ambiguous_prefix = (1..a.len()).map(|n| &a[..n]).find(|p| !b.starts_with(p));
    if let Some(prefix) = ambiguous_prefix.filter(|p| p.len() > 1).map(|p| &p[..p.len() - 1]) {
        let told = fails(&["umount", "--container", prefix]);
        assert!(told.contains("2 running containers"), "{told}");
    }

    // The runtime is away: pids come from /proc.
    containerd.down();
    succeeds(&["mount", "--container", &b]);
    assert_eq!(views(&mountinfo(pid_a)).len(), ALWAYS.len());
    let refused = fails(&["umount", "--pid-from", "cri", "--container", &a]);
    assert!(
        refused.contains("CRI endpoint") && refused.contains("is the runtime running?"),
        "{refused}"
    );
    succeeds(&["umount", "--pid-from", "proc", "--container", &a]);
    assert!(views(&mountinfo(pid_a)).is_empty());
    containerd.up();
    assert!(!containerd.sees_its_own_memory(&a));
    assert!(containerd.sees_its_own_memory(&b));
    succeeds(&["umount", "--container", &b]);
    assert!(!containerd.sees_its_own_memory(&b));
}

#[test]
fn a_runtime_that_is_away_is_told_once_and_found_again() {
    let (lxcfs, mut containerd) = (Lxcfs::start(), Containerd::start());
    let pod = containerd.run(&PodSpec {
        name: "p",
        annotations: &[("kube-lxcfs.io/inject", "true")],
        containers: &["a"],
    });
    containerd.down();
    let endpoint = containerd.endpoint();
    let args = ["--pods-from", "cri", "--lxcfs-path", lxcfs.path(), "--cri-endpoint", &endpoint];
    let agent = agent(containerd.dir.path(), &args, &[]);
    std::thread::sleep(std::time::Duration::from_secs(4));
    assert_eq!(agent.log().matches("WARN").count(), 1, "{}", agent.log());
    containerd.up();
    eventually_true("the view is there", || containerd.sees_its_own_memory(&pod.containers["a"]));
    assert!(agent.log().contains("the runtime answers again"));
}
