//! `doctor`: whether a daemon would run here, and what to do where not.
//!
//! Nothing is changed and no model is loaded. The runtime library is asked in a worker process, since the front never loads it.

mod host;
mod library;
mod network;
mod repository;

use std::fmt::Write as _;

use clap::Args;
use serde_json::{Value, json};

use super::{
    error::CliError,
    out::{self, Paint},
};
use crate::config::{Config, Flags};

pub(super) const EXAMPLES: &str = "\
Examples:
  introspectd doctor --models ./models
  introspectd doctor --models ./models --provider cuda --ort-library /opt/onnxruntime/lib/libonnxruntime.so
  introspectd doctor --json | jq '.findings[] | select(.verdict == \"problem\")'
Takes the settings of `serve`, and exits with 1 when there is a problem.";

/// Arguments of `doctor`.
#[derive(Args, Clone, Debug)]
pub(super) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Flags,
}

/// How well something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Ok,
    Warning,
    Problem,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Problem => "problem",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug)]
struct Finding {
    verdict: Verdict,
    what: String,
    advice: Option<String>,
}

/// What was found in one area.
#[derive(Clone, Debug)]
struct Area {
    title: &'static str,
    findings: Vec<Finding>,
}

impl Area {
    fn new(title: &'static str) -> Self {
        Self {
            title,
            findings: Vec::new(),
        }
    }

    fn ok(&mut self, what: impl Into<String>) {
        self.add(Verdict::Ok, what.into(), None);
    }

    fn warning(&mut self, what: impl Into<String>, advice: impl Into<String>) {
        self.add(Verdict::Warning, what.into(), Some(advice.into()));
    }

    fn problem(&mut self, what: impl Into<String>, advice: impl Into<String>) {
        self.add(Verdict::Problem, what.into(), Some(advice.into()));
    }

    fn add(&mut self, verdict: Verdict, what: String, advice: Option<String>) {
        self.findings.push(Finding {
            verdict,
            what,
            advice,
        });
    }
}

/// Runs the command.
pub(super) async fn run(args: &DoctorArgs) -> Result<(), CliError> {
    let mut areas = Vec::new();
    let (settings, config) = settings(&args.settings);
    areas.push(settings);
    let named = args
        .settings
        .ort_library
        .as_deref()
        .filter(|l| !l.is_empty() && *l != "search");
    let provider = config.as_ref().map_or("cpu", |c| c.provider.as_str());
    let chosen = config.as_ref().map(|c| c.ort_library.clone());
    let library = chosen.unwrap_or_else(|| named.map(Into::into));
    areas.push(library::look(library.as_deref(), provider).await);
    if let Some(config) = &config {
        areas.push(repository::look(&config.models));
    }
    areas.push(host::look(config.as_ref()));
    if let Some(config) = &config {
        areas.push(network::look(config).await);
    }
    if args.json {
        out::print_json(&as_json(&areas))?;
    } else {
        out::print(&page(&areas))?;
    }
    match worst(&areas) {
        Verdict::Ok | Verdict::Warning => Ok(()),
        Verdict::Problem => Err(CliError::Told),
    }
}

fn settings(flags: &Flags) -> (Area, Option<Config>) {
    let mut area = Area::new("Settings");
    match Config::resolve(flags) {
        Ok(config) => {
            area.ok(match &flags.config {
                Some(file) => format!("all valid, with \"{}\"", file.display()),
                None => "all valid".into(),
            });
            (area, Some(config))
        }
        Err(mistakes) => {
            for mistake in mistakes.iter() {
                area.problem(mistake, "`introspectd serve --help` shows every setting");
            }
            (area, None)
        }
    }
}

fn worst(areas: &[Area]) -> Verdict {
    areas
        .iter()
        .flat_map(|a| &a.findings)
        .map(|f| f.verdict)
        .max()
        .unwrap_or(Verdict::Ok)
}

fn page(areas: &[Area]) -> String {
    let paint = Paint::of_stdout();
    let mut text = String::new();
    for area in areas {
        let _ = writeln!(text, "{}", paint.bold(area.title));
        for finding in &area.findings {
            let name = format!("{:<8}", finding.verdict.name());
            let name = match finding.verdict {
                Verdict::Ok => paint.good(&name),
                Verdict::Warning => paint.doubtful(&name),
                Verdict::Problem => paint.bad(&name),
            };
            let _ = writeln!(text, "  {name} {}", out::clean(&finding.what));
            if let Some(advice) = &finding.advice {
                let _ = writeln!(text, "           do: {advice}");
            }
        }
    }
    let count = |v: Verdict| {
        areas
            .iter()
            .flat_map(|a| &a.findings)
            .filter(|f| f.verdict == v)
            .count()
    };
    let _ = writeln!(
        text,
        "\n{} ok, {} warnings, {} problems",
        count(Verdict::Ok),
        count(Verdict::Warning),
        count(Verdict::Problem)
    );
    text
}

fn as_json(areas: &[Area]) -> Value {
    let findings: Vec<Value> = areas
        .iter()
        .flat_map(|area| {
            area.findings.iter().map(|f| {
                json!({
                    "area": area.title, "verdict": f.verdict.name(), "what": f.what,
                    "advice": f.advice,
                })
            })
        })
        .collect();
    json!({ "verdict": worst(areas).name(), "findings": findings })
}
