use std::net::TcpListener;

use emu2_proto::stage::{EncoderInfo, Load};
use tokio::time::advance;

use super::*;
use crate::stages::Encoder;

/// Replicas that have said which weights they have, and say nothing more: their ports take connections and are silent.
struct Quiet {
    pool: Pool<Encoder>,
    /// In the pool's order.
    endpoints: Vec<String>,
    _ports: Vec<TcpListener>,
}

impl Quiet {
    fn new(digests: &[&str]) -> Self {
        let ports: Vec<_> = digests.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let endpoints: BTreeSet<_> =
            ports.iter().map(|port| format!("http://{}", port.local_addr().unwrap())).collect();
        let never = 3_600_000;
        let config = PoolConfig { info_timeout_ms: never, ..PoolConfig::default() };
        let pool = Pool::start(&endpoints, &config, 1 << 20).unwrap();
        for (replica, digest) in pool.members.replicas().iter().zip(digests) {
            replica.says(EncoderInfo { weights_digest: (*digest).to_owned(), ..Default::default() });
        }
        Self { pool, endpoints: endpoints.into_iter().collect(), _ports: ports }
    }

    /// Which replicas twenty calls in a row go to.
    fn taken(&self, wanted: Wanted<'_>) -> BTreeSet<usize> {
        let index = |_| self.index(&self.pool.lease(wanted).unwrap());
        (0..20).map(index).collect()
    }

    fn index(&self, lease: &Lease<Encoder>) -> usize {
        self.endpoints.iter().position(|endpoint| endpoint == lease.endpoint()).unwrap()
    }

    fn replica(&self, index: usize) -> Arc<Replica<Encoder>> {
        Arc::clone(&self.pool.members.replicas()[index])
    }
}

fn wanted(avoid: &[String]) -> Wanted<'_> {
    Wanted { digest: "d", hint: None, avoid }
}

#[tokio::test]
async fn models_that_name_the_same_replicas_share_a_pool() {
    let mut pools = Pools::<Encoder>::new(&PoolConfig::default(), 1 << 20);
    let mut pool = |endpoints: &[&str]| {
        let endpoints: Vec<_> = endpoints.iter().map(|it| format!("http://{it}")).collect();
        pools.get(&endpoints).unwrap()
    };
    let (one, two) = (pool(&["a:1", "b:1"]), pool(&["b:1", "a:1"]));
    assert!(Arc::ptr_eq(&one, &two));
    assert_eq!(one.members.replicas().len(), 2);
    for other in [pool(&["a:1"]), pool(&["a:1", "b:2"])] {
        assert!(!Arc::ptr_eq(&one, &other));
    }
}

#[tokio::test]
async fn a_call_goes_only_where_its_weights_are_and_it_has_not_been() {
    let quiet = Quiet::new(&["d", "other", "d"]);
    assert_eq!(quiet.taken(wanted(&[])), BTreeSet::from([0, 2]));
    let tried = &quiet.endpoints;
    assert_eq!(quiet.taken(wanted(&tried[..1])), BTreeSet::from([2]));
    assert_eq!(quiet.pool.lease(wanted(tried)).err(), Some(NoReplica::Rolling));
    quiet.pool.lease(Wanted { digest: "other", ..wanted(&[]) }).unwrap().mark_suspect();
    assert_eq!(quiet.pool.lease(wanted(tried)).err(), Some(NoReplica::Gone), "nobody else answers either");
    let older = Wanted { digest: "older", ..wanted(&[]) };
    assert_eq!(quiet.pool.lease(older).err(), Some(NoReplica::WeightsChanged));
}

/// As when a name's addresses change.
#[tokio::test]
async fn a_replica_that_leaves_keeps_its_calls_and_gets_no_more() {
    let quiet = Quiet::new(&["d", "d"]);
    let leases: Vec<_> = (0..20).map(|_| quiet.pool.lease(wanted(&[])).unwrap()).collect();
    quiet.pool.members.set(&BTreeSet::from([quiet.endpoints[0].clone()])).unwrap();
    assert_eq!(quiet.taken(wanted(&[])), BTreeSet::from([0]));
    assert!(leases.iter().any(|lease| quiet.index(lease) == 1), "its calls are still there");

    quiet.pool.members.set(&quiet.endpoints.iter().cloned().collect()).unwrap();
    assert_eq!(quiet.taken(wanted(&[])), BTreeSet::from([0]), "it has not said anything yet");
    quiet.replica(1).says(EncoderInfo { weights_digest: "d".into(), ..Default::default() });
    assert_eq!(quiet.taken(wanted(&[])), BTreeSet::from([1]), "the less loaded");
}

#[tokio::test(start_paused = true)]
async fn a_replica_whose_calls_fail_is_set_aside_for_a_while_but_never_most_of_a_pool() {
    let quiet = Quiet::new(&["d", "d", "d"]);
    let fail = |index: usize| {
        let lease = Lease::new(quiet.replica(index));
        (0..5).for_each(|_| lease.record_outcome(false));
    };
    let taken = || quiet.taken(wanted(&[]));
    fail(0);
    assert_eq!(taken(), BTreeSet::from([1, 2]));
    fail(1);
    assert_eq!(taken(), BTreeSet::from([0, 1, 2]), "two of three are most");
    advance(Duration::from_secs(5)).await;
    fail(0);
    assert_eq!(taken(), BTreeSet::from([1, 2]));
    advance(Duration::from_secs(5)).await;
    assert_eq!(taken(), BTreeSet::from([1, 2]), "twice as long the second time");
    advance(Duration::from_secs(5)).await;
    assert_eq!(taken(), BTreeSet::from([0, 1, 2]));
}

#[tokio::test(start_paused = true)]
async fn retries_are_spent_and_earned() {
    let quiet = Quiet::new(&["d"]);
    let again = || quiet.pool.lease_again(wanted(&[])).map(drop);
    assert_eq!(std::iter::repeat_with(again).take_while(Result::is_ok).count(), 260);
    assert_eq!(again(), Err(NoReplica::TooManyRetries));
    (0..5).for_each(|_| drop(quiet.pool.lease(wanted(&[])).unwrap()));
    assert_eq!(again(), Ok(()));
    assert_eq!(again(), Err(NoReplica::TooManyRetries));
    advance(Duration::from_secs(11)).await;
    assert_eq!(again(), Ok(()), "what was spent is forgotten");
}

/// As an autoscaler's new replica among busy ones.
#[tokio::test]
async fn a_call_goes_where_fewer_seconds_of_work_are_reported() {
    let quiet = Quiet::new(&["d", "d"]);
    let says = |index: usize, backlog_seconds| {
        let load = Some(Load { running: 2, backlog_seconds, ..Default::default() });
        quiet.replica(index).says(EncoderInfo { weights_digest: "d".into(), load, ..Default::default() });
    };
    says(0, 20.0);
    says(1, 1.0);
    assert_eq!(quiet.taken(wanted(&[])), BTreeSet::from([1]));
    says(1, 60.0);
    assert_eq!(quiet.taken(wanted(&[])), BTreeSet::from([0]));
}
