//! Runs of a graph on the trial inputs that tell the shapes of its floats: what a gradient needs to know.

use std::collections::HashMap;

use ort::session::RunOptions;

use super::session::{Bench, Effort, run};
use crate::{
    onnx::{Model, ValueId},
    rewrite::{self, gradient::Shapes},
    tensor::{DType, Tensor},
};

/// Inputs of one run, by name.
pub(super) type Inputs = Vec<(String, Tensor)>;

/// Shapes of every float that a node of the graph makes. `movable` are the inputs by which hook points are moved; nothing is.
pub(super) fn shapes(
    bench: &Bench,
    model: &Model,
    movable: &[String],
    trials: &[Inputs],
) -> Result<Shapes, String> {
    values(bench, model, movable, trials).map(|runs| shapes_of(model, &runs))
}

/// What runs tell of shapes.
pub(super) fn shapes_of(model: &Model, runs: &[HashMap<ValueId, Tensor>]) -> Shapes {
    let shape = |(value, tensor): (&ValueId, &Tensor)| (*value, tensor.shape().to_vec());
    let runs = runs.iter().map(|run| run.iter().map(shape).collect());
    Shapes::measured(&model.graph, runs.collect())
}

/// Every float that a node of the graph makes, and the inputs, in each run.
pub(super) fn values(
    bench: &Bench,
    model: &Model,
    movable: &[String],
    trials: &[Inputs],
) -> Result<Vec<HashMap<ValueId, Tensor>>, String> {
    if trials.is_empty() {
        return Err(
            "the model ran on none of the trial inputs, so that no shape is known".to_owned(),
        );
    }
    let graph = &model.graph;
    let types = graph.element_types();
    let floats: Vec<ValueId> = graph
        .nodes()
        .flat_map(|(_, node)| node.outputs.iter().copied().flatten())
        .filter(|v| types[v.index()].is_some_and(DType::is_float))
        .collect();
    let observed = rewrite::observe(model, &floats).map_err(|e| e.to_string())?;
    let mut session = bench.session(&observed.model, Effort::Little)?;
    let options = RunOptions::new().map_err(|e| e.message().to_owned())?;
    let mut runs = Vec::with_capacity(trials.len());
    for inputs in trials {
        let mut inputs = inputs.clone();
        for name in movable {
            inputs.push((name.clone(), at_rest(model, name)?));
        }
        let made = run(&mut session, &inputs, &options)?;
        let seen = made.into_iter().chain(inputs);
        let seen = seen.filter_map(|(name, tensor)| Some((graph.value(&name)?, tensor)));
        runs.push(seen.collect());
    }
    Ok(runs)
}

/// What an input holds that moves nothing: one for a scale, zero for a shift.
fn at_rest(model: &Model, name: &str) -> Result<Tensor, String> {
    let port = model
        .graph
        .inputs()
        .find(|p| model.graph.name(p.value) == name);
    let known = port.and_then(|p| Some((p.dtype()?, p.dims()?.len())));
    let (dtype, rank) = known.ok_or_else(|| format!("\"{name}\" is no input"))?;
    let value = if name.starts_with("scale:") { 1.0 } else { 0.0 };
    Tensor::from_f32(vec![1; rank], &[value])
        .and_then(|t| t.cast_float(dtype))
        .map_err(|e| e.to_string())
}
