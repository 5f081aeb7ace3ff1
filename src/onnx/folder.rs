//! Files beneath a model's folder, and no others.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2},
    io::Errno,
};

use super::{OnnxError, mapped};

/// NONBLOCK: opening a FIFO must not wait for a writer.
const FILE: OFlags = OFlags::RDONLY
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// An open folder. Paths are resolved by the kernel beneath it (`openat2` with `RESOLVE_BENEATH`), so that no race
/// and no link can lead out. Where the kernel has no `openat2`, they are opened step by step, and links are refused.
///
/// A folder may stand in a *repository*: then links are followed as long as they stay inside the repository, which is how the hub's
/// cache lays snapshots out (links into `blobs/`). Without one, links are refused. A file with several names (hard links) is
/// refused always: its other name may stand anywhere.
#[derive(Debug)]
pub struct Folder {
    root: OwnedFd,
    /// Path of the root on this machine.
    path: PathBuf,
    /// Path of the folder inside the root.
    inside: PathBuf,
    follow_links: bool,
}

impl Folder {
    /// Opens a folder that stands by itself.
    pub fn open(path: &Path) -> Result<Self, OnnxError> {
        let root = directory(path)?;
        Ok(Self {
            path: path_of(&root).unwrap_or_else(|| path.to_owned()),
            root,
            inside: PathBuf::new(),
            follow_links: false,
        })
    }

    /// Opens `repository/inside`, following links that stay beneath the repository.
    pub fn in_repository(repository: &Path, inside: &Path) -> Result<Self, OnnxError> {
        let root = directory(repository)?;
        Ok(Self {
            path: path_of(&root).unwrap_or_else(|| repository.to_owned()),
            root,
            inside: if inside.as_os_str().is_empty() {
                PathBuf::new()
            } else {
                plain(inside)?
            },
            follow_links: true,
        })
    }

    /// The folder in which a file of this folder stands, and the file's name there.
    pub(super) fn of_file(&self, file: &str) -> Result<(Folder, String), OnnxError> {
        let path = plain(Path::new(file))?;
        let name = path
            .file_name()
            .expect("a plain path has a last name")
            .to_string_lossy()
            .into_owned();
        let folder = Folder {
            root: self.root.try_clone().map_err(|e| OnnxError::io(file, e))?,
            path: self.path.clone(),
            inside: self.inside.join(path.parent().unwrap_or(Path::new(""))),
            follow_links: self.follow_links,
        };
        Ok((folder, name))
    }

    /// Opens a regular file by its path relative to the folder.
    pub fn file(&self, name: &str) -> Result<File, OnnxError> {
        let path = self.inside.join(plain(Path::new(name))?);
        let mut resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        if !self.follow_links {
            resolve |= ResolveFlags::NO_SYMLINKS;
        }
        let opened = match openat2(&self.root, &path, FILE, Mode::empty(), resolve) {
            // The kernel is older than 5.6, or a container's filter does not know the call.
            Err(Errno::NOSYS | Errno::PERM) => open_step_by_step(self.root.as_fd(), &path),
            other => other,
        };
        let fd = opened.map_err(|e| match e {
            Errno::XDEV => OnnxError::confined(name, "it leads out of the model's folder"),
            Errno::LOOP => OnnxError::confined(name, "it is a link"),
            Errno::NXIO | Errno::NODEV => OnnxError::confined(name, "it is not a regular file"),
            e => OnnxError::io(name, e),
        })?;
        let stat = fstat(&fd).map_err(|e| OnnxError::io(name, e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(OnnxError::confined(name, "it is not a regular file"));
        }
        if stat.st_nlink > 1 {
            return Err(OnnxError::confined(
                name,
                "it has several names (hard links); put a copy in its place",
            ));
        }
        Ok(File::from(fd))
    }

    /// Maps a regular file of at most `limit` bytes.
    pub fn map(&self, name: &str, limit: u64) -> Result<Bytes, OnnxError> {
        map(&self.file(name)?, name, limit)
    }

    /// Maps a regular file, and tells its path relative to [`Folder::base`], with no link on the way.
    pub(super) fn map_with_path(
        &self,
        name: &str,
        limit: u64,
    ) -> Result<(Bytes, String), OnnxError> {
        let file = self.file(name)?;
        let bytes = map(&file, name, limit)?;
        let nominal = if self.follow_links {
            self.inside.join(name)
        } else {
            plain(Path::new(name))?
        };
        let real = path_of(&file).filter(|_| self.follow_links);
        let real = real
            .as_ref()
            .and_then(|p| p.strip_prefix(&self.path).ok())
            .unwrap_or(&nominal);
        Ok((bytes, real.to_string_lossy().into_owned()))
    }

    /// The folder of this machine beneath which every file of this folder really stands: the repository, where links are
    /// followed; the folder itself, where they are not.
    pub(super) fn base(&self) -> PathBuf {
        if self.follow_links {
            self.path.clone()
        } else {
            self.path.join(&self.inside)
        }
    }
}

fn map(file: &File, name: &str, limit: u64) -> Result<Bytes, OnnxError> {
    let length = file.metadata().map_err(|e| OnnxError::io(name, e))?.len();
    if length > limit {
        return Err(OnnxError::Limit {
            what: "the size of a file",
            limit,
        });
    }
    mapped::map(file, length).map_err(|e| OnnxError::io(name, e))
}

/// Where an open file or folder stands, as the kernel knows it; `None` where `/proc` is not mounted.
fn path_of(fd: &impl AsRawFd) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()
}

fn directory(path: &Path) -> Result<OwnedFd, OnnxError> {
    openat(CWD, path, DIRECTORY, Mode::empty()).map_err(|e| {
        // The path itself is the host's business.
        let name = path.file_name().unwrap_or_default();
        OnnxError::io(&name.to_string_lossy(), e)
    })
}

/// What `openat2` does without following links, a folder at a time.
fn open_step_by_step(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let mut at: Option<OwnedFd> = None;
    let mut names = path.iter().peekable();
    while let Some(name) = names.next() {
        let folder = at.as_ref().map_or(root, AsFd::as_fd);
        let flags = if names.peek().is_some() {
            DIRECTORY
        } else {
            FILE
        };
        let opened = openat(folder, name, flags | OFlags::NOFOLLOW, Mode::empty());
        // A link where a folder should be.
        let opened = opened.map_err(|e| if e == Errno::NOTDIR { Errno::LOOP } else { e })?;
        at = Some(opened);
    }
    at.ok_or(Errno::NOENT)
}

/// The path when it consists of names only: no root, no `..`, no NUL, not empty. `.` falls away.
pub(super) fn plain(path: &Path) -> Result<PathBuf, OnnxError> {
    let names: Option<PathBuf> = path
        .components()
        .filter(|c| *c != Component::CurDir)
        .map(|c| match c {
            Component::Normal(name) => Some(name),
            Component::Prefix(_)
            | Component::RootDir
            | Component::CurDir
            | Component::ParentDir => None,
        })
        .collect();
    let text = path.to_string_lossy();
    names
        .filter(|n| n.iter().next().is_some() && !text.contains('\0'))
        .ok_or_else(|| {
            OnnxError::confined(
                &text,
                "it must be a path inside the model's folder, without \"..\"",
            )
        })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn folder() -> (tempfile::TempDir, Folder) {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), b"secret").unwrap();
        let path = outside.path().join("model");
        fs::create_dir_all(path.join("sub")).unwrap();
        fs::write(path.join("weights"), b"abc").unwrap();
        fs::write(path.join("sub/more"), b"defg").unwrap();
        let folder = Folder::open(&path).unwrap();
        (outside, folder)
    }

    #[test]
    fn files_inside_are_mapped() {
        let (_keep, folder) = folder();
        assert_eq!(&folder.map("weights", 10).unwrap()[..], b"abc");
        assert_eq!(&folder.map("sub/more", 10).unwrap()[..], b"defg");
        assert_eq!(&folder.map("./sub//more", 10).unwrap()[..], b"defg");
    }

    #[test]
    fn every_way_out_is_refused() {
        let (keep, folder) = folder();
        let model = keep.path().join("model");
        symlink("../secret", model.join("link")).unwrap();
        symlink(keep.path(), model.join("up")).unwrap();
        fs::hard_link(keep.path().join("secret"), model.join("hard")).unwrap();
        rustix::fs::mknodat(
            CWD,
            model.join("fifo"),
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        for name in [
            "../secret",
            "sub/../../secret",
            "/etc/hostname",
            "",
            ".",
            "link",
            "up/secret",
            "hard",
            "fifo",
            "sub",
            "a\0b",
        ] {
            let got = folder.map(name, 1000);
            assert!(
                matches!(got, Err(OnnxError::Confined { .. })),
                "{name:?}: {got:?}"
            );
        }
        let got = folder.map("absent", 1000);
        assert!(matches!(got, Err(OnnxError::Io { .. })), "{got:?}");
    }

    #[test]
    fn step_by_step_opens_what_openat2_opens_and_no_link() {
        let (keep, folder) = folder();
        let model = keep.path().join("model");
        symlink("weights", model.join("link")).unwrap();
        symlink("sub", model.join("linked")).unwrap();
        let open = |name: &str| open_step_by_step(folder.root.as_fd(), Path::new(name));
        assert!(open("weights").is_ok());
        assert!(open("sub/more").is_ok());
        assert_eq!(open("link").unwrap_err(), Errno::LOOP);
        assert_eq!(open("linked/more").unwrap_err(), Errno::LOOP);
        assert_eq!(open("absent").unwrap_err(), Errno::NOENT);
    }

    #[test]
    fn links_inside_a_repository_are_followed_and_links_out_of_it_are_not() {
        let keep = tempfile::tempdir().unwrap();
        fs::write(keep.path().join("secret"), b"secret").unwrap();
        let repository = keep.path().join("repository");
        fs::create_dir_all(repository.join("blobs")).unwrap();
        fs::create_dir_all(repository.join("snapshots/1")).unwrap();
        fs::write(repository.join("blobs/f00"), b"weights").unwrap();
        symlink("../../blobs/f00", repository.join("snapshots/1/model.onnx")).unwrap();
        fs::hard_link(keep.path().join("secret"), repository.join("blobs/hard")).unwrap();
        symlink("../../../secret", repository.join("snapshots/1/bad")).unwrap();
        symlink(
            keep.path().join("secret"),
            repository.join("snapshots/1/far"),
        )
        .unwrap();
        symlink("../../blobs/hard", repository.join("snapshots/1/hard")).unwrap();
        let folder = Folder::in_repository(&repository, Path::new("snapshots/1")).unwrap();
        assert_eq!(&folder.map("model.onnx", 100).unwrap()[..], b"weights");
        for name in ["bad", "far", "hard", "../1/model.onnx"] {
            let got = folder.map(name, 100);
            assert!(
                matches!(got, Err(OnnxError::Confined { .. })),
                "{name}: {got:?}"
            );
        }
    }

    #[test]
    fn a_file_over_the_limit_is_not_mapped() {
        let (_keep, folder) = folder();
        assert!(matches!(
            folder.map("weights", 2),
            Err(OnnxError::Limit { .. })
        ));
    }
}
