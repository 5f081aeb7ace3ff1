//! Sweeps: requests validated, answers streamed hook point by hook point.

use std::time::Duration;

use super::from_proto::inputs;
use crate::{
    engine::{Ctx, EngineError, Lane},
    methods::{
        Partial, input,
        intervene::{
            Edit, Operation, Within,
            sweep::{self, By, Change, Effects, Path, Started, Sweep, Way},
        },
    },
    service::{
        attribution::to_proto::{floats, quantity, term},
        call::Call,
        daemon::State,
        explained::Explained,
        from_proto::{required_input, unknown},
        messages::{Item, Pieces},
        teller::{Ended, Teller},
        to_proto,
        wire::introspect::{
            self as pb, sweep_request::Change as Given, sweep_response::Item as Message,
        },
    },
};

/// Most hook points that a request names.
const MOST_HOOKS: usize = 64;
/// Most axes of a part.
const MOST_AXES: usize = 4;
/// Most receivers.
const MOST_RECEIVERS: usize = 64;

impl Item for Message {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Message::Tensor(t) => vec![&t.data],
            Message::Header(_)
            | Message::Progress(_)
            | Message::Result(_)
            | Message::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Header(_) | Message::Progress(_) | Message::Tensor(_) | Message::Result(_) => {
                None
            }
        }
    }
}

impl State {
    /// Validates a sweep and runs its input once. Errors of a known model are recorded as its.
    pub(super) async fn sweep(
        &self,
        request: pb::SweepRequest,
        call: &Call,
        ctx: &Ctx,
    ) -> Result<(Started, Explained), EngineError> {
        let (model, sweep) = self.asked_sweep(request).await?;
        let handle = self.registry.get(&model)?;
        let explained = Explained::new(&model, "sweep", call.arrived);
        let within = Within {
            lane: Lane::Interactive,
            ctx,
            means: &self.means,
        };
        let started = sweep::start(&handle, sweep, self.config.max_rows, within).await;
        explained.begun(started)
    }

    /// A request, validated as far as it can be without the model.
    async fn asked_sweep(&self, request: pb::SweepRequest) -> Result<(String, Sweep), EngineError> {
        let (model, input, target) = self
            .explained_number(request.model, request.input, request.target)
            .await?;
        let most = |n: usize, most: usize, field: &str| match n > most {
            true => Err(EngineError::invalid(
                field,
                format!("has {n} entries: give at most {most}"),
            )),
            false => Ok(()),
        };
        most(request.hooks.len(), MOST_HOOKS, "hooks")?;
        most(request.by.len(), MOST_AXES, "by")?;
        if request.hooks.is_empty() {
            return Err(EngineError::invalid(
                "hooks",
                "is empty: name a hook point, such as attn.hook_z",
            ));
        }
        let by = request.by.iter().enumerate().map(|(n, by)| {
            let field = format!("by[{n}]");
            match pb::SweepAxis::try_from(*by).map_err(|_| unknown(&field, *by))? {
                pb::SweepAxis::Unspecified => Err(EngineError::invalid(
                    field,
                    "is SWEEP_AXIS_UNSPECIFIED: leave `by` empty to take hook points as a whole",
                )),
                pb::SweepAxis::Head => Ok(By::Head),
                pb::SweepAxis::Position => Ok(By::Position),
                pb::SweepAxis::Dim => Ok(By::Dim),
                pb::SweepAxis::Key => Ok(By::Key),
            }
        });
        let by = by.collect::<Result<_, _>>()?;
        let change = match request.change {
            None => {
                return Err(EngineError::invalid(
                    "change",
                    "is missing: give zero, mean or patch",
                ));
            }
            Some(Given::Zero(pb::Zero {})) => Change::Zero,
            Some(Given::Mean(mean)) => Change::Mean(inputs(mean.inputs, "mean.inputs")?),
            Some(Given::Patch(given)) => {
                Change::Patch(required_input(Some(given)).map_err(|e| input::at_field(e, "patch"))?)
            }
        };
        let method = pb::SweepMethod::try_from(request.method)
            .map_err(|_| unknown("method", request.method))?;
        if request.most != 0 && method != pb::SweepMethod::Both {
            return Err(EngineError::invalid(
                "most",
                "chooses by estimates what is run: it belongs to SWEEP_METHOD_BOTH",
            ));
        }
        let way = match (method, request.path) {
            (pb::SweepMethod::Unspecified | pb::SweepMethod::Run, None) => Way::Run,
            (pb::SweepMethod::Unspecified | pb::SweepMethod::Run, Some(given)) => {
                if !matches!(change, Change::Patch(_)) {
                    return Err(EngineError::invalid(
                        "path",
                        "needs something to patch from: give `patch`",
                    ));
                }
                most(given.receivers.len(), MOST_RECEIVERS, "path.receivers")?;
                Way::Path(path(given)?)
            }
            (pb::SweepMethod::Estimate, None) => Way::Estimate,
            (pb::SweepMethod::Both, None) => Way::Both {
                most: request.most as usize,
            },
            (pb::SweepMethod::Estimate | pb::SweepMethod::Both, Some(_)) => {
                return Err(EngineError::invalid(
                    "method",
                    "is an estimate, and paths are run: leave one of both out",
                ));
            }
        };
        let sweep = Sweep {
            input,
            target,
            hooks: request.hooks,
            layers: request.layers,
            by,
            change,
            way,
        };
        Ok((model, sweep))
    }
}

fn path(given: pb::PathPatch) -> Result<Path, EngineError> {
    if given.receivers.is_empty() {
        return Err(EngineError::invalid(
            "path.receivers",
            "is empty: say where the paths end, such as at the last hook_resid_post",
        ));
    }
    let place = |r: pb::Receiver| Edit {
        layers: r.layers,
        heads: r.heads,
        positions: r.positions,
        ..Edit::whole(&r.hook, Operation::Zero)
    };
    Ok(Path {
        receivers: given.receivers.into_iter().map(place).collect(),
        freeze_mlps: given.freeze_mlps,
    })
}

fn header(started: &Started) -> pb::SweepHeader {
    let info = started.handle().info();
    let tokens = started.tokens.iter().cloned();
    pb::SweepHeader {
        model: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        generation: started.handle().generation(),
        provider: info.provider.clone(),
        tokens: tokens.map(to_proto::token).collect(),
        quantity: quantity(started.objective.quantity).into(),
        terms: started.objective.terms.iter().map(term).collect(),
        value: started.value,
        source_value: started.source_value,
        hooks: started.swept.iter().map(|s| s.asked().to_owned()).collect(),
        rows: started.rows as u64,
    }
}

/// Sends a header, progress, the tensors of each hook point as it is done, a result.
pub(super) async fn tell(
    mut started: Started,
    teller: &mut Teller<Message>,
) -> Result<Ended, EngineError> {
    teller.send(Message::Header(header(&started))).await?;
    let watch = started.watch();
    let progress = |elapsed| Message::Progress(progress(&watch.borrow(), elapsed));
    while let Some((at, effects)) = teller.working(started.next(), progress).await? {
        teller.send_all(tensors(&started, at, &effects)?).await?;
    }
    let (correlation, compared) = started.correlation();
    let result = pb::SweepResult {
        correlation,
        compared: compared as u64,
    };
    teller.send(Message::Result(result)).await?;
    Ok(Ended {
        truncated_tokens: started.truncated,
        ..Ended::of(&started.spent())
    })
}

pub(super) fn progress(partial: &Partial, elapsed: Duration) -> pb::SweepProgress {
    pb::SweepProgress {
        rows_done: partial.rows_done,
        rows_planned: partial.rows_planned,
        elapsed_seconds: elapsed.as_secs_f64(),
    }
}

/// What was found at a hook point.
fn tensors(started: &Started, at: usize, effects: &Effects) -> Result<Vec<Message>, EngineError> {
    let swept = &started.swept[at];
    let whole = started.source_value.map(|s| s - started.value);
    let normalized = whole.filter(|w| *w != 0.0).and_then(|whole| {
        let effects = effects.measured.as_ref()?;
        Some(effects.iter().map(|e| e / whole).collect::<Vec<f64>>())
    });
    let all = [
        ("effects", effects.measured.as_ref()),
        ("normalized", normalized.as_ref()),
        ("estimates", effects.estimated.as_ref()),
    ];
    let mut messages = Vec::new();
    for (what, values) in all {
        if let Some(values) = values {
            let tensor = floats(swept.shape(), values)?;
            let name = format!("{what}:{}", swept.asked());
            messages.extend(Pieces::new(name, swept.axes(), tensor).map(Message::Tensor));
        }
    }
    Ok(messages)
}
