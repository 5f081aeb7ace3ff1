//! A file as bytes without reading it: mapped, private, read-only.
//!
//! The one place of this module with `unsafe`. A mapped file that somebody truncates raises SIGBUS when it is read; only
//! worker processes map model files, and losing one is survived (see [`crate::worker`]).
#![allow(unsafe_code)]

use std::{fs::File, io};

use bytes::Bytes;

/// Maps the first `length` bytes of a file.
pub(super) fn map(file: &File, length: u64) -> io::Result<Bytes> {
    if length == 0 {
        return Ok(Bytes::new());
    }
    let length = usize::try_from(length).map_err(io::Error::other)?;
    // SAFETY: the mapping is private and read-only, so nothing in this process writes to it. Another process may
    // change the file under it: the bytes are then different data, never a wrong type, because all that is read from
    // them is plain old data.
    let map = unsafe {
        memmap2::MmapOptions::new()
            .len(length)
            .map_copy_read_only(file)?
    };
    Ok(Bytes::from_owner(map))
}
