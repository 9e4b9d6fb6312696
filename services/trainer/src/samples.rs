//! Training samples by number: documents, and scenes with labels for a grid of queries.

use crate::data::{
    Background, Bounds, Document, Image, SIDE, Scene, Split, Task, Thing, World, concept::CONCEPTS_MAX,
};

/// The class of a query that no concept is named for; concepts are the classes below it.
pub const NO_CONCEPT: i64 = CONCEPTS_MAX as i64;
/// The number of classes of backgrounds.
pub const BACKGROUNDS: i64 = Background::ALL.len() as i64;
/// The number of things in the fullest scene.
pub const COUNTS: i64 = 4;

/// A source of endless training samples, each a function of its number alone.
pub trait SampleSource: Send + Sync + 'static {
    /// Returns document `number` of a task.
    fn document(&self, task: Task, number: u64) -> Document;

    /// Returns scene `number`, with its labels.
    fn scene(&self, number: u64) -> LabelledScene;
}

/// An image and what stands where in it, for a grid of queries.
#[derive(Clone, Debug)]
pub struct LabelledScene {
    /// The scene's image.
    pub image: Image,
    /// The concept of each query, row by row, or [`NO_CONCEPT`].
    pub names: Vec<i64>,
    /// Left, top, right and bottom of the whole thing that each query is named after, in fractions of the image; any
    /// values where a query has no name.
    pub boxes: Vec<[f32; 4]>,
    /// The background's class.
    pub background: i64,
    /// The number of things, 1 to [`COUNTS`].
    pub count: i64,
}

/// The training split of a [`World`], with labels for a square grid of queries.
pub struct TrainingWorld {
    /// Where the scenes and documents come from.
    pub world: World,
    /// The number of queries along a side of the image.
    pub grid_side: usize,
}

/// The share of a query's square that a thing's box must cover for the query to be named after it.
const COVERED_MIN: f32 = 0.25;

impl SampleSource for TrainingWorld {
    fn document(&self, task: Task, number: u64) -> Document {
        self.world.document(Split::Train, task, number)
    }

    fn scene(&self, number: u64) -> LabelledScene {
        let scene = self.world.scene(Split::Train, number);
        labelled(&scene, self.world.image(&scene), self.grid_side)
    }
}

fn labelled(scene: &Scene, image: Image, grid_side: usize) -> LabelledScene {
    let things = covering(scene, grid_side);
    let name = |thing: &Option<Thing>| thing.map_or(NO_CONCEPT, |thing| thing.concept.index() as i64);
    let bounds = |thing: &Option<Thing>| thing.map_or([0.0; 4], |thing| thing.bounds.fractions());
    LabelledScene {
        image,
        names: things.iter().map(name).collect(),
        boxes: things.iter().map(bounds).collect(),
        background: scene.background.index() as i64,
        count: scene.things.len() as i64,
    }
}

/// Returns what covers most of each query's square, row by row.
fn covering(scene: &Scene, grid_side: usize) -> Vec<Option<Thing>> {
    let square = SIDE as f32 / grid_side as f32;
    let thing = |index: usize| {
        let (left, top) = ((index % grid_side) as f32 * square, (index / grid_side) as f32 * square);
        let covered = |bounds: Bounds| {
            let along = |low: u32, high: u32, start: f32| {
                ((high as f32).min(start + square) - (low as f32).max(start)).max(0.0)
            };
            along(bounds.left, bounds.right, left) * along(bounds.top, bounds.bottom, top) / (square * square)
        };
        let things = scene.things.iter().map(|thing| (covered(thing.bounds), *thing));
        let most = things.max_by(|one, other| one.0.total_cmp(&other.0));
        most.filter(|(covered, _)| *covered >= COVERED_MIN).map(|(_, thing)| thing)
    };
    (0..grid_side * grid_side).map(thing).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Arrangement, Concept, Place, Style};

    #[test]
    fn a_query_is_named_after_what_covers_it() {
        let thing = |concept, left, top, side| Thing {
            concept: Concept(concept),
            style: Style::Noto,
            size: side,
            bounds: Bounds { left, top, right: left + side, bottom: top + side },
        };
        let scene = Scene {
            background: Background::Red,
            arrangement: Arrangement::Single(Place::TopLeft),
            things: vec![thing(7, 0, 0, 24), thing(9, 40, 48, 14)],
            circled: None,
        };
        let LabelledScene { names, boxes, count, .. } =
            labelled(&scene, Image::new(vec![0; Image::BYTES]), 4);
        // 24 pixels cover a square of 16 and half of the next; the corner between is a quarter.
        assert_eq!(names[..8], [7, 7, NO_CONCEPT, NO_CONCEPT, 7, 7, NO_CONCEPT, NO_CONCEPT]);
        assert_eq!(
            names[8..],
            [NO_CONCEPT, NO_CONCEPT, NO_CONCEPT, NO_CONCEPT, NO_CONCEPT, NO_CONCEPT, 9, 9]
        );
        // Each the whole thing's, whichever part of it a query covers.
        let (seven, nine, none) = ([0.0, 0.0, 0.375, 0.375], [0.625, 0.75, 0.84375, 0.96875], [0.0; 4]);
        assert_eq!(boxes[..8], [seven, seven, none, none, seven, seven, none, none]);
        assert_eq!(boxes[8..], [none, none, none, none, none, none, nine, nine]);
        assert_eq!(count, 2);
    }
}
