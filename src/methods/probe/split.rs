//! Which rows a probe is trained on, and which judge it.
//!
//! Rows of one example (the tokens of a text) are no strangers to each other: they are on one side of a split, in one fold, in one block of
//! a code, and drawn together by a bootstrap.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::fit::Targets;
use crate::methods::attribute::draw::Draws;

/// Which rows are trained on, and which judge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Trained on, example by example in an order that was drawn: curves and codes take them from the front.
    pub train: Vec<usize>,
    /// Judged by, example by example.
    pub test: Vec<usize>,
    /// Where the rows of each example end.
    train_ends: Vec<usize>,
    test_ends: Vec<usize>,
}

impl Split {
    /// Draws a part of the examples to judge by, with all of their rows: of each class the same part, where rows have classes. An example
    /// whose rows have several counts as one of the rarest. `examples` says which example each row is of.
    pub fn drawn(targets: &Targets, examples: &[usize], fraction: f64, seed: u64) -> Self {
        let rows: Vec<usize> = (0..targets.len()).collect();
        let rarest = rarest(targets);
        let mut groups: BTreeMap<usize, Vec<Vec<usize>>> = BTreeMap::new();
        for example in together(&rows, examples) {
            let group = groups.entry(rarest(&example)).or_default();
            group.push(example);
        }
        let mut draws = Draws::new(seed);
        let (mut train, mut test) = (Vec::new(), Vec::new());
        for examples in groups.into_values() {
            let order = draws.permutation(examples.len());
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a part of it
            let held = (examples.len() as f64 * fraction).round() as usize;
            // A class of one example is trained on, a class of two has one on either side.
            let held = held.clamp(
                usize::from(examples.len() > 1),
                examples.len().saturating_sub(1),
            );
            for (at, example) in order.into_iter().enumerate() {
                let part = if at < held { &mut test } else { &mut train };
                part.extend_from_slice(&examples[example]);
            }
        }
        train.sort_unstable();
        test.sort_unstable();
        Self::said(&train, &test, examples, seed)
    }

    /// All of so many rows are trained on, and nothing judges.
    pub fn unjudged(rows: usize) -> Self {
        Self {
            train: (0..rows).collect(),
            test: Vec::new(),
            train_ends: (1..=rows).collect(),
            test_ends: Vec::new(),
        }
    }

    /// Of rows that the caller named.
    pub fn said(train: &[usize], test: &[usize], examples: &[usize], seed: u64) -> Self {
        let known = together(train, examples);
        let order = Draws::new(seed ^ 0xc0de).permutation(known.len());
        let (train, train_ends) = in_a_row(order.into_iter().map(|at| &known[at][..]));
        let asked = together(test, examples);
        let (test, test_ends) = in_a_row(asked.iter().map(|example| &example[..]));
        Self {
            train,
            test,
            train_ends,
            test_ends,
        }
    }

    /// Where the rows of each example that judges end.
    pub fn test_ends(&self) -> &[usize] {
        &self.test_ends
    }

    /// So many training rows, and those that are left of the last example.
    pub fn whole(&self, rows: usize) -> usize {
        let at = self.train_ends.partition_point(|end| *end < rows);
        self.train_ends.get(at).copied().unwrap_or(rows)
    }

    /// Training rows by their place, in so many folds of which each has the same share of every class. No example is in two of them.
    pub fn folds(&self, known: &Targets, folds: usize) -> Vec<BTreeSet<usize>> {
        let rarest = rarest(known);
        let mut begin = 0;
        let mut examples: Vec<(usize, Vec<usize>)> = Vec::with_capacity(self.train_ends.len());
        for end in &self.train_ends {
            let rows: Vec<usize> = (begin..*end).collect();
            examples.push((rarest(&rows), rows));
            begin = *end;
        }
        examples.sort_by_key(|(class, _)| *class);
        let mut found = vec![BTreeSet::new(); folds];
        for (at, (_, rows)) in examples.into_iter().enumerate() {
            found[at % folds].extend(rows);
        }
        found.retain(|fold| !fold.is_empty());
        found
    }
}

/// The class of rows of which there are the fewest among all; 0 for numbers.
fn rarest(targets: &Targets) -> impl Fn(&[usize]) -> usize {
    let counts = match targets {
        Targets::Classes(of, classes) => {
            let mut counts = vec![0usize; *classes];
            of.iter().for_each(|c| counts[*c] += 1);
            counts
        }
        Targets::Numbers(_) => Vec::new(),
    };
    move |rows| match targets {
        Targets::Classes(of, _) => {
            let classes = rows.iter().map(|r| of[*r]);
            classes.min_by_key(|c| (counts[*c], *c)).unwrap_or(0)
        }
        Targets::Numbers(_) => 0,
    }
}

/// The rows of each example, in the order of the first of them.
fn together(rows: &[usize], examples: &[usize]) -> Vec<Vec<usize>> {
    let mut places: HashMap<usize, usize> = HashMap::new();
    let mut found: Vec<Vec<usize>> = Vec::new();
    for row in rows {
        let place = *places.entry(examples[*row]).or_insert(found.len());
        match found.get_mut(place) {
            Some(example) => example.push(*row),
            None => found.push(vec![*row]),
        }
    }
    found
}

/// The rows of examples one after the other, and where each example ends.
fn in_a_row<'a>(examples: impl Iterator<Item = &'a [usize]>) -> (Vec<usize>, Vec<usize>) {
    let (mut rows, mut ends) = (Vec::new(), Vec::new());
    for example in examples {
        rows.extend_from_slice(example);
        ends.push(rows.len());
    }
    (rows, ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row is an example.
    fn of_their_own(rows: usize) -> Vec<usize> {
        (0..rows).collect()
    }

    #[test]
    fn splits_keep_the_share_of_each_class_and_repeat() {
        let of: Vec<usize> = (0..100).map(|i| usize::from(i % 10 == 0)).collect();
        let targets = Targets::Classes(of.clone(), 2);
        let split = Split::drawn(&targets, &of_their_own(100), 0.2, 9);
        assert_eq!((split.train.len(), split.test.len()), (80, 20));
        assert_eq!(split.test.iter().filter(|r| of[**r] == 1).count(), 2);
        for (seed, same) in [(9, true), (10, false)] {
            let again = Split::drawn(&targets, &of_their_own(100), 0.2, seed);
            assert_eq!(split == again, same);
        }
        let mut all = [split.train, split.test].concat();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn rows_of_an_example_stay_together() {
        // Twenty examples of five rows, of which the last two follow the others; every fourth has one row of the rare class.
        let examples: Vec<usize> = (0..60)
            .map(|r| r / 3)
            .chain((0..40).map(|r| r / 2))
            .collect();
        let of: Vec<usize> = (0..100)
            .map(|row| usize::from(row < 60 && row % 12 == 3))
            .collect();
        let targets = Targets::Classes(of.clone(), 2);
        let split = Split::drawn(&targets, &examples, 0.2, 4);
        let named =
            |rows: &[usize]| -> BTreeSet<usize> { rows.iter().map(|row| examples[*row]).collect() };
        assert!(named(&split.train).is_disjoint(&named(&split.test)));
        assert_eq!((split.train.len(), split.test.len()), (80, 20));
        assert_eq!(split.test.iter().filter(|r| of[**r] == 1).count(), 1);
        assert_eq!(split.test_ends(), [5, 10, 15, 20]);
        for (rows, whole) in [(1, 5), (5, 5), (6, 10), (80, 80)] {
            assert_eq!(split.whole(rows), whole);
            assert_eq!(named(&split.train[..whole]).len(), whole / 5);
        }
        let folds = split.folds(&targets.of(&split.train), 4);
        let known = |fold: &BTreeSet<usize>| {
            let rows: Vec<usize> = fold.iter().map(|at| split.train[*at]).collect();
            let rare = rows.iter().filter(|r| of[**r] == 1).count();
            (named(&rows).len(), rare)
        };
        assert_eq!(folds.iter().map(known).collect::<Vec<_>>(), [(4, 1); 4]);
    }
}
