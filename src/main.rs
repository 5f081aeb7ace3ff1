//! The `introspectd` binary.

fn main() {}
