//! The graph as text, a line per node, for `introspectd inspect --graph`.

use std::fmt::{self, Write as _};

use super::{
    attribute::{Attribute, Payload},
    constant,
    error::shown,
    graph::{Dim, Graph, Port, ValueId},
    node::Node,
};

/// Most numbers of an attribute that are written out.
const LISTED: usize = 8;

impl Graph {
    /// One line per input, weight, node and output: `%result = Operator(%a, %b) {attribute=value}`.
    pub fn dump(&self) -> String {
        let mut out = String::new();
        self.write(&mut out).expect("writing to a string succeeds");
        out
    }

    fn write(&self, out: &mut String) -> fmt::Result {
        writeln!(out, "graph \"{}\"", shown(&self.name))?;
        for port in self.inputs() {
            writeln!(out, "input  {}", self.port(port))?;
        }
        let mut weights: Vec<_> = self.initializers().collect();
        weights.sort_by_key(|(name, _)| *name);
        for (name, weight) in weights {
            let name = shown(name);
            match weight.dtype() {
                Some(dtype) => writeln!(out, "weight %{name}: {dtype}{:?}", weight.dims)?,
                None => writeln!(
                    out,
                    "weight %{name}: type {}{:?}",
                    weight.element, weight.dims
                )?,
            }
        }
        for value in self.sparse.keys() {
            writeln!(out, "weight {}: sparse", self.reference(Some(*value)))?;
        }
        for (_, node) in self.nodes() {
            writeln!(out, "{}", self.line(node))?;
        }
        for port in self.outputs() {
            writeln!(out, "output {}", self.port(port))?;
        }
        Ok(())
    }

    fn line(&self, node: &Node) -> String {
        let list = |values: &[Option<ValueId>]| {
            let shown = values.iter().map(|v| self.reference(*v));
            shown.collect::<Vec<_>>().join(", ")
        };
        let domain = match node.domain.as_str() {
            "" => String::new(),
            domain => format!("{}::", shown(domain)),
        };
        let mut line = format!(
            "{} = {domain}{}({})",
            list(&node.outputs),
            shown(&node.op),
            list(&node.inputs)
        );
        if !node.attributes().is_empty() {
            let pair = |a: &Attribute| format!("{}={}", shown(&a.name), attribute(a));
            let pairs: Vec<String> = node.attributes().iter().map(pair).collect();
            line += &format!(" {{{}}}", pairs.join(", "));
        }
        line
    }

    fn reference(&self, value: Option<ValueId>) -> String {
        value.map_or_else(|| "_".to_owned(), |v| format!("%{}", shown(self.name(v))))
    }

    fn port(&self, port: &Port) -> String {
        let dtype = port.dtype().map_or("?", crate::tensor::DType::name);
        let dim = |d: &Dim| match d {
            Dim::Fixed(n) => n.to_string(),
            Dim::Named(s) => shown(s),
            Dim::Unknown => "?".to_owned(),
        };
        let dims = match port.dims() {
            None => "..".to_owned(),
            Some(dims) => dims.iter().map(dim).collect::<Vec<_>>().join(", "),
        };
        format!("{}: {dtype}[{dims}]", self.reference(Some(port.value)))
    }
}

fn attribute(a: &Attribute) -> String {
    match &a.payload {
        Payload::Float(v) => v.to_string(),
        Payload::Int(v) => v.to_string(),
        Payload::String(v) => format!("\"{}\"", shown(&String::from_utf8_lossy(v))),
        Payload::Floats(v) => list(v),
        Payload::Ints(v) => list(v),
        Payload::Tensor(t) if t.elements() > LISTED => format!("{}{:?}", t.dtype(), t.shape()),
        Payload::Tensor(t) => match (constant::ints(t), t.to_f32()) {
            (Some(v), _) => list(&v),
            (None, Ok(v)) => list(&v),
            (None, Err(_)) => format!("{}{:?}", t.dtype(), t.shape()),
        },
        Payload::Other(_) if a.graphs().next().is_some() => "graph".to_owned(),
        Payload::Other(_) => "…".to_owned(),
    }
}

fn list<T: ToString>(values: &[T]) -> String {
    let mut shown: Vec<String> = values.iter().take(LISTED).map(T::to_string).collect();
    if values.len() > LISTED {
        shown.push(format!("… {} in all", values.len()));
    }
    format!("[{}]", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::build::{diamond, model, read};

    #[test]
    fn a_diamond_reads_from_top_to_bottom() {
        assert_eq!(
            diamond().graph.dump(),
            "graph \"test\"\n\
             input  %x: f32[..]\n\
             %a = Relu(%x)\n\
             %b = Tanh(%x)\n\
             %y = Add(%a, %b)\n\
             output %y: f32[..]\n"
        );
    }

    #[test]
    fn a_name_with_a_line_break_stays_on_its_line() {
        let mut m = model(&["x"], "y = Relu x", &["y"]);
        m.graph.as_mut().unwrap().name = "a\nb".to_owned();
        let dump = read(&m).unwrap().graph.dump();
        assert!(dump.starts_with("graph \"a\\u{a}b\"\n"), "{dump}");
    }
}
