//! What the training loop asks of an objective: batches by number, and the loss of one.

use std::collections::BTreeMap;

use tch::Tensor;

use super::loss::Loss;
use crate::model::Model;

/// A function that makes a stage's batch of a number; the loader calls it on its own threads.
pub type BatchFn<B> = Box<dyn Fn(u64) -> B + Send + Sync>;

/// A training objective: it draws batches and computes their loss on a [`Model`].
///
/// Both depend on nothing but the stage's seed and the step's number, so that a resumed run repeats itself bit for bit.
pub trait Objective {
    /// The samples of one step, without tensors: batches are made on threads that own no device.
    type Batch: Batch;

    /// Returns the function that makes this objective's batches.
    fn batch_fn(&self) -> BatchFn<Self::Batch>;

    /// Returns the loss of a batch, whose gradient reaches the model's trained variables. `step` is the batch's number,
    /// which also seeds the noise and every other random choice of the step.
    fn loss(&self, model: &Model, batch: &Self::Batch, step: u64) -> Loss;

    /// Returns variables by name that are trained beside the model's and dropped after the stage, such as linear heads;
    /// none by default.
    fn variables(&self) -> BTreeMap<String, Tensor> {
        BTreeMap::new()
    }
}

/// The samples of one training step.
pub trait Batch: Send + 'static {
    /// Returns the number of samples in the batch, for the log and for training.json.
    fn samples(&self) -> usize;
}
