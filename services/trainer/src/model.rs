//! All parts of a small Emu2 on one device, trainable: the services' own models over one store of variables.
//!
//! Names of variables are those of a native checkpoint, so a file of them is one.

mod init;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, path::Path, rc::Rc};

use anyhow::{Context, Result, bail, ensure};
use emu2_decoder::{
    schedule::{EulerDiscrete, SchedulerConfig},
    unet::Unet,
    vae::{Decoder, Encoder, VaeConfig},
};
use emu2_encoder::eva_vit::EvaVit;
use emu2_llm::llama::Llama;
use emu2_nn::checkpoint::{ModelDir, Part};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor, nn::VarStore};

/// The sections of a model's config.json.
pub type Sections = Map<String, Value>;

/// Returns the configuration of nano, the model that ships.
pub fn nano() -> Sections {
    serde_json::from_str(include_str!("../nano.json")).expect("the committed file is an object")
}

/// Returns how many concepts a model learns, as its configuration says.
///
/// # Errors
/// When the configuration has no such number.
pub fn concept_count(sections: &Sections) -> Result<usize> {
    let concepts = sections.get("concepts").and_then(Value::as_u64);
    Ok(concepts.context("the configuration has no number of `concepts`")? as usize)
}

/// Every part of an Emu2, with its variables.
#[derive(Debug)]
pub struct Model {
    /// The visual encoder.
    pub tower: EvaVit,
    /// The language model, with the projections between its states and embeddings.
    pub llm: Llama,
    /// The denoising model of the visual decoder.
    pub unet: Unet,
    /// The autoencoder between pixels and latents.
    pub vae: Vae,
    /// The share of the latents' variance that is left at each training timestep: [timesteps]
    pub alphas_cumprod: Tensor,
    variables: Rc<VarStore>,
    /// Where variables are narrower than float32: the values that they are rounded from.
    master_weights: BTreeMap<String, Tensor>,
    dir: Rc<ModelDir>,
}

/// Both halves of the autoencoder.
#[derive(Debug)]
pub struct Vae {
    /// Pixels to the distribution of latents.
    pub encoder: Encoder,
    /// Latents to pixels.
    pub decoder: Decoder,
}

impl Model {
    /// Returns a model with initial values out of a seed, in float32.
    ///
    /// # Errors
    /// When the sections contradict each other.
    pub fn new(sections: &Sections, seed: u64, device: Device) -> Result<Self> {
        let model = Self::build(ModelDir::random(sections.clone(), seed), device, Kind::Float)?;
        init::scale(&model.variables);
        Ok(model)
    }

    /// Returns the model of a folder that holds every part, in float32.
    ///
    /// # Errors
    /// When a part is missing or does not fit.
    pub fn open(folder: &Path, device: Device) -> Result<Self> {
        Self::build(ModelDir::open(folder)?, device, Kind::Float)
    }

    /// Returns a model in float32 as one that computes in `kind`. Training goes on from the values as they were before
    /// they were rounded.
    ///
    /// # Errors
    /// When the model cannot be built a second time.
    pub fn computing_in(self, kind: Kind) -> Result<Self> {
        if kind == self.kind() {
            return Ok(self);
        }
        let master_weights = self.variables();
        let narrow = Self::build(self.dir, self.variables.device(), kind)?;
        narrow.restore(master_weights.iter().map(|(name, value)| (name.as_str(), value)))?;
        Ok(Self { master_weights, ..narrow })
    }

    fn build(dir: Rc<ModelDir>, device: Device, kind: Kind) -> Result<Self> {
        let variables = Rc::new(VarStore::new(device));
        let weights = |part| dir.trainable(part, &variables, kind);
        let (tower, _) = EvaVit::build(&dir, weights(Part::Visual))?;
        let width = tower.config.width;
        let (llm, _) = Llama::build(&dir, dir.section("llama")?, width, &[device], weights(Part::Llm))?;
        let w = weights(Part::Unet);
        let unet = Unet::load(&w, dir.section("unet")?)?;
        w.finish()?;
        ensure!(
            unet.config.cross_attention_dim == width,
            "unet.cross_attention_dim is {}, vision.width {width}",
            unet.config.cross_attention_dim
        );
        let (w, config) = (weights(Part::Vae), dir.section::<VaeConfig>("vae")?);
        let vae = Vae { encoder: Encoder::load(&w, &config)?, decoder: Decoder::load(&w, &config)? };
        w.finish()?;
        let schedule = EulerDiscrete::new(&dir.section::<SchedulerConfig>("scheduler")?)?;
        let alphas_cumprod = Tensor::from_slice(schedule.alphas_cumprod()).to_device(device);
        Ok(Self { tower, llm, unet, vae, alphas_cumprod, variables, master_weights: BTreeMap::new(), dir })
    }

    /// Returns the device of all variables.
    pub fn device(&self) -> Device {
        self.variables.device()
    }

    /// Returns the type that the model computes in.
    pub fn kind(&self) -> Kind {
        self.llm.kind()
    }

    /// Returns the number of embeddings of an image.
    pub fn n_query(&self) -> u32 {
        self.tower.config.n_query
    }

    /// Returns every variable by its name.
    pub fn variables(&self) -> BTreeMap<String, Tensor> {
        self.variables.variables().into_iter().collect()
    }

    /// Returns the float32 values by the names of the variables that are rounded from them; none where variables are in
    /// float32.
    pub fn master_weights(&self) -> &BTreeMap<String, Tensor> {
        &self.master_weights
    }

    /// Returns the variables whose names have one of these prefixes, such as `visual.`; gradients are kept for them
    /// alone.
    ///
    /// # Errors
    /// When no variable has a prefix.
    pub fn train(&self, prefixes: &[String]) -> Result<BTreeMap<String, Tensor>> {
        let mut trained = self.variables();
        for prefix in prefixes {
            ensure!(trained.keys().any(|name| name.starts_with(prefix)), "no weight begins with `{prefix}`");
        }
        trained.retain(|name, tensor| {
            let trained = prefixes.iter().any(|prefix| name.starts_with(prefix));
            let _ = tensor.set_requires_grad(trained);
            trained
        });
        Ok(trained)
    }

    /// Takes over values by name; the others stay.
    ///
    /// # Errors
    /// When a name is none of the model's, or a shape differs.
    pub fn restore<'a>(&self, values: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Result<()> {
        let mut variables = self.variables();
        for (name, value) in values {
            let Some(variable) = variables.get_mut(name) else {
                bail!("`{name}` is not a weight of this model")
            };
            copy(variable, value).with_context(|| format!("`{name}`"))?;
            if let Some(master_weights) = self.master_weights.get(name) {
                copy(&mut master_weights.shallow_clone(), value)?;
            }
        }
        Ok(())
    }
}

/// Writes `value` into a variable.
///
/// # Errors
/// When their shapes differ.
pub fn copy(variable: &mut Tensor, value: &Tensor) -> Result<()> {
    let (want, got) = (variable.size(), value.size());
    ensure!(want == got, "must be {want:?}, is {got:?}");
    tch::no_grad(|| variable.copy_(value));
    Ok(())
}

/// Returns how many values are in tensors.
pub fn count<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> usize {
    tensors.into_iter().map(Tensor::numel).sum()
}
