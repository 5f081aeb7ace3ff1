//! What a worker gives up before it reads a byte of a model.
//!
//! Today: privileges by `exec`, core dumps, descriptors beyond need, and life after its front. Not today: the file system
//! (landlock) and system calls (seccomp). Both belong here, in [`enter`] and after the runtime library is loaded.

use std::{io, os::fd::AsFd};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Signal, set_parent_process_death_signal},
    thread::set_no_new_privs,
};

use super::{limits, native};

/// Enters the sandbox. `socket` is the connection to the front.
///
/// The kernel sends the death signal when the *thread* that started the worker ends: the front must start workers from a
/// thread that lives as long as it does.
///
/// # Errors
/// When the kernel refuses, or the front is gone already.
pub(super) fn enter(socket: impl AsFd) -> io::Result<()> {
    native::die_by_signals();
    set_no_new_privs(true)?;
    limits::at_start()?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // A front that died before the line above sends no signal any more; its end of the socket is closed then.
    let mut ends = [PollFd::new(&socket, PollFlags::empty())];
    poll(&mut ends, Some(&Timespec::default()))?;
    if ends[0].revents().intersects(PollFlags::HUP) {
        return Err(io::Error::other("the front is gone"));
    }
    Ok(())
}
