//! The step engine: one thread that owns a model, and one loop that batches requests into its steps.
//!
//! Encoder, llm and decoder differ in what a step computes and in who takes part in it. Everything else is the same and
//! is here, once: the thread, the bounded queue, tickets, requests whose caller has left, faults, load and its metrics.
//!
//! | module | holds |
//! |---|---|
//! | [`stage`] | [`Stage`](stage::Stage), the trait that a model's stage implements, and the outbox that its steps write to |
//! | [`engine`] | the handle that a service submits requests to, and the handle of one request |
//! | [`worker`] | the loop: receive, drop who left, plan, step, report the load |
//! | [`line`] | a waiting line that honours priority classes |
//! | [`load`] | backlog, pace and the metrics that every stage has under the same names |
//! | `wire` | the load as a service tells it to routers |
//! | [`thread`] | how the thread starts, tells that it has ended, and shows that a step hangs |
//! | [`error`] | faults of a step, and the errors that callers see |
//!
//! Modules depend on each other in one direction: `engine` → `worker` → `stage` → `load`, `error`. Torch is not used
//! here: what a thread has to set up for it is passed in.
//!
//! An engine with a stage that adds numbers, and a request that is answered:
//!
//! ```
//! use emu2_engine::{
//!     engine::{Engine, Options},
//!     load::LoadMetrics,
//!     stage::{Arrival, Batch, Outbox, Stage, Ticket},
//! };
//! use emu2_serve::priority::Priority;
//! use prometheus_client::registry::Registry;
//!
//! /// Doubles numbers, one a step.
//! #[derive(Default)]
//! struct Doubler(Vec<(Ticket, u32)>);
//!
//! impl Stage for Doubler {
//!     const UNITS: &'static [&'static str] = &["number"];
//!     type Request = u32;
//!     type Input = std::convert::Infallible;
//!     type Event = u32;
//!     type Error = std::convert::Infallible;
//!     type Work = (Ticket, u32);
//!
//!     fn max_events(_: &u32) -> usize {
//!         1
//!     }
//!     fn join(&mut self, ticket: Ticket, number: u32, _: Arrival) -> Result<(), Self::Error> {
//!         self.0.push((ticket, number));
//!         Ok(())
//!     }
//!     fn plan(&mut self) -> Option<Batch<Self::Work>> {
//!         let &(ticket, number) = self.0.first()?;
//!         Some(Batch { tickets: vec![ticket], kind: 0, units: 1.0, work: (ticket, number) })
//!     }
//!     fn step(&mut self, (ticket, number): Self::Work, outbox: &mut Outbox<'_, Self>) {
//!         outbox.begin(ticket);
//!         outbox.finish(ticket, 2 * number);
//!     }
//!     fn leave(&mut self, ticket: Ticket) {
//!         self.0.retain(|(other, _)| *other != ticket);
//!     }
//!     fn units_left(&self) -> Vec<f64> {
//!         vec![self.0.len() as f64]
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let metrics = LoadMetrics::register(&mut Registry::default(), "doubler");
//! let options = Options { name: "doubler", max_waiting: 8, limit_name: "max_numbers" };
//! let load = || Ok::<_, String>((Doubler::default(), "ready"));
//! let started = Engine::start(options, metrics, || (), load);
//! assert_eq!(started.loaded.await.unwrap(), Ok("ready"));
//! let mut request = started.engine.submit(21, Priority::Normal).unwrap();
//! assert_eq!(request.next().await, Some(Ok(42)));
//! # }
//! ```

pub mod engine;
pub mod error;
pub mod line;
pub mod load;
pub mod stage;
pub mod thread;
mod wire;
pub mod worker;
