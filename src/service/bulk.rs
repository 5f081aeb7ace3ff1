//! Many inputs over one stream: requests in, answers out, in the order of the requests, each message with the caller's id.
//!
//! An input that fails is answered with a failure, and the others go on; what ends the call ends it for all. After the last answer
//! comes one summary of the whole stream.

use std::{pin::Pin, time::Instant};

use futures::{Stream, StreamExt as _, stream};
use tonic::{Status, Streaming};

use super::{
    from_proto,
    messages::{Item, Ledger},
    status,
    wire::introspect as pb,
};
use crate::engine::EngineError;

/// Inputs that are worked on at a time: enough to fill a run while another is sent.
pub(super) const AHEAD: usize = 32;

/// An input of many, or what is wrong with it.
pub(super) type Asked<Q> = (String, Result<Q, EngineError>);

/// The answer to one input of many.
pub(super) enum Answered<M> {
    /// All of its messages.
    Whole(Box<dyn Iterator<Item = M> + Send>),
    /// It failed.
    Failed(EngineError),
}

/// A message of the stream.
pub(super) enum Reply<M> {
    Item(M),
    Failure(pb::Failure),
    Summary(pb::StreamSummary),
}

/// The requests of a stream as they come: `split` takes a message apart into the caller's id and the request, `model` says which model
/// it names. A stream that breaks ends; one whose requests name different models fails those that differ from the first.
pub(super) fn one_model<T, Q>(
    requests: Streaming<T>,
    split: fn(T) -> (String, Option<Q>),
    model: fn(&Q) -> &str,
) -> impl Stream<Item = Result<Asked<Q>, Status>> {
    let mut first: Option<String> = None;
    requests.map(move |request| {
        let (id, request) = split(request?);
        let id = from_proto::id(id).map_err(|e| status::status(&e))?;
        let request =
            request.ok_or_else(|| EngineError::invalid("request", "is missing: say what to do"));
        let checked = request.and_then(|r| {
            let first = first.get_or_insert_with(|| model(&r).to_owned());
            if model(&r) == *first {
                return Ok(r);
            }
            Err(EngineError::invalid(
                "request.model",
                format!("a stream asks one model, and the first request named \"{first}\""),
            ))
        });
        Ok((id, checked))
    })
}

/// What became of an input. What ends the call ends it for all of its inputs.
pub(super) fn answered<M>(
    id: String,
    answer: Result<Box<dyn Iterator<Item = M> + Send>, EngineError>,
) -> Result<(String, Answered<M>), Status> {
    match answer {
        Ok(messages) => Ok((id, Answered::Whole(messages))),
        Err(error @ (EngineError::DeadlineExceeded | EngineError::Cancelled)) => {
            Err(status::status(&error))
        }
        Err(error) => Ok((id, Answered::Failed(error))),
    }
}

/// An input of many waits for room, where a single call is told to come back.
pub(super) async fn when_there_is_room<T, F>(
    until: Instant,
    mut start: impl FnMut() -> F,
) -> Result<T, EngineError>
where
    F: Future<Output = Result<T, EngineError>>,
{
    loop {
        match start().await {
            Err(EngineError::ResourceExhausted {
                retry_after: Some(after),
                ..
            }) if Instant::now() + after < until => tokio::time::sleep(after).await,
            other => return other,
        }
    }
}

/// Answers to messages, with a summary of the whole at the end. `wrap` makes a response of it.
pub(super) fn messages<M: Item + 'static, R>(
    answers: impl Stream<Item = Result<(String, Answered<M>), Status>> + Send,
    wrap: fn(String, Reply<M>) -> R,
) -> impl Stream<Item = Result<R, Status>> + Send {
    struct State<S, M> {
        answers: Pin<Box<S>>,
        current: Option<(String, Box<dyn Iterator<Item = M> + Send>)>,
        ledger: Ledger,
        answered: u64,
        failed: u64,
        over: bool,
    }
    let state = State {
        answers: Box::pin(answers),
        current: None,
        ledger: Ledger::default(),
        answered: 0,
        failed: 0,
        over: false,
    };
    stream::unfold(state, move |mut s| async move {
        loop {
            if s.over {
                return None;
            }
            if let Some((id, messages)) = &mut s.current {
                if let Some(item) = messages.next() {
                    s.ledger.count(&item);
                    return Some((Ok(wrap(id.clone(), Reply::Item(item))), s));
                }
                s.current = None;
                s.answered += 1;
            }
            match s.answers.next().await {
                Some(Ok((id, Answered::Whole(messages)))) => s.current = Some((id, messages)),
                Some(Ok((id, Answered::Failed(error)))) => {
                    s.failed += 1;
                    s.ledger.sent(&[]);
                    return Some((Ok(wrap(id, Reply::Failure(status::failure(&error)))), s));
                }
                Some(Err(status)) => {
                    s.over = true;
                    return Some((Err(status), s));
                }
                None => {
                    s.over = true;
                    let summary = pb::StreamSummary {
                        answered: s.answered,
                        failed: s.failed,
                        messages: s.ledger.messages,
                        bytes: s.ledger.bytes,
                        crc32c: s.ledger.crc32c,
                    };
                    return Some((Ok(wrap(String::new(), Reply::Summary(summary))), s));
                }
            }
        }
    })
}
