//! Cuts an answer into bounded messages, and counts and signs what was sent.
//!
//! A message carries at most [`PIECE`] bytes of payload, so that a reader that stalls costs little. The last message of an answer
//! sums it up: messages, bytes and the CRC-32C of the payload in the order of sending.

use std::time::Instant;

use bytes::Bytes;

use super::{
    to_proto,
    wire::introspect::{self as pb, capture_response::Item as Message},
};
use crate::{
    methods::{
        capture::{Captured, Content, Item as Shown},
        reduce::Sparse,
    },
    tensor::{DType, Tensor},
};

/// Most bytes of payload in a message.
pub(super) const PIECE: usize = 256 << 10;

/// A message of an answer.
pub(crate) trait Item {
    /// What it carries besides its fields, in the order that the checksum takes it.
    fn payload(&self) -> Vec<&[u8]>;

    /// The summary, where it is that.
    fn summary(&self) -> Option<&pb::Summary>;
}

impl Item for Message {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Message::Tensor(t) => vec![&t.data],
            Message::Sparse(s) => vec![&s.counts, &s.indices, &s.values],
            Message::Header(_) | Message::Prediction(_) | Message::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Header(_)
            | Message::Tensor(_)
            | Message::Sparse(_)
            | Message::Prediction(_) => None,
        }
    }
}

/// What was sent so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ledger {
    pub messages: u64,
    pub bytes: u64,
    pub crc32c: u32,
}

impl Ledger {
    /// A message went out with these parts of payload.
    pub(super) fn sent(&mut self, payload: &[&[u8]]) {
        self.messages += 1;
        for part in payload {
            self.bytes += part.len() as u64;
            self.crc32c = crc32c::crc32c_append(self.crc32c, part);
        }
    }

    /// A message goes out.
    pub(super) fn count(&mut self, message: &impl Item) {
        self.sent(&message.payload());
    }

    /// A summary with what was sent before it.
    pub(super) fn summed(&self, summary: pb::Summary) -> pb::Summary {
        pb::Summary {
            messages: self.messages,
            bytes: self.bytes,
            crc32c: self.crc32c,
            ..summary
        }
    }
}

/// The messages of an answer behind its header.
pub(super) struct Messages {
    items: std::vec::IntoIter<Shown>,
    current: Option<Cut>,
    prediction: Option<pb::Prediction>,
    summary: Option<pb::Summary>,
    captured: Captured,
    ledger: Ledger,
    arrived: Instant,
    begun: Instant,
}

/// A tensor that is being sent.
enum Cut {
    Dense(Pieces),
    Sparse {
        name: String,
        axes: Vec<String>,
        sparse: Sparse,
        dtype: DType,
        row: usize,
        entry: usize,
    },
}

impl Messages {
    /// Of an answer whose header is the only message so far.
    pub(super) fn new(mut captured: Captured, truncated: u32, arrived: Instant) -> Self {
        let mut ledger = Ledger::default();
        ledger.sent(&[]);
        Self {
            items: std::mem::take(&mut captured.items).into_iter(),
            current: None,
            prediction: captured.prediction.take().map(to_proto::prediction),
            summary: Some(pb::Summary {
                rows: 1,
                truncated_tokens: truncated,
                non_finite: std::mem::take(&mut captured.non_finite),
                notes: std::mem::take(&mut captured.notes),
                ..pb::Summary::default()
            }),
            captured,
            ledger,
            arrived,
            begun: Instant::now(),
        }
    }

    /// Where the time went, as far as it has.
    pub(super) fn timings(&self) -> crate::engine::StageTimings {
        let mut timings = self.captured.timings;
        timings.encode += self.begun.elapsed();
        timings
    }

    fn summary(&mut self) -> Option<Message> {
        let timings = to_proto::timings(&self.timings(), self.arrived.elapsed());
        let summary = self.summary.take()?;
        Some(Message::Summary(self.ledger.summed(pb::Summary {
            timings: Some(timings),
            ..summary
        })))
    }
}

impl Iterator for Messages {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(cut) = &mut self.current {
                if let Some(message) = cut.next() {
                    self.ledger.count(&message);
                    return Some(message);
                }
                self.current = None;
            }
            match self.items.next() {
                Some(item) => self.current = Some(Cut::new(item)),
                None => break,
            }
        }
        if let Some(prediction) = self.prediction.take() {
            let message = Message::Prediction(prediction);
            self.ledger.count(&message);
            return Some(message);
        }
        self.summary()
    }
}

/// The messages of a tensor.
pub(super) struct Pieces {
    name: String,
    axes: Vec<String>,
    tensor: Tensor,
    offset: usize,
}

impl Pieces {
    pub(super) fn new(name: String, axes: Vec<String>, tensor: Tensor) -> Self {
        Self {
            name,
            axes,
            tensor,
            offset: 0,
        }
    }
}

impl Iterator for Pieces {
    type Item = pb::Tensor;

    /// The next piece; none when all is sent. An empty tensor is one piece.
    fn next(&mut self) -> Option<pb::Tensor> {
        let all = self.tensor.bytes();
        if self.offset >= all.len() && self.offset > 0 {
            return None;
        }
        let end = all.len().min(self.offset + PIECE);
        let message = pb::Tensor {
            name: self.name.clone(),
            axes: self.axes.clone(),
            dtype: to_proto::dtype(self.tensor.dtype()).into(),
            shape: extents(self.tensor.shape()),
            offset: self.offset as u64,
            data: all.slice(self.offset..end),
        };
        self.offset = end.max(1);
        Some(message)
    }
}

impl Cut {
    fn new(item: Shown) -> Self {
        let Shown {
            name,
            axes,
            content,
        } = item;
        match content {
            Content::Dense(tensor) => Cut::Dense(Pieces::new(name, axes, tensor)),
            Content::Sparse(sparse, dtype) => Cut::Sparse {
                name,
                axes,
                sparse,
                dtype,
                row: 0,
                entry: 0,
            },
        }
    }

    /// The next piece; none when all is sent.
    fn next(&mut self) -> Option<Message> {
        match self {
            Cut::Dense(pieces) => pieces.next().map(Message::Tensor),
            Cut::Sparse {
                name,
                axes,
                sparse,
                dtype,
                row,
                entry,
            } => {
                if *row >= sparse.counts.len() {
                    return None;
                }
                let per_entry = 4 + dtype.size();
                let (first, from) = (*row, *entry);
                let mut bytes = 0;
                while let Some(count) = sparse.counts.get(*row) {
                    let more = 4 + *count as usize * per_entry;
                    if bytes > 0 && bytes + more > PIECE {
                        break;
                    }
                    bytes += more;
                    *row += 1;
                    *entry += *count as usize;
                }
                Some(Message::Sparse(pb::SparseTensor {
                    name: name.clone(),
                    axes: axes.clone(),
                    dtype: to_proto::dtype(*dtype).into(),
                    shape: extents(&sparse.shape),
                    first_row: first as u64,
                    counts: integers(&sparse.counts[first..*row]),
                    indices: integers(&sparse.indices[from..*entry]),
                    values: floats(&sparse.values[from..*entry], *dtype),
                }))
            }
        }
    }
}

fn extents(shape: &[usize]) -> Vec<u64> {
    shape.iter().map(|n| *n as u64).collect()
}

fn integers(values: &[u32]) -> Bytes {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Values as the type that was asked for, F32 unless it is a half.
fn floats(values: &[f32], dtype: DType) -> Bytes {
    match dtype {
        DType::F16 => values
            .iter()
            .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
            .collect(),
        DType::Bf16 => values
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
            .collect(),
        DType::F32
        | DType::F64
        | DType::I8
        | DType::I16
        | DType::I32
        | DType::I64
        | DType::U8
        | DType::U16
        | DType::U32
        | DType::U64
        | DType::Bool => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(content: Content) -> Vec<Message> {
        let mut cut = Cut::new(Shown {
            name: "x".into(),
            axes: vec!["pos".into()],
            content,
        });
        std::iter::from_fn(|| cut.next()).collect()
    }

    proptest! {
        #[test]
        fn a_tensor_comes_back_from_its_pieces(n in 0usize..300_000) {
            let values: Vec<f32> = (0..=u16::MAX).cycle().take(n).map(f32::from).collect();
            let tensor = Tensor::from_f32(vec![n], &values).unwrap();
            let mut back = Vec::new();
            for piece in pieces(Content::Dense(tensor.clone())) {
                let Message::Tensor(t) = piece else { panic!("{piece:?}") };
                prop_assert_eq!(t.offset as usize, back.len());
                prop_assert!(t.data.len() <= PIECE);
                back.extend_from_slice(&t.data);
            }
            prop_assert_eq!(&back[..], &tensor.bytes()[..]);
        }

        #[test]
        fn sparse_rows_come_back_whole(counts in prop::collection::vec(0u32..9000, 1..60)) {
            let total: u32 = counts.iter().sum();
            let sparse = Sparse {
                shape: vec![counts.len(), 10_000],
                indices: (0..total).collect(),
                values: (0..total).map(|v| v as f32).collect(),
                counts,
            };
            let (mut counts, mut indices, mut rows) = (Vec::new(), Vec::new(), 0);
            for piece in pieces(Content::Sparse(sparse.clone(), DType::F16)) {
                let Message::Sparse(s) = piece else { panic!("{piece:?}") };
                prop_assert_eq!(s.first_row as usize, rows);
                rows += s.counts.len() / 4;
                prop_assert_eq!(s.values.len() * 2, s.indices.len());
                counts.extend_from_slice(&s.counts);
                indices.extend_from_slice(&s.indices);
            }
            prop_assert_eq!(&counts[..], &integers(&sparse.counts)[..]);
            prop_assert_eq!(&indices[..], &integers(&sparse.indices)[..]);
        }
    }

    #[test]
    fn an_empty_tensor_is_one_message() {
        let tensor = Tensor::from_f32(vec![0, 4], &[]).unwrap();
        assert_eq!(pieces(Content::Dense(tensor)).len(), 1);
    }

    #[test]
    fn the_checksum_runs_over_the_payload_in_the_order_of_sending() {
        let mut ledger = Ledger::default();
        ledger.sent(&[b"1234", b"56"]);
        ledger.sent(&[]);
        ledger.sent(&[b"789"]);
        // The check value of CRC-32C.
        assert_eq!(
            ledger,
            Ledger {
                messages: 3,
                bytes: 9,
                crc32c: 0xe306_9283
            }
        );
    }
}
