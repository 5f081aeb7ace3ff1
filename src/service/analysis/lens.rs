//! Lenses: requests validated once, answers streamed.

use std::time::Duration;

use bytes::Bytes;
use tonic::{Request, Response, Status};

use crate::{
    engine::{Ctx, EngineError, Lane},
    methods::{
        Partial,
        lens::{
            self, Direct, Lensed, Parts, Question, Residual, Started, Terms, Views,
            tuned::{self, Tuned},
        },
    },
    service::{
        attribution::to_proto::{floats, term},
        call::Call,
        daemon::State,
        explained::Explained,
        from_proto::{or, unknown},
        messages::{Item, Pieces},
        status,
        teller::{self, Ended, Messaged, Teller},
        to_proto,
        wire::introspect::{self as pb, lens_response::Item as Message},
    },
    tensor::{DType, Tensor},
};

/// Labels kept of each place, unless said.
const DEFAULT_TOP: u32 = 5;
/// Most labels kept of each place.
const MOST_TOP: u32 = 100;
/// Most parts of a request.
const MOST_PARTS: usize = 16;
/// Most positions that are named.
const MOST_POSITIONS: usize = 65_536;
/// Names of a message.
const NAMES_AT_A_TIME: usize = 4096;

/// Begins a lens and answers as it goes on.
pub(super) async fn answer(
    state: &State,
    request: Request<pb::LensRequest>,
) -> Result<Response<Messaged<pb::LensResponse>>, Status> {
    let call = Call::of(&request);
    let ctx = call.ctx();
    let begun = state.lens(request.into_inner(), &call, &ctx).await;
    let (started, explained) = begun.map_err(|e| status::status(&e))?;
    Ok(teller::answer(
        (call, explained),
        Message::Summary,
        |item| pb::LensResponse { item: Some(item) },
        |teller| Box::pin(tell(started, teller)),
    ))
}

impl State {
    /// Validates a lens and reads its stream. Errors of a known model are recorded as its.
    async fn lens(
        &self,
        request: pb::LensRequest,
        call: &Call,
        ctx: &Ctx,
    ) -> Result<(Started, Explained), EngineError> {
        let lane = Lane::Interactive;
        let parts = parts(&request.parts)?;
        let top = or(request.top_k, DEFAULT_TOP);
        if top > MOST_TOP {
            return Err(EngineError::invalid(
                "top_k",
                format!("is {top}: at most {MOST_TOP}"),
            ));
        }
        if request.positions.len() > MOST_POSITIONS {
            return Err(EngineError::invalid(
                "positions",
                format!(
                    "has {} entries: give at most {MOST_POSITIONS}",
                    request.positions.len()
                ),
            ));
        }
        if !request.tuned.is_empty() {
            tuned::check_name(&request.tuned, "tuned")?;
            if !parts.lens {
                return Err(EngineError::invalid(
                    "tuned",
                    "is how a lens reads states, and no lens is asked for: leave it out, or add LENS_PART_LENS",
                ));
            }
        }
        let named = request.target.is_some();
        let (model, input, target) = self
            .explained_number(request.model, request.input, request.target)
            .await?;
        let handle = self.registry.get(&model)?;
        let explained = Explained::new(&model, "lens", call.arrived);
        let begun = async {
            let tuned = match request.tuned {
                name if name.is_empty() => None,
                name => Some(self.tuned(&model, name).await?),
            };
            let edited = self
                .edited(&handle, request.intervention, &input, (lane, ctx))
                .await?;
            let question = Question {
                input,
                parts,
                target: named.then_some(target),
                positions: request.positions,
                top: top as usize,
                logits: request.logits,
                heads: !request.no_heads,
                tuned,
            };
            let terms = Terms {
                max_rows: self.config.max_rows,
                max_bytes: self.config.max_capture,
                lane,
            };
            lens::start(&edited, question, terms, ctx).await
        };
        explained.begun(begun.await)
    }

    /// The maps of a tuned lens, off the serving threads.
    async fn tuned(&self, model: &str, name: String) -> Result<Tuned, EngineError> {
        let beside = self.registry.folder(model)?;
        let folder = tuned::folder(self.config.lenses.as_deref(), model, &beside);
        tokio::task::spawn_blocking(move || Tuned::open(&folder, &name))
            .await
            .map_err(EngineError::internal)?
    }
}

/// Parts of an answer; the lens when none is named.
fn parts(given: &[i32]) -> Result<Parts, EngineError> {
    if given.len() > MOST_PARTS {
        return Err(EngineError::invalid(
            "parts",
            format!("has {} entries: give at most {MOST_PARTS}", given.len()),
        ));
    }
    let mut parts = Parts {
        lens: given.is_empty(),
        ..Parts::default()
    };
    for (n, part) in given.iter().enumerate() {
        let known = pb::LensPart::try_from(*part);
        match known.map_err(|_| unknown(&format!("parts[{n}]"), *part))? {
            pb::LensPart::Unspecified | pb::LensPart::Lens => parts.lens = true,
            pb::LensPart::Attribution => parts.attribution = true,
            pb::LensPart::Residual => parts.residual = true,
        }
    }
    Ok(parts)
}

impl Item for Message {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Message::Tensor(t) => vec![&t.data],
            Message::Header(_)
            | Message::Progress(_)
            | Message::Attribution(_)
            | Message::Labels(_)
            | Message::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Header(_)
            | Message::Progress(_)
            | Message::Attribution(_)
            | Message::Labels(_)
            | Message::Tensor(_) => None,
        }
    }
}

/// Sends a header, progress, what was found.
async fn tell(started: Started, teller: &mut Teller<Message>) -> Result<Ended, EngineError> {
    teller.send(Message::Header(header(&started))).await?;
    let extents = Extents {
        states: started.states.len(),
        positions: started.positions.len(),
        length: started.length,
    };
    let truncated_tokens = started.truncated;
    let watch = started.watch();
    let progress = |elapsed| Message::Progress(progress(&watch.borrow(), elapsed));
    let found = teller.working(started.run(), progress).await?;
    let tensors = tensors(&found, extents)?;
    if let Some(direct) = &found.direct {
        let message = Message::Attribution(attribution(direct));
        teller.send(message).await?;
    }
    let labels = labels(&found.labels).map(Message::Labels);
    teller.send_all(labels).await?;
    let tensors = tensors.into_iter().flatten().map(Message::Tensor);
    teller.send_all(tensors).await?;
    Ok(Ended {
        truncated_tokens,
        non_finite: found.non_finite,
        notes: found.notes,
        ..Ended::of(&found.spent)
    })
}

fn header(started: &Started) -> pb::LensHeader {
    let info = started.handle().info();
    let tokens = started.tokens.iter().cloned();
    let terms = started.objective.iter().flat_map(|o| &o.terms);
    pb::LensHeader {
        model: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        generation: started.handle().generation(),
        provider: info.provider.clone(),
        tokens: tokens.map(to_proto::token).collect(),
        states: started.states.clone(),
        positions: started.positions.clone(),
        length: u32::try_from(started.length).unwrap_or(u32::MAX),
        terms: terms.map(term).collect(),
        tuned: started.tuned.clone().unwrap_or_default(),
        rows: started.rows as u64,
    }
}

fn progress(partial: &Partial, elapsed: Duration) -> pb::LensProgress {
    pb::LensProgress {
        rows_done: partial.rows_done,
        rows_planned: partial.rows_planned.max(partial.rows_done),
        elapsed_seconds: elapsed.as_secs_f64(),
    }
}

fn attribution(direct: &Direct) -> pb::DirectAttribution {
    pb::DirectAttribution {
        value: direct.value,
        bias: direct.bias,
        value_of_nothing: direct.of_nothing,
        affine: direct.is_affine() == Some(true),
        components: direct.components.clone(),
        layers: direct
            .heads
            .as_ref()
            .map_or(Vec::new(), |h| h.layers.clone()),
    }
}

fn labels(names: &[(u32, String)]) -> impl Iterator<Item = pb::LensLabels> + '_ {
    names.chunks(NAMES_AT_A_TIME).map(|names| pb::LensLabels {
        labels: names
            .iter()
            .map(|(index, label)| pb::LensLabel {
                index: *index,
                label: label.clone(),
            })
            .collect(),
    })
}

/// Extents of what was read.
#[derive(Clone, Copy)]
struct Extents {
    states: usize,
    positions: usize,
    length: usize,
}

/// All tensors of an answer.
fn tensors(found: &Lensed, extents: Extents) -> Result<Vec<Pieces>, EngineError> {
    let mut all = Vec::new();
    if let Some(at) = &found.at {
        let of = [("state", extents.states), ("pos", extents.positions)];
        all.extend(views(at, "", &of)?);
    }
    if let Some(whole) = &found.whole {
        all.extend(views(whole, "whole_", &[("state", extents.states)])?);
    }
    if let Some(direct) = &found.direct {
        all.extend(contributions(direct, extents)?);
    }
    if let Some(residual) = &found.residual {
        all.extend(stream(residual, extents)?);
    }
    Ok(all)
}

fn views(views: &Views, prefix: &str, of: &[(&str, usize)]) -> Result<Vec<Pieces>, EngineError> {
    let ranked = |last: &'static str, extent| [of, &[(last, extent)]].concat();
    let kept = ranked("rank", views.kept);
    let mut all = vec![
        piece(prefix, "top_index", &kept, integers(&views.top_index))?,
        piece(prefix, "top_logit", &kept, singles(&views.top_logit))?,
    ];
    if views.labels > 1 {
        let probabilities = singles(&views.top_probability);
        all.push(piece(prefix, "top_probability", &kept, probabilities)?);
        all.push(piece(prefix, "entropy", of, doubles(&views.entropy))?);
    }
    if !views.target.is_empty() {
        all.push(piece(prefix, "target", of, doubles(&views.target))?);
        if views.labels > 1 {
            let values = doubles(&views.log_probability);
            all.push(piece(prefix, "target_log_probability", of, values)?);
        }
        all.push(piece(prefix, "target_rank", of, integers(&views.rank))?);
    }
    if !views.logits.is_empty() {
        let of = ranked("label", views.labels);
        all.push(piece(prefix, "logits", &of, singles(&views.logits))?);
    }
    Ok(all)
}

fn contributions(direct: &Direct, extents: Extents) -> Result<Vec<Pieces>, EngineError> {
    let pos = ("pos", extents.length);
    let of = [("component", direct.components.len()), pos];
    let mut all = vec![piece(
        "",
        "contributions",
        &of,
        doubles(&direct.contributions),
    )?];
    if let Some(heads) = &direct.heads {
        let layers = ("layer", heads.layers.len());
        let of = [layers, ("head", heads.heads), pos];
        let values = doubles(&heads.contributions);
        all.push(piece("", "head_contributions", &of, values)?);
        let values = doubles(&heads.bias);
        all.push(piece("", "head_bias", &[layers, pos], values)?);
    }
    Ok(all)
}

fn stream(residual: &Residual, extents: Extents) -> Result<Vec<Pieces>, EngineError> {
    let (states, pos) = (("state", extents.states), ("pos", extents.length));
    let steps = ("state", extents.states.saturating_sub(1));
    let pairs = [states, states];
    Ok(vec![
        piece("", "residual_norm", &[states, pos], doubles(&residual.norm))?,
        piece(
            "",
            "residual_step_cosine",
            &[steps, pos],
            doubles(&residual.step),
        )?,
        piece("", "residual_cosine", &pairs, doubles(&residual.cosine))?,
    ])
}

/// Makes a tensor of extents.
type Make<'a> = Box<dyn FnOnce(Vec<usize>) -> Result<Tensor, EngineError> + 'a>;

fn doubles(values: &[f64]) -> Make<'_> {
    Box::new(|shape| floats(shape, values))
}

fn singles(values: &[f32]) -> Make<'_> {
    Box::new(|shape| Tensor::from_f32(shape, values).map_err(EngineError::internal))
}

fn integers(values: &[u32]) -> Make<'_> {
    Box::new(|shape| {
        let bytes: Bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor::new(DType::U32, shape, bytes).map_err(EngineError::internal)
    })
}

fn piece(
    prefix: &str,
    name: &str,
    of: &[(&str, usize)],
    make: Make<'_>,
) -> Result<Pieces, EngineError> {
    let axes = of.iter().map(|(axis, _)| (*axis).to_owned()).collect();
    let tensor = make(of.iter().map(|(_, extent)| *extent).collect())?;
    Ok(Pieces::new(format!("{prefix}{name}"), axes, tensor))
}
