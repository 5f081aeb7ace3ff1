//! `introspect.v1.CaptureService`.

use std::sync::Arc;

use futures::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    bulk,
    call::Call,
    daemon::State,
    explained::Explained,
    from_proto,
    messages::Messages,
    status,
    teller::Messaged,
    to_proto,
    wire::introspect::{
        self as pb, capture_response::Item as Message, capture_service_server::CaptureService,
        capture_stream_response::Answer,
    },
};
use crate::{
    engine::{Ctx, EngineError, Lane},
    methods::capture::{self, Question, Started, Terms},
};

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
                    stream::iter(Told {
                        messages,
                        explained: Some(explained),
                    })
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
        let split = |r: pb::CaptureStreamRequest| (r.id, r.request);
        let answers = bulk::one_model(request.into_inner(), split, |r| &r.model)
            .map(move |request| bulk_answer(state.clone(), call.clone(), request))
            .buffered(bulk::AHEAD);
        let messages = bulk::messages(answers, bulk_message);
        Ok(Response::new(Box::pin(messages)))
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

impl Iterator for Told {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        let message = self.messages.next();
        if let Some(Message::Summary(_)) = message
            && let Some(explained) = self.explained.take()
        {
            explained.answered(&self.messages.timings());
        }
        message
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
            let intervention = request.intervention.clone();
            let (_, question): (_, Question) = from_proto::capture(request)?;
            let handle = self
                .edited(&handle, intervention, &question.input, (lane, ctx))
                .await?;
            let terms = Terms {
                max_bytes: self.config.max_capture,
                lane,
            };
            capture::start(&handle, question, terms, ctx).await
        };
        explained.begun(started.await)
    }
}

pub(super) fn header(started: &Started) -> pb::CaptureHeader {
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

/// The answer to one input of many.
async fn bulk_answer(
    state: Arc<State>,
    call: Call,
    request: Result<bulk::Asked<pb::CaptureRequest>, Status>,
) -> Result<(String, bulk::Answered<Message>), Status> {
    let (id, request) = request?;
    // Its own time: that of the stream says nothing.
    let call = Call {
        arrived: std::time::Instant::now(),
        ..call
    };
    let ctx = call.ctx();
    let answer = async {
        let request = request?;
        let until = call.arrived + state.config.stall_limit;
        let (started, explained) = bulk::when_there_is_room(until, || {
            state.start(request.clone(), &call, &ctx, "capture_stream", Lane::Bulk)
        })
        .await?;
        let header = header(&started);
        let truncated = started.prepared.truncated;
        match started.finish(&ctx).await {
            Ok(captured) => {
                let messages = Messages::new(captured, truncated, call.arrived);
                let told = Told {
                    messages,
                    explained: Some(explained),
                };
                let all = std::iter::once(Message::Header(header)).chain(told);
                Ok(Box::new(all) as Box<dyn Iterator<Item = Message> + Send>)
            }
            Err(error) => {
                explained.failed(&error);
                Err(error)
            }
        }
    };
    bulk::answered(id, answer.await)
}

fn bulk_message(id: String, reply: bulk::Reply<Message>) -> pb::CaptureStreamResponse {
    let answer = match reply {
        bulk::Reply::Item(item) => Answer::Capture(pb::CaptureResponse { item: Some(item) }),
        bulk::Reply::Failure(failure) => Answer::Failure(failure),
        bulk::Reply::Summary(summary) => Answer::Summary(summary),
    };
    pb::CaptureStreamResponse {
        id,
        answer: Some(answer),
    }
}
