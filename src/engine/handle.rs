//! What methods and the service hold of a model: ask for tokens, submit rows.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use futures::future::BoxFuture;
use tokio::sync::oneshot;

use super::{
    admission::{Permit, Refused, exposed_bytes},
    backend::{Backend, Fault},
    edits::Edits,
    error::EngineError,
    generation::{Counts, Generation, ended},
    now,
    queue::{BatchKey, Client, Place, Waiting, WaitingGroup},
    request::{Ctx, Encoding, Job, PickSpec, TextInput, TokenizeOptions},
    stream::{Parts, ReadyGroup, ReadyPick, Request, RowStream, outcome},
    ticket::{Outcome, Ticket},
    variants::Built,
};
use crate::ipc::info::{Axis, ModelInfo, ValueInfo};

/// An extent that only the run will tell counts as this in estimates.
const UNKNOWN_EXTENT: usize = 1024;

/// A model that can be asked. Clones share one generation, and keep it from being drained: hold one per request, not for ever.
#[derive(Clone, Debug)]
pub struct ModelHandle {
    generation: Arc<Generation>,
    _lease: Arc<Lease>,
    /// What every row of this handle is run with.
    edits: Option<Arc<Edits>>,
}

/// Dropped with the last handle.
#[derive(Debug)]
pub struct Lease {
    _last_one_out: oneshot::Sender<()>,
}

impl ModelHandle {
    /// A handle, and what resolves (with an error) when the last clone is dropped.
    pub fn new(generation: Arc<Generation>) -> (Self, oneshot::Receiver<()>) {
        let (last_one_out, drained) = oneshot::channel();
        let handle = Self {
            generation,
            _lease: Arc::new(Lease {
                _last_one_out: last_one_out,
            }),
            edits: None,
        };
        (handle, drained)
    }

    /// The same model with hook points edited in every row, in the place of what this handle edits. Whatever is asked of it is asked of
    /// the edited model.
    #[must_use]
    pub fn edited(&self, edits: Edits) -> Self {
        let edits = (!edits.is_empty()).then(|| Arc::new(edits));
        Self {
            edits,
            ..self.clone()
        }
    }

    /// The model as it is, run by the graph that edits it: what the edited model answers differs from that by the edits alone, and not by what
    /// a runtime makes of another graph.
    #[must_use]
    pub fn unchanged(&self) -> Self {
        let edits = self.edits.as_ref().map(|e| Arc::new(e.neutral()));
        Self {
            edits,
            ..self.clone()
        }
    }

    /// Whether hook points are edited in every row.
    pub fn is_edited(&self) -> bool {
        self.edits.is_some()
    }

    /// What is known of the model.
    pub fn info(&self) -> &Arc<ModelInfo> {
        self.generation.info()
    }

    /// Counts the loads of this model, from 1. A worker that was restarted is a new load.
    pub fn generation(&self) -> u64 {
        self.generation.number()
    }

    /// Number of the worker's process, while it lives.
    pub fn pid(&self) -> Option<u32> {
        self.generation.backend.pid()
    }

    /// Memory that the worker takes, as it last said.
    pub fn resident_bytes(&self) -> u64 {
        self.generation.backend.resident_bytes()
    }

    /// How many requests are open, and how the others ended.
    pub fn counts(&self) -> &Counts {
        &self.generation.counts
    }

    /// A permit for bytes that the caller is going to buffer beyond what it takes from a [`RowStream`] and passes on at once.
    ///
    /// # Errors
    /// [`EngineError::ResourceExhausted`] when the daemon's budget for results is used up.
    pub fn buffer(&self, bytes: usize, lane: super::request::Lane) -> Result<Permit, EngineError> {
        self.generation
            .buffers
            .take(bytes, lane)
            .map_err(|refused| self.no_room(refused, bytes))
    }

    /// Text to tokens, one encoding for each text.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] for a text that is too long, [`EngineError::FailedPrecondition`] for a model without tokenizer.
    pub async fn tokenize(
        &self,
        texts: Vec<TextInput>,
        options: TokenizeOptions,
        ctx: &Ctx,
    ) -> Result<Vec<Encoding>, EngineError> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        if self.info().tokenizer.is_none() {
            return Err(EngineError::precondition(format!(
                "model \"{}\" has no tokenizer: send token ids or tensors, or put a tokenizer.json beside the model",
                self.info().name
            )));
        }
        self.ask(|backend| backend.tokenize(texts, options), ctx)
            .await
    }

    /// Token ids to the strings of the vocabulary.
    pub async fn decode(&self, ids: Vec<u32>, ctx: &Ctx) -> Result<Vec<String>, EngineError> {
        self.ask(|backend| backend.decode(ids), ctx).await
    }

    /// The graph as text.
    pub async fn dump(&self, ctx: &Ctx) -> Result<String, EngineError> {
        self.ask(|backend| backend.dump(), ctx).await
    }

    /// Puts rows into the queue. Everything about them is checked before anything runs.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] with the path of the field below `groups`; [`EngineError::ResourceExhausted`] when a bound is met;
    /// [`EngineError::Unavailable`] when the worker is gone. Errors of the run come through the stream.
    pub async fn submit(&self, job: Job, ctx: &Ctx) -> Result<RowStream, EngineError> {
        let ticket = Ticket::take(self.generation.counts.clone());
        let job = match &self.edits {
            Some(edits) => edits.applied(job),
            None => Ok(job),
        };
        let admitted = match job {
            Ok(job) => self.admit(job, ctx).await,
            Err(error) => Err(error),
        };
        match admitted {
            Ok(admitted) => admitted.queue(ticket),
            Err(error) => {
                ticket.end(outcome(&error));
                Err(error)
            }
        }
    }

    async fn admit(&self, job: Job, ctx: &Ctx) -> Result<Admitted, EngineError> {
        let generation = &self.generation;
        generation.check_open()?;
        if ctx.cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        if ctx.deadline.is_some_and(|deadline| deadline <= now()) {
            return Err(EngineError::DeadlineExceeded);
        }
        if job.groups.is_empty() {
            return Err(EngineError::invalid(
                "groups",
                "there are no rows: give at least one group",
            ));
        }
        let inputs = generation.inputs.of_variant(&job.spec, self.info())?;
        let mut rows = Vec::with_capacity(job.groups.len());
        for (index, group) in job.groups.iter().enumerate() {
            rows.push(inputs.check(group, &format!("groups[{index}].inputs"))?);
        }
        let (variant, build) = generation.variant(&job.spec, ctx).await?;
        let mut groups = Vec::with_capacity(rows.len());
        for (index, (rows, group)) in rows.into_iter().zip(&job.groups).enumerate() {
            let (picks, row_bytes) =
                picks(&variant.built, &group.picks, rows.length).map_err(|(at, message)| {
                    EngineError::invalid(format!("groups[{index}].picks[{at}]"), message)
                })?;
            groups.push(ReadyGroup {
                rows,
                picks,
                row_bytes,
            });
        }

        let tokens = sum(groups
            .iter()
            .map(|g| g.rows.cost.saturating_mul(g.rows.rows)));
        let bytes = sum(groups
            .iter()
            .map(|g| g.row_bytes.saturating_mul(g.rows.rows)));
        let largest = groups.iter().map(|g| g.row_bytes).max().unwrap_or(0);
        let window = bytes.min(generation.config.window_bytes.max(largest));
        let tokens = generation.tokens.take(tokens, job.lane).map_err(|refused| {
            let retry_after = (refused == Refused::Now).then(|| generation.scheduler.retry_after());
            EngineError::exhausted(
                format!(
                    "{tokens} tokens more would pass the limit of open tokens ({}) of model \"{}\"",
                    generation.tokens.share(job.lane),
                    generation.name()
                ),
                retry_after,
            )
        })?;
        let bytes = generation
            .buffers
            .take(window, job.lane)
            .map_err(|refused| self.no_room(refused, window))?;

        let over = ctx.cancel.child_token();
        let (request, answers) = Request::new(Parts {
            generation: generation.clone(),
            groups,
            build,
            over,
            deadline: ctx.deadline,
            window,
            variant,
        });
        let id = next_request();
        let place = Place {
            generation: generation.id,
            lane: job.lane,
            client: ctx
                .client
                .clone()
                .map_or(Client::Request(id), Client::Named),
            request: id,
        };
        Ok(Admitted {
            request,
            place,
            answers,
            cancel: ctx.cancel.clone(),
            permits: (tokens, bytes),
            lease: self.clone(),
        })
    }

    fn no_room(&self, refused: Refused, bytes: usize) -> EngineError {
        match refused {
            Refused::Now => EngineError::exhausted(
                "the daemon's memory for results is used up: try again later",
                Some(self.generation.scheduler.retry_after()),
            ),
            Refused::Ever => EngineError::exhausted(
                format!(
                    "the answer would take {bytes} bytes at a time, more than the daemon keeps for results ({}): \
                     ask for fewer hook points, heads or positions, or for shorter rows",
                    self.generation.config.buffer_bytes
                ),
                None,
            ),
        }
    }

    /// Asks the worker something, in turn.
    async fn ask<T>(
        &self,
        question: impl FnOnce(&dyn Backend) -> BoxFuture<'static, Result<T, Fault>>,
        ctx: &Ctx,
    ) -> Result<T, EngineError> {
        let generation = &self.generation;
        let call = async {
            let _turn = generation
                .calls
                .acquire()
                .await
                .map_err(EngineError::internal)?;
            generation.check_open()?;
            let answer = question(&*generation.backend).await;
            answer.map_err(|fault| generation.error(fault))
        };
        tokio::select! {
            biased;
            error = ended(ctx) => Err(error),
            answer = call => answer,
        }
    }
}

/// A request with its permits, not in the queue yet.
struct Admitted {
    request: Arc<Request>,
    place: Place,
    answers: tokio::sync::mpsc::Receiver<Result<super::stream::Answer, EngineError>>,
    cancel: tokio_util::sync::CancellationToken,
    permits: (Permit, Permit),
    lease: ModelHandle,
}

impl Admitted {
    fn queue(self, ticket: Ticket) -> Result<RowStream, EngineError> {
        let generation = self.request.generation.clone();
        let groups = self
            .request
            .groups
            .iter()
            .enumerate()
            .map(|(index, group)| WaitingGroup {
                index,
                rows: 0..group.rows.rows,
                length: group.rows.cost,
                bytes: group.row_bytes,
                key: BatchKey {
                    generation: generation.id,
                    variant: self.request.variant(),
                    signature: group.rows.signature.clone(),
                    alone: group.rows.alone,
                    pads: generation.inputs.pads(),
                    most_rows: generation.inputs.fixed_batch(),
                },
            })
            .collect();
        let waiting = Waiting {
            place: self.place.clone(),
            request: self.request.clone(),
            groups,
            bytes: sum(self.request.groups.iter().map(|g| g.rows.bytes())),
        };
        // The stream first: from here on its drop takes the request out again.
        let mut stream = RowStream::new(
            self.request,
            self.place,
            self.answers,
            self.cancel,
            ticket,
            self.permits,
            self.lease,
        );
        if let Err(error) = generation.scheduler.submit(waiting) {
            stream.end(outcome(&error));
            return Err(error);
        }
        // The worker may have died since it was found open; then nobody else would answer.
        if let Err(error) = generation.check_open() {
            stream.end(Outcome::Failed);
            return Err(error);
        }
        Ok(stream)
    }
}

/// Finds the outputs that are picked; also the bytes of a row. An error names the pick.
fn picks(
    built: &Built,
    specs: &[PickSpec],
    length: usize,
) -> Result<(Vec<ReadyPick>, usize), (usize, String)> {
    if specs.is_empty() {
        return Err((0, "nothing is picked: name at least one output".into()));
    }
    let mut ready = Vec::with_capacity(specs.len());
    let mut bytes = 0usize;
    for (at, spec) in specs.iter().enumerate() {
        let (index, value) = built.output(&spec.output).ok_or_else(|| {
            (
                at,
                format!(
                    "\"{}\" is neither an output of the model nor exposed by the variant",
                    spec.output
                ),
            )
        })?;
        check_pick(spec, value, length).map_err(|message| (at, message))?;
        bytes = bytes.saturating_add(exposed_bytes(value, spec, length, UNKNOWN_EXTENT));
        ready.push(ReadyPick {
            output: u32::try_from(index).map_err(|_| (at, "too many outputs".to_owned()))?,
            heads: spec.heads.clone(),
            positions: spec.positions.clone(),
            keep_batch: spec.keep_batch,
        });
    }
    Ok((ready, bytes))
}

fn check_pick(spec: &PickSpec, value: &ValueInfo, length: usize) -> Result<(), String> {
    let extent = |wanted: fn(&Axis) -> bool| {
        value
            .axes
            .iter()
            .position(wanted)
            .map(|at| value.dims.get(at).copied().flatten())
    };
    let inside = |indices: &[u32], extent: Option<usize>, what: &str| match indices.iter().max() {
        Some(most) if extent.is_some_and(|n| *most as usize >= n) => Err(format!(
            "{what} {most} of \"{}\" does not exist: there are {}",
            spec.output,
            extent.unwrap_or_default()
        )),
        Some(_) | None => Ok(()),
    };
    if !spec.heads.is_empty() {
        let heads = extent(Axis::is_head)
            .ok_or_else(|| format!("\"{}\" has no heads to choose from", spec.output))?;
        inside(&spec.heads, heads, "head")?;
    }
    if !spec.positions.is_empty() {
        let positions = extent(|a| matches!(a, Axis::Pos | Axis::Query))
            .ok_or_else(|| format!("\"{}\" has no positions to choose from", spec.output))?;
        inside(
            &spec.positions,
            Some(length).filter(|l| *l > 0).or(positions),
            "position",
        )?;
    }
    Ok(())
}

fn sum(amounts: impl Iterator<Item = usize>) -> usize {
    amounts.fold(0, usize::saturating_add)
}

fn next_request() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
