//! Where Redis is, from one URL. One server is written as everywhere; several share one set of credentials:
//!
//! | URL | means |
//! |---|---|
//! | `redis://[user:password@]host[:port][/db]` | one server |
//! | `redis-cluster://[user:password@]host[:port],host[:port],…` | a Cluster, by some of its nodes |
//! | `redis-sentinel://[user:password@]host[:port],…[/db][?sentinel_password=…]#name` | the master that Sentinels call so |
//!
//! With `rediss` in place of `redis` every connection is TLS, to Sentinels too. Sentinels that ask for credentials get
//! those of the query (`sentinel_username`, `sentinel_password`), the others are the servers'.

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};

/// Where Sentinels listen unless they say otherwise.
const SENTINEL_PORT: u16 = 26379;

/// Printed nowhere: it holds passwords.
#[derive(Clone)]
pub(crate) enum Address {
    Server(ConnectionInfo),
    Cluster(Vec<ConnectionInfo>),
    Sentinel(Sentinel),
}

#[derive(Clone)]
pub(crate) struct Sentinel {
    pub(crate) sentinels: Vec<ConnectionAddr>,
    /// The servers' name among the Sentinels.
    pub(crate) master: String,
    /// How to enter a server; its address is what the Sentinels say.
    pub(crate) server: ConnectionInfo,
    pub(crate) username: Option<String>,
    pub(crate) password: Option<String>,
}

impl Address {
    /// None for what cannot be read. No error: the parser's own words could quote a password.
    pub(crate) fn parse(url: &str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let (tls, kind) = scheme.split_once('-').unwrap_or((scheme, ""));
        if !kind.is_empty() && !["redis", "rediss"].contains(&tls) {
            return None;
        }
        match kind {
            "" => connection(url).map(Self::Server),
            "cluster" => {
                each_host(tls, rest).map(|url| connection(&url)).collect::<Option<_>>().map(Self::Cluster)
            }
            "sentinel" => {
                let (rest, master) = rest.split_once('#').filter(|(_, master)| !master.is_empty())?;
                sentinel(each_host(tls, rest).collect(), master.to_owned()).map(Self::Sentinel)
            }
            _ => None,
        }
    }

    /// Whether connections to it are TLS.
    pub(crate) fn is_tls(&self) -> bool {
        let addr = match self {
            Self::Server(server) => Some(server.addr()),
            Self::Cluster(nodes) => nodes.first().map(ConnectionInfo::addr),
            Self::Sentinel(sentinel) => sentinel.sentinels.first(),
        };
        matches!(addr, Some(ConnectionAddr::TcpTls { .. }))
    }
}

/// One URL per host; each keeps the credentials and all that follows the hosts.
fn each_host(scheme: &str, rest: &str) -> impl Iterator<Item = String> {
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (credentials, hosts) = match authority.rsplit_once('@') {
        Some((credentials, hosts)) => (format!("{credentials}@"), hosts),
        None => (String::new(), authority),
    };
    hosts.split(',').map(move |host| format!("{scheme}://{credentials}{host}{tail}"))
}

fn connection(url: &str) -> Option<ConnectionInfo> {
    let info = redis::parse_redis_url(url)?.into_connection_info().ok()?;
    // `#insecure` would take anybody's certificate.
    let insecure = matches!(info.addr(), ConnectionAddr::TcpTls { insecure: true, .. });
    (!insecure).then_some(info)
}

fn sentinel(urls: Vec<String>, master: String) -> Option<Sentinel> {
    let mut sentinels = Vec::new();
    for url in &urls {
        let mut url = redis::parse_redis_url(url)?;
        if url.port().is_none() {
            url.set_port(Some(SENTINEL_PORT)).ok()?;
        }
        sentinels.push(connection(url.as_str())?.addr().clone());
    }
    let first = redis::parse_redis_url(urls.first()?)?;
    let query = |name| first.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
    Some(Sentinel {
        sentinels,
        master,
        username: query("sentinel_username"),
        password: query("sentinel_password"),
        server: connection(first.as_str())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(info: &ConnectionInfo) -> Option<&str> {
        info.redis_settings().password()
    }

    #[test]
    fn one_server_is_written_as_everywhere() {
        let Some(Address::Server(server)) = Address::parse("rediss://user:hunt%40er@cache:6380/3") else {
            panic!("not read")
        };
        assert_eq!(server.addr().to_string(), "cache:6380");
        assert_eq!((password(&server), server.redis_settings().db()), (Some("hunt@er"), 3));
        assert!(Address::parse("rediss://cache").unwrap().is_tls());
        assert!(!Address::parse("redis://cache").unwrap().is_tls());
    }

    #[test]
    fn the_nodes_of_a_cluster_share_credentials() {
        let url = "redis-cluster://:hunter2@one:7000,two,[::1]:7002";
        let Some(Address::Cluster(nodes)) = Address::parse(url) else { panic!("not read") };
        let addresses: Vec<_> = nodes.iter().map(|node| node.addr().to_string()).collect();
        assert_eq!(addresses, ["one:7000", "two:6379", "::1:7002"]);
        assert!(nodes.iter().all(|node| password(node) == Some("hunter2")));
        assert!(Address::parse("rediss-cluster://one").unwrap().is_tls());
    }

    #[test]
    fn sentinels_have_a_port_a_name_and_credentials_of_their_own() {
        let url = "rediss-sentinel://user:servers@one,two:26380/2?sentinel_password=sentin%20els#cache";
        let address = Address::parse(url).unwrap();
        assert!(address.is_tls());
        let Address::Sentinel(sentinel) = address else { panic!("not Sentinels") };
        let addresses: Vec<_> = sentinel.sentinels.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["one:26379", "two:26380"]);
        assert_eq!(sentinel.master, "cache");
        assert_eq!((sentinel.username, sentinel.password.as_deref()), (None, Some("sentin els")));
        assert_eq!((password(&sentinel.server), sentinel.server.redis_settings().db()), (Some("servers"), 2));
    }

    #[test]
    fn what_means_nothing_or_is_not_safe_is_not_read() {
        for url in [
            "",
            "nonsense:hunter2",
            "http://cache",
            "redis-sentinel://one",
            "redis-sentinel://one#",
            "redis-cluster://",
            "redis-cluster://one,,two",
            "redis-ring://one",
            "valkey-cluster://one",
            "rediss://cache/#insecure",
            "rediss-cluster://cache/#insecure",
        ] {
            assert!(Address::parse(url).is_none(), "{url}");
        }
    }
}
