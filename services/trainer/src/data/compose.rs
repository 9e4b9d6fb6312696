//! Scenes drawn at random, of what a split may show.

use rand::{Rng, seq::IndexedRandom, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::data::{
    atlas::Style,
    background::Background,
    concept::Concept,
    drawings::Drawings,
    held_out,
    image::SIDE,
    scene::{Arrangement, Bounds, Place, Relation, Scene, Thing},
};

/// Which compositions a scene may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Novelty {
    /// Nothing that is held out.
    Seen,
    /// A pair or count that is held out, wherever a scene has two things or more.
    HeldOut,
}

/// Pixels of a quarter of the image.
const CELL: u32 = SIDE as u32 / 2;
/// Pixels between a thing and the edge of its cell, so that neighbours never touch.
const CELL_MARGIN: u32 = 1;
/// Pixels of the square in a corner where a group gathers, each copy in a quarter of it.
const GATHER_CELL: u32 = 20;
/// Pixels that a thing in the center may be off it, both ways together and with the margins.
const CENTER_ROOM: u32 = 8;
/// Draws until a scene is legible and as novel as asked; one in ten is held out, so this never binds.
const DRAWS_MAX: usize = 10_000;

/// Longer sides in pixels, by arrangement.
const SINGLE_SIZES: std::ops::RangeInclusive<u32> = 20..=30;
const CENTER_SIZES: std::ops::RangeInclusive<u32> = 26..=46;
const SPREAD_SIZES: std::ops::RangeInclusive<u32> = 19..=28;
const GATHERED_SIZES: std::ops::RangeInclusive<u32> = 15..=18;

/// Draws scenes at random, of what a split may show.
#[derive(Clone, Copy)]
pub struct Composer<'a> {
    /// The drawings of every style.
    pub drawings: &'a Drawings,
    /// The number of concepts that are drawn: the first of the table.
    pub concepts: u16,
    /// The styles that scenes are drawn in; a scene is of one.
    pub styles: &'static [Style],
    /// Whether scenes show what is held out from training.
    pub novelty: Novelty,
    /// Whether sizes and positions are the middle ones of what is possible instead of random: for images to paint,
    /// which their description must determine, since a regression learns the mean of what is left open.
    pub tidy: bool,
}

impl Composer<'_> {
    /// Draws a scene of any arrangement, the mixture that captions and names are learned from.
    pub fn any(&self, rng: &mut ChaCha8Rng) -> Scene {
        match rng.random_range(0..10u32) {
            0..3 => self.single(rng),
            3..5 => self.spread(rng),
            5..7 => self.gathered(rng),
            7..9 => self.pair(rng),
            _ => self.corners(rng),
        }
    }

    /// Draws one thing of any concept, in a corner or the center.
    pub fn single(&self, rng: &mut ChaCha8Rng) -> Scene {
        let concept = self.concept(rng);
        self.single_of(rng, concept)
    }

    /// Draws one thing of this concept, in a corner or the center.
    pub fn single_of(&self, rng: &mut ChaCha8Rng, concept: Concept) -> Scene {
        let place = *Place::ALL.choose(rng).expect("not empty");
        self.placed(rng, concept, place)
    }

    /// Draws a scene of one thing of this concept at this place.
    pub fn placed(&self, rng: &mut ChaCha8Rng, concept: Concept, place: Place) -> Scene {
        let style = self.style(rng);
        let (size, cell) = match place.sides() {
            None => {
                let size = self.size(rng, CENTER_SIZES);
                let (width, height) = self.drawings.atlas(style).extent(concept, size);
                (size, Bounds::amid(width + CENTER_ROOM, height + CENTER_ROOM))
            }
            Some(sides) => (self.size(rng, SINGLE_SIZES), quarter(sides)),
        };
        let thing = self.thing(rng, (concept, style, size), cell);
        self.finish(rng, Arrangement::Single(place), vec![thing])
    }

    /// Draws the same thing 1 to 4 times, each in a quarter of the image.
    pub fn spread(&self, rng: &mut ChaCha8Rng) -> Scene {
        self.novel(rng, |rng| {
            let (concept, count) = (self.concept(rng), self.count(rng));
            if count == 1 {
                return self.single_of(rng, concept);
            }
            let (style, size) = (self.style(rng), self.size(rng, SPREAD_SIZES));
            let mut cells = Place::CORNERS.map(cell_of);
            if !self.tidy {
                cells.shuffle(rng);
            }
            let things = cells[..count as usize].iter();
            let things = things.map(|&cell| self.thing(rng, (concept, style, size), cell)).collect();
            self.finish(rng, Arrangement::Group(None), things)
        })
    }

    /// Draws the same thing 1 to 4 times, all in one corner of the image.
    pub fn gathered(&self, rng: &mut ChaCha8Rng) -> Scene {
        self.novel(rng, |rng| {
            let (concept, count) = (self.concept(rng), self.count(rng));
            let place = *Place::CORNERS.choose(rng).expect("not empty");
            if count == 1 {
                return self.placed(rng, concept, place);
            }
            let (style, size) = (self.style(rng), self.size(rng, GATHERED_SIZES));
            let mut steps = [(1, 0), (0, 1), (1, 1)];
            if !self.tidy {
                steps.shuffle(rng);
            }
            let cells = gather_cells(place, steps);
            let things = cells[..count as usize].iter();
            let things = things.map(|&cell| self.thing(rng, (concept, style, size), cell)).collect();
            self.finish(rng, Arrangement::Group(Some(place)), things)
        })
    }

    /// Draws two different things, one left of, right of, above or below the other.
    pub fn pair(&self, rng: &mut ChaCha8Rng) -> Scene {
        self.novel(rng, |rng| {
            let concepts = self.different(rng, 2);
            let relation = *Relation::ALL.choose(rng).expect("not empty");
            let style = self.style(rng);
            // Along the other axis both lie in one band, wider than a cell so that they are seldom quite level.
            let across = if self.tidy { (CELL - 8) / 2 } else { rng.random_range(0..=CELL - 8) };
            let cell = |far: bool| {
                let along = if far { CELL } else { 0 };
                match relation {
                    Relation::LeftOf | Relation::RightOf => Bounds::rectangle(along, across, CELL, CELL + 8),
                    Relation::Above | Relation::Below => Bounds::rectangle(across, along, CELL + 8, CELL),
                }
            };
            let first_far = matches!(relation, Relation::RightOf | Relation::Below);
            let things = concepts.iter().zip([cell(first_far), cell(!first_far)]).map(|(&concept, cell)| {
                let size = self.size(rng, SPREAD_SIZES);
                self.thing(rng, (concept, style, size), cell)
            });
            let things = things.collect();
            self.finish(rng, Arrangement::Pair(relation), things)
        })
    }

    /// Two to four different things, each in a corner, in reading order.
    pub fn corners(&self, rng: &mut ChaCha8Rng) -> Scene {
        self.novel(rng, |rng| {
            let count = rng.random_range(2..=4u32) as usize;
            let concepts = self.different(rng, count);
            let style = self.style(rng);
            let mut corners: Vec<usize> = (0..4).collect();
            if !self.tidy {
                corners.shuffle(rng);
            }
            corners.truncate(count);
            corners.sort_unstable();
            let places: Vec<Place> = corners.into_iter().map(|corner| Place::CORNERS[corner]).collect();
            let things = concepts.iter().zip(&places).map(|(&concept, &place)| {
                let size = self.size(rng, SPREAD_SIZES);
                self.thing(rng, (concept, style, size), cell_of(place))
            });
            let things = things.collect();
            self.finish(rng, Arrangement::Corners(places), things)
        })
    }

    /// Draws a concept.
    pub fn concept(&self, rng: &mut ChaCha8Rng) -> Concept {
        Concept(rng.random_range(0..self.concepts))
    }

    /// Draws `count` different concepts.
    pub fn different(&self, rng: &mut ChaCha8Rng, count: usize) -> Vec<Concept> {
        let mut concepts = Vec::with_capacity(count);
        while concepts.len() < count {
            let concept = self.concept(rng);
            if !concepts.contains(&concept) {
                concepts.push(concept);
            }
        }
        concepts
    }

    /// Draws a background on which all of the things are legible and which is none of `except`; `None` if there is no
    /// such background.
    pub fn background(
        &self,
        rng: &mut ChaCha8Rng,
        things: &[Thing],
        except: &[Background],
    ) -> Option<Background> {
        let fits = |background: &Background| {
            let legible = |thing: &Thing| self.drawings.legible(thing.concept, thing.style, *background);
            !except.contains(background) && things.iter().all(legible)
        };
        let fitting: Vec<_> = Background::ALL.into_iter().filter(fits).collect();
        fitting.choose(rng).copied()
    }

    /// Returns another thing of the same size and style, around the same center as far as the image reaches.
    pub fn instead(&self, old: Thing, concept: Concept) -> Thing {
        let (width, height) = self.drawings.atlas(old.style).extent(concept, old.size);
        let [x, y] = old.bounds.center();
        let start = |center: f32, len: u32| {
            let start = (center - len as f32 / 2.0).max(0.0) as u32;
            start.min(SIDE as u32 - len)
        };
        let (left, top) = (start(x, width), start(y, height));
        Thing { concept, bounds: Bounds { left, top, right: left + width, bottom: top + height }, ..old }
    }

    /// Draws a thing of this concept, style and longer side in pixels, somewhere inside `cell`.
    pub fn thing(
        &self,
        rng: &mut ChaCha8Rng,
        (concept, style, size): (Concept, Style, u32),
        cell: Bounds,
    ) -> Thing {
        let (width, height) = self.drawings.atlas(style).extent(concept, size);
        let mut start = |low: u32, high: u32, len: u32| {
            let (low, high) = (low + CELL_MARGIN, (high - CELL_MARGIN).saturating_sub(len));
            match low < high {
                true if self.tidy => u32::midpoint(low, high),
                true => rng.random_range(low..=high),
                false => low,
            }
        };
        let left = start(cell.left, cell.right, width);
        let top = start(cell.top, cell.bottom, height);
        Thing {
            concept,
            style,
            size,
            bounds: Bounds { left, top, right: left + width, bottom: top + height },
        }
    }

    fn size(&self, rng: &mut ChaCha8Rng, sizes: std::ops::RangeInclusive<u32>) -> u32 {
        if self.tidy { u32::midpoint(*sizes.start(), *sizes.end()) } else { rng.random_range(sizes) }
    }

    fn count(&self, rng: &mut ChaCha8Rng) -> u32 {
        rng.random_range(1..=4u32)
    }

    /// Draws one of the composer's styles.
    pub fn style(&self, rng: &mut ChaCha8Rng) -> Style {
        *self.styles.choose(rng).expect("a split has a style")
    }

    /// Every thing is legible on some background; two together need not be, and then white it is: at worst one of
    /// them is hard to see.
    fn finish(&self, rng: &mut ChaCha8Rng, arrangement: Arrangement, things: Vec<Thing>) -> Scene {
        let background = self.background(rng, &things, &[]).unwrap_or(Background::White);
        Scene { background, arrangement, things, circled: None }
    }

    fn novel(&self, rng: &mut ChaCha8Rng, draw: impl Fn(&mut ChaCha8Rng) -> Scene) -> Scene {
        let fits = |scene: &Scene| {
            let several = scene.things.len() > 1;
            held_out::composition(scene) == (several && self.novelty == Novelty::HeldOut)
        };
        let mut scenes = std::iter::repeat_with(|| draw(rng)).take(DRAWS_MAX);
        scenes.find(fits).expect("one scene in ten is held out, and most are not")
    }
}

impl Bounds {
    fn square(left: u32, top: u32, side: u32) -> Self {
        Self::rectangle(left, top, side, side)
    }

    /// In the middle of the image.
    fn amid(width: u32, height: u32) -> Self {
        let side = SIDE as u32;
        Self::rectangle((side - width) / 2, (side - height) / 2, width, height)
    }

    /// Cut at the image's edge.
    fn rectangle(left: u32, top: u32, width: u32, height: u32) -> Self {
        let side = SIDE as u32;
        Self { left, top, right: (left + width).min(side), bottom: (top + height).min(side) }
    }
}

fn quarter((right, below): (bool, bool)) -> Bounds {
    Bounds::square(u32::from(right) * CELL, u32::from(below) * CELL, CELL)
}

fn cell_of(corner: Place) -> Bounds {
    corner.sides().map_or_else(|| Bounds::amid(CELL, CELL), quarter)
}

/// Four cells in a corner, the outermost first, then by `steps` away from it: any first few of them lie well in that
/// corner.
fn gather_cells(corner: Place, [first, second, third]: [(u32, u32); 3]) -> [Bounds; 4] {
    let (right, below) = corner.sides().unwrap_or_default();
    let side = SIDE as u32;
    let start = |far: bool, step: u32| {
        if far { side - GATHER_CELL * (step + 1) } else { GATHER_CELL * step }
    };
    [(0, 0), first, second, third]
        .map(|(across, down)| Bounds::square(start(right, across), start(below, down), GATHER_CELL))
}
