//! The graph as text, a line per node, for `introspectd inspect --graph`.

use std::fmt::Write as _;

use super::graph::{Dim, Graph, Port, ValueId};

impl Graph {
    /// One line per input, weight, node and output: `%result = Operator(%a, %b) {attribute=value}`.
    pub fn dump(&self) -> String {
        let mut out = format!("graph \"{}\"\n", self.name);
        for port in self.inputs() {
            let _ = writeln!(out, "input  {}", self.port(port));
        }
        let mut weights: Vec<_> = self.initializers().collect();
        weights.sort_by_key(|(name, _)| *name);
        for (name, weight) in weights {
            let dtype = weight
                .dtype()
                .map_or_else(|| format!("type {}", weight.element), |d| d.to_string());
            let _ = writeln!(out, "weight %{name}: {dtype}{:?}", weight.dims());
        }
        for (_, node) in self.nodes() {
            let list = |values: &[Option<ValueId>]| {
                let shown: Vec<String> = values
                    .iter()
                    .map(|v| v.map_or_else(|| "_".to_owned(), |v| format!("%{}", self.name(v))))
                    .collect();
                shown.join(", ")
            };
            let domain = if node.domain.is_empty() {
                String::new()
            } else {
                format!("{}::", node.domain)
            };
            let _ = write!(
                out,
                "{} = {domain}{}({})",
                list(&node.outputs),
                node.op,
                list(&node.inputs)
            );
            let attributes: Vec<String> = node
                .attributes
                .iter()
                .map(|a| format!("{}={}", a.name, attribute(a)))
                .collect();
            if !attributes.is_empty() {
                let _ = write!(out, " {{{}}}", attributes.join(", "));
            }
            out.push('\n');
        }
        for port in self.outputs() {
            let _ = writeln!(out, "output {}", self.port(port));
        }
        out
    }

    fn port(&self, port: &Port) -> String {
        let dtype = port.dtype().map_or("?", crate::tensor::DType::name);
        let dims = port.dims().map_or_else(
            || "[..]".to_owned(),
            |dims| {
                let shown: Vec<String> = dims
                    .iter()
                    .map(|d| match d {
                        Dim::Fixed(n) => n.to_string(),
                        Dim::Named(s) => s.clone(),
                        Dim::Unknown => "?".to_owned(),
                    })
                    .collect();
                format!("[{}]", shown.join(", "))
            },
        );
        format!("%{}: {dtype}{dims}", self.name(port.value))
    }
}

fn attribute(a: &super::proto::AttributeProto) -> String {
    match a.r#type {
        1 => a.f.to_string(),
        2 => a.i.to_string(),
        3 => format!("{:?}", String::from_utf8_lossy(&a.s)),
        4 => a.t.as_ref().map_or_else(
            || "tensor".to_owned(),
            |t| {
                super::constant::tensor(t)
                    .filter(|t| t.elements() <= 4)
                    .and_then(|t| t.to_f32().ok().map(|v| format!("{v:?}")))
                    .unwrap_or_else(|| format!("tensor{:?}", t.dims))
            },
        ),
        6 => format!("{:?}", a.floats),
        7 => format!("{:?}", a.ints),
        5 | 10 => "graph".to_owned(),
        _ => "…".to_owned(),
    }
}
