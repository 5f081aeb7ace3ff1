//! Circuits over real gRPC: edges against PyTorch's (`tests/fixtures/make/analysis_paths.py`), the circuit that was set by hand, and what all edges
//! together restore.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;

use std::{fs::File, path::Path};

use daemon::TestDaemon;
use introspectd::service::wire::introspect::{
    self as pb, find_circuit_response::Item, intervention_service_client::InterventionServiceClient,
};
use ndarray::{Array1, Array2};
use ndarray_npy::NpzReader;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;

struct Found {
    header: pb::CircuitHeader,
    /// `[writer, reader]`
    scores: Array2<f32>,
    circuit: pb::Circuit,
}

impl Found {
    fn edges(&self) -> Vec<(&str, &str)> {
        let name = |node: u32| self.header.nodes[node as usize].name.as_str();
        let edges = self.circuit.edges.iter();
        edges.map(|e| (name(e.from), name(e.to))).collect()
    }
}

async fn find(d: &TestDaemon, request: pb::FindCircuitRequest) -> Result<Found, Status> {
    let mut client = InterventionServiceClient::new(d.channel().await);
    let mut stream = client.find_circuit(request).await?.into_inner();
    let (mut header, mut circuit, mut scores) = (None, None, Vec::new());
    let (mut messages, mut crc) = (0, 0);
    while let Some(message) = stream.message().await? {
        match message.item.unwrap() {
            Item::Header(h) => header = Some(h),
            Item::Progress(_) => {}
            Item::Tensor(t) => {
                crc = crc32c::crc32c_append(crc, &t.data);
                let floats = t.data.as_chunks().0.iter();
                scores.extend(floats.map(|b| f32::from_le_bytes(*b)));
            }
            Item::Circuit(c) => circuit = Some(c),
            Item::Summary(s) => assert_eq!((s.messages, s.crc32c), (messages, crc)),
        }
        messages += 1;
    }
    let header = header.unwrap();
    let n = header.nodes.len();
    Ok(Found {
        header,
        scores: Array2::from_shape_vec((n, n), scores).unwrap(),
        circuit: circuit.unwrap(),
    })
}

fn tokens(ids: &[u32]) -> Option<pb::Input> {
    Some(pb::Input {
        kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
            ids: ids.to_vec(),
            type_ids: Vec::new(),
        })),
    })
}

fn contrast(choice: u32, against: u32) -> Option<pb::Target> {
    let of = |index| {
        Some(pb::Choice {
            what: Some(pb::choice::What::Index(index)),
            position: None,
        })
    };
    Some(pb::Target {
        of: Some(pb::target::Of::Contrast(pb::Contrast {
            choice: of(choice),
            against: of(against),
        })),
        ..pb::Target::default()
    })
}

struct Golden(NpzReader<File>);

impl Golden {
    fn of(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/analysis")
            .join(format!("{name}.npz"));
        Self(NpzReader::new(File::open(path).unwrap()).unwrap())
    }

    fn ids(&mut self, name: &str) -> Vec<u32> {
        let ids: Array1<i64> = self.0.by_name(name).unwrap();
        ids.iter().map(|id| u32::try_from(*id).unwrap()).collect()
    }

    fn matrix(&mut self, name: &str) -> Array2<f64> {
        self.0.by_name(name).unwrap()
    }

    /// Its question.
    fn request(&mut self, model: &str) -> pb::FindCircuitRequest {
        let target = self.ids("target");
        pb::FindCircuitRequest {
            model: model.to_owned(),
            input: tokens(&self.ids("ids")),
            source: tokens(&self.ids("source")),
            target: contrast(target[0], target[1]),
            ..pb::FindCircuitRequest::default()
        }
    }
}

fn field(status: &Status) -> String {
    let details = status.get_error_details();
    let violations = &details.bad_request().expect("a field").field_violations;
    violations[0].field.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn edges_are_those_of_pytorch_and_all_of_them_restore_everything() {
    let models = [
        ("induction", "induction.legacy17"),
        ("circuit", "circuit.legacy17"),
    ];
    let d = TestDaemon::with(&models.map(|(_, model)| model)).await;
    for (name, model) in models {
        let mut golden = Golden::of(name);
        let heads = golden.matrix("edges/head");
        let all = pb::FindCircuitRequest {
            edges: 1000,
            ..golden.request(model)
        };
        let found = find(&d, all.clone()).await.unwrap();
        let most = heads.iter().fold(0.0f64, |m, s| m.max(s.abs()));
        // Writers are all nodes but the output, readers all but the embedding.
        let n = found.header.nodes.len() - 1;
        assert_eq!(heads.dim(), (n, n));
        for ((writer, reader), wanted) in heads.indexed_iter() {
            let score = found.scores[[writer, reader + 1]];
            let score = if score.is_nan() {
                0.0
            } else {
                f64::from(score)
            };
            assert!(
                (score - wanted).abs() < REWRITTEN * most,
                "{model} {writer} {reader}: {score} for {wanted}"
            );
        }
        let restored = found.circuit.faithfulness.unwrap();
        assert!((restored - 1.0).abs() < REWRITTEN, "{model}: {restored}");

        // The attention of a layer in one: what its heads write, together.
        let layers = golden.matrix("edges/layer");
        let coarse = pb::FindCircuitRequest {
            nodes: pb::CircuitNodes::Layers.into(),
            ..all
        };
        let found = find(&d, coarse).await.unwrap();
        let per_layer = (n - 1) / 2;
        let of_writer = |writer: usize| match writer {
            0 => 0..1,
            w if w % 2 == 1 => 1 + w / 2 * per_layer..(1 + w / 2) * per_layer,
            w => w / 2 * per_layer..w / 2 * per_layer + 1,
        };
        for writer in 0..5 {
            for reader in 0..5 {
                let rows = of_writer(writer);
                let wanted: f64 = rows.map(|row| layers[[row, reader]]).sum();
                let score = found.scores[[writer, reader + 1]];
                let score = if score.is_nan() {
                    0.0
                } else {
                    f64::from(score)
                };
                assert!(
                    (score - wanted).abs() < REWRITTEN * most,
                    "{model} {writer} {reader}: {score} for {wanted}"
                );
            }
        }
        let restored = found.circuit.faithfulness.unwrap();
        assert!((restored - 1.0).abs() < REWRITTEN, "{model}: {restored}");
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_circuit_that_was_set_by_hand_is_found_and_suffices() {
    let d = TestDaemon::with(&["circuit.legacy17"]).await;
    let request = Golden::of("circuit").request("circuit.legacy17");
    let found = find(&d, request.clone()).await.unwrap();
    let mut edges = found.edges();
    edges.sort_unstable();
    assert_eq!(
        edges,
        [("a0.h1", "a1.h2"), ("a1.h2", "logits"), ("embed", "a0.h1")]
    );
    assert!((found.circuit.faithfulness.unwrap() - 1.0).abs() < REWRITTEN);
    // Two edges do not reach from one end to the other: nothing is left, and nothing is restored.
    let short = pb::FindCircuitRequest {
        edges: 2,
        ..request
    };
    let found = find(&d, short).await.unwrap();
    assert_eq!(found.circuit.edges, []);
    assert!(found.circuit.faithfulness.unwrap().abs() < REWRITTEN);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_edges_restore_everything_in_other_architectures() {
    let models = ["gpt2.dynamo20", "llama.legacy14", "gpt2.fused"];
    let d = TestDaemon::with(&models).await;
    for model in models {
        for nodes in [pb::CircuitNodes::Heads, pb::CircuitNodes::Layers] {
            let request = pb::FindCircuitRequest {
                model: model.to_owned(),
                input: tokens(&[2, 9, 17, 30, 11, 3]),
                source: tokens(&[2, 21, 8, 14, 25, 3]),
                target: contrast(5, 7),
                nodes: nodes.into(),
                edges: 100_000,
            };
            let found = find(&d, request).await.unwrap();
            let restored = found.circuit.faithfulness.unwrap();
            assert!(
                (restored - 1.0).abs() < 10.0 * REWRITTEN,
                "{model} {nodes:?}: {restored}"
            );
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_edges_is_told_so_and_bad_fields_are_named() {
    let model = "circuit.legacy17";
    let d = TestDaemon::with(&[model, "bert.legacy14"]).await;
    let good = Golden::of("circuit").request(model);
    let bert = pb::FindCircuitRequest {
        model: "bert.legacy14".to_owned(),
        target: contrast(0, 1),
        ..good.clone()
    };
    let error = find(&d, bert).await.err().unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("normalises"), "{error}");
    let unit = pb::Target {
        of: Some(pb::target::Of::Unit(pb::Unit {
            hook: "blocks.0.hook_resid_post".to_owned(),
            position: 0,
            index: 0,
        })),
        ..pb::Target::default()
    };
    let with = |change: &dyn Fn(&mut pb::FindCircuitRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    let cases = [
        (with(&|r| r.input = None), "input"),
        (with(&|r| r.source = None), "source"),
        (with(&|r| r.source = tokens(&[1, 2])), "source"),
        (
            with(&|r| r.target = contrast(1, 999)),
            "target.contrast.against.index",
        ),
        (with(&|r| r.target = Some(unit.clone())), "target"),
        (with(&|r| r.nodes = 9), "nodes"),
        (with(&|r| r.edges = 100_001), "edges"),
    ];
    for (request, wanted) in cases {
        let error = find(&d, request.clone()).await.err().unwrap();
        assert_eq!(field(&error), wanted, "{request:?}: {error}");
    }
    find(&d, good).await.unwrap();
    d.stop().await;
}
