//! What is known of a loaded model: the worker's answer to a load, as JSON on the private wire.

use serde::{Deserialize, Serialize};

use crate::tensor::DType;

/// The meaning of an axis. Names are the field's: see [`Axis::name`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Rows of a request.
    Batch,
    /// Positions of the sequence.
    Pos,
    /// Positions that ask, of an attention.
    Query,
    /// Positions that are looked at, of an attention.
    Key,
    /// Attention heads.
    Head,
    /// Key and value heads, where queries share them.
    KvHead,
    /// Width of the residual stream.
    DModel,
    /// Width of a head.
    DHead,
    /// Neurons of an MLP.
    DMlp,
    /// Vocabulary.
    Vocab,
    /// Classes.
    Label,
    /// Something else, named by its place.
    Other(String),
}

impl Axis {
    /// The name on the wire.
    pub fn name(&self) -> &str {
        match self {
            Axis::Batch => "batch",
            Axis::Pos => "pos",
            Axis::Query => "query",
            Axis::Key => "key",
            Axis::Head => "head",
            Axis::KvHead => "kv_head",
            Axis::DModel => "d_model",
            Axis::DHead => "d_head",
            Axis::DMlp => "d_mlp",
            Axis::Vocab => "d_vocab",
            Axis::Label => "label",
            Axis::Other(name) => name,
        }
    }

    /// Whether the axis runs over the positions of the sequence, so that padding lengthens it.
    pub fn is_token(&self) -> bool {
        matches!(self, Axis::Pos | Axis::Query | Axis::Key)
    }

    /// Whether the axis runs over heads.
    pub fn is_head(&self) -> bool {
        matches!(self, Axis::Head | Axis::KvHead)
    }
}

/// What an input is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputRole {
    /// Vocabulary indices.
    TokenIds,
    /// 1 for tokens, 0 for padding.
    AttentionMask,
    /// Segment of each token.
    TypeIds,
    /// Place of each token.
    PositionIds,
    /// Pixels, or other floats that enter by a projection.
    Pixels,
    /// Keys or values of tokens before these; none when left out.
    Past,
    /// Not recognised; must be given.
    Other,
}

/// What a model is for, as its outputs show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A label per text.
    SequenceClassification,
    /// A label per token.
    TokenClassification,
    /// The next token.
    CausalLm,
    /// The masked token.
    MaskedLm,
    /// Vectors.
    Encoder,
    /// A label per image.
    ImageClassification,
    /// Not recognised.
    Unknown,
}

impl Task {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Task::SequenceClassification => "sequence_classification",
            Task::TokenClassification => "token_classification",
            Task::CausalLm => "causal_lm",
            Task::MaskedLm => "masked_lm",
            Task::Encoder => "encoder",
            Task::ImageClassification => "image_classification",
            Task::Unknown => "unknown",
        }
    }
}

/// An input of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputInfo {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents; `None` where they vary.
    pub dims: Vec<Option<usize>>,
    /// What each axis means; empty where it was not found out.
    pub axes: Vec<Axis>,
    /// What it is for.
    pub role: InputRole,
}

impl InputInfo {
    /// Whether the first axis is that of the batch. Of axes that nobody could find out it is, unless the file fixes its extent.
    pub fn is_batched(&self) -> bool {
        match self.axes.first() {
            Some(axis) => *axis == Axis::Batch,
            None => self.dims.first().is_some_and(Option::is_none),
        }
    }
}

/// An output of the model or of a variant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValueInfo {
    /// Name: of the output, or of the hook point.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// What each axis means.
    pub axes: Vec<Axis>,
    /// Extents; `None` where they vary.
    pub dims: Vec<Option<usize>>,
}

/// A hook point that the model has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookInfo {
    /// Canonical name, such as `blocks.0.attn.hook_pattern`.
    pub name: String,
    /// Other names that mean the same, such as `attentions.0`.
    pub aliases: Vec<String>,
    /// Layer, for hook points of a block.
    pub layer: Option<usize>,
    /// Name of the value in the graph.
    pub value: String,
    /// Canonical axes.
    pub axes: Vec<Axis>,
    /// Extents; `None` where they vary.
    pub dims: Vec<Option<usize>>,
    /// Element type.
    pub dtype: DType,
}

/// A hook point that users would look for and the model does not have, or that failed its check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Canonical name, possibly with `*` for the layer.
    pub hook: String,
    /// Why, for people.
    pub reason: String,
}

/// Sizes of the model, where they were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dims {
    /// Transformer blocks.
    pub layers: usize,
    /// Attention heads.
    pub heads: Option<usize>,
    /// Key and value heads.
    pub kv_heads: Option<usize>,
    /// Width of the residual stream.
    pub d_model: Option<usize>,
    /// Width of a head.
    pub d_head: Option<usize>,
    /// Neurons of an MLP.
    pub d_mlp: Option<usize>,
    /// Vocabulary of the token embedding.
    pub vocab: Option<usize>,
}

/// One check of the parity certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked, such as `pattern rows sum to one`.
    pub name: String,
    /// The hook point or output concerned.
    pub subject: String,
    /// Whether it held.
    pub passed: bool,
    /// Largest deviation, relative to the largest value.
    pub measured: f64,
    /// What was allowed.
    pub tolerance: f64,
    /// Name of the tolerance: `Exact`, `Close`, `Rewritten`.
    pub tolerance_name: String,
}

/// The parity certificate: what was verified when the model loaded, on seeded random input.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// Every check that was made.
    pub checks: Vec<Check>,
}

impl Certificate {
    /// The checks that did not hold.
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|c| !c.passed)
    }
}

/// What is known of the tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerInfo {
    /// Size of the vocabulary, added tokens included.
    pub vocab: usize,
    /// Most tokens of an input.
    pub max_tokens: usize,
    /// The padding token.
    pub pad_id: u32,
    /// The mask token, where there is one.
    pub mask_id: Option<u32>,
    /// The unknown token, where there is one.
    pub unk_id: Option<u32>,
    /// Tokens that the template adds or that stand for no text.
    pub special_ids: Vec<u32>,
}

/// How long a stage of the load took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadStage {
    /// Name of the stage.
    pub name: String,
    /// Milliseconds.
    pub millis: u64,
}

/// Everything the front knows of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Name in the repository; filled in by the front.
    pub name: String,
    /// SHA-256 of the model file and its external data, in hex.
    pub fingerprint: String,
    /// What it is for.
    pub task: Task,
    /// Inputs in the file's order.
    pub inputs: Vec<InputInfo>,
    /// Outputs in the file's order.
    pub outputs: Vec<ValueInfo>,
    /// Name of the output that explanations are about: logits, or the last hidden state of an encoder.
    pub main_output: String,
    /// Names of the classes; empty where there are none.
    pub labels: Vec<String>,
    /// Sizes.
    pub dims: Dims,
    /// Hook points, in graph order.
    pub hooks: Vec<HookInfo>,
    /// What was looked for and not found.
    pub missing: Vec<Missing>,
    /// What was verified.
    pub certificate: Certificate,
    /// The tokenizer, where there is one.
    pub tokenizer: Option<TokenizerInfo>,
    /// Whether rows of different length may share a batch: a mask input was found, and padding was checked not to show.
    pub pads: bool,
    /// Whether rows of a run change each other's answers, as they do where values are quantised by a range that all rows share. Such a
    /// model runs each request by itself.
    pub rows_interact: bool,
    /// Batch size that the file fixes.
    pub fixed_batch: Option<usize>,
    /// Length in tokens that the file fixes.
    pub fixed_length: Option<usize>,
    /// Most tokens of a row: of the tokenizer, the configuration or the position table, whichever is least.
    pub max_tokens: Option<usize>,
    /// Program that made the file.
    pub producer: String,
    /// Standard operator set.
    pub opset: i64,
    /// Things worth knowing: what was unfused, what could not be, which guards apply.
    pub notes: Vec<String>,
    /// ONNX Runtime version.
    pub runtime: String,
    /// Execution provider.
    pub provider: String,
    /// Where the load time went.
    pub load: Vec<LoadStage>,
    /// The anatomy as a picture in text.
    pub picture: String,
}

impl ModelInfo {
    /// Whether the main output has an axis of positions: one label, or one token, for each of them.
    pub fn main_output_has_positions(&self) -> bool {
        let output = self.outputs.iter().find(|o| o.name == self.main_output);
        output.is_some_and(|o| o.axes.iter().any(Axis::is_token))
    }

    /// The hook point of a canonical name, an alias, or a short form (`resid_post.3`, `pattern.0`).
    pub fn hook(&self, name: &str) -> Option<&HookInfo> {
        self.hooks
            .iter()
            .find(|h| h.name == name || h.aliases.iter().any(|a| a == name))
    }

    /// The input of a role.
    pub fn input(&self, role: InputRole) -> Option<&InputInfo> {
        self.inputs.iter().find(|i| i.role == role)
    }

    /// The output of a name.
    pub fn output(&self, name: &str) -> Option<&ValueInfo> {
        self.outputs.iter().find(|o| o.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_axis_is_the_batch_unless_something_says_otherwise() {
        let batched = |axes: Vec<Axis>, dims: Vec<Option<usize>>| {
            let input = InputInfo {
                name: "x".to_owned(),
                dtype: DType::I64,
                dims,
                axes,
                role: InputRole::Other,
            };
            input.is_batched()
        };
        assert!(batched(vec![Axis::Batch, Axis::Pos], vec![None, None]));
        assert!(batched(vec![Axis::Batch], vec![Some(1)]));
        assert!(!batched(vec![Axis::Pos], vec![None]));
        assert!(batched(Vec::new(), vec![None, Some(7)]));
        assert!(!batched(Vec::new(), vec![Some(7)]), "the file fixes it");
        assert!(!batched(Vec::new(), Vec::new()), "a number");
    }
}
