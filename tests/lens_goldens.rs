//! Lenses against PyTorch's own states, heads and writes (`reference.npz` of the models), taken through the definitions in double precision with the
//! weights of the file: the logit lens with the norm recomputed, direct logit attribution with the norm's scale as it was.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/arrays.rs"]
mod arrays;
#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/lens.rs"]
mod lens_support;
mod support;

use std::path::{Path, PathBuf};

use daemon::TestDaemon;
use introspectd::service::wire::introspect as pb;
use lens_support::{Answer, ask, far, tokens};
use ndarray::{Array1, Array2, ArrayD, Ix1, Ix2, s};
use support::{Named, array, fixtures, open, reference};

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;
/// The row of the reference that has no padding.
const ROW: usize = 0;
const LAYERS: usize = 3;
const HEADS: usize = 4;
const TARGET: u32 = 7;

fn fixture(name: &str) -> PathBuf {
    fixtures().into_iter().find(|f| f.ends_with(name)).unwrap()
}

/// The weight of a file whose name ends so.
fn weight(folder: &Path, ending: &str) -> ArrayD<f64> {
    let model = open(folder).unwrap();
    let mut all = model.graph.initializers();
    let (_, found) = all.find(|(name, _)| name.ends_with(ending)).unwrap();
    array(&found.tensor().unwrap()).mapv(f64::from)
}

fn matrix(folder: &Path, ending: &str) -> Array2<f64> {
    weight(folder, ending).into_dimensionality::<Ix2>().unwrap()
}

fn vector(folder: &Path, ending: &str) -> Array1<f64> {
    weight(folder, ending).into_dimensionality::<Ix1>().unwrap()
}

/// `[position, ...]` of the row.
fn row(reference: &Named, name: &str) -> Array2<f64> {
    let all = array(&reference[name]).mapv(f64::from);
    let of_row = all.index_axis(ndarray::Axis(0), ROW).to_owned();
    let positions = of_row.shape()[0];
    let width = of_row.len() / positions;
    Array2::from_shape_vec((positions, width), of_row.iter().copied().collect()).unwrap()
}

fn ids(reference: &Named) -> Vec<u32> {
    let bytes = reference["in_input_ids"].bytes();
    let all = bytes.as_chunks().0.iter();
    let all = all.map(|b| i64::from_le_bytes(*b) as u32);
    all.skip(ROW * 12).take(12).collect()
}

/// What a final norm divides by.
fn deviation(h: &[f64]) -> f64 {
    let n = h.len() as f64;
    let mean = h.iter().sum::<f64>() / n;
    (h.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + 1e-5).sqrt()
}

fn normed(h: &Array2<f64>, gain: &Array1<f64>, bias: &Array1<f64>) -> Array2<f64> {
    let mut out = h.clone();
    for mut x in out.rows_mut() {
        let (size, mean) = (deviation(&x.to_vec()), x.mean().unwrap());
        x.mapv_inplace(|v| (v - mean) / size);
        x *= gain;
        x += bias;
    }
    out
}

async fn lensed(d: &TestDaemon, model: &str, ids: &[u32], part: pb::LensPart) -> Answer {
    let choice = pb::Choice {
        what: Some(pb::choice::What::Index(if model.starts_with("gpt2") {
            TARGET
        } else {
            1
        })),
        position: None,
    };
    let request = pb::LensRequest {
        model: model.to_owned(),
        input: tokens(ids),
        parts: vec![part.into()],
        target: Some(pb::Target {
            quantity: 0,
            of: Some(pb::target::Of::Choice(choice)),
        }),
        logits: true,
        ..pb::LensRequest::default()
    };
    ask(d, request)
        .await
        .unwrap_or_else(|e| panic!("{model}: {e:?}"))
}

fn values(of: &Array2<f64>) -> Vec<f64> {
    of.iter().copied().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn states_go_through_the_final_norm_and_the_unembedding() {
    let models = [
        "gpt2.legacy14",
        "gpt2.dynamo20",
        "gpt2.fused",
        "gpt2.attention23",
        "gpt2.unidirectional",
    ];
    let d = TestDaemon::with(&models).await;
    let folder = fixture("gpt2.legacy14");
    let unembed = matrix(&folder, "wte.weight");
    let gain = vector(&folder, "ln_f.weight");
    let bias = vector(&folder, "ln_f.bias");
    for model in models {
        let reference = reference(&fixture(model));
        let state = |layer: usize| match layer {
            LAYERS => {
                let writes = row(&reference, "attn_out_2") + row(&reference, "mlp_out_2");
                row(&reference, "hidden_2") + writes
            }
            layer => row(&reference, &format!("hidden_{layer}")),
        };
        let ids = ids(&reference);
        let answer = lensed(&d, model, &ids, pb::LensPart::Lens).await;
        for layer in 0..=LAYERS {
            let wanted = normed(&state(layer), &gain, &bias).dot(&unembed.t());
            let off = far(answer.state("logits", layer), &values(&wanted));
            assert!(off < REWRITTEN, "{model} {layer}: {off}");
        }

        // The last position alone is read, by the scale that the norm has there.
        let answer = lensed(&d, model, &ids, pb::LensPart::Attribution).await;
        let end = state(LAYERS);
        let last = end.nrows() - 1;
        let size = deviation(&end.row(last).to_vec());
        let read = &gain * &unembed.row(TARGET as usize);
        let read = (&read - read.mean().unwrap()) / size;
        let writes = |name: &str| row(&reference, name).row(last).dot(&read);
        let mut wanted = vec![writes("hidden_0")];
        let mut heads = Vec::new();
        for layer in 0..LAYERS {
            wanted.push(writes(&format!("attn_out_{layer}")));
            wanted.push(writes(&format!("mlp_out_{layer}")));
            let z = row(&reference, &format!("z_{layer}"));
            let out = matrix(&folder, &format!("h.{layer}.attn.c_proj.weight"));
            let size = z.ncols() / HEADS;
            for head in 0..HEADS {
                let of = s![head * size..(head + 1) * size];
                let written = z
                    .row(last)
                    .slice(of)
                    .dot(&out.slice(s![head * size..(head + 1) * size, ..]));
                heads.push(written.dot(&read));
            }
        }
        let at_last = |name: &str| -> Vec<f64> {
            let rows = answer.values(name).chunks_exact(last + 1);
            rows.map(|r| r[last]).collect()
        };
        let off = far(&at_last("contributions"), &wanted);
        assert!(off < REWRITTEN, "{model}: {off}");
        let off = far(&at_last("head_contributions"), &heads);
        assert!(off < REWRITTEN, "{model}: {off}");
        let facts = answer.attribution.as_ref().unwrap();
        let of_norm = bias.dot(&unembed.row(TARGET as usize));
        let largest = wanted.iter().fold(0f64, |m, v| m.max(v.abs()));
        assert!(
            (facts.bias - of_norm).abs() < REWRITTEN * largest,
            "{model}"
        );
        let logits = row(&reference, "logits");
        let logit = logits[[last, TARGET as usize]];
        assert!(
            (facts.value - logit).abs() < REWRITTEN * logit.abs(),
            "{model}"
        );
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_vector_goes_through_the_pooler_and_the_head() {
    let models = [
        "bert.legacy14",
        "bert.dynamo20",
        "bert.fused",
        "bert.sdpa17",
    ];
    let d = TestDaemon::with(&models).await;
    let folder = fixture("bert.legacy14");
    let pool = matrix(&folder, "pooler.dense.weight");
    let pool_bias = vector(&folder, "pooler.dense.bias");
    let head = matrix(&folder, "classifier.weight");
    let head_bias = vector(&folder, "classifier.bias");
    for model in models {
        let reference = reference(&fixture(model));
        let answer = lensed(&d, model, &ids(&reference), pb::LensPart::Lens).await;
        for layer in 0..=LAYERS {
            let state = row(&reference, &format!("hidden_{layer}"));
            let pooled = (state.dot(&pool.t()) + &pool_bias).mapv(f64::tanh);
            let wanted = pooled.dot(&head.t()) + &head_bias;
            let off = far(answer.state("logits", layer), &values(&wanted));
            assert!(off < REWRITTEN, "{model} {layer}: {off}");
            // This pooler reads the first position.
            let whole = answer.state("whole_logits", layer);
            let off = far(whole, &wanted.row(0).to_vec());
            assert!(off < REWRITTEN, "{model} {layer}: {off}");
        }
    }
    d.stop().await;
}

/// Who is held against which golden numbers.
const ANALYSED: [(&str, &[&str]); 6] = [
    ("gpt2", &["gpt2.legacy14", "gpt2.dynamo20", "gpt2.fused"]),
    (
        "llama",
        &["llama.legacy14", "llama.attention23", "llama.fused"],
    ),
    ("bert", &["bert.legacy14", "bert.attention23", "bert.fused"]),
    ("distilbert", &["distilbert.legacy14", "distilbert.fused"]),
    ("circuit", &["circuit.legacy17"]),
    ("induction", &["induction.legacy17"]),
];

/// `tests/fixtures/make/analysis_lens.py`, whose attribution to heads is TransformerLens's.
#[tokio::test(flavor = "multi_thread")]
async fn lenses_of_every_architecture_are_those_of_pytorch() {
    let models: Vec<&str> = ANALYSED
        .iter()
        .flat_map(|(_, m)| m.iter().copied())
        .collect();
    let d = TestDaemon::with(&models).await;
    for (golden, models) in ANALYSED {
        let golden = arrays::read(&format!("analysis/{golden}.npz"));
        let wanted = |name: &str| -> Vec<f64> { golden[name].iter().copied().collect() };
        let ids: Vec<u32> = golden["ids"].iter().map(|v| *v as u32).collect();
        let mut parts = vec![pb::LensPart::Lens.into(), pb::LensPart::Residual.into()];
        let attributed = golden.get("dla/token").map(|t| t[[0]] as u32);
        parts.extend(attributed.map(|_| i32::from(pb::LensPart::Attribution)));
        for model in models {
            let request = pb::LensRequest {
                model: (*model).to_owned(),
                input: tokens(&ids),
                parts: parts.clone(),
                logits: true,
                ..pb::LensRequest::default()
            };
            let answer = ask(&d, request)
                .await
                .unwrap_or_else(|e| panic!("{model}: {e:?}"));
            let same = |ours: &[f64], name: &str| {
                let off = far(ours, &wanted(name));
                assert!(off < REWRITTEN, "{model} {name}: {off}");
            };
            same(answer.values("logits"), "lens/logits");
            if golden.contains_key("lens/whole") {
                same(answer.values("whole_logits"), "lens/whole");
            }
            same(answer.values("residual_norm"), "resid/norm");
            same(answer.values("residual_step_cosine"), "resid/cosine_next");
            same(answer.values("residual_cosine"), "resid/cosine");
            let Some(token) = attributed else {
                continue;
            };
            // The greatest logit at the last position is what is followed by default.
            let facts = answer.attribution.as_ref().unwrap();
            assert_eq!(answer.header.terms[0].index, token, "{model}");
            same(&[facts.value], "dla/logit");
            let at_last = |name: &str| -> Vec<f64> {
                let rows = answer.values(name).chunks_exact(ids.len());
                rows.map(|r| r[ids.len() - 1]).collect()
            };
            // Relative to the logit's greatest part: some are zero.
            let parts = at_last("contributions");
            let largest = parts.iter().fold(0f64, |m, v| m.max(v.abs()));
            let part = |ours: &[f64], name: &str| {
                let wanted = wanted(name);
                assert_eq!(ours.len(), wanted.len(), "{model} {name}");
                for (a, b) in ours.iter().zip(&wanted) {
                    let off = (a - b).abs() / largest;
                    assert!(off < REWRITTEN, "{model} {name}: {ours:?} {wanted:?}");
                }
            };
            let of = |ending: &str| -> Vec<f64> {
                let named = facts.components.iter().zip(&parts);
                let named = named.filter(|(name, _)| name.ends_with(ending));
                named.map(|(_, v)| *v).collect()
            };
            part(&of("hook_resid_pre"), "dla/embed");
            part(&of("hook_mlp_out"), "dla/mlp");
            part(&at_last("head_contributions"), "dla/head");
            part(&at_last("head_bias"), "dla/attn_bias");
            part(&[facts.bias], "dla/bias");
        }
    }
    d.stop().await;
}
