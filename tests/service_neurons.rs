//! Searches among neurons over real gRPC with real workers: numbers by their definitions from captured activations, examples, every error.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;

use std::collections::BTreeMap;

use daemon::{TestDaemon, hooks, ids};
use introspectd::service::wire::introspect::{
    self as pb, NeuronRanking as By, analysis_service_client::AnalysisServiceClient,
    edit::Operation, neurons_request::Item as Asked, neurons_response::Item as Message,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// The four development architectures.
const MODELS: [&str; 4] = [
    "bert.legacy14",
    "distilbert.legacy14",
    "gpt2.legacy14",
    "llama.legacy14",
];
/// A small corpus; the last two are of set B.
const CORPUS: [&[u32]; 5] = [
    &[2, 9, 17, 30, 11, 3],
    &[2, 21, 8, 3],
    &[2, 9, 17, 30, 11, 3],
    &[2, 30, 30, 14, 25, 12, 3],
    &[2, 8, 3],
];
const FIRST_OF_B: usize = 3;
/// Same operators, other batch or place in the graph.
const CLOSE: f64 = 1e-5;

#[derive(Debug, Default)]
struct Answer {
    header: pb::NeuronsStarted,
    neurons: Vec<pb::RankedNeuron>,
    activations: Vec<pb::NeuronsActivations>,
    failures: Vec<pb::NeuronsFailure>,
    statistics: BTreeMap<String, Vec<f64>>,
    progress: usize,
    summary: pb::Summary,
}

fn floats(t: &pb::Tensor) -> Vec<f64> {
    let numbers = t.data.as_chunks::<4>().0.iter();
    numbers.map(|b| f64::from(f32::from_le_bytes(*b))).collect()
}

async fn send(d: &TestDaemon, messages: Vec<pb::NeuronsRequest>) -> Result<Answer, Status> {
    let mut client = AnalysisServiceClient::new(d.channel().await);
    let mut stream = client
        .neurons(futures::stream::iter(messages))
        .await?
        .into_inner();
    let mut answer = Answer::default();
    let (mut messages, mut crc, mut ended) = (0, 0, false);
    while let Some(message) = stream.message().await? {
        assert!(!ended, "the summary comes last");
        match message.item.unwrap() {
            Message::Header(header) => answer.header = header,
            Message::Progress(_) => answer.progress += 1,
            Message::Activations(a) => {
                crc = crc32c::crc32c_append(crc, &a.activations.as_ref().unwrap().data);
                answer.activations.push(a);
            }
            Message::Failure(f) => answer.failures.push(f),
            Message::Neuron(n) => {
                for example in &n.examples {
                    crc = crc32c::crc32c_append(crc, &example.activations.as_ref().unwrap().data);
                }
                answer.neurons.push(n);
            }
            Message::Tensor(t) => {
                crc = crc32c::crc32c_append(crc, &t.data);
                answer
                    .statistics
                    .entry(t.name.clone())
                    .or_default()
                    .extend(floats(&t));
            }
            Message::Summary(s) => {
                assert_eq!((s.messages, s.crc32c), (messages, crc));
                answer.summary = s;
                ended = true;
            }
        }
        messages += 1;
    }
    assert!(ended, "a stream ends with its summary");
    Ok(answer)
}

fn header(header: pb::NeuronsHeader) -> pb::NeuronsRequest {
    pb::NeuronsRequest {
        item: Some(Asked::Header(header)),
    }
}

fn text(at: usize, of: &[u32]) -> pb::NeuronsRequest {
    let set = if at >= FIRST_OF_B {
        pb::NeuronSet::B
    } else {
        pb::NeuronSet::Unspecified
    };
    pb::NeuronsRequest {
        item: Some(Asked::Text(pb::NeuronsText {
            id: format!("text {at}"),
            input: Some(pb::Input {
                kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
                    ids: of.to_vec(),
                    type_ids: Vec::new(),
                })),
            }),
            set: set.into(),
        })),
    }
}

async fn search(d: &TestDaemon, given: pb::NeuronsHeader) -> Result<Answer, Status> {
    let corpus = CORPUS.iter().enumerate();
    let texts = corpus.map(|(at, ids)| text(at, ids));
    send(d, std::iter::once(header(given)).chain(texts).collect()).await
}

fn of(model: &str) -> pb::NeuronsHeader {
    pb::NeuronsHeader {
        model: model.to_owned(),
        ..pb::NeuronsHeader::default()
    }
}

/// `[text][hook point][pos][neuron]`
async fn activations(d: &TestDaemon, model: &str, hook: &str) -> Vec<Vec<Vec<Vec<f64>>>> {
    let mut all = Vec::new();
    for text in CORPUS {
        let answer = d.capture(ids(model, text, hooks(&[hook]))).await.unwrap();
        let shown = answer.order.iter().filter(|n| n.starts_with("blocks."));
        let layer = |name: &String| -> Vec<Vec<f64>> {
            let values: Vec<f64> = answer.values(name).into_iter().map(f64::from).collect();
            let width = values.len() / text.len();
            values.chunks_exact(width).map(<[f64]>::to_vec).collect()
        };
        all.push(shown.map(layer).collect());
    }
    all
}

fn near(a: f64, b: f64, what: &str) {
    assert!((a - b).abs() <= CLOSE * b.abs().max(1.0), "{what}: {a} {b}");
}

/// Mean, maximum and contrast of a neuron.
fn numbers(all: &[Vec<Vec<Vec<f64>>>], layer: usize, neuron: usize) -> (f64, f64, f64) {
    let of = |texts: &[Vec<Vec<Vec<f64>>>]| -> Vec<f64> {
        let rows = texts.iter().flat_map(|text| &text[layer]);
        rows.map(|row| row[neuron]).collect()
    };
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (a, b) = (of(&all[..FIRST_OF_B]), of(&all[FIRST_OF_B..]));
    let both = [a.clone(), b.clone()].concat();
    let max = both.iter().fold(f64::NEG_INFINITY, |m, v| m.max(*v));
    (mean(&both), max, mean(&a) - mean(&b))
}

#[tokio::test(flavor = "multi_thread")]
async fn neurons_are_ranked_by_numbers_that_are_what_they_are_defined_as() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let all = activations(&d, model, "mlp.hook_post").await;
        let layers = all[0].len();
        let width = all[0][0][0].len();
        for by in [By::Unspecified, By::Max, By::Contrast] {
            for by_magnitude in [false, true] {
                let given = pb::NeuronsHeader {
                    by: by.into(),
                    by_magnitude,
                    top_k: 7,
                    statistics: true,
                    ..of(model)
                };
                let answer = search(&d, given).await.unwrap();
                assert_eq!(answer.header.hooks.len(), layers);
                assert_eq!(answer.header.widths, vec![width as u32; layers]);
                let key = |(mean, max, contrast): (f64, f64, f64)| {
                    let number = match by {
                        By::Unspecified => mean,
                        By::Max => max,
                        By::Contrast => contrast,
                    };
                    if by_magnitude { number.abs() } else { number }
                };
                let neurons = (0..layers).flat_map(|l| (0..width).map(move |n| (l, n)));
                let mut wanted: Vec<f64> = neurons.map(|(l, n)| key(numbers(&all, l, n))).collect();
                wanted.sort_by(|a, b| b.total_cmp(a));
                assert_eq!(answer.neurons.len(), 7);
                for (found, wanted) in answer.neurons.iter().zip(&wanted) {
                    let layer = found.layer.unwrap() as usize;
                    assert_eq!(found.hook, answer.header.hooks[layer]);
                    let real = numbers(&all, layer, found.index as usize);
                    near(found.mean, real.0, model);
                    near(f64::from(found.max), real.1, model);
                    near(found.contrast.unwrap(), real.2, model);
                    near(key(real), *wanted, model);
                }
                for (layer, hook) in answer.header.hooks.iter().enumerate() {
                    for neuron in 0..width {
                        let real = numbers(&all, layer, neuron);
                        let of = |what: &str| answer.statistics[&format!("{what}:{hook}")][neuron];
                        near(of("mean"), real.0, hook);
                        near(of("max"), real.1, hook);
                        near(of("contrast"), real.2, hook);
                    }
                }
            }
        }
        let each = pb::NeuronsHeader {
            per_layer: true,
            top_k: 2,
            layers: vec![1],
            hook: "resid_post".to_owned(),
            ..of(model)
        };
        let each = search(&d, each).await.unwrap();
        assert_eq!(each.neurons.len(), 2, "of one layer");
        assert!(each.neurons[0].mean >= each.neurons[1].mean);
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn examples_are_the_most_active_token_of_the_most_active_texts() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let all = activations(&d, model, "mlp.hook_post").await;
        let given = pb::NeuronsHeader {
            by: By::Max.into(),
            examples: 3,
            context: 1,
            top_k: 1024,
            ..of(model)
        };
        let answer = search(&d, given).await.unwrap();
        for found in &answer.neurons {
            let (layer, neuron) = (found.layer.unwrap() as usize, found.index as usize);
            let best = |text: &Vec<Vec<Vec<f64>>>| {
                let values = text[layer].iter().map(|row| row[neuron]).enumerate();
                values.fold(
                    (0, f64::NEG_INFINITY),
                    |b, (p, v)| if v > b.1 { (p, v) } else { b },
                )
            };
            let mut wanted: Vec<(usize, (usize, f64))> = all.iter().map(best).enumerate().collect();
            wanted.sort_by(|a, b| b.1.1.total_cmp(&a.1.1).then(a.0.cmp(&b.0)));
            assert_eq!(found.examples.len(), 3);
            assert_eq!(found.examples[0].activation, found.max);
            for (example, (_, (_, activation))) in found.examples.iter().zip(&wanted) {
                let at = example.text as usize;
                let place = example.position as usize;
                assert_eq!(example.id, format!("text {at}"));
                near(f64::from(example.activation), *activation, model);
                near(all[at][layer][place][neuron], *activation, model);
                let first = example.first as usize;
                assert_eq!(first, place.saturating_sub(1));
                let end = CORPUS[at].len().min(place + 2);
                let ids: Vec<u32> = example.tokens.iter().map(|t| t.id).collect();
                assert_eq!(ids, CORPUS[at][first..end]);
                assert!(example.tokens.iter().all(|t| !t.text.is_empty()));
                let shown = floats(example.activations.as_ref().unwrap());
                assert_eq!(shown.len(), end - first);
                for (shown, row) in shown.iter().zip(&all[at][layer][first..end]) {
                    near(*shown, row[neuron], model);
                }
            }
            // The first and the third text are the same: the first comes first.
            let texts: Vec<u64> = found.examples.iter().map(|e| e.text).collect();
            if let (Some(a), Some(b)) = (
                texts.iter().position(|t| *t == 0),
                texts.iter().position(|t| *t == 2),
            ) {
                let [one, other] = [&found.examples[a], &found.examples[b]];
                assert!(a < b || one.activation < other.activation, "{texts:?}");
            }
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn named_neurons_answer_each_text_at_each_token() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let all = activations(&d, model, "mlp.hook_post").await;
        let named = [(1u32, 3u32), (0, 5)];
        let given = pb::NeuronsHeader {
            neurons: named
                .iter()
                .map(|(layer, index)| pb::Neuron {
                    layer: *layer,
                    index: *index,
                    ..pb::Neuron::default()
                })
                .collect(),
            activations: true,
            examples: 1,
            ..of(model)
        };
        let answer = search(&d, given).await.unwrap();
        let told = answer.neurons.iter().map(|n| (n.layer.unwrap(), n.index));
        assert_eq!(told.collect::<Vec<_>>(), named);
        assert_eq!(answer.activations.len(), CORPUS.len());
        for (at, found) in answer.activations.iter().enumerate() {
            assert_eq!((found.text, &found.id), (at as u64, &format!("text {at}")));
            let spelled: Vec<u32> = found.tokens.iter().map(|t| t.id).collect();
            assert_eq!(spelled, CORPUS[at]);
            let tensor = found.activations.as_ref().unwrap();
            assert_eq!(tensor.shape, [2, CORPUS[at].len() as u64]);
            let wanted = named.iter().flat_map(|(layer, index)| {
                let rows = all[at][*layer as usize].iter();
                rows.map(move |row| row[*index as usize])
            });
            for (found, wanted) in floats(tensor).into_iter().zip(wanted) {
                near(found, wanted, model);
            }
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_fails_fails_alone() {
    let d = TestDaemon::with(&["gpt2.legacy14"]).await;
    let texts = vec![
        header(of("gpt2.legacy14")),
        text(0, CORPUS[0]),
        text(1, &[]),
        text(2, &[1_000_000]),
        text(3, CORPUS[3]),
    ];
    let answer = send(&d, texts).await.unwrap();
    let failed: Vec<(u64, &str)> = answer
        .failures
        .iter()
        .map(|f| (f.text, &f.failure.as_ref().unwrap().field[..]))
        .collect();
    assert_eq!(
        failed,
        [(1, "input.tokens.ids"), (2, "input.tokens.ids[0]")]
    );
    assert_eq!(answer.failures[0].id, "text 1");
    assert!(
        answer
            .summary
            .notes
            .iter()
            .any(|n| n.contains("2 texts failed"))
    );
    assert_eq!(answer.neurons.len(), 20);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_intervention_is_made_on_each_text() {
    let d = TestDaemon::with(&["gpt2.legacy14"]).await;
    let edited = |positions: &[i32]| pb::NeuronsHeader {
        by: pb::NeuronRanking::Max.into(),
        top_k: 1,
        intervention: Some(pb::Intervention {
            edits: vec![pb::Edit {
                hook: "mlp.hook_post".to_owned(),
                layers: vec![1],
                dims: vec![3],
                positions: positions.to_vec(),
                operation: Some(Operation::Set(pb::Tensor {
                    dtype: pb::DType::F32.into(),
                    shape: vec![1],
                    data: 77.0f32.to_le_bytes().to_vec().into(),
                    ..pb::Tensor::default()
                })),
                ..pb::Edit::default()
            }],
            ..pb::Intervention::default()
        }),
        ..of("gpt2.legacy14")
    };
    let answer = search(&d, edited(&[])).await.unwrap();
    let best = &answer.neurons[0];
    assert_eq!((best.layer, best.index, best.max), (Some(1), 3, 77.0));
    near(best.mean, 77.0, "every position of every text");

    // The fourth token exists in four of the five texts.
    let answer = search(&d, edited(&[3])).await.unwrap();
    assert_eq!(answer.neurons[0].max, 77.0);
    let failed: Vec<(u64, &str)> = answer
        .failures
        .iter()
        .map(|f| (f.text, &f.failure.as_ref().unwrap().field[..]))
        .collect();
    assert_eq!(failed, [(4, "intervention.edits[0].positions[0]")]);

    let status = search(&d, edited(&[99])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let field = "header.intervention.edits[0].positions[0]";
    assert!(status.message().contains(field), "{status:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_field_is_named() {
    let d = TestDaemon::with(&["gpt2.legacy14"]).await;
    let good = || of("gpt2.legacy14");
    let neuron = |hook: &str, layer, index| pb::NeuronsHeader {
        neurons: vec![pb::Neuron {
            hook: hook.to_owned(),
            layer,
            index,
        }],
        ..good()
    };
    let one = |header_of: pb::NeuronsHeader| vec![header(header_of), text(0, CORPUS[0])];
    let wrong_text = |given: pb::NeuronsText| {
        let item = Some(Asked::Text(given));
        vec![header(good()), pb::NeuronsRequest { item }]
    };
    let cases: Vec<(&str, Vec<pb::NeuronsRequest>)> = vec![
        ("header", vec![]),
        ("header", vec![text(0, CORPUS[0])]),
        ("header.model", one(pb::NeuronsHeader::default())),
        (
            "header.hook",
            one(pb::NeuronsHeader {
                hook: "nothing".into(),
                ..good()
            }),
        ),
        (
            "header.hook",
            one(pb::NeuronsHeader {
                hook: "pattern".into(),
                ..good()
            }),
        ),
        (
            "header.hook",
            one(pb::NeuronsHeader {
                hook: "value:x".into(),
                ..good()
            }),
        ),
        (
            "header.layers[1]",
            one(pb::NeuronsHeader {
                layers: vec![0, 99],
                ..good()
            }),
        ),
        ("header.by", one(pb::NeuronsHeader { by: 9, ..good() })),
        (
            "header.by",
            one(pb::NeuronsHeader {
                by: By::Contrast.into(),
                ..good()
            }),
        ),
        (
            "header.top_k",
            one(pb::NeuronsHeader {
                top_k: 1025,
                ..good()
            }),
        ),
        (
            "header.examples",
            one(pb::NeuronsHeader {
                examples: 101,
                ..good()
            }),
        ),
        (
            "header.context",
            one(pb::NeuronsHeader {
                context: 65,
                ..good()
            }),
        ),
        (
            "header.neurons",
            one(pb::NeuronsHeader {
                activations: true,
                ..good()
            }),
        ),
        ("header.neurons[0].layer", one(neuron("", 99, 0))),
        ("header.neurons[0].index", one(neuron("", 0, 1 << 20))),
        (
            "header.neurons[0].hook",
            one(neuron("blocks.0.hook_resid_post", 0, 0)),
        ),
        ("text", vec![header(good())]),
        (
            "texts[1]",
            vec![header(good()), text(0, CORPUS[0]), header(good())],
        ),
        ("texts[0].input", wrong_text(pb::NeuronsText::default())),
        (
            "texts[0].set",
            wrong_text(pb::NeuronsText {
                set: 7,
                ..pb::NeuronsText::default()
            }),
        ),
        (
            "texts[0].id",
            wrong_text(pb::NeuronsText {
                id: "x".repeat(257),
                ..pb::NeuronsText::default()
            }),
        ),
    ];
    for (field, messages) in cases {
        let error = send(&d, messages).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{field}: {error:?}");
        let details = error.get_details_bad_request().unwrap();
        let named = &details.field_violations[0].field;
        assert!(named.starts_with(field), "{field}: {named} ({error:?})");
    }
    let missing = send(&d, one(of("nobody"))).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    let lacks = pb::NeuronsHeader {
        hook: "mlp.hook_pre_linear".into(),
        ..good()
    };
    assert!(send(&d, one(lacks)).await.is_err());
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_is_taken_from_the_budget_and_does_not_grow_with_the_texts() {
    let d = TestDaemon::tuned(&["gpt2.legacy14"], |c| {
        c.buffer = 1 << 20;
        c.max_capture = 1 << 20;
    })
    .await;
    let large = pb::NeuronsHeader {
        examples: 100,
        context: 64,
        ..of("gpt2.legacy14")
    };
    let error = send(&d, vec![header(large), text(0, CORPUS[0])])
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error:?}");
    // A corpus that would not fit passes through.
    let small = pb::NeuronsHeader {
        examples: 2,
        ..of("gpt2.legacy14")
    };
    let corpus = (0..600).map(|at| text(at % 3, CORPUS[at % CORPUS.len()]));
    let answer = send(&d, std::iter::once(header(small)).chain(corpus).collect())
        .await
        .unwrap();
    assert_eq!(answer.summary.rows, 600);
    assert!(answer.neurons.iter().all(|n| n.examples.len() == 2));
    d.stop().await;
}
