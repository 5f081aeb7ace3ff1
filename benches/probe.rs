//! Probes in the serving path. (a) A score at layer 3 of 6 against a predict, the whole forward pass of the same row. Aim: at most 0.6 of
//! its time. (b) Eight clients that stream scores of a probe at the last layer together with the prediction, against eight that stream
//! predicts. Aim: at least 0.9 of their rows per second.

mod support;

use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use introspectd::service::wire::introspect::{
    self as pb, probe_service_client::ProbeServiceClient, score_stream_response::Answer,
};
use serde_json::json;
use support::{
    models,
    report::{Options, Pairs, Report, median, millis},
    served::{self, Served, predict},
};
use tonic::transport::Channel;

/// Most of a predict's time that an early score may take.
const EARLY: f64 = 0.6;
/// Least throughput by that of predicts.
const STREAMED: f64 = 0.9;
const RUNS: usize = 200;
const WARM_UP: usize = 20;
const STREAMS: usize = 7;
const CLIENTS: usize = 8;
const ROWS: usize = 32;

fn main() {
    let options = Options::read();
    let columns = ["what", "runs", "ours", "predict", "ratio", "aim", "verdict"];
    let mut report = Report::new(
        "probe: a classifier of MiniLM's size (6 layers of 384)",
        &options,
        &columns,
    );
    served::clients().block_on(async {
        let folder = models::classifier();
        let served = Served::start(&[("m", &folder)], &[]).await;
        let mut probes = ProbeServiceClient::new(served.channel().await);
        for layer in [3, 6] {
            bring(&mut probes, layer).await;
        }
        for tokens in [32, 128] {
            let pairs = early(&served, &mut probes, tokens, options.runs(RUNS)).await;
            let ratio = pairs.ratio();
            let verdict = report.verdict(ratio <= EARLY);
            report.row(vec![
                json!(format!("ms, layer 3 of 6, {tokens} tokens")),
                json!(options.runs(RUNS)),
                json!(median(&pairs.ours)),
                json!(median(&pairs.bare)),
                json!(ratio),
                json!(EARLY),
                verdict,
            ]);
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for run in 0..=options.runs(STREAMS) {
            let (scores, predicts) = (scores(&served).await, predicts(&served).await);
            if run > 0 {
                ours.push(per_second(scores));
                theirs.push(per_second(predicts));
            }
        }
        let ratio = median(&ours) / median(&theirs);
        let verdict = report.verdict(ratio >= STREAMED);
        report.row(vec![
            json!(format!(
                "rows/s, {CLIENTS} streams, 64 tokens, with prediction"
            )),
            json!(options.runs(STREAMS)),
            json!(median(&ours)),
            json!(median(&theirs)),
            json!(ratio),
            json!(STREAMED),
            verdict,
        ]);
    });
    report.print();
}

fn name(layer: usize) -> String {
    format!("layer-{layer}")
}

/// Stores a probe with weights of no meaning: what they are costs nothing.
async fn bring(probes: &mut ProbeServiceClient<Channel>, layer: usize) {
    const WIDTH: usize = 384;
    let request = pb::ImportProbeRequest {
        model: "m".to_owned(),
        name: name(layer),
        from: Some(pb::import_probe_request::From::Linear(pb::LinearProbe {
            hook: format!("hidden_states.{layer}"),
            pooling: pb::Pooling::Mean.into(),
            labels: vec!["no".to_owned(), "yes".to_owned()],
            weight: vec![0.01; WIDTH],
            bias: vec![0.0],
        })),
        ..pb::ImportProbeRequest::default()
    };
    probes.import_probe(request).await.expect("it is stored");
}

fn score(layer: usize, row: &[i64], predict: bool) -> pb::ScoreRequest {
    let ids = row.iter().map(|id| u32::try_from(*id).expect("an id"));
    let tokens = pb::TokenIds {
        ids: ids.collect(),
        type_ids: Vec::new(),
    };
    pb::ScoreRequest {
        model: "m".to_owned(),
        probes: vec![pb::ProbeReference {
            name: name(layer),
            ..pb::ProbeReference::default()
        }],
        of: Some(pb::score_request::Of::Input(pb::Input {
            kind: Some(pb::input::Kind::Tokens(tokens)),
        })),
        predict,
        ..pb::ScoreRequest::default()
    }
}

/// Scores and predicts of one row, in turn.
async fn early(
    served: &Served,
    probes: &mut ProbeServiceClient<Channel>,
    tokens: usize,
    runs: usize,
) -> Pairs {
    let mut inference = served.inference().await;
    let row = models::row(tokens, 7);
    let mut pairs = Pairs::default();
    for run in 0..WARM_UP + runs {
        let begun = Instant::now();
        let answer = probes.score(score(3, &row, false)).await.expect("scores");
        let ours = begun.elapsed();
        assert!(answer.into_inner().scores[0].input.is_some());
        let begun = Instant::now();
        let answer = inference.model_infer(predict("m", &row)).await;
        let theirs = begun.elapsed();
        assert_eq!(answer.expect("a prediction").into_inner().outputs.len(), 1);
        if run >= WARM_UP {
            pairs.push(ours, theirs);
        }
    }
    pairs
}

/// The rows of a client.
fn rows(client: usize) -> impl Iterator<Item = Vec<i64>> {
    (0..ROWS).map(move |at| models::row(64, (client * ROWS + at) as u64))
}

async fn scores(served: &Served) -> Duration {
    let mut connected = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        connected.push(ProbeServiceClient::new(served.channel().await));
    }
    let begun = Instant::now();
    let all = connected.into_iter().enumerate().map(|(at, mut client)| {
        tokio::spawn(async move {
            let requests = rows(at).map(|row| pb::ScoreStreamRequest {
                request: Some(score(6, &row, true)),
                ..pb::ScoreStreamRequest::default()
            });
            let requests: Vec<_> = requests.collect();
            let answers = client.score_stream(stream::iter(requests)).await;
            let mut answers = answers.expect("a stream").into_inner();
            let mut scored = 0;
            while let Some(answer) = answers.next().await {
                match answer.expect("an answer").answer {
                    Some(Answer::Scores(one)) => {
                        assert!(one.prediction.is_some(), "from the same run");
                        scored += 1;
                    }
                    Some(Answer::Summary(_)) => {}
                    other => panic!("no scores: {other:?}"),
                }
            }
            assert_eq!(scored, ROWS);
        })
    });
    futures::future::try_join_all(all)
        .await
        .expect("every client ends");
    begun.elapsed()
}

async fn predicts(served: &Served) -> Duration {
    let mut connected = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        connected.push(served.inference().await);
    }
    let begun = Instant::now();
    let all = connected.into_iter().enumerate().map(|(at, mut client)| {
        tokio::spawn(async move {
            let requests: Vec<_> = rows(at).map(|row| predict("m", &row)).collect();
            let answers = client.model_stream_infer(stream::iter(requests)).await;
            let answers = answers.expect("a stream").into_inner();
            let predicted = answers
                .map(|answer| answer.expect("an answer").error_message)
                .filter(|error| std::future::ready(error.is_empty()))
                .count();
            assert_eq!(predicted.await, ROWS);
        })
    });
    futures::future::try_join_all(all)
        .await
        .expect("every client ends");
    begun.elapsed()
}

fn per_second(time: Duration) -> f64 {
    (CLIENTS * ROWS) as f64 * 1e3 / millis(time)
}
