//! From the `authorization` of a call to its tenant.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use anyhow::{Context, ensure};
use http::{HeaderMap, header::AUTHORIZATION};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tonic::Status;

use super::{AuthConfig, AuthMode, Place, Tenant, TenantConfig, TenantLimits, meter::Meter, problems_of};
use crate::{reload::Reloaded, status::ErrorCode};

/// Bytes of the longest token: far above any that is used, so that hashing one costs nothing.
const MAX_TOKEN_BYTES: usize = 1024;

/// Every tenant's count by name. A change of the file keeps them, or it would be a way around them.
type Meters = Arc<Mutex<HashMap<String, Arc<Meter>>>>;

/// The tenants that may call a service; by default anybody may. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Tenants {
    /// None: whoever comes is the tenant `default`.
    book: Option<Arc<Reloaded<Book>>>,
}

impl Tenants {
    /// Reads the tenants of the configuration and of its file, now and again whenever the file changes. Fails on a file
    /// that cannot be read or has mistakes; later changes with mistakes leave what is in force.
    pub fn open(config: &AuthConfig) -> anyhow::Result<Self> {
        if config.mode != Some(AuthMode::Tokens) {
            return Ok(Self::default());
        }
        let (inline, meters) = (config.tenants.clone(), Meters::default());
        let book = match &config.tenants_file {
            None => Reloaded::fixed(Book::new(inline, &meters)?),
            Some(file) => Reloaded::open(vec![file.clone()], move |contents| {
                let [file] = contents else { unreachable!("one file is read") };
                Book::new([inline.clone(), parse(file)?].concat(), &meters)
            })?,
        };
        Ok(Self { book: Some(Arc::new(book)) })
    }

    /// Returns whose token the headers carry, or UNAUTHENTICATED, and takes the token out of them: no handler needs it,
    /// and none can then hand it on.
    pub(crate) fn identify(&self, headers: &mut HeaderMap) -> Result<Guest, Status> {
        let Some(book) = &self.book else { return Ok(Guest::default()) };
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let refused = |message: &str| Err(ErrorCode::Unauthenticated.status(message));
        let found = match (given.next(), given.next()) {
            (None, _) => refused("a token is needed: send `authorization: Bearer <token>`"),
            (Some(_), Some(_)) => refused("authorization must be given once"),
            (Some(value), None) => match token(value.as_bytes()) {
                None => refused("authorization must be `Bearer <token>`"),
                Some(token) => book.get().guest(token).map_or_else(|| refused("the token is not known"), Ok),
            },
        };
        headers.remove(AUTHORIZATION);
        found
    }
}

/// A caller whose tenant is known, with the tenant's limits and what it has taken.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guest {
    pub(crate) tenant: Tenant,
    limits: TenantLimits,
    meter: Arc<Meter>,
}

impl Guest {
    /// Counts a request of its tenant until the place is dropped.
    pub(crate) fn enter(&self) -> Result<Place, Status> {
        self.meter.enter(&self.tenant, &self.limits)
    }
}

/// Returns the token of a header's value `Bearer <token>`; the scheme's case does not matter, as HTTP says.
fn token(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(b"Bearer ".len())?;
    let token = token.trim_ascii();
    let usable = (1..=MAX_TOKEN_BYTES).contains(&token.len());
    (scheme.eq_ignore_ascii_case(b"Bearer ") && usable).then_some(token)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TenantsFile {
    tenants: Vec<TenantConfig>,
}

fn parse(file: &[u8]) -> anyhow::Result<Vec<TenantConfig>> {
    let text = std::str::from_utf8(file).context("the file of tenants is not UTF-8")?;
    // The parser's message quotes a line, which may hold a hash; its bare reason does not.
    let parsed = toml::from_str::<TenantsFile>(text);
    let parsed = parsed.map_err(|error| {
        let line = error.span().map_or(0, |span| text[..span.start].lines().count().max(1));
        anyhow::anyhow!("the file of tenants cannot be parsed, line {line}")
    });
    Ok(parsed?.tenants)
}

/// The hashes of all tokens, each with whose it is.
#[derive(Debug)]
struct Book(Vec<([u8; 32], Guest)>);

impl Book {
    fn new(tenants: Vec<TenantConfig>, meters: &Meters) -> anyhow::Result<Self> {
        let problems = problems_of(&tenants, "tenants");
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        let mut meters = meters.lock().expect("nobody panics while counting");
        let hashes = tenants.into_iter().flat_map(|tenant| {
            let TenantConfig { name, token_sha256, highest_priority, limits } = tenant;
            let meter = Arc::clone(meters.entry(name.clone()).or_default());
            let guest = Guest { tenant: Tenant { name: name.into(), highest_priority }, limits, meter };
            let hashes = token_sha256.into_iter().filter_map(|hash| hash.bytes());
            hashes.map(move |hash| (hash, guest.clone())).collect::<Vec<_>>()
        });
        Ok(Self(hashes.collect()))
    }

    /// Returns whose a token is. It looks at every hash whole, so that the time it takes tells nothing of how near a
    /// guess came.
    fn guest(&self, token: &[u8]) -> Option<Guest> {
        let hash: [u8; 32] = Sha256::digest(token).into();
        let mut found = u32::MAX;
        for (index, (known, _)) in (0_u32..).zip(&self.0) {
            found.conditional_assign(&index, known.ct_eq(&hash));
        }
        self.0.get(found as usize).map(|(_, guest)| guest.clone())
    }
}

#[cfg(test)]
mod tests;
