//! What tonic says of messages that it cannot read, put in the API's terms: a message over the limit is
//! RESOURCE_EXHAUSTED (tonic: OUT_OF_RANGE), one that is not protobuf is INVALID_ARGUMENT (tonic: INTERNAL), and a call
//! that its `grpc-timeout` ended on our side of the wire is DEADLINE_EXCEEDED (tonic: CANCELLED).
//!
//! tonic has no types for these, so they are told by their text; the loopback tests fail if a new version words
//! them differently.

use tonic::{Code, Status, Streaming};

use crate::status::{self, ErrorCode};

const TOO_LARGE: [&str; 2] =
    ["Error, decoded message length too large", "Error, encoded message length too large"];
const TIMED_OUT: &str = "Timeout expired";
const UNREADABLE: [&str; 5] = [
    "failed to decode Protobuf message",
    "protocol error: received message with",
    "Unexpected EOF decoding stream",
    "Missing request message",
    "Error decompressing",
];

/// Returns the next message of a request stream, or `None` at its end. Errors are in the API's terms:
/// RESOURCE_EXHAUSTED for a message over the limit, INVALID_ARGUMENT for one that cannot be read.
pub async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
    stream.message().await.map_err(decode_status)
}

/// Puts a status from reading a request stream or from calling another service in the API's terms; any other status
/// passes through.
pub(crate) fn decode_status(status: Status) -> Status {
    let starts = |texts: &[&str]| texts.iter().any(|text| status.message().starts_with(text));
    match status.code() {
        Code::OutOfRange if starts(&TOO_LARGE) => {
            ErrorCode::ResourceExhausted.status(too_large(status.message()))
        }
        Code::Internal if starts(&UNREADABLE) => ErrorCode::InvalidArgument
            .status(format!("message must be protobuf of this RPC's request: {}", status.message())),
        Code::Cancelled if status.message() == TIMED_OUT => status::deadline_exceeded(),
        _ => status,
    }
}

/// Names limit and value of a message that is too large: tonic's text ends "found {n} bytes, the limit is: {n} bytes".
fn too_large(text: &str) -> String {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
    match (numbers.next(), numbers.next()) {
        (Some(found), Some(limit)) => {
            format!("message must be at most {limit} bytes (server.max_message_bytes), got {found}")
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_large_names_limit_and_value_and_other_ranges_stay() {
        let text = "Error, decoded message length too large: found 70 bytes, the limit is: 64 bytes";
        let status = decode_status(Status::out_of_range(text));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "message must be at most 64 bytes (server.max_message_bytes), got 70");
        assert_eq!(decode_status(Status::out_of_range("page 9")).code(), Code::OutOfRange);
    }

    #[test]
    fn unreadable_is_the_callers_fault_and_our_faults_stay_ours() {
        let status = decode_status(Status::internal("failed to decode Protobuf message: buffer underflow"));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(decode_status(Status::internal("engine stopped")).code(), Code::Internal);
    }
}
