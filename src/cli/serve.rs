//! `serve`: the life of the daemon, from its settings to the last worker's end.

use crate::{
    config::{Config, Flags},
    service::{Daemon, Setup},
    shutdown::Shutdown,
    telemetry::{log, recorder::Recorder},
};

use super::error::CliError;

pub(super) const EXAMPLES: &str = "\
Examples:
  Serve every model of ./models on 127.0.0.1:50061, with metrics on 127.0.0.1:9464:
    introspectd serve --models ./models
  In production, settings in a file, the log for programs:
    introspectd serve --config /etc/introspectd.toml --log-format json
  Where others can reach it (put a proxy with TLS in front):
    introspectd serve --models ./models --listen 0.0.0.0:50061
The configuration file has the names of the flags with underscores:
    models = \"/srv/models\"
    batch_tokens = 4096
Precedence: flag, environment variable, file, default.
SIGTERM or Ctrl-C drains: open calls finish within the grace. A second one ends at once.";

/// Serves until a signal, and all is down.
pub(super) async fn run(flags: &Flags) -> Result<(), CliError> {
    let config = Config::resolve(flags).map_err(|e| CliError::new(e.to_string()))?;
    log::init(config.log_format, &config.log);
    let recorder = Recorder::install()
        .map_err(|e| CliError::new(format!("metrics cannot be recorded: {e}")))?;
    let shutdown = Shutdown::on_signals()
        .map_err(|e| CliError::new(format!("signals cannot be handled: {e}")))?;
    let setup = Setup {
        recorder: Some(recorder),
        ..Setup::new(config)
    };
    let daemon = Daemon::start(setup, shutdown)
        .await
        .map_err(|e| CliError::new(e.to_string()))?;
    let admin = daemon.admin_address().map(|a| a.to_string());
    tracing::info!(
        grpc = %daemon.address(),
        admin = admin.as_deref().unwrap_or("off"),
        models = %daemon.registry().root().display(),
        version = env!("CARGO_PKG_VERSION"),
        "introspectd serves"
    );
    daemon.finished().await;
    Ok(())
}
