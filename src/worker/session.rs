//! Sessions: from a model of ours to something that runs.

use std::sync::Arc;

use ort::session::{RunOptions, Session, builder::GraphOptimizationLevel};

use super::{runtime::Runtime, value, weights};
use crate::{onnx::Model, tensor::Tensor};

/// What every session of a model needs.
pub(super) struct Bench {
    pub(super) runtime: Runtime,
    pub(super) weights: Arc<weights::SharedWeights>,
    /// Absolute path of the model's folder, for references into its files.
    pub(super) folder: String,
}

/// How hard the runtime optimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// Everything that keeps the results: for serving.
    Full,
    /// Next to nothing: for graphs that run a few times on tiny inputs.
    Little,
}

impl Bench {
    /// Builds a session for a graph that shares this model's weights.
    pub(super) fn session(&self, model: &Model, effort: Effort) -> Result<Session, String> {
        let text = |e: &dyn std::fmt::Display| super::tidy(&e.to_string());
        let mut builder = self.runtime.builder().map_err(|e| text(&e))?;
        let level = match effort {
            Effort::Full => GraphOptimizationLevel::All,
            Effort::Little => GraphOptimizationLevel::Disable,
        };
        builder = builder
            .with_optimization_level(level)
            .map_err(|e| text(&e))?;
        builder = builder
            .with_config_entry(
                "session.model_external_initializers_file_folder_path",
                &self.folder,
            )
            .map_err(|e| text(&e))?;
        for (name, weight) in self.weights.of(&model.graph) {
            builder = builder
                .with_initializer(name, weight)
                .map_err(|e| text(&e))?;
        }
        builder = builder
            .with_prepacked_weights(self.weights.packed())
            .map_err(|e| text(&e))?;
        builder
            .commit_from_memory(&model.encode(weights::ENCODING))
            .map_err(|e| text(&e))
    }
}

/// Runs a session on named inputs; outputs in the session's order, copied.
pub(super) fn run(
    session: &mut Session,
    inputs: &[(String, Tensor)],
    options: &RunOptions,
) -> Result<Vec<(String, Tensor)>, String> {
    let values = inputs
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), value::input(tensor)?)))
        .collect::<Result<Vec<_>, String>>()?;
    let views: Vec<_> = values
        .iter()
        .map(|(n, v)| (n.as_str(), v.value().as_ref()))
        .collect();
    let outputs = session
        .run_with_options(views, options)
        .map_err(|e| super::tidy(&e.to_string()))?;
    outputs
        .iter()
        .filter_map(|(name, v)| {
            // Sequences and unknown element types are of no use to anyone here.
            let (dtype, shape, bytes) = value::output(&v).ok()?;
            let tensor = Tensor::new(dtype, shape, bytes::Bytes::copy_from_slice(bytes))
                .map_err(|e| e.to_string());
            Some(tensor.map(|t| (name.to_owned(), t)))
        })
        .collect()
}
