//! Answers that someone must work for.

use std::time::Duration;

use futures::{Stream, StreamExt as _, future, stream};
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tonic::Status;

use super::messages::Ledger;

/// How often progress is told: at least twice a second.
const TICK: Duration = Duration::from_millis(400);

/// Ticks for [`ticking`].
pub(super) fn ticks() -> Interval {
    let mut tick = interval_at(Instant::now() + TICK, TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    tick
}

/// Work, with progress sent at every tick while it lasts. A reader that is behind gets the next one.
pub(super) async fn ticking<T, M>(
    work: impl Future<Output = T>,
    tick: &mut Interval,
    (sender, ledger): (&mpsc::Sender<Result<M, Status>>, &mut Ledger),
    progress: impl Fn() -> M,
) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = tick.tick() => {
                if let Ok(room) = sender.try_reserve() {
                    ledger.sent(&[]);
                    room.send(Ok(progress()));
                }
            }
        }
    }
}

/// Messages and the work that makes them: it goes on while the messages are read, and ends when they are dropped.
pub(super) fn driven<T: Send + 'static>(
    work: impl Future<Output = ()> + Send + 'static,
    messages: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> impl Stream<Item = Result<T, Status>> + Send {
    let work = stream::once(work).filter_map(|()| future::ready(None));
    stream::select(messages, work)
}
