//! A daemon as an operator starts it: the binary, its workers, a client over the loopback.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use introspectd::service::wire::{
    inference::{
        self as oip, grpc_inference_service_client::GrpcInferenceServiceClient,
        model_infer_request::InferInputTensor,
    },
    introspect::{
        self as pb, capture_response::Item, capture_service_client::CaptureServiceClient,
        model_service_client::ModelServiceClient,
    },
};
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::Channel;

/// A daemon may take so long to load what it is given.
const LOAD_LIMIT: Duration = Duration::from_secs(120);

/// A daemon over a repository of its own, gone when dropped.
pub struct Served {
    child: Child,
    address: String,
    _repository: tempfile::TempDir,
}

impl Served {
    /// Starts the binary over copies of these models and waits until it is ready.
    pub async fn start(models: &[(&str, &Path)], flags: &[&str]) -> Self {
        let repository = tempfile::tempdir().expect("a temporary folder");
        for (name, folder) in models {
            copy(folder, &repository.path().join(name));
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_introspectd"))
            .args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", "off"])
            .args(["--log", "info", "--log-format", "json", "--models"])
            .arg(repository.path())
            .args(flags)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let log = child.stderr.take().expect("its log is a pipe");
        let (said, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                // Nobody listens any more once it is ready.
                let _ = said.send(line);
            }
        });
        let mut address = None;
        let until = Instant::now() + LOAD_LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = lines.recv_timeout(left).expect("the daemon becomes ready");
            let fields: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(grpc) = fields["grpc"].as_str() {
                address = Some(grpc.to_owned());
            }
            if fields["message"] == "ready" {
                break;
            }
        }
        Self {
            child,
            address: address.expect("the daemon says where it listens"),
            _repository: repository,
        }
    }

    /// A connection of its own.
    pub async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address))
            .expect("an address is a URI")
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_frame_size(FRAME)
            .tcp_nodelay(true)
            .connect()
            .await
            .expect("the daemon accepts")
    }

    pub async fn inference(&self) -> GrpcInferenceServiceClient<Channel> {
        GrpcInferenceServiceClient::new(self.channel().await).max_decoding_message_size(64 << 20)
    }

    pub async fn captures(&self) -> CaptureServiceClient<Channel> {
        CaptureServiceClient::new(self.channel().await)
    }

    pub async fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel().await).max_decoding_message_size(64 << 20)
    }

    /// A model's description.
    pub async fn model(&self, name: &str) -> pb::Model {
        let request = pb::GetModelRequest {
            model: name.to_owned(),
        };
        let answer = self.models().await.get_model(request).await;
        let answer = answer.expect("the model serves").into_inner();
        answer.model.expect("an answer holds the model")
    }

    pub fn front(&self) -> u32 {
        self.child.id()
    }

    /// Processes that the daemon started, by their parent.
    pub fn workers(&self) -> Vec<u32> {
        let front = self.child.id();
        let Ok(processes) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        processes
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                // The name, in brackets, may hold blanks.
                let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
                after.split(' ').nth(1).and_then(|p| p.parse().ok()) == Some(front)
            })
            .collect()
    }
}

/// What a client that reads large answers sets: enough for a message or two under way.
const WINDOW: u32 = 2 << 20;
/// A message in one frame.
const FRAME: u32 = 1 << 20;

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder in a temporary folder");
    for name in ["model.onnx", "config.json", "tokenizer.json"] {
        if from.join(name).is_file() {
            std::fs::copy(from.join(name), to.join(name)).expect("room for a copy of the model");
        }
    }
}

/// A runtime for clients that call at the same time, on a thread of its own.
pub fn clients() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime for the clients")
}

/// A predict of one row of token ids, as tensors.
pub fn predict(model: &str, row: &[i64]) -> oip::ModelInferRequest {
    let inputs = ["input_ids", "attention_mask", "token_type_ids"];
    let bytes = |values: &mut dyn Iterator<Item = i64>| -> Bytes {
        values.flat_map(i64::to_le_bytes).collect()
    };
    oip::ModelInferRequest {
        model_name: model.to_owned(),
        inputs: inputs
            .iter()
            .map(|name| InferInputTensor {
                name: (*name).to_owned(),
                datatype: "INT64".to_owned(),
                shape: vec![1, i64::try_from(row.len()).expect("rows are short")],
                ..InferInputTensor::default()
            })
            .collect(),
        raw_input_contents: vec![
            bytes(&mut row.iter().copied()),
            bytes(&mut row.iter().map(|_| 1)),
            bytes(&mut row.iter().map(|_| 0)),
        ],
        ..oip::ModelInferRequest::default()
    }
}

/// A capture of one row of token ids.
pub fn capture(model: &str, row: &[i64], hooks: &[String]) -> pb::CaptureRequest {
    let ids = row
        .iter()
        .map(|id| u32::try_from(*id).expect("a token id"))
        .collect();
    let tokens = pb::TokenIds {
        ids,
        type_ids: Vec::new(),
    };
    pb::CaptureRequest {
        model: model.to_owned(),
        input: Some(pb::Input {
            kind: Some(pb::input::Kind::Tokens(tokens)),
        }),
        selection: Some(pb::Selection {
            hooks: hooks.to_vec(),
            logits: pb::Logits::All.into(),
            ..pb::Selection::default()
        }),
        intervention: None,
    }
}

/// A capture, read to its end: the pieces of every tensor; the sum of their bytes is checked.
pub async fn read(
    client: &mut CaptureServiceClient<Channel>,
    request: pb::CaptureRequest,
) -> (BTreeMap<String, Vec<Bytes>>, pb::Summary) {
    let answer = client.capture(request).await.expect("the capture is made");
    let mut stream = answer.into_inner();
    let mut tensors: BTreeMap<String, Vec<Bytes>> = BTreeMap::new();
    let mut bytes = 0;
    while let Some(message) = stream.message().await.expect("the stream goes on") {
        match message.item.expect("a message holds something") {
            Item::Tensor(piece) => {
                bytes += piece.data.len() as u64;
                tensors.entry(piece.name).or_default().push(piece.data);
            }
            Item::Summary(summary) => {
                assert_eq!(summary.bytes, bytes, "every byte came");
                return (tensors, summary);
            }
            Item::Header(_) | Item::Sparse(_) | Item::Prediction(_) => {}
        }
    }
    panic!("the stream ended without a summary");
}
