//! The replicas of one stage of one model, and which of them a call goes to.
//!
//! | module | holds |
//! |---|---|
//! | `members` | who is in the pool: fixed endpoints, and names that are resolved again and again |
//! | `load` | how busy a replica is |
//! | `replica` | one replica: what it says of itself, its health, the leases of calls on it |
//! | `pace` | the best pace at which the stage was seen to work |
//! | `stage` | what a stage says of itself, and its client |
//!
//! Every replica reports its load as it changes, the work of all routers in it; what this router has sent it since is
//! added (`load`). Of two replicas picked at random the less busy one is taken: near the best choice, and routers that
//! have the same report do not all run to the same replica.

mod load;
mod members;
mod pace;
mod replica;
mod stage;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use rand::seq::IndexedRandom;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tower::retry::budget::{Budget, TpsBudget};

use self::{
    members::{Members, Target},
    replica::Replica,
};
pub(crate) use self::{
    pace::{BestPace, PaceSample},
    replica::Lease,
    stage::Stage,
};
use crate::{config::PoolConfig, field_hasher::FieldHasher};

/// How much busier than the average the replica that a hint names may be: keeping keys and values warm saves a
/// prefill, which a queue soon costs.
const HINT_MAX_LOAD: f64 = 1.25;

/// How long a call's share of a retry counts, and a spent retry with it.
const RETRIES_COUNT: Duration = Duration::from_secs(10);
/// Retries a second that no call has to earn: 260 in ten seconds, since the streams of one lost replica all go on
/// elsewhere, and a router has 256.
const RETRIES_RESERVED: u32 = 26;
/// What a call earns of a retry.
const RETRIES_EARNED: f32 = 0.2;

/// Replicas, and the tasks that watch them; dropping the pool ends those.
pub(crate) struct Pool<S: Stage> {
    members: Arc<Members<S>>,
    /// How often the pool may be asked again: one that is merely missing a replica never notices, and one that is sick
    /// is not stormed.
    retries: TpsBudget,
    best_pace: Arc<BestPace>,
    config: PoolConfig,
    _follower: Option<AbortOnDropHandle<()>>,
}

/// The pools of one stage of all models. Models that name the same replicas share a pool: each replica is watched
/// once, and its load is all that this router sends it.
pub(crate) struct Pools<S: Stage> {
    config: PoolConfig,
    max_message_bytes: usize,
    started: HashMap<BTreeSet<String>, Arc<Pool<S>>>,
}

/// What a call asks of its replica.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) digest: &'a str,
    /// Calls with equal hints share work on one replica: a prompt's beginning.
    pub(crate) hint: Option<u64>,
    /// Endpoints that the call has found wanting.
    pub(crate) avoid: &'a [String],
}

/// Why no replica can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoReplica {
    /// No replica has these weights any more, but there are others.
    WeightsChanged,
    /// None that has these weights is left that the call has not tried, but others answer.
    Rolling,
    /// None is left that the call has not tried.
    Gone,
    /// The pool has been asked again too often.
    TooManyRetries,
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
        let pool = Arc::new(Pool::start(&names, &self.config, self.max_message_bytes)?);
        self.started.insert(names, Arc::clone(&pool));
        Ok(pool)
    }
}

impl<S: Stage> Pool<S> {
    /// Begins to ask every endpoint for its `Info`. The endpoints were checked with the configuration.
    fn start(
        endpoints: &BTreeSet<String>,
        config: &PoolConfig,
        max_message_bytes: usize,
    ) -> anyhow::Result<Self> {
        let members = Arc::new(Members::new(config, max_message_bytes)?);
        let targets: Vec<_> = endpoints.iter().map(|endpoint| Target::parse(endpoint)).collect();
        let fixed = targets.iter().all(|target| matches!(target, Target::One(_)));
        let follower = if fixed {
            members.set(endpoints)?;
            None
        } else {
            let following = tokio::spawn(members::follow(Arc::clone(&members), targets));
            Some(AbortOnDropHandle::new(following))
        };
        Ok(Self {
            members,
            retries: TpsBudget::new(RETRIES_COUNT, RETRIES_RESERVED, RETRIES_EARNED),
            best_pace: Arc::default(),
            config: config.clone(),
            _follower: follower,
        })
    }

    pub(crate) fn config(&self) -> &PoolConfig {
        &self.config
    }

    pub(crate) fn best_pace(&self) -> &Arc<BestPace> {
        &self.best_pace
    }

    /// Returns once any replica has answered and every other that is known by then has been asked: the first requests
    /// are for all of them.
    pub(crate) async fn answered(&self) {
        // The sender lives as long as this pool.
        let _ = self.members.answered.subscribe().wait_for(|answered| *answered).await;
        let all = async {
            for replica in self.members.replicas() {
                replica.asked().await;
            }
        };
        // One that has left the pool meanwhile is never asked.
        let _ = timeout(Duration::from_millis(self.config.info_timeout_ms), all).await;
    }

    /// Whether a replica answers now.
    pub(crate) fn is_ready(&self) -> bool {
        self.members.replicas().iter().any(|replica| replica.answers())
    }

    /// Whether every replica refuses connections.
    pub(crate) fn is_refused(&self) -> bool {
        self.members.replicas().iter().all(|replica| replica.refuses())
    }

    /// What a replica says of itself, preferably one that answers.
    pub(crate) fn info(&self) -> Option<Arc<S::Info>> {
        let known: Vec<_> =
            self.members.replicas().into_iter().filter(|replica| replica.info().is_some()).collect();
        choose(&known, None).and_then(|replica| replica.info())
    }

    /// How far behind the stage is for a new request: as far as the least of its answering replicas, each counted once
    /// requests have waited there for longer than `patience`.
    pub(crate) fn behind(&self, patience: Duration) -> Duration {
        let answering = self.members.replicas().into_iter().filter(|replica| replica.answers());
        answering.map(|replica| replica.behind(patience)).min().unwrap_or_default()
    }

    /// A replica for a first try.
    pub(crate) fn lease(&self, wanted: Wanted<'_>) -> Result<Lease<S>, NoReplica> {
        self.retries.deposit();
        self.pick(wanted)
    }

    /// A replica for another try; a retry is spent only where there is one.
    pub(crate) fn lease_again(&self, wanted: Wanted<'_>) -> Result<Lease<S>, NoReplica> {
        let lease = self.pick(wanted)?;
        if self.retries.withdraw() { Ok(lease) } else { Err(NoReplica::TooManyRetries) }
    }

    /// Makes every replica one that was asked and answered this.
    #[cfg(test)]
    pub(crate) fn say(&self, info: &S::Info)
    where
        S::Info: Clone,
    {
        self.members.replicas().iter().for_each(|replica| replica.says(info.clone()));
    }

    fn pick(&self, wanted: Wanted<'_>) -> Result<Lease<S>, NoReplica> {
        let replicas = self.members.replicas();
        let has_weights =
            |replica: &Arc<Replica<S>>| replica.info().map(|info| S::digest(&info) == wanted.digest);
        let (mut fitting, others): (Vec<_>, Vec<_>) =
            replicas.into_iter().partition(|replica| has_weights(replica) == Some(true));
        let rolls = others.iter().any(|replica| replica.answers());
        if fitting.is_empty() && rolls {
            return Err(NoReplica::WeightsChanged);
        }
        fitting.retain(|replica| !wanted.avoid.contains(&replica.endpoint));
        let none = if rolls { NoReplica::Rolling } else { NoReplica::Gone };
        choose(&fitting, wanted.hint).map(Lease::new).ok_or(none)
    }
}

/// The one that the hint names unless it is too busy, else the less loaded of two random ones. Those that did not
/// answer last time come only if there are no others, since one of them may have come back; those that are set aside
/// for failing only if that would set aside most of the pool.
fn choose<S: Stage>(fitting: &[Arc<Replica<S>>], hint: Option<u64>) -> Option<Arc<Replica<S>>> {
    let answering: Vec<_> = fitting.iter().filter(|replica| replica.answers()).collect();
    let trusted: Vec<_> = answering.iter().copied().filter(|replica| !replica.is_ejected()).collect();
    let candidates = match (trusted.len(), answering.len()) {
        (_, 0) => fitting.iter().collect(),
        (trusted_count, all) if 2 * trusted_count >= all => trusted,
        _ => answering,
    };
    if let Some(hinted) = hint.and_then(|hint| hinted(&candidates, hint)) {
        return Some(Arc::clone(hinted));
    }
    let two = candidates.choose_multiple(&mut rand::rng(), 2);
    let less_busy = two.map(|replica| (replica, replica.busy())).min_by(|(_, a), (_, b)| a.cmp(b));
    less_busy.map(|(replica, _)| Arc::clone(replica))
}

/// Names a replica for a hint by rendezvous hashing, so that a replica that comes or goes moves only its own share of
/// the hints.
fn hinted<'a, S: Stage>(candidates: &[&'a Arc<Replica<S>>], hint: u64) -> Option<&'a Arc<Replica<S>>> {
    let score = |replica: &Arc<Replica<S>>| {
        let mut hasher = FieldHasher::default();
        hasher.push(&hint.to_le_bytes());
        hasher.push(replica.endpoint.as_bytes());
        hasher.hint()
    };
    let named = candidates.iter().copied().max_by_key(|replica| score(replica))?;
    let total: usize = candidates.iter().map(|replica| replica.busy().requests).sum();
    let fair = (total + 1) as f64 / candidates.len() as f64;
    ((named.busy().requests as f64) < (fair * HINT_MAX_LOAD).max(1.0)).then_some(named)
}
