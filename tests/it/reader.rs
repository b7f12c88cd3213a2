//! A reader inside a container: opens and reads view files all the time, and counts what it sees.
//! The tests compile it statically, so that it runs in any container; see harness/reader.rs.
//!
//!     reader OUT OWN_KIB PAUSE_MS FILE...
//!
//! It starts when OUT.go exists and stops when OUT.stop does. Then OUT has
//! `own host errors last_error last_host rounds`, times in ns since the epoch. Then it waits for
//! OUT.go again.

use std::{
    fs,
    io::Read,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos()
}

fn read(path: &str, text: &mut Vec<u8>) -> std::io::Result<()> {
    text.clear();
    fs::File::open(path)?.read_to_end(text).map(drop)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, out, own_kib, pause, files @ ..] = args.as_slice() else {
        panic!("reader OUT OWN_KIB PAUSE_MS FILE...")
    };
    let own_total = own_kib.as_bytes();
    let pause = Duration::from_millis(pause.parse().expect("a number of milliseconds"));
    loop {
        while fs::remove_file(format!("{out}.go")).is_err() {
            std::thread::sleep(Duration::from_millis(100));
        }
        let counts = count(out, own_total, pause, files);
        let part = format!("{out}.part");
        let written = fs::write(&part, counts).and_then(|()| fs::rename(&part, out));
        written.expect("the directory is writable");
    }
}

fn count(out: &str, own_total: &[u8], pause: Duration, files: &[String]) -> String {
    let stop = format!("{out}.stop");
    let (mut own, mut host, mut errors, mut rounds) = (0, 0, 0, 0);
    let (mut last_error, mut last_host) = (0, 0);
    let mut text = Vec::new();
    fs::write(format!("{out}.started"), "").expect("the directory is writable");
    while !Path::new(&stop).exists() {
        // MemTotal shows whose value it is; of the other files one is read each time.
        for path in ["/proc/meminfo", files[rounds % files.len()].as_str()] {
            match read(path, &mut text) {
                Ok(()) if path == "/proc/meminfo" => {
                    let total = text.split(|b| *b == b'\n').next().unwrap_or_default();
                    if total.split(|b| *b == b' ').any(|word| word == own_total) {
                        own += 1;
                    } else {
                        host += 1;
                        last_host = now();
                    }
                }
                Ok(()) => {}
                Err(_) => {
                    errors += 1;
                    last_error = now();
                }
            }
        }
        rounds += 1;
        std::thread::sleep(pause);
    }
    format!("{own} {host} {errors} {last_error} {last_host} {rounds}")
}
