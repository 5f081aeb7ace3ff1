//! The daemon: listeners, registry, services, and the order of starting and stopping.
//!
//! Starting: bind, serve (not ready), read the repository, load. Ready when every first load has ended, well or not: a broken model is
//! reported, and the others serve.
//!
//! Stopping: health and readiness turn at once; no connection is accepted any more; open calls finish within the grace; then what
//! is left is cut, and the workers end.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{
    analysis::Analyses,
    attribution::Attributions,
    capture::Captures,
    edge::Edge,
    inference::{Inference, Statistics},
    intervention::Interventions,
    listener::{self, Limits},
    models::Models,
    probe::{ProbesOf, Trainings},
    watched::Stalls,
    wire::{
        self, inference::grpc_inference_service_server as oip, introspect::analysis_service_server,
        introspect::attribution_service_server, introspect::capture_service_server,
        introspect::intervention_service_server, introspect::model_service_server,
        introspect::probe_service_server,
    },
};
use crate::{
    config::Config,
    engine::{Engine, EngineConfig, ProcessLauncher, WorkerCommand},
    ipc::spec::{LoadOptions, UnknownProvider},
    methods::{intervene::Means, probe::ready::Probes},
    model::{ModelSettings, Registry, Repository},
    shutdown::Shutdown,
    telemetry::{
        admin::{self, Admin},
        recorder::Recorder,
    },
};

/// Services whose health is told, beside the daemon's own ("").
const SERVICES: [&str; 7] = [
    "introspect.v1.ModelService",
    "introspect.v1.CaptureService",
    "introspect.v1.AttributionService",
    "introspect.v1.ProbeService",
    "introspect.v1.InterventionService",
    "introspect.v1.AnalysisService",
    "inference.GRPCInferenceService",
];
/// How long the workers may take to end once every call is over.
const UNLOAD_LIMIT: Duration = Duration::from_secs(5);

/// Why the daemon did not start, or broke down.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({setting}): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The setting that asks for it.
        setting: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The repository cannot be opened.
    #[error("cannot read the folder of models {folder:?}: {source}")]
    Repository {
        /// The folder.
        folder: String,
        /// Why.
        source: io::Error,
    },
    /// The provider has no meaning.
    #[error(transparent)]
    Provider(#[from] UnknownProvider),
    /// The descriptors that reflection serves are broken.
    #[error("reflection cannot be served: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The executable cannot find itself, to start workers.
    #[error("cannot find this executable, to start workers: {0}")]
    Executable(io::Error),
}

/// What a daemon is made from.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Settings.
    pub config: Config,
    /// Load this model only, in place of all.
    pub only: Option<String>,
    /// Where `/metrics` comes from.
    pub recorder: Option<Recorder>,
    /// How to start a worker; this executable's `worker` command unless told otherwise.
    pub worker: Option<WorkerCommand>,
}

impl Setup {
    /// All models of the repository, no metrics page.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            only: None,
            recorder: None,
            worker: None,
        }
    }
}

/// What the services share.
pub(super) struct State {
    pub(super) registry: Registry,
    pub(super) config: Config,
    pub(super) statistics: Statistics,
    pub(super) probes: Arc<Probes>,
    pub(super) means: Means,
    pub(super) trainings: Trainings,
    ready: watch::Receiver<bool>,
}

impl State {
    pub(super) fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }
}

/// A daemon that runs.
pub struct Daemon {
    address: SocketAddr,
    admin_address: Option<SocketAddr>,
    registry: Registry,
    settled: watch::Receiver<bool>,
    life: JoinHandle<()>,
}

impl Daemon {
    /// Binds, begins to load and serves until `shutdown` asks for a drain. Must be called inside of a tokio runtime.
    ///
    /// # Errors
    /// When an address, the repository or the provider is no good. A model that is no good is not an error.
    pub async fn start(setup: Setup, shutdown: Shutdown) -> Result<Self, StartError> {
        let Setup {
            config,
            only,
            recorder,
            worker,
        } = setup;
        let registry = registry(&config, worker)?;
        let listener = bind(config.listen, "listen").await?;
        let address = local(&listener, config.listen, "listen")?;
        let admin_listener = match config.admin_listen {
            Some(at) => Some(bind(at, "admin_listen").await?),
            None => None,
        };
        let admin_address = match (&admin_listener, config.admin_listen) {
            (Some(listener), Some(at)) => Some(local(listener, at, "admin_listen")?),
            (Some(_) | None, _) => None,
        };
        let (ready, readiness) = watch::channel(false);
        let (loaded, settled) = watch::channel(false);
        let health = HealthReporter::new();
        tell_health(&health, ServingStatus::NotServing).await;
        let state = Arc::new(State {
            registry: registry.clone(),
            statistics: Statistics::default(),
            probes: Arc::new(Probes::new(config.probes.clone())),
            means: Means::default(),
            trainings: Trainings::default(),
            ready: readiness.clone(),
            config: config.clone(),
        });
        let stalls = Stalls::new(config.stall_limit);
        let edge = Arc::new(Edge::new(routes(&state, &health)?, stalls.clone()));
        let life = Life {
            listener,
            admin_listener,
            admin: Admin {
                recorder,
                ready: readiness,
            },
            edge,
            stalls,
            limits: Limits {
                connections: config.max_connections,
                streams: config.max_streams,
                keepalive: config.keepalive,
            },
            grace: config.grace,
            registry: registry.clone(),
            only,
            health,
            ready,
            loaded,
            shutdown,
        };
        Ok(Self {
            address,
            admin_address,
            registry,
            settled,
            life: tokio::spawn(life.run()),
        })
    }

    /// Address of the gRPC port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Address of the admin pages.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// The models.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Comes when the first loads have ended, well or not, and readiness and health say so.
    pub async fn settled(&self) {
        // An error means that the daemon ends: nothing more will be loaded.
        let _ = self.settled.clone().wait_for(|done| *done).await;
    }

    /// Comes when everything is down, after a drain was asked for.
    pub async fn finished(self) {
        if let Err(panic) = self.life.await {
            tracing::error!(%panic, "the daemon broke down");
        }
    }
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Daemon({})", self.address)
    }
}

fn registry(config: &Config, worker: Option<WorkerCommand>) -> Result<Registry, StartError> {
    let repository = Repository::open(&config.models).map_err(|source| StartError::Repository {
        folder: config.models.display().to_string(),
        source,
    })?;
    let command = match worker {
        Some(command) => command,
        None => WorkerCommand::this_executable().map_err(StartError::Executable)?,
    };
    let engine = EngineConfig {
        batch_tokens: config.batch_tokens,
        queue_rows: config.queue_rows,
        open_tokens: config.open_tokens,
        buffer_bytes: config.buffer,
        variant_bytes: config.variant_memory as u64,
        load_limit: config.load_limit,
        drain_grace: config.grace,
        ..EngineConfig::default()
    };
    let launcher = ProcessLauncher {
        command,
        options: LoadOptions {
            provider: config.provider.parse()?,
            intra_threads: config.threads,
            arena: config.arena,
            memory_limit_bytes: config.worker_memory,
            library: config.ort_library.clone(),
            repository: Some(repository.root().to_owned()),
            max_tokens: config.max_tokens,
            max_text_bytes: config.max_text,
            ..LoadOptions::default()
        },
        config: engine.clone(),
    };
    let settings = ModelSettings {
        loads_at_a_time: config.loads_at_a_time,
    };
    Ok(Registry::new(
        Engine::new(engine),
        repository,
        Arc::new(launcher),
        settings,
    ))
}

async fn bind(address: SocketAddr, setting: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartError::Listen {
            address,
            setting,
            source,
        })
}

fn local(
    listener: &TcpListener,
    address: SocketAddr,
    setting: &'static str,
) -> Result<SocketAddr, StartError> {
    listener.local_addr().map_err(|source| StartError::Listen {
        address,
        setting,
        source,
    })
}

fn routes(state: &Arc<State>, health: &HealthReporter) -> Result<Routes, StartError> {
    const GZIP: CompressionEncoding = CompressionEncoding::Gzip;
    const ZSTD: CompressionEncoding = CompressionEncoding::Zstd;
    let limit = state.config.max_message;
    macro_rules! ours {
        ($server:expr) => {
            $server
                .max_decoding_message_size(limit)
                .accept_compressed(GZIP)
                .accept_compressed(ZSTD)
                .send_compressed(GZIP)
                .send_compressed(ZSTD)
        };
    }
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(wire::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let models = Models {
        state: state.clone(),
    };
    let captures = Captures {
        state: state.clone(),
    };
    let attributions = Attributions {
        state: state.clone(),
    };
    let interventions = Interventions {
        state: state.clone(),
    };
    let analyses = Analyses {
        state: state.clone(),
    };
    let probes = ProbesOf {
        state: state.clone(),
    };
    let inference = Inference {
        state: state.clone(),
    };
    let health = tonic_health::server::HealthService::from_health_reporter(health.clone());
    let mut routes = Routes::builder();
    routes
        .add_service(ours!(model_service_server::ModelServiceServer::new(models)))
        .add_service(ours!(capture_service_server::CaptureServiceServer::new(
            captures
        )))
        .add_service(ours!(
            attribution_service_server::AttributionServiceServer::new(attributions)
        ))
        .add_service(ours!(probe_service_server::ProbeServiceServer::new(probes)))
        .add_service(ours!(
            intervention_service_server::InterventionServiceServer::new(interventions)
        ))
        .add_service(ours!(analysis_service_server::AnalysisServiceServer::new(
            analyses
        )))
        .add_service(ours!(oip::GrpcInferenceServiceServer::new(inference)))
        .add_service(tonic_health::pb::health_server::HealthServer::new(health))
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok(routes.routes())
}

async fn tell_health(health: &HealthReporter, status: ServingStatus) {
    for service in SERVICES.into_iter().chain([""]) {
        health.set_service_status(service, status).await;
    }
}

/// What runs until the end.
struct Life {
    listener: TcpListener,
    admin_listener: Option<TcpListener>,
    admin: Admin,
    edge: Arc<Edge>,
    stalls: Stalls,
    limits: Limits,
    grace: Duration,
    registry: Registry,
    only: Option<String>,
    health: HealthReporter,
    ready: watch::Sender<bool>,
    loaded: watch::Sender<bool>,
    shutdown: Shutdown,
}

impl Life {
    async fn run(self) {
        let kill = CancellationToken::new();
        let over = CancellationToken::new();
        let upkeep = self
            .admin
            .recorder
            .clone()
            .map(|r| tokio::spawn(r.upkeep()));
        let stalls = tokio::spawn(self.stalls.clone().run());
        let admin = self.admin_listener.map(|listener| {
            let pages = admin::serve(listener, self.admin.clone(), over.clone().cancelled_owned());
            tokio::spawn(async move {
                if let Err(error) = pages.await {
                    tracing::error!(%error, "the admin pages broke down");
                }
            })
        });
        let mut calls = tokio::spawn(listener::serve(
            self.listener,
            self.edge,
            self.limits,
            self.shutdown.drain.clone(),
            kill.clone(),
        ));

        tokio::select! {
            () = load(&self.registry, self.only) => {
                self.ready.send_replace(true);
                tell_health(&self.health, ServingStatus::Serving).await;
                tracing::info!("ready");
                // Last: who waits for it finds the daemon ready however they ask.
                self.loaded.send_replace(true);
                self.shutdown.drain.cancelled().await;
            }
            () = self.shutdown.drain.cancelled() => {}
        }

        self.ready.send_replace(false);
        tell_health(&self.health, ServingStatus::NotServing).await;
        tracing::info!(grace = ?self.grace, "draining");
        tokio::select! {
            _ = &mut calls => {}
            () = tokio::time::sleep(self.grace) => {
                tracing::warn!("the grace is over: open calls are cut");
            }
            () = self.shutdown.force.cancelled() => {}
        }
        kill.cancel();
        tokio::select! {
            _ = tokio::time::timeout(UNLOAD_LIMIT, self.registry.shutdown()) => {}
            () = self.shutdown.force.cancelled() => {}
        }
        over.cancel();
        if let Some(admin) = admin {
            // It gives its connections a second and then ends.
            let _ = admin.await;
        }
        stalls.abort();
        if let Some(upkeep) = upkeep {
            upkeep.abort();
        }
        tracing::info!("stopped");
    }
}

async fn load(registry: &Registry, only: Option<String>) {
    let loaded = match only {
        // Why it failed is in its state.
        Some(model) => registry.load(&model).await.map(drop),
        None => registry.load_all().await,
    };
    if let Err(error) = loaded {
        tracing::error!(%error, "models could not be loaded");
    }
}
