//! The texts in which a neuron is most active: at most so many, each by its most active token, with that token's neighbours.

use std::{cmp::Ordering, sync::Arc};

use super::{Search, Source};

/// What the id of a text takes, about.
const ID_BYTES: usize = 32;

/// A place where a neuron is active.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// The caller's id of the text.
    pub id: Arc<str>,
    /// Its number.
    pub number: u64,
    /// Number of the token.
    pub position: usize,
    /// How active.
    pub activation: f32,
    /// Number of the first token of the neighbourhood.
    pub first: usize,
    /// Ids of the neighbourhood; empty where there are none.
    pub ids: Box<[u32]>,
    /// Activations of the neighbourhood.
    pub activations: Box<[f32]>,
}

/// Bytes that a neuron's examples take.
pub(super) fn bytes(search: &Search) -> usize {
    let around = 2 * search.context + 1;
    let each = size_of::<Example>() + around * (size_of::<u32>() + size_of::<f32>()) + ID_BYTES;
    search.examples.saturating_mul(each)
}

/// The best examples of a neuron, the best first.
#[derive(Clone, Debug, Default)]
pub(super) struct Best(Vec<Example>);

impl Best {
    /// Takes an example if it is among the `most` best. Of equal ones the text that came first is better, in whatever order they are
    /// offered.
    pub(super) fn offer(
        &mut self,
        most: usize,
        (activation, number): (f32, u64),
        make: impl FnOnce() -> Example,
    ) {
        let better = |held: &Example| match held.activation.total_cmp(&activation) {
            Ordering::Greater => true,
            Ordering::Equal => held.number < number,
            Ordering::Less => false,
        };
        let at = self.0.partition_point(better);
        if at >= most {
            return;
        }
        if self.0.len() >= most {
            self.0.pop();
        }
        self.0.insert(at, make());
    }

    /// All of them.
    pub(super) fn examples(&self) -> Vec<Example> {
        self.0.clone()
    }
}

/// An example out of `[pos, neuron]`.
pub(super) fn made(
    (values, width, index): (&[f32], usize, usize),
    (activation, position, context): (f32, usize, usize),
    source: &Source,
) -> Example {
    let positions = values.len() / width.max(1);
    let first = position.saturating_sub(context);
    let end = positions.min(position + context + 1);
    Example {
        id: source.id.clone(),
        number: source.number,
        position,
        activation,
        first,
        ids: source.ids.get(first..end).unwrap_or_default().into(),
        activations: (first..end).map(|p| values[p * width + index]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::methods::neurons::Set;

    fn example(activation: f32, number: u64) -> Example {
        let source = Source {
            id: Arc::from("x"),
            number,
            set: Set::A,
            ids: vec![4, 5, 6],
        };
        let values = [0.0, 1.0, activation, 3.0, 4.0, 5.0];
        made((&values, 2, 0), (activation, 1, 1), &source)
    }

    #[test]
    fn an_example_has_its_neighbours() {
        let found = example(7.0, 3);
        assert_eq!(found.ids[..], [4, 5, 6]);
        assert_eq!(found.activations[..], [0.0, 7.0, 4.0]);
        assert_eq!((found.first, found.position), (0, 1));
    }

    proptest! {
        #[test]
        fn the_best_are_kept_in_whatever_order_they_come(
            values in prop::collection::vec(-3i8..3, 0..30),
            order in any::<u64>(),
            most in 1usize..6,
        ) {
            let mut all: Vec<(f32, u64)> = values.iter().map(|v| f32::from(*v)).zip(0..).collect();
            let mut wanted = all.clone();
            wanted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            wanted.truncate(most);
            let turn = all.len().max(1);
            all.rotate_left(usize::try_from(order).unwrap_or(0) % turn);
            let mut best = Best::default();
            for (activation, number) in all {
                best.offer(most, (activation, number), || example(activation, number));
            }
            let found: Vec<(f32, u64)> = best.examples().iter().map(|e| (e.activation, e.number)).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
