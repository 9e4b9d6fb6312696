//! Whole conversions, of generated checkpoints and of what PyTorch wrote, and what stops them.

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use emu2_nn::{
    checkpoint::ModelDir,
    golden::{
        self,
        torch_save::{Saved, save, widened},
    },
};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

mod hostile;
mod space;

/// dtype, shape and bytes by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/pickled").join(name)
}

fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(owned).collect()
}

/// All tensors of a converted folder, as its index lists them.
fn converted(folder: &Path) -> Tensors {
    let index = fs::read(folder.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let mut tensors = Tensors::new();
    let mut files: BTreeMap<&str, Tensors> = BTreeMap::new();
    for (name, file) in index["weight_map"].as_object().unwrap() {
        let file = file.as_str().unwrap();
        let held = files.entry(file).or_insert_with(|| read(&folder.join(file)));
        tensors.insert(name.clone(), held.remove(name).unwrap());
    }
    assert!(files.values().all(BTreeMap::is_empty), "all tensors are listed");
    let bytes: usize = tensors.values().map(|(_, _, data)| data.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    tensors
}

fn bf16(saved: &Saved) -> Vec<u8> {
    let values = saved.data.as_chunks().0.iter();
    values.flat_map(|value| half::bf16::from_f32(f32::from_le_bytes(*value)).to_le_bytes()).collect()
}

fn conversion(input: &Path, output: &Path) -> Conversion {
    Conversion { input: input.to_owned(), output: output.to_owned(), shard_bytes: SHARD_BYTES }
}

fn run(conversion: &Conversion) -> Result<Summary> {
    conversion.run(&mut |_| {})
}

fn error(conversion: &Conversion) -> String {
    format!("{:#}", run(conversion).unwrap_err())
}

fn published(model: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    golden::pickled(model, folder.path());
    folder
}

/// Five small tensors in two pickled files, which become five shards at 8 bytes each.
fn small() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tensor = |number: usize| Saved::f32s(&format!("t{number}"), &[4], [number as f32, 0.5, -1.0, 1e9]);
    fs::write(folder.path().join("a.bin"), save(&[tensor(0), tensor(1), tensor(2)])).unwrap();
    fs::write(folder.path().join("b.bin"), save(&[tensor(3), tensor(4)])).unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    folder
}

fn small_conversion(input: &Path, output: &Path) -> Conversion {
    Conversion { shard_bytes: 8, ..conversion(input, output) }
}

/// Names and contents of all files.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

#[test]
fn published_pickles_become_what_the_native_file_holds() {
    let input = published("emu2-chat");
    fs::write(input.path().join("added_tokens.json"), "{}").unwrap();
    fs::write(input.path().join("modeling_emu.py"), "import os").unwrap();
    let out = tempfile::tempdir().unwrap();
    let done = run(&conversion(input.path(), out.path())).unwrap();
    assert_eq!((done.shards, done.kept), (2, 0));

    let native = widened(&fs::read(golden::model_dir("emu2-chat").join("model.safetensors")).unwrap());
    let mut tensors = converted(out.path());
    for saved in native.iter().filter(|saved| !saved.name.ends_with("inv_freq")) {
        let name = match saved.name.split_once('.').unwrap().0 {
            "visual" | "decoder" => format!("model.{}", saved.name),
            _ => saved.name.clone(),
        };
        let (dtype, shape, data) = tensors.remove(&name).unwrap();
        assert_eq!((dtype, &shape), (Dtype::BF16, &saved.shape), "{name}");
        assert_eq!(data, bf16(saved), "{name}");
        let widened: Vec<u8> = (data.as_chunks().0.iter())
            .flat_map(|v| half::bf16::from_le_bytes(*v).to_f32().to_le_bytes())
            .collect();
        assert_eq!(widened, saved.data, "{name}: golden weights are exact in bfloat16");
    }
    assert_eq!(tensors.keys().collect::<Vec<_>>(), [""; 0]);

    let dir = ModelDir::open(out.path()).unwrap();
    assert_eq!((dir.name(), dir.instruct()), ("emu2-chat", true));
    assert!(dir.tokenizer_bytes().is_ok() && dir.added_tokens().unwrap().is_some());
    assert!(!out.path().join("modeling_emu.py").exists(), "code is not copied");
}

#[test]
fn what_pytorch_writes_is_read_as_pytorch_rounds_it() {
    for name in ["state.bin", "state-protocol4.bin"] {
        let (input, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::copy(fixture(name), input.path().join("pytorch_model.bin")).unwrap();
        run(&conversion(input.path(), out.path())).unwrap();
        assert_eq!(converted(out.path()), read(&fixture("expected.safetensors")), "{name}");
    }
    let input = tempfile::tempdir().unwrap();
    fs::copy(fixture("legacy.bin"), input.path().join("pytorch_model.bin")).unwrap();
    let error = error(&conversion(input.path(), &input.path().join("out")));
    assert!(error.contains("PyTorch before 1.6"), "{error}");
}

#[test]
fn a_diffusers_folder_keeps_its_parts() {
    let (input, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    golden::diffusers(input.path());
    let wide =
        widened(&fs::read(input.path().join("unet/diffusion_pytorch_model.bf16.safetensors")).unwrap());
    fs::remove_file(input.path().join("unet/diffusion_pytorch_model.bf16.safetensors")).unwrap();
    fs::write(input.path().join("unet/diffusion_pytorch_model.bin"), save(&wide)).unwrap();
    let out = out.path().join("new/folder");
    run(&conversion(input.path(), &out)).unwrap();
    let contents = |path: &Path| {
        let contents = ModelDir::open(path).unwrap().contents();
        contents.iter().map(|part| (part.part, part.tensors, part.values)).collect::<Vec<_>>()
    };
    assert_eq!(contents(&out), contents(&golden::model_dir("emu2-gen")));
    assert!(out.join("unet/diffusion_pytorch_model-00001-of-00001.safetensors").exists());
    assert!(out.join("scheduler/scheduler_config.json").exists() && out.join("model_index.json").exists());
}

#[test]
fn float32_safetensors_become_narrow_and_an_output_inside_is_no_input() {
    let input = tempfile::tempdir().unwrap();
    let values: Vec<u8> = [1.0_f32, 1.0 / 3.0, f32::NAN].into_iter().flat_map(f32::to_le_bytes).collect();
    let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![3], &values).unwrap();
    safetensors::serialize_to_file([("visual.x", view)], None, &input.path().join("model.safetensors"))
        .unwrap();
    let conversion = conversion(input.path(), &input.path().join("out"));
    run(&conversion).unwrap();
    let (dtype, shape, data) = converted(&conversion.output).remove("visual.x").unwrap();
    assert_eq!((dtype, shape), (Dtype::BF16, vec![3]));
    let values: Vec<f32> =
        data.as_chunks().0.iter().map(|v| half::bf16::from_le_bytes(*v).to_f32()).collect();
    assert_eq!(values[..2], [1.0, 0.333_984_38]);
    assert!(values[2].is_nan());
    // The second time, OUT is there and holds weights.
    assert_eq!(run(&conversion).unwrap().kept, 1);
}

#[test]
fn a_native_file_is_converted_alone() {
    let input = tempfile::tempdir().unwrap();
    let native = golden::model_dir("emu2-chat");
    let wide = widened(&fs::read(native.join("model.safetensors")).unwrap());
    let [blob, link] = ["0a1b2c", "Emu2-Chat_pytorch_model.bf16.bin"].map(|name| input.path().join(name));
    fs::write(&blob, save(&wide)).unwrap();
    std::os::unix::fs::symlink(&blob, &link).unwrap();
    for name in ["config.json", "tokenizer.model"] {
        fs::copy(native.join(name), input.path().join(name)).unwrap();
    }
    fs::write(input.path().join("holiday.json"), "{}").unwrap();
    fs::write(input.path().join("other.bin"), "").unwrap();
    // In shards, as a file that is too large for one.
    let out = input.path().join("out");
    let done = run(&Conversion { shard_bytes: 1 << 20, ..conversion(&link, &out) }).unwrap();
    assert!(done.shards > 1, "{done:?}");
    let contents = |path: &Path| {
        let dir = ModelDir::open(path).unwrap();
        assert!(dir.tokenizer_bytes().is_ok() && dir.name() == "emu2-chat");
        dir.contents().iter().map(|part| (part.part, part.tensors, part.values)).collect::<Vec<_>>()
    };
    assert_eq!(contents(&out), contents(&native));
    assert!(!out.join("holiday.json").exists());
    let missing = error(&conversion(&input.path().join("no.bin"), &out));
    assert!(missing.contains("no.bin") && missing.contains("No such file"), "{missing}");
}

#[test]
fn another_family_is_named_before_anything_is_written() {
    let input = small();
    let out = input.path().join("out");
    let config = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}"#;
    fs::write(input.path().join("config.json"), config).unwrap();
    let error = error(&small_conversion(input.path(), &out));
    assert!(error.ends_with("not Emu2: it looks like llama (LlamaForCausalLM)"), "{error}");
    assert!(!out.exists());
}

#[test]
fn a_conversion_goes_on_where_it_was_stopped() {
    let input = small();
    let whole = tempfile::tempdir().unwrap();
    assert_eq!(
        run(&small_conversion(input.path(), whole.path())).unwrap(),
        Summary { shards: 5, kept: 0, bytes: 40 }
    );
    let whole = files(whole.path());
    assert!(whole.contains_key(Path::new("checksums.json")) && whole.len() == 8, "{:?}", whole.keys());

    // As kill -9 does: nothing runs after the event at which it stops.
    let mut stops = 0;
    loop {
        let out = tempfile::tempdir().unwrap();
        let conversion = small_conversion(input.path(), out.path());
        let (mut events, mut finished) = (0, 0);
        let stopped = catch_unwind(AssertUnwindSafe(|| {
            conversion.run(&mut |event| {
                finished += usize::from(matches!(event, Event::Finished));
                events += 1;
                assert!(events <= stops, "stopped here");
            })
        }));
        let kept = run(&conversion).unwrap().kept;
        assert_eq!(kept, finished, "after {stops} events");
        assert_eq!(files(out.path()), whole, "after {stops} events");
        if stopped.is_ok() {
            break;
        }
        stops += 1;
    }
    assert_eq!(stops, 1 + 3 * 5);
}

#[test]
fn a_finished_shard_is_verified_and_not_rewritten() {
    let (input, out) = (small(), tempfile::tempdir().unwrap());
    let conversion = small_conversion(input.path(), out.path());
    run(&conversion).unwrap();
    let whole = files(out.path());
    let shard = |number: u32| out.path().join(format!("model-{number:05}-of-00005.safetensors"));
    let modified = |number| fs::metadata(shard(number)).unwrap().modified().unwrap();
    let before = modified(1);

    let mut damaged = fs::read(shard(2)).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(shard(2), damaged).unwrap();
    fs::write(shard(3), "short").unwrap();
    fs::remove_file(shard(4)).unwrap();
    let mut named = Vec::new();
    let done = conversion.run(&mut |event| {
        if let Event::Damaged(path) = event {
            named.push(path.to_owned());
        }
    });
    assert_eq!(done.unwrap().kept, 2);
    assert_eq!(named.len(), 3, "{named:?}");
    assert_eq!(files(out.path()), whole);
    assert_eq!(modified(1), before);
}

#[test]
fn a_folder_of_something_else_is_left_alone() {
    let (input, out) = (small(), tempfile::tempdir().unwrap());
    let conversion = small_conversion(input.path(), out.path());
    fs::write(out.path().join("thesis.txt"), "").unwrap();
    assert!(error(&conversion).contains("is neither empty nor an earlier conversion: it holds thesis.txt"));
    fs::remove_file(out.path().join("thesis.txt")).unwrap();
    run(&conversion).unwrap();

    let held = lock(&out.path().canonicalize().unwrap()).unwrap();
    assert!(error(&conversion).contains("another conversion writes to"));
    drop(held);
    fs::write(input.path().join("b.bin"), save(&[Saved::f32s("t3", &[1], [0.0])])).unwrap();
    assert!(error(&conversion).contains("was begun from other files"));
    fs::write(out.path().join("checksums.json"), r#"{"md5": {}}"#).unwrap();
    assert!(error(&conversion).contains("checksums.json is no record of a conversion"));
    let same = self::conversion(input.path(), input.path());
    assert!(error(&same).contains("IN and OUT are the same folder"));
}

#[test]
fn what_is_missing_is_named() {
    let out = tempfile::tempdir().unwrap();
    let shard = "pytorch_model-00002-of-00002.bin";
    let input = published("emu2-base");
    let path = input.path().join(shard);
    let bytes = fs::read(&path).unwrap();
    for cut in [bytes.len() - 1, bytes.len() / 2, 10, 0] {
        fs::write(&path, &bytes[..cut]).unwrap();
        let error = error(&conversion(input.path(), out.path()));
        assert!(error.contains(shard) && error.contains("cut short"), "{cut}: {error}");
    }
    fs::remove_file(&path).unwrap();
    let error = error(&conversion(input.path(), out.path()));
    assert!(error.contains(&format!("names {shard}, which is absent")), "{error}");
    assert_eq!(files(out.path()).len(), 0, "nothing was begun");
}

#[test]
fn shards_that_contradict_each_other_are_refused() {
    let (input, out) = (small(), tempfile::tempdir().unwrap());
    let conversion = small_conversion(input.path(), out.path());
    let index = |map: Value| {
        let text = json!({ "weight_map": map }).to_string();
        fs::write(input.path().join("pytorch_model.bin.index.json"), text).unwrap();
    };
    index(json!({ "t0": "b.bin", "t9": "a.bin", "t3": "b.bin", "t4": "b.bin" }));
    let text = error(&conversion);
    for problem in [
        "`t0` stands in a.bin, but is listed for b.bin",
        "a.bin has no `t9`",
        "`t1` stands in a.bin, but is not listed",
    ] {
        assert!(text.contains(problem), "{problem} not in {text}");
    }
    index(json!({ "t0": "../a.bin" }));
    assert!(error(&conversion).contains("names ../a.bin, which is absent"));
    fs::remove_file(input.path().join("pytorch_model.bin.index.json")).unwrap();
    fs::copy(input.path().join("a.bin"), input.path().join("c.bin")).unwrap();
    assert!(error(&conversion).contains("`t0` stands in a.bin and in c.bin"));
    let empty = tempfile::tempdir().unwrap();
    assert!(error(&self::conversion(empty.path(), out.path())).contains("holds no weights"));
}

#[test]
fn damaged_values_are_noticed() {
    let (input, out) = (small(), tempfile::tempdir().unwrap());
    let path = input.path().join("b.bin");
    let mut bytes = fs::read(&path).unwrap();
    let value = bytes.windows(4).position(|value| value == 3.0_f32.to_le_bytes()).unwrap();
    bytes[value] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = error(&small_conversion(input.path(), out.path()));
    assert!(error.contains("`t3`") && error.contains("the file is damaged"), "{error}");
}
