//! Answers that someone works for while they are read: what is sent is counted, progress is told while nothing else is, and the end,
//! a summary or an error, is recorded.

use std::{pin::Pin, time::Duration};

use futures::{Stream, StreamExt as _, future, future::BoxFuture, stream};
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

use super::{
    call::Call,
    explained::Explained,
    messages::{Item, Ledger},
    status, to_proto,
    wire::introspect as pb,
};
use crate::{
    engine::{EngineError, StageTimings},
    methods::Spent,
};

/// How often progress is told: at least twice a second.
const TICK: Duration = Duration::from_millis(400);
/// Messages that wait for a slow reader. Progress is left out before anything waits for it.
const WAITING: usize = 4;

/// The messages of an answer.
pub(super) type Messaged<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What an answer's summary says besides what was sent.
#[derive(Default)]
pub(super) struct Ended {
    pub timings: StageTimings,
    pub rows: u64,
    pub truncated_tokens: u32,
    pub non_finite: Vec<String>,
    pub notes: Vec<String>,
}

impl Ended {
    /// Of what was spent.
    pub(super) fn of(spent: &Spent) -> Self {
        Self {
            timings: spent.timings,
            rows: spent.forward_rows + spent.gradient_rows,
            ..Self::default()
        }
    }

    /// The summary of an answer of which this was sent.
    pub(super) fn summary(self, ledger: &Ledger, call: &Call) -> pb::Summary {
        ledger.summed(pb::Summary {
            timings: Some(to_proto::timings(&self.timings, call.arrived.elapsed())),
            rows: self.rows,
            truncated_tokens: self.truncated_tokens,
            non_finite: self.non_finite,
            notes: self.notes,
            ..pb::Summary::default()
        })
    }
}

/// Sends the messages of an answer.
pub(super) struct Teller<M> {
    sender: mpsc::Sender<Result<M, Status>>,
    ledger: Ledger,
    tick: Interval,
    pub(super) call: Call,
}

impl<M: Item> Teller<M> {
    /// Sends a message when there is room for it.
    ///
    /// # Errors
    /// Says that it is cancelled when the reader left.
    pub(super) async fn send(&mut self, message: M) -> Result<(), EngineError> {
        self.ledger.count(&message);
        let sent = self.sender.send(Ok(message)).await;
        sent.map_err(|_| EngineError::Cancelled)
    }

    /// Sends messages, one after the other.
    pub(super) async fn send_all(
        &mut self,
        messages: impl IntoIterator<Item = M>,
    ) -> Result<(), EngineError> {
        for message in messages {
            self.send(message).await?;
        }
        Ok(())
    }

    /// Works, and tells progress at every tick while that lasts. A reader that is behind gets the next one.
    pub(super) async fn working<T>(
        &mut self,
        work: impl Future<Output = T>,
        mut progress: impl FnMut(Duration) -> M,
    ) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = self.tick.tick() => {
                    if let Ok(room) = self.sender.try_reserve() {
                        let message = progress(self.call.arrived.elapsed());
                        self.ledger.count(&message);
                        room.send(Ok(message));
                    }
                }
            }
        }
    }

    /// Ends the answer.
    async fn end(
        self,
        ended: Result<Ended, EngineError>,
        explained: Explained,
        summary: fn(pb::Summary) -> M,
    ) {
        let last = match ended {
            Ok(ended) => {
                explained.answered(&ended.timings);
                Ok(summary(ended.summary(&self.ledger, &self.call)))
            }
            Err(error) => {
                explained.failed(&error);
                Err(status::status(&error))
            }
        };
        // A reader that left needs neither.
        let _ = self.sender.send(last).await;
    }
}

/// An answer: `tell` sends its messages, `summary` makes the last one, and `wrap` makes responses of them. The work goes on while the
/// answer is read and is dropped with it: what it waits for is cancelled then.
pub(super) fn answer<M: Item + Send + 'static, T: Send + 'static>(
    (call, explained): (Call, Explained),
    summary: fn(pb::Summary) -> M,
    wrap: fn(M) -> T,
    tell: impl for<'a> FnOnce(&'a mut Teller<M>) -> BoxFuture<'a, Result<Ended, EngineError>>
    + Send
    + 'static,
) -> Response<Messaged<T>> {
    let (sender, messages) = mpsc::channel(WAITING);
    let mut tick = interval_at(Instant::now() + TICK, TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut teller = Teller {
        sender,
        ledger: Ledger::default(),
        tick,
        call,
    };
    let work = async move {
        let ended = tell(&mut teller).await;
        teller.end(ended, explained, summary).await;
    };
    let messages = ReceiverStream::new(messages).map(move |m| m.map(wrap));
    let work = stream::once(work).filter_map(|()| future::ready(None));
    Response::new(Box::pin(stream::select(messages, work)))
}
