//! Losses and gradients against the official modules' (golden-a, train.json and train.safetensors).

use std::{collections::BTreeMap, rc::Rc};

use emu2_nn::{
    checkpoint::{ModelDir, Part},
    golden::{self, Golden, assert_close},
};
use serde_json::Value;
use tch::{Device, IndexOp, Kind, nn::VarStore};

use super::*;
use crate::{
    layout::Predictions,
    optimizer::{AdamW, OptimizerConfig},
};

/// The golden losses'.
const REGRESSION: Regression = Regression { weight: 1.0, input: EmbeddingInput::TeacherForcing };

/// The golden base model, trainable.
fn golden_model() -> (EvaVit, Llama, BTreeMap<String, Tensor>) {
    // Tests run side by side.
    tch::set_num_threads(1);
    let dir = ModelDir::open(&golden::model_dir("emu2-base")).unwrap();
    let variables = Rc::new(VarStore::new(Device::Cpu));
    let weights = |part| dir.trainable(part, &variables, Kind::Float);
    let tower = EvaVit::build(&dir, weights(Part::Visual)).unwrap().0;
    let config = dir.section("llama").unwrap();
    let llm = Llama::build(&dir, config, 64, &[Device::Cpu], weights(Part::Llm)).unwrap().0;
    let variables = variables.variables().into_iter().collect();
    (tower, llm, variables)
}

/// The golden batch, which is padded at the left; ours are at the right.
fn golden_batch(golden: &Golden) -> (Layout, Tensor) {
    let rows = |name: &str| -> Vec<Vec<i64>> {
        Vec::<Vec<i64>>::try_from(golden.tensor(name).to_kind(Kind::Int64)).unwrap()
    };
    let (ids, mask) = (rows("input_ids"), rows("attention_mask"));
    let (text, images) = (rows("ce_positions"), rows("reg_positions"));
    let tokens = ids[0].len();
    let mut layout = Layout { sequences: ids.len(), tokens, ..Layout::default() };
    for (row, ids) in ids.iter().enumerate() {
        let padding = mask[row].iter().filter(|&&real| real == 0).count();
        layout.ids.extend(ids[padding..].iter().copied().chain(std::iter::repeat_n(0, padding)));
        for position in padding..tokens - 1 {
            let from = (row * tokens + position - padding) as i64;
            if text[row][position] == 1 {
                layout.text.rows.push(from);
                layout.text.targets.push(ids[position + 1]);
            }
            if images[row][position] == 1 {
                layout.images.rows.push(from);
                layout.images.targets.push(layout.slots.len() as i64);
                layout.slots.push(from + 1);
            }
        }
    }
    let pixels = golden::file("vision.safetensors").tensor("pixels");
    (layout, Tensor::cat(&[&pixels, &pixels.i(0..1).flip([3])], 0))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn assert_relative(name: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * want.abs(), "{name}: {got} instead of {want}");
}

fn freeze_tower(variables: &BTreeMap<String, Tensor>) {
    for (_, tensor) in variables.iter().filter(|(name, _)| name.starts_with("visual.")) {
        let _ = tensor.set_requires_grad(false);
    }
}

/// The manifest's tolerances: losses 1e-5 relative, gradients 1e-4 × max |gradient|.
#[test]
fn losses_and_gradients_are_the_official_ones() {
    let (golden, numbers) = (golden::file("train.safetensors"), golden::json("train.json"));
    let (layout, pixels) = golden_batch(&golden);
    for case in ["frozen_vision", "vision_trained"] {
        let (tower, llm, variables) = golden_model();
        if case == "frozen_vision" {
            freeze_tower(&variables);
        }
        let loss = next_element_loss((&tower, &llm), &layout, &pixels, REGRESSION);
        let want = &numbers["lm"][case];
        let parts: BTreeMap<_, _> =
            loss.parts.iter().map(|(name, value)| (*name, value.double_value(&[]))).collect();
        assert_relative("ce", parts["cross_entropy"], number(&want["ce"]), 1e-5);
        assert_relative("mse", parts["mean_squared_error"], number(&want["mse"]), 1e-5);
        assert_relative("total", loss.total.double_value(&[]), number(&want["total"]), 1e-5);
        assert_eq!(layout.text.rows.len() as u64, want["n_ce"].as_u64().unwrap());
        assert_eq!(layout.images.rows.len() as u64, want["n_reg"].as_u64().unwrap());

        loss.total.backward();
        for (name, norm) in want["grad_norms"].as_object().unwrap() {
            let got = variables[name].grad().norm().double_value(&[]);
            assert_relative(&format!("{case} {name}"), got, number(norm), 1e-4);
        }
        let prefix = format!("{case}.grad.");
        for name in golden.names().into_iter().filter(|name| name.starts_with(&prefix)) {
            let want = golden.tensor(name);
            let max = want.abs().max().double_value(&[]);
            assert_close(name, &variables[&name[prefix.len()..]].grad(), &want, 1e-4 * max);
        }
    }
}

/// A second backward through the tower: a bias fused once, at load, allows but one.
#[test]
fn the_tower_is_trained_step_after_step() {
    let (tower, llm, variables) = golden_model();
    let (layout, pixels) = golden_batch(&golden::file("train.safetensors"));
    let bias = &variables["visual.blocks.0.attn.q_bias"];
    let gradients = [(); 2].map(|()| {
        next_element_loss((&tower, &llm), &layout, &pixels, REGRESSION).total.backward();
        let gradient = bias.grad().copy();
        let _ = bias.grad().zero_();
        gradient
    });
    assert_eq!(gradients[0], gradients[1]);
}

#[test]
fn steps_of_the_optimizer_are_torchs() {
    let (golden, numbers) = (golden::file("train.safetensors"), golden::json("train.json"));
    let want = &numbers["lm"]["adamw"];
    let (layout, pixels) = golden_batch(&golden);
    let (tower, llm, variables) = golden_model();
    freeze_tower(&variables);
    let trained = variables.iter().filter(|(_, tensor)| tensor.requires_grad());
    let trained = trained.map(|(name, tensor)| (name.clone(), (tensor.shallow_clone(), 1.0)));
    let config = OptimizerConfig {
        learning_rate: number(&want["lr"]),
        final_share: 1.0,
        warm_up_steps: 0,
        betas: [number(&want["betas"][0]), number(&want["betas"][1])],
        epsilon: number(&want["eps"]),
        weight_decay: number(&want["weight_decay"]),
        clip: number(&want["clip_grad_norm"]),
        average_decay: None,
    };
    let mut optimizer = AdamW::new(config.clone(), trained.collect());
    for (step, want) in want["trajectory"].as_array().unwrap().iter().enumerate() {
        let loss = next_element_loss((&tower, &llm), &layout, &pixels, REGRESSION);
        let total = loss.total.double_value(&[]);
        assert_relative(&format!("step {step}"), total, number(&want["ce"]) + number(&want["mse"]), 1e-4);
        loss.total.backward();
        let norm = optimizer.step(config.learning_rate);
        assert_relative(&format!("norm {step}"), norm, number(&want["grad_norm_before_clip"]), 1e-4);
    }
    for (name, golden_name) in [
        ("project_down.weight", "adamw.project_down.weight_after5"),
        ("decoder.lm.model.norm.weight", "adamw.norm.weight_after5"),
    ] {
        let want = golden.tensor(golden_name);
        assert_close(name, &variables[name].detach(), &want, 1e-4 * want.abs().max().double_value(&[]));
    }
}

#[test]
fn what_is_not_learned_gives_no_gradient() {
    let (tower, llm, variables) = golden_model();
    let (layout, pixels) = golden_batch(&golden::file("train.safetensors"));
    let names = |loss: &Loss| loss.parts.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let loss = next_element_loss((&tower, &llm), &layout, &pixels, Regression { weight: 0.0, ..REGRESSION });
    assert_eq!(names(&loss), ["token_accuracy", "cross_entropy"]);
    loss.total.backward();
    assert!(!variables["project_down.weight"].grad().defined());

    let (tower, llm, variables) = golden_model();
    let layout = Layout { text: Predictions::default(), ..layout };
    let loss = next_element_loss((&tower, &llm), &layout, &pixels, REGRESSION);
    assert_eq!(names(&loss), ["mean_squared_error"]);
    loss.total.backward();
    assert!(!variables["decoder.lm.lm_head.weight"].grad().defined());
}

/// Every image of the golden batch is learned, so without teacher forcing the model reads none of the tower's
/// embeddings.
#[test]
fn only_teacher_forcing_reads_the_images_to_predict() {
    let (layout, pixels) = golden_batch(&golden::file("train.safetensors"));
    let fed = |input| {
        let (tower, llm, variables) = golden_model();
        let loss = next_element_loss((&tower, &llm), &layout, &pixels, Regression { input, ..REGRESSION });
        loss.total.backward();
        let gradient = variables["visual.patch_embed.proj.weight"].grad().norm().double_value(&[]);
        (loss.total.double_value(&[]), gradient)
    };
    let inputs = [EmbeddingInput::TeacherForcing, EmbeddingInput::Blind, EmbeddingInput::ScheduledSampling];
    let [teacher, blind, sampled] = inputs.map(fed);
    assert!(teacher.1 > 0.0);
    assert_eq!((blind.1, sampled.1), (0.0, 0.0));
    assert!(teacher.0 != blind.0 && blind.0 != sampled.0 && sampled.0 != teacher.0);
}
