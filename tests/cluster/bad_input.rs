//! Every bad request through gRPC: the right code, a violation that names field, limit and value, and a cluster that
//! still answers after each of them.

use emu2_proto::{
    stage::{
        DecodeRequest, DecodeStart, EncodeRequest, LlmPart, LlmPrompt, LlmRequest, LlmStart,
        RegressedEmbeddings, RegressionParameters, SlotEmbeddings, decode_request, encode_request, llm_part,
        llm_request, llm_start,
    },
    v1::{self, generate_request::Input},
};
use tokio_stream::iter;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use crate::support::{
    answer, ask, draw, events, finished, fresh_png, golden_png, greedy, image, shared, text,
};

/// The field that must be named, and the words (limit and value) that its description must hold.
type Expected<'a> = (&'a str, &'a [&'a str]);

/// INVALID_ARGUMENT with a violation of that very field, its limit and value as words of their own; and the cluster
/// answers the next request.
async fn assert_invalid(name: &str, status: Status, (field, words): Expected<'_>) {
    assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status}");
    let details = status.get_details_bad_request().unwrap_or_else(|| panic!("{name}: no details: {status}"));
    let named = details.field_violations.iter().find(|violation| violation.field == field);
    let named = named.unwrap_or_else(|| panic!("{name}: `{field}` is not in {details:?}"));
    let said: Vec<_> = named.description.split([' ', ',', '[', ']', '(', ')', ':']).collect();
    for word in words {
        assert!(said.contains(word), "{name}: `{word}` is no word of: {field} {}", named.description);
    }
    assert!(!status.message().is_empty(), "{name}");
    assert_healthy(name).await;
}

async fn assert_healthy(after: &str) {
    let mut client = shared().client().await;
    let text = answer(&mut client, ask("emu2", vec![text("There are two dogs.")], greedy(2))).await;
    text.unwrap_or_else(|status| panic!("no answer after {after}: {status}"));
}

async fn refusal(name: &str, request: v1::GenerateRequest) -> Status {
    let mut client = shared().client().await;
    match answer(&mut client, request).await {
        Err(status) => status,
        Ok(text) => panic!("{name} was answered: {text:?}"),
    }
}

async fn assert_each_refused(requests: Vec<(&str, v1::GenerateRequest, Expected<'_>)>) {
    for (name, request, expected) in requests {
        assert_invalid(name, refusal(name, request).await, expected).await;
    }
}

#[tokio::test]
async fn images_that_cannot_be_read() {
    let whole_jpeg = include_bytes!("../fixtures/images/rgb420.jpg");
    let half_jpeg = whole_jpeg[..whole_jpeg.len() / 2].to_vec();
    let huge = include_bytes!("../fixtures/images/huge_header.png").to_vec();
    let animated = include_bytes!("../fixtures/images/animated.gif").to_vec();
    let about = |bytes| ask("emu2", vec![text("Look:"), image(bytes), text("What is this?")], greedy(4));
    let field = "prompt.parts[1].image";
    assert_each_refused(vec![
        ("not an image", about(b"GIF? no, just words".to_vec()), (field, &["PNG", "JPEG", "19", "bytes"])),
        ("empty", about(vec![]), (field, &["0", "bytes"])),
        ("truncated JPEG", about(half_jpeg), (field, &["JPEG", "truncated"])),
        ("60,000 × 60,000", about(huge), (field, &["67108864", "60000", "3600000000"])),
        ("animated", about(animated), (field, &["animated", "frames", "video"])),
    ])
    .await;
    // The other call that takes an image says the same of its own field.
    let embed = v1::EmbedRequest {
        model: "emu2".to_owned(),
        image: Some(v1::Image { data: b"words".to_vec().into() }),
        ..Default::default()
    };
    let status = shared().client().await.embed(embed).await.unwrap_err();
    assert_invalid("Embed of words", status, ("image", &["PNG", "5"])).await;
}

#[tokio::test]
async fn prompts_that_are_not_well_formed() {
    let many = (0..500).map(|_| image(fresh_png(2))).collect();
    let placeholder = vec![text("look: <image>")];
    let boxed = |left, right| {
        let region = v1::Box { left, top: 0.0, right, bottom: 1.0, phrase: "a dog".to_owned() };
        vec![v1::Part { kind: Some(v1::part::Kind::Box(region)) }]
    };
    let base = |parts| ask("emu2", parts, greedy(1));
    let no_output = v1::GenerateRequest { output: None, ..base(vec![text("x")]) };
    let no_frames = vec![v1::Part { kind: Some(v1::part::Kind::Video(v1::Video::default())) }];
    assert_each_refused(vec![
        ("no parts", base(vec![]), ("prompt.parts", &["1", "0"])),
        ("no input", v1::GenerateRequest { input: None, ..base(vec![]) }, ("input", &["prompt", "chat"])),
        ("no output", no_output, ("output", &["text", "image"])),
        ("empty part", base(vec![v1::Part { kind: None }]), ("prompt.parts[0]", &["text", "image", "none"])),
        ("no frames", base(no_frames), ("prompt.parts[0].video.frames", &["1", "0"])),
        ("500 images", base(many), ("prompt.parts.image", &["256", "limits.max_images", "500"])),
        ("placeholder", base(placeholder), ("prompt.parts[0].text", &["<image>"])),
        ("box to the left", base(boxed(0.5, 0.25)), ("prompt.parts[0].box.left", &["0.5", "0.25"])),
        ("box of NaN", base(boxed(f32::NAN, 0.25)), ("prompt.parts[0].box.left", &["NaN", "0.25"])),
    ])
    .await;
}

#[tokio::test]
async fn what_the_model_cannot_do() {
    let painting =
        v1::GenerateRequest { model: "emu2".to_owned(), ..draw(vec![text("x")], v1::ImageOutput::default()) };
    let chat = chat_with("emu2", vec![v1::Role::User]);
    let assistant_first = chat_with("emu2-chat", vec![v1::Role::Assistant]);
    let assistant_last = chat_with("emu2-chat", vec![v1::Role::User, v1::Role::Assistant]);
    let grounding = v1::TextOutput { grounding: true, ..greedy(1) };
    assert_each_refused(vec![
        ("chat without template", chat, ("chat", &["template", "prompt"])),
        (
            "grounding without template",
            ask("emu2", vec![text("x")], grounding),
            ("text.grounding", &["template"]),
        ),
        ("assistant first", assistant_first, ("chat.turns[0].role", &["ROLE_USER", "ROLE_ASSISTANT"])),
        ("assistant last", assistant_last, ("chat.turns", &["odd", "2"])),
        ("painting without decoder", painting, ("image", &["decoder"])),
    ])
    .await;
    let unknown = refusal("unknown model", ask("emu3", vec![text("x")], greedy(1))).await;
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let resource = unknown.get_details_resource_info().expect("says which resource");
    assert_eq!((resource.resource_type.as_str(), resource.resource_name.as_str()), ("model", "emu3"));
    assert_healthy("unknown model").await;
}

/// Positions of a prompt of that many dogs, as the service counts them.
async fn positions(dogs: usize) -> u32 {
    let mut client = shared().client().await;
    let request = ask("emu2", vec![text(&"dog ".repeat(dogs))], greedy(1));
    finished(&events(&mut client, request).await.unwrap()).usage.unwrap().prompt_tokens
}

/// The 2,048 positions: prompt, wanted output and limit are all three named.
#[tokio::test]
async fn a_prompt_that_leaves_no_room_says_all_three_counts() {
    let (few, more) = (positions(100).await, positions(150).await);
    let prompt = (more + 13 * (more - few)).to_string();
    let tokens = |count| v1::TextOutput { max_new_tokens: Some(count), ..greedy(1) };
    let dogs = || vec![text(&"dog ".repeat(800))];
    let field = "prompt";
    assert_each_refused(vec![
        ("prompt and output", ask("emu2", dogs(), tokens(1_000)), (field, &["2048", "1000", &prompt])),
        (
            "output alone",
            ask("emu2", vec![text("x")], tokens(2_048)),
            ("text.max_new_tokens", &["1024", "2048"]),
        ),
        (
            "prompt alone",
            ask("emu2", vec![text(&"dog ".repeat(4_000))], tokens(64)),
            (field, &["2048", "64"]),
        ),
    ])
    .await;
}

fn chat_with(model: &str, roles: Vec<v1::Role>) -> v1::GenerateRequest {
    let turns = roles.into_iter().map(|role| v1::Turn { role: role.into(), parts: vec![text("hello")] });
    let chat = v1::Chat { turns: turns.collect(), system_message: None };
    v1::GenerateRequest { input: Some(Input::Chat(chat)), ..ask(model, vec![], greedy(1)) }
}

#[tokio::test]
async fn image_parameters_out_of_range() {
    let d = v1::ImageOutput::default;
    let a_dog = |output| draw(vec![text("a dog")], output);
    let guidance = |scale| a_dog(v1::ImageOutput { guidance_scale: Some(scale), ..d() });
    let (steps, scale) = ("image.steps", "image.guidance_scale");
    assert_each_refused(vec![
        ("steps 0", a_dog(v1::ImageOutput { steps: Some(0), ..d() }), (steps, &["1", "250", "0"])),
        ("steps 10,000", a_dog(v1::ImageOutput { steps: Some(10_000), ..d() }), (steps, &["250", "10000"])),
        ("guidance NaN", guidance(f32::NAN), (scale, &["0", "100", "NaN"])),
        ("guidance -1", guidance(-1.0), (scale, &["0", "100", "-1"])),
        ("guidance infinite", guidance(f32::INFINITY), (scale, &["0", "100", "inf"])),
        (
            "odd height",
            a_dog(v1::ImageOutput { height: Some(100), ..d() }),
            ("image.height", &["multiple", "8", "100"]),
        ),
        ("width 0", a_dog(v1::ImageOutput { width: Some(0), ..d() }), ("image.width", &["8", "2048", "0"])),
        (
            "huge width",
            a_dog(v1::ImageOutput { width: Some(80_000), ..d() }),
            ("image.width", &["2048", "80000"]),
        ),
    ])
    .await;
    // All mistakes at once.
    let both = || a_dog(v1::ImageOutput { steps: Some(0), height: Some(3), ..d() });
    assert_invalid("both", refusal("both", both()).await, (steps, &["0"])).await;
    assert_invalid("both", refusal("both", both()).await, ("image.height", &["3"])).await;
}

#[tokio::test]
async fn text_parameters_out_of_range() {
    let d = v1::TextOutput::default;
    let x = |output| ask("emu2", vec![text("x")], output);
    let beams = |count| x(v1::TextOutput { num_beams: Some(count), ..d() });
    let sampled = |output| x(v1::TextOutput { do_sample: true, ..output });
    let tokens = x(v1::TextOutput { max_new_tokens: Some(0), ..d() });
    let min_length = x(v1::TextOutput { min_length: Some(99), ..greedy(2) });
    let penalty = x(v1::TextOutput { repetition_penalty: Some(f32::NAN), ..d() });
    let length_penalty = x(v1::TextOutput { length_penalty: Some(f32::INFINITY), ..d() });
    let (cold, wide) =
        (v1::TextOutput { temperature: Some(0.0), ..d() }, v1::TextOutput { top_p: Some(2.0), ..d() });
    let none_of = v1::TextOutput { top_k: Some(0), ..d() };
    let sampled_beams = v1::TextOutput { num_beams: Some(4), ..d() };
    assert_each_refused(vec![
        ("no tokens", tokens, ("text.max_new_tokens", &["1", "0"])),
        ("long minimum", min_length, ("text.min_length", &["3", "99"])),
        ("1,000 beams", beams(1_000), ("text.num_beams", &["1", "1000"])),
        ("no beams", beams(0), ("text.num_beams", &["1", "0"])),
        ("sampled beams", sampled(sampled_beams), ("text.num_beams", &["1", "4"])),
        ("cold", sampled(cold), ("text.temperature", &["100", "0"])),
        ("top_p 2", sampled(wide), ("text.top_p", &["1", "2"])),
        ("top_k 0", sampled(none_of), ("text.top_k", &["1", "0"])),
        ("penalty NaN", penalty, ("text.repetition_penalty", &["10", "NaN"])),
        ("length penalty", length_penalty, ("text.length_penalty", &["-10", "10", "inf"])),
    ])
    .await;
}

#[tokio::test]
async fn a_message_over_the_limit_names_the_limit() {
    let mut client = shared().client().await;
    let request = ask("emu2", vec![image(vec![0_u8; 65 << 20])], greedy(1));
    let status = client.generate(request).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    let (limit, value) = ((64 << 20).to_string(), (65_u64 << 20).to_string());
    assert!(
        status.message().contains(&limit) && status.message().contains("server.max_message_bytes"),
        "{status}"
    );
    // The message is the image and some framing.
    assert!(status.message().contains(&value[..5]), "{status}");
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!(models[0].limits.as_ref().unwrap().max_message_bytes, 64 << 20);
    assert_healthy("65 MiB").await;
}

/// Float32 of that shape, all 0.5.
fn halves(shape: &[u32]) -> v1::Tensor {
    let count = shape.iter().product::<u32>() as usize;
    v1::Tensor {
        dtype: v1::Dtype::F32.into(),
        shape: shape.to_vec(),
        data: 0.5_f32.to_le_bytes().repeat(count).into(),
    }
}

/// A tensor of that shape with one thing wrong with it, and the words that must be said of it.
fn broken(shape: &[u32]) -> Vec<(&'static str, v1::Tensor, Vec<String>)> {
    let good = halves(shape);
    let (bytes, sides) = (good.data.len(), shape.iter().map(u32::to_string).collect::<Vec<_>>());
    let mut nan = good.data.to_vec();
    nan[12..16].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut wide = shape.to_vec();
    *wide.last_mut().unwrap() += 1;
    let mut vast = shape.to_vec();
    vast[0] = 70_000;
    let short = good.data.slice(..bytes - 4);
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    vec![
        ("dtype", v1::Tensor { dtype: 7, ..good.clone() }, words(&["DTYPE_F32", "DTYPE_BF16", "7"])),
        ("shape", halves(&wide), [sides, words(&[&wide.last().unwrap().to_string()])].concat()),
        ("side", v1::Tensor { shape: vast, ..good.clone() }, words(&["65536", "70000"])),
        (
            "length",
            v1::Tensor { data: short, ..good.clone() },
            words(&[&bytes.to_string(), &(bytes - 4).to_string()]),
        ),
        ("NaN", v1::Tensor { data: nan.into(), ..good }, words(&["finite", "NaN", "3"])),
    ]
}

/// bfloat16 of that shape, for a stage that computes in float32.
fn narrow(shape: &[u32]) -> v1::Tensor {
    let count = shape.iter().product::<u32>() as usize;
    v1::Tensor { dtype: v1::Dtype::Bf16.into(), data: vec![0; count * 2].into(), ..halves(shape) }
}

async fn assert_tensor_refused(stage: &str, name: &str, status: Status, field: &str, words: &[String]) {
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    assert_invalid(&format!("{stage}: {name}"), status, (field, &words)).await;
}

/// What the embeddings of 16 queries can get wrong beside [`broken`].
fn broken_embeddings() -> Vec<(&'static str, Option<v1::Tensor>, Vec<String>)> {
    let more = [
        ("missing", None, vec!["missing".to_owned()]),
        ("narrow", Some(narrow(&[16, 64])), vec!["float32".to_owned(), "bfloat16".to_owned()]),
    ];
    let broken = broken(&[16, 64]).into_iter().map(|(name, tensor, words)| (name, Some(tensor), words));
    broken.chain(more).collect()
}

/// The stages check what the router sends as strictly as the router checks clients.
#[tokio::test]
async fn the_llm_refuses_broken_embeddings() {
    for (name, embeddings, words) in broken_embeddings() {
        let status = regress_with(0, embeddings).await;
        assert_tensor_refused("llm", name, status, "embeddings[slot 0]", &words).await;
    }
    let no_slot = regress_with(1, Some(halves(&[16, 64]))).await;
    assert_invalid("no such slot", no_slot, ("embeddings.slot", &["1"])).await;
}

#[tokio::test]
async fn the_decoder_refuses_broken_latents_and_takes_whole_ones() {
    let shape = [4, 8, 8];
    for (name, latents, words) in broken(&shape) {
        let status = decode_with(vec![started(1.0, Some(latents))]).await.unwrap_err();
        assert_tensor_refused("latents", name, status, "start.initial_latents", &words).await;
    }
    // Both dtypes hold noise well enough.
    for latents in [halves(&shape), narrow(&shape)] {
        let rows = rows(Some(halves(&[16, 64])));
        let messages = vec![started(1.0, Some(latents)), decode_request::Message::Positive(rows)];
        decode_with(messages).await.unwrap();
    }
}

#[tokio::test]
async fn the_decoder_refuses_broken_embeddings_on_both_sides() {
    for (name, embeddings, words) in broken_embeddings() {
        let positive = decode_request::Message::Positive(rows(embeddings.clone()));
        let status = decode_with(vec![started(1.0, None), positive]).await.unwrap_err();
        assert_tensor_refused("positive", name, status, "positive.embeddings", &words).await;
        let whole = decode_request::Message::Positive(rows(Some(halves(&[16, 64]))));
        let negative = decode_request::Message::Negative(rows(embeddings));
        let status = decode_with(vec![started(3.0, None), whole, negative]).await.unwrap_err();
        assert_tensor_refused("negative", name, status, "negative.embeddings", &words).await;
    }
}

async fn regress_with(slot: u32, embeddings: Option<v1::Tensor>) -> Status {
    let part = LlmPart { kind: Some(llm_part::Kind::Image(Default::default())) };
    let start = LlmStart {
        input: Some(llm_start::Input::Prompt(LlmPrompt { parts: vec![part] })),
        output: Some(llm_start::Output::Regression(RegressionParameters {})),
        resume: None,
        seed: 0,
    };
    let slot = SlotEmbeddings { slot, embeddings };
    let messages = [llm_request::Message::Start(start), llm_request::Message::Embeddings(slot)];
    let requests = messages.map(|message| LlmRequest { message: Some(message) });
    match shared().llm("emu2-gen").await.generate(iter(requests)).await {
        Ok(response) => to_its_end(response.into_inner()).await.unwrap_err(),
        Err(status) => status,
    }
}

fn decode_start(image: v1::ImageOutput) -> DecodeStart {
    let image = v1::ImageOutput { height: Some(64), width: Some(64), ..image };
    DecodeStart { image: Some(image), queries: 16, ..Default::default() }
}

fn started(guidance_scale: f32, initial_latents: Option<v1::Tensor>) -> decode_request::Message {
    let image =
        v1::ImageOutput { steps: Some(2), guidance_scale: Some(guidance_scale), ..Default::default() };
    decode_request::Message::Start(DecodeStart { initial_latents, ..decode_start(image) })
}

fn rows(embeddings: Option<v1::Tensor>) -> RegressedEmbeddings {
    RegressedEmbeddings { start: 0, embeddings }
}

async fn decode_with(messages: Vec<decode_request::Message>) -> Result<(), Status> {
    let requests = messages.into_iter().map(|message| DecodeRequest { message: Some(message) });
    let events = shared().decoder("emu2-gen").await.decode(iter(requests)).await?;
    to_its_end(events.into_inner()).await
}

async fn to_its_end<T>(mut events: Streaming<T>) -> Result<(), Status> {
    while events.message().await?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn stage_calls_that_make_no_sense() {
    let no_rows = decode_with(vec![started(1.0, None)]).await.unwrap_err();
    assert_invalid("no rows", no_rows, ("positive", &["16", "0"])).await;
    let no_start = decode_with(vec![decode_request::Message::Positive(rows(None))]).await.unwrap_err();
    assert_invalid("no start", no_start, ("start", &["first", "positive"])).await;
    let unwanted = vec![started(1.0, None), decode_request::Message::Negative(rows(Some(halves(&[16, 64]))))];
    let unwanted = decode_with(unwanted).await.unwrap_err();
    assert_invalid("negative without guidance", unwanted, ("negative", &["guidance_scale", "1"])).await;
    let steps = decode_start(v1::ImageOutput { steps: Some(10_000), ..Default::default() });
    let steps = decode_with(vec![decode_request::Message::Start(steps)]).await.unwrap_err();
    assert_invalid("steps", steps, ("image.steps", &["1", "250", "10000"])).await;
    for n_query in [0, 1_000_000] {
        let source = Some(encode_request::Source::Image(golden_png(0).into()));
        let request = EncodeRequest { source, n_query };
        let status = match shared().encoder("emu2").await.encode(iter([request])).await {
            Ok(response) => to_its_end(response.into_inner()).await.unwrap_err(),
            Err(status) => status,
        };
        assert_invalid("n_query", status, ("n_query", &["1", &n_query.to_string()])).await;
    }
}
