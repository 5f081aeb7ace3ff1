//! The gradient of a model's output with respect to its token embedding, as a model of its own.
#![allow(dead_code)] // every test binary uses a part of it

use std::collections::HashMap;

use introspectd::{
    anatomy::Anatomy,
    ipc::spec::Rules,
    onnx::{Dim, Model, Patch, ValueId, Writer},
    rewrite::{
        self,
        gradient::{Shapes, backward},
    },
    tensor::{DType, Tensor},
};

use super::support::Runner;

/// Name of what is added: the input that the output is multiplied by, and the gradient.
pub const SEED: &str = "seed";
pub const GRADIENT: &str = "gradient";

/// Rows and tokens of the two runs that shapes are measured by.
const RUNS: [(usize, usize); 2] = [(3, 7), (2, 12)];

/// Inputs of other extents, from the rows and tokens that are there.
pub fn resized(inputs: &[(String, Tensor)], rows: usize, tokens: usize) -> Vec<(String, Tensor)> {
    let of = |tensor: &Tensor| {
        let (shape, size) = (tensor.shape(), tensor.dtype().size());
        let mut resized = shape.to_vec();
        resized[0] = rows;
        if tensor.dtype() == DType::I64 {
            resized[1] = tokens;
        }
        let row = tensor.bytes().len() / shape[0];
        let kept = resized[1..].iter().product::<usize>() * size;
        let bytes: Vec<u8> = (0..rows)
            .flat_map(|r| &tensor.bytes()[(r % shape[0]) * row..][..kept])
            .copied()
            .collect();
        Tensor::new(tensor.dtype(), resized, bytes.into()).expect("as many as the shape says")
    };
    inputs
        .iter()
        .map(|(name, t)| (name.clone(), of(t)))
        .collect()
}

/// Shapes of every float of a model.
pub fn shapes(model: &Model, inputs: &[(String, Tensor)]) -> Result<Shapes, String> {
    let graph = &model.graph;
    let types = graph.element_types();
    let made: Vec<ValueId> = graph
        .nodes()
        .flat_map(|(_, node)| node.outputs.iter().copied().flatten())
        .filter(|v| types[v.index()].is_some_and(DType::is_float))
        .collect();
    let observed = rewrite::observe(model, &made).map_err(|e| e.to_string())?;
    let runner = Runner::new(&observed.model)?;
    let mut runs = Vec::new();
    for (rows, tokens) in RUNS {
        let fed = resized(inputs, rows, tokens);
        let answer = runner.run(&fed)?;
        let shape = |(name, t): (&String, &Tensor)| Some((graph.value(name)?, t.shape().to_vec()));
        let mut run: HashMap<ValueId, Vec<usize>> = answer.iter().filter_map(shape).collect();
        run.extend(fed.iter().filter_map(|(name, t)| shape((name, t))));
        runs.push(run);
    }
    Ok(Shapes::measured(graph, runs))
}

/// A model that also gives the gradient of `sum(seed * output)` with respect to its token embedding.
pub fn differentiated(
    model: &Model,
    anatomy: &Anatomy,
    inputs: &[(String, Tensor)],
) -> Result<Model, String> {
    let point = anatomy
        .resolve(model, "hook_embed")
        .map_err(|e| e.to_string())?;
    let output = model.graph.outputs()[0].value;
    let shapes = shapes(model, inputs)?;
    let mut writer = Writer::new(Patch::new(&model.graph, GRADIENT), model.opset());
    let port = &model.graph.outputs()[0];
    let rank = port.dims().map_or(2, <[Dim]>::len);
    let dtype = port.dtype().unwrap_or(DType::F32);
    let seed = writer
        .patch
        .input(SEED, dtype, vec![Dim::Unknown; rank])
        .map_err(|e| e.to_string())?;
    let found = backward(
        &mut writer,
        &shapes,
        (output, seed),
        &[point.value],
        Rules::Gradient,
    )
    .map_err(|e| e.to_string())?;
    let gradient = found[0].ok_or("the output does not depend on the embedding")?;
    writer
        .patch
        .tap(gradient, GRADIENT)
        .map_err(|e| e.to_string())?;
    let graph = writer.patch.apply().map_err(|e| e.to_string())?;
    Ok(model.with_graph(graph))
}
