//! What an image shows, found without the model: background by its border, things by what stands out from it, each
//! named after the drawing that it is nearest to, pixel by pixel and colour by colour.

#[cfg(test)]
mod tests;

use image::{RgbImage, RgbaImage, imageops};

use crate::data::{Background, Bounds, Concept, Drawings, Style};

/// Things and drawings are compared at this many pixels a side, stretched.
const COMPARED_SIDE: u32 = 20;
/// Size at which drawings are taken for that.
const DRAWN_SIZE: u32 = 40;
/// Pixels of the border that tells the background.
const BORDER: u32 = 2;
/// A pixel stands out if a channel differs from the background by this much.
const DISTANCE_MIN: u8 = 36;
/// A thing has at least this many pixels, and this share of the largest one's.
const PIXELS_MIN: usize = 12;
const SHARE_MIN: f32 = 0.12;
/// The distance of two shapes a factor e apart in width by height, in squared levels of colour.
const SHAPE_WEIGHT: f32 = 4_000.0;

/// What an image was found to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The background's colour.
    pub background: Background,
    /// The things, largest first.
    pub things: Vec<Found>,
}

/// A thing that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The concept whose drawing is nearest to it.
    pub concept: Concept,
    /// Where it lies.
    pub bounds: Bounds,
}

impl Verdict {
    /// Returns the concept of the largest thing.
    pub fn concept(&self) -> Option<Concept> {
        self.things.first().map(|found| found.concept)
    }

    /// Returns the number of things.
    pub fn count(&self) -> usize {
        self.things.len()
    }
}

/// Names things by the drawings that it knows.
pub struct Judge {
    templates: Vec<Template>,
}

struct Template {
    concept: Concept,
    /// Colours multiplied by their opacity.
    pixels: RgbaImage,
    /// Logarithm of width by height.
    shape: f32,
}

impl Judge {
    /// Returns a judge that knows the first `concepts` concepts of the table in these styles.
    pub fn new(drawings: &Drawings, concepts: usize, styles: &[Style]) -> Self {
        let templates = Concept::all().take(concepts).flat_map(|concept| {
            styles.iter().map(move |&style| {
                let sprite = drawings.atlas(style).sprite(concept, DRAWN_SIZE);
                let (width, height) = (sprite.width as u32, sprite.height as u32);
                let whole = RgbaImage::from_raw(width, height, sprite.rgba.clone())
                    .expect("a sprite has 4 bytes a pixel");
                let side = COMPARED_SIDE;
                let pixels = imageops::resize(&whole, side, side, imageops::FilterType::Triangle);
                Template { concept, pixels, shape: shape(width, height) }
            })
        });
        Self { templates: templates.collect() }
    }

    /// Finds background and things of an image.
    pub fn inspect(&self, image: &RgbImage) -> Verdict {
        let (background, rgb) = background(image);
        let mut regions = regions(image, rgb);
        regions.sort_by_key(|region| std::cmp::Reverse(region.pixels));
        let largest = regions.first().map_or(0, |region| region.pixels);
        regions.retain(|region| {
            region.pixels >= PIXELS_MIN && region.pixels as f32 >= largest as f32 * SHARE_MIN
        });
        let things = regions
            .into_iter()
            .map(|region| Found { concept: self.nearest(image, rgb, region.bounds), bounds: region.bounds });
        Verdict { background, things: things.collect() }
    }

    fn nearest(&self, image: &RgbImage, background: [u8; 3], bounds: Bounds) -> Concept {
        let Bounds { left, top, right, bottom } = bounds;
        let (width, height) = (right - left, bottom - top);
        let cut = imageops::crop_imm(image, left, top, width, height).to_image();
        let seen = imageops::resize(&cut, COMPARED_SIDE, COMPARED_SIDE, imageops::FilterType::Triangle);
        let distance = |template: &Template| {
            let shapes = (template.shape - shape(width, height)).abs();
            difference(&seen, &template.pixels, background) + SHAPE_WEIGHT * shapes
        };
        let distances = self.templates.iter().map(|template| (distance(template), template.concept));
        distances.min_by(|one, other| one.0.total_cmp(&other.0)).expect("a judge knows a drawing").1
    }
}

fn shape(width: u32, height: u32) -> f32 {
    (width as f32 / height as f32).ln()
}

/// Returns the mean of squared differences where the drawing would lie on the background.
fn difference(seen: &RgbImage, drawing: &RgbaImage, background: [u8; 3]) -> f32 {
    let pixels = seen.pixels().zip(drawing.pixels());
    let sum: f32 = pixels
        .map(|(seen, over)| {
            let through = f32::from(255 - over[3]) / 255.0;
            let channels = seen.0.iter().zip(over.0).zip(background);
            let squares = channels.map(|((&seen, over), under)| {
                (f32::from(seen) - f32::from(over) - f32::from(under) * through).powi(2)
            });
            squares.sum::<f32>()
        })
        .sum();
    sum / (COMPARED_SIDE * COMPARED_SIDE) as f32
}

/// Returns what most of the border is nearest to, and the colour that it has there.
fn background(image: &RgbImage) -> (Background, [u8; 3]) {
    let (width, height) = image.dimensions();
    let border = image
        .enumerate_pixels()
        .filter(|&(x, y, _)| x < BORDER || y < BORDER || x >= width - BORDER || y >= height - BORDER);
    let mut votes: [Vec<[u8; 3]>; Background::ALL.len()] = Default::default();
    for (_, _, pixel) in border {
        let distance = |background: &Background| -> u32 {
            let channels = background.rgb().into_iter().zip(pixel.0);
            channels.map(|(one, other)| u32::from(one.abs_diff(other)).pow(2)).sum()
        };
        let nearest = Background::ALL.into_iter().min_by_key(distance).expect("there are colours");
        votes[nearest.index()].push(pixel.0);
    }
    let winner = Background::ALL.into_iter().max_by_key(|background| votes[background.index()].len());
    let winner = winner.expect("there are colours");
    let voted = &mut votes[winner.index()];
    let median = [0, 1, 2].map(|channel: usize| {
        voted.sort_unstable_by_key(|pixel| pixel[channel]);
        voted.get(voted.len() / 2).map_or(0, |pixel| pixel[channel])
    });
    (winner, median)
}

struct Region {
    bounds: Bounds,
    pixels: usize,
}

/// Returns regions of connected pixels that stand out; regions whose bounds overlap are one thing (a drawing may have
/// parts).
fn regions(image: &RgbImage, background: [u8; 3]) -> Vec<Region> {
    let (width, height) = image.dimensions();
    let out = |x: u32, y: u32| {
        let mut channels = image.get_pixel(x, y).0.into_iter().zip(background);
        channels.any(|(one, other)| one.abs_diff(other) >= DISTANCE_MIN)
    };
    let mut open: Vec<bool> = (0..width * height).map(|index| out(index % width, index / width)).collect();
    let mut regions = Vec::new();
    for start in 0..width * height {
        if open[start as usize] {
            regions.push(flood(&mut open, width, start));
        }
    }
    while let Some((one, other)) = overlapping(&regions) {
        let gone = regions.swap_remove(other);
        let kept = &mut regions[one];
        *kept = Region { bounds: kept.bounds.around(gone.bounds), pixels: kept.pixels + gone.pixels };
    }
    regions
}

/// Takes the pixels that are connected to `start`, corners included.
fn flood(open: &mut [bool], width: u32, start: u32) -> Region {
    let height = open.len() as u32 / width;
    let (x, y) = (start % width, start / width);
    let mut region = Region { bounds: Bounds { left: x, top: y, right: x + 1, bottom: y + 1 }, pixels: 0 };
    let mut edge = vec![start];
    open[start as usize] = false;
    while let Some(index) = edge.pop() {
        let (x, y) = (index % width, index / width);
        region.pixels += 1;
        region.bounds = region.bounds.around(Bounds { left: x, top: y, right: x + 1, bottom: y + 1 });
        for beside in y.saturating_sub(1)..(y + 2).min(height) {
            for along in x.saturating_sub(1)..(x + 2).min(width) {
                let index = beside * width + along;
                if std::mem::take(&mut open[index as usize]) {
                    edge.push(index);
                }
            }
        }
    }
    region
}

/// Returns two regions whose bounds share a pixel, the first before the second.
fn overlapping(regions: &[Region]) -> Option<(usize, usize)> {
    let overlap = |one: Bounds, other: Bounds| {
        one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom
    };
    regions.iter().enumerate().find_map(|(index, region)| {
        let before = regions[..index].iter().position(|before| overlap(before.bounds, region.bounds));
        before.map(|before| (before, index))
    })
}
