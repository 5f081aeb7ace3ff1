//! A worker that never leaves the process: its runs take the time that the test says, on the clock that the test holds.
//!
//! For each row, `logits` is `[sum of its unmasked token ids, number of unmasked tokens]`, so that an answer tells
//! whose it is and whether padding showed. `wide` is as many floats as the row has tokens.

#![allow(dead_code, unreachable_pub)] // each test file uses its part

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use introspectd::{
    engine::{
        Encoding, Engine, EngineConfig, Generation, LoadError, Loaded, ModelHandle, TextInput,
        TokenizeOptions,
        backend::{
            Backend, BuiltVariant, Fault, Launched, Launcher, Order, Pick, Ran, Refusal, Started,
        },
    },
    ipc::{
        info::{Axis, Certificate, Dims, InputInfo, InputRole, ModelInfo, Task, ValueInfo},
        spec::VariantSpec,
    },
    tensor::{DType, Tensor},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A run with this token id in it is refused.
pub const POISON: i64 = 666;
/// A run with this token id in it panics in our own code.
pub const PANIC: i64 = 667;
/// A run with this token id in it goes on however often it is cancelled.
pub const STUBBORN: i64 = 668;

pub struct FakeWorker {
    pub run_time: Duration,
    pub build_time: Duration,
    pub runs: Mutex<Vec<Seen>>,
    pub builds: AtomicU32,
    pub fail_builds: AtomicBool,
    pub evicted: Mutex<Vec<u32>>,
    pub cancels: AtomicU32,
    next: AtomicU64,
    cancelled: Mutex<Vec<(u64, CancellationToken)>>,
    death: watch::Sender<Option<String>>,
}

/// A run as the worker saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub variant: u32,
    pub shape: Vec<usize>,
    /// Unpadded token ids of each row.
    pub rows: Vec<Vec<i64>>,
    pub at: tokio::time::Instant,
}

impl FakeWorker {
    pub fn new(run_time: Duration) -> Arc<Self> {
        Arc::new(Self {
            run_time,
            build_time: Duration::from_millis(100),
            runs: Mutex::default(),
            builds: AtomicU32::new(0),
            fail_builds: AtomicBool::new(false),
            evicted: Mutex::default(),
            cancels: AtomicU32::new(0),
            next: AtomicU64::new(1),
            cancelled: Mutex::default(),
            death: watch::Sender::new(None),
        })
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.runs.lock().unwrap().clone()
    }

    /// Whether a run had this token in it.
    pub fn ran(&self, id: i64) -> bool {
        self.seen()
            .iter()
            .any(|run| run.rows.iter().any(|row| row.contains(&id)))
    }

    pub fn die(&self, cause: &str) {
        self.death.send_if_modified(|death| {
            death
                .is_none()
                .then(|| *death = Some(cause.to_owned()))
                .is_some()
        });
    }

    fn gone(&self) -> BoxFuture<'static, String> {
        let mut death = self.death.subscribe();
        let keep = self.death.clone();
        Box::pin(async move {
            let _keep = keep;
            death
                .wait_for(Option::is_some)
                .await
                .unwrap()
                .clone()
                .unwrap()
        })
    }

    fn answer(rows: &[Vec<i64>], pick: &Pick) -> Tensor {
        let picked = &rows[pick.row as usize..(pick.row + pick.rows) as usize];
        let (mut shape, values): (Vec<usize>, Vec<f32>) = match pick.output {
            0 => (
                vec![2],
                picked
                    .iter()
                    .flat_map(|row| [row.iter().sum::<i64>() as f32, row.len() as f32])
                    .collect(),
            ),
            _ => (
                vec![pick.length as usize],
                picked.iter().flatten().map(|id| *id as f32).collect(),
            ),
        };
        if pick.rows > 1 || pick.keep_batch {
            shape.insert(0, pick.rows as usize);
        }
        Tensor::from_f32(shape, &values).unwrap()
    }
}

fn integers(bytes: &[u8]) -> Vec<i64> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b))
        .collect()
}

impl Backend for FakeWorker {
    fn run(&self, order: Order<'_>) -> Result<Started, Fault> {
        if let Some(cause) = self.death.borrow().clone() {
            return Err(Fault::Died { cause });
        }
        let written: Vec<Vec<i64>> = order
            .inputs
            .iter()
            .map(|input| {
                let mut bytes = vec![0xee; input.bytes()];
                input.write(&mut bytes);
                integers(&bytes)
            })
            .collect();
        let shape = order.inputs[0].shape.clone();
        let rows: Vec<Vec<i64>> = written[0]
            .chunks(shape[1])
            .zip(written[1].chunks(shape[1]))
            .map(|(ids, mask)| {
                ids.iter()
                    .zip(mask)
                    .filter(|(_, mask)| **mask == 1)
                    .map(|(id, _)| *id)
                    .collect()
            })
            .collect();
        let lengths: Vec<u32> = rows.iter().map(|r| r.len() as u32).collect();
        assert_eq!(lengths, order.lengths, "the mask says what the lengths say");
        self.runs.lock().unwrap().push(Seen {
            variant: order.variant,
            shape,
            rows: rows.clone(),
            at: tokio::time::Instant::now(),
        });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let cancel = CancellationToken::new();
        self.cancelled.lock().unwrap().push((id, cancel.clone()));
        let has = |token| rows.iter().any(|row| row.contains(&token));
        let (poison, panics, stubborn) = (has(POISON), has(PANIC), has(STUBBORN));
        let (gone, run_time, picks) = (self.gone(), self.run_time, order.picks);
        let done = Box::pin(async move {
            assert!(!panics, "a run that panics");
            let refused = |kind, message: &str| {
                Err(Fault::Refused {
                    kind,
                    message: message.into(),
                    subject: "inputs".into(),
                })
            };
            tokio::select! {
                biased;
                cause = gone => return Err(Fault::Died { cause }),
                () = cancel.cancelled(), if !stubborn => return refused(Refusal::Cancelled, "terminated"),
                () = tokio::time::sleep(if stubborn { Duration::from_secs(3600) } else { run_time }) => {}
            }
            if poison {
                return refused(Refusal::InvalidArgument, "a poisoned row");
            }
            Ok(Ran {
                tensors: picks
                    .iter()
                    .map(|pick| FakeWorker::answer(&rows, pick))
                    .collect(),
                non_finite: Vec::new(),
            })
        });
        Ok(Started { id, done })
    }

    fn cancel(&self, run: u64) {
        self.cancels.fetch_add(1, Ordering::Relaxed);
        for (id, token) in self.cancelled.lock().unwrap().iter() {
            if *id == run {
                token.cancel();
            }
        }
    }

    fn build(
        &self,
        _id: u32,
        spec: &VariantSpec,
    ) -> BoxFuture<'static, Result<BuiltVariant, Fault>> {
        self.builds.fetch_add(1, Ordering::Relaxed);
        let fails = self.fail_builds.load(Ordering::Relaxed);
        let mut outputs = info("any").outputs;
        outputs.extend(spec.expose.iter().map(|name| ValueInfo {
            name: name.clone(),
            dtype: DType::F32,
            axes: vec![Axis::Batch, Axis::Pos],
            dims: vec![None, None],
        }));
        let build_time = self.build_time;
        Box::pin(async move {
            tokio::time::sleep(build_time).await;
            if fails {
                return Err(Fault::Refused {
                    kind: Refusal::FailedPrecondition,
                    message: "it cannot be shown".into(),
                    subject: String::new(),
                });
            }
            Ok(BuiltVariant {
                outputs,
                bytes: 1 << 20,
            })
        })
    }

    fn evict(&self, id: u32) {
        self.evicted.lock().unwrap().push(id);
    }

    fn tokenize(
        &self,
        _: Vec<TextInput>,
        _: TokenizeOptions,
    ) -> BoxFuture<'static, Result<Vec<Encoding>, Fault>> {
        unreachable!("the fake has no tokenizer")
    }

    fn decode(&self, _: Vec<u32>) -> BoxFuture<'static, Result<Vec<String>, Fault>> {
        unreachable!("the fake has no tokenizer")
    }

    fn dump(&self) -> BoxFuture<'static, Result<String, Fault>> {
        Box::pin(std::future::ready(Ok("graph".into())))
    }

    fn kill(&self, cause: &str) {
        self.die(cause);
    }

    fn died(&self) -> BoxFuture<'static, String> {
        self.gone()
    }

    fn resident_bytes(&self) -> u64 {
        0
    }

    fn pid(&self) -> Option<u32> {
        None
    }
}

/// What the fake says of its model.
pub fn info(name: &str) -> ModelInfo {
    let input = |name: &str, role| InputInfo {
        name: name.into(),
        dtype: DType::I64,
        dims: vec![None, None],
        axes: vec![Axis::Batch, Axis::Pos],
        role,
    };
    ModelInfo {
        name: name.into(),
        fingerprint: "00".into(),
        task: Task::SequenceClassification,
        inputs: vec![
            input("input_ids", InputRole::TokenIds),
            input("attention_mask", InputRole::AttentionMask),
        ],
        outputs: vec![ValueInfo {
            name: "logits".into(),
            dtype: DType::F32,
            axes: vec![Axis::Batch, Axis::Label],
            dims: vec![None, Some(2)],
        }],
        main_output: "logits".into(),
        labels: Vec::new(),
        dims: Dims {
            vocab: Some(100_000),
            ..Dims::default()
        },
        hooks: Vec::new(),
        missing: Vec::new(),
        certificate: Certificate::default(),
        tokenizer: None,
        pads: true,
        fixed_batch: None,
        rows_interact: false,
        fixed_length: None,
        max_tokens: Some(4096),
        producer: "fake".into(),
        opset: 17,
        notes: Vec::new(),
        runtime: "none".into(),
        provider: "cpu".into(),
        load: Vec::new(),
        picture: String::new(),
    }
}

/// An engine with one model.
pub async fn serve(config: EngineConfig, worker: &Arc<FakeWorker>) -> (Engine, ModelHandle) {
    let engine = Engine::new(config);
    let handle = adopt(&engine, worker, "fake").await;
    (engine, handle)
}

/// One more model for an engine.
pub async fn adopt(engine: &Engine, worker: &Arc<FakeWorker>, name: &str) -> ModelHandle {
    ModelHandle::new(generation(engine, worker, name).await).0
}

pub async fn generation(engine: &Engine, worker: &Arc<FakeWorker>, name: &str) -> Arc<Generation> {
    let loaded = Loaded {
        number: 1,
        info: info(name),
        backend: worker.clone(),
    };
    engine.adopt(loaded).await.unwrap()
}

/// What launching is to do next.
#[derive(Clone, Debug)]
pub enum Next {
    Work,
    Refuse(&'static str),
    Crash(&'static str),
    Hang,
}

/// Makes fake workers, as told.
pub struct FakeLauncher {
    pub load_time: Duration,
    pub next: Mutex<Next>,
    pub launched: Mutex<Vec<Arc<FakeWorker>>>,
    pub launches: AtomicU32,
}

impl FakeLauncher {
    pub fn new(load_time: Duration) -> Arc<Self> {
        Arc::new(Self {
            load_time,
            next: Mutex::new(Next::Work),
            launched: Mutex::default(),
            launches: AtomicU32::new(0),
        })
    }

    pub fn set(&self, next: Next) {
        *self.next.lock().unwrap() = next;
    }

    pub fn last(&self) -> Arc<FakeWorker> {
        self.launched.lock().unwrap().last().unwrap().clone()
    }

    /// Workers that were launched and are not gone.
    pub fn alive(&self) -> usize {
        self.launched
            .lock()
            .unwrap()
            .iter()
            .filter(|w| w.death.borrow().is_none())
            .count()
    }
}

/// Ends a worker whose launch is given up.
struct Unless(Option<Arc<FakeWorker>>);

impl Drop for Unless {
    fn drop(&mut self) {
        if let Some(worker) = self.0.take() {
            worker.die("dropped");
        }
    }
}

impl Launcher for FakeLauncher {
    fn launch(&self, _folder: &Path) -> BoxFuture<'static, Result<Launched, LoadError>> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        let next = self.next.lock().unwrap().clone();
        let worker = FakeWorker::new(Duration::from_millis(10));
        self.launched.lock().unwrap().push(worker.clone());
        let load_time = self.load_time;
        let unless = Unless(Some(worker.clone()));
        Box::pin(async move {
            let mut unless = unless;
            tokio::time::sleep(load_time).await;
            match next {
                Next::Work => {
                    unless.0.take();
                    Ok((worker as Arc<dyn Backend>, info("")))
                }
                Next::Refuse(message) => Err(LoadError::Refused {
                    kind: Refusal::BadModel,
                    message: message.into(),
                }),
                Next::Crash(cause) => Err(LoadError::Crashed {
                    cause: cause.into(),
                }),
                Next::Hang => std::future::pending().await,
            }
        })
    }
}
