//! The golden models in the layouts that Emu2 is published in, written out of the committed native ones.

use std::{collections::BTreeMap, fs, path::Path};

use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};

use super::{
    model_dir,
    torch_save::{save, widened},
};

/// What native Emu2-Gen files and rotary buffers are called; published Hugging Face files have neither.
const WRAPPER: &str = "multimodal_encoder.";
const BUFFERS: &str = ".inv_freq";

/// Writes a golden model to `folder` as BAAI/Emu2 is published: two shards with an index, config.json, tokenizer.model.
pub fn hugging_face(model: &str, folder: &Path) {
    let native = Native::read(model);
    native.write_multimodal(folder, "");
    copy_tokenizer(model, folder);
}

/// Writes a golden model to `folder` as BAAI/Emu2 was published first: the files of [`hugging_face`] with pickled
/// shards of float32. Its values were bfloat16's, so that rounding changes nothing.
pub fn pickled(model: &str, folder: &Path) {
    hugging_face(model, folder);
    let index = folder.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).expect("it was just written");
    let text = text.replace("model-0", "pytorch_model-0").replace(".safetensors", ".bin");
    fs::write(folder.join("pytorch_model.bin.index.json"), text).expect("the file can be written");
    fs::remove_file(index).expect("it was just written");
    for shard in ["00001-of-00002", "00002-of-00002"] {
        let path = folder.join(format!("model-{shard}.safetensors"));
        let saved = save(&widened(&fs::read(&path).expect("it was just written")));
        fs::write(folder.join(format!("pytorch_model-{shard}.bin")), saved).expect("the file can be written");
        fs::remove_file(path).expect("it was just written");
    }
}

/// Writes the golden emu2-gen to `folder` as BAAI/Emu2-Gen is published: a folder for each part, files of the variant
/// bf16.
pub fn diffusers(folder: &Path) {
    let native = Native::read("emu2-gen");
    native.write_multimodal(&folder.join("multimodal_encoder"), "bf16");
    for part in ["unet", "vae"] {
        let prefix = format!("{part}.");
        let tensors = native.tensors().into_iter();
        let tensors = tensors.filter_map(|(name, view)| Some((name.strip_prefix(&prefix)?.to_owned(), view)));
        let path = folder.join(part).join("diffusion_pytorch_model.bf16.safetensors");
        write_tensors(&path, tensors.collect());
        write_json(&folder.join(part).join("config.json"), &native.config[part]);
    }
    write_json(&folder.join("scheduler/scheduler_config.json"), &native.config["scheduler"]);
    let index = json!({
        "_class_name": ["pipeline_emu2_gen", "EmuVisualGenerationPipeline"],
        "multimodal_encoder": ["modeling_emu", "EmuForCausalLM"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    write_json(&folder.join("model_index.json"), &index);
    copy_tokenizer("emu2-gen", &folder.join("tokenizer"));
}

/// Writes a golden model to `folder` with the visual encoder of another, as published models share theirs; in the
/// native layout.
pub fn with_visual_of(model: &str, other: &str, folder: &Path) {
    let (native, other) = (Native::read(model), Native::read(other));
    let plain = |name: String| name.strip_prefix(WRAPPER).map_or(name.clone(), str::to_owned);
    let is_visual = |name: &str| name.starts_with("visual.");
    let own = native.tensors().into_iter().map(|(name, view)| (plain(name), view));
    let own = own.filter(|(name, _)| !is_visual(name));
    let others = other.tensors().into_iter().map(|(name, view)| (plain(name), view));
    let tensors = own.chain(others.filter(|(name, _)| is_visual(name)));
    write_tensors(&folder.join("model.safetensors"), tensors.collect());
    write_json(&folder.join("config.json"), &Value::Object(native.config.clone()));
    copy_tokenizer(model, folder);
}

struct Native {
    config: Map<String, Value>,
    bytes: Vec<u8>,
}

impl Native {
    fn read(model: &str) -> Self {
        let folder = model_dir(model);
        let config = fs::read(folder.join("config.json")).expect("a golden model has a config.json");
        let config = serde_json::from_slice(&config).expect("it is an object");
        let bytes = fs::read(folder.join("model.safetensors")).expect("a golden model has weights");
        Self { config, bytes }
    }

    fn tensors(&self) -> BTreeMap<String, TensorView<'_>> {
        let file = SafeTensors::deserialize(&self.bytes).expect("golden weights are safetensors");
        file.tensors().into_iter().collect()
    }

    /// Writes the multimodal model's part of the files, every second tensor to the second shard.
    fn write_multimodal(&self, folder: &Path, variant: &str) {
        let dot = if variant.is_empty() { "" } else { "." };
        let mut shards = [BTreeMap::new(), BTreeMap::new()];
        let mut weight_map = BTreeMap::new();
        let names = |name: &str| hugging_face_name(name.strip_prefix(WRAPPER).unwrap_or(name));
        let renamed = self.tensors().into_iter().filter_map(|(name, view)| Some((names(&name)?, view)));
        for (place, (name, view)) in renamed.enumerate() {
            let shard = place % 2;
            let file = format!("model{dot}{variant}-{:05}-of-00002.safetensors", shard + 1);
            weight_map.insert(name.clone(), file);
            shards[shard].insert(name, view);
        }
        for (shard, tensors) in shards.into_iter().enumerate() {
            let file = format!("model{dot}{variant}-{:05}-of-00002.safetensors", shard + 1);
            write_tensors(&folder.join(file), tensors);
        }
        let index = json!({ "metadata": {}, "weight_map": weight_map });
        write_json(&folder.join(format!("model.safetensors.index{dot}{variant}.json")), &index);
        let mut config = self.config["llama"].clone();
        config["architectures"] = json!(["EmuForCausalLM"]);
        config["model_type"] = json!("Emu");
        config["model_version"] = json!(if self.config["instruct"] == true { "chat" } else { "base" });
        config["vision_config"] = self.config["vision"].clone();
        write_json(&folder.join("config.json"), &config);
    }
}

fn hugging_face_name(native: &str) -> Option<String> {
    if native.ends_with(BUFFERS) {
        return None;
    }
    match native.split_once('.')?.0 {
        "visual" | "decoder" => Some(format!("model.{native}")),
        "project_up" | "project_down" => Some(native.to_owned()),
        _ => None,
    }
}

fn copy_tokenizer(model: &str, folder: &Path) {
    fs::create_dir_all(folder).expect("the folder can be made");
    fs::copy(model_dir(model).join("tokenizer.model"), folder.join("tokenizer.model"))
        .expect("it can be copied");
}

fn write_tensors(path: &Path, tensors: BTreeMap<String, TensorView<'_>>) {
    fs::create_dir_all(path.parent().expect("it is in a folder")).expect("the folder can be made");
    safetensors::serialize_to_file(tensors, None, path).expect("the file can be written");
}

fn write_json(path: &Path, value: &Value) {
    fs::create_dir_all(path.parent().expect("it is in a folder")).expect("the folder can be made");
    fs::write(path, value.to_string()).expect("the file can be written");
}
