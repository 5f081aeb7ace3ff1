//! The generated public wire types. Their documentation is that of the protos.

/// `introspect.v1`.
pub mod introspect {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        clippy::wildcard_enum_match_arm
    )]
    tonic::include_proto!("introspect.v1");
}

/// `inference`: the Open Inference Protocol.
pub mod inference {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        clippy::wildcard_enum_match_arm
    )]
    tonic::include_proto!("inference");
}

/// Descriptors of both, as reflection serves them.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/public.descriptors"));
