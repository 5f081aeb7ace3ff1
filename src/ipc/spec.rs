//! What the front asks of a worker: how to load a model, and which variant of its graph to run.
//!
//! Plain data, serialised as JSON inside the worker's frames. A [`VariantSpec`] is canonical: two requests
//! that need the same graph have equal specs, so that the spec is the key of the cache of sessions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// Prefix of a hook-point name that means the value of that name in the ONNX graph.
pub const VALUE_PREFIX: &str = "value:";

/// One variant of a model's graph.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariantSpec {
    /// Which graph the variant starts from.
    pub plan: Plan,
    /// Canonical hook-point names, or `value:NAME` for any value of the graph. Empty for [`Plan::Plain`].
    #[serde(default)]
    pub expose: BTreeSet<String>,
    /// Whether the model's own outputs are computed too. `false` lets the runtime stop at the last exposed
    /// value (early exit).
    pub keep_outputs: bool,
    /// Hook points that are edited at run time, in stages. The variant then has the inputs of [`Stage::inputs`] for each.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub edit: BTreeMap<String, Vec<Stage>>,
    /// Hook points that a method moves at run time, behind the edits. The variant then has the inputs `scale:NAME` and `shift:NAME` for each.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub intervene: BTreeSet<String>,
    /// Hook points at which a run begins, behind their edits: the variant has the input [`state_input`] for each, and runs nothing of what comes
    /// before them (late entry).
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub enter: BTreeSet<String>,
    /// What is differentiated, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient: Option<GradientSpec>,
}

/// Input of a variant that begins at a hook point: what stands there, under canonical axes.
pub fn state_input(hook: &str) -> String {
    format!("state:{hook}")
}

/// A stage of an edit: a value goes in, another of the same shape comes out. Left out, its inputs change nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// `x * scale + shift`; a scale of zero puts the shift in the place of whatever stands there.
    Move,
    /// `x - sum(x * onto) onto`, summed over the last axis: what points along `onto`, of length one, goes.
    Project,
    /// `min(max(x, low), high)`
    Clamp,
}

impl Stage {
    /// Names of the inputs of the stage of this number at a hook point, with the number that changes nothing.
    pub fn inputs(self, number: usize, hook: &str) -> Vec<(String, f32)> {
        let of = |what: &str, rest| (format!("edit{number}.{what}:{hook}"), rest);
        match self {
            Stage::Move => vec![of("scale", 1.0), of("shift", 0.0)],
            Stage::Project => vec![of("onto", 0.0)],
            Stage::Clamp => vec![of("low", f32::NEG_INFINITY), of("high", f32::INFINITY)],
        }
    }
}

/// The gradient of an objective, a number per row.
///
/// The variant has the inputs [`TARGET_LABEL`] and [`TARGET_WEIGHT`], both `[row, term]`, and where the scores have positions
/// [`TARGET_POSITION`]. The objective of a row is the sum over its terms of the weight times the quantity at that position and label;
/// for quantities that [read out](Quantity::reads_out) there is [`TARGET_READOUT`] in the place of labels;
/// it comes out as [`OBJECTIVE`] `[row]`, and the gradient with respect to each point as `gradient:NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradientSpec {
    /// What a term is.
    pub of: Quantity,
    /// Hook point that holds the scores; the model's main output unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// How operators hand on what reaches them.
    #[serde(default, skip_serializing_if = "Rules::are_gradients")]
    pub rules: Rules,
    /// Hook points, and how the gradient with respect to each leaves the graph.
    pub points: BTreeMap<String, Reduction>,
}

/// Input of a gradient variant: labels of the terms, 64-bit integers.
pub const TARGET_LABEL: &str = "target:label";
/// Input of a gradient variant: positions of the terms, 64-bit integers.
pub const TARGET_POSITION: &str = "target:position";
/// Input of a gradient variant: weights of the terms, 32-bit floats. A term of weight zero counts for nothing.
pub const TARGET_WEIGHT: &str = "target:weight";
/// Input of a gradient variant whose quantity [reads out](Quantity::reads_out): a weight for each number of the last axis and a bias,
/// `[row, width + 1]`, 32-bit floats.
pub const TARGET_READOUT: &str = "target:readout";
/// Output of a gradient variant.
pub const OBJECTIVE: &str = "objective";

/// What an objective is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// The score as it is.
    Logit,
    /// Its logarithmic softmax over the last axis.
    LogProbability,
    /// Its softmax over the last axis.
    Probability,
    /// A linear function of the numbers at a position, as a probe reads them: [`TARGET_READOUT`]. The bias is added once.
    Readout,
    /// The same function of minus the logarithmic softmax. With probabilities `p` as weights and `sum p ln p` as bias this is the divergence
    /// `sum p (ln p - ln q)` of the scores' softmax `q` from `p`, in nats (Kullback and Leibler 1951).
    Divergence,
}

impl Quantity {
    /// Whether the last axis is weighed as a whole, by [`TARGET_READOUT`], in place of labels.
    pub const fn reads_out(self) -> bool {
        matches!(self, Quantity::Readout | Quantity::Divergence)
    }
}

/// How operators hand on what reaches them, from the objective back to the points.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Rules {
    /// The chain rule: what arrives is the gradient.
    #[default]
    Gradient,
    /// AttnLRP (Achtibat et al. 2024): what arrives, times the value, is relevance.
    AttnLrp,
}

impl Rules {
    #[allow(clippy::trivially_copy_pass_by_ref)] // as serde asks
    fn are_gradients(&self) -> bool {
        *self == Rules::Gradient
    }
}

/// What leaves the graph of a gradient `g` with respect to `x`. All but the whole are sums over the last axis, which goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// All of it.
    Whole,
    /// `sum g`
    Sum,
    /// `sum |g|`
    AbsoluteSum,
    /// `sqrt(sum g^2)`
    L2,
    /// `sum g x`: input x gradient.
    TimesValue,
    /// `sum g d`, with `d` fed as `direction:NAME`.
    Dot,
}

/// Which graph a variant starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plan {
    /// The model file as it stands, fused nodes included; its own outputs.
    Plain,
    /// The unfused graph, rewritten.
    Rewritten,
}

impl VariantSpec {
    /// The untouched model: what a plain predict runs.
    pub fn plain() -> Self {
        Self {
            plan: Plan::Plain,
            expose: BTreeSet::new(),
            keep_outputs: true,
            edit: BTreeMap::new(),
            intervene: BTreeSet::new(),
            enter: BTreeSet::new(),
            gradient: None,
        }
    }

    /// The unfused graph with the model's own outputs, to be added to.
    pub fn rewritten() -> Self {
        Self {
            plan: Plan::Rewritten,
            ..Self::plain()
        }
    }

    /// The model with these hook points exposed beside its own outputs.
    pub fn exposing<S: Into<String>>(hooks: impl IntoIterator<Item = S>) -> Self {
        Self {
            expose: hooks.into_iter().map(Into::into).collect(),
            ..Self::rewritten()
        }
    }
}

/// Where a model's kernels run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Provider {
    /// ONNX Runtime's CPU provider.
    #[default]
    Cpu,
    /// The CUDA provider on the device of this number.
    Cuda(u32),
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Provider::Cpu => f.write_str("cpu"),
            Provider::Cuda(device) => write!(f, "cuda:{device}"),
        }
    }
}

/// The text names no provider.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown provider {0:?}: use \"cpu\", \"cuda\" or \"cuda:N\"")]
pub struct UnknownProvider(String);

impl FromStr for Provider {
    type Err = UnknownProvider;

    fn from_str(text: &str) -> Result<Self, UnknownProvider> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Provider::Cpu),
            None if text == "cuda" => Ok(Provider::Cuda(0)),
            Some(("cuda", device)) => device
                .parse()
                .map(Provider::Cuda)
                .map_err(|_| UnknownProvider(text.to_owned())),
            None | Some(_) => Err(UnknownProvider(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Provider {
    type Error = UnknownProvider;

    fn try_from(text: String) -> Result<Self, UnknownProvider> {
        text.parse()
    }
}

impl From<Provider> for String {
    fn from(provider: Provider) -> Self {
        provider.to_string()
    }
}

/// How a worker loads its model, and what it may spend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadOptions {
    /// Execution provider. What cannot be loaded is an error: there is no silent fall-back.
    pub provider: Provider,
    /// Threads of a run; 0 takes every core that the process may use.
    pub intra_threads: usize,
    /// Keep ONNX Runtime's CPU memory arena: about 5 % faster, and never gives a large request's memory back.
    pub arena: bool,
    /// Cap of the worker's private memory in bytes (`RLIMIT_DATA`), if any.
    pub memory_limit_bytes: Option<u64>,
    /// The ONNX Runtime library to load, in place of the search.
    pub library: Option<PathBuf>,
    /// Folder that links in the model's folder may lead to, as the hub's cache lays snapshots out. The model's folder
    /// must stand inside. Without it, links are refused.
    pub repository: Option<PathBuf>,
    /// Token limit of a text, when lower than the model's own.
    pub max_tokens: Option<usize>,
    /// Largest text in bytes that is tokenised.
    pub max_text_bytes: usize,
    /// Largest model in bytes, external data included.
    pub max_model_bytes: u64,
    /// Largest sum in bytes of what one run brings back.
    pub max_run_bytes: u64,
    /// Check the anatomy by running the model, and report the certificate. Without it the hook points are unverified.
    pub certify: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            provider: Provider::Cpu,
            intra_threads: 0,
            arena: false,
            memory_limit_bytes: None,
            library: None,
            repository: None,
            max_tokens: None,
            max_text_bytes: 256 << 10,
            max_model_bytes: 64 << 30,
            max_run_bytes: 2 << 30,
            certify: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_that_need_the_same_graph_are_equal() {
        let a = VariantSpec::exposing(["attentions.0", "hidden_states.1"]);
        let b = VariantSpec::exposing(["hidden_states.1", "attentions.0", "attentions.0"]);
        assert_eq!(a, b);
        let json = serde_json::to_string(&a).unwrap();
        assert_eq!(serde_json::from_str::<VariantSpec>(&json).unwrap(), b);
    }

    #[test]
    fn providers_come_back_from_their_names() {
        for p in [Provider::Cpu, Provider::Cuda(0), Provider::Cuda(7)] {
            assert_eq!(p.to_string().parse(), Ok(p));
        }
        assert_eq!("cuda".parse(), Ok(Provider::Cuda(0)));
        for bad in ["", "CPU", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "rocm"] {
            assert!(bad.parse::<Provider>().is_err(), "{bad}");
        }
    }

    #[test]
    fn options_left_out_take_their_defaults_and_unknown_ones_are_refused() {
        let options: LoadOptions = serde_json::from_str(r#"{"provider":"cuda:1"}"#).unwrap();
        assert_eq!(options.provider, Provider::Cuda(1));
        assert_eq!(
            options.max_text_bytes,
            LoadOptions::default().max_text_bytes
        );
        assert!(serde_json::from_str::<LoadOptions>(r#"{"areena":true}"#).is_err());
    }
}
