//! What connections to Redis trust and show: PEM files, read for each new connection, so that replaced ones need no
//! restart.

use std::{
    io,
    path::{Path, PathBuf},
};

use redis::{ClientTlsConfig, TlsCertificates};

use crate::config::CacheConfig;

pub(crate) struct Certificates {
    ca: Option<PathBuf>,
    /// The router's own, and its key.
    own: Option<(PathBuf, PathBuf)>,
}

impl Certificates {
    pub(super) fn of(config: &CacheConfig) -> Self {
        let CacheConfig { redis_ca_file, redis_cert_file, redis_key_file, .. } = config;
        Self { ca: redis_ca_file.clone(), own: redis_cert_file.clone().zip(redis_key_file.clone()) }
    }

    /// None where the system's authorities do and nothing is shown.
    pub(super) fn read(&self) -> io::Result<Option<TlsCertificates>> {
        let root_cert = self.ca.as_deref().map(read).transpose()?;
        let own = self.own.as_ref().map(|(cert, key)| {
            Ok::<_, io::Error>(ClientTlsConfig { client_cert: read(cert)?, client_key: read(key)? })
        });
        let client_tls = own.transpose()?;
        let any = root_cert.is_some() || client_tls.is_some();
        Ok(any.then_some(TlsCertificates { client_tls, root_cert }))
    }
}

fn read(file: &Path) -> io::Result<Vec<u8>> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.display()));
    std::fs::read(file).map_err(named)
}
