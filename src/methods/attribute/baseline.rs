//! What an input is compared with, and rows of which parts are replaced by it.
//!
//! Tokens are replaced by tokens where the baseline is made of tokens; by an embedding (zero, or the mean of all) where it is not:
//! then the token embedding is moved. Of images, numbers are replaced.

use std::ops::Range;

use crate::{
    engine::{EngineError, NamedTensor, TextInput, TokenizeOptions},
    ipc::info::{InputInfo, InputRole, ModelInfo},
    methods::{
        input::{self, Token},
        subject::{Show, Subject, floats},
    },
    tensor::Tensor,
};

/// The token embedding: where tokens become vectors.
pub(super) const EMBED: &str = "hook_embed";

/// Most tokens of a row that looks embeddings up.
const LOOKUPS: usize = 256;

/// What a caller compares with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Baseline {
    /// Which.
    pub kind: Kind,
    /// Replace special tokens too.
    pub replace_special: bool,
}

/// Kinds of baselines.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Kind {
    /// Padding tokens; zero where the model takes no tokens.
    #[default]
    Default,
    /// The padding token.
    Pad,
    /// The mask token.
    Mask,
    /// The unknown token.
    Unknown,
    /// Zero, as an embedding or a pixel.
    Zero,
    /// The mean of all embeddings.
    Mean,
    /// A text of as many tokens.
    Text(String),
    /// As many tokens.
    Ids(Vec<u32>),
    /// A tensor of the shape of the input.
    Tensor(Tensor),
}

/// A baseline of a row.
#[derive(Clone, Debug)]
pub(super) struct Compared {
    /// As answers name it.
    pub(super) name: &'static str,
    with: With,
    /// Which units may be replaced.
    replaceable: Vec<bool>,
}

#[derive(Clone, Debug)]
enum With {
    /// Tokens, by their ids; the row's own where they stay.
    Ids { row: Vec<u32>, baseline: Vec<u32> },
    /// One embedding for every token.
    Embedding(Vec<f32>),
    /// Numbers of an input.
    Numbers {
        input: String,
        row: Tensor,
        baseline: Vec<f32>,
    },
}

impl Compared {
    /// Finds the baseline of a row.
    ///
    /// # Errors
    /// With paths of fields that begin at the baseline.
    pub(super) async fn find(
        baseline: &Baseline,
        subject: &mut Subject,
    ) -> Result<Self, EngineError> {
        if subject.ids_input().is_none() {
            return numbers(baseline, subject);
        }
        let given = matches!(baseline.kind, Kind::Text(_) | Kind::Ids(_));
        let tokens = &subject.tokens;
        let asked = tokens.len() - subject.objective.asked;
        let replaceable: Vec<bool> = tokens
            .iter()
            .enumerate()
            .map(|(at, t)| at < asked && (given || baseline.replace_special || !t.special))
            .collect();
        let row: Vec<u32> = tokens.iter().map(|t| t.id).collect();
        let all = |id: u32| vec![id; row.len()];
        let info = subject.info();
        let tokenizer = info.tokenizer.as_ref();
        let (name, baseline) = match &baseline.kind {
            Kind::Default | Kind::Pad => ("pad", all(tokenizer.map_or(0, |t| t.pad_id))),
            Kind::Mask => {
                let id = tokenizer.and_then(|t| t.mask_id);
                ("mask", all(id.ok_or_else(|| lacks(info, "mask"))?))
            }
            Kind::Unknown => {
                let id = tokenizer.and_then(|t| t.unk_id);
                ("unk", all(id.ok_or_else(|| lacks(info, "unknown"))?))
            }
            Kind::Ids(ids) => ("tokens", as_long(ids.clone(), &row, "tokens.ids")?),
            Kind::Text(text) => ("text", as_long(ids_of(subject, text).await?, &row, "text")?),
            Kind::Zero | Kind::Mean => {
                let (name, vector) = if baseline.kind == Kind::Zero {
                    ("zero", vec![0.0; width(subject.info())?])
                } else {
                    ("mean", mean(subject).await?)
                };
                return Ok(Self {
                    name,
                    with: With::Embedding(vector),
                    replaceable,
                });
            }
            Kind::Tensor(_) => {
                return Err(EngineError::invalid(
                    "tensor",
                    "the model takes tokens: compare with tokens, a text or a constant",
                ));
            }
        };
        if let Some(vocab) = info.dims.vocab
            && let Some(at) = baseline.iter().position(|id| *id as usize >= vocab)
        {
            return Err(EngineError::invalid(
                format!("tokens.ids[{at}]"),
                format!("id {} is not in the vocabulary of {vocab}", baseline[at]),
            ));
        }
        Ok(Self {
            name,
            with: With::Ids { row, baseline },
            replaceable,
        })
    }

    /// Units of the row.
    pub(super) fn units(&self) -> usize {
        self.replaceable.len()
    }

    /// Whether a unit can be replaced.
    pub(super) fn replaces(&self, unit: usize) -> bool {
        self.replaceable.get(unit).copied().unwrap_or_default()
    }

    /// What replaced rows need shown moved, beside what is asked of them.
    pub(super) fn show(&self, show: Show) -> Show {
        match self.with {
            With::Embedding(_) => show.moving(EMBED),
            With::Ids { .. } | With::Numbers { .. } => show,
        }
    }

    /// About what the inputs of a row weigh.
    pub(super) fn row_bytes(&self) -> usize {
        let n = self.units();
        match &self.with {
            With::Ids { .. } => n * size_of::<i64>(),
            With::Embedding(vector) => n * vector.len() * size_of::<f32>(),
            With::Numbers { .. } => n * size_of::<f32>(),
        }
    }

    /// Inputs of rows of which the units that `gone` names (row, unit) are replaced.
    pub(super) fn inputs(
        &self,
        info: &ModelInfo,
        rows: Range<usize>,
        gone: impl Fn(usize, usize) -> bool,
    ) -> Result<Vec<NamedTensor>, EngineError> {
        let n = self.units();
        let count = rows.len();
        let gone = |row, unit| self.replaces(unit) && gone(row, unit);
        match &self.with {
            With::Ids { row, baseline } => {
                let mut ids = Vec::with_capacity(count * n);
                for r in rows {
                    ids.extend((0..n).map(|u| if gone(r, u) { baseline[u] } else { row[u] }));
                }
                let input = info
                    .input(InputRole::TokenIds)
                    .ok_or_else(|| EngineError::internal("a baseline of ids without ids"))?;
                Ok(vec![input::rows_of_ids(input, count, &ids)?])
            }
            With::Embedding(vector) => {
                let mut scale = vec![1.0; count * n];
                let mut shift = vec![0.0; count * n * vector.len()];
                for (i, r) in rows.enumerate() {
                    for u in (0..n).filter(|u| gone(r, *u)) {
                        scale[i * n + u] = 0.0;
                        let at = (i * n + u) * vector.len();
                        shift[at..at + vector.len()].copy_from_slice(vector);
                    }
                }
                moved(
                    info,
                    EMBED,
                    (vec![count, n, 1], &scale),
                    (vec![count, n, vector.len()], &shift),
                )
            }
            With::Numbers {
                input,
                row,
                baseline,
            } => {
                let values = row.to_f32().map_err(EngineError::internal)?;
                let mut numbers = Vec::with_capacity(count * n);
                for r in rows {
                    numbers
                        .extend((0..n).map(|u| if gone(r, u) { baseline[u] } else { values[u] }));
                }
                let mut shape = row.shape().to_vec();
                if let Some(first) = shape.first_mut() {
                    *first = count;
                }
                Ok(vec![named(input, shape, &numbers, row.dtype())?])
            }
        }
    }

    /// How far a row of which some units are replaced is from the row itself: the cosine distance of the inputs as numbers.
    pub(super) fn cosine_distance(&self, embedding: &[f32], gone: impl Fn(usize) -> bool) -> f64 {
        let n = self.units();
        let gone = |u: usize| self.replaces(u) && gone(u);
        let pairs: Box<dyn Iterator<Item = (f64, f64)>> = match &self.with {
            With::Ids { row, baseline } => Box::new((0..n).map(move |u| {
                let there = if gone(u) { baseline[u] } else { row[u] };
                (f64::from(row[u]), f64::from(there))
            })),
            With::Embedding(vector) => {
                let width = vector.len();
                Box::new(embedding.iter().enumerate().map(move |(at, x)| {
                    let there = if gone(at / width) {
                        vector[at % width]
                    } else {
                        *x
                    };
                    (f64::from(*x), f64::from(there))
                }))
            }
            With::Numbers { row, baseline, .. } => {
                let row = row
                    .to_f32()
                    .map(std::borrow::Cow::into_owned)
                    .unwrap_or_default();
                let pairs: Vec<(f64, f64)> = row
                    .iter()
                    .enumerate()
                    .map(|(u, x)| {
                        let there = if gone(u) { baseline[u] } else { *x };
                        (f64::from(*x), f64::from(there))
                    })
                    .collect();
                Box::new(pairs.into_iter())
            }
        };
        let (mut dot, mut a, mut b) = (0.0, 0.0, 0.0);
        for (x, y) in pairs {
            dot += x * y;
            a += x * x;
            b += y * y;
        }
        // Captum's torch.cosine_similarity keeps the norms from zero by 1e-8.
        1.0 - dot / (a.sqrt().max(1e-8) * b.sqrt().max(1e-8))
    }

    /// Whether [`Self::cosine_distance`] needs the row's embedding.
    pub(super) fn is_embedding(&self) -> bool {
        matches!(self.with, With::Embedding(_))
    }
}

/// Inputs that move a hook point.
pub(in crate::methods) fn moved(
    info: &ModelInfo,
    hook: &str,
    scale: (Vec<usize>, &[f32]),
    shift: (Vec<usize>, &[f32]),
) -> Result<Vec<NamedTensor>, EngineError> {
    let dtype = info
        .hook(hook)
        .map(|h| h.dtype)
        .ok_or_else(|| no_hook(info, hook))?;
    Ok(vec![
        named(&format!("scale:{hook}"), scale.0, scale.1, dtype)?,
        named(&format!("shift:{hook}"), shift.0, shift.1, dtype)?,
    ])
}

/// Floats as an input takes them.
pub(in crate::methods) fn named(
    name: &str,
    shape: Vec<usize>,
    values: &[f32],
    dtype: crate::tensor::DType,
) -> Result<NamedTensor, EngineError> {
    let tensor = Tensor::from_f32(shape, values)
        .and_then(|t| t.cast_float(dtype))
        .map_err(EngineError::internal)?;
    Ok(NamedTensor {
        name: name.to_owned(),
        tensor,
    })
}

/// Why a hook point that a method needs is not there.
pub(in crate::methods) fn no_hook(info: &ModelInfo, hook: &str) -> EngineError {
    let missing = info.missing.iter().find(|m| m.hook == hook);
    EngineError::precondition(match missing {
        Some(m) => format!("model \"{}\" has no \"{hook}\": {}", info.name, m.reason),
        None => format!("model \"{}\" has no \"{hook}\"", info.name),
    })
}

/// The input of floats of a model that takes no tokens.
pub(super) fn float_input(subject: &Subject) -> Result<(&InputInfo, &Tensor), EngineError> {
    let info = subject.info();
    let mut floats = info.inputs.iter().filter(|i| i.dtype.is_float());
    let (Some(input), None) = (floats.next(), floats.next()) else {
        return Err(EngineError::precondition(format!(
            "model \"{}\" takes neither tokens nor one input of floats: there is nothing to attribute to",
            info.name
        )));
    };
    let given = subject.row.inputs.iter().find(|i| i.name == input.name);
    let tensor = given.map(|g| &g.tensor).ok_or_else(|| {
        EngineError::invalid(
            "input.tensors",
            format!("\"{}\" is missing: give it", input.name),
        )
    })?;
    Ok((input, tensor))
}

fn numbers(baseline: &Baseline, subject: &Subject) -> Result<Compared, EngineError> {
    let (input, row) = float_input(subject)?;
    let n = row.elements();
    let (name, values) = match &baseline.kind {
        Kind::Default | Kind::Zero => ("zero", vec![0.0; n]),
        Kind::Tensor(tensor) => {
            let fits = tensor.dtype().is_float() && tensor.shape() == row.shape();
            if !fits {
                return Err(EngineError::invalid(
                    "tensor",
                    format!(
                        "is {} {:?}: it must be floats of the shape {:?} of \"{}\"",
                        tensor.dtype(),
                        tensor.shape(),
                        row.shape(),
                        input.name
                    ),
                ));
            }
            let values = tensor.to_f32().map_err(EngineError::internal)?;
            ("tensor", values.into_owned())
        }
        Kind::Mean => {
            let values = row.to_f32().map_err(EngineError::internal)?;
            (
                "mean",
                vec![values.iter().sum::<f32>() / n.max(1) as f32; n],
            )
        }
        Kind::Pad | Kind::Mask | Kind::Unknown | Kind::Text(_) | Kind::Ids(_) => {
            return Err(EngineError::invalid(
                "kind",
                format!(
                    "model \"{}\" takes no tokens: compare with zero, the mean or a tensor",
                    subject.info().name
                ),
            ));
        }
    };
    Ok(Compared {
        name,
        with: With::Numbers {
            input: input.name.clone(),
            row: row.clone(),
            baseline: values,
        },
        replaceable: vec![true; n],
    })
}

fn lacks(info: &ModelInfo, token: &str) -> EngineError {
    EngineError::precondition(format!(
        "the tokenizer of model \"{}\" has no {token} token: choose another baseline",
        info.name
    ))
}

fn as_long(ids: Vec<u32>, row: &[u32], field: &str) -> Result<Vec<u32>, EngineError> {
    if ids.len() == row.len() {
        return Ok(ids);
    }
    Err(EngineError::invalid(
        field,
        format!(
            "is {} tokens long and the input {}: a baseline has as many",
            ids.len(),
            row.len()
        ),
    ))
}

async fn ids_of(subject: &Subject, text: &str) -> Result<Vec<u32>, EngineError> {
    let special = subject.tokens.iter().any(|t| t.special);
    let text = TextInput {
        text: text.to_owned(),
        pair: None,
    };
    let options = TokenizeOptions {
        special,
        truncate: false,
    };
    let mut encodings = subject
        .handle
        .tokenize(vec![text], options, &subject.ctx)
        .await
        .map_err(|e| input::at_field(e, "text"))?;
    let encoding = encodings
        .pop()
        .ok_or_else(|| EngineError::internal("the tokenizer answered no encoding"))?;
    Ok(encoding.ids)
}

fn width(info: &ModelInfo) -> Result<usize, EngineError> {
    let hook = info.hook(EMBED).ok_or_else(|| no_hook(info, EMBED))?;
    hook.dims.last().copied().flatten().ok_or_else(|| {
        EngineError::precondition(format!(
            "the width of \"{EMBED}\" is not known: compare with tokens"
        ))
    })
}

/// The mean embedding: every token of the vocabulary is looked up.
async fn mean(subject: &mut Subject) -> Result<Vec<f32>, EngineError> {
    let info = subject.handle.info().clone();
    let width = width(&info)?;
    let vocab = info.dims.vocab.ok_or_else(|| {
        EngineError::precondition("the size of the vocabulary is not known: compare with tokens")
    })?;
    let most = info.fixed_length.or(info.max_tokens).unwrap_or(LOOKUPS);
    let length = most.clamp(1, LOOKUPS);
    let ids: Vec<u32> = (0u32..).take(vocab).collect();
    let mut sum = vec![0.0f64; width];
    let show = Show {
        expose: [EMBED.to_owned()].into(),
        ..Show::default()
    };
    // Rows of tokens that have nothing to do with the row that is explained.
    let whole = vocab.div_ceil(length);
    let lookup = ids.clone();
    let mut other = Subject::new(
        subject.handle.clone(),
        (
            input::row(&info, &vec![0; length], &vec![0; length])?,
            vec![Token::default(); length],
        ),
        subject.objective.clone(),
        (subject.lane, subject.ctx.clone()),
    );
    let input = info
        .input(InputRole::TokenIds)
        .ok_or_else(|| EngineError::internal("no input for ids"))?;
    other
        .run(
            &show,
            (whole, length * size_of::<i64>()),
            |rows| {
                let ids: Vec<u32> = rows
                    .clone()
                    .flat_map(|r| (0..length).map(move |i| r * length + i))
                    .map(|at| lookup.get(at).copied().unwrap_or_default())
                    .collect();
                Ok(vec![input::rows_of_ids(input, rows.len(), &ids)?])
            },
            |_, rows, tensors| {
                let values = floats(tensors, 0)?;
                for (row, values) in rows.zip(values.chunks_exact(length * width)) {
                    for (i, vector) in values.chunks_exact(width).enumerate() {
                        if row * length + i < vocab {
                            for (s, v) in sum.iter_mut().zip(vector) {
                                *s += f64::from(*v);
                            }
                        }
                    }
                }
                Ok(())
            },
        )
        .await?;
    subject.spent.forward_rows += other.spent.forward_rows;
    subject.spent.tokens += other.spent.tokens;
    subject.spent.timings += other.spent.timings;
    #[allow(clippy::cast_possible_truncation)] // an embedding is single precision
    let mean = sum.iter().map(|s| (s / vocab as f64) as f32).collect();
    Ok(mean)
}
