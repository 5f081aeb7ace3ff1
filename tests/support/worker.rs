//! Starts the real worker binary and talks to it as the front does.

#![allow(clippy::wildcard_enum_match_arm)] // a test panics on what it does not expect
#![allow(dead_code)] // every test binary uses a part of it

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use introspectd::{
    ipc::{
        front::{Answer, Connection, Gone},
        info::{ModelInfo, ValueInfo},
        shm::aligned,
        spec::{LoadOptions, VariantSpec},
        wire::{
            Build, Built, Encoding, Failed, Failure, Load, Pick, Ran, Run, TensorRef, Text,
            Tokenize, command, event,
        },
    },
    tensor::{DType, Tensor},
};

/// Shared memory of the front's side.
const BUDGET: usize = 1 << 30;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/models")
        .join(name)
}

/// Every model of the fixtures.
pub fn fixtures() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(fixture(""))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() > 10, "the fixtures are there: {names:?}");
    names
}

/// A worker process and the connection to it.
pub struct Worker {
    pub child: Child,
    pub connection: Connection,
}

/// The command that starts a worker, its environment as the front's.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_introspectd"));
    command.arg("worker").env("ORT_DISABLE_TELEMETRY", "1");
    command
}

/// What a run gave, or why it gave nothing.
pub type RunEnd = Result<(Vec<Tensor>, Ran), Failed>;

impl Worker {
    pub fn start() -> Self {
        Self::from(command())
    }

    /// Must be called within a runtime.
    pub fn from(mut command: Command) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        // The command keeps the worker's end open otherwise, and a dead worker would go unnoticed.
        drop(command);
        Self {
            child,
            connection: Connection::new(ours, BUDGET).unwrap(),
        }
    }

    /// A worker that holds a fixture.
    pub async fn with(model: &str) -> (Self, ModelInfo) {
        let worker = Self::start();
        let info = worker
            .load(&fixture(model), &LoadOptions::default())
            .await
            .unwrap_or_else(|f| panic!("{model}: {}", f.message));
        (worker, info)
    }

    pub async fn load(&self, folder: &Path, options: &LoadOptions) -> Result<ModelInfo, Failed> {
        let id = self.connection.next_id();
        let load = Load {
            id,
            folder: folder.to_str().unwrap().to_owned(),
            options: serde_json::to_string(options).unwrap(),
        };
        match self.call(id, command::Kind::Load(load)).await.unwrap().0 {
            event::Kind::Loaded(l) => Ok(serde_json::from_str(&l.info).unwrap()),
            event::Kind::Failed(f) => Err(f),
            other => panic!("{other:?}"),
        }
    }

    pub async fn build(
        &self,
        variant: u32,
        spec: &VariantSpec,
    ) -> Result<(Vec<ValueInfo>, Built), Failed> {
        let id = self.connection.next_id();
        let build = Build {
            id,
            variant,
            spec: serde_json::to_string(spec).unwrap(),
        };
        match self.call(id, command::Kind::Build(build)).await.unwrap().0 {
            event::Kind::Built(b) => Ok((serde_json::from_str(&b.outputs).unwrap(), b)),
            event::Kind::Failed(f) => Err(f),
            other => panic!("{other:?}"),
        }
    }

    pub async fn run(
        &self,
        variant: u32,
        inputs: &[(String, Tensor)],
        picks: Vec<Pick>,
    ) -> Result<(Vec<Tensor>, Ran), Failed> {
        let (_, done) = self.start_run(variant, inputs, picks);
        done.await.unwrap()
    }

    /// The id of a run and its end.
    pub fn start_run(
        &self,
        variant: u32,
        inputs: &[(String, Tensor)],
        picks: Vec<Pick>,
    ) -> (u64, impl Future<Output = Result<RunEnd, Gone>> + use<>) {
        let total: usize = inputs.iter().map(|(_, t)| aligned(t.bytes().len())).sum();
        let mut segment = self.connection.pool().with(|p| p.take(total)).unwrap();
        let (mut references, mut at) = (Vec::new(), 0);
        for (name, tensor) in inputs {
            let length = tensor.bytes().len();
            segment.bytes_mut()[at..at + length].copy_from_slice(tensor.bytes());
            references.push(TensorRef {
                name: name.clone(),
                dtype: tensor.dtype() as u32,
                shape: tensor.shape().iter().map(|d| *d as u64).collect(),
                span: Some(segment.span(at, length)),
            });
            at += aligned(length);
        }
        let id = self.connection.next_id();
        let run = Run {
            id,
            variant,
            inputs: references,
            lengths: Vec::new(),
            picks,
        };
        let connection = self.connection.clone();
        let done = async move {
            let (kind, views) = connection
                .call(id, command::Kind::Run(run), Some(segment))
                .await?;
            Ok(match kind {
                event::Kind::Ran(ran) => {
                    let tensors = ran
                        .tensors
                        .iter()
                        .zip(views)
                        .map(|(t, bytes)| {
                            let shape = t.shape.iter().map(|d| *d as usize).collect();
                            Tensor::new(DType::try_from(t.dtype).unwrap(), shape, bytes).unwrap()
                        })
                        .collect();
                    Ok((tensors, ran))
                }
                event::Kind::Failed(f) => Err(f),
                other => panic!("{other:?}"),
            })
        };
        (id, done)
    }

    pub async fn tokenize(&self, texts: &[&str], truncate: bool) -> Result<Vec<Encoding>, Failed> {
        let id = self.connection.next_id();
        let tokenize = Tokenize {
            id,
            texts: texts
                .iter()
                .map(|t| Text {
                    text: (*t).to_owned(),
                    pair: None,
                })
                .collect(),
            add_special_tokens: true,
            truncate,
        };
        match self
            .call(id, command::Kind::Tokenize(tokenize))
            .await
            .unwrap()
            .0
        {
            event::Kind::Tokenized(t) => Ok(t.encodings),
            event::Kind::Failed(f) => Err(f),
            other => panic!("{other:?}"),
        }
    }

    pub async fn call(&self, id: u64, command: command::Kind) -> Result<Answer, Gone> {
        self.connection.call(id, command, None).await
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Each output whole: all rows, nothing cut.
pub fn everything(outputs: &[ValueInfo], rows: u32) -> Vec<Pick> {
    (0..outputs.len() as u32)
        .map(|output| Pick {
            output,
            rows,
            keep_batch: true,
            ..Pick::default()
        })
        .collect()
}

/// Inputs of `rows` rows of `length` tokens that differ by row and position, for a model of the fixtures.
pub fn inputs(info: &ModelInfo, rows: usize, length: usize) -> Vec<(String, Tensor)> {
    use introspectd::ipc::info::InputRole;
    // Of the smallest vocabularies, too.
    let tokens = info.dims.vocab.map_or(200, |v| (v - 5).min(200));
    info.inputs
        .iter()
        .map(|input| {
            let shape: Vec<usize> = input
                .dims
                .iter()
                .enumerate()
                .map(|(axis, d)| d.unwrap_or(if axis == 0 { rows } else { length }))
                .collect();
            if let ([_, heads, _, _], InputRole::Past) = (&shape[..], input.role) {
                // An empty past.
                let width = info.dims.d_head.unwrap();
                let past = Tensor::from_f32(vec![rows, *heads, 0, width], &[]);
                return (input.name.clone(), past.unwrap());
            }
            let count: usize = shape.iter().product();
            let at = |i: usize| (i / length.max(1), i % length.max(1));
            let tensor = match input.role {
                InputRole::Pixels => {
                    let values: Vec<f32> =
                        (0..count).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect();
                    Tensor::from_f32(shape, &values)
                }
                role => {
                    let values: Vec<i64> = (0..count)
                        .map(|i| match role {
                            InputRole::TokenIds => {
                                5 + ((at(i).0 * 31 + at(i).1 * 7) % tokens) as i64
                            }
                            InputRole::AttentionMask => 1,
                            InputRole::PositionIds => at(i).1 as i64,
                            InputRole::TypeIds
                            | InputRole::Pixels
                            | InputRole::Past
                            | InputRole::Other => 0,
                        })
                        .collect();
                    Tensor::from_i64(shape, &values)
                }
            };
            (input.name.clone(), tensor.unwrap())
        })
        .collect()
}

pub fn kind(failed: &Failed) -> Failure {
    failed.failure()
}
