//! What can go wrong in a command, told to people: what happened, where, and what to do.

use std::{fmt::Write as _, io, process::ExitCode};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::out::clean;
use crate::service::status::{NOT_STORED, name};

/// Why a command failed.
#[derive(Debug)]
pub(super) enum CliError {
    /// Who reads our output left. Nothing to tell anybody.
    Closed,
    /// The command line means nothing; beyond what the parser of the command line finds.
    Usage(String),
    /// The daemon refused or failed a call.
    Refused {
        /// What it said.
        status: Box<Status>,
        /// Where what it refused is in a file of the caller's, if we know.
        place: Option<String>,
    },
    /// Everything else.
    Other {
        /// What happened.
        message: String,
        /// What to do about it, if we know.
        advice: Option<String>,
    },
    /// What went wrong is printed already; only the exit code is left.
    Told,
}

impl CliError {
    /// Something without advice.
    pub(super) fn new(message: impl Into<String>) -> Self {
        CliError::Other {
            message: message.into(),
            advice: None,
        }
    }

    /// Adds what to do.
    pub(super) fn advise(self, advice: impl Into<String>) -> Self {
        match self {
            CliError::Other { message, .. } => CliError::Other {
                message,
                advice: Some(advice.into()),
            },
            other @ (CliError::Closed
            | CliError::Usage(_)
            | CliError::Refused { .. }
            | CliError::Told) => other,
        }
    }

    /// Says where in a file a refused field is, where `place` knows that.
    pub(super) fn placed(self, of: impl Fn(&str) -> Option<String>) -> Self {
        match self {
            CliError::Refused { status, .. } => {
                let details = status.get_error_details();
                let fields = details.bad_request().into_iter();
                let place = fields
                    .flat_map(|b| &b.field_violations)
                    .find_map(|violation| of(&violation.field));
                CliError::Refused { status, place }
            }
            other @ (CliError::Closed
            | CliError::Usage(_)
            | CliError::Other { .. }
            | CliError::Told) => other,
        }
    }

    /// Ends the process: prints to standard error, gives the exit code.
    pub(super) fn report(&self) -> ExitCode {
        let text = self.text();
        if !text.is_empty() {
            super::out::warn(&text);
        }
        match self {
            CliError::Closed => ExitCode::SUCCESS,
            CliError::Usage(_) => ExitCode::from(2),
            CliError::Refused { .. } | CliError::Other { .. } | CliError::Told => ExitCode::FAILURE,
        }
    }

    fn text(&self) -> String {
        match self {
            CliError::Closed | CliError::Told => String::new(),
            CliError::Usage(message) => {
                format!("error: {message}\n\nFor more information, try '--help'.\n")
            }
            CliError::Refused { status, place } => refused(status, place.as_deref()),
            CliError::Other { message, advice } => {
                let mut text = format!("error: {message}\n");
                if let Some(advice) = advice {
                    let _ = writeln!(text, "  do      {advice}");
                }
                text
            }
        }
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        CliError::Refused {
            status: Box::new(status),
            place: None,
        }
    }
}

/// Of standard output: a reader that left is no failure.
impl From<io::Error> for CliError {
    fn from(e: io::Error) -> Self {
        if e.kind() == io::ErrorKind::BrokenPipe {
            CliError::Closed
        } else {
            CliError::new(format!("cannot write to standard output: {e}"))
        }
    }
}

/// A status with its details, one fact a line.
fn refused(status: &Status, place: Option<&str>) -> String {
    let details = status.get_error_details();
    let mut text = format!("error: {}\n", clean(status.message()));
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<7} {}", clean(value));
    };
    line("code", name(status.code()));
    if let Some(info) = details.error_info() {
        line("reason", &info.reason);
    }
    for violation in details
        .bad_request()
        .into_iter()
        .flat_map(|b| &b.field_violations)
    {
        line("field", &violation.field);
    }
    if let Some(place) = place {
        line("place", place);
    }
    let retry = details.retry_info().and_then(|r| r.retry_delay);
    let reason = details.error_info().map_or("", |info| &info.reason);
    match (retry, advice(status.code(), reason)) {
        (Some(delay), _) => line("do", &format!("try again in {:.1} s", delay.as_secs_f64())),
        (None, Some(advice)) => line("do", advice),
        (None, None) => {}
    }
    text
}

/// What to do about a code, where the message alone may leave people helpless.
fn advice(code: Code, reason: &str) -> Option<&'static str> {
    match code {
        Code::FailedPrecondition if reason == NOT_STORED => None,
        Code::NotFound => Some(
            "`introspectd models list` and `introspectd probe list` show what there is; `models list --rescan` looks again",
        ),
        Code::FailedPrecondition => Some(
            "`introspectd models list` shows states, `introspectd inspect MODEL` what a model has and lacks",
        ),
        Code::ResourceExhausted => Some(
            "ask for less (--layers, --heads, --pooling, --sparse, a shorter text), or raise the daemon's limit",
        ),
        Code::Unavailable => Some("the daemon is going down or the model is not up yet: try again"),
        Code::Unimplemented | Code::Unknown => {
            Some("is that an introspectd daemon of this version?")
        }
        Code::Internal | Code::DataLoss => Some("the log of the daemon says more"),
        Code::Ok
        | Code::Cancelled
        | Code::InvalidArgument
        | Code::DeadlineExceeded
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unauthenticated => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn a_refusal_shows_code_reason_field_and_what_to_do() {
        let mut details =
            ErrorDetails::with_error_info("UNKNOWN_HOOK", "introspectd", HashMap::new());
        details.add_bad_request_violation("selection.hooks[0]", "no such hook point");
        let status =
            Status::with_error_details(Code::InvalidArgument, "\"x\" means\x1b nothing", details);
        let text = CliError::from(status).text();
        assert!(
            text.starts_with("error: \"x\" means\u{fffd} nothing\n"),
            "{text}"
        );
        assert!(text.contains("code    INVALID_ARGUMENT"), "{text}");
        assert!(text.contains("reason  UNKNOWN_HOOK"), "{text}");
        assert!(text.contains("field   selection.hooks[0]"), "{text}");
    }

    #[test]
    fn a_refused_field_has_its_place_where_that_is_known() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("examples[1].label", "is empty");
        let status = Status::with_error_details(Code::InvalidArgument, "is empty", details);
        let place = |field: &str| field.starts_with("examples").then(|| "line 3".to_owned());
        let text = CliError::from(status.clone()).placed(place).text();
        assert!(text.contains("  place   line 3\n"), "{text}");
        let text = CliError::from(status).placed(|_| None).text();
        assert!(!text.contains("place"), "{text}");
    }

    #[test]
    fn advice_to_retry_goes_before_general_advice() {
        let details = ErrorDetails::with_retry_info(Some(std::time::Duration::from_millis(1500)));
        let status = Status::with_error_details(Code::ResourceExhausted, "full", details);
        let text = CliError::from(status).text();
        assert!(text.contains("do      try again in 1.5 s"), "{text}");
        assert_eq!(text.matches("  do ").count(), 1);
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let left = CliError::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(matches!(left, CliError::Closed));
        assert!(left.text().is_empty());
    }
}
