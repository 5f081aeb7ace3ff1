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
//! read-only leaves the old one. Before it is written it is read back, and what could not be read is refused. Files that do not add up are data
//! loss, and no other probe is the worse for it. Nothing in them is code.
//!
//! A probe's folder is a folder and its files are regular files: nothing follows a link out of the store, or waits for a pipe.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use sha2::{Digest as _, Sha256};

use super::{
    card::{self, Card, TensorFile},
    scorer::Scorer,
};
use crate::{
    engine::EngineError,
    tensor::{DType, Tensor},
};

/// Longest name, in bytes.
pub const NAME_LIMIT: usize = 64;
/// Largest file of weights, and largest description: of 49 hook points with the confusion of 128 classes each, of 20 digits a count.
const TENSORS_LIMIT: u64 = 256 << 20;
const CARD_LIMIT: u64 = 32 << 20;
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
    /// Its weights, by hook point.
    pub scorers: BTreeMap<String, Scorer>,
}

/// What a folder holds.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Probes that can be read with their weights, by name; see [`Card::brief`].
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
            .filter_map(Result::ok)
            // Somebody's notes are no broken probe.
            .filter(|e| e.file_type().is_ok_and(|kind| !kind.is_file()))
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|name| check_name(name, "").is_ok())
            .collect();
        names.sort();
        let mut listing = Listing::default();
        for name in names {
            match self.get(&name) {
                Ok(stored) => listing.cards.push(stored.card.brief()),
                Err(EngineError::NotFound { .. }) => {}
                Err(error) => listing.broken.push((name, error.to_string())),
            }
        }
        Ok(listing)
    }

    /// What is known of a probe, whatever its weights are.
    ///
    /// # Errors
    /// [`EngineError::NotFound`]; [`EngineError::DataLoss`] for files that do not add up.
    pub fn card(&self, name: &str) -> Result<Card, EngineError> {
        check_name(name, "name")?;
        let bytes = self
            .place(name)
            .and_then(|f| read(&f.join(CARD), CARD_LIMIT));
        let bytes = match bytes {
            Err(e) if missing(&e) => {
                return Err(EngineError::not_found(format!(
                    "there is no probe \"{name}\": list the model's probes"
                )));
            }
            other => other.map_err(|e| broken(name, &why(&e)))?,
        };
        card_of(name, &bytes).map_err(|why| broken(name, &why))
    }

    /// A probe with its weights.
    ///
    /// # Errors
    /// As [`Store::card`].
    pub fn get(&self, name: &str) -> Result<Stored, EngineError> {
        let (card, bytes) = self.files(name)?;
        stored(card, &bytes).map_err(|why| broken(name, &why))
    }

    /// A probe's folder, or that there is something else at its place.
    fn place(&self, name: &str) -> io::Result<PathBuf> {
        let folder = self.folder.join(name);
        if folder.symlink_metadata()?.is_dir() {
            return Ok(folder);
        }
        Err(refused("what lies at its place is no folder"))
    }

    /// The files of a probe: description, weights. Only these hook points, by their canonical names, unless none is named.
    ///
    /// # Errors
    /// As [`Store::card`]; beneath `hooks` for one that the probe does not have.
    pub fn export(&self, name: &str, hooks: &[String]) -> Result<(Vec<u8>, Vec<u8>), EngineError> {
        let (card, tensors) = self.files(name)?;
        same(&card.tensors, &tensors).map_err(|why| broken(name, &why))?;
        if hooks.is_empty() {
            return Ok((card::write(&card).map_err(EngineError::internal)?, tensors));
        }
        let of = |part: &str| part.rsplit_once('/').map(|(hook, _)| hook.to_owned());
        let mut weights = weights(&tensors).map_err(|why| broken(name, &why))?;
        weights.retain(|part, _| of(part).is_some_and(|hook| hooks.contains(&hook)));
        let tensors = safetensors(&weights)?;
        let card = some(card, hooks, digest(&tensors))?;
        Ok((card::write(&card).map_err(EngineError::internal)?, tensors))
    }

    /// A description, and the bytes of the weights that it names.
    fn files(&self, name: &str) -> Result<(Card, Vec<u8>), EngineError> {
        let card = self.card(name)?;
        let path = self.folder.join(name).join(&card.tensors.file);
        match read(&path, TENSORS_LIMIT) {
            Ok(bytes) => Ok((card, bytes)),
            // Replaced in between, or removed?
            Err(_) if self.card(name)?.tensors != card.tensors => self.files(name),
            Err(e) => Err(broken(name, &format!("its weights: {}", why(&e)))),
        }
    }

    /// Stores a probe under the card's name.
    ///
    /// # Errors
    /// [`EngineError::AlreadyExists`] when one is there and is not to be replaced; [`EngineError::Storage`] when it could not be read
    /// again, and when the disk does not take it.
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
        // What is not finite is nothing in JSON, and would be read as absent.
        card.check().map_err(|why| unfit(&card.name, &why))?;
        let described = card::write(&card).map_err(EngineError::internal)?;
        for (what, size, limit) in [
            ("weights", bytes.len(), TENSORS_LIMIT),
            ("description", described.len(), CARD_LIMIT),
        ] {
            if size as u64 > limit {
                return Err(EngineError::storage(format!(
                    "the {what} of probe \"{}\" would take {size} bytes, and may take {limit}: name fewer hook points",
                    card.name
                )));
            }
        }
        let back = card_of(&card.name, &described).and_then(|card| stored(card, &bytes));
        back.map_err(|why| unfit(&card.name, &why))?;
        let written = (|| -> io::Result<()> {
            fs::create_dir_all(&folder)?;
            write(&folder, &card.tensors.file, &bytes)?;
            write(&folder, CARD, &described)
        })();
        if let Err(e) = written {
            // What the first write left is read by nothing; a folder without a description is no probe.
            self.tidy(&card.name);
            return Err(EngineError::storage(format!(
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
    /// [`EngineError::AlreadyExists`]; [`EngineError::Storage`] where no probe can be.
    pub fn may_put(&self, name: &str, replace: bool) -> Result<(), EngineError> {
        let there = self
            .place(name)
            .and_then(|folder| folder.join(CARD).symlink_metadata());
        match there {
            Ok(_) if !replace => Err(EngineError::already_exists(format!(
                "there is a probe \"{name}\" already: delete it, choose another name, or ask to replace it"
            ))),
            Ok(kind) if kind.is_dir() => Err(unfit(
                name,
                "its description is a folder: delete the probe first",
            )),
            Ok(_) => Ok(()),
            Err(e) if missing(&e) => Ok(()),
            Err(e) => Err(unfit(name, &why(&e))),
        }
    }

    /// Removes a probe, also one that cannot be read. Of a link it removes the link.
    ///
    /// # Errors
    /// [`EngineError::NotFound`]; [`EngineError::Storage`] when the disk does not let it go.
    pub fn delete(&self, name: &str) -> Result<(), EngineError> {
        check_name(name, "name")?;
        let _turn = self.writing.turn();
        let gone = remove(&self.folder.join(name));
        gone.map_err(|e| {
            if missing(&e) {
                return EngineError::not_found(format!("there is no probe \"{name}\""));
            }
            EngineError::storage(format!(
                "probe \"{name}\" could not be removed ({}): the folder of probes must be writable",
                e.kind()
            ))
        })
    }

    /// Removes files of weights that the description does not name. What stays is read by nothing.
    fn tidy(&self, name: &str) {
        let folder = self.folder.join(name);
        let current = match self.card(name) {
            Ok(card) => Some(card.tensors.file),
            Err(EngineError::NotFound { .. }) => None,
            // Nothing is known of what it needs.
            Err(_) => return,
        };
        let Ok(entries) = fs::read_dir(&folder) else {
            return;
        };
        for entry in entries.take(ENTRY_LIMIT).flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            let left = file.ends_with(ENDING) || file.starts_with(TEMPORARY);
            if left && current.as_ref() != Some(&file) {
                let _ = fs::remove_file(entry.path());
            }
        }
        if current.is_none() {
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
    let file = open_regular(path)?;
    let read = file.take(limit + 1).read_to_end(&mut bytes)?;
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

/// Opens a file to read it. A link, a device or a pipe is none: it leads elsewhere, or is waited for without an end.
pub(in crate::methods) fn open_regular(path: &Path) -> io::Result<File> {
    let irregular = || refused("it is no regular file");
    if !path.symlink_metadata()?.is_file() {
        return Err(irregular());
    }
    // Another may lie there by now.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(irregular())
    }
}

fn refused(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Why a file was not read, without its path.
pub(in crate::methods) fn why(e: &io::Error) -> String {
    e.get_ref()
        .map_or(e.kind().to_string(), ToString::to_string)
}

/// Removes a probe's folder, or the link or file at its place. Without its description it is no probe, whatever happens next.
fn remove(folder: &Path) -> io::Result<()> {
    if !folder.symlink_metadata()?.is_dir() {
        return fs::remove_file(folder);
    }
    let card = folder.join(CARD);
    if card.symlink_metadata()?.is_dir() {
        fs::remove_dir_all(&card)?;
    } else {
        fs::remove_file(&card)?;
    }
    fs::remove_dir_all(folder)
}

/// The description of a probe of this name.
fn card_of(name: &str, bytes: &[u8]) -> Result<Card, String> {
    let card = card::read(bytes)?;
    let file = &card.tensors.file;
    if !file.ends_with(ENDING) || file.contains('/') || file.starts_with('.') {
        return Err("it names no file of weights beside it".to_owned());
    }
    if card.name != name {
        return Err(format!("it describes the probe \"{}\"", card.name));
    }
    Ok(card)
}

/// A probe of its description and the bytes of its weights.
fn stored(card: Card, tensors: &[u8]) -> Result<Stored, String> {
    same(&card.tensors, tensors)?;
    let weights = weights(tensors)?;
    let scorers = card
        .reports
        .iter()
        .map(|r| Ok((r.hook.clone(), Scorer::of(&card, &weights, &r.hook)?)))
        .collect::<Result<_, String>>()?;
    Ok(Stored { card, scorers })
}

/// Whether these are the bytes that a description is of.
///
/// # Errors
/// That they are not.
pub fn same(file: &TensorFile, bytes: &[u8]) -> Result<(), String> {
    if digest(bytes) == file.sha256 {
        return Ok(());
    }
    Err("its weights are not those that its description is of: their SHA-256 is another".to_owned())
}

/// Reads weights: floats of single precision only, all finite.
///
/// # Errors
/// What is wrong with them.
pub fn weights(bytes: &[u8]) -> Result<Weights, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    file.iter()
        .map(|(part, view)| {
            if view.dtype() != Dtype::F32 {
                return Err(format!("\"{part}\" is not of type F32"));
            }
            let bytes = Bytes::copy_from_slice(view.data());
            let tensor = Tensor::new(DType::F32, view.shape().to_vec(), bytes);
            let tensor = tensor.map_err(|e| e.to_string())?;
            let values = tensor.to_f32().map_err(|e| e.to_string())?;
            if values.iter().any(|v| !v.is_finite()) {
                return Err(format!("\"{part}\" holds a number that is not finite"));
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

/// What is said of a probe that cannot be stored.
fn unfit(name: &str, why: &str) -> EngineError {
    EngineError::storage(format!(
        "probe \"{name}\" could not be stored: {why}; what was there before is as it was"
    ))
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
    EngineError::storage(format!("{what} cannot be read: {}", e.kind()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::methods::probe::card::{ClassMetrics, NumberMetrics, Report};

    const LABELS: [&str; 2] = ["no", "yes"];

    fn card_of_hooks(name: &str, labels: &[&str], reports: Vec<Report>) -> Card {
        Card {
            name: name.to_owned(),
            ..card::tests::card(labels, reports)
        }
    }

    fn report(hook: &str) -> Report {
        Report {
            hook: hook.to_owned(),
            ..Report::default()
        }
    }

    fn good(name: &str) -> Card {
        card_of_hooks(name, &LABELS, vec![report("h")])
    }

    fn row(values: &[f32]) -> Weights {
        rows("h", 1, values)
    }

    fn rows(hook: &str, rows: usize, values: &[f32]) -> Weights {
        let weight = Tensor::from_f32(vec![rows, values.len() / rows], values).unwrap();
        let bias = Tensor::from_f32(vec![rows], &vec![0.0; rows]).unwrap();
        BTreeMap::from([
            (format!("{hook}/weight"), weight),
            (format!("{hook}/bias"), bias),
        ])
    }

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("probes"), Arc::default());
        (folder, store)
    }

    fn pipe(path: &Path) {
        rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RWXU).unwrap();
    }

    fn lost(found: Result<impl std::fmt::Debug, EngineError>) -> String {
        let error = found.unwrap_err();
        assert!(matches!(error, EngineError::DataLoss { .. }), "{error:?}");
        error.to_string()
    }

    /// The file of its weights.
    fn tensors(store: &Store, name: &str) -> PathBuf {
        let card = store.card(name).unwrap();
        store.folder.join(name).join(card.tensors.file)
    }

    #[test]
    fn what_could_not_be_read_is_not_stored_and_the_old_one_stays() {
        let (_folder, store) = store();
        store.put(good("p"), &row(&[1.0, 2.0]), false).unwrap();
        let before = store.export("p", &[]).unwrap();
        let classes = ClassMetrics {
            auc: Some(f64::NAN),
            ..ClassMetrics::default()
        };
        let of_classes = Report {
            classes: Some(classes),
            ..report("h")
        };
        let numbers = NumberMetrics {
            mean_squared_error: f64::INFINITY,
            ..NumberMetrics::default()
        };
        let of_numbers = Report {
            numbers: Some(numbers),
            ..report("h")
        };
        let mut option = good("p");
        option.options.insert("c".to_owned(), f64::NAN);
        let fine = row(&[1.0, 2.0]);
        for (card, weights, part) in [
            (
                good("p"),
                row(&[1.0, f32::INFINITY]),
                "\"h/weight\" holds a number that is not finite",
            ),
            (
                good("p"),
                row(&[f32::NAN, 1.0]),
                "\"h/weight\" holds a number that is not finite",
            ),
            (good("p"), Weights::new(), "no \"h/weight\""),
            (good("p"), rows("h", 3, &[1.0; 6]), "3 scores for 2 classes"),
            (
                card_of_hooks("p", &LABELS, vec![of_classes]),
                fine.clone(),
                "auc is NaN",
            ),
            (
                card_of_hooks("p", &[], vec![of_numbers]),
                fine.clone(),
                "mean_squared_error is inf",
            ),
            (option, fine.clone(), "its option \"c\" is NaN"),
        ] {
            for (name, replace) in [("p", true), ("new", false)] {
                let card = Card {
                    name: name.to_owned(),
                    ..card.clone()
                };
                let error = store.put(card, &weights, replace).unwrap_err();
                assert!(
                    matches!(&error, EngineError::Storage { message } if message.contains(part)),
                    "{error:?}"
                );
            }
        }
        assert_eq!(store.export("p", &[]).unwrap(), before);
        assert!(!store.folder.join("new").exists(), "nothing was written");
    }

    #[test]
    fn links_and_pipes_are_broken_and_nothing_waits_or_leaves() {
        let (folder, store) = store();
        let names = [
            "link",
            "dangling",
            "card-link",
            "card-pipe",
            "card-folder",
            "tensors-link",
            "tensors-pipe",
            "tensors-zero",
        ];
        for name in names {
            store.put(good(name), &row(&[1.0, 2.0]), false).unwrap();
        }
        store
            .put(good("healthy"), &row(&[1.0, 2.0]), false)
            .unwrap();
        let (outside, at) = (folder.path().join("outside"), |name: &str| {
            store.folder.join(name)
        });
        fs::rename(at("link"), &outside).unwrap();
        symlink(&outside, at("link")).unwrap();
        fs::remove_dir_all(at("dangling")).unwrap();
        symlink(folder.path().join("nothing"), at("dangling")).unwrap();
        let away = |path: PathBuf, name: &str| {
            let to = folder.path().join(name);
            fs::rename(&path, &to).unwrap();
            (to, path)
        };
        let (to, path) = away(tensors(&store, "tensors-link"), "tensors");
        symlink(to, path).unwrap();
        pipe(&away(tensors(&store, "tensors-pipe"), "a").1);
        symlink("/dev/zero", away(tensors(&store, "tensors-zero"), "b").1).unwrap();
        let (to, path) = away(at("card-link").join(CARD), "card");
        symlink(&to, path).unwrap();
        pipe(&away(at("card-pipe").join(CARD), "c").1);
        fs::create_dir(away(at("card-folder").join(CARD), "d").1).unwrap();
        fs::write(at("card-folder").join(CARD).join("in it"), "").unwrap();

        let listing = store.list().unwrap();
        assert_eq!(listing.cards.len(), 1);
        assert_eq!(listing.cards[0].name, "healthy");
        let mut broken: Vec<&str> = listing
            .broken
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        broken.sort_unstable();
        let mut all = names;
        all.sort_unstable();
        assert_eq!(broken, all);
        for name in names {
            lost(store.get(name));
            lost(store.export(name, &[]));
        }
        for name in ["link", "dangling"] {
            for replace in [true, false] {
                let error = store
                    .put(good(name), &row(&[3.0, 4.0]), replace)
                    .unwrap_err();
                assert!(matches!(error, EngineError::Storage { .. }), "{error:?}");
            }
        }
        for name in names {
            store.delete(name).unwrap();
            assert!(at(name).symlink_metadata().is_err(), "{name} is gone");
            assert!(matches!(store.get(name), Err(EngineError::NotFound { .. })));
        }
        assert!(
            outside.join(CARD).exists() && to.exists(),
            "what links led to stays"
        );
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 2);
    }

    #[test]
    fn weights_that_are_torn_are_listed_as_broken() {
        let (_folder, store) = store();
        for name in ["a", "b", "c"] {
            store.put(good(name), &row(&[1.0, 2.0]), false).unwrap();
        }
        let torn = fs::read(tensors(&store, "b")).unwrap();
        fs::write(tensors(&store, "b"), &torn[1..]).unwrap();
        fs::remove_file(tensors(&store, "c")).unwrap();
        let listing = store.list().unwrap();
        assert_eq!(listing.cards.len(), 1);
        let broken: Vec<&str> = listing
            .broken
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(broken, ["b", "c"]);
    }

    #[test]
    fn many_classes_at_many_hook_points_fit_and_the_list_leaves_their_matrices_out() {
        const CLASSES: usize = 128;
        let (_folder, store) = store();
        let labels: Vec<String> = (0..CLASSES).map(|i| format!("class {i}")).collect();
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let hooks: Vec<String> = (0..49).map(|i| format!("hidden_states.{i}")).collect();
        let reports = hooks.iter().map(|hook| Report {
            classes: Some(ClassMetrics {
                confusion: vec![u64::MAX; CLASSES * CLASSES],
                ..ClassMetrics::default()
            }),
            ..report(hook)
        });
        let weights = hooks
            .iter()
            .flat_map(|hook| rows(hook, CLASSES, &[1.0; CLASSES]));
        let card = card_of_hooks("p", &labels, reports.collect());
        let stored = store.put(card, &weights.collect(), false).unwrap();
        assert_eq!(store.get("p").unwrap().card, stored);
        assert_eq!(store.list().unwrap().cards, [stored.brief()]);
    }

    #[test]
    fn whoever_reads_while_a_probe_is_replaced_finds_one_whole() {
        let (_folder, store) = store();
        store.put(good("p"), &row(&[1.0, 2.0]), false).unwrap();
        std::thread::scope(|s| {
            let replacing = s.spawn(|| {
                for i in 0..50u8 {
                    let weights = row(&[f32::from(i), 2.0]);
                    store.put(good("p"), &weights, true).unwrap();
                }
            });
            while !replacing.is_finished() {
                store.get("p").unwrap();
                assert!(store.list().unwrap().broken.is_empty());
            }
        });
    }
}
