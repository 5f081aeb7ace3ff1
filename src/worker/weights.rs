//! Weights shared by every session of a model: mapped once, packed once.
//!
//! The recipe, measured on ONNX Runtime 1.32 (BERT-base: the first session takes 705 MB, each further one 18 MB): the graph is
//! given from memory with its large weights as references into the model's own file, the session is told the model's folder, every
//! such weight is handed over by `with_initializer` as a view of the mapped file, and all sessions share one `PrepackedWeights`.
//! A weight that is not aligned for its elements (inside a model file nothing is aligned) is copied, once for all sessions.

use std::{collections::HashMap, sync::Arc};

use ort::{session::builder::PrepackedWeights, value::DynValue};

use super::{
    native::{self, Lent},
    value,
};
use crate::onnx::{Graph, Weights as Encoding};

/// Smallest weight that is worth sharing; smaller ones are copied into each graph.
const SHARED_FROM: usize = 4096;

/// How graphs are encoded so that their large weights are shared.
pub(super) const ENCODING: Encoding = Encoding::ByReference {
    from_bytes: SHARED_FROM,
};

/// The weights of one model, as the runtime takes them. Must outlive the sessions that it is used for.
pub(super) struct SharedWeights {
    lent: HashMap<String, Lent>,
    packed: PrepackedWeights,
}

impl SharedWeights {
    /// Wraps every weight of the graph that its encoding refers to.
    pub(super) fn new(graph: &Graph) -> Result<Self, String> {
        let mut lent = HashMap::new();
        for (name, weight) in graph.initializers() {
            if let Some(tensor) = weight.tensor().filter(|_| ENCODING.refers(weight)) {
                lent.insert(name.to_owned(), value::input(&tensor)?);
                if !value::is_aligned(&tensor) {
                    native::give_pages_back(tensor.bytes());
                }
            }
        }
        Ok(Self {
            lent,
            packed: PrepackedWeights::new(),
        })
    }

    /// The weights of a graph that shares this model's, by name.
    pub(super) fn of<'a>(
        &'a self,
        graph: &'a Graph,
    ) -> impl Iterator<Item = (&'a str, Arc<DynValue>)> {
        graph
            .initializers()
            .filter(|(_, weight)| ENCODING.refers(weight))
            .filter_map(|(name, _)| Some((name, self.lent.get(name)?.value().clone())))
    }

    /// What the sessions packed.
    pub(super) fn packed(&self) -> &PrepackedWeights {
        &self.packed
    }
}
