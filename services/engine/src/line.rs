//! A waiting line that honours priority classes: higher classes first, first come first served within a class, and
//! nobody is overtaken for ever (see [`emu2_serve::priority`]).

use std::collections::VecDeque;

use emu2_serve::priority::{Priority, QueuePosition};

/// A line of items, the next one first.
#[derive(Debug)]
pub struct Line<T>(VecDeque<(QueuePosition, T)>);

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<T> Line<T> {
    /// Puts `item` before those of lower classes at the end of the line.
    pub fn push(&mut self, priority: Priority, item: T) {
        self.push_among(priority, item, |_| true);
    }

    /// Puts `item` into the line, as [`push`](Self::push) does, where only those that `waits_alike` holds for give way:
    /// the others wait for something else, or have begun already.
    pub fn push_among(&mut self, priority: Priority, item: T, waits_alike: impl Fn(&T) -> bool) {
        let newcomer = QueuePosition::new(priority);
        let mut places = Vec::new();
        let waiting = self.0.iter_mut().enumerate().rev().filter(|(_, (_, other))| waits_alike(other));
        let passed = newcomer.overtakes(waiting.map(|(place, (standing, _))| {
            places.push(place);
            standing
        }));
        let place = passed.checked_sub(1).map_or(self.0.len(), |last| places[last]);
        self.0.insert(place, (newcomer, item));
    }

    /// Takes the first item out.
    pub fn pop_front(&mut self) -> Option<T> {
        self.0.pop_front().map(|(_, item)| item)
    }

    /// The item at `index`, counted from the front.
    pub fn get(&self, index: usize) -> Option<&T> {
        self.0.get(index).map(|(_, item)| item)
    }

    /// Takes the item at `index` out.
    pub fn remove(&mut self, index: usize) -> Option<T> {
        self.0.remove(index).map(|(_, item)| item)
    }

    /// Keeps only the items that `keep` holds for.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.0.retain(|(_, item)| keep(item));
    }

    /// Items from the front to the back.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.0.iter().map(|(_, item)| item)
    }

    /// Items from the front to the back, to be changed in place.
    pub fn iter_mut(&mut self) -> impl DoubleEndedIterator<Item = &mut T> {
        self.0.iter_mut().map(|(_, item)| item)
    }

    /// How many items stand in the line.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nobody stands in the line.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use emu2_serve::priority::OVERTAKEN_MAX;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_higher_class_goes_before_those_that_wait_alike() {
        use Priority::{High, Low, Normal};
        let mut line = Line::default();
        // (shape, begun, number)
        let comers = [('a', true, Low), ('a', false, Low), ('b', false, Low), ('a', false, Normal)];
        for (number, (shape, begun, priority)) in comers.into_iter().enumerate() {
            line.push_among(priority, (shape, begun, number), |other| other.0 == shape && !other.1);
        }
        for number in [4, 5] {
            line.push_among(High, ('a', false, number), |other| other.0 == 'a' && !other.1);
        }
        let of = |shape| line.iter().filter(|item| item.0 == shape).map(|item| item.2).collect::<Vec<_>>();
        assert_eq!(of('a'), [0, 4, 5, 3, 1], "what has begun stays first");
        assert_eq!(of('b'), [2]);
    }

    proptest! {
        /// Whoever came later and is ahead is of a higher class, or the class was passed as often as may be.
        #[test]
        fn no_line_breaks_the_rule(classes in proptest::collection::vec(0..3_usize, 1..80)) {
            let mut line = Line::default();
            for (number, &class) in classes.iter().enumerate() {
                line.push(Priority::ALL[class], (number, class));
            }
            let line: Vec<_> = line.iter().copied().collect();
            for (place, &(number, class)) in line.iter().enumerate() {
                let ahead = line[..place].iter().filter(|(other, _)| *other > number);
                let (higher, all) = ahead.fold((0, 0), |(higher, all), (_, other)| {
                    (higher + u32::from(*other > class), all + 1)
                });
                prop_assert_eq!(higher, all);
                prop_assert!(all <= OVERTAKEN_MAX);
            }
        }
    }
}
