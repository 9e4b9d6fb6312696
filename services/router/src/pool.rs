//! The replicas of one stage of one model: what each says of itself, how busy each is, and which one a call goes to.
//!
//! Load is counted here, from opening a stream to its end: with streams of seconds or minutes, what a balancer sees
//! at the headers says nothing. Of two replicas picked at random the less loaded one is taken: near the best choice,
//! and routers that see different loads do not all run to the same replica.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use emu2_serve::status;
use rand::seq::IndexedRandom;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{Status, transport::Channel};

use crate::{config::PoolConfig, error};

/// One of the three stages: its client and what it says of itself.
pub(crate) trait Stage: Send + Sync + 'static {
    /// In messages, spans and labels.
    const NAME: &'static str;
    type Client: Clone + Send + Sync;
    type Info: Send + Sync;

    fn client(channel: Channel, max_message_bytes: usize) -> Self::Client;
    fn info(client: Self::Client) -> impl Future<Output = Result<Self::Info, Status>> + Send;
    fn digest(info: &Self::Info) -> &str;
}

/// Replicas, and the tasks that watch them; dropping the pool ends those.
pub(crate) struct Pool<S: Stage> {
    replicas: Vec<Arc<Replica<S>>>,
    /// Whether any replica has ever answered.
    answered: watch::Sender<bool>,
    _watchers: JoinSet<()>,
}

/// The pools of one stage of all models. Models that name the same replicas share a pool: each replica is watched
/// once, and its load is all that this router sends it.
pub(crate) struct Pools<S: Stage> {
    config: PoolConfig,
    max_message_bytes: usize,
    started: HashMap<BTreeSet<String>, Arc<Pool<S>>>,
}

struct Replica<S: Stage> {
    endpoint: String,
    client: S::Client,
    outstanding: Arc<AtomicUsize>,
    known: RwLock<Known<S::Info>>,
    /// Woken when a call finds the replica lost.
    doubted: Notify,
    config: PoolConfig,
}

struct Known<I> {
    /// What it last said, however long ago.
    info: Option<Arc<I>>,
    /// Whether it answered when last asked.
    answers: bool,
}

/// A replica that a call goes to; it counts as load until dropped.
pub(crate) struct Lease<S: Stage> {
    replica: Arc<Replica<S>>,
}

impl<S: Stage> Pools<S> {
    pub(crate) fn new(config: &PoolConfig, max_message_bytes: usize) -> Self {
        Self { config: config.clone(), max_message_bytes, started: HashMap::new() }
    }

    /// The pool of these endpoints, in any order; begins to watch them when nobody has asked for it yet.
    pub(crate) fn get(&mut self, endpoints: &[String]) -> anyhow::Result<Arc<Pool<S>>> {
        let names = endpoints.iter().cloned().collect();
        if let Some(pool) = self.started.get(&names) {
            return Ok(Arc::clone(pool));
        }
        let pool = Arc::new(Pool::start(endpoints, &self.config, self.max_message_bytes)?);
        self.started.insert(names, Arc::clone(&pool));
        Ok(pool)
    }
}

impl<S: Stage> Pool<S> {
    /// Begins to ask every endpoint for its `Info`. The endpoints were checked with the configuration.
    fn start(endpoints: &[String], config: &PoolConfig, max_message_bytes: usize) -> anyhow::Result<Self> {
        let (answered, _) = watch::channel(false);
        let mut watchers = JoinSet::new();
        let mut replicas = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            let channel = emu2_serve::client::endpoint(endpoint.as_str())?.connect_lazy();
            let replica = Arc::new(Replica {
                endpoint: endpoint.clone(),
                client: S::client(channel, max_message_bytes),
                outstanding: Arc::default(),
                known: RwLock::new(Known { info: None, answers: false }),
                doubted: Notify::new(),
                config: config.clone(),
            });
            watchers.spawn(watch(Arc::clone(&replica), answered.clone()));
            replicas.push(replica);
        }
        Ok(Self { replicas, answered, _watchers: watchers })
    }

    /// Returns once any replica has answered.
    pub(crate) async fn answered(&self) {
        // The sender lives as long as this pool.
        let _ = self.answered.subscribe().wait_for(|answered| *answered).await;
    }

    /// Whether a replica answers now.
    pub(crate) fn is_ready(&self) -> bool {
        self.replicas.iter().any(|replica| replica.answers())
    }

    /// What a new request should go by: the word of the replica that it would be sent to. While a pool is being
    /// rolled, old and new weights share the requests as their replicas share the load.
    pub(crate) fn info(&self) -> Option<Arc<S::Info>> {
        self.choose(|replica| replica.info().is_some()).and_then(|replica| replica.info())
    }

    /// Opens a call on a replica with these weights; on the next one while replicas turn out to be lost.
    pub(crate) async fn open<T, F, Opening>(&self, digest: &str, start: F) -> Result<(T, Lease<S>), Status>
    where
        F: Fn(S::Client) -> Opening,
        Opening: Future<Output = Result<T, Status>>,
    {
        let mut lost = Vec::new();
        let mut last =
            status::unavailable(format!("no {} replica with the request's weights is left", S::NAME));
        loop {
            let fits = |replica: &Arc<Replica<S>>| {
                let matches = replica.info().is_some_and(|info| S::digest(&info) == digest);
                matches && !lost.contains(&replica.endpoint)
            };
            let Some(replica) = self.choose(fits) else { return Err(last) };
            let lease = Lease::new(replica);
            match start(lease.replica.client.clone()).await {
                Err(status) if error::is_replica_lost(&status) => {
                    tracing::warn!(stage = S::NAME, endpoint = lease.replica.endpoint, %status, "replica lost");
                    lease.replica.doubt();
                    lost.push(lease.replica.endpoint.clone());
                    last = status;
                }
                opened => return Ok((opened?, lease)),
            }
        }
    }

    /// The less loaded of two random ones that fit; those that did not answer last time only if there are no others,
    /// since one of them may have come back.
    fn choose(&self, fits: impl Fn(&Arc<Replica<S>>) -> bool) -> Option<Arc<Replica<S>>> {
        let fitting: Vec<_> = self.replicas.iter().filter(|replica| fits(replica)).collect();
        let answering: Vec<_> = fitting.iter().copied().filter(|replica| replica.answers()).collect();
        let candidates = if answering.is_empty() { fitting } else { answering };
        let two = candidates.choose_multiple(&mut rand::rng(), 2);
        two.min_by_key(|replica| replica.outstanding.load(Ordering::Relaxed))
            .map(|replica| Arc::clone(replica))
    }
}

impl<S: Stage> Replica<S> {
    fn info(&self) -> Option<Arc<S::Info>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).info.clone()
    }

    fn answers(&self) -> bool {
        self.known.read().unwrap_or_else(PoisonError::into_inner).answers
    }

    /// Asks the replica about itself; says whether it answered.
    async fn ask(&self) -> bool {
        let limit = Duration::from_millis(self.config.info_timeout_ms);
        let answer = timeout(limit, S::info(self.client.clone())).await;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let answered = match answer {
            Ok(Ok(info)) => {
                let changed = known.info.as_ref().is_none_or(|old| S::digest(old) != S::digest(&info));
                if changed {
                    tracing::info!(
                        stage = S::NAME,
                        endpoint = self.endpoint,
                        digest = S::digest(&info),
                        "replica"
                    );
                }
                known.info = Some(Arc::new(info));
                true
            }
            Ok(Err(_)) | Err(_) => false,
        };
        if known.answers && !answered {
            tracing::warn!(stage = S::NAME, endpoint = self.endpoint, "replica does not answer");
        }
        known.answers = answered;
        answered
    }

    fn doubt(&self) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).answers = false;
        self.doubted.notify_one();
    }
}

impl<S: Stage> Lease<S> {
    fn new(replica: Arc<Replica<S>>) -> Self {
        replica.outstanding.fetch_add(1, Ordering::Relaxed);
        Self { replica }
    }

    /// Asks the replica again, after it answered with other weights than it had said.
    pub(crate) async fn refresh(&self) {
        self.replica.ask().await;
    }

    /// Tells the pool that the replica was lost in the middle of a call.
    pub(crate) fn doubt(&self) {
        self.replica.doubt();
    }
}

impl<S: Stage> Drop for Lease<S> {
    fn drop(&mut self) {
        self.replica.outstanding.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Looks at a replica for as long as the pool lives.
async fn watch<S: Stage>(replica: Arc<Replica<S>>, answered: watch::Sender<bool>) {
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
        // Routers that lost the same replica do not come back in step.
        let pause = pause.mul_f64(rand::random_range(0.75..1.25));
        tokio::select! {
            () = sleep(pause) => {}
            () = replica.doubted.notified() => sleep(first_retry).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::Encoder;

    #[tokio::test]
    async fn models_that_name_the_same_replicas_share_a_pool() {
        let mut pools = Pools::<Encoder>::new(&PoolConfig::default(), 1 << 20);
        let mut pool = |endpoints: &[&str]| {
            let endpoints: Vec<_> = endpoints.iter().map(|it| format!("http://{it}")).collect();
            pools.get(&endpoints).unwrap()
        };
        let (one, two) = (pool(&["a:1", "b:1"]), pool(&["b:1", "a:1"]));
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!(one.replicas.len(), 2);
        for other in [pool(&["a:1"]), pool(&["a:1", "b:2"])] {
            assert!(!Arc::ptr_eq(&one, &other));
        }
    }
}
