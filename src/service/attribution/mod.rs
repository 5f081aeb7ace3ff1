//! `introspect.v1.AttributionService`.

mod from_proto;
pub(super) mod to_proto;

use std::sync::Arc;

use futures::StreamExt as _;
use metrics::histogram;
use tonic::{Request, Response, Status, Streaming};

use super::{
    bulk,
    call::Call,
    daemon::State,
    explained::Explained,
    messages::{Item, Ledger},
    status,
    teller::{self, Ended, Messaged, Teller},
    wire::introspect::{
        self as pb, attribute_response::Item as Message, attribute_stream_response::Answer,
        attribution_service_server::AttributionService, evaluate_response::Item as Judged,
    },
};
use crate::{
    engine::{Ctx, EngineError, Lane},
    methods::{
        attribute::{self, Attributed, Features, Started, Terms, evaluate},
        input::Input,
        target::{Readout, Target},
    },
    telemetry::names,
    tensor::Tensor,
};

/// A row that is run backward too takes about as long as so many that are not.
const BACKWARD: f64 = 3.0;

pub(super) struct Attributions {
    pub(super) state: Arc<State>,
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
        let (started, explained) = begun.await.map_err(|e| status::status(&e))?;
        Ok(teller::answer(
            (call, explained),
            Message::Summary,
            |item| pb::AttributeResponse { item: Some(item) },
            |teller| Box::pin(tell(started, teller)),
        ))
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
        let messages = bulk::messages(answers, bulk_message);
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
        let (started, explained) = begun.await.map_err(|e| status::status(&e))?;
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
            let (all, explained) = explained.begun(begun.await)?;
            Ok((all, evaluation, explained))
        };
        let (all, evaluation, explained) = begun.await.map_err(|e| status::status(&e))?;
        Ok(teller::answer(
            (call, explained),
            Judged::Summary,
            |item| pb::EvaluateResponse { item: Some(item) },
            |teller| Box::pin(judge(all, evaluation, teller)),
        ))
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
        let placed = |e: EngineError, _| e.beneath("target.probe.probe");
        let found = self.asked(&handle, vec![named], placed).await?;
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
    ) -> Result<(Started, Explained), EngineError> {
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
        explained.begun(begun.await)
    }
}

/// Sends a header, progress, the result with its tensors.
async fn tell(started: Started, teller: &mut Teller<Message>) -> Result<Ended, EngineError> {
    let header = to_proto::header(&started);
    teller.send(Message::Header(header)).await?;
    let (features, truncated) = (started.features.clone(), started.truncated);
    let model = started.handle().info().name.clone();
    let mut watch = started.watch();
    let progress =
        |elapsed| Message::Progress(to_proto::progress(&watch.borrow_and_update(), elapsed));
    let found = teller.working(started.run(), progress).await?;
    let messages = told(&found, &features)?;
    observe(&model, &found);
    teller.send_all(messages).await?;
    Ok(ended(found, truncated))
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

fn ended(found: Attributed, truncated_tokens: u32) -> Ended {
    Ended {
        truncated_tokens,
        notes: found.notes,
        ..Ended::of(&found.spent)
    }
}

impl Item for Message {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Message::Tensor(t)
            | Message::Progress(pb::AttributionProgress {
                partial: Some(t), ..
            }) => vec![&t.data],
            Message::Header(_)
            | Message::Progress(_)
            | Message::Result(_)
            | Message::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Header(_) | Message::Progress(_) | Message::Result(_) | Message::Tensor(_) => {
                None
            }
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
        let (started, explained) = bulk::when_there_is_room(until, || {
            state.begin(request.clone(), &call, &ctx, Lane::Bulk)
        })
        .await?;
        let mut ledger = Ledger::default();
        let mut messages = vec![Message::Header(to_proto::header(&started))];
        let (features, truncated) = (started.features.clone(), started.truncated);
        let model = started.handle().info().name.clone();
        let found = started.run().await;
        let told = found.and_then(|f| told(&f, &features).map(|m| (f, m)));
        let ((found, more), explained) = explained.begun(told)?;
        observe(&model, &found);
        messages.extend(more);
        for message in &messages {
            ledger.count(message);
        }
        explained.answered(&found.spent.timings);
        let summary = ended(found, truncated).summary(&ledger, &call);
        messages.push(Message::Summary(summary));
        Ok(Box::new(messages.into_iter()) as Box<dyn Iterator<Item = Message> + Send>)
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

impl Item for Judged {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Judged::Evaluation(pb::Evaluation {
                attributions: Some(t),
                ..
            }) => vec![&t.data],
            Judged::Comparison(pb::Comparison {
                spearman: Some(s),
                kendall: Some(k),
                ..
            }) => vec![&s.data, &k.data],
            Judged::Header(_)
            | Judged::Evaluation(_)
            | Judged::Comparison(_)
            | Judged::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Judged::Summary(summary) => Some(summary),
            Judged::Header(_) | Judged::Evaluation(_) | Judged::Comparison(_) => None,
        }
    }
}

/// Sends a header, one message for each method as it is done, the comparison.
async fn judge(
    all: Vec<Started>,
    evaluation: attribute::Evaluation,
    teller: &mut Teller<Judged>,
) -> Result<Ended, EngineError> {
    let mut ended = Ended {
        truncated_tokens: all.first().map_or(0, |s| s.truncated),
        ..Ended::default()
    };
    let mut scores: Vec<(String, Vec<f64>)> = Vec::new();
    if let Some(first) = all.first() {
        teller.send(Judged::Header(to_proto::header(first))).await?;
    }
    for (at, started) in all.into_iter().enumerate() {
        let features = started.features.clone();
        let done = evaluate::evaluate(started, &evaluation).await?;
        let spent = &done.attributed.spent;
        ended.timings += spent.timings;
        ended.rows += spent.forward_rows + spent.gradient_rows;
        let message = to_proto::evaluation(at, &done, &features)?;
        teller.send(Judged::Evaluation(message)).await?;
        scores.push((done.attributed.method.to_owned(), done.attributed.scores));
    }
    let comparison = pb::Comparison {
        methods: scores.iter().map(|(name, _)| name.clone()).collect(),
        spearman: correlations("spearman", &scores, evaluate::spearman),
        kendall: correlations("kendall", &scores, evaluate::kendall),
    };
    teller.send(Judged::Comparison(comparison)).await?;
    Ok(ended)
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
