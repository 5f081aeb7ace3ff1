//! `models`: what the daemon's repository has, and loading and unloading it.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    client::{Session, Target},
    error::CliError,
    out,
};
use crate::service::wire::introspect::{
    ListModelsRequest, ListModelsResponse, LoadModelRequest, ModelState, ModelStatus,
    ReloadModelRequest, UnloadModelRequest,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  introspectd models list
  introspectd models list --rescan --json
  introspectd models load bert
  introspectd models reload bert
  introspectd models unload bert";

/// Arguments of `models`.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelsArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Clone, Debug)]
enum What {
    /// Every model of the repository with its state, and the folders that are no model
    List {
        /// Look at the repository again first
        #[arg(long)]
        rescan: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Load a model; answers when it serves
    Load(One),
    /// Unload a model; answers when its memory is given back
    Unload(One),
    /// Load a model afresh; the old one serves until the new one does
    Reload(One),
}

#[derive(Args, Clone, Debug)]
struct One {
    /// Name of the model
    model: String,
    #[command(flatten)]
    target: Target,
}

/// Runs the command.
pub(super) async fn run(args: &ModelsArgs) -> Result<(), CliError> {
    match &args.what {
        What::List {
            rescan,
            json,
            target,
        } => {
            let session = Session::remote(target).await?;
            let request = ListModelsRequest { rescan: *rescan };
            let answer = session.models().list_models(request).await?.into_inner();
            if *json {
                out::print_json(&listed(&answer))
            } else {
                out::print(&list(&answer))
            }
        }
        What::Load(one) => {
            let model = one.model.clone();
            let session = Session::remote(&one.target).await?;
            let answer = session
                .models()
                .load_model(LoadModelRequest { model })
                .await?;
            tell(answer.into_inner().status)
        }
        What::Unload(one) => {
            let model = one.model.clone();
            let session = Session::remote(&one.target).await?;
            let answer = session
                .models()
                .unload_model(UnloadModelRequest { model })
                .await?;
            tell(answer.into_inner().status)
        }
        What::Reload(one) => {
            let model = one.model.clone();
            let session = Session::remote(&one.target).await?;
            let answer = session
                .models()
                .reload_model(ReloadModelRequest { model })
                .await?;
            tell(answer.into_inner().status)
        }
    }
}

fn tell(status: Option<ModelStatus>) -> Result<(), CliError> {
    let status = status.ok_or_else(|| CliError::new("the daemon answered without a state"))?;
    out::print(&format!(
        "{} is {} (generation {})\n",
        out::clean(&status.name),
        state_name(status.state()),
        status.generation
    ))
}

fn list(answer: &ListModelsResponse) -> String {
    if answer.models.is_empty() && answer.skipped.is_empty() {
        return "the repository is empty: put a folder with model.onnx into it, then `introspectd models list --rescan`\n".into();
    }
    let mut text = out::table(
        &["model", "state", "generation", "why"],
        answer.models.iter().map(|m| {
            let why = match (&m.reason[..], &m.last_error[..]) {
                ("", "") => String::new(),
                ("", last) => format!("the last reload failed: {last}"),
                (reason, _) => reason.to_owned(),
            };
            vec![
                m.name.clone(),
                state_name(m.state()).to_owned(),
                m.generation.to_string(),
                why,
            ]
        }),
    );
    if !answer.skipped.is_empty() {
        text.push('\n');
        text.push_str(&out::table(
            &["left out", "why"],
            answer
                .skipped
                .iter()
                .map(|s| vec![s.name.clone(), s.reason.clone()]),
        ));
    }
    text
}

fn listed(answer: &ListModelsResponse) -> Value {
    json!({
        "models": answer.models.iter().map(status).collect::<Vec<_>>(),
        "skipped": answer.skipped.iter()
            .map(|s| json!({ "name": s.name, "reason": s.reason }))
            .collect::<Vec<_>>(),
    })
}

/// A status as JSON.
pub(super) fn status(s: &ModelStatus) -> Value {
    json!({
        "name": s.name, "state": state_name(s.state()), "generation": s.generation,
        "reason": s.reason, "last_error": s.last_error,
    })
}

/// A state for people.
pub(super) fn state_name(state: ModelState) -> &'static str {
    match state {
        ModelState::Unspecified => "unknown",
        ModelState::Unloaded => "unloaded",
        ModelState::Loading => "loading",
        ModelState::Ready => "ready",
        ModelState::Failed => "failed",
        ModelState::Draining => "draining",
        ModelState::Withdrawn => "withdrawn",
    }
}
