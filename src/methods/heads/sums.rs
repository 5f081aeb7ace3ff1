//! From patterns to means over rows. What is held: a number for each layer, head and measure, and for each offset where those are wanted.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    Detector, Measure, Named, Row, Started,
    measure::{Facts, Pattern},
};
use crate::{engine::EngineError, tensor::Tensor};

/// What the patterns of one row come to.
pub(super) struct Reduction {
    /// Which measures are taken of this row.
    measures: Vec<Option<Measure>>,
    detect: Arc<Vec<Detector>>,
    facts: Arc<Facts>,
    /// Whether the row counts for detectors and offsets.
    counts: bool,
    offsets: bool,
    /// `[layer][head][measure or detector]`; none where there is nothing to measure.
    numbers: Vec<Vec<Vec<Option<f64>>>>,
    /// `[layer][head][offset]`, of `2 n - 1` offsets.
    profile: Vec<Vec<Vec<f64>>>,
    n: usize,
    /// Layers whose pattern is not square.
    odd: BTreeSet<usize>,
    /// Numbers of given patterns; nothing of named ones.
    given: Vec<Vec<f32>>,
}

impl Reduction {
    pub(super) fn new(started: &Started, row: &Row) -> Self {
        let takes = |m: &Measure| {
            let here = if m.repeats() {
                row.facts.repeated.is_some()
            } else {
                row.counts
            };
            here.then_some(*m)
        };
        Self {
            measures: started.measures.iter().map(takes).collect(),
            detect: started.detect.clone(),
            facts: row.facts.clone(),
            counts: row.counts,
            offsets: started.offsets && row.counts,
            numbers: vec![Vec::new(); started.layers.len()],
            profile: vec![Vec::new(); started.layers.len()],
            n: 0,
            odd: BTreeSet::new(),
            given: Vec::new(),
        }
    }

    /// Takes the pattern of a layer, `[head, query, key]`.
    pub(super) fn take(&mut self, layer: usize, pattern: &Tensor) -> Result<(), EngineError> {
        let [heads, queries, keys] = *pattern.shape() else {
            return Err(EngineError::internal(format!(
                "a pattern came back as {:?}",
                pattern.shape()
            )));
        };
        if queries != keys {
            self.odd.insert(layer);
            return Ok(());
        }
        let n = queries;
        if self.given.is_empty() || self.n != n {
            self.given = self.patterns(n)?;
            self.n = n;
        }
        let values = pattern.to_f32().map_err(EngineError::internal)?;
        let mut numbers = Vec::with_capacity(heads);
        for weights in values.chunks_exact((n * n).max(1)) {
            let pattern = Pattern { n, weights };
            let measured = self.measures.iter();
            let measured = measured.map(|m| m.and_then(|m| pattern.measure(m, &self.facts)));
            let mut all: Vec<Option<f64>> = measured.collect();
            let detected = self.detect.iter().enumerate();
            all.extend(
                detected.map(|(at, d)| d.score(pattern, &self.facts.ids, self.given.get(at)?)),
            );
            numbers.push(all);
            if self.offsets {
                let mut sums = vec![0.0; 2 * n - 1];
                pattern.by_offset(&mut sums, n - 1);
                self.profile[layer].push(sums);
            }
        }
        self.numbers[layer] = numbers;
        Ok(())
    }

    /// What is looked for in a row of `n` positions; nothing in a row that does not count.
    fn patterns(&self, n: usize) -> Result<Vec<Vec<f32>>, EngineError> {
        if !self.counts {
            return Ok(Vec::new());
        }
        let each = self.detect.iter().enumerate();
        each.map(|(at, d)| {
            let made = d.pattern.given(n);
            made.map_err(|e| e.beneath(&format!("detect[{at}]")))
        })
        .collect()
    }
}

/// Sums over rows.
pub(super) struct Sums {
    /// `[layer][head][measure or detector]`: sum and count.
    numbers: Vec<Vec<Vec<(f64, u64)>>>,
    /// `[layer][head][offset]`, offset 0 in the middle.
    profile: Vec<Vec<Vec<f64>>>,
    /// Heads of each layer whose offsets came.
    seen: Vec<usize>,
    /// Numbers of a head.
    each: usize,
    /// Entries of each offset.
    entries: Vec<i64>,
    /// Layers whose pattern is not square, by number.
    odd: BTreeSet<u32>,
    layers: Vec<u32>,
}

impl Sums {
    pub(super) fn new(started: &Started, rows: &[Row]) -> Self {
        let layers = started.layers.len();
        let each = started.measures.len() + started.detect.len();
        let counted = rows.iter().filter(|r| r.counts && started.offsets);
        let longest = counted.filter_map(|r| r.length).max().unwrap_or(0);
        let offsets = (2 * longest).saturating_sub(1);
        Self {
            numbers: vec![vec![vec![(0.0, 0); each]; started.heads]; layers],
            profile: vec![vec![vec![0.0; offsets]; started.heads]; layers],
            seen: vec![0; layers],
            each,
            entries: vec![0; offsets],
            odd: BTreeSet::new(),
            layers: started.layers.clone(),
        }
    }

    /// Adds a row.
    pub(super) fn add(&mut self, row: Reduction) {
        for (layer, heads) in row.numbers.iter().enumerate() {
            widen(&mut self.numbers[layer], heads.len(), self.each);
            for (sums, numbers) in self.numbers[layer].iter_mut().zip(heads) {
                for ((sum, count), number) in sums.iter_mut().zip(numbers) {
                    if let Some(number) = number {
                        *sum += number;
                        *count += 1;
                    }
                }
            }
        }
        if row.offsets && row.n > 0 {
            self.make_room(row.n);
            let from = self.entries.len() / 2 + 1 - row.n;
            for (layer, heads) in row.profile.iter().enumerate() {
                widen(&mut self.profile[layer], heads.len(), self.entries.len());
                self.seen[layer] = self.seen[layer].max(heads.len());
                for (sums, offsets) in self.profile[layer].iter_mut().zip(heads) {
                    for (sum, more) in sums[from..].iter_mut().zip(offsets) {
                        *sum += more;
                    }
                }
            }
            for (at, entries) in self.entries[from..]
                .iter_mut()
                .take(2 * row.n - 1)
                .enumerate()
            {
                let apart = at.abs_diff(row.n - 1);
                *entries += i64::try_from(row.n - apart).unwrap_or(i64::MAX);
            }
        }
        self.odd.extend(row.odd.iter().map(|at| self.layers[*at]));
    }

    /// Offsets of a row whose length only its run told.
    fn make_room(&mut self, n: usize) {
        let missing = (2 * n - 1).saturating_sub(self.entries.len()) / 2;
        if self.entries.is_empty() {
            self.entries = vec![0; 2 * n - 1];
        } else {
            pad(&mut self.entries, missing, 0);
        }
        let wide = self.entries.len();
        for sums in self.profile.iter_mut().flatten() {
            if sums.is_empty() {
                *sums = vec![0.0; wide];
            } else {
                pad(sums, missing, 0.0);
            }
        }
    }

    /// The means, in the order of [`Started::names`].
    pub(super) fn tensors(&self, started: &Started) -> Result<Vec<Named>, EngineError> {
        let heads = self.numbers.iter().map(Vec::len).max().unwrap_or(0);
        let each = started.measures.len() + started.detect.len();
        let mut tensors = Vec::new();
        for (at, name) in started.names.iter().take(each).enumerate() {
            let values = self.numbers.iter().flat_map(|layer| {
                (0..heads).map(move |head| match layer.get(head).map(|n| n[at]) {
                    Some((sum, count)) if count > 0 => sum / count as f64,
                    Some(_) | None => f64::NAN,
                })
            });
            let values: Vec<f64> = values.collect();
            tensors.push(Named {
                name: name.clone(),
                axes: vec!["layer", "head"],
                tensor: floats(vec![self.layers.len(), heads], &values)?,
            });
        }
        if started.offsets {
            let offsets = self.entries.len();
            let mut values = Vec::with_capacity(self.layers.len() * heads * offsets);
            for (layer, seen) in self.profile.iter().zip(&self.seen) {
                for head in 0..heads {
                    let sums = layer.get(head).filter(|_| head < *seen);
                    for (at, entries) in self.entries.iter().enumerate() {
                        values.push(match sums {
                            Some(sums) => sums[at] / *entries as f64,
                            None => f64::NAN,
                        });
                    }
                }
            }
            tensors.push(Named {
                name: "offsets".to_owned(),
                axes: vec!["layer", "head", "offset"],
                tensor: floats(vec![self.layers.len(), heads, offsets], &values)?,
            });
            tensors.push(Named {
                name: "offsets.entries".to_owned(),
                axes: vec!["offset"],
                tensor: Tensor::from_i64(vec![offsets], &self.entries)
                    .map_err(EngineError::internal)?,
            });
        }
        Ok(tensors)
    }

    /// What the caller should know.
    pub(super) fn notes(&self) -> Vec<String> {
        self.odd
            .iter()
            .map(|layer| {
                format!(
                    "layer {layer} is left out where its queries are not as many as its keys: they are other positions"
                )
            })
            .collect()
    }
}

/// As many heads as a run shows.
fn widen<T: Clone + Default>(heads: &mut Vec<Vec<T>>, n: usize, each: usize) {
    if heads.len() < n {
        heads.resize(n, vec![T::default(); each]);
    }
}

/// So many more on both sides.
fn pad<T: Clone>(values: &mut Vec<T>, more: usize, with: T) {
    let mut padded = vec![with.clone(); more];
    padded.append(values);
    padded.extend(vec![with; more]);
    *values = padded;
}

fn floats(shape: Vec<usize>, values: &[f64]) -> Result<Tensor, EngineError> {
    #[allow(clippy::cast_possible_truncation)] // what the model computes is no more exact
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Tensor::from_f32(shape, &values).map_err(EngineError::internal)
}

/// The cosine of every row with every other; NaN for a row of length zero.
pub(super) fn cosines(values: &[f32], width: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = values.chunks_exact(width.max(1)).collect();
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let pairs = a.iter().zip(b);
        pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    let lengths: Vec<f64> = rows.iter().map(|r| dot(r, r).sqrt()).collect();
    let mut cosines = Vec::with_capacity(rows.len() * rows.len());
    for (a, of_a) in rows.iter().zip(&lengths) {
        for (b, of_b) in rows.iter().zip(&lengths) {
            #[allow(clippy::cast_possible_truncation)] // between -1 and 1
            cosines.push((dot(a, b) / (of_a * of_b)) as f32);
        }
    }
    cosines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_are_of_directions() {
        let found = cosines(&[3.0, 0.0, 0.0, 2.0, -1.0, 0.0], 2);
        assert_eq!(found, [1., 0., -1., 0., 1., 0., -1., 0., 1.]);
    }

    #[test]
    fn offsets_grow_around_the_middle() {
        let mut values = vec![1, 2, 3];
        pad(&mut values, 1, 0);
        assert_eq!(values, [0, 1, 2, 3, 0]);
        let mut heads: Vec<Vec<f64>> = Vec::new();
        widen(&mut heads, 2, 3);
        assert_eq!(heads, vec![vec![0.0; 3]; 2]);
    }
}
