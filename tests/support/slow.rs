//! A model with a value that takes long to compute, beside everything that its source has.

use std::path::Path;

use introspectd::{
    onnx::{Attribute, Folder, Limits, Model, Patch, Weights},
    tensor::Tensor,
};

/// The slow value. Nothing of the model needs it.
pub const VALUE: &str = "value:slow";

/// Puts the fixture `bert.legacy14` with the slow value into a repository: many products, one after the other.
pub fn put(repository: &Path, name: &str) {
    let side = 256;
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/bert.legacy14");
    let to = repository.join(name);
    std::fs::create_dir_all(&to).unwrap();
    for file in ["tokenizer.json", "config.json"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let source = Folder::open(&from).unwrap();
    let model = Model::open(&source, "model.onnx", &Limits::default()).unwrap();
    let ids = model.graph.value("input_ids").expect("the fixture's input");
    let mut patch = Patch::new(&model.graph, "slow");
    let floats = patch.op("Cast", &[ids], vec![Attribute::int("to", 1)]);
    let largest = patch.op("ReduceMax", &[floats], vec![Attribute::ints("axes", &[1])]);
    let axis = patch.ints(&[2]);
    let row = patch.op("Unsqueeze", &[largest, axis], Vec::new());
    // Products with the identity keep their values, which denormal numbers would slow down.
    let identity: Vec<f32> = (0..side * side)
        .map(|i| if i % (side + 1) == 0 { 1.0 } else { 0.0 })
        .collect();
    let identity = Tensor::from_f32(vec![side, side], &identity).unwrap();
    let identity = patch.constant("identity", &identity);
    let mut product = patch.op("Add", &[identity, row], Vec::new());
    for _ in 0..1500 {
        product = patch.op("MatMul", &[product, identity], Vec::new());
    }
    let mean = patch.op("ReduceMax", &[product], vec![Attribute::ints("axes", &[1])]);
    patch.tap(mean, "slow").unwrap();
    let slow = model.with_graph(patch.apply().unwrap());
    std::fs::write(to.join("model.onnx"), slow.encode(Weights::Inline)).unwrap();
}
