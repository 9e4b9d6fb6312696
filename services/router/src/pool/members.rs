//! Who is in a pool: endpoints with an address are for good; a name under `dns+http://` stands for all its
//! addresses, and is asked again and again, as Kubernetes answers for a headless service. A replica that leaves takes
//! no new calls; those that run on it go on to their end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use emu2_serve::client::Connector;
use tokio::{net::lookup_host, sync::watch, time::sleep};
use tokio_util::task::AbortOnDropHandle;

use super::{
    replica::{self, Replica},
    stage::Stage,
};
use crate::config::{PoolConfig, RESOLVED};

/// An endpoint of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    /// `http://host:port`: one replica.
    One(String),
    /// `dns+http://name:port`: a replica at each address of the name.
    All { scheme: String, name: String },
}

impl Target {
    pub(super) fn parse(endpoint: &str) -> Self {
        let resolved = endpoint.strip_prefix(RESOLVED).and_then(|rest| rest.split_once("://"));
        match resolved {
            Some((scheme, name)) => {
                Self::All { scheme: scheme.to_owned(), name: name.trim_end_matches('/').to_owned() }
            }
            None => Self::One(endpoint.to_owned()),
        }
    }

    /// The endpoints it stands for now; none of a name that cannot be resolved.
    async fn endpoints(&self) -> Option<BTreeSet<String>> {
        match self {
            Self::One(endpoint) => Some(BTreeSet::from([endpoint.clone()])),
            Self::All { scheme, name } => match lookup_host(name).await {
                Ok(addresses) => Some(addresses.map(|address| format!("{scheme}://{address}")).collect()),
                Err(error) => {
                    tracing::debug!(name, %error, "a pool's name has no addresses");
                    None
                }
            },
        }
    }
}

/// The replicas of a pool by endpoint.
pub(super) struct Members<S: Stage> {
    by_endpoint: RwLock<BTreeMap<String, Member<S>>>,
    /// Whether any replica has ever answered.
    pub(super) answered: watch::Sender<bool>,
    config: PoolConfig,
    connector: Connector,
    max_message_bytes: usize,
}

struct Member<S: Stage> {
    replica: Arc<Replica<S>>,
    _watcher: AbortOnDropHandle<()>,
}

impl<S: Stage> Members<S> {
    pub(super) fn new(config: &PoolConfig, max_message_bytes: usize) -> anyhow::Result<Self> {
        Ok(Self {
            by_endpoint: RwLock::default(),
            answered: watch::channel(false).0,
            config: config.clone(),
            connector: Connector::open(&config.tls)?,
            max_message_bytes,
        })
    }

    /// Returns the replicas in the order of their endpoints.
    pub(super) fn replicas(&self) -> Vec<Arc<Replica<S>>> {
        let members = self.by_endpoint.read().unwrap_or_else(PoisonError::into_inner);
        members.values().map(|member| Arc::clone(&member.replica)).collect()
    }

    /// Makes these the members: newcomers are watched from now on, and who is missing is watched no longer.
    pub(super) fn set(&self, endpoints: &BTreeSet<String>) -> anyhow::Result<()> {
        let mut members = self.by_endpoint.write().unwrap_or_else(PoisonError::into_inner);
        members.retain(|endpoint, _| {
            let stays = endpoints.contains(endpoint);
            if !stays {
                tracing::info!(stage = S::NAME, endpoint, "replica has left the pool");
            }
            stays
        });
        for endpoint in endpoints {
            if members.contains_key(endpoint) {
                continue;
            }
            let channel = self.connector.channel(endpoint)?;
            let client = S::client(channel, self.max_message_bytes);
            let replica = Arc::new(Replica::new(endpoint.clone(), client, &self.config));
            let watcher = tokio::spawn(replica::watch(Arc::clone(&replica), self.answered.clone()));
            members.insert(endpoint.clone(), Member { replica, _watcher: AbortOnDropHandle::new(watcher) });
        }
        Ok(())
    }
}

/// Resolves the names among `targets` for as long as the pool lives.
pub(super) async fn follow<S: Stage>(members: Arc<Members<S>>, targets: Vec<Target>) {
    let pause = Duration::from_millis(members.config.resolve_ms);
    let mut last: BTreeMap<Target, BTreeSet<String>> = BTreeMap::new();
    loop {
        for target in &targets {
            // A name server that does not answer is no reason to let go of replicas that do.
            if let Some(endpoints) = target.endpoints().await {
                last.insert(target.clone(), endpoints);
            }
        }
        if let Err(error) = members.set(&last.values().flatten().cloned().collect()) {
            tracing::error!(stage = S::NAME, %error, "an address cannot be called");
        }
        sleep(pause.mul_f64(rand::random_range(0.75..1.25))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_stands_for_its_addresses_and_an_endpoint_for_itself() {
        let name = Target::parse("dns+http://localhost:50052");
        assert_eq!(name, Target::All { scheme: "http".into(), name: "localhost:50052".into() });
        assert!(name.endpoints().await.unwrap().contains("http://127.0.0.1:50052"));
        let one = Target::parse("http://localhost:50052");
        assert_eq!(one.endpoints().await, Some(BTreeSet::from(["http://localhost:50052".to_owned()])));
        assert_eq!(Target::parse("dns+http://name.invalid:1").endpoints().await, None);
    }
}
