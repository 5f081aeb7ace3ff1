//! The child process that holds one generation of a model.
//!
//! It is started by the front with a socket as its standard input, puts itself under limits, loads one model, and serves
//! builds and runs until the socket closes. Whatever happens in here (a crash of the runtime, a hang, a memory bomb)
//! costs this model's requests in flight and nothing else.
//!
//! ```text
//!   socket ──▶ serve: reads commands ──┬─▶ control thread: load, build, evict, dump
//!                 │ cancel, ping: here ├─▶ text thread: tokenize, decode
//!                                      └─▶ variant threads: run, cut, send     (one owns one session)
//! ```
//!
//! Threads share the socket by [`crate::ipc::worker_side::Sender`]; an answer carries the id of its command.

mod config;
mod json;
mod limits;
mod load;
mod native;
mod pick;
mod run;
pub mod runtime;
mod sandbox;
mod serve;
mod session;
mod tokenizer;
mod value;
mod variants;
mod weights;

pub use serve::main;

use crate::ipc::{
    wire::{Failed, Failure, event},
    worker_side::Sender,
};

/// Longest message that crosses to the front, in bytes.
const MAX_MESSAGE: usize = 900;

/// Answers a command with a failure.
fn failure(
    sender: &Sender,
    id: u64,
    kind: Failure,
    message: &str,
    subject: &str,
) -> std::io::Result<()> {
    let failed = Failed {
        failure: kind.into(),
        message: tidy(message),
        subject: subject.chars().take(200).collect(),
    };
    sender.send(id, event::Kind::Failed(failed), None)
}

/// A message of the runtime for people: one line, without control characters, without paths of this host, not too long.
fn tidy(message: &str) -> String {
    let mut out = String::new();
    for word in message.split_whitespace() {
        // The runtime names its own source files and the model's absolute path.
        let path = word
            .trim_start_matches(['"', '\'', '(', '['])
            .starts_with('/')
            && word.len() > 2;
        if !out.is_empty() {
            out.push(' ');
        }
        if path {
            out.push_str("[path]");
        } else {
            out.extend(word.chars().filter(|c| !c.is_control()));
        }
        if out.len() > MAX_MESSAGE {
            let mut end = MAX_MESSAGE;
            while !out.is_char_boundary(end) {
                end -= 1;
            }
            out.truncate(end);
            out.push('…');
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::tidy;

    #[test]
    fn messages_lose_paths_and_control_characters() {
        assert_eq!(
            tidy("Load model from /srv/models/a/model.onnx failed:\n\x1b[31mbad"),
            "Load model from [path] failed: [31mbad"
        );
        assert!(tidy(&"word ".repeat(1000)).len() < 1000);
    }
}
