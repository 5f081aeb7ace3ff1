//! `introspect.v1.AttributionService`.

mod from_proto;
pub(super) mod to_proto;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use metrics::histogram;
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    bulk,
    call::Call,
    daemon::State,
    driven::driven,
    explained::Explained,
    messages::Ledger,
    status, to_proto as common,
    wire::introspect::{
        self as pb, attribute_response::Item as Message, attribute_stream_response::Answer,
        attribution_service_server::AttributionService, evaluate_response::Item as Judged,
    },
};
use crate::{
    engine::{Ctx, EngineError, Lane, StageTimings},
    methods::{
        attribute::{
            self, Attributed, Evaluated, Features, Started, Target, Terms, evaluate,
            target::Readout,
        },
        input::Input,
    },
    telemetry::names,
    tensor::Tensor,
};

/// How often progress is told: at least twice a second.
const TICK: Duration = Duration::from_millis(400);
/// Messages that wait for a slow reader. Progress is left out before anything waits for it.
const WAITING: usize = 4;
/// A row that is run backward too takes about as long as so many that are not.
const BACKWARD: f64 = 3.0;

type Messaged<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct Attributions {
    pub(super) state: Arc<State>,
}

/// An explanation that has begun, and the record of its time.
struct Begun {
    started: Started,
    explained: Explained,
}

#[tonic::async_trait]
impl AttributionService for Attributions {
    type AttributeStream = Messaged<pb::AttributeResponse>;

    async fn attribute(
        &self,
        request: Request<pb::AttributeRequest>,
    ) -> Result<Response<Self::AttributeStream>, Status> {
        let call = Call::of(&request);
        let ctx = call.ctx();
        let begun = self
            .state
            .begin(request.into_inner(), &call, &ctx, Lane::Interactive);
        let begun = begun.await.map_err(|e| status::status(&e))?;
        let (sender, messages) = mpsc::channel(WAITING);
        // Dropped with the stream: what it waits for is cancelled.
        let work = answer(begun, call, sender);
        let messages = ReceiverStream::new(messages)
            .map(|m: Result<Message, Status>| m.map(|i| pb::AttributeResponse { item: Some(i) }));
        Ok(Response::new(Box::pin(driven(work, messages))))
    }

    type AttributeStreamStream = Messaged<pb::AttributeStreamResponse>;

    async fn attribute_stream(
        &self,
        request: Request<Streaming<pb::AttributeStreamRequest>>,
    ) -> Result<Response<Self::AttributeStreamStream>, Status> {
        let call = Call::of(&request);
        let state = self.state.clone();
        let split = |r: pb::AttributeStreamRequest| (r.id, r.request);
        let answers = bulk::one_model(request.into_inner(), split, |r| &r.model)
            .map(move |request| bulk_answer(state.clone(), call.clone(), request))
            .buffered(bulk::AHEAD);
        let messages = bulk::messages(answers, count, bulk_message);
        Ok(Response::new(Box::pin(messages)))
    }

    async fn estimate_cost(
        &self,
        request: Request<pb::EstimateCostRequest>,
    ) -> Result<Response<pb::EstimateCostResponse>, Status> {
        let call = Call::of(&request);
        let asked = request.into_inner().request.ok_or_else(|| {
            let error = EngineError::invalid("request", "is missing: say what to explain");
            status::status(&error)
        })?;
        let ctx = call.ctx();
        let begun = self.state.begin(asked, &call, &ctx, Lane::Interactive);
        let Begun { started, explained } = begun.await.map_err(|e| status::status(&e))?;
        let spent = started.spent();
        explained.answered(&spent.timings);
        let cost = &started.cost;
        let one = spent.timings.run.as_secs_f64() / (spent.forward_rows.max(1)) as f64;
        let rows = cost.forward_rows as f64 + BACKWARD * cost.gradient_rows as f64;
        Ok(Response::new(pb::EstimateCostResponse {
            cost: Some(to_proto::planned(&started)),
            features: u32::try_from(started.features.len()).unwrap_or(u32::MAX),
            estimated_seconds: one * rows,
        }))
    }

    type EvaluateStream = Messaged<pb::EvaluateResponse>;

    async fn evaluate(
        &self,
        request: Request<pb::EvaluateRequest>,
    ) -> Result<Response<Self::EvaluateStream>, Status> {
        let call = Call::of(&request);
        let ctx = call.ctx();
        let state = &self.state;
        let begun = async {
            let request = request.into_inner();
            let readout = match &request.request {
                Some(asked) => state.readout(asked).await,
                None => Ok(None),
            };
            let readout = readout.map_err(|e| e.beneath("request"))?;
            let intervention = request
                .request
                .as_ref()
                .and_then(|r| r.intervention.clone());
            let (model, evaluation) = from_proto::evaluation(request, readout)?;
            let handle = state.registry.get(&model)?;
            let explained = Explained::new(&model, "evaluate", call.arrived);
            let terms = state.terms(Lane::Interactive);
            let begun = async {
                let input = &evaluation.question.input;
                let edited = state.edited(&handle, intervention, input, (terms.lane, &ctx));
                let edited = edited.await.map_err(|e| e.beneath("request"))?;
                evaluate::begin(&edited, &evaluation, terms, &ctx).await
            };
            match begun.await {
                Ok(all) => Ok((all, evaluation, explained)),
                Err(error) => {
                    explained.failed(&error);
                    Err(error)
                }
            }
        };
        let (all, evaluation, explained) = begun.await.map_err(|e| status::status(&e))?;
        let (sender, messages) = mpsc::channel(WAITING);
        let work = judge(all, evaluation, (explained, call), sender);
        let messages = ReceiverStream::new(messages)
            .map(|m: Result<Judged, Status>| m.map(|i| pb::EvaluateResponse { item: Some(i) }));
        Ok(Response::new(Box::pin(driven(work, messages))))
    }
}

impl State {
    fn terms(&self, lane: Lane) -> Terms {
        Terms {
            max_rows: self.config.max_rows,
            lane,
        }
    }

    /// The probe that a target names, if it does.
    async fn readout(
        &self,
        request: &pb::AttributeRequest,
    ) -> Result<Option<Readout>, EngineError> {
        let target = request.target.as_ref().and_then(|t| t.of.as_ref());
        let Some(pb::target::Of::Probe(given)) = target else {
            return Ok(None);
        };
        let named = given.probe.clone().ok_or_else(|| {
            EngineError::invalid(
                "target.probe.probe",
                "is missing: name a probe of the model",
            )
        })?;
        let handle = self
            .registry
            .get(&crate::service::from_proto::named(request.model.clone())?)?;
        let field = |_| "target.probe.probe".to_owned();
        let found = self.asked(&handle, vec![named], field).await?;
        let [probe] = &found[..] else {
            return Err(EngineError::internal("one probe was asked for"));
        };
        let label = (!given.label.is_empty()).then_some(&given.label[..]);
        let readout = probe.readout(label);
        let readout = readout.map_err(|e| e.beneath("target.probe"))?;
        Ok(Some(Readout {
            position: given.position,
            ..readout
        }))
    }

    /// The model, the input and the number that a request is about.
    pub(super) async fn explained_number(
        &self,
        model: String,
        input: Option<pb::Input>,
        target: Option<pb::Target>,
    ) -> Result<(String, Input, Target), EngineError> {
        let request = pb::AttributeRequest {
            model,
            input,
            target,
            ..pb::AttributeRequest::default()
        };
        let readout = self.readout(&request).await?;
        let (model, question) = from_proto::question(request, readout)?;
        Ok((model, question.input, question.target))
    }

    /// Validates an explanation and runs its input once. Errors of a known model are recorded as its.
    async fn begin(
        &self,
        request: pb::AttributeRequest,
        call: &Call,
        ctx: &Ctx,
        lane: Lane,
    ) -> Result<Begun, EngineError> {
        let readout = self.readout(&request).await?;
        let intervention = request.intervention.clone();
        let (model, question) = from_proto::question(request, readout)?;
        let handle = self.registry.get(&model)?;
        let explained = Explained::new(&model, question.method.name(), call.arrived);
        let begun = async {
            let edited = self.edited(&handle, intervention, &question.input, (lane, ctx));
            let edited = edited.await?;
            attribute::start(&edited, question.clone(), self.terms(lane), ctx).await
        };
        match begun.await {
            Ok(started) => Ok(Begun { started, explained }),
            Err(error) => {
                explained.failed(&error);
                Err(error)
            }
        }
    }
}

/// Sends an explanation: a header, progress, the result with its tensors, a summary.
async fn answer(begun: Begun, call: Call, sender: mpsc::Sender<Result<Message, Status>>) {
    let Begun { started, explained } = begun;
    let mut ledger = Ledger::default();
    let header = Message::Header(to_proto::header(&started));
    count(&mut ledger, &header);
    if sender.send(Ok(header)).await.is_err() {
        return;
    }
    let (features, truncated) = (started.features.clone(), started.truncated);
    let mut watch = started.watch();
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let model = started.handle().info().name.clone();
    let mut run = std::pin::pin!(started.run());
    let found = loop {
        tokio::select! {
            found = &mut run => break found,
            _ = tick.tick() => {
                let progress = to_proto::progress(&watch.borrow_and_update(), call.arrived.elapsed());
                let message = Message::Progress(progress);
                // A reader that is behind gets the next one.
                if let Ok(room) = sender.try_reserve() {
                    count(&mut ledger, &message);
                    room.send(Ok(message));
                }
            }
        }
    };
    let told = found.and_then(|found| told(&found, &features).map(|m| (found, m)));
    match told {
        Ok((found, messages)) => {
            observe(&model, &found);
            for message in messages {
                count(&mut ledger, &message);
                if sender.send(Ok(message)).await.is_err() {
                    return;
                }
            }
            explained.answered(&found.spent.timings);
            let summary = summary(&found, truncated, &ledger, &call);
            // A reader that left needs none.
            let _ = sender.send(Ok(Message::Summary(summary))).await;
        }
        Err(error) => {
            explained.failed(&error);
            let _ = sender.send(Err(status::status(&error))).await;
        }
    }
}

/// The result and its tensors.
fn told(found: &Attributed, features: &Features) -> Result<Vec<Message>, EngineError> {
    let tensors = to_proto::tensors(found, features)?;
    Ok(std::iter::once(Message::Result(to_proto::result(found)))
        .chain(tensors.into_iter().flatten().map(Message::Tensor))
        .collect())
}

/// How complete explanations are, for those who watch.
fn observe(model: &str, found: &Attributed) {
    if let Some(ratio) = found.residual_ratio() {
        histogram!(
            names::COMPLETENESS_RESIDUAL,
            "model" => model.to_owned(), "method" => found.method
        )
        .record(ratio);
    }
}

fn summary(found: &Attributed, truncated: u32, ledger: &Ledger, call: &Call) -> pb::Summary {
    pb::Summary {
        messages: ledger.messages,
        bytes: ledger.bytes,
        crc32c: ledger.crc32c,
        timings: Some(common::timings(
            &found.spent.timings,
            call.arrived.elapsed(),
        )),
        rows: found.spent.forward_rows + found.spent.gradient_rows,
        truncated_tokens: truncated,
        non_finite: Vec::new(),
        notes: found.notes.clone(),
    }
}

/// The payload of a message.
fn count(ledger: &mut Ledger, message: &Message) {
    match message {
        Message::Tensor(t) => ledger.sent(&[&t.data]),
        Message::Progress(pb::AttributionProgress {
            partial: Some(t), ..
        }) => ledger.sent(&[&t.data]),
        Message::Header(_) | Message::Progress(_) | Message::Result(_) | Message::Summary(_) => {
            ledger.sent(&[]);
        }
    }
}

async fn bulk_answer(
    state: Arc<State>,
    call: Call,
    request: Result<bulk::Asked<pb::AttributeRequest>, Status>,
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
        let Begun { started, explained } = bulk::when_there_is_room(until, || {
            state.begin(request.clone(), &call, &ctx, Lane::Bulk)
        })
        .await?;
        let mut ledger = Ledger::default();
        let mut messages = vec![Message::Header(to_proto::header(&started))];
        let (features, truncated) = (started.features.clone(), started.truncated);
        let model = started.handle().info().name.clone();
        match started
            .run()
            .await
            .and_then(|f| told(&f, &features).map(|m| (f, m)))
        {
            Ok((found, more)) => {
                observe(&model, &found);
                messages.extend(more);
                for message in &messages {
                    count(&mut ledger, message);
                }
                explained.answered(&found.spent.timings);
                messages.push(Message::Summary(summary(&found, truncated, &ledger, &call)));
                Ok(Box::new(messages.into_iter()) as Box<dyn Iterator<Item = Message> + Send>)
            }
            Err(error) => {
                explained.failed(&error);
                Err(error)
            }
        }
    };
    bulk::answered(id, answer.await)
}

fn bulk_message(id: String, reply: bulk::Reply<Message>) -> pb::AttributeStreamResponse {
    let answer = match reply {
        bulk::Reply::Item(item) => Answer::Attribution(pb::AttributeResponse { item: Some(item) }),
        bulk::Reply::Failure(failure) => Answer::Failure(failure),
        bulk::Reply::Summary(summary) => Answer::Summary(summary),
    };
    pb::AttributeStreamResponse {
        id,
        answer: Some(answer),
    }
}

/// Sends an evaluation: a header, one message for each method as it is done, the comparison, a summary.
async fn judge(
    all: Vec<Started>,
    evaluation: attribute::Evaluation,
    (explained, call): (Explained, Call),
    sender: mpsc::Sender<Result<Judged, Status>>,
) {
    let mut ledger = Ledger::default();
    let mut timings = StageTimings::default();
    let mut rows = 0;
    let truncated = all.first().map_or(0, |s| s.truncated);
    let mut scores: Vec<(String, Vec<f64>)> = Vec::new();
    let send = async |ledger: &mut Ledger, message: Judged| {
        match &message {
            Judged::Evaluation(pb::Evaluation {
                attributions: Some(t),
                ..
            }) => ledger.sent(&[&t.data]),
            Judged::Comparison(pb::Comparison {
                spearman: Some(s),
                kendall: Some(k),
                ..
            }) => ledger.sent(&[&s.data, &k.data]),
            Judged::Header(_)
            | Judged::Evaluation(_)
            | Judged::Comparison(_)
            | Judged::Summary(_) => ledger.sent(&[]),
        }
        sender.send(Ok(message)).await.is_ok()
    };
    if let Some(first) = all.first()
        && !send(&mut ledger, Judged::Header(to_proto::header(first))).await
    {
        return;
    }
    for (at, started) in all.into_iter().enumerate() {
        let features = started.features.clone();
        let done = evaluate::evaluate(started, &evaluation).await;
        let message = done.and_then(|done: Evaluated| {
            timings += done.attributed.spent.timings;
            rows += done.attributed.spent.forward_rows + done.attributed.spent.gradient_rows;
            scores.push((
                done.attributed.method.to_owned(),
                done.attributed.scores.clone(),
            ));
            to_proto::evaluation(at, &done, &features)
        });
        match message {
            Ok(message) => {
                if !send(&mut ledger, Judged::Evaluation(message)).await {
                    return;
                }
            }
            Err(error) => {
                explained.failed(&error);
                let _ = sender.send(Err(status::status(&error))).await;
                return;
            }
        }
    }
    let comparison = Judged::Comparison(pb::Comparison {
        methods: scores.iter().map(|(name, _)| name.clone()).collect(),
        spearman: correlations("spearman", &scores, evaluate::spearman),
        kendall: correlations("kendall", &scores, evaluate::kendall),
    });
    if !send(&mut ledger, comparison).await {
        return;
    }
    explained.answered(&timings);
    let summary = pb::Summary {
        messages: ledger.messages,
        bytes: ledger.bytes,
        crc32c: ledger.crc32c,
        timings: Some(common::timings(&timings, call.arrived.elapsed())),
        rows,
        truncated_tokens: truncated,
        ..pb::Summary::default()
    };
    send(&mut ledger, Judged::Summary(summary)).await;
}

/// Every method with every other.
fn correlations(
    name: &str,
    scores: &[(String, Vec<f64>)],
    of: fn(&[f64], &[f64]) -> f64,
) -> Option<pb::Tensor> {
    let n = scores.len();
    let all: Vec<f64> = scores
        .iter()
        .flat_map(|(_, a)| scores.iter().map(|(_, b)| of(a, b)))
        .collect();
    let tensor: Tensor = to_proto::floats(vec![n, n], &all).ok()?;
    let axes = vec!["method".to_owned(), "method".to_owned()];
    super::messages::Pieces::new(name.to_owned(), axes, tensor).next()
}
