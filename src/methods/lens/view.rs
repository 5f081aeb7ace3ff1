//! What scores say: the best labels, how undecided they are, and where the target stands among them.
//!
//! ```text
//!   p = softmax(scores)
//!   entropy         = -sum_i p_i ln p_i                     in nats
//!   target          =  sum_t weight_t score_t               the logit of a label, or of one less that of another
//!   log-probability =  ln p_t                               of the first label of the target
//!   rank            =  how many labels score higher         of the same; 0 for the best, as TransformerLens's `test_prompt`
//! ```

use crate::methods::predict;

/// What to keep of scores.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// Labels.
    pub(super) top: usize,
    /// Labels and weights of the target; empty for none.
    pub(super) target: Vec<(u32, f32)>,
    /// All scores.
    pub(super) logits: bool,
}

/// What one vector of scores says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct View {
    /// Label and score, best first.
    top: Vec<(u32, f32)>,
    /// Of each of these.
    probabilities: Vec<f32>,
    entropy: f64,
    target: Option<Followed>,
    logits: Vec<f32>,
    finite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Followed {
    value: f64,
    log_probability: f64,
    rank: u32,
}

/// What all states say at all places: `[state, place, ...]`, row-major. What was not asked for is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Views {
    /// Places of each state: positions, or one.
    pub places: usize,
    /// Labels kept of each place.
    pub kept: usize,
    /// Labels that there are.
    pub labels: usize,
    /// `[state, place, kept]`
    pub top_index: Vec<u32>,
    /// Their scores.
    pub top_logit: Vec<f32>,
    /// Their probabilities; empty where there is one label.
    pub top_probability: Vec<f32>,
    /// `[state, place]`, in nats; empty where there is one label.
    pub entropy: Vec<f64>,
    /// `[state, place]`: see the module.
    pub target: Vec<f64>,
    /// `[state, place]`; empty where there is one label.
    pub log_probability: Vec<f64>,
    /// `[state, place]`
    pub rank: Vec<u32>,
    /// `[state, place, label]`
    pub logits: Vec<f32>,
    /// Whether a score was no number, or infinite and no mask.
    pub non_finite: bool,
}

/// Reads scores.
pub(super) fn view(scores: &[f32], asked: &Asked) -> View {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let most = f64::from(most);
    let sum: f64 = scores.iter().map(|s| (f64::from(*s) - most).exp()).sum();
    let all = most + sum.ln();
    let entropy = scores
        .iter()
        .map(|s| all - f64::from(*s))
        // What has no probability is not undecided.
        .map(|surprise| match (-surprise).exp() {
            0.0 => 0.0,
            p => p * surprise,
        })
        .sum();
    let score = |label: u32| scores.get(label as usize).copied().unwrap_or(f32::NAN);
    let target = asked.target.first().map(|(first, _)| {
        let terms = asked.target.iter();
        let here = score(*first);
        let above = scores.iter().filter(|s| **s > here).count();
        Followed {
            value: terms
                .map(|(label, w)| f64::from(*w) * f64::from(score(*label)))
                .sum(),
            log_probability: f64::from(here) - all,
            rank: u32::try_from(above).unwrap_or(u32::MAX),
        }
    });
    let best = predict::best(scores, asked.top);
    View {
        top: best.iter().map(|(i, _)| (*i, score(*i))).collect(),
        probabilities: best.iter().filter_map(|(_, p)| *p).collect(),
        entropy,
        target,
        logits: if asked.logits {
            scores.to_vec()
        } else {
            Vec::new()
        },
        finite: !scores.iter().any(|s| s.is_nan() || *s == f32::INFINITY),
    }
}

impl Views {
    /// Room for what so many states say of so many labels.
    pub(super) fn new(states: usize, places: usize, labels: usize, asked: &Asked) -> Self {
        let all = states * places;
        let kept = asked.top.min(labels);
        let many = |n: usize| if labels > 1 { n } else { 0 };
        let followed = if asked.target.is_empty() { 0 } else { all };
        Self {
            places,
            kept,
            labels,
            top_index: vec![0; all * kept],
            top_logit: vec![f32::NAN; all * kept],
            top_probability: vec![f32::NAN; many(all * kept)],
            entropy: vec![f64::NAN; many(all)],
            target: vec![f64::NAN; followed],
            log_probability: vec![f64::NAN; many(followed)],
            rank: vec![0; followed],
            logits: vec![f32::NAN; if asked.logits { all * labels } else { 0 }],
            non_finite: false,
        }
    }

    /// What a state says at a place. What there is no room for was not asked.
    pub(super) fn put(&mut self, state: usize, place: usize, view: &View) {
        fn set<T: Copy>(room: &mut [T], from: usize, values: &[T]) {
            let room = room.iter_mut().skip(from);
            room.zip(values).for_each(|(at, value)| *at = *value);
        }
        let at = state * self.places + place;
        let (index, logit): (Vec<u32>, Vec<f32>) = view.top.iter().copied().unzip();
        let kept = self.kept;
        set(
            &mut self.top_index,
            at * kept,
            &index[..kept.min(index.len())],
        );
        set(
            &mut self.top_logit,
            at * kept,
            &logit[..kept.min(logit.len())],
        );
        let probabilities = &view.probabilities;
        set(
            &mut self.top_probability,
            at * kept,
            &probabilities[..kept.min(probabilities.len())],
        );
        set(&mut self.entropy, at, &[view.entropy]);
        if let Some(followed) = view.target {
            set(&mut self.target, at, &[followed.value]);
            set(&mut self.log_probability, at, &[followed.log_probability]);
            set(&mut self.rank, at, &[followed.rank]);
        }
        set(&mut self.logits, at * self.labels, &view.logits);
        self.non_finite |= !view.finite;
    }

    /// Every label that is shown, once.
    pub(super) fn shown(&self) -> Vec<u32> {
        let mut all = self.top_index.clone();
        all.sort_unstable();
        all.dedup();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(target: &[(u32, f32)]) -> Asked {
        Asked {
            top: 2,
            target: target.to_vec(),
            logits: true,
        }
    }

    #[test]
    fn equal_scores_are_wholly_undecided() {
        let view = view(&[3.0; 4], &asked(&[(2, 1.0)]));
        assert!((view.entropy - 4f64.ln()).abs() < 1e-12);
        let followed = view.target.unwrap();
        assert_eq!(followed.rank, 0, "none scores higher");
        assert!((followed.log_probability + 4f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn a_contrast_is_a_difference_and_the_rank_is_that_of_its_first() {
        let view = view(&[1.0, 5.0, 2.0], &asked(&[(2, 1.0), (0, -1.0)]));
        let followed = view.target.unwrap();
        assert_eq!((followed.value, followed.rank), (1.0, 1));
        assert_eq!(view.top, [(1, 5.0), (2, 2.0)]);
    }

    #[test]
    fn masked_labels_are_no_doubt_and_numbers_that_are_none_are_told() {
        let masked = view(&[0.0, f32::NEG_INFINITY, 0.0], &asked(&[]));
        assert!((masked.entropy - 2f64.ln()).abs() < 1e-12);
        assert!(masked.finite);
        assert!(!view(&[0.0, f32::NAN], &asked(&[])).finite);
    }

    #[test]
    fn a_view_has_its_place() {
        let asked = asked(&[(0, 1.0)]);
        let mut views = Views::new(2, 3, 4, &asked);
        views.put(1, 2, &view(&[0.0, 1.0, 2.0, 3.0], &asked));
        assert_eq!(views.top_index[10..], [3, 2]);
        assert_eq!(views.rank[5], 3);
        assert_eq!(views.logits[20..], [0.0, 1.0, 2.0, 3.0]);
        assert!(views.entropy[4].is_nan() && views.entropy[5] > 0.0);
        let one = Views::new(1, 1, 1, &asked);
        assert!(one.entropy.is_empty() && one.rank.len() == 1);
    }
}
