//! One request is one trace: four real processes export to a collector, and every span joins the caller's.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use emu2_proto::v1;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use crate::{
    processes::Processes,
    support::{client, draw, fresh_png, image, text},
};

/// The caller's side of the trace (W3C trace context).
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

#[derive(Clone, Debug)]
struct Span {
    service: String,
    name: String,
    id: String,
    parent: String,
}

/// An OTLP receiver that keeps the spans of the one trace.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let service = attributes.into_iter().find(|attribute| attribute.key == "service.name");
            let service = match service.and_then(|name| name.value?.value) {
                Some(Value::StringValue(name)) => name,
                other => panic!("service.name is {other:?}"),
            };
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let ours = spans.filter(|span| hex::encode(&span.trace_id) == TRACE).map(|span| Span {
                service: service.clone(),
                name: span.name,
                id: hex::encode(&span.span_id),
                parent: hex::encode(&span.parent_span_id),
            });
            self.0.lock().unwrap().extend(ours);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test]
async fn one_request_is_one_trace_through_every_service() {
    let collector = Collector::default();
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = format!("http://{}", incoming.local_addr().unwrap());
    let service = TraceServiceServer::new(collector.clone());
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));

    let mut cluster = Processes::start(&format!("\n[telemetry]\notlp_endpoint = \"{endpoint}\"\n")).await;
    let output = v1::ImageOutput { steps: Some(3), ..Default::default() };
    let mut request = Request::new(draw(vec![image(fresh_png(90)), text("on the beach")], output));
    let parent = format!("00-{TRACE}-{CALLER}-01").parse().unwrap();
    request.metadata_mut().insert("traceparent", parent);
    let mut api = client(cluster.router.addr).await;
    let mut events = api.generate(request).await.unwrap().into_inner();
    while events.message().await.unwrap().is_some() {}
    drop((events, api));

    // A service flushes its spans before it ends.
    cluster.router.terminate();
    assert!(cluster.router.ended().await.success());
    for stage in &mut cluster.stages {
        stage.terminate();
        assert!(stage.ended().await.success());
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_tree(&collector.0.lock().unwrap());
}

/// All four services, the stage spans among them, and every parent chain ends at the caller.
fn assert_tree(spans: &[Span]) {
    let services: BTreeSet<_> = spans.iter().map(|span| span.service.as_str()).collect();
    assert_eq!(services, ["emu2-decoder", "emu2-encoder", "emu2-llm", "emu2-router"].into(), "{spans:#?}");
    for (service, stage) in [
        ("emu2-encoder", "preprocess"),
        ("emu2-encoder", "encode_batch"),
        ("emu2-llm", "queue"),
        ("emu2-llm", "prefill"),
        ("emu2-llm", "decode_steps"),
        ("emu2-decoder", "queue"),
        ("emu2-decoder", "denoise_steps"),
        ("emu2-decoder", "vae"),
    ] {
        assert!(
            spans.iter().any(|span| span.service == service && span.name == stage),
            "{service} has no span `{stage}` in {spans:#?}"
        );
    }
    let parents: BTreeMap<_, _> = spans.iter().map(|span| (span.id.as_str(), span.parent.as_str())).collect();
    for span in spans {
        let mut at = span.id.as_str();
        while at != CALLER {
            at = parents.get(at).unwrap_or_else(|| panic!("{span:?}: the chain breaks at {at}: {spans:#?}"));
        }
    }
}
