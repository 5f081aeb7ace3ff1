//! Inlines the functions that a model carries, so that everything after sees operators only.
//!
//! Each call becomes a copy of the body with its inner names prefixed. Recursion is refused, and the number of nodes is
//! bounded while expanding (a chain of functions that call each other twice doubles at each step).

use std::collections::HashMap;

use super::{
    Limits, OnnxError,
    proto::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto},
};

/// Replaces every call in the graph and its subgraphs; the model keeps no functions.
pub(super) fn inline(model: &mut ModelProto, limits: &Limits) -> Result<(), OnnxError> {
    let functions = std::mem::take(&mut model.functions);
    if functions.is_empty() {
        return Ok(());
    }
    let mut library = HashMap::new();
    for f in &functions {
        if library
            .insert(key(&f.domain, &f.name, &f.overload), f)
            .is_some()
        {
            return Err(OnnxError::invalid(
                format!("function \"{}\"", f.name),
                "is defined twice",
            ));
        }
    }
    for import in functions.iter().flat_map(|f| &f.opset_import) {
        let same = |d: &str| d == import.domain || (is_standard(d) && is_standard(&import.domain));
        match model.opset_import.iter().find(|o| same(&o.domain)) {
            None => model.opset_import.push(import.clone()),
            Some(have) if have.version == import.version => {}
            Some(have) => {
                return Err(OnnxError::invalid(
                    format!("operator set \"{}\"", import.domain),
                    format!(
                        "a function wants version {}, the model version {}",
                        import.version, have.version
                    ),
                ));
            }
        }
    }
    let mut expansion = Expansion {
        library,
        calls: 0,
        nodes: 0,
        limit: limits.nodes,
        open: Vec::new(),
    };
    if let Some(graph) = &mut model.graph {
        expansion.graph(graph)?;
    }
    Ok(())
}

fn is_standard(domain: &str) -> bool {
    domain.is_empty() || domain == "ai.onnx"
}

fn key(domain: &str, name: &str, overload: &str) -> (String, String, String) {
    (domain.to_owned(), name.to_owned(), overload.to_owned())
}

struct Expansion<'a> {
    library: HashMap<(String, String, String), &'a FunctionProto>,
    calls: u64,
    nodes: u64,
    limit: u64,
    /// Functions that are being expanded, outermost first.
    open: Vec<(String, String, String)>,
}

impl Expansion<'_> {
    fn graph(&mut self, graph: &mut GraphProto) -> Result<(), OnnxError> {
        let nodes = std::mem::take(&mut graph.node);
        graph.node = self.nodes(nodes)?;
        Ok(())
    }

    fn nodes(&mut self, nodes: Vec<NodeProto>) -> Result<Vec<NodeProto>, OnnxError> {
        let mut out = Vec::with_capacity(nodes.len());
        for mut node in nodes {
            for a in &mut node.attribute {
                for graph in a.g.iter_mut().chain(&mut a.graphs) {
                    self.graph(graph)?;
                }
            }
            let called = key(&node.domain, &node.op_type, &node.overload);
            if let Some(function) = self.library.get(&called).copied() {
                if self.open.contains(&called) {
                    return Err(OnnxError::invalid(
                        format!("function \"{}\"", function.name),
                        "calls itself",
                    ));
                }
                let body = self.body(&node, function)?;
                self.open.push(called);
                out.extend(self.nodes(body)?);
                self.open.pop();
            } else {
                self.nodes += 1;
                if self.nodes > self.limit {
                    return Err(OnnxError::Limit {
                        what: "the number of nodes after inlining functions",
                        limit: self.limit,
                    });
                }
                out.push(node);
            }
        }
        Ok(out)
    }

    /// The body of a function with the call's names and attributes put in.
    fn body(
        &mut self,
        call: &NodeProto,
        function: &FunctionProto,
    ) -> Result<Vec<NodeProto>, OnnxError> {
        self.calls += 1;
        let mut names: HashMap<&str, String> = HashMap::new();
        for (at, formal) in function.input.iter().enumerate() {
            names.insert(formal, call.input.get(at).cloned().unwrap_or_default());
        }
        for (formal, actual) in function.output.iter().zip(&call.output) {
            if !actual.is_empty() && names.insert(formal, actual.clone()).is_some() {
                return Err(OnnxError::invalid(
                    format!("function \"{}\"", function.name),
                    "returns one of its inputs unchanged, which is not supported",
                ));
            }
        }
        let rename = Rename {
            names,
            prefix: format!("{}#{}/", function.name, self.calls),
        };
        let attributes: HashMap<&str, &AttributeProto> = function
            .attribute_proto
            .iter()
            .chain(&call.attribute)
            .map(|a| (a.name.as_str(), a))
            .collect();
        Ok(function
            .node
            .iter()
            .map(|n| {
                let mut n = n.clone();
                rename.node(&mut n);
                fill(&mut n.attribute, &attributes);
                n
            })
            .collect())
    }
}

struct Rename<'a> {
    names: HashMap<&'a str, String>,
    prefix: String,
}

impl Rename<'_> {
    fn name(&self, name: &mut String) {
        if name.is_empty() {
            return;
        }
        *name = match self.names.get(name.as_str()) {
            Some(actual) => actual.clone(),
            None => format!("{}{name}", self.prefix),
        };
    }

    fn node(&self, node: &mut NodeProto) {
        node.input.iter_mut().for_each(|n| self.name(n));
        node.output.iter_mut().for_each(|n| self.name(n));
        node.name = format!("{}{}", self.prefix, node.name);
        for a in &mut node.attribute {
            for graph in a.g.iter_mut().chain(&mut a.graphs) {
                self.graph(graph);
            }
        }
    }

    fn graph(&self, graph: &mut GraphProto) {
        graph.node.iter_mut().for_each(|n| self.node(n));
        let ports = graph.input.iter_mut().chain(&mut graph.output);
        ports.for_each(|p| self.name(&mut p.name));
        graph
            .initializer
            .iter_mut()
            .for_each(|t| self.name(&mut t.name));
    }
}

/// Puts the call's attributes where the body refers to them; a reference to an attribute that is not given falls away.
fn fill(attributes: &mut Vec<AttributeProto>, given: &HashMap<&str, &AttributeProto>) {
    attributes.retain_mut(|a| {
        for graph in a.g.iter_mut().chain(&mut a.graphs) {
            for node in &mut graph.node {
                fill(&mut node.attribute, given);
            }
        }
        if a.ref_attr_name.is_empty() {
            return true;
        }
        let Some(actual) = given.get(a.ref_attr_name.as_str()) else {
            return false;
        };
        let name = std::mem::take(&mut a.name);
        *a = (*actual).clone();
        a.name = name;
        true
    });
}
