//! `attribute`: how much each part of the input contributes to what the model says, on the terminal or in a file.

pub(super) mod answer;
pub(super) mod files;
pub(super) mod question;
pub(super) mod show;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use clap::{ArgGroup, Args};
use indicatif::ProgressBar;
use serde_json::json;

use super::{
    answers,
    capture::{
        Kind,
        select::{OtherArgs, TextArgs},
    },
    client::{Session, Target},
    error::CliError,
    intervene::edit::EditArgs,
    out,
};
use crate::service::wire::introspect::{self as pb, evaluate_response::Item as Judged};
pub(super) use question::TargetArgs;
use question::{FeatureArgs, MethodArgs, Name};

pub(super) const EXAMPLES: &str = "\
Examples:
  Why does the model say so? Integrated gradients, word by word:
    introspectd attribute demo \"This movie was fantastic!\" --words
  The same without gradients, with an error for each score:
    introspectd attribute demo \"This movie was fantastic!\" -m finite_difference
  One class against the other, compared with mask tokens:
    introspectd attribute demo \"Not bad at all.\" --target positive --against negative --baseline mask
  Exact Shapley values of the words, as a picture:
    introspectd attribute demo \"Not bad at all.\" -m kernel_shap --words -o shap.png
  As exact as one per cent, with as few steps as that takes:
    introspectd attribute demo \"Not bad at all.\" --tolerance 0.01 -o movie.html
  Why would a language model go on like this?
    introspectd attribute gpt2 \"The capital of France is\" --continuation \" Paris\"
  At a layer; for numpy:
    introspectd attribute demo \"Not bad.\" --site hidden_states.2 -o layer.npz
  Would it say so for the same reasons without a head?
    introspectd attribute demo \"Not bad at all.\" --words --edit 'z[layer=3;head=1] zero'
  What would it take, and which method is best here?
    introspectd attribute demo \"Not bad.\" -m lime --estimate
    introspectd attribute demo \"Not bad.\" --evaluate integrated_gradients,kernel_shap,attention_rollout";

/// Arguments of `attribute`.
#[derive(Args, Clone, Debug)]
#[command(override_usage = "introspectd attribute [OPTIONS] MODEL TEXT
       introspectd attribute [OPTIONS] MODEL --ids ID,... | --inputs FILE.npz")]
#[command(group = ArgGroup::new("what").args(["text", "ids", "inputs"]).required(true))]
pub(super) struct AttributeArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Text to explain
    text: Option<String>,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    #[command(flatten)]
    edits: EditArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    question: TargetArgs,
    #[command(flatten)]
    features: FeatureArgs,
    /// Write a file in place of the terminal: .npz, .json, .png or .html
    #[arg(long, short, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Print JSON in place of a table
    #[arg(long, conflicts_with = "output", help_heading = "Output")]
    json: bool,
    /// Only tell what it would take
    #[arg(long, conflicts_with_all = ["output", "evaluate"], help_heading = "Output")]
    estimate: bool,
    /// Measure how well these methods explain the input, side by side
    #[arg(
        long,
        value_name = "METHOD,...",
        value_delimiter = ',',
        conflicts_with = "output",
        help_heading = "Output"
    )]
    evaluate: Vec<Name>,
    #[command(flatten)]
    target: Target,
}

/// Runs the command.
pub(super) async fn run(args: &AttributeArgs) -> Result<(), CliError> {
    let kind = args.output.as_deref().map(Kind::of).transpose()?;
    let methods = args
        .evaluate
        .iter()
        .map(|name| MethodArgs::default().method(*name))
        .collect::<Result<Vec<_>, _>>()?;
    let input = match args.other.input()? {
        Some(input) => input,
        None => args.texts.input(args.text.as_deref().unwrap_or_default()),
    };
    let mut request = pb::AttributeRequest {
        model: String::new(),
        input: Some(input),
        target: Some(args.question.target()?),
        method: Some(args.method.method(args.method.method)?),
        baseline: Some(args.features.baseline()?),
        features: Some(args.features.features()?),
        seed: args.method.seed,
        intervention: args.edits.intervention(&args.texts)?,
    };
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    request.model = model;
    let done = if args.estimate {
        estimate(&session, request, args.json).await
    } else if methods.is_empty() {
        explain(&session, request, args, kind).await
    } else {
        evaluate(&session, request, methods, args.json).await
    };
    session.close().await;
    done
}

async fn explain(
    session: &Session,
    request: pb::AttributeRequest,
    args: &AttributeArgs,
    kind: Option<Kind>,
) -> Result<(), CliError> {
    let bar = answers::progress(io::stderr().is_terminal());
    let found = answer::ask(session.attributions(), request, &bar).await?;
    let (Some(kind), Some(path)) = (kind, &args.output) else {
        if args.json {
            return out::print_json(&files::json(&found));
        }
        return out::print(&show::page(&found));
    };
    let bytes = match kind {
        Kind::Npz => files::npz(&found)?,
        Kind::Json => format!("{}\n", files::json(&found)).into_bytes(),
        Kind::Png => files::png(&found)?,
        Kind::Html => files::html(&found),
    };
    out::write_file(path, &bytes)?;
    out::warn(&format!(
        "{} ({}): {} scores\n",
        path.display(),
        out::bytes(bytes.len() as u64),
        found.scores().len()
    ));
    Ok(())
}

async fn estimate(
    session: &Session,
    request: pb::AttributeRequest,
    json: bool,
) -> Result<(), CliError> {
    let request = pb::EstimateCostRequest {
        request: Some(request),
    };
    let told = session
        .attributions()
        .estimate_cost(request)
        .await?
        .into_inner();
    let cost = told.cost.unwrap_or_default();
    if json {
        return out::print_json(&json!({
            "forward_rows": cost.forward_rows,
            "gradient_rows": cost.gradient_rows,
            "tokens": cost.tokens,
            "at_most": cost.at_most,
            "features": told.features,
            "estimated_seconds": told.estimated_seconds,
        }));
    }
    let most = if cost.at_most { "at most " } else { "" };
    out::print(&format!(
        "{most}{} rows forward, {} forward and backward, {} tokens for {} scores: about {}\n",
        cost.forward_rows,
        cost.gradient_rows,
        cost.tokens,
        told.features,
        out::seconds(told.estimated_seconds)
    ))
}

async fn evaluate(
    session: &Session,
    request: pb::AttributeRequest,
    methods: Vec<pb::Method>,
    json: bool,
) -> Result<(), CliError> {
    let request = pb::EvaluateRequest {
        request: Some(request),
        methods,
        ..Default::default()
    };
    let stream = session.attributions().evaluate(request).await?.into_inner();
    let (mut judged, mut comparison) = (Vec::new(), None);
    let take = |item| {
        match item {
            Judged::Evaluation(evaluation) => judged.push(evaluation),
            Judged::Comparison(found) => comparison = Some(found),
            Judged::Header(_) | Judged::Summary(_) => {}
        }
        Ok(())
    };
    answers::read(stream, |r| r.item, &ProgressBar::hidden(), take).await?;
    let comparison = comparison.unwrap_or_default();
    let ranks: Vec<f32> = comparison.spearman.as_ref().map_or(Vec::new(), |t| {
        t.data
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    });
    let n = comparison.methods.len();
    let name = |e: &pb::Evaluation| {
        e.result
            .as_ref()
            .map_or(String::new(), |r| r.method.clone())
    };
    if json {
        let all: Vec<_> = judged
            .iter()
            .map(|e| {
                json!({
                    "method": name(e),
                    "infidelity": e.infidelity,
                    "infidelity_scaled": e.infidelity_scaled,
                    "sensitivity_max": e.sensitivity_max,
                    "comprehensiveness": e.comprehensiveness,
                    "sufficiency": e.sufficiency,
                })
            })
            .collect();
        let rows: Vec<&[f32]> = ranks.chunks(n.max(1)).collect();
        return out::print_json(&json!({ "methods": all, "spearman": rows }));
    }
    let rows = judged.iter().map(|e| {
        vec![
            name(e),
            format!("{:.4}", e.infidelity),
            format!("{:.4}", e.infidelity_scaled),
            e.sensitivity_max
                .map_or("-".to_owned(), |s| format!("{s:.3}")),
            format!("{:+.3}", e.comprehensiveness),
            format!("{:+.3}", e.sufficiency),
        ]
    });
    let heading = [
        "method",
        "infidelity",
        "scaled",
        "sensitivity",
        "comprehensiveness",
        "sufficiency",
    ];
    let mut text = out::table(&heading, rows);
    text.push_str("\nRank correlation (Spearman)\n");
    let names: Vec<&str> = std::iter::once("method")
        .chain(comparison.methods.iter().map(String::as_str))
        .collect();
    let rows = comparison.methods.iter().zip(ranks.chunks(n.max(1)));
    text.push_str(&out::table(
        &names,
        rows.map(|(name, row)| {
            let numbers = row.iter().map(|r| format!("{r:+.2}"));
            std::iter::once(name.clone()).chain(numbers).collect()
        }),
    ));
    out::print(&text)
}
