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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Elapsed;
use tonic::{Status, Streaming};

use super::{
    super::{
        bulk::{self, AHEAD},
        call::Call,
        daemon::State,
        explained::Explained,
        from_proto::named,
        messages::Item,
        teller::{Ended, Teller},
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

/// A training whose header was understood.
pub(super) struct Begun {
    training: Training,
    store: Store,
    /// Held until it ends.
    place: OwnedSemaphorePermit,
}

/// Reads the header.
pub(super) fn begin(
    state: &State,
    first: Option<pb::TrainRequest>,
    call: &Call,
) -> Result<(Begun, Explained), EngineError> {
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
        Ok(Begun {
            training,
            store,
            place: state.trainings.one_more()?,
        })
    })();
    explained.begun(begun)
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

impl Item for Message {
    /// Everything is in fields.
    fn payload(&self) -> Vec<&[u8]> {
        Vec::new()
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Progress(_) | Message::Report(_) | Message::Result(_) => None,
        }
    }
}

/// How far a training is.
#[derive(Default)]
struct Told {
    progress: pb::TrainProgress,
    /// Of all examples; what fits took is `reduce`.
    timings: StageTimings,
    /// Tokens that truncation cut off, of all examples.
    truncated: u32,
}

impl Told {
    fn progress(&self, elapsed: Duration) -> Message {
        Message::Progress(pb::TrainProgress {
            elapsed_seconds: elapsed.as_secs_f64(),
            ..self.progress
        })
    }
}

/// Sends progress, the report of each hook point as it is done, the result.
pub(super) async fn tell(
    state: Arc<State>,
    begun: Begun,
    requests: Streaming<pb::TrainRequest>,
    teller: &mut Teller<Message>,
) -> Result<Ended, EngineError> {
    let Begun {
        training,
        store,
        place: _place,
    } = begun;
    let mut told = Told::default();
    told.progress.hooks = u32::try_from(training.plan().hooks.len()).unwrap_or(u32::MAX);
    let training = collect(&state, training, requests, (&mut told, teller)).await?;
    let name = training.asked().name.clone();
    let replace = training.asked().replace;
    let model = training.handle().info().name.clone();
    let begun = Instant::now();
    let trained = fit(training, (&mut told, teller)).await?;
    told.timings.reduce += begun.elapsed();
    counter!(names::PROBE_SPILLED_BYTES, "model" => model).increment(trained.spilled);
    let stored = name.is_some();
    let Trained {
        card,
        weights,
        notes,
        spilled: _,
    } = trained;
    let card = if stored {
        let put = tokio::task::spawn_blocking(move || store.put(card, &weights, replace));
        put.await.map_err(EngineError::internal)??
    } else {
        card
    };
    let result = pb::TrainResult {
        probe: Some(to_proto::probe(card)),
        stored,
    };
    teller.send(Message::Result(result)).await?;
    Ok(Ended {
        timings: told.timings,
        rows: told.progress.examples_run,
        truncated_tokens: told.truncated,
        notes,
        ..Ended::default()
    })
}

/// Runs examples as they come.
async fn collect(
    state: &State,
    mut training: Training,
    requests: Streaming<pb::TrainRequest>,
    (told, teller): (&mut Told, &mut Teller<Message>),
) -> Result<Training, EngineError> {
    let (handle, plan) = (training.handle().clone(), training.plan());
    let (call, limit) = (teller.call.clone(), state.config.stall_limit);
    let examples = counter!(names::PROBE_EXAMPLES, "model" => handle.info().name.clone());
    let received = AtomicU64::new(0);
    let heard = &received;
    // While others wait for its place, a training whose examples do not come is given up.
    let rows = tokio_stream::StreamExt::timeout(requests, limit)
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
        let progress = |elapsed| {
            told.progress.examples_received = received.load(Ordering::Relaxed);
            told.progress(elapsed)
        };
        let Some((at, rows)) = teller.working(rows.next(), progress).await else {
            return Ok(training);
        };
        let pushed = rows.and_then(|rows| {
            told.timings += rows.timings;
            told.truncated = told.truncated.saturating_add(rows.truncated);
            training.push(rows)
        });
        pushed.map_err(|e| e.beneath(&format!("examples[{at}]")))?;
        told.progress.examples_run += 1;
        examples.increment(1);
    }
}

async fn example(
    handle: &ModelHandle,
    plan: &Plan,
    request: Result<Result<pb::TrainRequest, Status>, Elapsed>,
    call: &Call,
    limit: Duration,
) -> Result<Rows, EngineError> {
    let request = request.map_err(|_| {
        let message = format!(
            "no example came for {limit:?}, and there are {MOST} places for trainings: this one was given up"
        );
        EngineError::exhausted(message, Some(COME_BACK))
    })?;
    // A stream that breaks is a caller that left.
    let request = request.map_err(|_| EngineError::Cancelled)?;
    let Some(Asked::Example(example)) = request.item else {
        return Err(EngineError::invalid(
            "header",
            "came already: after the first header come examples only",
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
    (told, teller): (&mut Told, &mut Teller<Message>),
) -> Result<Trained, EngineError> {
    let stop = Stop(Arc::default());
    let flag = stop.0.clone();
    let (reports, mut heard) = mpsc::channel(training.plan().hooks.len().max(1));
    let fitting = tokio::task::spawn_blocking(move || {
        // There is room for all, and the listener outlives them unless the caller left.
        training.fit(&flag, |report| {
            let _ = reports.try_send(report.clone());
        })
    });
    // Until the fit ends, and its end of the channel with it.
    while let Some(report) = teller.working(heard.recv(), |e| told.progress(e)).await {
        told.progress.hooks_done += 1;
        let report = to_proto::report(report);
        teller.send(Message::Report(report)).await?;
    }
    fitting.await.map_err(EngineError::internal)?
}
