//! The ONNX Runtime library, as a worker would load it.

use std::{path::Path, process::Stdio, time::Duration};

use serde::Deserialize;
use tokio::process::Command;

use super::Area;

/// Loading the library takes a fraction of a second; with CUDA a few.
const PATIENCE: Duration = Duration::from_secs(30);
/// What the daemon sets in its workers' environment.
const NO_TELEMETRY: (&str, &str) = ("ORT_DISABLE_TELEMETRY", "1");

/// What the worker answers.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Report {
    library: String,
    version: String,
    providers: Vec<String>,
    error: Option<String>,
    searched: Vec<String>,
    telemetry: String,
}

/// Asks a worker.
pub(super) async fn look(library: Option<&Path>, provider: &str) -> Area {
    let mut area = Area::new("ONNX Runtime");
    let report = match ask(library).await {
        Ok(report) => report,
        Err(why) => {
            area.problem(
                format!("the worker process that was to load the library {why}"),
                "name another library with --ort-library; the pinned one comes with the build",
            );
            return area;
        }
    };
    if let Some(error) = &report.error {
        area.problem(
            error,
            "`cargo build` fetches the pinned one where there is python3 with pip and a network",
        );
        return area;
    }
    area.ok(format!("{} at {}", report.version, report.library));
    if library.is_none() {
        area.ok(format!("searched in order: {}", report.searched.join(", ")));
    }
    let family = provider.split(':').next().unwrap_or(provider);
    let has = report.providers.join(", ");
    if report.providers.iter().any(|p| p == family) {
        area.ok(format!("providers: {has}; \"{provider}\" is used"));
    } else {
        area.problem(
            format!("providers: {has}; \"{provider}\" is not among them"),
            "use --provider cpu, or name the library of the onnxruntime-gpu wheel with --ort-library",
        );
    }
    if report.telemetry == "off" {
        area.ok(format!(
            "telemetry is off in workers ({}={})",
            NO_TELEMETRY.0, NO_TELEMETRY.1
        ));
    } else {
        area.problem(
            "telemetry is on in workers",
            format!(
                "set {}={} in the daemon's environment",
                NO_TELEMETRY.0, NO_TELEMETRY.1
            ),
        );
    }
    area
}

async fn ask(library: Option<&Path>) -> Result<Report, String> {
    let program = std::env::current_exe().map_err(|e| format!("has no executable: {e}"))?;
    let mut command = Command::new(program);
    command
        .args(["worker", "--probe"])
        .args(library)
        .env(NO_TELEMETRY.0, NO_TELEMETRY.1)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .map_err(|_| format!("did not answer within {} s", PATIENCE.as_secs()))?
        .map_err(|e| format!("could not be started: {e}"))?;
    serde_json::from_slice(&output.stdout).map_err(|_| format!("died of it: {}", output.status))
}
