//! The rows that wait, and whose turn it is. A plain struct: time is passed in, nothing here blocks or sends.
//!
//! Three lanes (see [`super::lanes`]); in each lane the clients take turns, and the requests of a client take turns
//! among themselves: whoever had rows in a run goes to the back of the ring. The run is built around the head of the ring,
//! which therefore always advances; the others fill it where their rows fit (see [`super::batch`]).
//!
//! Dead requests (cancelled or past their deadline) are met while looking for rows and given back to the caller
//! instead of being run, so they cost nothing. Requests that must not run yet (their reader is behind) keep their
//! place and are passed over.
//!
//! Bounds: rows and input bytes per generation of a model, so that a flooded model does not shut out the others; when one
//! is met, [`Queue::append`] gives the request back. A request that alone passes them never fits and says so.
//!
//! What is removed is always handed back, never dropped in here: dropping inputs may run foreign code.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ops::Range,
    sync::Arc,
    time::Instant,
};

use super::{
    batch::{self, Candidate, RunLimits},
    lanes::LaneTurns,
    request::Lane,
};

/// Groups looked at for one run, at most: bounds the time under the lock.
const SCAN_LIMIT: usize = 4096;
/// Groups among which the cheapest run is sought.
const CANDIDATE_LIMIT: usize = 128;

/// What the queue must know of a request.
pub trait Request {
    /// Cancelled or past its deadline: never runs.
    fn is_dead(&self, now: Instant) -> bool;
    /// Bytes that it may have brought back now, beside what its reader has not taken yet; none: it must wait for its reader.
    /// One row is always within `Some`.
    fn window(&self) -> Option<usize>;
}

/// Rows with the same key may share a run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BatchKey {
    /// Which worker.
    pub generation: u64,
    /// Which of its graphs.
    pub variant: u32,
    /// Dtypes and extents of the inputs apart from batch and tokens; numbers are given by the caller.
    pub signature: Arc<[u64]>,
    /// The whole group in a run of its own (inputs without batch axis).
    pub alone: bool,
    /// Rows of different lengths may share a run.
    pub pads: bool,
    /// Rows that the graph takes at a time, where it fixes them.
    pub most_rows: Option<usize>,
}

/// Rows of one length, waiting.
#[derive(Clone, Debug)]
pub struct WaitingGroup {
    /// Index in the request.
    pub index: usize,
    /// Rows that were not taken yet.
    pub rows: Range<usize>,
    /// Tokens that a row costs (before padding).
    pub length: usize,
    /// Bytes that a row brings back.
    pub bytes: usize,
    /// Who may share a run.
    pub key: BatchKey,
}

/// A request in the queue.
#[derive(Debug)]
pub struct Waiting<R> {
    /// Where to find it again.
    pub place: Place,
    /// The request itself.
    pub request: R,
    /// Its rows.
    pub groups: VecDeque<WaitingGroup>,
    /// Bytes of its inputs; counted until the last row is taken.
    pub bytes: usize,
}

/// Where a request waits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Generation that it is for.
    pub generation: u64,
    /// Its lane.
    pub lane: Lane,
    /// Whose turn it shares.
    pub client: Client,
    /// Unique for ever.
    pub request: u64,
}

/// Requests of one client share a turn.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    /// A caller that named itself.
    Named(Arc<str>),
    /// A request of its own.
    Request(u64),
}

/// Rows taken for a run.
#[derive(Clone, Debug)]
pub struct Part<R> {
    /// Whose rows.
    pub request: R,
    /// Which of its groups.
    pub group: usize,
    /// Which rows of the group.
    pub rows: Range<usize>,
    /// Tokens that a row costs (before padding).
    pub length: usize,
}

/// A run to be.
#[derive(Clone, Debug)]
pub struct Batch<R> {
    /// What the rows share.
    pub key: BatchKey,
    /// Lane of all of them.
    pub lane: Lane,
    /// The rows, in the order that they will have in the run.
    pub parts: Vec<Part<R>>,
}

impl<R> Batch<R> {
    /// Rows in the run.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|p| p.rows.len()).sum()
    }

    /// Length of the longest row.
    pub fn longest(&self) -> usize {
        self.parts.iter().map(|p| p.length).max().unwrap_or(0)
    }
}

/// Bounds of what may wait for one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Rows.
    pub rows: usize,
    /// Bytes of their inputs.
    pub bytes: usize,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// There is no room now.
    Now,
    /// It would not even fit into an empty queue.
    Ever,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    rows: usize,
    bytes: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Queue<R> {
    limits: QueueLimits,
    lanes: [Ring<R>; 3],
    turns: LaneTurns,
    usage: HashMap<u64, Usage>,
}

/// One lane: a ring of clients.
#[derive(Debug)]
struct Ring<R> {
    order: VecDeque<Client>,
    clients: HashMap<Client, VecDeque<Waiting<R>>>,
    rows: usize,
}

impl<R> Default for Ring<R> {
    fn default() -> Self {
        Self {
            order: VecDeque::new(),
            clients: HashMap::new(),
            rows: 0,
        }
    }
}

impl<R: Request + Clone> Queue<R> {
    /// An empty queue.
    pub fn new(limits: QueueLimits) -> Self {
        Self {
            limits,
            lanes: Default::default(),
            turns: LaneTurns::default(),
            usage: HashMap::new(),
        }
    }

    /// Puts a request at the back of its client's ring, or gives it back.
    pub fn append(&mut self, waiting: Waiting<R>) -> Result<(), (Full, Waiting<R>)> {
        let rows: usize = waiting.groups.iter().map(|g| g.rows.len()).sum();
        let usage = self.usage.entry(waiting.place.generation).or_default();
        if rows > self.limits.rows || waiting.bytes > self.limits.bytes {
            return Err((Full::Ever, waiting));
        }
        if usage.rows + rows > self.limits.rows || usage.bytes + waiting.bytes > self.limits.bytes {
            return Err((Full::Now, waiting));
        }
        if rows == 0 {
            return Ok(());
        }
        usage.rows += rows;
        usage.bytes += waiting.bytes;
        let ring = &mut self.lanes[waiting.place.lane.index()];
        ring.rows += rows;
        let client = waiting.place.client.clone();
        let requests = ring.clients.entry(client.clone()).or_default();
        if requests.is_empty() {
            ring.order.push_back(client);
        }
        requests.push_back(waiting);
        Ok(())
    }

    /// Takes the next run out of the queue. `limits` prices the runs of a key. Dead requests met on the way come back beside it.
    pub fn next_batch(
        &mut self,
        now: Instant,
        limits: impl Fn(&BatchKey) -> RunLimits,
    ) -> (Option<Batch<R>>, Vec<Waiting<R>>) {
        let mut dead = Vec::new();
        let mut batch = None;
        let waiting = self.lanes.each_ref().map(|ring| ring.rows > 0);
        let mut open = waiting;
        while let Some(lane) = self.turns.pick(open) {
            let taken = self.lanes[lane.index()].take(lane, now, &limits, &mut dead);
            if let Some((taken, finished_bytes)) = taken {
                self.uncount(taken.key.generation, taken.rows(), finished_bytes);
                self.turns.ran(lane, waiting);
                batch = Some(taken);
                break;
            }
            open[lane.index()] = false;
        }
        for gone in &dead {
            self.uncount(gone.place.generation, gone.rows(), gone.bytes);
        }
        (batch, dead)
    }

    /// Takes a request out, wherever it stands.
    pub fn remove(&mut self, place: &Place) -> Option<Waiting<R>> {
        let gone = self.lanes[place.lane.index()].remove(place)?;
        self.uncount(place.generation, gone.rows(), gone.bytes);
        Some(gone)
    }

    /// Takes out every request that `gone` names: those of a worker that died, those that are dead.
    pub fn remove_where(&mut self, gone: impl Fn(&Place, &R) -> bool) -> Vec<Waiting<R>> {
        let mut removed = Vec::new();
        for ring in &mut self.lanes {
            ring.remove_where(&gone, &mut removed);
        }
        for gone in &removed {
            self.uncount(gone.place.generation, gone.rows(), gone.bytes);
        }
        removed
    }

    /// Rows that wait in a lane.
    pub fn rows(&self, lane: Lane) -> usize {
        self.lanes[lane.index()].rows
    }

    fn uncount(&mut self, generation: u64, rows: usize, bytes: usize) {
        if let Some(usage) = self.usage.get_mut(&generation) {
            usage.rows -= rows;
            usage.bytes -= bytes;
            if *usage == Usage::default() {
                self.usage.remove(&generation);
            }
        }
    }
}

impl<R> Waiting<R> {
    /// Rows that still wait.
    pub fn rows(&self) -> usize {
        self.groups.iter().map(|g| g.rows.len()).sum()
    }
}

/// A group that may join the run: where it stands, and how much of it.
struct Found {
    client: usize,
    request: usize,
    group: usize,
    candidate: Candidate,
}

impl<R: Request + Clone> Ring<R> {
    /// Builds a run around the first client that can run, with the bytes of the requests that it used up.
    fn take(
        &mut self,
        lane: Lane,
        now: Instant,
        limits: &impl Fn(&BatchKey) -> RunLimits,
        dead: &mut Vec<Waiting<R>>,
    ) -> Option<(Batch<R>, usize)> {
        self.remove_where_within(SCAN_LIMIT, &|_, request| request.is_dead(now), dead);
        let (key, found) = self.look(now)?;
        let candidates: Vec<Candidate> = found.iter().map(|f| f.candidate).collect();
        let chosen = if key.alone {
            vec![batch::Taken {
                candidate: 0,
                rows: candidates[0].rows,
            }]
        } else {
            batch::choose(&candidates, &limits(&key))
        };
        let mut parts = Vec::with_capacity(chosen.len());
        let mut served = Vec::with_capacity(chosen.len());
        for taken in chosen {
            let found = &found[taken.candidate];
            let client = self.order[found.client].clone();
            let waiting = &mut self.clients.get_mut(&client)?[found.request];
            let group = &mut waiting.groups[found.group];
            let rows = group.rows.start..group.rows.start + taken.rows;
            group.rows.start = rows.end;
            self.rows -= rows.len();
            parts.push(Part {
                request: waiting.request.clone(),
                group: group.index,
                rows,
                length: group.length,
            });
            served.push((client, waiting.place.request));
        }
        let finished_bytes = self.rotate(served);
        Some((Batch { key, lane, parts }, finished_bytes))
    }

    /// The head's key, and the groups that may share its run: one of each client in turn, then the second of each, and so on.
    fn look(&self, now: Instant) -> Option<(BatchKey, Vec<Found>)> {
        let mut key: Option<BatchKey> = None;
        let mut by_client: Vec<VecDeque<Found>> = Vec::new();
        let mut scanned = 0;
        for (client, name) in self.order.iter().enumerate() {
            if by_client.len() >= CANDIDATE_LIMIT || scanned >= SCAN_LIMIT {
                break;
            }
            let mut mine = VecDeque::new();
            for (request, waiting) in self.clients[name].iter().enumerate() {
                scanned += 1;
                if mine.len() >= CANDIDATE_LIMIT || scanned >= SCAN_LIMIT {
                    break;
                }
                let Some(mut window) = waiting.request.window() else {
                    continue;
                };
                if waiting.request.is_dead(now) {
                    continue;
                }
                let mut first = true;
                for (group, g) in waiting.groups.iter().enumerate() {
                    scanned += 1;
                    if mine.len() >= CANDIDATE_LIMIT || scanned >= SCAN_LIMIT {
                        break;
                    }
                    if *key.get_or_insert_with(|| g.key.clone()) != g.key {
                        continue;
                    }
                    let within = window.checked_div(g.bytes).unwrap_or(usize::MAX);
                    let rows = g.rows.len().min(within.max(usize::from(first)));
                    if rows == 0 {
                        break;
                    }
                    first = false;
                    window = window.saturating_sub(rows.saturating_mul(g.bytes));
                    mine.push_back(Found {
                        client,
                        request,
                        group,
                        candidate: Candidate {
                            length: g.length.max(1),
                            rows: if g.key.alone { g.rows.len() } else { rows },
                            bytes: g.bytes,
                        },
                    });
                }
            }
            if !mine.is_empty() {
                by_client.push(mine);
            }
        }
        let mut found = Vec::new();
        while found.len() < CANDIDATE_LIMIT && by_client.iter().any(|mine| !mine.is_empty()) {
            found.extend(by_client.iter_mut().filter_map(VecDeque::pop_front));
        }
        found.truncate(CANDIDATE_LIMIT);
        key.filter(|_| !found.is_empty()).map(|key| (key, found))
    }

    /// Who was served goes to the back; what is used up leaves. Returns the bytes of requests that left.
    fn rotate(&mut self, served: Vec<(Client, u64)>) -> usize {
        let mut finished_bytes = 0;
        let mut clients: Vec<Client> = Vec::new(); // in the order of being served
        let mut known: HashSet<Client> = HashSet::new();
        for (client, request) in served {
            let Some(requests) = self.clients.get_mut(&client) else {
                continue;
            };
            // A request with two groups in the run is met twice; the second time changes nothing but its place.
            if let Some(at) = requests.iter().position(|w| w.place.request == request)
                && let Some(mut waiting) = requests.remove(at)
            {
                waiting.groups.retain(|g| !g.rows.is_empty());
                if waiting.groups.is_empty() {
                    finished_bytes += waiting.bytes;
                } else {
                    requests.push_back(waiting);
                }
            }
            if known.insert(client.clone()) {
                clients.push(client);
            }
        }
        self.order.retain(|c| !known.contains(c));
        for client in clients {
            if self.clients.get(&client).is_some_and(|r| !r.is_empty()) {
                self.order.push_back(client);
            } else {
                self.clients.remove(&client);
            }
        }
        finished_bytes
    }

    fn remove(&mut self, place: &Place) -> Option<Waiting<R>> {
        let requests = self.clients.get_mut(&place.client)?;
        let at = requests
            .iter()
            .position(|w| w.place.request == place.request)?;
        let gone = requests.remove(at)?;
        self.rows -= gone.rows();
        if requests.is_empty() {
            self.clients.remove(&place.client);
            self.order.retain(|c| *c != place.client);
        }
        Some(gone)
    }

    fn remove_where(&mut self, gone: &impl Fn(&Place, &R) -> bool, removed: &mut Vec<Waiting<R>>) {
        self.remove_where_within(usize::MAX, gone, removed);
    }

    /// As `remove_where`, among the first so many requests in the order of turns.
    fn remove_where_within(
        &mut self,
        mut scan: usize,
        gone: &impl Fn(&Place, &R) -> bool,
        removed: &mut Vec<Waiting<R>>,
    ) {
        let mut emptied = false;
        for client in &self.order {
            let Some(requests) = self.clients.get_mut(client) else {
                continue;
            };
            let mut at = 0;
            while at < requests.len() && scan > 0 {
                scan -= 1;
                if gone(&requests[at].place, &requests[at].request)
                    && let Some(waiting) = requests.remove(at)
                {
                    self.rows -= waiting.rows();
                    removed.push(waiting);
                } else {
                    at += 1;
                }
            }
            emptied |= requests.is_empty();
            if scan == 0 {
                break;
            }
        }
        if emptied {
            self.clients.retain(|_, requests| !requests.is_empty());
            self.order.retain(|c| self.clients.contains_key(c));
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
