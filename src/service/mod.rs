//! The gRPC edge: the only code that names tonic and our wire types.

pub mod wire;
