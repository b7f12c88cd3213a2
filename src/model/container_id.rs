//! Container ids.

use std::{fmt, sync::Arc};

use serde::{Serialize, Serializer};

/// A container's id as runtimes give it, validated: 1 to 128 of `[A-Za-z0-9_.-]`, not starting with
/// a dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(Arc<str>);

/// Text that is not a container id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid container id '{0}': expected 1 to 128 letters, digits, '_', '.' and '-'")]
pub struct InvalidContainerId(pub String);

impl ContainerId {
    /// # Errors
    /// Fails if the text is not a container id.
    pub fn new(id: &str) -> Result<Self, InvalidContainerId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        if (1..=128).contains(&id.len()) && id.bytes().all(allowed) && !id.starts_with('.') {
            Ok(ContainerId(id.into()))
        } else {
            Err(InvalidContainerId(id.into()))
        }
    }

    /// Parses `containerd://ID`, the form of `status.containerStatuses[].containerID` (Kubernetes
    /// API).
    ///
    /// # Errors
    /// Fails if the part after `://` is not a container id.
    pub fn from_url(url: &str) -> Result<Self, InvalidContainerId> {
        Self::new(url.split_once("://").map_or(url, |(_, id)| id))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 characters, the usual short form.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for ContainerId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_validated() {
        let id = ContainerId::from_url("containerd://0123abc").unwrap();
        assert_eq!(id.as_str(), "0123abc");
        assert_eq!(ContainerId::from_url("0123abc"), Ok(id));
        for bad in ["", "containerd://", "../../etc", "a/b", "a b", "a\nb", &"a".repeat(129)] {
            assert!(ContainerId::from_url(bad).is_err(), "{bad}");
        }
    }
}
