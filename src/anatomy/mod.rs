//! Finds the transformer in a graph: residual stream, attention, MLP, embedding and head.
