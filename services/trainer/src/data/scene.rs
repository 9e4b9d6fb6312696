//! A scene: what is where on which background; and its pixels.

use crate::data::{
    atlas::{Sprite, Style},
    background::Background,
    concept::Concept,
    drawings::Drawings,
    image::{Image, SIDE},
};

/// Where in the image something is, by the centre of its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// The upper left corner.
    TopLeft,
    /// The upper right corner.
    TopRight,
    /// The lower left corner.
    BottomLeft,
    /// The lower right corner.
    BottomRight,
    /// The middle.
    Center,
}

impl Place {
    /// Every place.
    pub const ALL: [Self; 5] =
        [Self::TopLeft, Self::TopRight, Self::BottomLeft, Self::BottomRight, Self::Center];
    /// Every place but the center, in reading order.
    pub const CORNERS: [Self; 4] = [Self::TopLeft, Self::TopRight, Self::BottomLeft, Self::BottomRight];

    /// Returns the place's name as documents write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::TopLeft => "top left",
            Self::TopRight => "top right",
            Self::BottomLeft => "bottom left",
            Self::BottomRight => "bottom right",
            Self::Center => "center",
        }
    }

    /// Returns whether the place lies right of and below the middle; `None` for the center.
    pub fn sides(self) -> Option<(bool, bool)> {
        match self {
            Self::TopLeft => Some((false, false)),
            Self::TopRight => Some((true, false)),
            Self::BottomLeft => Some((false, true)),
            Self::BottomRight => Some((true, true)),
            Self::Center => None,
        }
    }
}

/// Where the first of two things lies, seen from the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Relation {
    /// The first thing lies left of the second.
    LeftOf,
    /// The first thing lies right of the second.
    RightOf,
    /// The first thing lies above the second.
    Above,
    /// The first thing lies below the second.
    Below,
}

impl Relation {
    /// Every relation.
    pub const ALL: [Self; 4] = [Self::LeftOf, Self::RightOf, Self::Above, Self::Below];

    /// Returns the relation as documents write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LeftOf => "left of",
            Self::RightOf => "right of",
            Self::Above => "above",
            Self::Below => "below",
        }
    }

    /// Returns where the second thing lies, seen from the first.
    pub fn turned(self) -> Self {
        match self {
            Self::LeftOf => Self::RightOf,
            Self::RightOf => Self::LeftOf,
            Self::Above => Self::Below,
            Self::Below => Self::Above,
        }
    }
}

/// A box in pixels of the image: [left, right) × [top, bottom).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The first column of pixels inside.
    pub left: u32,
    /// The first row of pixels inside.
    pub top: u32,
    /// The first column of pixels right of the box.
    pub right: u32,
    /// The first row of pixels below the box.
    pub bottom: u32,
}

impl Bounds {
    /// Returns left, top, right and bottom in fractions of the image.
    pub fn fractions(self) -> [f32; 4] {
        [self.left, self.top, self.right, self.bottom].map(|edge| edge as f32 / SIDE as f32)
    }

    /// Returns x and y of the middle, in pixels.
    pub fn center(self) -> [f32; 2] {
        [(self.left + self.right) as f32 / 2.0, (self.top + self.bottom) as f32 / 2.0]
    }

    /// Returns the smallest box around this one and another.
    pub fn around(self, other: Self) -> Self {
        Self {
            left: self.left.min(other.left),
            top: self.top.min(other.top),
            right: self.right.max(other.right),
            bottom: self.bottom.max(other.bottom),
        }
    }
}

/// One drawing in a scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thing {
    /// What the thing is.
    pub concept: Concept,
    /// The emoji set that it is drawn from.
    pub style: Style,
    /// The length of the drawing's longer side, in pixels.
    pub size: u32,
    /// Where its drawing lies.
    pub bounds: Bounds,
}

/// How the things of a scene are arranged, which is what can be said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrangement {
    /// One thing, at a place.
    Single(Place),
    /// The same thing 1 to 4 times; gathered at a place, or spread.
    Group(Option<Place>),
    /// Two different things.
    Pair(Relation),
    /// Two to four different things in reading order, and each one's own corner.
    Corners(Vec<Place>),
}

/// Things on a background.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scene {
    /// The colour behind the things.
    pub background: Background,
    /// How the things are arranged.
    pub arrangement: Arrangement,
    /// The things, 1 to 4 of them; none in [`Scene::empty`].
    pub things: Vec<Thing>,
    /// The index of the thing with a red circle around it.
    pub circled: Option<usize>,
}

impl Scene {
    /// Returns a scene without things: of documents that show none.
    pub fn empty() -> Self {
        let arrangement = Arrangement::Group(None);
        Self { background: Background::White, arrangement, things: Vec::new(), circled: None }
    }

    /// Returns each concept once, in order of appearance, and how often it is there.
    pub fn counts(&self) -> Vec<(Concept, u32)> {
        let mut counts: Vec<(Concept, u32)> = Vec::new();
        for thing in &self.things {
            match counts.iter_mut().find(|(concept, _)| *concept == thing.concept) {
                Some((_, count)) => *count += 1,
                None => counts.push((thing.concept, 1)),
            }
        }
        counts
    }

    /// Returns a pair described from its other thing; any other scene as it is.
    pub fn turned(&self) -> Self {
        let mut scene = self.clone();
        if let Arrangement::Pair(relation) = &mut scene.arrangement {
            *relation = relation.turned();
            scene.things.reverse();
        }
        scene
    }

    /// Returns the scene as its description goes where one is enough: a pair from its left or upper thing.
    pub fn in_reading_order(&self) -> Self {
        match self.arrangement {
            Arrangement::Pair(Relation::RightOf | Relation::Below) => self.turned(),
            _ => self.clone(),
        }
    }

    /// Draws the scene.
    pub fn draw(&self, drawings: &Drawings) -> Image {
        let mut rgb = self.background.rgb().repeat(SIDE * SIDE);
        for thing in &self.things {
            let sprite = drawings.atlas(thing.style).sprite(thing.concept, thing.size);
            blend(&mut rgb, sprite, thing.bounds);
        }
        if let Some(thing) = self.circled.map(|index| &self.things[index]) {
            circle(&mut rgb, thing.bounds);
        }
        Image::new(rgb)
    }
}

fn blend(rgb: &mut [u8], sprite: &Sprite, bounds: Bounds) {
    let (left, top) = (bounds.left as usize, bounds.top as usize);
    for (y, row) in sprite.rgba.chunks_exact(sprite.width * 4).enumerate() {
        let start = ((top + y) * SIDE + left) * 3;
        let under = &mut rgb[start..start + sprite.width * 3];
        for (under, over) in under.chunks_exact_mut(3).zip(row.chunks_exact(4)) {
            let through = 255 - u32::from(over[3]);
            for (under, &over) in under.iter_mut().zip(over) {
                // Rounded division by 255.
                let value = (u32::from(*under) * through + 127) / 255 + u32::from(over);
                *under = value.min(255) as u8;
            }
        }
    }
}

/// Pixels of the circle's line.
const LINE_WIDTH: f32 = 2.0;
const CIRCLE_RGB: [u8; 3] = [255, 0, 0];
/// Between a thing's corners and the line, as a share of the half diagonal: drawings seldom fill their corners.
const CIRCLE_RADIUS: f32 = 0.9;

/// Where it reaches beyond the image it is cut off.
fn circle(rgb: &mut [u8], bounds: Bounds) {
    let [center_x, center_y] = bounds.center();
    let (width, height) = ((bounds.right - bounds.left) as f32, (bounds.bottom - bounds.top) as f32);
    let radius = width.hypot(height) / 2.0 * CIRCLE_RADIUS;
    for (index, pixel) in rgb.chunks_exact_mut(3).enumerate() {
        let (x, y) = ((index % SIDE) as f32 + 0.5, (index / SIDE) as f32 + 0.5);
        let from_line = ((x - center_x).hypot(y - center_y) - radius).abs();
        let cover = (LINE_WIDTH / 2.0 + 0.5 - from_line).clamp(0.0, 1.0);
        for (under, over) in pixel.iter_mut().zip(CIRCLE_RGB) {
            *under = (f32::from(*under) * (1.0 - cover) + f32::from(over) * cover).round() as u8;
        }
    }
}
