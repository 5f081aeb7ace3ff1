//! Between the front and its workers: frames, shared memory, and the plain data that crosses.
//!
//! ```text
//!   front                                            worker
//!   Connection ── Command (frame) ─────────────────▶ WorkerSide::next
//!       ▲        tensors in sealed memfd segments        │
//!       └──────── Event (frame, same id) ◀───────── WorkerSide::send
//! ```
//! Either side makes the segments that it writes, passes each descriptor once, and gets a segment back by `Release` when the
//! last view of it is dropped. Nothing here knows what a model is.

pub mod frame;
pub mod front;
pub mod info;
pub mod shm;
mod socket;
pub mod spec;
pub mod wire;
pub mod worker_side;
