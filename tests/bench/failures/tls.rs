//! Every hop over TLS, as where the network is nobody's: clients come to the router with a token, the router to its
//! stages with a certificate of the stages' own authority.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use emu2_bench::{
    cluster::{Cluster, NO_CACHE, Plan, Replica, Router, Stage},
    load::{self, Answer, Ask, image, text},
    processes::free_address,
};
use emu2_proto::{
    stage::{
        DecoderInfoRequest, EncoderInfoRequest, LlmInfoRequest, language_model_client::LanguageModelClient,
        visual_decoder_client::VisualDecoderClient, visual_encoder_client::VisualEncoderClient,
    },
    v1::{ListModelsRequest, emu2_client::Emu2Client},
};
use emu2_serve::{client::Connector, tls::ClientTlsConfig};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tonic::{Code, Request, Status, transport::Channel};

use crate::{PATIENCE, POOL, assert_same, cluster, plan, send};

/// The name in the certificate of every stage, and of the router: they are called by their addresses.
const STAGE: &str = "emu2-stage";
const ROUTER: &str = "emu2-router";
const TOKEN: &str = "hunter2-hunter2-hunter2";
const TOKEN_SHA256: &str = "ae71c4cdf5d735963a372732e38e6c3198c25c4cc759e915682f4f04219c077e";

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, name: &str) -> Secret {
        let secret = Secret(tempfile::tempdir().unwrap());
        self.renew(name, &secret);
        secret
    }

    /// Puts a secret in place of another.
    fn renew(&self, name: &str, secret: &Secret) {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.0).unwrap();
        fs::write(secret.file("tls.crt"), certificate.pem()).unwrap();
        fs::write(secret.file("tls.key"), key.serialize_pem()).unwrap();
        fs::write(secret.file("ca.crt"), self.0.as_ref().pem()).unwrap();
    }
}

/// A folder as Kubernetes mounts it: a certificate, its key, and the authority that signed it.
struct Secret(TempDir);

impl Secret {
    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A stage behind mutual TLS.
    fn guarding(&self, stage: &Stage) -> Stage {
        let mut guarded = stage.clone();
        for (option, file) in
            [("--cert-file", "tls.crt"), ("--key-file", "tls.key"), ("--client-ca-file", "ca.crt")]
        {
            guarded.arguments.extend([option.to_owned(), self.file(file).display().to_string()]);
        }
        guarded
    }

    /// A caller who shows the certificate, to a server of this name.
    fn caller(&self, server_name: &str) -> Connector {
        let (cert_file, key_file) = (Some(self.file("tls.crt")), Some(self.file("tls.key")));
        Connector::open(&ClientTlsConfig { cert_file, key_file, ..self.trust(server_name) }).unwrap()
    }

    /// A caller who trusts the authority and shows nothing.
    fn stranger(&self, server_name: &str) -> Connector {
        Connector::open(&self.trust(server_name)).unwrap()
    }

    fn trust(&self, server_name: &str) -> ClientTlsConfig {
        let (ca_file, server_name) = (Some(self.file("ca.crt")), Some(server_name.to_owned()));
        ClientTlsConfig { ca_file, server_name, ..ClientTlsConfig::default() }
    }
}

/// What each holds: the stages, the router towards them, the router towards its clients.
struct Secrets {
    stages: Secret,
    inside: Secret,
    door: Secret,
}

impl Secrets {
    fn new(stages: &Authority) -> Self {
        Self {
            stages: stages.issue(STAGE),
            inside: stages.issue(ROUTER),
            door: Authority::new().issue(ROUTER),
        }
    }

    fn plan(&self) -> Plan {
        let plan = plan();
        let guard = |stage| self.stages.guarding(stage);
        let (encoder, llm, decoder) = (guard(&plan.encoder), guard(&plan.llm), guard(&plan.decoder));
        let path = |secret: &Secret, name| secret.file(name).display().to_string();
        let tables = format!(
            "{NO_CACHE}{POOL}\n\
             [pool.tls]\nca_file = {:?}\ncert_file = {:?}\nkey_file = {:?}\nserver_name = {STAGE:?}\n\
             [server.tls]\nmode = \"server\"\ncert_file = {:?}\nkey_file = {:?}\n\
             [auth]\nmode = \"tokens\"\n\
             [[auth.tenants]]\nname = \"search\"\ntoken_sha256 = [{TOKEN_SHA256:?}]\n",
            path(&self.inside, "ca.crt"),
            path(&self.inside, "tls.crt"),
            path(&self.inside, "tls.key"),
            path(&self.door, "tls.crt"),
            path(&self.door, "tls.key"),
        );
        Plan { encoder, llm, decoder, tables, replicas: 1, ..plan }
    }
}

/// A router behind TLS, and who may enter.
struct Guarded {
    router: Router,
    client: Emu2Client<Channel>,
}

impl Guarded {
    fn start(cluster: &Cluster, secrets: &Secrets) -> Self {
        let router = cluster.spawn_router(free_address()).unwrap();
        let channel = secrets.door.stranger(ROUTER).channel(&format!("https://{}", router.address)).unwrap();
        Self { router, client: Emu2Client::new(channel) }
    }

    async fn ready(cluster: &Cluster, secrets: &Secrets) -> Self {
        let mut guarded = Self::start(cluster, secrets);
        let began = Instant::now();
        loop {
            if let Ok(listing) = guarded.client.list_models(with_token(ListModelsRequest {})).await
                && listing.get_ref().models.iter().all(|model| model.ready)
            {
                return guarded;
            }
            assert!(began.elapsed() < PATIENCE, "not ready: {}", guarded.router.process.errors());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn send(&mut self, ask: Ask) -> Result<Answer, Status> {
        let Ask::Generate(request) = ask else { unreachable!("only Generate is asked here") };
        let began = Instant::now();
        load::read(self.client.generate(with_token(request)).await?.into_inner(), began).await
    }

    /// Waits for a line of the log that holds all of these.
    async fn logs(&self, words: &[&str]) {
        let began = Instant::now();
        loop {
            let log = self.router.process.errors();
            if log.lines().any(|line| words.iter().all(|word| line.contains(word))) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "no line has {words:?}: {log}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn with_token<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {TOKEN}").parse().unwrap());
    request
}

/// Asks a stage what it is, without a router in between.
async fn ask_stage(replica: &Replica, connector: &Connector) -> Result<(), Status> {
    ask_at(&replica.endpoints[0], replica, connector).await
}

async fn ask_at(endpoint: &str, replica: &Replica, connector: &Connector) -> Result<(), Status> {
    let channel = connector.channel(endpoint).unwrap();
    match replica.stage.role {
        "encoder" => VisualEncoderClient::new(channel).info(EncoderInfoRequest {}).await.map(drop),
        "llm" => LanguageModelClient::new(channel).info(LlmInfoRequest {}).await.map(drop),
        _ => VisualDecoderClient::new(channel).info(DecoderInfoRequest {}).await.map(drop),
    }
}

fn a_text() -> Ask {
    load::write(vec![image(1), text("What is this?")], 12)
}

#[tokio::test]
async fn answers_over_tls_are_whole_and_stages_talk_to_their_routers_alone() {
    let (stages, others) = (Authority::new(), Authority::new());
    let secrets = Secrets::new(&stages);
    let mut guarded_cluster = Cluster::without_router(secrets.plan()).await.unwrap();
    let mut guarded = Guarded::ready(&guarded_cluster, &secrets).await;
    let in_the_clear = cluster(plan()).await;
    for ask in [a_text(), load::draw(vec![image(2), text("at night")], 6, 7)] {
        let undisturbed = send(&in_the_clear, ask.clone()).await.unwrap();
        assert_same(&undisturbed, &guarded.send(ask).await);
    }

    let listing = guarded.client.list_models(ListModelsRequest {}).await;
    assert_eq!(listing.unwrap_err().code(), Code::Unauthenticated);
    let mut open = guarded.router.client();
    open.list_models(with_token(ListModelsRequest {})).await.expect_err("the router takes TLS alone");

    let strange = others.issue(ROUTER);
    fs::copy(secrets.stages.file("ca.crt"), strange.file("ca.crt")).unwrap();
    for replica in guarded_cluster.replicas() {
        ask_stage(replica, &secrets.inside.caller(STAGE)).await.expect("the router's certificate is let in");
        ask_stage(replica, &secrets.inside.stranger(STAGE)).await.expect_err("no certificate is shown");
        ask_stage(replica, &strange.caller(STAGE)).await.expect_err("another authority's is shown");
        let open = replica.endpoints[0].replace("https://", "http://");
        ask_at(&open, replica, &Connector::default()).await.expect_err("stages take TLS alone");
    }
}

/// The pool has one replica that shows a certificate of somebody else's authority: it gets nothing to do, and when it
/// is all that is left, the stage is not there.
#[tokio::test]
async fn a_stage_of_another_authority_is_not_used_and_the_log_says_why() {
    let (stages, others) = (Authority::new(), Authority::new());
    let secrets = Secrets::new(&stages);
    let plan = Plan { replicas: 2, ..secrets.plan() };
    let mut cluster = Cluster::without_router(plan).await.unwrap();
    let theirs = others.issue(STAGE);
    let strange = theirs.guarding(&crate::plan().encoder);
    cluster.encoders[1].restart_as(strange).await.unwrap();

    let mut guarded = Guarded::ready(&cluster, &secrets).await;
    for number in 0..6 {
        guarded.send(load::write(vec![image(number), text("?")], 4)).await.unwrap();
    }
    assert_eq!(cluster.encoders[1].metric("emu2_mock_calls_total").await, 0.0);
    guarded.logs(&[&cluster.encoders[1].endpoints[0], "does not answer", "invalid peer certificate"]).await;

    cluster.encoders[0].process.kill();
    let lost = guarded.send(a_text()).await.unwrap_err();
    assert_eq!((lost.code(), lost.message().contains("encoder")), (Code::Unavailable, true), "{lost}");
    // A router that has never known another one says so at once.
    let mut newcomer = Guarded::start(&cluster, &secrets);
    newcomer.logs(&[&cluster.encoders[1].endpoints[0], "invalid peer certificate"]).await;
    let missing = newcomer.send(a_text()).await.unwrap_err();
    assert_eq!(
        (missing.code(), missing.message().contains("encoder")),
        (Code::Unavailable, true),
        "{missing}"
    );
    assert_eq!(cluster.encoders[1].metric("emu2_mock_calls_total").await, 0.0);
}

/// To another authority altogether, so that nothing old can work: the stages restart with what is new, the router,
/// which does not, reads it.
#[tokio::test]
async fn replaced_certificates_are_taken_by_a_running_routers_new_connections() {
    let (old, new) = (Authority::new(), Authority::new());
    let secrets = Secrets::new(&old);
    let mut cluster = Cluster::without_router(secrets.plan()).await.unwrap();
    let mut guarded = Guarded::ready(&cluster, &secrets).await;
    let undisturbed = guarded.send(a_text()).await.unwrap();

    new.renew(STAGE, &secrets.stages);
    for replica in cluster.replicas() {
        replica.restart().await.unwrap();
        guarded.logs(&[&replica.endpoints[0], "does not answer", "invalid peer certificate"]).await;
    }
    assert_eq!(guarded.send(a_text()).await.unwrap_err().code(), Code::Unavailable);

    // The authority alone: now the router believes the stages, and they do not believe it.
    let (own, authority) = (&secrets.inside, secrets.stages.file("ca.crt"));
    fs::copy(&authority, own.file("ca.crt")).unwrap();
    guarded.logs(&[&cluster.encoders[0].endpoints[0], "does not answer", "fatal alert"]).await;
    new.renew(ROUTER, own);
    let began = Instant::now();
    let mut answer = guarded.send(a_text()).await;
    while answer.is_err() && began.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(20)).await;
        answer = guarded.send(a_text()).await;
    }
    assert_same(&undisturbed, &answer);
}
