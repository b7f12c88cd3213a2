//! Label selectors of Kubernetes, and the scope of an agent: which pods have a view without an
//! annotation.

use std::{collections::BTreeMap, str::FromStr};

/// The labels of a pod or a namespace.
pub type Labels = BTreeMap<String, String>;

/// The namespaces that `--inject-by-default` excludes unless the flag names others.
pub const DEFAULT_EXCLUDED: [&str; 2] = ["kube-system", "kube-node-lease"];

/// Which pods have a view, as far as their annotations do not decide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Pods that nothing else decides about have a view.
    pub inject_by_default: bool,
    /// Pods that match have a view.
    pub pod_selector: Option<Selector>,
    /// Pods in namespaces that match have a view.
    pub namespace_selector: Option<Selector>,
    /// Pods in these namespaces have none.
    pub exclude_namespaces: Vec<String>,
}

/// A label selector in the syntax of `kubectl get -l`: `a=b,c!=d,e in (f,g),h notin (i),j,!k`. All
/// requirements must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    /// The accepted values; `None`: any.
    values: Option<Vec<String>>,
    /// The requirement holds where this one does not: the label is missing, or has another value.
    negated: bool,
}

impl Selector {
    /// Whether all requirements hold.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|Requirement { key, values, negated }| {
            let holds = labels
                .get(key)
                .is_some_and(|value| values.as_ref().is_none_or(|all| all.contains(value)));
            holds != *negated
        })
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Selector, String> {
        let requirements = split(text).into_iter().map(requirement).collect::<Option<_>>();
        requirements.map(Selector).ok_or_else(|| {
            format!("invalid selector '{text}': expected for example 'team=a,tier in (web,api)'")
        })
    }
}

/// Splits at the commas that are not in parentheses.
fn split(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    text.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
    .map(str::trim)
    .collect()
}

fn requirement(text: &str) -> Option<Requirement> {
    let of_values = |key: &str, values: Vec<&str>, negated| {
        let key = key.trim();
        (is_key(key) && values.iter().all(|value| is_value(value))).then(|| Requirement {
            key: key.to_owned(),
            values: Some(values.into_iter().map(ToOwned::to_owned).collect()),
            negated,
        })
    };
    if let Some(rest) = text.strip_suffix(')') {
        let (key, values) = rest.split_once('(')?;
        let (key, operator) = key.trim().rsplit_once(char::is_whitespace)?;
        let negated = match operator {
            "in" => false,
            "notin" => true,
            _ => return None,
        };
        return of_values(key, values.split(',').map(str::trim).collect(), negated);
    }
    for (operator, negated) in [("!=", true), ("==", false), ("=", false)] {
        if let Some((key, value)) = text.split_once(operator) {
            return of_values(key, vec![value.trim()], negated);
        }
    }
    let (key, negated) = match text.strip_prefix('!') {
        Some(key) => (key.trim(), true),
        None => (text, false),
    };
    is_key(key).then(|| Requirement { key: key.to_owned(), values: None, negated })
}

/// Whether it is a name of at most 63 characters (`IsQualifiedName` of apimachinery).
fn is_name(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && ends(text.chars().next())
        && ends(text.chars().next_back())
}

/// Whether it is a key of a label: a name, with a DNS subdomain and a slash before it or without.
fn is_key(text: &str) -> bool {
    match text.split_once('/') {
        None => is_name(text),
        Some((prefix, name)) => {
            let is_domain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            prefix.len() <= 253
                && prefix.split('.').all(|part| !part.is_empty() && part.chars().all(is_domain))
                && is_name(name)
        }
    }
}

/// Whether it is a value of a label, which may be empty.
fn is_value(text: &str) -> bool {
    text.is_empty() || is_name(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selector_matches_as_kubectl_does() {
        let labels: Labels = [("team", "a"), ("example.com/tier", "web"), ("empty", "")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        for (text, expected) in [
            ("team=a", true),
            ("team==a", true),
            ("team = b", false),
            ("team!=a", false),
            ("team!=b", true),
            ("missing!=b", true),
            ("missing=b", false),
            ("team in (a, b)", true),
            ("team in (b,c)", false),
            ("team notin (b,c)", true),
            ("missing notin (b)", true),
            ("missing in (b)", false),
            ("team", true),
            ("!team", false),
            ("missing", false),
            ("!missing", true),
            ("empty=", true),
            ("team=", false),
            ("example.com/tier=web,team in (a,b),!missing", true),
            ("example.com/tier=web,team in (a,b),missing", false),
        ] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.matches(&labels), expected, "{text}");
        }
    }

    #[test]
    fn malformed_selector_is_refused() {
        for text in [
            "",
            ",",
            "a=b,",
            "a=b=c",
            "a in b",
            "a in (b",
            "a in",
            "a inside (b)",
            "in (b)",
            "=b",
            "!",
            "a b",
            "a=b c",
            "-a=b",
            "a/b/c=d",
            "/a=b",
            "A.com/a=b",
            "a>1",
            "a=(b)",
        ] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
        let error = "a in b".parse::<Selector>().unwrap_err();
        assert!(error.contains("'a in b'") && error.contains("expected"), "{error}");
    }
}
