//! Why a model file is refused.

/// Most characters of a place or a reason that an error repeats from a file.
const SHOWN: usize = 240;

/// Every way in which reading, checking or editing a model can fail. Messages name the part of the file; what they repeat from it is cut
/// short and its control characters are escaped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OnnxError {
    /// The operating system would not give the file.
    #[error("\"{file}\" cannot be read: {why}")]
    Io {
        /// Name inside the model's folder.
        file: String,
        /// What the system said.
        why: String,
    },
    /// A path that leaves the folder, or something that is not a plain file.
    #[error("\"{file}\" is refused: {why}")]
    Confined {
        /// Name as the model gives it.
        file: String,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The bytes are not the file format.
    #[error("not an ONNX model: {0}")]
    Malformed(String),
    /// A bound of [`super::Limits`] is passed.
    #[error("the model is too large: {what} passes the limit of {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// The format's rules are broken at a place.
    #[error("{place}: {why}")]
    Invalid {
        /// Node, value or field.
        place: String,
        /// The rule that it breaks.
        why: String,
    },
    /// An edit cannot be made.
    #[error("the graph cannot be edited: {0}")]
    Patch(String),
}

impl OnnxError {
    pub(super) fn invalid(place: impl AsRef<str>, why: impl AsRef<str>) -> Self {
        OnnxError::Invalid {
            place: shown(place.as_ref()),
            why: shown(why.as_ref()),
        }
    }

    pub(super) fn malformed(why: impl AsRef<str>) -> Self {
        OnnxError::Malformed(shown(why.as_ref()))
    }

    pub(super) fn patch(why: impl AsRef<str>) -> Self {
        OnnxError::Patch(shown(why.as_ref()))
    }

    pub(super) fn io(file: &str, why: impl std::fmt::Display) -> Self {
        OnnxError::Io {
            file: shown(file),
            why: why.to_string(),
        }
    }

    pub(super) fn confined(file: &str, why: &'static str) -> Self {
        OnnxError::Confined {
            file: shown(file),
            why,
        }
    }
}

/// Text of a file as it may stand on one line of a log or a dump.
pub(super) fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(SHOWN));
    for (count, c) in text.chars().enumerate() {
        if count == SHOWN {
            out.push('…');
            break;
        }
        // Beside control characters, the marks that turn the direction of text can disguise a line.
        let disguise = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}');
        if c.is_control() || disguise {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_cannot_break_a_line_or_fill_a_log() {
        let e = OnnxError::invalid(format!("node \"{}\"", "n".repeat(100_000)), "a\nb\u{202e}");
        let text = e.to_string();
        assert!(text.len() < 1024, "{} bytes", text.len());
        assert!(text.ends_with("a\\u{a}b\\u{202e}"), "{text}");
    }
}
