//! The ONNX file format and the graph in it: read, check, edit, write.
//!
//! What it promises, in the order in which a file passes through:
//! 1. [`Folder`] opens files beneath the model's folder only: no path out, no links, regular files.
//! 2. [`Limits`] are held by a scan of the raw bytes, before anything is allocated for them.
//! 3. [`Model::open`] decodes with the weights still in the mapped file, inlines local functions and builds the
//!    [`Graph`]: unique names, no cycle, nothing dangling, topological order.
//! 4. A [`Patch`] is an edit as a value; applying it gives a new graph that has passed the same checks.
//! 5. [`Model::encode`] writes a model again, large weights by reference to the file they came from.
//!
//! Left out on purpose: shape inference (shapes are measured, see [`crate::anatomy`]), constant folding, edits
//! inside the subgraphs of control-flow operators.

mod attribute;
mod check;
mod constant;
mod dump;
mod encode;
mod error;
mod external;
mod folder;
mod functions;
mod graph;
mod limits;
mod load;
mod mapped;
mod node;
mod patch;
mod proto;
mod scan;
mod types;
mod write;

#[cfg(test)]
mod build;

pub use attribute::Attribute;
pub use encode::Weights;
pub use error::OnnxError;
pub use folder::Folder;
pub use graph::{Dim, Graph, Initializer, NodeId, Origin, Port, TypeFact, ValueId};
pub use limits::Limits;
pub use load::Model;
pub use node::Node;
pub use patch::{NodeSpec, Patch};
pub use proto::{dtype_of, number_of};
pub use write::{END, Writer};
