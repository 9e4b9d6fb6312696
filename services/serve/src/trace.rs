//! Who asked, and as part of what: the request id and the W3C trace context, in from a caller, through every span of
//! the request (engine threads included), and out to the next service.
//!
//! Both ride in the OpenTelemetry context of the request's span, so whoever works under that span, in whatever task
//! or thread, finds them there. That needs [`crate::telemetry::init`]; without it [`RequestId::of`] still answers.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector},
    trace::TraceContextExt,
};
use tonic::{Request, Status, metadata::MetadataMap};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use uuid::Uuid;

use crate::status::Violation;

/// The metadata key that carries the request id both ways.
pub(crate) const REQUEST_ID: &str = "x-request-id";
const MAX_REQUEST_ID_BYTES: usize = 64;

/// The id of a request, 1 to 64 of `[A-Za-z0-9._-]`: safe in logs, headers and file names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(String);

impl RequestId {
    pub(crate) fn generate() -> Self {
        Self(Uuid::new_v4().to_string())
    }

    /// Reads an id that a caller chose; INVALID_ARGUMENT names what it may be made of.
    pub(crate) fn parse(text: &str) -> Result<Self, Status> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if (1..=MAX_REQUEST_ID_BYTES).contains(&text.len()) && text.bytes().all(allowed) {
            return Ok(Self(text.to_owned()));
        }
        let description = format!("must be 1 to {MAX_REQUEST_ID_BYTES} of [A-Za-z0-9._-], got {text:?}");
        Err(Violation::new(REQUEST_ID, description).into())
    }

    /// Returns the id of an incoming request, which the server has put there; outside of a server it is that of the
    /// current span's request, else a new one.
    pub fn of<T>(request: &Request<T>) -> Self {
        let held = request.extensions().get::<Self>().cloned();
        held.or_else(request_id).unwrap_or_else(Self::generate)
    }

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn of_headers(headers: &HeaderMap) -> Result<Self, Status> {
        match headers.get(REQUEST_ID) {
            None => Ok(Self::generate()),
            Some(value) => Self::parse(&String::from_utf8_lossy(value.as_bytes())),
        }
    }

    pub(crate) fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.0).expect("a request id is printable ASCII")
    }
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns the id of the request that the current span belongs to.
pub(crate) fn request_id() -> Option<RequestId> {
    Span::current().context().get::<RequestId>().cloned()
}

/// Puts the current span's trace context and request id on the metadata of a call to another service.
pub fn inject(metadata: &mut MetadataMap) {
    let context = Span::current().context();
    // tonic's map takes computed names only by way of the header map that it wraps.
    let mut headers = std::mem::take(metadata).into_headers();
    opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&context, &mut Outgoing(&mut headers));
    });
    if let Some(request_id) = context.get::<RequestId>() {
        headers.insert(REQUEST_ID, request_id.header());
    }
    *metadata = MetadataMap::from_headers(headers);
}

/// Makes a fresh span a child of the caller's and the bearer of the request id. Returns its trace id, or `None`
/// where no tracing is installed.
pub(crate) fn adopt(span: &Span, headers: &HeaderMap, request_id: &RequestId) -> Option<String> {
    let caller = opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.extract_with_context(&Context::new(), &Incoming(headers))
    });
    // Fails only where no tracing layer is installed; there is nothing to adopt then.
    span.set_parent(caller.with_value(request_id.clone())).ok()?;
    let trace_id = span.context().span().span_context().trace_id();
    Some(trace_id.to_string())
}

struct Incoming<'a>(&'a HeaderMap);

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct Outgoing<'a>(&'a mut HeaderMap);

impl Injector for Outgoing<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (key.parse::<HeaderName>(), value.parse::<HeaderValue>()) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn request_ids_are_accepted_generated_or_refused() {
        let mut headers = HeaderMap::new();
        let generated = RequestId::of_headers(&headers).unwrap();
        assert_eq!(RequestId::parse(generated.as_str()).unwrap(), generated);
        headers.insert(REQUEST_ID, "job-7.retry_2".parse().unwrap());
        assert_eq!(RequestId::of_headers(&headers).unwrap().as_str(), "job-7.retry_2");
        for bad in ["", "a b", "a/b", "é", &"a".repeat(65)] {
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(bad.as_bytes()).unwrap());
            assert_eq!(RequestId::of_headers(&headers).unwrap_err().code(), Code::InvalidArgument, "{bad:?}");
        }
    }
}
