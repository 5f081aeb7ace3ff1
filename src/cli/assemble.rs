//! An answer put together from its stream: pieces become tensors, and the summary at the end proves that all are there.
//!
//! What is checked: the order of messages (header first, nothing between the pieces of a tensor), that pieces join and fill their
//! shape, and the summary's count of messages, bytes and CRC-32C. What fails is refused, never handed on in part. Memory grows with what was
//! received, never with what a shape claims.

use bytes::Bytes;

use super::error::CliError;
use crate::{
    service::wire::introspect::{
        self as wire, CaptureHeader, CaptureResponse, Prediction, SparseTensor, Summary,
        capture_response::Item,
    },
    tensor::{DType, Tensor, byte_len},
};

/// A complete answer.
#[derive(Clone, Debug)]
pub(super) struct Captured {
    /// What came first.
    pub(super) header: CaptureHeader,
    /// The tensors, in the order of their arrival.
    pub(super) tensors: Vec<Named>,
    /// What the model predicts.
    pub(super) prediction: Option<Prediction>,
    /// What came last.
    pub(super) summary: Summary,
}

/// A tensor and what its axes mean.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Named {
    /// Canonical name of the hook point, or name of the output.
    pub(super) name: String,
    /// Meaning of each axis.
    pub(super) axes: Vec<String>,
    /// The elements.
    pub(super) data: Data,
}

/// The elements of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Data {
    /// All of them.
    Dense(Tensor),
    /// The greatest of each row.
    Sparse(Sparse),
}

/// The greatest entries of each row along the last axis.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sparse {
    /// Extents of the dense tensor.
    pub(super) shape: Vec<usize>,
    /// Entries kept of each row.
    pub(super) counts: Vec<u32>,
    /// Where each stands along the last axis.
    pub(super) indices: Vec<u32>,
    /// The entries.
    pub(super) values: Tensor,
}

impl Named {
    /// Extents of the dense tensor.
    pub(super) fn shape(&self) -> &[usize] {
        match &self.data {
            Data::Dense(tensor) => tensor.shape(),
            Data::Sparse(sparse) => &sparse.shape,
        }
    }

    /// Type of the elements.
    pub(super) fn dtype(&self) -> DType {
        match &self.data {
            Data::Dense(tensor) => tensor.dtype(),
            Data::Sparse(sparse) => sparse.values.dtype(),
        }
    }
}

/// Why a stream is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer is broken: {0}")]
pub(super) struct Broken(String);

impl Broken {
    /// For this reason.
    pub(super) fn new(why: impl Into<String>) -> Self {
        Broken(why.into())
    }
}

impl From<Broken> for CliError {
    fn from(broken: Broken) -> Self {
        CliError::new(broken.to_string()).advise("nothing was written; ask again")
    }
}

fn broken<T>(why: impl Into<String>) -> Result<T, Broken> {
    Err(Broken(why.into()))
}

/// Sums of what was received, to be compared with a summary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    messages: u64,
    bytes: u64,
    crc32c: u32,
}

impl Tally {
    /// Counts a message and its payload.
    pub(super) fn count(&mut self, payload: &[&[u8]]) {
        self.messages += 1;
        for bytes in payload {
            self.bytes += bytes.len() as u64;
            self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
        }
    }

    /// Whether the sender counted the same.
    pub(super) fn check(&self, messages: u64, bytes: u64, crc32c: u32) -> Result<(), Broken> {
        if self.messages != messages {
            return broken(format!(
                "{messages} messages were sent, {} came",
                self.messages
            ));
        }
        if self.bytes != bytes {
            return broken(format!("{bytes} bytes were sent, {} came", self.bytes));
        }
        if self.crc32c != crc32c {
            return broken("its checksum does not match its bytes");
        }
        Ok(())
    }
}

/// The payload of a message, as summaries count it.
pub(super) fn payload(message: &CaptureResponse) -> Vec<&[u8]> {
    match &message.item {
        Some(Item::Tensor(t)) => vec![&t.data],
        Some(Item::Sparse(s)) => vec![&s.counts, &s.indices, &s.values],
        Some(Item::Header(_) | Item::Prediction(_) | Item::Summary(_)) | None => Vec::new(),
    }
}

/// Takes the messages of one answer.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    tally: Tally,
    header: Option<CaptureHeader>,
    tensors: Vec<Named>,
    open: Option<Open>,
    prediction: Option<Prediction>,
}

/// A tensor of which pieces are missing.
#[derive(Debug)]
enum Open {
    Dense { first: wire::Tensor, data: Vec<u8> },
    Sparse(SparseTensor, SparseParts),
}

#[derive(Debug, Default)]
struct SparseParts {
    counts: Vec<u8>,
    indices: Vec<u8>,
    values: Vec<u8>,
}

impl Assembler {
    /// Takes a message; gives the answer when this was its last.
    pub(super) fn take(&mut self, message: CaptureResponse) -> Result<Option<Captured>, Broken> {
        if let Some(Item::Summary(summary)) = message.item {
            return self.finish(summary).map(Some);
        }
        self.tally.count(&payload(&message));
        match message.item {
            Some(Item::Header(header)) => {
                if self.header.replace(header).is_some() {
                    return broken("it has two headers");
                }
            }
            Some(_) | None if self.header.is_none() => return broken("it begins without a header"),
            Some(Item::Tensor(piece)) => self.dense(piece)?,
            Some(Item::Sparse(piece)) => self.sparse(piece)?,
            Some(Item::Prediction(prediction)) => {
                self.nothing_open()?;
                self.prediction = Some(prediction);
            }
            Some(Item::Summary(_)) | None => {
                return broken("it has a message of a kind that this client does not know");
            }
        }
        Ok(None)
    }

    fn nothing_open(&self) -> Result<(), Broken> {
        let name = match &self.open {
            None => return Ok(()),
            Some(Open::Dense { first, .. }) => &first.name,
            Some(Open::Sparse(first, _)) => &first.name,
        };
        broken(format!("tensor \"{name}\" is incomplete"))
    }

    fn dense(&mut self, piece: wire::Tensor) -> Result<(), Broken> {
        let (first, mut data) = match self.open.take() {
            None if piece.offset == 0 => {
                let data = Vec::new();
                (piece.clone(), data)
            }
            Some(Open::Dense { first, data })
                if first.name == piece.name
                    && first.shape == piece.shape
                    && first.dtype == piece.dtype
                    && data.len() as u64 == piece.offset =>
            {
                (first, data)
            }
            Some(Open::Dense { .. } | Open::Sparse(..)) | None => {
                return broken(format!(
                    "a piece of tensor \"{}\" does not join",
                    piece.name
                ));
            }
        };
        let (dtype, shape) = kind(&first.name, first.dtype, &first.shape)?;
        data.extend_from_slice(&piece.data);
        let whole = byte_len(dtype, &shape);
        match (data.len() as u128).cmp(&whole) {
            std::cmp::Ordering::Less if piece.data.is_empty() => {
                broken(format!("a piece of tensor \"{}\" is empty", first.name))
            }
            std::cmp::Ordering::Less => {
                self.open = Some(Open::Dense { first, data });
                Ok(())
            }
            std::cmp::Ordering::Equal => {
                let tensor = Tensor::new(dtype, shape, Bytes::from(data))
                    .map_err(|e| Broken(format!("tensor \"{}\": {e}", first.name)))?;
                self.tensors.push(Named {
                    name: first.name,
                    axes: first.axes,
                    data: Data::Dense(tensor),
                });
                Ok(())
            }
            std::cmp::Ordering::Greater => broken(format!(
                "tensor \"{}\" has more bytes than its shape",
                first.name
            )),
        }
    }

    fn sparse(&mut self, piece: SparseTensor) -> Result<(), Broken> {
        let (first, mut parts) = match self.open.take() {
            None if piece.first_row == 0 => (piece.clone(), SparseParts::default()),
            Some(Open::Sparse(first, parts))
                if first.name == piece.name
                    && first.shape == piece.shape
                    && first.dtype == piece.dtype
                    && (parts.counts.len() / 4) as u64 == piece.first_row =>
            {
                (first, parts)
            }
            Some(Open::Dense { .. } | Open::Sparse(..)) | None => {
                return broken(format!(
                    "a piece of tensor \"{}\" does not join",
                    piece.name
                ));
            }
        };
        let (dtype, shape) = kind(&first.name, first.dtype, &first.shape)?;
        let Some((_, outer)) = shape.split_last() else {
            return broken(format!("sparse tensor \"{}\" has no axis", first.name));
        };
        let rows = outer
            .iter()
            .fold(1u128, |n, d| n.saturating_mul(*d as u128));
        let more = !piece.counts.is_empty();
        parts.counts.extend_from_slice(&piece.counts);
        parts.indices.extend_from_slice(&piece.indices);
        parts.values.extend_from_slice(&piece.values);
        match (parts.counts.len() as u128).cmp(&(rows * 4)) {
            std::cmp::Ordering::Less if more => {
                self.open = Some(Open::Sparse(first, parts));
                Ok(())
            }
            std::cmp::Ordering::Less | std::cmp::Ordering::Greater => broken(format!(
                "sparse tensor \"{}\" has not the rows of its shape",
                first.name
            )),
            std::cmp::Ordering::Equal => {
                let name = first.name.clone();
                let data = join(dtype, shape, parts)
                    .map_err(|why| Broken(format!("sparse tensor \"{name}\": {why}")))?;
                self.tensors.push(Named {
                    name: first.name,
                    axes: first.axes,
                    data: Data::Sparse(data),
                });
                Ok(())
            }
        }
    }

    fn finish(&mut self, summary: Summary) -> Result<Captured, Broken> {
        self.nothing_open()?;
        self.tally
            .check(summary.messages, summary.bytes, summary.crc32c)?;
        let Some(header) = self.header.take() else {
            return broken("it begins without a header");
        };
        let came: Vec<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        if came != header.tensors {
            return broken(format!(
                "its header announces [{}], [{}] came",
                header.tensors.join(", "),
                came.join(", ")
            ));
        }
        Ok(Captured {
            header,
            tensors: std::mem::take(&mut self.tensors),
            prediction: self.prediction.take(),
            summary,
        })
    }
}

fn kind(name: &str, dtype: i32, shape: &[u64]) -> Result<(DType, Vec<usize>), Broken> {
    let dtype = u32::try_from(dtype)
        .ok()
        .and_then(|n| DType::try_from(n).ok())
        .ok_or_else(|| Broken(format!("tensor \"{name}\" has an unknown type")))?;
    let shape = shape
        .iter()
        .map(|d| usize::try_from(*d))
        .collect::<Result<_, _>>()
        .map_err(|_| Broken(format!("tensor \"{name}\" does not fit this machine")))?;
    Ok((dtype, shape))
}

fn join(dtype: DType, shape: Vec<usize>, parts: SparseParts) -> Result<Sparse, String> {
    let counts = numbers(&parts.counts)?;
    let indices = numbers(&parts.indices)?;
    let kept: u64 = counts.iter().map(|c| u64::from(*c)).sum();
    if kept != indices.len() as u64 {
        return Err(format!(
            "{kept} entries are counted, {} placed",
            indices.len()
        ));
    }
    let last = shape.last().copied().unwrap_or(0);
    if let Some(outside) = indices.iter().find(|i| **i as usize >= last) {
        return Err(format!("entry {outside} lies outside of an axis of {last}"));
    }
    let values = Tensor::new(dtype, vec![indices.len()], Bytes::from(parts.values))
        .map_err(|e| e.to_string())?;
    Ok(Sparse {
        shape,
        counts,
        indices,
        values,
    })
}

fn numbers(bytes: &[u8]) -> Result<Vec<u32>, String> {
    let (chunks, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err("its numbers are cut off".into());
    }
    Ok(chunks.iter().map(|c| u32::from_le_bytes(*c)).collect())
}

#[cfg(test)]
mod tests;
