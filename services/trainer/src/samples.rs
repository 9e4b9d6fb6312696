//! The training data as objectives draw it.

use crate::{
    data::{Bounds, Document, Picture, SIDE, Scene, Split, Task, Thing, World},
    objective::{NAMES, NamedScene, Samples},
};

/// The world's training split, with scenes' names for a grid of queries.
pub struct TrainingWorld {
    pub world: World,
    /// Queries along a side.
    pub grid_side: usize,
}

/// Of a query's square, covered by a thing's bounds: with less the query is not asked for its name.
const COVERED_MIN: f32 = 0.25;

impl Samples for TrainingWorld {
    fn document(&self, task: Task, number: u64) -> Document {
        self.world.document(Split::Train, task, number)
    }

    fn scene(&self, number: u64) -> NamedScene {
        let scene = self.world.scene(Split::Train, number);
        named(&scene, self.world.picture(&scene), self.grid_side)
    }
}

fn named(scene: &Scene, picture: Picture, grid_side: usize) -> NamedScene {
    let things = covering(scene, grid_side);
    let name = |thing: &Option<Thing>| thing.map_or(NAMES, |thing| thing.concept.index() as i64);
    let bounds = |thing: &Option<Thing>| thing.map_or([0.0; 4], |thing| thing.bounds.fractions());
    NamedScene {
        picture,
        names: things.iter().map(name).collect(),
        boxes: things.iter().map(bounds).collect(),
        background: scene.background.index() as i64,
        count: scene.things.len() as i64,
    }
}

/// What covers most of each query's square, row by row.
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
    use crate::data::{Background, Concept, Layout, Place, Style};

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
            layout: Layout::Single(Place::TopLeft),
            things: vec![thing(7, 0, 0, 24), thing(9, 40, 48, 14)],
            circled: None,
        };
        let NamedScene { names, boxes, count, .. } = named(&scene, Picture::new(vec![0; Picture::BYTES]), 4);
        // 24 pixels cover a square of 16 and half of the next; the corner between is a quarter.
        assert_eq!(names[..8], [7, 7, NAMES, NAMES, 7, 7, NAMES, NAMES]);
        assert_eq!(names[8..], [NAMES, NAMES, NAMES, NAMES, NAMES, NAMES, 9, 9]);
        // Each the whole thing's, whichever part of it a query covers.
        let (seven, nine, none) = ([0.0, 0.0, 0.375, 0.375], [0.625, 0.75, 0.84375, 0.96875], [0.0; 4]);
        assert_eq!(boxes[..8], [seven, seven, none, none, seven, seven, none, none]);
        assert_eq!(boxes[8..], [none, none, none, none, none, none, nine, nine]);
        assert_eq!(count, 2);
    }
}
