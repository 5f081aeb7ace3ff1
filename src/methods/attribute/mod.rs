//! Attribution: how much does each part of the input contribute to a number that the model computes?
//!
//! ```text
//!   target ──▶ objective F          baseline ──▶ what the input is compared with
//!                  │                    │
//!                  ▼                    ▼
//!   method ──▶ rows: variations of the input ──▶ F, or its gradient ──▶ scores, with the evidence for them
//! ```
//!
//! Two steps, as for captures: [`start`] checks everything, runs the input once and says what the rest will take; [`Started::run`]
//! does it, and tells how far it is through a watch that keeps the latest partial answer only.
//!
//! The parts: [`target`] and [`baseline`] make the question exact; [`features`] says what gets a score; `subject` runs rows, `site` moves
//! a hook point, `game` takes features away. Each method is a file on top of these, with its options, its defaults and its source.

pub mod ablation;
pub mod attention;
pub mod baseline;
pub mod conductance;
pub mod draw;
pub mod evaluate;
pub mod features;
pub mod finite_difference;
mod game;
pub mod gradient;
pub mod integrated;
pub mod kernel_shap;
pub mod lime;
pub mod occlusion;
pub mod quadrature;
pub mod regression;
pub mod shapley;
mod site;
pub mod smooth;

pub use baseline::Baseline;
pub use conductance::Conductance;
pub use evaluate::{Evaluated, Evaluation};
pub use features::{Features, Grouping};
pub use finite_difference::{Directions, FiniteDifference, Scheme};
pub use gradient::{AttnLrp, InputXGradient, Norm, Saliency};
pub use integrated::IntegratedGradients;
pub use kernel_shap::{KernelShap, KernelShapVariant};
pub use lime::{Lime, LimeVariant};
pub use occlusion::Occlusion;
pub use shapley::ShapleySampling;
pub use smooth::{GradientShap, SmoothGrad, Smoothed};

use tokio::sync::watch;

use self::baseline::Compared;
use super::{
    input::{self, Input, Token},
    subject::{Partial, Show, Spent, Subject},
    target::{self, Target},
};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle},
    tensor::{DType, Tensor},
};

/// A question, validated as far as it can be without the model.
#[derive(Clone, Debug)]
pub struct Question {
    /// What the model is run on.
    pub input: Input,
    /// The number that is explained.
    pub target: Target,
    /// How.
    pub method: Method,
    /// What the input is compared with.
    pub baseline: Baseline,
    /// What gets a score each.
    pub grouping: Grouping,
    /// Where random draws begin.
    pub seed: u64,
}

/// The methods.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// See [`integrated`].
    IntegratedGradients(IntegratedGradients),
    /// See [`finite_difference`].
    FiniteDifference(FiniteDifference),
    /// See [`gradient`].
    Saliency(Saliency),
    /// See [`gradient`].
    InputXGradient(InputXGradient),
    /// See [`gradient`].
    AttnLrp(AttnLrp),
    /// See [`smooth`].
    SmoothGrad(SmoothGrad),
    /// See [`smooth`].
    GradientShap(GradientShap),
    /// See [`conductance`].
    Conductance(Conductance),
    /// See [`ablation`].
    Ablation,
    /// See [`ablation`].
    LeaveOneOut,
    /// See [`occlusion`].
    Occlusion(Occlusion),
    /// See [`shapley`].
    ShapleySampling(ShapleySampling),
    /// See [`mod@kernel_shap`].
    KernelShap(KernelShap),
    /// See [`lime`].
    Lime(Lime),
    /// See [`attention`].
    Attention(attention::Kind, Option<i32>),
}

impl Default for Method {
    fn default() -> Self {
        Method::IntegratedGradients(IntegratedGradients::default())
    }
}

impl Method {
    /// Its name on the wire.
    pub const fn name(&self) -> &'static str {
        match self {
            Method::IntegratedGradients(_) => "integrated_gradients",
            Method::FiniteDifference(_) => "finite_difference",
            Method::Saliency(_) => "saliency",
            Method::InputXGradient(_) => "input_x_gradient",
            Method::AttnLrp(_) => "attn_lrp",
            Method::SmoothGrad(_) => "smooth_grad",
            Method::GradientShap(_) => "gradient_shap",
            Method::Conductance(_) => "conductance",
            Method::Ablation => "ablation",
            Method::LeaveOneOut => "leave_one_out",
            Method::Occlusion(_) => "occlusion",
            Method::ShapleySampling(_) => "shapley_sampling",
            Method::KernelShap(_) => "kernel_shap",
            Method::Lime(_) => "lime",
            Method::Attention(kind, _) => kind.name(),
        }
    }

    /// Whether it looks at the gradient at the token embedding, so that moving the embedding a little moves the explanation.
    fn looks_at_embedding(&self) -> bool {
        match self {
            Method::IntegratedGradients(o) => o.site.is_none(),
            Method::FiniteDifference(o) => o.site.is_none(),
            Method::Saliency(o) => o.site.is_none(),
            Method::InputXGradient(o) => o.site.is_none(),
            Method::AttnLrp(o) => o.site.is_none(),
            Method::SmoothGrad(o) => o.site.is_none(),
            Method::GradientShap(o) => o.site.is_none(),
            Method::Conductance(_)
            | Method::Ablation
            | Method::LeaveOneOut
            | Method::Occlusion(_)
            | Method::ShapleySampling(_)
            | Method::KernelShap(_)
            | Method::Lime(_)
            | Method::Attention(..) => false,
        }
    }

    /// Whether the input is compared with a baseline.
    fn compares(&self) -> bool {
        match self {
            Method::Saliency(_)
            | Method::InputXGradient(_)
            | Method::AttnLrp(_)
            | Method::SmoothGrad(_)
            | Method::LeaveOneOut
            | Method::Attention(..) => false,
            Method::FiniteDifference(o) => o.directions == Directions::Baseline,
            Method::IntegratedGradients(_)
            | Method::GradientShap(_)
            | Method::Conductance(_)
            | Method::Ablation
            | Method::Occlusion(_)
            | Method::ShapleySampling(_)
            | Method::KernelShap(_)
            | Method::Lime(_) => true,
        }
    }

    /// Rows that it will run for so many features that move.
    fn cost(&self, features: usize, extent: Extent) -> Cost {
        match self {
            Method::IntegratedGradients(o) => o.cost(),
            Method::FiniteDifference(o) => o.cost(features, extent.width),
            Method::Saliency(_) | Method::InputXGradient(_) | Method::AttnLrp(_) => {
                Cost::gradient(1)
            }
            Method::SmoothGrad(o) => Cost::gradient(o.samples),
            Method::GradientShap(o) => Cost::gradient(o.samples),
            Method::Conductance(o) => Cost::gradient(o.steps + 1),
            Method::Ablation => Cost::forward(features),
            Method::LeaveOneOut => Cost::forward(features).at_most(),
            Method::Occlusion(o) => o.cost(features, extent),
            Method::ShapleySampling(o) => o.cost(features),
            Method::KernelShap(o) => Cost::forward(o.rows(features)),
            Method::Lime(o) => Cost::forward(o.samples()),
            Method::Attention(kind, _) => kind.cost(extent),
        }
    }
}

/// Sizes that costs depend on.
#[derive(Clone, Copy, Debug)]
struct Extent {
    units: usize,
    width: usize,
    layers: usize,
    /// Edges of an image, if it is one.
    image: Option<[usize; 3]>,
}

/// What an explanation takes, beside the row that is run to find the target and the two ends of a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Rows run forward.
    pub forward_rows: usize,
    /// Rows run forward and backward.
    pub gradient_rows: usize,
    /// Whether these are bounds.
    pub at_most: bool,
}

impl Cost {
    fn forward(rows: usize) -> Self {
        Self {
            forward_rows: rows,
            ..Self::default()
        }
    }

    fn gradient(rows: usize) -> Self {
        Self {
            gradient_rows: rows,
            ..Self::default()
        }
    }

    fn at_most(self) -> Self {
        Self {
            at_most: true,
            ..self
        }
    }

    /// Both kinds.
    pub fn rows(&self) -> usize {
        self.forward_rows.saturating_add(self.gradient_rows)
    }
}

/// What an explanation may cost, and how urgent it is.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Most rows.
    pub max_rows: usize,
    /// How urgent.
    pub lane: Lane,
}

/// An explanation whose question is exact, and which has not begun.
#[derive(Debug)]
pub struct Started {
    /// Tokens of the row, those of a continuation included.
    pub tokens: Vec<Token>,
    /// The text and its pair, where they were given.
    pub texts: Vec<String>,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// What gets a score each.
    pub features: Features,
    /// The target, found.
    pub objective: target::Objective,
    /// F of the input.
    pub value: f64,
    /// What the rest will take.
    pub cost: Cost,
    /// What the input is compared with; empty for methods that compare with nothing.
    pub baseline: &'static str,
    /// Where the method works.
    pub site: String,
    method: Method,
    run: Explanation,
}

/// What a method works with.
#[derive(Debug)]
struct Explanation {
    subject: Subject,
    compared: Option<Compared>,
    features: Features,
    value: f64,
    seed: u64,
}

impl Explanation {
    /// What the input is compared with.
    fn compared(&self) -> Result<Compared, EngineError> {
        self.compared
            .clone()
            .ok_or_else(|| EngineError::internal("a method that compares has no baseline"))
    }

    /// What gets a score each of so many units: inside of a model that takes no tokens, positions do.
    fn features_of(&self, units: usize) -> Features {
        let inside = self.subject.ids_input().is_none() && self.features.len() != units;
        if inside {
            return Features::each(units);
        }
        self.features.clone()
    }
}

/// Scores, with the evidence for them.
#[derive(Clone, Debug, Default)]
pub struct Attributed {
    /// Name of the method.
    pub method: &'static str,
    /// One for each feature.
    pub scores: Vec<f64>,
    /// How wrong each may be, where the method can tell.
    pub errors: Option<Vec<f64>>,
    /// What kind of estimate that is.
    pub error_kind: &'static str,
    /// F of the input.
    pub value: f64,
    /// F of the baseline.
    pub baseline_value: Option<f64>,
    /// `sum(scores of all units) - (F(x) - F(x'))`, for methods that promise it to be zero.
    pub delta: Option<f64>,
    /// Where random draws began, for methods that draw.
    pub seed: Option<u64>,
    /// Where the method worked.
    pub site: String,
    /// Points of a path.
    pub steps: Option<usize>,
    /// By enumeration of everything that could be drawn.
    pub exact: bool,
    /// Which convention the numbers follow.
    pub convention: String,
    /// Type of the arithmetic in the model.
    pub precision: String,
    /// Extents of the scores: one for features, those of the input for images.
    pub shape: Vec<usize>,
    /// What the method brings along.
    pub extras: Vec<Extra>,
    /// What the caller should know.
    pub notes: Vec<String>,
    /// What was spent, the first row included.
    pub spent: Spent,
}

/// A tensor that a method brings along.
#[derive(Clone, Debug)]
pub struct Extra {
    /// Its name.
    pub name: &'static str,
    /// Meaning of its axes.
    pub axes: Vec<&'static str>,
    /// The tensor.
    pub tensor: Tensor,
}

impl Attributed {
    /// `|delta| / |F(x) - F(x')|`; none where F does not change.
    pub fn residual_ratio(&self) -> Option<f64> {
        let change = (self.value - self.baseline_value?).abs();
        (change > 0.0).then_some(self.delta?.abs() / change)
    }

    /// The greatest error.
    pub fn error(&self) -> Option<f64> {
        let errors = self.errors.as_ref()?;
        Some(errors.iter().copied().fold(0.0, f64::max))
    }

    /// Meaning of the axes of the scores.
    pub fn axes(&self, features: &Features) -> Vec<String> {
        match (self.shape.len(), features.listed().is_empty()) {
            (1, true) => vec!["pos".to_owned()],
            (1, false) => vec!["feature".to_owned()],
            (3, _) => ["channel", "height", "width"].map(str::to_owned).to_vec(),
            (rank, _) => (0..rank).map(|at| format!("axis_{at}")).collect(),
        }
    }
}

/// Makes a question exact: finds the row, the target and the baseline, runs the row once.
///
/// # Errors
/// With paths of fields that begin at the request. [`EngineError::ResourceExhausted`] when it would take more rows than `terms` allow.
pub async fn start(
    handle: &ModelHandle,
    question: Question,
    terms: Terms,
    ctx: &Ctx,
) -> Result<Started, EngineError> {
    let Question {
        input,
        target,
        method,
        baseline,
        grouping,
        seed,
    } = question;
    let row_field = input::field_of(&input);
    let texts = match &input {
        Input::Text { text, .. } => std::iter::once(text.text.clone())
            .chain(text.pair.clone())
            .collect(),
        Input::Tokens { .. } | Input::Tensors(_) => Vec::new(),
    };
    let mut prepared = input::prepare(handle, input, ctx)
        .await
        .map_err(|e| e.beneath("input"))?;
    let objective = target::resolve(handle, &target, &mut prepared, terms.lane, ctx)
        .await
        .map_err(|e| e.beneath("target"))?;
    let input::Prepared {
        group,
        tokens,
        truncated,
        tokenize,
    } = prepared;
    let mut subject = Subject::new(
        handle.clone(),
        (group, tokens),
        objective,
        (terms.lane, ctx.clone()),
    );
    subject.spent.timings.tokenize = tokenize;
    let features = if subject.ids_input().is_some() {
        Features::of(&grouping, &subject.tokens, subject.objective.asked)
            .map_err(|e| e.beneath("features"))?
    } else {
        if grouping != Grouping::Tokens {
            return Err(EngineError::invalid(
                "features.grouping",
                "the model takes no tokens: leave this out",
            ));
        }
        let (_, tensor) = baseline::float_input(&subject)?;
        Features::each(tensor.elements())
    };
    let mut value = f64::NAN;
    subject
        .values(
            &Show::objective(),
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, v| value = v,
        )
        .await
        .map_err(|e| input::at_field(e, row_field))?;
    if !value.is_finite() {
        return Err(EngineError::precondition(format!(
            "the target's value for this input is {value}: there is nothing to attribute"
        )));
    }
    let compared = if method.compares() {
        let found = Compared::find(&baseline, &mut subject).await;
        Some(found.map_err(|e| e.beneath("baseline"))?)
    } else {
        None
    };
    let extent = extent(&subject)?;
    let moves = |unit: &usize| match &compared {
        Some(compared) => compared.replaces(*unit),
        None => true,
    };
    let moved = features
        .units()
        .iter()
        .filter(|units| units.iter().any(moves));
    let cost = method.cost(moved.count(), extent);
    if cost.rows() > terms.max_rows {
        return Err(EngineError::exhausted(
            format!(
                "the explanation would take {} rows, more than the limit of {}: \
                 ask for fewer steps or samples, or group the tokens",
                cost.rows(),
                terms.max_rows
            ),
            None,
        ));
    }
    Ok(Started {
        tokens: subject.tokens.clone(),
        texts,
        truncated,
        objective: subject.objective.clone(),
        value,
        cost,
        baseline: compared.as_ref().map_or("", |c| c.name),
        site: site_of(&method, &subject),
        method,
        features: features.clone(),
        run: Explanation {
            subject,
            compared,
            features,
            value,
            seed,
        },
    })
}

impl Started {
    /// The model that answers.
    pub fn handle(&self) -> &ModelHandle {
        &self.run.subject.handle
    }

    /// The method's name.
    pub fn method(&self) -> &'static str {
        self.method.name()
    }

    /// How far it is, once it runs. Keeps the latest only.
    pub fn watch(&self) -> watch::Receiver<Partial> {
        self.run.subject.watch()
    }

    /// What was spent so far.
    pub fn spent(&self) -> Spent {
        self.run.subject.spent
    }

    /// Does it.
    ///
    /// # Errors
    /// Those of the runs, and [`EngineError::FailedPrecondition`] for what the model lacks.
    pub async fn run(self) -> Result<Attributed, EngineError> {
        let mut explanation = self.run;
        explanation.subject.plan(self.cost.rows());
        explain(&self.method, &mut explanation).await
    }
}

/// Runs a method.
async fn explain(method: &Method, e: &mut Explanation) -> Result<Attributed, EngineError> {
    let found = match method {
        Method::IntegratedGradients(options) => integrated::run(options, e).await,
        Method::FiniteDifference(options) => finite_difference::run(options, e).await,
        Method::Saliency(options) => gradient::saliency(options, e).await,
        Method::InputXGradient(options) => gradient::input_x_gradient(options, e).await,
        Method::AttnLrp(options) => gradient::attn_lrp(options, e).await,
        Method::SmoothGrad(options) => smooth::smooth_grad(options, e).await,
        Method::GradientShap(options) => smooth::gradient_shap(options, e).await,
        Method::Conductance(options) => conductance::run(options, e).await,
        Method::Ablation => ablation::run(e).await,
        Method::LeaveOneOut => ablation::leave_one_out(e).await,
        Method::Occlusion(options) => occlusion::run(options, e).await,
        Method::ShapleySampling(options) => shapley::run(options, e).await,
        Method::KernelShap(options) => kernel_shap::run(options, e).await,
        Method::Lime(options) => lime::run(options, e).await,
        Method::Attention(kind, position) => attention::run(*kind, *position, e).await,
    };
    let found = found.map_err(|error| beneath_method(error, method))?;
    if let Some(at) = found.scores.iter().position(|s| !s.is_finite()) {
        return Err(EngineError::precondition(format!(
            "the score of feature {at} is {}: the model's arithmetic does not bear this method",
            found.scores[at]
        )));
    }
    let shape = match image_of(&e.subject) {
        Some(shape) if found.scores.len() == shape.iter().product::<usize>() => shape,
        Some(_) | None => vec![found.scores.len()],
    };
    Ok(Attributed {
        method: method.name(),
        value: e.value,
        site: if found.site.is_empty() {
            site_of(method, &e.subject)
        } else {
            found.site.clone()
        },
        precision: precision(&e.subject).to_string(),
        shape,
        spent: e.subject.spent,
        ..found
    })
}

/// Extents of the input without the batch, for models that take no tokens.
fn image_of(subject: &Subject) -> Option<Vec<usize>> {
    if subject.ids_input().is_some() {
        return None;
    }
    let (_, tensor) = baseline::float_input(subject).ok()?;
    Some(tensor.shape()[1..].to_vec())
}

fn extent(subject: &Subject) -> Result<Extent, EngineError> {
    let info = subject.info();
    let image = image_of(subject);
    Ok(Extent {
        units: if image.is_some() {
            baseline::float_input(subject)?.1.elements()
        } else {
            subject.length()
        },
        width: info.dims.d_model.unwrap_or(1),
        layers: info.dims.layers,
        image: image.and_then(|shape| shape.try_into().ok()),
    })
}

/// Where a method works, before it has begun.
fn site_of(method: &Method, subject: &Subject) -> String {
    let site = match method {
        Method::IntegratedGradients(o) => &o.site,
        Method::FiniteDifference(o) => &o.site,
        Method::Saliency(o) => &o.site,
        Method::InputXGradient(o) => &o.site,
        Method::AttnLrp(o) => &o.site,
        Method::SmoothGrad(o) => &o.site,
        Method::GradientShap(o) => &o.site,
        Method::Conductance(o) => return o.layer.clone(),
        Method::Ablation
        | Method::LeaveOneOut
        | Method::Occlusion(_)
        | Method::ShapleySampling(_)
        | Method::KernelShap(_)
        | Method::Lime(_) => {
            return match subject.ids_input() {
                Some(input) => input.name.clone(),
                None => {
                    baseline::float_input(subject).map_or(String::new(), |(i, _)| i.name.clone())
                }
            };
        }
        Method::Attention(kind, _) => return kind.site().to_owned(),
    };
    match (site, baseline::float_input(subject)) {
        (Some(site), _) => site.clone(),
        (None, Ok((input, _))) if subject.ids_input().is_none() => input.name.clone(),
        (None, _) => baseline::EMBED.to_owned(),
    }
}

fn precision(subject: &Subject) -> DType {
    let info = subject.info();
    info.output(&info.main_output)
        .map_or(DType::F32, |o| o.dtype)
}

/// What a method says of its options; what it says of the input or of rows stays as it is.
fn beneath_method(error: EngineError, method: &Method) -> EngineError {
    let of_options = match &error {
        EngineError::InvalidArgument { field, .. } => {
            !field.starts_with("input") && !field.starts_with("groups")
        }
        EngineError::NotFound { .. }
        | EngineError::AlreadyExists { .. }
        | EngineError::FailedPrecondition { .. }
        | EngineError::Storage { .. }
        | EngineError::ResourceExhausted { .. }
        | EngineError::Unavailable { .. }
        | EngineError::DeadlineExceeded
        | EngineError::Cancelled
        | EngineError::DataLoss { .. }
        | EngineError::WorkerDied { .. }
        | EngineError::Internal { .. } => false,
    };
    if of_options {
        error.beneath(&format!("method.{}", method.name()))
    } else {
        error
    }
}
