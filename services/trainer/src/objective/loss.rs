//! A loss with the parts that the log shows, and the measures that several objectives share.

use tch::{Device, Kind, Reduction, Tensor};

/// The loss of one batch, and what it is made of.
#[derive(Debug)]
pub struct Loss {
    /// The scalar whose gradient is taken, in float32.
    pub total: Tensor,
    /// Detached scalars by name for the log: the terms before their weights, and accuracies.
    pub parts: Vec<(&'static str, Tensor)>,
}

impl Loss {
    /// Returns a loss of zero without parts.
    pub(crate) fn new(device: Device) -> Self {
        Self { total: Tensor::zeros([], (Kind::Float, device)), parts: Vec::new() }
    }

    /// Adds `weight` times a scalar to the total, and the scalar itself to the parts.
    pub(crate) fn add(&mut self, name: &'static str, value: Tensor, weight: f64) {
        self.total = &self.total + &value * weight;
        self.part(name, value);
    }

    /// Adds a scalar to the parts alone.
    pub(crate) fn part(&mut self, name: &'static str, value: Tensor) {
        self.parts.push((name, value.detach()));
    }

    /// Returns the loss with its total logged under another name too.
    pub(crate) fn also_logged_as(mut self, name: &'static str) -> Self {
        self.part(name, self.total.shallow_clone());
        self
    }
}

/// Returns the mean squared error in float32, whatever the model computes in: a scalar.
pub(crate) fn mean_squared_error(predicted: &Tensor, target: &Tensor) -> Tensor {
    predicted.to_kind(Kind::Float).mse_loss(&target.to_kind(Kind::Float), Reduction::Mean)
}

/// Returns the share of rows whose highest logit is the target's: a scalar.
///
/// `logits`: [rows, classes]; `target`: [rows], classes
pub(crate) fn accuracy(logits: &Tensor, target: &Tensor) -> Tensor {
    logits.argmax(-1, false).eq_tensor(target).to_kind(Kind::Float).mean(Kind::Float)
}
