//! (c) Throughput of 32 concurrent clients whose texts differ in length, against static batching with the bare runtime: rows in the
//! order of their arrival, so many at a time, padded to the longest of the batch. Aim: at least 0.95 of the best batch size.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use support::{
    bare::{self, Bare},
    models,
    report::{Options, Report, median},
    served::{self, Served, predict},
};

/// Least throughput by that of the best static batching.
const AIM: f64 = 0.95;
const CLIENTS: usize = 32;
const ROWS: usize = 1024;
const RUNS: usize = 9;
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];

fn main() {
    bare::without_telemetry();
    let options = Options::read();
    let runs = options.runs(RUNS);
    let columns = ["side", "runs", "rows/s", "ratio", "aim", "verdict"];
    let mut report = Report::new(
        "throughput: demo model, 32 clients, 8 to 128 tokens",
        &options,
        &columns,
    );
    served::clients().block_on(async {
        let folder = models::demo();
        let served = Served::start(&[("demo", &folder)], &[]).await;
        let rows = Arc::new(mixed());
        let mut session = Bare::open(&folder);
        let mut ours = Vec::new();
        let mut bare = vec![Vec::new(); BATCHES.len()];
        clients(&served, &rows).await; // warm
        for _ in 0..runs {
            ours.push(per_second(clients(&served, &rows).await));
            for (size, seen) in BATCHES.iter().zip(&mut bare) {
                let begun = Instant::now();
                for batch in rows.chunks(*size) {
                    let batch: Vec<&[i64]> = batch.iter().map(Vec::as_slice).collect();
                    session.run(&batch, |out| assert_eq!(out.len(), 1));
                }
                seen.push(per_second(begun.elapsed()));
            }
        }
        let best = bare.iter().map(|b| median(b)).fold(0.0, f64::max);
        for (size, seen) in BATCHES.iter().zip(&bare) {
            let name = format!("bare, {size} at a time");
            let ratio = median(seen) / best;
            report.row(vec![
                json!(name),
                json!(runs),
                json!(median(seen)),
                json!(ratio),
                json!(""),
                json!(""),
            ]);
        }
        let ratio = median(&ours) / best;
        let verdict = report.verdict(ratio >= AIM);
        report.row(vec![
            json!("daemon"),
            json!(runs),
            json!(median(&ours)),
            json!(ratio),
            json!(AIM),
            verdict,
        ]);
    });
    report.print();
}

/// Rows whose lengths differ as texts do: most are short.
fn mixed() -> Vec<Vec<i64>> {
    let mut state = 3;
    (0..ROWS as u64)
        .map(|n| {
            let uniform = |state: &mut u64| (models::splitmix(state) % 1000) as f64 / 1000.0;
            let length = 8.0 + 120.0 * uniform(&mut state) * uniform(&mut state);
            models::row(length as usize, n)
        })
        .collect()
}

/// All rows once, by clients on connections of their own that take one after the other.
async fn clients(served: &Served, rows: &Arc<Vec<Vec<i64>>>) -> Duration {
    let mut connected = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        connected.push(served.inference().await);
    }
    let next = Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    let tasks: Vec<_> = connected
        .into_iter()
        .map(|mut client| {
            let (rows, next) = (rows.clone(), next.clone());
            tokio::spawn(async move {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let answer = client.model_infer(predict("demo", row)).await;
                    assert_eq!(answer.expect("a prediction").into_inner().outputs.len(), 1);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a client ends");
    }
    begun.elapsed()
}

fn per_second(took: Duration) -> f64 {
    ROWS as f64 / took.as_secs_f64()
}
