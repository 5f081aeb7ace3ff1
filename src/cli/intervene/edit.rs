//! Edits as the command line writes them: `z[layer=3;head=1,4] zero`.
//!
//! ```text
//!   HOOK [ KEY=N,... ; KEY=N,... ] OPERATION ARGUMENT...
//! ```

use crate::service::wire::introspect::{self as pb, edit::Operation, vector::Of};

/// Name of the only source that the command line gives.
pub(super) const SOURCE: &str = "source";

const OPERATIONS: &str = "zero, scale N, set N, add N|probe:NAME [N], noise N [SEED], clamp LOW HIGH, interchange [POS,...], project-out probe:NAME";

/// Reads an edit.
///
/// # Errors
/// What is wrong with it, for people.
pub(super) fn parse(text: &str) -> Result<pb::Edit, String> {
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
            "layer" => edit.layers = numbers(given)?,
            "head" => edit.heads = numbers(given)?,
            "dim" => edit.dims = numbers(given)?,
            "pos" => edit.positions = numbers(given)?,
            "key" => edit.keys = numbers(given)?,
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
        ["scale", factor] => Operation::Scale(number(factor)?),
        ["set", value] => Operation::Set(one(number(value)?)),
        ["add", what] => add(what, None)?,
        ["add", what, factor] => add(what, Some(number(factor)?))?,
        ["noise", deviation] => noise(deviation, "0")?,
        ["noise", deviation, seed] => noise(deviation, seed)?,
        ["clamp", low, high] => Operation::Clamp(pb::Clamp {
            low: Some(number(low)?),
            high: Some(number(high)?),
        }),
        ["interchange"] => interchange(Vec::new()),
        ["interchange", positions] => interchange(numbers(positions)?),
        ["project-out", what] => Operation::ProjectOut(pb::Vector {
            of: Some(Of::Probe(probe(what).ok_or_else(|| {
                format!("\"{what}\" is no probe: write project-out probe:NAME")
            })?)),
        }),
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
    let of = match probe(what) {
        Some(probe) => Of::Probe(probe),
        None => Of::Values(one(number(what)?)),
    };
    let vector = Some(pb::Vector { of: Some(of) });
    Ok(Operation::Add(pb::Add { vector, scale }))
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

fn numbers<N: std::str::FromStr>(text: &str) -> Result<Vec<N>, String> {
    let each = text.split(',').map(str::trim);
    each.map(|n| {
        n.parse()
            .map_err(|_| format!("\"{n}\" is no number of that"))
    })
    .collect()
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
            ("z nothing", "none of zero"),
            ("z scale much", "no number"),
            ("z project-out 3", "no probe"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
