//! Who takes the next denoising step: a batch of one shape, at most so many pixels, shapes in turn.
//!
//! Pure, so that fairness is tested without a model. Shapes go round robin, so a crowd at one size does not keep
//! another size waiting for more than the shapes before it. Within a shape the oldest go first and stay until they
//! are done: a half denoised image is of no use to anybody, and every image ends after a bounded number of steps. Among
//! those that have not begun higher classes go first, and nobody is overtaken for ever (see [`emu2_serve::priority`]).

use std::{collections::VecDeque, hash::Hash};

/// What a request asks of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand<S> {
    /// The shape of the request; only equal shapes share a batch.
    pub shape: S,
    /// The pixels of the image, once for each row that it takes in the batch.
    pub pixels: u64,
}

/// The choice of who steps next: round robin over the shapes.
#[derive(Debug)]
pub struct StepScheduler<S> {
    /// The shapes, the next one first; those that nobody asked for last time are forgotten.
    order: VecDeque<S>,
    max_batch_pixels: u64,
}

impl<S: Copy + Eq + Hash> StepScheduler<S> {
    /// Makes a scheduler whose batches have at most `max_batch_pixels` pixels.
    pub fn new(max_batch_pixels: u64) -> Self {
        Self { order: VecDeque::new(), max_batch_pixels }
    }

    /// Returns the positions in `demands` (oldest first) of those that step together now; none when there are no
    /// demands. One that alone exceeds the bound goes alone.
    pub fn next(&mut self, demands: &[Demand<S>]) -> Vec<usize> {
        self.order.retain(|shape| demands.iter().any(|demand| demand.shape == *shape));
        for demand in demands {
            if !self.order.contains(&demand.shape) {
                self.order.push_back(demand.shape);
            }
        }
        let Some(shape) = self.order.pop_front() else { return Vec::new() };
        self.order.push_back(shape);

        let mut pixels = 0;
        let mut batch = Vec::new();
        for (position, demand) in demands.iter().enumerate().filter(|(_, demand)| demand.shape == shape) {
            if batch.is_empty() || pixels + demand.pixels <= self.max_batch_pixels {
                pixels += demand.pixels;
                batch.push(position);
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use emu2_engine::line::Line;
    use emu2_serve::priority::{OVERTAKEN_MAX, Priority};

    use super::*;

    /// One image at a time, and one more of the highest class for each that is done.
    #[test]
    fn a_lower_class_is_decoded_in_the_end() {
        let (mut scheduler, mut line, mut number) = (StepScheduler::new(1), Line::default(), 1);
        line.push(Priority::Low, 0);
        let decoded_before = loop {
            line.push(Priority::High, number);
            number += 1;
            let demands: Vec<_> = line.iter().map(|_| Demand { shape: 'a', pixels: 1 }).collect();
            if line.remove(scheduler.next(&demands)[0]) == Some(0) {
                break number - 2;
            }
        };
        assert_eq!(decoded_before, OVERTAKEN_MAX);
    }

    fn demands(list: &[(char, u64)]) -> Vec<Demand<char>> {
        list.iter().map(|&(shape, pixels)| Demand { shape, pixels }).collect()
    }

    #[test]
    fn a_batch_is_of_one_shape_and_shapes_take_scheduler() {
        let mut scheduler = StepScheduler::new(100);
        let waiting = demands(&[('a', 1), ('b', 1), ('a', 1), ('c', 1), ('b', 1)]);
        let batches: Vec<_> = (0..4).map(|_| scheduler.next(&waiting)).collect();
        assert_eq!(batches, [vec![0, 2], vec![1, 4], vec![3], vec![0, 2]]);
        assert!(scheduler.next(&[]).is_empty());
    }

    #[test]
    fn a_batch_is_bounded_and_the_oldest_go_first() {
        let mut scheduler = StepScheduler::new(4);
        assert_eq!(scheduler.next(&demands(&[('a', 2), ('a', 1), ('a', 2), ('a', 1)])), [0, 1, 3]);
        assert_eq!(scheduler.next(&demands(&[('a', 9), ('a', 1)])), [0], "alone, but not never");
    }

    #[test]
    fn a_crowd_keeps_nobody_of_another_shape_waiting() {
        let mut scheduler = StepScheduler::new(2);
        let mut waiting = demands(&[('a', 1); 50]);
        waiting.push(Demand { shape: 'b', pixels: 1 });
        assert_eq!(scheduler.next(&waiting), [0, 1]);
        assert_eq!(scheduler.next(&waiting), [50]);
        // New arrivals queue behind shapes that already wait.
        waiting.insert(0, Demand { shape: 'c', pixels: 1 });
        assert_eq!(scheduler.next(&waiting), [1, 2]);
        assert_eq!(scheduler.next(&waiting), [51]);
        assert_eq!(scheduler.next(&waiting), [0]);
    }

    #[test]
    fn every_request_is_done_after_its_steps_and_those_before_it() {
        // Requests as (shape, pixels, steps left); one step of each batch at a time.
        let mut left: Vec<(char, u64, usize)> = (0..60_usize)
            .map(|i| (['a', 'b', 'c'][i * i % 3], 1 + (i as u64 * 7) % 5, 1 + i * 11 % 13))
            .collect();
        let (mut scheduler, mut served) = (StepScheduler::new(8), 0);
        let bound: usize = left.iter().map(|(_, _, steps)| steps).sum();
        while !left.is_empty() {
            let waiting: Vec<_> = left.iter().map(|&(shape, pixels, _)| Demand { shape, pixels }).collect();
            let batch = scheduler.next(&waiting);
            assert!(!batch.is_empty());
            assert!(batch.iter().all(|&i| waiting[i].shape == waiting[batch[0]].shape));
            let pixels: u64 = batch.iter().map(|&i| waiting[i].pixels).sum();
            assert!(batch.len() == 1 || pixels <= 8);
            batch.iter().for_each(|&i| left[i].2 -= 1);
            left.retain(|&(_, _, steps)| steps > 0);
            served += 1;
            assert!(served <= bound);
        }
        assert!(served < bound, "requests have shared steps");
    }
}
