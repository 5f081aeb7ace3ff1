//! Variants: one thread owns one session, takes runs one after the other, and sends what was picked.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use bytes::Bytes;
use ort::session::Session;

use super::{
    failure,
    run::{self, Order, Refused, RunLimit, Ticket},
    weights::SharedWeights,
};
use crate::ipc::{
    info::ValueInfo,
    wire::{Failure, Run, event},
    worker_side::Sender,
};

/// Runs that wait for one session. The front sends few at a time; more than this is its mistake.
const QUEUE: usize = 64;

/// The sessions of a worker, and the runs under way.
#[derive(Clone, Default)]
pub(super) struct Variants {
    threads: Arc<Mutex<HashMap<u32, mpsc::SyncSender<Job>>>>,
    running: Arc<Mutex<HashMap<u64, Arc<Ticket>>>>,
}

struct Job {
    id: u64,
    order: Order,
    ticket: Arc<Ticket>,
}

/// A session that is ready to be served.
pub(super) struct Built {
    pub(super) session: Session,
    pub(super) outputs: Vec<ValueInfo>,
    /// What the session reads in place.
    pub(super) weights: Arc<SharedWeights>,
    pub(super) limit: RunLimit,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Variants {
    /// Starts the thread of a session.
    pub(super) fn add(&self, id: u32, built: Built, sender: Sender) -> std::io::Result<()> {
        let (jobs, queue) = mpsc::sync_channel::<Job>(QUEUE);
        let running = self.running.clone();
        thread::Builder::new()
            .name(format!("variant-{id}"))
            .spawn(move || {
                let mut owner = Owner {
                    session: built.session,
                    _weights: built.weights,
                    outputs: built.outputs,
                    limit: built.limit,
                    sender,
                };
                for job in queue {
                    let sent = owner.serve(&job);
                    lock(&running).remove(&job.id);
                    if sent.is_err() {
                        return; // the front is gone
                    }
                }
            })?;
        lock(&self.threads).insert(id, jobs);
        Ok(())
    }

    /// Drops a session once its last run is done.
    pub(super) fn evict(&self, id: u32) {
        lock(&self.threads).remove(&id);
    }

    /// Hands a run to its session's thread.
    pub(super) fn run(&self, run: Run, inputs: Vec<Bytes>, sender: &Sender) -> std::io::Result<()> {
        let id = run.id;
        let Some(thread) = lock(&self.threads).get(&run.variant).cloned() else {
            let what = format!("variant {} is not built", run.variant);
            return failure(sender, id, Failure::NoVariant, &what, "");
        };
        let ticket = match Ticket::new() {
            Ok(t) => Arc::new(t),
            Err(e) => return failure(sender, id, Failure::Runtime, e.message(), ""),
        };
        lock(&self.running).insert(id, ticket.clone());
        let job = Job {
            id,
            order: Order {
                inputs: run.inputs.into_iter().zip(inputs).collect(),
                lengths: run.lengths,
                picks: run.picks,
            },
            ticket,
        };
        if thread.try_send(job).is_err() {
            lock(&self.running).remove(&id);
            return failure(
                sender,
                id,
                Failure::ResourceExhausted,
                "too many runs wait for this variant",
                "",
            );
        }
        Ok(())
    }

    /// Terminates a run, waiting or under way.
    pub(super) fn cancel(&self, run: u64) {
        if let Some(ticket) = lock(&self.running).get(&run) {
            ticket.cancel();
        }
    }
}

struct Owner {
    // Fields drop in order: the session before the weights that it reads in place.
    session: Session,
    _weights: Arc<SharedWeights>,
    outputs: Vec<ValueInfo>,
    limit: RunLimit,
    sender: Sender,
}

impl Owner {
    fn serve(&mut self, job: &Job) -> std::io::Result<()> {
        let Self {
            session,
            outputs,
            limit,
            sender,
            ..
        } = self;
        // A panic in here is a mistake of ours; it costs this run and no other.
        let done = catch_unwind(AssertUnwindSafe(|| {
            run::run(
                session,
                outputs,
                &job.order,
                &job.ticket,
                sender.pool(),
                *limit,
            )
        }));
        match done {
            Ok(Ok((ran, segments))) => sender.send(job.id, event::Kind::Ran(ran), segments),
            Ok(Err(Refused {
                kind,
                message,
                subject,
            })) => failure(sender, job.id, kind, &message, &subject),
            Err(_) => failure(sender, job.id, Failure::Runtime, "the run panicked", ""),
        }
    }
}
