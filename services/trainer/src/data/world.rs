//! Everything that samples are drawn from, and which random numbers each draws.

use std::path::Path;

use anyhow::{Result, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::data::{
    atlas::Style,
    compose::{Composer, Novelty},
    concept::CONCEPTS_MAX,
    drawings::Drawings,
    image::Image,
    scene::Scene,
};

/// A part of the samples; those of different splits never draw the same random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// Scenes without anything that is held out, in the trained styles.
    Train,
    /// Scenes in the trained styles, with pairs and counts that are held out, wherever there are two things or more.
    Test,
    /// Scenes in the style that training never shows, in compositions that it does.
    Unseen,
}

/// The drawings, the number of concepts and the seed that every sample is drawn from.
pub struct World {
    drawings: Drawings,
    concepts: u16,
    seed: u64,
}

impl World {
    /// Opens the drawings. `drawings`: the folder that `deploy/fetch/drawings.py` prints. `concepts`: how many, the
    /// first of the table. `unseen`: whether [`Split::Unseen`] is asked for, whose drawings are fetched with
    /// `--unseen`.
    pub fn open(drawings: &Path, concepts: usize, seed: u64, unseen: bool) -> Result<Self> {
        ensure!(
            (8..=CONCEPTS_MAX).contains(&concepts),
            "concepts is {concepts}, must be 8 to {CONCEPTS_MAX}: episodes need 8 at least"
        );
        let drawings = Drawings::open(drawings, unseen)?;
        Ok(Self { drawings, concepts: u16::try_from(concepts).expect("checked above"), seed })
    }

    /// Returns the number of concepts that are drawn.
    pub fn concepts(&self) -> usize {
        usize::from(self.concepts)
    }

    /// Returns the drawings of every style.
    pub fn drawings(&self) -> &Drawings {
        &self.drawings
    }

    /// Returns scene `index` of a split, of any arrangement.
    pub fn scene(&self, split: Split, index: u64) -> Scene {
        self.composer(split).any(&mut self.random(split, "scene", index))
    }

    /// Draws a scene.
    pub fn image(&self, scene: &Scene) -> Image {
        scene.draw(&self.drawings)
    }

    /// Returns what draws the scenes of a split at random.
    pub fn composer(&self, split: Split) -> Composer<'_> {
        let (styles, novelty): (&[Style], _) = match split {
            Split::Train => (&Style::TRAINED, Novelty::Seen),
            Split::Test => (&Style::TRAINED, Novelty::HeldOut),
            Split::Unseen => (&[Style::Twemoji], Novelty::Seen),
        };
        Composer { drawings: &self.drawings, concepts: self.concepts, styles, novelty, tidy: false }
    }

    /// Returns what draws scenes to paint at random: as [`Self::composer`], but tidy, and all in one of the split's
    /// styles.
    pub fn painter(&self, split: Split) -> Composer<'_> {
        let composer = self.composer(split);
        Composer { styles: &composer.styles[..1], tidy: true, ..composer }
    }

    /// Returns the random number generator of one sample of one stream.
    pub fn random(&self, split: Split, stream: &str, index: u64) -> ChaCha8Rng {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(&index.to_le_bytes()).update(&[split as u8]);
        hasher.update(stream.as_bytes());
        ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
    }
}
