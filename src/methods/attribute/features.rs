//! What gets a score each: tokens, words, spans of the text; of images, every number of the input.

use crate::{engine::EngineError, methods::input::Token};

/// How tokens are grouped.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Grouping {
    /// Each by itself.
    #[default]
    Tokens,
    /// By words, as the tokenizer splits the text.
    Words,
    /// By the caller.
    Spans(Vec<Span>),
}

/// A part of a text, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u32,
    /// One past the last.
    pub end: u32,
    /// 0 for the text, 1 for its pair.
    pub sequence: u32,
}

/// Tokens that are one feature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Where it stands.
    pub span: (u32, u32),
    /// 0 for the text, 1 for its pair.
    pub sequence: u32,
    /// Numbers of its tokens.
    pub tokens: Vec<usize>,
}

/// The features of a row. A *unit* is what an input is made of: a token, or a number of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// Units of each.
    units: Vec<Vec<usize>>,
    /// How the caller finds them again; empty where each unit is a feature.
    listed: Vec<Feature>,
}

impl Features {
    /// Each unit by itself.
    pub(super) fn each(units: usize) -> Self {
        Self {
            units: (0..units).map(|u| vec![u]).collect(),
            listed: Vec::new(),
        }
    }

    /// Groups the tokens of a row. The last `asked` tokens are no part of the input.
    ///
    /// # Errors
    /// With paths of fields that begin at the features.
    pub(super) fn of(
        grouping: &Grouping,
        tokens: &[Token],
        asked: usize,
    ) -> Result<Self, EngineError> {
        let input = &tokens[..tokens.len() - asked];
        let listed = match grouping {
            Grouping::Tokens => return Ok(Self::each(tokens.len())),
            Grouping::Words => words(input)?,
            Grouping::Spans(spans) => spanned(spans, input)?,
        };
        Ok(Self {
            units: listed.iter().map(|f| f.tokens.clone()).collect(),
            listed,
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// How the caller finds them again; empty where each unit is a feature.
    pub fn listed(&self) -> &[Feature] {
        &self.listed
    }

    /// The units of each feature.
    pub(super) fn units(&self) -> &[Vec<usize>] {
        &self.units
    }

    /// Scores of units, added up.
    pub(super) fn sums(&self, scores: &[f64]) -> Vec<f64> {
        let sum = |units: &Vec<usize>| units.iter().filter_map(|u| scores.get(*u)).sum();
        self.units.iter().map(sum).collect()
    }
}

fn words(tokens: &[Token]) -> Result<Vec<Feature>, EngineError> {
    let mut listed: Vec<Feature> = Vec::new();
    let mut last = None;
    for (at, token) in tokens.iter().enumerate() {
        let Some(word) = token.word.filter(|_| !token.special) else {
            last = None;
            continue;
        };
        let this = Some((token.sequence, word));
        match listed.last_mut() {
            Some(feature) if last == this => {
                feature.span.1 = feature.span.1.max(token.end);
                feature.tokens.push(at);
            }
            Some(_) | None => listed.push(Feature {
                span: (token.start, token.end),
                sequence: token.sequence,
                tokens: vec![at],
            }),
        }
        last = this;
    }
    if listed.is_empty() {
        return Err(EngineError::invalid(
            "grouping",
            "no words are known: give a text, or group by tokens",
        ));
    }
    Ok(listed)
}

fn spanned(spans: &[Span], tokens: &[Token]) -> Result<Vec<Feature>, EngineError> {
    if spans.is_empty() {
        return Err(EngineError::invalid(
            "spans",
            "is empty: give at least one span",
        ));
    }
    within(spans, tokens)
}

/// The tokens of each span, none of them in two.
///
/// # Errors
/// With the field `spans[n]`.
pub(in crate::methods) fn within(
    spans: &[Span],
    tokens: &[Token],
) -> Result<Vec<Feature>, EngineError> {
    let mut taken = vec![false; tokens.len()];
    let mut listed = Vec::with_capacity(spans.len());
    for (at, span) in spans.iter().enumerate() {
        let field = || format!("spans[{at}]");
        let inside: Vec<usize> = (0..tokens.len())
            .filter(|t| {
                let token = &tokens[*t];
                let overlaps = token.start < span.end && token.end > span.start;
                !token.special && token.sequence == span.sequence && overlaps
            })
            .collect();
        if inside.is_empty() {
            return Err(EngineError::invalid(
                field(),
                format!(
                    "no token of the text stands in bytes {} to {}",
                    span.start, span.end
                ),
            ));
        }
        if inside.iter().any(|t| taken[*t]) {
            return Err(EngineError::invalid(
                field(),
                "shares a token with a span before it: spans must not overlap",
            ));
        }
        for token in &inside {
            taken[*token] = true;
        }
        listed.push(Feature {
            span: (span.start, span.end),
            sequence: span.sequence,
            tokens: inside,
        });
    }
    Ok(listed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[CLS] un ##like ly good [SEP]`: "unlikely good".
    fn tokens() -> Vec<Token> {
        let special = Token {
            special: true,
            ..Token::default()
        };
        let part = |start, end, word| Token {
            start,
            end,
            word: Some(word),
            ..Token::default()
        };
        vec![
            special.clone(),
            part(0, 2, 0),
            part(2, 6, 0),
            part(6, 8, 0),
            part(9, 13, 1),
            special,
        ]
    }

    #[test]
    fn words_are_their_tokens() {
        let features = Features::of(&Grouping::Words, &tokens(), 0).unwrap();
        assert_eq!(features.units(), [vec![1, 2, 3], vec![4]]);
        assert_eq!(features.listed()[0].span, (0, 8));
        assert_eq!(
            features.sums(&[100.0, 1.0, 2.0, 3.0, 4.0, 100.0]),
            [6.0, 4.0]
        );
    }

    #[test]
    fn spans_take_the_tokens_that_they_touch_and_no_token_twice() {
        let span = |start, end| Span {
            start,
            end,
            sequence: 0,
        };
        let of = |spans: &[Span]| Features::of(&Grouping::Spans(spans.to_vec()), &tokens(), 0);
        assert_eq!(of(&[span(3, 9)]).unwrap().units(), [vec![2, 3]]);
        for (wrong, field) in [
            (vec![span(0, 4), span(5, 8)], "spans[1]"),
            (vec![span(20, 30)], "spans[0]"),
            (vec![], "spans"),
        ] {
            let Err(EngineError::InvalidArgument { field: named, .. }) = of(&wrong) else {
                panic!("{wrong:?} was taken");
            };
            assert_eq!(named, field);
        }
    }

    #[test]
    fn what_is_asked_is_no_part_of_the_input() {
        let features = Features::of(&Grouping::Words, &tokens(), 2).unwrap();
        assert_eq!(features.units(), [vec![1, 2, 3]]);
    }
}
