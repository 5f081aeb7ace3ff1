//! Random tokens repeated twice: what duplicate token heads and induction heads are found by.
//!
//! ```text
//!   [CLS]  a b c d  a b c d  [SEP]        the template's tokens only when they are asked for
//! ```

use std::collections::HashSet;

use crate::{
    engine::{Ctx, EngineError, ModelHandle, TextInput, TokenizeOptions},
    ipc::info::{InputInfo, InputRole, ModelInfo},
    methods::attribute::draw::Draws,
};

/// Tokens when nobody says.
const DEFAULT_LENGTH: usize = 50;
/// A text of one word, around which a template puts its tokens.
const WORD: &str = "a";

/// Which sequences.
#[derive(Clone, Debug, Default)]
pub struct Repeated {
    /// Tokens that are repeated.
    pub length: Option<usize>,
    /// Sequences.
    pub count: usize,
    /// Where draws begin.
    pub seed: u64,
    /// Put the template's tokens around.
    pub special_tokens: bool,
    /// Tokens to repeat, in the place of draws.
    pub given: Vec<Vec<u32>>,
}

/// A sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sequence {
    pub(super) ids: Vec<u32>,
    /// Where the first repetition begins.
    pub(super) start: usize,
    /// Tokens that are repeated.
    pub(super) length: usize,
}

/// Makes the sequences.
///
/// # Errors
/// With paths of fields that begin at the sequences; [`EngineError::FailedPrecondition`] for a model without token ids, or one that takes more
/// than what follows from them.
pub(super) async fn sequences(
    handle: &ModelHandle,
    repeated: &Repeated,
    ctx: &Ctx,
) -> Result<Vec<Sequence>, EngineError> {
    let info = handle.info();
    if info.input(InputRole::TokenIds).is_none() {
        return Err(EngineError::precondition(format!(
            "model \"{}\" takes no token ids: there is nothing to repeat",
            info.name
        )));
    }
    let other = |i: &&InputInfo| matches!(i.role, InputRole::Other | InputRole::Pixels);
    if let Some(other) = info.inputs.iter().find(other) {
        return Err(EngineError::precondition(format!(
            "model \"{}\" takes \"{}\" beside its tokens, of which repeated tokens say nothing",
            info.name, other.name
        )));
    }
    let (before, after) = if repeated.special_tokens {
        template(handle, ctx).await?
    } else {
        (Vec::new(), Vec::new())
    };
    let around = before.len() + after.len();
    let most = room(info).map(|n| n.saturating_sub(around) / 2);
    if let Some(fixed) = info.fixed_length.filter(|_| !info.pads)
        && (fixed < around || (fixed - around) % 2 == 1)
    {
        return Err(EngineError::precondition(format!(
            "model \"{}\" takes exactly {fixed} tokens, which is no sequence twice",
            info.name
        )));
    }
    let halves = if repeated.given.is_empty() {
        drawn(info, repeated, most)?
    } else {
        checked(info, &repeated.given, most)?
    };
    Ok(halves
        .into_iter()
        .map(|half| Sequence {
            start: before.len(),
            length: half.len(),
            ids: [&before[..], &half, &half, &after].concat(),
        })
        .collect())
}

/// Tokens that a row may have.
fn room(info: &ModelInfo) -> Option<usize> {
    let limits = [info.max_tokens, info.fixed_length];
    limits.into_iter().flatten().min()
}

fn drawn(
    info: &ModelInfo,
    repeated: &Repeated,
    most: Option<usize>,
) -> Result<Vec<Vec<u32>>, EngineError> {
    let length = match (repeated.length, most) {
        (Some(length), Some(most)) if length > most => {
            return Err(EngineError::invalid(
                "length",
                format!("is {length}: the model takes at most {most} tokens twice"),
            ));
        }
        (Some(length), _) => length,
        // What the file fixes cannot be shortened where nothing can be padded.
        (None, Some(most)) if info.fixed_length.is_some() && !info.pads => most,
        (None, most) => DEFAULT_LENGTH.min(most.unwrap_or(DEFAULT_LENGTH)),
    };
    let tokens = tokens(info);
    if length == 0 || tokens.is_empty() {
        return Err(EngineError::precondition(format!(
            "model \"{}\" takes too few tokens, or its vocabulary is not known: give sequences to repeat",
            info.name
        )));
    }
    let mut draws = Draws::new(repeated.seed);
    let mut draw = || -> Vec<u32> {
        let mut half = Vec::with_capacity(length);
        let mut seen = HashSet::new();
        while half.len() < length {
            let token = tokens[draws.below(tokens.len())];
            // Twice within a half only when there are too few.
            if seen.insert(token) || seen.len() == tokens.len() {
                half.push(token);
            }
        }
        half
    };
    Ok((0..repeated.count).map(|_| draw()).collect())
}

/// The vocabulary without its special tokens.
fn tokens(info: &ModelInfo) -> Vec<u32> {
    let spelled = info.tokenizer.as_ref().map(|t| t.vocab);
    let sizes = [info.dims.vocab, spelled];
    let size = sizes.into_iter().flatten().min().unwrap_or(0);
    let special: HashSet<u32> = info
        .tokenizer
        .iter()
        .flat_map(|t| {
            t.special_ids
                .iter()
                .copied()
                .chain([t.pad_id])
                .chain(t.unk_id)
        })
        .collect();
    (0u32..)
        .take(size)
        .filter(|id| !special.contains(id))
        .collect()
}

fn checked(
    info: &ModelInfo,
    given: &[Vec<u32>],
    most: Option<usize>,
) -> Result<Vec<Vec<u32>>, EngineError> {
    for (at, half) in given.iter().enumerate() {
        let field = |inside: &str| format!("given[{at}].{inside}");
        if half.is_empty() {
            return Err(EngineError::invalid(
                field("ids"),
                "there are no tokens: give at least one id",
            ));
        }
        if let Some(most) = most.filter(|most| half.len() > *most) {
            return Err(EngineError::invalid(
                field("ids"),
                format!(
                    "has {} tokens: the model takes at most {most} twice",
                    half.len()
                ),
            ));
        }
        let vocab = info.dims.vocab.unwrap_or(usize::MAX);
        if let Some(n) = half.iter().position(|id| *id as usize >= vocab) {
            return Err(EngineError::invalid(
                field(&format!("ids[{n}]")),
                format!("id {} is not in the vocabulary of {vocab}", half[n]),
            ));
        }
    }
    Ok(given.to_vec())
}

/// What the template puts before and behind a text.
async fn template(handle: &ModelHandle, ctx: &Ctx) -> Result<(Vec<u32>, Vec<u32>), EngineError> {
    let text = TextInput {
        text: WORD.to_owned(),
        pair: None,
    };
    let encodings = handle
        .tokenize(vec![text], TokenizeOptions::default(), ctx)
        .await?;
    let encoding = encodings.into_iter().next().unwrap_or_default();
    let words = encoding.special.iter();
    let first = words.clone().position(|s| !s).unwrap_or(0);
    let last = words.clone().rposition(|s| !s).map_or(0, |at| at + 1);
    Ok((
        encoding.ids[..first.min(encoding.ids.len())].to_vec(),
        encoding.ids.get(last..).unwrap_or_default().to_vec(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ipc::info::TokenizerInfo, methods::testing::info};

    fn small() -> ModelInfo {
        ModelInfo {
            max_tokens: Some(21),
            tokenizer: Some(TokenizerInfo {
                vocab: 12,
                max_tokens: 21,
                pad_id: 0,
                mask_id: None,
                unk_id: None,
                special_ids: vec![1, 3],
            }),
            ..info()
        }
    }

    fn two(length: Option<usize>, seed: u64) -> Repeated {
        Repeated {
            length,
            count: 2,
            seed,
            ..Repeated::default()
        }
    }

    #[test]
    fn draws_leave_special_tokens_out_and_repeat_none_while_they_can() {
        let info = small();
        let halves = drawn(&info, &two(Some(9), 4), Some(10)).unwrap();
        assert_eq!(halves.len(), 2);
        for half in &halves {
            let distinct: HashSet<&u32> = half.iter().collect();
            assert_eq!(distinct.len(), 9, "{half:?}");
            assert!(half.iter().all(|id| ![0, 1, 3].contains(id) && *id < 12));
        }
        assert_eq!(halves, drawn(&info, &two(Some(9), 4), Some(10)).unwrap());
        assert_ne!(halves, drawn(&info, &two(Some(9), 5), Some(10)).unwrap());
        let longest = drawn(&info, &two(None, 0), room(&info).map(|n| n / 2)).unwrap();
        assert_eq!(longest[0].len(), 10, "more than there are tokens");
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let info = small();
        let field = |error: EngineError| {
            let EngineError::InvalidArgument { field, .. } = error else {
                panic!("{error:?}")
            };
            field
        };
        let error = drawn(&info, &two(Some(11), 0), Some(10)).unwrap_err();
        assert_eq!(field(error), "length");
        for (half, wanted) in [
            (vec![], "given[0].ids"),
            (vec![1; 11], "given[0].ids"),
            (vec![1, 100], "given[0].ids[1]"),
        ] {
            let error = checked(&info, &[half], Some(10)).unwrap_err();
            assert_eq!(field(error), wanted);
        }
    }
}
