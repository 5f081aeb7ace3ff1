//! Measures of heads: requests validated, answers streamed.

use std::time::Duration;

use tonic::{Request, Response, Status};

use crate::{
    engine::{Ctx, EngineError, Lane},
    methods::{
        heads::{
            self, Detector, Found, Heads, Measure, Named, Repeated, Similarity, Sought, Started,
            Terms,
        },
        input,
    },
    service::{
        call::Call,
        daemon::State,
        explained::Explained,
        from_proto::{named, or, required_input, tensor, unknown},
        messages::{Item, Pieces},
        status,
        teller::{self, Ended, Messaged, Teller},
        to_proto,
        wire::introspect::{
            self as pb, head_detector::Pattern as Given, heads_response::Item as Message,
        },
    },
};

/// Most inputs.
const MOST_INPUTS: usize = 4096;
/// Most measures: each may be named twice.
const MOST_MEASURES: usize = 16;
/// Most detectors.
const MOST_DETECTORS: usize = 64;
/// Most repeated sequences.
const MOST_SEQUENCES: usize = 64;
/// Most tokens that are repeated.
const MOST_REPEATED: usize = 4096;
/// Most tokens that a header tells of.
const MOST_TOLD: usize = 16_384;
/// Sequences when nobody says.
const DEFAULT_SEQUENCES: u32 = 4;
/// Heads of a ranking.
const RANKED: usize = 10;

type Result<T> = std::result::Result<T, EngineError>;

/// Answers a request.
pub(super) async fn answer(
    state: &State,
    request: Request<pb::HeadsRequest>,
) -> std::result::Result<Response<Messaged<pb::HeadsResponse>>, Status> {
    let call = Call::of(&request);
    let ctx = call.ctx();
    let begun = begin(state, request.into_inner(), &call, &ctx).await;
    let ((started, seed), explained) = begun.map_err(|e| status::status(&e))?;
    Ok(teller::answer(
        (call, explained),
        Message::Summary,
        |item| pb::HeadsResponse { item: Some(item) },
        move |teller| Box::pin(tell(started, seed, teller)),
    ))
}

/// Validates a request, with the seed of its repeated sequences. Errors of a known model are recorded as its.
async fn begin(
    state: &State,
    request: pb::HeadsRequest,
    call: &Call,
    ctx: &Ctx,
) -> Result<((Started, u64), Explained)> {
    let intervention = request.intervention.clone();
    let (model, wanted) = from_proto(request)?;
    let seed = wanted.repeated.seed;
    let handle = state.registry.get(&model)?;
    let explained = Explained::new(&model, "heads", call.arrived);
    let terms = Terms {
        max_bytes: state.config.max_capture,
        lane: Lane::Interactive,
    };
    let started = async {
        let wanted = Heads {
            editor: state.editor(&handle, intervention).await?,
            ..wanted
        };
        let started = heads::start(&handle, wanted, terms, ctx).await?;
        Ok((started, seed))
    };
    explained.begun(started.await)
}

fn header(started: &Started, seed: u64) -> pb::HeadsHeader {
    let info = started.handle().info();
    let few = started.inputs.iter().map(Vec::len).sum::<usize>() <= MOST_TOLD;
    let input = |tokens: &Vec<input::Token>| pb::HeadsInput {
        length: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
        tokens: match few {
            true => tokens.iter().cloned().map(to_proto::token).collect(),
            false => Vec::new(),
        },
    };
    let sequence = |ids: &Vec<u32>| pb::TokenIds {
        ids: ids.clone(),
        type_ids: Vec::new(),
    };
    pb::HeadsHeader {
        model: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        generation: started.handle().generation(),
        provider: info.provider.clone(),
        layers: started.layers.clone(),
        heads: u32::try_from(started.heads).unwrap_or(u32::MAX),
        tensors: started.names.clone(),
        inputs: started.inputs.iter().map(input).collect(),
        sequences: started.sequences.iter().map(sequence).collect(),
        seed,
        repeated_length: started
            .repeated_length
            .map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX)),
    }
}

/// The model that is asked, and what is wanted of its heads.
fn from_proto(request: pb::HeadsRequest) -> Result<(String, Heads)> {
    let model = named(request.model)?;
    few("inputs", request.inputs.len(), MOST_INPUTS)?;
    few("measures", request.measures.len(), MOST_MEASURES)?;
    few("detect", request.detect.len(), MOST_DETECTORS)?;
    let inputs = request.inputs.into_iter().enumerate();
    let inputs = inputs.map(|(at, given)| {
        required_input(Some(given)).map_err(|e| input::at_field(e, &format!("inputs[{at}]")))
    });
    let measures = request.measures.iter().enumerate();
    let mut chosen: Vec<Measure> = Vec::new();
    for (at, value) in measures {
        let measure = measure_of(*value, &format!("measures[{at}]"))?;
        if !chosen.contains(&measure) {
            chosen.push(measure);
        }
    }
    let detect = request.detect.into_iter().enumerate();
    let detect =
        detect.map(|(at, given)| detector(given).map_err(|e| e.beneath(&format!("detect[{at}]"))));
    let heads = Heads {
        inputs: inputs.collect::<Result<_>>()?,
        layers: request.layers,
        measures: chosen,
        detect: detect.collect::<Result<_>>()?,
        repeated: repeated(request.repeated.unwrap_or_default())
            .map_err(|e| e.beneath("repeated"))?,
        offsets: request.offsets,
        similarity: request.similarity,
        editor: None,
    };
    Ok((model, heads))
}

fn few(field: &str, there: usize, most: usize) -> Result<()> {
    if there > most {
        return Err(EngineError::invalid(
            field,
            format!("has {there} entries: give at most {most}"),
        ));
    }
    Ok(())
}

fn measure_of(value: i32, field: &str) -> Result<Measure> {
    let known = pb::HeadMeasure::try_from(value).map_err(|_| unknown(field, value))?;
    Ok(match known {
        pb::HeadMeasure::Unspecified => {
            return Err(EngineError::invalid(field, "is not said: name a measure"));
        }
        pb::HeadMeasure::Entropy => Measure::Entropy,
        pb::HeadMeasure::Distance => Measure::Distance,
        pb::HeadMeasure::Self_ => Measure::Current,
        pb::HeadMeasure::PreviousToken => Measure::PreviousToken,
        pb::HeadMeasure::FirstToken => Measure::FirstToken,
        pb::HeadMeasure::SpecialTokens => Measure::SpecialTokens,
        pb::HeadMeasure::DuplicateToken => Measure::DuplicateToken,
        pb::HeadMeasure::Induction => Measure::Induction,
    })
}

fn detector(given: pb::HeadDetector) -> Result<Detector> {
    let similarity = pb::HeadSimilarity::try_from(given.similarity)
        .map_err(|_| unknown("similarity", given.similarity))?;
    let pattern = match given.pattern {
        None => {
            return Err(EngineError::invalid(
                "pattern",
                "is missing: name one, or give one",
            ));
        }
        Some(Given::Named(value)) => {
            let known = pb::HeadPattern::try_from(value).map_err(|_| unknown("named", value))?;
            match known {
                pb::HeadPattern::Unspecified => {
                    return Err(EngineError::invalid("named", "is not said: name a pattern"));
                }
                pb::HeadPattern::PreviousTokenHead => Sought::PreviousToken,
                pb::HeadPattern::DuplicateTokenHead => Sought::DuplicateToken,
                pb::HeadPattern::InductionHead => Sought::Induction,
            }
        }
        Some(Given::Given(values)) => Sought::Given(tensor(values, "given")?.tensor),
    };
    Ok(Detector {
        pattern,
        similarity: match similarity {
            pb::HeadSimilarity::Unspecified => Similarity::Mul,
            pb::HeadSimilarity::Abs => Similarity::Abs,
        },
        exclude_bos: given.exclude_bos,
        exclude_current_token: given.exclude_current_token,
    })
}

fn repeated(given: pb::RepeatedSequences) -> Result<Repeated> {
    few("given", given.given.len(), MOST_SEQUENCES)?;
    if given.count as usize > MOST_SEQUENCES {
        return Err(EngineError::invalid(
            "count",
            format!("is {}: at most {MOST_SEQUENCES}", given.count),
        ));
    }
    let longest = given.given.iter().map(|t| t.ids.len()).enumerate();
    if let Some((at, n)) = longest.into_iter().find(|(_, n)| *n > MOST_REPEATED) {
        return Err(EngineError::invalid(
            format!("given[{at}].ids"),
            format!("has {n} entries: give at most {MOST_REPEATED}"),
        ));
    }
    if given.length as usize > MOST_REPEATED {
        return Err(EngineError::invalid(
            "length",
            format!("is {}: at most {MOST_REPEATED}", given.length),
        ));
    }
    if let Some(at) = given.given.iter().position(|t| !t.type_ids.is_empty()) {
        return Err(EngineError::invalid(
            format!("given[{at}].type_ids"),
            "are not taken: all segments of a repeated sequence are 0",
        ));
    }
    Ok(Repeated {
        length: (given.length > 0).then_some(given.length as usize),
        count: or(given.count, DEFAULT_SEQUENCES) as usize,
        seed: given.seed,
        special_tokens: given.special_tokens,
        given: given.given.into_iter().map(|t| t.ids).collect(),
    })
}

impl Item for Message {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Message::Tensor(t) => vec![&t.data],
            Message::Header(_)
            | Message::Progress(_)
            | Message::Ranking(_)
            | Message::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Header(_)
            | Message::Progress(_)
            | Message::Ranking(_)
            | Message::Tensor(_) => None,
        }
    }
}

/// Sends a header, progress, the tensors.
async fn tell(started: Started, seed: u64, teller: &mut Teller<Message>) -> Result<Ended> {
    teller.send(Message::Header(header(&started, seed))).await?;
    let (watch, truncated_tokens) = (started.watch(), started.truncated);
    let layers = started.layers.clone();
    let ctx = teller.call.ctx();
    let progress = |elapsed: Duration| {
        let progress = *watch.borrow();
        Message::Progress(pb::HeadsProgress {
            rows_done: progress.done,
            rows_planned: progress.planned,
            elapsed_seconds: elapsed.as_secs_f64(),
        })
    };
    let found = teller.working(started.run(&ctx), progress).await?;
    teller.send_all(told(&found, &layers)?).await?;
    Ok(Ended {
        timings: found.timings,
        rows: found.rows,
        truncated_tokens,
        notes: found.notes,
        ..Ended::default()
    })
}

/// The tensors, each of `[layer, head]` behind its ranking.
fn told(found: &Found, layers: &[u32]) -> Result<Vec<Message>> {
    let mut messages = Vec::new();
    for named in &found.tensors {
        if named.axes == ["layer", "head"] {
            messages.push(Message::Ranking(ranking(named, layers)?));
        }
        let axes = named.axes.iter().map(|a| (*a).to_owned()).collect();
        let pieces = Pieces::new(named.name.clone(), axes, named.tensor.clone());
        messages.extend(pieces.map(Message::Tensor));
    }
    Ok(messages)
}

fn ranking(named: &Named, layers: &[u32]) -> Result<pb::HeadRanking> {
    let values = named.tensor.to_f32().map_err(EngineError::internal)?;
    let heads = named.tensor.shape().last().copied().unwrap_or(1).max(1);
    let all = values.iter().enumerate().filter(|(_, v)| !v.is_nan());
    let mut all: Vec<(usize, f32)> = all.map(|(at, v)| (at, *v)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let ranked = all.into_iter().take(RANKED).filter_map(|(at, score)| {
        Some(pb::RankedHead {
            layer: *layers.get(at / heads)?,
            head: u32::try_from(at % heads).ok()?,
            score,
        })
    });
    Ok(pb::HeadRanking {
        name: named.name.clone(),
        heads: ranked.collect(),
    })
}
