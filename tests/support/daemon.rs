//! A whole daemon on free ports, with real workers, and a client that checks what it reads.

#![allow(dead_code)] // every test binary uses a part of it

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use introspectd::{
    config::{Config, Flags},
    engine::WorkerCommand,
    service::{
        Daemon, Setup,
        wire::introspect::{
            self as pb, capture_response::Item, capture_service_client::CaptureServiceClient,
            model_service_client::ModelServiceClient,
        },
    },
    shutdown::Shutdown,
    tensor::{DType, Tensor},
};
use tonic::{Status, Streaming, transport::Channel};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/models")
        .join(name)
}

pub fn demo_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-model")
}

/// A daemon over a repository that is gone with it.
pub struct TestDaemon {
    pub repository: tempfile::TempDir,
    pub shutdown: Shutdown,
    pub daemon: Daemon,
}

/// Puts a model of the fixtures into a repository.
pub fn put(repository: &Path, name: &str, from: &Path) {
    let to = repository.join(name);
    std::fs::create_dir_all(&to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

pub fn config(repository: &Path) -> Config {
    Config::resolve(&Flags {
        models: Some(repository.to_str().unwrap().to_owned()),
        listen: Some("127.0.0.1:0".to_owned()),
        admin_listen: Some("127.0.0.1:0".to_owned()),
        ..Flags::default()
    })
    .unwrap()
}

impl TestDaemon {
    /// Over these fixtures, loaded.
    pub async fn with(models: &[&str]) -> Self {
        Self::tuned(models, |_| {}).await
    }

    pub async fn tuned(models: &[&str], tune: impl FnOnce(&mut Config)) -> Self {
        let repository = tempfile::tempdir().unwrap();
        for name in models {
            put(repository.path(), name, &fixture(name));
        }
        let this = Self::over(repository, tune).await;
        this.daemon.settled().await;
        this
    }

    /// Over a repository as it is; not settled yet.
    pub async fn over(repository: tempfile::TempDir, tune: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(repository.path());
        tune(&mut config);
        let shutdown = Shutdown::default();
        let setup = Setup {
            worker: Some(WorkerCommand::of(env!("CARGO_BIN_EXE_introspectd"))),
            ..Setup::new(config)
        };
        let daemon = Daemon::start(setup, shutdown.clone()).await.unwrap();
        Self {
            repository,
            shutdown,
            daemon,
        }
    }

    pub async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.daemon.address()))
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    pub async fn captures(&self) -> CaptureServiceClient<Channel> {
        CaptureServiceClient::new(self.channel().await).max_decoding_message_size(64 << 20)
    }

    pub async fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel().await).max_decoding_message_size(64 << 20)
    }

    /// A model's description.
    pub async fn model(&self, name: &str) -> pb::Model {
        let request = pb::GetModelRequest {
            model: name.to_owned(),
        };
        let answer = self.models().await.get_model(request).await.unwrap();
        answer.into_inner().model.unwrap()
    }

    /// A capture, read to its end.
    pub async fn capture(&self, request: pb::CaptureRequest) -> Result<Answer, Status> {
        let mut client = self.captures().await;
        let stream = client.capture(request).await?.into_inner();
        Answer::read(stream).await
    }

    pub async fn stop(self) {
        self.shutdown.drain.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(30), self.daemon.finished()).await;
        ended.expect("the daemon ends within its grace");
    }
}

/// An answer, put together and checked against its summary.
#[derive(Debug, Default)]
pub struct Answer {
    pub header: pb::CaptureHeader,
    pub tensors: BTreeMap<String, Tensor>,
    pub axes: BTreeMap<String, Vec<String>>,
    pub sparse: BTreeMap<String, pb::SparseTensor>,
    /// Names as they came.
    pub order: Vec<String>,
    pub prediction: Option<pb::Prediction>,
    pub summary: pb::Summary,
}

/// Puts messages together.
#[derive(Default)]
pub struct Reader {
    answer: Answer,
    parts: BTreeMap<String, (pb::Tensor, Vec<u8>)>,
    messages: u64,
    bytes: u64,
    crc: u32,
}

impl Reader {
    fn payload(&mut self, part: &[u8]) {
        self.bytes += part.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, part);
    }

    fn seen(&mut self, name: &str) {
        if self.answer.order.last().is_none_or(|n| n != name) {
            self.answer.order.push(name.to_owned());
        }
    }

    /// Takes a message; gives the answer with the last.
    pub fn take(&mut self, item: Item) -> Option<Answer> {
        match item {
            Item::Header(h) => {
                assert_eq!(self.messages, 0, "the header comes first");
                self.answer.header = h;
            }
            Item::Tensor(t) => {
                assert!(t.data.len() <= 256 << 10, "a piece is bounded");
                self.payload(&t.data);
                self.seen(&t.name);
                let data = t.data.clone();
                let (_, bytes) = self
                    .parts
                    .entry(t.name.clone())
                    .or_insert_with(|| (t.clone(), Vec::new()));
                assert_eq!(t.offset as usize, bytes.len(), "pieces follow each other");
                bytes.extend_from_slice(&data);
            }
            Item::Sparse(s) => {
                for part in [&s.counts, &s.indices, &s.values] {
                    self.payload(part);
                }
                self.seen(&s.name);
                let whole = self.answer.sparse.entry(s.name.clone()).or_default();
                let join = |a: &bytes::Bytes, b: &bytes::Bytes| [&a[..], &b[..]].concat().into();
                *whole = pb::SparseTensor {
                    counts: join(&whole.counts, &s.counts),
                    indices: join(&whole.indices, &s.indices),
                    values: join(&whole.values, &s.values),
                    first_row: 0,
                    ..s
                };
            }
            Item::Prediction(p) => self.answer.prediction = Some(p),
            Item::Summary(s) => {
                assert_eq!(s.messages, self.messages);
                assert_eq!(s.bytes, self.bytes);
                assert_eq!(s.crc32c, self.crc);
                let mut answer = std::mem::take(&mut self.answer);
                answer.summary = s;
                for (name, (t, bytes)) in std::mem::take(&mut self.parts) {
                    let shape = t.shape.iter().map(|n| *n as usize).collect();
                    let dtype = match t.dtype() {
                        pb::DType::F32 => DType::F32,
                        pb::DType::F16 => DType::F16,
                        pb::DType::Bf16 => DType::Bf16,
                        pb::DType::I64 => DType::I64,
                        pb::DType::Bool => DType::Bool,
                        other => panic!("{other:?}"),
                    };
                    let tensor = Tensor::new(dtype, shape, bytes.into()).unwrap();
                    answer.axes.insert(name.clone(), t.axes);
                    answer.tensors.insert(name, tensor);
                }
                return Some(answer);
            }
        }
        self.messages += 1;
        None
    }
}

impl Answer {
    pub async fn read(mut stream: Streaming<pb::CaptureResponse>) -> Result<Self, Status> {
        let mut reader = Reader::default();
        while let Some(message) = stream.message().await? {
            if let Some(answer) = reader.take(message.item.expect("a message holds something")) {
                assert!(stream.message().await?.is_none(), "the summary comes last");
                return Ok(answer);
            }
        }
        panic!("a stream ended without a summary and without an error");
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        let t = self
            .tensors
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not among {:?}", self.order));
        t.to_f32().unwrap().into_owned()
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors[name].shape().to_vec()
    }
}

pub fn text(model: &str, text: &str, selection: pb::Selection) -> pb::CaptureRequest {
    request(
        model,
        pb::input::Kind::Text(pb::Text {
            text: text.to_owned(),
            ..pb::Text::default()
        }),
        selection,
    )
}

pub fn ids(model: &str, ids: &[u32], selection: pb::Selection) -> pb::CaptureRequest {
    request(
        model,
        pb::input::Kind::Tokens(pb::TokenIds {
            ids: ids.to_vec(),
            type_ids: Vec::new(),
        }),
        selection,
    )
}

pub fn request(model: &str, kind: pb::input::Kind, selection: pb::Selection) -> pb::CaptureRequest {
    pb::CaptureRequest {
        model: model.to_owned(),
        input: Some(pb::Input { kind: Some(kind) }),
        selection: Some(selection),
        intervention: None,
    }
}

pub fn hooks(names: &[&str]) -> pb::Selection {
    pb::Selection {
        hooks: names.iter().map(|n| (*n).to_owned()).collect(),
        ..pb::Selection::default()
    }
}

/// A page of the admin listener: its status line and its body.
pub async fn page(daemon: &Daemon, path: &str) -> (String, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let address = daemon.admin_address().unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let ask = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}
