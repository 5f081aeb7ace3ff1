//! A submitted request: what the scheduler sees of it (`Request`) and what the caller holds ([`RowStream`]).
//!
//! The two halves share a cancellation token, a child of the caller's. It is cancelled when the caller cancels, when the stream is
//! dropped, and when the request ends; then queued rows are skipped and a run that nobody else wants is terminated.
//! The deadline acts without anyone polling: the queue and the runs look at it themselves.
//!
//! Buffers are bounded: the channel holds at most one message for each row, and rows are run only while the
//! bytes that nobody took yet stay within the request's window.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures::Stream;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::{
    admission::Permit,
    error::EngineError,
    generation::{Generation, VariantLease},
    handle::ModelHandle,
    inputs::Rows,
    now,
    queue::Place,
    request::RowsDone,
    ticket::{Outcome, Ticket},
};

/// A group, ready to run.
#[derive(Debug)]
pub(super) struct ReadyGroup {
    pub(super) rows: Rows,
    pub(super) picks: Vec<ReadyPick>,
    /// Bytes that each row brings back.
    pub(super) row_bytes: usize,
}

/// A pick whose output was found.
#[derive(Clone, Debug)]
pub(super) struct ReadyPick {
    pub(super) output: u32,
    pub(super) heads: Vec<u32>,
    pub(super) positions: Vec<u32>,
    pub(super) keep_batch: bool,
}

/// What the scheduler sees of a request.
pub(super) struct Request {
    pub(super) generation: Arc<Generation>,
    pub(super) groups: Vec<ReadyGroup>,
    pub(super) submitted: Instant,
    /// Time that it waited for its variant.
    pub(super) build: Duration,
    over: CancellationToken,
    deadline: Option<Instant>,
    answers: mpsc::Sender<Result<Answer, EngineError>>,
    untaken: AtomicUsize,
    window: usize,
    variant: VariantLease,
}

/// Some rows, and the bytes that were reserved for them.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) done: RowsDone,
    pub(super) reserved: usize,
}

/// What [`Request`] is made of.
pub(super) struct Parts {
    pub(super) generation: Arc<Generation>,
    pub(super) groups: Vec<ReadyGroup>,
    pub(super) build: Duration,
    pub(super) over: CancellationToken,
    pub(super) deadline: Option<Instant>,
    pub(super) window: usize,
    pub(super) variant: VariantLease,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Request({} groups)", self.groups.len())
    }
}

impl Request {
    /// A request, and where its answers arrive.
    pub(super) fn new(parts: Parts) -> (Arc<Self>, mpsc::Receiver<Result<Answer, EngineError>>) {
        let rows: usize = parts.groups.iter().map(|g| g.rows.rows).sum();
        let (answers, receiver) = mpsc::channel(rows + 1);
        let request = Self {
            generation: parts.generation,
            groups: parts.groups,
            submitted: now(),
            build: parts.build,
            over: parts.over,
            deadline: parts.deadline,
            answers,
            untaken: AtomicUsize::new(0),
            window: parts.window,
            variant: parts.variant,
        };
        (Arc::new(request), receiver)
    }

    /// Number of the variant that its rows run on.
    pub(super) fn variant(&self) -> u32 {
        self.variant.built.id
    }

    /// Whether nobody wants its rows any more.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now) || self.over.is_cancelled()
    }

    /// Comes when nobody wants its rows any more.
    pub(super) async fn over(&self) {
        match self.deadline {
            Some(deadline) => {
                let _ = tokio::time::timeout_at(deadline.into(), self.over.cancelled()).await;
            }
            None => self.over.cancelled().await,
        }
    }

    /// Rows were taken for a run: their bytes count from now on.
    pub(super) fn reserve(&self, bytes: usize) {
        self.untaken.fetch_add(bytes, Ordering::AcqRel);
    }

    fn taken(&self, bytes: usize) {
        self.untaken.fetch_sub(bytes, Ordering::AcqRel);
    }

    /// Hands an answer to the caller. One that left needs none.
    pub(super) fn answer(&self, mut answer: Result<Answer, EngineError>) {
        if answer.is_err() && self.is_over(now()) {
            // Whatever became of its run afterwards, this is what happened to the request.
            answer = Err(if self.over.is_cancelled() {
                EngineError::Cancelled
            } else {
                EngineError::DeadlineExceeded
            });
        }
        // The channel has room for a message per row and one error: it can only be closed.
        let _ = self.answers.try_send(answer);
    }
}

impl super::queue::Request for Arc<Request> {
    fn is_dead(&self, now: Instant) -> bool {
        self.is_over(now)
    }

    fn window(&self) -> Option<usize> {
        match self.untaken.load(Ordering::Acquire) {
            0 => Some(self.window),
            untaken => self.window.checked_sub(untaken).filter(|left| *left > 0),
        }
    }
}

/// The answers to a job, as they come. Ends after the last row, or with its first error. Dropped, it cancels what is left.
#[derive(Debug)]
pub struct RowStream {
    request: Arc<Request>,
    place: Place,
    answers: mpsc::Receiver<Result<Answer, EngineError>>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    deadline: Option<Pin<Box<tokio::time::Sleep>>>,
    rows_left: usize,
    ticket: Option<Ticket>,
    _permits: (Permit, Permit),
    /// Keeps the generation from being drained.
    _handle: ModelHandle,
}

impl RowStream {
    pub(super) fn new(
        request: Arc<Request>,
        place: Place,
        answers: mpsc::Receiver<Result<Answer, EngineError>>,
        cancel: CancellationToken,
        ticket: Ticket,
        permits: (Permit, Permit),
        handle: ModelHandle,
    ) -> Self {
        let rows_left = request.groups.iter().map(|g| g.rows.rows).sum();
        let deadline = request
            .deadline
            .map(|d| Box::pin(tokio::time::sleep_until(d.into())));
        Self {
            request,
            place,
            answers,
            cancelled: Box::pin(cancel.cancelled_owned()),
            deadline,
            rows_left,
            ticket: Some(ticket),
            _permits: permits,
            _handle: handle,
        }
    }

    /// The next rows; nothing after the last.
    pub async fn next(&mut self) -> Option<Result<RowsDone, EngineError>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// All rows, in the order of groups and rows. For requests whose whole answer is small: the caller holds the bytes.
    pub async fn collect(mut self) -> Result<Vec<RowsDone>, EngineError> {
        let mut all = Vec::new();
        while let Some(done) = self.next().await {
            all.push(done?);
        }
        all.sort_by_key(|d| (d.group, d.rows.start));
        Ok(all)
    }

    pub(super) fn end(&mut self, outcome: Outcome) {
        if let Some(ticket) = self.ticket.take() {
            ticket.end(outcome);
            self.withdraw();
        }
    }

    /// Nothing of this request is wanted any more.
    fn withdraw(&self) {
        self.request.over.cancel();
        if self.rows_left > 0 {
            self.request.generation.scheduler.remove(&self.place);
        }
    }
}

impl Stream for RowStream {
    type Item = Result<RowsDone, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.ticket.is_none() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(answer) = this.answers.poll_recv(cx) {
            return Poll::Ready(Some(match answer {
                Some(Ok(Answer { done, reserved })) => {
                    this.request.taken(reserved);
                    this.rows_left = this.rows_left.saturating_sub(done.rows.len());
                    if this.rows_left == 0 {
                        this.end(Outcome::Done);
                    } else {
                        this.request.generation.scheduler.pump();
                    }
                    Ok(done)
                }
                Some(Err(error)) => {
                    this.end(outcome(&error));
                    Err(error)
                }
                None => {
                    this.end(Outcome::Failed);
                    Err(EngineError::internal(
                        "the answers of a request ended before its rows",
                    ))
                }
            }));
        }
        if this.cancelled.as_mut().poll(cx).is_ready() {
            this.end(Outcome::Cancelled);
            return Poll::Ready(Some(Err(EngineError::Cancelled)));
        }
        if let Some(deadline) = &mut this.deadline {
            ready!(deadline.as_mut().poll(cx));
            this.end(Outcome::Expired);
            return Poll::Ready(Some(Err(EngineError::DeadlineExceeded)));
        }
        Poll::Pending
    }
}

impl Drop for RowStream {
    fn drop(&mut self) {
        if self.ticket.is_some() {
            self.withdraw(); // the ticket records the rest
        }
    }
}

/// How a request ends that ends with this error.
pub(super) fn outcome(error: &EngineError) -> Outcome {
    match error {
        EngineError::Cancelled => Outcome::Cancelled,
        EngineError::DeadlineExceeded => Outcome::Expired,
        EngineError::ResourceExhausted { .. } => Outcome::Shed,
        EngineError::InvalidArgument { .. }
        | EngineError::NotFound { .. }
        | EngineError::AlreadyExists { .. }
        | EngineError::FailedPrecondition { .. }
        | EngineError::Storage { .. }
        | EngineError::Unavailable { .. }
        | EngineError::DataLoss { .. }
        | EngineError::WorkerDied { .. }
        | EngineError::Internal { .. } => Outcome::Failed,
    }
}
