use emu2_nn::golden;
use serde_json::Value;

use super::*;

const TEXT: Output = Output::Text { grounding: false, max_new_tokens: 64 };
const GROUNDED: Output = Output::Text { grounding: true, max_new_tokens: 64 };
const BASE: PromptConfig = PromptConfig { n_query: 4, v_query: 4, max_positions: 2_048 };

fn tokenizer(instruct: bool) -> Tokenizer {
    Tokenizer::parse(&golden::tokenizer("emu2-base"), instruct).unwrap()
}

fn text(text: &str) -> Part {
    Part::Text(text.to_owned())
}

fn region(edges: [f32; 4], phrase: &str) -> Part {
    let [left, top, right, bottom] = edges;
    Part::Box { left, top, right, bottom, phrase: phrase.to_owned() }
}

fn prompt(parts: &[Part], output: &Output) -> Result<Prompt, PromptError> {
    build(&tokenizer(false), &BASE, &Input::Prompt(parts.to_vec()), output)
}

fn chat(turns: &[&[Part]], output: &Output) -> Result<Prompt, PromptError> {
    let turns = turns.iter().map(|turn| turn.to_vec()).collect();
    build(&tokenizer(true), &BASE, &Input::Chat { turns, system_message: None }, output)
}

#[track_caller]
fn assert_invalid(result: Result<Prompt, PromptError>, want_field: &str, want: &Problem) {
    let Err(PromptError::Invalid { field, problem }) = result else { panic!("not invalid: {result:?}") };
    assert_eq!((field.as_str(), &problem), (want_field, want));
}

struct Case(Value);

impl Case {
    fn named(name: &str, tokenizer: &str) -> Self {
        let tokens = golden::json("tokens.json");
        let mut cases = tokens["cases"].as_array().unwrap().iter();
        Self(cases.find(|case| case["name"] == name && case["tokenizer"] == tokenizer).unwrap().clone())
    }

    fn ids(&self, key: &str) -> Vec<u32> {
        serde_json::from_value(self.0[key].clone()).unwrap()
    }

    fn config(&self) -> PromptConfig {
        let count = |key: &str| self.0[key].as_u64().unwrap() as usize;
        PromptConfig { n_query: count("n_query"), v_query: count("v_query"), max_positions: 2_048 }
    }
}

/// Slots are exactly the runs of placeholders, each after its `[IMG]` and before its `[/IMG]`.
fn check_slots(tokenizer: &Tokenizer, prompt: &Prompt, config: &PromptConfig) {
    let [image, gimg, img, img_end] = [Special::Image, Special::Gimg, Special::Img, Special::ImgEnd]
        .map(|special| tokenizer.special(special));
    for &Slot { start, len } in &prompt.slots {
        let id = prompt.ids[start];
        assert_eq!(len, if id == image { config.n_query } else { config.v_query });
        assert!(prompt.ids[start..start + len].iter().all(|&other| other == id));
        assert_eq!((prompt.ids[start - 1], prompt.ids[start + len]), (img, img_end));
    }
    let placeholders = prompt.ids.iter().filter(|&&id| id == image || id == gimg).count();
    assert_eq!(placeholders, prompt.slots.iter().map(|slot| slot.len).sum::<usize>());
}

#[test]
fn golden_prompts() {
    let caption = "Describe the image in details:";
    let frames = Part::Video { frames: 3 };
    let cases: &[(&str, &[Part])] = &[
        ("caption", &[Part::Image, text(caption)]),
        (
            "fewshot",
            &[
                Part::Image,
                text("[red, white, 3, bottom left]."),
                Part::Image,
                text("[yellow, white, 2, top left]."),
                Part::Image,
                text("There are two dogs."),
                Part::Image,
            ],
        ),
        ("text_only", &[text("There are "), text("two dogs.")]),
        ("video_plain", &[frames, text("What is happening in the video?")]),
    ];
    for (name, parts) in cases {
        let case = Case::named(name, "tiny_base");
        let (tokenizer, config) = (tokenizer(false), case.config());
        let prompt = build(&tokenizer, &config, &Input::Prompt(parts.to_vec()), &TEXT).unwrap();
        assert_eq!(prompt.ids, case.ids("ids"), "{name}");
        check_slots(&tokenizer, &prompt, &config);
    }
}

#[test]
fn golden_image_prompts() {
    let cases: &[(&str, &[Part])] = &[
        ("gen_text", &[text("An image of a dog wearing sunglasses.")]),
        ("gen_empty_negative", &[]),
        ("gen_subject", &[Part::Image, text("wearing a red hat on the beach.")]),
        (
            "gen_ground",
            &[
                text(
                    "<grounding>An oil painting of <phrase>a dog</phrase><object><patch_index_0007><patch_index_0199>",
                ),
                text("<patch_index_0256><patch_index_0000></object>"),
                Part::Image,
                text("and <phrase>a cat</phrase><object><patch_index_0001><patch_index_0002>"),
                text("</delimiter_of_multi_objects/><patch_index_0003><patch_index_0004></object>."),
            ],
        ),
        (
            "gen_ground_spaced",
            &[
                text("<grounding> An image of <phrase> a dog </phrase> <object> <patch_index_0012> "),
                text("<patch_index_0034> </object> "),
                Part::Image,
                text(" running. "),
            ],
        ),
    ];
    for (name, parts) in cases {
        let case = Case::named(name, "tiny_base");
        let (tokenizer, config) = (tokenizer(false), case.config());
        let prompt = build(&tokenizer, &config, &Input::Prompt(parts.to_vec()), &Output::Regression).unwrap();
        assert_eq!(prompt.ids, case.ids("ids_with_BOI_appended"), "{name}");
        check_slots(&tokenizer, &prompt, &config);
    }
}

#[test]
fn golden_chats() {
    let question = "What is happening in the video?";
    let cases: Vec<(&str, &Output, Vec<Vec<Part>>)> = vec![
        (
            "chat_multi",
            &TEXT,
            vec![
                vec![Part::Image, text("What is in the picture?")],
                vec![text("A dog and a squirrel.")],
                vec![text("What colour is the dog? ")],
            ],
        ),
        ("chat_single", &TEXT, vec![vec![Part::Image, text("What is in the picture?")]]),
        (
            "chat_grounding",
            &GROUNDED,
            vec![vec![Part::Image, text("<grounding>Where is <phrase>the brown dog</phrase>?")]],
        ),
        ("chat_grounding_q", &GROUNDED, vec![vec![Part::Image, text("the brown dog")]]),
        ("chat_video", &TEXT, vec![vec![Part::Video { frames: 3 }, text(question)]]),
        (
            "chat_video_and_image",
            &TEXT,
            vec![
                vec![Part::Image, Part::Video { frames: 3 }, text(question)],
                vec![text("ok")],
                vec![Part::Image, text("and this?")],
            ],
        ),
    ];
    for (name, output, turns) in cases {
        let case = Case::named(name, "tiny_chat");
        let (tokenizer, config) = (tokenizer(true), case.config());
        let prompt =
            build(&tokenizer, &config, &Input::Chat { turns, system_message: None }, output).unwrap();
        assert_eq!(prompt.ids, case.ids("ids"), "{name}");
        check_slots(&tokenizer, &prompt, &config);
    }
}

#[test]
fn a_system_message_replaces_upstreams() {
    let tokenizer = tokenizer(true);
    for (system_message, want) in
        [("Be brief.", "Be brief. [USER]: hi [ASSISTANT]:"), ("", "[USER]: hi [ASSISTANT]:")]
    {
        let input =
            Input::Chat { turns: vec![vec![text("hi")]], system_message: Some(system_message.to_owned()) };
        assert_eq!(build(&tokenizer, &BASE, &input, &TEXT).unwrap().ids, tokenizer.encode(want));
    }
}

#[test]
fn slots_come_in_order_of_appearance() {
    let config = PromptConfig { n_query: 5, v_query: 3, max_positions: 2_048 };
    let parts = vec![Part::Video { frames: 2 }, region([0.0, 0.0, 1.0, 1.0], "a"), text("b"), Part::Image];
    let tokenizer = tokenizer(false);
    let prompt = build(&tokenizer, &config, &Input::Prompt(parts), &Output::Regression).unwrap();
    assert_eq!(prompt.slots.iter().map(|slot| slot.len).collect::<Vec<_>>(), [3, 3, 5, 5]);
    assert!(prompt.slots.is_sorted_by_key(|slot| slot.start));
    check_slots(&tokenizer, &prompt, &config);
    assert_eq!(prompt.ids.last(), Some(&tokenizer.special(Special::Img)));
}

#[test]
fn boxes_in_text_are_coordinates() {
    let written = "<phrase>a dog</phrase><object><patch_index_0000><patch_index_0056><patch_index_0112>\
                   <patch_index_0224></object>Who is this?";
    let got = prompt(&[region([0.0, 0.25, 0.501, 1.0], "a dog"), text("Who is this?")], &TEXT).unwrap();
    assert_eq!(got.ids, tokenizer(false).encode(written));
    assert_eq!(got.slots, []);
}

#[test]
fn boxes_in_image_prompts_are_images() {
    // The README's three dogs, less one.
    let boxed = [
        text("An oil painting of three dogs,"),
        region([0.05, 0.03, 0.5, 0.5], "the first dog"),
        Part::Image,
        region([0.5, 0.02, 1.0, 0.5], ""),
        Part::Image,
    ];
    let by_hand = [
        text("<grounding>An oil painting of three dogs,<phrase>the first dog</phrase><object>"),
        Part::Image,
        text("</object>"),
        Part::Image,
        text("<object>"),
        Part::Image,
        text("</object>"),
        Part::Image,
    ];
    let want = prompt(&by_hand, &Output::Regression).unwrap();
    assert_eq!(want.slots.len(), 4);
    assert_eq!(prompt(&boxed, &Output::Regression).unwrap(), want);

    let started = [&[text(" <grounding>")], &boxed[..]].concat();
    assert_eq!(prompt(&started, &Output::Regression).unwrap(), want, "<grounding> once only");
}

#[test]
fn placeholders_cannot_be_written() {
    for token in ["<image>", "[gIMG]"] {
        let reserved = Problem::Reserved(token);
        let bad = text(&format!("a {token} b"));
        assert_invalid(prompt(&[text("ok"), bad.clone()], &TEXT), "prompt.parts[1].text", &reserved);
        assert_invalid(
            chat(&[&[text("ok")], &[bad], &[text("ok")]], &TEXT),
            "chat.turns[1].parts[0].text",
            &reserved,
        );
        let phrase = region([0.0, 0.0, 1.0, 1.0], token);
        assert_invalid(prompt(&[phrase], &Output::Regression), "prompt.parts[0].box.phrase", &reserved);
        // In two halves.
        let (head, tail) = token.split_at(3);
        assert_invalid(
            prompt(&[Part::Image, text(head), text(tail)], &TEXT),
            "prompt.parts[2].text",
            &reserved,
        );
        let input = Input::Chat { turns: vec![vec![text("hi")]], system_message: Some(format!("é{token}")) };
        assert_invalid(build(&tokenizer(true), &BASE, &input, &TEXT), "chat.system_message", &reserved);
    }
    // Other special tokens are upstream's to honour.
    let img = tokenizer(true).special(Special::Img);
    assert!(chat(&[&[text("[USER]: [IMG] </s>")]], &TEXT).unwrap().ids.contains(&img));
}

#[test]
fn malformed_inputs_are_named() {
    assert_invalid(prompt(&[], &TEXT), "prompt.parts", &Problem::NoParts);
    assert_invalid(chat(&[], &TEXT), "chat.turns", &Problem::EvenTurns(0));
    let hi: &[Part] = &[text("hi")];
    assert_invalid(chat(&[hi, hi], &TEXT), "chat.turns", &Problem::EvenTurns(2));
    assert_invalid(chat(&[hi, &[], hi], &TEXT), "chat.turns[1].parts", &Problem::NoParts);
    assert_invalid(chat(&[hi], &Output::Regression), "chat", &Problem::ChatRegression);
    let input = Input::Chat { turns: vec![hi.to_vec()], system_message: None };
    assert_invalid(build(&tokenizer(false), &BASE, &input, &TEXT), "chat", &Problem::NoChat);
    assert_invalid(
        prompt(&[Part::Video { frames: 0 }], &TEXT),
        "prompt.parts[0].video.frames",
        &Problem::NoFrames,
    );
    for edges in
        [[0.5, 0.0, 0.5, 1.0], [0.0, 0.0, 1.5, 1.0], [-0.1, 0.0, 1.0, 1.0], [0.0, f32::NAN, 1.0, 1.0]]
    {
        let result = prompt(&[text("a"), region(edges, "b")], &TEXT);
        let Err(PromptError::Invalid { field, problem: Problem::Edges { .. } }) = &result else {
            panic!("{edges:?}: {result:?}")
        };
        assert_eq!(field, "prompt.parts[1].box");
    }
}

#[test]
fn prompt_and_output_share_the_positions() {
    let parts = [Part::Image, text("Describe the image in details:")];
    let length = prompt(&parts, &TEXT).unwrap().ids.len();
    let with_limit = |max_positions, output: &Output| {
        let config = PromptConfig { max_positions, ..BASE };
        build(&tokenizer(false), &config, &Input::Prompt(parts.to_vec()), output)
    };
    assert!(with_limit(length + 64, &TEXT).is_ok());
    let limit = length + 63;
    assert_eq!(with_limit(limit, &TEXT), Err(PromptError::TooLong { prompt: length, requested: 64, limit }));
    // [IMG] is the prompt's, the embeddings are the output.
    assert!(with_limit(length + 1 + 4, &Output::Regression).is_ok());
    let limit = length + 4;
    let too_long = PromptError::TooLong { prompt: length + 1, requested: 4, limit };
    assert_eq!(with_limit(limit, &Output::Regression), Err(too_long));
    let output = Output::Text { grounding: false, max_new_tokens: usize::MAX };
    assert!(matches!(with_limit(2_048, &output), Err(PromptError::TooLong { requested: usize::MAX, .. })));
}

#[test]
fn more_text_than_could_fit_is_refused_unread() {
    let limit = tokenizer(false).max_text_bytes(BASE.max_positions);
    assert_eq!(limit, 2_048 * 48, "the longest piece is sixteen spaces, of three bytes each");
    let long = |bytes: usize| text(&"a dog ".repeat(bytes / 6 + 1)[..bytes]);
    let refused = |field, bytes| Err(PromptError::TooManyBytes { field, bytes, limit });
    assert_eq!(prompt(&[long(limit + 1)], &TEXT), refused("prompt", limit + 1));
    assert!(
        matches!(prompt(&[long(limit)], &TEXT), Err(PromptError::TooLong { prompt, .. }) if prompt > limit / 6)
    );
    let phrase = region([0.0, 0.0, 1.0, 1.0], "phrase");
    assert_eq!(prompt(&[long(limit), Part::Image, phrase], &TEXT), refused("prompt", limit + 6));
    let input = Input::Chat { turns: vec![vec![long(limit)]], system_message: Some("system".to_owned()) };
    assert_eq!(build(&tokenizer(true), &BASE, &input, &TEXT), refused("chat", limit + 6));
}

#[test]
fn huge_prompts_are_refused_before_they_are_laid_out() {
    let images = vec![Part::Image; 500];
    let exact = PromptError::TooLong { prompt: 1 + 500 * 6, requested: 64, limit: 2_048 };
    assert_eq!(prompt(&images, &TEXT), Err(exact));
    let start = std::time::Instant::now();
    let frames = Part::Video { frames: u32::MAX };
    let Err(PromptError::TooLong { prompt: positions, .. }) = prompt(&[frames], &TEXT) else {
        panic!("accepted")
    };
    assert_eq!(positions, u32::MAX as usize * 6);
    let boxes = vec![region([0.0, 0.0, 1.0, 1.0], ""); 1_000_000];
    let Err(PromptError::TooLong { prompt: positions, .. }) = prompt(&boxes, &TEXT) else {
        panic!("accepted")
    };
    assert!((2_048 - 64..2_048).contains(&positions), "{positions}");
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}
