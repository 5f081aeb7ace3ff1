//! One task per model: the only one that loads, swaps, drains, restarts and withdraws it.
//!
//! It owns the generation that serves, takes operations from a bounded channel, and carries out what a burst of them comes down to
//! (see [`super::plan`]). While it loads it goes on listening: an unload ends the load at once, other operations wait for it, and
//! the old generation's death is noticed. Draining of a generation that was swapped out goes on by itself.
//!
//! ```text
//!            load ok                    worker died              3 deaths in 10 min
//! Unloaded ──▶ Loading ──▶ Ready ──────────▶ Loading (restart) ──▶ Withdrawn
//!                 │          │ reload: Ready until the new one is (failed: stays, with last_error)
//!                 ▼          ▼ unload
//!               Failed     Draining ──▶ Unloaded
//! ```
//! A file that crashed the runtime is remembered by its identity and not tried again until it changes.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

use super::{
    deaths::{Deaths, Verdict},
    plan::{Fresh, Op, plan},
    registry::{ModelState, ModelStatus, Shared, Slot},
    repository::Identity,
};
use crate::engine::{
    EngineError, Generation, LoadError, Loaded, ModelHandle,
    backend::{Backend, Refusal},
    now,
};

/// How often idle variants are looked for.
const SWEEP: Duration = Duration::from_secs(15);

/// An operation and who waits for it.
pub(super) struct Command {
    pub(super) op: Op,
    pub(super) reply: oneshot::Sender<Result<Option<ModelHandle>, EngineError>>,
}

/// Starts the supervisor of a model. It ends when its slot is gone.
pub(super) fn start(
    name: String,
    shared: Arc<Shared>,
    slot: &Arc<Slot>,
    inbox: mpsc::Receiver<Command>,
) {
    let config = shared.engine.config();
    let supervisor = Supervisor {
        deaths: Deaths::new(config.deaths, config.deaths_within),
        name,
        shared,
        slot: Arc::downgrade(slot),
        inbox,
        current: None,
        restart: None,
        crashed: None,
        loads: 0,
    };
    tokio::spawn(supervisor.run());
}

struct Supervisor {
    name: String,
    shared: Arc<Shared>,
    slot: Weak<Slot>,
    inbox: mpsc::Receiver<Command>,
    current: Option<Current>,
    /// When to try again after a death.
    restart: Option<tokio::time::Instant>,
    deaths: Deaths,
    /// What crashed the runtime at load, and how.
    crashed: Option<(Identity, String)>,
    loads: u64,
}

/// The generation that serves.
struct Current {
    generation: Arc<Generation>,
    backend: Arc<dyn Backend>,
    /// Resolves when the last handle is gone.
    drained: oneshot::Receiver<()>,
}

/// Why a load brought nothing.
enum Setback {
    /// An unload came.
    Superseded,
    /// It failed; with whether the same files may work another time.
    Failed { error: EngineError, transient: bool },
}

/// What woke the supervisor.
enum Event {
    Command(Command),
    Died(String),
    Restart,
    Sweep,
    Closed,
}

impl Supervisor {
    async fn run(mut self) {
        loop {
            match self.event().await {
                Event::Command(first) => {
                    let mut waiting = vec![first];
                    while !waiting.is_empty() {
                        while let Ok(next) = self.inbox.try_recv() {
                            waiting.push(next);
                        }
                        waiting = self.carry_out(waiting).await;
                    }
                }
                Event::Died(cause) => self.died(&cause),
                Event::Restart => {
                    self.restart = None;
                    let mut waiting = self.restart().await;
                    while !waiting.is_empty() {
                        waiting = self.carry_out(waiting).await;
                    }
                }
                Event::Sweep => {
                    if let Some(current) = &self.current {
                        current.generation.sweep();
                    }
                }
                Event::Closed => return,
            }
        }
    }

    async fn event(&mut self) -> Event {
        let died = died(self.current.as_ref());
        let restart = async {
            match self.restart {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            cause = died => Event::Died(cause),
            command = self.inbox.recv() => command.map_or(Event::Closed, Event::Command),
            () = restart => Event::Restart,
            () = tokio::time::sleep(SWEEP) => Event::Sweep,
        }
    }

    /// Carries out what the operations come down to; returns those that came meanwhile and are still to be done.
    async fn carry_out(&mut self, commands: Vec<Command>) -> Vec<Command> {
        let ops: Vec<Op> = commands.iter().map(|c| c.op).collect();
        let (plan, carried) = plan(&ops);
        let mut loads = Vec::new();
        let mut unloads = Vec::new();
        for (command, carried) in commands.into_iter().zip(carried) {
            match command.op {
                Op::Unload => unloads.push(command),
                Op::Load | Op::Reload if carried => loads.push(command),
                Op::Load | Op::Reload => reply(command, &Err(superseded(&self.name))),
            }
        }
        if plan.unload {
            self.unload().await;
            for command in unloads {
                reply(command, &Ok(None));
            }
        }
        let Some(fresh) = plan.load else {
            return Vec::new();
        };
        if fresh == Fresh::IfAbsent
            && let Some(handle) = self.slot.upgrade().and_then(|s| s.serving())
        {
            for command in loads {
                reply(command, &Ok(Some(handle.clone())));
            }
            return Vec::new();
        }
        // Someone looked at the model and wants it: old deaths do not count against it.
        self.deaths.forgive();
        self.restart = None;
        let mut meanwhile = Vec::new();
        let result = match self.load(&mut meanwhile).await {
            Ok(handle) => Ok(Some(handle)),
            Err(Setback::Superseded) => Err(superseded(&self.name)),
            Err(Setback::Failed { error, .. }) => Err(error),
        };
        for command in loads {
            reply(command, &result);
        }
        meanwhile
    }

    /// Loads the model and swaps it in. Operations that come meanwhile are put into `meanwhile`.
    async fn load(&mut self, meanwhile: &mut Vec<Command>) -> Result<ModelHandle, Setback> {
        if self.current.is_none() {
            self.state(ModelState::Loading, None);
        }
        self.loads += 1;
        let loading = load(
            self.shared.clone(),
            self.name.clone(),
            self.loads,
            self.crashed.clone(),
        );
        tokio::pin!(loading);
        let mut closed = false;
        let loaded = loop {
            let died = died(self.current.as_ref());
            tokio::select! {
                biased;
                loaded = &mut loading => break loaded,
                cause = died => {
                    self.died(&cause);
                    self.restart = None; // the load that is under way is the restart
                    self.state(ModelState::Loading, None);
                }
                command = self.inbox.recv(), if !closed => match command {
                    Some(command) => {
                        let unload = command.op == Op::Unload;
                        meanwhile.push(command);
                        if unload {
                            return Err(Setback::Superseded); // dropping the load ends its worker
                        }
                    }
                    None => closed = true,
                },
            }
        };
        match loaded {
            Ok((generation, backend)) => Ok(self.swap_in(generation, backend)),
            Err(failure) => {
                let reason = failure.error.to_string();
                tracing::warn!(model = self.name, reason, "a model could not be loaded");
                if let Some(crashed) = failure.crashed {
                    self.crashed = Some(crashed);
                }
                if self.current.is_none() {
                    self.state(ModelState::Failed { reason }, None);
                } else {
                    self.state(ModelState::Ready, Some(reason));
                }
                Err(Setback::Failed {
                    error: failure.error,
                    transient: failure.transient,
                })
            }
        }
    }

    fn swap_in(&mut self, generation: Arc<Generation>, backend: Arc<dyn Backend>) -> ModelHandle {
        let (handle, drained) = ModelHandle::new(generation.clone());
        if let Some(slot) = self.slot.upgrade() {
            slot.serve(Some(handle.clone()));
        }
        tracing::info!(
            model = self.name,
            generation = generation.number(),
            fingerprint = generation.info().fingerprint,
            "a model serves"
        );
        let old = self.current.replace(Current {
            generation,
            backend,
            drained,
        });
        self.crashed = None;
        self.state(ModelState::Ready, None);
        if let Some(old) = old {
            tokio::spawn(old.drain(self.shared.engine.config().drain_grace));
        }
        handle
    }

    async fn unload(&mut self) {
        self.restart = None;
        if let Some(slot) = self.slot.upgrade() {
            slot.serve(None);
        }
        if let Some(current) = self.current.take() {
            self.state(ModelState::Draining, None);
            current.drain(self.shared.engine.config().drain_grace).await;
            tracing::info!(model = self.name, "a model was unloaded");
        }
        self.state(ModelState::Unloaded, None);
    }

    /// The worker that served is gone.
    fn died(&mut self, cause: &str) {
        if let Some(slot) = self.slot.upgrade() {
            slot.serve(None);
        }
        if let Some(current) = self.current.take() {
            current.generation.died(cause);
        }
        tracing::error!(model = self.name, cause, "the worker of a model died");
        self.again(cause);
    }

    /// Sets the time of the next try, or withdraws the model.
    fn again(&mut self, cause: &str) {
        match self.deaths.record(now()) {
            Verdict::Restart(wait) => {
                self.restart = Some(tokio::time::Instant::now() + wait);
                self.state(ModelState::Loading, None);
            }
            Verdict::Withdraw => {
                tracing::error!(model = self.name, cause, "a model is withdrawn");
                self.restart = None;
                self.state(
                    ModelState::Withdrawn {
                        reason: crate::engine::error::clean(cause),
                    },
                    None,
                );
            }
        }
    }

    async fn restart(&mut self) -> Vec<Command> {
        super::observe::restart(&self.name);
        let mut meanwhile = Vec::new();
        if let Err(Setback::Failed {
            error,
            transient: true,
        }) = self.load(&mut meanwhile).await
        {
            self.again(&error.to_string());
        }
        meanwhile
    }

    fn state(&self, state: ModelState, last_error: Option<String>) {
        if self.slot.strong_count() == 0 {
            return; // taken out of the list
        }
        let generation = match &self.current {
            Some(current) => current.generation.number(),
            None => self.shared.status(&self.name).map_or(0, |s| s.generation),
        };
        self.shared.publish(&self.name, |_| {
            Some(ModelStatus {
                name: self.name.clone(),
                state,
                generation,
                last_error,
            })
        });
    }
}

impl Current {
    /// Lets what is open finish, then ends the worker and waits until it is gone.
    async fn drain(self, grace: Duration) {
        tokio::select! {
            _ = self.drained => {}
            _ = self.backend.died() => {}
            () = tokio::time::sleep(grace) => {}
        }
        self.generation.stop();
        self.backend.died().await;
    }
}

/// Why [`load`] failed.
struct Failure {
    error: EngineError,
    crashed: Option<(Identity, String)>,
    transient: bool,
}

impl Failure {
    fn lasting(error: EngineError) -> Self {
        Self {
            error,
            crashed: None,
            transient: false,
        }
    }
}

/// Finds the folder, has a new worker load it, and builds its plain graph. Dropped before its end, it leaves nothing.
async fn load(
    shared: Arc<Shared>,
    name: String,
    number: u64,
    crashed: Option<(Identity, String)>,
) -> Result<(Arc<Generation>, Arc<dyn Backend>), Failure> {
    let _turn = shared
        .loads
        .acquire()
        .await
        .map_err(|e| Failure::lasting(EngineError::internal(e)))?;
    let (looking, wanted) = (shared.clone(), name.clone());
    let found = tokio::task::spawn_blocking(move || looking.repository.find(&wanted))
        .await
        .map_err(|e| Failure::lasting(EngineError::internal(e)))?
        .map_err(|reason| {
            Failure::lasting(EngineError::precondition(format!(
                "\"{name}\" cannot be loaded: {reason}"
            )))
        })?
        .ok_or_else(|| {
            Failure::lasting(EngineError::not_found(format!(
                "the folder of model \"{name}\" is gone"
            )))
        })?;
    if let Some((identity, reason)) = crashed
        && identity == found.identity
    {
        return Err(Failure::lasting(EngineError::precondition(format!(
            "{reason}; its files have not changed since, so it is not tried again"
        ))));
    }
    let (backend, mut info) = shared
        .launcher
        .launch(&found.folder)
        .await
        .map_err(|error| failure(error, found.identity))?;
    info.name = name;
    let ended = Ended(Some(backend.clone()));
    let generation = shared
        .engine
        .adopt(Loaded {
            number,
            info,
            backend: backend.clone(),
        })
        .await
        .map_err(|error| {
            if let EngineError::WorkerDied { cause, .. } = error {
                failure(LoadError::Crashed { cause }, found.identity)
            } else {
                Failure::lasting(error)
            }
        })?;
    ended.keep();
    Ok((generation, backend))
}

/// Ends a worker that nobody will use.
struct Ended(Option<Arc<dyn Backend>>);

impl Ended {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(backend) = self.0.take() {
            backend.kill("its load was given up");
        }
    }
}

/// Sorts a failed load: what the files are to blame for is remembered, what came from outside may be tried again.
fn failure(error: LoadError, identity: Identity) -> Failure {
    let text = error.to_string();
    match error {
        LoadError::Start(_) => Failure {
            error: EngineError::unavailable(text, None),
            crashed: None,
            transient: true,
        },
        LoadError::Refused { kind, message } => Failure::lasting(match kind {
            Refusal::BadModel | Refusal::InvalidArgument => EngineError::invalid("model", message),
            Refusal::FailedPrecondition
            | Refusal::Provider
            | Refusal::NoVariant
            | Refusal::Cancelled => EngineError::precondition(message),
            Refusal::ResourceExhausted => EngineError::exhausted(message, None),
            Refusal::Runtime => {
                EngineError::precondition(format!("the runtime refused the model: {message}"))
            }
        }),
        // Killed from outside (an operator, the kernel short of memory): not the files' fault.
        LoadError::Crashed { cause }
            if ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"].contains(&cause.as_str()) =>
        {
            Failure {
                error: EngineError::unavailable(text, None),
                crashed: None,
                transient: true,
            }
        }
        LoadError::Crashed { .. } | LoadError::TimedOut(_) => Failure {
            crashed: Some((identity, text.clone())),
            error: EngineError::precondition(text),
            transient: false,
        },
    }
}

/// Comes when the worker that serves is gone; never without one.
fn died(current: Option<&Current>) -> impl Future<Output = String> + use<> {
    let died = current.map(|c| c.backend.died());
    async {
        match died {
            Some(died) => died.await,
            None => std::future::pending().await,
        }
    }
}

fn superseded(name: &str) -> EngineError {
    EngineError::unavailable(
        format!("an unload of model \"{name}\" came in between"),
        None,
    )
}

/// Answers an operation; who asked may have left.
fn reply(command: Command, result: &Result<Option<ModelHandle>, EngineError>) {
    let _ = command.reply.send(result.clone());
}
