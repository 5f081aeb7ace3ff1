//! What a variant costs beside the first: its graph and its buffers, not its weights.

#[path = "support/worker.rs"]
mod support;

use std::{fs, path::Path, time::Duration};

use introspectd::{
    ipc::{
        spec::{LoadOptions, VariantSpec},
        wire::{Ping, command},
    },
    onnx::{Attribute, Folder, Limits, Model, Patch, Weights},
    tensor::Tensor,
};
use support::{Worker, everything, fixture, inputs};

/// Width and number of the square weights: 96 MiB together.
const SIDE: usize = 1024;
const COUNT: usize = 24;

/// The fixture `bert.legacy14` with an output `wide` that many large weights lead to.
fn wide_model(folder: &Path) {
    let source = Folder::open(&fixture("bert.legacy14")).unwrap();
    let model = Model::open(&source, "model.onnx", &Limits::default()).unwrap();
    let ids = model.graph.value("input_ids").expect("the fixture's input");
    let mut patch = Patch::new(&model.graph, "wide");
    let floats = patch.op("Cast", &[ids], vec![Attribute::int("to", 1)]);
    let largest = patch.op("ReduceMax", &[floats], vec![Attribute::ints("axes", &[1])]);
    let ones = Tensor::from_f32(vec![1, SIDE], &vec![1e-3; SIDE]).unwrap();
    let ones = patch.constant("ones", &ones);
    let mut row = patch.op("Mul", &[largest, ones], Vec::new());
    for layer in 0..COUNT {
        let values: Vec<f32> = (0..SIDE * SIDE)
            .map(|i| ((i * 31 + layer * 7) % 1013) as f32 / 500_000.0)
            .collect();
        let weight = Tensor::from_f32(vec![SIDE, SIDE], &values).unwrap();
        let weight = patch.constant("weight", &weight);
        row = patch.op("MatMul", &[row, weight], Vec::new());
    }
    patch.tap(row, "wide").unwrap();
    let wide = model.with_graph(patch.apply().unwrap());
    fs::write(folder.join("model.onnx"), wide.encode(Weights::Inline)).unwrap();
}

async fn resident(worker: &Worker, nonce: u64) -> u64 {
    let ping = command::Kind::Ping(Ping { nonce });
    worker.connection.send(ping, None).await.unwrap();
    while worker.connection.last_pong() != nonce {
        assert!(!worker.connection.is_closed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    worker.connection.resident_bytes()
}

#[tokio::test]
async fn four_variants_take_little_more_than_one() {
    let folder = tempfile::tempdir().unwrap();
    wide_model(folder.path());
    let worker = Worker::start();
    let info = worker
        .load(folder.path(), &LoadOptions::default())
        .await
        .unwrap_or_else(|f| panic!("{}", f.message));
    let hooks: Vec<String> = info.hooks.iter().map(|h| h.name.clone()).collect();
    let specs = [
        VariantSpec::plain(),
        VariantSpec::exposing(hooks[..1].to_vec()),
        VariantSpec::exposing(hooks[1..2].to_vec()),
        VariantSpec::exposing(hooks.clone()),
    ];
    let given = inputs(&info, 1, 8);
    let mut taken = Vec::new();
    for (variant, spec) in specs.iter().enumerate() {
        let (outputs, _) = worker.build(variant as u32, spec).await.unwrap();
        worker
            .run(variant as u32, &given, everything(&outputs, 1))
            .await
            .unwrap();
        taken.push(resident(&worker, variant as u64 + 1).await);
    }
    let weights = (SIDE * SIDE * COUNT * 4) as u64;
    println!("weights {weights}, resident after each variant {taken:?}");
    assert!(taken[0] > weights, "the weights are there");
    assert!(
        taken[3] as f64 <= taken[0] as f64 * 1.15,
        "four variants against one: {taken:?}"
    );
}
