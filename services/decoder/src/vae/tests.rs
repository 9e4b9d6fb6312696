use std::rc::Rc;

use emu2_nn::{
    checkpoint::{ModelDir, Part},
    golden::{self, assert_close, forward_tolerance},
};
use serde_json::json;
use tch::Device;

use super::*;

fn model() -> (Rc<ModelDir>, VaeConfig) {
    // Tests run side by side.
    tch::set_num_threads(1);
    let dir = ModelDir::open(&golden::model_dir("emu2-gen")).unwrap();
    let config = dir.section("vae").unwrap();
    (dir, config)
}

fn decoder() -> Decoder {
    let (dir, config) = model();
    let w = dir.weights(Part::Vae, Device::Cpu, Kind::Float);
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
    let (golden, vae) = (golden::file("vae.safetensors"), decoder());
    let check = |name: &str, got: &Tensor| assert_forward(name, got, &golden.tensor(name));
    let x = vae.post_quant_conv.forward(&golden.tensor("sq.z"));
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
        check(&format!("{size}.decoded"), &vae.forward(&golden.tensor(&format!("{size}.z"))));
    }
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
