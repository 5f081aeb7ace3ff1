//! What is said to a worker and what it answers: frames on the connection, tensors in shared memory.
//!
//! Inputs are written once, straight into the memory that the worker reads; what comes back are views of the memory that it wrote.
//! An answer that is not what was asked for is a fault of the worker, never a panic here.

use bytes::Bytes;
use futures::future::BoxFuture;

use super::{
    backend::{Backend, BuiltVariant, Fault, Order, Ran, Refusal, Started},
    request::{Encoding, TextInput, TokenizeOptions},
    worker::Worker,
};
use crate::{
    ipc::{
        front::Answer,
        shm::{Segment, aligned},
        spec::VariantSpec,
        wire::{self, command, event},
    },
    tensor::{DType, Tensor},
};

impl Worker {
    pub(super) fn call(
        &self,
        command: impl FnOnce(u64) -> command::Kind,
        segment: Option<Segment>,
    ) -> BoxFuture<'static, Result<Answer, Fault>> {
        let id = self.connection.next_id();
        self.call_as(id, command(id), segment)
    }

    fn call_as(
        &self,
        id: u64,
        command: command::Kind,
        segment: Option<Segment>,
    ) -> BoxFuture<'static, Result<Answer, Fault>> {
        let connection = self.connection.clone();
        let death = self.death.clone();
        Box::pin(async move {
            let answer = tokio::select! {
                biased;
                answer = connection.call(id, command, segment) => answer,
                cause = death.died() => return Err(Fault::Died { cause }),
            };
            match answer {
                Ok((event::Kind::Failed(failed), _)) => Err(refused(failed)),
                Ok(answer) => Ok(answer),
                Err(_) => Err(Fault::Died {
                    cause: death.died().await,
                }),
            }
        })
    }

    /// Sends a command that has no answer. If the worker is gone, others notice.
    pub(super) fn tell(&self, command: command::Kind) {
        let connection = self.connection.clone();
        tokio::spawn(async move {
            let _ = connection.send(command, None).await;
        });
    }
}

impl Backend for Worker {
    fn run(&self, order: Order<'_>) -> Result<Started, Fault> {
        let total = order.inputs.iter().map(|i| aligned(i.bytes())).sum();
        let mut segment = self
            .connection
            .pool()
            .with(|p| p.take(total))
            .map_err(|e| Fault::Refused {
                kind: Refusal::ResourceExhausted,
                message: e.to_string(),
                subject: String::new(),
            })?;
        let mut offset = 0;
        let mut inputs = Vec::with_capacity(order.inputs.len());
        for input in order.inputs {
            let length = input.bytes();
            input.write(&mut segment.bytes_mut()[offset..offset + length]);
            inputs.push(wire::TensorRef {
                name: input.name.to_owned(),
                dtype: input.dtype as u32,
                shape: input.shape.iter().map(|d| *d as u64).collect(),
                span: Some(segment.span(offset, length)),
            });
            offset += aligned(length);
        }
        let picks = order
            .picks
            .into_iter()
            .map(|p| wire::Pick {
                output: p.output,
                row: p.row,
                rows: p.rows,
                keep_batch: p.keep_batch,
                length: p.length,
                heads: p.heads,
                positions: p.positions,
            })
            .collect();
        let id = self.connection.next_id();
        let run = command::Kind::Run(wire::Run {
            id,
            variant: order.variant,
            inputs,
            lengths: order.lengths,
            picks,
        });
        let answer = self.call_as(id, run, Some(segment));
        Ok(Started {
            id,
            done: Box::pin(async move {
                match answer.await? {
                    (event::Kind::Ran(ran), views) => tensors(ran, views),
                    (other, _) => Err(out_of_turn("a run", &other)),
                }
            }),
        })
    }

    fn cancel(&self, run: u64) {
        self.tell(command::Kind::Cancel(wire::Cancel { run }));
    }

    fn build(
        &self,
        id: u32,
        spec: &VariantSpec,
    ) -> BoxFuture<'static, Result<BuiltVariant, Fault>> {
        let spec = match serde_json::to_string(spec) {
            Ok(spec) => spec,
            Err(e) => return Box::pin(std::future::ready(Err(unreadable("a variant", &e)))),
        };
        let answer = self.call(
            |call| {
                command::Kind::Build(wire::Build {
                    id: call,
                    variant: id,
                    spec,
                })
            },
            None,
        );
        Box::pin(async move {
            match answer.await? {
                (event::Kind::Built(built), _) => Ok(BuiltVariant {
                    outputs: serde_json::from_str(&built.outputs)
                        .map_err(|e| unreadable("a variant", &e))?,
                    bytes: built.bytes,
                }),
                (other, _) => Err(out_of_turn("a build", &other)),
            }
        })
    }

    fn evict(&self, id: u32) {
        self.tell(command::Kind::Evict(wire::Evict { variant: id }));
    }

    fn tokenize(
        &self,
        texts: Vec<TextInput>,
        options: TokenizeOptions,
    ) -> BoxFuture<'static, Result<Vec<Encoding>, Fault>> {
        let count = texts.len();
        let texts = texts
            .into_iter()
            .map(|t| wire::Text {
                text: t.text,
                pair: t.pair,
            })
            .collect();
        let answer = self.call(
            |id| {
                command::Kind::Tokenize(wire::Tokenize {
                    id,
                    texts,
                    add_special_tokens: options.special,
                    truncate: options.truncate,
                })
            },
            None,
        );
        Box::pin(async move {
            match answer.await? {
                (event::Kind::Tokenized(t), _) if t.encodings.len() == count => {
                    Ok(t.encodings.into_iter().map(encoding).collect())
                }
                (other, _) => Err(out_of_turn("texts", &other)),
            }
        })
    }

    fn decode(&self, ids: Vec<u32>) -> BoxFuture<'static, Result<Vec<String>, Fault>> {
        let answer = self.call(|id| command::Kind::Decode(wire::Decode { id, ids }), None);
        Box::pin(async move {
            match answer.await? {
                (event::Kind::Decoded(d), _) => Ok(d.tokens),
                (other, _) => Err(out_of_turn("ids", &other)),
            }
        })
    }

    fn dump(&self) -> BoxFuture<'static, Result<String, Fault>> {
        let answer = self.call(|id| command::Kind::Dump(wire::Dump { id }), None);
        Box::pin(async move {
            match answer.await? {
                (event::Kind::Dumped(d), _) => Ok(d.text),
                (other, _) => Err(out_of_turn("a dump", &other)),
            }
        })
    }

    fn kill(&self, cause: &str) {
        // A second reason changes nothing.
        let _ = self.death.wanted.set(cause.to_owned());
        self.death.kill.notify_one();
    }

    fn died(&self) -> BoxFuture<'static, String> {
        let death = self.death.clone();
        Box::pin(async move { death.died().await })
    }

    fn resident_bytes(&self) -> u64 {
        self.connection.resident_bytes()
    }

    fn pid(&self) -> Option<u32> {
        self.pid.filter(|_| self.death.cause.borrow().is_none())
    }
}

fn tensors(ran: wire::Ran, views: Vec<Bytes>) -> Result<Ran, Fault> {
    if views.len() != ran.tensors.len() {
        return Err(protocol("a run came back with other tensors than it names"));
    }
    let tensors = ran
        .tensors
        .into_iter()
        .zip(views)
        .map(|(tensor, bytes)| {
            let dtype = DType::try_from(tensor.dtype)?;
            let shape = tensor
                .shape
                .iter()
                .map(|d| usize::try_from(*d).unwrap_or(usize::MAX))
                .collect();
            Tensor::new(dtype, shape, bytes)
        })
        .collect::<Result<_, crate::tensor::TensorError>>()
        .map_err(|e| protocol(&e.to_string()))?;
    Ok(Ran {
        tensors,
        non_finite: ran.non_finite_picks.iter().map(|at| *at as usize).collect(),
    })
}

fn encoding(e: wire::Encoding) -> Encoding {
    Encoding {
        offsets: e
            .starts
            .iter()
            .zip(&e.ends)
            .map(|(start, end)| *start..*end)
            .collect(),
        words: e.words.iter().map(|w| u32::try_from(*w).ok()).collect(),
        ids: e.ids,
        type_ids: e.type_ids,
        tokens: e.tokens,
        special: e.special,
        sequence: e.sequence,
        truncated: e.truncated,
    }
}

fn refused(failed: wire::Failed) -> Fault {
    let kind = match failed.failure() {
        wire::Failure::InvalidArgument => Refusal::InvalidArgument,
        wire::Failure::FailedPrecondition => Refusal::FailedPrecondition,
        wire::Failure::BadModel => Refusal::BadModel,
        wire::Failure::ResourceExhausted => Refusal::ResourceExhausted,
        wire::Failure::Cancelled => Refusal::Cancelled,
        wire::Failure::Unspecified | wire::Failure::Runtime => Refusal::Runtime,
        wire::Failure::Provider => Refusal::Provider,
        wire::Failure::NoVariant => Refusal::NoVariant,
    };
    Fault::Refused {
        kind,
        message: failed.message,
        subject: failed.subject,
    }
}

fn protocol(message: &str) -> Fault {
    Fault::Refused {
        kind: Refusal::Runtime,
        message: message.to_owned(),
        subject: "worker protocol".into(),
    }
}

fn unreadable(what: &str, error: &serde_json::Error) -> Fault {
    protocol(&format!("{what} cannot be read: {error}"))
}

fn out_of_turn(what: &str, event: &event::Kind) -> Fault {
    protocol(&format!("the worker answered {what} with {}", name(event)))
}

pub(super) fn name(event: &event::Kind) -> &'static str {
    match event {
        event::Kind::Loaded(_) => "loaded",
        event::Kind::Built(_) => "built",
        event::Kind::Ran(_) => "ran",
        event::Kind::Failed(_) => "failed",
        event::Kind::Tokenized(_) => "tokenized",
        event::Kind::Release(_) => "release",
        event::Kind::Pong(_) => "pong",
        event::Kind::Dumped(_) => "dumped",
        event::Kind::Progress(_) => "progress",
        event::Kind::Decoded(_) => "decoded",
    }
}
