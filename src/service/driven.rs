//! Answers that someone must work for.

use futures::{Stream, StreamExt as _, future, stream};
use tonic::Status;

/// Messages and the work that makes them: it goes on while the messages are read, and ends when they are dropped.
pub(super) fn driven<T: Send + 'static>(
    work: impl Future<Output = ()> + Send + 'static,
    messages: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> impl Stream<Item = Result<T, Status>> + Send {
    let work = stream::once(work).filter_map(|()| future::ready(None));
    stream::select(messages, work)
}
