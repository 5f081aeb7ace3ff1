//! Tiny ONNX models for tests, written field by field, so that they can also be wrong in ways that no encoder would write.
#![allow(dead_code, unreachable_pub)] // shared: every test binary uses a part of it

/// A protobuf message under construction.
#[derive(Clone, Debug, Default)]
pub struct Wire(pub Vec<u8>);

impl Wire {
    pub fn new() -> Self {
        Self::default()
    }

    fn varint(&mut self, mut n: u64) {
        while n > 0x7f {
            self.0.push((n & 0x7f) as u8 | 0x80);
            n >>= 7;
        }
        self.0.push(n as u8);
    }

    /// An integer field.
    pub fn int(mut self, field: u64, value: i64) -> Self {
        self.varint(field << 3);
        self.varint(value as u64);
        self
    }

    /// A 32-bit float field.
    pub fn float(mut self, field: u64, value: f32) -> Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A field of bytes, text or a message.
    pub fn put(mut self, field: u64, content: impl AsRef<[u8]>) -> Self {
        self.varint(field << 3 | 2);
        self.varint(content.as_ref().len() as u64);
        self.0.extend(content.as_ref());
        self
    }

    /// A field once for each content.
    pub fn all(self, field: u64, contents: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        contents.into_iter().fold(self, |w, c| w.put(field, c))
    }

    /// Raw bytes at the end.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

impl AsRef<[u8]> for Wire {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Numbers of element types.
pub const FLOAT: i64 = 1;
pub const INT64: i64 = 7;

/// A value of an element type with a shape; `None` for an unknown shape.
pub fn typed(name: &str, element: i64, dims: Option<&[i64]>) -> Wire {
    let mut tensor = Wire::new().int(1, element);
    if let Some(dims) = dims {
        let dims = dims.iter().map(|d| Wire::new().int(1, *d));
        tensor = tensor.put(2, Wire::new().all(1, dims));
    }
    Wire::new().put(1, name).put(2, Wire::new().put(1, tensor))
}

/// A float value of unknown shape.
pub fn port(name: &str) -> Wire {
    typed(name, FLOAT, None)
}

/// A node from a line such as `y = Add a b`; `_` is an input or output left out, `domain:Op` an operator of a domain.
pub fn node(line: &str) -> Wire {
    let (made, call) = line
        .split_once('=')
        .expect("a node has the form `y = Op x`");
    let name = |w: &str| {
        if w == "_" {
            String::new()
        } else {
            w.to_owned()
        }
    };
    let mut words = call.split_whitespace();
    let op = words.next().expect("an operator follows `=`");
    let (domain, op) = op.split_once(':').unwrap_or(("", op));
    Wire::new()
        .all(1, words.map(name))
        .all(2, made.split_whitespace().map(name))
        .put(3, made.trim())
        .put(4, op)
        .put(7, domain)
}

/// One node a line.
pub fn nodes(text: &str) -> Vec<Wire> {
    let lines = text.lines().map(str::trim);
    lines.filter(|l| !l.is_empty()).map(node).collect()
}

/// A graph of float values.
pub fn graph(inputs: &[&str], text: &str, outputs: &[&str]) -> Wire {
    Wire::new()
        .all(1, nodes(text))
        .put(2, "g")
        .all(11, inputs.iter().map(|n| port(n)))
        .all(12, outputs.iter().map(|n| port(n)))
}

/// A model of opset 17, its graph last.
pub fn model(graph: &Wire) -> Wire {
    header().put(7, graph)
}

/// What stands before the graph.
pub fn header() -> Wire {
    Wire::new().int(1, 8).put(8, opset("", 17))
}

pub fn opset(domain: &str, version: i64) -> Wire {
    Wire::new().put(1, domain).int(2, version)
}

/// A tensor with its data in the message.
pub fn tensor(name: &str, element: i64, dims: &[i64], raw: &[u8]) -> Wire {
    let dims = dims.iter().fold(Wire::new(), |w, d| w.int(1, *d));
    dims.int(2, element).put(8, name).put(9, raw)
}

/// A float tensor with its data in another file.
pub fn external(name: &str, dims: &[i64], entries: &[(&str, &str)]) -> Wire {
    let dims = dims.iter().fold(Wire::new(), |w, d| w.int(1, *d));
    let entries = entries.iter().map(|(k, v)| Wire::new().put(1, k).put(2, v));
    dims.int(2, FLOAT).put(8, name).all(13, entries).int(14, 1)
}

/// An attribute of a kind, its payload in a field.
pub fn attribute(name: &str, kind: i64, field: u64, payload: impl AsRef<[u8]>) -> Wire {
    Wire::new().put(1, name).int(20, kind).put(field, payload)
}

/// A function of opset 17 in the domain `local`.
pub fn function(name: &str, inputs: &[&str], text: &str, outputs: &[&str]) -> Wire {
    Wire::new()
        .put(1, name)
        .all(4, inputs)
        .all(5, outputs)
        .all(7, nodes(text))
        .put(9, opset("", 17))
        .put(10, "local")
}

pub fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

// ---------------------------------------------------------------------------------------------- whole models

/// `x` feeds two nodes that meet again.
pub fn diamond() -> Wire {
    model(&graph(
        &["x"],
        "a = Relu x\nb = Tanh x\ny = Add a b",
        &["y"],
    ))
}

/// A weight, a constant node, an optional input left out, declared shapes.
pub fn weighted() -> Wire {
    let constant = Wire::new().put(2, "k").put(4, "Constant").put(
        5,
        attribute("value", 4, 5, tensor("", FLOAT, &[1], &f32s(&[3.0]))),
    );
    let cast = node("n = Cast y").put(5, Wire::new().put(1, "to").int(20, 2).int(3, INT64));
    let clip = node("y = Clip p _ k");
    let all = [node("p = MatMul x w"), constant, clip, cast];
    let graph = Wire::new()
        .all(1, all)
        .put(2, "weighted")
        .put(5, tensor("w", FLOAT, &[2, 2], &f32s(&[1.0, 2.0, 3.0, 4.0])))
        .put(11, typed("x", FLOAT, Some(&[1, 2])))
        .put(12, typed("y", FLOAT, Some(&[1, 2])))
        .put(12, typed("n", INT64, None))
        .put(13, typed("p", FLOAT, Some(&[1, 2])));
    header()
        .put(2, "test")
        .put(14, Wire::new().put(1, "key").put(2, "value"))
        .put(7, graph)
}

/// A branch whose two subgraphs read `a` from outside.
pub fn branching() -> Wire {
    let then = graph(&[], "t = Neg a", &["t"]);
    let other = graph(&[], "m = Relu a\ne = Tanh m", &["e"]);
    let branch = node("y = If c")
        .put(5, attribute("then_branch", 5, 6, then))
        .put(5, attribute("else_branch", 5, 6, other));
    let graph = Wire::new()
        .put(1, node("a = Relu x"))
        .put(1, branch)
        .put(2, "branching")
        .put(11, port("x"))
        .put(11, typed("c", 9, Some(&[])))
        .put(12, port("y"));
    model(&graph)
}

/// A function that calls another, with an attribute handed down.
pub fn calling() -> Wire {
    let leaky =
        node("o = LeakyRelu i").put(5, Wire::new().put(1, "alpha").int(20, 1).put(21, "slope"));
    let inner = Wire::new()
        .put(1, "inner")
        .put(4, "i")
        .put(5, "o")
        .put(6, "slope")
        .put(7, leaky)
        .put(9, opset("", 17))
        .put(10, "local");
    let call =
        node("h = local:inner p").put(5, Wire::new().put(1, "slope").int(20, 1).float(2, 0.5));
    let outer = Wire::new()
        .put(1, "outer")
        .put(4, "p")
        .put(5, "q")
        .put(7, call)
        .put(7, node("q = Neg h"))
        .put(9, opset("", 17))
        .put(9, opset("local", 1))
        .put(10, "local");
    header()
        .put(8, opset("local", 1))
        .put(25, inner)
        .put(25, outer)
        .put(
            7,
            graph(&["x"], "a = local:outer x\ny = local:outer a", &["y"]),
        )
}
