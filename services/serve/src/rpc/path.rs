//! What the path of a call says of it.

use http::Request;
use tonic::body::Body;

/// What the paths of health checks and reflection begin with. They, and with them every watch of the contracts, are
/// answered before the service is ready,
/// stopped as soon as shutdown begins (a watch would never end), and neither traced nor counted, since probes would
/// drown what people look for.
pub(super) const INFRASTRUCTURE: &str = "/grpc.";
/// What the paths of health checks begin with. They need no token: probes have none, and learn only whether to come
/// back.
pub(super) const HEALTH: &str = "/grpc.health.";
/// What the path of a stage's `Info` ends with. The router asks every replica for it every few seconds, so it is
/// counted, but not traced, and logged only when it fails.
pub(super) const PROBE: &str = "/Info";

/// Returns the method of a call as `package.Service/Method`.
pub(super) fn method_of(request: &Request<Body>) -> &str {
    request.uri().path().trim_start_matches('/')
}
