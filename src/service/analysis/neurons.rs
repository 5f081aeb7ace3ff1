//! Searches among neurons over one stream: a header, texts, and what was found.

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Messaged, WAITING};
use crate::{
    engine::{EngineError, StageTimings},
    methods::{
        input::Token,
        neurons::{Example, Name, Neurons, Ranked, Ranking, Search, Set, Text, Told},
    },
    service::{
        attribution::to_proto::floats,
        bulk::AHEAD,
        call::Call,
        daemon::State,
        driven::driven,
        explained::Explained,
        from_proto::{id, named, or, required_input, unknown},
        messages::{Ledger, Pieces},
        status, to_proto,
        wire::introspect::{
            self as pb, neurons_request::Item as Asked, neurons_response::Item as Message,
        },
    },
    tensor::Tensor,
};

/// How often progress is told: at least twice a second.
const TICK: Duration = Duration::from_millis(400);
/// Neurons when nobody says.
const DEFAULT_NEURONS: u32 = 20;
/// Most neurons that are told.
const MOST_NEURONS: usize = 1024;
/// Most examples of each.
const MOST_EXAMPLES: u32 = 100;
/// Tokens beside an example's when nobody says.
const DEFAULT_CONTEXT: u32 = 8;
/// Most tokens beside an example's.
const MOST_CONTEXT: u32 = 64;

type Result<T> = std::result::Result<T, EngineError>;
type Sender = mpsc::Sender<std::result::Result<Message, Status>>;

/// A search whose header was understood.
struct Begun {
    neurons: Arc<Neurons>,
    statistics: bool,
    explained: Explained,
}

/// Answers a stream.
pub(super) async fn answer(
    state: &State,
    request: Request<Streaming<pb::NeuronsRequest>>,
) -> std::result::Result<Response<Messaged<pb::NeuronsResponse>>, Status> {
    let call = Call::of(&request);
    let mut requests = request.into_inner();
    let first = requests.message().await?;
    let begun = begin(state, first, &call).map_err(|e| status::status(&e))?;
    let (sender, messages) = mpsc::channel(WAITING);
    // Dropped with the stream: what it waits for is cancelled.
    let work = run(begun, requests, call, sender);
    let messages = ReceiverStream::new(messages)
        .map(|m| m.map(|item| pb::NeuronsResponse { item: Some(item) }));
    Ok(Response::new(Box::pin(driven(work, messages))))
}

fn begin(state: &State, first: Option<pb::NeuronsRequest>, call: &Call) -> Result<Begun> {
    let Some(Asked::Header(header)) = first.and_then(|r| r.item) else {
        return Err(EngineError::invalid(
            "header",
            "is missing: the first message says what to look for",
        ));
    };
    let model = named(header.model.clone()).map_err(|e| e.beneath("header"))?;
    let statistics = header.statistics;
    let search = search(header).map_err(|e| e.beneath("header"))?;
    let handle = state.registry.get(&model)?;
    let explained = Explained::new(&model, "neurons", call.arrived);
    match Neurons::begin(handle, search, state.config.max_capture) {
        Ok(neurons) => Ok(Begun {
            neurons: Arc::new(neurons),
            statistics,
            explained,
        }),
        Err(error) => {
            let error = error.beneath("header");
            explained.failed(&error);
            Err(error)
        }
    }
}

/// Paths of fields begin at the header.
fn search(header: pb::NeuronsHeader) -> Result<Search> {
    let most = |field: &str, given: u32, most: u32| {
        if given > most {
            return Err(EngineError::invalid(
                field,
                format!("is {given}: at most {most}"),
            ));
        }
        Ok(given)
    };
    let by = pb::NeuronRanking::try_from(header.by).map_err(|_| unknown("by", header.by))?;
    if header.neurons.len() > MOST_NEURONS {
        return Err(EngineError::invalid(
            "neurons",
            format!(
                "has {} entries: give at most {MOST_NEURONS}",
                header.neurons.len()
            ),
        ));
    }
    let name = |n: pb::Neuron| Name {
        hook: (!n.hook.is_empty()).then_some(n.hook),
        layer: n.layer,
        index: n.index,
    };
    let all = u32::try_from(MOST_NEURONS).unwrap_or(u32::MAX);
    Ok(Search {
        by: match by {
            pb::NeuronRanking::Unspecified => Ranking::Mean,
            pb::NeuronRanking::Max => Ranking::Max,
            pb::NeuronRanking::Contrast => Ranking::Contrast,
        },
        top_k: or(most("top_k", header.top_k, all)?, DEFAULT_NEURONS) as usize,
        examples: most("examples", header.examples, MOST_EXAMPLES)? as usize,
        context: or(
            most("context", header.context, MOST_CONTEXT)?,
            DEFAULT_CONTEXT,
        ) as usize,
        hook: header.hook,
        layers: header.layers,
        per_layer: header.per_layer,
        by_magnitude: header.by_magnitude,
        neurons: header.neurons.into_iter().map(name).collect(),
        activations: header.activations,
    })
}

/// Paths of fields begin at the text.
fn text(given: pb::NeuronsText, number: u64) -> Result<Text> {
    let set = pb::NeuronSet::try_from(given.set).map_err(|_| unknown("set", given.set))?;
    Ok(Text {
        id: Arc::from(id(given.id)?),
        number,
        input: required_input(given.input)?,
        set: match set {
            pb::NeuronSet::Unspecified => Set::A,
            pb::NeuronSet::B => Set::B,
        },
    })
}

struct Teller {
    sender: Sender,
    ledger: Ledger,
    call: Call,
    progress: pb::NeuronsProgress,
    timings: StageTimings,
    rows: u64,
    truncated: u32,
    failure: Option<EngineError>,
}

impl Teller {
    /// Says that the reader left when it did.
    async fn send(&mut self, message: Message) -> Result<()> {
        let payload = match &message {
            Message::Tensor(t) => vec![&t.data],
            Message::Activations(a) => a.activations.iter().map(|t| &t.data).collect(),
            Message::Neuron(n) => {
                let examples = n.examples.iter().filter_map(|e| e.activations.as_ref());
                examples.map(|t| &t.data).collect()
            }
            Message::Header(_)
            | Message::Progress(_)
            | Message::Failure(_)
            | Message::Summary(_) => Vec::new(),
        };
        let payload: Vec<&[u8]> = payload.into_iter().map(|d| &d[..]).collect();
        self.ledger.sent(&payload);
        let sent = self.sender.send(Ok(message)).await;
        sent.map_err(|_| EngineError::Cancelled)
    }

    /// A reader that is behind gets the next one.
    fn progress(&mut self) {
        self.progress.elapsed_seconds = self.call.arrived.elapsed().as_secs_f64();
        if let Ok(room) = self.sender.try_reserve() {
            self.ledger.sent(&[]);
            room.send(Ok(Message::Progress(self.progress)));
        }
    }

    fn summary(&self) -> pb::Summary {
        let mut notes = Vec::new();
        if self.progress.failed > 0 {
            notes.push(format!("{} texts failed", self.progress.failed));
        }
        pb::Summary {
            messages: self.ledger.messages,
            bytes: self.ledger.bytes,
            crc32c: self.ledger.crc32c,
            timings: Some(to_proto::timings(
                &self.timings,
                self.call.arrived.elapsed(),
            )),
            rows: self.rows,
            truncated_tokens: self.truncated,
            non_finite: Vec::new(),
            notes,
        }
    }
}

/// Sends all messages of a search.
async fn run(begun: Begun, requests: Streaming<pb::NeuronsRequest>, call: Call, sender: Sender) {
    let Begun {
        neurons,
        statistics,
        explained,
    } = begun;
    let mut teller = Teller {
        sender,
        ledger: Ledger::default(),
        call,
        progress: pb::NeuronsProgress::default(),
        timings: StageTimings::default(),
        rows: 0,
        truncated: 0,
        failure: None,
    };
    let done = async {
        teller.send(Message::Header(header(&neurons))).await?;
        texts(&neurons, requests, &mut teller).await?;
        found(&neurons, statistics, &mut teller).await
    };
    match done.await {
        Ok(()) => {
            explained.answered(&teller.timings);
            let summary = teller.summary();
            // A reader that left needs none.
            let _ = teller.sender.send(Ok(Message::Summary(summary))).await;
        }
        Err(error) => {
            explained.failed(&error);
            let _ = teller.sender.send(Err(status::status(&error))).await;
        }
    }
}

fn header(neurons: &Neurons) -> pb::NeuronsStarted {
    let info = neurons.handle().info();
    let width = |width: usize| u32::try_from(width).unwrap_or(u32::MAX);
    pb::NeuronsStarted {
        model: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        generation: neurons.handle().generation(),
        provider: info.provider.clone(),
        hooks: neurons.layers.iter().map(|l| l.hook.clone()).collect(),
        widths: neurons.layers.iter().map(|l| width(l.width)).collect(),
    }
}

/// Runs texts as they come.
async fn texts(
    neurons: &Arc<Neurons>,
    requests: Streaming<pb::NeuronsRequest>,
    teller: &mut Teller,
) -> Result<()> {
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let call = teller.call.clone();
    let told = requests
        .zip(futures::stream::iter(0u64..))
        .map(|(request, number)| {
            let (neurons, ctx) = (neurons.clone(), call.ctx());
            async move {
                // A stream that breaks is a caller that left.
                let request = request.map_err(|_| EngineError::Cancelled)?;
                let Some(Asked::Text(given)) = request.item else {
                    return Err(EngineError::invalid(
                        format!("texts[{number}]"),
                        "is no text: after the header come texts only",
                    ));
                };
                // What is repeated to the caller is bounded, whatever came.
                let name = id(given.id.clone()).unwrap_or_default();
                let told = async { neurons.text(text(given, number)?, &ctx).await };
                Ok((name, number, told.await))
            }
        })
        .buffered(AHEAD);
    let mut told = pin!(told);
    loop {
        tokio::select! {
            next = told.next() => {
                let Some(next) = next else {
                    break;
                };
                let (name, number, told) = next?;
                match told {
                    Ok(told) => one(name, number, told, teller).await?,
                    Err(error @ (EngineError::DeadlineExceeded | EngineError::Cancelled)) => return Err(error),
                    Err(error) => {
                        teller.progress.failed += 1;
                        let failure = Some(status::failure(&error));
                        teller.failure.get_or_insert(error);
                        let message = pb::NeuronsFailure { id: name, text: number, failure };
                        teller.send(Message::Failure(message)).await?;
                    }
                }
            }
            _ = tick.tick() => teller.progress(),
        }
    }
    if teller.progress.texts > 0 {
        return Ok(());
    }
    // Nothing can be said of nothing: why the first one failed is why the search does.
    Err(match teller.failure.take() {
        Some(error) => error.beneath("texts[0]"),
        None => EngineError::invalid("text", "there are no texts: send at least one"),
    })
}

/// What is told of one text.
async fn one(name: String, number: u64, told: Told, teller: &mut Teller) -> Result<()> {
    teller.progress.texts += 1;
    teller.progress.tokens += told.positions as u64;
    teller.rows += told.rows;
    teller.timings += told.timings;
    teller.truncated = teller.truncated.saturating_add(told.truncated);
    let Some(tensor) = told.activations else {
        return Ok(());
    };
    let axes = vec!["neuron".to_owned(), "pos".to_owned()];
    let mut tokens = told.tokens;
    for piece in Pieces::new("activations".to_owned(), axes, tensor) {
        let message = pb::NeuronsActivations {
            id: name.clone(),
            text: number,
            tokens: std::mem::take(&mut tokens)
                .into_iter()
                .map(to_proto::token)
                .collect(),
            activations: Some(piece),
        };
        teller.send(Message::Activations(message)).await?;
    }
    Ok(())
}

/// What was found in all of them.
async fn found(neurons: &Neurons, statistics: bool, teller: &mut Teller) -> Result<()> {
    let ranked = neurons.ranked().map_err(|e| e.beneath("header"))?;
    let spelled = neurons.spelled(&ranked, &teller.call.ctx()).await?;
    for ranked in ranked {
        let message = neuron(neurons, ranked, &spelled)?;
        teller.send(Message::Neuron(message)).await?;
    }
    if !statistics {
        return Ok(());
    }
    for (at, layer) in neurons.layers.iter().enumerate() {
        let all = neurons.statistics(at);
        let max: Vec<f64> = all.max.iter().map(|m| f64::from(*m)).collect();
        let mut numbers = vec![("mean", all.mean), ("max", max)];
        numbers.extend(all.contrast.map(|c| ("contrast", c)));
        let info = neurons.handle().info();
        let axis = info.hook(&layer.hook).and_then(|h| h.axes.last().cloned());
        let axis = to_proto::axes(axis.as_slice());
        for (what, values) in numbers {
            let tensor = floats(vec![values.len()], &values)?;
            let name = format!("{what}:{}", layer.hook);
            for piece in Pieces::new(name, axis.clone(), tensor) {
                teller.send(Message::Tensor(piece)).await?;
            }
        }
    }
    Ok(())
}

fn neuron(
    neurons: &Neurons,
    ranked: Ranked,
    spelled: &BTreeMap<u32, Token>,
) -> Result<pb::RankedNeuron> {
    let layer = &neurons.layers[ranked.layer];
    let examples = ranked.examples.iter().map(|e| example(e, spelled));
    Ok(pb::RankedNeuron {
        hook: layer.hook.clone(),
        layer: layer.layer.and_then(|l| u32::try_from(l).ok()),
        index: u32::try_from(ranked.index).unwrap_or(u32::MAX),
        mean: ranked.mean,
        max: ranked.max,
        contrast: ranked.contrast,
        examples: examples.collect::<Result<_>>()?,
    })
}

fn example(example: &Example, spelled: &BTreeMap<u32, Token>) -> Result<pb::NeuronExample> {
    let token = |id: &u32| {
        let token = spelled.get(id).cloned().unwrap_or_default();
        to_proto::token(Token { id: *id, ..token })
    };
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let activations = Tensor::from_f32(vec![example.activations.len()], &example.activations);
    let activations = activations.map_err(EngineError::internal)?;
    let axes = vec!["pos".to_owned()];
    Ok(pb::NeuronExample {
        id: example.id.to_string(),
        text: example.number,
        position: number(example.position),
        activation: example.activation,
        tokens: example.ids.iter().map(token).collect(),
        first: number(example.first),
        activations: Pieces::new("activations".to_owned(), axes, activations).next(),
    })
}
