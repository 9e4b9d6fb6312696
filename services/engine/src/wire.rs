//! The load of an engine as its service tells routers.

use std::time::Duration;

use emu2_proto::stage;
use emu2_serve::{
    deadline::Deadline,
    stream::{self, Events},
};

use crate::{engine::Engine, load::Load, stage::Stage};

/// Between two reports to one watcher. A step of a small llm takes some milliseconds and each changes the load; twenty
/// reports a second are as current as a router's choice needs.
const REPORT_INTERVAL: Duration = Duration::from_millis(50);

impl<S: Stage> Engine<S> {
    /// The load now, as `Info` carries it.
    pub fn wire_load(&self) -> stage::Load {
        on_the_wire(self.load().current(), self.step_ms())
    }

    /// The stream of `WatchLoad`: the load at once, and again after each change, at most one every 50 ms and then the
    /// latest. It ends with its caller or its engine, and does not keep the engine's thread.
    pub fn watch_load(&self, deadline: Deadline) -> Events<stage::Load> {
        let timer = self.step_timer();
        let tell = move |load: &Load| on_the_wire(*load, timer.step_ms());
        stream::watched(self.load().watch(), tell, REPORT_INTERVAL, deadline)
    }
}

fn on_the_wire(load: Load, step_ms: u64) -> stage::Load {
    let Load { backlog_seconds, running, waiting, free_positions } = load;
    stage::Load {
        backlog_seconds,
        running: running as u64,
        waiting: waiting as u64,
        free_positions: free_positions.map(|positions| positions as u64),
        step_ms,
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use emu2_serve::priority::Priority;
    use futures::StreamExt;
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::{
        engine::Options,
        load::LoadMetrics,
        stage::{Arrival, Batch, Outbox, Ticket},
    };

    /// Ends each request in one step.
    #[derive(Default)]
    struct Ends(Vec<Ticket>);

    impl Stage for Ends {
        const UNITS: &'static [&'static str] = &["request"];
        type Request = ();
        type Input = Infallible;
        type Event = ();
        type Error = Infallible;
        type Work = Ticket;

        fn max_events((): &()) -> usize {
            1
        }

        fn join(&mut self, ticket: Ticket, (): (), _: Arrival) -> Result<(), Infallible> {
            self.0.push(ticket);
            Ok(())
        }

        fn plan(&mut self) -> Option<Batch<Ticket>> {
            let ticket = self.0.first().copied()?;
            Some(Batch { tickets: vec![ticket], kind: 0, units: 1.0, work: ticket })
        }

        fn step(&mut self, ticket: Ticket, outbox: &mut Outbox<'_, Self>) {
            outbox.begin(ticket);
            outbox.finish(ticket, ());
        }

        fn leave(&mut self, ticket: Ticket) {
            self.0.retain(|other| *other != ticket);
        }

        fn units_left(&self) -> Vec<f64> {
            vec![self.0.len() as f64]
        }

        fn free_positions(&self) -> Option<usize> {
            Some(7)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_tells_the_load_at_once_and_after_each_change_and_ends_with_the_engine() {
        let metrics = LoadMetrics::register(&mut Registry::default(), "ends");
        let options = Options { name: "ends", max_waiting: 8, limit_name: "max" };
        let (engine, mut worker) = Engine::by_hand(options, metrics, Ends::default());
        let mut reports = engine.watch_load(Deadline::none());
        assert_eq!(reports.next().await.unwrap().unwrap(), stage::Load::default());
        let request = engine.submit((), Priority::Normal).unwrap();
        let waits = reports.next().await.unwrap().unwrap();
        assert_eq!((waits.running, waits.waiting), (0, 1), "before the engine has looked");
        assert_eq!(waits, engine.wire_load());
        worker.turn().unwrap();
        let over = reports.next().await.unwrap().unwrap();
        assert_eq!((over.running, over.waiting, over.free_positions), (0, 0, Some(7)));
        drop((engine, request, worker));
        assert!(reports.next().await.is_none());
    }
}
