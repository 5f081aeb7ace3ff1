//! From wire types to questions about probes, validated once. Errors name the field by its path.

use std::ops::Range;

use super::super::{
    from_proto::{or, pooling, required_input, tensor, unknown},
    wire::introspect as pb,
};
use crate::{
    engine::EngineError,
    methods::{
        input::Input,
        probe::{
            card::{Kind, LABEL_LIMIT, MOST_LABELS},
            extract::{Example, Label, Part},
            store::check_name,
            train::{Asked, How},
        },
        reduce::Pooling,
    },
};

/// Most hook points that are named, most labelled spans or positions of an example.
const MOST_NAMES: usize = 4096;
const MOST_SPANS: usize = 65_536;
/// Most values of C to choose among.
const MOST_CHOICES: usize = 32;
const MOST_HIDDEN: u32 = 4096;

type Result<T> = std::result::Result<T, EngineError>;

/// What to train.
pub(super) fn header(header: pb::TrainHeader) -> Result<Asked> {
    if !header.name.is_empty() {
        check_name(&header.name, "header.name")?;
    }
    check_count(header.hooks.len(), MOST_NAMES, "header.hooks")?;
    check_labels(&header.labels, "header.labels")?;
    let fraction = header.test_fraction;
    if !(fraction == 0.0 || fraction > 0.0 && fraction < 1.0) {
        return Err(EngineError::invalid(
            "header.test_fraction",
            format!("is {fraction}: give a part between 0 and 1"),
        ));
    }
    let how = how(header.kind)?;
    if header.unjudged {
        let fraction = header.test_fraction;
        let given = [
            ("codelength", header.codelength),
            ("learning_curve", header.learning_curve),
            ("test_fraction", fraction != 0.0),
        ];
        unjudged(how.as_ref(), given)?;
    }
    Ok(Asked {
        how,
        name: (!header.name.is_empty()).then_some(header.name),
        hooks: header.hooks,
        layers: header.layers,
        pooling: pooling(header.pooling, "header.pooling")?.unwrap_or(Pooling::Mean),
        labels: header.labels,
        seed: header.seed,
        test_fraction: if fraction == 0.0 { 0.2 } else { fraction },
        control: !header.skip_control,
        codelength: header.codelength,
        learning_curve: header.learning_curve,
        unjudged: header.unjudged,
        replace: header.replace,
    })
}

/// Whether something can go without being judged. `given` are fields that ask for a judgement.
fn unjudged(how: Option<&How>, given: [(&str, bool); 3]) -> Result<()> {
    match how {
        Some(How::MeanDifference | How::Pca) => {}
        Some(How::Logistic { .. } | How::Ridge { .. } | How::Mlp { .. }) | None => {
            return Err(EngineError::invalid(
                "header.unjudged",
                "is for directions: give the kind mean_difference or pca",
            ));
        }
    }
    for (field, given) in given {
        if given {
            return Err(EngineError::invalid(
                format!("header.{field}"),
                "needs examples that are held out, and with unjudged there are none: leave it out",
            ));
        }
    }
    Ok(())
}

fn how(kind: Option<pb::ProbeKind>) -> Result<Option<How>> {
    use pb::probe_kind::Kind as Given;
    let Some(kind) = kind.and_then(|k| k.kind) else {
        return Ok(None);
    };
    let positive = |value: f64, default: f64, field: &str| {
        if value == 0.0 {
            Ok(default)
        } else if value > 0.0 && value.is_finite() {
            Ok(value)
        } else {
            Err(EngineError::invalid(
                format!("header.kind.{field}"),
                format!("is {value}: give a positive number"),
            ))
        }
    };
    Ok(Some(match kind {
        Given::Logistic(o) => {
            if o.cross_validate.len() > MOST_CHOICES {
                return Err(EngineError::invalid(
                    "header.kind.logistic.cross_validate",
                    format!(
                        "has {} values: give at most {MOST_CHOICES}",
                        o.cross_validate.len()
                    ),
                ));
            }
            let choices = o.cross_validate.iter().enumerate();
            How::Logistic {
                c: positive(o.c, 1.0, "logistic.c")?,
                choices: choices
                    .map(|(at, c)| {
                        if *c == 0.0 {
                            return positive(-1.0, 1.0, &format!("logistic.cross_validate[{at}]"));
                        }
                        positive(*c, 1.0, &format!("logistic.cross_validate[{at}]"))
                    })
                    .collect::<Result<_>>()?,
            }
        }
        Given::Ridge(o) => How::Ridge {
            alpha: positive(o.alpha, 1.0, "ridge.alpha")?,
        },
        Given::MeanDifference(pb::MeanDifference {}) => How::MeanDifference,
        Given::Pca(pb::Pca {}) => How::Pca,
        Given::Mlp(o) => {
            if o.hidden > MOST_HIDDEN {
                return Err(EngineError::invalid(
                    "header.kind.mlp.hidden",
                    format!("is {}: give at most {MOST_HIDDEN}", o.hidden),
                ));
            }
            How::Mlp {
                hidden: or(o.hidden, 64) as usize,
                alpha: positive(o.alpha, 1e-4, "mlp.alpha")?,
            }
        }
    }))
}

fn check_count(count: usize, most: usize, field: &str) -> Result<()> {
    if count > most {
        return Err(EngineError::invalid(
            field,
            format!("has {count} entries: give at most {most}"),
        ));
    }
    Ok(())
}

/// Names of classes: none twice.
fn check_labels(labels: &[String], field: &str) -> Result<()> {
    check_count(labels.len(), MOST_LABELS, field)?;
    for (at, label) in labels.iter().enumerate() {
        check_label(label, &format!("{field}[{at}]"))?;
        if labels[..at].contains(label) {
            return Err(EngineError::invalid(
                format!("{field}[{at}]"),
                format!("\"{label}\" stands there twice"),
            ));
        }
    }
    Ok(())
}

fn check_label(label: &str, field: &str) -> Result<()> {
    if label.is_empty() || label.len() > LABEL_LIMIT {
        return Err(EngineError::invalid(
            field,
            format!(
                "a label has 1 to {LABEL_LIMIT} bytes, this one {}",
                label.len()
            ),
        ));
    }
    Ok(())
}

/// A labelled example. Paths of fields begin at the example.
pub(super) fn example(example: pb::Example) -> Result<Example> {
    use pb::example::Of;
    let label = match example.of {
        None => {
            return Err(EngineError::invalid(
                "label",
                "is missing: give label, number or tokens",
            ));
        }
        Some(Of::Label(label)) => {
            check_label(&label, "label")?;
            Label::Class(label)
        }
        Some(Of::Number(number)) if number.abs() <= f64::from(f32::MAX) => Label::Number(number),
        Some(Of::Number(number)) => {
            return Err(EngineError::invalid(
                "number",
                format!("is {number}: give a number that single precision can hold, as probes do"),
            ));
        }
        Some(Of::Tokens(tokens)) => of_tokens(tokens)?,
    };
    let part = pb::Part::try_from(example.part).map_err(|_| unknown("part", example.part))?;
    let input = required_input(example.input)?;
    within(&input, &label)?;
    Ok(Example {
        input,
        label,
        part: match part {
            pb::Part::Unspecified => None,
            pb::Part::Train => Some(Part::Train),
            pb::Part::Test => Some(Part::Test),
        },
    })
}

/// Classes of tokens: by spans or by positions.
fn of_tokens(given: pb::TokenLabels) -> Result<Label> {
    check_count(given.spans.len(), MOST_SPANS, "tokens.spans")?;
    check_count(given.positions.len(), MOST_SPANS, "tokens.positions")?;
    if given.positions.is_empty() {
        let spans = given.spans.into_iter().enumerate();
        let spans = spans.map(|(at, span)| {
            check_label(&span.label, &format!("tokens.spans[{at}].label"))?;
            if span.start >= span.end {
                return Err(EngineError::invalid(
                    format!("tokens.spans[{at}]"),
                    format!("is empty: from {} to {}", span.start, span.end),
                ));
            }
            Ok((span.start..span.end, span.label))
        });
        let spans: Vec<_> = spans.collect::<Result<_>>()?;
        apart(&spans)?;
        return Ok(Label::Spans(spans));
    }
    if !given.spans.is_empty() {
        return Err(EngineError::invalid(
            "tokens.positions",
            "label tokens by spans or by positions, not by both",
        ));
    }
    let positions = given.positions.into_iter().enumerate();
    let positions = positions.map(|(at, one)| {
        check_label(&one.label, &format!("tokens.positions[{at}].label"))?;
        Ok((one.position, one.label))
    });
    Ok(Label::Positions(positions.collect::<Result<_>>()?))
}

/// Whether no two spans have a byte in common: a token has one label.
fn apart(spans: &[(Range<u32>, String)]) -> Result<()> {
    let mut order: Vec<usize> = (0..spans.len()).collect();
    order.sort_by_key(|at| spans[*at].0.start);
    for pair in order.windows(2) {
        let (before, after) = (pair[0], pair[1]);
        if spans[after].0.start < spans[before].0.end {
            return Err(EngineError::invalid(
                format!("tokens.spans[{}]", before.max(after)),
                format!(
                    "overlaps tokens.spans[{}]: a token has one label",
                    before.min(after)
                ),
            ));
        }
    }
    Ok(())
}

/// Whether spans lie within their text.
fn within(input: &Input, label: &Label) -> Result<()> {
    let (Input::Text { text, .. }, Label::Spans(spans)) = (input, label) else {
        return Ok(());
    };
    match spans
        .iter()
        .position(|(span, _)| span.end as usize > text.text.len())
    {
        Some(at) => Err(EngineError::invalid(
            format!("tokens.spans[{at}].end"),
            format!(
                "is {}, and the text has {} bytes",
                spans[at].0.end,
                text.text.len()
            ),
        )),
        None => Ok(()),
    }
}

/// A probe by its plain weights.
pub(super) struct Plain {
    pub(super) hook: String,
    pub(super) pooling: Option<Pooling>,
    pub(super) kind: Kind,
    pub(super) labels: Vec<String>,
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
}

/// Weights that a caller brings.
pub(super) fn linear(given: pb::LinearProbe) -> Result<Plain> {
    let rows = given.bias.len();
    check_labels(&given.labels, "linear.labels")?;
    if rows == 0 || given.weight.is_empty() || !given.weight.len().is_multiple_of(rows) {
        return Err(EngineError::invalid(
            "linear.weight",
            format!(
                "has {} numbers for {rows} rows: give [rows, width], and a bias for each row",
                given.weight.len()
            ),
        ));
    }
    for (field, numbers) in [
        ("linear.weight", &given.weight),
        ("linear.bias", &given.bias),
    ] {
        if let Some(at) = numbers.iter().position(|v| !v.is_finite()) {
            return Err(EngineError::invalid(
                format!("{field}[{at}]"),
                "is not finite",
            ));
        }
    }
    Ok(Plain {
        hook: given.hook,
        pooling: pooling(given.pooling, "linear.pooling")?,
        kind: if given.labels.is_empty() {
            Kind::Ridge
        } else {
            Kind::Logistic
        },
        labels: given.labels,
        weight: given.weight,
        bias: given.bias,
    })
}

/// Most probes of a request.
const MOST_PROBES: usize = 64;

/// What is scored, by which probes.
pub(super) struct Score {
    pub(super) probes: Vec<pb::ProbeReference>,
    pub(super) of: Of,
    pub(super) per_token: bool,
    pub(super) predict: bool,
}

pub(super) enum Of {
    Input(crate::methods::input::Input),
    Hidden(crate::tensor::Tensor),
}

pub(super) fn score(request: pb::ScoreRequest) -> Result<Score> {
    use pb::score_request::Of as Given;
    let count = request.probes.len();
    if count == 0 || count > MOST_PROBES {
        return Err(EngineError::invalid(
            "probes",
            format!("has {count} entries: name 1 to {MOST_PROBES} probes"),
        ));
    }
    let of = match request.of {
        None => {
            return Err(EngineError::invalid(
                "input",
                "is missing: give input or hidden",
            ));
        }
        Some(Given::Input(input)) => Of::Input(required_input(Some(input))?),
        Some(Given::Hidden(hidden)) => {
            if count > 1 {
                return Err(EngineError::invalid(
                    "probes",
                    "hidden states of the caller are scored by one probe",
                ));
            }
            if request.intervention.is_some() {
                return Err(EngineError::invalid(
                    "intervention",
                    "nothing is run for hidden states of the caller",
                ));
            }
            if request.predict {
                return Err(EngineError::invalid(
                    "predict",
                    "nothing is run for hidden states of the caller",
                ));
            }
            Of::Hidden(tensor(hidden, "hidden")?.tensor)
        }
    };
    Ok(Score {
        probes: request.probes,
        of,
        per_token: request.per_token,
        predict: request.predict,
    })
}
