//! The `introspectd` binary. Everything is in the library: see [`introspectd::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    introspectd::cli::main()
}
