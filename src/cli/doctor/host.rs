//! What the operating system gives: shared memory, the ways to keep workers from outliving the daemon, limits.

use std::fs;

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    process::{Resource, getrlimit, parent_process_death_signal},
};

use super::Area;
use crate::{cli::out, config::Config};

/// Descriptors beside one for each connection: listeners, workers, shared memory.
const DESCRIPTORS: u64 = 512;
/// Less free memory than this holds no model of size.
const LITTLE_MEMORY: u64 = 1 << 30;

/// Looks around.
pub(super) fn look(config: Option<&Config>) -> Area {
    let mut area = Area::new("Host");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    area.ok(format!(
        "Linux {}, {cores} cores for this process",
        kernel.trim()
    ));
    match sealed_memory() {
        Ok(()) => area.ok("sealed shared memory (memfd) works"),
        Err(e) => area.problem(
            format!("sealed shared memory (memfd_create) does not work: {e}"),
            "allow memfd_create and F_ADD_SEALS in the container's seccomp profile",
        ),
    }
    match parent_process_death_signal() {
        Ok(_) => area.ok("workers end with the daemon (PR_SET_PDEATHSIG)"),
        Err(e) => area.problem(
            format!("the kernel does not tell workers that the daemon died: {e}"),
            "allow prctl in the container's seccomp profile",
        ),
    }
    descriptors(&mut area, config);
    memory(&mut area, config);
    area
}

fn sealed_memory() -> rustix::io::Result<()> {
    let memory = memfd_create(
        "introspectd-doctor",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    ftruncate(&memory, 4096)?;
    fcntl_add_seals(
        &memory,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )
}

fn descriptors(area: &mut Area, config: Option<&Config>) {
    let wanted = DESCRIPTORS + config.map_or(0, |c| c.max_connections as u64);
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < wanted => area.warning(
            format!("{limit} open files are allowed; the settings may take {wanted}"),
            "raise it (ulimit -n, LimitNOFILE=), or lower --max-connections",
        ),
        Some(limit) => area.ok(format!("{limit} open files are allowed")),
        None => area.ok("open files are not limited"),
    }
}

fn memory(area: &mut Area, config: Option<&Config>) {
    let Some(free) = available_memory() else {
        return;
    };
    let limit = cgroup_limit();
    let has = limit.map_or(free, |l| free.min(l));
    let mut line = format!("{} of memory available", out::bytes(has));
    if let Some(limit) = limit {
        line.push_str(&format!(
            ", {} allowed to this group of processes",
            out::bytes(limit)
        ));
    }
    let buffer = config.map_or(0, |c| c.buffer as u64);
    if has < LITTLE_MEMORY {
        area.warning(line, "serve small models only, or make room");
    } else if has < buffer {
        area.warning(line, "lower --buffer, which may take more than that");
    } else {
        area.ok(line);
    }
}

fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The limit of the control group, where there is one (version 2, as containers see it).
fn cgroup_limit() -> Option<u64> {
    fs::read_to_string("/sys/fs/cgroup/memory.max")
        .ok()?
        .trim()
        .parse()
        .ok()
}
