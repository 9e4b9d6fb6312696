//! What a folder must be so that the llm serves it: every mistake is told before any weight is read.

use std::{fs, path::Path};

use emu2_nn::golden;
use serde_json::{Value, json};

use super::*;

fn refusal(model_dir: &Path) -> String {
    let config = ModelConfig {
        model_dir: model_dir.to_owned(),
        devices: vec!["cpu".to_owned()],
        cores: 1,
        kv_budget_bytes: 1 << 30,
        prefill_chunk: 16,
        max_waiting: 1,
        progress: Progress::default(),
    };
    load(&config).unwrap_err().to_string()
}

/// The base model as Hugging Face has it: two shards, their index, config.json, tokenizer.model.
fn published() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    golden::hugging_face("emu2-base", folder.path());
    folder
}

/// As [`published`], with another config.json.
fn configured(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = published();
    let path = folder.path().join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
    folder
}

#[test]
fn a_tokenizer_that_does_not_fit_the_embedding_table_is_refused() {
    let folder = published();
    let larger = ModelDir::open(Path::new("random:emu2-37b")).unwrap().tokenizer_bytes().unwrap();
    fs::write(folder.path().join("tokenizer.model"), larger).unwrap();
    let text = refusal(folder.path());
    assert!(text.contains("llama.vocab_size is 1171, but the tokenizer has 32272 ids"), "{text}");

    // The configuration agrees with the tokenizer, the table with neither.
    let chat = configured(|config| {
        config["model_version"] = json!("chat");
        config["vocab_size"] = json!(1173);
    });
    let text = refusal(chat.path());
    for name in ["embed_tokens", "lm_head"] {
        assert!(text.contains(&format!("{name}.weight` must be [1173, 96], is [1171, 96]")), "{text}");
    }
    fs::remove_file(folder.path().join("tokenizer.model")).unwrap();
    let text = refusal(folder.path());
    assert!(text.contains("tokenizer.model"), "{text}");
}

#[test]
fn numbers_of_embeddings_that_no_encoder_gives_are_refused() {
    for (key, value, problem) in [
        ("n_query", 8, "vision.n_query must be what pooling 4 x 4 patches can leave (1, 4, 16), got 8"),
        ("v_query", 0, "vision.v_query must be what pooling 4 x 4 patches can leave (1, 4, 16), got 0"),
        ("n_query", 4096, "vision.n_query must be 1 to 2047, is 4096"),
        ("patch_size", 0, "vision.patch_size must be at least 1, is 0"),
    ] {
        let text = refusal(configured(|config| config["vision_config"][key] = json!(value)).path());
        assert!(text.contains(problem), "{problem} not in {text}");
    }
}

#[test]
fn shards_that_are_not_whole_are_named() {
    let folder = published();
    let shard = folder.path().join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let text = refusal(folder.path());
    assert!(text.contains("model-00002-of-00002.safetensors: not a safetensors file"), "{text}");
    fs::remove_file(&shard).unwrap();
    let text = refusal(folder.path());
    assert!(text.contains("names model-00002-of-00002.safetensors, which is absent"), "{text}");
}

#[test]
fn another_family_is_told_by_name() {
    let text = refusal(configured(|config| config["model_type"] = json!("llama")).path());
    assert!(text.contains("not Emu2: it looks like llama"), "{text}");
}

#[test]
fn every_device_is_asked_for_its_share() {
    let dir = ModelDir::open(Path::new("random:emu2-37b")).unwrap();
    let sum = |devices: &[Device]| room(&dir, devices, Kind::BFloat16).unwrap().iter().map(|it| it.1).sum();
    let whole: u64 = sum(&[Device::Cpu]);
    assert_eq!(whole, dir.bytes(Part::Llm, Kind::BFloat16));
    let two = [Device::Cuda(0), Device::Cuda(1)];
    assert_eq!(sum(&two), whole);
    let shares = room(&dir, &two, Kind::BFloat16).unwrap();
    assert!(shares.iter().all(|(_, bytes)| (31..35).contains(&(bytes / 1_000_000_000))), "{shares:?}");
}
