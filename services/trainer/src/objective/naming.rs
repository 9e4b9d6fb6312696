//! Naming: what stands where in an image, on which background, and how many, read from the tower's embeddings through
//! linear heads that are dropped with their stage. It stands in the place of the CLIP that the paper's tower comes
//! from.

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use emu2_nn::layers::Linear;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::{
    bounds,
    interface::{Batch, BatchFn, Objective},
    loss::{Loss, accuracy},
    random::sample_number,
};
use crate::{
    model::Model,
    pixels::Pixels,
    samples::{BACKGROUNDS, COUNTS, NO_CONCEPT, SampleSource},
};

/// The weight of the boxes' error, in fractions of a side, against the cross-entropy of names: a twentieth of an
/// image's side is as bad as half a nat.
const BOX_WEIGHT: f64 = 10.0;

/// Section `[objective.naming]` of a stage.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamingConfig {
    /// Images in a step.
    pub batch: usize,
}

impl NamingConfig {
    pub(crate) fn problems(&self) -> Vec<String> {
        bounds::batch_size(self.batch).into_iter().collect()
    }
}

/// The objective of naming what stands where.
pub struct Naming {
    config: NamingConfig,
    source: Arc<dyn SampleSource>,
    heads: NamingHeads,
}

/// The linear heads that the embeddings are read through, each [classes, width].
#[derive(Debug)]
pub struct NamingHeads {
    /// Classifies each query: a concept, or none of them.
    pub names: Linear,
    /// Regresses each query's box: the embeddings are to say where a thing is, which names alone do not ask of them.
    pub boxes: Linear,
    /// Classifies the mean of all queries: the named background.
    pub background: Linear,
    /// Classifies the mean of all queries: the number of things.
    pub count: Linear,
}

/// Labelled images of one step.
pub struct NamingBatch {
    pixels: Pixels,
    names: Vec<i64>,
    boxes: Vec<f32>,
    backgrounds: Vec<i64>,
    counts: Vec<i64>,
}

impl Batch for NamingBatch {
    fn samples(&self) -> usize {
        self.counts.len()
    }
}

impl Naming {
    /// Returns the objective with heads of zeros: the gradient of a linear layer needs no random beginning.
    pub fn new(config: NamingConfig, source: Arc<dyn SampleSource>, model: &Model) -> Self {
        let width = model.tower.config.width;
        let head = |classes: i64| Linear {
            weight: zeros(&[classes, width], model.device()),
            bias: Some(zeros(&[classes], model.device())),
        };
        let heads = NamingHeads {
            names: head(NO_CONCEPT + 1),
            boxes: head(4),
            background: head(BACKGROUNDS),
            count: head(COUNTS),
        };
        Self { config, source, heads }
    }
}

fn zeros(shape: &[i64], device: Device) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, device)).set_requires_grad(true)
}

impl Objective for Naming {
    type Batch = NamingBatch;

    fn batch_fn(&self) -> BatchFn<NamingBatch> {
        let (source, batch) = (Arc::clone(&self.source), self.config.batch);
        Box::new(move |step| {
            let scenes: Vec<_> =
                (0..batch).map(|index| source.scene(sample_number(step, batch, index))).collect();
            NamingBatch {
                names: scenes.iter().flat_map(|scene| scene.names.iter().copied()).collect(),
                boxes: scenes.iter().flat_map(|scene| scene.boxes.iter().flatten().copied()).collect(),
                backgrounds: scenes.iter().map(|scene| scene.background).collect(),
                counts: scenes.iter().map(|scene| scene.count - 1).collect(),
                pixels: scenes.into_iter().map(|scene| scene.image).collect(),
            }
        })
    }

    fn loss(&self, model: &Model, batch: &NamingBatch, _step: u64) -> Loss {
        let device = model.device();
        let classes = |classes: &[i64]| Tensor::from_slice(classes).to_device(device);
        let names = classes(&batch.names);
        let targets = NamingTargets {
            named: names.not_equal(NO_CONCEPT),
            names,
            boxes: Tensor::from_slice(&batch.boxes).to_device(device).view([-1, 4]),
            backgrounds: classes(&batch.backgrounds),
            counts: classes(&batch.counts),
        };
        naming_loss(model, &self.heads, &batch.pixels.normalised(device), &targets)
    }

    fn variables(&self) -> BTreeMap<String, Tensor> {
        let heads = [
            ("names", &self.heads.names),
            ("boxes", &self.heads.boxes),
            ("background", &self.heads.background),
            ("count", &self.heads.count),
        ];
        let mut variables = BTreeMap::new();
        for (name, head) in heads {
            let tensors = [("weight", Some(&head.weight)), ("bias", head.bias.as_ref())];
            for (kind, tensor) in tensors {
                variables
                    .extend(tensor.map(|tensor| (format!("heads.{name}.{kind}"), tensor.shallow_clone())));
            }
        }
        variables
    }
}

/// What [`naming_loss`] compares the heads' outputs with.
#[derive(Debug)]
pub struct NamingTargets {
    /// The concept of each query: [(batch queries)]
    pub names: Tensor,
    /// Left, top, right and bottom in fractions of the image: [(batch queries), 4]
    pub boxes: Tensor,
    /// Whether a query has a name, and so a box: [(batch queries)], true or false
    pub named: Tensor,
    /// The background of each image: [batch]
    pub backgrounds: Tensor,
    /// One less than the number of things of each image: [batch]
    pub counts: Tensor,
}

/// Returns the cross-entropies of names, backgrounds and counts, plus the weighted mean absolute error of the boxes of
/// queries that have a name.
///
/// `pixels`: normalised, [batch, 3, height, width_px]
pub fn naming_loss(model: &Model, heads: &NamingHeads, pixels: &Tensor, targets: &NamingTargets) -> Loss {
    let embeddings = model.tower.encode_image(&pixels.to_kind(model.kind()), model.n_query());
    let embeddings = embeddings.to_kind(Kind::Float);
    let mean = embeddings.mean_dim(1, false, Kind::Float);
    // [batch, queries, width] -> [(batch queries), width]
    let queries = embeddings.flatten(0, 1);
    let mut loss = Loss::new(model.device());
    let classifications = [
        ("name", "name_accuracy", heads.names.forward(&queries), &targets.names),
        ("background", "background_accuracy", heads.background.forward(&mean), &targets.backgrounds),
        ("count", "count_accuracy", heads.count.forward(&mean), &targets.counts),
    ];
    for (name, accuracy_name, logits, target) in classifications {
        loss.part(accuracy_name, accuracy(&logits, target));
        loss.add(name, logits.cross_entropy_for_logits(target), 1.0);
    }
    let named = targets.named.to_kind(Kind::Float);
    let error = (heads.boxes.forward(&queries) - &targets.boxes).abs().mean_dim(-1, false, Kind::Float);
    let error = (error * &named).sum(Kind::Float) / named.sum(Kind::Float).clamp_min(1.0);
    loss.add("box_error", error, BOX_WEIGHT);
    loss
}
