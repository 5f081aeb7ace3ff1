//! Tiny graphs for tests, written as text: one line per node.

use super::{Attribute, Limits, Model, proto::*};

/// A float model of opset 17. `inputs` and `outputs` are names; each line of `nodes` reads `a b = Op c d`.
pub(super) fn model(inputs: &[&str], nodes: &str, outputs: &[&str]) -> ModelProto {
    let port = |name: &&str| ValueInfoProto {
        name: (*name).to_owned(),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                elem_type: 1,
                shape: None,
            })),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    };
    let node = |line: &str| {
        let (made, call) = line.split_once('=').unwrap();
        let mut words = call.split_whitespace().map(str::to_owned);
        NodeProto {
            op_type: words.next().unwrap(),
            output: made.split_whitespace().map(str::to_owned).collect(),
            input: words
                .map(|w| if w == "_" { String::new() } else { w })
                .collect(),
            name: made.trim().to_owned(),
            ..NodeProto::default()
        }
    };
    ModelProto {
        ir_version: 8,
        opset_import: vec![OperatorSetIdProto {
            domain: String::new(),
            version: 17,
        }],
        graph: Some(GraphProto {
            name: "test".to_owned(),
            node: nodes
                .lines()
                .map(str::trim)
                .filter(|l| !l.is_empty())
                .map(node)
                .collect(),
            input: inputs.iter().map(port).collect(),
            output: outputs.iter().map(port).collect(),
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

/// Adds a weight of integers.
pub(super) fn constant(m: &mut ModelProto, name: &str, values: &[i64]) {
    let t = TensorProto {
        name: name.to_owned(),
        dims: vec![values.len() as i64],
        data_type: 7,
        int64_data: values.to_vec(),
        ..TensorProto::default()
    };
    m.graph.as_mut().unwrap().initializer.push(t);
}

/// Encodes and reads back.
pub(super) fn read(proto: &ModelProto) -> Result<Model, super::OnnxError> {
    use prost::Message as _;
    Model::parse(proto.encode_to_vec().into(), &Limits::default())
}

/// `x` feeds two nodes that meet again.
pub(super) fn diamond() -> Model {
    read(&model(
        &["x"],
        "a = Relu x
         b = Tanh x
         y = Add a b",
        &["y"],
    ))
    .unwrap()
}

#[test]
fn attributes_come_back_as_they_were_given() {
    let a = Attribute::ints("perm", &[0, 2, 1]);
    assert_eq!(a.to_proto().ints, [0, 2, 1]);
}
