//! Compiles the protos (with protox: no `protoc` needed) and puts the pinned ONNX Runtime library into the
//! per-user cache. Offline, the second step warns and the build goes on: the daemon says at start where it
//! looked and what to do.

use std::{
    env,
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use prost::Message as _;
use sha2::{Digest as _, Sha256};

const ORT_VERSION: &str = "1.32.0";

/// One official CPU wheel per platform, and the checksum of the library inside it.
struct Wheel {
    arch: &'static str,
    platform: &'static str,
    library_sha256: &'static str,
}

const WHEELS: [Wheel; 2] = [
    Wheel {
        arch: "x86_64",
        platform: "manylinux_2_28_x86_64",
        library_sha256: "6c1585d1bbf45b0712ea4a21b705c5fcb4ba04ff2e30f1fbf81a49faf658638f",
    },
    Wheel {
        arch: "aarch64",
        platform: "manylinux_2_28_aarch64",
        library_sha256: "49852228a93995158b2a813d4df487d47a1b76b0eaa894507ef49e91b6d7954a",
    },
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=proto");
    compile_protos()?;

    println!("cargo::rustc-env=INTROSPECTD_ORT_VERSION={ORT_VERSION}");
    println!("cargo::rerun-if-env-changed=INTROSPECTD_SKIP_ORT_DOWNLOAD");
    println!("cargo::rerun-if-env-changed=XDG_CACHE_HOME");
    if env::var_os("INTROSPECTD_SKIP_ORT_DOWNLOAD").is_none()
        && let Err(why) = provide_onnx_runtime()
    {
        println!(
            "cargo::warning=ONNX Runtime {ORT_VERSION} was not put into the cache: {why}. \
             The daemon needs it to run: see `introspectd doctor`"
        );
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ protos

fn compile_protos() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let public = compile(&["inference", "introspect/v1"])?;
    fs::write(out.join("public.descriptors"), public.encode_to_vec())?;
    generate(public)?;
    for private in ["onnx", "worker"] {
        generate(compile(&[private])?)?;
    }
    Ok(())
}

/// The descriptors of every proto file in these folders of `proto/`.
fn compile(folders: &[&str]) -> Result<prost_types::FileDescriptorSet, Box<dyn Error>> {
    let mut files = Vec::new();
    for folder in folders {
        for entry in fs::read_dir(Path::new("proto").join(folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "proto") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(protox::compile(files, ["proto"])?)
}

fn generate(set: prost_types::FileDescriptorSet) -> Result<(), Box<dyn Error>> {
    tonic_prost_build::configure()
        .bytes(".")
        .build_transport(true)
        .compile_fds(set)?;
    Ok(())
}

// ------------------------------------------------------------------------------------------------ ONNX Runtime

fn provide_onnx_runtime() -> Result<(), Box<dyn Error>> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let wheel = WHEELS
        .iter()
        .find(|w| w.arch == arch && env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux"))
        .ok_or_else(|| format!("no official build is pinned for {arch}"))?;
    let folder = cache_folder()?.join(format!("onnxruntime-{ORT_VERSION}"));
    let library = folder.join(format!("libonnxruntime.so.{ORT_VERSION}"));
    println!("cargo::rerun-if-changed={}", library.display());
    if library.is_file() && sha256(&library)? == wheel.library_sha256 {
        return Ok(());
    }

    let work = PathBuf::from(env::var("OUT_DIR")?).join("onnxruntime");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(&work)?;
    python(&[
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.12",
        "--implementation=cp",
        &format!("--platform={}", wheel.platform),
        &format!("--dest={}", work.display()),
        &format!("onnxruntime=={ORT_VERSION}"),
    ])?;
    let archive = fs::read_dir(&work)?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.extension().is_some_and(|e| e == "whl"))
        .ok_or("pip left no wheel")?;
    python(&[
        "-m",
        "zipfile",
        "-e",
        &archive.display().to_string(),
        &work.display().to_string(),
    ])?;
    let unpacked = work.join(format!("onnxruntime/capi/libonnxruntime.so.{ORT_VERSION}"));
    let found = sha256(&unpacked)?;
    if found != wheel.library_sha256 {
        return Err(format!(
            "the library in the wheel has sha256 {found}, expected {}",
            wheel.library_sha256
        )
        .into());
    }
    // Moved into place whole, so that a build that dies half-way or runs twice leaves no torn file.
    fs::create_dir_all(&folder)?;
    let staged = folder.join(format!(".staged-{}", std::process::id()));
    fs::copy(&unpacked, &staged)?;
    fs::rename(&staged, &library)?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// Must agree with `worker::runtime::cache_folder`, which looks here at run time.
fn cache_folder() -> Result<PathBuf, Box<dyn Error>> {
    if let Some(cache) = env::var_os("XDG_CACHE_HOME").map(PathBuf::from)
        && cache.is_absolute()
    {
        return Ok(cache.join("introspectd"));
    }
    let home = env::var_os("HOME").ok_or("neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cache/introspectd"))
}

fn python(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    let output = Command::new("python3")
        .args(arguments)
        .output()
        .map_err(|e| format!("python3 could not be started: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or("no message").to_owned();
        return Err(format!("python3 {} failed: {last}", arguments[..2].join(" ")).into());
    }
    Ok(())
}

fn sha256(path: &Path) -> Result<String, Box<dyn Error>> {
    let mut hasher = Sha256::new();
    io::copy(&mut fs::File::open(path)?, &mut hasher)?;
    Ok(hasher
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect())
}
