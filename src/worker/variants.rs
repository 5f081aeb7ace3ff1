//! Variants: one thread owns one session, takes runs one after the other, and sends what was picked.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Instant,
};

use bytes::Bytes;
use ort::session::{RunOptions, Session};

use super::{
    failure, pick::{Cut, has_stray},
    value,
};
use crate::{
    ipc::{
        info::ValueInfo,
        shm::{ShmError, aligned},
        wire::{Failure, Ran, Run, TensorRef, event},
        worker_side::Sender,
    },
    tensor::{DType, Tensor},
};

/// Runs that wait for one session. The front sends few at a time; more than this is its mistake.
const QUEUE: usize = 64;

/// The sessions of a worker, and the runs under way.
#[derive(Clone, Default)]
pub(super) struct Variants {
    threads: Arc<Mutex<HashMap<u32, mpsc::SyncSender<Job>>>>,
    running: Arc<Mutex<HashMap<u64, Arc<RunOptions>>>>,
}

struct Job {
    run: Run,
    inputs: Vec<Bytes>,
    options: Arc<RunOptions>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Variants {
    /// Starts the thread of a session.
    pub(super) fn add(
        &self,
        id: u32,
        session: Session,
        outputs: Vec<ValueInfo>,
        sender: Sender,
    ) -> std::io::Result<()> {
        let (jobs, queue) = mpsc::sync_channel::<Job>(QUEUE);
        let running = self.running.clone();
        thread::Builder::new()
            .name(format!("variant-{id}"))
            .spawn(move || {
                let mut owner = Owner {
                    session,
                    outputs,
                    sender,
                };
                for job in queue {
                    let run = job.run.id;
                    let sent = owner.serve(job);
                    lock(&running).remove(&run);
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
        let options = match RunOptions::new() {
            Ok(o) => Arc::new(o),
            Err(e) => return failure(sender, id, Failure::Runtime, &super::tidy(&e.to_string()), ""),
        };
        lock(&self.running).insert(id, options.clone());
        let job = Job {
            run,
            inputs,
            options,
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
        if let Some(options) = lock(&self.running).get(&run) {
            // Terminating can only fail when the options are gone, and the map keeps them.
            let _ = options.terminate();
        }
    }
}

struct Owner {
    session: Session,
    outputs: Vec<ValueInfo>,
    sender: Sender,
}

/// Why a run gave nothing.
struct Refused(Failure, String, String);

impl Owner {
    fn serve(&mut self, job: Job) -> std::io::Result<()> {
        let id = job.run.id;
        match self.execute(&job) {
            Ok((ran, segment)) => self.sender.send(id, event::Kind::Ran(ran), Some(segment)),
            Err(Refused(kind, message, subject)) => {
                failure(&self.sender, id, kind, &message, &subject)
            }
        }
    }

    fn execute(&mut self, job: &Job) -> Result<(Ran, crate::ipc::shm::Segment), Refused> {
        let invalid = |subject: &str, why: String| {
            Refused(Failure::InvalidArgument, why, subject.to_owned())
        };
        let tensors = job
            .run
            .inputs
            .iter()
            .zip(&job.inputs)
            .map(|(r, bytes)| {
                let shape = r.shape.iter().map(|d| *d as usize).collect();
                DType::try_from(r.dtype)
                    .and_then(|dtype| Tensor::new(dtype, shape, bytes.clone()))
                    .map(|t| (r.name.clone(), t))
                    .map_err(|e| invalid(&r.name, e.to_string()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let values = tensors
            .iter()
            .map(|(name, t)| {
                let v = value::input(t).map_err(|e| invalid(name, e))?;
                Ok((name.as_str(), v))
            })
            .collect::<Result<Vec<_>, Refused>>()?;

        let started = Instant::now();
        let outputs = self
            .session
            .run_with_options(values, &job.options)
            .map_err(|e| {
                let said = super::tidy(&e.to_string());
                if said.contains("terminate flag") {
                    Refused(Failure::Cancelled, "the run was terminated".into(), String::new())
                } else if e.code() == ort::ErrorCode::InvalidArgument {
                    Refused(Failure::InvalidArgument, said, String::new())
                } else {
                    Refused(Failure::Runtime, said, String::new())
                }
            })?;
        let run_micros = micros(started);

        let started = Instant::now();
        let wrong = |why: String| Refused(Failure::Runtime, why, String::new());
        let mut views = HashMap::new();
        let mut plans = Vec::with_capacity(job.run.picks.len());
        let mut total = 0;
        for pick in &job.run.picks {
            let info = self
                .outputs
                .get(pick.output as usize)
                .ok_or_else(|| invalid("picks", format!("output {} is not there", pick.output)))?;
            let view = match views.get(&pick.output) {
                Some(view) => view,
                None => {
                    let made = outputs
                        .get(&info.name)
                        .ok_or_else(|| wrong(format!("output \"{}\" did not come", info.name)))?;
                    let view = value::output(made).map_err(wrong)?;
                    views.entry(pick.output).or_insert(view)
                }
            };
            let (dtype, shape, _) = view;
            // Values whose axes nobody has read come whole, for the one row group that asked.
            let cut = if info.axes.is_empty() {
                Cut::whole(shape)
            } else {
                Cut::plan(pick, &info.axes, shape).map_err(|e| invalid(&info.name, e))?
            };
            let offset = total;
            total += aligned(cut.elements() * dtype.size());
            plans.push((pick.output, cut, offset));
        }
        let mut segment = self
            .sender
            .pool()
            .with(|p| p.take(total))
            .map_err(|e| match e {
                ShmError::Exhausted { .. } => {
                    Refused(Failure::ResourceExhausted, e.to_string(), String::new())
                }
                ShmError::System(_) | ShmError::Protocol(_) => wrong(e.to_string()),
            })?;
        let mut ran = Ran {
            run_micros,
            ..Ran::default()
        };
        for (at, (output, cut, offset)) in plans.iter().enumerate() {
            let (dtype, shape, bytes) = &views[output];
            let length = cut.elements() * dtype.size();
            let to = &mut segment.bytes_mut()[*offset..offset + length];
            cut.copy(bytes, shape, dtype.size(), to);
            if has_stray(*dtype, to) {
                ran.non_finite_picks.push(at as u32);
            }
            ran.tensors.push(TensorRef {
                name: self.outputs[*output as usize].name.clone(),
                dtype: *dtype as u32,
                shape: cut.shape.iter().map(|d| *d as u64).collect(),
                span: Some(segment.span(*offset, length)),
            });
        }
        ran.copy_micros = micros(started);
        Ok((ran, segment))
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
