//! Text of tenants for the log and Events: it must not forge a line, a value or a direction.

use std::{borrow::Cow, fmt};

/// The limit of a quoted value, in characters: a value may have 256 KiB.
const MAX_QUOTED_CHARS: usize = 128;

/// `text` on one line, with its control characters escaped as in Rust literals.
pub fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(needs_escape) {
        return Cow::Borrowed(text);
    }
    let mut line = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if needs_escape(c) { line.extend(c.escape_default()) } else { line.push(c) }
    }
    Cow::Owned(line)
}

/// Control characters, line separators, and characters that change the direction of text.
fn needs_escape(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A value between single quotes, on one line and of limited length. A quote or a backslash in it
/// is escaped, so that the end of the value is unambiguous.
#[derive(Clone, Copy, Debug)]
pub struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        let mut chars = self.0.chars();
        f.write_char('\'')?;
        for c in chars.by_ref().take(MAX_QUOTED_CHARS) {
            if needs_escape(c) || matches!(c, '\'' | '\\') {
                write!(f, "{}", c.escape_default())?;
            } else {
                f.write_char(c)?;
            }
        }
        f.write_str(if chars.next().is_some() { "…'" } else { "'" })
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn quoted_value_is_escaped_and_short() {
        for (value, quoted) in [
            ("meminfo,mem", "'meminfo,mem'"),
            ("", "''"),
            ("ä", "'ä'"),
            ("a\nWARN b\r\t", r"'a\nWARN b\r\t'"),
            ("x'; all is well \\", r"'x\'; all is well \\'"),
            ("\u{1b}[2J\u{202e}", r"'\u{1b}[2J\u{202e}'"),
        ] {
            assert_eq!(Quoted(value).to_string(), quoted);
        }
        let long = Quoted(&"x".repeat(1 << 18)).to_string();
        assert_eq!(long, format!("'{}…'", "x".repeat(MAX_QUOTED_CHARS)));
    }

    proptest! {
        #[test]
        fn any_text_becomes_one_line(chars in vec(any::<char>(), 0..40)) {
            let text: String = chars.into_iter().collect();
            let line = one_line(&text);
            prop_assert!(!line.contains(needs_escape));
            prop_assert!(!Quoted(&text).to_string().contains(needs_escape));
            if !text.contains(needs_escape) {
                prop_assert_eq!(line.as_ref(), text.as_str());
            }
        }
    }
}
