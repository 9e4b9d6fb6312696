//! What a cluster consists of: which stages of which models, on which devices. Decided and checked before anything
//! starts, so that a mistake is a sentence and not a cluster that is never ready.

use std::{path::PathBuf, rc::Rc, thread};

use anyhow::{Context, Result, bail, ensure};
use emu2_encoder::eva_vit::VisionConfig;
use emu2_nn::{
    checkpoint::{ModelDir, Part},
    device,
};
use emu2_serve::{
    config::Validate,
    server::{Listeners, ServerConfig},
    shutdown::Shutdown,
};
use tch::{Device, Kind};
use tokio::task::JoinSet;

/// A model folder, the name it is served under, and the devices its stages compute on.
#[derive(Clone, Debug)]
pub struct ModelSource {
    /// A folder in any of the published layouts, or `random:SIZE` for weights out of a seed.
    pub dir: PathBuf,
    /// The name under which it is served; by default the folder's own.
    pub name: Option<String>,
    /// The device of the encoder: `cpu` or `cuda:N`; one.
    pub encoder: Vec<String>,
    /// The devices over which the llm's layers are spread; at least one.
    pub llm: Vec<String>,
    /// The device of the decoder; one.
    pub decoder: Vec<String>,
}

impl ModelSource {
    /// Returns a source that is placed as upstream places a model on several GPUs: the llm's layers are spread over all
    /// devices, everything else is on the first.
    pub fn new(dir: PathBuf, devices: &[String]) -> Self {
        let first: Vec<_> = devices.iter().take(1).cloned().collect();
        Self { dir, name: None, encoder: first.clone(), llm: devices.to_vec(), decoder: first }
    }
}

/// The services of a cluster, and which of them make up each model.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) services: Vec<Service>,
    pub(crate) models: Vec<PlannedModel>,
}

/// A model's stages as indices into [`Plan::services`]. Models with the same visual weights share an encoder, and models
/// of the same folder share every stage.
#[derive(Debug)]
pub(crate) struct PlannedModel {
    pub(crate) name: String,
    pub(crate) encoder: usize,
    pub(crate) llm: usize,
    pub(crate) decoder: Option<usize>,
}

/// A service with its configuration.
#[derive(Debug)]
pub(crate) enum Service {
    Encoder(emu2_encoder::Config),
    Llm(emu2_llm::Config),
    Decoder(emu2_decoder::Config),
}

impl Plan {
    /// Plans a cluster of these models. Reads the names of every folder's tensors, but no weights, except to see whether
    /// two visual encoders are the same.
    ///
    /// # Errors
    ///
    /// A folder that cannot be served, two models of one name, a device that is absent, or too little memory.
    pub(crate) fn new(sources: &[ModelSource]) -> Result<Self> {
        let mut plan = Self::default();
        let mut memory = MemoryDemand::default();
        let mut folders: Vec<ModelFolder> = Vec::new();
        for source in sources {
            let folder = ModelFolder::open(source)?;
            if let Some(namesake) = folders.iter().find(|known| known.name == folder.name) {
                let (one, other) = (namesake.dir.path().display(), source.dir.display());
                bail!(
                    "two models are called `{}` ({one} and {other}): give one another name in a file of --models",
                    folder.name
                );
            }
            if let Some(index) = folders.iter().position(|known| known.is_same(&folder)) {
                plan.models.push(PlannedModel { name: folder.name.clone(), ..plan.models[index] });
                folders.push(folder);
                continue;
            }
            let shared = folders.iter().position(|known| known.has_encoder_of(&folder));
            let encoder = match shared {
                Some(index) => {
                    let (model, with) = (&folder.name, &folders[index].name);
                    tracing::info!(model, with, "the same visual weights: one encoder serves both");
                    plan.models[index].encoder
                }
                None => {
                    memory.add(&[(folder.encoder, folder.bytes(&[Part::Visual], folder.encoder))]);
                    plan.add(Service::encoder(source))
                }
            };
            let kind = device::compute_kind(folder.llm[0]);
            memory.add(&emu2_llm::load::room(&folder.dir, &folder.llm, kind)?);
            let llm = plan.add(Service::llm(source));
            let decoder = folder.decoder.map(|device| {
                memory.add(&[(device, folder.bytes(&[Part::Unet, Part::Vae], device))]);
                plan.add(Service::decoder(source))
            });
            plan.models.push(PlannedModel { name: folder.name.clone(), encoder, llm, decoder });
            folders.push(folder);
        }
        memory.check()?;
        plan.divide_cores();
        plan.check()?;
        Ok(plan)
    }

    fn add(&mut self, service: Service) -> usize {
        self.services.push(service);
        self.services.len() - 1
    }

    fn divide_cores(&mut self) {
        let all = thread::available_parallelism().map_or(1, |all| all.get());
        let share = (all / self.services.len().max(1)).max(1);
        for service in &mut self.services {
            match service {
                Service::Encoder(config) => config.cores = share,
                Service::Llm(config) => config.cores = share,
                Service::Decoder(config) => config.cores = share,
            }
        }
    }

    fn check(&self) -> Result<()> {
        for service in &self.services {
            let problems = service.problems();
            ensure!(problems.is_empty(), "{}: {}", service.stage(), problems.join("; "));
        }
        Ok(())
    }
}

/// An opened model folder that has every part that serving takes, with its devices.
struct ModelFolder {
    name: String,
    dir: Rc<ModelDir>,
    vision: VisionConfig,
    encoder: Device,
    llm: Vec<Device>,
    /// The decoder's device; none for a model that generates only text.
    decoder: Option<Device>,
}

impl ModelFolder {
    fn open(source: &ModelSource) -> Result<Self> {
        let dir = ModelDir::open(&source.dir)?;
        for (part, name) in [(Part::Visual, "visual encoder"), (Part::Llm, "llm")] {
            ensure!(
                dir.has(part),
                "{}: holds no {name}: a cluster serves folders with a visual encoder and an llm; the other stages \
                 run alone, as emu2-encoder, emu2-llm and emu2-decoder with --config",
                source.dir.display()
            );
        }
        let open = |names: &[String]| {
            device::open(names).with_context(|| format!("the devices of {}", source.dir.display()))
        };
        let mut vision: VisionConfig = dir.section("vision")?;
        // Requests choose these; they make no difference between encoders.
        (vision.n_query, vision.v_query) = (1, 1);
        Ok(Self {
            name: source.name.clone().unwrap_or_else(|| dir.name().to_owned()),
            vision,
            encoder: open(&source.encoder)?[0],
            llm: open(&source.llm)?,
            decoder: if dir.has(Part::Unet) { Some(open(&source.decoder)?[0]) } else { None },
            dir,
        })
    }

    /// Returns whether both are one folder on the same devices, under two names.
    fn is_same(&self, other: &Self) -> bool {
        self.dir.path() == other.dir.path()
            && (self.encoder, &self.llm, self.decoder) == (other.encoder, &other.llm, other.decoder)
    }

    /// Returns whether one encoder can serve both: the same weights, on the same device.
    fn has_encoder_of(&self, other: &Self) -> bool {
        self.encoder == other.encoder
            && self.vision == other.vision
            && self.dir.has_weights_of(&other.dir, Part::Visual, device::compute_kind(self.encoder))
    }

    fn bytes(&self, parts: &[Part], device: Device) -> u64 {
        let kind: Kind = device::compute_kind(device);
        parts.iter().map(|&part| self.dir.bytes(part, kind)).sum()
    }
}

/// The memory that all stages together take on each device; each alone would see the others' as free.
#[derive(Default)]
struct MemoryDemand(Vec<(Device, u64)>);

impl MemoryDemand {
    fn add(&mut self, needed: &[(Device, u64)]) {
        self.0.extend_from_slice(needed);
    }

    fn check(&self) -> Result<()> {
        device::check_room(&self.0).context("the weights of all stages together")
    }
}

impl Service {
    fn encoder(source: &ModelSource) -> Self {
        Self::Encoder(emu2_encoder::Config {
            model_dir: source.dir.clone(),
            devices: source.encoder.clone(),
            server: ServerConfig::on_port(0),
            ..Default::default()
        })
    }

    fn llm(source: &ModelSource) -> Self {
        Self::Llm(emu2_llm::Config {
            model_dir: source.dir.clone(),
            devices: source.llm.clone(),
            server: ServerConfig::on_port(0),
            ..Default::default()
        })
    }

    fn decoder(source: &ModelSource) -> Self {
        Self::Decoder(emu2_decoder::Config {
            model_dir: source.dir.clone(),
            devices: source.decoder.clone(),
            server: ServerConfig::on_port(0),
            ..Default::default()
        })
    }

    pub(crate) fn stage(&self) -> &'static str {
        match self {
            Self::Encoder(_) => "encoder",
            Self::Llm(_) => "llm",
            Self::Decoder(_) => "decoder",
        }
    }

    pub(crate) fn server(&self) -> &ServerConfig {
        match self {
            Self::Encoder(config) => &config.server,
            Self::Llm(config) => &config.server,
            Self::Decoder(config) => &config.server,
        }
    }

    fn problems(&self) -> Vec<String> {
        match self {
            Self::Encoder(config) => config.problems(),
            Self::Llm(config) => config.problems(),
            Self::Decoder(config) => config.problems(),
        }
    }

    pub(crate) fn spawn(self, listeners: Listeners, stop: Shutdown, running: &mut JoinSet<Result<()>>) {
        match self {
            Self::Encoder(config) => running.spawn(emu2_encoder::run(config, listeners, stop)),
            Self::Llm(config) => running.spawn(emu2_llm::run(config, listeners, stop)),
            Self::Decoder(config) => running.spawn(emu2_decoder::run(config, listeners, stop)),
        };
    }
}
