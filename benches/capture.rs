//! (b) What it costs to stream what happens inside: captures of MiniLM over the loopback against a bare run of a graph that fetches the same
//! values. Aim: at most 1.25 times as long, for everything that there is to see at 128 tokens.
//!
//! Beside it stands the floor: a bare run, and then the same bytes over a plain loopback socket. What is sent after a run by TCP
//! cannot cost less, whoever sends it.
//!
//! The bare run fetches every value once, while hook points that are the same value under two names (`resid_post` of a block is
//! `resid_pre` of the next) are sent once for each name that is asked for; "everything" asks for each value by one name.

mod support;

use std::{collections::BTreeSet, time::Instant};

use introspectd::service::wire::introspect as pb;
use serde_json::json;
use support::{
    bare::{self, Bare},
    models,
    plain::Plain,
    report::{Options, Pairs, Report, median, millis},
    served::{Served, capture, read},
};

/// Most time of a capture of everything by that of the bare run.
const AIM: f64 = 1.25;
const RUNS: usize = 60;
const WARM_UP: usize = 8;

fn main() {
    bare::without_telemetry();
    let options = Options::read();
    let runs = options.runs(RUNS);
    let columns = [
        "selection",
        "tokens",
        "MB",
        "runs",
        "daemon ms",
        "bare ms",
        "ratio",
        "socket ms",
        "floor",
        "aim",
        "verdict",
    ];
    let mut report = Report::new("capture: MiniLM", &options, &columns);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime for the client");
    runtime.block_on(async {
        let folder = models::minilm();
        let served = Served::start(&[("minilm", &folder)], &[]).await;
        let model = served.model("minilm").await;
        let mut client = served.captures().await;
        for (name, wanted, tokens, aim) in [
            ("everything", everything(&model), 128, Some(AIM)),
            ("everything", everything(&model), 32, None),
            ("attentions and hidden states", usual(&model), 128, None),
            ("attentions and hidden states", usual(&model), 32, None),
        ] {
            let hooks: Vec<String> = wanted.iter().map(|h| h.name.clone()).collect();
            let values: Vec<String> = wanted.iter().map(|h| h.value.clone()).collect();
            let mut session = Bare::showing(&folder, &values);
            let mut plain = Plain::connect();
            let mut socket = Vec::new();
            let row = models::row(tokens, 11);
            let mut pairs = Pairs::default();
            let mut stages = [const { Vec::new() }; 4];
            let (mut sent, mut fetched) = (0, 0);
            for run in 0..WARM_UP + runs {
                let begun = Instant::now();
                let (tensors, summary) = read(&mut client, capture("minilm", &row, &hooks)).await;
                let ours = begun.elapsed();
                assert!(tensors.len() >= hooks.len(), "every hook point came");
                sent = summary.bytes;
                let bare = session.run(&[&row], |out| {
                    fetched = out
                        .values()
                        .map(|v| v.try_extract_tensor::<f32>().map_or(0, |(_, v)| v.len() * 4))
                        .sum();
                });
                if run >= WARM_UP {
                    pairs.push(ours, bare);
                    socket.push(millis(plain.fetch(fetched)));
                    let t = summary.timings.unwrap_or_default();
                    let times = [t.run_seconds, t.reduce_seconds, t.encode_seconds, t.queue_seconds];
                    for (stage, seconds) in stages.iter_mut().zip(times) {
                        stage.push(seconds * 1e3);
                    }
                }
            }
            assert_eq!(sent, fetched as u64, "both sides hold the same bytes");
            let verdict = match aim {
                Some(aim) => report.verdict(pairs.ratio() <= aim),
                None => json!(""),
            };
            report.row(vec![
                json!(name),
                json!(tokens),
                json!(sent as f64 / 1e6),
                json!(runs),
                json!(median(&pairs.ours)),
                json!(median(&pairs.bare)),
                json!(pairs.ratio()),
                json!(median(&socket)),
                json!(1.0 + median(&socket) / median(&pairs.bare)),
                aim.map_or(json!(""), |aim| json!(aim)),
                verdict,
            ]);
            let [run, reduce, encode, queue] = stages.map(|s| median(&s));
            report.note(format!(
                "{name}, {tokens} tokens: the daemon tells {run:.2} ms run with the way to the worker, {queue:.2} ms queue, \
                 {reduce:.2} ms reduce, {encode:.2} ms encode and send"
            ));
        }
    });
    report.print();
}

/// Every hook point, each value once; the model's own output comes anyway.
fn everything(model: &pb::Model) -> Vec<pb::HookPoint> {
    let mut seen = BTreeSet::from([model.main_output.clone()]);
    let hooks = model.hooks.iter();
    hooks
        .filter(|h| seen.insert(h.value.clone()))
        .cloned()
        .collect()
}

/// What `output_attentions` and `output_hidden_states` give: the patterns and the residual stream between the blocks.
fn usual(model: &pb::Model) -> Vec<pb::HookPoint> {
    let mut usual = everything(model);
    usual.retain(|h| {
        h.aliases
            .iter()
            .any(|a| a.starts_with("attentions.") || a.starts_with("hidden_states."))
    });
    usual
}
