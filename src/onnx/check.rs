//! Rules of the format that the messages must keep, one function a rule. Each answers with what is wrong; the caller
//! knows the place.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    OnnxError,
    attribute::kind,
    node,
    proto::{
        AttributeProto, GraphProto, ModelProto, NodeProto, STRINGS, TensorProto, element_bits,
    },
};

/// Oldest and newest version of the file format that the runtime reads.
const IR_VERSIONS: std::ops::RangeInclusive<i64> = 3..=14;
/// Oldest and newest standard operator set that the runtime has.
const OPSETS: std::ops::RangeInclusive<i64> = 7..=28;
/// Domains whose operators come with the runtime. Others would need a custom-operator library, and none is ever loaded.
const DOMAINS: [&str; 10] = [
    "",
    "ai.onnx.ml",
    "ai.onnx.preview",
    "ai.onnx.preview.training",
    "ai.onnx.training",
    "com.microsoft",
    "com.microsoft.dml",
    "com.microsoft.experimental",
    "com.microsoft.nchwc",
    "com.ms.internal.nhwc",
];
/// Operators that make the runtime load something beside the model.
const LOADERS: [&str; 2] = ["EPContext", "PyOp"];
/// Parts of metadata keys by which a file asks the runtime for a configuration or a library of its own.
const LOADING_KEYS: [&str; 6] = [
    "ort_config",
    "custom_op_lib",
    "custom_ops_lib",
    "ep_context_file",
    "ep_library",
    "provider_path",
];
/// Most axes of a tensor.
const RANK: usize = 64;

/// The standard domain is the empty string, whichever way a file writes it.
pub(super) fn standard(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

/// Version of the file format and versions of the operator sets, by domain.
pub(super) fn versions(model: &ModelProto) -> Result<BTreeMap<String, i64>, OnnxError> {
    if !IR_VERSIONS.contains(&model.ir_version) {
        return Err(OnnxError::invalid(
            "ir_version",
            format!(
                "{} is outside {} to {}; export the model again",
                model.ir_version,
                IR_VERSIONS.start(),
                IR_VERSIONS.end()
            ),
        ));
    }
    let mut opsets = BTreeMap::new();
    for import in &model.opset_import {
        let domain = standard(&import.domain);
        let place = || format!("operator set \"{domain}\"");
        if import.version < 1 || import.version > i64::from(i32::MAX) {
            let why = format!("version {} is impossible", import.version);
            return Err(OnnxError::invalid(place(), why));
        }
        if opsets.insert(domain.to_owned(), import.version).is_some() {
            return Err(OnnxError::invalid(place(), "is imported twice"));
        }
    }
    let Some(&version) = opsets.get("") else {
        let why = "the model does not import the standard operators; export the model again";
        return Err(OnnxError::invalid("operator set", why));
    };
    if !OPSETS.contains(&version) {
        return Err(OnnxError::invalid(
            "operator set",
            format!(
                "version {version} of the standard operators is outside {} to {}; export the model again",
                OPSETS.start(),
                OPSETS.end()
            ),
        ));
    }
    Ok(opsets)
}

/// A file must not ask the runtime for libraries or a configuration of its own.
pub(super) fn metadata(model: &ModelProto) -> Result<(), OnnxError> {
    for entry in &model.metadata_props {
        let key = entry.key.to_ascii_lowercase();
        if LOADING_KEYS.iter().any(|k| key.contains(k)) {
            return Err(OnnxError::invalid(
                format!("metadata \"{}\"", entry.key),
                "asks for a library or a configuration of its own, which is never loaded",
            ));
        }
    }
    Ok(())
}

/// The operator comes with the runtime, as far as its domain tells, and loads nothing itself.
pub(super) fn operator(node: &NodeProto, opsets: &BTreeMap<String, i64>) -> Result<(), String> {
    if node.op_type.is_empty() {
        return Err("names no operator".to_owned());
    }
    let domain = standard(&node.domain);
    if !DOMAINS.contains(&domain) {
        return Err(format!(
            "operators of the domain \"{domain}\" need a custom-operator library, which is never loaded"
        ));
    }
    if !opsets.contains_key(domain) {
        return Err(format!(
            "the model does not import the domain \"{domain}\" of its operator"
        ));
    }
    if LOADERS.contains(&node.op_type.as_str()) {
        return Err("this operator loads code from elsewhere, which is refused".to_owned());
    }
    Ok(())
}

/// Every attribute has a name of its own, says what it carries and carries that alone.
pub(super) fn attributes(attributes: &[AttributeProto]) -> Result<(), String> {
    let mut seen = HashSet::with_capacity(attributes.len());
    for a in attributes {
        let wrong = |why: String| Err(format!("attribute \"{}\" {why}", a.name));
        if a.name.is_empty() {
            return Err("an attribute has no name".to_owned());
        }
        if !seen.insert(&a.name) {
            return wrong("is there twice".to_owned());
        }
        if !a.ref_attr_name.is_empty() {
            return wrong("refers to an attribute of a function, outside of one".to_owned());
        }
        if !(kind::FLOAT..=kind::TYPES).contains(&a.r#type) {
            return wrong(format!("is of the unknown kind {}", a.r#type));
        }
        // Zeros and empty lists are not written, so that absence tells something of single messages only.
        let carried = [
            (kind::FLOAT, a.f != 0.0, false),
            (kind::INT, a.i != 0, false),
            (kind::STRING, !a.s.is_empty(), false),
            (kind::TENSOR, a.t.is_some(), true),
            (kind::GRAPH, a.g.is_some(), true),
            (kind::FLOATS, !a.floats.is_empty(), false),
            (kind::INTS, !a.ints.is_empty(), false),
            (kind::STRINGS, !a.strings.is_empty(), false),
            (kind::TENSORS, !a.tensors.is_empty(), false),
            (kind::GRAPHS, !a.graphs.is_empty(), false),
            (kind::SPARSE_TENSOR, a.sparse_tensor.is_some(), true),
            (kind::SPARSE_TENSORS, !a.sparse_tensors.is_empty(), false),
            (kind::TYPE, a.tp.is_some(), true),
            (kind::TYPES, !a.type_protos.is_empty(), false),
        ];
        for (kind, present, single) in carried {
            if present && kind != a.r#type {
                return wrong(format!(
                    "says that it is of kind {}, and carries kind {kind}",
                    a.r#type
                ));
            }
            if single && !present && kind == a.r#type {
                return wrong(format!(
                    "says that it is of kind {kind}, and carries nothing"
                ));
            }
        }
    }
    Ok(())
}

/// Extents of a tensor, if it can have them.
pub(super) fn dims(t: &TensorProto) -> Result<Vec<usize>, String> {
    let dims: Option<Vec<usize>> = t.dims.iter().map(|d| usize::try_from(*d).ok()).collect();
    dims.filter(|d| d.len() <= RANK)
        .ok_or_else(|| "declares an impossible shape".to_owned())
}

/// Bytes that the elements of a tensor take; `None` for strings.
pub(super) fn data_bytes(t: &TensorProto) -> Result<Option<u128>, String> {
    let elements = dims(t)?
        .iter()
        .fold(1u128, |n, d| n.saturating_mul(*d as u128));
    if t.data_type == STRINGS {
        return Ok(None);
    }
    let bits =
        element_bits(t.data_type).ok_or(format!("is of the unknown type {}", t.data_type))?;
    Ok(Some(elements.saturating_mul(bits).div_ceil(8)))
}

/// The data of a tensor stand in one place in the message, and are as many as its shape says.
pub(super) fn data(t: &TensorProto) -> Result<(), String> {
    let needed = data_bytes(t)?;
    let count = |n: usize| n as u128;
    // Each list, and the bytes that one of its entries stands for in a tensor of this type.
    let wide = matches!(t.data_type, 14 | 15);
    let lists = [
        (count(t.raw_data.len()), 1, needed.is_some()),
        (count(t.float_data.len()), 4, matches!(t.data_type, 1 | 14)),
        (
            count(t.double_data.len()),
            8,
            matches!(t.data_type, 11 | 15),
        ),
        (count(t.int64_data.len()), 8, t.data_type == 7),
        (
            count(t.uint64_data.len()),
            if t.data_type == 12 { 4 } else { 8 },
            matches!(t.data_type, 12 | 13),
        ),
        (
            count(t.int32_data.len()),
            element_bits(t.data_type).map_or(1, |bits| bits.div_ceil(8)),
            !wide && !matches!(t.data_type, 1 | 7 | 8 | 11..=13),
        ),
        (count(t.string_data.len()), 1, needed.is_none()),
    ];
    let mut filled = lists.iter().filter(|(n, _, _)| *n > 0);
    let (given, size, fits) = filled.next().copied().unwrap_or((0, 1, true));
    if filled.next().is_some() {
        return Err("has its data in two places".to_owned());
    }
    if !fits {
        return Err(format!("has data that are not of its type {}", t.data_type));
    }
    let needed = match needed {
        Some(n) => n,
        None => dims(t)?
            .iter()
            .fold(1u128, |n, d| n.saturating_mul(*d as u128)),
    };
    let given = given.saturating_mul(size);
    if given != needed {
        return Err(format!(
            "shape {:?} of type {} needs {needed} bytes, {given} are there",
            t.dims, t.data_type
        ));
    }
    Ok(())
}

/// A subgraph makes each of its values once, and has no cycle.
pub(super) fn subgraph(graph: &GraphProto) -> Result<(), String> {
    let mut given = HashSet::new();
    for input in &graph.input {
        if !given.insert(input.name.as_str()) {
            return Err(format!("\"{}\" is an input twice", input.name));
        }
    }
    given.extend(graph.initializer.iter().map(|t| t.name.as_str()));
    let mut makers = HashMap::new();
    for (at, node) in graph.node.iter().enumerate() {
        for name in node.output.iter().filter(|n| !n.is_empty()) {
            if given.contains(name.as_str()) || makers.insert(name.as_str(), at).is_some() {
                return Err(format!("\"{name}\" is made twice in a subgraph"));
            }
        }
    }
    let mut waits = vec![0usize; graph.node.len()];
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); graph.node.len()];
    for (at, node) in graph.node.iter().enumerate() {
        let outer = node::outer_names(node);
        for name in node.input.iter().map(String::as_str).chain(outer) {
            if let Some(maker) = makers.get(name) {
                waits[at] += 1;
                readers[*maker].push(at);
            }
        }
    }
    let mut ready: Vec<usize> = (0..waits.len()).filter(|at| waits[*at] == 0).collect();
    while let Some(done) = ready.pop() {
        for reader in std::mem::take(&mut readers[done]) {
            waits[reader] -= 1;
            if waits[reader] == 0 {
                ready.push(reader);
            }
        }
    }
    match waits.iter().position(|w| *w > 0) {
        None => Ok(()),
        Some(at) => Err(format!(
            "node \"{}\" of a subgraph is part of a cycle",
            label(&graph.node[at])
        )),
    }
}

/// A label for people: name and operator, or the operator and what it makes.
pub(super) fn label(node: &NodeProto) -> String {
    match (&node.name, node.output.first()) {
        (name, _) if !name.is_empty() => format!("{name} ({})", node.op_type),
        (_, Some(made)) => format!("{} of {made}", node.op_type),
        (_, None) => node.op_type.clone(),
    }
}
