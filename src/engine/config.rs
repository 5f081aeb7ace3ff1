//! Every bound of the engine in one place, with what happens when it is met.

use std::time::Duration;

const MIB: usize = 1 << 20;

/// Bounds of the engine. All of them apply to data; none is a trade between correct and fast.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Padded tokens of a run. More waiting rows go to the next run; a single longer row runs alone.
    pub batch_tokens: usize,
    /// A run has as many rows as end within this time, by what its graph took before; a single longer row runs alone. What is more
    /// urgent waits for no longer, and rows of heavy graphs gain nothing from company.
    pub run_time: Duration,
    /// Rows of a run.
    pub batch_rows: usize,
    /// Bytes that a run brings back; a single row that brings more runs alone.
    pub batch_bytes: usize,
    /// Rows that wait for one model. Full: resource exhausted, with retry advice.
    pub queue_rows: usize,
    /// Bytes of inputs that wait for one model. Full: as above.
    pub queue_bytes: usize,
    /// Tokens of all requests of one model that are not answered yet. Full: as above.
    pub open_tokens: usize,
    /// Bytes of results in the daemon that nobody took yet, and what callers buffer. Full: as above.
    pub buffer_bytes: usize,
    /// Bytes of results that wait for the reader of one request. Full: its rows wait, others run.
    pub window_bytes: usize,
    /// Questions about text or the graph that are with one worker at a time. Full: further ones wait for their turn.
    pub calls: usize,
    /// Variants that one worker is asked to build at a time. Full: as above.
    pub builds: usize,
    /// Memory of the variants of one model beside its plain graph. Full: the longest unused leave; when all are in use, resource exhausted.
    pub variant_bytes: u64,
    /// A variant that nobody used for so long is evicted.
    pub variant_idle: Duration,
    /// Runs at a time on the CPU, over all models (each run uses all cores).
    pub cpu_slots: usize,
    /// Runs at a time on each other device.
    pub device_slots: usize,
    /// A cancelled run that goes on for so long has its worker replaced.
    pub cancel_grace: Duration,
    /// A worker is asked so often whether it lives.
    pub heartbeat: Duration,
    /// A worker that does not answer for so long is replaced.
    pub heartbeat_limit: Duration,
    /// A load that takes longer fails.
    pub load_limit: Duration,
    /// A load that reports no progress for so long fails.
    pub load_silence: Duration,
    /// What is still open on a generation that was replaced or unloaded has so long to finish.
    pub drain_grace: Duration,
    /// So many deaths ...
    pub deaths: usize,
    /// ... within this time withdraw a model.
    pub deaths_within: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            batch_tokens: 2048,
            run_time: Duration::from_millis(400),
            batch_rows: 256,
            batch_bytes: 64 * MIB,
            queue_rows: 16 * 1024,
            queue_bytes: 256 * MIB,
            open_tokens: 2 * 1024 * 1024,
            buffer_bytes: 1024 * MIB,
            window_bytes: 32 * MIB,
            calls: 256,
            builds: 16,
            variant_bytes: 1024 * MIB as u64,
            variant_idle: Duration::from_secs(600),
            cpu_slots: 1,
            device_slots: 1,
            cancel_grace: Duration::from_secs(2),
            heartbeat: Duration::from_secs(1),
            heartbeat_limit: Duration::from_secs(4),
            load_limit: Duration::from_secs(180),
            load_silence: Duration::from_secs(15),
            drain_grace: Duration::from_secs(30),
            deaths: 3,
            deaths_within: Duration::from_secs(600),
        }
    }
}
