//! Writing a model.

use std::collections::HashSet;

use prost::Message as _;

use super::{
    ValueId,
    attribute::Attribute,
    graph::{Data, Dim, Graph, Initializer, Port, TypeFact},
    load::Model,
    proto::{
        GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
        TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto, type_proto,
    },
};

/// Where the weights go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Into the message.
    Inline,
    /// Weights of at least `from_bytes` and of a [`crate::tensor::DType`] that stand in a file of the model's folder are
    /// written as references to it; the rest goes into the message.
    ByReference {
        /// Smallest size that is worth a reference.
        from_bytes: usize,
    },
}

impl Weights {
    /// Whether a weight is written as a reference.
    pub fn refers(self, weight: &Initializer) -> bool {
        match (self, &weight.data) {
            (
                Weights::ByReference { from_bytes },
                Data::Dense {
                    bytes,
                    origin: Some(_),
                },
            ) => weight.dtype().is_some() && bytes.len() >= from_bytes,
            _ => false,
        }
    }
}

impl Model {
    /// The bytes of a `ModelProto`. Equal models give equal bytes. Doc strings and training information are left out.
    pub fn encode(&self, weights: Weights) -> Vec<u8> {
        ModelProto {
            ir_version: self.written_version(),
            producer_name: self.producer.clone(),
            opset_import: self
                .opsets
                .iter()
                .map(|(domain, version)| OperatorSetIdProto {
                    domain: domain.clone(),
                    version: *version,
                })
                .collect(),
            metadata_props: self
                .metadata
                .iter()
                .map(|(key, value)| StringStringEntryProto {
                    key: key.clone(),
                    value: value.clone(),
                })
                .collect(),
            graph: Some(graph(&self.graph, weights)),
            ..ModelProto::default()
        }
        .encode_to_vec()
    }

    /// Before version 4 every weight had to be an input too; a patch adds weights that are none.
    fn written_version(&self) -> i64 {
        let g = &self.graph;
        let inputs: HashSet<ValueId> = g.inputs.iter().map(|p| p.value).collect();
        if g.initializers.keys().all(|v| inputs.contains(v)) {
            self.ir_version
        } else {
            self.ir_version.max(4)
        }
    }
}

fn graph(g: &Graph, weights: Weights) -> GraphProto {
    let names = |values: &[Option<ValueId>]| {
        values
            .iter()
            .map(|v| v.map_or_else(String::new, |v| g.name(v).to_owned()))
            .collect()
    };
    let mut initializer: Vec<TensorProto> = g
        .initializers
        .iter()
        .map(|(v, i)| tensor(g.name(*v), i, weights))
        .collect();
    // The map has no order of its own; equal graphs must give equal bytes.
    initializer.sort_by(|a, b| a.name.cmp(&b.name));
    GraphProto {
        name: g.name.clone(),
        node: g
            .nodes()
            .map(|(_, n)| NodeProto {
                op_type: n.op.clone(),
                domain: n.domain.clone(),
                name: n.name.clone(),
                input: names(&n.inputs),
                output: names(&n.outputs),
                attribute: n.attributes().iter().map(Attribute::to_proto).collect(),
                ..NodeProto::default()
            })
            .collect(),
        input: g.inputs.iter().map(|p| port(g, p)).collect(),
        output: g.outputs.iter().map(|p| port(g, p)).collect(),
        initializer,
        sparse_initializer: g.sparse.values().map(|s| s.as_ref().clone()).collect(),
        value_info: inner_facts(g),
        ..GraphProto::default()
    }
}

fn port(g: &Graph, p: &Port) -> ValueInfoProto {
    let other = || g.other_types.get(&p.value).map(|t| t.as_ref().clone());
    ValueInfoProto {
        name: g.name(p.value).to_owned(),
        r#type: p.fact.as_ref().map(fact).or_else(other),
        ..ValueInfoProto::default()
    }
}

/// What is declared about values that nodes make, outputs left out.
fn inner_facts(g: &Graph) -> Vec<ValueInfoProto> {
    let made = g.nodes().flat_map(|(_, n)| n.outputs.iter().flatten());
    let outputs: HashSet<ValueId> = g.outputs.iter().map(|p| p.value).collect();
    made.filter(|v| !outputs.contains(v))
        .filter_map(|v| {
            let of_tensor = g.declared.get(v).map(fact);
            let other = || g.other_types.get(v).map(|t| t.as_ref().clone());
            Some(ValueInfoProto {
                name: g.name(*v).to_owned(),
                r#type: Some(of_tensor.or_else(other)?),
                ..ValueInfoProto::default()
            })
        })
        .collect()
}

fn fact(f: &TypeFact) -> TypeProto {
    let shape = f.dims.as_ref().map(|dims| TensorShapeProto {
        dim: dims
            .iter()
            .map(|d| tensor_shape_proto::Dimension {
                value: match d {
                    Dim::Fixed(n) => Some(tensor_shape_proto::dimension::Value::DimValue(*n)),
                    Dim::Named(s) => {
                        Some(tensor_shape_proto::dimension::Value::DimParam(s.clone()))
                    }
                    Dim::Unknown => None,
                },
                ..tensor_shape_proto::Dimension::default()
            })
            .collect(),
    });
    TypeProto {
        value: Some(type_proto::Value::TensorType(type_proto::Tensor {
            elem_type: f.element,
            shape,
        })),
        ..TypeProto::default()
    }
}

fn tensor(name: &str, weight: &Initializer, weights: Weights) -> TensorProto {
    let mut t = TensorProto {
        name: name.to_owned(),
        dims: weight.dims.iter().map(|d| *d as i64).collect(),
        data_type: weight.element,
        ..TensorProto::default()
    };
    match &weight.data {
        Data::Opaque(original) => return original.as_ref().clone(),
        Data::Dense {
            bytes,
            origin: Some(origin),
        } if weights.refers(weight) => {
            let entry = |key: &str, value: String| StringStringEntryProto {
                key: key.to_owned(),
                value,
            };
            t.data_location = 1;
            t.external_data = vec![
                entry("location", origin.file.to_string()),
                entry("offset", origin.offset.to_string()),
                entry("length", bytes.len().to_string()),
            ];
        }
        Data::Dense { bytes, .. } => t.raw_data = bytes.clone(),
    }
    t
}
