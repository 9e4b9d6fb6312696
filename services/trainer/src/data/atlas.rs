//! Drawings as pixels: each rasterised once, kept on disk, resampled to the sizes that scenes need.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Context, Result, bail, ensure};
use image::{RgbaImage, imageops};
use resvg::{tiny_skia, usvg};
use serde::Deserialize;

use crate::data::concept::{CONCEPTS_MAX, Concept};

/// Pixels of a drawing's longer side as kept on disk; no scene draws larger.
pub const DRAWING_SIDE: u32 = 96;
/// Rasterised at this size with its margins first, to find them.
const CANVAS_SIDE: u32 = 192;
/// A pixel this opaque belongs to the drawing; soft shadows do not.
const OPAQUE_MIN: u8 = 32;
/// Longer sides that a scene can draw at, in pixels.
const SIZES: std::ops::RangeInclusive<u32> = 8..=64;
/// Raised whenever equal sources give other pixels.
const FORMAT: u32 = 1;

/// The emoji set that drawings are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Style {
    /// Noto Emoji.
    Noto,
    /// Fluent Emoji, flat.
    Fluent,
    /// Twemoji, which training never shows.
    Twemoji,
}

impl Style {
    /// The styles that training shows.
    pub const TRAINED: [Self; 2] = [Self::Noto, Self::Fluent];

    /// Begins the names of its files.
    fn set(self) -> &'static str {
        match self {
            Self::Noto => "noto",
            Self::Fluent => "fluent-emoji-flat",
            Self::Twemoji => "twemoji",
        }
    }
}

/// A drawing at one size. Colours are multiplied by their opacity.
#[derive(Debug)]
pub struct Sprite {
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
    /// RGBA, row by row from the top: 4 × width × height bytes.
    pub rgba: Vec<u8>,
}

/// The drawings of all concepts in one style.
pub struct Atlas {
    drawings: Vec<RgbaImage>,
    /// The sprites by concept, then by size.
    sprites: Vec<OnceLock<Sprite>>,
}

impl Atlas {
    /// Opens the drawings of a style, rasterising them where that has not been done. `drawings`: the folder that
    /// `deploy/fetch/drawings.py` prints; the rasterised drawings are kept there too.
    ///
    /// # Errors
    /// When a set is missing, or lacks a drawing of a concept.
    pub fn open(drawings: &Path, style: Style) -> Result<Self> {
        let source = Source::read(drawings, style)?;
        let kept = drawings.join(format!("{}-{}.rgba", style.set(), &source.digest[..16]));
        let canvases = match read_kept(&kept) {
            Some(canvases) => canvases,
            None => {
                let canvases = source.rasterise()?;
                keep(&kept, &canvases).with_context(|| format!("cannot write {}", kept.display()))?;
                canvases
            }
        };
        Ok(Self::new(canvases))
    }

    fn new(canvases: Vec<RgbaImage>) -> Self {
        let sprites = (0..canvases.len() * SIZES.count()).map(|_| OnceLock::new()).collect();
        Self { drawings: canvases.iter().map(without_margins).collect(), sprites }
    }

    /// Returns width and height of a drawing whose longer side has `size` pixels.
    pub fn extent(&self, concept: Concept, size: u32) -> (u32, u32) {
        let (width, height) = self.drawings[concept.index()].dimensions();
        let scaled = |side: u32| ((side * size) as f32 / width.max(height) as f32).round().max(1.0) as u32;
        (scaled(width), scaled(height))
    }

    /// Returns the drawing of a concept whose longer side has `size` pixels.
    ///
    /// # Panics
    /// If no scene draws at this size.
    pub fn sprite(&self, concept: Concept, size: u32) -> &Sprite {
        assert!(SIZES.contains(&size), "no scene draws at {size} pixels");
        let index = concept.index() * SIZES.count() + (size - SIZES.start()) as usize;
        self.sprites[index].get_or_init(|| {
            let (width, height) = self.extent(concept, size);
            let drawing = &self.drawings[concept.index()];
            // The triangle widens with the reduction, so every source pixel counts.
            let rgba = imageops::resize(drawing, width, height, imageops::FilterType::Triangle).into_raw();
            Sprite { width: width as usize, height: height as usize, rgba }
        })
    }
}

/// What an iconify package says about an icon; sizes default to the set's.
#[derive(Deserialize)]
struct Icon {
    body: String,
    left: Option<f32>,
    top: Option<f32>,
    width: Option<f32>,
    height: Option<f32>,
}

#[derive(Deserialize)]
struct IconSet {
    icons: HashMap<String, Icon>,
    width: Option<f32>,
    height: Option<f32>,
}

struct Source {
    icons: String,
    /// Name of an icon by the code points of its emoji.
    names: HashMap<String, String>,
    style: Style,
    digest: String,
}

impl Source {
    fn read(drawings: &Path, style: Style) -> Result<Self> {
        let read = |suffix: &str| {
            let path: PathBuf = drawings.join(format!("{}.{suffix}.json", style.set()));
            fs::read_to_string(&path).with_context(|| {
                format!("cannot read {}; deploy/fetch/drawings.py fetches it", path.display())
            })
        };
        let (icons, chars) = (read("icons")?, read("chars")?);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&FORMAT.to_le_bytes()).update(icons.as_bytes()).update(chars.as_bytes());
        for concept in Concept::all() {
            hasher.update(concept.hexcode().as_bytes()).update(b"\n");
        }
        let names = serde_json::from_str(&chars).context("the names of icons are not understood")?;
        Ok(Self { icons, names, style, digest: hasher.finalize().to_hex().to_string() })
    }

    fn rasterise(&self) -> Result<Vec<RgbaImage>> {
        let set: IconSet = serde_json::from_str(&self.icons).context("the icons are not understood")?;
        Concept::all()
            .map(|concept| {
                let name = self.icon_name(concept)?;
                let icon = set.icons.get(name).with_context(|| format!("no icon is called {name}"))?;
                rasterise(icon, &set).with_context(|| format!("cannot draw {name}"))
            })
            .collect()
    }

    fn icon_name(&self, concept: Concept) -> Result<&String> {
        let hexcode = concept.hexcode();
        // Sets disagree whether the code point that asks for an image is written.
        let found = self.names.get(hexcode).or_else(|| self.names.get(hexcode.trim_end_matches("-fe0f")));
        found.with_context(|| format!("{} has no drawing of {}", self.style.set(), concept.name()))
    }
}

/// Premultiplied RGBA of CANVAS_SIDE x CANVAS_SIDE.
fn rasterise(icon: &Icon, set: &IconSet) -> Result<RgbaImage> {
    let side = |own: Option<f32>, common: Option<f32>| own.or(common).unwrap_or(16.0);
    let (width, height) = (side(icon.width, set.width), side(icon.height, set.height));
    let (left, top) = (icon.left.unwrap_or(0.0), icon.top.unwrap_or(0.0));
    let svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{}</svg>"#,
        icon.body
    );
    let tree = usvg::Tree::from_str(&svg, &usvg::Options::default())?;
    let mut canvas =
        tiny_skia::Pixmap::new(CANVAS_SIDE, CANVAS_SIDE).context("a canvas has more than 0 pixels")?;
    let scale = CANVAS_SIDE as f32 / width.max(height);
    resvg::render(&tree, tiny_skia::Transform::from_scale(scale, scale), &mut canvas.as_mut());
    let image = RgbaImage::from_raw(CANVAS_SIDE, CANVAS_SIDE, canvas.take());
    image.context("a canvas has 4 bytes a pixel")
}

/// Cut to what is opaque, its longer side DRAWING_SIDE.
fn without_margins(canvas: &RgbaImage) -> RgbaImage {
    let opaque = canvas.enumerate_pixels().filter(|(_, _, pixel)| pixel[3] >= OPAQUE_MIN);
    let (mut left, mut top, mut right, mut bottom) = (CANVAS_SIDE, CANVAS_SIDE, 0, 0);
    for (x, y, _) in opaque {
        (left, right) = (left.min(x), right.max(x + 1));
        (top, bottom) = (top.min(y), bottom.max(y + 1));
    }
    let (width, height) = (right.saturating_sub(left).max(1), bottom.saturating_sub(top).max(1));
    let cut = imageops::crop_imm(canvas, left.min(CANVAS_SIDE - 1), top.min(CANVAS_SIDE - 1), width, height);
    let scale = DRAWING_SIDE as f32 / width.max(height) as f32;
    let scaled = |side: u32| (side as f32 * scale).round().max(1.0) as u32;
    imageops::resize(&cut.to_image(), scaled(width), scaled(height), imageops::FilterType::Triangle)
}

const CANVAS_BYTES: usize = (CANVAS_SIDE * CANVAS_SIDE * 4) as usize;

/// A checksum, then the canvases one after another. Anything wrong with it only means that it is made anew.
fn read_kept(path: &Path) -> Option<Vec<RgbaImage>> {
    let bytes = fs::read(path).ok()?;
    let (checksum, pixels) = bytes.split_first_chunk::<{ blake3::OUT_LEN }>()?;
    if blake3::hash(pixels).as_bytes() != checksum || pixels.len() != CONCEPTS_MAX * CANVAS_BYTES {
        return None;
    }
    let canvas = |bytes: &[u8]| RgbaImage::from_raw(CANVAS_SIDE, CANVAS_SIDE, bytes.to_vec());
    pixels.chunks_exact(CANVAS_BYTES).map(canvas).collect()
}

fn keep(path: &Path, canvases: &[RgbaImage]) -> Result<()> {
    let pixels: Vec<u8> = canvases.iter().flat_map(|canvas| canvas.as_raw()).copied().collect();
    ensure!(pixels.len() == CONCEPTS_MAX * CANVAS_BYTES, "{} drawings", canvases.len());
    let Some(folder) = path.parent() else { bail!("{} is in no folder", path.display()) };
    // Another process may be at the same: each writes its own and the last one renamed stays.
    let mut aside = tempfile::NamedTempFile::new_in(folder)?;
    std::io::Write::write_all(&mut aside, blake3::hash(&pixels).as_bytes())?;
    std::io::Write::write_all(&mut aside, &pixels)?;
    aside.persist(path)?;
    Ok(())
}
