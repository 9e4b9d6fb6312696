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
use tokio_util::task::AbortOnDropHandle;

use super::key::Key;

type Flight<T> = Shared<BoxFuture<'static, T>>;

/// The computations that are under way.
#[derive(Debug)]
pub(crate) struct Flights<T> {
    board: Arc<Mutex<Board<T>>>,
}

#[derive(Debug)]
struct Board<T> {
    running: HashMap<Key, (u64, WeakShared<BoxFuture<'static, T>>)>,
    started: u64,
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    pub(crate) fn new() -> Self {
        Self { board: Arc::new(Mutex::new(Board { running: HashMap::new(), started: 0 })) }
    }

    /// The flight of this key, and whether it was already under way; `start` makes one if not. It moves by itself,
    /// for a waiter may be held up by its client, and a flight has a lease to renew.
    pub(crate) fn join<F>(&self, key: Key, start: F) -> (Flight<T>, bool)
    where
        F: FnOnce() -> BoxFuture<'static, T>,
    {
        let mut board = lock(&self.board);
        if let Some(flight) = board.running.get(&key).and_then(|(_, flight)| flight.upgrade()) {
            return (flight, true);
        }
        board.started += 1;
        let number = board.started;
        let guard = FlightGuard { board: Arc::clone(&self.board), key, number };
        let work = AbortOnDropHandle::new(tokio::spawn(start()));
        let flight = async move {
            let _guard = guard;
            match work.await {
                Ok(result) => result,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    // Only the end of the runtime cancels it before its waiters do, and them with it.
                    Err(_) => std::future::pending().await,
                },
            }
        };
        let flight = flight.boxed().shared();
        let weak = flight.downgrade().expect("a flight that was never polled is not over");
        board.running.insert(key, (number, weak));
        (flight, false)
    }
}

/// Takes a flight off the board when it is over or its last waiter has left.
struct FlightGuard<T: Clone + Send + Sync + 'static> {
    board: Arc<Mutex<Board<T>>>,
    key: Key,
    number: u64,
}

impl<T: Clone + Send + Sync + 'static> Drop for FlightGuard<T> {
    fn drop(&mut self) {
        let mut board = lock(&self.board);
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
    use tokio::sync::oneshot;

    use super::*;
    use crate::cache::key::tests::key;

    #[tokio::test]
    async fn waiters_share_one_flight_and_its_result() {
        let flights = Flights::new();
        let (finish, finished) = oneshot::channel::<u32>();
        let (first, joined) = flights.join(key(b"a"), || async { finished.await.unwrap() }.boxed());
        assert!(!joined);
        let (second, joined) = flights.join(key(b"a"), || unreachable!("one is under way"));
        assert!(joined);
        finish.send(7).unwrap();
        assert_eq!((first.await, second.await), (7, 7));
        let (next, joined) = flights.join(key(b"a"), || async { 8 }.boxed());
        assert!(!joined);
        assert_eq!(next.await, 8);
        assert!(lock(&flights.board).running.is_empty());
    }

    #[tokio::test]
    async fn a_flight_outlives_its_first_waiter_and_ends_with_its_last() {
        let flights = Flights::<u32>::new();
        let (alive, mut dropped) = oneshot::channel::<()>();
        let work = async move {
            let _alive = alive;
            std::future::pending().await
        };
        let (first, _) = flights.join(key(b"a"), || work.boxed());
        let (second, _) = flights.join(key(b"a"), || unreachable!());
        drop(first);
        tokio::task::yield_now().await;
        assert!(dropped.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        drop(second);
        assert!(lock(&flights.board).running.is_empty());
        assert!(dropped.await.is_err());
    }

    #[tokio::test]
    async fn a_flight_moves_while_its_waiters_do_other_things() {
        let flights = Flights::<u32>::new();
        let (landed, lands) = oneshot::channel::<()>();
        let work = async move {
            landed.send(()).unwrap();
            7
        };
        let (flight, _) = flights.join(key(b"a"), || work.boxed());
        lands.await.unwrap();
        assert_eq!(flight.await, 7);
    }

    #[tokio::test]
    async fn a_panic_reaches_the_waiters() {
        let flights = Flights::<u32>::new();
        let (flight, _) = flights.join(key(b"a"), || async { panic!("broken") }.boxed());
        assert!(tokio::spawn(flight).await.unwrap_err().is_panic());
        assert!(lock(&flights.board).running.is_empty());
    }
}
