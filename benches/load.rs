//! (d) Memory: a worker with four variants of MiniLM by one with one, and what an unload leaves. (e) Time: a load of MiniLM with its
//! certificate, and of one more variant. Aims: four variants take at most 1.15 times the memory of one, an unload gives all of it back.

mod support;

use introspectd::service::wire::introspect as pb;
use serde_json::json;
use support::{
    models,
    report::{Options, Report, median},
    served::{Served, capture, read},
};

/// Most memory of four variants by that of one.
const AIM: f64 = 1.15;
const RUNS: usize = 5;
/// Kinds that the daemon shows on variants of their own.
const KINDS: [&str; 3] = ["pattern", "hook_q", "post"];

fn main() {
    let options = Options::read();
    let runs = options.runs(RUNS);
    let columns = ["what", "runs", "median", "unit", "aim", "verdict"];
    let mut report = Report::new("load and memory: MiniLM", &options, &columns);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime for the client");
    runtime.block_on(async {
        let folder = models::minilm();
        let served = Served::start(&[("minilm", &folder)], &[]).await;
        let mut models = served.models().await;
        let mut captures = served.captures().await;
        let row = models::row(32, 5);
        let (mut loads, mut builds) = (Vec::new(), Vec::new());
        let (mut one, mut four) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            let request = pb::ReloadModelRequest {
                model: "minilm".to_owned(),
            };
            models.reload_model(request).await.expect("it loads again");
            let model = served.model("minilm").await;
            loads.push(model.load_stages.iter().map(|s| s.seconds * 1e3).sum());
            let worker = newest(&served).await;
            read(&mut captures, capture("minilm", &row, &[])).await;
            one.push(private_and_shared(worker));
            for kind in KINDS {
                let (_, summary) =
                    read(&mut captures, capture("minilm", &row, &[kind.to_owned()])).await;
                builds.push(summary.timings.unwrap_or_default().build_seconds * 1e3);
            }
            four.push(private_and_shared(worker));
        }
        let ratio = median(&four) / median(&one);
        let verdict = report.verdict(ratio <= AIM);
        let mut row = |what: &str, n: usize, value: f64, unit: &str| {
            report.row(vec![
                json!(what),
                json!(n),
                json!(value),
                json!(unit),
                json!(""),
                json!(""),
            ]);
        };
        row("load, with certificate", runs, median(&loads), "ms");
        row("one more variant", builds.len(), median(&builds), "ms");
        row("worker with one variant", runs, median(&one), "MB");
        row("worker with four variants", runs, median(&four), "MB");
        report.row(vec![
            json!("four by one"),
            json!(runs),
            json!(ratio),
            json!("ratio"),
            json!(AIM),
            verdict,
        ]);
        let request = pb::UnloadModelRequest {
            model: "minilm".to_owned(),
        };
        models.unload_model(request).await.expect("it unloads");
        let gone = served.workers().is_empty();
        let verdict = report.verdict(gone);
        report.row(vec![
            json!("workers after an unload"),
            json!(1),
            json!(served.workers().len()),
            json!("processes"),
            json!(0),
            verdict,
        ]);
    });
    report.print();
}

/// The worker of the generation that serves; the one before it ends in the background.
async fn newest(served: &Served) -> u32 {
    loop {
        if let [only] = served.workers()[..] {
            return only;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Proportional set size in megabytes: its own pages, and its part of those that it shares.
fn private_and_shared(pid: u32) -> f64 {
    let text =
        std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the worker lives");
    let line = text
        .lines()
        .find(|l| l.starts_with("Pss:"))
        .expect("the kernel counts it");
    let kilobytes: f64 = line
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("a number");
    kilobytes / 1e3
}
