//! The one table from errors to gRPC codes, with `google.rpc` details.
//!
//! | error | code | reason |
//! |---|---|---|
//! | a field that is wrong | INVALID_ARGUMENT, `BadRequest` | `BAD_FIELD` |
//! | no such model, no such probe | NOT_FOUND | `NOT_FOUND` |
//! | a probe of the name is there | ALREADY_EXISTS | `ALREADY_EXISTS` |
//! | the model lacks it, or is not loaded | FAILED_PRECONDITION | `MODEL_LACKS_IT` |
//! | a probe could not be stored or removed | FAILED_PRECONDITION | `NOT_STORED` |
//! | a bound was met | RESOURCE_EXHAUSTED, `RetryInfo` when a retry helps | `LIMIT_REACHED` |
//! | loading, restarting, draining | UNAVAILABLE, `RetryInfo` | `NOT_SERVING` |
//! | the deadline passed | DEADLINE_EXCEEDED | `DEADLINE_PASSED` |
//! | the caller left | CANCELLED | `CALLER_LEFT` |
//! | a stored file is broken | DATA_LOSS | `BROKEN_FILE` |
//! | the worker died | INTERNAL | `WORKER_DIED` |
//! | anything else | INTERNAL, with an id that is in the log | `INTERNAL` |

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::wire::introspect as pb;
use crate::engine::{EngineError, error::clean};

/// Domain of our `ErrorInfo`s.
const DOMAIN: &str = "introspectd";
/// Reason of what could not be stored.
pub(crate) const NOT_STORED: &str = "NOT_STORED";
/// What clients that retry by themselves obey.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// What the table says of an error.
struct Entry<'a> {
    code: Code,
    reason: &'static str,
    field: Option<&'a str>,
    retry_after: Option<Duration>,
}

fn entry(error: &EngineError) -> Entry<'_> {
    let plain = |code, reason| Entry {
        code,
        reason,
        field: None,
        retry_after: None,
    };
    match error {
        EngineError::InvalidArgument { field, .. } => Entry {
            field: Some(field),
            ..plain(Code::InvalidArgument, "BAD_FIELD")
        },
        EngineError::NotFound { .. } => plain(Code::NotFound, "NOT_FOUND"),
        EngineError::AlreadyExists { .. } => plain(Code::AlreadyExists, "ALREADY_EXISTS"),
        EngineError::FailedPrecondition { .. } => plain(Code::FailedPrecondition, "MODEL_LACKS_IT"),
        EngineError::Storage { .. } => plain(Code::FailedPrecondition, NOT_STORED),
        EngineError::ResourceExhausted { retry_after, .. } => Entry {
            retry_after: *retry_after,
            ..plain(Code::ResourceExhausted, "LIMIT_REACHED")
        },
        EngineError::Unavailable { retry_after, .. } => Entry {
            retry_after: *retry_after,
            ..plain(Code::Unavailable, "NOT_SERVING")
        },
        EngineError::DeadlineExceeded => plain(Code::DeadlineExceeded, "DEADLINE_PASSED"),
        EngineError::Cancelled => plain(Code::Cancelled, "CALLER_LEFT"),
        EngineError::DataLoss { .. } => plain(Code::DataLoss, "BROKEN_FILE"),
        EngineError::WorkerDied { .. } => plain(Code::Internal, "WORKER_DIED"),
        EngineError::Internal { .. } => plain(Code::Internal, "INTERNAL"),
    }
}

/// The status of a call that failed.
pub(super) fn status(error: &EngineError) -> Status {
    let entry = entry(error);
    let mut details = ErrorDetails::with_error_info(entry.reason, DOMAIN, HashMap::new());
    if let Some(field) = entry.field {
        details.set_bad_request(vec![tonic_types::FieldViolation::new(
            field,
            error.to_string(),
        )]);
    }
    let mut metadata = MetadataMap::new();
    if let Some(after) = entry.retry_after {
        details.set_retry_info(Some(after));
        if let Ok(value) = after.as_millis().to_string().parse() {
            metadata.insert(PUSHBACK, value);
        }
    }
    let message = match entry.field {
        Some(field) if !field.is_empty() => clean(&format!("{field}: {error}")),
        Some(_) | None => error.to_string(),
    };
    Status::with_error_details_and_metadata(entry.code, message, details, metadata)
}

/// The code of an error.
pub(super) fn code(error: &EngineError) -> Code {
    entry(error).code
}

/// The same facts for one input of many.
pub(super) fn failure(error: &EngineError) -> pb::Failure {
    let entry = entry(error);
    pb::Failure {
        code: entry.code.into(),
        message: error.to_string(),
        reason: entry.reason.to_owned(),
        field: entry.field.unwrap_or_default().to_owned(),
        retry_after_seconds: entry.retry_after.map(|d| d.as_secs_f64()),
    }
}

/// A code as the specification of gRPC spells it.
pub(crate) fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_field_is_named_in_the_details() {
        let status = status(&EngineError::invalid("input.text", "is empty"));
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            "input.text"
        );
        assert_eq!(details.error_info().unwrap().domain, "introspectd");
        assert_eq!(status.message(), "input.text: is empty");
    }

    #[test]
    fn advice_to_retry_comes_in_both_forms() {
        let after = Duration::from_millis(250);
        let status = status(&EngineError::exhausted("full", Some(after)));
        assert_eq!(
            status.get_details_retry_info().unwrap().retry_delay,
            Some(after)
        );
        assert_eq!(status.metadata().get(PUSHBACK).unwrap(), "250");
        let never = super::status(&EngineError::exhausted("too large", None));
        assert!(never.get_details_retry_info().is_none());
        assert!(never.metadata().get(PUSHBACK).is_none());
    }

    #[test]
    fn details_stay_small_whatever_is_quoted() {
        let status = status(&EngineError::invalid(
            "x".repeat(100_000),
            "\u{0}".repeat(100_000),
        ));
        assert!(status.message().len() <= 1024);
        assert!(
            status.details().len() < 4096,
            "clients refuse headers above 8 KiB"
        );
    }
}
