//! Folders as people have them, and as they must not be.

use std::{collections::HashMap, fs, os::unix::fs::symlink, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use tch::{Device, Kind};
use tempfile::TempDir;

use tch::nn::VarStore;

use super::*;

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

/// Small bfloat16 weights of ones.
fn write_weights(path: &Path, tensors: &[(&str, &[usize])]) {
    let one = half::bf16::ONE.to_le_bytes();
    let data: Vec<_> = tensors.iter().map(|(_, shape)| one.repeat(shape.iter().product())).collect();
    let views: HashMap<_, _> = tensors
        .iter()
        .zip(&data)
        .map(|((name, shape), data)| (*name, TensorView::new(Dtype::BF16, shape.to_vec(), data).unwrap()))
        .collect();
    safetensors::serialize_to_file(&views, None, path).unwrap();
}

fn error(folder: &TempDir) -> CheckpointError {
    ModelDir::open(folder.path()).unwrap_err()
}

/// As a model that uses every weight would load it.
fn load(dir: &Rc<ModelDir>, part: Part) -> Result<String, CheckpointError> {
    let w = dir.weights(part, Device::Cpu, Kind::Float);
    for (name, entry) in dir.entries_of(part) {
        let _ = w.get(name, &entry.shape);
    }
    w.finish()
}

#[cfg(feature = "golden")]
mod golden {
    use super::*;
    use crate::golden::{self, model_dir};

    fn digests(path: &Path) -> Vec<(Part, String)> {
        let dir = ModelDir::open(path).unwrap();
        let parts = Part::ALL.into_iter().filter(|&part| dir.has(part));
        parts.map(|part| (part, load(&dir, part).unwrap())).collect()
    }

    /// That two folders are one model to everyone who loads it.
    fn assert_same(path: &Path, layout: Layout, native: &str) {
        let (dir, native) = (ModelDir::open(path).unwrap(), ModelDir::open(&model_dir(native)).unwrap());
        assert_eq!((dir.layout(), native.layout()), (layout, Layout::Native));
        assert_eq!((dir.name(), dir.instruct()), (native.name(), native.instruct()));
        assert_eq!(dir.value("instruct").unwrap(), Some(native.instruct()));
        let section = |dir: &ModelDir, name| dir.section::<Map<String, Value>>(name).unwrap();
        for (name, keys) in [
            (
                "vision",
                &["image_size", "patch_size", "width", "layers", "head_width", "n_query", "v_query"][..],
            ),
            (
                "llama",
                &["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "rms_norm_eps"],
            ),
            ("unet", &["block_out_channels", "cross_attention_dim"]),
            ("vae", &["block_out_channels", "scaling_factor"]),
            ("scheduler", &["beta_start", "steps_offset"]),
        ] {
            let (section, expected) = (section(&dir, name), section(&native, name));
            for &key in keys {
                assert_eq!(section.get(key), expected.get(key), "{name}.{key}");
            }
        }
        assert_eq!(digests(path), digests(native.path()));
        assert_eq!(dir.unknown(), [""; 0]);
        // The official copy of Emu2 comes without.
        if dir.tokenizer_path().unwrap().exists() {
            assert_eq!(dir.tokenizer_bytes().unwrap(), native.tokenizer_bytes().unwrap());
        }
    }

    #[test]
    fn a_hugging_face_folder_is_the_same_model() {
        for model in ["emu2-base", "emu2-chat"] {
            let folder = tempfile::tempdir().unwrap();
            golden::hugging_face(model, folder.path());
            assert_same(folder.path(), Layout::HuggingFace, model);
        }
    }

    #[test]
    fn a_diffusers_folder_is_the_same_model() {
        let folder = tempfile::tempdir().unwrap();
        golden::diffusers(folder.path());
        assert_same(folder.path(), Layout::Diffusers, "emu2-gen");
        // The safety checker and a second variant are left alone.
        fs::create_dir(folder.path().join("safety_checker")).unwrap();
        fs::write(folder.path().join("safety_checker/model.bf16.safetensors"), "x").unwrap();
        fs::write(folder.path().join("unet/diffusion_pytorch_model.safetensors"), "x").unwrap();
        assert_same(folder.path(), Layout::Diffusers, "emu2-gen");
        // One pool needs only its own part.
        fs::remove_dir_all(folder.path().join("multimodal_encoder")).unwrap();
        let dir = ModelDir::open(folder.path()).unwrap();
        let parts: Vec<_> = dir.contents().iter().map(|contents| contents.part).collect();
        assert_eq!(parts, [Part::Unet, Part::Vae]);
    }

    #[test]
    fn the_official_copies_are_the_same_models() {
        for (copy, layout, native) in
            [("hf/Emu2", Layout::HuggingFace, "emu2-base"), ("hf/Emu2-Gen", Layout::Diffusers, "emu2-gen")]
        {
            match golden::shared(copy) {
                Some(path) => assert_same(&path, layout, native),
                None => println!("skipped: {copy} is not beside this project"),
            }
        }
    }

    #[test]
    fn the_same_weights_are_known_in_any_layout() {
        let (drawing, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        golden::diffusers(drawing.path());
        golden::with_visual_of("emu2-chat", "emu2-gen", other.path());
        let open = |path: &Path| ModelDir::open(path).unwrap();
        let (native, chat) = (open(&model_dir("emu2-gen")), open(&model_dir("emu2-chat")));
        let (drawing, grafted) = (open(drawing.path()), open(other.path()));
        let same = |one: &Rc<ModelDir>, other: &Rc<ModelDir>, part| {
            let kinds = [Kind::Float, Kind::BFloat16];
            let [wide, narrow] = kinds.map(|kind| one.has_weights_of(other, part, kind));
            assert_eq!(wide, narrow);
            wide
        };
        for part in Part::ALL {
            assert!(same(&native, &drawing, part) && same(&native, &native, part), "{part}");
        }
        assert!(same(&grafted, &drawing, Part::Visual) && same(&grafted, &chat, Part::Llm));
        assert!(!same(&grafted, &chat, Part::Visual) && !same(&grafted, &drawing, Part::Llm));
        assert!(!same(&chat, &drawing, Part::Unet), "one has none");
        assert_eq!(load(&grafted, Part::Visual).unwrap(), load(&drawing, Part::Visual).unwrap());
        let random = |size: &str| open(Path::new(size));
        assert!(same(&random("random:emu2-tiny"), &random("random:emu2-tiny,seed=0"), Part::Visual));
        assert!(!same(&random("random:emu2-tiny"), &random("random:emu2-tiny,seed=1"), Part::Visual));
        assert!(!same(&random("random:emu2-tiny"), &random("random:emu2-third"), Part::Visual));
        assert!(!same(&random("random:emu2-tiny"), &drawing, Part::Visual));
    }

    #[test]
    fn a_truncated_shard_is_named() {
        let folder = tempfile::tempdir().unwrap();
        golden::hugging_face("emu2-base", folder.path());
        let path = folder.path().join("model-00002-of-00002.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 2]).unwrap();
        let error = error(&folder);
        assert!(matches!(&error, CheckpointError::Weights { path: named, .. } if *named == path), "{error}");
    }

    #[test]
    fn shards_and_index_must_agree() {
        let folder = tempfile::tempdir().unwrap();
        golden::hugging_face("emu2-base", folder.path());
        let shard = |number| folder.path().join(format!("model-0000{number}-of-00002.safetensors"));
        let swapped = folder.path().join("swapped");
        fs::rename(shard(1), &swapped).unwrap();
        fs::rename(shard(2), shard(1)).unwrap();
        fs::rename(&swapped, shard(2)).unwrap();
        let text = error(&folder).to_string();
        assert!(
            text.contains("stands in model-00001-of-00002.safetensors, but is listed for model-00002"),
            "{text}"
        );
        assert!(text.contains("more") && text.len() < 5000, "{text}");

        fs::remove_file(shard(2)).unwrap();
        let text = error(&folder).to_string();
        assert!(text.contains("names model-00002-of-00002.safetensors, which is absent"), "{text}");
    }

    #[test]
    fn a_model_that_is_trained_is_a_native_checkpoint() {
        use tch::nn::{AdamW, OptimizerConfig};
        let folder = tempfile::tempdir().unwrap();
        golden::diffusers(folder.path());
        let dir = ModelDir::open(folder.path()).unwrap();
        let variables = Rc::new(VarStore::new(Device::Cpu));
        for part in Part::ALL {
            let w = dir.trainable(part, &variables, Kind::Float);
            dir.entries_of(part).for_each(|(name, entry)| {
                let _ = w.get(name, &entry.shape);
            });
            w.finish().unwrap();
        }
        let before = variables.variables();
        let bias = before["unet.conv_in.bias"].copy();
        assert!(bias.size() == [16] && before["project_up.weight"].requires_grad());
        let mut optimizer = AdamW::default().build(&variables, 0.1).unwrap();
        optimizer.backward_step(&variables.variables()["unet.conv_in.bias"].square().sum(Kind::Float));

        let saved = tempfile::tempdir().unwrap();
        variables.save(saved.path().join("model.safetensors")).unwrap();
        fs::write(saved.path().join("config.json"), "{}").unwrap();
        let native = ModelDir::open(saved.path()).unwrap();
        let counts = |dir: &ModelDir| dir.contents().iter().map(|part| part.values).collect::<Vec<_>>();
        assert_eq!(counts(&native), counts(&dir));
        let digests = [Part::Visual, Part::Llm].map(|part| load(&native, part).unwrap());
        assert_eq!(digests, [Part::Visual, Part::Llm].map(|part| load(&dir, part).unwrap()));
        let trained = native.weights(Part::Unet, Device::Cpu, Kind::Float).get("conv_in.bias", &[16]);
        assert!((trained - bias).abs().max().double_value(&[]) > 0.05);
    }

    #[test]
    fn progress_reaches_the_end_whatever_is_skipped() {
        let dir = ModelDir::open(&model_dir("emu2-gen")).unwrap();
        dir.prepare(&[Part::Unet, Part::Vae], Device::Cpu, Kind::Float).unwrap();
        let total = dir.bytes(Part::Unet, Kind::Float) + dir.bytes(Part::Vae, Kind::Float);
        assert_eq!((dir.progress().bytes_total(), dir.progress().percent()), (total, 0));
        load(&dir, Part::Unet).unwrap();
        assert!((50..100).contains(&dir.progress().percent()), "{}", dir.progress());
        let w = dir.weights(Part::Vae, Device::Cpu, Kind::Float);
        w.skip("encoder");
        w.skip("quant_conv");
        for (name, entry) in dir
            .entries_of(Part::Vae)
            .filter(|(name, _)| name.starts_with("decoder.") || name.starts_with("post_quant"))
        {
            let _ = w.get(name, &entry.shape);
        }
        w.finish().unwrap();
        assert_eq!((dir.progress().bytes_done(), dir.progress().percent()), (total, 100));
    }
}

#[test]
fn published_native_files_need_no_configuration() {
    let embedding = "decoder.lm.model.embed_tokens.weight";
    let queries = |dir: &ModelDir| dir.section::<HashMap<String, u32>>("vision").unwrap();
    let vocabulary = |dir: &ModelDir| dir.section::<HashMap<String, i64>>("llama").unwrap()["vocab_size"];
    for (rows, name, instruct) in [(32_272, "emu2", false), (32_274, "emu2-chat", true)] {
        let folder = folder(&[]);
        let path = folder.path().join("Emu2_pytorch_model.bf16.safetensors");
        write_weights(&path, &[(embedding, &[rows, 1])]);
        let dir = ModelDir::open(folder.path()).unwrap();
        assert_eq!((dir.layout(), dir.name(), dir.instruct()), (Layout::Native, name, instruct));
        assert_eq!(vocabulary(&dir), rows as i64);
        let expected = [("n_query".to_owned(), 256), ("v_query".to_owned(), 64)];
        assert_eq!(queries(&dir), if instruct { HashMap::from(expected) } else { HashMap::new() });
        assert_eq!(dir.tokenizer_path(), Some(&*folder.path().join("tokenizer.model")));
    }
    let folder = folder(&[]);
    let generates =
        [("multimodal_encoder.decoder.lm.model.embed_tokens.weight", &[32_272, 1][..]), ("unet.a", &[1])];
    write_weights(&folder.path().join("Emu2-Gen_pytorch_model.bf16.safetensors"), &generates);
    let dir = ModelDir::open(folder.path()).unwrap();
    assert_eq!((dir.name(), dir.instruct()), ("emu2-gen", false));
}

#[test]
fn the_chat_model_of_hugging_face_has_its_queries() {
    let config = r#"{"model_type": "Emu", "model_version": "chat", "hidden_size": 8, "vision_config": {"v_query": 32}}"#;
    let folder =
        folder(&[("config.json", config), ("added_tokens.json", r#"{"[PAD]": 32000, "[IMG]": 32001}"#)]);
    write_weights(&folder.path().join("model.safetensors"), &[("model.visual.a", &[1])]);
    let dir = ModelDir::open(folder.path()).unwrap();
    assert_eq!((dir.layout(), dir.name(), dir.instruct()), (Layout::HuggingFace, "emu2-chat", true));
    let vision: HashMap<String, u32> = dir.section("vision").unwrap();
    assert_eq!((vision["n_query"], vision["v_query"]), (256, 32));
    let tokens = dir.added_tokens().unwrap().unwrap();
    assert_eq!((tokens.len(), tokens["[IMG]"]), (2, 32_001));
    fs::write(folder.path().join("added_tokens.json"), r#"{"[PAD]": "x"}"#).unwrap();
    assert!(matches!(dir.added_tokens(), Err(CheckpointError::Tokenizer { .. })));
    fs::remove_file(folder.path().join("added_tokens.json")).unwrap();
    assert_eq!(dir.added_tokens().unwrap(), None);
    let error = dir.tokenizer_bytes().unwrap_err();
    assert!(error.to_string().contains("tokenizer.model"), "{error}");

    fs::write(folder.path().join("config.json"), config.replace("chat", "chatty")).unwrap();
    let error = self::error(&folder).to_string();
    assert!(error.contains("`model_version` must be base or chat"), "{error}");
}

#[test]
fn another_family_is_told_by_name() {
    for (file, text, family) in [
        (
            "config.json",
            r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}"#,
            "llama (LlamaForCausalLM)",
        ),
        ("config.json", r#"{"model_type": "Emu3"}"#, "Emu3"),
        ("config.json", r#"{"architectures": ["Qwen2ForCausalLM"]}"#, "Qwen2ForCausalLM"),
        ("config.json", r#"{"_class_name": "UNet2DConditionModel"}"#, "UNet2DConditionModel"),
        ("model_index.json", r#"{"_class_name": "StableDiffusionXLPipeline"}"#, "StableDiffusionXLPipeline"),
    ] {
        let error = error(&folder(&[(file, text), ("model.safetensors", "")]));
        assert!(matches!(error, CheckpointError::Foreign { .. }), "{error}");
        assert!(error.to_string().ends_with(&format!("it looks like {family}")), "{error}");
    }
    let foreign = r#"{"model_type": "llava"}"#;
    let gen_like = folder(&[
        ("model_index.json", r#"{"multimodal_encoder": []}"#),
        ("multimodal_encoder/config.json", foreign),
    ]);
    assert!(error(&gen_like).to_string().contains("multimodal_encoder: not Emu2: it looks like llava"));
    for config in [&[][..], &[("config.json", "{}")]] {
        let folder = folder(config);
        write_weights(
            &folder.path().join("model.safetensors"),
            &[("model.layers.0.mlp.up_proj.weight", &[1])],
        );
        let error = error(&folder);
        assert!(matches!(error, CheckpointError::Foreign { .. }), "{error}");
        assert!(error.to_string().contains("`model.layers.0.mlp.up_proj.weight`"), "{error}");
    }
}

#[test]
fn a_folder_without_a_model_says_what_it_lacks() {
    assert!(matches!(error(&folder(&[("README.md", "")])), CheckpointError::NotAModel(_)));
    let emu = r#"{"model_type": "Emu"}"#;
    assert!(matches!(error(&folder(&[("config.json", emu)])), CheckpointError::NoWeights(_)));
    let pickled = [("config.json", emu), ("pytorch_model-00001-of-00015.bin", "")];
    assert!(matches!(error(&folder(&pickled)), CheckpointError::Pickled { .. }));
    assert!(matches!(error(&folder(&pickled[1..])), CheckpointError::Pickled { .. }));
    let parts = r#"{"multimodal_encoder": []}"#;
    assert!(matches!(error(&folder(&[("model_index.json", parts)])), CheckpointError::NoWeights(_)));
    for text in ["[]", "{", ""] {
        assert!(matches!(error(&folder(&[("config.json", text)])), CheckpointError::Config { .. }), "{text}");
    }
    assert!(matches!(ModelDir::open(Path::new("no/such/folder")), Err(CheckpointError::Io { .. })));
}

#[test]
fn a_name_that_the_index_does_not_list_is_refused() {
    let index = json!({ "weight_map": { "model.visual.a": "model-1.safetensors", "model.visual.b": "model-1.safetensors" } });
    let folder = folder(&[
        ("config.json", r#"{"model_type": "Emu"}"#),
        ("model.safetensors.index.json", &index.to_string()),
    ]);
    let names =
        ["model.visual.a", "model.visual.c", "model.decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq"];
    write_weights(&folder.path().join("model-1.safetensors"), &names.map(|name| (name, &[1][..])));
    let CheckpointError::Index { problems, .. } = error(&folder) else { panic!("another error") };
    assert_eq!(
        problems,
        [
            "`model.visual.c` stands in model-1.safetensors, but is not listed",
            "model-1.safetensors has no `model.visual.b`"
        ]
    );
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_read() {
    // A terabyte of nothing: no byte of it is stored.
    const VALUES: u64 = 1 << 38;
    let header =
        json!({ "visual.a": { "dtype": "F32", "shape": [VALUES], "data_offsets": [0, 4 * VALUES] } })
            .to_string();
    let header = format!("{header:<0$}", header.len().next_multiple_of(8));
    let model = folder(&[("config.json", "{}")]);
    let path = model.path().join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + 4 * VALUES).unwrap();

    let dir = ModelDir::open(model.path()).unwrap();
    let w = dir.weights(Part::Visual, Device::Cpu, Kind::BFloat16);
    assert_eq!(w.get("a", &[VALUES as i64]).size(), [VALUES as i64]);
    let error = w.finish().unwrap_err();
    assert!(
        matches!(&error, CheckpointError::NoRoom { source, .. } if source.needed == 2 * VALUES),
        "{error}"
    );
    assert!(error.to_string().contains("549.8 GB are needed on cpu, where"), "{error}");
    assert_eq!(dir.progress().bytes_done(), 0);
    let shares = [(Device::Cpu, 1), (Device::Cpu, 4 * VALUES)];
    for prepared in [
        dir.prepare(&[Part::Visual], Device::Cpu, Kind::Float),
        dir.prepare_spread(&[Part::Visual], &shares, Kind::Float),
    ] {
        assert!(matches!(prepared, Err(CheckpointError::NoRoom { source, .. }) if source.place == "cpu"));
    }
}

#[test]
fn files_may_be_links_as_in_a_download_cache() {
    let blobs = folder(&[]);
    write_weights(&blobs.path().join("0a1b"), &[("model.visual.a", &[2])]);
    let model = folder(&[("config.json", r#"{"model_type": "Emu", "name": "mine"}"#)]);
    symlink(blobs.path().join("0a1b"), model.path().join("model.safetensors")).unwrap();
    let dir = ModelDir::open(model.path()).unwrap();
    assert_eq!(dir.name(), "mine");
    let contents = dir.contents();
    assert_eq!(contents.len(), 1);
    let visual = &contents[0];
    assert_eq!((visual.part, visual.tensors, visual.values, visual.bytes), (Part::Visual, 1, 2, 4));
    assert_eq!(visual.dtypes, BTreeSet::from(["BF16".to_owned()]));
    load(&dir, Part::Visual).unwrap();
}
