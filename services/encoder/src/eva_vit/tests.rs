//! Against the official model's numbers on tiny random weights (golden-a, vision.safetensors).

use emu2_nn::golden::{self, Bench, Tolerance, assert_close, forward_tolerance};

use super::*;

fn model_on(bench: Bench) -> EvaVit {
    let dir = ModelDir::open(&golden::model_dir("emu2-base")).unwrap();
    EvaVit::load(&dir, bench.device, bench.kind).unwrap().0
}

fn model() -> EvaVit {
    model_on(Bench::GOLDEN)
}

#[test]
fn every_intermediate_is_upstreams() {
    intermediates_are_upstreams(Bench::of_environment());
}

#[test]
fn every_intermediate_is_upstreams_in_bfloat16() {
    intermediates_are_upstreams(Bench::BF16);
}

fn intermediates_are_upstreams(bench: Bench) {
    let _no_grad = tch::no_grad_guard();
    let golden = golden::file("vision.safetensors");
    let model = model_on(bench);
    let close = |name: &str, got: &Tensor| {
        let want = golden.tensor(name);
        bench.assert_close(name, got, &want, Tolerance::new(forward_tolerance(&want), &want));
    };
    let given = |name: &str| bench.put(&golden.tensor(name));
    let pixels = given("pixels");
    close("patch_embed", &model.patch_embed.forward(&pixels));
    let mut x = model.embed(&pixels);
    close("embed_plus_pos", &x);
    for (index, block) in model.blocks.iter().enumerate() {
        if index == 0 {
            // Each piece on upstream's own input, so that one mistake does not hide behind another.
            let attn = block.attn.forward(&given("embed_plus_pos"));
            close("block0.attn", &attn);
            close("block0.norm1", &block.norm1.forward(&given("block0.attn")));
            let mlp = block.mlp.forward(&(given("embed_plus_pos") + given("block0.norm1")));
            close("block0.mlp", &mlp);
            close("block0.norm2", &block.norm2.forward(&given("block0.mlp")));
        }
        x = block.forward(&x);
        close(&format!("block{index}"), &x);
    }
    close("final", &model.forward(&pixels));
    close("final_f64", &model.forward(&pixels));
    for n_query in [1, 4, 8, 16] {
        close(&format!("encode_image.nq{n_query}"), &model.encode_image(&pixels, n_query));
    }
}

#[test]
fn batched_equals_single() {
    let _no_grad = tch::no_grad_guard();
    let pixels = golden::file("vision.safetensors").tensor("pixels");
    let model = model();
    let batched = model.encode_image(&pixels, 4);
    for index in 0..2 {
        let single = model.encode_image(&pixels.narrow(0, index, 1), 4);
        let want = batched.narrow(0, index, 1);
        assert_close("single", &single, &want, forward_tolerance(&want));
    }
}

#[test]
fn the_published_models_are_the_default() {
    let config = VisionConfig::default();
    assert_eq!(config.problems(), Vec::<String>::new());
    assert_eq!((config.mlp_width(), config.heads(), config.tokens()), (15_360, 16, 1025));
}

#[test]
fn contradictions_are_told_at_once() {
    let wrong = VisionConfig {
        rope: true,
        postnorm: false,
        naiveswiglu: true,
        subln: true,
        qkv_bias: false,
        init_value: Some(0.1),
        head_width: 100,
        n_query: 2000,
        ..VisionConfig::default()
    };
    let problems = wrong.problems();
    assert_eq!(problems.len(), 8, "{problems:?}");
    for name in
        ["rope", "postnorm", "naiveswiglu", "subln", "qkv_bias", "init_value", "head_width", "n_query"]
    {
        assert!(problems.iter().any(|problem| problem.contains(name)), "{name}: {problems:?}");
    }
    let unpooled = VisionConfig { n_query: 50, v_query: 65, ..VisionConfig::default() };
    let fit = "must be what pooling 32 x 32 patches can leave (1, 4, 9, 16, 25, 36, 64, 100, 256, 1024), got";
    assert_eq!(unpooled.problems(), [format!("n_query {fit} 50"), format!("v_query {fit} 65")]);
    let nothing =
        VisionConfig { patch_size: 0, width: 0, head_width: 0, layers: -1, ..VisionConfig::default() };
    assert!(nothing.problems().len() >= 4);
}

#[test]
fn a_contradiction_fails_the_load() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden::model_dir("emu2-base");
    std::os::unix::fs::symlink(source.join("model.safetensors"), folder.path().join("model.safetensors"))
        .unwrap();
    for (vision, problem) in [
        (r#"{"rope": true}"#, "rope must be false"),
        (r#"{"image_size": 56, "n_query": 8}"#, "n_query must be what pooling 4 x 4 patches can leave"),
    ] {
        std::fs::write(folder.path().join("config.json"), format!(r#"{{"vision": {vision}}}"#)).unwrap();
        let dir = ModelDir::open(folder.path()).unwrap();
        let error = EvaVit::load(&dir, Device::Cpu, Kind::Float).unwrap_err();
        assert!(matches!(error, CheckpointError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(problem), "{error}");
    }
}
