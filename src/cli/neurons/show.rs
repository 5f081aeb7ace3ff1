//! Neurons on the terminal, as JSON, and as pictures.

use ndarray::{Array2, ArrayD, Ix2, IxDyn};
use serde_json::{Value, json};

use super::{Activations, Answer};
use crate::{
    cli::{
        capture::json::{shortest, summary, token},
        files::Contents,
        out,
        picture::{
            grid::{self, Grid, Scale},
            terminal::Style,
        },
    },
    service::wire::introspect as pb,
};

/// Widest map where there is no terminal to fit.
const WIDTH: usize = 200;
/// Tokens beside an example's that a table shows.
const BESIDE: usize = 4;

/// A table of neurons, their examples, and the texts of the command line token by token.
pub(super) fn page(answer: &Answer) -> String {
    let contrasts = answer.neurons.iter().any(|n| n.contrast.is_some());
    let mut heading = vec!["neuron", "mean", "max"];
    if contrasts {
        heading.push("contrast");
    }
    heading.push("most active");
    let rows = answer.neurons.iter().map(|n| {
        let mut row = vec![name(n), format!("{:.4}", n.mean), format!("{:.4}", n.max)];
        if contrasts {
            row.push(n.contrast.map_or("-".to_owned(), |c| format!("{c:+.4}")));
        }
        row.push(n.examples.first().map_or(String::new(), excerpt));
        row
    });
    let mut text = out::table(&heading, rows);
    for neuron in answer.neurons.iter().filter(|n| n.examples.len() > 1) {
        text.push_str(&format!("\n{}\n", name(neuron)));
        let rows = neuron.examples.iter().map(|e| {
            let place = format!("{}:{}", e.id, e.position);
            vec![place, format!("{:.4}", e.activation), excerpt(e)]
        });
        text.push_str(&out::table(&["text:token", "active", "where"], rows));
    }
    let width = out::width().unwrap_or(WIDTH);
    for grid in answer.texts.iter().filter_map(|t| of_text(answer, t)) {
        text.push('\n');
        text.push_str(&grid::text(&grid, Style::of_stdout(), width));
    }
    for note in &answer.summary.notes {
        text.push_str(&format!("  {}\n", out::clean(note)));
    }
    text
}

/// `3.17`, or the hook point where the layer alone says not which.
fn name(neuron: &pb::RankedNeuron) -> String {
    match neuron.layer {
        Some(layer) if neuron.hook.ends_with("mlp.hook_post") => {
            format!("{layer}.{}", neuron.index)
        }
        Some(_) | None => format!("{}.{}", neuron.hook, neuron.index),
    }
}

/// The tokens around, the active one in brackets.
fn excerpt(example: &pb::NeuronExample) -> String {
    let at = example.position.saturating_sub(example.first) as usize;
    let from = at.saturating_sub(BESIDE);
    let tokens = example.tokens.iter().enumerate();
    let near = tokens.skip(from).take(at - from + BESIDE + 1);
    let words: Vec<String> = near
        .map(|(n, t)| {
            if n == at {
                format!("[{}]", spelled(t))
            } else {
                spelled(t)
            }
        })
        .collect();
    words.join(" ")
}

/// A token; its id where there is no tokenizer.
fn spelled(token: &pb::Token) -> String {
    match token.text.as_str() {
        "" => token.id.to_string(),
        text => text.to_owned(),
    }
}

/// For files.
pub(super) fn contents(answer: &Answer) -> Contents {
    let all = answer.neurons.len();
    let column = |of: &dyn Fn(&pb::RankedNeuron) -> f32| {
        let values: Vec<f32> = answer.neurons.iter().map(of).collect();
        ArrayD::from_shape_vec(IxDyn(&[all]), values).unwrap_or_default()
    };
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // as files hold them
    let mut arrays = vec![
        (
            "layer".to_owned(),
            column(&|n| n.layer.map_or(f32::NAN, |l| l as f32)),
        ),
        ("index".to_owned(), column(&|n| n.index as f32)),
        ("mean".to_owned(), column(&|n| n.mean as f32)),
        ("max".to_owned(), column(&|n| n.max)),
        (
            "contrast".to_owned(),
            column(&|n| n.contrast.map_or(f32::NAN, |c| c as f32)),
        ),
    ];
    let texts = answer.texts.iter();
    arrays.extend(texts.map(|t| (format!("activations:{}", t.id), t.values.values.clone())));
    let statistics = answer.statistics.iter();
    arrays.extend(statistics.map(|a| (a.name.clone(), a.values.clone())));
    let mut grids: Vec<Grid> = answer
        .texts
        .iter()
        .filter_map(|t| of_text(answer, t))
        .collect();
    grids.extend(answer.neurons.iter().filter_map(of_examples));
    Contents {
        json: json(answer),
        arrays,
        title: format!("Neurons of {}", answer.header.model),
        grids,
    }
}

/// Neurons by tokens.
fn of_text(answer: &Answer, text: &Activations) -> Option<Grid> {
    let values = text
        .values
        .values
        .clone()
        .into_dimensionality::<Ix2>()
        .ok()?;
    Some(Grid {
        title: format!("text {}", text.id),
        facts: "activation of each neuron at each token".to_owned(),
        rows: answer
            .neurons
            .iter()
            .take(values.nrows())
            .map(name)
            .collect(),
        columns: text.tokens.iter().map(spelled).collect(),
        values,
        scale: Scale::Signed,
    })
}

/// Examples by places around the active token.
fn of_examples(neuron: &pb::RankedNeuron) -> Option<Grid> {
    let before = |e: &pb::NeuronExample| e.position.saturating_sub(e.first) as usize;
    let left = neuron.examples.iter().map(before).max()?;
    let numbers = |e: &pb::NeuronExample| -> Vec<f32> {
        let data = e.activations.as_ref().map(|t| t.data.clone());
        let data = data.unwrap_or_default();
        data.as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    };
    let all: Vec<(usize, Vec<f32>)> = neuron
        .examples
        .iter()
        .map(|e| (left - before(e), numbers(e)))
        .collect();
    let width = all.iter().map(|(from, n)| from + n.len()).max()?;
    let mut values = Array2::from_elem((all.len(), width), f32::NAN);
    for (row, (from, numbers)) in all.iter().enumerate() {
        for (at, number) in numbers.iter().enumerate() {
            values[[row, from + at]] = *number;
        }
    }
    let place = |at: usize| {
        let at = i64::try_from(at).unwrap_or(0) - i64::try_from(left).unwrap_or(0);
        at.to_string()
    };
    Some(Grid {
        title: format!("neuron {}", name(neuron)),
        facts: format!(
            "mean {:.4}, max {:.4}; best examples around their most active token",
            neuron.mean, neuron.max
        ),
        rows: neuron.examples.iter().map(excerpt).collect(),
        columns: (0..width).map(place).collect(),
        values,
        scale: Scale::Signed,
    })
}

/// Everything.
pub(super) fn json(answer: &Answer) -> Value {
    let header = &answer.header;
    let texts = answer.texts.iter().map(|t| {
        json!({
            "id": t.id,
            "tokens": t.tokens.iter().map(token).collect::<Vec<_>>(),
            "activations": t.values.json(),
        })
    });
    let statistics = answer.statistics.iter().map(|a| (a.name.clone(), a.json()));
    let failures = answer.failures.iter().map(|f| {
        let why = f.failure.clone().unwrap_or_default();
        json!({ "id": f.id, "text": f.text, "message": why.message, "reason": why.reason, "field": why.field })
    });
    json!({
        "model": header.model,
        "fingerprint": header.fingerprint,
        "generation": header.generation,
        "provider": header.provider,
        "hooks": header.hooks,
        "widths": header.widths,
        "neurons": answer.neurons.iter().map(neuron).collect::<Vec<_>>(),
        "texts": texts.collect::<Vec<_>>(),
        "statistics": statistics.collect::<serde_json::Map<_, _>>(),
        "failures": failures.collect::<Vec<_>>(),
        "summary": summary(&answer.summary),
    })
}

fn neuron(neuron: &pb::RankedNeuron) -> Value {
    let examples = neuron.examples.iter().map(|e| {
        let data = e.activations.as_ref().map(|t| t.data.clone());
        let data = data.unwrap_or_default();
        let numbers = data.as_chunks().0.iter();
        json!({
            "id": e.id, "text": e.text, "position": e.position, "activation": shortest(e.activation),
            "first": e.first,
            "tokens": e.tokens.iter().map(token).collect::<Vec<_>>(),
            "activations": numbers.map(|b| shortest(f32::from_le_bytes(*b))).collect::<Vec<_>>(),
        })
    });
    json!({
        "hook": neuron.hook, "layer": neuron.layer, "index": neuron.index,
        "mean": neuron.mean, "max": shortest(neuron.max), "contrast": neuron.contrast,
        "examples": examples.collect::<Vec<_>>(),
    })
}
