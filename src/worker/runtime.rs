//! The ONNX Runtime library: found, checked, loaded once.
//!
//! Search order: the path in the options, `ORT_DYLIB_PATH`, beside the executable, the per-user cache that the build fills,
//! system folders. A path that was named is used or is an error; folders are searched. Absolute paths only, so that the working
//! directory decides nothing.

use std::{
    env, fs,
    path::{Path, PathBuf},
    thread,
};

use ort::{
    environment::{Environment, GlobalThreadPoolOptions},
    ep::{self, ExecutionProvider as _, ExecutionProviderDispatch},
    logging::LogLevel,
    session::{Session, builder::SessionBuilder},
};

use super::native;
use crate::ipc::spec::{LoadOptions, Provider};

/// Oldest minor version of 1.x that is used: older ones follow paths out of a model's folder and die on crafted models.
const FLOOR: u32 = 31;
/// The version that the build fetches.
const PINNED: &str = env!("INTROSPECTD_ORT_VERSION");
/// Must be `1` in the environment before the library is loaded: it otherwise uploads usage data.
pub(super) const NO_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

/// Why there is no runtime. Unlike other messages of a worker this one may name paths of the host: they are the operator's own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RuntimeError(String);

impl From<ort::Error> for RuntimeError {
    fn from(e: ort::Error) -> Self {
        Self(e.message().to_owned())
    }
}

/// The loaded library and its environment.
#[derive(Debug, Clone)]
pub(super) struct Runtime {
    environment: Environment,
    /// Version of the library.
    pub(super) version: String,
    /// Where kernels run.
    pub(super) provider: Provider,
    arena: bool,
}

/// What `doctor` tells about the library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// File that is used.
    pub library: PathBuf,
    /// Its version.
    pub version: String,
    /// Providers that this build of the library has: `cpu`, `cuda`.
    pub providers: Vec<String>,
}

/// Finds the library and asks it what it is, in this process.
///
/// # Errors
/// The text says where was looked and what to do.
pub fn probe(library: Option<&Path>) -> Result<Report, RuntimeError> {
    let (path, version) = find(library)?;
    let _ = ort::init_from(&path).map_err(|e| RuntimeError(e.to_string()))?;
    let mut providers = vec!["cpu".to_owned()];
    if ep::CUDA::is_available().unwrap_or(false) {
        providers.push("cuda".to_owned());
    }
    Ok(Report {
        library: path,
        version,
        providers,
    })
}

impl Runtime {
    /// Loads the library and makes the one environment of the process, with one thread pool for all sessions.
    pub(super) fn load(options: &LoadOptions) -> Result<Self, RuntimeError> {
        if env::var_os(NO_TELEMETRY).is_none_or(|v| v != "1") {
            return Err(RuntimeError(format!(
                "{NO_TELEMETRY}=1 must be in the environment before the runtime is loaded"
            )));
        }
        let (path, version) = find(options.library.as_deref())?;
        let threads = match options.intra_threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let builder = ort::init_from(&path).map_err(|e| RuntimeError(e.to_string()))?;
        // Threads that spin would take the cores from the front and from other workers.
        let pool = GlobalThreadPoolOptions::default()
            .with_intra_threads(threads)?
            .with_inter_threads(1)?
            .with_spin_control(false)?;
        let environment = builder
            .with_name("introspectd")
            .with_telemetry(false)
            .with_global_thread_pool(pool)
            .build()?;
        environment.set_log_level(LogLevel::Error);
        let runtime = Self {
            environment,
            version,
            provider: options.provider,
            arena: options.arena,
        };
        runtime.builder().map_err(|e| {
            let library = path.file_name().unwrap_or_default().to_string_lossy();
            provider_error(options.provider, &library, &e.0)
        })?;
        Ok(runtime)
    }

    /// A session builder with the provider and without what costs memory for little.
    pub(super) fn builder(&self) -> Result<SessionBuilder, RuntimeError> {
        let mut providers: Vec<ExecutionProviderDispatch> = Vec::new();
        match self.provider {
            Provider::Cpu => {}
            Provider::Cuda(device) => {
                let device = i32::try_from(device)
                    .map_err(|_| RuntimeError(format!("there is no CUDA device {device}")))?;
                providers.push(
                    ep::CUDA::default()
                        .with_device_id(device)
                        .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested)
                        .build()
                        .error_on_failure(),
                );
            }
        }
        providers.push(
            ep::CPU::default()
                .with_arena_allocator(self.arena)
                .build()
                .error_on_failure(),
        );
        let builder = Session::builder(&self.environment)?
            .with_execution_providers(providers)
            .map_err(ort::Error::from)?
            // Patterns are remembered per shape; requests come in all shapes.
            .with_memory_pattern(false)
            .map_err(ort::Error::from)?;
        Ok(builder)
    }
}

fn provider_error(provider: Provider, library: &str, said: &str) -> RuntimeError {
    let cpu_only = said.contains("not enabled in this build") || said.contains("not supported");
    let why = match provider {
        Provider::Cuda(_) if cpu_only => format!(
            "\"{library}\" is a build without CUDA: take the library of the onnxruntime-gpu wheel, with its provider libraries \
             beside it, and name it with --ort-library"
        ),
        Provider::Cuda(_) | Provider::Cpu => said.to_owned(),
    };
    RuntimeError(format!("provider \"{provider}\" cannot be used: {why}"))
}

// ------------------------------------------------------------------------------------------------ search

/// The library to use and its version.
fn find(named: Option<&Path>) -> Result<(PathBuf, String), RuntimeError> {
    let from_variable = env::var_os("ORT_DYLIB_PATH").filter(|v| !v.is_empty());
    let named = named
        .map(|p| ("--ort-library", p.to_owned()))
        .or_else(|| Some(("ORT_DYLIB_PATH", PathBuf::from(from_variable?))));
    if let Some((by, path)) = named {
        let refuse = |why: &str| RuntimeError(format!("{by} names \"{}\": {why}", path.display()));
        if !path.is_absolute() {
            return Err(refuse("the path must be absolute"));
        }
        let file = if path.is_dir() {
            libraries(&path)
                .into_iter()
                .next()
                .ok_or_else(|| refuse("the folder has no libonnxruntime.so"))?
        } else {
            path.clone()
        };
        return usable(&file)
            .map(|version| (file, version))
            .map_err(|why| refuse(&why));
    }
    let mut looked = Vec::new();
    for folder in folders() {
        let mut found = "nothing there".to_owned();
        for file in libraries(&folder) {
            match usable(&file) {
                Ok(version) => return Ok((file, version)),
                Err(why) => {
                    let name = file.file_name().unwrap_or_default().to_string_lossy();
                    found = format!("{name}: {why}");
                }
            }
        }
        looked.push(format!("{} ({found})", folder.display()));
    }
    Err(RuntimeError(format!(
        "ONNX Runtime 1.{FLOOR} or newer was not found. Get it with `python3 -m pip install onnxruntime=={PINNED}` and name its \
             capi/libonnxruntime.so.{PINNED} with --ort-library or ORT_DYLIB_PATH. Looked in {}",
        looked.join(", ")
    )))
}

/// The version, if the library can be loaded and is new enough.
fn usable(file: &Path) -> Result<String, String> {
    let version = native::library_version(file)?;
    let mut parts = version.split('.').map(|p| p.parse::<u32>().unwrap_or(0));
    match (parts.next(), parts.next()) {
        (Some(1), Some(minor)) if minor >= FLOOR => Ok(version),
        _ => Err(format!(
            "it is version {version}, which is older than 1.{FLOOR} and not safe with files of unknown origin"
        )),
    }
}

/// Folders in which the library is looked for, in order.
pub(super) fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Ok(exe) = env::current_exe()
        && let Some(folder) = exe.parent()
    {
        folders.push(folder.to_owned());
        if let Some(prefix) = folder.parent() {
            folders.push(prefix.join("lib"));
        }
    }
    if let Some(cache) = cache_folder() {
        folders.push(cache.join(format!("onnxruntime-{PINNED}")));
    }
    let triple = format!("/usr/lib/{}-linux-gnu", env::consts::ARCH);
    folders.extend(
        [
            "/usr/local/lib",
            "/opt/onnxruntime/lib",
            &triple,
            "/usr/lib64",
            "/usr/lib",
        ]
        .map(PathBuf::from),
    );
    folders
}

/// The per-user cache. Must agree with `cache_folder` of `build.rs`, which fills it.
pub fn cache_folder() -> Option<PathBuf> {
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|p| p.is_absolute())
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))
        .filter(|p| p.is_absolute())
        .map(|p| p.join("introspectd"))
}

/// `libonnxruntime.so*` of a folder, the longest version first (the plain name is usually a link to it).
fn libraries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut found: Vec<(Vec<u32>, PathBuf)> = entries
        .filter_map(|e| {
            let path = e.ok()?.path();
            let name = path.file_name()?.to_str()?;
            let version = name.strip_prefix("libonnxruntime.so")?;
            let numbers: Option<Vec<u32>> =
                version.split('.').skip(1).map(|n| n.parse().ok()).collect();
            (version.is_empty() || version.starts_with('.')).then_some((numbers?, path))
        })
        .collect();
    found.sort();
    found.into_iter().rev().map(|(_, path)| path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_library_of_a_folder_comes_first_and_others_are_left() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "libonnxruntime.so",
            "libonnxruntime.so.1",
            "libonnxruntime.so.1.9.1",
            "libonnxruntime.so.1.32.0",
            "libonnxruntime.so.1.32.0.bak",
            "libonnxruntime.sox",
            "libonnxruntime_providers_cuda.so",
        ] {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        let names: Vec<_> = libraries(folder.path())
            .iter()
            .map(|p| p.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(
            names,
            [
                "libonnxruntime.so.1.32.0",
                "libonnxruntime.so.1.9.1",
                "libonnxruntime.so.1",
                "libonnxruntime.so"
            ]
        );
    }

    #[test]
    fn a_named_library_must_be_absolute_and_be_one() {
        let relative = find(Some(Path::new("libonnxruntime.so"))).unwrap_err();
        assert!(
            relative.to_string().contains("must be absolute"),
            "{relative}"
        );
        let folder = tempfile::tempdir().unwrap();
        let fake = folder.path().join("libonnxruntime.so.1.32.0");
        fs::write(&fake, b"not a library").unwrap();
        let fake = find(Some(&fake)).unwrap_err();
        assert!(fake.to_string().contains("--ort-library names"), "{fake}");
    }
}
