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

/// What a stage would give on.
fn result(optimizer: &AdamW) -> &Tensor {
    optimizer.slots["x"].average.as_ref().unwrap()
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
    let weights = first.weights().map(|(name, weight)| (name.clone(), weight.copy())).collect();
    second.restore(&weights, &state).unwrap();
    for _ in 0..3 {
        step(&mut second, &other, 0.1);
    }
    assert_eq!(one, other);
    assert_eq!(result(&straight), result(&second));
    let error = second.restore(&weights, &BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains("`steps`"), "{error}");
}

/// Steps of a thousandth of what bfloat16 tells apart around 3 add up, and are in the state that is kept.
#[test]
fn a_narrow_variables_weight_is_wide() {
    let narrow = |value: f32| Tensor::from_slice(&[value]).to_kind(Kind::BFloat16).set_requires_grad(true);
    let (variable, other) = (narrow(3.0), narrow(0.0));
    let mut optimizer = optimizer(&variable);
    for _ in 0..2_000 {
        step(&mut optimizer, &variable, 1e-5);
    }
    let value = variable.double_value(&[0]);
    assert!((value - 2.98).abs() < 0.01, "{value}");
    assert_eq!(result(&optimizer).kind(), Kind::Float);

    let copied = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.copy());
    let weights: BTreeMap<_, _> = optimizer.weights().map(copied).collect();
    assert!((weights["x"].double_value(&[0]) - 2.98).abs() < 1e-3, "{:?}", weights["x"]);
    let state = optimizer.state().into_iter().collect();
    let mut second = super::tests::optimizer(&other);
    second.restore(&weights, &state).unwrap();
    assert_eq!(other.double_value(&[0]), value);
}

#[test]
fn averages_follow_the_weights() {
    let variable = variable();
    let mut optimizer = optimizer(&variable);
    for _ in 0..40 {
        step(&mut optimizer, &variable, 0.1);
    }
    let (now, average) = (variable.double_value(&[0]), result(&optimizer).double_value(&[0]));
    assert!(now < average && average < 1.5, "{now} {average}");
    assert!(!result(&optimizer).requires_grad());
    assert_ne!(*result(&optimizer), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
}
