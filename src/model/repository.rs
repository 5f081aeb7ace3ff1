//! The folders of models. No model file is opened here: names, kinds, sizes and times are enough.
//!
//! A model is a directory with `model.onnx` or `onnx/model.onnx` in it, named by its directory. A hub cache's `models--org--name` counts as the model
//! `org--name`, at the snapshot that `refs/main` names. Left out, each with its reason: hidden folders, names that could not
//! stand in a metric or a log line, folders without a model, and folders that are still being copied.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::engine::error::clean;

/// Longest name of a model, in bytes.
pub const NAME_LIMIT: usize = 128;
/// Folders looked at in a scan, and files looked at in a folder.
const ENTRY_LIMIT: usize = 10_000;
/// Where a model file may stand in its folder.
const MODEL_FILES: [&str; 2] = ["model.onnx", "onnx/model.onnx"];
/// Endings that copying tools give to files that are not whole yet.
const UNFINISHED: [&str; 7] = [
    ".part",
    ".partial",
    ".incomplete",
    ".tmp",
    ".crdownload",
    ".filepart",
    ".lock",
];

/// A directory of models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    root: PathBuf,
}

/// A folder that can be tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Name of the model.
    pub name: String,
    /// Its folder, without links.
    pub folder: PathBuf,
    /// Changes when a file of the model does.
    pub identity: Identity,
}

/// A folder that is no model, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Name of the folder, fit to print.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// What a scan found, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Models.
    pub found: Vec<Found>,
    /// The rest.
    pub skipped: Vec<Skipped>,
}

/// A summary of the names, sizes, times and inodes of a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity(u64);

impl Repository {
    /// The repository at this path, which must be a directory.
    pub fn open(root: impl AsRef<Path>) -> io::Result<Self> {
        let root = fs::canonicalize(root)?;
        if !root.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self { root })
    }

    /// Its path, without links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Looks at every folder.
    pub fn scan(&self) -> io::Result<Scan> {
        let mut scan = Scan::default();
        for (count, entry) in fs::read_dir(&self.root)?.enumerate() {
            let file_name = entry?.file_name();
            let shown = clean(&file_name.to_string_lossy());
            if count >= ENTRY_LIMIT {
                scan.skipped.push(Skipped {
                    name: shown,
                    reason: format!("there are more than {ENTRY_LIMIT} entries in the repository"),
                });
                break;
            }
            let path = self.root.join(&file_name);
            if !path.is_dir() {
                continue; // a README is no broken model
            }
            let Some(name) = file_name.to_str().map(model_name) else {
                scan.skipped.push(Skipped {
                    name: shown,
                    reason: "the name of the folder is not UTF-8".into(),
                });
                continue;
            };
            match self.look(name, &path) {
                Ok(found) => scan.found.push(found),
                Err(reason) => scan.skipped.push(Skipped {
                    name: shown,
                    reason,
                }),
            }
        }
        scan.found.sort_by(|a, b| a.name.cmp(&b.name));
        scan.skipped.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(scan)
    }

    /// Looks for one model. `Ok(None)`: there is no such folder; an error: there is, and it cannot be used.
    pub fn find(&self, name: &str) -> Result<Option<Found>, String> {
        if check_name(name).is_err() {
            return Ok(None);
        }
        for folder in [name.to_owned(), format!("{HUB_PREFIX}{name}")] {
            let path = self.root.join(folder);
            if path.is_dir() {
                return self.look(name, &path).map(Some);
            }
        }
        Ok(None)
    }

    /// The folder of a model, whatever is in it; its files are not looked at.
    pub fn folder(&self, name: &str) -> Option<PathBuf> {
        check_name(name).ok()?;
        [name.to_owned(), format!("{HUB_PREFIX}{name}")]
            .into_iter()
            .map(|folder| self.root.join(folder))
            .find(|path| path.is_dir())
            .and_then(|path| self.within(&path).ok())
    }

    /// Where the files of a folder are, without links.
    fn within(&self, path: &Path) -> Result<PathBuf, String> {
        let folder = match path.file_name().and_then(|n| n.to_str()) {
            Some(file_name) if file_name.starts_with(HUB_PREFIX) => snapshot(path)?,
            Some(_) | None => path.to_owned(),
        };
        let folder = fs::canonicalize(folder)
            .map_err(|e| format!("the folder cannot be read: {}", e.kind()))?;
        if !folder.starts_with(&self.root) {
            return Err("the folder is a link that leads out of the repository".into());
        }
        Ok(folder)
    }

    fn look(&self, name: &str, path: &Path) -> Result<Found, String> {
        check_name(name)?;
        let folder = self.within(path)?;
        let mut files = Vec::new();
        list(&folder, Path::new(""), &mut files)
            .map_err(|e| format!("the folder cannot be read: {}", e.kind()))?;
        if let Some(unfinished) = files.iter().find(|f| is_unfinished(&f.path)) {
            return Err(format!(
                "\"{}\" shows that the folder is still being copied: scan again when it is whole",
                clean(&unfinished.path.display().to_string())
            ));
        }
        let model = files
            .iter()
            .find(|f| MODEL_FILES.iter().any(|m| Path::new(m) == f.path))
            .ok_or("there is no model.onnx and no onnx/model.onnx in the folder")?;
        if model.size == 0 {
            return Err("the model file is empty: it may still be being copied".into());
        }
        files.sort();
        let mut hasher = DefaultHasher::new();
        files.hash(&mut hasher);
        Ok(Found {
            name: name.to_owned(),
            folder,
            identity: Identity(hasher.finish()),
        })
    }
}

/// How the hub's cache names a model's folder.
const HUB_PREFIX: &str = "models--";

/// The model's name, from its folder's.
fn model_name(folder: &str) -> &str {
    folder.strip_prefix(HUB_PREFIX).unwrap_or(folder)
}

/// Whether a name can be a model's.
///
/// # Errors
/// Why not.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.starts_with('.') {
        return Err("hidden folders are left out".into());
    }
    if name.is_empty() || name.len() > NAME_LIMIT {
        return Err(format!("a model's name has 1 to {NAME_LIMIT} characters"));
    }
    if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        || name.starts_with('-')
    {
        return Err("a model's name is made of letters, digits, '.', '_' and '-', and does not begin with '-'".into());
    }
    Ok(())
}

/// The snapshot of a hub cache folder that is meant.
fn snapshot(path: &Path) -> Result<PathBuf, String> {
    let snapshots = path.join("snapshots");
    let mut revision = String::new();
    if let Ok(file) = fs::File::open(path.join("refs/main")) {
        // A commit's hash; anything longer is not one.
        let _ = file.take(100).read_to_string(&mut revision);
    }
    let revision = revision.trim();
    if !revision.is_empty() && revision.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Ok(snapshots.join(revision));
    }
    let mut all: Vec<PathBuf> = fs::read_dir(&snapshots)
        .map_err(|_| "a hub cache folder without snapshots".to_owned())?
        .take(ENTRY_LIMIT)
        .filter_map(|e| Some(e.ok()?.path()).filter(|p| p.is_dir()))
        .collect();
    match (all.pop(), all.is_empty()) {
        (Some(only), true) => Ok(only),
        (Some(_), false) => {
            Err("a hub cache folder with several snapshots and no refs/main".into())
        }
        (None, _) => Err("a hub cache folder without snapshots".into()),
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct File {
    path: PathBuf,
    size: u64,
    modified: (i64, i64),
    inode: u64,
}

/// The files of a folder and of its `onnx` folder, links followed. Saved probes are no part of a model.
fn list(folder: &Path, below: &Path, files: &mut Vec<File>) -> io::Result<()> {
    for entry in fs::read_dir(folder.join(below))? {
        let path = below.join(entry?.file_name());
        // A dangling link is a file that is not there.
        let Ok(meta) = fs::metadata(folder.join(&path)) else {
            continue;
        };
        if meta.is_dir() {
            if path == Path::new("onnx") {
                list(folder, &path, files)?;
            }
            continue;
        }
        if files.len() >= ENTRY_LIMIT {
            return Err(io::Error::other("too many files"));
        }
        files.push(File {
            path,
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            inode: meta.ino(),
        });
    }
    Ok(())
}

/// Whether a file's name says that a copy is under way: a known ending, or rsync's `.name.XXXXXX`.
fn is_unfinished(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
        return false;
    };
    let rsync = name.starts_with('.')
        && name.rsplit_once('.').is_some_and(|(stem, tail)| {
            stem.len() > 1 && tail.len() == 6 && tail.bytes().all(|b| b.is_ascii_alphanumeric())
        })
        && name.contains(".onnx");
    rsync || UNFINISHED.iter().any(|ending| name.ends_with(ending))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn repository() -> (tempfile::TempDir, Repository) {
        let folder = tempfile::tempdir().unwrap();
        let repository = Repository::open(folder.path()).unwrap();
        (folder, repository)
    }

    fn put(root: &Path, path: &str, bytes: &[u8]) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn names(scan: &Scan) -> Vec<&str> {
        scan.found.iter().map(|f| f.name.as_str()).collect()
    }

    #[test]
    fn models_are_found_and_the_rest_is_left_out_with_a_reason() {
        let (folder, repository) = repository();
        let root = folder.path();
        put(root, "plain/model.onnx", b"x");
        put(root, "below/onnx/model.onnx", b"x");
        put(root, "README.md", b"x");
        put(root, ".hidden/model.onnx", b"x");
        put(root, "a name/model.onnx", b"x");
        put(root, "empty/model.onnx", b"");
        put(root, "none/tokenizer.json", b"x");
        put(root, "copying/model.onnx", b"x");
        put(root, "copying/model.onnx_data.part", b"x");
        put(root, "rsync/model.onnx", b"x");
        put(root, "rsync/.model.onnx_data.a1B2c3", b"x");
        let scan = repository.scan().unwrap();
        assert_eq!(names(&scan), ["below", "plain"]);
        let skipped: Vec<&str> = scan.skipped.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            skipped,
            [".hidden", "a name", "copying", "empty", "none", "rsync"]
        );
        assert!(
            scan.skipped
                .iter()
                .all(|s| !s.reason.is_empty() && !s.reason.contains(root.to_str().unwrap()))
        );
    }

    #[test]
    fn names_that_could_lead_elsewhere_are_no_models() {
        let (folder, repository) = repository();
        put(folder.path(), "plain/model.onnx", b"x");
        for name in [
            "",
            "..",
            ".",
            "../plain",
            "plain/../plain",
            "/etc",
            "-rf",
            "a\nb",
            &"a".repeat(NAME_LIMIT + 1),
        ] {
            assert_eq!(repository.find(name), Ok(None), "{name:?}");
        }
        assert!(repository.find("plain").unwrap().is_some());
        assert_eq!(repository.find("other"), Ok(None));
    }

    #[test]
    fn links_may_not_lead_out() {
        let (folder, repository) = repository();
        let outside = tempfile::tempdir().unwrap();
        put(outside.path(), "model.onnx", b"x");
        put(folder.path(), "inside/model.onnx", b"x");
        symlink(outside.path(), folder.path().join("out")).unwrap();
        symlink(folder.path().join("inside"), folder.path().join("again")).unwrap();
        let scan = repository.scan().unwrap();
        assert_eq!(names(&scan), ["again", "inside"]);
        assert!(scan.skipped[0].reason.contains("out of the repository"));
    }

    #[test]
    fn a_hub_cache_is_a_repository() {
        let (folder, repository) = repository();
        let root = folder.path();
        put(root, "models--org--bert/blobs/abc", b"weights");
        put(root, "models--org--bert/refs/main", b"r2\n");
        for revision in ["r1", "r2"] {
            let snapshot = root.join("models--org--bert/snapshots").join(revision);
            fs::create_dir_all(&snapshot).unwrap();
            symlink("../../blobs/abc", snapshot.join("model.onnx")).unwrap();
        }
        let scan = repository.scan().unwrap();
        assert_eq!(names(&scan), ["org--bert"]);
        assert!(scan.found[0].folder.ends_with("snapshots/r2"));
        assert_eq!(
            repository.find("org--bert").unwrap().as_ref(),
            Some(&scan.found[0])
        );
    }

    #[test]
    fn identity_follows_the_files_but_not_the_probes() {
        let (folder, repository) = repository();
        put(folder.path(), "m/model.onnx", b"x");
        let identity = || repository.find("m").unwrap().unwrap().identity;
        let first = identity();
        assert_eq!(identity(), first);
        put(folder.path(), "m/probes/a.safetensors", b"x");
        assert_eq!(identity(), first);
        put(folder.path(), "m/model.onnx", b"xy");
        let second = identity();
        assert_ne!(second, first);
        put(folder.path(), "m/tokenizer.json", b"{}");
        assert_ne!(identity(), second);
    }
}
