//! Edits as the command line writes them: `z[layer=3;head=1,4] zero`.
//!
//! ```text
//!   HOOK [ KEY=N,... ; KEY=N,... ] OPERATION ARGUMENT...
//! ```
//!
//! A number may be a range, as in `layer=0,4-7` and `pos=-4--1`.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::{
    cli::{
        capture::{
            inputs,
            select::{TextArgs, of_ids, ranges},
        },
        error::CliError,
    },
    service::wire::introspect::{self as pb, edit::Operation, vector::Of},
};

/// Name of the only source that the command line gives.
const SOURCE: &str = "source";

const OPERATIONS: &str = "zero, mean, scale N, set N|FILE.npz, add N|FILE.npz|probe:NAME [N], noise N [SEED], clamp LOW HIGH, interchange [POS,...], project-out FILE.npz|probe:NAME";

/// What is otherwise in the model while it runs.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Intervention")]
pub(in crate::cli) struct EditArgs {
    /// Change this while the model runs: HOOK[KEY=N,...;...] OPERATION; may be given more than once (`introspectd intervene --help` explains)
    #[arg(long = "edit", value_name = "EDIT", value_parser = parse)]
    edits: Vec<pb::Edit>,
    /// Text whose run the operation `interchange` takes from
    #[arg(long, value_name = "TEXT", requires = "edits")]
    source: Option<String>,
    /// The same as token ids
    #[arg(
        long,
        value_name = "ID,...",
        value_delimiter = ',',
        requires = "edits",
        conflicts_with = "source"
    )]
    source_ids: Vec<u32>,
    #[command(flatten)]
    mean: MeanArgs,
}

/// Inputs that a mean is over.
#[derive(Args, Clone, Debug)]
pub(in crate::cli) struct MeanArgs {
    /// Text of those that a mean is over (may be given more than once)
    #[arg(long, value_name = "TEXT")]
    mean: Vec<String>,
    /// The same: every line of a file
    #[arg(long, value_name = "FILE")]
    mean_file: Option<PathBuf>,
    /// Token ids of an input that a mean is over (may be given more than once)
    #[arg(long, value_name = "ID,...", value_parser = ids)]
    mean_ids: Vec<Ids>,
}

/// Token ids of one input.
#[derive(Clone, Debug)]
struct Ids(Vec<u32>);

fn ids(text: &str) -> Result<Ids, String> {
    let each = text.split(',').map(|id| {
        let id = id.trim();
        id.parse().map_err(|_| format!("\"{id}\" is no token id"))
    });
    each.collect::<Result<_, _>>().map(Ids)
}

impl MeanArgs {
    /// All of them, if any were given.
    pub(in crate::cli) fn inputs(&self, how: &TextArgs) -> Result<Vec<pb::Input>, CliError> {
        let mut texts = self.mean.clone();
        if let Some(path) = &self.mean_file {
            let named = |why: String| CliError::new(format!("\"{}\" {why}", path.display()));
            let read = std::fs::read_to_string(path);
            let read = read.map_err(|e| named(format!("cannot be read: {e}")))?;
            let before = texts.len();
            texts.extend(read.lines().filter(|l| !l.is_empty()).map(str::to_owned));
            if texts.len() == before {
                return Err(named("holds no text".into()));
            }
        }
        let texts = texts.iter().map(|text| how.input(text));
        let ids = self.mean_ids.iter().map(|ids| of_ids(&ids.0));
        Ok(texts.chain(ids).collect())
    }
}

impl EditArgs {
    /// All edits together, if there are any; `texts` says how texts are read.
    pub(in crate::cli) fn intervention(
        &self,
        texts: &TextArgs,
    ) -> Result<Option<pb::Intervention>, CliError> {
        let inputs = self.mean.inputs(texts)?;
        let mut edits = self.edits.clone();
        let mut means = 0;
        for edit in &mut edits {
            if let Some(Operation::Mean(mean)) = &mut edit.operation {
                mean.inputs.clone_from(&inputs);
                means += 1;
            }
        }
        if (means == 0) != inputs.is_empty() {
            return Err(CliError::Usage(
                "the operation `mean` and what it is over belong together: give both --edit '... mean' and --mean, --mean-file or --mean-ids"
                    .into(),
            ));
        }
        if edits.is_empty() {
            return Ok(None);
        }
        let ids = (!self.source_ids.is_empty()).then(|| of_ids(&self.source_ids));
        let source = self.source.as_ref().map(|text| texts.input(text)).or(ids);
        let sources = source.into_iter().map(|input| {
            let source = pb::InterventionSource {
                input: Some(input),
                edits: Vec::new(),
            };
            (SOURCE.to_owned(), source)
        });
        Ok(Some(pb::Intervention {
            edits,
            sources: sources.collect(),
        }))
    }
}

/// Reads an edit.
///
/// # Errors
/// What is wrong with it, for people.
fn parse(text: &str) -> Result<pb::Edit, String> {
    let (edit, rest) = place(text)?;
    if rest.trim().is_empty() {
        return Err(format!(
            "\"{text}\" says not what is done there: {OPERATIONS}"
        ));
    }
    Ok(pb::Edit {
        operation: Some(operation(rest)?),
        ..edit
    })
}

/// Reads a place without an operation: `q[layer=3;head=1]`.
///
/// # Errors
/// What is wrong with it, for people.
pub(in crate::cli) fn receiver(text: &str) -> Result<pb::Receiver, String> {
    let (edit, rest) = place(text)?;
    if !rest.trim().is_empty() || !edit.keys.is_empty() || !edit.dims.is_empty() {
        return Err(format!(
            "\"{text}\" is no place of heads and positions: HOOK[layer=N,...;head=N,...;pos=N,...]"
        ));
    }
    Ok(pb::Receiver {
        hook: edit.hook,
        layers: edit.layers,
        heads: edit.heads,
        positions: edit.positions,
    })
}

/// A place, and what follows it.
fn place(text: &str) -> Result<(pb::Edit, &str), String> {
    let text = text.trim();
    let (hook, inside, rest) = match text.split_once('[') {
        Some((hook, rest)) => {
            let (inside, rest) = rest
                .split_once(']')
                .ok_or_else(|| format!("\"{text}\" opens a bracket and does not close it"))?;
            (hook.trim(), inside, rest)
        }
        None => {
            let (hook, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
            (hook, "", rest)
        }
    };
    let mut edit = pb::Edit {
        hook: hook.to_owned(),
        ..pb::Edit::default()
    };
    for part in inside.split(';').map(str::trim).filter(|p| !p.is_empty()) {
        let (key, given) = part
            .split_once('=')
            .ok_or_else(|| format!("\"{part}\" is not KEY=N,..."))?;
        match key.trim() {
            "layer" => edit.layers = ranges(given)?,
            "head" => edit.heads = ranges(given)?,
            "dim" => edit.dims = ranges(given)?,
            "pos" => edit.positions = ranges(given)?,
            "key" => edit.keys = ranges(given)?,
            other => {
                return Err(format!(
                    "\"{other}\" is none of layer, head, pos, key and dim"
                ));
            }
        }
    }
    Ok((edit, rest))
}

fn operation(text: &str) -> Result<Operation, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    Ok(match words[..] {
        ["zero"] => Operation::Zero(pb::Zero {}),
        ["mean"] => Operation::Mean(pb::Mean::default()),
        ["scale", factor] => Operation::Scale(number(factor)?),
        ["set", value] => Operation::Set(values(value)?),
        ["add", what] => add(what, None)?,
        ["add", what, factor] => add(what, Some(number(factor)?))?,
        ["noise", deviation] => noise(deviation, "0")?,
        ["noise", deviation, seed] => noise(deviation, seed)?,
        ["clamp", low, high] => Operation::Clamp(pb::Clamp {
            low: Some(number(low)?),
            high: Some(number(high)?),
        }),
        ["interchange"] => interchange(Vec::new()),
        ["interchange", positions] => interchange(ranges(positions)?),
        ["project-out", what] => Operation::ProjectOut(direction(what)?),
        _ => return Err(format!("\"{}\" is none of {OPERATIONS}", text.trim())),
    })
}

fn interchange(positions: Vec<i32>) -> Operation {
    Operation::Interchange(pb::Interchange {
        source: SOURCE.to_owned(),
        positions,
    })
}

fn add(what: &str, scale: Option<f32>) -> Result<Operation, String> {
    let vector = Some(direction(what)?);
    Ok(Operation::Add(pb::Add { vector, scale }))
}

/// `probe:NAME`, or what [`values`] reads.
fn direction(what: &str) -> Result<pb::Vector, String> {
    let of = match probe(what) {
        Some(probe) => Of::Probe(probe),
        None => Of::Values(values(what)?),
    };
    Ok(pb::Vector { of: Some(of) })
}

/// A number, the same everywhere; or `FILE.npz` with an array, `FILE.npz:NAME` with several.
fn values(what: &str) -> Result<pb::Tensor, String> {
    let (path, name) = match what.rsplit_once(".npz") {
        Some((stem, "")) => (format!("{stem}.npz"), None),
        Some((stem, rest)) if rest.starts_with(':') => (format!("{stem}.npz"), rest.get(1..)),
        Some(_) | None => return number(what).map(one),
    };
    let arrays = inputs::arrays(Path::new(&path))?;
    let mut named = arrays
        .into_iter()
        .filter(|t| name.is_none_or(|n| t.name == n));
    match (named.next(), named.next()) {
        (Some(found), None) => Ok(pb::Tensor {
            name: String::new(),
            ..found
        }),
        (None, _) => Err(format!(
            "\"{path}\" has no array \"{}\"",
            name.unwrap_or_default()
        )),
        (Some(_), Some(_)) => Err(format!("\"{path}\" has several arrays: write {path}:NAME")),
    }
}

fn noise(deviation: &str, seed: &str) -> Result<Operation, String> {
    Ok(Operation::Noise(pb::Noise {
        deviation: number(deviation)?,
        seed: seed
            .parse()
            .map_err(|_| format!("\"{seed}\" is no seed: give a whole number"))?,
    }))
}

/// `probe:NAME`, or `probe:NAME@HOOK`.
fn probe(text: &str) -> Option<pb::ProbeDirection> {
    let reference = crate::cli::probe::reference(text.strip_prefix("probe:")?);
    Some(pb::ProbeDirection {
        name: reference.name,
        hook: reference.hook,
        ..pb::ProbeDirection::default()
    })
}

/// The same number everywhere.
fn one(value: f32) -> pb::Tensor {
    pb::Tensor {
        dtype: pb::DType::F32.into(),
        shape: vec![1],
        data: value.to_le_bytes().to_vec().into(),
        ..pb::Tensor::default()
    }
}

fn number(text: &str) -> Result<f32, String> {
    text.parse().map_err(|_| format!("\"{text}\" is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_read_as_they_are_written() {
        let edit = parse("z[layer=3; head=1,4] zero").unwrap();
        assert_eq!(
            (&edit.hook[..], &edit.layers[..], &edit.heads[..]),
            ("z", &[3][..], &[1, 4][..])
        );
        assert_eq!(edit.operation, Some(Operation::Zero(pb::Zero {})));
        let edit = parse("resid_post[pos=-1] add probe:mood@hidden_states.2 -4").unwrap();
        assert_eq!(edit.positions, [-1]);
        let Some(Operation::Add(add)) = edit.operation else {
            panic!("{edit:?}")
        };
        assert_eq!(add.scale, Some(-4.0));
        assert_eq!(parse("embed noise 0.1 7").unwrap().hook, "embed");
        assert_eq!(parse(" pattern[key=0] scale 0.5 ").unwrap().keys, [0]);
    }

    #[test]
    fn numbers_may_be_ranges() {
        let edit = parse("z[layer=0-2,5;head=1-2;pos=-3--1] zero").unwrap();
        assert_eq!(edit.layers, [0, 1, 2, 5]);
        assert_eq!(
            (&edit.heads[..], &edit.positions[..]),
            (&[1, 2][..], &[-3, -2, -1][..])
        );
    }

    #[test]
    fn receivers_are_places_without_an_operation() {
        let receiver = receiver("q[layer=3;head=1]").unwrap();
        assert_eq!(
            (
                &receiver.hook[..],
                &receiver.layers[..],
                &receiver.heads[..]
            ),
            ("q", &[3][..], &[1][..])
        );
        assert!(super::receiver("q zero").is_err());
        assert!(super::receiver("pattern[key=1]").is_err());
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        for (text, said) in [
            ("z", "says not what is done there"),
            ("z[head=1 zero", "does not close"),
            ("z[head] zero", "KEY=N"),
            ("z[neck=1] zero", "none of layer"),
            ("z[head=-1] zero", "no number"),
            ("z[pos=-2-1] zero", "a range of each"),
            ("z[layer=3-1] zero", "no range"),
            ("z nothing", "none of zero"),
            ("z scale much", "no number"),
            ("z add none.npz", "none.npz"),
            ("z set file.npz4", "no number"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
