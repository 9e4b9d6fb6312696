//! One computation per key at a time: whoever asks for a value that is being computed waits for it. A flight belongs
//! to all its waiters: it goes on while one is left, whoever started it, and is dropped with the last of them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};

use super::key::Key;

type Running<T> = HashMap<Key, (u64, WeakShared<BoxFuture<'static, T>>)>;

/// The computations that are under way.
#[derive(Debug)]
pub(crate) struct Flights<T> {
    running: Arc<Mutex<Board<T>>>,
}

#[derive(Debug)]
struct Board<T> {
    running: Running<T>,
    started: u64,
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    pub(crate) fn new() -> Self {
        Self { running: Arc::new(Mutex::new(Board { running: HashMap::new(), started: 0 })) }
    }

    /// The flight of this key, and whether it was already under way; `start` makes one if not. It moves only while a
    /// waiter polls it.
    pub(crate) fn join<F>(&self, key: Key, start: F) -> (Shared<BoxFuture<'static, T>>, bool)
    where
        F: FnOnce() -> BoxFuture<'static, T>,
    {
        let mut board = lock(&self.running);
        if let Some(flight) = board.running.get(&key).and_then(|(_, flight)| flight.upgrade()) {
            return (flight, true);
        }
        board.started += 1;
        let landing = Landing { running: Arc::clone(&self.running), key, number: board.started };
        let work = start();
        let flight = async move {
            let _landing = landing;
            work.await
        };
        let flight = flight.boxed().shared();
        let number = board.started;
        let weak = flight.downgrade().expect("a flight that was never polled is not over");
        board.running.insert(key, (number, weak));
        (flight, false)
    }
}

/// Takes a flight off the board when it is over or its last waiter has left.
struct Landing<T: Clone + Send + Sync + 'static> {
    running: Arc<Mutex<Board<T>>>,
    key: Key,
    number: u64,
}

impl<T: Clone + Send + Sync + 'static> Drop for Landing<T> {
    fn drop(&mut self) {
        let mut board = lock(&self.running);
        // A successor may have taken the place between the last waiter's leaving and now.
        if board.running.get(&self.key).is_some_and(|(number, _)| *number == self.number) {
            board.running.remove(&self.key);
        }
    }
}

/// The board is whole after every statement, so a panic elsewhere does not spoil it.
fn lock<T>(board: &Mutex<Board<T>>) -> std::sync::MutexGuard<'_, Board<T>> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use emu2_proto::v1;
    use tokio::sync::oneshot;

    use super::*;
    use crate::cache::key::{Kind, Recipe};

    fn key() -> Key {
        let dtype = v1::Dtype::F32;
        Recipe {
            kind: Kind::Image,
            weights_digest: "d",
            preprocessing_version: 1,
            n_query: 4,
            dtype,
            content: b"a",
        }
        .key()
    }

    #[tokio::test]
    async fn waiters_share_one_flight_and_its_result() {
        let flights = Flights::new();
        let (finish, finished) = oneshot::channel::<u32>();
        let (first, joined) = flights.join(key(), || async { finished.await.unwrap() }.boxed());
        assert!(!joined);
        let (second, joined) = flights.join(key(), || unreachable!("one is under way"));
        assert!(joined);
        finish.send(7).unwrap();
        assert_eq!((first.await, second.await), (7, 7));
        let (next, joined) = flights.join(key(), || async { 8 }.boxed());
        assert!(!joined);
        assert_eq!(next.await, 8);
        assert!(lock(&flights.running).running.is_empty());
    }

    #[tokio::test]
    async fn a_flight_outlives_its_first_waiter_and_ends_with_its_last() {
        let flights = Flights::<u32>::new();
        let (alive, mut dropped) = oneshot::channel::<()>();
        let work = async move {
            let _alive = alive;
            std::future::pending().await
        };
        let (mut first, _) = flights.join(key(), || work.boxed());
        assert!(futures::poll!(&mut first).is_pending());
        let (mut second, _) = flights.join(key(), || unreachable!());
        drop(first);
        assert!(futures::poll!(&mut second).is_pending());
        assert!(dropped.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        drop(second);
        assert!(dropped.try_recv() == Err(oneshot::error::TryRecvError::Closed));
        assert!(lock(&flights.running).running.is_empty());
    }
}
