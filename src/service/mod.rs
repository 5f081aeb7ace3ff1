//! The gRPC edge: the only code of the daemon that names tonic and our wire types.
//!
//! ```text
//!  connection ─▶ listener ─▶ edge ─▶ routes ─▶ capture │ attribution │ intervention │ analysis │ probe │ models │ inference │ health │ reflection
//!                  │           │                 │
//!                  limits      deadline,         from_proto ─▶ methods, model ─▶ to_proto
//!                  keepalive   metrics, stalls
//! ```
//!
//! - [`daemon`] puts everything together and holds the order of stopping;
//! - `listener` accepts connections and bounds them; `edge` bounds each call in time and counts it;
//! - `from_proto` validates once, so that nothing behind it meets a wire type; `to_proto` is the way back; `status` is the one table
//!   from errors to codes;
//! - `bulk` answers many inputs over one stream; `messages` cuts answers into bounded pieces and signs them with a checksum.

mod analysis;
mod attribution;
mod bulk;
mod call;
mod capture;
pub mod daemon;
mod edge;
mod explained;
mod from_proto;
mod inference;
mod intervention;
mod listener;
pub(crate) mod messages;
mod models;
mod probe;
pub(crate) mod status;
mod teller;
mod to_proto;
mod watched;
pub mod wire;

pub use daemon::{Daemon, Setup, StartError};
