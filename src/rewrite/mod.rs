//! Makes the graph of a variant from a model and what was asked of it.
//!
//! - [`expose()`]: hook points become outputs under canonical axes; with `keep_outputs` off everything that they do not
//!   need is pruned (early exit).
//! - [`observe`]: raw values become outputs, for the trials.
//! - [`intervene()`]: hook points become editable in stages (move, project, clamp) and movable, `x := x * scale + shift`.
//! - [`enter()`]: hook points become inputs, at which a run begins; what comes before them is pruned (late entry).
//! - [`gradient`]: the reverse-mode graph of a sum of an output.
//! - [`variant()`]: all of these together, as a [`VariantSpec`](crate::ipc::spec::VariantSpec) asks for them.
//!
//! Rewrites are patches: the original graph is never edited, and what a patch makes has passed the checks of a
//! loaded file.

mod canonical;
mod enter;
mod expose;
pub mod gradient;
mod intervene;
mod objective;
mod variant;

pub use enter::{Entered, Entry, enter};
pub use expose::{ExposedOutput, Exposure, Observed, RewriteError, Rewritten, expose, observe};
pub use intervene::{Intervened, Moved, intervene};
pub use variant::{Variant, variant};
