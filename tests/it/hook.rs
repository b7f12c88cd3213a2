//! `kube-lxcfs hook` with runc, crun and podman: the first read shows the container's own values,
//! and the container starts even if the hook fails.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use nix::sys::signal::Signal;

use crate::{
    harness::*,
    starts::{FIRST, own},
};

/// A bundle of busybox, with the hook.
struct Bundle {
    dir: tempfile::TempDir,
    lxcfs: PathBuf,
}

impl Bundle {
    fn new(lxcfs: &Path) -> Bundle {
        let dir = tempfile::Builder::new().prefix("klhook").tempdir().unwrap();
        let bin = dir.path().join("rootfs/bin");
        for folder in ["bin", "proc", "sys", "dev", "tmp", "etc", "run"] {
            fs::create_dir_all(dir.path().join("rootfs").join(folder)).unwrap();
        }
        fs::copy(program("busybox").get_program(), bin.join("busybox")).unwrap();
        for applet in ["sh", "head", "cut", "cat"] {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
        }
        Bundle { dir, lxcfs: lxcfs.to_owned() }
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn hook(&self) -> serde_json::Value {
        let args = [
            "kube-lxcfs",
            "hook",
            "--lxcfs-path",
            self.lxcfs.to_str().unwrap(),
            "--log-file",
            &self.at("log"),
        ];
        serde_json::json!({"path": env!("CARGO_BIN_EXE_kube-lxcfs"), "args": args})
    }

    /// Runs the container with an OCI runtime; the hook is called at this stage.
    fn run(&self, runtime: &str, stage: &str, annotations: serde_json::Value) -> Output {
        let path = self.at("config.json");
        let _ = fs::remove_file(&path);
        let made = program(runtime).args(["spec", "--bundle", &self.at("")]).output().unwrap();
        assert!(made.status.success(), "{}", stderr(&made));
        let mut config: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = serde_json::json!(["sh", "-c", FIRST]);
        // This machine's root may not raise limits.
        config["process"]["rlimits"] = serde_json::json!([]);
        config["annotations"] = annotations;
        config["linux"]["resources"] = serde_json::json!({
            "memory": {"limit": MEMORY_MIB << 20},
            "cpu": {"quota": 50_000, "period": 100_000},
        });
        config["hooks"] = serde_json::json!({stage: [self.hook()]});
        fs::write(&path, config.to_string()).unwrap();
        let id = self.dir.path().file_name().unwrap().to_str().unwrap();
        self.command(&[runtime, "--root", &self.at("state"), "run", "--bundle", &self.at(""), id])
    }

    /// Where cgroups are hybrid, crun wants the unified ones out of sight.
    fn command(&self, command: &[&str]) -> Output {
        let script =
            "if [ -d /sys/fs/cgroup/unified ]; then umount /sys/fs/cgroup/unified; fi; exec \"$@\"";
        let mut all = program("unshare");
        all.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
        all.arg(program(command[0]).get_program()).args(&command[1..]).stdin(Stdio::null());
        all.output().unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.at("log")).unwrap_or_default()
    }
}

fn wants_view() -> serde_json::Value {
    serde_json::json!({"kube-lxcfs.io/inject": "true"})
}

#[test]
fn runc_and_crun_first_read_is_own() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let bundle = Bundle::new(&lxcfs.path);
        for (runtime, stage) in [
            ("runc", "createRuntime"),
            ("runc", "prestart"),
            ("crun", "createRuntime"),
            ("crun", "prestart"),
        ] {
            let output = bundle.run(runtime, stage, wants_view());
            assert!(
                own(&stdout(&output)),
                "{runtime} {stage}: {} {} {}",
                stdout(&output),
                stderr(&output),
                bundle.log()
            );
        }
        assert_eq!(bundle.log().matches("view injected").count(), 4, "{}", bundle.log());
        let output = bundle.run("runc", "createRuntime", serde_json::json!({}));
        assert!(output.status.success() && !own(&stdout(&output)), "{}", stdout(&output));
    });
}

#[test]
fn podman_first_read_is_own() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let bundle = Bundle::new(&lxcfs.path);
        fs::create_dir(bundle.at("hooks")).unwrap();
        let when = serde_json::json!({"annotations": {"^kube-lxcfs\\.io/inject$": "^true$"}});
        let hook = serde_json::json!({
            "version": "1.0.0",
            "hook": bundle.hook(),
            "when": when,
            "stages": ["createRuntime"],
        });
        fs::write(bundle.at("hooks/kube-lxcfs.json"), hook.to_string()).unwrap();
        let (root, runroot, tmp, hooks) =
            (bundle.at("storage"), bundle.at("run"), bundle.at("tmp"), bundle.at("hooks"));
        let places = [
            "podman",
            "--root",
            &root,
            "--runroot",
            &runroot,
            "--tmpdir",
            &tmp,
            "--hooks-dir",
            &hooks,
        ];
        let how = [
            "--cgroup-manager",
            "cgroupfs",
            "--runtime",
            "crun",
            "run",
            "--rm",
            "--network",
            "host",
        ];
        let memory = format!("{MEMORY_MIB}m");
        let limits = [
            "--memory",
            &memory,
            "--cpus",
            "0.5",
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1024:1024",
        ];
        let rootfs = bundle.at("rootfs");
        let what =
            ["--annotation", "kube-lxcfs.io/inject=true", "--rootfs", &rootfs, "sh", "-c", FIRST];
        let output = bundle.command(&[&places[..], &how, &limits, &what].concat());
        // Its overlay storage stays mounted on itself.
        unmount(Path::new(&bundle.at("storage/overlay")));
        assert!(own(&stdout(&output)), "{} {} {}", stdout(&output), stderr(&output), bundle.log());
    });
}

#[test]
fn hook_failure_is_logged_and_container_starts() {
    isolated(|| {
        let lxcfs = Lxcfs::start();
        let bundle = Bundle::new(&lxcfs.path);
        let starts = |what: &str, annotations: serde_json::Value| {
            let _ = fs::remove_file(bundle.at("log"));
            let output = bundle.run("runc", "createRuntime", annotations);
            assert!(output.status.success(), "{what}: {}", stderr(&output));
            assert!(
                stdout(&output).starts_with("MemTotal:") && !own(&stdout(&output)),
                "{what}: {}",
                stdout(&output)
            );
            bundle.log()
        };
        let log = starts("an annotation", serde_json::json!({"kube-lxcfs.io/inject": "yes"}));
        assert!(log.contains("kube-lxcfs.io/inject: 'yes'"), "{log}");
        lxcfs.process.signal(Signal::SIGSTOP);
        let log = starts("lxcfs hangs", wants_view());
        lxcfs.process.signal(Signal::SIGCONT);
        assert!(log.contains("timed out after 1s"), "{log}");
        drop(lxcfs);
        let log = starts("no lxcfs", wants_view());
        assert!(log.contains("lxcfs path") && log.contains("without a view"), "{log}");
    });
}

#[test]
fn invalid_state_is_reported_with_exit_0() {
    isolated(|| {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("bundle");
        fs::create_dir(&bundle).unwrap();
        let state = |bundle: &Path| {
            format!(
                r#"{{"id":"a","pid":{},"bundlePath":"{}"}}"#,
                std::process::id(),
                bundle.display()
            )
        };
        let mut cases = vec![
            (String::new(), "failed to parse the container's state"),
            ("{".into(), "failed to parse the container's state"),
            ("{}".into(), "no bundle"),
            (state(&dir.path().join("none")), "none/config.json: No such file"),
        ];
        fs::write(bundle.join("config.json"), "[").unwrap();
        cases.push((state(&bundle), "failed to parse config.json"));
        for (state, why) in cases {
            let mut hook = kube_lxcfs();
            let mut child = hook
                .arg("hook")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(state.as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(
                output.status.success() && stderr(&output).contains(why),
                "{state}: {}",
                stderr(&output)
            );
        }
        // Even a wrong command line keeps no container from starting.
        let output = run(&["hook", "--no-such-flag"]);
        assert!(output.status.success() && stderr(&output).contains("--no-such-flag"));
    });
}
