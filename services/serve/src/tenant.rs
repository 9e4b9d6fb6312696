//! Who calls: the tenant that a caller's token is bound to, never what a caller says of itself.
//!
//! A client sends `authorization: Bearer <token>`. The service knows only SHA-256 hashes of tokens, in its
//! configuration or in a mounted file that is read again when it changes. Every call needs a token but health checks,
//! which tell a prober no more than whether to come back. Reflection needs one, too.

mod meter;
mod tokens;

use std::{fmt, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
};

pub use tokens::Tenants;
pub(crate) use {meter::Place, tokens::Guest};

use crate::priority::Priority;

/// Name of the tenant of every caller where no tokens are asked for.
const DEFAULT: &str = "default";
const MAX_NAME_BYTES: usize = 64;

/// The tenant that a caller's token is bound to: a name, and the highest class of its requests. Cloning is cheap.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tenant {
    name: Arc<str>,
    highest_priority: Priority,
}

impl Tenant {
    /// Returns the tenant of an incoming request, which the server has put there; `default` outside of a server.
    pub fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// Returns the tenant's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the highest class that the tenant's requests may have.
    pub fn highest_priority(&self) -> Priority {
        self.highest_priority
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Self { name: DEFAULT.into(), highest_priority: Priority::High }
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Part `auth` of a public service's configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// Whether callers need a token. Absent is `none` on loopback and an error elsewhere: an open door has to be
    /// somebody's word.
    pub mode: Option<AuthMode>,
    /// The tenants that may call, with `tokens`.
    pub tenants: Vec<TenantConfig>,
    /// A TOML file with more `[[tenants]]`, with `tokens`; a mounted secret, read again when it changes.
    pub tenants_file: Option<PathBuf>,
}

/// The ways in which a service knows its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthMode {
    /// Every caller is the tenant `default`.
    None,
    /// A caller without a known token is refused.
    Tokens,
}

/// One tenant as the configuration has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantConfig {
    /// The tenant's name, 1 to 64 of `[A-Za-z0-9._-]`: part of cache keys, named in logs.
    pub name: String,
    /// SHA-256 of the tenant's tokens in hexadecimal; two of them while one replaces the other.
    pub token_sha256: Vec<TokenHash>,
    /// The highest class of the tenant's requests. By default `normal`: who may go before others is somebody's
    /// decision.
    #[serde(default)]
    pub highest_priority: Priority,
    /// What the tenant may take.
    #[serde(default)]
    pub limits: TenantLimits,
}

/// What one tenant may take of one router; a limit that is absent does not bind. Questions such as `ListModels` are not
/// counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TenantLimits {
    /// Requests that may run at a time.
    pub max_requests: Option<usize>,
    /// Requests that begin per second, in the long run.
    pub requests_per_second: Option<f64>,
    /// Requests that may begin at once after a pause; 1 if absent.
    pub burst_requests: Option<u32>,
}

/// A token as its owner has it; never printed.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Returns what a client sends as `authorization`, marked as sensitive; `None` for a token that no header can hold.
    pub fn bearer(&self) -> Option<MetadataValue<Ascii>> {
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", self.0).parse().ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl From<String> for Token {
    fn from(token: String) -> Self {
        Self(token)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// The SHA-256 of a token in hexadecimal, which is what a service keeps of it. It is not the token, but no business of
/// a log either: never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenHash(String);

impl TokenHash {
    /// Returns a hash as it was written; whether it is one is checked with the configuration.
    pub fn new(hexadecimal: impl Into<String>) -> Self {
        Self(hexadecimal.into())
    }

    /// Returns the hash's bytes; `None` if it is no SHA-256 in hexadecimal.
    fn bytes(&self) -> Option<[u8; 32]> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(&self.0, &mut bytes).ok()?;
        Some(bytes)
    }
}

impl TenantLimits {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.max_requests == Some(0) {
            problems.push("max_requests must be at least 1, got 0".into());
        }
        if let Some(rate) = self.requests_per_second.filter(|rate| !(0.001..=1e6).contains(rate)) {
            problems.push(format!("requests_per_second must be 0.001 to 1000000, got {rate}"));
        }
        match self.burst_requests {
            Some(0) => problems.push("burst_requests must be at least 1, got 0".into()),
            Some(_) if self.requests_per_second.is_none() => {
                problems.push("burst_requests needs requests_per_second".into());
            }
            _ => {}
        }
        problems
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl AuthConfig {
    /// Returns all mistakes, as [`crate::config::Validate`] does; `is_loopback` is said of the address that the service
    /// listens on.
    pub fn problems(&self, is_loopback: bool) -> Vec<String> {
        let mut problems = problems_of(&self.tenants, "auth.tenants");
        let given = !self.tenants.is_empty() || self.tenants_file.is_some();
        match self.mode {
            None if !is_loopback => problems.push(
                "auth.mode must be `tokens`, or `none` to let everybody in, because server.listen is not loopback".into(),
            ),
            Some(AuthMode::Tokens) if !given => {
                problems.push("auth.mode is `tokens`, so auth.tenants or auth.tenants_file must be given".into());
            }
            None | Some(AuthMode::None) if given => {
                problems.push("auth.tenants and auth.tenants_file need auth.mode `tokens`".into());
            }
            _ => {}
        }
        problems
    }
}

/// What is wrong with a list of tenants, each with its place and never with a hash.
fn problems_of(tenants: &[TenantConfig], place: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let (mut names, mut hashes) = (Vec::new(), Vec::new());
    for (index, tenant) in tenants.iter().enumerate() {
        let TenantConfig { name, token_sha256, limits, .. } = tenant;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=MAX_NAME_BYTES).contains(&name.len()) || !name.bytes().all(allowed) {
            problems.push(format!(
                "{place}[{index}].name must be 1 to {MAX_NAME_BYTES} of [A-Za-z0-9._-], got {name:?}"
            ));
        }
        if names.contains(&name) {
            problems.push(format!("{place}[{index}]: the name {name:?} is given twice"));
        }
        names.push(name);
        for problem in limits.problems() {
            problems.push(format!("{place}[{index}].limits.{problem}"));
        }
        if token_sha256.is_empty() {
            problems.push(format!("{place}[{index}].token_sha256 must have at least one hash"));
        }
        for hash in token_sha256 {
            let Some(hash) = hash.bytes() else {
                problems.push(format!(
                    "{place}[{index}].token_sha256 must be 64 hexadecimal digits each, the SHA-256 of a token"
                ));
                continue;
            };
            if hashes.contains(&hash) {
                problems.push(format!("{place}[{index}].token_sha256: one of these tokens is given twice"));
            }
            hashes.push(hash);
        }
    }
    problems
}
