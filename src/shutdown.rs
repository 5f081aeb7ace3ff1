//! Signals and the order of stopping.
//!
//! The first SIGTERM or SIGINT asks for a drain, the second ends the process. SIGPIPE is ignored (the standard library
//! does that before `main`), SIGHUP ends the process as ever.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What the operator asked for so far.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled by the first signal: take nothing new, finish what is open.
    pub drain: CancellationToken,
    /// Cancelled by the second: end now.
    pub force: CancellationToken,
}

impl Shutdown {
    /// Listens for signals from now on. Must be called inside of a tokio runtime.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::default();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let tokens = shutdown.clone();
        tokio::spawn(async move {
            for token in [tokens.drain, tokens.force] {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                tracing::info!(signal = name, "asked to stop");
                token.cancel();
            }
        });
        Ok(shutdown)
    }
}
