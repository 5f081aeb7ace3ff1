//! Finds the transformer in a graph: residual stream, attention, MLP, embedding and head.
//!
//! Three pure steps; who has a runtime makes the runs between them:
//! 1. [`trace()`] reads structure: the flow from the embedding to the output, its dominators, residual blocks
//!    (`x + f(x)`), attentions, perceptrons. No architecture names, no patterns over node names.
//! 2. [`trial_plans`] makes seeded inputs on a few (batch, length) pairs; a runtime records the values that the trace
//!    wants to see into [`Trials`] ([`measure`] picks the plan).
//! 3. [`read()`] resolves axes from how measured extents follow batch and length, decides between candidates by their
//!    contents, verifies every hook point, and says what is missing and why.
//!
//! Left out: attention inside the subgraphs of control flow, windows over sparse attention (reported, not unfolded),
//! and models whose stream is no sum (recurrences without residual).

mod attention;
mod blocks;
pub mod certificate;
mod flow;
mod hooks;
mod inputs;
mod layers;
mod layout;
mod mlp;
pub mod normalise;
mod ops;
mod picture;
mod read;
mod trace;
mod trials;

pub use attention::{AttentionTrace, Rejected, ScoreTrace, Softmax};
pub use blocks::Block;
pub use hooks::{Anatomy, HookError, HookPoint, OutputFact, VALUE_PREFIX};
pub use inputs::InputTrace;
pub use layers::LayerTrace;
pub use layout::{Extent, Layout, Step};
pub use mlp::MlpTrace;
pub use read::read;
pub use trace::{Trace, trace};
pub use trials::{TrialPlan, TrialRun, Trials, measure, trial_plans};
