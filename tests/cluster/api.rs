//! What a client finds: models and limits, events in order, reflection and health on every service.

use emu2_proto::v1::{self, Capability, FinishReason, generate_event::Event};
use tonic::{Code, Request};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use tonic_types::StatusExt;

use crate::support::{
    self, answer, ask, channel, draw, events, finished, fresh_png, golden_png, greedy, image, painted,
    shared, text,
};

#[tokio::test]
async fn models_say_what_they_can_do() {
    let mut client = shared().client().await;
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    let named = |name: &str| models.iter().find(|model| model.name == name).unwrap();
    let can = |name: &str| named(name).capabilities().collect::<Vec<_>>();
    assert_eq!(models.len(), 3);
    assert_eq!(can("emu2"), [Capability::Embed, Capability::Text]);
    assert_eq!(can("emu2-chat"), [Capability::Embed, Capability::Text, Capability::Chat]);
    assert_eq!(can("emu2-gen"), [Capability::Embed, Capability::Text, Capability::Image]);
    assert_eq!((named("emu2-chat").n_query, named("emu2-chat").v_query), (16, 4));
    assert_eq!((named("emu2-gen").default_height, named("emu2-gen").default_width), (64, 64));
    assert_eq!((named("emu2").embedding_width, named("emu2").max_positions), (64, 2048));
    for model in &models {
        assert!(model.ready, "{}", model.name);
        assert_eq!(model.encoder_digest.len(), 64);
        assert_eq!(model.decoder_digest.is_empty(), model.name != "emu2-gen");
        assert!(model.limits.is_some());
    }
    assert_ne!(named("emu2").llm_digest, named("emu2-gen").llm_digest);
}

#[tokio::test]
async fn greedy_text_streams_and_its_pieces_are_the_whole() {
    let mut client = shared().client().await;
    let request =
        || ask("emu2", vec![image(golden_png(0)), text("Describe the image in details:")], greedy(32));
    let events = events(&mut client, request()).await.unwrap();
    let Some(Event::Accepted(accepted)) = events.first() else { panic!("accepted comes first: {events:?}") };
    assert_eq!(accepted.model, "emu2");
    let done = finished(&events);
    assert_eq!(done.seed, accepted.seed);
    assert_eq!(done.reason(), FinishReason::EndOfText);
    let usage = done.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.images), (21, 1));
    let Some(v1::finished::Parameters::Text(parameters)) = &done.parameters else { panic!("{done:?}") };
    assert_eq!((parameters.num_beams, parameters.length_penalty), (Some(1), Some(-1.0)));
    assert_eq!(answer(&mut client, request()).await.unwrap(), "a");
}

#[tokio::test]
async fn painting_reports_every_step_and_a_seed_repeats_it() {
    let mut client = shared().client().await;
    let output = v1::ImageOutput { steps: Some(3), ..Default::default() };
    let request = |seed| v1::GenerateRequest { seed, ..draw(vec![text("a dog")], output) };
    let events = events(&mut client, request(Some(11))).await.unwrap();
    let embeddings = events.iter().filter_map(|event| match event {
        Event::EmbeddingProgress(at) => Some((at.done, at.total)),
        _ => None,
    });
    assert_eq!(embeddings.last(), Some((16, 16)));
    let steps = events.iter().filter_map(|event| match event {
        Event::DenoiseProgress(at) => Some((at.step, at.steps)),
        _ => None,
    });
    assert_eq!(steps.collect::<Vec<_>>(), [(1, 3), (2, 3), (3, 3)]);
    let done = finished(&events);
    assert_eq!((done.reason(), done.seed), (FinishReason::Image, 11));
    let Some(v1::finished::Parameters::Image(parameters)) = &done.parameters else { panic!("{done:?}") };
    assert_eq!(
        (parameters.height, parameters.steps, parameters.guidance_scale),
        (Some(64), Some(3), Some(3.0))
    );
    assert!(done.timings.unwrap().denoise_ms > 0.0);

    let first = painted(&mut client, request(Some(11))).await.unwrap();
    // Other tests' requests share the batches, which rounds differently.
    assert!(worst_difference(&painted(&mut client, request(Some(11))).await.unwrap(), &first) <= 1);
    assert!(worst_difference(&painted(&mut client, request(Some(12))).await.unwrap(), &first) > 16);
    // A seed not given is drawn and returned.
    let drawn = support::events(&mut client, request(None)).await.unwrap();
    let again = support::events(&mut client, request(None)).await.unwrap();
    assert_ne!(finished(&drawn).seed, finished(&again).seed);
}

/// Exactly one image and no words is autoencoding; with empty words it is generation, as upstream.
#[tokio::test]
async fn one_image_alone_is_autoencoded() {
    let mut client = shared().client().await;
    let output = v1::ImageOutput { steps: Some(2), ..Default::default() };
    let alone = events(&mut client, draw(vec![image(golden_png(1))], output)).await.unwrap();
    let with_words = events(&mut client, draw(vec![image(golden_png(1)), text("")], output)).await.unwrap();
    let regressed = |events: &[Event]| finished(events).usage.unwrap().regressed_embeddings;
    assert_eq!((regressed(&alone), regressed(&with_words)), (0, 16));
}

#[tokio::test]
async fn every_request_has_an_id() {
    let mut client = shared().client().await;
    let mut request = Request::new(ask("emu2", vec![text("x")], greedy(1)));
    request.metadata_mut().insert("x-request-id", "mine-1".parse().unwrap());
    let response = client.generate(request).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "mine-1");
    let generated = client.list_models(v1::ListModelsRequest {}).await.unwrap();
    assert!(!generated.metadata().get("x-request-id").unwrap().is_empty());
    // An error names it too.
    let mut request = Request::new(ask("emu3", vec![text("x")], greedy(1)));
    request.metadata_mut().insert("x-request-id", "mine-2".parse().unwrap());
    let status = client.generate(request).await.unwrap_err();
    assert_eq!(status.get_details_request_info().unwrap().request_id, "mine-2");
    let mut request = Request::new(v1::ListModelsRequest {});
    request.metadata_mut().insert("x-request-id", "no spaces!".parse().unwrap());
    assert_eq!(client.list_models(request).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn every_service_tells_its_health_and_its_api() {
    let shared = shared();
    let router = (shared.addr, "emu2.v1.Emu2");
    let stages = shared.stages.iter().map(|member| {
        let service = match member.stage {
            "encoder" => "emu2.stage.v1.VisualEncoder",
            "llm" => "emu2.stage.v1.LanguageModel",
            _ => "emu2.stage.v1.VisualDecoder",
        };
        (member.addr, service)
    });
    for (addr, service) in std::iter::once(router).chain(stages) {
        let channel = channel(addr).await;
        for name in ["", service] {
            let check = HealthCheckRequest { service: name.to_owned() };
            let health = HealthClient::new(channel.clone()).check(check).await.unwrap().into_inner();
            assert_eq!(health.status(), ServingStatus::Serving, "{service}");
        }
        let list = ServerReflectionRequest {
            message_request: Some(MessageRequest::ListServices(String::new())),
            ..Default::default()
        };
        let mut reflection = ServerReflectionClient::new(channel);
        let mut answers =
            reflection.server_reflection_info(tokio_stream::iter([list])).await.unwrap().into_inner();
        let Some(MessageResponse::ListServicesResponse(list)) =
            answers.message().await.unwrap().unwrap().message_response
        else {
            panic!("{service} does not list its services")
        };
        assert!(list.service.iter().any(|listed| listed.name == service), "{service} not in {list:?}");
    }
}

/// Requests of every kind at once, each answered as it would be alone.
#[tokio::test]
async fn requests_do_not_disturb_each_other() {
    let client = shared().client().await;
    let painting = || {
        let output = v1::ImageOutput { steps: Some(4), ..Default::default() };
        draw(vec![image(fresh_png(40)), text("on the beach")], output)
    };
    let asking =
        || ask("emu2-gen", vec![image(fresh_png(41)), text("What is this?")], v1::TextOutput::default());
    let alone = (
        painted(&mut client.clone(), painting()).await.unwrap(),
        answer(&mut client.clone(), asking()).await.unwrap(),
    );
    let crowd = (0..6).map(|_| {
        let mut client = client.clone();
        async move {
            let mut other = client.clone();
            let (painted, answered) =
                tokio::join!(painted(&mut client, painting()), answer(&mut other, asking()));
            (painted.unwrap(), answered.unwrap())
        }
    });
    for (image, words) in futures::future::join_all(crowd).await {
        assert_eq!(words, alone.1);
        // Batch composition rounds differently: one level is within the design's promise.
        assert!(worst_difference(&image, &alone.0) <= 1);
    }
}

fn worst_difference(a: &image::RgbImage, b: &image::RgbImage) -> u8 {
    a.iter().zip(b.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}
