//! One replica: what it says of itself, how busy it is, and whether it can be trusted with a call.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout},
};

use super::{
    load::{Busy, ReplicaLoad},
    stage::Stage,
};
use crate::{config::PoolConfig, error};

/// Questions in a row that go unanswered before the streams that run on a replica are given up: one may be a busy
/// moment, and a stream that still moves is worth more than a quick change.
const SILENT_AFTER: u32 = 2;
/// Failed calls in a row that set a replica aside although it answers questions.
const EJECTED_AFTER: u32 = 5;
/// How long it is set aside, times how often in a row that happened, up to ten times.
const EJECTED_FOR: Duration = Duration::from_secs(5);

/// A replica, as everyone who calls it shares it.
pub(super) struct Replica<S: Stage> {
    pub(super) endpoint: String,
    pub(super) client: S::Client,
    load: ReplicaLoad,
    known: RwLock<Known<S::Info>>,
    /// Set once it has been asked about itself, whatever came of it.
    asked: watch::Sender<bool>,
    /// Set while it hangs: it does not answer questions, or its engine's step does not end.
    hung: watch::Sender<bool>,
    /// Woken when a call finds the replica lost.
    doubted: Notify,
    failures: AtomicU32,
    config: PoolConfig,
}

struct Known<I> {
    /// What it last said, however long ago.
    info: Option<Arc<I>>,
    /// Whether it answered when last asked.
    answers: bool,
    /// Whether its machine refused the connection when it was last asked.
    refuses: bool,
    silent: u32,
    /// Why it last did not answer, as the log has it: each reason is told once.
    told: Option<String>,
    ejections: u32,
    ejected_until: Option<Instant>,
}

/// A replica that a call goes to; it counts as load until dropped.
pub(crate) struct Lease<S: Stage> {
    replica: Arc<Replica<S>>,
}

impl<S: Stage> Replica<S> {
    pub(super) fn new(endpoint: String, client: S::Client, config: &PoolConfig) -> Self {
        Self {
            endpoint,
            client,
            load: ReplicaLoad::default(),
            known: RwLock::new(Known {
                info: None,
                answers: false,
                refuses: false,
                silent: 0,
                told: None,
                ejections: 0,
                ejected_until: None,
            }),
            asked: watch::channel(false).0,
            hung: watch::channel(false).0,
            doubted: Notify::new(),
            failures: AtomicU32::new(0),
            config: config.clone(),
        }
    }

    pub(super) fn info(&self) -> Option<Arc<S::Info>> {
        self.read(|known| known.info.clone())
    }

    pub(super) fn answers(&self) -> bool {
        self.read(|known| known.answers)
    }

    /// Whether nothing listens there, as far as it is known.
    pub(super) fn refuses(&self) -> bool {
        self.read(|known| known.refuses)
    }

    pub(super) async fn asked(&self) {
        // The sender lives as long as the replica.
        let _ = self.asked.subscribe().wait_for(|asked| *asked).await;
    }

    pub(super) fn is_ejected(&self) -> bool {
        self.read(|known| known.ejected_until.is_some_and(|until| Instant::now() < until))
    }

    pub(super) fn busy(&self) -> Busy {
        self.load.busy()
    }

    /// How far behind it is, once requests have waited there for longer than `patience`.
    pub(super) fn behind(&self, patience: Duration) -> Duration {
        self.load.behind(patience)
    }

    /// Makes it a replica that was asked and answered this.
    #[cfg(test)]
    pub(super) fn says(&self, info: S::Info) {
        self.load.report(S::load(&info));
        self.write(|known| (known.info, known.answers) = (Some(Arc::new(info)), true));
    }

    fn read<T>(&self, read: impl FnOnce(&Known<S::Info>) -> T) -> T {
        read(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, write: impl FnOnce(&mut Known<S::Info>) -> T) -> T {
        write(&mut self.known.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks the replica about itself; says whether it can serve.
    async fn ask(&self) -> bool {
        let limit = Duration::from_millis(self.config.info_timeout_ms);
        match timeout(limit, S::info(self.client.clone())).await {
            Ok(Ok(info)) => self.heard(info),
            Ok(Err(status)) => self.unheard(error::causes(&status), error::is_refused(&status)),
            Err(_) => self.unheard(format!("no answer in {limit:?}"), false),
        }
    }

    fn unheard(&self, reason: String, refuses: bool) -> bool {
        let silent = self.write(|known| {
            // One that was never heard of, too: nobody else knows why it is not used.
            if known.answers || known.told.as_ref() != Some(&reason) {
                tracing::warn!(stage = S::NAME, endpoint = self.endpoint, reason, "replica does not answer");
            }
            known.told = Some(reason);
            (known.answers, known.refuses) = (false, refuses);
            known.silent = known.silent.saturating_add(1);
            known.silent
        });
        // Where nothing listens nothing hangs: what ran there has been told so by its connection.
        self.hangs(silent >= SILENT_AFTER && !refuses);
        false
    }

    fn heard(&self, info: S::Info) -> bool {
        let load = S::load(&info);
        self.load.report(load);
        let step_ms = load.step_ms;
        let stuck = step_ms > self.config.max_step_ms;
        if stuck && !*self.hung.borrow() {
            tracing::warn!(
                stage = S::NAME,
                endpoint = self.endpoint,
                step_ms,
                "the replica's step does not end"
            );
        }
        self.write(|known| {
            if known.info.as_ref().is_none_or(|old| S::digest(old) != S::digest(&info)) {
                tracing::info!(
                    stage = S::NAME,
                    endpoint = self.endpoint,
                    digest = S::digest(&info),
                    "replica"
                );
            }
            known.info = Some(Arc::new(info));
            known.silent = 0;
            known.told = None;
            (known.answers, known.refuses) = (!stuck, false);
        });
        self.hangs(stuck);
        !stuck
    }

    fn hangs(&self, hangs: bool) {
        self.hung.send_if_modified(|hung| std::mem::replace(hung, hangs) != hangs);
    }

    fn mark_suspect(&self) {
        self.write(|known| known.answers = false);
        self.doubted.notify_one();
    }

    /// A call came to its end, or found the replica at fault.
    fn record_outcome(&self, worked: bool) {
        if worked {
            if self.failures.swap(0, Ordering::Relaxed) > 0 {
                self.write(|known| known.ejections = 0);
            }
            return;
        }
        if (self.failures.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(EJECTED_AFTER) {
            let pause = self.write(|known| {
                known.ejections = (known.ejections + 1).min(10);
                let pause = EJECTED_FOR * known.ejections;
                known.ejected_until = Some(Instant::now() + pause);
                pause
            });
            tracing::warn!(
                stage = S::NAME,
                endpoint = self.endpoint,
                ?pause,
                "replica set aside, its calls fail"
            );
        }
    }
}

impl<S: Stage> Lease<S> {
    pub(super) fn new(replica: Arc<Replica<S>>) -> Self {
        replica.load.open();
        Self { replica }
    }

    pub(crate) fn client(&self) -> S::Client {
        self.replica.client.clone()
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.replica.endpoint
    }

    /// Returns once the replica hangs: what runs on it has to go on elsewhere.
    pub(crate) async fn hung(&self) {
        // The sender lives as long as the replica.
        let _ = self.replica.hung.subscribe().wait_for(|hung| *hung).await;
    }

    /// Asks the replica again, after it answered with other weights than it had said.
    pub(crate) async fn refresh(&self) {
        self.replica.ask().await;
    }

    /// Tells the pool that the replica was lost in the middle of a call.
    pub(crate) fn mark_suspect(&self) {
        self.replica.mark_suspect();
    }

    /// Tells the pool how a call went, as far as that is the replica's doing.
    pub(crate) fn record_outcome(&self, worked: bool) {
        self.replica.record_outcome(worked);
    }
}

impl<S: Stage> Drop for Lease<S> {
    fn drop(&mut self) {
        self.replica.load.close();
    }
}

/// Looks at a replica for as long as it is in the pool.
pub(super) async fn watch<S: Stage>(replica: Arc<Replica<S>>, answered: watch::Sender<bool>) {
    tokio::join!(ask_again(&replica, answered), follow_load(&replica));
}

/// Takes in what the replica reports of its load. Where it reports nothing, that of its `Info` is all there is.
async fn follow_load<S: Stage>(replica: &Replica<S>) {
    let mut asked = replica.asked.subscribe();
    loop {
        // Whoever does not answer questions has no load to tell.
        let _ = asked.wait_for(|asked| *asked).await;
        if let Ok(reports) = S::watch_load(replica.client.clone()).await {
            let mut reports = reports.into_inner();
            while let Ok(Some(load)) = reports.message().await {
                replica.load.report(load);
            }
        }
        let pause = Duration::from_millis(replica.config.refresh_ms);
        sleep(pause.mul_f64(rand::random_range(0.75..1.25))).await;
    }
}

/// Asks the replica about itself again and again.
async fn ask_again<S: Stage>(replica: &Replica<S>, answered: watch::Sender<bool>) {
    let refresh = Duration::from_millis(replica.config.refresh_ms);
    let first_retry = Duration::from_millis(replica.config.retry_ms).min(refresh);
    let mut retry = first_retry;
    loop {
        let pause = if replica.ask().await {
            answered.send_replace(true);
            retry = first_retry;
            refresh
        } else {
            let pause = retry;
            retry = (retry * 2).min(refresh);
            pause
        };
        replica.asked.send_replace(true);
        // Routers that lost the same replica do not come back in step.
        let pause = pause.mul_f64(rand::random_range(0.75..1.25));
        tokio::select! {
            () = sleep(pause) => {}
            () = replica.doubted.notified() => sleep(first_retry).await,
        }
    }
}
