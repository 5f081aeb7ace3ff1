//! Probes on the disk: a folder for each, with `probe.json` and the weights beside it.
//!
//! ```text
//!   probes/
//!     sentiment/
//!       probe.json                   names the file of weights and its SHA-256
//!       weights-5f2c.safetensors     HOOK/weight, HOOK/bias; of an MLP HOOK/hidden_weight, HOOK/hidden_bias
//! ```
//!
//! A probe is replaced by one rename, that of `probe.json`: whoever reads finds the old one or the new one whole, and a disk that is full or
//! read-only leaves the old one. Files that do not add up are data loss, and no other probe is the worse for it. Nothing in them is code.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use sha2::{Digest as _, Sha256};

use super::card::{Card, TensorFile};
use crate::{
    engine::EngineError,
    tensor::{DType, Tensor},
};

/// Longest name, in bytes.
pub const NAME_LIMIT: usize = 64;
/// Largest file of weights, and largest description.
const TENSORS_LIMIT: u64 = 256 << 20;
const CARD_LIMIT: u64 = 4 << 20;
/// Folders looked at, at most.
const ENTRY_LIMIT: usize = 10_000;
/// Name of the description.
pub(super) const CARD: &str = "probe.json";
const ENDING: &str = ".safetensors";

/// Weights by `HOOK/part`.
pub type Weights = BTreeMap<String, Tensor>;

/// The probes of one model.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    writing: Arc<Writing>,
}

/// What those share who change files.
#[derive(Debug, Default)]
pub struct Writing {
    /// Two at a time would tidy away each other's.
    turn: Mutex<()>,
    /// Counts what was changed.
    changes: AtomicU64,
}

/// A probe, read and checked.
#[derive(Clone, Debug)]
pub struct Stored {
    /// What is known of it.
    pub card: Card,
    /// Its weights.
    pub weights: Weights,
}

/// What a folder holds.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Probes that can be read, by name.
    pub cards: Vec<Card>,
    /// Those that cannot, with why.
    pub broken: Vec<(String, String)>,
}

/// Whether a name can be a probe's.
///
/// # Errors
/// Why not, with the field.
pub fn check_name(name: &str, field: &str) -> Result<(), EngineError> {
    check_name_of("a probe", name, field)
}

/// Whether a name can be that of something that is stored beside a model: it leaves no folder.
///
/// # Errors
/// Why not, with the field.
pub fn check_name_of(what: &str, name: &str, field: &str) -> Result<(), EngineError> {
    let fits = !name.is_empty()
        && name.len() <= NAME_LIMIT
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if fits {
        return Ok(());
    }
    Err(EngineError::invalid(
        field,
        format!(
            "{what}'s name has 1 to {NAME_LIMIT} letters, digits, '.', '_' and '-', and begins with a letter or digit"
        ),
    ))
}

impl Writing {
    /// Grows with every change.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Whoever holds it changes files; the change counts when it is let go.
    fn turn(&self) -> Turn<'_> {
        Turn {
            changes: &self.changes,
            _turn: self.turn.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

struct Turn<'a> {
    changes: &'a AtomicU64,
    _turn: std::sync::MutexGuard<'a, ()>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.changes.fetch_add(1, Ordering::Release);
    }
}

impl Store {
    /// Probes in this folder, which need not be there yet; those who hold the same lock take turns at changing them.
    pub fn new(folder: PathBuf, writing: Arc<Writing>) -> Self {
        Self { folder, writing }
    }

    /// Where a probe is, or would be.
    ///
    /// # Errors
    /// For a name that no probe has.
    pub fn path(&self, name: &str) -> Result<PathBuf, EngineError> {
        check_name(name, "name")?;
        Ok(self.folder.join(name))
    }

    /// Every probe.
    ///
    /// # Errors
    /// When the folder is there and cannot be read.
    pub fn list(&self) -> Result<Listing, EngineError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Listing::default()),
            Err(e) => return Err(unreadable("the folder of probes", &e)),
        };
        let mut names: Vec<String> = entries
            .take(ENTRY_LIMIT)
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|name| check_name(name, "").is_ok())
            .collect();
        names.sort();
        let mut listing = Listing::default();
        for name in names {
            match self.card(&name) {
                Ok(card) => listing.cards.push(card),
                Err(EngineError::NotFound { .. }) => {}
                Err(error) => listing.broken.push((name, error.to_string())),
            }
        }
        Ok(listing)
    }

    /// What is known of a probe.
    ///
    /// # Errors
    /// [`EngineError::NotFound`]; [`EngineError::DataLoss`] for files that do not add up.
    pub fn card(&self, name: &str) -> Result<Card, EngineError> {
        check_name(name, "name")?;
        let path = self.folder.join(name).join(CARD);
        let bytes = match read(&path, CARD_LIMIT) {
            Err(e) if missing(&e) => {
                return Err(EngineError::not_found(format!(
                    "there is no probe \"{name}\": list the model's probes"
                )));
            }
            other => other.map_err(|e| broken(name, &e.kind().to_string()))?,
        };
        card(name, &bytes)
    }

    /// A probe with its weights.
    ///
    /// # Errors
    /// As [`Store::card`].
    pub fn get(&self, name: &str) -> Result<Stored, EngineError> {
        let card = self.card(name)?;
        let bytes = self.tensors(&card)?;
        let weights = weights(name, &bytes)?;
        Ok(Stored { card, weights })
    }

    /// The files of a probe: description, weights. Only these hook points, by their canonical names, unless none is named.
    ///
    /// # Errors
    /// As [`Store::card`]; beneath `hooks` for one that the probe does not have.
    pub fn export(&self, name: &str, hooks: &[String]) -> Result<(Vec<u8>, Vec<u8>), EngineError> {
        let card = self.card(name)?;
        let tensors = self.tensors(&card)?;
        if hooks.is_empty() {
            return Ok((described(&card)?, tensors));
        }
        let of = |part: &str| part.rsplit_once('/').map(|(hook, _)| hook.to_owned());
        let mut weights = weights(name, &tensors)?;
        weights.retain(|part, _| of(part).is_some_and(|hook| hooks.contains(&hook)));
        let tensors = safetensors(&weights)?;
        let card = some(card, hooks, digest(&tensors))?;
        Ok((described(&card)?, tensors))
    }

    fn tensors(&self, card: &Card) -> Result<Vec<u8>, EngineError> {
        let path = self.folder.join(&card.name).join(&card.tensors.file);
        let bytes = read(&path, TENSORS_LIMIT)
            .map_err(|e| broken(&card.name, &format!("its weights: {}", e.kind())))?;
        if digest(&bytes) != card.tensors.sha256 {
            return Err(broken(
                &card.name,
                "its weights are not those that were stored",
            ));
        }
        Ok(bytes)
    }

    /// Stores a probe under the card's name.
    ///
    /// # Errors
    /// [`EngineError::AlreadyExists`] when one is there and is not to be replaced; [`EngineError::FailedPrecondition`] when the disk does not
    /// take it.
    pub fn put(
        &self,
        mut card: Card,
        weights: &Weights,
        replace: bool,
    ) -> Result<Card, EngineError> {
        check_name(&card.name, "name")?;
        let _turn = self.writing.turn();
        self.may_put(&card.name, replace)?;
        let folder = self.folder.join(&card.name);
        let bytes = safetensors(weights)?;
        let sha256 = digest(&bytes);
        card.tensors = TensorFile {
            file: format!("weights-{}{ENDING}", &sha256[..16]),
            sha256,
        };
        let described = described(&card)?;
        for (what, size, limit) in [
            ("weights", bytes.len(), TENSORS_LIMIT),
            ("description", described.len(), CARD_LIMIT),
        ] {
            if size as u64 > limit {
                return Err(EngineError::precondition(format!(
                    "the {what} of probe \"{}\" would take {size} bytes, and may take {limit}: name fewer hook points",
                    card.name
                )));
            }
        }
        let written = (|| -> io::Result<()> {
            fs::create_dir_all(&folder)?;
            write(&folder, &card.tensors.file, &bytes)?;
            write(&folder, CARD, &described)
        })();
        if let Err(e) = written {
            // What the first write left is read by nothing; a folder without a description is no probe.
            self.tidy(&card.name);
            return Err(EngineError::precondition(format!(
                "probe \"{}\" could not be stored ({}): the folder of probes must be writable and its disk have room; \
                 a probe that was there before is as it was",
                card.name,
                e.kind()
            )));
        }
        self.tidy(&card.name);
        Ok(card)
    }

    /// Whether a probe of this name may be stored.
    ///
    /// # Errors
    /// [`EngineError::AlreadyExists`].
    pub fn may_put(&self, name: &str, replace: bool) -> Result<(), EngineError> {
        if !replace && self.folder.join(name).join(CARD).exists() {
            return Err(EngineError::already_exists(format!(
                "there is a probe \"{name}\" already: delete it, choose another name, or ask to replace it"
            )));
        }
        Ok(())
    }

    /// Removes a probe, also one that cannot be read.
    ///
    /// # Errors
    /// [`EngineError::NotFound`]; [`EngineError::FailedPrecondition`] when the disk does not let it go.
    pub fn delete(&self, name: &str) -> Result<(), EngineError> {
        check_name(name, "name")?;
        let _turn = self.writing.turn();
        let folder = self.folder.join(name);
        // Without its description it is no probe, whatever happens next.
        let gone = fs::remove_file(folder.join(CARD)).and_then(|()| fs::remove_dir_all(&folder));
        gone.map_err(|e| {
            if missing(&e) {
                return EngineError::not_found(format!("there is no probe \"{name}\""));
            }
            EngineError::precondition(format!(
                "probe \"{name}\" could not be removed ({}): the folder of probes must be writable",
                e.kind()
            ))
        })
    }

    /// Removes files of weights that the description does not name. What stays is read by nothing.
    fn tidy(&self, name: &str) {
        let folder = self.folder.join(name);
        let current = self.card(name).map(|card| card.tensors.file);
        let Ok(entries) = fs::read_dir(&folder) else {
            return;
        };
        for entry in entries.take(ENTRY_LIMIT).flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            let left = file.ends_with(ENDING) || file.starts_with(TEMPORARY);
            if left && current.as_ref().ok() != Some(&file) {
                let _ = fs::remove_file(entry.path());
            }
        }
        if current.is_err() {
            let _ = fs::remove_dir(&folder);
        }
    }
}

/// How files begin that are not whole yet.
const TEMPORARY: &str = ".new-";

/// Writes a file whole or not at all.
fn write(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(folder.join(name)).map_err(|e| e.error)?;
    File::open(folder)?.sync_all()
}

fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if read as u64 > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Whether something is not there.
pub(in crate::methods) fn missing(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn card(name: &str, bytes: &[u8]) -> Result<Card, EngineError> {
    let card = super::card::read(bytes).map_err(|why| broken(name, &why))?;
    let file = &card.tensors.file;
    if !file.ends_with(ENDING) || file.contains('/') || file.starts_with('.') {
        return Err(broken(name, "it names no file of weights beside it"));
    }
    if card.name != name {
        return Err(broken(
            name,
            &format!("it describes the probe \"{}\"", card.name),
        ));
    }
    Ok(card)
}

/// Reads weights: floats of single precision only, all finite.
///
/// # Errors
/// [`EngineError::DataLoss`].
pub fn weights(name: &str, bytes: &[u8]) -> Result<Weights, EngineError> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| broken(name, &e.to_string()))?;
    file.iter()
        .map(|(part, view)| {
            if view.dtype() != Dtype::F32 {
                return Err(broken(name, &format!("\"{part}\" is not of type F32")));
            }
            let tensor = Tensor::new(
                DType::F32,
                view.shape().to_vec(),
                Bytes::copy_from_slice(view.data()),
            )
            .map_err(|e| broken(name, &e.to_string()))?;
            let values = tensor.to_f32().map_err(|e| broken(name, &e.to_string()))?;
            if values.iter().any(|v| !v.is_finite()) {
                return Err(broken(
                    name,
                    &format!("\"{part}\" holds a number that is not finite"),
                ));
            }
            drop(values);
            Ok((part.to_owned(), tensor))
        })
        .collect()
}

fn safetensors(weights: &Weights) -> Result<Vec<u8>, EngineError> {
    let views: Vec<(&String, TensorView<'_>)> = weights
        .iter()
        .map(|(part, tensor)| {
            let view = TensorView::new(Dtype::F32, tensor.shape().to_vec(), tensor.bytes());
            Ok((part, view.map_err(EngineError::internal)?))
        })
        .collect::<Result<_, EngineError>>()?;
    ::safetensors::serialize(views, None).map_err(EngineError::internal)
}

fn described(card: &Card) -> Result<Vec<u8>, EngineError> {
    serde_json::to_vec_pretty(card).map_err(EngineError::internal)
}

fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |mut hex, b| {
            let _ = write!(hex, "{b:02x}");
            hex
        })
}

/// What is said of files that do not add up.
pub(super) fn broken(name: &str, why: &str) -> EngineError {
    EngineError::DataLoss {
        message: crate::engine::error::clean(&format!(
            "probe \"{name}\" cannot be read: {why}; delete it or bring it anew"
        )),
    }
}

/// A description of some of its hook points, whose weights have this digest.
fn some(mut card: Card, hooks: &[String], sha256: String) -> Result<Card, EngineError> {
    for (at, hook) in hooks.iter().enumerate() {
        if !card.reports.iter().any(|r| r.hook == *hook) {
            let has: Vec<&str> = card.reports.iter().map(|r| r.hook.as_str()).collect();
            return Err(EngineError::invalid(
                format!("hooks[{at}]"),
                format!("the probe has no \"{hook}\": it has {}", has.join(", ")),
            ));
        }
    }
    card.reports.retain(|r| hooks.contains(&r.hook));
    if !hooks.contains(&card.best) {
        card.best = super::train::best(&card.reports);
    }
    card.tensors.sha256 = sha256;
    Ok(card)
}

fn unreadable(what: &str, e: &io::Error) -> EngineError {
    EngineError::precondition(format!("{what} cannot be read: {}", e.kind()))
}
