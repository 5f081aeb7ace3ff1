//! What a model file may be at most.

/// Bounds on a model file; a file that passes one is refused with [`super::OnnxError::Limit`] before the memory is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one file. Files are mapped, so this may be larger than memory.
    pub file_bytes: u64,
    /// Bytes of all weights together.
    pub weight_bytes: u64,
    /// Memory that the decoded messages may take, weights that stay in the mapped file left out. Also bounds what
    /// inlining functions may add. A graph of ten thousand nodes takes about a tenth of the default.
    pub decoded_bytes: u64,
    /// Nesting of messages. A subgraph takes three levels.
    pub depth: u32,
    /// Nodes of the graph and its subgraphs, functions inlined.
    pub nodes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_bytes: 1 << 40,
            weight_bytes: 1 << 40,
            decoded_bytes: 512 << 20,
            // Below the hundred at which protobuf decoders stop.
            depth: 48,
            nodes: 200_000,
        }
    }
}

impl Limits {
    /// Subgraphs in subgraphs, and functions that call functions.
    pub(super) fn levels(&self) -> u32 {
        self.depth / 3
    }
}
