//! The life of the process: limits, socket, threads, until the front closes.

use std::{
    env, io,
    os::unix::{net::UnixStream, process::CommandExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    process::{Command, ExitCode},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    failure,
    load::{LoadError, Loaded},
    probe,
    runtime::NO_TELEMETRY,
    sandbox,
    variants::Variants,
};
use crate::ipc::{
    spec::{LoadOptions, VariantSpec},
    wire::{
        Built, Decoded, Dumped, Failure, Loaded as LoadedEvent, Pong, Progress, Tokenized, command,
        event,
    },
    worker_side::{self, Receiver, Sender},
};

/// Shared memory that a worker may make for what it sends, in bytes.
const SHARED_BUDGET: usize = 8 << 30;
/// Commands that wait for the control thread or the text thread. The front keeps its own, smaller bounds.
const QUEUE: usize = 1024;
/// How often a load says that it is alive.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Runs a worker on the socket that is its standard input. Returns when the front closes it.
pub fn main() -> ExitCode {
    if env::var_os(NO_TELEMETRY).is_none_or(|v| v != "1") {
        // The library reads the variable when it is loaded, and a process may not safely change its own environment.
        let why = Command::new("/proc/self/exe")
            .args(env::args_os().skip(1))
            .env(NO_TELEMETRY, "1")
            .exec();
        eprintln!("introspectd worker: cannot start again without telemetry: {why}");
        return ExitCode::FAILURE;
    }
    if env::args_os().nth(2).is_some_and(|a| a == probe::FLAG) {
        return probe::main();
    }
    let socket = match rustix::io::dup(io::stdin()) {
        Ok(fd) => UnixStream::from(fd),
        Err(e) => {
            eprintln!("introspectd worker: standard input is not a socket: {e}");
            return ExitCode::FAILURE;
        }
    };
    if socket.peer_addr().is_err() {
        eprintln!("introspectd worker: this command is started by the daemon, not by hand");
        return ExitCode::FAILURE;
    }
    if let Err(e) = sandbox::enter(&socket) {
        eprintln!("introspectd worker: {e}");
        return ExitCode::FAILURE;
    }
    match worker_side::split(socket, SHARED_BUDGET).and_then(|(s, r)| serve(&s, r)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("introspectd worker: {e}");
            ExitCode::FAILURE
        }
    }
}

/// What the threads share.
#[derive(Clone)]
struct Shared {
    sender: Sender,
    variants: Variants,
    /// Set once, by the load.
    model: Arc<OnceLock<Loaded>>,
    /// Whether a load was begun. The runtime can be set up once in a process, so a worker loads once.
    begun: Arc<AtomicBool>,
}

fn serve(sender: &Sender, mut receiver: Receiver) -> io::Result<()> {
    let shared = Shared {
        sender: sender.clone(),
        variants: Variants::default(),
        model: Arc::default(),
        begun: Arc::default(),
    };
    let control = shared.thread("control", Shared::control)?;
    let text = shared.thread("text", Shared::text)?;
    while let Some((command, tensors)) = receiver.receive()? {
        match command {
            command::Kind::Ping(p) => {
                let pong = Pong {
                    nonce: p.nonce,
                    resident_bytes: resident_bytes(),
                };
                sender.send(0, event::Kind::Pong(pong), None)?;
            }
            command::Kind::Cancel(c) => shared.variants.cancel(c.run),
            command::Kind::Run(run) => shared.variants.run(run, tensors, sender)?,
            command::Kind::Release(_) => {} // taken by the receiver
            command::Kind::Tokenize(_) | command::Kind::Decode(_) => forward(&text, command)?,
            command::Kind::Load(_)
            | command::Kind::Build(_)
            | command::Kind::Evict(_)
            | command::Kind::Dump(_) => forward(&control, command)?,
        }
    }
    Ok(())
}

fn forward(queue: &mpsc::SyncSender<command::Kind>, command: command::Kind) -> io::Result<()> {
    queue
        .try_send(command)
        .map_err(|_| io::Error::other("the front sent more commands than it may"))
}

fn id_of(command: &command::Kind) -> u64 {
    match command {
        command::Kind::Load(c) => c.id,
        command::Kind::Build(c) => c.id,
        command::Kind::Run(c) => c.id,
        command::Kind::Tokenize(c) => c.id,
        command::Kind::Dump(c) => c.id,
        command::Kind::Decode(c) => c.id,
        command::Kind::Evict(_)
        | command::Kind::Cancel(_)
        | command::Kind::Release(_)
        | command::Kind::Ping(_) => 0,
    }
}

impl Shared {
    fn thread(
        &self,
        name: &str,
        work: fn(&Shared, command::Kind) -> io::Result<()>,
    ) -> io::Result<mpsc::SyncSender<command::Kind>> {
        let (queue, commands) = mpsc::sync_channel(QUEUE);
        let shared = self.clone();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                for command in commands {
                    let id = id_of(&command);
                    // A panic in here is a mistake of ours, and costs this command only.
                    let done = catch_unwind(AssertUnwindSafe(|| work(&shared, command)))
                        .unwrap_or_else(|_| {
                            let why = "the worker panicked; its log says where";
                            failure(&shared.sender, id, Failure::Runtime, why, "")
                        });
                    if done.is_err() {
                        return; // the front is gone; the reader ends the process
                    }
                }
            })?;
        Ok(queue)
    }

    fn control(&self, command: command::Kind) -> io::Result<()> {
        match command {
            command::Kind::Load(load) => self.load(&load),
            command::Kind::Build(build) => self.build(&build),
            command::Kind::Evict(evict) => {
                self.variants.evict(evict.variant);
                Ok(())
            }
            command::Kind::Dump(dump) => match self.model.get() {
                Some(model) => {
                    let text = model.dump();
                    self.sender
                        .send(dump.id, event::Kind::Dumped(Dumped { text }), None)
                }
                None => self.not_loaded(dump.id),
            },
            command::Kind::Run(_)
            | command::Kind::Cancel(_)
            | command::Kind::Tokenize(_)
            | command::Kind::Release(_)
            | command::Kind::Ping(_)
            | command::Kind::Decode(_) => Ok(()),
        }
    }

    fn not_loaded(&self, id: u64) -> io::Result<()> {
        failure(
            &self.sender,
            id,
            Failure::FailedPrecondition,
            "no model is loaded",
            "",
        )
    }

    fn load(&self, load: &crate::ipc::wire::Load) -> io::Result<()> {
        let options: LoadOptions = match serde_json::from_str(&load.options) {
            Ok(o) => o,
            Err(e) => {
                let why = format!("load options: {e}");
                return failure(&self.sender, load.id, Failure::InvalidArgument, &why, "");
            }
        };
        if self.begun.swap(true, Ordering::AcqRel) {
            let why = "a worker loads one model once: start another worker";
            return failure(&self.sender, load.id, Failure::FailedPrecondition, why, "");
        }
        let ticker = Ticker::start(&self.sender, load.id)?;
        let result = Loaded::load(load.folder.as_ref(), &options, &|stage| ticker.stage(stage));
        drop(ticker);
        match result {
            Ok(loaded) => {
                let info = serde_json::to_string(&loaded.info).map_err(io::Error::other)?;
                assert!(self.model.set(loaded).is_ok(), "a worker loads once");
                self.sender
                    .send(load.id, event::Kind::Loaded(LoadedEvent { info }), None)
            }
            Err(LoadError { kind, message }) => failure(&self.sender, load.id, kind, &message, ""),
        }
    }

    fn build(&self, build: &crate::ipc::wire::Build) -> io::Result<()> {
        let Some(model) = self.model.get() else {
            return self.not_loaded(build.id);
        };
        let spec: VariantSpec = match serde_json::from_str(&build.spec) {
            Ok(s) => s,
            Err(e) => {
                let why = format!("variant: {e}");
                return failure(&self.sender, build.id, Failure::InvalidArgument, &why, "");
            }
        };
        let (started, before) = (Instant::now(), resident_bytes());
        match model.build(&spec) {
            Ok(ready) => {
                let described = serde_json::to_string(&ready.outputs).map_err(io::Error::other)?;
                self.variants
                    .add(build.variant, ready, self.sender.clone())?;
                let built = Built {
                    outputs: described,
                    bytes: resident_bytes().saturating_sub(before),
                    build_micros: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
                };
                self.sender.send(build.id, event::Kind::Built(built), None)
            }
            Err(LoadError { kind, message }) => failure(&self.sender, build.id, kind, &message, ""),
        }
    }

    fn text(&self, command: command::Kind) -> io::Result<()> {
        let id = id_of(&command);
        let Some(model) = self.model.get() else {
            return self.not_loaded(id);
        };
        let Some(tokenizer) = &model.tokenizer else {
            return failure(
                &self.sender,
                id,
                Failure::FailedPrecondition,
                "the model has no tokenizer.json: send token ids or tensors",
                "text",
            );
        };
        let answer = match &command {
            command::Kind::Tokenize(t) => tokenizer
                .encode(&t.texts, t.add_special_tokens, t.truncate)
                .map(|encodings| event::Kind::Tokenized(Tokenized { encodings })),
            command::Kind::Decode(d) => tokenizer
                .decode(&d.ids)
                .map(|tokens| event::Kind::Decoded(Decoded { tokens })),
            command::Kind::Run(_)
            | command::Kind::Cancel(_)
            | command::Kind::Load(_)
            | command::Kind::Build(_)
            | command::Kind::Evict(_)
            | command::Kind::Dump(_)
            | command::Kind::Release(_)
            | command::Kind::Ping(_) => return Ok(()),
        };
        match answer {
            Ok(kind) => self.sender.send(id, kind, None),
            Err((subject, message)) => failure(
                &self.sender,
                id,
                Failure::InvalidArgument,
                &message,
                &subject,
            ),
        }
    }
}

/// Tells the front several times a second what a load is busy with.
struct Ticker {
    stages: mpsc::Sender<String>,
}

impl Ticker {
    fn start(sender: &Sender, id: u64) -> io::Result<Self> {
        let (stages, said) = mpsc::channel();
        let sender = sender.clone();
        thread::Builder::new()
            .name("progress".to_owned())
            .spawn(move || {
                let mut stage = String::from("start");
                loop {
                    match said.recv_timeout(PROGRESS_EVERY) {
                        Ok(next) => stage = next,
                        Err(mpsc::RecvTimeoutError::Timeout) => {}
                        Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    }
                    let progress = Progress {
                        stage: stage.clone(),
                    };
                    if sender
                        .send(id, event::Kind::Progress(progress), None)
                        .is_err()
                    {
                        return;
                    }
                }
            })?;
        Ok(Self { stages })
    }

    fn stage(&self, stage: &str) {
        // The thread ends only when the front is gone; the load is then about to end too.
        let _ = self.stages.send(stage.to_owned());
    }
}

/// Resident memory of this process in bytes, shared mappings included; zero when the system does not tell.
pub(super) fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|s| s.split_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}
