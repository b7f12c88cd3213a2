//! A mount table, with any root directory.
#![no_main]

use kube_lxcfs::{
    mount::{TableLimit, observe::observe, table},
    sys::mountinfo::MountTable,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (&[u8], &[u8])| {
    let (text, root) = data;
    let _ = table::read(text, root, TableLimit::Normal);
    if let Ok(table) = MountTable::parse(text) {
        let _ = observe(&table, b"/", |group| group % 2 == 0);
        let _ = observe(&table, root, |_| false);
        let _ = table.top(root);
    }
});
