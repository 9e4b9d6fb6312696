//! AdamW (arXiv 1711.05101), clipping, the learning rate's course, and running averages of weights.
//!
//! Why not torch's own: its state cannot be read out, and a resumed run is to give the same losses.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tch::{Kind, Tensor};

use crate::model::copy;

/// Section `[optimizer]` of a stage.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The highest learning rate, of weights whose share is 1.
    pub learning_rate: f64,
    /// The share of the highest rate that the cosine ends at.
    #[serde(default)]
    pub final_share: f64,
    /// Steps over which the rate rises, at a stage's start and after a restart without the optimizer's state.
    pub warm_up_steps: u64,
    /// The decay of the gradient's running mean and of its square's, a step.
    pub betas: [f64; 2],
    /// What is added to the root of the mean square, against division by 0.
    #[serde(default = "epsilon")]
    pub epsilon: f64,
    /// The share of a weight that decays a step, times the learning rate.
    #[serde(default)]
    pub weight_decay: f64,
    /// The largest norm of all gradients together; larger ones are scaled down to it.
    pub clip: f64,
    /// The decay of the weights' running averages a step; with it, the stage hands on these instead of the weights.
    pub average_decay: Option<f64>,
}

/// The paper's.
fn epsilon() -> f64 {
    1e-6
}

impl OptimizerConfig {
    /// Returns every mistake, with its value.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, name: &str, rule: &str, value: f64| {
            if !holds {
                problems.push(format!("optimizer.{name} must be {rule}, is {value}"));
            }
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let share = |value: f64| (0.0..1.0).contains(&value);
        require(positive(self.learning_rate), "learning_rate", "above 0", self.learning_rate);
        require((0.0..=1.0).contains(&self.final_share), "final_share", "0 to 1", self.final_share);
        require(positive(self.epsilon), "epsilon", "above 0", self.epsilon);
        require(positive(self.clip), "clip", "above 0", self.clip);
        require(self.weight_decay >= 0.0, "weight_decay", "at least 0", self.weight_decay);
        for beta in self.betas {
            require(share(beta), "betas", "0 to below 1", beta);
        }
        if let Some(decay) = self.average_decay {
            require(share(decay), "average_decay", "0 to below 1", decay);
        }
        problems
    }

    /// Returns the learning rate at `step` of `steps`, the first of which is 0: a line up, then a cosine down.
    /// `restarted`: the step at which the optimizer last began without its state.
    pub fn rate(&self, step: u64, steps: u64, restarted: u64) -> f64 {
        let rise = |since: u64| (since + 1) as f64 / self.warm_up_steps.max(1) as f64;
        let way = (step as f64 / steps.max(1) as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * way).cos());
        let course = self.final_share + (1.0 - self.final_share) * cosine;
        self.learning_rate * course * rise(step - restarted).min(1.0)
    }
}

/// What is kept of one variable.
#[derive(Debug)]
struct Slot {
    /// What the model computes with.
    variable: Tensor,
    /// The same in float32, where steps smaller than a narrow variable's grain add up; the variable itself if it is
    /// as wide.
    weight: Tensor,
    /// Its share of the learning rate.
    share: f64,
    /// Decaying means of the gradient and of its square.
    first: Tensor,
    second: Tensor,
    average: Option<Tensor>,
}

/// The optimizer AdamW over named variables.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    slots: BTreeMap<String, Slot>,
    /// Steps that were taken since the means were 0.
    steps: i32,
}

/// The state's names.
const FIRST: &str = "first.";
const SECOND: &str = "second.";
const AVERAGE: &str = "average.";

impl AdamW {
    /// Returns an optimizer of these variables, each with its share of the learning rate.
    pub fn new(config: OptimizerConfig, variables: BTreeMap<String, (Tensor, f64)>) -> Self {
        let slot = |(variable, share)| Slot::new(variable, share, config.average_decay.is_some());
        let slots = variables.into_iter().map(|(name, variable)| (name, slot(variable))).collect();
        Self { config, slots, steps: 0 }
    }

    /// Takes over what narrow variables were rounded from, before the first step.
    ///
    /// # Errors
    /// When a value has another shape than its variable.
    pub fn set_master_weights(&mut self, master_weights: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, slot) in &mut self.slots {
            let Some(value) = master_weights.get(name) else { continue };
            for tensor in [Some(&mut slot.weight), slot.average.as_mut()].into_iter().flatten() {
                copy(tensor, value).with_context(|| format!("`{name}`"))?;
            }
        }
        Ok(())
    }

    /// Takes one step and clears the gradients. Returns the norm that they had together, before clipping.
    pub fn step(&mut self, rate: f64) -> f64 {
        let _no_grad = tch::no_grad_guard();
        self.steps += 1;
        let gradients: Vec<(&mut Slot, Tensor)> = self
            .slots
            .values_mut()
            .map(|slot| (slot.variable.grad(), slot))
            .filter(|(gradient, _)| gradient.defined())
            .map(|(gradient, slot)| (slot, gradient.to_kind(Kind::Float)))
            .collect();
        let norms: Vec<Tensor> = gradients.iter().map(|(_, gradient)| gradient.norm()).collect();
        let norm = if norms.is_empty() { 0.0 } else { Tensor::stack(&norms, 0).norm().double_value(&[]) };
        let scale = (self.config.clip / (norm + 1e-6)).min(1.0);
        for (slot, gradient) in gradients {
            slot.step(&self.config, gradient, scale, rate, self.steps);
        }
        norm
    }

    /// Iterates over the weights by name, in float32.
    pub fn weights(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.slots.iter().map(|(name, slot)| (name, &slot.weight))
    }

    /// Returns everything that a later step depends on besides the weights, as tensors by name.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![("steps".to_owned(), Tensor::from_slice(&[i64::from(self.steps)]))];
        for (name, slot) in &self.slots {
            let kept =
                [(FIRST, Some(&slot.first)), (SECOND, Some(&slot.second)), (AVERAGE, slot.average.as_ref())];
            for (kind, tensor) in kept {
                state.extend(tensor.map(|tensor| (format!("{kind}{name}"), tensor.shallow_clone())));
            }
        }
        state
    }

    /// Takes over weights and state; the variables follow.
    ///
    /// # Errors
    /// When weights and state are those of other variables.
    pub fn restore(
        &mut self,
        weights: &BTreeMap<String, Tensor>,
        state: &BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let part = |kind: &str, name: &str| match state.get(&format!("{kind}{name}")) {
            Some(tensor) => Ok(tensor),
            None => bail!("the optimizer's state has no `{kind}{name}`"),
        };
        self.steps = part("steps", "")?.int64_value(&[0]) as i32;
        for (name, slot) in &mut self.slots {
            let Some(weight) = weights.get(name) else { bail!("`{name}` is missing") };
            copy(&mut slot.weight, weight).with_context(|| format!("`{name}`"))?;
            slot.follow();
            copy(&mut slot.first, part(FIRST, name)?)?;
            copy(&mut slot.second, part(SECOND, name)?)?;
            if let Some(average) = &mut slot.average {
                copy(average, part(AVERAGE, name)?)?;
            }
        }
        Ok(())
    }
}

impl Slot {
    fn new(variable: Tensor, share: f64, averaged: bool) -> Self {
        let weight = variable.detach().to_kind(Kind::Float);
        Self {
            first: weight.zeros_like(),
            second: weight.zeros_like(),
            average: averaged.then(|| weight.copy()),
            weight,
            variable,
            share,
        }
    }

    /// The variable takes the weight's value, rounded.
    fn follow(&mut self) {
        if self.variable.kind() != Kind::Float {
            tch::no_grad(|| self.variable.copy_(&self.weight));
        }
    }

    /// `scale`: of the gradient, by clipping.
    fn step(&mut self, config: &OptimizerConfig, mut gradient: Tensor, scale: f64, rate: f64, steps: i32) {
        let ([beta1, beta2], rate) = (config.betas, rate * self.share);
        let _ = gradient.g_mul_scalar_(scale);
        let _ = self.weight.g_mul_scalar_(1.0 - rate * config.weight_decay);
        let _ = self.first.lerp_(&gradient, 1.0 - beta1);
        // (√(1 − β₂) g)² is added in one pass over memory.
        let _ = gradient.g_mul_scalar_((1.0 - beta2).sqrt());
        let _ = self.second.g_mul_scalar_(beta2).addcmul_(&gradient, &gradient);
        // m / (√v / √(1 − β₂ᵗ) + ε) × rate / (1 − β₁ᵗ), with the factor folded into the divisor.
        let (unbias1, unbias2) = (1.0 - beta1.powi(steps), 1.0 - beta2.powi(steps));
        let divisor = (self.second.sqrt() / unbias2.sqrt() + config.epsilon) * (-unbias1 / rate);
        let _ = self.weight.addcdiv_(&self.first, &divisor);
        self.follow();
        self.variable.zero_grad();
        if let (Some(average), Some(decay)) = (&mut self.average, config.average_decay) {
            // Early averages forget faster, or they would be mostly the beginning.
            let decay = decay.min(f64::from(1 + steps) / f64::from(10 + steps));
            let _ = average.lerp_(&self.weight, 1.0 - decay);
        }
    }
}
