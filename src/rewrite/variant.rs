//! The graph of a variant: interventions, then where it begins, then what is shown, then the gradient.
//!
//! A hook point that is moved is shown, and differentiated by, as what its readers read.

use std::collections::BTreeSet;

use super::{
    ExposedOutput, Exposure, RewriteError,
    canonical::{canonical, canonical_like},
    enter, expose,
    gradient::{Shapes, backward},
    intervene,
    objective::{Objective, Scores, objective},
};
use crate::{
    anatomy::{Anatomy, HookPoint, Layout},
    ipc::{
        info::Axis,
        spec::{GradientSpec, OBJECTIVE, Reduction, VALUE_PREFIX, VariantSpec},
    },
    onnx::{Dim, Model, Patch, ValueId, Writer},
    tensor::DType,
};

/// Prefix of the names of everything that a gradient adds.
const PREFIX: &str = "gradient";

/// A model for one kind of question.
#[derive(Clone, Debug)]
pub struct Variant {
    /// The graph.
    pub model: Model,
    /// What was added to the outputs of the file.
    pub outputs: Vec<ExposedOutput>,
    /// Names of what was added to the inputs of the file, with their types.
    pub inputs: Vec<(String, DType)>,
}

/// Makes a variant. `measure` runs the graph that is to be differentiated, with nothing moved, and tells the shapes of its values; it is
/// called for gradients only, not for an objective by itself.
///
/// # Errors
/// See [`expose()`], [`intervene()`], [`enter()`] and [`backward`]; and what `measure` says.
pub fn variant(
    model: &Model,
    anatomy: &Anatomy,
    spec: &VariantSpec,
    measure: impl FnOnce(&Model, &[String]) -> Result<Shapes, String>,
) -> Result<Variant, RewriteError> {
    let mut inputs = Vec::new();
    let (mut model, mut anatomy) = (model.clone(), anatomy.clone());
    if !spec.edit.is_empty() || !spec.intervene.is_empty() {
        let made = intervene(&model, &anatomy, &spec.edit, &spec.intervene)?;
        (model, anatomy) = (made.model, made.anatomy);
        inputs.extend(made.edits);
        for point in made.points {
            inputs.extend([point.scale, point.shift].map(|name| (name, point.dtype)));
        }
    }
    let entered = if spec.enter.is_empty() {
        None
    } else {
        if spec.gradient.as_ref().is_some_and(|g| !g.points.is_empty()) {
            return Err(RewriteError::Graph(
                "a variant that begins at hook points is not differentiated".to_owned(),
            ));
        }
        let made = enter(&model, &anatomy, &spec.enter)?;
        (model, anatomy) = (made.model.clone(), made.anatomy.clone());
        inputs.extend(made.points.iter().map(|p| (p.input.clone(), p.dtype)));
        Some(made)
    };
    let mut outputs = Vec::new();
    if !spec.expose.is_empty() || !spec.keep_outputs && spec.gradient.is_none() {
        let what = Exposure {
            hooks: spec.expose.clone(),
            // The objective is made of an output; those that nobody asked for go at the end.
            keep_outputs: spec.keep_outputs || spec.gradient.is_some(),
        };
        let made = expose(&model, &anatomy, &what)?;
        (model, outputs) = (made.model, made.outputs);
    }
    if let Some(gradient) = &spec.gradient {
        let movable: Vec<String> = inputs.iter().map(|(name, _)| name.clone()).collect();
        // An objective by itself is appended to shapes of any kind.
        let shapes = match gradient.points.is_empty() {
            true => Shapes::default(),
            false => measure(&model, &movable).map_err(RewriteError::Graph)?,
        };
        let mut kept: BTreeSet<String> = outputs.iter().map(|o| o.name.clone()).collect();
        let made = differentiate(&model, &anatomy, gradient, &shapes)?;
        kept.extend(made.outputs.iter().map(|o| o.name.clone()));
        model = made.model;
        outputs.extend(made.outputs);
        inputs.extend(made.inputs);
        if !spec.keep_outputs {
            let mut patch = Patch::new(&model.graph, PREFIX);
            let values = kept.iter().filter_map(|name| model.graph.value(name));
            patch.keep_outputs(&values.collect::<Vec<_>>());
            model = model.with_graph(patch.apply()?);
        }
    }
    if let Some(entered) = entered {
        entered.check(&model)?;
    }
    Ok(Variant {
        model,
        outputs,
        inputs,
    })
}

/// Appends an objective and its gradients.
fn differentiate(
    model: &Model,
    anatomy: &Anatomy,
    spec: &GradientSpec,
    shapes: &Shapes,
) -> Result<Variant, RewriteError> {
    let scores = match &spec.at {
        Some(name) => inside(model, anatomy, name)?,
        None => scores(anatomy)?,
    };
    let hooks: Vec<(&String, Reduction, HookPoint)> = spec
        .points
        .iter()
        .map(|(name, reduction)| Ok((name, *reduction, point(model, anatomy, name)?)))
        .collect::<Result<_, RewriteError>>()?;
    let mut w = Writer::new(Patch::new(&model.graph, PREFIX), model.opset());
    let Objective { seed, inputs, .. } = objective(&mut w, scores, spec.of)?;
    let mut inputs: Vec<(String, DType)> = inputs
        .into_iter()
        .map(|(name, dtype)| (name.to_owned(), dtype))
        .collect();
    let mut outputs = vec![ExposedOutput {
        name: OBJECTIVE.to_owned(),
        hook: OBJECTIVE.to_owned(),
        dtype: DType::F32,
        axes: vec![Axis::Batch],
        dims: vec![None],
    }];
    let points: Vec<ValueId> = hooks.iter().map(|(_, _, hook)| hook.value).collect();
    let gradients = backward(&mut w, shapes, (scores.value, seed), &points, spec.rules)?;
    for ((name, reduction, hook), gradient) in hooks.into_iter().zip(gradients) {
        let gradient = gradient.ok_or_else(|| {
            RewriteError::Graph(format!("what is explained does not depend on \"{name}\""))
        })?;
        let there = canonical_like(&mut w.patch, (model, anatomy), &hook, gradient)?.value();
        let direction = format!("direction:{name}");
        let by = match reduction {
            Reduction::TimesValue => Some(canonical(&mut w.patch, model, anatomy, &hook)?.value()),
            Reduction::Dot => {
                let dims = vec![Dim::Unknown; hook.axes.len()];
                let value = w.patch.input(&direction, hook.dtype, dims)?;
                inputs.push((direction, hook.dtype));
                Some(value)
            }
            Reduction::Whole | Reduction::Sum | Reduction::AbsoluteSum | Reduction::L2 => None,
        };
        let leaves = reduced(&mut w, there, reduction, by);
        let output = format!("gradient:{name}");
        w.patch.tap(leaves, &output)?;
        let gone = usize::from(reduction != Reduction::Whole);
        let left = hook.axes.len().saturating_sub(gone);
        outputs.push(ExposedOutput {
            name: output,
            hook: hook.name,
            dtype: hook.dtype,
            axes: hook.axes[..left].to_vec(),
            dims: hook.dims[..left].to_vec(),
        });
    }
    Ok(Variant {
        model: model.with_graph(w.patch.apply()?),
        outputs,
        inputs,
    })
}

/// What is differentiated by: a hook point, or an input of floats such as pixels.
fn point(model: &Model, anatomy: &Anatomy, name: &str) -> Result<HookPoint, RewriteError> {
    let pixels = name.strip_prefix(VALUE_PREFIX).and_then(|name| {
        let mut inputs = anatomy.inputs.iter();
        inputs.find(|i| i.name == name && i.dtype.is_float())
    });
    let Some(input) = pixels else {
        return Ok(anatomy.resolve(model, name)?);
    };
    Ok(HookPoint {
        name: name.to_owned(),
        aliases: Vec::new(),
        layer: None,
        value: input.value,
        layout: Layout::identity(),
        axes: input.axes(),
        dims: input
            .dims
            .iter()
            .map(|d| match d {
                Dim::Fixed(n) => usize::try_from(*n).ok(),
                Dim::Named(_) | Dim::Unknown => None,
            })
            .collect(),
        dtype: input.dtype,
    })
}

/// The output that objectives are made of.
fn scores(anatomy: &Anatomy) -> Result<Scores, RewriteError> {
    let main = anatomy.main_output.and_then(|value| {
        let hook = anatomy.hooks.iter().find(|h| h.value == value);
        hook.map(|h| (value, h))
    });
    let (value, hook) = main.ok_or_else(|| {
        RewriteError::Graph("the model has no logits that could be explained".to_owned())
    })?;
    let ends = matches!(hook.axes.last(), Some(Axis::Label | Axis::Vocab));
    let starts = hook.axes.first() == Some(&Axis::Batch);
    if !starts || !ends || !hook.layout.is_identity() || !hook.dtype.is_float() {
        return Err(RewriteError::Graph(
            "the model's main output holds no scores of labels".to_owned(),
        ));
    }
    Ok(Scores {
        value,
        rank: hook.axes.len(),
        dtype: hook.dtype,
    })
}

/// A hook point that objectives are made of.
fn inside(model: &Model, anatomy: &Anatomy, name: &str) -> Result<Scores, RewriteError> {
    let hook = anatomy.resolve(model, name)?;
    let fits = matches!(hook.axes[..], [Axis::Batch, Axis::Pos, _]) && hook.layout.is_identity();
    if !fits || !hook.dtype.is_float() {
        return Err(RewriteError::Graph(format!(
            "\"{name}\" does not lie in the graph as batch, position and one axis more, as a number to explain must"
        )));
    }
    Ok(Scores {
        value: hook.value,
        rank: 3,
        dtype: hook.dtype,
    })
}

/// What leaves the graph of a gradient.
fn reduced(w: &mut Writer, gradient: ValueId, how: Reduction, by: Option<ValueId>) -> ValueId {
    let product = by.map(|by| w.op("Mul", &[gradient, by]));
    let summed = match how {
        Reduction::Whole => return gradient,
        Reduction::Sum => gradient,
        Reduction::TimesValue | Reduction::Dot => product.unwrap_or(gradient),
        Reduction::AbsoluteSum => w.op("Abs", &[gradient]),
        Reduction::L2 => w.op("Mul", &[gradient, gradient]),
    };
    let sum = w.reduce("ReduceSum", summed, &[-1], false);
    if how == Reduction::L2 {
        return w.op("Sqrt", &[sum]);
    }
    sum
}
