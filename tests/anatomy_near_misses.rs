//! Models that are almost what the anatomy knows: what is not there is not claimed, and said.

#[path = "support/worker.rs"]
mod support;

use introspectd::{
    ipc::{
        info::ModelInfo,
        spec::{LoadOptions, VariantSpec},
    },
    onnx::{Folder, Limits, Model, Patch, Weights},
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
