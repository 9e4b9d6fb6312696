//! Why a request ends early, and what a stage's refusal means to the client.

use emu2_serve::{
    parameters,
    status::{self, NotServing, Violation},
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Why work on a request stops.
#[derive(Clone, Debug)]
pub(crate) enum Stop {
    /// A stage answered with other weights than the request began with.
    WeightsChanged,
    /// Nobody listens any more.
    Left,
    Failed(Status),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

impl From<emu2_serve::stream::Closed> for Stop {
    fn from(_: emu2_serve::stream::Closed) -> Self {
        Self::Left
    }
}

impl From<Stop> for Status {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::WeightsChanged => status::unavailable("the model's weights are being replaced: ask again"),
            Stop::Left => status::cancelled(),
            Stop::Failed(status) => status,
        }
    }
}

/// Whether the replica is lost or leaving, rather than the request refused: another replica may do it. A status that
/// has a source never crossed the wire: the connection broke, or closed before it had sent the request (CANCELLED, from
/// hyper), or time is up (CANCELLED too, from tonic).
pub(crate) fn is_replica_lost(status: &Status) -> bool {
    let source = std::error::Error::source(status);
    let mut causes = std::iter::successors(source, |error| error.source());
    let time_is_up = causes.any(|error| error.is::<tonic::TimeoutExpired>());
    status.code() == Code::Unavailable || (source.is_some() && !time_is_up)
}

/// Whether nobody took the call: no connection came about.
pub(crate) fn never_arrived(status: &Status) -> bool {
    let mut causes = std::iter::successors(std::error::Error::source(status), |error| error.source());
    causes.any(|error| error.is::<tonic::ConnectError>())
}

/// Whether the connection closed before it had sent the call: the replica may be there all the same.
pub(crate) fn was_never_sent(status: &Status) -> bool {
    status.code() == Code::Cancelled && is_replica_lost(status)
}

/// Whether the replica's machine refused the connection: nothing listens there, as after the end of a process.
pub(crate) fn is_refused(status: &Status) -> bool {
    let mut causes = std::iter::successors(std::error::Error::source(status), |error| error.source());
    causes.any(|error| {
        let io = error.downcast_ref::<std::io::Error>();
        io.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    })
}

/// How a replica was lost, as logs and metrics name it.
pub(crate) fn loss_name(status: &Status) -> &'static str {
    match NotServing::of(status) {
        Some(NotServing::NotReady) => "not_ready",
        Some(NotServing::Draining) => "draining",
        None if is_refused(status) => "refused",
        None if never_arrived(status) => "unreachable",
        None if std::error::Error::source(status).is_some() => "reset",
        None => "lost",
    }
}

/// How a replica of a stage was lost, for the client.
pub(crate) fn of_loss(stage: &str, status: &Status) -> String {
    match loss_name(status) {
        "refused" => format!("the {stage} replica refuses connections"),
        "unreachable" => format!("the {stage} replica cannot be reached"),
        "reset" => format!("the connection to the {stage} replica broke"),
        _ => status.message().to_owned(),
    }
}

/// A status and all that led to it, for logs: what a connection broke by stands at the end of a chain of causes.
pub(crate) fn causes(status: &Status) -> String {
    let mut said = match status.message() {
        "" => vec![status.code().to_string()],
        message => vec![message.to_owned()],
    };
    for cause in std::iter::successors(std::error::Error::source(status), |error| error.source()) {
        let cause = cause.to_string();
        // Many repeat those above or below them.
        if !said.iter().any(|earlier| earlier.contains(&cause)) {
            said.push(cause);
        }
    }
    said.join(": ")
}

/// A stage's status in the terms of the public request. `public` translates the name of one of the stage's fields;
/// a field without a public name was filled by us, so that its violation is our fault.
pub(crate) fn of_stage(stage: &str, status: &Status, public: impl Fn(&str) -> Option<String>) -> Status {
    if is_replica_lost(status) {
        let text = format!("the {stage} stage was lost: {}", status.message());
        return match status.get_details_retry_info().and_then(|info| info.retry_delay) {
            Some(retry_after) => status::unavailable_for(text, retry_after),
            None => status::unavailable(text),
        };
    }
    match status.code() {
        Code::InvalidArgument => refusal(stage, status, public),
        // With its details (RetryInfo), without the stage's response headers.
        code @ (Code::ResourceExhausted | Code::DeadlineExceeded) => {
            Status::with_details(code, status.message(), status.details().to_vec().into())
        }
        // Ours when time is up (which the request's own deadline has told the client by then); a stage cancels only
        // when it stops.
        Code::Cancelled => status::unavailable(format!("the {stage} stage stopped: {}", status.message())),
        _ => status::internal(format!("the {stage} stage failed: {}", status.message())),
    }
}

/// What a stage's call ended with, in the terms of the public request.
pub(crate) fn in_public_terms(stage: &str, stop: Stop, public: impl Fn(&str) -> Option<String>) -> Stop {
    match stop {
        Stop::Failed(status) => Stop::Failed(of_stage(stage, &status, public)),
        Stop::WeightsChanged | Stop::Left => stop,
    }
}

/// The same for the llm and the decoder, whose messages hold the request's own under its own names.
pub(crate) fn in_terms_of_request(stage: &str, stop: Stop) -> Stop {
    in_public_terms(stage, stop, |field| parameters::is_of_request(field).then(|| field.to_owned()))
}

fn refusal(stage: &str, status: &Status, public: impl Fn(&str) -> Option<String>) -> Status {
    let fields = status.get_details_bad_request().map(|details| details.field_violations).unwrap_or_default();
    let translate = |field: &str| public(field).ok_or_else(|| field.to_owned());
    let violations = fields.into_iter().map(|it| Ok(Violation::new(translate(&it.field)?, it.description)));
    match violations.collect::<Result<Vec<_>, String>>() {
        Ok(violations) if !violations.is_empty() => status::invalid(violations),
        _ => {
            status::internal(format!("the {stage} stage refused what the router sent: {}", status.message()))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn public(field: &str) -> Option<String> {
        (field == "image").then(|| "prompt.parts[3].image".to_owned())
    }

    #[test]
    fn a_refusal_names_the_public_field() {
        let refused = status::invalid(vec![Violation::new("image", "must be an image, got 3 bytes of text")]);
        let translated = of_stage("encoder", &refused, public);
        assert_eq!(translated.code(), Code::InvalidArgument);
        let fields = translated.get_details_bad_request().unwrap().field_violations;
        assert_eq!(fields[0].field, "prompt.parts[3].image");
        assert_eq!(fields[0].description, "must be an image, got 3 bytes of text");
    }

    #[test]
    fn a_refusal_of_what_we_filled_in_is_our_fault() {
        let refused = status::invalid(vec![Violation::new("n_query", "must be 1 to 1024, got 0")]);
        assert_eq!(of_stage("encoder", &refused, public).code(), Code::Internal);
        assert_eq!(
            of_stage("encoder", &Status::invalid_argument("no details"), public).code(),
            Code::Internal
        );
    }

    /// Every parameter that a stage states a limit of is one that a client can set, and hears of.
    #[test]
    fn what_a_stage_refuses_of_a_requests_parameters_is_told_to_the_client() {
        let (llm, decoder) = (emu2_proto::capable::llm(), emu2_proto::capable::decoder());
        for (stage, limits) in [("llm", llm.parameter_limits), ("decoder", decoder.parameter_limits)] {
            for limit in limits {
                let refused =
                    Stop::Failed(status::invalid(vec![Violation::new(&limit.field, "must be else")]));
                let Stop::Failed(told) = in_terms_of_request(stage, refused) else { panic!("it failed") };
                assert_eq!(told.code(), Code::InvalidArgument, "{}", limit.field);
                assert_eq!(told.get_details_bad_request().unwrap().field_violations[0].field, limit.field);
            }
        }
        let ours = Stop::Failed(status::invalid(vec![Violation::new("start.queries", "must be 1 to 4")]));
        let Stop::Failed(told) = in_terms_of_request("decoder", ours) else { panic!("it failed") };
        assert_eq!(told.code(), Code::Internal);
    }

    #[test]
    fn a_full_stage_keeps_its_advice() {
        let full = status::exhausted("queue is full", Duration::from_secs(3));
        let passed = of_stage("llm", &full, public);
        assert_eq!(passed.code(), Code::ResourceExhausted);
        assert_eq!(passed.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(3)));
    }

    #[test]
    fn a_broken_connection_is_a_lost_replica_and_time_that_is_up_is_not() {
        let local = |source| {
            let source: Box<dyn std::error::Error + Send + Sync> = source;
            is_replica_lost(&Status::from_error(source))
        };
        assert!(local(Box::new(std::io::Error::other("broken pipe"))));
        assert!(!local(Box::new(tonic::TimeoutExpired(()))));
        assert!(is_replica_lost(&Status::unavailable("stopping")));
        assert!(!is_replica_lost(&Status::cancelled("by the stage")));
    }

    #[test]
    fn a_loss_is_named_by_its_cause() {
        let local = |error: std::io::Error| Status::from_error(Box::new(error));
        for (status, name) in [
            (local(std::io::ErrorKind::ConnectionRefused.into()), "refused"),
            (local(std::io::ErrorKind::ConnectionReset.into()), "reset"),
            (NotServing::NotReady.status("not ready: loading"), "not_ready"),
            (NotServing::Draining.status("the server is shutting down"), "draining"),
            (status::unavailable("stopping"), "lost"),
        ] {
            assert_eq!(loss_name(&status), name);
            assert!(is_replica_lost(&status), "{name}");
        }
    }

    #[test]
    fn the_causes_of_a_status_are_told_to_the_last_and_each_once() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let nested = std::io::Error::other(std::io::Error::other(refused));
        assert_eq!(causes(&Status::from_error(Box::new(nested))), "connection refused");
        assert_eq!(causes(&Status::unavailable("stopping")), "stopping");
        assert!(causes(&Status::unavailable("")).contains("unavailable"));
    }

    #[test]
    fn other_failures_are_unavailable_or_internal() {
        for (code, becomes) in [
            (Code::Unavailable, Code::Unavailable),
            (Code::Cancelled, Code::Unavailable),
            (Code::Internal, Code::Internal),
            (Code::OutOfRange, Code::Internal),
            (Code::Unimplemented, Code::Internal),
            (Code::NotFound, Code::Internal),
            (Code::DeadlineExceeded, Code::DeadlineExceeded),
        ] {
            assert_eq!(of_stage("llm", &Status::new(code, "x"), public).code(), becomes, "{code:?}");
        }
    }
}
