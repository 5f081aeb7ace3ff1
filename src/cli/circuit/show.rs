//! A circuit on the terminal, as a graph for Graphviz, and as files.

use std::{collections::BTreeSet, fmt::Write as _};

use serde_json::{Value, json};

use super::Found;
use crate::{
    cli::{
        attribute::answer,
        capture::json as common,
        files::Contents,
        out::{self, clean},
        picture::grid::{Grid, Scale},
    },
    service::wire::introspect as pb,
};

/// Edges that are listed.
const LISTED: usize = 20;
/// Thinnest and thickest line of a graph.
const LINES: (f64, f64) = (0.5, 5.0);

fn name(found: &Found, node: u32) -> String {
    let node = found.header.nodes.get(node as usize);
    node.map_or_else(String::new, |n| clean(&n.name))
}

/// What is explained, and its values.
fn headline(found: &Found) -> String {
    let header = &found.header;
    let watched = answer::target(header.quantity(), &header.terms);
    format!(
        "{}: {watched}, {:.4} for the input and {:.4} for the source",
        header.model, header.value, header.source_value
    )
}

/// What the circuit does by itself.
fn told(found: &Found) -> String {
    let circuit = &found.circuit;
    let faithful = circuit.faithfulness.map_or(String::new(), |f| {
        format!(": {:.1} % of the way to the source", 100.0 * f)
    });
    format!(
        "{} of {} edges make it {:.4}{faithful}",
        circuit.edges.len(),
        circuit.scored,
        circuit.value
    )
}

/// The edges that were kept.
pub(super) fn page(found: &Found) -> String {
    let edges = &found.circuit.edges;
    let mut text = format!("{}\n\n", out::line(&headline(found)));
    let rows = edges.iter().take(LISTED).map(|edge| {
        vec![
            format!("{} → {}", name(found, edge.from), name(found, edge.to)),
            format!("{:+.4}", edge.score),
        ]
    });
    text.push_str(&out::table(&["edge", "score"], rows));
    if edges.len() > LISTED {
        let _ = writeln!(
            text,
            " ... and {} more; -o FILE.dot draws all",
            edges.len() - LISTED
        );
    }
    let _ = writeln!(text, "\n{}", told(found));
    let timings = found.summary.timings.as_ref();
    let _ = writeln!(
        text,
        "{} rows in {}",
        found.summary.rows,
        out::seconds(timings.map_or(0.0, |t| t.total_seconds))
    );
    text
}

/// The circuit in the language of Graphviz: red for what speaks for the number, blue against, thicker for more.
pub(super) fn dot(found: &Found) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let edges = &found.circuit.edges;
    let most = edges
        .iter()
        .map(|e| e.score.abs())
        .fold(f64::MIN_POSITIVE, f64::max);
    let mut text = format!(
        "// {}\n// {}\ndigraph circuit {{\n  rankdir=BT;\n  node [shape=box, style=rounded];\n",
        out::line(&headline(found)),
        told(found)
    );
    let nodes: BTreeSet<u32> = edges.iter().flat_map(|e| [e.from, e.to]).collect();
    for node in nodes {
        let _ = writeln!(text, "  {};", quoted(&name(found, node)));
    }
    for edge in edges {
        let colour = if edge.score < 0.0 {
            "#4393c3"
        } else {
            "#d6604d"
        };
        let width = LINES.0 + (LINES.1 - LINES.0) * edge.score.abs() / most;
        let _ = writeln!(
            text,
            "  {} -> {} [color=\"{colour}\", penwidth={width:.2}, tooltip=\"{:+.4}\"];",
            quoted(&name(found, edge.from)),
            quoted(&name(found, edge.to)),
            edge.score
        );
    }
    text.push_str("}\n");
    text
}

/// Everything.
pub(super) fn json(found: &Found) -> Value {
    let header = &found.header;
    let node = |n: &pb::CircuitNode| json!({ "name": n.name, "layer": n.layer, "head": n.head });
    let edges =
        found.circuit.edges.iter().map(
            |e| json!({ "from": name(found, e.from), "to": name(found, e.to), "score": e.score }),
        );
    json!({
        "model": header.model,
        "fingerprint": header.fingerprint,
        "tokens": header.tokens.iter().map(common::token).collect::<Vec<_>>(),
        "explained": answer::target(header.quantity(), &header.terms),
        "value": header.value,
        "source_value": header.source_value,
        "nodes": header.nodes.iter().map(node).collect::<Vec<_>>(),
        "edges": edges.collect::<Vec<_>>(),
        "scored": found.circuit.scored,
        "circuit_value": found.circuit.value,
        "faithfulness": found.circuit.faithfulness,
        "summary": common::summary(&found.summary),
    })
}

/// Everything, as files: the scores of all edges as a heat map.
pub(super) fn contents(found: &Found) -> Contents {
    let names = || found.header.nodes.iter().map(|n| clean(&n.name)).collect();
    let matrix = found.scores.as_ref().and_then(|s| s.matrix());
    let grid = matrix.map(|values| Grid {
        title: "edges: rows write, columns read".to_owned(),
        facts: told(found),
        rows: names(),
        columns: names(),
        values: values.to_owned(),
        scale: Scale::Signed,
    });
    let arrays = found.scores.iter();
    Contents {
        json: json(found),
        arrays: arrays.map(|a| (a.name.clone(), a.values.clone())).collect(),
        title: headline(found),
        grids: grid.into_iter().collect(),
    }
}
