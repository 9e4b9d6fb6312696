use emu2_nn::{
    checkpoint::{ModelDir, Part},
    golden::{self, Bench, Golden, Tolerance, assert_close, forward_tolerance},
};
use serde_json::json;
use tch::Device;

use super::*;

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

/// The first convolution, three levels down, the middle, three levels up, the last convolution.
const BLOCKS: u32 = 9;

fn unet() -> Unet {
    unet_on(Bench::GOLDEN)
}

fn unet_on(bench: Bench) -> Unet {
    // Tests run side by side.
    tch::set_num_threads(1);
    let dir = ModelDir::open(&golden::model_dir("emu2-gen")).unwrap();
    let w = dir.weights(Part::Unet, bench.device, bench.kind);
    let unet = Unet::load(&w, dir.section("unet").unwrap()).unwrap();
    w.finish().unwrap();
    unet
}

/// The golden's time_ids: [12], both samples' one after the other -> [2, 6]
fn time_ids(golden: &Golden, size: &str) -> Tensor {
    golden.tensor(&format!("{size}.time_ids")).view([2, TIME_IDS])
}

fn assert_forward(name: &str, got: &Tensor, want: &Tensor) {
    assert_close(name, got, want, forward_tolerance(want));
}

#[test]
fn predictions_are_the_official_ones_at_every_size() {
    predictions_are_the_official_ones(Bench::of_environment());
}

#[test]
fn predictions_are_the_official_ones_at_every_size_in_bfloat16() {
    predictions_are_the_official_ones(Bench::BF16);
}

fn predictions_are_the_official_ones(bench: Bench) {
    let (golden, unet) = (golden::file("unet.safetensors"), unet_on(bench));
    let embeddings = bench.put(&golden.tensor("encoder_hidden_states"));
    for (size, timesteps) in [("sq", &[1, 51, 500, 981][..]), ("rect", &[500, 981]), ("odd", &[500, 981])] {
        let sample = bench.put(&golden.tensor(&format!("{size}.sample")));
        let ids = time_ids(&golden, size).to_device(bench.device);
        for &timestep in timesteps {
            let name = format!("{size}.t{timestep}.out");
            let timesteps = Tensor::full([2], timestep, (Kind::Float, bench.device));
            let got = unet.forward(&sample, &timesteps, &embeddings, &ids);
            let want = golden.tensor(&name);
            let tolerance = Tolerance::after(BLOCKS, forward_tolerance(&want), &want);
            bench.assert_close(&name, &got, &want, tolerance);
        }
    }
}

/// Each block on its own, given the same rounded inputs in both kinds: what it adds in rounding, and no mistake
/// hides behind what the whole network makes of it.
#[test]
fn each_block_in_bfloat16_is_what_it_is_in_float32() {
    let golden = golden::file("unet.safetensors");
    let (exact, half) = (unet(), unet_on(Bench::BF16));
    let close = |name: &str, got: &Tensor, want: &Tensor| {
        Bench::BF16.assert_close(name, got, want, Tolerance::new(0.0, want));
        round(want)
    };
    let embeddings = round(&golden.tensor("encoder_hidden_states"));
    let told = exact.embed(&Tensor::full([2], 981, CPU), &embeddings, &time_ids(&golden, "sq")).silu();
    let time = round(&told);
    let (half_time, half_embeddings) = (Bench::BF16.put(&time), Bench::BF16.put(&embeddings));
    let sample = round(&golden.tensor("sq.sample"));
    let mut x =
        close("conv_in", &half.conv_in.forward(&Bench::BF16.put(&sample)), &exact.conv_in.forward(&sample));
    let mut skips = vec![x.shallow_clone()];
    for (level, (exact, half)) in exact.down_blocks.iter().zip(&half.down_blocks).enumerate() {
        let mut half_skips = halves(&skips);
        let got = half.forward(Bench::BF16.put(&x), &half_time, &half_embeddings, &mut half_skips);
        x = close(&format!("down{level}"), &got, &exact.forward(x, &time, &embeddings, &mut skips));
        skips = skips.iter().map(round).collect();
    }
    let got = half.mid_block.forward(&Bench::BF16.put(&x), &half_time, &half_embeddings);
    x = close("mid", &got, &exact.mid_block.forward(&x, &time, &embeddings));
    for (index, (exact, half)) in exact.up_blocks.iter().zip(&half.up_blocks).enumerate() {
        let mut half_skips = halves(&skips);
        let got = half.forward(Bench::BF16.put(&x), &half_time, &half_embeddings, &mut half_skips);
        x = close(&format!("up{index}"), &got, &exact.forward(x, &time, &embeddings, &mut skips));
    }
    let out = |unet: &Unet, x: &Tensor| unet.conv_out.forward(&unet.conv_norm_out.forward(x).silu());
    let _ = close("out", &out(&half, &Bench::BF16.put(&x)), &out(&exact, &x));
}

/// To what bfloat16 keeps, in float32.
fn round(x: &Tensor) -> Tensor {
    x.to_kind(Kind::BFloat16).to_kind(Kind::Float)
}

fn halves(skips: &[Tensor]) -> Vec<Tensor> {
    skips.iter().map(|skip| Bench::BF16.put(skip)).collect()
}

#[test]
fn what_blocks_are_told_is_official() {
    let (golden, unet) = (golden::file("unet.safetensors"), unet());
    let want = |name: &str| golden.tensor(&format!("sq.t981.{name}"));
    let embeddings = golden.tensor("encoder_hidden_states");
    let waves = sinusoids(&Tensor::full([2], 981, CPU), unet.config.block_out_channels[0]);
    assert_forward("time_proj", &waves, &want("time_proj"));
    let time = unet.time_embedding.forward(&waves);
    assert_forward("time_embedding", &time, &want("time_embedding"));
    let ids = time_ids(&golden, "sq");
    let sizes = sinusoids(&ids, unet.config.addition_time_embed_dim);
    assert_forward("add_time_proj", &sizes.flatten(0, 1), &want("add_time_proj"));
    let both = Tensor::cat(&[embeddings.mean_dim(1, false, None), sizes.flatten(1, 2)], 1);
    let sizes = unet.add_embedding.forward(&both);
    assert_forward("add_embedding", &sizes, &want("add_embedding"));
    let got = unet.embed(&Tensor::full([2], 981, CPU), &embeddings, &ids);
    assert_close("embed", &got, &(time + sizes), 1e-6);
}

#[test]
fn every_stage_of_a_forward_is_official() {
    let (golden, unet) = (golden::file("unet.safetensors"), unet());
    let check =
        |name: &str, got: &Tensor| assert_forward(name, got, &golden.tensor(&format!("sq.t981.{name}")));
    let embeddings = golden.tensor("encoder_hidden_states");
    let time = unet.embed(&Tensor::full([2], 981, CPU), &embeddings, &time_ids(&golden, "sq")).silu();

    let mut x = unet.conv_in.forward(&golden.tensor("sq.sample"));
    check("conv_in", &x);
    check("down0.resnet0", &unet.down_blocks[0].resnets[0].forward(&x, Some(&time)));
    let mut skips = vec![x.shallow_clone()];
    for (level, block) in unet.down_blocks.iter().enumerate() {
        if level == 1 {
            check_level_1(&check, block, &x, &time, &embeddings);
        }
        x = block.forward(x, &time, &embeddings, &mut skips);
        check(&format!("down{level}"), &x);
    }
    x = unet.mid_block.forward(&x, &time, &embeddings);
    check("mid", &x);
    for (index, block) in unet.up_blocks.iter().enumerate() {
        x = block.forward(x, &time, &embeddings, &mut skips);
        check(&format!("up{index}"), &x);
    }
    assert!(skips.is_empty());
    check("out", &unet.conv_out.forward(&unet.conv_norm_out.forward(&x).silu()));
}

/// The first level with attention, piece by piece.
fn check_level_1(
    check: &impl Fn(&str, &Tensor),
    block: &DownBlock,
    x: &Tensor,
    time: &Tensor,
    embeddings: &Tensor,
) {
    let x = block.resnets[0].forward(x, Some(time));
    check("down1.resnet0", &x);
    let attention = &block.attentions[0];
    let normed = attention.norm.forward(&x);
    check("down1.attn0.norm", &normed);
    let tokens = attention.proj_in.forward(&normed.flatten(2, 3).transpose(1, 2));
    check("down1.attn0.proj_in", &tokens);
    let inner = &attention.transformer_blocks[0];
    let normed = inner.norm1.forward(&tokens);
    let attended = inner.attn1.forward(&normed, &normed);
    check("down1.attn0.block0.attn1", &attended);
    let sum = &tokens + attended;
    let attended = inner.attn2.forward(&inner.norm2.forward(&sum), embeddings);
    check("down1.attn0.block0.attn2", &attended);
    let fed = inner.ff.forward(&inner.norm3.forward(&(sum + attended)));
    check("down1.attn0.block0.ff", &fed);
    check("down1.attn0.block0", &inner.forward(&tokens, embeddings));
    check("down1.attn0", &attention.forward(&x, embeddings));
}

#[test]
fn each_sample_of_a_batch_has_its_own_timestep_and_sizes() {
    let (golden, unet) = (golden::file("unet.safetensors"), unet());
    let sample = golden.tensor("sq.sample");
    let sample = Tensor::cat(&[&sample, &sample], 0);
    let embeddings = golden.tensor("encoder_hidden_states");
    let embeddings = Tensor::cat(&[&embeddings, &embeddings], 0);
    let timesteps = Tensor::from_slice(&[1.0_f32, 500.0, 981.0, 51.0]);
    let ids = Tensor::from_slice(
        &[
            [1024, 1024, 0, 0, 1024, 1024],
            [512, 768, 16, 8, 64, 64],
            [64, 64, 3, 5, 96, 64],
            [1024, 1024, 0, 0, 64, 64],
        ]
        .concat(),
    )
    .view([4, TIME_IDS]);
    let together = unet.forward(&sample, &timesteps, &embeddings, &ids);
    for row in 0..4 {
        let one = |tensor: &Tensor| tensor.narrow(0, row, 1);
        let alone = unet.forward(&one(&sample), &one(&timesteps), &one(&embeddings), &one(&ids));
        assert_close(&format!("row {row}"), &one(&together), &alone, 1e-5);
        // The tolerance tells rows apart.
        let other = together.narrow(0, (row + 2) % 4, 1);
        assert!(f64::try_from((other - alone).abs().max()).unwrap() > 1e-2);
    }
}

/// Of the golden training step.
const TRAIN_TIME_IDS: [i64; 6] = [1024, 1024, 0, 0, 64, 64];

#[test]
fn gradients_are_the_official_ones() {
    let (golden, unet) = (golden::file("train_unet.safetensors"), unet());
    let parameters = [
        ("add_embedding.linear_2.bias", unet.add_embedding.linear_2.bias.as_ref().unwrap()),
        ("conv_in.weight", &unet.conv_in.weight),
        ("conv_out.bias", &unet.conv_out.bias),
        (
            "down_blocks.0.downsamplers.0.conv.bias",
            &unet.down_blocks[0].downsampler.as_ref().unwrap().conv.bias,
        ),
        (
            "down_blocks.0.resnets.0.time_emb_proj.bias",
            unet.down_blocks[0].resnets[0].time_emb_proj.as_ref().unwrap().bias.as_ref().unwrap(),
        ),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            &unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight,
        ),
        (
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias",
            unet.mid_block.attention.transformer_blocks[0].ff.proj.bias.as_ref().unwrap(),
        ),
        ("time_embedding.linear_1.bias", unet.time_embedding.linear_1.bias.as_ref().unwrap()),
        ("up_blocks.0.upsamplers.0.conv.bias", &unet.up_blocks[0].upsampler.as_ref().unwrap().conv.bias),
        (
            "up_blocks.2.resnets.2.conv_shortcut.bias",
            &unet.up_blocks[2].resnets[2].conv_shortcut.as_ref().unwrap().bias,
        ),
    ];
    for (_, parameter) in &parameters {
        let _ = parameter.set_requires_grad(true);
    }
    let ids = Tensor::from_slice(&TRAIN_TIME_IDS).view([1, TIME_IDS]).expand([2, TIME_IDS], false);
    let prediction =
        unet.forward(&golden.tensor("noisy"), &golden.tensor("timesteps"), &golden.tensor("cond"), &ids);
    assert_forward("pred", &prediction, &golden.tensor("pred"));
    prediction.mse_loss(&golden.tensor("noise"), tch::Reduction::Mean).backward();
    for (name, parameter) in &parameters {
        let want = golden.tensor(&format!("grad.{name}"));
        let max = f64::try_from(want.abs().max()).unwrap();
        // Where every group of a norm is one channel, a bias before it has no effect: its gradient is zero, and
        // what the golden holds of it is rounding.
        let tolerance = if max < 1e-7 { 1e-7 } else { 1e-4 * max };
        assert_close(name, &parameter.grad(), &want, tolerance);
    }
}

#[test]
fn contradictions_and_unsupported_settings_are_one_error() {
    let dir = ModelDir::open(&golden::model_dir("emu2-gen")).unwrap();
    let w = dir.weights(Part::Unet, Device::Cpu, Kind::Float);
    let config: UnetConfig = serde_json::from_value(json!({
        "class_embed_type": "timestep",
        "use_linear_projection": false,
        "upcast_attention": true,
        "attention_head_dim": [5, 10],
        "block_out_channels": [320, 640, 1281],
        "projection_class_embeddings_input_dim": 2816,
        "out_channels": 8,
    }))
    .unwrap();
    let error = Unet::load(&w, config).unwrap_err().to_string();
    for name in [
        "class_embed_type",
        "use_linear_projection",
        "upcast_attention",
        "attention_head_dim",
        "projection_class_embeddings_input_dim",
        "2816",
        "8",
    ] {
        assert!(error.contains(name), "{name} not in {error}");
    }
    let unknown = serde_json::from_value::<UnetConfig>(json!({"down_block_types": ["AttnDownBlock2D"]}));
    assert!(unknown.unwrap_err().to_string().contains("AttnDownBlock2D"));
}

#[test]
fn defaults_fit_together() {
    let config = UnetConfig::default();
    assert!(config.problems().is_empty(), "{:?}", config.problems());
    assert_eq!(config.time_width(), 1280);
    assert_eq!(config.projection_class_embeddings_input_dim, 1792 + 6 * 256);
}
