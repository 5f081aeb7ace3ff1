//! Which graph variants a worker holds: built once, evicted when idle, within a memory budget.
//!
//! Pure bookkeeping: it decides, the caller builds and evicts in the worker. `W` is whatever waits for a build.
//! A variant that is leased (rows wait for it or run on it) is never evicted; the pinned one (the plain graph) never either.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::ipc::{info::ValueInfo, spec::VariantSpec};

/// A variant that can run.
#[derive(Debug, PartialEq)]
pub struct Built {
    /// Its number in the worker.
    pub id: u32,
    /// What it shows, in the worker's order.
    pub outputs: Vec<ValueInfo>,
}

impl Built {
    /// The output of this name, and its index.
    pub fn output(&self, name: &str) -> Option<(usize, &ValueInfo)> {
        self.outputs
            .iter()
            .enumerate()
            .find(|(_, o)| o.name == name)
    }
}

/// What to do to get a variant.
#[derive(Debug, PartialEq)]
pub enum Lookup<W> {
    /// Here it is, leased: give it back with [`Variants::release`].
    Ready(Arc<Built>),
    /// Someone builds it: wait.
    Wait(W),
    /// The caller builds it under this number, first evicting `evict`; then [`Variants::built`] or [`Variants::failed`].
    Build {
        /// Number to give it in the worker.
        id: u32,
        /// Idle variants that must make room.
        evict: Vec<u32>,
    },
    /// The budget is taken by variants in use.
    Full,
}

/// See the module.
#[derive(Debug)]
pub struct Variants<W> {
    budget: u64,
    next: u32,
    entries: HashMap<VariantSpec, Entry<W>>,
}

#[derive(Debug)]
enum Entry<W> {
    Building {
        waiters: W,
    },
    Ready {
        built: Arc<Built>,
        bytes: u64,
        leases: usize,
        used: Instant,
        pinned: bool,
    },
}

impl<W: Clone> Variants<W> {
    /// None yet; together they may take `budget` bytes.
    pub fn new(budget: u64) -> Self {
        Self {
            budget,
            next: 0,
            entries: HashMap::new(),
        }
    }

    /// Finds a variant, or makes the caller its builder; `waiters` is what others will wait on then.
    pub fn lookup(&mut self, spec: &VariantSpec, now: Instant, waiters: W) -> Lookup<W> {
        match self.entries.get_mut(spec) {
            Some(Entry::Ready {
                built,
                leases,
                used,
                ..
            }) => {
                *leases += 1;
                *used = now;
                return Lookup::Ready(built.clone());
            }
            Some(Entry::Building { waiters }) => return Lookup::Wait(waiters.clone()),
            None => {}
        }
        let wanted = self.expected_bytes();
        let evict = self.make_room(wanted);
        if self.bytes().saturating_add(wanted) > self.budget && self.others_in_use() {
            return Lookup::Full;
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.entries
            .insert(spec.clone(), Entry::Building { waiters });
        Lookup::Build { id, evict }
    }

    /// A build succeeded. Not leased yet: look it up. Returns what must be evicted because it turned out larger than expected.
    pub fn built(
        &mut self,
        spec: &VariantSpec,
        built: Built,
        bytes: u64,
        pinned: bool,
        now: Instant,
    ) -> Vec<u32> {
        let evict = self.make_room(bytes);
        self.entries.insert(
            spec.clone(),
            Entry::Ready {
                built: Arc::new(built),
                bytes,
                leases: 0,
                used: now,
                pinned,
            },
        );
        evict
    }

    /// A build failed: the next who asks tries again.
    pub fn failed(&mut self, spec: &VariantSpec) {
        if matches!(self.entries.get(spec), Some(Entry::Building { .. })) {
            self.entries.remove(spec);
        }
    }

    /// Gives a lease back.
    pub fn release(&mut self, id: u32, now: Instant) {
        for entry in self.entries.values_mut() {
            if let Entry::Ready {
                built,
                leases,
                used,
                ..
            } = entry
                && built.id == id
            {
                *leases = leases.saturating_sub(1);
                *used = now;
            }
        }
    }

    /// Takes out what nobody used for `ttl`: evict these in the worker.
    pub fn idle(&mut self, now: Instant, ttl: Duration) -> Vec<u32> {
        self.evict_where(|used| now.saturating_duration_since(used) >= ttl)
    }

    /// Bytes of all variants, as far as the worker could measure them.
    pub fn bytes(&self) -> u64 {
        self.entries
            .values()
            .map(|e| match e {
                Entry::Ready { bytes, pinned, .. } if !pinned => *bytes,
                Entry::Ready { .. } | Entry::Building { .. } => 0,
            })
            .sum()
    }

    /// Number of variants that can run.
    pub fn len(&self) -> usize {
        self.entries
            .values()
            .filter(|e| matches!(e, Entry::Ready { .. }))
            .count()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The mean of what is known; nothing before the first.
    fn expected_bytes(&self) -> u64 {
        let known: Vec<u64> = self
            .entries
            .values()
            .filter_map(|e| match e {
                Entry::Ready { bytes, pinned, .. } if !pinned => Some(*bytes),
                Entry::Ready { .. } | Entry::Building { .. } => None,
            })
            .collect();
        known.iter().sum::<u64>() / known.len().max(1) as u64
    }

    fn others_in_use(&self) -> bool {
        self.entries.values().any(|e| match e {
            Entry::Ready { leases, pinned, .. } => *leases > 0 && !pinned,
            Entry::Building { .. } => false,
        })
    }

    /// Takes out idle variants, the longest unused first, until `wanted` more bytes fit.
    fn make_room(&mut self, wanted: u64) -> Vec<u32> {
        let mut evicted = Vec::new();
        while self.bytes().saturating_add(wanted) > self.budget {
            let oldest = self
                .entries
                .values()
                .filter_map(|e| match e {
                    Entry::Ready {
                        leases: 0,
                        used,
                        pinned: false,
                        ..
                    } => Some(*used),
                    Entry::Ready { .. } | Entry::Building { .. } => None,
                })
                .min();
            let Some(oldest) = oldest else { break };
            evicted.extend(self.evict_where(|used| used <= oldest));
        }
        evicted
    }

    fn evict_where(&mut self, gone: impl Fn(Instant) -> bool) -> Vec<u32> {
        let mut evicted = Vec::new();
        self.entries.retain(|_, entry| match entry {
            Entry::Ready {
                built,
                leases: 0,
                used,
                pinned: false,
                ..
            } if gone(*used) => {
                evicted.push(built.id);
                false
            }
            Entry::Ready { .. } | Entry::Building { .. } => true,
        });
        evicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str) -> VariantSpec {
        VariantSpec::exposing([name])
    }

    fn build(variants: &mut Variants<()>, name: &str, bytes: u64, now: Instant) -> (u32, Vec<u32>) {
        let Lookup::Build { id, mut evict } = variants.lookup(&spec(name), now, ()) else {
            panic!("\"{name}\" is there already");
        };
        let built = Built {
            id,
            outputs: Vec::new(),
        };
        evict.extend(variants.built(&spec(name), built, bytes, false, now));
        (id, evict)
    }

    #[test]
    fn a_variant_is_built_once_and_others_wait() {
        let now = Instant::now();
        let mut variants = Variants::new(100);
        assert!(matches!(
            variants.lookup(&spec("a"), now, 7),
            Lookup::Build { id: 0, .. }
        ));
        assert_eq!(variants.lookup(&spec("a"), now, 8), Lookup::Wait(7));
        variants.failed(&spec("a"));
        assert!(matches!(
            variants.lookup(&spec("a"), now, 9),
            Lookup::Build { id: 1, .. }
        ));
        let built = Built {
            id: 1,
            outputs: Vec::new(),
        };
        assert!(variants.built(&spec("a"), built, 10, false, now).is_empty());
        assert!(matches!(variants.lookup(&spec("a"), now, 10), Lookup::Ready(b) if b.id == 1));
    }

    #[test]
    fn the_longest_unused_makes_room() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut variants = Variants::new(100);
        let (a, _) = build(&mut variants, "a", 40, at(0));
        let (b, _) = build(&mut variants, "b", 40, at(1));
        assert!(matches!(
            variants.lookup(&spec("a"), at(2), ()),
            Lookup::Ready(_)
        ));
        variants.release(a, at(2));
        let (_, evicted) = build(&mut variants, "c", 40, at(3));
        assert_eq!(evicted, [b]);
        assert_eq!((variants.len(), variants.bytes()), (2, 80));
    }

    #[test]
    fn what_is_leased_stays_and_the_next_build_is_refused() {
        let now = Instant::now();
        let mut variants = Variants::new(100);
        let (a, _) = build(&mut variants, "a", 90, now);
        assert!(matches!(
            variants.lookup(&spec("a"), now, ()),
            Lookup::Ready(_)
        ));
        assert_eq!(variants.lookup(&spec("b"), now, ()), Lookup::Full);
        assert!(
            variants
                .idle(now + Duration::from_secs(3600), Duration::from_secs(1))
                .is_empty()
        );
        variants.release(a, now);
        assert!(
            matches!(variants.lookup(&spec("b"), now, ()), Lookup::Build { evict, .. } if evict == [a])
        );
    }

    #[test]
    fn a_variant_larger_than_the_budget_is_built_when_alone() {
        let now = Instant::now();
        let mut variants = Variants::new(10);
        assert!(build(&mut variants, "a", 1000, now).1.is_empty());
        assert_eq!(variants.len(), 1);
    }

    #[test]
    fn idle_variants_leave_and_the_pinned_one_stays() {
        let now = Instant::now();
        let mut variants: Variants<()> = Variants::new(100);
        let plain = VariantSpec::plain();
        variants.lookup(&plain, now, ());
        let built = Built {
            id: 0,
            outputs: Vec::new(),
        };
        variants.built(&plain, built, 1000, true, now);
        let (a, _) = build(&mut variants, "a", 40, now);
        let ttl = Duration::from_secs(60);
        assert!(variants.idle(now + ttl / 2, ttl).is_empty());
        assert_eq!(variants.idle(now + ttl, ttl), [a]);
        assert_eq!(variants.len(), 1);
    }
}
