//! Containers with large mount tables and with hidden mount namespaces: no other container, and not
//! the node, waits for them or pays for them.

use std::{
    fs::{self, File},
    path::Path,
    sync::mpsc,
    time::Instant,
};

use kube_lxcfs::sys::statmount::{self, Buffer, Parts};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags},
    sched::{CloneFlags, setns, unshare},
    sys::signal::Signal,
};

use crate::{harness::*, restart::managed_devs};

fn namespace(pid: i32) -> File {
    File::open(format!("/proc/{pid}/ns/mnt")).unwrap()
}

/// Runs `work` on a thread in the mount namespace of a process.
fn inside(pid: i32, work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS).unwrap();
            setns(namespace(pid), CloneFlags::CLONE_NEWNS).unwrap();
            work();
        });
    });
}

fn bind(source: &str, target: &str) {
    nix::mount::mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

fn tmpfs(target: &str) {
    let flags = MsFlags::empty();
    nix::mount::mount(Some("none"), target, Some("tmpfs"), flags, None::<&str>).unwrap();
}

fn inject(lxcfs: &str, bare: &Bare) {
    succeeds(&["mount", "--pid", &bare.pid.to_string(), "--lxcfs-path", lxcfs]);
    assert_eq!(views(&bare.mountinfo()).len(), ALWAYS.len());
}

/// Makes so many mounts on paths that are so long that the mount table has more than 100 MB.
fn make_large_table(pid: i32) {
    inside(pid, || {
        tmpfs("/mnt");
        // The table has `\040` for each space, in the root and in the mount point.
        let deep = "/mnt".to_owned() + &("/".to_owned() + &" ".repeat(250)).repeat(7);
        for n in 0..8000 {
            let point = format!("{deep}/{n}");
            fs::create_dir_all(&point).unwrap();
            bind(&point, &point);
        }
    });
}

#[test]
fn large_table_is_its_containers_error_alone() {
    isolated(|| {
        let (lxcfs, other, hostile) = (Lxcfs::start(), Bare::start(), Bare::start());
        inject(lxcfs.path(), &other);
        make_large_table(hostile.pid);
        // As in a container with a memory limit.
        let limited = |args: &[&str]| {
            let mut command = program("prlimit");
            command.args(["--data=67108864", env!("CARGO_BIN_EXE_kube-lxcfs")]).args(args);
            command.output().unwrap()
        };
        let pid = hostile.pid.to_string();
        let mount = || limited(&["mount", "--pid", &pid, "--lxcfs-path", lxcfs.path()]);
        // From kernel 6.8 on, the table is read only if several mounts lie on a path.
        let procfs = fs::File::open("/proc").unwrap();
        if statmount::of(&procfs, Parts::Basic, &mut Buffer::default()).is_ok() {
            let output = mount();
            assert!(output.status.success(), "{}", stderr(&output));
            let detach = MntFlags::MNT_DETACH;
            inside(hostile.pid, || nix::mount::umount2("/proc/meminfo", detach).unwrap());
        }
        inside(hostile.pid, || (0..2).for_each(|_| bind("/proc/uptime", "/proc/meminfo")));
        let error = error_line(&mount());
        assert!(error.contains("mount table too large: more than 16777216 bytes"), "{error}");
        let output = limited(&["umount", "--all", "--pid-from", "proc"]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(views(&other.mountinfo()).is_empty());
    });
}

/// Copies of a container's mount namespace.
fn copies(bare: &Bare, count: usize) -> (Vec<Running>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let target = format!("--target={}", bare.pid);
    let copy = |n: usize| {
        let mut command = program("nsenter");
        command.args([&target, "--mount", "unshare", "--mount", "sleep", "3600"]);
        Running::start(&mut command, &dir.path().join(n.to_string()))
    };
    let copies: Vec<Running> = (0..count).map(copy).collect();
    for copy in &copies {
        eventually_true("the namespace is copied", || {
            fs::read_to_string(format!("/proc/{}/comm", copy.pid())).unwrap() == "sleep\n"
        });
    }
    (copies, dir)
}

/// Waits until no view comes from the lxcfs of this device.
fn recovered(pid: i32, dead: &str) {
    eventually_true("no view is dead", || {
        managed_devs(&mountinfo(pid)).iter().all(|dev| dev != dead)
    });
}

#[test]
fn stacked_binds_delay_no_other_container() {
    isolated(|| {
        let (lxcfs, hostile) = (Supervised::start(&[]), Bare::start());
        let others: Vec<Bare> = (0..8).map(|_| Bare::start()).collect();
        others.iter().for_each(|other| inject(lxcfs.path(), other));
        inside(hostile.pid, || (0..12_000).for_each(|_| bind("/proc/uptime", "/proc/meminfo")));
        let _copies = copies(&hostile, 20);
        let (killed, dead, started) = (lxcfs.lxcfs(), lxcfs_dev(&others[0]), Instant::now());
        lxcfs.signal_lxcfs(Signal::SIGKILL);
        others.iter().for_each(|other| recovered(other.pid, &dead));
        let recovered = started.elapsed();
        eventually_true("another lxcfs runs", || lxcfs.lxcfs() != killed);
        lxcfs.wait_until_serving();
        println!("recovered after {recovered:?}, serves after {:?}", started.elapsed());
        let namespaces = |entry: &serde_json::Value| entry["namespaces"].as_u64();
        eventually_true("the large tables are reported once", || {
            lxcfs.supervisor.entries().iter().find_map(namespaces) == Some(21)
        });
    });
}

#[test]
fn lxcfs_serves_before_the_recovery_is_over() {
    isolated(|| {
        // Before lxcfs, or their namespaces have a copy of its mount.
        let (other, hostile) = (Bare::start(), Bare::start());
        let lxcfs = Supervised::start(&[]);
        inject(lxcfs.path(), &other);
        inject(lxcfs.path(), &hostile);
        let dead = lxcfs_dev(&hostile);
        // A container can hold the locks of its own namespaces: more than the supervisor works on
        // concurrently.
        let (copies, _dir) = copies(&hostile, 300);
        let lock =
            |copy: &Running| Flock::lock(namespace(copy.pid()), FlockArg::LockExclusive).unwrap();
        let locks: Vec<Flock<File>> = copies.iter().map(lock).collect();
        lxcfs.signal_lxcfs(Signal::SIGKILL);
        recovered(other.pid, &dead);
        copies.iter().for_each(|copy| recovered(copy.pid(), &dead));
        drop(locks);
        let is_over = |entry: &serde_json::Value| entry["in_time"].is_boolean();
        eventually_true("the recovery is over", || lxcfs.supervisor.entries().iter().any(is_over));
        let entries = lxcfs.supervisor.entries();
        let mut serves = (0..entries.len()).filter(|n| entries[*n]["lxcfs"] == "serving");
        let (second, over) = (serves.nth(1), entries.iter().position(is_over));
        assert!(second.is_some() && second < over, "{}", lxcfs.supervisor.log());
    });
}

#[test]
fn namespace_that_is_not_swept_is_counted() {
    isolated(|| {
        let (mut lxcfs, hostile, pods) = (Lxcfs::start(), Bare::start(), Pods::start());
        let other = Bare::start();
        // Not stacked on a view file: the kernel detaches what is mounted on a file of lxcfs once a
        // look-up finds that lxcfs has exited.
        let pid = hostile.pid.to_string();
        succeeds(&["mount", "--pid", &pid, "--files", "uptime", "--lxcfs-path", lxcfs.path()]);
        inject(lxcfs.path(), &other);
        inside(hostile.pid, || (0..1100).for_each(|_| bind("/proc/version", "/proc/meminfo")));
        let dir = tempfile::tempdir().unwrap();
        let args = ["--node-name", "n1", "--lxcfs-path", lxcfs.path(), "--pid-from", "proc"];
        let kubeconfig = pods.kubeconfig();
        let agent = agent(dir.path(), &args, &[("KUBECONFIG", kubeconfig.to_str().unwrap())]);
        ready(&agent);
        let failures = || metric(&agent, "sweep_failures_total");
        assert!(failures().abs() < f64::EPSILON);
        lxcfs.process.kill();
        eventually_true("the sweep is counted as failed", || failures() >= 1.0);
        has_views("the other container", other.pid, 0);
        let failed = |entry: &serde_json::Value| entry["failed"] == 1;
        assert!(agent.entries().iter().any(failed), "{}", agent.log());
    });
}

/// The device number of a container's view.
fn lxcfs_dev(bare: &Bare) -> String {
    let table = bare.mountinfo();
    let view = table.lines().find(|line| line.contains(" - fuse.lxcfs ")).unwrap();
    view.split(' ').nth(2).unwrap().to_owned()
}

/// Kills lxcfs, and waits until no view is left in the mount table of a thread.
fn views_are_swept(lxcfs: &Supervised, thread: &Path) {
    let table = || fs::read_to_string(thread.join("mountinfo")).unwrap();
    assert_eq!(views(&table()).len(), ALWAYS.len());
    lxcfs.kill_for_good();
    eventually("the views are swept", || match views(&table()).as_slice() {
        [] => Ok(()),
        left => Err(format!("{left:?}")),
    });
}

/// Runs `work` while a thread of this process is in a copy of the container's mount namespace.
/// It gets the directory of the thread in `/proc`.
fn with_thread_in_copy(bare: &Bare, work: impl FnOnce(&Path)) {
    let (tid_tx, tid) = mpsc::channel();
    let (done_tx, done) = mpsc::channel::<()>();
    let pid = bare.pid;
    let thread = std::thread::spawn(move || {
        inside(pid, move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            tid_tx.send(nix::unistd::gettid()).unwrap();
            let _ = done.recv();
        });
    });
    work(Path::new(&format!("/proc/self/task/{}", tid.recv().unwrap())));
    drop(done_tx);
    thread.join().unwrap();
}

#[test]
fn namespace_of_a_single_thread_is_swept() {
    isolated(|| {
        let (lxcfs, bare) = (Supervised::start_mortal(), Bare::start());
        inject(lxcfs.path(), &bare);
        with_thread_in_copy(&bare, |thread| views_are_swept(&lxcfs, thread));
    });
}

#[test]
fn view_that_only_a_thread_has_is_probed() {
    isolated(|| {
        let (mut lxcfs, bare) = (Lxcfs::start(), Bare::start());
        inject(lxcfs.path(), &bare);
        with_thread_in_copy(&bare, |thread| {
            succeeds(&["umount", "--pid", &bare.pid.to_string()]);
            lxcfs.process.kill();
            // Not the lxcfs at the path: only a probe shows its state.
            let status = succeeds(&["status", "--pid-from", "proc", "--lxcfs-path", "/var/empty"]);
            assert_eq!(status.matches(" dead ").count(), 1, "{status}");
            // A supervisor of another path sweeps it at its start.
            let _other = Supervised::start(&[]);
            let table = fs::read_to_string(thread.join("mountinfo")).unwrap();
            assert_eq!(views(&table), Vec::<String>::new());
        });
    });
}

#[test]
fn namespace_of_an_exited_main_thread_is_swept() {
    isolated(|| {
        let (lxcfs, bare) = (Supervised::start_mortal(), Bare::start());
        inject(lxcfs.path(), &bare);
        let script = "import ctypes, platform, threading, time\n\
                      libc = ctypes.CDLL(None)\n\
                      libc.unshare(0x20000)\n\
                      threading.Thread(target=time.sleep, args=(3600,)).start()\n\
                      libc.syscall({'x86_64': 60}.get(platform.machine(), 93), 0)\n";
        let dir = tempfile::tempdir().unwrap();
        let mut command = program("nsenter");
        let target = format!("--target={}", bare.pid);
        command.args([&target, "--mount", "python3", "-c", script]);
        let process = Running::start(&mut command, &dir.path().join("log"));
        let tasks = format!("/proc/{}/task", process.pid());
        let task = eventually("only the second thread lives", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
            let tasks = fs::read_dir(&tasks).unwrap().flatten();
            let main = process.pid().to_string();
            let mut others = tasks.filter(|task| task.file_name() != *main);
            others.next().filter(|_| stat.contains(") Z ")).ok_or(stat + &process.log())
        });
        views_are_swept(&lxcfs, &task.path());
    });
}
