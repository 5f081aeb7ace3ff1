//! Which of the waiting rows run together: arithmetic only, no clock and no channel.
//!
//! Cost is padded tokens: rows times the length of the longest. Each run also has a fixed cost (kernel launches, the
//! way to the worker), expressed in tokens as `overhead`, learned by [`CostModel`]. [`choose`] cuts the waiting rows,
//! sorted by length, into the runs that cost least in total, and returns the one that holds the head of the queue:
//! so short rows do not pay for long ones where a run of their own is cheaper, and do where it is not.
//!
//! Bounds: a run has at most `budget` padded tokens, `rows` rows, and brings back at most `bytes`. A single row above them
//! runs alone (that it is within the model's own limit was checked before it was queued). Without padding (`pads`
//! false) only equal lengths meet. It leaves out fairness: candidates come in the order of turns, the head first.

use std::{ops::Range, time::Duration};

/// Bounds and prices of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunLimits {
    /// Most padded tokens in a run.
    pub budget: usize,
    /// Most rows in a run.
    pub rows: usize,
    /// Most bytes that a run brings back.
    pub bytes: usize,
    /// Rows of different lengths may share a run.
    pub pads: bool,
    /// Fixed cost of a run, in tokens.
    pub overhead: f64,
}

impl RunLimits {
    /// Whether so many rows of this length, bringing back so many bytes, are within the bounds.
    fn hold(&self, rows: usize, length: usize, bytes: usize) -> bool {
        rows <= self.rows && padded_tokens(rows, length) <= self.budget && bytes <= self.bytes
    }

    /// How many rows of a candidate fit into a run of this length that has so much in it already.
    fn room(&self, rows: usize, length: usize, bytes: usize, each: usize) -> usize {
        let by_tokens = (self.budget / length.max(1))
            .min(self.rows)
            .saturating_sub(rows);
        let by_bytes = match each {
            0 => usize::MAX,
            each => self.bytes.saturating_sub(bytes) / each,
        };
        by_tokens.min(by_bytes)
    }
}

/// Rows of one length that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Tokens of each row.
    pub length: usize,
    /// Rows that wait.
    pub rows: usize,
    /// Bytes that each row brings back.
    pub bytes: usize,
}

/// Rows to take of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Index of the candidate.
    pub candidate: usize,
    /// The first so many of its rows.
    pub rows: usize,
}

/// The run that holds (at least a row of) candidate 0, in the order of the candidates.
pub fn choose(candidates: &[Candidate], limits: &RunLimits) -> Vec<Taken> {
    let Some(head) = candidates.first() else {
        return Vec::new();
    };
    // What a run can hold of each candidate; the rest of a large one is for later runs.
    let capped: Vec<Candidate> = candidates
        .iter()
        .map(|c| Candidate {
            rows: c.rows.min(limits.room(0, c.length, 0, c.bytes).max(1)),
            ..*c
        })
        .collect();
    let mut order: Vec<usize> = (0..capped.len())
        .filter(|i| limits.pads || capped[*i].length == head.length)
        .collect();
    order.sort_by_key(|i| capped[*i].length); // stable: turns are kept among equals
    let group = cheapest_group(&order, &capped, limits);
    top_up(&group, candidates, &capped, limits)
}

/// Optimal cut of the rows in `order` into consecutive runs, by dynamic programming; returns the run with candidate 0.
fn cheapest_group(order: &[usize], capped: &[Candidate], limits: &RunLimits) -> Vec<usize> {
    // best[j] is the least cost of the first j of `order`, and where the last of their runs begins.
    let mut best: Vec<(f64, usize)> = vec![(0.0, 0)];
    for end in 1..=order.len() {
        let length = capped[order[end - 1]].length;
        let (mut rows, mut bytes) = (0, 0usize);
        let mut least = (f64::INFINITY, end - 1);
        for begin in (0..end).rev() {
            let candidate = capped[order[begin]];
            rows += candidate.rows;
            bytes = bytes.saturating_add(candidate.rows.saturating_mul(candidate.bytes));
            if begin + 1 < end && !limits.hold(rows, length, bytes) {
                break;
            }
            #[allow(clippy::cast_precision_loss)] // token counts are small
            let cost = best[begin].0 + limits.overhead + padded_tokens(rows, length) as f64;
            if cost <= least.0 {
                least = (cost, begin);
            }
        }
        best.push(least);
    }
    let mut end = order.len();
    while end > 0 {
        let begin = best[end].1;
        if order[begin..end].contains(&0) {
            return order[begin..end].to_vec();
        }
        end = begin;
    }
    vec![0]
}

/// Room that is left goes to rows as long as the longest that the cut put into a neighbouring run: they bring no padding.
fn top_up(
    group: &[usize],
    candidates: &[Candidate],
    capped: &[Candidate],
    limits: &RunLimits,
) -> Vec<Taken> {
    let longest = group.iter().map(|i| capped[*i].length).max().unwrap_or(1);
    let mut rows = 0;
    let mut bytes = 0usize;
    let mut taken = Vec::with_capacity(group.len());
    for index in group {
        rows += capped[*index].rows;
        bytes = bytes.saturating_add(capped[*index].rows.saturating_mul(capped[*index].bytes));
        taken.push(Taken {
            candidate: *index,
            rows: capped[*index].rows,
        });
    }
    for (index, candidate) in candidates.iter().enumerate() {
        if candidate.length != longest || group.contains(&index) {
            continue;
        }
        let more = candidate
            .rows
            .min(limits.room(rows, longest, bytes, candidate.bytes));
        if more > 0 {
            rows += more;
            bytes = bytes.saturating_add(more.saturating_mul(candidate.bytes));
            taken.push(Taken {
                candidate: index,
                rows: more,
            });
        }
    }
    taken.sort_unstable_by_key(|t| t.candidate);
    taken
}

/// Padded tokens of a run.
pub fn padded_tokens(rows: usize, longest: usize) -> usize {
    rows.saturating_mul(longest.max(1))
}

/// Learns what a run costs: `micros = fixed + slope * padded tokens`, by least squares over a fading memory.
#[derive(Clone, Debug)]
pub struct CostModel {
    weight: f64,
    tokens: f64,
    micros: f64,
    tokens_squared: f64,
    tokens_micros: f64,
}

/// What a run adds in tokens before anything was measured.
const OVERHEAD_PRIOR: f64 = 16.0;
/// Share of the memory that a new run keeps of the old ones.
const FADING: f64 = 0.98;
/// Bounds of the learned overhead, in tokens.
const OVERHEAD_RANGE: Range<f64> = 1.0..512.0;

impl Default for CostModel {
    fn default() -> Self {
        Self {
            weight: 0.0,
            tokens: 0.0,
            micros: 0.0,
            tokens_squared: 0.0,
            tokens_micros: 0.0,
        }
    }
}

impl CostModel {
    /// A run of so many padded tokens took so long.
    pub fn observe(&mut self, tokens: usize, micros: f64) {
        if !micros.is_finite() || micros <= 0.0 {
            return;
        }
        #[allow(clippy::cast_precision_loss)] // token counts are small
        let tokens = tokens as f64;
        for sum in [
            &mut self.weight,
            &mut self.tokens,
            &mut self.micros,
            &mut self.tokens_squared,
            &mut self.tokens_micros,
        ] {
            *sum *= FADING;
        }
        self.weight += 1.0;
        self.tokens += tokens;
        self.micros += micros;
        self.tokens_squared += tokens * tokens;
        self.tokens_micros += tokens * micros;
    }

    /// `(fixed micros, micros per token)`, once runs of different sizes were seen.
    fn line(&self) -> Option<(f64, f64)> {
        if self.weight < 4.0 {
            return None;
        }
        let spread = self.weight * self.tokens_squared - self.tokens * self.tokens;
        if spread <= 1e-3 * self.weight * self.tokens_squared {
            return None;
        }
        let slope = (self.weight * self.tokens_micros - self.tokens * self.micros) / spread;
        let fixed = (self.micros - slope * self.tokens) / self.weight;
        (slope > 0.0).then_some((fixed, slope))
    }

    /// Fixed cost of a run, in tokens.
    pub fn overhead(&self) -> f64 {
        match self.line() {
            Some((fixed, slope)) => (fixed / slope).clamp(OVERHEAD_RANGE.start, OVERHEAD_RANGE.end),
            None => OVERHEAD_PRIOR,
        }
    }

    /// Tokens that a run may have to end within this time, by the average of what was seen; none before anything was.
    pub fn tokens_within(&self, time: Duration) -> Option<usize> {
        if self.micros <= 0.0 {
            return None;
        }
        let tokens = time.as_secs_f64() * 1e6 * self.tokens / self.micros;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // positive, and saturates
        Some((tokens as usize).max(1))
    }

    /// Microseconds that so many tokens take on the average of what was seen; zero before anything was.
    pub fn estimate(&self, tokens: usize) -> f64 {
        if self.tokens <= 0.0 {
            return 0.0;
        }
        #[allow(clippy::cast_precision_loss)] // token counts are small
        let tokens = tokens as f64;
        tokens * self.micros / self.tokens
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(lengths: &[usize]) -> Vec<Candidate> {
        lengths
            .iter()
            .map(|length| Candidate {
                length: *length,
                rows: 1,
                bytes: 0,
            })
            .collect()
    }

    fn limits(budget: usize, overhead: f64) -> RunLimits {
        RunLimits {
            budget,
            rows: 64,
            bytes: 1 << 20,
            pads: true,
            overhead,
        }
    }

    fn indices(taken: &[Taken]) -> Vec<usize> {
        taken.iter().map(|t| t.candidate).collect()
    }

    #[test]
    fn a_short_row_does_not_pay_for_a_long_one() {
        let taken = choose(&rows(&[8, 128, 9, 120, 7]), &limits(2048, 16.0));
        assert_eq!(indices(&taken), [0, 2, 4]);
        let taken = choose(&rows(&[128, 8, 9, 120, 7]), &limits(2048, 16.0));
        assert_eq!(indices(&taken), [0, 3]);
    }

    #[test]
    fn where_runs_are_dear_padding_is_cheap() {
        let taken = choose(&rows(&[8, 128, 9, 120, 7]), &limits(2048, 512.0));
        assert_eq!(indices(&taken), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_group_larger_than_the_budget_is_split_by_rows() {
        let many = [Candidate {
            length: 100,
            rows: 50,
            bytes: 0,
        }];
        let taken = choose(&many, &limits(1000, 16.0));
        assert_eq!(
            taken,
            [Taken {
                candidate: 0,
                rows: 10
            }]
        );
    }

    #[test]
    fn a_row_larger_than_the_budget_runs_alone() {
        let taken = choose(&rows(&[5000, 10, 5000]), &limits(2048, 512.0));
        assert_eq!(indices(&taken), [0]);
    }

    #[test]
    fn what_a_run_brings_back_is_bounded() {
        let heavy = [Candidate {
            length: 10,
            rows: 50,
            bytes: 300_000,
        }];
        assert_eq!(choose(&heavy, &limits(2048, 16.0))[0].rows, 3, "of 1 MiB");
        let heavier = [Candidate {
            bytes: 2 << 20,
            ..heavy[0]
        }];
        assert_eq!(
            choose(&heavier, &limits(2048, 16.0))[0].rows,
            1,
            "a single row always runs"
        );
    }

    #[test]
    fn without_padding_only_equal_lengths_meet() {
        let no_padding = RunLimits {
            pads: false,
            ..limits(2048, 512.0)
        };
        let taken = choose(&rows(&[8, 9, 8, 7, 8]), &no_padding);
        assert_eq!(indices(&taken), [0, 2, 4]);
    }

    #[test]
    fn the_cost_of_a_run_is_learned() {
        let mut model = CostModel::default();
        assert!((model.overhead() - OVERHEAD_PRIOR).abs() < 1e-9);
        for tokens in [16, 64, 256, 1024, 32, 128] {
            model.observe(tokens, 300.0 + 10.0 * tokens as f64);
        }
        assert!(
            (model.overhead() - 30.0).abs() < 1.0,
            "300 us are 30 tokens of 10 us"
        );
        model.observe(10, f64::NAN);
        assert!(model.overhead().is_finite());
    }

    proptest! {
        #[test]
        fn a_run_holds_the_head_and_keeps_its_bounds(
            waiting in prop::collection::vec((1usize..300, 1usize..20, 0usize..2000), 1..60),
            budget in 1usize..2048,
            most_rows in 1usize..40,
            most_bytes in 0usize..20_000,
            pads in any::<bool>(),
            overhead in 0.0f64..600.0,
        ) {
            let candidates: Vec<Candidate> =
                waiting.iter().map(|(length, rows, bytes)| Candidate { length: *length, rows: *rows, bytes: *bytes }).collect();
            let taken = choose(&candidates, &RunLimits { budget, rows: most_rows, bytes: most_bytes, pads, overhead });
            prop_assert_eq!(taken[0].candidate, 0);
            let mut seen = std::collections::BTreeSet::new();
            for t in &taken {
                prop_assert!(seen.insert(t.candidate), "a candidate stands once");
                prop_assert!(t.rows >= 1 && t.rows <= candidates[t.candidate].rows);
                prop_assert!(pads || candidates[t.candidate].length == candidates[0].length);
            }
            let rows: usize = taken.iter().map(|t| t.rows).sum();
            let longest = taken.iter().map(|t| candidates[t.candidate].length).max().unwrap();
            let bytes: usize = taken.iter().map(|t| t.rows * candidates[t.candidate].bytes).sum();
            prop_assert!(rows == 1 || (padded_tokens(rows, longest) <= budget && rows <= most_rows && bytes <= most_bytes));
        }

        #[test]
        fn draining_by_runs_is_never_dearer_than_one_by_one(lengths in prop::collection::vec(1usize..300, 1..40), overhead in 1.0f64..600.0) {
            let limits = limits(2048, overhead);
            let mut waiting = rows(&lengths);
            let mut cost = 0.0;
            while !waiting.is_empty() {
                let taken = choose(&waiting, &limits);
                let longest = taken.iter().map(|t| waiting[t.candidate].length).max().unwrap();
                cost += overhead + padded_tokens(taken.len(), longest) as f64;
                for t in taken.iter().rev() {
                    waiting.remove(t.candidate);
                }
            }
            let alone: f64 = lengths.iter().map(|l| overhead + *l as f64).sum();
            prop_assert!(cost <= alone + 1e-6, "{} > {}", cost, alone);
        }
    }
}
