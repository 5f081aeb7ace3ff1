//! Where gradients are taken: a hook point that is moved, or the input of a model of images.
//!
//! Every variation of a site is `scale * x + shift`, so that points of a path, noise and steps of differences are the same thing.

use std::{collections::BTreeMap, ops::Range};

use super::baseline::{Compared, EMBED, float_input, moved, named, no_hook};
use crate::{
    engine::{EngineError, NamedTensor},
    ipc::{
        info::{Axis, ModelInfo},
        spec::{Reduction, Rules, VALUE_PREFIX},
    },
    methods::subject::{Show, Subject, floats},
    tensor::DType,
};

/// A site and what stands there.
#[derive(Clone, Debug)]
pub(super) struct Site {
    /// Hook point, or `value:INPUT`.
    pub(super) name: String,
    /// Units: positions, or numbers of an image.
    pub(super) units: usize,
    /// Numbers of each unit.
    pub(super) width: usize,
    /// What stands there: `[unit, width]`.
    pub(super) x: Vec<f32>,
    dtype: DType,
    /// Extents of an input of floats; empty for a hook point.
    input: Vec<usize>,
    /// What every variation begins with: `x` is moved by it.
    nudge: Option<Vec<f32>>,
}

/// A variation: `scale * x + shift`.
#[derive(Clone, Debug)]
pub(super) struct Move {
    pub(super) scale: f32,
    pub(super) shift: Vec<f32>,
    /// Along which the gradient is taken, for [`How::Along`].
    pub(super) direction: Vec<f32>,
}

/// How the gradient of a unit becomes one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    AbsoluteSum,
    L2,
    Sum,
    /// `sum g (scale x + shift)`
    TimesValue,
    /// The same with relevance in the place of the gradient.
    Relevance,
    /// `sum g direction`
    Along,
}

impl Site {
    /// Finds the site and what stands there. Without a name: the token embedding, or the input of floats.
    ///
    /// # Errors
    /// [`EngineError::FailedPrecondition`] for a hook point that the model does not have.
    pub(super) async fn open(
        subject: &mut Subject,
        name: Option<&str>,
    ) -> Result<Self, EngineError> {
        let mut site = if name.is_none() && subject.ids_input().is_none() {
            let (input, tensor) = float_input(subject)?;
            let x = tensor.to_f32().map_err(EngineError::internal)?.into_owned();
            Self {
                name: format!("{VALUE_PREFIX}{}", input.name),
                units: x.len(),
                width: 1,
                x,
                dtype: input.dtype,
                input: tensor.shape().to_vec(),
                nudge: None,
            }
        } else {
            let name = name.unwrap_or(EMBED);
            let info = subject.info();
            let hook = info.hook(name).ok_or_else(|| no_hook(info, name))?;
            let (name, dtype) = (hook.name.clone(), hook.dtype);
            let [Axis::Batch, Axis::Pos, _] = hook.axes[..] else {
                let axes: Vec<&str> = hook.axes.iter().map(Axis::name).collect();
                return Err(EngineError::invalid(
                    "site",
                    format!(
                        "\"{name}\" has the axes {}: a site has batch, position and one more",
                        axes.join(", ")
                    ),
                ));
            };
            let (units, x) = capture(subject, &name, None).await?;
            Self {
                units,
                width: x.len() / units.max(1),
                x,
                name,
                dtype,
                input: Vec::new(),
                nudge: None,
            }
        };
        if let Some(nudge) = &subject.nudge {
            if nudge.len() != site.x.len() {
                return Err(EngineError::internal(
                    "a nudge of another size than its site",
                ));
            }
            for (x, n) in site.x.iter_mut().zip(nudge) {
                *x += n;
            }
            site.nudge = Some(nudge.clone());
        }
        Ok(site)
    }

    /// Whether it is the input of a model that takes no tokens.
    pub(super) fn is_input(&self) -> bool {
        !self.input.is_empty()
    }

    /// What stands there for the baseline.
    pub(super) async fn baseline(
        &self,
        subject: &mut Subject,
        compared: &Compared,
    ) -> Result<Vec<f32>, EngineError> {
        if self.is_input() {
            let inputs = compared.inputs(subject.info(), 0..1, |_, _| true)?;
            let tensor = &inputs
                .first()
                .ok_or_else(|| EngineError::internal("a baseline without an input"))?
                .tensor;
            return Ok(tensor.to_f32().map_err(EngineError::internal)?.into_owned());
        }
        let (_, x) = capture(subject, &self.name, Some(compared)).await?;
        Ok(x)
    }

    /// A variation that changes nothing.
    pub(super) fn rest(&self) -> Move {
        Move {
            scale: 1.0,
            shift: vec![0.0; self.x.len()],
            direction: Vec::new(),
        }
    }

    /// A point of the way from a baseline to what stands there.
    pub(super) fn on_path(&self, baseline: &[f32], alpha: f64) -> Move {
        #[allow(clippy::cast_possible_truncation)] // a place in single precision
        let (there, rest) = (alpha as f32, (1.0 - alpha) as f32);
        Move {
            scale: there,
            shift: baseline.iter().map(|b| rest * b).collect(),
            direction: Vec::new(),
        }
    }

    /// About what the inputs of a row weigh.
    pub(super) fn row_bytes(&self) -> usize {
        2 * self.x.len() * size_of::<f32>()
    }

    /// What rows need shown moved, beside what is asked of them.
    pub(super) fn show(&self, show: Show) -> Show {
        if self.is_input() {
            return show;
        }
        show.moving(&self.name)
    }

    /// Inputs of rows, one for each variation.
    pub(super) fn inputs(
        &self,
        info: &ModelInfo,
        moves: &[Move],
    ) -> Result<Vec<NamedTensor>, EngineError> {
        let rows = moves.len();
        let nudged = |m: &Move, at: usize| match &self.nudge {
            // The model begins at what stood there before.
            Some(nudge) if !self.is_input() => m.shift[at] + m.scale * nudge[at],
            Some(_) | None => m.shift[at],
        };
        if self.is_input() {
            let numbers: Vec<f32> = moves
                .iter()
                .flat_map(|m| {
                    let at = self.x.iter().zip(&m.shift);
                    at.map(|(x, s)| m.scale * x + s)
                })
                .collect();
            let name = self.name.strip_prefix(VALUE_PREFIX).unwrap_or(&self.name);
            let mut shape = self.input.clone();
            shape[0] = rows;
            return Ok(vec![named(name, shape, &numbers, self.dtype)?]);
        }
        let scale: Vec<f32> = moves.iter().map(|m| m.scale).collect();
        let shift: Vec<f32> = moves
            .iter()
            .flat_map(|m| (0..m.shift.len()).map(move |at| nudged(m, at)))
            .collect();
        let shape = vec![rows, self.units, self.width];
        moved(
            info,
            &self.name,
            (vec![rows, 1, 1], &scale),
            (shape, &shift),
        )
    }

    /// The objective of each of `rows` variations.
    pub(super) async fn values(
        &self,
        subject: &mut Subject,
        rows: usize,
        variation: impl Fn(usize) -> Move,
        each: impl FnMut(&Subject, usize, f64),
    ) -> Result<(), EngineError> {
        let info = subject.handle.info().clone();
        let show = self.show(Show::objective());
        let inputs = |range: Range<usize>| {
            let moves: Vec<Move> = range.map(&variation).collect();
            self.inputs(&info, &moves)
        };
        subject
            .values(&show, (rows, self.row_bytes()), inputs, each)
            .await
    }

    /// The gradient of the objective at each of `rows` variations, one number for each unit, and the objective itself.
    pub(super) async fn gradients(
        &self,
        subject: &mut Subject,
        (rows, how): (usize, How),
        variation: impl Fn(usize) -> Move,
        mut each: impl FnMut(&Subject, usize, &[f64], f64),
    ) -> Result<(), EngineError> {
        let reduction = match how {
            _ if self.is_input() => Reduction::Whole,
            How::AbsoluteSum => Reduction::AbsoluteSum,
            How::L2 => Reduction::L2,
            How::Sum => Reduction::Sum,
            How::TimesValue | How::Relevance => Reduction::TimesValue,
            How::Along => Reduction::Dot,
        };
        let show = self.show(Show {
            objective: true,
            points: BTreeMap::from([(self.name.clone(), reduction)]),
            rules: if how == How::Relevance {
                Rules::AttnLrp
            } else {
                Rules::Gradient
            },
            ..Show::default()
        });
        let info = subject.handle.info().clone();
        let inputs = |range: Range<usize>| {
            let moves: Vec<Move> = range.map(&variation).collect();
            let mut inputs = self.inputs(&info, &moves)?;
            if reduction == Reduction::Dot {
                let direction: Vec<f32> = moves.iter().flat_map(|m| m.direction.clone()).collect();
                let shape = vec![moves.len(), self.units, self.width];
                let name = format!("direction:{}", self.name);
                inputs.push(named(&name, shape, &direction, self.dtype)?);
            }
            Ok(inputs)
        };
        subject
            .run(
                &show,
                (rows, self.row_bytes()),
                inputs,
                |subject, range, tensors| {
                    let (values, gradients) = (floats(tensors, 0)?, floats(tensors, 1)?);
                    let size = gradients.len() / range.len().max(1);
                    for ((row, gradient), value) in
                        range.zip(gradients.chunks_exact(size.max(1))).zip(values)
                    {
                        let numbers: Vec<f64> = if self.is_input() {
                            let variation = variation(row);
                            self.reduced(how, gradient, &variation)
                        } else {
                            gradient.iter().map(|g| f64::from(*g)).collect()
                        };
                        each(subject, row, &numbers, f64::from(value));
                    }
                    Ok(())
                },
            )
            .await
    }

    /// What the graph does for hook points, for an input: units are single numbers.
    fn reduced(&self, how: How, gradient: &[f32], variation: &Move) -> Vec<f64> {
        let at = |u: usize| match how {
            How::AbsoluteSum | How::L2 => f64::from(gradient[u].abs()),
            How::Sum => f64::from(gradient[u]),
            How::TimesValue | How::Relevance => {
                f64::from(gradient[u]) * f64::from(variation.scale * self.x[u] + variation.shift[u])
            }
            How::Along => f64::from(gradient[u]) * f64::from(variation.direction[u]),
        };
        (0..gradient.len().min(self.units)).map(at).collect()
    }
}

/// What stands at a hook point, for the row or for its baseline: how many positions, and `[position, width]`.
async fn capture(
    subject: &mut Subject,
    name: &str,
    compared: Option<&Compared>,
) -> Result<(usize, Vec<f32>), EngineError> {
    let mut show = Show {
        expose: [name.to_owned()].into(),
        ..Show::default()
    };
    let mut inputs = Vec::new();
    if let Some(compared) = compared {
        show = compared.show(show);
        inputs = compared.inputs(subject.info(), 0..1, |_, _| true)?;
    }
    let mut found = None;
    subject
        .run(
            &show,
            (1, 1),
            |_| Ok(inputs.clone()),
            |_, _, tensors| {
                let units = tensors
                    .first()
                    .and_then(|t| t.shape().get(t.shape().len().checked_sub(2)?).copied());
                found = Some((units.unwrap_or_default(), floats(tensors, 0)?));
                Ok(())
            },
        )
        .await?;
    found.ok_or_else(|| EngineError::internal("a row ended without its hook point"))
}
