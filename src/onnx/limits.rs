//! Bounds on a model file, held by a scan of the raw bytes before anything is decoded.
//!
//! Decoding protobuf multiplies memory: an empty message of two bytes becomes a struct of hundreds, a varint of one byte an
//! integer of eight. The scan walks the same messages without building them and counts what decoding would cost.

use super::OnnxError;

/// What a model file may be at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one file. The protobuf format itself ends at 2 GiB; data files may be larger.
    pub file_bytes: u64,
    /// Bytes of all weights together.
    pub weight_bytes: u64,
    /// Messages of any kind in the model file.
    pub messages: u64,
    /// Nesting of messages (subgraphs, types, functions).
    pub depth: u32,
    /// Numbers in fields that are decoded one by one (`float_data`, `ints`, dims), in bytes after decoding.
    pub listed_bytes: u64,
    /// Nodes after functions are inlined.
    pub nodes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_bytes: 1 << 40,
            weight_bytes: 1 << 40,
            messages: 1_000_000,
            depth: 48,
            listed_bytes: 512 << 20,
            nodes: 200_000,
        }
    }
}

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
    Function,
    Leaf,
}

enum Field {
    Message(Kind),
    /// Packed or single numbers, and their size once decoded.
    Numbers(u64),
    Plain,
}

fn field(kind: Kind, number: u64) -> Field {
    use Field::{Message, Numbers, Plain};
    match (kind, number) {
        (Kind::Model, 7) => Message(Kind::Graph),
        (Kind::Model, 8 | 14) => Message(Kind::Leaf),
        (Kind::Model, 25) => Message(Kind::Function),
        (Kind::Graph, 1) | (Kind::Function, 7) => Message(Kind::Node),
        (Kind::Graph, 5) => Message(Kind::Tensor),
        (Kind::Graph, 11..=13) | (Kind::Function, 12) => Message(Kind::ValueInfo),
        (Kind::Graph, 15) => Message(Kind::Sparse),
        (Kind::Node, 5) | (Kind::Function, 11) => Message(Kind::Attribute),
        (Kind::Function, 9) => Message(Kind::Leaf),
        (Kind::Attribute, 5 | 10) => Message(Kind::Tensor),
        (Kind::Attribute, 6 | 11) => Message(Kind::Graph),
        (Kind::Attribute, 7) => Numbers(4),
        (Kind::Attribute, 8) => Numbers(8),
        (Kind::Attribute, 14 | 15) => Message(Kind::Type),
        (Kind::Attribute, 22 | 23) => Message(Kind::Sparse),
        (Kind::Tensor, 1 | 7 | 10 | 11) => Numbers(8),
        (Kind::Tensor, 4 | 5) => Numbers(4),
        (Kind::Tensor, 13) => Message(Kind::Leaf),
        (Kind::Sparse, 1 | 2) => Message(Kind::Tensor),
        (Kind::Sparse, 3) => Numbers(8),
        (Kind::ValueInfo, 2) => Message(Kind::Type),
        (Kind::Type, 1 | 8) => Message(Kind::TypeTensor),
        (Kind::Type, 4 | 9) => Message(Kind::TypeWrap),
        (Kind::Type, 5) => Message(Kind::TypeMap),
        (Kind::TypeTensor, 2) => Message(Kind::Shape),
        (Kind::TypeWrap, 1) | (Kind::TypeMap, 2) => Message(Kind::Type),
        (Kind::Shape, 1) => Message(Kind::Leaf),
        _ => Plain,
    }
}

/// Walks the bytes of a `ModelProto`.
pub(super) fn scan(bytes: &[u8], limits: &Limits) -> Result<(), OnnxError> {
    if bytes.is_empty() {
        return Err(OnnxError::Malformed("the file is empty".to_owned()));
    }
    let mut count = Count {
        limits,
        messages: 0,
        listed: 0,
    };
    count.message(bytes, Kind::Model, 0)
}

struct Count<'a> {
    limits: &'a Limits,
    messages: u64,
    listed: u64,
}

impl Count<'_> {
    fn message(&mut self, mut bytes: &[u8], kind: Kind, depth: u32) -> Result<(), OnnxError> {
        let Limits {
            depth: deepest,
            messages,
            listed_bytes,
            ..
        } = *self.limits;
        if depth > deepest {
            return Err(OnnxError::Limit {
                what: "the nesting of messages",
                limit: u64::from(deepest),
            });
        }
        while !bytes.is_empty() {
            let tag = varint(&mut bytes)?;
            let found = field(kind, tag >> 3);
            match tag & 7 {
                0 => {
                    varint(&mut bytes)?;
                    self.number(&found);
                }
                1 => {
                    take(&mut bytes, 8)?;
                    self.number(&found);
                }
                5 => {
                    take(&mut bytes, 4)?;
                    self.number(&found);
                }
                2 => {
                    let length = varint(&mut bytes)?;
                    let inner = take(&mut bytes, length)?;
                    match found {
                        Field::Message(kind) => {
                            self.messages += 1;
                            self.message(inner, kind, depth + 1)?;
                        }
                        // A packed number takes at least one byte.
                        Field::Numbers(size) => {
                            self.listed = self.listed.saturating_add(length.saturating_mul(size));
                        }
                        // Each string of a list costs its header, however short it is.
                        Field::Plain => self.listed = self.listed.saturating_add(32),
                    }
                }
                _ => return Err(OnnxError::Malformed("unknown wire type".to_owned())),
            }
            if self.messages > messages {
                return Err(OnnxError::Limit {
                    what: "the number of messages",
                    limit: messages,
                });
            }
            if self.listed > listed_bytes {
                return Err(OnnxError::Limit {
                    what: "the bytes of listed numbers and names",
                    limit: listed_bytes,
                });
            }
        }
        Ok(())
    }

    fn number(&mut self, found: &Field) {
        if let Field::Numbers(size) = found {
            self.listed = self.listed.saturating_add(*size);
        }
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
    Err(OnnxError::Malformed("a number does not end".to_owned()))
}

fn take<'a>(bytes: &mut &'a [u8], length: u64) -> Result<&'a [u8], OnnxError> {
    let split = usize::try_from(length)
        .ok()
        .and_then(|n| bytes.split_at_checked(n));
    let (head, rest) =
        split.ok_or_else(|| OnnxError::Malformed("a field is longer than the file".to_owned()))?;
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

    #[test]
    fn a_million_empty_nodes_are_refused_before_they_are_built() {
        let nodes = [10, 0].repeat(1_000_001);
        let got = scan(&nested(7, &nodes), &Limits::default());
        assert!(
            matches!(got, Err(OnnxError::Limit { what, .. }) if what.contains("messages")),
            "{got:?}"
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
    fn packed_numbers_are_counted_as_they_will_be_decoded() {
        let limits = Limits {
            listed_bytes: 1000,
            ..Limits::default()
        };
        let model = |n| nested(7, &nested(5, &nested(7, &vec![1; n])));
        assert!(scan(&model(120), &limits).is_ok());
        assert!(scan(&model(130), &limits).is_err());
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
