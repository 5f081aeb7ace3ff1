//! Why a model file is refused.

/// Every way in which reading, checking or editing a model can fail. Messages name the part of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OnnxError {
    /// The operating system would not give the file.
    #[error("\"{file}\" cannot be read: {why}")]
    Io {
        /// Name inside the model's folder.
        file: String,
        /// What the system said.
        why: String,
    },
    /// A path that leaves the folder, or something that is not a plain file.
    #[error("\"{file}\" is refused: {why}")]
    Confined {
        /// Name as the model gives it.
        file: String,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The bytes are not the file format.
    #[error("not an ONNX model: {0}")]
    Malformed(String),
    /// A bound of [`super::Limits`] is passed.
    #[error("the model is too large: {what} passes the limit of {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// The format's rules are broken at a place.
    #[error("{place}: {why}")]
    Invalid {
        /// Node, value or field.
        place: String,
        /// The rule that it breaks.
        why: String,
    },
    /// An edit cannot be made.
    #[error("the graph cannot be edited: {0}")]
    Patch(String),
}

impl OnnxError {
    pub(crate) fn invalid(place: impl Into<String>, why: impl Into<String>) -> Self {
        OnnxError::Invalid {
            place: place.into(),
            why: why.into(),
        }
    }
}
