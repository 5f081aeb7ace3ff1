//! Means that were computed are kept, until newer ones need their room: the same texts are the reference of many ablations.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use sha2::{Digest as _, Sha256};

use super::operand::Grid;
use crate::engine::{ModelHandle, RowGroup};

/// Most bytes that are kept.
const ROOM: usize = 64 << 20;

/// What a mean is of: a load of a model, inputs, a hook point, and whether positions are averaged too.
type Key = [u8; 32];

/// See the module. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Means(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    grids: BTreeMap<Key, Arc<Grid>>,
    /// The oldest first.
    order: VecDeque<Key>,
    bytes: usize,
}

/// Names a set of inputs of a model; two sets of the same name have the same means.
pub(super) fn named(handle: &ModelHandle, groups: &[RowGroup]) -> Sha256 {
    let mut hash = Sha256::new();
    let mut put = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    put(handle.info().name.as_bytes());
    put(handle.info().fingerprint.as_bytes());
    put(&handle.generation().to_le_bytes());
    for group in groups {
        put(&(group.inputs.len() as u64).to_le_bytes());
        for input in &group.inputs {
            put(input.name.as_bytes());
            put(format!("{:?}", input.tensor.shape()).as_bytes());
            put(input.tensor.bytes());
        }
    }
    hash
}

impl Means {
    /// The mean at a hook point, if it is kept.
    pub(super) fn get(&self, of: &Sha256, hook: &str, positions: bool) -> Option<Arc<Grid>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.grids.get(&key(of, hook, positions)).cloned()
    }

    /// Keeps a mean.
    pub(super) fn put(&self, of: &Sha256, hook: &str, positions: bool, grid: &Arc<Grid>) {
        let size = |grid: &Grid| grid.values.len() * size_of::<f32>();
        let key = key(of, hook, positions);
        if size(grid) > ROOM {
            return;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.grids.insert(key, grid.clone()).is_none() {
            kept.order.push_back(key);
            kept.bytes += size(grid);
        }
        while kept.bytes > ROOM {
            let Some(oldest) = kept.order.pop_front() else {
                break;
            };
            let gone = kept.grids.remove(&oldest);
            kept.bytes -= gone.map_or(0, |g| size(&g));
        }
    }
}

fn key(of: &Sha256, hook: &str, positions: bool) -> Key {
    let mut hash = of.clone();
    hash.update(hook.as_bytes());
    hash.update([u8::from(positions)]);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_until_its_room_is_needed() {
        let means = Means::default();
        let of = |n: u8| Sha256::new().chain_update([n]);
        let large = Arc::new(Grid {
            shape: vec![ROOM / 8],
            values: vec![1.0; ROOM / 8],
        });
        means.put(&of(1), "a", true, &large);
        assert_eq!(means.get(&of(1), "a", true), Some(large.clone()));
        assert_eq!(means.get(&of(1), "a", false), None);
        assert_eq!(means.get(&of(1), "b", true), None);
        assert_eq!(means.get(&of(2), "a", true), None);
        means.put(&of(2), "a", true, &large);
        means.put(&of(3), "a", true, &large);
        assert_eq!(means.get(&of(1), "a", true), None, "the oldest went");
        assert!(means.get(&of(2), "a", true).is_some() && means.get(&of(3), "a", true).is_some());
        let larger = Arc::new(Grid {
            shape: vec![ROOM],
            values: vec![1.0; ROOM],
        });
        means.put(&of(4), "a", true, &larger);
        assert_eq!(means.get(&of(4), "a", true), None);
        assert!(means.get(&of(3), "a", true).is_some());
    }
}
