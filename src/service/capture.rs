//! `introspect.v1.CaptureService`.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    call::Call,
    daemon::State,
    explained::Explained,
    from_proto,
    messages::{Ledger, Messages},
    status, to_proto,
    wire::introspect::{
        self as pb, capture_response::Item as Message, capture_service_server::CaptureService,
        capture_stream_response::Answer,
    },
};
use crate::{
    engine::{Ctx, EngineError, Lane},
    methods::capture::{self, Question, Started, Terms},
};

/// Inputs of a bulk stream that are worked on at a time: enough to fill a run while another is sent.
const AHEAD: usize = 32;

type Messaged<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct Captures {
    pub(super) state: Arc<State>,
}

#[tonic::async_trait]
impl CaptureService for Captures {
    type CaptureStream = Messaged<pb::CaptureResponse>;

    async fn capture(
        &self,
        request: Request<pb::CaptureRequest>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let call = Call::of(&request);
        let ctx = call.ctx();
        let (started, explained) = self
            .state
            .start(
                request.into_inner(),
                &call,
                &ctx,
                "capture",
                Lane::Interactive,
            )
            .await
            .map_err(|e| status::status(&e))?;
        let header = header(&started);
        let truncated = started.prepared.truncated;
        let rest = async move {
            match started.finish(&ctx).await {
                Ok(captured) => {
                    let messages = Messages::new(captured, truncated, call.arrived);
                    Told {
                        messages,
                        explained: Some(explained),
                    }
                    .map(Ok)
                    .left()
                }
                Err(error) => {
                    let status = status::status(&error);
                    explained.failed(&error);
                    stream::iter([Err(status)]).right()
                }
            }
        };
        let messages =
            stream::iter([Ok(Message::Header(header))]).chain(stream::once(rest).flatten());
        let answer = messages.map(|m| m.map(|item| pb::CaptureResponse { item: Some(item) }));
        Ok(Response::new(Box::pin(answer)))
    }

    type CaptureStreamStream = Messaged<pb::CaptureStreamResponse>;

    async fn capture_stream(
        &self,
        request: Request<Streaming<pb::CaptureStreamRequest>>,
    ) -> Result<Response<Self::CaptureStreamStream>, Status> {
        let call = Call::of(&request);
        let state = self.state.clone();
        let answers = one_model(request.into_inner())
            .map(move |request| bulk_answer(state.clone(), call.clone(), request))
            .buffered(AHEAD);
        Ok(Response::new(Box::pin(bulk(answers))))
    }
}

/// Two kinds of stream as one.
trait Either: Stream + Sized {
    fn left<R>(self) -> futures::future::Either<Self, R> {
        futures::future::Either::Left(self)
    }
    fn right<L>(self) -> futures::future::Either<L, Self> {
        futures::future::Either::Right(self)
    }
}

impl<S: Stream> Either for S {}

/// Messages that record their request when the last is made.
struct Told {
    messages: Messages,
    explained: Option<Explained>,
}

impl Told {
    fn tell(&mut self) -> Option<Message> {
        let message = self.messages.next();
        if let Some(Message::Summary(_)) = message
            && let Some(explained) = self.explained.take()
        {
            explained.answered(&self.messages.timings());
        }
        message
    }
}

impl Stream for Told {
    type Item = Message;

    fn poll_next(
        mut self: Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Message>> {
        std::task::Poll::Ready(self.tell())
    }
}

impl State {
    /// Validates a capture and puts it into the queue. Errors of a known model are recorded as its.
    async fn start(
        &self,
        request: pb::CaptureRequest,
        call: &Call,
        ctx: &Ctx,
        method: &'static str,
        lane: Lane,
    ) -> Result<(Started, Explained), EngineError> {
        let model = from_proto::named(request.model.clone())?;
        let handle = self.registry.get(&model)?;
        let explained = Explained::new(&model, method, call.arrived);
        let started = async {
            let (_, question): (_, Question) = from_proto::capture(request)?;
            let terms = Terms {
                max_bytes: self.config.max_capture,
                lane,
            };
            capture::start(&handle, question, terms, ctx).await
        };
        match started.await {
            Ok(started) => Ok((started, explained)),
            Err(error) => {
                explained.failed(&error);
                Err(error)
            }
        }
    }
}

fn header(started: &Started) -> pb::CaptureHeader {
    let handle = started.handle();
    let info = handle.info();
    pb::CaptureHeader {
        model: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        generation: handle.generation(),
        task: info.task.name().to_owned(),
        tokens: started
            .prepared
            .tokens
            .iter()
            .cloned()
            .map(to_proto::token)
            .collect(),
        tensors: started.names.clone(),
        estimated_bytes: started.estimated_bytes as u64,
        provider: info.provider.clone(),
    }
}

/// The requests of a bulk stream as they come. A stream that breaks ends; one whose requests name different models fails those that
/// differ from the first.
fn one_model(
    requests: Streaming<pb::CaptureStreamRequest>,
) -> impl Stream<Item = Result<(String, Result<pb::CaptureRequest, EngineError>), Status>> {
    let mut first: Option<String> = None;
    requests.map(move |request| {
        let pb::CaptureStreamRequest { id, request } = request?;
        let id = from_proto::id(id).map_err(|e| status::status(&e))?;
        let request = request
            .ok_or_else(|| EngineError::invalid("request", "is missing: give the capture to make"));
        let checked = request.and_then(|r| {
            let model = first.get_or_insert_with(|| r.model.clone());
            if r.model == *model {
                return Ok(r);
            }
            Err(EngineError::invalid(
                "request.model",
                format!("a stream asks one model, and the first request named \"{model}\""),
            ))
        });
        Ok((id, checked))
    })
}

/// The answer to one input of many.
enum BulkAnswer {
    Whole(pb::CaptureHeader, Box<Told>),
    Failed(EngineError),
}

async fn bulk_answer(
    state: Arc<State>,
    call: Call,
    request: Result<(String, Result<pb::CaptureRequest, EngineError>), Status>,
) -> Result<(String, BulkAnswer), Status> {
    let (id, request) = request?;
    // Its own time: that of the stream says nothing.
    let call = Call {
        arrived: std::time::Instant::now(),
        ..call
    };
    let ctx = call.ctx();
    let answer = async {
        let (started, explained) = start_when_there_is_room(&state, request?, &call, &ctx).await?;
        let header = header(&started);
        let truncated = started.prepared.truncated;
        match started.finish(&ctx).await {
            Ok(captured) => {
                let messages = Messages::new(captured, truncated, call.arrived);
                let told = Told {
                    messages,
                    explained: Some(explained),
                };
                Ok(BulkAnswer::Whole(header, Box::new(told)))
            }
            Err(error) => {
                explained.failed(&error);
                Err(error)
            }
        }
    };
    match answer.await {
        Ok(answer) => Ok((id, answer)),
        // What ends the call ends it for all of its inputs.
        Err(error @ (EngineError::DeadlineExceeded | EngineError::Cancelled)) => {
            Err(status::status(&error))
        }
        Err(error) => Ok((id, BulkAnswer::Failed(error))),
    }
}

/// An input of many waits for room, where a single call is told to come back.
async fn start_when_there_is_room(
    state: &State,
    request: pb::CaptureRequest,
    call: &Call,
    ctx: &Ctx,
) -> Result<(Started, Explained), EngineError> {
    let until = call.arrived + state.config.stall_limit;
    loop {
        let started = state.start(request.clone(), call, ctx, "capture_stream", Lane::Bulk);
        match started.await {
            Err(EngineError::ResourceExhausted {
                retry_after: Some(after),
                ..
            }) if std::time::Instant::now() + after < until => tokio::time::sleep(after).await,
            other => return other,
        }
    }
}

/// Answers to messages, with a summary of the whole at the end.
fn bulk(
    answers: impl Stream<Item = Result<(String, BulkAnswer), Status>> + Send,
) -> impl Stream<Item = Result<pb::CaptureStreamResponse, Status>> + Send {
    struct Bulk<S> {
        answers: Pin<Box<S>>,
        current: Option<(String, Option<pb::CaptureHeader>, Box<Told>)>,
        ledger: Ledger,
        answered: u64,
        failed: u64,
        over: bool,
    }
    let bulk = Bulk {
        answers: Box::pin(answers),
        current: None,
        ledger: Ledger::default(),
        answered: 0,
        failed: 0,
        over: false,
    };
    stream::unfold(bulk, |mut b| async move {
        let message = |id: String, answer| pb::CaptureStreamResponse {
            id,
            answer: Some(answer),
        };
        loop {
            if b.over {
                return None;
            }
            if let Some((id, header, told)) = &mut b.current {
                let item = header.take().map(Message::Header).or_else(|| told.tell());
                if let Some(item) = item {
                    b.ledger.count(&item);
                    let id = id.clone();
                    let answer = Answer::Capture(pb::CaptureResponse { item: Some(item) });
                    return Some((Ok(message(id, answer)), b));
                }
                b.current = None;
                b.answered += 1;
            }
            match b.answers.next().await {
                Some(Ok((id, BulkAnswer::Whole(header, told)))) => {
                    b.current = Some((id, Some(header), told));
                }
                Some(Ok((id, BulkAnswer::Failed(error)))) => {
                    b.failed += 1;
                    b.ledger.sent(&[]);
                    let answer = Answer::Failure(status::failure(&error));
                    return Some((Ok(message(id, answer)), b));
                }
                Some(Err(status)) => {
                    b.over = true;
                    return Some((Err(status), b));
                }
                None => {
                    b.over = true;
                    let summary = pb::StreamSummary {
                        answered: b.answered,
                        failed: b.failed,
                        messages: b.ledger.messages,
                        bytes: b.ledger.bytes,
                        crc32c: b.ledger.crc32c,
                    };
                    return Some((Ok(message(String::new(), Answer::Summary(summary))), b));
                }
            }
        }
    })
}
