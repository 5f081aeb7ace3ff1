//! From bytes to a model: scan, decode, inline, check, build.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::{
    Folder, Limits, OnnxError, constant, functions,
    graph::{Data, Dim, Graph, Initializer, Origin, Port, TypeFact},
    limits,
    node::{self, Node},
    proto::{
        GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, dtype_of,
        tensor_shape_proto::dimension, type_proto,
    },
};
use crate::tensor::byte_len;

/// Oldest and newest IR version that the runtime reads.
const IR_VERSIONS: std::ops::RangeInclusive<i64> = 3..=13;
/// Oldest and newest standard operator set.
const OPSETS: std::ops::RangeInclusive<i64> = 7..=26;

/// A model file, read.
#[derive(Clone, Debug)]
pub struct Model {
    /// The graph, its functions inlined.
    pub graph: Graph,
    /// Version of the file format.
    pub ir_version: i64,
    /// Operator set versions by domain; the standard domain is the empty string.
    pub opsets: BTreeMap<String, i64>,
    /// Program that made the file.
    pub producer: String,
    /// Free properties of the file.
    pub metadata: BTreeMap<String, String>,
    fingerprint: [u8; 32],
}

impl Model {
    /// Reads `file` of a folder. Weights stay in the mapped files.
    pub fn open(folder: &Folder, file: &str, limits: &Limits) -> Result<Model, OnnxError> {
        let bytes = folder.map(file, limits.file_bytes)?;
        read(bytes, Some((folder, file)), limits)
    }

    /// Reads a model from memory. It can have no external data, since there is no folder.
    pub fn parse(bytes: Bytes, limits: &Limits) -> Result<Model, OnnxError> {
        read(bytes, None, limits)
    }

    /// Version of the standard operator set.
    pub fn opset(&self) -> i64 {
        self.opsets.get("").copied().unwrap_or(0)
    }

    /// The same model with another graph. The fingerprint stays that of the file.
    pub fn with_graph(&self, graph: Graph) -> Model {
        Model {
            graph,
            ..self.clone()
        }
    }

    /// SHA-256 over the model file and the external data that it uses.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

fn read(bytes: Bytes, place: Option<(&Folder, &str)>, limits: &Limits) -> Result<Model, OnnxError> {
    limits::scan(&bytes, limits)?;
    let mut proto = ModelProto::decode(bytes.clone())
        .map_err(|e| OnnxError::Malformed(e.to_string().chars().take(200).collect()))?;
    if !IR_VERSIONS.contains(&proto.ir_version) {
        return Err(OnnxError::invalid(
            "ir_version",
            format!(
                "{} is outside {} to {}",
                proto.ir_version,
                IR_VERSIONS.start(),
                IR_VERSIONS.end()
            ),
        ));
    }
    functions::inline(&mut proto, limits)?;
    let opsets = opsets(&proto)?;
    let graph = proto
        .graph
        .take()
        .ok_or_else(|| OnnxError::Malformed("it has no graph".to_owned()))?;
    let mut weights = WeightFiles {
        model: bytes.clone(),
        place,
        limits,
        files: HashMap::new(),
        total: 0,
    };
    let graph = build(graph, &mut weights)?;
    let fingerprint = weights.fingerprint();
    Ok(Model {
        graph,
        ir_version: proto.ir_version,
        opsets,
        producer: format!("{} {}", proto.producer_name, proto.producer_version)
            .trim()
            .to_owned(),
        metadata: proto
            .metadata_props
            .into_iter()
            .map(|p| (p.key, p.value))
            .collect(),
        fingerprint,
    })
}

fn opsets(proto: &ModelProto) -> Result<BTreeMap<String, i64>, OnnxError> {
    let mut opsets = BTreeMap::new();
    for import in &proto.opset_import {
        let domain = standard(&import.domain);
        if opsets.insert(domain.to_owned(), import.version).is_some() {
            return Err(OnnxError::invalid(
                format!("operator set \"{domain}\""),
                "is imported twice",
            ));
        }
    }
    let version = opsets.get("").copied().unwrap_or(0);
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

fn standard(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

fn build(proto: GraphProto, weights: &mut WeightFiles<'_>) -> Result<Graph, OnnxError> {
    let mut graph = Graph::empty(proto.name);
    for input in &proto.input {
        let value = graph.intern(named(&input.name, "an input")?);
        graph.inputs.push(Port {
            value,
            fact: tensor_fact(input)?,
        });
    }
    for t in proto.initializer {
        let value = graph.intern(named(&t.name, "a weight")?);
        let weight = weights.initializer(t)?;
        if graph.initializers.insert(value, Arc::new(weight)).is_some() {
            return Err(OnnxError::invalid(
                format!("weight \"{}\"", graph.name(value)),
                "is there twice",
            ));
        }
    }
    for s in proto.sparse_initializer {
        let values = s.values.as_ref();
        let name = named(values.map_or("", |v| &v.name), "a sparse weight")?.to_owned();
        for t in s.values.iter().chain(&s.indices) {
            weights.confine(t)?;
        }
        graph.intern(&name);
        graph.sparse.push(Arc::new(s));
    }
    for n in proto.node {
        let node = read_node(&mut graph, n, weights)?;
        graph.nodes.push(Some(Arc::new(node)));
    }
    for output in &proto.output {
        let value = graph.intern(named(&output.name, "an output")?);
        if graph.is_output(value) {
            return Err(OnnxError::invalid(
                format!("output \"{}\"", output.name),
                "is there twice",
            ));
        }
        graph.outputs.push(Port {
            value,
            fact: tensor_fact(output)?,
        });
    }
    for info in &proto.value_info {
        if let (Some(value), Some(fact)) = (graph.value(&info.name), tensor_fact(info)?) {
            graph.declared.insert(value, fact);
        }
    }
    for port in graph
        .inputs
        .clone()
        .into_iter()
        .chain(graph.outputs.clone())
    {
        if let Some(fact) = port.fact {
            graph.declared.insert(port.value, fact);
        }
    }
    graph.finish()
}

fn named<'a>(name: &'a str, what: &str) -> Result<&'a str, OnnxError> {
    if name.is_empty() {
        return Err(OnnxError::invalid("graph", format!("{what} has no name")));
    }
    Ok(name)
}

fn read_node(
    graph: &mut Graph,
    proto: NodeProto,
    weights: &mut WeightFiles<'_>,
) -> Result<Node, OnnxError> {
    if proto.op_type.is_empty() {
        return Err(OnnxError::invalid(
            format!("node \"{}\"", proto.name),
            "names no operator",
        ));
    }
    weights.confine_attributes(&proto)?;
    let mut list = |names: &[String]| -> Vec<Option<super::ValueId>> {
        names
            .iter()
            .map(|n| (!n.is_empty()).then(|| graph.intern(n)))
            .collect()
    };
    let (inputs, outputs) = (list(&proto.input), list(&proto.output));
    let implicit = node::outer_names(&proto)
        .into_iter()
        .map(|n| graph.intern(n))
        .collect();
    let mut seen = std::collections::HashSet::new();
    if let Some(twice) = proto.attribute.iter().find(|a| !seen.insert(&a.name)) {
        return Err(OnnxError::invalid(
            format!("node \"{}\"", proto.name),
            format!("attribute \"{}\" is there twice", twice.name),
        ));
    }
    Ok(Node {
        op: proto.op_type,
        domain: standard(&proto.domain).to_owned(),
        name: proto.name,
        inputs,
        outputs,
        implicit,
        attributes: proto.attribute,
    })
}

fn tensor_fact(info: &ValueInfoProto) -> Result<Option<TypeFact>, OnnxError> {
    let Some(TypeProto {
        value: Some(type_proto::Value::TensorType(t)),
        ..
    }) = &info.r#type
    else {
        return Ok(None);
    };
    let dims = t.shape.as_ref().map(|shape| {
        shape
            .dim
            .iter()
            .map(|d| match &d.value {
                Some(dimension::Value::DimValue(n)) => Dim::Fixed(*n),
                Some(dimension::Value::DimParam(s)) if !s.is_empty() => Dim::Named(s.clone()),
                Some(dimension::Value::DimParam(_)) | None => Dim::Unknown,
            })
            .collect::<Vec<_>>()
    });
    if let Some(dims) = &dims {
        let bad = dims.len() > 64
            || dims
                .iter()
                .any(|d| matches!(d, Dim::Fixed(n) if *n < 0 || *n > 1 << 40));
        if bad {
            return Err(OnnxError::invalid(
                format!("value \"{}\"", info.name),
                "declares an impossible shape",
            ));
        }
    }
    Ok(Some(TypeFact {
        element: t.elem_type,
        dtype: dtype_of(t.elem_type),
        dims,
    }))
}

/// The files that weights come from: each opened once, and hashed through the descriptor that is used.
struct WeightFiles<'a> {
    model: Bytes,
    place: Option<(&'a Folder, &'a str)>,
    limits: &'a Limits,
    files: HashMap<Arc<str>, Bytes>,
    total: u64,
}

impl WeightFiles<'_> {
    fn initializer(&mut self, t: TensorProto) -> Result<Initializer, OnnxError> {
        let place = || format!("weight \"{}\"", t.name);
        let dims = constant::dims(&t.dims)
            .filter(|d| d.len() <= 64)
            .ok_or_else(|| OnnxError::invalid(place(), "declares an impossible shape"))?;
        let external = self.external(&t)?;
        let Some(dtype) = dtype_of(t.data_type) else {
            // Strings, complex numbers and packed kinds: passed on, never read here.
            if external.is_some() {
                return Err(OnnxError::invalid(
                    place(),
                    format!("element type {} cannot stand in a file", t.data_type),
                ));
            }
            return Ok(Initializer {
                element: t.data_type,
                dims,
                data: Data::Opaque(Arc::new(t)),
            });
        };
        let needed = byte_len(dtype, &dims);
        self.total = self
            .total
            .saturating_add(u64::try_from(needed).unwrap_or(u64::MAX));
        if self.total > self.limits.weight_bytes {
            return Err(OnnxError::Limit {
                what: "the bytes of all weights",
                limit: self.limits.weight_bytes,
            });
        }
        let (bytes, origin) = match external {
            Some((bytes, origin)) => (bytes, Some(origin)),
            None if !t.raw_data.is_empty() => (t.raw_data.clone(), self.inside_model(&t.raw_data)),
            None => {
                let listed = constant::tensor(&t).ok_or_else(|| {
                    OnnxError::invalid(place(), format!("its data do not fit {dtype}{dims:?}"))
                })?;
                (listed.into_bytes(), None)
            }
        };
        if bytes.len() as u128 != needed {
            return Err(OnnxError::invalid(
                place(),
                format!(
                    "{dtype}{dims:?} needs {needed} bytes, {} are there",
                    bytes.len()
                ),
            ));
        }
        Ok(Initializer {
            element: t.data_type,
            dims,
            data: Data::Dense { bytes, origin },
        })
    }

    /// Where a slice of the model file stands in it.
    fn inside_model(&self, slice: &Bytes) -> Option<Origin> {
        let (_, file) = self.place?;
        let offset = (slice.as_ptr() as usize).checked_sub(self.model.as_ptr() as usize)?;
        (offset + slice.len() <= self.model.len()).then(|| Origin {
            file: file.into(),
            offset: offset as u64,
        })
    }

    /// The bytes of a tensor whose data stand in another file.
    fn external(&mut self, t: &TensorProto) -> Result<Option<(Bytes, Origin)>, OnnxError> {
        if t.data_location == 0 && t.external_data.is_empty() {
            return Ok(None);
        }
        let place = || format!("tensor \"{}\"", t.name);
        let Some((folder, _)) = self.place else {
            return Err(OnnxError::invalid(
                place(),
                "its data stand in another file, and this model has no folder",
            ));
        };
        let entry = |key: &str| {
            t.external_data
                .iter()
                .find(|e| e.key == key)
                .map(|e| e.value.as_str())
        };
        let number = |key: &str| -> Result<Option<u64>, OnnxError> {
            entry(key)
                .map(|v| {
                    v.parse().map_err(|_| {
                        OnnxError::invalid(place(), format!("{key} is not a number of bytes"))
                    })
                })
                .transpose()
        };
        let location = entry("location")
            .ok_or_else(|| OnnxError::invalid(place(), "names no file for its data"))?;
        let (offset, length) = (number("offset")?.unwrap_or(0), number("length")?);
        let bytes = match self.files.get(location) {
            Some(bytes) => bytes.clone(),
            None => {
                let bytes = folder.map(location, self.limits.file_bytes)?;
                self.files.insert(location.into(), bytes.clone());
                bytes
            }
        };
        let needed = match length {
            Some(n) => n,
            None => dtype_of(t.data_type)
                .zip(constant::dims(&t.dims))
                .and_then(|(d, dims)| u64::try_from(byte_len(d, &dims)).ok())
                .ok_or_else(|| OnnxError::invalid(place(), "says no length"))?,
        };
        let end = offset
            .checked_add(needed)
            .filter(|e| *e <= bytes.len() as u64);
        let Some(end) = end else {
            return Err(OnnxError::invalid(
                place(),
                format!("its data would end after \"{location}\" does"),
            ));
        };
        // Both fit usize: they are at most the length of a mapped file.
        let slice = bytes.slice(offset as usize..end as usize);
        Ok(Some((
            slice,
            Origin {
                file: location.into(),
                offset,
            },
        )))
    }

    /// Tensors in attributes and subgraphs must stand inside the folder too, though only the runtime reads them.
    fn confine(&mut self, t: &TensorProto) -> Result<(), OnnxError> {
        self.external(t).map(|_| ())
    }

    fn confine_attributes(&mut self, node: &NodeProto) -> Result<(), OnnxError> {
        for a in &node.attribute {
            for t in constant::attribute_tensors(a) {
                self.confine(t)?;
            }
        }
        for graph in node::subgraphs(&node.attribute) {
            let sparse = graph
                .sparse_initializer
                .iter()
                .flat_map(|s| s.values.iter().chain(&s.indices));
            for t in graph.initializer.iter().chain(sparse) {
                self.confine(t)?;
            }
            for inner in &graph.node {
                self.confine_attributes(inner)?;
            }
        }
        Ok(())
    }

    fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update(&self.model);
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort_by_key(|(name, _)| *name);
        for (name, bytes) in files {
            hasher.update(name.as_bytes());
            hasher.update(bytes);
        }
        hasher.finalize().into()
    }
}
