use std::time::{Duration, Instant};

use emu2_proto::{
    stage::{self, visual_encoder_client::VisualEncoderClient},
    v1,
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use prometheus_client::registry::Registry;

use super::*;
use crate::{
    message,
    server::ServerConfig,
    tests::loopback::{Loopback, PATIENCE, Probe, embed, exported},
};

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER_SPAN_ID: &str = "00f067aa0ba902b7";

async fn start() -> Loopback {
    Loopback::start(ServerConfig::default()).await
}

#[tokio::test]
async fn a_request_id_is_returned_in_metadata_and_in_errors() {
    let server = start().await;
    let response = server.client().list_models(v1::ListModelsRequest {}).await.unwrap();
    let generated = response.metadata().get(REQUEST_ID).unwrap().to_str().unwrap();
    assert_eq!(generated.len(), 36);

    let mut request = Request::new(embed("emu3"));
    request.metadata_mut().insert(REQUEST_ID, "job-7".parse().unwrap());
    let error = server.client().embed(request).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert_eq!(error.metadata().get(REQUEST_ID).unwrap(), "job-7");
    assert_eq!(error.get_details_request_info().unwrap().request_id, "job-7");
    assert_eq!(error.get_details_resource_info().unwrap().resource_name, "emu3");
}

#[tokio::test]
async fn a_malformed_request_id_or_timeout_is_refused() {
    let server = start().await;
    for (key, value) in [(REQUEST_ID, "two words"), ("grpc-timeout", "soon")] {
        let mut request = Request::new(v1::ListModelsRequest {});
        request.metadata_mut().insert(key, value.parse().unwrap());
        let error = server.client().list_models(request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert_eq!(error.get_details_bad_request().unwrap().field_violations[0].field, key);
        assert!(error.metadata().get(REQUEST_ID).is_some());
    }
}

#[tokio::test]
async fn a_trace_goes_through_a_handler_and_its_tasks_and_is_exported() {
    let server = start().await;
    let mut request = Request::new(v1::ListModelsRequest {});
    let traceparent = format!("00-{TRACE_ID}-{CALLER_SPAN_ID}-01");
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    request.metadata_mut().insert(REQUEST_ID, "job-8".parse().unwrap());
    let models = server.client().list_models(request).await.unwrap().into_inner().models;
    let outgoing: Vec<_> = models.into_iter().map(|model| model.name).collect();
    assert!(outgoing.contains(&"x-request-id: job-8".to_owned()), "{outgoing:?}");
    let sent = outgoing.iter().find_map(|pair| pair.strip_prefix("traceparent: ")).unwrap();
    let [_, trace_id, span_id, _] = sent.split('-').collect::<Vec<_>>()[..] else { panic!("{sent}") };
    assert_eq!(trace_id, TRACE_ID);

    let exported = exported();
    let begun = Instant::now();
    let span = loop {
        exported.telemetry.flush().await;
        let found = exported.spans.lock().unwrap().iter().find(|span| span.trace_id == TRACE_ID).cloned();
        match found {
            Some(span) => break span,
            None => assert!(begun.elapsed() < PATIENCE, "the request's span was not exported"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(span.name, "emu2.v1.Emu2/ListModels");
    assert_eq!(span.attributes["request_id"], r#"Some(AnyValue { value: Some(StringValue("job-8")) })"#);
    assert_eq!((span.span_id.as_str(), span.parent_span_id.as_str()), (span_id, CALLER_SPAN_ID));
}

#[tokio::test]
async fn a_message_over_the_limit_is_exhaustion_that_names_the_limit() {
    let limit = 1 << 20;
    let server = Loopback::start(ServerConfig { max_message_bytes: limit, ..ServerConfig::default() }).await;
    // Larger than the windows of a stream, so that the answer comes while the caller is still sending.
    let data = vec![0; 8 << 20];
    let check = |error: Status| {
        assert_eq!(error.code(), Code::ResourceExhausted, "{error:?}");
        assert!(error.message().contains("at most 1048576 bytes"), "{error:?}");
    };
    let image = v1::Image { data: data.clone().into() };
    let unary = v1::EmbedRequest { image: Some(image.clone()), ..Default::default() };
    check(server.client().embed(unary).await.unwrap_err());

    let part = v1::Part { kind: Some(v1::part::Kind::Image(image)) };
    let input = Some(v1::generate_request::Input::Prompt(v1::Prompt { parts: vec![part] }));
    let streaming = v1::GenerateRequest { input, ..Default::default() };
    check(server.client().generate(streaming).await.unwrap_err());

    let source = Some(stage::encode_request::Source::Image(data.into()));
    let large = stage::EncodeRequest { source, ..Default::default() };
    let small = stage::EncodeRequest { n_query: 7, ..Default::default() };
    let mut client = VisualEncoderClient::new(server.channel());
    let mut answers = client.encode(futures::stream::iter([small, large])).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().preprocessing_version, 7);
    check(answers.message().await.unwrap_err());

    server.client().list_models(v1::ListModelsRequest {}).await.unwrap();
}

#[tokio::test]
async fn a_message_that_is_not_this_request_is_the_callers_fault() {
    let server = start().await;
    let mut channel = tonic::client::Grpc::new(server.channel());
    channel.ready().await.unwrap();
    // Field 1 of EmbedRequest is a string: these bytes are not UTF-8.
    let garbage = emu2_proto::v1::Image { data: vec![0xff, 0xfe].into() };
    let codec = tonic_prost::ProstCodec::<v1::Image, v1::EmbedResponse>::default();
    let path = http::uri::PathAndQuery::from_static("/emu2.v1.Emu2/Embed");
    let error = channel.unary(Request::new(garbage), path, codec).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
}

#[tokio::test]
async fn a_handlers_own_codes_stay_and_its_panic_is_internal() {
    let server = start().await;
    assert_eq!(server.client().embed(embed("range")).await.unwrap_err().code(), Code::OutOfRange);
    let error = server.client().embed(embed("panic")).await.unwrap_err();
    assert_eq!(error.code(), Code::Internal);
    assert!(error.get_details_request_info().is_some());
    server.client().list_models(v1::ListModelsRequest {}).await.unwrap();
}

fn with_timeout<T>(message: T, timeout: &'static str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
    request
}

/// Without a connection, whose client side would end the call by itself, and on paused time.
#[tokio::test(start_paused = true)]
async fn a_deadline_ends_a_unary_call() {
    let methods = Arc::new(Methods::read().unwrap());
    let shared = Shared {
        service: "probe",
        metrics: RpcMetrics::register(&mut Registry::default(), &methods),
        methods,
        readiness: Readiness::new(),
        admission: Admission::new(&ServerConfig::default()),
        tenants: Tenants::default(),
        stalled: Duration::from_secs(60),
        draining: CancellationToken::new(),
        cut: CancellationToken::new(),
    };
    shared.readiness.ready();
    let routes = Routes::new(v1::emu2_server::Emu2Server::new(Probe::new()));
    let mut client = v1::emu2_client::Emu2Client::new(RpcLayer(Arc::new(shared)).layer(routes));
    let error = client.embed(with_timeout(embed("wait"), "20S")).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert!(error.get_details_request_info().is_some());
}

#[tokio::test]
async fn a_call_that_ends_on_the_callers_side_is_told_as_a_deadline() {
    let server = start().await;
    let error = server.client().embed(with_timeout(embed("wait"), "20m")).await.unwrap_err();
    assert_eq!(message::decode_status(error).code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_deadline_ends_a_stream_and_its_sender() {
    let server = start().await;
    let mut closed = server.probe.closed_streams.subscribe();
    server.probe.steps.add_permits(1);
    let request = v1::GenerateRequest { seed: Some(2), ..Default::default() };
    let mut events = server.client().generate(with_timeout(request, "500m")).await.unwrap().into_inner();
    assert!(events.message().await.unwrap().is_some());
    let error = events.message().await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.get_details_request_info().is_some(), "details ride in trailers too");
    tokio::time::timeout(PATIENCE, closed.wait_for(|&count| count == 1)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_dropped_stream_reaches_the_sender_and_frees_its_permit() {
    let server = Loopback::start(ServerConfig { max_requests: 1, ..ServerConfig::default() }).await;
    let mut closed = server.probe.closed_streams.subscribe();
    let events = server.generate(1).await;
    let refused = server.client().generate(v1::GenerateRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.get_details_retry_info().is_some());
    // A full service still says what it is.
    server.client().list_models(v1::ListModelsRequest {}).await.unwrap();
    drop(events);
    tokio::time::timeout(PATIENCE, closed.wait_for(|&count| count == 1)).await.unwrap().unwrap();
    let begun = Instant::now();
    while server.client().generate(v1::GenerateRequest::default()).await.is_err() {
        assert!(begun.elapsed() < PATIENCE, "the permit was not given back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The headers alone: a caller whose message has not come holds a permit, and one more is refused without its message.
#[tokio::test]
async fn a_permit_is_taken_before_the_message() {
    let server = Loopback::start(ServerConfig { max_requests: 1, ..ServerConfig::default() }).await;
    let unsent = async || {
        let mut grpc = tonic::client::Grpc::new(server.channel());
        grpc.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<v1::EmbedRequest, v1::EmbedResponse>::default();
        let path = http::uri::PathAndQuery::from_static("/emu2.v1.Emu2/Embed");
        grpc.streaming(Request::new(futures::stream::pending()), path, codec).await.map(drop)
    };
    let mut first = Box::pin(unsent());
    let arrived = async {
        while !server.admin("/metrics").await.1.contains("emu2_rpc_in_flight_requests 1") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let refused = async {
        tokio::time::timeout(PATIENCE, arrived).await.expect("the first call arrives");
        tokio::time::timeout(PATIENCE, unsent()).await.expect("the second call is answered").unwrap_err()
    };
    let refused = tokio::select! {
        answer = &mut first => panic!("the call without a message ended: {answer:?}"),
        refused = refused => refused,
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
}

#[tokio::test]
async fn messages_over_what_the_service_can_hold_are_refused() {
    let config =
        ServerConfig { max_message_bytes: 1 << 20, max_held_bytes: 1 << 20, ..ServerConfig::default() };
    let server = Loopback::start(config).await;
    let request = || v1::EmbedRequest {
        model: "wait".into(),
        image: Some(v1::Image { data: vec![0; 600 << 10].into() }),
        ..Default::default()
    };
    let (mut client, mut second) = (server.client(), server.client());
    let mut waiting = server.probe.waiting.subscribe();
    let mut first = Box::pin(client.embed(request()));
    let refused = async {
        tokio::time::timeout(PATIENCE, waiting.wait_for(|&count| count == 1)).await.unwrap().unwrap();
        tokio::time::timeout(PATIENCE, second.embed(request())).await.expect("it is answered").unwrap_err()
    };
    let refused = tokio::select! {
        answer = &mut first => panic!("`wait` ended: {answer:?}"),
        refused = refused => refused,
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("server.max_held_bytes"), "{refused:?}");
    drop(first);
    server.client().list_models(v1::ListModelsRequest {}).await.unwrap();
}

#[tokio::test]
async fn calls_are_counted_by_method_and_code() {
    let server = start().await;
    server.client().list_models(v1::ListModelsRequest {}).await.unwrap();
    server.client().embed(embed("emu3")).await.unwrap_err();
    let mut nowhere = stage::visual_decoder_client::VisualDecoderClient::new(server.channel());
    assert_eq!(nowhere.info(stage::DecoderInfoRequest {}).await.unwrap_err().code(), Code::Unimplemented);
    let mut grpc = tonic::client::Grpc::new(server.channel());
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<v1::ListModelsRequest, v1::ListModelsResponse>::default();
    let path = http::uri::PathAndQuery::from_static("/emu2.v1.Emu2/AnythingElse");
    grpc.unary(Request::new(v1::ListModelsRequest {}), path, codec).await.unwrap_err();
    drop(server.generate(1).await);
    let begun = Instant::now();
    let expected = [
        r#"emu2_rpc_requests_total{method="emu2.v1.Emu2/ListModels",code="OK"} 1"#,
        r#"emu2_rpc_requests_total{method="emu2.v1.Emu2/Embed",code="NOT_FOUND"} 1"#,
        r#"emu2_rpc_requests_total{method="emu2.v1.Emu2/Generate",code="CANCELLED"} 1"#,
        r#"emu2_rpc_requests_total{method="unknown",code="UNIMPLEMENTED"} 1"#,
        r#"emu2_rpc_duration_seconds_count{method="emu2.v1.Emu2/ListModels",code="OK"} 1"#,
        "emu2_rpc_in_flight_requests 0",
    ];
    loop {
        let (status, text) = server.admin("/metrics").await;
        assert_eq!(status, 200);
        if expected.iter().all(|line| text.contains(line)) {
            break;
        }
        // The end of a dropped stream reaches the server a moment later.
        assert!(begun.elapsed() < PATIENCE, "{text}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
