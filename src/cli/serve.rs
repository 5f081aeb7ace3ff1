//! `serve`: the life of the daemon. Settings, log, metrics, listeners, drain.

use std::{io::IsTerminal as _, time::Duration};

use super::{error::CliError, local, out};
use crate::{
    config::Flags,
    service::{Daemon, Setup},
    shutdown::Shutdown,
    telemetry::{log, recorder::Recorder},
};

pub(super) const EXAMPLES: &str = "\
Examples:
  introspectd serve --models ./models
  introspectd serve --models ./models --listen 127.0.0.1:0 --log introspectd=debug
  introspectd serve --config /etc/introspectd.toml
  INTROSPECTD_MODELS=/models INTROSPECTD_LOG_FORMAT=json introspectd serve
SIGTERM and Ctrl-C drain: nothing new is taken, what is open finishes within --grace. A second one ends at once.";

/// Beyond the grace, what the end itself may take.
const END: Duration = Duration::from_secs(10);

/// Runs the daemon until it is asked to stop.
pub(super) async fn run(flags: &Flags) -> Result<(), CliError> {
    let config = local::resolve(flags)?;
    log::init(config.log_format, &config.log);
    let recorder = Recorder::install()
        .map_err(|e| CliError::new(format!("the metrics cannot be set up: {e}")))?;
    tokio::spawn(recorder.clone().upkeep());
    let shutdown = Shutdown::on_signals()
        .map_err(|e| CliError::new(format!("cannot listen for signals: {e}")))?;
    let limit = config.grace + END;
    let setup = Setup {
        recorder: Some(recorder),
        ..Setup::new(config)
    };
    let daemon = Daemon::start(setup, shutdown.clone())
        .await
        .map_err(|e| CliError::new(e.to_string()).advise("`introspectd doctor` looks closer"))?;
    let admin = daemon
        .admin_address()
        .map_or("off".to_owned(), |a| format!("http://{a}"));
    tracing::info!(grpc = %daemon.address(), admin, "listening");
    if std::io::stdout().is_terminal() {
        out::print(&format!(
            "gRPC on {}, admin {admin}. Ctrl-C drains.\n",
            daemon.address()
        ))?;
    }
    shutdown.drain.cancelled().await;
    tokio::select! {
        () = daemon.finished() => Ok(()),
        () = shutdown.force.cancelled() => Err(CliError::new("ended at once, as asked; open calls were cut")),
        () = tokio::time::sleep(limit) => Err(CliError::new("the end took longer than its grace")),
    }
}
