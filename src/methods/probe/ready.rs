//! Probes of all models, read once and kept until their files change.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use dashmap::DashMap;

use super::{
    card::Card,
    score::Asked,
    scorer::Scorer,
    store::{CARD, Store, Stored, Writing, broken},
};
use crate::{engine::EngineError, ipc::info::ModelInfo};

/// A probe that can score.
#[derive(Debug)]
pub struct Ready {
    /// What is known of it.
    pub card: Card,
    /// By hook point.
    pub scorers: BTreeMap<String, Scorer>,
}

/// See the module.
#[derive(Debug)]
pub struct Probes {
    /// Where probes are, a folder for each model; beside each model unless said.
    folder: Option<PathBuf>,
    /// By model and name.
    kept: DashMap<(String, String), Kept>,
    /// See [`Store`].
    writing: Arc<Writing>,
}

#[derive(Debug)]
struct Kept {
    stamp: Stamp,
    ready: Arc<Ready>,
    looked: Looked,
}

/// When the files were looked at last.
#[derive(Clone, Copy, Debug)]
struct Looked {
    at: Instant,
    /// Of [`Writing::changes`], before.
    changes: u64,
}

impl Looked {
    fn now(writing: &Writing) -> Self {
        Self {
            at: Instant::now(),
            changes: writing.changes(),
        }
    }
}

/// So long files are taken to be what they were, unless we changed any: another process's change shows that much later.
const FRESH: Duration = Duration::from_secs(1);

/// Changes when a probe is replaced: by a file with another number.
type Stamp = (u64, SystemTime, u64);

impl Probes {
    /// In this folder, or beside each model.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self {
            folder,
            kept: DashMap::new(),
            writing: Arc::default(),
        }
    }

    /// Those of a model whose files are in this folder.
    pub fn store(&self, model: &str, beside: &Path) -> Store {
        let folder = match &self.folder {
            Some(folder) => folder.join(model),
            None => beside.join("probes"),
        };
        Store::new(folder, self.writing.clone())
    }

    /// A probe of a store that fits a model, at one of its hook points.
    ///
    /// # Errors
    /// Those of [`Store::get`]; [`EngineError::DataLoss`] for a probe of this very model whose weights are of another width;
    /// [`EngineError::FailedPrecondition`] for a probe of another model unless `force`, or a hook point that the model or the probe lacks.
    pub fn asked(
        &self,
        store: &Store,
        info: &ModelInfo,
        (name, hook, force): (&str, &str, bool),
    ) -> Result<Asked, EngineError> {
        let probe = self.ready(store, &info.name, name)?;
        fitting(probe, info, (name, hook, force))
    }

    /// The same without a look at the disk, where there was one a moment ago.
    ///
    /// # Errors
    /// As [`Probes::asked`].
    pub fn at_hand(
        &self,
        info: &ModelInfo,
        (name, hook, force): (&str, &str, bool),
    ) -> Option<Result<Asked, EngineError>> {
        let kept = self.kept.get(&(info.name.clone(), name.to_owned()))?;
        let Looked { at, changes } = kept.looked;
        let fresh = changes == self.writing.changes() && at.elapsed() < FRESH;
        let ready = fresh.then(|| kept.ready.clone())?;
        drop(kept);
        Some(fitting(ready, info, (name, hook, force)))
    }

    fn ready(&self, store: &Store, model: &str, name: &str) -> Result<Arc<Ready>, EngineError> {
        let path = store.path(name)?;
        let key = (model.to_owned(), name.to_owned());
        let looked = Looked::now(&self.writing);
        let stamp = stamp(&path);
        if let (Some(mut kept), Some(stamp)) = (self.kept.get_mut(&key), stamp)
            && kept.stamp == stamp
        {
            kept.looked = looked;
            return Ok(kept.ready.clone());
        }
        let Stored { card, scorers } = store.get(name).inspect_err(|_| {
            self.kept.remove(&key);
        })?;
        let ready = Arc::new(Ready { card, scorers });
        if let Some(stamp) = stamp {
            let kept = Kept {
                stamp,
                ready: ready.clone(),
                looked,
            };
            self.kept.insert(key, kept);
        }
        Ok(ready)
    }
}

/// A probe that fits a model, at one of its hook points.
fn fitting(
    probe: Arc<Ready>,
    info: &ModelInfo,
    (name, hook, force): (&str, &str, bool),
) -> Result<Asked, EngineError> {
    let card = &probe.card;
    if card.fingerprint != info.fingerprint && !force {
        return Err(EngineError::precondition(format!(
            "probe \"{name}\" was trained on a model of another fingerprint ({} ...): train it anew, or force it",
            card.fingerprint.get(..12).unwrap_or(&card.fingerprint)
        )));
    }
    let hook = if hook.is_empty() { &card.best } else { hook };
    let canonical = info.hook(hook).map_or(hook, |h| h.name.as_str()).to_owned();
    let Some(scorer) = probe.scorers.get(&canonical) else {
        let has: Vec<&str> = probe.scorers.keys().map(String::as_str).collect();
        return Err(EngineError::invalid(
            "hook",
            format!(
                "probe \"{name}\" has no \"{hook}\": it has {}",
                has.join(", ")
            ),
        ));
    };
    let width = features(info, &canonical);
    if let Some(width) = width.filter(|w| *w != scorer.width())
        && card.fingerprint == info.fingerprint
    {
        let of = scorer.width();
        let why = format!("its weights read {of} features of \"{canonical}\", which has {width}");
        return Err(broken(name, &why));
    }
    reads(info, name, &canonical, scorer)?;
    Ok(Asked {
        hook: canonical,
        probe,
    })
}

/// Whether a model has what a probe reads.
///
/// # Errors
/// [`EngineError::FailedPrecondition`] when it does not.
pub fn reads(info: &ModelInfo, name: &str, hook: &str, scorer: &Scorer) -> Result<(), EngineError> {
    if features(info, hook) == Some(scorer.width()) {
        return Ok(());
    }
    Err(EngineError::precondition(format!(
        "probe \"{name}\" reads {} features of \"{hook}\", which model \"{}\" does not have",
        scorer.width(),
        info.name
    )))
}

/// Features of a hook point, where the model has it and they are known.
fn features(info: &ModelInfo, hook: &str) -> Option<usize> {
    info.hook(hook)
        .and_then(|h| h.dims.last().copied().flatten())
}

/// Of a probe's folder; of one behind a link there is none.
fn stamp(folder: &Path) -> Option<Stamp> {
    let real = fs::symlink_metadata(folder).ok()?.is_dir();
    let meta = real
        .then(|| fs::symlink_metadata(folder.join(CARD)))?
        .ok()?;
    Some((meta.ino(), meta.modified().ok()?, meta.len()))
}
