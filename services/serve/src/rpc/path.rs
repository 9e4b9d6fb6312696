//! What the path of a call says of it.

use http::Request;
use tonic::body::Body;

/// Health checks and reflection, and with them every watch of the contracts: answered before the service is ready,
/// stopped as soon as shutdown begins (a watch would never end), and neither traced nor counted, since probes would
/// drown what people look for.
pub(super) const INFRASTRUCTURE: &str = "/grpc.";
/// The one of these that needs no token: probes have none, and learn only whether to come back.
pub(super) const HEALTH: &str = "/grpc.health.";
/// The router asks every replica for this every few seconds: counted, but not traced, and logged only when it fails.
pub(super) const PROBE: &str = "/Info";

/// `package.Service/Method`
pub(super) fn method_of(request: &Request<Body>) -> &str {
    request.uri().path().trim_start_matches('/')
}
