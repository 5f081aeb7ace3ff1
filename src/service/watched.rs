//! The body of every response: ends by the deadline, is given up when its reader stalls, tells how the call ended.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use metrics::counter;
use tokio::time::Sleep;
use tonic::{Code, Status};

use super::{edge::Open, status};
use crate::{engine::EngineError, telemetry::names};

/// Not given to the reader yet.
const NOTHING_GIVEN: u64 = u64::MAX;

/// Finds readers that take nothing. A stalled call is given up: what worked for it is dropped, its memory is free, and its reader
/// is told so should it ever read on.
#[derive(Clone)]
pub(super) struct Stalls {
    open: Arc<Mutex<Vec<Weak<Inner>>>>,
    limit: Duration,
    since: Instant,
}

/// What the body is made from, within reach of the watch.
struct Inner {
    body: Mutex<Option<tonic::body::Body>>,
    /// Milliseconds at which the reader was given something that it has not come back from.
    given: AtomicU64,
}

impl Inner {
    fn body(&self) -> MutexGuard<'_, Option<tonic::body::Body>> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stalls {
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            open: Arc::default(),
            limit,
            since: Instant::now(),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(NOTHING_GIVEN - 1)
    }

    fn watch(&self, inner: &Arc<Inner>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.push(Arc::downgrade(inner));
    }

    /// Looks around a few times per limit; runs until it is dropped.
    pub(super) async fn run(self) {
        let mut tick = tokio::time::interval(self.limit / 4);
        loop {
            tick.tick().await;
            self.look();
        }
    }

    fn look(&self) {
        let now = self.now();
        let limit = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX);
        let mut stalled = Vec::new();
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|weak| {
                let Some(inner) = weak.upgrade() else {
                    return false;
                };
                let given = inner.given.load(Ordering::Acquire);
                let late = given != NOTHING_GIVEN && now.saturating_sub(given) >= limit;
                if late {
                    stalled.push(inner);
                }
                !late
            });
        for inner in stalled {
            // Dropping it cancels its work.
            if inner.body().take().is_some() {
                counter!(names::STALLED_STREAMS).increment(1);
                tracing::warn!(limit = ?self.limit, "gave a stream up whose reader takes nothing");
            }
        }
    }
}

/// See the module.
pub(super) struct Watched {
    inner: Arc<Inner>,
    deadline: Option<Pin<Box<Sleep>>>,
    stalls: Stalls,
    open: Open,
    over: bool,
}

impl Watched {
    /// A body whose head went out with `head_status`, if the head already says how the call ended.
    pub(super) fn new(
        body: tonic::body::Body,
        head_status: Option<Code>,
        deadline: Option<Instant>,
        mut open: Open,
        stalls: &Stalls,
    ) -> Self {
        if let Some(code) = head_status {
            open.ends(code);
        }
        let over = body.is_end_stream();
        let inner = Arc::new(Inner {
            body: Mutex::new(Some(body)),
            given: AtomicU64::new(NOTHING_GIVEN),
        });
        if !over {
            stalls.watch(&inner);
        }
        Self {
            inner,
            deadline: deadline
                .filter(|_| !over)
                .map(|d| Box::pin(tokio::time::sleep_until(d.into()))),
            stalls: stalls.clone(),
            open,
            over,
        }
    }

    /// Ends the stream with an error.
    fn end(&mut self, status: &Status) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.over = true;
        self.inner.body().take();
        self.open.ends(status.code());
        let mut trailers = HeaderMap::new();
        Poll::Ready(Some(
            status
                .add_header(&mut trailers)
                .map(|()| Frame::trailers(trailers)),
        ))
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.over {
            return Poll::Ready(None);
        }
        this.inner.given.store(NOTHING_GIVEN, Ordering::Release);
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return this.end(&status::status(&EngineError::DeadlineExceeded));
        }
        let polled = match &mut *this.inner.body() {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(Some(Err(Status::aborted(
                "nothing of this stream was read for too long: it was given up",
            )))),
        };
        match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => {
                this.over = true;
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(status))) => this.end(&status),
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    let code =
                        Status::from_header_map(trailers).map_or(Code::Unknown, |s| s.code());
                    this.open.ends(code);
                    this.over = true;
                } else if let Some(data) = frame.data_ref() {
                    this.open.sent(data.len());
                    let now = this.stalls.now();
                    this.inner.given.store(now, Ordering::Release);
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over
    }
}
