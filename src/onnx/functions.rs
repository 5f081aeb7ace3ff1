//! Inlines the functions that a model carries, so that everything after sees operators only.
//!
//! Each call becomes a copy of the body with its inner names prefixed. Recursion is refused. A chain of functions that call each
//! other twice doubles at each step, so nodes, depth and the memory of the copies are bounded while expanding.
//!
//! Left out: declared types of values inside functions, and functions written for another operator set than the model's.

use std::collections::HashMap;

use prost::Message as _;

use super::{
    Limits, OnnxError,
    check::{label, standard},
    proto::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto},
};

/// Memory of decoded messages as a multiple of their encoded size, about what nodes with short names take.
const DECODED: u64 = 16;
/// Most characters of a function's name that its inlined names begin with.
const PREFIX: usize = 64;

/// Replaces every call in the graph and its subgraphs; the model keeps no functions.
pub(super) fn inline(model: &mut ModelProto, limits: &Limits) -> Result<(), OnnxError> {
    let functions = std::mem::take(&mut model.functions);
    let Some(graph) = model.graph.as_mut().filter(|_| !functions.is_empty()) else {
        return Ok(());
    };
    let mut versions: HashMap<String, i64> = HashMap::new();
    for import in &model.opset_import {
        versions.insert(standard(&import.domain).to_owned(), import.version);
    }
    let mut library = HashMap::new();
    for f in &functions {
        let size = (f.encoded_len() as u64).saturating_mul(DECODED);
        let key = (standard(&f.domain), f.name.as_str(), f.overload.as_str());
        if library.insert(key, (f, size)).is_some() {
            let place = format!("function \"{}\"", f.name);
            return Err(OnnxError::invalid(place, "is defined twice"));
        }
    }
    let mut expansion = Expansion {
        library,
        versions,
        limits,
        marker: unused_marker(graph),
        calls: 0,
        nodes: 0,
        bytes: 0,
        open: Vec::new(),
    };
    expansion.graph(graph, 0)?;
    // Domains that a function brought in and its operators need.
    let versions = std::mem::take(&mut expansion.versions);
    for (domain, version) in versions {
        let known = |o: &super::proto::OperatorSetIdProto| standard(&o.domain) == domain;
        if !model.opset_import.iter().any(known) {
            model
                .opset_import
                .push(super::proto::OperatorSetIdProto { domain, version });
        }
    }
    Ok(())
}

/// A run of `#` that no name of the graph holds. With the number of the call behind it, it begins the names of that call, so
/// that inlined names are new and differ between calls.
fn unused_marker(graph: &GraphProto) -> String {
    fn longest(graph: &GraphProto) -> usize {
        let run = |name: &str| {
            let runs = name.split(|c| c != '#').map(str::len);
            runs.max().unwrap_or(0)
        };
        let ports = graph.input.iter().chain(&graph.output);
        let tensors = graph.initializer.iter().map(|t| run(&t.name));
        let own = ports.map(|p| run(&p.name)).chain(tensors);
        let nodes = graph.node.iter().flat_map(|n| {
            let names = n.input.iter().chain(&n.output).map(|s| run(s));
            let inner = n.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs));
            names.chain(inner.map(longest)).collect::<Vec<_>>()
        });
        own.chain(nodes).max().unwrap_or(0)
    }
    "#".repeat(longest(graph) + 1)
}

/// Domain, name and overload.
type Key<'a> = (&'a str, &'a str, &'a str);

struct Expansion<'a> {
    /// Each function with the memory that a copy of it takes.
    library: HashMap<Key<'a>, (&'a FunctionProto, u64)>,
    /// Versions of the operator sets, by domain.
    versions: HashMap<String, i64>,
    limits: &'a Limits,
    marker: String,
    calls: u64,
    nodes: u64,
    bytes: u64,
    /// Functions that are being expanded, outermost first.
    open: Vec<&'a FunctionProto>,
}

impl<'a> Expansion<'a> {
    fn graph(&mut self, graph: &mut GraphProto, level: u32) -> Result<(), OnnxError> {
        if level > self.limits.levels() {
            return Err(OnnxError::Limit {
                what: "the nesting of subgraphs and functions",
                limit: u64::from(self.limits.levels()),
            });
        }
        let nodes = std::mem::take(&mut graph.node);
        graph.node = self.nodes(nodes, level)?;
        Ok(())
    }

    fn nodes(&mut self, nodes: Vec<NodeProto>, level: u32) -> Result<Vec<NodeProto>, OnnxError> {
        let mut out = Vec::with_capacity(nodes.len());
        for mut node in nodes {
            for a in &mut node.attribute {
                for graph in a.g.iter_mut().chain(&mut a.graphs) {
                    self.graph(graph, level + 1)?;
                }
            }
            let key = (
                standard(&node.domain),
                node.op_type.as_str(),
                node.overload.as_str(),
            );
            if let Some((function, size)) = self.library.get(&key).copied() {
                let body = self.call(&node, function, size)?;
                self.open.push(function);
                out.extend(self.nodes(body, level)?);
                self.open.pop();
            } else {
                self.nodes += 1;
                if self.nodes > self.limits.nodes {
                    return Err(OnnxError::Limit {
                        what: "the number of nodes after inlining functions",
                        limit: self.limits.nodes,
                    });
                }
                out.push(node);
            }
        }
        Ok(out)
    }

    /// Checks a call against the bounds, and gives the body of the function with the call's names and attributes in it.
    fn call(
        &mut self,
        call: &NodeProto,
        function: &'a FunctionProto,
        size: u64,
    ) -> Result<Vec<NodeProto>, OnnxError> {
        let invalid = |why: String| {
            let place = format!(
                "function \"{}\" called by node \"{}\"",
                function.name,
                label(call)
            );
            OnnxError::invalid(place, why)
        };
        if self.open.iter().any(|f| std::ptr::eq(*f, function)) {
            return Err(invalid("calls itself".to_owned()));
        }
        if self.open.len() as u32 >= self.limits.levels() {
            return Err(OnnxError::Limit {
                what: "the nesting of subgraphs and functions",
                limit: u64::from(self.limits.levels()),
            });
        }
        if call.input.len() > function.input.len() || call.output.len() > function.output.len() {
            return Err(invalid("is given more names than it has".to_owned()));
        }
        // Every reference to an attribute of the call copies it.
        let given = (call.encoded_len() as u64).saturating_mul(DECODED);
        let copies = references(&function.node).saturating_add(1);
        let cost = size.saturating_add(given.saturating_mul(copies));
        self.bytes = self.bytes.saturating_add(cost);
        if self.bytes > self.limits.decoded_bytes {
            return Err(OnnxError::Limit {
                what: "the memory of inlined functions",
                limit: self.limits.decoded_bytes,
            });
        }
        for import in &function.opset_import {
            let domain = standard(&import.domain);
            let have = *self
                .versions
                .entry(domain.to_owned())
                .or_insert(import.version);
            if have != import.version {
                return Err(invalid(format!(
                    "is written for version {} of the operator set \"{domain}\", the model for {have}",
                    import.version
                )));
            }
        }
        self.calls += 1;
        let short: String = function.name.chars().take(PREFIX).collect();
        body(
            call,
            function,
            format!("{}{}/{short}/", self.marker, self.calls),
        )
        .map_err(invalid)
    }
}

/// Places in a function where an attribute of the call is put in.
fn references(nodes: &[NodeProto]) -> u64 {
    let attributes = nodes.iter().flat_map(|n| &n.attribute);
    attributes
        .map(|a| {
            let inner = a.g.iter().chain(&a.graphs).map(|g| references(&g.node));
            u64::from(!a.ref_attr_name.is_empty()) + inner.sum::<u64>()
        })
        .sum()
}

fn body(
    call: &NodeProto,
    function: &FunctionProto,
    prefix: String,
) -> Result<Vec<NodeProto>, String> {
    let mut names: HashMap<&str, String> = HashMap::new();
    for (at, formal) in function.input.iter().enumerate() {
        let actual = call.input.get(at).cloned().unwrap_or_default();
        if names.insert(formal, actual).is_some() {
            return Err(format!("has the input \"{formal}\" twice"));
        }
    }
    // What is returned as it came in, or returned twice, needs a node of its own.
    let mut passed = Vec::new();
    for (formal, actual) in function.output.iter().zip(&call.output) {
        if actual.is_empty() {
            continue;
        }
        match names.get(formal.as_str()) {
            None => {
                names.insert(formal, actual.clone());
            }
            Some(known) if known.is_empty() => {
                return Err(format!("returns \"{formal}\", which the call leaves out"));
            }
            Some(known) => passed.push(NodeProto {
                op_type: "Identity".to_owned(),
                name: format!("{prefix}{formal}"),
                input: vec![known.clone()],
                output: vec![actual.clone()],
                ..NodeProto::default()
            }),
        }
    }
    let attributes: HashMap<&str, &AttributeProto> = function
        .attribute_proto
        .iter()
        .chain(&call.attribute)
        .map(|a| (a.name.as_str(), a))
        .collect();
    let rename = Rename { names, prefix };
    let copies = function.node.iter().map(|n| {
        let mut n = n.clone();
        rename.node(&mut n);
        fill(&mut n.attribute, &attributes);
        n
    });
    Ok(copies.chain(passed).collect())
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
        let sparse = |s: &mut SparseTensorProto| {
            if let Some(values) = &mut s.values {
                self.name(&mut values.name);
            }
        };
        graph.sparse_initializer.iter_mut().for_each(sparse);
        let weights = graph.initializer.iter_mut();
        weights.for_each(|t| self.name(&mut t.name));
        graph.value_info = Vec::new();
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
