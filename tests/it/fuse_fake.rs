//! A FUSE file system of the type `fuse.lxcfs` that is no lxcfs. The tests compile it; see
//! hostile_lxcfs.rs.
//!
//!     fuse_fake hang|hang-lookup|busy|ENOTCONN DEVICE DIR SCRIPT
//!
//! It mounts itself by the FUSE device DEVICE at DIR, runs SCRIPT with sh, and then writes `ready`
//! to standard output. It has every directory and file that is looked up. An open of a file gets no
//! reply, or is refused. With `hang-lookup`, a lookup gets no reply. With `busy`, an open and a
//! read succeed. From the fifth read on, a read first uses 1.5 s of CPU time. From the eighth on,
//! it never returns, and uses CPU time.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    process::Command,
    time::{Duration, Instant},
};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const OPEN: u32 = 14;
const READ: u32 = 15;
const OPENDIR: u32 = 27;
const ENOSYS: i32 = 38;
const ENOTCONN: i32 = 107;
/// Files have even node ids, directories odd ones, as the root has.
const FILE: u64 = 2;
const DIRECTORY: u64 = 3;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, mode, device, dir, script] = args.as_slice() else {
        panic!("fuse_fake hang|hang-lookup|busy|ENOTCONN DEVICE DIR SCRIPT")
    };
    let fuse = OpenOptions::new().read(true).write(true).open(device).expect("the device");
    let stdin = fuse.try_clone().expect("a descriptor");
    let (dir, script) = (dir.clone(), script.clone());
    std::thread::spawn(move || {
        let options = "fd=0,rootmode=40000,user_id=0,group_id=0,allow_other";
        let mut mount = Command::new("mount");
        mount.args(["-i", "-n", "-t", "fuse.lxcfs", "-o", options, "lxcfs", &dir]).stdin(stdin);
        assert!(mount.status().expect("mount").success());
        assert!(Command::new("sh").args(["-ec", &script]).status().expect("sh").success());
        println!("ready");
    });
    serve(fuse, mode);
}

fn serve(mut fuse: File, mode: &str) {
    let (mut request, mut reads) = (vec![0; 1 << 20], 0);
    loop {
        let Ok(length) = fuse.read(&mut request) else { continue };
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        let (opcode, unique, node) = (number(4), long(8), long(16));
        let answer = match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            INIT => Ok(init()),
            LOOKUP if mode == "hang-lookup" => continue,
            LOOKUP => {
                let name = &request[40..length - 1];
                Ok(entry(if name == b"proc" { DIRECTORY } else { FILE }))
            }
            GETATTR => Ok([&3600u64.to_ne_bytes()[..], &[0; 8], &attributes(node)].concat()),
            OPEN | OPENDIR if mode == "hang" => continue,
            // `struct fuse_open_out`, with FOPEN_DIRECT_IO.
            OPEN if mode == "busy" => Ok([&[0; 8][..], &1u32.to_ne_bytes(), &[0; 4]].concat()),
            READ if mode == "busy" => {
                reads += 1;
                match reads {
                    1..5 => {}
                    5..8 => spin(Some(Duration::from_millis(1500))),
                    _ => spin(None),
                }
                Ok(b"1.00 1.00\n"[usize::try_from(long(48)).unwrap().min(10)..].to_vec())
            }
            OPEN | OPENDIR => Err(ENOTCONN),
            _ => Err(ENOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (-error, Vec::new()),
        };
        let length = u32::try_from(16 + body.len()).unwrap().to_ne_bytes();
        let answer = [&length[..], &error.to_ne_bytes(), &unique.to_ne_bytes(), &body].concat();
        let _ = fuse.write(&answer);
    }
}

/// Uses CPU time, for ever without a limit.
fn spin(limit: Option<Duration>) {
    let started = Instant::now();
    while limit.is_none_or(|limit| started.elapsed() < limit) {
        std::hint::spin_loop();
    }
}

/// `struct fuse_init_out` of protocol 7.31.
fn init() -> Vec<u8> {
    let mut body = vec![0; 64];
    body[0..4].copy_from_slice(&7u32.to_ne_bytes());
    body[4..8].copy_from_slice(&31u32.to_ne_bytes());
    body[20..24].copy_from_slice(&4096u32.to_ne_bytes());
    body
}

/// `struct fuse_entry_out`, valid for an hour.
fn entry(node: u64) -> Vec<u8> {
    let hour = 3600u64.to_ne_bytes();
    [&node.to_ne_bytes()[..], &[0; 8], &hour, &hour, &[0; 8], &attributes(node)].concat()
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let mode: u32 = if node == FILE { 0o100_444 } else { 0o40_555 };
    let mut body = vec![0; 88];
    body[0..8].copy_from_slice(&node.to_ne_bytes());
    body[60..64].copy_from_slice(&mode.to_ne_bytes());
    body[64..68].copy_from_slice(&1u32.to_ne_bytes());
    body
}
