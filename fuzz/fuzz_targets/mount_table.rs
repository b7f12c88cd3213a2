//! A mount table, at any root.
#![no_main]

use kube_lxcfs::mount::table::Table;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (&[u8], &[u8])| {
    let (text, root) = data;
    if let Ok(table) = Table::parse(text) {
        let _ = table.there(b"/", |group| group % 2 == 0);
        let _ = table.there(root, |_| false);
        let _ = table.top(root);
    }
});
