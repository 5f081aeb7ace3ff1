//! The commands of the binary.
//!
//! `serve` is the daemon, `worker` the process of a model that it starts (dispatched before anything else, so that it starts quickly),
//! `demo` the demonstration, `doctor` looks whether a daemon would run here. All others are clients: they talk gRPC
//! to a daemon, or to one that they start in this process for a model of a folder.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0, 1 for failures, 2 for a command line that
//! means nothing. A reader of standard output that leaves ends a command quietly.

mod answers;
mod arrays;
mod assemble;
mod attribute;
mod capture;
mod circuit;
mod client;
mod demo;
mod doctor;
mod error;
mod files;
mod heads;
mod http;
mod inspect;
mod intervene;
mod lens;
mod local;
mod models;
mod neurons;
mod out;
pub mod picture;
mod probe;
mod serve;
mod steer;
mod sweep;
mod text;

use std::{env, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{config, worker};
use error::CliError;

const EXAMPLES: &str = "\
Examples:
  See what it does, on a small model that is part of this binary:
    introspectd demo
  Serve every model of a folder (a folder each, with model.onnx in it):
    introspectd serve --models ./models
  Ask the daemon:
    introspectd models list
    introspectd inspect bert
    introspectd capture bert \"Some text\" --layers 3
    introspectd capture bert \"Some text\" -o some-text.npz
    introspectd attribute bert \"Some text\"
    introspectd probe train bert --data labelled.tsv
    introspectd intervene bert \"Some text\" --edit 'z[layer=3;head=1] zero'
    introspectd steer learn bert --name mood --positive \"I am glad.\" --negative \"I am sad.\"
    introspectd sweep bert \"Some text\"
    introspectd heads bert --detect induction_head
    introspectd neurons bert --text-file texts.txt --examples 5
    introspectd lens gpt2 \"Some text\"
  Without a daemon:
    introspectd capture ./models/bert \"Some text\"
  When something is wrong:
    introspectd doctor
`introspectd COMMAND --help` has examples for each command.";

/// Transformer models as ONNX files, served over gRPC with what happens inside them.
#[derive(Parser, Debug)]
#[command(name = "introspectd", version, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the daemon
    #[command(after_help = serve::EXAMPLES)]
    Serve(config::Flags),
    /// See what it does, on a small model that is part of this binary
    #[command(after_help = demo::EXAMPLES)]
    Demo(demo::DemoArgs),
    /// Look whether a daemon would run here, and what to do where not
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::DoctorArgs),
    /// Show what a model is made of: anatomy, hook points, certificate, what is missing and why
    #[command(after_help = inspect::EXAMPLES)]
    Inspect(inspect::InspectArgs),
    /// Show what happens inside a model on a text: attention, hidden states, any value
    #[command(after_help = capture::EXAMPLES)]
    Capture(capture::CaptureArgs),
    /// Explain what a model says by the parts of its input: gradients, differences, perturbation, attention
    #[command(after_help = attribute::EXAMPLES)]
    Attribute(attribute::AttributeArgs),
    /// Train small models on hidden states, judge them, store them and score by them
    #[command(after_help = probe::EXAMPLES)]
    Probe(probe::ProbeArgs),
    /// Change parts of a model while it runs, and see what that changes of its prediction
    #[command(after_help = intervene::EXAMPLES)]
    Intervene(Box<intervene::InterveneArgs>),
    /// Learn directions from texts that differ in one thing, and push a model along them
    #[command(after_help = steer::EXAMPLES)]
    Steer(Box<steer::SteerArgs>),
    /// Change every head, layer, position or neuron by itself, and see which ones matter
    #[command(after_help = sweep::EXAMPLES)]
    Sweep(Box<sweep::SweepArgs>),
    /// Find the edges between the parts of a model that carry a behaviour
    #[command(after_help = circuit::EXAMPLES)]
    Circuit(Box<circuit::CircuitArgs>),
    /// Measure what attention heads attend to, and find those of a kind
    #[command(after_help = heads::EXAMPLES)]
    Heads(Box<heads::HeadsArgs>),
    /// Find the neurons that react most, and the texts that they react to
    #[command(after_help = neurons::EXAMPLES)]
    Neurons(Box<neurons::NeuronsArgs>),
    /// Show what a model would say if it ended at each layer, and what each part of it writes of the answer
    #[command(after_help = lens::EXAMPLES)]
    Lens(Box<lens::LensArgs>),
    /// List, load, unload and reload the models of a daemon
    #[command(after_help = models::EXAMPLES)]
    Models(models::ModelsArgs),
    /// Show the tokens of a text, and the bytes that each stands for
    #[command(after_help = text::TOKENIZE_EXAMPLES)]
    Tokenize(text::TokenizeArgs),
    /// Show what a model predicts for a text
    #[command(after_help = text::PREDICT_EXAMPLES)]
    Predict(text::PredictArgs),
}

/// The life of the process.
pub fn main() -> ExitCode {
    if env::args_os().nth(1).is_some_and(|a| a == "worker") {
        return worker::main();
    }
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => return CliError::new(format!("cannot start threads: {e}")).report(),
    };
    let done = runtime.block_on(run(&cli.command));
    // A thread that still waits for standard input must not hold the process.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

async fn run(command: &Command) -> Result<(), CliError> {
    match command {
        Command::Serve(flags) => serve::run(flags).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Doctor(args) => doctor::run(args).await,
        Command::Inspect(args) => inspect::run(args).await,
        Command::Capture(args) => capture::run(args).await,
        Command::Attribute(args) => attribute::run(args).await,
        Command::Probe(args) => probe::run(args).await,
        Command::Intervene(args) => intervene::run(args).await,
        Command::Steer(args) => steer::run(args).await,
        Command::Sweep(args) => sweep::run(args).await,
        Command::Circuit(args) => circuit::run(args).await,
        Command::Heads(args) => heads::run(args).await,
        Command::Neurons(args) => neurons::run(args).await,
        Command::Lens(args) => lens::run(args).await,
        Command::Models(args) => models::run(args).await,
        Command::Tokenize(args) => text::tokenize(args).await,
        Command::Predict(args) => text::predict(args).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_commands_are_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_teaches_by_example() {
        for command in Cli::command().get_subcommands() {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            let own = format!("introspectd {}", command.get_name());
            assert!(help.contains(&own), "{}: {help}", command.get_name());
        }
    }
}
