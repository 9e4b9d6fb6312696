//! The training data as objectives draw it.

use crate::{
    data::{Bounds, Document, SIDE, Scene, Split, Task, World},
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
        NamedScene {
            picture: self.world.picture(&scene),
            names: names(&scene, self.grid_side),
            background: scene.background.index() as i64,
            count: scene.things.len() as i64,
        }
    }
}

/// What covers most of each query's square, row by row.
fn names(scene: &Scene, grid_side: usize) -> Vec<i64> {
    let square = SIDE as f32 / grid_side as f32;
    let name = |index: usize| {
        let (left, top) = ((index % grid_side) as f32 * square, (index / grid_side) as f32 * square);
        let covered = |bounds: Bounds| {
            let along = |low: u32, high: u32, start: f32| {
                ((high as f32).min(start + square) - (low as f32).max(start)).max(0.0)
            };
            along(bounds.left, bounds.right, left) * along(bounds.top, bounds.bottom, top) / (square * square)
        };
        let things = scene.things.iter().map(|thing| (covered(thing.bounds), thing.concept));
        let most = things.max_by(|one, other| one.0.total_cmp(&other.0));
        most.filter(|(covered, _)| *covered >= COVERED_MIN)
            .map_or(NAMES, |(_, concept)| concept.index() as i64)
    };
    (0..grid_side * grid_side).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Background, Concept, Layout, Place, Style, Thing};

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
        let (none, names) = (NAMES, names(&scene, 4));
        // 24 pixels cover a square of 16 and half of the next; the corner between is a quarter.
        assert_eq!(names[..8], [7, 7, none, none, 7, 7, none, none]);
        assert_eq!(names[8..], [none, none, none, none, none, none, 9, 9]);
    }
}
