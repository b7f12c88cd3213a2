//! A reader inside a container: opens and reads view files again and again, and counts what it sees. Compiled by the tests,
//! statically, so that it runs in any container; see `Reader` in harness.rs.
//!
//!     reader OUT OWN_KIB PAUSE_MS FILE...
//!
//! Begins when OUT.go is there and ends when OUT.stop is; then OUT says `own host errors last_error_ns last_host_ns rounds`, times
//! since the epoch. And again.

use std::{fs, io::Read, path::Path, time::{Duration, SystemTime, UNIX_EPOCH}};

fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos()
}

fn read(path: &str, text: &mut Vec<u8>) -> std::io::Result<()> {
    text.clear();
    fs::File::open(path)?.read_to_end(text).map(drop)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, out, own_kib, pause, files @ ..] = args.as_slice() else { panic!("reader OUT OWN_KIB PAUSE_MS FILE...") };
    let own_total = own_kib.as_bytes();
    let pause = Duration::from_millis(pause.parse().expect("a number of milliseconds"));
    loop {
        while fs::remove_file(format!("{out}.go")).is_err() {
            std::thread::sleep(Duration::from_millis(100));
        }
        count(out, own_total, pause, files);
    }
}

fn count(out: &str, own_total: &[u8], pause: Duration, files: &[String]) {
    let stop = format!("{out}.stop");
    let (mut own, mut host, mut errors, mut last_error, mut last_host, mut rounds) = (0u64, 0u64, 0u64, 0u128, 0u128, 0usize);
    let mut text = Vec::new();
    fs::write(format!("{out}.started"), "").expect("the folder is writable");
    while !Path::new(&stop).exists() {
        // MemTotal tells whose value it is; of the others one each time.
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
    let told = format!("{own} {host} {errors} {last_error} {last_host} {rounds}");
    fs::write(format!("{out}.part"), told).and_then(|()| fs::rename(format!("{out}.part"), out)).expect("the folder is writable");
}
