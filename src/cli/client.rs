//! The way to a daemon: one that listens somewhere, or one started in this process for one command.
//!
//! Both are talked to over gRPC, so that a command sees what any client sees.

use std::{path::Path, time::Duration};

use clap::Args;
use tonic::transport::{Channel, Endpoint};

use super::{error::CliError, local::Local};
use crate::service::wire::introspect::{
    analysis_service_client::AnalysisServiceClient,
    attribution_service_client::AttributionServiceClient,
    capture_service_client::CaptureServiceClient,
    intervention_service_client::InterventionServiceClient,
    model_service_client::ModelServiceClient, probe_service_client::ProbeServiceClient,
};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent connection is asked so often whether it lives.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Largest message that is accepted: the description of a model with very many hook points.
const MESSAGE_LIMIT: usize = 64 << 20;

/// Which daemon a command talks to.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Where the model runs")]
pub(super) struct Target {
    /// The daemon to ask
    #[arg(
        long,
        env = "INTROSPECTD_SERVER",
        value_name = "URL",
        default_value = "http://127.0.0.1:50061"
    )]
    pub(super) server: String,
    /// No daemon: run the model of this folder of models in this process. Settings come from INTROSPECTD_* variables
    #[arg(long, value_name = "DIR")]
    pub(super) models: Option<std::path::PathBuf>,
}

/// An open way to a daemon.
pub(super) struct Session {
    channel: Channel,
    local: Option<Local>,
}

impl Session {
    /// Finds the daemon for a model: in this process when the target says so, or when `model` is the path of a folder. Gives the name
    /// that the model has there, too.
    pub(super) async fn for_model(
        target: &Target,
        model: &str,
    ) -> Result<(Self, String), CliError> {
        let folder = Path::new(model);
        if let Some(models) = &target.models {
            let session = Self::in_process(models, model).await?;
            return Ok((session, model.to_owned()));
        }
        if model.contains('/') || model == "." || model == ".." {
            let (repository, name) = repository_of(folder)?;
            let session = Self::in_process(&repository, &name).await?;
            return Ok((session, name));
        }
        let session = connect(&target.server).await.map_err(|error| {
            if folder.is_dir() {
                error.advise(format!(
                    "to run the model of the folder here, write \"./{model}\""
                ))
            } else {
                error
            }
        })?;
        Ok((session, model.to_owned()))
    }

    /// The daemon that listens.
    pub(super) async fn remote(target: &Target) -> Result<Self, CliError> {
        if target.models.is_some() {
            return Err(CliError::Usage(
                "\"--models\" runs one model in this process; this command is about a daemon: use --server".into(),
            ));
        }
        connect(&target.server).await
    }

    async fn in_process(models: &Path, name: &str) -> Result<Self, CliError> {
        let local = Local::start(models, name).await?;
        let session = connect(&format!("http://{}", local.address())).await?;
        Ok(Self {
            local: Some(local),
            ..session
        })
    }

    /// Ends the daemon in this process, if there is one.
    pub(super) async fn close(self) {
        drop(self.channel);
        if let Some(local) = self.local {
            local.stop().await;
        }
    }

    /// Calls about models.
    pub(super) fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// Calls for explanations.
    pub(super) fn attributions(&self) -> AttributionServiceClient<Channel> {
        AttributionServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// Calls for probes.
    pub(super) fn probes(&self) -> ProbeServiceClient<Channel> {
        ProbeServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// Calls for interventions.
    pub(super) fn interventions(&self) -> InterventionServiceClient<Channel> {
        InterventionServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// Calls for analyses.
    pub(super) fn analyses(&self) -> AnalysisServiceClient<Channel> {
        AnalysisServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// Calls for captures.
    pub(super) fn captures(&self) -> CaptureServiceClient<Channel> {
        CaptureServiceClient::new(self.channel.clone()).max_encoding_message_size(MESSAGE_LIMIT)
    }
}

/// The repository that a model's folder stands in, and its name there.
fn repository_of(folder: &Path) -> Result<(std::path::PathBuf, String), CliError> {
    let refuse = |why: String| {
        CliError::new(format!(
            "\"{}\" is no folder of a model: {why}",
            folder.display()
        ))
        .advise("name a folder that has model.onnx or onnx/model.onnx in it")
    };
    let path = folder.canonicalize().map_err(|e| refuse(e.to_string()))?;
    if !path.is_dir() {
        return Err(refuse("it is a file".into()));
    }
    let name = path.file_name().and_then(|n| n.to_str());
    match (path.parent(), name) {
        (Some(parent), Some(name)) => {
            crate::model::repository::check_name(name).map_err(refuse)?;
            Ok((parent.to_owned(), name.to_owned()))
        }
        _ => Err(refuse("it has no name of its own".into())),
    }
}

async fn connect(server: &str) -> Result<Session, CliError> {
    let url = if server.contains("://") {
        server.to_owned()
    } else {
        format!("http://{server}")
    };
    if !url.starts_with("http://") {
        return Err(CliError::Usage(format!(
            "\"{server}\" cannot be reached: this client speaks plain http; write http://HOST:PORT, and have a proxy \
             beside it add TLS"
        )));
    }
    let endpoint = Endpoint::from_shared(url.clone())
        .map_err(|_| {
            CliError::Usage(format!(
                "\"{server}\" is no address of a daemon: write it as http://127.0.0.1:50061"
            ))
        })?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE);
    let channel = endpoint.connect().await.map_err(|e| {
        let mut deepest: &dyn std::error::Error = &e;
        while let Some(source) = deepest.source() {
            deepest = source;
        }
        CliError::new(format!("no daemon answers at {url} ({deepest})")).advise(
            "start one with `introspectd serve --models DIR`, name another with --server URL, or run the model in this \
             process with --models DIR",
        )
    })?;
    Ok(Session {
        channel,
        local: None,
    })
}
