//! `introspect.v1.ProbeService`.

mod from_proto;
mod to_proto;
mod training;

pub(super) use training::Trainings;

use std::{collections::BTreeMap, sync::Arc};

use futures::StreamExt as _;
use tonic::{Request, Response, Status, Streaming};

use super::{
    bulk,
    call::Call,
    daemon::State,
    explained::Explained,
    from_proto::named,
    messages::Item,
    status,
    teller::{self, Messaged},
    wire::introspect::{
        self as pb, probe_service_server::ProbeService, score_stream_response::Answer,
    },
};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle, error::clean},
    ipc::info::ModelInfo,
    methods::probe::{
        card::{self, Card, FORMAT, Report, TensorFile},
        extract,
        ready::reads,
        score::{self, Wanted},
        scorer::Scorer,
        store::{self, Store, Weights, check_name},
    },
    tensor::Tensor,
};

pub(super) struct ProbesOf {
    pub(super) state: Arc<State>,
}

impl State {
    /// The probes of a model, whether it is loaded or not.
    fn probes_of(&self, model: &str) -> Result<Store, EngineError> {
        let folder = self.registry.folder(model)?;
        Ok(self.probes.store(model, &folder))
    }
}

/// Work on files, off the serving threads.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| status::status(&EngineError::internal(e)))?
        .map_err(|e| status::status(&e))
}

#[tonic::async_trait]
impl ProbeService for ProbesOf {
    type TrainStream = Messaged<pb::TrainResponse>;

    async fn train(
        &self,
        request: Request<Streaming<pb::TrainRequest>>,
    ) -> Result<Response<Self::TrainStream>, Status> {
        let call = Call::of(&request);
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let begun = training::begin(&self.state, first, &call);
        let (begun, explained) = begun.map_err(|e| status::status(&e))?;
        let state = self.state.clone();
        Ok(teller::answer(
            (call, explained),
            pb::train_response::Item::Summary,
            |item| pb::TrainResponse { item: Some(item) },
            |teller| Box::pin(training::tell(state, begun, requests, teller)),
        ))
    }

    async fn list_probes(
        &self,
        request: Request<pb::ListProbesRequest>,
    ) -> Result<Response<pb::ListProbesResponse>, Status> {
        let model = request.into_inner().model;
        let every = model.is_empty();
        let models: Vec<String> = if every {
            let all = self.state.registry.list();
            all.keys().cloned().collect()
        } else {
            vec![model]
        };
        let state = self.state.clone();
        let answer = on_disk(move || {
            let mut answer = pb::ListProbesResponse::default();
            for model in models {
                let store = match state.probes_of(&model) {
                    // Its folder went while all were listed.
                    Err(EngineError::NotFound { .. }) if every => continue,
                    other => other?,
                };
                let listing = store.list()?;
                answer
                    .probes
                    .extend(listing.cards.into_iter().map(to_proto::probe));
                let broken = listing.broken.into_iter();
                answer
                    .broken
                    .extend(broken.map(|(name, error)| pb::BrokenProbe {
                        model: model.clone(),
                        name,
                        error,
                    }));
            }
            Ok(answer)
        });
        Ok(Response::new(answer.await?))
    }

    async fn get_probe(
        &self,
        request: Request<pb::GetProbeRequest>,
    ) -> Result<Response<pb::GetProbeResponse>, Status> {
        let pb::GetProbeRequest { model, name } = request.into_inner();
        let state = self.state.clone();
        let card = on_disk(move || state.probes_of(&named(model)?)?.get(&name))
            .await?
            .card;
        Ok(Response::new(pb::GetProbeResponse {
            probe: Some(to_proto::probe(card)),
        }))
    }

    async fn delete_probe(
        &self,
        request: Request<pb::DeleteProbeRequest>,
    ) -> Result<Response<pb::DeleteProbeResponse>, Status> {
        let pb::DeleteProbeRequest { model, name } = request.into_inner();
        let state = self.state.clone();
        on_disk(move || state.probes_of(&named(model)?)?.delete(&name)).await?;
        Ok(Response::new(pb::DeleteProbeResponse {}))
    }

    async fn export_probe(
        &self,
        request: Request<pb::ExportProbeRequest>,
    ) -> Result<Response<pb::ExportProbeResponse>, Status> {
        let pb::ExportProbeRequest { model, name, hooks } = request.into_inner();
        let state = self.state.clone();
        let files = on_disk(move || {
            let model = named(model)?;
            // Names of a model that serves; of another, those that the probe has.
            let info = state.registry.get(&model).ok().map(|h| h.info().clone());
            let canonical = |hook: String| {
                let known = info.as_ref().and_then(|i| i.hook(&hook));
                known.map_or(hook.clone(), |h| h.name.clone())
            };
            let hooks: Vec<String> = hooks.into_iter().map(canonical).collect();
            state.probes_of(&model)?.export(&name, &hooks)
        });
        let (description, tensors) = files.await?;
        Ok(Response::new(pb::ExportProbeResponse {
            files: Some(pb::ProbeFiles {
                description: description.into(),
                tensors: tensors.into(),
            }),
        }))
    }

    async fn import_probe(
        &self,
        request: Request<pb::ImportProbeRequest>,
    ) -> Result<Response<pb::ImportProbeResponse>, Status> {
        let request = request.into_inner();
        let state = self.state.clone();
        let card = on_disk(move || state.import(request)).await?;
        Ok(Response::new(pb::ImportProbeResponse {
            probe: Some(to_proto::probe(card)),
        }))
    }

    async fn score(
        &self,
        request: Request<pb::ScoreRequest>,
    ) -> Result<Response<pb::ScoreResponse>, Status> {
        let call = Call::of(&request);
        let ctx = call.ctx();
        let answer = self
            .state
            .score(request.into_inner(), &call, &ctx, Lane::Interactive);
        Ok(Response::new(answer.await.map_err(|e| status::status(&e))?))
    }

    type ScoreStreamStream = Messaged<pb::ScoreStreamResponse>;

    async fn score_stream(
        &self,
        request: Request<Streaming<pb::ScoreStreamRequest>>,
    ) -> Result<Response<Self::ScoreStreamStream>, Status> {
        let call = Call::of(&request);
        let state = self.state.clone();
        let split = |r: pb::ScoreStreamRequest| (r.id, r.request);
        let answers = bulk::one_model(request.into_inner(), split, |r| &r.model)
            .map(move |request| bulk_answer(state.clone(), call.clone(), request))
            .buffered(bulk::AHEAD);
        let messages = bulk::messages(answers, bulk_message);
        Ok(Response::new(Box::pin(messages)))
    }
}

impl State {
    async fn score(
        &self,
        request: pb::ScoreRequest,
        call: &Call,
        ctx: &Ctx,
        lane: Lane,
    ) -> Result<pb::ScoreResponse, EngineError> {
        let model = named(request.model.clone())?;
        let handle = self.registry.get(&model)?;
        let explained = Explained::new(&model, "probe_score", call.arrived);
        let scored = self.scored(&handle, request, (lane, ctx)).await;
        let (scored, explained) = explained.begun(scored)?;
        explained.answered(&scored.timings);
        Ok(to_proto::scored(scored, call.arrived.elapsed()))
    }

    async fn scored(
        &self,
        handle: &ModelHandle,
        request: pb::ScoreRequest,
        (lane, ctx): (Lane, &Ctx),
    ) -> Result<score::Scored, EngineError> {
        let intervention = request.intervention.clone();
        let question = from_proto::score(request)?;
        let asked = self
            .asked(handle, question.probes, |e, at| {
                e.beneath(&format!("probes[{at}]"))
            })
            .await?;
        let wanted = Wanted {
            per_token: question.per_token,
            predict: question.predict,
            max_bytes: self.config.max_capture,
        };
        match (question.of, &asked[..]) {
            (from_proto::Of::Input(input), asked) => {
                let edited = self.edited(handle, intervention, &input, (lane, ctx));
                score::score(&edited.await?, asked, input, wanted, (lane, ctx)).await
            }
            (from_proto::Of::Hidden(hidden), [asked, ..]) => {
                score::score_hidden(asked, &hidden, wanted.per_token)
            }
            (from_proto::Of::Hidden(_), []) => Err(EngineError::internal("a score by no probe")),
        }
    }

    /// The probes that a score names; `placed` puts the field of an error beneath that of the probe. Their files may have to be looked at,
    /// which is no work for the serving threads.
    pub(super) async fn asked(
        &self,
        handle: &ModelHandle,
        references: Vec<pb::ProbeReference>,
        placed: fn(EngineError, usize) -> EngineError,
    ) -> Result<Vec<score::Asked>, EngineError> {
        let info = handle.info().clone();
        let at_hand = references.iter().enumerate().map(|(at, r)| {
            let found = self.probes.at_hand(&info, (&r.name, &r.hook, r.force));
            found.map(|f| f.map_err(|e| placed(e, at)))
        });
        if let Some(found) = at_hand.collect::<Option<Result<_, _>>>() {
            return found;
        }
        let (probes, store) = (self.probes.clone(), self.probes_of(&info.name)?);
        let found = tokio::task::spawn_blocking(move || {
            let named = references.iter().enumerate();
            named
                .map(|(at, r)| {
                    let found = probes.asked(&store, &info, (&r.name, &r.hook, r.force));
                    found.map_err(|e| placed(e, at))
                })
                .collect()
        });
        found.await.map_err(EngineError::internal)?
    }

    fn import(&self, request: pb::ImportProbeRequest) -> Result<Card, EngineError> {
        use pb::import_probe_request::From as Given;
        let model = named(request.model)?;
        check_name(&request.name, "name")?;
        let store = self.probes_of(&model)?;
        let handle = self.registry.get(&model)?;
        let info = handle.info();
        let ((card, weights), field) = match request.from {
            None => {
                return Err(EngineError::invalid(
                    "files",
                    "is missing: give files or linear",
                ));
            }
            Some(Given::Files(files)) => {
                let brought = brought(info, request.name, files, request.force)?;
                (brought, "files.tensors")
            }
            // Their width was looked at: only the rows may not fit the labels.
            Some(Given::Linear(linear)) => {
                let plain = from_proto::linear(linear)?;
                (plain_probe(info, request.name, plain)?, "linear.labels")
            }
        };
        for report in &card.reports {
            let scorer = Scorer::of(&card, &weights, &report.hook)
                .map_err(|why| EngineError::invalid(field, why))?;
            reads(info, &card.name, &report.hook, &scorer)?;
        }
        store.put(card, &weights, request.replace)
    }
}

/// A probe of a caller's files.
fn brought(
    info: &ModelInfo,
    name: String,
    files: pb::ProbeFiles,
    force: bool,
) -> Result<(Card, Weights), EngineError> {
    let mut card = card::read(&files.description)
        .map_err(|why| EngineError::invalid("files.description", why))?;
    let of_tensors = |why| EngineError::invalid("files.tensors", why);
    store::same(&card.tensors, &files.tensors).map_err(of_tensors)?;
    let weights = store::weights(&files.tensors).map_err(of_tensors)?;
    if card.fingerprint != info.fingerprint {
        if !force {
            return Err(EngineError::precondition(format!(
                "the probe was trained on model \"{}\" of another fingerprint: force it if its hook points mean the same",
                card.model
            )));
        }
        let from = format!(
            "taken by force from model \"{}\" of fingerprint {}",
            card.model, card.fingerprint
        );
        let from = clean(&from);
        for report in &mut card.reports {
            report.notes.push(from.clone());
        }
    }
    card.name = name;
    card.model.clone_from(&info.name);
    card.fingerprint.clone_from(&info.fingerprint);
    Ok((card, weights))
}

/// A probe of plain weights.
fn plain_probe(
    info: &ModelInfo,
    name: String,
    plain: from_proto::Plain,
) -> Result<(Card, Weights), EngineError> {
    let hooks = [plain.hook];
    let mut found = extract::hooks(info, (&hooks, &[]), "linear").map_err(of_one_hook)?;
    let (Some(hook), true) = (found.pop(), found.is_empty()) else {
        return Err(EngineError::invalid(
            "linear.hook",
            "must name one hook point",
        ));
    };
    let rows = plain.bias.len();
    if plain.weight.len() != rows * hook.width {
        return Err(EngineError::invalid(
            "linear.weight",
            format!(
                "has {} numbers: \"{}\" has {} features, so that {rows} rows have {}",
                plain.weight.len(),
                hook.name,
                hook.width,
                rows * hook.width
            ),
        ));
    }
    let tensor =
        |shape, values: &[f32]| Tensor::from_f32(shape, values).map_err(EngineError::internal);
    let weights = BTreeMap::from([
        (
            format!("{}/weight", hook.name),
            tensor(vec![rows, hook.width], &plain.weight)?,
        ),
        (
            format!("{}/bias", hook.name),
            tensor(vec![rows], &plain.bias)?,
        ),
    ]);
    let card = Card {
        format: FORMAT,
        name,
        model: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        kind: plain.kind,
        options: BTreeMap::new(),
        labels: plain.labels,
        pooling: plain.pooling,
        best: hook.name.clone(),
        reports: vec![Report {
            hook: hook.name,
            layer: hook.layer,
            converged: true,
            notes: vec!["imported: nothing was judged here".to_owned()],
            ..Report::default()
        }],
        train_examples: 0,
        test_examples: 0,
        split: String::new(),
        seed: 0,
        created: card::now(),
        made_by: card::MADE_BY.to_owned(),
        tensors: TensorFile::default(),
    };
    Ok((card, weights))
}

/// An error of `linear.hooks`, which has one place only and is called `linear.hook`.
fn of_one_hook(error: EngineError) -> EngineError {
    if let EngineError::InvalidArgument { field, message } = &error
        && field.starts_with("linear.hooks")
    {
        return EngineError::invalid("linear.hook", message);
    }
    error
}

async fn bulk_answer(
    state: Arc<State>,
    call: Call,
    request: Result<bulk::Asked<pb::ScoreRequest>, Status>,
) -> Result<(String, bulk::Answered<pb::ScoreResponse>), Status> {
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
        let scored = bulk::when_there_is_room(until, || {
            state.score(request.clone(), &call, &ctx, Lane::Interactive)
        });
        let scored = scored.await?;
        Ok(Box::new(std::iter::once(scored)) as Box<dyn Iterator<Item = _> + Send>)
    };
    bulk::answered(id, answer.await)
}

impl Item for pb::ScoreResponse {
    /// Scores are fields.
    fn payload(&self) -> Vec<&[u8]> {
        Vec::new()
    }

    fn summary(&self) -> Option<&pb::Summary> {
        None
    }
}

fn bulk_message(id: String, reply: bulk::Reply<pb::ScoreResponse>) -> pb::ScoreStreamResponse {
    let answer = match reply {
        bulk::Reply::Item(scores) => Answer::Scores(scores),
        bulk::Reply::Failure(failure) => Answer::Failure(failure),
        bulk::Reply::Summary(summary) => Answer::Summary(summary),
    };
    pb::ScoreStreamResponse {
        id,
        answer: Some(answer),
    }
}
