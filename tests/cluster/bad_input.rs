//! Every bad request through gRPC: the right code, a message that names field, limit and value, and a cluster that
//! still answers after it.

use std::time::Duration;

use emu2_proto::{
    stage::{
        DecodeRequest, DecodeStart, EncodeRequest, LlmPart, LlmPrompt, LlmRequest, LlmStart,
        RegressedEmbeddings, RegressionParameters, SlotEmbeddings, decode_request, encode_request, llm_part,
        llm_request, llm_start,
    },
    v1::{self, generate_request::Input},
};
use tokio_stream::iter;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::support::{answer, ask, draw, fresh_png, golden_png, greedy, image, shared, text};

/// A refusal must have this code and its message or violations must hold all of these words.
#[track_caller]
fn assert_refused(name: &str, status: &Status, code: Code, words: &[&str]) {
    assert_eq!(status.code(), code, "{name}: {status}");
    let violations =
        status.get_details_bad_request().map(|request| request.field_violations).unwrap_or_default();
    if code == Code::InvalidArgument {
        assert!(!violations.is_empty(), "{name}: no field violation in {status:?}");
    }
    let said: Vec<_> = violations.iter().map(|v| format!("{} {}", v.field, v.description)).collect();
    let said = format!("{} {}", status.message(), said.join(" "));
    for word in words {
        assert!(said.contains(word), "{name}: `{word}` not in: {said}");
    }
}

async fn assert_healthy() {
    let mut client = shared().client().await;
    let text = answer(&mut client, ask("emu2", vec![text("There are two dogs.")], greedy(2))).await;
    text.expect("the cluster answers after a bad request");
}

async fn refusal(request: v1::GenerateRequest) -> Status {
    let mut client = shared().client().await;
    match answer(&mut client, request).await {
        Err(status) => status,
        Ok(text) => panic!("was answered: {text:?}"),
    }
}

#[tokio::test]
async fn pictures_that_cannot_be_read() {
    let whole_jpeg = include_bytes!("../fixtures/images/rgb420.jpg");
    for (name, bytes, words) in [
        ("not an image", b"GIF? no, just words".to_vec(), &["parts[0].image", "PNG", "JPEG"][..]),
        ("empty", vec![], &["parts[0].image"]),
        ("truncated JPEG", whole_jpeg[..whole_jpeg.len() / 2].to_vec(), &["parts[0].image"]),
        (
            "60,000 × 60,000",
            include_bytes!("../fixtures/images/huge_header.png").to_vec(),
            &["parts[0].image", "60000"],
        ),
        ("animated", include_bytes!("../fixtures/images/animated.gif").to_vec(), &["frames", "video"]),
    ] {
        let status = refusal(ask("emu2", vec![image(bytes), text("What is this?")], greedy(4))).await;
        assert_refused(name, &status, Code::InvalidArgument, words);
    }
    assert_healthy().await;
}

#[tokio::test]
async fn prompts_that_no_model_could_read() {
    let many = (0..500).map(|_| image(fresh_png(2))).collect();
    let long = vec![text(&"word ".repeat(4_000))];
    let placeholder = vec![text("look: <image>")];
    let boxed = |left, right| {
        let region = v1::Box { left, top: 0.0, right, bottom: 1.0, phrase: "a dog".to_owned() };
        vec![v1::Part { kind: Some(v1::part::Kind::Box(region)) }]
    };
    let new_tokens = v1::TextOutput { max_new_tokens: Some(2_048), num_beams: Some(1), ..Default::default() };
    for (name, request, words) in [
        ("no parts", ask("emu2", vec![], greedy(1)), &["prompt.parts"][..]),
        ("no input", v1::GenerateRequest { input: None, ..ask("emu2", vec![], greedy(1)) }, &["prompt"]),
        (
            "no output",
            v1::GenerateRequest { output: None, ..ask("emu2", vec![text("x")], greedy(1)) },
            &["output"],
        ),
        ("empty part", ask("emu2", vec![v1::Part { kind: None }], greedy(1)), &["parts[0]"]),
        ("500 images", ask("emu2", many, greedy(1)), &["images", "500"]),
        ("too long", ask("emu2", long, greedy(64)), &["2048", "64"]),
        ("too much wanted", ask("emu2", vec![text("x")], new_tokens), &["2048"]),
        ("placeholder", ask("emu2", placeholder, greedy(1)), &["parts[0].text", "<image>"]),
        ("box to the left", ask("emu2", boxed(0.5, 0.25), greedy(1)), &["parts[0].box", "0.5"]),
        ("box of NaN", ask("emu2", boxed(f32::NAN, 0.25), greedy(1)), &["parts[0].box", "NaN"]),
        ("chat without template", chat_with("emu2", vec![v1::Role::User]), &["chat"]),
        ("assistant first", chat_with("emu2-chat", vec![v1::Role::Assistant]), &["turns[0].role"]),
        (
            "assistant last",
            chat_with("emu2-chat", vec![v1::Role::User, v1::Role::Assistant]),
            &["chat.turns"],
        ),
        (
            "painting without decoder",
            v1::GenerateRequest {
                model: "emu2".to_owned(),
                ..draw(vec![text("x")], v1::ImageOutput::default())
            },
            &["image", "decoder"],
        ),
    ] {
        assert_refused(name, &refusal(request).await, Code::InvalidArgument, words);
    }
    let unknown = refusal(ask("emu3", vec![text("x")], greedy(1))).await;
    assert_refused("unknown model", &unknown, Code::NotFound, &["emu3"]);
    assert_healthy().await;
}

/// The 2,048 positions: prompt, wanted output and limit are all three named.
#[tokio::test]
async fn a_prompt_that_leaves_no_room_says_all_three_counts() {
    // A start token, 99 words of one token each after it, or about that: the exact count is the service's to say.
    let status = refusal(ask("emu2", vec![text(&"dog ".repeat(1_000))], greedy(1_000))).await;
    assert_refused("no room", &status, Code::InvalidArgument, &["1000", "2048"]);
    let said = status.message().to_owned() + &format!("{:?}", status.get_details_bad_request());
    let counts: std::collections::BTreeSet<u32> = said
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .filter(|count| *count > 900)
        .collect();
    assert!(counts.len() >= 3, "prompt, requested and limit are named in: {said}");
}

fn chat_with(model: &str, roles: Vec<v1::Role>) -> v1::GenerateRequest {
    let turns = roles.into_iter().map(|role| v1::Turn { role: role.into(), parts: vec![text("hello")] });
    let chat = v1::Chat { turns: turns.collect(), system_message: None };
    v1::GenerateRequest { input: Some(Input::Chat(chat)), ..ask(model, vec![], greedy(1)) }
}

#[tokio::test]
async fn parameters_out_of_range() {
    let d = v1::ImageOutput::default;
    for (name, output, words) in [
        ("steps 0", v1::ImageOutput { steps: Some(0), ..d() }, &["image.steps", "0"][..]),
        ("steps 10,000", v1::ImageOutput { steps: Some(10_000), ..d() }, &["image.steps", "10000"]),
        (
            "guidance NaN",
            v1::ImageOutput { guidance_scale: Some(f32::NAN), ..d() },
            &["image.guidance_scale", "NaN"],
        ),
        (
            "guidance -1",
            v1::ImageOutput { guidance_scale: Some(-1.0), ..d() },
            &["image.guidance_scale", "-1"],
        ),
        ("odd height", v1::ImageOutput { height: Some(100), ..d() }, &["image.height", "8", "100"]),
        ("width 0", v1::ImageOutput { width: Some(0), ..d() }, &["image.width", "0"]),
        ("huge width", v1::ImageOutput { width: Some(80_000), ..d() }, &["image.width", "80000"]),
    ] {
        let status = refusal(draw(vec![text("a dog")], output)).await;
        assert_refused(name, &status, Code::InvalidArgument, words);
    }
    let d = v1::TextOutput::default;
    for (name, output, words) in [
        ("no tokens", v1::TextOutput { max_new_tokens: Some(0), ..d() }, &["text.max_new_tokens", "0"][..]),
        ("1,000 beams", v1::TextOutput { num_beams: Some(1_000), ..d() }, &["text.num_beams", "1000"]),
        ("no beams", v1::TextOutput { num_beams: Some(0), ..d() }, &["text.num_beams", "0"]),
        ("cold", v1::TextOutput { do_sample: true, temperature: Some(0.0), ..d() }, &["text.temperature"]),
        ("top_p 2", v1::TextOutput { do_sample: true, top_p: Some(2.0), ..d() }, &["text.top_p", "2"]),
        (
            "penalty NaN",
            v1::TextOutput { repetition_penalty: Some(f32::NAN), ..d() },
            &["text.repetition_penalty"],
        ),
        (
            "length penalty",
            v1::TextOutput { length_penalty: Some(f32::INFINITY), ..d() },
            &["text.length_penalty"],
        ),
        (
            "sampled beams",
            v1::TextOutput { do_sample: true, num_beams: Some(4), ..d() },
            &["text.num_beams", "4"],
        ),
    ] {
        let status = refusal(ask("emu2", vec![text("x")], output)).await;
        assert_refused(name, &status, Code::InvalidArgument, words);
    }
    // All mistakes at once.
    let both = v1::ImageOutput { steps: Some(0), height: Some(3), ..Default::default() };
    let status = refusal(draw(vec![text("a dog")], both)).await;
    assert_refused("both", &status, Code::InvalidArgument, &["image.steps", "image.height"]);
    assert_healthy().await;
}

#[tokio::test]
async fn a_message_over_the_limit_names_the_limit() {
    let mut client = shared().client().await;
    let request = ask("emu2", vec![image(vec![0_u8; 65 << 20])], greedy(1));
    let status = client.generate(request).await.unwrap_err();
    let limit = (64 << 20).to_string();
    assert_refused("65 MiB", &status, Code::ResourceExhausted, &[&limit]);
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!(models[0].limits.as_ref().unwrap().max_message_bytes, 64 << 20);
}

fn f32s(shape: &[u32], values: &[f32]) -> Option<v1::Tensor> {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Some(v1::Tensor { dtype: v1::Dtype::F32.into(), shape: shape.to_vec(), data: data.into() })
}

fn bad_tensors(rows: u32, width: u32) -> Vec<(&'static str, Option<v1::Tensor>)> {
    let count = (rows * width) as usize;
    let mut nan = vec![0.0; count];
    nan[3] = f32::NAN;
    let good = f32s(&[rows, width], &vec![0.5; count]).unwrap();
    vec![
        ("missing", None),
        ("dtype", Some(v1::Tensor { dtype: 7, ..good.clone() })),
        (
            "wrong dtype",
            Some(v1::Tensor {
                dtype: v1::Dtype::Bf16.into(),
                data: vec![0; count * 2].into(),
                ..good.clone()
            }),
        ),
        ("shape", f32s(&[width, rows + 1], &vec![0.5; (width * (rows + 1)) as usize])),
        ("length", Some(v1::Tensor { data: vec![0; 5].into(), ..good })),
        ("NaN", f32s(&[rows, width], &nan)),
    ]
}

/// The stages check what the router sends as strictly as the router checks clients.
#[tokio::test]
async fn tensors_that_are_not_what_they_say() {
    for (name, embeddings) in bad_tensors(16, 64) {
        let status = regress_with(embeddings).await;
        assert_refused(&format!("llm {name}"), &status, Code::InvalidArgument, &["embeddings"]);
    }
    for (name, latents) in bad_tensors(4 * 8, 8).into_iter().skip(1) {
        let start = DecodeStart { initial_latents: latents, ..decode_start() };
        let status = decode_with(vec![decode_request::Message::Start(start)]).await;
        assert_refused(&format!("latents {name}"), &status, Code::InvalidArgument, &["initial_latents"]);
    }
    for (name, embeddings) in bad_tensors(16, 64) {
        let positive = RegressedEmbeddings { start: 0, embeddings };
        let start = decode_request::Message::Start(decode_start());
        let status = decode_with(vec![start, decode_request::Message::Positive(positive)]).await;
        assert_refused(&format!("decoder {name}"), &status, Code::InvalidArgument, &["positive"]);
    }
    assert_healthy().await;
}

async fn regress_with(embeddings: Option<v1::Tensor>) -> Status {
    let part = LlmPart { kind: Some(llm_part::Kind::Image(Default::default())) };
    let start = LlmStart {
        input: Some(llm_start::Input::Prompt(LlmPrompt { parts: vec![part] })),
        output: Some(llm_start::Output::Regression(RegressionParameters {})),
    };
    let slot = SlotEmbeddings { slot: 0, embeddings };
    let messages = [llm_request::Message::Start(start), llm_request::Message::Embeddings(slot)];
    let requests = messages.map(|message| LlmRequest { message: Some(message) });
    let mut events = match shared().llm("emu2-gen").await.generate(iter(requests)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    loop {
        match events.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("was answered"),
            Err(status) => return status,
        }
    }
}

fn decode_start() -> DecodeStart {
    DecodeStart {
        height: 64,
        width: 64,
        steps: 2,
        guidance_scale: 1.0,
        original_height: 1024,
        original_width: 1024,
        queries: 16,
        ..Default::default()
    }
}

async fn decode_with(messages: Vec<decode_request::Message>) -> Status {
    let requests = messages.into_iter().map(|message| DecodeRequest { message: Some(message) });
    let mut events = match shared().decoder("emu2-gen").await.decode(iter(requests)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    loop {
        match events.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("was answered"),
            Err(status) => return status,
        }
    }
}

#[tokio::test]
async fn stage_calls_that_make_no_sense() {
    let no_rows = decode_with(vec![decode_request::Message::Start(decode_start())]).await;
    assert_refused("no rows", &no_rows, Code::InvalidArgument, &["positive", "16"]);
    let no_start = decode_with(vec![decode_request::Message::Positive(RegressedEmbeddings::default())]).await;
    assert_refused("no start", &no_start, Code::InvalidArgument, &["start"]);
    let steps = DecodeStart { steps: 10_000, ..decode_start() };
    let steps = decode_with(vec![decode_request::Message::Start(steps)]).await;
    assert_refused("steps", &steps, Code::InvalidArgument, &["steps", "10000"]);
    let queries = |n_query| EncodeRequest {
        id: 0,
        source: Some(encode_request::Source::Image(golden_png(0).into())),
        n_query,
    };
    for n_query in [0, 1_000_000] {
        let mut encoder = shared().encoder("emu2").await;
        let status = match encoder.encode(iter([queries(n_query)])).await {
            Ok(response) => response.into_inner().message().await.unwrap_err(),
            Err(status) => status,
        };
        assert_refused("n_query", &status, Code::InvalidArgument, &["n_query", &n_query.to_string()]);
    }
    tokio::time::timeout(Duration::from_secs(30), assert_healthy()).await.expect("answers in time");
}
