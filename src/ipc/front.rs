//! The front's end of the connection: asynchronous, one per worker.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{Notify, oneshot},
};
use tokio_util::sync::CancellationToken;

use super::{
    frame::{self, Inbox},
    shm::{IDLE, Segment, SharedPool, Views},
    socket,
    wire::{Command, Event, Release, Span, command, event},
    worker_side::take_in,
};

/// An event with views of its tensors, in the order of its references.
pub type Answer = (event::Kind, Vec<Bytes>);

/// The worker is gone, or was never there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the worker is gone")]
pub struct Gone;

/// What waits for an answer.
struct Waiting {
    answer: oneshot::Sender<Answer>,
}

/// The connection to a worker. Clones share it; the last one dropped closes it, which ends the worker.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<Inner>,
}

struct Inner {
    socket: Arc<UnixStream>,
    /// Held while a frame is written, so that frames never mix.
    writing: Arc<tokio::sync::Mutex<()>>,
    waiting: Arc<Mutex<HashMap<u64, Waiting>>>,
    progress: Arc<Notify>,
    next: AtomicU64,
    pool: SharedPool,
    gone: CancellationToken,
    last_pong: Arc<AtomicU64>,
    resident: Arc<AtomicU64>,
    /// Ends the reader when the last clone is dropped.
    _closing: tokio_util::sync::DropGuard,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Takes over our end of a socket pair; must be called within a runtime. `budget` bounds the shared memory that this side
    /// makes, in bytes.
    pub fn new(socket: StdStream, budget: usize) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let socket = Arc::new(UnixStream::from_std(socket)?);
        let (gone, closing) = (CancellationToken::new(), CancellationToken::new());
        let releases = Arc::new(Releases::default());
        let inner = Arc::new(Inner {
            socket: socket.clone(),
            writing: Arc::default(),
            waiting: Arc::default(),
            progress: Arc::default(),
            next: AtomicU64::new(1),
            pool: SharedPool::new(budget),
            gone: gone.clone(),
            last_pong: Arc::default(),
            resident: Arc::default(),
            _closing: closing.clone().drop_guard(),
        });
        let reader = Reader {
            socket,
            inbox: Inbox::default(),
            fds: VecDeque::new(),
            views: Views::new({
                let releases = releases.clone();
                Arc::new(move |id| releases.push(id))
            }),
            waiting: inner.waiting.clone(),
            progress: inner.progress.clone(),
            pool: inner.pool.clone(),
            last_pong: inner.last_pong.clone(),
            resident: inner.resident.clone(),
        };
        tokio::spawn({
            let (gone, waiting) = (gone.clone(), inner.waiting.clone());
            async move {
                tokio::select! {
                    () = closing.cancelled() => {}
                    why = reader.run() => tracing::debug!(?why, "the worker's socket closed"),
                }
                gone.cancel();
                lock(&waiting).clear();
            }
        });
        tokio::spawn(give_back(Arc::downgrade(&inner), releases, gone));
        Ok(Self { inner })
    }

    /// Resolves when the worker is gone.
    pub async fn closed(&self) {
        self.inner.gone.cancelled().await;
    }

    /// Whether the worker is gone.
    pub fn is_closed(&self) -> bool {
        self.inner.gone.is_cancelled()
    }

    /// Resolves with the next progress event of a load.
    pub async fn progress(&self) {
        self.inner.progress.notified().await;
    }

    /// The nonce of the last answered ping.
    pub fn last_pong(&self) -> u64 {
        self.inner.last_pong.load(Ordering::Relaxed)
    }

    /// Resident bytes of the worker at its last pong.
    pub fn resident_bytes(&self) -> u64 {
        self.inner.resident.load(Ordering::Relaxed)
    }

    /// The segments of this side.
    pub fn pool(&self) -> &SharedPool {
        &self.inner.pool
    }

    /// A new id for a command.
    pub fn next_id(&self) -> u64 {
        self.inner.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a command that has the given id and waits for the event with that id. Dropped, it forgets the answer; a run goes on
    /// until it is cancelled by a command of its own.
    pub async fn call(
        &self,
        id: u64,
        command: command::Kind,
        segment: Option<Segment>,
    ) -> Result<Answer, Gone> {
        let (answer, wait) = oneshot::channel();
        lock(&self.inner.waiting).insert(id, Waiting { answer });
        let _forget = Forget {
            waiting: &self.inner.waiting,
            id,
        };
        if self.is_closed() {
            return Err(Gone);
        }
        self.send(command, segment).await?;
        wait.await.map_err(|_| Gone)
    }

    /// Sends a command, and lends the segment that its tensors stand in.
    pub async fn send(&self, command: command::Kind, segment: Option<Segment>) -> Result<(), Gone> {
        let bytes = frame::encode(&Command {
            kind: Some(command),
        });
        match self.inner.writing.clone().try_lock_owned() {
            Ok(held) => self.write(held, bytes, segment).await,
            Err(_) => {
                // What waits for its turn goes on even if the caller leaves: a lent segment must be sent or stay ours.
                let this = self.clone();
                let turn = async move {
                    let held = this.inner.writing.clone().lock_owned().await;
                    this.write(held, bytes, segment).await
                };
                tokio::spawn(turn).await.map_err(|_| Gone)?
            }
        }
    }

    /// Writes a whole frame. At once if the socket takes it, which is the rule; the rest in a task of its own, because a frame once
    /// begun must be finished.
    async fn write(
        &self,
        held: tokio::sync::OwnedMutexGuard<()>,
        bytes: Vec<u8>,
        segment: Option<Segment>,
    ) -> Result<(), Gone> {
        let fds: Vec<OwnedFd> = match segment {
            Some(s) => self
                .inner
                .pool
                .with(|p| p.lend(s))
                .map_err(|_| Gone)?
                .into_iter()
                .collect(),
            None => Vec::new(),
        };
        let sent = self.write_some(&bytes, &fds)?;
        if sent == bytes.len() {
            return Ok(());
        }
        let this = self.clone();
        let rest = async move {
            let _held = held;
            let mut sent = sent;
            while sent < bytes.len() {
                tokio::select! {
                    () = this.inner.gone.cancelled() => return Err(Gone),
                    ready = this.inner.socket.writable() => ready.map_err(|_| Gone)?,
                }
                let fds = if sent == 0 { &fds[..] } else { &[] };
                sent += this.write_some(&bytes[sent..], fds)?;
            }
            Ok(())
        };
        tokio::spawn(rest).await.map_err(|_| Gone)?
    }

    /// Bytes that the socket took; zero when it is full.
    fn write_some(&self, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Gone> {
        let socket = &*self.inner.socket;
        match socket.try_io(Interest::WRITABLE, || socket::send(socket, bytes, fds)) {
            Ok(n) => Ok(n),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(0)
            }
            Err(_) => {
                self.inner.gone.cancel();
                Err(Gone)
            }
        }
    }
}

/// Takes a waiting entry away when its caller is gone.
struct Forget<'a> {
    waiting: &'a Mutex<HashMap<u64, Waiting>>,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.waiting).remove(&self.id);
    }
}

/// Segments of the worker that nothing here views any more. At most as many as the worker made.
#[derive(Default)]
struct Releases {
    ids: Mutex<Vec<u32>>,
    some: Notify,
}

impl Releases {
    fn push(&self, id: u32) {
        lock(&self.ids).push(id);
        self.some.notify_one();
    }
}

async fn give_back(
    inner: std::sync::Weak<Inner>,
    releases: Arc<Releases>,
    gone: CancellationToken,
) {
    loop {
        tokio::select! {
            () = gone.cancelled() => return,
            () = releases.some.notified() => {}
        }
        let Some(inner) = inner.upgrade() else { return };
        let connection = Connection { inner };
        let ids = std::mem::take(&mut *lock(&releases.ids));
        for segment in ids {
            let release = command::Kind::Release(Release { segment });
            if connection.send(release, None).await.is_err() {
                return;
            }
        }
    }
}

struct Reader {
    socket: Arc<UnixStream>,
    inbox: Inbox,
    fds: VecDeque<OwnedFd>,
    views: Views,
    waiting: Arc<Mutex<HashMap<u64, Waiting>>>,
    progress: Arc<Notify>,
    pool: SharedPool,
    last_pong: Arc<AtomicU64>,
    resident: Arc<AtomicU64>,
}

impl Reader {
    /// Reads until the socket closes or the worker breaks the protocol.
    async fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            self.socket.readable().await?;
            let got = self.socket.try_io(Interest::READABLE, || {
                socket::receive(&*self.socket, &mut buffer, &mut self.fds)
            });
            match got {
                Ok(0) => return Ok(()),
                Ok(n) => self.inbox.extend(&buffer[..n]),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(e) => return Err(e),
            }
            while let Some(event) = self.inbox.take::<Event>().map_err(io::Error::other)? {
                self.deliver(event)?;
            }
        }
    }

    fn deliver(&mut self, event: Event) -> io::Result<()> {
        let Some(kind) = event.kind else {
            return Err(io::Error::other("an event without content"));
        };
        let views = match &kind {
            event::Kind::Release(r) => {
                self.pool.with(|p| p.released(r.segment));
                return Ok(());
            }
            event::Kind::Pong(p) => {
                self.last_pong.store(p.nonce, Ordering::Relaxed);
                self.resident.store(p.resident_bytes, Ordering::Relaxed);
                // The heartbeat is the clock by which idle memory goes back.
                self.pool.with(|p| p.trim(IDLE));
                return Ok(());
            }
            event::Kind::Progress(_) => {
                self.progress.notify_waiters();
                return Ok(());
            }
            event::Kind::Ran(ran) => {
                let spans: Vec<Span> = ran
                    .tensors
                    .iter()
                    .map(|t| t.span.unwrap_or_default())
                    .collect();
                // Views are made even if nobody waits any more: dropping them gives the segment back.
                take_in(&mut self.views, &mut self.fds, &spans)?
            }
            event::Kind::Loaded(_)
            | event::Kind::Built(_)
            | event::Kind::Failed(_)
            | event::Kind::Tokenized(_)
            | event::Kind::Dumped(_)
            | event::Kind::Decoded(_) => Vec::new(),
        };
        if let Some(waiting) = lock(&self.waiting).remove(&event.id) {
            // The caller may have left in this moment.
            let _ = waiting.answer.send((kind, views));
        }
        Ok(())
    }
}
