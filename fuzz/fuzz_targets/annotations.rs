//! What a pod and its namespace say.
#![no_main]

use kube_lxcfs::{
    plan::Wish,
    policy::{Annotations, wishes},
};
use libfuzzer_sys::fuzz_target;

type Said = (Option<String>, Option<String>, Option<String>, Option<String>, bool, Vec<String>);

fuzz_target!(|said: Said| {
    let (inject, files, containers, label, default, names) = said;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let told = wishes(&Annotations { inject, files, containers }, label.as_deref(), default, &names);
    for wish in told.by_container.values() {
        assert!(*wish != Wish::Keep || !told.problems.is_empty());
    }
    told.problems.iter().for_each(|problem| drop(problem.to_string()));
});
