//! One device's compute slots: when one is free, the queue gives the next run and a task carries it to its worker and back.
//!
//! Batching is natural. There is no timer: while a run is under way the queue grows, and what waits when it ends is the
//! next run. Runs of all models of a device share the slots, so that on a CPU one run at a time has all cores.
//!
//! A run ends in one of four ways: answers; a refusal, after which it is split until the request that causes it fails alone;
//! nobody left who wants it, after which it is cancelled, and the worker replaced when it goes on for [`EngineConfig::cancel_grace`];
//! the worker's death. In each of them every part is answered, even if the task itself panics (`Unanswered`).
//!
//! [`EngineConfig::cancel_grace`]: super::config::EngineConfig

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    backend::{Fault, Order, Pick, Ran, Refusal},
    batch::{CostModel, RunLimits, padded_tokens},
    config::EngineConfig,
    error::EngineError,
    generation::Generation,
    inputs::Slice,
    now, observe,
    queue::{Batch, BatchKey, Full, Part, Place, Queue, QueueLimits, Waiting},
    request::{Lane, RowsDone, StageTimings},
    stream::{Answer, Request},
};

/// Advice for a retry is within these.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// A full queue is searched for requests that are over at most so often.
const SEARCH_INTERVAL: Duration = Duration::from_millis(10);

/// See the module.
pub struct Scheduler {
    config: EngineConfig,
    runtime: tokio::runtime::Handle,
    state: Mutex<State>,
}

struct State {
    queue: Queue<Arc<Request>>,
    free: usize,
    costs: HashMap<(u64, u32), CostModel>,
    /// When the queue was last searched for requests that are over.
    searched: Option<Instant>,
    /// Rate at which rows left the queue lately, for retry advice.
    micros_per_row: f64,
}

impl Scheduler {
    /// For a device that makes `slots` runs at a time. Must be called inside of a tokio runtime.
    pub fn new(config: EngineConfig, slots: usize) -> Arc<Self> {
        let limits = QueueLimits {
            rows: config.queue_rows,
            bytes: config.queue_bytes,
        };
        Arc::new(Self {
            config,
            runtime: tokio::runtime::Handle::current(),
            state: Mutex::new(State {
                queue: Queue::new(limits),
                free: slots.max(1),
                costs: HashMap::new(),
                searched: None,
                micros_per_row: 1000.0,
            }),
        })
    }

    /// Puts a request into the queue, or says why not.
    pub(super) fn submit(
        self: &Arc<Self>,
        waiting: Waiting<Arc<Request>>,
    ) -> Result<(), EngineError> {
        let lane = waiting.place.lane;
        let mut state = self.lock();
        let mut refused = state.queue.append(waiting);
        let mut dead = Vec::new();
        let at = now();
        if matches!(refused, Err((Full::Now, _)))
            && state.may_search(at)
            && let Err((_, back)) = refused
        {
            // Before anyone is turned away, those who left make room.
            dead = state.queue.remove_where(|_, request| request.is_over(at));
            refused = state.queue.append(back);
        }
        let retry_after = state.retry_after();
        observe::queue_rows(lane, state.queue.rows(lane));
        drop(state);
        observe::rows_dropped(dead.iter().map(|w| w.rows()).sum());
        drop(dead);
        match refused {
            Ok(()) => {
                self.pump();
                Ok(())
            }
            Err((Full::Now, _)) => Err(EngineError::exhausted(
                "the queue of the model is full: try again later",
                Some(retry_after),
            )),
            Err((Full::Ever, _)) => Err(EngineError::exhausted(
                format!(
                    "the request is larger than the whole queue ({} rows, {} bytes): split it",
                    self.config.queue_rows, self.config.queue_bytes
                ),
                None,
            )),
        }
    }

    /// Takes a request out of the queue, if it is still there.
    pub(super) fn remove(&self, place: &Place) {
        let mut state = self.lock();
        let gone = state.queue.remove(place);
        observe::queue_rows(place.lane, state.queue.rows(place.lane));
        drop(state);
        observe::rows_dropped(gone.iter().map(Waiting::rows).sum());
    }

    /// Takes out everything that waits for a generation and answers it with `error`.
    pub(super) fn forget(&self, generation: u64, error: &EngineError) {
        let mut state = self.lock();
        let gone = state
            .queue
            .remove_where(|place, _| place.generation == generation);
        state.costs.retain(|(g, _), _| *g != generation);
        for lane in Lane::ALL {
            observe::queue_rows(lane, state.queue.rows(lane));
        }
        drop(state);
        for waiting in gone {
            waiting.request.answer(Err(error.clone()));
        }
    }

    /// How long until a full queue has room again, by the rate of late.
    pub(super) fn retry_after(&self) -> Duration {
        self.lock().retry_after()
    }

    /// Starts runs while there are free slots and ready rows.
    pub(super) fn pump(self: &Arc<Self>) {
        loop {
            let mut state = self.lock();
            if state.free == 0 {
                return;
            }
            let State { queue, costs, .. } = &mut *state;
            let (batch, dead) =
                queue.next_batch(now(), |key| self.limits(key, costs, &self.config));
            if let Some(batch) = &batch {
                state.free -= 1;
                for part in &batch.parts {
                    let row_bytes = part.request.groups[part.group].row_bytes;
                    part.request
                        .reserve(row_bytes.saturating_mul(part.rows.len()));
                }
                observe::queue_rows(batch.lane, state.queue.rows(batch.lane));
            }
            drop(state);
            observe::rows_dropped(dead.iter().map(|w| w.rows()).sum());
            drop(dead);
            let Some(batch) = batch else { return };
            self.runtime.spawn(carry(self.clone(), batch));
        }
    }

    fn limits(
        &self,
        key: &BatchKey,
        costs: &HashMap<(u64, u32), CostModel>,
        config: &EngineConfig,
    ) -> RunLimits {
        let cost = costs.get(&(key.generation, key.variant));
        // The first run of a graph tells what it takes. Where a run takes long whatever is in it, short ones would only take longer in sum.
        let most = config.batch_tokens;
        let timely = cost.map_or(most / 4, |c| {
            let tokens = c.tokens_within(config.run_time).unwrap_or(most);
            tokens.clamp(most / 16, most)
        });
        RunLimits {
            budget: timely,
            rows: key
                .most_rows
                .map_or(config.batch_rows, |fixed| fixed.min(config.batch_rows)),
            bytes: config.batch_bytes,
            pads: key.pads,
            overhead: cost.map_or_else(|| CostModel::default().overhead(), CostModel::overhead),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A full search of a full queue takes a millisecond: under a flood it is not made for each request.
    fn may_search(&mut self, now: Instant) -> bool {
        let due = self
            .searched
            .is_none_or(|last| now.saturating_duration_since(last) >= SEARCH_INTERVAL);
        if due {
            self.searched = Some(now);
        }
        due
    }

    fn retry_after(&self) -> Duration {
        let rows: usize = Lane::ALL
            .into_iter()
            .map(|lane| self.queue.rows(lane))
            .sum();
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )] // an estimate
        let micros = (rows as f64 / 2.0 * self.micros_per_row).clamp(0.0, 1e9) as u64;
        Duration::from_micros(micros).clamp(RETRY.0, RETRY.1)
    }
}

/// A slot in use; free again when dropped, whatever happened.
struct Slot(Option<Arc<Scheduler>>);

impl Slot {
    fn free(&mut self) {
        if let Some(scheduler) = self.0.take() {
            scheduler.lock().free += 1;
            scheduler.pump();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.free();
    }
}

/// Parts of a run that still owe an answer; those left when it is dropped are answered with an internal error.
struct Unanswered(Vec<Part<Arc<Request>>>);

impl Unanswered {
    fn fail(&mut self, error: &EngineError) {
        for part in self.0.drain(..) {
            part.request.answer(Err(error.clone()));
        }
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            self.fail(&EngineError::internal("a run ended without an answer"));
        }
    }
}

/// Carries a batch to its worker and the answers back.
async fn carry(scheduler: Arc<Scheduler>, batch: Batch<Arc<Request>>) {
    let mut slot = Slot(Some(scheduler.clone()));
    let key = batch.key.clone();
    let mut pending = vec![Unanswered(batch.parts)];
    while let Some(mut parts) = pending.pop() {
        let began = now();
        let Some(generation) = parts.0.first().map(|p| p.request.generation.clone()) else {
            continue;
        };
        match run(&scheduler.config, &generation, key.variant, &parts.0).await {
            Ok(ran) => {
                scheduler.learn(&key, &parts.0, began.elapsed_to(now()));
                if pending.is_empty() {
                    slot.free(); // the next run starts before the answers of this one are handed out
                }
                deliver(&mut parts, ran, began, batch.lane);
            }
            Err(Fault::Refused { kind, .. }) if may_be_one_of_many(kind) && parts.0.len() > 1 => {
                let half = parts.0.len() / 2;
                let rest = parts.0.split_off(half);
                pending.push(Unanswered(rest));
                pending.push(parts);
            }
            Err(fault) => parts.fail(&generation.error(fault)),
        }
    }
}

/// Whether one request of a run may be the cause, so that the others deserve a run without it.
fn may_be_one_of_many(kind: Refusal) -> bool {
    match kind {
        Refusal::InvalidArgument | Refusal::Runtime | Refusal::ResourceExhausted => true,
        Refusal::FailedPrecondition
        | Refusal::BadModel
        | Refusal::Cancelled
        | Refusal::Provider
        | Refusal::NoVariant => false,
    }
}

/// One run, from padded inputs to tensors; cancelled when nobody wants it any more.
async fn run(
    config: &EngineConfig,
    generation: &Arc<Generation>,
    variant: u32,
    parts: &[Part<Arc<Request>>],
) -> Result<Ran, Fault> {
    let started = start(generation, variant, parts)?;
    let mut done = started.done;
    tokio::select! {
        biased;
        ran = &mut done => return ran,
        () = nobody_wants(parts) => generation.backend.cancel(started.id),
    }
    if let Ok(ran) = tokio::time::timeout(config.cancel_grace, &mut done).await {
        return ran;
    }
    generation.backend.kill(&format!(
        "a cancelled run went on for {} ms",
        config.cancel_grace.as_millis()
    ));
    done.await
}

fn start(
    generation: &Generation,
    variant: u32,
    parts: &[Part<Arc<Request>>],
) -> Result<super::backend::Started, Fault> {
    let slices: Vec<Slice<'_>> = parts
        .iter()
        .map(|p| Slice {
            rows: &p.request.groups[p.group].rows,
            range: p.rows.clone(),
        })
        .collect();
    let mut lengths = Vec::new();
    let mut picks = Vec::new();
    let mut row = 0;
    for part in parts {
        let group = &part.request.groups[part.group];
        let rows = saturate(part.rows.len());
        let length = saturate(group.rows.length);
        lengths.extend(part.rows.clone().map(|_| length));
        picks.extend(group.picks.iter().map(|pick| Pick {
            output: pick.output,
            row,
            rows,
            keep_batch: pick.keep_batch || group.rows.rows > 1,
            length,
            heads: pick.heads.clone(),
            positions: pick.positions.clone(),
        }));
        row += rows;
    }
    let inputs = generation.inputs.assemble(&slices);
    if lengths.first() == Some(&0) {
        lengths.clear();
    } else if let (Some(fixed), Some(last)) =
        (generation.inputs.fixed_batch(), lengths.last().copied())
    {
        lengths.resize(fixed.max(lengths.len()), last);
    }
    generation.backend.run(Order {
        variant,
        inputs: &inputs,
        lengths,
        picks,
    })
}

/// Comes when every request of the run is over.
async fn nobody_wants(parts: &[Part<Arc<Request>>]) {
    for part in parts {
        part.request.over().await;
    }
}

fn deliver(parts: &mut Unanswered, ran: Ran, began: Instant, lane: Lane) {
    let run = began.elapsed_to(now());
    let wanted: usize = parts
        .0
        .iter()
        .map(|p| p.request.groups[p.group].picks.len())
        .sum();
    if ran.tensors.len() != wanted {
        let error = EngineError::internal(format!(
            "{wanted} tensors were picked, {} came",
            ran.tensors.len()
        ));
        parts.fail(&error);
        return;
    }
    let mut tensors = ran.tensors.into_iter();
    let mut first = 0;
    for part in parts.0.drain(..) {
        let group = &part.request.groups[part.group];
        let picks = group.picks.len();
        let non_finite = ran
            .non_finite
            .iter()
            .filter_map(|at| at.checked_sub(first).filter(|at| *at < picks))
            .collect();
        first += picks;
        observe::rows_done(part.request.generation.name(), lane, part.rows.len());
        let rows = part.rows.clone();
        let answer = Answer {
            reserved: group.row_bytes.saturating_mul(rows.len()),
            done: RowsDone {
                group: part.group,
                rows,
                tensors: tensors.by_ref().take(picks).collect(),
                non_finite,
                timings: StageTimings {
                    queue: part.request.submitted.elapsed_to(began),
                    build: part.request.build,
                    run,
                    ..StageTimings::default()
                },
            },
        };
        part.request.answer(Ok(answer));
    }
}

impl Scheduler {
    fn learn(&self, key: &BatchKey, parts: &[Part<Arc<Request>>], took: Duration) {
        let rows: usize = parts.iter().map(|p| p.rows.len()).sum();
        let longest = parts.iter().map(|p| p.length).max().unwrap_or(1);
        let tokens = padded_tokens(rows, longest);
        observe::run(
            parts.first().map_or("", |p| p.request.generation.name()),
            tokens,
        );
        let micros = took.as_secs_f64() * 1e6;
        let mut state = self.lock();
        state
            .costs
            .entry((key.generation, key.variant))
            .or_default()
            .observe(tokens, micros);
        #[allow(clippy::cast_precision_loss)] // an estimate
        let each = micros / rows.max(1) as f64;
        state.micros_per_row = 0.9 * state.micros_per_row + 0.1 * each;
    }
}

/// `later - self`, never negative.
trait ElapsedTo {
    fn elapsed_to(self, later: Instant) -> Duration;
}

impl ElapsedTo for Instant {
    fn elapsed_to(self, later: Instant) -> Duration {
        later.saturating_duration_since(self)
    }
}

fn saturate(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
