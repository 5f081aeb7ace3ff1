//! The messages of `proto/worker/worker.proto`.

#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)] // generated; documented in the proto

include!(concat!(env!("OUT_DIR"), "/introspect.worker.v1.rs"));
