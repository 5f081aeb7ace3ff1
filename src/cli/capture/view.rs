//! The attention patterns of a capture, as pictures need them.

use ndarray::{Array2, Array3, Axis};

use crate::{
    cli::{
        assemble::{Captured, Data, Named, Sparse},
        error::CliError,
        out::{clean, line},
        picture::{Attention, Layer},
    },
    service::wire::introspect::{Candidate, Prediction, Token},
};

/// How the names of attention patterns end.
const PATTERN: &str = ".attn.hook_pattern";

/// Every pattern that came. `heads` are those that were asked for, none for all.
pub(in crate::cli) fn attention(captured: &Captured, heads: &[u32]) -> Result<Attention, CliError> {
    let header = &captured.header;
    let mut layers = Vec::new();
    for named in &captured.tensors {
        if let Some(index) = layer(&named.name) {
            layers.push(Layer {
                index,
                heads: patterns(named, heads)
                    .map_err(|why| CliError::new(format!("\"{}\": {why}", named.name)))?,
            });
        }
    }
    layers.sort_by_key(|l| l.index);
    let positions = layers
        .iter()
        .flat_map(|l| &l.heads)
        .map(|(_, p)| p.ncols())
        .max()
        .unwrap_or(0);
    Ok(Attention {
        model: header.model.clone(),
        prediction: captured
            .prediction
            .as_ref()
            .map(headline)
            .unwrap_or_default(),
        tokens: labels(&header.tokens, positions),
        layers,
    })
}

/// The layer of an attention pattern's name.
pub(in crate::cli) fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("blocks.")?
        .strip_suffix(PATTERN)?
        .parse()
        .ok()
}

/// A label for each position: its token, or its number where there are none.
fn labels(tokens: &[Token], positions: usize) -> Vec<String> {
    let positions = match tokens.len() {
        0 => positions,
        tokens => tokens,
    };
    let name = |at: usize| spelled(tokens, at).unwrap_or_else(|| at.to_string());
    (0..positions).map(name).collect()
}

/// How the token of a position is spelled; nothing without a tokenizer.
pub(in crate::cli) fn spelled(tokens: &[Token], at: usize) -> Option<String> {
    let text = &tokens.get(at)?.text;
    (!text.is_empty()).then(|| clean(text))
}

fn patterns(named: &Named, heads: &[u32]) -> Result<Vec<(usize, Array2<f32>)>, String> {
    if named.axes != ["head", "query", "key"] {
        return Err(format!(
            "axes are [{}]; a picture needs [head, query, key]",
            named.axes.join(", ")
        ));
    }
    let all = dense(named)?;
    Ok(all
        .axis_iter(Axis(0))
        .enumerate()
        .map(|(i, pattern)| {
            let head = heads.get(i).map_or(i, |h| *h as usize);
            (head, pattern.to_owned())
        })
        .collect())
}

/// The weights in three axes; what a sparse pattern leaves out is drawn as nothing.
fn dense(named: &Named) -> Result<Array3<f32>, String> {
    let &[heads, queries, keys] = named.shape() else {
        return Err("it has not three axes".into());
    };
    let values = match &named.data {
        Data::Dense(tensor) => tensor.to_f32().map_err(|e| e.to_string())?.into_owned(),
        Data::Sparse(sparse) => filled(sparse)?,
    };
    Array3::from_shape_vec((heads, queries, keys), values).map_err(|e| e.to_string())
}

/// Largest sparse tensor that is made dense for a picture, in elements.
const FILL_LIMIT: usize = 1 << 28;

fn filled(sparse: &Sparse) -> Result<Vec<f32>, String> {
    let last = sparse.shape.last().copied().unwrap_or(0);
    let size = sparse
        .counts
        .len()
        .checked_mul(last)
        .filter(|n| *n <= FILL_LIMIT);
    let mut all = vec![0.0; size.ok_or("it is too large for a picture")?];
    let values = sparse.values.to_f32().map_err(|e| e.to_string())?;
    let mut entry = 0;
    for (row, count) in sparse.counts.iter().enumerate() {
        for _ in 0..*count {
            all[row * last + sparse.indices[entry] as usize] = values[entry];
            entry += 1;
        }
    }
    Ok(all)
}

/// The best candidate in a line, such as `positive (0.98)`.
fn headline(prediction: &Prediction) -> String {
    match &prediction.at[..] {
        [at] => at.candidates.first().map(best).unwrap_or_default(),
        _ => String::new(),
    }
}

fn best(c: &Candidate) -> String {
    let label = line(&c.label);
    match c.probability {
        Some(p) => format!("{label} ({p:.2})"),
        None => format!("{label} ({:.2})", c.logit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    #[test]
    fn only_patterns_of_blocks_are_drawn() {
        assert_eq!(layer("blocks.11.attn.hook_pattern"), Some(11));
        for other in [
            "blocks.0.attn.hook_attn_scores",
            "value:blocks.0.attn.hook_pattern",
            "logits",
        ] {
            assert_eq!(layer(other), None, "{other}");
        }
    }

    #[test]
    fn a_sparse_pattern_shows_what_was_kept_where_it_was() {
        let named = Named {
            name: "blocks.0.attn.hook_pattern".into(),
            axes: ["head", "query", "key"].map(String::from).to_vec(),
            data: Data::Sparse(Sparse {
                shape: vec![1, 2, 3],
                counts: vec![2, 1],
                indices: vec![2, 0, 1],
                values: Tensor::from_f32(vec![3], &[0.6, 0.3, 0.9]).unwrap(),
            }),
        };
        let heads = patterns(&named, &[5]).unwrap();
        assert_eq!(heads[0].0, 5, "the head that was asked for");
        assert_eq!(
            heads[0].1,
            ndarray::array![[0.3, 0.0, 0.6], [0.0, 0.9, 0.0]]
        );
    }
}
