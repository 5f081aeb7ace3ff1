//! The worker's end of the connection: blocking.

use std::{
    collections::VecDeque,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;

use super::{
    frame::{self, Inbox},
    shm::{IDLE, Segment, SharedPool, Views},
    socket,
    wire::{Command, Event, Release, Span, command, event},
};

/// Sends events; shared by every thread of the worker.
#[derive(Debug, Clone)]
pub struct Sender {
    socket: Arc<Mutex<UnixStream>>,
    pool: SharedPool,
}

impl Sender {
    /// Sends an event, and lends the segments that its tensors stand in, in the order in which it first names them.
    ///
    /// # Errors
    /// When the front is gone; the worker then has nothing left to do.
    pub fn send(
        &self,
        id: u64,
        kind: event::Kind,
        segments: impl IntoIterator<Item = Segment>,
    ) -> io::Result<()> {
        let mut fds: Vec<OwnedFd> = Vec::new();
        for segment in segments {
            fds.extend(
                self.pool
                    .with(|p| p.lend(segment))
                    .map_err(io::Error::other)?,
            );
        }
        let bytes = frame::encode(&Event {
            id,
            kind: Some(kind),
        });
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sent = 0;
        while sent < bytes.len() {
            let fds = if sent == 0 { &fds[..] } else { &[] };
            match socket::send(&*socket, &bytes[sent..], fds) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The segments of this side.
    pub fn pool(&self) -> &SharedPool {
        &self.pool
    }
}

/// Receives commands.
#[derive(Debug)]
pub struct Receiver {
    socket: UnixStream,
    inbox: Inbox,
    fds: VecDeque<OwnedFd>,
    views: Views,
    pool: SharedPool,
}

/// Splits the socket. `budget` bounds the shared memory of this side in bytes.
pub fn split(socket: UnixStream, budget: usize) -> io::Result<(Sender, Receiver)> {
    let pool = SharedPool::new(budget);
    let sender = Sender {
        socket: Arc::new(Mutex::new(socket.try_clone()?)),
        pool: pool.clone(),
    };
    let releasing = sender.clone();
    let views = Views::new(Arc::new(move |segment| {
        // A front that is gone needs nothing back; the receiver ends the worker.
        let _ = releasing.send(0, event::Kind::Release(Release { segment }), None);
    }));
    let receiver = Receiver {
        socket,
        inbox: Inbox::default(),
        fds: VecDeque::new(),
        views,
        pool,
    };
    Ok((sender, receiver))
}

impl Receiver {
    /// The next command with views of its tensors, in the order of its references; `None` when the front has closed.
    pub fn receive(&mut self) -> io::Result<Option<(command::Kind, Vec<Bytes>)>> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let next = self.inbox.take::<Command>().map_err(io::Error::other)?;
            match next.and_then(|c| c.kind) {
                Some(command::Kind::Release(r)) => self.pool.with(|p| p.released(r.segment)),
                Some(kind) => {
                    if matches!(kind, command::Kind::Ping(_)) {
                        // The heartbeat is the clock by which idle memory goes back.
                        self.pool.with(|p| p.trim(IDLE));
                    }
                    let views = self.tensors(&kind)?;
                    return Ok(Some((kind, views)));
                }
                None => match socket::receive(&self.socket, &mut buffer, &mut self.fds) {
                    Ok(0) => return Ok(None),
                    Ok(n) => self.inbox.extend(&buffer[..n]),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                    Err(e) => return Err(e),
                },
            }
        }
    }

    fn tensors(&mut self, kind: &command::Kind) -> io::Result<Vec<Bytes>> {
        let command::Kind::Run(run) = kind else {
            return Ok(Vec::new());
        };
        let spans: Vec<Span> = run
            .inputs
            .iter()
            .map(|t| t.span.unwrap_or_default())
            .collect();
        take_in(&mut self.views, &mut self.fds, &spans)
    }
}

/// Maps the segments that a frame names for the first time, and gives views of its spans.
pub(super) fn take_in(
    views: &mut Views,
    fds: &mut VecDeque<OwnedFd>,
    spans: &[Span],
) -> io::Result<Vec<Bytes>> {
    for span in spans {
        if !views.knows(span.segment) {
            let fd = fds
                .pop_front()
                .ok_or_else(|| io::Error::other("a segment came without its descriptor"))?;
            views
                .learn(span.segment, span.segment_bytes, &fd)
                .map_err(io::Error::other)?;
        }
    }
    if fds.len() > socket::MAX_FDS {
        return Err(io::Error::other("descriptors came that no frame names"));
    }
    views.borrow(spans).map_err(io::Error::other)
}
