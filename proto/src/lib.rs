//! The contracts of the cluster: what its services say to clients and to each other.
//!
//! | module | holds |
//! |---|---|
//! | [`v1`] | the public interface, package `emu2.v1` |
//! | [`stage`] | router to stage, package `emu2.stage.v1` |
//! | [`mod@array`] | a tensor of the wire once it has been checked; what engines exchange with their edges |
//! | `capable` | stages of the published sizes, for whatever stands in for them in tests; feature `fixtures` |
//! | `parameter_limit` | how a stage states the limit of a parameter |
//! | [`pooling`] | how many embeddings an image can become |
//! | [`codec`] | how a message becomes the bytes of a stream |
//!
//! No tch here, so that the router builds without libtorch.

pub mod array;
#[cfg(feature = "fixtures")]
pub mod capable;
pub mod codec;
mod parameter_limit;
pub mod pooling;

pub use emu2::{stage::v1 as stage, v1};

/// Generated code refers across packages by their nesting.
#[allow(clippy::all, clippy::pedantic, unreachable_pub)]
mod emu2 {
    /// Package `emu2.v1`: the public interface.
    pub mod v1 {
        tonic::include_proto!("emu2.v1");
    }

    pub mod stage {
        /// Package `emu2.stage.v1`: what the router and the stages say to each other.
        pub mod v1 {
            tonic::include_proto!("emu2.stage.v1");
        }
    }
}

/// Encoded `FileDescriptorSet` of both packages, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/emu2.descriptors"));
