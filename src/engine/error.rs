//! What can go wrong on the way of a row, as the service's status table needs to tell it apart.
//!
//! Messages are for people: lower case, the thing named in quotes, what to do; never a host path. Control
//! characters of whatever is quoted are escaped and the length is bounded here, once, so that no caller need
//! think of it.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Longest message that leaves the engine, in bytes.
pub const MESSAGE_LIMIT: usize = 1000;

/// Why an answer did not come. Cloned to every request that shared the failing run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The caller sent something that the model cannot take.
    #[error("{message}")]
    InvalidArgument {
        /// Path of the field, as the caller knows it (`inputs.input_ids`, `picks.output`).
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// No such model, version, or part.
    #[error("{message}")]
    NotFound {
        /// What was looked for.
        message: String,
    },
    /// Something of this name is there already.
    #[error("{message}")]
    AlreadyExists {
        /// What is there, and what to do.
        message: String,
    },
    /// The model lacks the part, or is not in a state to be asked.
    #[error("{message}")]
    FailedPrecondition {
        /// What is missing, and what to do.
        message: String,
    },
    /// What was to be stored, read or removed on disk was not.
    #[error("{message}")]
    Storage {
        /// What was not done, and what to do.
        message: String,
    },
    /// A bound was met: queue, tokens, bytes. Without `retry_after` a retry of the same request cannot help.
    #[error("{message}")]
    ResourceExhausted {
        /// Which bound.
        message: String,
        /// When to try again.
        retry_after: Option<Duration>,
    },
    /// The model cannot answer now: loading, restarting, draining.
    #[error("{message}")]
    Unavailable {
        /// Why.
        message: String,
        /// When to try again; none when only an operator can help.
        retry_after: Option<Duration>,
    },
    /// The deadline passed, queued or running.
    #[error("the deadline passed before the answer was complete")]
    DeadlineExceeded,
    /// The caller left.
    #[error("the request was cancelled")]
    Cancelled,
    /// A stored file is broken.
    #[error("{message}")]
    DataLoss {
        /// Which, and how.
        message: String,
    },
    /// The worker died while it ran this request.
    #[error(
        "the worker of model \"{model}\" died while it ran this request ({cause}); other models are not affected, and the model is being restarted"
    )]
    WorkerDied {
        /// Name of the model.
        model: String,
        /// `SIGSEGV`, `exit code 3`, `no heartbeat for 5 s`.
        cause: String,
    },
    /// The runtime failed or one of our invariants is broken; what exactly is in the log under this id.
    #[error("internal error {id}: look for it in the daemon's log")]
    Internal {
        /// Stands in the log beside the details.
        id: String,
    },
}

impl EngineError {
    /// Puts the field of what was invalid beneath another: `ids` and `tokens` give `tokens.ids`.
    #[must_use]
    pub fn beneath(self, field: &str) -> Self {
        match self {
            Self::InvalidArgument { field: at, message } => Self::InvalidArgument {
                field: format!("{field}.{at}"),
                message,
            },
            Self::NotFound { .. }
            | Self::AlreadyExists { .. }
            | Self::FailedPrecondition { .. }
            | Self::Storage { .. }
            | Self::ResourceExhausted { .. }
            | Self::Unavailable { .. }
            | Self::DeadlineExceeded
            | Self::Cancelled
            | Self::DataLoss { .. }
            | Self::WorkerDied { .. }
            | Self::Internal { .. } => self,
        }
    }

    /// A field that the model cannot take.
    pub fn invalid(field: impl AsRef<str>, message: impl AsRef<str>) -> Self {
        Self::InvalidArgument {
            field: clean(field.as_ref()),
            message: clean(message.as_ref()),
        }
    }

    /// Something that does not exist.
    pub fn not_found(message: impl AsRef<str>) -> Self {
        Self::NotFound {
            message: clean(message.as_ref()),
        }
    }

    /// Something that is there already.
    pub fn already_exists(message: impl AsRef<str>) -> Self {
        Self::AlreadyExists {
            message: clean(message.as_ref()),
        }
    }

    /// Something that the model lacks.
    pub fn precondition(message: impl AsRef<str>) -> Self {
        Self::FailedPrecondition {
            message: clean(message.as_ref()),
        }
    }

    /// The disk did not do what it was to.
    pub fn storage(message: impl AsRef<str>) -> Self {
        Self::Storage {
            message: clean(message.as_ref()),
        }
    }

    /// A bound was met.
    pub fn exhausted(message: impl AsRef<str>, retry_after: Option<Duration>) -> Self {
        Self::ResourceExhausted {
            message: clean(message.as_ref()),
            retry_after,
        }
    }

    /// Not now.
    pub fn unavailable(message: impl AsRef<str>, retry_after: Option<Duration>) -> Self {
        Self::Unavailable {
            message: clean(message.as_ref()),
            retry_after,
        }
    }

    /// Logs the details under a fresh id; the caller sees the id only.
    pub fn internal(details: impl std::fmt::Display) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = format!(
            "{:08x}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let details = clean(&details.to_string());
        tracing::error!(error_id = id, details, "internal error");
        Self::Internal { id }
    }
}

/// Text that may be quoted in a message or a log line: control characters escaped, bounded in length.
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(MESSAGE_LIMIT));
    for c in text.chars() {
        let escaped = c.is_control() && c != ' ';
        let needed = if escaped { 10 } else { c.len_utf8() };
        if out.len() + needed + '…'.len_utf8() > MESSAGE_LIMIT {
            out.push('…');
            break;
        }
        if escaped {
            out.extend(c.escape_default());
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
    fn control_characters_are_escaped_and_length_is_bounded() {
        assert_eq!(clean("a\nb\u{1b}[31m\"q\""), "a\\nb\\u{1b}[31m\"q\"");
        let long = clean(&"é".repeat(5000));
        assert!(long.len() <= MESSAGE_LIMIT && long.ends_with('…'));
        let hostile = clean(&"\u{0}".repeat(5000));
        assert!(hostile.len() <= MESSAGE_LIMIT);
    }

    #[test]
    fn internal_errors_have_ids_of_their_own() {
        assert_ne!(EngineError::internal("a"), EngineError::internal("a"));
    }
}
