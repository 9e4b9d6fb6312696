//! Callers that leave, time that runs out, stages that fail, and a full house.

use std::{sync::atomic::Ordering, time::Duration};

use emu2_proto::v1::{Dtype, EmbedRequest, Image, ListModelsRequest, generate_event::Event};
use emu2_serve::status::{self, Violation};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use super::{
    mocks::{Role, SLOW, Script, Stage},
    redis_server::free_port,
    sandbox::{Router, Sandbox, ask, collect, config, image, paint, refusal, text, until},
};

/// Every stage at work for one request: a picture being encoded, another regressed from, a decoder waiting for rows.
async fn all_stages_at_work(sandbox: &Sandbox) {
    until("every stage is at work", || async {
        [&sandbox.encoder, &sandbox.llm, &sandbox.decoder].iter().all(|stage| stage.running() == 1)
    })
    .await;
}

fn all_cancelled(sandbox: &Sandbox) -> [usize; 3] {
    [&sandbox.encoder, &sandbox.llm, &sandbox.decoder].map(|stage| stage.cancelled.load(Ordering::SeqCst))
}

#[tokio::test]
async fn a_caller_that_leaves_stops_every_stage() {
    let sandbox = Sandbox::start().await;
    sandbox.encoder.hold();
    let stream = sandbox.client().generate(paint(vec![image(SLOW), text("a cat")], 1.0)).await.unwrap();
    all_stages_at_work(&sandbox).await;
    drop(stream);
    sandbox.idle().await;
    assert_eq!(all_cancelled(&sandbox), [1, 1, 1]);
    sandbox.encoder.let_go();
    assert!(!sandbox.embed(SLOW).await.unwrap().cached, "a cancelled encode leaves nothing behind");
}

#[tokio::test]
async fn a_deadline_stops_every_stage() {
    let sandbox = Sandbox::start().await;
    sandbox.encoder.hold();
    let mut request = Request::new(paint(vec![image(SLOW), text("a cat")], 1.0));
    request.set_timeout(Duration::from_millis(300));
    let stream = sandbox.client().generate(request).await.unwrap().into_inner();
    all_stages_at_work(&sandbox).await;
    assert_eq!(collect(stream).await.unwrap_err().code(), Code::DeadlineExceeded);
    sandbox.idle().await;
    assert_eq!(sandbox.encoder.cancelled.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_embedding_that_nobody_waits_for_is_given_up() {
    let sandbox = Sandbox::start().await;
    sandbox.encoder.hold();
    let mut client = sandbox.client();
    let request = EmbedRequest {
        model: "emu2".into(),
        image: Some(Image { data: SLOW.into() }),
        n_query: None,
        ..Default::default()
    };
    let caller = tokio::spawn(async move { client.embed(request).await });
    until("it is being encoded", || async { sandbox.encoder.running() == 1 }).await;
    caller.abort();
    sandbox.idle().await;
    assert_eq!(all_cancelled(&sandbox), [1, 0, 0]);
}

#[tokio::test]
async fn a_flight_goes_on_for_those_who_still_wait() {
    let sandbox = Sandbox::start().await;
    sandbox.encoder.hold();
    let first = sandbox.client().generate(ask(vec![image(SLOW)])).await.unwrap();
    until("the first is encoding", || async { sandbox.encoder.running() == 1 }).await;
    // Pictures are looked up in order: with its fast one in its slot, the second request waits for the slow one.
    let second = sandbox.client().generate(ask(vec![image(SLOW), image("fast")])).await.unwrap();
    until("the second waits, too", || async { sandbox.llm.slots.lock().unwrap().len() == 1 }).await;
    drop(first);
    until("the first has left", || async { sandbox.llm.running() == 1 }).await;
    sandbox.encoder.let_go();
    collect(second.into_inner()).await.unwrap();
    assert_eq!(sandbox.encoder.calls(), 2, "each picture once");
}

#[tokio::test]
async fn a_full_router_refuses_at_once() {
    let sandbox = Sandbox::with(|config| config.server.max_requests = 1).await;
    sandbox.llm.hold();
    let running = sandbox.client().generate(ask(vec![text("a")])).await.unwrap();
    let refused = sandbox.events(ask(vec![text("b")])).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.get_details_retry_info().unwrap().retry_delay.is_some());
    assert_eq!(sandbox.embed(b"cat").await.unwrap_err().code(), Code::ResourceExhausted);
    sandbox.llm.let_go();
    collect(running.into_inner()).await.unwrap();
    until("the permit is back", || async { sandbox.embed(b"cat").await.is_ok() }).await;
}

#[tokio::test]
async fn a_stage_that_is_down_is_unavailable_and_comes_back() {
    let mut sandbox = Sandbox::start().await;
    sandbox.encoder.kill();
    assert_eq!(sandbox.embed(b"cat").await.unwrap_err().code(), Code::Unavailable);
    let request = ask(vec![image("cat")]);
    assert_eq!(sandbox.events(request).await.unwrap_err().code(), Code::Unavailable);
    sandbox.idle().await;
    sandbox.events(ask(vec![text("no picture, no encoder")])).await.unwrap();
    until("both models say so", || async {
        let listing = sandbox.client().list_models(ListModelsRequest {}).await.unwrap().into_inner();
        listing.models.iter().all(|model| !model.ready)
    })
    .await;

    let address = sandbox.encoder.address;
    until("the port is free", || async { std::net::TcpListener::bind(address).is_ok() }).await;
    let listener = std::net::TcpListener::bind(address).unwrap();
    sandbox.encoder = Stage::start_on(listener, Role::Encoder, Script::new("e1"));
    until("the encoder is back", || async { sandbox.embed(b"cat").await.is_ok() }).await;
}

#[tokio::test]
async fn a_stage_lost_in_the_middle_is_unavailable() {
    let mut sandbox = Sandbox::with(|config| config.pool.failover_wait_ms = 300).await;
    sandbox.llm.hold();
    let mut stream = sandbox.client().generate(ask(vec![text("a")])).await.unwrap().into_inner();
    stream.message().await.unwrap();
    stream.message().await.unwrap();
    sandbox.llm.kill();
    assert_eq!(collect(stream).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_lost_replica_costs_no_request_while_another_is_left() {
    let second = Stage::start(Role::Encoder, Script::new("e1"));
    let endpoint = second.endpoint();
    let mut sandbox = Sandbox::with(|config| {
        for model in &mut config.models {
            model.encoder.push(endpoint.clone());
        }
        config.cache.memory_bytes = 0;
    })
    .await;
    until("both replicas are used", || async {
        sandbox.embed(b"cat").await.unwrap();
        sandbox.encoder.calls() > 0 && second.calls() > 0
    })
    .await;
    sandbox.encoder.kill();
    for _ in 0..20 {
        sandbox.embed(b"cat").await.unwrap();
    }
}

#[tokio::test]
async fn a_name_stands_for_whoever_has_its_address() {
    let sandbox = Sandbox::with(|config| {
        for model in &mut config.models {
            for endpoint in &mut model.encoder {
                *endpoint = endpoint.replace("http://127.0.0.1", "dns+http://localhost");
            }
        }
    })
    .await;
    sandbox.embed(b"cat").await.unwrap();
}

/// HTTP/2 takes a connection for hostile on which a thousand streams were reset.
#[tokio::test]
async fn a_connection_carries_thousands_of_calls() {
    let sandbox = Sandbox::start().await;
    for first in (0..2_500_u32).step_by(25) {
        let calls = (first..first + 25).map(|number| {
            let image = Some(Image { data: number.to_le_bytes().to_vec().into() });
            let request = EmbedRequest { model: "emu2".into(), image, ..Default::default() };
            let mut client = sandbox.client();
            async move { client.embed(request).await }
        });
        for embedded in futures::future::join_all(calls).await {
            embedded.unwrap();
        }
    }
    assert_eq!(sandbox.encoder.calls(), 2_500);
}

/// With one replica busy, everything new goes to the other.
#[tokio::test]
async fn the_less_loaded_replica_is_taken() {
    let second = Stage::start(Role::Encoder, Script::new("e1"));
    let endpoint = second.endpoint();
    let sandbox = Sandbox::with(|config| {
        config.models[1].encoder.push(endpoint);
        config.cache.memory_bytes = 0;
    })
    .await;
    until("both replicas are known", || async {
        sandbox.embed(b"a").await.unwrap();
        sandbox.encoder.calls() > 0 && second.calls() > 0
    })
    .await;
    until("both are idle", || async { sandbox.encoder.running() + second.running() == 0 }).await;
    sandbox.encoder.hold();
    second.hold();
    let mut client = sandbox.client();
    let image = Some(Image { data: SLOW.into() });
    let request = EmbedRequest { model: "emu2".into(), image, ..Default::default() };
    let first = tokio::spawn(async move { client.embed(request).await });
    until("one is busy", || async { sandbox.encoder.running() + second.running() == 1 }).await;
    let busy = if second.running() == 1 { &second } else { &sandbox.encoder };
    let before = busy.calls();
    for _ in 0..10 {
        sandbox.embed(b"b").await.unwrap();
    }
    assert_eq!(busy.calls(), before);
    first.abort();
}

/// So that a replica has what it read before at hand; but not at the price of a queue.
#[tokio::test]
async fn prompts_that_begin_alike_meet_on_one_replica_until_it_is_busy() {
    let second = Stage::start(Role::Llm { instruct: true }, Script::new("l1"));
    let endpoint = second.endpoint();
    let sandbox = Sandbox::with(|config| config.models[1].llm.push(endpoint)).await;
    let calls = || [sandbox.llm.calls(), second.calls()];
    until("both replicas are known", || async {
        sandbox.events(ask(vec![text(&format!("{calls:?}", calls = calls()))])).await.unwrap();
        calls().into_iter().all(|calls| calls > 0)
    })
    .await;
    let before = calls();
    for _ in 0..10 {
        sandbox.events(ask(vec![text("alike"), image("other"), text("end")])).await.unwrap();
    }
    let moved = [0, 1].map(|index| calls()[index] - before[index]);
    assert!(moved == [10, 0] || moved == [0, 10], "{moved:?}");

    sandbox.llm.hold();
    second.hold();
    let mut running = Vec::new();
    for _ in 0..8 {
        running.push(sandbox.client().generate(ask(vec![text("alike")])).await.unwrap());
    }
    until("all are at work", || async { sandbox.llm.running() + second.running() == 8 }).await;
    assert!(
        sandbox.llm.running().min(second.running()) >= 2,
        "{} and {}",
        sandbox.llm.running(),
        second.running()
    );
}

#[tokio::test]
async fn the_router_is_ready_when_its_stages_are() {
    let port = free_port();
    let sandbox = Sandbox::start().await;
    let mut config = crate::config::Config {
        server: emu2_serve::server::ServerConfig::default(),
        pool: crate::config::PoolConfig { retry_ms: 20, refresh_ms: 100, ..Default::default() },
        ..Default::default()
    };
    config.models[0].encoder = vec![format!("http://127.0.0.1:{port}")];
    config.models[0].llm = vec![sandbox.llm.endpoint()];
    config.models[0].decoder = vec![];
    let router = Router::start(config).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!router.is_ready().await);
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let _encoder = Stage::start_on(listener, Role::Encoder, Script::new("e1"));
    until("the router is ready", || router.is_ready()).await;
    router.embed(b"cat").await.unwrap();
    router.stop().await;
}

/// Its first requests are not for the quickest replica alone; but one that hangs does not hold it up for long.
#[tokio::test]
async fn the_router_is_ready_when_it_has_asked_every_replica() {
    let sandbox = Sandbox::start().await;
    let second = Stage::start(Role::Encoder, Script::new("e1"));
    let start = async |info_timeout_ms| {
        let mut config = config(&sandbox.encoder, &sandbox.llm, &sandbox.decoder);
        config.models.iter_mut().for_each(|model| model.encoder.push(second.endpoint()));
        config.pool.info_timeout_ms = info_timeout_ms;
        Router::start(config).await
    };
    second.hung.send_replace(true);
    let patient = start(600_000).await;
    until("every other is asked, too", || async { second.asked.load(Ordering::SeqCst) == 1 }).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!patient.is_ready().await);
    let hasty = start(200).await;
    until("it is ready without it", || hasty.is_ready()).await;
    second.hung.send_replace(false);
    until("it is ready with it", || patient.is_ready()).await;
}

#[tokio::test]
async fn a_stages_refusal_names_the_public_field() {
    let sandbox = Sandbox::start().await;
    let invalid =
        |field: &str| Some(status::invalid(vec![Violation::new(field, "must be better, got this")]));

    sandbox.encoder.fail(invalid("image"));
    let request = ask(vec![text("a"), image("not a picture")]);
    let expected = (Code::InvalidArgument, vec!["prompt.parts[1].image".to_owned()]);
    assert_eq!(refusal(&sandbox.events(request).await.unwrap_err()), expected);
    let expected = (Code::InvalidArgument, vec!["image".to_owned()]);
    assert_eq!(refusal(&sandbox.embed(b"not a picture").await.unwrap_err()), expected);
    sandbox.encoder.fail(None);

    for field in ["prompt.parts[0].text", "prompt", "text.num_beams"] {
        sandbox.llm.fail(invalid(field));
        let expected = (Code::InvalidArgument, vec![field.to_owned()]);
        assert_eq!(refusal(&sandbox.events(ask(vec![text("a")])).await.unwrap_err()), expected);
    }
    sandbox.llm.fail(invalid("embeddings"));
    assert_eq!(sandbox.events(ask(vec![text("a")])).await.unwrap_err().code(), Code::Internal);
    sandbox.llm.fail(None);

    sandbox.decoder.fail(invalid("image.height"));
    let expected = (Code::InvalidArgument, vec!["image.height".to_owned()]);
    assert_eq!(refusal(&sandbox.events(paint(vec![text("a")], 1.0)).await.unwrap_err()), expected);
    sandbox.decoder.fail(None);
    sandbox.idle().await;
}

#[tokio::test]
async fn other_failures_of_a_stage_keep_to_the_api() {
    let sandbox = Sandbox::start().await;
    let full = status::exhausted("queue is full", Duration::from_secs(3));
    let cases = [
        (full, Code::ResourceExhausted),
        (Status::unavailable("stopping"), Code::Unavailable),
        (Status::internal("engine stopped"), Code::Internal),
        (Status::unimplemented("old build"), Code::Internal),
    ];
    for (status, code) in cases {
        sandbox.llm.fail(Some(status));
        let failed = sandbox.events(ask(vec![text("a")])).await.unwrap_err();
        assert_eq!(failed.code(), code);
        if code == Code::ResourceExhausted {
            assert_eq!(failed.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(3)));
        }
    }
}

/// A deployment half on CPUs, half on GPUs: embeddings of one stage are none of the other's.
#[tokio::test]
async fn stages_that_compute_differently_are_unavailable_with_the_reason() {
    let sandbox = Sandbox::start().await;
    let refused = async |request| {
        let status = sandbox.events(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        status.message().to_owned()
    };
    sandbox.decoder.compute_in(Dtype::Bf16);
    until("it is noticed", || async { sandbox.events(paint(vec![text("a")], 1.0)).await.is_err() }).await;
    let message = refused(paint(vec![text("a")], 1.0)).await;
    assert!(message.contains("the llm computes in float32, the decoder in bfloat16"), "{message}");
    assert!(message.contains("\"emu2-gen\""), "{message}");
    sandbox.events(ask(vec![text("no picture, no decoder")])).await.unwrap();
    let models = sandbox.client().list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    let ready: Vec<_> = models.iter().map(|model| (model.name.as_str(), model.ready)).collect();
    assert_eq!(ready, [("emu2-gen", false), ("emu2", true)]);

    sandbox.encoder.compute_in(Dtype::Bf16);
    until("it is noticed", || async { sandbox.embed(b"cat").await.is_err() }).await;
    let message = refused(ask(vec![image("cat")])).await;
    assert!(message.contains("the encoder computes in bfloat16, the llm in float32"), "{message}");
}

/// The decoder came back with other weights between the router's two looks: its picture is not passed on.
#[tokio::test]
async fn a_picture_of_other_weights_than_it_began_with_is_not_shown() {
    let sandbox = Sandbox::start().await;
    sandbox.decoder.hold();
    let mut stream = sandbox.client().generate(paint(vec![text("a")], 1.0)).await.unwrap().into_inner();
    until("it is being painted", || async { sandbox.decoder.running() == 1 }).await;
    sandbox.decoder.roll("d2");
    sandbox.decoder.let_go();
    let mut pictures = 0;
    let status = loop {
        match stream.message().await {
            Ok(event) => {
                let event = event.expect("a status comes first").event;
                pictures += usize::from(matches!(event, Some(Event::Image(_))));
            }
            Err(status) => break status,
        }
    };
    assert_eq!((status.code(), pictures), (Code::Unavailable, 0), "{status:?}");
    assert!(status.message().contains("weights are being replaced"), "{}", status.message());
    let events = sandbox.events(paint(vec![text("a")], 1.0)).await.unwrap();
    assert!(events.iter().any(|event| matches!(event, Event::Image(_))));
}
