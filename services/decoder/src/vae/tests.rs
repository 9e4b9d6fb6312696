use std::rc::Rc;

use emu2_nn::{
    checkpoint::{ModelDir, Part},
    golden::{self, Bench, Tolerance, assert_close, forward_tolerance},
};
use serde_json::json;
use tch::Device;

use super::*;

/// The first convolutions, the middle, four levels up, the last convolution.
const BLOCKS: u32 = 7;

fn model() -> (Rc<ModelDir>, VaeConfig) {
    // Tests run side by side.
    tch::set_num_threads(1);
    let dir = ModelDir::open(&golden::model_dir("emu2-gen")).unwrap();
    let config = dir.section("vae").unwrap();
    (dir, config)
}

fn decoder(bench: Bench) -> Decoder {
    let (dir, config) = model();
    let w = dir.weights(Part::Vae, bench.device, bench.kind);
    let decoder = Decoder::load(&w, &config).unwrap();
    Encoder::NAMES.iter().for_each(|name| w.skip(name));
    w.finish().unwrap();
    decoder
}

fn assert_forward(name: &str, got: &Tensor, want: &Tensor) {
    assert_close(name, got, want, forward_tolerance(want));
}

#[test]
fn decoding_is_official_stage_by_stage() {
    stages_of_decoding_are_official(Bench::of_environment());
}

#[test]
fn decoding_is_official_stage_by_stage_in_bfloat16() {
    stages_of_decoding_are_official(Bench::BF16);
}

fn stages_of_decoding_are_official(bench: Bench) {
    let (golden, vae) = (golden::file("vae.safetensors"), decoder(bench));
    let check = |name: &str, got: &Tensor| {
        let want = golden.tensor(name);
        bench.assert_close(name, got, &want, Tolerance::after(BLOCKS, forward_tolerance(&want), &want));
    };
    let x = vae.post_quant_conv.forward(&bench.put(&golden.tensor("sq.z")));
    check("sq.post_quant_conv", &x);
    let x = vae.conv_in.forward(&x);
    check("sq.conv_in", &x);
    let first = vae.mid_block.resnets[0].forward(&x, None);
    check("sq.mid.attn", &vae.mid_block.attention.forward(&first));
    let x = vae.mid_block.forward(&x);
    check("sq.mid", &x);
    let x = vae.up_blocks[0].forward(x);
    check("sq.up0", &x);
    check("sq.up1", &vae.up_blocks[1].forward(x));
    for size in ["sq", "rect"] {
        check(&format!("{size}.decoded"), &vae.forward(&bench.put(&golden.tensor(&format!("{size}.z")))));
    }
}

/// Each block on its own, given the same rounded inputs in both kinds.
#[test]
fn each_block_in_bfloat16_is_what_it_is_in_float32() {
    let (exact, half) = (decoder(Bench::GOLDEN), decoder(Bench::BF16));
    let close = |name: &str, got: &Tensor, want: &Tensor| {
        Bench::BF16.assert_close(name, got, want, Tolerance::new(0.0, want));
        // To what bfloat16 keeps, in float32.
        want.to_kind(Kind::BFloat16).to_kind(Kind::Float)
    };
    let x = golden::file("vae.safetensors").tensor("sq.z").to_kind(Kind::BFloat16).to_kind(Kind::Float);
    let begin = |vae: &Decoder, x: &Tensor| vae.conv_in.forward(&vae.post_quant_conv.forward(x));
    let mut x = close("conv_in", &begin(&half, &Bench::BF16.put(&x)), &begin(&exact, &x));
    x = close("mid", &half.mid_block.forward(&Bench::BF16.put(&x)), &exact.mid_block.forward(&x));
    for (index, (exact, half)) in exact.up_blocks.iter().zip(&half.up_blocks).enumerate() {
        x = close(&format!("up{index}"), &half.forward(Bench::BF16.put(&x)), &exact.forward(x));
    }
    let out = |vae: &Decoder, x: &Tensor| vae.conv_out.forward(&vae.conv_norm_out.forward(x).silu());
    let _ = close("out", &out(&half, &Bench::BF16.put(&x)), &out(&exact, &x));
}

#[test]
fn encoding_is_official_and_loads_beside_the_decoder() {
    let golden = golden::file("vae.safetensors");
    let (dir, config) = model();
    let w = dir.weights(Part::Vae, Device::Cpu, Kind::Float);
    let _decoder = Decoder::load(&w, &config).unwrap();
    let encoder = Encoder::load(&w, &config).unwrap();
    w.finish().unwrap();
    let LatentDistribution { mean, log_variance } = encoder.forward(&golden.tensor("encode.x"));
    assert_forward("encode.mean", &mean, &golden.tensor("encode.mean"));
    assert_forward("encode.logvar", &log_variance, &golden.tensor("encode.logvar"));
}

#[test]
fn levels_round_half_to_even() {
    let image = Tensor::from_slice(&[0.5_f32, 1.5, 2.5, 254.5, 255.0, 0.0]) / 255.0;
    // [1, 3, 1, 2] -> [1, 1, 2, 3]
    let got = levels(&image.view([1, 3, 1, 2]));
    assert_eq!(got.size(), [1, 1, 2, 3]);
    let halves: Vec<u8> =
        Vec::try_from(levels(&image.view([6, 1, 1, 1]).expand([6, 3, 1, 1], false)).flatten(0, -1)).unwrap();
    assert_eq!(halves.iter().step_by(3).copied().collect::<Vec<_>>(), [0, 2, 2, 254, 255, 0]);
}

#[test]
fn contradictions_and_unsupported_settings_are_one_error() {
    let config = json!({
        "act_fn": "relu", "latent_channels": 4, "out_channels": 1, "block_out_channels": [128, 100],
        "up_block_types": ["UpDecoderBlock2D"], "scaling_factor": 0.0,
    });
    let config: VaeConfig = serde_json::from_value(config).unwrap();
    let error = config.check().unwrap_err().to_string();
    for name in ["act_fn", "100 channels", "up_block_types", "1 out", "scaling_factor"] {
        assert!(error.contains(name), "{name} not in {error}");
    }
    VaeConfig::default().check().unwrap();
    assert_eq!(VaeConfig::default().scale_factor(), 8);
}
