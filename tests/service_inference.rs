//! The Open Inference Protocol over real gRPC with real workers.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/edits.rs"]
mod edits_support;

use bytes::{BufMut as _, Bytes, BytesMut};
use daemon::{TestDaemon, hooks, ids};
use edits_support::{edit, edits, vector};
use futures::StreamExt as _;
use introspectd::service::wire::inference::{
    self as pb, InferParameter,
    grpc_inference_service_client::GrpcInferenceServiceClient,
    infer_parameter::ParameterChoice,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
};
use introspectd::service::wire::introspect::{self, edit::Operation as Op};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;

const BERT: &str = "bert.legacy14";

async fn client(d: &TestDaemon) -> GrpcInferenceServiceClient<Channel> {
    GrpcInferenceServiceClient::new(d.channel().await)
}

fn tensor(name: &str, rows: &[&[i64]]) -> InferInputTensor {
    InferInputTensor {
        name: name.into(),
        datatype: "INT64".into(),
        shape: vec![rows.len() as i64, rows[0].len() as i64],
        contents: Some(pb::InferTensorContents {
            int64_contents: rows.concat(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn texts(name: &str, texts: &[&str]) -> InferInputTensor {
    let strings = texts.iter().map(|t| Bytes::copy_from_slice(t.as_bytes()));
    InferInputTensor {
        name: name.into(),
        datatype: "BYTES".into(),
        shape: vec![texts.len() as i64],
        contents: Some(pb::InferTensorContents {
            bytes_contents: strings.collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn wanted(names: &[&str]) -> Vec<InferRequestedOutputTensor> {
    names
        .iter()
        .map(|n| InferRequestedOutputTensor {
            name: (*n).into(),
            ..Default::default()
        })
        .collect()
}

fn ask(inputs: Vec<InferInputTensor>, outputs: &[&str]) -> pb::ModelInferRequest {
    pb::ModelInferRequest {
        model_name: BERT.into(),
        id: "mine".into(),
        inputs,
        outputs: wanted(outputs),
        ..Default::default()
    }
}

fn floats(response: &pb::ModelInferResponse, at: usize) -> Vec<f32> {
    let raw = &response.raw_output_contents[at];
    raw.as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

/// The same request under an intervention.
fn under(mut request: pb::ModelInferRequest, json: &str) -> pb::ModelInferRequest {
    let parameter = InferParameter {
        parameter_choice: Some(ParameterChoice::StringParam(json.to_owned())),
    };
    request.parameters.insert("intervention".into(), parameter);
    request
}

async fn infer(
    d: &TestDaemon,
    request: pb::ModelInferRequest,
) -> Result<pb::ModelInferResponse, Status> {
    client(d)
        .await
        .model_infer(request)
        .await
        .map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_raw_typed_and_texts_give_the_same_numbers_as_a_capture() {
    let d = TestDaemon::with(&[BERT]).await;
    let row = [2i64, 11, 12, 13, 3];
    let other = [2i64, 14, 15, 16, 3];
    let typed = infer(&d, ask(vec![tensor("input_ids", &[&row, &other])], &[]))
        .await
        .unwrap();
    assert_eq!(
        (typed.id.as_str(), typed.model_version.as_str()),
        ("mine", "1")
    );
    assert_eq!(typed.outputs[0].name, "logits");
    assert_eq!(typed.outputs[0].datatype, "FP32");
    assert_eq!(typed.outputs[0].shape, [2, 3]);

    let mut raw = ask(vec![tensor("input_ids", &[&row, &other])], &["logits"]);
    raw.inputs[0].contents = None;
    raw.raw_input_contents = vec![
        [row, other]
            .concat()
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
    ];
    let raw = infer(&d, raw).await.unwrap();
    assert_eq!(floats(&raw, 0), floats(&typed, 0));

    let tokens: Vec<u32> = row.iter().map(|v| *v as u32).collect();
    let captured = d.capture(ids(BERT, &tokens, hooks(&[]))).await.unwrap();
    let first = &floats(&typed, 0)[..3];
    for (a, b) in first.iter().zip(captured.values("logits")) {
        assert!((a - b).abs() < 1e-5);
    }

    let said = ["good movie", "a much longer and a very bad movie"];
    let two = infer(&d, ask(vec![texts("text", &said)], &[]))
        .await
        .unwrap();
    assert_eq!(two.outputs[0].shape, [2, 3]);
    for (at, text) in said.iter().enumerate() {
        let alone = infer(&d, ask(vec![texts("text", &[text])], &[]))
            .await
            .unwrap();
        for (a, b) in floats(&alone, 0).iter().zip(&floats(&two, 0)[at * 3..]) {
            assert!((a - b).abs() < 1e-5, "a row of a batch is what it is alone");
        }
    }

    // The same texts, raw.
    let mut joined = BytesMut::new();
    for text in said {
        joined.put_u32_le(text.len() as u32);
        joined.put_slice(text.as_bytes());
    }
    let mut raw = ask(vec![texts("text", &said)], &[]);
    raw.inputs[0].contents = None;
    raw.raw_input_contents = vec![joined.freeze()];
    let raw = infer(&d, raw).await.unwrap();
    assert_eq!(raw.outputs[0].shape, [2, 3]);
    for (a, b) in floats(&raw, 0).iter().zip(floats(&two, 0)) {
        assert!((a - b).abs() < 1e-5);
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hook_points_are_outputs_too() {
    let d = TestDaemon::with(&[BERT]).await;
    let row = [2i64, 11, 12, 13, 3];
    let names = ["attentions.1", "logits", "blocks.0.hook_resid_post"];
    let answer = infer(&d, ask(vec![tensor("input_ids", &[&row, &row])], &names))
        .await
        .unwrap();
    let got: Vec<&str> = answer.outputs.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(got, names, "in the order in which they were asked for");
    assert_eq!(answer.outputs[0].shape, [2, 4, 5, 5]);
    assert_eq!(answer.outputs[2].shape, [2, 5, 32]);
    let text = |o: usize, key: &str| match &answer.outputs[o].parameters[key].parameter_choice {
        Some(ParameterChoice::StringParam(s)) => s.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(text(0, "hook"), "blocks.1.attn.hook_pattern");
    assert_eq!(text(0, "axes"), "batch,head,query,key");
    for row in floats(&answer, 0).chunks_exact(5) {
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4);
    }

    // Texts of different length do not fit into one tensor.
    let status = infer(
        &d,
        ask(vec![texts("text", &["a", "a b c d e"])], &["attentions.0"]),
    )
    .await
    .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("one text per request"),
        "{status:?}"
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_run_under_an_intervention() {
    let d = TestDaemon::with(&[BERT]).await;
    let rows: [&[i64]; 2] = [&[2, 11, 12, 13, 3], &[2, 14, 15, 16, 3]];
    // "AACAPw==" is 1.0.
    let json = r#"{"edits": [
        {"hook": "attn.hook_z", "layers": [1], "heads": [2], "zero": {}},
        {"hook": "hidden_states.2", "positions": [-2], "add": {"scale": 2.5, "vector": {"values": {"dtype": "D_TYPE_F32", "shape": ["1"], "data": "AACAPw=="}}}}
    ]}"#;
    let add = introspect::Add {
        vector: Some(introspect::Vector {
            of: Some(introspect::vector::Of::Values(vector(&[1.0]))),
        }),
        scale: Some(2.5),
    };
    let intervention = edits(vec![
        introspect::Edit {
            layers: vec![1],
            heads: vec![2],
            ..edit("attn.hook_z", Op::Zero(introspect::Zero {}))
        },
        introspect::Edit {
            positions: vec![-2],
            ..edit("hidden_states.2", Op::Add(add))
        },
    ]);
    let asked = || ask(vec![tensor("input_ids", &rows)], &["logits", "z.1"]);
    let plain = infer(&d, asked()).await.unwrap();
    let changed = infer(&d, under(asked(), json)).await.unwrap();
    assert_eq!(changed.outputs[0].shape, [2, 3]);
    let (plain, logits, z) = (floats(&plain, 0), floats(&changed, 0), floats(&changed, 1));
    for (at, row) in rows.iter().enumerate() {
        let tokens: Vec<u32> = row.iter().map(|v| *v as u32).collect();
        let mut captured = ids(BERT, &tokens, hooks(&["z.1"]));
        captured.intervention = Some(intervention.clone());
        let captured = d.capture(captured).await.unwrap();
        for (a, b) in logits[at * 3..].iter().zip(captured.values("logits")) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        let far = |a: f32, b: f32| (a - b).abs() > 1e-3;
        let mut pairs = logits[at * 3..][..3].iter().zip(&plain[at * 3..]);
        assert!(pairs.any(|(a, b)| far(*a, *b)), "it changes the answer");
        let size = z.len() / 2;
        let heads = z[at * size..][..size].chunks(8);
        for (head, values) in heads.enumerate() {
            assert_eq!(head % 4 == 2, values.iter().all(|v| *v == 0.0));
        }
    }

    // Texts of different lengths, each by itself; positions count from its own end.
    let said = ["good movie", "a much longer and a very bad movie"];
    let both = infer(&d, under(ask(vec![texts("text", &said)], &[]), json));
    let both = floats(&both.await.unwrap(), 0);
    for (at, text) in said.iter().enumerate() {
        let alone = infer(&d, under(ask(vec![texts("text", &[text])], &[]), json));
        for (a, b) in floats(&alone.await.unwrap(), 0).iter().zip(&both[at * 3..]) {
            assert!((a - b).abs() < 1e-5);
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn classes_come_with_their_labels() {
    let d = TestDaemon::with(&[BERT]).await;
    let mut request = ask(vec![texts("text", &["good movie"])], &["logits"]);
    request.outputs[0].parameters.insert(
        "classification".into(),
        InferParameter {
            parameter_choice: Some(ParameterChoice::Int64Param(2)),
        },
    );
    let answer = infer(&d, request).await.unwrap();
    assert_eq!(answer.outputs[0].datatype, "BYTES");
    assert_eq!(answer.outputs[0].shape, [1, 2]);
    let mut raw = answer.raw_output_contents[0].clone();
    let mut scores = Vec::new();
    while !raw.is_empty() {
        let n = u32::from_le_bytes(*raw.first_chunk().unwrap()) as usize;
        let entry = String::from_utf8(raw[4..4 + n].to_vec()).unwrap();
        raw = raw.slice(4 + n..);
        let parts: Vec<&str> = entry.split(':').collect();
        assert!(
            ["negative", "neutral", "positive"].contains(&parts[2]),
            "{entry}"
        );
        scores.push(parts[0].parse::<f32>().unwrap());
    }
    assert!(scores.len() == 2 && scores[0] >= scores[1]);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_ask_around_inference() {
    let d = TestDaemon::with(&[BERT]).await;
    let mut c = client(&d).await;
    assert!(
        c.server_live(pb::ServerLiveRequest {})
            .await
            .unwrap()
            .into_inner()
            .live
    );
    assert!(
        c.server_ready(pb::ServerReadyRequest {})
            .await
            .unwrap()
            .into_inner()
            .ready
    );
    let ready = |name: &str, version: &str| pb::ModelReadyRequest {
        name: name.into(),
        version: version.into(),
    };
    assert!(
        c.model_ready(ready(BERT, ""))
            .await
            .unwrap()
            .into_inner()
            .ready
    );
    assert!(
        c.model_ready(ready(BERT, "1"))
            .await
            .unwrap()
            .into_inner()
            .ready
    );
    for (name, version) in [(BERT, "9"), ("nobody", "")] {
        let answer = c.model_ready(ready(name, version)).await.unwrap();
        assert!(!answer.into_inner().ready, "{name} {version}");
    }
    let server = c
        .server_metadata(pb::ServerMetadataRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (server.name.as_str(), server.version.as_str()),
        ("introspectd", env!("CARGO_PKG_VERSION"))
    );
    let request = pb::ModelMetadataRequest {
        name: BERT.into(),
        version: String::new(),
    };
    let model = c.model_metadata(request).await.unwrap().into_inner();
    assert_eq!(model.versions, ["1"]);
    let inputs: Vec<&str> = model.inputs.iter().map(|i| i.name.as_str()).collect();
    assert!(inputs.contains(&"input_ids"), "{inputs:?}");
    assert_eq!(model.inputs[0].shape, [-1, -1]);
    assert_eq!(model.properties["text_inputs"], "text,text_pair");

    for _ in 0..3 {
        infer(&d, ask(vec![tensor("input_ids", &[&[2, 3], &[2, 3]])], &[]))
            .await
            .unwrap();
    }
    let request = pb::ModelStatisticsRequest::default();
    let statistics = c
        .model_statistics(request)
        .await
        .unwrap()
        .into_inner()
        .model_stats;
    assert_eq!(
        (statistics[0].inference_count, statistics[0].execution_count),
        (6, 3)
    );
    let times = statistics[0].inference_stats.unwrap();
    assert!(times.success.unwrap().ns > times.compute_infer.unwrap().ns);

    let load = pb::RepositoryModelLoadRequest {
        repository_name: BERT.into(), // as KServe names it
        ..Default::default()
    };
    let loaded = c.repository_model_load(load).await.unwrap().into_inner();
    assert!(loaded.is_loaded && loaded.model_name == BERT);
    let unload = pb::RepositoryModelUnloadRequest {
        model_name: BERT.into(),
        ..Default::default()
    };
    assert!(
        c.repository_model_unload(unload)
            .await
            .unwrap()
            .into_inner()
            .is_unloaded
    );
    assert!(
        !c.model_ready(ready(BERT, ""))
            .await
            .unwrap()
            .into_inner()
            .ready
    );
    let index = c
        .repository_index(pb::RepositoryIndexRequest::default())
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!(
        (index[0].name.as_str(), index[0].state.as_str()),
        (BERT, "UNAVAILABLE")
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_answers_in_order_and_reports_failures_in_place() {
    let d = TestDaemon::with(&[BERT]).await;
    let requests: Vec<_> = (0..40i64)
        .map(|n| {
            let row: Vec<i64> = vec![5; 1 + (n as usize % 7)];
            let mut request = ask(vec![tensor("input_ids", &[&row])], &["hook_embed"]);
            request.id = n.to_string();
            if n == 11 {
                request.outputs = wanted(&["nonsense"]);
            }
            request
        })
        .collect();
    let mut c = client(&d).await;
    let mut stream = c
        .model_stream_infer(futures::stream::iter(requests))
        .await
        .unwrap()
        .into_inner();
    for n in 0..40i64 {
        let answer = stream.next().await.unwrap().unwrap();
        let response = answer.infer_response.unwrap();
        assert_eq!(response.id, n.to_string());
        if n == 11 {
            assert!(
                answer.error_message.contains("outputs[0].name"),
                "{}",
                answer.error_message
            );
        } else {
            assert_eq!(answer.error_message, "");
            assert_eq!(response.outputs[0].shape, [1, 1 + n % 7, 32]);
        }
    }
    assert!(stream.next().await.is_none());
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_which_field_is_bad() {
    let d = TestDaemon::with(&[BERT]).await;
    let good = || tensor("input_ids", &[&[2, 3]]);
    let shaped = |shape: &[i64]| InferInputTensor {
        shape: shape.to_vec(),
        ..good()
    };
    let raw = |parts: Vec<Bytes>| pb::ModelInferRequest {
        raw_input_contents: parts,
        ..ask(
            vec![InferInputTensor {
                contents: None,
                ..good()
            }],
            &[],
        )
    };
    let shared = |key: &str| {
        let mut input = good();
        input
            .parameters
            .insert(key.into(), InferParameter::default());
        input
    };
    let cases = [
        ("inputs", ask(vec![], &[])),
        ("inputs", ask(vec![texts("text_pair", &["a"])], &[])),
        ("inputs", ask(vec![texts("text", &["a"]), good()], &[])),
        (
            "inputs",
            ask(
                vec![texts("text", &["a"]), texts("text_pair", &["a", "b"])],
                &[],
            ),
        ),
        ("inputs[0].name", ask(vec![texts("input_ids", &["a"])], &[])),
        (
            "inputs[0]",
            ask(
                vec![InferInputTensor {
                    name: "nobody".into(),
                    ..good()
                }],
                &[],
            ),
        ),
        (
            "inputs[1]",
            ask(
                vec![
                    good(),
                    InferInputTensor {
                        name: "attention_mask".into(),
                        ..tensor("x", &[&[1, 1, 1]])
                    },
                ],
                &[],
            ),
        ),
        ("inputs[0].shape", ask(vec![shaped(&[0, 2])], &[])),
        ("inputs[0].shape", ask(vec![shaped(&[-1, 2])], &[])),
        (
            "inputs[0].contents",
            ask(vec![shaped(&[i64::MAX, i64::MAX])], &[]),
        ),
        ("inputs[0].shape", ask(vec![shaped(&[1; 65])], &[])),
        ("inputs[0].contents", ask(vec![shaped(&[1, 3])], &[])),
        (
            "inputs[0].datatype",
            ask(
                vec![InferInputTensor {
                    datatype: "INT4".into(),
                    ..good()
                }],
                &[],
            ),
        ),
        (
            "inputs[0].contents",
            ask(
                vec![InferInputTensor {
                    contents: None,
                    ..good()
                }],
                &[],
            ),
        ),
        ("inputs[0].contents", raw(vec![Bytes::from_static(&[1; 3])])),
        ("raw_input_contents", raw(vec![Bytes::new(), Bytes::new()])),
        (
            "inputs[0].parameters",
            ask(vec![shared("shared_memory_region")], &[]),
        ),
        ("outputs[0].name", ask(vec![good()], &["nonsense"])),
        ("outputs[1].name", ask(vec![good()], &["logits", "logits"])),
        ("parameters.truncate", {
            let mut request = ask(vec![texts("text", &["a"])], &[]);
            request
                .parameters
                .insert("truncate".into(), InferParameter::default());
            request
        }),
    ];
    let edited = |json: &str| under(ask(vec![good()], &[]), json);
    let by_edits = [
        ("parameters.intervention", edited("no JSON")),
        (
            "parameters.intervention",
            edited(r#"{"edits": []} and more"#),
        ),
        ("parameters.intervention", edited(r#"{"edit": []}"#)),
        (
            "parameters.intervention.edits[0].hook",
            edited(r#"{"edits": [{"hook": "nothing", "zero": {}}]}"#),
        ),
        (
            "parameters.intervention.edits[0].heads",
            edited(r#"{"edits": [{"hook": "attn.hook_z", "heads": [99], "zero": {}}]}"#),
        ),
        (
            "parameters.intervention.edits[1].positions[0]",
            edited(
                r#"{"edits": [{"hook": "attn.hook_z", "zero": {}}, {"hook": "attn.hook_z", "positions": [2], "zero": {}}]}"#,
            ),
        ),
        (
            "parameters.intervention.edits[0].spans[0]",
            edited(r#"{"edits": [{"hook": "attn.hook_z", "spans": [{"end": 3}], "zero": {}}]}"#),
        ),
        ("parameters.intervention", {
            let mut request = ask(vec![good()], &[]);
            let number = InferParameter {
                parameter_choice: Some(ParameterChoice::Int64Param(1)),
            };
            request.parameters.insert("intervention".into(), number);
            request
        }),
    ];
    for (field, request) in cases.into_iter().chain(by_edits) {
        let status = infer(&d, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        let details = status.get_error_details();
        let named = &details.bad_request().unwrap().field_violations[0].field;
        assert_eq!(named, field, "{}", status.message());
    }
    let long = "word ".repeat(3000);
    let status = infer(&d, ask(vec![texts("text", &[&long])], &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let mut cut = ask(vec![texts("text", &[&long])], &[]);
    cut.parameters.insert(
        "truncate".into(),
        InferParameter {
            parameter_choice: Some(ParameterChoice::BoolParam(true)),
        },
    );
    assert!(
        infer(&d, cut).await.is_ok(),
        "cut to the limit when that is asked for"
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_too_large_is_refused_before_it_runs() {
    let d = TestDaemon::tuned(&[BERT], |c| c.max_capture = 10_000).await;
    let row = [5i64; 20];
    let rows: Vec<&[i64]> = vec![&row; 8];
    let status = infer(&d, ask(vec![tensor("input_ids", &rows)], &["attentions.0"]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(
        infer(&d, ask(vec![tensor("input_ids", &rows)], &[]))
            .await
            .is_ok()
    );
    d.stop().await;
}
