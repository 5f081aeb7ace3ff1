//! The command line's question as a request.

use clap::{Args, ValueEnum};

use crate::{
    cli::error::CliError,
    service::wire::introspect::{self as pb, method::Kind},
};

/// Methods, by their names on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(super) enum Name {
    /// Gradients integrated from the baseline to the input
    #[default]
    IntegratedGradients,
    /// Derivatives from values alone, for every model
    FiniteDifference,
    /// The absolute gradient
    Saliency,
    /// Input times gradient
    InputXGradient,
    /// Relevance, handed down by the rules of AttnLRP
    AttnLrp,
    /// Saliency of noisy copies
    SmoothGrad,
    /// Gradients at random points of the path from the baseline
    GradientShap,
    /// How much flows through a layer (--layer)
    Conductance,
    /// Each feature replaced by the baseline
    Ablation,
    /// Each feature taken out
    LeaveOneOut,
    /// Sliding windows replaced by the baseline
    Occlusion,
    /// Shapley values by sampled permutations
    ShapleySampling,
    /// Shapley values by regression
    KernelShap,
    /// A local linear model
    Lime,
    /// Attention, multiplied up
    AttentionRollout,
    /// Attention, as a flow
    AttentionFlow,
    /// Gradient times attention
    GradientAttention,
    /// What zeroing the values of each token changes
    ValueZeroing,
}

/// How to explain.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Method")]
pub(super) struct MethodArgs {
    /// Method
    #[arg(long, short, value_enum, default_value_t)]
    pub(super) method: Name,
    /// Points of the path (integrated_gradients, conductance, finite_difference)
    #[arg(long, value_name = "N")]
    steps: Option<u32>,
    /// Adapt until the delta is at most this part of the change (integrated_gradients)
    #[arg(long, value_name = "RATIO")]
    tolerance: Option<f64>,
    /// Rule of the path: gauss_legendre, riemann_left, riemann_middle, riemann_right, trapezoid, captum_trapezoid
    #[arg(long, value_name = "RULE")]
    quadrature: Option<String>,
    /// Hook point where the gradient is taken, such as hidden_states.3
    #[arg(long, value_name = "HOOK")]
    site: Option<String>,
    /// Hook point of the layer (conductance)
    #[arg(long, value_name = "HOOK")]
    layer: Option<String>,
    /// Samples, permutations or coalitions, of methods that draw
    #[arg(long, value_name = "N")]
    samples: Option<u32>,
    /// Noise, as a part of the range of values (smooth_grad, gradient_shap)
    #[arg(long, value_name = "RATIO")]
    noise: Option<f64>,
    /// forward, central or richardson (finite_difference)
    #[arg(long, value_name = "SCHEME")]
    scheme: Option<String>,
    /// Step, relative to the direction (finite_difference)
    #[arg(long, value_name = "H")]
    step: Option<f64>,
    /// baseline, random or dimensions (finite_difference)
    #[arg(long, value_name = "WHICH")]
    directions: Option<String>,
    /// l1, l2 or sum (saliency)
    #[arg(long, value_name = "NORM")]
    norm: Option<String>,
    /// Features, or pixels along an edge, of a window (occlusion)
    #[arg(long, value_name = "N")]
    window: Option<u32>,
    /// From window to window (occlusion)
    #[arg(long, value_name = "N")]
    stride: Option<u32>,
    /// captum: the estimator of that name (kernel_shap, lime)
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Follow each permutation by its reverse (shapley_sampling)
    #[arg(long)]
    antithetic: bool,
    /// Position whose row is the answer (attention methods)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    row: Option<i32>,
    /// Where random draws begin
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) seed: u64,
}

impl MethodArgs {
    /// The method with its options; those that it does not have are refused.
    pub(super) fn method(&self, name: Name) -> Result<pb::Method, CliError> {
        self.check(name)?;
        let (steps, samples) = (self.steps.unwrap_or(0), self.samples.unwrap_or(0));
        let (noise, site) = (
            self.noise.unwrap_or(0.0),
            self.site.clone().unwrap_or_default(),
        );
        let quadrature = self.choice(
            "--quadrature",
            self.quadrature.as_ref(),
            "QUADRATURE_",
            pb::Quadrature::from_str_name,
        )?;
        let captum = match self.variant.as_deref() {
            None => 0,
            Some("captum") => 1,
            Some(other) => {
                return Err(CliError::Usage(format!(
                    "\"--variant {other}\" is not known: give captum, or leave it out"
                )));
            }
        };
        let position = self.row;
        let kind = match name {
            Name::IntegratedGradients => Kind::IntegratedGradients(pb::IntegratedGradients {
                steps,
                quadrature,
                tolerance: self.tolerance.unwrap_or(0.0),
                site,
                ..Default::default()
            }),
            Name::FiniteDifference => Kind::FiniteDifference(pb::FiniteDifference {
                scheme: self.choice(
                    "--scheme",
                    self.scheme.as_ref(),
                    "SCHEME_",
                    pb::Scheme::from_str_name,
                )?,
                step: self.step.unwrap_or(0.0),
                directions: match self.directions.as_deref() {
                    None | Some("baseline") => 0,
                    Some(_) => self.choice(
                        "--directions",
                        self.directions.as_ref(),
                        "DIRECTIONS_",
                        pb::Directions::from_str_name,
                    )?,
                },
                samples,
                path_steps: steps,
                site,
            }),
            Name::Saliency => Kind::Saliency(pb::Saliency {
                norm: self.choice(
                    "--norm",
                    self.norm.as_ref(),
                    "NORM_",
                    pb::Norm::from_str_name,
                )?,
                site,
            }),
            Name::InputXGradient => Kind::InputXGradient(pb::InputXGradient { site }),
            Name::AttnLrp => Kind::AttnLrp(pb::AttnLrp { site }),
            Name::SmoothGrad => Kind::SmoothGrad(pb::SmoothGrad {
                samples,
                noise,
                site,
                ..Default::default()
            }),
            Name::GradientShap => Kind::GradientShap(pb::GradientShap {
                samples,
                noise,
                site,
            }),
            Name::Conductance => Kind::Conductance(pb::Conductance {
                layer: self.layer.clone().unwrap_or_default(),
                steps,
                quadrature,
            }),
            Name::Ablation => Kind::Ablation(pb::Ablation {}),
            Name::LeaveOneOut => Kind::LeaveOneOut(pb::LeaveOneOut {}),
            Name::Occlusion => Kind::Occlusion(pb::Occlusion {
                window: self.window.unwrap_or(0),
                stride: self.stride.unwrap_or(0),
            }),
            Name::ShapleySampling => Kind::ShapleySampling(pb::ShapleySampling {
                permutations: samples,
                antithetic: self.antithetic,
            }),
            Name::KernelShap => Kind::KernelShap(pb::KernelShap {
                samples,
                variant: captum,
            }),
            Name::Lime => Kind::Lime(pb::Lime {
                variant: captum,
                samples,
                ..Default::default()
            }),
            Name::AttentionRollout => Kind::AttentionRollout(pb::AttentionRollout { position }),
            Name::AttentionFlow => Kind::AttentionFlow(pb::AttentionFlow { position }),
            Name::GradientAttention => Kind::GradientAttention(pb::GradientAttention { position }),
            Name::ValueZeroing => Kind::ValueZeroing(pb::ValueZeroing { position }),
        };
        Ok(pb::Method { kind: Some(kind) })
    }

    /// A value of an enum by its name on the wire, without its prefix and in lower case.
    fn choice<T: Into<i32>>(
        &self,
        option: &str,
        given: Option<&String>,
        prefix: &str,
        named: fn(&str) -> Option<T>,
    ) -> Result<i32, CliError> {
        let Some(given) = given else {
            return Ok(0);
        };
        let found = named(&format!("{prefix}{}", given.to_ascii_uppercase()));
        found.map(Into::into).ok_or_else(|| {
            CliError::Usage(format!(
                "\"{option} {given}\" is not known: `introspectd attribute --help` tells the names"
            ))
        })
    }

    fn check(&self, name: Name) -> Result<(), CliError> {
        let given = [
            ("--steps", self.steps.is_some()),
            ("--tolerance", self.tolerance.is_some()),
            ("--quadrature", self.quadrature.is_some()),
            ("--site", self.site.is_some()),
            ("--layer", self.layer.is_some()),
            ("--samples", self.samples.is_some()),
            ("--noise", self.noise.is_some()),
            ("--scheme", self.scheme.is_some()),
            ("--step", self.step.is_some()),
            ("--directions", self.directions.is_some()),
            ("--norm", self.norm.is_some()),
            ("--window", self.window.is_some()),
            ("--stride", self.stride.is_some()),
            ("--variant", self.variant.is_some()),
            ("--antithetic", self.antithetic),
            ("--row", self.row.is_some()),
        ];
        let has: &[&str] = match name {
            Name::IntegratedGradients => &["--steps", "--tolerance", "--quadrature", "--site"],
            Name::FiniteDifference => &[
                "--steps",
                "--site",
                "--samples",
                "--scheme",
                "--step",
                "--directions",
            ],
            Name::Saliency => &["--norm", "--site"],
            Name::InputXGradient | Name::AttnLrp => &["--site"],
            Name::SmoothGrad | Name::GradientShap => &["--samples", "--noise", "--site"],
            Name::Conductance => &["--layer", "--steps", "--quadrature"],
            Name::Ablation | Name::LeaveOneOut => &[],
            Name::Occlusion => &["--window", "--stride"],
            Name::ShapleySampling => &["--samples", "--antithetic"],
            Name::KernelShap | Name::Lime => &["--samples", "--variant"],
            Name::AttentionRollout
            | Name::AttentionFlow
            | Name::GradientAttention
            | Name::ValueZeroing => &["--row"],
        };
        match given
            .iter()
            .find(|(option, given)| *given && !has.contains(option))
        {
            None => Ok(()),
            Some((option, _)) => {
                let method = name.to_possible_value();
                let method = method.as_ref().map_or("", |v| v.get_name());
                Err(CliError::Usage(format!(
                    "the method {method} has no \"{option}\"{}",
                    match has {
                        [] => ": it has no options".to_owned(),
                        has => format!(": it has {}", has.join(", ")),
                    }
                )))
            }
        }
    }
}

/// A label or token, or one against another.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "What to explain")]
pub(in crate::cli) struct ChoiceArgs {
    /// Label by its name or number, or token:TEXT [default: what is predicted]
    #[arg(long, short, value_name = "LABEL")]
    target: Option<String>,
    /// Explain the difference to this one
    #[arg(long, value_name = "LABEL")]
    against: Option<String>,
    /// Position of the scores, of models that have them for each token
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    at: Option<i32>,
}

impl ChoiceArgs {
    /// What was named, if anything was.
    pub(in crate::cli) fn of(&self) -> Option<pb::target::Of> {
        use pb::target::Of;
        let target = self.target.as_deref();
        if let Some(against) = &self.against {
            return Some(Of::Contrast(pb::Contrast {
                choice: Some(self.choice(target)),
                against: Some(self.choice(Some(against))),
            }));
        }
        (target.is_some() || self.at.is_some()).then(|| Of::Choice(self.choice(target)))
    }

    fn choice(&self, named: Option<&str>) -> pb::Choice {
        use pb::choice::What;
        pb::Choice {
            what: named.map(|name| match (name.strip_prefix("token:"), name.parse()) {
                (Some(token), _) => What::Token(token.to_owned()),
                (None, Ok(index)) => What::Index(index),
                (None, Err(_)) => What::Label(name.to_owned()),
            }),
            position: self.at,
        }
    }
}

/// The number that is explained or watched.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "What to explain")]
pub(in crate::cli) struct TargetArgs {
    #[command(flatten)]
    choice: ChoiceArgs,
    /// Explain why a language model would go on with this text
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["target", "against", "at"])]
    continuation: Option<String>,
    /// Explain a number inside of the model: HOOK:POSITION:INDEX
    #[arg(long, value_name = "UNIT", conflicts_with_all = ["target", "against", "at", "continuation"])]
    unit: Option<String>,
    /// Explain what a stored probe says: NAME or NAME@HOOK; --target names the class, --at the token
    #[arg(long, value_name = "PROBE", conflicts_with_all = ["against", "continuation", "unit", "quantity"])]
    probe: Option<String>,
    /// logit, log_probability or probability
    #[arg(long, value_name = "QUANTITY")]
    quantity: Option<String>,
    /// How far the prediction is from what it is for the input itself, or for what is patched from: KL divergence, in nats
    #[arg(long, conflicts_with_all = ["target", "against", "continuation", "unit", "probe", "quantity"])]
    divergence: bool,
}

/// What it is compared with, and what gets a score.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "What to explain")]
pub(super) struct FeatureArgs {
    /// pad, mask, unk, zero, mean, text:TEXT or ids:ID,...
    #[arg(long, short, value_name = "WHAT")]
    baseline: Option<String>,
    /// Compare special tokens too
    #[arg(long)]
    replace_special: bool,
    /// A score for each word
    #[arg(long, conflicts_with = "span")]
    words: bool,
    /// A score for these bytes of the text (repeat for more)
    #[arg(long, value_name = "START:END")]
    span: Vec<String>,
}

impl TargetArgs {
    pub(in crate::cli) fn target(&self) -> Result<pb::Target, CliError> {
        use pb::target::Of;
        let quantity = match self.quantity.as_deref() {
            None => 0,
            Some(given) => {
                let name = format!("QUANTITY_{}", given.to_ascii_uppercase());
                pb::Quantity::from_str_name(&name).map(Into::into).ok_or_else(|| {
                    CliError::Usage(format!(
                        "\"--quantity {given}\" is none of logit, log_probability and probability"
                    ))
                })?
            }
        };
        let of = if self.divergence {
            Some(Of::Divergence(pb::Divergence {
                position: self.choice.at,
            }))
        } else if let Some(text) = &self.continuation {
            Some(Of::Continuation(pb::Continuation {
                what: Some(pb::continuation::What::Text(text.clone())),
            }))
        } else if let Some(probe) = &self.probe {
            Some(Of::Probe(pb::ProbeTarget {
                probe: Some(crate::cli::probe::reference(probe)),
                label: self.choice.target.clone().unwrap_or_default(),
                position: self.choice.at,
            }))
        } else if let Some(unit) = &self.unit {
            Some(Of::Unit(self::unit(unit)?))
        } else {
            self.choice.of()
        };
        Ok(pb::Target { quantity, of })
    }
}

impl FeatureArgs {
    pub(super) fn baseline(&self) -> Result<pb::Baseline, CliError> {
        use pb::baseline::Kind;
        let constant = |c: pb::Constant| Kind::Constant(c.into());
        let kind = match self.baseline.as_deref() {
            None => None,
            Some("pad") => Some(constant(pb::Constant::Pad)),
            Some("mask") => Some(constant(pb::Constant::Mask)),
            Some("unk") => Some(constant(pb::Constant::Unk)),
            Some("zero") => Some(constant(pb::Constant::Zero)),
            Some("mean") => Some(constant(pb::Constant::Mean)),
            Some(other) => {
                Some(
                    match (other.strip_prefix("text:"), other.strip_prefix("ids:")) {
                        (Some(text), _) => Kind::Text(text.to_owned()),
                        (None, Some(ids)) => {
                            let ids: Result<Vec<u32>, _> =
                                ids.split(',').map(|id| id.trim().parse()).collect();
                            Kind::Tokens(pb::TokenIds {
                        ids: ids.map_err(|_| {
                            CliError::Usage(format!("\"--baseline {other}\": ids are numbers, with commas between"))
                        })?,
                        type_ids: Vec::new(),
                    })
                        }
                        (None, None) => {
                            return Err(CliError::Usage(format!(
                                "\"--baseline {other}\" is none of pad, mask, unk, zero, mean, text:TEXT and ids:ID,..."
                            )));
                        }
                    },
                )
            }
        };
        Ok(pb::Baseline {
            kind,
            replace_special: self.replace_special,
        })
    }

    pub(super) fn features(&self) -> Result<pb::Features, CliError> {
        let grouping = if self.words {
            pb::Grouping::Words
        } else if self.span.is_empty() {
            pb::Grouping::Unspecified
        } else {
            pb::Grouping::Spans
        };
        let spans = self.span.iter().map(|span| {
            let ends = span
                .split_once(':')
                .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
            let (start, end) = ends.ok_or_else(|| {
                CliError::Usage(format!(
                    "\"--span {span}\" is no START:END in bytes of the text"
                ))
            })?;
            Ok(pb::Span {
                start,
                end,
                sequence: 0,
            })
        });
        Ok(pb::Features {
            grouping: grouping.into(),
            spans: spans.collect::<Result<_, CliError>>()?,
        })
    }
}

fn unit(given: &str) -> Result<pb::Unit, CliError> {
    let mut parts = given.rsplitn(3, ':');
    let (index, position, hook) = (parts.next(), parts.next(), parts.next());
    let found = || {
        Some(pb::Unit {
            hook: hook?.to_owned(),
            position: position?.parse().ok()?,
            index: index?.parse().ok()?,
        })
    };
    found().ok_or_else(|| {
        CliError::Usage(format!(
            "\"--unit {given}\" is no HOOK:POSITION:INDEX, such as blocks.1.mlp.hook_post:4:10"
        ))
    })
}
