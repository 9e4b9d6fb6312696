use emu2_proto::v1::{GenerateRequest, ListModelsRequest, Priority};
use emu2_serve::{
    priority,
    tenant::{AuthConfig, AuthMode, TenantConfig, TenantLimits, Token, TokenHash},
};
use tonic::{Code, Request};

use super::sandbox::{Router, Sandbox, ask, config, image, paint, refusal, text, until};

const TOKEN: &str = "hunter2-hunter2-hunter2";
const TOKEN_SHA256: &str = "ae71c4cdf5d735963a372732e38e6c3198c25c4cc759e915682f4f04219c077e";

fn of_class(priority: Priority, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { priority: priority.into(), ..request }
}

#[tokio::test]
async fn the_class_of_a_request_goes_to_every_stage() {
    let sandbox = Sandbox::start().await;
    let request = of_class(Priority::High, paint(vec![text("a"), image("1")], 3.0));
    sandbox.events(request).await.unwrap();
    for stage in [&sandbox.encoder, &sandbox.llm, &sandbox.decoder] {
        let calls = stage.script.metadata.lock().unwrap();
        assert!(!calls.is_empty());
        for metadata in calls.iter() {
            assert_eq!(metadata.get("x-emu2-priority").unwrap(), "PRIORITY_HIGH");
        }
    }
}

#[tokio::test]
async fn a_class_that_there_is_not_is_refused() {
    let sandbox = Sandbox::start().await;
    let refused = sandbox.events(GenerateRequest { priority: 9, ..ask(vec![text("a")]) }).await.unwrap_err();
    assert_eq!(refusal(&refused), (Code::InvalidArgument, vec!["priority".to_owned()]));
}

/// Not what the request says counts, but what its token may.
#[tokio::test]
async fn nobody_goes_before_others_without_leave() {
    let sandbox = Sandbox::start().await;
    let tenant = TenantConfig {
        name: "search".into(),
        token_sha256: vec![TokenHash::new(TOKEN_SHA256)],
        highest_priority: priority::Priority::Normal,
        limits: TenantLimits::default(),
    };
    let mut config = config(&sandbox.encoder, &sandbox.llm, &sandbox.decoder);
    config.auth = AuthConfig { mode: Some(AuthMode::Tokens), tenants: vec![tenant], tenants_file: None };
    let router = Router::start(config).await;
    let mut client = router.client.clone();
    until("the router is ready", || {
        let mut client = client.clone();
        async move { client.list_models(with_token(ListModelsRequest {})).await.is_ok() }
    })
    .await;
    let request = |priority| of_class(priority, ask(vec![text("a")]));
    let refused = client.generate(with_token(request(Priority::High))).await.unwrap_err();
    assert_eq!(refusal(&refused), (Code::InvalidArgument, vec!["priority".to_owned()]));
    assert!(refused.message().contains("PRIORITY_NORMAL for tenant search"), "{refused:?}");
    client.generate(with_token(request(Priority::Normal))).await.unwrap();
    let refused = client.generate(request(Priority::Normal)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

fn with_token<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", Token::from(TOKEN.to_owned()).bearer().unwrap());
    request
}
