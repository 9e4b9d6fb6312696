use std::sync::{Arc, Mutex};

use emu2_proto::v1;
use sha2::{Digest, Sha256};
use tonic::{Code, Request, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;
use tracing_subscriber::layer::SubscriberExt;

use super::loopback::{Loopback, PATIENCE, embed, reflected};
use crate::{
    priority::Priority,
    server::ServerConfig,
    tenant::{AuthConfig, AuthMode, TenantConfig, TenantLimits, Tenants, TokenHash},
};

const TOKEN: &str = "hunter2-hunter2-hunter2";

fn hash() -> String {
    hex::encode(Sha256::digest(TOKEN))
}

fn tenants() -> Tenants {
    let token_sha256 = vec![TokenHash::new(hash())];
    let limits = TenantLimits { max_requests: Some(1), ..TenantLimits::default() };
    let search =
        TenantConfig { name: "search".into(), token_sha256, highest_priority: Priority::Normal, limits };
    let auth = AuthConfig { mode: Some(AuthMode::Tokens), tenants: vec![search], tenants_file: None };
    Tenants::open(&auth).unwrap()
}

async fn start() -> Loopback {
    Loopback::start_with(ServerConfig::default(), |server| server.tenants(tenants())).await
}

fn with<T>(message: T, authorization: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", authorization.parse().unwrap());
    request
}

/// What the probe says of a call, as the name of the thing that it does not find.
async fn told(server: &Loopback, request: Request<v1::EmbedRequest>) -> String {
    let status: Status = server.client().embed(request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "{status:?}");
    status.get_details_resource_info().unwrap().resource_name
}

#[tokio::test]
async fn a_call_without_a_known_token_is_refused_and_one_with_it_is_its_tenant() {
    let server = start().await;
    let refused = server.client().list_models(v1::ListModelsRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.get_details_request_info().is_some());
    let wrong = with(v1::ListModelsRequest {}, "Bearer wrong");
    assert_eq!(server.client().list_models(wrong).await.unwrap_err().code(), Code::Unauthenticated);

    let mut claims = with(embed("tenant"), &format!("Bearer {TOKEN}"));
    claims.metadata_mut().insert("tenant", "ads".parse().unwrap());
    claims.metadata_mut().insert("x-tenant", "ads".parse().unwrap());
    assert_eq!(told(&server, claims).await, "search");
    let headers = told(&server, with(embed("headers"), &format!("Bearer {TOKEN}"))).await;
    assert!(!headers.contains(TOKEN), "a handler was handed the token: {headers}");
}

#[tokio::test]
async fn a_tenant_over_its_limit_is_refused_at_once_and_questions_are_not_counted() {
    let server = start().await;
    let bearer = format!("Bearer {TOKEN}");
    let request = || with(v1::GenerateRequest { seed: Some(1), ..Default::default() }, &bearer);
    let events = server.client().generate(request()).await.unwrap();
    let refused = server.client().generate(request()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(
        refused.message().contains("search") && refused.get_details_retry_info().is_some(),
        "{refused:?}"
    );
    server.client().list_models(with(v1::ListModelsRequest {}, &bearer)).await.unwrap();
    drop(events);
    let begun = std::time::Instant::now();
    while server.client().generate(request()).await.is_err() {
        assert!(begun.elapsed() < PATIENCE, "the place was not given back");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn health_needs_no_token_and_reflection_does() {
    let server = start().await;
    HealthClient::new(server.channel()).check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(reflected(&server).await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn without_tokens_everybody_is_the_default_tenant() {
    let server = Loopback::start(ServerConfig::default()).await;
    assert_eq!(told(&server, with(embed("tenant"), "Bearer whatever")).await, "default");
}

/// Every log line of the calls above, at the finest level, on this thread.
#[test]
fn no_log_line_holds_a_token_or_its_hash() {
    let lines = Lines::default();
    let layer = tracing_subscriber::fmt::layer().json().with_writer(lines.clone());
    let subscriber = tracing_subscriber::registry().with(layer);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tracing::subscriber::with_default(subscriber, || {
        runtime.block_on(async {
            let server = start().await;
            tracing::info!(tenants = ?tenants(), "configured");
            for token in [TOKEN, "wrong-hunter2", ""] {
                let request = with(embed("tenant"), &format!("Bearer {token}"));
                server.client().embed(request).await.unwrap_err();
            }
            server.shutdown.begin();
            server.ended().await;
        });
    });
    let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(lines.contains("UNAUTHENTICATED") && lines.contains("\"tenant\":\"search\""), "{lines}");
    for secret in ["hunter2", &hash(), "Bearer"] {
        let line = lines.lines().find(|line| line.contains(secret));
        assert_eq!(line, None);
    }
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}
