//! (a) What the daemon adds to a predict: `ModelInfer` with tensors over the loopback, hop to the worker included, against a bare
//! run of the same model. Aim: at most 1 ms more, by the medians.

mod support;

use std::time::Instant;

use serde_json::json;
use support::{
    bare::{self, Bare},
    models,
    report::{Options, Pairs, Report, median},
    served::{Served, predict},
};

/// Most that may be added, in milliseconds.
const AIM: f64 = 1.0;
const RUNS: usize = 500;
const WARM_UP: usize = 50;

fn main() {
    bare::without_telemetry();
    let options = Options::read();
    let runs = options.runs(RUNS);
    let columns = [
        "tokens",
        "runs",
        "daemon ms",
        "bare ms",
        "added ms",
        "aim ms",
        "verdict",
    ];
    let mut report = Report::new("predict: demo model, logits only", &options, &columns);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime for the client");
    runtime.block_on(async {
        let folder = models::demo();
        let served = Served::start(&[("demo", &folder)], &[]).await;
        let mut client = served.inference().await;
        let mut session = Bare::open(&folder);
        for tokens in [8, 32, 128] {
            let row = models::row(tokens, 7);
            let mut pairs = Pairs::default();
            for run in 0..WARM_UP + runs {
                let begun = Instant::now();
                let answer = client.model_infer(predict("demo", &row)).await;
                let logits = answer
                    .expect("a prediction")
                    .into_inner()
                    .raw_output_contents;
                let ours = begun.elapsed();
                let mut same = false;
                let bare = session.run(&[&row], |out| same = close(&logits[0], out));
                assert!(same, "the daemon answers what the model says");
                if run >= WARM_UP {
                    pairs.push(ours, bare);
                }
            }
            let verdict = report.verdict(pairs.added() <= AIM);
            report.row(vec![
                json!(tokens),
                json!(runs),
                json!(median(&pairs.ours)),
                json!(median(&pairs.bare)),
                json!(pairs.added()),
                json!(AIM),
                verdict,
            ]);
        }
    });
    report.print();
}

/// Same numbers up to rounding: both run the same kernels on the same row.
fn close(ours: &[u8], bare: &ort::session::SessionOutputs<'_>) -> bool {
    let (_, bare) = bare[0]
        .try_extract_tensor::<f32>()
        .expect("logits are floats");
    let ours = ours
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b));
    ours.len() == bare.len() && ours.zip(bare).all(|(a, b)| (a - b).abs() < 1e-4)
}
