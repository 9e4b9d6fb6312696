//! What stops an RPC from outside.

use std::pin::Pin;

use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    deadline::Deadline,
    status::{self, NotServing},
};

/// A future that resolves once an RPC has to stop, to the status that says why.
pub(super) type Stop = Pin<Box<dyn Future<Output = Status> + Send>>;

/// Stops an RPC when its deadline passes or `cut`, the token that ends all RPCs, is cancelled.
pub(super) fn stop(deadline: Deadline, cut: CancellationToken) -> Stop {
    Box::pin(async move {
        tokio::select! {
            () = deadline.passed() => status::deadline_exceeded(),
            () = cut.cancelled_owned() => NotServing::Draining.status("the server is shutting down"),
        }
    })
}
