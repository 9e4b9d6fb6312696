//! Folders as people have them, and what is said of them.

use std::{collections::HashMap, fs};

use emu2_nn::golden::{self, torch_save};
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;

use super::*;

fn said(dir: &Path, digest: bool) -> (Result<bool>, String) {
    let args = args::Inspect { dir: dir.to_owned(), devices: vec!["cpu".to_owned()], digest };
    let mut out = Vec::new();
    let can_be_served = report(&args, &mut out);
    (can_be_served, String::from_utf8(out).unwrap())
}

/// The report of a folder that can be looked at.
fn inspected(dir: &Path) -> (bool, String) {
    let (can_be_served, text) = said(dir, false);
    (can_be_served.unwrap(), text)
}

fn refused(dir: &Path) -> String {
    format!("{:#}", said(dir, false).0.unwrap_err())
}

fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` not in:\n{text}");
    }
}

fn copy(model: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden::model_dir(model)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

#[test]
fn a_whole_model_can_be_served() {
    for (model, words) in [
        ("emu2-base", &["model      emu2\n", "decoder    absent", "serves     embed, text\n"][..]),
        ("emu2-chat", &["emu2-chat, tuned to chat", "serves     embed, text, chat\n"]),
        ("emu2-gen", &["layout     native", "decoder    complete", "serves     embed, text, image\n"]),
    ] {
        let dir = golden::model_dir(model);
        let (can_be_served, text) = inspected(&dir);
        assert!(can_be_served, "{text}");
        assert_says(&text, words);
        assert_says(
            &text,
            &["encoder    complete", "llm        complete", "as float32 on cpu: fits", "BF16"],
        );
        assert_says(&text, &[&format!("next       emu2 up --model-dir {}\n", dir.display())]);
    }
}

#[test]
fn digests_are_those_of_a_loaded_model() {
    let folder = tempfile::tempdir().unwrap();
    golden::diffusers(folder.path());
    let (can_be_served, text) = said(folder.path(), true);
    assert!(can_be_served.unwrap(), "{text}");
    let dir = ModelDir::open(&golden::model_dir("emu2-gen")).unwrap();
    for stage in Stage::ALL {
        let digest = stage.build(&dir, Kind::Float).unwrap();
        assert_says(&text, &[&format!("{:<10} {digest} as float32\n", stage.name())]);
    }
}

#[test]
fn what_is_wrong_is_listed() {
    let folder = copy("emu2-gen");
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut tensors: HashMap<_, _> =
        SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().collect();
    let norm = tensors.remove("multimodal_encoder.decoder.lm.model.norm.weight").unwrap();
    tensors.insert("multimodal_encoder.visual.stranger".to_owned(), norm.clone());
    tensors.insert("adapter.weight".to_owned(), norm.clone());
    let misshapen = TensorView::new(norm.dtype(), vec![1, norm.shape()[0]], norm.data()).unwrap();
    tensors.insert("unet.conv_in.bias".to_owned(), misshapen);
    safetensors::serialize_to_file(&tensors, None, &path).unwrap();
    let (can_be_served, text) = inspected(folder.path());
    assert!(!can_be_served);
    assert_says(
        &text,
        &[
            "unknown    1: `adapter.weight`",
            "`decoder.lm.model.norm.weight` is missing",
            "`stranger` is not used",
            "`conv_in.bias` must be [",
        ],
    );
    assert!(!text.contains("serves") && !text.contains("next"), "{text}");

    // Everything of a part with another width is wrong: not all of it is spelled out.
    let folder = copy("emu2-base");
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let width = config["llama"]["hidden_size"].as_u64().unwrap();
    config["llama"]["hidden_size"] = (2 * width).into();
    fs::write(&path, config.to_string()).unwrap();
    let (can_be_served, text) = inspected(folder.path());
    assert!(!can_be_served && text.lines().count() < 40, "{text}");
    assert_says(&text, &["encoder    complete", "llm        cannot be built:", " more\n"]);
}

#[test]
fn a_tokenizer_that_does_not_fit_or_is_absent_is_told() {
    let folder = copy("emu2-base");
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["instruct"] = Value::Bool(true);
    fs::write(&path, config.to_string()).unwrap();
    let (can_be_served, text) = inspected(folder.path());
    assert!(!can_be_served);
    assert_says(
        &text,
        &["llm        cannot be built:", "llama.vocab_size is 1171, but the tokenizer has 1173 ids"],
    );

    fs::remove_file(folder.path().join("tokenizer.model")).unwrap();
    let (can_be_served, text) = inspected(folder.path());
    assert!(!can_be_served);
    assert_says(&text, &["tokenizer.model: No such file", "llm        cannot be built:"]);
}

#[test]
fn a_part_alone_is_no_model() {
    let folder = tempfile::tempdir().unwrap();
    golden::diffusers(folder.path());
    fs::remove_dir_all(folder.path().join("multimodal_encoder")).unwrap();
    let (can_be_served, text) = inspected(folder.path());
    assert!(!can_be_served);
    assert_says(
        &text,
        &["layout     diffusers", "encoder    absent", "llm        absent", "decoder    complete"],
    );
}

#[test]
fn pickles_are_looked_into() {
    let folder = tempfile::tempdir().unwrap();
    golden::pickled("emu2-chat", folder.path());
    let (can_be_served, text) = inspected(folder.path());
    assert!(!can_be_served);
    assert_says(&text, &["weights    pickled, in 2 files", "visual", "llm", "F32"]);
    assert_says(&text, &[&format!("next       emu2 convert {} OUT, which takes ", folder.path().display())]);

    let marker = folder.path().join("it-ran");
    let mut pickle = b"\x80\x02cposix\nsystem\n(".to_vec();
    torch_save::text(&mut pickle, &format!("touch {}", marker.display()));
    pickle.extend(b"tR.");
    let shard = folder.path().join("pytorch_model-00002-of-00002.bin");
    fs::write(&shard, torch_save::with_pickle(&pickle)).unwrap();
    let error = refused(folder.path());
    assert!(
        error.ends_with("pytorch_model-00002-of-00002.bin: a pickle that calls code: posix.system"),
        "{error}"
    );
    assert!(!marker.exists());
    fs::remove_file(shard).unwrap();
    assert!(refused(folder.path()).contains("names pytorch_model-00002-of-00002.bin, which is absent"));
}

#[test]
fn what_cannot_be_opened_says_why() {
    let folder = tempfile::tempdir().unwrap();
    assert!(refused(folder.path()).contains("not a model folder"));
    let config = r#"{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}"#;
    fs::write(folder.path().join("config.json"), config).unwrap();
    assert!(
        refused(folder.path()).ends_with("not Emu2: it looks like llava (LlavaForConditionalGeneration)")
    );

    let folder = tempfile::tempdir().unwrap();
    golden::hugging_face("emu2-base", folder.path());
    let shard = folder.path().join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let error = refused(folder.path());
    assert!(error.contains("model-00002-of-00002.safetensors: not a safetensors file"), "{error}");
}
