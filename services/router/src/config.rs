//! The router's configuration. Every limit has a name, its unit in its documentation, and the reason for its default.

use std::{collections::HashSet, fmt, path::PathBuf, time::Duration};

use emu2_serve::{
    config::Validate, priority::Priority, server::ServerConfig, telemetry::TelemetryConfig,
    tenant::AuthConfig, tls::ClientTlsConfig,
};
use serde::{Deserialize, Serialize};

use crate::cache::Address;

/// What precedes the scheme of an endpoint whose name stands for all its addresses.
pub(crate) const RESOLVED: &str = "dns+";

/// The configuration of the router: what runs here and how far it goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The models by name, each with the replicas of its stages. Default: `emu2` on the services' default ports.
    pub models: Vec<ModelConfig>,
    /// The bounds on one request.
    pub limits: LimitsConfig,
    /// Who is let in when there is much to do.
    pub admission: AdmissionConfig,
    /// Where embeddings are kept.
    pub cache: CacheConfig,
    /// How replicas are watched, and whose certificates are trusted.
    pub pool: PoolConfig,
    /// Which tokens callers must have, and what their tenants may use.
    pub auth: AuthConfig,
    /// How the service listens, sheds load and stops.
    pub server: ServerConfig,
    /// Where logs and traces go.
    pub telemetry: TelemetryConfig,
}

/// One model that clients may name. Models that name the same replicas of a stage share its pool; with the same visual
/// weights they also share the embeddings of images, which are kept by the weights' digest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The name that requests call it by.
    pub name: String,
    /// Replicas as `http://host:port`, or `dns+http://name:port` for one at each address of a name; at least one.
    pub encoder: Vec<String>,
    /// Replicas as `http://host:port`, or `dns+http://name:port` for one at each address of a name; at least one.
    pub llm: Vec<String>,
    /// Replicas, written likewise; none for a model that only writes.
    #[serde(default)]
    pub decoder: Vec<String>,
}

/// Bounds on one request that are the router's own; those of a model come from its stages.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Parts of one prompt, all turns together. 1,024: no prompt with more fits 2,048 positions.
    pub max_parts: u32,
    /// Images, frames and boxes of one request. 256: eight times what fits 2,048 positions at 64 queries an image;
    /// the llm refuses by positions, this refuses before anything is looked at.
    pub max_images: u32,
    /// Images of one request that are looked up or encoded at a time. 16: fills an encoder's batches without one
    /// request filling its queue.
    pub images_in_flight: usize,
    /// Milliseconds that computing one cached value may take, queue included. Such work is shared by requests, so
    /// it cannot have the deadline of one. 300,000: regressing a negative on CPUs takes minutes.
    pub shared_work_ms: u64,
    /// Events of one request that wait for a slow client before its stages are held back. 32: one image's worth
    /// of progress.
    pub waiting_events: usize,
}

/// Who is let in when there is much to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdmissionConfig {
    /// Percent of `server.max_requests` up to which requests of class low are let in, whoever fills it. 50: work that
    /// can wait leaves half of the room to work that cannot.
    pub low_percent: u32,
    /// Likewise for class normal. 90: somebody who waits gets in when everybody else is there already.
    pub normal_percent: u32,
    /// Milliseconds that a stage may be behind, as far as it was measured, before requests that need it are refused.
    /// 60,000: beyond a minute a caller does better to come back.
    pub max_backlog_ms: u64,
}

/// Where embeddings are kept. The embedded default is this process's memory alone.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Bytes of embeddings kept in memory; 0 keeps none. 256 MiB: about 1,000 images at 64 queries in bf16.
    pub memory_bytes: u64,
    /// A Redis that all routers share; absent: memory alone. `redis://` for one server, `redis-cluster://` for a
    /// Cluster, `redis-sentinel://…#name` for Sentinels, `rediss…` for TLS; several hosts stand with commas between
    /// them. A secret: it may hold passwords.
    pub redis_url: Option<RedisUrl>,
    /// The CA that signed the certificates of a `rediss` URL, in PEM; absent: those that the system trusts.
    pub redis_ca_file: Option<PathBuf>,
    /// PEM: the router's own certificate, where a `rediss` URL's servers ask for one. It, its key and the CA are read
    /// again for each new connection.
    pub redis_cert_file: Option<PathBuf>,
    /// PEM: that certificate's private key.
    pub redis_key_file: Option<PathBuf>,
    /// Seconds that a value is kept. One day: the same images come back within a session's or a job's length.
    pub ttl_seconds: u64,
    /// Milliseconds that an image's refusal is kept for other routers. 10,000: long enough for one burst of one bad
    /// image, short enough that an encoder with wider limits is soon asked.
    pub refusal_ttl_ms: u64,
    /// Milliseconds that a request waits for Redis in vain, connecting included. 20: far above a healthy answer
    /// (1 ms), far below encoding. A router that is itself so busy that its timers are late waits as much longer.
    pub deadline_ms: u64,
    /// Milliseconds after which a value that a lost router was computing is another's to compute. 5,000: a router
    /// that is alive renews its lease thrice in that time, and waits longer than that only if its process hangs.
    pub lease_ms: u64,
    /// Milliseconds that a request waits while another router computes its value; then it is computed here, too.
    /// 30,000: whoever takes longer is rather stuck than slow, save for negatives on CPUs.
    pub wait_ms: u64,
}

/// How replicas are watched.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// What the router trusts and shows at `https://` endpoints. With it, every endpoint must be one.
    pub tls: ClientTlsConfig,
    /// Milliseconds between two looks at a replica that answers. 2,000: a roll to new weights is noticed before a
    /// person notices, at next to no cost.
    pub refresh_ms: u64,
    /// Milliseconds before a replica that does not answer is asked again; doubles up to `refresh_ms`.
    pub retry_ms: u64,
    /// Milliseconds that a replica may take to answer `Info`, which costs it nothing, connecting included. One that
    /// twice in a row does not is taken to hang, and what runs on it goes on elsewhere.
    pub info_timeout_ms: u64,
    /// Milliseconds between two looks at the addresses of a name (`dns+http://…`). 5,000: Kubernetes publishes a
    /// new pod within about as much.
    pub resolve_ms: u64,
    /// Milliseconds that one step of a replica's engine may take before it is taken to hang. 120,000: far above the
    /// longest step there is, the pixels of a large image without a GPU.
    pub max_step_ms: u64,
    /// Replicas that a call may lose in a row without getting any further. 4: a call that itself is what kills
    /// replicas must not take a whole pool with it.
    pub max_attempts: u32,
    /// Milliseconds that a call which has begun waits for a replica to go on with. 10,000: a pod restarts within
    /// it when its weights are at hand. A call that has not begun never waits.
    pub failover_wait_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        let replica = |port: u16| vec![format!("http://127.0.0.1:{port}")];
        let model = ModelConfig {
            name: "emu2".into(),
            encoder: replica(50052),
            llm: replica(50053),
            decoder: replica(50054),
        };
        Self {
            models: vec![model],
            limits: LimitsConfig::default(),
            admission: AdmissionConfig::default(),
            cache: CacheConfig::default(),
            pool: PoolConfig::default(),
            auth: AuthConfig::default(),
            server: ServerConfig::on_port(50051),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_parts: 1024,
            max_images: 256,
            images_in_flight: 16,
            shared_work_ms: 300_000,
            waiting_events: 32,
        }
    }
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self { low_percent: 50, normal_percent: 90, max_backlog_ms: 60_000 }
    }
}

impl AdmissionConfig {
    pub(crate) fn max_backlog(&self) -> Duration {
        Duration::from_millis(self.max_backlog_ms)
    }

    /// How many of `max_requests` permits may be taken when a class is let in; at least one.
    pub(crate) fn permits(&self, class: Priority, max_requests: usize) -> usize {
        let percent = match class {
            Priority::Low => self.low_percent,
            Priority::Normal => self.normal_percent,
            Priority::High => 100,
        };
        (max_requests * percent as usize).div_ceil(100)
    }

    fn problems(&self) -> Vec<String> {
        let Self { low_percent, normal_percent, .. } = *self;
        let bounds =
            [("low_percent", normal_percent.min(100), low_percent), ("normal_percent", 100, normal_percent)];
        let wrong = bounds.into_iter().filter(|(_, max, value)| !(1..=*max).contains(value));
        wrong.map(|(key, max, value)| format!("admission.{key} must be 1 to {max}, got {value}")).collect()
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            memory_bytes: 256 << 20,
            redis_url: None,
            redis_ca_file: None,
            redis_cert_file: None,
            redis_key_file: None,
            ttl_seconds: 24 * 3600,
            refusal_ttl_ms: 10_000,
            deadline_ms: 20,
            lease_ms: 5_000,
            wait_ms: 30_000,
        }
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            tls: ClientTlsConfig::default(),
            refresh_ms: 2_000,
            retry_ms: 100,
            info_timeout_ms: 2_000,
            resolve_ms: 5_000,
            max_step_ms: 120_000,
            max_attempts: 4,
            failover_wait_ms: 10_000,
        }
    }
}

impl Validate for Config {
    fn problems(&self) -> Vec<String> {
        let mut problems = self.server.problems();
        problems.extend(self.telemetry.problems());
        problems.extend(self.auth.problems(self.server.listen.ip().is_loopback()));
        problems.extend(self.admission.problems());
        problems.extend(self.pool.tls.problems("pool.tls"));
        problems.extend(self.models.iter().flat_map(|model| model.insecure(&self.pool.tls)));
        if self.models.is_empty() {
            problems.push("models must name at least one model".into());
        }
        let mut names = HashSet::new();
        for model in &self.models {
            problems.extend(model.problems());
            if !names.insert(&model.name) {
                problems.push(format!("models: the name {:?} is given twice", model.name));
            }
        }
        let limits = &self.limits;
        let positive = [
            ("limits.max_parts", u64::from(limits.max_parts)),
            ("limits.max_images", u64::from(limits.max_images)),
            ("limits.images_in_flight", limits.images_in_flight as u64),
            ("limits.shared_work_ms", limits.shared_work_ms),
            ("limits.waiting_events", limits.waiting_events as u64),
            ("admission.max_backlog_ms", self.admission.max_backlog_ms),
            ("cache.ttl_seconds", self.cache.ttl_seconds),
            ("cache.refusal_ttl_ms", self.cache.refusal_ttl_ms),
            ("cache.deadline_ms", self.cache.deadline_ms),
            ("cache.lease_ms", self.cache.lease_ms),
            ("cache.wait_ms", self.cache.wait_ms),
            ("pool.refresh_ms", self.pool.refresh_ms),
            ("pool.retry_ms", self.pool.retry_ms),
            ("pool.info_timeout_ms", self.pool.info_timeout_ms),
            ("pool.resolve_ms", self.pool.resolve_ms),
            ("pool.max_step_ms", self.pool.max_step_ms),
            ("pool.max_attempts", u64::from(self.pool.max_attempts)),
            ("pool.failover_wait_ms", self.pool.failover_wait_ms),
        ];
        let zero = positive.into_iter().filter(|(_, value)| *value == 0);
        problems.extend(zero.map(|(key, _)| format!("{key} must be at least 1, got 0")));
        problems.extend(self.cache.problems());
        problems
    }
}

impl CacheConfig {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let address = self.redis_url.as_ref().map(|url| Address::parse(url.reveal()));
        if matches!(address, Some(None)) {
            problems.push("cache.redis_url cannot be read as a Redis URL".into());
        }
        let files = [
            ("redis_ca_file", &self.redis_ca_file),
            ("redis_cert_file", &self.redis_cert_file),
            ("redis_key_file", &self.redis_key_file),
        ];
        let is_unread = matches!(address, Some(None));
        let is_tls = address.flatten().is_some_and(|address| address.is_tls());
        let given = files.iter().filter(|(_, file)| file.is_some() && !is_tls && !is_unread);
        problems
            .extend(given.map(|(key, _)| {
                format!("cache.{key} is for a cache.redis_url with rediss, which it is not")
            }));
        if self.redis_cert_file.is_some() != self.redis_key_file.is_some() {
            problems.push("cache.redis_cert_file and cache.redis_key_file must be given together".into());
        }
        // A third of a lease passes between two renewals, and a renewal may take a deadline.
        if self.lease_ms / 3 < self.deadline_ms {
            let (lease, deadline) = (self.lease_ms, self.deadline_ms);
            problems.push(format!(
                "cache.lease_ms must be at least thrice cache.deadline_ms ({deadline}), got {lease}"
            ));
        }
        problems
    }
}

impl ModelConfig {
    fn endpoints(&self) -> impl Iterator<Item = &String> {
        self.encoder.iter().chain(&self.llm).chain(&self.decoder)
    }

    /// Endpoints in the clear although there is TLS, and the other way round; addresses whose name nobody says.
    fn insecure(&self, config: &ClientTlsConfig) -> Vec<String> {
        let tls = config.ca_file.is_some();
        let wrong = self.endpoints().filter(|endpoint| endpoint.contains("https://") != tls);
        let wrong = wrong.map(|endpoint| match tls {
            true => format!("models: {:?} names {endpoint:?}, which must be https with pool.tls", self.name),
            false => format!("models: {:?} names {endpoint:?}, which needs pool.tls.ca_file", self.name),
        });
        // Of a name that is resolved here only its addresses are called, and no certificate is for those.
        let nameless = self.endpoints().filter(|endpoint| {
            endpoint.starts_with(RESOLVED) && endpoint.contains("https://") && config.server_name.is_none()
        });
        let nameless = nameless.map(|endpoint| {
            format!("models: {:?} names {endpoint:?}, which needs pool.tls.server_name", self.name)
        });
        wrong.chain(nameless).collect()
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.name.is_empty() {
            problems.push("models: a name is empty".into());
        }
        for (stage, endpoints) in [("encoder", &self.encoder), ("llm", &self.llm)] {
            if endpoints.is_empty() {
                problems.push(format!("models: {:?} needs at least one {stage} replica", self.name));
            }
        }
        for endpoint in self.endpoints() {
            let uri = endpoint.strip_prefix(RESOLVED).unwrap_or(endpoint);
            if let Err(error) = emu2_serve::client::endpoint(uri) {
                problems.push(format!("models: {:?} names a replica {endpoint:?}: {error}", self.name));
            }
        }
        problems
    }
}

/// A Redis URL, which may hold a password: it is never printed.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RedisUrl(String);

impl RedisUrl {
    /// Wraps a URL.
    pub fn new(url: impl Into<String>) -> Self {
        Self(url.into())
    }

    /// Returns the URL, the secret included.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for RedisUrl {
    fn from(url: String) -> Self {
        Self(url)
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(Config::default().problems(), Vec::<String>::new());
    }

    #[test]
    fn stages_are_reached_all_over_tls_or_none() {
        let secure = |endpoint: &str, ca: Option<&str>| {
            let mut config = Config::default();
            config.models[0].llm = vec![endpoint.into()];
            config.models[0].encoder = vec![endpoint.into()];
            config.models[0].decoder = vec![];
            config.pool.tls.ca_file = ca.map(Into::into);
            config.problems().len()
        };
        assert_eq!(secure("http://llm:50053", None), 0);
        assert_eq!(secure("https://llm:50053", Some("ca.pem")), 0);
        assert_eq!(secure("https://llm:50053", None), 2);
        assert_eq!(secure("http://llm:50053", Some("ca.pem")), 2);
        assert_eq!(secure("dns+https://llm:50053", Some("ca.pem")), 2, "whose certificate is it?");
    }

    #[test]
    fn all_mistakes_are_told_at_once_and_no_secret_is() {
        let model = ModelConfig {
            name: "emu2".into(),
            encoder: vec!["not a uri".into()],
            llm: vec![],
            decoder: vec![],
        };
        let config = Config {
            models: vec![model.clone(), model],
            cache: CacheConfig {
                redis_url: Some(RedisUrl::new("nonsense:hunter2")),
                ttl_seconds: 0,
                ..Default::default()
            },
            ..Config::default()
        };
        let problems = config.problems().join("\n");
        for part in
            ["\"not a uri\"", "at least one llm", "given twice", "cache.ttl_seconds", "cache.redis_url"]
        {
            assert!(problems.contains(part), "{part} is missing from {problems}");
        }
        assert!(!format!("{config:?}{problems}").contains("hunter2"));
    }

    #[test]
    fn what_a_cache_cannot_go_by_is_told_with_its_values() {
        let cache = CacheConfig {
            redis_url: Some(RedisUrl::new("redis-cluster://:hunter2@one,two")),
            redis_ca_file: Some("ca.pem".into()),
            redis_cert_file: Some("cert.pem".into()),
            deadline_ms: 100,
            lease_ms: 299,
            ..Default::default()
        };
        let problems = cache.problems().join("\n");
        for part in [
            "cache.redis_ca_file is",
            "cache.redis_cert_file is",
            "given together",
            "rediss",
            "cache.lease_ms",
            "(100)",
            "got 299",
        ] {
            assert!(problems.contains(part), "{part} is missing from {problems}");
        }
        assert!(!problems.contains("hunter2"));
        let url = Some(RedisUrl::new("rediss-cluster://:hunter2@one,two"));
        let redis_key_file = Some("key.pem".into());
        let cache = CacheConfig { redis_url: url, redis_key_file, lease_ms: 300, ..cache };
        assert_eq!(cache.problems(), Vec::<String>::new());
    }
}
