//! The caller's deadline (`grpc-timeout`) as a budget: read once on arrival, watched while working, handed down with
//! what is left of it. tonic's own timeout ends at the response headers, so it would never stop a stream.

use std::{future::Future, time::Duration};

use http::HeaderMap;
use tokio::time::Instant;
use tonic::{
    Request, Status,
    metadata::{MetadataMap, MetadataValue},
};

use crate::status::{self, Violation};

const HEADER: &str = "grpc-timeout";
/// Most digits of a `grpc-timeout`, as the gRPC specification says.
const MAX_DIGITS: usize = 8;
const MAX_VALUE: u128 = 99_999_999;
const HOUR_SECONDS: u64 = 3600;

/// The instant at which a caller stops waiting; one that is `none` never passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// Returns the deadline that never passes.
    pub const fn none() -> Self {
        Self(None)
    }

    /// Returns the deadline that passes when `budget` has gone by from now.
    pub fn after(budget: Duration) -> Self {
        // A budget beyond the clock's range is no deadline.
        Self(Instant::now().checked_add(budget))
    }

    /// Returns the deadline of an incoming request: the instant that the server fixed on arrival, else its
    /// `grpc-timeout` counted from now.
    pub fn of<T>(request: &Request<T>) -> Self {
        let fixed = request.extensions().get::<Self>().copied();
        fixed.unwrap_or_else(|| Self::of_metadata(request.metadata()))
    }

    /// Returns the deadline of a `grpc-timeout` counted from now; a malformed one counts as none (the server has
    /// refused it before).
    pub fn of_metadata(metadata: &MetadataMap) -> Self {
        Self::of_headers(metadata.as_ref()).unwrap_or_default()
    }

    pub(crate) fn of_headers(headers: &HeaderMap) -> Result<Self, Status> {
        let Some(value) = headers.get(HEADER) else {
            return Ok(Self::none());
        };
        let budget = value.to_str().ok().and_then(parse).ok_or_else(|| {
            let description = format!("must be 1 to 8 digits and a unit of H, M, S, m, u, n, got {value:?}");
            status::invalid(vec![Violation::new(HEADER, description)])
        })?;
        Ok(Self::after(budget))
    }

    /// Returns the time that is left: zero once the deadline has passed, `None` without a deadline.
    pub fn remaining(self) -> Option<Duration> {
        self.0.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Returns whether the deadline has passed.
    pub fn is_passed(self) -> bool {
        self.0.is_some_and(|at| at <= Instant::now())
    }

    /// Waits until the deadline passes: for ever without one.
    pub async fn passed(self) {
        match self.0 {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Returns the future's output, or drops the future and returns DEADLINE_EXCEEDED once the deadline passes.
    pub async fn run<F: Future>(self, future: F) -> Result<F::Output, Status> {
        tokio::select! {
            biased;
            () = self.passed() => Err(status::deadline_exceeded()),
            output = future => Ok(output),
        }
    }

    /// Hands the time that is left down to the next service, as `grpc-timeout` in the metadata of a call.
    pub fn apply(self, metadata: &mut MetadataMap) {
        if let Some(remaining) = self.remaining() {
            let value = MetadataValue::try_from(format(remaining)).expect("digits and a unit are ASCII");
            metadata.insert(HEADER, value);
        }
    }
}

fn parse(value: &str) -> Option<Duration> {
    let unit = value.chars().next_back()?;
    let digits = &value[..value.len() - unit.len_utf8()];
    if digits.is_empty() || digits.len() > MAX_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(amount * HOUR_SECONDS)),
        'M' => Some(Duration::from_secs(amount * 60)),
        'S' => Some(Duration::from_secs(amount)),
        'm' => Some(Duration::from_millis(amount)),
        'u' => Some(Duration::from_micros(amount)),
        'n' => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// Writes a duration in the finest unit that fits eight digits. Never zero: some servers read that as no timeout.
fn format(remaining: Duration) -> String {
    let nanos = remaining.as_nanos().max(1);
    let units: [(u128, char); 5] =
        [(1, 'n'), (1_000, 'u'), (1_000_000, 'm'), (1_000_000_000, 'S'), (60_000_000_000, 'M')];
    let fitting = units.into_iter().find(|(nanos_per_unit, _)| nanos / nanos_per_unit <= MAX_VALUE);
    let (nanos_per_unit, unit) = fitting.unwrap_or((3_600_000_000_000, 'H'));
    format!("{}{unit}", (nanos / nanos_per_unit).min(MAX_VALUE))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn read(value: &str) -> Result<Option<Duration>, Code> {
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, value.parse().unwrap());
        Deadline::of_headers(&headers).map(Deadline::remaining).map_err(|status| status.code())
    }

    #[tokio::test(start_paused = true)]
    async fn every_unit_is_read_and_nonsense_is_refused() {
        let cases = [
            ("2H", Duration::from_secs(7200)),
            ("3M", Duration::from_secs(180)),
            ("4S", Duration::from_secs(4)),
            ("99999999m", Duration::from_millis(99_999_999)),
            ("6u", Duration::from_micros(6)),
            ("0n", Duration::ZERO),
        ];
        for (value, budget) in cases {
            assert_eq!(read(value), Ok(Some(budget)), "{value}");
        }
        for value in ["", "S", "1", "1s", "-1S", "1.5S", "123456789m", "1 S", "+1S", "1µ"] {
            assert_eq!(read(value), Err(Code::InvalidArgument), "{value:?}");
        }
        assert_eq!(Deadline::of_headers(&HeaderMap::new()).unwrap(), Deadline::none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_is_handed_down() {
        let deadline = Deadline::after(Duration::from_secs(10));
        tokio::time::advance(Duration::from_secs(4)).await;
        let mut metadata = MetadataMap::new();
        deadline.apply(&mut metadata);
        assert_eq!(metadata.get(HEADER).unwrap(), "6000000u");
        assert_eq!(Deadline::of_metadata(&metadata), deadline);

        metadata.clear();
        Deadline::none().apply(&mut metadata);
        assert!(metadata.is_empty());
        assert_eq!(format(Duration::ZERO), "1n");
        assert_eq!(format(Duration::MAX), "99999999H");
    }

    #[tokio::test(start_paused = true)]
    async fn a_future_is_cut_at_the_deadline() {
        let deadline = Deadline::after(Duration::from_secs(1));
        assert_eq!(deadline.run(async { 7 }).await.unwrap(), 7);
        let cut = deadline.run(std::future::pending::<()>()).await.unwrap_err();
        assert_eq!(cut.code(), Code::DeadlineExceeded);
        assert!(deadline.is_passed());
        assert_eq!(deadline.remaining(), Some(Duration::ZERO));
    }
}
