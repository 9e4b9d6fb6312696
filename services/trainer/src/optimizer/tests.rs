use tch::{Device, Kind};

use super::*;

fn config() -> OptimizerConfig {
    OptimizerConfig {
        learning_rate: 0.1,
        final_share: 0.1,
        warm_up_steps: 10,
        betas: [0.9, 0.95],
        epsilon: 1e-6,
        weight_decay: 0.0,
        clip: 1.0,
        average_decay: Some(0.9),
    }
}

fn variable() -> Tensor {
    Tensor::from_slice(&[3.0_f32, -2.0]).set_requires_grad(true)
}

fn optimizer(variable: &Tensor) -> AdamW {
    AdamW::new(config(), BTreeMap::from([("x".to_owned(), (variable.shallow_clone(), 1.0))]))
}

/// Towards 0.
fn step(optimizer: &mut AdamW, variable: &Tensor, rate: f64) -> f64 {
    variable.square().sum(Kind::Float).backward();
    optimizer.step(rate)
}

#[test]
fn the_rate_rises_falls_and_rises_again_after_a_restart() {
    let config = config();
    let rate = |step, restarted| config.rate(step, 100, restarted);
    assert!((rate(0, 0) - 0.01).abs() < 1e-4 && (rate(9, 0) - 0.1).abs() < 3e-3);
    assert!(rate(30, 0) > rate(60, 0) && rate(60, 0) > rate(99, 0));
    assert!((rate(100, 0) - 0.01).abs() < 1e-9 && (rate(200, 0) - 0.01).abs() < 1e-9);
    assert!((rate(60, 60) * 10.0 - rate(60, 0)).abs() < 1e-9 && rate(75, 60) == rate(75, 0));
}

#[test]
fn gradients_are_clipped_together_and_cleared() {
    let variable = variable();
    let mut optimizer = optimizer(&variable);
    let norm = step(&mut optimizer, &variable, 0.0);
    assert!((norm - 52.0_f64.sqrt()).abs() < 1e-5, "{norm}");
    // Of the clipped gradient, as the first mean holds a tenth of it.
    let first = &optimizer.slots["x"].first;
    assert!((first.norm().double_value(&[]) - 0.1).abs() < 1e-5);
    assert_eq!(variable.grad().abs().sum(Kind::Float).double_value(&[]), 0.0);
    assert!((variable.double_value(&[0]) - 3.0).abs() < 1e-6, "a rate of 0 moves nothing");
}

#[test]
fn a_restored_optimizer_goes_on_bit_for_bit() {
    let (one, other) = (variable(), variable());
    let mut straight = optimizer(&one);
    for _ in 0..6 {
        step(&mut straight, &one, 0.1);
    }
    let mut first = optimizer(&other);
    for _ in 0..3 {
        step(&mut first, &other, 0.1);
    }
    let state: BTreeMap<_, _> =
        first.state().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
    let mut second = optimizer(&other);
    second.restore(&state).unwrap();
    for _ in 0..3 {
        step(&mut second, &other, 0.1);
    }
    assert_eq!(one, other);
    assert_eq!(straight.results()["x"], second.results()["x"]);
    let error = second.restore(&BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains("`steps`"), "{error}");
}

#[test]
fn averages_follow_the_weights() {
    let variable = variable();
    let mut optimizer = optimizer(&variable);
    for _ in 0..40 {
        step(&mut optimizer, &variable, 0.1);
    }
    let (now, average) = (variable.double_value(&[0]), optimizer.results()["x"].double_value(&[0]));
    assert!(now < average && average < 1.5, "{now} {average}");
    assert!(!optimizer.results()["x"].requires_grad());
    let zeros = Tensor::zeros([2], (Kind::Float, Device::Cpu));
    assert_ne!(optimizer.results()["x"], zeros);
}
