//! Probes of all models, read once and kept until their files change.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::SystemTime,
};

use dashmap::DashMap;

use super::{
    card::Card,
    score::Asked,
    scorer::Scorer,
    store::{CARD, Store, Stored},
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
    kept: DashMap<PathBuf, Kept>,
    /// See [`Store`].
    writing: Arc<Mutex<()>>,
}

#[derive(Debug)]
struct Kept {
    stamp: Stamp,
    ready: Arc<Ready>,
}

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
    /// Those of [`Store::get`]; [`EngineError::FailedPrecondition`] for a probe of another model unless `force`, or a hook point that the model or
    /// the probe lacks.
    pub fn asked(
        &self,
        store: &Store,
        info: &ModelInfo,
        (name, hook, force): (&str, &str, bool),
    ) -> Result<Asked, EngineError> {
        let probe = self.ready(store, name)?;
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
            return Err(EngineError::precondition(format!(
                "probe \"{name}\" has no \"{hook}\": it has {}",
                has.join(", ")
            )));
        };
        let width = info.hook(&canonical).and_then(|h| h.dims.last().copied());
        if width != Some(Some(scorer.width())) {
            return Err(EngineError::precondition(format!(
                "probe \"{name}\" reads {} features of \"{canonical}\", which model \"{}\" does not have",
                scorer.width(),
                info.name
            )));
        }
        Ok(Asked {
            hook: canonical,
            probe,
        })
    }

    fn ready(&self, store: &Store, name: &str) -> Result<Arc<Ready>, EngineError> {
        let path = store.path(name)?;
        let stamp = stamp(&path.join(CARD));
        if let (Some(kept), Some(stamp)) = (self.kept.get(&path), stamp)
            && kept.stamp == stamp
        {
            return Ok(kept.ready.clone());
        }
        let Stored { card, weights } = store.get(name)?;
        let scorers = card
            .reports
            .iter()
            .map(|r| Ok((r.hook.clone(), Scorer::of(&card, &weights, &r.hook)?)))
            .collect::<Result<_, EngineError>>()?;
        let ready = Arc::new(Ready { card, scorers });
        if let Some(stamp) = stamp {
            let ready = ready.clone();
            self.kept.insert(path, Kept { stamp, ready });
        }
        Ok(ready)
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.modified().ok()?, meta.len()))
}
