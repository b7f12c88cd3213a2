//! The policy: a pod's annotations and labels, its namespace's labels and the agent's scope in, a
//! desired view for each container out. Pure: values in, values out. Independent of mounts and
//! runtimes.

use std::collections::BTreeMap;

use crate::{
    model::{
        pod::{Annotations, CONTAINERS_KEY, FILES_KEY, INJECT_KEY, Pod},
        selector::{Labels, Scope},
        text::Quoted,
        view::{FileSet, UnknownViewFile},
    },
    plan::DesiredView,
};

/// An invalid value, reported in a Warning event on the pod. The message names the key, the value
/// and the valid values. The value is escaped: it comes from a tenant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAnnotation {
    #[error("invalid annotation {INJECT_KEY}: {}; valid values: 'true', 'false'", Quoted(.0))]
    Inject(String),
    #[error("invalid namespace label {INJECT_KEY}: {}; valid values: 'true', 'false'", Quoted(.0))]
    NamespaceLabel(String),
    #[error("invalid annotation {FILES_KEY}: {}: {unknown}", Quoted(.value))]
    Files { value: String, unknown: UnknownViewFile },
    #[error(
        "invalid annotation {CONTAINERS_KEY}: {}: the pod has no container {}; valid names: {}",
        Quoted(.value),
        Quoted(.unknown),
        .valid.join(", ")
    )]
    Containers { value: String, unknown: String, valid: Vec<String> },
}

/// The desired views of a pod's containers, by container name, and the pod's invalid values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    pub by_container: BTreeMap<String, DesiredView>,
    pub invalid: Vec<InvalidAnnotation>,
    /// The containers without a view because they nest containers.
    pub nesting: Vec<String>,
}

impl Decision {
    /// Takes the view from containers that nest containers
    /// ([`crate::model::pod::Container::nests_containers`]): it would break the builds in them. The
    /// pod's own annotation requests it nevertheless; no other [`Rule`] does.
    fn skip_nesting<'a>(
        &mut self,
        annotations: &Annotations,
        nesting: impl Iterator<Item = &'a str>,
    ) {
        if annotations.inject.is_some() {
            return;
        }
        for name in nesting {
            if let Some(desired @ DesiredView::Exactly(_)) = self.by_container.get_mut(name) {
                *desired = DesiredView::Absent;
                self.nesting.push(name.to_owned());
            }
        }
    }
}

/// What decides whether a pod has a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// The annotation [`INJECT_KEY`] of the pod.
    Annotation,
    /// An excluded namespace: no view.
    ExcludedNamespace,
    /// The pod selector matches: a view.
    PodSelector,
    /// The label [`INJECT_KEY`] of the namespace.
    NamespaceLabel,
    /// The namespace selector matches: a view.
    NamespaceSelector,
    /// `--inject-by-default`
    Default,
}

/// The rule that decides about a pod: the first of [`Rule`] that applies.
pub fn rule(scope: &Scope, pod: &Pod, namespace_labels: Option<&Labels>) -> Rule {
    if pod.annotations.inject.is_some() {
        return Rule::Annotation;
    }
    rule_without_annotation(scope, pod, namespace_labels)
}

fn rule_without_annotation(scope: &Scope, pod: &Pod, namespace_labels: Option<&Labels>) -> Rule {
    if scope.exclude_namespaces.contains(&pod.namespace) {
        return Rule::ExcludedNamespace;
    }
    if scope.pod_selector.as_ref().is_some_and(|selector| selector.matches(&pod.labels)) {
        return Rule::PodSelector;
    }
    if namespace_labels.is_some_and(|labels| labels.contains_key(INJECT_KEY)) {
        return Rule::NamespaceLabel;
    }
    let selects = scope.namespace_selector.as_ref().zip(namespace_labels);
    if selects.is_some_and(|(selector, labels)| selector.matches(labels)) {
        return Rule::NamespaceSelector;
    }
    Rule::Default
}

/// What decides about a pod without the annotation [`INJECT_KEY`]: the value of this label of its
/// namespace if that decides, and the default otherwise.
fn without_annotation<'a>(
    scope: &Scope,
    pod: &Pod,
    namespace_labels: Option<&'a Labels>,
) -> (Option<&'a str>, bool) {
    match rule_without_annotation(scope, pod, namespace_labels) {
        Rule::ExcludedNamespace => (None, false),
        Rule::PodSelector | Rule::NamespaceSelector => (None, true),
        Rule::NamespaceLabel => {
            let label = namespace_labels.and_then(|labels| labels.get(INJECT_KEY));
            (label.map(String::as_str), scope.inject_by_default)
        }
        Rule::Annotation | Rule::Default => (None, scope.inject_by_default),
    }
}

/// Decides for one pod. `containers` are the names of all its containers.
pub fn decide_for(
    scope: &Scope,
    pod: &Pod,
    namespace_labels: Option<&Labels>,
    containers: &[&str],
) -> Decision {
    let (label, default) = without_annotation(scope, pod, namespace_labels);
    let mut decision = decide(&pod.annotations, label, default, containers);
    let nesting = pod.containers.iter().filter(|c| c.nests_containers);
    decision.skip_nesting(&pod.annotations, nesting.map(|c| c.name.as_str()));
    decision
}

/// Decides by annotations, without the pod. `namespace_label` is the value of [`INJECT_KEY`]
/// on its namespace, `default` whether it has a view without both, `containers` the names of all
/// containers of the pod.
///
/// The first of annotation, label and default that is set decides. A pod that opts out has no view,
/// even if other annotations are invalid. Any other pod with an invalid value is left as it is
/// ([`DesiredView::Unmanaged`]).
pub fn decide(
    annotations: &Annotations,
    namespace_label: Option<&str>,
    default: bool,
    containers: &[&str],
) -> Decision {
    let mut invalid = Vec::new();
    let inject = match (annotations.inject.as_deref(), namespace_label) {
        (Some(value), _) => parse_bool(value).or_else(|| {
            invalid.push(InvalidAnnotation::Inject(value.to_owned()));
            None
        }),
        (None, Some(value)) => parse_bool(value).or_else(|| {
            invalid.push(InvalidAnnotation::NamespaceLabel(value.to_owned()));
            None
        }),
        (None, None) => Some(default),
    };
    let files = match annotations.files.as_deref() {
        None => FileSet::ALL,
        Some(value) => FileSet::parse(value).unwrap_or_else(|unknown| {
            invalid.push(InvalidAnnotation::Files { value: value.to_owned(), unknown });
            FileSet::NONE
        }),
    };
    let chosen: Option<Vec<&str>> = annotations.containers.as_deref().map(|value| {
        let names: Vec<&str> = value.split(',').map(str::trim).collect();
        if let Some(unknown) = names.iter().find(|name| !containers.contains(name)) {
            invalid.push(InvalidAnnotation::Containers {
                value: value.to_owned(),
                unknown: (*unknown).to_owned(),
                valid: containers.iter().map(|c| (*c).to_owned()).collect(),
            });
        }
        names
    });
    let desired = |container: &str| match inject {
        Some(false) => DesiredView::Absent,
        _ if !invalid.is_empty() => DesiredView::Unmanaged,
        Some(true) if chosen.as_ref().is_none_or(|names| names.contains(&container)) => {
            DesiredView::Exactly(files)
        }
        _ => DesiredView::Absent,
    };
    let by_container = containers.iter().map(|c| ((*c).to_owned(), desired(c))).collect();
    Decision { by_container, invalid, nesting: Vec::new() }
}

fn parse_bool(value: &str) -> Option<bool> {
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
    use crate::model::view::ViewFile;

    fn annotations(
        inject: Option<&str>,
        files: Option<&str>,
        containers: Option<&str>,
    ) -> Annotations {
        Annotations {
            inject: inject.map(Into::into),
            files: files.map(Into::into),
            containers: containers.map(Into::into),
        }
    }

    fn desired_of_a(a: &Annotations, label: Option<&str>, default: bool) -> DesiredView {
        decide(a, label, default, &["a", "b"]).by_container["a"]
    }

    #[test]
    fn first_setting_decides() {
        let all = DesiredView::Exactly(FileSet::ALL);
        let table = [
            (None, None, false, DesiredView::Absent),
            (None, None, true, all),
            (None, Some("true"), false, all),
            (None, Some("false"), true, DesiredView::Absent),
            (Some("true"), Some("false"), false, all),
            (Some("false"), Some("true"), true, DesiredView::Absent),
            (Some("true"), Some("rubbish"), false, all),
            (None, Some("rubbish"), true, DesiredView::Unmanaged),
            (Some("True"), Some("true"), true, DesiredView::Unmanaged),
            (Some(""), None, false, DesiredView::Unmanaged),
        ];
        for (inject, label, default, desired) in table {
            assert_eq!(
                desired_of_a(&annotations(inject, None, None), label, default),
                desired,
                "{inject:?} {label:?} {default}"
            );
        }
    }

    #[test]
    fn precedence_of_selectors_label_and_exclusion() {
        let labels = |text: &str| -> Labels {
            let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
        };
        let (yes, no) = (format!("{INJECT_KEY}=true"), format!("{INJECT_KEY}=false"));
        let both = format!("team=a,{INJECT_KEY}=false");
        let all = DesiredView::Exactly(FileSet::ALL);
        // Annotation, labels of the pod, namespace and its labels, default.
        for (inject, pod, namespace, of_namespace, inject_by_default, desired) in [
            (None, "", "shop", "", false, DesiredView::Absent),
            (None, "", "shop", "", true, all),
            (None, "", "shop", "team=a", false, all),
            (None, "", "shop", "team=b", false, DesiredView::Absent),
            (None, "", "shop", &*yes, false, all),
            (None, "", "shop", &*no, true, DesiredView::Absent),
            // The label decides before the namespace selector, and the pod selector before both.
            (None, "", "shop", &*both, true, DesiredView::Absent),
            (None, "app=web", "shop", &*both, false, all),
            (None, "app=db", "shop", &*both, false, DesiredView::Absent),
            (None, "app=web", "shop", "", false, all),
            // An excluded namespace decides before all of these, and after the annotation.
            (None, "app=web", "kube-system", "team=a", true, DesiredView::Absent),
            (None, "", "kube-system", &*yes, true, DesiredView::Absent),
            (Some("true"), "", "kube-system", "", false, all),
            (Some("false"), "app=web", "shop", "team=a", true, DesiredView::Absent),
            // An invalid label where something else decides has no effect.
            (None, "app=web", "shop", "kube-lxcfs.io/inject=x", false, all),
            (None, "", "shop", "kube-lxcfs.io/inject=x", true, DesiredView::Unmanaged),
        ] {
            let scope = Scope {
                inject_by_default,
                pod_selector: Some("app=web".parse().unwrap()),
                namespace_selector: Some("team=a".parse().unwrap()),
                exclude_namespaces: vec!["kube-system".into()],
            };
            let pod = Pod { namespace: namespace.into(), labels: labels(pod), ..Pod::default() };
            let of_namespace = labels(of_namespace);
            let (label, default) = without_annotation(&scope, &pod, Some(&of_namespace));
            assert_eq!(
                desired_of_a(&annotations(inject, None, None), label, default),
                desired,
                "{inject:?} {pod:?} {of_namespace:?} {inject_by_default}"
            );
        }
    }

    #[test]
    fn first_rule_that_applies_decides() {
        let mut scope = Scope { inject_by_default: true, ..Scope::default() };
        let mut pod = Pod { namespace: "shop".into(), ..Pod::default() };
        let mut labels = Labels::new();
        assert_eq!(rule(&scope, &pod, Some(&labels)), Rule::Default);
        labels.insert("team".into(), "a".into());
        scope.namespace_selector = Some("team=a".parse().unwrap());
        assert_eq!(rule(&scope, &pod, Some(&labels)), Rule::NamespaceSelector);
        assert_eq!(rule(&scope, &pod, None), Rule::Default);
        labels.insert(INJECT_KEY.into(), "false".into());
        assert_eq!(rule(&scope, &pod, Some(&labels)), Rule::NamespaceLabel);
        pod.labels.insert("app".into(), "web".into());
        scope.pod_selector = Some("app=web".parse().unwrap());
        assert_eq!(rule(&scope, &pod, Some(&labels)), Rule::PodSelector);
        scope.exclude_namespaces.push("shop".into());
        assert_eq!(rule(&scope, &pod, Some(&labels)), Rule::ExcludedNamespace);
        pod.annotations.inject = Some("x".into());
        assert_eq!(rule(&scope, &pod, Some(&labels)), Rule::Annotation);
    }

    #[test]
    fn namespace_without_known_labels_is_not_selected() {
        let scope =
            Scope { namespace_selector: Some("!team".parse().unwrap()), ..Scope::default() };
        let pod = Pod::default();
        assert_eq!(without_annotation(&scope, &pod, None), (None, false));
        assert_eq!(without_annotation(&scope, &pod, Some(&Labels::new())), (None, true));
    }

    #[test]
    fn files_and_containers_narrow_the_view() {
        let pod = decide(
            &annotations(Some("true"), Some("meminfo,uptime"), Some("b")),
            None,
            false,
            &["a", "b"],
        );
        let files = FileSet::from_iter([ViewFile::Meminfo, ViewFile::Uptime]);
        assert_eq!(pod.by_container["a"], DesiredView::Absent);
        assert_eq!(pod.by_container["b"], DesiredView::Exactly(files));
        assert!(pod.invalid.is_empty());
    }

    #[test]
    fn invalid_value_is_reported_and_changes_nothing() {
        for (a, expected) in [
            (annotations(Some("yes"), None, None), "annotation kube-lxcfs.io/inject: 'yes'"),
            (
                annotations(Some("true"), Some("meminfo,mem"), None),
                "annotation kube-lxcfs.io/files: 'meminfo,mem'",
            ),
            (annotations(Some("true"), None, Some("a,x")), "no container 'x'; valid names: a, b"),
        ] {
            let pod = decide(&a, None, false, &["a", "b"]);
            assert!(pod.by_container.values().all(|d| *d == DesiredView::Unmanaged), "{pod:?}");
            assert!(pod.invalid[0].to_string().contains(expected), "{}", pod.invalid[0]);
        }
    }

    #[test]
    fn message_of_a_hostile_value_is_one_short_line() {
        let value =
            format!("x'\n2026-01-01T00:00:00Z  WARN forged\u{1b}[2J{}", "y".repeat(1 << 18));
        let a = annotations(Some(&value), Some(&value), Some(&value));
        let invalid = decide(&a, Some(&value), false, &["a"]).invalid;
        assert_eq!(invalid.len(), 3);
        for message in invalid.iter().map(ToString::to_string) {
            assert!(!message.contains(char::is_control) && message.len() < 1024, "{message}");
            assert!(message.contains(r"'x\'\n2026"), "{message}");
        }
    }

    #[test]
    fn nesting_container_needs_the_annotation() {
        let nesting = |inject, label, default| {
            let a = annotations(inject, None, None);
            let mut decision = decide(&a, label, default, &["a", "b"]);
            let before = decision.by_container["a"];
            decision.skip_nesting(&a, ["b"].into_iter());
            assert_eq!(decision.by_container["a"], before);
            (decision.by_container["b"], decision.nesting == ["b"])
        };
        let all = DesiredView::Exactly(FileSet::ALL);
        for (inject, label, default, expected) in [
            (None, None, true, (DesiredView::Absent, true)),
            (None, Some("true"), false, (DesiredView::Absent, true)),
            (Some("true"), None, false, (all, false)),
            (Some("true"), Some("false"), true, (all, false)),
            // Without it there is no view to skip.
            (None, None, false, (DesiredView::Absent, false)),
            (Some("false"), None, true, (DesiredView::Absent, false)),
            (None, Some("rubbish"), true, (DesiredView::Unmanaged, false)),
        ] {
            assert_eq!(nesting(inject, label, default), expected, "{inject:?} {label:?} {default}");
        }
    }

    #[test]
    fn opted_out_pod_has_no_view_despite_other_errors() {
        let pod =
            decide(&annotations(Some("false"), Some("mem"), Some("x")), None, true, &["a", "b"]);
        assert!(pod.by_container.values().all(|d| *d == DesiredView::Absent));
        assert_eq!(pod.invalid.len(), 2);
    }

    proptest! {
        #[test]
        fn any_text_yields_a_decision_per_container(
            inject in proptest::option::of(".{0,8}|true|false"),
            files in proptest::option::of(".{0,12}|meminfo|cpu,stat"),
            names in proptest::option::of("[abx, ]{0,5}"),
            label in proptest::option::of(".{0,8}|true|false"),
            default: bool,
        ) {
            let a = Annotations { inject, files, containers: names };
            let pod = decide(&a, label.as_deref(), default, &["a", "b"]);
            prop_assert_eq!(pod.by_container.len(), 2);
            for desired in pod.by_container.values() {
                match desired {
                    DesiredView::Unmanaged => prop_assert!(!pod.invalid.is_empty()),
                    DesiredView::Exactly(files) => {
                        prop_assert!(pod.invalid.is_empty() && !files.is_empty());
                    }
                    _ => {}
                }
            }
        }
    }
}
