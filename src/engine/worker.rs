//! A worker process: started, loaded under a clock, watched, ended.
//!
//! It is started with one end of a socket pair as its standard input, a cleared environment (see `KEPT`) with ONNX
//! Runtime's telemetry switched off, and in a process group of its own, so that a Ctrl-C meant for the daemon does not reach it before the
//! daemon has drained. It ends when its socket closes, so never outlives the daemon.
//!
//! Its death is noticed by its exit or by the closing of the socket, and recorded once with its cause (a signal's name where there is one). A
//! heartbeat finds those that live but do not answer. Every call that is under way then, and every later one, fails with [`Fault::Died`].
//!
//! Limits of memory and time inside of the process are its own work; here are only the clocks that it cannot be trusted with.

use std::{
    ffi::OsString,
    os::{fd::OwnedFd, unix::net::UnixStream, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::{
    process::{Child, Command},
    sync::{Notify, watch},
    time::{Instant, timeout},
};

use super::{
    backend::{Backend, Fault, Launched, Launcher, LoadError, Refusal},
    calls,
    config::EngineConfig,
};
use crate::ipc::{
    front::Connection,
    info::ModelInfo,
    spec::LoadOptions,
    wire::{self, command, event},
};

/// What a worker keeps of our environment: where libraries and caches are, what GPUs there are, how to log. Nothing that may hold a secret.
const KEPT: [&str; 16] = [
    "HOME",
    "XDG_CACHE_HOME",
    "PATH",
    "LD_LIBRARY_PATH",
    "ORT_DYLIB_PATH",
    "TMPDIR",
    "LANG",
    "TZ",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUDA_PATH",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "LLVM_PROFILE_FILE",
];

/// How long an exit may lag behind the closing of the socket before the worker is killed.
const EXIT_LAG: Duration = Duration::from_millis(300);

/// How to start a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerCommand {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables beside those that are kept.
    pub env: Vec<(OsString, OsString)>,
}

impl WorkerCommand {
    /// This executable's `worker` command.
    pub fn this_executable() -> std::io::Result<Self> {
        Ok(Self::of(std::env::current_exe()?))
    }

    /// The `worker` command of an `introspectd` executable.
    pub fn of(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: vec!["worker".into()],
            env: Vec::new(),
        }
    }
}

/// See the module. Dropped, it ends the process.
pub struct Worker {
    pub(super) connection: Connection,
    pub(super) death: Arc<Death>,
    pub(super) pid: Option<u32>,
}

/// How the process ended, and who waits for it.
pub(super) struct Death {
    pub(super) cause: watch::Sender<Option<String>>,
    /// Why it is to be killed; the first reason stands.
    pub(super) wanted: OnceLock<String>,
    pub(super) kill: Notify,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Worker({:?})", self.pid)
    }
}

impl Worker {
    /// Starts a process and has it load the model of `folder`.
    ///
    /// # Errors
    /// Whatever went wrong; the process is gone then.
    pub async fn spawn(
        command: &WorkerCommand,
        folder: &Path,
        options: &LoadOptions,
        config: &EngineConfig,
    ) -> Result<(Arc<Self>, ModelInfo), LoadError> {
        let worker = Self::start(command, config).map_err(|e| {
            LoadError::Start(format!(
                "{}: {e}",
                command.program.file_name().unwrap_or_default().display()
            ))
        })?;
        match worker.load(folder, options, config).await {
            Ok(info) => {
                tokio::spawn(heartbeat(Arc::downgrade(&worker), config.clone()));
                Ok((worker, info))
            }
            Err(error) => {
                worker.kill("the load failed");
                Err(error)
            }
        }
    }

    fn start(command: &WorkerCommand, config: &EngineConfig) -> std::io::Result<Arc<Self>> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut process = Command::new(&command.program);
        process
            .args(&command.args)
            .env_clear()
            .envs(
                KEPT.iter()
                    .filter_map(|name| Some((name, std::env::var_os(name)?))),
            )
            .env("ORT_DISABLE_TELEMETRY", "1")
            .envs(command.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .process_group(0)
            .kill_on_drop(true);
        let child = process.spawn()?;
        drop(process); // it holds the other end of the socket
        let pid = child.id();
        let connection = Connection::new(ours, config.queue_bytes)?;
        let death = Arc::new(Death {
            cause: watch::Sender::new(None),
            wanted: OnceLock::new(),
            kill: Notify::new(),
        });
        tokio::spawn(reap(child, connection.clone(), death.clone()));
        Ok(Arc::new(Self {
            connection,
            death,
            pid,
        }))
    }

    async fn load(
        &self,
        folder: &Path,
        options: &LoadOptions,
        config: &EngineConfig,
    ) -> Result<ModelInfo, LoadError> {
        let options =
            serde_json::to_string(options).map_err(|e| LoadError::Start(e.to_string()))?;
        let folder = folder.to_str().ok_or_else(|| {
            LoadError::Start("the model's folder has a name that is not UTF-8".into())
        })?;
        let load = |id| {
            command::Kind::Load(wire::Load {
                id,
                folder: folder.to_owned(),
                options,
            })
        };
        let silence = async {
            while timeout(config.load_silence, self.connection.progress())
                .await
                .is_ok()
            {}
        };
        let answer = tokio::select! {
            answer = self.call(load, None) => answer,
            () = tokio::time::sleep(config.load_limit) => {
                return Err(LoadError::TimedOut(format!("it took longer than {} s", config.load_limit.as_secs())));
            }
            () = silence => {
                return Err(LoadError::TimedOut(format!("no progress for {} s", config.load_silence.as_secs())));
            }
        };
        match answer {
            Ok((event::Kind::Loaded(loaded), _)) => {
                serde_json::from_str(&loaded.info).map_err(|e| LoadError::Refused {
                    kind: Refusal::Runtime,
                    message: format!("the worker's description of the model cannot be read: {e}"),
                })
            }
            Ok((other, _)) => Err(LoadError::Refused {
                kind: Refusal::Runtime,
                message: format!("the worker answered a load with {}", calls::name(&other)),
            }),
            Err(Fault::Refused { kind, message, .. }) => Err(LoadError::Refused {
                kind,
                message: super::error::clean(&message),
            }),
            Err(Fault::Died { cause }) => Err(LoadError::Crashed { cause }),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill("dropped");
    }
}

impl Death {
    pub(super) async fn died(&self) -> String {
        let mut cause = self.cause.subscribe();
        // We hold a sender, so that the wait can only end with a cause.
        match cause.wait_for(Option::is_some).await {
            Ok(cause) => cause.clone().unwrap_or_default(),
            Err(_) => "unknown".into(),
        }
    }
}

/// Waits for the end of the process, or brings it about, and records the cause.
async fn reap(mut child: Child, connection: Connection, death: Arc<Death>) {
    let mut cause = tokio::select! {
        status = child.wait() => describe(status),
        () = death.kill.notified() => String::new(),
        () = connection.closed() => match timeout(EXIT_LAG, child.wait()).await {
            Ok(status) => describe(status),
            Err(_) => "it closed its socket".into(),
        },
    };
    // Already gone when it ended by itself: then this changes nothing.
    let _ = child.start_kill();
    let _ = child.wait().await;
    if let Some(wanted) = death.wanted.get() {
        cause = wanted.clone();
    }
    death.cause.send_replace(Some(cause));
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => match (status.signal(), status.code()) {
            (Some(signal), _) => signal_name(signal),
            (None, Some(code)) => format!("exit code {code}"),
            (None, None) => "unknown".into(),
        },
        Err(e) => format!("its exit could not be read: {}", e.kind()),
    }
}

/// The signals that end processes, by name; the numbers are the same on every Linux that we run on.
fn signal_name(number: i32) -> String {
    let name = match number {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        _ => return format!("signal {number}"),
    };
    name.to_owned()
}

/// Asks the worker whether it lives, and ends it when it does not answer. Ends with the worker.
async fn heartbeat(worker: std::sync::Weak<Worker>, config: EngineConfig) {
    let mut nonce = 0;
    let mut answered = (0, Instant::now());
    loop {
        tokio::time::sleep(config.heartbeat).await;
        let Some(worker) = worker.upgrade() else {
            return;
        };
        if worker.death.cause.borrow().is_some() {
            return;
        }
        let last = worker.connection.last_pong();
        if last != answered.0 || nonce == 0 {
            answered = (last, Instant::now());
        }
        if answered.1.elapsed() >= config.heartbeat_limit {
            worker.kill(&format!(
                "no heartbeat for {} ms",
                config.heartbeat_limit.as_millis()
            ));
            return;
        }
        nonce += 1;
        worker.tell(command::Kind::Ping(wire::Ping { nonce }));
    }
}

/// Makes worker processes.
#[derive(Clone, Debug)]
pub struct ProcessLauncher {
    /// How to start one.
    pub command: WorkerCommand,
    /// What it is told.
    pub options: LoadOptions,
    /// Clocks and budgets.
    pub config: EngineConfig,
}

impl Launcher for ProcessLauncher {
    fn launch(&self, folder: &Path) -> BoxFuture<'static, Result<Launched, LoadError>> {
        let (this, folder) = (self.clone(), folder.to_owned());
        Box::pin(async move {
            let (worker, info) =
                Worker::spawn(&this.command, &folder, &this.options, &this.config).await?;
            Ok((worker as Arc<dyn Backend>, info))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_name_their_signal() {
        for (status, cause) in [
            (11, "SIGSEGV"),
            (6, "SIGABRT"),
            (9, "SIGKILL"),
            (3 << 8, "exit code 3"),
            (40, "signal 40"),
        ] {
            assert_eq!(describe(Ok(ExitStatus::from_raw(status))), cause);
        }
    }
}
