//! Worker threads that make batches ahead, so that training never waits for data.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    thread,
};

/// Batches in the order of their numbers, whatever the number of threads: an endless iterator. The threads end when it
/// is dropped.
pub struct Loader<B> {
    /// Worker w makes the batches first + w, first + w + threads, …
    workers: Vec<Receiver<B>>,
    next: usize,
}

impl<B: Send + 'static> Loader<B> {
    /// `make`: a batch from its number alone. `first`: the number to begin with, for resuming. `ahead`: batches that
    /// each thread keeps ready; at least 1, as is `threads`.
    pub fn start(
        threads: usize,
        ahead: usize,
        first: u64,
        make: impl Fn(u64) -> B + Send + Sync + 'static,
    ) -> Self {
        let make = Arc::new(make);
        let threads = threads.max(1);
        let workers = (first..)
            .take(threads)
            .map(|mut number| {
                let (sender, receiver) = sync_channel(ahead.max(1));
                let make = Arc::clone(&make);
                thread::spawn(move || {
                    while sender.send(make(number)).is_ok() {
                        number += threads as u64;
                    }
                });
                receiver
            })
            .collect();
        Self { workers, next: 0 }
    }
}

impl<B> Iterator for Loader<B> {
    type Item = B;

    /// `None` only after a worker panicked.
    fn next(&mut self) -> Option<B> {
        let batch = self.workers[self.next].recv().ok();
        self.next = (self.next + 1) % self.workers.len();
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_come_in_order_for_any_number_of_threads() {
        for threads in [0, 1, 3] {
            let loader = Loader::start(threads, 2, 5, |number| number * 10);
            assert_eq!(loader.take(7).collect::<Vec<_>>(), [50, 60, 70, 80, 90, 100, 110]);
        }
    }

    #[test]
    fn a_broken_worker_ends_it() {
        let mut loader = Loader::start(2, 1, 0, |number| assert!(number < 1, "broken"));
        assert_eq!((loader.next(), loader.next()), (Some(()), None));
    }
}
