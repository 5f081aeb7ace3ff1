//! Files of probes over real gRPC: what a caller brings is checked, what lies on the disk is not trusted, lists stay small.
#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/probe.rs"]
mod probe_support;

use std::{os::unix::fs::symlink, path::PathBuf, time::Duration};

use daemon::TestDaemon;
use introspectd::service::wire::introspect::{
    self as pb, import_probe_request::From as Given, probe_service_client::ProbeServiceClient,
};
use probe_support::{MODEL, demo, field_of};
use serde_json::{Value, json};
use tonic::{Code, Request, Status, transport::Channel};

const HOOK: &str = "hidden_states.2";
/// Features of the demonstration model's stream.
const WIDTH: usize = 128;
/// Answers come at once, or something waits for ever.
const SOON: Duration = Duration::from_secs(20);

/// With the limits that a client has who sets none.
async fn client(d: &TestDaemon) -> ProbeServiceClient<Channel> {
    ProbeServiceClient::new(d.channel().await)
}

fn soon<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(SOON);
    request
}

fn folder(d: &TestDaemon) -> PathBuf {
    d.repository.path().join(MODEL).join("probes")
}

fn linear(weight: Vec<f32>) -> pb::LinearProbe {
    pb::LinearProbe {
        hook: HOOK.to_owned(),
        pooling: pb::Pooling::Mean.into(),
        labels: vec!["no".to_owned(), "yes".to_owned()],
        weight,
        bias: vec![0.0],
    }
}

async fn import(d: &TestDaemon, name: &str, from: Given) -> Result<pb::Probe, Status> {
    let request = pb::ImportProbeRequest {
        model: MODEL.to_owned(),
        name: name.to_owned(),
        from: Some(from),
        replace: true,
        ..pb::ImportProbeRequest::default()
    };
    let answer = client(d).await.import_probe(soon(request)).await?;
    Ok(answer.into_inner().probe.unwrap())
}

async fn plain(d: &TestDaemon, name: &str) {
    let from = Given::Linear(linear(vec![0.5; WIDTH]));
    import(d, name, from).await.unwrap();
}

async fn export(d: &TestDaemon, name: &str) -> pb::ProbeFiles {
    let request = pb::ExportProbeRequest {
        model: MODEL.to_owned(),
        name: name.to_owned(),
        hooks: Vec::new(),
    };
    let answer = client(d).await.export_probe(soon(request)).await.unwrap();
    answer.into_inner().files.unwrap()
}

async fn get(d: &TestDaemon, name: &str) -> Result<pb::Probe, Status> {
    let request = pb::GetProbeRequest {
        model: MODEL.to_owned(),
        name: name.to_owned(),
    };
    let answer = client(d).await.get_probe(soon(request)).await?;
    Ok(answer.into_inner().probe.unwrap())
}

async fn list(d: &TestDaemon) -> pb::ListProbesResponse {
    let request = pb::ListProbesRequest {
        model: MODEL.to_owned(),
    };
    let answer = client(d).await.list_probes(soon(request)).await;
    answer.unwrap().into_inner()
}

async fn delete(d: &TestDaemon, name: &str) -> Result<(), Status> {
    let request = pb::DeleteProbeRequest {
        model: MODEL.to_owned(),
        name: name.to_owned(),
    };
    client(d).await.delete_probe(soon(request)).await?;
    Ok(())
}

fn scoring(name: &str, per_token: bool) -> pb::ScoreRequest {
    let text = pb::Text {
        text: "a good film".to_owned(),
        ..pb::Text::default()
    };
    let input = pb::Input {
        kind: Some(pb::input::Kind::Text(text)),
    };
    pb::ScoreRequest {
        model: MODEL.to_owned(),
        probes: vec![pb::ProbeReference {
            name: name.to_owned(),
            ..pb::ProbeReference::default()
        }],
        of: Some(pb::score_request::Of::Input(input)),
        per_token,
        ..pb::ScoreRequest::default()
    }
}

async fn score(d: &TestDaemon, request: pb::ScoreRequest) -> Result<pb::ScoreResponse, Status> {
    Ok(client(d).await.score(soon(request)).await?.into_inner())
}

fn names(probes: &[pb::Probe]) -> Vec<&str> {
    probes.iter().map(|p| p.name.as_str()).collect()
}

fn broken(listed: &pb::ListProbesResponse) -> Vec<&str> {
    listed.broken.iter().map(|b| b.name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_that_are_not_finite_are_refused() {
    let d = demo().await;
    // Sums of either sign overflow: infinite, or no number at all.
    let weight = (0..WIDTH).map(|i| if i % 2 == 0 { 3e38 } else { -3e38 });
    let from = Given::Linear(linear(weight.collect()));
    import(&d, "huge", from).await.unwrap();
    let hidden = |value: f32| pb::Tensor {
        dtype: pb::DType::F32.into(),
        shape: vec![WIDTH as u64],
        data: value.to_le_bytes().repeat(WIDTH).into(),
        ..pb::Tensor::default()
    };
    let own = pb::ScoreRequest {
        of: Some(pb::score_request::Of::Hidden(hidden(1000.0))),
        ..scoring("huge", false)
    };
    let cases = [scoring("huge", false), scoring("huge", true), own.clone()];
    for request in cases {
        let error = score(&d, request).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        assert!(error.message().contains("not finite"), "{error}");
    }
    let zeros = pb::ScoreRequest {
        of: Some(pb::score_request::Of::Hidden(hidden(0.0))),
        ..own
    };
    let said = score(&d, zeros).await.unwrap();
    assert_eq!(said.scores[0].input.as_ref().unwrap().values, [0.0]);
    // Each token by itself, of a probe that does not pool.
    let tokens = pb::LinearProbe {
        pooling: pb::Pooling::Unspecified.into(),
        ..linear(vec![3e38; WIDTH])
    };
    import(&d, "tokens", Given::Linear(tokens)).await.unwrap();
    let error = score(&d, scoring("tokens", false)).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipes_links_and_torn_weights_are_broken_and_can_be_deleted() {
    let d = demo().await;
    let all = ["folder", "healthy", "link", "pipe", "torn"];
    for name in all {
        plain(&d, name).await;
    }
    let at = |name: &str| folder(&d).join(name);
    let outside = d.repository.path().join("outside");
    std::fs::rename(at("link"), &outside).unwrap();
    symlink(&outside, at("link")).unwrap();
    let card = at("pipe").join("probe.json");
    std::fs::remove_file(&card).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &card, rustix::fs::Mode::RWXU).unwrap();
    let card = at("folder").join("probe.json");
    std::fs::remove_file(&card).unwrap();
    std::fs::create_dir(&card).unwrap();
    for file in std::fs::read_dir(at("torn")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            std::fs::write(path, "torn").unwrap();
        }
    }
    let hurt = ["folder", "link", "pipe", "torn"];
    let listed = list(&d).await;
    assert_eq!(names(&listed.probes), ["healthy"]);
    assert_eq!(broken(&listed), hurt);
    for name in hurt {
        for error in [
            get(&d, name).await.unwrap_err(),
            score(&d, scoring(name, false)).await.unwrap_err(),
        ] {
            assert_eq!(error.code(), Code::DataLoss, "{name}: {error}");
        }
    }
    score(&d, scoring("healthy", false)).await.unwrap();
    for name in hurt {
        delete(&d, name).await.unwrap();
    }
    assert!(outside.join("probe.json").exists(), "only the link is gone");
    let listed = list(&d).await;
    assert_eq!(names(&listed.probes), ["healthy"]);
    assert!(listed.broken.is_empty(), "{listed:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_of_another_width_of_this_very_model_are_data_loss() {
    let d = demo().await;
    // Half as wide.
    let weights = safetensors_of(&[("weight", &[1, WIDTH / 2]), ("bias", &[1])]);
    // Of another model it is no fault of the file.
    let foreign = "ff".repeat(32);
    for (name, fingerprint, code) in [
        ("narrow", None, Code::DataLoss),
        ("foreign", Some(foreign), Code::FailedPrecondition),
    ] {
        plain(&d, name).await;
        let files = export(&d, name).await;
        let mut described: Value = serde_json::from_slice(&files.description).unwrap();
        let file = "weights-narrow.safetensors";
        described["tensors"] = json!({ "file": file, "sha256": sha256(&weights) });
        if let Some(fingerprint) = fingerprint {
            described["fingerprint"] = fingerprint.into();
        }
        let at = folder(&d).join(name);
        std::fs::write(at.join(file), &weights).unwrap();
        std::fs::write(
            at.join("probe.json"),
            serde_json::to_vec(&described).unwrap(),
        )
        .unwrap();
        let mut request = scoring(name, false);
        request.probes[0].force = true;
        let error = score(&d, request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains("64 features"), "{error}");
    }
    d.stop().await;
}

/// Zeros.
fn safetensors_of(parts: &[(&str, &[usize])]) -> Vec<u8> {
    let zeros = vec![0u8; 4 * WIDTH];
    let views = parts.iter().map(|(part, shape)| {
        let bytes = &zeros[..4 * shape.iter().product::<usize>()];
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes);
        (format!("blocks.2.hook_resid_pre/{part}"), view.unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(bytes);
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_a_caller_brings_are_checked() {
    let d = demo().await;
    plain(&d, "good").await;
    let files = export(&d, "good").await;
    let described: Value = serde_json::from_slice(&files.description).unwrap();
    let judged = |more: Value| {
        let mut metrics = json!({
            "accuracy": 0.5, "accuracy_low": 0.5, "accuracy_high": 0.5, "macro_f1": 0.5, "auc": null, "majority": 0.5,
            "control_accuracy": null, "selectivity": null, "calibration_error": null, "confusion": [1, 0, 0, 1],
            "codelength_bits": null, "compression": null, "learning_curve": [], "train_accuracy": 0.5,
        });
        for (name, value) in more.as_object().unwrap() {
            metrics[name] = value.clone();
        }
        let mut report = described["reports"][0].clone();
        report["classes"] = metrics;
        json!({ "reports": [report] })
    };
    let brought = |more: &Value| {
        let mut described = described.clone();
        for (name, value) in more.as_object().unwrap() {
            described[name] = value.clone();
        }
        Given::Files(pb::ProbeFiles {
            description: serde_json::to_vec(&described).unwrap().into(),
            tensors: files.tensors.clone(),
        })
    };
    import(&d, "judged", brought(&judged(json!({}))))
        .await
        .unwrap();
    let report = described["reports"][0].clone();
    for more in [
        json!({ "labels": ["a", "a"] }),
        json!({ "labels": ["a", ""] }),
        json!({ "labels": ["a", "b".repeat(100_000)] }),
        json!({ "reports": [report.clone(), report] }),
        json!({ "reports": [] }),
        json!({ "format": 2 }),
        judged(json!({ "accuracy": 7 })),
        judged(json!({ "auc": -1 })),
        judged(json!({ "confusion": [1, 2, 3] })),
    ] {
        let error = import(&d, "bad", brought(&more)).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{more}: {error}");
        assert_eq!(field_of(&error), "files.description", "{error}");
    }
    let torn = pb::ProbeFiles {
        tensors: files.tensors.slice(..99),
        ..files.clone()
    };
    let mut altered = files.tensors.to_vec();
    *altered.last_mut().unwrap() ^= 1;
    let altered = pb::ProbeFiles {
        tensors: altered.into(),
        ..files.clone()
    };
    for from in [
        Given::Files(torn),
        Given::Files(altered),
        brought(&json!({ "labels": ["a", "b", "c"] })),
    ] {
        let error = import(&d, "bad", from).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert_eq!(field_of(&error), "files.tensors", "{error}");
        assert!(!error.message().contains("delete"), "{error}");
    }
    for hook in ["nothing", "pattern", "hidden_states.*", "value:/x", ""] {
        let mut linear = linear(vec![0.5; WIDTH]);
        linear.hook = hook.to_owned();
        let error = import(&d, "bad", Given::Linear(linear)).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{hook}: {error}");
        assert_eq!(field_of(&error), "linear.hook", "{hook}: {error}");
    }
    let listed = list(&d).await;
    assert_eq!(names(&listed.probes), ["good", "judged"]);
    assert!(listed.broken.is_empty(), "{listed:?}");

    // What is on the disk is held to the same.
    let card = folder(&d).join("judged/probe.json");
    let text = std::fs::read_to_string(&card).unwrap();
    std::fs::write(&card, text.replace("\"accuracy\": 0.5", "\"accuracy\": 7")).unwrap();
    assert_eq!(broken(&list(&d).await), ["judged"]);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_many_probes_of_many_classes_fits_into_one_message() {
    const CLASSES: usize = 128;
    let d = demo().await;
    let many = pb::LinearProbe {
        labels: (0..CLASSES).map(|i| format!("class {i}")).collect(),
        weight: vec![0.5; CLASSES * WIDTH],
        bias: vec![0.0; CLASSES],
        ..linear(Vec::new())
    };
    import(&d, "p0", Given::Linear(many)).await.unwrap();
    let files = export(&d, "p0").await;
    let mut described: Value = serde_json::from_slice(&files.description).unwrap();
    // Five bytes a count.
    let confusion = vec![1u32 << 30; CLASSES * CLASSES];
    described["reports"][0]["classes"] = json!({
        "accuracy": 0.5, "accuracy_low": 0.5, "accuracy_high": 0.5, "macro_f1": 0.5, "auc": null, "majority": 0.5,
        "control_accuracy": null, "selectivity": null, "calibration_error": null, "confusion": confusion,
        "codelength_bits": null, "compression": null, "learning_curve": [[8, 0.5]], "train_accuracy": 0.5,
    });
    let description: Vec<u8> = serde_json::to_vec(&described).unwrap();
    for at in 0..60 {
        let from = Given::Files(pb::ProbeFiles {
            description: description.clone().into(),
            ..files.clone()
        });
        import(&d, &format!("p{at}"), from).await.unwrap();
    }
    let listed = list(&d).await;
    assert_eq!(listed.probes.len(), 60, "{:?}", listed.broken);
    for probe in &listed.probes {
        let classes = probe.reports[0].classes.as_ref().unwrap();
        assert!(classes.confusion.is_empty() && classes.learning_curve.is_empty());
    }
    let whole = get(&d, "p7").await.unwrap();
    let classes = whole.reports[0].classes.as_ref().unwrap();
    assert_eq!(classes.confusion.len(), CLASSES * CLASSES);
    assert_eq!(classes.learning_curve.len(), 1);
    d.stop().await;
}
