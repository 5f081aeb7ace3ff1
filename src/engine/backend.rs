//! What the scheduler needs of a worker: the seam between deciding what runs and running it.
//!
//! The one implementation that ships is [`super::worker::Worker`], a child process; tests of the scheduler bring their own, which never
//! leaves the process and whose clock they hold.

use std::{path::Path, sync::Arc};

use futures::future::BoxFuture;

use super::{
    inputs::Planned,
    request::{Encoding, TextInput, TokenizeOptions},
};
use crate::{
    ipc::{
        info::{ModelInfo, ValueInfo},
        spec::VariantSpec,
    },
    tensor::Tensor,
};

/// A run to start.
#[derive(Debug)]
pub struct Order<'a> {
    /// Number of the variant.
    pub variant: u32,
    /// The padded inputs; written before [`Backend::run`] returns.
    pub inputs: &'a [Planned<'a>],
    /// Tokens of each row before padding; empty when there is no token axis.
    pub lengths: Vec<u32>,
    /// What to bring back.
    pub picks: Vec<Pick>,
}

/// One output of a range of rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pick {
    /// Index into the variant's outputs.
    pub output: u32,
    /// First row of the run.
    pub row: u32,
    /// Rows.
    pub rows: u32,
    /// With one row, keep the batch axis of length one.
    pub keep_batch: bool,
    /// Token axes are cut to this; 0 leaves them.
    pub length: u32,
    /// Heads to keep; empty keeps all.
    pub heads: Vec<u32>,
    /// Positions to keep; empty keeps all.
    pub positions: Vec<u32>,
}

/// A run that was started.
pub struct Started {
    /// For [`Backend::cancel`].
    pub id: u64,
    /// Comes when the run ends, cancelled or not.
    pub done: BoxFuture<'static, Result<Ran, Fault>>,
}

/// What a run brought back.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    /// One tensor for each pick, in order.
    pub tensors: Vec<Tensor>,
    /// Indices of picks with values that are neither finite nor a mask.
    pub non_finite: Vec<usize>,
}

/// A variant that was built.
#[derive(Clone, Debug)]
pub struct BuiltVariant {
    /// Its outputs, in order.
    pub outputs: Vec<ValueInfo>,
    /// Memory that it added.
    pub bytes: u64,
}

/// Why the worker did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The worker says no; it lives on.
    #[error("{message}")]
    Refused {
        /// What kind of no.
        kind: Refusal,
        /// For people; no host paths.
        message: String,
        /// The field or part concerned, if any.
        subject: String,
    },
    /// The worker is gone.
    #[error("the worker is gone: {cause}")]
    Died {
        /// `SIGSEGV`, `exit code 3`, `no heartbeat`.
        cause: String,
    },
}

/// Kinds of [`Fault::Refused`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The caller sent something that the model cannot take.
    InvalidArgument,
    /// The model lacks the part.
    FailedPrecondition,
    /// A file of the model is broken or hostile.
    BadModel,
    /// A budget of the worker.
    ResourceExhausted,
    /// Terminated on request.
    Cancelled,
    /// The runtime failed.
    Runtime,
    /// An execution provider could not be loaded.
    Provider,
    /// Unknown variant.
    NoVariant,
}

/// See the module.
pub trait Backend: Send + Sync + 'static {
    /// Starts a run.
    fn run(&self, order: Order<'_>) -> Result<Started, Fault>;
    /// Asks a run to stop; it ends all the same through [`Started::done`].
    fn cancel(&self, run: u64);
    /// Builds a variant under a number.
    fn build(&self, id: u32, spec: &VariantSpec)
    -> BoxFuture<'static, Result<BuiltVariant, Fault>>;
    /// Forgets a variant.
    fn evict(&self, id: u32);
    /// Text to tokens.
    fn tokenize(
        &self,
        texts: Vec<TextInput>,
        options: TokenizeOptions,
    ) -> BoxFuture<'static, Result<Vec<Encoding>, Fault>>;
    /// Token ids to vocabulary strings.
    fn decode(&self, ids: Vec<u32>) -> BoxFuture<'static, Result<Vec<String>, Fault>>;
    /// The graph as text.
    fn dump(&self) -> BoxFuture<'static, Result<String, Fault>>;
    /// Ends the worker now; everything under way ends with [`Fault::Died`].
    fn kill(&self, cause: &str);
    /// Comes when the worker is gone, with the cause.
    fn died(&self) -> BoxFuture<'static, String>;
    /// Memory that the worker takes, as it last said.
    fn resident_bytes(&self) -> u64;
    /// Number of the worker's process, while there is one.
    fn pid(&self) -> Option<u32>;
}

impl std::fmt::Debug for dyn Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Backend({:?})", self.pid())
    }
}

/// A worker, and what it says of the model that it loaded.
pub type Launched = (Arc<dyn Backend>, ModelInfo);

/// Makes workers.
pub trait Launcher: Send + Sync + 'static {
    /// Starts a worker and has it load the model of a folder. Dropped before it is ready, nothing is left of it.
    fn launch(&self, folder: &Path) -> BoxFuture<'static, Result<Launched, LoadError>>;
}

/// Why a load failed. The text is for people; no host paths.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The worker could not be started.
    #[error("the worker could not be started: {0}")]
    Start(String),
    /// The worker refused the model.
    #[error("{message}")]
    Refused {
        /// Kind of no.
        kind: Refusal,
        /// Why.
        message: String,
    },
    /// The worker died while loading.
    #[error("the runtime crashed while loading ({cause})")]
    Crashed {
        /// `SIGSEGV`, `exit code 3`.
        cause: String,
    },
    /// The clock ran out.
    #[error("loading was given up: {0}")]
    TimedOut(String),
}
