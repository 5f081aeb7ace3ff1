//! Sweeps: requests validated, answers streamed hook point by hook point.

use tokio::sync::mpsc;
use tonic::Status;

use super::from_proto::inputs;
use crate::{
    engine::{Ctx, EngineError, Lane},
    methods::{
        input,
        intervene::sweep::{self, By, Change, Started, Sweep},
    },
    service::{
        attribution::to_proto::{floats, term},
        call::Call,
        daemon::State,
        explained::Explained,
        from_proto::{required_input, unknown},
        messages::{Ledger, Pieces},
        status, to_proto,
        wire::introspect::{
            self as pb, sweep_request::Change as Given, sweep_response::Item as Message,
        },
    },
};

/// A sweep that has begun, and the record of its time.
pub(super) struct Begun {
    started: Started,
    model: pb::SweepHeader,
    explained: Explained,
}

impl State {
    /// Validates a sweep and runs its input once. Errors of a known model are recorded as its.
    pub(super) async fn sweep(
        &self,
        request: pb::SweepRequest,
        call: &Call,
        ctx: &Ctx,
    ) -> Result<Begun, EngineError> {
        let (model, input, target) = self
            .explained_number(request.model, request.input, request.target)
            .await?;
        let by = pb::SweepBy::try_from(request.by).map_err(|_| unknown("by", request.by))?;
        let sweep = Sweep {
            input,
            target,
            hook: request.hook,
            layers: request.layers,
            by: match by {
                pb::SweepBy::Unspecified => By::Layer,
                pb::SweepBy::Head => By::Head,
                pb::SweepBy::Position => By::Position,
                pb::SweepBy::Dim => By::Dim,
            },
            change: match request.change {
                None => {
                    return Err(EngineError::invalid(
                        "change",
                        "is missing: give zero, mean or patch",
                    ));
                }
                Some(Given::Zero(pb::Zero {})) => Change::Zero,
                Some(Given::Mean(mean)) => Change::Mean(inputs(mean.inputs, "mean.inputs")?),
                Some(Given::Patch(given)) => Change::Patch(
                    required_input(Some(given)).map_err(|e| input::at_field(e, "patch"))?,
                ),
            },
        };
        let handle = self.registry.get(&model)?;
        let explained = Explained::new(&model, "sweep", call.arrived);
        match sweep::start(
            &handle,
            sweep,
            (self.config.max_rows, Lane::Interactive),
            ctx,
        )
        .await
        {
            Ok(started) => {
                let info = handle.info();
                let rows: usize = started.hooks.iter().map(|(_, n)| n).sum();
                let model = pb::SweepHeader {
                    model: info.name.clone(),
                    fingerprint: info.fingerprint.clone(),
                    generation: handle.generation(),
                    provider: info.provider.clone(),
                    tokens: started
                        .tokens
                        .iter()
                        .cloned()
                        .map(to_proto::token)
                        .collect(),
                    terms: started.objective.terms.iter().map(term).collect(),
                    value: started.value,
                    source_value: started.source_value,
                    hooks: started.hooks.iter().map(|(name, _)| name.clone()).collect(),
                    rows: rows as u64,
                };
                Ok(Begun {
                    started,
                    model,
                    explained,
                })
            }
            Err(error) => {
                explained.failed(&error);
                Err(error)
            }
        }
    }
}

/// Sends a header, a row for each hook point as it is done, a summary.
pub(super) async fn answer(
    begun: Begun,
    call: Call,
    sender: mpsc::Sender<Result<Message, Status>>,
) {
    let Begun {
        mut started,
        model,
        explained,
    } = begun;
    let mut ledger = Ledger::default();
    ledger.sent(&[]);
    if sender.send(Ok(Message::Header(model))).await.is_err() {
        return;
    }
    for at in 0..started.hooks.len() {
        let values = started.hook(at).await;
        match values.and_then(|values| row(&started, at, &values)) {
            Ok(row) => {
                let data = |t: &Option<pb::Tensor>| t.as_ref().map(|t| t.data.clone());
                let (effects, normalized) = (data(&row.effects), data(&row.normalized));
                ledger.sent(&[
                    &effects.unwrap_or_default(),
                    &normalized.unwrap_or_default(),
                ]);
                if sender.send(Ok(Message::Row(row))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                explained.failed(&error);
                // A reader that left needs no error.
                let _ = sender.send(Err(status::status(&error))).await;
                return;
            }
        }
    }
    let spent = started.spent();
    explained.answered(&spent.timings);
    let summary = pb::Summary {
        messages: ledger.messages,
        bytes: ledger.bytes,
        crc32c: ledger.crc32c,
        timings: Some(to_proto::timings(&spent.timings, call.arrived.elapsed())),
        rows: spent.forward_rows,
        truncated_tokens: started.truncated,
        ..pb::Summary::default()
    };
    // A reader that left needs none.
    let _ = sender.send(Ok(Message::Summary(summary))).await;
}

fn row(started: &Started, at: usize, values: &[f64]) -> Result<pb::SweepRow, EngineError> {
    let (hook, _) = &started.hooks[at];
    let change: Vec<f64> = values.iter().map(|v| v - started.value).collect();
    let whole = started.source_value.map(|s| s - started.value);
    let normalized = whole.filter(|w| *w != 0.0);
    let normalized = normalized.map(|w| change.iter().map(|c| c / w).collect::<Vec<f64>>());
    let tensor = |name: &str, values: &[f64]| {
        let axes = vec![started.by.name().to_owned()];
        let tensor = floats(vec![values.len()], values)?;
        Ok::<_, EngineError>(Pieces::new(name.to_owned(), axes, tensor).next())
    };
    Ok(pb::SweepRow {
        hook: hook.clone(),
        effects: tensor("effects", &change)?,
        normalized: match normalized {
            Some(values) => tensor("normalized", &values)?,
            None => None,
        },
    })
}
