//! Which lane runs next.
//!
//! The rule: the most urgent lane that waits goes first, but a lane that has been passed over [`PATIENCE`] times in a
//! row while it waited gets the next run. So a predict at the head of its lane waits for at most one bulk run
//! (and a bulk run is followed by at least `PATIENCE` runs of others, if others wait), and no lane starves:
//! interactive gets at least one run in five, bulk at least one in seventeen.

use super::request::Lane;

/// How many runs in a row may go to others while the lane waits. Predicts never wait for a lane below them on purpose.
pub const PATIENCE: [u32; 3] = [0, 4, 16];

/// Counts how often each lane was passed over.
#[derive(Clone, Debug, Default)]
pub struct LaneTurns {
    passed: [u32; 3],
}

impl LaneTurns {
    /// The lane that gets the next run, of those that wait (indexed as [`Lane::ALL`]). Does not count the run yet.
    pub fn pick(&self, waiting: [bool; 3]) -> Option<Lane> {
        let starved = [Lane::Interactive, Lane::Bulk].into_iter().find(|lane| {
            waiting[lane.index()] && self.passed[lane.index()] >= PATIENCE[lane.index()]
        });
        starved.or_else(|| Lane::ALL.into_iter().find(|lane| waiting[lane.index()]))
    }

    /// A run went to `lane` while the lanes of `waiting` waited.
    pub fn ran(&mut self, lane: Lane, waiting: [bool; 3]) {
        for other in Lane::ALL {
            let count = &mut self.passed[other.index()];
            *count = if other != lane && waiting[other.index()] {
                count.saturating_add(1)
            } else {
                0
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(turns: &mut LaneTurns, waiting: [bool; 3], runs: usize) -> Vec<Lane> {
        (0..runs)
            .map(|_| {
                let lane = turns.pick(waiting).expect("a lane waits");
                turns.ran(lane, waiting);
                lane
            })
            .collect()
    }

    #[test]
    fn the_most_urgent_lane_goes_first() {
        let turns = LaneTurns::default();
        assert_eq!(turns.pick([true, true, true]), Some(Lane::Predict));
        assert_eq!(turns.pick([false, true, true]), Some(Lane::Interactive));
        assert_eq!(turns.pick([false, false, true]), Some(Lane::Bulk));
        assert_eq!(turns.pick([false; 3]), None);
    }

    #[test]
    fn no_lane_starves_and_bulk_runs_are_far_apart() {
        let mut turns = LaneTurns::default();
        let order = run(&mut turns, [true; 3], 500);
        for (lane, window) in [(Lane::Interactive, 6), (Lane::Bulk, 19)] {
            assert!(
                order.windows(window).all(|w| w.contains(&lane)),
                "{lane:?} starves"
            );
        }
        assert!(
            order
                .windows(16)
                .all(|w| w.iter().filter(|l| **l == Lane::Bulk).count() <= 1)
        );
        let predicts = order.iter().filter(|l| **l == Lane::Predict).count();
        assert!(predicts >= 370, "{predicts} of 500 runs went to predicts");
    }

    #[test]
    fn a_predict_that_comes_during_a_bulk_run_is_next() {
        let mut turns = LaneTurns::default();
        assert_eq!(run(&mut turns, [false, false, true], 100).len(), 100);
        assert_eq!(turns.pick([true, false, true]), Some(Lane::Predict));
    }

    #[test]
    fn a_lane_that_stops_waiting_loses_its_claim() {
        let mut turns = LaneTurns::default();
        run(&mut turns, [true, false, true], 16);
        turns.ran(Lane::Predict, [true, false, false]);
        assert_eq!(turns.pick([true, false, true]), Some(Lane::Predict));
    }
}
