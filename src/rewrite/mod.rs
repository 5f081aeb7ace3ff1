//! Makes the graph of a variant from a model and what was asked of it.
