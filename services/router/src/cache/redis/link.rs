//! The connection to Redis, whatever kind of Redis it is: made in the background, made again whenever it is lost, so
//! that a request waits for its answer alone. Every kind is asked the same way.

use std::{sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, RedisResult, ServerErrorKind,
    TlsCertificates, TlsMode,
    aio::MultiplexedConnection,
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    address::{Address, Sentinel},
    certificates::Certificates,
};

/// One server's connecting: TCP, TLS, credentials. Nobody waits for it but the first requests.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Several may have to be tried: Sentinels or nodes that are gone.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause from one vain try to connect to the next; drawn between half of it and one and a half, so that routers do
/// not come together.
const PAUSE: Duration = Duration::from_millis(500);
/// Redirections of one question to a Cluster: after a failover one is usual.
const CLUSTER_RETRIES: u32 = 3;

pub(crate) struct Link {
    state: Arc<watch::Sender<State>>,
    _keeper: AbortOnDropHandle<()>,
}

#[derive(Clone)]
enum State {
    Connecting,
    /// The connection with its number, by which one loss is told only once.
    Up(u64, Connection),
    /// The last try was in vain; the next one comes by itself.
    Down,
}

#[derive(Clone)]
enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Link {
    /// Connects in the background. Fails on certificates that cannot be read.
    pub(crate) fn open(
        address: Address,
        certificates: Certificates,
        answer_timeout: Duration,
    ) -> RedisResult<Self> {
        let connector = Connector::new(address, certificates, answer_timeout)?;
        let state = Arc::new(watch::Sender::new(State::Connecting));
        let keeper = tokio::spawn(keep(connector, Arc::clone(&state)));
        Ok(Self { state, _keeper: AbortOnDropHandle::new(keeper) })
    }

    /// Redis' answer. While a connection is being made it waits; while there is none to be had it fails at once.
    pub(crate) async fn ask<T: FromRedisValue>(&self, question: &Cmd) -> RedisResult<T> {
        let settled = self
            .state
            .subscribe()
            .wait_for(|state| !matches!(state, State::Connecting))
            .await
            .map(|it| it.clone());
        let Ok(State::Up(number, mut connection)) = settled else {
            return Err((ErrorKind::Io, "Redis cannot be reached").into());
        };
        let answer = match &mut connection {
            Connection::Server(server) => question.query_async(server).await,
            Connection::Cluster(cluster) => question.query_async(cluster).await,
        };
        if let Err(error) = &answer
            && is_lost(error)
        {
            self.lose(|it| it == number);
        }
        answer
    }

    /// Gives the connection up: it may be half dead, where no error ever comes.
    pub(crate) fn renew(&self) {
        self.lose(|_| true);
    }

    fn lose(&self, lost: impl Fn(u64) -> bool) {
        self.state.send_if_modified(|state| {
            let is_lost = matches!(state, State::Up(number, _) if lost(*number));
            if is_lost {
                *state = State::Connecting;
            }
            is_lost
        });
    }
}

/// A server that became a replica answers, but not for us: who the master is must be asked again.
fn is_lost(error: &redis::RedisError) -> bool {
    error.is_unrecoverable_error() || error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
}

/// The keeper's task: a connection whenever there is none.
async fn keep(connector: Connector, state: Arc<watch::Sender<State>>) {
    let mut losses = state.subscribe();
    let mut number = 0;
    while losses.wait_for(|state| !matches!(state, State::Up(..))).await.is_ok() {
        match timeout(SEARCH_TIMEOUT, connector.connect()).await {
            Ok(Ok(connection)) => {
                number += 1;
                state.send_replace(State::Up(number, connection));
            }
            failed => {
                // The kind alone: an error's text may quote what was sent.
                let reason = failed.map_or("no answer in time".into(), |it| {
                    it.map_or_else(|error| format!("{:?}", error.kind()), |_| String::new())
                });
                tracing::debug!(reason, "Redis cannot be reached");
                state.send_replace(State::Down);
                sleep(PAUSE.mul_f64(rand::random_range(0.5..1.5))).await;
            }
        }
    }
}

/// How to connect to each kind of Redis.
struct Connector {
    address: Address,
    certificates: Certificates,
    answer_timeout: Duration,
}

/// What one kind of Redis is connected to with.
enum To {
    Server(Client),
    Cluster(ClusterClient),
    Sentinel(SentinelClient),
}

impl Connector {
    fn new(address: Address, certificates: Certificates, answer_timeout: Duration) -> RedisResult<Self> {
        if address.is_tls() {
            // The first to come decides for the process; here all of it uses this one.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let connector = Self { address, certificates, answer_timeout };
        // Built anew for every connection; once here to see that it can be.
        connector.to()?;
        Ok(connector)
    }

    /// Connects with the certificates as they are at this moment. (A Cluster's client makes its nodes' connections
    /// again by itself, with those it has, until all of it is lost.)
    fn to(&self) -> RedisResult<To> {
        let certificates = self.certificates.read()?;
        Ok(match (&self.address, certificates) {
            (Address::Server(server), None) => To::Server(Client::open(server.clone())?),
            (Address::Server(server), Some(certificates)) => {
                To::Server(Client::build_with_tls(server.clone(), certificates)?)
            }
            (Address::Cluster(nodes), certificates) => {
                let mut builder = ClusterClient::builder(nodes.clone())
                    .retries(CLUSTER_RETRIES)
                    .connection_timeout(CONNECT_TIMEOUT)
                    .response_timeout(self.answer_timeout);
                if let Some(certificates) = certificates {
                    builder = builder.certs(certificates);
                }
                To::Cluster(builder.build()?)
            }
            (Address::Sentinel(sentinel), certificates) => {
                To::Sentinel(sentinel_client(sentinel, certificates)?.build()?)
            }
        })
    }

    async fn connect(&self) -> RedisResult<Connection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(self.answer_timeout));
        match self.to()? {
            To::Server(client) => {
                client.get_multiplexed_async_connection_with_config(&config).await.map(Connection::Server)
            }
            To::Cluster(client) => client.get_async_connection().await.map(Connection::Cluster),
            To::Sentinel(mut client) => {
                client.get_async_connection_with_config(&config).await.map(Connection::Server)
            }
        }
    }
}

fn sentinel_client(
    sentinel: &Sentinel,
    certificates: Option<TlsCertificates>,
) -> RedisResult<SentinelClientBuilder> {
    let Sentinel { sentinels, master, server, username, password } = sentinel;
    let mut builder = SentinelClientBuilder::new(sentinels.clone(), master, SentinelServerType::Master)?;
    let settings = server.redis_settings();
    builder = builder.set_client_to_redis_db(settings.db());
    if let Some(username) = settings.username() {
        builder = builder.set_client_to_redis_username(username);
    }
    if let Some(password) = settings.password() {
        builder = builder.set_client_to_redis_password(password);
    }
    if let Some(username) = username {
        builder = builder.set_client_to_sentinel_username(username);
    }
    if let Some(password) = password {
        builder = builder.set_client_to_sentinel_password(password);
    }
    if matches!(server.addr(), redis::ConnectionAddr::TcpTls { .. }) {
        builder = builder
            .set_client_to_redis_tls_mode(TlsMode::Secure)
            .set_client_to_sentinel_tls_mode(TlsMode::Secure);
    }
    if let Some(certificates) = certificates {
        builder = builder
            .set_client_to_redis_certificates(certificates.clone())
            .set_client_to_sentinel_certificates(certificates);
    }
    Ok(builder)
}
