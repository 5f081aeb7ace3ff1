//! The log: to standard error, as text or as one JSON object per line.
//!
//! Strings of clients are recorded as fields, which both formats escape: a newline in a request breaks no line. A closed
//! standard error is no reason to fail.

use std::{fmt, io, str::FromStr};

use tracing_subscriber::{EnvFilter, fmt::Subscriber, util::SubscriberInitExt as _};

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs: one object per line.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            _ => Err("use \"text\" or \"json\"".into()),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Text => "text",
            Format::Json => "json",
        })
    }
}

/// Checks a filter such as `info` or `introspectd=debug,h2=warn`.
///
/// # Errors
/// What is wrong with it.
pub fn check_filter(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter)
        .map(drop)
        .map_err(|e| e.to_string())
}

/// Starts logging in this process. Does nothing when something else already does.
pub fn init(format: Format, filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = Subscriber::builder()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        // Reporting that standard error is closed on standard error would panic.
        .log_internal_errors(false);
    let installed = match format {
        Format::Text => subscriber.finish().try_init(),
        Format::Json => subscriber.json().flatten_event(true).finish().try_init(),
    };
    // A test or an embedding program logs in its own way.
    drop(installed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_come_back_from_their_names() {
        for format in [Format::Text, Format::Json] {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert!("JSON".parse::<Format>().is_err());
    }

    #[test]
    fn filters_are_checked() {
        assert!(check_filter("info,introspectd=debug").is_ok());
        assert!(check_filter("introspectd=loud").is_err());
    }
}
