//! `steer`: steering vectors, learned from texts that differ in one thing, listed, and applied by their name.
//!
//! They are stored probes of the kinds that are one direction: `probe show`, `export`, `import` and `delete`, and `probe:NAME` in edits
//! know them, too.

mod learn;

use clap::{Args, Subcommand};
use serde_json::json;

use self::learn::{LearnArgs, learn};
use super::{
    client::{Session, Target},
    error::CliError,
    intervene::{self, files, show},
    out,
    probe::{self, directions},
};
use crate::service::wire::introspect::{self as pb, edit::Operation, vector::Of};

pub(super) const EXAMPLES: &str = "\
Examples:
  A direction from texts that differ in one thing: the mean of some less that of the others, at every layer:
    introspectd steer learn gpt2 --name mood --positive \"I am so glad.\" --positive \"What joy!\" --negative \"I am so sad.\" --negative \"What grief!\"
  From files with a text per line; the first principal component, at the last token of some layers:
    introspectd steer learn gpt2 --name formal --positive-file letters.txt --negative-file chats.txt --kind pca --pooling last --layers 4-8
  Those that there are:
    introspectd steer list gpt2
  What does the model say when it is pushed along one, and away from it?
    introspectd steer apply gpt2 \"I think that\" mood --layer 6 --scale 2
    introspectd steer apply gpt2 \"I think that\" mood --layer 6 --scale=-2
  The same as an edit, for what else edits can say (positions, several at once); and shown, moved and removed as any probe:
    introspectd intervene gpt2 \"I think that\" --edit 'resid_post[layer=6;pos=-1] add probe:mood@blocks.6.hook_resid_post 2'
    introspectd probe show gpt2 mood";

/// Kinds of probes that are one direction.
const KINDS: [&str; 2] = ["mean_difference", "pca"];

/// Arguments of `steer`.
#[derive(Args, Clone, Debug)]
pub(super) struct SteerArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Clone, Debug)]
enum What {
    /// Learn a vector per layer from positive and negative texts, and store them under a name
    Learn(LearnArgs),
    /// The vectors of a model
    List(ListArgs),
    /// Run a text with a vector added at all its positions, and show what that changes
    Apply(ApplyArgs),
}

#[derive(Args, Clone, Debug)]
struct ListArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(Args, Clone, Debug)]
struct ApplyArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Text to run it on
    text: String,
    /// Name of the vector
    name: String,
    /// Layer whose vector is added, where it was learned [default: that of the greatest separation]
    #[arg(long, value_name = "N")]
    layer: Option<u32>,
    /// How often it is added; negative for the other way
    #[arg(
        long,
        value_name = "S",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    scale: f32,
    /// Labels or tokens to show
    #[arg(long, value_name = "N", default_value_t = 5)]
    candidates: u32,
    /// Print JSON in place of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// Runs the command.
pub(super) async fn run(args: &SteerArgs) -> Result<(), CliError> {
    match &args.what {
        What::Learn(args) => learn(args).await,
        What::List(args) => list(args).await,
        What::Apply(args) => apply(args).await,
    }
}

async fn list(args: &ListArgs) -> Result<(), CliError> {
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let request = pb::ListProbesRequest { model };
    let answer = session.probes().list_probes(request).await;
    session.close().await;
    let mut vectors = answer?.into_inner().probes;
    vectors.retain(|p| KINDS.contains(&p.kind.as_str()));
    if args.json {
        let vectors: Vec<_> = vectors.iter().map(probe::show::json).collect();
        return out::print_json(&json!({ "vectors": vectors }));
    }
    if vectors.is_empty() {
        return out::print("there are no vectors yet: `introspectd steer learn` makes some\n");
    }
    let rows = vectors.iter().map(|p| {
        let best = p.reports.iter().find(|r| r.hook == p.best);
        let separation = best.and_then(directions::separation);
        vec![
            p.name.clone(),
            p.kind.clone(),
            p.labels.join(" to "),
            p.reports.len().to_string(),
            p.best.clone(),
            separation.map_or(String::new(), |d| format!("{d:.3}")),
            p.train_examples.to_string(),
        ]
    });
    let heading = [
        "vector",
        "kind",
        "from",
        "hook points",
        "best hook point",
        "separation",
        "examples",
    ];
    out::print(&out::table(&heading, rows))
}

async fn apply(args: &ApplyArgs) -> Result<(), CliError> {
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let applied = applied(args, &session, model).await;
    session.close().await;
    let answer = applied?;
    if args.json {
        return out::print_json(&files::facts(&answer));
    }
    out::print(&show::page(&answer))
}

async fn applied(
    args: &ApplyArgs,
    session: &Session,
    model: String,
) -> Result<intervene::Answer, CliError> {
    let request = pb::GetProbeRequest {
        model: model.clone(),
        name: args.name.clone(),
    };
    let stored = session.probes().get_probe(request).await?.into_inner();
    let hook = hook(&stored.probe.unwrap_or_default(), args.layer)?;
    let vector = pb::ProbeDirection {
        name: args.name.clone(),
        hook: hook.clone(),
        ..pb::ProbeDirection::default()
    };
    let add = pb::Add {
        vector: Some(pb::Vector {
            of: Some(Of::Probe(vector)),
        }),
        scale: Some(args.scale),
    };
    let edit = pb::Edit {
        hook,
        operation: Some(Operation::Add(add)),
        ..pb::Edit::default()
    };
    let text = pb::Text {
        text: args.text.clone(),
        ..pb::Text::default()
    };
    let request = pb::InterveneRequest {
        model,
        input: Some(pb::Input {
            kind: Some(pb::input::Kind::Text(text)),
        }),
        intervention: Some(pb::Intervention {
            edits: vec![edit],
            ..pb::Intervention::default()
        }),
        selection: Some(pb::Selection {
            candidates: args.candidates,
            ..pb::Selection::default()
        }),
    };
    intervene::intervene(session.interventions(), request).await
}

/// The only hook point of a vector in a layer; the best of all unless one is named.
fn hook(probe: &pb::Probe, layer: Option<u32>) -> Result<String, CliError> {
    if !KINDS.contains(&probe.kind.as_str()) {
        return Err(CliError::new(format!(
            "\"{}\" is of the kind {}: a vector is of {}",
            out::clean(&probe.name),
            probe.kind,
            KINDS.join(" or ")
        )));
    }
    let Some(layer) = layer else {
        return Ok(probe.best.clone());
    };
    let of_layer = probe.reports.iter().filter(|r| r.layer == Some(layer));
    let hooks: Vec<&str> = of_layer.map(|r| r.hook.as_str()).collect();
    match hooks[..] {
        [hook] => Ok(hook.to_owned()),
        [] => {
            let all: Vec<&str> = probe.reports.iter().map(|r| r.hook.as_str()).collect();
            Err(CliError::new(format!(
                "\"{}\" has nothing of layer {layer}: it has {}",
                out::clean(&probe.name),
                all.join(", ")
            )))
        }
        [first, ..] => Err(CliError::new(format!(
            "\"{}\" has several hook points of layer {layer}: {}",
            out::clean(&probe.name),
            hooks.join(", ")
        ))
        .advise(format!(
            "name one: introspectd intervene ... --edit '{first} add probe:{}@{first}'",
            out::clean(&probe.name)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_names_one_hook_point() {
        let report = |hook: &str, layer| pb::ProbeReport {
            hook: hook.to_owned(),
            layer: Some(layer),
            ..pb::ProbeReport::default()
        };
        let mut probe = pb::Probe {
            kind: "pca".to_owned(),
            best: "b".to_owned(),
            reports: vec![report("a", 0), report("b", 1), report("c", 1)],
            ..pb::Probe::default()
        };
        let told = |found: Result<String, CliError>| format!("{:?}", found.unwrap_err());
        assert_eq!(hook(&probe, None).unwrap(), "b");
        assert_eq!(hook(&probe, Some(0)).unwrap(), "a");
        assert!(told(hook(&probe, Some(1))).contains("several hook points"));
        assert!(told(hook(&probe, Some(2))).contains("nothing of layer 2"));
        probe.kind = "mlp".to_owned();
        assert!(told(hook(&probe, None)).contains("of the kind mlp"));
    }
}
