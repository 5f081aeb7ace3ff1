//! When a model whose worker died is restarted, and when it is given up.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Wait before the first restart; doubled for each further death in memory.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The deaths of late.
#[derive(Clone, Debug)]
pub struct Deaths {
    most: usize,
    within: Duration,
    when: VecDeque<Instant>,
}

/// What to do after a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Load it again after this wait.
    Restart(Duration),
    /// It dies too often.
    Withdraw,
}

impl Deaths {
    /// `most` deaths within `within` are too many.
    pub fn new(most: usize, within: Duration) -> Self {
        Self {
            most,
            within,
            when: VecDeque::new(),
        }
    }

    /// Records a death.
    pub fn record(&mut self, now: Instant) -> Verdict {
        self.when
            .retain(|at| now.saturating_duration_since(*at) < self.within);
        self.when.push_back(now);
        if self.when.len() >= self.most {
            return Verdict::Withdraw;
        }
        let doublings = u32::try_from(self.when.len() - 1)
            .unwrap_or(u32::MAX)
            .min(16);
        Verdict::Restart((FIRST_WAIT * 2u32.pow(doublings)).min(LONGEST_WAIT))
    }

    /// An operator asked for a new start.
    pub fn forgive(&mut self) {
        self.when.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_deaths_in_ten_minutes_withdraw() {
        let start = Instant::now();
        let at = |minutes: u64| start + Duration::from_secs(60 * minutes);
        let mut deaths = Deaths::new(3, Duration::from_secs(600));
        assert_eq!(deaths.record(at(0)), Verdict::Restart(FIRST_WAIT));
        assert_eq!(deaths.record(at(6)), Verdict::Restart(FIRST_WAIT * 2));
        assert_eq!(
            deaths.record(at(12)),
            Verdict::Restart(FIRST_WAIT * 2),
            "the first is forgotten"
        );
        assert_eq!(deaths.record(at(13)), Verdict::Withdraw);
        deaths.forgive();
        assert_eq!(deaths.record(at(14)), Verdict::Restart(FIRST_WAIT));
    }

    #[test]
    fn a_restart_is_within_a_second_as_long_as_it_is_tried() {
        let now = Instant::now();
        let mut deaths = Deaths::new(3, Duration::from_secs(600));
        while let Verdict::Restart(wait) = deaths.record(now) {
            assert!(wait < Duration::from_secs(1));
        }
        let mut patient = Deaths::new(usize::MAX, Duration::from_secs(600));
        for _ in 0..100 {
            assert!(matches!(patient.record(now), Verdict::Restart(wait) if wait <= LONGEST_WAIT));
        }
    }
}
