//! Files beneath a model's folder, and no others.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2},
    io::Errno,
};

use super::{OnnxError, mapped};

/// An open folder. Paths are resolved by the kernel beneath it (`openat2` with `RESOLVE_BENEATH`), so that no race
/// and no link can lead out.
///
/// A folder may stand in a *repository*: then links are followed as long as they stay inside the repository, which is how the hub's
/// cache lays snapshots out (links into `blobs/`). Without one, links and files with several names are refused.
#[derive(Debug)]
pub struct Folder {
    root: OwnedFd,
    /// Path of the folder inside the root; empty without a repository.
    inside: PathBuf,
    follow_links: bool,
}

impl Folder {
    /// Opens a folder that stands by itself.
    pub fn open(path: &Path) -> Result<Self, OnnxError> {
        Ok(Self {
            root: directory(path)?,
            inside: PathBuf::new(),
            follow_links: false,
        })
    }

    /// Opens `repository/inside`, following links that stay beneath the repository.
    pub fn in_repository(repository: &Path, inside: &Path) -> Result<Self, OnnxError> {
        plain(inside)?;
        Ok(Self {
            root: directory(repository)?,
            inside: inside.to_owned(),
            follow_links: true,
        })
    }

    /// Opens a regular file by its path relative to the folder.
    pub fn file(&self, name: &str) -> Result<File, OnnxError> {
        plain(Path::new(name))?;
        let mut resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        if !self.follow_links {
            resolve |= ResolveFlags::NO_SYMLINKS;
        }
        // NONBLOCK: opening a FIFO must not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = openat2(
            &self.root,
            self.inside.join(name),
            flags,
            Mode::empty(),
            resolve,
        )
        .map_err(|e| match e {
            Errno::XDEV => refuse(name, "it leads out of the model's folder"),
            Errno::LOOP => refuse(name, "it is a link"),
            Errno::NXIO | Errno::NODEV => refuse(name, "it is not a regular file"),
            e => OnnxError::Io {
                file: name.to_owned(),
                why: e.to_string(),
            },
        })?;
        let stat = fstat(&fd).map_err(|e| OnnxError::Io {
            file: name.to_owned(),
            why: e.to_string(),
        })?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refuse(name, "it is not a regular file"));
        }
        if stat.st_nlink > 1 && !self.follow_links {
            return Err(refuse(name, "it has several names (hard links)"));
        }
        Ok(File::from(fd))
    }

    /// Maps a regular file of at most `limit` bytes.
    pub fn map(&self, name: &str, limit: u64) -> Result<Bytes, OnnxError> {
        let file = self.file(name)?;
        let io = |e: std::io::Error| OnnxError::Io {
            file: name.to_owned(),
            why: e.to_string(),
        };
        if file.metadata().map_err(io)?.len() > limit {
            return Err(OnnxError::Limit {
                what: "the size of a file",
                limit,
            });
        }
        mapped::map(&file).map_err(io)
    }
}

fn directory(path: &Path) -> Result<OwnedFd, OnnxError> {
    openat(
        CWD,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| OnnxError::Io {
        file: path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        why: e.to_string(),
    })
}

/// Only names: no root, no `.`, no `..`, no NUL, not empty.
fn plain(path: &Path) -> Result<(), OnnxError> {
    let text = path.to_string_lossy();
    let names = path.components().all(|c| matches!(c, Component::Normal(_)));
    if !names || text.is_empty() || text.contains('\0') {
        return Err(refuse(
            &text,
            "it must be a path inside the model's folder, without \"..\"",
        ));
    }
    Ok(())
}

fn refuse(file: &str, why: &'static str) -> OnnxError {
    OnnxError::Confined {
        file: file.chars().take(120).collect(),
        why,
    }
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
        symlink("../../../secret", repository.join("snapshots/1/bad")).unwrap();
        let folder = Folder::in_repository(&repository, Path::new("snapshots/1")).unwrap();
        assert_eq!(&folder.map("model.onnx", 100).unwrap()[..], b"weights");
        assert!(matches!(
            folder.map("bad", 100),
            Err(OnnxError::Confined { .. })
        ));
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
