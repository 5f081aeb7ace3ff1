//! From flags to what the wire calls an input and a selection. Their meaning is checked by the daemon.

use std::{path::PathBuf, str::FromStr};

use clap::{Args, ValueEnum};

use super::inputs;
use crate::{
    cli::error::CliError,
    service::wire::introspect::{
        DType, Input, Logits, Pooling, Selection, SparseAttention, Text, TokenIds, TopK,
        input::Kind,
    },
};

/// Most numbers that a range may stand for.
const RANGE_LIMIT: i64 = 4096;

/// How texts become tokens.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Input")]
pub(in crate::cli) struct TextArgs {
    /// Second text of a pair
    #[arg(long, value_name = "TEXT")]
    pub(in crate::cli) pair: Option<String>,
    /// Do not add special tokens such as `[CLS]`
    #[arg(long)]
    pub(in crate::cli) no_special_tokens: bool,
    /// Cut off what exceeds the model's limit, in place of an error
    #[arg(long)]
    pub(in crate::cli) truncate: bool,
}

impl TextArgs {
    /// A text, treated so.
    pub(in crate::cli) fn text(&self, text: &str) -> Text {
        Text {
            text: text.to_owned(),
            pair: self.pair.clone(),
            no_special_tokens: self.no_special_tokens,
            truncate: self.truncate,
        }
    }

    /// The same as an input.
    pub(in crate::cli) fn input(&self, text: &str) -> Input {
        Input {
            kind: Some(Kind::Text(self.text(text))),
        }
    }
}

/// Inputs other than text.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Input")]
pub(in crate::cli) struct OtherArgs {
    /// Run the model on these token ids, special tokens included
    #[arg(
        long,
        value_name = "ID,...",
        value_delimiter = ',',
        conflicts_with = "text"
    )]
    ids: Vec<u32>,
    /// Run the model on tensors: an .npz with an array for each input, batch axis (of 1) included
    #[arg(long, value_name = "FILE.npz", conflicts_with_all = ["text", "ids"])]
    inputs: Option<PathBuf>,
}

impl OtherArgs {
    /// The input, if one of these was given.
    pub(in crate::cli) fn input(&self) -> Result<Option<Input>, CliError> {
        Ok(match &self.inputs {
            Some(path) => Some(Input {
                kind: Some(Kind::Tensors(inputs::read(path)?)),
            }),
            None => (!self.ids.is_empty()).then(|| of_ids(&self.ids)),
        })
    }
}

/// Token ids as an input.
pub(in crate::cli) fn of_ids(ids: &[u32]) -> Input {
    let tokens = TokenIds {
        ids: ids.to_vec(),
        type_ids: Vec::new(),
    };
    Input {
        kind: Some(Kind::Tokens(tokens)),
    }
}

/// What to bring back, entry for entry.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "What to bring back")]
pub(in crate::cli) struct DenseArgs {
    /// Hook points: names, kinds such as `pattern`, patterns such as `blocks.*.attn.*`, `value:NAME`
    #[arg(long, short = 'k', value_name = "NAME,...", value_delimiter = ',')]
    hooks: Vec<String>,
    /// Of these layers only, such as 0,4-7
    #[arg(long, value_name = "N,...")]
    layers: Option<Numbers>,
    /// Of these heads only
    #[arg(long, value_name = "N,...")]
    heads: Option<Numbers>,
    /// Of these positions only (of attentions: queries); negative ones count from the end, as in --positions=-1
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    pub(super) positions: Vec<i32>,
    /// Reduce the positions of hook points that are no attention
    #[arg(long, value_enum)]
    pooling: Option<PoolingArg>,
    /// How much of the model's own output comes along; `none` does not even run what lies behind the deepest hook point
    #[arg(long, value_enum, default_value = "prediction")]
    logits: LogitsArg,
    /// Candidates of the prediction
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    candidates: u32,
}

impl DenseArgs {
    /// On the wire.
    pub(in crate::cli) fn selection(&self) -> Selection {
        Selection {
            hooks: self.hooks.clone(),
            layers: numbers(self.layers.as_ref()),
            heads: self.heads(),
            positions: self.positions.clone(),
            pooling: self
                .pooling
                .map_or(Pooling::Unspecified, PoolingArg::wire)
                .into(),
            logits: self.logits.wire().into(),
            candidates: self.candidates,
            ..Selection::default()
        }
    }

    /// The heads that were named; none for all.
    pub(super) fn heads(&self) -> Vec<u32> {
        numbers(self.heads.as_ref())
    }
}

/// What to bring back, and how much of it.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "What to bring back")]
pub(super) struct SelectionArgs {
    #[command(flatten)]
    pub(super) dense: DenseArgs,
    /// Of hook points that are no attention, only the K greatest along the last axis
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// With --top-k: greatest by absolute value
    #[arg(long, requires = "top_k")]
    by_magnitude: bool,
    /// Of attentions, only the K keys that each query attends to most [default: 8]
    #[arg(long, value_name = "K", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    sparse: Option<u32>,
    /// With --sparse: leave out smaller weights [default: 0.005]
    #[arg(long, value_name = "WEIGHT", requires = "sparse")]
    sparse_floor: Option<f32>,
    /// Type to send floats in
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DTypeArg,
}

impl SelectionArgs {
    /// On the wire. Without `--hooks`, these.
    pub(super) fn selection(&self, default_hooks: &[&str]) -> Selection {
        let dense = self.dense.selection();
        let hooks = if dense.hooks.is_empty() {
            default_hooks.iter().map(|h| (*h).to_owned()).collect()
        } else {
            dense.hooks
        };
        Selection {
            hooks,
            top_k: self.top_k.map(|k| TopK {
                k,
                by_magnitude: self.by_magnitude,
            }),
            sparse_attention: self.sparse.map(|top_k| SparseAttention {
                top_k,
                floor: self.sparse_floor,
            }),
            dtype: self.dtype.wire().into(),
            ..dense
        }
    }
}

/// The numbers; none for all.
pub(in crate::cli) fn numbers(numbers: Option<&Numbers>) -> Vec<u32> {
    numbers.map(|n| n.0.clone()).unwrap_or_default()
}

/// Numbers and ranges, such as `0,4-7`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct Numbers(Vec<u32>);

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        ranges(text).map(Self)
    }
}

/// Numbers and ranges, such as `0,4-7`; of a type that has negative ones also `-4--1`.
///
/// # Errors
/// The part that is none, for people.
pub(in crate::cli) fn ranges<N: TryFrom<i64>>(text: &str) -> Result<Vec<N>, String> {
    let mut numbers = Vec::new();
    for part in text.split(',').map(str::trim) {
        let wrong = || format!("\"{part}\" is no number and no range: write 0,4-7");
        let (from, to) = ends(part).ok_or_else(wrong)?;
        if (from < 0) != (to < 0) {
            return Err(format!(
                "\"{part}\" counts from the end and from the start: give a range of each"
            ));
        }
        if to < from || to - from >= RANGE_LIMIT {
            return Err(format!(
                "\"{part}\" is no range of at most {RANGE_LIMIT} numbers"
            ));
        }
        for number in from..=to {
            numbers.push(N::try_from(number).map_err(|_| wrong())?);
        }
    }
    Ok(numbers)
}

/// Both ends of a range; a number is one by itself. What stands first is a sign and no hyphen.
fn ends(part: &str) -> Option<(i64, i64)> {
    let number = |n: &str| n.trim().parse::<i64>().ok();
    if let Some(only) = number(part) {
        return Some((only, only));
    }
    let (from, to) = part.split_at_checked(1 + part.get(1..)?.find('-')?)?;
    Some((number(from)?, number(to.get(1..)?)?))
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(in crate::cli) enum PoolingArg {
    /// Arithmetic mean
    Mean,
    /// The first position
    Cls,
    /// The last position
    Last,
    /// Greatest value of each feature
    Max,
}

impl PoolingArg {
    pub(in crate::cli) fn wire(self) -> Pooling {
        match self {
            PoolingArg::Mean => Pooling::Mean,
            PoolingArg::Cls => Pooling::Cls,
            PoolingArg::Last => Pooling::Last,
            PoolingArg::Max => Pooling::Max,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug, Default)]
enum DTypeArg {
    #[default]
    F32,
    F16,
    Bf16,
}

impl DTypeArg {
    fn wire(self) -> DType {
        match self {
            DTypeArg::F32 => DType::F32,
            DTypeArg::F16 => DType::F16,
            DTypeArg::Bf16 => DType::Bf16,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug, Default)]
enum LogitsArg {
    /// What the prediction is read from
    #[default]
    Prediction,
    /// The whole output
    All,
    /// Nothing, and no prediction
    None,
}

impl LogitsArg {
    fn wire(self) -> Logits {
        match self {
            LogitsArg::Prediction => Logits::Unspecified,
            LogitsArg::All => Logits::All,
            LogitsArg::None => Logits::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_numbers_in_their_order() {
        assert_eq!("7,0-2".parse(), Ok(Numbers(vec![7, 0, 1, 2])));
        assert_eq!("3".parse(), Ok(Numbers(vec![3])));
        for wrong in ["", "a", "2-", "-1", "5-2", "1,,2", "0-4294967295"] {
            assert!(wrong.parse::<Numbers>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn ranges_may_count_from_the_end() {
        assert_eq!(
            ranges::<i32>("-3--1, 0-1,-7"),
            Ok(vec![-3, -2, -1, 0, 1, -7])
        );
        for wrong in [
            "-1-2",
            "-1--3",
            "2--1",
            "--1",
            "-",
            "é-1",
            "-9223372036854775808-9223372036854775807",
        ] {
            assert!(ranges::<i32>(wrong).is_err(), "{wrong:?}");
        }
    }
}
