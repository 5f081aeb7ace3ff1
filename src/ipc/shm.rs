//! Tensors in shared memory: sealed memfd segments that one side writes and the other reads.
//!
//! A segment is sealed against shrinking and growing when it is made, and the receiver checks the seals and the size
//! before mapping, so that no later truncation can raise SIGBUS. Segments are reused: the maker keeps a pool by size class, and a segment
//! returns to it when the receiver says so. The kernel zeroes fresh pages; a reused segment costs no page faults, which is
//! what makes one copy per tensor cheap.
//!
//! Memory goes back to the system by punching a hole into a segment, not by dropping it: the peer's mapping of it stays valid and holds
//! nothing.
//!
//! The one place of this module tree with `unsafe`.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    fs::File,
    os::fd::OwnedFd,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use memmap2::MmapRaw;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create,
};

use super::wire::Span;

/// Tensors in a segment start at multiples of this: enough for any vector unit.
pub const ALIGN: usize = 64;
/// Smallest segment.
const SMALLEST: usize = 64 << 10;
/// Most segments of one side: each costs both sides a mapping, and its maker a descriptor.
const MOST_SEGMENTS: usize = 2048;

/// How long an idle segment may hold memory; see [`Pool::trim`].
pub const IDLE: Duration = Duration::from_secs(10);

/// Rounds up to the alignment of tensors.
pub fn aligned(bytes: usize) -> usize {
    bytes.div_ceil(ALIGN) * ALIGN
}

/// Why a segment cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ShmError {
    /// The system refused.
    #[error("shared memory failed: {0}")]
    System(#[from] std::io::Error),
    /// The peer's segment is not what it says.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The pool would pass its budget.
    #[error("shared memory is used up: {wanted} bytes more would pass the budget of {budget}")]
    Exhausted {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes allowed.
        budget: usize,
    },
}

impl From<rustix::io::Errno> for ShmError {
    fn from(e: rustix::io::Errno) -> Self {
        ShmError::System(e.into())
    }
}

/// A mapped segment.
#[derive(Debug)]
struct Mapping {
    map: MmapRaw,
}

impl Mapping {
    fn new(fd: &OwnedFd, len: usize, write: bool) -> Result<Self, ShmError> {
        let file = File::from(fd.try_clone()?);
        let mut options = memmap2::MmapOptions::new();
        options.len(len);
        let map = if write {
            options.map_raw(&file)?
        } else {
            options.map_raw_read_only(&file)?
        };
        Ok(Self { map })
    }

    fn start(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).expect("a mapping is never at address zero")
    }
}

// ------------------------------------------------------------------------------------------------ making

/// A segment of ours that nobody else reads yet. Written once, then sent.
#[derive(Debug)]
pub struct Segment {
    id: u32,
    len: usize,
    fd: OwnedFd,
    mapping: Mapping,
    /// Whether the peer has the descriptor already.
    known: bool,
    /// Whether it may hold pages: false after a hole as large as itself.
    filled: bool,
    used: Instant,
}

impl Segment {
    /// Bytes that fit.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a segment has at least a page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` bytes, writable and ours alone: the peer maps the segment read-only and, by the protocol, reads it only between
        // `Sent` and `Release`, while no `Segment` value for it exists on this side.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start().as_ptr(), self.len) }
    }

    /// Whether a span is one of this segment.
    pub fn holds(&self, span: &Span) -> bool {
        span.segment == self.id
    }

    /// Where a tensor stands in this segment.
    pub fn span(&self, offset: usize, length: usize) -> Span {
        Span {
            segment: self.id,
            segment_bytes: self.len as u64,
            offset: offset as u64,
            length: length as u64,
        }
    }
}

/// The segments of one side.
#[derive(Debug)]
pub struct Pool {
    budget: usize,
    next: u32,
    /// Bytes of all segments that may hold pages, idle or out.
    bytes: usize,
    idle: Vec<Segment>,
    out: HashMap<u32, Segment>,
}

impl Pool {
    /// A pool whose segments take at most `budget` bytes together.
    pub fn new(budget: usize) -> Self {
        Self {
            budget,
            next: 1,
            bytes: 0,
            idle: Vec::new(),
            out: HashMap::new(),
        }
    }

    /// A segment of at least `len` bytes: the smallest idle one that fits and is not more than twice too large, or a new one.
    pub fn take(&mut self, len: usize) -> Result<Segment, ShmError> {
        let class = len.max(SMALLEST).checked_next_power_of_two();
        let class = class
            .filter(|c| *c <= self.budget)
            .ok_or(ShmError::Exhausted {
                wanted: len,
                budget: self.budget,
            })?;
        let fit = self
            .idle
            .iter()
            .enumerate()
            .filter(|(_, s)| s.len >= class && s.len <= 2 * class)
            // One that holds pages costs no faults.
            .min_by_key(|(_, s)| (!s.filled, s.len))
            .map(|(at, _)| at);
        let mut segment = match fit {
            Some(at) => self.idle.swap_remove(at),
            None => self.make(class)?,
        };
        if !segment.filled {
            if let Err(e) = self.make_room(segment.len) {
                self.idle.push(segment);
                return Err(e);
            }
            segment.filled = true;
            self.bytes += segment.len;
        }
        Ok(segment)
    }

    fn make(&mut self, len: usize) -> Result<Segment, ShmError> {
        if self.idle.len() + self.out.len() >= MOST_SEGMENTS {
            return Err(ShmError::Exhausted {
                wanted: len,
                budget: self.budget,
            });
        }
        let fd = memfd_create(
            "introspectd",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        ftruncate(&fd, len as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = Mapping::new(&fd, len, true)?;
        let id = self.next;
        self.next = self.next.wrapping_add(1).max(1);
        Ok(Segment {
            id,
            len,
            fd,
            mapping,
            known: false,
            filled: false,
            used: Instant::now(),
        })
    }

    /// Empties idle segments until `wanted` bytes more fit the budget, the longest unused first.
    fn make_room(&mut self, wanted: usize) -> Result<(), ShmError> {
        self.idle.sort_by_key(|s| s.used);
        for segment in self.idle.iter_mut().filter(|s| s.filled) {
            if self.bytes + wanted <= self.budget {
                break;
            }
            empty(segment)?;
            self.bytes -= segment.len;
        }
        if self.bytes + wanted > self.budget {
            return Err(ShmError::Exhausted {
                wanted,
                budget: self.budget,
            });
        }
        Ok(())
    }

    /// Empties segments that were idle for this long.
    pub fn trim(&mut self, idle: Duration) {
        for segment in self.idle.iter_mut().filter(|s| s.filled) {
            if segment.used.elapsed() >= idle && empty(segment).is_ok() {
                self.bytes -= segment.len;
            }
        }
    }

    /// Notes that the peer now reads a segment; gives the descriptor to pass when the peer does not have it yet.
    pub fn lend(&mut self, mut segment: Segment) -> Result<Option<OwnedFd>, ShmError> {
        let fd = if segment.known {
            None
        } else {
            Some(segment.fd.try_clone()?)
        };
        segment.known = true;
        self.out.insert(segment.id, segment);
        Ok(fd)
    }

    /// The peer gave a segment back.
    pub fn released(&mut self, id: u32) {
        if let Some(segment) = self.out.remove(&id) {
            self.give_back(segment);
        }
    }

    /// Puts back a segment that was never lent.
    pub fn give_back(&mut self, mut segment: Segment) {
        segment.used = Instant::now();
        self.idle.push(segment);
    }

    /// Bytes of all segments that may hold pages, idle or out.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Gives the pages of a segment back to the system.
fn empty(segment: &mut Segment) -> Result<(), ShmError> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&segment.fd, hole, 0, segment.len as u64)?;
    segment.filled = false;
    Ok(())
}

// ------------------------------------------------------------------------------------------------ reading

/// Called with a segment's id when the last view of it is gone.
pub type OnRelease = Arc<dyn Fn(u32) + Send + Sync>;

/// The peer's segments, as far as they were seen.
pub struct Views {
    mapped: HashMap<u32, Arc<Foreign>>,
    on_release: OnRelease,
}

#[derive(Debug)]
struct Foreign {
    mapping: Mapping,
    len: usize,
}

/// One loan of a segment: dropped, it tells the peer.
struct Loan {
    id: u32,
    on_release: OnRelease,
}

impl Drop for Loan {
    fn drop(&mut self) {
        (self.on_release)(self.id);
    }
}

/// A view of part of a segment, which keeps the loan.
struct View {
    segment: Arc<Foreign>,
    offset: usize,
    length: usize,
    _loan: Arc<Loan>,
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: offset + length <= len was checked when the view was made; the seals keep the file that long.
        unsafe {
            std::slice::from_raw_parts(
                self.segment.mapping.start().as_ptr().add(self.offset),
                self.length,
            )
        }
    }
}

impl std::fmt::Debug for Views {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Views({} segments)", self.mapped.len())
    }
}

impl Views {
    /// No segment seen yet.
    pub fn new(on_release: OnRelease) -> Self {
        Self {
            mapped: HashMap::new(),
            on_release,
        }
    }

    /// Takes in a descriptor that came with a frame.
    pub fn learn(&mut self, id: u32, bytes: u64, fd: &OwnedFd) -> Result<(), ShmError> {
        if self.mapped.len() >= MOST_SEGMENTS {
            return Err(ShmError::Protocol("too many segments"));
        }
        let len = usize::try_from(bytes).map_err(|_| ShmError::Protocol("segment too large"))?;
        let stat = fstat(fd)?;
        let wanted = SealFlags::SHRINK | SealFlags::GROW;
        let seals = fcntl_get_seals(fd).map_err(|_| ShmError::Protocol("not a sealed memfd"))?;
        if !seals.contains(wanted) || u64::try_from(stat.st_size) != Ok(bytes) || len == 0 {
            return Err(ShmError::Protocol(
                "segment without seals or of another size",
            ));
        }
        let mapping = Mapping::new(fd, len, false)?;
        self.mapped.insert(id, Arc::new(Foreign { mapping, len }));
        Ok(())
    }

    /// Whether a segment was seen.
    pub fn knows(&self, id: u32) -> bool {
        self.mapped.contains_key(&id)
    }

    /// Views of the spans of one frame, in order. The spans of a segment share one loan, which ends with the last view.
    pub fn borrow(&self, spans: &[Span]) -> Result<Vec<Bytes>, ShmError> {
        let mut loans: HashMap<u32, Arc<Loan>> = HashMap::new();
        spans
            .iter()
            .map(|span| {
                let segment = self
                    .mapped
                    .get(&span.segment)
                    .ok_or(ShmError::Protocol("unknown segment"))?;
                let loan = loans.entry(span.segment).or_insert_with(|| {
                    Arc::new(Loan {
                        id: span.segment,
                        on_release: self.on_release.clone(),
                    })
                });
                let end = span.offset.checked_add(span.length);
                if end.is_none_or(|end| end > segment.len as u64) {
                    return Err(ShmError::Protocol("span outside its segment"));
                }
                Ok(Bytes::from_owner(View {
                    segment: segment.clone(),
                    offset: span.offset as usize,
                    length: span.length as usize,
                    _loan: loan.clone(),
                }))
            })
            .collect()
    }
}

/// A pool behind a lock; the lock is held for moments only.
#[derive(Debug, Clone)]
pub struct SharedPool(Arc<Mutex<Pool>>);

impl SharedPool {
    /// See [`Pool::new`].
    pub fn new(budget: usize) -> Self {
        Self(Arc::new(Mutex::new(Pool::new(budget))))
    }

    /// Runs with the pool.
    pub fn with<T>(&self, f: impl FnOnce(&mut Pool) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn views() -> (Views, Arc<AtomicU32>) {
        let released = Arc::new(AtomicU32::new(0));
        let count = released.clone();
        let views = Views::new(Arc::new(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        }));
        (views, released)
    }

    #[test]
    fn what_is_written_is_read_and_the_segment_comes_back_once() {
        let mut pool = Pool::new(1 << 20);
        let mut s = pool.take(100).unwrap();
        s.bytes_mut()[64..68].copy_from_slice(b"abcd");
        let spans = [s.span(64, 2), s.span(66, 2)];
        let id = s.id;
        let fd = pool
            .lend(s)
            .unwrap()
            .expect("the first loan passes the descriptor");
        let (mut views, released) = views();
        views.learn(id, SMALLEST as u64, &fd).unwrap();
        let got = views.borrow(&spans).unwrap();
        assert_eq!((&got[0][..], &got[1][..]), (&b"ab"[..], &b"cd"[..]));
        drop(got[0].clone());
        let last = got[1].clone();
        drop(got);
        assert_eq!(released.load(Ordering::SeqCst), 0, "a view is still out");
        drop(last);
        assert_eq!(released.load(Ordering::SeqCst), 1);
        pool.released(id);
        let again = pool.take(100).unwrap();
        assert_eq!(again.id, id, "reused");
        assert!(pool.lend(again).unwrap().is_none(), "the peer has it");
    }

    #[test]
    fn the_budget_holds_and_idle_segments_make_room() {
        let mut pool = Pool::new(4 * SMALLEST);
        let held: Vec<_> = (0..4).map(|_| pool.take(1).unwrap()).collect();
        assert!(matches!(pool.take(1), Err(ShmError::Exhausted { .. })));
        held.into_iter().for_each(|s| pool.give_back(s));
        assert!(pool.take(4 * SMALLEST).is_ok());
        assert_eq!(pool.bytes(), 4 * SMALLEST);
    }

    #[test]
    fn a_trimmed_segment_holds_nothing_and_serves_again_under_its_old_mapping() {
        let mut pool = Pool::new(4 * SMALLEST);
        let mut s = pool.take(SMALLEST).unwrap();
        s.bytes_mut().fill(7);
        let (id, spans) = (s.id, [s.span(0, SMALLEST)]);
        let fd = pool.lend(s).unwrap().unwrap();
        let (mut views, _) = views();
        views.learn(id, SMALLEST as u64, &fd).unwrap();
        let pages = |fd: &OwnedFd| fstat(fd).unwrap().st_blocks;
        assert!(pages(&fd) > 0);
        pool.released(id);
        pool.trim(Duration::from_secs(3600));
        assert!(pages(&fd) > 0, "it was used a moment ago");
        pool.trim(Duration::ZERO);
        assert_eq!((pages(&fd), pool.bytes()), (0, 0));
        let mut again = pool.take(SMALLEST).unwrap();
        assert_eq!(again.id, id);
        again.bytes_mut()[0] = 9;
        let seen = views.borrow(&spans).unwrap();
        assert_eq!(
            seen[0][..2],
            [9, 0],
            "the peer's mapping is the same memory"
        );
    }

    #[test]
    fn a_length_beyond_all_memory_is_refused() {
        let mut pool = Pool::new(1 << 20);
        for len in [(1 << 20) + 1, usize::MAX] {
            assert!(matches!(pool.take(len), Err(ShmError::Exhausted { .. })));
        }
    }

    #[test]
    fn spans_outside_and_unsealed_descriptors_are_refused() {
        let mut pool = Pool::new(1 << 20);
        let s = pool.take(1).unwrap();
        let (id, wrong) = (s.id, [s.span(SMALLEST, 1)]);
        let fd = pool.lend(s).unwrap().unwrap();
        let (mut views, _) = views();
        assert!(views.learn(id, SMALLEST as u64 + 1, &fd).is_err(), "size");
        views.learn(id, SMALLEST as u64, &fd).unwrap();
        assert!(views.borrow(&wrong).is_err());
        let open = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&open, SMALLEST as u64).unwrap();
        assert!(views.learn(9, SMALLEST as u64, &open).is_err(), "seals");
    }
}
