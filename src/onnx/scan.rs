//! A walk over the raw bytes of a model that counts what decoding would cost, before anything is decoded.
//!
//! Decoding protobuf multiplies memory: an empty message of two bytes becomes a struct of hundreds, a varint of one byte an
//! integer of eight. The scan walks the same messages without building them. It checks the wire format no further than it must.

use std::mem::size_of;

use super::{Limits, OnnxError, proto};

/// A list grows by doubling, so that it may hold room for twice its elements.
const GROWTH: u64 = 2;
/// A string costs its header and an allocation, however short it is.
const STRING: u64 = 64;

/// The kinds of message, as far as the scan must tell them apart: which fields hold messages, which hold numbers.
#[derive(Clone, Copy)]
enum Kind {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    Sparse,
    ValueInfo,
    Type,
    TypeTensor,
    TypeWrap,
    TypeMap,
    Shape,
    Dimension,
    Function,
    Entry,
}

impl Kind {
    /// Bytes of the decoded struct, without what it points to.
    fn size(self) -> usize {
        match self {
            Kind::Model => size_of::<proto::ModelProto>(),
            Kind::Graph => size_of::<proto::GraphProto>(),
            Kind::Node => size_of::<proto::NodeProto>(),
            Kind::Attribute => size_of::<proto::AttributeProto>(),
            Kind::Tensor => size_of::<proto::TensorProto>(),
            Kind::Sparse => size_of::<proto::SparseTensorProto>(),
            Kind::ValueInfo => size_of::<proto::ValueInfoProto>(),
            Kind::Type => size_of::<proto::TypeProto>(),
            Kind::TypeTensor | Kind::TypeWrap | Kind::TypeMap => {
                size_of::<proto::type_proto::Value>()
            }
            Kind::Shape => size_of::<proto::TensorShapeProto>(),
            Kind::Dimension => size_of::<proto::tensor_shape_proto::Dimension>(),
            Kind::Function => size_of::<proto::FunctionProto>(),
            Kind::Entry => size_of::<proto::StringStringEntryProto>(),
        }
    }
}

enum Field {
    Message(Kind),
    /// Numbers of four or eight bytes each, in the file as in memory.
    Fixed(u64),
    /// Integers of one to ten bytes in the file, of this size in memory.
    Varint(u64),
    /// Bytes that stay in the file.
    Mapped,
    Other,
}

fn field(kind: Kind, number: u64) -> Field {
    use Field::{Fixed, Mapped, Message, Other, Varint};
    match (kind, number) {
        (Kind::Model, 7) => Message(Kind::Graph),
        (Kind::Model, 8 | 14) => Message(Kind::Entry),
        (Kind::Model, 25) => Message(Kind::Function),
        (Kind::Graph, 1) | (Kind::Function, 7) => Message(Kind::Node),
        (Kind::Graph, 5) => Message(Kind::Tensor),
        (Kind::Graph, 11..=13) | (Kind::Function, 12) => Message(Kind::ValueInfo),
        (Kind::Graph, 15) => Message(Kind::Sparse),
        (Kind::Node, 5) | (Kind::Function, 11) => Message(Kind::Attribute),
        (Kind::Function, 9) => Message(Kind::Entry),
        (Kind::Attribute, 5 | 10) => Message(Kind::Tensor),
        (Kind::Attribute, 6 | 11) => Message(Kind::Graph),
        (Kind::Attribute, 7) => Fixed(4),
        (Kind::Attribute, 8) => Varint(8),
        (Kind::Attribute, 14 | 15) => Message(Kind::Type),
        (Kind::Attribute, 22 | 23) => Message(Kind::Sparse),
        (Kind::Tensor, 1 | 7 | 11) => Varint(8),
        (Kind::Tensor, 4) => Fixed(4),
        (Kind::Tensor, 5) => Varint(4),
        (Kind::Tensor, 9) => Mapped,
        (Kind::Tensor, 10) => Fixed(8),
        (Kind::Tensor, 13) => Message(Kind::Entry),
        (Kind::Sparse, 1 | 2) => Message(Kind::Tensor),
        (Kind::Sparse, 3) => Varint(8),
        (Kind::ValueInfo, 2) => Message(Kind::Type),
        (Kind::Type, 1 | 8) => Message(Kind::TypeTensor),
        (Kind::Type, 4 | 9) => Message(Kind::TypeWrap),
        (Kind::Type, 5) => Message(Kind::TypeMap),
        (Kind::TypeTensor, 2) => Message(Kind::Shape),
        (Kind::TypeWrap, 1) | (Kind::TypeMap, 2) => Message(Kind::Type),
        (Kind::Shape, 1) => Message(Kind::Dimension),
        _ => Other,
    }
}

/// Walks the bytes of a `ModelProto`.
pub(super) fn scan(bytes: &[u8], limits: &Limits) -> Result<(), OnnxError> {
    if bytes.is_empty() {
        return Err(OnnxError::malformed("the file is empty"));
    }
    let mut count = Count {
        limits,
        cost: 0,
        nodes: 0,
    };
    count.message(bytes, Kind::Model, 0)
}

struct Count<'a> {
    limits: &'a Limits,
    cost: u64,
    nodes: u64,
}

impl Count<'_> {
    fn message(&mut self, mut bytes: &[u8], kind: Kind, depth: u32) -> Result<(), OnnxError> {
        if depth > self.limits.depth {
            return Err(OnnxError::Limit {
                what: "the nesting of messages",
                limit: u64::from(self.limits.depth),
            });
        }
        if matches!(kind, Kind::Node) {
            self.nodes += 1;
            if self.nodes > self.limits.nodes {
                return Err(OnnxError::Limit {
                    what: "the number of nodes",
                    limit: self.limits.nodes,
                });
            }
        }
        self.spend((kind.size() as u64).saturating_mul(GROWTH))?;
        while !bytes.is_empty() {
            let tag = varint(&mut bytes)?;
            let found = field(kind, tag >> 3);
            match tag & 7 {
                0 => {
                    varint(&mut bytes)?;
                    self.number(&found)?;
                }
                1 => {
                    take(&mut bytes, 8)?;
                    self.number(&found)?;
                }
                5 => {
                    take(&mut bytes, 4)?;
                    self.number(&found)?;
                }
                2 => {
                    let length = varint(&mut bytes)?;
                    let inner = take(&mut bytes, length)?;
                    match found {
                        Field::Message(kind) => self.message(inner, kind, depth + 1)?,
                        Field::Fixed(_) => self.spend(length.saturating_mul(GROWTH))?,
                        // One of them takes at least one byte.
                        Field::Varint(size) => {
                            self.spend(length.saturating_mul(size).saturating_mul(GROWTH))?;
                        }
                        Field::Mapped => self.spend(STRING)?,
                        Field::Other => self.spend(length.saturating_add(STRING))?,
                    }
                }
                _ => return Err(OnnxError::malformed("a field has an unknown wire type")),
            }
        }
        Ok(())
    }

    fn number(&mut self, found: &Field) -> Result<(), OnnxError> {
        match found {
            Field::Fixed(size) | Field::Varint(size) => self.spend(*size * GROWTH),
            Field::Message(_) | Field::Mapped | Field::Other => Ok(()),
        }
    }

    fn spend(&mut self, bytes: u64) -> Result<(), OnnxError> {
        self.cost = self.cost.saturating_add(bytes);
        if self.cost > self.limits.decoded_bytes {
            return Err(OnnxError::Limit {
                what: "the memory to decode it",
                limit: self.limits.decoded_bytes,
            });
        }
        Ok(())
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64, OnnxError> {
    let mut value = 0;
    for (place, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            *bytes = &bytes[place + 1..];
            return Ok(value);
        }
    }
    Err(OnnxError::malformed("a number does not end"))
}

fn take<'a>(bytes: &mut &'a [u8], length: u64) -> Result<&'a [u8], OnnxError> {
    let split = usize::try_from(length)
        .ok()
        .and_then(|n| bytes.split_at_checked(n));
    let (head, rest) =
        split.ok_or_else(|| OnnxError::malformed("a field is longer than what holds it"))?;
    *bytes = rest;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field `number` holding `inner`.
    fn nested(number: u8, inner: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut length = inner.len();
        while length > 0x7f {
            out.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        out.push(length as u8);
        out.extend_from_slice(inner);
        out
    }

    fn limited(decoded_bytes: u64) -> Limits {
        Limits {
            decoded_bytes,
            ..Limits::default()
        }
    }

    #[test]
    fn empty_messages_are_counted_at_the_size_they_will_have() {
        let nodes = [10, 0].repeat(100_000);
        let got = scan(&nested(7, &nodes), &limited(20 << 20));
        assert!(
            matches!(got, Err(OnnxError::Limit { what, .. }) if what.contains("memory")),
            "200 kB of file are more than 20 MiB decoded: {got:?}"
        );
    }

    #[test]
    fn deep_subgraphs_are_refused() {
        let mut graph = Vec::new();
        for _ in 0..100 {
            graph = nested(1, &nested(5, &nested(6, &graph)));
        }
        let got = scan(&nested(7, &graph), &Limits::default());
        assert!(matches!(got, Err(OnnxError::Limit { what, .. }) if what.contains("nesting")));
    }

    #[test]
    fn packed_integers_cost_eight_bytes_each_and_raw_data_stay_in_the_file() {
        let limits = limited(1 << 20);
        let tensor = |field| nested(7, &nested(5, &nested(field, &vec![1; 500_000])));
        assert!(scan(&tensor(7), &limits).is_err(), "int64_data");
        assert_eq!(scan(&tensor(9), &limits), Ok(()), "raw_data");
    }

    #[test]
    fn truncated_and_unending_numbers_are_malformed() {
        for bytes in [&b""[..], &[0x3a], &[0x3a, 5, 1], &[0xff; 12], &[0x3b]] {
            assert!(matches!(
                scan(bytes, &Limits::default()),
                Err(OnnxError::Malformed(_))
            ));
        }
    }
}
