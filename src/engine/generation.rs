//! One loaded model: its worker, what is known of it, its variants. A reload makes another.
//!
//! A generation is open until its worker dies or it has been drained; then everything that waits for it is answered and nothing
//! new is taken. Who holds a [`ModelHandle`](super::handle::ModelHandle) keeps it from being drained.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Semaphore, watch};

use super::{
    admission::Budget,
    backend::{Backend, Fault, Refusal},
    config::EngineConfig,
    error::EngineError,
    inputs::ModelInputs,
    now, observe,
    request::Ctx,
    scheduler::Scheduler,
    ticket::{Ledger, Outcome},
    variants::{Built, Lookup, Variants},
    widen::widen,
};
use crate::ipc::{
    info::ModelInfo,
    spec::{Plan, VariantSpec},
};

/// When to come back to a model whose worker is being restarted.
pub(crate) const RESTART_RETRY: Duration = Duration::from_secs(1);

/// Comes to whoever waits for a build.
type BuildResult = Option<Result<(), EngineError>>;

/// See the module.
pub struct Generation {
    /// Unique in this daemon.
    pub(super) id: u64,
    number: u64,
    info: Arc<ModelInfo>,
    pub(super) inputs: ModelInputs,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) config: EngineConfig,
    /// Bytes of results, shared by the daemon.
    pub(super) buffers: Arc<Budget>,
    /// Tokens of open requests.
    pub(super) tokens: Arc<Budget>,
    variants: Mutex<Variants<watch::Receiver<BuildResult>>>,
    closed: Mutex<Option<EngineError>>,
    /// The worker takes so many questions at a time and no more.
    pub(super) calls: Semaphore,
    builds: Semaphore,
    pub(super) counts: Arc<Counts>,
}

/// How many requests are open, and how the others ended.
#[derive(Debug, Default)]
pub struct Counts {
    open: AtomicUsize,
    ended: [AtomicU64; 5],
}

impl Counts {
    /// Requests that have no end yet.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    /// Requests that ended so.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.ended[outcome as usize].load(Ordering::Acquire)
    }
}

impl Ledger for Counts {
    fn began(&self) {
        self.open.fetch_add(1, Ordering::AcqRel);
    }

    fn ended(&self, outcome: Outcome) {
        self.open.fetch_sub(1, Ordering::AcqRel);
        self.ended[outcome as usize].fetch_add(1, Ordering::AcqRel);
    }
}

/// What a generation is made of.
pub struct Loaded {
    /// Counts the loads of this model.
    pub number: u64,
    /// With the name filled in.
    pub info: ModelInfo,
    /// Its worker.
    pub backend: Arc<dyn Backend>,
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Generation({} of {:?})", self.number, self.info.name)
    }
}

impl Generation {
    pub(super) fn new(
        loaded: Loaded,
        scheduler: Arc<Scheduler>,
        config: EngineConfig,
        buffers: Arc<Budget>,
    ) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            number: loaded.number,
            inputs: ModelInputs::new(&loaded.info),
            info: Arc::new(loaded.info),
            backend: loaded.backend,
            scheduler,
            buffers,
            tokens: Budget::new(config.open_tokens),
            variants: Mutex::new(Variants::new(config.variant_bytes)),
            closed: Mutex::new(None),
            calls: Semaphore::new(config.calls.max(1)),
            builds: Semaphore::new(config.builds.max(1)),
            counts: Arc::default(),
            config,
        })
    }

    /// What is known of the model.
    pub fn info(&self) -> &Arc<ModelInfo> {
        &self.info
    }

    /// Counts the loads of this model, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Name of the model.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// Why it takes nothing any more, if so.
    pub(super) fn check_open(&self) -> Result<(), EngineError> {
        lock(&self.closed).clone().map_or(Ok(()), Err)
    }

    /// The worker died: everything that waits is answered, and nothing new is taken.
    pub fn died(&self, cause: &str) {
        self.close(EngineError::unavailable(
            format!(
                "the worker of model \"{}\" died ({cause}) and is being restarted",
                self.name()
            ),
            Some(RESTART_RETRY),
        ));
    }

    /// Ends the worker, because the model was unloaded or replaced.
    pub fn stop(&self) {
        self.close(EngineError::unavailable(
            format!(
                "generation {} of model \"{}\" was unloaded",
                self.number,
                self.name()
            ),
            Some(RESTART_RETRY),
        ));
        self.backend.kill("unloaded");
    }

    /// The first reason stands.
    fn close(&self, reason: EngineError) {
        let reason = lock(&self.closed).get_or_insert(reason).clone();
        self.scheduler.forget(self.id, &reason);
        observe::variants(self.name(), 0);
    }

    /// What a caller hears of a worker's fault.
    pub(super) fn error(&self, fault: Fault) -> EngineError {
        match fault {
            Fault::Died { cause } => match self.check_open() {
                // Taken away on purpose: that is no death.
                Err(reason) if cause == "unloaded" => reason,
                Ok(()) | Err(_) => EngineError::WorkerDied {
                    model: self.name().to_owned(),
                    cause: super::error::clean(&cause),
                },
            },
            Fault::Refused {
                kind,
                message,
                subject,
            } => match kind {
                Refusal::InvalidArgument => EngineError::invalid(subject, message),
                Refusal::FailedPrecondition | Refusal::Provider => {
                    EngineError::precondition(message)
                }
                Refusal::BadModel => EngineError::DataLoss {
                    message: super::error::clean(&message),
                },
                Refusal::ResourceExhausted => {
                    EngineError::exhausted(message, Some(self.scheduler.retry_after()))
                }
                Refusal::Cancelled => EngineError::Cancelled,
                Refusal::Runtime | Refusal::NoVariant => EngineError::internal(format!(
                    "model \"{}\": {message} ({subject})",
                    self.name()
                )),
            },
        }
    }

    /// The variant that shows what `spec` asks for, built if need be, and the time that was spent waiting for it.
    pub(super) async fn variant(
        self: &Arc<Self>,
        spec: &VariantSpec,
        ctx: &Ctx,
    ) -> Result<(VariantLease, Duration), EngineError> {
        let spec = widen(spec, &self.info);
        let began = now();
        loop {
            let (done, waiters) = watch::channel(None);
            let found = lock(&self.variants).lookup(&spec, now(), waiters.clone());
            let mut waiters = match found {
                Lookup::Ready(built) => {
                    let lease = VariantLease {
                        generation: self.clone(),
                        built,
                    };
                    return Ok((lease, now().saturating_duration_since(began)));
                }
                Lookup::Full => {
                    return Err(EngineError::exhausted(
                        format!(
                            "all memory for graph variants of model \"{}\" is in use",
                            self.name()
                        ),
                        Some(self.scheduler.retry_after()),
                    ));
                }
                Lookup::Wait(waiters) => waiters,
                Lookup::Build { id, evict } => {
                    // A task of its own: the build goes on for the others when its first caller leaves.
                    tokio::spawn(self.clone().build(id, evict, spec.clone(), done));
                    waiters
                }
            };
            let result = tokio::select! {
                result = waiters.wait_for(Option::is_some) => result.ok().and_then(|r| r.clone()),
                error = ended(ctx) => return Err(error),
            };
            match result {
                Some(Ok(())) => {}
                Some(Err(error)) => return Err(error),
                None => {
                    return Err(EngineError::internal(
                        "the task that built a variant ended without a word",
                    ));
                }
            }
        }
    }

    /// Builds the plain graph, so that the first predict finds it.
    pub(super) async fn prepare(self: &Arc<Self>) -> Result<(), EngineError> {
        self.variant(&VariantSpec::plain(), &Ctx::default())
            .await
            .map(drop)
    }

    async fn build(
        self: Arc<Self>,
        id: u32,
        evict: Vec<u32>,
        spec: VariantSpec,
        done: watch::Sender<BuildResult>,
    ) {
        // If this task is dropped, the next who asks builds again.
        let mut unfinished = Unfinished {
            generation: &self,
            spec: Some(&spec),
        };
        self.evict(&evict);
        // Never closed, so that there is always a turn.
        let turn = self.builds.acquire().await;
        let result = self.backend.build(id, &spec).await;
        drop(turn);
        observe::variant_build(self.name(), result.is_ok());
        let result = match result {
            Ok(variant) => {
                unfinished.spec = None;
                let built = Built {
                    id,
                    outputs: variant.outputs,
                };
                let mut variants = lock(&self.variants);
                let evict =
                    variants.built(&spec, built, variant.bytes, spec.plan == Plan::Plain, now());
                observe::variants(self.name(), variants.len());
                drop(variants);
                self.evict(&evict);
                Ok(())
            }
            Err(fault) => Err(self.error(fault)),
        };
        drop(unfinished);
        done.send_replace(Some(result));
    }

    /// Evicts what nobody used for a while.
    pub(crate) fn sweep(&self) {
        let mut variants = lock(&self.variants);
        let idle = variants.idle(now(), self.config.variant_idle);
        observe::variants(self.name(), variants.len());
        drop(variants);
        self.evict(&idle);
    }

    fn evict(&self, ids: &[u32]) {
        for id in ids {
            self.backend.evict(*id);
        }
    }
}

/// Makes a build that was given up be forgotten.
struct Unfinished<'a> {
    generation: &'a Generation,
    spec: Option<&'a VariantSpec>,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(spec) = self.spec {
            lock(&self.generation.variants).failed(spec);
        }
    }
}

/// A variant in use: not evicted until this is dropped.
#[derive(Debug)]
pub(super) struct VariantLease {
    generation: Arc<Generation>,
    pub(super) built: Arc<Built>,
}

impl Drop for VariantLease {
    fn drop(&mut self) {
        lock(&self.generation.variants).release(self.built.id, now());
    }
}

/// Comes when the caller left or its time is over.
pub(super) async fn ended(ctx: &Ctx) -> EngineError {
    match ctx.deadline {
        Some(deadline) => {
            match tokio::time::timeout_at(deadline.into(), ctx.cancel.cancelled()).await {
                Ok(()) => EngineError::Cancelled,
                Err(_) => EngineError::DeadlineExceeded,
            }
        }
        None => {
            ctx.cancel.cancelled().await;
            EngineError::Cancelled
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
