use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use proptest::prelude::*;

use super::*;
use crate::engine::lanes::PATIENCE;

/// A request whose life the test holds in its hand.
#[derive(Clone, Debug)]
struct Asked {
    id: u64,
    dead: Rc<Cell<bool>>,
    window: Rc<Cell<Option<usize>>>,
}

impl Request for Asked {
    fn is_dead(&self, _now: Instant) -> bool {
        self.dead.get()
    }
    fn window(&self) -> Option<usize> {
        self.window.get()
    }
}

fn key(variant: u32) -> BatchKey {
    BatchKey {
        generation: 1,
        variant,
        signature: Arc::from([]),
        alone: false,
        pads: true,
        most_rows: None,
    }
}

/// `(length, rows)` of each group.
fn request(id: u64, lane: Lane, client: Client, groups: &[(usize, usize)]) -> Waiting<Asked> {
    Waiting {
        place: Place {
            generation: 1,
            lane,
            client,
            request: id,
        },
        request: Asked {
            id,
            dead: Rc::default(),
            window: Rc::new(Cell::new(Some(usize::MAX))),
        },
        groups: groups
            .iter()
            .enumerate()
            .map(|(index, (length, rows))| WaitingGroup {
                index,
                rows: 0..*rows,
                length: *length,
                bytes: 0,
                key: key(0),
            })
            .collect(),
        bytes: 10,
    }
}

fn own(id: u64, lane: Lane, groups: &[(usize, usize)]) -> Waiting<Asked> {
    request(id, lane, Client::Request(id), groups)
}

fn queue() -> Queue<Asked> {
    Queue::new(QueueLimits {
        rows: 100_000,
        bytes: 1 << 20,
    })
}

fn limits(_: &BatchKey) -> RunLimits {
    RunLimits {
        budget: 64,
        rows: 16,
        bytes: 1 << 20,
        pads: true,
        overhead: 16.0,
    }
}

fn next(queue: &mut Queue<Asked>) -> Option<Batch<Asked>> {
    queue.next_batch(Instant::now(), limits).0
}

fn ids(batch: &Batch<Asked>) -> BTreeSet<u64> {
    batch.parts.iter().map(|p| p.request.id).collect()
}

fn is_empty(queue: &Queue<Asked>) -> bool {
    Lane::ALL.into_iter().all(|lane| queue.rows(lane) == 0)
        && queue.usage.is_empty()
        && queue
            .lanes
            .iter()
            .all(|ring| ring.order.is_empty() && ring.clients.is_empty())
}

#[test]
fn requests_take_turns() {
    let mut queue = queue();
    queue.append(own(1, Lane::Bulk, &[(64, 1); 100])).unwrap();
    queue.append(own(2, Lane::Bulk, &[(64, 1); 2])).unwrap();
    queue.append(own(3, Lane::Bulk, &[(64, 1)])).unwrap();
    let order: Vec<u64> = (0..7)
        .map(|_| next(&mut queue).unwrap().parts[0].request.id)
        .collect();
    assert_eq!(order, [1, 2, 3, 1, 2, 1, 1]);
}

#[test]
fn a_client_with_many_requests_has_one_turn() {
    let mut queue = queue();
    let flood = Client::Named(Arc::from("flood"));
    for id in 0..1000 {
        queue
            .append(request(id, Lane::Predict, flood.clone(), &[(64, 1)]))
            .unwrap();
    }
    queue.append(own(5000, Lane::Predict, &[(64, 1)])).unwrap();
    next(&mut queue).unwrap();
    assert_eq!(ids(&next(&mut queue).unwrap()), [5000].into());
}

#[test]
fn small_requests_share_a_run_with_a_large_one() {
    let mut queue = queue();
    queue.append(own(1, Lane::Bulk, &[(8, 1); 100])).unwrap();
    queue.append(own(2, Lane::Bulk, &[(8, 1)])).unwrap();
    let batch = next(&mut queue).unwrap();
    assert_eq!(ids(&batch), [1, 2].into());
    assert_eq!(batch.rows(), 8, "64 tokens");
}

#[test]
fn a_predict_waits_for_no_bulk_run_that_has_not_begun() {
    let mut queue = queue();
    queue.append(own(1, Lane::Bulk, &[(64, 100)])).unwrap();
    for _ in 0..20 {
        assert_eq!(next(&mut queue).unwrap().lane, Lane::Bulk);
    }
    queue.append(own(2, Lane::Predict, &[(4, 1)])).unwrap();
    assert_eq!(next(&mut queue).unwrap().lane, Lane::Predict);
}

#[test]
fn bulk_goes_on_under_a_flood_of_predicts() {
    let mut queue = queue();
    queue.append(own(1, Lane::Bulk, &[(64, 10)])).unwrap();
    queue.append(own(2, Lane::Predict, &[(64, 1000)])).unwrap();
    let order: Vec<Lane> = (0..200).map(|_| next(&mut queue).unwrap().lane).collect();
    let bulk: Vec<usize> = (0..200).filter(|i| order[*i] == Lane::Bulk).collect();
    assert_eq!(bulk.len(), 10);
    let patience = PATIENCE[Lane::Bulk.index()] as usize;
    assert!(bulk.windows(2).all(|w| w[1] - w[0] > patience));
}

#[test]
fn rows_of_another_variant_wait_for_their_own_run() {
    let mut queue = queue();
    let mut other = own(2, Lane::Predict, &[(8, 1)]);
    other.groups[0].key = key(1);
    queue.append(own(1, Lane::Predict, &[(8, 1)])).unwrap();
    queue.append(other).unwrap();
    queue.append(own(3, Lane::Predict, &[(8, 1)])).unwrap();
    assert_eq!(ids(&next(&mut queue).unwrap()), [1, 3].into());
    assert_eq!(ids(&next(&mut queue).unwrap()), [2].into());
    assert!(is_empty(&queue));
}

#[test]
fn a_group_without_batch_axis_runs_alone_and_whole() {
    let mut queue = queue();
    let mut alone = own(1, Lane::Predict, &[(60, 5)]);
    alone.groups[0].key.alone = true;
    queue.append(alone).unwrap();
    let mut second = own(2, Lane::Predict, &[(60, 1)]);
    second.groups[0].key.alone = true;
    queue.append(second).unwrap();
    assert_eq!(next(&mut queue).unwrap().rows(), 5);
    assert_eq!(next(&mut queue).unwrap().rows(), 1);
}

#[test]
fn a_full_queue_gives_the_request_back_and_other_models_have_room() {
    let mut queue = Queue::new(QueueLimits {
        rows: 10,
        bytes: 100,
    });
    queue.append(own(1, Lane::Bulk, &[(8, 8)])).unwrap();
    let (full, back) = queue.append(own(2, Lane::Bulk, &[(8, 3)])).unwrap_err();
    assert_eq!((full, back.request.id), (Full::Now, 2));
    assert_eq!(
        queue.append(own(3, Lane::Bulk, &[(8, 11)])).unwrap_err().0,
        Full::Ever
    );
    let mut heavy = own(4, Lane::Bulk, &[(8, 1)]);
    heavy.bytes = 91;
    assert_eq!(queue.append(heavy).unwrap_err().0, Full::Now);
    let mut elsewhere = own(5, Lane::Bulk, &[(8, 10)]);
    elsewhere.place.generation = 2;
    elsewhere.groups[0].key.generation = 2;
    queue.append(elsewhere).unwrap();
    assert_eq!(
        queue.remove_where(|place, _| place.generation == 2).len(),
        1
    );
    while next(&mut queue).is_some() {}
    assert!(is_empty(&queue));
}

#[test]
fn who_does_not_read_does_not_run_and_keeps_its_place() {
    let mut queue = queue();
    let slow = own(1, Lane::Bulk, &[(64, 3)]);
    let window = slow.request.window.clone();
    queue.append(slow).unwrap();
    queue.append(own(2, Lane::Bulk, &[(64, 2)])).unwrap();
    window.set(None);
    assert_eq!(ids(&next(&mut queue).unwrap()), [2].into());
    window.set(Some(0));
    assert_eq!(
        ids(&next(&mut queue).unwrap()),
        [1].into(),
        "one row is always within"
    );
}

#[test]
fn a_run_takes_no_more_of_a_request_than_its_reader_has_room_for() {
    let mut queue = queue();
    let mut slow = own(1, Lane::Bulk, &[(4, 10), (4, 10)]);
    for group in &mut slow.groups {
        group.bytes = 100;
    }
    slow.request.window.set(Some(250));
    queue.append(slow).unwrap();
    assert_eq!(next(&mut queue).unwrap().rows(), 2);
}

#[test]
fn a_request_can_be_taken_out() {
    let mut queue = queue();
    let gone = own(1, Lane::Bulk, &[(8, 3)]);
    let place = gone.place.clone();
    queue.append(gone).unwrap();
    assert_eq!(queue.remove(&place).unwrap().request.id, 1);
    assert!(queue.remove(&place).is_none());
    assert!(is_empty(&queue));
}

#[derive(Clone, Debug)]
enum Step {
    Append {
        lane: usize,
        client: Option<u8>,
        groups: Vec<(usize, usize)>,
        variant: u32,
    },
    Run,
    Cancel(usize),
    Remove(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let append = (
        0usize..3,
        prop::option::of(0u8..3),
        prop::collection::vec((1usize..100, 1usize..6), 1..5),
        0u32..2,
    )
        .prop_map(|(lane, client, groups, variant)| Step::Append {
            lane,
            client,
            groups,
            variant,
        });
    prop::collection::vec(
        prop_oneof![
            3 => append,
            3 => Just(Step::Run),
            1 => (0usize..50).prop_map(Step::Cancel),
            1 => (0usize..50).prop_map(Step::Remove),
        ],
        1..80,
    )
}

proptest! {
    /// Whatever comes and goes: each row runs exactly once or is handed back, no cancelled row runs, every run is
    /// within its bounds, and the books balance at the end.
    #[test]
    fn every_row_exactly_once(steps in steps()) {
        let mut queue = queue();
        let mut requests: Vec<(Asked, Place)> = Vec::new();
        let mut owed: BTreeMap<(u64, usize), BTreeSet<usize>> = BTreeMap::new();
        let forget = |owed: &mut BTreeMap<(u64, usize), BTreeSet<usize>>, waiting: &Waiting<Asked>| {
            for group in &waiting.groups {
                for row in group.rows.clone() {
                    assert!(owed.get_mut(&(waiting.request.id, group.index)).is_some_and(|rows| rows.remove(&row)));
                }
            }
        };
        let last = [Step::Run].into_iter().cycle().take(2000);
        for step in steps.into_iter().chain(last) {
            match step {
                Step::Append { lane, client, groups, variant } => {
                    let id = requests.len() as u64;
                    let client = client.map_or(Client::Request(id), |c| Client::Named(Arc::from(c.to_string())));
                    let mut waiting = request(id, Lane::ALL[lane], client, &groups);
                    for group in &mut waiting.groups {
                        group.key = key(variant);
                        owed.insert((id, group.index), group.rows.clone().collect());
                    }
                    requests.push((waiting.request.clone(), waiting.place.clone()));
                    queue.append(waiting).expect("there is room");
                }
                Step::Run => {
                    let (batch, dead) = queue.next_batch(Instant::now(), limits);
                    for gone in &dead {
                        prop_assert!(gone.request.dead.get());
                        forget(&mut owed, gone);
                    }
                    let Some(batch) = batch else { continue };
                    let padded = batch.rows() * batch.longest();
                    prop_assert!(batch.rows() == 1 || padded <= 64, "{} padded tokens", padded);
                    for part in &batch.parts {
                        prop_assert!(!part.request.dead.get(), "a cancelled row ran");
                        prop_assert_eq!(&requests[part.request.id as usize].1.lane, &batch.lane);
                        for row in part.rows.clone() {
                            let rows = owed.get_mut(&(part.request.id, part.group)).expect("a row that was appended");
                            prop_assert!(rows.remove(&row), "a row ran twice");
                        }
                    }
                }
                Step::Cancel(which) => {
                    if let Some((request, _)) = requests.get(which) {
                        request.dead.set(true);
                    }
                }
                Step::Remove(which) => {
                    if let Some(gone) = requests.get(which).and_then(|(_, place)| queue.remove(place)) {
                        forget(&mut owed, &gone);
                    }
                }
            }
        }
        prop_assert!(owed.values().all(BTreeSet::is_empty), "rows were lost: {:?}", owed);
        prop_assert!(is_empty(&queue));
    }
}
