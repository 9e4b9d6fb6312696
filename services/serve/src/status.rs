//! Errors of the API: `google.rpc.Status` with details. One list of codes, one match to gRPC's.
//!
//! Details travel in a header, and a client's HTTP/2 stack refuses header lists over 16 KiB, so their number and
//! length are bounded here.

use std::{fmt::Display, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetail, ErrorDetails, FieldViolation, RequestInfo, StatusExt};

/// Most violations that one status carries; the rest are counted.
const MAX_VIOLATIONS: usize = 8;
/// Longest text of one violation or message in bytes: callers quote values, and values can be anything.
const MAX_TEXT_BYTES: usize = 512;

/// The kinds of errors that the API has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The request breaks a stated limit, and will never work as it is.
    InvalidArgument,
    /// What the request names, such as its model, does not exist.
    NotFound,
    /// The service is full now, or a message is over the limit.
    ResourceExhausted,
    /// The caller's deadline passed.
    DeadlineExceeded,
    /// The caller left.
    Cancelled,
    /// The call carries no valid credentials.
    Unauthenticated,
    /// The service is not ready or shuts down, or no replica of a stage is left.
    Unavailable,
    /// The fault is the service's own, never the input's.
    Internal,
}

impl ErrorCode {
    /// Returns the gRPC code of this kind of error: the one place where errors become codes.
    pub fn code(self) -> Code {
        match self {
            Self::InvalidArgument => Code::InvalidArgument,
            Self::NotFound => Code::NotFound,
            Self::ResourceExhausted => Code::ResourceExhausted,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::Unauthenticated => Code::Unauthenticated,
            Self::Unavailable => Code::Unavailable,
            Self::Internal => Code::Internal,
        }
    }

    /// Returns a status of this kind without details. A message over 512 bytes is cut.
    pub fn status(self, message: impl Into<String>) -> Status {
        Status::new(self.code(), shorten(message.into()))
    }
}

/// A rule that one field of a request breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field in its message, such as `prompt.parts[2].image`.
    pub field: String,
    /// What is wrong, which reads on from the field's name: "must be …, got …".
    pub description: String,
}

impl Violation {
    /// Returns the violation of a field; texts over 512 bytes are cut.
    pub fn new(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self { field: shorten(field.into()), description: shorten(description.into()) }
    }

    /// Returns the violation of a field whose value is not in `min` to `max`, both included.
    pub fn out_of_range(
        field: impl Into<String>,
        min: impl Display,
        max: impl Display,
        value: impl Display,
    ) -> Self {
        Self::new(field, format!("must be {min} to {max}, got {value}"))
    }
}

impl Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.field, self.description)
    }
}

impl From<Violation> for Status {
    fn from(violation: Violation) -> Self {
        invalid(vec![violation])
    }
}

/// Returns INVALID_ARGUMENT with BadRequest details, which list the first 8 violations; the message counts the rest.
pub fn invalid(violations: Vec<Violation>) -> Status {
    let mut message = violations.first().map_or_else(|| "invalid request".into(), Violation::to_string);
    if violations.len() > 1 {
        message.push_str(&format!(" (and {} more)", violations.len() - 1));
    }
    let fields = violations.into_iter().take(MAX_VIOLATIONS);
    let fields: Vec<_> = fields.map(|it| FieldViolation::new(it.field, it.description)).collect();
    Status::with_error_details(
        ErrorCode::InvalidArgument.code(),
        message,
        ErrorDetails::with_bad_request(fields),
    )
}

/// Returns NOT_FOUND with ResourceInfo: there is no `kind` ("model") of that `name`.
pub fn not_found(kind: &str, name: &str) -> Status {
    let name = shorten(name.to_owned());
    let message = format!("{kind} {name:?} not found");
    let details = ErrorDetails::with_resource_info(kind, name, "", message.clone());
    Status::with_error_details(ErrorCode::NotFound.code(), message, details)
}

/// Returns RESOURCE_EXHAUSTED with RetryInfo: the caller may try again after so long.
pub fn exhausted(message: impl Into<String>, retry_after: Duration) -> Status {
    let details = ErrorDetails::with_retry_info(Some(retry_after));
    Status::with_error_details(ErrorCode::ResourceExhausted.code(), shorten(message.into()), details)
}

/// Returns DEADLINE_EXCEEDED: the caller's deadline has passed.
pub fn deadline_exceeded() -> Status {
    ErrorCode::DeadlineExceeded.status("the deadline of the request has passed")
}

/// Returns CANCELLED: the caller has left.
pub fn cancelled() -> Status {
    ErrorCode::Cancelled.status("the caller has left")
}

/// Returns UNAVAILABLE: another replica, or the same one later, may answer.
pub fn unavailable(message: impl Into<String>) -> Status {
    ErrorCode::Unavailable.status(message)
}

/// Returns UNAVAILABLE with RetryInfo: the caller may try again after so long.
pub fn unavailable_for(message: impl Into<String>, retry_after: Duration) -> Status {
    let details = ErrorDetails::with_retry_info(Some(retry_after));
    Status::with_error_details(ErrorCode::Unavailable.code(), shorten(message.into()), details)
}

/// Why a service that answers does not serve: the `ErrorInfo.reason` of its UNAVAILABLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotServing {
    /// It is loading, or its engine has failed.
    NotReady,
    /// It is shutting down.
    Draining,
}

impl NotServing {
    const DOMAIN: &'static str = "emu2";

    /// Returns the reason as ErrorInfo carries it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotReady => "NOT_READY",
            Self::Draining => "DRAINING",
        }
    }

    /// Returns UNAVAILABLE for this reason.
    pub fn status(self, message: impl Into<String>) -> Status {
        let details = ErrorDetails::with_error_info(self.reason(), Self::DOMAIN, []);
        Status::with_error_details(ErrorCode::Unavailable.code(), shorten(message.into()), details)
    }

    /// Returns the reason that a status names, if it is one of these.
    pub fn of(status: &Status) -> Option<Self> {
        let info = status.get_details_error_info().filter(|info| info.domain == Self::DOMAIN)?;
        [Self::NotReady, Self::Draining].into_iter().find(|it| it.reason() == info.reason)
    }
}

/// Returns INTERNAL: the fault is the service's own. The message goes to the caller, so it names no paths and no
/// inputs.
pub fn internal(message: impl Into<String>) -> Status {
    ErrorCode::Internal.status(message)
}

/// Returns the status with RequestInfo naming the request; what it already carries stays.
pub(crate) fn with_request_id(status: &Status, request_id: &str) -> Status {
    let Ok(mut details) = status.check_error_details_vec() else {
        // Details of a type that we do not know are worth more than the id, which is in the metadata as well.
        return Status::with_details(status.code(), status.message(), status.details().to_vec().into());
    };
    details.retain(|detail| !matches!(detail, ErrorDetail::RequestInfo(_)));
    details.push(RequestInfo::new(request_id, "").into());
    Status::with_error_details_vec(status.code(), status.message(), details)
}

/// Returns gRPC's canonical name of a code, such as `NOT_FOUND`.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

fn shorten(mut text: String) -> String {
    if text.len() > MAX_TEXT_BYTES {
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_names_field_limit_and_value() {
        let status = invalid(vec![
            Violation::out_of_range("image.steps", 1, 1000, 10_000),
            Violation::new("image.height", "must be a multiple of 8, got 1001"),
        ]);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "image.steps must be 1 to 1000, got 10000 (and 1 more)");
        let fields = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(fields[1].field, "image.height");
        assert_eq!(fields[0].description, "must be 1 to 1000, got 10000");
    }

    #[test]
    fn details_are_bounded() {
        let violations = (0..500).map(|index| Violation::new(format!("parts[{index}]"), "é".repeat(10_000)));
        let status = invalid(violations.collect());
        assert_eq!(status.get_details_bad_request().unwrap().field_violations.len(), MAX_VIOLATIONS);
        // Base64 adds a third; a percent-encoded message triples: 16 KiB holds both.
        assert!(
            status.details().len() * 4 / 3 + status.message().len() * 3 < 14_000,
            "{}",
            status.details().len()
        );
    }

    #[test]
    fn the_request_id_joins_what_is_there() {
        let status = with_request_id(&exhausted("full", Duration::from_secs(1)), "abc");
        assert_eq!(status.get_details_request_info().unwrap().request_id, "abc");
        assert!(status.get_details_retry_info().is_some());
        let again = with_request_id(&status, "def");
        assert_eq!(again.get_error_details_vec().len(), 2);
        assert_eq!(again.get_details_request_info().unwrap().request_id, "def");
    }

    #[test]
    fn why_a_service_does_not_serve_can_be_read_again() {
        for reason in [NotServing::NotReady, NotServing::Draining] {
            assert_eq!(NotServing::of(&reason.status("later")), Some(reason));
        }
        assert_eq!(NotServing::of(&unavailable("later")), None);
        assert!(unavailable_for("later", Duration::from_secs(2)).get_details_retry_info().is_some());
    }

    #[test]
    fn a_missing_model_is_a_resource() {
        let info = not_found("model", "emu3").get_details_resource_info().unwrap();
        assert_eq!((info.resource_type.as_str(), info.resource_name.as_str()), ("model", "emu3"));
    }
}
