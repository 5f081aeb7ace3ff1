//! Captures over real gRPC with real workers: PyTorch's numbers, every way to select, every error.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/goldens.rs"]
mod goldens;

use daemon::{Answer, Reader, TestDaemon, hooks, ids, request, text};
use futures::StreamExt as _;
use introspectd::service::wire::introspect::{self as pb, capture_stream_response as bulk};
use tonic::Code;
use tonic_types::StatusExt as _;

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;

fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1e-30f64, |m, v| m.max(f64::from(v.abs())));
    a.iter()
        .zip(b)
        .map(|(x, y)| f64::from((x - y).abs()))
        .fold(0.0, f64::max)
        / largest
}

/// Rows of the reference, padded in one batch there, come one by one and unpadded here: a batch row is a single row, and padding
/// does not show.
#[tokio::test(flavor = "multi_thread")]
async fn hidden_states_attentions_and_logits_equal_pytorch_row_by_row() {
    let names = [
        "bert.legacy14",
        "bert.dynamo20",
        "distilbert.legacy14",
        "distilbert.dynamo20",
        "gpt2.legacy14",
        "gpt2.dynamo20",
        "llama.legacy14",
        "llama.dynamo20",
    ];
    let d = TestDaemon::with(&names).await;
    for name in names {
        let golden = goldens::Golden::read(name);
        for row in 0..golden.rows() {
            let tokens = golden.tokens(row);
            let n = tokens.len();
            let all = pb::Selection {
                logits: pb::Logits::All.into(),
                ..hooks(&["hidden_states.*", "attentions.*"])
            };
            let answer = d.capture(ids(name, &tokens, all)).await.unwrap();
            let model = d.model(name).await;
            let mut seen = 0;
            for hook in &model.hooks {
                for alias in &hook.aliases {
                    let wanted = match alias.split_once('.') {
                        Some(("hidden_states", i)) => golden.hidden(i, row, n),
                        Some(("attentions", i)) => golden.attention(i, row, n),
                        _ => continue,
                    };
                    let Some(wanted) = wanted else { continue };
                    let off = distance(&answer.values(&hook.name), &wanted);
                    assert!(off <= REWRITTEN, "{name} row {row} {alias}: {off}");
                    seen += 1;
                }
            }
            assert_eq!(
                seen,
                golden.count(),
                "{name}: every hidden state and attention"
            );
            let off = distance(&answer.values(&model.main_output), &golden.logits(row, n));
            assert!(off <= REWRITTEN, "{name} row {row} logits: {off}");
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_selection_is_a_part_of_everything() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let model = "bert.legacy14";
    let tokens = [2u32, 11, 12, 13, 3];
    let (layers, heads, width) = (3usize, 4usize, 32usize);
    let whole = d
        .capture(ids(
            model,
            &tokens,
            hooks(&["pattern", "resid_post", "hook_embed"]),
        ))
        .await
        .unwrap();
    let pattern = whole.values("blocks.1.attn.hook_pattern");
    let resid = whole.values("blocks.1.hook_resid_post");
    assert_eq!(whole.shape("blocks.1.attn.hook_pattern"), [heads, 5, 5]);
    assert_eq!(
        whole.axes["blocks.1.attn.hook_pattern"],
        ["head", "query", "key"]
    );
    assert_eq!(whole.axes["blocks.1.hook_resid_post"], ["pos", "d_model"]);
    let sent: Vec<&String> = whole.header.tensors.iter().collect();
    assert_eq!(sent, whole.order.iter().collect::<Vec<_>>(), "as announced");
    assert_eq!(
        whole.order.len(),
        2 * layers + 2,
        "with the embedding and the logits"
    );
    assert_eq!(whole.header.estimated_bytes, whole.summary.bytes);
    assert_eq!(whole.header.tokens.len(), 5);

    // Heads and positions.
    let some = pb::Selection {
        heads: vec![2, 0],
        positions: vec![-1, 0],
        layers: vec![1],
        logits: pb::Logits::None.into(),
        ..hooks(&["pattern", "resid_post"])
    };
    let part = d.capture(ids(model, &tokens, some)).await.unwrap();
    assert_eq!(
        part.order,
        ["blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post"]
    );
    assert!(part.prediction.is_none());
    let row = |h: usize, q: usize| &pattern[(h * 5 + q) * 5..(h * 5 + q + 1) * 5];
    let wanted: Vec<f32> = [row(2, 4), row(2, 0), row(0, 4), row(0, 0)].concat();
    assert!(distance(&part.values("blocks.1.attn.hook_pattern"), &wanted) <= 1e-5);
    let at = |p: usize| &resid[p * width..(p + 1) * width];
    assert!(
        distance(
            &part.values("blocks.1.hook_resid_post"),
            &[at(4), at(0)].concat()
        ) <= 1e-5
    );

    // Pooling.
    for (pooling, of) in [
        (pb::Pooling::Cls, at(0).to_vec()),
        (pb::Pooling::Last, at(4).to_vec()),
        (
            pb::Pooling::Mean,
            (0..width)
                .map(|i| (0..5).map(|p| at(p)[i]).sum::<f32>() / 5.0)
                .collect(),
        ),
        (
            pb::Pooling::Max,
            (0..width)
                .map(|i| (0..5).map(|p| at(p)[i]).fold(f32::MIN, f32::max))
                .collect(),
        ),
    ] {
        let pooled = pb::Selection {
            pooling: pooling.into(),
            ..hooks(&["resid_post.1", "attentions.1"])
        };
        let answer = d.capture(ids(model, &tokens, pooled)).await.unwrap();
        assert_eq!(
            answer.axes["blocks.1.hook_resid_post"],
            ["d_model"],
            "{pooling:?}"
        );
        assert!(
            distance(&answer.values("blocks.1.hook_resid_post"), &of) <= 1e-5,
            "{pooling:?}"
        );
        assert_eq!(answer.shape("blocks.1.attn.hook_pattern"), [heads, 5, 5]);
        assert_eq!(answer.header.estimated_bytes, answer.summary.bytes);
    }

    // Halves.
    for (dtype, step) in [(pb::DType::F16, 1e-3), (pb::DType::Bf16, 1e-2)] {
        let half = pb::Selection {
            dtype: dtype.into(),
            ..hooks(&["resid_post.1"])
        };
        let answer = d.capture(ids(model, &tokens, half)).await.unwrap();
        assert_eq!(answer.tensors["blocks.1.hook_resid_post"].dtype().size(), 2);
        let off = distance(&answer.values("blocks.1.hook_resid_post"), &resid);
        assert!(off > 0.0 && off < step, "{dtype:?}: {off}");
    }

    // The greatest.
    let sparse = pb::Selection {
        top_k: Some(pb::TopK {
            k: 3,
            by_magnitude: true,
        }),
        sparse_attention: Some(pb::SparseAttention {
            top_k: 2,
            floor: Some(0.0),
        }),
        ..hooks(&["resid_post.1", "attentions.1"])
    };
    let answer = d.capture(ids(model, &tokens, sparse)).await.unwrap();
    let s = &answer.sparse["blocks.1.attn.hook_pattern"];
    assert_eq!(s.shape, [heads as u64, 5, 5]);
    assert_eq!(s.counts.len(), 4 * heads * 5);
    let values: Vec<f32> = s
        .values
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    let keys: Vec<u32> = s
        .indices
        .as_chunks()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    for (r, full) in pattern.chunks_exact(5).enumerate() {
        let mut best = full.to_vec();
        best.sort_by(|a, b| b.total_cmp(a));
        for i in 0..2 {
            assert!(
                (values[2 * r + i] - best[i]).abs() <= 6e-5,
                "four decimals of the greatest"
            );
            assert!((full[keys[2 * r + i] as usize] - best[i]).abs() <= 1e-5);
        }
    }
    assert_eq!(
        answer.sparse["blocks.1.hook_resid_post"].counts.len(),
        4 * 5
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_have_offsets_and_predictions_have_labels() {
    let d = TestDaemon::with(&["bert.legacy14", "gpt2.legacy14"]).await;
    let said = "good movie";
    let answer = d
        .capture(text("bert.legacy14", said, hooks(&[])))
        .await
        .unwrap();
    for token in answer.header.tokens.iter().filter(|t| !t.special) {
        let piece = &said[token.start as usize..token.end as usize];
        assert_eq!(piece, token.text.trim_start_matches("##"), "{token:?}");
    }
    let prediction = answer.prediction.clone().unwrap();
    assert_eq!(prediction.task, "sequence_classification");
    let candidates = &prediction.at[0].candidates;
    let mut labels: Vec<&str> = candidates.iter().map(|c| c.label.as_str()).collect();
    labels.sort_unstable();
    assert_eq!(labels, ["negative", "neutral", "positive"]);
    let sum: f32 = candidates.iter().filter_map(|c| c.probability).sum();
    assert!((sum - 1.0).abs() < 1e-5);
    assert!(candidates.is_sorted_by(|a, b| a.logit >= b.logit));

    // A language model: the last position only, its candidates spelled.
    let answer = d
        .capture(text("gpt2.legacy14", said, hooks(&[])))
        .await
        .unwrap();
    let n = answer.header.tokens.len();
    let prediction = answer.prediction.clone().unwrap();
    assert_eq!(prediction.at.len(), 1);
    assert_eq!(prediction.at[0].position, u32::try_from(n - 1).ok());
    assert_eq!(prediction.at[0].candidates.len(), 5);
    assert!(
        prediction.at[0]
            .candidates
            .iter()
            .any(|c| !c.label.is_empty())
    );
    let logits = answer.header.tensors.last().unwrap();
    assert_eq!(
        answer.shape(logits)[0],
        1,
        "not the logits of every position"
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_which_field_is_bad() {
    let d = TestDaemon::with(&["bert.legacy14", "vit.legacy14"]).await;
    let model = "bert.legacy14";
    let good = |s: pb::Selection| ids(model, &[2, 11, 3], s);
    let tensors = |tensors: Vec<pb::Tensor>| {
        request(
            model,
            pb::input::Kind::Tensors(pb::NamedTensors { tensors }),
            hooks(&[]),
        )
    };
    let tensor = |shape: &[u64], len: usize| pb::Tensor {
        name: "input_ids".into(),
        dtype: pb::DType::I64.into(),
        shape: shape.to_vec(),
        data: vec![0; len].into(),
        ..pb::Tensor::default()
    };
    let long = "word ".repeat(100_000);
    let cases: Vec<(&str, pb::CaptureRequest)> = vec![
        (
            "model",
            pb::CaptureRequest {
                model: String::new(),
                ..good(hooks(&[]))
            },
        ),
        (
            "input",
            pb::CaptureRequest {
                input: None,
                ..good(hooks(&[]))
            },
        ),
        (
            "input",
            pb::CaptureRequest {
                input: Some(pb::Input { kind: None }),
                ..good(hooks(&[]))
            },
        ),
        ("input.text.text", text(model, &long, hooks(&[]))),
        ("input.tokens.ids", ids(model, &[], hooks(&[]))),
        (
            "input.tokens.ids[1]",
            ids(model, &[1, 4_000_000_000], hooks(&[])),
        ),
        ("input.tokens.ids", ids(model, &[1; 500], hooks(&[]))),
        ("input.tensors.tensors", tensors(vec![])),
        (
            "input.tensors.tensors[0].shape",
            tensors(vec![tensor(&[2, 1], 16)]),
        ),
        (
            "input.tensors.tensors[0].shape",
            tensors(vec![tensor(&[1, 0], 0)]),
        ),
        (
            "input.tensors.tensors[0].shape",
            tensors(vec![tensor(&[u64::MAX, 2], 8)]),
        ),
        (
            "input.tensors.tensors[0].shape",
            tensors(vec![tensor(&[1; 65], 8)]),
        ),
        (
            "input.tensors.tensors[0].data",
            tensors(vec![tensor(&[1, 3], 16)]),
        ),
        (
            "input.tensors.tensors[0].data",
            tensors(vec![tensor(&[1, 1 << 62], 16)]),
        ),
        (
            "input.tensors.tensors[0].dtype",
            tensors(vec![pb::Tensor {
                dtype: 99,
                ..tensor(&[1, 2], 16)
            }]),
        ),
        (
            "input.tensors.tensors[0].offset",
            tensors(vec![pb::Tensor {
                offset: 1,
                ..tensor(&[1, 2], 16)
            }]),
        ),
        (
            "input.tensors",
            tensors(vec![pb::Tensor {
                name: "nobody".into(),
                ..tensor(&[1, 2], 16)
            }]),
        ),
        (
            "input.tensors",
            tensors(vec![tensor(&[1, 2], 16), tensor(&[1, 2], 16)]),
        ),
        (
            "selection.hooks[1]",
            good(hooks(&["pattern", "blocks.9.attn.hook_pattern"])),
        ),
        ("selection.hooks[0]", good(hooks(&["\u{1b}[31m\n\0"]))),
        (
            "selection.layers[0]",
            good(pb::Selection {
                layers: vec![3],
                ..hooks(&["pattern"])
            }),
        ),
        (
            "selection.heads[1]",
            good(pb::Selection {
                heads: vec![0, 4],
                ..hooks(&["pattern"])
            }),
        ),
        (
            "selection.positions[0]",
            good(pb::Selection {
                positions: vec![-4],
                ..hooks(&["pattern"])
            }),
        ),
        (
            "selection.positions[0]",
            good(pb::Selection {
                positions: vec![i32::MIN],
                ..hooks(&["pattern"])
            }),
        ),
        (
            "selection.pooling",
            good(pb::Selection {
                pooling: 77,
                ..hooks(&["pattern"])
            }),
        ),
        (
            "selection.dtype",
            good(pb::Selection {
                dtype: pb::DType::I8.into(),
                ..hooks(&["pattern"])
            }),
        ),
        (
            "selection.logits",
            good(pb::Selection {
                logits: -1,
                ..hooks(&["pattern"])
            }),
        ),
        (
            "selection",
            good(pb::Selection {
                logits: pb::Logits::None.into(),
                ..hooks(&[])
            }),
        ),
        (
            "selection.candidates",
            good(pb::Selection {
                candidates: 1001,
                ..hooks(&[])
            }),
        ),
        (
            "selection.top_k.k",
            good(pb::Selection {
                top_k: Some(pb::TopK::default()),
                ..hooks(&["pattern"])
            }),
        ),
        (
            "selection.sparse_attention.floor",
            good(pb::Selection {
                sparse_attention: Some(pb::SparseAttention {
                    top_k: 1,
                    floor: Some(f32::NAN),
                }),
                ..hooks(&["pattern"])
            }),
        ),
    ];
    for (field, request) in cases {
        let status = d.capture(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        let details = status.get_error_details();
        let named = &details.bad_request().unwrap().field_violations[0].field;
        assert_eq!(named, field, "{}", status.message());
        assert!(status.message().len() <= 1024);
        assert!(!status.message().contains(char::is_control));
    }

    let other = [
        (Code::NotFound, ids("nobody", &[1], hooks(&[]))),
        (Code::NotFound, ids("../bert.legacy14", &[1], hooks(&[]))),
        (
            Code::FailedPrecondition,
            text("vit.legacy14", "a picture", hooks(&[])),
        ),
        (Code::FailedPrecondition, good(hooks(&["value:nowhere"]))),
    ];
    for (code, request) in other {
        let status = d.capture(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert_eq!(
            status.get_details_error_info().unwrap().domain,
            "introspectd"
        );
    }
    let answer = d.capture(good(hooks(&["pattern"]))).await;
    assert!(answer.is_ok(), "the daemon serves on");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_that_is_too_large_is_refused_before_it_runs() {
    let d = TestDaemon::tuned(&["bert.legacy14"], |c| c.max_capture = 10_000).await;
    let status = d
        .capture(ids("bert.legacy14", &[2, 11, 12, 13, 14, 3], hooks(&["*"])))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(
        status.get_details_retry_info().is_none(),
        "a retry cannot help"
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn image_models_are_captured_by_their_tensors() {
    let d = TestDaemon::with(&["vit.legacy14"]).await;
    let model = d.model("vit.legacy14").await;
    let input = &model.inputs[0];
    let shape: Vec<u64> = input
        .dims
        .iter()
        .map(|d| u64::try_from(*d).unwrap_or(1))
        .collect();
    let n: u64 = shape.iter().product();
    let pixels = pb::Tensor {
        name: input.name.clone(),
        dtype: pb::DType::F32.into(),
        data: (0..n)
            .flat_map(|i| ((i % 7) as f32 / 7.0).to_le_bytes())
            .collect(),
        shape,
        ..pb::Tensor::default()
    };
    let kind = pb::input::Kind::Tensors(pb::NamedTensors {
        tensors: vec![pixels],
    });
    let answer = d
        .capture(request(
            "vit.legacy14",
            kind,
            hooks(&["pattern", "resid_post"]),
        ))
        .await
        .unwrap();
    assert_eq!(
        answer.prediction.clone().unwrap().task,
        "image_classification"
    );
    for name in answer
        .header
        .tensors
        .iter()
        .filter(|n| n.ends_with("pattern"))
    {
        let keys = *answer.shape(name).last().unwrap();
        for row in answer.values(name).chunks_exact(keys) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4, "{name}");
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_answers_come_in_order_and_one_bad_input_spoils_no_other() {
    let d = TestDaemon::with(&["bert.legacy14", "gpt2.legacy14"]).await;
    let model = "bert.legacy14";
    let mut requests = Vec::new();
    for n in 0..60u32 {
        let request = match n {
            7 => ids(model, &[], hooks(&["pattern"])),
            20 => ids("gpt2.legacy14", &[1], hooks(&["pattern"])),
            33 => ids(model, &[2, 3], hooks(&["nonsense"])),
            _ => ids(
                model,
                &vec![5; 1 + (n as usize * 7) % 40],
                hooks(&["pattern", "resid_post"]),
            ),
        };
        requests.push(pb::CaptureStreamRequest {
            id: format!("input-{n}"),
            request: Some(request),
        });
    }
    let mut client = d.captures().await;
    let mut stream = client
        .capture_stream(futures::stream::iter(requests))
        .await
        .unwrap()
        .into_inner();
    let (mut next, mut failed, mut messages) = (0u32, Vec::new(), 0u64);
    let mut reader = Reader::default();
    let summary = loop {
        let message = stream.next().await.expect("a summary comes last").unwrap();
        match message.answer.unwrap() {
            bulk::Answer::Summary(s) => break s,
            bulk::Answer::Failure(f) => {
                assert_eq!(message.id, format!("input-{next}"));
                assert_eq!(f.code, i32::from(Code::InvalidArgument));
                failed.push((next, f.field));
                next += 1;
            }
            bulk::Answer::Capture(c) => {
                assert_eq!(message.id, format!("input-{next}"));
                if let Some(answer) = reader.take(c.item.unwrap()) {
                    let tokens = 1 + (next as usize * 7) % 40;
                    assert_eq!(answer.header.tokens.len(), tokens);
                    assert_eq!(
                        answer.shape("blocks.0.attn.hook_pattern"),
                        [4, tokens, tokens]
                    );
                    reader = Reader::default();
                    next += 1;
                }
            }
        }
        messages += 1;
    };
    assert_eq!(next, 60);
    assert_eq!(
        (summary.answered, summary.failed, summary.messages),
        (57, 3, messages)
    );
    let fields: Vec<(u32, &str)> = failed.iter().map(|(n, f)| (*n, f.as_str())).collect();
    assert_eq!(
        fields,
        [
            (7, "input.tokens.ids"),
            (20, "request.model"),
            (33, "selection.hooks[0]")
        ]
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_the_whole_stream_and_bad_ones_are_refused() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let ask = || ids("bert.legacy14", &[2, 11, 3], hooks(&["pattern"]));
    for (timeout, code) in [
        ("5x", Code::InvalidArgument),
        ("123456789S", Code::InvalidArgument),
    ] {
        let mut request = tonic::Request::new(ask());
        request
            .metadata_mut()
            .insert("grpc-timeout", timeout.parse().unwrap());
        let status = d.captures().await.capture(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{timeout}: {status:?}");
    }

    // A bidirectional stream whose caller says nothing: only the deadline ends it.
    let mut request = tonic::Request::new(futures::stream::pending::<pb::CaptureStreamRequest>());
    request
        .metadata_mut()
        .insert("grpc-timeout", "300m".parse().unwrap());
    let begun = std::time::Instant::now();
    let mut stream = d
        .captures()
        .await
        .capture_stream(request)
        .await
        .unwrap()
        .into_inner();
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let took = begun.elapsed().as_millis();
    assert!((290..1500).contains(&took), "{took} ms");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_requests_are_taken_and_answered_in_kind() {
    use tonic::codec::CompressionEncoding::{Gzip, Zstd};
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let plain = d
        .capture(ids("bert.legacy14", &[2, 11, 3], hooks(&["*"])))
        .await
        .unwrap();
    for encoding in [Gzip, Zstd] {
        let mut client = d
            .captures()
            .await
            .send_compressed(encoding)
            .accept_compressed(encoding);
        let request = ids("bert.legacy14", &[2, 11, 3], hooks(&["*"]));
        let response = client.capture(request).await.unwrap();
        let named = response
            .metadata()
            .get("grpc-encoding")
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        assert!(["gzip", "zstd"].contains(&named.as_str()));
        let answer = Answer::read(response.into_inner()).await.unwrap();
        assert_eq!(answer.summary.crc32c, plain.summary.crc32c);
    }
    let quiet = d
        .captures()
        .await
        .accept_compressed(Gzip)
        .capture(ids("bert.legacy14", &[2], hooks(&["*"])))
        .await;
    assert!(
        quiet.unwrap().metadata().get("grpc-encoding").is_none(),
        "nobody asked"
    );
    d.stop().await;
}
