//! What the daemon sees of its models.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::{
    observe,
    plan::Op,
    repository::{Repository, Skipped},
    supervisor::{self, Command},
};
use crate::engine::{Engine, EngineError, Launcher, ModelHandle};

/// Operations on one model that may wait; more are refused.
const OPERATIONS_LIMIT: usize = 256;
/// When to come back to a model that is being loaded.
const LOADING_RETRY: Duration = Duration::from_secs(1);

/// How models are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelSettings {
    /// Loads at a time, over all models: each takes memory and every core for a while.
    pub loads_at_a_time: usize,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self { loads_at_a_time: 2 }
    }
}

/// Where a model is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelState {
    /// In the repository, not loaded.
    Unloaded,
    /// Being loaded, or restarted after its worker died; nothing serves meanwhile.
    Loading,
    /// Serves. A reload leaves it so until its successor is ready.
    Ready,
    /// Could not be loaded.
    Failed {
        /// Why; fit to show.
        reason: String,
    },
    /// Takes nothing new; what is open finishes.
    Draining,
    /// Died too often; an operator must load it again.
    Withdrawn {
        /// What its workers died of.
        reason: String,
    },
}

/// What is known of a model in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelStatus {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub state: ModelState,
    /// The load that serves, or served last; 0 before the first.
    pub generation: u64,
    /// Why the last reload failed, while an older generation serves.
    pub last_error: Option<String>,
}

/// Every model by name, at one moment.
pub type Snapshot = Arc<BTreeMap<String, ModelStatus>>;

/// See the module. Clones are the same registry.
#[derive(Clone)]
pub struct Registry {
    pub(super) shared: Arc<Shared>,
}

/// What the registry and the supervisors share.
pub(super) struct Shared {
    pub(super) engine: Engine,
    pub(super) repository: Repository,
    pub(super) launcher: Arc<dyn Launcher>,
    pub(super) loads: Semaphore,
    slots: DashMap<String, Arc<Slot>>,
    skipped: Mutex<Vec<Skipped>>,
    states: watch::Sender<Snapshot>,
    closing: AtomicBool,
}

/// One model's place.
pub(super) struct Slot {
    commands: mpsc::Sender<Command>,
    serving: RwLock<Option<ModelHandle>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({} models)", self.shared.slots.len())
    }
}

impl Registry {
    /// An empty registry; [`Registry::rescan`] fills it.
    pub fn new(
        engine: Engine,
        repository: Repository,
        launcher: Arc<dyn Launcher>,
        settings: ModelSettings,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                engine,
                repository,
                launcher,
                loads: Semaphore::new(settings.loads_at_a_time.max(1)),
                slots: DashMap::new(),
                skipped: Mutex::default(),
                states: watch::Sender::default(),
                closing: AtomicBool::new(false),
            }),
        }
    }

    /// The engine that runs the models.
    pub fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// Path of the repository.
    pub fn root(&self) -> &Path {
        self.shared.repository.root()
    }

    /// The folder that a model's files are in, whether it is loaded or not.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub fn folder(&self, name: &str) -> Result<PathBuf, EngineError> {
        self.shared.repository.folder(name).ok_or_else(|| {
            EngineError::not_found(format!("there is no model \"{name}\" in the repository"))
        })
    }

    /// The model of a name, if it serves.
    ///
    /// # Errors
    /// [`EngineError::NotFound`]; [`EngineError::Unavailable`] while it is loading, restarting or draining; [`EngineError::FailedPrecondition`]
    /// when it failed to load, was withdrawn or is not loaded.
    pub fn get(&self, name: &str) -> Result<ModelHandle, EngineError> {
        if let Some(slot) = self.shared.slots.get(name)
            && let Some(handle) = &*read(&slot.serving)
        {
            return Ok(handle.clone());
        }
        Err(self.why_not(name))
    }

    /// As [`Registry::get`]; a version that is not empty must be the generation that serves.
    ///
    /// # Errors
    /// As [`Registry::get`]; [`EngineError::NotFound`] for another version.
    pub fn get_version(&self, name: &str, version: &str) -> Result<ModelHandle, EngineError> {
        let handle = self.get(name)?;
        if version.is_empty() || version == handle.generation().to_string() {
            return Ok(handle);
        }
        Err(EngineError::not_found(format!(
            "model \"{name}\" has no version \"{version}\": version {} serves",
            handle.generation()
        )))
    }

    /// Every model, by name.
    pub fn list(&self) -> Snapshot {
        self.shared.states.borrow().clone()
    }

    /// Follows the states of all models. A slow follower misses steps between, never the last.
    pub fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.shared.states.subscribe()
    }

    /// Folders that the last scan left out.
    pub fn skipped(&self) -> Vec<Skipped> {
        lock(&self.shared.skipped).clone()
    }

    /// Looks at the repository: new models are listed as unloaded, those whose folder is gone and that are not loaded are forgotten. Loads nothing.
    ///
    /// # Errors
    /// When the repository cannot be read.
    pub async fn rescan(&self) -> Result<Vec<String>, EngineError> {
        let shared = self.shared.clone();
        let scan = tokio::task::spawn_blocking(move || shared.repository.scan())
            .await
            .map_err(EngineError::internal)?
            .map_err(|e| {
                EngineError::unavailable(
                    format!("the repository cannot be read: {}", e.kind()),
                    None,
                )
            })?;
        for skipped in &scan.skipped {
            tracing::warn!(
                folder = skipped.name,
                reason = skipped.reason,
                "left out of the repository"
            );
        }
        *lock(&self.shared.skipped) = scan.skipped;
        let names: Vec<String> = scan.found.into_iter().map(|f| f.name).collect();
        for name in &names {
            self.slot(name);
        }
        let gone: Vec<String> = self
            .list()
            .values()
            .filter(|s| {
                !names.contains(&s.name)
                    && matches!(s.state, ModelState::Unloaded | ModelState::Failed { .. })
            })
            .map(|s| s.name.clone())
            .collect();
        for name in gone {
            self.shared.slots.remove(&name);
            self.shared.publish(&name, |_| None);
        }
        Ok(names)
    }

    /// Scans, and loads everything that was found. A model that fails says so in its state; the others serve.
    ///
    /// # Errors
    /// When the repository cannot be read.
    pub async fn load_all(&self) -> Result<(), EngineError> {
        let names = self.rescan().await?;
        let loads = names.into_iter().map(|name| {
            let this = self.clone();
            async move {
                // Its state says it, and the log.
                let _ = this.load(&name).await;
            }
        });
        futures::future::join_all(loads).await;
        Ok(())
    }

    /// Loads a model; nothing to do when it serves. Gives the handle that serves then.
    ///
    /// # Errors
    /// [`EngineError::NotFound`], or why it could not be loaded.
    pub async fn load(&self, name: &str) -> Result<ModelHandle, EngineError> {
        self.bring_up(name, Op::Load).await
    }

    /// Loads a model afresh and swaps it in when its certificate is there; until then, and if it fails, the old one serves.
    ///
    /// # Errors
    /// As [`Registry::load`].
    pub async fn reload(&self, name: &str) -> Result<ModelHandle, EngineError> {
        self.bring_up(name, Op::Reload).await
    }

    /// Takes a model away: what is open finishes (within the grace), then its worker ends. Comes back when all of its memory is given back.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub async fn unload(&self, name: &str) -> Result<(), EngineError> {
        if !self.shared.slots.contains_key(name) {
            return Err(not_found(name));
        }
        self.operate(name, Op::Unload).await.map(drop)
    }

    /// Unloads everything; nothing is loaded any more.
    pub async fn shutdown(&self) {
        self.shared.closing.store(true, Ordering::Release);
        let slots: Vec<Arc<Slot>> = self
            .shared
            .slots
            .iter()
            .map(|s| s.value().clone())
            .collect();
        let ends = slots.iter().map(|slot| async {
            let (reply, done) = oneshot::channel();
            let command = Command {
                op: Op::Unload,
                reply,
            };
            if slot.commands.send(command).await.is_ok() {
                // An error means that the supervisor is gone, and with it the worker.
                let _ = done.await;
            }
        });
        futures::future::join_all(ends).await;
    }

    async fn bring_up(&self, name: &str, op: Op) -> Result<ModelHandle, EngineError> {
        if !self.shared.slots.contains_key(name) {
            let (shared, owned) = (self.shared.clone(), name.to_owned());
            let found = tokio::task::spawn_blocking(move || shared.repository.find(&owned))
                .await
                .map_err(EngineError::internal)?;
            match found {
                Ok(Some(_)) => {}
                Ok(None) => return Err(not_found(name)),
                Err(reason) => {
                    return Err(EngineError::precondition(format!(
                        "\"{name}\" cannot be loaded: {reason}"
                    )));
                }
            }
        }
        self.operate(name, op)
            .await?
            .ok_or_else(|| EngineError::internal("a load ended without a model"))
    }

    async fn operate(&self, name: &str, op: Op) -> Result<Option<ModelHandle>, EngineError> {
        if self.shared.closing.load(Ordering::Acquire) {
            return Err(EngineError::unavailable(
                "the daemon is shutting down",
                None,
            ));
        }
        let (reply, answer) = oneshot::channel();
        let command = Command { op, reply };
        self.slot(name)
            .commands
            .try_send(command)
            .map_err(|e| match e {
                mpsc::error::TrySendError::Full(_) => EngineError::exhausted(
                    format!("too many operations wait for model \"{name}\""),
                    Some(LOADING_RETRY),
                ),
                mpsc::error::TrySendError::Closed(_) => {
                    EngineError::internal("the supervisor of a model is gone")
                }
            })?;
        answer.await.unwrap_or_else(|_| {
            Err(EngineError::internal(
                "the supervisor of a model ended without an answer",
            ))
        })
    }

    /// The model's place, made if need be together with its supervisor.
    fn slot(&self, name: &str) -> Arc<Slot> {
        self.shared
            .slots
            .entry(name.to_owned())
            .or_insert_with(|| {
                let (commands, inbox) = mpsc::channel(OPERATIONS_LIMIT);
                let slot = Arc::new(Slot {
                    commands,
                    serving: RwLock::new(None),
                });
                self.shared.publish(name, |_| {
                    Some(ModelStatus {
                        name: name.to_owned(),
                        state: ModelState::Unloaded,
                        generation: 0,
                        last_error: None,
                    })
                });
                supervisor::start(name.to_owned(), self.shared.clone(), &slot, inbox);
                slot
            })
            .clone()
    }

    fn why_not(&self, name: &str) -> EngineError {
        let list = self.list();
        let Some(status) = list.get(name) else {
            return not_found(name);
        };
        match &status.state {
            ModelState::Ready | ModelState::Loading => EngineError::unavailable(
                format!("model \"{name}\" is being loaded"),
                Some(LOADING_RETRY),
            ),
            ModelState::Draining => EngineError::unavailable(
                format!("model \"{name}\" is draining"),
                Some(LOADING_RETRY),
            ),
            ModelState::Unloaded => {
                EngineError::precondition(format!("model \"{name}\" is not loaded: load it first"))
            }
            ModelState::Failed { reason } => {
                EngineError::precondition(format!("model \"{name}\" could not be loaded: {reason}"))
            }
            ModelState::Withdrawn { reason } => EngineError::precondition(format!(
                "model \"{name}\" was withdrawn because its workers kept dying ({reason}): load it to try again"
            )),
        }
    }
}

impl Shared {
    /// Changes what is published of a model; `None` takes it out of the list.
    pub(super) fn publish(
        &self,
        name: &str,
        change: impl FnOnce(Option<ModelStatus>) -> Option<ModelStatus>,
    ) {
        self.states.send_modify(|snapshot| {
            let states = Arc::make_mut(snapshot);
            let old = states.remove(name);
            let new = change(old);
            let serves = new.as_ref().is_some_and(|s| s.state == ModelState::Ready);
            observe::ready(name, serves);
            if let Some(new) = new {
                states.insert(name.to_owned(), new);
            }
        });
    }

    /// What is published of a model.
    pub(super) fn status(&self, name: &str) -> Option<ModelStatus> {
        self.states.borrow().get(name).cloned()
    }
}

impl Slot {
    /// Sets who answers for the model.
    pub(super) fn serve(&self, handle: Option<ModelHandle>) {
        *self.serving.write().unwrap_or_else(PoisonError::into_inner) = handle;
    }

    /// Who answers for the model.
    pub(super) fn serving(&self) -> Option<ModelHandle> {
        read(&self.serving).clone()
    }
}

fn not_found(name: &str) -> EngineError {
    EngineError::not_found(format!("there is no model \"{name}\" in the repository"))
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
