//! `steer learn`: texts in two heaps, a vector from one to the other.

use std::{
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};

use crate::{
    cli::{
        capture::{
            bulk,
            select::{Numbers, PoolingArg, TextArgs, numbers},
        },
        client::{Session, Target},
        error::CliError,
        out,
        probe::{
            directions, show,
            training::{self, Trained},
        },
    },
    service::wire::introspect::{self as pb, probe_kind::Kind},
};

/// What the vector leads from, and to.
const LABELS: [&str; 2] = ["negative", "positive"];

#[derive(Args, Clone, Debug)]
pub(super) struct LearnArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Store the vectors under this name
    #[arg(long, value_name = "NAME")]
    name: String,
    /// A text that the vector leads to; may be given more than once
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "positive_file",
        help_heading = "Input"
    )]
    positive: Vec<String>,
    /// Texts that the vector leads to: a file with one in each line (`-`: standard input)
    #[arg(long, value_name = "FILE", help_heading = "Input")]
    positive_file: Option<PathBuf>,
    /// A text that the vector leads away from; may be given more than once
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "negative_file",
        help_heading = "Input"
    )]
    negative: Vec<String>,
    /// Texts that the vector leads away from: a file with one in each line (`-`: standard input)
    #[arg(long, value_name = "FILE", help_heading = "Input")]
    negative_file: Option<PathBuf>,
    #[command(flatten)]
    texts: TextArgs,
    /// Hook points: names, kinds such as `resid_pre`, patterns such as `blocks.*.hook_mlp_out`
    #[arg(
        long,
        value_name = "HOOK,...",
        value_delimiter = ',',
        default_value = "resid_post"
    )]
    hooks: Vec<String>,
    /// Of these layers only, such as 0,4-7
    #[arg(long, value_name = "N,...")]
    layers: Option<Numbers>,
    /// How the positions of a text become one vector
    #[arg(long, value_enum, default_value = "mean")]
    pooling: PoolingArg,
    /// What is learned
    #[arg(long, value_enum, default_value = "mean-difference")]
    kind: KindName,
    /// Vectors or probes of this name may be replaced
    #[arg(long)]
    replace: bool,
    /// Print JSON in place of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum KindName {
    /// The mean of the positive texts less that of the negative ones
    MeanDifference,
    /// The direction of greatest variance, towards the positive texts, of length one
    Pca,
}

impl KindName {
    fn wire(self) -> Kind {
        match self {
            KindName::MeanDifference => Kind::MeanDifference(pb::MeanDifference {}),
            KindName::Pca => Kind::Pca(pb::Pca {}),
        }
    }
}

/// Runs the command.
pub(super) async fn learn(args: &LearnArgs) -> Result<(), CliError> {
    let [negative, positive] = LABELS;
    let mut examples = args
        .examples(negative, &args.negative, args.negative_file.as_deref())
        .await?;
    examples.extend(
        args.examples(positive, &args.positive, args.positive_file.as_deref())
            .await?,
    );
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let header = pb::TrainHeader {
        model,
        name: args.name.clone(),
        hooks: args.hooks.clone(),
        layers: numbers(args.layers.as_ref()),
        pooling: args.pooling.wire().into(),
        kind: Some(pb::ProbeKind {
            kind: Some(args.kind.wire()),
        }),
        labels: LABELS.map(str::to_owned).to_vec(),
        unjudged: true,
        replace: args.replace,
        ..pb::TrainHeader::default()
    };
    let bar = training::progress(io::stderr().is_terminal());
    let learned = training::train(session.probes(), header, examples, &bar).await;
    session.close().await;
    let Trained { result, summary } = learned?;
    let vectors = result.probe.unwrap_or_default();
    if args.json {
        out::print_json(&show::json(&vectors))?;
    } else {
        out::print(&directions::layers(&vectors))?;
    }
    out::warn(&training::notes(&summary));
    out::warn(&format!("stored as {}\n", out::clean(&vectors.name)));
    Ok(())
}

impl LearnArgs {
    async fn examples(
        &self,
        label: &str,
        texts: &[String],
        file: Option<&Path>,
    ) -> Result<Vec<pb::Example>, CliError> {
        let lines = match file {
            Some(file) => bulk::lines(file).await?,
            None => Vec::new(),
        };
        let all = texts.iter().chain(lines.iter().map(|line| &line.text));
        let example = |text: &String| pb::Example {
            input: Some(self.texts.input(text)),
            of: Some(pb::example::Of::Label(label.to_owned())),
            ..pb::Example::default()
        };
        Ok(all.map(example).collect())
    }
}
