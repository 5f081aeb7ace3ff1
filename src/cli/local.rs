//! A daemon inside of this process, for one command or for the demonstration: the same service on a port of its own.

use std::{net::SocketAddr, path::Path, time::Duration};

use clap::{Args as _, Command, FromArgMatches as _};
use indicatif::{ProgressBar, ProgressFinish};

use super::{error::CliError, out::clean};
use crate::{
    config::{Config, Flags},
    model::Repository,
    service::{Daemon, Setup, StartError},
    shutdown::Shutdown,
    telemetry::recorder::Recorder,
};

/// How often the sign of life of a load moves.
const TICK: Duration = Duration::from_millis(80);
/// How long the daemon may take to end.
const GRACE: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Local {
    daemon: Daemon,
    shutdown: Shutdown,
}

impl Local {
    /// Serves one model of a repository, on a port that nobody else knows of.
    pub(super) async fn start(models: &Path, only: &str) -> Result<Self, CliError> {
        let flags = Flags {
            models: Some(models.display().to_string()),
            listen: Some("127.0.0.1:0".into()),
            admin_listen: Some("off".into()),
            log: Some("off".into()),
            ..from_environment()
        };
        let config = resolve(&flags)?;
        look(models, only)?;
        Self::serve(config, Some(only.to_owned()), None, Shutdown::default())
            .await
            .map_err(not_started)
    }

    /// Serves as the settings say; answers when the models are loaded, or could not be.
    pub(super) async fn serve(
        config: Config,
        only: Option<String>,
        recorder: Option<Recorder>,
        shutdown: Shutdown,
    ) -> Result<Self, StartError> {
        let spinner = ProgressBar::new_spinner().with_finish(ProgressFinish::AndClear);
        spinner.set_message(match &only {
            Some(model) => format!("loading \"{}\" in this process", clean(model)),
            None => "starting the daemon, loading its models".into(),
        });
        spinner.enable_steady_tick(TICK);
        let setup = Setup {
            only,
            recorder,
            ..Setup::new(config)
        };
        let daemon = Daemon::start(setup, shutdown.clone()).await?;
        daemon.settled().await;
        spinner.finish_and_clear();
        Ok(Self { daemon, shutdown })
    }

    /// Where it takes gRPC.
    pub(super) fn address(&self) -> SocketAddr {
        self.daemon.address()
    }

    /// Where it shows its metrics.
    pub(super) fn admin_address(&self) -> Option<SocketAddr> {
        self.daemon.admin_address()
    }

    /// Ends it. What it has to say about its end is of no use to the command that is done.
    pub(super) async fn stop(self) {
        self.shutdown.drain.cancel();
        let _ = tokio::time::timeout(GRACE, self.daemon.finished()).await;
    }
}

/// Why a daemon did not start, for people.
pub(super) fn not_started(error: StartError) -> CliError {
    CliError::new(error.to_string()).advise("`introspectd doctor` looks closer")
}

/// Tells what is wrong with a model's folder before anything is started.
fn look(models: &Path, name: &str) -> Result<(), CliError> {
    let shown = models.display();
    let found = Repository::open(models)
        .map_err(|e| CliError::new(format!("cannot read the folder \"{shown}\": {e}")))?
        .find(name);
    match found {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(CliError::new(format!(
            "there is no model \"{}\" in \"{shown}\"",
            clean(name)
        ))
        .advise("a model is a folder with model.onnx or onnx/model.onnx in it")),
        Err(why) => Err(CliError::new(format!(
            "\"{}\" in \"{shown}\" is no model: {why}",
            clean(name)
        ))),
    }
}

/// Settings, with all mistakes told.
pub(super) fn resolve(flags: &Flags) -> Result<Config, CliError> {
    Config::resolve(flags).map_err(|mistakes| CliError::new(mistakes.to_string()))
}

/// The settings that the environment has, as `serve` would take them.
pub(super) fn from_environment() -> Flags {
    let matches =
        Flags::augment_args(Command::new("introspectd")).get_matches_from(["introspectd"]);
    // Every setting is an optional text: there is nothing that could be wrong with one here.
    Flags::from_arg_matches(&matches).unwrap_or_default()
}
