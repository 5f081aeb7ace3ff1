//! `probe`: probes are trained from a file, shown, scored, and moved about.

mod bulk;
pub(super) mod data;
pub(super) mod directions;
mod linear;
pub(super) mod show;
mod stored;
pub(super) mod training;

use std::{
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
};

use self::{
    stored::{ExportArgs, ImportArgs, ListArgs, One, delete, export, import, list, one},
    training::Trained,
};
use super::{
    capture::select::TextArgs,
    client::{Session, Target},
    error::CliError,
    intervene::edit::EditArgs,
    out,
    picture::curve,
};
use crate::service::wire::introspect::{self as pb, probe_kind::Kind};
use clap::{Args, Subcommand, ValueEnum};

pub(super) const EXAMPLES: &str = "\
Examples:
  Which layer knows the sentiment? One probe per layer, judged on what was held out:
    introspectd probe train bert --data reviews.tsv --name sentiment
  The same as a picture; a property that is a number; another kind, at some layers:
    introspectd probe train bert --data reviews.tsv -o curve.html
    introspectd probe train bert --data lengths.csv --numbers
    introspectd probe train bert --data reviews.tsv --kind mlp --hooks 'blocks.*.hook_resid_post' --pooling cls
  Labels of words: lines like {\"text\": \"a dog\", \"spans\": [{\"start\": 2, \"end\": 5, \"label\": \"noun\"}]}
    introspectd probe train bert --data words.jsonl --name words
  Labels of tokens by their positions, of ids: lines like {\"ids\": [2, 17, 3], \"positions\": [{\"position\": 1, \"label\": \"noun\"}]}
    introspectd probe train bert --data ids.jsonl --name words --replace
  What does it say of a text, and of each token? Of all texts of a file, a line of JSON for each?
    introspectd probe score bert sentiment \"Not bad at all.\" --per-token
    introspectd probe score bert sentiment --data reviews.tsv --truncate
  And what would it say without a head?
    introspectd probe score bert sentiment \"Not bad at all.\" --edit 'z[layer=3;head=1] zero'
  And which words make it say so? (more under `attribute`)
    introspectd attribute bert \"Not bad at all.\" --probe sentiment
  Those that there are; to another daemon and back:
    introspectd probe list
    introspectd probe show bert sentiment
    introspectd probe export bert sentiment --to ./sentiment
    introspectd probe import bert sentiment --from ./sentiment --replace
    introspectd probe delete bert words
  One of scikit-learn's, after json.dump({\"hook\": \"hidden_states.3\", \"pooling\": \"mean\", \"labels\": clf.classes_.tolist(),
  \"weight\": clf.coef_.tolist(), \"bias\": clf.intercept_.tolist()}, file), of hidden states that `capture` or PyTorch gave:
    introspectd probe import bert mine --linear weights.json";

/// Arguments of `probe`.
#[derive(Args, Clone, Debug)]
pub(super) struct ProbeArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Clone, Debug)]
enum What {
    /// Train a probe per layer from labelled examples, and show how well each does
    Train(Box<TrainArgs>),
    /// Score a text by probes
    Score(ScoreArgs),
    /// The probes of a model, or of all models
    List(ListArgs),
    /// What is known of a probe
    Show(ShowArgs),
    /// Write a probe's files to a folder
    Export(ExportArgs),
    /// Bring a probe from such a folder
    Import(ImportArgs),
    /// Remove a probe
    Delete(One),
}

#[derive(Args, Clone, Debug)]
struct TrainArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Labelled examples: .tsv or .csv with a heading, or .jsonl
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Column (or key) of the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_column: String,
    /// Column (or key) of the label
    #[arg(long, value_name = "NAME", default_value = "label")]
    label_column: String,
    /// Column (or key) that says train or test, where there is one
    #[arg(long, value_name = "NAME", default_value = "split")]
    split_column: String,
    /// Labels are numbers
    #[arg(long)]
    numbers: bool,
    /// Names of the classes in the order of their scores; all that the file has, sorted, unless said
    #[arg(
        long,
        value_name = "LABEL,...",
        value_delimiter = ',',
        conflicts_with = "numbers"
    )]
    labels: Vec<String>,
    /// Store the probes under this name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A probe of this name may be replaced
    #[arg(long, requires = "name")]
    replace: bool,
    /// Hook points; all hidden states unless said
    #[arg(long, value_name = "HOOK,...", value_delimiter = ',')]
    hooks: Vec<String>,
    /// How positions become one vector
    #[arg(long, value_enum, default_value_t = Pooling::Mean)]
    pooling: Pooling,
    /// What is trained; logistic for classes and ridge for numbers unless said
    #[arg(long, value_enum)]
    kind: Option<KindName>,
    /// Inverse strength of the penalty (logistic)
    #[arg(long, value_name = "C")]
    c: Option<f64>,
    /// Choose C among these by cross-validation (logistic)
    #[arg(long, value_name = "C,...", value_delimiter = ',')]
    cross_validate: Vec<f64>,
    /// Strength of the penalty (ridge, mlp)
    #[arg(long, value_name = "ALPHA")]
    alpha: Option<f64>,
    /// Width of the hidden layer (mlp)
    #[arg(long, value_name = "N")]
    hidden: Option<u32>,
    /// Part of the examples that is held out
    #[arg(long, value_name = "PART", default_value_t = 0.2)]
    test: f64,
    /// Leave the control task out: half the time
    #[arg(long)]
    no_control: bool,
    /// Online codelength, too
    #[arg(long)]
    codelength: bool,
    /// Accuracy, or R squared, by number of examples, too
    #[arg(long)]
    learning_curve: bool,
    /// Where draws begin
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Write the curve to a file, too: .png, .html or .json
    #[arg(long, short, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Print JSON in place of a table
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    target: Target,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Pooling {
    Mean,
    Cls,
    Last,
    Max,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
#[value(rename_all = "snake_case")]
enum KindName {
    Logistic,
    Ridge,
    MeanDifference,
    Pca,
    Mlp,
}

#[derive(Args, Clone, Debug)]
struct ScoreArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Names of probes, separated by commas; NAME@HOOK for another hook point than the best
    probes: String,
    /// The text
    #[arg(required_unless_present = "data")]
    text: Option<String>,
    /// Score all inputs of a file in the place of one text: .tsv or .csv with a heading, or .jsonl; a line of JSON for each
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    data: Option<PathBuf>,
    /// Column (or key) of the text, in a file
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_column: String,
    /// Scores of each token, too
    #[arg(long)]
    per_token: bool,
    /// What the model predicts, too, from the same run
    #[arg(long)]
    predict: bool,
    /// Take probes of a model with another fingerprint
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    edits: EditArgs,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(Args, Clone, Debug)]
struct ShowArgs {
    #[command(flatten)]
    one: One,
    /// Write the curve to a file, too: .png, .html or .json
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print JSON in place of a table
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) async fn run(args: &ProbeArgs) -> Result<(), CliError> {
    match &args.what {
        What::Train(args) => train(args).await,
        What::Score(args) => score(args).await,
        What::List(args) => list(args).await,
        What::Show(args) => {
            let (session, request) = one(&args.one).await?;
            let (model, name) = request;
            let answer = session
                .probes()
                .get_probe(pb::GetProbeRequest { model, name })
                .await;
            session.close().await;
            let probe = answer?.into_inner().probe.unwrap_or_default();
            told(&probe, args.output.as_deref(), args.json)
        }
        What::Export(args) => export(args).await,
        What::Import(args) => import(args).await,
        What::Delete(args) => delete(args).await,
    }
}

async fn train(args: &TrainArgs) -> Result<(), CliError> {
    if let Some(path) = &args.output {
        ending(path)?;
    }
    let kind = kind(args)?;
    let columns = data::Columns {
        text: args.text_column.clone(),
        label: args.label_column.clone(),
        part: args.split_column.clone(),
        numbers: args.numbers,
        how: args.texts.clone(),
    };
    let found = data::read(&args.data, &columns)?;
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let header = pb::TrainHeader {
        model,
        name: args.name.clone().unwrap_or_default(),
        hooks: args.hooks.clone(),
        pooling: match args.pooling {
            Pooling::Mean => pb::Pooling::Mean,
            Pooling::Cls => pb::Pooling::Cls,
            Pooling::Last => pb::Pooling::Last,
            Pooling::Max => pb::Pooling::Max,
        }
        .into(),
        kind: Some(kind),
        labels: args.labels.clone(),
        seed: args.seed,
        test_fraction: args.test,
        skip_control: args.no_control,
        codelength: args.codelength,
        learning_curve: args.learning_curve,
        replace: args.replace,
        ..pb::TrainHeader::default()
    };
    let bar = training::progress(io::stderr().is_terminal());
    let trained = training::train(session.probes(), header, found.all, &bar).await;
    session.close().await;
    let Trained { result, summary } = trained.map_err(|error| {
        error.placed(|field| {
            let line = found.lines.get(number_of(field)?)?;
            Some(format!("line {line} of \"{}\"", args.data.display()))
        })
    })?;
    let probe = result.probe.unwrap_or_default();
    let told = told(&probe, args.output.as_deref(), args.json);
    out::warn(&training::notes(&summary));
    if result.stored {
        out::warn(&format!("stored as {}\n", out::clean(&probe.name)));
    }
    told
}

/// `7` for `examples[7].label`.
fn number_of(field: &str) -> Option<usize> {
    let (number, _) = field.strip_prefix("examples[")?.split_once(']')?;
    number.parse().ok()
}

/// The kind with its options; those that it does not have are refused.
fn kind(args: &TrainArgs) -> Result<pb::ProbeKind, CliError> {
    let name = args.kind.unwrap_or(if args.numbers {
        KindName::Ridge
    } else {
        KindName::Logistic
    });
    let given = [
        ("--c", args.c.is_some(), &[KindName::Logistic][..]),
        (
            "--cross-validate",
            !args.cross_validate.is_empty(),
            &[KindName::Logistic],
        ),
        (
            "--alpha",
            args.alpha.is_some(),
            &[KindName::Ridge, KindName::Mlp],
        ),
        ("--hidden", args.hidden.is_some(), &[KindName::Mlp]),
    ];
    if let Some((option, ..)) = given
        .iter()
        .find(|(_, given, of)| *given && !of.contains(&name))
    {
        return Err(CliError::Usage(format!(
            "\"{option}\" is no option of this kind of probe"
        )));
    }
    let alpha = args.alpha.unwrap_or(0.0);
    let kind = match name {
        KindName::Logistic => Kind::Logistic(pb::Logistic {
            c: args.c.unwrap_or(0.0),
            cross_validate: args.cross_validate.clone(),
        }),
        KindName::Ridge => Kind::Ridge(pb::Ridge { alpha }),
        KindName::MeanDifference => Kind::MeanDifference(pb::MeanDifference {}),
        KindName::Pca => Kind::Pca(pb::Pca {}),
        KindName::Mlp => Kind::Mlp(pb::Mlp {
            hidden: args.hidden.unwrap_or(0),
            alpha,
        }),
    };
    // Labels of tokens are classes, so that logistic regression is right for them, too.
    Ok(pb::ProbeKind { kind: Some(kind) })
}

#[derive(Clone, Copy)]
enum Ending {
    Png,
    Html,
    Json,
}

fn ending(path: &Path) -> Result<Ending, CliError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("png") => Ok(Ending::Png),
        Some("html" | "htm") => Ok(Ending::Html),
        Some("json") => Ok(Ending::Json),
        Some(_) | None => Err(CliError::Usage(format!(
            "\"{}\" ends in none of .png, .html and .json",
            path.display()
        ))),
    }
}

/// Prints what is known of a probe, and writes it to a file where that is asked for.
fn told(probe: &pb::Probe, output: Option<&Path>, json: bool) -> Result<(), CliError> {
    let printed = if json {
        out::print_json(&show::json(probe))
    } else {
        out::print(&show::layers(probe))
    };
    // A reader that left does not keep the file from being written.
    let written = output.map_or(Ok(()), |path| written(probe, path));
    written.and(printed)
}

fn written(probe: &pb::Probe, path: &Path) -> Result<(), CliError> {
    let ending = ending(path)?;
    if directions::unjudged(probe) && !matches!(ending, Ending::Json) {
        return Err(
            CliError::new("these were judged by no example: there is no curve of them")
                .advise("write a .json, or leave -o out"),
        );
    }
    let curve = show::curve(probe);
    let bytes = match ending {
        Ending::Png => curve::png(&curve).map_err(|e| CliError::new(e.to_string()))?,
        Ending::Html => curve::html(&curve).into_bytes(),
        Ending::Json => format!("{}\n", show::json(probe)).into_bytes(),
    };
    out::write_told(path, &bytes)
}

/// `NAME`, or `NAME@HOOK` for another hook point than the best.
pub(super) fn reference(named: &str) -> pb::ProbeReference {
    let (name, hook) = named.split_once('@').unwrap_or((named, ""));
    pb::ProbeReference {
        name: name.to_owned(),
        hook: hook.to_owned(),
        force: false,
    }
}

async fn score(args: &ScoreArgs) -> Result<(), CliError> {
    let intervention = args.edits.intervention(&args.texts)?;
    let inputs = match &args.data {
        Some(path) => Some(data::inputs(path, &args.text_column, &args.texts)?),
        None => None,
    };
    let of = args.text.as_ref().map(|text| args.texts.input(text));
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let probes = args.probes.split(',').map(|named| pb::ProbeReference {
        force: args.force,
        ..reference(named)
    });
    let request = pb::ScoreRequest {
        model,
        probes: probes.collect(),
        of: of.map(pb::score_request::Of::Input),
        per_token: args.per_token,
        predict: args.predict,
        intervention,
    };
    let scored = match inputs {
        Some(inputs) => bulk::score(&session, request, inputs).await,
        None => one_score(&session, request, args.json).await,
    };
    session.close().await;
    scored
}

async fn one_score(
    session: &Session,
    request: pb::ScoreRequest,
    json: bool,
) -> Result<(), CliError> {
    let answer = session.probes().score(request).await?.into_inner();
    let cut = training::cut(u64::from(answer.truncated_tokens));
    out::warn(&cut.unwrap_or_default());
    if json {
        return out::print_json(&show::scores_json(&answer));
    }
    out::print(&show::scores(&answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_name_examples() {
        assert_eq!(number_of("examples[7].label"), Some(7));
        assert_eq!(number_of("examples[12].tokens.spans[3].label"), Some(12));
        for other in ["examples", "header.hooks[1]", "examples[x].label"] {
            assert_eq!(number_of(other), None, "{other}");
        }
    }
}
