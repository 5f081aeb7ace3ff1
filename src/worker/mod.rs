//! The child process that holds one generation of a model.
