//! Interventions: what would the model say if this part of it were otherwise?
//!
//! ```text
//!   edits ──▶ values (means, source runs, draws) ──▶ stages and operands ──▶ an edited handle
//!                                                                              │ capture, predict, attribute, score
//!   effect ◀── what the model said, what the edited model said ◀───────────────┘
//! ```
//!
//! An [`Intervention`] is a list of edits, each of a hook point and a part of it. [`resolve()`] makes the values that it needs and gives
//! [`Edits`](crate::engine::Edits), which ride on a model handle, so that every other method runs on the edited model. Edits of one hook
//! point follow each other in the order of the list; edits of several compose in the order of the graph. A [`sweep`] makes one edit at
//! every place of a kind, each by itself; a [`circuit`] is made of the edges between parts that carry a behaviour.

pub mod circuit;
pub mod effect;
mod means;
mod operand;
mod resolve;
mod site;
pub mod sweep;

use std::collections::BTreeMap;

pub use means::Means;
pub use resolve::resolve;

use super::{attribute::features::Span, input::Input};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle},
    ipc::spec::Stage,
    tensor::Tensor,
};

/// What work for an intervention is done in.
#[derive(Clone, Copy, Debug)]
pub struct Within<'a> {
    /// Where rows wait.
    pub lane: Lane,
    /// The request.
    pub ctx: &'a Ctx,
    /// Means that are known.
    pub means: &'a Means,
}

/// What is changed.
#[derive(Clone, Debug, Default)]
pub struct Intervention {
    /// One after the other.
    pub edits: Vec<Edit>,
    /// Inputs whose runs values are taken from, by the names that edits call them.
    pub sources: BTreeMap<String, Source>,
}

/// An intervention, to be made on any input.
#[derive(Clone, Debug)]
pub struct Editor {
    /// What is changed.
    pub intervention: Intervention,
    /// Means that are known.
    pub means: Means,
}

impl Editor {
    /// The model as it is changed for this input.
    ///
    /// # Errors
    /// Those of [`resolve()`].
    pub async fn edited(
        &self,
        handle: &ModelHandle,
        input: &Input,
        (lane, ctx): (Lane, &Ctx),
    ) -> Result<ModelHandle, EngineError> {
        let within = Within {
            lane,
            ctx,
            means: &self.means,
        };
        let edits = resolve(handle, &self.intervention, input, within).await?;
        Ok(handle.edited(edits))
    }
}

/// An input that is run for the values inside.
#[derive(Clone, Debug)]
pub struct Source {
    /// The input.
    pub input: Input,
    /// What is changed of its own run, with the same sources.
    pub edits: Vec<Edit>,
}

/// One change.
#[derive(Clone, Debug)]
pub struct Edit {
    /// Hook point: a name, an alias, a kind or a pattern.
    pub hook: String,
    /// Layers; empty takes all that the name means.
    pub layers: Vec<u32>,
    /// Heads; empty takes all.
    pub heads: Vec<u32>,
    /// Positions (queries of attentions), negative ones from the end; empty takes all.
    pub positions: Vec<i32>,
    /// Positions by parts of the text.
    pub spans: Vec<Span>,
    /// Keys of attentions, negative ones from the end; empty takes all.
    pub keys: Vec<i32>,
    /// Indices along the last axis: neurons, dimensions; empty takes all.
    pub dims: Vec<u32>,
    /// What is done there.
    pub operation: Operation,
}

impl Edit {
    /// An edit of everything that a hook point's name means.
    pub fn whole(hook: &str, operation: Operation) -> Self {
        Self {
            hook: hook.to_owned(),
            layers: Vec::new(),
            heads: Vec::new(),
            positions: Vec::new(),
            spans: Vec::new(),
            keys: Vec::new(),
            dims: Vec::new(),
            operation,
        }
    }
}

/// What is done with what stands at a hook point.
#[derive(Clone, Debug)]
pub enum Operation {
    /// `0`
    Zero,
    /// The mean over these inputs, and over their positions where the hook point is no attention's.
    Mean(Vec<Input>),
    /// These values.
    Set(Tensor),
    /// `x + scale * vector`
    Add {
        /// What is added.
        vector: Vector,
        /// Factor.
        scale: f32,
    },
    /// `x * factor`
    Scale(f32),
    /// `x + e`, normal.
    Noise {
        /// Standard deviation.
        deviation: f32,
        /// Where draws begin.
        seed: u64,
    },
    /// What stands there in the run of a source.
    Interchange {
        /// Its name.
        source: String,
        /// Its positions, one for each that is edited; empty takes the same ones.
        positions: Vec<i32>,
    },
    /// `x - (x . d) d`, with `d` the vector divided by its length.
    ProjectOut(Vector),
    /// `min(max(x, low), high)`
    Clamp {
        /// Least.
        low: f32,
        /// Greatest.
        high: f32,
    },
}

impl Operation {
    /// The stage that does it.
    fn stage(&self) -> Stage {
        match self {
            Self::Zero
            | Self::Mean(_)
            | Self::Set(_)
            | Self::Add { .. }
            | Self::Scale(_)
            | Self::Noise { .. }
            | Self::Interchange { .. } => Stage::Move,
            Self::ProjectOut(_) => Stage::Project,
            Self::Clamp { .. } => Stage::Clamp,
        }
    }
}

/// Values along the last axis of a hook point.
#[derive(Clone, Debug)]
pub enum Vector {
    /// As given: any shape that broadcasts to what is edited.
    Given(Tensor),
    /// The mean over some inputs less the mean over others, over all their positions.
    Difference {
        /// Counts positively.
        positive: Vec<Input>,
        /// Counts negatively.
        negative: Vec<Input>,
    },
}
