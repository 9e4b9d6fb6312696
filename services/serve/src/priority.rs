//! Classes of requests, and how a line of waiting work honours them: higher classes first, first come first served
//! within a class, and nobody is overtaken for ever.
//!
//! A newcomer goes before those of lower classes at the end of a line. Each of them is passed at most
//! [`OVERTAKEN_MAX`] times; then it stands as firmly as the highest class. So whatever waits is served after a bounded
//! number of others, however many keep coming.

use emu2_proto::v1;
use serde::{Deserialize, Serialize};
use tonic::{
    Request, Status,
    metadata::{MetadataMap, MetadataValue},
};

use crate::status::Violation;

/// The metadata key that carries the class between services, beside the deadline. Only callers that are trusted reach a
/// stage.
const METADATA: &str = "x-emu2-priority";

/// A class of requests. The greater class goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// The class of work that can wait: batches, backfills.
    Low,
    /// The class of requests that ask for none.
    #[default]
    Normal,
    /// The class of requests whose answer somebody waits for.
    High,
}

/// How often whoever waits may be overtaken. 16: about one batch of an encoder, so a crowd of a higher class delays a
/// lower one by a batch or so for each place in the line, not by the crowd's length.
pub const OVERTAKEN_MAX: u32 = 16;

impl Priority {
    /// Every class, the lowest first.
    pub const ALL: [Self; 3] = [Self::Low, Self::Normal, Self::High];

    /// Reads the class out of a message's field; unspecified is normal. Returns INVALID_ARGUMENT for a number that
    /// names no class.
    pub fn of(field: i32) -> Result<Self, Status> {
        match v1::Priority::try_from(field) {
            Ok(v1::Priority::Low) => Ok(Self::Low),
            Ok(v1::Priority::Unspecified | v1::Priority::Normal) => Ok(Self::Normal),
            Ok(v1::Priority::High) => Ok(Self::High),
            Err(_) => {
                let description = format!("must be PRIORITY_LOW, _NORMAL or _HIGH (1 to 3), got {field}");
                Err(Violation::new("priority", description).into())
            }
        }
    }

    /// Returns the class of a call from another service; normal where the call says nothing that is known.
    pub fn of_call<T>(request: &Request<T>) -> Self {
        let said = request.metadata().get(METADATA).and_then(|said| said.to_str().ok());
        Self::ALL.into_iter().find(|priority| said == Some(priority.name())).unwrap_or_default()
    }

    /// Puts the class on the metadata of a call to another service.
    pub fn apply(self, metadata: &mut MetadataMap) {
        metadata.insert(METADATA, MetadataValue::from_static(self.name()));
    }

    /// Returns the class's name in the API, such as `PRIORITY_HIGH`.
    pub fn name(self) -> &'static str {
        v1::Priority::from(self).as_str_name()
    }
}

impl From<Priority> for v1::Priority {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Low => Self::Low,
            Priority::Normal => Self::Normal,
            Priority::High => Self::High,
        }
    }
}

/// The standing of one that waits in a line: its class, and how often it has been overtaken.
#[derive(Clone, Copy, Debug)]
pub struct QueuePosition {
    priority: Priority,
    overtaken: u32,
}

impl QueuePosition {
    /// Returns the standing of a newcomer of this class.
    pub fn new(priority: Priority) -> Self {
        Self { priority, overtaken: 0 }
    }

    /// Returns how many of a line, counted from its back, this newcomer goes before, and notes in each of those that it
    /// has been overtaken once more.
    pub fn overtakes<'a>(self, from_the_back: impl Iterator<Item = &'a mut Self>) -> usize {
        let gives_way = |other: &&mut Self| other.priority < self.priority && other.overtaken < OVERTAKEN_MAX;
        from_the_back.take_while(gives_way).map(|other| other.overtaken += 1).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who stands in a line after these have come, by their number.
    fn line(comers: impl IntoIterator<Item = Priority>) -> Vec<(usize, QueuePosition)> {
        let mut line: Vec<(usize, QueuePosition)> = Vec::new();
        for (number, priority) in comers.into_iter().enumerate() {
            let newcomer = QueuePosition::new(priority);
            let passed = newcomer.overtakes(line.iter_mut().rev().map(|(_, standing)| standing));
            line.insert(line.len() - passed, (number, newcomer));
        }
        line
    }

    fn numbers(comers: &[Priority]) -> Vec<usize> {
        line(comers.iter().copied()).into_iter().map(|(number, _)| number).collect()
    }

    #[test]
    fn higher_classes_go_first_and_equals_in_order() {
        use Priority::{High, Low, Normal};
        assert_eq!(numbers(&[Low, Normal, High, Low, Normal, High]), [2, 5, 1, 4, 0, 3]);
        assert_eq!(numbers(&[Normal; 5]), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn whoever_waits_is_passed_so_often_and_no_more() {
        let crowd = std::iter::once(Priority::Low).chain([Priority::High; 100]);
        let place = line(crowd).iter().position(|(number, _)| *number == 0).unwrap();
        assert_eq!(place, OVERTAKEN_MAX as usize);
    }

    /// Over many random lines: a class never waits behind a lower one that came later, and nobody is passed too often.
    #[test]
    fn no_line_breaks_the_rule() {
        let mut state = 1_u64;
        for _ in 0..200 {
            let comers = (0..80).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                Priority::ALL[(state >> 33) as usize % 3]
            });
            let line = line(comers);
            for (place, (number, standing)) in line.iter().enumerate() {
                let later_before = line[..place].iter().filter(|(other, _)| other > number).count();
                assert_eq!(later_before, standing.overtaken as usize);
                assert!(standing.overtaken <= OVERTAKEN_MAX);
                let lower_before = line[..place]
                    .iter()
                    .any(|(other, ahead)| other > number && ahead.priority <= standing.priority);
                assert!(!lower_before);
            }
        }
    }

    #[test]
    fn a_class_goes_with_a_call() {
        for priority in Priority::ALL {
            let mut request = Request::new(());
            priority.apply(request.metadata_mut());
            assert_eq!(Priority::of_call(&request), priority);
        }
        assert_eq!(Priority::of_call(&Request::new(())), Priority::Normal);
    }

    #[test]
    fn a_field_is_a_class_or_a_violation() {
        assert_eq!(Priority::of(0).unwrap(), Priority::Normal);
        for priority in Priority::ALL {
            assert_eq!(Priority::of(v1::Priority::from(priority).into()).unwrap(), priority);
        }
        assert!(Priority::of(4).unwrap_err().message().contains("got 4"));
        assert!(Priority::Low < Priority::Normal && Priority::Normal < Priority::High);
    }
}
