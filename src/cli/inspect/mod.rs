//! `inspect`: what a model is made of, what can be captured in it, what was verified, what is missing and why.

mod json;
mod page;

use clap::Args;

use super::{
    assemble::Tally,
    client::{Session, Target},
    error::CliError,
    out,
};
use crate::service::wire::introspect::{
    GetGraphRequest, GetModelRequest, Model, get_graph_response::Item,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  A model of the daemon:
    introspectd inspect demo
  A folder on this disk, without a daemon:
    introspectd inspect ./models/bert
  Every hook point with all its names:
    introspectd inspect demo --hooks
  For programs:
    introspectd inspect demo --json | jq -r '.hooks[].name'
  The graph, normalised as the hook points see it:
    introspectd inspect demo --graph | less";

/// Arguments of `inspect`.
#[derive(Args, Clone, Debug)]
pub(super) struct InspectArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Print every hook point with all its names, and no more
    #[arg(long, conflicts_with_all = ["json", "graph"])]
    hooks: bool,
    /// Print everything as JSON
    #[arg(long, conflicts_with = "graph")]
    json: bool,
    /// Print the graph
    #[arg(long)]
    graph: bool,
    #[command(flatten)]
    target: Target,
}

/// Runs the command.
pub(super) async fn run(args: &InspectArgs) -> Result<(), CliError> {
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let done = if args.graph {
        graph(&session, model).await
    } else {
        print(&session, model, args).await
    };
    session.close().await;
    done
}

async fn print(session: &Session, model: String, args: &InspectArgs) -> Result<(), CliError> {
    let model = fetch(session, model).await?;
    if args.json {
        out::print_json(&json::model(&model))
    } else if args.hooks {
        out::print(&page::every_hook(&model))
    } else {
        out::print(&page::page(&model))
    }
}

/// What the daemon knows of a model.
pub(super) async fn fetch(session: &Session, model: String) -> Result<Model, CliError> {
    let answer = session
        .models()
        .get_model(GetModelRequest { model })
        .await?;
    answer
        .into_inner()
        .model
        .ok_or_else(|| CliError::new("the daemon answered without a model"))
}

async fn graph(session: &Session, model: String) -> Result<(), CliError> {
    let mut stream = session
        .models()
        .get_graph(GetGraphRequest { model })
        .await?
        .into_inner();
    let mut tally = Tally::default();
    let mut ended = false;
    while let Some(message) = stream.message().await? {
        match message.item {
            Some(Item::Text(text)) if !ended => {
                tally.count(&[text.as_bytes()]);
                out::print(&out::clean(&text))?;
            }
            Some(Item::Summary(s)) if !ended => {
                tally.check(s.messages, s.bytes, s.crc32c)?;
                ended = true;
            }
            Some(Item::Text(_) | Item::Summary(_)) | None => {
                return Err(CliError::new(
                    "the graph is broken: a message is out of place",
                ));
            }
        }
    }
    if ended {
        Ok(())
    } else {
        Err(CliError::new(
            "the graph above is incomplete: the stream ended without its summary",
        ))
    }
}
