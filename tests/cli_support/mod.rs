//! Runs the binary as people do, and a daemon for it to talk to.
#![allow(dead_code)] // every test binary uses a part of it

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use introspectd::{
    config::{Config, Flags},
    engine::WorkerCommand,
    service::{Daemon, Setup},
    shutdown::Shutdown,
};
use tempfile::TempDir;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_introspectd");
/// Nobody listens on this port of the loopback: it is reserved.
pub(crate) const NOBODY: &str = "http://127.0.0.1:1";

/// The folder of a committed model.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/models")
        .join(name)
}

/// The folder of the model that is part of the binary.
pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-model")
}

/// What a run of the binary left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Ran {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).expect("results are UTF-8"),
            err: String::from_utf8(output.stderr).expect("messages are UTF-8"),
        }
    }
}

impl Ran {
    /// Fails the test unless the command succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// Fails the test unless the command failed with this code, and said this on standard error.
    #[track_caller]
    pub(crate) fn failed(self, code: i32, said: &str) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.err.contains(said), "{said:?} is not in {self:?}");
        self
    }
}

/// The binary without settings of the environment.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("INTROSPECTD_") {
            command.env_remove(name);
        }
    }
    command.args(args);
    command
}

/// Runs the binary to its end.
pub(crate) fn run(args: &[&str]) -> Ran {
    command(args).output().expect("the binary runs").into()
}

/// A repository with copies of these fixtures.
pub(crate) fn repository(models: &[&str]) -> TempDir {
    let models: Vec<_> = models.iter().map(|name| (*name, fixture(name))).collect();
    repository_of(&models)
}

/// A repository with copies of these folders, by the names that they get.
fn repository_of(models: &[(&str, PathBuf)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, from) in models {
        let folder = root.path().join(name);
        fs::create_dir(&folder).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }
    root
}

/// A daemon in the test's process, its workers real; it ends with the value.
pub(crate) struct Server {
    pub(crate) daemon: Daemon,
    pub(crate) root: TempDir,
    shutdown: Shutdown,
}

impl Server {
    pub(crate) async fn with(models: &[&str]) -> Self {
        Self::over(repository(models)).await
    }

    /// One that serves these folders by these names.
    pub(crate) async fn of(models: &[(&str, PathBuf)]) -> Self {
        Self::over(repository_of(models)).await
    }

    async fn over(root: TempDir) -> Self {
        let config = Config::resolve(&Flags {
            models: Some(root.path().display().to_string()),
            listen: Some("127.0.0.1:0".into()),
            admin_listen: Some("127.0.0.1:0".into()),
            ..Flags::default()
        })
        .unwrap();
        let shutdown = Shutdown::default();
        let setup = Setup {
            worker: Some(WorkerCommand::of(BINARY)),
            ..Setup::new(config)
        };
        let daemon = Daemon::start(setup, shutdown.clone()).await.unwrap();
        daemon.settled().await;
        Server {
            daemon,
            root,
            shutdown,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.daemon.address())
    }

    /// Runs the binary against this daemon, while it serves.
    pub(crate) async fn run(&self, args: &[&str]) -> Ran {
        self.run_in(args, None).await
    }

    /// The same with this on standard input.
    pub(crate) async fn run_in(&self, args: &[&str], input: Option<&str>) -> Ran {
        let mut command = command(args);
        command.env("INTROSPECTD_SERVER", self.url());
        let file = input.map(|text| {
            let mut file = tempfile::tempfile().unwrap();
            std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
            std::io::Seek::rewind(&mut file).unwrap();
            file
        });
        tokio::task::spawn_blocking(move || {
            if let Some(file) = file {
                command.stdin(file);
            }
            Ran::from(command.output().expect("the binary runs"))
        })
        .await
        .unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.drain.cancel();
    }
}
