//! TLS: of a server and its callers, out of PEM files that are read again when they change. New handshakes use the new
//! files; connections that stand go on with the old.
//!
//! The provider is *ring* alone, named wherever one is needed, so that no other crate's choice can replace it.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};

use crate::reload::Reloaded;

/// The protocol that a handshake agrees on: gRPC is HTTP/2.
const ALPN: &[u8] = b"h2";

/// Part `server.tls` of every configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// Who shows a certificate. Absent is `none` on loopback and an error elsewhere: an open wire has to be somebody's
    /// word.
    pub mode: Option<TlsMode>,
    /// PEM file of the server's certificate, then those between it and its CA.
    pub cert_file: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    pub key_file: Option<PathBuf>,
    /// With `mutual`, PEM file of the CA that signs callers' certificates. Whoever has such a certificate may call, so
    /// it is best a CA that signs nothing else.
    pub client_ca_file: Option<PathBuf>,
}

/// The ways in which a server talks to its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TlsMode {
    /// The server talks in the clear.
    None,
    /// The server shows its certificate.
    Server,
    /// The server shows its certificate, and so must every caller.
    Mutual,
}

impl TlsConfig {
    /// Returns all mistakes, as [`crate::config::Validate`] does; `is_loopback` is said of the address that the service
    /// listens on.
    pub(crate) fn problems(&self, is_loopback: bool) -> Vec<String> {
        let mut problems = Vec::new();
        let mode = self.mode.unwrap_or(TlsMode::None);
        if self.mode.is_none() && !is_loopback {
            problems.push(
                "server.tls.mode must be `server` or `mutual`, or `none` to talk in the clear, because server.listen is \
                 not loopback"
                    .into(),
            );
        }
        let (served, mutual) = (mode != TlsMode::None, mode == TlsMode::Mutual);
        let files = [
            ("cert_file", &self.cert_file, served),
            ("key_file", &self.key_file, served),
            ("client_ca_file", &self.client_ca_file, mutual),
        ];
        for (key, file, needed) in files {
            match (needed, file.is_some()) {
                (true, false) => {
                    problems.push(format!("server.tls.{key} must be given with this server.tls.mode"))
                }
                (false, true) => {
                    problems.push(format!("server.tls.{key} is not used with this server.tls.mode"))
                }
                _ => {}
            }
        }
        problems
    }

    /// Returns the TLS settings of the files as they are now and will be, or `None` in the clear. Fails on files that
    /// cannot be read or do not belong together.
    pub(crate) fn open(&self) -> anyhow::Result<Option<Reloaded<ServerConfig>>> {
        let (Some(cert), Some(key)) = (&self.cert_file, &self.key_file) else { return Ok(None) };
        let files =
            [Some(cert), Some(key), self.client_ca_file.as_ref()].into_iter().flatten().cloned().collect();
        Reloaded::open(files, server).context("server.tls").map(Some)
    }
}

/// The certificates that a caller inside the cluster trusts and shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientTlsConfig {
    /// PEM file of the CA that signs the certificates of servers; `https://` endpoints need it.
    pub ca_file: Option<PathBuf>,
    /// PEM file of the caller's own certificate, where servers ask for one.
    pub cert_file: Option<PathBuf>,
    /// PEM file of that certificate's private key.
    pub key_file: Option<PathBuf>,
    /// The name that every server's certificate must have; the endpoint's host if absent.
    pub server_name: Option<String>,
}

impl ClientTlsConfig {
    /// Returns all mistakes, as [`crate::config::Validate`] does; `section` is the name of this part in messages.
    pub fn problems(&self, section: &str) -> Vec<String> {
        let mut problems = Vec::new();
        if self.cert_file.is_some() != self.key_file.is_some() {
            problems.push(format!("{section}.cert_file and {section}.key_file must be given together"));
        }
        if self.ca_file.is_none() && *self != Self::default() {
            problems.push(format!("{section}.ca_file must be given with the rest of {section}"));
        }
        if let Some(name) = &self.server_name
            && ServerName::try_from(name.as_str()).is_err()
        {
            problems.push(format!("{section}.server_name must be a DNS name or an address, got {name:?}"));
        }
        problems
    }

    pub(crate) fn open(&self) -> anyhow::Result<Option<Reloaded<ClientConfig>>> {
        let Some(ca) = &self.ca_file else { return Ok(None) };
        let files = [Some(ca), self.cert_file.as_ref(), self.key_file.as_ref()]
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        Reloaded::open(files, client).context("TLS of a client").map(Some)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Returns a server's settings out of the contents of its files: certificate, key, and perhaps the CA of callers.
fn server(contents: &[Vec<u8>]) -> anyhow::Result<ServerConfig> {
    let [cert, key, client_ca @ ..] = contents else { unreachable!("two files or three are read") };
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match client_ca {
        [] => builder.with_no_client_auth(),
        [ca, ..] => {
            let roots = Arc::new(roots(ca)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(certificates(cert)?, private_key(key)?)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Returns a caller's settings out of the contents of its files: the CA of servers, and perhaps a certificate and its
/// key.
fn client(contents: &[Vec<u8>]) -> anyhow::Result<ClientConfig> {
    let [ca, own @ ..] = contents else { unreachable!("one file or three are read") };
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = builder.with_root_certificates(roots(ca)?);
    let mut config = match own {
        [cert, key] => builder.with_client_auth_cert(certificates(cert)?, private_key(key)?)?,
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn roots(pem: &[u8]) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

fn certificates(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    // The error's text may quote the file.
    let certificates = certificates.ok().context("certificates cannot be read as PEM")?;
    ensure!(!certificates.is_empty(), "a file of certificates has none");
    Ok(certificates)
}

fn private_key(pem: &[u8]) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem).ok().context("the private key cannot be read as PEM")
}
