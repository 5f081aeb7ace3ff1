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

mod certificate;
mod config;
mod differences;
mod json;
mod landing;
mod limits;
mod load;
mod measure;
mod native;
mod normal;
mod pick;
mod probe;
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

use std::path::Path;

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
    // Where the library was looked for is the operator's business; every other message may reach a client.
    let message = if kind == Failure::Provider {
        shortened(message)
    } else {
        tidy(message)
    };
    let failed = Failed {
        failure: kind.into(),
        message,
        subject: subject.chars().take(200).collect(),
    };
    sender.send(id, event::Kind::Failed(failed), None)
}

/// A message of the runtime for people: one line, without control characters, without paths of this host, not too long.
fn tidy(message: &str) -> String {
    let words: Vec<&str> = message
        .split_whitespace()
        // The runtime names the lines of its own source.
        .filter(|w| !w.contains(".cc:") && !w.contains(".h:"))
        .map(without_folders)
        .collect();
    shortened(&words.join(" "))
}

/// Keeps the last part of a path of this host. Names in a graph look like paths too, but their first part is no folder of the root.
fn without_folders(word: &str) -> &str {
    let path = word.trim_start_matches(['"', '\'', '(', '[', '`']);
    let first = path.strip_prefix('/').and_then(|p| p.split('/').next());
    match (first, word.rfind('/')) {
        (Some(first), Some(last)) if !first.is_empty() && Path::new("/").join(first).exists() => {
            &word[last + 1..]
        }
        _ => word,
    }
}

fn shortened(message: &str) -> String {
    let mut out: String = message
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if out.len() > MAX_MESSAGE {
        out.truncate(out.floor_char_boundary(MAX_MESSAGE));
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::tidy;

    #[test]
    fn messages_lose_folders_of_this_host_and_control_characters_and_keep_names() {
        assert_eq!(
            tidy("Load model from \"/tmp/models/a/model.onnx\" failed:\n\x1b[31mbad"),
            "Load model from model.onnx\" failed:  [31mbad"
        );
        let node = "node \"/encoder/layers.0/self_attn/Reshape_4\" is broken";
        assert_eq!(tidy(node), node);
        assert_eq!(tidy("/onnxruntime_src/core/graph.cc:12 failed"), "failed");
        assert!(tidy(&"wörd ".repeat(1000)).len() < 1000);
    }
}
