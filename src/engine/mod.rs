//! The front's side of running: rows in, tensors out.
//!
//! ```text
//!  ModelHandle::submit ─ inputs checked, outputs found ─ permits ─▶ Queue ─▶ Batch ─▶ Worker (a process)
//!         │                (inputs)      (variants, widen) (admission)  (queue, lanes, batch)   │
//!         ◀──────────────────────── RowStream (stream) ◀──────────── Scheduler ◀────────────────┘
//! ```
//!
//! What decides is pure and takes the time as an argument: [`lanes`], [`batch`], [`queue`], [`admission`], [`variants`], [`widen`], [`inputs`].
//! What waits only moves what they decided: [`scheduler`] (one per device), [`generation`] (one per loaded model), [`worker`] (one process,
//! asked through `calls`).
//!
//! Invariants, each held by a test:
//! 1. every row runs at most once, and never after its request ended;
//! 2. a run stays within its bounds in padded tokens, rows and bytes, unless it is a single row;
//! 3. every request ends exactly once ([`ticket`]), and its permits come back;
//! 4. a predict waits for at most one run of a lower lane, and no lane starves;
//! 5. a worker's death fails what it was running, and nothing else.
//!
//! Left out: methods (the engine knows none), tokens' meaning, the wire.

pub mod admission;
pub mod backend;
pub mod batch;
mod calls;
pub mod config;
pub mod edits;
pub mod error;
pub mod generation;
pub mod handle;
pub mod inputs;
pub mod lanes;
mod observe;
pub mod queue;
pub mod request;
pub mod scheduler;
pub mod stream;
pub mod ticket;
pub mod variants;
pub mod widen;
pub mod worker;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

pub use backend::{Launcher, LoadError};
pub use config::EngineConfig;
pub use edits::Edits;
pub use error::EngineError;
pub use generation::{Generation, Loaded};
pub use handle::ModelHandle;
pub use request::{
    Ctx, Encoding, Job, Lane, NamedTensor, PickSpec, RowGroup, RowsDone, StageTimings, TextInput,
    TokenizeOptions,
};
pub use stream::RowStream;
pub use ticket::Outcome;
pub use worker::{ProcessLauncher, Worker, WorkerCommand};

use admission::Budget;
use scheduler::Scheduler;

/// What the loaded models of a daemon share: compute slots by device, and the budget for results. Clones are the same engine.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    config: EngineConfig,
    buffers: Arc<Budget>,
    devices: Mutex<HashMap<String, Arc<Scheduler>>>,
}

impl Engine {
    /// An engine without models.
    pub fn new(config: EngineConfig) -> Self {
        Self {
            shared: Arc::new(Shared {
                buffers: Budget::new(config.buffer_bytes),
                config,
                devices: Mutex::default(),
            }),
        }
    }

    /// Its bounds.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// The budget for results, shared by all models.
    pub fn buffers(&self) -> &Arc<Budget> {
        &self.shared.buffers
    }

    /// Takes a loaded model in: its plain graph is built, so that the first predict finds it. Must be called inside of a tokio runtime.
    ///
    /// # Errors
    /// When the plain graph cannot be built.
    pub async fn adopt(&self, loaded: Loaded) -> Result<Arc<Generation>, EngineError> {
        let scheduler = self.scheduler(&loaded.info.provider);
        let generation = Generation::new(
            loaded,
            scheduler,
            self.shared.config.clone(),
            self.shared.buffers.clone(),
        );
        generation.prepare().await?;
        Ok(generation)
    }

    /// One scheduler for each device: the CPU, or a GPU by its number.
    fn scheduler(&self, provider: &str) -> Arc<Scheduler> {
        let config = &self.shared.config;
        let mut devices = self
            .shared
            .devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        devices
            .entry(provider.to_owned())
            .or_insert_with(|| {
                let slots = if provider == "cpu" {
                    config.cpu_slots
                } else {
                    config.device_slots
                };
                Scheduler::new(config.clone(), slots)
            })
            .clone()
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine")
    }
}

/// The time, as tokio's clock has it, so that tests can hold it still.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod testing;
