//! Writing a model.

use prost::Message as _;

use super::{
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
    /// Weights of at least `from_bytes` that stand in a file of the model's folder are written as references to it; the
    /// rest goes into the message.
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
            ) => bytes.len() >= from_bytes,
            _ => false,
        }
    }
}

impl Model {
    /// The bytes of a `ModelProto`.
    pub fn encode(&self, weights: Weights) -> Vec<u8> {
        ModelProto {
            ir_version: self.ir_version,
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
}

fn graph(g: &Graph, weights: Weights) -> GraphProto {
    let names = |values: &[Option<super::ValueId>]| {
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
                attribute: n.attributes.clone(),
                ..NodeProto::default()
            })
            .collect(),
        input: g.inputs.iter().map(|p| port(g, p)).collect(),
        output: g.outputs.iter().map(|p| port(g, p)).collect(),
        initializer,
        sparse_initializer: g.sparse.iter().map(|s| s.as_ref().clone()).collect(),
        ..GraphProto::default()
    }
}

fn port(g: &Graph, p: &Port) -> ValueInfoProto {
    ValueInfoProto {
        name: g.name(p.value).to_owned(),
        r#type: p.fact.as_ref().map(fact),
        ..ValueInfoProto::default()
    }
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
