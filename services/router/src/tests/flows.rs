//! Every task: what each stage is sent, in which order, and what the client sees.

use emu2_proto::{
    stage::{encode_request::Source, llm_part, llm_start},
    v1::{
        Capability, Chat, FinishReason, ListModelsRequest, Role, Turn, finished::Parameters,
        generate_event::Event,
    },
};

use super::{
    mocks::{N_QUERY, PNG, SLOW, tensor},
    sandbox::{Sandbox, ask, ask_chat, collect, finished, image, paint, region, text, until, words},
};

#[tokio::test]
async fn text_comes_as_deltas_and_ends_with_a_report() {
    let sandbox = Sandbox::start().await;
    let events = sandbox.events(ask(vec![text("what is"), image("cat"), text("?")])).await.unwrap();
    assert_eq!(words(&events), ["accepted", "text Hel", "text lo", "finished"]);
    let Event::Accepted(accepted) = &events[0] else { panic!() };
    assert_eq!((accepted.model.as_str(), accepted.seed), ("emu2", 1));
    assert!(!accepted.request_id.is_empty());

    let finished = finished(&events);
    assert_eq!((finished.reason(), finished.seed), (FinishReason::EndOfText, 1));
    let usage = finished.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.generated_tokens), (7, 3));
    assert_eq!((usage.images, usage.cached_images), (1, 0));
    let timings = finished.timings.unwrap();
    assert!(timings.encode_ms > 0.0 && timings.prefill_ms == 1.5 && timings.total_ms >= timings.encode_ms);
    let Some(Parameters::Text(parameters)) = finished.parameters else { panic!() };
    assert_eq!(parameters.num_beams, Some(5));

    assert_eq!(*sandbox.llm.slots.lock().unwrap(), [(0, tensor("e1", b"cat", N_QUERY))]);
    let starts = sandbox.llm.starts.lock().unwrap();
    let Some(llm_start::Input::Prompt(prompt)) = &starts[0].input else { panic!() };
    assert_eq!(prompt.parts[0].kind, Some(llm_part::Kind::Text("what is".into())));
    assert_eq!(prompt.parts.len(), 3);
}

#[tokio::test]
async fn a_dialogue_goes_on_turn_by_turn() {
    let sandbox = Sandbox::start().await;
    let turn = |role: Role, parts| Turn { role: role.into(), parts };
    let turns = vec![
        turn(Role::User, vec![image("cat")]),
        turn(Role::Assistant, vec![text("a cat")]),
        turn(Role::User, vec![text("sure?")]),
    ];
    let chat = Chat { turns, system_message: Some("be brief".into()) };
    sandbox.events(ask_chat(chat)).await.unwrap();
    let starts = sandbox.llm.starts.lock().unwrap();
    let Some(llm_start::Input::Chat(chat)) = &starts[0].input else { panic!() };
    assert_eq!((chat.turns.len(), chat.system_message.as_deref()), (3, Some("be brief")));
}

/// The llm has the fast picture while the slow one is still being encoded.
#[tokio::test]
async fn embeddings_go_on_as_each_picture_is_ready() {
    let sandbox = Sandbox::start().await;
    sandbox.encoder.hold();
    let parts = vec![image([SLOW, b" one"].concat()), image("fast")];
    let stream = sandbox.client().generate(ask(parts)).await.unwrap().into_inner();
    let slots = || sandbox.llm.slots.lock().unwrap().iter().map(|(slot, _)| *slot).collect::<Vec<_>>();
    until("the fast picture is in its slot", || async { slots() == [1] }).await;
    assert_eq!(sandbox.encoder.running(), 1);
    sandbox.encoder.let_go();
    collect(stream).await.unwrap();
    assert_eq!(slots(), [1, 0]);
}

#[tokio::test]
async fn an_image_is_painted_from_regressed_embeddings_as_they_come() {
    let sandbox = Sandbox::start().await;
    sandbox.llm.hold();
    let request = paint(vec![text("a cat"), image("cat")], 1.0);
    let stream = sandbox.client().generate(request).await.unwrap().into_inner();
    let rows = || sandbox.decoder.positive.lock().unwrap().len();
    until("the decoder has the first row", || async { rows() == 1 }).await;
    sandbox.llm.let_go();
    let events = collect(stream).await.unwrap();
    let expected = [
        "accepted",
        "embedding 1/4",
        "embedding 2/4",
        "embedding 3/4",
        "embedding 4/4",
        "step 1/2",
        "step 2/2",
        "image 64x64",
        "finished",
    ];
    assert_eq!(words(&events), expected);
    let Event::Image(image) = &events[7] else { panic!() };
    assert_eq!(image.png, PNG);

    let positive = sandbox.decoder.positive.lock().unwrap();
    for (index, rows) in positive.iter().enumerate() {
        assert_eq!(rows.start, index as u32);
        assert_eq!(rows.embeddings, Some(tensor("l1", &[index as u8], 1)));
    }
    assert!(sandbox.decoder.negative.lock().unwrap().is_empty(), "no guidance, no negative");
    assert_eq!(sandbox.llm.calls(), 1);
    let finished = finished(&events);
    assert_eq!(finished.reason(), FinishReason::Image);
    assert_eq!(finished.usage.unwrap().regressed_embeddings, N_QUERY);
    assert_eq!(finished.timings.unwrap().vae_ms, 2.5);
    let Some(Parameters::Image(parameters)) = finished.parameters else { panic!() };
    assert_eq!(
        (parameters.height, parameters.steps, parameters.original_width),
        (Some(64), Some(2), Some(1024))
    );
}

#[tokio::test]
async fn the_negative_is_the_empty_prompts_and_is_regressed_once() {
    let sandbox = Sandbox::start().await;
    for prompt in ["a cat", "a dog"] {
        sandbox.events(paint(vec![text(prompt)], 3.0)).await.unwrap();
    }
    assert_eq!(sandbox.llm.calls(), 3, "two prompts and one negative");
    let starts = sandbox.llm.starts.lock().unwrap();
    let empty = |input: &Option<_>| matches!(input, Some(llm_start::Input::Prompt(prompt)) if prompt.parts.is_empty());
    assert_eq!(starts.iter().filter(|start| empty(&start.input)).count(), 1);
    let negative = sandbox.decoder.negative.lock().unwrap();
    let rows: Vec<u8> = (0..N_QUERY).flat_map(|row| tensor("l1", &[row as u8], 1).data.to_vec()).collect();
    for rows_sent in negative.iter() {
        assert_eq!(rows_sent.embeddings.as_ref().unwrap().data, rows);
        assert_eq!(rows_sent.embeddings.as_ref().unwrap().shape, [N_QUERY, 4]);
    }
    assert_eq!(negative.len(), 2);
}

#[tokio::test]
async fn one_image_alone_is_autoencoded_without_the_llm() {
    let sandbox = Sandbox::start().await;
    for cached in [0, 1] {
        let events = sandbox.events(paint(vec![image("cat")], 3.0)).await.unwrap();
        assert_eq!(words(&events), ["accepted", "step 1/2", "step 2/2", "image 64x64", "finished"]);
        assert_eq!(finished(&events).usage.unwrap().cached_images, cached);
    }
    assert_eq!(sandbox.llm.calls(), 0);
    assert_eq!(sandbox.encoder.calls(), 2, "the picture and the mean colour, once each");
    let positive = sandbox.decoder.positive.lock().unwrap();
    let negative = sandbox.decoder.negative.lock().unwrap();
    assert_eq!(positive[1].embeddings, Some(tensor("e1", b"cat", N_QUERY)));
    assert_eq!(negative[1].embeddings, Some(tensor("e1", b"", N_QUERY)));
    assert_eq!(sandbox.decoder.decodes.lock().unwrap()[0].queries, N_QUERY);
}

#[tokio::test]
async fn a_box_is_encoded_for_the_painter_and_told_to_the_reader() {
    let sandbox = Sandbox::start().await;
    sandbox.events(paint(vec![text("<grounding>"), region("a cat"), image("cat")], 1.0)).await.unwrap();
    let Some(emu2_proto::v1::part::Kind::Box(asked)) = region("a cat").kind else { panic!("a box") };
    let encoded = std::mem::take(&mut *sandbox.encoder.encoded.lock().unwrap());
    assert!(encoded.contains(&Source::Box(asked)));
    let slots = std::mem::take(&mut *sandbox.llm.slots.lock().unwrap());
    assert!(slots.contains(&(0, tensor("e1", b"a cat", N_QUERY))) && slots.len() == 2);

    sandbox.events(ask(vec![region("a cat")])).await.unwrap();
    assert!(sandbox.encoder.encoded.lock().unwrap().is_empty());
}

/// An ordinary client takes messages of 4 MB; the PNG of 2,048² pixels may have 12.
#[tokio::test]
async fn a_large_image_comes_in_chunks_that_any_client_can_take() {
    let sandbox = Sandbox::start().await;
    let png: Vec<u8> = (0..5_000_000_u32).map(|index| (index % 251) as u8).collect();
    *sandbox.decoder.png.lock().unwrap() = png.clone().into();
    let events = sandbox.events(paint(vec![text("a")], 1.0)).await.unwrap();
    let mut joined = Vec::new();
    for event in &events {
        if let Event::ImageChunk(chunk) = event {
            assert_eq!((chunk.offset, chunk.total), (joined.len() as u64, png.len() as u64));
            assert!(chunk.data.len() <= 1 << 20);
            joined.extend_from_slice(&chunk.data);
        }
    }
    assert_eq!(joined, png);
    let [.., Event::Image(image), Event::Finished(_)] = &events[..] else { panic!("{:?}", words(&events)) };
    assert!(image.png.is_empty() && (image.height, image.width) == (64, 64));
}

#[tokio::test]
async fn an_embedding_says_its_weights_and_whether_it_was_known() {
    let sandbox = Sandbox::start().await;
    let first = sandbox.embed(b"cat").await.unwrap();
    assert_eq!(first.embeddings, Some(tensor("e1", b"cat", N_QUERY)));
    assert_eq!((first.weights_digest.as_str(), first.cached), ("e1", false));
    let second = sandbox.embed(b"cat").await.unwrap();
    assert_eq!((second.embeddings, second.cached), (first.embeddings, true));
}

#[tokio::test]
async fn models_tell_what_they_can_do() {
    let sandbox = Sandbox::start().await;
    let models = sandbox.client().list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    let (painter, reader) = (&models[0], &models[1]);
    let everything = [Capability::Embed, Capability::Text, Capability::Chat, Capability::Image];
    assert_eq!(painter.capabilities().collect::<Vec<_>>(), everything);
    assert_eq!(reader.capabilities().collect::<Vec<_>>(), everything[..3]);
    let digests = |model: &emu2_proto::v1::Model| {
        [model.encoder_digest.clone(), model.llm_digest.clone(), model.decoder_digest.clone()]
    };
    assert_eq!(digests(painter), ["e1", "l1", "d1"]);
    assert_eq!(digests(reader), ["e1", "l1", ""]);
    let limits = painter.limits.unwrap();
    assert_eq!((limits.max_message_bytes, limits.max_images, limits.max_steps), (64 << 20, 256, 100));
    assert_eq!((limits.max_image_pixels, limits.max_image_side, limits.max_beams), (1 << 20, 128, 5));
    assert_eq!((limits.min_temperature, limits.max_repetition_penalty), (0.001, 10.0));
    assert_eq!((limits.max_text_bytes, limits.max_guidance_scale), (10_000, 100.0));
    assert_eq!((painter.default_height, painter.n_query, painter.v_query), (64, N_QUERY, 1));
    assert!(painter.ready && reader.ready);
    // As the stages that act on the parameters state them.
    let names = |model: &emu2_proto::v1::Model| {
        model.parameter_limits.iter().map(|limit| limit.field.clone()).collect::<Vec<_>>()
    };
    assert!(names(painter).contains(&"image.steps".to_owned()), "{:?}", names(painter));
    assert!(names(reader).iter().all(|field| field.starts_with("text.")), "{:?}", names(reader));
}

/// One id and one trace reach every stage, and so does what is left of the caller's time.
#[tokio::test]
async fn id_trace_and_budget_are_handed_down() {
    let sandbox = Sandbox::start().await;
    let mut request = tonic::Request::new(paint(vec![text("a cat"), image("cat")], 1.0));
    request.set_timeout(std::time::Duration::from_secs(60));
    request.metadata_mut().insert("x-request-id", "job-7".parse().unwrap());
    let trace = "0af7651916cd43dd8448eb211c80319c";
    request.metadata_mut().insert("traceparent", format!("00-{trace}-b7ad6b7169203331-01").parse().unwrap());
    let response = sandbox.client().generate(request).await.unwrap();
    let events = collect(response.into_inner()).await.unwrap();
    let Event::Accepted(accepted) = &events[0] else { panic!() };
    assert_eq!(accepted.request_id, "job-7");
    for (stage, seconds_max) in [(&sandbox.encoder, 300), (&sandbox.llm, 60), (&sandbox.decoder, 60)] {
        let metadata = stage.metadata.lock().unwrap().remove(0);
        let text = |key| metadata.get(key).unwrap().to_str().unwrap().to_owned();
        assert_eq!(text("x-request-id"), "job-7");
        assert!(text("traceparent").contains(trace));
        let budget = emu2_serve::deadline::Deadline::of_metadata(&metadata).remaining().unwrap().as_secs();
        assert!((seconds_max - 30..=seconds_max).contains(&budget), "{budget}");
    }
}
