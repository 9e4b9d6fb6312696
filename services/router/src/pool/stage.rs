//! What the pool knows of a stage: its client, and what a replica of it says of itself.

use emu2_proto::stage::Load;
use tonic::{Response, Status, Streaming, transport::Channel};

/// One of the three stages: its client and what it says of itself.
pub(crate) trait Stage: Send + Sync + 'static {
    /// The stage's name in messages, spans and labels.
    const NAME: &'static str;
    /// The stage's gRPC client.
    type Client: Clone + Send + Sync;
    /// The answer of its `Info`.
    type Info: Send + Sync;

    fn client(channel: Channel, max_message_bytes: usize) -> Self::Client;
    fn info(client: Self::Client) -> impl Future<Output = Result<Self::Info, Status>> + Send;
    fn watch_load(
        client: Self::Client,
    ) -> impl Future<Output = Result<Response<Streaming<Load>>, Status>> + Send;
    /// The digest of the weights that a replica serves.
    fn digest(info: &Self::Info) -> &str;
    /// The load of a replica when it answered.
    fn load(info: &Self::Info) -> Load;
}
