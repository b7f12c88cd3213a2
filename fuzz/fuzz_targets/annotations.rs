//! The annotations of a pod and the label of its namespace.
#![no_main]

use kube_lxcfs::{model::pod::Annotations, plan::DesiredView, policy::decide};
use libfuzzer_sys::fuzz_target;

type Input = (Option<String>, Option<String>, Option<String>, Option<String>, bool, Vec<String>);

fuzz_target!(|input: Input| {
    let (inject, files, containers, label, default, names) = input;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let annotations = Annotations { inject, files, containers };
    let decision = decide(&annotations, label.as_deref(), default, &names);
    for desired in decision.by_container.values() {
        assert!(*desired != DesiredView::Unmanaged || !decision.invalid.is_empty());
    }
    decision.invalid.iter().for_each(|invalid| drop(invalid.to_string()));
});
