//! What the operating system lets a worker spend.
//!
//! Not used, and why: `RLIMIT_AS` counts address space, of which a mapped model and CUDA reserve far more than they use;
//! `RLIMIT_FSIZE` also bounds shared memory; `RLIMIT_CPU` would end a worker for having worked long.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors: one per shared memory segment of ours, and a handful of files.
const OPEN_FILES: u64 = 4096;

/// The limits that do not depend on the model: no core dumps (they would hold request data), few descriptors.
pub(super) fn at_start() -> std::io::Result<()> {
    lower(Resource::Core, 0)?;
    lower(Resource::Nofile, OPEN_FILES)
}

/// Caps private memory in bytes (`RLIMIT_DATA`): heap, stacks and private writable mappings. Mapped weights and shared
/// memory do not count. An allocation past it fails; the runtime reports that or aborts, and the front sees either.
pub(super) fn private_memory(bytes: u64) -> std::io::Result<()> {
    lower(Resource::Data, bytes)
}

fn lower(resource: Resource, to: u64) -> std::io::Result<()> {
    let to = getrlimit(resource).maximum.map_or(to, |hard| hard.min(to));
    setrlimit(
        resource,
        Rlimit {
            current: Some(to),
            maximum: Some(to),
        },
    )?;
    Ok(())
}
