//! A training over one stream: a header, examples, and what came out.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use metrics::counter;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::MissedTickBehavior,
};
use tonic::{Status, Streaming};

use super::{
    super::{
        bulk::{self, AHEAD},
        call::Call,
        daemon::State,
        explained::Explained,
        from_proto::named,
        messages::Ledger,
        status, to_proto as common,
        wire::introspect::{
            self as pb, train_request::Item as Asked, train_response::Item as Message,
        },
    },
    from_proto, to_proto,
};
use crate::{
    engine::{Ctx, EngineError, ModelHandle, StageTimings},
    methods::probe::{
        extract::{self, Plan, Rows},
        store::Store,
        train::{Terms, Trained, Training},
    },
    telemetry::names,
};

/// Trainings at a time: each may take as much memory as one may, and fits keep every core busy.
const MOST: usize = 4;
/// When to ask again where there are so many.
const COME_BACK: Duration = Duration::from_secs(5);

/// The trainings that are under way in this daemon.
#[derive(Clone)]
pub(in crate::service) struct Trainings(Arc<Semaphore>);

impl Default for Trainings {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST)))
    }
}

impl Trainings {
    fn one_more(&self) -> Result<OwnedSemaphorePermit, EngineError> {
        let permit = self.0.clone().try_acquire_owned();
        permit.map_err(|_| {
            let message = format!("{MOST} trainings of probes are under way: try again later");
            EngineError::exhausted(message, Some(COME_BACK))
        })
    }
}

/// How often progress is told: at least twice a second.
const TICK: Duration = Duration::from_millis(400);

type Sender = mpsc::Sender<Result<Message, Status>>;

/// A training whose header was understood.
pub(super) struct Begun {
    training: Training,
    store: Store,
    explained: Explained,
    /// Held until it ends.
    place: OwnedSemaphorePermit,
}

/// Reads the header.
pub(super) fn begin(
    state: &State,
    first: Option<pb::TrainRequest>,
    call: &Call,
) -> Result<Begun, EngineError> {
    let Some(Asked::Header(header)) = first.and_then(|r| r.item) else {
        return Err(EngineError::invalid(
            "header",
            "is missing: the first message says what to train",
        ));
    };
    let model = named(header.model.clone()).map_err(|e| e.beneath("header"))?;
    let handle = state.registry.get(&model)?;
    let explained = Explained::new(&model, "probe_train", call.arrived);
    let begun = (|| {
        let asked = from_proto::header(header)?;
        let store = state.probes_of(&model)?;
        if let Some(name) = &asked.name {
            // Before anything is run, not after.
            store.may_put(name, asked.replace)?;
        }
        let terms = Terms {
            memory: state.config.probe_memory,
            max_bytes: state.config.max_capture,
            threads: threads(),
        };
        let training = Training::begin(handle, asked, terms)?;
        Ok((training, store, state.trainings.one_more()?))
    })();
    match begun {
        Ok((training, store, place)) => Ok(Begun {
            training,
            store,
            explained,
            place,
        }),
        Err(error) => {
            explained.failed(&error);
            Err(error)
        }
    }
}

/// Hook points that are fitted at a time: a core for each.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Stops a fit when nobody waits for it any more.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends all messages of a training.
pub(super) async fn run(
    state: Arc<State>,
    begun: Begun,
    requests: Streaming<pb::TrainRequest>,
    call: Call,
    sender: Sender,
) {
    let Begun {
        training,
        store,
        explained,
        place: _place,
    } = begun;
    let mut told = Told {
        sender,
        ledger: Ledger::default(),
        progress: pb::TrainProgress {
            hooks: u32::try_from(training.plan().hooks.len()).unwrap_or(u32::MAX),
            ..pb::TrainProgress::default()
        },
        timings: StageTimings::default(),
        call,
    };
    let done = work(&state, training, &store, requests, &mut told);
    match done.await {
        Ok(result) => {
            if told.send(Message::Result(result)).await.is_ok() {
                explained.answered(&told.timings);
                let total = told.call.arrived.elapsed();
                let summary = pb::Summary {
                    messages: told.ledger.messages,
                    timings: Some(common::timings(&told.timings, total)),
                    rows: told.progress.examples_run,
                    ..pb::Summary::default()
                };
                // A reader that left needs none.
                let _ = told.sender.send(Ok(Message::Summary(summary))).await;
            }
        }
        Err(error) => {
            explained.failed(&error);
            let _ = told.sender.send(Err(status::status(&error))).await;
        }
    }
}

struct Told {
    sender: Sender,
    ledger: Ledger,
    progress: pb::TrainProgress,
    /// Of all examples; what fits took is `reduce`.
    timings: StageTimings,
    call: Call,
}

impl Told {
    /// Says that the reader left when it did.
    async fn send(&mut self, message: Message) -> Result<(), EngineError> {
        self.ledger.sent(&[]);
        let sent = self.sender.send(Ok(message)).await;
        sent.map_err(|_| EngineError::Cancelled)
    }

    /// A reader that is behind gets the next one.
    fn progress(&mut self) {
        self.progress.elapsed_seconds = self.call.arrived.elapsed().as_secs_f64();
        if let Ok(room) = self.sender.try_reserve() {
            self.ledger.sent(&[]);
            room.send(Ok(Message::Progress(self.progress)));
        }
    }
}

async fn work(
    state: &State,
    training: Training,
    store: &Store,
    requests: Streaming<pb::TrainRequest>,
    told: &mut Told,
) -> Result<pb::TrainResult, EngineError> {
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let training = collect(state, training, requests, told, &mut tick).await?;
    let name = training.asked().name.clone();
    let replace = training.asked().replace;
    let model = training.handle().info().name.clone();
    let begun = Instant::now();
    let trained = fit(training, told, &mut tick).await?;
    told.timings.reduce += begun.elapsed();
    counter!(names::PROBE_SPILLED_BYTES, "model" => model).increment(trained.spilled);
    let stored = name.is_some();
    let card = if stored {
        let (store, Trained { card, weights, .. }) = (store.clone(), trained);
        let put = tokio::task::spawn_blocking(move || store.put(card, &weights, replace));
        put.await.map_err(EngineError::internal)??
    } else {
        trained.card
    };
    Ok(pb::TrainResult {
        probe: Some(to_proto::probe(card)),
        stored,
    })
}

/// Runs examples as they come.
async fn collect(
    state: &State,
    mut training: Training,
    requests: Streaming<pb::TrainRequest>,
    told: &mut Told,
    tick: &mut tokio::time::Interval,
) -> Result<Training, EngineError> {
    let (handle, plan) = (training.handle().clone(), training.plan());
    let (call, limit) = (told.call.clone(), state.config.stall_limit);
    let examples = counter!(names::PROBE_EXAMPLES, "model" => handle.info().name.clone());
    let received = AtomicU64::new(0);
    let heard = &received;
    let rows = requests
        .enumerate()
        .map(|(at, request)| {
            heard.store(at as u64 + 1, Ordering::Relaxed);
            let (handle, plan, call) = (handle.clone(), plan.clone(), call.clone());
            async move {
                let rows = example(&handle, &plan, request, &call, limit).await;
                (at, rows)
            }
        })
        .buffered(AHEAD);
    let mut rows = pin!(rows);
    loop {
        tokio::select! {
            next = rows.next() => {
                let Some((at, rows)) = next else {
                    return Ok(training);
                };
                let pushed = rows.and_then(|rows| {
                    told.timings += rows.timings;
                    training.push(rows)
                });
                pushed.map_err(|e| e.beneath(&format!("examples[{at}]")))?;
                told.progress.examples_run += 1;
                examples.increment(1);
            }
            _ = tick.tick() => {
                told.progress.examples_received = received.load(Ordering::Relaxed);
                told.progress();
            }
        }
    }
}

async fn example(
    handle: &ModelHandle,
    plan: &Plan,
    request: Result<pb::TrainRequest, Status>,
    call: &Call,
    limit: Duration,
) -> Result<Rows, EngineError> {
    // A stream that breaks is a caller that left.
    let request = request.map_err(|_| EngineError::Cancelled)?;
    let Some(Asked::Example(example)) = request.item else {
        return Err(EngineError::invalid(
            "",
            "is no example: after the header come examples only",
        ));
    };
    let example = from_proto::example(example)?;
    let ctx: Ctx = call.ctx();
    let until = Instant::now() + limit;
    bulk::when_there_is_room(until, || {
        extract::extract(handle, plan, example.clone(), &ctx)
    })
    .await
}

/// Fits on threads of its own, and tells of each hook point.
async fn fit(
    training: Training,
    told: &mut Told,
    tick: &mut tokio::time::Interval,
) -> Result<Trained, EngineError> {
    let stop = Stop(Arc::default());
    let flag = stop.0.clone();
    let (reports, mut heard) = mpsc::channel(training.plan().hooks.len().max(1));
    let mut fitting = tokio::task::spawn_blocking(move || {
        // There is room for all, and the listener outlives them unless the caller left.
        training.fit(&flag, |report| {
            let _ = reports.try_send(report.clone());
        })
    });
    loop {
        tokio::select! {
            biased;
            Some(report) = heard.recv() => {
                told.progress.hooks_done += 1;
                told.send(Message::Report(to_proto::report(report))).await?;
            }
            done = &mut fitting => {
                let trained = done.map_err(EngineError::internal)??;
                while let Ok(report) = heard.try_recv() {
                    told.progress.hooks_done += 1;
                    told.send(Message::Report(to_proto::report(report))).await?;
                }
                return Ok(trained);
            }
            _ = tick.tick() => told.progress(),
        }
    }
}
