//! Against what the official model answers.

use emu2_nn::{array, golden::Golden};
use serde_json::Value;
use tch::{IndexOp, Kind, Tensor};

use super::*;
use crate::{
    kv::Append,
    llama::Rows,
    load::load,
    prompt::{self, Input, Part, PromptConfig},
    search::{Next, Search},
};

/// The manifest's for embeddings of an image, in float32.
const TOLERANCE: f64 = 1e-4;
/// The same for the one prompt that amplifies rounding over its sixteen steps.
const TOLERANCE_AMPLIFIED: f64 = 1e-3;
/// Scores are sums of up to 24 log-probabilities of about 1e-5 each.
const SCORE_TOLERANCE: f64 = 1e-5;
const PAD: u32 = 899;

fn model(name: &str) -> (Llama, Loaded) {
    load(&config(name)).unwrap()
}

fn parameters(case: &Value) -> TextParameters {
    let args = &case["args"];
    let float = |key: &str, default| args[key].as_f64().unwrap_or(default);
    let strategy = match args["num_beams"].as_u64().unwrap() {
        1 => Strategy::Greedy,
        beams => Strategy::Beam { num_beams: beams as usize, length_penalty: float("length_penalty", -1.0) },
    };
    TextParameters {
        max_new_tokens: args["max_new_tokens"].as_u64().unwrap() as usize,
        min_length: args["min_len"].as_u64().unwrap_or(1) as usize,
        repetition_penalty: float("repetition_penalty", 1.0) as f32,
        strategy,
    }
}

/// Of one row: without the unseen beginning of text and without padding.
fn ids(case: &Value, row: usize) -> Vec<u32> {
    let ids: Vec<u32> = serde_json::from_value(case["ids"][row].clone()).unwrap();
    ids.into_iter().skip(1).filter(|&id| id != PAD).collect()
}

fn cases(model: &str) -> Vec<Value> {
    let all = golden::json("generate.json")["cases"].as_array().unwrap().clone();
    all.into_iter().filter(|case| case["model"] == model).collect()
}

fn name(case: &Value) -> String {
    format!("{}.{}.{}", case["model"], case["prompt"], case["mode"]).replace('"', "")
}

/// The golden embeddings of a whole prompt, straight into the model.
fn generate(
    model: &Llama,
    loaded: &Loaded,
    x: &Tensor,
    parameters: &TextParameters,
) -> (Vec<u32>, Option<f64>) {
    let prompt = x.size()[0];
    let mut kv = model.kv_cache(prompt + (parameters.rows() * parameters.max_new_tokens) as i64);
    let mut search = Search::new(parameters, loaded.text_ids);
    let mut answer = Vec::new();
    let mut hidden =
        model.forward(x, &mut [Rows { kv: &mut kv, append: Append::Sequential(prompt) }]).i(-1).unsqueeze(0);
    loop {
        let mut logits = Vec::<f32>::try_from(model.logits(&hidden).flatten(0, -1)).unwrap();
        let step = search.step(&mut logits);
        answer.extend(step.ids);
        let rows = match step.next {
            Next::Rows(rows) => rows,
            Next::End { score, .. } => return (answer, score),
        };
        let tokens: Vec<i64> = rows.iter().map(|row| row.token.into()).collect();
        let parents: Vec<i64> = rows.iter().map(|row| row.parent as i64).collect();
        let append = if parents.len() > 1 { Append::Beams(&parents) } else { Append::Sequential(1) };
        hidden =
            model.forward(&model.embed(&Tensor::from_slice(&tokens)), &mut [Rows { kv: &mut kv, append }]);
    }
}

#[test]
fn ids_and_scores_from_golden_prompt_embeddings_are_the_official_ones() {
    let golden = golden::file("generate.safetensors");
    let mut checked = 0;
    for name_of_model in ["base", "chat"] {
        let (model, loaded) = model(&format!("emu2-{name_of_model}"));
        for case in cases(name_of_model).iter().filter(|case| case["prompt"] != "batch3") {
            let prompt = case["prompt"].as_str().unwrap();
            let x = golden.tensor(&format!("{name_of_model}.{prompt}.inputs_embeds")).i(0);
            let (got, score) = generate(&model, &loaded, &x, &parameters(case));
            assert_eq!(got, ids(case, 0), "{}", name(case));
            if let Some(scores) = case["sequences_scores"].as_array() {
                let (want, got) = (scores[0].as_f64().unwrap(), score.unwrap());
                let close = (got - want).abs() <= SCORE_TOLERANCE * want.abs().max(1.0);
                assert!(close, "{}: {got} is not {want}", name(case));
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 36);
}

fn written(text: &str) -> Part {
    Part::Text(text.to_owned())
}

/// The golden prompts as parts, by name.
fn input(case: &Value) -> Vec<Input> {
    let prompt = |parts: &[Part]| vec![Input::Prompt(parts.to_vec())];
    let chat = |turns: &[&[Part]]| {
        let turns = turns.iter().map(|turn| turn.to_vec()).collect();
        vec![Input::Chat { turns, system_message: None }]
    };
    let video = || Part::Video { frames: 3 };
    let question = written("What is happening in the video?");
    match case["prompt"].as_str().unwrap() {
        "caption" => prompt(&[Part::Image, written("Describe the image in details:")]),
        "fewshot" => prompt(&[
            Part::Image,
            written("[red, white, 3, bottom left]."),
            Part::Image,
            written("[yellow, white, 2, top left]."),
            Part::Image,
            written("There are two dogs."),
            Part::Image,
        ]),
        "video" => prompt(&[video(), question]),
        "batch3" => [
            vec![Part::Image, written("Describe the image in details:")],
            vec![written("[yellow, white, 2, top left]. "), Part::Image],
            vec![written("An image of a dog wearing sunglasses.")],
        ]
        .map(Input::Prompt)
        .to_vec(),
        "chat_multi" => chat(&[
            &[Part::Image, written("What is in the picture?")],
            &[written("A dog and a squirrel.")],
            &[written("What colour is the dog? ")],
        ]),
        "chat_grounding" => chat(&[&[Part::Image, written("the brown dog")]]),
        "chat_video_and_image" => {
            chat(&[&[Part::Image, video(), question], &[written("ok")], &[Part::Image, written("and this?")]])
        }
        other => panic!("{other}"),
    }
}

fn build(loaded: &Loaded, input: &Input, output: prompt::Output) -> Prompt {
    let Loaded { n_query, v_query, max_positions, .. } = *loaded;
    prompt::build(&loaded.tokenizer, &PromptConfig { n_query, v_query, max_positions }, input, &output)
        .unwrap()
}

/// Embeddings, [len, embedding_width], of every slot of a prompt: those that `project_up` takes to the golden rows.
/// It maps into more dimensions, so they are the only ones.
fn slots(model: &Llama, prompt: &Prompt, x: &Tensor) -> Vec<Array> {
    let width = 64;
    let up = model.project_up(&Tensor::eye(width, (Kind::Float, model.device()))).to_kind(Kind::Double);
    let down = up.pinverse(1e-12);
    let slot = |slot: &Slot| {
        let rows = x.narrow(0, slot.start as i64, slot.len as i64).to_kind(Kind::Double);
        let embeddings = rows.matmul(&down).to_kind(Kind::Float);
        golden::assert_close("slot", &model.project_up(&embeddings), &rows.to_kind(Kind::Float), 1e-6);
        array::from_tensor(&embeddings).unwrap()
    };
    prompt.slots.iter().map(slot).collect()
}

/// Every position outside the slots must embed as golden: these are the same prompts.
fn check_ids(model: &Llama, prompt: &Prompt, x: &Tensor) {
    let ids: Vec<i64> = prompt.ids.iter().map(|&id| id.into()).collect();
    let got = model.embed(&Tensor::from_slice(&ids));
    let mut start = 0;
    for &Slot { start: slot, len } in prompt.slots.iter().chain([&Slot { start: ids.len(), len: 0 }]) {
        let between = |rows: &Tensor| rows.narrow(0, start as i64, (slot - start) as i64);
        golden::assert_close("ids", &between(&got), &between(x), 1e-6);
        start = slot + len;
    }
}

#[tokio::test]
async fn every_text_from_parts_is_the_official_one_and_all_share_one_batch() {
    for name_of_model in ["base", "chat"] {
        let (model, loaded) = model(&format!("emu2-{name_of_model}"));
        let running = Running::start(config(&format!("emu2-{name_of_model}"))).await;
        let (golden, vision) = (golden::file("generate.safetensors"), golden::file("vision.safetensors"));
        let mut expected = Vec::new();
        for case in cases(name_of_model) {
            let grounding = case["prompt"] == "chat_grounding";
            for (row, input) in input(&case).iter().enumerate() {
                let parameters = parameters(&case);
                let max_new_tokens = parameters.max_new_tokens;
                let prompt = build(&loaded, input, prompt::Output::Text { grounding, max_new_tokens });
                let embeddings = if case["prompt"] == "batch3" {
                    // Row 0 has the first image, row 1 the second.
                    let image = array::from_tensor(&vision.tensor("encode_image.nq4").i(row.min(1) as i64));
                    vec![image.unwrap(); prompt.slots.len()]
                } else {
                    let x = golden_prompt(&golden, &case);
                    check_ids(&model, &prompt, &x);
                    slots(&model, &prompt, &x)
                };
                let generation = running.submit(prompt, Output::Text(parameters));
                for (slot, embeddings) in embeddings.into_iter().enumerate() {
                    generation.input(rows_of(slot, embeddings)).await.unwrap();
                }
                let text = case["texts"].as_array().map_or(&case["text"], |_| &case["text"][row]);
                expected.push((name(&case), ids(&case, row), text.as_str().unwrap().to_owned(), generation));
            }
        }
        assert!(expected.len() >= 18);
        for (name, ids, text, generation) in expected {
            let got = collect(generation).await.unwrap();
            assert_eq!(got.ids, ids, "{name}");
            assert_eq!(got.complete, ids.last() == Some(&loaded.text_ids.end), "{name}");
            assert_eq!(loaded.tokenizer.decode(&got.ids, true), text, "{name}");
        }
    }
}

fn golden_prompt(golden: &Golden, case: &Value) -> Tensor {
    let (model, prompt) = (case["model"].as_str().unwrap(), case["prompt"].as_str().unwrap());
    golden.tensor(&format!("{model}.{prompt}.inputs_embeds")).i(0)
}

#[tokio::test]
async fn regressed_images_are_the_official_ones() {
    let running = Running::start(config("emu2-gen")).await;
    let golden = golden::file("genimage.safetensors");
    let dog = "An image of a dog wearing sunglasses.";
    let described = "There are two dogs. Describe the image in details:";
    let batch = golden.tensor("batch_text");
    let cases = [
        ("text", dog, golden.tensor("text").i(0), TOLERANCE_AMPLIFIED),
        ("batch_text.0", dog, batch.i(0), TOLERANCE_AMPLIFIED),
        ("batch_text.1", described, batch.i(1), TOLERANCE),
        ("batch_text.2", "", batch.i(2), TOLERANCE),
        ("empty", "", golden.tensor("empty").i(0), TOLERANCE),
    ];
    let prompt = |text: &str| {
        let parts = if text.is_empty() { Vec::new() } else { vec![written(text)] };
        build(&running.loaded, &Input::Prompt(parts), prompt::Output::Regression)
    };
    let queries = running.loaded.n_query;
    // Once all in one batch, once each alone.
    let together: Vec<Generation> =
        cases.iter().map(|(_, text, ..)| running.submit(prompt(text), Output::Image { queries })).collect();
    for ((name, _, want, tolerance), generation) in cases.iter().zip(together) {
        check_image(name, collect(generation).await.unwrap(), want, *tolerance);
    }
    for (name, text, want, tolerance) in &cases {
        check_image(name, running.answer(prompt(text), Output::Image { queries }).await, want, *tolerance);
    }
}

fn check_image(name: &str, got: Answer, want: &Tensor, tolerance: f64) {
    assert!(got.complete && got.ids.is_empty());
    let got = Tensor::from_slice(&got.embeddings).view([-1, 64]);
    println!("{name}: {:e}", (&got - want).abs().max().double_value(&[]));
    golden::assert_close(name, &got, want, tolerance);
}
