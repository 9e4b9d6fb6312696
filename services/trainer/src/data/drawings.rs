//! The drawings of every style, and what can be told apart on which background.

use std::path::Path;

use anyhow::Result;

use crate::data::{
    atlas::{Atlas, Style},
    background::Background,
    concept::Concept,
};

/// A pixel is told from a background if some channel differs by this much, of 255.
const DISTANCE_MIN: u8 = 48;
/// A drawing is legible on a background if it shares at most this much of its opaque pixels with it.
const MERGED_SHARE_MAX: f32 = 0.4;
/// Pixels of the longer side at which that is judged.
const JUDGED_SIZE: u32 = 24;

/// The drawings of every style, and which of them are legible on which background.
pub struct Drawings {
    noto: Atlas,
    fluent: Atlas,
    twemoji: Option<Atlas>,
    /// Where drawings are legible, by style (in the order of their declaration), then by concept: one bit a background.
    legible: [Vec<u8>; 3],
}

impl Drawings {
    /// Opens the drawings of the trained styles. `folder`: what `deploy/fetch/drawings.py` prints. `unseen`: also the
    /// style that is never trained on.
    pub fn open(folder: &Path, unseen: bool) -> Result<Self> {
        let noto = Atlas::open(folder, Style::Noto)?;
        let fluent = Atlas::open(folder, Style::Fluent)?;
        let twemoji = unseen.then(|| Atlas::open(folder, Style::Twemoji)).transpose()?;
        let legible = [Some(&noto), Some(&fluent), twemoji.as_ref()].map(|atlas| {
            let judge = |atlas| Concept::all().map(move |concept| legible(atlas, concept)).collect();
            atlas.map_or_else(Vec::new, judge)
        });
        Ok(Self { noto, fluent, twemoji, legible })
    }

    /// Returns the drawings of a style.
    ///
    /// # Panics
    /// For the unseen style unless it was opened.
    pub fn atlas(&self, style: Style) -> &Atlas {
        match style {
            Style::Noto => &self.noto,
            Style::Fluent => &self.fluent,
            Style::Twemoji => self.twemoji.as_ref().expect("the unseen style was opened"),
        }
    }

    /// Returns whether the drawing can be told from the background.
    pub fn legible(&self, concept: Concept, style: Style, background: Background) -> bool {
        self.legible[style as usize][concept.index()] & (1 << background.index()) != 0
    }
}

fn legible(atlas: &Atlas, concept: Concept) -> u8 {
    let told = |background: &Background| merged_share(atlas, concept, *background) <= MERGED_SHARE_MAX;
    Background::ALL.into_iter().filter(told).fold(0, |bits, background| bits | 1 << background.index())
}

fn merged_share(atlas: &Atlas, concept: Concept, background: Background) -> f32 {
    let opaque = || atlas.sprite(concept, JUDGED_SIZE).rgba.chunks_exact(4).filter(|pixel| pixel[3] >= 128);
    let merged = opaque().filter(|pixel| {
        let mut channels = pixel.iter().zip(background.rgb());
        channels.all(|(&over, under)| over.abs_diff(under) < DISTANCE_MIN)
    });
    merged.count() as f32 / opaque().count().max(1) as f32
}
