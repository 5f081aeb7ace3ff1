//! Interventions, validated as far as they can be without the model.

use crate::{
    engine::EngineError,
    methods::{
        attribute::features::Span,
        input::{self, Input},
        intervene::{Edit, Intervention, Operation, Source, Vector},
    },
    service::{
        from_proto::{required_input, tensor},
        wire::introspect::{self as pb, edit::Operation as Given, vector::Of},
    },
    tensor::Tensor,
};

/// Most edits of a list.
const MOST_EDITS: usize = 256;
/// Most sources.
const MOST_SOURCES: usize = 64;
/// Most inputs of a mean.
const MOST_INPUTS: usize = 4096;
/// Most spans of an edit.
const MOST_SPANS: usize = 4096;

type Result<T> = std::result::Result<T, EngineError>;

/// Directions of probes, as they were read.
pub(super) type Directions = Vec<(pb::ProbeDirection, Tensor)>;

/// The probes whose directions are named, with the fields that name them.
pub(super) fn probes(given: &pb::Intervention) -> Vec<(String, pb::ProbeDirection)> {
    let of_list = |field: String, edits: &[pb::Edit]| {
        let named = edits.iter().enumerate().filter_map(|(n, edit)| {
            let (what, vector) = match &edit.operation {
                Some(Given::Add(add)) => ("add.vector", add.vector.as_ref()),
                Some(Given::ProjectOut(vector)) => ("project_out", Some(vector)),
                Some(
                    Given::Zero(_)
                    | Given::Mean(_)
                    | Given::Set(_)
                    | Given::Scale(_)
                    | Given::Noise(_)
                    | Given::Interchange(_)
                    | Given::Clamp(_),
                )
                | None => return None,
            };
            match vector?.of.as_ref()? {
                Of::Probe(probe) => Some((format!("{field}[{n}].{what}.probe"), probe.clone())),
                Of::Values(_) | Of::Difference(_) => None,
            }
        });
        named.collect::<Vec<_>>()
    };
    let mut all = of_list("edits".to_owned(), &given.edits);
    for (name, source) in &given.sources {
        all.extend(of_list(format!("sources[\"{name}\"].edits"), &source.edits));
    }
    all
}

/// Paths of fields begin at the intervention.
pub(super) fn intervention(
    given: pb::Intervention,
    directions: &Directions,
) -> Result<Intervention> {
    if given.sources.len() > MOST_SOURCES {
        return Err(EngineError::invalid(
            "sources",
            format!(
                "has {} entries: give at most {MOST_SOURCES}",
                given.sources.len()
            ),
        ));
    }
    let sources = given.sources.into_iter().map(|(name, source)| {
        let field = format!("sources[\"{name}\"]");
        let source = Source {
            input: required_input(source.input).map_err(|e| e.beneath(&field))?,
            edits: edits(source.edits, &format!("{field}.edits"), directions)?,
        };
        Ok((name, source))
    });
    Ok(Intervention {
        sources: sources.collect::<Result<_>>()?,
        edits: edits(given.edits, "edits", directions)?,
    })
}

fn edits(given: Vec<pb::Edit>, field: &str, directions: &Directions) -> Result<Vec<Edit>> {
    if given.len() > MOST_EDITS {
        return Err(EngineError::invalid(
            field,
            format!("has {} entries: give at most {MOST_EDITS}", given.len()),
        ));
    }
    let each = given.into_iter().enumerate();
    each.map(|(n, e)| edit(e, directions).map_err(|e| e.beneath(&format!("{field}[{n}]"))))
        .collect()
}

fn edit(given: pb::Edit, directions: &Directions) -> Result<Edit> {
    if given.spans.len() > MOST_SPANS {
        return Err(EngineError::invalid(
            "spans",
            format!(
                "has {} entries: give at most {MOST_SPANS}",
                given.spans.len()
            ),
        ));
    }
    let span = |s: pb::Span| Span {
        start: s.start,
        end: s.end,
        sequence: s.sequence,
    };
    Ok(Edit {
        hook: given.hook,
        layers: given.layers,
        heads: given.heads,
        positions: given.positions,
        spans: given.spans.into_iter().map(span).collect(),
        keys: given.keys,
        dims: given.dims,
        operation: operation(given.operation, directions)?,
    })
}

fn operation(given: Option<Given>, directions: &Directions) -> Result<Operation> {
    Ok(match given {
        None => {
            return Err(EngineError::invalid(
                "operation",
                "is missing: give zero, mean, set, add, scale, noise, interchange, project_out or clamp",
            ));
        }
        Some(Given::Zero(pb::Zero {})) => Operation::Zero,
        Some(Given::Mean(mean)) => Operation::Mean(inputs(mean.inputs, "mean.inputs")?),
        Some(Given::Set(values)) => Operation::Set(tensor(values, "set")?.tensor),
        Some(Given::Add(add)) => Operation::Add {
            vector: vector(add.vector, directions).map_err(|e| e.beneath("add.vector"))?,
            scale: add.scale.unwrap_or(1.0),
        },
        Some(Given::Scale(factor)) => Operation::Scale(factor),
        Some(Given::Noise(noise)) => Operation::Noise {
            deviation: noise.deviation,
            seed: noise.seed,
        },
        Some(Given::Interchange(interchange)) => Operation::Interchange {
            source: interchange.source,
            positions: interchange.positions,
        },
        Some(Given::ProjectOut(given)) => Operation::ProjectOut(
            vector(Some(given), directions).map_err(|e| e.beneath("project_out"))?,
        ),
        Some(Given::Clamp(pb::Clamp {
            low: None,
            high: None,
        })) => {
            return Err(EngineError::invalid(
                "clamp",
                "has no bound: give low, high or both",
            ));
        }
        Some(Given::Clamp(clamp)) => Operation::Clamp {
            low: clamp.low.unwrap_or(f32::NEG_INFINITY),
            high: clamp.high.unwrap_or(f32::INFINITY),
        },
    })
}

fn vector(given: Option<pb::Vector>, directions: &Directions) -> Result<Vector> {
    Ok(match given.and_then(|v| v.of) {
        None => {
            return Err(EngineError::invalid(
                "of",
                "is missing: give values, difference or probe",
            ));
        }
        Some(Of::Values(values)) => Vector::Given(tensor(values, "values")?.tensor),
        Some(Of::Difference(difference)) => Vector::Difference {
            positive: inputs(difference.positive, "difference.positive")?,
            negative: inputs(difference.negative, "difference.negative")?,
        },
        Some(Of::Probe(probe)) => {
            let read = directions.iter().find(|(named, _)| *named == probe);
            let (_, direction) =
                read.ok_or_else(|| EngineError::internal("a probe was not read"))?;
            Vector::Given(direction.clone())
        }
    })
}

pub(super) fn inputs(given: Vec<pb::Input>, field: &str) -> Result<Vec<Input>> {
    if given.len() > MOST_INPUTS {
        return Err(EngineError::invalid(
            field,
            format!("has {} entries: give at most {MOST_INPUTS}", given.len()),
        ));
    }
    let each = given.into_iter().enumerate();
    each.map(|(n, i)| {
        required_input(Some(i)).map_err(|e| input::at_field(e, &format!("{field}[{n}]")))
    })
    .collect()
}
