//! Models that are almost what the anatomy knows: what is not there is not claimed, and said.

#[path = "support/worker.rs"]
mod support;

use introspectd::{
    ipc::{
        info::{Axis, InputRole, ModelInfo},
        spec::{LoadOptions, VariantSpec},
    },
    onnx::{Attribute, Dim, Folder, Limits, Model, Patch, ValueId, Weights},
    tensor::{DType, Tensor},
};
use support::{Worker, everything, fixture, inputs};

/// A fixture with a change, loaded by a worker.
async fn changed(name: &str, change: impl FnOnce(&mut Patch)) -> (Worker, ModelInfo) {
    let source = Folder::open(&fixture(name)).unwrap();
    let model = Model::open(&source, "model.onnx", &Limits::default()).unwrap();
    let mut patch = Patch::new(&model.graph, "changed");
    change(&mut patch);
    let model = model.with_graph(patch.apply().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.onnx");
    std::fs::write(file, model.encode(Weights::Inline)).unwrap();
    let worker = Worker::start();
    let info = worker
        .load(folder.path(), &LoadOptions::default())
        .await
        .unwrap_or_else(|f| panic!("{name}: {}", f.message));
    (worker, info)
}

/// GPT-2 without the sum around the attention of one layer.
async fn without_residual(layer: usize) -> ModelInfo {
    let (_worker, whole) = Worker::with("gpt2.legacy14").await;
    let value = |hook: &str| {
        let name = format!("blocks.{layer}.{hook}");
        let hook = whole.hooks.iter().find(|h| h.name == name);
        hook.unwrap_or_else(|| panic!("{name}")).value.clone()
    };
    let (sum, attended) = (value("hook_resid_mid"), value("hook_attn_out"));
    let (_worker, info) = changed("gpt2.legacy14", |patch| {
        let id = |name: &str| patch.draft().value(name).unwrap();
        let (sum, attended) = (id(&sum), id(&attended));
        patch.shunt(sum, attended);
    })
    .await;
    info
}

fn layers(info: &ModelInfo) -> Vec<usize> {
    let mut layers: Vec<usize> = info.hooks.iter().filter_map(|h| h.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    layers
}

#[tokio::test]
async fn layers_behind_an_attention_without_residual_are_not_numbered() {
    for broken in [0, 1] {
        let info = without_residual(broken).await;
        let found = layers(&info);
        assert!(found.iter().all(|l| *l < broken), "{broken}: {found:?}");
        assert!(info.certificate.checks.iter().all(|c| c.passed));
        let why = info.missing.iter().find(|m| m.hook.starts_with("blocks."));
        let why = &why.expect("it is said").reason;
        assert!(why.contains("no residual block"), "{why}");
    }
}

#[tokio::test]
async fn a_file_whose_fused_kernels_refuse_what_their_standard_allows_is_served_unfused() {
    // A mask that is the same for every query: [batch, 1, 1, key] in place of [batch, 1, query, key].
    let (worker, info) = changed("bert.attention23", |patch| {
        let attentions = patch.draft().nodes().map(|(_, node)| node.clone());
        let masks: Vec<_> = attentions
            .filter(|node| node.is("Attention"))
            .map(|node| node.input(3).expect("a mask"))
            .collect();
        patch.intercept(masks[0], |patch, mask| {
            let bounds = [0, 1, 2].map(|n| patch.ints(&[n]));
            patch.op(
                "Slice",
                &[mask, bounds[0], bounds[1], bounds[2]],
                Vec::new(),
            )
        });
        assert!(masks.iter().all(|m| *m == masks[0]), "one mask for all");
    })
    .await;
    assert_eq!(layers(&info), [0, 1, 2], "{:?}", info.missing);
    let said = info.notes.iter().any(|n| n.contains("do not run"));
    assert!(said, "{:?}", info.notes);
    let (outputs, _) = worker.build(1, &VariantSpec::plain()).await.unwrap();
    let given = inputs(&info, 2, 9);
    let (plain, ran) = worker
        .run(1, &given, everything(&outputs, 2))
        .await
        .unwrap_or_else(|f| panic!("{}", f.message));
    assert!(ran.non_finite_picks.is_empty() && plain[0].shape()[0] == 2);
}

/// Width of the stream of the fixtures.
const WIDTH: usize = 32;

/// A weight of this shape, drawn from a seed.
fn weight(patch: &mut Patch, shape: &[usize], seed: u32) -> ValueId {
    let mut state = seed.wrapping_mul(2_654_435_769).wrapping_add(1);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect();
    let tensor = Tensor::from_f32(shape.to_vec(), &values).unwrap();
    patch.constant("weight", &tensor)
}

fn times(patch: &mut Patch, x: ValueId, shape: [usize; 2], seed: u32) -> ValueId {
    let weight = weight(patch, &shape, seed);
    patch.op("MatMul", &[x, weight], Vec::new())
}

/// `x + perceptron(x)`
fn with_perceptron(patch: &mut Patch, x: ValueId, seed: u32) -> ValueId {
    let up = times(patch, x, [WIDTH, 16], seed);
    let bent = patch.op("Relu", &[up], Vec::new());
    let down = times(patch, bent, [16, WIDTH], seed + 1);
    patch.op("Add", &[x, down], Vec::new())
}

/// A fixture with `f` put behind a hook point of every layer.
async fn behind(
    name: &str,
    hook: &str,
    f: impl Fn(&mut Patch, ValueId, u32) -> ValueId,
) -> (ModelInfo, ModelInfo) {
    let (_worker, whole) = Worker::with(name).await;
    let values = values(&whole, hook);
    assert!(values.len() > 1, "{name} has {hook}");
    let (_worker, info) = changed(name, |patch| {
        for (layer, value) in (0..).zip(&values) {
            let value = patch.draft().value(value).unwrap();
            patch.intercept(value, |patch, v| f(patch, v, 10 * layer));
        }
    })
    .await;
    assert!(info.certificate.checks.iter().all(|c| c.passed));
    (whole, info)
}

/// What a hook point stands for in every layer that has it.
fn values(info: &ModelInfo, hook: &str) -> Vec<String> {
    let ends = format!(".{hook}");
    let hooks = info.hooks.iter();
    let found = hooks.filter(|h| h.layer.is_some() && h.name.ends_with(&ends));
    found.map(|h| h.value.clone()).collect()
}

/// Why the first layer lacks a hook point.
fn why(info: &ModelInfo, hook: &str) -> String {
    let name = format!("blocks.0.{hook}");
    let found = info.missing.iter().find(|m| m.hook == name);
    found
        .unwrap_or_else(|| panic!("{name}: {:?}", info.missing))
        .reason
        .clone()
}

#[tokio::test]
async fn of_two_perceptrons_in_a_layer_none_is_the_layers() {
    let (whole, info) = behind("bert.legacy14", "hook_resid_post", with_perceptron).await;
    for hook in ["mlp.hook_pre", "mlp.hook_post", "hook_mlp_out"] {
        assert!(values(&info, hook).is_empty(), "{hook}");
        assert_eq!(why(&info, hook), "the layer has 2 perceptrons");
    }
    for hook in ["hook_attn_out", "hook_resid_mid", "attn.hook_z"] {
        assert_eq!(values(&info, hook), values(&whole, hook), "{hook}");
    }
}

#[tokio::test]
async fn an_attention_with_a_perceptron_behind_it_has_no_output_of_its_own() {
    let (whole, info) = behind("bert.legacy14", "hook_attn_out", with_perceptron).await;
    assert!(values(&info, "hook_attn_out").is_empty());
    assert!(why(&info, "hook_attn_out").contains("a perceptron behind it"));
    for hook in ["attn.hook_z", "mlp.hook_post", "hook_mlp_out"] {
        assert_eq!(values(&info, hook), values(&whole, hook), "{hook}");
    }
}

#[tokio::test]
async fn a_gate_behind_an_attention_belongs_to_its_output() {
    let gate = |patch: &mut Patch, x: ValueId, seed: u32| {
        let gate = times(patch, x, [WIDTH, WIDTH], seed);
        let gate = patch.op("Sigmoid", &[gate], Vec::new());
        patch.op("Mul", &[x, gate], Vec::new())
    };
    let (whole, info) = behind("gpt2.legacy14", "hook_attn_out", gate).await;
    let (before, after) = (
        values(&whole, "hook_attn_out"),
        values(&info, "hook_attn_out"),
    );
    assert_eq!(before.len(), after.len(), "{:?}", info.missing);
    assert!(before.iter().zip(&after).all(|(b, a)| b != a));
}

/// BERT whose layers end in something else than their norm.
async fn ending(f: impl Fn(&mut Patch, ValueId, ValueId) -> ValueId) -> (ModelInfo, ModelInfo) {
    let (_worker, whole) = Worker::with("bert.dynamo20").await;
    let sums = values(&whole, "hook_resid_post");
    let norms = values(&whole, "hook_normalized_resid_post");
    assert!(sums.len() == norms.len() && sums.len() > 1);
    let (_worker, info) = changed("bert.dynamo20", |patch| {
        for (sum, norm) in sums.iter().zip(&norms) {
            let id = |name: &str| patch.draft().value(name).unwrap();
            let (sum, norm) = (id(sum), id(norm));
            patch.intercept(norm, |patch, norm| f(patch, sum, norm));
        }
    })
    .await;
    assert!(info.certificate.checks.iter().all(|c| c.passed));
    (whole, info)
}

#[tokio::test]
async fn what_leaves_the_last_layer_is_what_leaves_the_others() {
    // XLM: padding is zeroed behind the norm.
    let masked = |patch: &mut Patch, _: ValueId, norm: ValueId| {
        let mask = patch.draft().value("attention_mask").unwrap();
        let mask = patch.op("Cast", &[mask], vec![Attribute::int("to", 1)]);
        let axis = patch.ints(&[-1]);
        let mask = patch.op("Unsqueeze", &[mask, axis], Vec::new());
        patch.op("Mul", &[norm, mask], Vec::new())
    };
    // MobileBERT: a weight and a bias without a norm.
    let affine = |patch: &mut Patch, sum: ValueId, _: ValueId| {
        let (scale, shift) = (weight(patch, &[WIDTH], 1), weight(patch, &[WIDTH], 2));
        let scaled = patch.op("Mul", &[sum, scale], Vec::new());
        patch.op("Add", &[scaled, shift], Vec::new())
    };
    for (whole, info) in [ending(masked).await, ending(affine).await] {
        assert_eq!(
            values(&info, "hook_resid_post"),
            values(&whole, "hook_resid_post"),
            "the sums of all layers"
        );
        every_layer_ends_in(&info, "hook_normalized_resid_post");
    }
}

/// What the next layer reads, or the end of the stream, is this hook point of each layer.
fn every_layer_ends_in(info: &ModelInfo, hook: &str) {
    let ends = values(info, hook);
    assert_eq!(ends.len(), info.dims.layers);
    assert_eq!(
        ends[..ends.len() - 1],
        values(info, "hook_resid_pre")[1..],
        "what the next layer reads"
    );
    let last = info.hook(&format!("hidden_states.{}", info.dims.layers));
    assert_eq!(last.map(|h| &h.value), ends.last());
}

#[tokio::test]
async fn a_scale_that_every_layer_ends_with_lies_before_the_end_of_all() {
    let scaled = |patch: &mut Patch, sum: ValueId, _: ValueId| {
        let half = patch.scalar(0.5);
        patch.op("Mul", &[sum, half], Vec::new())
    };
    let (_, info) = ending(scaled).await;
    every_layer_ends_in(&info, "hook_resid_post");
    assert!(values(&info, "hook_normalized_resid_post").is_empty());
}

/// GPT-2 whose layers look at a second sequence too, of the same table or of one of its own.
async fn looking_at_another(own_table: bool) -> (Worker, ModelInfo) {
    let (_worker, whole) = Worker::with("gpt2.legacy14").await;
    let middles = values(&whole, "hook_resid_mid");
    let embed = whole.hook("hook_embed").unwrap().value.clone();
    changed("gpt2.legacy14", |patch| {
        let dims = || vec![Dim::Named("batch".into()), Dim::Named("source".into())];
        let ids = patch.input("source_ids", DType::I64, dims()).unwrap();
        let mask = patch.input("source_mask", DType::I64, dims()).unwrap();
        let table = if own_table {
            weight(patch, &[320, WIDTH], 7)
        } else {
            let rows = patch.draft().value(&embed).unwrap();
            let lookup = patch.draft().producer(rows).unwrap();
            patch.draft().node(lookup).input(0).unwrap()
        };
        let source = patch.op("Gather", &[table, ids], Vec::new());
        let source = with_perceptron(patch, source, 70);
        let mask = patch.op("Cast", &[mask], vec![Attribute::int("to", 1)]);
        let axis = patch.ints(&[1]);
        let mask = patch.op("Unsqueeze", &[mask, axis], Vec::new());
        let one = patch.scalar(1.0);
        let hidden = patch.op("Sub", &[one, mask], Vec::new());
        let much = patch.scalar(-1e4);
        let hidden = patch.op("Mul", &[hidden, much], Vec::new());
        for (layer, middle) in (0u32..).zip(&middles) {
            let middle = patch.draft().value(middle).unwrap();
            patch.intercept(middle, |patch, x| {
                let square = [WIDTH, WIDTH];
                let q = times(patch, x, square, 100 + layer);
                let k = times(patch, source, square, 110 + layer);
                let v = times(patch, source, square, 120 + layer);
                let turned = vec![Attribute::ints("perm", &[0, 2, 1])];
                let k = patch.op("Transpose", &[k], turned);
                let scores = patch.op("MatMul", &[q, k], Vec::new());
                let scores = patch.op("Add", &[scores, hidden], Vec::new());
                let last = vec![Attribute::int("axis", -1)];
                let pattern = patch.op("Softmax", &[scores], last);
                let z = patch.op("MatMul", &[pattern, v], Vec::new());
                let out = times(patch, z, square, 130 + layer);
                patch.op("Add", &[x, out], Vec::new())
            });
        }
    })
    .await
}

#[tokio::test]
async fn the_ids_of_another_sequence_are_the_callers_to_give() {
    for own_table in [false, true] {
        let (_worker, info) = looking_at_another(own_table).await;
        let input = |name: &str| info.inputs.iter().find(|i| i.name == name).unwrap();
        assert_eq!(input("input_ids").role, InputRole::TokenIds);
        assert_eq!(input("attention_mask").role, InputRole::AttentionMask);
        for name in ["source_ids", "source_mask"] {
            assert_eq!(input(name).role, InputRole::Other, "{name}");
            assert!(input(name).axes.is_empty(), "its length is its own");
        }
        let said = |n: &String| n.contains("\"source_ids\", \"source_mask\"");
        assert!(info.notes.iter().any(said), "{:?}", info.notes);
        let pattern = info.hook("blocks.0.cross_attn.hook_pattern").unwrap();
        let source = Axis::Other("source".to_owned());
        assert_eq!(pattern.axes.last(), Some(&source));
        assert_eq!(pattern.dims.last(), Some(&None), "it varies");
        for inside in [
            "cross_attn.hook_q",
            "cross_attn.hook_k",
            "hook_cross_attn_out",
            "hook_resid_mid_cross",
        ] {
            let name = format!("blocks.2.{inside}");
            assert!(info.hook(&name).is_some(), "{name}: {:?}", info.missing);
        }
        assert!(info.pads, "the tokens have their mask");
        assert!(info.certificate.checks.iter().all(|c| c.passed));
    }
}
