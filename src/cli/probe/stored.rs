//! Probes as they are stored: listed, moved about, removed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use super::{linear, show};
use crate::{
    cli::{
        client::{Session, Target},
        error::CliError,
        out,
    },
    service::wire::introspect::{self as pb, import_probe_request::From},
};

#[derive(Args, Clone, Debug)]
pub(super) struct ListArgs {
    /// Name of the model, or its folder; all models unless said
    model: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(Args, Clone, Debug)]
pub(super) struct One {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Name of the probe
    name: String,
    #[command(flatten)]
    target: Target,
}

#[derive(Args, Clone, Debug)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    one: One,
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Only these of its hook points
    #[arg(long, value_name = "HOOK,...", value_delimiter = ',')]
    hooks: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub(super) struct ImportArgs {
    #[command(flatten)]
    one: One,
    /// Folder with probe.json and a .safetensors
    #[arg(long, value_name = "DIR", required_unless_present = "linear")]
    from: Option<PathBuf>,
    /// Weights that were trained elsewhere: .json with hook, weight (a row for each class, or one) and bias, and unless tokens are scored
    /// pooling, and unless it is a number labels
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "force"])]
    linear: Option<PathBuf>,
    /// Take a probe of a model with another fingerprint
    #[arg(long)]
    force: bool,
    /// A probe of this name may be replaced
    #[arg(long)]
    replace: bool,
}

pub(super) async fn one(args: &One) -> Result<(Session, (String, String)), CliError> {
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    Ok((session, (model, args.name.clone())))
}

pub(super) async fn list(args: &ListArgs) -> Result<(), CliError> {
    let (session, model) = match &args.model {
        Some(model) => Session::for_model(&args.target, model).await?,
        None => (Session::remote(&args.target).await?, String::new()),
    };
    let answer = session
        .probes()
        .list_probes(pb::ListProbesRequest { model })
        .await;
    session.close().await;
    let answer = answer?.into_inner();
    if args.json {
        let probes: Vec<_> = answer.probes.iter().map(show::json).collect();
        let broken = answer.broken.iter();
        let broken: Vec<_> = broken
            .map(|b| json!({ "model": b.model, "name": b.name, "error": b.error }))
            .collect();
        return out::print_json(&json!({ "probes": probes, "broken": broken }));
    }
    if answer.probes.is_empty() && answer.broken.is_empty() {
        return out::print("there are no probes yet: `introspectd probe train` makes some\n");
    }
    let probes = answer.probes.iter().map(|p| {
        let of = if p.labels.is_empty() {
            "numbers".to_owned()
        } else {
            show::labels(&p.labels)
        };
        vec![
            p.model.clone(),
            p.name.clone(),
            p.kind.clone(),
            of,
            p.best.clone(),
            p.train_examples.to_string(),
        ]
    });
    let broken = answer.broken.iter().map(|b| {
        let mut row = vec![
            b.model.clone(),
            b.name.clone(),
            "broken".to_owned(),
            b.error.clone(),
        ];
        row.resize(6, String::new());
        row
    });
    let heading = [
        "model",
        "probe",
        "kind",
        "of",
        "best hook point",
        "examples",
    ];
    out::print(&out::table(&heading, probes.chain(broken)))
}

/// Names of the files of a probe in a folder.
const DESCRIPTION: &str = "probe.json";
const TENSORS: &str = "probe.safetensors";

pub(super) async fn export(args: &ExportArgs) -> Result<(), CliError> {
    let (session, (model, name)) = one(&args.one).await?;
    let request = pb::ExportProbeRequest {
        model,
        name,
        hooks: args.hooks.clone(),
    };
    let answer = session.probes().export_probe(request).await;
    session.close().await;
    let files = answer?.into_inner().files.unwrap_or_default();
    fs::create_dir_all(&args.to)
        .map_err(|e| CliError::new(format!("cannot make \"{}\": {e}", args.to.display())))?;
    for (name, bytes) in [(DESCRIPTION, &files.description), (TENSORS, &files.tensors)] {
        out::write_told(&args.to.join(name), bytes)?;
    }
    Ok(())
}

pub(super) async fn import(args: &ImportArgs) -> Result<(), CliError> {
    let from = match (&args.from, &args.linear) {
        (Some(folder), _) => From::Files(files(folder)?),
        (None, Some(file)) => From::Linear(linear::read(file)?),
        (None, None) => {
            return Err(CliError::Usage("give --from or --linear".to_owned()));
        }
    };
    let (session, (model, name)) = one(&args.one).await?;
    let request = pb::ImportProbeRequest {
        model,
        name,
        from: Some(from),
        force: args.force,
        replace: args.replace,
    };
    let answer = session.probes().import_probe(request).await;
    session.close().await;
    answer.map_err(|status| {
        let too_large = status.code() == tonic::Code::OutOfRange;
        let error = CliError::from(status);
        if too_large {
            return error.advise(
                "export fewer of its hook points (--hooks), or raise --max-message of the daemon",
            );
        }
        error
    })?;
    out::print(&format!("probe {} is stored\n", out::clean(&args.one.name)))
}

fn files(folder: &Path) -> Result<pb::ProbeFiles, CliError> {
    let read = |path: &Path| {
        fs::read(path)
            .map_err(|e| CliError::new(format!("cannot read \"{}\": {e}", path.display())))
    };
    let description = read(&folder.join(DESCRIPTION))?;
    let mut tensors = fs::read_dir(folder)
        .map_err(|e| CliError::new(format!("cannot read \"{}\": {e}", folder.display())))?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"));
    let (Some(tensors), None) = (tensors.next(), tensors.next()) else {
        return Err(CliError::new(format!(
            "there must be one .safetensors in \"{}\", no more and no less",
            folder.display()
        )));
    };
    Ok(pb::ProbeFiles {
        description: description.into(),
        tensors: read(&tensors)?.into(),
    })
}

pub(super) async fn delete(args: &One) -> Result<(), CliError> {
    let (session, (model, name)) = one(args).await?;
    let request = pb::DeleteProbeRequest { model, name };
    let answer = session.probes().delete_probe(request).await;
    session.close().await;
    answer?;
    out::print(&format!("probe {} is gone\n", out::clean(&args.name)))
}
