//! introspectd: transformer models as ONNX files, served with what happens inside them.
//!
//! # The way of a request
//!
//! ```text
//!        FRONT                                            WORKER, a process per model
//!  bytes ─▶ service ─▶ methods ─▶ engine ══ ipc ══▶ worker ─▶ variant of the graph ─▶ ONNX Runtime
//!             │           │          │                ▲
//!             │           │          │                └─ rewrite ◀─ anatomy ◀─ onnx   (when a model loads)
//!          wire types   rows      batches
//! ```
//!
//! A request enters at [`service`], the only code that knows the wire, and is validated there once. A file of [`methods`] turns it
//! into rows of a graph variant. They wait in the [`engine`] for a run, cross by [`ipc`] (frames on a socket, tensors in shared memory) to the
//! [`worker`] process that holds the model, run there, and come back the same way; the method reduces them and the service streams them.
//!
//! [`model`] keeps what is loaded: the repository, generations, reloads, restarts. When a worker loads a model, [`onnx`] reads
//! the file, [`anatomy`] finds the transformer in it (unfusing what hides it, then by dominators of the data flow and a few runs on small
//! inputs), and [`rewrite`] makes the variants: graphs that show hook points, move them by inputs of the run, begin at them, and compute the gradient of
//! what is explained.
//!
//! [`config`], [`telemetry`], [`shutdown`] and [`tensor`] are leaves; [`cli`] is the binary's commands.
//!
//! # Direction of dependencies
//!
//! Each part leans only on those to its left: `tensor <- onnx <- anatomy <- rewrite <- worker` and
//! `tensor <- ipc <- engine <- model <- methods <- service <- cli`. The two rows meet in `ipc` only. `tests/architecture.rs` reads the
//! sources and holds it.
//!
//! # Invariants
//!
//! 1. `onnx`, `anatomy` and `rewrite` are pure: they name no tokio, tonic or ort, and the same input gives the same output.
//! 2. Only `service` and `cli` name tonic and the public wire types, only `onnx` the ONNX messages, only `worker` ort and tokenizers. The front
//!    opens no model file.
//! 3. A rewrite is a value ([`onnx::Patch`]) that is checked when it is applied; the original graph is never edited.
//! 4. A variant's logits equal the file's within the named tolerance (the certificate, on every load); a hook point that is moved by nothing
//!    changes no bit.
//! 5. A row in a batch gives what it gives alone; padding never shows in an answer. Models of which that is not true run each request by itself.
//! 6. No channel and no queue is unbounded; every capacity is in [`engine::EngineConfig`] or [`config::Config`], with what happens when it is full.
//! 7. No panic is reachable from a request, a model file, a tokenizer file or the environment. A worker that dies all the same fails its requests
//!    in flight, and nothing else.
//! 8. A new method is a file in `methods`, a message in `proto/` and an arm in `service`. The engine knows no method.

pub mod anatomy;
pub mod cli;
pub mod config;
pub mod engine;
pub mod ipc;
pub mod methods;
pub mod model;
pub mod onnx;
pub mod rewrite;
pub mod service;
pub mod shutdown;
pub mod telemetry;
pub mod tensor;
pub mod worker;
