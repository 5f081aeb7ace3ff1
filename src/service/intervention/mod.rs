//! `introspect.v1.InterventionService`, and the interventions that ride on the calls of others.

mod circuit;
mod from_proto;
mod sweep;

use std::{sync::Arc, time::Instant};

use futures::{StreamExt as _, stream};
use tonic::{Request, Response, Status};

use super::{
    call::Call,
    daemon::State,
    explained::Explained,
    from_proto::capture as question,
    messages::{Item, Ledger, Messages},
    status,
    teller::{self, Messaged},
    to_proto,
    wire::introspect::{
        self as pb, capture_response::Item as Shown, intervene_item::Item as Of,
        intervene_response::Item as Message, intervention_service_server::InterventionService,
    },
};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle, StageTimings},
    methods::{
        capture::{self, Captured, Terms},
        input::Input,
        intervene::{
            Editor,
            effect::{Effect, effects},
        },
        predict::{self, At, Candidate, Prediction},
    },
    tensor::Tensor,
};

pub(super) struct Interventions {
    pub(super) state: Arc<State>,
}

#[tonic::async_trait]
impl InterventionService for Interventions {
    type InterveneStream = Messaged<pb::InterveneResponse>;

    async fn intervene(
        &self,
        request: Request<pb::InterveneRequest>,
    ) -> Result<Response<Self::InterveneStream>, Status> {
        let call = Call::of(&request);
        let ctx = call.ctx();
        let started = self.state.intervene(request.into_inner(), &call, &ctx);
        let started = started.await.map_err(|e| status::status(&e))?;
        let header = Message::Header(super::capture::header(&started.original));
        let rest = async move {
            match started.finish(call.arrived, &ctx).await {
                Ok(told) => stream::iter(told).map(Ok).left_stream(),
                Err(error) => stream::iter([Err(status::status(&error))]).right_stream(),
            }
        };
        let messages = stream::iter([Ok(header)]).chain(stream::once(rest).flatten());
        let answer = messages.map(|m| m.map(|item| pb::InterveneResponse { item: Some(item) }));
        Ok(Response::new(Box::pin(answer)))
    }

    type SweepStream = Messaged<pb::SweepResponse>;

    async fn sweep(
        &self,
        request: Request<pb::SweepRequest>,
    ) -> Result<Response<Self::SweepStream>, Status> {
        let call = Call::of(&request);
        let ctx = call.ctx();
        let begun = self.state.sweep(request.into_inner(), &call, &ctx).await;
        let (started, explained) = begun.map_err(|e| status::status(&e))?;
        Ok(teller::answer(
            (call, explained),
            pb::sweep_response::Item::Summary,
            |item| pb::SweepResponse { item: Some(item) },
            |teller| Box::pin(sweep::tell(started, teller)),
        ))
    }

    type FindCircuitStream = Messaged<pb::FindCircuitResponse>;

    async fn find_circuit(
        &self,
        request: Request<pb::FindCircuitRequest>,
    ) -> Result<Response<Self::FindCircuitStream>, Status> {
        let call = Call::of(&request);
        let ctx = call.ctx();
        let begun = self.state.circuit(request.into_inner(), &call, &ctx).await;
        let (started, explained) = begun.map_err(|e| status::status(&e))?;
        Ok(teller::answer(
            (call, explained),
            pb::find_circuit_response::Item::Summary,
            |item| pb::FindCircuitResponse { item: Some(item) },
            |teller| Box::pin(circuit::tell(started, teller)),
        ))
    }
}

/// Two runs in the queue.
struct Started {
    original: capture::Started,
    modified: capture::Started,
    candidates: usize,
    explained: Explained,
}

impl State {
    /// The model as an intervention changes it for this input; without one, as it is.
    ///
    /// # Errors
    /// With paths of fields that begin at the request: `intervention...`, `input...`.
    pub(super) async fn edited(
        &self,
        handle: &ModelHandle,
        intervention: Option<pb::Intervention>,
        input: &Input,
        (lane, ctx): (Lane, &Ctx),
    ) -> Result<ModelHandle, EngineError> {
        match self.editor(handle, intervention).await? {
            Some(editor) => editor.edited(handle, input, (lane, ctx)).await,
            None => Ok(handle.clone()),
        }
    }

    /// An intervention with the directions that it names.
    ///
    /// # Errors
    /// With paths of fields that begin at the request: `intervention...`.
    pub(super) async fn editor(
        &self,
        handle: &ModelHandle,
        intervention: Option<pb::Intervention>,
    ) -> Result<Option<Editor>, EngineError> {
        let Some(given) = intervention else {
            return Ok(None);
        };
        let mut directions = from_proto::Directions::new();
        for (field, named) in from_proto::probes(&given) {
            let direction = self.direction(handle, named.clone()).await;
            let direction = direction.map_err(|e| e.beneath(&format!("intervention.{field}")))?;
            directions.push((named, direction));
        }
        let intervention =
            from_proto::intervention(given, &directions).map_err(|e| e.beneath("intervention"))?;
        Ok(Some(Editor {
            intervention,
            means: self.means.clone(),
        }))
    }

    /// The weights of a linear probe, its bias left out.
    async fn direction(
        &self,
        handle: &ModelHandle,
        named: pb::ProbeDirection,
    ) -> Result<Tensor, EngineError> {
        let reference = pb::ProbeReference {
            name: named.name,
            hook: named.hook,
            force: named.force,
        };
        let found = self.asked(handle, vec![reference], |e, _| e);
        let found = found.await?;
        let [probe] = &found[..] else {
            return Err(EngineError::internal("one probe was asked for"));
        };
        let label = (!named.label.is_empty()).then_some(&named.label[..]);
        let weights = probe.readout(label)?.weights;
        let width = weights.len().saturating_sub(1);
        Tensor::from_f32(vec![width], &weights[..width]).map_err(EngineError::internal)
    }

    /// Validates an intervention and queues both runs. Errors of a known model are recorded as its.
    async fn intervene(
        &self,
        request: pb::InterveneRequest,
        call: &Call,
        ctx: &Ctx,
    ) -> Result<Started, EngineError> {
        let lane = Lane::Interactive;
        let (model, question) = question(pb::CaptureRequest {
            model: request.model,
            input: request.input,
            selection: request.selection,
            intervention: None,
        })?;
        let handle = self.registry.get(&model)?;
        let explained = Explained::new(&model, "intervene", call.arrived);
        let started = async {
            if request
                .intervention
                .as_ref()
                .is_none_or(|i| i.edits.is_empty())
            {
                return Err(EngineError::invalid(
                    "intervention.edits",
                    "is empty: say what to change",
                ));
            }
            let terms = Terms {
                max_bytes: self.config.max_capture,
                lane,
            };
            let edited = self
                .edited(&handle, request.intervention, &question.input, (lane, ctx))
                .await?;
            let candidates = question.selection.candidates;
            let original = edited.unchanged();
            let original = capture::start(&original, question.clone(), terms, ctx).await?;
            let modified = capture::start(&edited, question, terms, ctx).await?;
            Ok((original, modified, candidates))
        };
        let ((original, modified, candidates), explained) = explained.begun(started.await)?;
        Ok(Started {
            original,
            modified,
            candidates,
            explained,
        })
    }
}

impl Started {
    /// Waits for both runs and compares them.
    async fn finish(self, arrived: Instant, ctx: &Ctx) -> Result<Told, EngineError> {
        let handle = self.original.handle().clone();
        let truncated = self.original.prepared.truncated;
        let (original, modified, candidates) = (self.original, self.modified, self.candidates);
        let done = async {
            let (original, modified) =
                futures::try_join!(original.finish(ctx), modified.finish(ctx))?;
            let effect = match (&original.scores, &modified.scores) {
                (Some(a), Some(b)) => {
                    let effects = effects(a, b, candidates)?;
                    Some(told(&handle, effects, ctx).await?)
                }
                (Some(_) | None, _) => None,
            };
            Ok((original, modified, effect))
        };
        match done.await {
            Ok((original, modified, effect)) => Ok(Told::new(
                (original, modified),
                effect,
                truncated,
                arrived,
                self.explained,
            )),
            Err(error) => {
                self.explained.failed(&error);
                Err(error)
            }
        }
    }
}

/// Effects with the names of labels and tokens.
async fn told(
    handle: &ModelHandle,
    effects: Vec<Effect>,
    ctx: &Ctx,
) -> Result<pb::InterventionEffect, EngineError> {
    let info = handle.info();
    let candidates = |effect: &Effect| {
        let named = effect.changes.iter().map(|c| Candidate {
            index: c.index,
            label: predict::label(info, c.index),
            logit: c.logits[1],
            probability: None,
        });
        At {
            position: effect.position,
            candidates: named.collect(),
        }
    };
    let mut names = Prediction {
        task: info.task,
        at: effects.iter().map(candidates).collect(),
    };
    predict::spell(handle, &mut names, ctx).await?;
    let at = effects.into_iter().zip(names.at).map(|(effect, names)| {
        let changes = effect.changes.into_iter().zip(names.candidates);
        pb::EffectAt {
            position: effect.position,
            kl: effect.kl,
            total_variation: effect.total_variation,
            flipped: effect.flipped,
            changes: changes
                .map(|(change, name)| pb::Change {
                    index: change.index,
                    label: name.label,
                    logit_before: change.logits[0],
                    logit_after: change.logits[1],
                    probability_before: change.probabilities[0],
                    probability_after: change.probabilities[1],
                })
                .collect(),
        }
    });
    Ok(pb::InterventionEffect { at: at.collect() })
}

/// The messages behind the header. Records the request when the last is made.
struct Told {
    messages: Box<dyn Iterator<Item = Message> + Send>,
    ledger: Ledger,
    summary: Option<(pb::Summary, Explained)>,
    timings: StageTimings,
    arrived: Instant,
    begun: Instant,
}

impl Told {
    fn new(
        (mut original, mut modified): (Captured, Captured),
        effect: Option<pb::InterventionEffect>,
        truncated: u32,
        arrived: Instant,
        explained: Explained,
    ) -> Self {
        let mut timings = original.timings;
        timings += modified.timings;
        let mut non_finite = std::mem::take(&mut original.non_finite);
        non_finite.append(&mut modified.non_finite);
        non_finite.sort();
        non_finite.dedup();
        let summary = pb::Summary {
            rows: 2,
            truncated_tokens: truncated,
            non_finite,
            notes: std::mem::take(&mut original.notes),
            ..pb::Summary::default()
        };
        let items = |captured, item: fn(pb::InterveneItem) -> Message| {
            Messages::new(captured, truncated, arrived).filter_map(move |shown| {
                let of = match shown {
                    Shown::Tensor(t) => Of::Tensor(t),
                    Shown::Sparse(s) => Of::Sparse(s),
                    Shown::Prediction(p) => Of::Prediction(p),
                    Shown::Header(_) | Shown::Summary(_) => return None,
                };
                Some(item(pb::InterveneItem { item: Some(of) }))
            })
        };
        let messages = items(original, Message::Original)
            .chain(items(modified, Message::Modified))
            .chain(effect.map(Message::Effect));
        let mut ledger = Ledger::default();
        ledger.sent(&[]);
        Self {
            messages: Box::new(messages),
            ledger,
            summary: Some((summary, explained)),
            timings,
            arrived,
            begun: Instant::now(),
        }
    }
}

impl Item for Message {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Message::Original(pb::InterveneItem { item })
            | Message::Modified(pb::InterveneItem { item }) => match item {
                Some(Of::Tensor(t)) => vec![&t.data],
                Some(Of::Sparse(s)) => vec![&s.counts, &s.indices, &s.values],
                Some(Of::Prediction(_)) | None => Vec::new(),
            },
            Message::Header(_) | Message::Effect(_) | Message::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Header(_)
            | Message::Original(_)
            | Message::Modified(_)
            | Message::Effect(_) => None,
        }
    }
}

impl Iterator for Told {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        if let Some(message) = self.messages.next() {
            self.ledger.count(&message);
            return Some(message);
        }
        let (summary, explained) = self.summary.take()?;
        self.timings.encode += self.begun.elapsed();
        explained.answered(&self.timings);
        Some(Message::Summary(self.ledger.summed(pb::Summary {
            timings: Some(to_proto::timings(&self.timings, self.arrived.elapsed())),
            ..summary
        })))
    }
}
