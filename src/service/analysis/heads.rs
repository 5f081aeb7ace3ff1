//! Measures of heads: requests validated, answers streamed.

use std::time::Duration;

use futures::StreamExt as _;
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Messaged, WAITING};
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
        driven::driven,
        explained::Explained,
        from_proto::{named, or, required_input, tensor, unknown},
        messages::{Ledger, Pieces},
        status, to_proto,
        wire::introspect::{
            self as pb, head_detector::Pattern as Given, heads_response::Item as Message,
        },
    },
};

/// How often progress is told: at least twice a second.
const TICK: Duration = Duration::from_millis(400);
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

/// Measurements that have begun, and the record of their time.
struct Begun {
    started: Started,
    header: pb::HeadsHeader,
    explained: Explained,
}

/// Answers a request.
pub(super) async fn answer(
    state: &State,
    request: Request<pb::HeadsRequest>,
) -> std::result::Result<Response<Messaged<pb::HeadsResponse>>, Status> {
    let call = Call::of(&request);
    let ctx = call.ctx();
    let begun = begin(state, request.into_inner(), &call, &ctx).await;
    let begun = begun.map_err(|e| status::status(&e))?;
    let (sender, messages) = mpsc::channel(WAITING);
    // Dropped with the stream: what it waits for is cancelled.
    let work = measure(begun, (call, ctx), sender);
    let messages =
        ReceiverStream::new(messages).map(|m| m.map(|item| pb::HeadsResponse { item: Some(item) }));
    Ok(Response::new(Box::pin(driven(work, messages))))
}

async fn begin(state: &State, request: pb::HeadsRequest, call: &Call, ctx: &Ctx) -> Result<Begun> {
    let (model, wanted) = from_proto(request)?;
    let seed = wanted.repeated.seed;
    let handle = state.registry.get(&model)?;
    let explained = Explained::new(&model, "heads", call.arrived);
    let terms = Terms {
        max_bytes: state.config.max_capture,
        lane: Lane::Interactive,
    };
    match heads::start(&handle, wanted, terms, ctx).await {
        Ok(started) => Ok(Begun {
            header: header(&started, seed),
            started,
            explained,
        }),
        Err(error) => {
            explained.failed(&error);
            Err(error)
        }
    }
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

/// Sends a header, progress, the tensors, a summary.
async fn measure(
    begun: Begun,
    (call, ctx): (Call, Ctx),
    sender: mpsc::Sender<std::result::Result<Message, Status>>,
) {
    let Begun {
        started,
        header,
        explained,
    } = begun;
    let mut ledger = Ledger::default();
    ledger.sent(&[]);
    if sender.send(Ok(Message::Header(header))).await.is_err() {
        return;
    }
    let (watch, truncated) = (started.watch(), started.truncated);
    let layers = started.layers.clone();
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut run = std::pin::pin!(started.run(&ctx));
    let found = loop {
        tokio::select! {
            found = &mut run => break found,
            _ = tick.tick() => {
                let progress = *watch.borrow();
                let progress = pb::HeadsProgress {
                    rows_done: progress.done,
                    rows_planned: progress.planned,
                    elapsed_seconds: call.arrived.elapsed().as_secs_f64(),
                };
                // A reader that is behind gets the next one.
                if let Ok(room) = sender.try_reserve() {
                    ledger.sent(&[]);
                    room.send(Ok(Message::Progress(progress)));
                }
            }
        }
    };
    let told = found.and_then(|found| Ok((told(&found, &layers)?, found)));
    match told {
        Ok((messages, found)) => {
            for message in messages {
                match &message {
                    Message::Tensor(t) => ledger.sent(&[&t.data]),
                    Message::Header(_)
                    | Message::Progress(_)
                    | Message::Ranking(_)
                    | Message::Summary(_) => ledger.sent(&[]),
                }
                if sender.send(Ok(message)).await.is_err() {
                    return;
                }
            }
            explained.answered(&found.timings);
            let summary = pb::Summary {
                messages: ledger.messages,
                bytes: ledger.bytes,
                crc32c: ledger.crc32c,
                timings: Some(to_proto::timings(&found.timings, call.arrived.elapsed())),
                rows: found.rows,
                truncated_tokens: truncated,
                non_finite: Vec::new(),
                notes: found.notes,
            };
            // A reader that left needs none.
            let _ = sender.send(Ok(Message::Summary(summary))).await;
        }
        Err(error) => {
            explained.failed(&error);
            let _ = sender.send(Err(status::status(&error))).await;
        }
    }
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
