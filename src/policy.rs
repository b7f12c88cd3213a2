//! Who wants a view: pod annotations, namespace label and the agent's default → a wish for each container.
//! Pure: values in, values out. Knows nothing of mounts or runtimes.

use std::collections::BTreeMap;

use crate::{
    plan::Wish,
    view::{FileSet, UnknownFile},
};

/// Pod annotation and namespace label that opt in or out: `"true"` or `"false"`.
pub const INJECT: &str = "kube-lxcfs.io/inject";
/// Pod annotation with the comma-separated view files; absent: all that lxcfs serves.
pub const FILES: &str = "kube-lxcfs.io/files";
/// Pod annotation with the comma-separated container names; absent: all of the pod's.
pub const CONTAINERS: &str = "kube-lxcfs.io/containers";

/// What a pod says of itself, reduced to what is decided by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    pub inject: Option<String>,
    pub files: Option<String>,
    pub containers: Option<String>,
}

impl Annotations {
    /// Keeps of a pod's (or pod sandbox's) annotations only the three that count.
    pub fn from_map<'a>(all: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        let mut kept = Self::default();
        for (key, value) in all {
            match key.as_str() {
                INJECT => kept.inject = Some(value.clone()),
                FILES => kept.files = Some(value.clone()),
                CONTAINERS => kept.containers = Some(value.clone()),
                _ => {}
            }
        }
        kept
    }
}

/// A value that is not understood, told in a Warning event on the pod. Names key, value and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("annotation {INJECT}: '{0}' is not understood; allowed are 'true' and 'false'")]
    Inject(String),
    #[error("label {INJECT} of the namespace: '{0}' is not understood; allowed are 'true' and 'false'")]
    NamespaceLabel(String),
    #[error("annotation {FILES}: '{value}' is not understood: {unknown}")]
    Files { value: String, unknown: UnknownFile },
    #[error("annotation {CONTAINERS}: '{value}' is not understood: the pod has no container '{unknown}'; allowed are {}", .allowed.join(", "))]
    Containers { value: String, unknown: String, allowed: Vec<String> },
}

/// What is wished for a pod's containers, by container name, and what in the pod was not understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    pub by_container: BTreeMap<String, Wish>,
    pub problems: Vec<Problem>,
}

/// Decides for one pod. `namespace_label` is the value of [`INJECT`] on its namespace, `default` the agent's
/// `--inject-by-default`, `containers` the names of all containers of the pod.
///
/// The first that says anything decides: annotation, label, default. A pod that is out gets no view, whatever else its
/// annotations say; a pod that is in, or of which that can't be told, and that says something not understood, is left
/// as it is ([`Wish::Keep`]).
pub fn wishes(annotations: &Annotations, namespace_label: Option<&str>, default: bool, containers: &[&str]) -> Wishes {
    let mut problems = Vec::new();
    let inject = match (annotations.inject.as_deref(), namespace_label) {
        (Some(value), _) => truth(value).or_else(|| {
            problems.push(Problem::Inject(value.to_owned()));
            None
        }),
        (None, Some(value)) => truth(value).or_else(|| {
            problems.push(Problem::NamespaceLabel(value.to_owned()));
            None
        }),
        (None, None) => Some(default),
    };
    let files = match annotations.files.as_deref() {
        None => FileSet::ALL,
        Some(value) => FileSet::parse(value).unwrap_or_else(|unknown| {
            problems.push(Problem::Files { value: value.to_owned(), unknown });
            FileSet::NONE
        }),
    };
    let chosen: Option<Vec<&str>> = annotations.containers.as_deref().map(|value| {
        let names: Vec<&str> = value.split(',').map(str::trim).collect();
        if let Some(unknown) = names.iter().find(|name| !containers.contains(name)) {
            problems.push(Problem::Containers {
                value: value.to_owned(),
                unknown: (*unknown).to_owned(),
                allowed: containers.iter().map(|c| (*c).to_owned()).collect(),
            });
        }
        names
    });
    let wish = |container: &str| match inject {
        Some(false) => Wish::Nothing,
        _ if !problems.is_empty() => Wish::Keep,
        Some(true) if chosen.as_ref().is_none_or(|names| names.contains(&container)) => Wish::Files(files),
        _ => Wish::Nothing,
    };
    let by_container = containers.iter().map(|c| ((*c).to_owned(), wish(c))).collect();
    Wishes { by_container, problems }
}

fn truth(value: &str) -> Option<bool> {
    match value {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::view::ViewFile;

    fn annotations(inject: Option<&str>, files: Option<&str>, containers: Option<&str>) -> Annotations {
        Annotations {
            inject: inject.map(Into::into),
            files: files.map(Into::into),
            containers: containers.map(Into::into),
        }
    }

    fn wish_of_a(a: &Annotations, label: Option<&str>, default: bool) -> Wish {
        wishes(a, label, default, &["a", "b"]).by_container["a"]
    }

    #[test]
    fn the_first_that_says_anything_decides() {
        let all = Wish::Files(FileSet::ALL);
        let table = [
            (None, None, false, Wish::Nothing),
            (None, None, true, all),
            (None, Some("true"), false, all),
            (None, Some("false"), true, Wish::Nothing),
            (Some("true"), Some("false"), false, all),
            (Some("false"), Some("true"), true, Wish::Nothing),
            (Some("true"), Some("rubbish"), false, all),
            (None, Some("rubbish"), true, Wish::Keep),
            (Some("True"), Some("true"), true, Wish::Keep),
            (Some(""), None, false, Wish::Keep),
        ];
        for (inject, label, default, wish) in table {
            assert_eq!(
                wish_of_a(&annotations(inject, None, None), label, default),
                wish,
                "{inject:?} {label:?} {default}"
            );
        }
    }

    #[test]
    fn files_and_containers_narrow_the_wish() {
        let pod = wishes(&annotations(Some("true"), Some("meminfo,uptime"), Some("b")), None, false, &["a", "b"]);
        let files = FileSet::from_iter([ViewFile::Meminfo, ViewFile::Uptime]);
        assert_eq!(pod.by_container["a"], Wish::Nothing);
        assert_eq!(pod.by_container["b"], Wish::Files(files));
        assert!(pod.problems.is_empty());
    }

    #[test]
    fn what_is_not_understood_changes_nothing_and_is_told() {
        for (a, told) in [
            (annotations(Some("yes"), None, None), "annotation kube-lxcfs.io/inject: 'yes'"),
            (annotations(Some("true"), Some("meminfo,mem"), None), "annotation kube-lxcfs.io/files: 'meminfo,mem'"),
            (annotations(Some("true"), None, Some("a,x")), "no container 'x'; allowed are a, b"),
        ] {
            let pod = wishes(&a, None, false, &["a", "b"]);
            assert!(pod.by_container.values().all(|w| *w == Wish::Keep), "{pod:?}");
            assert!(pod.problems[0].to_string().contains(told), "{}", pod.problems[0]);
        }
    }

    #[test]
    fn a_pod_that_opts_out_is_out_whatever_else_it_says() {
        let pod = wishes(&annotations(Some("false"), Some("mem"), Some("x")), None, true, &["a", "b"]);
        assert!(pod.by_container.values().all(|w| *w == Wish::Nothing));
        assert_eq!(pod.problems.len(), 2);
    }

    proptest! {
        #[test]
        fn any_text_decides_for_every_container_and_keeps_when_not_understood(
            inject in proptest::option::of(".{0,8}|true|false"),
            files in proptest::option::of(".{0,12}|meminfo|cpu,stat"),
            names in proptest::option::of("[abx, ]{0,5}"),
            label in proptest::option::of(".{0,8}|true|false"),
            default: bool,
        ) {
            let a = Annotations { inject, files, containers: names };
            let pod = wishes(&a, label.as_deref(), default, &["a", "b"]);
            prop_assert_eq!(pod.by_container.len(), 2);
            for wish in pod.by_container.values() {
                match wish {
                    Wish::Keep => prop_assert!(!pod.problems.is_empty()),
                    Wish::Files(files) => prop_assert!(pod.problems.is_empty() && !files.is_empty()),
                    _ => {}
                }
            }
        }
    }
}
