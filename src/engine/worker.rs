//! A worker process: started, loaded under a clock, watched, ended.
//!
//! It is started with one end of a socket pair as its standard input, a cleared environment (see [`KEPT`]) with ONNX
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

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::{
    process::{Child, Command},
    sync::{Notify, watch},
    time::{Instant, timeout},
};

use super::{
    backend::{
        Backend, BuiltVariant, Fault, Launched, Launcher, LoadError, Order, Ran, Refusal, Started,
    },
    config::EngineConfig,
    request::{Encoding, TextInput, TokenizeOptions},
};
use crate::{
    ipc::{
        front::{Answer, Connection},
        info::ModelInfo,
        shm::aligned,
        spec::{LoadOptions, VariantSpec},
        wire::{self, command, event},
    },
    tensor::{DType, Tensor},
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
    connection: Connection,
    death: Arc<Death>,
    pid: Option<u32>,
}

/// How the process ended, and who waits for it.
struct Death {
    cause: watch::Sender<Option<String>>,
    /// Why it is to be killed; the first reason stands.
    wanted: OnceLock<String>,
    kill: Notify,
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
                message: format!("the worker answered a load with {}", name(&other)),
            }),
            Err(Fault::Refused { kind, message, .. }) => Err(LoadError::Refused {
                kind,
                message: super::error::clean(&message),
            }),
            Err(Fault::Died { cause }) => Err(LoadError::Crashed { cause }),
        }
    }

    fn call(
        &self,
        command: impl FnOnce(u64) -> command::Kind,
        segment: Option<crate::ipc::shm::Segment>,
    ) -> BoxFuture<'static, Result<Answer, Fault>> {
        let id = self.connection.next_id();
        self.call_as(id, command(id), segment)
    }

    fn call_as(
        &self,
        id: u64,
        command: command::Kind,
        segment: Option<crate::ipc::shm::Segment>,
    ) -> BoxFuture<'static, Result<Answer, Fault>> {
        let connection = self.connection.clone();
        let death = self.death.clone();
        Box::pin(async move {
            let answer = tokio::select! {
                biased;
                answer = connection.call(id, command, segment) => answer,
                cause = death.died() => return Err(Fault::Died { cause }),
            };
            match answer {
                Ok((event::Kind::Failed(failed), _)) => Err(refused(failed)),
                Ok(answer) => Ok(answer),
                Err(_) => Err(Fault::Died {
                    cause: death.died().await,
                }),
            }
        })
    }

    /// Sends a command that has no answer. If the worker is gone, others notice.
    fn tell(&self, command: command::Kind) {
        let connection = self.connection.clone();
        tokio::spawn(async move {
            let _ = connection.send(command, None).await;
        });
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill("dropped");
    }
}

impl Death {
    async fn died(&self) -> String {
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

impl Backend for Worker {
    fn run(&self, order: Order<'_>) -> Result<Started, Fault> {
        let total = order.inputs.iter().map(|i| aligned(i.bytes())).sum();
        let mut segment = self
            .connection
            .pool()
            .with(|p| p.take(total))
            .map_err(|e| Fault::Refused {
                kind: Refusal::ResourceExhausted,
                message: e.to_string(),
                subject: String::new(),
            })?;
        let mut offset = 0;
        let mut inputs = Vec::with_capacity(order.inputs.len());
        for input in order.inputs {
            let length = input.bytes();
            input.write(&mut segment.bytes_mut()[offset..offset + length]);
            inputs.push(wire::TensorRef {
                name: input.name.to_owned(),
                dtype: input.dtype as u32,
                shape: input.shape.iter().map(|d| *d as u64).collect(),
                span: Some(segment.span(offset, length)),
            });
            offset += aligned(length);
        }
        let picks = order
            .picks
            .into_iter()
            .map(|p| wire::Pick {
                output: p.output,
                row: p.row,
                rows: p.rows,
                keep_batch: p.keep_batch,
                length: p.length,
                heads: p.heads,
                positions: p.positions,
            })
            .collect();
        let id = self.connection.next_id();
        let run = command::Kind::Run(wire::Run {
            id,
            variant: order.variant,
            inputs,
            lengths: order.lengths,
            picks,
        });
        let answer = self.call_as(id, run, Some(segment));
        Ok(Started {
            id,
            done: Box::pin(async move {
                match answer.await? {
                    (event::Kind::Ran(ran), views) => tensors(ran, views),
                    (other, _) => Err(out_of_turn("a run", &other)),
                }
            }),
        })
    }

    fn cancel(&self, run: u64) {
        self.tell(command::Kind::Cancel(wire::Cancel { run }));
    }

    fn build(
        &self,
        id: u32,
        spec: &VariantSpec,
    ) -> BoxFuture<'static, Result<BuiltVariant, Fault>> {
        let spec = match serde_json::to_string(spec) {
            Ok(spec) => spec,
            Err(e) => return Box::pin(std::future::ready(Err(unreadable("a variant", &e)))),
        };
        let answer = self.call(
            |call| {
                command::Kind::Build(wire::Build {
                    id: call,
                    variant: id,
                    spec,
                })
            },
            None,
        );
        Box::pin(async move {
            match answer.await? {
                (event::Kind::Built(built), _) => Ok(BuiltVariant {
                    outputs: serde_json::from_str(&built.outputs)
                        .map_err(|e| unreadable("a variant", &e))?,
                    bytes: built.bytes,
                }),
                (other, _) => Err(out_of_turn("a build", &other)),
            }
        })
    }

    fn evict(&self, id: u32) {
        self.tell(command::Kind::Evict(wire::Evict { variant: id }));
    }

    fn tokenize(
        &self,
        texts: Vec<TextInput>,
        options: TokenizeOptions,
    ) -> BoxFuture<'static, Result<Vec<Encoding>, Fault>> {
        let count = texts.len();
        let texts = texts
            .into_iter()
            .map(|t| wire::Text {
                text: t.text,
                pair: t.pair,
            })
            .collect();
        let answer = self.call(
            |id| {
                command::Kind::Tokenize(wire::Tokenize {
                    id,
                    texts,
                    add_special_tokens: options.special,
                    truncate: options.truncate,
                })
            },
            None,
        );
        Box::pin(async move {
            match answer.await? {
                (event::Kind::Tokenized(t), _) if t.encodings.len() == count => {
                    Ok(t.encodings.into_iter().map(encoding).collect())
                }
                (other, _) => Err(out_of_turn("texts", &other)),
            }
        })
    }

    fn decode(&self, ids: Vec<u32>) -> BoxFuture<'static, Result<Vec<String>, Fault>> {
        let answer = self.call(|id| command::Kind::Decode(wire::Decode { id, ids }), None);
        Box::pin(async move {
            match answer.await? {
                (event::Kind::Decoded(d), _) => Ok(d.tokens),
                (other, _) => Err(out_of_turn("ids", &other)),
            }
        })
    }

    fn dump(&self) -> BoxFuture<'static, Result<String, Fault>> {
        let answer = self.call(|id| command::Kind::Dump(wire::Dump { id }), None);
        Box::pin(async move {
            match answer.await? {
                (event::Kind::Dumped(d), _) => Ok(d.text),
                (other, _) => Err(out_of_turn("a dump", &other)),
            }
        })
    }

    fn kill(&self, cause: &str) {
        // A second reason changes nothing.
        let _ = self.death.wanted.set(cause.to_owned());
        self.death.kill.notify_one();
    }

    fn died(&self) -> BoxFuture<'static, String> {
        let death = self.death.clone();
        Box::pin(async move { death.died().await })
    }

    fn resident_bytes(&self) -> u64 {
        self.connection.resident_bytes()
    }

    fn pid(&self) -> Option<u32> {
        self.pid.filter(|_| self.death.cause.borrow().is_none())
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

fn tensors(ran: wire::Ran, views: Vec<Bytes>) -> Result<Ran, Fault> {
    if views.len() != ran.tensors.len() {
        return Err(protocol("a run came back with other tensors than it names"));
    }
    let tensors = ran
        .tensors
        .into_iter()
        .zip(views)
        .map(|(tensor, bytes)| {
            let dtype = DType::try_from(tensor.dtype)?;
            let shape = tensor
                .shape
                .iter()
                .map(|d| usize::try_from(*d).unwrap_or(usize::MAX))
                .collect();
            Tensor::new(dtype, shape, bytes)
        })
        .collect::<Result<_, crate::tensor::TensorError>>()
        .map_err(|e| protocol(&e.to_string()))?;
    Ok(Ran {
        tensors,
        non_finite: ran.non_finite_picks.iter().map(|at| *at as usize).collect(),
    })
}

fn encoding(e: wire::Encoding) -> Encoding {
    Encoding {
        offsets: e
            .starts
            .iter()
            .zip(&e.ends)
            .map(|(start, end)| *start..*end)
            .collect(),
        words: e.words.iter().map(|w| u32::try_from(*w).ok()).collect(),
        ids: e.ids,
        type_ids: e.type_ids,
        tokens: e.tokens,
        special: e.special,
        sequence: e.sequence,
        truncated: e.truncated,
    }
}

fn refused(failed: wire::Failed) -> Fault {
    let kind = match failed.failure() {
        wire::Failure::InvalidArgument => Refusal::InvalidArgument,
        wire::Failure::FailedPrecondition => Refusal::FailedPrecondition,
        wire::Failure::BadModel => Refusal::BadModel,
        wire::Failure::ResourceExhausted => Refusal::ResourceExhausted,
        wire::Failure::Cancelled => Refusal::Cancelled,
        wire::Failure::Unspecified | wire::Failure::Runtime => Refusal::Runtime,
        wire::Failure::Provider => Refusal::Provider,
        wire::Failure::NoVariant => Refusal::NoVariant,
    };
    Fault::Refused {
        kind,
        message: failed.message,
        subject: failed.subject,
    }
}

fn protocol(message: &str) -> Fault {
    Fault::Refused {
        kind: Refusal::Runtime,
        message: message.to_owned(),
        subject: "worker protocol".into(),
    }
}

fn unreadable(what: &str, error: &serde_json::Error) -> Fault {
    protocol(&format!("{what} cannot be read: {error}"))
}

fn out_of_turn(what: &str, event: &event::Kind) -> Fault {
    protocol(&format!("the worker answered {what} with {}", name(event)))
}

fn name(event: &event::Kind) -> &'static str {
    match event {
        event::Kind::Loaded(_) => "loaded",
        event::Kind::Built(_) => "built",
        event::Kind::Ran(_) => "ran",
        event::Kind::Failed(_) => "failed",
        event::Kind::Tokenized(_) => "tokenized",
        event::Kind::Release(_) => "release",
        event::Kind::Pong(_) => "pong",
        event::Kind::Dumped(_) => "dumped",
        event::Kind::Progress(_) => "progress",
        event::Kind::Decoded(_) => "decoded",
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
