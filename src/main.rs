//! The `introspectd` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("worker") => introspectd::worker::main(),
        _ => {
            eprintln!("introspectd: unknown command: the one command is \"worker\"");
            ExitCode::FAILURE
        }
    }
}
