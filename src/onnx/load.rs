//! From bytes to a model: scan, decode, inline, check, build.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use prost::Message as _;

use super::{
    Folder, Limits, OnnxError, ValueId,
    attribute::Attribute,
    check::{self, label, standard},
    external::{Place, TensorFiles},
    functions,
    graph::{Dim, Graph, Port, TypeFact},
    node::{self, Node},
    proto::{
        GraphProto, ModelProto, NodeProto, SparseTensorProto, ValueInfoProto, dtype_of,
        tensor_shape_proto::dimension, type_proto,
    },
    scan::scan,
};

/// Most axes and largest extent of a declared shape.
const RANK: usize = 64;
const EXTENT: i64 = 1 << 40;

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
    weights_folder: Option<Arc<Path>>,
}

impl Model {
    /// Reads `file` of a folder. Weights stay in the mapped files. External data are looked for beneath the folder in which
    /// the file itself stands.
    pub fn open(folder: &Folder, file: &str, limits: &Limits) -> Result<Model, OnnxError> {
        let (folder, file) = folder.of_file(file)?;
        let (bytes, path) = folder.map_with_path(&file, limits.file_bytes)?;
        let place = Place {
            folder,
            file,
            path: path.into(),
        };
        read(bytes, Some(place), limits)
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
            ir_version: self.ir_version,
            opsets: self.opsets.clone(),
            producer: self.producer.clone(),
            metadata: self.metadata.clone(),
            fingerprint: self.fingerprint,
            weights_folder: self.weights_folder.clone(),
        }
    }

    /// The folder of this machine that every [`super::Origin`], and so every reference that [`Model::encode`] writes, is relative
    /// to: that of the model file, or the repository where links are followed (a runtime follows none out of the folder that it is
    /// told). `None` for a model from memory.
    pub fn weights_folder(&self) -> Option<&Path> {
        self.weights_folder.as_deref()
    }

    /// SHA-256 of the model file; with external data, of that and of the name and SHA-256 of each further file, by name.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

fn read(bytes: Bytes, place: Option<Place>, limits: &Limits) -> Result<Model, OnnxError> {
    let weights_folder = place.as_ref().map(|p| p.folder.base().into());
    scan(&bytes, limits)?;
    let mut proto =
        ModelProto::decode(bytes.clone()).map_err(|e| OnnxError::malformed(e.to_string()))?;
    functions::inline(&mut proto, limits)?;
    let opsets = check::versions(&proto)?;
    check::metadata(&proto)?;
    let graph = proto
        .graph
        .take()
        .ok_or_else(|| OnnxError::malformed("it has no graph"))?;
    let mut reader = Reader {
        files: TensorFiles::new(bytes, place, limits),
        limits,
        opsets: &opsets,
        nodes: 0,
        inner: HashSet::new(),
    };
    let graph = reader.graph(graph)?;
    let fingerprint = reader.files.fingerprint();
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
        weights_folder,
    })
}

struct Reader<'a> {
    files: TensorFiles<'a>,
    limits: &'a Limits,
    opsets: &'a BTreeMap<String, i64>,
    nodes: u64,
    /// Names that subgraphs give to values of their own.
    inner: HashSet<Arc<str>>,
}

impl Reader<'_> {
    fn graph(&mut self, proto: GraphProto) -> Result<Graph, OnnxError> {
        let mut graph = Graph::empty(proto.name);
        for input in &proto.input {
            let value = graph.intern(named(&input.name, "an input")?);
            let fact = graph.declare(value, input)?;
            graph.inputs.push(Port { value, fact });
        }
        for t in proto.initializer {
            let value = graph.intern(named(&t.name, "a weight")?);
            let weight = self.files.initializer(t)?;
            if graph.initializers.insert(value, Arc::new(weight)).is_some() {
                let place = format!("weight \"{}\"", graph.name(value));
                return Err(OnnxError::invalid(place, "is there twice"));
            }
        }
        for mut s in proto.sparse_initializer {
            self.sparse(&mut s)?;
            let values = s.values.as_ref();
            let name = named(values.map_or("", |v| &v.name), "a sparse weight")?;
            let value = graph.intern(name);
            if graph.sparse.insert(value, Arc::new(s)).is_some() {
                let place = format!("sparse weight \"{}\"", graph.name(value));
                return Err(OnnxError::invalid(place, "is there twice"));
            }
        }
        for n in proto.node {
            let node = self.node(&mut graph, n)?;
            graph.nodes.push(Some(Arc::new(node)));
        }
        let mut seen = HashSet::new();
        for output in &proto.output {
            let value = graph.intern(named(&output.name, "an output")?);
            if !seen.insert(value) {
                let place = format!("output \"{}\"", output.name);
                return Err(OnnxError::invalid(place, "is there twice"));
            }
            let fact = graph.declare(value, output)?;
            graph.outputs.push(Port { value, fact });
        }
        if graph.outputs.is_empty() {
            return Err(OnnxError::invalid("graph", "has no output"));
        }
        for info in &proto.value_info {
            if let Some(value) = graph.value(&info.name)
                && !graph.declared.contains_key(&value)
            {
                graph.declare(value, info)?;
            }
        }
        for port in &mut graph.outputs {
            if port.fact.is_none() {
                port.fact = graph.declared.get(&port.value).cloned();
            }
        }
        graph.inner = Arc::new(std::mem::take(&mut self.inner));
        graph.finish()
    }

    fn node(&mut self, graph: &mut Graph, mut proto: NodeProto) -> Result<Node, OnnxError> {
        self.checked(&mut proto, 0)?;
        let mut list = |names: &[String]| -> Vec<Option<ValueId>> {
            let id = |n: &String| (!n.is_empty()).then(|| graph.intern(n));
            names.iter().map(id).collect()
        };
        let (inputs, outputs) = (list(&proto.input), list(&proto.output));
        let outer = node::outer_names(&proto);
        let implicit = outer.into_iter().map(|n| graph.intern(n)).collect();
        let attributes = std::mem::take(&mut proto.attribute);
        Ok(Node {
            op: proto.op_type,
            domain: standard(&proto.domain).to_owned(),
            name: proto.name,
            inputs,
            outputs,
            implicit,
            attributes: attributes.into_iter().map(Attribute::from_proto).collect(),
        })
    }

    /// Checks a node and all that is in it, and brings the data of its tensors into their messages.
    fn checked(&mut self, node: &mut NodeProto, level: u32) -> Result<(), OnnxError> {
        let place = format!("node \"{}\"", label(node));
        let invalid = |why: String| OnnxError::invalid(&place, why);
        self.nodes += 1;
        if self.nodes > self.limits.nodes {
            return Err(OnnxError::Limit {
                what: "the number of nodes",
                limit: self.limits.nodes,
            });
        }
        check::operator(node, self.opsets).map_err(invalid)?;
        check::attributes(&node.attribute).map_err(invalid)?;
        for a in &mut node.attribute {
            for t in a.t.iter_mut().chain(&mut a.tensors) {
                self.files.bring(t).map_err(|e| within(&place, e))?;
            }
            for s in a.sparse_tensor.iter_mut().chain(&mut a.sparse_tensors) {
                self.sparse(s).map_err(|e| within(&place, e))?;
            }
            for g in a.g.iter_mut().chain(&mut a.graphs) {
                self.subgraph(g, level + 1)?;
                check::subgraph(g).map_err(invalid)?;
            }
        }
        Ok(())
    }

    fn subgraph(&mut self, graph: &mut GraphProto, level: u32) -> Result<(), OnnxError> {
        if level > self.limits.levels() {
            return Err(OnnxError::Limit {
                what: "the nesting of subgraphs",
                limit: u64::from(self.limits.levels()),
            });
        }
        for t in &mut graph.initializer {
            self.files.bring(t)?;
            self.inner.insert(t.name.as_str().into());
        }
        for s in &mut graph.sparse_initializer {
            self.sparse(s)?;
            let name = s.values.as_ref().map_or("", |v| &v.name);
            self.inner.insert(name.into());
        }
        for input in &graph.input {
            self.inner.insert(input.name.as_str().into());
        }
        for node in &mut graph.node {
            self.checked(node, level)?;
            let made = node.output.iter().map(|o| o.as_str().into());
            self.inner.extend(made);
        }
        Ok(())
    }

    fn sparse(&mut self, s: &mut SparseTensorProto) -> Result<(), OnnxError> {
        for t in s.values.iter_mut().chain(&mut s.indices) {
            self.files.bring(t)?;
        }
        Ok(())
    }
}

fn named<'a>(name: &'a str, what: &str) -> Result<&'a str, OnnxError> {
    if name.is_empty() {
        return Err(OnnxError::invalid("graph", format!("{what} has no name")));
    }
    Ok(name)
}

/// An error about a tensor says in which node it stands.
fn within(place: &str, e: OnnxError) -> OnnxError {
    match e {
        OnnxError::Invalid { place: inner, why } => {
            OnnxError::invalid(place, format!("{inner}: {why}"))
        }
        e @ (OnnxError::Io { .. }
        | OnnxError::Confined { .. }
        | OnnxError::Malformed(_)
        | OnnxError::Limit { .. }
        | OnnxError::Patch(_)) => e,
    }
}

impl Graph {
    /// Keeps what the file says about a value's type.
    fn declare(
        &mut self,
        value: ValueId,
        info: &ValueInfoProto,
    ) -> Result<Option<TypeFact>, OnnxError> {
        let Some(declared) = &info.r#type else {
            return Ok(None);
        };
        let Some(type_proto::Value::TensorType(t)) = &declared.value else {
            self.other_types.insert(value, Arc::new(declared.clone()));
            return Ok(None);
        };
        let fact = tensor_fact(t).ok_or_else(|| {
            let place = format!("value \"{}\"", info.name);
            OnnxError::invalid(place, "declares an impossible shape")
        })?;
        self.declared.insert(value, fact.clone());
        Ok(Some(fact))
    }
}

fn tensor_fact(t: &type_proto::Tensor) -> Option<TypeFact> {
    let dim = |value: &Option<dimension::Value>| match value {
        // Some exporters write "unknown" so.
        Some(dimension::Value::DimValue(-1)) => Some(Dim::Unknown),
        Some(dimension::Value::DimValue(n)) if *n < 0 || *n > EXTENT => None,
        Some(dimension::Value::DimValue(n)) => Some(Dim::Fixed(*n)),
        Some(dimension::Value::DimParam(s)) if !s.is_empty() => Some(Dim::Named(s.clone())),
        Some(dimension::Value::DimParam(_)) | None => Some(Dim::Unknown),
    };
    let dims = match &t.shape {
        None => None,
        Some(shape) if shape.dim.len() > RANK => return None,
        Some(shape) => Some(
            shape
                .dim
                .iter()
                .map(|d| dim(&d.value))
                .collect::<Option<Vec<_>>>()?,
        ),
    };
    Some(TypeFact {
        element: t.elem_type,
        dtype: dtype_of(t.elem_type),
        dims,
    })
}
