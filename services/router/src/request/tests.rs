//! Defaults are upstream's, and every mistake names its field, the limit and the value.

use std::sync::Arc;

use emu2_proto::{
    capable,
    stage::{DecoderInfo, EncoderInfo, LlmInfo},
    v1::{Chat, Image, ParameterLimit, Prompt, Role, Turn, Video},
};

use super::*;

fn profile() -> Profile {
    let llm = LlmInfo {
        n_query: 64,
        v_query: 16,
        instruct: true,
        max_text_bytes: 1000,
        parameter_limits: capable::with_limits(
            capable::llm().parameter_limits,
            &[
                ParameterLimit::new("text.num_beams", 1..=8, Some(5)),
                ParameterLimit::new("text.temperature", 0.001_f32..=50.0, Some(1.0)),
                ParameterLimit::new("text.repetition_penalty", 0.1_f32..=5.0, Some(1.0)),
            ],
        ),
        ..Default::default()
    };
    let decoder = DecoderInfo {
        parameter_limits: capable::with_limits(
            capable::decoder().parameter_limits,
            &[
                ParameterLimit::new("image.width", 8..=2048, Some(768)).multiple_of(8),
                ParameterLimit::new("image.steps", 1..=1000, Some(50)),
                ParameterLimit::new("image.guidance_scale", 0.0..=20.0, Some(3.0)),
            ],
        ),
        ..Default::default()
    };
    Profile {
        encoder: Arc::new(EncoderInfo { grid_side: 32, ..Default::default() }),
        llm: Arc::new(llm),
        decoder: Some(Arc::new(decoder)),
    }
}

/// Neither a chat template nor a decoder.
fn plain_profile() -> Profile {
    let llm = LlmInfo { instruct: false, ..(*profile().llm).clone() };
    Profile { llm: Arc::new(llm), decoder: None, ..profile() }
}

fn text(text: &str) -> v1::Part {
    v1::Part { kind: Some(part::Kind::Text(text.into())) }
}

fn image(data: &'static [u8]) -> v1::Part {
    v1::Part { kind: Some(part::Kind::Image(Image { data: data.into() })) }
}

fn video(frames: &[&'static [u8]]) -> v1::Part {
    let frames = frames.iter().map(|&frame| frame.into()).collect();
    v1::Part { kind: Some(part::Kind::Video(Video { frames })) }
}

fn region(left: f32, top: f32, right: f32, bottom: f32) -> v1::Part {
    let phrase = "a dog".into();
    v1::Part { kind: Some(part::Kind::Box(v1::Box { left, top, right, bottom, phrase })) }
}

fn prompt(parts: Vec<v1::Part>, output: Output) -> GenerateRequest {
    let input = Some(Input::Prompt(Prompt { parts }));
    GenerateRequest { model: "emu2".into(), input, output: Some(output), seed: None, ..Default::default() }
}

fn chat(turns: Vec<(Role, Vec<v1::Part>)>, output: Output) -> GenerateRequest {
    let turns = turns.into_iter().map(|(role, parts)| Turn { role: role.into(), parts }).collect();
    let input = Some(Input::Chat(Chat { turns, system_message: None }));
    GenerateRequest { input, ..prompt(vec![], output) }
}

fn writes() -> Output {
    Output::Text(TextOutput::default())
}

fn paints() -> Output {
    Output::Image(ImageOutput::default())
}

fn right(request: GenerateRequest) -> Generation {
    check(request, &LimitsConfig::default(), &profile()).unwrap()
}

#[test]
fn text_defaults_are_upstreams() {
    let generation = right(prompt(vec![text("a")], writes()));
    let Task::Write { parameters, .. } = generation.task else { panic!("{:?}", generation.task) };
    let expected = TextOutput {
        max_new_tokens: Some(64),
        min_length: Some(1),
        num_beams: Some(5),
        length_penalty: Some(-1.0),
        do_sample: false,
        temperature: Some(1.0),
        top_k: None,
        top_p: None,
        repetition_penalty: Some(1.0),
        grounding: false,
        keep_special_tokens: Some(false),
    };
    assert_eq!(parameters, expected);
}

#[test]
fn sampling_takes_one_beam_and_grounding_keeps_special_tokens() {
    let output = TextOutput {
        do_sample: true,
        grounding: true,
        top_k: Some(3),
        top_p: Some(0.9),
        ..Default::default()
    };
    let generation =
        right(GenerateRequest { seed: Some(7), ..prompt(vec![text("a")], Output::Text(output)) });
    let Task::Write { parameters, .. } = generation.task else { panic!("{:?}", generation.task) };
    let TextOutput { num_beams, top_k, top_p, keep_special_tokens, .. } = parameters;
    assert_eq!((num_beams, top_k, top_p, keep_special_tokens), (Some(1), Some(3), Some(0.9), Some(true)));
    assert_eq!(generation.seed, 7);
}

#[test]
fn image_defaults_are_upstreams_and_the_models() {
    let generation = right(prompt(vec![text("a dog")], paints()));
    let Task::Paint { start, .. } = generation.task else { panic!("{:?}", generation.task) };
    let image = ImageOutput {
        height: Some(1024),
        width: Some(768),
        steps: Some(50),
        guidance_scale: Some(3.0),
        original_height: Some(1024),
        original_width: Some(1024),
        crop_top: Some(0),
        crop_left: Some(0),
    };
    let expected =
        DecodeStart { image: Some(image), seed: generation.seed, queries: 64, initial_latents: None };
    assert_eq!(start, expected);
}

#[test]
fn a_seed_is_drawn_anew_for_each_request() {
    let seeds = [(); 3].map(|()| right(prompt(vec![text("a")], writes())).seed);
    assert!(seeds[0] != seeds[1] && seeds[1] != seeds[2]);
}

#[test]
fn slots_follow_the_parts() {
    let parts = vec![text("a"), image(b"1"), video(&[b"2", b"3"]), region(0.1, 0.2, 0.3, 0.4), image(b"4")];
    let slots = |output| {
        let images = right(prompt(parts.clone(), output)).images;
        images.into_iter().map(|it| (it.field, it.n_query)).collect::<Vec<_>>()
    };
    let mut expected: Vec<(String, u32)> = [
        ("prompt.parts[1].image", 64),
        ("prompt.parts[2].video.frames[0]", 16),
        ("prompt.parts[2].video.frames[1]", 16),
        ("prompt.parts[3].box", 64),
        ("prompt.parts[4].image", 64),
    ]
    .map(|(field, n_query)| (field.to_owned(), n_query))
    .into();
    assert_eq!(slots(paints()), expected);
    // A reader gets the box in words.
    expected.remove(3);
    assert_eq!(slots(writes()), expected);
}

#[test]
fn a_dialogue_keeps_its_turns() {
    let turns = vec![
        (Role::User, vec![image(b"1"), text("what?")]),
        (Role::Assistant, vec![text("a dog")]),
        (Role::User, vec![text("sure?")]),
    ];
    let generation = right(chat(turns, writes()));
    assert_eq!(generation.images[0].field, "chat.turns[0].parts[0].image");
    let Task::Write { input: llm_start::Input::Chat(chat), .. } = generation.task else { panic!() };
    assert_eq!(chat.turns.iter().map(|turn| turn.parts.len()).collect::<Vec<_>>(), [2, 1, 1]);
}

#[test]
fn only_one_image_alone_is_autoencoded() {
    assert_eq!(right(prompt(vec![image(b"1")], paints())).task.name(), "autoencode");
    for parts in [
        vec![image(b"1"), text("")],
        vec![image(b"1"), image(b"2")],
        vec![video(&[b"1"])],
        vec![region(0.0, 0.0, 1.0, 1.0)],
        vec![text("")],
    ] {
        assert_eq!(right(prompt(parts, paints())).task.name(), "image");
    }
    assert_eq!(right(prompt(vec![image(b"1")], writes())).task.name(), "text");
}

/// Field and description of each mistake.
fn wrong(request: GenerateRequest, profile: &Profile) -> Vec<(String, String)> {
    let limits = LimitsConfig { max_parts: 10, max_images: 4, ..Default::default() };
    let violations = check(request, &limits, profile).expect_err("the request is wrong");
    violations.into_iter().map(|it| (it.field, it.description)).collect()
}

#[test]
fn bad_text_parameters_are_refused() {
    let nan = f32::NAN;
    let d = TextOutput::default();
    let cases = [
        (TextOutput { max_new_tokens: Some(0), ..d }, "text.max_new_tokens", "must be 1 to 1024, got 0"),
        (
            TextOutput { max_new_tokens: Some(2000), ..d },
            "text.max_new_tokens",
            "must be 1 to 1024, got 2000",
        ),
        (TextOutput { min_length: Some(66), ..d }, "text.min_length", "must be 0 to 65, got 66"),
        (TextOutput { num_beams: Some(0), ..d }, "text.num_beams", "must be 1 to 8, got 0"),
        (TextOutput { num_beams: Some(9), ..d }, "text.num_beams", "must be 1 to 8, got 9"),
        (
            TextOutput { num_beams: Some(2), do_sample: true, ..d },
            "text.num_beams",
            "must be 1 with do_sample, got 2",
        ),
        (TextOutput { length_penalty: Some(nan), ..d }, "text.length_penalty", "must be -10 to 10, got NaN"),
        (TextOutput { temperature: Some(0.0), ..d }, "text.temperature", "must be 0.001 to 50, got 0"),
        (TextOutput { temperature: Some(nan), ..d }, "text.temperature", "must be 0.001 to 50, got NaN"),
        (TextOutput { top_k: Some(0), ..d }, "text.top_k", "must be 1 to 4294967295, got 0"),
        (TextOutput { top_p: Some(1.5), ..d }, "text.top_p", "must be above 0 to 1, got 1.5"),
        (TextOutput { top_p: Some(nan), ..d }, "text.top_p", "must be above 0 to 1, got NaN"),
        (
            TextOutput { repetition_penalty: Some(-1.0), ..d },
            "text.repetition_penalty",
            "must be 0.1 to 5, got -1",
        ),
    ];
    for (output, field, description) in cases {
        let mistakes = wrong(prompt(vec![text("a")], Output::Text(output)), &profile());
        assert_eq!(mistakes, [(field.to_owned(), description.to_owned())]);
    }
}

#[test]
fn bad_image_parameters_are_refused() {
    let d = ImageOutput::default();
    let cases = [
        (ImageOutput { steps: Some(0), ..d }, "image.steps", "must be 1 to 1000, got 0"),
        (ImageOutput { steps: Some(10_000), ..d }, "image.steps", "must be 1 to 1000, got 10000"),
        (
            ImageOutput { guidance_scale: Some(f32::NAN), ..d },
            "image.guidance_scale",
            "must be 0 to 20, got NaN",
        ),
        (ImageOutput { guidance_scale: Some(-1.0), ..d }, "image.guidance_scale", "must be 0 to 20, got -1"),
        (ImageOutput { height: Some(1001), ..d }, "image.height", "must be a multiple of 8, got 1001"),
        (ImageOutput { width: Some(4096), ..d }, "image.width", "must be 8 to 2048, got 4096"),
    ];
    for (output, field, description) in cases {
        let mistakes = wrong(prompt(vec![text("a")], Output::Image(output)), &profile());
        assert_eq!(mistakes, [(field.to_owned(), description.to_owned())]);
    }
}

#[test]
fn bad_parts_are_refused() {
    let none = v1::Part { kind: None };
    let cases = [
        (vec![], "prompt.parts", "must hold at least 1 part, got 0"),
        (vec![none], "prompt.parts[0]", "must be one of text, image, video and box, got none"),
        (vec![text("a"), image(b"")], "prompt.parts[1].image", "must be an encoded image, got 0 bytes"),
        (vec![video(&[])], "prompt.parts[0].video.frames", "must hold at least 1 frame, got 0"),
        (
            vec![video(&[b"1", b""])],
            "prompt.parts[0].video.frames[1]",
            "must be an encoded image, got 0 bytes",
        ),
        (
            vec![text(&"a".repeat(996)), region(0.0, 0.0, 1.0, 1.0)],
            "prompt",
            "must hold at most 1000 bytes of text (max_text_bytes), got 1001",
        ),
        (vec![text("a"); 11], "prompt.parts", "must be at most 10 (limits.max_parts), got 11"),
        (vec![image(b"1"); 5], "prompt.parts.image", "must be at most 4 (limits.max_images), got 5"),
        (
            vec![region(0.5, 0.0, 0.5, 1.0)],
            "prompt.parts[0].box.left",
            "must be 0 <= left < right <= 1, got 0.5 and 0.5",
        ),
        (
            vec![region(0.0, f32::NAN, 1.0, 1.0)],
            "prompt.parts[0].box.top",
            "must be 0 <= top < bottom <= 1, got NaN and 1",
        ),
        (
            vec![region(0.0, 0.0, 1.5, 1.0)],
            "prompt.parts[0].box.left",
            "must be 0 <= left < right <= 1, got 0 and 1.5",
        ),
    ];
    for (parts, field, description) in cases {
        let mistakes = wrong(prompt(parts, writes()), &profile());
        assert_eq!(mistakes, [(field.to_owned(), description.to_owned())]);
    }
}

#[test]
fn bad_dialogues_are_refused() {
    let user = || (Role::User, vec![text("a")]);
    let assistant = || (Role::Assistant, vec![text("b")]);
    let odd = "must be odd in number, the user first and last, got";
    let cases = [
        (vec![], "chat.turns", format!("{odd} 0")),
        (vec![user(), assistant()], "chat.turns", format!("{odd} 2")),
        (vec![assistant()], "chat.turns[0].role", "must be ROLE_USER, got ROLE_ASSISTANT".into()),
        (
            vec![user(), (Role::Unspecified, vec![text("b")]), user()],
            "chat.turns[1].role",
            "must be ROLE_ASSISTANT, got ROLE_UNSPECIFIED".into(),
        ),
        (vec![(Role::User, vec![])], "chat.turns[0].parts", "must hold at least 1 part, got 0".into()),
    ];
    for (turns, field, description) in cases {
        assert_eq!(wrong(chat(turns, writes()), &profile()), [(field.to_owned(), description)]);
    }
}

#[test]
fn what_the_model_cannot_do_is_refused() {
    let fields =
        |request| wrong(request, &plain_profile()).into_iter().map(|(field, _)| field).collect::<Vec<_>>();
    assert_eq!(fields(prompt(vec![text("a")], paints())), ["image"]);
    assert_eq!(fields(chat(vec![(Role::User, vec![text("a")])], writes())), ["chat"]);
    let grounding = TextOutput { grounding: true, ..Default::default() };
    assert_eq!(fields(prompt(vec![text("a")], Output::Text(grounding))), ["text.grounding"]);
    let painting_chat = chat(vec![(Role::User, vec![text("a")])], paints());
    assert_eq!(wrong(painting_chat, &profile())[0].0, "chat");
}

#[test]
fn all_mistakes_come_at_once() {
    let output = ImageOutput { steps: Some(0), height: Some(9), ..Default::default() };
    let request = prompt(vec![image(b""), region(1.0, 0.0, 0.0, 1.0)], Output::Image(output));
    let fields: Vec<_> = wrong(request, &profile()).into_iter().map(|(field, _)| field).collect();
    assert_eq!(fields, ["prompt.parts[0].image", "prompt.parts[1].box.left", "image.height", "image.steps"]);

    let empty = GenerateRequest { model: "emu2".into(), ..Default::default() };
    let fields: Vec<_> = wrong(empty, &profile()).into_iter().map(|(field, _)| field).collect();
    assert_eq!(fields, ["input", "output"]);
}

#[test]
fn an_embedding_takes_one_picture_and_a_possible_number() {
    let request = |data: &'static [u8], n_query| {
        let image = Some(Image { data: data.into() });
        check_embed(EmbedRequest { model: "emu2".into(), image, n_query, ..Default::default() }, &profile())
    };
    assert_eq!(request(b"1", None).unwrap().n_query, 64);
    assert_eq!(request(b"1", Some(1024)).unwrap().n_query, 1024);
    let fields = |mistakes: Vec<Violation>| mistakes.into_iter().map(|it| it.field).collect::<Vec<_>>();
    assert_eq!(fields(request(b"", Some(1025)).unwrap_err()), ["image", "n_query"]);
    // Pooling for 50 would give 64.
    for n_query in [0, 50] {
        assert_eq!(fields(request(b"1", Some(n_query)).unwrap_err()), ["n_query"]);
    }
}

#[test]
fn urls_are_not_accepted_wherever_an_image_goes() {
    for url in ["http://a/b.png", " HTTPS://a", "data:image/png;base64,AA", "file:///etc/passwd", "s3://a/b"]
    {
        let bytes: &'static [u8] = url.as_bytes();
        let video = v1::Part { kind: Some(part::Kind::Video(v1::Video { frames: vec![bytes.into()] })) };
        let mistakes = wrong(prompt(vec![image(bytes), video], writes()), &profile());
        let fields: Vec<_> = mistakes.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["prompt.parts[0].image", "prompt.parts[1].video.frames[0]"]);
        assert!(mistakes[0].1.contains("URLs are not accepted"), "{mistakes:?}");
        let embed = EmbedRequest { image: Some(Image { data: bytes.into() }), ..Default::default() };
        assert_eq!(check_embed(embed, &profile()).unwrap_err()[0].field, "image");
    }
    // Other bytes are the encoder's to judge, even those that begin almost like one.
    right(prompt(vec![image(b"http:/"), image(b"\x89PNG")], writes()));
}
