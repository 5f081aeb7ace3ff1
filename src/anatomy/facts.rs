//! Plain facts about a model.
use serde::{Deserialize, Serialize};

/// Meaning of an axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Axis { Batch, Pos, Query, Key, Head, KvHead, DModel, DHead, DMlp, Vocab, Label, Other(String) }

/// What an input is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum InputRole { TokenIds, AttentionMask, TypeIds, PositionIds, Pixels, Past, Other }

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Task { SequenceClassification, TokenClassification, CausalLm, MaskedLm, Encoder, ImageClassification, Other }

/// Sizes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Dims { pub layers: Option<usize>, pub heads: Option<usize>, pub kv_heads: Option<usize>, pub d_model: Option<usize>, pub d_head: Option<usize>, pub d_mlp: Option<usize>, pub vocab: Option<usize> }

/// One check of the certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Check { pub name: String, pub passed: bool, pub measured: f64, pub tolerance: f64, pub tolerance_name: String, pub subject: String }

/// A hook point that a model lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Missing { pub hook: String, pub reason: String }
