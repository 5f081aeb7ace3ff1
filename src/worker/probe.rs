//! `introspectd worker --probe [LIBRARY]`: what `doctor` asks. Loads the runtime library as a worker would, in a process that may
//! die of it, and prints one line of JSON.

use std::{env, io::Write as _, path::PathBuf, process::ExitCode};

use serde_json::json;

use super::runtime::{self, NO_TELEMETRY};

/// The flag that asks for it.
pub(super) const FLAG: &str = "--probe";

/// Prints the report; fails when it cannot be printed.
pub(super) fn main() -> ExitCode {
    let library = env::args_os().nth(3).map(PathBuf::from);
    let mut report = match runtime::probe(library.as_deref()) {
        Ok(report) => json!({
            "library": report.library,
            "version": report.version,
            "providers": report.providers,
        }),
        Err(e) => json!({ "error": e.to_string() }),
    };
    report["searched"] = runtime::folders()
        .iter()
        .map(|f| f.display().to_string())
        .collect();
    report["telemetry"] = if env::var_os(NO_TELEMETRY).is_some_and(|v| v == "1") {
        "off".into()
    } else {
        "on".into()
    };
    match writeln!(std::io::stdout(), "{report}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
