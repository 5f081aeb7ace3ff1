//! What a method hands to the engine and what it gets back: plain data, no channel.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::{ipc::spec::VariantSpec, tensor::Tensor};

/// How urgent a row is. A higher lane goes first; none starves (see [`super::lanes`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Plain predictions.
    Predict,
    /// Someone waits for this explanation.
    Interactive,
    /// Sweeps and bulk streams.
    Bulk,
}

impl Lane {
    /// Every lane, the most urgent first.
    pub const ALL: [Lane; 3] = [Lane::Predict, Lane::Interactive, Lane::Bulk];

    /// Lower-case name, as metrics label it.
    pub const fn name(self) -> &'static str {
        match self {
            Lane::Predict => "predict",
            Lane::Interactive => "interactive",
            Lane::Bulk => "bulk",
        }
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

/// Who asks, and until when. Clones share the token.
#[derive(Clone, Debug, Default)]
pub struct Ctx {
    /// Cancelled when the caller leaves: queued rows are skipped, a run with no live rows is terminated.
    pub cancel: CancellationToken,
    /// When the answer stops being wanted.
    pub deadline: Option<Instant>,
    /// Stands in the log beside everything that this request did.
    pub request_id: String,
    /// Requests with the same client share one place in the turn-taking of their lane; without it, each request is its own client.
    pub client: Option<Arc<str>>,
}

impl Ctx {
    /// A context that ends by its deadline or by cancelling its token.
    pub fn new(request_id: impl Into<String>, deadline: Option<Instant>) -> Self {
        Self {
            deadline,
            request_id: request_id.into(),
            ..Self::default()
        }
    }
}

/// A tensor under the name of a model's input. Axis 0 is the batch, unless the input has no batch axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTensor {
    /// Name of the input.
    pub name: String,
    /// Its value.
    pub tensor: Tensor,
}

/// One output wanted of each row of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PickSpec {
    /// Name of a model output or of an exposed hook point.
    pub output: String,
    /// Indices to keep along the head axis; empty keeps all.
    pub heads: Vec<u32>,
    /// Indices to keep along the position axis (query axis for attentions); empty keeps all.
    pub positions: Vec<u32>,
    /// With one row, keep the batch axis of length one.
    pub keep_batch: bool,
}

/// Rows of one length that belong together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowGroup {
    /// Unpadded; inputs that the model has and the group lacks are filled in where their role allows (mask: ones, type ids: zeros, position ids: 0, 1, 2, ...).
    pub inputs: Vec<NamedTensor>,
    /// Rows: the extent of axis 0 of every input that has a batch axis.
    pub rows: usize,
    /// Tokens of each row, for models with a token axis.
    pub length: Option<usize>,
    /// What to bring back.
    pub picks: Vec<PickSpec>,
}

/// Rows for one variant of a model.
#[derive(Clone, Debug)]
pub struct Job {
    /// What the graph must show. The engine may run it on a wider variant that shows this and more (see [`super::variants`]).
    pub spec: VariantSpec,
    /// How urgent.
    pub lane: Lane,
    /// The rows.
    pub groups: Vec<RowGroup>,
}

/// Some rows of a group are done. A group that fits into one run arrives whole; a larger one in parts, which may come in any order.
#[derive(Clone, Debug)]
pub struct RowsDone {
    /// Index of the group in [`Job::groups`].
    pub group: usize,
    /// The rows of the group that the tensors cover.
    pub rows: Range<usize>,
    /// One for each pick of the group, in order; views of shared memory.
    pub tensors: Vec<Tensor>,
    /// Indices of picks with a value that is neither finite nor a mask.
    pub non_finite: Vec<usize>,
    /// Where the time went.
    pub timings: StageTimings,
}

/// Seconds by stage, as spans, histograms and the answer's summary report them. Stages that a part does not know are zero; sum them up with `+=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimings {
    /// Text to tokens, in the worker.
    pub tokenize: Duration,
    /// From submission until the run began.
    pub queue: Duration,
    /// Building a graph variant, when this request had to wait for one.
    pub build: Duration,
    /// The run itself, with its way to the worker and back.
    pub run: Duration,
    /// The method's own arithmetic.
    pub reduce: Duration,
    /// To messages.
    pub encode: Duration,
}

impl std::ops::AddAssign for StageTimings {
    fn add_assign(&mut self, other: Self) {
        self.tokenize += other.tokenize;
        self.queue += other.queue;
        self.build += other.build;
        self.run += other.run;
        self.reduce += other.reduce;
        self.encode += other.encode;
    }
}

/// A text to tokenize, with the second of a pair where the task has one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextInput {
    /// The text.
    pub text: String,
    /// Its pair.
    pub pair: Option<String>,
}

/// How to tokenize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenizeOptions {
    /// Add the template's special tokens.
    pub special: bool,
    /// Cut to the model's limit instead of failing.
    pub truncate: bool,
}

impl Default for TokenizeOptions {
    fn default() -> Self {
        Self {
            special: true,
            truncate: false,
        }
    }
}

/// Tokens of one text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Vocabulary indices.
    pub ids: Vec<u32>,
    /// Segment of each token, for models with segment embeddings.
    pub type_ids: Vec<u32>,
    /// Token strings as the vocabulary spells them.
    pub tokens: Vec<String>,
    /// Byte offsets `[start, end)` in the text (or pair) that the token comes from; equal for special tokens.
    pub offsets: Vec<Range<u32>>,
    /// Tokens that the template added.
    pub special: Vec<bool>,
    /// 0 for the text, 1 for its pair.
    pub sequence: Vec<u32>,
    /// Word index; none for special tokens.
    pub words: Vec<Option<u32>>,
    /// Tokens cut off by truncation.
    pub truncated: u32,
}
