//! Real handshakes, with authorities and certificates made on the spot.

use std::{path::PathBuf, time::Duration};

use emu2_proto::v1::{self, emu2_client::Emu2Client};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::TcpStream};
use tonic::{Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::loopback::{Loopback, PATIENCE};
use crate::{
    client::Connector,
    config::Validate,
    server::ServerConfig,
    tls::{ClientTlsConfig, TlsConfig, TlsMode},
};

/// What every server's certificate is for; the tests connect to an address.
const NAME: &str = "emu2-stage";

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes a certificate for `name` and its key.
    fn issue(&self, name: &str, files: &Files) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        std::fs::write(files.path("cert"), certificate.pem()).unwrap();
        std::fs::write(files.path("key"), key.serialize_pem()).unwrap();
    }
}

/// A folder with `ca`, `cert` and `key`.
struct Files(TempDir);

impl Files {
    fn new(trusted: &Authority) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.trust(trusted);
        files
    }

    fn with(trusted: &Authority, issuer: &Authority, name: &str) -> Self {
        let files = Self::new(trusted);
        issuer.issue(name, &files);
        files
    }

    fn trust(&self, authority: &Authority) {
        std::fs::write(self.path("ca"), authority.0.as_ref().pem()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn server(&self, mode: TlsMode) -> ServerConfig {
        let client_ca_file = (mode == TlsMode::Mutual).then(|| self.path("ca"));
        let (cert_file, key_file) = (Some(self.path("cert")), Some(self.path("key")));
        let tls = TlsConfig { mode: Some(mode), cert_file, key_file, client_ca_file };
        let config = ServerConfig { tls, ..ServerConfig::default() };
        assert_eq!(config.problems(), Vec::<String>::new());
        config
    }

    fn client(&self, server_name: Option<&str>) -> Connector {
        let own = |name| Some(self.path(name)).filter(|path| path.exists());
        let (cert_file, key_file) = (own("cert"), own("key"));
        let server_name = server_name.map(str::to_owned);
        let config = ClientTlsConfig { ca_file: Some(self.path("ca")), cert_file, key_file, server_name };
        assert_eq!(config.problems("tls"), Vec::<String>::new());
        Connector::open(&config).unwrap()
    }
}

fn channel(server: &Loopback, connector: &Connector) -> Channel {
    connector.channel(&format!("https://{}", server.address)).unwrap()
}

async fn ask(server: &Loopback, connector: &Connector) -> Result<(), Status> {
    let asked = Emu2Client::new(channel(server, connector)).list_models(v1::ListModelsRequest {}).await;
    asked.map(drop)
}

#[tokio::test]
async fn a_caller_who_trusts_the_authority_gets_in_and_one_who_does_not_stays_out() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let files = Files::with(&ours, &ours, NAME);
    let server = Loopback::start(files.server(TlsMode::Server)).await;
    ask(&server, &Files::new(&ours).client(Some(NAME))).await.unwrap();
    // The address is not among the certificate's names, nor is another name.
    ask(&server, &Files::new(&ours).client(None)).await.unwrap_err();
    ask(&server, &Files::new(&ours).client(Some("emu2-other"))).await.unwrap_err();
    ask(&server, &Files::new(&theirs).client(Some(NAME))).await.unwrap_err();
    // In the clear: neither side understands the other.
    server.client().list_models(v1::ListModelsRequest {}).await.unwrap_err();
}

#[tokio::test]
async fn mutual_tls_lets_in_only_who_shows_a_certificate_of_its_authority() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let files = Files::with(&ours, &ours, NAME);
    let server = Loopback::start(files.server(TlsMode::Mutual)).await;
    ask(&server, &Files::with(&ours, &ours, "emu2-router").client(Some(NAME))).await.unwrap();
    ask(&server, &Files::new(&ours).client(Some(NAME))).await.unwrap_err();
    let strange = Files::with(&ours, &theirs, "emu2-router").client(Some(NAME));
    ask(&server, &strange).await.unwrap_err();
    // Health is no exception: the handshake comes before any call.
    let probe = channel(&server, &Files::new(&ours).client(Some(NAME)));
    HealthClient::new(probe).check(HealthCheckRequest::default()).await.unwrap_err();
}

async fn until(what: &str, server: &Loopback, connector: &Connector, works: bool) {
    let begun = std::time::Instant::now();
    while ask(server, connector).await.is_ok() != works {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whoever connects and says nothing holds a connection for no longer than it takes to say something.
#[tokio::test]
async fn a_handshake_that_does_not_come_is_cut() {
    let ours = Authority::new();
    let files = Files::with(&ours, &ours, NAME);
    let config = ServerConfig { handshake_ms: 50, ..files.server(TlsMode::Server) };
    let server = Loopback::start(config).await;
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    let mut said = Vec::new();
    let closed = tokio::time::timeout(PATIENCE, silent.read_to_end(&mut said)).await;
    closed.expect("it is closed").unwrap();
}

/// From one authority to another, on both sides, under a stream.
#[tokio::test]
async fn new_files_are_used_for_new_handshakes_and_a_running_stream_goes_on() {
    let (old, new) = (Authority::new(), Authority::new());
    let server_files = Files::with(&old, &old, NAME);
    let server = Loopback::start(server_files.server(TlsMode::Mutual)).await;
    let client_files = Files::with(&old, &old, "emu2-router");
    let client = client_files.client(Some(NAME));
    let before = Files::with(&old, &old, "emu2-router").client(Some(NAME));
    let request = v1::GenerateRequest { seed: Some(2), ..Default::default() };
    let mut events = Emu2Client::new(channel(&server, &client)).generate(request).await.unwrap().into_inner();
    server.probe.steps.add_permits(1);
    assert!(events.message().await.unwrap().is_some());

    new.issue(NAME, &server_files);
    server_files.trust(&new);
    until("the server shows its new certificate", &server, &before, false).await;
    new.issue("emu2-router", &client_files);
    client_files.trust(&new);
    until("the client uses its new files", &server, &client, true).await;

    server.probe.steps.add_permits(1);
    assert!(events.message().await.unwrap().is_some());
    assert!(events.message().await.unwrap().is_none());
}

#[tokio::test]
async fn files_that_do_not_belong_together_are_an_error_at_the_start() {
    let ours = Authority::new();
    let (files, others) = (Files::with(&ours, &ours, NAME), Files::with(&ours, &ours, NAME));
    std::fs::copy(others.path("key"), files.path("key")).unwrap();
    let error = format!("{:#}", files.server(TlsMode::Server).tls.open().unwrap_err());
    assert!(error.contains("server.tls"), "{error}");
    std::fs::write(files.path("key"), "hunter2").unwrap();
    let error = format!("{:#}", files.server(TlsMode::Server).tls.open().unwrap_err());
    assert!(error.contains("private key") && !error.contains("hunter2"), "{error}");
}

#[test]
fn an_open_wire_off_loopback_has_to_be_stated() {
    let everywhere = "0.0.0.0:50051".parse().unwrap();
    let config = ServerConfig { listen: everywhere, ..ServerConfig::default() };
    assert!(config.problems()[0].contains("server.tls.mode"), "{:?}", config.problems());
    let tls = TlsConfig { mode: Some(TlsMode::None), ..TlsConfig::default() };
    assert!(ServerConfig { tls: tls.clone(), ..config.clone() }.problems().is_empty());
    let half = TlsConfig { mode: Some(TlsMode::Mutual), cert_file: Some("cert".into()), ..tls.clone() };
    assert_eq!(ServerConfig { tls: half, ..config.clone() }.problems().len(), 2);
    let unused = TlsConfig { cert_file: Some("cert".into()), ..tls };
    assert_eq!(ServerConfig { tls: unused, ..config }.problems().len(), 1);
    let client = ClientTlsConfig { cert_file: Some("cert".into()), ..Default::default() };
    assert_eq!(client.problems("stage_tls").len(), 2);
    assert!(Connector::default().channel("https://emu2-llm:50053").is_err());
}
