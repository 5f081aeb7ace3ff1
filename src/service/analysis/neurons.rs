//! Searches among neurons over one stream: a header, texts, and what was found.

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use futures::StreamExt as _;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    engine::EngineError,
    methods::{
        input::Token,
        neurons::{Example, Name, Neurons, Ranked, Ranking, Search, Set, Text, Told},
    },
    service::{
        attribution::to_proto::floats,
        bulk::AHEAD,
        call::Call,
        daemon::State,
        explained::Explained,
        from_proto::{id, named, or, required_input, unknown},
        messages::{Item, Pieces},
        status,
        teller::{self, Ended, Messaged, Teller},
        to_proto,
        wire::introspect::{
            self as pb, neurons_request::Item as Asked, neurons_response::Item as Message,
        },
    },
    tensor::Tensor,
};

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

/// A search whose header was understood.
struct Begun {
    neurons: Arc<Neurons>,
    statistics: bool,
}

/// Answers a stream.
pub(super) async fn answer(
    state: &State,
    request: Request<Streaming<pb::NeuronsRequest>>,
) -> std::result::Result<Response<Messaged<pb::NeuronsResponse>>, Status> {
    let call = Call::of(&request);
    let mut requests = request.into_inner();
    let first = requests.message().await?;
    let begun = begin(state, first, &call).await;
    let (begun, explained) = begun.map_err(|e| status::status(&e))?;
    Ok(teller::answer(
        (call, explained),
        Message::Summary,
        |item| pb::NeuronsResponse { item: Some(item) },
        |teller| Box::pin(tell(begun, requests, teller)),
    ))
}

async fn begin(
    state: &State,
    first: Option<pb::NeuronsRequest>,
    call: &Call,
) -> Result<(Begun, Explained)> {
    let Some(Asked::Header(header)) = first.and_then(|r| r.item) else {
        return Err(EngineError::invalid(
            "header",
            "is missing: the first message says what to look for",
        ));
    };
    let model = named(header.model.clone()).map_err(|e| e.beneath("header"))?;
    let statistics = header.statistics;
    let intervention = header.intervention.clone();
    let search = search(header).map_err(|e| e.beneath("header"))?;
    let handle = state.registry.get(&model)?;
    let explained = Explained::new(&model, "neurons", call.arrived);
    let begun = async {
        let search = Search {
            editor: state.editor(&handle, intervention).await?,
            ..search
        };
        let neurons = Neurons::begin(handle, search, state.config.max_capture)?;
        Ok(Begun {
            neurons: Arc::new(neurons),
            statistics,
        })
    };
    let begun = begun.await;
    explained.begun(begun.map_err(|e: EngineError| e.beneath("header")))
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
        editor: None,
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

impl Item for Message {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Message::Tensor(t) => vec![&t.data],
            Message::Activations(a) => a.activations.iter().map(|t| &t.data[..]).collect(),
            Message::Neuron(n) => {
                let examples = n.examples.iter().filter_map(|e| e.activations.as_ref());
                examples.map(|t| &t.data[..]).collect()
            }
            Message::Header(_)
            | Message::Progress(_)
            | Message::Failure(_)
            | Message::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Header(_)
            | Message::Progress(_)
            | Message::Activations(_)
            | Message::Failure(_)
            | Message::Neuron(_)
            | Message::Tensor(_) => None,
        }
    }
}

/// How far a search is.
#[derive(Default)]
struct Far {
    progress: pb::NeuronsProgress,
    ended: Ended,
    failure: Option<EngineError>,
}

/// Sends a header, what is told of each text, what was found in all.
async fn tell(
    begun: Begun,
    requests: Streaming<pb::NeuronsRequest>,
    teller: &mut Teller<Message>,
) -> Result<Ended> {
    let Begun {
        neurons,
        statistics,
    } = begun;
    let mut far = Far::default();
    teller.send(Message::Header(header(&neurons))).await?;
    texts(&neurons, requests, (&mut far, teller)).await?;
    found(&neurons, statistics, teller).await?;
    if far.progress.failed > 0 {
        let note = format!("{} texts failed", far.progress.failed);
        far.ended.notes.push(note);
    }
    Ok(far.ended)
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
    (far, teller): (&mut Far, &mut Teller<Message>),
) -> Result<()> {
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
        let progress = |elapsed: Duration| {
            Message::Progress(pb::NeuronsProgress {
                elapsed_seconds: elapsed.as_secs_f64(),
                ..far.progress
            })
        };
        let Some(next) = teller.working(told.next(), progress).await else {
            break;
        };
        let (name, number, told) = next?;
        match told {
            Ok(told) => one(name, number, told, (far, teller)).await?,
            Err(error @ (EngineError::DeadlineExceeded | EngineError::Cancelled)) => {
                return Err(error);
            }
            Err(error) => {
                far.progress.failed += 1;
                let failure = Some(status::failure(&error));
                far.failure.get_or_insert(error);
                let message = pb::NeuronsFailure {
                    id: name,
                    text: number,
                    failure,
                };
                teller.send(Message::Failure(message)).await?;
            }
        }
    }
    if far.progress.texts > 0 {
        return Ok(());
    }
    // Nothing can be said of nothing: why the first one failed is why the search does.
    Err(match far.failure.take() {
        Some(EngineError::InvalidArgument { field, message })
            if field.starts_with("intervention") =>
        {
            EngineError::invalid(format!("header.{field}"), message)
        }
        Some(error) => error.beneath("texts[0]"),
        None => EngineError::invalid("text", "there are no texts: send at least one"),
    })
}

/// What is told of one text.
async fn one(
    name: String,
    number: u64,
    told: Told,
    (far, teller): (&mut Far, &mut Teller<Message>),
) -> Result<()> {
    far.progress.texts += 1;
    far.progress.tokens += told.positions as u64;
    let ended = &mut far.ended;
    ended.rows += told.rows;
    ended.timings += told.timings;
    ended.truncated_tokens = ended.truncated_tokens.saturating_add(told.truncated);
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
async fn found(neurons: &Neurons, statistics: bool, teller: &mut Teller<Message>) -> Result<()> {
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
