//! Attribution requests, validated once.

use crate::{
    engine::EngineError,
    ipc::spec::Quantity,
    methods::{
        attribute::{
            AttnLrp, Baseline, Conductance, Directions, Evaluation, FiniteDifference, GradientShap,
            Grouping, InputXGradient, IntegratedGradients, KernelShap, KernelShapVariant, Lime,
            LimeVariant, Method, Norm, Occlusion, Question, Saliency, Scheme, ShapleySampling,
            SmoothGrad, Smoothed, attention, baseline::Kind, features::Span,
            quadrature::Quadrature,
        },
        target::{Choice, Continuation, Readout, Target, Terms, What},
    },
    service::{from_proto, from_proto::or, wire::introspect as pb},
};

/// Most points of a path, most samples.
const MOST_STEPS: u32 = 4096;
/// Most permutations and coalitions.
const MOST_COALITIONS: u32 = 65_536;
/// Most spans.
const MOST_SPANS: usize = 4096;
/// Most methods of an evaluation.
const MOST_METHODS: usize = 16;
/// Most perturbed inputs of a sensitivity.
const MOST_SENSITIVITY: u32 = 256;
/// Intervals that adapting begins with, unless said.
const FIRST_STEPS: u32 = 4;
/// Most points when adapting, unless said.
const MOST_ADAPTED: u32 = 512;
/// Perturbations of an infidelity, unless said.
const INFIDELITY: u32 = 64;
/// Perturbed inputs of a sensitivity, unless said.
const SENSITIVITY: u32 = 10;

type Result<T> = std::result::Result<T, EngineError>;

/// The model that is asked, and the question. `readout` is what its target names, when that is a probe.
pub(super) fn question(
    request: pb::AttributeRequest,
    readout: Option<Readout>,
) -> Result<(String, Question)> {
    let model = from_proto::named(request.model)?;
    Ok((
        model,
        Question {
            input: from_proto::required_input(request.input)?,
            target: target(request.target.unwrap_or_default(), readout)
                .map_err(|e| e.beneath("target"))?,
            method: method(request.method.unwrap_or_default()).map_err(|e| e.beneath("method"))?,
            baseline: baseline(request.baseline.unwrap_or_default())
                .map_err(|e| e.beneath("baseline"))?,
            grouping: grouping(request.features.unwrap_or_default())
                .map_err(|e| e.beneath("features"))?,
            seed: request.seed,
        },
    ))
}

/// The model that is asked, and what to evaluate.
pub(super) fn evaluation(
    request: pb::EvaluateRequest,
    readout: Option<Readout>,
) -> Result<(String, Evaluation)> {
    let asked = request
        .request
        .ok_or_else(|| EngineError::invalid("request", "is missing: say what to explain"))?;
    let (model, question) = question(asked, readout).map_err(|e| e.beneath("request"))?;
    if request.methods.len() > MOST_METHODS {
        return Err(EngineError::invalid(
            "methods",
            format!(
                "has {} entries: give at most {MOST_METHODS}",
                request.methods.len()
            ),
        ));
    }
    let mut methods = Vec::with_capacity(request.methods.len());
    for (at, given) in request.methods.into_iter().enumerate() {
        methods.push(method(given).map_err(|e| e.beneath(&format!("methods[{at}]")))?);
    }
    if methods.is_empty() {
        methods.push(question.method.clone());
    }
    let sensitivity = bounded(
        or(request.sensitivity_samples, SENSITIVITY),
        MOST_SENSITIVITY,
        "sensitivity_samples",
    )?;
    Ok((
        model,
        Evaluation {
            question,
            methods,
            infidelity_samples: bounded(
                or(request.infidelity_samples, INFIDELITY),
                MOST_STEPS,
                "infidelity_samples",
            )?,
            sensitivity_samples: if request.skip_sensitivity {
                0
            } else {
                sensitivity
            },
        },
    ))
}

fn target(given: pb::Target, readout: Option<Readout>) -> Result<Target> {
    let quantity = match known::<pb::Quantity>(given.quantity, "quantity")? {
        pb::Quantity::Unspecified => None,
        pb::Quantity::Logit => Some(Quantity::Logit),
        pb::Quantity::LogProbability => Some(Quantity::LogProbability),
        pb::Quantity::Probability => Some(Quantity::Probability),
        pb::Quantity::Readout | pb::Quantity::Divergence => {
            return Err(EngineError::invalid(
                "quantity",
                "QUANTITY_READOUT and QUANTITY_DIVERGENCE are what answers say: name the probe or the divergence as target and leave this out",
            ));
        }
    };
    let of = match given.of {
        None => Terms::default(),
        Some(pb::target::Of::Choice(c)) => Terms::Choice(choice(c)),
        Some(pb::target::Of::Contrast(c)) => {
            let side = |side: Option<pb::Choice>, field: &str| {
                side.ok_or_else(|| {
                    EngineError::invalid(
                        format!("contrast.{field}"),
                        "is missing: name a class or token",
                    )
                })
            };
            Terms::Contrast(
                choice(side(c.choice, "choice")?),
                choice(side(c.against, "against")?),
            )
        }
        Some(pb::target::Of::Continuation(c)) => Terms::Continuation(match c.what {
            Some(pb::continuation::What::Text(text)) => Continuation::Text(text),
            Some(pb::continuation::What::Tokens(tokens)) => Continuation::Ids(tokens.ids),
            None => {
                return Err(EngineError::invalid(
                    "continuation",
                    "is empty: give a text or tokens",
                ));
            }
        }),
        Some(pb::target::Of::Unit(u)) => Terms::Unit {
            hook: u.hook,
            position: u.position,
            index: u.index,
        },
        Some(pb::target::Of::Divergence(d)) => Terms::Divergence(d.position),
        Some(pb::target::Of::Probe(_)) => {
            Terms::Readout(readout.ok_or_else(|| EngineError::internal("a probe was not read"))?)
        }
    };
    Ok(Target { quantity, of })
}

fn choice(given: pb::Choice) -> Choice {
    Choice {
        what: match given.what {
            None => What::Predicted,
            Some(pb::choice::What::Index(index)) => What::Index(index),
            Some(pb::choice::What::Label(label)) => What::Label(label),
            Some(pb::choice::What::Token(text)) => What::Token(text),
        },
        position: given.position,
    }
}

fn baseline(given: pb::Baseline) -> Result<Baseline> {
    let kind = match given.kind {
        None => Kind::Default,
        Some(pb::baseline::Kind::Constant(constant)) => {
            match known::<pb::Constant>(constant, "constant")? {
                pb::Constant::Unspecified => Kind::Default,
                pb::Constant::Pad => Kind::Pad,
                pb::Constant::Mask => Kind::Mask,
                pb::Constant::Unk => Kind::Unknown,
                pb::Constant::Zero => Kind::Zero,
                pb::Constant::Mean => Kind::Mean,
            }
        }
        Some(pb::baseline::Kind::Text(text)) => Kind::Text(text),
        Some(pb::baseline::Kind::Tokens(tokens)) => Kind::Ids(tokens.ids),
        Some(pb::baseline::Kind::Tensor(tensor)) => {
            Kind::Tensor(from_proto::tensor(tensor, "tensor")?.tensor)
        }
    };
    Ok(Baseline {
        kind,
        replace_special: given.replace_special,
    })
}

fn grouping(given: pb::Features) -> Result<Grouping> {
    let grouping = known::<pb::Grouping>(given.grouping, "grouping")?;
    if grouping != pb::Grouping::Spans && !given.spans.is_empty() {
        return Err(EngineError::invalid(
            "spans",
            "are given but not asked for: set grouping to GROUPING_SPANS",
        ));
    }
    Ok(match grouping {
        pb::Grouping::Unspecified => Grouping::Tokens,
        pb::Grouping::Words => Grouping::Words,
        pb::Grouping::Spans => {
            if given.spans.len() > MOST_SPANS {
                return Err(EngineError::invalid(
                    "spans",
                    format!(
                        "has {} entries: give at most {MOST_SPANS}",
                        given.spans.len()
                    ),
                ));
            }
            let span = |s: pb::Span| Span {
                start: s.start,
                end: s.end,
                sequence: s.sequence,
            };
            Grouping::Spans(given.spans.into_iter().map(span).collect())
        }
    })
}

fn method(given: pb::Method) -> Result<Method> {
    use pb::method::Kind as Given;
    let Some(kind) = given.kind else {
        return Ok(Method::default());
    };
    Ok(match kind {
        Given::IntegratedGradients(o) => {
            let o = integrated(&o).map_err(|e| e.beneath("integrated_gradients"))?;
            Method::IntegratedGradients(o)
        }
        Given::FiniteDifference(o) => {
            let o = finite_difference(&o).map_err(|e| e.beneath("finite_difference"))?;
            Method::FiniteDifference(o)
        }
        Given::Saliency(o) => Method::Saliency(Saliency {
            norm: match known::<pb::Norm>(o.norm, "saliency.norm")? {
                pb::Norm::Unspecified | pb::Norm::L1 => Norm::L1,
                pb::Norm::L2 => Norm::L2,
                pb::Norm::Sum => Norm::Sum,
            },
            site: named(o.site),
        }),
        Given::InputXGradient(o) => Method::InputXGradient(InputXGradient {
            site: named(o.site),
        }),
        Given::AttnLrp(o) => Method::AttnLrp(AttnLrp {
            site: named(o.site),
        }),
        Given::SmoothGrad(o) => Method::SmoothGrad(SmoothGrad {
            samples: bounded(or(o.samples, 25), MOST_STEPS, "smooth_grad.samples")?,
            noise: size(o.noise, "smooth_grad.noise")?.unwrap_or(0.15),
            of: match known::<pb::Smoothed>(o.of, "smooth_grad.of")? {
                pb::Smoothed::Unspecified => Smoothed::Saliency,
                pb::Smoothed::InputXGradient => Smoothed::InputXGradient,
            },
            site: named(o.site),
        }),
        Given::GradientShap(o) => Method::GradientShap(GradientShap {
            samples: bounded(or(o.samples, 25), MOST_STEPS, "gradient_shap.samples")?,
            noise: size(o.noise, "gradient_shap.noise")?.unwrap_or(0.0),
            site: named(o.site),
        }),
        Given::Conductance(o) => Method::Conductance(Conductance {
            layer: named(o.layer).ok_or_else(|| {
                EngineError::invalid(
                    "conductance.layer",
                    "is empty: name a hook point, such as \"blocks.2.hook_resid_post\"",
                )
            })?,
            steps: bounded(or(o.steps, 50), MOST_STEPS, "conductance.steps")?,
            quadrature: quadrature(o.quadrature, "conductance.quadrature")?,
        }),
        Given::Ablation(pb::Ablation {}) => Method::Ablation,
        Given::LeaveOneOut(pb::LeaveOneOut {}) => Method::LeaveOneOut,
        Given::Occlusion(o) => {
            let given = |n: u32| (n > 0).then_some(n as usize);
            if o.window > 0 && o.stride > o.window {
                return Err(EngineError::invalid(
                    "occlusion.stride",
                    format!(
                        "is {}, more than the window of {}: some features would never be covered",
                        o.stride, o.window
                    ),
                ));
            }
            Method::Occlusion(Occlusion {
                window: given(o.window),
                stride: given(o.stride),
            })
        }
        Given::ShapleySampling(o) => Method::ShapleySampling(ShapleySampling {
            permutations: bounded(
                or(o.permutations, 25),
                MOST_COALITIONS,
                "shapley_sampling.permutations",
            )?,
            antithetic: o.antithetic,
        }),
        Given::KernelShap(o) => Method::KernelShap(KernelShap {
            samples: match o.samples {
                0 => None,
                n => Some(bounded(n, MOST_COALITIONS, "kernel_shap.samples")?),
            },
            variant: match known::<pb::KernelShapVariant>(o.variant, "kernel_shap.variant")? {
                pb::KernelShapVariant::Unspecified => KernelShapVariant::Shap,
                pb::KernelShapVariant::Captum => KernelShapVariant::Captum,
            },
        }),
        Given::Lime(o) => Method::Lime(Lime {
            variant: match known::<pb::LimeVariant>(o.variant, "lime.variant")? {
                pb::LimeVariant::Unspecified => LimeVariant::Text,
                pb::LimeVariant::Captum => LimeVariant::Captum,
            },
            samples: match o.samples {
                0 => None,
                n => Some(bounded(n, MOST_COALITIONS, "lime.samples")?),
            },
            kernel_width: size(o.kernel_width, "lime.kernel_width")?,
            alpha: match o.alpha {
                Some(alpha) => Some(size(alpha, "lime.alpha")?.unwrap_or(0.0)),
                None => None,
            },
        }),
        Given::AttentionRollout(o) => Method::Attention(attention::Kind::Rollout, o.position),
        Given::AttentionFlow(o) => Method::Attention(attention::Kind::Flow, o.position),
        Given::GradientAttention(o) => Method::Attention(attention::Kind::Gradient, o.position),
        Given::ValueZeroing(o) => Method::Attention(attention::Kind::ValueZeroing, o.position),
    })
}

fn integrated(o: &pb::IntegratedGradients) -> Result<IntegratedGradients> {
    let tolerance = size(o.tolerance, "tolerance")?;
    if tolerance.is_some() && o.quadrature != 0 {
        return Err(EngineError::invalid(
            "quadrature",
            "cannot be chosen with a tolerance: adapting has a rule of its own",
        ));
    }
    if tolerance.is_none() && o.max_steps != 0 {
        return Err(EngineError::invalid(
            "max_steps",
            "is about adapting: give a tolerance, or leave this out",
        ));
    }
    let default = if tolerance.is_some() { FIRST_STEPS } else { 50 };
    Ok(IntegratedGradients {
        steps: bounded(or(o.steps, default), MOST_STEPS, "steps")?,
        quadrature: quadrature(o.quadrature, "quadrature")?,
        tolerance,
        max_steps: bounded(or(o.max_steps, MOST_ADAPTED), MOST_STEPS, "max_steps")?,
        site: named(o.site.clone()),
    })
}

fn finite_difference(o: &pb::FiniteDifference) -> Result<FiniteDifference> {
    let default = FiniteDifference::default();
    let directions = match known::<pb::Directions>(o.directions, "directions")? {
        pb::Directions::Unspecified => Directions::Baseline,
        pb::Directions::Random => Directions::Random,
        pb::Directions::Dimensions => Directions::Dimensions,
    };
    if directions != Directions::Baseline && o.path_steps > 0 {
        return Err(EngineError::invalid(
            "path_steps",
            "is about directions from the baseline: leave this or the directions out",
        ));
    }
    Ok(FiniteDifference {
        scheme: match known::<pb::Scheme>(o.scheme, "scheme")? {
            pb::Scheme::Unspecified | pb::Scheme::Richardson => Scheme::Richardson,
            pb::Scheme::Forward => Scheme::Forward,
            pb::Scheme::Central => Scheme::Central,
        },
        step: size(o.step, "step")?.unwrap_or(default.step),
        directions,
        samples: bounded(or(o.samples, 16), MOST_STEPS, "samples")?,
        path_steps: bounded(o.path_steps, MOST_STEPS, "path_steps")?,
        site: named(o.site.clone()),
    })
}

fn quadrature(value: i32, field: &str) -> Result<Quadrature> {
    Ok(match known::<pb::Quadrature>(value, field)? {
        pb::Quadrature::Unspecified | pb::Quadrature::GaussLegendre => Quadrature::GaussLegendre,
        pb::Quadrature::RiemannLeft => Quadrature::RiemannLeft,
        pb::Quadrature::RiemannMiddle => Quadrature::RiemannMiddle,
        pb::Quadrature::RiemannRight => Quadrature::RiemannRight,
        pb::Quadrature::Trapezoid => Quadrature::Trapezoid,
        pb::Quadrature::CaptumTrapezoid => Quadrature::CaptumTrapezoid,
    })
}

fn known<T: TryFrom<i32>>(value: i32, field: &str) -> Result<T> {
    T::try_from(value).map_err(|_| from_proto::unknown(field, value))
}

/// A name, unless it is empty.
fn named(name: String) -> Option<String> {
    (!name.is_empty()).then_some(name)
}

/// A number above zero; none for zero, which stands for the default.
fn size(value: f64, field: &str) -> Result<Option<f64>> {
    if !value.is_finite() || value < 0.0 {
        return Err(EngineError::invalid(
            field,
            format!("is {value}: give a number above zero"),
        ));
    }
    Ok((value > 0.0).then_some(value))
}

fn bounded(value: u32, most: u32, field: &str) -> Result<usize> {
    if value > most {
        return Err(EngineError::invalid(
            field,
            format!("is {value}: at most {most}"),
        ));
    }
    Ok(value as usize)
}
