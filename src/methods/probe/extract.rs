//! From a labelled example to vectors: one run gives those of every hook point.

use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle, StageTimings},
    ipc::info::{Axis, ModelInfo},
    methods::{
        capture::{self, Captured, Content, Logits, Question, Selection},
        input::{Input, Prepared, Token},
        reduce::Pooling,
        select::{self, Point},
    },
};

/// Hook points when nobody names any.
const DEFAULT: &str = "hidden_states.*";

/// Which vectors are read.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Hook points, in the order of the graph.
    pub hooks: Vec<Hook>,
    /// How positions become one vector, of inputs that are labelled as a whole.
    pub pooling: Option<Pooling>,
    /// Largest capture.
    pub max_bytes: usize,
}

/// A hook point of positions and features.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Canonical name.
    pub name: String,
    /// Its layer, where it has one.
    pub layer: Option<usize>,
    /// Features.
    pub width: usize,
}

/// What an example is labelled by.
#[derive(Clone, Debug, PartialEq)]
pub enum Label {
    /// A class of the whole input.
    Class(String),
    /// A number of the whole input.
    Number(f64),
    /// Classes of tokens: those whose first byte that is no white space lies within.
    Spans(Vec<(std::ops::Range<u32>, String)>),
    /// Classes of tokens by position, negative ones from the end.
    Positions(Vec<(i32, String)>),
}

/// Where an example belongs, when it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Trained on.
    Train,
    /// Judged by.
    Test,
}

/// A labelled example.
#[derive(Clone, Debug)]
pub struct Example {
    /// The input.
    pub input: Input,
    /// What it is labelled by.
    pub label: Label,
    /// Where it belongs.
    pub part: Option<Part>,
}

/// What an example gives: a row for the input, or one for each labelled token.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// The label of each row.
    pub labels: Vec<Value>,
    /// What each row is of: rows that are of the same thing (the same text, the same token) have the same label in a control task.
    pub types: Vec<u64>,
    /// For each hook point `[row, width]`.
    pub vectors: Vec<Vec<f32>>,
    /// Where they belong.
    pub part: Option<Part>,
    /// Whether rows are tokens.
    pub of_tokens: bool,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// Where the time went.
    pub timings: StageTimings,
}

/// The label of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A class.
    Class(String),
    /// A number.
    Number(f64),
}

/// Finds the hook points; with `layers`, of those that belong to a layer only these.
///
/// # Errors
/// Beneath `field`: names that mean nothing or that the model lacks, and hook points that are not `[batch, pos, features]`.
pub fn hooks(
    info: &ModelInfo,
    (names, layers): (&[String], &[u32]),
    field: &str,
) -> Result<Vec<Hook>, EngineError> {
    let default = [DEFAULT.to_owned()];
    let names = if names.is_empty() { &default } else { names };
    let points = select::points(info, names, layers, field)?;
    points
        .iter()
        .map(|point| match point {
            Point::Hook(hook) => match (&hook.axes[..], hook.dims.last()) {
                ([Axis::Batch, Axis::Pos, _], Some(Some(width))) if hook.dtype.is_float() => {
                    Ok(Hook {
                        name: hook.name.clone(),
                        layer: hook.layer,
                        width: *width,
                    })
                }
                _ => {
                    let axes: Vec<&str> = hook.axes.iter().map(Axis::name).collect();
                    Err(EngineError::invalid(
                        format!("{field}.hooks"),
                        format!(
                            "\"{}\" has the axes {}: a probe reads hook points of batch, pos and features",
                            hook.name,
                            axes.join(", ")
                        ),
                    ))
                }
            },
            Point::Value(name) => Err(EngineError::invalid(
                format!("{field}.hooks"),
                format!("\"{name}\" has no axes that anybody has read: name a hook point"),
            )),
        })
        .collect()
}

/// Runs an example. Errors of the input begin at `input`, those of labels at the example.
///
/// # Errors
/// Those of captures; [`EngineError::FailedPrecondition`] for vectors that are not finite.
pub async fn extract(
    handle: &ModelHandle,
    plan: &Plan,
    example: Example,
    ctx: &Ctx,
) -> Result<Rows, EngineError> {
    // Spans are of its bytes.
    let text = match (&example.input, &example.label) {
        (Input::Text { text, .. }, Label::Spans(_)) => text.text.clone(),
        (Input::Text { .. } | Input::Tokens { .. } | Input::Tensors(_), _) => String::new(),
    };
    let of_tokens = match example.label {
        Label::Spans(_) | Label::Positions(_) => true,
        Label::Class(_) | Label::Number(_) => false,
    };
    let question = Question {
        input: example.input,
        selection: Selection {
            hooks: plan.hooks.iter().map(|h| h.name.clone()).collect(),
            // Each labelled token is a row of its own.
            pooling: plan.pooling.filter(|_| !of_tokens),
            logits: Logits::None,
            spelled: false,
            ..Selection::default()
        },
    };
    let terms = capture::Terms {
        max_bytes: plan.max_bytes,
        lane: Lane::Bulk,
    };
    let started = capture::start(handle, question, terms, ctx).await?;
    let tokens = started.prepared.tokens.clone();
    let (of, truncated) = (kind(&started.prepared), started.prepared.truncated);
    let captured = started.finish(ctx).await?;
    if let Some(name) = captured.non_finite.first() {
        return Err(EngineError::precondition(format!(
            "\"{name}\" holds a number that is not finite for this input: no probe can be trained on it"
        )));
    }
    let whole: Vec<Vec<f32>> = plan
        .hooks
        .iter()
        .map(|hook| vectors(&captured, &hook.name))
        .collect::<Result<_, _>>()?;
    let of_some = |chosen: &[(usize, &String)]| {
        let rows = |(values, hook): (&Vec<f32>, &Hook)| {
            let row = |(at, _): &(usize, &String)| {
                let begin = at * hook.width;
                values.get(begin..begin + hook.width).unwrap_or_default()
            };
            chosen.iter().flat_map(row).copied().collect()
        };
        let labels = chosen.iter().map(|(_, l)| Value::Class((*l).clone()));
        let types = chosen.iter().map(|(at, _)| u64::from(tokens[*at].id));
        (
            labels.collect(),
            types.collect(),
            whole.iter().zip(&plan.hooks).map(rows).collect(),
        )
    };
    let (labels, types, vectors) = match example.label {
        Label::Class(label) => (vec![Value::Class(label)], vec![of], whole),
        Label::Number(number) => (vec![Value::Number(number)], vec![of], whole),
        Label::Spans(spans) => of_some(&labelled(&text, &tokens, &spans)?),
        Label::Positions(positions) => of_some(&placed(tokens.len(), &positions)?),
    };
    Ok(Rows {
        labels,
        types,
        vectors,
        part: example.part,
        of_tokens,
        truncated,
        timings: captured.timings,
    })
}

/// A hook point of a capture, as floats.
///
/// # Errors
/// When it did not come.
pub fn vectors(captured: &Captured, name: &str) -> Result<Vec<f32>, EngineError> {
    let item = captured.items.iter().find(|i| i.name == name);
    let Some(Content::Dense(tensor)) = item.map(|i| &i.content) else {
        return Err(EngineError::internal(format!("\"{name}\" did not come")));
    };
    Ok(tensor.to_f32().map_err(EngineError::internal)?.into_owned())
}

/// What an input is of: that of equal tokens, or without tokens of equal tensors, is the same.
fn kind(prepared: &Prepared) -> u64 {
    let of_tokens = prepared.tokens.iter().map(|t| u64::from(t.id));
    let of_tensors = prepared.group.inputs.iter().flat_map(|input| {
        let words = input.tensor.bytes().chunks(8);
        words.map(|word| {
            word.iter()
                .rev()
                .fold(0, |w, byte| (w << 8) | u64::from(*byte))
        })
    });
    if prepared.tokens.is_empty() {
        of_tensors.fold(1, |h, word| mixed(h ^ word))
    } else {
        // From one: leading ids of zero count.
        of_tokens.fold(1, |h, id| mixed(h ^ id))
    }
}

/// Numbers of the tokens that spans label: those whose first byte that is no white space lies within one. Tokenizers of bytes count the
/// space before a word as a part of it.
fn labelled<'a>(
    text: &str,
    tokens: &[Token],
    spans: &'a [(std::ops::Range<u32>, String)],
) -> Result<Vec<(usize, &'a String)>, EngineError> {
    let offsets = tokens.iter().any(|t| t.end > t.start);
    if !offsets && !spans.is_empty() {
        return Err(EngineError::invalid(
            "tokens.spans",
            "spans are of bytes, and the input is no text: label its tokens by positions",
        ));
    }
    let begins = |token: &Token| {
        let own = text.get(token.start as usize..token.end as usize);
        let space = own.map_or(0, |own| own.len() - own.trim_start().len());
        let space = u32::try_from(space).unwrap_or(0);
        match token.start + space {
            begin if begin < token.end => begin,
            _ => token.start,
        }
    };
    let tokens = tokens.iter().enumerate();
    let tokens = tokens.filter(|(_, t)| !t.special && t.sequence == 0 && t.end > t.start);
    let chosen = tokens.filter_map(|(at, token)| {
        let begin = begins(token);
        let span = spans.iter().find(|(span, _)| span.contains(&begin));
        Some((at, &span?.1))
    });
    Ok(chosen.collect())
}

/// Numbers of the tokens that are labelled by position, in order.
fn placed(count: usize, labels: &[(i32, String)]) -> Result<Vec<(usize, &String)>, EngineError> {
    let mut chosen = std::collections::BTreeMap::new();
    for (at, (position, label)) in labels.iter().enumerate() {
        let field = format!("tokens.positions[{at}].position");
        let place = if *position < 0 {
            count.checked_sub(position.unsigned_abs() as usize)
        } else {
            usize::try_from(*position).ok().filter(|p| *p < count)
        };
        let place = place.ok_or_else(|| {
            let message = format!("position {position} does not exist: the input has {count}");
            EngineError::invalid(field.clone(), message)
        })?;
        if chosen.insert(place, label).is_some() {
            let message = format!("position {position} is labelled twice");
            return Err(EngineError::invalid(field, message));
        }
    }
    Ok(chosen.into_iter().collect())
}

/// Mixes bits, so that equal texts and only they are likely to have equal types.
fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value ^ (value >> 27)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(start: u32, end: u32, special: bool) -> Token {
        Token {
            start,
            end,
            special,
            ..Token::default()
        }
    }

    #[test]
    fn spans_label_the_tokens_that_begin_in_them() {
        let tokens = [
            token(0, 0, true),
            token(0, 4, false),
            token(5, 8, false),
            token(8, 10, false),
            token(0, 0, true),
        ];
        let spans = [(0..4, "a".to_owned()), (6..9, "b".to_owned())];
        let text = "film areXgood";
        let found = labelled(text, &tokens, &spans).unwrap();
        let found: Vec<(usize, &str)> = found.iter().map(|(at, l)| (*at, l.as_str())).collect();
        assert_eq!(found, [(1, "a"), (3, "b")]);
        assert!(
            labelled(text, &tokens, &[(20..30, "c".to_owned())])
                .unwrap()
                .is_empty()
        );
        assert!(
            labelled(text, &[token(0, 0, false)], &spans).is_err(),
            "ids"
        );
        // Tokens that have the space before their word.
        let tokens = [
            token(0, 4, false),
            token(4, 8, false),
            token(8, 9, false),
            token(9, 13, false),
        ];
        let spans = [(5..8, "a".to_owned()), (10..13, "b".to_owned())];
        let found = labelled("film are  bad", &tokens, &spans);
        let found: Vec<usize> = found.unwrap().iter().map(|(at, _)| *at).collect();
        assert_eq!(found, [1, 3]);
    }

    #[test]
    fn positions_label_the_tokens_that_stand_there() {
        let labels = [(-1, "b".to_owned()), (1, "a".to_owned())];
        let found = placed(4, &labels).unwrap();
        let found: Vec<(usize, &str)> = found.iter().map(|(at, l)| (*at, l.as_str())).collect();
        assert_eq!(found, [(1, "a"), (3, "b")]);
        for wrong in [4, -5] {
            let labels = [(wrong, String::new())];
            assert!(placed(4, &labels).is_err(), "{labels:?}");
        }
        let twice = [(3, "a".to_owned()), (-1, "b".to_owned())];
        assert!(placed(4, &twice).is_err());
    }

    #[test]
    fn orders_of_tokens_are_different_texts() {
        let of = |ids: &[u64]| ids.iter().fold(0, |h, id| mixed(h ^ id));
        assert_ne!(of(&[1, 2]), of(&[2, 1]));
        assert_eq!(of(&[1, 2]), of(&[1, 2]));
    }
}
